"""train/slurm/dit.sbatch as it stands, with stand-ins for srun and scontrol: preempted, it saves, queues itself again, and goes on."""
import os
import re
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lightningdit.log import read_log

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "train" / "slurm" / "dit.sbatch"
SRUN = """#!{python}
# As srun: so many tasks, signals passed on to all, the highest exit code; a task that fails ends the others.
import os, signal, subprocess, sys
command = sys.argv[2:]
assert sys.argv[1] == "--kill-on-bad-exit=1"
tasks = [subprocess.Popen(command, env=os.environ | dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i)))
         for i in range(int(os.environ["SLURM_NTASKS"]))]
signal.signal(signal.SIGUSR1, lambda number, frame: [task.send_signal(number) for task in tasks])
open(os.environ["REQUESTS"] + ".begun", "w").close()
codes = [task.wait() for task in tasks]
sys.exit(max(128 - code if code < 0 else code for code in codes))
"""
SCONTROL = """#!/bin/bash
if [ "$1 $2" = "show hostnames" ]; then echo localhost; else echo "$@" >> "$REQUESTS"; fi
"""


@pytest.fixture
def cluster(tmp_path):
    """Environment of a job of two tasks."""
    for name, text in (("srun", SRUN.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(stat.S_IRWXU)
    number = os.getpid() % 20000  # the port follows from it
    return os.environ | dict(
        PATH=f"{tmp_path}:{os.environ['PATH']}", REQUESTS=str(tmp_path / "requests"), PYTHON=sys.executable, SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID=str(number), SLURM_JOB_NODELIST="localhost", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_CPUS_PER_TASK="1")


def arguments(run, steps):
    return (f"--run {run} --device cpu --model.depth 1 --model.hidden-size 32 --model.num-heads 2 --batch-size 16 --steps {steps} "
            "--optim.warmup 0 --optim.schedule constant --log-every 1 --checkpoint-every 100000 --sample-every 100000 "
            "--validate-every 100000 --sample-num 10 --sample.num-steps 2 --final-samples 0 --score.every 0").split()


def test_preempted_it_saves_requeues_and_goes_on(cluster, tmp_path):
    run = tmp_path / "run"
    command = ["bash", SCRIPT, *arguments(run, 1_000_000)]
    job = subprocess.Popen(command, env=cluster, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    deadline = time.time() + 180
    while len(read_log(run)) < 5:
        assert job.poll() is None and time.time() < deadline, (job.kill(), job.communicate()[0])
        time.sleep(0.1)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 75, output
    assert (tmp_path / "requests").read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"
    step = int(re.search(r"interrupted: step (\d+) is saved", output)[1])
    again = subprocess.run(["bash", SCRIPT, *arguments(run, step + 2)], env=cluster, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert f"resuming at step {step}" in again.stdout and "2 processes (ddp)" in again.stdout
    assert (tmp_path / "requests").read_text().count("\n") == 1


def test_preempted_before_the_first_step_it_is_queued_again(cluster, tmp_path):
    (tmp_path / "slow").write_text("#!/bin/bash\nexec sleep 100")  # as an interpreter that is importing torch
    (tmp_path / "slow").chmod(stat.S_IRWXU)
    job = subprocess.Popen(["bash", SCRIPT], env=cluster | dict(PYTHON=str(tmp_path / "slow")), stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "requests.begun").exists():
        assert job.poll() is None
        time.sleep(0.05)
    job.send_signal(signal.SIGUSR1)
    output, _ = job.communicate(timeout=120)
    assert job.returncode == 128 + signal.SIGUSR1, output
    assert (tmp_path / "requests").read_text() == f"requeue {cluster['SLURM_JOB_ID']}\n"


def test_a_failure_is_not_queued_again(cluster, tmp_path):
    result = subprocess.run(["bash", SCRIPT, "--batch-size", "7"], env=cluster, capture_output=True, text=True)
    assert result.returncode == 1 and "batch_size: got 7, expected a multiple of the 2 processes" in result.stderr, result.stderr
    assert not (tmp_path / "requests").exists()
