"""Bad updates: non-finite losses and gradients, and spikes, kept away from the weights without waiting for the device.

Each step the guard looks at the loss and the gradient norm of the global batch, on the device. A bad one sets `optimizer.found_inf`, the
switch by which a gradient scaler makes PyTorch's fused AdamW leave weights, moments and step count as they are. The host reads the
verdicts when it reads the losses, every few steps, and only then decides what the run does about it (`policy`).

A spike is a gradient norm or loss far above those of the last good steps: by more than `threshold` robust deviations (1.4826 times the
median distance from the median) of the logarithm. Medians do not move when single values are wild, which is why running means are not used.
"""

import math

import torch

POLICIES = ("stop", "skip", "rollback")
NON_FINITE, SPIKE, LEFT_OUT = 1.0, 2.0, 3.0  # verdicts; 0: good


class Guard:
    """Judges updates and keeps the history that it judges by.

    Args:
        optimizer: one of PyTorch's fused optimizers that know `found_inf`: AdamW, Adam, SGD, Adagrad; or one that says `knows_found_inf`.
        threshold: robust deviations above the median that make a spike; None or inf: only non-finite values are bad.
        window: good steps that are remembered; spikes are judged once half of it is full.
        device: where losses live.
    Raises: ValueError for an optimizer that is not fused, a threshold <= 0 or a window < 8.
    """

    def __init__(self, optimizer, *, threshold=20.0, window=128, device="cpu"):
        if not getattr(optimizer, "knows_found_inf", all(group.get("fused") for group in optimizer.param_groups)):
            raise ValueError(f"optimizer: got {type(optimizer).__name__} without fused=True, expected fused: it skips on the device")
        threshold = math.inf if threshold is None else threshold
        if not threshold > 0:
            raise ValueError(f"threshold: got {threshold}, expected a positive number, or None")
        if window < 8:
            raise ValueError(f"window: got {window}, expected at least 8 steps")
        self.optimizer, self.threshold = optimizer, threshold
        self.history = torch.full((2, window), math.nan, device=device)  # logarithms of losses and gradient norms of good steps, a ring
        self.count = torch.zeros((), dtype=torch.int64, device=device)  # good steps so far

    @torch.no_grad()
    def judge(self, loss, grad_norm, skip=False):
        """Decides on the update that optimizer.step() is about to make; returns the verdict, a scalar on the device.

        Args:
            loss, grad_norm: scalars of the global batch, equal on every process, so that all of them decide alike.
            skip: leave the update out whatever they are (a batch that was bad before a rollback).
        """
        values = torch.stack([loss.detach().float(), grad_norm.detach().float()])
        logarithms = values.clamp(min=1e-30).log()
        window = self.history.shape[1]
        median = self.history.nanmedian(1, keepdim=True).values
        deviation = 1.4826 * (self.history - median).abs().nanmedian(1).values
        # Of nearly constant values the deviation is tiny; 5 % is no spike.
        far = (logarithms - median[:, 0] > self.threshold * deviation.clamp(min=0.05 / self.threshold)).any() & (self.count >= window // 2)
        finite = values.isfinite().all()
        verdict = torch.where(finite, far * SPIKE, NON_FINITE)
        good = verdict == 0
        if skip:
            good, verdict = torch.zeros_like(good), torch.full_like(verdict, LEFT_OUT)
        place = (self.count % window).reshape(1, 1).expand(2, 1)
        kept = torch.where(good, logarithms[:, None], self.history.gather(1, place))
        self.history.scatter_(1, place, kept)
        self.count += good
        self.optimizer.found_inf = (~good).float()
        return verdict

    def tensors(self):
        """What a checkpoint needs to keep, to be filled in place when it is loaded."""
        return {"guard.history": self.history, "guard.count": self.count}


def reason(verdict):
    """In words, for the log."""
    return {NON_FINITE: "non-finite loss or gradient", SPIKE: "spike of the loss or the gradient norm"}[verdict]
