"""bench/check.py reports a planted slowdown and swapped providers, is not shaken by noise, and knows when the machine is another."""

import dataclasses
import json
import random
import time

import pytest

from bench import check, providers
from lightningdit_kernels import native

pytestmark = pytest.mark.skipif(not native.available, reason=native.about)


def ours(op):
    return next(one for one in providers.providers(op) if one.name == "ours")


@pytest.fixture
def baseline(tmp_path, capsys):
    path = tmp_path / "check.json"
    assert check.main(["--update", "--baseline", str(path), "--only", "swiglu", "--rounds", "8"]) == 0
    capsys.readouterr()
    return path


def compared(baseline, *arguments):
    return check.main(["--baseline", str(baseline), "--only", "swiglu", "--rounds", "8", *arguments])


def test_a_planted_slowdown_is_reported(baseline, monkeypatch, capsys):
    function = ours("swiglu").build()

    def slow(**inputs):
        function(**inputs), function(**inputs), time.sleep(0.1)  # more than a busy machine adds by itself
        return function(**inputs)

    monkeypatch.setattr(check, "providers", lambda op: [dataclasses.replace(ours(op), build=lambda: slow)])
    assert compared(baseline) == 1
    said = capsys.readouterr().out
    assert "once more: swiglu" in said and "slower than the baseline by more than 15%, changed or gone: swiglu" in said
    (line,) = [line for line in said.splitlines() if line.startswith("swiglu ")]
    assert line.endswith("slower") and float(line.split()[3]) > 1.5


def test_swapped_providers_are_noticed(baseline, monkeypatch, capsys):
    eager = next(one for one in providers.providers("swiglu") if one.name == "eager")
    monkeypatch.setattr(check, "providers", lambda op: [dataclasses.replace(eager, name="ours")])
    with pytest.raises(AssertionError, match="ours is not what ran"):
        compared(baseline)


def test_other_operators_than_in_the_baseline_are_reported(baseline, capsys):
    content = json.loads(baseline.read_text())
    content["results"][0] |= dict(operators=["lightningdit::rms_norm_modulate"], ratios=[1e6] * 8)
    baseline.write_text(json.dumps(content))
    assert compared(baseline) == 1
    assert "swiglu ran lightningdit::swiglu, lightningdit::swiglu_backward; in the baseline lightningdit::rms" in capsys.readouterr().out


def test_another_machine_is_only_reported(baseline, capsys):
    content = json.loads(baseline.read_text())
    content |= dict(cpu="another")
    content["results"][0]["ratios"] = [1e-6] * 8
    baseline.write_text(json.dumps(content))
    assert compared(baseline) == 0
    said = capsys.readouterr().out
    assert "the baseline is of another machine (cpu " in said and "changed or gone: swiglu" in said
    assert compared(baseline, "--strict") == 1


def test_only_what_the_interval_excludes_is_a_loss():
    draw = random.Random(1)
    before = [draw.lognormvariate(0, 0.3) for _ in range(40)]

    def verdict(factor, spread):
        now = [factor * draw.lognormvariate(0, spread) for _ in range(40)]
        row = dict(median_ms=1.0, operators=[], ratios=now)
        return check.compare(dict(case=row), dict(case=dict(row, ratios=before)))[0]["verdict"]

    assert [verdict(1.0, 0.3) for _ in range(5)] == ["ok"] * 5
    assert verdict(2.0, 0.3) == "slower" and verdict(0.4, 0.3) == "faster: --update"
    assert verdict(1.2, 1.0) == "ok", "20 % slower, but so noisy that it may be less than 15 %"
    assert check.compare(dict(case=dict(median_ms=1.0, operators=[], ratios=before)), {})[0]["verdict"] == "new"


def test_a_case_that_is_gone_fails(baseline, monkeypatch, capsys):
    content = json.loads(baseline.read_text())
    content["results"].append(dict(content["results"][0], name="forgotten"))
    baseline.write_text(json.dumps(content))
    monkeypatch.setattr(check, "makers", lambda folder: dict(swiglu=lambda: check.op_case("swiglu")))
    assert check.main(["--baseline", str(baseline), "--rounds", "8"]) == 1
    assert "changed or gone: forgotten" in capsys.readouterr().out


def test_every_case_runs_the_kernels_it_is_for(tmp_path):
    """Each case once; those of models must not have lost their kernels."""
    for name, make in check.makers(tmp_path).items():
        operators = check.operators(make())
        if name in ("training step", "sampling step"):
            assert {"lightningdit::swiglu", "lightningdit::rope_attention"} <= set(operators), name
        elif name in ("VA-VAE step", "encode", "decode"):
            assert "lightningdit::group_norm_silu" in operators, name
        elif name not in ("image decoding", "latent loading"):
            assert any(one.startswith(f"lightningdit::{name}") for one in operators), name


@pytest.mark.parametrize("arguments, message", [
    (["--only", "gelu"], "--only names 'gelu', expected some of"),
    (["--rounds", "2"], "--rounds is 2, expected at least 5"),
    (["--baseline", "nowhere.json"], "is absent; --update writes it"),
])
def test_wrong_arguments(arguments, message, capsys):
    with pytest.raises(SystemExit):
        check.main(arguments)
    assert message in capsys.readouterr().err
