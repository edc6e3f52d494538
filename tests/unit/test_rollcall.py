"""The roll call without MPI: ranks with clocks, delays and pauses of their own."""

from __future__ import annotations

import heapq
import random

import pytest

from mpicoll.engine.rollcall import (
    GRACE,
    LOST,
    SHOWN,
    RollCall,
    Said,
    Verdict,
    from_ranges,
    to_ranges,
)

TIMEOUT = 2.0


class Job:
    """Ranks that take turns, and whose messages take time.

    Args:
        missing: ranks that don't come; those in `polls` answer that they are elsewhere.
        node: ranks that share a board; 1: none do.
        pause: the longest that a rank doesn't look at its messages, in seconds.
        stagger: seconds within which they enter the call.
    """

    def __init__(self, size, missing, *, polls=(), node=1, pause=0.005, stagger=0.01, seed=0):
        self.dice = random.Random(seed)
        self.size, self.missing, self.polls, self.node = size, set(missing), set(polls), node
        self.pause, self.now, self.events, self.count = pause, 0.0, [], 0
        self.inbox = [[] for _ in range(size)]
        self.rolls, self.verdicts, self.ended = {}, {}, {}
        self.sent = [0] * size
        self.entered = {
            r: self.dice.random() * stagger for r in range(size) if r not in self.missing
        }
        for rank in range(size):
            if rank not in self.missing or rank in self.polls:
                self.at(self.entered.get(rank, 0.0), rank)

    def at(self, when, rank):
        self.count += 1
        heapq.heappush(self.events, (when, self.count, rank))

    def has_arrived(self, rank):
        return self.entered.get(rank, self.now + 1) <= self.now

    def near(self, rank):
        first = rank - rank % self.node
        return [r for r in range(first, min(first + self.node, self.size)) if r != rank]

    def roll(self, rank):
        if rank not in self.rolls:
            self.rolls[rank] = RollCall(
                1, rank, self.size, self.now, near=self.near(rank), sees=self.has_arrived
            )
        return self.rolls[rank]

    def send(self, source, to, what):
        self.sent[source] += 1
        self.inbox[to].append((self.now + self.dice.random() * 1e-3, source, what))

    def answer(self, rank, source):
        there = self.has_arrived(rank)
        arrived = [r for r in self.near(rank) if there and self.has_arrived(r)]
        self.send(rank, source, ("state", there, arrived, Said(f"rank {rank} is elsewhere")))

    def take(self, rank):
        came = [entry for entry in self.inbox[rank] if entry[0] <= self.now]
        self.inbox[rank] = [entry for entry in self.inbox[rank] if entry[0] > self.now]
        for _, source, what in came:
            if what[0] == "question":
                self.answer(rank, source)
            elif what[0] == "roll":
                if self.has_arrived(rank):
                    self.roll(rank).is_called(source, what[1], what[2], self.now)
                self.answer(rank, source)
            elif what[0] == "state" and rank in self.rolls:
                self.rolls[rank].hear(source, *what[1:], self.now)
            elif what[0] == "verdict" and rank in self.rolls:
                self.rolls[rank].adopt(Verdict.decode(what[1]))

    def turn(self, rank):
        self.take(rank)
        if self.has_arrived(rank) and rank in self.entered:
            deadline = self.entered[rank] + TIMEOUT
            if self.now >= deadline - TIMEOUT / 10:
                roll = self.roll(rank)
                roll.deadline = min(roll.deadline, deadline)
                if self.now >= deadline + LOST:
                    roll.give_up_waiting(self.now)
                if self.now >= deadline and roll.verdict and rank not in self.ended:
                    self.verdicts[rank], self.ended[rank] = roll.verdict, self.now - deadline
        roll = self.rolls.get(rank)
        if roll is None:
            return
        calls, questions = roll.turn(self.now)
        for to in calls:
            self.send(rank, to, ("roll", sorted(roll.arrived), roll.deadline - self.now))
        for to in questions:
            self.send(rank, to, ("question",))
        if roll.verdict:
            for to in roll.followers:
                self.send(rank, to, ("verdict", roll.verdict.encode()))
            roll.followers.clear()

    def run(self):
        """Until all that came have a verdict; return it, and how late the last one had it."""
        there = set(self.entered) - self.missing
        while there - self.ended.keys():
            self.now, _, rank = heapq.heappop(self.events)
            assert self.now < TIMEOUT + 2 * LOST + GRACE, "no verdict"
            self.turn(rank)
            self.at(self.now + self.dice.uniform(0.2, 1) * self.pause, rank)
        found = {verdict.missing for verdict in self.verdicts.values()}
        assert len(found) == 1, found
        return next(iter(self.verdicts.values())), max(self.ended.values())


@pytest.mark.parametrize("pause", [0.005, 0.3])
@pytest.mark.parametrize("node", [1, 4])
@pytest.mark.parametrize(
    "size, missing",
    [
        (1, []),
        (2, [0]),
        (2, [1]),
        (3, [2]),
        (8, []),
        (8, [0, 1, 2, 3, 4, 5, 6]),
        (64, [5]),
        (64, [0]),
        (64, range(1, 63)),
        (64, [r for r in range(64) if r not in (0, 3)]),
        (64, range(32)),
    ],
)
def test_all_name_those_that_did_not_come(size, missing, node, pause):
    for seed in range(5):
        job = Job(size, missing, node=node, pause=pause, stagger=2 * pause, seed=seed)
        verdict, late = job.run()
        assert verdict.missing == tuple(missing)
        assert late <= (0.1 if pause < 0.01 else LOST + GRACE)


@pytest.mark.parametrize("node", [1, 4])
def test_who_waits_elsewhere_is_missing_and_says_where(node):
    verdict, late = Job(16, [0, 9], polls=[0, 9], node=node).run()
    assert verdict.missing == (0, 9) and late < 0.05
    assert verdict.said[9].text == "rank 9 is elsewhere"


@pytest.mark.parametrize("before", [0.01, 0.001, -0.001])
def test_who_comes_at_the_last_moment_is_missing_for_all_or_for_none(before):
    for seed in range(20):
        job = Job(8, [3], polls=[3], node=4, seed=seed)
        job.entered[3] = TIMEOUT - before
        job.missing = set()
        job.ended[3] = 0.0  # its own deadline is far
        verdict, _ = job.run()
        assert verdict.missing in ((), (3,))


def test_a_rank_sends_few_messages_unless_it_decides():
    job = Job(64, [5], node=4)
    job.run()
    assert max(job.sent[1:]) <= 12 and job.sent[0] < 3 * 64


def test_who_should_decide_and_falls_silent_does_not_hold_up_the_others_for_long():
    job = Job(8, [6])
    job.roll(0).turn = lambda now: ([], [])
    job.ended[0] = 0.0  # it is not waited for
    verdict, late = job.run()
    assert verdict.missing == (6,) and late <= LOST + 0.2


def test_ranges():
    for ranks in ([], [0], [0, 1, 2, 5], [3, 4, 9, 10, 11]):
        assert from_ranges(to_ranges(ranks)) == ranks
    assert to_ranges([5, 0, 1, 2]) == "0-2,5"


def test_a_verdict_leaves_out_what_there_is_no_room_for():
    verdict = Verdict(3, 0, (1, 2, 9), {1: Said("is in " + 200 * "x", (("mark", 4),))})
    assert Verdict.decode(verdict.encode()) == verdict
    assert Verdict.decode(verdict.encode(100)) == Verdict(3, 0, (1, 2, 9), None)
    assert verdict.encode(5) == ""
    assert SHOWN == 8
