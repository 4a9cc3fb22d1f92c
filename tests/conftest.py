"""Fixtures shared by the tests."""

import json
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
