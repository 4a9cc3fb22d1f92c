"""torch.compile's graphs launch what our operators launch, and nothing else: under the stand-in, which lists launches."""

import shutil

import pytest

from rehearsal.conftest import KERNELS

PREAMBLE = """
import json, os
import torch
import lightningdit_kernels as ops
from lightningdit_kernels import tuning

FLOAT, HALF = torch.float32, torch.bfloat16
torch.zeros(1, device="cuda")  # opens the list
listed = open(f"{os.environ['STAND_IN_TRACE']}.{os.getpid()}")

def launches(function):
    "[grid, block and bytes of shared memory, name] of each kernel of function()."
    listed.read()
    function()
    lines = [line.split() for line in listed.read().splitlines()]
    return [[" ".join(line[2:-1]), line[-1]] for line in lines if line[1] == "kernel"]

def new(*sizes, dtype=HALF, grad=True):
    return torch.empty(sizes, dtype=dtype, device="cuda").requires_grad_(grad)
"""

# Prints {case: [launches in eager mode, launches of a graph]}.
LAUNCHES = (
    PREAMBLE
    + """
cases = {}
def add(name, function, *arguments, **options):
    tensors = [a for a in (*arguments, *options.values()) if isinstance(a, torch.Tensor) and a.requires_grad]

    def forward():
        results = function(*arguments, **options)
        return results if isinstance(results, tuple) else (results,)

    grads = [torch.empty_like(result) for result in forward()]
    cases[name] = forward, lambda results: torch.autograd.grad(results, tensors, grads)

x, y, weight, bias = new(4, 64, 384, dtype=FLOAT), new(4, 64, 384), new(384, dtype=FLOAT), new(384, dtype=FLOAT)
gate, scale, shift = (new(4, 384) for _ in range(3))
add("norm", ops.rms_norm_modulate, x.to(HALF), scale, center=True)
add("gated norm", ops.gated_residual_rms_norm_modulate, x, y, gate, scale, shift, weight, bias=bias)
for n, head_dim, norm in ((256, 72, False), (1024, 64, True)):
    qkv, bias = new(2, n, 3, 2, head_dim), new(3, 2, head_dim, dtype=FLOAT)
    rope = dict(positions=new(n, 2, dtype=FLOAT, grad=False), freqs=new(head_dim // 4, dtype=FLOAT, grad=False))
    weights = {f"{which}_weight": new(head_dim, dtype=FLOAT) for which in "qk"} if norm else {}
    add(f"attention {n}", ops.rope_attention, qkv, **rope, **weights, bias=bias, backend="triton")
add("swiglu", ops.swiglu, new(4, 64, 512), new(512, dtype=FLOAT))
add("group norm", ops.group_norm_silu, new(2, 64, 16, 16), new(64, dtype=FLOAT), new(64, dtype=FLOAT), 32)
z, f = new(2, 64, 32), new(2, 64, 32, grad=False)
add("cosine", ops.marginal_cosine_loss, z, f, 0.5)
add("distance", ops.marginal_distance_matrix_loss, z, f, 0.25)
out = {}
for name, (forward, backward) in cases.items():
    for _ in range(3):
        eager = launches(lambda: backward(forward()))
    compiled = torch.compile(forward, fullgraph=True)
    backward(compiled())
    out[name] = [eager, launches(lambda: backward(compiled()))]
print(json.dumps(out))
"""
)

# Prints {case: launches of a graph}, and for one of them what it launched first.
MORE = (
    PREAMBLE
    + """
import sys, threading
sys.path.append(os.environ["REPOSITORY"])
from lightningdit.model import LightningDiT

out = {}
swiglu = torch.compile(ops.swiglu, dynamic=True)
for batch in (2, 3, 5):
    swiglu(new(batch, 64, 512))
    out[f"batch {batch}"] = launches(lambda: swiglu(new(batch, 64, 512))), launches(lambda: ops.swiglu(new(batch, 64, 512)))

def second_is_fastest(op, runs, rounds=20):
    for run in runs.values():
        run()
    return {name: 1.0 if i == 1 else 2.0 for i, name in enumerate(runs)}

tuning.time_candidates = second_is_fastest
torch.manual_seed(1)
random = torch.cuda.get_rng_state()
norm = torch.compile(ops.rms_norm_modulate)
arguments = new(2, 32, 512), new(2, 512)[:1].expand(2, 512)
norm(*arguments)
out["chosen"] = launches(lambda: norm(*arguments)), launches(lambda: ops.rms_norm_modulate(*arguments))
out["random numbers"] = [torch.equal(random, torch.cuda.get_rng_state())]

rope = dict(positions=new(64, 2, dtype=FLOAT, grad=False), freqs=new(18, dtype=FLOAT, grad=False))
attention = torch.compile(lambda qkv: ops.rope_attention(qkv, **rope, backend="triton"))
out["timed attention"] = launches(lambda: attention(new(2, 64, 3, 2, 72, grad=False)))

def fails(*arguments, **options):
    raise torch.OutOfMemoryError

drawn, torch.randn = torch.randn, fails
torch._dynamo.reset()
other = new(2, 32, 256), new(2, 256)
norm(*other)
out["no memory to time"] = launches(lambda: norm(*other))
torch.randn = drawn

def peak_bytes(function):
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before

def attend(qkv):
    return ops.rope_attention(qkv * 2, backend="triton")

qkv, compiled = new(2, 1024, 3, 2, 64), torch.compile(attend)
with torch.no_grad():
    compiled(qkv)
    out["bytes"] = peak_bytes(lambda: compiled(qkv)), peak_bytes(lambda: attend(qkv)), qkv.nbytes
tags = []
thread = threading.Thread(target=lambda: (torch.compile(ops.swiglu)(new(4, 64, 512)), tags.append(torch.compiler.config.cache_key_tag)))
thread.start()
thread.join()
out["tags"] = [*tags, torch.compiler.config.cache_key_tag]

for policy in ("selective", "full"):
    torch._dynamo.reset()
    with torch.device("cuda"):
        model = LightningDiT(input_size=8, patch_size=1, in_channels=4, hidden_size=128, depth=1, num_heads=2, num_classes=10,
            use_rope=True, use_swiglu=True, use_rmsnorm=True, use_checkpoint=True, checkpoint_policy=policy).train()
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = "triton"
    model.blocks[0].compile(fullgraph=True)

    def step():
        with torch.autocast("cuda", torch.bfloat16):
            found = model(new(2, 4, 8, 8, dtype=FLOAT), new(2, dtype=FLOAT, grad=False), torch.zeros(2, dtype=torch.long, device="cuda"))
        found.sum().backward()

    step()
    out[policy] = launches(step)
print(json.dumps(out))
"""
)

# Prints the launches of a graph, and how many of two compilations found it on disk.
CACHED = (
    PREAMBLE
    + """
from torch._dynamo.utils import counters

packed = new(4, 64, 512, grad=False)
for _ in range(2):
    torch._dynamo.reset()
    compiled = torch.compile(ops.swiglu)
    compiled(packed)
print(json.dumps([launches(lambda: compiled(packed)), counters["aot_autograd"]["autograd_cache_hit"]]))
"""
)


@pytest.fixture(scope="module")
def lists(tmp_path_factory):
    return {"STAND_IN_TRACE": str(tmp_path_factory.mktemp("launches") / "list")}


@pytest.fixture(scope="module")
def launches(probe, lists):
    return probe(LAUNCHES, LIGHTNINGDIT_AUTOTUNE="0", **lists)


@pytest.fixture(scope="module")
def more(probe, lists):
    return probe(
        MORE, REPOSITORY=str(KERNELS.parent), XDG_CACHE_HOME=lists["STAND_IN_TRACE"], **lists
    )


def ours(launches):
    """Those of kernels of this project: PyTorch's own are mangled, Inductor's are triton_..."""
    return [
        launch
        for launch in launches
        if launch[1].startswith("_") and not launch[1].startswith("_Z")
    ]


def test_a_graph_launches_what_the_operator_does(launches):
    assert len(launches) == 8
    assert {case: both for case, both in launches.items() if ours(both[0]) != ours(both[1])} == {}
    assert [case for case, both in launches.items() if len(ours(both[0])) < 2] == []


def test_a_graph_launches_nothing_else(launches):
    """Neither a copy of a buffer nor one of an argument: as many of PyTorch's as in eager mode, or fewer."""
    others = {case: [len(one) - len(ours(one)) for one in both] for case, both in launches.items()}
    assert {case: counts for case, counts in others.items() if counts[1] > counts[0]} == {}


@pytest.mark.parametrize("case", ["batch 2", "batch 3", "batch 5", "chosen"])
def test_a_graph_has_the_same_grid_and_tile(more, case):
    graph, eager = more[case]
    assert graph == eager


def test_the_fastest_tile_is_in_the_graph(more):
    """The second candidate, of 4 warps; the first has 2."""
    (launch,) = more["chosen"][0]
    assert launch[0].split()[3] == "128"


def test_attention_is_timed_with_its_table(more):
    """Its lines are addresses: of a table that nobody wrote they may be any."""
    names = [name for _, name in more["timed attention"]]
    assert names.index("_rope_table_kernel") < names.index("_rope_attention_fwd_kernel")
    assert names.count("_rope_attention_fwd_kernel") > 3  # of each candidate, and of the graph


def test_a_graph_gets_no_tile_for_want_of_memory(more):
    """PyTorch would keep it on disk. Called as it is, the operator times its tiles when there is memory: the second has 2 warps."""
    (launch,) = more["no memory to time"]
    assert launch[0].split()[3] == "64"


def test_what_is_absent_takes_no_memory(more):
    """Inductor stores a value once for every argument that it is: here for the prologue and for the attention."""
    graph, eager, qkv = more["bytes"]
    assert graph <= eager + 1.1 * qkv


def test_every_thread_tags_its_graphs(more):
    first, second = more["tags"]
    assert first == second
    assert "lightningdit_kernels/" in first


def test_choosing_tiles_draws_no_random_numbers(more):
    assert more["random numbers"] == [True]


@pytest.mark.parametrize(("policy", "count"), [("selective", 1), ("full", 2)])
def test_what_checkpointing_keeps_is_launched_once(more, policy, count):
    names = [name for _, name in more[policy]]
    assert names.count("_rope_attention_fwd_kernel") == count
    assert names.count("_swiglu_fwd_kernel") == 2


def test_a_graph_on_disk_is_that_of_its_sources(probe, lists, tmp_path):
    """Other kernels do not get the graph that was compiled with these."""
    launched = [["32 1 1 32 1 1 0", "_swiglu_fwd_kernel"]]
    options = {"LIGHTNINGDIT_AUTOTUNE": "0", **lists}
    assert probe(CACHED, **options) == [launched, 1]
    shutil.copytree(KERNELS, tmp_path / "kernels")
    source = tmp_path / "kernels" / "lightningdit_kernels" / "swiglu_triton.py"
    text = source.read_text(encoding="utf-8")
    assert "256: 1," in text  # warps of a program by its columns
    source.write_text(text.replace("256: 1,", "256: 2,"), encoding="utf-8")
    launched = [["32 1 1 64 1 1 0", "_swiglu_fwd_kernel"]]
    assert probe(CACHED, PYTHONPATH=str(tmp_path / "kernels"), **options) == [launched, 1]
