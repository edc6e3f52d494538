"""What is reported of the tests so far, kept by a process beside rank 0 that outlives it.

Launchers kill all ranks as soon as one dies, and with rank 0 what pytest says at the end.  So each
report is kept when it is there, and written if rank 0 ends without having done so.  This file is
also the program of that process, which knows nothing of the library.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from typing import IO

_WIDTH = 80


class LastWords:
    """What rank 0 has reported."""

    def __init__(self) -> None:
        # In a session of its own, so that it is not killed with rank 0.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__],
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,
        )

    def begins(self, test: str) -> None:
        """Note the test in which the job ends, if it does so now."""
        self._say("begins", test)

    def failed(self, text: str, line: str) -> None:
        """Keep a failure in full, and its line in the summary."""
        self._say("failed", text, line)

    def counts(self, text: str) -> None:
        """Keep how many tests have ended how."""
        self._say("counts", text)

    def over(self) -> None:
        """Forget it all, as pytest has said it."""
        self._say("over")
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)

    def _say(self, *what: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with suppress(OSError):  # the process is gone, as when this is over
            pipe.write(json.dumps(what).encode() + b"\n")


def _keep(said: IO[bytes]) -> str:
    """Return what is to be written when nobody says any more; "": nothing."""
    test = counts = ""
    failures: list[str] = []
    lines: list[str] = []
    for line in said:
        try:
            what, *texts = json.loads(line)
        except ValueError:  # rank 0 was killed when it wrote this
            break
        if what == "begins":
            (test,) = texts
        elif what == "counts":
            (counts,) = texts
        elif what == "failed":
            failures.append(texts[0])
            lines.append(texts[1])
        else:
            return ""
    if not test:
        return ""
    parts = [f"\n{' the job ended before the tests did ':=^{_WIDTH}}", *failures]
    if lines:
        parts += [f"{' short test summary info ':=^{_WIDTH}}", *lines]
    parts.append(f"{counts or 'no test'} before {test}, in which the job ended\n")
    return "\n".join(parts)


def _main() -> None:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    text = _keep(sys.stdin.buffer)
    with suppress(OSError):
        sys.stdout.write(text)
        sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    _main()
