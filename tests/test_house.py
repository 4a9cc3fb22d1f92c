"""The rules of the house that no other tool checks: which way imports run, no machine's paths, nothing that unpickles."""

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("kernels", "lightningdit", "train", "bench", "tests")
SOURCES = [ROOT / "setup.py", *(path for room in ROOMS for path in sorted((ROOT / room).rglob("*.py")))]
TEXTS = [path for path in ROOT.iterdir() if path.is_file() and path.name != ".git"] + [
    path for room in (*ROOMS, "docs", ".ci") for path in sorted((ROOT / room).rglob("*")) if path.is_file()
]

# Who may import which of the project's own packages. Nobody imports train or tests; bench is for itself and its tests.
OWN = {"lightningdit_kernels", "lightningdit", "kernels", "train", "bench", "tests"}
MAY_IMPORT = {
    "setup.py": set(),
    "kernels": {"lightningdit_kernels"},
    "lightningdit": {"lightningdit_kernels", "lightningdit"},
    "train": {"lightningdit_kernels", "lightningdit"},
    "bench": {"lightningdit_kernels", "lightningdit", "bench"},
    "tests": {"lightningdit_kernels", "lightningdit", "bench"},
}
STRANGERS = {"lightningdit/flow.py": "lightningdit.model", "lightningdit/model.py": "lightningdit.flow"}
# Besides *_triton.py: what compiles the kernels, and what sets up triton's interpreter.
IMPORT_TRITON = ("kernels/lightningdit_kernels/machine_code.py", "kernels/lightningdit_kernels/interpreter.py")
UNPICKLERS = {"pickle", "cloudpickle", "dill", "shelve", "marshal"}


def imported_modules(tree: ast.AST, path: Path) -> set[str]:
    """Full dotted names of everything imported, relative imports resolved; of `from a import b` both a and a.b."""
    package = path.relative_to(ROOT).with_suffix("").parts
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = [*package[: -node.level], *([node.module] if node.module else [])] if node.level else [node.module]
            names.add(".".join(base))
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return names


def import_offences(path: Path, source: str) -> list[str]:
    name = path.relative_to(ROOT).as_posix()
    modules = imported_modules(ast.parse(source), path)
    tops = {module.partition(".")[0] for module in modules}
    offences = [f"{name} imports {top}" for top in sorted(tops & OWN - MAY_IMPORT[name.partition("/")[0]])]
    if "triton" in tops and not (name.endswith("_triton.py") or name in IMPORT_TRITON):
        offences.append(f"{name} imports triton")
    if name in STRANGERS and STRANGERS[name] in modules:
        offences.append(f"{name} imports {STRANGERS[name]}")
    if "lightningdit_kernels.testing" in modules and not name.startswith(("tests/", "bench/")):
        offences.append(f"{name} imports lightningdit_kernels.testing")
    return offences


def loading_offences(path: Path, source: str) -> list[str]:
    name = path.relative_to(ROOT).as_posix()
    tree = ast.parse(source)
    tops = {module.partition(".")[0] for module in imported_modules(tree, path)}
    forbidden = set() if name.startswith("tests/") else tops & UNPICKLERS  # tests forge hostile files
    offences = [f"{name} imports {top}" for top in sorted(forbidden)]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        arguments = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        unsafe = (
            called == "torch.load" and arguments.get("weights_only") != "True",
            called in ("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "joblib.load", "eval", "exec"),
            called in ("np.load", "numpy.load") and arguments.get("allow_pickle", "False") != "False",
        )
        if any(unsafe):
            offences.append(f"{name}:{node.lineno} calls {ast.unparse(node)}")
    return offences


def machine_paths(text: str) -> list[str]:
    """Absolute paths that exist on somebody's machine only."""
    return re.findall(r"(?<![\w.$}:/-])/(?:home|root|work|Users|mnt|scratch|private)/\w[\w./-]*|[A-Z]:\\{1,2}Users\\\w+", text)


def test_imports_run_one_way():
    assert len(SOURCES) > 20
    assert [offence for path in SOURCES for offence in import_offences(path, path.read_text(encoding="utf-8"))] == []


def test_nothing_unpickles():
    assert [offence for path in SOURCES for offence in loading_offences(path, path.read_text(encoding="utf-8"))] == []


def test_no_machine_paths():
    found = []
    for path in TEXTS:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # images, tensors, compiled files
        if path != Path(__file__).resolve():
            found += [f"{path.relative_to(ROOT)}: {hit}" for hit in machine_paths(text)]
    assert found == []


def test_script_folders_are_not_packages():
    """A package named kernels or tests would shadow, or be shadowed by, others of that name."""
    folders = [ROOT / "kernels", ROOT / "kernels" / "csrc", *(p for room in ("train", "bench", "tests") for p in [ROOT / room])]
    nested = [path for room in ("train", "bench", "tests") for path in (ROOT / room).rglob("__init__.py")]
    assert [folder for folder in folders if (folder / "__init__.py").exists()] + nested == []


@pytest.mark.parametrize(
    "name, source",
    [
        ("kernels/lightningdit_kernels/norm.py", "from lightningdit.model import Block"),
        ("kernels/lightningdit_kernels/norm.py", "import triton.language as tl"),
        ("tests/kernels/test_norm.py", "import triton"),
        ("tests/kernels/conftest.py", "import triton"),
        ("kernels/lightningdit_kernels/traffic.py", "from triton.runtime import interpreter"),
        ("kernels/lightningdit_kernels/norm.py", "from lightningdit_kernels.testing import random_tensor"),
        ("lightningdit/flow.py", "from . import model"),
        ("lightningdit/flow.py", "from .model import LightningDiT"),
        ("lightningdit/model.py", "def late():\n    from lightningdit import flow"),
        ("lightningdit/tokenizer/vavae.py", "import train.dit"),
        ("lightningdit/cli.py", "from tests import conftest"),
        ("train/dit.py", "import bench.providers"),
    ],
)
def test_a_forbidden_import_is_found(name, source):
    assert len(import_offences(ROOT / name, source)) == 1


def test_relative_imports_of_a_nested_package_are_resolved():
    path = ROOT / "lightningdit" / "tokenizer" / "vavae.py"
    assert imported_modules(ast.parse("from ..flow import loss"), path) == {"lightningdit.flow", "lightningdit.flow.loss"}


@pytest.mark.parametrize(
    "source",
    ["import pickle", "from pickle import loads", "torch.load(f)", "torch.load(f, weights_only=False)", "yaml.load(f, L)", "exec(text)"],
)
def test_unsafe_loading_is_found(source):
    assert len(loading_offences(ROOT / "train" / "dit.py", source)) == 1


def test_machine_paths_are_found():
    assert machine_paths("open('/home/me/data.pt')") and machine_paths("C:\\Users\\me") and machine_paths("see /root/x")
    assert not machine_paths("../shared/golden https://example.org/home/x lightningdit/work/x $HOME/root/x")


def requirements(*groups: str) -> dict[str, str]:
    """Least version by name of the lists that setup.py assigns to these names or passes as these keywords."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))):
        names = [target.id for target in node.targets] if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) else []
        if set([*names, getattr(node, "arg", None)]) & set(groups):
            found |= dict(re.match(r"([\w-]+)>=([\d.]+)", entry.value).groups() for entry in node.value.elts)
    return found


def pinned(name: str) -> dict[str, str]:
    """Version by name, in lower case, of a file of constraints."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    return {package.lower(): version for package, _, version in (line.partition("==") for line in lines if not line.startswith("#"))}


@pytest.mark.parametrize("package", ["torch", "triton"])
def test_the_least_version_is_the_one_that_is_tested(package):
    """What setup.py claims of the two packages that break most, `make test` shows."""
    least = requirements("install_requires")[package]
    assert pinned("constraints.txt")[package].startswith(f"{least}.")


@pytest.mark.parametrize("constraints", ["constraints.txt", "constraints-newest.txt"])
def test_constraints_pin_every_requirement(constraints):
    assert requirements("install_requires", "TEST").keys() <= pinned(constraints).keys()


def test_constraints_pin_everything_that_make_installs():
    """Its requirements, and theirs, and so on: what DALI brings decodes images."""
    constraints = {name.replace("_", "-") for name in pinned("constraints.txt")}
    if importlib.metadata.version("torch") != pinned("constraints.txt")["torch"]:
        pytest.skip("another environment than .venv")
    found, waiting = set(), [("lightningdit", "dev")]
    while waiting:
        name, extra = one = waiting.pop()
        if one in found:
            continue
        found.add(one)
        try:
            required = importlib.metadata.requires(name) or ()
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"{name} is not installed: another environment than .venv")
        for requirement in map(Requirement, required):
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                other = requirement.name.lower().replace("_", "-")
                waiting += [(other, more) for more in ("", *requirement.extras)]
    assert {name for name, _ in found} - constraints <= {"lightningdit", "setuptools", "wheel"}
