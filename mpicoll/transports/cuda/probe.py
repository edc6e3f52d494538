"""Whether the MPI library takes addresses of GPU memory: tried, in a process of its own.

How the library was built doesn't answer it, and where it takes none, the process that tries dies
of a segmentation fault.  So a child tries it, alone, and sends itself arrays, short and long ones.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Generator

from ...runtime.library import IDLE
from ...runtime.settings import child_environment

LIMIT = 60.0  # seconds that a trial may take
_ALONE = "cudaErrorDevicesUnavailable"  # in exclusive mode, where this process has the GPU

_PROGRAM = """
import resource, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # it may well die, and its core would be huge
import cupy
from mpi4py import MPI
device = cupy.cuda.Device(int(sys.argv[1]))
device.use()  # no with-block, at whose end there would be a context on GPU 0, too
for count in (1, 1 << 10, 1 << 18):
    sent, received = cupy.arange(count) + 1.5, cupy.zeros(count)
    device.synchronize()
    requests = [MPI.COMM_SELF.Irecv(received, 0), MPI.COMM_SELF.Isend(sent, 0)]
    MPI.Request.Waitall(requests)
    if not (received == sent).all():
        sys.exit("the MPI library moved something else than what lies in GPU memory")
"""


class Trial:
    """A trial on one GPU; it begins at once.

    Args:
        device: the GPU's number among those that this process sees.
    """

    def __init__(self, device: int) -> None:
        self._end = time.monotonic() + LIMIT
        self._child = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, str(device)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=child_environment(),
        )

    def outcome(self) -> str | None:
        """Return None while it goes on, then "" if MPI takes GPU memory, else why not."""
        code = self._child.poll()
        if code is None and time.monotonic() < self._end:
            return None
        if code is None:
            self.stop()
            return f"sending an array from GPU memory took more than {LIMIT:g} s"
        output, _ = self._child.communicate()
        return reading(code, output.decode(errors="replace"))

    def stop(self) -> None:
        """End it now."""
        self._child.kill()
        self._child.communicate()


def reading(code: int, output: str) -> str:
    """Return why MPI takes no GPU memory, from a trial's exit code and output; "" if it does."""
    if code == 0:
        return ""
    if _ALONE in output:
        return (
            "the GPU lets one process in at a time, so that none could try (nvidia-smi -c DEFAULT, "
            "or NVIDIA's MPS, lets several in)"
        )
    lines = output.strip().splitlines()
    number = -code if code < 0 else code - 128  # as a shell reports it
    if number in (signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        name = signal.Signals(number).name
        return f"a process that sent an array from GPU memory to itself died of {name}"
    return lines[-1] if lines else f"the trial ended with exit code {code}"


def takes_gpu_memory(device: int) -> Generator[int, None, str]:
    """Try it, once in this process; return "" if MPI takes GPU memory, else why not."""
    if device not in _known:
        trial = Trial(device)
        try:
            while (outcome := trial.outcome()) is None:
                yield IDLE
        except BaseException:
            trial.stop()
            raise
        _known[device] = outcome
    return _known[device]


_known: dict[int, str] = {}
