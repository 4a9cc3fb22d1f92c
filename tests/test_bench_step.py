"""The training step's benchmark switches what it says, finds who is wrong or swapped, and halves what does not fit; growth is fitted."""

import dataclasses
import json
import math
import types

import pytest
import torch

import lightningdit.model
from bench import bench_growth, bench_sampling, bench_step, bench_tokenizer, harness, step
from lightningdit import config as configuration
from lightningdit_kernels import native

needs_kernels = pytest.mark.skipif(not native.available, reason=native.about)
REQUEST = types.SimpleNamespace(config=types.SimpleNamespace(getoption={"--official": None, "--first-step-s": None}.__getitem__))


@pytest.fixture
def settings():
    return harness.Settings(("tiny",), "cpu", (), rounds=(2, 2), case_s=0.1, sample_ms=0.01, warmup_s=0.0)


@pytest.fixture
def trainer():
    return step.Trainer(step.configure("tiny", "cpu"), "cpu")


def test_a_copy_of_a_module_is_apart():
    copied = step.copy_of(lightningdit.model, "test", swiglu=max)
    assert copied.swiglu is max and lightningdit.model.swiglu is not max
    assert copied.LightningDiT.forward.__code__ is not lightningdit.model.LightningDiT.forward.__code__
    with pytest.raises(ValueError, match="functions: got 'gelu', expected a name in lightningdit.model"):
        step.copy_of(lightningdit.model, "test", gelu=max)


@needs_kernels
def test_kernels_are_switched_one_by_one(settings, stopwatch):
    settings.only = ("reference eager", "ours eager", *(f"ours eager without {kernel}" for kernel in step.KERNELS))
    bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)
    (record,) = settings.records
    rows = {row["name"]: row for row in record["rows"]}
    assert tuple(rows) == settings.only and record["left_out"] == []
    for kernel, ops in step.KERNELS.items():
        seen = {one.removeprefix("lightningdit::") for one in rows[f"ours eager without {kernel}"]["ran"]}
        others = {op for other, own in step.KERNELS.items() if other != kernel for op in own}
        assert others <= seen and not seen & set(ops), f"without {kernel}: {seen}"
    for row in rows.values():
        assert row["speedup_low"] <= row["speedup"] <= row["speedup_high"] and row["peak_mib"] > 0
        assert row["images_per_s"] == pytest.approx(1e3 * row["batch"] / row["median_ms"], rel=1e-3)
        assert row["tflop_per_s"] == pytest.approx(row["images_per_s"] * record["model"]["flops_per_image"] / 1e12, rel=1e-3)
    json.dumps(record)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
def test_kernels_are_switched_on_a_gpu(settings, stopwatch):
    settings.device = "cuda"
    bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)
    (record,) = settings.records
    rows = {row["name"]: row for row in record["rows"]}
    assert {"reference eager", "ours compiled", "ours compiled without norm", "ours compiled without swiglu"} <= rows.keys()
    assert "ours compiled with triton attention" in rows and all(row["mfu"] > 0 and row["peak_mib"] > 0 for row in rows.values())
    assert record["dtype"] == "bfloat16" and all(row["status"] == "unavailable" for row in record["left_out"])


def test_flops_of_xl_are_the_papers():
    config = step.configure("xl/N256", "cuda")
    with torch.device("meta"):
        model = lightningdit.model.LightningDiT(**config.model_arguments())
    assert 3 * lightningdit.model.forward_flops(model) == pytest.approx(711.8e9, rel=1e-3) and config.precision == "bf16"
    batches = [step.configure(shapes, "cuda").batch_size for shapes in ("xl/N256", "xl/N1024", "xl/N1024/B16")]
    assert batches == [128, 32, 16]
    with pytest.raises(ValueError, match="tokens: got 200, expected a square"):
        step.configure("xl/N200", "cuda")


def test_the_step_is_the_recipes():
    """What it is trained with, from the losses to the optimizer: bench/step.py takes the defaults, so that it needs no pyyaml."""
    pytest.importorskip("yaml")
    recipe = configuration.load(configuration.DiTConfig, step.ROOT / "train" / "configs" / "lightningdit_xl_64ep.yaml")
    others = ("run", "batch_size", "micro_batch", "compile", "checkpoint_every", "data.num_images", "model.size", "sample")
    assert configuration.differences(recipe, step.configure("xl/N256", "cuda"), ignore=others) == []


@needs_kernels
def test_swapped_contestants_are_noticed(settings, monkeypatch, stopwatch):
    """The reference computed by ours, and ours by the reference."""
    pair = {one.name: one for one in step.contestants("cpu")["ladder"]}
    swapped = {"reference eager": "ours eager", "ours eager": "reference eager"}

    class Swapped(step.Contestant):
        def module(self):
            return pair[swapped[self.name]].module()

    listed = [Swapped(**dataclasses.asdict(pair[name])) for name in swapped]
    monkeypatch.setattr(step, "contestants", lambda device: dict(kernels=listed))
    with pytest.raises(AssertionError, match="reference eager is not what ran: expected kernels \\[\\], saw"):
        bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)


def test_a_graph_on_a_gpu_proves_itself_by_its_kernels():
    """Inductor launches them itself: no operator is called."""
    kernels = ["CompiledFxGraph", "_norm_fwd_kernel_0", "_norm_bwd_kernel", "_swiglu_fwd_kernel_4", "_rope_attention_fwd_kernel_2"]
    compiled = step.Contestant("ours compiled with triton attention", (), True, "triton")
    compiled.prove(kernels, "cuda")
    with pytest.raises(AssertionError, match="expected kernels .*, saw \\['attention', 'norm'\\]"):
        compiled.prove([*kernels[:3], kernels[4], "_swiglu_forward_kernel"], "cuda")  # the last is Liger's
    with pytest.raises(AssertionError, match="expected kernels \\['attention', 'norm'\\]"):
        step.Contestant("ours compiled without swiglu", ("swiglu",), True).prove(kernels, "cuda")


@needs_kernels
def test_who_is_wrong_is_not_timed(settings, monkeypatch, stopwatch):
    module = step.Contestant("ours eager").module()
    right = module.swiglu
    monkeypatch.setattr(module, "swiglu", lambda packed, bias=None: right(packed, bias) * 1.001)
    settings.only = ("reference eager", "ours eager")
    with pytest.raises(AssertionError, match="ours eager: .*gradients is off by"):
        bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)
    assert [row["name"] for row in settings.records[0]["rows"]] == ["reference eager"], "and the row is kept, without a time"


@needs_kernels
def test_a_batch_that_does_not_fit_is_halved(settings, monkeypatch, stopwatch):
    right = step.Trainer.step

    def small(self, model, batch, skip=False):
        if len(batch["t"]) > 1 and "ours_eager" in type(model).__module__:
            raise torch.OutOfMemoryError
        return right(self, model, batch, skip)

    monkeypatch.setattr(step.Trainer, "step", small)
    settings.only = ("reference eager", "ours eager")
    bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)
    reference, ours = settings.records[0]["rows"]
    assert (reference["batch"], ours["batch"]) == (2, 1)
    samples = settings.records[0]["samples_ms"]
    ratios = [r / 2 / o for r, o in zip(samples["reference eager"], samples["ours eager"], strict=True)]  # of an image
    assert ours["speedup"] == pytest.approx(sum(ratios) / 2, rel=1e-3)


def runs_out(monkeypatch, where, who, when=lambda count: True, times=1000):
    """trainer.<where> of the contestant raises torch.OutOfMemoryError, `times` times, for batches of which `when` holds: their sizes."""
    right, seen = getattr(step.Trainer, where), []

    def limited(self, model, batch, *rest, **options):
        if who in type(model).__module__ and when(len(batch["t"])) and len(seen) < times:
            seen.append(len(batch["t"]))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, model, batch, *rest, **options)

    monkeypatch.setattr(step.Trainer, where, limited)
    return seen


@needs_kernels
@pytest.mark.parametrize("where", ["step", "gradients", "peak_mib"])
def test_the_reference_that_does_not_fit_is_halved(where, settings, monkeypatch, stopwatch):
    """In its first step, in the gate, as its peak is measured. The gate's own reference computes the truth, one image at a time."""
    seen = runs_out(monkeypatch, where, "reference_eager", lambda count: count > 1)
    settings.only = ("reference eager", "ours eager")
    bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)
    rows = {row["name"]: row["batch"] for row in settings.records[0]["rows"]}
    assert rows == {"reference eager": 1, "ours eager": 2}
    assert seen == [2]


@needs_kernels
@pytest.mark.parametrize("where", ["gradients", "peak_mib"])
def test_a_contestant_that_never_fits_loses_its_row_alone(where, settings, monkeypatch, stopwatch):
    runs_out(monkeypatch, where, "ours_eager")
    settings.only = ("reference eager", "ours eager")
    with pytest.raises(AssertionError, match="not even one image fits"):
        bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)
    (record,) = settings.records
    assert [row["name"] for row in record["rows"]] == ["reference eager"]
    assert [(row["name"], row["status"]) for row in record["left_out"]] == [("ours eager", "failed")]


def memory_runs_out_in_the_rounds(monkeypatch, who, after):
    """Of one contestant, once it has been sampled `after` times, in batches of more than one image."""
    original, sampled = harness.Timer._wall_ms, []

    def limited(self):
        cells = dict(zip(self.run.__code__.co_freevars, self.run.__closure__ or (), strict=True))
        if "name" in cells and cells["name"].cell_contents == who:
            count = len(cells["runs"].cell_contents[who][1]["t"])
            sampled.append(count)
            if count > 1 and len(sampled) > after:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self)

    monkeypatch.setattr(harness.Timer, "_wall_ms", limited)
    return sampled


@needs_kernels
@pytest.mark.parametrize("after", [0, 2], ids=["in the first turn", "between others"])
def test_the_reference_that_runs_out_among_others_is_halved_and_the_rounds_begin_again(after, settings, monkeypatch, stopwatch):
    sampled = memory_runs_out_in_the_rounds(monkeypatch, "reference eager", after)
    settings.only = ("reference eager", "ours eager")
    bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)
    rows = {row["name"]: row for row in settings.records[0]["rows"]}
    assert list(rows) == list(settings.only)
    assert (rows["reference eager"]["batch"], rows["ours eager"]["batch"]) == (1, 2)
    assert sampled[: after + 1] == [2] * (after + 1)
    assert all(len(times) == 2 for times in settings.records[0]["samples_ms"].values())


@needs_kernels
def test_who_runs_out_among_others_loses_its_row_alone(settings, monkeypatch, stopwatch):
    memory_runs_out_in_the_rounds(monkeypatch, "ours eager", 1)
    settings.only = ("reference eager", "ours eager")
    with pytest.raises(AssertionError, match="CUDA out of memory"):
        bench_step.bench_step(stopwatch, settings, "tiny", "kernels", REQUEST)
    (record,) = settings.records
    assert [row["name"] for row in record["rows"]] == ["reference eager"]
    assert record["rows"][0]["median_ms"] > 0
    assert list(record["samples_ms"]) == ["reference eager"]


@needs_kernels
def test_a_large_batch_is_compared_on_few_images_that_fill_it(trainer):
    gate = bench_step.Gate(trainer)
    assert [gate.images(count) for count in (128, 96, 33, 32, 7)] == [32, 32, 11, 32, 7]
    trainer.config.batch_size = 64
    ours, seen = trainer.build(step.Contestant("ours eager")), []
    handle = ours.register_forward_pre_hook(lambda module, arguments: seen.append(len(arguments[0])))
    errors = gate("ours eager", ours, 64)
    handle.remove()
    assert seen == [64], "the batch that is timed"
    assert errors["gradients"] < step.GRADIENT_TOLERANCE
    assert len(gate.of(32)[0]["t"]) == 32


def test_moments_are_there_before_the_first_step_and_weights_unchanged(trainer):
    state = trainer.optimizer.state
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    assert {len(state[p]) for p in trained} == {3}
    torch.manual_seed(trainer.config.seed)
    again = lightningdit.model.LightningDiT(**trainer.config.model_arguments())
    assert torch.equal(again.x_embedder.proj.weight, trainer.model.x_embedder.proj.weight)
    assert all(not value.any() for p in trained for value in state[p].values())
    assert all(p.grad is None for p in trained)


def test_growth_without_memory_is_a_reason(settings, monkeypatch):
    runs_out(monkeypatch, "step", "ours_eager")
    point = dict(batch=1, tokens=16, width=64, depth=1)
    reference, ours = bench_growth.measure(point, settings)
    assert reference["median_ms"] > 0
    assert ours == dict(name="ours eager", status="too large", reason="out of memory")

    def full(*arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(step, "Trainer", full)
    assert [row["reason"] for row in bench_growth.measure(point, settings)] == ["out of memory"] * 2


def test_official_code_takes_part_by_its_path(tmp_path, trainer):
    """A stand-in with the official interface: its own label dropout, and no argument for it."""
    config = trainer.config
    with pytest.raises(ValueError, match="expected a checkout that has models/lightningdit.py"):
        step.official_model(tmp_path, config)
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "lightningdit.py").write_text(
        "import lightningdit.model\n\nclass LightningDiT(lightningdit.model.LightningDiT):\n"
        "    def __init__(self, input_size=32, patch_size=2, in_channels=32, hidden_size=1152, depth=28, num_heads=16, mlp_ratio=4.0,\n"
        "                 class_dropout_prob=0.1, num_classes=1000, learn_sigma=False, use_qknorm=False, use_swiglu=False,\n"
        "                 use_rope=False, use_rmsnorm=False, wo_shift=False, use_checkpoint=False):\n"
        "        arguments = {name: value for name, value in locals().items() if name not in ('self', '__class__')}\n"
        "        super().__init__(**arguments)\n\n"
        "    def forward(self, x, t, y):\n        return super().forward(x, t, y)\n")
    model, batch = trainer.share(step.official_model(tmp_path, config)), trainer.batch()
    batch["drop_labels"][0] = True
    ours = trainer.build(step.Contestant("ours eager"))
    errors = step.errors(trainer.gradients(model, batch), trainer.gradients(ours, batch))
    assert errors == dict(loss=0.0, gradients=0.0)


def test_skipping_changes_no_weights_and_training_does(trainer):
    model, batch = trainer.build(step.Contestant("ours eager")), trainer.batch()
    before = [p.clone() for p in trainer.model.parameters()]
    trainer.step(model, batch, skip=True)
    assert all(map(torch.equal, before, trainer.model.parameters()))
    trainer.step(model, batch)
    moved = {name for (name, p), old in zip(trainer.model.named_parameters(), before, strict=True) if not torch.equal(p, old)}
    assert moved == {name for name, p in trainer.model.named_parameters() if p.requires_grad}


def test_loss_overlay(settings, stopwatch):
    bench_step.bench_overlay(stopwatch, settings, "tiny")
    (record,) = settings.records
    assert list(record["curves"]) == ["reference eager", "ours eager"] and [len(curve) for curve in record["curves"].values()] == [4, 4]
    differences = [abs(a - b) for a, b in zip(*record["curves"].values(), strict=True)]
    assert record["largest_difference"] == pytest.approx(max(differences), abs=1e-6) and max(differences) < 1e-4


def test_exponents():
    found = bench_growth.fit([1, 2, 4, 8], [3, 12, 48, 192])
    assert found["exponent"] == pytest.approx(2, abs=1e-3) and found["factor"] == pytest.approx(3, rel=1e-3)
    assert found["last"] == pytest.approx(2)
    noisy = bench_growth.fit([1, 2, 4, 8, 16, 32], [1, 1.1 * 2**1.5, 0.9 * 4**1.5, 1.05 * 8**1.5, 16**1.5, 0.95 * 32**1.5])
    assert noisy["low"] < 1.5 < noisy["high"] and noisy["high"] - noisy["low"] < 0.8 and 0.02 < noisy["error"] < 0.1
    with pytest.raises(ValueError, match="expected at least three pairs of positive numbers"):
        bench_growth.fit([1, 2], [1, 2])


def test_a_fixed_cost_is_no_slow_growth():
    """50 + 2 x^1.25 has an exponent of 0.5 to a power law alone."""
    xs = [1, 2, 4, 8, 16, 32, 64]
    found = bench_growth.fit(xs, [50 + 2 * x**1.25 for x in xs])
    assert found["exponent"] == pytest.approx(1.25, abs=0.01) and found["offset"] == pytest.approx(50, rel=0.01)
    assert found["factor"] == pytest.approx(2, rel=0.03) and found["low"] <= 1.25 <= found["high"] and found["error"] < 1e-4


def test_an_interval_that_the_points_do_not_bound_is_open():
    assert bench_growth.interval(bench_growth.fit([1, 2, 4], [10, 20, 40])) == "too few points"
    open_end = bench_growth.fit([1, 2, 4, 8], [10, 10.4, 9.7, 12])  # nothing but the last point is above the fixed cost
    assert open_end["high"] is None and bench_growth.interval(open_end) != "1.00"
    assert bench_growth.interval(dict(low=0.5, high=None)) == "at least 0.50"
    assert bench_growth.interval(dict(low=None, high=2)) == "at most 2.00"
    assert bench_growth.interval(dict(low=0.9, high=1.1)) == "0.90 to 1.10"


@pytest.mark.parametrize("status", ["too large", "failed"])
def test_growth_that_measures_nothing_fails(status, settings, monkeypatch, stopwatch):
    monkeypatch.setattr(bench_growth, "measure", lambda point, settings: [dict(name="ours eager", status=status, reason="out of memory")])
    with pytest.raises(AssertionError, match="out of memory"):
        bench_growth.bench_growth(stopwatch, settings, "depth")
    (record,) = settings.records
    assert len(record["points"]) == 3


def test_growth_is_measured_and_drawn_from_the_file(settings, tmp_path, stopwatch):
    bench_growth.bench_growth(stopwatch, settings, "depth")
    (record,) = settings.records
    assert [point["value"] for point in record["points"]] == [1, 4, 16]
    assert 0.3 < bench_growth.fits(record["points"])["ours eager"]["peak_mib"]["exponent"] <= 1.1
    record["points"][1]["rows"][0] = dict(name="reference eager", status="too large", reason="out of memory")
    fits = bench_growth.fits(record["points"])
    assert list(fits) == ["ours eager"], "two points are too few"
    harness.write(tmp_path / "growth.json", harness.environment("cpu") | dict(results=[record]))
    figure = bench_growth.figure(json.loads((tmp_path / "growth.json").read_text()))
    (label,) = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert label.startswith(f"ours eager: {fits['ours eager']['median_ms']['exponent']:.2f} (")


@needs_kernels
@pytest.mark.parametrize("case", ["step", "encode", "decode"])
def test_tokenizer_is_measured(case, settings, stopwatch):
    if case == "step":
        bench_tokenizer.bench_vavae_step(stopwatch, settings)
    else:
        bench_tokenizer.bench_codec(stopwatch, settings, case)
    (record,) = settings.records
    names = [row["name"] for row in record["rows"]]
    assert names[:2] == ["fp32 eager", "ours"] and record["case"] == case
    assert len(names) + len(record["left_out"]) == (2 if case == "step" else 3)
    for row in record["rows"]:
        assert all(math.isfinite(value) for value in row["differences"].values()) and row["images_per_s"] > 0


@needs_kernels
@pytest.mark.parametrize("who", ["fp32 eager", "ours"])
@pytest.mark.parametrize("case", ["step", "encode"])
def test_a_tokenizer_that_does_not_fit_is_halved(case, who, settings, monkeypatch, stopwatch):
    right, tried = bench_tokenizer.race, []

    def limited(benchmark, settings, case, runs, *rest, **more):
        run = runs[who]

        def small(count):
            tried.append(count)
            if count > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return run(count)

        return right(benchmark, settings, case, runs | {who: small}, *rest, **more)

    monkeypatch.setattr(bench_tokenizer, "race", limited)
    if case == "step":
        bench_tokenizer.bench_vavae_step(stopwatch, settings)
    else:
        bench_tokenizer.bench_codec(stopwatch, settings, case)
    rows = {row["name"]: row["batch"] for row in settings.records[0]["rows"]}
    assert {name: batch for name, batch in rows.items() if not name.startswith("diffusers")} == {"fp32 eager": 2, "ours": 2} | {who: 1}
    assert tried[:2] == [2, 1]


@needs_kernels
def test_the_gate_of_a_tokenizers_step_is_of_the_images_that_fit(settings, monkeypatch, stopwatch):
    right, ours = bench_tokenizer.StepContestant.measures, []

    def small(self, pixels, *rest):
        if self.nets.memory_format == torch.channels_last:
            ours.append(len(pixels))
            if len(pixels) > 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
        return right(self, pixels, *rest)

    monkeypatch.setattr(bench_tokenizer.StepContestant, "measures", small)
    bench_tokenizer.bench_vavae_step(stopwatch, settings)
    assert {row["name"]: row["batch"] for row in settings.records[0]["rows"]} == {"fp32 eager": 2, "ours": 1}
    assert ours == [2, 1]


def out_of_memory(i):
    raise torch.OutOfMemoryError("CUDA out of memory")


def memory_runs_out_as_timers_are_made(monkeypatch, *numbers):
    """From the next sample on, where the timer is one of these; its number is the order in which it was made."""
    original, made = harness.Timer.__init__, []

    def counted(self, *arguments, **options):
        original(self, *arguments, **options)
        if len(made) in numbers:
            self.run = out_of_memory
        made.append(self)

    monkeypatch.setattr(harness.Timer, "__init__", counted)
    return made


@needs_kernels
def test_a_tokenizer_that_was_lost_stays_lost_as_the_baseline_is_halved(settings, monkeypatch, stopwatch):
    memory_runs_out_as_timers_are_made(monkeypatch, 0, 1)
    monkeypatch.setattr(bench_tokenizer, "diffusers_autoencoder", lambda *arguments: out_of_memory(0))
    with pytest.raises(AssertionError, match="'ours', 'status': 'failed'"):
        bench_tokenizer.bench_codec(stopwatch, settings, "encode")
    (record,) = settings.records
    assert [(row["name"], row["batch"], row["median_ms"] > 0) for row in record["rows"]] == [("fp32 eager", 1, True)]
    assert [row["status"] for row in record["left_out"] if row["name"] == "ours"] == ["failed"]


@needs_kernels
def test_a_tokenizer_that_does_not_fit_as_the_baseline_is_halved_loses_its_row(settings, monkeypatch, stopwatch):
    memory_runs_out_as_timers_are_made(monkeypatch, 0)
    right, calls = bench_tokenizer.race, []

    def limited(benchmark, settings, case, runs, *rest, **more):
        def ours(count, run=runs["ours"]):
            calls.append(count)
            return run(count) if len(calls) <= before else out_of_memory(0)

        return right(benchmark, settings, case, {name: runs[name] for name in ("fp32 eager", "ours")} | dict(ours=ours), *rest, **more)

    before = 4  # two of the attempt, and those as its timer is made
    monkeypatch.setattr(bench_tokenizer, "race", limited)
    with pytest.raises(AssertionError, match="'ours', 'status': 'failed'"):
        bench_tokenizer.bench_codec(stopwatch, settings, "encode")
    (record,) = settings.records
    assert [(row["name"], row["batch"]) for row in record["rows"]] == [("fp32 eager", 1)]


@pytest.mark.parametrize("where", ["as its timer is made", "among others"])
def test_without_the_official_way_sampling_says_why(where, settings, monkeypatch, stopwatch):
    right = bench_sampling.contestants

    def limited(*arguments):
        runs, calls = right(*arguments), []
        images, official = runs[bench_sampling.BASELINE]

        def run():
            calls.append(1)
            return official() if len(calls) <= 2 else out_of_memory(0)

        return runs | {bench_sampling.BASELINE: (images, run)}

    if where == "among others":
        memory_runs_out_as_timers_are_made(monkeypatch, 0)
    else:
        monkeypatch.setattr(bench_sampling, "contestants", limited)
    with pytest.raises(AssertionError, match="official way.* is not timed.*CUDA out of memory"):
        bench_sampling.bench_sampling(stopwatch, settings, "tiny")


@needs_kernels
def test_swapped_tokenizers_are_noticed(settings, monkeypatch, stopwatch):
    right = bench_tokenizer.networks
    monkeypatch.setattr(bench_tokenizer, "networks", lambda plain, *rest: right(not plain, *rest))
    with pytest.raises(AssertionError, match="fp32 eager is not what ran: it must not run lightningdit::"):
        bench_tokenizer.bench_codec(stopwatch, settings, "encode")
