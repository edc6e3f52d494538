"""How bytes move: one module per transport, one protocol for all (`base.py`)."""
