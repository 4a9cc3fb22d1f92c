"""What a configuration would cost, from shapes alone: parameters, FLOPs, memory, and which micro-batches fit which cards.

    python -m lightningdit.plan > docs/memory.md      # the table of what fits

The activations are those that autograd keeps, to a few percent (a test counts them on CPU); the whole is an estimate, not yet checked
on a GPU.
"""
import dataclasses
import math

import torch

from . import images, latents
from .config import ModelConfig
from .model import CHECKPOINTING, LightningDiT, SwiGLU, forward_flops

CARDS = (24, 40, 80, 141)  # GB of 1e9 bytes. Cards hold about 6 % more, which is left to the CUDA context, workspaces and fragmentation
# Shards of the training state.
LAYOUTS = {"one process, DDP": 1, "FSDP over 2": 2, "FSDP over 8, HSDP in nodes of 8": 8, "FSDP over 64": 64}
MOMENTS = {"fp32": 8, "8bit": 2.03, "offload": 0}  # bytes a trainable parameter of AdamW's state on the device


def activation_bytes(model, bytes_per_value, checkpointing=None):
    """Estimated most bytes that one image takes in a forward and backward pass: `bytes_per_value` an activation, fp32 for the residual.

    A token of a block keeps the residual twice (fp32), norm1, 3 of qkv, attention, proj, norm2, MLP in, MLP hidden and MLP out, and some
    fp32 statistics; an image the modulation. With checkpointing some of it for all blocks, and the rest for the one that is recomputed.

    Args: checkpointing: "none", "selective" or "full" instead of the model's own.
    """
    return sum(_activations(model, bytes_per_value, model.checkpointing if checkpointing is None else checkpointing))


def _activations(model, bytes_per_value, checkpointing):
    """Bytes of an image: (kept from the forward pass on, what one block's backward pass recomputes and its gradients)."""
    L, (N, D), b = len(model.blocks), model.pos_embed.shape[1:], bytes_per_value
    block = model.blocks[0]
    swiglu = isinstance(block.mlp, SwiGLU)
    packed, hidden = (block.mlp.w12.out_features, block.mlp.w3.in_features) if swiglu else 2 * (block.mlp.fc1.out_features,)
    modulation = b * (block.adaLN_modulation[1].out_features + D)
    statistics = 4 * (block.attn.num_heads + 2)  # of the softmax, of the two norms
    whole = N * (2 * 4 * D + b * (8 * D + packed + hidden) + statistics) + modulation
    entrance = N * D * (4 + b) + modulation  # residual and branch
    products = N * (b * (5 * D + packed) + 4 * block.attn.num_heads) + modulation  # qkv, attention, proj, MLP in; the branch is MLP out
    kept = {"none": whole, "selective": entrance + products - modulation, "full": entrance}[checkpointing]
    ends = N * D * (4 + b) + N * b * model.final_layer.linear.out_features  # the final norm, the output
    in_flight = N * (D * (4 + b) + b * hidden)  # gradients of residual, branch and MLP hidden
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
        "gradients": (0 if state == "offload" else 4) * trainable / shards,
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


def print_plan(config, device, shards=1):
    """--dry-run: what this configuration would cost, from shapes alone."""
    data = config.data
    if latents.is_store(data.path):
        index = latents.read_index(data.path)
        counted, classes = index["images"], index["plan"]["classes"]
    else:
        source = images.open_batches(data, 1, 3).source
        counted, classes = len(source), source.classes
    num_images, data.num_classes = data.num_images or counted, data.num_classes or len(classes)
    with torch.device("meta"):
        model = LightningDiT(**config.model_arguments())
    bf16, micro, flops = config.use_bf16(device), config.micro_batch or config.batch_size, forward_flops(model)
    memory = training_memory(model, micro, bf16)
    steps = num_images * (1 - data.val_fraction) / config.batch_size
    print(f"parameters        {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M")
    print(f"tokens an image   {model.pos_embed.shape[1]}")
    print(f"FLOPs an image    {flops / 1e9:.2f} G forward, {3 * flops / 1e9:.2f} G in training")
    for name, size in memory.items():
        print(f"memory            {size / 2**30:9.3f} GiB  {name}")
    print(f"memory            {sum(memory.values()) / 2**30:9.3f} GiB  estimated in all on one GPU, {'bf16' if bf16 else 'fp32'}, "
          f"checkpointing {model.checkpointing}")
    print(f"steps an epoch    {steps:.1f} of {config.batch_size} images; {config.steps} steps are {config.steps / steps:.1f} epochs")
    print("\nLargest micro-batch by the estimate, checkpointing none / selective / full, bf16; not yet checked on a GPU:\n")
    print(fitting_table(model, config.precision != "fp32"))
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
    for name in ("XL/1", "B/1"):
        arguments = ModelConfig(size=name)
        arguments.resolve()
        arguments = {key: value for key, value in dataclasses.asdict(arguments).items() if key != "size"}
        with torch.device("meta"):
            model = LightningDiT(**arguments)
        parts.append(f"## {name}, {sum(p.numel() for p in model.parameters()) / 1e6:.0f} M parameters\n\n{fitting_table(model)}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    print(document(), end="")
