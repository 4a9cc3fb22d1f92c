"""The pages are what the results files hold: numbers of hand-made files by hand, and the committed pages from the committed files."""

import copy
import json
import re
import statistics

import pytest

from bench import harness, report, report_goals, report_kernels, report_kinds
from bench.report_goals import Found
from bench.tables import UNMEASURED, about, times
from lightningdit_kernels.testing import OPS

RESULTS = report.ROOT / "bench" / "results"
ABOUT = dict(device="cpu", commit="abc1234", date="2026-01-02T03:04:05+00:00", cpu="A Processor", cores=2, threads=2, native="a library",
             versions=dict(python="3.11.7", torch="2.11.0"))
GPU = dict(device="cuda", gpu="A Card")


def file(*records, **more):
    return ABOUT | dict(schema=harness.SCHEMA, results=list(records)) | more


def timing(ms, amount=1, **more):
    return dict(median_ms=ms, p20_ms=0.8 * ms, p80_ms=1.25 * ms, rounds=3, speedup=9.0, speedup_low=9.0, speedup_high=9.0, **more)


def op_record(name="swiglu", ours=(2.0, 2.0, 3.0), eager=(6.0, 5.0, 4.0), compiled=(1.0, 1.5, 1.2), dtype="float32", shapes="s", **sizes):
    """As harness.run_case makes it; forward takes a third of both."""
    samples = dict(eager=eager, compiled=compiled, ours=ours)
    record = dict(kind="op", op=name, shapes=shapes, device="cpu", dtype=dtype, load=1.0, processes=1, contestants=[],
                  sizes=dict(batch=2, rows=16, columns=16, width=64, heads=4) | sizes, samples_ms={})
    record["counted"] = {step: dict(bytes=3_000_000, flops=0) for step in harness.STEPS}
    for who, both in samples.items():
        record["samples_ms"] |= {f"{who}: forward": [ms / 3 for ms in both], f"{who}: forward_backward": list(both)}
        record["contestants"].append(dict(name=who, version="1", status="ok", first_call_s=0.1, peak_mib=10.0 if who == "eager" else 1.0))
    split = [{tuple(key.rsplit(": ", 1)): ms for key, ms in record["samples_ms"].items()}]
    for row in record["contestants"]:
        harness._summarise(row, split, record["counted"])
    return record


def copy_record(gb_per_s):
    return dict(kind="copy", device="cpu", rows=[dict(name="copy", bytes=gb_per_s * 10**6, flops=0, gb_per_s=gb_per_s, **timing(1.0))])


def sampling(**more):
    who = {"official way, fp32, batch 4": 8000.0, "ours, fp32, batch 4": 4000.0, "ours, fp32, batch 32, prepared": 2000.0}
    record = dict(kind="sampling", case="s", device="cpu", count=32, num_steps=10, depth=4, decoded=True, load=1.0, left_out=[])
    return record | dict(rows=[dict(name=name, status="ok", **timing(ms)) for name, ms in who.items()]) | more


def latents():
    who = {"per sample": 50.0, "samples": 0.5, "samples, normalised": 1.0, "bf16": 0.25}
    record = dict(kind="latents", device="cpu", resident="ram", images=64, files=2, batch=8, latent_shape=[32, 16, 16], load=1.0)
    return record | dict(rows=[dict(name=name, **timing(ms)) for name, ms in who.items()])


def images():
    who = {"pillow, 1 threads": 90.0, "dali, 1 threads": 40.0, "DataLoader, 1 processes": 100.0, "torchvision, 1 thread": 20.0}
    record = dict(kind="images", case="tiny-imagenet-64-random", device="cpu", count=64, batch=32, load=1.0)
    return record | dict(rows=[dict(name=name, status="ok", **timing(ms)) for name, ms in who.items()],
                         left_out=[dict(name="torchvision, 2 threads", status="failed", reason="no | nvJPEG")])


def training_step(**more):
    """The compiled reference had half the batch."""
    rows = [dict(name="reference eager", status="ok", batch=8, **timing(400.0)),
            dict(name="reference compiled", status="ok", batch=4, first_step_s=60.0, **timing(160.0)),
            dict(name="ours compiled", status="ok", batch=8, mfu=0.5, first_step_s=30.0, **timing(200.0)),
            dict(name="ours compiled, norm off", status="ok", batch=8, **timing(100.0))]
    return dict(kind="training_step", case="xl", device="cpu", batch=8, dtype="float32", load=1.0, rows=rows, left_out=[],
                model=dict(depth=28, width=1152, heads=16, tokens=256)) | more


def tokenizer(case="step"):
    who = {"fp32 eager": 400.0, "ours": 100.0, "diffusers, fp32": 80.0}
    record = dict(kind="tokenizer", case=case, preset="f16d32", pixels=256, device="cpu", batch=4, load=1.0, left_out=[])
    return record | dict(rows=[dict(name=name, status="ok", precision="fp32", batch=4, **timing(ms)) for name, ms in who.items()])


OVERLAY = dict(kind="loss_overlay", case="s", device="cpu", steps=3, batch=2, dtype="float32", data="digits",
               curves={"reference eager": [1.0, 0.9, 0.8], "ours eager": [1.0, 0.9, 0.827]})
CHAOS = dict(seed=0, steps=20, checkpoint_every=3, environment=ABOUT, runs=[
    dict(bitwise=True, lives=3, lost_steps=4, unclear_ends=0, hung=0, faults=["killed at a step", "NaN loss"], corruption=None),
    dict(bitwise=False, lives=2, lost_steps=1, unclear_ends=1, hung=0, faults=["killed at a step"], corruption="differs")])  # fmt: skip
SOLVERS = ABOUT | dict(what="error of solvers, digits", images=50, reference="heun, 1000 steps", settings={}, rows=[
    dict(solver=solver, evaluations=count, guidance_scale=scale, median=median / count, worst=2 * median / count)
    for scale in (1.0, 1.5) for count in (10, 20, 50) for solver, median in (("euler", 2.0), ("unipc", 0.5), ("heun", 4.0))])  # fmt: skip
DEMO = ABOUT | dict(what="embedded default, digits", load_before=0.5, runs=[
    dict(command=command, wall_s=wall_s, images_per_second_median=1000.0, recognised=recognised, steps=600, val_mse=0.5, val_cos=0.1)
    for command, wall_s, recognised in (("python train/dit.py ", 60.0, 0.99), ("python train/dit.py --compile", 80.0, 1.0))])  # fmt: skip


FUZZ = dict(seed=3, examples=10, inputs=30, failed=False, wall_s=1.0, environment=ABOUT,
            kinds=dict(checkpoint=dict(refused=18, unchanged=2), tar=dict(refused=10)))
CHECK = file(*(dict(kind="check", name=name, median_ms=ms, ratios=[ratio, 9 * ratio, ratio], operators=[])
               for name, ms, ratio in (("swiglu", 4.0, 0.5), ("encode", 50.0, 25.0))), load=1.0)


def write(folder, **files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return report.load(folder)


def rows(content, name):
    return [row for part in report_kinds.KINDS[report.kind_of(name)].parts(name, content) for row in part.rows]


# The committed pages


def test_pages_are_what_the_results_hold():
    found = report.texts(report.load(RESULTS), report.ROOT)
    names = ["README.md", "docs/evaluation.md", "docs/notes.md", "docs/results.md", "docs/results_kernels.md", "kernels/README.md"]
    assert sorted(str(path.relative_to(report.ROOT)) for path in found) == names
    for path, text in found.items():
        assert path.read_text() == text, f"{path.relative_to(report.ROOT)} is not what the results hold: make report"


def test_pictures_exist():
    results = report.load(RESULTS)
    documents = report.texts(results, report.ROOT)
    named = {path.parent / name for path in documents for name in re.findall(r"!\[[^]]*]\(([^)]+)\)", path.read_text())}
    drawn = {report.ROOT / "docs" / name for name in report.figures(results)}
    assert drawn <= named and len(named) > len(drawn)
    for path in named:
        assert path.is_file(), f"{path.name} is missing: make report"
    for path in drawn:
        assert path.stat().st_size < 100_000, path.name


@pytest.mark.parametrize("name", [path.name for path in sorted(RESULTS.glob("*.json"))])
def test_changed_numbers_are_noticed(name, tmp_path):
    """Each of a file's figures, halved alone: another page, or an error that says what does not fit."""
    results = report.load(RESULTS)
    before, changed = report.texts(results, report.ROOT), 0
    for path in figures_of(report.kind_of(name), results[name]):
        content = copy.deepcopy(results[name])
        *way, key = path
        place = content
        for step in way:
            place = place[step]
        place[key] /= 2
        try:
            assert report.texts(results | {name: content}, report.ROOT) != before, path
        except ValueError as error:
            assert name in str(error)
        changed += 1
    assert changed


def figures_of(kind, content):
    """Paths to a few numbers of a file that the pages must show."""
    if kind == "demo":
        return [("runs", 0, "wall_s"), ("runs", 1, "wall_s"), ("runs", 0, "recognised")]
    if kind == "tokenizer_study":
        return [("arms", "plain", "reconstruction", "psnr"), ("arms", "aligned", "generation", "fd_classifier")]
    if kind == "spin":
        return [("images_per_second_beside_other_programs", "3000"), ("images_per_second_alone", "default")]
    if kind == "host":
        return [(figure, who, 0) for figure in ("host_ms", "first_step_s") for who in content[figure]]
    if kind == "chaos":
        return [("runs", 0, "lives"), ("steps",)]
    if kind == "solvers":
        return [("rows", 0, "median"), ("rows", len(content["rows"]) - 1, "median")]
    if kind == "fuzz":
        return [("kinds", name, outcome) for name, outcomes in content["kinds"].items() for outcome in outcomes]
    if kind == "levers":
        return [("runs", 0, "validation")]
    if kind == "convergence":
        return [("runs", 0, "distances", -1)]
    if "results" in content:
        last, record = len(content["results"]) - 1, content["results"][-1]
        if record["kind"] in ("growth", "check", "loss_overlay"):
            ways = dict(growth=("points", 0, "rows", 0, "median_ms"), check=("median_ms",), loss_overlay=("steps",))
            return [("results", last, *ways[record["kind"]])]
        if record["kind"] == "op":
            contestant = next(i for i, row in enumerate(record["contestants"]) if row["name"] == "ours")
            return [("results", last, "contestants", contestant, "forward_backward", "median_ms")]
        return [("results", last, "rows", 0, "median_ms")]
    raise NotImplementedError(kind)


# What is shown, by hand


def test_ops_by_hand():
    """Medians 2, 5 and 1.2 ms: ours beats eager 2.5 times and loses to compiled."""
    content = file(copy_record(1000), op_record())
    ceiling, row = rows(content, "kernels_a.json")
    assert (ceiling.value, row.value, row.peer) == ("1000 GB/s", "2 ms", "compiled 1: 1.2 ms")
    assert row.ratio == pytest.approx(1.2 / 2) and row.spread == "2 to 2.6 ms"
    headline = report_kernels.headline(content["results"])
    assert headline == ["float32, forward + backward, geometric mean of the ratios of medians: ours is 2.5 x as fast as eager (0 of 1 "
                        "lose), 0.6 x as fast as compiled (1 of 1 lose)."]
    page = report.results_page({"kernels_a.json": content})
    assert "| A Processor, 2 of 2 cores | python 3.11.7, torch 2.11.0 | abc1234 | 2026-01-02 | 2 ms | 2 to 2.6 ms | " in page
    assert "| compiled 1: 1.2 ms | **0.6 x** | [kernels_a.json](../bench/results/kernels_a.json) |" in page
    text = report.kernels_page({"kernels_a.json": content})
    paired = statistics.median([6 / 2, 5 / 2, 4 / 3])
    assert f"| **ours** (1) | both | 2 (2-2.6) | {paired:.2f} (" in text
    assert "| float32 " not in text and report.region_op({"kernels_a.json": content}, "swiglu") == f"{times(2.5)} ({times(4 / 1.2)})"


def test_several_processes_count_the_same():
    record = op_record()
    record["samples_ms"] = {name: [all_ms, [2 * ms for ms in all_ms], [*all_ms, 99.0]] for name, all_ms in record["samples_ms"].items()}
    assert report_kernels.samples_of(record, "ours", "forward_backward") == [2, 2, 3, 4, 4, 6, 2, 2, 3]


@pytest.mark.parametrize("key", ["median_ms", "speedup"])
def test_summaries_that_are_not_their_samples_are_errors(key):
    record = op_record()
    record["contestants"][2]["forward_backward"][key] *= 0.9
    with pytest.raises(ValueError, match=f"kernels_a.json: {key} of swiglu float32 s ours forward_backward is .*, but 2.* by its samples"):
        rows(file(record), "kernels_a.json")
    with pytest.raises(ValueError, match="median_ms of sampling ours, fp32, batch 4 is 4000.0, but 3000.0 by its samples"):
        rows(file(sampling(samples_ms={"ours, fp32, batch 4": [3000.0]})), "sampling_a.json")


@pytest.mark.parametrize(
    "record, value, peer, ratio",
    [
        (sampling(), "16 images/s", "official way, fp32, batch 4: 4 images/s", 4),
        (latents(), "32000 samples/s", "per sample: 160 samples/s", 200),
        (images(), "1600 images/s", "torchvision, 1 thread: 3200 images/s", 0.5),
        (training_step(), "40 images/s", "reference compiled: 25 images/s", 1.6),
        (tokenizer(), "40 images/s", "diffusers, fp32: 50 images/s", 0.8),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_contests_by_hand(record, value, peer, ratio):
    name = f"{'step' if record['kind'] == 'training_step' else record['kind']}_a.json"
    row = rows(file(record), name)[-1]
    assert (row.value, row.peer, row.ratio) == (value, peer, pytest.approx(ratio))
    page = report.results_page({name: file(record)})
    shown = f"**{times(ratio)}**" if ratio < 1 else times(ratio)
    assert f"| {value} | " in page and f"| {peer} | {shown} | [{name}](../bench/results/{name}) |" in page
    for contestant in record["rows"]:
        assert f"| {contestant['name']} | " in page, "every row is in a table"
    assert times(ratio) in report.short_table({name: file(record)})


def test_a_loss_is_shown_and_who_was_left_out_named():
    page = report.results_page({"images_a.json": file(images())})
    assert "Left out: torchvision, 2 threads (no / nvJPEG)." in page and "| **0.5 x** |" in page
    record = op_record()
    record["contestants"][2] |= dict(status="incorrect", reason="off by | a lot")
    assert rows(file(record), "kernels_a.json")[0].value == "not timed: off by | a lot"
    assert "not timed: off by / a lot" in report.results_page({"kernels_a.json": file(record)})


def test_studies_by_hand():
    demo = rows(DEMO, "demo_a.json")
    assert [row.value for row in demo] == ["60 s", "99.0 %", "80 s", "100.0 %"] and demo[2].ratio == 60 / 80
    (overlay,) = rows(file(OVERLAY), "step_a.json")
    assert overlay.value == "1 % of the loss" and overlay.spread == "at most 0.027, at step 3"  # 0.009 of 0.9 in the mean
    (chaos,) = rows(CHAOS, "chaos_a.json")
    assert (chaos.shape, chaos.value) == ("2 runs, 3 faults", "1 corruptions, 0 hung")
    page = report.results_page({"chaos_a.json": CHAOS})
    assert "| killed at a step | 2 | 1 |" in page and "2 runs of 20 steps in 5 lives" in page and "5 steps done again" in page
    plain, guided = rows(SOLVERS, "solvers_a.json")
    assert (guided.what, guided.value, guided.spread) == ("error of the latent, unipc", "2.5 %", "worst image 5 %")
    assert guided.peer == "euler: 10 %" and guided.ratio == pytest.approx(4) and guided.shape.startswith("20 evaluations")
    assert "| 10 | 20 % | 40 % |  |  | **5 %** |" in report.results_page({"solvers_a.json": SOLVERS})


def test_damage_and_regressions_by_hand():
    (fuzz,) = rows(FUZZ, "fuzz_a.json")
    assert (fuzz.shape, fuzz.spread) == ("30 inputs of 2 kinds", "refused 28, unchanged 2")
    assert rows(FUZZ | dict(failed=True), "fuzz_a.json")[0].value == "FAILED"
    assert "| checkpoint | 20 | refused 18, unchanged 2 |" in report.results_page({"fuzz_a.json": FUZZ})
    (check,) = rows(CHECK, "check_a.json")
    assert (check.shape, check.value) == ("2 ops and stages, small", "0.5 to 25")
    assert "| encode | 50 | 25 |" in report.results_page({"check_a.json": CHECK})


def test_kernels_switched_off_are_in_the_tables_only():
    record = training_step(part="kernels")
    assert not rows(file(record), "step_a.json")
    assert "| ours compiled, norm off | " in report.results_page({"step_a.json": file(record)})


def test_levers_by_hand():
    """AdamW ends at 1.0, 1.1 and 1.2, Muon 0.1 below on the same seeds, twice as fast; summaries in the file are not believed."""
    def run(lever, seed, validation):
        return dict(lever=lever, precision="fp32", seed=seed, validation=validation, left_out=0, curve=[2.0, validation], every=1,
                    state_mib=1.0, kept_mib=1.0)

    runs = [run("AdamW", seed, 1 + seed / 10) for seed in range(3)] + [run("Muon", seed, 0.9 + seed / 10) for seed in range(2)]
    speed = dict(lever="Muon", precision="fp32", load=9.0, batch_size=8, baseline_s=[0.2, 0.4, 0.2], lever_s=[0.1, 0.2, 0.1])
    content = dict(what="levers", size="digits", device="cpu", rule="a rule", latents="the digits", runs=runs, speeds=[speed], summary=[],
                   environment=dict(date="2026", commit="c", python="3", torch="2", device="cpu", cpu="A Processor", cores=2),
                   settings=dict(batch_size=8, steps=2, model=dict(depth=2, hidden_size=64)))
    (row,) = rows(content, "levers_a.json")
    assert row.value == "80 images/s; validation loss -0.1000; recommendation: worth trying" and row.peer == "AdamW: loss 1.1000"
    assert row.ratio == 2 and row.spread == "2.000 to 2.000 x (95 %)" and about("levers_a.json", content).hardware == "A Processor, 2 cores"
    assert "| Muon | fp32 | -0.1000, -0.1000 |" in report.results_page({"levers_a.json": content})
    assert "load average 9.0: **other processes shared" in report.results_page({"levers_a.json": content})
    assert list(report.figures({"levers_a.json": content})) == ["levers_a.png"]


def test_growth_by_hand():
    """Time doubles with the batch above a fixed 30 ms, memory grows with its square."""
    points = [dict(value=n, rows=[dict(name=name, median_ms=30 + 10.0 * n, p20_ms=9.0 * n, p80_ms=11.0 * n, peak_mib=1.0 * n * n)
                                  for name in ("reference eager", "ours eager")]) for n in (1, 2, 4, 8, 16)]
    base = dict(batch=4, tokens=64, width=64, depth=2)
    record = dict(kind="growth", axis="batch", device="cpu", base=base, points=points, fits={}, load=1.0)
    time, memory = rows(file(record), "growth_a.json")
    assert (time.value, time.spread) == ("exponent 1.00 above 30 ms", "1.00 to 1.00 (95 %)")
    assert re.fullmatch("exponent 2.00 above (0|[0-9.e-]*e-[0-9]+) MiB", memory.value) and memory.peer == f"reference eager: {memory.value}"
    assert time.shape == "batch 1 to 16, tokens 64, width 64, depth 2"
    (three,) = {row.spread for row in rows(file(record | dict(points=points[:3])), "growth_a.json")}
    assert three == "too few points"


def test_convergence_by_hand():
    """Aligned latents reach the final distance of plain ones after a tenth of the images; speed-ups in the file are not believed."""
    environment = dict(date="2026-01-02", commit="c", python="3", torch="2", device="cpu", hardware="A Processor")
    settings = dict(image_size=8, latents=[4, 8], ch_mult=[1, 1], depth=2, hidden_size=64, images=10_000, samples=500)
    runs = [dict(row=row, seed=seed, images=[100, 1000, 10_000], seconds=[1.0, 10.0, 100.0], distances=distances)
            for row, distances in (("rope", [100.0, 50.0, 25.0]), ("aligned", [50.0, 25.0, 10.0])) for seed in range(3)]
    content = dict(size="smoke", data="the digits", settings=settings, environment=environment, runs=runs, speedups={}, tokenizers={},
                   target=dict(name="a ViT", stand_in=False), judge=dict(held_out_accuracy=0.9))
    images, seconds = rows(content, "convergence_a.json")
    assert images.ratio == seconds.ratio == pytest.approx(10) and images.spread == "10.00 to 10.00 (95 %, 3 seeds)"
    assert "the paper: 2.54" in images.peer and "10.00 (10.00 to 10.00)" in report.short_table({"convergence_a.json": content})
    assert set(report.figures({"convergence_a.json": content})) == {"convergence_a_ladder.png", "convergence_a_alignment.png"}


def test_what_only_a_gpu_can_tell_is_named():
    """As long as a file is from a CPU; a file from a GPU ends it."""
    line = f"- training_step: {UNMEASURED}"
    assert line in report.results_page({"step_a.json": file(training_step())})
    assert line not in report.results_page({"step_a.json": file(training_step(), **GPU)})
    page = report.results_page({"sampling_a.json": file(latents())})  # records count, not the file's name
    assert "- sampling: not yet measured (`" in page and "- latents: " not in page


def test_registers_and_spills_by_hand(monkeypatch):
    good, bad = dict(registers=64, stack=0, local_loads=0, local_stores=0, wide_loads=0.5), dict(registers=255, stack=8, local_loads=1)
    bad = good | bad
    keys = [case.format(bias) for _, case, _ in report.REGISTERS for bias in ("", "+bias")]
    cases = {key: {"80": good, "90": good, "100": bad if key == keys[0] else good} for key in keys}
    monkeypatch.setattr(report, "audit", lambda: cases)
    table = report.region_registers({}).splitlines()
    assert table[3] == "| norm forward, fp32 residual | 64 / 64 / 255 | some | 50 % |"
    assert table[-1] == "| the same with the bias gradient | 64 / 64 / 64 | none | 50 % |"
    assert report.audit_row()[1] == "1 spills in 36 compilations"


def test_goals_by_hand():
    """On a GPU the records of the goal's size count, on a CPU those of the same work; a file of one never speaks for the other."""
    attention = op_record("rope_attention", dtype="bfloat16", shapes="xl", width=1152, heads=16)
    margin = op_record("marginal_distance_matrix_loss", dtype="bfloat16", shapes="xl/B8/N1024", rows=32, columns=32)
    swiglu, drawn = op_record("swiglu", dtype="bfloat16", shapes="xl"), sampling(num_steps=249)
    records = [copy_record(5), swiglu, attention, margin, training_step(part="ladder"), drawn, latents(), tokenizer("encode"), tokenizer(),
               images() | dict(case="imagenet-256-random")]
    results = {"kernels_a.json": file(*records, **GPU)}
    found = {goal.what: one for goal, one, _ in report_goals.found_of(results, cuda=True)}
    both = "compiled: forward 0.6 x, both 0.6 x; eager: forward 2.5 x, both 2.5 x"
    # 3 MB in 0.667 and 1.33 ms are 4.5 and 2.25 GB/s of 5
    shares = "forward 0.667 ms, 90 % of copy bandwidth; backward 1.33 ms, 45 % of copy bandwidth; both passes 2 ms, 30 % of copy bandwidth"
    assert found["SwiGLU"] == Found(shares, both, pytest.approx(0.6))
    assert found["RoPE attention, head dimension 72, N = 256"].value == "forward 0.667 ms; backward 1.33 ms; both passes 2 ms"
    assert found["RoPE attention, head dimension 72, N = 1024"] is None and found["VA-VAE decoding"] is None
    assert found["alignment margin losses, N = 1024"].value.endswith("; peak memory 10 % of eager")
    assert found["LightningDiT-XL/1 training, 256 tokens"] == Found(
        "40 images/s (ours compiled), MFU 50 %", "reference compiled: 1.6 x; reference eager: 2 x", pytest.approx(1.6))
    assert found["guided sampling, 249 evaluations"].value == "16 images/s (ours, fp32, batch 32, prepared)"
    assert found["first training step of XL/1 from a cold cache"] == Found("30 s", "reference compiled: 60 s", 2.0)
    assert found["VA-VAE encoding"] == found["VA-VAE training step"] == Found(
        "40 images/s (ours)", "diffusers, fp32: 0.8 x; fp32 eager: 4 x", pytest.approx(0.8))
    decoding = found["image decoding, random crops of 256 pixels"]
    assert decoding.value == "1600 images/s (dali, 1 threads)" and decoding.ratio == pytest.approx(0.5)
    assert [one for _, one, _ in report_goals.found_of(results, cuda=False)] == [None] * len(report_goals.GOALS)

    small = [sampling(), tokenizer("decode") | dict(preset="small-f8d16"), op_record("swiglu"), op_record("swiglu", shapes="s/B2", batch=9),
             images(), training_step(part="kernels")]
    results = {"kernels_b.json": file(*small), "sampling_a.json": file(sampling(), date="2026-01-01T00:00:00+00:00")}
    on_gpu, on_cpu = ({goal.what: (one, name) for goal, one, name in report_goals.found_of(results, cuda)} for cuda in (True, False))
    assert {one for one, _ in on_gpu.values()} == {None}
    measured = {what: one.value for what, (one, _) in on_cpu.items() if one}
    assert measured == {"SwiGLU": "forward 0.667 ms; backward 1.33 ms; both passes 2 ms; (2, 256, 128)",  # no copy in the file
                        "guided sampling, 249 evaluations": "16 images/s (ours, fp32, batch 32, prepared); S, depth 4, 10 steps, 32 images",
                        "VA-VAE decoding": "40 images/s (ours); small-f8d16, 256 pixels, batch 4"}
    assert on_cpu["guided sampling, 249 evaluations"][1] == "kernels_b.json"  # the newer file
    page = "\n".join(report_goals.lines(results))
    rest = "40 images/s (ours); small-f8d16, 256 pixels, batch 4 | diffusers, fp32: 0.8 x; fp32 eager: 4 x | **0.8 x** |"
    assert f"| VA-VAE decoding | {rest}" in page and "N = 1024" not in page.partition("on a CPU, where")[2]
    assert page.count(UNMEASURED) == len(report_goals.GOALS) + 1 and "| latent loading | not measured on a CPU |  |  |  |" in page


def test_nothing_measured(tmp_path):
    """Without files every goal and command is named, and nothing else."""
    page = report.results_page({})
    for goal in report_goals.GOALS:
        assert f"| {goal.what} | {goal.goal} | {UNMEASURED} |  |" in page
        assert not goal.work or f"| {goal.work} | not measured on a CPU |  |" in page
    commands = [*report_kinds.COMMANDS, *(prefix for prefix, kind in report_kinds.KINDS.items() if kind.command)]
    assert page.count(": not yet measured (`") == len(commands)
    assert len(report.short_table({}).splitlines()) == 5  # header, everything on a GPU, convergence, the audit
    (tmp_path / "README.md").write_text("a <!-- results demo -->old<!-- /results --> b <!-- results op swiglu --><!-- /results -->\n")
    (tmp_path / "docs").mkdir()
    regions = "<!-- results origin kernels -->\n<!-- /results -->\n<!-- results study --><!-- /results -->\n"
    (tmp_path / "docs" / "notes.md").write_text(regions)
    (tmp_path / "docs" / "by_hand.md").write_text("no region\n")
    written = report.write_all(tmp_path / "absent", tmp_path)
    assert sorted(path.name for path in written) == ["README.md", "notes.md", "results.md", "results_kernels.md"]
    assert (tmp_path / "README.md").read_text() == ("a <!-- results demo -->not yet measured<!-- /results --> b <!-- results op swiglu -->"
                                                    "not measured<!-- /results -->\n")


# What is refused


def test_unknown_files_regions_and_records_are_errors(tmp_path):
    with pytest.raises(ValueError, match=r"notes.json in bench/results is of no known kind, expected kernels_\*.json"):
        write(tmp_path / "a", notes=ABOUT)
    with pytest.raises(ValueError, match="demo_cpu.json holds no commit"):
        write(tmp_path / "b", demo_cpu={key: value for key, value in DEMO.items() if key != "commit"})
    with pytest.raises(ValueError, match="kernels_a.json has schema 'other', expected"):
        rows(file(schema="other"), "kernels_a.json")
    with pytest.raises(ValueError, match="step_a.json holds records of kind 'riddle', expected"):
        rows(file(dict(kind="riddle")), "step_a.json")
    with pytest.raises(ValueError, match="demo_a.json has no 'runs', expected what its kind of files holds"):
        report.results_page({"demo_a.json": ABOUT})
    with pytest.raises(ValueError, match="here has a region 'riddle', expected one of demo"):
        report.fill("<!-- results riddle --><!-- /results -->", {}, "here")
    for text in ("<!-- results demo -->", "<!-- results demo --> <!-- results demo --><!-- /results -->", "<!-- /results -->"):
        with pytest.raises(ValueError, match="do not match"):
            report.fill(text, {}, "here")


def test_longest_prefix_wins():
    assert report.kind_of("tokenizer_study_smoke_cpu.json") == "tokenizer_study" and report.kind_of("kernels_nvidia_h200.json") == "kernels"


def test_who_measured():
    assert about("a", ABOUT | GPU).hardware == "A Card" and about("a", ABOUT | GPU).cuda and not about("a", ABOUT).cuda
    logged = dict(environment=dict(date="2026", commit="c", python="3", torch="2", device="cuda:0", hardware="Another Card"))
    assert about("a", logged).hardware == "Another Card" and about("a", logged).cuda and about("a", logged).versions == "python 3, torch 2"


# Plots


def test_plots_are_drawn_alike_and_stale_ones_removed(tmp_path):
    folder, docs = tmp_path / "results", tmp_path / "docs"
    write(folder, kernels_a=file(copy_record(10), op_record()), sampling_a=file(sampling()), step_a=file(training_step(), OVERLAY),
          solvers_a=SOLVERS)
    written = report.write_all(folder, tmp_path)
    pictures = {path.name: path.read_bytes() for path in written if path.suffix == ".png"}
    assert pictures.keys() == {"kernels_a_speedup.png", "kernels_a_roofline.png", "sampling_a_sampling.png", "step_a_training_step.png",
                               "step_a_overlay_s.png", "solvers_a_error.png"}
    assert all(3000 < len(data) < 100_000 for data in pictures.values())
    (docs / "kernels_gone_speedup.png").write_bytes(b"old")
    (docs / "digits.png").write_bytes(b"not ours")
    report.write_all(folder, tmp_path)
    assert {path.name: path.read_bytes() for path in docs.glob("*.png")} == pictures | {"digits.png": b"not ours"}
    for name in pictures:
        assert f"]({name})" in (docs / "results.md").read_text()


def test_every_op_has_a_place(tmp_path):
    page = report.results_page({"kernels_a.json": file(*(op_record(op) for op in OPS))})
    assert all(f"| {op}, forward + backward |" in page for op in OPS)
