"""`Work`: the user's handle on one call."""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Generator, Iterable, Sequence
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

from ..arrays.buffers import Blocks, as_buffer
from ..errors import DroppedWorkWarning, InvalidCallError, MpicollError, Unique, interrupts
from ..runtime.settings import seconds, warns_of_dropped
from . import kinds
from .background import background
from .call import Call, Peer
from .progress import engine
from .recorder import place
from .tasks import Task

if TYPE_CHECKING:
    from ..transports.shm._native import Posted
    from .future import Future

_settling = threading.RLock()  # so that one thread marks a future as running


class Work(Task, Unique):
    """One call under way.  It owns the arrays of the call until the call is done.

    Until `wait()` has returned, the arrays are not yours: don't read what the call writes, nor
    write what it reads.  All methods are local: no other rank need call them, and each may be
    called again.

    Works of one group run in program order.  Dropping a Work drops nothing else: the call
    goes on, and if it fails, the group's next call raises its error.  Where it would have brought a
    result, and was still under way, a `DroppedWorkWarning` says so.
    """

    __slots__ = ()

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name in vars(Work) or name.startswith("__")]

    _instead = "wait() for it, and copy the arrays that you gave to the call"

    def __repr__(self) -> str:
        state = "under way" if not self.done else "done" if self.error is None else "failed"
        return f"<mpicoll.Work {self.call.describe()} #{self.seq}, {state}>"

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until the call is done, and return True.  Local.

        Waiting advances everything that was launched in this process.  If NCCL carries out the
        call, and no timeout is given, the host waits until it is enqueued only, and the current
        stream for the rest; so it does, whatever the timeout, while that captures a CUDA graph.

        Args:
            timeout: seconds or a `timedelta`; where it ends before the call's own deadline
                it becomes the call's.

        Raises:
            MpicollError: what became of the call; its class says in which state the group is, and
                `breaks_group` whether it is still usable.

        Example::

            x = np.ones(1000)
            work = pg.allreduce(x)
            ...  # what needs no `x`
            work.wait(timeout=30)
            x /= size
        """
        try:
            if timeout is not None and not self.call.captured:
                engine().wait(self, seconds(timeout, 0.0))
            elif not self.done:
                own = engine()
                own.wait(self, on_host=False)
                if not self.done:
                    self.call.enqueued.hold()
                    own.release(self)
                    return True
            return self._ended_well()
        except BaseException as error:
            if interrupts(error):  # nobody waits at the end of the program, either
                self.left = self.group_state.deserted = True
            raise

    def _ended_well(self) -> bool:
        if self.error is not None:
            self.group_state.told = True
            self.fetch()
            raise self.error
        return True

    def is_completed(self) -> bool:
        """Return whether the call is over, well or not.  Makes one pass of progress.

        Example::

            work = pg.barrier()
            while not work.is_completed():
                ...  # something useful
            work.wait()  # raises, if it went wrong
        """
        if not self.done:
            try:
                engine().test()
            except BaseException as error:
                if interrupts(error):
                    self.left = self.group_state.deserted = True
                raise
        return self.done

    def is_success(self) -> bool:
        """Return whether the call is over and went well.  Makes one pass of progress."""
        return self.is_completed() and self.error is None

    def exception(self) -> BaseException | None:
        """Return the call's error, if it is over and failed; else None.  Makes no progress."""
        if self.error is not None:
            self.fetch()
        return self.error

    def result(self) -> list[Any]:
        """Return the arrays that hold the call's results, as they were given.

        The call must be over, or left to the GPU by `wait`.

        Raises:
            InvalidCallError: the call is still under way.
            MpicollError: what became of the call, if that failed.

        Example::

            work = pg.allreduce(np.ones(3))
            work.wait()
            (total,) = work.result()
        """
        if not (self.done or self._left_to_the_gpu()):
            raise InvalidCallError(f"result() of a call under way, {self!r}: wait() first")
        error = self.exception()
        if error is not None:
            raise error
        return list(self.call.outputs)

    def _left_to_the_gpu(self) -> bool:
        return self.call.enqueued is not None and self.call.enqueued.waited

    def source_rank(self) -> int | Peer:
        """Return the rank that a finished receive took its message from, or `PROC_NULL`.

        Raises:
            InvalidCallError: it is no receive, or still under way.

        Example::

            sent = pg.send(np.ones(3), dst=rank)
            coming = pg.recv(np.empty(3))  # from whichever rank sends first
            coming.wait()
            assert coming.source_rank() == rank
            sent.wait()
        """
        if not self.call.kind.receives:
            raise InvalidCallError(f"source_rank() is for a recv, and this is {self.call.kind}")
        if not self.done:
            raise InvalidCallError("source_rank() of a recv under way: wait() first")
        found: int | Peer | None = self.call.result
        return -1 if found is None else found

    def synchronize(self) -> None:
        """Block the host until the call is done, on a GPU too; elsewhere it is `wait()`.

        Raises:
            MpicollError: what became of the call, as from `wait()`.
            InvalidCallError: it is captured in a CUDA graph, so the GPU has not even begun it.
        """
        if self.call.captured:
            raise InvalidCallError(
                f"synchronize() of {self.call.describe()}, which is captured in a CUDA graph: "
                "wait() for it, and synchronize the stream in which you launch the graph"
            )
        engine().wait(self)
        self._ended_well()

    def get_future(self) -> Future:
        """Return a future of `result()`.  It completes without wait(), from a thread.

        Example::

            future = pg.allreduce(np.ones(3)).get_future()
            (total,) = future.result(timeout=30)
        """
        from concurrent.futures import InvalidStateError

        from .future import Future

        future = Future()

        def settle() -> None:  # once more, if an exception struck here; or by two threads at once
            with _settling:
                if future.done() and not future.cancelled():
                    return
                if not (future.running() or future.set_running_or_notify_cancel()):
                    return  # whoever asked for it has cancelled it; the call is what it is
            error = self.exception()
            with contextlib.suppress(InvalidStateError):  # the other was faster
                if error is not None:
                    future.set_exception(error)
                else:
                    future.set_result(self.result())

        if not self.done:
            background().progress()
        engine().when_done(self, settle)
        return future

    def __await__(self) -> Generator[Any, None, bool]:
        import asyncio  # who awaits has it

        yield from asyncio.wrap_future(self.get_future()).__await__()
        return True


class DoneWork(Work):
    """One call that was over before its method returned, as the compiled core makes them.

    The core fills in the number, and what was given; the rest is made of that where it is asked
    for, and the deadline is behind it.
    """

    __slots__ = ("_given",)

    _given: tuple[Any, ...]  # the group's core, the call's code, its arguments: results first

    done = True
    error = None

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Return True."""
        if timeout is not None:
            seconds(timeout, 0.0)
        return True

    def is_completed(self) -> bool:
        """Return True."""
        return True

    def result(self) -> list[Any]:
        """Return the arrays that hold the call's results, as they were given."""
        results = self._given[2:3]
        return list(results[0]) if results and type(results[0]) is list else list(results)

    @property
    def call(self) -> Call:  # type: ignore[override]
        """The call as the general way would have checked it."""
        core, code, *arguments = self._given
        call: Call = core.checked(code, arguments)
        return call


class MessageWork(Work):
    """One send or receive that the compiled core has begun.

    As long as nothing but `wait` asks for it, the engine knows nothing of it, and compiled code
    carries it through.  Then it becomes a task like any other.
    """

    __slots__ = ("_posted",)

    _posted: Posted

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until the message is sent or received, and return True."""
        try:
            if (timeout is None or seconds(timeout, 0.0)) and self._posted.wait():
                return True
            return super().wait(timeout)
        except BaseException as error:
            if interrupts(error):
                self.group_state.deserted = True
                self.left = True
            raise

    def is_completed(self) -> bool:
        """Return whether the message is sent or received, well or not."""
        return self._posted.look() or super().is_completed()

    def __getattr__(self, name: str) -> Any:
        if name not in Task.__slots__ or self._posted.filled:
            raise AttributeError(name)
        self.becomes_a_task()
        return getattr(self, name)

    def becomes_a_task(self) -> bool:
        """Give it all that a task has; return whether the engine has to carry it through."""
        posted = self._posted
        under_way = posted.adopt()
        if posted.filled:
            return under_way
        blocks = Blocks.single(as_buffer(posted.given, "tensor", write=False))
        receives = posted.kind == kinds.RECV.code
        call = Call(
            kinds.RECV if receives else kinds.SEND,
            None if receives else blocks,
            blocks if receives else None,
            peer=posted.peer,
            tag=posted.tag,
            count=blocks.total,
            outputs=(posted.given,),
        )
        if receives and not under_way:
            call.peer = call.result = posted.source
        self.call, self.seq = call, 0
        self.group_state = posted.rings.group_state
        self.timeout, self.called = posted.timeout, posted.called
        self.deadline = self.called + self.timeout
        self.queued = self.fetched = self.asked = self.released = self.left = False
        self.warn_at, self.warning = 0.0, False
        self.error = self.failure = self.outside = None
        self.callbacks = []
        self._entry = posted.entry
        self.steps = posted.rings.steps(call, posted)
        self.done = not under_way
        posted.filled = True
        return under_way


class Unattended(Work):
    """One call that has a result, is under way, and that nobody has waited for yet.

    It warns if it is dropped so.  A Work is one of these only from the return of its method on, if
    the call is not over by then, and until somebody asks for its end; so what is done at once, or
    waited for, pays nothing.
    """

    __slots__ = ()

    # Two threads may ask at once: by the time that one is here, it may be a plain Work already.

    def wait(self, timeout: float | timedelta | None = None) -> bool:
        """Wait until the call is done, and return True."""
        return _attended(self).wait(timeout)

    def is_completed(self) -> bool:
        """Return whether the call is over, well or not."""
        return Work.is_completed(self) and _attended(self).done

    def synchronize(self) -> None:
        """Block the host until the call is done."""
        _attended(self).synchronize()

    def get_future(self) -> Future:
        """Return a future of `result()`."""
        return _attended(self).get_future()

    def __del__(self) -> None:
        # The engine holds it until it is done.  If that was the last hold, the user's was gone.
        if self.done and self.error is None:
            engine().if_let_go(self, partial(_warn, *place(self._entry), self.call.describe()))


def _attended(work: Work) -> Work:
    """Return the same Work, which is a plain one from now on."""
    work.__class__ = Work
    return work


def _warn(file: str, line: int, call: str) -> None:
    if warns_of_dropped():
        warnings.warn_explicit(
            f"{call} was still under way when its Work was dropped, and nobody waited for it, so "
            "its result may have been read too early: keep the Work, and wait() for it before you "
            "use the array (MPICOLL_WARN_DROPPED=0 turns this off)",
            DroppedWorkWarning,
            file or "?",
            line,
            registry=_warned.setdefault(file, {}),
        )


_warned: dict[str, dict[Any, Any]] = {}  # by file, so that each line is warned of once


def wait_all(works: Iterable[Work], timeout: float | timedelta | None = None) -> bool:
    """Wait for several Works, and return True.  Local.

    All of them are waited for; then the first error, in the order given, is raised.

    Args:
        works: of any groups, in any order.
        timeout: seconds or a `timedelta`, as for `Work.wait`; for each of them.

    Raises:
        MpicollError: what became of the first call that failed.

    Example::

        arrays = [np.ones(3), np.ones((2, 2))]
        mc.wait_all([pg.allreduce(x) for x in arrays], timeout=30)
    """
    errors: list[MpicollError] = []
    listed: Sequence[Work] = list(works)
    for work in listed:
        try:
            work.wait(timeout)
        except MpicollError as error:
            errors.append(error)
    if errors:
        raise errors[0]
    return True
