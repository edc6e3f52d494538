"""Arrival: every rank says which call it makes, and data moves only if all say the same.

Over MPI the records meet in one nonblocking allreduce of each field's minimum and maximum:
constant size at any number of ranks.  Who called what is gathered only where they differ.
On a node they meet on a board in shared memory; across nodes on the boards first, then in an
allreduce between the nodes' first ranks.
"""

from __future__ import annotations

import struct
from collections.abc import Generator, Sequence
from typing import Protocol, TypeAlias

import numpy as np

from ..errors import CollectiveMismatchError, GroupBrokenError, RemoteRankError
from ..runtime import agreement
from ..runtime.library import IDLE, MPI, Steps, pending, until
from ..runtime.process import monotonic
from .board import NodeBoard
from .call import UNEVEN, Call
from .kinds import KINDS
from .peers import Peers
from .records import (
    BOTH,
    COUNT,
    FIELDS,
    KIND,
    LEAVING,
    REFUSED,
    SEQ,
    STATE,
    Meets,
    Record,
    pack,
    record_of,
    unpacked,
)

_ORDER = "The order of the calls is lost"
_BROKEN = ", so the group can't be used any more"

_NEWS = 0.05  # seconds that a notice may take to come
_PAUSE = 0.05  # seconds between calls in which the peers may have given up waiting
_LOOK = 0.001  # seconds to look for their notices then

_TEXT = 448  # bytes of a call's description, where descriptions are exchanged
_DETAIL = struct.Struct(f"<{FIELDS + 1}q{_TEXT}s")
_CHAIN = FIELDS  # what is compared beside the record, where descriptions are exchanged


Meeting: TypeAlias = "Generator[int, None, bool]"
"""Steps that end in whether the data of the call came with the records."""


class Exchange:
    """Where records meet over MPI: those of all ranks, or of the nodes' first ones.

    Attributes:
        count: meetings that this rank has begun; on all ranks the same, or one less.
        last: the call of the last one.
        both: what came out of it.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self.count = self.last = 0
        self.both = bytearray(BOTH.size)
        self._spec = [self.both, MPI.INT64_T]

    def meet(self, highest: Record, lowest: Record, extent: int) -> Meets:
        """Publish what this rank has, and wait for all; return what differs."""
        # The buffer is reused: calls of a group come one at a time, and after one that was
        # abandoned there is no other.
        pack(self.both, highest, lowest, extent)
        self.count += 1
        self.last = highest[SEQ]
        yield from until(self._comm.Iallreduce(MPI.IN_PLACE, self._spec, MPI.MAX), IDLE)
        return unpacked(self.both)

    def catch_up(self, count: int, left: int) -> None:
        """Begin the meeting in which others still wait for this rank: MPI ends no other way.

        It comes when all are at their ends, and nobody reads what it gives.  Not where this rank
        left call `left` behind its meeting: MPI may expect more of it first.

        Args:
            count: meetings that others have begun.
        """
        if count == self.count + 1 and self.last != left:
            self.count = count
            pending().append(self._comm.Iallreduce(MPI.IN_PLACE, self._spec, MPI.MAX))


class Gathering:
    """Where all ranks of a group are told who called what, if their calls differ.

    Attributes:
        count: how many of these this rank has begun; on all ranks the same, or one less.
    """

    def __init__(self, comm: MPI.Comm) -> None:
        self._comm = comm
        self._size = comm.Get_size()
        self._kept: Sequence[bytearray] = ()
        self.count = 0

    def gather(self, mine: bytes) -> Generator[int, None, bytearray]:
        """Return what all ranks say, in their order."""
        everyone = bytearray(self._size * len(mine))
        self.count += 1
        yield from until(self._comm.Iallgather([mine, MPI.BYTE], [everyone, MPI.BYTE]))
        return everyone

    def catch_up(self, count: int) -> None:
        """Begin the one in which others still wait for this rank; see `Exchange`."""
        if count == self.count + 1:
            self.count = count
            nothing, everyone = bytearray(_DETAIL.size), bytearray(self._size * _DETAIL.size)
            self._kept = nothing, everyone
            pending().append(self._comm.Iallgather([nothing, MPI.BYTE], [everyone, MPI.BYTE]))


class Arrival:
    """The exchange of records of one group, on the group's private communicator.

    Attributes:
        exchange: where they meet over MPI; None: they don't, or not on this rank.
        gathering: where it is told who called what.
    """

    exchange: Exchange | None

    def __init__(self, comm: MPI.Comm, peers: Peers) -> None:
        self.exchange = Exchange(comm)
        self.gathering = Gathering(comm)
        self._comm = comm
        self._peers = peers
        self._size = comm.Get_size()
        self._rank = comm.Get_rank()
        self._asked: MPI.Comm = comm  # whom a mismatch is gathered from
        self._since = monotonic()  # when this rank arrived last

    def meet(self, call: Call, seq: int) -> Meeting:
        """Wait until every rank has arrived at a call, and compare.

        Returns whether the data of the call came with the records, so nothing is left to do.

        Fills in `call.largest`, so that what depends on size is decided alike everywhere, notes
        that the ranks have met, and sets `call.count` to UNEVEN on all ranks where their counts
        differ.

        Raises:
            CollectiveMismatchError: the calls differ, or a rank's call was refused.
            RemoteRankError: a peer has left this call, or the program.
        """
        self._check_left_before(seq)
        highest, lowest, call.largest = yield from self._exchange(record_of(call, seq), call.extent)
        call.met = self._asked is self._comm
        self.check_left(seq)
        if highest == lowest and highest[STATE] != REFUSED:
            if call.count == UNEVEN and call.kind.pairwise:
                yield from self._compare_pairs(call, seq)
            return False
        differing = [i for i in range(FIELDS) if highest[i] != lowest[i]]
        if differing == [COUNT] and call.kind.pairwise and not highest[STATE]:
            yield from self._compare_pairs(call, seq)
            call.count = UNEVEN
            return False
        lost = _ORDER if SEQ in differing else ""
        yield from self._mismatch(call, seq, lost)
        return False

    def meet_at_once(self, call: Call, seq: int) -> bool:
        """Do all that is to be done for a call, if that takes no wait; return whether it was done.

        If not, nothing is lost: `meet` arrives once more, in the same words.  Over MPI it never is.
        """
        return False

    def all_here(self, call: Call, seq: int) -> bool:
        """Arrive; return whether all ranks have, in the same call, so that its data can move.

        If not, nothing is lost: `meet` arrives once more.  Over MPI they never are.
        """
        return False

    def _exchange(self, record: Record, extent: int) -> Meets:
        """Publish this rank's record and wait for all; return what differs."""
        assert self.exchange is not None
        return self.exchange.meet(record, record, extent)

    def check_left(self, seq: int) -> None:
        """Raise if a peer has said that it takes no part in call `seq`."""
        self._peers.poll()
        for rank, notice in self._peers.left.items():
            if notice.seq <= seq:
                raise RemoteRankError(f"rank {rank} {notice.text}", rank=rank)

    def _check_left_before(self, seq: int) -> None:
        """Raise if a peer has left before it arrived in call `seq`: an allreduce would never end.

        If it had arrived, it is this rank's arrival that lets the allreduce end, and MPI forget it.
        """
        now = monotonic()
        if now - self._since > _PAUSE:
            # MPI may not see at once that a message has come.
            while monotonic() < now + _LOOK:
                self._peers.poll()
        self._since = now
        for rank, notice in self._peers.left.items():
            if notice.seq < seq or (notice.seq == seq and not notice.waiting):
                raise RemoteRankError(f"rank {rank} {notice.text}", rank=rank)

    def _compare_pairs(self, call: Call, seq: int) -> Steps:
        """Compare what each rank sends to each other with what that one expects."""
        sends, expects = self._pair_counts(call)
        comes = yield from agreement.exchanged(self._comm, sends)
        (fits,) = yield from agreement.unanimous(self._comm, bool((comes == expects).all()))
        if not fits:
            odd = np.flatnonzero(comes != expects).tolist()
            said = "; ".join(
                f"rank {self._rank} expects {expects[j]} elements from rank {j}, "
                f"which sends {comes[j]}"
                for j in odd
            )
            yield from self._mismatch(call, seq, said=said)

    def _pair_counts(self, call: Call) -> tuple[list[int], list[int]]:
        """Return how many elements this rank sends to, and expects from, each rank."""
        sends, expects = [0] * self._size, [0] * self._size
        if call.kind.to_root:
            assert call.send is not None
            sends[call.root] = call.send.total
            if call.recv is not None:
                expects = list(call.recv.counts)
        elif call.kind.from_root:
            assert call.recv is not None
            expects[call.root] = call.recv.total
            if call.send is not None:
                sends = list(call.send.counts)
        else:
            assert call.send is not None and call.recv is not None
            sends, expects = list(call.send.counts), list(call.recv.counts)
        return sends, expects

    def _mismatch(self, call: Call, seq: int, lost: str = "", said: str = "") -> Steps:
        """Gather who called what, and raise it on every rank; `lost` says why the group is."""
        text = ((said or call.describe()) + call.since).encode(errors="replace")[:_TEXT]
        mine = _DETAIL.pack(*record_of(call, seq), call.chain, text)
        near = self._asked is not self._comm
        asked = Gathering(self._asked) if near else self.gathering
        rows = list(_DETAIL.iter_unpack((yield from asked.gather(mine))))
        if len({row[_CHAIN] for row in rows}) > 1:  # what was done without a comparison differs
            lost = lost or _ORDER
        alike = all(row[STATE] == REFUSED for row in rows)
        if call.leaving:
            raise GroupBrokenError("this rank left the program while its peers were in other calls")
        if call.refused and (alike or not lost):
            return  # this rank has raised its own, more precise error
        for rank, row in zip(self._ranks(), rows, strict=True):
            if row[STATE] == LEAVING:
                raise RemoteRankError(
                    f"rank {rank} left the program while this rank was in {call.describe()} "
                    f"(call #{seq})",
                    rank=rank,
                )
        raise CollectiveMismatchError(
            _explain(seq, self._ranks(), rows, lost), breaks_group=bool(lost)
        )

    def _ranks(self) -> Sequence[int]:
        """Return the group's ranks that a mismatch is gathered from."""
        return range(self._size)


class Inline(Protocol):
    """What small data travel by, beside the records on a board."""

    def give(self, call: Call, seq: int) -> bool:
        """Write what this rank gives, before it arrives; return whether its call is inline."""

    def take(self, call: Call, seq: int) -> bool:
        """Read what this rank gets, after all have arrived; return whether all data were inline."""


class BoardArrival(Arrival):
    """The same over the node's shared memory: each rank reads the others' records.

    Args:
        board: what the ranks that share the memory show each other.
        inline: what small data travel by, beside the records; None: they don't.

    Attributes:
        last: the number of the last arrival; calls count from 1.
    """

    __slots__ = ("last",)  # a slot, for the compiled core

    def __init__(
        self, comm: MPI.Comm, peers: Peers, board: NodeBoard, inline: Inline | None
    ) -> None:
        super().__init__(comm, peers)
        self.exchange = None
        self._memory = board.memory
        self._near = board.ranks
        self._inline = inline
        self.last = 0

    def meet_at_once(self, call: Call, seq: int) -> bool:
        inline = self._inline
        if inline is None or seq <= self.last or not inline.give(call, seq):
            return False
        call.largest = self._memory.post(record_of(call, seq), call.extent)
        if call.largest < 0 or self._memory.leavers(seq) or not inline.take(call, seq):
            return False
        self.last = seq
        return True

    def all_here(self, call: Call, seq: int) -> bool:
        if seq <= self.last or call.count == UNEVEN:
            return False
        largest = self._memory.post(record_of(call, seq), call.extent)
        if largest < 0 or self._memory.leavers(seq):
            return False
        self.last, call.largest, call.met = seq, largest, True
        return True

    def meet(self, call: Call, seq: int) -> Meeting:
        inline = self._inline
        if inline is None or call.refused or not inline.give(call, seq):
            return (yield from super().meet(call, seq))
        yield from super().meet(call, seq)
        return inline.take(call, seq)

    def _exchange(self, record: Record, extent: int) -> Meets:
        memory, seq = self._memory, record[SEQ]
        if seq <= self.last:  # the board would show what the others said the first time
            raise _lost(seq, self._near[memory.rank], f"has made a call #{self.last} already")
        self.last = seq
        largest = memory.post(record, extent)
        if largest < 0:
            for rank in memory.missing(seq):
                for found in memory.arrived(rank, seq):
                    if memory.has_skipped(rank, seq):
                        raise _lost(seq, self._near[rank], f"is in call #{seq + 1} without it")
                    yield found
            largest = memory.agreed(seq)
        if largest >= 0:
            return record, record, largest
        rows = memory.records(seq)
        for rank, row in enumerate(rows):
            if row[SEQ] != seq:
                raise _lost(seq, self._near[rank], f"is in call #{row[SEQ]} without it")
        largest = max(row[FIELDS] for row in rows)
        columns = list(zip(*rows, strict=True))[:FIELDS]
        return tuple(map(max, columns)), tuple(map(min, columns)), largest

    def _check_left_before(self, seq: int) -> None:
        pass  # nothing is pending in MPI after an arrival on the board

    def check_left(self, seq: int) -> None:
        for place in self._memory.leavers(seq):
            rank = self._near[place]
            # It has sent its reasons before it left the mark; they need a moment.
            until = monotonic() + _NEWS
            while rank not in self._peers.left and monotonic() < until:
                self._peers.poll()
            notice = self._peers.left.get(rank)
            text = "left the group" if notice is None else notice.text
            raise RemoteRankError(f"rank {rank} {text}", rank=rank)


class NodesArrival(BoardArrival):
    """Across nodes: on each node's board, then between the nodes' first ranks.

    The first rank puts what it hears on its node's board, so that all ranks of all nodes come
    to one verdict.  Where only nodes are to check (`everywhere` False), calls that all ranks
    must make alike are left to the node's own comparison; a mismatch found there breaks the
    group, since the other nodes don't know of it.

    Args:
        near: the communicator of the node's ranks.
        leaders: that of the nodes' first ranks; None on other ranks.
    """

    def __init__(
        self,
        comm: MPI.Comm,
        peers: Peers,
        board: NodeBoard,
        *,
        near: MPI.Comm,
        leaders: MPI.Comm | None,
        everywhere: bool,
    ) -> None:
        super().__init__(comm, peers, board, None)
        self._near_comm = near
        self.exchange = None if leaders is None else Exchange(leaders)
        self._everywhere = everywhere

    def all_here(self, call: Call, seq: int) -> bool:
        return False  # those of other nodes are not on the board

    def _exchange(self, record: Record, extent: int) -> Meets:
        highest, lowest, largest = yield from super()._exchange(record, extent)
        self._asked = self._comm
        if not self._everywhere and (highest[KIND] != lowest[KIND] or KINDS[highest[KIND]].alike):
            self._asked = self._near_comm
            return highest, lowest, largest
        memory, seq = self._memory, record[SEQ]
        outcome = memory.outcome(seq).cast("B")
        if memory.rank == 0:
            assert self.exchange is not None
            met = yield from self.exchange.meet(highest, lowest, largest)
            outcome[: BOTH.size] = self.exchange.both
            memory.conclude(seq)
            return met
        yield from memory.concluded(seq)
        return unpacked(outcome)

    def _mismatch(self, call: Call, seq: int, lost: str = "", said: str = "") -> Steps:
        if self._asked is self._near_comm:
            lost = lost or "checks='node': the other nodes don't know of it"
        yield from super()._mismatch(call, seq, lost, said)

    def _ranks(self) -> Sequence[int]:
        return self._near if self._asked is self._near_comm else super()._ranks()

    def check_left(self, seq: int) -> None:
        super().check_left(seq)
        Arrival.check_left(self, seq)

    def _check_left_before(self, seq: int) -> None:
        Arrival._check_left_before(self, seq)


def _lost(seq: int, rank: int, what: str) -> CollectiveMismatchError:
    """Say that a rank counts its calls otherwise.

    Only one side sees it.  The other hears that a peer has left: they meet in no call any more.
    """
    text = f"call #{seq} differs between the ranks: rank {rank} {what}. {_ORDER}{_BROKEN}"
    return CollectiveMismatchError(text, breaks_group=True)


def _explain(seq: int, callers: Sequence[int], rows: list[tuple[object, ...]], lost: str) -> str:
    """Say who called what, and name the odd ones out where there is a majority."""
    same: dict[tuple[object, ...], list[int]] = {}
    for rank, row in zip(callers, rows, strict=True):
        same.setdefault(row, []).append(rank)
    sentences = []
    for row, ranks in same.items():
        text = row[-1]
        assert isinstance(text, bytes)
        words = text.rstrip(b"\0").decode(errors="replace")
        if not words.startswith("rank "):  # a pairwise comparison has said who already
            words = f"{listed(ranks)} called {words}"
        sentences.append(words + (f" as its call #{row[SEQ]}" if lost else ""))
    head = f"call #{seq} differs between the ranks"
    largest = max(same.values(), key=len)
    if 2 * len(largest) > len(rows):
        odd = sorted(set(callers) - set(largest))
        head += f" ({listed(odd)} against the rest)" if odd else ""
    tail = f"{lost}{_BROKEN}" if lost else "No data was moved; the group is still usable"
    kinds, counts = {row[KIND] for row in rows}, {row[COUNT] for row in rows}
    if not lost and len(kinds) == 1 and len(counts) > 1:
        (code,) = kinds
        assert isinstance(code, int)
        tail += KINDS[code].uneven
    return f"{head}: {'; '.join(sentences)}. {tail}"


def listed(ranks: Sequence[int]) -> str:
    """Name ranks in a message; of many only the first."""
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    shown = ", ".join(map(str, ranks[:8])) + (", ..." if len(ranks) > 8 else "")
    return f"ranks {shown}"
