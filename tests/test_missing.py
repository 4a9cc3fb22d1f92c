"""Tests that need a package that is not installed are skipped, and the summary says which."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
CONFTEST = """
from bench.missing import pytest_fixture_setup, pytest_pyfunc_call, pytest_terminal_summary
"""
TESTS = """
import pytest
from lightningdit.optional import MissingPackage, optional

@pytest.fixture
def absent():
    with optional("a fixture"):
        import no_such_package

def test_absent():
    with optional("a test"):
        import no_such_package

def test_absent_in_a_fixture(absent): pass

def test_installed():
    raise MissingPackage("json has another version", name="json")

def test_other_skip(): pytest.skip("needs a GPU")

def test_passes(): pass
"""


@pytest.fixture(scope="module")
def summary(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("missing")
    (folder / "conftest.py").write_text(CONFTEST)
    (folder / "test_some.py").write_text(TESTS)
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(folder)]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
        cwd=folder,
    )
    return done.stdout + done.stderr


def test_what_is_not_installed_is_a_skip(summary: str) -> None:
    assert "1 failed, 1 passed, 3 skipped" in summary


def test_a_package_that_is_there_is_no_reason_to_skip(summary: str) -> None:
    assert "json has another version" in summary


@pytest.mark.parametrize("name", ["test_absent", "test_absent_in_a_fixture"])
def test_the_summary_names_what_was_skipped(summary: str, name: str) -> None:
    section = summary.partition("2 skipped for want of packages")[2]
    assert f"test_some.py::{name}" in section


def test_other_skips_are_not_listed(summary: str) -> None:
    assert "test_other_skip" not in summary
