"""Fixtures shared by the tests."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from bench import fork
from bench.missing import pytest_fixture_setup, pytest_pyfunc_call, pytest_terminal_summary  # noqa: F401  hooks
from lightningdit import config as configuration
from lightningdit.checkpoint import save_weights
from lightningdit.config import DiTConfig
from lightningdit.model import LightningDiT

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


@pytest.fixture(scope="session")
def script(tmp_path_factory):
    """script(path, *arguments) -> CompletedProcess of a Python script in a process of its own: bench.fork.run, whose options it takes.

    The exit code is checked unless check=False.
    """
    folder = tmp_path_factory.mktemp("scripts")

    def run(path, *arguments, check=True, **options):
        result = fork.run(path, *arguments, folder=folder, **options)
        assert not check or result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
        return result

    return run


@pytest.fixture(scope="session")
def digits_model():
    """digits_model(folder, ...) -> arguments of `lightningdit sample` and its like for a random model of the digits, saved in the folder.

    std is that of its parameters; sample holds settings of the recipe's section of that name; each further name in `others` is a model
    of the same shape from another seed.
    """

    def make(folder, depth=1, std=0.1, others=(), **sample):
        yaml = pytest.importorskip("yaml")
        recipe = configuration.read_yaml(ROOT / "train" / "configs" / "digits.yaml")
        recipe["model"] |= dict(size=None, patch_size=1, depth=depth, hidden_size=48, num_heads=2)
        recipe["data"]["num_classes"] = 10
        recipe["sample"] = recipe.get("sample", {}) | sample
        (folder / "config.yaml").write_text(yaml.safe_dump(recipe))
        arguments = configuration.load(DiTConfig, folder / "config.yaml").model_arguments()
        for seed, name in enumerate(("model", *others)):
            torch.manual_seed(seed)
            model = LightningDiT(**arguments)
            for parameter in model.parameters():
                torch.nn.init.normal_(parameter, std=std)
            save_weights(folder / f"{name}.safetensors", model.state_dict())
        return ["--checkpoint", str(folder / "model.safetensors"), "--config", str(folder / "config.yaml"), "--tokenizer", "digits"]

    return make


class Benchmark:
    """As much of pytest-benchmark's fixture as bench/ uses."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds, iterations):
        for _ in range(rounds * iterations):
            function()


@pytest.fixture
def stopwatch():
    """Stands for the fixture `benchmark` of pytest-benchmark, which has rounds of its own."""
    return Benchmark()
