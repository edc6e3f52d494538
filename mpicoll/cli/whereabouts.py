"""Who was where at the end: of each group the last call that all finished, and those after it."""

from __future__ import annotations

from dataclasses import dataclass, field

from .recordings import Entry, Group, GroupKey, Recordings

SHOWN = 3  # calls of a kind that are told of in full

NEVER = "never called"
UNKNOWN = "not in its file"  # others finished the call, so the rank had called it
ABSENT = "no file"


@dataclass
class Row:
    """Ranks of which the same can be said about a call.

    Attributes:
        state: called (and not finished), finished, failed, or one of the constants above.
        call: what they called.
        place: the line of the user's program that called.
        last: where the program never made the call, the last one that it made.
        errors: by rank.
    """

    state: str
    ranks: list[int]
    call: str = ""
    place: str = ""
    last: str = ""
    errors: dict[int, str] = field(default_factory=dict)


@dataclass
class CallAt:
    """One call of a group, as all members have it."""

    seq: int
    rows: list[Row]


@dataclass
class Account:
    """What became of one group.

    Attributes:
        done: the last call that finished on all ranks with a file.
        unfinished: the calls after that, the first `SHOWN`; `more` follow.
        failed: the last calls before that, `SHOWN` at most, which failed somewhere.
        messages: the last sends and receives that did not finish, as far.
    """

    key: GroupKey
    done: CallAt | None
    unfinished: list[CallAt]
    more: int
    failed: list[CallAt]
    messages: list[Row]

    @property
    def well(self) -> bool:
        """Whether all that was called was finished."""
        return not (self.unfinished or self.failed or self.messages)


def accounts(recordings: Recordings) -> list[Account]:
    """Return an account of each group, those with something unfinished or failed first."""
    found = [_account(group, set(recordings.processes)) for group in recordings.groups.values()]
    return sorted(found, key=lambda account: account.well)


def _account(group: Group, present: set[int]) -> Account:
    states = {seq: _states(group, seq, present) for seq in sorted(group.calls)}
    good = {"finished", UNKNOWN, ABSENT}
    done = max((seq for seq, s in states.items() if set(s.values()) <= good), default=0)
    after = [seq for seq in states if seq > done]
    failed = [seq for seq, s in states.items() if seq < done and "failed" in s.values()]
    pending = [entry for entry in group.messages if entry.state != "finished"]

    def told(seq: int) -> CallAt:
        return CallAt(seq, _rows(group, seq, states[seq]))

    return Account(
        group.key,
        told(done) if done else None,
        [told(seq) for seq in after[:SHOWN]],
        max(0, len(after) - SHOWN),
        [told(seq) for seq in failed[-SHOWN:]],
        [_row(entry) for entry in pending[-SHOWN:]],
    )


def _states(group: Group, seq: int, present: set[int]) -> dict[int, str]:
    by_rank = group.calls[seq]
    # One rank finishes only what all have called, if the group compares all that they call.
    finished = group.checks == "full" and any(e.state == "finished" for e in by_rank.values())
    found = {}
    for rank in group.key.ranks:
        if rank in by_rank:
            found[rank] = by_rank[rank].state
        elif rank not in present:
            found[rank] = ABSENT
        elif finished or seq < group.first(rank):
            found[rank] = UNKNOWN
        else:
            found[rank] = NEVER
    return found


def _rows(group: Group, seq: int, states: dict[int, str]) -> list[Row]:
    rows: dict[tuple[str, ...], Row] = {}
    for rank, state in states.items():
        entry = group.calls[seq].get(rank)
        if entry is not None:
            row = _row(entry)
        else:
            row = Row(state, [rank])
        if state == NEVER or (entry is not None and entry.leaves and state != "finished"):
            row.last = _before(group, rank, seq)
        same = rows.setdefault((row.state, row.call, row.place, row.last), row)
        if same is not row:
            same.ranks += row.ranks
            same.errors |= row.errors
    order = ["finished", UNKNOWN, "called", "failed", NEVER, ABSENT]
    return sorted(rows.values(), key=lambda row: order.index(row.state))


def _row(entry: Entry) -> Row:
    errors = {entry.rank: entry.error} if entry.error else {}
    return Row(entry.state, [entry.rank], entry.describe(), entry.place, errors=errors)


def _before(group: Group, rank: int, seq: int) -> str:
    entry = group.before(rank, seq)
    if entry is None:
        return "nothing in this group"
    at = f" at {entry.place}" if entry.place else ""
    return f"#{entry.seq} {entry.describe()}{at}, {entry.state}"
