"""The benchmarks measure what they say, on tiny shapes."""

import copy
import dataclasses
import gc
import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import types
import weakref
from pathlib import Path

import pytest
import torch
import torch.utils._python_dispatch

from bench import harness, providers, report_kernels
from lightningdit import config as configuration
from lightningdit import graphs
from lightningdit.model import LightningDiT
from lightningdit.tokenizer.autoencoder import AutoencoderKL
from lightningdit.tokenizer.losses import LatentProjection
from lightningdit.tokenizer.training import Networks, backward
from lightningdit.tokenizer.vavae import PRESETS as VAVAE_PRESETS
from lightningdit_kernels import native
from lightningdit_kernels.testing import FROZEN, OPS, example_inputs, values_and_gradients

ROOT = Path(__file__).resolve().parent.parent
RECIPE = ROOT / "train" / "configs" / "lightningdit_xl_64ep.yaml"
needs_kernels = pytest.mark.skipif(not native.available, reason=native.about)
CUDA = pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")


def needs_cuda(test):
    for mark in CUDA:
        test = mark(test)
    return test


@pytest.fixture
def settings():
    return harness.Settings(("tiny",), "cpu", ("eager", "ours"), rounds=(2, 2), case_s=0.1, sample_ms=0.01, warmup_s=0.0)


def case_of(op, dtype=torch.float32):
    return harness.Case(op, "tiny", dtype, "cpu")


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_measured(op, settings, stopwatch):
    record = harness.run_case(stopwatch, case_of(op, torch.bfloat16), settings)
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
        (raises, dict(half_only=("cpu",)), "unavailable", "does not take float32"),
        (raises, dict(module="no.such.module", package="nosuch"), "unavailable", "no.such.module is not installed (pip install nosuch)"),
    ],
)
def test_who_cannot_or_may_not_run_gets_a_reason_and_no_time(function, more, status, reason, settings, monkeypatch, stopwatch):
    contestant(monkeypatch, "swiglu", function, **more)
    settings.only = ()
    row = harness.run_case(stopwatch, case_of("swiglu"), settings)["contestants"][1]
    assert row["status"] == status and reason in row["reason"] and "forward" not in row


def test_pytorchs_flash_attention_takes_fp32_on_a_cpu_only():
    (flash,) = (one for one in providers.providers("rope_attention") if one.name == "sdpa flash")
    assert not flash.unavailable("cpu", torch.float32) and not flash.unavailable("cuda", torch.bfloat16)
    assert flash.unavailable("cuda", torch.float32) == "does not take float32"


@pytest.mark.parametrize("fails_once, calls", [(True, 1), (False, 2)])
def test_one_that_must_not_be_called_again_is_not(fails_once, calls, settings, monkeypatch, stopwatch):
    called = []

    def noted(packed, bias=None):
        called.append(packed)
        raise RuntimeError("no plan")

    monkeypatch.setattr(harness, "_failures", {})
    contestant(monkeypatch, "swiglu", noted, fails_once=fails_once)
    settings.only = ()
    reasons = [harness.run_case(stopwatch, case_of("swiglu"), settings)["contestants"][1]["reason"] for _ in range(2)]
    assert len(called) == calls
    again = "not called again: " if fails_once else ""
    assert reasons == ["RuntimeError: no plan", f"{again}RuntimeError: no plan"]


def test_ours_that_raises_costs_the_others_nothing(settings, monkeypatch, stopwatch):
    monkeypatch.setitem(providers.OPS, "swiglu", raises)
    with pytest.raises(AssertionError, match="ours is not timed: RuntimeError: no kernel image"):
        harness.run_case(stopwatch, case_of("swiglu"), settings)
    eager, ours = settings.records[0]["contestants"]
    assert (eager["status"], ours["status"]) == ("ok", "failed") and eager["forward"]["median_ms"] > 0


def test_what_was_measured_is_on_disk_at_once(settings, tmp_path, stopwatch):
    settings.path = tmp_path / "results.json"
    for op in ("swiglu", "rms_norm_modulate"):
        harness.run_case(stopwatch, case_of(op), settings)
        written = json.loads(settings.path.read_text())
        assert written["results"][-1]["op"] == op and written["schema"] == harness.SCHEMA
    assert len(written["results"]) == 2 and [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_ours_being_wrong_fails_the_benchmark(settings, monkeypatch, stopwatch):
    monkeypatch.setitem(providers.OPS, "swiglu", wrong)
    with pytest.raises(AssertionError, match="ours is not timed: out.0"):
        harness.run_case(stopwatch, case_of("swiglu"), settings)
    assert settings.records[0]["contestants"][1]["status"] == "incorrect", "and the row is kept"


class Calls(torch.utils._python_dispatch.TorchDispatchMode):
    """What the operators of the project are called with: {op: [{argument: dtype of a tensor, or the value}]}. Sizes are no matter."""

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op.namespace == "lightningdit":
            given = dict(zip((argument.name for argument in op._schema.arguments), args, strict=False)) | (kwargs or {})
            call = {name: value.dtype if isinstance(value, torch.Tensor) else value for name, value in given.items()}
            self.of.setdefault(op._schema.name.removeprefix("lightningdit::"), []).append(call)
        return op(*args, **(kwargs or {}))


def of_benchmark(op, dtype, variant):
    case = harness.Case(op, "tiny", dtype, "cpu", variant)
    with Calls() as calls:
        case.call(OPS[op])(**harness._inputs(case, case.sizes()))
    return calls.of[op][0]


def distinct(calls):
    return [dict(call) for call in dict.fromkeys(tuple(call.items()) for call in calls)]


@pytest.fixture(scope="module")
def of_training():
    """The calls of a model of the recipe, tiny, in a training step with bf16 autocast."""
    config = configuration.load(configuration.DiTConfig, RECIPE)
    arguments = config.model_arguments() | dict(depth=3, hidden_size=32, num_heads=2, input_size=4)
    model = LightningDiT(**arguments).train()
    y = torch.zeros(2).long()
    with Calls() as calls, torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(2, arguments["in_channels"], 4, 4), torch.rand(2), y, y.bool())
    return calls.of


@needs_kernels
@pytest.mark.parametrize("op", ["rms_norm_modulate", "gated_residual_rms_norm_modulate", "rope_attention", "swiglu"])
def test_an_op_is_measured_as_training_calls_it(op, of_training):
    """Dtypes, which optional arguments are given, eps and the dtype of the result."""
    variant = harness.trained_variant(op, torch.bfloat16)
    assert distinct(of_training[op]) == [of_benchmark(op, torch.bfloat16, variant)]


@needs_kernels
def test_qk_norm_is_a_case_of_its_own_and_what_the_model_calls_with_it(of_training):
    arguments = configuration.load(configuration.DiTConfig, RECIPE).model_arguments()
    arguments |= dict(depth=1, hidden_size=32, num_heads=2, input_size=4, use_qknorm=True)
    y = torch.zeros(2).long()
    with Calls() as calls, torch.autocast("cpu", torch.bfloat16):
        LightningDiT(**arguments)(torch.randn(2, arguments["in_channels"], 4, 4), torch.rand(2), y, y.bool())
    with_norm = of_benchmark("rope_attention", torch.bfloat16, "QK-norm")
    assert calls.of["rope_attention"] == [with_norm]
    assert of_training["rope_attention"][0]["q_weight"] is None
    assert with_norm["q_weight"] == torch.float32


@needs_kernels
def test_the_tokenizers_ops_are_measured_as_training_calls_them():
    nets = Networks(AutoencoderKL(**VAVAE_PRESETS["small-f8d16"]), LatentProjection(16, 256), bf16=True, channels_last=True)
    x = torch.rand(2, 3, 16, 16)
    features = torch.randn(2, 4, 256, dtype=torch.bfloat16)  # of a frozen encoder in bf16
    with Calls() as calls:
        backward(nets, x, torch.randn(2, 16, 2, 2), features, adversarial=False, perceptual_weight=0.0)
    norms = distinct({name: value for name, value in call.items() if name != "num_groups"} for call in calls.of["group_norm_silu"])
    measured = of_benchmark("group_norm_silu", torch.bfloat16, "")
    assert norms == [{name: value for name, value in measured.items() if name != "num_groups"}]
    (losses,) = distinct({name: call[name] for name in ("s", "weight", "f")} for call in calls.of["alignment_losses"])
    aligned = of_benchmark("alignment_losses", torch.float32, harness.trained_variant("alignment_losses", torch.float32))
    assert losses == {name: aligned[name] for name in losses}


def test_shapes_are_those_of_the_models():
    recipe = configuration.load(configuration.DiTConfig, RECIPE)
    assert vars(recipe.model) | dict(depth=None) == vars(harness.model_config("xl")) | dict(depth=None)
    assert harness.PRESETS["xl"] == (1152, 16, 3072)
    assert harness.BATCH["cuda"]["xl"] == recipe.micro_batch
    sizes = harness.Case("swiglu", "xl", torch.bfloat16, "cuda").sizes()
    assert sizes["rows"] == recipe.latent_size


@needs_kernels
@pytest.mark.parametrize("op", harness.VARIANTS)
def test_variants_are_measured(op, settings, stopwatch):
    variant, dtypes = harness.VARIANTS[op]
    record = harness.run_case(stopwatch, harness.Case(op, "tiny", dtypes[0], "cpu", variant), settings)
    assert [row["status"] for row in record["contestants"]] == ["ok", "ok"]
    assert record["variant"] == variant
    if variant == "fp32 residual":
        assert (record["dtypes"]["x"], record["dtypes"]["scale"], record["dtypes"]["weight"]) == ("float32", "bfloat16", "float32")
        plain = harness.run_case(stopwatch, case_of(op, torch.bfloat16), settings)
        assert record["counted"]["forward"]["bytes"] > plain["counted"]["forward"]["bytes"]


def test_an_op_without_the_variant_has_no_case_of_it():
    with pytest.raises(ValueError, match="variant: got 'QK-norm' of swiglu"):
        harness.Case("swiglu", "tiny", torch.bfloat16, "cpu", "QK-norm")
    assert harness.is_measured("rms_norm_modulate", torch.bfloat16, "xl", "")
    assert not harness.is_measured("rms_norm_modulate", torch.bfloat16, "xl/B8", "")
    assert harness.is_measured("rms_norm_modulate", torch.bfloat16, "xl/B8", "fp32 residual")
    assert not harness.is_measured("rms_norm_modulate", torch.float32, "xl", "fp32 residual")
    assert not harness.is_measured("rope_attention", torch.bfloat16, "xl/N1024", "QK-norm")


class RunsOut:
    """A contestant whose calls run out of memory from the `first`-th on."""

    def __init__(self, first):
        self.left = first

    def __call__(self, packed, bias=None):
        self.left -= 1
        if self.left < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return providers.eager_swiglu(packed, bias)


@pytest.mark.parametrize("first", [0, 1, 4, 9], ids=["in the gate", "in its profile", "as it is prepared", "among others"])
def test_who_runs_out_of_memory_costs_the_others_nothing(first, settings, monkeypatch, stopwatch):
    contestant(monkeypatch, "swiglu", RunsOut(first))
    settings.only = ()
    eager, peer = harness.run_case(stopwatch, case_of("swiglu"), settings)["contestants"]
    assert eager["forward_backward"]["rounds"] == 2
    assert peer["status"] == "too large"
    assert "out of memory" in peer["reason"]
    assert "forward" not in peer


def test_a_truth_that_does_not_fit_is_of_fewer_images(settings, monkeypatch, stopwatch):
    right = harness.truth_and_bounds

    def small(eager, inputs, *rest):
        if len(inputs["packed"]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(eager, inputs, *rest)

    monkeypatch.setattr(harness, "truth_and_bounds", small)
    record = harness.run_case(stopwatch, harness.Case("swiglu", "tiny/B4", torch.float32, "cpu"), settings)
    assert (record["sizes"]["batch"], record["gate_batch"]) == (4, 1)


@pytest.mark.parametrize("lost", ["a contestant", "the truth"])
def test_compiling_ahead_says_where_memory_ran_out(lost, settings, monkeypatch, stopwatch):
    """Whoever asked for it tries again: what will be timed was not compiled."""
    settings.only, settings.compile_only = (), True
    assert harness.run_case(stopwatch, case_of("swiglu"), settings) == {}
    if lost == "a contestant":
        contestant(monkeypatch, "swiglu", RunsOut(0))
    else:
        runs_out, right = iter((True, False)), harness.truth_and_bounds

        def truth(*arguments):
            if next(runs_out):
                raise torch.OutOfMemoryError("CUDA out of memory")
            return right(*arguments)

        monkeypatch.setattr(harness, "truth_and_bounds", truth)
    with pytest.raises(AssertionError, match="out of memory"):
        harness.run_case(stopwatch, harness.Case("swiglu", "tiny/B4", torch.float32, "cpu"), settings)


def test_fewer_copies_where_memory_is_short(settings, monkeypatch, stopwatch):
    right = harness._copies

    def small(inputs, count):
        if count > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(inputs, count)

    assert harness.run_case(stopwatch, case_of("swiglu"), settings)["sets"] == 16
    monkeypatch.setattr(harness, "_copies", small)
    assert harness.run_case(stopwatch, case_of("swiglu"), settings)["sets"] == 2


@needs_cuda
def test_a_capture_that_fails_breaks_nothing():
    """What PyTorch leaves behind: its own stream, a generator that waits for the capture's end, a pool that is being recorded to."""
    stream, kept = torch.cuda.current_stream(), []
    earlier = graphs.capture(lambda: torch.randn(8, device="cuda"))
    with pytest.raises(RuntimeError):
        graphs.capture(lambda: (torch.randn(8, device="cuda"), torch.cuda.current_stream().synchronize()))
    assert torch.cuda.current_stream() == stream
    assert torch.randn(8, device="cuda").shape == (8,)
    graph = graphs.capture(lambda: kept.append(torch.randn(8, device="cuda")))
    for one in (earlier, graph, graph):
        one.replay()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    timer = harness.Timer(lambda i: torch.randn(8, device="cuda").sum().item(), 2, "cuda")
    assert timer.method.startswith("events, not captured")
    assert timer.sample() > 0
    assert harness.Timer(lambda i: torch.randn(8, device="cuda"), 2, "cuda").method == "CUDA graph"


def in_a_fresh_process(code):
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | dict(PYTHONPATH=paths), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


@needs_cuda
def test_a_capture_may_be_the_first_use_of_cuda():
    in_a_fresh_process("import torch; from lightningdit import graphs; graphs.capture(lambda: torch.randn(8, device='cuda')).replay()")


@needs_cuda
def test_after_a_failed_capture_cached_memory_is_given_back():
    """A process of its own: what breaks here would break every later test."""
    in_a_fresh_process("""if True:
        import gc, torch
        from lightningdit import graphs

        def waits():
            torch.empty(2**28, dtype=torch.uint8, device="cuda").fill_(1)
            torch.cuda.current_stream().synchronize()

        def reserved_after_a_failure():
            try:
                graphs.capture(waits)
            except RuntimeError:
                torch.empty(2**28, dtype=torch.uint8, device="cuda")
            else:
                raise AssertionError("a synchronisation was captured")
            if earlier:
                earlier.pop().replay()
                torch.cuda.synchronize()
            gc.collect()
            torch.cuda.empty_cache()
            return torch.cuda.memory_reserved()

        earlier = []
        assert reserved_after_a_failure() < 2**28
        earlier.append(graphs.capture(lambda: torch.randn(8, device="cuda")))  # whose pool the failed one shares
        assert reserved_after_a_failure() < 2**28
        """)


@needs_cuda
def test_products_are_captured_again_after_their_graphs_are_freed():
    a = torch.ones(64, 64, device="cuda")
    for _ in range(3):
        timer = harness.Timer(lambda i: a @ a, 2, "cuda")
        assert timer.method == "CUDA graph"
        del timer
        gc.collect()


@needs_cuda
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("x INTERNAL ASSERT FAILED at y")], ids=str)
def test_a_capture_that_fails_by_no_fault_of_the_call_is_no_reason_for_events(error, monkeypatch):
    def fail(run):
        raise error

    monkeypatch.setattr(graphs, "capture", fail)
    with pytest.raises(type(error), match=str(error)):
        harness.Timer(lambda i: None, 1, "cuda")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
def test_a_timer_is_freed_with_its_last_reference(device):
    tensor = torch.ones(8, device=device)
    timer = harness.Timer(lambda i: tensor + 1, 1, device)
    timer.sample()
    alive = weakref.ref(timer)
    gc.disable()
    try:
        del timer
        assert alive() is None
    finally:
        gc.enable()


@needs_cuda
def test_a_timer_says_that_the_host_was_late(monkeypatch):
    timer = harness.Timer(lambda i: None, 1, "cuda")
    monkeypatch.setattr(harness, "event_ms", lambda run, cycles: (3.0, 2 * cycles, True))
    method, cycles = timer.method, timer.cycles
    assert [timer.sample(), timer.sample()] == [3.0, 3.0]
    assert timer.method == method + harness.LATE
    assert timer.cycles == 4 * cycles


@needs_cuda
def test_graphs_share_their_memory():
    def large():
        return torch.empty(2**26, device="cuda").fill_(1.0)

    first = graphs.capture(large)
    before = torch.cuda.memory_reserved()
    second = graphs.capture(large)
    assert torch.cuda.memory_reserved() == before
    first.replay()
    second.replay()
    torch.cuda.synchronize()


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
    peers |= {"liger cutedsl", "sglang", "sdpa FA4"}
    peers |= {f"sdpa {backend}" for backend in ("math", "flash", "efficient", "cudnn")}
    peers |= {f"ours {backend}" for backend in ("triton", "sdpa", "flash_attn", "xformers")}
    fused = ("sdpa cudnn", "sdpa FA4", "flash-attn 2", "flash-attn 3", "flash-attn 4")
    padded = {f"{name}, padded to {to}" for name in fused for to in (80, 96)}
    assert peers | padded == names
    with pytest.raises(ValueError, match="op is 'gelu', expected one of"):
        providers.providers("gelu")


def test_padding_changes_nothing_and_is_left_out_where_it_is_not_needed(monkeypatch):
    monkeypatch.setattr(providers, "_rotation", lambda: providers._rotate)
    inputs = example_inputs("rope_attention", 1, 2, 3, 48, 2)
    plain, padded = (providers._sdpa(torch.nn.attention.SDPBackend.MATH, pad)(**inputs) for pad in (0, 40))
    torch.testing.assert_close(padded, plain)
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91900)
    cudnn = provider_of("rope_attention", "sdpa cudnn, padded to 80")
    assert cudnn.unavailable("cuda", torch.bfloat16, 64) == "head dimension 64 needs no padding to 80"
    assert cudnn.unavailable("cuda", torch.bfloat16, 72) == ""


def provider_of(op, name):
    return next(provider for provider in providers.providers(op) if provider.name == name)


@pytest.fixture
def install(tmp_path, monkeypatch):
    """install(package, version, {module: source}): a stand-in of a distribution, found like an installed one, until the test ends."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(tmp_path)

    def installed(package, version, modules):
        for module, source in modules.items():
            *parents, name = module.split(".")
            folder = tmp_path.joinpath(*parents)
            folder.mkdir(parents=True, exist_ok=True)
            for depth in range(1, len(parents) + 1):
                tmp_path.joinpath(*parents[:depth], "__init__.py").touch()
            (folder / f"{name}.py").write_text(source)
        metadata = tmp_path / f"{package.replace('-', '_')}-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir()
        metadata.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        importlib.invalidate_caches()

    yield installed
    for name in set(sys.modules) - before:
        if name.partition(".")[0] in ("sglang", "liger_kernel", "cutlass", "flash_attn"):
            del sys.modules[name]


CUTLASS = ("nvidia-cutlass-dsl", "4.6.0", dict(cutlass=""))
SGLANG = "sglang.kernels.ops.diffusion.norm.scale_residual_norm_cutedsl"
LIGER = "liger_kernel.ops.cutedsl.ops.rms_norm"


@pytest.mark.parametrize("op", harness.NORMS)
@pytest.mark.parametrize("name, package, module, old, new", [
    ("sglang", "sglang", SGLANG, "0.5.18", "0.5.21"),
    ("liger cutedsl", "liger-kernel", LIGER, "0.8.2", "0.8.10"),
])
def test_a_norm_that_is_not_installed_or_too_old_says_so(op, name, package, module, old, new, install, tmp_path):
    peer, of = provider_of(op, name), ("cuda", torch.bfloat16, 64, 1024)
    assert peer.unavailable(*of) == f"{module.partition('.')[0]} is not installed (pip install {package})"
    install(package, old, {module: ""})
    assert peer.unavailable(*of) == f"{package} is version {old}, expected {peer.least} or newer"
    shutil.rmtree(tmp_path / f"{package.replace('-', '_')}-{old}.dist-info")
    install(package, new, {})
    assert peer.unavailable(*of) == "cutlass is not installed (pip install nvidia-cutlass-dsl)"
    install(*CUTLASS)
    assert peer.unavailable(*of) == ""
    assert peer.version == new
    assert peer.unavailable("cpu", *of[1:]) == "needs cuda"


def test_sglangs_norm_is_for_widths_of_256(install):
    install("sglang", "0.5.21", {SGLANG: ""})
    install(*CUTLASS)
    peer = provider_of("rms_norm_modulate", "sglang")
    assert peer.unavailable("cuda", torch.bfloat16, 72, 1152) == "width 1152 is no multiple of 256"
    assert peer.unavailable("cuda", torch.bfloat16, 64, 768) == ""


def test_fa4_of_pytorch_needs_both(install, tmp_path, monkeypatch):
    peer, of = provider_of("rope_attention", "sdpa FA4"), ("cuda", torch.bfloat16)
    assert peer.unavailable(*of) == "flash_attn.cute is not installed (pip install flash-attn-4)"
    install("flash-attn-4", "4.0.0b9", {"flash_attn.cute.interface": ""})
    assert peer.unavailable(*of) == "flash-attn-4 is version 4.0.0b9, expected 4.0.0b36 or newer"
    shutil.rmtree(tmp_path / "flash_attn_4-4.0.0b9.dist-info")
    install("flash-attn-4", "4.0.0b36", {})
    installed = importlib.metadata.version
    for version, reason in (("2.14.1+cu130", "torch is version 2.14.1+cu130, expected 2.15 or newer"), ("2.15.0+cu132", "")):
        monkeypatch.setattr(importlib.metadata, "version", lambda name, v=version: v if name == "torch" else installed(name))
        assert peer.unavailable(*of) == reason
    assert peer.unavailable("cuda", torch.float32) == "does not take float32"


@pytest.mark.parametrize("version, reason", [
    (None, "cuDNN is not installed (PyTorch's wheels for CUDA bring it)"),
    (90100, "cuDNN is version 9.1.0, expected 9.19 or newer"),
    (91900, ""),
    (92601, ""),
])
def test_cudnns_attention_has_cudnns_version(version, reason, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    peer = provider_of("rope_attention", "sdpa cudnn")
    assert peer.unavailable("cuda", torch.bfloat16) == reason
    if version == 92601:
        assert peer.version == "9.26.1"


# What they compute, by their signatures: sglang 0.5.23 and liger-kernel 0.8.5. sglang's op has no autograd formula.
SGLANG_SOURCE = """
import torch

def normed(x, weight, bias, scale, shift, norm_type, eps):
    assert norm_type == "rms" and bias is None and x.ndim == 3
    for given in (scale, shift):
        assert given.shape in ((1,), (len(x), x.shape[-1])), given.shape
    scale, shift = (given if given.ndim == 1 else given[:, None] for given in (scale, shift))
    wide = torch.promote_types(x.dtype, torch.float32)
    h = x.to(wide) * (x.to(wide).square().mean(-1, keepdim=True) + eps).rsqrt()
    h = h if weight is None else h * weight
    return (h * (1 + scale) + shift).to(x.dtype)

@torch.no_grad()
def fused_norm_scale_shift(x, weight, bias, scale, shift, norm_type, eps=1e-5):
    return normed(x, weight, bias, scale, shift, norm_type, eps)

@torch.no_grad()
def fused_scale_residual_norm_scale_shift(residual, x, gate, weight, bias, scale, shift, norm_type, eps=1e-5):
    wide = torch.promote_types(x.dtype, torch.float32)
    out = (residual.to(wide) + gate[:, None] * x).to(x.dtype)
    return normed(out, weight, bias, scale, shift, norm_type, eps), out
"""
LIGER_SOURCE = """
import torch

class LigerRMSNormFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx, X, W, eps, offset=0.0, casting_mode="llama", in_place=True, row_mode=None):
        assert casting_mode == "llama" and offset == 0.0 and not in_place
        ctx.save_for_backward(X, W)
        ctx.eps = eps
        return torch.nn.functional.rms_norm(X, X.shape[-1:], W, eps)

    @staticmethod
    def backward(ctx, dY):
        X, W = (None if saved is None else saved.detach().requires_grad_() for saved in ctx.saved_tensors)
        with torch.enable_grad():
            Y = torch.nn.functional.rms_norm(X, X.shape[-1:], W, ctx.eps)
        wanted = [X] if W is None else [X, W]
        dX, dW = (*torch.autograd.grad(Y, wanted, dY), None)[:2]
        return dX, dW, None, None, None, None, None
"""
STAND_INS = {"sglang": ("sglang", "0.5.23", {SGLANG: SGLANG_SOURCE}),
             "liger cutedsl": ("liger-kernel", "0.8.5", {LIGER: LIGER_SOURCE})}


def as_plain_functions(monkeypatch):
    monkeypatch.setattr(providers, "_compiled", lambda function: function)


@pytest.mark.parametrize("without", [(), ("shift",), ("weight",), ("bias",)], ids=str)
@pytest.mark.parametrize("op", harness.NORMS)
@pytest.mark.parametrize("name", STAND_INS)
def test_a_norms_arguments_and_results_are_those_of_the_definition(name, op, without, install, monkeypatch):
    as_plain_functions(monkeypatch)
    install(*STAND_INS[name])
    install(*CUTLASS)
    peer, inputs = provider_of(op, name), example_inputs(op, 2, 3, 5, 256, 4, torch.float64)
    inputs = {key: None if key in without else value for key, value in inputs.items()} | dict(eps=1e-2)
    frozen = tuple(inputs) if peer.forward_only else FROZEN
    values, truth = (values_and_gradients(function, inputs, frozen) for function in (peer.build(), providers.DEFINITIONS[op]))
    assert values.keys() == truth.keys()
    for key, true in truth.items():
        torch.testing.assert_close(values[key], true, rtol=1e-12, atol=1e-12, msg=lambda said, key=key: f"{key}: {said}")


def on_cpu(monkeypatch, op, *names):
    """eager, ours and these peers take part in a case of the op on a CPU, whatever the width."""
    peers = [dataclasses.replace(provider_of(op, name), devices=("cpu",), width_of=0) for name in names]
    monkeypatch.setattr(harness, "providers", lambda op: [*(provider_of(op, name) for name in ("eager", "ours")), *peers])


@pytest.mark.parametrize("variant", ["", "fp32 residual"])
def test_who_has_no_backward_is_gated_and_timed_forward_and_says_so(variant, install, monkeypatch, settings, stopwatch):
    as_plain_functions(monkeypatch)
    install(*STAND_INS["sglang"])
    install(*CUTLASS)
    op = "gated_residual_rms_norm_modulate"
    on_cpu(monkeypatch, op, "sglang")
    # A CPU's profile has no operator of sglang's: the stand-in is plain PyTorch.
    monkeypatch.setattr(harness, "identify", lambda *given: None)
    settings.only = ()
    record = harness.run_case(stopwatch, harness.Case(op, "tiny", torch.bfloat16, "cpu", variant), settings)
    row = record["contestants"][2]
    assert (row["status"], row["forward_only"], row.get("reason")) == ("ok", True, None)
    assert row["forward"]["rounds"] == 2
    assert not {"backward", "forward_backward", "peak_mib"} & row.keys()
    assert [name for name in record["samples_ms"] if "sglang" in name] == ["sglang: forward"]
    (pooled,) = harness.pool([record, copy.deepcopy(record)])
    assert pooled["contestants"][2]["forward"]["rounds"] == 4
    report_kernels.check("pooled", pooled)
    rows = [cells for cells in report_kernels.op_rows(record, {}) if cells[0] == "sglang 0.5.23"]
    assert [cells[1] for cells in rows] == ["forward", "backward"]
    assert rows[1][2] == "it has none"
    run = dict(device="cpu", results=[record])
    assert report_kernels.rows(run)[0].peer.startswith("eager")
    assert "no backward" in "".join(report_kernels.text_table([record]))
    report_kernels.figures(run)
    point = record | dict(shapes="tiny/B2")
    assert "sglang" not in "".join(report_kernels.sweep_tables([point]))


def test_a_wrong_forward_without_a_backward_is_incorrect(install, monkeypatch, settings, stopwatch):
    as_plain_functions(monkeypatch)
    package, version, modules = STAND_INS["sglang"]
    install(package, version, {SGLANG: modules[SGLANG].replace("(1 + scale)", "(1.01 + scale)")})
    install(*CUTLASS)
    on_cpu(monkeypatch, "rms_norm_modulate", "sglang")
    settings.only = ()
    row = harness.run_case(stopwatch, case_of("rms_norm_modulate"), settings)["contestants"][2]
    assert row["status"] == "incorrect"
    assert row["reason"].startswith("out.0")


class StandInFa4:
    """What PyTorch registers for FA4, on a CPU: its operators have no kernel there otherwise. Computed in plain PyTorch."""

    def __init__(self, wrong=1.0):
        self.wrong, self.calls, self.library = wrong, [], None

    def register(self):
        self.library = torch.library.Library("aten", "IMPL", "CPU")
        self.library.impl("_scaled_dot_product_flash_attention", self.forward, "CPU")
        self.library.impl("_scaled_dot_product_flash_attention_backward", self.backward, "CPU")
        return self

    def remove(self):
        self.library._destroy()
        self.library = None

    def forward(self, q, k, v, dropout_p=0.0, is_causal=False, return_debug_mask=False, *, scale=None):
        assert not (dropout_p or is_causal or return_debug_mask)
        self.calls.append("forward")
        scores = q @ k.mT * scale
        seed, offset = torch.zeros(2, dtype=torch.uint64), torch.zeros((), dtype=torch.uint64)
        return scores.softmax(-1) @ v, scores.logsumexp(-1), None, None, q.shape[2], k.shape[2], seed, offset, q.new_empty(0)

    def backward(self, grad, q, k, v, out, logsumexp, starts_q, starts_k, most_q, most_k, dropout_p, causal, seed, offset, *, scale=None):
        assert (starts_q, starts_k, most_q, most_k, dropout_p, causal) == (None, None, q.shape[2], k.shape[2], 0.0, False)
        self.calls.append("backward")
        p = (q @ k.mT * scale - logsumexp[..., None]).exp()
        ds = p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True)) * scale
        return ds @ k * self.wrong, ds.mT @ q, p.mT @ grad


@pytest.fixture
def fa4(monkeypatch):
    """A stand-in for FA4 in PyTorch's registry, and plain PyTorch for the rotation."""
    registry = sys.modules[torch.nn.attention.activate_flash_attention_impl.__globals__["__name__"]]
    stand_in = StandInFa4()
    monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, "FA4", stand_in.register)
    monkeypatch.setattr(providers, "_rotation", lambda: providers._rotate)
    yield stand_in
    assert torch.nn.attention.current_flash_attention_impl() is None


def flash_attention_of_a_cpu():
    q = torch.zeros(1, 1, 2, 8)
    return torch.ops.aten._scaled_dot_product_flash_attention(q, q, q, scale=1.0)


@pytest.mark.parametrize("pad", [0, 16])
def test_fa4_of_pytorch_is_switched_on_for_its_own_calls_only(pad, fa4):
    inputs = example_inputs("rope_attention", 2, 2, 3, 24, 2, torch.float32)
    values = values_and_gradients(providers._sdpa_fa4(pad), inputs, FROZEN)
    assert fa4.calls == ["forward", "backward"]
    assert fa4.library is None
    with pytest.raises(NotImplementedError):  # the switch is undone
        flash_attention_of_a_cpu()
    truth = values_and_gradients(providers.DEFINITIONS["rope_attention"], inputs, FROZEN)
    for key, true in truth.items():
        torch.testing.assert_close(values[key], true, rtol=1e-4, atol=1e-5, msg=lambda said, key=key: f"{key}: {said}")


def test_fa4_of_pytorch_is_switched_off_when_a_call_raises(fa4, monkeypatch):
    inputs = example_inputs("rope_attention", 1, 2, 3, 16, 2, torch.float32)

    def fail(*given, **options):
        raise RuntimeError("FA4 SDPA unsupported")

    for step in ("backward", "forward"):
        monkeypatch.setattr(fa4, step, fail)
        with pytest.raises(RuntimeError, match="FA4 SDPA unsupported"):
            values_and_gradients(providers._sdpa_fa4(), inputs, FROZEN)
        assert fa4.library is None
        assert torch.nn.attention.current_flash_attention_impl() is None


def test_an_implementation_that_was_active_before_is_again(fa4, monkeypatch):
    registry = sys.modules[torch.nn.attention.activate_flash_attention_impl.__globals__["__name__"]]
    other = types.SimpleNamespace(remove=lambda: None)
    monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, "FA3", lambda: other)

    def broken():
        raise ImportError("no module named flash_attn.cute")

    torch.nn.attention.activate_flash_attention_impl("FA3")
    try:
        with providers.flash_attention_impl("FA4"):
            assert torch.nn.attention.current_flash_attention_impl() == "FA4"
        assert torch.nn.attention.current_flash_attention_impl() == "FA3"
        monkeypatch.setitem(registry._FLASH_ATTENTION_IMPLS, "FA4", broken)
        with pytest.raises(ImportError), providers.flash_attention_impl("FA4"):
            raise AssertionError("entered without FA4")
        assert torch.nn.attention.current_flash_attention_impl() == "FA3"
    finally:
        torch.nn.attention.restore_flash_attention_impl()


@pytest.mark.parametrize("factor, status", [(1.0, "ok"), (1.05, "incorrect")])
def test_the_gate_sees_fa4s_gradients(factor, status, fa4, monkeypatch, settings, stopwatch):
    fa4.wrong, op = factor, "rope_attention"
    peer = dataclasses.replace(provider_of(op, "sdpa FA4"), devices=("cpu",), half_only=(), module=None, also=())
    monkeypatch.setattr(harness, "providers", lambda op: [provider_of(op, "eager"), peer])
    settings.only = ()
    row = harness.run_case(stopwatch, case_of(op), settings)["contestants"][1]
    assert row["status"] == status, row.get("reason")
    if status == "ok":
        assert any("Fa4Attention" in name for name in row["ran"])
        assert row["forward_backward"]["rounds"] == 2
    else:
        assert row["reason"].startswith("grad.qkv")


def swapped(monkeypatch, op, first, second):
    """Each of the two providers builds what the other one should."""
    pair = {one.name: one for one in providers.providers(op) if one.name in (first, second)}
    other = {first: pair[second], second: pair[first]}

    def listed(op):
        return [dataclasses.replace(one, build=other[one.name].build) if one.name in other else one for one in providers.providers(op)]

    monkeypatch.setattr(harness, "providers", listed)


@pytest.mark.skipif(not native.available, reason=native.about)
@pytest.mark.parametrize("pair", [("eager", "ours"), ("compiled", "ours"), ("eager", "compiled")], ids=" and ".join)
def test_swapped_providers_are_noticed(pair, settings, monkeypatch, stopwatch):
    swapped(monkeypatch, "swiglu", *pair)
    settings.only = ("eager", "compiled", "ours")
    with pytest.raises(AssertionError, match="(eager|ours) is not timed.*: (eager|ours) is not what ran: "):
        harness.run_case(stopwatch, case_of("swiglu"), settings)
    if "eager" not in pair:  # without eager nothing is measured
        rows = {row["name"]: row for row in settings.records[0]["contestants"]}
        assert rows["compiled"]["status"] == "incorrect" and rows["compiled"]["reason"].startswith("compiled is not what ran: ")


def test_swapped_attention_backends_are_noticed(settings, monkeypatch, stopwatch):
    swapped(monkeypatch, "rope_attention", "sdpa math", "sdpa flash")
    settings.only = ("eager", "sdpa math", "sdpa flash")
    rows = harness.run_case(stopwatch, case_of("rope_attention"), settings)["contestants"]
    for row in rows[1:]:
        assert row["status"] == "incorrect" and f"{row['name']} is not what ran: expected " in row["reason"] and "forward" not in row


def test_peak_memory_is_of_what_lives_at_once():
    def two_at_a_time():
        for _ in range(3):
            first = torch.empty(2**20)  # 4 MiB
            second = torch.empty(2**19)
            del first, second

    assert harness.cpu_peak_mib(two_at_a_time) == pytest.approx(6, abs=0.1)


def test_a_large_case_is_gated_at_a_smaller_batch(settings, monkeypatch, stopwatch):
    monkeypatch.setattr(harness, "GATE_ELEMENTS", 16 * 128)
    record = harness.run_case(stopwatch, harness.Case("swiglu", "tiny/B4", torch.float32, "cpu"), settings)
    assert record["sizes"]["batch"] == 4 and record["gate_batch"] == 1
    assert [row["status"] for row in record["contestants"]] == ["ok", "ok"]


def test_points_of_a_sweep():
    case = harness.Case("rope_attention", "xl/B8/N1024/Dh64", torch.bfloat16, "cuda")
    assert case.sizes() == dict(batch=8, rows=32, columns=32, width=1024, heads=16)
    assert harness.Case("swiglu", "b/N12", torch.float32, "cpu").sizes() == dict(batch=16, rows=3, columns=4, width=2048, heads=12)


def test_clocks_and_power_by_nvml_or_nvidia_smi(tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "_gpu_id", lambda: "GPU-1")
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\ncase $1 in --query-gpu=clocks.sm,*) echo 1980, 3201, 698.50, 61, 0x0000000000000004;; *) exit 6;; esac\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    monitor = harness.Monitor()
    assert monitor.source == "nvidia-smi" and monitor.sample()["power.draw"] == "698.50"
    nvml = types.SimpleNamespace(NVMLError=RuntimeError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0)
    nvml.nvmlInit = lambda: None
    nvml.nvmlDeviceGetHandleByUUID = {"GPU-1": "handle"}.__getitem__
    nvml.nvmlDeviceGetClockInfo = lambda handle, kind: {1: 1980, 2: 3201}[kind]
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 698_500
    nvml.nvmlDeviceGetTemperature = lambda handle, sensor: 61
    nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: 4
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: True)
    monitor = harness.Monitor()
    assert monitor.source == "NVML" and list(monitor.sample().values()) == [1980, 3201, 698.5, 61, "0x4"]
    nvml.nvmlDeviceGetPowerUsage = lambda handle: (_ for _ in ()).throw(RuntimeError("Not Supported"))  # as in some virtual machines
    del nvml.nvmlDeviceGetTemperature
    nvml.nvmlDeviceGetCurrentClocksEventReasons = lambda handle: 8  # the newer name
    assert list(monitor.sample().values()) == [1980, 3201, None, None, "0x8"]


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


def test_processes_are_pooled(settings, stopwatch):
    """Three processes, the third twice as slow in everything: all rounds count, ratios stay, and each median is kept."""
    record = harness.run_case(stopwatch, case_of("swiglu"), settings)
    slow = copy.deepcopy(record)
    for name, times in slow["samples_ms"].items():
        slow["samples_ms"][name] = [2 * time for time in times]
    (pooled,) = harness.pool([record, copy.deepcopy(record), slow])
    assert pooled["processes"] == 3
    for before, row in zip(record["contestants"], pooled["contestants"], strict=True):
        one, many = before["forward_backward"], row["forward_backward"]
        assert many["rounds"] == 3 * one["rounds"] and many["speedup"] == pytest.approx(one["speedup"], rel=0.5)
        assert many["medians_ms"] == pytest.approx([one["median_ms"], one["median_ms"], 2 * one["median_ms"]], rel=1e-3)
    broken = copy.deepcopy(record)
    broken["contestants"][1] = dict(name="ours", version="native", status="failed", reason="lost the GPU")
    (pooled,) = harness.pool([record, broken])
    assert pooled["contestants"][1] == broken["contestants"][1]
