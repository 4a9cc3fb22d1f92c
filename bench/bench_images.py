"""Images decoded a second: Pillow and DALI as lightningdit.images runs them, against torchvision and PyTorch's DataLoader.

    pytest bench/bench_images.py --benchmark-only --results bench/results/images_cpu.json

One sample is one pass over real photographs, start-up of threads, processes and pipelines included. Everybody cuts the same windows and
must be close to the exact path before being timed. On CUDA the images end on the GPU, and DALI and torchvision decode there.
"""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from bench.harness import Timer, gpu_state, interleave, rounds_for, summary
from lightningdit.images import ImageBatches, ImageSource, decode_image, open_images
from lightningdit.images_dali import unavailable, window

DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
BATCH = 32
# Data, size, crop, and the mean absolute difference from Pillow that is still the same image: torchvision rounds more often than DALI.
CASES = {
    "imagenet-256-random": ("imagenet-samples.tar", 256, "random", 1.0),
    "imagenet-256-center": ("imagenet-samples.tar", 256, "center", 0.3),
    "tiny-imagenet-64-random": ("tiny-imagenet/val.tar", 64, "random", 1.0),
}


class Repeated(ImageSource):
    """The images of a source over and over, `count` in all."""

    def __init__(self, source: ImageSource, count: int):
        self.path, self.source, self.classes = source.path, source, source.classes
        self.names = range(count)
        self.labels = source.labels[torch.arange(count) % len(source)]

    def read(self, index: int) -> bytes:
        return self.source.read(index % len(self.source))


class Decoded(torch.utils.data.Dataset):
    """What a map-style data set for PyTorch's DataLoader does: one image at a time, by Pillow."""

    def __init__(self, batches: ImageBatches):
        self.batches, self.order = batches, batches.order()

    def __len__(self):
        return len(self.order)

    def __getitem__(self, item: int) -> np.ndarray:
        index = self.order[item : item + 1]
        places, flips = self.batches.draws(0, index)
        place = places[0] if self.batches.crop == "random" else None
        return decode_image(self.batches.source.read(int(index)), self.batches.image_size, 3, place, flips[0])


def by_data_loader(batches: ImageBatches, processes: int):
    for images in torch.utils.data.DataLoader(Decoded(batches), BATCH, num_workers=processes):
        yield images.to(batches.device)


def by_torchvision(batches: ImageBatches):
    """decode_jpeg, then torchvision's antialiased bicubic resizing of the window's surroundings; one thread, or nvJPEG."""
    from torchvision.io import ImageReadMode, decode_jpeg
    from torchvision.transforms.v2 import functional as F

    size = batches.image_size
    for indices in batches.order().split(BATCH):
        data = [torch.frombuffer(bytearray(batches.source.read(int(i))), dtype=torch.uint8) for i in indices]
        decoded, images = decode_jpeg(data, mode=ImageReadMode.RGB, device=batches.device), []
        for image, place, flip in zip(decoded, *batches.draws(0, indices), strict=True):
            height, width = image.shape[1:]
            scale = size / min(height, width)
            resized = [max(size, round(side * scale)) for side in (height, width)]
            left, top, *_ = window(width, height, size, place)
            top, left = round(top * resized[0] / height), round(left * resized[1] / width)
            image = F.resize(image, resized, F.InterpolationMode.BICUBIC, antialias=True)[:, top : top + size, left : left + size]
            images.append(image.flip(2) if flip else image)
        yield torch.stack(images).permute(0, 2, 3, 1)


def contestants(source: ImageSource, size: int, crop: str, device: str) -> dict[str, Callable]:
    """By name: a function that starts a pass, an iterator of images (B, H, W, C)."""
    counts = [2**i for i in range(6) if 2**i <= (os.cpu_count() or 1)]
    options = dict(image_size=size, crop=crop, flip=True, shuffle=True, device=device)

    def ours(decoder, workers):
        return lambda: (images for images, *_ in ImageBatches(source, BATCH, decoder=decoder, workers=workers, **options).epoch())

    found = {f"pillow, {n} threads": ours("pillow", n) for n in counts}
    if unavailable() is None:
        found |= {f"dali, {n} threads": ours("dali", n) for n in counts}
    exact = ImageBatches(source, BATCH, decoder="pillow", **options)
    found |= {f"DataLoader, {n} processes": lambda n=n: by_data_loader(exact, n) for n in counts}
    if crop == "random":  # torchvision has no ADM crop
        found["torchvision, 1 thread"] = lambda: by_torchvision(exact)
    return found


def one_pass(start: Callable, count: int) -> None:
    got = sum(len(images) for images in start())
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    assert got == count, f"{got} of {count} images"


@pytest.mark.parametrize("case", CASES)
def bench_images(benchmark, settings, case):
    file, size, crop, tolerance = CASES[case]
    if not (DATA / file).is_file():
        pytest.skip(f"{DATA / file} is absent")
    dry, source = settings.shapes == ("tiny",), open_images(DATA / file)
    count = BATCH if dry else len(source) * (1 + (os.cpu_count() or 1)) if size > 64 else len(source)
    starts = {name: start for name, start in contestants(Repeated(source, count), size, crop, settings.device).items()
              if not settings.only or name.split(",")[0] in settings.only}
    exact = ImageBatches(Repeated(source, count), BATCH, image_size=size, crop=crop, flip=True, shuffle=True, decoder="pillow")
    expected = next(exact.epoch())[0].float()
    rows, timers = [], {}
    for name, start in starts.items():
        row = dict(name=name, status="ok")
        rows.append(row)
        try:
            row["mean_difference"] = round((next(iter(start())).cpu().float() - expected).abs().mean().item(), 3)
        except (RuntimeError, ImportError) as error:  # torchvision without nvJPEG
            row |= dict(status="failed", reason=str(error).splitlines()[0][:200])
            continue
        if row["mean_difference"] > tolerance:
            row |= dict(status="incorrect", reason=f"mean difference {row['mean_difference']} > {tolerance}")
            continue
        timers[name] = Timer(lambda i, start=start: one_pass(start, count), 1, "cpu", settings.sample_ms)  # by the wall clock on GPUs too
    sizes = dict(bytes=sum(len(source.read(i % len(source))) for i in range(count)) + count * size * size * 3, flops=0)
    samples = interleave(timers, 1 if dry else rounds_for(timers, settings), benchmark, 0)
    for row in rows:
        if row["name"] in samples:
            one = summary(samples[row["name"]], sizes, samples[next(iter(timers))])
            row |= one | dict(images_per_s=round(1e3 * count / one["median_ms"], 1))
    record = dict(kind="images", case=case, device=settings.device, count=count, batch=BATCH, load=os.getloadavg()[0],
                  rows=[row for row in rows if row["status"] == "ok"], left_out=[row for row in rows if row["status"] != "ok"])
    if settings.device == "cuda":
        record |= dict(after=gpu_state())
    benchmark.extra_info.update(record)
    settings.record(record)
