"""Names at the end every component that a machine could not give; in CI a missing one fails the run."""

from __future__ import annotations

import os

import pytest
from hypothesis import settings

# CI judges a change by the same examples every time; everybody else's runs search on
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

_MISSING = "component:"
_not_run: dict[str, list[str]] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2]).removeprefix("Skipped: ")
        if reason.startswith(_MISSING):
            _not_run.setdefault(reason.removeprefix(_MISSING).strip(), []).append(report.nodeid)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name, tests in sorted(_not_run.items()):
        terminalreporter.write_line(f"not run: {name} ({len(tests)} tests)", yellow=True)


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if _not_run and os.environ.get("CI") and exitstatus == pytest.ExitCode.OK:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
