"""`python -m mpicoll trace` on made-up recordings: whose clocks, calls and places are known."""

from __future__ import annotations

import gc
import itertools
import json
import os
import stat
import sys
import weakref

import numpy as np
import pytest

from mpicoll import ReduceOp, cli
from mpicoll.cli import clocks, perfetto, recordings, whereabouts
from mpicoll.cli.recordings import GroupKey, Unreadable, in_ranges
from mpicoll.cli.stragglers import stragglers
from mpicoll.engine import checks, kinds, recorder
from mpicoll.engine.call import Call

BEGIN = 1.7e9  # seconds of the epoch


def call(seq, called, ended=None, kind="allreduce", error=None, file="train.py", line=7, **more):
    """A call with times in seconds from the beginning; in `write` they get the rank's clock."""
    state = "called" if ended is None else "failed" if error else "finished"
    shape = {"dtype": "float32", "count": 3, "shape": [3], "op": "SUM"}
    rest = {"root": -1, "peer": -1, "tag": 0, "file": file, "line": line, "error": error}
    entry = {"seq": seq, "kind": kind, "state": state, "called": called, "ended": ended}
    return {**entry, **shape, **rest, **more}


def group(calls, ranks=(0, 1, 2), name="world", ordinal=0, checks="full"):
    return {
        "group": name,
        "ordinal": ordinal,
        "ranks": list(ranks),
        "checks": checks,
        "calls": calls,
    }


def write(folder, rank, *groups, clock=0.0, started=0.0, written=50.0, **more):
    """Write a rank's file as a process whose clock is ahead by `clock` would."""

    def shifted(entry):
        ended = None if entry["ended"] is None else BEGIN + entry["ended"] + clock
        return {**entry, "called": BEGIN + entry["called"] + clock, "ended": ended}

    told = {
        "version": 1,
        "world_rank": rank,
        "host": f"node{rank // 2}",
        "pid": 100 + rank,
        "started": BEGIN + started + clock,
        "written": BEGIN + written + clock,
        "groups": [{**g, "calls": [shifted(entry) for entry in g["calls"]]} for g in groups],
        **more,
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(told))


def aligned(folder):
    found = recordings.read(folder)
    return found, clocks.align(found)


# ---- clocks ----


SKEW = {0: 0.0, 1: 3.75, 2: -0.002}


def three_ranks(folder, skew=SKEW):
    """Ten allreduces, one a second; rank 1 is 0.3 s late to the fifth; ends 1 ms after the last."""
    for rank in range(3):
        late = {5: 0.3} if rank == 1 else {}
        called = {seq: seq + late.get(seq, 0.001 * ((rank + seq) % 3)) for seq in range(1, 11)}
        ended = {seq: seq + late_all + 0.003 for seq in called for late_all in [0.3 * (seq == 5)]}
        entries = [call(seq, called[seq], ended[seq], line=rank) for seq in called]
        write(folder, rank, group(entries), clock=skew[rank])


def test_clocks_are_aligned_within_their_uncertainty(tmp_path):
    three_ranks(tmp_path)
    found, offsets = aligned(tmp_path)
    assert offsets[0] == (0, 0)
    for rank in (1, 2):
        offset = offsets[rank]
        assert 0 < offset.uncertainty < 0.003
        assert abs(offset.seconds - SKEW[rank]) <= offset.uncertainty + 1e-6
    ends = [
        entry.ended for entry in found.groups[GroupKey("world", (0, 1, 2), 0)].calls[5].values()
    ]
    assert max(ends) - min(ends) < 0.006


def test_the_tightest_bounds_count_wherever_they_come_from(tmp_path):
    """One call bounds from above, another from below, in another group."""
    write(tmp_path, 0, group([call(1, 0, 9)]), group([call(1, 20, 20.1)], (0, 1), "pair"))
    late = group([call(1, 8.9, 9)])
    write(tmp_path, 1, late, group([call(1, 10.0, 20.1)], (0, 1), "pair"), clock=2.0)
    _, offsets = aligned(tmp_path)
    # From the first: 8.9 + 2 - 9 to 9 + 2 - 0.  From the second: 12 - 20.1 to 22.1 - 20.
    assert offsets[1].seconds == pytest.approx((1.9 + 2.1) / 2, abs=1e-5)
    assert offsets[1].uncertainty == pytest.approx(0.1, abs=1e-5)


def test_what_did_not_finish_or_need_not_wait_bounds_no_clock(tmp_path):
    for rank in range(2):
        entries = [call(1, 0.0), call(2, 1.0, 1.1, error="E: no")]
        loose = group([call(1, 2.0, 2.1)], checks="node", name="loose", ranks=(0, 1))
        write(tmp_path, rank, group(entries, (0, 1)), loose, clock=5.0 * rank)
    found, offsets = aligned(tmp_path)
    assert offsets == {0: (0, 0), 1: None}
    assert stragglers(found, offsets).compared == 0
    names = [
        e["args"]["name"] for e in perfetto.events(found, offsets) if e["name"] == "process_name"
    ]
    assert names == ["rank 0 (node0)", "rank 1 (node0), clock not aligned"]


def test_clocks_that_drifted_apart_are_as_uncertain(tmp_path):
    write(tmp_path, 0, group([call(1, 0, 0.001), call(2, 9, 9.001)], (0, 1)))
    write(tmp_path, 1, group([call(1, 0.1, 0.101), call(2, 9.3, 9.301)], (0, 1)))
    _, offsets = aligned(tmp_path)
    assert offsets[1].seconds == pytest.approx(0.2, abs=1e-5)
    assert offsets[1].uncertainty == pytest.approx(0.099, abs=1e-5)


# ---- who was waited for ----


def test_the_straggler_is_found_under_any_clocks(tmp_path):
    three_ranks(tmp_path)
    found, offsets = aligned(tmp_path)
    late = stragglers(found, offsets)
    assert late.compared == 10 and late.ranks[0].rank == 1
    worst = late.ranks[0]
    assert worst.worst.seq == 5 and worst.worst.place == "train.py:1"
    assert worst.longest == pytest.approx(0.3, abs=0.006)
    assert worst.total == pytest.approx(0.6, abs=0.02)
    assert worst.last + sum(s.last for s in late.ranks[1:]) + late.close == 10
    assert late.close > 0, "nobody can tell a millisecond with clocks that are uncertain by two"


def test_only_what_all_called_and_was_one_call_has_a_straggler(tmp_path):
    ends = call(2, 5, 6, kind="shutdown", error="E", file="", line=0)
    pair = group([call(1, 0, 3)], (0, 1), "with absent")
    write(
        tmp_path,
        0,
        group([call(1, 0, 3), call(2, 4, 5)], (0, 1)),
        pair,
        group([call(1, 0, 1)], (0,)),
    )
    write(tmp_path, 1, group([call(1, 2.9, 3), ends], (0, 1)), group([call(1, 1, 2)], (1, 2), "x"))
    found, offsets = aligned(tmp_path)
    late = stragglers(found, offsets)
    assert late.compared == 1


# ---- who was where ----


def missing_rank(folder):
    for rank in (0, 1):
        waits = call(
            2, 5.0 + rank, 7.0, error="CollectiveTimeoutError: 2", line=12, kind="broadcast"
        )
        behind = [call(seq, 5.5) for seq in range(3, 9)]
        write(folder, rank, group([call(1, 1, 2), waits, *behind], (0, 1, 2, 3)))
    write(folder, 2, group([call(1, 1, 2, line=4)], (0, 1, 2, 3)))


def test_the_missing_rank_is_named_with_what_it_did_last(tmp_path):
    missing_rank(tmp_path)
    found = recordings.read(tmp_path)
    assert found.absent == [3]
    (account,) = whereabouts.accounts(found)
    assert account.done.seq == 1 and not account.well and not account.failed
    assert [c.seq for c in account.unfinished] == [2, 3, 4] and account.more == 4
    failed, never, absent = account.unfinished[0].rows
    assert (failed.state, failed.ranks, failed.place) == ("failed", [0, 1], "train.py:12")
    assert failed.errors == dict.fromkeys((0, 1), "CollectiveTimeoutError: 2")
    assert (never.state, never.ranks) == (whereabouts.NEVER, [2])
    assert never.last == "#1 allreduce(float32[3], op=SUM) at train.py:4, finished"
    assert (absent.state, absent.ranks) == (whereabouts.ABSENT, [3])


def test_a_mismatch_that_the_group_outlived(tmp_path):
    for rank in range(2):
        odd = call(2, 2, 2.1, error="CollectiveMismatchError: x", op="MAX" if rank else "SUM")
        write(tmp_path, rank, group([call(1, 1, 1.1), odd, call(3, 3, 3.1)], (0, 1)))
    (account,) = whereabouts.accounts(recordings.read(tmp_path))
    assert account.done.seq == 3 and not account.unfinished
    assert [row.call[-7:] for row in account.failed[0].rows] == ["op=SUM)", "op=MAX)"]


def test_what_a_ring_forgot_is_not_held_against_its_rank(tmp_path):
    write(tmp_path, 0, group([call(seq, seq, seq + 0.1) for seq in range(1, 6)], (0, 1)))
    write(tmp_path, 1, group([call(seq, seq, seq + 0.1) for seq in range(4, 6)], (0, 1)))
    found = recordings.read(tmp_path)
    (account,) = whereabouts.accounts(found)
    assert account.well and account.done.seq == 5
    write(tmp_path, 1, group([], (0, 1)))  # it wrote its file early, when another group broke
    (account,) = whereabouts.accounts(recordings.read(tmp_path))
    assert account.well and [row.state for row in account.done.rows] == [
        "finished",
        whereabouts.UNKNOWN,
    ]


def test_a_rank_that_never_made_the_group(tmp_path):
    write(tmp_path, 0, group([call(1, 1, kind="new_group")], (0, 1), "new_group"))
    write(tmp_path, 1)
    (account,) = whereabouts.accounts(recordings.read(tmp_path))
    assert account.done is None
    assert account.unfinished[0].rows[1].last == "nothing in this group"


def test_messages_that_nobody_took(tmp_path):
    sends = call(0, 1, kind="send", peer=1, tag=5, op="")
    takes = call(0, 2, 3, kind="recv", peer=-1, op="", error="E: none")
    write(tmp_path, 0, group([sends, call(0, 1, 2, kind="send", peer=1), takes], (0, 1)))
    write(tmp_path, 1, group([], (0, 1)))
    (account,) = whereabouts.accounts(recordings.read(tmp_path))
    assert [row.call for row in account.messages] == [
        "send(float32[3], dst=1, tag=5)",
        "recv(float32[3], src=ANY_SOURCE, tag=0)",
    ]


def test_groups_of_one_name_stay_apart(tmp_path):
    """Two worlds, one after the other, and two halves of one name."""
    for rank in range(4):
        half = (0, 1) if rank < 2 else (2, 3)
        worlds = [group([call(1, 1, 2)], range(4), ordinal=i) for i in range(2)]
        write(tmp_path, rank, *worlds, group([call(1, 1, 2)], half, "half"))
    told = whereabouts.accounts(recordings.read(tmp_path))
    assert [str(account.key) for account in told] == [
        "'world', ranks 0-3",
        "'world' #2, ranks 0-3",
        "'half', ranks 0-1",
        "'half', ranks 2-3",
    ]
    assert all(account.well and len(account.done.rows[0].ranks) in (2, 4) for account in told)


@pytest.mark.parametrize(
    "ranks, said",
    [
        ([3], "rank 3"),
        ([0, 1, 2, 5], "ranks 0-2, 5"),
        ([4, 3], "ranks 3-4"),
        ([1, 3], "ranks 1, 3"),
    ],
)
def test_ranks_are_said_shortly(ranks, said):
    assert in_ranges(ranks) == said


# ---- the trace ----


def test_the_trace_has_every_call_once_and_nothing_overlaps_on_a_thread(tmp_path):
    entries = [call(1, 1, 4), call(2, 2, 5, error="E: x"), call(3, 4.5, 6), call(0, 7, kind="recv")]
    write(tmp_path, 0, group(entries, (0, 1)), written=9)
    write(tmp_path, 1, group([call(1, 1.5, 4)], (0, 1)), clock=2, written=9)
    assert cli.main(["trace", str(tmp_path)]) == 0
    trace = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    spans = [event for event in trace if event["ph"] == "X"]
    assert len(spans) == 5 and min(event["ts"] for event in spans) == 0
    first, *_ = spans
    assert (first["pid"], first["name"], first["cat"], first["args"]["seq"]) == (
        0,
        "allreduce",
        "finished",
        1,
    )
    assert first["dur"] == pytest.approx(3e6, abs=1) and first["args"]["at"] == "train.py:7"
    threads = {}
    for event in spans:
        threads.setdefault((event["pid"], event["tid"]), []).append((event["ts"], event["dur"]))
    assert sorted(map(len, threads.values())) == [1, 1, 3]
    for times in threads.values():
        assert all(a + d <= b + 0.5 for (a, d), (b, _) in itertools.pairwise(times))
    names = {(e["pid"], e["tid"]) for e in trace if e["name"] == "thread_name"}
    assert names == set(threads)
    (receiving,) = [event for event in spans if event["name"] == "recv"]
    assert receiving["dur"] == pytest.approx(2e6, abs=1), "until the file was written"


# ---- the command ----


def test_tables_and_json_say_the_same(tmp_path, capsys):
    missing_rank(tmp_path)
    assert cli.main(["trace", str(tmp_path), "--perfetto", str(tmp_path / "x.json")]) == 0
    said = capsys.readouterr().out
    assert "No file from rank 3" in said and "never called" in said and "4 more calls" in said
    assert "broadcast(float32[3], op=SUM)  train.py:12" in said
    assert "at train.py:4, finished" in said
    assert json.loads((tmp_path / "x.json").read_text())["traceEvents"]
    assert not (tmp_path / "trace.json").exists()
    assert cli.main(["trace", str(tmp_path), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    (world,) = told["groups"]
    assert told["absent"] == [3] and world["unfinished"][0]["rows"][1]["ranks"] == [2]
    assert world["key"] == {"name": "world", "ranks": [0, 1, 2, 3], "ordinal": 0}
    assert {"processes", "notes", "clocks", "collectives", "stragglers", "trace"} <= set(told)


def one_file(text):
    def prepare(folder):
        (folder / "rank-0.json").write_text(text)
        return folder

    return prepare


@pytest.mark.parametrize(
    "prepare, why",
    [
        (lambda folder: folder / "nowhere", "is not a folder"),
        (lambda folder: folder, "holds no rank-*.json"),
        (one_file('{"version": 1, "wor'), "not whole"),
        (one_file("[]"), "can be read"),
    ],
)
def test_nothing_to_read_is_said_with_status_2(tmp_path, capsys, prepare, why):
    assert cli.main(["trace", str(prepare(tmp_path))]) == 2
    assert why in capsys.readouterr().err


@pytest.mark.parametrize(
    "spoil, why",
    [
        (lambda text: text[:-40], "not whole"),
        (lambda text: "", "not whole"),
        (lambda text: text[:20] + "\0" + text[20:], "not whole"),
        (lambda text: "{}", "lacks 'version'"),
        (lambda text: text.replace('"version": 1', '"version": 2'), "version is 2"),
        (lambda text: text.replace('"called": 1', '"called": true, "late": 1', 1), "late"),
        (lambda text: text.replace('"seq": 1,', '"seq": "1",'), "not a number"),
        (lambda text: text.replace('"world_rank": 1', '"world_rank": 7'), "file of rank 7"),
    ],
)
def test_a_spoilt_file_is_left_out_and_said_so(tmp_path, spoil, why):
    three_ranks(tmp_path)
    path = tmp_path / "rank-1.json"
    path.write_text(spoil(path.read_text()))
    found, offsets = aligned(tmp_path)
    assert sorted(found.processes) == sorted(offsets) == [0, 2] and found.absent == [1]
    (note,) = found.notes
    assert "left out" in note and why in note


def test_files_of_an_earlier_run_are_left_out(tmp_path):
    three_ranks(tmp_path)
    write(tmp_path, 3, group([call(1, -9, -8)], (0, 1, 2, 3)), started=-10, written=-5)
    found = recordings.read(tmp_path)
    assert sorted(found.processes) == [0, 1, 2] and found.absent == []
    assert "rank-3.json" in found.notes[0] and "earlier run" in found.notes[0]


def test_a_trace_that_cannot_be_written_is_said(tmp_path, capsys):
    three_ranks(tmp_path)
    assert cli.main(["trace", str(tmp_path), "--perfetto", str(tmp_path / "no" / "x.json")]) == 2
    out, err = capsys.readouterr()
    assert "could not be written" in err and "Who was where" in out


def test_unreadable_is_raised_for_a_folder_of_spoilt_files(tmp_path):
    (tmp_path / "rank-0.json").write_text("no")
    with pytest.raises(Unreadable, match=r"rank-0\.json"):
        recordings.read(tmp_path)


# ---- the recorder itself ----


def recorded(**options):
    name = os.urandom(8).hex()  # of its own: the process keeps what it has recorded
    return recorder.Recorder(name, 1, [4, 6], frames=0, **options)


def a_call(x=None):
    x = np.ones((2, 3), np.int16) if x is None else x
    return checks.allreduce(0, 1, x, ReduceOp.MAX)


def test_an_entry_says_what_was_called_where_and_how_it_ended():
    ring = recorded()
    good = ring.note(1, a_call(), 5.0); line = sys._getframe().f_lineno  # fmt: skip  # noqa: E702
    bad, waits = ring.note(2, Call(kinds.BARRIER), 6.0), ring.note(3, a_call(), 7.0)
    recorder.end(good, None)
    recorder.end(bad, ValueError("why"))
    first, second, third = ring.entries(epoch=100.0)
    assert (first["kind"], first["dtype"], first["count"], first["shape"]) == (
        "allreduce",
        "int16",
        6,
        [2, 3],
    )
    assert (first["op"], first["root"], first["peer"], first["tag"]) == ("MAX", -1, -1, 0)
    assert (first["file"], first["line"]) == (__file__, line)
    assert first["called"] == 105.0 and first["ended"] > 100 and first["error"] is None
    assert [e["state"] for e in (first, second, third)] == ["finished", "failed", "called"]
    assert second["error"] == "ValueError: why" and second["shape"] == [] and third["ended"] is None
    assert waits is not good
    json.dumps(ring.report())


def test_a_refused_call_is_entered_with_the_reason():
    ring = recorded()
    recorder.end(ring.note(1, Call(kinds.REDUCE, refused="InvalidCallError: root"), 0.0), None)
    (entry,) = ring.entries()
    assert entry["state"] == "failed" and entry["error"] == "InvalidCallError: root"


def test_the_ring_keeps_the_last_thousand_and_no_array():
    ring = recorded()
    x = np.ones(5)
    alive = weakref.ref(x)
    for seq in range(1, 1501):
        recorder.end(ring.note(seq, a_call(x), 0.0), None)
    del x
    gc.collect()
    assert alive() is None, "the recorder keeps an array alive"
    assert [e["seq"] for e in ring.entries()] == list(range(501, 1501))


def test_where_no_frame_is_the_users_the_place_is_empty():
    ring = recorder.Recorder("deep", 0, [0], frames=100_000)
    ring.note(1, a_call(), 0.0)
    assert [(e["file"], e["line"]) for e in ring.entries()] == [("", 0)]


def test_groups_alike_are_counted():
    name = os.urandom(8).hex()
    made = [recorder.Recorder(name, 0, ranks) for ranks in ([0, 1], [0, 1], [1, 0], [0, 1])]
    assert [ring.ordinal for ring in made] == [0, 1, 0, 2]


def test_a_process_writes_one_private_file_whole(tmp_path):
    folder = tmp_path / "new" / "folder"
    ring = recorded()
    recorder.end(ring.note(1, a_call(), 0.0), None)
    recorder.write(str(folder))
    (path,) = folder.iterdir()
    told = json.loads(path.read_text())
    assert path.name == f"rank-{told['world_rank']}.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    mine = next(g for g in told["groups"] if g["group"] == ring.name)
    assert (mine["rank"], mine["world_rank"], mine["ranks"], mine["size"]) == (1, 6, [4, 6], 2)
    recorder.write(str(folder))
    assert list(folder.iterdir()) == [path], "written anew, in place"


def test_closed_groups_are_written_until_many_more_were_closed(tmp_path):
    ring = recorded()
    others = [recorded() for _ in range(recorder.CLOSED)]
    ring.close()
    ring.close()

    def written():
        recorder.write(str(tmp_path))
        (path,) = tmp_path.iterdir()
        return [g["group"] for g in json.loads(path.read_text())["groups"]].count(ring.name)

    assert written() == 1
    for other in others:
        other.close()
    assert written() == 0


def test_a_file_that_cannot_be_written_warns_once_and_raises_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(recorder.recordings(), "complained", False)
    (tmp_path / "file").write_text("in the way")
    recorded()
    for _ in range(2):
        recorder.write(str(tmp_path / "file"))
    assert capsys.readouterr().err.count("can't be written") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


def test_the_folder_is_named_by_the_environment(tmp_path, monkeypatch):
    recorded()
    monkeypatch.delenv("MPICOLL_TRACE_DIR", raising=False)
    recorder.leave_trace()
    monkeypatch.setenv("MPICOLL_TRACE_DIR", str(tmp_path))
    recorder.leave_trace()
    assert len(list(tmp_path.iterdir())) == 1
