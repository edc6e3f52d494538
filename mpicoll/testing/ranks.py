"""The hooks of a session on several ranks, of which each works with the others on every test."""

from __future__ import annotations

import faulthandler
import math
import os
import pdb
import sys
import time
import zlib
from collections.abc import Generator, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import pytest
from _pytest._code.code import ReprFileLocation, TerminalRepr, TracebackEntry
from _pytest._io import TerminalWriter
from _pytest.runner import runtestprotocol

from ..engine.recorder import LIBRARY
from ..errors import (
    CollectiveTimeoutError,
    MpicollError,
    RankFailedError,
    RemoteRankError,
    UnsupportedError,
)
from ..runtime.process import monotonic, process
from ..runtime.watchdog import end_job, watchdog
from .lastwords import LastWords
from .limits import LAST, VERY_LAST, Limit, Overdue
from .marks import ranks_of
from .together import MAKING, Left, Lost, Together
from .verdicts import CAUSE, FOLLOWS, LATE, Part, Phase, Verdict, agree, first_difference, text_of

_CONTRACT = str(Path(__file__).with_name("contract.py"))
_OURS = (MpicollError, Overdue)
_PASSED, _BESIDE, _OTHER = range(3)  # on a rank the test passed; was not run; ended otherwise
COLLECTING = 10.0  # seconds from the first rank's collection to the last's, at least, or the limit
HEARD = 2.0  # seconds in which a rank hears that rank 0 has ended, too
_SHOWN = 300  # characters of a failure's first line that the peers hear

Hook = Iterator[None]


class Merged(TerminalRepr):
    """A failure on several ranks, as pytest prints one."""

    def __init__(self, verdict: Verdict, item: pytest.Item) -> None:
        self.text = verdict.text
        file, line, message = verdict.place
        if not file:
            file, line = str(item.path), (item.location[1] or 0) + 1
        self.reprcrash = ReprFileLocation(file, line, message)

    def toterminal(self, tw: TerminalWriter) -> None:
        """Write it, in pytest's colours."""
        for line in self.text.splitlines():
            tw.line(line, red=line.startswith(("E  ", ">")), bold=line.startswith("----"))

    def __str__(self) -> str:
        return self.text


class Ranks:
    """The hooks of a session on several ranks.

    They meet when it is made, before any conftest is loaded, and again after the collection.

    Attributes:
        together: this rank among the others.
        limit: that of the test that runs.
        left: why this rank has left the test early, in words for the peers; "": it has not.

    Raises:
        pytest.UsageError: the ranks can't find one another.
    """

    def __init__(self, config: pytest.Config) -> None:
        self.config = config
        self._stderr = os.dup(2)  # it is not captured yet
        try:
            self.together = Together()
        except MpicollError as error:
            raise pytest.UsageError(f"the ranks can't work together: {error}") from error
        self.limit = Limit(self.together.is_halted)
        self._collected = False  # all ranks have collected their tests
        self._uncollected: list[tuple[str, str]] = []
        self._test = "the collection"  # what this rank is in, if it ends itself
        self._over = math.inf  # when the job ends, as no rank came to the meeting
        self._looked = time.monotonic()
        self._halted = False  # a prompt was open when that was
        self.left = ""
        self._told = False
        self._trouble: Left | Lost | None = None
        self._gone = False
        self._default = math.inf
        self._last_words = LastWords() if self.together.rank == 0 else None
        if self._last_words is not None:
            config.add_cleanup(self._last_words.over)
        self._say_own_end()
        config.add_cleanup(self._leave_unseen)

    # ---- before the first test ----

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        """Read the limit."""
        given = self.config.getoption("mpicoll_limit")
        if given is None:
            given = float(self.config.getini("mpicoll_limit"))
        if given and not self.config.known_args_namespace.usepdb:  # as given, for rank 0
            self._default = float(given)

    @pytest.hookimpl(trylast=True)
    def pytest_configure(self) -> None:
        """Refuse a debugger's prompt on ranks that have no terminal."""
        if self.together.rank > 0:
            before, rank = pdb.set_trace, self.together.rank

            def refuse(*args: object, **options: object) -> NoReturn:
                raise UnsupportedError(
                    f"breakpoint() on rank {rank}: only rank 0 has the terminal. Ask for "
                    "group.rank() == 0, or run the ranks in threads with mpicoll.testing.run, "
                    "where any of them can be debugged"
                )

            pdb.set_trace = refuse
            self.config.add_cleanup(lambda: setattr(pdb, "set_trace", before))

    def pytest_report_header(self) -> str:
        """Say how long a test may take."""
        limit = "no limit" if self._default == math.inf else f"limit {self._default:g} s"
        return f"mpicoll: {self.together.size} ranks, {limit}"

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Note what could not be collected."""
        if report.failed:
            self._uncollected.append((report.nodeid, report.longreprtext))

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtestloop(self, session: pytest.Session) -> Iterator[Any]:
        """Meet before the first test, and after the last one."""
        self._meet_after_collection()
        self._compare(session)
        watchdog().add(self._look)
        result = yield
        if not self.together.lost:
            self._save_coverage()
            self.together.says("has ended its tests")
            self.together.gather(None)
        return result

    def _meet_after_collection(self) -> None:
        """Wait until all ranks have collected; end if one has left, or does not come in time."""
        patience = max(self._default, COLLECTING)
        self.together.says("has collected its tests")
        try:
            limits = self.together.gather(self._default, min(patience, 9e8))
        except Left as error:
            self._gone = True
            pytest.exit(str(error), returncode=2)
        except Lost as lost:
            lines = [f"rank {rank} {how}" for rank, how in sorted(lost.said.items())]
            said = "\n".join(line.replace("can't be stopped", "has not come", 1) for line in lines)
            text = f"not all ranks have collected their tests, {patience:g} s after others:\n{said}"
            if self.together.rank == self.together.speaker != 0:  # rank 0 has the terminal
                os.write(self._stderr, f"\nmpicoll: {text}\n".encode())
            pytest.exit(text, returncode=1)
        self._default, self._collected, self._test = max(limits), True, ""

    def leave_early(self, error: BaseException | None) -> None:
        """Tell the peers that this rank ends before its tests, and why.

        What is wrong with the command is so on all ranks: rank 0 says it.
        """
        said = f"{type(error).__name__}: {error}"
        if hasattr(error, "cause"):  # of a conftest's failure, which names the cause itself
            said = str(error)
        why = f"ended before its tests{'' if error is None else f': {said}'}"
        repeats = isinstance(error, pytest.UsageError) and self.together.rank > 0 and not self._gone
        if repeats and error is not None and self.together.hears(0, HEARD) == why:
            error.args = ()
        self._leave(why)

    def _leave_unseen(self) -> None:
        """Tell the peers of an end of which no hook has told, at the latest when pytest ends."""
        if not self._collected:
            self.leave_early(sys.exc_info()[1])

    def _compare(self, session: pytest.Session) -> None:
        """Have all ranks report the errors of any, and make sure that they have the same tests."""
        names = [item.nodeid for item in session.items]
        digest = zlib.crc32("\n".join(names).encode())
        found = self.together.gather((digest, self._uncollected))
        everyone = {error for _, errors in found for error in errors}
        for error in sorted(everyone - set(self._uncollected)):
            ranks = [rank for rank, (_, errors) in enumerate(found) if error in errors]
            said = f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
            text = f"{error[1]}\n---- on {said} ----"
            report = pytest.CollectReport(error[0], "failed", text, None)
            session.config.hook.pytest_collectreport(report=report)
        if len({digest for digest, _ in found}) > 1 and not everyone:
            difference = first_difference(self.together.gather(names))
            speaks = self.together.rank == 0
            self.together.end()
            self._gone = True
            said = f"the ranks have collected different tests: {difference}"
            raise pytest.UsageError(*[said][:speaks])

    # ---- one test ----

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item, nextitem: pytest.Item | None) -> bool:
        """Run a test on the ranks that take part, and report what became of it on all."""
        mark = item.get_closest_marker("limit")
        seconds = float(mark.args[0]) if mark else self._default
        self.limit.begin(math.inf if self._default == math.inf else seconds)
        item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
        self._begin(item)
        try:
            self.together.enter(min(ranks_of(item) or self.together.size, self.together.size))
            item.stash[_PHASES] = []
            reports = runtestprotocol(item, log=False, nextitem=nextitem)
            self._end()
            reports = self._agree(item, reports)
        except Left as error:
            self._gone = True
            pytest.exit(str(error), returncode=2)
        except BaseException as error:
            self._leave(f"left the session: {type(error).__name__}: {error}")
            raise
        finally:
            self._end()
        self._test = ""
        for report in reports:
            item.ihook.pytest_runtest_logreport(report=report)
            self._keep(report)
        item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
        return True

    def _begin(self, item: pytest.Item) -> None:
        self._test = item.nodeid
        if self._last_words is not None:
            self._last_words.begins(item.nodeid)
        self.left, self._told = "", False
        self.together.halt(False)  # a prompt may have been left by an exception
        self._watch()

    def _watch(self) -> None:
        """Have the job end if this test goes on past all limits."""
        if self.limit.until < math.inf:
            self._over = monotonic() + self.limit.patience + LAST
            self._bound()

    def _bound(self) -> None:
        last = self._over - monotonic() + VERY_LAST
        faulthandler.dump_traceback_later(last, exit=True, file=self._stderr)

    def _end(self) -> None:
        self._over = math.inf
        faulthandler.cancel_dump_traceback_later()

    def pytest_enter_pdb(self) -> None:
        """Let no limit strike on any rank while a debugger's prompt is open on this one."""
        if self.limit.until < math.inf:
            self.limit.pause()
            self.together.halt(True)

    def pytest_leave_pdb(self) -> None:
        """Go on with the limit."""
        self.together.halt(False)
        self.limit.go_on()

    def _is_beside(self, item: pytest.Item) -> bool:
        """Whether a test is for other ranks."""
        wanted = ranks_of(item)
        return wanted is not None and wanted <= self.together.rank

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Hook:
        """Leave out the test on a rank that takes no part; keep the limit on the others."""
        if self._is_beside(item):
            pytest.skip("it is for other ranks")
        with self.limit.kept():
            yield

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_call(self) -> Hook:
        """Keep the limit."""
        with self.limit.kept():
            yield

    @pytest.hookimpl(wrapper=True, trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Hook:
        """Tear nothing down while a peer is still in the test; keep the limit a moment more."""
        self._meet_before_teardown(item)
        with self.limit.kept(self.limit.teardown):
            yield

    def _meet_before_teardown(self, item: pytest.Item) -> None:
        self._over = math.inf  # the meeting has a deadline of its own
        self.together.says(f"has finished {item.name}")
        late = "" if self._told else self.left
        try:
            self._meet(item, late=late)
        except (Left, Lost) as error:
            self._trouble = error
            self.left = self.left or "ends"
            self.together.tell(self.left)
        if self.limit.until < math.inf:
            self._over = monotonic() + self.limit.patience + LAST

    def _meet(self, item: pytest.Item, code: int = _PASSED, late: str = "") -> list[int]:
        """Exchange a number with the ranks in the same test."""
        if self._trouble is not None:
            raise self._trouble
        key, patience = zlib.crc32(item.nodeid.encode()), min(self.limit.patience, 9e8)
        codes, same = self.together.meet(code, key, patience, late, self._part(item))
        if not same:
            raise Left(f"the ranks are in different tests: {self.together.gather(item.nodeid)}")
        return codes

    def _part(self, item: pytest.Item) -> Part:
        """Return what became of a test on this rank, so far."""
        phases = [] if self._is_beside(item) else item.stash[_PHASES]
        return Part(self.together.rank, phases, self.together.told)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        """Tell the peers of what ended the test here, before anything else; note how it ended."""
        excinfo, line, bare = call.excinfo, "", False
        if excinfo is not None and not self._is_beside(item):
            if not self.config.option.fulltrace:
                excinfo = call.excinfo = _without_library(excinfo)
                bare = isinstance(excinfo.value, _OURS) and not _places(excinfo)
            line = self._in_a_line(excinfo)
            if isinstance(excinfo.value, pytest.skip.Exception):
                self.left = self.left or f"skipped {item.name}: {excinfo.value}"
            elif not self._told:
                self.left, self._told = f"failed {item.name}: {line}", True
                self.together.tell(self.left)
        report = yield
        if bare and excinfo is not None and report.failed:
            said = excinfo.exconly().splitlines()
            report.longrepr = "\n".join(f"E   {text}" for text in said)
        item.stash[_PHASES].append(_phase(report, call, line))
        return report

    def _in_a_line(self, excinfo: pytest.ExceptionInfo[BaseException]) -> str:
        """Say where an exception was raised, and its first line."""
        lines = [text for line in excinfo.exconly().splitlines() if (text := line.strip())]
        said = " ".join(lines[: 1 + lines[0].endswith(":")]).removeprefix("mpicoll.")
        said = said[:_SHOWN]
        places = _places(excinfo)
        if not places:
            return said
        path = Path(str(places[-1].path))
        if path.is_relative_to(self.config.rootpath):
            path = path.relative_to(self.config.rootpath)
        return f"{path}:{places[-1].lineno + 1}: {said}"

    # ---- what became of it ----

    def _agree(
        self, item: pytest.Item, reports: list[pytest.TestReport]
    ) -> list[pytest.TestReport]:
        """Return the reports that all ranks make of a test."""
        together, mine = self.together, self._part(item)
        passed = all(phase.outcome == "passed" and phase.xfail is None for phase in mine.phases)
        code = _OTHER if not passed else _PASSED if mine.phases else _BESIDE
        try:
            codes = self._meet(item, code)
            if max(codes) < _OTHER:
                return reports if mine.phases else _reports(item, reports, [])
            parts = together.gather(mine)
        except Lost as lost:
            parts = self._without(lost, mine)
        verdicts = agree(parts, together.size)
        if together.lost:
            item.session.shouldstop = "a rank is lost, so the job ends"
            if together.rank == together.speaker != 0:  # the one that has a terminal is lost
                said = "\n".join(verdict.text for verdict in verdicts)
                os.write(self._stderr, f"\n{item.nodeid}\n{said}\n".encode())
        elif any(verdict.outcome == "failed" for verdict in verdicts) or any(
            part.told for part in parts
        ):
            together.heal()
        return _reports(item, reports if mine.phases else [], verdicts)

    def _keep(self, report: pytest.TestReport) -> None:
        """Keep a report, for when the job ends before pytest says them all."""
        reporter = self.config.pluginmanager.get_plugin("terminalreporter")
        if self._last_words is None or reporter is None:
            return
        if report.failed:
            at = "" if report.when == "call" else f"ERROR at {report.when} of "
            title = f" {at}{report.head_line} "
            word = "FAILED" if report.when == "call" else "ERROR"
            crash = getattr(report.longrepr, "reprcrash", None)
            said = "" if crash is None else f" - {crash.message}".partition("\n")[0]
            text = f"{title:_^80}\n{report.longreprtext}"
            self._last_words.failed(text, f"{word} {report.nodeid}{said}")
        counts = [f"{len(found)} {kind}" for kind, found in reporter.stats.items() if kind]
        self._last_words.counts(", ".join(counts))

    def _without(self, lost: Lost, mine: Part) -> list[Part]:
        """Return what became of the test, where ranks are lost."""
        parts = [part for part in lost.others if isinstance(part, Part)] or [mine]
        for rank, how in lost.said.items():
            place = ("", 0, f"rank {rank} {how.splitlines()[0]}")
            text = f"rank {rank} {how}"
            parts.append(Part(rank, [Phase("call", "failed", text=text, place=place)]))
        return sorted(parts, key=lambda part: part.rank)

    def _look(self) -> bool:
        """In a thread, end the job where no rank has come to the meeting in time."""
        self._let_time_pass()
        if monotonic() > self._over:
            said = self.together.whereabouts()
            if said is not None:
                text = f"\nmpicoll: {self._test}: no rank could be stopped past the limit\n{said}\n"
                os.write(self._stderr, text.encode())
                self._test = ""
                end_job(1)
        return True

    def _let_time_pass(self) -> None:
        """Have this rank's clock stand still while a debugger's prompt is open on any."""
        before, self._looked = self._looked, time.monotonic()
        was = self._halted
        self._halted = self.together.is_halted(listens=was and not self.together.halted)
        if self._halted:  # (the engine listens seldom now, as by the same clock)
            process().ahead -= self._looked - before
            faulthandler.cancel_dump_traceback_later()
        elif was and self._over < math.inf:
            self._bound()

    def _say_own_end(self) -> None:
        """Have a rank that ends itself say so: the launcher then ends the others at once."""
        leave, own, rank = os._exit, os.getpid(), self.together.rank

        def leave_and_say(status: int) -> NoReturn:
            at = sys._getframe(1)
            if os.getpid() == own and self._test and not _is_ours(at.f_code.co_filename):
                where = f"os._exit({status}) at {at.f_code.co_filename}:{at.f_lineno}"
                said = f"\nmpicoll: rank {rank} ends in {self._test}, by {where}\n"
                os.write(self._stderr, said.encode())
                time.sleep(0.2)  # in which the launcher passes it on
            leave(status)

        os._exit = leave_and_say
        self.config.add_cleanup(lambda: setattr(os, "_exit", leave))

    # ---- after the last test ----

    def _save_coverage(self) -> None:
        """Have rank 0's pytest-cov combine what was measured on all ranks."""
        plugin: Any = self.config.pluginmanager.get_plugin("_cov")
        controller = getattr(plugin, "cov_controller", None)
        if controller is not None and self.together.rank > 0:
            controller.cov.stop()
            controller.cov.save()
            controller.finish = lambda: None
            plugin.options.cov_report, plugin.options.cov_fail_under = {}, None

    def pytest_internalerror(self, excrepr: object) -> None:
        """Let the peers hear of it."""
        self._leave(f"left the session: {str(excrepr).splitlines()[-1]}")

    def pytest_keyboard_interrupt(self) -> None:
        """Let the peers hear of it."""
        self._leave("was interrupted")

    def _leave(self, why: str) -> None:
        if not self._gone and not self.together.lost:
            self._gone = True
            self.together.leave(why)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> Hook:
        """Agree on the exit status."""
        yield
        together = self.together
        if self._last_words is not None:  # pytest has said all
            self.config.get_terminal_writer().flush()
            self._last_words.over()
        if self._gone or together.lost:
            return
        if not self._collected:
            for _, text in self._uncollected[-1:]:
                self._leave(f"ended before its tests: {text.splitlines()[-1]}")
            self._leave_unseen()
            return
        try:
            codes, _ = together.meet(int(session.exitstatus), 0, MAKING)
            session.exitstatus = max(codes)
            together.end()
        except (Left, Lost) as error:
            self._gone = True
            print(f"mpicoll: at the end of the session: {error}", file=sys.stderr)
            session.exitstatus = session.exitstatus or 1

    @pytest.hookimpl(trylast=True)
    def pytest_unconfigure(self) -> None:
        """End the job, where a rank is lost and the others have come to their end."""
        if self.together.lost:
            sys.stdout.flush()
            self._test = ""
            self.together.end_the_job()


_PHASES = pytest.StashKey[list[Phase]]()


def _phase(report: pytest.TestReport, call: pytest.CallInfo[None], line: str) -> Phase:
    """Return what is to be said of a phase's end on this rank."""
    xfail = getattr(report, "wasxfail", None)
    phase = Phase(report.when, report.outcome, xfail, line=line, at=call.stop)
    error = call.excinfo.value if call.excinfo is not None else None
    if report.skipped and xfail is None:
        phase.text, phase.place = text_of(report.longrepr)
        phase.line = phase.text.removeprefix("Skipped: ")
    elif not report.passed:
        phase.text = report.longreprtext
        phase.output = list(report.sections)
        crash = getattr(report.longrepr, "reprcrash", None)
        message = line or phase.text.partition("\n")[0]
        phase.place = (
            ("", 0, message) if crash is None else (crash.path, crash.lineno, crash.message)
        )
        phase.line = line or message
        phase.degree = FOLLOWS if _follows(error) else LATE if _is_late(error) else CAUSE
    return phase


def _follows(error: BaseException | None) -> bool:
    """Whether an exception goes back to what a peer did."""
    while error is not None:
        if isinstance(error, (RemoteRankError, RankFailedError)):
            return True
        error = error.__cause__
    return False


def _is_late(error: BaseException | None) -> bool:
    return isinstance(error, CollectiveTimeoutError) or (
        isinstance(error, Overdue) and error.waited
    )


def _is_ours(file: str) -> bool:
    """Whether a file is the library's, and no test."""
    return file.startswith(LIBRARY) and file != _CONTRACT


def _places(excinfo: pytest.ExceptionInfo[BaseException]) -> list[TracebackEntry]:
    """Return the frames that are neither the library's nor of a package beside pytest."""
    beside = str(Path(pytest.__file__).parents[1]) + os.sep
    files = ((str(entry.path), entry) for entry in excinfo.traceback)
    return [x for file, x in files if not _is_ours(file) and not file.startswith(beside)]


def _without_library(
    excinfo: pytest.ExceptionInfo[BaseException],
) -> pytest.ExceptionInfo[BaseException]:
    """Leave the library's frames out of the traceback of what it raises on purpose."""
    error: BaseException | None = excinfo.value
    while isinstance(error, _OURS):
        trace, kept = error.__traceback__, []
        while trace is not None:
            if not _is_ours(trace.tb_frame.f_code.co_filename):
                kept.append(trace)
            trace = trace.tb_next
        for old in reversed(kept):
            trace = TracebackType(trace, old.tb_frame, old.tb_lasti, old.tb_lineno)
        error.__traceback__ = trace or error.__traceback__
        error = error.__cause__
    return pytest.ExceptionInfo.from_exception(excinfo.value)


def _reports(
    item: pytest.Item, own: list[pytest.TestReport], verdicts: list[Verdict]
) -> list[pytest.TestReport]:
    """Return this rank's reports of a test with the verdicts in them."""
    mine: dict[str | None, pytest.TestReport] = {report.when: report for report in own}
    said = {verdict.when: verdict for verdict in verdicts}
    found = []
    for when in ("setup", "call", "teardown"):
        report = mine.get(when)
        if report is None:
            report = pytest.TestReport(item.nodeid, item.location, {}, "passed", None, when)
        verdict = said.get(when)
        report.outcome = verdict.outcome if verdict else "passed"  # type: ignore[assignment]
        report.longrepr = None
        report.__dict__.pop("wasxfail", None)
        if verdict is not None:
            if verdict.xfail is not None:
                report.wasxfail = verdict.xfail
                report.longrepr = verdict.text or None
            elif verdict.outcome == "skipped":
                file, line, _ = verdict.place
                report.longrepr = (file, line, verdict.text)
            else:
                report.longrepr, report.sections = Merged(verdict, item), []
        found.append(report)
    if "setup" in said and said["setup"].outcome != "passed":
        del found[1]
    return found
