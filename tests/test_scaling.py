"""docs/scaling.md is what bench/scaling.py writes, and its formulas agree with sums by hand."""
from pathlib import Path

import pytest

from bench import scaling

ROOT = Path(__file__).resolve().parent.parent
XL = scaling.Model.xl()


def test_the_documented_table_is_the_present_one():
    assert (ROOT / "docs/scaling.md").read_text() == scaling.document()


def test_the_numbers_of_the_model():
    assert XL.train_flops == pytest.approx(711.76e9, rel=1e-4) and XL.trainable == pytest.approx(674.96e6, rel=1e-4) and XL.depth == 28
    forward, backward = scaling.compute_time(XL, 128)
    assert forward + backward == pytest.approx(128 * 711.76e9 / (0.5 * 989.5e12), rel=1e-4) and backward == pytest.approx(2 * forward)


def test_volumes_by_hand():
    gradients = 4 * 674.96e6
    assert scaling.ddp(XL, 8).inside == pytest.approx(2 * gradients * 7 / 8, rel=1e-4) and scaling.ddp(XL, 8).between == 0
    over_nodes = scaling.fsdp(XL, 64)
    assert over_nodes.inside + over_nodes.between == pytest.approx((2 + 2 + 4) * 674.96e6 * 63 / 64, rel=1e-4)
    assert over_nodes.between == pytest.approx(over_nodes.inside / 7)
    hybrid = scaling.hsdp(XL, 512)
    assert hybrid.between == pytest.approx(2 * (gradients / 8) * 63 / 64, rel=1e-4) and hybrid.inside == scaling.fsdp(XL, 8).inside
    assert scaling.hsdp(XL, 8) == scaling.fsdp(XL, 8)


def test_overlap_by_hand():
    """DDP on 8 GPUs: 4.72 GB at 315 GB/s are 15.0 ms, 103 buckets of 6 hops 1.9 ms; an image takes 0.959 ms backward."""
    traffic = scaling.ddp(XL, 8)
    assert 1e3 * traffic.backward == pytest.approx(15.0 + 1.9, abs=0.1)
    assert scaling.images_to_hide(XL, traffic) == 18
    assert scaling.efficiency(XL, traffic, 18) == 1 and scaling.efficiency(XL, traffic, 17) < 1
    assert scaling.efficiency(XL, traffic, 1) == pytest.approx(1.439 / (0.480 + 16.9), abs=0.002)
