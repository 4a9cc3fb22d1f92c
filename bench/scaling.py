"""Communication of data-parallel training derived from the model's numbers; nothing here is measured.

    python bench/scaling.py > docs/scaling.md

T trainable parameters, n GPUs, N nodes of G = 8 GPUs. Volumes are what a GPU sends in a step, by ring algorithms: an all-reduce of S bytes
over k peers 2 S (k - 1) / k, an all-gather or reduce-scatter S (k - 1) / k.
"""
import math
from dataclasses import dataclass

import torch

from lightningdit.model import PRESETS, LightningDiT, forward_flops

PEAK_TFLOPS, MFU = 989.5, 0.50  # H200, dense bf16; the project's target, not yet measured on a GPU
GPUS_A_NODE = 8
NVLINK, NETWORK = 450e9, 50e9  # bytes/s a GPU and direction: NVLink 4; one 400 Gbit/s port a GPU
EFFICIENCY = 0.7  # of a link in a collective
HOP = 3e-6  # s for a message to a neighbour, whatever the link
BUCKET = 25 * 2**20  # DDP's default
IMAGES = (1, 16, 128)  # a GPU


@dataclass
class Model:
    trainable: int
    depth: int
    train_flops: float  # an image, backward = twice forward

    @classmethod
    def xl(cls):
        with torch.device("meta"):
            model = LightningDiT(**PRESETS["XL/1"], use_swiglu=True, use_rope=True, use_rmsnorm=True)
        return cls(sum(p.numel() for p in model.parameters() if p.requires_grad), len(model.blocks), 3 * forward_flops(model))


@dataclass
class Traffic:
    """Of a GPU in a step: bytes inside the node and between nodes, and seconds beside the forward and beside the backward pass."""

    inside: float
    between: float
    forward: float
    backward: float


def bandwidth(n):
    """Bytes/s a GPU of a ring over n GPUs. Over nodes each ring crosses a border once, and G rings share the G ports of a node, so that a
    ring is as fast as G ports together, or as NVLink."""
    return EFFICIENCY * (NVLINK if n <= GPUS_A_NODE else min(NVLINK, GPUS_A_NODE * NETWORK))


def ddp(model, n):
    """fp32 gradients, all-reduced in buckets beside the backward pass; trees for the latency."""
    volume, buckets = 2 * 4 * model.trainable * (n - 1) / n, 4 * model.trainable / BUCKET
    inside, between = _by_link(volume, n)
    return Traffic(inside, between, 0.0, volume / bandwidth(n) + buckets * 2 * math.log2(n) * HOP)


def fsdp(model, n):
    """bf16 weights gathered block by block, forward and again backward; fp32 gradients reduce-scattered; rings of n GPUs."""
    part = model.trainable * (n - 1) / n
    inside, between = _by_link(8 * part, n)
    latency = model.depth * (n - 1) * HOP
    return Traffic(inside, between, 2 * part / bandwidth(n) + latency, 6 * part / bandwidth(n) + 2 * latency)


def hsdp(model, n):
    """FSDP inside a node; the node's shards of the fp32 gradients are all-reduced between nodes, each GPU through its own port."""
    inner, nodes = fsdp(model, GPUS_A_NODE), n // GPUS_A_NODE
    between = 2 * 4 * model.trainable / GPUS_A_NODE * (nodes - 1) / nodes
    latency = model.depth * 2 * math.log2(nodes) * HOP if nodes > 1 else 0.0
    return Traffic(inner.inside, between, inner.forward, inner.backward + between / (EFFICIENCY * NETWORK) + latency)


def _by_link(volume, n):
    """(inside, between) of what a GPU sends: of G ring neighbours one is in another node, through one of G ports."""
    return (volume, 0.0) if n <= GPUS_A_NODE else (volume * (GPUS_A_NODE - 1) / GPUS_A_NODE, volume / GPUS_A_NODE)


def compute_time(model, images):
    """Seconds of (forward, backward) of so many images."""
    whole = images * model.train_flops / (PEAK_TFLOPS * 1e12 * MFU)
    return whole / 3, 2 * whole / 3


def efficiency(model, traffic, images):
    """Computing time over step time, if communication hides perfectly beside computation of its own pass and what is left over waits."""
    forward, backward = compute_time(model, images)
    return (forward + backward) / (max(forward, traffic.forward) + max(backward, traffic.backward))


def images_to_hide(model, traffic):
    """The least images a GPU, between two exchanges, beside which all communication hides."""
    forward, backward = compute_time(model, 1)
    return math.ceil(max(traffic.forward / forward, traffic.backward / backward))


COLUMNS = ("GPUs", "mode", "GB inside the node", "GB between nodes", "ms beside forward", "ms beside backward", "images to hide it",
           *(f"efficiency at {count}" for count in IMAGES))


def table(model):
    lines = [" | ".join(["", *COLUMNS, ""]).strip(), "|" + " ---: |" * len(COLUMNS)]
    for n in (8, 64, 512):
        for name, mode in (("DDP", ddp), ("FSDP", fsdp), ("HSDP", hsdp)):
            if n > GPUS_A_NODE or mode is not hsdp:
                t = mode(model, n)
                cells = [n, name, f"{t.inside / 1e9:.2f}", f"{t.between / 1e9:.2f}", f"{1e3 * t.forward:.1f}", f"{1e3 * t.backward:.1f}",
                         images_to_hide(model, t), *(f"{efficiency(model, t, count):.0%}" for count in IMAGES)]
                lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def document():
    """docs/scaling.md."""
    model = Model.xl()
    forward, backward = (1e3 * t for t in compute_time(model, 1))
    return f"""# Scaling, on paper

Written by `python bench/scaling.py`. **Everything here is derived, nothing is measured**: it says which mode to choose and what to check
first on GPUs.

LightningDiT-XL/1 at 256 pixels has T = {model.trainable / 1e6:.2f} M trainable parameters, nearly all in {model.depth} equal blocks, and a
training image takes {model.train_flops / 1e9:.2f} GFLOP. At the targeted model FLOP utilisation of {MFU:.0%} of {PEAK_TFLOPS} TFLOP/s
(H200, dense bf16) that is {forward:.2f} ms forward and {backward:.2f} ms backward an image. Gradients travel in fp32, gathered weights in
bf16, as in lightningdit/distributed.py:

| mode | bytes that a GPU sends in a step | forward | backward |
| --- | --- | --- | --- |
| DDP | 8 T (n - 1) / n: all-reduce of fp32 gradients | - | 8 T |
| FSDP over n | 8 T (n - 1) / n: two all-gathers in bf16, a reduce-scatter in fp32 | 2 T | 6 T |
| HSDP in nodes of {GPUS_A_NODE} | FSDP's of n = {GPUS_A_NODE}; between N nodes T (N - 1) / N: all-reduce of the shards | 2 T | 6 T + T |

Of one step, the least images a GPU beside which all of it hides, and the computing time over the step time at so many images a GPU:

{table(model)}

Assumptions: {NVLINK / 1e9:.0f} GB/s a GPU and direction inside a node (NVLink 4), one port of {8 * NETWORK / 1e9:.0f} Gbit/s a GPU between
nodes, {EFFICIENCY:.0%} of either reached; rings over nodes are as fast as all ports of a node together; {HOP * 1e6:.0f} us a hop, n - 1
hops for a gather or scatter of a block, 2 log2(n) for an all-reduce (trees; DDP in buckets of 25 MiB, HSDP block by block). Communication
hides perfectly beside the computation of its own pass, and the rest waits. The utilisation is taken as the same at every batch, though
at few images it falls. Gathered weights outside the blocks, data, checkpoints and stragglers are not counted.

What follows, if the assumptions hold:

- Volume is no problem for this model: DDP and FSDP send the same {8 * model.trainable / 1e9:.1f} GB, which about 20 images a GPU hide. DDP
  wherever the training state fits (docs/memory.md), as `--parallel auto` chooses.
- Latency decides for FSDP over many nodes: {3 * model.depth} rings a step, each of n - 1 hops. At 64 GPUs FSDP and HSDP are level; at 512
  FSDP's rings take longer than what they carry, and HSDP, whose rings stay inside nodes, needs a third of the images to hide.
- The paper's batch of 1024 is 128 images a GPU on 8, 16 on 64 and 2 on 512 GPUs: on 512 GPUs no mode hides its communication then. Raise
  the batch with the GPUs, or use fewer.
- Under accumulation gradients travel once a step in every mode, but FSDP gathers the weights anew for each micro-batch: take the largest
  that fits (`--micro-batch auto`).
"""


if __name__ == "__main__":
    print(document(), end="")
