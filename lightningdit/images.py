"""Images to uint8 tensors (B, H, W, C) with labels: the digits of scikit-learn, and folders with one folder of images a class.

Everything an image file can be (grayscale, palette, alpha, CMYK, 16 bit, rotated by EXIF) becomes `channels` channels of uint8, cropped
to a square. What cannot be read is named, counted and skipped; more than MAX_BAD_FRACTION of it stops the pass.
"""

import logging
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())  # compared in lower case
MAX_BAD_FRACTION = 0.01
SHOWN = 10  # bad files listed in a report
MODES = {1: "L", 3: "RGB"}  # image channels: Pillow's mode


def digits():
    """The handwritten digits that scikit-learn ships: uint8 images (1797, 8, 8, 1), 0..16 scaled to 0..255, and int64 labels (1797,).

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.rint(data.images * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images)[..., None], torch.from_numpy(data.target.astype(np.int64))


def to_pixels(images):
    """uint8 images (B, H, W, C) -> float pixels (B, C, H, W) in [-1, 1]: x / 127.5 - 1."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: got {images.dtype} of shape {tuple(images.shape)}, expected uint8 (B, H, W, C)")
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


def center_crop(image, size):
    """The ADM center crop of a Pillow image to size x size.

    Halves it by box filter while the shorter side is at least 2 * size, resizes that side to `size` by bicubic filter, cuts the middle out.
    Bit-exact with the official code, whose FID depends on it. Source: ADM, arXiv:2105.05233.
    """
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def read_image(path, size, channels):
    """Decodes one file to uint8 (size, size, channels). Alpha is dropped, 16 bit scaled to 8.

    Raises: whatever Pillow raises for a bad file; ValueError for pixels without a fixed range.
    """
    with Image.open(path) as image:
        image = _convert(ImageOps.exif_transpose(image), MODES[channels])
    return np.asarray(center_crop(image, size)).reshape(size, size, channels)


def _convert(image, mode):
    if image.mode.startswith("I"):  # 16-bit grayscale, which convert() would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {image.mode} with values {values.min()}..{values.max()}, expected 16 bit")
        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("mode F (floating point) has no fixed range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)


class ImageFolder:
    """A folder with one folder of images a class.

    Args:
        path: the folder. Its subfolders, sorted by name, are classes 0, 1, ...; images may lie deeper inside them. Names that start with
            a dot and files that are no images by name are left out.
        image_size: side in pixels after the center crop. channels: 1 or 3.
    Attributes: classes (names), files (paths, sorted within a class), labels (int64 tensor), bad ([(path, reason)] of the latest pass).
    Raises: FileNotFoundError for a missing folder; ValueError for a file in its place, no class folders, classes without images (named).
    """

    def __init__(self, path, image_size, channels=3):
        self.path, self.image_size, self.channels = Path(path), image_size, channels
        if channels not in MODES:
            raise ValueError(f"channels: got {channels}, expected 1 or 3")
        if image_size < 1:
            raise ValueError(f"image_size: got {image_size}, expected a positive number of pixels")
        if not self.path.exists():
            raise FileNotFoundError(f"no folder {self.path}")
        if not self.path.is_dir():
            raise ValueError(f"{self.path} is a file, expected a folder with one folder of images a class")
        folders = sorted(p for p in self.path.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not folders:
            raise ValueError(f"{self.path} holds no class folders, expected one folder of images a class")
        self.classes = [folder.name for folder in folders]
        files = [sorted(p for p in folder.rglob("[!.]*") if p.suffix.lower() in EXTENSIONS and p.is_file()) for folder in folders]
        empty = [name for name, found in zip(self.classes, files, strict=True) if not found]
        if empty:
            raise ValueError(f"{self.path}: no images in class {', '.join(empty)}; expected files ending in {' '.join(sorted(EXTENSIONS))}")
        self.files = [file for found in files for file in found]
        self.labels = torch.tensor([label for label, found in enumerate(files) for _ in found])
        self.bad = []

    def __len__(self):
        return len(self.files)

    def batches(self, batch_size, workers=4, progress=True, start=0):
        """One pass in index order, decoded ahead by `workers` threads (Pillow releases the interpreter lock while it decodes and resizes).

        Yields: (images uint8 (B, H, W, C), labels int64 (B,), indices int64 (B,)). Every batch but the last is full: bad files are
            skipped, and listed in `bad` and in one warning at the end.
        Raises: ValueError as soon as more than 1 % of all files are bad; it lists the first ones.
        """
        if batch_size < 1 or workers < 1:
            raise ValueError(f"batch_size and workers: got {batch_size} and {workers}, expected positive numbers")
        self.bad, batch = [], []
        indices = iter(range(start, len(self)))
        pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
        bar = tqdm(total=len(self), initial=start, desc=f"reading {self.path.name}", unit="image", disable=not progress)
        try:
            ahead = deque()
            while True:
                while len(ahead) < batch_size + 2 * workers and (index := next(indices, None)) is not None:
                    ahead.append((index, pool.submit(read_image, self.files[index], self.image_size, self.channels)))
                if not ahead:
                    break
                index, future = ahead.popleft()
                try:
                    batch.append((index, future.result()))
                except Exception as error:  # a damaged file can make a decoder raise nearly anything
                    self.bad.append((self.files[index], f"{type(error).__name__}: {error}"))
                    if len(self.bad) > MAX_BAD_FRACTION * len(self):
                        raise ValueError(f"{self.path}: more than {MAX_BAD_FRACTION:.0%} of {len(self)} images cannot be read:\n"
                                         + self._report()) from None
                bar.update()
                if len(batch) == batch_size:
                    yield self._collate(batch)
                    batch = []
            if batch:
                yield self._collate(batch)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
            bar.close()
        if self.bad:
            log.warning("%s: skipped %d of %d images that cannot be read:\n%s", self.path, len(self.bad), len(self), self._report())

    def _collate(self, batch):
        indices = torch.tensor([index for index, _ in batch])
        return torch.from_numpy(np.stack([image for _, image in batch])), self.labels[indices], indices

    def _report(self):
        lines = [f"  {path.relative_to(self.path)}: {reason}" for path, reason in self.bad[:SHOWN]]
        return "\n".join(lines + ([f"  and {len(self.bad) - SHOWN} more"] if len(self.bad) > SHOWN else []))
