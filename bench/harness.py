"""How everything in bench/ is measured.

Correctness first: a contestant that is further from fp64 than twice eager PyTorch gets a reason in place of a time. All contestants of a
case take turns, round after round, so that clocks, temperature and neighbours hit all of them alike; a speed-up is the median over the
rounds of the ratio within a round. Inputs rotate through copies that together exceed the last cache. On CUDA the copies are run inside
one CUDA graph and timed by events, the first of which waits until the GPU has all of it in its queue; on CPU by perf_counter. Bytes and
FLOPs are counted from the shapes: those that one perfect pass needs. A contestant also has to prove who it is: one profiled run must show
its operators or kernels, and not another's (`identify`). One that runs out of memory, whenever, loses its row.
"""

import copy
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.util
import json
import math
import os
import platform
import random
import re
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from bench.providers import EAGER, providers, serving
from lightningdit import graphs
from lightningdit.checkpoint import write_text
from lightningdit.config import ModelConfig
from lightningdit.memory import free_memory, is_out_of_memory, largest_by_trial
from lightningdit.model import LightningDiT
from lightningdit_kernels import library, native
from lightningdit_kernels.testing import FROZEN, OPS, assert_within, example_inputs, random_tensor, truth_and_bounds, values_and_gradients
from lightningdit_kernels.tuning import cpu_name, cycles_to_enqueue, event_ms

ROOT = Path(__file__).resolve().parent.parent
SCHEMA = "kernels/1"
STEPS = ("forward", "backward", "forward_backward")

TINY = ModelConfig(None, 1, 32, 2, 1, mlp_ratio=3.0)  # for the tests of bench/ itself


def model_config(preset: str) -> ModelConfig:
    """A preset's model with one block: the one place that the ops' shapes and options come from."""
    config = TINY if preset == "tiny" else ModelConfig(f"{preset.upper()}/1", depth=1)
    config.resolve()
    return config


def model_arguments(preset: str) -> dict:
    """Arguments of LightningDiT for the model of model_config."""
    return {name: value for name, value in dataclasses.asdict(model_config(preset)).items() if name != "size"}


def model_of(preset: str) -> LightningDiT:
    """Of model_config, on no device."""
    with torch.device("meta"):
        return LightningDiT(**model_arguments(preset))


def _preset(preset):
    block = model_of(preset).blocks[0]
    return block.attn.qkv.in_features, block.attn.num_heads, block.mlp.w3.in_features


# Width, heads, hidden size of the feed-forward. XL is LightningDiT-XL/1.
PRESETS = {preset: _preset(preset) for preset in ("xl", "l", "b", "s", "tiny")}
# What is measured of an op besides the model's options in tensors of one dtype with fp32 parameters, and in which dtypes. Norms: all in one
# dtype, and as training has them, with a residual stream in fp32. Alignment: the frozen encoder's features in bf16.
VARIANTS = {
    "rope_attention": ("QK-norm", (torch.bfloat16, torch.float16, torch.float32)),
    "rms_norm_modulate": ("fp32 residual", (torch.bfloat16,)),
    "gated_residual_rms_norm_modulate": ("fp32 residual", (torch.bfloat16,)),
    "alignment_losses": ("bf16 features", (torch.float32,)),
}
NORMS = ("rms_norm_modulate", "gated_residual_rms_norm_modulate")


def trained_variant(op: str, dtype: torch.dtype) -> str:
    """The variant that training runs, where the op's tensors are of this dtype."""
    name, dtypes = VARIANTS.get(op, ("", ()))
    return name if dtype in dtypes and name != "QK-norm" else ""


def is_measured(op: str, dtype: torch.dtype, shapes: str, variant: str) -> bool:
    """Whether there is a case of this variant. At the points of a sweep there is one: what training runs."""
    if "/" in shapes:
        return variant == trained_variant(op, dtype)
    return variant in ("", VARIANTS[op][0] if op in VARIANTS and dtype in VARIANTS[op][1] else "")


BATCH = {"cuda": dict(xl=128, l=128, b=256, s=256, tiny=2), "cpu": dict(xl=8, l=8, b=16, s=32, tiny=2)}
# What rotates exceeds this many bytes: three times the L2 of a GPU, the usual last cache of a CPU.
CPU_ROTATION = 64 * 2**20
# Elements of the inputs up to which the gate compares with fp64 at full size; beyond, the batch of the gate is halved until it fits.
GATE_ELEMENTS = 2**28


@dataclasses.dataclass(frozen=True)
class Case:
    """One op at one shape in one dtype on one device."""

    op: str
    shapes: str  # a key of PRESETS; then, if anything differs from it, batch, tokens and head dimension: "xl/B8/N1024/Dh64"
    dtype: torch.dtype
    device: str
    variant: str = ""  # of VARIANTS

    def __post_init__(self):
        name, dtypes = VARIANTS.get(self.op, ("", ()))
        if self.variant and (self.variant != name or self.dtype not in dtypes):
            raise ValueError(f"variant: got {self.variant!r} of {self.op} in {self.dtype}, expected one of VARIANTS")

    def options(self) -> dict:
        """For example_inputs: dtypes that are not self.dtype, and which parts the op has."""
        own = model_of(self.shapes.partition("/")[0]).blocks[0].attn.use_qknorm
        options = dict(qk_norm=own or self.variant == "QK-norm")
        if self.op not in NORMS or self.variant:
            options |= dict(parameters=torch.float32)
        if self.variant == "fp32 residual":
            options |= dict(residual=torch.float32)
        if self.variant == "bf16 features":
            options |= dict(features=torch.bfloat16)
        return options

    def call(self, function: Callable) -> Callable:
        """The function as it is called in training: next to an fp32 residual stream the results' dtype is that of autocast."""
        if self.variant != "fp32 residual":
            return function

        def called(**inputs):
            with torch.autocast(self.device, self.dtype):
                return function(**inputs)

        return called

    def sizes(self) -> dict[str, int]:
        """Sizes for example_inputs: images of 16 x 16 tokens; for the losses and group_norm_silu the tensors of the VA-VAE."""
        preset, *points = self.shapes.split("/")
        point = {name: int(value) for name, value in (re.fullmatch(r"(B|N|Dh)(\d+)", point).groups() for point in points)}
        width, heads, hidden = PRESETS[preset]
        sizes = dict(batch=BATCH[self.device][preset], rows=16, columns=16, width=width, heads=heads)
        if preset == "tiny":
            sizes |= dict(rows=4, columns=4)
        if self.op == "swiglu":
            sizes |= dict(width=hidden)
        elif self.op.startswith(("marginal", "alignment")) and preset == "xl":
            sizes |= dict(width=1024)  # channels of DINOv2-L
        elif self.op == "group_norm_silu" and preset in ("xl", "b"):
            side = dict(xl=256, b=64)[preset]  # where the encoder's convolutions cost most, and two levels below
            sizes |= dict(batch=8 if self.device == "cuda" else 2, rows=side, columns=side, width=128 if side == 256 else 256, heads=32)
        if "N" in point:
            rows = math.isqrt(point["N"])
            while point["N"] % rows:
                rows -= 1
            sizes |= dict(rows=rows, columns=point["N"] // rows)
        if "Dh" in point:
            sizes |= dict(width=sizes["heads"] * point["Dh"])
        return sizes | (dict(batch=point["B"]) if "B" in point else {})

    def __str__(self):
        name = f"{self.op}-{self.device}-{self.shapes}-{str(self.dtype).removeprefix('torch.')}"
        return f"{name}, {self.variant}" if self.variant else name


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def cost(op: str, inputs: dict, results: dict[str, torch.Tensor]) -> dict[str, dict[str, int]]:
    """Bytes and FLOPs of one perfect forward, backward and both: every tensor moves once, FLOPs count 2 a multiply-add.

    The backward reads the gradients of the outputs and what a perfect forward saves, and writes the gradients of the inputs.
    Matrix products: attention's backward is 2.5 times its forward (it computes the scores again), the distance matrix loss's 1.5 times.
    """
    tensors = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    outputs = [value for name, value in results.items() if name.startswith("out.")]
    gradients = [value for name, value in results.items() if name.startswith("grad.")]
    saved = dict(tensors)
    if op == "gated_residual_rms_norm_modulate":
        saved["x"] = results["out.0"]
    elif op == "rope_attention":
        saved["out"] = results["out.0"]
    forward_bytes, backward_bytes = nbytes(*tensors.values(), *outputs), nbytes(*outputs, *saved.values(), *gradients)
    if op == "group_norm_silu":  # its statistics need a pass of their own: a group does not fit on the chip
        forward_bytes += nbytes(tensors["x"])
        backward_bytes += nbytes(tensors["x"], *outputs)
    forward_flops = backward_flops = 0
    if op == "rope_attention":
        batch, tokens, _, heads, head_dim = tensors["qkv"].shape
        forward_flops = 4 * batch * heads * tokens**2 * head_dim
        backward_flops = forward_flops * 5 // 2
    elif op == "marginal_distance_matrix_loss":
        batch, tokens, channels = tensors["z"].shape
        forward_flops = 2 * batch * tokens**2 * (channels + tensors["f"].shape[2])
        backward_flops = forward_flops * 3 // 2
    elif op == "alignment_losses":  # the projection of s to width C is not needed: its similarities cost r channels
        batch, tokens, channels = tensors["s"].shape
        width = tensors["f"].shape[2]
        forward_flops = 2 * batch * tokens * (tokens * (channels + width) + channels * (channels + width))
        backward_flops = 2 * batch * tokens * (tokens * (2 * channels + width) + channels * (channels + width))
    return {
        "forward": dict(bytes=forward_bytes, flops=forward_flops),
        "backward": dict(bytes=backward_bytes, flops=backward_flops),
        "forward_backward": dict(bytes=forward_bytes + backward_bytes, flops=forward_flops + backward_flops),
    }


# Timing


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


WAITED = "called a synchronizing CUDA operation"  # c10/cuda/CUDAFunctions.cpp


def note_waits(waits: list[str]) -> None:
    """From now on, adds the "file:line" of every call that waits for the GPU to `waits`, while torch.cuda.set_sync_debug_mode is "warn".

    Other warnings are shown as before, among them PyTorch's notice that this mode is a prototype.
    """
    show = warnings.showwarning

    def note(message, category, filename, lineno, *rest):
        if WAITED in str(message):
            waits.append(f"{filename}:{lineno}")
        else:
            show(message, category, filename, lineno, *rest)

    warnings.simplefilter("always")
    warnings.showwarning = note
    torch.set_warn_always(True)


LATE = ", host time may be inside"


class Timer:
    """Times run(i), i = 0 .. sets-1 naming the copy of the inputs to work on. sample() is milliseconds per run.

    method: how; after the samples it also says whether the host's time may be in one of them.
    """

    def __init__(self, run: Callable[[int], object], sets: int, device: str, at_least_ms: float = 5.0):
        self.run, self.sets, self.next = run, sets, 0
        self.method = "perf_counter"
        run(0)
        synchronize(device)
        self.enqueue = self.cycles = None
        if device == "cuda":
            self.method, self.enqueue = _graph_or_events(run, sets)
            self.cycles = cycles_to_enqueue(self.enqueue)
            return
        begin = time.perf_counter()
        run(0)
        once_ms = 1e3 * (time.perf_counter() - begin)
        self.repeats = max(1, min(1000, round(at_least_ms / max(once_ms, 1e-3))))

    def sample(self) -> float:
        if self.enqueue is None:
            return self._wall_ms()
        time_ms, self.cycles, late = event_ms(self.enqueue, self.cycles)
        if late and LATE not in self.method:
            self.method += LATE
        return time_ms / self.sets

    def _wall_ms(self) -> float:
        begin = time.perf_counter()
        for _ in range(self.repeats):
            self.run(self.next)
            self.next = (self.next + 1) % self.sets
        return 1e3 * (time.perf_counter() - begin) / self.repeats


def _graph_or_events(run, sets):
    """(how all copies are enqueued in one call, what does it). No method: a Timer that held it would be freed by the next collection."""

    def all_sets():
        for index in range(sets):
            run(index)

    graphs.warm_up(all_sets)
    try:
        return "CUDA graph", graphs.capture(all_sets).replay
    except RuntimeError as error:  # something in it cannot be captured: gaps between launches may then be part of the figure
        if is_out_of_memory(error) or "INTERNAL ASSERT" in str(error):  # these are no properties of what is captured
            raise
        torch.cuda.synchronize()
        return f"events, not captured: {str(error).splitlines()[0][:120]}", all_sets


def make_timers(names: Iterable[str], make: Callable[[str], Timer], lost: dict[str, str]) -> dict[str, Timer]:
    """{name: make(name)}. One that runs out of memory, to which its first call belongs, is left out, and its reason goes to `lost`."""
    timers = {}
    for name in names:
        try:
            timers[name] = make(name)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            lost[name] = reason_of(error)
    return timers


def turn(timers: dict, lost: dict[str, str] | None) -> dict[str, float]:
    """A sample of every timer. One that runs out of memory is taken out of `timers`, its reason goes to `lost`; it raises without."""
    samples = {}
    for name in list(timers):
        try:
            samples[name] = timers[name].sample()
        except RuntimeError as error:
            if lost is None or not is_out_of_memory(error):
                raise
            lost[name] = reason_of(error)
        if name not in samples:  # after the exception, whose traceback holds tensors
            del timers[name]
            free_memory("cuda" if torch.cuda.is_initialized() else "cpu")
    return samples


def rounds_for(timers: dict, settings, lost: dict[str, str] | None = None) -> int:
    """As many rounds as settings.case_s allows, within settings.rounds; the turn that finds out is also the first warm-up.

    Args: lost: as of turn().
    """
    begin = time.perf_counter()
    turn(timers, lost)
    least, most = settings.rounds
    return max(least, min(most, int(settings.case_s / (time.perf_counter() - begin))))


def interleave(
    timers: dict,
    rounds: int,
    benchmark=None,
    warmup_s: float = 0.0,
    observe: Callable[[], object] | None = None,
    lost: dict[str, str] | None = None,
) -> dict:
    """rounds samples of every timer, taken in turns. With pytest-benchmark's fixture, one of its rounds is one turn of all.

    observe is called after each turn, in the warm-up too. lost: as of turn(); who is in it is not in the result.
    """
    samples = {name: [] for name in timers}

    def one_turn():
        for name, time_ms in turn(timers, lost).items():
            samples[name].append(time_ms)
        if observe:
            observe()

    end = time.perf_counter() + warmup_s
    while time.perf_counter() < end:
        one_turn()
    for times in samples.values():
        times.clear()
    if benchmark is None:
        for _ in range(rounds):
            one_turn()
    else:
        benchmark.pedantic(one_turn, rounds=rounds, iterations=1)
    return {name: times for name, times in samples.items() if name in timers}


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    return ordered[low] + (position - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def summary(times_ms: list[float], counted: dict[str, int], baseline_ms: list[float], processes: int = 1) -> dict:
    """Median, p20 and p80, rates, and the speed-up over the baseline: median of the ratios per round, 95 % bootstrap interval.

    The rounds of several processes follow each other, equally many of each; the bootstrap then draws processes first, rounds within them.
    """
    median = statistics.median(times_ms)
    ratios = [base / mine for base, mine in zip(baseline_ms, times_ms, strict=True)]
    length = len(ratios) // processes
    groups = [ratios[start : start + length] for start in range(0, length * processes, length)]
    draw = random.Random(0)
    medians = [
        statistics.median([ratio for group in draw.choices(groups, k=processes) for ratio in draw.choices(group, k=length)])
        for _ in range(500)
    ]
    row = dict(median_ms=median, p20_ms=quantile(times_ms, 0.2), p80_ms=quantile(times_ms, 0.8), rounds=len(times_ms))
    row |= dict(speedup=statistics.median(ratios), speedup_low=quantile(medians, 0.025), speedup_high=quantile(medians, 0.975))
    row |= dict(gb_per_s=counted["bytes"] / median / 1e6)
    if counted["flops"]:
        row |= dict(tflop_per_s=counted["flops"] / median / 1e9)
    return {key: value if isinstance(value, int) else short(value) for key, value in row.items()}


def short(value: float) -> float:
    """Five digits, which is more than any of this is good for."""
    return float(f"{value:.5g}")


# Who ran, and in how much memory


# Of what torch.compile makes of our operators only their kernels are left, to whose names Inductor adds a number.
_SOURCES = [path.read_text("utf-8") for path in Path(library.__file__).parent.glob("*_triton.py")]
KERNELS = re.findall(r"^def (_\w+_kernel)\(", "\n".join(_SOURCES), re.MULTILINE)
OURS, COMPILED = rf"lightningdit::|^(?:{'|'.join(KERNELS)})(?:_\d+)?$", r"Torch-Compiled|CompiledFxGraph"
TELLING = re.compile(rf"{OURS}|{COMPILED}|sglang::|scaled_dot_product|flash|xformers|quack|Liger|Fused|Fa4")


def ran(run: Callable[[], object], device: str) -> list[str]:
    """Operators, autograd functions and, on CUDA, kernels of one profiled call that tell contestants apart, by name."""
    activities = [torch.profiler.ProfilerActivity.CPU] + [torch.profiler.ProfilerActivity.CUDA] * (device == "cuda")
    with torch.profiler.profile(activities=activities) as profiler:
        run()
        synchronize(device)
    kernels = {event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA}
    operators = {re.sub(r"(CompiledFxGraph) \w+|(Region): [\d/]+", r"\1\2", event.name) for event in profiler.events()}
    return sorted(name[:160] for name in kernels | {name for name in operators if TELLING.search(name)})


def identify(name: str, proof: str, served: str, seen: list[str]) -> None:
    """AssertionError if what ran is not this contestant, as when two providers are swapped.

    Args:
        name: the contestant's; "eager" and the peers must not run our operators, only "compiled" must be compiled as a whole.
        proof: a regular expression that an operator or kernel of a peer matches; "" if none is known.
        served: what serves our op on this device; plain PyTorch in our name leaves no trace that is ours.
        seen: what ran() returned.
    """
    if name.split()[0] == "ours":
        wanted, unwanted = OURS if served in ("native", "triton") else proof, ""
    elif name == "compiled":
        wanted, unwanted = COMPILED, OURS
    else:
        wanted, unwanted = proof, f"{OURS}|{COMPILED}" if name == "eager" else OURS
    shown = ", ".join(seen[:4]) or "plain operators only"
    assert not wanted or any(re.search(wanted, one) for one in seen), f"{name} is not what ran: expected {wanted}, saw {shown}"
    strange = [one for one in seen if unwanted and re.search(unwanted, one)]
    assert not strange, f"{name} is not what ran: it must not run {strange[0]}"


def cpu_peak_mib(run: Callable[[], object]) -> float:
    """The most that one call had allocated at once on the CPU, above what was there."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()

    def changes(events):
        for event in events:
            if event.tag.name == "Allocation":
                yield event.start_time_ns, event.extra_fields.alloc_size
            yield from changes(event.children)

    held = peak = 0
    for _, size in sorted(changes(profiler.profiler.kineto_results.experimental_event_tree())):
        held += size
        peak = max(peak, held)
    return peak / 2**20


# One case


_failures: dict[tuple, str] = {}  # {_plan(provider, case): reason} of providers with fails_once that failed in this process


def _plan(provider, case):
    """The key of _failures, without the batch: different cases may be gated at the same one."""
    return provider.name, case.dtype, *(size for name, size in case.sizes().items() if name != "batch")


def _failed(provider, case, error):
    """Status and reason of a provider that raised `error`."""
    reason = reason_of(error)
    if is_out_of_memory(error):  # of the case, on this device: no fault
        return dict(status="too large", reason=reason)
    if provider.fails_once:
        _failures[_plan(provider, case)] = reason
    return dict(status="failed", reason=reason)


def _prepare(provider, case, gate):
    """(function, None) of a contestant that passed the gate, or (None, its row)."""
    version = provider.version if provider.name != "ours" else serving(case.op, case.device)
    row = dict(name=provider.name, version=version) | (dict(forward_only=True) if provider.forward_only else {})
    sizes = case.sizes()
    if reason := provider.unavailable(case.device, case.dtype, sizes["width"] // sizes["heads"], sizes["width"]):
        return None, row | dict(status="unavailable", reason=reason)
    if reason := _failures.get(_plan(provider, case)):
        return None, row | dict(status="failed", reason=f"not called again: {reason}")
    begin = time.perf_counter()
    try:
        function = case.call(provider.build())
        gate(provider, function)
        synchronize(case.device)
        row |= dict(status="ok", first_call_s=round(time.perf_counter() - begin, 2))  # compiling, mostly
        seen = ran(lambda: gate(provider, function), case.device)
        identify(provider.name, provider.proof, version if provider.name == "ours" else "triton" if "triton" in provider.name else "", seen)
    except AssertionError as error:
        return None, row | dict(status="incorrect", reason=str(error))
    except Exception as error:
        if provider.name == "eager":  # nothing is measured without it; without ours the others are
            raise
        return None, row | _failed(provider, case, error)
    return function, row | dict(ran=seen[:16])


def reason_of(error: BaseException) -> str:
    """One line: the error's class and how its message begins."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0][:200]}"


def _contestants(case, inputs, cotangents, settings):
    """(provider, function or None, row) of everybody for this case, gated."""
    truth, ours = truth_and_bounds(case.call(EAGER[case.op]), inputs, FROZEN, cotangents)
    # Others may add thousands of rows in any order: torch.compile's serial fp32 sum of a weight gradient is off by 24 ulp.
    others = {name: bound + 64 * torch.finfo(torch.float32).eps * truth[name].abs().max().item() for name, bound in ours.items()}

    def gate(provider, function):
        bounds = ours if provider.name == "ours" else others
        if provider.forward_only:
            outputs = {name: true for name, true in truth.items() if name.startswith("out.")}
            assert_within(values_and_gradients(function, inputs, tuple(inputs)), outputs, bounds)
        else:
            assert_within(values_and_gradients(function, inputs, FROZEN, cotangents), truth, bounds)

    return [(p, *_prepare(p, case, gate)) for p in providers(case.op) if not settings.only or p.name in settings.only]


def _inputs(case, sizes):
    inputs = example_inputs(case.op, **sizes, dtype=case.dtype, device=case.device, **case.options())
    if case.op == "group_norm_silu":
        inputs["x"] = inputs["x"].contiguous(memory_format=torch.channels_last)
    return inputs


def _elements(inputs):
    return sum(value.numel() for value in inputs.values() if isinstance(value, torch.Tensor))


def _copies(inputs: dict, count: int) -> list[dict]:
    def leaf(name, value):
        value = value.detach().clone(memory_format=torch.preserve_format)
        return value.requires_grad_(value.is_floating_point() and name not in FROZEN)

    return [{k: leaf(k, v) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()} for _ in range(count)]


def run_case(benchmark, case: Case, settings) -> dict:
    """Gates, measures and records one case; with settings.compile_only it only gates.

    Returns: its record, which also goes to settings.record() and to benchmark.extra_info.
    """
    cuda = case.device == "cuda"
    torch.compiler.reset()  # what other cases compiled would count towards the limit of recompilations
    inputs = _inputs(case, case.sizes())
    probe = values_and_gradients(case.call(EAGER[case.op]), inputs, FROZEN)
    counted = cost(case.op, inputs, probe)
    outputs = [value for name, value in probe.items() if name.startswith("out.")]
    cotangents = tuple(random_tensor(*out.shape, dtype=out.dtype, seed=90 + i, device=case.device) for i, out in enumerate(outputs))
    del probe
    gate_sizes = case.sizes()
    while gate_sizes["batch"] > 1 and _elements(inputs) * gate_sizes["batch"] // case.sizes()["batch"] > GATE_ELEMENTS:
        gate_sizes["batch"] = max(1, gate_sizes["batch"] // 2)
    contestants = []

    def gated(batch):  # the truth and eager's may not fit: their fp64 takes a multiple
        gate_sizes["batch"] = batch
        whole = gate_sizes == case.sizes()
        contestants[:] = _contestants(case, inputs if whole else _inputs(case, gate_sizes), cotangents if whole else (), settings)

    halved = [gate_sizes["batch"] >> halving for halving in range(gate_sizes["batch"].bit_length())]
    assert largest_by_trial(halved, gated, case.device, 0), "out of memory: the truth of not even one image fits"
    if settings.compile_only:
        # Other processes may compile on the same GPU. What will be timed is then not compiled, and the caller has to try again.
        assert gate_sizes["batch"] == halved[0], f"out of memory: {case} was compiled for {gate_sizes['batch']} images, not {halved[0]}"
        missing = [row["name"] for *_, row in contestants if row["status"] == "too large"]
        assert not missing, f"out of memory: {', '.join(missing)} not compiled for {case}"
        return {}

    rotation = 3 * torch.cuda.get_device_properties(0).L2_cache_size if cuda else CPU_ROTATION
    sets = max(2, min(16, -(-rotation // nbytes(*(v for v in inputs.values() if isinstance(v, torch.Tensor)), *outputs))))
    copies, leaves = [], []

    def copied(count):  # with room for a step of eager beside them
        leaves.clear()
        copies[:] = _copies(inputs, count)
        leaves.extend([v for v in copy.values() if isinstance(v, torch.Tensor) and v.requires_grad] for copy in copies)
        steps(case.call(EAGER[case.op]))["forward_backward"](0)

    def steps(function, forward_only=False):
        def forward(index):
            return function(**copies[index])

        if forward_only:
            return dict(forward=torch.no_grad()(forward))

        def forward_backward(index):
            out = forward(index)
            return torch.autograd.grad(out, leaves[index], cotangents if isinstance(out, tuple) else cotangents[0])

        return dict(forward=forward, forward_backward=forward_backward)

    sets = largest_by_trial(sorted({sets, sets // 2, 2, 1}, reverse=True), copied, case.device)
    assert sets, f"out of memory: not even one copy of the inputs and a step of eager fit {case}"
    timers, rows, lost = {}, [], {}
    for provider, function, row in contestants:
        rows.append(row)
        if function is None:
            continue
        runs, own = steps(function, provider.forward_only), {}
        try:
            if both := runs.get("forward_backward"):  # these columns are of both passes
                row |= _cuda_columns(both) if cuda else dict(peak_mib=round(cpu_peak_mib(lambda both=both: both(0)), 2))
            for step, run in runs.items():
                own[provider.name, step] = Timer(run, sets, case.device, settings.sample_ms)
        except RuntimeError as error:  # out of memory, for the gate may have been smaller; or something that only this size shows
            row |= _failed(provider, case, error)
            continue
        timers |= own
    rows_by_name = {row["name"]: row for row in rows}
    eager = rows_by_name.get("eager", dict(status="not asked for", reason="--only must name it"))
    assert eager["status"] == "ok", f"eager is not timed, and nothing without it: {eager['reason']}"
    rounds = rounds_for(timers, settings, lost)
    monitor, states = Monitor() if cuda else None, []
    state = gpu_state() if cuda else {}
    samples = interleave(timers, rounds, benchmark, settings.warmup_s, monitor and (lambda: states.append(monitor.sample())), lost)
    if cuda:
        for (name, step), timer in timers.items():
            rows_by_name[name][f"{step}_method"] = timer.method
    for (name, step), reason in lost.items():
        rows_by_name[name] |= dict(status="too large", reason=f"{step}: {reason}")
    assert eager["status"] == "ok", f"eager is not timed, and nothing without it: {eager['reason']}"
    for row in rows:
        if row["status"] == "ok":
            _summarise(row, [samples], counted)
    record = dict(kind="op", op=case.op, shapes=case.shapes, device=case.device, dtype=str(case.dtype).removeprefix("torch."))
    record |= dict(variant=case.variant, dtypes={k: str(v.dtype).removeprefix("torch.") for k, v in inputs.items() if torch.is_tensor(v)})
    record |= dict(sizes=case.sizes(), counted=counted, sets=sets, load=os.getloadavg()[0], contestants=rows, processes=1)
    record |= dict(gate_batch=gate_sizes["batch"]) if gate_sizes != case.sizes() else {}
    record |= dict(samples_ms={f"{name}: {step}": list(map(short, times)) for (name, step), times in samples.items()})
    if cuda:
        record |= dict(before=state, after=gpu_state(), monitor=monitor.source)
        record |= dict(rounds={key: [one.get(key) for one in states[-rounds:]] for key in (states[-1] if states else ())})
    benchmark.group = str(case)
    benchmark.extra_info.update(record)
    settings.record(record)
    incorrect = [row["reason"] for row in rows if row["name"] == "ours" and row["status"] != "ok"]
    assert not incorrect, f"ours is not timed: {incorrect[0]}"
    return record


def _summarise(row, samples_of_processes, counted):
    """The steps of one contestant from the samples of one or several processes."""
    for step in STEPS:
        times = [_times(samples, row["name"], step) for samples in samples_of_processes]
        baselines = [_times(samples, "eager", step) for samples in samples_of_processes]
        if all(times) and all(baselines):
            length = min(map(len, times))  # every process counts the same
            flat, base = (sum((one[:length] for one in many), []) for many in (times, baselines))
            row[step] = summary(flat, counted[step], base, len(times))
            if len(times) > 1:
                row[step] |= dict(medians_ms=[short(statistics.median(one)) for one in times])


def _times(samples, name, step):
    """Milliseconds per round. The backward is what both steps take beyond the median forward; [] if that is lost in the noise.

    [] as well for the steps that a contestant without a backward does not have.
    """
    if step != "backward":
        return samples.get((name, step), [])
    forward = statistics.median(samples[name, "forward"])  # with what the backward needs saved
    rest = [both - forward for both in samples.get((name, "forward_backward"), [])]
    return rest if rest and min(rest) > 0 else []


def _cuda_columns(run) -> dict:
    """Peak memory above what was there, and the time to enqueue one call."""
    run(0)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(0)
    torch.cuda.synchronize()
    peak_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    times_us = []
    for _ in range(20):
        begin = time.perf_counter()
        run(0)
        times_us.append(1e6 * (time.perf_counter() - begin))
        torch.cuda.synchronize()
    return dict(peak_mib=round(peak_mib, 1), launch_us=round(statistics.median(times_us), 1))


@functools.cache
def _gpu_id() -> str:
    """Of torch's device 0, as nvidia-smi and NVML know it, whatever CUDA_VISIBLE_DEVICES says."""
    return f"GPU-{torch.cuda.get_device_properties(0).uuid}"


def gpu_state(fields: str = "clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active,driver_version") -> dict[str, str]:
    """Clocks, power, temperature and throttle reasons from nvidia-smi, or why they are unknown."""
    try:
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", f"--id={_gpu_id()}"]
        values = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip().split(", ")
        return dict(zip(fields.split(","), values, strict=True))
    except (OSError, subprocess.SubprocessError, ValueError, RuntimeError, AssertionError) as error:
        return dict(unknown=str(error))


class Monitor:
    """Clocks in MHz, power in W, temperature in degrees Celsius and throttle reasons of the GPU, once a round.

    By NVML where pynvml (nvidia-ml-py) is installed, which takes microseconds, else by nvidia-smi, which takes a while, between rounds.
    What cannot be read is None: no measurement is lost for it.
    """

    def __init__(self):
        self.source, self.handle = "nvidia-smi", None
        if importlib.util.find_spec("pynvml"):
            import pynvml

            try:
                pynvml.nvmlInit()
                self.nvml, self.handle, self.source = pynvml, pynvml.nvmlDeviceGetHandleByUUID(_gpu_id()), "NVML"
            except pynvml.NVMLError as error:
                self.source = f"nvidia-smi (NVML: {error})"

    def sample(self) -> dict[str, float | str]:
        if self.handle is None:
            return gpu_state("clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active")
        nvml = self.nvml

        def read(functions, *arguments):
            """Of the first function that this version of NVML has; None where card, driver or virtual machine do not tell."""
            try:
                return next(getattr(nvml, one) for one in functions if hasattr(nvml, one))(self.handle, *arguments)
            except (StopIteration, nvml.NVMLError):
                return None

        clock = ("nvmlDeviceGetClockInfo",)
        state = {"clocks.sm": read(clock, nvml.NVML_CLOCK_SM), "clocks.mem": read(clock, nvml.NVML_CLOCK_MEM)}
        power = read(("nvmlDeviceGetPowerUsage",))
        state |= {"power.draw": None if power is None else power / 1e3}
        state |= {"temperature.gpu": read(("nvmlDeviceGetTemperature",), nvml.NVML_TEMPERATURE_GPU)}
        reasons = read(("nvmlDeviceGetCurrentClocksEventReasons", "nvmlDeviceGetCurrentClocksThrottleReasons"))
        return state | {"clocks_event_reasons.active": None if reasons is None else hex(reasons)}


# The record of a run


@dataclasses.dataclass
class Settings:
    """What bench/conftest.py read from the command line, and the records of this run."""

    shapes: tuple[str, ...]
    device: str
    only: tuple[str, ...]  # contestants; empty: all
    rounds: tuple[int, int]  # at least, at most
    case_s: float  # aim for the measurement of one case
    sample_ms: float  # least length of one sample on CPU
    warmup_s: float
    compile_only: bool = False  # of ops only the first calls
    long_rows: bool = True  # whether the alignment losses are also measured at 1,024 tokens
    records: list[dict] = dataclasses.field(default_factory=list)
    path: Path | None = None  # the results file, written anew with every record: what was measured before a crash stays

    def record(self, record: dict) -> None:
        self.records.append(record)
        if self.path is not None:
            write(self.path, self.about | dict(results=self.records))

    @functools.cached_property
    def about(self) -> dict:
        return environment(self.device)


def commit() -> str:
    """Of the sources, "-dirty" where they differ from it; "unknown" without git."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    return subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip() or "unknown"


def environment(device: str) -> dict:
    """Everything about machine and software that a figure depends on."""
    versions = dict(python=platform.python_version(), torch=torch.__version__)
    for op in OPS:
        for provider in providers(op):
            if provider.package and not provider.unavailable(device, torch.bfloat16):
                versions[provider.package] = provider.version
                versions |= {package: importlib.metadata.version(package) for _, package, _ in provider.also}
    about = dict(schema=SCHEMA, device=device, commit=commit(), date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"))
    about |= dict(cpu=cpu_name(), cores=os.cpu_count(), threads=torch.get_num_threads(), native=native.about, versions=versions)
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        versions |= dict(cuda=torch.version.cuda, cudnn=str(torch.backends.cudnn.version()))
        about |= dict(gpu=properties.name, gpu_memory_gib=round(properties.total_memory / 2**30, 1), state=gpu_state())
        about |= dict(l2_mib=properties.L2_cache_size // 2**20)
    return about


def pool(records: list[dict]) -> list[dict]:
    """One record in place of those that several processes made of the same case: summaries of all their rounds, medians of the rest.

    A contestant that one process could not time has that process's reason.
    """
    groups = {}
    for record in records:
        names = ("kind", "op", "shapes", "dtype", "variant", "tokens", "case", "part", "axis", "resident")
        key = tuple(str(record.get(name)) for name in names)
        groups.setdefault(key, []).append(record)
    return [_pooled(group) if len(group) > 1 and group[0]["kind"] == "op" else group[0] for group in groups.values()]


def _pooled(group):
    pooled = copy.deepcopy(group[0]) | dict(processes=len(group), load=max(record["load"] for record in group))
    samples = [
        {tuple(name.rsplit(": ", 1)): times for name, times in record["samples_ms"].items()} for record in group
    ]  # fmt: skip
    pooled["samples_ms"] = {key: [record["samples_ms"].get(key, []) for record in group] for key in group[0]["samples_ms"]}
    pooled["contestants"] = []
    for rows in zip(*(record["contestants"] for record in group), strict=True):
        row = copy.deepcopy(next((one for one in rows if one["status"] != "ok"), rows[0]))
        pooled["contestants"].append(row)
        if row["status"] == "ok":
            for column in ("peak_mib", "launch_us", "first_call_s"):
                if column in row:
                    row[column] = statistics.median(one[column] for one in rows)
            _summarise(row, samples, pooled["counted"])
    return pooled


SAME = ("schema", "device", "cpu", "gpu", "commit", "versions")  # in which results must agree that are to be one run


def merge(files: list[dict]) -> dict:
    """One run from several stages of it: the first one's environment, everybody's records pooled, load and date from first to last."""
    for other in files[1:]:
        for key in SAME:
            if other.get(key) != files[0].get(key):
                raise ValueError(f"stages differ in {key}: {files[0].get(key)} and {other.get(key)}")
    merged = files[0] | dict(results=pool([record for file in files for record in file["results"]]))
    return merged | dict(date_last=files[-1]["date"])


def write(path: Path, content: dict) -> None:
    """As JSON, with lists of numbers on one line each; a reader never sees half a file."""
    text = re.sub(r"\[[\s\d.,eE+\-]+\]", lambda found: " ".join(found[0].split()), json.dumps(content, indent=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text + "\n")


def parametrize(*ops: str):
    """Marks a benchmark function to run for these ops; conftest.py adds shapes, dtypes and the device."""
    return pytest.mark.parametrize("op", ops)
