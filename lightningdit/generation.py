"""Generating images by the ten thousand: sharded over processes, restarted where it stopped, merged into one file.

    generate(draw, decode, "samples.npz", labels, seed=0, plan=dict(checkpoint=..., guidance_scale=6.7), shape=(256, 256, 3))

Image i has seed + i and labels[i], whichever process draws it and with whatever company. Shards of consecutive images are written
atomically, so that a job that is killed, or finds the disk full, keeps all complete ones, and the same command goes on. A manifest holds
the `plan`, everything that the pixels depend on: shards of another plan are refused, not mixed.

    png   OUT/000000.png ... and OUT/dataset.json ({"labels": [["000000.png", 3], ...]}, as EDM has it)
    npz   arr_0 uint8 (n, H, W, C) and arr_1 int64 (n,) labels, ADM's file, which `lightningdit evaluate samples` and other evaluators read
    zip   the PNG files and dataset.json

OUT ending in .npz or .zip is one such file, and its shards lie in OUT.shards until it is whole; any other OUT is a folder that keeps the
shards. Files hold no dates: the same images make the same bytes.
"""
import concurrent.futures
import errno
import hashlib
import io
import json
import math
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from .distributed import generator_for
from .latents import write_json
from .optional import optional, progress_bar
from .sampler import fill, padded_rows

FORMATS = ("png", "npz", "zip")
LABELS = ("balanced", "random")
WRITERS = 2  # shards that may wait for the disk, in memory


def make_labels(rule, num, classes, seed):
    """(num,) int64 labels: "balanced" takes `classes` in turn, "random" draws from them, a file names every one.

    Args:
        rule: "balanced", "random", or a path: .npy of integers, or text with one number a line.
        classes: the allowed labels. seed: of "random"; label i does not depend on num.
    Raises: ValueError that names the argument; FileNotFoundError.
    """
    classes = torch.as_tensor(classes)
    if rule == "balanced":
        return classes[torch.arange(num) % len(classes)]
    if rule == "random":
        return classes[torch.randint(len(classes), (num,), generator=generator_for(seed, "labels"))]
    if not Path(rule).is_file():
        raise ValueError(f"labels: got {rule!r}, expected balanced, random or a file of labels")
    try:
        values = np.load(rule, allow_pickle=False) if str(rule).endswith(".npy") else [int(line) for line in Path(rule).read_text().split()]
        labels = torch.as_tensor(values)
    except (ValueError, TypeError) as problem:
        raise ValueError(f"labels: {rule} is neither an .npy of integers nor text with one number a line ({problem})") from None
    if labels.dtype.is_floating_point or labels.dim() != 1 or len(labels) < num:
        raise ValueError(f"labels: {rule} holds {labels.dtype} of shape {tuple(labels.shape)}, expected at least {num} integers")
    labels = labels[:num].long()
    strange = labels[~torch.isin(labels, classes)]
    if len(strange):
        raise ValueError(f"labels: {rule} holds {int(strange[0])}, expected classes of {classes.tolist()[:20]}")
    return labels


def output_format(out, format=None):
    """"png", "npz" or "zip" of an output path. Raises: ValueError for a format that is unknown or not that of the file's name."""
    suffix = Path(out).suffix.removeprefix(".")
    if format not in (None, *FORMATS):
        raise ValueError(f"format: got {format!r}, expected one of {', '.join(FORMATS)}")
    if suffix in ("npz", "zip") and format not in (None, suffix):
        raise ValueError(f"format: got {format!r} for a file that ends in .{suffix}, expected {suffix}, or a folder")
    return suffix if suffix in ("npz", "zip") else format or "png"


def generate(draw, decode, out, labels, *, seed, plan, shape, format=None, batch_size=64, shard_size=256, device="cpu", rank=0, world=1,
             progress=False):
    """Draws len(labels) images into `out`; what is already there is kept.

    Args:
        draw: draw(labels, seeds) -> (B, z, h, w) latents; lists of integers.
        decode: decode(latents) -> (B, H, W, C) uint8.
        out, format: see the top of the file.
        labels: (n,) integers. seed: of the first image.
        plan: JSON values that say what the images depend on besides labels and seeds.
        shape: (H, W, C) of an image.
        batch_size: images at once. The rows of a batch are filled up, see sampler.filled_rows and padded_rows.
        shard_size: images a shard.
        rank, world: of torchrun's processes, which share the work and must see the same folder.
        progress: show a progress bar; the other processes are counted as fast as this one.
    Returns: the path. Every process returns when its own part is done, the first when everything is.
    Raises: ValueError for bad arguments, or a folder or file of another plan; OSError that says how far it came, when the disk fails.
    """
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size), ("num", len(labels))):
        if value < 1:
            raise ValueError(f"{name}: got {value}, expected a positive number")
    if not 0 <= seed <= 2**32 - len(labels):
        raise ValueError(f"seed: got {seed}, expected 0 to {2**32 - len(labels)}, so that every image has a seed below 2^32")
    labels, device = torch.as_tensor(labels).tolist(), torch.device(device)
    plan = dict(plan, seed=seed, num=len(labels), shape=list(shape), labels=hashlib.sha256(np.array(labels).tobytes()).hexdigest(),
                format=output_format(out, format), shard_size=shard_size)
    plan = json.loads(json.dumps(plan))  # as the manifest will give it back
    shards = Shards(out, plan, labels)
    missing = by_the_first(shards.open, rank, world)
    if missing is None:
        return shards.out
    share = [i for number in missing[rank::world] for i in shards.span(number)]
    everything = sum(len(shards.span(number)) for number in missing)
    options = dict(desc="images", unit="image", disable=not progress, mininterval=1)
    bar = progress_bar(total=len(labels), initial=len(labels) - everything, **options)
    writer, waiting, left = concurrent.futures.ThreadPoolExecutor(1), [], everything
    pixels, whole = [], missing[rank::world]  # images that are not written yet, and the shards that they belong to, in order

    def keep(images):
        nonlocal left
        pixels.extend(images)
        while whole and len(pixels) >= len(shards.span(whole[0])):
            number = whole.pop(0)
            count = len(shards.span(number))
            waiting.append(writer.submit(shards.write, number, pixels[:count]))
            del pixels[:count]
        while len(waiting) > WRITERS or waiting and waiting[0].done():
            waiting.pop(0).result()
        bar.update(min(len(images) * world, left))
        left -= min(len(images) * world, left)

    try:
        with bar:
            for images in draw_batches(draw, decode, labels, share, seed=seed, batch_size=batch_size, device=device):
                keep(images)
            for written in waiting:
                written.result()
    except OSError as error:
        writer.shutdown()
        done = sum(len(shards.span(number)) for number in range(shards.count) if shards.is_whole(number))
        full = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT) else f"cannot write ({error})"
        raise OSError(f"{shards.folder}: {full}. {done} of {len(labels)} images are complete there; the same command goes on with the "
                      "rest") from error
    finally:
        writer.shutdown()  # what is drawn is written, even after Ctrl-C
    if world > 1:
        dist.barrier()
    if rank == 0:
        shards.merge(progress)
    return shards.out


def draw_batches(draw, decode, labels, share, *, seed, batch_size, device):
    """Yields the images of the indices `share`, in their order, as (B, H, W, C) uint8 arrays. The other arguments are those of generate.

    On CUDA a batch is decoded while the next one is drawn.
    """
    decoder = Decoder(decode, device)
    for start in range(0, len(share), batch_size):
        chosen = share[start : start + batch_size]
        # A CPU's `draw` fills up its rows itself, where it has to; the decoder always has to.
        filled = chosen if device.type == "cpu" else chosen + chosen[-1:] * (batch_size - len(chosen))
        latents = draw([labels[i] for i in filled], [seed + i for i in filled])
        yield from decoder(fill(latents, padded_rows(len(filled), device)), len(chosen))
    yield from decoder.finish()


def by_the_first(work, rank, world):
    """Result of work() of the first process, on all; its failure on all as well."""
    box = [None, None]
    if rank == 0:
        try:
            box[0] = work()
        except (OSError, ValueError) as error:
            if world == 1:
                raise
            box[1] = str(error)
    if world > 1:
        dist.broadcast_object_list(box)
    if box[1] is not None:
        raise ValueError(box[1])
    return box[0]


class Decoder:
    """Decodes batches to NumPy images. On CUDA on a stream of its own, while the next batch is being drawn; on CPUs, where both want
    the same cores, at once."""

    def __init__(self, decode, device):
        self.decode, self.stream, self.pending = decode, torch.cuda.Stream(device) if device.type == "cuda" else None, None

    def __call__(self, latents, count):
        """Starts on a batch, of which the first `count` images are wanted; yields what is ready."""
        if self.stream is None:
            yield self._run(latents)[:count].numpy()
            return
        yield from self.finish()
        self.stream.wait_stream(torch.cuda.current_stream(latents.device))
        with torch.cuda.stream(self.stream):
            latents.record_stream(self.stream)
            images = self._run(latents)[:count]
            host = torch.empty(images.shape, dtype=images.dtype, pin_memory=True)
            host.copy_(images, non_blocking=True)
            self.pending = host, self.stream.record_event()

    def finish(self):
        """Yields the batch that was started last, if there is one."""
        if self.pending is not None:
            (images, ready), self.pending = self.pending, None
            ready.synchronize()
            yield images.numpy()

    def _run(self, latents):
        with torch.no_grad(), torch.autocast(latents.device.type, enabled=False):  # rounding to bf16 here shows in uint8 pixels
            return self.decode(latents)


class Shards:
    """The files of a job: its manifest, its shards, and what they are merged into.

    OUT/.generation/manifest.json holds the plan, and OUT/.generation/shard_00003.json, written last, the sizes of the files of shard 3.
    """

    def __init__(self, out, plan, labels):
        self.out, self.plan, self.labels, self.format = Path(out), plan, labels, plan["format"]
        self.single = self.out.suffix in (".npz", ".zip")
        self.folder = self.out.with_name(self.out.name + ".shards") if self.single else self.out
        self.hidden, self.about = self.folder / ".generation", self.out.with_name(self.out.name + ".json")
        self.size, self.count = plan["shard_size"], math.ceil(len(labels) / plan["shard_size"])
        self.digits = max(6, len(str(len(labels) - 1)))

    def span(self, number):
        return range(number * self.size, min((number + 1) * self.size, len(self.labels)))

    def open(self):
        """Numbers of the shards that are missing; None if the merged file is there. Refuses what another plan made."""
        if self.single and self.out.exists():
            before = json.loads(self.about.read_text()) if self.about.exists() else None
            if before is None or before["size"] != self.out.stat().st_size:
                raise ValueError(f"out: {self.out} exists and is not a result of this command, expected a new name")
            self._compare(before["plan"], self.out)
            return None
        if self.folder.exists() and not self.hidden.exists() and any(self.folder.iterdir()):
            raise ValueError(f"out: {self.folder} holds other files, expected a new or empty folder, or one that this command began")
        self.hidden.mkdir(parents=True, exist_ok=True)
        manifest = self.hidden / "manifest.json"
        if manifest.exists() and any(self.hidden.glob("shard_*.json")):
            self._compare(json.loads(manifest.read_text()), self.folder)
        self._check_space()
        write_json(manifest, self.plan)
        return [number for number in range(self.count) if not self.is_whole(number)]

    def _compare(self, before, where):
        changed = [f"{key}: {before.get(key)!r} -> {self.plan.get(key)!r}" for key in sorted(before.keys() | self.plan.keys())
                   if before.get(key) != self.plan.get(key)]
        if changed:
            raise ValueError(f"out: {where} holds images made with other settings, expected a new name:\n  " + "\n  ".join(changed))

    def _check_space(self):
        """Uncompressed images say beforehand how much they take; PNG files do not."""
        if self.format == "npz":
            image = math.prod(self.plan["shape"])
            missing = sum(len(self.span(number)) for number in range(self.count) if not self.is_whole(number))
            needed, free = image * (missing + self.single * len(self.labels)), shutil.disk_usage(self.folder).free
            if needed > free:
                raise OSError(f"out: {needed / 1e9:.2f} GB are needed in {self.folder.parent} and {free / 1e9:.2f} GB are free")

    def is_whole(self, number):
        try:
            files = json.loads(self._record(number).read_text())
            return all((self.folder / name).stat().st_size == size for name, size in files.items())
        except (OSError, ValueError):
            return False

    def _record(self, number):
        return self.hidden / f"shard_{number:05d}.json"

    def _shard(self, number):
        return self.folder / f"shard_{number:05d}.{self.format}"

    def _name(self, i):
        return f"{i:0{self.digits}d}.png"

    def write(self, number, images):
        """Writes a shard of images (H, W, C) uint8 atomically."""
        span = self.span(number)
        if self.format == "npz":
            labels = np.array([self.labels[i] for i in span])
            files = [_write(self._shard(number), lambda file: write_npz(file, images, len(images), images[0].shape, labels))]
        elif self.format == "zip":
            members = [(self._name(i), _png(image)) for i, image in zip(span, images, strict=True)]
            files = [_write(self._shard(number), lambda file: write_zip(file, members, [self.labels[i] for i in span]))]
        else:
            files = [_write(self.folder / self._name(i), lambda file, image=image: file.write(_png(image)))
                     for i, image in zip(span, images, strict=True)]
        write_json(self._record(number), {path.name: path.stat().st_size for path in files})

    def merge(self, progress=False):
        """Makes the single file of all shards and removes them; in a folder of PNG files, writes dataset.json."""
        labels, n = self.labels, len(self.labels)
        bar = progress_bar(total=n, desc="merging", unit="image", disable=not (progress and self.single), mininterval=1)
        with bar:
            if self.format == "png":
                write_json(self.folder / "dataset.json", dict(labels=[[self._name(i), labels[i]] for i in range(n)]))
            if not self.single:
                return
            if self.format == "npz":
                _write(self.out, lambda file: write_npz(file, self._read_images(bar), n, self.plan["shape"], np.array(labels)))
            else:
                _write(self.out, lambda file: write_zip(file, self._read_members(bar), labels))
        write_json(self.about, dict(plan=self.plan, size=self.out.stat().st_size))
        shutil.rmtree(self.folder)

    def _read_images(self, bar):
        for number in range(self.count):
            with np.load(self._shard(number), allow_pickle=False) as shard:
                yield from shard["arr_0"]
            bar.update(len(self.span(number)))

    def _read_members(self, bar):
        for number in range(self.count):
            with zipfile.ZipFile(self._shard(number)) as shard:
                for i in self.span(number):
                    yield self._name(i), shard.read(self._name(i))
            bar.update(len(self.span(number)))


def _write(path, fill):
    """Writes a file atomically: fill(file), flushed, then renamed. A failure leaves nothing behind. Returns the path."""
    partial = path.with_name(f".partial_{path.name}")
    try:
        with partial.open("wb") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    return path


def _member(name):
    return zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))


def write_npz(file, images, count, shape, labels):
    """arr_0 of `count` images, which may come one by one, and arr_1, in ADM's layout, uncompressed."""
    with zipfile.ZipFile(file, "w") as archive:
        with archive.open(_member("arr_0.npy"), "w", force_zip64=True) as member:
            header = dict(descr="|u1", fortran_order=False, shape=(count, *shape))
            np.lib.format.write_array_header_1_0(member, header)
            for image in images:
                member.write(np.ascontiguousarray(image).data)
        with archive.open(_member("arr_1.npy"), "w") as member:
            np.lib.format.write_array(member, labels, allow_pickle=False)


def write_zip(file, members, labels):
    """PNG files (name, bytes), stored, and dataset.json with their labels."""
    names = []
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members:
            archive.writestr(_member(name), content)
            names.append(name)
        archive.writestr(_member("dataset.json"), json.dumps(dict(labels=[list(pair) for pair in zip(names, labels, strict=True)])))


def _png(image):
    with optional("a PNG file"):
        from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(buffer, "png")
    return buffer.getvalue()
