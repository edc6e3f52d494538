"""Two hosts on one machine: network namespaces with names, addresses and /dev/shm of their own.

They are joined by a cable, and exist as long as this process does.  It takes root.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.harness import Ended, environment, installed_mpi, run_bounded

NAMES = ("alpha", "beta")
_ADDRESS = "10.99.7.{}"
_KEEPER = """
hostname {name}
mount --make-rprivate / && mount -t tmpfs tmpfs /dev/shm && mount --bind {hosts} /etc/hosts
ip link set lo up
echo ready
exec cat
"""
# What stands in for ssh: AGENT [-option ...] HOST COMMAND...
_AGENT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
exec nsenter -t "$(cat {folder}/$host)" --net --uts --ipc --mount --wd="$PWD" -- sh -c "$*"
"""


class Hosts:
    """The hosts, from `with` to its end.

    Raises:
        OSError: they can't be made here; says why.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._keepers: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Hosts:
        for tool in ("unshare", "nsenter", "ip", "hostname", "mount"):
            if shutil.which(tool) is None:
                raise OSError(f"there is no {tool} here")
        lines = [f"{_ADDRESS.format(i)} {name}" for i, name in enumerate(NAMES, 1)]
        hosts = self._folder / "hosts"
        hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        agent = self._folder / "agent"
        agent.write_text(_AGENT.format(folder=self._folder))
        agent.chmod(0o755)
        try:
            for name in NAMES:
                self._keep(name, hosts)
            self._cable()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _keep(self, name: str, hosts: Path) -> None:
        """Start the process that keeps a host's namespaces; it ends when we close its input."""
        keeper = subprocess.Popen(
            [
                *("unshare", "--net", "--uts", "--ipc", "--mount", "sh", "-ec"),
                _KEEPER.format(name=name, hosts=hosts),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._keepers.append(keeper)
        assert keeper.stdout is not None and keeper.stderr is not None
        if keeper.stdout.readline() != b"ready\n":
            raise OSError(f"no namespaces here: {keeper.stderr.read().decode().strip()}")
        (self._folder / name).write_text(str(keeper.pid))

    def _cable(self) -> None:
        one, other = (str(keeper.pid) for keeper in self._keepers)
        cable = ["eth0", "netns", one, "type", "veth", "peer", "name", "eth0", "netns", other]
        made = subprocess.run(["ip", "link", "add", *cable], capture_output=True)
        if made.returncode:
            raise OSError(f"no network between namespaces here: {made.stderr.decode().strip()}")
        for i, name in enumerate(NAMES, 1):
            address = f"{_ADDRESS.format(i)}/24"
            command = f"ip addr add {address} dev eth0 && ip link set eth0 up"
            subprocess.run(self.inside(name, "sh", "-c", command), check=True)
        # UCX takes only interfaces that are running already.
        running = "until ip link show eth0 | grep -q LOWER_UP; do sleep 0.02; done"
        for name in NAMES:
            subprocess.run(self.inside(name, "sh", "-c", running), check=True, timeout=5)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for keeper in self._keepers:
            assert keeper.stdin is not None
            keeper.stdin.close()
            keeper.wait(5)

    def inside(self, host: str, *command: str) -> list[str]:
        """Return the command that runs a command on a host."""
        pid = (self._folder / host).read_text()
        where = ["-t", pid, "--net", "--uts", "--ipc", "--mount", f"--wd={Path.cwd()}"]
        return ["nsenter", *where, "--", *command]

    def shared_memory(self, host: str) -> list[str]:
        """Return the names of the files in a host's shared memory."""
        listed = subprocess.run(
            self.inside(host, "ls", "/dev/shm"), capture_output=True, text=True, check=True
        )
        return listed.stdout.split()

    def run(
        self, each: int, program: Sequence[str], timeout: float, env: Mapping[str, str]
    ) -> Ended:
        """Run a program on `each` ranks of every host, started from the first."""
        places = ",".join(f"{name}:{each}" for name in NAMES)
        launcher = [str(Path(sys.prefix) / "bin" / "mpiexec")]
        agent = str(self._folder / "agent")
        if installed_mpi() == "mpich":
            launcher += ["-launcher", "ssh", "-launcher-exec", agent, "-hosts", places]
            env = {**env, "MPIR_CVAR_CH4_NETMOD": "ofi"}  # over UCX, calls hang here at times
        else:
            launcher += ["--allow-run-as-root", "--bind-to", "none", "--host", places]
            launcher += ["--prtemca", "plm_ssh_agent", agent]
            for name in env:
                launcher += ["-x", name]
        launcher += ["-n", str(each * len(NAMES)), *program]
        return run_bounded(self.inside(NAMES[0], *launcher), timeout, environment(env))
