"""What the tests of the stand-in share."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rehearsal import stand_in

KERNELS = Path(__file__).resolve().parent.parent.parent / "kernels"


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """probe(script) -> what it printed last, decoded, as a process that sees an H100."""
    if reason := stand_in.unavailable():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("rehearsal")

    def run(source, **more):
        script = folder / "probe.py"  # Triton reads the source of a kernel from its file
        script.write_text(source, encoding="utf-8")
        command = [sys.executable, str(script)]
        options = {"capture_output": True, "text": True, "check": False, "env": variables | more}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    with stand_in.environment(stand_in.CARDS["h100"], folder / "cache") as variables:
        variables.pop("TRITON_INTERPRET", None)
        path = os.pathsep.join([str(KERNELS), variables.get("PYTHONPATH", "")])
        variables["PYTHONPATH"] = path
        yield run
