"""bench/study.py, and bench/tokenizer_study.py at its smallest size."""
import io
import json
import signal
import tarfile
import time

import numpy as np
import pytest
import torch
from PIL import Image

from bench import study, tokenizer_study
from bench.study import OutOfTime
from bench.tokenizer_study import ARMS, Study, table


@pytest.fixture(scope="module")
def tars(tmp_path_factory):
    """Three classes of coloured noise, of 18 and 9 images."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, count in (("train.tar", 18), ("val.tar", 9)):
        with tarfile.open(folder / name, "w") as tar:
            for label, colour in enumerate(((200, 60, 60), (60, 200, 60), (60, 60, 200))):
                for i in range(count):
                    buffer = io.BytesIO()
                    array = np.clip(rng.normal(colour, 25, (20, 20, 3)), 0, 255).astype(np.uint8)
                    Image.fromarray(array).save(buffer, "png")
                    member = tarfile.TarInfo(f"class{label}/{i:02d}.png")
                    member.size = buffer.tell()
                    tar.addfile(member, io.BytesIO(buffer.getvalue()))
    return folder


@pytest.fixture
def ran(monkeypatch):
    """The list of the scripts that ran, with their arguments."""
    ran, threads = [], torch.get_num_threads()

    def launch(script, arguments, deadline):
        ran.append((script, [str(argument) for argument in arguments]))
        study.launch(script, arguments, deadline)

    monkeypatch.setattr(tokenizer_study, "launch", launch)
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    yield ran
    torch.set_num_threads(threads)


def option(arguments, name):
    return arguments[arguments.index(name) + 1]


def test_both_arms_from_data_to_table(tars, tmp_path, ran, capsys):
    def begin(deadline=None):
        return Study("tiny", tars / "train.tar", tars / "val.tar", tmp_path, "cpu", deadline)

    with pytest.raises(OutOfTime, match="data"):
        begin(deadline=time.monotonic() - 1).run()
    report = begin().run()
    scripts = [script for script, _ in ran]
    assert scripts == ["vavae.py", "vavae.py", "dit.py", "vavae.py", "dit.py"]
    (_, judge), (_, plain), (_, plain_dit), (_, aligned), (_, aligned_dit) = ran
    different = {a for a, b in zip(plain, aligned, strict=True) if a != b}
    assert different == {str(tmp_path / "plain_tokenizer"), "0.0", "0.5", "0.25"} and option(aligned, "--loss.vf-weight") == "0.5"
    assert option(judge, "--seed") == "1" != option(plain, "--seed") == option(aligned, "--seed")  # the judge never aligned anything
    assert len([1 for a, b in zip(plain_dit, aligned_dit, strict=True) if a != b]) == 2  # --run and --tokenizer.path

    assert report["arms"]["plain"]["tokenizer_sha256"] != report["arms"]["aligned"]["tokenizer_sha256"]
    for arm in ARMS:
        found = report["arms"][arm]
        assert found["reconstruction"]["psnr"] > 5 and -1 < found["reconstruction"]["ssim"] < 1 and found["dit_last_mse"] > 0
        assert found["generation"]["fd_classifier"] > 0 and 0 <= found["generation"]["recognised"] <= 1
        with np.load(tmp_path / f"{arm}_samples.npz") as samples:
            assert samples["arr_0"].shape == (12, 16, 16, 3) and samples["arr_1"].tolist() == [0, 1, 2] * 4
    assert json.loads((tmp_path / "report.json").read_text())["arms"] == report["arms"]
    assert set(report["seconds"]) == {"data", "classifier", *(f"{arm}_{stage}" for arm in ARMS for stage in (
        "tokenizer", "reconstruction", "dit", "samples", "generation"))}
    assert "| PSNR, dB (more is better) |" in capsys.readouterr().out
    picture = np.asarray(Image.open(tmp_path / "study.png").convert("RGB")).astype(int)
    first, last = picture[20:60, 5:70], picture[20:60, -70:-5]  # held-out images, from the first class to the last: red and blue
    assert first[..., 0].mean() > first[..., 2].mean() + 50 and last[..., 2].mean() > last[..., 0].mean() + 50

    assert begin().run()["arms"] == report["arms"] and len(ran) == 5  # nothing is done twice
    (tmp_path / "aligned_generation.done.json").unlink()
    assert begin().run()["arms"] == report["arms"] and len(ran) == 5
    with pytest.raises(ValueError, match="holds a study of other settings"):
        Study("tiny", tars / "val.tar", tars / "val.tar", tmp_path, "cpu", None).run()


def test_too_few_images(tars, tmp_path):
    with pytest.raises(ValueError, match="has 9 images of class 0, expected at least 16"):
        Study("tiny", tars / "val.tar", tars / "val.tar", tmp_path, "cpu", None).run()


def test_a_script_is_interrupted_at_the_deadline(tmp_path, monkeypatch):
    (tmp_path / "train").mkdir()
    saves = ("import pathlib, time\n"
             "def main(argv):\n"
             "    try:\n        time.sleep(60)\n"
             "    except KeyboardInterrupt:\n        pathlib.Path(argv[0]).touch()\n        return 130\n")
    (tmp_path / "train" / "slow.py").write_text(saves)
    (tmp_path / "train" / "user.py").write_text("def main(argv):\n    return 130")
    (tmp_path / "train" / "bad.py").write_text("def main(argv):\n    return 7")
    monkeypatch.setattr(study, "ROOT", tmp_path)
    handlers = [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT)]
    with pytest.raises(OutOfTime, match="slow.py"):
        study.launch("slow.py", [tmp_path / "saved"], time.monotonic() + 0.2)
    assert (tmp_path / "saved").exists()
    with pytest.raises(KeyboardInterrupt):
        study.launch("user.py", [], time.monotonic() + 60)
    with pytest.raises(SystemExit, match="7"):
        study.launch("bad.py", [], None)
    assert [signal.getsignal(number) for number in (signal.SIGALRM, signal.SIGINT)] == handlers
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_the_better_number_is_bold():
    arms = dict(plain=dict(reconstruction=dict(psnr=20.0, gini=0.5), generation=dict(fd_classifier=3.0, recognised=0.5)),
                aligned=dict(reconstruction=dict(psnr=19.0, gini=0.25), generation=dict(fd_classifier=2.0, recognised=0.5)))
    assert table(dict(arms=arms)).splitlines()[2:] == [
        "| PSNR, dB (more is better) | **20** | 19 |", "| latents, Gini (less is better) | 0.5 | **0.25** |",
        "| samples, Frechet distance (less is better) | 3 | **2** |",
        "| samples that the classifier takes for their class (more is better) | 0.5 | 0.5 |"]
