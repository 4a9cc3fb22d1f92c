"""Runs a command that wants a Hopper GPU on a machine without one: everything but the arithmetic.

    PYTHONPATH=tests python -m rehearsal.stand_in [--card h200] [--trace FILE] -- COMMAND ...
    ... -- python bench/gpu.py --out OUT --stage step_xl_256_ladder

stand_in.c is compiled into a library that stands for libcuda, libcudart, cuBLAS, cuSOLVER and
cuDNN's convolutions, and LD_PRELOAD puts it before them. PyTorch then sees one GPU of compute
capability 9.0 and is otherwise itself: allocator, streams, events, CUDA graphs, autograd,
torch.compile, Triton's compiler, binder and launchers. Needs Linux, a CUDA build of PyTorch, gcc
and nm.

It finds errors of Python and of arguments, tensors on the wrong device, kernels that do not compile
as they are launched, too much shared memory, grids over the limits, memory that does not fit, calls
that a CUDA graph forbids, waits of the host, and the launches of a step in their order:

- Memory is that of one card for all processes of a command. What a process holds is free again when
  it ends, in whatever way. Only bytes are counted: no context (0.5 GB a process on a card), no
  fragments between allocations, no local memory of kernels.
- A capture refuses cudaMalloc, cudaFree, the loading of a module, waits of the host, launches on the
  legacy stream if it is of a blocking stream (PyTorch's are not), a wait for an event from outside
  of it or of another capture, a second begin, an end in another thread, and one that leaves work of
  a side stream not joined to the stream on which it began. It then gives no graph. Its mode says
  which threads it forbids the unsafe calls. A side stream without work need not be joined; external
  events order no streams. Who uses the memory of a graph is not checked.

It cannot find wrong numbers, races (a wait that is missing, memory that another stream still reads),
hangs or slowness:

- What is read back is zero, a single byte 1, so that .all() holds, and more than 64 KiB what the
  host had copied there, or zeros. A comparison of two CUDA results passes; a test that wants a value
  fails, which says nothing.
- Times are invented: 5 us a kernel, matrix products at 600 TFLOP/s. No cache of autotuned choices
  may survive, so the caches of the compilers are new ones; --cache keeps them for other rehearsals.
- cuDNN's attention is absent, and its convolutions take 1 MiB of workspace. NVML, NCCL, cuFFT,
  cuSPARSE, nvJPEG, the profiler's view of the GPU and whatever brings its own CUDA runtime, as DALI
  does, are absent.

--trace FILE: every process writes FILE.<process id>, one line a launch: run or captured, kind, and
for a kernel its grid, block, bytes of shared memory and name.
"""

import argparse
import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("stand_in.c")
# PyTorch's libraries, whose undefined symbols say what the stand-in must have.
LIBRARIES = ("torch_cuda", "c10_cuda", "torch_python", "torch_cuda_linalg", "torch_cpu")
CUDNN_REAL = r"Get(?:Version|Error|LastError|Property|Cudart)"  # these load without a driver
STANDS_FOR = re.compile(
    rf"cuda[A-Z]|__cuda|cu[A-Z](?!ile)|cublas|cusolver|cupti|cudnn(?!{CUDNN_REAL})"
)


@dataclass(frozen=True)
class Card:
    """A GPU to stand for: its name, and the memory that PyTorch finds on it."""

    name: str
    memory_gib: float


CARDS = {
    "h100": Card("stand-in for an NVIDIA H100 80GB HBM3", 79.2),
    "h200": Card("stand-in for an NVIDIA H200", 139.8),
}


def unavailable() -> str:
    """Why no command can be rehearsed here, or ""."""
    torch = importlib.util.find_spec("torch")
    if sys.platform != "linux":
        return "a rehearsal needs Linux"
    if torch is None or not (_folder("torch") / "lib" / "libtorch_cuda.so").is_file():
        return "a rehearsal needs a CUDA build of PyTorch (pip install torch, on Linux)"
    if importlib.util.find_spec("triton") is None:
        return "a rehearsal needs triton (pip install triton)"
    for tool in ("gcc", "nm"):
        if not any(os.access(Path(folder) / tool, os.X_OK) for folder in os.get_exec_path()):
            return f"a rehearsal needs {tool}"
    if not _cuda_headers():
        return "a rehearsal needs driver_types.h (pip install nvidia-cuda-runtime, torch's version)"
    return ""


def _folder(package: str) -> Path:
    return Path(importlib.util.find_spec(package).submodule_search_locations[0])


def _cuda_headers() -> list[Path]:
    """Folders of the headers of torch's own CUDA: structures differ from release to release."""
    folders = (_folder("torch").parent / "nvidia").glob("*/include")
    return [folder for folder in folders if (folder / "driver_types.h").is_file()]


def _symbols(library: Path, *options: str) -> set[str]:
    command = ["nm", *options, str(library)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return set(re.findall(r" [A-Za-z] (\w+)", listing))


def build(folder: Path) -> Path:
    """Compiles the stand-in into `folder` and returns the library's path.

    Raises: RuntimeError where unavailable() has a reason; CalledProcessError if gcc fails.
    """
    if reason := unavailable():
        raise RuntimeError(reason)
    torch, triton = _folder("torch"), _folder("triton")
    nvidia = triton / "backends" / "nvidia"
    headers = [*_cuda_headers(), nvidia / "include"]  # the last for crt/host_defines.h alone
    compiled, rest, library = folder / "stand_in.o", folder / "rest.c", folder / "libcuda.so.1"
    includes = [f"-I{path}" for path in headers]
    compiler = ["gcc", "-O1", "-fPIC", "-Wall", "-Wno-unused-parameter"]
    subprocess.run([*compiler, "-c", "-o", str(compiled), str(SOURCE), *includes], check=True)
    wanted = set(re.findall(r"\bcu[A-Z]\w+", (nvidia / "driver.c").read_text(encoding="utf-8")))
    for name in LIBRARIES:
        undefined = _symbols(torch / "lib" / f"lib{name}.so", "-D", "--undefined-only")
        wanted |= {symbol for symbol in undefined if STANDS_FOR.match(symbol)}
    missing = sorted((wanted | {"cuInit"}) - _symbols(compiled, "--defined-only"))
    rest.write_text("".join(f"int {name}(void) {{ return 0; }}\n" for name in missing))
    link = ["-shared", "-Wl,-soname,libcuda.so.1", "-ldl", "-lpthread"]
    subprocess.run([*compiler, "-o", str(library), str(compiled), str(rest), *link], check=True)
    return library


@contextlib.contextmanager
def environment(
    card: Card, cache: Path | None = None, trace: Path | None = None
) -> Iterator[dict[str, str]]:
    """The environment variables under which processes share `card`, while the context lasts.

    Args:
        cache: keeps what Triton and Inductor compile, for other rehearsals only.
        trace: the launches of process N are written to `trace`.N.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        library = build(folder)
        kept = (cache or folder / "cache").resolve()
        libraries = os.environ.get("LD_LIBRARY_PATH")
        variables = {
            "LD_PRELOAD": str(library),
            "LD_LIBRARY_PATH": f"{folder}:{libraries}" if libraries else str(folder),
            "TRITON_LIBCUDA_PATH": str(folder),
            "TRITON_CACHE_DIR": str(kept / "triton"),
            "TORCHINDUCTOR_CACHE_DIR": str(kept / "inductor"),
            "XDG_CACHE_HOME": str(kept),
            "TORCH_CUDNN_V8_API_DISABLED": "1",
            "TORCH_CUDNN_SDPA_DEPRIORITIZED": "1",
            "STAND_IN_GIB": str(card.memory_gib),
            "STAND_IN_NAME": card.name,
            "STAND_IN_MEMORY": str(folder / "memory"),
        }
        if trace is not None:
            variables["STAND_IN_TRACE"] = str(trace.resolve())
        yield os.environ | variables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--card", choices=tuple(CARDS), default="h100")
    parser.add_argument("--memory-gib", type=float, help="in place of the card's")
    parser.add_argument("--trace", type=Path, help="where to write launches, one file a process")
    parser.add_argument("--cache", type=Path, help="keeps what is compiled, for other rehearsals")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="after --")
    options = parser.parse_args()
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        parser.error("no command: expected -- COMMAND ...")
    if options.memory_gib is not None and not options.memory_gib > 0:
        parser.error(f"--memory-gib is {options.memory_gib}, expected a positive number")
    if reason := unavailable():
        parser.error(reason)
    card = CARDS[options.card]
    card = Card(card.name, options.memory_gib or card.memory_gib)
    with environment(card, options.cache, options.trace) as variables:
        return subprocess.run(command, env=variables, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
