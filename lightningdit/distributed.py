"""Processes, devices and the seed rule.

Every random number of a run is a function of (seed, purpose, step): nothing depends on when the run was interrupted. The numbers of
a step are drawn for the whole global batch and each process takes its slice, so they do not depend on the number of processes either.
"""
import atexit
import contextlib
import gc
import hashlib
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

SAVING = "checkpoint"  # the name of the thread that saves


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
    # torchrun keeps one store for all its attempts; without names of their own, a restart meets the addresses of dead processes and hangs.
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(f"attempt_{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size)
    atexit.register(_let_go)
    try:
        yield device
    finally:
        dist.destroy_process_group()


def _let_go():
    """Lets gloo's threads end before the interpreter does.

    A group that something still refers to, as FSDP's modules do, keeps its threads when it is destroyed, and one that has yet to let go of
    the tensors of its last message aborts the process if it has to do so after the interpreter has begun to end (pytorch issue 190489):
    a run that was done and saved then failed, about one in five on busy cores.

    A thread that still waits for other processes, such as that of a save when this process has failed, would abort it too. They may be
    waiting for this process elsewhere, so it does not wait for them.
    """
    gc.collect()  # a group without references joins its threads
    time.sleep(0.2)  # and those of the others get the interpreter, which they wait for
    others = [thread for thread in threading.enumerate() if thread.daemon and thread.name == SAVING]
    for thread in others:
        thread.join(2)
    if any(thread.is_alive() for thread in others):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


def wait_for_all():
    """Returns when every process has come here."""
    if dist.is_initialized():
        dist.barrier()


@torch.no_grad()
def average_over_ranks(tensors, bucket=2**25):
    """Replaces each tensor of the list by its mean over the processes, in place; the same bits on each. The host does not wait.

    They travel in buckets of about `bucket` elements: few large messages. All must be of one dtype and device.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return tensors
    start = 0
    while start < len(tensors):
        end, elements = start + 1, tensors[start].numel()
        while end < len(tensors) and elements + tensors[end].numel() <= bucket:
            elements += tensors[end].numel()
            end += 1
        part = tensors[start:end]
        flat = torch.cat([tensor.reshape(-1) for tensor in part])
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        pieces = flat.split([tensor.numel() for tensor in part])
        torch._foreach_copy_(part, [piece.view_as(tensor) for piece, tensor in zip(pieces, part, strict=True)])
        start = end
    return tensors


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
REQUEUE = 75  # EX_TEMPFAIL of sysexits.h: what was interrupted from outside wants to be started again
ASK_EVERY = 10  # steps between two exchanges of the processes about it


def exit_code(number):
    """For a run that a signal stopped and whose state is saved: 130 for Ctrl-C, REQUEUE for SIGTERM and SIGUSR1 (preemption)."""
    return 130 if number == signal.SIGINT else REQUEUE


@contextlib.contextmanager
def interruption():
    """Turns the first Ctrl-C, SIGTERM or SIGUSR1 into a flag; a second one stops at once.

    Yields: interrupted(step), to be asked after each step: the signal's number, or 0. With several processes the answer is the same on
        all: they tell each other after every 10th step, on the host (a small gloo message), so that no device is waited for.
    """
    asked, group = [], dist.new_group(backend="gloo") if dist.is_initialized() else None

    def handle(number, frame):
        asked.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else before[number])

    def interrupted(step):
        if group is None:
            return asked[0] if asked else 0
        if step % ASK_EVERY:
            return 0
        flag = torch.tensor(asked[0] if asked else 0)
        dist.all_reduce(flag, dist.ReduceOp.MAX, group=group)
        return int(flag)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield interrupted
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def make_deterministic():
    """Chooses deterministic algorithms everywhere, so that runs on the same hardware and software are bitwise equal. Says what it set."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when the first matrix product is made
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    return (f"deterministic: torch.use_deterministic_algorithms(True), cudnn.benchmark = False, CUBLAS_WORKSPACE_CONFIG = "
            f"{os.environ['CUBLAS_WORKSPACE_CONFIG']}; cuDNN's attention gives way to others")


def pick_device(name):
    """The torch.device for "auto", "cpu" or "cuda"; ValueError when CUDA is asked for and absent."""
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: got 'cuda', but torch.cuda.is_available() is False here; expected 'cpu' or 'auto'")
    return torch.device("cuda" if name == "cuda" or (name == "auto" and torch.cuda.is_available()) else "cpu")


def bf16_units(device):
    """What multiplies bf16 on a device, by name: "CUDA", "AMX" or "AVX512-BF16"; "" where bf16 is emulated, and slower than fp32."""
    if device.type == "cuda":
        return "CUDA"
    units = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return "AMX" if units.get("amx_bf16") else "AVX512-BF16" if units.get("avx512_bf16") else ""


def on_every_rank(condition):
    """Whether a condition holds on every process. All of them must call this."""
    if not dist.is_initialized():
        return condition
    holds = torch.tensor(int(condition), device="cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(holds, dist.ReduceOp.MIN)
    return bool(holds)


def check_compiler(device):
    """ValueError where torch.compile cannot work for want of a host compiler: Inductor builds C++ on CPUs, Triton a C stub on GPUs."""
    names = (os.environ.get("CXX"), "g++", "clang++") if device.type == "cpu" else (os.environ.get("CC"), "gcc", "clang")
    if not any(name and shutil.which(name) for name in names):
        raise ValueError(f"compile: torch.compile on {device.type} needs a compiler ({' or '.join(names[1:])}), and none is on PATH; "
                         "install one (Debian: apt-get install g++) or run without --compile")
    if device.type == "cpu":
        trust_vector_units(next(name for name in names if name and shutil.which(name)))


def trust_vector_units(compiler):
    """Spares Inductor the longest of its trials of an x86 processor's vector units, where the compiler knows their options.

    For each unit, up to four, it builds a library with PyTorch's vector headers and starts a process that loads it, before it compiles
    anything. Returns whether it is spared; TORCHINDUCTOR_VEC_ISA_OK has its say before. Inductor's choice among the units stays its own.
    """
    from torch._inductor import config, cpu_vec_isa

    if config.cpp.vec_isa_ok is not None or platform.machine() not in ("x86_64", "AMD64"):
        return False
    options = f"{cpu_vec_isa.VecAVX512._arch_flags} {cpu_vec_isa.VecAVX2._arch_flags}".split()
    command = [compiler, *options, "-x", "c++", "-fsyntax-only", "-"]
    try:
        done = subprocess.run(command, input="#include <immintrin.h>\n", capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return False
    if done.returncode == 0:
        config.cpp.vec_isa_ok = True
    return done.returncode == 0


def seed_for(*keys):
    """A 63-bit seed from integers and strings, well mixed: (seed, "train", 7) and (seed, "train", 8) have nothing in common."""
    digest = hashlib.blake2b(repr(keys).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator_for(*keys, device="cpu"):
    return torch.Generator(device).manual_seed(seed_for(*keys))


PARALLEL = ("auto", "ddp", "fsdp", "hsdp")


def choose_parallel(wanted, training_bytes, device):
    """The mode that "auto" stands for: "none" on one process; "ddp" where a whole copy of the training state fits well; else "fsdp", or
    "hsdp" over several nodes, which keeps the gathering of weights inside a node.

    Args: training_bytes: of weights, gradients, optimizer state and average, without activations.
    """
    size = dist.get_world_size() if dist.is_initialized() else 1
    if size == 1:
        return "none"
    if wanted != "auto":
        return wanted
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else math.inf
    if training_bytes < 0.4 * memory:
        return "ddp"
    return "hsdp" if size > local_world_size() else "fsdp"


def local_world_size():
    """Processes on this node, from torchrun's environment."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def parallelise(model, mode, device, *, bf16=False):
    """Spreads a model with `blocks` over the processes; returns what to call in its place (the model itself, or DDP around it).

    ddp:  every process holds all of it. fsdp: parameters, gradients and what is made from them are sharded over all processes, block by
    block, and gathered when needed. hsdp: sharded inside a node, replicated over the nodes.

    With bf16, a block's weights are gathered in bf16 and their gradients reduced in fp32. What lies outside the blocks stays fp32 (autocast
    casts where it multiplies), and inputs are not cast, so that the residual stream keeps fp32. Gradients are means over the processes.
    Compile blocks before, build the optimizer after.

    Raises: ValueError for an unknown mode, or hsdp with unequal nodes.
    Source: FSDP2, torch.distributed.fsdp.fully_shard.
    """
    if mode == "none":
        return model
    if mode == "ddp":
        arguments = dict(device_ids=[device.index]) if device.type == "cuda" else {}
        # Without find_unused_parameters DDP lays its messages out anew after the first update of each start; sums over more than two
        # processes then round differently, and a resumed run is not bitwise the same (tests/test_train_distributed.py).
        return DistributedDataParallel(model, gradient_as_bucket_view=True, find_unused_parameters=True, **arguments)
    if mode not in PARALLEL[1:]:
        raise ValueError(f"parallel: got {mode!r}, expected one of {', '.join(PARALLEL)}")
    size, local = dist.get_world_size(), local_world_size()
    if mode == "hsdp" and size % local:
        raise ValueError(f"parallel: got 'hsdp' with {size} processes, {local} on this node, expected as many on every node")
    shape, names = ((size // local, local), ("replicate", "shard")) if mode == "hsdp" else ((size,), ("shard",))
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    mesh = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=names)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False) if bf16 else None
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **({} if policy is None else dict(mp_policy=policy)))
    # What lies outside the blocks stays gathered until a backward pass ends. An average has none: it would go on with the weights of its
    # first forward pass, whatever it is updated to since.
    trained = any(parameter.requires_grad for parameter in model.parameters())
    return fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False),
                       reshard_after_forward=None if trained else True)


@contextlib.contextmanager
def gradient_sync(model, wanted):
    """Inside, backward passes reduce gradients over the processes only if wanted: once for each global batch, after its last part."""
    if hasattr(model, "set_requires_gradient_sync"):  # FSDP2
        model.set_requires_gradient_sync(wanted)
        yield
    elif isinstance(model, DistributedDataParallel) and not wanted:
        with model.no_sync():
            yield
    else:
        yield


def is_sharded(tensor):
    """Whether it is a DTensor. Before their module is imported, which takes as long as torch itself, none is."""
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(module, "DTensor", ()))


def whole(tensor):
    """The tensor itself, gathered if it is sharded or a partial sum."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def local(tensor):
    """This process's part of a sharded tensor, or the tensor itself."""
    return tensor.to_local() if is_sharded(tensor) else tensor
