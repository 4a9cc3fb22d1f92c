"""The latent store: a data set as posterior moments, encoded once, so that every epoch draws its latents afresh.

A store is a folder:

    index.json                     version, counts, classes, shapes, statistics, provenance; size and SHA-256 of every shard, and its own
    shard_00000.safetensors, ...   what became of images [start, stop) of the source, memory-mapped by who reads them:
        moments (k, M, P * C, h, w), fp32 or bf16: mean and log-variance of raw (not normalised) latents, of each view
        labels (k,) int64; indices (k,) int64: places in the source, from which images that cannot be read are missing
    tokenizer.safetensors          where the statistics of these very latents normalise them: the tokenizer with those statistics

While it is written there are plan.json, which says what it is to become, and shard_XXXXX.json, the record of a shard that is whole. The
shard is the unit of work: its bytes depend on its images, the batch size, the device and the number of CPU threads only, not on who
wrote the others, so a store that was interrupted, or written by several processes, is byte-identical to one that was not.

B batch, C latent channels, h, w latent positions, n images, k images of a shard, M views (the image; its mirror image), P parts of the
moments: 2 (mean, log-variance), or 1 where they are samples already, as official latents are.
"""
import copy
import datetime
import fcntl
import functools
import hashlib
import json
import os
import queue
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from lightningdit_kernels import native

from .checkpoint import save_weights, sha256, write_text
from .distributed import generator_for, world
from .images import MAX_BAD_FRACTION, SHOWN, to_pixels
from .optional import progress_bar
from .tokenizer.vavae import Tokenizer, header

FORMAT, VERSION = "lightningdit latents", 1
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHARD = re.compile(r"shard_\d{5,}\.safetensors")
SHARD_SIZE = 4096  # images; of 32 x 16 x 16 latents with mirror images 537 MB in fp32
AUTO_FRACTION = 0.25  # of the memory of the device, or of the machine, that a resident set may take


# Writing


class Writer:
    """Writes a store shard by shard. Whoever is killed and started again goes on with the shards that are missing.

    Args:
        path: folder, made where it is missing.
        plan: what the store is to become (see `make_plan`).
        rank, world: the processes that write together; each takes a row of neighbouring shards.
    Attributes: missing (numbers of the shards that this process has yet to write; empty for a store that is complete).
    Raises: ValueError for a folder that holds anything else, or a store by another plan; OSError while another program writes there.
    """

    def __init__(self, path, plan, rank=0, world=1):
        self.path, self.plan, self.rank = Path(path), plan, rank
        # Of its own, because others may have hours of work left when the first is done.
        self.group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=30)) if world > 1 else None
        if rank == 0:
            self._begin()
        self.wait()
        self.complete = is_store(self.path)
        share = range(len(plan["shards"]) * rank // world, len(plan["shards"]) * (rank + 1) // world)
        self.missing = [] if self.complete else [number for number in share if not self._is_whole(number)]
        self.images = sum(stop - start for start, stop in (plan["shards"][number] for number in share))

    def _begin(self):
        self.path.mkdir(parents=True, exist_ok=True)
        plan_file, what = self.path / "plan.json", "a store"
        if is_store(self.path):
            before = read_index(self.path)["plan"]
        elif plan_file.is_file():
            before, what = _parse(plan_file), "an unfinished store"
        elif foreign := sorted(p.name for p in self.path.iterdir() if not p.name.startswith(".partial_")):
            raise ValueError(f"{self.path} is neither empty nor a latent store (it holds {foreign[0]}); choose another folder")
        else:
            before = self.plan
            write_json(plan_file, self.plan)
        if changes := _differences(before, self.plan):
            raise ValueError(f"{self.path} holds {what} of something else; choose another folder, remove it, or undo\n  "
                             + "\n  ".join(changes))
        if plan_file.is_file():
            self.lock = plan_file.open()  # kept open: the lock ends with the process, however that ends
            try:
                fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise OSError(f"{self.path}: another program is writing this store") from None

    def wait(self):
        """Returns when every process has come here."""
        if self.group is not None:
            dist.barrier(self.group)

    def _is_whole(self, number):
        record, shard = self.path / _record_name(number), self.path / _shard_name(number)
        if not (record.is_file() and shard.is_file()):
            return False
        about = _parse(record)
        return shard.stat().st_size == about["size"] and sha256(shard) == about["sha256"]

    def write(self, number, moments, labels, indices, bad=()):
        """Writes a shard: moments (k, M, P * C, h, w), labels and indices (k,); bad: [(name, reason)] of the images that are missing."""
        if not moments.isfinite().all():
            raise ValueError(f"{_shard_name(number)}: latents that are not finite; a higher precision of the encoder may help")
        file, about = self.path / _shard_name(number), header("latents", store=plan_id(self.plan), shard=number)
        save_weights(file, dict(moments=moments, labels=labels, indices=indices), metadata=about)
        write_json(self.path / _record_name(number), dict(
            images=len(labels), bad=[list(map(str, pair)) for pair in bad], size=file.stat().st_size, sha256=sha256(file),
            sums=channel_sums(moments[:, 0], self.plan["parts"])))

    def statistics(self):
        """Of all the unflipped latents, once every process has written its shards: {"mean", "std": C numbers, "images"}.

        Raises: ValueError where more than 1 % of the images could not be read; it lists the first ones.
        """
        records = self._records()
        bad = [pair for record in records for pair in record["bad"]]
        if len(bad) > MAX_BAD_FRACTION * self.plan["num_images"]:
            listed = [f"  {name}: {reason}" for name, reason in bad[:SHOWN]]
            raise ValueError(f"more than {MAX_BAD_FRACTION:.0%} of {self.plan['num_images']} images cannot be read:\n" + "\n".join(listed))
        images, (_, height, width) = sum(record["images"] for record in records), self.plan["shape"]
        return combine([record["sums"] for record in records], images * height * width) | dict(images=images)

    def finish(self, normalisation):
        """Writes index.json, by which the store becomes one, and removes the records.

        Args:
            normalisation: {"tokenizer": SHA-256 of the tokenizer to train and sample with, or None, "mean", "std": what it normalises by}.
        """
        if not self.complete:
            records = self._records()
            shards = [dict(file=_shard_name(number), images=record["images"], size=record["size"], sha256=record["sha256"])
                      for number, record in enumerate(records)]
            index = dict(format=FORMAT, version=VERSION, images=sum(shard["images"] for shard in shards), plan=self.plan,
                         statistics=self.statistics(), normalisation=normalisation,
                         bad=[pair for record in records for pair in record["bad"]], shards=shards)
            write_json(self.path / "index.json", index | dict(sha256=digest(index)))
        for leftover in [self.path / "plan.json", *self.path.glob("shard_*.json"), *self.path.glob(".partial_*")]:
            leftover.unlink(missing_ok=True)

    def _records(self):
        return [_parse(self.path / _record_name(number)) for number in range(len(self.plan["shards"]))]


def make_plan(source, num_images, *, shape, views, dtype, shards, parts=2, **provenance):
    """Everything that the bytes of a store depend on, as JSON: two stores of one plan are the same.

    Args:
        source: has `classes` and `fingerprint`. num_images: what it holds. shape: (C, h, w). dtype: "fp32" or "bf16".
        shards: [(start, stop)] of the source.
        provenance: what made it: tokenizer (SHA-256), transform, and the like.
    """
    plan = dict(num_images=num_images, classes=source.classes, shape=shape, views=views, parts=parts, dtype=dtype, shards=shards,
                data=source.fingerprint, **provenance)
    return json.loads(json.dumps(plan))  # as it is read back


def spans(count, size):
    """[(0, size), (size, 2 * size), ...] up to count."""
    return [(start, min(start + size, count)) for start in range(0, count, size)]


@torch.no_grad()
def encode(tokenizer, images, path, *, flip=True, dtype="fp32", shard_size=SHARD_SIZE, statistics="tokenizer", bf16=False, rank=0, world=1,
           progress=True):
    """Encodes images to a store, or goes on with one that was interrupted, and opens it.

    Args:
        tokenizer: Tokenizer, on the device that is to encode.
        images: ImageBatches in index order; its batch size is the encoder's, and what `transform` says goes into the provenance.
        path: folder of the store. flip: encode the mirror image as a second view. dtype: of the moments, "fp32" or "bf16".
        statistics: what is to normalise the latents: the "tokenizer"'s own, or those of the "data", with which the tokenizer is then saved
            in the store.
        bf16: encode in bf16 autocast. rank, world: processes that share the work, each with a Writer's share of the shards.
    Returns: LatentStore.
    """
    source, side = images.source, images.image_size // tokenizer.downsample
    plan = make_plan(
        source, len(source), shape=(tokenizer.latent_channels, side, side), views=1 + flip, dtype=dtype,
        shards=spans(len(source), shard_size), tokenizer=tokenizer.sha256, statistics=statistics,
        precision="bf16" if bf16 else "fp32", batch_size=images.batch_size,
        image_size=images.image_size, channels=images.channels, crop=images.crop, decoder=images.decoder)
    writer = Writer(path, plan, rank, world)
    done = writer.images - sum(stop - start for start, stop in (plan["shards"][number] for number in writer.missing))
    stream = at = writing = None
    quiet, what = not progress or rank > 0 or not writer.missing, "encoding" + (f", process 1 of {world}" if world > 1 else "")
    with (progress_bar(total=writer.images, initial=done, unit="image", disable=quiet, dynamic_ncols=True, desc=what) as bar,
          ThreadPoolExecutor(1) as disk):
        for number in writer.missing:
            start, stop = plan["shards"][number]
            stream = stream if at == start else _Stream(images, start)
            at = stop
            shard = _encode_shard(tokenizer, stream.until(stop), plan, stop - start, bf16, bar)
            absent = sorted(set(range(start, stop)) - set(shard[2].tolist()))
            bar.update(len(absent))
            reasons = dict(images.bad)
            bad = [(source.names[i], reasons[source.names[i]]) for i in absent]
            if writing is not None:
                writing.result()  # at most two shards are in memory
            writing = disk.submit(writer.write, number, *shard, bad)
        if writing is not None:
            writing.result()
    writer.wait()
    if rank == 0:
        if not writer.complete and statistics == "data":
            tokenizer = renormalise(tokenizer, writer.statistics(), path)
        writer.finish(normalisation_of(tokenizer))
    writer.wait()
    return LatentStore(path)


def _encode_shard(tokenizer, batches, plan, most, bf16, bar):
    """(moments (k, M, 2C, h, w), labels (k,), indices (k,)) of the at most `most` images in batches of (images, labels, indices)."""
    channels, height, width = plan["shape"]
    device = tokenizer.latent_mean.device
    moments = torch.empty(most, plan["views"], 2 * channels, height, width, dtype=DTYPES[plan["dtype"]])
    labels, indices, count = [torch.empty(0, dtype=torch.int64)], [torch.empty(0, dtype=torch.int64)], 0
    for images, *facts in batches:
        pixels = to_pixels(images.to(device))
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            posteriors = [tokenizer.encode(view) for view in (pixels, pixels.flip(3))[: plan["views"]]]
        for view, posterior in enumerate(posteriors):
            moments[count : count + len(images), view] = torch.cat([posterior.mean, posterior.logvar], dim=1).to(moments)
        for held, new in zip((labels, indices), facts, strict=True):
            held.append(new.cpu())
        count += len(images)
        bar.update(len(images))
    return moments[:count], torch.cat(labels), torch.cat(indices)


def cache_path(folder, tokenizer, images, flip):
    """The folder for the store of exactly these images by exactly this tokenizer."""
    key = [tokenizer.sha256, images.source.fingerprint, images.image_size, images.decoder, flip]
    return Path(folder) / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]


class _Stream:
    """One pass over ImageBatches from place `start` on, cut at the ends of shards."""

    def __init__(self, images, start):
        self.batches, self.size, self.held = images.epoch(start=start), images.batch_size, None

    def until(self, stop):
        """Batches (images, labels, indices) of what comes before place `stop` of the source; all are full but the last."""
        parts, count, more = [], 0, True
        while more:
            self.held = next(self.batches, None) if self.held is None else self.held
            if more := self.held is not None:
                cut = int((self.held[2] < stop).sum())
                more = cut == len(self.held[2])
                parts.append([tensor[:cut] for tensor in self.held])
                self.held = None if more else [tensor[cut:] for tensor in self.held]
                count += cut
            while count >= self.size or (count and not more):
                whole = [torch.cat(tensors) for tensors in zip(*parts, strict=True)]
                yield tuple(tensor[: self.size] for tensor in whole)
                parts, count = [[tensor[self.size :] for tensor in whole]], max(0, count - self.size)


def normalisation_of(tokenizer):
    """What `Writer.finish` notes of the tokenizer that a model is to be trained and sampled with; None: unknown."""
    mean, std = (tokenizer.latent_mean.flatten().tolist(), tokenizer.latent_std.flatten().tolist()) if tokenizer else (None, None)
    return dict(tokenizer=tokenizer and tokenizer.sha256, mean=mean, std=std)


def renormalise(tokenizer, statistics, folder):
    """The same weights with other statistics, saved as folder/tokenizer.safetensors."""
    other = Tokenizer(tokenizer.autoencoder, statistics["mean"], statistics["std"], tokenizer.provenance)
    other.save(Path(folder) / "tokenizer.safetensors")
    return other


def channel_sums(moments, parts):
    """Three sums over images and positions of moments (k, P * C, h, w), fp64 (3, C) as lists: of means, of their squares, of variances."""
    sums = np.zeros((3, moments.shape[1] // parts))
    for chunk in moments.split(256):
        values = chunk.double().flatten(2).numpy()  # NumPy's sums do not depend on the number of threads
        mean = values[:, : sums.shape[1]]
        variance = np.exp(values[:, sums.shape[1] :]) if parts == 2 else np.zeros_like(mean)
        sums += np.stack([term.sum((0, 2)) for term in (mean, mean**2, variance)])
    return sums.tolist()


def combine(sums, count):
    """{"mean", "std"}, C numbers each, from the `channel_sums` of all parts of `count` values a channel.

    Exactly what samples of the posteriors have on average: the variance is the unbiased one of the means plus the mean of the variances.
    """
    if count < 2:
        raise ValueError(f"statistics: got {count} values a channel, expected at least 2")
    means, squares, variances = np.sum(sums, axis=0)
    mean = means / count
    variance = (squares - count * mean**2) / (count - 1) + variances / count
    return dict(mean=mean.tolist(), std=np.sqrt(np.maximum(variance, 0)).tolist())


# Reading


def is_store(path):
    """Whether a folder is a complete store."""
    return path is not None and (Path(path) / "index.json").is_file()


class LatentStore:
    """A store, open for reading; shards are memory-mapped, nothing is read before it is asked for.

    At opening index.json is compared with its own checksum, and every shard's size, header, shapes and labels with the index; the bytes of
    the moments are compared with their SHA-256 by `verify`, and by `resident`, which reads them all anyway.

    Args:
        path: the folder. verify: compare checksums at once.
    Attributes: path, index (index.json), plan (the part of it that says how it was made), classes (names), labels (n,) int64,
        shape (C, h, w), views, parts, dtype, nbytes.
    Raises: FileNotFoundError for a folder that is no store; ValueError that names what is missing, damaged, or of another version.
    """

    def __init__(self, path, verify=False):
        self.path = Path(path)
        self.index = read_index(path)
        self.plan = self.index["plan"]
        self.classes, self.views, self.parts = self.plan["classes"], self.plan["views"], self.plan["parts"]
        self.shape, self.dtype = tuple(self.plan["shape"]), DTYPES[self.plan["dtype"]]
        opened = [self._open(number, about) for number, about in enumerate(self.index["shards"])]
        self.blocks = [moments.flatten(0, 1).flatten(1) for moments, _ in opened]  # (k * M, P * C * h * w) each
        self.labels = torch.cat([labels for _, labels in opened])
        self.ends = torch.tensor([len(labels) for _, labels in opened]).cumsum(0)
        self.addresses = torch.tensor([block.data_ptr() for block in self.blocks])
        self.places = None  # of a subset: places in the whole
        self.in_memory = False
        if verify:
            self.verify()

    def _open(self, number, about):
        file, expected = self.path / about["file"], (about["images"], self.views, self.parts * self.shape[0], *self.shape[1:])
        if not file.is_file():
            raise ValueError(f"{file} is missing from the store; train/encode.py, run again into an emptied folder, makes it anew")
        if file.stat().st_size != about["size"]:
            raise ValueError(f"{file}: truncated or overgrown, got {file.stat().st_size} bytes, expected {about['size']}")
        try:
            with safe_open(file, "pt") as shard:
                label = json.loads(shard.metadata()["lightningdit"])
                moments, labels = shard.get_tensor("moments"), shard.get_tensor("labels").clone()
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError, OSError) as error:
            raise ValueError(f"{file}: damaged: {error}") from None
        if label != dict(kind="latents", store=plan_id(self.plan), shard=number):
            raise ValueError(f"{file} belongs to another store, or to another place in this one: got {label}")
        if moments.shape != expected or moments.dtype != self.dtype or labels.shape != expected[:1] or labels.dtype != torch.int64:
            raise ValueError(f"{file}: damaged: got moments {moments.dtype} {tuple(moments.shape)} and labels {labels.dtype} "
                             f"{tuple(labels.shape)}, expected {self.dtype} {expected} and int64 {expected[:1]}")
        if len(labels) and not (0 <= labels.min() and labels.max() < len(self.classes)):
            raise ValueError(f"{file}: damaged: labels from {labels.min()} to {labels.max()}, expected 0 to {len(self.classes) - 1}")
        return moments, labels

    def __len__(self):
        return len(self.labels)

    @property
    def nbytes(self):
        """Bytes of all moments."""
        return sum(block.nbytes for block in self.blocks)

    def describe(self):
        """What is in the store, and what it goes with, in a few lines."""
        channels, height, width = self.shape
        statistics, bad, tokenizer = self.index["statistics"], self.index["bad"], self.index["normalisation"]["tokenizer"]
        held = self.path / "tokenizer.safetensors"
        lines = [
            f"store             {self.path}: {len(self)} images in {len(self.classes)} classes, {len(self.index['shards'])} shards",
            f"latents           {channels} x {height} x {width}, {'moments' if self.parts == 2 else 'samples'} of "
            f"{'image and mirror image' if self.views == 2 else 'the image'}, {self.plan['dtype']}, {self.nbytes / 2**20:.1f} MiB",
            f"channel mean      {min(statistics['mean']):.4f} to {max(statistics['mean']):.4f}",
            f"channel deviation {min(statistics['std']):.4f} to {max(statistics['std']):.4f}",
            f"tokenizer         SHA-256 {tokenizer}{f', {held}' if held.is_file() else ''}",
            f"skipped           {len(bad)} images that could not be read" + "".join(f"\n  {name}: {why}" for name, why in bad[:SHOWN]),
        ]
        return "\n".join(lines)

    def verify(self, progress=False):
        """Reads every shard and compares it with its SHA-256. Raises: ValueError that names the first damaged one."""
        for about in progress_bar(self.index["shards"], desc="verifying", unit="shard", disable=not progress, delay=1):
            if sha256(self.path / about["file"]) != about["sha256"]:
                raise ValueError(f"{self.path / about['file']}: damaged, its SHA-256 differs from the one in the index")
        return self

    def check_tokenizer(self, tokenizer):
        """Raises: ValueError, with both hashes, unless models of this store are to be trained and sampled with `tokenizer`: its weights and
        its statistics."""
        expected, got = self.index["normalisation"], normalisation_of(tokenizer)
        if expected["tokenizer"] is None:
            raise ValueError(f"{self.path} does not say which tokenizer made it (it was imported without one); the one to sample with has "
                             f"SHA-256 {got['tokenizer']}")
        if expected["tokenizer"] != got["tokenizer"]:
            what = "weights" if all(expected[key] == got[key] for key in ("mean", "std")) else "statistics"
            right = self.path / "tokenizer.safetensors"
            raise ValueError(f"{self.path} goes with the tokenizer of SHA-256 {expected['tokenizer']}, but the one to sample with has "
                             f"SHA-256 {got['tokenizer']} and other {what}" + (f"; the right one is {right}" if right.is_file() else ""))

    def resident(self, where, device="cpu"):
        """The same set with all moments in memory, verified while they are read.

        Args:
            where: "none" (stays memory-mapped), "ram", "device", or "auto": the device if it is a GPU and the set takes at most a quarter
                of its free memory, else RAM if it takes at most a quarter of that, else none.
        """
        device = torch.device(device)
        if where == "auto":
            if device.type == "cuda" and self.nbytes <= AUTO_FRACTION * torch.cuda.mem_get_info(device)[0]:
                where = "device"
            else:
                ram = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / int(os.environ.get("LOCAL_WORLD_SIZE", 1))
                where = "ram" if self.nbytes <= AUTO_FRACTION * ram else "none"
        if where == "none":
            return self
        self.verify(progress=world()[0] == 0)
        held = copy.copy(self)
        block = torch.empty(int(self.ends[-1]) * self.views, self.blocks[0].shape[1], dtype=self.dtype,
                            device=device if where == "device" else "cpu")
        for part, rows in zip(self.blocks, block.split([len(part) for part in self.blocks]), strict=True):
            rows.copy_(part)
        held.blocks, held.ends, held.in_memory = [block], self.ends[-1:], True
        return held

    def subset(self, indices):
        """The images at these places alone; shares the moments."""
        part = copy.copy(self)
        part.places = indices if self.places is None else self.places[indices]
        part.labels = self.labels[indices]
        return part

    def split(self, fraction, generator):
        """(training part, held-out part or None), the same for the same generator state."""
        held_out = int(len(self) * fraction)
        if not held_out:
            return self, None
        order = torch.randperm(len(self), generator=generator)
        return self.subset(order[held_out:].sort().values), self.subset(order[:held_out].sort().values)

    def gather(self, indices, views=0, out=None):
        """Moments (B, P * C, h, w) of the images at `indices` (B,) int64, in the given views, (B,) or one for all; in the store's dtype.

        out: memory for them, (B, P * C * h * w), where they are on the CPU: on fresh memory the page faults cost more than the copying.
        """
        places = indices if self.places is None else self.places[indices]
        if len(self.blocks) == 1:
            rows = places * self.views + views
            moments = torch.index_select(self.blocks[0], 0, rows.to(self.blocks[0].device, non_blocking=True), out=out)
        else:
            moments = self._gather_from_shards(places, torch.as_tensor(views), out)
        return moments.unflatten(1, (self.parts * self.shape[0], *self.shape[1:]))

    def _gather_from_shards(self, places, views, out):
        for name, given, end in (("indices", places, int(self.ends[-1])), ("views", views, self.views)):
            if given.numel() and not 0 <= given.min() <= given.max() < end:
                raise IndexError(f"{name}: got {given.min()} to {given.max()}, expected 0 to {end - 1}")
        shape = (len(places), self.blocks[0].shape[1])
        out = torch.empty(shape, dtype=self.dtype) if out is None else out
        if out.shape != shape or out.dtype != self.dtype or not out.is_contiguous():
            raise ValueError(f"out: got {out.dtype} {tuple(out.shape)}, strides {out.stride()}, expected contiguous {self.dtype} {shape}")
        shards = torch.bucketize(places, self.ends, right=True)
        starts = torch.cat([self.ends.new_zeros(1), self.ends[:-1]])
        rows = (places - starts[shards]) * self.views + views
        if native.available:
            native.gather_rows(self.addresses[shards] + rows * self.blocks[0][0].nbytes, out)
        elif len(rows):  # slower: a view of each row costs as much as its bytes
            torch.stack([self.blocks[s].select(0, r) for s, r in zip(shards.tolist(), rows.tolist(), strict=True)], out=out)
        return out


def draw(moments, noise):
    """Raw latents (B, C, h, w), fp32, from moments (B, P * C, h, w) of the same device: mean + exp(log-variance / 2) * noise.

    Where the moments are samples already (P = 1) the noise is not used.
    """
    moments = moments.float()
    if moments.shape == noise.shape:
        return moments
    mean, logvar = moments.chunk(2, dim=1)
    return mean + torch.exp(0.5 * logvar) * noise


def read_index(path):
    """The content of index.json, checked. Raises: FileNotFoundError; ValueError for one that is damaged or of another version."""
    file = Path(path) / "index.json"
    if not file.is_file():
        unfinished = (Path(path) / "plan.json").is_file()
        raise FileNotFoundError(f"{path} is {'an unfinished' if unfinished else 'not a'} latent store: it has no index.json"
                                + ("; the command that began it goes on with it" if unfinished else ""))
    index = _parse(file)
    if index.get("format") != FORMAT:
        raise ValueError(f"{file}: not the index of a latent store")
    if index.get("version") != VERSION:
        raise ValueError(f"{file}: got version {index.get('version')!r}, expected {VERSION}; this store was written by another release")
    if index.pop("sha256", None) != digest(index):
        raise ValueError(f"{file}: damaged, it differs from its own checksum")
    if not all(SHARD.fullmatch(about["file"]) for about in index["shards"]):
        raise ValueError(f"{file}: shards outside the store")
    return index


def plan_id(plan):
    """A name for the one store that this plan makes; every shard's header holds it."""
    return digest(plan)[:16]


def digest(content):
    """SHA-256 of JSON content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parse(file):
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{file}: damaged: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: damaged: got a {type(content).__name__}, expected an object")
    return content


def write_json(file, content):
    """Writes JSON by checkpoint.write_text: whatever happens, the file is the old one or the new one."""
    write_text(file, json.dumps(content, indent=1))


def _shard_name(number):
    return f"shard_{number:05d}.safetensors"


def _record_name(number):
    return f"shard_{number:05d}.json"


def _differences(before, now, name=""):
    """["provenance.tokenizer: old -> new", ...] of two JSON objects."""
    found = []
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{name}{key}.")
        elif old != new:
            found.append(f"{name}{key}: {old!r} -> {new!r}"[:300])
    return found


# Training


def batch_indices(step, batch_size, num_images, seed):
    """Indices (batch_size,) of the images of update `step` (0-based): the next places in an endless row of epochs, each shuffled anew.

    Depends on (seed, step) only, so a resumed run reads on where it stopped; no image is left out or seen twice in an epoch.
    """
    return torch.cat([_epoch_order(epoch, num_images, seed)[part] for epoch, part in _epoch_parts(step, batch_size, num_images)])


def batch_views(step, batch_size, num_images, views, seed):
    """Which view of each image of `batch_indices` to take, (batch_size,): a function of (seed, epoch, index)."""
    return torch.cat([_epoch_views(epoch, num_images, views, seed)[_epoch_order(epoch, num_images, seed)[part]]
                      for epoch, part in _epoch_parts(step, batch_size, num_images)])


def _epoch_parts(step, batch_size, num_images):
    """[(epoch, slice of its order)] of update `step`."""
    position, parts, missing = step * batch_size, [], batch_size
    while missing:
        epoch, offset = divmod(position, num_images)
        count = min(missing, num_images - offset)
        parts.append((epoch, slice(offset, offset + count)))
        position, missing = position + count, missing - count
    return parts


@functools.lru_cache(maxsize=2)  # a batch may span two epochs; of ImageNet each takes 10 MB
def _epoch_order(epoch, num_images, seed):
    return torch.randperm(num_images, generator=generator_for(seed, "epoch", epoch))


@functools.lru_cache(maxsize=2)
def _epoch_views(epoch, num_images, views, seed):
    return torch.randint(views, (num_images,), generator=generator_for(seed, "mirror", epoch), dtype=torch.uint8)


class Loader:
    """Iterator over the updates start, start + 1, ...: (moments (b, P * C, h, w), labels (b,)) of this process's slice, on `device`.

    What update s gets depends on (seed, s) alone. Where the moments are not in memory already, or have to travel to a GPU, a thread reads
    ahead. Batches are gathered into a ring of buffers, pinned for CUDA: one is valid until the next is asked for.

    Args:
        store: LatentStore. batch_size: global, over all processes. flip: take the mirror image with probability 1/2.
        rank, world: this process's slice is the rank-th of `world` equal ones. prefetch: batches read ahead; 0: none.
    Raises: ValueError for an empty set, a batch that does not divide, or mirror images that the store does not hold.
    """

    def __init__(self, store, batch_size, *, seed, start=0, flip=True, rank=0, world=1, device="cpu", prefetch=2):
        if not len(store):
            raise ValueError(f"store: {store.path} holds no images")
        if batch_size < 1 or batch_size % world:
            raise ValueError(f"batch_size: got {batch_size}, expected a positive multiple of {world} processes")
        if flip and store.views < 2:
            raise ValueError(f"flip: {store.path} holds no mirror images; encode them (data.flip) or train without")
        self.store, self.batch_size, self.seed, self.step = store, batch_size, seed, start
        self.views = store.views if flip else 1
        self.share = slice(batch_size * rank // world, batch_size * (rank + 1) // world)
        self.device, held = torch.device(device), store.blocks[0].device
        self.thread, self.stop, self.ring = None, threading.Event(), [(None, None)]
        if held.type == "cpu":
            pin = self.device.type == "cuda"
            ahead = prefetch if pin or not store.in_memory else 0
            shape = (self.share.stop - self.share.start, store.blocks[0].shape[1])
            # One in use; with a thread `ahead` in the queue and one being filled.
            self.ring = [(torch.empty(shape, dtype=store.dtype, pin_memory=pin), torch.cuda.Event() if pin else None)
                         for _ in range(ahead + 2 if ahead else 1)]
            if ahead:
                self.queue = queue.Queue(ahead)
                self.thread = threading.Thread(target=self._read_ahead, args=(start,), name="latents", daemon=True)
                self.thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        got = self._read(self.step) if self.thread is None else self.queue.get()
        if isinstance(got, BaseException):
            raise got
        moments, labels, copied = got
        self.step += 1
        moments, labels = moments.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)
        if copied is not None:
            copied.record()
        return moments, labels

    def _read(self, step):
        indices = batch_indices(step, self.batch_size, len(self.store), self.seed)[self.share]
        views = batch_views(step, self.batch_size, len(self.store), self.views, self.seed)[self.share] if self.views > 1 else 0
        buffer, copied = self.ring[step % len(self.ring)]
        if copied is not None:
            copied.synchronize()  # the copy out of this buffer may still wait behind an earlier update
        return self.store.gather(indices, views, buffer), self.store.labels[indices], copied

    def _read_ahead(self, step):
        try:
            while not self.stop.is_set():
                self._put(self._read(step))
                step += 1
        except BaseException as error:
            self._put(error)

    def _put(self, item):
        while not self.stop.is_set():
            try:
                return self.queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def close(self):
        """Ends the thread."""
        self.stop.set()
        if self.thread is not None:
            self.thread.join()
