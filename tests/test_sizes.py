"""Images that are no squares, 32 wide and 16 high, through all that takes images; and --resize."""

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, checkpoint, exit_code, places, tree, use_real_plots, words
from PIL import Image

import convert
import ddpm
import evaluate

WIDE = f"{TINY} --image_size 32x16"  # and attention at a height of 8


def ramp(width, height):
    """Pixels (height, width, 3) that grow from left to right only, so that no turn is missed."""
    row = np.linspace(0, 240, width).round().astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def grows_to_the_right(pixels):
    """Whether images (..., H, W) are those of `ramp`, scaled."""
    pixels = torch.tensor(np.asarray(pixels)).float()
    rows_agree = (pixels - pixels[..., :1, :]).abs().max() <= 1
    return bool(rows_agree and (pixels.diff(dim=-1) >= 0).all() and pixels.std() > 50)


@pytest.fixture(scope="module")
def ramps(tmp_path_factory):
    """A folder of eight images of 48x24 in two classes, each a bit darker than the one before."""
    root = tmp_path_factory.mktemp("ramps")
    for i in range(8):
        folder = root / "ab"[i % 2]
        folder.mkdir(exist_ok=True)
        Image.fromarray(ramp(48, 24) - (ramp(48, 24) > i) * np.uint8(i)).save(folder / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(ramps, tmp_path_factory):
    """The folder of a run of four steps on those images."""
    folder = tmp_path_factory.mktemp("run")
    more = "--steps 4 --save_every 2 --sample_every 4 --keep_last 9"
    with pytest.MonkeyPatch.context() as patch:
        use_real_plots(patch)
        assert ddpm.main(words("--mode train", WIDE, more, *places(folder, ramps))) == 0
    return folder


@pytest.fixture
def sample(run, tmp_path, monkeypatch):
    """sample(*flags) -> the exit code of --mode sample with that run's model, in a new folder."""
    monkeypatch.chdir(tmp_path)
    flags = ["--mode sample --samples_dir out --device cpu --model_path", run / "model.pt"]
    return lambda *more: exit_code(ddpm.main, *flags, *more)


def size(path):
    """(width, height) of an image file."""
    with Image.open(path) as image:
        return image.size


def grid_size(columns, rows, zoom=2):
    """Of a grid of images of 32x16, 2 pixels apart."""
    return columns * (32 * zoom + 2) + 2, rows * (16 * zoom + 2) + 2


def config_of(path, **settings):
    return ddpm.override(ddpm.Config(data_path=str(path), image_size="32x16"), **settings)


# ---- what --image_size means


def test_one_number_is_a_square_however_it_is_written():
    for given in (64, "64", "64x64"):
        config = ddpm.Config(image_size=given)
        assert config.image_size == 64 and type(config.image_size) is int
        assert config == ddpm.Config() and ddpm.image_sides(given) == (64, 64)
    assert ddpm.Config(image_size="96x64").image_size == "96x64"
    assert ddpm.image_sides("96x64") == (64, 96)  # height first, as in tensors
    assert ddpm.size_text(64) == "64x64" and ddpm.size_text("96x64") == "96x64"


@pytest.mark.parametrize(
    "flags, expected",
    [
        ("--image_size 90x64", "divisible by 16: use 80x64 or 96x64"),
        ("--image_size 90x60", "divisible by 16: use 80x48 or 96x64"),
        ("--image_size 64x60", "divisible by 16: use 64x48 or 64"),
        ("--image_size 60", "divisible by 16: use 48 or 64"),
        ("--image_size 60x60", "--image_size 60 must be divisible by 16: use 48 or 64"),
        ("--image_size 1020x64 --patch 3", "divisible by 24: use 1008x48"),
        ("--image_size 1020x20 --patch 3", "divisible by 24: use 1008x24."),
        ("--image_size 30 --patch 7 --channel_mults 1 2", "divisible by 14: use 14 or 42"),
        ("--image_size 64 --patch 16 --channel_mults 1 1 1 1 1 1 1 1", "use fewer --channel_mults"),
        ("--image_size 64x4", "--image_size 4 is out of range: give 8 to 1024"),
        ("--image_size 2048x64", "--image_size 2048 is out of range: give 8 to 1024"),
        ("--image_size 64x", "--image_size 64x: give 8 to 1024 or, for other shapes than squares, "
         "WIDTHxHEIGHT, as in 96x64."),
        ("--image_size 64,32", "--image_size 64,32: give 8 to 1024"),
        ("--image_size wide", "--image_size wide: give 8 to 1024"),
        ("--image_size 64x32x3", "--image_size 64x32x3: give 8 to 1024"),
        ("--image_size 96x64 --attention_at 48", "the stages have heights 32 16 8 4"),
        ("--resize bend", "invalid choice: 'bend'"),
    ],
)  # fmt: skip
def test_a_size_that_does_not_work_is_refused_with_those_that_do(capsys, flags, expected):
    assert exit_code(ddpm.main, "--mode train", flags) in (1, 2)
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize("patch", [1, 3, 7, 16])
@pytest.mark.parametrize("size", [9, 28, 30, "33x27", "28x45", "1019x11"])
def test_the_sizes_that_a_refusal_names_are_accepted(patch, size):
    config = ddpm.Config(image_size=size, patch=patch, channel_mults=(1, 2), attention_at=())
    sizes = ddpm.nearest_sizes(config)
    assert sizes
    for other in sizes:
        ddpm.check(ddpm.override(config, image_size=other))


def test_batchnorm_needs_two_values_of_an_image_that_may_be_two_pixels_of_width(ramps):
    runtime = ddpm.Runtime(torch.device("cpu"), "fp32", 0, 1)
    narrow = config_of(ramps, arch="simple", image_size=16, batch_size=1)
    with pytest.raises(ddpm.UserError, match="one pixel to normalise by"):
        ddpm.check_run(narrow, runtime)
    ddpm.check_run(ddpm.override(narrow, image_size="32x16"), runtime)


@pytest.mark.parametrize("arch", ["simple", "resnet18"])
def test_all_networks_take_images_that_are_no_squares(arch):
    config = ddpm.Config(arch=arch, image_size="64x32", channels=8)
    model = ddpm.build_model(config, 3, []).eval()
    assert model.image_shape == (3, 32, 64)
    x = torch.randn(2, 3, 32, 64)
    assert model(x, torch.tensor([1, 2])).shape == x.shape


# ---- images


def test_images_are_decoded_at_their_size_and_not_turned(ramps, tmp_path):
    images = ddpm.load_images(config_of(ramps, download_dir=str(tmp_path)))
    assert images.pixels.shape == (8, 3, 16, 32) and grows_to_the_right(images.pixels)
    images.hflip = True
    torch.manual_seed(0)
    x0, _ = images.batch(0, 8)
    flipped = [not grows_to_the_right(ddpm.to_pixels(x)) for x in x0]
    assert 0 < sum(flipped) < 8
    upright = [x.flip(2) if is_flipped else x for x, is_flipped in zip(x0, flipped)]
    assert all(grows_to_the_right(ddpm.to_pixels(x)) for x in upright)


def test_a_photo_that_says_it_lies_on_its_side_is_turned_first(tmp_path):
    """Stored upright in 480x960 with orientation 6: to be turned by 90 degrees to the right."""
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(ramp(960, 480)).rotate(90, expand=True)
    for i in range(10):
        stored.save(tmp_path / f"{i}.jpg", exif=exif, quality=95)
    pixels = ddpm.decode(Image.open(tmp_path / "0.jpg"), "32x16", 3)
    assert pixels.shape == (3, 16, 32) and grows_to_the_right(pixels)
    images = ddpm.load_images(config_of(tmp_path, image_size=16, download_dir=str(tmp_path / "d")))
    assert [note for note in images.notes if "2 times as wide as high" in note]


@pytest.mark.parametrize("width, height", [(28, 28), (56, 28), (28, 64)])
def test_sides_of_28_pixels_get_a_border_of_2_which_is_cropped(width, height):
    size = f"{width}x{height}"
    pixels = torch.from_numpy(ddpm.decode(Image.fromarray(ramp(width, height)), size, 3))
    padded = {28: 32}
    assert pixels.shape == (3, padded.get(height, height), padded.get(width, width))
    cropped = ddpm.crop(pixels, ddpm.Config(image_size=size).image_size)
    assert np.array_equal(cropped.permute(1, 2, 0), ramp(width, height))


# ---- --resize


def dotted(width, height, colour, edge, edge_row):
    """One colour, with edges of another, and the first row of a third."""
    pixels = np.empty((height, width, 3), np.uint8)
    pixels[:] = edge
    pixels[1:-1, 1:-1] = colour
    pixels[0] = edge_row
    return Image.fromarray(pixels)


@pytest.mark.parametrize("wide", [True, False])
def test_pad_fills_with_the_mean_of_the_edges(wide):
    image = dotted(32, 16, (200, 0, 0), (0, 90, 0), (0, 0, 150))
    if not wide:
        image = image.transpose(Image.Transpose.TRANSPOSE)
    pixels = ddpm.decode(image, 32, 3, resize="pad")
    if not wide:
        pixels = pixels.transpose(0, 2, 1)
    # The edges' 96 pixels, corners in a row and a column: 32 + 2 of 150 blue, 62 of 90 green.
    fill = [0, round(62 * 90 / 96), round(34 * 150 / 96)]
    assert (pixels[:, :8] == np.array(fill)[:, None, None]).all()
    assert (pixels[:, 24:] == np.array(fill)[:, None, None]).all()
    assert np.array_equal(pixels[:, 9:23, 1:31].transpose(1, 2, 0), np.full((14, 30, 3), (200, 0, 0)))
    assert (pixels[:, 8] == np.array([0, 0, 150])[:, None]).all()


def test_pad_of_a_grey_image_and_of_a_square_one():
    grey = Image.fromarray(np.full((16, 32), 77, np.uint8))
    assert (ddpm.decode(grey, "16x32", 1, resize="pad") == 77).all()
    square = Image.fromarray(ramp(16, 16))
    assert np.array_equal(
        ddpm.decode(square, 16, 3, resize="pad"), ddpm.decode(square, 16, 3, resize="crop")
    )


def test_stretch_takes_all_of_the_image_and_crop_its_middle():
    """Of four columns of colour, 8 pixels each."""
    row = np.repeat(np.array([10, 80, 160, 250], np.uint8), 8)
    image = Image.fromarray(np.broadcast_to(row, (16, 32)).copy())
    stretched = ddpm.decode(image, 16, 1, resize="stretch")[0]
    assert stretched.shape == (16, 16) and (stretched == stretched[0]).all()
    assert stretched[0, [1, 6, 9, 14]].tolist() == pytest.approx([10, 80, 160, 250], abs=6)
    cropped = ddpm.decode(image, 16, 1, resize="crop")[0]
    assert np.array_equal(cropped, np.broadcast_to(row[8:24], (16, 16)))


def test_each_way_has_a_cache_of_its_own_and_stays_with_the_model(ramps, run, tmp_path, capsys):
    pixels = {}
    for resize in ("crop", "pad", "stretch", "crop"):
        config = config_of(ramps, image_size=16, resize=resize, download_dir=str(tmp_path))
        pixels[resize] = ddpm.load_images(config).pixels
    assert len(list((tmp_path / ".decoded").glob("*.npy"))) == 3
    assert not torch.equal(pixels["crop"], pixels["pad"])
    assert not torch.equal(pixels["stretch"], pixels["pad"])
    flags = ["--mode sample --resize pad --model_path", run / "model.pt"]
    assert exit_code(ddpm.main, *flags) == 1
    assert "--resize pad contradicts" in capsys.readouterr().err
    flags = ["--mode sample --image_size 16x32 --model_path", run / "model.pt"]
    assert exit_code(ddpm.main, *flags) == 1
    assert "where it is 32x16" in capsys.readouterr().err


# ---- the note about images of another shape


def notes(folder, sizes, tmp_path, **settings):
    """What is said of the shapes of images of these sizes."""
    for i, (width, height) in enumerate(sizes):
        Image.fromarray(ramp(width, height)).save(folder / f"{i}.png")
    config = ddpm.Config(data_path=str(folder), download_dir=str(tmp_path / "d"), **settings)
    for _ in range(2):  # the second time from the cache
        said = [note for note in ddpm.load_images(config).notes if "as wide as" in note]
    assert len(said) < 2
    return said[0] if said else None


@pytest.mark.parametrize(
    "sizes, settings, expected",
    [
        ([(96, 64)] * 19 + [(64, 64)], {}, "19 of 20 images are 1.5 times as wide as high, and "
         "cropping to 64x64 keeps 67% of each: --image_size 96x64 keeps 100%, --resize pad all"),
        ([(64, 96)] * 10, {}, "--image_size 64x96 keeps 100%"),
        ([(160, 90), (320, 180)] * 5, {}, "--image_size 112x64 keeps 98%"),
        ([(64, 64)] * 10, dict(image_size="96x64"), "to 96x64 keeps 67% of each: --image_size 64 "),
        ([(40, 30)] * 10, {}, "--image_size 80x64 keeps 94%"),
        ([(160, 90)] * 10, dict(arch="resnet18"), "--image_size 128x64 keeps 89%"),
        ([(40, 32)] * 10, dict(image_size=32), None),  # the next is as wide again, and worse
        ([(96, 64)] * 8 + [(64, 64)] * 2, {}, None),
        ([(96, 64)] * 10, dict(image_size="96x64"), None),
        ([(96, 64)] * 10, dict(resize="pad"), None),
        ([(70, 64)] * 10, {}, None),
    ],
)  # fmt: skip
def test_a_folder_of_one_other_shape_is_told_the_flag_that_keeps_it(
    tmp_path, sizes, settings, expected
):
    (tmp_path / "images").mkdir()
    note = notes(tmp_path / "images", sizes, tmp_path, **settings)
    assert (expected in note) if expected else note is None


def test_the_note_is_printed_at_the_start(ramps, tmp_path, capsys):
    flags = ["--mode train --dry_run", TINY, "--image_size 16x32 --attention_at 16"]
    flags += places(tmp_path, ramps)
    assert ddpm.main(words(*flags)) == 0
    assert "keeps 25% of each: --image_size 32x16 keeps 100%" in capsys.readouterr().out


# ---- training


def test_a_run_writes_grids_of_its_shape(run):
    samples = run / "samples"
    assert size(samples / "dataset_grid.png") == grid_size(3, 3)
    for name in ("clean", "noisy", "pred"):
        assert size(samples / f"{name}_epoch2.png") == grid_size(8, 1)
    assert size(samples / "generated_epoch2.png") == grid_size(2, 2)
    with Image.open(samples / "dataset_grid.png") as grid:
        first = np.asarray(grid)[2:34, 2:66, 0]
    assert grows_to_the_right(first)
    width, height = size(samples / "forward_process.png")
    assert width > 6 * 1.9 * 110 > 6 * height  # columns of 1.9 inches, one row of 0.95
    head = json.loads((samples / "metrics.jsonl").read_text().splitlines()[0])
    assert head["config"]["image_size"] == "32x16" and head["config"]["resize"] == "crop"


def test_images_in_plots_are_not_distorted(tmp_path, real_plots, monkeypatch):
    figures = []
    monkeypatch.setattr(ddpm, "save_figure", lambda figure, *_: figures.append(figure))
    for width, height in ((32, 16), (16, 32), (8, 512)):
        pixels = torch.zeros(3, 1, height, width, dtype=torch.uint8)
        ddpm.plot_rows({"a": pixels, "b": pixels}, ["x", "y", "z"], tmp_path / "p.png")
    sizes = [tuple(figure.get_size_inches().round(2)) for figure in figures]
    assert sizes == [(5.7, 2.2), (2.85, 4.1), (2.85, 7.9)]
    axes = figures[0].axes[0]
    assert axes.get_aspect() == 1 and axes.images[0].get_size() == (16, 32)


def test_resuming_is_exact(run, ramps, tmp_path):
    shutil.copytree(run / "model.pt_steps", tmp_path / "model.pt_steps")
    (tmp_path / "model.pt_steps" / "step_00000004.pt").unlink()
    flags = ["--mode train --resume", *places(tmp_path, ramps)]
    assert ddpm.main(words(*flags)) == 0
    a, b = checkpoint(run / "model.pt"), checkpoint(tmp_path / "model.pt")
    assert a["step"] == b["step"] == 4 and a["config"]["image_size"] == "32x16"
    for part in ("weights", "ema"):
        assert all(torch.equal(a[part][name], b[part][name]) for name in a[part])


# ---- sampling and editing


def test_samples_files_and_animation_have_the_shape(sample):
    assert sample("--num_samples 5 --individual single --gif") == 0
    assert size("out/generated_sample.png") == grid_size(2, 3)
    assert {size(f"single/0000{i}.png") for i in range(5)} == {(32, 16)}
    assert size("out/denoising.gif") == grid_size(5, 1, zoom=1)
    with Image.open("out/generated_sample.png") as grid, Image.open("single/00003.png") as single:
        shown = np.asarray(grid)[36:68:2, 68:132:2]  # second row, second column
        assert np.array_equal(shown, np.asarray(single))
    before = tree("single")
    assert sample("--num_samples 5 --individual single --sample_batch_size 1") == 0
    assert tree("single") == before  # continued from what is there


def test_interpolating_gives_the_shape(sample):
    assert sample("--num_samples 3 --interpolate 5") == 0
    assert size("out/interpolation.png") == grid_size(3, 1)
    assert size("out/interpolation.gif") == (32, 16)


def test_an_image_that_is_hardly_noised_comes_back_as_it_was(sample, real_plots):
    Image.fromarray(ramp(64, 32)).save("mine.png")
    edit = "--init_image mine.png --strength 0.001 --num_samples 1 --individual single"
    assert sample(edit) == 0
    with Image.open("single/00000.png") as image:
        pixels = np.asarray(image, dtype=float)
    wanted = ddpm.decode(Image.fromarray(ramp(64, 32)), "32x16", 3).transpose(1, 2, 0)
    assert abs(pixels - wanted).mean() < 12
    with Image.open("out/denoising_steps.png") as plot:
        assert plot.width > plot.height  # one image of two to one


def test_what_a_mask_keeps_is_kept_where_it_is(sample):
    """White is the right quarter of the mask: the rest stays."""
    Image.fromarray(ramp(64, 32)).save("mine.png")
    mask = np.zeros((32, 64), np.uint8)
    mask[:, 48:] = 255
    Image.fromarray(mask).save("mask.png")
    assert sample("--init_image mine.png --mask mask.png --num_samples 2 --individual single") == 0
    wanted = ddpm.decode(Image.fromarray(ramp(64, 32)), "32x16", 3).transpose(1, 2, 0)
    for i in range(2):
        with Image.open(f"single/0000{i}.png") as image:
            pixels = np.asarray(image)
        assert np.array_equal(pixels[:, :24], wanted[:, :24])
        assert not np.array_equal(pixels[:, 24:], wanted[:, 24:])


def test_an_image_to_edit_is_padded_if_the_model_was_trained_on_padded_ones(run):
    model, _, config = ddpm.load_model(run / "model.pt")
    image = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), 50, np.uint8)).save(image, "PNG")
    mask = io.BytesIO()
    Image.fromarray(np.pad(np.full((14, 14), 255, np.uint8), 1)).save(mask, "PNG")
    config = ddpm.override(config, resize="pad", init_image=image, mask=mask)
    _, padded, mask = ddpm.load_edit(config, model)
    assert padded.shape == (1, 3, 16, 32) and (ddpm.to_pixels(padded) == 50).all()
    kept = torch.zeros(16, 32)
    kept[1:15, 9:23] = 1
    assert torch.equal(mask[0, 0], kept)  # the border of black is kept


# ---- the other programs


def test_evaluate_measures_them(run, ramps, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = ["--bpd_timesteps 2 --bpd_pictures 4 --device cpu --samples_dir out"]
    flags += ["--model_path", run / "model.pt", "--data_path", ramps, "--download_dir", "d"]
    assert exit_code(evaluate.main, *flags) == 0, capsys.readouterr().err
    report = capsys.readouterr().out
    assert "32x16: 8 for training" in report and "1,536 values per image" in report


def test_large_images_are_compared_at_64_pixels_a_side():
    x = torch.randint(0, 256, (2, 3, 32, 128), dtype=torch.uint8)
    small = x.float().unflatten(3, (64, 2)).mean(4)
    want = (small[0] - small[1]).square().mean().sqrt().item()
    a, b = evaluate.to_vectors(x, "cpu")
    assert (a - b).norm().item() == pytest.approx(want, rel=1e-5)


def test_diffusers_gets_and_gives_back_height_and_width(run, tmp_path, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.chdir(tmp_path)
    convert.to_diffusers(run / "model.pt", "d")
    assert json.loads(Path("d/unet/config.json").read_text())["sample_size"] == [16, 32]
    assert exit_code(convert.main, "--from_diffusers d --model_path back.pt") == 0
    model, diffusion, config = ddpm.load_model(run / "model.pt")
    back, _, config_back = ddpm.load_model("back.pt")
    assert config_back.image_size == "32x16" and back.image_shape == (3, 16, 32)
    assert config_back.attention_at == (8,)
    x, t = torch.randn(2, 3, 16, 32), torch.tensor([0, 30])
    theirs = diffusers.UNet2DModel.from_pretrained("d/unet")
    assert torch.allclose(model(x, t), back(x, t), atol=1e-6)
    assert torch.allclose(model(x, t), theirs(x, t).sample, atol=1e-5)
    pipeline = diffusers.DDPMPipeline.from_pretrained("d")
    pipeline.set_progress_bar_config(disable=True)
    assert pipeline(num_inference_steps=1, output_type="np").images.shape == (1, 16, 32, 3)


@pytest.fixture
def page(run, tmp_path, monkeypatch):
    """page(section) -> the page with that run's model as the newest."""
    pytest.importorskip("streamlit", reason="the page needs Streamlit")
    from streamlit.testing.v1 import AppTest

    monkeypatch.chdir(tmp_path)
    (tmp_path / "saved_models").mkdir()
    shutil.copy(run / "model.pt", tmp_path / "saved_models" / "wide.pt")

    def open_section(section):
        at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
        return at if section == "Generate" else at.segmented_control[0].set_value(section).run()

    return open_section


def images_of(at, section):
    images = at.session_state[f"generated: {section}"]["images"]
    return [np.asarray(Image.open(io.BytesIO(image))) for image in images]


def test_the_page_generates_and_edits_them(page):
    at = page("Generate")
    assert at.selectbox[0].options[0].endswith("32x16, 2 classes")
    at.button[0].click().run()
    assert not at.exception and not at.error
    assert {image.shape for image in images_of(at, "Generate")} == {(16, 32, 3)}
    at = page("Edit")
    assert at.file_uploader[0].label == "Your image; its centre becomes 32x16"
    Image.fromarray(ramp(64, 32)).save(file := io.BytesIO(), "PNG")
    at.radio[0].set_value("Inpaint a part").run()
    at.file_uploader[0].set_value(("mine.png", file.getvalue(), "image/png")).run()
    at.slider[0].set_value((75, 100)).run()  # from left to right
    at.button[0].click().run()
    assert not at.exception and not at.error
    wanted = ddpm.decode(Image.fromarray(ramp(64, 32)), "32x16", 3).transpose(1, 2, 0)
    for pixels in images_of(at, "Inpaint a part"):
        assert np.array_equal(pixels[:, :24], wanted[:, :24])
        assert not np.array_equal(pixels[:, 24:], wanted[:, 24:])


# ---- models of squares


@pytest.mark.parametrize(
    "path, size",
    [
        ("saved_models/animals.pt", 64),
        ("saved_models/fashion_mnist.pt", 28),
        ("tests/checkpoint_format_1.pt", None),
    ],
)
def test_models_of_before_are_squares_and_cropped(path, size):
    stored = checkpoint(ROOT / path)["config"]
    config = ddpm.stored_config(ddpm.read_checkpoint(ROOT / path), path)
    assert type(config.image_size) is int and config.image_size == (size or stored["image_size"])
    assert config.resize == "crop"
