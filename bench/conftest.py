"""Options of `pytest bench --benchmark-only`, and the results file that it writes."""

import datetime
from pathlib import Path

import pytest
import torch

from bench import harness

LOCAL = Path(__file__).parent / "results" / "local"  # not tracked by git: copy a file one level up to have it in the report


def pytest_addoption(parser):
    group = parser.getgroup("lightningdit")
    group.addoption("--shapes", choices=("xl", "b", "s", "all", "tiny"), help="default: xl on CUDA, s on CPU")
    group.addoption("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    group.addoption("--only", default="", help="contestants to keep, separated by commas: eager,ours")
    group.addoption("--rounds", type=int, default=20, help="most rounds of a case")
    group.addoption("--results", type=Path, help="the JSON file to write; default: bench/results/local/<device>_<date>.json")


def settings_of(config) -> harness.Settings:
    if not hasattr(config, "lightningdit_bench"):
        device = config.getoption("--device") or ("cuda" if torch.cuda.is_available() else "cpu")
        if device == "cuda" and not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda, but no CUDA device is visible to torch")
        chosen = config.getoption("--shapes") or ("xl" if device == "cuda" else "s")
        only = tuple(name for name in config.getoption("--only").split(",") if name)
        dry = chosen == "tiny"
        config.lightningdit_bench = harness.Settings(
            shapes=("xl", "b", "s") if chosen == "all" else (chosen,),
            device=device,
            only=only,
            rounds=(min(5, config.getoption("--rounds")), config.getoption("--rounds")),
            case_s=20.0 if device == "cuda" else 2.0,
            sample_ms=0.1 if dry else 5.0,
            warmup_s=3.0 if device == "cuda" and not dry else 0.0,
        )
    return config.lightningdit_bench


def pytest_generate_tests(metafunc):
    if "shapes" in metafunc.fixturenames:
        metafunc.parametrize("shapes", settings_of(metafunc.config).shapes)


@pytest.fixture
def settings(request):
    return settings_of(request.config)


def pytest_sessionfinish(session):
    settings = getattr(session.config, "lightningdit_bench", None)
    if settings is None or not settings.records:
        return
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d_%H%M%S")
    path = session.config.getoption("--results") or LOCAL / f"{settings.device}_{date}.json"
    harness.write(path, harness.environment(settings.device) | dict(results=settings.records))
    settings.written = path


def pytest_terminal_summary(terminalreporter, config):
    settings = getattr(config, "lightningdit_bench", None)
    if settings is None or not settings.records:
        return
    from bench.report import text_table

    terminalreporter.section("medians of interleaved rounds")
    for line in text_table(settings.records):
        terminalreporter.write_line(line)
    terminalreporter.write_line(f"\n{settings.written}")
