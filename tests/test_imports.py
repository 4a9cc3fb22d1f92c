"""With torch, triton, numpy, safetensors and pytest alone: kernels, model, benchmarks, the CUDA tests."""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import lightningdit
import lightningdit_kernels
from bench import gpu, gpu_tests
from lightningdit_kernels import native

ROOT = Path(__file__).resolve().parent.parent
NEEDED = ("torch", "triton", "numpy", "safetensors", "pytest", "pytest-benchmark")
BENCHMARKS = sorted({arguments[0] for arguments in gpu.STAGES.values()})
OWN = {"lightningdit", "lightningdit_kernels", "bench", "train", "tests"}
PYTEST = ("-q", "--device", "cpu", "-p", "no:cacheprovider")
needs_kernels = pytest.mark.skipif(not native.available, reason=native.about)
# As sitecustomize.py it is the first thing that a process imports, and every process that it starts.
BLOCKER = """
import sys
from importlib.metadata import DistributionFinder, MetadataPathFinder
from importlib.machinery import PathFinder

ALLOWED = frozenset({allowed}) | sys.stdlib_module_names
DISTRIBUTIONS = frozenset({distributions})
find_spec, find_distributions = PathFinder.find_spec, MetadataPathFinder.find_distributions


def find_allowed_spec(cls, name, path=None, target=None):
    top = name.partition(".")[0]
    known = top in ALLOWED or top.startswith("_sysconfigdata")
    if not known or name.startswith("nvidia.dali"):
        return None
    return find_spec(name, path, target)


def find_allowed_distributions(context=DistributionFinder.Context()):
    # torch imports optree, which it does not require, where it finds this.
    if context.name is not None and context.name.lower().replace("_", "-") not in DISTRIBUTIONS:
        return []
    return find_distributions(context)


PathFinder.find_spec = classmethod(find_allowed_spec)
MetadataPathFinder.find_distributions = staticmethod(find_allowed_distributions)
"""


def distribution_name(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement)[0].lower().replace("_", "-")


def required(names: tuple[str, ...]) -> set[str]:
    """The distributions and what they require, and so on, as far as it is installed; without extras."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        try:
            requirements = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        if name not in found:
            found.add(name)
            waiting += [distribution_name(line) for line in requirements if "extra ==" not in line]
    return found


@pytest.fixture(scope="module")
def blocked(tmp_path_factory):
    """blocked(arguments of Python) -> CompletedProcess, in which other packages are as good as not installed."""
    folder = tmp_path_factory.mktemp("blocked")
    distributions = required(NEEDED)
    allowed = {
        module
        for module, owners in importlib.metadata.packages_distributions().items()
        if distributions & {owner.lower().replace("_", "-") for owner in owners}
    }
    assert {"torch", "numpy", "sympy"} <= allowed
    assert not allowed & {"tyro", "yaml", "PIL", "tqdm", "sklearn", "matplotlib", "tensorboard"}
    lists = dict(
        allowed=sorted(allowed | OWN), distributions=sorted(distributions | {"lightningdit"})
    )
    (folder / "sitecustomize.py").write_text(BLOCKER.format(**lists))
    paths = os.pathsep.join(map(str, (folder, ROOT, ROOT / "kernels")))
    # Plugins that are installed beside pytest-benchmark are not there either.
    environment = dict(PYTHONPATH=paths, PYTEST_DISABLE_PLUGIN_AUTOLOAD="1", OMP_NUM_THREADS="1")

    def run(*arguments):
        options = dict(cwd=ROOT, env=os.environ | environment, timeout=600)
        command = [sys.executable, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, **options)

    return run


def modules() -> list[str]:
    """All of both packages, and of the benchmarks what runs on a GPU."""
    sources = ((lightningdit, ROOT), (lightningdit_kernels, ROOT / "kernels"))
    files = []
    for package, top in sources:
        paths = sorted((top / package.__name__).rglob("*.py"))
        files += [path.relative_to(top) for path in paths]
    files += [Path("bench", name) for name in ("gpu.py", "gpu_tests.py", "conftest.py")]
    files += [Path(name) for name in BENCHMARKS]
    names = [path.with_suffix("").as_posix().replace("/", ".") for path in files]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


IMPORT_ALL = """
import importlib, json, sys

failed = {}
for name in json.loads(sys.argv[1]):
    try:
        importlib.import_module(name)
    except Exception as error:
        failed[name] = repr(error)
print(json.dumps(failed))
"""


def test_the_others_are_blocked(blocked):
    """Without this nothing below would say anything."""
    for name in ("tyro", "yaml", "PIL", "tqdm", "nvidia.dali"):
        result = blocked("-c", f"import {name}")
        assert f"ModuleNotFoundError: No module named '{name}'" in result.stderr, name


def test_every_module_is_imported(blocked):
    names = modules()
    assert len(names) > 50
    result = blocked("-c", IMPORT_ALL, json.dumps(names))
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == {}


def test_the_report_of_backends_is_printed(blocked):
    result = blocked("-m", "lightningdit_kernels")
    assert result.returncode == 0, result.stderr
    assert "rms_norm_modulate" in result.stdout


def collected_files(printed: str) -> set[str]:
    return {Path(line.partition("::")[0]).name for line in printed.splitlines() if "::" in line}


def test_cuda_tests_are_collected(blocked):
    files = gpu_tests.files_of(ROOT / "tests")
    options = ("-m", "gpu", "--collect-only", "-q", "-p", "no:cacheprovider")
    result = blocked(*gpu.PYTEST[1:], *files, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    # test_gpu_runs.py has its CUDA tests in strings.
    assert {path.name for path in files} - collected_files(result.stdout) <= {"test_gpu_runs.py"}


def test_benchmarks_are_collected(blocked):
    result = blocked(*gpu.PYTEST[1:], *BENCHMARKS, "--collect-only", *PYTEST)
    assert result.returncode == 0, result.stdout + result.stderr
    assert collected_files(result.stdout) == {Path(file).name for file in BENCHMARKS}


@needs_kernels
def test_training_steps_are_measured_and_digits_are_skipped_without_scikit_learn(blocked, tmp_path):
    """One with the other, as a stage of bench/gpu.py: importing is not running."""
    options = (
        f"--benchmark-only --shapes tiny --rounds 2 -rs --results {tmp_path}/step.json".split()
    )
    options += ["--only", "reference eager,ours eager", *PYTEST]
    growth = "bench/bench_growth.py::bench_growth[depth]"  # its fits, not its points, need scipy
    result = blocked(*gpu.PYTEST[1:], "bench/bench_step.py", growth, *options)
    assert result.returncode == 0, result.stdout + result.stderr
    records = json.loads((tmp_path / "step.json").read_text())["results"]
    *steps, grown = records
    assert grown["kind"] == "growth"
    assert sorted(record["part"] for record in steps) == ["kernels", "ladder"]
    for record in steps:
        assert [row["name"] for row in record["rows"]] == ["reference eager", "ours eager"]
    (reason,) = re.findall(r"^SKIPPED \[1\] \S+: (.*)$", result.stdout, re.MULTILINE)
    assert "pip install scikit-learn" in reason


def test_a_missing_package_is_named_with_the_pip_command(blocked):
    code = "from lightningdit.images import ImageBatches\nImageBatches([0] * 4, 2, image_size=8)"
    assert (
        "MissingPackage: decoding images needs `pip install pillow`" in blocked("-c", code).stderr
    )
    result = blocked("-c", "from lightningdit.cli import main; main(['sample', '--help'])")
    assert result.returncode == 1
    assert "error: the command line needs `pip install tyro`" in result.stderr


def test_progress_bars_are_left_out_without_tqdm_which_is_logged_once(blocked):
    code = (
        "from lightningdit.optional import progress_bar\n"
        "for _ in range(2):\n"
        "    with progress_bar(total=3) as bar:\n"
        "        bar.update(2)\n"
        "print(bar.n, list(progress_bar(range(3))), list(progress_bar([4], disable=True)))\n"
    )
    result = blocked("-c", code)
    assert result.stdout == "2 [0, 1, 2] [4]\n"
    assert result.stderr.count("a progress bar needs `pip install tqdm`") == 1


def test_a_process_that_compiles_nothing_imports_no_compiler(blocked):
    code = "import sys, torch, lightningdit.generation; from lightningdit_kernels import swiglu; swiglu(torch.ones(4, 64))"
    result = blocked("-c", f"{code}; print('torch._dynamo' in sys.modules)")
    assert result.stdout == "False\n", "it takes over a second" + result.stderr


@needs_kernels
def test_training_imports_nothing_that_takes_seconds(tmp_path):
    """The compiler, SymPy, PyTorch's sharded tensors, scikit-learn and pandas: each costs as much as dozens of steps of the digits."""
    code = (
        "import runpy, sys\n"
        "try:\n"
        "    runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as end:\n"
        "    assert not end.code, end.code\n"
        "slow = ('torch._dynamo', 'sympy', 'torch.distributed.tensor', 'torch.distributed.checkpoint', 'sklearn', 'scipy', 'pandas')\n"
        "print('imported:', [name for name in slow if name in sys.modules])\n"
    )
    short = "--steps 3 --optim.warmup 1 --batch-size 16 --sample-num 10 --score.every 3 --score.num 20 --final-samples 10".split()
    script = [str(ROOT / "train" / "dit.py"), "--run", str(tmp_path / "run"), *short]
    command = [sys.executable, "-c", f"import sys; sys.argv[:] = {script!r}\n{code}"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("imported: []\n")


@needs_kernels
def test_the_first_step_of_a_process(blocked):
    options = ("--shapes", "tiny", "--device", "cpu", "--contestant", "ours eager")
    result = blocked("bench/step.py", *options)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["first_step_s"] > 0


@pytest.fixture(autouse=True)
def no_worker(monkeypatch):
    """No sign of pytest-xdist, under which pytest-benchmark measures nothing."""
    for name in [name for name in os.environ if name.startswith("PYTEST_XDIST")]:
        monkeypatch.delenv(name)
