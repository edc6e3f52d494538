"""The ranks that run tests together: where they meet between tests, and what groups are made on.

They meet in a group of their own, which no test has.  A test's groups are made over a communicator,
its *world*, that is thrown away after a failure: whatever is still pending there, the next test has
another one.  `new_group` works on it, too, where it is given no communicator.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Any, cast

import numpy as np

from ..engine.progress import engine
from ..errors import (
    CollectiveTimeoutError,
    GroupBrokenError,
    MpicollError,
    RankFailedError,
    RemoteRankError,
)
from ..groups.new import default, new_group
from ..runtime.library import MPI
from ..runtime.process import monotonic
from ..runtime.settings import machine
from ..runtime.watchdog import end_job, watchdog
from .limits import Stacks, ask

START = 300.0  # seconds in which all ranks have started, and imported what pytest loads first
MAKING = 30.0  # seconds in which a group is made
_SOON = 0.2  # seconds after which peers that wait for one that skipped the test hear of it
_SURVIVORS = 5.0  # seconds for the ranks that are left to find one another
_SAID = 10.0  # seconds that the rank which reports may take before the others end the job


class Left(Exception):
    """A rank has left the session, and says why."""


class Lost(Exception):
    """Ranks that can't be stopped, or have died.

    Attributes:
        said: what became of each.
        others: what the others brought to the meeting.
    """

    def __init__(self, said: dict[int, str], others: list[Any]) -> None:
        super().__init__(said)
        self.said = said
        self.others = others


class Together:
    """This rank among those that run the tests.

    Attributes:
        lost: whether a rank is lost, so that the job is to end.
        speaker: the rank that reports: 0, unless that is lost.
        told: whether this rank has broken the groups of the test.
        halted: whether a debugger's prompt is open on this rank.
    """

    def __init__(self) -> None:
        self._meeting = meeting = new_group(timeout=START, group_name="pytest")
        self.rank, self.size = meeting.rank(), meeting.size()
        self._worlds: dict[int, MPI.Intracomm] = {}
        self._codes = np.empty((self.size, 2), dtype=np.int64)
        self.lost = False
        self.speaker = 0
        self.told = self.halted = False
        self._stacks = Stacks()
        self._where: list[tuple[str, tuple[int, int]]] = meeting.allgather_object(
            (machine(), self._stacks.place)
        )

    # ---- the world of a test ----

    def enter(self, n: int) -> None:
        """Have the first n ranks work together in the next test; every rank calls."""
        if n not in self._worlds:
            color = 0 if self.rank < n else MPI.UNDEFINED
            with watchdog().guard(monotonic() + MAKING, "the making of a test's world"):
                world = self._meeting.comm.Split(color, self.rank)
                self._worlds[n] = cast(MPI.Intracomm, world)
        default().comm = self._worlds[n] if self.rank < n else None
        self.told = False

    def tell(self, why: str) -> None:
        """Break all groups that tests may wait in, so that the peers hear at once why."""
        self.told = True
        default().enlist()
        mine = self._meeting._caller.group_state
        for state in engine().group_states():
            if state is not mine and state.broken is None and state.peers.size > 1:
                engine().fail_all(state, GroupBrokenError(f"this rank {why}"), why)

    def heal(self) -> None:
        """Give up what a failed test has left, on all ranks alike; the next one has a new world."""
        self.tell("gave up what a failed test had left")
        self._worlds.clear()  # never freed: what is pending there may be for ever
        default().comm = None

    # ---- a debugger's prompt ----

    def halt(self, halted: bool) -> None:
        """Note, and tell the peers, whether a debugger's prompt is open on this rank."""
        if halted != self.halted:
            self.halted = halted
            peers = self._meeting._caller.group_state.peers
            engine().between_steps(lambda: peers.halt(halted))

    def is_halted(self, *, listens: bool = True) -> bool:
        """Return whether a prompt is open on any rank.

        Args:
            listens: whether to read first what has come, for which the engine must be free.
        """
        peers = self._meeting._caller.group_state.peers

        def listen() -> None:
            with contextlib.suppress(MPI.Exception):
                peers.poll()

        if listens:
            engine().between_steps(listen)
        return self.halted or bool(peers.halted)

    # ---- meetings ----

    def says(self, text: str) -> None:
        """Have peers that wait for this rank elsewhere, while it is in a meeting, told this of it.

        Args:
            text: goes on after "rank 2".
        """
        self._meeting._caller.group_state.says = text

    def meet(
        self, code: int, key: int, timeout: float, late: str = "", brings: Any = None
    ) -> tuple[list[int], bool]:
        """Exchange a number; also return whether all ranks gave the same key.

        Args:
            brings: what the others are to know, if ranks are lost.
            late: what the tested groups' members are told if they don't come at once; "": nothing.

        Raises:
            Left, Lost: not all ranks come.
        """
        mine = np.array([code, key], dtype=np.int64)

        def meet() -> None:
            work = self._meeting.all_gather_single(self._codes, mine, timeout)
            soon = time.monotonic() + _SOON
            while late and not work.is_completed():
                if time.monotonic() > soon:
                    self.tell(late)
                    break
                time.sleep(5e-4)
            work.wait()

        self._bounded(meet, brings)
        keys = self._codes[:, 1]
        return self._codes[:, 0].tolist(), bool((keys == keys[0]).all())

    def gather(self, thing: Any, timeout: float = MAKING) -> list[Any]:
        """Return what all ranks bring.

        Raises:
            Left, Lost: not all ranks come.
        """
        found: list[Any] = self._bounded(
            lambda: self._meeting.allgather_object(thing, timeout), thing
        )
        return found

    def _bounded(self, meet: Any, brought: Any) -> Any:
        try:
            return meet()
        except CollectiveTimeoutError as error:
            raise self._without({}, error.missing, brought) from error
        except RankFailedError as error:
            how = str(error).removeprefix(f"rank {error.rank} ")
            raise self._without({error.rank: how}, (), brought) from error
        except RemoteRankError as error:
            raise Left(str(error)) from error

    def _without(self, died: dict[int, str], hung: Sequence[int], brought: Any) -> Lost:
        """Find out what can be said of the ranks that are lost, with those that are left."""
        self.lost = True
        here = self._where[self.rank][0]
        left = [rank for rank in range(self.size) if rank not in (*died, *hung)]
        near = [rank for rank, (machine, _) in enumerate(self._where) if machine == here]
        said = dict(died)
        if self.rank == min(set(near) & set(left)):
            stacks = ask({rank: self._where[rank][1] for rank in set(near) & {*hung}})
            said |= {rank: f"can't be stopped. {text}" for rank, text in stacks.items()}
        others = [brought]
        with contextlib.suppress(MpicollError):
            survivors = self._meeting.shrink_group(hung, _SURVIVORS)
            told = survivors.allgather_object((brought, said), _SURVIVORS)
            others = [thing for thing, _ in told]
            for _, known in told:
                said.update(known)
        for rank in hung:
            said.setdefault(rank, f"can't be stopped; it is on another machine ({here})")
        self.speaker = min(left)
        return Lost(said, others)

    def whereabouts(self) -> str | None:
        """Return the stacks of this machine's ranks, if this rank is to say them.

        For when no rank comes to the meeting, as all are in C code.
        """
        here = self._where[self.rank][0]
        near = {rank: place for rank, (machine, place) in enumerate(self._where) if machine == here}
        if min(near) != self.rank:
            return None
        found = ask(near)
        return "\n".join(f"---- rank {rank} ----\n{text}" for rank, text in found.items())

    # ---- the end ----

    def hears(self, rank: int, seconds: float) -> str:
        """Return why a rank has left, if that is heard within so many seconds; else ""."""
        peers, until = self._meeting._caller.group_state.peers, time.monotonic() + seconds
        while rank not in peers.left and time.monotonic() < until:
            engine().between_steps(peers.poll)
            time.sleep(1e-3)
        return peers.left[rank].text if rank in peers.left else ""

    def leave(self, why: str) -> None:
        """Leave before the others; they hear why where they meet."""
        self.tell(why)
        meeting = self._meeting._caller.group_state
        engine().fail_all(meeting, GroupBrokenError(f"this rank {why}"), why)

    def end(self) -> None:
        """End the session, together."""
        default().comm = None
        with contextlib.suppress(MpicollError):
            if not self._meeting.is_closed:
                self._meeting.shutdown(MAKING)
        self._stacks.close()

    def end_the_job(self) -> None:
        """End all ranks, after the one that reports has done so."""
        if self.rank != self.speaker:
            time.sleep(_SAID)
        end_job(1)
