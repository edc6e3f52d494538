"""Testing programs that use mpicoll: ranks in threads, a plugin of pytest, contracts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .threads import advance, run

__all__ = ["advance", "run"]


def __getattr__(name: str) -> Any:  # every pytest loads this package, for the plugin
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import threads

    return getattr(threads, name)
