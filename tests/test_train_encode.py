"""train/encode.py as users run it: killed at any moment, by several processes, with bad images; and training on what it made."""
import json
import os
import random
import runpy
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bench import fork
from lightningdit.latents import LatentStore
from lightningdit.log import read_log
from lightningdit.tokenizer.vavae import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
ENCODE, TRAIN = (ROOT / "train" / name for name in ("encode.py", "dit.py"))
BAD = "cat/005.png"
SMALL = ("--model.depth 1 --model.hidden-size 32 --model.num-heads 2 --batch-size 16 --steps 6 --optim.warmup 2 --log-every 3 "
         "--sample-every 6 --sample-num 4 --sample.num-steps 2 --sample.batch-size 5 --validate-every 3 --data.image-size 16 "
         "--data.flip").split()


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """150 images of three classes, one of which is none."""
    root, rng = tmp_path_factory.mktemp("images") / "photos", np.random.default_rng(0)
    for level, name in enumerate(("bird", "cat", "dog")):
        (root / name).mkdir(parents=True)
        for i in range(50):
            Image.fromarray(rng.integers(0, 80 + 80 * level, (20, 24, 3), dtype=np.uint8)).save(root / name / f"{i:03d}.png")
    (root / BAD).write_bytes(b"this is text")
    return root


def arguments(photos, out, *more):
    return ["--data.path", str(photos), "--data.image-size", "16", "--tokenizer.path", "digits", "--batch-size", "5", "--shard-size", "5",
            "--threads", "1", "--out", str(out), *map(str, more)]


def encode(*args):
    """In this process; the number of threads is given back."""
    threads = torch.get_num_threads()
    try:
        assert runpy.run_path(str(ENCODE))["main"](list(args[:])) == 0
    finally:
        torch.set_num_threads(threads)


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def undisturbed(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("undisturbed") / "store"
    encode(*arguments(photos, out))
    return out


def test_what_a_store_holds(photos, undisturbed):
    store = LatentStore(undisturbed, verify=True)
    assert sorted(path.name for path in undisturbed.iterdir()) == ["index.json", *(f"shard_{i:05d}.safetensors" for i in range(30))]
    assert store.labels.bincount().tolist() == [50, 49, 50] and store.classes == ["bird", "cat", "dog"]
    assert [name for name, _ in store.index["bad"]] == [BAD] and "ValueError: cannot identify" in store.index["bad"][0][1]
    assert (store.shape, store.views, store.plan["crop"], store.plan["decoder"]) == ((4, 8, 8), 2, "center", "pillow")
    assert store.plan["tokenizer"] == Tokenizer.load("digits").sha256


def test_killed_ten_times_it_is_the_same_store(photos, undisturbed, tmp_path):
    """SIGKILL at random moments after its work began; two lives of three reach at least one more shard."""
    out, draw, moments = tmp_path / "store", random.Random(0), []

    def whole():
        return len(list(out.glob("shard_*.json")))

    for life in range(11):
        before = whole()
        process = fork.start(ENCODE, *arguments(photos, out), outputs=(os.devnull, tmp_path / "errors"))
        if life == 10:
            process.join(120)
            assert process.exitcode == 0, (tmp_path / "errors").read_text()
            break
        deadline = time.monotonic() + 120
        while not (out / "plan.json").exists() or (life % 3 and whole() == before):
            assert process.exitcode is None and time.monotonic() < deadline, (tmp_path / "errors").read_text()
            time.sleep(0.002)
        time.sleep(draw.random() * 0.03)
        process.kill()
        process.join(30)
        assert process.exitcode == -signal.SIGKILL
        moments.append(whole())
    assert moments == sorted(moments) and len(set(moments)) >= 4, moments
    assert bytes_of(out) == bytes_of(undisturbed)


def test_two_processes_make_the_same_store(photos, undisturbed, tmp_path, script):
    result = script(ENCODE, *arguments(photos, tmp_path / "store", "--device", "cpu"), processes=2)
    assert bytes_of(tmp_path / "store") == bytes_of(undisturbed) and result.stdout.count("149 images in 3 classes, 30 shards") == 1


@pytest.mark.parametrize("more, message", [
    (["--data.image-size", 15], "data.image_size: got 15, expected a multiple of 2"),
    (["--tokenizer.path", "nowhere.safetensors"], "no file nowhere.safetensors"),
    (["--shard-size", 0], "shard_size: got 0, expected a positive number"),
    (["--batch-size", 6], "holds a store of something else.*\n  batch_size: 5 -> 6"),
    (["--data.flip", "False"], "\n  views: 2 -> 1"),
])
def test_bad_input_is_said_before_any_work(photos, undisturbed, more, message):
    before = bytes_of(undisturbed)
    more = ["--data.no-flip"] if more[0] == "--data.flip" else more
    with pytest.raises((ValueError, OSError), match=message):
        encode(*arguments(photos, undisturbed, *more))
    assert bytes_of(undisturbed) == before


def test_bf16_halves_the_store(photos, undisturbed, tmp_path):
    encode(*arguments(photos, tmp_path / "store", "--dtype", "bf16"))
    half, whole = LatentStore(tmp_path / "store"), LatentStore(undisturbed)
    assert half.nbytes * 2 == whole.nbytes
    assert torch.equal(half.gather(torch.arange(149), 1), whole.gather(torch.arange(149), 1).bfloat16())


def train(run, *args):
    assert runpy.run_path(str(TRAIN))["main"](["--run", str(run), *SMALL, *map(str, args)]) == 0
    return [(line["step"], line["loss"], line["grad_norm"]) for line in read_log(run) if "loss" in line]


def test_training_on_a_store_is_training_on_its_images(photos, undisturbed, tmp_path):
    """Wherever the latents lie, and although the images' own store has one shard where the other has thirty."""
    expected = train(tmp_path / "images", "--data.path", photos)
    assert len(expected) == 6
    for where in ("none", "ram"):
        run = tmp_path / where
        torch.manual_seed(0)
        got = train(run, "--data.path", undisturbed, "--data.resident", where)
        # Not bitwise: batches lie at other addresses, by whose alignment matrix products may round (seen once in a gradient norm, 7e-8).
        assert torch.tensor(got).allclose(torch.tensor(expected), rtol=1e-6) and not (run / "latents").exists()
    cached = next((tmp_path / "images" / "latents").iterdir())
    assert len(LatentStore(cached).blocks) == 1 and json.loads((cached / "index.json").read_text())["images"] == 149


def test_training_with_another_tokenizer_shows_both_hashes(undisturbed, tmp_path):
    other, right = Tokenizer.load("digits"), Tokenizer.load("digits").sha256
    other.latent_std.mul_(2)
    other.save(tmp_path / "other.safetensors")
    with pytest.raises(ValueError) as error:
        train(tmp_path / "run", "--data.path", undisturbed, "--tokenizer.path", tmp_path / "other.safetensors")
    assert right in str(error.value) and other.sha256 in str(error.value) and "other statistics" in str(error.value)
    with pytest.raises(ValueError, match="data.image_size: got 32, expected 16"):
        train(tmp_path / "run2", "--data.path", undisturbed, "--data.image-size", 32)


def test_dry_run_counts_the_store(undisturbed, tmp_path, capsys):
    assert train(tmp_path / "run", "--data.path", undisturbed, "--dry-run") == []
    assert "8.4 of 16 images" in capsys.readouterr().out
