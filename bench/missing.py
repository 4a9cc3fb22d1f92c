"""Hooks for a conftest.py: what needs a package that is not installed is skipped, and the reason names the package."""

from collections.abc import Generator
from typing import Any

import pytest

from lightningdit.optional import MissingPackage


def _skipped_if_missing() -> Generator[None, Any, Any]:
    try:
        return (yield)
    except MissingPackage as error:
        pytest.skip(str(error))


@pytest.hookimpl(wrapper=True)
def pytest_fixture_setup() -> Generator[None, Any, Any]:
    return (yield from _skipped_if_missing())


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call() -> Generator[None, Any, Any]:
    return (yield from _skipped_if_missing())
