"""Latents of a data set as posterior moments, so that every epoch draws afresh: images are encoded once, then trained on.

B batch, C latent channels, h, w latent positions, n images, M views (1, or 2 with the mirrored image).
"""
import dataclasses
import functools
import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .distributed import generator_for
from .images import to_pixels


@dataclasses.dataclass
class LatentSet:
    """The whole set in memory.

    moments: (M, n, 2C, h, w) fp32, mean and log-variance of raw (not normalised) latents. labels: (n,) int64. classes: their names.
    provenance: what made them: "tokenizer" (SHA-256), "data" (fingerprint), "image_size".
    """

    moments: torch.Tensor
    labels: torch.Tensor
    classes: list
    provenance: dict

    def __len__(self):
        return len(self.labels)

    def subset(self, indices):
        return dataclasses.replace(self, moments=self.moments[:, indices], labels=self.labels[indices])

    def split(self, fraction, generator):
        """(training part, held-out part or None), the same for the same generator state."""
        held_out = int(len(self) * fraction)
        order = torch.randperm(len(self), generator=generator)
        return self.subset(order[held_out:].sort().values), self.subset(order[:held_out].sort().values) if held_out else None

    def draw(self, indices, noise, mirror):
        """Samples raw latents: mean + std * noise of the chosen view.

        Args:
            indices: (B,) int64 on the CPU. noise: (B, C, h, w) standard normal, on the device that trains. mirror: (B,) uniform in [0, 1).
        Returns: latents (B, C, h, w) and labels (B,), on noise.device.
        """
        view = (mirror.cpu() * len(self.moments)).long()
        moments = self.moments[view, indices].to(noise.device, non_blocking=True)
        mean, logvar = moments.chunk(2, dim=1)
        return mean + torch.exp(0.5 * logvar) * noise, self.labels[indices].to(noise.device, non_blocking=True)


@torch.no_grad()
def encode(tokenizer, batches, *, flip, device, classes, provenance):
    """Encodes batches of images to a LatentSet.

    Args:
        tokenizer: its `encode(pixels)` returns a posterior with `mean` and `logvar`.
        batches: iterable of (images uint8 (B, H, W, C), labels (B,), ...). flip: encode the mirrored image as a second view.
    """
    moments, labels = [], []
    for batch, batch_labels, *_ in batches:
        pixels = to_pixels(batch).to(device)
        posteriors = [tokenizer.encode(view) for view in ((pixels, pixels.flip(3)) if flip else (pixels,))]
        moments.append(torch.stack([torch.cat([p.mean, p.logvar], dim=1) for p in posteriors]).float().cpu())
        labels.append(batch_labels)
    return LatentSet(torch.cat(moments, dim=1), torch.cat(labels), list(classes), provenance)


def fingerprint(root, files):
    """A hash of names, sizes and modification times: changes when the folder's images do, without reading them."""
    digest = hashlib.sha256()
    for file in files:
        stat = file.stat()
        digest.update(f"{file.relative_to(root)} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def cache_path(folder, provenance, flip):
    """Name of the cached encoding of exactly this data by exactly this tokenizer."""
    key = json.dumps([{k: provenance[k] for k in ("tokenizer", "data", "image_size")}, flip], sort_keys=True)
    return Path(folder) / f"latents_{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors"


def save(latents, path):
    """Writes a LatentSet; the file appears under its name only when it is complete."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial_{path.name}")
    try:
        save_file({"moments": latents.moments.contiguous(), "labels": latents.labels.contiguous()}, partial,
                  {"classes": json.dumps(latents.classes), "provenance": json.dumps(latents.provenance)})
        partial.rename(path)
    except SafetensorError as error:
        raise OSError(f"could not write {path}: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def load(path):
    """Reads what `save` wrote. Raises: ValueError for a damaged file."""
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            classes, provenance = json.loads(metadata["classes"]), json.loads(metadata["provenance"])
            return LatentSet(file.get_tensor("moments"), file.get_tensor("labels"), classes, provenance)
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"latents {path}: damaged ({error}); delete the file and run again to encode anew") from None


def batch_indices(step, batch_size, num_images, seed):
    """Indices (batch_size,) of the images of update `step` (0-based): the next places in an endless row of epochs, each shuffled anew.

    Depends on (seed, step) only, so a resumed run reads on where it stopped; no image is left out or seen twice in an epoch.
    """
    position, parts, missing = step * batch_size, [], batch_size
    while missing:
        epoch, offset = divmod(position, num_images)
        part = _epoch_order(epoch, num_images, seed)[offset : offset + missing]
        parts.append(part)
        position, missing = position + len(part), missing - len(part)
    return torch.cat(parts)


@functools.lru_cache(maxsize=2)  # a batch may span two epochs
def _epoch_order(epoch, num_images, seed):
    return torch.randperm(num_images, generator=generator_for(seed, "epoch", epoch))
