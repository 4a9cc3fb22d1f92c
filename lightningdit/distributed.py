"""Processes, devices and the seed rule.

Every random number of a run is a function of (seed, purpose, step): nothing depends on when the run was interrupted. The numbers of
a step are drawn for the whole global batch and each process takes its slice, so they do not depend on the number of processes either.
"""
import contextlib
import hashlib
import os
import shutil

import torch
import torch.distributed as dist


def world():
    """(rank, world_size) of this process, from torchrun's environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def process_group(device):
    """Joins the processes that torchrun started: gloo on CPUs, NCCL on GPUs, one process a device. Nothing to do for a single one.

    Yields: the device of this process, e.g. cuda:3.
    """
    _, size = world()
    if size == 1:
        yield device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def pick_device(name):
    """The torch.device for "auto", "cpu" or "cuda"; ValueError when CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch.cuda.is_available() is False here; expected 'cpu' or 'auto'")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def check_compiler(device):
    """ValueError where torch.compile cannot work for want of a host compiler: Inductor builds C++ on CPUs, Triton a C stub on GPUs."""
    names = (os.environ.get("CXX"), "g++", "clang++") if device.type == "cpu" else (os.environ.get("CC"), "gcc", "clang")
    if not any(name and shutil.which(name) for name in names):
        raise ValueError(f"compile: torch.compile on {device.type} needs a compiler ({' or '.join(names[1:])}), and none is on PATH; "
                         "install one (Debian: apt-get install g++) or run without --compile")


def seed_for(*keys):
    """A 63-bit seed from integers and strings, well mixed: (seed, "train", 7) and (seed, "train", 8) have nothing in common."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*keys, device="cpu"):
    return torch.Generator(device).manual_seed(seed_for(*keys))
