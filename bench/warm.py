"""A plugin for pytest (-p bench.warm): tests launch what they launch, and compare nothing.

What Triton and Inductor compile for them is then in their caches on disk. It takes no list of
kernels: the tests themselves say what they launch.
"""

import pytest

from lightningdit_kernels import testing


def launch_only(op, eager, inputs: dict, frozen: tuple[str, ...] = ()) -> None:
    """Stands for testing.assert_matches_truth: the op forward and backward, once."""
    testing.values_and_gradients(op, inputs, frozen)


def pytest_configure(config: pytest.Config) -> None:
    testing.assert_matches_truth = launch_only  # before any file of tests imports it by name
