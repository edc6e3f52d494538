"""The way of one call, from its number and its check to its data, and the end of all calls.

A `Caller` is one group on one rank: what the group's calls run on, and the way that each of them
takes.  `ProcessGroup` holds one, and gives it the user's arguments.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from typing import Any

from ..engine import checks, communicators, kinds
from ..engine.arrival import Meeting
from ..engine.background import background
from ..engine.call import NULL, PROC_NULL, Call, Message
from ..engine.exit import check_process
from ..engine.kinds import Kind
from ..engine.once import Once
from ..engine.progress import engine
from ..engine.recorder import Recorder
from ..engine.tasks import GroupState, Task, struck
from ..engine.work import Unattended, Work
from ..errors import (
    GroupBrokenError,
    GroupClosedError,
    InvalidCallError,
    MpicollError,
)
from ..runtime.library import IDLE, MPI, Steps, highest_tag
from ..runtime.process import process
from ..runtime.settings import seconds
from ..transports import select
from ..transports.select import GroupOptions, Resources
from .channel import OpenChannel
from .reclaim import Child, Children

VERDICT = 0.06  # seconds that one rank's verdict may take to reach its group
SLACK = 3.0  # the same, where that rank waited for others than the group's ranks
_FAILURES = 64  # Works that failed and may have been dropped, which a call looks at


class Caller:
    """One group on this rank, and the way of its calls.

    Args:
        resources: what the group's ranks have between them.
        options: what the group was asked to run on.
        timeout: the seconds that a call may take where it doesn't say otherwise.
        name: the group's name.
        desc: what the group is for, in its maker's words.
        progress: "caller" or "thread", as for `new_group`.

    Attributes:
        rank: this process's rank in the group.
        size: the number of ranks in the group.
        comm: the group's private communicator.
        highest_tag: the highest tag that a message may have.
        world_ranks: the members, as ranks of MPI.COMM_WORLD; -1 stands for one of another world.
        group_state: the group as the engine sees it.
        transport: what moves the group's data.
        arrival: how the ranks meet in a call.
        core: the compiled way of small calls, in a group that has one.
        rings: the compiled way of messages, in a group that has one.
        once: the calls that go on without arrival, in a group with ``checks="first"``.
        recorder: the group's flight recorder.
        children: the groups that were made out of this one.
        child: this group, as the one that it was made out of remembers it.
    """

    def __init__(
        self,
        resources: Resources,
        options: GroupOptions,
        *,
        timeout: float,
        name: str,
        desc: str = "",
        progress: str = "caller",
    ) -> None:
        self.resources = resources
        self.options = options if resources.gpu is None else options.on(resources.gpu)
        self.desc = desc
        self._engine = engine()
        self.progress = progress
        self.comm = comm = resources.comm
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self.highest_tag = highest_tag()
        self.world_ranks = communicators.world_ranks(comm)
        self.recorder = Recorder(name, self.rank, self.world_ranks, checks=options.checks)
        self.once = Once() if options.checks == "first" else None
        self.group_state = state = GroupState(
            name,
            comm,
            self._engine.active,
            board=select.board(resources),
            mark=self.recorder.mark,
            once=self.once,
        )
        foreign = communicators.foreign_ranks(comm)
        state.peers.observe(resources.neighbours, foreign)
        self.transport = select.transport(resources)
        self.arrival = select.arrival(resources, state.peers, options)
        self.core = None  # the compiled way of small calls
        if self.once is None:
            self.core = self.transport.core(self.arrival, state, self.recorder)
        self.rings = self.transport.rings(state, self.recorder)
        self.timeout = timeout
        state.channel = OpenChannel(
            *(state, self.arrival, self.transport, self.recorder, self.core),
            self.rings,
        )
        self.children = Children()
        self.child = Child(
            *(self, resources.comms, self.transport, state, self.recorder, self.children)
        )
        self._ending: Work | None = None  # the call of shutdown()
        comm.Set_attr(process().the(_new_key), weakref.ref(self))
        self._engine.enlist(state)
        if progress == "thread":
            background().progress(stay=True)
        if self.transport.watched:
            background().keep_deadlines()

    @property
    def timeout(self) -> float:
        """The seconds that a call may take where it doesn't say otherwise."""
        return self._timeout

    @timeout.setter
    def timeout(self, limit: float) -> None:
        self._timeout = limit
        if self.rings is not None:
            self.rings.limit = limit

    # ---- collectives ----

    def call(
        self,
        kind: Kind,
        timeout: object,
        check: Callable[..., Call],
        *arguments: object,
        then: Callable[[Work], Steps] | None = None,
    ) -> Work:
        """Take a number, check the arguments, and launch arrival followed by the data.

        Args:
            check: makes the `Call` of this rank, the number of ranks and the arguments, or raises.
            then: the steps that follow arrival, where those are not the transport's.
        """
        state = self.group_state
        self.check_usable()
        seq, posted = 0, self.core is not None and self.core.owed != 0
        if self.once is None and not posted:  # else it takes a number later, or has one
            state.seq += 1
            seq = state.seq
        call = None
        try:
            if posted:
                seq = self._taken_over(kind)
            limit = self.timeout if timeout is None else seconds(timeout, self.timeout)
            if state.failures:
                self._raise_unfetched()
            call = check(self.rank, self.size, *arguments)
            if self._engine.busy:
                _refuse_busy(call, state)
            if call.device is not None:
                self.transport.admit(call)  # the last to refuse the call, which has its turn then
            work = Work(state, call, seq, limit, self.recorder)
        except BaseException as error:  # a KeyboardInterrupt, too: the number is taken
            if call is not None and call.turn is not None:
                call.turn.over = True
            if posted:  # the peers may have used what was posted: it can't be refused any more
                self._engine.fail_all(state, struck())
            else:
                self._arrive_refused(kind, seq, error)
            raise
        try:
            in_one_go = then is None and call.device is None and self.once is None
            if not (in_one_go and self._engine.at_once(work, self.arrival.meet_at_once)):
                self._engine.launch(work, self._steps(work, then))
                if not work.done and (call.recv is not None or call.parts):
                    work.__class__ = Unattended
        except BaseException as error:
            self._engine.forsake(work, error)
            raise
        return work

    def _taken_over(self, kind: Kind) -> int:
        """Return the number of a call that the core has posted, and left to this way."""
        assert self.core is not None
        self.group_state.seq += 1
        if not self.core.take_over(kind):
            self._engine.fail_all(self.group_state, struck())
            self.check_usable()
        return self.group_state.seq

    def _steps(self, work: Work, then: Callable[[Work], Steps] | None) -> Steps:
        """Arrive, then move the data, or take the steps of `then`."""
        call, transport = work.call, self.transport
        if then is None and call.turn is not None and self._need_not_wait(call, work.seq):
            yield from transport.steps(call)
            return
        moved = yield from self._arrive(work)
        if then is not None:
            yield from then(work)
        elif not moved:
            yield from transport.steps(call)

    def _need_not_wait(self, call: Call, seq: int) -> bool:
        """Return whether a call of NCCL's needs no arrival, or all ranks are there already."""
        if self.once is not None:
            return self.once.goes_without(call)
        return self.arrival.all_here(call, seq)

    def _arrive(self, work: Work) -> Meeting:
        """Meet the other ranks in a call, which is the first of its queue."""
        call, record = work.call, None
        if self.once is not None:
            record = self.once.before(call)
            self.group_state.seq += 1
            work.take_number(self.group_state.seq)
        moved = yield from self.arrival.meet(call, work.seq)
        if record is not None and self.once is not None and not call.refused:
            self.once.after(record)
        return moved

    def _arrive_refused(self, kind: Kind, seq: int, error: BaseException) -> None:
        """Arrive, so that the peers hear in this call that this rank's arguments were refused."""
        call = Call(kind, refused=f"{type(error).__name__}: {error}")
        work = Work(self.group_state, call, seq, self.timeout, self.recorder)

        def steps() -> Steps:
            yield from self._arrive(work)

        self._engine.launch(work, steps())
        if self.size > 1:
            with contextlib.suppress(MpicollError):
                background().progress()

    # ---- messages ----

    def message(self, timeout: object, check: Callable[..., Call], *arguments: object) -> Work:
        """Launch a send or recv, which takes no number and waits in no queue.

        Args:
            check: makes the `Call` of the number of ranks, the highest tag and the arguments.
        """
        self.check_usable()
        limit = self.timeout if timeout is None else seconds(timeout, self.timeout)
        if self.group_state.failures:
            self._raise_unfetched()
        call = check(self.size, self.highest_tag, *arguments)
        before = _refuse_busy(call, self.group_state) if self._engine.busy else None
        if call.device is not None:
            self.transport.admit(call)
        move = self.transport.recv if call.kind.receives else self.transport.send
        if call.peer == NULL:
            move = _no_message
        steps = move(call)
        if before is not None:  # the same receive, the wait for which was interrupted
            steps, call = before.steps, before.call
        work = Work(self.group_state, call, 0, limit, self.recorder)
        try:
            self._engine.launch(work, steps)
        except BaseException as error:
            self._engine.forsake(work, error)
            raise
        return work

    def probe(self, src: object, tag: object) -> Message | None:
        """Look once for a message that `recv` would take.

        Raises:
            RankFailedError, RemoteRankError: none is here, and a peer has died or left the group.
        """
        self.check_usable()
        peer, number = checks.probe(self.size, self.highest_tag, src, tag)
        if peer == NULL:
            return None
        found = self._engine.look(lambda: self.transport.probe(peer, number))
        if found is None:
            self.check_usable()
            self._engine.check_peers(self.group_state)
        return found

    # ---- calls that make a group ----

    def make_comm(
        self,
        kind: Kind,
        timeout: object,
        check: Callable[..., Call],
        make: Callable[[Call, float], communicators.MakesComm],
        *,
        slack: float = VERDICT,
        parts: bool = True,
        options: GroupOptions | None = None,
    ) -> tuple[Resources | None, Call]:
        """Run a call that makes a communicator, and wait for it.

        Return what the new group runs on, None on a rank that is not in it; and the call.

        Args:
            make: returns the steps that make it, given the call and its deadline, after arrival.
            slack: the seconds past the deadline that the verdict may take to reach all ranks.
            parts: whether all members of the communicator are members of this group, and run on
                the same.
            options: what the new group was asked to run on, if not on the same.
        """

        def then(work: Work) -> Steps:
            deadline = work.deadline
            # All ranks of this group are here.  `make` keeps the deadline itself, and its
            # verdict needs some time to reach them all.
            work.deadline += slack
            yield from self.children.reclaim(self.comm, deadline)
            comm = yield from make(work.call, deadline)
            work.call.result = nccl = None
            if parts:
                nccl = yield from select.split_nccl(self.resources, comm)
            if comm is not None:
                made = yield from select.prepare(comm, options or self.options, deadline, nccl)
                work.call.result = made

        work = self.call(kind, timeout, check, then=then)
        wait_through(work)
        return work.call.result, work.call

    def successor(
        self, resources: Resources, name: str, desc: str | None, timeout: object
    ) -> Caller:
        """Return a new group that runs on the resources, and otherwise as this one does."""
        return Caller(
            resources,
            self.options,
            timeout=seconds(timeout, self.timeout),
            name=name,
            desc=desc or "",
            progress=self.progress,
        )

    # ---- the end ----

    def shutdown(self, timeout: object) -> None:
        """Finish what is under way, wait for all ranks, and give the communicators back."""
        state = self.group_state
        if state.closed:
            return
        self._engine.take_on()
        messages = list(state.beside)
        if state.broken is None:
            for work in list(state.enqueued):
                self._engine.wait(work, seconds(timeout, self.timeout))

            def then(work: Work) -> Steps:
                while state.enqueued:
                    yield IDLE  # the calls that were left to the GPU come first
                yield from self.transport.clear(state)
                yield from state.peers.drain()
                self._engine.delist(state)  # no rank may listen on it any more
                yield from self.transport.close()
                yield from communicators.free(self.resources.comms, work.deadline)

            try:
                # If the wait is interrupted, the next one goes on with it.
                if self._ending is None or self._ending.done:
                    self._ending = self.call(
                        kinds.SHUTDOWN, timeout, lambda rank, size: Call(kinds.SHUTDOWN), then=then
                    )
                self._ending.wait()
            except MpicollError as error:
                if not error.breaks_group:
                    raise  # no rank has shut it down
                self._close("shut down")
                raise
        self._close("shut down")
        for message in messages:
            if message.error is not None and not message.fetched:
                message.fetch()
                raise message.error

    def abort(self, why: str) -> None:
        """Give up everything under way, at once and on this rank alone."""
        if self.group_state.closed:
            return
        self._engine.fail_all(self.group_state, GroupClosedError(f"rank {self.rank} {why}"))
        self._close("aborted")

    def _close(self, how: str) -> None:
        self.group_state.close(how)
        self._engine.delist(self.group_state)
        self.recorder.close()
        if self.core is not None:
            self.core.close()
        together = self.group_state.broken is None
        self._engine.between_steps(lambda: self.transport.release(together=together))

    # ---- whether it can be used ----

    def check_usable(self, *, even_if_broken: bool = False) -> None:
        """Refuse a call that this process, or this group, can make no more."""
        check_process()
        state = self.group_state
        if state.closed:
            raise GroupClosedError(
                f"group {state.name!r} was {state.closed}: make a new one with new_group()"
            )
        if state.broken is not None and not even_if_broken:
            state.told = True
            raise GroupBrokenError(
                f"group {state.name!r} can't be used after an earlier failure: {state.broken}"
            ) from state.broken

    def _raise_unfetched(self) -> None:
        """Raise the error of a Work that the program dropped before it asked for the error."""
        failures, error = self.group_state.failures, None
        for _ in range(min(len(failures), _FAILURES)):
            failure = failures.popleft()
            if failure.fetched:
                continue
            if failure.task() is not None:
                failures.append(failure)
            else:
                error = error or failure.error  # the first will do
        if error is not None:
            raise error


def caller_on(comm: MPI.Intracomm) -> Caller | None:
    """Return the group whose private communicator this is."""
    found: Any = comm.Get_attr(process().the(_new_key))
    return None if found is None else found()


def _new_key() -> int:
    """Return the key under which a communicator has its group."""
    return MPI.Comm.Create_keyval()


def make_unnumbered(
    group: Caller,
    work: Work,
    make: Callable[[float], communicators.MakesComm],
    prepare: Callable[[MPI.Intracomm, GroupOptions, float], select.Prepares],
) -> Resources:
    """Run a call that makes a group of some ranks without the others, and wait for it.

    Args:
        make: returns the steps that make its communicator, given the deadline.
        prepare: returns those that make what else the new group runs on.
    """

    def steps() -> Steps:
        deadline = work.deadline
        work.deadline += VERDICT
        made = yield from make(deadline)
        assert made is not None
        work.call.result = yield from prepare(made, group.options, deadline)

    engine().launch(work, steps())
    wait_through(work)
    found: Resources = work.call.result
    return found


def wait_through(work: Work) -> None:
    """Wait for a call whose Work the user never gets; an exception that ends the wait ends it."""
    try:
        work.wait()
    except BaseException as error:
        if not work.done:
            engine().forsake(work, error)
        raise


def _no_message(call: Call) -> Steps:
    """Send to `PROC_NULL`, or receive from it: no data move."""
    call.result = PROC_NULL
    yield from ()


def _refuse_busy(call: Call, state: GroupState) -> Task | None:
    """Raise if a call's memory conflicts with what an unfinished Work of any group is using.

    Return the receive that the new call takes over, if the wait for that receive was interrupted.
    """
    task = engine().make_room(call, state)
    if task is None or task.done:
        return task
    raise InvalidCallError(
        f"an array given to {call.describe()} overlaps one that an unfinished Work "
        f"is using, {task.call.describe()}: wait() for that first, or use memory of its own"
    )
