"""Options of `pytest bench --benchmark-only`, and the results file that it writes."""

import datetime
import itertools
from pathlib import Path

import pytest
import torch

from bench import harness, missing
from bench.missing import pytest_fixture_setup, pytest_pyfunc_call  # noqa: F401  hooks

LOCAL = Path(__file__).parent / "results" / "local"  # not tracked by git: copy a file one level up to have it in the report


def pytest_addoption(parser):
    group = parser.getgroup("lightningdit")
    group.addoption("--shapes", choices=("xl", "l", "b", "s", "all", "tiny"), help="default: xl on CUDA, s on CPU")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--batch", help="batches in place of the preset's, separated by commas: 8,32,128,256")
    group.addoption("--tokens", help="tokens in place of 256: 256,1024")
    group.addoption("--head-dim", help="head dimensions in place of the preset's, for attention: 64,72")
    group.addoption("--dtypes", help="default: bfloat16,float16,float32 on CUDA, float32,bfloat16 on CPU")
    group.addoption("--case-s", type=float, help="seconds to measure a case; default: 20 on CUDA, 2 on CPU")
    group.addoption("--warmup-s", type=float, help="seconds of warm-up a case; default: 3 on CUDA, 0 on CPU")
    group.addoption("--first-step-s", type=float, help="seconds for the first step in a fresh process, at most; default: 150")
    group.addoption("--official", type=Path, help="a checkout of github.com/hustvl/LightningDiT, for bench_step.py")
    group.addoption("--only", default="", help="contestants to keep, separated by commas: eager,ours")
    group.addoption("--compile-only", action="store_true", help="of ops: end after everybody's first call, caches on disk filled")
    group.addoption("--rounds", type=int, default=20, help="most rounds of a case")
    group.addoption("--results", type=Path, help="the JSON file to write; default: bench/results/local/<device>_<date>.json")


def settings_of(config) -> harness.Settings:
    if not hasattr(config, "lightningdit_bench"):
        device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda, but no CUDA device is visible to torch")
        chosen = config.getoption("--shapes") or ("xl" if device == "cuda" else "s")
        only = tuple(name for name in config.getoption("--only").split(",") if name)
        dry, cuda = chosen == "tiny", device == "cuda"
        warmup_s = config.getoption("--warmup-s")
        if warmup_s is None:
            warmup_s = 3.0 if cuda and not dry else 0.0
        config.lightningdit_bench = harness.Settings(
            shapes=("xl", "b", "s") if chosen == "all" else (chosen,),
            device=device,
            only=only,
            rounds=(min(5, config.getoption("--rounds")), config.getoption("--rounds")),
            case_s=config.getoption("--case-s") or (20.0 if cuda else 2.0),
            sample_ms=0.1 if dry else 5.0,
            warmup_s=warmup_s,
            compile_only=config.getoption("--compile-only"),
            long_rows=not config.getoption("--tokens"),
            path=config.getoption("--results") or LOCAL / f"{device}_{datetime.datetime.now(datetime.UTC):%Y-%m-%d_%H%M%S}.json",
        )
    return config.lightningdit_bench


def numbers(config, option: str, default: tuple = ()) -> tuple:
    """The option's whole numbers; UsageError for anything else."""
    given = config.getoption(option)
    if not given:
        return default
    if not all(part.isdigit() and int(part) > 0 for part in given.split(",")):
        raise pytest.UsageError(f"{option} is {given!r}, expected whole numbers above 0 separated by commas")
    return tuple(map(int, given.split(",")))


def dtypes_of(config) -> list[torch.dtype]:
    default = dict(cuda="bfloat16,float16,float32", cpu="float32,bfloat16")[settings_of(config).device]
    names = (config.getoption("--dtypes") or default).split(",")
    if not set(names) <= {"bfloat16", "float16", "float32"}:
        raise pytest.UsageError(f"--dtypes is {','.join(names)!r}, expected some of bfloat16,float16,float32")
    return [getattr(torch, name) for name in names]


def pytest_generate_tests(metafunc):
    config, fixtures = metafunc.config, metafunc.fixturenames
    if "settings" not in fixtures:
        return
    fixed = ",".join(mark.args[0] for mark in metafunc.definition.iter_markers("parametrize"))
    settings, ceiling = settings_of(config), metafunc.module.__name__.endswith("bench_ceilings")
    if "dtype" in fixtures and "dtype" not in fixed:
        metafunc.parametrize("dtype", dtypes_of(config), ids=lambda dtype: str(dtype).removeprefix("torch."))
    if "variant" in fixtures:
        ops = next(mark.args[1] for mark in metafunc.definition.iter_markers("parametrize") if mark.args[0] == "op")
        metafunc.parametrize("variant", list(dict.fromkeys(["", *(harness.VARIANTS[op][0] for op in ops if op in harness.VARIANTS)])))
    if "batch" in fixtures:
        metafunc.parametrize("batch", numbers(config, "--batch", (128, 256) if settings.device == "cuda" else (2,)))
    if "shapes" in fixtures:
        points = [settings.shapes]
        if not ceiling:
            heads = numbers(config, "--head-dim") if metafunc.module.__name__.endswith("bench_attention") else ()
            for letter, values in (("B", numbers(config, "--batch")), ("N", numbers(config, "--tokens")), ("Dh", heads)):
                points += [[f"/{letter}{value}" for value in values]] if values else []
        metafunc.parametrize("shapes", list(map("".join, itertools.product(*points))))


def pytest_collection_modifyitems(items):
    """Not every op has every variant in every dtype."""
    def wanted(item):
        point = getattr(item, "callspec", None) and item.callspec.params
        return not point or "variant" not in point or harness.is_measured(*(point[name] for name in ("op", "dtype", "shapes", "variant")))

    items[:] = filter(wanted, items)


@pytest.fixture
def settings(request):
    return settings_of(request.config)


def pytest_terminal_summary(terminalreporter, config):
    missing.pytest_terminal_summary(terminalreporter)
    settings = getattr(config, "lightningdit_bench", None)
    if settings is None or not settings.records:
        return
    from bench.report_kernels import text_table

    terminalreporter.section("medians of interleaved rounds")
    for line in text_table(settings.records):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"\n{settings.path}")
