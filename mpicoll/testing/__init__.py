"""Testing programs that use mpicoll: ranks in threads, a plugin of pytest, contracts."""

from .threads import advance, run

__all__ = ["advance", "run"]
