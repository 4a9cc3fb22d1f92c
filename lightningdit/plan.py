"""What a configuration would cost, from shapes alone: parameters, FLOPs, memory, and which micro-batches fit which cards.

    python -m lightningdit.plan > docs/memory.md      # the table of what fits

The activations are those that autograd keeps, to a few percent (a test counts them on CPU); the whole is an estimate, not yet checked
on a GPU.
"""
import dataclasses
import math
import os

import torch
import torch.distributed as dist

from . import images, latents, remote
from .config import ModelConfig
from .distributed import local_world_size, world
from .memory import SPARE, largest_by_trial
from .model import CHECKPOINTING, LightningDiT, SwiGLU, forward_flops

CARDS = (24, 40, 80, 141)  # GB of 1e9 bytes. Cards hold about 6 % more, which is left to the CUDA context, workspaces and fragmentation
# Shards of the training state.
LAYOUTS = {"one process, DDP": 1, "FSDP over 2": 2, "FSDP over 8, HSDP in nodes of 8": 8, "FSDP over 64": 64}
MOMENTS = {"fp32": 8, "8bit": 2 * (1 + 4 / 256), "cpu": 0}  # bytes a trainable parameter of AdamW's state, on the device
OFFLOADED = 16  # bytes a trainable parameter on the host with the state on the CPU: weights, gradients, two moments
SPARE_SHARE = 0.05  # of a card, that a trial leaves free for fragmentation, which grows with what is allocated; but SPARE at least


def activation_bytes(model, bytes_per_value, checkpointing=None):
    """Estimated most bytes that one image takes in a forward and backward pass: `bytes_per_value` an activation, fp32 for the residual
    (or `bytes_per_value`, with bf16_residual).

    A token of a block keeps the residual twice, norm1, 3 of qkv, attention, proj, norm2, MLP in, MLP hidden and MLP out, and some
    fp32 statistics; an image the modulation. With checkpointing some of it for all blocks, and the rest for the one that is recomputed.

    Args: checkpointing: "none", "selective" or "full" instead of the model's own.
    """
    return sum(_activations(model, bytes_per_value, model.checkpointing if checkpointing is None else checkpointing))


def _activations(model, bytes_per_value, checkpointing):
    """Bytes of an image: (kept from the forward pass on, what one block's backward pass recomputes and its gradients)."""
    L, (N, D), b = len(model.blocks), model.pos_embed.shape[1:], bytes_per_value
    block, r = model.blocks[0], b if model.bf16_residual else 4  # r: bytes a value of the residual
    swiglu = isinstance(block.mlp, SwiGLU)
    packed, hidden = (block.mlp.w12.out_features, block.mlp.w3.in_features) if swiglu else 2 * (block.mlp.fc1.out_features,)
    modulation = b * (block.adaLN_modulation[1].out_features + D)
    statistics = 4 * (block.attn.num_heads + 2)  # of the softmax, of the two norms
    whole = N * (2 * r * D + b * (8 * D + packed + hidden) + statistics) + modulation
    entrance = N * D * (r + b) + modulation  # residual and branch
    products = N * (b * (5 * D + packed) + 4 * block.attn.num_heads) + modulation  # qkv, attention, proj, MLP in; the branch is MLP out
    kept = {"none": whole, "selective": entrance + products - modulation, "full": entrance}[checkpointing]
    ends = N * D * (r + b) + N * b * model.final_layer.linear.out_features  # the final norm, the output
    in_flight = N * (D * (r + b) + b * hidden)  # gradients of residual, branch and MLP hidden
    return L * kept + ends, whole - kept + in_flight


def training_memory(model, count, bf16, *, shards=1, checkpointing=None, state="fp32"):
    """Estimated bytes of training with AdamW on one device, by kind, for forward passes of `count` images.

    Args:
        shards: processes over which FSDP spreads weights, gradients, optimizer and average; 1: all of it on each device.
        checkpointing: "none", "selective" or "full" instead of the model's own. state: of the optimizer, see OptimConfig.
    """
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    b = 2 if bf16 else 4
    if shards == 1:
        gathered = {"bf16 copies of weights": 2 * trainable if bf16 else 0}
    else:  # weights and gradients of two blocks (one is computed while the other travels; reduced in fp32), and what is outside the blocks
        block = sum(p.numel() for p in model.blocks[0].parameters())
        gathered = {"gathered weights and gradients": 2 * (2 * b + 4) * block + 4 * (total - len(model.blocks) * block)}
    return {
        "weights": 4 * total / shards,
        "gradients": 4 * trainable / shards,
        f"optimizer (AdamW{'' if state == 'fp32' else f', {state}'})": MOMENTS[state] * trainable / shards,
        "EMA": 4 * total / shards,
        **gathered,
        f"activations of {count} images": count * activation_bytes(model, b, checkpointing),
    }


def largest_micro_batch(model, memory, bf16, **options):
    """Images of one forward pass that fit `memory` bytes by the estimate; 0 where the training state alone does not.

    Args: options: shards, checkpointing, state of training_memory.
    """
    fixed = sum(training_memory(model, 0, bf16, **options).values())
    return max(0, math.floor((memory - fixed) / activation_bytes(model, 2 if bf16 else 4, options.get("checkpointing"))))


def fitting_table(model, bf16=True, state="fp32"):
    """The largest micro-batches with checkpointing none / selective / full, as a Markdown table: a row a card, a column a layout."""
    lines = ["| GB a GPU | " + " | ".join(LAYOUTS) + " |", "| ---: |" + " ---: |" * len(LAYOUTS)]
    for card in CARDS:
        cells = []
        for shards in LAYOUTS.values():
            fits = [largest_micro_batch(model, card * 1e9, bf16, shards=shards, checkpointing=c, state=state) for c in CHECKPOINTING]
            cells.append(" / ".join(str(n) if n else "-" for n in fits))
        lines.append(f"| {card} | {' | '.join(cells)} |")
    return "\n".join(lines)


def choose_micro_batch(model, share, mode, bf16, device, state="fp32"):
    """The largest divisor of `share` images that fits in one forward and backward pass: found by trial on CUDA, by the estimate elsewhere.

    Each process tries alone, so that one that runs out of memory leaves no other waiting for its messages; the smallest answer counts for
    all. To be called with the whole model, before it is compiled (a trial must not fix shapes) and sharded. What training adds to a pass,
    moments and average, is not there yet: as many bytes are taken meanwhile, and SPARE or SPARE_SHARE of the card, whichever is more.

    Args: mode: what choose_parallel said. state: of the optimizer.
    Returns: (images, how it was found).
    Raises: torch.OutOfMemoryError where not even one image fits.
    """
    sizes = [n for n in range(share, 0, -1) if share % n == 0]
    shards = {"fsdp": world()[1], "hsdp": local_world_size()}.get(mode, 1)
    later = training_memory(model, 0, bf16, shards=shards, state=state)
    if device.type == "cuda":
        now = training_memory(model, 0, bf16)  # what a trial itself holds of it
        held = sum(size for name, size in now.items() if name != "EMA" and not name.startswith("optimizer"))
        spare = max(SPARE, SPARE_SHARE * torch.cuda.get_device_properties(device).total_memory)
        taken = int(max(0, sum(later.values()) - held) + spare)
        size = largest_by_trial(sizes, lambda count: _try_pass(model, count, bf16, device, 1 if count == share else 2), device, taken)
        how = "by trial"
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / local_world_size()
        most = (memory - sum(later.values())) / activation_bytes(model, 2 if bf16 else 4)
        size, how = next((n for n in sizes if n <= most), 0), "by the estimate"
    if dist.is_initialized():
        least = torch.tensor(size, device=device)
        dist.all_reduce(least, dist.ReduceOp.MIN)
        size = int(least)
    if not size:
        raise torch.OutOfMemoryError("not even one image fits")
    return size, how


def _try_pass(model, count, bf16, device, passes=1):
    """Forward and backward passes of `count` images; leaves no gradients, whatever happens.

    Args: passes: 2 as where gradients are accumulated, which are all there while the second pass has its activations.
    """
    x = torch.zeros(count, model.in_channels, model.input_size, model.input_size, device=device)
    t, y = torch.full((count,), 0.5, device=device), torch.zeros(count, dtype=torch.int64, device=device)
    training = model.training
    try:
        for _ in range(passes):
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                prediction = model.train()(x, t, y, y.bool())
            prediction.float().square().sum().backward()
            del prediction
    finally:
        model.train(training).zero_grad(set_to_none=True)


def out_of_memory_advice(config):
    """What to change in a configuration that ran out of memory, most harmless first."""
    half = config.micro_batch // 2 if isinstance(config.micro_batch, int) and config.micro_batch > 1 else None
    steps = [f"--micro-batch {half} (same result, smaller passes) or auto"] if half else []
    if config.micro_batch is None:
        steps.append("--micro-batch auto")
    if not config.model.use_checkpoint:
        steps.append("--model.use-checkpoint --model.checkpoint-policy selective")
    if not config.model.use_checkpoint or config.model.checkpoint_policy == "selective":
        steps.append("--model.use-checkpoint --model.checkpoint-policy full")
    if world()[1] > 1 and config.parallel not in ("fsdp", "hsdp"):
        steps.append("--parallel fsdp")
    if config.optim.state == "fp32":
        steps.append("--optim.state cpu (slower steps)")
        if world()[1] == 1:
            steps.append("--optim.state 8bit (a new run)")
    if config.data.resident not in ("none", "ram"):
        steps.append("--data.resident ram")
    return "out of memory; in this order: " + "; ".join([*steps, "a GPU with more memory"]) + ". --dry-run prints what fits which GPU"


def print_plan(config, device):
    """--dry-run: what this configuration would cost, from shapes alone."""
    data = config.data
    if remote.is_url(data.path) or latents.is_store(data.path):
        index = (remote if remote.is_url(data.path) else latents).read_index(data.path)
        counted, classes = index["images"], index["plan"]["classes"]
    else:
        source = images.open_batches(data, 1, 3).source
        counted, classes = len(source), source.classes
    num_images, data.num_classes = data.num_images or counted, data.num_classes or len(classes)
    with torch.device("meta"):
        model = LightningDiT(**config.model_arguments())
    bf16, flops = config.use_bf16(device), forward_flops(model)
    micro = config.micro_batch if isinstance(config.micro_batch, int) else config.batch_size // world()[1]
    memory = training_memory(model, micro, bf16, state=config.optim.state)
    steps = num_images * (1 - data.val_fraction) / config.batch_size
    passes = 5 if config.flow.model_guidance else 3  # a backward pass is two forward ones; guidance is two more, of the average weights
    print(f"parameters        {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    print(f"tokens an image   {model.pos_embed.shape[1]}")
    print(f"FLOPs an image    {flops / 1e9:.2f} G forward, {passes * flops / 1e9:.2f} G in training")
    for name, size in memory.items():
        print(f"memory            {size / 2**30:9.3f} GiB  {name}")
    print(f"memory            {sum(memory.values()) / 2**30:9.3f} GiB  estimated in all on one GPU, {'bf16' if bf16 else 'fp32'}, "
          f"checkpointing {model.checkpointing}")
    if config.optim.state == "cpu":
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        print(f"host memory       {OFFLOADED * trainable / 2**30:9.3f} GiB  weights, gradients and moments for the optimizer, each process "
              "(FSDP: its share)")
    print(f"steps an epoch    {steps:.1f} of {config.batch_size} images; {config.steps} steps are {config.steps / steps:.1f} epochs")
    print("\nLargest micro-batch by the estimate, checkpointing none / selective / full, bf16; not yet checked on a GPU:\n")
    print(fitting_table(model, config.precision != "fp32", config.optim.state))
    return 0


def document():
    """docs/memory.md."""
    parts = ["""# What fits on which GPU

Written by `python -m lightningdit.plan`; `train/dit.py --dry-run` prints the same for any configuration.

The largest number of images in one forward and backward pass of one process (`--micro-batch`): 256 pixels with a tokenizer of stride 16,
bf16 autocast with an fp32 residual stream, fp32 weights, gradients, AdamW state and average. **By an estimate, not yet checked on a GPU**:
the training state is counted, the activations are the tensors that autograd keeps, which a test counts on CPU to 5 % in scaled-down models.
GB are 10^9 bytes; cards hold about 6 % more, which is left to the CUDA context, workspaces and fragmentation. A dash: the training state
alone does not fit. The global batch does not depend on it: gradients are accumulated.

Each cell: checkpointing none / selective / full (`--model.use-checkpoint --model.checkpoint-policy selective`). Selective keeps matrix
products and attention and recomputes norms, modulation and SwiGLU; full recomputes the whole block, a third more FLOPs.
"""]
    for name, state in (("XL/1", "fp32"), ("XL/1", "cpu"), ("B/1", "fp32")):
        arguments = ModelConfig(size=name)
        arguments.resolve()
        arguments = {key: value for key, value in dataclasses.asdict(arguments).items() if key != "size"}
        with torch.device("meta"):
            model = LightningDiT(**arguments)
        title = f"{name}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters"
        note = "" if state == "fp32" else f", `--optim.state {state}`"
        parts.append(f"## {title}{note}\n\n{fitting_table(model, state=state)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
