"""Scores while a run trains: the right number, from any number of processes, without a trace in the training."""
import contextlib
import json
import os
import socket
import time

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.multiprocessing
from PIL import Image

from lightningdit import config as configuration
from lightningdit import sampler
from lightningdit.config import DiTConfig
from lightningdit.distributed import process_group
from lightningdit.features import load_extractor
from lightningdit.images import digits, to_pixels
from lightningdit.log import RunLog, plot_scores, read_log
from lightningdit.metrics import FeatureStatistics, frechet_distance
from lightningdit.scoring import open_scorer
from lightningdit.training import open_tokenizer

CPU = torch.device("cpu")


def settings(folder, *arguments):
    common = ("--score.every", 4, "--score.num", 100, "--score.num-steps", 8, "--sample.batch-size", 40, "--data.cache", folder,
              "--data.num-classes", 10, "--sample.guidance-scale", 1)
    recipe = os.path.join(os.path.dirname(__file__), "..", "train", "configs", "digits.yaml")
    return configuration.parse(DiTConfig, [str(a) for a in (*common, *arguments)], recipe=recipe)


def scorer(folder, *arguments):
    config = settings(folder, *arguments)
    tokenizer = open_tokenizer(config, CPU)
    return open_scorer(config, tokenizer, CPU), tokenizer, config


def empirical_velocity(tokenizer):
    """The velocity of the digits themselves, label by label: its samples are latents of real digits, the best that a model can do."""
    pixels, labels = digits()
    data = tokenizer.normalise(tokenizer.encode(to_pixels(pixels)).mean)

    def model(x, t, y):
        away = (x[:, None] - t.view(-1, 1, 1, 1, 1) * data).square().flatten(2).sum(2) / (2 * (1 - t[:, None]) ** 2)
        weights = torch.where(labels == y[:, None], -away, -torch.inf).softmax(1)
        return ((weights @ data.flatten(1)).view_as(x) - x) / (1 - t.view(-1, 1, 1, 1))

    return model


def test_a_better_model_is_nearer_and_the_number_is_the_distance(tmp_path):
    score, tokenizer, config = scorer(tmp_path)
    best = empirical_velocity(tokenizer)
    before = torch.get_rng_state()
    values = [score(model, contextlib.nullcontext()) for model in (best, lambda x, t, y: 0.4 * best(x, t, y), lambda x, t, y: 0 * x)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(value.keys() == {"score", "samples", "fd_digits"} and value["samples"] == 100 for value in values)
    good, less, none = (value[value["score"]] for value in values)
    assert good < 0.6 * less < 0.6 * 0.6 * none, (good, less, none)
    # The same images drawn at once, the same two Gaussians, without the classes that stream them.
    images = sampler.sample_images(best, tokenizer, labels=[i % 10 for i in range(100)], seeds=range(100),
                                   **config.sampling_arguments() | dict(num_steps=8))
    extractor = load_extractor("digits")
    ours, real = (FeatureStatistics.of(extractor(pixels)["pool"].double()) for pixels in (images, digits()[0]))
    assert good == pytest.approx(frechet_distance(ours.mean, ours.covariance, real.mean, real.covariance), rel=1e-5)


def one_process(rank, folder, port):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="localhost", MASTER_PORT=port)
    with process_group(CPU):
        score, tokenizer, _ = scorer(folder, "--score.num", 33, "--sample.batch-size", 8)
        passes, best = [], empirical_velocity(tokenizer)
        values = score(lambda x, t, y: passes.append(len(x)) or best(x, t, y), contextlib.nullcontext())
    (folder / f"{rank}.json").write_text(json.dumps([values, passes]))


def test_two_processes_share_the_samples(tmp_path):
    """The same number but for rounding, though 33 samples do not divide; as many passes of the model on both."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.start_processes(one_process, (tmp_path, port), nprocs=2, start_method="fork")
    (first, passes), (second, others) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    score, tokenizer, _ = scorer(tmp_path, "--score.num", 33, "--sample.batch-size", 8)
    assert first == second and passes == others and len(passes) == 3 * 8
    alone = score(empirical_velocity(tokenizer), contextlib.nullcontext())
    assert alone["fd_digits"] == pytest.approx(first["fd_digits"], rel=1e-6)


@pytest.mark.parametrize("arguments, message", [
    (["--score.extractor", "inception", "--score.weights", "nowhere.pth"], "nowhere.pth"),
    (["--score.extractor", "nonsense"], "extractor: got 'nonsense', expected"),
    (["--score.reference", "nowhere.npz"], "reference: nowhere.npz is no .npz file"),
    (["--score.reference", "nowhere"], "nowhere"),
    (["--data.path", "{store}", "--score.extractor", "inception"], "score.reference: got None, expected ADM's .npz or images"),
    (["--score.extractor", "digits", "--score.reference", "{adm}"], "holds statistics of Inception features"),
    (["--score.num", 1], "score.num: got 1, expected at least 2"),
    (["--score.every", -1], "score.every: got -1"),
])
def test_what_is_missing_is_missed_before_training(tmp_path, arguments, message):
    store, adm = tmp_path / "store", tmp_path / "adm.npz"
    store.mkdir()
    (store / "index.json").write_text("{}")
    np.savez(adm, mu=np.zeros(2048), sigma=np.eye(2048))
    with pytest.raises((ValueError, OSError)) as error:
        scorer(tmp_path, *[str(a).format(store=store, adm=adm) for a in arguments])
    assert message in str(error.value)


def test_no_scores(tmp_path, capsys):
    """Without score.every; and, told, for own images in a recipe that scores the digits."""
    assert scorer(tmp_path, "--score.every", 0)[0] is None and capsys.readouterr().out == ""
    assert scorer(tmp_path, "--data.path", tmp_path)[0] is None and "score.extractor names another" in capsys.readouterr().out


def life(run, start, stop, scores):
    log = RunLog(run, start, 20, 2, images_per_step=8, flops_per_image=1e6)
    for step in range(start + 1, stop + 1):
        time.sleep(0.003)
        log.step(step, 1e-3, dict(loss=torch.tensor(1.0)))
        if step in scores:
            log.score(step, dict(score="fd_digits", samples=100, fd_digits=scores[step]))
            log.plot(last=step == stop)
    log.close()


def test_the_plot_goes_on_after_a_resume(tmp_path, monkeypatch):
    """Lost steps are repeated, their scores too; the time of training goes on from the last step that was kept."""
    life(tmp_path, 0, 10, {4: 30.0, 8: 20.0, 10: 15.0})
    lines = read_log(tmp_path)
    kept = next(line["seconds"] for line in lines if line["step"] == 9)
    drawn = []
    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", lambda figure, *arguments, **options: drawn.append(
        [axis.lines[0].get_xydata().tolist() for axis in figure.axes if axis.lines]))
    life(tmp_path, 9, 12, {10: 14.0, 12: 10.0})
    assert len(drawn) == 2, "the losses and the scores, once: the run took less than PLOT_EVERY_S"
    by_images, by_time = drawn[-1]
    assert by_images == [[32, 30.0], [64, 20.0], [80, 14.0], [96, 10.0]] and [y for _, y in by_time] == [y for _, y in by_images]
    seconds = [x for x, _ in by_time]
    assert seconds == sorted(seconds) and seconds[1] < kept <= seconds[2]


def test_the_picture(tmp_path):
    assert plot_scores(tmp_path) is None and not (tmp_path / "score.png").exists()
    life(tmp_path, 0, 10, {4: 30.0, 8: 20.0, 10: 15.0})
    picture = np.asarray(Image.open(tmp_path / "score.png").convert("RGB")).astype(int)
    blue, width = (picture[..., 2] - picture[..., 0] > 80).nonzero()[1], picture.shape[1]
    assert (blue < width / 2).sum() > 50 and (blue > width / 2).sum() > 50
