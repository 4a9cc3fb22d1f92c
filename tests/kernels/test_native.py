"""Loading the native library: what backends() says when it is there, missing, unreadable or of another build."""

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import lightningdit_kernels as kernels
from lightningdit_kernels import native

PACKAGE = Path(native.__file__).parent


def installed():
    return bool(list(importlib.metadata.distributions(name="lightningdit")))


@pytest.mark.skipif(not installed(), reason="runs from a checkout that was not installed")
def test_an_install_with_a_compiler_has_the_library():
    if shutil.which("c++") or shutil.which("g++") or shutil.which("clang++"):
        assert native.available, native.about
        assert kernels.backends()["swiglu"]["cpu"] == "native"


def test_backends_names_every_op():
    rows = kernels.backends()
    assert set(rows) == set(kernels.__all__) - {"backends"} | {"linear"}
    assert all(row.keys() == {"cpu", "cuda", "why"} and all(row.values()) for row in rows.values())


def test_missing_library_says_reference_and_why(tmp_path, monkeypatch):
    assert native._load(tmp_path) == (None, "the native library was never built here (pip install builds it)")
    (tmp_path / native.MISSING).write_text("no C++ compiler was found\n")
    library, about = native._load(tmp_path)
    assert library is None and about == "no C++ compiler was found"
    monkeypatch.setattr(native, "available", False)
    monkeypatch.setattr(native, "about", about)
    for op in ("swiglu", "rms_norm_modulate", "gated_residual_rms_norm_modulate"):
        row = kernels.backends()[op]
        assert row["cpu"] == "reference" and row["why"].startswith(f"CPU: {about}. CUDA: ")


def test_falling_back_is_logged_once(tmp_path):
    copy = shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("liblightningdit_kernels.*", "__pycache__"))
    command = [sys.executable, "-c", "import lightningdit_kernels, torch; lightningdit_kernels.swiglu(torch.ones(2, 4))"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(copy.parent)})
    assert run.stderr.count("no native CPU kernels: the native library was never built here") == 1


def test_unreadable_library_is_refused(tmp_path):
    (tmp_path / "liblightningdit_kernels.so").write_bytes(b"not a library")
    library, about = native._load(tmp_path)
    assert library is None and about.startswith("liblightningdit_kernels.so does not load: ")


@pytest.mark.skipif(not native.available, reason=native.about)
def test_library_of_another_build_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(native, "ABI_VERSION", 999)
    library, about = native._load(PACKAGE)
    assert library is None and "this package needs 999: install again" in about


def test_module_prints_the_table():
    command = [sys.executable, "-m", "lightningdit_kernels"]
    out = subprocess.run(command, capture_output=True, text=True, check=True, env={"PYTHONPATH": str(PACKAGE.parent)}).stdout
    assert all(op in out for op in kernels.backends()) and native.about in out
