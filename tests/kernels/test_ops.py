"""What holds for every op: operators as PyTorch wants them, and the same gradients under compilation, checkpointing, autocast and FSDP2."""

import collections
import functools
import importlib
import inspect
import shutil
import types
from pathlib import Path

import pytest
import torch
import torch._dynamo.testing
import torch.utils.checkpoint as checkpointing
from torch.utils._python_dispatch import TorchDispatchMode

from lightningdit_kernels import alignment, audit, library, native, testing
from lightningdit_kernels.attention import fused
from lightningdit_kernels.testing import (
    DEFINITIONS,
    FROZEN,
    OPS,
    assert_within,
    example_inputs,
    random_tensor,
    truth_and_bounds,
    values_and_gradients,
)

PER_SAMPLE = ("f", "gate", "packed", "qkv", "s", "scale", "shift", "x", "y", "z")  # arguments whose first dimension is the batch
COMPOSED = {"alignment_losses": alignment._losses, "alignment_losses_backward": alignment._losses_backward}  # operators made of operators
LOSSES = ("alignment_losses", "marginal_cosine_loss", "marginal_distance_matrix_loss")
each_op = pytest.mark.parametrize("op", OPS)


def inputs_of(op, batch=3, dtype=torch.float32, least=False):
    """Arguments of an op: all that it can take, or the least."""
    inputs = example_inputs(op, batch, 2, 3, 16, 2, dtype)
    if least:
        optional = {name for name, parameter in inspect.signature(OPS[op]).parameters.items() if parameter.default is None}
        return {name: value for name, value in inputs.items() if name not in optional} | (dict(gate=None) if "gate" in inputs else {})
    if op == "rope_attention":
        inputs |= {f"{name}_bias": random_tensor(8, dtype=dtype, seed=seed) / 4 for seed, name in enumerate("qk", 8)}
    return inputs | (dict(center=True) if "center" in inspect.signature(OPS[op]).parameters else {})


class Calls(TorchDispatchMode):
    """Inside, every call of our operators is noted: (operator, arguments), those inside of composed ones too."""

    def __init__(self):
        super().__init__()
        self.calls, self.inside = [], False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.namespace != "lightningdit":
            return operator(*args, **kwargs or {})
        self.calls.append((operator, [a.detach() if self.inside and isinstance(a, torch.Tensor) else a for a in args]))
        name = operator._schema.name.removeprefix("lightningdit::")
        if name not in COMPOSED:
            return operator(*args)
        with self:
            self.inside = True
            results = COMPOSED[name](*args)
        self.inside = False
        return results

    def counts(self, backward=False):
        names = [operator._schema.name for operator, _ in self.calls]
        return collections.Counter(name for name in names if name.endswith("_backward") == backward)


def calls_of(op, **variant):
    with Calls() as mode:
        values_and_gradients(OPS[op], inputs_of(op, **variant), FROZEN)
        OPS[op](**inputs_of(op, **variant))
    return mode


def assert_close(got, expected, **tolerance):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def test_every_op_has_its_definition():
    assert DEFINITIONS.keys() == OPS.keys()


def test_the_ops_reach_every_operator():
    """So that opcheck below leaves none out."""
    defined = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names() if name.startswith("lightningdit::")}
    defined -= {"lightningdit::onednn_linear"}  # PyTorch's own product, in test_linear.py
    if not native.available:  # without it nothing takes the gradient out of the forward, and auto is not the operator
        defined = {name for name in defined if "_and_gradient" not in name and "rope_attention" not in name}
    calls = [calls_of(op) for op in OPS]
    assert {name for mode in calls for backward in (False, True) for name in mode.counts(backward)} == defined


def opcheck(calls, **options):
    seen = set()
    for operator, arguments in calls:
        name = operator._schema.name
        if name not in seen:
            seen.add(name)
            once = name.endswith("_backward")  # differentiating it is an error
            arguments = [
                a.detach().clone().requires_grad_(a.requires_grad and not once) if isinstance(a, torch.Tensor) else a for a in arguments
            ]
            torch.library.opcheck(operator, arguments, **options)


VARIANTS = [dict(dtype=dtype, least=least) for dtype in (torch.float32, torch.float64) for least in (False, True)]


@each_op
@pytest.mark.parametrize("variant", [*VARIANTS, dict(dtype=torch.bfloat16)], ids=["fp32", "fp32 least", "fp64", "fp64 least", "bf16"])
def test_opcheck(op, variant):
    """fp64 is the definition's; schema, fake, autograd and AOT dispatch of every operator that serves the op, forward and backward."""
    opcheck(calls_of(op, **variant).calls)


@pytest.fixture
def launches(monkeypatch):
    """The operators call the Triton launchers for CPU tensors too, whose launches are noted here in place of running: (kernel, arguments).

    Of a tensor only the dtype is noted and of a float its type; an integer that is exempt from specialisation not at all.
    """
    pytest.importorskip("triton", reason="triton is not installed (it exists for Linux only)")
    noted = []

    class Recorder:
        def __init__(self, kernel):
            self.kernel = kernel

        def __getitem__(self, grid):
            def launch(*args, **constexprs):
                interpreted = getattr(self.kernel, "kwargs", {})
                exempt = interpreted.get("do_not_specialize") or getattr(self.kernel, "do_not_specialize", None) or ()
                given = dict(zip(self.kernel.arg_names, args, strict=False))
                kinds = {name: type(value) if isinstance(value, float) else getattr(value, "dtype", value) for name, value in given.items()}
                noted.append((self.kernel.fn.__name__, {name: kind for name, kind in kinds.items() if name not in exempt} | constexprs))

            return launch

    for op in audit.OPS:
        module = importlib.import_module(f"lightningdit_kernels.{op}_triton")
        for name, kernel in list(vars(module).items()):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(kernel))
    monkeypatch.setattr(native, "available", False)  # or the distance loss would take the gradient out of its forward
    with torch.library._scoped_library("lightningdit", "IMPL") as implementations:
        for name, function in library.CUDA.items():
            implementations.impl(name, function, "CPU", allow_override=True)
        yield noted


@each_op
def test_triton_compiles_once_for_any_batch(op, launches):
    """What triton specialises a kernel on is the same for every batch. And the launchers' tensors are those that the fakes promise."""
    function, found = fused if op == "rope_attention" else OPS[op], []
    for batch in (1, 3, 16):
        launches.clear()
        with Calls() as mode:
            values_and_gradients(function, inputs_of(op, batch), FROZEN)
        found.append(list(launches))
    assert len(found[0]) >= 2 and found[0] == found[1] == found[2]
    opcheck(mode.calls, test_utils=("test_schema", "test_faketensor"))


@each_op
def test_compiles_whole_and_once_for_any_batch(op, kernels_or_reference):
    """Forward and backward, with autocast and without; an op with a kernel stays an operator, one without is shown to the compiler."""
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(OPS[op], fullgraph=True, backend=frames)
    for batch in (5, 7, 9):  # sizes that no other dimension has: equal sizes would share one symbol
        for enabled in (False, True):

            def run(**inputs):
                for name in inputs.keys() & set(PER_SAMPLE):
                    torch._dynamo.mark_dynamic(inputs[name], 0)  # raises if anything specialises on the batch
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):  # noqa: B023
                    return compiled(**inputs)

            def eager(**inputs):
                with torch.autocast("cpu", torch.bfloat16, enabled=enabled):  # noqa: B023
                    return OPS[op](**inputs)

            got, expected = (values_and_gradients(f, inputs_of(op, batch), FROZEN) for f in (run, eager))
            assert_close(got, expected, **(dict(rtol=2e-2, atol=2e-2) if enabled else dict(rtol=1e-4, atol=1e-5)))
    assert frames.frame_count == 2, "one graph with autocast and one without"
    assert all(("lightningdit." in str(graph.graph)) == (kernels_or_reference or op == "alignment_losses") for graph in frames.graphs)


@each_op
def test_torch_compile_never_traces_what_serves_an_operator(op):
    """Where it gives up on a function, here for a break in a loop, it tries all that is called. Traced, native code lost its inputs."""
    torch._dynamo.reset()
    frames, calls = torch._dynamo.testing.CompileCounter(), calls_of(op).calls

    @torch.compile(backend=frames)
    def given_up():
        results = []
        for operator, arguments in calls:
            torch._dynamo.graph_break()
            results.append(operator(*arguments))
        return results

    with torch.no_grad():
        torch.testing.assert_close(given_up(), [operator(*arguments) for operator, arguments in calls], rtol=0, atol=0)
    assert calls and frames.frame_count == 0


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="torch.compile on CPU needs a C++ compiler")
def test_inductor_takes_all_ops_in_one_graph():
    names = [f"{op}.{name}" for op in OPS for name in inputs_of(op)]
    inputs = {f"{op}.{name}": value for op in OPS for name, value in inputs_of(op).items()}

    def every(*values):
        given = dict(zip(names, values, strict=True))
        outputs = [OPS[op](**{name.partition(".")[2]: given[name] for name in names if name.startswith(f"{op}.")}) for op in OPS]
        return tuple(value for output in outputs for value in (output if isinstance(output, tuple) else (output,)))

    frozen = tuple(name for name in names if name.endswith(tuple(f".{name}" for name in FROZEN)))
    torch._dynamo.reset()
    compiled = torch.compile(every, fullgraph=True)
    got, expected = (values_and_gradients(lambda f=f, **given: f(*given.values()), inputs, frozen) for f in (compiled, every))
    assert_close(got, expected, rtol=1e-5, atol=1e-6)


def layer(op):
    """The op between two functions that have something to recompute."""

    def function(*values, names):
        given = dict(zip(names, values, strict=True))
        outputs = OPS[op](**given | {names[0]: given[names[0]].sin()})
        return tuple(output.sin() for output in (outputs if isinstance(outputs, tuple) else (outputs,)))

    return function


def checkpointed(op, selective):
    def policy(ctx, operator, *args, **kwargs):
        keep = operator.namespace == "lightningdit"
        return checkpointing.CheckpointPolicy.MUST_SAVE if keep else checkpointing.CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(checkpointing.create_selective_checkpoint_contexts, policy)
    more = dict(context_fn=contexts) if selective else {}
    return lambda *values, names: checkpointing.checkpoint(functools.partial(layer(op), names=names), *values, use_reentrant=False, **more)


def trained(function, op):
    """Outputs and gradients of function, and how often the op's operators ran forward."""
    inputs = inputs_of(op)
    with Calls() as mode:
        values = values_and_gradients(lambda **given: function(*given.values(), names=tuple(given)), inputs, FROZEN)
    return values, mode.counts()


@each_op
def test_checkpointing_recomputes_the_op_unless_its_outputs_are_saved(op):
    if op == "rope_attention" and not native.available:
        pytest.skip("without the native library it is PyTorch's attention, not an operator of ours")
    expected, once = trained(layer(op), op)
    assert once and all(count == once[name] for name, count in once.items())
    for selective, times in ((False, 2), (True, 1)):
        values, counts = trained(checkpointed(op, selective), op)
        assert counts == {name: times * count for name, count in once.items()}
        assert all(torch.equal(values[name], value) for name, value in expected.items())


@each_op
def test_compiled_selective_checkpointing_gives_the_same_gradients(op):
    torch._dynamo.reset()
    values, _ = trained(layer(op), op)
    compiled = torch.compile(checkpointed(op, True), fullgraph=True, backend="aot_eager")
    got = values_and_gradients(lambda **given: compiled(*given.values(), names=tuple(given)), inputs_of(op), FROZEN)
    assert_close(got, values, rtol=1e-5, atol=1e-6)


@each_op
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_autocast(op, dtype, kernels_or_reference):
    """Activations of any dtype, parameters in fp32 (or all in fp64): results are as documented, gradients have their tensors' dtypes."""

    def inside(function):
        def call(**inputs):
            with torch.autocast("cpu", torch.bfloat16):
                return function(**inputs)

        return call

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    inputs = inputs_of(op, dtype=wide)
    inputs |= {name: inputs[name].to(dtype) for name in inputs.keys() & set(PER_SAMPLE)}
    ours = values_and_gradients(inside(OPS[op]), inputs, FROZEN)
    assert_within(ours, *truth_and_bounds(inside(DEFINITIONS[op]), inputs, FROZEN))
    result = wide if op in LOSSES or wide == torch.float64 else torch.bfloat16
    residual = {"out.0": dtype} if op.startswith("gated") else {}  # x' keeps the dtype of x
    for name, value in ours.items():
        source = name.partition("grad.")[2]
        assert value.dtype == (inputs[source].dtype if source else residual.get(name, result)), name


@each_op
def test_second_derivative_is_refused(op):
    if op == "rope_attention" and not native.available:
        pytest.skip("without the native library it is PyTorch's attention")
    inputs = inputs_of(op)
    leaf = next(iter(inputs.values())).requires_grad_()
    outputs = OPS[op](**inputs)
    (first,) = torch.autograd.grad(sum(o.sum() for o in outputs) if isinstance(outputs, tuple) else outputs.sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match=r"\w+ is differentiable once"):
        first.sum().backward()


class Layer(torch.nn.Module):
    """A linear layer into the op, whose parameters (what is not per sample) are the module's."""

    def __init__(self, op):
        super().__init__()
        inputs = inputs_of(op, batch=4)
        self.op, self.first = op, next(iter(inputs))
        self.stem = torch.nn.Linear(inputs[self.first].shape[-1], inputs[self.first].shape[-1])
        self.own = torch.nn.ParameterDict()
        self.data, self.constants = {}, {}
        for name, value in inputs.items():
            learned = isinstance(value, torch.Tensor) and value.is_floating_point() and name not in (*FROZEN, *PER_SAMPLE)
            (self.own if learned else self.data if name in PER_SAMPLE else self.constants)[name] = value

    def forward(self, samples):
        data = {name: value[samples] for name, value in self.data.items()}
        data[self.first] = self.stem(data[self.first])
        outputs = OPS[self.op](**data | self.constants | {name: self.own[name] for name in self.own})
        return objective(outputs if isinstance(outputs, tuple) else (outputs,))


def objective(outputs):
    """A mean over the samples, as the losses are: FSDP averages gradients over the ranks."""
    return sum(output.square().mean() if output.dim() else output for output in outputs)


SHARDED = """
import sys, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
sys.path.insert(0, sys.argv[1])
from test_ops import OPS, Layer, objective
from lightningdit.distributed import parallelise, process_group
from lightningdit.model import LightningDiT

class Model(LightningDiT):
    def forward(self, samples):
        generator = torch.Generator().manual_seed(0)
        x, t = torch.randn(4, 3, 4, 4, generator=generator), torch.rand(4, generator=generator)
        return objective([super().forward(x[samples], t[samples], torch.arange(4)[samples])])

def model(**more):
    flags = dict(use_qknorm=True, use_swiglu=True, use_rope=True, use_rmsnorm=True, wo_shift=True)
    return Model(input_size=4, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=4, class_dropout_prob=0, **flags, **more)

def make(name):
    torch.manual_seed(0)
    module = Layer(name) if name in OPS else model(use_checkpoint=name.endswith("recomputed"))
    for parameter in module.parameters():  # adaLN starts at zero, where branches and their biases do not count
        torch.nn.init.normal_(parameter, std=0.5) if name not in OPS else None
    return module

group = process_group(torch.device("cpu"))
group.__enter__()
rank, mesh = dist.get_rank(), dist.device_mesh.init_device_mesh("cpu", (2,))
for name in (*OPS, "LightningDiT", "LightningDiT recomputed"):
    whole, sharded = make(name), make(name)
    whole(slice(None)).backward()
    sharded = fully_shard(sharded, mesh=mesh) if name in OPS else parallelise(sharded, "fsdp", torch.device("cpu"))
    sharded(slice(2 * rank, 2 * rank + 2)).backward()
    compared = 0
    for (parameter, want), have in zip(whole.named_parameters(), sharded.parameters(), strict=True):
        if want.requires_grad:
            assert want.grad.any(), f"{name}: {parameter} gets no gradient"
            close = dict(rtol=1e-4, atol=1e-5 * want.grad.abs().max().item())  # other sizes of matrix products, other rounding
            torch.testing.assert_close(have.grad.full_tensor(), want.grad, **close, msg=lambda text: f"{name}, {parameter}: {text}")
            compared += 1
    if rank == 0:
        print("same gradients:", name, compared, flush=True)
group.__exit__(None, None, None)
"""


def test_fsdp2_over_two_processes_gives_the_gradients_of_one(tmp_path, script):
    """A module per op, and the whole model, where a bias of one block is added in the next one."""
    (tmp_path / "script.py").write_text(SHARDED)
    out = script(tmp_path / "script.py", Path(__file__).parent, processes=2).stdout
    same = [line.split()[2] for line in out.splitlines() if line.startswith("same gradients:")]
    assert same == [*OPS, "LightningDiT", "LightningDiT"], out


def test_kernels_are_launched_on_the_gpu_of_their_tensors(monkeypatch):
    """Triton launches on the current GPU; an operator must make that of its first tensor the current one, and put things back."""
    current = [0]

    class Guard:
        def __init__(self, tensor):
            self.index = tensor.index

        def __enter__(self):
            self.before, current[0] = current[0], self.index

        def __exit__(self, *error):
            current[0] = self.before

    class OnSecond(torch.Tensor):
        index = 1

        def get_device(self):
            return self.index

    tensor = torch.zeros(1).as_subclass(OnSecond)
    monkeypatch.setattr(torch.cuda, "device_of", Guard)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    launch = library._on_its_device(lambda *arguments: (current[0], arguments))
    assert launch(None, tensor, 1e-6) == (1, (None, tensor, 1e-6))
    assert current == [0]
    current[0] = 1
    monkeypatch.setattr(torch.cuda, "device_of", None)  # nothing is switched where it is the current one
    assert launch(None, tensor, 1e-6) == (1, (None, tensor, 1e-6))


def test_inputs_are_drawn_on_their_device(monkeypatch):
    """One thread of the host would take longer than the measurement."""
    drawn = []
    right = torch.randn
    monkeypatch.setattr(torch, "Generator", lambda device: types.SimpleNamespace(manual_seed=lambda seed: (device, seed)))
    monkeypatch.setattr(torch, "randn", lambda shape, generator, dtype, device: drawn.append((generator, device)) or right(shape))
    testing.random_tensor(4, seed=5, device="cuda")
    assert drawn == [(("cuda", 5), "cuda")]
