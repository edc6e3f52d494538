"""How often a test tries: once normally, in full with MPICOLL_SOAK=1 (scripts/test --soak)."""

import os

SOAK = os.environ.get("MPICOLL_SOAK") == "1"
