"""Scripts in forked processes: what they are given, what comes back, and who is ended."""
import os
import subprocess

import pytest

from bench import fork

TELL = """
import os, sys, torch
print(sys.argv[1:], os.getcwd(), os.environ["COLOUR"], torch.get_num_threads(), __name__)
sys.exit("error: in words")
"""


def test_a_script_runs_as_the_shell_would_run_it(tmp_path):
    (tmp_path / "tell.py").write_text(TELL)
    result = fork.run(tmp_path / "tell.py", "--steps", 3, folder=tmp_path, COLOUR="red", OMP_NUM_THREADS=2)
    assert result.stdout == f"['--steps', '3'] {fork.ROOT} red 2 __main__\n" and result.stderr == "error: in words\n"
    assert result.returncode == 1 and result.args == [str(tmp_path / "tell.py"), "--steps", "3"]
    assert "COLOUR" not in os.environ


def test_several_processes_have_their_ranks_and_end_with_the_one_that_fails(tmp_path, monkeypatch):
    (tmp_path / "ranks.py").write_text("import os, sys, time; print(os.environ['RANK'], 'of', os.environ['WORLD_SIZE'], flush=True)\n"
                                       "sys.exit(3) if os.environ['RANK'] == sys.argv[1] else time.sleep(float(sys.argv[2]))")
    result = fork.run(tmp_path / "ranks.py", "none", 0, folder=tmp_path, processes=2)
    assert (result.returncode, result.stdout) == (0, "0 of 2\n1 of 2\n")
    monkeypatch.setattr(fork, "PATIENCE_S", 0.2)
    result = fork.run(tmp_path / "ranks.py", "1", 1000, folder=tmp_path, processes=2)
    assert result.returncode == 3 and "1 of 2" in result.stdout


def test_what_takes_too_long_is_killed(tmp_path):
    (tmp_path / "slow.py").write_text("import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(1000)")
    with pytest.raises(subprocess.TimeoutExpired):
        fork.run(tmp_path / "slow.py", tmp_path / "pid", folder=tmp_path, timeout=3)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
