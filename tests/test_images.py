"""Images: crops to the bit, every kind of file, source and decoder, and every kind of bad input."""

import gc
import io
import json
import logging
import os
import pickle
import shutil
import struct
import tarfile
import threading
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.datasets import load_digits

from bench.fuzz import examples, tally
from lightningdit import images, images_dali
from lightningdit.images import ImageBatches, ImageFolder, center_crop, decode_image, digits, open_images, to_pixels


def picture(height, width, channels=3, seed=0):
    """Smooth enough that JPEG keeps it, with four corners of different colours."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [0.5 + 0.5 * np.sin(3 * x * (c + 1) + 2 * y + seed + c) for c in range(channels)]
    array = (255 * np.stack(planes, axis=-1)).astype(np.uint8)
    return Image.fromarray(array if channels == 3 else array[..., 0])


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


DATA = Path(__file__).resolve().parent.parent.parent / "shared" / "data"
needs_dali = pytest.mark.skipif(images_dali.unavailable() is not None, reason=f"DALI: {images_dali.unavailable()}")


@pytest.fixture(autouse=True)
def index_cache(tmp_path_factory, monkeypatch):
    """Nothing is kept in the home folder of whoever runs the tests."""
    place = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(place))
    return place


@pytest.fixture(scope="session")
def samples():
    """Two hundred photographs of ImageNet."""
    if not (path := DATA / "imagenet-samples.tar").is_file():
        pytest.skip(f"{path} is absent")
    return path


@pytest.fixture
def folder(tmp_path):
    """Two classes of three 20x30 PNGs."""
    for label, name in enumerate(("apple", "banana")):
        (tmp_path / name).mkdir()
        for i in range(3):
            picture(20, 30, seed=10 * label + i).save(tmp_path / name / f"{i}.png")
    return tmp_path


def one_pass(source, image_size=8, batch_size=4, epoch=0, start=0, **options):
    """(images, labels, indices, bad) of a pass of ImageBatches."""
    batches = ImageBatches(source, batch_size, image_size=image_size, **options)
    found = list(batches.epoch(epoch, start))
    return *(torch.cat(part) for part in zip(*found, strict=True)), batches.bad


def test_center_crop_is_bit_exact(golden):
    tensors, _ = golden("center_crop")
    for i in range(7):
        out = center_crop(Image.fromarray(tensors[f"{i}.in"].numpy()), tensors[f"{i}.out"].shape[0])
        assert np.array_equal(np.asarray(out), tensors[f"{i}.out"].numpy()), f"case {i}"


def test_digits():
    pictures, labels = digits()
    theirs = load_digits()
    assert np.array_equal(pictures[..., 0].numpy(), np.rint(theirs.images * 255 / 16))
    assert np.array_equal(labels.numpy(), theirs.target)
    assert pictures.shape == (1797, 8, 8, 1) and pictures.dtype == torch.uint8 and labels.dtype == torch.int64
    assert pictures.min() == 0 and pictures.max() == 255 and len(pictures.unique()) == 17
    assert labels.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_to_pixels():
    pixels = to_pixels(torch.tensor([0, 51, 255], dtype=torch.uint8).view(1, 1, 3, 1))
    assert torch.allclose(pixels, torch.tensor([-1, -0.6, 1.0]).view(1, 1, 1, 3), atol=1e-7)
    with pytest.raises(ValueError, match="torch.float32"):
        to_pixels(torch.zeros(1, 2, 2, 3))


def test_folder_in_order(folder):
    data = ImageFolder(folder)
    assert data.classes == ["apple", "banana"] and len(data) == 6
    pictures, labels, indices, bad = one_pass(data, 16, workers=3)
    assert labels.tolist() == [0, 0, 0, 1, 1, 1] and indices.tolist() == list(range(6))
    for i, path in enumerate(folder / name for name in data.names):
        assert np.array_equal(pictures[i].numpy(), np.asarray(center_crop(Image.open(path), 16))), path
    assert bad == []
    later = one_pass(data, 16, start=4)
    assert later[2].tolist() == [4, 5] and torch.equal(later[0], pictures[4:])


def test_nested_hidden_and_foreign_files(folder):
    (folder / "apple" / "deep").mkdir()
    shutil.copy(folder / "apple" / "0.png", folder / "apple" / "deep" / "x.PNG")
    (folder / "apple" / "notes.txt").write_text("no image")
    (folder / "apple" / ".0.png").write_text("half a download")
    (folder / ".cache").mkdir()
    data = ImageFolder(folder)
    assert data.classes == ["apple", "banana"] and len(data) == 7 and len(one_pass(data, 16)[0]) == 7


def mean_error(path, expected, channels):
    got = decode_image(path.read_bytes(), expected.width, channels).astype(int)
    assert got.shape == (expected.height, expected.width, channels)
    return np.abs(got - np.asarray(expected.convert(images.MODES[channels])).reshape(got.shape)).mean()


def test_grayscale_palette_and_alpha(tmp_path):
    colour, gray = picture(16, 16), picture(16, 16, 1)
    gray.save(tmp_path / "gray.png")
    assert mean_error(tmp_path / "gray.png", gray, 3) == 0 and mean_error(tmp_path / "gray.png", gray, 1) == 0
    colour.save(tmp_path / "colour.png")
    assert mean_error(tmp_path / "colour.png", colour, 1) == 0
    rgba = colour.copy()
    rgba.putalpha(gray)
    rgba.save(tmp_path / "alpha.png")
    assert mean_error(tmp_path / "alpha.png", colour, 3) == 0
    palette = colour.quantize(64)
    palette.save(tmp_path / "palette.png", transparency=bytes(range(64)))
    assert mean_error(tmp_path / "palette.png", palette.convert("RGB"), 3) == 0


def test_cmyk(tmp_path):
    colour = picture(64, 64)
    colour.convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    assert Image.open(tmp_path / "cmyk.jpg").mode == "CMYK"
    assert mean_error(tmp_path / "cmyk.jpg", colour, 3) < 4  # JPEG's own loss


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_16_bit_is_scaled_not_clipped(tmp_path, suffix):
    gray = picture(16, 16, 1)
    Image.fromarray(np.asarray(gray).astype(np.uint16) * 257).save(tmp_path / f"deep.{suffix}")
    assert mean_error(tmp_path / f"deep.{suffix}", gray, 1) == 0 and mean_error(tmp_path / f"deep.{suffix}", gray, 3) == 0


def test_exif_rotation(tmp_path):
    upright = picture(64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # the viewer is to turn it by 90 degrees clockwise
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.jpg", quality=95, exif=exif)
    assert mean_error(tmp_path / "turned.jpg", upright, 3) < 3
    assert np.abs(np.asarray(Image.open(tmp_path / "turned.jpg")).astype(int) - np.asarray(upright)).mean() > 20


def test_missing_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_images(tmp_path / "nowhere")


def test_file_instead_of_folder(tmp_path):
    (tmp_path / "file.png").write_bytes(b"")
    with pytest.raises(ValueError, match="is a file"):
        open_images(tmp_path / "file.png")


def test_no_class_folders(tmp_path):
    picture(16, 16).save(tmp_path / "0.png")
    with pytest.raises(ValueError, match="no class folders"):
        ImageFolder(tmp_path)


def test_empty_classes_are_named(folder):
    for name in ("cherry", "damson"):
        (folder / name).mkdir()
    (folder / "cherry" / "notes.txt").write_text("no image")
    with pytest.raises(ValueError, match="no images in class cherry, damson"):
        ImageFolder(folder)


@pytest.mark.parametrize("name, value", [("image_size", 0), ("channels", 2), ("batch_size", 0), ("workers", 0), ("crop", "middle"),
                                         ("rank", 1), ("decoder", "opencv"), ("world", 0)])  # fmt: skip
def test_impossible_arguments(folder, name, value):
    with pytest.raises(ValueError, match=f"{name}: got {value!r}"):
        ImageBatches(ImageFolder(folder), **dict(batch_size=2, image_size=8) | {name: value})


def damage(path, how):
    data = path.read_bytes()
    path.write_bytes(dict(zero=b"", truncated=data[: len(data) // 2], garbage=b"GIF89a" + bytes(100), text=b"<html>404</html>")[how])


@pytest.fixture
def large_folder(tmp_path):
    """Two classes, 300 images; one bad image is less than 1 %."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for i in range(150):
            picture(8, 8, seed=i).save(tmp_path / name / f"{i:03d}.png")
    return tmp_path


@pytest.mark.parametrize("how", ["zero", "truncated", "garbage", "text"])
def test_bad_images_are_named_counted_and_skipped(large_folder, how, caplog):
    for name in ("a/007.png", "b/149.png"):
        damage(large_folder / name, how)
    data = ImageFolder(large_folder)
    with caplog.at_level(logging.WARNING):
        pictures, labels, indices, bad = one_pass(data, batch_size=64)
    assert indices.tolist() == [i for i in range(300) if i not in (7, 299)]
    assert torch.equal(labels, data.labels[indices]) and len(pictures) == 298
    assert "skipped 2 of 300" in caplog.text and "a/007.png" in caplog.text and "b/149.png" in caplog.text
    assert [name for name, _ in bad] == ["a/007.png", "b/149.png"]


def test_more_than_one_percent_bad_stops(large_folder):
    for i in range(20):
        damage(large_folder / f"a/{i:03d}.png", "truncated")
    data = ImageFolder(large_folder)
    batches = ImageBatches(data, 4, image_size=8)
    with pytest.raises(ValueError, match=r"more than 1% of 300 images cannot be read:\n  a/000.png: .*\n  a/001.png"):
        list(batches.epoch())
    assert len(batches.bad) == 4  # stops there, without reading on


def test_a_file_that_vanishes_is_a_bad_image(large_folder):
    data = ImageFolder(large_folder)
    (large_folder / "a" / "000.png").unlink()
    _, _, indices, bad = one_pass(data)
    assert indices[0] == 1 and len(indices) == 299 and "FileNotFoundError" in bad[0][1]


# Archives


def write_tar(path, members, format=tarfile.USTAR_FORMAT):
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


PICTURES = [encoded(picture(10 + i, 12, seed=i)) for i in range(6)]
CLASS_FOLDERS = {"b/0.png": PICTURES[0], "a/1.png": PICTURES[1], "b/deep/2.PNG": PICTURES[2], "a/notes.txt": b"x", "a/.3.png": b"half",
                 "__MACOSX/a/._1.png": b"x"}  # fmt: skip


def contents(source):
    return {name: source.read(i) for i, name in enumerate(source.names)}


def test_tar_of_class_folders(tmp_path):
    source = open_images(write_tar(tmp_path / "x.tar", CLASS_FOLDERS))
    assert source.names == ["b/0.png", "a/1.png", "b/deep/2.PNG"] and source.classes == ["a", "b"] and source.labels.tolist() == [1, 0, 1]
    assert [source.read(i) for i in range(3)] == PICTURES[:3] and source.labels.dtype == torch.int64


@pytest.mark.parametrize("prefix", ["", "./", "train/", "./data/train/"])
def test_folders_above_the_classes_are_left_out(tmp_path, prefix):
    source = open_images(write_tar(tmp_path / "x.tar", {f"{prefix}{name}": data for name, data in CLASS_FOLDERS.items()}))
    assert source.classes == ["a", "b"] and source.labels.tolist() == [1, 0, 1]


def test_one_class_alone_is_a_class(tmp_path):
    assert open_images(write_tar(tmp_path / "x.tar", {"cat/0.png": PICTURES[0], "cat/1.png": PICTURES[1]})).classes == ["cat"]


def test_webdataset(tmp_path):
    members = {"000.png": PICTURES[0], "000.cls": b"7\n", "000.json": b'{"label": 3}', "001.json": b'{"label": 2, "caption": "x"}',
               "001.png": PICTURES[1], "d/002.png": PICTURES[2], "d/002.seg.png": PICTURES[3], "d/002.json": b'{"cls": 0}',
               "003.txt": b"no image", "003.cls": b"x"}  # fmt: skip
    source = open_images(write_tar(tmp_path / "x.tar", members))
    assert source.names == ["000.png", "001.png", "d/002.png"] and source.labels.tolist() == [7, 2, 0]
    assert source.classes == [str(i) for i in range(8)] and source.read(2) == PICTURES[2]


@pytest.mark.parametrize("label, said", [(b"cat", "cat"), (b"-1", "-1"), (b"1.5", "1.5"), (b"", "b''"), (b"9" * 30, "999")])
def test_a_label_that_is_none_is_named(tmp_path, label, said):
    members = {"0.png": PICTURES[0], "0.cls": b"1", "1.png": PICTURES[1], "1.cls": label}
    with pytest.raises(ValueError, match=f"label of 1.png is .*{said}.*1 such"):
        open_images(write_tar(tmp_path / "x.tar", members))


def test_a_missing_label_is_named(tmp_path):
    members = {"0.png": PICTURES[0], "0.cls": b"1", "1.png": PICTURES[1]}
    with pytest.raises(ValueError, match="1 of 2 images have no label, 1.png first"):
        open_images(write_tar(tmp_path / "x.tar", members))


@pytest.mark.parametrize("pattern", ["s-{00..02}.tar", "s-*.tar", "s-{00,01,02}.tar", "s-0{0..1}.tar s-02.tar", ""])
def test_several_tars_are_one_set(tmp_path, pattern):
    for i in range(3):
        write_tar(tmp_path / f"s-{i:02d}.tar", {f"{name}/{i}.png": PICTURES[2 * i + j] for j, name in enumerate("ba")})
    if " " in pattern:
        with pytest.raises(FileNotFoundError, match="s-00.tar s-02.tar"):
            open_images(tmp_path / pattern)
        return
    source = open_images(tmp_path / pattern)
    assert source.classes == ["a", "b"] and source.labels.tolist() == [1, 0] * 3
    assert source.names[3] == "s-01.tar/a/1.png" and [source.read(i) for i in range(6)] == PICTURES


def test_a_missing_shard_is_named(tmp_path):
    write_tar(tmp_path / "s-0.tar", CLASS_FOLDERS)
    with pytest.raises(FileNotFoundError, match="s-1.tar"):
        open_images(tmp_path / "s-{0..1}.tar")
    with pytest.raises(ValueError, match="{3..1}"):
        open_images(tmp_path / "s-{3..1}.tar")
    with pytest.raises(FileNotFoundError, match="t-"):
        open_images(tmp_path / "t-*.tar")


def test_tars_beside_folders_are_ambiguous(tmp_path, folder):
    write_tar(tmp_path / "s.tar", CLASS_FOLDERS)
    with pytest.raises(ValueError, match="both tar files .s.tar.* and folders"):
        open_images(tmp_path)


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
def test_long_and_foreign_names(tmp_path, format):
    names = [f"{'long' * 20}/{'name' * 20}.png", "caf\u00e9/\u732b.png", "a/plain.png"]
    if format != tarfile.USTAR_FORMAT:
        names.append(f"{'x' * 200}/{'y' * 150}.png")
    source = open_images(write_tar(tmp_path / "x.tar", {name: PICTURES[i] for i, name in enumerate(names)}, format))
    assert source.names == names and [source.read(i) for i in range(len(names))] == PICTURES[: len(names)]
    again = open_images(tmp_path / "x.tar")  # from the kept index
    assert contents(again) == contents(source) and (tmp_path / ".x.tar.index").is_file()


def test_names_that_point_outside_are_only_names(tmp_path):
    source = open_images(write_tar(tmp_path / "x.tar", {"../../etc/0.png": PICTURES[0], "/etc/1.png": PICTURES[1]}))
    assert [source.read(i) for i in range(2)] == PICTURES[:2] and sorted(p.name for p in tmp_path.iterdir()) == [".x.tar.index", "x.tar"]


def test_the_kept_index_is_used_and_made_anew(tmp_path, index_cache, monkeypatch):
    path = write_tar(tmp_path / "x.tar", CLASS_FOLDERS)
    first = open_images(path)
    with monkeypatch.context() as patch:
        patch.setattr(images, "_scan_tar", lambda *_: pytest.fail("scanned again"))
        second = open_images(path)
    assert contents(second) == contents(first) and second.fingerprint == first.fingerprint
    index = tmp_path / ".x.tar.index"
    for damaged in (b"", b"x" * 100, index.read_bytes()[:-8], index.read_bytes()[:-8] + b"\xff" * 8):
        index.write_bytes(damaged)
        assert contents(open_images(path)) == contents(first)
    write_tar(path, CLASS_FOLDERS | {"c/3.png": PICTURES[3]})
    third = open_images(path)
    assert len(third) == 4 and third.fingerprint != first.fingerprint and third.read(3) == PICTURES[3]
    index.unlink()
    tmp_path.chmod(0o555)
    try:
        assert contents(open_images(path)) == contents(third) and not index.exists()
        assert len(list((index_cache / "lightningdit").glob("*.index"))) == 1
    finally:
        tmp_path.chmod(0o755)


def test_an_index_that_cannot_be_kept_is_no_error(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tar", CLASS_FOLDERS)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / ".x.tar.index").mkdir()
    assert len(open_images(path)) == 3


@pytest.mark.parametrize("damage, said", [
    (lambda data: data[:700], "beyond the end|breaks off"),
    (lambda data: data[:1024], "ends without an end mark at byte 1024, behind member b/0.png"),
    (lambda data: data[:1030], "breaks off at byte 1024, behind member b/0.png"),
    (lambda data: data[:1030] + b"x" + data[1031:], "no valid header at byte 1024, behind member b/0.png"),
    (lambda data: data[:124] + b"77777777777\0" + data[136:], "no valid header at byte 0, at its start"),
    (lambda data: data + data, "joined tar files"),
    (lambda data: b"", "ends without an end mark at byte 0"),
    (lambda data: bytes(1024), "no images inside"),
])  # fmt: skip
def test_damaged_tars_are_errors_that_name_the_place(tmp_path, damage, said):
    small = {name: data[:500] for name, data in CLASS_FOLDERS.items()}
    path = write_tar(tmp_path / "x.tar", small)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"x.tar.*({said})"):
        open_images(path)


def test_links_duplicates_and_compressed_tars_are_refused(tmp_path):
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a/0.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member)
    with pytest.raises(ValueError, match="a/0.png is a link"):
        open_images(path)
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.addfile(tarfile.TarInfo("a/0.png"))
    with pytest.raises(ValueError, match="two members are called a/0.png"):
        open_images(path)
    (tmp_path / "x.tar.gz").write_bytes(b"")
    with pytest.raises(ValueError, match="unpack compressed tars"):
        open_images(tmp_path / "x.tar.gz")


def test_a_tar_cut_after_indexing_yields_bad_images(tmp_path):
    path = write_tar(tmp_path / "x.tar", CLASS_FOLDERS)
    source = open_images(path)
    path.write_bytes(path.read_bytes()[:1100])
    with pytest.raises(OSError, match="x.tar ends before byte .* cut after"):
        source.read(2)


@pytest.mark.parametrize("compression", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_zip_of_class_folders(tmp_path, compression):
    source = open_images(write_zip(tmp_path / "x.zip", CLASS_FOLDERS, compression))
    assert source.names == ["a/1.png", "b/0.png", "b/deep/2.PNG"] and source.classes == ["a", "b"] and source.labels.tolist() == [0, 1, 1]
    assert [source.read(i) for i in range(3)] == [PICTURES[1], PICTURES[0], PICTURES[2]]


def described(labels):
    return {"00000/img1.png": PICTURES[1], "00000/img0.png": PICTURES[0], "dataset.json": json.dumps(dict(labels=labels)).encode()}


def test_zip_with_dataset_json(tmp_path):
    source = open_images(write_zip(tmp_path / "x.zip", described([["00000/img1.png", 4], ["00000/img0.png", 2]])))
    assert source.names == ["00000/img0.png", "00000/img1.png"] and source.labels.tolist() == [2, 4] and len(source.classes) == 5
    assert open_images(write_zip(tmp_path / "y.zip", described(None))).labels.tolist() == [0, 0]


@pytest.mark.parametrize("labels, said", [
    ([["00000/img1.png", 4]], "no label for 00000/img0.png"),
    ([["00000/img1.png", 4], ["00000/img0.png", 1], ["2.png", 1]], "names 2.png"),
    ([["00000/img1.png", 4], ["00000/img0.png", "1"]], "expected .*labels"),
    ([["00000/img1.png", 4], ["00000/img0.png", -1]], "expected .*labels"),
    ([["00000/img1.png", 10**9], ["00000/img0.png", 1]], "got label 1000000000"),
    ([], "expected .*labels"), ([4], "expected .*labels"), (3, "expected .*labels"),
])  # fmt: skip
def test_dataset_json_that_does_not_fit(tmp_path, labels, said):
    with pytest.raises(ValueError, match=f"x.zip.*{said}"):
        open_images(write_zip(tmp_path / "x.zip", described(labels)))


def test_a_damaged_zip_member_is_a_bad_image_and_a_damaged_zip_an_error(tmp_path):
    path = write_zip(tmp_path / "x.zip", CLASS_FOLDERS)
    data = bytearray(path.read_bytes())
    data[data.index(PICTURES[0]) + 60] ^= 1
    path.write_bytes(data)
    source = open_images(path)
    assert source.read(0) == PICTURES[1]
    with pytest.raises(ValueError, match="checksum"):
        source.read(1)
    path.write_bytes(data[:-40])
    with pytest.raises(ValueError, match="x.zip: damaged zip file"):
        open_images(path)


@pytest.mark.parametrize("write, name", [(write_tar, "x.tar"), (write_zip, "x.zip")])
def test_images_without_any_class(tmp_path, write, name):
    with pytest.raises(ValueError, match="0.png lies in no class folder"):
        open_images(write(tmp_path / name, {"0.png": PICTURES[0], "a/b.png": PICTURES[1]}))


def all_bytes(source):
    return [source.read(i) for i in range(len(source))]


@pytest.mark.parametrize("kind", ["folder", "tar", "zip"])
def test_any_thread_and_process_reads(tmp_path, kind):
    if kind == "folder":
        for name, data in CLASS_FOLDERS.items():
            (tmp_path / "x" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "x" / name).write_bytes(data)
        shutil.rmtree(tmp_path / "x" / "__MACOSX")
        source = open_images(tmp_path / "x")
    else:
        source = open_images(dict(tar=write_tar, zip=write_zip)[kind](tmp_path / f"x.{kind}", CLASS_FOLDERS))
    expected = all_bytes(source)
    assert sorted(expected) == sorted(PICTURES[:3]) and all_bytes(pickle.loads(pickle.dumps(source))) == expected
    with ThreadPoolExecutor(8) as pool:
        assert all(found == expected for found in pool.map(all_bytes, [source] * 50))
    with ProcessPoolExecutor(1, get_context("fork")) as pool:  # with the parent's open files
        assert pool.submit(all_bytes, source).result() == expected


def test_more_tars_than_may_stay_open(tmp_path, monkeypatch):
    monkeypatch.setattr(images._Files, "MAX_OPEN", 2)
    for i in range(6):
        write_tar(tmp_path / f"{i}.tar", {"a/x.png": PICTURES[i]})
    source = open_images(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    assert all_bytes(source) == PICTURES and all_bytes(source) == PICTURES and len(os.listdir("/proc/self/fd")) == before + 2


def test_fingerprints_of_folders_follow_the_files(folder):
    before = open_images(folder).fingerprint
    assert open_images(folder).fingerprint == before and len(before) == 64
    picture(20, 31).save(folder / "apple" / "1.png")
    assert open_images(folder).fingerprint != before


# Batches


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """A tar of 103 images of 6 x 9 to 16 x 9 pixels."""
    members = {f"{'abc'[i % 3]}/{i:03d}.png": encoded(picture(6 + i % 11, 9, seed=i)) for i in range(103)}
    return open_images(write_tar(tmp_path_factory.mktemp("many") / "x.tar", members))


RANDOM = dict(crop="random", flip=True, shuffle=True, seed=3)


@pytest.mark.parametrize("world", [1, 2, 5])
def test_every_image_once_over_the_ranks(many, world):
    seen = torch.cat([one_pass(many, rank=rank, world=world, batch_size=8, **RANDOM)[2] for rank in range(world)])
    assert sorted(seen.tolist()) == list(range(103))
    equal = [one_pass(many, rank=rank, world=world, batch_size=8, drop_last=True, **RANDOM)[2] for rank in range(world)]
    assert {len(indices) for indices in equal} == {103 // world // 8 * 8} and len(torch.cat(equal).unique()) == sum(map(len, equal))


def test_what_an_image_becomes_depends_on_seed_epoch_and_index_only(many):
    def by_index(**options):
        pictures, labels, indices, _ = one_pass(many, **RANDOM | options)
        assert torch.equal(labels, many.labels[indices])
        return {int(i): image for i, image in zip(indices, pictures, strict=True)}, indices

    alone, order = by_index(batch_size=16, workers=1)
    for options in (dict(batch_size=7, workers=3), dict(shuffle=False), dict(rank=1, world=3), dict(start=48, batch_size=16)):
        other, other_order = by_index(**options)
        assert all(torch.equal(alone[i], other[i]) for i in other), options
        if "start" in options:
            assert torch.equal(other_order, order[48:])
    for options in (dict(epoch=1), dict(seed=4)):
        other, other_order = by_index(**options)
        assert not torch.equal(other_order, order) and sum(torch.equal(alone[i], other[i]) for i in other) < 40, options


def test_crops_and_flips_are_spread_evenly(many):
    batches = ImageBatches(many, 8, image_size=8, crop="random", flip=True)
    places, flips = batches.draws(0, np.arange(20_000))
    assert np.abs(places.mean(0) - 0.5).max() < 0.01 and np.abs(places.var(0) - 1 / 12).max() < 0.002
    assert places.min() >= 0 and places.max() < 1
    correlation = np.corrcoef(np.column_stack([places, flips]).T) - np.eye(3)
    assert abs(flips.mean() - 0.5) < 0.015 and np.abs(correlation).max() < 0.03
    assert not ImageBatches(many, 8, image_size=8).draws(0, np.arange(100))[1].any()


def test_the_random_window_is_resize_then_crop():
    image = picture(300, 400)
    whole = np.asarray(image.resize((85, 64), Image.Resampling.BICUBIC)).astype(int)
    for u, left in ((0.0, 0), (0.5, 11), (0.999, 21)):
        cut = decode_image(encoded(image), 64, 3, (u, 0.7)).astype(int)
        assert np.abs(cut - whole[:, left : left + 64]).max() <= 1  # Pillow rounds the window's corners to 8 bits of a pixel
    assert np.array_equal(decode_image(encoded(image), 64, 3, (0.5, 0), flip=True), decode_image(encoded(image), 64, 3, (0.5, 0))[:, ::-1])


def test_batches_from_any_position(many):
    batches = ImageBatches(many, 10, image_size=8, **RANDOM)
    assert len(batches) == 11 and batches.share == 103 and len(list(batches.epoch(2))) == 11 and list(batches.epoch(2, 103)) == []
    assert len(ImageBatches(many, 10, image_size=8, drop_last=True)) == 10
    for start in (-1, 104):
        with pytest.raises(ValueError, match=f"start: got {start}"):
            batches.epoch(0, start)
    with pytest.raises(ValueError, match="batch_size: got 60, expected at most 51"):
        ImageBatches(many, 60, image_size=8, drop_last=True, world=2)
    for _ in batches.epoch(0):
        break  # a pass may be left


def test_bad_images_leave_gaps_or_are_replaced(large_folder):
    for name in ("a/007.png", "a/008.png"):
        damage(large_folder / name, "truncated")
    source = open_images(large_folder)
    sizes = [len(indices) for *_, indices in ImageBatches(source, 8, image_size=8).epoch()]
    assert sizes[:3] == [7, 7, 8] and sum(sizes) == 298
    batches = ImageBatches(source, 8, image_size=8, drop_last=True)
    found = list(batches.epoch())
    assert [len(indices) for *_, indices in found] == [8] * 37 and found[0][2].tolist() == [0, 1, 2, 3, 4, 5, 6, 9]
    assert found[1][2].tolist() == [9, 9, 10, 11, 12, 13, 14, 15] and torch.equal(found[0][0][7], found[1][0][0]) and len(batches.bad) == 2


def test_a_whole_batch_of_bad_images_is_absent(large_folder):
    damage(large_folder / "a/002.png", "zero")
    found = list(ImageBatches(open_images(large_folder), 1, image_size=8).epoch())
    assert len(found) == 299 and all(len(indices) == 1 for *_, indices in found)


# Kinds of files


def test_cmyk_with_and_without_adobe_marker(tmp_path):
    colour = picture(64, 64)
    adobe = encoded(colour.convert("CMYK"), "JPEG", quality=95)
    at = adobe.index(b"\xff\xee")
    plain = adobe[:at] + adobe[at + 2 + struct.unpack(">H", adobe[at + 2 : at + 4])[0] :]
    inverted = 255 - np.asarray(colour.convert("CMYK"))
    expected = np.asarray(Image.fromarray(inverted, "CMYK").convert("RGB")).astype(int)
    assert np.abs(decode_image(adobe, 64) - np.asarray(colour).astype(int)).mean() < 4
    assert np.abs(decode_image(plain, 64) - expected).mean() < 4  # the same bytes, taken as they are


@pytest.mark.parametrize("data, said", [
    (b"", "empty"), (b"\xff\xd8\xff", "cannot identify|truncated"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot identify"),
])  # fmt: skip
def test_what_is_no_image(data, said):
    with pytest.raises((ValueError, OSError), match=said) as error:
        decode_image(data, 8)
    assert " at 0x" not in str(error.value), "latent stores keep the reason, and must be the same bytes each time"


def test_decompression_bombs_are_refused():
    with pytest.raises((ValueError, Image.DecompressionBombError), match="pixels"):
        decode_image(encoded(Image.new("1", (20_000, 10_000))), 8)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(ValueError, match="10000 x 9000 pixels, expected at most"):
        decode_image(encoded(Image.new("1", (10_000, 9_000))), 8)
    with pytest.raises(ValueError, match="2 x 20000 pixels become more than"):  # a small file that would be made 256 x 2,560,000
        decode_image(encoded(Image.new("1", (2, 20_000))), 256)
    assert decode_image(encoded(Image.new("1", (2, 20_000))), 256, 3, (0, 0.5)).shape == (256, 256, 3)


def test_a_wrong_extension_is_no_matter(tmp_path):
    source = open_images(write_tar(tmp_path / "x.tar", {"a/0.jpg": PICTURES[0]}))
    assert np.array_equal(one_pass(source)[0][0], decode_image(PICTURES[0], 8))


# DALI against Pillow


def both(source, size, **options):
    """(|DALI - Pillow| (n, H, W, C) as float, DALI's ImageBatches)."""
    ours = ImageBatches(source, 16, image_size=size, decoder="dali", workers=2, **options)
    found = list(ours.epoch(1))
    expected = list(ImageBatches(source, 16, image_size=size, decoder="pillow", workers=2, **options).epoch(1))
    assert [batch[2].tolist() for batch in found] == [batch[2].tolist() for batch in expected]
    return torch.cat([(a[0].int() - b[0].int()).abs() for a, b in zip(found, expected, strict=True)]).float(), ours


@needs_dali
@pytest.mark.parametrize("options, mean, image_mean, most", [
    (dict(crop="random", flip=True, shuffle=True), 0.2, 0.3, 20),  # Pillow rounds to 8 bits between its two passes, DALI does not
    (dict(crop="center"), 0.25, 0.7, 70),
    (dict(crop="random", channels=1), 0.25, 0.5, 25),
])  # fmt: skip
def test_dali_cuts_and_resizes_as_pillow_does(samples, options, mean, image_mean, most):
    difference, batches = both(open_images(samples), 256, **options)
    assert batches.decoder == "dali" and batches.fallbacks.total() <= 12 and batches.bad == []
    assert difference.mean() < mean and difference.mean((1, 2, 3)).max() < image_mean and difference.max() <= most
    assert (difference <= 1).float().mean() > 0.99


@pytest.fixture
def mixed(tmp_path):
    """300 images; the first ones are of the kinds that DALI must leave to Pillow, or that nobody can decode."""
    colour, exif = picture(64, 80), Image.Exif()
    members = {f"a/{i:03d}.jpg": encoded(picture(40, 50, seed=i), "JPEG") for i in range(300)}
    kinds = ["a.png", encoded(colour), "b.jpg", encoded(colour.convert("CMYK"), "JPEG"), "c.jpg", b"", "d.jpg", members["a/299.jpg"][:-300]]
    members |= {f"a/{name}": data for name, data in zip(kinds[::2], kinds[1::2], strict=True)}
    for turn in range(1, 9):
        exif[0x0112] = turn
        members[f"a/turn{turn}.jpg"] = encoded(picture(48, 80, seed=turn), "JPEG", exif=exif)
    return open_images(write_tar(tmp_path / "mixed.tar", members))


@needs_dali
@pytest.mark.parametrize("crop", ["center", "random"])
def test_dali_leaves_what_it_cannot_decode_to_pillow(mixed, crop):
    difference, batches = both(mixed, 32, crop=crop)
    assert [name for name, _ in batches.bad] == ["a/c.jpg", "a/d.jpg"]
    assert dict(batches.fallbacks) == {"not a JPEG file": 2, "JPEG of 4 channels of 8 bits": 1, "no end mark": 1}
    assert len(difference) == len(mixed) - 2 and difference.mean((1, 2, 3)).max() < 0.7


@needs_dali
def test_a_file_that_stops_dali_costs_only_itself(tmp_path, caplog):
    members = {f"a/{i:03d}.jpg": encoded(picture(40, 50, seed=i), "JPEG") for i in range(300)}
    data = members["a/020.jpg"]
    table = data.index(b"\xff\xc4")
    for name in ("a/020.jpg", "a/021.jpg", "a/290.jpg"):
        members[name] = data[: table + 5] + b"\xff" * 16 + data[table + 21 :]  # a Huffman table of more codes than there are
    source = open_images(write_tar(tmp_path / "x.tar", members))
    difference, batches = both(source, 32, crop="random")
    assert len(difference) == 297 and [name for name, _ in batches.bad] == ["a/020.jpg", "a/021.jpg", "a/290.jpg"]
    assert batches.fallbacks == {"DALI failed": 3} and "DALI cannot decode image 20" in caplog.text
    assert difference.mean((1, 2, 3)).max() < 0.5


@needs_dali
def test_dali_is_deterministic_and_resumes(mixed):
    options = dict(image_size=32, decoder="dali", **RANDOM)
    first = list(ImageBatches(mixed, 16, workers=1, **options).epoch(2))
    second = list(ImageBatches(mixed, 16, workers=3, **options).epoch(2, 160))
    assert len(second) == len(first) - 10
    for before, after in zip(first[10:], second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@needs_dali
def test_a_pass_by_dali_may_be_left(mixed):
    batches = ImageBatches(mixed, 16, image_size=32, decoder="dali", **RANDOM)
    first = next(batches.epoch())
    for _ in range(2):
        left = batches.epoch()
        assert torch.equal(next(left)[0], first[0])
        left.close()
    before = threading.active_count()
    for _ in range(3):
        next(batches.epoch())
    gc.collect()
    deadline = time.monotonic() + 10
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.05)  # readers end after the image that they are at
    assert threading.active_count() <= before


def test_auto_is_exact_for_the_center_crop_and_says_what_it_took(many, monkeypatch, caplog):
    with caplog.at_level(logging.INFO):
        assert ImageBatches(many, 8, image_size=8).decoder == "pillow" and "decoded by pillow (exact" in caplog.text
        if images_dali.unavailable() is None:
            assert ImageBatches(many, 8, image_size=8, crop="random").decoder == "dali" and "decoded by dali" in caplog.text
        monkeypatch.setattr(images_dali, "unavailable", lambda: "ImportError: no such module")
        assert ImageBatches(many, 8, image_size=8, crop="random").decoder == "pillow" and "no such module" in caplog.text
    with pytest.raises(ImportError, match="pip install nvidia-dali"):
        ImageBatches(many, 8, image_size=8, decoder="dali")


# Random damage


def mutated(data, draw):
    """The bytes with some changed, and perhaps cut off."""
    data = bytearray(data)
    for _ in range(draw(st.integers(0, 6))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))] if draw(st.booleans()) else data)


SEEDS = [encoded(picture(20, 30), "JPEG"), encoded(picture(20, 30), "JPEG", progressive=True), encoded(picture(20, 30)),
         encoded(picture(20, 30).quantize(16), "GIF"), encoded(picture(20, 30), "WEBP"), encoded(picture(20, 30, 1), "TIFF")]


@pytest.mark.fuzz
@examples(150)
@given(st.data())
def test_damaged_images_are_decoded_or_raise(data):
    changed = mutated(data.draw(st.sampled_from(SEEDS)), data.draw)
    header = images_dali.jpeg_header(changed)
    assert isinstance(header, str) and header or len(header) == 2
    try:
        assert decode_image(changed, 16).shape == (16, 16, 3)
        tally("images", "decoded")
    except Exception:  # a decoder may raise nearly anything; the batch names the image: test_bad_images_are_named_counted_and_skipped
        tally("images", "refused")


@pytest.mark.fuzz
@examples(150)
@given(st.data())
def test_damaged_archives_are_errors_or_complete(tmp_path, data):
    """Unless the damage hit names, or bytes of images that a tar has no checksum for, all three images are there; fewer is an error."""
    kind = data.draw(st.sampled_from(["tar", "zip"]))
    path = tmp_path / f"x.{kind}"
    write = dict(tar=write_tar, zip=write_zip)[kind]
    whole = write(path, {"a/0.png": PICTURES[0], "b/1.png": PICTURES[1], "b/2.png": PICTURES[2]}).read_bytes()
    if kind == "zip" and data.draw(st.booleans()):
        whole = write_zip(path, {"a/0.png": PICTURES[0], "b/1.png": PICTURES[1], "b/2.png": PICTURES[2]}, zipfile.ZIP_DEFLATED).read_bytes()
    path.write_bytes(mutated(whole, data.draw))
    try:
        source = open_images(path)
    except ValueError as error:
        assert f"x.{kind}" in str(error)
        return tally("archives", "refused")
    if kind == "zip" and zipfile.ZipFile(path).namelist() != ["a/0.png", "b/1.png", "b/2.png"]:
        return tally("archives", "other names")  # a zip's directory has no checksum of them: what is called .pn~ is no image
    assert len(source) == 3
    outcome = "all images whole" if kind == "zip" else "read, no checksum"
    for i in range(3):
        try:
            found = source.read(i)
        except (ValueError, OSError) as error:
            assert kind == "zip" and str(error)
            outcome = "an image refused"
        else:
            assert kind == "tar" or found in PICTURES
    tally("archives", outcome)
