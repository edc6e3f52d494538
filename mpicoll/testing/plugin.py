"""The pytest plugin: `mpiexec -n 3 python -m pytest` runs each test on three ranks, as one test.

The ranks go from test to test together.  Rank 0 reports, in pytest's own words, what became of a
test on all of them (verdicts.py); the others are silent.  A rank that leaves a test early breaks
the groups that the test may wait in, so its peers hear of it at once.  A test ends at its limit
(limits.py); a rank that can't be stopped ends the job.

Every pytest in the environment loads this module: options, marks, the fixture, and whether there
are several ranks.  What works with them (ranks.py) is loaded where there are.
"""

from __future__ import annotations

import math
import os
from argparse import Namespace
from collections.abc import Iterator
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from ..runtime.process import monotonic
from ..runtime.settings import Launcher, environment, inherited_from, launchers
from .marks import NAME, RANKS, ranks_of

if TYPE_CHECKING:
    from ..groups.group import ProcessGroup
    from .ranks import Ranks

_EARLY = 0.8  # of the limit: after that a call says who is missing, before the test is stopped
_LISTS = ("help", "version", "markers", "showfixtures", "show_fixtures_per_test", "cacheshow")


# ---- what is there on one rank, too ----


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the limit."""
    group = parser.getgroup("mpicoll", "tests on several ranks")
    group.addoption(
        "--mpicoll-limit",
        type=float,
        metavar="SECONDS",
        help="how long a test may take on several ranks; 0: for ever (ini: mpicoll_limit, 60)",
    )
    parser.addini("mpicoll_limit", "how long a test may take on several ranks, s", default="60")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test with the mark `ranks` once for each number that it gives."""
    mark = metafunc.definition.get_closest_marker("ranks")
    if mark is None:
        return
    if not mark.args or not all(isinstance(n, int) and n > 0 for n in mark.args):
        raise pytest.UsageError(
            f"{metafunc.definition.nodeid}: the mark ranks takes numbers of ranks, such as "
            f"ranks(2, 3), but got {mark.args}"
        )
    metafunc.fixturenames.append("_ranks")
    ids = [f"{n}rank{'s' * (n > 1)}" for n in mark.args]
    metafunc.parametrize("_ranks", mark.args, ids=ids)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test for more ranks than there are."""
    wanted = ranks_of(item)
    ranks: Ranks | None = item.config.pluginmanager.get_plugin(RANKS)
    size = 1 if ranks is None else ranks.together.size
    if wanted is not None and wanted > size:
        pytest.skip(f"it is for {wanted} ranks, and the world has {size}: mpiexec -n {wanted}")


@pytest.fixture
def group(request: pytest.FixtureRequest) -> Iterator[ProcessGroup]:
    """A new group of the ranks that run the test."""
    from ..errors import RemoteRankError
    from ..groups.new import new_group

    ranks: Ranks | None = request.config.pluginmanager.get_plugin(RANKS)
    left = ranks.limit.until - monotonic() if ranks is not None else math.inf
    made = new_group(timeout=max(0.1, left * _EARLY), group_name=request.node.name)
    yield made
    why = ranks.left if ranks is not None else ""
    if ranks is not None and why:
        ranks.together.tell(why)
    if made.is_broken:
        made.abort()
    else:
        with suppress(RemoteRankError):  # a peer fails, or has let a call time out: it says so
            made.shutdown()


# ---- whether there are several ----


def _place(options: Namespace) -> Launcher | None:
    """Return what the launcher says of this rank, if tests are to run on several."""
    found = launchers(environment())
    asked = NAME in (options.plugins or [])
    if not found or inherited_from() is not None:
        return Launcher("none", "", 0, 1) if asked else None
    return found[0] if found[0].ranks > 1 or asked else None


def _runs_tests(options: Namespace) -> bool:
    """Whether pytest is to run tests, not only to list something."""
    return not any(getattr(options, name, None) for name in (*_LISTS, "collectonly"))


_MET = pytest.StashKey["Ranks"]()


def _meet(config: pytest.Config) -> Ranks:
    """Have the ranks meet, if they have not yet."""
    if _MET not in config.stash:
        from .ranks import Ranks

        config.stash[_MET] = Ranks(config)
    return config.stash[_MET]


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> Iterator[None]:
    """Have the ranks meet before any code of the tests runs, so that they hear how it ends."""
    options = early_config.known_args_namespace
    is_rank = _place(options) is not None and not getattr(options, "numprocesses", None)
    if not is_rank or not _runs_tests(options):
        return (yield)
    ranks = _meet(early_config)
    try:
        return (yield)
    except BaseException as error:
        ranks.leave_early(error)
        raise


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Leave to rank 0 what only one rank can do."""
    place = _place(config.option)
    if place is None:
        return
    if getattr(config.option, "numprocesses", None):
        raise pytest.UsageError(
            "-n (pytest-xdist) starts processes that are no ranks: leave it out"
        )
    if place.rank > 0:
        config.option.xmlpath = None
        config.option.usepdb = config.option.trace = False
        if config.option.basetemp:
            config.option.basetemp += f"-rank{place.rank}"


@pytest.hookimpl(trylast=True)
def pytest_configure(config: pytest.Config) -> None:
    """Declare the marks; have the ranks work together, if there are several."""
    for line in (
        "ranks(n, ...): run the test on the first n ranks, for each n",
        "limit(seconds): how long the test may take",
    ):
        config.addinivalue_line("markers", line)
    place = _place(config.option)
    if place is not None and place.rank > 0:
        _silence(config)
    if place is not None and _runs_tests(config.option):
        config.pluginmanager.register(_meet(config), RANKS)


def _silence(config: pytest.Config) -> None:
    """Have this rank report to nobody."""
    old = config.pluginmanager.unregister(name="terminalreporter")
    if old is not None:
        nowhere = open(os.devnull, "w")  # noqa: SIM115
        config.add_cleanup(nowhere.close)
        silent = pytest.TerminalReporter(config, nowhere)
        config.pluginmanager.register(silent, "terminalreporter")
