"""Latents brought to training, batch by batch: lightningdit.latents.Loader against one open file a sample, as the official data set reads.

    pytest bench/bench_latents.py --benchmark-only --results bench/results/latents_cpu.json

One sample is a batch of a pass, all of whose batches are of images in random order: four epochs of ours, by a new Loader with its thread
and fresh buffers; some batches of "per sample", which for each image opens its file, slices latents or mirror image and the label,
normalises by channel, and stacks: in this process, or in the workers of PyTorch's DataLoader, which stay from pass to pass.

"samples" holds the official content, 4-byte samples of the posterior, and both must deliver the same values; ours leaves normalising to
the training device, unless "normalised" (in place). "fp32" and "bf16" are posterior moments, twice the values, from which the training
device draws; "drawn" draws on the CPU. "first epoch" is one, of a store opened anew: each page of the files faults once.
"""

import contextlib
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.harness import Timer, interleave, rounds_for, summary
from lightningdit.latent_tools import import_official
from lightningdit.latents import LatentStore, Loader, Writer, batch_indices, batch_views, draw, make_plan, spans

SHAPE = (32, 16, 16)  # C, h, w of VA-VAE f16d32 at 256 pixels
SEED = 0


def official_files(folder, images, files):
    folder.mkdir(parents=True)
    for number in range(files):
        tensors = {name: torch.randn(images // files, *SHAPE) for name in ("latents", "latents_flip")}
        tensors["labels"] = torch.zeros(images // files, dtype=torch.int64)
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors")


def moments_store(folder, images, files, dtype):
    class Source:
        classes, fingerprint = ["all"], "random numbers"

    plan = make_plan(Source, images, shape=SHAPE, views=2, dtype=dtype, shards=spans(images, images // files))
    writer = Writer(folder, plan)
    for number in writer.missing:
        start, stop = plan["shards"][number]
        values = torch.randn(stop - start, 2, 2 * SHAPE[0], *SHAPE[1:]).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
        writer.write(number, values, torch.zeros(stop - start, dtype=torch.int64), torch.arange(start, stop))
    writer.finish(dict(tokenizer=None, mean=None, std=None))


class PerSample(torch.utils.data.Dataset):
    """The official data set's way to a sample: (normalised latents (C, h, w), label)."""

    def __init__(self, files, per_file, mean, std):
        self.files, self.per_file, self.mean, self.std = files, per_file, mean, std

    def __len__(self):
        return len(self.files) * self.per_file

    def __getitem__(self, index):
        return self.read(index, int(torch.randint(2, ())))

    def read(self, index, view):
        with safe_open(self.files[index // self.per_file], framework="pt", device="cpu") as file:
            row = index % self.per_file
            latents, labels = file.get_slice(("latents", "latents_flip")[view]), file.get_slice("labels")
            return ((latents[row : row + 1] - self.mean) / self.std).squeeze(0), labels[row : row + 1].squeeze(0)

    def batches(self, count, size):
        """The plainest loop around it."""
        for _ in range(count):
            pairs = [self[index] for index in torch.randint(len(self), (size,)).tolist()]
            yield tuple(map(torch.stack, zip(*pairs, strict=True)))


def ours(store, count, batch, finish=lambda moments: moments):
    """`count` batches of a new Loader."""
    with contextlib.closing(Loader(store, batch, seed=SEED)) as loader:
        for _ in range(count):
            moments, labels = next(loader)
            yield finish(moments), labels


def assert_same_latents(data, store, batch, normalise):
    """Both bring the same images and mirror images as the same numbers."""
    for step, (latents, labels) in enumerate(ours(store, 3, batch, normalise)):
        places = batch_indices(step, batch, len(store), SEED).tolist(), batch_views(step, batch, len(store), 2, SEED).tolist()
        expected = [torch.stack(column) for column in zip(*map(data.read, *places), strict=True)]
        assert torch.equal(latents, expected[0]) and torch.equal(labels, expected[1])


@pytest.mark.parametrize("resident", ["none", "ram"])
def bench_latents(benchmark, settings, tmp_path_factory, resident):
    tiny, workers = settings.shapes == ("tiny",), os.cpu_count() or 1
    images, files, batch = (64, 2, 8) if tiny else (4096, 8, 256)
    folder = tmp_path_factory.getbasetemp() / "latents"  # the same for both
    if not folder.is_dir():
        official_files(folder / "official", images, files)
        import_official(str(folder / "official"), str(folder / "samples"))
        for dtype in ("fp32", "bf16"):
            moments_store(folder / dtype, images, files, dtype)
    stores = {name: LatentStore(folder / name).resident(resident) for name in ("samples", "fp32", "bf16")}
    (mean, std), noise = (torch.linspace(*ends, SHAPE[0]).view(1, -1, 1, 1) for ends in ((-1, 1), (1, 2))), torch.randn(batch, *SHAPE)
    data = PerSample(sorted((folder / "official").glob("*.safetensors")), images // files, mean, std)

    def normalise(latents):
        return latents.sub_(mean).div_(std)

    assert_same_latents(data, stores["samples"], batch, normalise)
    epoch = images // batch
    few, many = min(4, epoch), 4 * epoch
    sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=4 * few * batch)
    by_workers = torch.utils.data.DataLoader(data, batch, sampler=sampler, num_workers=workers, persistent_workers=True)
    # By name: batches of a pass, what starts one, bytes of a row.
    passes = {"per sample": (few, lambda: data.batches(few, batch), noise[0].nbytes),
              f"per sample, DataLoader, {workers} workers": (4 * few, lambda: by_workers, noise[0].nbytes)}
    for name, store in stores.items():
        row_bytes = store.blocks[0][0].nbytes
        finished = ("normalised", normalise) if name == "samples" else ("drawn", lambda moments: draw(moments, noise))
        passes[name] = (many, lambda store=store: ours(store, many, batch), row_bytes)
        if resident == "none":
            passes[f"{name}, first epoch"] = (epoch, lambda name=name: ours(LatentStore(folder / name), epoch, batch), row_bytes)
        passes[f"{name}, {finished[0]}"] = (many, lambda store=store, do=finished[1]: ours(store, many, batch, do), row_bytes)

    def one_pass(count, start):
        got = sum(len(labels) for _, labels in start())
        assert got == count * batch, f"{got} of {count * batch} samples"

    timers = {name: Timer(lambda _, count=count, start=start: one_pass(count, start), 1, "cpu", settings.sample_ms)
              for name, (count, start, _) in passes.items()}
    found = interleave(timers, rounds_for(timers, settings), benchmark, settings.warmup_s)
    times = {name: [time / passes[name][0] for time in rounds] for name, rounds in found.items()}
    rows = [dict(name=name, batches=count, **summary(times[name], dict(bytes=batch * row_bytes, flops=0), times["per sample"]))
            for name, (count, _, row_bytes) in passes.items()]
    for row in rows:
        row["samples_per_second"] = round(1e3 * batch / row["median_ms"])
    record = dict(kind="latents", device="cpu", resident=resident, images=images, files=files, batch=batch, latent_shape=SHAPE,
                  load=os.getloadavg()[0], rows=rows)
    benchmark.extra_info.update(record)
    settings.record(record)
