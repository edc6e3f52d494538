"""Hosts on one machine: network namespaces with names, addresses and /dev/shm of their own.

A switch joins them, in a namespace of its own, where a host can be cut off and joined again.  They
exist as long as this process does.  It takes root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.harness import Ended, environment, installed_mpi, run_bounded

NAMES = ("alpha", "beta")
_SWITCH = "switch"
_ADDRESS = "10.99.7.{}"
_SHARED = "128m"  # room in a host's /dev/shm
_KEEPER = """
hostname {name}
mount --make-rprivate / && mount -t tmpfs -o size={shared} tmpfs /dev/shm
mount --bind {hosts} /etc/hosts
ip link set lo up
echo ready
exec cat
"""
# What stands in for ssh: AGENT [-option ...] HOST COMMAND...  Across a cut it hears of no end, and
# nobody of its own.
_AGENT = """#!/bin/sh
while [ "${{1#-}}" != "$1" ]; do shift; done
host=$1; shift
setsid --fork --wait \\
    nsenter -t "$(cat {folder}/$host)" --net --uts --ipc --mount --wd="$PWD" -- sh -c "$*"
code=$?
exec >/dev/null 2>&1
while [ -e {folder}/cut-$host -o -e {folder}/cut-{first} ] && kill -0 $PPID; do sleep 0.1; done
exit $code
"""


class Hosts:
    """The hosts, from `with` to its end.

    Raises:
        OSError: they can't be made here; says why.
    """

    def __init__(self, folder: Path, names: Sequence[str] = NAMES) -> None:
        self.names = tuple(names)
        self._folder = folder
        self._keepers: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Hosts:
        for tool in ("unshare", "nsenter", "setsid", "ip", "bridge", "hostname", "mount"):
            if shutil.which(tool) is None:
                raise OSError(f"there is no {tool} here")
        lines = [f"{_ADDRESS.format(i)} {name}" for i, name in enumerate(self.names, 1)]
        hosts = self._folder / "hosts"
        hosts.write_text("\n".join(["127.0.0.1 localhost", *lines, ""]))
        agent = self._folder / "agent"
        agent.write_text(_AGENT.format(folder=self._folder, first=self.names[0]))
        agent.chmod(0o755)
        try:
            for name in (_SWITCH, *self.names):
                self._keep(name, hosts)
            self._connect()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _keep(self, name: str, hosts: Path) -> None:
        """Start the process that keeps a host's namespaces; it ends when we close its input."""
        keeper = subprocess.Popen(
            [
                *("unshare", "--net", "--uts", "--ipc", "--mount", "sh", "-ec"),
                _KEEPER.format(name=name, hosts=hosts, shared=_SHARED),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._keepers[name] = keeper
        assert keeper.stdout is not None and keeper.stderr is not None
        if keeper.stdout.readline() != b"ready\n":
            raise OSError(f"no namespaces here: {keeper.stderr.read().decode().strip()}")
        (self._folder / name).write_text(str(keeper.pid))

    def _connect(self) -> None:
        self._do(_SWITCH, "ip link add bridge type bridge && ip link set bridge up")
        for i, name in enumerate(self.names, 1):
            pid = self._keepers[name].pid
            self._do(
                _SWITCH,
                f"ip link add {name} type veth peer name eth0 netns {pid}"
                f" && ip link set {name} master bridge up",
            )
            address = f"{_ADDRESS.format(i)}/24"
            self._do(name, f"ip addr add {address} dev eth0 && ip link set eth0 up")
        for name in self.names:
            self._await_link(name)

    def _await_link(self, name: str) -> None:
        """Wait until a host's interface runs (UCX takes no other), and the switch forwards."""
        for where, show in (
            (name, "ip link show eth0 | grep -q LOWER_UP"),
            (_SWITCH, f"bridge link show dev {name} | grep -q forwarding"),
        ):
            self._do(where, f"until {show}; do sleep 0.02; done")

    def _do(self, name: str, command: str) -> None:
        done = subprocess.run(
            self.inside(name, "sh", "-c", command), capture_output=True, timeout=5
        )
        if done.returncode:
            raise OSError(f"no network between namespaces here: {done.stderr.decode().strip()}")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for keeper in self._keepers.values():
            assert keeper.stdin is not None
            keeper.stdin.close()
            keeper.wait(5)

    def cut(self, host: str) -> None:
        """Cut a host off: what it sends, and what is sent to it, is lost without a word."""
        (self._folder / f"cut-{host}").touch()
        self._do(_SWITCH, f"ip link set {host} down")

    def heal(self, host: str) -> None:
        """Join a host to the others again."""
        self._do(_SWITCH, f"ip link set {host} up")
        self._await_link(host)
        (self._folder / f"cut-{host}").unlink()

    def give_up(self) -> None:
        """Have TCP give up on who doesn't answer now; by itself it takes a quarter of an hour."""
        for name in self.names:
            self._do(name, "echo 1 > /proc/sys/net/ipv4/tcp_retries2")

    def crash(self, host: str) -> None:
        """End all that runs on a host, of which the others hear nothing."""
        self.cut(host)
        for pid in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def processes(self, host: str) -> list[int]:
        """Return the processes on a host, without its keeper."""
        keeper = self._keepers[host].pid
        there = os.readlink(f"/proc/{keeper}/ns/net")
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if os.readlink(entry / "ns/net") == there and int(entry.name) != keeper:
                    found.append(int(entry.name))
            except OSError:  # gone
                continue
        return found

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
        self,
        ranks: Sequence[int],
        program: Sequence[str],
        timeout: float,
        env: Mapping[str, str],
        *,
        grace: float = 1.0,
    ) -> Ended:
        """Run a program on so many ranks of each host, started from the first.

        Processes may outlive the launcher by `grace` seconds.
        """
        places = ",".join(f"{name}:{n}" for name, n in zip(self.names, ranks))
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
        launcher += ["-n", str(sum(ranks)), *program]
        inside = self.inside(self.names[0], *launcher)
        return run_bounded(inside, timeout, environment(env), grace=grace)
