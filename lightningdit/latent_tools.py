"""What `lightningdit latents` does with a store: check it, draw it, and exchange it with the official format.

The official format is a folder of safetensors files of 10,000 images: `latents` and `latents_flip` (k, C, h, w), one sample of the
posterior of each image and of its mirror image, and `labels` (k,); and latents_stats.pt, {"mean", "std"} (1, C, 1, 1) of the unflipped
latents.

n images, k images of a file, C latent channels, h, w latent positions.
"""
import types
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from .checkpoint import save_weights
from .distributed import generator_for
from .images import MAX_CLASSES
from .latents import DTYPES, LatentStore, Writer, channel_sums, combine, digest, draw, make_plan, normalisation_of, renormalise, spans
from .optional import optional, progress_bar, pyplot
from .tokenizer.formats import read_statistics
from .tokenizer.vavae import Tokenizer

OFFICIAL_SHARD = 10_000  # images
STATISTICS = "latents_stats.pt"


def verify(store: str, /) -> int:
    """Reads a store whole, compares every shard with its checksum, and says what is in it.

    Args:
        store: folder of the store.
    """
    print(f"{LatentStore(store).verify(progress=True).describe()}\nverified          every shard is what was written")
    return 0


def export(store: str, /, out: str, seed: int = 0, statistics: Literal["data", "tokenizer"] = "data") -> int:
    """Writes a store in the official format: one sample of each posterior, the same for the same seed.

    Without mirror images in the store, latents_flip holds a second sample of the unflipped posterior.

    Args:
        store: folder of the store.
        out: folder to write, empty or absent.
        seed: of the samples.
        statistics: what latents_stats.pt holds: those of the "data", the samples written, or of the "tokenizer" that the store goes with.
    """
    opened, out = LatentStore(store), Path(out)
    if statistics == "tokenizer" and opened.index["normalisation"]["mean"] is None:
        raise ValueError(f"statistics: got 'tokenizer', but {store} does not say which tokenizer made it")
    if out.is_dir() and any(out.iterdir()):
        raise ValueError(f"out: {out} is not empty")
    sums = []
    for number, (start, stop) in enumerate(progress_bar(spans(len(opened), OFFICIAL_SHARD), unit="shard")):
        indices, tensors = torch.arange(start, stop), dict(labels=opened.labels[start:stop].clone())
        for name, view in (("latents", 0), ("latents_flip", opened.views - 1)):
            noise = torch.randn(stop - start, *opened.shape, generator=generator_for(seed, name, number))
            tensors[name] = draw(opened.gather(indices, view), noise)
        sums.append(channel_sums(tensors["latents"], parts=1))
        save_weights(out / f"latents_rank00_shard{number:03d}.safetensors", tensors, metadata={"total_size": str(stop - start)})
    found = combine(sums, len(opened) * opened.shape[1] * opened.shape[2]) if statistics == "data" else opened.index["normalisation"]
    torch.save({name: torch.tensor(found[name]).view(1, -1, 1, 1) for name in ("mean", "std")}, out / STATISTICS)
    print(f"{len(opened)} images in {number + 1} files and {STATISTICS} in {out}")
    return 0


def import_official(
    folder: str, /, out: str, tokenizer: str | None = None, dtype: Literal["fp32", "bf16"] = "fp32"
) -> int:
    """Makes a store of latents in the official format. They are samples, so every epoch sees the same.

    Args:
        folder: official .safetensors files, and latents_stats.pt; without it the statistics are taken of the latents.
        out: folder of the store; a call that was killed goes on.
        tokenizer: the tokenizer that made them, "digits" or a file; with these statistics it is saved in the store. Without it the store
            cannot be trained on.
        dtype: of the stored latents.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no .safetensors files in {folder}")
    shapes, labels = zip(*(_official_header(file) for file in files), strict=True)
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError(f"{folder}: files of different shapes, {sorted({shape[1:] for shape in shapes})}")
    ends = np.cumsum([shape[0] for shape in shapes]).tolist()
    source = types.SimpleNamespace(classes=[str(c) for c in range(int(max(part.max() for part in labels)) + 1)],
                                   fingerprint=digest([[file.name, (stat := file.stat()).st_size, stat.st_mtime_ns] for file in files]))
    made_by = Tokenizer.load(tokenizer) if tokenizer is not None else None
    _, views, *shape = shapes[0]
    if made_by is not None and made_by.latent_channels != shape[0]:
        raise ValueError(f"tokenizer: got one of {made_by.latent_channels} latent channels, expected {shape[0]}, as the latents have")
    statistics = _official_statistics(Path(folder) / STATISTICS, shape[0])
    plan = make_plan(source, ends[-1], shape=shape, views=views, parts=1, dtype=dtype, shards=list(zip([0, *ends], ends, strict=False)),
                     tokenizer=made_by and made_by.sha256, statistics=statistics or "data", imported=True)
    writer = Writer(out, plan)
    for number in progress_bar(writer.missing, unit="shard", desc="importing"):
        with safe_open(files[number], "pt") as file:
            latents = torch.stack([file.get_tensor(name) for name in ("latents", "latents_flip")[:views]], dim=1)
            writer.write(number, latents.to(DTYPES[dtype]), labels[number], torch.arange(*plan["shards"][number]))
    if not writer.complete:
        statistics = statistics or {name: writer.statistics()[name] for name in ("mean", "std")}
        made_by = made_by and renormalise(made_by, statistics, out)
        writer.finish(normalisation_of(made_by) if made_by else dict(tokenizer=None, **statistics))
    print(LatentStore(out).describe())
    return 0


def _official_header(file):
    """((k, views, C, h, w), labels (k,)) of an official file, checked."""
    try:
        with safe_open(file, "pt") as opened:
            names = [name for name in ("latents", "latents_flip") if name in opened.keys()]
            shapes = [tuple(opened.get_slice(name).get_shape()) for name in names]
            labels = opened.get_tensor("labels").long()
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a whole official file of latents: {error}") from None
    expected = (len(labels), *shapes[0][1:]) if shapes else None
    if names[:1] != ["latents"] or len(shapes[0]) != 4 or labels.ndim != 1 or any(shape != expected for shape in shapes):
        raise ValueError(f"{file}: got {dict(zip(names, shapes, strict=True))} and labels {tuple(labels.shape)}, expected latents "
                         "(k, C, h, w), optionally latents_flip of that shape, and labels (k,)")
    if not len(labels) or not 0 <= labels.min() <= labels.max() < MAX_CLASSES:
        found = f"labels {labels.min()} to {labels.max()}" if len(labels) else "no images"
        raise ValueError(f"{file}: got {found}, expected some, with labels from 0 to below {MAX_CLASSES}")
    return (len(labels), len(names), *shapes[0][1:]), labels


def _official_statistics(file, channels):
    """{"mean", "std"} of latents_stats.pt as lists of C numbers; None where there is none."""
    if not file.is_file():
        return None
    mean, std = (values.double() for values in read_statistics(file))
    if len(mean) != channels or len(std) != channels or not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise ValueError(f"{file}: got mean {mean.tolist()}, std {std.tolist()}, "
                         f"expected {channels} finite numbers each, deviations above 0")
    return dict(mean=mean.tolist(), std=std.tolist())


def draw_map(store: str, /, out: str = "map.png", num: int = 1000, classes: int = 10, seed: int = 0) -> int:
    """Draws where the latents of each class lie: their first two principal components, and t-SNE.

    Args:
        store: folder of the store.
        out: PNG file.
        num: images, about equally many of each class.
        classes: how many classes, spread evenly over all.
        seed: of the choice of images and of t-SNE.
    """
    opened = LatentStore(store)
    labels, points, agreement = class_map(opened, num, classes, seed)
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(11, 5))
    shown = labels.unique().tolist()
    colours = plt.get_cmap("tab10" if len(shown) <= 10 else "nipy_spectral")(np.linspace(0, 1, max(10, len(shown))))
    for axis, (name, xy) in zip(axes, points.items(), strict=True):
        for colour, label in zip(colours, shown, strict=False):
            axis.scatter(*xy[labels == label].T, s=7, color=colour, label=opened.classes[label][:24])
        axis.set(title=name, xticks=[], yticks=[])
    if len(shown) <= 20:
        axes[1].legend(loc="center left", bbox_to_anchor=(1, 0.5), markerscale=2.5, frameon=False)
    figure.suptitle(f"{len(labels)} latents of {len(shown)} classes; {agreement:.0%} of their 10 nearest neighbours are of the same class")
    figure.tight_layout()
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=110)
    plt.close(figure)
    print(f"map of {len(labels)} latents in {out}; {agreement:.1%} of their 10 nearest neighbours are of the same class "
          f"({1 / len(shown):.1%} by chance)")
    return 0


def class_map(store, num=1000, classes=10, seed=0):
    """Latents of a store in two dimensions.

    Args:
        store: LatentStore. num: images. classes: how many, spread over all. seed: of the choice and of t-SNE.
    Returns:
        labels (m,) int64; {"principal components": (m, 2), "t-SNE": (m, 2)}; the fraction of each latent's 10 nearest neighbours, by
        distance among the first 50 principal components, that are of its class.
    """
    with optional("a map of latents"):
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE
        from sklearn.neighbors import NearestNeighbors

    if num < 20 or classes < 1 or len(store) < 20:
        raise ValueError(f"num, classes: got {num} and {classes} of {len(store)} images, expected at least 20 images and 1 class")
    generator = generator_for(seed, "map")
    present = store.labels.unique()
    present = present[torch.linspace(0, len(present) - 1, min(classes, len(present))).round().long()]
    chosen = []
    for label in present:
        places = (store.labels == label).nonzero()[:, 0]
        chosen.append(places[torch.randperm(len(places), generator=generator)[: max(1, num // len(present))]])
    chosen = torch.cat(chosen).sort().values
    moments = store.gather(chosen)
    means = draw(moments, torch.zeros(len(chosen), *store.shape))
    mean, std = (torch.tensor(store.index["statistics"][name]).view(-1, 1, 1) for name in ("mean", "std"))
    x = ((means - mean) / std.clamp(min=1e-12)).flatten(1).numpy()
    x = PCA(min(50, *x.shape), svd_solver="randomized", random_state=seed).fit_transform(x)
    neighbours = NearestNeighbors(n_neighbors=min(11, len(x))).fit(x).kneighbors(return_distance=True)[1][:, 1:]
    labels = store.labels[chosen]
    agreement = (labels[torch.from_numpy(neighbours)] == labels[:, None]).double().mean().item()
    tsne = TSNE(2, init="pca", perplexity=min(30, (len(x) - 1) / 3), random_state=seed).fit_transform(x)
    return labels, {"principal components": np.pad(x, ((0, 0), (0, 1)))[:, :2], "t-SNE": tsne}, agreement


COMMANDS = {"map": draw_map, "verify": verify, "export": export, "import": import_official}
