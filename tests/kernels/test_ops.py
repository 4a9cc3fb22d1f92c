"""What holds for every op: torch.compile takes it whole, once, for any batch, under autocast too."""

import pytest
import torch
import torch._dynamo.testing
from torch.utils import _pytree as pytree

from lightningdit_kernels.testing import DEFINITIONS, OPS, example_inputs


def test_every_op_has_its_definition():
    assert DEFINITIONS.keys() == OPS.keys()


def inputs_of(op, batch):
    inputs = example_inputs(op, batch, 2, 3, 16, 2)
    inputs |= dict(center=True) if op == "gated_residual_rms_norm_modulate" else {}
    return {name: value.requires_grad_() if name in ("x", "y", "qkv", "packed", "z", "s") else value for name, value in inputs.items()}


@pytest.mark.parametrize("op", OPS)
def test_compiles_whole_and_once_for_any_batch(op):
    function = OPS[op]
    torch._dynamo.reset()
    frames = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=frames)
    for batch in (5, 7, 9, 11):  # sizes that no other dimension has: equal sizes would share one symbol
        for enabled in (False, True):
            expected_inputs, inputs = inputs_of(op, batch), inputs_of(op, batch)
            for tensor in inputs.values():
                if isinstance(tensor, torch.Tensor) and len(tensor) == batch:
                    torch._dynamo.mark_dynamic(tensor, 0)  # raises if anything specialises on the batch
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                expected, got = function(**expected_inputs), compiled(**inputs)
            for want, have in zip(pytree.tree_leaves(expected), pytree.tree_leaves(got), strict=True):
                torch.testing.assert_close(have, want)
            pytree.tree_leaves(expected)[-1].float().square().sum().backward()
            pytree.tree_leaves(got)[-1].float().square().sum().backward()
            first = next(iter(inputs))
            torch.testing.assert_close(inputs[first].grad, expected_inputs[first].grad)
    assert frames.frame_count == 2, "one graph with autocast and one without"
