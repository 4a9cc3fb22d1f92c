"""Images: where they lie (folders, tar and zip files) and how they become uint8 tensors (B, H, W, C) with labels, by Pillow or DALI.

    source = open_images("train-{00..04}.tar")
    for images, labels, indices in ImageBatches(source, 64, image_size=256, crop="random", flip=True, shuffle=True).epoch(3):
        pixels = to_pixels(images)  # (64, 3, 256, 256) in [-1, 1]

Everything an image file can be (grayscale, palette, alpha, CMYK, 16 bit, rotated by EXIF) becomes `channels` channels of uint8, cropped
to a square. What cannot be read is named, counted and skipped; more than MAX_BAD_FRACTION of it stops the pass. Archives are never
unpacked: an index of byte ranges is made once, and the names in it are labels, not paths.
"""

import contextlib
import glob
import hashlib
import importlib.util
import io
import itertools
import json
import logging
import os
import re
import struct
import threading
import uuid
import zipfile
import zlib
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from . import images_dali
from .distributed import generator_for, seed_for, world
from .optional import optional, progress_bar

log = logging.getLogger(__name__)

EXTENSIONS = frozenset(".bmp .gif .jpeg .jpg .pgm .png .ppm .tif .tiff .webp".split())  # compared in lower case
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")  # what Pillow may try: others (EPS) start foreign programs
MAX_PIXELS = 89_478_485  # of one image, Pillow's own limit: a quarter of a GiB as RGB
MAX_CLASSES = 1_000_000
MAX_JSON = 2**30  # bytes; a small zip can claim any size
MAX_BAD_FRACTION = 0.01
SHOWN = 10  # bad files listed in a report
MODES = {1: "L", 3: "RGB"}  # image channels: Pillow's mode


def digits():
    """The handwritten digits that scikit-learn ships: uint8 images (1797, 8, 8, 1), 0..16 scaled to 0..255, and int64 labels (1797,).

    Source: E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, UCI, 1998.
    """
    with optional("the images of digits"):
        if (package := importlib.util.find_spec("sklearn")) is None:
            raise ModuleNotFoundError("No module named 'sklearn'", name="sklearn")
    # The file that sklearn.datasets.load_digits reads; importing scikit-learn and SciPy for that takes longer than to encode the digits.
    rows = np.loadtxt(Path(package.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz", delimiter=",", dtype=np.int64)
    images = np.rint(rows[:, :-1].reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
    return torch.from_numpy(images)[..., None], torch.from_numpy(rows[:, -1].copy())


class TensorBatches:
    """Images that are in memory already, as one batch, to whoever takes ImageBatches.

    Args:
        images: uint8 (n, H, H, C). labels: int64 (n,). classes: names. name: what they are; it stands in for their fingerprint too.
    """

    def __init__(self, images, labels, classes, name):
        self.batch_size, self.image_size, _, self.channels = images.shape
        self.images, self.crop, self.decoder, self.bad = images, "none", "none", []
        self.source = ImageSource(name, [str(i) for i in range(len(images))], labels, classes, [name])

    def epoch(self, epoch=0, start=0):
        """One pass, in index order."""
        yield self.images[start:], self.source.labels[start:], torch.arange(start, len(self.images))


def open_batches(data, batch_size, channels, device="cpu"):
    """Batches in index order of what an EncodeDataConfig names, center-cropped: of its path, or without one of the digits."""
    if data.path is None:
        return TensorBatches(*digits(), [str(digit) for digit in range(10)], "scikit-learn digits")
    if channels == 1 and world()[0] == 0:
        print(f"note: {data.path} is read as grayscale, which is what the tokenizer was made for")
    return ImageBatches(open_images(data.path), batch_size, image_size=data.image_size, channels=channels, decoder=data.decoder,
                        device=device, workers=data.workers)


def to_pixels(images):
    """uint8 images (B, H, W, C) -> float pixels (B, C, H, W) in [-1, 1]: x / 127.5 - 1."""
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images: got {images.dtype} of shape {tuple(images.shape)}, expected uint8 (B, H, W, C)")
    return images.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous()


# Sources


class ImageSource:
    """Encoded images with labels, read in any order by any number of threads and processes; `open_images` makes one.

    Attributes: path (as given); classes (names); labels (int64 tensor (n,)); names (of the images, unique, sorted or in archive order);
        fingerprint (hex: changes when names, sizes or times of modification do, without reading the images).
    """

    def __init__(self, path, names, labels, classes, stamps):
        self.path, self.names, self.classes = path, names, classes
        self.labels = torch.as_tensor(labels, dtype=torch.int64)
        self.fingerprint = hashlib.sha256("\n".join(stamps).encode("utf-8", "surrogateescape")).hexdigest()

    def __len__(self):
        return len(self.names)

    def __repr__(self):
        return f"{type(self).__name__}({str(self.path)!r}: {len(self)} images, {len(self.classes)} classes)"

    def read(self, index):
        """The bytes of image `index` (0 .. len - 1). Raises: OSError or ValueError for what is not there any more or fails its checksum."""
        raise NotImplementedError


def open_images(path):
    """Finds the images under a path.

    Args:
        path: one of
            a folder with one folder of images a class (classes sorted by name; images may lie deeper inside them);
            a .tar, a folder of them, or a pattern such as "train-{00..04}.tar" or "train-*.tar", taken as one set; inside either WebDataset
            samples (`key.jpg` with `key.cls`, or `key.json` with an integer "label" or "cls") or class folders;
            a .zip with EDM's dataset.json ({"labels": [["path", 3], ...]}, or null: one class) or class folders.
            In archives, folders above the class folders that all images share are left out. Names that start with a dot, and files that are
            no images by name, are left out everywhere.
    Returns: an ImageSource. The members of a tar are indexed in one pass over its headers; the index is kept in a hidden file beside the
        tar (in $XDG_CACHE_HOME/lightningdit where that cannot be written) and made anew when the tar's size or time changes.
    Raises: FileNotFoundError; ValueError naming what is wrong, and the member for a damaged archive.
    Source: WebDataset, github.com/webdataset/webdataset; dataset.json, arXiv:2206.00364 (EDM).
    """
    text = os.fspath(path)
    if not Path(text).exists() and re.search(r"[*?\[{]", text):
        found = [sorted(glob.glob(p)) if re.search(r"[*?\[]", p) else [p] for p in _expand_braces(text)]
        files = [Path(p) for p in itertools.chain(*found)]
        missing = [str(p) for p in files if not p.is_file()]
        if missing or not files:
            raise FileNotFoundError(f"no file {missing[0] if missing else text}")
        return TarImages(text, files)
    path = Path(text)
    if not path.exists():
        raise FileNotFoundError(f"no folder or file {path}")
    if path.is_dir():
        tars = sorted(p for p in path.glob("*.tar") if not p.name.startswith("."))
        folders = [p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith(".")]
        if tars and folders:
            raise ValueError(f"{path} holds both tar files ({tars[0].name}, ...) and folders ({folders[0]}, ...); expected one kind")
        return TarImages(path, tars) if tars else ImageFolder(path)
    if path.suffix.lower() in (".tar", ".zip"):
        return TarImages(path, [path]) if path.suffix.lower() == ".tar" else ZipImages(path)
    hint = "; unpack compressed tars to .tar first, they cannot be read in any order" if re.search(r"\.(tgz|tar\.\w+)$", path.name) else ""
    raise ValueError(f"{path} is a file, expected a folder with one folder of images a class, a .tar or a .zip{hint}")


def _expand_braces(text):
    """"a{0..2}b" -> a0b, a1b, a2b, padded as written; "a{x,y}" -> ax, ay."""
    match = re.search(r"\{([^{}]*)\}", text)
    if not match:
        return [text]
    inner = match[1]
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inner):
        first, last = int(span[1]), int(span[2])
        if not 0 <= last - first < MAX_CLASSES:
            raise ValueError(f"path: got {{{inner}}}, expected an ascending range")
        choices = [str(i).zfill(len(span[1])) for i in range(first, last + 1)]
    else:
        choices = inner.split(",")
    return [tail for choice in choices for tail in _expand_braces(text[: match.start()] + choice + text[match.end():])]


class ImageFolder(ImageSource):
    """A folder with one folder of images a class; names are sorted within a class.

    Raises: FileNotFoundError for a missing folder; ValueError for a file in its place, no class folders, classes without images (named).
    """

    def __init__(self, path):
        path = Path(path)
        if not path.exists():
            raise FileNotFoundError(f"no folder {path}")
        if not path.is_dir():
            raise ValueError(f"{path} is a file, expected a folder with one folder of images a class")
        classes = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        if not classes:
            raise ValueError(f"{path} holds no class folders, expected one folder of images a class")
        names, labels, stamps, empty = [], [], [], []
        with progress_bar(desc=f"listing {path.name}", unit="image", delay=1) as bar:
            for label, name in enumerate(classes):
                found = sorted(_walk(path / name, name), key=lambda one: one[0].split("/"))
                if not found:
                    empty.append(name)
                names += [name for name, _ in found]
                stamps += [stamp for _, stamp in found]
                labels += [label] * len(found)
                bar.update(len(found))
        if empty:
            raise ValueError(f"{path}: no images in class {', '.join(empty)}; expected files ending in {' '.join(sorted(EXTENSIONS))}")
        super().__init__(path, names, labels, classes, stamps)

    def read(self, index):
        return (self.path / self.names[index]).read_bytes()


def _walk(folder, name):
    """(name, stamp) of the images in a folder and below; links to folders are not followed, as they may go in circles."""
    with os.scandir(folder) as entries:
        for entry in entries:
            inside = f"{name}/{entry.name}"
            if entry.name.startswith("."):
                continue
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(entry.path, inside)
            elif os.path.splitext(entry.name)[1].lower() in EXTENSIONS and entry.is_file():
                yield inside, _stamp(inside, entry)


class _Files:
    """Reads byte ranges of files from any thread or process: pread shares no position. The first MAX_OPEN files stay open."""

    MAX_OPEN = 256

    def __init__(self, paths):
        self.paths, self.open, self.lock = list(paths), {}, threading.Lock()

    def __getstate__(self):
        return self.paths

    def __setstate__(self, paths):
        self.__init__(paths)

    def read(self, file, offset, size):
        handle = self.open.get(file)
        if handle is None:
            with self.lock:
                if file not in self.open and len(self.open) < self.MAX_OPEN:
                    self.open[file] = open(self.paths[file], "rb", buffering=0)
                handle = self.open.get(file)
        if handle is not None:
            data = os.pread(handle.fileno(), size, offset)
        else:
            with open(self.paths[file], "rb", buffering=0) as handle:
                data = os.pread(handle.fileno(), size, offset)
        if len(data) != size:
            raise OSError(f"{self.paths[file]} ends before byte {offset + size}, expected more: it was cut after it was indexed")
        return data


class TarImages(ImageSource):
    """Images of one or several plain tar files, in the order they lie there; `open_images` says what is accepted.

    With several files, a name starts with the file's.
    """

    def __init__(self, path, files):
        self._files = _Files(files)
        total = sum(file.stat().st_size for file in files)
        with progress_bar(total=total, desc=f"indexing {Path(path).name}", unit="B", unit_scale=True, delay=1) as bar:
            indices = [_tar_index(file, bar) for file in files]
        for column in ("offsets", "sizes", "labels"):
            setattr(self, f"_{column}", np.concatenate([index[column] for index in indices]))
        self._file = np.repeat(np.arange(len(files)), [len(index["sizes"]) for index in indices])
        members = [name for index in indices for name in index["names"]]
        if not members:
            raise ValueError(f"{path}: no images inside; expected members ending in {' '.join(sorted(EXTENSIONS))}")
        known = self._labels >= 0
        if known.all():
            classes, labels = _numbered_classes(path, self._labels), self._labels
        elif known.any():
            first = int(np.flatnonzero(~known)[0])
            raise ValueError(f"{files[self._file[first]]}: {len(known) - known.sum()} of {len(known)} images have no label, "
                             f"{members[first]} first; expected a .cls or .json beside each image or beside none")
        else:
            classes, labels = _class_folders(path, members)
        names = members if len(files) == 1 else [f"{files[f].name}/{name}" for f, name in zip(self._file, members, strict=True)]
        super().__init__(path, names, labels, classes, [_stamp(file.name, file) for file in files])
        del self._labels

    def read(self, index):
        return self._files.read(int(self._file[index]), int(self._offsets[index]), int(self._sizes[index]))


class ZipImages(ImageSource):
    """Images of one zip file, stored or deflated, sorted by name; `open_images` says what is accepted. Reading verifies checksums."""

    def __init__(self, path):
        path = Path(path)
        size, described = path.stat().st_size, None
        try:
            with zipfile.ZipFile(path) as archive:
                everything = [m for m in archive.infolist() if not m.is_dir()]
                if (labels := next((m for m in everything if m.filename == "dataset.json"), None)) is not None:
                    if labels.file_size > MAX_JSON:
                        raise ValueError(f"dataset.json of {labels.file_size} bytes, expected at most {MAX_JSON}")
                    described = json.loads(archive.read(labels))
        except Exception as error:  # a damaged directory makes zipfile raise nearly anything
            raise ValueError(f"{path}: damaged zip file ({type(error).__name__}: {error})") from None
        members = sorted((m for m in everything if _is_image(m.filename)), key=lambda m: m.filename)
        if not members:
            raise ValueError(f"{path}: no images inside; expected members ending in {' '.join(sorted(EXTENSIONS))}")
        _check_unique(path, [m.filename for m in members])
        for m in members:
            if m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) or m.flag_bits & 1:
                raise ValueError(f"{path}: {m.filename} is encrypted or of compression {m.compress_type}, expected stored or deflated")
            if m.header_offset < 0 or m.header_offset + 30 + m.compress_size > size:
                raise ValueError(f"{path}: damaged zip file (member {m.filename} lies beyond its end)")
        self._files = _Files([path])
        self._members = np.array([(m.header_offset, m.compress_size, m.file_size, m.compress_type, m.CRC) for m in members], np.int64)
        names = [m.filename for m in members]
        classes, labels = _class_folders(path, names) if described is None else _described_labels(path, names, described)
        super().__init__(path, names, labels, classes, [_stamp(path.name, path)])

    def read(self, index):
        offset, packed, size, method, crc = (int(v) for v in self._members[index])
        header = self._files.read(0, offset, 30)
        if header[:4] != b"PK\3\4":
            raise ValueError("damaged zip file (no member where the directory says)")
        data = self._files.read(0, offset + 30 + sum(struct.unpack("<HH", header[26:30])), packed)
        if method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)  # no more than it claims
            except zlib.error as error:
                raise ValueError(f"damaged zip file ({error})") from None
        if len(data) != size or zlib.crc32(data) != crc:
            raise ValueError("damaged zip file (checksum)")
        return data


def _stamp(name, file):
    stat = file.stat()
    return f"{name} {stat.st_size} {stat.st_mtime_ns}"


def _is_image(name):
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") and part not in (".", "..") or part == "__MACOSX" for part in parts)
    return not hidden and PurePosixPath(name).suffix.lower() in EXTENSIONS


def _check_unique(path, names):
    if len(set(names)) != len(names):
        name = Counter(names).most_common(1)[0][0]
        raise ValueError(f"{path}: two members are called {name}")


def _numbered_classes(path, labels):
    if max(labels) >= MAX_CLASSES:
        raise ValueError(f"{path}: got label {max(labels)}, expected labels below {MAX_CLASSES}")
    return [str(label) for label in range(int(max(labels)) + 1)]


def _class_folders(path, names):
    """(classes, labels) of members called class/.../image, below the folders that all of them share."""
    parents = [tuple(part for part in PurePosixPath(name).parent.parts if part != ".") for name in names]
    common = os.path.commonprefix(parents)  # of tuples, component by component
    depth = min(len(common), min(map(len, parents)) - 1)
    if depth < 0:
        name = names[min(range(len(names)), key=lambda i: len(parents[i]))]
        raise ValueError(f"{path}: image {name} lies in no class folder and has no label; expected class/image, a .cls or .json beside "
                         "each image (tar), or dataset.json (zip)")
    found = [parent[depth] for parent in parents]
    classes = sorted(set(found))
    number = {name: label for label, name in enumerate(classes)}
    return classes, [number[name] for name in found]


def _described_labels(path, names, described):
    """(classes, labels) by the dataset.json of EDM."""
    pairs = described.get("labels") if isinstance(described, dict) else ()
    if pairs is None:
        log.info("%s: dataset.json has no labels: all images are class 0", path)
        return ["0"], [0] * len(names)
    try:
        labels = {name: label for name, label in pairs}
        good = all(type(label) is int and label >= 0 for label in labels.values()) and labels
    except (TypeError, ValueError):
        good = False
    if not good:
        raise ValueError(f'{path}: dataset.json: expected {{"labels": [["path", 3], ...]}} with labels of 0 and above')
    for name in names:
        if name not in labels:
            raise ValueError(f"{path}: dataset.json has no label for {name}")
    if len(labels) != len(names):
        raise ValueError(f"{path}: dataset.json names {next(iter(labels.keys() - set(names)))}, which is not an image in the file")
    labels = [labels[name] for name in names]
    return _numbered_classes(path, labels), labels


# The index of a tar file

INDEX_FORMAT = "tar index 1"
COLUMNS = ("names", "offsets", "sizes", "labels")


def _tar_index(path, bar):
    """{"names": list, "offsets", "sizes", "labels": int64 (n,)} of the images in a tar, label -1 if unknown; kept from the last time."""
    path, stat = Path(path), Path(path).stat()
    stamp = f"{INDEX_FORMAT} {stat.st_size} {stat.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightningdit"
    beside = path.with_name(f".{path.name}.index")
    elsewhere = cache / f"{hashlib.sha256(str(path.resolve()).encode('utf-8', 'surrogateescape')).hexdigest()[:32]}.index"
    for place in (beside, elsewhere):
        if (index := _load_index(place, stamp)) is not None:
            bar.update(stat.st_size)
            return index
    index = _scan_tar(path, stat.st_size, bar)
    read_only = not path.parent.stat().st_mode & 0o222  # which does not stop root
    names = np.frombuffer("\0".join(index["names"]).encode("utf-8", "surrogateescape"), np.uint8)
    columns = index | dict(names=names)
    contents = save(columns, dict(stamp=stamp, sha256=_digest(columns)))
    for place in (elsewhere,) if read_only else (beside, elsewhere):
        partial = place.with_name(f"{place.name}.{uuid.uuid4().hex}")  # ranks on other machines write there too
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(contents)
            partial.replace(place)
            break
        except OSError as error:
            log.info("%s: cannot keep its index in %s (%s)", path, place, error)
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
    return index


def _load_index(place, stamp):
    """The index kept in a file, or None if there is none, it belongs to other contents, or it is damaged."""
    try:
        if not place.is_file():
            return None
        with safe_open(place, "np") as file:
            if (file.metadata() or {}).get("stamp") != stamp:
                return None
            index = {key: file.get_tensor(key) for key in COLUMNS}
            whole = file.metadata().get("sha256") == _digest(index)
        index["names"] = index["names"].tobytes().decode("utf-8", "surrogateescape").split("\0") if index["names"].size else []
        if whole:
            return index
        log.info("%s: damaged", place)
    except (OSError, SafetensorError) as error:
        log.info("%s: unreadable (%s)", place, error)


def _digest(columns):
    return hashlib.sha256(b"".join(columns[key].tobytes() for key in COLUMNS)).hexdigest()


def _scan_tar(path, size, bar):
    images, labels = [], {}  # (name, offset, size); what .cls and .json say of a sample: its label, or why it has none
    with open(path, "rb", buffering=1 << 16) as file:
        for name, offset, length in _tar_members(path, file, size, bar):
            if _is_image(name):
                images.append((name, offset, length))
            elif (key_kind := _sample(name))[1] in ("cls", "json") and length < 1 << 20:
                file.seek(offset)
                label = _label(key_kind[1], file.read(length))
                if key_kind[1] == "cls" or key_kind[0] not in labels:  # a class file says it better
                    labels[key_kind[0]] = label
    samples = [_sample(name) for name, *_ in images]
    if any(key in labels for key, _ in samples):  # WebDataset: key.seg.png beside key.png is no image of its own
        images = [image for image, (_, kind) in zip(images, samples, strict=True) if f".{kind}" in EXTENSIONS]
        said = [(name, labels.get(_sample(name)[0], -1)) for name, *_ in images]
        wrong = [(name, reason) for name, reason in said if isinstance(reason, str)]
        if wrong:
            raise ValueError(f"{path}: the label of {wrong[0][0]} is {wrong[0][1]}, expected an integer from 0; {len(wrong)} such images")
        numbers = [label for _, label in said]
    else:
        numbers = [-1] * len(images)
    names = [name for name, *_ in images]
    _check_unique(path, names)
    columns = dict(offsets=[o for _, o, _ in images], sizes=[n for *_, n in images], labels=numbers)
    return dict(names=names) | {key: np.array(column, np.int64) for key, column in columns.items()}


def _sample(name):
    """(key, kind) of a WebDataset member: what is before and behind the first dot of its file name."""
    folder, _, file = name.rpartition("/")
    key, _, kind = file.partition(".")
    return f"{folder}/{key}", kind.lower()


def _label(kind, text):
    """An int, or a str that says why there is none."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return f"{text[:40]!r}"
    if kind == "json":
        value = value.get("label", value.get("cls")) if isinstance(value, dict) else value
    return value if type(value) is int and 0 <= value < MAX_CLASSES else f"{str(value)[:40]!r}"


def _tar_members(path, file, size, bar):
    """(name, offset, length) of the regular files in a tar: ustar, GNU long names, pax. Source: POSIX.1-2017, utility pax.

    Python's tarfile takes a damaged header for the end of the archive; here it is an error, as every image must be counted.
    """

    def wrong(what):
        return ValueError(f"{path}: damaged tar file: {what} at byte {position}, {f'behind member {last}' if last else 'at its start'}")

    position, last, name_given, size_given = 0, None, None, None
    while True:
        file.seek(position)
        header = file.read(512)
        if len(header) < 512:
            raise wrong("it ends without an end mark" if not header else "it breaks off")
        if not any(header):
            break
        if _octal(header[148:156]) != sum(header) - sum(header[148:156]) + 8 * 32:
            raise wrong("no valid header")
        kind = header[156:157]
        length = size_given if size_given is not None and kind not in b"xgLK" else _octal(header[124:136])
        if kind in b"123456":  # links, devices and folders have no data, whatever they claim
            length = 0
        if length is None or length < 0 or position + 512 + length > size:
            raise wrong(f"a member of {length} bytes, which is beyond the end,")
        data, start = position + 512, position
        position = data + -(-length // 512) * 512
        bar.update(position - start)
        if kind in b"xgLK":
            if length > 1 << 20:
                raise wrong("a header of more than 1 MiB")
            extra = file.read(length)
            if kind == b"L":
                name_given = extra.rstrip(b"\0")
            elif kind == b"x":
                records = _pax(extra)
                if records is None:
                    raise wrong("an unreadable pax header")
                if any(key.startswith(b"GNU.sparse") for key in records):
                    raise wrong("a sparse file, expected plain ones,")
                name_given = records.get(b"path", name_given)
                if b"size" in records:
                    size_given = int(records[b"size"]) if records[b"size"].isdigit() else -1
            continue
        name = header[:100].split(b"\0")[0]
        if header[257:263] == b"ustar\0" and header[345]:
            name = header[345:500].split(b"\0")[0] + b"/" + name
        last = (name if name_given is None else name_given).decode("utf-8", "surrogateescape").replace("\0", "")
        name_given = size_given = None
        if kind in (b"0", b"\0", b"7") and not last.endswith("/"):
            yield last, data, length
        elif kind in (b"1", b"2", b"S") and _is_image(last):
            raise ValueError(f"{path}: member {last} is a {dict(S='sparse file').get(kind.decode(), 'link')}, expected plain files")
    file.seek(position)
    while block := file.read(1 << 20):
        if any(block):
            raise wrong("more data behind the end mark (joined tar files?)")
    bar.update(size - position)


def _octal(field):
    """A number of a tar header, octal or base 256; None if it is neither."""
    if field[0] in (0x80, 0xFF):
        return int.from_bytes(field[1:], "big") if field[0] == 0x80 else -1
    digits_ = field.strip(b" \0")
    return int(digits_, 8) if re.fullmatch(rb"[0-7]+", digits_) else 0 if not digits_ else None


def _pax(data):
    """{key: value} of the records "length key=value\\n", or None."""
    records, at = {}, 0
    while at < len(data) and data[at]:
        match = re.compile(rb"(\d{1,7}) ([^=]+)=").match(data, at)
        end = at + int(match[1]) if match else 0
        if not match or end > len(data) or end <= match.end() or data[end - 1 : end] != b"\n":
            return None
        records[match[2]] = data[match.end() : end - 1]
        at = end
    return records


# From bytes to pixels


def center_crop(image, size):
    """The ADM center crop of a Pillow image to size x size.

    Halves it by box filter while the shorter side is at least 2 * size, resizes that side to `size` by bicubic filter, cuts the middle out.
    Bit-exact with the official code, whose FID depends on it. Source: ADM, arXiv:2105.05233.
    """
    with optional("an image file"):
        from PIL import Image

    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def decode_image(data, size, channels=3, place=None, flip=False):
    """Decodes the bytes of an image file by Pillow to uint8 (size, size, channels). Alpha is dropped, 16 bit scaled to 8.

    Args:
        place: None for the ADM center crop; (u, v) for the crop at `images_dali.window`, resized by bicubic filter with antialiasing.
        flip: mirror it left to right.
    Raises: whatever Pillow raises for a bad file; ValueError for an empty or a huge one, and for pixels without a fixed range.
    """
    if not data:
        raise ValueError("empty file")
    with optional("an image file"):
        from PIL import Image, ImageChops, ImageOps, UnidentifiedImageError

    try:
        opened = Image.open(io.BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:  # its words hold an address in memory, another one each time, and latent stores keep reasons
        raise ValueError(f"cannot identify the format, expected {', '.join(FORMATS)}") from None
    with opened as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS} in all")
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
            image = ImageChops.invert(image)  # Pillow takes every CMYK JPEG for one of Adobe's, whose ink is inverted
        image = _convert(image, MODES[channels])
    short, long = sorted(image.size)
    if place is not None:
        image = image.resize((size, size), Image.Resampling.BICUBIC, box=images_dali.window(*image.size, size, place))
    elif long / short * size * size > MAX_PIXELS:
        raise ValueError(f"{image.width} x {image.height} pixels become more than {MAX_PIXELS} when the shorter side is made {size}")
    else:
        image = center_crop(image, size)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(image).reshape(size, size, channels)


def _convert(image, mode):
    if image.mode.startswith("I"):  # 16-bit grayscale, which convert() would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError(f"mode {image.mode} with values {values.min()}..{values.max()}, expected 16 bit")
        with optional("an image file"):
            from PIL import Image

        image = Image.fromarray((values >> 8).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("mode F (floating point) has no fixed range")
    elif image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)


# Batches


class ImageBatches:
    """Decoded batches of a source: cropped, flipped, shuffled, shared out among ranks, from any position on.

    The crop window of an image and whether it is flipped depend on (seed, epoch, index) only, the order of images on (seed, epoch) only.
    Place p of an epoch's order belongs to rank p % world; batch b of a rank holds places b * batch_size onwards of its share.

    Args:
        source: from `open_images`. batch_size: of this rank.
        image_size: side in pixels. channels: 1 or 3.
        crop: "center", ADM's, on which FID and latents depend; "random": the shorter side resized to image_size, then a random square.
        flip: mirror half of the images. shuffle: a new order each epoch; else by index.
        drop_last: full batches only, and equally many on every rank (training). Otherwise every image comes exactly once over the ranks.
        decoder: "pillow" in threads (exact); "dali", which decodes JPEG, other files fall to Pillow and are counted in `fallbacks`; "auto":
            dali where it is installed, but Pillow for crop="center", because DALI's resizing is not bit for bit that of published FIDs.
        device: where the images end up; with "cuda", DALI decodes there. workers: threads.
        progress: show a bar.
    Attributes: decoder ("dali" or "pillow"); bad ([(name, reason)] of the latest pass); fallbacks (Counter of why Pillow stepped in).
    """

    def __init__(self, source, batch_size, *, image_size, channels=3, crop="center", flip=False, shuffle=False, seed=0, rank=0, world=1,
                 decoder="auto", device="cpu", workers=4, drop_last=False, progress=False):
        for name, value in dict(batch_size=batch_size, image_size=image_size, workers=workers, world=world).items():
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected a positive number")
        for name, value, choices in (("channels", channels, tuple(MODES)), ("crop", crop, ("center", "random")),
                                     ("decoder", decoder, ("auto", "dali", "pillow"))):
            if value not in choices:
                raise ValueError(f"{name}: got {value!r}, expected one of {choices}")
        if not 0 <= rank < world:
            raise ValueError(f"rank: got {rank}, expected 0..{world - 1}")
        if drop_last and len(source) // world < batch_size:
            raise ValueError(f"batch_size: got {batch_size}, expected at most {len(source) // world}, the images of a rank, with drop_last")
        self.source, self.batch_size, self.image_size, self.channels, self.crop = source, batch_size, image_size, channels, crop
        self.flip, self.shuffle, self.seed, self.rank, self.world = flip, shuffle, seed, rank, world
        self.device, self.workers, self.drop_last, self.progress = torch.device(device), workers, drop_last, progress
        self.bad, self.fallbacks = [], Counter()
        with optional("decoding images"):  # here: later it would be taken for a fault of each image
            import PIL.Image  # noqa: F401
        self.decoder, why = _choose_decoder(decoder, crop)
        log.info("%s: decoded by %s (%s)", source.path, self.decoder, why)

    @property
    def share(self):
        """Images of this rank in an epoch."""
        if self.drop_last:
            return len(self.source) // self.world // self.batch_size * self.batch_size
        return len(range(self.rank, len(self.source), self.world))

    def __len__(self):
        """Batches of this rank in an epoch."""
        return -(-self.share // self.batch_size)

    def order(self, epoch=0):
        """Indices (share,) of this rank's images, in the order of that epoch."""
        n = len(self.source)
        order = torch.randperm(n, generator=generator_for(self.seed, "image order", epoch)) if self.shuffle else torch.arange(n)
        return order[self.rank :: self.world][: self.share].clone()

    def draws(self, epoch, indices):
        """What the images `indices` (n,) get in that epoch: (u, v) (n, 2) in [0, 1), the place of the crop, and flip (n,) bool."""
        # SplitMix64 hashes a counter: each image's numbers are at hand without those of the others. Source: doi:10.1145/2660193.2660195.
        key = np.uint64(seed_for(self.seed, "crop and flip", epoch))
        x = key + (3 * np.asarray(indices, np.uint64)[:, None] + np.arange(1, 4, dtype=np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        uniform = ((x ^ (x >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
        return uniform[:, :2], (uniform[:, 2] < 0.5) & self.flip

    def epoch(self, epoch=0, start=0):
        """One pass.

        Args:
            start: images of this rank's share that were consumed before, skipped ones included: batches * batch_size.
        Yields: (images uint8 (B, H, W, C) on the device, labels int64 (B,), indices int64 (B,) on the CPU). An image that cannot be read is
            left out of its batch (which is then smaller, or absent); with drop_last the next readable one of the order takes its place.
        Raises: ValueError as soon as more than 1 % of the share is bad; it lists the first ones.
        """
        if not 0 <= start <= self.share:
            raise ValueError(f"start: got {start}, expected 0..{self.share}, the images of this rank")
        return self._epoch(epoch, start)

    def _epoch(self, epoch, start):
        self.bad, self.fallbacks = [], Counter()
        order = self.order(epoch)
        chunks = order[start:].split(self.batch_size) if start < len(order) else ()
        jobs = ((chunk, *self.draws(epoch, chunk)) for chunk in chunks)
        decode = self._pillow if self.decoder == "pillow" else self._dali
        name = Path(self.source.path).name
        with progress_bar(total=len(order), initial=start, desc=f"reading {name}", unit="image", disable=not self.progress) as bar:
            for position, (indices, images, failures) in zip(itertools.count(start, self.batch_size), decode(jobs), strict=False):
                for slot, reason in sorted(failures.items()):
                    self._note(int(indices[slot]), reason, len(order))
                bar.update(len(indices))
                if failures and self.drop_last:
                    indices = indices.clone()
                    for slot in failures:
                        indices[slot], image = self._replacement(epoch, order, position + slot)
                        images[slot] = image.to(images.device)
                elif failures:
                    kept = torch.tensor([slot for slot in range(len(indices)) if slot not in failures], dtype=torch.int64)
                    indices, images = indices[kept], images[kept.to(images.device)]
                if len(indices):
                    yield images, self.source.labels[indices], indices
        if self.bad:
            log.warning("%s: skipped %d of %d images that cannot be read:\n%s", self.source.path, len(self.bad), len(order), self._report())
        if self.fallbacks:
            log.info("%s: %d images decoded by Pillow instead of DALI: %s", self.source.path, self.fallbacks.total(),
                     ", ".join(f"{reason} {count}" for reason, count in self.fallbacks.most_common()))

    def _note(self, index, reason, share):
        self.bad.append((self.source.names[index], reason))
        if len(self.bad) > MAX_BAD_FRACTION * share:
            raise ValueError(f"{self.source.path}: more than {MAX_BAD_FRACTION:.0%} of {share} images cannot be read:\n{self._report()}")

    def _report(self):
        lines = [f"  {name}: {reason}" for name, reason in self.bad[:SHOWN]]
        return "\n".join(lines + ([f"  and {len(self.bad) - SHOWN} more"] if len(self.bad) > SHOWN else []))

    def _replacement(self, epoch, order, position):
        """(index, image) of the first readable image behind a bad place of the order; the order has one, or `_note` would have stopped."""
        for step in range(1, len(order)):
            index = order[(position + step) % len(order)]
            place, flip = self.draws(epoch, index[None])
            image = torch.empty(self.image_size, self.image_size, self.channels, dtype=torch.uint8)
            if self._decode_into(image.numpy(), int(index), place[0], flip[0]) is None:
                return index, image
        raise ValueError(f"{self.source.path}: no readable image")

    def _decode_into(self, out, index, place, flip, data=None):
        """Decodes one image by Pillow into out (H, W, C). Returns None, or why it cannot be decoded."""
        try:
            data = self.source.read(index) if data is None else data
            out[:] = decode_image(data, self.image_size, self.channels, place if self.crop == "random" else None, flip)
        except Exception as error:  # a damaged file can make a decoder raise nearly anything
            return f"{type(error).__name__}: {error}"

    def _empty(self, count):
        return torch.empty(count, self.image_size, self.image_size, self.channels, dtype=torch.uint8, pin_memory=self.device.type == "cuda")

    def _pillow(self, jobs):
        """(indices, images, {slot: reason}) of each job, decoded ahead in threads: Pillow releases the interpreter lock in its C code."""
        pool = ThreadPoolExecutor(self.workers, thread_name_prefix="decode")
        ahead, depth = deque(), 1 + -(-2 * self.workers // self.batch_size)  # batches in work: the threads must not wait for the consumer

        def submit(indices, places, flips):
            out = self._empty(len(indices))
            ahead.append((indices, out, [pool.submit(self._decode_into, *one) for one in zip(out.numpy(), indices.tolist(), places, flips,
                                                                                             strict=True)]))

        def finish():
            indices, out, futures = ahead.popleft()
            reasons = {slot: reason for slot, future in enumerate(futures) if (reason := future.result()) is not None}
            return indices, out.to(self.device, non_blocking=True), reasons

        try:
            for job in jobs:
                submit(*job)
                if len(ahead) > depth:
                    yield finish()
            while ahead:
                yield finish()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _dali(self, jobs):
        decoder = images_dali.DaliDecoder(
            jobs, self.batch_size, self.image_size, self.channels, self.crop == "center", self.source.read, self._decode_into, self.workers,
            self.device, MAX_PIXELS)
        self.fallbacks = decoder.fallbacks
        return decoder


def _choose_decoder(decoder, crop):
    """("dali" or "pillow", why)."""
    if decoder == "pillow" or (decoder == "auto" and crop == "center"):
        return "pillow", "as asked" if decoder == "pillow" else "exact, for the center crop"
    if reason := images_dali.unavailable():
        if decoder == "dali":
            raise ImportError(f"decoder: got 'dali', which cannot be imported ({reason}); pip install nvidia-dali-cuda130")
        return "pillow", f"DALI cannot be imported: {reason}"
    return "dali", "as asked" if decoder == "dali" else "it is installed"
