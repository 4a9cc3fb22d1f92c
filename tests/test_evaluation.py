"""`lightningdit evaluate`, offline on the digits and with a narrow stand-in for Inception."""
import json
import re
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit import evaluation, features, metrics
from lightningdit.cli import main
from lightningdit.evaluation import Collector, collect, compare, load_reference, open_pictures
from lightningdit.features import load_extractor
from lightningdit.images import digits

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    """No download is tried, and the user's cache stays as it is."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))


def run(capsys, out, *arguments):
    assert main(["evaluate", *map(str, arguments), "--out", str(out)]) == 0
    report = json.loads((out / "evaluation.json").read_text())
    return {item["metric"]: item for item in report["metrics"]}, report, capsys.readouterr().out


def values(rows):
    return {name: item["value"] for name, item in rows.items() if item["value"] is not None}


def shifted(n=300, seed=0):
    """Digits, moved by a pixel and with noise: something between the real ones and nonsense."""
    images = digits()[0][:n].int().roll(1, 2)
    return (images + torch.randint(-40, 41, images.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 255).byte()


# evaluate tokenizer


def test_the_bundled_tokenizer(capsys, tmp_path):
    rows, report, printed = run(capsys, tmp_path, "tokenizer", "--uniformity-points", 0)
    images = digits()[0]
    found = values(rows)
    assert 0 < found["rfd_digits"] < 0.02 and 28 < found["psnr"] < 31 and 0.05 < found["posterior_std"] < 0.09
    assert found["latent_mean"] < 0.05 and 0.95 < found["latent_std_min"] <= found["latent_std_max"] < 1.05
    assert "smaller than its window" in rows["ssim"]["unavailable"] and "gini" in rows and rows["gini"]["value"] is None
    assert rows["lpips"]["value"] is None and rows["lpips"]["unavailable"]
    assert report["tokenizer"]["sha256"] and report["environment"]["torch"] == torch.__version__ and report["images"]["images"] == 1797
    assert report["extractors"] == [dict(name="digits", sha256=load_extractor("digits").sha256)]
    for name, item in rows.items():  # every number of the file is in the table, and every missing one says why
        line = re.search(rf"^{name} .*$", printed, re.M)[0]
        assert (f"{item['value']:.5g}" in line and "1,797" in line) if item["value"] is not None else "not available: " in line
    picture = np.asarray(Image.open(tmp_path / "reconstructions.png")).astype(int)
    tile = picture.shape[0] // 3 + 1
    originals, made, difference = (picture[i * tile : i * tile + 48 : 6, ::1][:, :, 0] for i in range(3))
    first = originals[:, :48:6]
    assert np.array_equal(first, images[0, :, :, 0].numpy()) and len(np.unique(originals, axis=1).T) > 20
    assert 0 < np.abs(originals - made).mean() < 20
    expected = np.minimum(4 * np.abs(originals - made), 255)
    gaps = np.arange(picture.shape[1]) % 50 >= 48
    assert np.array_equal(difference[:, ~gaps], expected[:, ~gaps])


def test_batches_do_not_matter(capsys, tmp_path):
    common = ("tokenizer", "--data.num-images", 150, "--uniformity-points", 100, "--seed", 3)
    a, b = (run(capsys, tmp_path / str(size), *common, "--batch-size", size)[0] for size in (150, 7))
    shapes = {"density_cv", "gini", "normalized_entropy"}
    assert shapes <= values(a).keys() and a["gini"]["images"] == 100
    for name in values(a).keys() - shapes:  # t-SNE is chaotic, and convolutions in fp32 round by batch
        assert b[name]["value"] == pytest.approx(a[name]["value"], rel=1e-4, abs=1e-6), name
    mode = values(run(capsys, tmp_path, *common, "--posterior", "mode")[0])
    assert mode["psnr"] > values(a)["psnr"]


def test_two_processes_measure_what_one_does(capsys, tmp_path, script):
    arguments = ["evaluate", "tokenizer", "--data.num-images", "151", "--uniformity-points", "0", "--batch-size", "10"]
    (tmp_path / "run.py").write_text("from lightningdit.cli import main; raise SystemExit(main())")
    printed = script(tmp_path / "run.py", *arguments, "--out", tmp_path / "two", processes=2, HF_HUB_OFFLINE="1").stdout
    assert len(re.findall("^psnr ", printed, re.M)) == 1, printed
    two = {item["metric"]: item for item in json.loads((tmp_path / "two" / "evaluation.json").read_text())["metrics"]}
    one = run(capsys, tmp_path / "one", *arguments[1:])[0]
    for name, value in values(one).items():
        assert two[name]["value"] == pytest.approx(value, rel=1e-4, abs=1e-6) and two[name]["images"] == one[name]["images"], name


def test_photographs_have_ssim_and_lpips(capsys, tmp_path, monkeypatch):
    from lightningdit.tokenizer.autoencoder import AutoencoderKL
    from lightningdit.tokenizer.vavae import Tokenizer

    torch.manual_seed(0)
    autoencoder = AutoencoderKL(3, 3, 8, (1, 2), 1, 4, 4, (), 16, num_groups=8)
    Tokenizer(autoencoder, torch.zeros(4), torch.ones(4)).save(tmp_path / "t.safetensors")
    write_folder(tmp_path / "photos", torch.randint(0, 256, (12, 20, 24, 3), dtype=torch.uint8), classes=2)
    monkeypatch.setattr(evaluation, "_load_perceptual", lambda weights, device: (lambda x, y: (x - y).abs().mean((1, 2, 3)), None))
    common = ("tokenizer", "--tokenizer", tmp_path / "t.safetensors", "--data.path", tmp_path / "photos", "--data.image-size", 16)
    rows, report, _ = run(capsys, tmp_path, *common, "--uniformity-points", 0)
    found = values(rows)
    assert -1 < found["ssim"] < 0.5 and 0 < found["lpips"] < 2 and found["psnr"] < 15  # an untrained tokenizer of noise
    assert rows["rfid"]["value"] is None and "no weights here" in rows["rfid"]["unavailable"]
    assert report["images"]["transform"] == "ADM center crop to 16"
    for arguments, message in ((common[:5], "data.image_size: got None"), (("tokenizer", "--posterior", "both"), "posterior: got 'both'"),
                               (("tokenizer", "--uniformity-points", 50), "uniformity_points: got 50"),
                               (("tokenizer", "--weights", "inception=x"), "weights: got 'inception', expected names among")):
        with pytest.raises(SystemExit, match=f"error: {message}"):
            main(["evaluate", *map(str, arguments)])


# evaluate samples


def write_folder(path, images, classes=0):
    for i, image in enumerate(images):
        folder = path / f"class{i % classes}" if classes else path
        folder.mkdir(parents=True, exist_ok=True)
        array = image.numpy()
        Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array).save(folder / f"{i:05d}.png")


def test_samples_from_any_container(capsys, tmp_path):
    images = shifted(60)
    write_folder(tmp_path / "flat", images)
    write_folder(tmp_path / "classes", images, classes=3)
    np.savez(tmp_path / "plain.npz", arr_0=images.numpy())
    np.savez_compressed(tmp_path / "small.npz", arr_0=images.numpy(), arr_1=np.arange(60))
    with tarfile.open(tmp_path / "set.tar", "w") as tar, zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for file in sorted((tmp_path / "classes").rglob("*.png")):
            name = file.relative_to(tmp_path / "classes").as_posix()
            tar.add(file, name)
            archive.write(file, name)
    found = [values(run(capsys, tmp_path / "out", "samples", "--images", tmp_path / name)[0])
             for name in ("flat", "classes", "plain.npz", "small.npz", "set.tar", "set.zip")]
    assert found[0].keys() == {"fd_digits", "is_digits", "kid_digits", "precision_digits", "recall_digits"}
    for other in found[1:]:
        for name in ("fd_digits", "is_digits", "precision_digits", "recall_digits"):  # KID draws its subsets by order
            assert other[name] == pytest.approx(found[0][name], rel=1e-5), name


def test_digits_against_digits(capsys, tmp_path):
    np.savez(tmp_path / "real.npz", arr_0=digits()[0].numpy())
    np.savez(tmp_path / "other.npz", arr_0=shifted().numpy())
    same, report, _ = run(capsys, tmp_path, "samples", "--images", tmp_path / "real.npz")
    same, other = values(same), values(run(capsys, tmp_path, "samples", "--images", tmp_path / "other.npz")[0])
    assert same["fd_digits"] < 1e-6 and same["precision_digits"] == same["recall_digits"] == 1 and abs(same["kid_digits"]) < 1e-2
    assert 4 < same["is_digits"] < 10
    assert other["fd_digits"] > 0.1 and other["precision_digits"] < 0.9 and other["kid_digits"] > 0.003 > same["kid_digits"]
    x, y = (load_extractor("digits")(images)["pool"].double() for images in (shifted(), digits()[0]))
    a, b = np.cov(x.numpy(), rowvar=False), np.cov(y.numpy(), rowvar=False)
    root = np.sqrt(np.linalg.eigvals(a @ b).astype(complex)).real.sum()
    expected = (x.mean(0) - y.mean(0)).square().sum().item() + np.trace(a) + np.trace(b) - 2 * root
    assert other["fd_digits"] == pytest.approx(expected, rel=1e-4)
    half = run(capsys, tmp_path, "samples", "--images", tmp_path / "other.npz", "--num-images", 150)
    assert half[0]["fd_digits"]["images"] == 150 and half[1]["images"]["images"] == 150


def test_images_straight_from_the_sampler(capsys, tmp_path, digits_model):
    """The numbers of the files that `lightningdit sample` writes, whatever the batches are."""
    weights = digits_model(tmp_path, num_steps=3, guidance_scale=2.0)
    assert main(["sample", *weights, "--num", "90", "--out", str(tmp_path / "drawn.npz")]) == 0
    files, _, _ = run(capsys, tmp_path / "files", "samples", "--images", tmp_path / "drawn.npz")
    drawn, report, printed = run(capsys, tmp_path / "drawn", "samples", *weights, "--num-images", 90, "--batch-size", 32)
    assert values(drawn) == pytest.approx(values(files), rel=1e-4) and len(values(drawn)) == 5
    about = report["images"]
    assert about["images"] == 90 and about["size"] == [8, 8] and about["sampling"]["num_steps"] == 3 and len(about["fingerprint"]) == 64
    for wrong, message in ((["--images", "x.npz", "--num-images", 9, *weights], "images: got 'x.npz', expected"),
                           ([], "images: got None"), (weights, "num_images: got None, expected at least 2"),
                           ([*weights, "--num-images", 9, "--image-size", 8], "image_size: got 8")):
        with pytest.raises(SystemExit, match=message):
            main(["evaluate", "samples", *map(str, wrong), "--out", str(tmp_path / "wrong")])
    assert not (tmp_path / "wrong").exists()


def test_a_reference_is_computed_once(tmp_path, monkeypatch):
    write_folder(tmp_path / "real", shifted(40), classes=2)
    extractor, passes = load_extractor("digits"), []
    monkeypatch.setattr(evaluation, "collect", lambda *a, **k: passes.append(1) or collect(*a, **k))
    monkeypatch.setattr(evaluation, "KEPT", 13)

    def load(**changes):
        return load_reference(tmp_path / "real", extractor, **dict(dict(image_size=8, cache=tmp_path / "c"), **changes))

    first, again = load(), load()
    assert len(passes) == 1 and torch.equal(first.features, again.features) and first.features.shape == (13, 48)
    assert all(torch.equal(a, b) for a, b in zip(first.moments["pool"], again.moments["pool"], strict=True))
    whole = extractor(next(iter(open_pictures(tmp_path / "real", image_size=8, channels=1).batches(40)))[0])["pool"]
    assert torch.allclose(first.features, whole[[-(-i * 40 // 13) for i in range(13)]], atol=1e-5)  # evenly spaced
    assert again.provenance["extractor_sha256"] == extractor.sha256 and again.provenance["transform"] == "ADM center crop to 8"
    load(image_size=6)
    Image.new("L", (8, 8)).save(tmp_path / "real" / "class0" / "more.png")
    load()
    assert len(passes) == 3  # another transform, other data
    (file,) = [f for f in (tmp_path / "c").iterdir() if f.stat().st_mtime == max(g.stat().st_mtime for g in (tmp_path / "c").iterdir())]
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="damaged .* delete it"):
        load()


class Narrow(features.Extractor):
    """In the place of Inception, under its name: 24 random projections of pixels, 10 "spatial" ones, 6 classes."""

    def __init__(self, weights=None, random_weights=False):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            super().__init__("inception", torch.nn.Linear(48, 40))

    def extract(self, images):
        h = self.network(torch.nn.functional.adaptive_avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 4).flatten(1))
        return dict(pool=h[:, :24], spatial=h[:, 24:34], logits=10 * h[:, 34:])


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(features, "BUILDERS", dict(inception=Narrow))
    return Narrow()


def adm_file(path, narrow, images, with_images=True):
    found = {name: v.double().numpy() for name, v in narrow(images).items()}
    arrays = dict(mu=found["pool"].mean(0), sigma=np.cov(found["pool"], rowvar=False), mu_s=found["spatial"].mean(0),
                  sigma_s=np.cov(found["spatial"], rowvar=False))
    np.savez(path, **arrays, **(dict(arr_0=images[:30].numpy()) if with_images else {}))


def test_the_adm_protocol(capsys, tmp_path, narrow):
    real, made = torch.randint(0, 256, (90, 16, 16, 3), dtype=torch.uint8), torch.randint(20, 240, (50, 16, 16, 3), dtype=torch.uint8)
    adm_file(tmp_path / "ref.npz", narrow, real)
    np.savez(tmp_path / "made.npz", arr_0=made.numpy())
    rows, report, printed = run(capsys, tmp_path, "samples", "--images", tmp_path / "made.npz", "--reference", tmp_path / "ref.npz")
    found = values(rows)
    x, y = narrow(made), narrow(real)
    for name, key in (("fid", "pool"), ("sfid", "spatial")):  # the published statistics of 90, not those of the 30 images in the file
        a, b = (metrics.FeatureStatistics.of(v[key]) for v in (x, y))
        assert found[name] == pytest.approx(metrics.frechet_distance(a.mean, a.covariance, b.mean, b.covariance), rel=1e-6)
    assert found["is"] == pytest.approx(metrics.inception_score(x["logits"].double().softmax(1)), rel=1e-6)
    assert (found["precision"], found["recall"]) == metrics.precision_recall(x["pool"], y["pool"][:30])
    assert found["kid"] == pytest.approx(metrics.kernel_distance(x["pool"], y["pool"][:30], subset_size=30)[0], rel=1e-4)
    assert report["references"][0]["statistics"] == "as published" and "too large below 10,000 images" in printed

    adm_file(tmp_path / "bare.npz", narrow, real, with_images=False)
    bare = run(capsys, tmp_path, "samples", "--images", tmp_path / "made.npz", "--reference", tmp_path / "bare.npz")[0]
    assert bare["fid"]["value"] == pytest.approx(found["fid"]) and "statistics only" in bare["recall"]["unavailable"]
    with pytest.raises(SystemExit, match="holds statistics of Inception features, expected images for the extractor mine"):
        features.SmallEncoder(3, 2, 2, width=8).save(tmp_path / "mine.safetensors")
        main(["evaluate", "samples", "--images", str(tmp_path / "made.npz"), "--reference", str(tmp_path / "bare.npz"),
              "--extractors", str(tmp_path / "mine.safetensors")])


def test_a_folder_is_a_reference_at_the_size_of_the_samples(capsys, tmp_path, narrow):
    real, made = torch.randint(0, 256, (40, 24, 30, 3), dtype=torch.uint8), torch.randint(0, 256, (30, 16, 16, 3), dtype=torch.uint8)
    write_folder(tmp_path / "real", real, classes=2)
    write_folder(tmp_path / "made", made)
    arguments = ("samples", "--images", tmp_path / "made", "--reference", tmp_path / "real", "--cache", tmp_path / "c")
    (first, report, _), (again, cached, _) = (run(capsys, tmp_path, *arguments) for _ in range(2))
    assert values(first) == values(again) and first.keys() == {"fid", "sfid", "is", "kid", "precision", "recall"}
    assert report["references"][0]["transform"] == "ADM center crop to 16" and cached["references"][0]["cached"]
    cropped = torch.cat([images for images, _ in open_pictures(tmp_path / "real", image_size=16).batches(16)])
    x, y = (metrics.FeatureStatistics.of(narrow(images)["spatial"]) for images in (made, cropped))
    assert first["sfid"]["value"] == pytest.approx(metrics.frechet_distance(x.mean, x.covariance, y.mean, y.covariance), rel=1e-5)


def test_features_agree_with_torch_fidelity(narrow):
    """KID, precision, recall and Inception score of the same features by that package."""
    from torch_fidelity.metric_isc import isc_features_to_metric
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    real, made = torch.randint(0, 256, (90, 16, 16, 3), dtype=torch.uint8), torch.randint(20, 240, (50, 16, 16, 3), dtype=torch.uint8)
    collected = collect([(made, torch.arange(50))], narrow)
    reference = collect([(real, torch.arange(90))], narrow).reference({})
    ours = values({item["metric"]: item for item in compare(collected, reference, narrow)})
    x, y = collected.features, reference.features
    kid = kid_features_to_metric(x, y, kid_subset_size=50, kid_subsets=100, rng_seed=2020, verbose=False)
    prc = prc_features_to_metric(x, y, prc_neighborhood=3, verbose=False)
    isc = isc_features_to_metric(collected.logits, splits=1, shuffle=False)
    assert ours["kid"] == pytest.approx(kid["kernel_inception_distance_mean"], rel=1e-3)  # theirs is in float32
    assert (ours["precision"], ours["recall"]) == (pytest.approx(prc["precision"]), pytest.approx(prc["recall"]))
    assert ours["is"] == pytest.approx(isc["inception_score_mean"], rel=1e-5)


def test_streaming_equals_the_whole(narrow):
    images = torch.randint(0, 256, (53, 16, 16, 3), dtype=torch.uint8)
    whole = collect([(images, torch.arange(53))], narrow)
    order = torch.randperm(53)  # as several processes would deliver them
    parts = collect([(images[i], i) for i in order.split(10)], narrow)
    assert parts.count == 53 and torch.allclose(parts.features, whole.features, atol=1e-6)
    assert torch.allclose(parts.logits, whole.logits, atol=1e-5)
    for name, statistics in whole.statistics.items():
        assert torch.allclose(parts.statistics[name].covariance, statistics.covariance, rtol=1e-6, atol=1e-9)
    with pytest.raises(ValueError, match="images: got none"):
        Collector(narrow).result()


def test_an_npz_is_read_in_order_block_by_block(tmp_path):
    images = torch.arange(23 * 4 * 4).remainder(251).byte().view(23, 4, 4, 1)
    np.savez(tmp_path / "a.npz", arr_0=images.numpy())
    for world in (1, 3):
        pictures, seen = open_pictures(tmp_path / "a.npz", num_images=20), []
        for rank in range(world):
            for batch, indices in pictures.batches(3, rank, world):
                seen += zip(indices.tolist(), batch, strict=True)
        assert sorted(i for i, _ in seen) == list(range(20)) and all(torch.equal(image, images[i]) for i, image in seen)


@pytest.mark.parametrize("arrays, message", [
    (dict(arr_0=np.zeros((3, 4, 4, 3))), "arr_0 of float64"), (dict(arr_0=np.zeros((3, 4, 4), np.uint8)), r"shape \(3, 4, 4\)"),
    (dict(other=np.zeros((3, 4, 4, 3), np.uint8)), "no .npz file with arr_0"), (dict(arr_0=np.array([{}])), "arr_0 of object"),
    (dict(arr_0=np.zeros((3, 4, 5, 3), np.uint8)), "of 4x5 pixels', expected square"),
])
def test_npz_files_that_hold_no_images(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        open_pictures(tmp_path / "a.npz")


def test_images_that_are_not_there(tmp_path, capsys):
    with pytest.raises(FileNotFoundError, match="nowhere.npz"):
        open_pictures(tmp_path / "nowhere.npz")
    (tmp_path / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match="text.npz is no .npz file"):
        open_pictures(tmp_path / "text.npz")
    write_folder(tmp_path / "wide", torch.zeros(2, 8, 9, 3, dtype=torch.uint8))
    with pytest.raises(ValueError, match="00000.png, is 9x8 pixels, not square"):
        open_pictures(tmp_path / "wide")
    with pytest.raises(SystemExit, match="no folder or file"):
        main(["evaluate", "samples", "--images", str(tmp_path / "nowhere")])


def test_torch_fidelitys_own_numbers_of_the_same_folders(tmp_path):
    """With the same random weights, from folders on. Not the FID: torch-fidelity's takes 20 s, and test_metrics.py has truer ones."""
    from torch_fidelity import calculate_metrics

    smooth = torch.nn.functional.interpolate(torch.rand(16, 3, 6, 6, generator=torch.Generator().manual_seed(0)), 40, mode="bicubic")
    images = (smooth * 255).clamp(0, 255).byte().permute(0, 2, 3, 1)
    write_folder(tmp_path / "made", images[:8])
    write_folder(tmp_path / "real", images[8:] // 2 + 60)
    torch.save(load_extractor("inception", random_weights=True).network.state_dict(), tmp_path / "weights.pth")
    network = load_extractor("inception", tmp_path / "weights.pth")
    made, real = (collect(open_pictures(tmp_path / name).batches(8), network) for name in ("made", "real"))
    theirs = calculate_metrics(input1=str(tmp_path / "made"), input2=str(tmp_path / "real"), isc=True, kid=True, prc=True,
                               kid_subset_size=8, isc_splits=1, feature_extractor="inception-v3-compat", feature_layer_prc="2048",
                               feature_extractor_weights_path=str(tmp_path / "weights.pth"), cuda=False, verbose=False, cache=False,
                               batch_size=8)
    kid, _ = metrics.kernel_distance(made.features, real.features, subset_size=8)
    assert kid == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert metrics.inception_score(made.logits.double().softmax(1)) == pytest.approx(theirs["inception_score_mean"], rel=1e-3)
    assert metrics.precision_recall(made.features, real.features) == pytest.approx((theirs["precision"], theirs["recall"]))
