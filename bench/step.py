"""The training step of train/dit.py for benchmarks, with any kernel switched to its definition in plain PyTorch.

    python bench/step.py --shapes xl/N256 --device cuda --contestant "ours compiled"    # seconds to the first step, as JSON
    PYTHONPATH=tests python -m rehearsal.stand_in -- python bench/step.py ... --steps 50    # CPU time of a step, too; needs no GPU

"reference" is the official graph: the same model with all kernels off, biases inside the matrix products, fp32 residual stream, RoPE in
fp32, SDPA, the rest in the autocast dtype. Models that share a Trainer share its weights, optimizer and average: all of them fit a GPU
together, and the order in which they take turns changes nothing in their speed.
"""

import argparse
import functools
import importlib
import importlib.util
import inspect
import json
import re
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]  # as a script, this folder alone is on the path

import torch  # noqa: E402

import lightningdit.model  # noqa: E402
from bench.harness import COMPILED, OURS, Case, cpu_peak_mib, nbytes, synchronize  # noqa: E402
from bench.providers import EAGER  # noqa: E402
from lightningdit import config as configuration  # noqa: E402
from lightningdit import optim  # noqa: E402
from lightningdit.distributed import check_compiler  # noqa: E402
from lightningdit.guard import Guard  # noqa: E402
from lightningdit.model import SIZES, LightningDiT  # noqa: E402
from lightningdit.training import losses, micro_batches  # noqa: E402
from lightningdit_kernels import rope_attention  # noqa: E402
from lightningdit_kernels.testing import DEFINITIONS  # noqa: E402

KERNELS = dict(norm=("rms_norm_modulate", "gated_residual_rms_norm_modulate"), attention=("rope_attention",), swiglu=("swiglu",))
ALL = tuple(KERNELS)
CPU_DEPTH, CPU_SHARE = 2, 8  # the depth, and by how much batches are smaller than those of single ops
# Relative: of the loss, and of each parameter's gradient in L2 norm. Reached in fp32; in bf16 twice the error of eager PyTorch is allowed.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-6, 1e-5
TRUTH_IMAGES = 8  # in one forward pass of the fp32 truth


def copy_of(module: ModuleType, name: str, **functions) -> ModuleType:
    """A second copy of a module, with some of the functions in its namespace replaced.

    Its code objects are its own: what torch.compile made of one copy is never taken for another's, and copies can take turns.
    Raises: ValueError for a function that the module does not have.
    """
    spec = importlib.util.spec_from_file_location(f"{module.__name__}_{name}", module.__file__)
    copied = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # torch.compile looks globals up there
    spec.loader.exec_module(copied)
    for function, replacement in functions.items():
        if not hasattr(copied, function):
            raise ValueError(f"functions: got {function!r}, expected a name in {module.__name__}")
        setattr(copied, function, replacement)
    return copied


@dataclass(frozen=True)
class Contestant:
    """A way to compute the step: which kernels are switched off, whether blocks are compiled, which backend attention takes."""

    name: str
    off: tuple[str, ...] = ()
    compiled: bool = False
    attention: str = "auto"

    @functools.cache  # noqa: B019  (a handful, for the life of the process)
    def module(self) -> ModuleType:
        """A copy of lightningdit.model that computes so."""
        functions = {op: DEFINITIONS[op] for kernel in self.off for op in KERNELS[kernel]}
        if self.off == ALL:  # as the official code writes it, which rounds and stores as it does in eager mode
            functions |= dict(gated_residual_rms_norm_modulate=_gated, swiglu=EAGER["swiglu"])
            functions |= dict(linear=torch.nn.functional.linear, without_bias=_with_bias)
        if self.attention != "auto":
            functions["rope_attention"] = functools.partial(rope_attention, backend=self.attention)
        return copy_of(lightningdit.model, re.sub(r"\W+", "_", self.name), **functions)

    def prove(self, seen: list[str], device: str) -> None:
        """AssertionError if what ran, by harness.ran, is not this contestant. Attention on CUDA may be PyTorch's own."""
        ops = {found[1] for one in seen if (found := re.match(r"lightningdit::(\w+?)(?:_backward)?$", one))}
        ops |= {found[1] for one in seen if (found := re.match(r"_(norm|rope_attention|swiglu)_", one)) and re.search(OURS, one)}
        ran = {kernel for kernel, own in KERNELS.items() if ops & {kernel, *own}}
        optional = {"attention"} if device == "cuda" and self.attention == "auto" and "attention" not in self.off else set()
        wanted = set(KERNELS) - set(self.off)
        assert ran | optional == wanted | optional, f"{self.name} is not what ran: expected kernels {sorted(wanted)}, saw {sorted(ran)}"
        graphs = [one for one in seen if re.search(COMPILED, one)]
        assert bool(graphs) == self.compiled, f"{self.name} is not what ran: expected compiled {self.compiled}, saw {graphs[:1]}"


def _gated(x, y, gate, scale, shift=None, *, bias=None, **norm):
    x = x + gate[:, None] * (y if bias is None else y + bias)
    return x, DEFINITIONS["rms_norm_modulate"](x, scale, shift, **norm)


def _with_bias(layer, x):
    return layer(x), None


def contestants(device: str) -> dict[str, list[Contestant]]:
    """By part. "ladder": from the official graph to ours. "kernels": ours with each switched off where it is fastest, compiled on CUDA and
    in eager mode on a CPU."""
    ladder = [Contestant("reference eager", ALL), Contestant("reference compiled", ALL, True), Contestant("ours eager"),
              Contestant("ours compiled", (), True)]
    base = ladder[3 if device == "cuda" else 2]
    kernels = [ladder[0], base, *(Contestant(f"{base.name} without {kernel}", (kernel,), base.compiled) for kernel in KERNELS)]
    kernels += [Contestant("ours compiled with triton attention", (), True, "triton")] * (device == "cuda")
    return dict(ladder=ladder, kernels=kernels)


def configure(shapes: str, device: str, **more) -> configuration.DiTConfig:
    """The paper's recipe at a preset of the harness ("xl/N1024/B16"), smaller on CPUs; as many tokens in a batch whatever N is.

    Args: more: depth, width, heads, tokens, batch in place of the preset's.
    Raises: ValueError for tokens that make no square.
    """
    sizes = Case("training_step", shapes, torch.float32, device).sizes()
    preset = shapes.partition("/")[0]
    sizes |= dict(depth=1 if preset == "tiny" else CPU_DEPTH if device == "cpu" else SIZES[preset.upper()][0],
                  tokens=sizes["rows"] * sizes["columns"])
    if "/B" not in shapes and preset != "tiny":
        sizes["batch"] = max(1, sizes["batch"] * 256 // sizes["tokens"] // (CPU_SHARE if device == "cpu" else 1))
    sizes |= more
    side = round(sizes["tokens"] ** 0.5)
    if side**2 != sizes["tokens"]:
        raise ValueError(f"tokens: got {sizes['tokens']}, expected a square")
    # The defaults are lightningdit_xl_64ep.yaml's, which cannot be read without pyyaml; tests/test_bench_step.py compares the two.
    config = configuration.DiTConfig()
    config.data.num_classes = 1000
    config.model = configuration.ModelConfig(None, sizes["depth"], sizes["width"], sizes["heads"], patch_size=1)
    config.data.image_size, config.batch_size, config.micro_batch = side * config.tokenizer.downsample, sizes["batch"], None
    config.precision = "bf16" if device == "cuda" else "fp32"
    return configuration.finish(config)


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Makes an optimizer's state, which its first step would make when the memory of a backward pass has been tried. Changes no weights.

    Args:
        optimizer: one that leaves an update out where its `found_inf` is 1: PyTorch's fused ones, those of lightningdit.optim.
            OffloadedAdamW leaves its state out, too: that is in the host's memory, which no trial measures.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.found_inf = torch.ones((), device=parameter.device)
    optimizer.step()
    optimizer.found_inf = None
    optimizer.zero_grad(set_to_none=True)


class Trainer:
    """Weights, optimizer, average and guard of a run, which any number of models share.

    adaLN and the last layer start from small random weights in place of zeros: blocks whose gates are zero have no gradients to compare.
    """

    def __init__(self, config: configuration.DiTConfig, device: str):
        torch.manual_seed(config.seed)
        self.config, self.device, self.done = config, torch.device(device), 0
        self.model = LightningDiT(**config.model_arguments()).to(device).train()
        last = self.model.final_layer
        for layer in (*(block.adaLN_modulation[-1] for block in (*self.model.blocks, last)), last.linear):
            torch.nn.init.normal_(layer.weight, std=0.02)
        self.average = optim.EMA(self.model, config.optim.ema)
        self.optimizer = optim.build_optimizer(self.model, config.optim.lr, config.optim.betas, config.optim.eps, config.optim.weight_decay)
        allocate_state(self.optimizer)
        self.guard = Guard(self.optimizer, threshold=config.guard.threshold, window=config.guard.window, device=device)
        self.bf16 = config.use_bf16(self.device)

    def batch(self, seed: int = 0, count: int | None = None) -> dict[str, torch.Tensor]:
        """Random latents, noise, times and labels, as training.draw_batch returns them; the first `count` images of a batch."""
        config, generator = self.config, torch.Generator(self.device).manual_seed(seed)
        options, side = dict(generator=generator, device=self.device), config.latent_size
        x1, x0 = torch.randn(2, config.batch_size, config.tokenizer.latent_channels, side, side, **options)
        t = torch.randn(config.batch_size, **options).sigmoid()
        y = torch.randint(config.data.num_classes, (config.batch_size,), **options)
        drop = torch.rand(config.batch_size, **options) < config.model.class_dropout_prob
        return {name: value[:count] for name, value in dict(x1=x1, x0=x0, t=t, y=y, drop_labels=drop).items()}

    def share(self, model: torch.nn.Module) -> torch.nn.Module:
        """The model, computing with this trainer's parameters and buffers themselves."""
        for name, tensor in (*self.model.named_parameters(), *self.model.named_buffers()):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, tensor)
        return model.train()

    def build(self, contestant: Contestant) -> torch.nn.Module:
        with torch.device("meta"):
            model = contestant.module().LightningDiT(**self.config.model_arguments())
        self.share(model)
        if contestant.compiled:
            for block in model.blocks:
                block.compile()
        return model

    def backward(self, model, batch, bf16: bool | None = None) -> torch.Tensor:
        """Adds the gradients of the mean loss over the batch to the shared parameters; returns the loss."""
        autocast, total = torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16 if bf16 is None else bf16), 0
        for part in micro_batches(self.config, batch):
            terms = losses(self.config, model, autocast, **part)
            loss = sum(term.sum() for term in terms.values()) / len(batch["t"])
            loss.backward()
            total = total + loss.detach()
        return total

    def step(self, model, batch, skip: bool = False) -> torch.Tensor:
        """One update; returns its loss. skip: leave weights and moments as they are, at the same cost."""
        try:
            loss = self.backward(model, batch)
            norm = torch.nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            self.guard.judge(loss, norm, skip)
            self.optimizer.step()
        finally:  # of a backward that ran out of memory, too
            self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.done)
        self.done += 1
        return loss

    def state_mib(self) -> float:
        """Of weights, buffers, average and moments."""
        tensors = [*self.model.parameters(), *self.model.buffers(), *self.average.model.parameters(), *self.average.model.buffers()]
        tensors += [value for state in self.optimizer.state.values() for value in state.values()]
        return nbytes(*tensors) / 2**20

    def peak_mib(self, model, batch) -> float:
        """The most that one step allocates at once, on top of what was there before."""
        if self.device.type == "cpu":
            return cpu_peak_mib(lambda: self.step(model, batch, skip=True))
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step(model, batch, skip=True)
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def gradients(self, model, batch, **options) -> dict[str, torch.Tensor]:
        """The loss and every gradient, which are gone from the parameters afterwards."""
        try:
            found = dict(loss=self.backward(model, batch, **options))
            return found | {name: p.grad for name, p in self.model.named_parameters() if p.grad is not None}
        finally:
            self.optimizer.zero_grad(set_to_none=True)

    def truth(self, batch) -> dict[str, torch.Tensor]:
        """What the reference gives in fp32, a few images at a time; in the host's memory, so that it takes none from who is compared."""
        self.config.micro_batch = min(TRUTH_IMAGES, len(batch["t"]))
        try:
            found = self.gradients(self.build(Contestant("truth", ALL)), batch, bf16=False)
            return {name: value.cpu() for name, value in found.items()}
        finally:
            self.config.micro_batch = None


def errors(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> dict[str, float]:
    """Relative errors of the loss and, as "gradients", of the worst parameter's gradient, in L2 norm.

    Gradients below a thousandth of the whole gradient's norm are compared with that.
    """
    assert found.keys() == truth.keys(), f"got gradients of {sorted(found.keys() ^ truth.keys())} on one side only"
    distances, norms = [], []
    for name in truth.keys() - {"loss"}:
        true = truth[name].to(found[name].device)
        norms.append(true.norm())
        distances.append((found[name] - true).norm())
    norms = torch.stack(norms)
    worst = (torch.stack(distances) / torch.maximum(norms, 1e-3 * norms.norm())).max()
    loss = truth["loss"].to(found["loss"].device)
    return dict(loss=float((found["loss"] - loss).abs() / loss.abs()), gradients=float(worst))


def bounds(eager: dict[str, float]) -> dict[str, float]:
    """What errors() may say of a contestant, where `eager` is what it says of the eager reference in the same precision."""
    return dict(loss=max(LOSS_TOLERANCE, 2 * eager["loss"]), gradients=max(GRADIENT_TOLERANCE, 2 * eager["gradients"]))


def official_model(path: Path, config: configuration.DiTConfig) -> torch.nn.Module:
    """The official code's model from a checkout of github.com/hustvl/LightningDiT, called as ours is. It compiles itself.

    Raises: ValueError for a folder without it; ImportError without the packages that it imports (timm, einops, fairscale).
    """
    if not (path / "models" / "lightningdit.py").is_file():
        raise ValueError(f"official: got {path}, expected a checkout that has models/lightningdit.py")
    sys.path.insert(0, str(path))
    try:
        official = importlib.import_module("models.lightningdit")
    finally:
        sys.path.remove(str(path))
    known = inspect.signature(official.LightningDiT).parameters  # it has none of our options, which are off in every contestant
    model = official.LightningDiT(**{name: value for name, value in config.model_arguments().items() if name in known})
    model.y_embedder.dropout_prob = 0.0  # labels are dropped before
    forward = model.forward
    model.forward = lambda x, t, y, drop_labels: forward(x, t, torch.where(drop_labels, config.data.num_classes, y))
    return model


# The first step


FIRST_STEP_S = 150  # at most; a stage of gpu.py has two of them
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "XDG_CACHE_HOME")  # the last for what lightningdit_kernels.tuning chose


def first_step(contestant: str, shapes: str, device: str, limit_s: float = FIRST_STEP_S) -> dict:
    """Seconds from the start of a fresh process to the end of its first step. The environment's CACHES say what it finds compiled before.

    Returns: {"first_step_s"}, or {"first_step_failed": reason}.
    """
    command = [sys.executable, __file__, "--shapes", shapes, "--device", device, "--contestant", contestant, "--begun", repr(time.time())]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit_s)
    except subprocess.TimeoutExpired:
        return dict(first_step_failed=f"not done after {limit_s:.0f} s")
    if done.returncode:
        return dict(first_step_failed=(done.stderr.strip().splitlines() or ["no message"])[-1][:200])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", required=True)
    parser.add_argument("--device", required=True, choices=("cpu", "cuda"))
    parser.add_argument("--contestant", required=True)
    parser.add_argument("--begun", type=float, default=time.time(), help="seconds since 1970 at which the process was started")
    parser.add_argument("--steps", type=int, default=0, help="further steps; reports the median CPU time of one, all threads, as host_ms")
    options = parser.parse_args()
    found = {one.name: one for part in contestants(options.device).values() for one in part}
    if options.contestant not in found:
        parser.error(f"--contestant is {options.contestant!r}, expected one of {', '.join(found)}")
    if found[options.contestant].compiled:
        check_compiler(torch.device(options.device))  # as train/dit.py does: it shortens what Inductor does before the first step
    trainer = Trainer(configure(options.shapes, options.device), options.device)
    model, batch = trainer.build(found[options.contestant]), trainer.batch()
    trainer.step(model, batch)
    synchronize(options.device)
    times = dict(first_step_s=round(time.time() - options.begun, 2))
    host_ms = []
    for _ in range(options.steps):
        begin = time.process_time()
        trainer.step(model, batch)
        host_ms.append(1e3 * (time.process_time() - begin))
        synchronize(options.device)
    print(json.dumps(times | (dict(host_ms=round(statistics.median(host_ms), 2)) if host_ms else {})))


if __name__ == "__main__":
    main()
