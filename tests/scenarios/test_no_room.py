"""A full /dev/shm: groups, or what they make later, go by MPI, with a warning; nothing crashes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap

import pytest

from tests.harness import environment, mpiexec, run_bounded

# The mount is this process's own: the machine's /dev/shm is not touched.
OWN_SHM = 'mount --make-rprivate / && mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"'
SCRIPT = """
import os, warnings
import numpy as np
import mpicoll as mc
from mpi4py import MPI

comm = MPI.COMM_WORLD
with mc.new_group(timeout=30) as pg:  # while there is room
    assert pg.name() == "shm"
    file = os.open("/dev/shm/filler", os.O_CREAT | os.O_RDWR) if comm.rank == 0 else -1
    if comm.rank == 0:
        free = os.statvfs("/dev/shm")
        os.posix_fallocate(file, 0, max(1, free.f_bavail * free.f_bsize - 500_000))
    comm.Barrier()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        full = mc.new_group(timeout=30)
        x = pg.empty(1_000_000)
        x[...] = 1
        for group in (pg, full):
            group.allreduce(x).wait()
        warned = comm.reduce(len(said))
    assert full.name() == "mpi"
    assert (x == comm.size**2).all()
    objects = pg.allgather_object("x" * 3_000_000)
    assert list(map(len, objects)) == [3_000_000] * comm.size
    full.shutdown()
if comm.rank == 0:
    assert warned == 3, warned  # for the group, for the array, and for the slots of the first
    print("no crash")
"""


def test_no_room(tmp_path):
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("a /dev/shm of its own takes root and unshare")
    own = ["unshare", "--mount", "sh", "-ec", OWN_SHM.format(size="64m"), "sh"]
    if subprocess.run([*own, "true"], capture_output=True).returncode:
        pytest.skip("this container may not mount")
    path = tmp_path / "script.py"
    path.write_text(textwrap.dedent(SCRIPT))
    ended = run_bounded([*own, *mpiexec(2), sys.executable, str(path)], 60, environment({}))
    assert ended.code == 0 and "no crash" in ended.output, ended.output
