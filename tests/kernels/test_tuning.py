"""The choice of a configuration: from the table alone, and measured, with a cache on disk that may be broken."""

import json
import logging
import time
from types import SimpleNamespace

import pytest
import torch

from lightningdit_kernels import tuning
from lightningdit_kernels.tuning import Config, pick

SLOW, FAST, BIG = Config(dict(ROWS=1), 4), Config(dict(ROWS=2), 8, 2), Config(dict(ROWS=64), 8, 5)
TABLE = {(80, "wide"): [BIG], (90, "wide"): [SLOW, FAST, BIG], (90, "narrow"): [FAST], (100, "wide"): [FAST]}
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class OutOfResources(Exception):
    """By the name of triton's."""


@pytest.fixture
def cuda(monkeypatch, tmp_path):
    """A CUDA device of a given architecture, as far as tuning can see; an empty cache folder; returns what was timed."""
    timed = []

    def time_ms(run):
        config = run()
        timed.append(config)
        if config == BIG:
            raise OutOfResources("shared memory")
        return 1.0 if config == FAST else 2.0

    monkeypatch.setattr(tuning, "_capability", lambda index: 90)
    monkeypatch.setattr(tuning, "_time_ms", time_ms)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", "1")
    tuning._warn_once.cache_clear()
    return timed


def new_process():
    tuning._chosen.clear()


@pytest.mark.parametrize("arch, expected", [(80, BIG), (86, BIG), (89, BIG), (90, SLOW), (100, FAST), (103, FAST)])
def test_table_gives_the_nearest_lower_architecture(arch, expected, monkeypatch):
    monkeypatch.delenv("LIGHTNINGDIT_AUTOTUNE", raising=False)
    monkeypatch.setattr(tuning, "_capability", lambda index: arch)
    assert pick("op", TABLE, CUDA, "wide", (1152,), bench=lambda config: 1 / 0) == expected


@pytest.mark.parametrize("capability, arch", [((8, 0), 80), ((9, 0), 90), ((10, 3), 103), ((12, 0), 89)])
def test_architecture_of_a_device(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    tuning._capability.cache_clear()
    assert tuning.architecture(CUDA) == arch
    tuning._capability.cache_clear()


def test_interpreter_uses_sm_90():
    assert pick("op", TABLE, CPU, "wide", ()) == SLOW


@pytest.mark.parametrize("shape_class, arch", [("other", 90), ("wide", 75), ("narrow", 80)])
def test_missing_entry(shape_class, arch, monkeypatch):
    monkeypatch.setattr(tuning, "_capability", lambda index: arch)
    with pytest.raises(ValueError, match=f"op: device has architecture sm_{arch} and the shape class is '{shape_class}', expected one of"):
        pick("op", TABLE, CUDA, shape_class, ())


def test_launch_arguments():
    assert FAST.launch() == dict(ROWS=2, num_warps=8, num_stages=2, enable_fp_fusion=True)


def test_autotune_is_off_unless_asked_for(cuda, monkeypatch):
    for value in ("", "0"):
        monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", value)
        assert pick("op", TABLE, CUDA, "wide", (1,), bench=lambda config: config) == SLOW
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LIGHTNINGDIT_AUTOTUNE is 'yes', expected 0 or 1"):
        pick("op", TABLE, CUDA, "wide", (1,), bench=lambda config: config)
    assert cuda == []


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that notes what it is asked for in `order`, and is done with a sleep of `cycles` at once where they are fewer than `enough`."""
    order, state = [], SimpleNamespace(cycles=0, enough=0)

    class Event:
        def __init__(self, enable_timing):
            pass

        def record(self):
            order.append("event")

        def query(self):
            return state.cycles < state.enough

        def synchronize(self):
            order.append("wait")

        def elapsed_time(self, end):
            return 1.5

    def sleep(cycles):
        state.cycles = cycles
        order.append("sleep")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    return SimpleNamespace(order=order, state=state)


def test_a_sleep_that_was_too_short_is_doubled(gpu):
    gpu.state.enough = 700
    assert tuning.event_ms(lambda: None, 100) == (1.5, 800, False)
    assert gpu.order.count("sleep") == 4


def test_host_time_that_no_sleep_covers_is_told(gpu, caplog):
    gpu.state.enough = 10**12
    longest = int(tuning.LONGEST_SLEEP_S * tuning.HIGHEST_CLOCK_HZ)
    assert tuning.event_ms(lambda: None, 60_000) == (1.5, longest, True)
    assert gpu.order.count("sleep") < 15
    with caplog.at_level(logging.WARNING, "lightningdit_kernels"):
        assert tuning._time_ms(lambda: None) == 1.5
    assert len(caplog.records) == 1


def test_the_start_event_comes_when_the_gpu_is_busy(gpu):
    """All is enqueued behind a sleep that is longer than enqueueing took."""
    assert tuning.event_ms(lambda: gpu.order.append("run"), 1) == (1.5, 1, False)
    assert gpu.order == ["sleep", "event", "run", "event", "wait"]
    cycles = tuning.cycles_to_enqueue(lambda: time.sleep(0.01))
    assert 0.02 <= cycles / tuning.HIGHEST_CLOCK_HZ <= tuning.LONGEST_SLEEP_S


def test_autotune_measures_once_and_remembers_across_processes(cuda, caplog):
    for _ in range(2):
        assert pick("op", TABLE, CUDA, "wide", (1152, "bf16"), bench=lambda config: config) == FAST
    assert cuda == [SLOW, FAST, BIG] and "does not fit on this device: shared memory" in caplog.text
    new_process()
    assert pick("op", TABLE, CUDA, "wide", (1152, "bf16"), bench=lambda config: 1 / 0) == FAST
    pick("op", TABLE, CUDA, "wide", (768, "bf16"), bench=lambda config: config)
    assert len(cuda) == 6, "another key is another measurement"
    stored = json.loads((tuning.cache_folder() / "op.json").read_text())
    assert len(stored) == 2 and all("sm_90" in name and "triton" in name for name in stored)


@pytest.mark.parametrize("content", ["{", "[]", "\x00\xff", '{"a": '])
def test_corrupt_cache_is_ignored_with_one_warning(cuda, content, caplog):
    path = tuning.cache_folder() / "op.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content.encode("latin-1"))
    with caplog.at_level(logging.WARNING):
        assert pick("op", TABLE, CUDA, "wide", (), bench=lambda config: config) == FAST
    assert caplog.text.count("is ignored") == 1
    new_process()
    assert pick("op", TABLE, CUDA, "wide", (), bench=lambda config: 1 / 0) == FAST, "the file was repaired"


@pytest.mark.parametrize("entry", [None, 3, {}, dict(blocks=dict(ROWS=7), num_warps=4, num_stages=1), dict(blocks=[], num_warps="4")])
def test_a_stored_choice_that_the_table_no_longer_has_is_measured_again(cuda, entry):
    pick("op", TABLE, CUDA, "wide", (), bench=lambda config: config)
    path = tuning.cache_folder() / "op.json"
    path.write_text(json.dumps({name: entry for name in json.loads(path.read_text())}))
    new_process()
    assert pick("op", TABLE, CUDA, "wide", (), bench=lambda config: config) == FAST and len(cuda) == 6


def test_unwritable_cache_costs_a_warning_only(cuda, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert pick("op", TABLE, CUDA, "wide", (), bench=lambda config: config) == FAST
    assert "is not kept" in caplog.text


def test_other_errors_of_a_candidate_are_not_swallowed(cuda):
    with pytest.raises(ZeroDivisionError):
        pick("op", TABLE, CUDA, "wide", (), bench=lambda config: 1 / 0)


def test_inside_a_cuda_graph_the_static_choice_is_used_and_not_kept(cuda, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert pick("op", TABLE, CUDA, "wide", (), bench=lambda config: config) == SLOW
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert pick("op", TABLE, CUDA, "wide", (), bench=lambda config: config) == FAST


def test_poisoned_memory_poisons():
    from lightningdit_kernels.testing import poisoned_memory

    with poisoned_memory():
        like = torch.ones(3, dtype=torch.bfloat16)
        assert all(t.isnan().all() for t in (torch.empty(3), torch.empty_like(like), like.new_empty(2), torch.empty_strided((2,), (1,))))
    assert not torch.are_deterministic_algorithms_enabled()
