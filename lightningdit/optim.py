"""Optimizer, learning-rate schedule and the exponential moving average of the weights."""
import copy
import math

import torch

from .distributed import local


def build_optimizer(model, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0):
    """AdamW, fused on CPU and CUDA. Weight decay acts on matrices, not on biases, norms and embeddings.

    Source: AdamW, arXiv:1711.05101; lr and beta2 of the defaults, arXiv:2501.01423.
    """
    decayed, plain = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and "embed" not in name else plain).append(parameter)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)


def lr_at(step, *, lr, steps, warmup=0, schedule="constant", final_lr_fraction=0.0):
    """Learning rate of update `step` (0-based) of `steps`: linear warm-up, then constant, or cosine or linear to lr * final_lr_fraction."""
    if step < warmup:
        return lr * (step + 1) / warmup
    if schedule == "constant":
        return lr
    done = (step - warmup) / max(1, steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1 - done
    return lr * (final_lr_fraction + (1 - final_lr_fraction) * shape)


def frozen_copy(model):
    """A copy in evaluation mode, without gradients. Make it before the model is sharded or compiled."""
    return copy.deepcopy(model).eval().requires_grad_(False)


class EMA:
    """Exponential moving average of a model's trainable weights: average = decay * average + (1 - decay) * weights.

    Args:
        decay: official 0.9999, from the first step on.
        warmup: use min(decay, (1 + step) / (10 + step)), for runs too short to forget the initial weights.
        average: the copy to keep the average in, sharded as the model is; None: one is made.
    Attributes: model, the copy, in evaluation mode without gradients, for sampling.
    """

    def __init__(self, model, decay=0.9999, warmup=False, average=None):
        self.model = frozen_copy(model) if average is None else average
        self.decay, self.warmup = decay, warmup
        pairs = [(p, q) for p, q in zip(self.model.parameters(), model.parameters(), strict=True) if q.requires_grad]
        self._average, self._weights = ([local(tensor) for tensor in tensors] for tensors in zip(*pairs, strict=True))

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        torch._foreach_lerp_(self._average, self._weights, 1 - decay)
