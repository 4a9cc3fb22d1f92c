"""How images are decoded by NVIDIA DALI, on a CPU or (nvJPEG) on a GPU; images.py decides when.

DALI gets JPEG files that its decoder and Pillow's understand alike, by their headers. It stops for good at the first image that it cannot
decode, so the pipeline is then built anew and the images of that batch are tried one by one. Everything else Pillow decodes.
"""

import dataclasses
import functools
import io
import logging
import struct
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from .optional import optional

log = logging.getLogger(__name__)

SIZES = {0xC0, 0xC1, 0xC2}  # JPEG markers of baseline, extended and progressive frames
OTHER_SIZES = {0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF}  # lossless, differential and arithmetic ones
SCAN = 0xDA


@functools.cache
def _dot():
    with optional("a JPEG file"):
        from PIL import Image

    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "JPEG")
    return file.getvalue()


def unavailable():
    """None where DALI can be imported, else why not."""
    try:
        import nvidia.dali  # noqa: F401
    except (ImportError, OSError) as error:
        return f"{type(error).__name__}: {error}"


def window(width, height, size, place=None):
    """The square that remains of an image after its shorter side is resized to `size` and a size x size crop is taken.

    Args:
        place: (u, v) in [0, 1), where along width and height the crop lies; None: in the middle.
    Returns: (left, top, right, bottom) in pixels of the image as it was, not rounded.
    """
    scale, box = size / min(width, height), []
    for side, at in zip((width, height), (None, None) if place is None else place, strict=True):
        resized = max(size, round(side * scale))
        start = (resized - size) // 2 if at is None else int(at * (resized - size + 1))
        box.append((start * side / resized, (start + size) * side / resized))
    return box[0][0], box[1][0], box[0][1], box[1][1]


def jpeg_header(data):
    """(width, height) as the viewer sees it, if DALI decodes these bytes as Pillow does; else a str that says why it might not.

    Source: ITU-T T.81, B.2; Exif 2.32, 4.6.
    """
    if data[:2] != b"\xff\xd8":
        return "not a JPEG file"
    if b"\xff\xd9" not in data[-64:]:
        return "no end mark"
    at, size, components, orientation, metadata, adobe_rgb = 2, None, 0, None, 0, False
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return "damaged JPEG header"
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
            continue
        length = struct.unpack_from(">H", data, at + 2)[0]
        body = data[at + 4 : at + 2 + length]
        if marker in OTHER_SIZES:
            return "lossless or arithmetic JPEG"
        if marker in SIZES:
            if len(body) < 6 or size is not None:
                return "damaged JPEG header"
            precision, height, width, components = struct.unpack_from(">BHHB", body)
            if precision != 8 or components not in (1, 3):
                return f"JPEG of {components} channels of {precision} bits"
            if not width or not height:
                return "JPEG of unknown size"
            size, adobe_rgb = (width, height), adobe_rgb or body[6::3] == b"RGB"
        elif marker == 0xE1:
            if b"tiff:Orientation" in body:
                return "JPEG rotated by XMP"
            if body[:6] == b"Exif\0\0":
                metadata, orientation = metadata + 1, _orientation(body[6:])
                if metadata > 1 or orientation is None:
                    return "unusual Exif"
        elif marker == 0xEE and body[:5] == b"Adobe" and body[11:12] == b"\0":
            adobe_rgb = True
        elif marker == SCAN:
            if size is None:
                return "damaged JPEG header"
            if adobe_rgb and components == 3:
                return "JPEG in RGB"
            return size[::-1] if orientation in (5, 6, 7, 8) else size
        at += 2 + length
    return "damaged JPEG header"


def _orientation(tiff):
    """1..8, or None where it cannot be read for certain."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    try:
        start = struct.unpack_from(f"{order}I", tiff, 4)[0]
        for entry in range(struct.unpack_from(f"{order}H", tiff, start)[0]):
            tag, kind, count, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * entry)
            if tag == 0x0112:
                return value if kind == 3 and count == 1 and 1 <= value <= 8 else None
    except struct.error:
        return None
    return 1


@dataclasses.dataclass
class _Batch:
    """A job on its way; the dictionaries are by slot."""

    indices: torch.Tensor
    places: np.ndarray
    flips: np.ndarray
    data: dict = dataclasses.field(default_factory=dict)  # bytes
    geometry: dict = dataclasses.field(default_factory=dict)  # (halved height, width), window: what DALI decodes, in the order of slots
    by_pillow: dict = dataclasses.field(default_factory=dict)  # (image, future reason): what Pillow decodes
    failures: dict = dataclasses.field(default_factory=dict)  # why there is no image


class DaliDecoder:
    """One pass over jobs (indices (B,), places (B, 2), flips (B,)); iterating gives (indices, images uint8 (B, S, S, C), {slot: reason}).

    Args:
        jobs: iterable. batch_size: most images of a job. size, channels: of the decoded images.
        center: the ADM center crop in DALI's arithmetic; else the window at each place.
        read(index): the bytes. decode(out, index, place, flip, data): decodes by Pillow into out; returns None, or why it cannot.
        workers: threads of DALI, and as many that read. device: torch.device, where DALI decodes. max_pixels: larger images are Pillow's.
    Attributes: fallbacks (Counter of why images were left to Pillow).
    """

    def __init__(self, jobs, batch_size, size, channels, center, read, decode, workers, device, max_pixels):
        self.jobs, self.batch_size, self.size, self.channels, self.center = iter(jobs), batch_size, size, channels, center
        self.read, self.decode, self.workers, self.device, self.max_pixels = read, decode, workers, device, max_pixels
        self.fallbacks = Counter()
        self.reading, self.running, self.again = deque(), deque(), deque()  # read ahead; in the pipeline; left by a pipeline that failed

    def __iter__(self):
        self.pool = ThreadPoolExecutor(self.workers, thread_name_prefix="read")
        pipeline = None
        try:
            while True:
                pipeline = pipeline or self._pipeline(self._feed, self.batch_size)
                try:
                    images, batch = self._run(pipeline), self.running.popleft()
                except StopIteration:
                    return
                except Exception as error:  # DALI raises nearly anything, and does not say which image it was
                    if not self.running:
                        raise
                    pipeline, batch = None, self.running.popleft()
                    self.again.extendleft(reversed(self.running))
                    self.running.clear()
                    log.debug("DALI: %s", error)
                    images = self._one_by_one(batch)
                yield batch.indices, self._assemble(batch, images), batch.failures
        finally:
            self.pool.shutdown(wait=False, cancel_futures=True)

    def _feed(self):
        """The inputs of the next batch; StopIteration behind the last."""
        self.running.append(self.again.popleft() if self.again else self._prepare())
        return self._inputs(self.running[-1], self.running[-1].geometry)

    def _prepare(self):
        while len(self.reading) < 3 and (job := next(self.jobs, None)) is not None:
            self.reading.append((job, [self.pool.submit(self._read, index) for index in job[0].tolist()]))
        if not self.reading:
            raise StopIteration
        job, futures = self.reading.popleft()
        batch = _Batch(*job)
        for slot, future in enumerate(futures):
            batch.data[slot], header = future.result()
            if batch.data[slot] is None:
                batch.failures[slot] = header
            elif isinstance(header, str):
                self._leave(batch, slot, header)
            elif isinstance(geometry := self._geometry(*header, job[1][slot]), str):
                self._leave(batch, slot, geometry)
            else:
                batch.geometry[slot] = geometry
        return batch

    def _read(self, index):
        try:
            data = self.read(index)
            return data, jpeg_header(data)
        except Exception as error:  # whatever a file system or an archive can raise
            return None, f"{type(error).__name__}: {error}"

    def _geometry(self, width, height, place):
        if width * height > self.max_pixels:
            return "too many pixels"
        if not self.center:
            return (height, width), window(width, height, self.size, place)
        if min(width, height) >= 4 * self.size:
            return "halved more than once"
        if min(width, height) >= 2 * self.size:
            if width % 2 or height % 2:
                return "halved from an odd size"
            width, height = width // 2, height // 2
        return (height, width), window(width, height, self.size)

    def _leave(self, batch, slot, why):
        """Leaves an image to Pillow."""
        self.fallbacks[why] += 1
        image = torch.empty(self.size, self.size, self.channels, dtype=torch.uint8)
        arguments = image.numpy(), int(batch.indices[slot]), batch.places[slot], batch.flips[slot], batch.data[slot]
        batch.by_pillow[slot] = image, self.pool.submit(self.decode, *arguments)

    def _one_by_one(self, batch):
        """The images (n, S, S, C) that DALI decodes alone; the others are left to Pillow."""
        images, slots = [], list(batch.geometry)
        while slots:
            pipeline = self._pipeline(functools.partial(self._feed_one, batch, iter(tuple(slots))), 1, ahead=False)
            try:
                while slots:
                    images.append(self._run(pipeline))
                    del slots[0]
            except Exception as error:
                log.warning("DALI cannot decode image %d: %s", batch.indices[slots[0]], " ".join(str(error).split())[-200:])
                del batch.geometry[slots[0]]
                self._leave(batch, slots.pop(0), "DALI failed")
        return torch.cat(images) if images else torch.empty(0, self.size, self.size, self.channels, dtype=torch.uint8)

    def _feed_one(self, batch, slots):
        return self._inputs(batch, [next(slots)])

    def _inputs(self, batch, slots):
        """What a pipeline takes: bytes, windows, flips, halved sizes. Without any image, one black dot, which `_assemble` drops."""
        if not slots:
            return [np.frombuffer(_dot(), np.uint8)], np.float32([[0, 0, 8, 8]]), np.zeros(1, np.int32), np.float32([[8, 8]])
        halved, windows = zip(*(batch.geometry[slot] for slot in slots), strict=True)
        flips = np.array([batch.flips[slot] for slot in slots], np.int32)
        data = [np.frombuffer(batch.data[slot], np.uint8) for slot in slots]
        return data, np.array(windows, np.float32), flips, np.array(halved, np.float32)

    def _assemble(self, batch, images):
        if len(batch.geometry) == len(batch.indices):
            return images
        out = torch.zeros(len(batch.indices), *images.shape[1:], dtype=torch.uint8, device=self.device)
        if batch.geometry:
            out[list(batch.geometry)] = images.to(self.device)
        for slot, (image, future) in batch.by_pillow.items():
            if (reason := future.result()) is not None:
                batch.failures[slot] = reason
            else:
                out[slot] = image.to(self.device)
        return out

    def _pipeline(self, feed, batch_size, ahead=True):
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        device_id = (self.device.index or 0) if on_gpu else None
        pipeline = Pipeline(batch_size=batch_size, num_threads=self.workers, device_id=device_id, prefetch_queue_depth=2 if ahead else 1,
                            exec_pipelined=ahead, exec_async=ahead)
        with pipeline:
            data, box, flip, *halved = fn.external_source(
                lambda: feed()[: 3 + self.center], num_outputs=3 + self.center, batch=True, ndim=[1, 1, 0, 1][: 3 + self.center],
                dtype=[types.UINT8, types.FLOAT, types.INT32, types.FLOAT][: 3 + self.center])
            images = fn.decoders.image(data, device="mixed" if on_gpu else "cpu", jpeg_fancy_upsampling=True,  # as libjpeg and so Pillow do
                                       output_type=types.RGB if self.channels == 3 else types.GRAY)
            if self.center:  # between two pixels each way, linear interpolation is the mean of four: the box filter
                images = fn.resize(images, size=halved[0], interp_type=types.INTERP_LINEAR, antialias=False)
            images = fn.resize(images, size=[self.size, self.size], roi_start=fn.stack(box[1], box[0]), roi_end=fn.stack(box[3], box[2]),
                               interp_type=types.INTERP_CUBIC, antialias=True)
            pipeline.set_outputs(fn.flip(images, horizontal=flip))
        return pipeline

    def _run(self, pipeline):
        """The next images (n, S, S, C) on the device, copied: DALI writes into its own memory again."""
        (images,) = pipeline.run()
        if self.device.type == "cpu":
            return torch.from_numpy(images.as_array().copy())
        from nvidia.dali.plugin.pytorch import feed_ndarray

        out = torch.empty(len(images), self.size, self.size, self.channels, dtype=torch.uint8, device=self.device)
        feed_ndarray(images.as_tensor(), out, cuda_stream=torch.cuda.current_stream(self.device))
        return out
