"""Optimizer, learning-rate schedule and the exponential moving average of the weights."""
import collections
import copy
import math

import torch
from torch.optim.adamw import adamw

from .distributed import is_sharded, local


def build_optimizer(model, lr, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0, state="fp32", name="adamw", muon_momentum=0.95):
    """AdamW, fused on CPU and CUDA, or with Muon for the matrices of the blocks. Weight decay acts on matrices, not on biases, norms and
    embeddings.

    Args: state: of the moments: "fp32"; "8bit", see AdamW8bit; "cpu", see OffloadedAdamW.
    Source: AdamW, arXiv:1711.05101; lr and beta2 of the defaults, arXiv:2501.01423.
    """
    decayed, plain, matrices = [], [], {}
    for key, parameter in model.named_parameters():
        parts = next((parts for suffix, parts in MUON_MATRICES.items() if key.endswith(suffix)), 0) if name == "muon" else 0
        if parts:
            matrices[parameter] = parts
        elif parameter.requires_grad:
            (decayed if parameter.ndim >= 2 and "embed" not in key else plain).append(parameter)
    groups = [dict(params=decayed, weight_decay=weight_decay), dict(params=plain, weight_decay=0.0)]
    if name == "muon":
        return MuonAdamW(matrices, groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, momentum=muon_momentum)
    if state == "8bit":
        return AdamW8bit(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    if state == "cpu":
        return OffloadedAdamW(groups, lr=lr, betas=betas, eps=eps, fused=True)
    return AdamW(groups, lr=lr, betas=betas, eps=eps)


class AdamW:
    """The kernel of torch.optim.AdamW(fused=True) without the class around it, which imports the compiler when it is first made.

    Same numbers, and the same names and shapes of the state, on CPU and CUDA, of whole and of sharded parameters. Where `found_inf` (a
    scalar on the device) is not 0, the update is left out.

    Args: groups: [dict(params=[...], weight_decay=...), ...].
    """

    knows_found_inf = True

    def __init__(self, groups, lr, betas, eps):
        self.param_groups = [dict(lr=lr, betas=betas, eps=eps) | group for group in groups]
        self.state, self.found_inf = collections.defaultdict(dict), None

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            for p in params:
                if not self.state[p]:
                    self.state[p] = dict(step=torch.zeros((), device=p.device), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
            if not params:
                continue
            states = [self.state[p] for p in params]
            averages, squares = ([local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
            steps = [state["step"] for state in states]
            torch._foreach_add_(steps, 1)
            torch._fused_adamw_([local(p) for p in params], [local(p.grad) for p in params], averages, squares, [], steps, lr=group["lr"],
                                beta1=group["betas"][0], beta2=group["betas"][1], weight_decay=group["weight_decay"], eps=group["eps"],
                                amsgrad=False, maximize=False, found_inf=self.found_inf)
            if self.found_inf is not None:
                torch._foreach_sub_(steps, [self.found_inf] * len(steps))

    def zero_grad(self, set_to_none=True):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None if set_to_none or p.grad is None else torch.zeros_like(p.grad)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW that updates in the host's memory, where its moments live: 8 bytes a parameter less on the device, 16 more on the host.

    A step waits for the backward pass and fetches all gradients, as they are after clipping; while it works on one parameter, the next
    gradients and the last weights travel on a stream of their own. The device waits for the weights, the host does not. Where
    `found_inf` is not 0 it does nothing. Names and shapes of the state are AdamW's: a run may go on with either class, and sharded
    parameters have sharded moments.

    This is the scheme of torchao's CPUOffloadOptimizer, and not that class: its gradients leave in the backward pass, before they are
    clipped and judged; its weights on the host are those of its construction, whatever checkpoint is loaded later; and it takes neither
    sharded parameters nor, for tests, those of a CPU, which are copied here as a device's are.
    """

    state_device = torch.device("cpu")  # for whoever loads the state

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, **settings)
        cuda = local(self.param_groups[0]["params"][0]).is_cuda
        self.found_inf, self._host, self._stream = None, {}, torch.cuda.Stream() if cuda else None

    def _on_host(self, p):
        """The copies of this process's part of a parameter and its gradient; the weights are fetched if somebody else has changed them."""
        weights = local(p)
        weights_there, grad_there, version = self._host.get(p, (None, None, None))
        if weights_there is None:
            weights_there, grad_there = (torch.empty(weights.shape, dtype=p.dtype, pin_memory=weights.is_cuda) for _ in range(2))
        if version != weights._version:
            weights_there.copy_(weights, non_blocking=True)
        self._host[p] = weights_there, grad_there, weights._version
        return weights_there, grad_there

    @torch.no_grad()
    def step(self):
        if self.found_inf is not None and self.found_inf.item():
            return
        fetched = []
        if self._stream:
            self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for group in self.param_groups:
                for p in group["params"]:
                    if p.grad is not None:
                        weights, grad = self._on_host(p)
                        grad.copy_(local(p.grad), non_blocking=True)
                        fetched.append((group, p, weights, grad, self._stream.record_event() if self._stream else None))
            for group, p, weights, grad, arrival in fetched:
                state = self.state[p]
                if not state:
                    state["step"] = torch.zeros((), dtype=torch.float32)
                    state |= {name: torch.zeros_like(p, device=self.state_device).detach() for name in ("exp_avg", "exp_avg_sq")}
                if arrival:
                    arrival.synchronize()
                adamw([weights], [grad], [local(state["exp_avg"])], [local(state["exp_avg_sq"])], [], [state["step"]], fused=True,
                      amsgrad=False, maximize=False, beta1=group["betas"][0], beta2=group["betas"][1],
                      **{name: group[name] for name in ("lr", "weight_decay", "eps")})
                local(p).copy_(weights, non_blocking=True)
                self._host[p] = weights, grad, local(p)._version
        if self._stream:
            torch.cuda.current_stream().wait_stream(self._stream)


class AdamW8bit(torch.optim.Optimizer):
    """AdamW with torchao's arithmetic and 8-bit moments in blocks of 256 values, 2.03 bytes a parameter instead of 8.

    Unlike torchao's own class it leaves an update out, without waiting for the device, where `found_inf` (a scalar on the device) is not 0,
    and its state is made of plain tensors: step, and exp_avg and exp_avg_sq, or codes and scales of them. Not for sharded parameters.

    Raises: ImportError without torchao; ValueError for sharded parameters.
    Source: 8-bit optimizers, arXiv:2110.02861; torchao.optim.
    """

    knows_found_inf = True
    BLOCK, LEAST = 256, 4096  # smaller tensors, and those that do not divide, keep fp32 moments

    def __init__(self, params, lr, betas, eps, weight_decay):
        try:
            from torchao.optim.adam import single_param_adam
            from torchao.optim.subclass_8bit import OptimState8bit
        except ImportError as error:
            raise ImportError(f"optim.state = 8bit needs `pip install torchao`: {error}") from error
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay))
        every = [p for group in self.param_groups for p in group["params"]]
        if any(is_sharded(p) for p in every):
            raise ValueError("optim.state: got '8bit' with sharded parameters, expected fp32, or parallel = ddp")
        self._quantised, self._tables, self.found_inf = OptimState8bit, {}, None
        # Dozens of small kernels a parameter without fusion; on CPU, where that costs nothing, it needs no compiler.
        self._update = torch.compile(single_param_adam, fullgraph=True, dynamic=False) if every[0].is_cuda else single_param_adam

    def _moment(self, p, state, name, signed):
        """The moment as torchao takes it, around the plain tensors of `state`, which are made at the first step."""
        if p.numel() < self.LEAST or p.numel() % self.BLOCK:
            return state.setdefault(name, torch.zeros_like(p))
        if f"{name}_codes" not in state:
            zero = self._quantised.zeros(p.shape, signed, self.BLOCK, p.device, dtype=p.dtype)
            state[f"{name}_codes"], state[f"{name}_scale"] = zero.codes, zero.scale
        if (signed, p.device) not in self._tables:
            self._tables[signed, p.device] = self._quantised.zeros((self.BLOCK,), signed, self.BLOCK, p.device).qmap
        return self._quantised(state[f"{name}_codes"], state[f"{name}_scale"], self._tables[signed, p.device], signed, dtype=p.dtype)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if "step" not in state:
                    state["step"] = torch.zeros((), device=p.device)
                moments = [self._moment(p, state, "exp_avg", True), self._moment(p, state, "exp_avg_sq", False)]
                held = [p, *state.values()]
                before = None if self.found_inf is None else [tensor.clone() for tensor in held]
                state["step"] += 1
                lr = torch.as_tensor(group["lr"], dtype=torch.float32)
                with torch._dynamo.utils.disable_cache_limit():  # one graph for each shape of a parameter, a fixed number
                    self._update(p.detach(), p.grad, state["step"], *moments, None, lr, *group["betas"], group["weight_decay"],
                                 group["eps"], True, False)
                if before is not None:
                    bad = self.found_inf != 0
                    for tensor, was in zip(held, before, strict=True):
                        tensor.copy_(torch.where(bad, was, tensor))


# The weights of a block that Muon updates, and how many matrices each holds: q, k and v; gate and up.
MUON_MATRICES = {"attn.qkv.weight": 3, "attn.proj.weight": 1, "mlp.w12.weight": 2, "mlp.w3.weight": 1, "mlp.fc1.weight": 1,
                 "mlp.fc2.weight": 1}


def orthogonalise(matrices):
    """(K, rows, columns) -> the same shape and dtype, each U S V^T replaced by about U V^T: five steps of a Newton-Schulz iteration whose
    coefficients bring singular values of 0.01 to 1 into about 0.7 to 1.2, quickly rather than exactly.

    Source: Muon, K. Jordan 2024, kellerjordan.github.io/posts/muon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class MuonAdamW(torch.optim.Optimizer):
    """Muon for given matrices, fused AdamW for the rest, as one optimizer with one learning rate. Not for sharded parameters.

    With gradient G: M = m M + (1 - m) G, and W -= lr * (weight_decay * W + 0.2 sqrt(max(rows, columns)) * orthogonalise((1 - m) G + m M)),
    a step whose root mean square is about that of AdamW, so that AdamW's learning rate serves. What one layer packs (q, k and v; gate
    and up) are matrices of their own. All of one shape are orthogonalised in one batch, in bf16 on CUDA and in fp32 on CPU.

    The state is one momentum a value of the matrices instead of AdamW's two. Like fused AdamW it leaves an update out where `found_inf` (a
    scalar on the device) is not 0.

    Args:
        matrices: {parameter: how many matrices it packs, one below the other}. groups: of AdamW.
    Raises: ValueError for sharded parameters, or none for Muon.
    Source: Muon, K. Jordan 2024; the scale and the shared learning rate, arXiv:2502.16982.
    """

    knows_found_inf = True

    def __init__(self, matrices, groups, lr, betas, eps, weight_decay, momentum):
        if not matrices:
            raise ValueError("optim.name: got 'muon' for a model without blocks, expected adamw")
        if any(is_sharded(p) for p in matrices):
            raise ValueError("optim.name: got 'muon' with sharded parameters, expected adamw, or parallel = ddp")
        muon = dict(params=list(matrices), momentum=momentum, weight_decay=weight_decay)
        super().__init__([muon, *groups], dict(lr=lr, weight_decay=0.0))
        self.parts, self.found_inf = matrices, None
        # Groups and state are shared with AdamW: one learning rate to set, one state to save.
        self.adamw = torch.optim.AdamW(self.param_groups[1:], lr=lr, betas=betas, eps=eps, fused=True)
        self.adamw.state = self.state

    @torch.no_grad()
    def step(self):
        self.adamw.found_inf = self.found_inf
        self.adamw.step()
        group = self.param_groups[0]
        lr, momentum, good = group["lr"], group["momentum"], 1.0 if self.found_inf is None else (self.found_inf == 0).float()
        params = [p for p in group["params"] if p.grad is not None]
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [self.state[p]["momentum_buffer"] for p in params]
        gradients = [p.grad for p in params]
        if self.found_inf is not None:  # the momentum itself as gradient leaves it as it is
            gradients = [torch.where(self.found_inf == 0, g, m) for g, m in zip(gradients, buffers, strict=True)]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        by_shape = {}
        for p, gradient, buffer in zip(params, gradients, buffers, strict=True):
            update = gradient.lerp(buffer, momentum).to(torch.bfloat16 if p.is_cuda else torch.float32)
            for target, part in zip(p.chunk(self.parts[p]), update.chunk(self.parts[p]), strict=True):
                by_shape.setdefault(part.shape, ([], []))[0].append(target)
                by_shape[part.shape][1].append(part)
        for shape, (targets, updates) in by_shape.items():
            updates = orthogonalise(torch.stack(updates)).float() * (good * (-lr * 0.2 * math.sqrt(max(shape))))
            if group["weight_decay"]:
                torch._foreach_mul_(targets, 1 - good * (lr * group["weight_decay"]))
            torch._foreach_add_(targets, list(updates))


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
