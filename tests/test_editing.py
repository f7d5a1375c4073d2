"""Sampling that starts from an image, inpaints a part of one, or interpolates between two seeds."""

import numpy as np
import pytest
import torch
from conftest import TINY, places, words
from PIL import Image

import ddpm


@pytest.fixture
def sample(trained, tmp_path, monkeypatch):
    """sample(**settings) -> the images that --mode sample makes with the tiny model: uint8
    (N, C, H, W)."""
    monkeypatch.chdir(tmp_path)

    def run(**settings):
        common = dict(
            num_samples=4,
            sampling_steps=10,
            guidance=1.0,
            precision="fp32",
            device="cpu",
            **settings,
        )
        return ddpm.sample(ddpm.override(ddpm.Config(), model_path=str(trained), **common))

    return run


@pytest.fixture
def image(image_folder):
    return str(image_folder / "disc" / "0.png")


@pytest.fixture
def mask(tmp_path):
    """The right half is to be inpainted."""
    pixels = np.zeros((20, 20), np.uint8)
    pixels[:, 10:] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    return str(tmp_path / "mask.png")


def original(image):
    return ddpm.to_pixels(ddpm.load_image(image, 16, 3))


def distance(a, b):
    return (a.float() - b.float()).abs().mean().item()


@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_little_strength_stays_close_and_full_strength_forgets(sample, image, sampler):
    far = [
        distance(sample(init_image=image, strength=s, sampler=sampler), original(image))
        for s in (0.02, 0.5, 1)
    ]
    assert far[0] < far[1] < far[2]
    assert far[0] < 12  # of 255 grey levels


@pytest.mark.parametrize(
    "spacing, expected",
    [
        ("uniform", [19, 14, 9, 4]),
        ("arcsine", [19, 16, 9, 2]),  # 20 sin^2(pi/2 (1 - i/4)) - 1
    ],
)
def test_strength_is_the_fraction_of_the_trajectory_and_of_the_steps(
    trained, image, spacing, expected
):
    """T = 50: the first 20 levels, in 4 of the 10 steps."""
    model, diffusion, config = ddpm.load_model(trained)
    config = ddpm.override(
        config, strength=0.4, sampling_steps=10, spacing=spacing, guidance=1.0
    )
    x0 = ddpm.load_image(image, 16, 3)
    steps = [t for t, _, _ in ddpm.generate(model, diffusion, config, [0], [0], image=x0)]
    assert steps == expected


@pytest.mark.quick
def test_the_start_is_the_forward_process(trained, image):
    """What the sampler is given is sqrt(abar) x0 + sqrt(1 - abar) eps at the level it starts
    from."""
    model, diffusion, config = ddpm.load_model(trained)
    config = ddpm.override(config, strength=0.4, sampling_steps=50, guidance=1.0)
    x0, seen = ddpm.load_image(image, 16, 3), []

    def spy(x, t, y=None):
        seen.append((x, t))
        return torch.zeros_like(x)

    spy.class_names, spy.image_channels = model.class_names, 3
    spy.image_shape, spy.parameters = model.image_shape, model.parameters
    next(ddpm.generate(spy, diffusion, config, [7], [0], image=x0))
    (x, t), eps = seen[0], ddpm.ImageNoise(config.seed, [7], (3, 16, 16), "cpu")()
    abar = np.prod(1 - ddpm.make_betas(config.schedule, 50).numpy()[:20])
    assert t.item() == 19
    assert torch.allclose(x, np.sqrt(abar) * x0 + np.sqrt(1 - abar) * eps, atol=1e-5)


@pytest.mark.quick
@pytest.mark.parametrize("sampler", ddpm.SAMPLERS)
def test_known_pixels_are_exact_and_the_others_are_sampled(sample, image, mask, sampler):
    pixels, known = sample(init_image=image, mask=mask, sampler=sampler), original(image)
    assert torch.equal(pixels[..., :8], known[..., :8].expand(4, -1, -1, -1))
    assert not torch.equal(pixels[0, ..., 8:], pixels[1, ..., 8:])
    assert distance(pixels[..., 8:], known[..., 8:]) > 1


def test_a_mask_is_read_in_every_mode(sample, image, mask, tmp_path):
    want = sample(init_image=image, mask=mask)
    for mode in ("1", "RGB", "P", "RGBA"):
        Image.open(mask).convert(mode).save(tmp_path / "other.png")
        assert torch.equal(sample(init_image=image, mask=str(tmp_path / "other.png")), want), mode


@pytest.mark.quick
@pytest.mark.parametrize("sampler", list(ddpm.SAMPLERS))
def test_both_ends_of_an_interpolation_are_the_images_of_the_seeds(sample, sampler):
    strip = sample(interpolate=5, sampler=sampler, classes="square")
    first = sample(sampler=sampler, classes="square")[0]
    last = sample(sampler=sampler, classes="square", seed=5)[0]
    assert (strip[0].int() - first.int()).abs().max() <= 1
    assert (strip[-1].int() - last.int()).abs().max() <= 1
    assert not torch.equal(strip[1], strip[0]) and not torch.equal(strip[1], strip[2])


def test_noise_between_seeds_has_unit_variance(trained):
    shape = (3, 64, 64)
    one, two = (ddpm.ImageNoise(seed, [0], shape, "cpu") for seed in (1, 2))
    x = ddpm.slerp(one(), two(), torch.linspace(0, 1, 5))
    assert x.shape == (5, *shape)
    assert torch.allclose(x.std(dim=(1, 2, 3)), torch.ones(5), atol=0.02)
    assert torch.allclose(x[0], ddpm.ImageNoise(1, [0], shape, "cpu")()[0], atol=1e-6)
    middle = (
        (x[0] + x[4]) / (x[0] + x[4]).norm() * x[0].norm()
    )  # halfway on a circle is along the sum
    assert torch.allclose(x[2], middle, atol=0.05)  # not quite of one length


def test_what_is_written(sample, tmp_path, image):
    sample(interpolate=5)
    with Image.open(tmp_path / "samples" / "interpolation.gif") as gif:
        assert gif.n_frames == 6  # there and back
    with Image.open(tmp_path / "samples" / "interpolation.png") as strip:
        assert strip.width == 4 * strip.height - 6  # a row of four, two pixels apart
        assert strip.text["ddpm:interpolate"] == "5"
    sample(init_image=image, strength=0.5)
    with Image.open(tmp_path / "samples" / "generated_sample.png") as grid:
        assert grid.text["ddpm:init_image"] == "0.png"


@pytest.mark.parametrize(
    "flags, named, remedy",
    [
        ("--mask m.png", "--mask", "need --init_image"),
        ("--strength 0.5", "--strength", "need --init_image"),
        ("--init_image none.png", "none.png", "Give an image file"),
        ("--init_image text.png", "text.png", "Give an image file"),
        ("--init_image {image} --mask none.png", "none.png", "Give an image file"),
        ("--init_image {image} --strength 0", "--strength", "give 0.001 to 1"),
        ("--init_image {image} --strength 1.5", "--strength", "give 0.001 to 1"),
        ("--init_image {image} --strength nan", "--strength", "give 0.001 to 1"),
        ("--init_image {image} --interpolate 3", "--interpolate", "give one"),
        ("--interpolate 0", "--interpolate 0", "two different"),
        ("--interpolate -1", "--interpolate -1", "give 0 to"),
    ],
)
def test_refused_in_a_sentence(main, trained, image, tmp_path, capsys, flags, named, remedy):
    (tmp_path / "text.png").write_text("not an image")
    assert (
        main("--mode sample --num_samples 2 --model_path", trained, flags.format(image=image)) == 1
    )
    said = capsys.readouterr().err
    assert named in said and remedy in said and "Traceback" not in said
    assert not (tmp_path / "samples").exists()


def test_grey_images_of_28_pixels(image_folder, tmp_path, monkeypatch):
    """Padded to 32 inside, cropped when saved; the known half stays exact."""
    monkeypatch.chdir(tmp_path)
    grey = tmp_path / "grey"
    grey.mkdir()
    for i in range(4):
        Image.open(image_folder / "disc" / f"{i}.png").convert("L").save(grey / f"{i}.png")
    size = "--image_size 28 --attention_at 16 --steps 2 --label_dropout 0"
    assert ddpm.main(words("--mode train", TINY, size, *places(tmp_path, grey))) == 0
    Image.fromarray(np.repeat(np.uint8([[0, 255]]), 14, 1).repeat(28, 0)).save("mask.png")
    config = ddpm.override(
        ddpm.Config(),
        model_path=str(tmp_path / "model.pt"),
        num_samples=2,
        sampling_steps=3,
        guidance=1.0,
        init_image=str(grey / "0.png"),
        mask="mask.png",
        precision="fp32",
    )
    pixels = ddpm.sample(config)
    assert pixels.shape == (2, 1, 28, 28)
    known = ddpm.crop(ddpm.to_pixels(ddpm.load_image(str(grey / "0.png"), 28, 1)), 28)
    assert torch.equal(pixels[..., :14], known[..., :14].expand(2, -1, -1, -1))
