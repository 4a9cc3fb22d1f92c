"""The images that a tokenizer is trained and measured on: in memory, or decoded as they come."""

import itertools

import torch

from lightningdit.distributed import generator_for
from lightningdit.images import ImageBatches, ImageSource, digits, open_images
from lightningdit.latents import batch_indices

HELD_OUT = 2_000  # images at most on which the reconstruction is measured


class TokenizerImages:
    """Images to train on, len() of them, and held-out ones to measure on.

    Args:
        path: as open_images takes it; None: the digits that scikit-learn ships, in memory. val_path: held-out images; None: `val_fraction`
            of those in path, chosen by `seed`.
        image_size, channels, crop, flip, decoder, device, workers: as ImageBatches takes them; held-out images are center-cropped.
        in_memory: decode all once and keep them; for crop="center" without flip.
        progress: show a bar while images are read into memory.
    Attributes: classes (names); labels (int64 (n,)) of the images to train on; images, their pixels if they are in memory, else None;
        held_out: (uint8 (m, H, W, C), labels (m,)), m at most 2,000 spread evenly; same_classes: whether those labels mean `classes`.
    """

    def __init__(self, path=None, *, val_path=None, val_fraction=0.1, image_size=8, channels=1, crop="random", flip=False, in_memory=False,
                 decoder="auto", device="cpu", workers=4, seed=0, progress=False):
        self.options = dict(image_size=image_size, channels=channels, decoder=decoder, device=device, workers=workers)
        self.crop, self.flip, self.images, self.same_classes = crop, flip, None, True
        if path is None:
            images, labels = digits()
            held_out, kept = split(len(images), val_fraction, seed)
            self.held_out, self.classes = (images[held_out], labels[held_out]), [str(digit) for digit in range(10)]
            self.images, self.labels = images[kept], labels[kept]
            return
        source = val = open_images(path)
        if val_path is None:
            held_out, kept = split(len(source), val_fraction, seed)
        else:
            val = open_images(val_path)
            held_out, kept = torch.arange(len(val)), torch.arange(len(source))
        self.same_classes = val.classes == source.classes
        spread = torch.linspace(0, len(held_out) - 1, min(len(held_out), HELD_OUT)).long()
        self.held_out = self._read(Subset(val, held_out[spread]), progress)
        self.source, self.classes = Subset(source, kept), source.classes
        self.labels = self.source.labels
        if in_memory:
            self.images, self.labels = self._read(self.source, progress)

    def __len__(self):
        return len(self.labels)

    def _read(self, source, progress):
        batches = ImageBatches(source, 256, **self.options | dict(device="cpu", progress=progress))
        images, labels, _ = zip(*batches.epoch(), strict=True)
        return torch.cat(images), torch.cat(labels)

    def batches(self, batch_size, seed, start=0, rank=0, ranks=1):
        """Endless batches of a rank (images uint8 (B / ranks, H, W, C), labels, indices), from update `start` on, each epoch shuffled anew.

        Those of all ranks together are the batch of one rank: nothing depends on when the run was interrupted.
        """
        if self.images is not None:
            for step in itertools.count(start):
                indices = batch_indices(step, batch_size, len(self), seed)[rank::ranks]
                yield self.images[indices], self.labels[indices], indices
        batches = ImageBatches(self.source, batch_size // ranks, crop=self.crop, flip=self.flip, shuffle=True, seed=seed, rank=rank,
                               world=ranks, drop_last=True, **self.options)
        epoch, done = divmod(start, len(batches))
        while True:
            yield from batches.epoch(epoch, done * batches.batch_size)
            epoch, done = epoch + 1, 0

    def sample(self, count, batch_size, seed):
        """Batches of `count` images to train on, center-cropped, in order; of all where there are no more. uint8 (B, H, W, C)."""
        chosen = torch.arange(len(self))
        if count < len(self):
            chosen = torch.randperm(len(self), generator=generator_for(seed, "sample of images"))[:count].sort().values
        if self.images is not None:
            return self.images[chosen].split(batch_size)
        return (images for images, *_ in ImageBatches(Subset(self.source, chosen), batch_size, progress=True, **self.options).epoch())


class Subset(ImageSource):
    """The images `indices` (int64 tensor) of a source."""

    def __init__(self, source, indices):
        indices = indices.tolist()
        super().__init__(source.path, [source.names[i] for i in indices], source.labels[indices], source.classes,
                         [source.fingerprint, *map(str, indices)])
        self.source, self.indices = source, indices

    def read(self, index):
        return self.source.read(self.indices[index])


def split(n, fraction, seed):
    """(indices held out to measure on, indices to train on), each sorted."""
    order = torch.randperm(n, generator=generator_for(seed, "held out"))
    count = max(1, int(n * fraction))
    if count >= n:
        raise ValueError(f"val_fraction: got {fraction}, expected to leave some of the {n} images to train on")
    return order[:count].sort().values, order[count:].sort().values
