"""A fuzz campaign: configurations, checkpoints, weights, latent stores, archives and images with random damage, as many as one likes.

    python bench/fuzz.py --examples 1000 --seed 0 --out bench/results/fuzz_cpu.json     # of each kind; make fuzz
    python -m pytest -m fuzz                                                            # the short version, part of `make test`

The tests are those marked fuzz, which say what must be true of each input: refused with words that name what is damaged, or accepted
because the damage changed nothing that has a checksum. An input that does neither, or crashes, fails its test; the exit code is 1 then.
"""

import argparse
import collections
import json
import os
import sys
import time
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

from lightningdit.log import environment

ROOT = Path(__file__).resolve().parent.parent
COUNTS = collections.defaultdict(collections.Counter)  # {kind of input: {outcome: inputs}}


def examples(usual):
    """Settings of a fuzz test: so many examples, always the same; in a campaign as many as that asks for, drawn from its seed."""
    wanted = os.environ.get("FUZZ")
    return settings(max_examples=int(wanted or usual), deadline=None, derandomize=not wanted, database=None,
                    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def tally(kind, outcome):
    """To be called by a fuzz test for each input that met with one of the outcomes it allows."""
    COUNTS[kind][outcome] += 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--examples", type=int, default=1000, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    options = parser.parse_args()
    if options.examples < 1:
        parser.error(f"--examples: got {options.examples}, expected a positive number")
    os.environ["FUZZ"] = str(options.examples)
    begin = time.monotonic()
    code = pytest.main([str(ROOT / "tests"), "--rootdir", str(ROOT), "-m", "fuzz", "-q", "-p", "no:cacheprovider",
                        f"--hypothesis-seed={options.seed}"])
    wall_s, inputs = round(time.monotonic() - begin, 1), sum(counts.total() for counts in COUNTS.values())
    for kind, counts in sorted(COUNTS.items()):
        print(f"{kind:28} {counts.total():6}   " + ", ".join(f"{outcome} {times}" for outcome, times in counts.most_common()))
    failed = code != pytest.ExitCode.OK
    print(f"{inputs} inputs, {'FAILED, see above' if failed else 'none crashed, no damage was accepted'}, {wall_s} s")
    if options.out:
        options.out.write_text(json.dumps(dict(seed=options.seed, examples=options.examples, inputs=inputs, failed=failed, wall_s=wall_s,
                                               kinds={kind: dict(counts) for kind, counts in sorted(COUNTS.items())},
                                               environment=environment(torch.device("cpu"))), indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    from bench import fuzz  # under the name by which the tests know it

    sys.exit(fuzz.main())
