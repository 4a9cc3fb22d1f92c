"""The latent store: writing, reading, damage, the loader, the official format, the map."""
import json
import os
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bench.fuzz import examples, tally
from lightningdit import cli, latent_tools, latents
from lightningdit.distributed import generator_for, seed_for
from lightningdit.images import TensorBatches, digits
from lightningdit.latents import LatentStore, Loader, Writer, batch_indices, batch_views, make_plan, spans
from lightningdit.tokenizer.vavae import Tokenizer, latent_statistics
from lightningdit_kernels import native

SHAPE = (3, 2, 4)  # C, h, w


def write(path, moments, labels, shard_size=7, parts=2, dtype="fp32", normalisation=None):
    """A store of moments (n, M, P * C, h, w) and labels (n,)."""
    source = types.SimpleNamespace(classes=[f"class {c}" for c in range(int(labels.max()) + 1)], fingerprint="test")
    n, views, channels, *size = moments.shape
    plan = make_plan(source, n, shape=(channels // parts, *size), views=views, parts=parts, dtype=dtype, shards=spans(n, shard_size))
    writer = Writer(path, plan)
    for number in writer.missing:
        part = slice(*plan["shards"][number])
        writer.write(number, moments[part].to(latents.DTYPES[dtype]), labels[part], torch.arange(part.start, part.stop))
    writer.finish(normalisation or dict(tokenizer=None, mean=None, std=None))
    return LatentStore(path)


def random_moments(n, views=2, parts=2, shape=SHAPE):
    return torch.randn(n, views, parts * shape[0], *shape[1:], generator=generator_for("moments", n, views))


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """25 images in 4 shards; image i has label i."""
    moments = random_moments(25)
    return moments, write(tmp_path_factory.mktemp("numbered") / "store", moments, torch.arange(25))


def bytes_of(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# Drawing and order


def test_draw_is_mean_plus_deviation_times_noise():
    mean, std, noise = (torch.rand(3, 2, 2, 2, generator=generator_for("draw", i)) for i in range(3))
    moments = torch.cat([mean, 2 * torch.log(std)], dim=1)
    torch.testing.assert_close(latents.draw(moments, noise), mean + std * noise)
    assert latents.draw(moments.bfloat16(), noise).dtype == torch.float32
    assert torch.equal(latents.draw(mean, noise), mean), "samples stay what they are"


def test_every_image_once_an_epoch_in_an_order_that_depends_on_seed_and_step_only():
    rows = [batch_indices(step, 4, 10, seed=0) for step in range(10)]
    sequence = torch.cat(rows).tolist()
    epochs = [sequence[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and len({tuple(epoch) for epoch in epochs}) == 4
    latents._epoch_order.cache_clear()
    assert torch.equal(batch_indices(7, 4, 10, seed=0), rows[7])
    assert not torch.equal(torch.cat([batch_indices(s, 4, 10, seed=1) for s in range(10)]), torch.tensor(sequence))
    assert len(batch_indices(0, 35, 10, seed=0)) == 35  # a batch larger than the set


def test_the_mirror_is_a_function_of_seed_epoch_and_index():
    def chosen(batch_size, seed=0, n=100):
        found = {}
        for step in range(3 * n // batch_size):
            for place, (index, view) in enumerate(zip(batch_indices(step, batch_size, n, seed).tolist(),
                                                      batch_views(step, batch_size, n, 2, seed).tolist(), strict=True)):
                found[(step * batch_size + place) // n, index] = view
        return found

    first = chosen(10)
    assert len(first) == 300 and first == chosen(30) and first != chosen(10, seed=1)
    assert 110 < sum(first.values()) < 190 and any(first[0, i] != first[1, i] for i in range(100))


def test_seed_rule_mixes():
    seeds = {seed_for(seed, purpose, step) for seed in range(10) for purpose in ("noise", "mirror") for step in range(100)}
    assert len(seeds) == 2000 and all(0 <= seed < 2**63 for seed in seeds)


# Reading


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("shard_size", [7, 100])
@pytest.mark.parametrize("library", [True, False])
def test_gather_is_what_was_written_whatever_the_shards(tmp_path, monkeypatch, dtype, shard_size, library):
    if library and not native.available:
        pytest.skip(native.about)
    monkeypatch.setattr(native, "available", library)
    moments = random_moments(25)
    store = write(tmp_path / "s", moments, torch.arange(25) % 3, shard_size, dtype=dtype)
    assert len(store.blocks) == (4 if shard_size == 7 else 1) and store.classes == ["class 0", "class 1", "class 2"]
    indices, views = torch.tensor([24, 0, 7, 6, 0, 13]), torch.tensor([0, 1, 1, 0, 0, 1])
    expected = moments.to(latents.DTYPES[dtype])[indices, views]
    buffer = torch.empty(6, expected[0].numel(), dtype=expected.dtype)
    for held in (store, store.resident("ram")):
        assert torch.equal(held.gather(indices, views), expected)
        assert torch.equal(held.gather(indices, views, out=buffer), expected) and torch.equal(buffer.view_as(expected), expected)
        assert torch.equal(held.gather(indices), moments.to(expected)[indices, 0])
        part = held.subset(torch.tensor([3, 20, 24])).subset(torch.tensor([2, 0]))
        assert torch.equal(part.gather(torch.tensor([0, 1])), moments.to(expected)[[24, 3], 0]) and part.labels.tolist() == [0, 0]
    assert store.resident("auto").in_memory and store.resident("none") is store
    assert store.gather(indices[:0]).shape == (0, *expected.shape[1:])
    for bad in (torch.tensor([25]), torch.tensor([-1])):
        with pytest.raises(IndexError):
            store.gather(bad)


def test_gather_keeps_to_its_memory(numbered):
    store, row = numbered[1], numbered[0][0, 0].numel()
    with pytest.raises(IndexError, match="views: got 0 to 2, expected 0 to 1"):
        store.gather(torch.tensor([0, 24]), torch.tensor([0, 2]))
    for out in (torch.empty(2, row), torch.empty(3, row, dtype=torch.float64), torch.empty(row, 3).T):
        with pytest.raises(ValueError, match=f"out: got .*expected contiguous torch.float32 .3, {row}."):
            store.gather(torch.arange(3), out=out)


def test_split_is_disjoint_complete_and_repeatable(numbered):
    store = numbered[1]
    train, val = store.split(0.25, generator_for(0, "split"))
    assert (len(train), len(val)) == (19, 6)
    assert sorted([*train.labels.tolist(), *val.labels.tolist()]) == list(range(25))
    assert torch.equal(store.split(0.25, generator_for(0, "split"))[1].labels, val.labels)
    assert store.split(0.0, generator_for(0)) == (store, None)


def test_statistics_are_those_of_the_unflipped_latents(tmp_path):
    samples = 3 + 2 * random_moments(40, parts=1)
    found = write(tmp_path / "samples", samples, torch.zeros(40, dtype=torch.int64), parts=1).index["statistics"]
    mean, std = samples[:, 0].double().mean((0, 2, 3)), samples[:, 0].double().std((0, 2, 3))
    torch.testing.assert_close(torch.tensor(found["mean"], dtype=torch.float64), mean, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.tensor(found["std"], dtype=torch.float64), std, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.tensor(found["std"]), latent_statistics(samples[:, 0])[1])

    moments = random_moments(40)
    store = write(tmp_path / "moments", moments, torch.zeros(40, dtype=torch.int64))
    variances = torch.stack([latents.draw(moments[:, 0], torch.randn(40, *SHAPE, generator=generator_for("noise", i))).var((0, 2, 3))
                             for i in range(2000)])
    error = 5 * variances.std(0) / 2000**0.5  # five standard errors of that mean
    assert ((torch.tensor(store.index["statistics"]["std"]) ** 2 - variances.mean(0)).abs() < error).all()
    assert store.index["statistics"]["images"] == 40


# Damage


def break_json(store, **changes):
    index = json.loads((store / "index.json").read_text())
    (store / "index.json").write_text(json.dumps(index | changes))


def flip_byte(file, place):
    data = bytearray(file.read_bytes())
    data[place] ^= 16
    file.write_bytes(data)


SHARD = "shard_00001.safetensors"


@pytest.mark.parametrize("damage, message", [
    (lambda s: (s / SHARD).write_bytes((s / SHARD).read_bytes()[:-5]), f"{SHARD}: truncated or overgrown, got "),
    (lambda s: (s / SHARD).unlink(), f"{SHARD} is missing"),
    (lambda s: shutil.copy(s / "shard_00000.safetensors", s / SHARD), f"{SHARD} belongs to another store, or to another place"),
    (lambda s: flip_byte(s / SHARD, 3), f"{SHARD}: damaged"),  # the length of the header
    (lambda s: break_json(s, images=24), "index.json: damaged, it differs from its own checksum"),
    (lambda s: break_json(s, version=2), "got version 2, expected 1; this store was written by another release"),
    (lambda s: break_json(s, format="else"), "not the index of a latent store"),
    (lambda s: (s / "index.json").write_text("{"), "index.json: damaged"),
    (lambda s: (s / "index.json").write_text("[]"), "got a list, expected an object"),
    (lambda s: (s / "index.json").write_bytes(b"\xff\xfe"), "index.json: damaged"),
])
def test_damage_is_found_at_opening_and_named(numbered, tmp_path, damage, message):
    store = shutil.copytree(numbered[1].path, tmp_path / "store")
    damage(store)
    with pytest.raises(ValueError) as error:
        LatentStore(store)
    assert message in str(error.value)


def test_a_flipped_byte_of_the_moments_is_found_by_verify_and_when_read_into_memory(numbered, tmp_path, capsys):
    store = shutil.copytree(numbered[1].path, tmp_path / "store")
    assert cli.main(["latents", "verify", str(store)]) == 0 and "every shard is what was written" in capsys.readouterr().out
    flip_byte(store / SHARD, -10)
    opened = LatentStore(store)
    for read in (opened.verify, lambda: opened.resident("ram"), lambda: LatentStore(store, verify=True)):
        with pytest.raises(ValueError, match=f"{SHARD}: damaged, its SHA-256 differs"):
            read()
    with pytest.raises(SystemExit, match="its SHA-256 differs"):
        cli.main(["latents", "verify", str(store)])


def test_what_is_no_store_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not a latent store: it has no index.json"):
        LatentStore(tmp_path)
    (tmp_path / "plan.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="an unfinished latent store"):
        LatentStore(tmp_path)


def mutate(data, place, how, value):
    place %= len(data)
    if how == "flip":
        return data[:place] + bytes([data[place] ^ (value or 1)]) + data[place + 1 :]
    return data[:place] if how == "cut" else data[:place] + bytes([value]) + data[place:]


@pytest.mark.fuzz
@examples(150)
@given(place=st.integers(0, 10**6), how=st.sampled_from(["flip", "cut", "insert"]), value=st.integers(0, 255), header=st.booleans(),
       file=st.sampled_from(["index.json", SHARD]))
def test_a_mutated_store_never_passes_verification(numbered, tmp_path, place, how, value, header, file):
    """Any byte flipped, put in or cut away is an error that names the file, or (white space of the index) changes nothing."""
    target = tmp_path / "store"
    if not target.exists():
        shutil.copytree(numbered[1].path, target)
    data = (numbered[1].path / file).read_bytes()
    (target / file).write_bytes(mutate(data, place % 300 if header else place, how, value))
    try:
        opened = LatentStore(target)  # may well open: bytes of the moments are not read here
        opened.gather(torch.arange(len(opened)))
        opened.verify()
    except ValueError as error:
        assert file in str(error)
        tally("latent stores", "refused")
    else:
        assert file == "index.json" and opened.index == numbered[1].index
        tally("latent stores", "no value changed")
    finally:
        (target / file).write_bytes(data)


# Writing


def plan_of(n=25, shard_size=7, **more):
    source = types.SimpleNamespace(classes=["a", "b"], fingerprint="test")
    return make_plan(source, n, shape=SHAPE, views=2, dtype="fp32", shards=spans(n, shard_size), **more)


def test_a_writer_goes_on_where_another_stopped_and_writes_damaged_shards_anew(tmp_path):
    moments, labels = random_moments(25), torch.arange(25) % 2

    def work(path, stop_after, finish=False):
        writer = Writer(path, plan_of())
        todo = list(writer.missing)
        for number in todo[:stop_after]:
            part = slice(*writer.plan["shards"][number])
            writer.write(number, moments[part], labels[part], torch.arange(part.start, part.stop))
        if finish:
            writer.finish(dict(tokenizer=None, mean=None, std=None))
        return todo

    assert work(tmp_path / "whole", None, finish=True) == [0, 1, 2, 3]
    assert work(tmp_path / "pieces", 1) == [0, 1, 2, 3] and work(tmp_path / "pieces", 2) == [1, 2, 3]
    flip_byte(tmp_path / "pieces" / SHARD, -10)
    (tmp_path / "pieces" / ".partial_shard_00003.safetensors").write_bytes(b"half")
    assert work(tmp_path / "pieces", None, finish=True) == [1, 3]
    assert bytes_of(tmp_path / "pieces") == bytes_of(tmp_path / "whole")
    shutil.copy(tmp_path / "pieces" / "index.json", tmp_path / "pieces" / "plan.json")  # as if killed while it tidied up
    (tmp_path / "pieces" / "plan.json").write_text(json.dumps(plan_of()))
    assert work(tmp_path / "pieces", None, finish=True) == [] and bytes_of(tmp_path / "pieces") == bytes_of(tmp_path / "whole")


def test_a_writer_refuses_folders_of_others(tmp_path):
    writer = Writer(tmp_path / "store", plan_of(tokenizer="A"))
    with pytest.raises(OSError, match="another program is writing this store"):
        Writer(tmp_path / "store", plan_of(tokenizer="A"))
    writer.lock.close()
    with pytest.raises(ValueError, match="holds an unfinished store of something else.*\n  tokenizer: 'A' -> 'B'"):
        Writer(tmp_path / "store", plan_of(tokenizer="B"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"neither empty nor a latent store \(it holds cat.jpg\)"):
        Writer(tmp_path / "photos", plan_of())
    with pytest.raises(ValueError, match="shard_00000.safetensors: latents that are not finite"):
        writer.write(0, torch.full((7, 2, 6, 2, 4), torch.nan), torch.zeros(7), torch.arange(7))


def test_too_many_bad_images_stop_the_store(tmp_path):
    writer = Writer(tmp_path / "store", plan_of(n=100, shard_size=100))
    writer.write(0, random_moments(98), torch.zeros(98, dtype=torch.int64), torch.arange(98), [("cat.jpg", "empty"), ("dog.jpg", "torn")])
    with pytest.raises(ValueError, match="more than 1% of 100 images cannot be read:\n  cat.jpg: empty\n  dog.jpg: torn"):
        writer.finish(dict(tokenizer=None, mean=None, std=None))


@pytest.fixture(scope="module")
def digit_store(tmp_path_factory):
    """300 digits with mirror images."""
    images, labels = digits()
    batches = TensorBatches(images[:300], labels[:300], [str(d) for d in range(10)], "300 digits")
    return latents.encode(Tokenizer.load("digits"), batches, tmp_path_factory.mktemp("digits") / "store", shard_size=128, progress=False)


def test_encode_stores_the_posterior_of_image_and_mirror(digit_store):
    tokenizer, (images, labels) = Tokenizer.load("digits"), digits()
    pixels = images[:128].permute(0, 3, 1, 2).float() / 127.5 - 1
    for view, x in enumerate((pixels, pixels.flip(3))):
        posterior = tokenizer.encode(x)
        expected = torch.cat([posterior.mean, posterior.logvar], dim=1)
        torch.testing.assert_close(digit_store.gather(torch.arange(128), view), expected)
    assert torch.equal(digit_store.labels, labels[:300]) and digit_store.shape == (4, 4, 4)
    assert load_file(digit_store.path / "shard_00002.safetensors")["indices"].tolist() == list(range(256, 300))


def test_another_tokenizer_or_other_statistics_are_an_error_with_both_hashes(digit_store, tmp_path):
    right, weights, statistics = (Tokenizer.load("digits") for _ in range(3))
    digit_store.check_tokenizer(right)
    weights.autoencoder.decoder.conv_out.bias.add_(1)
    statistics.latent_std.mul_(2)
    for other, what in ((weights, "other weights"), (statistics, "other statistics")):
        with pytest.raises(ValueError) as error:
            digit_store.check_tokenizer(other)
        assert right.sha256 in str(error.value) and other.sha256 in str(error.value) and what in str(error.value)


def test_statistics_of_the_data_go_into_a_tokenizer_of_its_own(digit_store, tmp_path):
    images, labels = digits()
    batches = TensorBatches(images[:300], labels[:300], [str(d) for d in range(10)], "300 digits")
    store = latents.encode(Tokenizer.load("digits"), batches, tmp_path / "store", statistics="data", progress=False)
    with pytest.raises(ValueError, match="other statistics; the right one is .*tokenizer.safetensors"):
        store.check_tokenizer(Tokenizer.load("digits"))
    own = Tokenizer.load(store.path / "tokenizer.safetensors")
    store.check_tokenizer(own)
    normalised = own.normalise(latents.draw(store.gather(torch.arange(300)), torch.randn(300, 4, 4, 4, generator=generator_for("n"))))
    assert normalised.mean((0, 2, 3)).abs().max() < 0.02 and (normalised.std((0, 2, 3)) - 1).abs().max() < 0.02


# The loader


def epochs_of(store, steps, **options):
    loader = Loader(store, 10, seed=3, **options)
    batches = [tuple(tensor.clone() for tensor in next(loader)) for _ in range(steps)]
    loader.close()
    return batches


def equal(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for pair in zip(a, b, strict=True) for x, y in zip(*pair, strict=True))


def test_the_loader_brings_each_image_once_an_epoch_with_its_moments(numbered):
    moments, store = numbered
    batches = epochs_of(store, 10)
    seen = torch.cat([labels for _, labels in batches])
    assert [sorted(part.tolist()) for part in seen.split(25)] == [list(range(25))] * 4
    views = torch.cat([batch_views(step, 10, 25, 2, 3) for step in range(10)]).long()
    assert torch.equal(torch.cat([values for values, _ in batches]), moments[seen, views]) and 20 < views.sum() < 80
    plain = epochs_of(store, 5, flip=False)
    assert torch.equal(torch.cat([values for values, _ in plain]), moments[torch.cat([labels for _, labels in plain]), 0])


def test_batches_depend_on_seed_and_step_only(numbered):
    """Not on where the set lies, on reading ahead, on where the run was resumed, or on the number of processes."""
    store = numbered[1]
    expected = epochs_of(store, 12, prefetch=0)
    for prefetch in (1, 5):
        assert equal(epochs_of(store, 12, prefetch=prefetch), expected)
    for where in ("ram", "device"):
        assert equal(epochs_of(store.resident(where), 12), expected)
    assert equal(epochs_of(store, 5, start=7), expected[7:])
    shares = [epochs_of(store, 12, rank=rank, world=5) for rank in range(5)]
    assert equal([tuple(map(torch.cat, zip(*parts, strict=True))) for parts in zip(*shares, strict=True)], expected)
    bf16 = Loader(store, 10, seed=4, prefetch=0)
    assert not torch.equal(next(bf16)[1], expected[0][1])


def test_the_loader_says_what_it_cannot_do_and_passes_errors_on(numbered, tmp_path, monkeypatch):
    store = numbered[1]
    unflipped = write(tmp_path / "s", random_moments(5, views=1), torch.arange(5))
    for bad, options, message in ((store, dict(world=3), "batch_size: got 10, expected a positive multiple of 3"),
                                  (unflipped, {}, "holds no mirror images"), (store.subset(torch.arange(0)), {}, "holds no images")):
        with pytest.raises(ValueError, match=message):
            Loader(bad, 10, seed=0, **options)
    loader = Loader(store, 10, seed=0)
    monkeypatch.setattr(loader, "_read", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        for _ in range(10):
            next(loader)
    loader.close()
    assert not loader.thread.is_alive()


def test_batches_of_a_set_in_memory_share_one_buffer(numbered):
    """Fresh memory for each would cost more in page faults than the copying."""
    loader = Loader(numbered[1].resident("ram"), 10, seed=0)
    assert loader.thread is None and next(loader)[0].data_ptr() == next(loader)[0].data_ptr()


# The official format


class OfficialDataset:
    """Reads a folder as the official data set does: a dictionary of places, one open file a sample, one of two views at random."""

    def __init__(self, folder):
        self.places = {}
        for file in sorted(Path(folder).glob("*.safetensors")):
            with safe_open(file, framework="pt", device="cpu") as opened:
                for row in range(opened.get_slice("labels").get_shape()[0]):
                    self.places[len(self.places)] = (file, row)
        statistics = torch.load(Path(folder) / "latents_stats.pt", weights_only=True)
        self.mean, self.std = statistics["mean"], statistics["std"]

    def __len__(self):
        return len(self.places)

    def __getitem__(self, index):
        file, row = self.places[index]
        with safe_open(file, framework="pt", device="cpu") as opened:
            name = "latents" if np.random.uniform(0, 1) > 0.5 else "latents_flip"
            latent, label = opened.get_slice(name)[row : row + 1], opened.get_slice("labels")[row : row + 1]
        return ((latent - self.mean) / self.std).squeeze(0), label.squeeze(0)


def test_the_official_data_set_reads_an_export(digit_store, tmp_path, monkeypatch):
    monkeypatch.setattr(latent_tools, "OFFICIAL_SHARD", 110)
    out = tmp_path / "official"
    assert cli.main(["latents", "export", str(digit_store.path), "--out", str(out)]) == 0
    assert len(list(out.glob("*.safetensors"))) == 3
    data = OfficialDataset(out)
    samples, labels = (torch.stack(column) for column in zip(*(data[i] for i in range(len(data))), strict=True))
    assert torch.equal(labels, digit_store.labels) and samples.dtype == torch.float32 and samples.shape == (300, 4, 4, 4)
    unflipped = torch.cat([load_file(file)["latents"] for file in sorted(out.glob("*.safetensors"))])
    torch.testing.assert_close(data.mean, unflipped.mean([0, 2, 3], keepdim=True), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(data.std, unflipped.std([0, 2, 3], keepdim=True), rtol=1e-5, atol=1e-6)
    mean, logvar = digit_store.gather(torch.arange(300)).chunk(2, dim=1)
    noise = (unflipped - mean) / torch.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.03 and abs(noise.std() - 1) < 0.03
    cli.main(["latents", "export", str(digit_store.path), "--out", str(tmp_path / "tokenizers"), "--statistics", "tokenizer"])
    kept = torch.load(tmp_path / "tokenizers" / "latents_stats.pt", weights_only=True)
    assert torch.equal(kept["std"].flatten(), Tokenizer.load("digits").latent_std.flatten())
    with pytest.raises(SystemExit, match="is not empty"):
        cli.main(["latents", "export", str(digit_store.path), "--out", str(out)])


def official_folder(folder, sizes=(30, 20), channels=4):
    folder.mkdir()
    made = []
    for rank, size in enumerate(sizes):
        tensors = {name: torch.randn(size, channels, 4, 4, generator=generator_for(name, rank)) for name in ("latents", "latents_flip")}
        made.append(tensors | dict(labels=torch.randint(3, (size,), generator=generator_for("labels", rank))))
        save_file(made[-1], folder / f"latents_rank{rank:02d}_shard000.safetensors", metadata=dict(total_size=str(size), device="cpu"))
    torch.save(dict(mean=torch.full((1, channels, 1, 1), 0.5), std=torch.full((1, channels, 1, 1), 2.0)), folder / "latents_stats.pt")
    return {name: torch.cat([part[name] for part in made]) for name in made[0]}


def test_official_latents_become_a_store(tmp_path):
    expected = official_folder(tmp_path / "official")
    assert cli.main(["latents", "import", str(tmp_path / "official"), "--out", str(tmp_path / "store"), "--tokenizer", "digits"]) == 0
    store = LatentStore(tmp_path / "store", verify=True)
    assert torch.equal(store.labels, expected["labels"]) and (store.views, store.parts, len(store.blocks)) == (2, 1, 2)
    for view, name in enumerate(("latents", "latents_flip")):
        assert torch.equal(latents.draw(store.gather(torch.arange(50), view), torch.ones(50, 4, 4, 4)), expected[name])
    own = Tokenizer.load(tmp_path / "store" / "tokenizer.safetensors")
    store.check_tokenizer(own)
    assert own.latent_mean.flatten().tolist() == [0.5] * 4 and own.latent_std.flatten().tolist() == [2.0] * 4
    torch.testing.assert_close(torch.tensor(store.index["statistics"]["std"]), expected["latents"].std((0, 2, 3)))

    (tmp_path / "official" / "latents_stats.pt").unlink()
    cli.main(["latents", "import", str(tmp_path / "official"), "--out", str(tmp_path / "unknown")])
    unknown = LatentStore(tmp_path / "unknown")
    torch.testing.assert_close(torch.tensor(unknown.index["normalisation"]["mean"]), expected["latents"].mean((0, 2, 3)))
    with pytest.raises(ValueError, match="does not say which tokenizer made it"):
        unknown.check_tokenizer(own)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_bad_official_folders_are_refused(tmp_path):
    def refuse(message, *arguments, folder=tmp_path / "official"):
        with pytest.raises(SystemExit) as error:
            cli.main(["latents", "import", str(folder), "--out", str(tmp_path / "store"), *arguments])
        assert message in str(error.value)

    refuse("no .safetensors files in", folder=tmp_path)
    official_folder(tmp_path / "official", channels=5)
    refuse("got one of 4 latent channels, expected 5", "--tokenizer", "digits")
    torch.save(dict(mean=Touch(tmp_path / "harm"), std=1), tmp_path / "official" / "latents_stats.pt")
    refuse("torch.load(weights_only=True) refuses it: besides tensors it holds posix.mkdir")
    assert not (tmp_path / "harm").exists()
    for mean, std in ((torch.zeros(1, 3, 1, 1), torch.ones(1, 3, 1, 1)), (torch.zeros(5), torch.tensor([1.0, 1, 1, 1, 0])),
                      (torch.full((5,), torch.nan), torch.ones(5))):
        torch.save(dict(mean=mean, std=std), tmp_path / "official" / "latents_stats.pt")
        refuse("expected 5 finite numbers each, deviations above 0")
    torch.save([1], tmp_path / "official" / "latents_stats.pt")
    refuse("latents_stats.pt holds no tensors 'mean' and 'std'")
    for damage in (b"", b"PK\3\4", b"\x80\2junk"):
        (tmp_path / "official" / "latents_stats.pt").write_bytes(damage)
        refuse("latents_stats.pt: torch.load(weights_only=True) refuses it")
    file = tmp_path / "official" / "latents_rank01_shard000.safetensors"
    whole = load_file(file)
    save_file(whole | dict(latents_flip=whole["latents_flip"][:-1]), file)
    refuse("expected latents (k, C, h, w)")
    for label in (-1, 10**12):
        save_file(whole | dict(labels=torch.full_like(whole["labels"], label)), file)
        refuse(f"got labels {label} to {label}, expected some, with labels from 0 to below 1000000")
    file.write_bytes(file.read_bytes()[:-100])
    refuse("not a whole official file of latents")


# The map


def test_the_map_separates_classes_that_are_separate(tmp_path, capsys):
    labels = torch.arange(150) % 3
    moments = random_moments(150, views=1)
    moments[:, 0, :3] += 6.0 * torch.randn(3, *SHAPE, generator=generator_for("centres"))[labels]
    store = write(tmp_path / "store", moments, labels)
    found, points, agreement = latent_tools.class_map(store, num=90)
    assert found.bincount().tolist() == [30, 30, 30] and agreement > 0.99
    for name, xy in points.items():
        centres = np.stack([xy[found == label].mean(0) for label in range(3)])
        nearest = np.linalg.norm(xy[:, None] - centres, axis=2).argmin(1)
        assert (nearest == found.numpy()).mean() > 0.98, name
    mixed = write(tmp_path / "mixed", moments, torch.randint(3, (150,), generator=generator_for("mixed")))
    assert latent_tools.class_map(mixed, num=90)[2] < 0.5

    out = tmp_path / "maps" / "map.png"
    assert cli.main(["latents", "map", str(store.path), "--out", str(out), "--num", "60", "--classes", "2"]) == 0
    assert "60 latents" in capsys.readouterr().out
    picture = np.asarray(Image.open(out).convert("RGB")).reshape(-1, 3).astype(int)
    saturated = picture[np.ptp(picture, axis=1) > 60]
    blue, orange = ((np.abs(saturated - colour).max(1) < 40).sum() for colour in ((31, 119, 180), (255, 127, 14)))
    assert blue > 300 and orange > 300
    with pytest.raises(SystemExit, match="num, classes: got 5"):
        cli.main(["latents", "map", str(store.path), "--num", "5"])
