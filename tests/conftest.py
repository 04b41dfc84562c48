"""Names at the end every component that a machine could not give, which fails the run in CI, and what an object store
that was tested does not support, which does not."""

from __future__ import annotations

import os
import signal

import pytest
from hypothesis import settings

from support.databases import database, database_url, flag, own_postgresql, postgresql

__all__ = ["database", "database_url", "own_postgresql", "postgresql"]

# CI judges a change by the same examples every time; everybody else's runs search on. How long an example takes says
# how busy the machine is: time is bounded for whole tests only.
settings.register_profile("search", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "search")

# what a shell runs in the background, or under nohup, ignores these, and so would every program that a test starts
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

_MISSING, _UNSUPPORTED = "component:", "unsupported:"
_not_run: dict[str, list[str]] = {}
_unsupported: set[str] = set()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason.startswith(_MISSING):
            _not_run.setdefault(reason.removeprefix(_MISSING).strip(), []).append(report.nodeid)
        elif reason.startswith(_UNSUPPORTED):
            _unsupported.add(reason.removeprefix(_UNSUPPORTED).strip())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, tests in sorted(_not_run.items()):
        terminalreporter.write_line(f"not run: {name} ({len(tests)} tests)", yellow=True)
    for what in sorted(_unsupported):
        terminalreporter.write_line(f"not supported: {what}", yellow=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if flag("AETHER_FAST_TEST"):
        for item in items:
            if item.get_closest_marker("heavy"):
                item.add_marker(pytest.mark.skip(reason="heavy, and AETHER_FAST_TEST is set"))


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _not_run and os.environ.get("CI") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
