"""Images: crops to the bit, every kind of file, and every kind of bad input."""

import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from lightningdit import images
from lightningdit.images import ImageBatches, ImageFolder, center_crop, decode_image, digits, open_images, to_pixels


def picture(height, width, channels=3, seed=0):
    """Smooth enough that JPEG keeps it, with four corners of different colours."""
    y, x = np.mgrid[0:height, 0:width] / max(height, width)
    planes = [0.5 + 0.5 * np.sin(3 * x * (c + 1) + 2 * y + seed + c) for c in range(channels)]
    array = (255 * np.stack(planes, axis=-1)).astype(np.uint8)
    return Image.fromarray(array if channels == 3 else array[..., 0])


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
    for i, path in enumerate(data.files):
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
