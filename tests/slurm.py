"""A SLURM of two nodes on one machine: munge, slurmctld, and a slurmd per node.

Each slurmd has a host name and a /dev/shm of its own, and so has all that it starts.  It is there
from `with` to its end, with everything it writes in one folder, which goes then.  It takes root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.harness import (
    ROOT,
    SHARED,
    Ended,
    environment,
    installed_mpi,
    marked,
    run_bounded,
)

NODES = ("n1", "n2")
GPUS = ("/dev/null", "/dev/zero")  # on each node: SLURM wants devices, and hands out their numbers
PMI = {"mpich": "pmi2", "openmpi": "pmix"}
PMIX_PLUGIN = "/usr/lib/*/slurm*/mpi_pmix.so"
PMIX = "/usr/lib/*/pmix2/lib/libpmix.so"  # what Debian's plugin opens, and no package has
_START, _END = 20.0, 10.0  # seconds
_TOOLS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "salloc", "scancel", "scontrol")
_BROKEN_START = (
    "PRTE has lost communication"  # Open MPI's launcher, once in some hundreds of starts
)
_CONF = """
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
SlurmctldPidFile={folder}/slurmctld.pid
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmdPidFile={folder}/slurmd-%n.pid
TmpFS={folder}/tmp/%n
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
GresTypes=gpu
KillWait=2
SchedulerParameters=batch_sched_delay=0,sched_interval=1,sched_min_interval=0
NodeName=n1 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[1]} CPUs=64 Gres=gpu:2
NodeName=n2 NodeHostname=localhost NodeAddr=127.0.0.1 Port={ports[2]} CPUs=64 Gres=gpu:2
PartitionName=all Nodes=n1,n2 Default=YES MaxTime=10 State=UP
"""
# Without a host name of its own the ranks of both nodes are on one, and the launchers lost.
_APART = ("unshare", "--uts", "--mount", "sh", "-ec")
_PLACE = "hostname {name}; mount -t tmpfs tmpfs /dev/shm\n"
_NODE = """
mount --bind {folder}/hosts /etc/hosts
exec slurmd -D -N {name} -f {folder}/slurm.conf
"""


@dataclass
class Batch:
    """How a batch job ended."""

    state: str
    code: int
    restarts: int
    output: str


class Slurm:
    """The nodes, from `with` to its end.

    Raises:
        OSError: they can't be had here; says why.
        RuntimeError: they should have been there, but did not start.
    """

    def __init__(self) -> None:
        self.folder = Path()
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Slurm:
        if os.geteuid() != 0:
            raise OSError("two nodes on one machine take root")
        for tool in (*_TOOLS, "unshare", "hostname", "mount"):
            if shutil.which(tool) is None:
                raise OSError(f"there is no {tool} here")
        tried = subprocess.run([*_APART, _PLACE.format(name="n1")], capture_output=True, text=True)
        if tried.returncode:
            raise OSError(f"no namespaces here: {tried.stderr.strip()}")
        # Not below pytest's folders: munged wants the way to its socket open to all, and short.
        self.folder = Path(tempfile.mkdtemp(prefix="mpicoll-slurm-"))
        each = [f"{name}/{node}" for name in ("spool", "tmp") for node in NODES]
        for name in ("munge", "state", "log", "out", *each):
            (self.folder / name).mkdir(parents=True)
        for path in (self.folder, self.folder / "munge"):
            path.chmod(0o755)  # munged insists on it
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        names = f"127.0.0.1 localhost {' '.join(NODES)} {socket.gethostname()}\n"
        (self.folder / "hosts").write_text(names)
        with _free_ports(3) as ports:
            said = _CONF.format(folder=self.folder, ports=ports)
        (self.folder / "slurm.conf").write_text(said)
        gpus = [f"Name=gpu File={device} Flags=nvidia_gpu_env\n" for device in GPUS]
        (self.folder / "gres.conf").write_text("".join(gpus))
        try:
            self._start()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _start(self) -> None:
        munge = [f"--{what}-file={self.folder}/munge/{what}" for what in ("key", "pid", "seed")]
        self._keep("munged", "--foreground", f"--socket={self.folder}/munge/socket", *munge)
        self._until(lambda: (self.folder / "munge" / "socket").exists())
        self._keep("slurmctld", "-D", "-c", "-f", f"{self.folder}/slurm.conf")
        for name in NODES:
            script = (_PLACE + _NODE).format(name=name, folder=self.folder)
            self._keep(name, *_APART, script)
        self._until(lambda: self._said("sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2")

    def _keep(self, name: str, *command: str) -> None:
        argv = command if name in NODES else (name, *command)
        with open(self.folder / "log" / name, "wb") as log:
            self._daemons[name] = subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                start_new_session=True,  # Ctrl-C is for the tests, which end them
            )

    def _until(self, ready: Callable[[], bool]) -> None:
        end = time.monotonic() + _START
        while not ready():
            ended = [name for name, daemon in self._daemons.items() if daemon.poll() is not None]
            if ended or time.monotonic() > end:
                logs = [path.read_text()[-500:] for path in (self.folder / "log").iterdir()]
                why = f"{ended[0]} ended" if ended else f"no nodes in {_START:g} s"
                raise RuntimeError(f"{why}: {' '.join(''.join(logs).split())}")
            time.sleep(0.05)

    def _said(self, *command: str) -> str:
        env = self.environment()
        return subprocess.run(
            command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=20
        ).stdout

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if "slurmctld" in self._daemons:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._said("scancel", "--user=root")
                end = time.monotonic() + _END
                while self._said("squeue", "-h") and time.monotonic() < end:
                    time.sleep(0.1)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            try:
                daemon.wait(_END)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        shutil.rmtree(self.folder)

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """What a user of this SLURM has who activated the Python environment of the tests."""
        outer = {k: v for k, v in environment().items() if not k.startswith(("SLURM", "SALLOC"))}
        if installed_mpi() == "mpich":
            # Over UCX it publishes addresses with what lay behind them on the stack: some lines get
            # longer than the 1,024 characters that SLURM reads as one, and ranks die or hang.
            outer["MPIR_CVAR_CH4_NETMOD"] = "ofi"
        else:
            for name in ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT"):
                outer |= {name: "1", f"{name}_CONFIRM": "1"}
            # The nodes have more processors by name than the machine has.
            outer["PRTE_MCA_hwloc_default_binding_policy"] = "none"
        path = f"{Path(sys.prefix) / 'bin'}:{outer['PATH']}"
        # Open MPI leaves folders behind where a job ends badly.
        mine = {"SLURM_CONF": f"{self.folder}/slurm.conf", "TMPDIR": f"{self.folder}/tmp"}
        return outer | {"PATH": path} | mine | dict(extra or {})

    # ---- programs ----

    def srun(
        self,
        program: Sequence[str],
        timeout: float = 30.0,
        *,
        options: Sequence[str] = (),
        nodes: int = 2,
        each: int = 2,
        mpi: str = "",
        env: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run a program as a job of one step, on `each` tasks of every node."""
        size = [f"--nodes={nodes}", f"--ntasks-per-node={each}"]
        command = ["srun", "-Q", f"--mpi={mpi or PMI[installed_mpi()]}", *size, *options, *program]
        return self.run(command, timeout, env=env)

    def run(
        self,
        command: Sequence[str],
        timeout: float = 30.0,
        *,
        env: Mapping[str, str] | None = None,
    ) -> Ended:
        """Run a command as the user of this SLURM; once more if it broke before it began."""
        ended = run_bounded(command, timeout, self.environment(env))
        if _BROKEN_START in ended.output:
            print(ended.output)
            ended = run_bounded(command, timeout, self.environment(env))
        return ended

    def mpiexec(
        self,
        program: Sequence[str],
        timeout: float = 30.0,
        *,
        launcher: Path | None = None,
        nodes: int = 2,
        each: int = 2,
        ranks: int = 0,
    ) -> Ended:
        """Run a program under mpiexec, inside an allocation.

        Args:
            launcher: another MPI's.
            ranks: if fewer than there is room for.
        """
        path = launcher or Path(sys.prefix) / "bin" / "mpiexec"
        start = [str(path), "-n", str(ranks or nodes * each)]
        size = [f"--nodes={nodes}", f"--ntasks-per-node={each}"]
        return self.run(["salloc", "-Q", *size, *start, *program], timeout)

    def submit(self, script: Path, *arguments: str, options: Sequence[str] = (), **env: str) -> int:
        """Submit a batch script; return the job's number."""
        output = f"--output={self.folder}/out/%j"
        command = ["sbatch", "--parsable", output, *options, str(script), *arguments]
        # Not by `run_bounded`: what sbatch leaves behind is the job.
        done = subprocess.run(
            command, env=self.environment(env), cwd=ROOT, capture_output=True, text=True, timeout=20
        )
        assert done.returncode == 0, done.stderr
        return int(done.stdout)

    def ended(self, job: int, timeout: float = 30.0) -> Batch:
        """Wait for the end of a batch job; past the timeout it is cancelled, and is no more."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            said = self.show(job)
            if said["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING"):
                code = int(said["ExitCode"].split(":")[0])
                restarts = int(said["Restarts"])
                return Batch(said["JobState"], code, restarts, self.output(job))
            time.sleep(0.1)
        self._said("scancel", str(job))
        raise AssertionError(f"job {job} took more than {timeout} s:\n{self.output(job)}")

    def show(self, job: int) -> dict[str, str]:
        """What SLURM says of a job."""
        words = self._said("scontrol", "--oneliner", "show", "job", str(job)).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def output(self, job: int) -> str:
        """What a job has written so far."""
        path = self.folder / "out" / str(job)
        return path.read_text() if path.exists() else ""

    def signal_script(self, job: int, name: str) -> None:
        """Send a signal to a job's batch script, as `--signal=B:` does when time runs out."""
        self._said("scancel", "--batch", f"--signal={name}", str(job))

    def hasten(self, job: int) -> None:
        """Let a requeued job start soon; by itself it waits two minutes, for its old credential.

        In the second in which that was revoked, a node still refuses the job.
        """
        end = time.monotonic() + 20
        while self.show(job)["JobState"] != "PENDING" and time.monotonic() < end:
            time.sleep(0.05)
        self._said("scontrol", "update", f"JobId={job}", "StartTime=now+2")

    # ---- what is left ----

    def shared_memory(self) -> list[str]:
        """The names of the files in the nodes' shared memory."""
        roots = [Path(f"/proc/{self._daemons[name].pid}/root") for name in NODES]
        return [file.name for root in roots for file in (root / SHARED.relative_to("/")).iterdir()]

    def leftovers(self) -> list[int]:
        """Processes that belong to this SLURM, its daemons included."""
        return marked(f"SLURM_CONF={self.folder}/")


@contextlib.contextmanager
def _free_ports(count: int) -> Iterator[list[int]]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        yield [each.getsockname()[1] for each in sockets]
