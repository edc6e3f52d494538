"""Whether the world that MPI made is the one that the launcher started.

Another MPI's launcher starts N ranks that know nothing of one another: N worlds of one, and no
error.  The launcher's variables give it away.  MPICH under a launcher that speaks PMIx ends the job
when it is initialized, without a word of what to do: that is told before.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from .settings import Launcher

_LIBRARY = re.compile(r"/lib(mpi|mpich)(_\w+)?\.so[.\d]*$")
_PMIX = re.compile(r"/libpmix\.so[.\d]*$")
MANAGED = ("torchrun", "join_world")  # what starts processes, and leaves the rest to `world.py`
KIN = ("MPICH", "Intel MPI", "MVAPICH", "MVAPICH2")  # they have MPICH's launcher, hydra


def serves(launcher: Launcher, vendor: str) -> bool:
    """Return whether ranks of an MPI library find one another under a launcher."""
    return launcher.serves == ("MPICH" if vendor in KIN else vendor)


def singleton(world: int, vendor: str, found: Sequence[Launcher]) -> str:
    """Say why a world of one rank is not what was started; "" where it may be.

    Args:
        world: the number of ranks in MPI.COMM_WORLD.
        vendor: who made the MPI library, in mpi4py's words.
        found: the launchers above this process.
    """
    if world > 1 or not found or any(launcher.ranks == 1 for launcher in found):
        return ""
    name, _, _, ranks = found[0]
    return (
        f"{name} started {ranks} ranks, but {vendor} found each of them alone, in {ranks} worlds "
        "of one rank"
    )


def abortive(vendor: str, found: Sequence[Launcher]) -> str:
    """Say why an MPI library would end the job if it were initialized; "" where it would not.

    It must be loaded: an MPICH that was built with PMIx brings the library of it along.
    """
    if vendor != "MPICH" or not found or found[0].serves != "Open MPI" or _maps(_PMIX):
        return ""
    return f"{vendor} can't be initialized under {found[0].name}"


def worldless(vendor: str, starter: str, ranks: int) -> str:
    """Say why ranks that no launcher of MPI has started can't form a world; "" where they can.

    They are given a PMI-1 server of ours, which MPICH and its kin ask; Open MPI wants PMIx.
    """
    if vendor in KIN:
        return ""
    return (
        f"{starter} started {ranks} ranks, and {vendor} knows only those of its own launcher: "
        f"start them with mpiexec -n {ranks} python -m mpicoll run PROGRAM, which sets RANK, "
        "WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT as torchrun does, or use MPICH"
    )


def apart(libraries: Sequence[str], daemons: Sequence[str]) -> str:
    """Say why separately launched jobs can't be connected; "" where it is known that they can.

    Args:
        libraries: of each job, its MPI library, vendor first, and version.
        daemons: of each, the daemon of Open MPI's launcher that started it; "" for another.
    """
    if len(set(libraries)) > 1:
        return f"their MPI libraries differ ({', '.join(sorted(set(libraries)))})"
    if libraries[0].startswith("MPICH "):
        return ""
    if not libraries[0].startswith("Open MPI "):
        return f"{libraries[0]} is not known to connect them: use MPICH"
    if len(set(daemons)) == 1 and daemons[0]:
        return ""
    return (
        "Open MPI connects only what one mpiexec has started, and these come from "
        f"{len(set(daemons))} launchers: start them as one job "
        "(mpiexec -n 2 python a.py : -n 1 python b.py) and merge groups of that, let one job spawn "
        "the other (pg.spawn), or use MPICH, which connects separate runs"
    )


def spawnless(vendor: str, found: Sequence[Launcher], *, spawned: bool) -> str:
    """Say why a process can't start more ranks; "" where it is known that it can.

    Args:
        vendor: who made the MPI library, in mpi4py's words.
        found: the launchers above this process.
        spawned: the process was itself started so.
    """
    if all(launcher.name in MANAGED for launcher in found) and not spawned:
        return "no launcher started this program: start it with mpiexec, -n 1 for one rank"
    if found and found[0].name.startswith("srun"):
        return (
            f"{found[0].name} starts no more ranks for a running job: start the program with "
            "mpiexec inside the allocation"
        )
    if vendor not in ("MPICH", "Open MPI"):
        return f"{vendor} is not known to start more ranks: use MPICH or Open MPI"
    return ""


def remedy(vendor: str, file: str) -> str:
    """Say how ranks of an MPI library are started."""
    beside = Path(file).parent.parent / "bin" / "mpiexec"
    own = f" ({beside})" if file and beside.exists() else ""
    srun = f"srun --mpi={pmi_of(vendor)}"
    return f"start the ranks with {vendor}'s own mpiexec{own} or, under SLURM, {srun}"


def pmi_of(vendor: str) -> str:
    """Return what `srun --mpi` must say for an MPI library."""
    return "pmi2" if vendor in KIN else "pmix"


def library_file() -> str:
    """Return the file of the MPI library that this process has loaded; "" if none is seen."""
    return _maps(_LIBRARY)


def _maps(name: re.Pattern[str]) -> str:
    """Return the first file of such a name that this process maps; "" if there is none."""
    try:
        maps = Path("/proc/self/maps").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    files = [line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6]
    return next((file for file in files if name.search(file)), "")
