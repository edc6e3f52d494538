"""Each scenario starts an mpiexec of its own, under a time limit; the ranks report in files."""

from __future__ import annotations

import pytest

from tests.harness import launch


@pytest.fixture
def job():
    """Launch a script, and insist that it ended by itself and left nothing behind."""

    def run(n, script, timeout=30.0, *, fails=False, **options):
        ended = launch(n, script, timeout, **options)
        assert not ended.timed_out, f"hung for {timeout} s:\n{ended.output}"
        assert not ended.leftovers, f"left {ended.leftovers} behind:\n{ended.output}"
        assert (ended.code != 0) == fails, f"exit code {ended.code}:\n{ended.output}"
        return ended

    return run
