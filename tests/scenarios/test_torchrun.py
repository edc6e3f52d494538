"""Processes that torchrun, multiprocessing or anybody else started form one MPI world."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.harness import (
    PREAMBLE,
    RESULT,
    ROOT,
    environment,
    installed_mpi,
    launch,
    mpiexec,
    run_bounded,
)
from tests.hosts import Hosts

MPICH = installed_mpi() == "mpich"
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SPREAD = """
import os, subprocess, sys
n = int(sys.argv[1])
ranks = [
    subprocess.Popen(
        [sys.executable, *sys.argv[2:]],
        env=os.environ | {"RANK": str(i), "WORLD_SIZE": str(n), "PET_NODE_RANK": str(i)},
    )
    for i in range(n)
]
sys.exit(int(any([rank.wait() for rank in ranks])))
"""
JOIN = """
size, seconds = int(os.environ["WORLD_SIZE"]), 20
store = mc.FileStore(os.environ["MPICOLL_TEST_RESULT"] + "/store", timeout=20)
"""
FIRST_SUM = """
x = np.full(3, pg.rank() + 1.0)
pg.allreduce(x).wait()
report(rank=pg.rank(), size=pg.size(), sum=x.tolist())
"""
HOSTS = """
store = mc.TCPStore("alpha", 29700, is_master=RANK == 0, timeout=20)
mc.join_world(store, RANK, 2, timeout=20)
pg = mc.new_group(timeout=20)
report(nodes=pg.local_group().size())
"""
DEATH = """
import signal
if pg.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun would end us before we have told
start = time.monotonic()
try:
    pg.allreduce(x).wait()
except RankFailedError as error:
    report(error=str(error), seconds=time.monotonic() - start)
    os._exit(3)
"""


def need_torch() -> None:
    if importlib.util.find_spec("torch") is None:
        pytest.skip("torchrun needs torch, which is not installed")
    if not MPICH:
        pytest.skip("Open MPI can't make a world of torchrun's processes")


@pytest.fixture
def spread():
    """Start so many processes, each with its RANK and nothing else; they end by themselves."""

    def start(n, script, *program, timeout=40.0, fails=False, env=None):
        python = [sys.executable, "-c", SPREAD, str(n), *program]
        ended = launch(0, script, timeout, python=python, ranks=n, env=env)
        assert not ended.timed_out and not ended.leftovers, ended.output
        assert (ended.code != 0) == fails, ended.output
        return ended

    return start


# ---- with torch ----


def test_torchrun(job):
    """One world; its ranks see their node; a child is none of them, and nothing can be spawned."""
    need_torch()
    child = "import mpicoll as mc; print(mc.new_group(timeout=20).size())"
    script = f"""
import subprocess
pg = mc.new_group(timeout=30)
{FIRST_SUM}
report(right=os.environ["RANK"] == str(pg.rank()), local=pg.local_group().size())
ended = subprocess.run(
    [sys.executable, "-c", {child!r}], env=mc.child_environment(), capture_output=True, text=True
)
report(child=ended.stdout + ended.stderr[-300:])
try:
    pg.spawn([sys.executable, "-c", ""], 1)
except UnsupportedError as error:
    report(spawn=str(error))
pg.shutdown()
"""
    ended = job(0, script, 60, python=[*TORCHRUN, "--nproc-per-node=2"], ranks=2)
    assert ended["rank"] == [0, 1] and ended["size"] == [2, 2] and ended["sum"] == [[3.0] * 3] * 2
    assert ended["right"] == [True, True] and ended["local"] == [2, 2]
    assert [said.strip() for said in ended["child"]] == ["1", "1"]
    assert all("start it with mpiexec" in said for said in ended["spawn"])


def test_torchrun_trains_as_mpiexec_does(tmp_path):
    """The example's weights are the same to the last bit, and those of gloo and of one process."""
    need_torch()
    pytest.importorskip("sklearn")
    import torch

    starters = {
        "mpiexec": [*mpiexec(2), sys.executable],
        "torchrun": [*TORCHRUN, "--nproc-per-node=2"],
    }
    weights = []
    for name, starter in starters.items():
        file = tmp_path / f"{name}.pt"
        program = [str(ROOT / "examples" / "ddp.py"), f"--save={file}"]
        ended = run_bounded([*starter, *program], 60, environment())
        assert ended.code == 0 and "correct: True" in ended.output, ended.output
        weights.append(torch.load(file))
    assert all(map(torch.equal, *(each.values() for each in weights)))


def test_torchrun_on_two_nodes_of_which_one_fails(spread):
    """Two torchruns, of which neither ends the processes of the other; the nodes are pretended."""
    need_torch()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    program = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
    program += ["--master-addr=127.0.0.1", f"--master-port={port}"]
    script = "pg = mc.new_group(timeout=30)\n" + FIRST_SUM + DEATH
    env = {"MPICOLL_NODES": "2"}  # so that no pidfd shows the death, but the process manager
    ended = spread(2, script, *program, timeout=60, fails=True, env=env)
    assert ended["rank"] == [0, 1] and ended["sum"] == [[3.0] * 3] * 2
    survivor = ended.ranks[0]
    assert "rank 1 ended without MPI_Finalize" in survivor["error"] and survivor["seconds"] < 2


def test_torch_multiprocessing_with_a_store_of_torch(job):
    need_torch()
    script = """
import torch.distributed as dist
import torch.multiprocessing as mp

def work(rank, port):
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    mc.join_world(dist.PrefixStore("p", store), rank, 2, timeout=30)
    pg = mc.new_group(timeout=20)
    x = np.ones(2)
    pg.allreduce(x).wait()
    assert pg.rank() == rank and x.tolist() == [2.0, 2.0]
    pg.shutdown()

if __name__ == "__main__":
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    mp.spawn(work, (store.port,), nprocs=2)
    report(done=True)
"""
    assert job(0, script, 60)["done"] == [True]


# ---- without ----


def test_join_world(spread):
    script = JOIN + "mc.join_world(store, RANK, size, timeout=20)\n"
    script += "mc.join_world(store, RANK, size)\n"  # a second time it has nothing to do
    script += "pg = mc.new_group(timeout=20)\n" + FIRST_SUM
    script += """
try:
    mc.join_world(store, RANK, size + 1)
except InvalidCallError as error:
    report(again=str(error))
pg.shutdown()
"""
    if not MPICH:
        ended = spread(2, script, fails=True)
        assert ended.output.count("TransportError: this program started 2 ranks, and Open MPI") == 2
        assert "mpiexec -n 2 python -m mpicoll run" in ended.output
        return
    ended = spread(3, script)
    assert ended["rank"] == [0, 1, 2] and ended["sum"] == [[6.0] * 3] * 3
    assert "but MPI has been initialized as rank 2 of 3" in ended["again"][2]


def test_join_world_where_mpiexec_has_made_it(job):
    ended = job(
        2,
        """
mc.join_world(None, RANK, 2)
pg = mc.new_group(timeout=20)
try:
    mc.join_world(None, 1 - RANK, 2)
except InvalidCallError as error:
    report(said=str(error), size=pg.size())
pg.shutdown()
""",
    )
    assert ended["size"] == [2, 2] and "has been initialized as rank 0 of 2" in ended["said"][0]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("None, 0, 2", "store must have set(), as c10d's stores do, but got NoneType"),
        ("None, 2, 2", "rank must be in range [0, 2), but got 2"),
        ("None, 0, 0", "size must be above 0, but got 0"),
        ("None, 0, 2, timeout=0", "timeout must be above 0, but got 0"),
    ],
)
def test_wrong_arguments(job, arguments, said):
    if not MPICH:
        pytest.skip("Open MPI refuses before")
    script = f"""
try:
    mc.join_world({arguments})
except InvalidCallError as error:
    report(said=str(error))
"""
    assert said in job(0, script)["said"][0]


@pytest.mark.parametrize("missing", [0, 1])
def test_a_process_that_never_comes_is_named(spread, missing):
    if not MPICH:
        pytest.skip("Open MPI refuses before")
    script = (
        JOIN
        + f"""
if RANK == {missing}:
    sys.exit()
store.set(f"here{{RANK}}", "")
store.wait([f"here{{rank}}" for rank in range(size) if rank != {missing}])
for timeout in (0.8, 0.4):  # it may be tried again
    try:
        mc.join_world(store, RANK, size, timeout=timeout)
    except CollectiveTimeoutError as error:
        report(missing=error.missing, elapsed=error.elapsed, breaks=error.breaks_group)
"""
    )
    ended = spread(3, script)
    for rank in {0, 1, 2} - {missing}:
        told = ended.ranks[rank]
        assert told["missing"] == [missing] and not told["breaks"] and told["elapsed"] < 2.5


def test_on_two_hosts_a_death_is_heard_of(tmp_path):
    """They share nothing but the network; no launcher is there that could end the other one."""
    if not MPICH:
        pytest.skip("Open MPI refuses before")
    if os.geteuid() != 0:
        pytest.skip("making network namespaces takes root")
    script = tmp_path / "script.py"
    script.write_text(PREAMBLE + HOSTS + FIRST_SUM + DEATH)
    env = {RESULT: str(tmp_path), "MPICOLL_STORE_SECRET": "of a test", "WORLD_SIZE": "2"}
    try:
        with Hosts(tmp_path) as hosts, ThreadPoolExecutor(2) as pool:

            def run(rank):
                command = hosts.inside(hosts.names[rank], sys.executable, str(script))
                return run_bounded(command, 40, environment(env | {"RANK": str(rank)}))

            survivor, dead = pool.map(run, range(2))
    except OSError as error:
        pytest.skip(f"two hosts can't be made: {error}")
    assert not survivor.timed_out and not dead.timed_out, survivor.output + dead.output
    assert not survivor.leftovers and not dead.leftovers
    told = json.loads((tmp_path / "0.json").read_text())
    assert told["sum"] == [3.0] * 3 and told["nodes"] == 1, "each is alone on its node"
    assert "rank 1 ended without MPI_Finalize" in told["error"] and told["seconds"] < 2


DIES = "if RANK == 1:\n    time.sleep(0.5)\n    os.kill(os.getpid(), 9)\n"
IN_INIT = f"""
from mpicoll.runtime import world
world.join(store, RANK, size, 20.0, "a test")
{DIES}
mc.join_world(store, RANK, size)
"""
ABORTS = """
mc.join_world(store, RANK, size)
from mpi4py import MPI
if RANK == 1:
    time.sleep(0.5)
    MPI.COMM_WORLD.Abort(7)
    time.sleep(20)
MPI.Finalize()  # in C, with the GIL
"""


@pytest.mark.parametrize("how", [IN_INIT, ABORTS], ids=["dies in MPI_Init", "aborts"])
def test_nobody_stays_in_mpi(spread, how):
    if not MPICH:
        pytest.skip("Open MPI refuses before")
    ended = spread(2, JOIN + how, fails=True)
    assert ended.seconds < 8, ended.output


# ---- a program of torchrun's under MPI's launcher ----

PLACE = """
names = "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR"
report(place=[os.environ[name] for name in names], port=os.environ["MASTER_PORT"])
pg = mc.new_group(timeout=20)
report(right=os.environ["RANK"] == str(pg.rank()))
pg.shutdown()
"""
RUN = [sys.executable, "-m", "mpicoll", "run"]


def test_run_tells_a_program_its_place(job):
    ended = job(3, PLACE, python=RUN)
    assert ended["place"] == [[str(rank), "3", str(rank), "3", "127.0.0.1"] for rank in range(3)]
    assert len(set(ended["port"])) == 1 and 0 < int(ended["port"][0]) < 65536
    assert ended["right"] == [True] * 3


@pytest.mark.parametrize(
    "end, code",
    [("raise ValueError('no')", 1), ("raise SystemExit(5)", 5)],
    ids=["raises", "exits"],
)
def test_run_ends_the_job_where_a_program_fails_before_its_first_group(tmp_path, end, code):
    """Its peers may be waiting for it in a call of torch's, or of bare MPI."""
    script = tmp_path / "program.py"
    script.write_text(
        f"import os, time\nif os.environ['RANK'] == '1':\n    {end}\ntime.sleep(30)\n"
    )
    ended = run_bounded([*mpiexec(2), *RUN, str(script)], 20, environment())
    assert not ended.timed_out and not ended.leftovers and ended.code != 0
    assert "ended early, before its first group" in ended.output, ended.output
    assert ("ValueError: no" in ended.output) == (code == 1)


def test_run_without_a_launcher_sets_nothing(tmp_path):
    script = tmp_path / "program.py"
    script.write_text("import os\nprint([n for n in os.environ if n in ('RANK', 'MASTER_ADDR')])\n")
    ended = run_bounded([*RUN, str(script)], 20, environment())
    assert ended.code == 0 and ended.output.strip() == "[]", ended.output
