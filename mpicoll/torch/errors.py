"""mpicoll's errors as PyTorch's users catch them.

They are RuntimeErrors, as all of PyTorch's are.  Where a call failed by the machine or by a peer,
and not by its arguments, the error is a `torch.distributed.DistBackendError` as well, and a
deadline that passed has the word "timeout" in its text.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch.distributed as dist

import mpicoll as mc

F = TypeVar("F", bound=Callable[..., Any])

_FAILURES: tuple[Any, ...] = (
    mc.CollectiveTimeoutError,
    mc.GroupBrokenError,
    mc.GroupClosedError,
    mc.RankFailedError,
    mc.RemoteRankError,
    mc.TransportError,
)
_BOTH = {
    kind: type(kind.__name__, (kind, dist.DistBackendError), {"__module__": kind.__module__})
    for kind in _FAILURES
}


def translated(method: F) -> F:
    """Make a method raise PyTorch's errors in place of mpicoll's."""

    @functools.wraps(method)
    def call(*args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except mc.MpicollError as error:
            raise torchs(error) from error.__cause__

    return cast(F, call)


def torchs(error: BaseException) -> BaseException:
    """Return an error of mpicoll's, the same one, as one of PyTorch's, too."""
    both = _BOTH.get(type(error))
    if both is not None:
        error.__class__ = both
        if isinstance(error, mc.CollectiveTimeoutError):
            error.args = (f"the timeout of a call has passed: {error}",)
    return error
