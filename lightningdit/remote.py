"""Latent stores that lie elsewhere: s3://, gs://, http://, webhdfs:// and whatever else fsspec opens, copied once to a folder of the node.

Training reads latents at random, thousands a second, which no object storage serves well; a copy on the node's own disk is memory-mapped
as any store. Every file is compared with the index, and the index with its own checksum.
"""
import fcntl
import hashlib
import tempfile
from pathlib import Path

from . import latents
from .checkpoint import sha256
from .optional import progress_bar


def is_url(path):
    return path is not None and "://" in str(path)


def read_index(url):
    """The checked index.json of the store at `url`. Raises: as fetch_store."""
    files, root = _connect(url)
    with tempfile.TemporaryDirectory() as folder:
        return _index(files, root, url, Path(folder))


def fetch_store(url, cache, progress=True):
    """A whole local copy of the store at `url`. The processes of a node share it: one copies, the others wait; whole files are not copied
    again, whatever ended the process that copied before.

    Args: cache: folder, best on the node's own disk, for all such copies.
    Returns: its path, for latents.LatentStore.
    Raises: ImportError that names the package which the protocol needs; OSError where nothing answers, or there is no store; ValueError
        for a file that does not have the size and SHA-256 that the index says.
    """
    files, root = _connect(url)
    folder = Path(cache) / hashlib.sha256(str(url).encode()).hexdigest()[:16]
    incoming = folder / ".incoming"
    incoming.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # ends with the process, however that ends
        index = _index(files, root, url, incoming)
        if latents.is_store(folder) and latents.read_index(folder) == index:
            return folder
        (folder / "index.json").unlink(missing_ok=True)  # of another store that was at this address
        with progress_bar(total=sum(about["size"] for about in index["shards"]), unit="B", unit_scale=True, desc=f"copying {url}",
                  disable=not progress, dynamic_ncols=True) as bar:
            for about in index["shards"]:
                target = folder / about["file"]
                if not (target.is_file() and sha256(target) == about["sha256"]):
                    partial = incoming / about["file"]
                    _get(files, f"{root}/{about['file']}", partial, url)
                    if partial.stat().st_size != about["size"] or sha256(partial) != about["sha256"]:
                        raise ValueError(f"{url}/{about['file']}: damaged, got {partial.stat().st_size} bytes, expected {about['size']} "
                                         f"with the SHA-256 {about['sha256'][:16]}... of the index")
                    partial.replace(target)
                bar.update(about["size"])
        if index["plan"].get("statistics") == "data":  # the tokenizer with the statistics of these latents
            _get(files, f"{root}/tokenizer.safetensors", incoming / "tokenizer.safetensors", url)
            (incoming / "tokenizer.safetensors").replace(folder / "tokenizer.safetensors")
        (incoming / "index.json").replace(folder / "index.json")  # last: by it the folder is a store
    return folder


def _connect(url):
    import fsspec

    try:
        files, root = fsspec.core.url_to_fs(str(url))
    except ImportError as error:
        raise ImportError(f"{url}: {error}") from None
    return files, root.rstrip("/")


def _index(files, root, url, folder):
    _get(files, f"{root}/index.json", folder / "index.json", url)
    return latents.read_index(folder)


def _get(files, path, target, url):
    try:
        files.get_file(path, str(target))
    except Exception as error:  # every protocol has exceptions of its own
        raise OSError(f"{url}: could not read {path} ({type(error).__name__}: {error})") from None
