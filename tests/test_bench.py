"""The benchmarks measure what they say, on tiny shapes; the report is what the results files hold."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.testing.compare import compare_images

from bench import gpu, harness, providers, report
from lightningdit_kernels.testing import FROZEN, OPS, example_inputs, values_and_gradients

ROOT = Path(__file__).resolve().parent.parent


def script(*arguments):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, env=environment, check=False)


class Benchmark:
    """As much of pytest-benchmark's fixture as run_case uses."""

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, rounds, iterations):
        for _ in range(rounds * iterations):
            function()


@pytest.fixture
def settings():
    return harness.Settings(("tiny",), "cpu", ("eager", "ours"), rounds=(2, 2), case_s=0.1, sample_ms=0.01, warmup_s=0.0)


def case_of(op, dtype=torch.float32):
    return harness.Case(op, "tiny", dtype, "cpu")


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_measured(op, settings):
    record = harness.run_case(Benchmark(), case_of(op, torch.bfloat16), settings)
    assert settings.records == [record] and [row["status"] for row in record["contestants"]] == ["ok", "ok"]
    for row in record["contestants"]:
        assert {"forward", "forward_backward"} <= row.keys()
        for step in harness.STEPS:
            if step not in row:
                continue  # a backward that took less than the noise
            one = row[step]
            assert 0 < one["p20_ms"] <= one["median_ms"] <= one["p80_ms"] and one["speedup_low"] <= one["speedup"] <= one["speedup_high"]
            assert one["gb_per_s"] == pytest.approx(record["counted"][step]["bytes"] / one["median_ms"] / 1e6, rel=1e-3)
    json.dumps(record)


@pytest.mark.parametrize(
    "op, forward, backward",
    [  # bytes per element in bf16, as kernels/README.md counts them; for the residual both tensors are bf16 here
        ("rms_norm_modulate", 4, 6),
        ("gated_residual_rms_norm_modulate", 8, 12),
        ("rope_attention", 8, 16),
        ("swiglu", 6, 10),
        ("marginal_cosine_loss", 4, 6),
        ("marginal_distance_matrix_loss", 4, 6),
        ("group_norm_silu", 6, 10),
    ],
)
def test_bytes_are_those_of_the_readme(op, forward, backward):
    inputs = example_inputs(op, 2, 16, 16, 192, 3, torch.bfloat16)
    counted = harness.cost(op, inputs, values_and_gradients(OPS[op], inputs, FROZEN))
    elements = 2 * 256 * 192
    for step, per_element in (("forward", forward), ("backward", backward), ("forward_backward", forward + backward)):
        assert counted[step]["bytes"] / elements == pytest.approx(per_element, rel=0.04), step  # modulation and weights: < 4 %


def test_flops_of_attention():
    inputs = example_inputs("rope_attention", 1, 16, 16, 1152, 16)
    counted = harness.cost("rope_attention", inputs, values_and_gradients(OPS["rope_attention"], inputs, FROZEN))
    assert counted["forward"]["flops"] == 301_989_888 and counted["backward"]["flops"] == 754_974_720  # per image and block of XL


def test_sizes_are_the_models():
    xl = harness.Case("swiglu", "xl", torch.bfloat16, "cuda").sizes()
    assert (xl["batch"], xl["rows"] * xl["columns"], xl["width"]) == (128, 256, 3072)
    assert harness.Case("rms_norm_modulate", "s", torch.float32, "cpu").sizes() == dict(batch=32, rows=16, columns=16, width=384, heads=6)


def contestant(monkeypatch, op, function, **more):
    peer = providers.Provider("peer", lambda: function, **more)
    monkeypatch.setattr(harness, "providers", lambda op: [*providers.providers(op)[:1], peer])


def wrong(packed, bias=None):
    return providers.eager_swiglu(packed, bias) * 1.001


def raises(packed, bias=None):
    raise RuntimeError("no kernel image")


@pytest.mark.parametrize(
    "function, more, status, reason",
    [
        (wrong, {}, "incorrect", "out.0 in torch.float32: error"),
        (raises, {}, "failed", "RuntimeError: no kernel image"),
        (raises, dict(devices=("cuda",)), "unavailable", "needs cuda"),
        (raises, dict(dtypes=(torch.bfloat16,)), "unavailable", "does not take float32"),
        (raises, dict(module="no.such.module", package="nosuch"), "unavailable", "no.such.module is not installed (pip install nosuch)"),
    ],
)
def test_who_cannot_or_may_not_run_gets_a_reason_and_no_time(function, more, status, reason, settings, monkeypatch):
    contestant(monkeypatch, "swiglu", function, **more)
    settings.only = ()
    row = harness.run_case(Benchmark(), case_of("swiglu"), settings)["contestants"][1]
    assert row["status"] == status and reason in row["reason"] and "forward" not in row


def test_ours_being_wrong_fails_the_benchmark(settings, monkeypatch):
    monkeypatch.setitem(providers.OPS, "swiglu", wrong)
    with pytest.raises(AssertionError, match="ours is not timed: out.0"):
        harness.run_case(Benchmark(), case_of("swiglu"), settings)
    assert settings.records[0]["contestants"][1]["status"] == "incorrect", "and the row is kept"


@pytest.mark.parametrize("nvidia", [False, True])
def test_apex_of_pypi_is_told_from_nvidias(nvidia, tmp_path, monkeypatch):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    if nvidia:
        (tmp_path / "apex" / "normalization").mkdir()
        (tmp_path / "apex" / "normalization" / "__init__.py").write_text("")
    assert "not installed" in providers.apex_missing()
    monkeypatch.syspath_prepend(tmp_path)
    try:
        said = providers.apex_missing()
        assert said == "" if nvidia else "PyPI's, another project" in said
    finally:
        for name in [name for name in sys.modules if name.partition(".")[0] == "apex"]:
            del sys.modules[name]


def test_every_peer_is_listed():
    names = {provider.name for op in OPS for provider in providers.providers(op)}
    peers = {"eager", "compiled", "ours", "quack", "liger", "apex", "xformers", "flash-attn 2", "flash-attn 3", "flash-attn 4"}
    assert peers | {f"sdpa {backend}" for backend in ("math", "flash", "efficient", "cudnn")} == names
    with pytest.raises(ValueError, match="op is 'gelu', expected one of"):
        providers.providers("gelu")


def test_contestants_take_turns_and_speedups_are_of_the_same_round():
    order = []

    class Scripted:
        def __init__(self, name, times):
            self.name, self.times = name, iter(times)

        def sample(self):
            order.append(self.name)
            return next(self.times)

    # The machine is twice as slow in the second half; b is always twice as slow as a.
    samples = harness.interleave(dict(a=Scripted("a", [1, 1, 2, 2]), b=Scripted("b", [2, 2, 4, 4])), rounds=4)
    assert order == ["a", "b"] * 4 and samples == dict(a=[1, 1, 2, 2], b=[2, 2, 4, 4])
    row = harness.summary(samples["b"], dict(bytes=3_000_000, flops=0), samples["a"])
    assert (row["median_ms"], row["speedup"], row["speedup_low"], row["gb_per_s"]) == (3, 0.5, 0.5, 1) and "tflop_per_s" not in row


def test_backward_is_the_rest_or_left_out():
    samples = {("a", "forward"): [1.0, 2.0, 9.0], ("a", "forward_backward"): [3.0, 4.0, 5.0]}
    assert harness._times(samples, "a", "backward") == [1, 2, 3] and harness._times(samples, "a", "forward") == [1, 2, 9]
    assert harness._times(samples | {("a", "forward_backward"): [1.9, 4.0, 5.0]}, "a", "backward") == []


def test_quantile():
    assert [harness.quantile([4.0, 1.0, 2.0, 3.0, 5.0], share) for share in (0, 0.2, 0.5, 0.8, 1)] == pytest.approx([1, 1.8, 3, 4.2, 5])


def test_inputs_rotate():
    seen = []
    timer = harness.Timer(seen.append, 3, "cpu", at_least_ms=0.0)
    for _ in range(4):
        timer.sample()
    assert seen[-4:] == [0, 1, 2, 0]


def test_stages_restart_and_merge(tmp_path):
    dry = ["bench/gpu.py", "--out", tmp_path, "--device", "cpu"]
    tiny = ["--", "--shapes", "tiny", "--only", "eager,ours", "--rounds", "2"]
    assert script(*dry, "--budget-s", 0).returncode == gpu.UNFINISHED
    done = script(*dry, "--stage", "swiglu", "--stage", "gemms", *tiny)
    assert done.returncode == 0 and "no results file yet" in done.stdout, done.stdout + done.stderr
    stages = tmp_path / "stages"
    assert len(json.loads((stages / "gemms.json").read_text())["results"][0]["rows"]) == 12
    stamp = (stages / "swiglu.json").stat().st_mtime_ns
    for name in gpu.STAGES:
        if name not in ("swiglu", "gemms"):
            shutil.copy(stages / "swiglu.json", stages / f"{name}.json")
    done = script(*dry, *tiny)
    assert done.returncode == 0 and done.stdout.count("done before") == len(gpu.STAGES), done.stdout + done.stderr
    assert (stages / "swiglu.json").stat().st_mtime_ns == stamp
    merged = json.loads((tmp_path / "kernels_cpu.json").read_text())
    assert merged["schema"] == harness.SCHEMA and {"commit", "date", "cpu", "threads", "versions"} <= merged.keys()
    assert [r["kind"] for r in merged["results"]].count("model_gemms") == 1 and len(merged["results"]) == 13
    with pytest.raises(ValueError, match="stages differ in commit: a and b"):
        harness.merge([merged | dict(commit="a"), merged | dict(commit="b")])


def test_report_is_what_the_results_hold(tmp_path):
    written = report.write_all(report.RESULTS, tmp_path)
    expected = {path.name for path in report.DOCS.glob("kernels_*.png")} | {"results.md"}
    assert {path.name for path in written} == expected, "run make report"
    assert (report.DOCS / "results.md").read_text() == (tmp_path / "results.md").read_text(), "run make report"
    for path in written[1:]:
        assert compare_images(str(report.DOCS / path.name), str(path), tol=10) is None, "run make report"


def test_report_says_what_nobody_measured_and_keeps_losses(settings, tmp_path):
    assert report.render({}).count(report.UNMEASURED) == len(OPS)
    record = harness.run_case(Benchmark(), case_of("swiglu"), settings)
    slow = copy.deepcopy(record["contestants"][1]) | dict(name="slow", version="1")
    for step in ("forward", "forward_backward"):
        slow[step] |= dict(speedup=0.5, speedup_low=0.4, speedup_high=0.6)
    record["contestants"] += [slow, dict(name="gone", version="unknown", status="unavailable", reason="needs cuda")]
    run = harness.environment("cpu") | dict(device="cuda", gpu="A Card", results=[record])
    harness.write(tmp_path / "kernels_a.json", run)
    report.write_all(tmp_path, tmp_path)
    text = (tmp_path / "results.md").read_text()
    assert text.count(report.UNMEASURED) == len(OPS) - 1 and f"| `swiglu` | {report.UNMEASURED} |" not in text
    assert "| slow 1 | both |" in text and "0.50 (0.40-0.60)" in text and "unavailable: needs cuda" in text
    assert (tmp_path / "kernels_a_roofline.png").stat().st_size > 1000
    harness.write(tmp_path / "kernels_a.json", run | dict(schema="other"))
    with pytest.raises(ValueError, match="kernels_a.json has schema 'other'"):
        report.load(tmp_path)
