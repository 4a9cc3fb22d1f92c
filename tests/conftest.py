"""Fixtures shared by the tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = (ROOT / "tests" / "golden", ROOT.parent / "shared" / "golden")


@pytest.fixture(scope="session")
def golden():
    """golden(name) -> (tensors by name, metadata with its JSON decoded): numbers that the official implementation computed."""

    def load(name):
        for folder in GOLDEN:
            path = folder / f"{name}.safetensors"
            if path.is_file():
                with safe_open(path, "pt") as file:
                    return {key: file.get_tensor(key) for key in file.keys()}, {k: decode(v) for k, v in (file.metadata() or {}).items()}
        pytest.skip(f"{name}.safetensors is in neither tests/golden nor ../shared/golden")

    def decode(text):
        try:
            return json.loads(text)
        except json.JSONDecodeError:
            return text

    return load


@pytest.fixture
def torchrun():
    """torchrun(n, script, *arguments) runs a script in n processes of one thread each; the result is checked unless check=False."""

    def run(processes, script, *arguments, check=True, timeout=300, **environment):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", script, *arguments]
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        environment = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=paths) | environment
        result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, timeout=timeout)
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return run
