"""Bulk generation: the same images whoever draws them, restarts, files that other tools read, and the prepared model behind it."""
import errno
import io
import json
import os
import signal
import time
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from bench import fork
from lightningdit import cli, generation, sampler
from lightningdit.images import open_images
from lightningdit.model import LightningDiT

ROOT = Path(__file__).resolve().parent.parent
CODE = "from lightningdit.cli import main; raise SystemExit(main())"
SHAPE = (4, 6, 3)


def draw(labels, seeds):
    """Stands for a model: (B, 1, 1, 2) latents that are label and seed."""
    return torch.tensor([labels, seeds], dtype=torch.float64).T.reshape(-1, 1, 1, 2)


def decode(latents):
    """Images that show label, seed, and a pattern that PNG must keep."""
    pattern = torch.arange(4 * 6 * 3).reshape(SHAPE) * 3
    return (pattern + 40 * latents[:, 0, 0, 0, None, None, None].long() + latents[:, 0, 0, 1, None, None, None].long()).to(torch.uint8)


def generate(out, num=50, seed=5, labels=None, plan=None, draw=draw, **options):
    labels = generation.make_labels("balanced", num, [0, 1, 2], 0) if labels is None else labels
    return generation.generate(draw, decode, out, labels, seed=seed, plan=plan or dict(steps=3), shape=SHAPE,
                               **dict(batch_size=16, shard_size=8) | options)


def opened(file):
    return pytest.importorskip("PIL.Image").open(file)


def expected(num=50, seed=5):
    labels = [i % 3 for i in range(num)]
    return decode(draw(labels, range(seed, seed + num))).numpy(), labels


# Files


def test_npz_is_what_adm_writes(tmp_path):
    generate(tmp_path / "a.npz")
    images, labels = expected()
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert file.files == ["arr_0", "arr_1"]
        assert np.array_equal(file["arr_0"], images) and file["arr_0"].dtype == np.uint8
        assert file["arr_1"].tolist() == labels and file["arr_1"].dtype == np.int64
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.npz.json"]  # the shards are gone


def test_zip_and_folder_are_png_files_with_labels(tmp_path):
    images, labels = expected()
    generate(tmp_path / "a.zip")
    generate(tmp_path / "png")
    generate(tmp_path / "zips", format="zip")
    generate(tmp_path / "npzs", format="npz")
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.testzip() is None
        described = json.loads(archive.read("dataset.json"))
        assert described["labels"] == [[f"{i:06d}.png", label] for i, label in enumerate(labels)]
        for i in range(50):
            content = archive.read(f"{i:06d}.png")
            assert np.array_equal(np.asarray(opened(io.BytesIO(content))), images[i])
            assert content == (tmp_path / "png" / f"{i:06d}.png").read_bytes()
    assert json.loads((tmp_path / "png" / "dataset.json").read_text()) == described
    read = open_images(tmp_path / "a.zip")  # as our own training and evaluation read it
    assert len(read) == 50 and read.labels.tolist() == labels
    for folder, suffix in (("zips", ".zip"), ("npzs", ".npz")):
        assert [path.name for path in sorted((tmp_path / folder).glob("shard_*"))] == [f"shard_{n:05d}{suffix}" for n in range(7)]
    with np.load(tmp_path / "npzs" / "shard_00006.npz") as last:
        assert np.array_equal(last["arr_0"], images[48:]) and last["arr_1"].tolist() == labels[48:]


def test_grey_images(tmp_path):
    generation.generate(draw, lambda latents: decode(latents)[..., :1], tmp_path / "a.zip", [0, 1], seed=0, plan={}, shape=(4, 6, 1))
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert opened(io.BytesIO(archive.read("000001.png"))).mode == "L"


@pytest.mark.parametrize("name", ["a.npz", "a.zip"])
@pytest.mark.parametrize("change", [dict(batch_size=1), dict(batch_size=7), dict(batch_size=64)])
def test_files_are_the_same_to_the_byte_for_any_batch(tmp_path, name, change, monkeypatch):
    one = generate(tmp_path / name).read_bytes()
    monkeypatch.setattr(time, "time", lambda: 2e9)
    (tmp_path / "b").mkdir()
    assert generate(tmp_path / "b" / name, **change).read_bytes() == one


def test_only_the_decoder_is_filled_up_on_a_cpu(tmp_path):
    drawn, decoded = [], []
    generation.generate(lambda *a: drawn.append(len(a[0])) or draw(*a), lambda z: decoded.append(len(z)) or decode(z), tmp_path / "a.npz",
                        [0] * 11, seed=0, plan={}, shape=SHAPE, batch_size=4)
    assert drawn == [4, 4, 3] and decoded == [8, 8, 8]


# Restarts


@pytest.mark.parametrize("name", ["a.npz", "a.zip", "folder"])
def test_a_stopped_job_goes_on_where_it_was(tmp_path, name):
    drawn = []

    def counted(labels, seeds, most=3):
        if len(drawn) == most:
            raise KeyboardInterrupt
        drawn.append(seeds)
        return draw(labels, seeds)

    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / name, draw=counted)
    drawn.clear()
    out = generate(tmp_path / name, draw=lambda *a: counted(*a, most=99))
    assert min(map(min, drawn)) == 5 + 48, "the six complete shards were drawn again"
    whole = generate(tmp_path / f"whole_{name}")
    if name == "folder":
        contents = [{path.name: path.read_bytes() for path in folder.glob("[!.]*")} for folder in (out, whole)]
        assert contents[0] == contents[1] and len(contents[0]) == 51  # and dataset.json
    else:
        assert out.read_bytes() == whole.read_bytes()
    drawn.clear()
    generate(tmp_path / name, draw=counted)
    assert not drawn, "a finished job draws nothing"


def test_a_damaged_or_removed_shard_is_drawn_again(tmp_path):
    out, images = generate(tmp_path / "folder"), expected()[0]
    (out / "000009.png").unlink()
    (out / "000030.png").write_bytes(b"")
    drawn = []
    generate(out, draw=lambda labels, seeds: drawn.extend(seeds) or draw(labels, seeds))
    assert sorted(drawn) == [5 + i for i in (*range(8, 16), *range(24, 32))]
    assert all(np.array_equal(np.asarray(opened(out / f"{i:06d}.png")), images[i]) for i in range(50))


def test_a_full_disk_says_so_and_loses_nothing(tmp_path, monkeypatch):
    calls, real = [], os.fsync

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) >= 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"a.npz.shards: the disk is full. 40 of 50 images are complete there; the same command goes on"):
        generate(tmp_path / "a.npz")
    monkeypatch.setattr(os, "fsync", real)
    assert not list((tmp_path / "a.npz.shards").glob(".partial*"))
    generate(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert np.array_equal(file["arr_0"], expected()[0])


def test_too_little_space_is_said_before_the_first_image(tmp_path, monkeypatch):
    monkeypatch.setattr(generation.shutil, "disk_usage", lambda path: type("Usage", (), dict(free=50 * 72 * 2 - 1)))
    with pytest.raises(OSError, match="GB are needed"):
        generate(tmp_path / "a.npz", draw=None)


@pytest.mark.parametrize("name", ["a.npz", "folder"])
@pytest.mark.parametrize(("change", "message"), [(dict(seed=6), "seed: 5 -> 6"), (dict(plan=dict(steps=4)), "steps: 3 -> 4"),
                                                 (dict(num=51), "num: 50 -> 51"), (dict(labels=[1] * 50), "labels: "),
                                                 (dict(shard_size=9), "shard_size: 8 -> 9")])
def test_other_settings_are_not_mixed_in(tmp_path, name, change, message):
    before = generate(tmp_path / name)
    content = before.read_bytes() if before.is_file() else None
    with pytest.raises(ValueError, match="made with other settings, expected a new name:\n(.*\n)* *" + message):
        generate(tmp_path / name, **change)
    assert content is None or before.read_bytes() == content


def test_foreign_files_are_not_touched(tmp_path):
    (tmp_path / "a.npz").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "000000.png").write_bytes(b"mine")
    for name in ("a.npz", "folder"):
        with pytest.raises(ValueError, match=f"out: .*{name} "):
            generate(tmp_path / name)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "folder" / "000000.png").read_bytes() == b"mine"


# Labels and arguments


def test_labels(tmp_path):
    counts = Counter(generation.make_labels("balanced", 50_000, range(1000), 0).tolist())
    assert set(counts.values()) == {50} and len(counts) == 1000
    random = generation.make_labels("random", 10_000, [3, 5, 8, 9], 7)
    assert torch.equal(random[:100], generation.make_labels("random", 100, [3, 5, 8, 9], 7))
    assert not torch.equal(random, generation.make_labels("random", 10_000, [3, 5, 8, 9], 8))
    assert all(abs(count - 2500) < 5 * 43 for count in Counter(random.tolist()).values()) and set(random.tolist()) == {3, 5, 8, 9}
    (tmp_path / "labels.txt").write_text("3\n9\n8\n")
    np.save(tmp_path / "labels.npy", np.array([3, 9, 8], np.int32))
    for name in ("labels.txt", "labels.npy"):
        assert generation.make_labels(tmp_path / name, 2, [3, 8, 9], 0).tolist() == [3, 9]
        with pytest.raises(ValueError, match="expected at least 4 integers"):
            generation.make_labels(tmp_path / name, 4, [3, 8, 9], 0)
        with pytest.raises(ValueError, match="holds 9, expected classes"):
            generation.make_labels(tmp_path / name, 2, [3, 8], 0)
    (tmp_path / "labels.txt").write_text("3\ncat\n")
    with pytest.raises(ValueError, match="neither an .npy"):
        generation.make_labels(tmp_path / "labels.txt", 2, [3], 0)
    with pytest.raises(ValueError, match="labels: got 'balance', expected balanced, random or a file"):
        generation.make_labels("balance", 2, [3], 0)


@pytest.mark.parametrize(("options", "message"), [(dict(batch_size=0), "batch_size: got 0"), (dict(shard_size=-1), "shard_size: got -1"),
                                                  (dict(num=0), "num: got 0"), (dict(seed=2**32 - 49), "seed: got 4294967247"),
                                                  (dict(format="tar"), "format: got 'tar'"), (dict(format="npz"), "ends in .zip")])
def test_bad_arguments_are_named_before_anything_is_made(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        generate(tmp_path / "a.zip", draw=None, **options)
    assert not list(tmp_path.iterdir())


# The prepared model


def random_transformer(**changes):
    torch.manual_seed(0)
    model = LightningDiT(**dict(input_size=4, in_channels=4, hidden_size=48, depth=2, num_heads=2, num_classes=20, use_swiglu=True,
                                use_rope=True, use_rmsnorm=True) | changes).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


SETTINGS = dict(latent_shape=(4, 4, 4), num_classes=20, num_steps=5)


def prepared(model, labels, **changes):
    return sampler.Prepared(model, labels, 20, **dict(batch_size=8, num_steps=5, guided=True) | changes)


@pytest.mark.parametrize(("flags", "table_bytes", "method"), [
    ({}, 2**30, "heun"), (dict(wo_shift=True), 0, "unipc"), (dict(use_rmsnorm=False, use_swiglu=False, use_rope=False), 0, "heun"),
    (dict(wo_shift=True), 2**30, "sde_heun")])
def test_prepared_model_draws_the_same(flags, table_bytes, method):
    model, labels, seeds = random_transformer(**flags), [(7 * i) % 20 for i in range(14)], range(14)
    settings = dict(SETTINGS, labels=labels, seeds=seeds, batch_size=8, method=method, guidance_scale=3.0, guidance_interval=(0.3, 0.9))
    truth = sampler.sample(model, **settings)
    fast = prepared(model, labels, table_bytes=table_bytes)
    assert fast.whole_job == (table_bytes > 0)
    drawn = sampler.sample(fast, **settings)
    torch.testing.assert_close(drawn, truth, rtol=1e-5, atol=1e-5)
    alone = sampler.sample(fast, **settings | dict(labels=labels[13:14], seeds=[13]))
    assert torch.equal(alone[0], drawn[13])


def test_conditioning_runs_once_for_each_time_and_label():
    model, labels, rows = random_transformer(), [3, 5, 3, 3, 5, 3, 5, 5] * 3, []
    model.blocks[1].adaLN_modulation.register_forward_hook(lambda module, inputs, output: rows.append(len(output)))
    settings = dict(SETTINGS, labels=labels, seeds=range(24), batch_size=8, guidance_scale=2.0)
    sampler.sample(prepared(model, labels), **settings)
    assert rows == [16] * 5  # 3 labels, filled up to 16, at 5 times, for all three batches
    rows.clear()
    sampler.sample(prepared(model, labels, table_bytes=0), **settings)
    assert rows == [16] * 15
    rows.clear()
    sampler.sample(model, **settings)
    assert rows == [16] * 15


def test_prepared_guide_and_dopri5():
    model, weak, labels = random_transformer(), random_transformer(depth=1), [1, 2, 19]
    settings = dict(SETTINGS, labels=labels, seeds=range(3), guidance_scale=2.0)
    fast = [prepared(m, labels, guided=False) for m in (model, weak)]
    torch.testing.assert_close(sampler.sample(fast[0], guide=fast[1], **settings), sampler.sample(model, guide=weak, **settings),
                               rtol=1e-5, atol=1e-5)
    adaptive = prepared(model, labels, fixed_times=False)
    drawn = sampler.sample(adaptive, method="dopri5", **settings)
    torch.testing.assert_close(drawn, sampler.sample(model, method="dopri5", **settings), rtol=1e-3, atol=1e-3)
    assert len(adaptive.table) <= 2  # times that never come again are not collected


def test_prepared_bf16_is_autocast():
    model, labels = random_transformer(), [1, 2, 3, 4]
    settings = dict(SETTINGS, labels=labels, seeds=range(4), guidance_scale=2.0)
    with torch.autocast("cpu", torch.bfloat16):
        truth = sampler.sample(prepared(model, labels), **settings)
        same = sampler.sample(prepared(model, labels, autocast=torch.bfloat16), **settings)
    assert model.blocks[0].attn.qkv.weight.dtype == torch.bfloat16 and model.x_embedder.proj.weight.dtype == torch.float32
    assert torch.equal(same, truth)


def test_prepared_compiled():
    model, labels = random_transformer(depth=1), [1, 2, 3, 4]
    settings = dict(SETTINGS, labels=labels, seeds=range(4), guidance_scale=2.0, num_steps=3)
    truth = sampler.sample(prepared(model, labels), **settings)
    torch.testing.assert_close(sampler.sample(prepared(model, labels, compile=True), **settings), truth, rtol=1e-4, atol=1e-4)


def test_prepared_needs_a_lightningdit():
    with pytest.raises(ValueError, match="model: got function, expected a LightningDiT"):
        prepared(draw, [0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is visible to torch")
@pytest.mark.parametrize("method", ["heun", "ab2"])
@pytest.mark.parametrize("bf16", [False, True])
def test_cuda_graphs_and_the_decoder_of_a_side_stream(tmp_path, method, bf16):
    device, labels = torch.device("cuda"), [i % 20 for i in range(40)]
    settings = dict(SETTINGS, method=method, guidance_scale=3.0, guidance_interval=(0.3, 0.9), device=device)
    model = random_transformer().to(device)

    def show(latents):
        return (latents.permute(0, 2, 3, 1)[..., :3] * 40 + 128).clamp(0, 255).to(torch.uint8)

    def images(model, out):
        generation.generate(lambda labels, seeds: sampler.sample(model, labels=labels, seeds=seeds, **settings), show, out, labels, seed=0,
                            plan={}, shape=(4, 4, 3), batch_size=16, device=device)
        return np.load(out)["arr_0"].astype(int)

    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        plain = images(model, tmp_path / "plain.npz")
        fast = prepared(model, labels, batch_size=16, device=device, autocast=torch.bfloat16 if bf16 else None, compile=True)
        replayed = images(fast, tmp_path / "fast.npz")
    assert sorted(fast.graphs) == [16, 32]
    assert plain.std() > 10 and abs(replayed - plain).max() <= (12 if bf16 else 1)


# The command


@pytest.fixture(scope="module")
def weights(digits_model, tmp_path_factory):
    return digits_model(tmp_path_factory.mktemp("weights"), others=["guide"], num_steps=3, guidance_scale=2.0,
                        guidance_interval=[0.3, 0.9], batch_size=16)


def test_two_processes_write_the_bytes_of_one(weights, tmp_path, script):
    (tmp_path / "run.py").write_text(CODE)
    options = ["sample", *weights, "--num", "70", "--shard-size", "8", "--seed", "3"]
    result = script(tmp_path / "run.py", *options, "--out", tmp_path / "two.npz", "--batch-size", 5, processes=2)
    assert result.stdout.count("70 images of classes") == 1
    assert cli.main([*options, "--out", str(tmp_path / "one.npz")]) == 0
    assert (tmp_path / "two.npz").read_bytes() == (tmp_path / "one.npz").read_bytes()
    images = np.load(tmp_path / "one.npz")["arr_0"]
    assert len(np.unique(images.reshape(70, -1), axis=0)) == 70 and images.std() > 10
    cli.main([*options[:-4], "--seed", "43", "--num", "30", "--out", str(tmp_path / "later.npz")])  # seed 43 is image 40, of the same class
    assert np.array_equal(np.load(tmp_path / "later.npz")["arr_0"], images[40:])


def test_a_killed_job_goes_on(weights, tmp_path):
    out, options = tmp_path / "killed.npz", ["sample", *weights, "--num", "112", "--shard-size", "16"]
    (tmp_path / "run.py").write_text(CODE)
    process = fork.start(tmp_path / "run.py", *options, "--num-steps", 60, "--out", out)
    records, deadline = tmp_path / "killed.npz.shards" / ".generation", time.monotonic() + 120
    while len(list(records.glob("shard_*.json"))) < 2 and process.exitcode is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    complete = {path: (path.stat().st_mtime_ns) for path in records.glob("shard_*.json")}
    assert len(complete) >= 2 and not out.exists()
    with pytest.raises(SystemExit, match=r"num_steps: 60 -> 7"):
        cli.main([*options, "--num-steps", "7", "--out", str(out)])
    with pytest.raises(SystemExit, match=r"checkpoint: '\w{64}' -> '\w{64}'"):
        other = [argument.replace("model.safetensors", "guide.safetensors") for argument in options]
        cli.main([*other, "--num-steps", "60", "--out", str(out)])
    assert {path: path.stat().st_mtime_ns for path in records.glob("shard_*.json")} == complete
    assert cli.main([*options, "--num-steps", "60", "--out", str(out)]) == 0
    assert np.load(out)["arr_0"].shape == (112, 8, 8, 1)


def test_options_reach_the_sampler(weights, tmp_path):
    def images(name, *options):
        assert cli.main(["sample", *weights, "--num", "8", "--precision", "fp32", "--out", str(tmp_path / f"{name}.npz"), *options]) == 0
        return np.load(tmp_path / f"{name}.npz")

    plain = images("plain")
    assert plain["arr_1"].tolist() == list(range(8))
    for options in (["--guidance-scale", "1"], ["--guidance-interval", "0", "0.5"], ["--guidance-channels", "1"], ["--shift", "0.3"],
                    ["--guidance-rescale", "1"], ["--method", "heun"], ["--precision", "bf16"], ["--num-steps", "9"], ["--classes", "3"]):
        assert not np.array_equal(images("-".join(options).replace("/", ""), *options)["arr_0"], plain["arr_0"]), options
    assert np.array_equal(images("all", "--guidance-channels", "0")["arr_0"], plain["arr_0"])
    assert images("random", "--labels", "random", "--classes", "2,4")["arr_1"].tolist() != [2, 4] * 4
    (tmp_path / "labels.txt").write_text("7 7 1 1 0 0 9 9 5")
    assert images("given", "--labels", str(tmp_path / "labels.txt"))["arr_1"].tolist() == [7, 7, 1, 1, 0, 0, 9, 9]
    for options, message in ((["--format", "zip"], "format: got 'zip' for a file"), (["--batch-size", "0"], "sample.batch_size"),
                             (["--guidance-rescale", "2"], "sample.guidance_rescale"), (["--labels", "none"], "labels: got 'none'")):
        with pytest.raises(SystemExit, match=message):
            images("bad", *options)
    with pytest.raises(SystemExit, match="format: got 'png', expected none for a grid"):
        cli.main(["sample", *weights, "--format", "png", "--out", str(tmp_path / "grid.png")])
