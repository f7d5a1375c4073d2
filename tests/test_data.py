"""The data path: which files are read, what becomes of every kind of image, the cache, and
batches."""

import builtins
import dataclasses
import os
import re
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, quick_python
from PIL import Image

import ddpm


def config(path, **more):
    return ddpm.preset(
        "animals", **{"data_path": str(path), "image_size": 16, "hflip": False} | more
    )


def load(path, **more):
    more.setdefault("download_dir", str(path) + ".data")
    return ddpm.load_images(config(path, **more))


def one(path, **more):
    """The pixels of the only image in a folder."""
    images = load(path, **more)
    assert len(images.pixels) == 1
    return images.pixels[0].numpy()


def flat(mode, colour, size=(16, 16)):
    return Image.new(mode, size, colour)


# ---- which files


@pytest.mark.quick
def test_a_flat_folder_has_no_classes(tmp_path):
    for i in range(3):
        flat("RGB", (i, 0, 0)).save(tmp_path / f"{i}.png")
    images = load(tmp_path)
    assert (
        len(images.train) == 3
        and images.class_names == []
        and images.labels.tolist() == [-1, -1, -1]
    )


@pytest.mark.quick
def test_sub_folders_are_classes_in_alphabetical_order(image_folder, tmp_path):
    images = load(image_folder, download_dir=str(tmp_path))
    assert images.class_names == ["disc", "square", "stripes"]
    assert images.labels.tolist() == [0] * 8 + [1] * 8 + [2] * 8


def test_folders_deeper_down_belong_to_the_first(tmp_path):
    for place in ("a/x/y", "b", "a"):
        (tmp_path / place).mkdir(parents=True, exist_ok=True)
        flat("RGB", "red").save(tmp_path / place / "p.png")
    images = load(tmp_path)
    assert images.class_names == ["a", "b"] and sorted(images.labels.tolist()) == [0, 0, 1]


@pytest.mark.parametrize("more, expected", [({"class_cond": False}, 0), ({}, 3)])
def test_classes_are_used_only_when_wanted(image_folder, tmp_path, more, expected):
    assert len(load(image_folder, download_dir=str(tmp_path), **more).class_names) == expected


@pytest.mark.quick
def test_suffixes_count_in_any_case_and_other_files_and_dotfiles_do_not(tmp_path):
    for name in (
        "a.png",
        "b.PNG",
        "c.JpG",
        "d.jpeg",
        "e.WEBP",
        "f.bmp",
        "g.TIF",
        "h.tiff",
        "i.gif",
    ):
        flat("RGB", "red").save(tmp_path / name)
    (tmp_path / ".hidden").mkdir()
    shutil.copy(tmp_path / "a.png", tmp_path / ".a.png")
    shutil.copy(tmp_path / "a.png", tmp_path / ".hidden" / "a.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = load(tmp_path)
    assert len(images.train) == 9 and images.class_names == []


def test_no_folder_is_an_error(tmp_path):
    with pytest.raises(ddpm.UserError, match="No folder .*nowhere"):
        load(tmp_path / "nowhere")


@pytest.mark.quick
def test_a_folder_without_images_is_an_error_that_says_what_it_holds(tmp_path):
    for i in range(12):
        (tmp_path / f"{i}.txt").write_text("")
    with pytest.raises(
        ddpm.UserError, match=r"No images in .*: saw 12 files \(\.txt 12\); accepted \.png \.jpg"
    ):
        load(tmp_path)


def test_an_empty_folder_is_an_error(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ddpm.UserError, match="No images in .*empty: saw 0 files"):
        load(tmp_path / "empty")


def test_a_loop_of_links_ends_and_counts_no_image_twice(tmp_path):
    (tmp_path / "a").mkdir()
    flat("RGB", "red").save(tmp_path / "a" / "p.png")
    (tmp_path / "a" / "again").symlink_to(tmp_path)
    assert len(load(tmp_path).train) == 1


def test_max_images_is_a_fixed_choice_by_the_seed(image_folder, tmp_path):
    def chosen(**more):
        return load(image_folder, download_dir=str(tmp_path), max_images=10, **more).pixels

    assert chosen().shape[0] == 10 and torch.equal(chosen(), chosen())
    assert not torch.equal(chosen(), chosen(seed=1))


# ---- all that is there is used, or named


@pytest.mark.parametrize(
    "suffix", "png jfif jpe jp2 avif ppm pgm tga dib pcx apng ico sgi xbm".split()
)
def test_whatever_pillow_opens_is_used(tmp_path, suffix):
    flat("1" if suffix == "xbm" else "L", 200, (32, 32)).save(tmp_path / f"p.{suffix}")
    assert len(load(tmp_path).train) == 1


def test_documents_and_films_are_no_images():
    suffixes = ddpm.image_suffixes()
    assert not suffixes & {".pdf", ".eps", ".ps", ".mpg", ".mpeg", ".h5", ".wmf", ".emf"}
    assert suffixes >= {".psd", ".gif", ".mpo", ".webp"}


def test_the_banner_adds_up(main, tmp_path, capsys):
    (tmp_path / "D").mkdir()
    for i in range(40):
        flat("L", 6 * i).save(f"D/{i:02d}.png")
    Path("D/39.png").write_bytes(b"no image")
    for name in ("a.heic", "b.HEIC", "c.txt", "README", "d.npy", "e.zip", ".hidden"):
        Path("D", name).write_bytes(b"")
    assert main("--mode train --dry_run --steps 1 --max_images 30 --data_path D", TINY) == 0
    out = capsys.readouterr().out
    numbers = r"40 found, (\d+) for training, 0 for validation, (\d) unreadable, 10 not used"
    found = re.search(numbers, out)
    assert int(found[1]) + int(found[2]) == 30
    assert "6 other files: .heic 2, no suffix 1, .txt 1, .npy 1, .zip 1" in out
    assert "unpack archives; convert arrays to images; for .heic: pip install pillow-heif" in out


@pytest.mark.parametrize(
    "name, said",
    [
        ("photos.zip", "is a file (unpack archives): give --data_path a folder"),
        ("all.npy", "is a file (convert arrays to images): give"),
        ("one.jpg", "is a file: give --data_path a folder of images, such as "),
        ("notes.txt", "is a file: give --data_path a folder of images"),
    ],
)
def test_a_file_for_a_folder_gets_a_sentence_that_knows_what_it_is(tmp_path, name, said):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(ddpm.UserError, match=re.escape(said)):
        load(tmp_path / name)


def test_a_folder_of_arrays_is_told_what_to_do(tmp_path):
    (tmp_path / "all.npy").write_bytes(b"")
    with pytest.raises(ddpm.UserError, match="npy 1 .convert arrays to images"):
        load(tmp_path)


def make_images(root, *names):
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        flat("L", 99).save(root / name)


@pytest.mark.parametrize("folders", (["train", "test"], ["Training", "val", "test"]))
def test_splits_are_not_taken_for_classes(tmp_path, folders):
    for folder in folders:
        make_images(tmp_path, f"{folder}/cat/1.png", f"{folder}/dog/1.png")
    with pytest.raises(ddpm.UserError, match=f"splits of one data set.*{folders[0]}"):
        load(tmp_path)
    assert load(tmp_path / folders[0]).class_names == ["cat", "dog"]


def test_classes_that_are_called_like_splits_are_classes(tmp_path):
    make_images(tmp_path, "train/1.png", "car/1.png")
    assert load(tmp_path).class_names == ["car", "train"]


def test_classes_a_folder_too_deep_are_noted(tmp_path):
    make_images(tmp_path, "images/cat/1.png", "images/dog/1.png")
    (note,) = [note for note in load(tmp_path).notes if note.startswith("note: all sub-folders")]
    assert str(tmp_path / "images") in note


def test_links_to_nowhere_are_named(tmp_path):
    make_images(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "gone").symlink_to("/mnt/gone/dogs")
    images = load(tmp_path)
    assert images.class_names == ["cat", "dog"]
    assert f"warning: {tmp_path / 'gone'} (a link to nowhere) cannot be read" in images.notes[0]


def test_a_single_image_in_colour_is_named(tmp_path):
    make_images(tmp_path, *(f"{i:02d}.png" for i in range(20)))
    assert not any("colour," in note for note in load(tmp_path).notes)
    flat("RGB", "red").save(tmp_path / "07.png")
    (note,) = [note for note in load(tmp_path).notes if "colour," in note]
    assert "1 of 20 images" in note and "07.png" in note


def test_images_of_one_colour_are_warned_of(tmp_path):
    for name in ("red", "black", "white"):
        flat("RGB", name).save(tmp_path / f"{name}.png")
    (note,) = [note for note in load(tmp_path).notes if "next to nothing" in note]
    assert "3 of 3 images" in note


def test_images_in_which_nothing_is_to_be_seen_are_warned_of(tmp_path):
    """A single bright pixel sets the scale, and leaves the others black."""
    values = np.zeros((16, 16), np.uint16)
    values[:8] = 60
    for i in range(3):
        Image.fromarray(values).save(tmp_path / f"{i}.png")
    assert not any("next to nothing" in note for note in load(tmp_path).notes)
    values[8, 8] = 65_535
    Image.fromarray(values).save(tmp_path / "3.png")
    (note,) = [note for note in load(tmp_path).notes if "next to nothing" in note]
    assert "3 of 4 images, such as 0.png" in note


# ---- every kind of image


@pytest.mark.parametrize("suffix", ("png", "bmp", "tiff", "gif", "webp", "jpg"))
def test_an_image_keeps_its_colours_in_every_format(tmp_path, suffix):
    colours = (200, 40, 90)
    flat("RGB", colours).save(
        tmp_path / f"p.{suffix}", **({"quality": 95} if suffix in ("jpg", "webp") else {})
    )
    pixels = one(tmp_path)
    assert pixels.dtype == np.uint8 and pixels.shape == (3, 16, 16)
    np.testing.assert_allclose(pixels.transpose(1, 2, 0).reshape(-1, 3), [colours] * 256, atol=4)


@pytest.mark.quick
def test_grey_images_make_a_model_of_one_channel(tmp_path):
    flat("L", 77).save(tmp_path / "p.png")
    assert (one(tmp_path) == 77).all() and one(tmp_path).shape == (1, 16, 16)


def test_one_image_in_colour_makes_all_of_them_colour(tmp_path):
    flat("L", 77).save(tmp_path / "a.png")
    flat("RGB", (1, 2, 3)).save(tmp_path / "b.png")
    pixels = load(tmp_path).pixels
    assert (
        pixels.shape == (2, 3, 16, 16)
        and (pixels[0] == 77).all()
        and pixels[1, :, 0, 0].tolist() == [1, 2, 3]
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "alpha, expected", [(0, (255, 255, 255)), (255, (200, 0, 100)), (51, (244, 204, 224))]
)
def test_alpha_is_laid_over_white(tmp_path, alpha, expected):
    """alpha a/255 over white: c a/255 + 255 (1 - a/255)."""
    flat("RGBA", (200, 0, 100, alpha)).save(tmp_path / "p.png")
    np.testing.assert_allclose(one(tmp_path)[:, 8, 8], expected, atol=1)


def test_grey_with_alpha_is_laid_over_white(tmp_path):
    flat("LA", (0, 51)).save(tmp_path / "p.png")
    np.testing.assert_allclose(one(tmp_path)[:, 8, 8], 204, atol=1)


def test_the_transparent_colour_of_a_palette_is_white(tmp_path):
    image = Image.fromarray(np.repeat([[0, 1]], 16, 0).repeat(8, 1).astype(np.uint8), "P")
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.save(tmp_path / "p.png", transparency=0)
    pixels = one(tmp_path)
    assert pixels[:, 8, 2].tolist() == [255, 255, 255] and pixels[:, 8, 13].tolist() == [
        200,
        100,
        50,
    ]


def test_one_bit_images_are_black_and_white(tmp_path):
    Image.fromarray(np.arange(16)[None].repeat(16, 0) > 7).save(tmp_path / "p.png")
    pixels = one(tmp_path)
    assert pixels.shape[0] == 1 and (pixels[0, :, 2] == 0).all() and (pixels[0, :, 13] == 255).all()


@pytest.mark.parametrize("suffix", ("png", "tiff"))
def test_sixteen_bits_are_scaled_to_eight(tmp_path, suffix):
    Image.fromarray(np.full((16, 16), 128 * 257, np.uint16)).save(tmp_path / f"p.{suffix}")
    pixels = one(tmp_path)
    assert pixels.shape[0] == 1 and (pixels == 128).all()


@pytest.mark.quick
@pytest.mark.parametrize(
    "largest, white",
    [
        (0.8, 1),
        (1, 1),
        (1.35, 2),
        (200, 255),
        (255, 255),
        (256, 511),
        (1023, 1023),  # 10 bits
        (3600, 4095),  # 12 bits
        (10_000, 16_383),  # 14 bits
        (65_535, 65_535),
        (70_000, 131_071),
        (0, 1),
    ],
)
def test_white_is_the_smallest_power_of_two_that_holds_all_values(largest, white):
    assert ddpm.white_level(largest) == white


@pytest.mark.parametrize(
    "maxima, dtype, white",
    [
        ((3600, 1800, 900), np.uint16, 4095),
        ((200, 100, 50), np.uint16, 255),
        ((60_000, 300, 0), np.uint16, 65_535),
        ((0.8, 1.35, 1.0), np.float32, 2),
        ((0.8, 0.4, 0.1), np.float32, 1),
        ((250.0, 3.0, 1.0), np.float32, 255),
        ((3600, -5, 900), np.int32, 4095),
    ],
)
def test_images_of_more_than_8_bits_have_one_scale(tmp_path, maxima, dtype, white):
    """Never one of their own: an image that is darker than the others stays so. 8 bits stay as
    they are."""
    for i, value in enumerate(maxima):
        Image.fromarray(np.full((16, 16), value, dtype)).save(tmp_path / f"{i}.tiff")
    flat("L", 77).save(tmp_path / "eight.png")
    images = load(tmp_path)
    expected = [round(max(value, 0) / white * 255) for value in maxima]
    assert images.pixels[:, 0, 0, 0].tolist() == [*expected, 77]
    assert images.white == white and any(f"{white} white" in note for note in images.notes)
    again = load(tmp_path)
    assert again.white == white and again.notes == images.notes, "from the cache"


def test_a_value_that_is_no_number_does_not_set_the_scale(tmp_path):
    values = np.full((16, 16), 0.5, np.float32)
    values[0, 0], values[0, 1] = np.nan, np.inf
    Image.fromarray(values).save(tmp_path / "p.tiff")
    assert load(tmp_path).white == 1 and one(tmp_path)[0, 8, 8] == 128


def test_lab_is_colour(tmp_path):
    """Its mode begins as that of grey images does."""
    flat("LAB", (128, 200, 50)).save(tmp_path / "p.tiff")
    assert one(tmp_path).shape[0] == 3


def test_the_scale_of_the_data_is_that_of_an_image_to_edit(main, tmp_path):
    """It is in the checkpoint: an image half as bright as the data's white is grey."""
    (tmp_path / "D").mkdir()
    for i in range(4):
        Image.fromarray(np.full((16, 16), 900 * (i + 1), np.uint16)).save(f"D/{i}.png")
    flags = "--mode train --data_path D --steps 1 --sampling_steps 1 --model_path m.pt"
    assert main(TINY, flags) == 0
    model, _, config = ddpm.load_model("m.pt")
    assert model.white == 4095
    Image.fromarray(np.full((16, 16), 2048, np.uint16)).save("half.png")
    config = ddpm.override(config, init_image="half.png")
    _, image, _ = ddpm.load_edit(config, model)
    assert (ddpm.to_pixels(image) == 128).all()
    Image.fromarray(np.full((16, 16), 9000, np.uint16)).save("D/0.png")
    assert main("--mode train --resume --steps 2 --model_path m.pt") == 1


def test_cmyk_becomes_rgb(tmp_path):
    flat("CMYK", (0, 255, 255, 0)).save(tmp_path / "p.jpg", quality=95)
    np.testing.assert_allclose(one(tmp_path)[:, 8, 8], (255, 0, 0), atol=6)


@pytest.mark.quick
@pytest.mark.parametrize("kind", ["png", "webp", "jpg"])
def test_damaged_exif_costs_no_image(tmp_path, kind):
    """Blocks that are no TIFF, and a tag of a wrong type, which Pillow fails to write back."""
    turned = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    text = struct.pack("<HHI4s", 0x011A, 2, 3, b"72")  # XResolution, a rational
    tiff = b"II*\0" + struct.pack("<IH", 8, 2) + turned + text + bytes(4)
    block = b"Exif\0\0" + (tiff if kind == "jpg" else b"no TIFF at all")
    path = tmp_path / f"p.{kind}"
    Image.new("RGB", (32, 16), (255, 0, 0)).save(path, exif=block)
    pixels = ddpm.load_image(str(path), 16, 3)
    assert pixels.shape[-2:] == (16, 16)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ddpm.UserError):
        ddpm.load_image(str(path), 16, 3)


def test_the_orientation_in_exif_is_applied(tmp_path):
    """Orientation 6: the camera lay on its side, and the file's left edge is the image's top."""
    image = Image.new("RGB", (16, 16), "blue")
    image.paste("red", (0, 0, 8, 16))
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "p.png", exif=exif)
    pixels = one(tmp_path)
    assert (pixels[0, :6] > 200).all() and (pixels[2, 10:] > 200).all()


def test_the_first_frame_of_an_animation_is_taken(tmp_path):
    flat("RGB", (255, 0, 0)).save(
        tmp_path / "p.gif", save_all=True, append_images=[flat("RGB", (0, 0, 255))]
    )
    np.testing.assert_allclose(one(tmp_path)[:, 8, 8], (255, 0, 0), atol=1)


def test_a_single_pixel_becomes_a_whole_image(tmp_path):
    flat("RGB", (9, 8, 7), (1, 1)).save(tmp_path / "p.png")
    assert (one(tmp_path) == np.array([9, 8, 7]).reshape(3, 1, 1)).all()


@pytest.mark.quick
@pytest.mark.parametrize("turn", (False, True))
def test_the_central_square_is_cut_out(tmp_path, turn):
    """Red, green and blue thirds side by side: only the middle one is left."""
    image = Image.new("RGB", (96, 32), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 31, 32))
    image.paste((0, 0, 255), (65, 0, 96, 32))
    (image.transpose(Image.Transpose.ROTATE_90) if turn else image).save(tmp_path / "p.png")
    pixels = one(tmp_path)
    assert (pixels[1] > 250).all() and (pixels[[0, 2]] < 5).all()


@pytest.mark.quick
def test_images_are_resized_with_antialiasing(tmp_path):
    """A fine chequerboard averages to grey; picking pixels would give black or white."""
    board = (np.indices((160, 160)).sum(0) % 2 * 255).astype(np.uint8)
    Image.fromarray(board).save(tmp_path / "p.png")
    np.testing.assert_allclose(one(tmp_path), 127.5, atol=6)


def test_a_large_jpeg_is_right_at_a_small_size(tmp_path):
    y, x = np.mgrid[:400, :400]
    Image.fromarray(np.stack([x, y, 0 * x], 2).astype(np.uint8) // 2).save(
        tmp_path / "p.jpg", quality=95
    )
    ramp = (np.arange(16) + 0.5) * 25 % 256 // 2
    assert np.abs(one(tmp_path)[0].mean(0)[1:9] - ramp[1:9]).max() < 4


@pytest.mark.quick
def test_28_pixels_are_padded_to_32_with_their_border(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (28, 28), np.uint8)
    Image.fromarray(values).save(tmp_path / "p.png")
    pixels = one(tmp_path, image_size=28)
    assert pixels.shape == (1, 32, 32)
    np.testing.assert_array_equal(pixels[0, 2:-2, 2:-2], values)


# ---- unreadable files


def folder_with_unreadable(root, good, unreadable):
    root.mkdir()
    for i in range(good):
        flat("L", i).save(root / f"good{i:03d}.png")
    for i in range(unreadable):
        (root / f"bad{i}.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    return root


def test_a_few_unreadable_files_are_listed_and_left_out(tmp_path, capsys):
    images = load(folder_with_unreadable(tmp_path / "few", 21, 1))
    assert len(images.train) == 21 and images.num_unreadable == 1
    assert "bad0.png" in capsys.readouterr().err
    rows = np.sort(np.concatenate([images.order(0), images.validation]))
    assert sorted(images.pixels[rows, 0, 0, 0].tolist()) == list(range(21)), (
        "without the unreadable one"
    )


@pytest.mark.parametrize("good, unreadable", [(19, 1), (0, 1), (5, 5)])
def test_five_percent_of_unreadable_files_are_too_many(tmp_path, good, unreadable):
    with pytest.raises(ddpm.UserError, match="5 %"):
        load(folder_with_unreadable(tmp_path / "many", good, unreadable))


@pytest.mark.quick
def test_a_truncated_image_is_unreadable_not_half_grey(tmp_path):
    root = folder_with_unreadable(tmp_path / "cut", 30, 0)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(root / "whole.png")
    (root / "cut.png").write_bytes((root / "whole.png").read_bytes()[:6000])
    assert load(root).num_unreadable == 1


def test_a_decompression_bomb_is_refused(tmp_path):
    root = folder_with_unreadable(tmp_path / "bomb", 30, 0)
    Image.new("1", (30_000, 30_000)).save(root / "bomb.png")
    assert load(root).num_unreadable == 1


# ---- the cache of decoded images


def test_the_cache_holds_what_the_files_do(image_folder, tmp_path):
    first, second = [load(image_folder, download_dir=str(tmp_path)) for _ in range(2)]
    assert len(list(tmp_path.rglob("*.npy"))) == 1
    names = sorted(str(path.relative_to(image_folder)) for path in image_folder.rglob("*.png"))
    for row, name in enumerate(names):
        with Image.open(image_folder / name) as image:
            expected = ddpm.decode(image, 16, 3)
        assert np.array_equal(first.pixels[row].numpy(), expected), name
    assert torch.equal(first.pixels, second.pixels) and torch.equal(first.labels, second.labels)
    for a, b in zip(first.batch(3, 8), second.batch(3, 8)):
        assert torch.equal(a, b)


def test_the_cache_is_a_file_and_its_errors_in_download_dir(tmp_path):
    """However few images there are; training uses what is in it."""
    root = folder_with_unreadable(tmp_path / "few", 25, 1)
    images = load(root, download_dir=str(tmp_path / "d"))
    files = sorted((tmp_path / "d").rglob("*-*"))
    assert [path.suffix for path in files] == [".json", ".npy"]
    assert {path.parent for path in files} == {tmp_path / "d" / ".decoded"}
    pixels, unreadable, *_ = ddpm.read_cache(files[1])
    assert np.array_equal(pixels, images.pixels.numpy()) and np.array_equal(
        pixels, np.load(files[1])
    )
    assert list(unreadable) == [0] and "UnidentifiedImageError" in unreadable[0]
    assert not set(images.train) & {0} and len(images.train) == 25


def test_nothing_is_no_cache(tmp_path):
    assert ddpm.read_cache(tmp_path / "gone.npy") is None


@pytest.mark.parametrize("n", (0, 1, 20, -1, None))
@pytest.mark.parametrize("suffix", (".npy", ".json"))
def test_a_damaged_cache_is_decoded_anew(tmp_path, suffix, n):
    """Cut to its first n bytes (-1: all but the last), or gone."""
    root = folder_with_unreadable(tmp_path / "few", 25, 1)
    before = load(root, download_dir=str(tmp_path / "d"))
    expected, [path] = before.pixels.clone(), (tmp_path / "d").rglob("*" + suffix)
    whole = path.read_bytes()
    path.unlink()
    if n is not None:
        path.write_bytes(whole[:n])
    after = load(root, download_dir=str(tmp_path / "d"))
    assert torch.equal(after.pixels, expected) and after.num_unreadable == 1
    assert path.read_bytes() == whole


@pytest.mark.quick
def test_the_second_start_decodes_nothing(image_folder, tmp_path, monkeypatch):
    load(image_folder, download_dir=str(tmp_path))
    monkeypatch.setattr(Image, "open", lambda *_: pytest.fail("an image was opened"))
    assert len(load(image_folder, download_dir=str(tmp_path)).train) == 24


def test_the_cache_remembers_what_was_unreadable(tmp_path):
    root = folder_with_unreadable(tmp_path / "few", 25, 1)
    assert [load(root).num_unreadable for _ in range(2)] == [1, 1]


@pytest.mark.parametrize("change", ("pixels", "new", "gone", "size", "max_images"))
def test_whatever_changes_makes_a_new_cache(image_folder, tmp_path, change):
    root = tmp_path / "mine"
    shutil.copytree(image_folder, root)
    before, more, victim = load(root).pixels.clone(), {}, root / "disc" / "0.png"
    if change == "pixels":
        flat("RGB", (1, 2, 3), (20, 20)).save(victim)
        os.utime(victim, ns=(1, 1))
    elif change == "new":
        shutil.copy(victim, root / "disc" / "99.png")
    elif change == "gone":
        victim.unlink()
    else:
        more = {"image_size": 32} if change == "size" else {"max_images": 20}
    after = load(root, **more).pixels
    assert after.shape != before.shape or not torch.equal(after, before)
    fresh = load(root, download_dir=str(tmp_path / "other"), **more).pixels
    assert torch.equal(after, fresh)


def caches(folder):
    return sorted(path.name for path in (folder / ".decoded").iterdir())


def test_caches_of_earlier_states_of_a_folder_go_and_no_others(image_folder, tmp_path):
    root = tmp_path / "mine"
    where = dict(download_dir=str(tmp_path))
    shutil.copytree(image_folder, root)
    load(image_folder, **where)
    for options in (dict(image_size=8), dict(max_images=3), dict(max_images=3, seed=1)):
        load(root, **where, **options)
    others = caches(tmp_path)
    mapped = load(root, **where)
    before = mapped.pixels.clone()
    [pixels, _] = mine = sorted(set(caches(tmp_path)) - set(others), reverse=True)
    of_a_crash, of_now = [
        tmp_path / ".decoded" / pixels.replace(".npy", f".{pid}.tmp") for pid in (4242, 4243)
    ]
    for path in (of_a_crash, of_now):
        path.write_bytes(b"half")
    os.utime(of_a_crash, times=(0, 0))
    shutil.copy(root / "disc" / "0.png", root / "disc" / "new.png")
    assert len(load(root, **where).train) == 25
    assert set(others) < set(caches(tmp_path)), "those of other folders and options stay"
    left = set(caches(tmp_path)) - set(others)
    assert len(left) == 3 and of_now.name in left and not left & {*mine, of_a_crash.name}
    assert torch.equal(mapped.pixels, before), "a run that uses the old one is not disturbed"


def test_a_cache_that_cannot_be_removed_is_left(tmp_path, monkeypatch):
    root = folder_with_unreadable(tmp_path / "few", 3, 0)
    load(root)
    unlink = Path.unlink

    def unlink_on_windows(self, missing_ok=False):
        if self.suffix in (".npy", ".json"):
            raise PermissionError(13, "in use by another process")
        unlink(self, missing_ok)

    flat("L", 9).save(root / "new.png")
    monkeypatch.setattr(Path, "unlink", unlink_on_windows)
    assert len(load(root).train) == 4 and len(caches(tmp_path / "few.data")) == 4


def test_the_cache_in_a_folder_of_images_is_no_class_and_the_banner_names_it(
    main, image_folder, tmp_path, capsys
):
    shutil.copytree(image_folder, tmp_path / "data")
    for _ in range(2):
        assert main("--mode train --dry_run --data_path data", TINY) == 0
        said = capsys.readouterr().out
        megabytes = 24 * 3 * 16 * 16 / 1e6
        assert f"cache     {megabytes:.3g} MB in {tmp_path / 'data' / '.decoded'}\n" in said
        assert "other files" not in said


def test_the_pixels_in_a_cache_file_cannot_be_written_to_by_accident(image_folder, tmp_path):
    images = load(image_folder, download_dir=str(tmp_path))
    original = images.pixels.clone()
    images.pixels.zero_()
    assert torch.equal(load(image_folder, download_dir=str(tmp_path)).pixels, original)


DECODING = """import sys, time
from pathlib import Path
import ddpm
path, folder = sys.argv[1:]
config = ddpm.preset("animals", data_path=path, image_size=16, hflip=False, download_dir=f"{folder}/d")
print("ready")
while not Path(folder, "start").exists():
    time.sleep(0.001)
sys.stderr.write(ddpm.load_images(config).pixels.numpy().tobytes().hex())
"""


def test_two_starts_at_once_are_both_right(background, image_folder, tmp_path):
    expected = load(image_folder, download_dir=str(tmp_path)).pixels.numpy().tobytes()
    program = tmp_path / "decoding.py"
    program.write_text(DECODING)
    outputs = [tmp_path / f"{i}.out" for i in range(2)]
    processes = [
        background(image_folder, tmp_path, file=program, out=out, err=f"{out}.hex", PYTHONPATH=str(ROOT))
        for out in outputs
    ]
    while not all(out.exists() and out.read_text() for out in outputs):
        assert [process.poll() for process in processes] == [None] * 2
        time.sleep(0.05)
    (tmp_path / "start").touch()
    assert [process.wait(120) for process in processes] == [0, 0]
    for out in outputs:
        decoded = Path(f"{out}.hex").read_text().split("\n")[-1]
        assert bytes.fromhex(decoded.split("\r")[-1]) == expected
    left = [p.name for p in (tmp_path / "d").rglob("*") if p.is_file()]
    assert len(left) == 2 and not any("tmp" in name for name in left), "no half-written file stays"


# ---- batches


@pytest.mark.quick
def test_a_batch_is_a_pure_function_of_the_step(image_folder, tmp_path):
    a, b = (load(image_folder, download_dir=str(tmp_path)) for _ in range(2))
    for step in (5, 0, 11, 5):
        for x, y in zip(a.batch(step, 4), b.batch(step, 4)):
            assert torch.equal(x, y)
        a.batch(step + 3, 4)
    assert not torch.equal(a.batch(0, 4)[0], a.batch(1, 4)[0])


@pytest.mark.quick
@pytest.mark.parametrize("num_micro_batches", (2, 3, 6))
def test_the_micro_batches_of_a_batch_together_are_the_batch(
    image_folder, tmp_path, num_micro_batches
):
    images = load(image_folder, download_dir=str(tmp_path))
    for step in (0, 2, 5, 9):  # some across the end of an epoch
        whole = images.batch(step, 18)
        parts = [images.batch(step, 18, i, num_micro_batches) for i in range(num_micro_batches)]
        for a, b in zip(whole, zip(*parts)):
            assert torch.equal(a, torch.cat(b))


@pytest.mark.quick
@pytest.mark.parametrize("batch_size", (1, 5, 7, 24, 40))
def test_an_epoch_shows_each_image_once_whatever_the_batch(image_folder, tmp_path, batch_size):
    images = load(image_folder, download_dir=str(tmp_path))
    seen = torch.cat([images.batch(step, batch_size)[0] for step in range(96 // batch_size + 1)])[
        :96
    ]
    epochs = seen.flatten(1).reshape(4, 24, -1)
    distinct = [epoch.unique(dim=0) for epoch in epochs]
    assert all(len(d) == 24 for d in distinct)
    assert not torch.equal(epochs[0], epochs[1]), "each epoch has an order of its own"


@pytest.mark.quick
def test_labels_stay_with_their_images(image_folder, tmp_path):
    images = load(image_folder, download_dir=str(tmp_path))
    for step in range(6):
        for x, label in zip(*images.batch(step, 4)):
            row = next(i for i in range(24) if torch.equal(ddpm.to_network(images.pixels[i]), x))
            assert label == row // 8


@pytest.mark.quick
def test_images_are_in_the_range_of_the_network(image_folder, tmp_path):
    x, _ = load(image_folder, download_dir=str(tmp_path)).batch(0, 24)
    assert x.dtype == torch.float32 and -1 <= x.min() < -0.9 and 0.9 < x.max() <= 1


def test_one_image_is_enough(tmp_path):
    flat("RGB", "red").save(tmp_path / "p.png")
    x, y = load(tmp_path).batch(7, 5)
    assert x.shape == (5, 3, 16, 16) and y.tolist() == [-1] * 5


@pytest.mark.quick
def test_mirroring_is_decided_for_each_image_by_torchs_generator(image_folder, tmp_path):
    plain = load(image_folder, download_dir=str(tmp_path)).batch(0, 24)[0]
    images, mirrored = load(image_folder, download_dir=str(tmp_path), hflip=True), 0
    for seed in range(20):
        torch.manual_seed(seed)
        x = images.batch(0, 24)[0]
        is_plain = (x == plain).flatten(1).all(1)
        is_mirrored = (x == plain.flip(3)).flatten(1).all(1)
        assert (is_plain | is_mirrored).all()
        assert 0 < is_mirrored.sum() < 24, "one coin for the whole batch"
        mirrored += is_mirrored.float().mean().item() / 20
        torch.manual_seed(seed)
        assert torch.equal(images.batch(0, 24)[0], x)
    assert abs(mirrored - 0.5) < 0.1


@pytest.mark.quick
def test_the_validation_images_are_kept_out_and_stay_the_same(image_folder, tmp_path):
    first, again, other = (
        load(image_folder, download_dir=str(tmp_path), holdout=0.25, seed=s) for s in (0, 0, 1)
    )
    assert len(first.validation) == 6 and len(first.train) == 18
    assert (
        not set(first.validation) & set(first.train)
        and len({*first.validation, *first.train}) == 24
    )
    np.testing.assert_array_equal(first.validation, again.validation)
    assert set(first.validation) != set(other.validation)
    shown = torch.cat([first.batch(s, 6)[0] for s in range(3)])
    for row in first.validation:
        assert not (shown == ddpm.to_network(first.pixels[row])).flatten(1).all(1).any()


@pytest.mark.parametrize("holdout", (0.01, 0.9))
def test_a_holdout_that_leaves_nothing_is_an_error(tmp_path, holdout):
    flat("RGB", "red").save(tmp_path / "p.png")
    with pytest.raises(ddpm.UserError, match="holdout"):
        load(tmp_path, holdout=holdout)


# ---- torchvision's data sets


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    real = builtins.__import__

    def without_scipy(name, *args, **kwargs):
        if name.split(".")[0] == "scipy":
            raise ImportError("No module named 'scipy'", name="scipy")
        return real(name, *args, **kwargs)

    monkeypatch.setattr("torchvision.datasets.Flowers102._check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.Flowers102.download", lambda self: None)
    monkeypatch.setattr(builtins, "__import__", without_scipy)
    for module in [name for name in sys.modules if name.split(".")[0] == "scipy"]:
        monkeypatch.delitem(sys.modules, module)
    with pytest.raises(ddpm.UserError, match="pip install scipy"):
        ddpm.load_images(dataclasses.replace(config("flowers102"), download_dir=str(tmp_path)))


@pytest.mark.parametrize("name", ("cifar10", "fashion_mnist", "mnist", "flowers102"))
def test_a_blocked_download_says_where_to_put_the_files(tmp_path, monkeypatch, name):
    def blocked(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr("urllib.request.urlopen", blocked)
    with pytest.raises(ddpm.UserError, match=re.escape(str(tmp_path))):
        ddpm.load_images(config(name, download_dir=str(tmp_path)))


def test_a_folder_called_like_a_data_set_is_not_passed_over_in_silence(
    tmp_path, monkeypatch, capsys
):
    (tmp_path / "mnist").mkdir()
    flat("RGB", "red").save(tmp_path / "mnist" / "p.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: 1 / 0)
    with pytest.raises(ddpm.UserError):
        ddpm.load_images(config("mnist", download_dir=str(tmp_path)))
    advice = re.search(r"--data_path (\./\S+)$", capsys.readouterr().out.strip())[1]
    assert ddpm.load_images(config(advice, download_dir=str(tmp_path))).num_found == 1


@pytest.mark.skipif(
    "DDPM_TEST_DATA" not in os.environ,
    reason="DDPM_TEST_DATA names no folder with FashionMNIST/raw",
)
def test_fashion_mnist_is_read_bit_for_bit(tmp_path):
    import gzip

    raw = Path(os.environ["DDPM_TEST_DATA"], "FashionMNIST", "raw")
    shutil.copytree(raw, tmp_path / "FashionMNIST" / "raw")
    images = ddpm.load_images(
        ddpm.preset("fashion_mnist", download_dir=str(tmp_path), max_images=500)
    )
    assert images.pixels.shape == (500, 1, 32, 32) and len(images.class_names) == 10
    values = np.frombuffer(
        gzip.open(raw / "train-images-idx3-ubyte.gz").read()[16:], np.uint8
    ).reshape(-1, 28, 28)
    labels = np.frombuffer(gzip.open(raw / "train-labels-idx1-ubyte.gz").read()[8:], np.uint8)
    known = {v.tobytes(): label for v, label in zip(values, labels)}
    for image, label in zip(images.pixels[:, 0, 2:-2, 2:-2].numpy(), images.labels.tolist()):
        assert known[image.tobytes()] == label


def test_importing_the_program_does_nothing_and_needs_no_scipy(tmp_path):
    unwanted = {"scipy", "matplotlib.pyplot", "diffusers"}
    code = f"import sys, ddpm; assert not {unwanted} & set(sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=os.environ | quick_python(ROOT),
    )
    assert (
        result.returncode == 0
        and result.stdout == result.stderr == ""
        and not list(tmp_path.iterdir())
    )
