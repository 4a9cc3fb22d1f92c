"""Calls that plans_triton plays back launch what the launcher launches: under the stand-in, with its launches and buffers in order."""

import pytest

# Prints {case: [whether the third call and the launcher itself launch the same on the same buffers, whether it was played back]},
# and what else it saw.
SCRIPT = """
import json
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher
from lightningdit_kernels import plans_triton
from lightningdit_kernels.attention_triton import rope_attention_bwd, rope_attention_fwd
from lightningdit_kernels.norm_triton import _norm_fwd_kernel, norm_bwd, norm_fwd
from lightningdit_kernels.swiglu_triton import swiglu_bwd, swiglu_fwd

launched, call = [], CudaLauncher.__call__

def noted(self, *arguments):
    launched.append((arguments[:5], arguments[9:]))
    return call(self, *arguments)

CudaLauncher.__call__ = noted

class Buffers(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.made = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **options or {})
        if function in plans_triton.BUFFERS:
            self.made.append(result)
        return result

def observed(function, arguments):
    "What is launched, addresses as (which argument) or (which buffer, offset), and the results, by buffer."
    launched.clear()
    with Buffers() as buffers:
        results = function(*arguments)
    inputs = {a.data_ptr(): f"argument {i}" for i, a in reversed([*enumerate(arguments)]) if isinstance(a, torch.Tensor)}

    def place(value):
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if type(address) is not int or address < 2**20:
            return repr(value)
        for i, buffer in enumerate(buffers.made):
            if buffer.data_ptr() <= address < buffer.data_ptr() + buffer.untyped_storage().nbytes():
                return f"buffer {i} + {address - buffer.data_ptr()}"
        return inputs.get(address, "unknown")

    calls = [(*map(str, first), *map(place, rest)) for first, rest in launched]
    results = results if isinstance(results, tuple) else (results,)
    shapes = [r if r is None else (place(r), r.shape, r.stride(), str(r.dtype)) for r in results]
    return calls, shapes, [(b.shape, b.stride(), str(b.dtype)) for b in buffers.made]

def new(*sizes, dtype=torch.bfloat16):
    return torch.empty(sizes, dtype=dtype, device="cuda")

FLOAT = torch.float32
cases = {}

def add(name, function, make):
    cases[name] = function, make

HALF = torch.bfloat16
for more, n in ((False, 256), (True, 64)):
    extra = lambda value, more=more: value if more else None
    adaln = lambda: new(4, 6 * 384).chunk(6, 1)

    def forward(extra=extra, more=more):
        gate, scale, shift, *_ = adaln()
        affine = new(384), extra(new(384))
        return new(4, 64, 384, dtype=FLOAT), new(4, 64, 384), gate, scale, extra(shift), *affine, 1e-6, more, HALF

    def backward(extra=extra):
        gate, scale, *_ = adaln()
        x, rstd = new(4, 64, 384, dtype=FLOAT), new(4, 64, 1, dtype=FLOAT)
        affine = new(384), extra(new(384))
        return extra(x), new(4, 64, 384), x.clone(), new(4, 64, 384), gate, scale, *affine, extra(rstd.clone()), rstd, HALF, extra(HALF)

    def parts(extra=extra, n=n):
        rope = [None, None] if n == 64 else [new(n, 2, dtype=FLOAT), new(18, dtype=FLOAT)]
        return *rope, extra(new(72)), extra(new(72)), None, None, extra(new(3, 2, 72, dtype=FLOAT)), 1e-6, False

    wide = lambda extra=extra: extra(new(512, dtype=FLOAT))
    qkv = lambda n=n: new(3, n, 3, 2, 72)
    out = lambda n=n: new(3, n, 144)
    add(f"norm forward {more}", norm_fwd, forward)
    add(f"norm backward {more}", norm_bwd, backward)
    add(f"swiglu forward {more}", swiglu_fwd, lambda wide=wide: (new(4, 64, 512), wide(), HALF))
    add(f"swiglu backward {more}", swiglu_bwd, lambda wide=wide: (new(4, 64, 256), new(4, 64, 512), wide()))
    add(f"attention forward {more}", rope_attention_fwd, lambda qkv=qkv, parts=parts: (qkv(), *parts(), HALF))
    add(f"attention backward {more}", rope_attention_bwd,
        lambda qkv=qkv, out=out, parts=parts, n=n: (out(), qkv(), out(), new(3, 2, n, dtype=FLOAT), *parts()))

found, kept = {}, []
for name, (function, make) in cases.items():
    for _ in range(2):
        function(*make())
    kept.append(new(1000))  # other addresses than those of the second call
    arguments = make()
    body = function.__wrapped__
    before = list(function.plans.values())[-1]
    found[name] = [observed(body, arguments) == observed(function, arguments), type(before) is plans_triton._Plan]
    assert not any("unknown" in line for one in observed(function, arguments)[0] for line in one), name

calls = []
def traced(*arguments):
    calls.append(1)
    return norm_fwd.__wrapped__(*arguments)
watched, make = plans_triton.planned(traced), cases["norm forward True"][1]
def bodies(arguments):
    before = len(calls)
    watched(*arguments)
    return len(calls) - before

seen = {"until planned": [bodies(make()) for _ in range(4)]}
first = make()
seen["misaligned"] = bodies((first[0], torch.empty(4 * 64 * 384 + 1, dtype=torch.bfloat16, device="cuda")[1:].view(4, 64, 384), *first[2:]))
seen["of the host"] = type(first)(a.cpu() if isinstance(a, torch.Tensor) else a for a in first)
try:
    bodies(seen["of the host"])
except Exception as error:
    seen["of the host"] = type(error).__name__
noted_launches = []
knobs.runtime.launch_enter_hook.add(noted_launches.append)
seen["hook"] = [bodies(make()), len(noted_launches)]
knobs.runtime.launch_enter_hook.remove(noted_launches.append)
_norm_fwd_kernel.pre_run_hooks.append(hook := lambda *arguments, **options: noted_launches.append("pre"))
seen["hook before a launch"] = [bodies(make()), noted_launches[-1]]
_norm_fwd_kernel.pre_run_hooks.remove(hook)
seen["other eps"] = [bodies((*make()[:7], eps, True, torch.bfloat16)) for eps in (0.0, 0.0, 0.0, -0.0)]
seen["one tensor twice"] = [bodies((*(a := make())[:6], a[5] if twice else a[6], 0.5, True, HALF)) for twice in (1, 1, 1, 0, 0, 1)]
most, plans_triton.MOST_PLANS = plans_triton.MOST_PLANS, 3
for eps in range(1, 20):
    bodies((*make()[:7], eps / 100, True, torch.bfloat16))
seen["plans"] = len(watched.plans)

twice = plans_triton.planned(lambda x: (x.new_empty(3), x.new_empty(3), x.new_empty(0), x.new_empty(0)))
for _ in range(3):
    results = twice(first[0])
seen["distinct results"] = len({id(result) for result in results})
computes = plans_triton.planned(lambda x: (x + 1,))
for _ in range(3):
    computes(first[0])
seen["computes"] = list(computes.plans.values())[0]
def copies(x):
    y = x.contiguous()
    swiglu_fwd.__wrapped__(y, None, HALF)
    del y
    return swiglu_fwd.__wrapped__(x.new_empty(x.shape), None, HALF)
copying = plans_triton.planned(copies)
with torch.inference_mode():  # and below autograd
    for _ in range(3):
        copying(new(512, 2, 64).permute(1, 2, 0))
seen["copies"] = list(copying.plans.values())[0]
inside = plans_triton.planned(lambda x: swiglu_fwd.__wrapped__(x[1:], None, torch.bfloat16))
for _ in range(3):
    inside(new(2, 64, 512))
seen["a part of an argument"] = list(inside.plans.values())[0]
print(json.dumps([found, seen]))
"""


@pytest.fixture(scope="module")
def printed(probe):
    return probe(SCRIPT, LIGHTNINGDIT_AUTOTUNE="0")


def test_what_is_played_back_is_what_the_launcher_does(printed):
    assert len(printed[0]) == 12
    assert {case: outcome for case, outcome in printed[0].items() if outcome != [True, True]} == {}


def test_the_launcher_is_called_twice(printed):
    assert printed[1]["until planned"] == [1, 1, 0, 0]


def test_what_is_out_of_the_ordinary_is_left_to_the_launcher(printed):
    seen = printed[1]
    assert seen["misaligned"] == 1
    assert seen["of the host"] == "ValueError"
    assert seen["hook"] == [1, 1]
    assert seen["hook before a launch"] == [1, "pre"]
    assert seen["other eps"] == [1, 1, 0, 1]
    assert seen["one tensor twice"] == [1, 1, 1, 1, 0, 0]  # the addresses of two arguments must differ


def test_plans_are_not_kept_without_end(printed):
    assert printed[1]["plans"] <= 3


def test_no_two_results_are_one(printed):
    assert printed[1]["distinct results"] == 4


def test_what_no_plan_can_have_gets_none(printed):
    got = {printed[1][name] for name in ("computes", "copies", "a part of an argument")}
    assert got == {"the launcher does what no plan can have"}
