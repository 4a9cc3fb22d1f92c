"""What `lightningdit evaluate` does: images to features, features to numbers, numbers to one table and one JSON file.

    evaluate_tokenizer  originals against what a tokenizer makes of them, and its latents
    evaluate_samples    generated images, from files or straight from a run's sampler, against a reference
    collect, compare    the same for images that come from anywhere, such as straight from the sampler

Under torchrun each process takes every world-th image, and all that is measured is merged before it is judged.
"""
import contextlib
import dataclasses
import hashlib
import io
import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open

from . import metrics
from .checkpoint import save_weights, state_sha256, write_text
from .config import require
from .distributed import generator_for, pick_device, process_group, world
from .features import Unavailable, load_extractor
from .images import EXTENSIONS, ImageBatches, ImageSource, digits, open_images, to_pixels
from .log import environment, image_grid, save_png
from .metrics import FeatureStatistics
from .optional import optional, progress_bar
from .sampler import sample_images
from .tokenizer.losses import perceptual_loss
from .tokenizer.vavae import load_tokenizer
from .trained import load_run

KEPT = 10_000  # features of a reference kept for KID, precision and recall: ADM's reference files hold as many images
UNBIASED = 10_000  # with fewer images a Frechet distance is noticeably too large
GAIN = 4  # of the differences in the picture
ADM = dict(pool=("mu", "sigma"), spatial=("mu_s", "sigma_s"))  # names in ADM's reference files


@dataclasses.dataclass
class EvaluationData:
    path: str | None = None  # folder of class folders, .tar or .zip; None: the digits that scikit-learn ships
    image_size: int | None = None  # pixels a side after the center crop; None: 8 for the digits
    num_images: int | None = None  # evenly spaced ones; None: all
    workers: int = 4  # decoding threads

    def validate(self):
        if self.path is None:
            require(self.image_size in (None, 8), "data.image_size", self.image_size, "8 for the digits, or data.path")
        else:
            require(self.image_size is not None and self.image_size > 0, "data.image_size", self.image_size, "a positive number of pixels")
        require(self.num_images is None or self.num_images > 1, "data.num_images", self.num_images, "at least 2, or null for all")
        require(self.workers > 0, "data.workers", self.workers, "a positive number")


def evaluate_tokenizer(
    tokenizer: str = "digits",
    data: EvaluationData = EvaluationData(),  # noqa: B008  tyro makes a new one of it
    extractors: str = "auto",
    weights: str = "",
    lpips_weights: str | None = None,
    preset: str | None = None,
    statistics: float | str | None = None,
    posterior: str = "sample",
    uniformity_points: int = 1000,
    uniformity_runs: int = 1,
    seed: int = 0,
    batch_size: int = 64,
    device: str = "auto",
    out: str = "runs/evaluation",
) -> int:
    """Measures a tokenizer on images: rFID, PSNR, SSIM, LPIPS, and the statistics and uniformity of its latents.

    Prints a table; writes OUT/evaluation.json and OUT/reconstructions.png: originals, reconstructions, and four times their difference.

    Args:
        tokenizer: "digits", a tokenizer file, an official VA-VAE, LDM or MAR checkpoint, or a folder of diffusers.
        data: the images to reconstruct.
        extractors: feature extractors of the reconstruction Frechet distance, separated by commas: inception, dinov2, timm:MODEL, digits, a
            file of a small encoder. auto: digits for the digits, else inception.
        weights: files of their weights, "inception=FILE,dinov2=FILE"; without one the download, or its cache.
        lpips_weights: torchvision's VGG-16 weights; without them the download, or its cache.
        preset: architecture of an official checkpoint; not given: what the weights' shapes say.
        statistics: a latents_stats.pt, or the number that latents are multiplied by; official checkpoints need it.
        posterior: sample (as the paper) or mode.
        uniformity_points: images that give one latent vector each to the t-SNE; the paper takes 10000. 0: none.
        uniformity_runs: drawings of these vectors to average over; the paper takes 10.
        seed: of the posterior's noise and the latents' positions, with each image's index.
        batch_size: images at once.
        device: auto, cpu or cuda.
        out: folder to write.
    """
    data.validate()
    require(posterior in ("sample", "mode"), "posterior", posterior, "sample or mode")
    require(batch_size > 0, "batch_size", batch_size, "a positive number")
    require(uniformity_points == 0 or uniformity_points > 90, "uniformity_points", uniformity_points, "more than 90, or 0 for none")
    require(uniformity_runs > 0, "uniformity_runs", uniformity_runs, "a positive number")
    rank, ranks = world()
    with process_group(pick_device(device)) as device:
        decoder = load_tokenizer(tokenizer, preset=preset, statistics=statistics, device=device)
        pictures = open_pictures(data.path, image_size=data.image_size, channels=decoder.image_channels, num_images=data.num_images,
                                 workers=data.workers)
        names = ("digits" if data.path is None else "inception") if extractors == "auto" else extractors
        networks, rows = load_extractors(names, weights, device, "rfid")
        small = pictures.size[0] < LPIPS_LEAST and lpips_weights is None
        perceptual, no_lpips = (None, f"images below {LPIPS_LEAST} pixels are no matter for it") if small else _load_perceptual(
            lpips_weights, device)
        quality = Reconstructions(networks, perceptual, no_lpips, show=_evenly(range(len(pictures))[rank::ranks], 12))
        latents = Latents(decoder, points=_evenly(range(len(pictures)), uniformity_points), runs=uniformity_runs, seed=seed)
        for images, indices in pictures.batches(batch_size, rank, ranks, progress=rank == 0):
            images = images.to(device)
            with torch.no_grad():
                q = decoder.encode(to_pixels(images))
                raw = q.mode() if posterior == "mode" else q.mean + q.std * _noise(q.mean, indices, seed)
                quality.update(images, decoder.decode_uint8(decoder.normalise(raw)), indices)
            latents.update(raw, q.std, indices)
        rows += quality.rows()
        latent_rows, channels = latents.rows()
        report = dict(what="tokenizer", metrics=rows + latent_rows, seed=seed, posterior=posterior, images=pictures.provenance,
                      tokenizer=dict(path=tokenizer, sha256=decoder.sha256, provenance=decoder.provenance), latent_channels=channels,
                      extractors=_described(networks))
        if rank == 0:
            finish(report, out, device)
            save_png(reconstruction_picture(*quality.shown()), Path(out) / "reconstructions.png")
            print(f"picture  {Path(out) / 'reconstructions.png'}")
    return 0


def evaluate_samples(
    images: str | None = None,
    reference: str = "digits",
    extractors: str = "auto",
    weights: str = "",
    image_size: int | None = None,
    num_images: int | None = None,
    cache: str | None = None,
    workers: int = 4,
    batch_size: int = 64,
    device: str = "auto",
    checkpoint: str | None = None,
    config: str | None = None,
    tokenizer: str | None = None,
    out: str = "runs/evaluation",
) -> int:
    """Measures generated images against a reference: FID, sFID, Inception score, KID, precision and recall, by the ADM protocol.

    Prints a table; writes OUT/evaluation.json. Every number that cannot be had says why.

    Args:
        images: a folder of images, with or without class folders, a .tar or .zip, or an .npz with arr_0 uint8 (n, H, W, C).
        reference: the same; or ADM's reference file, an .npz with mu, sigma, mu_s, sigma_s and arr_0; or "digits". Features of images are
            computed once and cached.
        extractors: inception, dinov2, timm:MODEL, digits, a file of a small encoder, separated by commas. auto: digits for that reference,
            else inception.
        weights: files of their weights, "inception=FILE,dinov2=FILE"; without one the download, or its cache.
        image_size: side in pixels that both are center-cropped to; None: that of the first generated image.
        num_images: use so many of the generated images, evenly spaced (of an .npz the first); None: all. With --checkpoint: draw so many.
        cache: folder of reference statistics; None: $XDG_CACHE_HOME/lightningdit or ~/.cache/lightningdit.
        workers: decoding threads.
        batch_size: images at once.
        device: auto, cpu or cuda.
        checkpoint: instead of images, a run or one of its checkpoints, whose EMA weights draw --num-images images as its configuration
            says: those of `lightningdit sample` with seeds from 0 on, kept in no file. Official weights need --config and --tokenizer too.
        config: with --checkpoint: a recipe, where it is not a run.
        tokenizer: with --checkpoint: a tokenizer file or "digits", where it is not a run.
        out: folder to write.
    """
    require(batch_size > 0, "batch_size", batch_size, "a positive number")
    require((images is None) != (checkpoint is None), "images", images, "files of generated images, or else --checkpoint")
    require(checkpoint is None or (num_images or 0) > 1, "num_images", num_images, "at least 2, with --checkpoint")
    require(checkpoint is None or image_size is None, "image_size", image_size, "None with --checkpoint: its images have a size")
    rank, ranks = world()
    with process_group(pick_device(device)) as device:
        channels = 1 if reference == "digits" else 3
        if checkpoint is None:
            samples = open_pictures(images, image_size=image_size, channels=channels, num_images=num_images, workers=workers)
        else:
            samples = drawn_pictures(checkpoint, num_images, device, config, tokenizer)
        names = ("digits" if reference == "digits" else "inception") if extractors == "auto" else extractors
        networks, rows = load_extractors(names, weights, device, "fid")
        references = []
        for network in networks:
            real = load_reference(reference, network, image_size=samples.size[0], cache=cache, workers=workers, batch_size=batch_size,
                                  rank=rank, world=ranks)
            collected = collect(samples.batches(batch_size, rank, ranks, progress=rank == 0), network)
            rows += compare(collected, real, network, device)
            references.append(real.provenance)
        report = dict(what="samples", metrics=rows, images=samples.provenance, references=references, extractors=_described(networks))
        if rank == 0:
            finish(report, out, device)
    return 0


# Images.


class Pictures:
    """Images to evaluate, all of one size. Attributes: size (H, W), provenance (JSON values); len; batches(...)."""

    def __init__(self, length, size, provenance, make_batches):
        self.length, self.size, self.make_batches = length, size, make_batches
        self.provenance = provenance | dict(images=length, size=list(size))

    def __len__(self):
        return self.length

    def batches(self, batch_size, rank=0, world=1, progress=False):
        """Yields (images uint8 (B, H, W, C), indices int64 (B,)): every world-th image from `rank` on."""
        bar = progress_bar(total=len(range(rank, len(self), world)), desc="images", unit="image", disable=not progress, mininterval=1)
        with bar:
            for images, indices in self.make_batches(batch_size, rank, world):
                yield images, indices
                bar.update(len(images))


def open_pictures(path, *, image_size=None, channels=3, num_images=None, workers=4):
    """Pictures of the digits (path None or "digits"), an .npz with arr_0, a folder of images, or whatever images.open_images takes.

    Args:
        image_size: side after the ADM center crop; None: that of the first image, which must be square. An .npz is taken as it is.
        num_images: evenly spaced ones (of an .npz the first).
    """
    if path is None or path == "digits":
        pixels = digits()[0]
        pixels = pixels[_evenly(range(len(pixels)), num_images or len(pixels))]
        return Pictures(len(pixels), (8, 8), dict(path="scikit-learn digits", fingerprint="scikit-learn digits", transform="none"),
                        lambda batch_size, rank, world: ((pixels[i], i) for i in torch.arange(rank, len(pixels), world).split(batch_size)))
    if str(path).endswith(".npz"):
        shape, crc = _npz_header(path)
        require(image_size in (None, shape[1]) and shape[1] == shape[2], "images", f"{path} of {shape[1]}x{shape[2]} pixels",
                f"square images{f' of {image_size} pixels' if image_size else ''}")
        length = min(num_images or shape[0], shape[0])
        return Pictures(length, shape[1:3], dict(path=str(path), fingerprint=crc, transform="none"),
                        lambda batch_size, rank, world: _npz_batches(path, length, batch_size, rank, world))
    source = _FlatFolder(path) if _is_flat(path) else open_images(path)
    if image_size is None:
        with optional("the size of an image file"):
            from PIL import Image

        with Image.open(io.BytesIO(source.read(0))) as first:
            require(first.width == first.height, "image_size", None, f"a number: the first image, {source.names[0]}, is "
                    f"{first.width}x{first.height} pixels, not square")
            image_size = first.width
    if num_images is not None and num_images < len(source):
        source = _Subset(source, _evenly(range(len(source)), num_images))

    def batches(batch_size, rank, world):
        decoder = ImageBatches(source, batch_size, image_size=image_size, channels=channels, rank=rank, world=world, workers=workers)
        return ((images, indices) for images, _, indices in decoder.epoch())

    about = dict(path=str(path), fingerprint=source.fingerprint, transform=f"ADM center crop to {image_size}")
    return Pictures(len(source), (image_size, image_size), about, batches)


def drawn_pictures(checkpoint, num_images, device, recipe=None, tokenizer=None):
    """Pictures that a run's EMA weights draw when they are asked for: image i of seed i, the classes in turn; see trained.load_run."""
    config, model, decoder, _ = load_run(checkpoint, recipe, tokenizer, device)
    settings, num_classes = config.sampling_arguments(), config.data.num_classes

    def batches(batch_size, rank, world):
        for indices in torch.arange(rank, num_images, world).split(batch_size):
            with torch.autocast(device.type, torch.bfloat16, enabled=config.use_bf16(device)):
                yield sample_images(model, decoder, labels=indices % num_classes, seeds=indices.tolist(), device=device,
                                    **settings | dict(batch_size=min(batch_size, num_images))), indices

    size = (config.data.image_size,) * 2
    drawn = dict(path=str(checkpoint), fingerprint=state_sha256(model.state_dict()), transform="none", tokenizer=decoder.sha256,
                 sampling=settings, bf16=config.use_bf16(device))
    return Pictures(num_images, size, drawn, batches)


class _FlatFolder(ImageSource):
    """Images directly in a folder, as samplers write them."""

    def __init__(self, path):
        self.files = _flat_files(path)
        stamps = [f"{file.name} {stat.st_size} {stat.st_mtime_ns}" for file in self.files for stat in [file.stat()]]
        super().__init__(path, [file.name for file in self.files], [0] * len(self.files), ["images"], stamps)

    def read(self, index):
        return self.files[index].read_bytes()


def _flat_files(path):
    return sorted(file for file in Path(path).iterdir() if file.suffix.lower() in EXTENSIONS and not file.name.startswith("."))


def _is_flat(path):
    return Path(path).is_dir() and bool(_flat_files(path))


class _Subset(ImageSource):
    def __init__(self, source, chosen):
        self.source, self.chosen = source, chosen
        names = [source.names[i] for i in chosen]
        super().__init__(source.path, names, source.labels[chosen], source.classes, [source.fingerprint, *names])

    def read(self, index):
        return self.source.read(self.chosen[index])


def _evenly(indices, count):
    """`count` of the indices (or all), evenly spaced, the first among them: of class folders, as many of each class as can be."""
    n = len(indices)
    return [indices[i * n // count] for i in range(count)] if count < n else list(indices)


@contextlib.contextmanager
def _npz_array(path):
    """Opens arr_0 of an .npz for reading in order, without loading or unpickling it: (file, shape, CRC of the member)."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
            version = np.lib.format.read_magic(file)
            read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, fortran, dtype = read_header(file)
            if dtype != np.uint8 or len(shape) != 4 or shape[3] not in (1, 3) or fortran or not shape[0]:
                raise ValueError(f"images: {path} holds arr_0 of {dtype} and shape {shape}, expected uint8 (n, H, W, 1 or 3) in C order")
            yield file, shape, f"crc32 {archive.getinfo('arr_0.npy').CRC:08x}, {archive.getinfo('arr_0.npy').file_size} bytes"
    except (zipfile.BadZipFile, KeyError, EOFError) as error:
        raise ValueError(f"images: {path} is no .npz file with arr_0 ({error})") from None


def _npz_header(path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"images: no file {path}")
    with _npz_array(path) as (_, shape, crc):
        return shape, crc


def _npz_batches(path, length, batch_size, rank, world):
    """Images rank, rank + world, ... of the first `length`, read block by block: a file of 50,000 is larger than it must be in memory."""
    with _npz_array(path) as (file, shape, _):
        size, start = int(np.prod(shape[1:])), 0
        while start < length:
            count = min(batch_size * world, length - start)
            data = file.read(count * size)
            if len(data) < count * size:
                raise ValueError(f"images: {path} ends within image {start + len(data) // size} of {shape[0]}")
            images = torch.from_numpy(np.frombuffer(data, np.uint8).reshape(count, *shape[1:]).copy())
            indices = torch.arange(start, start + count)
            mine = indices % world == rank
            if mine.any():
                yield images[mine], indices[mine]
            start += count


# Features and references.


class Collector:
    """Streams images through an extractor and keeps what the metrics need of their features.

    Args:
        keep: pooled features to keep, evenly spaced over `total` images; None: all, and the logits too; 0: none.
    """

    def __init__(self, extractor, keep=None, total=None):
        self.extractor, self.statistics, self.kept, self.logits = extractor, {}, [], []
        self.keep, self.total = keep, total

    def update(self, images, indices):
        """Adds images uint8 (B, H, W, C), whose indices (B,) int64 order them among those of all processes."""
        features = self.extractor(images)
        for name in features.keys() - {"logits"}:
            values = features[name]
            self.statistics.setdefault(name, FeatureStatistics(values.shape[1], values.device)).update(values)
        if self.keep is None and "logits" in features:
            self.logits.append((features["logits"].cpu(), indices))
        if self.keep != 0:
            kept = torch.ones(len(indices), dtype=torch.bool)
            if self.keep is not None and self.keep < self.total:  # where the place among the kept ones moves on
                kept = indices * self.keep // self.total != (indices - 1) * self.keep // self.total
            self.kept.append((features["pool"].cpu()[kept], indices[kept]))

    def result(self):
        """What all processes collected. Raises: ValueError without images."""
        sizes = {name: (len(values.mean), str(values.mean.device)) for name, values in self.statistics.items()}
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            everyone = [None] * dist.get_world_size()
            dist.all_gather_object(everyone, sizes)
            if not all(everyone):
                raise ValueError(f"images: got none in {sum(not s for s in everyone)} of {len(everyone)} processes; use fewer processes")
        elif not sizes:
            raise ValueError("images: got none")
        statistics = {name: self.statistics[name].all_reduce() for name in sorted(self.statistics)}
        features, logits = (metrics.gather_rows(*map(torch.cat, zip(*parts, strict=True))) if parts else None
                            for parts in (self.kept, self.logits))
        return Collected(statistics, features, logits, statistics["pool"].count)


@dataclasses.dataclass
class Collected:
    """statistics: FeatureStatistics by name. features: (n, D) fp32 kept ones, or None. logits: (n, K), or None. count: images seen."""

    statistics: dict
    features: torch.Tensor | None
    logits: torch.Tensor | None
    count: int

    def reference(self, provenance):
        moments = {name: (s.mean.cpu(), s.covariance.cpu()) for name, s in self.statistics.items()}
        return Reference(moments, self.features, provenance)


@dataclasses.dataclass
class Reference:
    """moments: (mean (D,), covariance (D, D)) by name, float64. features: (m, D) fp32 for KID, precision and recall, or None."""

    moments: dict
    features: torch.Tensor | None
    provenance: dict


def collect(batches, extractor, keep=None, total=None):
    """Collector over (images, indices) batches."""
    collector = Collector(extractor, keep, total)
    for images, indices in batches:
        collector.update(images, indices)
    return collector.result()


def load_reference(path, extractor, *, image_size=None, cache=None, workers=4, batch_size=64, rank=0, world=1):
    """The Reference of a path for an extractor: ADM's .npz as published, anything else computed once and cached.

    Args:
        path, image_size: as open_pictures takes them. cache: folder; the file's name is a hash of data, transform, and extractor with its
            weights, so that nothing stale is ever read.
    """
    moments = _adm_moments(path, extractor) if str(path).endswith(".npz") else None
    has_images = moments is None or _npz_has_images(path)
    if not has_images:
        return Reference(moments, None, dict(path=str(path), statistics="as published", features="none: the file has no arr_0"))
    pictures = open_pictures(path, image_size=None if moments else image_size, channels=extractor.channels, workers=workers)
    provenance = pictures.provenance | dict(extractor=extractor.name, extractor_sha256=extractor.sha256, kept=min(KEPT, len(pictures)))
    folder = Path(cache) if cache else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightningdit"
    key = {name: value for name, value in provenance.items() if name != "path"}
    file = folder / f"reference_{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.safetensors"
    if file.is_file():
        reference = _read_reference(file)
    else:
        collected = collect(pictures.batches(batch_size, rank, world, progress=rank == 0), extractor, keep=KEPT, total=len(pictures))
        reference = collected.reference(provenance)
        if rank == 0:
            _write_reference(reference, file)
    if moments:
        reference = Reference(moments, reference.features, reference.provenance | dict(statistics="as published"))
    return reference


def _adm_moments(path, extractor):
    """{"pool": (mean, covariance), "spatial": ...} of ADM's file, or None where it has images only."""
    try:
        with np.load(path, allow_pickle=False) as file:
            if "mu" not in file:
                return None
            moments = {name: tuple(torch.from_numpy(np.asarray(file[key], np.float64)) for key in keys)
                       for name, keys in ADM.items() if keys[0] in file and keys[1] in file}
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"reference: {path} is no .npz file of plain arrays ({error})") from None
    if not extractor.name.startswith("inception"):
        raise ValueError(f"reference: {path} holds statistics of Inception features, expected images for the extractor {extractor.name}")
    return moments


def _npz_has_images(path):
    with zipfile.ZipFile(path) as archive:
        return "arr_0.npy" in archive.namelist()


def _write_reference(reference, file):
    tensors = {f"{kind}.{name}": value for name, pair in reference.moments.items()
               for kind, value in zip(("mean", "covariance"), pair, strict=True)}
    save_weights(file, tensors | dict(features=reference.features), metadata={"provenance": json.dumps(reference.provenance)})


def _read_reference(file):
    try:
        with safe_open(file, "pt") as stored:
            provenance = json.loads(stored.metadata()["provenance"])
            tensors = {key: stored.get_tensor(key) for key in stored.keys()}
        names = {key.partition(".")[2] for key in tensors if "." in key}
        moments = {name: (tensors[f"mean.{name}"], tensors[f"covariance.{name}"]) for name in names}
        return Reference(moments, tensors["features"], provenance | dict(cached=str(file)))
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"reference: the cached {file} is damaged ({error}); delete it to compute it anew") from None


def load_extractors(names, weights, device, metric):
    """(those that are here, a row that says why for each that is not)."""
    files = {}
    for item in filter(None, weights.split(",")):
        name, equals, file = item.partition("=")
        require(name and equals and file, "weights", item, "NAME=FILE")
        files[name.strip()] = file.strip()
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    require(set(files) <= set(wanted), "weights", ", ".join(sorted(set(files) - set(wanted))), f"names among the extractors: {names}")
    found, rows = [], []
    for name in wanted:
        try:
            found.append(load_extractor(name, files.get(name), device))
        except Unavailable as error:
            rows.append(unavailable(metric if name == "inception" else f"{metric.replace('fid', 'fd')}_{name}", str(error)))
    return found, rows


# Numbers.


def row(metric, value, images, how):
    return dict(metric=metric, value=value, images=images, how=how)


def unavailable(metric, why):
    return dict(metric=metric, value=None, unavailable=why)


def _suffix(extractor):
    """Only the original Inception features make an FID: other numbers say whose they are."""
    return "" if extractor.name == "inception" else f"_{extractor.name}"


def frechet_row(metric, collected, reference, name, extractor):
    if extractor.name != "inception":
        metric = metric.replace("fid", "fd")
    mean, covariance = reference.moments[name]
    ours = collected.statistics[name]
    value = metrics.frechet_distance(ours.mean.cpu(), ours.covariance.cpu(), mean, covariance)
    how = f"Frechet distance of {len(mean)} {extractor.name} features"
    return row(metric, value, collected.count, how + (f"; too large below {UNBIASED:,} images" if collected.count < UNBIASED else ""))


def compare(collected, reference, extractor, device="cpu"):
    """The rows of generated images against a reference: FID, sFID, IS, KID, precision, recall, each with its value or why there is none."""
    suffix, n = _suffix(extractor), collected.count
    rows = []
    for metric, name in (("fid", "pool"), ("sfid", "spatial")):
        if name in collected.statistics and name in reference.moments:
            rows.append(frechet_row(metric + suffix, collected, reference, name, extractor))
        elif name in collected.statistics:
            rows.append(unavailable(metric + suffix, f"the reference has no {name} statistics"))
    if collected.logits is not None:
        value = metrics.inception_score(collected.logits.double().softmax(1))
        rows.append(row(f"is{suffix}", value, n, f"by {extractor.name}'s {collected.logits.shape[1]} classes, splits of 5,000"))
    if reference.features is None:
        why = "the reference has statistics only, no images"
        return rows + [unavailable(metric + suffix, why) for metric in ("kid", "precision", "recall")]
    ours, real = collected.features.to(device), reference.features.to(device)
    m = len(real)
    size = min(1000, n, m)
    if size < 4:
        return rows + [unavailable(metric + suffix, f"only {size} images") for metric in ("kid", "precision", "recall")]
    mean, deviation = metrics.kernel_distance(ours, real, subset_size=size)
    rows.append(row(f"kid{suffix}", mean, n, f"+- {deviation:.2g} over 100 subsets of {size}, of {m} reference images"))
    for metric, value in zip(("precision", "recall"), metrics.precision_recall(ours, real), strict=True):
        rows.append(row(metric + suffix, value, n, f"k = 3, {m} reference images"))
    return rows


# Reconstructions and latents.


class Reconstructions:
    """Streams pairs of original and reconstruction; `rows` merges and judges them.

    Args:
        perceptual: LPIPS, or None and why_not. show: indices of the images of the picture.
    """

    def __init__(self, networks, perceptual, why_not, show):
        self.networks, self.perceptual, self.why_not, self.show = networks, perceptual, why_not, set(show)
        self.collectors = [(Collector(network, keep=0), Collector(network, keep=0)) for network in networks]
        self.values, self.indices, self.pairs = dict(psnr=[], ssim=[], lpips=[]), [], []

    def update(self, images, made, indices):
        for pair in self.collectors:
            for collector, batch in zip(pair, (images, made), strict=True):
                collector.update(batch, indices)
        self.size = tuple(images.shape[1:3])
        self.values["psnr"].append(metrics.psnr(images, made).cpu())
        if min(self.size) >= 11:
            self.values["ssim"].append(metrics.ssim(images, made).cpu())
        if self.perceptual is not None:
            self.values["lpips"].append(self.perceptual(to_pixels(images), to_pixels(made)).flatten().double().cpu())
        self.indices.append(indices)
        self.pairs += [(images[j].cpu(), made[j].cpu()) for j, index in enumerate(indices.tolist()) if index in self.show]

    def shown(self):
        """The chosen originals and reconstructions, uint8 (n, H, W, C) each."""
        return [torch.stack(side) for side in zip(*self.pairs, strict=True)]

    def rows(self):
        rows, indices = [], torch.cat(self.indices)
        for network, (originals, made) in zip(self.networks, self.collectors, strict=True):
            rows.append(frechet_row("rfid" + _suffix(network), made.result(), originals.result().reference({}), "pool", network))
        missing = dict(ssim=f"images of {self.size[0]}x{self.size[1]} pixels are smaller than its window of 11x11", lpips=self.why_not)
        how = dict(psnr="dB, mean over images, uint8", ssim="Gaussian window of 11, sigma 1.5, uint8", lpips="VGG-16, version 0.1, uint8")
        for name, parts in self.values.items():
            if parts:
                values = metrics.gather_rows(torch.cat(parts), indices)
                rows.append(row(name, float(values.mean()), len(values), how[name]))
            else:
                rows.append(unavailable(name, missing[name]))
        return rows


class Latents:
    """Streams raw latents (B, z, h, w): channel statistics of all positions, and `runs` vectors of each image in `points`."""

    def __init__(self, decoder, points, runs, seed):
        self.decoder, self.points, self.runs, self.seed = decoder, set(points), runs, seed
        self.statistics = FeatureStatistics(decoder.latent_channels, decoder.latent_mean.device)
        self.spread, self.vectors, self.indices, self.chosen = [], [], [], []

    def update(self, raw, std, indices):
        self.statistics.update(raw.permute(0, 2, 3, 1).flatten(0, 2))
        self.spread.append((std / self.decoder.latent_std).mean((2, 3)).double().cpu())
        normalised = self.decoder.normalise(raw).flatten(2)
        for j, index in enumerate(indices.tolist()):
            if index in self.points:
                positions = torch.randint(normalised.shape[2], (self.runs,), generator=generator_for(self.seed, "position", index))
                self.vectors.append(normalised[j, :, positions].T.cpu())  # (runs, z)
                self.chosen.append(index)
        self.indices.append(indices)

    def rows(self):
        """(rows of the table, {"mean", "std", "posterior_std": a value a channel})."""
        z, statistics = self.decoder.latent_channels, self.statistics.all_reduce()
        spread = metrics.gather_rows(torch.cat(self.spread), torch.cat(self.indices))
        vectors = torch.stack(self.vectors) if self.vectors else torch.zeros(0, self.runs, z)
        vectors = metrics.gather_rows(vectors, torch.tensor(self.chosen, dtype=torch.int64))
        stored_mean, stored_std = (values.flatten().double().cpu() for values in (self.decoder.latent_mean, self.decoder.latent_std))
        mean, std = statistics.mean.cpu(), statistics.covariance.diagonal().sqrt().cpu()
        n, how = len(spread), f"of {z} channels, normalised, {statistics.count:,} positions"
        shift = float(((mean - stored_mean) / stored_std).abs().max())
        rows = [row("latent_mean", shift, n, f"largest magnitude {how}; 0 where it was made"),
                row("latent_std_min", float((std / stored_std).min()), n, f"smallest {how}; 1 where it was made"),
                row("latent_std_max", float((std / stored_std).max()), n, f"largest {how}; 1 where it was made"),
                row("posterior_std", float(spread.mean()), n, "posterior's deviation over the latents', mean over channels")]
        names = ("density_cv", "gini", "normalized_entropy")
        if len(vectors) > 90:
            found = [metrics.latent_uniformity(drawing) for drawing in vectors.unbind(1)]
            how = f"density of a t-SNE of {len(vectors):,} latent vectors, {self.runs} drawing{'s' if self.runs > 1 else ''}"
            rows += [row(name, float(np.mean([values[name] for values in found])), len(vectors), how) for name in names]
        else:
            rows += [unavailable(name, f"{len(vectors)} latent vectors, expected more than 90") for name in names]
        return rows, dict(mean=mean.tolist(), std=std.tolist(), posterior_std=spread.mean(0).tolist())


def _noise(mean, indices, seed):
    """Standard normal noise of the shape of `mean`, each image's from its index: the same in any batch and on any process."""
    noise = [torch.randn(mean.shape[1:], generator=generator_for(seed, "posterior", index)) for index in indices.tolist()]
    return torch.stack(noise).to(mean)


LPIPS_LEAST = 16  # pixels: below it VGG-16's last feature map has no position left


def _load_perceptual(weights, device):
    """(LPIPS or None, why there is none)."""
    try:
        return perceptual_loss(weights).to(device), None
    except (ImportError, ValueError) as error:
        if weights is not None:
            raise
        return None, str(error)


def reconstruction_picture(originals, reconstructions):
    """uint8 (n, H, W, C) twice -> a picture (H', W', 3) of three rows: originals, reconstructions, and GAIN times their difference."""
    difference = (originals.int() - reconstructions.int()).abs().mul(GAIN).clamp(max=255).to(torch.uint8)
    return image_grid(torch.cat([originals, reconstructions, difference]), columns=len(originals))


# Reports.


def table(rows):
    """One line a metric: name, value, images, how it was taken; or why there is none."""
    cells = [("metric", "value", "images", "")]
    for item in rows:
        if item["value"] is None:
            cells.append((item["metric"], "", "", f"not available: {item['unavailable']}"))
        else:
            cells.append((item["metric"], f"{item['value']:.5g}", f"{item['images']:,}", item["how"]))
    widths = [max(len(line[i]) for line in cells) for i in range(3)]
    return "\n".join(f"{name:{widths[0]}}  {value:>{widths[1]}}  {count:>{widths[2]}}  {how}".rstrip() for name, value, count, how in cells)


def finish(report, out, device):
    """Prints the table and writes OUT/evaluation.json, with the versions and the device."""
    file = Path(out) / "evaluation.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    report = report | dict(environment=environment(device) | dict(command=sys.argv))
    write_text(file, json.dumps(report, indent=1, allow_nan=False) + "\n")
    print(f"{table(report['metrics'])}\nreport   {file}")


def _described(networks):
    return [dict(name=network.name, sha256=network.sha256) for network in networks]
