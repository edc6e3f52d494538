"""What calls there are: one row for each kind, with all that the library asks about a kind.

Nothing else tests the name of a kind.  A kind is its row: there is one of each, and a new
collective begins with a new row here.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class Kind:
    """One kind of call.

    Attributes:
        name: that of the user's method, of the transports' steps, and in recordings.
        code: its number in the records of arrival.  It never changes.
        queued: it takes a number, and its turn in the queue of its group; messages don't.
        receives: it takes a message, and can be cancelled as long as none has begun to come.
        ends: it is a group's last: once the ranks have met in it, one may be gone, and all is well.
        recovers: it goes on in spite of the peers' failures, of which it makes the best.
        alike: the records of all ranks say the same, or the program is wrong.  No other rank's
            record is needed to carry it out, so it may go without arrival under checks="first".
        pairwise: each rank may have a count of its own.  Where the counts are not all equal, what
            one rank sends is compared with what the other expects, pair by pair.
        inline: its data may travel beside the records of its arrival.
        reduces: what the ranks give is combined by an operator.
        prefix: a rank gets what this many of the ranks from its own up have given, and all below
            it: 1 with its own, 0 without.  None: no rank is left out for its place.
        to_root: one rank, the root, gets what all give.
        from_root: all ranks get what one of them, the root, gives.
        parted: what a rank gives has a block for each rank; else all that get it get the whole.
        pickles: it moves objects, as their pickles.
        counted: what its count is called where that is no number of elements.
        shown: its payload is said where the call is described.
        uneven: what helps where the counts of the ranks differ and must not, as a sentence.
    """

    name: str
    code: int
    queued: bool = True
    receives: bool = False
    ends: bool = False
    recovers: bool = False
    alike: bool = False
    pairwise: bool = False
    inline: bool = False
    reduces: bool = False
    prefix: int | None = None
    to_root: bool = False
    from_root: bool = False
    parted: bool = False
    pickles: bool = False
    counted: str = ""
    shown: bool = False
    uneven: str = ""

    def __str__(self) -> str:
        return self.name


ALLREDUCE = Kind("allreduce", 0, alike=True, inline=True, reduces=True)
BROADCAST = Kind("broadcast", 1, alike=True, inline=True, from_root=True)
REDUCE = Kind("reduce", 2, alike=True, inline=True, reduces=True, to_root=True)
BARRIER = Kind("barrier", 3, inline=True)
ALLGATHER = Kind("allgather", 4, alike=True, inline=True)
ALL_GATHER_SINGLE = Kind(
    "all_gather_single",
    5,
    alike=True,
    inline=True,
    uneven=". Arrays of several sizes are gathered by allgather, into a list",
)
GATHER = Kind("gather", 6, pairwise=True, inline=True, to_root=True)
SCATTER = Kind("scatter", 7, pairwise=True, inline=True, from_root=True, parted=True)
REDUCE_SCATTER = Kind("reduce_scatter", 8, alike=True, inline=True, reduces=True, parted=True)
REDUCE_SCATTER_SINGLE = Kind(
    "reduce_scatter_single",
    9,
    alike=True,
    inline=True,
    reduces=True,
    parted=True,
    uneven=". Parts of several sizes are taken by reduce_scatter, from a list",
)
ALLTOALL = Kind("alltoall", 10, pairwise=True, inline=True, parted=True)
ALL_TO_ALL_SINGLE = Kind("all_to_all_single", 11, pairwise=True, inline=True, parted=True)
ALLREDUCE_COALESCED = Kind("allreduce_coalesced", 12, alike=True, reduces=True)
ALLGATHER_COALESCED = Kind("allgather_coalesced", 13, alike=True)
ALL_GATHER_SINGLE_COALESCED = Kind("all_gather_single_coalesced", 14, alike=True)
REDUCE_SCATTER_SINGLE_COALESCED = Kind(
    "reduce_scatter_single_coalesced", 15, alike=True, reduces=True, parted=True
)
SCAN = Kind("scan", 16, alike=True, inline=True, reduces=True, prefix=1)
EXSCAN = Kind("exscan", 17, alike=True, inline=True, reduces=True, prefix=0)
MONITORED_BARRIER = Kind("monitored_barrier", 18, inline=True)
BROADCAST_OBJECT = Kind("broadcast_object", 19, inline=True, from_root=True, pickles=True)
ALLGATHER_OBJECT = Kind("allgather_object", 20, inline=True, pickles=True)
GATHER_OBJECT = Kind("gather_object", 21, inline=True, to_root=True, pickles=True)
SCATTER_OBJECT = Kind("scatter_object", 22, inline=True, from_root=True, parted=True, pickles=True)
SPLIT_GROUP = Kind("split_group", 23)
SPLIT = Kind("split", 24)
LOCAL_GROUP = Kind("local_group", 25)
CROSS_NODE_GROUP = Kind("cross_node_group", 26)
MERGE_REMOTE_GROUP = Kind("merge_remote_group", 27, counted="size")
NEW_GROUP = Kind("new_group", 28, shown=True)
SHUTDOWN = Kind("shutdown", 29, ends=True)
SEND = Kind("send", 30, queued=False)
RECV = Kind("recv", 31, queued=False, receives=True)
EMPTY = Kind("empty", 32)
SHRINK_GROUP = Kind("shrink_group", 33, recovers=True)
SPAWN = Kind("spawn", 34, counted="n")
PARENT_GROUP = Kind("parent_group", 35)
SUBGROUP = Kind("subgroup", 36, queued=False)

KINDS = tuple(
    sorted((row for row in list(globals().values()) if isinstance(row, Kind)), key=lambda k: k.code)
)
"""All of them, each at the place that its code says."""

_BY_NAME = {row.name: row for row in KINDS}


def named(name: str) -> Kind:
    """Return the kind of a name.  One of a version to come, in a recording, is like a barrier."""
    return _BY_NAME.get(name) or Kind(name, -1)
