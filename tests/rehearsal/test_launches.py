"""Launches that launch_triton prepares are those of Triton: under the stand-in, whose driver is asked for neither."""

import pytest

# Launches each case by Triton, then twice by the prepared function, and prints {case: [what reached
# the launcher is the same, how many of the two launches Triton's binder saw]}, and what else it saw.
SCRIPT = """
import json
import torch, triton, triton.language as tl
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from lightningdit_kernels import launch_triton
from lightningdit_kernels.launch_triton import fast_launch

CONSTANT = tl.constexpr(3)

@fast_launch
@triton.jit(do_not_specialize=["n"])
def kernel(x, y, n, stride, factor, EPS: tl.constexpr, SHAPE: tl.constexpr, FLAG: tl.constexpr = 0):
    value = tl.load(x + tl.program_id(0) * stride) * factor + EPS + SHAPE[0] + CONSTANT
    if FLAG == 1:
        value += n
    if y is not None:
        tl.store(y, value)
    tl.store(x, value)

reached, bound = [], []
call, run = CudaLauncher.__call__, triton.JITFunction.run

def noted_call(self, *arguments):
    grid_stream_function, metadata, rest = arguments[:5], arguments[5], arguments[9:]
    rest = [a.data_ptr() if isinstance(a, torch.Tensor) else repr(a) if a is not None else None for a in rest]
    rest = [repr(a) for a in rest]
    reached.append((grid_stream_function, metadata, [a.strip("'") for a in rest]))
    return call(self, *arguments)

def noted_run(self, *arguments, **options):
    bound.append(self)
    return run(self, *arguments, **options)

CudaLauncher.__call__, triton.JITFunction.run = noted_call, noted_run

def ordinary(grid, arguments, constants):
    reached.clear()
    triton.JITFunction.run(kernel, *arguments, grid=grid, warmup=False, **constants)
    (last,) = reached
    return last

def prepared(grid, arguments, constants):
    reached.clear(), bound.clear()
    kernel[grid](*arguments, **constants)
    (last,) = reached
    return last, len(bound)

def raised(function):
    try:
        function()
    except Exception as error:
        return type(error).__name__
    return ""

x, y = torch.zeros(64, device="cuda"), torch.zeros(64, device="cuda")
half, parameter = x.bfloat16(), torch.nn.Parameter(x, requires_grad=False)
side = torch.cuda.Stream()
base, options = [x, y, 5, 7, 1.5], dict(EPS=1e-6, SHAPE=(1, 2))
cases = {"base": ((1,), base, options)}

def case(name, grid=(1,), changes=None, **constants):
    arguments = [(changes or {}).get(i, a) for i, a in enumerate(base)]
    cases[name] = (grid, arguments, options | constants)

case("address that is no multiple of 16", changes={0: x[1:]})
case("address that is one again", changes={0: x[4:]})
case("two addresses, one of them no multiple", changes={1: y[3:]})
case("bf16", changes={0: half})
case("bf16 no multiple", changes={0: half[1:]})
case("two dtypes", changes={1: half})
case("parameter", changes={0: parameter})
case("none", changes={1: None})
case("empty", changes={1: y[:0]})
for n in (1, 16, 2**31 - 1, 2**31, 2**63, -1):
    case(f"n {n}", changes={2: n})
for stride in (0, 1, 2, 16, 17, 2**31, 2**33 + 1, True):
    case(f"stride {stride!r}", changes={3: stride})
for factor in (0.0, -0.0, 1.0, 1):
    case(f"factor {factor!r}", changes={4: factor})
for eps in (0.0, -0.0, 0, 1.0, 1, True):
    case(f"eps {eps!r}", EPS=eps)
for shape in ((True, 2), (1.0, 2), (1, 2, 3), (1, (2, 3)), (1, (2.0, 3))):
    case(f"shape {shape}", SHAPE=shape)
for flag in (0, 1, True, 1.0):
    case(f"flag {flag!r}", FLAG=flag)
case("warps", num_warps=2)
case("warps and stages", num_warps=2, num_stages=2)
case("stages and warps", num_stages=2, num_warps=2)
case("plain product", enable_fp_fusion=False)
case("grid of two", grid=(2, 3))
case("grid of three", grid=(2, 3, 4))
case("list", grid=[2, 3])

found = {}
for turn in range(2):  # in another order the second time: a case may not meet the variant of another
    for name, (grid, arguments, constants) in reversed(cases.items()) if turn else cases.items():
        expected = ordinary(grid, arguments, constants)
        (first, _), (second, _) = (prepared(grid, arguments, constants) for _ in range(2))
        count = prepared(grid, arguments, constants)[1]
        found[f"{name}, turn {turn}"] = [expected == first == second, count]
with torch.cuda.stream(side):
    found["stream"] = [ordinary((1,), base, options) == prepared((1,), base, options)[0], len(bound)]

def run_of(grid=(1,), arguments=base, constants=options):
    return prepared(grid, arguments, constants)[1]

seen = {"nothing": run_of()}
host = torch.zeros(64)
seen["tensor of the host"] = raised(lambda: kernel[(1,)](host, *base[1:], **options))
for place in (0, 1):
    mixed = [host if i == place else a for i, a in enumerate(base)]
    seen[f"tensor of the host at {place}"] = raised(lambda: kernel[(1,)](*mixed, **options))
noted = []
for hook in (knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook):
    hook.add(noted.append)
    seen.setdefault("hooks", []).append([run_of(), len(noted)])
    hook.remove(noted.append)
with knobs.runtime.scope():
    knobs.runtime.debug = True
    seen["debug"] = run_of()
with knobs.compilation.scope():
    knobs.compilation.disable_line_info = True
    seen["compilation"] = run_of()
hook = lambda *arguments, **options: noted.append("pre")
kernel.pre_run_hooks.append(hook)
seen["pre-run hook"] = [run_of(), noted[-1]]
kernel.pre_run_hooks.clear()
CONSTANT, kept = tl.constexpr(4), CONSTANT
seen["changed global"] = raised(run_of)
CONSTANT = kept
seen["unchanged global"] = run_of()
device, current = launch_triton._device, launch_triton._current_device
launch_triton._device = lambda tensor: 1
seen["tensors of another GPU"] = [run_of(), run_of()]
launch_triton._current_device = lambda: 1
seen["second GPU"] = run_of()
launch_triton._device, launch_triton._current_device = device, current
seen["first GPU"] = run_of()
most, launch_triton.MOST_VARIANTS = launch_triton.MOST_VARIANTS, 8
for n in range(100, 200):
    run_of(arguments=[x, y, n, 7, 1.5])
seen["variants"] = max(len(layout.variants) for layout in kernel.layouts.values() if layout)
launch_triton.MOST_VARIANTS, seen["bytes"] = most, []
for n in (300, 300, 301):
    before = torch.cuda.memory_allocated()
    run_of(arguments=[torch.zeros(2**20, device="cuda"), y, n, 7, 1.5])
    seen["bytes"].append(torch.cuda.memory_allocated() - before)
print(json.dumps([found, seen]))
"""


@pytest.fixture(scope="module")
def printed(probe):
    return probe(SCRIPT)


def test_the_launcher_gets_what_triton_gives_it(printed):
    assert {case for case, (same, _) in printed[0].items() if not same} == set()


def test_a_prepared_launch_is_not_bound_again(printed):
    """Of aligned tensors: what is left to Triton is bound every time."""
    again = {case.rpartition(",")[0] for case, (_, bound) in printed[0].items() if bound}
    assert again == {
        "address that is no multiple of 16",
        "two addresses, one of them no multiple",
        "bf16 no multiple",
        "list",
    }


def test_what_triton_must_see_it_sees(printed):
    seen = printed[1]
    assert seen["nothing"] == 0
    assert seen["hooks"] == [[1, 1], [1, 2]]
    assert seen["debug"] == 1
    assert seen["compilation"] == 1
    assert seen["pre-run hook"] == [1, "pre"]


def test_a_tensor_of_the_host_is_refused(printed):
    names = ["tensor of the host", "tensor of the host at 0", "tensor of the host at 1"]
    assert [printed[1][name] for name in names] == ["ValueError"] * 3


def test_a_changed_global_is_refused(printed):
    assert printed[1]["changed global"] == "RuntimeError"
    assert printed[1]["unchanged global"] == 0


def test_every_gpu_has_its_own_variants(printed):
    assert printed[1]["tensors of another GPU"] == [1, 1]
    assert printed[1]["second GPU"] == 1
    assert printed[1]["first GPU"] == 0


def test_variants_are_not_kept_without_end(printed):
    assert printed[1]["variants"] <= 8


def test_no_tensor_is_kept(printed):
    """A variant keeps what launches it, not what it was launched with first."""
    assert printed[1]["bytes"] == [0, 0, 0]
