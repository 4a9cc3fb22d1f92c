"""The run's log, plots and pictures."""
import json
import math
import resource
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit.log import RunLog, image_grid, plot_losses, read_log, save_png, write_environment


def record(run, start, stop, every=4):
    log = RunLog(run, start, 20, every, images_per_step=8, flops_per_image=1e6)
    for step in range(start + 1, stop + 1):
        log.step(step, 1e-3, dict(loss=torch.tensor(step + 0.1), mse=torch.tensor(float(step)), cos=torch.tensor(0.1)))
    return log


def test_one_line_a_step_written_every_few(tmp_path):
    log = record(tmp_path, 0, 6)
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2, 3, 4]  # the last two wait for two more, or for close
    log.event(6, val_mse=1.5)
    log.close()
    lines = read_log(tmp_path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6, 6] and lines[-1] == dict(step=6, val_mse=1.5)
    assert lines[2]["loss"] == float(torch.tensor(3.1)) and lines[2]["lr"] == 1e-3 and lines[2]["images_per_second"] > 0
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_resumed_run_repeats_no_line(tmp_path):
    record(tmp_path, 0, 10).close()
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 11, "lo')  # killed while writing
    record(tmp_path, 7, 9).close()
    assert [line["step"] for line in read_log(tmp_path)] == list(range(1, 10))


def test_flush_returns_means(tmp_path):
    log = record(tmp_path, 0, 3)
    means = log.flush()
    log.close()
    assert means["mse"] == pytest.approx(2.0) and log.flush() == {}


def test_a_term_that_comes_later_and_a_value_that_is_not_finite(tmp_path):
    """A value that went out in an earlier flush, of step 4 of 6, stops the run too; what other ranks log is judged but not written."""
    for rank, run in enumerate((tmp_path / "first", tmp_path / "second")):
        run.mkdir()
        log = RunLog(run, 0, 20, 4, images_per_step=8, flops_per_image=0, rank=rank)
        for step in range(1, 7):
            term = dict(extra=torch.tensor(2.0)) if step >= 3 else {}
            log.step(step, 1e-3, dict(loss=torch.tensor(float("nan") if step == 4 else 1.0), **term))
            if step == 3:
                log.stop_if_not_finite(3, "hint")
        with pytest.raises(SystemExit, match="at or before step 6: .*There is no checkpoint. hint"):
            log.stop_if_not_finite(6, "hint")
        log.close()
    assert ["extra" in line for line in read_log(tmp_path / "first")] == [False, False, True, True, True, True]
    assert list((tmp_path / "second").iterdir()) == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_a_log_that_cannot_be_written_says_so_and_what_is_safe(tmp_path):
    """The kernel refuses further bytes of a file: of log.jsonl or of TensorBoard's, whose thread dies of it; both name the run."""
    handler, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.getrlimit(resource.RLIMIT_FSIZE)
    log = record(tmp_path, 0, 6)
    log.saved = 4
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (500, limits[1]))
        with pytest.raises(OSError, match=f"could not write the log of {tmp_path}: .*; the checkpoint of step 4 is whole"):
            for step in range(7, 200):
                log.step(step, 1e-3, dict(loss=torch.tensor(1.0)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


def test_loss_plot_shows_both_terms(tmp_path):
    log = record(tmp_path, 0, 20)
    log.event(10, val_mse=9.0, val_cos=0.2)
    log.close()
    picture = np.asarray(Image.open(plot_losses(tmp_path)).convert("RGB")).astype(int)
    blue = (picture[..., 2] - picture[..., 0] > 80).nonzero()[1]
    orange = (picture[..., 0] - picture[..., 2] > 120).nonzero()[1]
    width = picture.shape[1]
    assert len(blue) > 50 and blue.max() < width / 2 and len(orange) > 50 and orange.min() > width / 2


def test_a_plot_that_cannot_be_written_ends_no_run(tmp_path, capsys):
    log = RunLog(tmp_path, 0, 4, 2, images_per_step=8, flops_per_image=1e6)
    (tmp_path / "loss.png").mkdir()
    log.step(1, 1e-3, dict(loss=torch.tensor(1.0)))
    log.plot()
    assert "could not draw" not in capsys.readouterr().out, "not yet due"
    log.plot(last=True)
    assert "warning: could not draw the curves of" in capsys.readouterr().out
    log.step(2, 1e-3, dict(loss=torch.tensor(1.0)))
    log.close()
    assert len(read_log(tmp_path)) == 2


def test_loss_plot_leaves_out_what_the_guard_left_out(tmp_path):
    log = RunLog(tmp_path, 0, 20, 4, images_per_step=8, flops_per_image=1e6)
    for step in range(1, 9):
        bad = step == 5
        log.step(step, 1e-3, dict(loss=torch.tensor(math.nan if bad else 2.0), mse=torch.tensor(math.nan if bad else 1.0),
                                  cos=torch.tensor(1.0), verdict=torch.tensor(float(bad))))
    log.close()
    assert log.bad == [(5, 1.0)] and plot_losses(tmp_path).is_file()


def test_grid_places_images_row_by_row(tmp_path):
    images = np.zeros((5, 4, 4, 1), np.uint8)
    images[:, :, :, 0] = np.arange(5)[:, None, None] * 50
    grid = image_grid(torch.from_numpy(images), columns=3, min_tile=8, gap=1)
    assert grid.shape == (17, 26, 3)
    assert [grid[4, 4, 0], grid[4, 13, 0], grid[4, 22, 0], grid[13, 4, 0], grid[13, 13, 0]] == [0, 50, 100, 150, 200]
    assert grid[13, 22, 0] == 255 and grid[8, 4, 0] == 255  # the empty place and the gap
    save_png(grid, tmp_path / "deep" / "grid.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "deep" / "grid.png")), grid)


def test_environment(tmp_path):
    write_environment(tmp_path, torch.device("cpu"))
    record = json.loads((tmp_path / "environment.json").read_text())
    assert record["torch"] == torch.__version__ and record["device"] == "cpu" and record["date"] and record["command"]
