"""Hooks for a conftest.py: what needs a package that is not installed is skipped, and the summary names packages and tests."""

import importlib.util
from collections.abc import Generator
from typing import Any

import pytest

from lightningdit.optional import MissingPackage

NOT_INSTALLED = "not installed: "  # how the reasons begin


def _skipped_if_missing() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except MissingPackage as error:
        if is_installed(error.name):
            raise
        pytest.skip(f"{NOT_INSTALLED}{error}")


def is_installed(module: str) -> bool:
    """Whether there is such a module, and not only one that another error hides."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # a test has blocked it
        return False


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, Any, Any]:
    return (yield from _skipped_if_missing())


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, Any, Any]:
    return (yield from _skipped_if_missing())


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many were skipped for it, and which: a machine without packages must not look as if it had passed."""
    tests: dict[str, list[str]] = {}
    for report in terminalreporter.stats.get("skipped", []):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else ""
        if (text := reason.removeprefix("Skipped: ")).startswith(NOT_INSTALLED):
            tests.setdefault(text, []).append(report.nodeid)
    if tests:
        terminalreporter.section(f"{sum(map(len, tests.values()))} skipped for want of packages")
    for text, names in sorted(tests.items()):
        terminalreporter.write_line(f"{text}: {', '.join(names)}")
