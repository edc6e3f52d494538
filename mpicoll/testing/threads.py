"""Ranks in threads of one process: no mpiexec, no MPI, one debugger."""

from __future__ import annotations

import contextvars
import functools
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import TypeVar, cast

from ..engine.deadlines import crossed, in_words, named, unmatched, who_is_late
from ..engine.exit import ending, peer_failed
from ..engine.progress import QUIET, Engine, engine
from ..engine.recorder import LIBRARY
from ..engine.rollcall import Said, Verdict
from ..errors import InvalidCallError
from ..runtime.library import MPI
from ..runtime.process import Process, belong_to, process
from ..runtime.settings import seconds as in_seconds
from ..runtime.watchdog import watchdog
from .standin import Ended, Mpi, World

T = TypeVar("T")

_LAST = 1.0  # seconds that ranks get to end once their world has been ended
_SEEN = 5.0  # seconds in which they see that deadlines have passed
_WAITS = 3  # fruitless looks for a message after which a rank is taken to wait


def run(ranks: int, program: Callable[..., T], *arguments: object, timeout: float = 60) -> list[T]:
    """Run a function as several ranks, each in a thread of this process; return what they return.

    In it `mpicoll.new_group()` makes a group of all of them, and everything else is as under
    mpiexec: checks, deadlines, errors, splits and merges.  No MPI library is needed.  What the
    threads share (globals, the current directory, signals) processes would not share; and the
    compiled code of small calls is not used, so figures of speed mean nothing.  A rank that fails
    while it has no group ends the others, at their next call.

    Args:
        ranks: how many, at least 1.
        program: called once per rank, with `arguments`.
        arguments: the same objects for all ranks.
        timeout: seconds that all of it may take by the real clock, which `advance` doesn't move;
            `math.inf` for a debugger.

    Returns:
        What each rank returned, by rank.

    If ranks raise, or threads that they started, so does this: what the lowest of them raised
    that does not go back to another's.

    Raises:
        TimeoutError: some have not ended in time; with their stacks, and for whom they wait.  Those
            threads are left behind, and end at their next call of mpicoll.  Its cause is what a
            rank raised by then.
    """
    __tracebackhide__ = True  # pytest shows the test's own frames
    if not isinstance(ranks, int) or isinstance(ranks, bool) or ranks < 1:
        raise InvalidCallError(f"ranks must be an integer above 0, but got {ranks!r}")
    limit = in_seconds(timeout, 60)
    MPI.ask_threads()  # type: ignore[attr-defined]
    _have_threads_belong()
    world = World(ranks)
    threads = [_Rank(world, r, functools.partial(program, *arguments)) for r in range(ranks)]
    world.processes = [thread.process for thread in threads]
    until = time.monotonic() + limit
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(max(0.0, until - time.monotonic()))
    except BaseException:
        world.end("the test was interrupted")
        raise
    late = [thread for thread in threads if thread.is_alive()]
    failed = [thread for thread in threads if thread.error is not None]
    if late:
        stacks = "".join(thread.stack() + _waits(thread, threads) for thread in late)
        world.end("the test took too long")
        for thread in late:
            thread.join(_LAST)
        who = [thread.rank for thread in late]
        why = _cause(failed, world) if failed else None
        raise TimeoutError(f"ranks {who} have not ended in {limit:g} s\n{stacks}") from why
    if failed:
        raise _cause(failed, world)
    return [cast(T, thread.result) for thread in threads]


def advance(seconds: float) -> None:
    """Move the clock of all ranks on, as soon as every other rank waits in mpicoll or has ended.

    So a deadline of 30 seconds takes a moment in a test.  Only in a rank of `run`.  Where several
    ranks do so at a time, the clock is moved by the sum.

    When it returns, calls whose deadlines have passed have raised.

    Raises:
        InvalidCallError: this thread is no such rank; or `seconds` is below 0.
    """
    mpi = process().mpi
    if mpi is None:
        raise InvalidCallError("advance: only ranks of mpicoll.testing.run have a clock that moves")
    if not seconds >= 0:
        raise InvalidCallError(f"seconds must not be below 0, but got {seconds!r}")
    world: World = mpi.world
    own = mpi.COMM_WORLD.Get_rank()
    others = [rank for rank in range(world.size) if rank != own]
    before = list(world.polls)
    while any(r not in world.gone and world.polls[r] < before[r] + _WAITS for r in others):
        world.check()
        world.polls[own] += 1  # for another that moves the clock, this one waits, too
        time.sleep(1e-3)
    world.polls[own] += _WAITS
    with world.lock:
        for rank in world.processes:
            rank.ahead += seconds
    engines = [rank.the(Engine) for rank in world.processes if rank is not process()]
    until = time.monotonic() + _SEEN
    while any(other.is_overdue() for other in engines) and time.monotonic() < until:
        world.check()
        time.sleep(1e-3)
    time.sleep(2 * QUIET)  # in which the others raise


class _Rank(threading.Thread):
    """One rank: what it runs, and what came of it."""

    result: object = None

    def __init__(self, world: World, rank: int, program: Callable[[], object]) -> None:
        super().__init__(name=f"rank {rank}", daemon=True)
        self.rank = rank
        self.process = Process(Mpi(world, rank))
        self._world, self._program = world, program
        self._context = contextvars.copy_context()

    @property
    def error(self) -> BaseException | None:
        errors = self.process.the(_Errors)
        return errors[0] if errors else None

    def run(self) -> None:
        __tracebackhide__ = True
        belong_to(self.process)
        try:
            try:
                self.result = self._context.run(self._program)
            except SystemExit as error:
                self._exit(error)
            except BaseException as error:
                _fail(error)
            heard = ending().has_peers() or engine().broken
            ending().leave()
            if self.error is not None and not heard:
                self._world.end(f"rank {self.rank} failed, and had no group to tell")
        except BaseException as error:  # as the world was ended
            self.process.the(_Errors).append(error)
        finally:
            watchdog().stop()
            self._world.gone.add(self.rank)

    def _exit(self, error: SystemExit) -> None:
        if not isinstance(error, Ended):
            ending().note_exit(error.code)
            if not ending().code:
                return
        self.process.the(_Errors).append(error)

    def stack(self) -> str:
        """Return where the thread is."""
        frame = sys._current_frames().get(self.ident or 0)
        frames = traceback.extract_stack(frame) if frame else []
        users = [x for x in frames if not x.filename.startswith((LIBRARY, threading.__file__))]
        return f"\nrank {self.rank}:\n{''.join(traceback.format_list(users or frames))}"


def _waits(thread: _Rank, threads: list[_Rank]) -> str:
    """Say for whom a rank waits, as the error would of a call whose deadline has passed.

    What the ranks know of themselves lies in this process, so they need not be asked.  No lock is
    taken: one that is stuck may hold it.
    """
    busy = [state for state in thread.process.the(Engine).group_states() if state.busy]
    if not busy:
        return ""
    state, task = busy[0], busy[0].tasks()[0]
    everywhere = [s for t in threads for s in t.process.the(Engine).group_states()]
    members = {s.peers.rank: s for s in everywhere if s.peers.comm == state.peers.comm}
    answers = {rank: member.answer(task.seq) for rank, member in members.items()}
    said = {rank: answer.said for rank, answer in answers.items()}
    for rank in range(state.peers.size):
        said.setdefault(rank, Said("has ended, or not begun to make this group"))
    if task.queued:
        late = (r for r in said if r not in answers or not answers[r].arrived)
        verdict = Verdict(task.seq, state.peers.rank, tuple(sorted(late)), said)
        text = who_is_late(task, verdict, crossed(task, verdict, busy))
    else:
        ends = [task.call.peer] if task.call.peer >= 0 else sorted({*said} - {state.peers.rank})
        text = unmatched(task) + in_words({rank: said[rank].text for rank in ends})
    return f"It waits in {named(task)}{task.where()}{text}\n"


class _Errors(list[BaseException]):
    """What ended a rank, and threads that it had started, in this order."""


def _fail(error: BaseException, where: str = "") -> None:
    """Note what ended this thread, and tell the rank's peers."""
    process().the(_Errors).append(error)
    ending().raised(type(error), error, error.__traceback__, where)


def _cause(failed: list[_Rank], world: World) -> BaseException:
    """Return the error that a test is to see: not one that only tells of another rank's."""

    def weight(thread: _Rank) -> int:
        if isinstance(thread.error, Ended):
            return 3
        return 2 if peer_failed(thread.error) else int(_is_skip(thread.error))

    first = min(failed, key=weight)
    error = first.error
    assert error is not None
    if isinstance(error, Ended):
        error = RuntimeError(world.ended)
    skipped = [thread.rank for thread in failed if _is_skip(thread.error)]
    if _is_skip(error) and len(skipped) < world.size:
        error = AssertionError(f"ranks {skipped} skipped what others did not: {error}")
    said = traceback.format_exception_only(type(error), error)[-1]
    notes = []
    for thread in failed:
        if thread is first:
            notes.append(f"raised by rank {thread.rank}")
        elif weight(thread) > 1:
            notes.append(f"rank {thread.rank} was told of it")
        else:
            text = traceback.format_exception_only(type(thread.error), thread.error)[-1]
            notes.append(
                f"rank {thread.rank} raised {'the same' if text == said else text.strip()}"
            )
    if hasattr(error, "add_note"):  # since Python 3.11
        error.add_note("\n".join(notes))
    return error


def _is_skip(error: BaseException | None) -> bool:
    """Whether an exception is pytest's, by which a test is left out.  pytest need not be there."""
    return type(error).__name__ == "Skipped" and not isinstance(error, Exception)


@functools.cache
def _have_threads_belong() -> None:
    """Have a thread that a rank starts belong to that rank."""
    start = threading.Thread.start

    def start_of(thread: threading.Thread) -> None:
        rank = process()
        if rank.is_thread and not isinstance(thread, _Rank):
            run = thread.run

            def run_as() -> None:
                belong_to(rank)
                try:
                    run()
                except BaseException as error:
                    if ending().over or isinstance(error, SystemExit):
                        raise
                    _fail(error, f" in thread {thread.name!r}")

            thread.run = run_as  # type: ignore[method-assign]
        start(thread)

    threading.Thread.start = start_of  # type: ignore[method-assign, assignment]
