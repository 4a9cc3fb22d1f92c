"""The traffic counter against arithmetic, on kernels of which every byte is known."""

import importlib.util
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from lightningdit_kernels import interpreter, traffic

pytestmark = pytest.mark.skipif(not interpreter.is_on(), reason="kernels are compiled here")
PROBES = str(Path(__file__).with_name("probes_triton.py"))


def probes():
    return traffic.load_module(PROBES)


def counted(launch, reads, **rest):
    return traffic.measure(PROBES, dict(name="probe", launch=launch, reads=reads, **rest))


def copied(size, out_size=None, offset=0, stride=1, dtype=torch.float32, programs=64, block=64):
    """The copy of `size` elements, beginning `offset` elements into a tensor."""
    x = torch.zeros(offset + size * stride, dtype=dtype)[offset:]
    out = torch.zeros(out_size or size, dtype=dtype)
    grid = (-(-size // block),)

    def launch():
        probes()._copy_kernel[grid](x, out, size, stride, BLOCK=block, num_warps=4, num_stages=1)
        return out

    measurement = counted(launch, (x[::stride],), programs=programs)
    assert torch.equal(
        out[: min(programs * block, size)], x[::stride][: min(programs * block, size)]
    )
    return measurement


def numbers(measurement):
    (launch,) = measurement.launches
    return launch.asked, launch.l2, launch.dram


@pytest.mark.parametrize("programs", [1, 3, 64])
def test_a_copy_moves_every_byte_once_however_few_programs_are_counted(programs):
    measurement = copied(1024, programs=programs)
    assert measurement.least == 2 * 4096
    assert numbers(measurement) == (8192, 8192, 8192)


def test_masked_elements_are_not_moved():
    measurement = copied(100)  # two programs, 28 of whose elements are masked
    assert numbers(measurement) == (800, 2 * 13 * 32, 2 * 13 * 32)
    assert measurement.launches[0].stored == 2 * 64 * 4


def test_an_unaligned_access_touches_one_more_sector():
    x_and_out = numbers(copied(64, offset=1))
    assert x_and_out == (512, (9 + 8) * 32, (9 + 8) * 32)


def test_an_element_that_lies_in_two_sectors_counts_in_both():
    x = torch.zeros(16)
    assert x.data_ptr() % 32 == 0
    counter = traffic._Counter(PROBES)
    counter.begin(probes()._copy_kernel, 1, dict(x=x, out=x, size=16, stride=1, BLOCK=1), {})
    counter.access("load", np.array([x.data_ptr() + 28], dtype=np.uint64), np.array([True]), 8)
    assert counter.totals["l2"] == 64


def test_a_strided_read_moves_more_than_it_asks_for():
    asked, l2, dram = numbers(copied(64, stride=8))
    assert asked == 512
    assert l2 == dram == 64 * 32 + 8 * 32


def test_the_order_of_arguments_and_their_bytes():
    (launch,) = copied(1024, dtype=torch.bfloat16).launches
    assert launch.arguments == {("load", "x"): 2048, ("store", "out"): 2048}
    assert launch.signature == dict(x="*bf16", out="*bf16", size="i32")
    assert launch.constexprs == dict(stride=1, BLOCK=64)
    assert launch.divisible == ("x", "out", "size")


def test_an_access_outside_of_the_arguments_is_an_error():
    with pytest.raises(ValueError, match="store outside of its arguments"):
        copied(64, out_size=32)


def test_loops_products_and_operators_are_counted():
    x, table, out = torch.zeros(40 * 16), torch.zeros(16), torch.zeros(16)

    def loop():
        probes()._loop_kernel[(1,)](x, table, out, 640, stride=1, BLOCK=16)
        return out.sum()

    measurement = counted(loop, (x, table))
    assert measurement.launches[0].trips == (40,)
    assert measurement.torch == {"sum": (1, 64 + 4)}

    a, b, c = (
        torch.zeros(16, 64, dtype=torch.bfloat16),
        torch.zeros(64, 32, dtype=torch.bfloat16),
        torch.zeros(16, 32),
    )

    def product():
        probes()._product_kernel[(1,)](a, b, c, M=16, N=32, K=64)
        return c

    assert counted(product, (a, b)).launches[0].flop == 2 * 16 * 32 * 64


def test_a_launch_without_programs_moves_nothing():
    x = torch.zeros(64)

    def launch():
        probes()._copy_kernel[(0,)](x, x, 64, 1, BLOCK=64)

    assert counted(launch, (x,)).launches == ()


def ratios(measurement, name):
    return [getattr(launch, name) / measurement.least for launch in measurement.launches]


def few_and_all(op, few, launch, reads, **rest):
    """The same launches with `few` of each interpreted, and with all of them."""
    workload = dict(name="probe", launch=launch, reads=reads, **rest)
    return [traffic.measure(op, workload | dict(programs=programs)) for programs in (few, 1000)]


@pytest.mark.parametrize("step", ["forward", "backward"])
def test_few_programs_stand_for_all_of_the_norm(step):
    """The modulation of a sample is shared by some of them, the weight by all."""
    norm_triton, shape = traffic.load_module("norm"), (6, 32, 160)
    x, y = torch.zeros(shape), torch.zeros(shape, dtype=torch.bfloat16)
    gate, scale, shift = torch.zeros(6, 960, dtype=y.dtype).chunk(6, 1)[:3]
    weight, bias, rstd = torch.zeros(160), torch.zeros(160), torch.zeros(6, 32, 1)
    if step == "forward":
        function, arguments = norm_triton.norm_fwd, (x, y, gate, scale, shift, weight, bias)
        rest = (1e-6, False, y.dtype)
    else:
        function, arguments = (
            norm_triton.norm_bwd,
            (x, y, x, y, gate, scale, weight, bias, None, rstd),
        )
        rest = (y.dtype, y.dtype)
    programs = 2 if step == "forward" else 6  # of the sums, as many of each of their three kinds
    few, every = few_and_all("norm", programs, lambda: function(*arguments, *rest), arguments)
    assert every.launches[0].programs in (12, 48)
    trips = [[launch.trips for launch in measurement.launches] for measurement in (few, every)]
    assert trips[0] == trips[1]
    for name in ("asked", "l2", "dram", "stored"):
        assert ratios(few, name) == pytest.approx(ratios(every, name), rel=1e-9), name


def test_two_heads_of_attention_stand_for_all():
    """All read the same few lines of the table of rotations; the rest of it is counted too."""
    index = torch.arange(16, dtype=torch.float32)
    positions = torch.cartesian_prod(index, index)[:128]
    qkv = torch.zeros(2, 128, 3, 4, 24, dtype=torch.bfloat16)
    bias, freqs = torch.zeros(3, 4, 24), torch.ones(6)
    few, every = few_and_all(
        "attention",
        4,
        lambda: traffic.load_module("attention").rope_attention_fwd(
            qkv, positions, freqs, None, None, None, None, bias, 1e-6, False, qkv.dtype
        ),
        (qkv, bias),
        whole=("_rope_table_kernel",),
    )
    assert every.launches[-1].programs == 2 * 4 * 2
    for name in ("asked", "l2", "stored"):
        assert ratios(few, name) == pytest.approx(ratios(every, name), rel=1e-9), name
    table = 128 * 24 * 2 / every.least
    assert ratios(every, "dram")[-1] <= ratios(few, "dram")[-1] <= ratios(every, "dram")[-1] + table


@pytest.mark.parametrize("images", [1, 3])
def test_images_do_not_change_the_ratios_of_the_losses(images):
    listed = traffic.workloads_of("alignment", images=images)
    workload = next(w for w in listed if w["name"] == "cosine loss backward bf16")
    measurement = traffic.measure("alignment", workload)
    assert ratios(measurement, "dram") == pytest.approx([1.0], abs=1e-4)
    assert ratios(measurement, "l2") == pytest.approx([5 / 3], abs=1e-2)


def test_another_configuration_is_launched():
    workload = next(
        w for w in traffic.workloads_of("swiglu", tokens=1024) if w["name"] == "swiglu forward"
    )
    (plain,) = traffic.measure("swiglu", workload).launches
    changes = traffic.Changes(blocks=(4,), num_warps=8, num_stages=2)
    (changed,) = traffic.measure("swiglu", workload, changes).launches
    assert (plain.blocks, plain.options) == (dict(ROWS=2), dict(num_warps=4, num_stages=1))
    assert (changed.blocks, changed.options) == (dict(ROWS=4), dict(num_warps=8, num_stages=2))
    assert changed.trips[0] == plain.trips[0] / 2
    assert plain.case is not None and changed.case is None
    with pytest.raises(IndexError, match="has 3 configurations"):
        traffic.measure("swiglu", workload, traffic.Changes(candidate=3))
    with pytest.raises(ValueError, match="tile is 4,4, expected 1 sizes: ROWS"):
        traffic.measure("swiglu", workload, replace(changes, blocks=(4, 4)))


@pytest.mark.parametrize("op", ["norm", "swiglu", "attention"])
def test_training_launches_what_the_audit_compiles(op):
    """At a small size, which changes only grids: each launch has its case."""
    for workload in traffic.workloads_of(op, tokens=1024):
        if "backward" not in workload["name"]:  # the audit itself looks at all of them
            launches = traffic.measure(op, workload | dict(programs=1)).launches
            assert [launch.kernel for launch in launches if launch.case is None] == [], workload[
                "name"
            ]


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--op", "nrom"], "--op is 'nrom', expected one of swiglu"),
        (["--op", "nowhere.py"], "--op is 'nowhere.py'"),
        (["--tokens", "1000"], "--tokens is 1000, expected a positive multiple of 1024"),
        (["--images", "0"], "--images is 0, expected at least 1"),
        (["--head-dim", "70"], "--head-dim is 70, expected a multiple of 8"),
        (["--tile", "128,x"], "--tile is '128,x', expected powers of two"),
        (["--warps", "3"], "--warps is 3, expected a power of two"),
        (["--stages", "0"], "--stages is 0"),
    ],
)
def test_bad_arguments_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit):
        traffic.main(flags)
    assert said in capsys.readouterr().err


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_command_prints_each_argument():
    package = Path(traffic.__file__).parents[1]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "lightningdit_kernels.traffic",
        "--op",
        "swiglu",
        "--case",
        "forward",
        "--tokens",
        "1024",
    ]
    environment |= {"PYTHONPATH": str(package)}
    done = subprocess.run(
        [*command, "--by-argument"], capture_output=True, text=True, env=environment, check=True
    )
    rows = [line.split() for line in done.stdout.splitlines()]
    assert ["load", "packed", "12.58"] in rows
    assert ["store", "out", "6.29"] in rows


def test_a_case_compiles_no_launch_that_is_less_divisible():
    cases = traffic.cases_of("swiglu")
    case = next(case for case in cases if traffic.ARCH in case.get("archs", (traffic.ARCH,)))
    spec = {name: case[name] for name in ("signature", "constexprs", "divisible")}
    spec["options"] = {name: case[name] for name in ("num_warps", "num_stages")}
    assert traffic.case_of(cases, case["kernel"], spec) == case["name"]
    less = spec | dict(divisible=case["divisible"][1:])  # its first pointer
    assert traffic.case_of(cases, case["kernel"], less) is None
