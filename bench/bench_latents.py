"""Latents brought to training, batch by batch: lightningdit.latents.Loader against one safe_open and three slices a sample.

    pytest bench/bench_latents.py --benchmark-only --results bench/results/latents_cpu.json

One sample is one batch of random images. The per-sample reader does what the official data set does for each image: opens its file, slices
latents or mirror image and the label, normalises; the batch is stacked. Ours leaves normalising and drawing to the training device, which
"and draw" adds here, on the CPU. "bf16" and "fp32" are posterior moments, twice the values of a sample; "samples" is the official content.
"""

import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from bench.harness import Timer, interleave, rounds_for, summary
from lightningdit.latent_tools import import_official
from lightningdit.latents import LatentStore, Loader, Writer, draw, make_plan, spans

SHAPE = (32, 16, 16)  # C, h, w of VA-VAE f16d32 at 256 pixels


def official_files(folder, images, files):
    folder.mkdir()
    for number in range(files):
        tensors = {name: torch.randn(images // files, *SHAPE) for name in ("latents", "latents_flip")}
        tensors["labels"] = torch.zeros(images // files, dtype=torch.int64)
        save_file(tensors, folder / f"latents_rank00_shard{number:03d}.safetensors")


def moments_store(folder, images, files, dtype, source):
    plan = make_plan(source, images, shape=SHAPE, views=2, dtype=dtype, shards=spans(images, images // files))
    writer = Writer(folder, plan)
    for number in writer.missing:
        start, stop = plan["shards"][number]
        values = torch.randn(stop - start, 2, 2 * SHAPE[0], *SHAPE[1:]).to(torch.float32 if dtype == "fp32" else torch.bfloat16)
        writer.write(number, values, torch.zeros(stop - start, dtype=torch.int64), torch.arange(start, stop))
    writer.finish(dict(tokenizer=None, mean=None, std=None))
    return LatentStore(folder)


def per_sample(files, per_file, batch):
    mean, std = torch.zeros(1, SHAPE[0], 1, 1), torch.ones(1, SHAPE[0], 1, 1)

    def read(index):
        with safe_open(files[index // per_file], framework="pt", device="cpu") as file:
            row, name = index % per_file, ("latents", "latents_flip")[torch.randint(2, ()).item()]
            latents, labels = file.get_slice(name), file.get_slice("labels")
            return ((latents[row : row + 1] - mean) / std)[0], labels[row : row + 1][0]

    def run(_):
        pairs = [read(index) for index in torch.randint(len(files) * per_file, (batch,)).tolist()]
        return [torch.stack(column) for column in zip(*pairs, strict=True)]

    return run


@pytest.mark.parametrize("resident", ["none", "ram"])
def bench_latents(benchmark, settings, tmp_path, resident):
    tiny = settings.shapes == ("tiny",)
    images, files, batch = (64, 2, 8) if tiny else (8192, 8, 256)
    official_files(tmp_path / "official", images, files)
    import_official(str(tmp_path / "official"), str(tmp_path / "samples"))
    samples = LatentStore(tmp_path / "samples")

    class Source:
        classes, fingerprint = ["all"], "random numbers"

    stores = dict(samples=samples, **{dtype: moments_store(tmp_path / dtype, images, files, dtype, Source) for dtype in ("fp32", "bf16")})
    paths = sorted((tmp_path / "official").glob("*.safetensors"))
    timers = {"per sample": Timer(per_sample(paths, images // files, batch), 1, "cpu", settings.sample_ms)}
    noise = torch.randn(batch, *SHAPE)
    row_bytes = {"per sample": noise[0].nbytes}
    for name, store in stores.items():
        loader = Loader(store.resident(resident), batch, seed=0, prefetch=0)
        buffer = torch.empty(batch, store.blocks[0].shape[1], dtype=store.dtype)

        def step(i, loader=loader, buffer=buffer):
            loader.step += 1
            return loader._read(loader.step, buffer)

        timers[name] = Timer(step, 1, "cpu", settings.sample_ms)
        timers[f"{name} and draw"] = Timer(lambda i, step=step: draw(step(i)[0], noise), 1, "cpu", settings.sample_ms)
        row_bytes[name] = row_bytes[f"{name} and draw"] = buffer[0].nbytes
    rounds = interleave(timers, rounds_for(timers, settings), benchmark, settings.warmup_s)
    rows = [dict(name=name, **summary(times, dict(bytes=batch * row_bytes[name], flops=0), rounds["per sample"]))
            for name, times in rounds.items()]
    for row in rows:
        row["samples_per_second"] = round(1e3 * batch / row["median_ms"])
    record = dict(kind="latents", device="cpu", resident=resident, images=images, files=files, batch=batch, latent_shape=SHAPE,
                  load=os.getloadavg()[0], rows=rows)
    benchmark.extra_info.update(record)
    settings.record(record)
