"""Packages that only some parts need, imported where they are used.

The kernels, the model, its training step and the benchmarks run with torch, triton, numpy and safetensors alone: nothing imports another
package when a module is loaded. What needs one says so when it is called:

    with optional("the map of a store"):
        from sklearn.decomposition import PCA
"""

import contextlib
import importlib.util
import logging
import sys
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

log = logging.getLogger(__name__)

# Where pip's name differs from the module's.
PIP = {"PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


class MissingPackage(ImportError):
    """A package that is not installed; `name` is its module's. The message names the pip command."""


@contextlib.contextmanager
def optional(feature: str) -> Iterator[None]:
    """Imports inside it are those of packages that `feature` needs.

    Raises: MissingPackage if one is not installed. Every other failure to import, such as that of a damaged package, stays what it is.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        spec = importlib.util.find_spec(package) if package else None
        if not package or (spec and spec.origin):  # it is there, but damaged; "nvidia" alone is a folder of many packages, without origin
            raise
        raise MissingPackage(
            f"{feature} needs `pip install {PIP.get(package, package)}`: {error}", name=package
        ) from error


def pyplot() -> ModuleType:
    """matplotlib.pyplot, set to draw into files.

    Raises: MissingPackage.
    """
    with optional("a plot"):
        import matplotlib

        matplotlib.use("Agg")
        import matplotlib.pyplot
    return matplotlib.pyplot


def progress_bar(iterable: Iterable | None = None, *, disable: bool = False, **options: Any) -> Any:
    """tqdm.tqdm(iterable, **options). One that is disabled needs no tqdm; without it the others show nothing, which is logged once."""
    if not disable:
        try:
            with optional("a progress bar"):
                from tqdm import tqdm
        except MissingPackage as error:
            _log_once(str(error))
        else:
            return tqdm(iterable, **options)
    return NoBar(iterable)


class NoBar:
    """As much of a tqdm bar as is used here; it shows nothing."""

    def __init__(self, iterable: Iterable | None = None):
        self.iterable, self.n = iterable, 0

    def __iter__(self) -> Iterator:
        return iter(self.iterable)

    def __enter__(self) -> "NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def update(self, n: int = 1) -> None:
        self.n += n

    def write(self, text: str, file: Any = None) -> None:
        print(text, file=file or sys.stdout)

    def set_description(self, text: str) -> None:
        pass

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        pass

    def close(self) -> None:
        pass


_logged: set[str] = set()


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        log.warning("%s", text)
