"""mpicoll's plugin for pytest, each time in a job of its own, on tests that are written here."""

from __future__ import annotations

import importlib.util
import re
import sys
import textwrap
import xml.etree.ElementTree as ElementTree

import pytest

from tests.harness import ROOT, environment, installed_mpi, mpiexec, run_bounded


def run(folder, n, tests, *options, env=None, limit=60, load=True):
    """Run tests on n ranks; 0: without a launcher."""
    for name, text in tests.items():
        (folder / name).write_text(textwrap.dedent(text))
    launcher = mpiexec(n) if n else []
    argv = [*launcher, sys.executable, "-m", "pytest", "--color=no", "--tb=short"]
    argv += [f"--rootdir={folder}", f"{folder}"]  # whatever the repository lies beside
    if n and load:
        options = ("-p", "mpicoll.testing.plugin", *options)
    ended = run_bounded([*argv, *options], limit, environment(env))
    assert not ended.timed_out and not ended.leftovers, ended.output
    return ended


MANY = """
    import time
    import numpy as np, pytest
    import mpicoll as mc

    def test_one_rank_fails(group):
        print("this is rank", group.rank())
        assert group.rank() != 1, "rank one is special"
        group.barrier().wait()

    def test_all_fail(group):
        assert group.size() == 77

    def test_in_new_group():
        if mc.new_group().rank() == 1:
            raise ValueError("not me")
        mc.new_group()

    @pytest.mark.limit(1)
    def test_hangs(group):
        if group.rank() == 2:
            while True:
                time.sleep(0.01)
        group.barrier().wait()

    def test_is_skipped_by_one(group):
        if group.rank() == 1:
            pytest.skip("not here")
        group.barrier().wait()

    @pytest.mark.parametrize("word", ["a", "b"])
    @pytest.mark.ranks(1, 2, 3, 7)
    def test_counts(group, word):
        assert group.allgather_object(group.rank()) == list(range(group.size()))

    @pytest.mark.ranks(2)
    def test_new_group_is_of_those_that_take_part():
        with mc.new_group() as pg:
            assert pg.size() == 2

    def test_is_skipped_by_all(group):
        pytest.skip("none of us")

    @pytest.mark.xfail(reason="known", raises=AssertionError)
    def test_is_known_to_fail(group):
        assert group.rank() != 1
        group.barrier().wait()

    @pytest.fixture
    def breaks(group):
        yield
        if group.rank() == 1:
            raise OSError("the disk is full")

    def test_tear_down_fails(breaks, group):
        group.barrier().wait()

    def test_lets_a_call_time_out(group):
        if group.rank() > 0:
            with pytest.raises(mc.CollectiveTimeoutError):
                group.barrier(timeout=0.2).wait()
        else:
            time.sleep(0.5)

    def test_at_last(group):
        group.barrier().wait()
"""


def test_failures_are_told_once_with_their_ranks_and_the_cause_first(tmp_path):
    ended = run(
        *(tmp_path, 3, {"test_many.py": MANY}, "-v", f"--junitxml={tmp_path / 'out.xml'}"),
        *("-p", "no:cacheprovider", "-rs"),
        env={"MPICOLL_GRACE": "0.3"},
    )
    out = ended.output
    assert ended.code == 1
    assert "5 failed, 10 passed, 3 skipped, 1 xfailed, 1 error in" in out, out
    assert out.count("test session starts") == 1

    def report(test):
        found = re.search(rf"_ {test} _+\n(.*?)\n(_{{10}}|=====)", out, re.DOTALL)
        assert found, out
        return found[1]

    one = report("test_one_rank_fails")
    cause, _, rest = one.partition("---- and so ----\n")
    assert cause.startswith("---- rank 1 of 3 ----\n") and "this is rank 1" in cause
    assert "AssertionError: rank one is special" in cause and "this is rank 0" not in one
    told = "RemoteRankError: rank 1 failed test_one_rank_fails: test_many.py:8: AssertionError"
    assert re.fullmatch(rf"ranks 0, 2: test_many.py:9: {told}: .*special", rest), rest
    assert report("test_all_fail").startswith("---- ranks 0, 1, 2 of 3 ----\n")
    assert "ranks 0, 2: test_many.py:17: RemoteRankError: rank 1" in report("test_in_new_group")
    hang = report("test_hangs")
    assert hang.startswith("---- rank 2 of 3 ----\n") and "mpicoll/engine" not in hang
    assert "time.sleep(0.01)\nE   Failed: took longer than its limit of 1 s" in hang
    assert "ranks [2] have not arrived" in hang or "RemoteRankError: rank 2 failed" in hang
    skipped = report("test_is_skipped_by_one")
    assert "rank 1 skipped what ranks 0, 2 did not" in skipped and "not here" in skipped
    assert "OSError: the disk is full" in report("ERROR at teardown of test_tear_down_fails")
    assert "it is for 7 ranks, and the world has 3: mpiexec -n 7" in out

    (suite,) = ElementTree.parse(tmp_path / "out.xml").getroot()
    assert {key: suite.get(key) for key in ("failures", "errors", "skipped")} == {
        "failures": "5",
        "errors": "1",
        "skipped": "4",
    }


def test_the_page_shows_what_is_reported(tmp_path):
    page = (ROOT / "docs" / "testing.md").read_text()
    tests = dict(re.findall(r"```python\n# (test_\w+\.py)\n(.*?)```", page, re.DOTALL))
    shown = re.findall(r"```text\n(.*?)```", page, re.DOTALL)[0]
    assert sorted(tests) == ["test_backend.py", "test_broken.py", "test_halo.py", "test_mean.py"]
    files = {name: f"# {name}\n{text}" for name, text in tests.items()}
    chosen = "-k", "not Mine or float32-3", "-p", "no:cacheprovider"
    ended = run(tmp_path, 3, files, *chosen, env={"MPICOLL_GRACE": "0.3"})
    assert re.search(r"2 failed, 14 passed, 1 skipped", ended.output), ended.output

    def plain(text):
        text = re.sub(r"\d+\.\d+ s\b|, compiled|\S*(?=test_broken.py)", "", text)
        return [line for line in text.splitlines() if line.strip(" =^")]

    surely = shown.partition("---- ranks 0, 1 of 3")[0]  # what follows may say more or less
    for line in plain(surely):
        assert line in plain(ended.output), f"{line}\n\n{ended.output}"


TWO_FAIL = """
    def test_good(group): pass
    def test_bad(group): assert group.rank() != 1
    def test_worse(group): assert group.rank() != 0
"""


def test_last_failed_and_exitfirst_go_by_the_verdicts_of_all(tmp_path):
    first = run(tmp_path, 2, {"test_few.py": TWO_FAIL}, "-q")
    assert first.code == 1 and "2 failed, 1 passed" in first.output
    again = run(tmp_path, 2, {}, "--lf", "-x")
    assert again.code == 1
    assert "rerun previous 2 failures" in again.output and "collected 2 items" in again.output
    assert "stopping after 1 failures" in again.output and "test_worse" not in again.output


def test_a_rank_that_cannot_be_stopped_ends_the_job_after_the_report(tmp_path):
    text = """
        import pytest
        def test_bad(group):
            assert group.rank() == 1
        @pytest.mark.limit(0.5)
        def test_stuck(group):
            if group.rank() == 1:
                sum(range(10**13))  # which nothing can interrupt
            group.barrier().wait()
        def test_never(group): pass
    """
    ended = run(tmp_path, 2, {"test_stuck.py": text}, "-p", "no:cacheprovider")
    assert ended.code != 0 and ended.seconds < 30
    assert "rank 1 can't be stopped" in ended.output and "2 failed in" in ended.output
    assert re.search(r"test_stuck\.py\", line 8 in test_stuck", ended.output), ended.output
    assert "_pytest/" not in ended.output


def test_a_rank_that_ends_itself_says_where_and_earlier_reports_are_kept(tmp_path):
    text = """
        import os
        def test_fine(group): pass
        def test_bad(group):
            assert group.rank() != 1, "special"
        def test_dies(group):
            if group.rank() == 1:
                os._exit(3)
            group.barrier().wait()
    """
    ended = run(tmp_path, 2, {"test_dies.py": text}, "-p", "no:cacheprovider")
    assert ended.code != 0
    where = rf"rank 1 ends in .*test_dies.py::test_dies, by os._exit\(3\) at {tmp_path}"
    assert re.search(where, ended.output), ended.output
    if installed_mpi() == "openmpi":
        return  # after an exit code its launcher passes nothing on any more
    assert "---- rank 1 of 2 ----" in ended.output, ended.output
    assert "FAILED test_dies.py::test_bad - AssertionError: special" in ended.output
    assert "1 passed, 1 failed before test_dies.py::test_dies, in which the job" in ended.output


def test_collections_that_differ_are_refused(tmp_path):
    text = """
        import os
        RANK = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
        if os.environ.get("BREAK") and RANK == "1":
            import nothing_of_the_kind
        def test_common(): pass
        if RANK == "1":
            def test_mine(): pass
    """
    ended = run(tmp_path, 2, {"test_differ.py": text}, "-q", "-p", "no:cacheprovider")
    assert ended.code == 4 and ended.output.count("ERROR: the ranks") == 1
    said = r"test 2 is not the same on all ranks: rank 0: no more test; rank 1: \S+::test_mine"
    assert re.search(said, ended.output), ended.output
    ended = run(tmp_path, 2, {}, "-q", "-p", "no:cacheprovider", env={"BREAK": "1"})
    assert ended.code == 2
    assert "No module named 'nothing_of_the_kind'\n---- on rank 1 ----" in ended.output


RANK = """
    import os, time
    RANK = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK")
"""


def test_a_rank_whose_conftest_fails_ends_the_others_with_that_sentence(tmp_path):
    conftest = f"""{RANK}
    if RANK == "2":
        raise RuntimeError("not on this rank")
    """
    files = {"conftest.py": conftest, "test_never.py": "def test_never(): pass"}
    ended = run(tmp_path, 3, files, "-p", "no:cacheprovider")
    assert ended.code != 0 and ended.seconds < 20
    said = "Exit: rank 2 ended before its tests: RuntimeError: not on this rank"
    assert ended.output.count(said) == 1, ended.output


def test_a_rank_that_does_not_come_from_its_collection_is_named_with_its_place(tmp_path):
    late = 0  # the one that reports, if it can
    text = f"""{RANK}
    if RANK == "{late}":
        time.sleep(1000)
    def test_never(): pass
    """
    ended = run(tmp_path, 2, {"test_late.py": text}, "--mpicoll-limit=5", "-p", "no:cacheprovider")
    assert ended.code != 0 and ended.seconds < 30
    assert "not all ranks have collected their tests, 10 s after others" in ended.output
    said = rf"rank {late} has not come. It is at .*\n.*test_late\.py\", line 6 in <module>"
    assert re.search(said, ended.output), ended.output


def test_a_rank_that_has_returned_early_is_said_to_have_finished(tmp_path):
    text = """
        def test_early(group):
            if group.rank() == 2:
                return
            group.barrier().wait()
    """
    ended = run(tmp_path, 3, {"test_early.py": text}, "--mpicoll-limit=2", "-p", "no:cacheprovider")
    assert ended.code == 1 and "rank 2 has finished test_early" in ended.output, ended.output
    assert "opposite" not in ended.output and "'pytest'" not in ended.output


def test_a_failure_is_told_once_without_frames_of_pytest(tmp_path):
    text = """
        import numpy as np, pytest
        def test_prints(group):
            print("this is rank", group.rank())
            assert group.size() == 77
        def test_forgets(group):
            if group.rank() == 0:
                group.recv(np.ones(3), 1)
        def test_skips(group):
            if group.rank() == 1:
                pytest.skip("not here")
    """
    ended = run(tmp_path, 2, {"test_fails.py": text}, "-p", "no:cacheprovider")
    said = (
        r"ranks 0, 1 of 2 ----\n.*?E   AssertionError: assert 2 == 77\n.*?\n"
        r"-+ Captured stdout call, rank 0 -+\nthis is rank 0\n"
        r"-+ Captured stdout call, rank 1 -+\nthis is rank 1\n"
    )
    assert re.search(said, ended.output, re.DOTALL), ended.output
    bare = r"rank 0 of 2 ----\nE   mpicoll.CollectiveMismatchError: .* no message came for it"
    assert re.search(bare, ended.output) and "pluggy/" not in ended.output, ended.output
    ended = run(tmp_path, 2, {}, "--tb=line", "-k", "skips", "-p", "no:cacheprovider")
    assert re.search(r"test_fails.py:9: rank 1 skipped what rank 0 did not", ended.output)


def test_an_error_of_use_is_said_by_rank_0(tmp_path):
    ended = run(tmp_path, 3, {}, "--nonsense", "-p", "no:cacheprovider")
    assert ended.code == 4 and ended.output.count("unrecognized arguments") == 1, ended.output


def test_a_debugger_has_rank_0_and_time(tmp_path):
    sleeper = """
        import pdb, time
        class Sleeper(pdb.Pdb):
            def cmdloop(self, intro=None):
                time.sleep(2)
                self.onecmd("continue")
    """
    text = """
        import pytest
        @pytest.mark.limit(1)
        def test_prompt(group):
            if group.rank() == 0:
                breakpoint()
            group.barrier().wait()
        def test_refused(group):
            if group.rank() == 1:
                breakpoint()
    """
    files = {"sleeper.py": sleeper, "test_debug.py": text}
    path = {"PYTHONPATH": f"{ROOT}:{tmp_path}"}
    ended = run(
        *(tmp_path, 2, files, "--pdbcls=sleeper:Sleeper", "-p", "no:cacheprovider"), env=path
    )
    assert "1 failed, 1 passed" in ended.output, ended.output
    assert "breakpoint() on rank 1: only rank 0 has the terminal" in ended.output


def test_it_may_be_loaded_by_a_conftest(tmp_path):
    load = 'pytest_plugins = ["mpicoll.testing.plugin"]'
    text = "def test_two(group): assert group.size() == 2"
    files = {"conftest.py": load, "test_two.py": text}
    ended = run(tmp_path, 2, files, "-q", "-p", "no:cacheprovider", load=False)
    assert ended.code == 0 and ended.output.count("1 passed") == 1, ended.output


@pytest.mark.skipif(not importlib.util.find_spec("pytest_cov"), reason="needs pytest-cov")
def test_coverage_is_that_of_all_ranks(tmp_path):
    code = """
        def run(rank):
            if rank == 0:
                return "only rank 0"
            return "only rank 1"
    """
    text = """
        import coverage_of_this
        def test_parts(group):
            coverage_of_this.run(group.rank())
    """
    files = {"coverage_of_this.py": code, "test_parts.py": text}
    here = {"COVERAGE_FILE": str(tmp_path / ".coverage")}
    ended = run(tmp_path, 2, files, "-p", "no:cacheprovider", "--cov=coverage_of_this", env=here)
    assert ended.code == 0
    assert re.search(r"TOTAL +4 +0 +100%", ended.output), ended.output
    assert [path.name for path in tmp_path.glob(".coverage*")] == [".coverage"]


def test_it_does_nothing_on_one_rank_but_give_the_fixture(tmp_path):
    text = """
        import pytest
        def test_alone(group):
            assert group.size() == 1
        @pytest.mark.ranks(1, 2)
        def test_counts(group, request):
            assert request.config.pluginmanager.get_plugin("mpicoll.testing.plugin.ranks") is None
    """
    load = 'pytest_plugins = ["mpicoll.testing.plugin"]'
    files = {"test_alone.py": text, "conftest.py": load}
    ended = run(tmp_path, 0, files, "-q", "-rs", "-p", "no:cacheprovider")
    assert ended.code == 0 and "2 passed, 1 skipped" in ended.output, ended.output
    assert "it is for 2 ranks, and the world has 1: mpiexec -n 2" in ended.output


BACKEND = """
    import mpicoll as mc
    import pytest
    from mpicoll.testing.contract import GroupContract

    class Mine:
        # the least that a backend's author may write: some methods, by another group's
        def __init__(self, inner):
            self.inner = inner
        def __getattr__(self, name):
            return getattr(self.inner, name)

    class Wrong(Mine):
        def broadcast(self, tensor, root, timeout=None):
            return self.inner.broadcast(tensor, 0, timeout)
        def reduce(self, tensor, root, op, timeout=None):  # it reduces everywhere
            return self.inner.allreduce(tensor, op, timeout)

    def register(name, kind):
        mc.register_backend(
            name, lambda store, rank, size, timeout, device: kind(mc.new_group(timeout=timeout))
        )

    register("right", Mine)
    register("wrong", Wrong)

    class Contract(GroupContract):
        dtypes, counts = ("float32",), (3,)
        lacks = ("scatter",)
        @pytest.fixture
        def group(self):
            made = mc.new_group(self.name, timeout=20)
            yield made
            made.abort() if made.is_broken else made.shutdown()

    class TestRight(Contract):
        name = "right"

    class TestWrong(Contract):
        name = "wrong"
"""


def test_the_contract_finds_what_is_wrong_with_a_backend(tmp_path):
    ended = run(
        *(tmp_path, 2, {"test_backend.py": BACKEND}, "-v", "-p", "no:cacheprovider"),
        env={"MPICOLL_GRACE": "0.3"},
    )
    failed = set(re.findall(r"::(\w+)::(\w+)\S* FAILED", ended.output))
    assert failed == {("TestWrong", "test_broadcast"), ("TestWrong", "test_reduce")}, ended.output
    assert re.search(r"2 failed, \d\d passed, 2 skipped", ended.output), ended.output
