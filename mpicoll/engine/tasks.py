"""What the engine knows: of one call, as a `Task`; of one group, as a `GroupState` of tasks."""

from __future__ import annotations

import contextlib
import itertools
import math
import operator
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from ..errors import CallInterruptedError, MpicollError
from ..runtime.library import MPI, Steps
from ..runtime.process import monotonic
from .board import NO_BOARD, Board
from .peers import Peers, State
from .recorder import Recorder, end, number, place
from .rollcall import Said

if TYPE_CHECKING:
    from .arrival import Exchange, Gathering
    from .call import Call
    from .kinds import Kind
    from .once import Once

T = TypeVar("T")

_SEVERAL = 3  # calls that are named where a rank has many under way


class Expired(Exception):
    """Thrown into the steps of a task that can be cancelled when its deadline passes.

    They raise it where they are cancelled; also where a signal handler's exception struck, as the
    cause.
    """


class Uncancelled(Exception):
    """Raised in its place by steps that can't let go of the task's memory."""


class Completed(Exception):
    """Raised by a receive that was complete already when a signal handler's exception struck.

    Args:
        error: what is wrong with its message, or None.
    """

    def __init__(self, error: MpicollError | None) -> None:
        super().__init__(error)
        self.error = error


class Task:
    """One call as the engine sees it: steps to take, a deadline, an end."""

    __slots__ = (
        "__weakref__",
        "_entry",
        "asked",
        "call",
        "called",
        "callbacks",
        "deadline",
        "done",
        "error",
        "failure",
        "fetched",
        "group_state",
        "left",
        "outside",
        "queued",
        "released",
        "seq",
        "steps",
        "timeout",
        "warn_at",
        "warning",
    )

    steps: Steps  # given at the launch

    def __init__(
        self, state: GroupState, call: Call, seq: int, timeout: float, recorder: Recorder
    ) -> None:
        self.group_state = state
        self.call = call
        self.seq = seq
        self.timeout = timeout
        self.called = monotonic()
        self.deadline = self.called + timeout
        self.queued = call.kind.queued  # or it goes on beside its group's queue
        self.done = False
        self.error: MpicollError | None = None
        self.fetched = False  # the user has heard of the error
        self.failure: Failure | None = None
        self.asked = False
        self.warn_at = 0.0  # when to say for whom it waits; 0: not known yet
        self.warning = False  # that is being found out
        self.released = False  # its memory may be used otherwise
        self.left = False  # an exception ended the user's wait for it
        self.outside: Blocking[Any] | None = None  # what is to be done without the lock
        self.callbacks: list[Callable[[], None]] = []
        self._entry = recorder.note(seq, call, self.called)

    @property
    def recovers(self) -> bool:
        """Whether it goes on in spite of the peers' failures, of which it makes the best."""
        return self.call.kind.recovers

    @property
    def blocked(self) -> bool:
        """Whether a call is under way for it that blocks inside MPI, which has a guard."""
        return self.outside is not None and self.outside.taken

    def twin(self) -> Task:
        """Return another of the same, to take its place."""
        other: Task = object.__new__(type(self))
        for kind in type(self).__mro__:
            for name in getattr(kind, "__slots__", ()):
                if name != "__weakref__" and hasattr(self, name):
                    setattr(other, name, getattr(self, name))
        return other

    def fetch(self) -> None:
        """Note that the user hears of the error."""
        self.fetched = True
        if self.failure is not None:
            self.failure.fetched = True

    def take_number(self, seq: int) -> None:
        """Give the call its number, if that was not known when it was made."""
        self.seq = seq
        number(self._entry, seq)

    def place(self) -> str:
        """Return the file and line of the user's that called, where that is known."""
        file, line = place(self._entry)
        return f"{file}:{line}" if file else "?"

    def ended(self) -> None:
        """Enter the end in the flight recorder, and let those behind it have their turn."""
        end(self._entry, self.error)
        if self.call.turn is not None:
            self.call.turn.over = True

    def where(self) -> str:
        """Say where it was called, if that is known."""
        place = self.place()
        return "" if place == "?" else f" ({place})"


class Failure:
    """How a task failed, and whether that has been asked for; it outlives the task.

    Attributes:
        place: where the call was made.
    """

    __slots__ = ("error", "fetched", "place", "task")

    def __init__(self, task: Task, error: MpicollError) -> None:
        self.place = task.place()
        self.task = weakref.ref(task)  # without a callback: that would run anywhere
        self.error = error
        self.fetched = False


class Blocking(Generic[T]):
    """A call that blocks inside MPI, for whoever waits for the task to make without the lock."""

    __slots__ = ("deadline", "error", "function", "over", "taken", "value", "what")

    value: T  # once it is over, without an error

    def __init__(self, deadline: float, what: str, function: Callable[[], T]) -> None:
        self.deadline = deadline
        self.what = what
        self.function = function
        self.taken = False
        self.over = False
        self.error: Exception | None = None


class Channel:
    """What the calls of a group go through, as far as the engine has to do with it.

    This one is that of a group that makes no calls but those that make others, or of a closed one.

    Attributes:
        exchange: where the records of the group meet over MPI, if they do so on this rank.
        gathering: where it is told who called what.
    """

    exchange: Exchange | None = None
    gathering: Gathering | None = None

    @property
    def is_open(self) -> bool:
        """Whether the peers may wait for this rank's final arrival."""
        return False

    @property
    def core(self) -> Any:
        """The compiled way of the group's small calls, or None."""
        return None

    def arrive_finally(self) -> None:
        """Launch this rank's last arrival, which waits long for the other ranks'."""

    def drain(self) -> None:
        """Take what has come of the group's messages."""

    def abort(self) -> None:
        """Let go of what the peers hold together."""

    def close(self) -> None:
        """Let go of all that the last calls have no more need of."""


class GroupState:
    """One group's share of the engine: its collectives in program order, its messages, its peers.

    Args:
        name: the group's name, for messages.
        comm: the group's communicator.
        active: gives the groups that have a call under way, for peers that ask where this rank is.
        board: what the ranks of this node show each other.
        mark: that by which its members tell the group from others.
        once: what goes without arrival, and without a number; None: nothing does.

    Attributes:
        channel: what its calls go through; given when that is made.
        says: what a rank in a call of it says of itself in other groups, instead of that call.
    """

    # The compiled core looks at these in every call, so they lie where it finds them.
    __slots__ = ("__dict__", "__weakref__", "broken", "closed", "failures", "seq")

    def __init__(
        self,
        name: str,
        comm: MPI.Comm,
        active: Callable[[], list[GroupState]],
        *,
        board: Board = NO_BOARD,
        mark: str = "",
        once: Once | None = None,
    ) -> None:
        self.name = name
        self.board = board
        self.mark = mark
        self.once = once
        self.says = ""
        self.channel = Channel()
        self._all_active = active
        self.queue: deque[Task] = deque()
        self.enqueued: deque[Task] = deque()  # on the GPU's stream, oldest first
        # Sends and receives; those at the front wait longest.
        self.beside: OrderedDict[Task, None] = OrderedDict()
        self.due = math.inf  # when a deadline is to be looked at
        self.moved = 0.0  # when a pass last moved something
        self.warn_at = 0.0  # when to look whether something has waited for long
        self.parting = math.inf  # until when who is gone may have done its part of the last call
        self.broken: BaseException | None = None
        self.closed = ""
        self.said = False  # the peers have been told that it is broken
        self.deserted = False  # a wait for one of its calls was interrupted
        self.told = False  # the program has been given the error that broke it
        self.replaced = False  # shrink_group has made another group of its members
        self.failures: deque[Failure] = deque()  # that nobody has asked for, when last seen
        self.seq = 0
        self.left = 0  # the call that it was broken in, or before
        self.finished: tuple[Kind, int] | None = None  # kind and number of the last good call
        self.peers = Peers(comm, self.answer, board)

    def owes(self) -> bool:
        """Return whether a call that the core has posted came to nothing."""
        core = self.channel.core
        return core is not None and core.owed != 0

    @property
    def busy(self) -> bool:
        """Whether any of its tasks is not done."""
        return bool(self.queue or self.enqueued or self.beside)

    def tasks(self) -> list[Task]:
        """Return its tasks that are not done."""
        return [*self.queue, *self.enqueued, *self.beside]

    def drop(self, task: Task) -> None:
        """Take a task out, wherever it is."""
        if task in self.beside:
            del self.beside[task]
            return
        for where in (self.queue, self.enqueued):
            if where and where[0] is task:
                where.popleft()
                return
        for where in (self.queue, self.enqueued):
            with contextlib.suppress(ValueError):
                where.remove(task)

    def close(self, how: str) -> None:
        """Note that its group was closed, and let go of the memory that was shared."""
        self.closed = how
        self.channel.close()
        self.board = self.peers.board = NO_BOARD

    @property
    def reached(self) -> int:
        """The number of the last call in which this rank has arrived."""
        return self.queue[0].seq or self.seq if self.queue else self.seq

    def answer(self, seq: int) -> State:
        """Say what this rank is doing, for a peer that asks because of call `seq`, or a message."""
        if self.broken is not None and not self.queue:
            return State(False, False, Said(f"has left the group: {self.broken}"))
        waiting = any(task.seq == seq for task in (*self.queue, *self.enqueued))
        arrived = 0 < seq <= self.reached and self.broken is None
        return State(waiting, arrived, self._where())

    def _where(self) -> Said:
        if self.queue:
            return Said(f"is in {_placed(self.queue[0])}")
        others = [x for x in self._all_active() if x is not self and x.peers.size > 1]
        aside = [state.says for state in others if state.says and state.busy]
        heads = [state.queue[0] for state in others if state.queue and not state.says]
        found = [
            _placed(task, " of this group") for task in itertools.islice(self.beside, _SEVERAL)
        ]
        messages = (task for state in others if not state.says for task in state.beside)
        for task in (*heads, *itertools.islice(messages, _SEVERAL)):
            found.append(_placed(task, f" of group {task.group_state.name!r}"))
        core = self.channel.core
        ways = (self.finished, None if core is None else core.finished)
        kind, number = max(filter(None, ways), key=operator.itemgetter(1), default=("nothing", 0))
        last = f"{kind} #{number}" if number else kind
        since = f", and since then {self.once.said()}" if self.once and self.once.count else ""
        if found:
            text = f"is in {' and in '.join(found[:_SEVERAL])}; last finished here {last}{since}"
        else:
            where = aside[0] if aside else "is in no call of this group"
            text = f"{where}; last finished {last}{since}"
        calls = [
            (task.group_state.mark, task.seq)
            for task in heads
            if task.seq and task.group_state.mark
        ]
        return Said(text, tuple(calls[:_SEVERAL]))


def _placed(task: Task, of: str = "") -> str:
    """Say which call a task is, of which group, and where it was made."""
    number = f"call #{task.seq}{of}, " if task.seq else ""
    return f"{number}{task.call.describe()}{'' if number else of}{task.where()}"


def struck() -> CallInterruptedError:
    """Return the error of a call that came to nothing after its peers could know of it."""
    return CallInterruptedError("a call was interrupted when its peers could know of it")
