"""Write each outcome to $MPICOLL_TEST_LOG as it happens, so that a killed stage still counts."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

pytest_plugins = ["mpicoll.testing.plugin"]


class Log:
    """One JSON line per event, written by rank 0 only."""

    def __init__(self, path: str) -> None:
        self.file = open(path, "a", buffering=1)  # noqa: SIM115

    def write(self, **event: Any) -> None:
        self.file.write(json.dumps(event) + "\n")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(event="start", test=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            text = report.longreprtext
            if report.skipped and isinstance(report.longrepr, tuple):
                text = str(report.longrepr[2])
            self.write(event=report.outcome, test=report.nodeid, when=report.when, text=text)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.write(event="failed", test=report.nodeid, when="collect", text=report.longreprtext)
        elif report.skipped and isinstance(report.longrepr, tuple):
            text = str(report.longrepr[2])
            self.write(event="skipped", test=report.nodeid, when="collect", text=text)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "processes: looks at what only processes have each")
    config.addinivalue_line("markers", "gpu: needs CuPy and a GPU")
    path = os.environ.get("MPICOLL_TEST_LOG")
    rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
    if path and rank == "0":
        config.pluginmanager.register(Log(path))
