"""What can go wrong, by name: one class per kind of failure.

A message names the argument, its value and the remedy.  Each class says whether the
group is still usable afterwards.  MPI's own exceptions become ours in `translate`.
"""

from __future__ import annotations

from collections.abc import Sequence


class MpicollError(RuntimeError):
    """Base class of every error that mpicoll raises on purpose.

    A RuntimeError, as programs for PyTorch catch what its process groups raise.

    Attributes:
        breaks_group: whether the group is unusable afterwards.
    """

    breaks_group = True


class InvalidCallError(MpicollError, ValueError):
    """Your arguments are wrong.

    Raised on this rank at once, before anything is sent.  Peers in the same collective
    hear of it as a `CollectiveMismatchError`.  Buffers are untouched; the group stays usable.
    """

    breaks_group = False


class UnsupportedError(MpicollError, TypeError):
    """This dtype, operator and transport can't be combined exactly.

    Refused, never approximated.  Peers hear of it as a `CollectiveMismatchError`.
    Buffers are untouched; the group stays usable.
    """

    breaks_group = False


class GroupClosedError(MpicollError):
    """The group was used after `shutdown` or `abort`, after MPI.Finalize, or in a forked child.

    Also a store that was used after `close`.
    """


class GroupBrokenError(MpicollError):
    """An earlier failure left the group unusable; the message says which one."""


class CallInterruptedError(MpicollError):
    """A signal handler's exception struck this call, and was raised where the program was.

    A receive was cancelled then, and leaves the group usable; any other call breaks it.
    """

    def __init__(self, message: str, *, breaks_group: bool = True) -> None:
        super().__init__(message)
        self.breaks_group = breaks_group


class CollectiveTimeoutError(MpicollError, TimeoutError):
    """A call did not finish before its deadline.

    After a collective or a send the group is broken, and the buffers stay alive inside
    mpicoll: outputs may still be written.  An expired `recv` is cancelled and leaves the
    group usable, unless its message has begun to come; so does a merge to which not all
    groups came.

    Attributes:
        op: name of the call, such as ``"allreduce"``.
        seq: the call's number in its group.
        elapsed: seconds since the call.
        missing: ranks of the group that had not arrived when the deadline passed; the same on all
            ranks whose call timed out.
    """

    def __init__(
        self,
        message: str,
        *,
        op: str = "",
        seq: int = 0,
        elapsed: float = 0.0,
        missing: Sequence[int] = (),
        breaks_group: bool = True,
    ) -> None:
        super().__init__(message)
        self.breaks_group = breaks_group
        self.op = op
        self.seq = seq
        self.elapsed = elapsed
        self.missing = tuple(missing)


class CollectiveMismatchError(MpicollError):
    """The ranks called different things, or one rank's call was refused.

    Raised on every rank whose own arguments were right, a broadcast's root included.
    No data was moved.  The group stays usable, unless the call numbers differ (program
    order is lost): then it is broken.  Of a `recv`: the message is lost and the array undefined.
    """

    def __init__(self, message: str, *, breaks_group: bool = False) -> None:
        super().__init__(message)
        self.breaks_group = breaks_group


class RankFailedError(MpicollError):
    """A peer died.

    Noticed within a fraction of a second on the same machine, and wherever MPI's fault tolerance
    reports it; elsewhere a death shows as a timeout.  The group is broken, and the buffers of
    the call are undefined; where the launcher lets the others live, `shrink_group` goes on.

    Attributes:
        rank: the peer, as a rank of the group.
    """

    def __init__(self, message: str, *, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class RemoteRankError(MpicollError):
    """A peer raised, or left the call early.  The group is broken.

    Attributes:
        rank: the peer, as a rank of the group.
    """

    def __init__(self, message: str, *, rank: int = -1) -> None:
        super().__init__(message)
        self.rank = rank


class TransportError(MpicollError):
    """MPI or CUDA reported a failure, or MPI can't be loaded; or a store lost its connection.

    The group is broken.

    Attributes:
        code: MPI's error class, CUDA's error, or the store's errno; 0 if there is none.
    """

    def __init__(self, message: str, *, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class DroppedWorkWarning(RuntimeWarning):
    """A Work was dropped while its call was under way, and nobody waited for it.

    So its result may have been read too early.  It comes once for each line of a program that does
    so; ``MPICOLL_WARN_DROPPED=0`` in the environment, or a filter of `warnings`, turns it off.
    """


for _shown in (  # tracebacks have the names under which users know them
    *(MpicollError, InvalidCallError, UnsupportedError, GroupClosedError, GroupBrokenError),
    *(CallInterruptedError, CollectiveTimeoutError, CollectiveMismatchError, RankFailedError),
    *(RemoteRankError, TransportError, DroppedWorkWarning),
):
    _shown.__module__ = "mpicoll"


class _CopyError(InvalidCallError, TypeError):
    """Also a TypeError, as `copy` and `pickle` raise of what they can't copy."""


class Unique:
    """What exists once: a copy would be the same thing under a second, and a shorter, life."""

    __slots__ = ()

    _instead = ""  # what to do

    def __dir__(self) -> list[str]:
        names = object.__dir__(self)
        return [n for n in names if not n.startswith("_") or n.startswith("__")]

    def __reduce_ex__(self, protocol: object) -> str | tuple[object, ...]:
        raise _CopyError(f"{self!r} can be neither copied nor pickled: {self._instead}")


def translate(error: Exception, what: str) -> MpicollError:
    """Turn an exception of mpi4py, CuPy or a step into ours; `what` says what was being done."""
    if isinstance(error, MpicollError):
        return error
    get_class = getattr(error, "Get_error_class", None)
    if get_class is None:
        code = getattr(error, "status", 0)  # as CuPy's errors of CUDA have it
        ours = TransportError(f"{what} failed: {error!r}", code=int(code))
    else:
        ours = TransportError(f"MPI failed in {what}: {error}", code=int(get_class()))
    ours.__cause__ = error
    return ours


def interrupts(error: BaseException) -> bool:
    """Return whether an exception came from a signal handler, and not from what was being done.

    A handler is called with the frame that it interrupts; nothing else is with its caller's frame.
    """
    if not isinstance(error, Exception):
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        interrupted, trace = trace.tb_frame, trace.tb_next
        for value in trace.tb_frame.f_locals.values():
            if any(x is interrupted for x in (value if type(value) is tuple else (value,))):
                return True
    return False
