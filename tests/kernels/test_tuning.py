"""What is chosen by measurement: with a fake clock, a folder on disk that may be broken, and processes that have to agree."""

import json
import logging
import os
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

from lightningdit_kernels import __main__ as command
from lightningdit_kernels import backends, tuning
from lightningdit_kernels.tuning import Config, choose, pick

SLOW, FAST, BIG = Config(dict(ROWS=1), 4), Config(dict(ROWS=2), 8, 2), Config(dict(ROWS=64), 8, 5)
TABLE = {(80, "wide"): [BIG], (90, "wide"): [SLOW, FAST, BIG], (90, "narrow"): [FAST], (100, "wide"): [FAST]}
CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


class OutOfResources(Exception):
    """By the name of triton's."""


class FakeGPU:
    """A CUDA device as far as tuning can see: `times_ms` of what run() returns, and what was timed."""

    def __init__(self):
        self.times_ms = {str(SLOW): 2.0, str(FAST): 1.0}
        self.timed = []

    def event_ms(self, run, cycles):
        name = str(run())
        self.timed.append(name)
        return self.times_ms[name], cycles, False

    def run(self, config):
        """The bench of pick()."""
        if config == BIG:
            raise OutOfResources("shared memory")
        return config

    def pick(self, *key, bench=None):
        return pick("op", TABLE, CUDA, "wide", key, bench=bench or self.run)

    def times_of(self, **times_ms):
        """The times_ms of choose(), and a note that it was asked."""

        def measure():
            self.timed.append(tuple(times_ms))
            return times_ms

        return measure


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A FakeGPU, an empty folder, and nothing chosen yet."""
    fake = FakeGPU()
    monkeypatch.setattr(tuning, "_capability", lambda index: 90)
    monkeypatch.setattr(tuning, "device_name", lambda device: "card (sm_90)")
    monkeypatch.setattr(tuning, "event_ms", fake.event_ms)
    monkeypatch.setattr(tuning, "cycles_to_enqueue", lambda run: 1)
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("LIGHTNINGDIT_AUTOTUNE", raising=False)
    tuning.warn_once.cache_clear()
    return fake


def new_process():
    tuning._chosen.clear()


def only_file():
    (path,) = tuning.cache_folder().iterdir()
    return path


@pytest.mark.parametrize("arch, expected", [(80, BIG), (86, BIG), (89, BIG), (90, SLOW), (100, FAST), (103, FAST)])
def test_table_gives_the_nearest_lower_architecture(arch, expected, monkeypatch):
    monkeypatch.setattr(tuning, "_capability", lambda index: arch)
    assert pick("op", TABLE, CUDA, "wide", (1152,)) == expected


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


def test_names_of_configurations():
    assert str(FAST) == "ROWS=2 warps=8 stages=2"


@pytest.mark.parametrize("value", ["", "1"])
def test_tiles_are_measured_by_default(gpu, monkeypatch, value):
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", value)
    assert gpu.pick() == FAST


def test_zero_turns_it_off_and_says_what_is_used(gpu, monkeypatch, caplog):
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", "0")
    for key in (1, 2):
        assert gpu.pick(key) == SLOW
    assert choose("attention", ("sdpa", "triton"), CUDA, (), gpu.times_of(sdpa=2, triton=1)) == "sdpa"
    assert gpu.timed == []
    assert not tuning.cache_folder().exists()
    tiles, attention = (record.getMessage() for record in caplog.records)
    assert "LIGHTNINGDIT_AUTOTUNE=0" in tiles and str(SLOW) in tiles
    assert "LIGHTNINGDIT_AUTOTUNE=0" in attention and "sdpa" in attention


def test_other_values_are_refused(gpu, monkeypatch):
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match="LIGHTNINGDIT_AUTOTUNE is 'yes', expected 0 or 1"):
        gpu.pick()


def test_deterministic_algorithms_take_what_the_code_alone_decides(gpu, monkeypatch, caplog):
    gpu.pick("kept on disk by another process")
    new_process()
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert gpu.pick("kept on disk by another process") == SLOW
    assert "use_deterministic_algorithms" in caplog.text
    new_process()
    monkeypatch.setattr(torch, "is_deterministic_algorithms_warn_only_enabled", lambda: True)
    assert gpu.pick("kept on disk by another process") == FAST


@pytest.fixture
def device(monkeypatch):
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


def test_a_sleep_that_was_too_short_is_doubled(device):
    device.state.enough = 700
    assert tuning.event_ms(lambda: None, 100) == (1.5, 800, False)
    assert device.order.count("sleep") == 4


def test_host_time_that_no_sleep_covers_is_told(device, caplog):
    device.state.enough = 10**12
    longest = int(tuning.LONGEST_SLEEP_S * tuning.HIGHEST_CLOCK_HZ)
    assert tuning.event_ms(lambda: None, 60_000) == (1.5, longest, True)
    assert device.order.count("sleep") < 15
    with caplog.at_level(logging.WARNING, "lightningdit_kernels"):
        assert tuning.time_candidates("op", dict(a=lambda: None)) == dict(a=1.5)
    assert len(caplog.records) == 1


def test_the_start_event_comes_when_the_gpu_is_busy(device):
    """All is enqueued behind a sleep that is longer than enqueueing took."""
    assert tuning.event_ms(lambda: device.order.append("run"), 1) == (1.5, 1, False)
    assert device.order == ["sleep", "event", "run", "event", "wait"]
    cycles = tuning.cycles_to_enqueue(lambda: time.sleep(0.01))
    assert 0.02 <= cycles / tuning.HIGHEST_CLOCK_HZ <= tuning.LONGEST_SLEEP_S


def test_the_fastest_is_measured_once_and_kept_for_other_processes(gpu, caplog):
    for _ in range(2):
        assert gpu.pick(1152, "bf16") == FAST
    assert set(gpu.timed) == {str(SLOW), str(FAST)}
    assert "does not fit on this device: shared memory" in caplog.text
    new_process()
    assert gpu.pick(1152, "bf16", bench=lambda config: 1 / 0) == FAST
    timed = len(gpu.timed)
    gpu.pick(768, "bf16")
    assert len(gpu.timed) == 2 * timed, "another key is another measurement"


def test_what_is_kept(gpu):
    gpu.pick(1152, torch.bfloat16)
    (entry,) = tuning.choices()
    assert entry["op"] == "op"
    assert entry["gpu"] == "card (sm_90)"
    assert entry["shape"] == "wide 1152 torch.bfloat16"
    assert entry["choice"] == str(FAST)
    assert entry["times_ms"] == {str(SLOW): 2.0, str(FAST): 1.0}
    assert torch.__version__ in entry["versions"] and "triton" in entry["versions"] and "kernels" in entry["versions"]


@pytest.mark.parametrize("what", ["versions", "device_name"])
def test_a_choice_holds_for_its_versions_and_its_gpu(gpu, monkeypatch, what):
    gpu.pick()
    new_process()
    monkeypatch.setattr(tuning, what, lambda *a: "another")
    gpu.times_ms[str(FAST)] = 3.0
    assert gpu.pick() == SLOW
    assert len(tuning.choices()) == 2


def test_a_draw_leaves_the_starting_guess(gpu):
    gpu.times_ms[str(FAST)] = 1.99
    assert gpu.pick() == SLOW


def test_a_launch_that_is_short_says_nothing(gpu):
    gpu.times_ms = {str(SLOW): 0.005, str(FAST): 0.001}
    assert gpu.pick() == SLOW
    assert set(gpu.timed) == {str(SLOW)}
    assert tuning.choices() == []
    gpu.times_ms[str(SLOW)] = 1.0
    assert gpu.pick() == SLOW, "a process does not change what it has used"


def test_candidates_are_timed_in_turns(gpu):
    tuning.time_candidates("op", {str(c): lambda c=c: c for c in (SLOW, FAST)}, rounds=3)
    assert gpu.timed == [str(SLOW), str(FAST)] * 3


def test_slow_compilation_leaves_out_what_comes_later(gpu, monkeypatch, caplog):
    seconds = iter(range(0, 10**6, 15))
    monkeypatch.setattr(time, "perf_counter", lambda: next(seconds))
    runs = {str(c): lambda c=c: c for c in (SLOW, FAST, SLOW)} | dict(third=lambda: SLOW)
    assert set(tuning.time_candidates("op", runs)) == {str(SLOW), str(FAST)}
    assert "third is left out" in caplog.text


@pytest.mark.parametrize("content", ["{", "[]", "\x00\xff", '{"a": ', '{"op": 3}'])
def test_a_damaged_file_is_ignored_with_one_warning(gpu, content, caplog):
    gpu.pick()
    only_file().write_bytes(content.encode("latin-1"))
    new_process()
    with caplog.at_level(logging.WARNING):
        assert gpu.pick() == FAST
    assert caplog.text.count("is ignored") == 1
    new_process()
    assert gpu.pick(bench=lambda config: 1 / 0) == FAST, "the file was repaired"


@pytest.mark.parametrize("change", [dict(choice="ROWS=7 warps=4 stages=1"), dict(times_ms={}), dict(times_ms=3), dict(gpu="another")])
def test_a_kept_choice_that_is_not_offered_is_measured_again(gpu, change):
    gpu.pick()
    path, timed = only_file(), len(gpu.timed)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    new_process()
    assert gpu.pick() == FAST
    assert len(gpu.timed) == 2 * timed


def test_unwritable_folder_costs_a_warning_only(gpu, monkeypatch, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert gpu.pick() == FAST
    assert "is not kept" in caplog.text


def test_without_links_on_the_file_system(gpu, monkeypatch):
    def link(source, target):
        raise OSError("operation not supported")

    monkeypatch.setattr(tuning.os, "link", link)
    assert gpu.pick() == FAST
    assert [entry["choice"] for entry in tuning.choices()] == [str(FAST)]
    assert only_file().suffix == ".json"


def test_other_errors_of_a_candidate_are_not_swallowed(gpu):
    with pytest.raises(ZeroDivisionError):
        gpu.pick(bench=lambda config: 1 / 0)


def test_no_memory_for_another_candidate_leaves_the_starting_guess(gpu, caplog):
    """It took what the guess does not need, such as the prologue's q' and k': that is no reason to end somebody's step."""

    def bench(config):
        if config == FAST:
            raise torch.OutOfMemoryError("2 GiB of 80")
        return gpu.run(config)

    assert gpu.pick(bench=bench) == SLOW
    assert "not enough memory to time all configurations (2 GiB of 80)" in caplog.text
    assert tuning.choices() == [], "the next run may have the memory"
    with pytest.raises(torch.OutOfMemoryError):
        gpu.pick("another", bench=lambda config: (_ for _ in ()).throw(torch.OutOfMemoryError("the guess itself")))


def test_without_a_home_choices_are_kept_with_temporary_files(gpu, monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", mock.Mock(side_effect=RuntimeError("Could not determine home directory.")))
    assert tuning.cache_folder() == Path(tempfile.gettempdir(), f"lightningdit-{os.getuid()}", "lightningdit", "autotune")


def test_a_backward_takes_what_is_kept_or_the_starting_guess(gpu, caplog):
    """Timing takes gradients: the thread of a backward would wait for itself."""
    arguments = "attention", ("sdpa", "triton"), CUDA, ("256 tokens",), gpu.times_of(sdpa=2, triton=1)
    assert choose(*arguments, untimed="a backward") == "sdpa" and gpu.timed == []
    assert "nothing can be timed inside a backward; it uses sdpa" in caplog.text
    assert choose(*arguments) == "triton"
    new_process()
    assert choose(*arguments, untimed="a backward") == "triton"


def test_a_group_without_a_store_that_compares(gpu, monkeypatch, caplog):
    """As the fake process group of memory estimates has, and as MPI has none."""
    store = mock.Mock()
    store.check.side_effect = RuntimeError('Tried to call pure virtual function "::c10d::Store::check"')
    monkeypatch.setattr(tuning, "process_group", lambda: "fake")
    monkeypatch.setattr(tuning.dist, "get_world_size", lambda: 8)
    monkeypatch.setattr(tuning.dist, "get_rank", lambda: 3)
    monkeypatch.setattr(tuning.dist.distributed_c10d, "_get_default_store", lambda: store)
    assert gpu.pick() == FAST
    assert "do not agree" in caplog.text


def test_one_waits_long_for_rank_0_once_and_not_within_a_decision(gpu, monkeypatch):
    store, waited = torch.distributed.HashStore(), []
    monkeypatch.setattr(tuning, "process_group", lambda: "group")
    monkeypatch.setattr(tuning, "_waits", dict(grace_s=None, deciding=0))
    monkeypatch.setattr(tuning.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(tuning.dist, "get_rank", lambda: 1)
    monkeypatch.setattr(tuning.dist.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(tuning, "_appears", lambda store, key, within_s: waited.append(within_s))

    def times_ms():
        gpu.pick("a tile that attention needs")
        return dict(sdpa=2.0, triton=1.0)

    for tokens in (256, 1024):
        assert choose("attention", ("sdpa", "triton"), CUDA, (tokens,), times_ms) == "triton"
    assert waited == [tuning.GRACE_S, tuning.GRACE_AGAIN_S]


def test_no_candidate_fits(gpu):
    with pytest.raises(RuntimeError, match="none of 3 configurations fits"):
        gpu.pick(bench=lambda config: gpu.run(BIG))


def test_inside_a_cuda_graph_the_starting_guess_is_used_and_not_kept(gpu, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    for _ in range(2):
        assert gpu.pick() == SLOW
    assert caplog.text.count("CUDA graph capture") == 1
    assert gpu.timed == [] and tuning.choices() == []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert gpu.pick() == FAST
    new_process()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert gpu.pick() == FAST, "it is on disk"
    new_process()
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", "0")
    assert gpu.pick() == SLOW


def test_the_command_shows_what_was_chosen_and_by_how_much(gpu, capsys, monkeypatch):
    gpu.pick(1152)
    with monkeypatch.context() as others:
        others.setattr(tuning, "device_name", lambda device: "another card")
        choose("rope_attention", ("sdpa", "triton"), CUDA, ("shape",), gpu.times_of(sdpa=2, triton=1))
    new_process()
    choose("rope_attention", ("sdpa", "triton"), CUDA, ("shape",), gpu.times_of(sdpa=3.0, triton=2.0))
    command.main()
    printed = capsys.readouterr().out
    (tiles,) = (line for line in printed.splitlines() if line.endswith("wide 1152"))
    assert str(FAST) in tiles and f"2.00 x: {SLOW}" in tiles
    (attention,) = (line for line in printed.splitlines() if line.startswith("rope_attention  card"))
    assert "triton" in attention and "1.50 x: sdpa" in attention
    assert "another card" not in printed and "1 choices of other GPUs" in printed
    if backends()["rope_attention"]["cuda"] != "sdpa":  # triton is installed
        assert backends()["rope_attention"]["cuda"] == "triton"


def test_the_command_without_any_choice(gpu, capsys, monkeypatch):
    monkeypatch.setenv("LIGHTNINGDIT_AUTOTUNE", "0")
    command.main()
    printed = capsys.readouterr().out
    assert "Nothing was chosen by measurement here" in printed and "LIGHTNINGDIT_AUTOTUNE=0" in printed
    assert backends()["rope_attention"]["cuda"] == "the starting guess, else sdpa"


# Two processes, whose clocks disagree: for rank 0 sdpa is faster, for rank 1 triton.
PROCESS = """
import os, pathlib, sys, time, torch, torch.distributed as dist
from lightningdit_kernels import tuning
rank, (mode, folder) = int(os.environ["RANK"]), sys.argv[1:]
tuning.device_name = lambda device: "card"
torch.cuda.is_current_stream_capturing = lambda: False
folder = pathlib.Path(folder)

def times_ms():
    (folder / f"measured.{rank}").touch()
    if mode == "raises":
        raise ZeroDivisionError
    if mode == "alone":  # both measure before one of them writes
        while len(list(folder.glob("measured.*"))) < 2:
            time.sleep(0.01)
    return dict(sdpa=1.0, triton=2.0) if rank == 0 else dict(sdpa=2.0, triton=1.0)

def choose(key):
    return tuning.choose("op", ("triton", "sdpa"), torch.device("cuda", 0), (key,), times_ms)

if mode != "alone":
    dist.init_process_group("gloo")
tuning.GRACE_S = 0.2 if mode == "rank 1 only" else 60
try:
    if rank == 1 or mode != "rank 1 only":
        print(choose("shape"))
except ZeroDivisionError:
    print("failed")
if mode != "alone":
    dist.barrier()
    if mode == "rank 1 only" and rank == 0:
        print(choose("shape"))
    dist.barrier()
    dist.destroy_process_group()
"""


@pytest.fixture
def two(tmp_path, script):
    """two(mode) -> (what each process chose, which of them measured)."""
    (tmp_path / "run.py").write_text(PROCESS)

    def run(mode, one_disk=True):
        folders = dict(XDG_CACHE_HOME=tmp_path / "cache") if one_disk else dict(XDG_CACHE_HOME=tmp_path / "file")
        (tmp_path / "file").write_text("")  # a folder that nobody can write
        result = script(tmp_path / "run.py", mode, tmp_path, processes=2, timeout=120, **folders)
        return result.stdout.split(), sorted(path.suffix for path in tmp_path.glob("measured.*"))

    return run


@pytest.mark.parametrize("one_disk", [True, False])
def test_two_processes_take_what_rank_0_measured(two, one_disk):
    assert two("together", one_disk) == (["sdpa", "sdpa"], [".0"])


def test_a_rank_that_is_alone_decides_and_is_followed(two):
    assert two("rank 1 only", one_disk=False) == (["triton", "triton"], [".1"])


def test_a_rank_that_fails_leaves_the_others_the_starting_guess(two):
    assert two("raises") == (["failed", "triton"], [".0"])


def test_two_processes_of_no_group_take_what_was_kept_first(two):
    chosen, measured = two("alone")
    assert measured == [".0", ".1"] and len(set(chosen)) == 1


def test_a_silent_rank_is_not_waited_for_for_ever(gpu, monkeypatch, caplog):
    store = torch.distributed.HashStore()
    store.set("lightningdit_kernels/op/card (sm_90)/key/" + tuning.versions() + "/claim", "0")
    monkeypatch.setattr(tuning, "process_group", lambda: store)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    monkeypatch.setattr(torch.distributed.distributed_c10d, "_get_default_store", lambda: store)
    monkeypatch.setattr(tuning, "PATIENCE_S", 0.1)
    assert choose("op", ("sdpa", "triton"), CUDA, ("key",), gpu.times_of(sdpa=2, triton=1)) == "sdpa"
    assert gpu.timed == [] and "rank 0 has not decided" in caplog.text


def test_poisoned_memory_poisons():
    from lightningdit_kernels.testing import poisoned_memory

    with poisoned_memory():
        like = torch.ones(3, dtype=torch.bfloat16)
        assert all(t.isnan().all() for t in (torch.empty(3), torch.empty_like(like), like.new_empty(2), torch.empty_strided((2,), (1,))))
    assert not torch.are_deterministic_algorithms_enabled()
