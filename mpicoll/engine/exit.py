"""How this rank's process ends, and what its peers hear of it.

- An uncaught exception, in the main program or in a thread, and an exit code that is not 0 are
  failures: the peers hear of them at once, and raise in the call in which they wait, or in their
  next one.  If it was a thread's, and the main program doesn't hear of it, it is ended after them.
  The tracebacks come to the terminal whole, and in turn (tracebacks.py), where the program has set
  no hook for them.
- A rank that ends well says so in a last arrival on every open group, and waits for the others',
  as MPI_Finalize would.
- Members of a broken group take leave of one another at their ends.  Those that know of the failure
  may take their time: they may be writing a checkpoint.  Those that don't have `settings.grace`
  seconds to hear of it.  If then somebody is missing, or MPI still has something pending, in which
  MPI_Finalize would hang, or takes no more messages, the job is ended.
- Where MPI survived the death of a rank, MPI_Finalize is left out: it may wait for the dead.
- A forked child is not a rank: it is refused, and ends without a word to MPI, as the children of
  multiprocessing do.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import threading
import time
from _thread import start_new_thread
from collections.abc import Callable, Sequence
from types import ModuleType, TracebackType
from typing import Any

from ..errors import (
    GroupBrokenError,
    GroupClosedError,
    RankFailedError,
    RemoteRankError,
    interrupts,
)
from ..runtime.library import MPI, nothing_pending
from ..runtime.process import monotonic, process
from ..runtime.settings import debugging, default_timeout, grace, survives_deaths, warn_after
from ..runtime.waiting import Backoff
from ..runtime.watchdog import end_job
from .background import background
from .progress import engine
from .recorder import leave_trace
from .tasks import GroupState, struck
from .tracebacks import HEARD, LONGEST, announce, cause, describe, show, tail

UNFINISHED = 2.0  # seconds at the end for calls that were given up, and for groups half made
_MAINS = ("<module>", "_run_module_as_main")  # the outermost function of a program
_INTERRUPTED = 130  # the exit code of a process that SIGINT ended, as shells give it


class _Ending:
    """What is known of how this process ends."""

    def __init__(self) -> None:
        self.hooked = False
        self.forked = False
        self.over = False  # it has taken leave of its peers
        self.failure = ""  # why it ends, in words for the peers
        self.in_thread = False  # the failure: by itself it gives the process no bad exit code
        self.code = 0
        self.rank, self.size = 0, 1  # in the world
        self._leaving = False
        self._showing = 0  # tracebacks that are being written

    # ---- hooks ----

    def hook(self) -> None:
        """Have the ends of this process noticed, from now on."""
        if self.hooked:
            return
        for read in (grace, warn_after, debugging):
            read()  # what is wrong there is refused now, not at the end
        self.hooked = True
        self.rank, self.size = MPI.COMM_WORLD.Get_rank(), MPI.COMM_WORLD.Get_size()
        leave = sys.exit

        def exit_with(status: object = None, /) -> None:
            if threading.current_thread() is not threading.main_thread():
                leave(status)  # type: ignore[arg-type]
            raise _Exit() if status is None else _Exit(status)

        sys.exit = exit_with  # type: ignore[assignment]
        if sys.excepthook is sys.__excepthook__:
            sys.excepthook = self._main_raised
        _at_each_thread(self._thread_raised)
        # Before threads are joined, which may wait for the peers.  (At the very end there is none.)
        with contextlib.suppress(AttributeError, RuntimeError):
            vars(threading)["_register_atexit"](self._look_for_an_exception)
        atexit.register(self.leave)
        os.register_at_fork(after_in_child=self._note_fork)

    def _look_for_an_exception(self) -> None:
        """Tell the peers of the exception that ends the main program, whoever has printed it.

        The interpreter leaves it where every `sys.excepthook` can be set without hiding it.  So do
        prompts and pytest with exceptions that they have caught: those were raised further in.
        """
        error = getattr(sys, "last_value", None)
        trace = getattr(sys, "last_traceback", None)
        if isinstance(error, BaseException) and self._ends_the_program(error, trace):
            self.raised(type(error), error, trace)

    def _ends_the_program(self, error: BaseException, trace: TracebackType | None) -> bool:
        if trace is None or hasattr(sys, "ps1") or sys.flags.inspect:  # prompts go on
            return False
        outermost = trace.tb_frame
        if outermost.f_back is not None or outermost.f_code.co_name not in _MAINS:
            return False
        self.code = _INTERRUPTED if isinstance(error, KeyboardInterrupt) else 1
        return True

    def _main_raised(
        self, kind: type[BaseException], error: BaseException, trace: TracebackType | None
    ) -> None:
        """Write what ended the main program: this is its `sys.excepthook`."""
        if self.forked or self.size == 1 or not self._ends_the_program(error, trace):
            sys.__excepthook__(kind, error, trace)
        else:
            self._leaving = True
            self._report(kind, error, trace)

    def _thread_raised(
        self,
        args: threading.ExceptHookArgs,
        hook: Callable[[threading.ExceptHookArgs], object],
    ) -> None:
        """Write what ended a thread, or let the program's hook do so, and tell the peers."""
        kind, error, trace = args.exc_type, args.exc_value, args.exc_traceback
        plain = error is None or self.forked or issubclass(kind, SystemExit)  # as a thread may end
        fails = not plain and self.has_peers()
        name = "a thread" if args.thread is None else f"thread {args.thread.name!r}"
        if fails:
            self.in_thread, self.code = True, self.code or 1
        try:
            if error is None or plain or self.size == 1 or hook is not threading.__excepthook__:
                hook(args)
            else:
                self._report(kind, error, trace, f" in {name}")
        finally:
            if fails and error is not None:
                self.raised(kind, error, trace, f" in {name}")
                if not sys.is_finalizing():  # when no thread can be started
                    start_new_thread(self._outlive, ())

    def _report(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
        where: str = "",
    ) -> None:
        """Tell the peers of an exception that nobody caught, and write it in turn with theirs."""
        text, follows = describe(kind, error, trace), peer_failed(error)
        self._showing += 1
        try:
            turn = announce(text, where, follows=follows, rank=self.rank, size=self.size)
            self.raised(kind, error, trace, where)
            show(turn, error)
        finally:
            self._showing -= 1

    def _note_fork(self) -> None:
        self.forked = True

    @staticmethod
    def has_peers() -> bool:
        """Return whether there is an open group whose members hear of a failure."""
        return any(state.peers.size > 1 for state in engine().group_states())

    def raised(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
        where: str = "",
    ) -> None:
        """Tell the peers of an exception that nobody caught."""
        if peer_failed(error):
            self.fail(f"ends, because of {type(error).__name__}: {error}")
        else:
            text = tail(describe(kind, error, trace))
            self.fail(f"raised{where and f'{where},'} {cause(kind, error)}\n{text}")

    def fail(self, why: str) -> None:
        """Break all open groups, and let their members know why."""
        if self.failure or self.forked or MPI.Is_finalized():
            return
        self.failure = why
        for state in engine().group_states():
            if state.broken is None and state.peers.size > 1:
                engine().fail_all(state, GroupBrokenError(f"this rank {why}"), why)

    def note_exit(self, status: object) -> None:
        """Note with what the program is about to be ended by SystemExit."""
        self.code = 0 if status is None else status & 0xFF if isinstance(status, int) else 1

    # ---- the end ----

    def _outlive(self) -> None:
        """End the job after a thread has failed, unless the main program comes to know of it.

        It may wait for that thread for ever.
        """

        def known() -> bool:
            return self._leaving or any(state.told for state in engine().broken)

        self._take_leave(known)
        if not known():
            end_job(self.code, "a thread failed, and the main program goes on")

    def leave(self) -> None:
        """Take leave of the peers; where that can't be, end the job instead of hanging in it."""
        try:
            self._leave()
        except BaseException as error:
            if interrupts(error) and not process().is_thread:  # MPI_Finalize would hang
                end_job(self.code or _INTERRUPTED, f"{type(error).__name__} interrupted its end")
            raise

    def _leave(self) -> None:
        if self.forked:  # without mpi4py's MPI_Finalize, in which a child hangs
            _flush()
            os._exit(self.code)
        leave_trace()
        if MPI.Is_finalized():
            return
        if self.hooked:
            self._look_for_an_exception()
        self._leaving = True
        start = monotonic()
        while self._showing and monotonic() < start + LONGEST:  # in a thread
            time.sleep(1e-3)
        background().stop()
        if self.code and not self.failure:
            self.fail(f"left the program with exit code {self.code}")
        if not self.failure:
            engine().take_on()
            works = list(engine().unfinished())
            unasked = [
                (failure.error, failure.place)
                for state in engine().group_states()
                for failure in state.failures
                if not (failure.fetched or state.told)
            ]
            _arrive_everywhere(UNFINISHED)
            for state in {task.group_state for task in engine().unfinished()}:
                engine().fail_all(
                    state, GroupBrokenError("the program ended before the call was done")
                )
            leave_trace()  # with the ends of what nobody waited for
            # (Of what was given up with its group, nobody has been told the cause, either.)
            unasked += [
                (work.error, work.place())
                for work in works
                if work.error is not None and (work.failure is None or not work.fetched)
            ]
            _warn(unasked)
            engine().let_go(works)  # so that what was dropped is seen to be
        settled = self._take_leave(lambda: False, start)
        bereaved = [state for state in engine().broken if state.peers.dead]
        if bereaved and settled and survives_deaths():
            recovered = any(state.replaced for state in bereaved)
            _flush()
            os._exit(self.code or int(not recovered))
        if bereaved:
            rank, how = next(iter(bereaved[0].peers.dead.items()))
            end_job(self.code or 1, f"rank {rank} of group {bereaved[0].name!r} {how}")
        if not settled or self.in_thread:
            end_job(self.code or 1, "" if self.code or self.failure else self._held_up())
        self.over = True
        for state in engine().group_states():  # what runs later may shut them down
            state.close("closed")

    def _held_up(self) -> str:
        """Say why this rank can't end, though its program did well, and has nothing to say."""
        what, failure = "MPI still holds what a call that was given up has left pending", ""
        for state in engine().broken:
            failure = f", after a failure: {state.broken}"
            if away := state.peers.there:
                what = f"ranks {away} of group {state.name!r} are not at theirs"
                break
        return f"rank {self.rank} is at its end, but {what}{failure}"

    def _take_leave(self, until: Callable[[], bool], start: float | None = None) -> bool:
        """Wait for the ends of those who share a broken group; return whether MPI may go, too.

        Not longer than `until` says so; the grace period begins at `start`, which may be past.
        """
        states = [
            state for state in engine().broken if not (survives_deaths() and state.peers.dead)
        ]
        if not states:
            last = monotonic() + UNFINISHED
            while not (over := nothing_pending()) and monotonic() < last:
                time.sleep(1e-3)
            return over or survives_deaths()
        _flush()
        for state in states:
            _go(state, settled=False)
        settled: list[GroupState] = []
        start = since = start or monotonic()
        for_unaware, for_aware = start + grace(), start + default_timeout()
        seen: object = None
        while not until():
            engine().test()
            known, unknown = _still_there(states)
            for state in states:
                if not state.peers.there and state not in settled and _settle(state):
                    settled.append(state)
                    _go(state, settled=True)
            if len(settled) == len(states) and _all_settled(states):
                return True
            now = monotonic()
            if seen != (seen := (known, unknown, sum(len(x.peers.settled) for x in states))):
                since = now  # those who were the last to come have their time, too
            stuck = any(x.peers.is_stuck() for x in states)
            if now > for_aware or (now > for_unaware and unknown and not known):
                return False
            if now > max(for_unaware, since + grace()) and (stuck or not (known or unknown)):
                return False
            time.sleep(1e-3)
        return False


def peer_failed(error: BaseException | None) -> bool:
    """Return whether an exception goes back to a peer's failure."""
    while error is not None:
        if isinstance(error, (RemoteRankError, RankFailedError)):
            return True
        error = error.__cause__
    return False


def _arrive_everywhere(seconds: float) -> None:
    """Finish what is under way, and arrive one last time in every open group.

    So peers that still wait for this rank raise at once.  For the peers one waits, as
    MPI_Finalize would; but only `seconds` for a call whose wait was interrupted, and, after all
    else, for the making of a group.
    """
    for state in engine().group_states():
        if state.owes() and state.broken is None:
            engine().fail_all(state, struck())
    states = [x for x in engine().group_states() if x.channel.is_open and x.broken is None]
    states = [x for x in states if x.peers.size > 1 or x.beside]
    # Where somebody has left already, an arrival would never be complete.  MPI may not see at
    # once that a notice has come.
    heard = monotonic() + HEARD
    while (engine().run_pollers() or states) and monotonic() < heard:
        for state in states:
            with contextlib.suppress(MPI.Exception):
                state.peers.poll()
    for state in states:
        for rank, notice in state.peers.left.items():
            engine().fail_all(state, RemoteRankError(f"rank {rank} {notice.text}", rank=rank))
            break
        else:
            state.channel.arrive_finally()
    backoff, until, last = Backoff(), monotonic() + seconds, math.inf
    while engine().busy:
        now = monotonic()
        if any(state.channel.is_open for state in engine().active()):
            last = now + seconds
        given_up = (
            t for t in engine().unfinished() if t.group_state.deserted and not t.call.leaving
        )
        if now > last or (now > until and any(given_up)):
            return
        backoff.after(engine().test())


def _go(state: GroupState, *, settled: bool) -> None:
    exchange, gathering = state.channel.exchange, state.channel.gathering
    met = 0 if exchange is None else exchange.count
    told = 0 if gathering is None else gathering.count
    with contextlib.suppress(MPI.Exception):
        state.peers.go(met, told, settled=settled)


def _settle(state: GroupState) -> bool:
    """End what MPI has pending in a broken group, if that can be; return whether nothing is left.

    All its members are at their ends: nobody there calls or receives anything any more.
    """
    with contextlib.suppress(MPI.Exception):
        state.peers.drop_messages()
        begun = state.peers.begun.values()
        if state.channel.exchange is not None:
            most = max((met for met, _ in begun), default=0)
            state.channel.exchange.catch_up(most, state.left)
        if state.channel.gathering is not None:
            state.channel.gathering.catch_up(max((told for _, told in begun), default=0))
    return nothing_pending()


def _still_there(states: list[GroupState]) -> tuple[int, int]:
    """Count members that have not come to their ends: who know of the failure, and who don't."""
    known = unknown = 0
    for state in states:
        with contextlib.suppress(MPI.Exception):
            state.peers.poll()
        there = state.peers.there
        aware = sum(rank in state.peers.aware for rank in there)
        known += aware
        unknown += len(there) - aware
    return known, unknown


def _all_settled(states: list[GroupState]) -> bool:
    """Return whether every member is at its end, with nothing pending, and has been told so."""
    return all(
        state.peers.all_sent()
        and len({*state.peers.settled, *state.peers.dead}) == state.peers.size - 1
        for state in states
    )


def _at_each_thread(
    act: Callable[[threading.ExceptHookArgs, Callable[[threading.ExceptHookArgs], object]], object],
) -> None:
    """Have a call made for each exception that ends a thread, with `threading.excepthook`.

    Whoever sets that later, as pytest does, sets what is handed over: the module itself finds ours
    under this name.
    """
    current = threading.excepthook

    def hook(args: threading.ExceptHookArgs, /) -> None:
        act(args, current)

    def get(module: ModuleType) -> Callable[[threading.ExceptHookArgs], object]:
        return current

    def put(module: ModuleType, value: Callable[[threading.ExceptHookArgs], object]) -> None:
        nonlocal current
        current = threading.__excepthook__ if value is hook else value

    kind = type("Threading", (type(threading),), {"excepthook": property(get, put)})
    vars(threading)["excepthook"] = hook
    threading.__class__ = kind


def _warn(unasked: Sequence[tuple[BaseException, str]]) -> None:
    """Say what became of calls that nobody waited for, if they did not end well."""
    if not unasked:
        return
    error, place = unasked[0]
    said = str(error) if place in str(error) else f"{error} (called at {place})"
    more = f" (and so {len(unasked) - 1} more)" if len(unasked) > 1 else ""
    with contextlib.suppress(Exception):  # standard error may be closed
        rank = MPI.COMM_WORLD.Get_rank()
        print(f"mpicoll: rank {rank}: nobody waited for {said}{more}", file=sys.stderr, flush=True)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()


_CODE: Any = vars(SystemExit)["code"]


class _Exit(SystemExit):
    """What sys.exit raises.  When the interpreter itself asks for the code, it ends with it.

    Neither sys.excepthook nor atexit learns of the code; and until then the program may still catch
    the exception, and go on.
    """

    def _get(self) -> Any:
        code = _CODE.__get__(self)
        try:
            sys._getframe(1)
        except ValueError:  # nobody called this from Python
            ending().note_exit(code)
        return code

    def _set(self, code: Any) -> None:
        _CODE.__set__(self, code)

    code = property(_get, _set)

    def __reduce__(self) -> tuple[type[SystemExit], tuple[Any, ...]]:
        return SystemExit, self.args


_Exit.__name__ = _Exit.__qualname__ = "SystemExit"
_Exit.__module__ = "builtins"


def ending() -> _Ending:
    """Return this rank's."""
    return process().the(_Ending)


def check_process() -> None:
    """Refuse a forked child, and a process that has finalized MPI."""
    own = ending()
    if own.forked:
        raise GroupClosedError(
            f"this process ({os.getpid()}) was forked from a rank and is not a rank itself: "
            "use mpicoll in the parent only"
        )
    if own.over:
        raise GroupClosedError(
            "this process is at its end, and has taken leave of its peers: make calls before, as "
            "at the end of the program, or in a function that atexit calls and that is registered "
            "after the first group was made"
        )
    if MPI.Is_finalized():
        raise GroupClosedError("MPI was finalized: make and use groups before MPI.Finalize()")
