"""Make the pictures of the README and docs/ anew, from the included models.

    python tests/tools/pictures.py                          # all of them
    python tests/tools/pictures.py guidance inpainting      # some
    python tests/tools/pictures.py training_times --run samples
    python tests/tools/pictures.py choices --run choices

A model that is not there is left out. So are two pictures without --run: training_times, which takes the
samples folder of python ddpm.py --mode train --num_samples 5 --sample_every 169, and choices, which takes
a folder of models (see docs/results.md).
"""

import argparse
import functools
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import numpy as np
import torch
import torchvision
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpm  # noqa: E402

DOCS = ddpm.HERE / "docs"
ZOOM = 2  # each pixel of an image is so many of the picture on a side
DPI = 100


# ------------------------------------------------------------------------------------------ models


@functools.cache
def load(name):
    """A model in saved_models/, or at an absolute path: (model, diffusion, config)."""
    return ddpm.load_model(ddpm.HERE / "saved_models" / name)


def trajectory(name, classes, image=None, mask=None, **settings):
    """The steps of sampling an image of each of these classes: [(t, x, x0)]. image, mask: as in
    `ddpm.generate`."""
    model, diffusion, config = load(name)
    config = ddpm.override(config, **settings)
    labels = [model.class_names.index(c) for c in classes]
    indices = range(len(labels))
    return list(ddpm.generate(model, diffusion, config, indices, labels, image=image, mask=mask))


def sample(name, classes, **settings):
    """A sample of each of these classes: (N, C, H, W) in [-1, 1]."""
    _, x, _ = trajectory(name, classes, **settings)[-1]
    _, _, config = load(name)
    return ddpm.crop(x, config.image_size)


@functools.cache
def unseen(kind):
    """An image like those of animal_data that no model has seen: (1, 3, 64, 64) in [-1, 1]."""
    _, _, config = load("animals.pt")
    with tempfile.TemporaryDirectory() as folder:
        draw = [sys.executable, ddpm.HERE / "animal_data" / "draw.py", "--seed", "7"]
        subprocess.run([*draw, "--count", "1", "--out", folder], check=True, capture_output=True)
        return ddpm.load_image(Path(folder, kind, f"{kind}_00.png"), config.image_size, 3)


# ------------------------------------------------------------------------------------------ layout


def magnified(strip, zoom=ZOOM):
    """An image (C, H, W) uint8 as a PIL image, each pixel a square."""
    [image] = ddpm.to_images(strip[None])
    return image.resize((image.width * zoom, image.height * zoom), Image.Resampling.NEAREST)


def save_grid(name, x, columns, zoom=ZOOM):
    """Write docs/NAME.png: images (N, C, H, W) in [-1, 1], so many in a row."""
    grid = torchvision.utils.make_grid(ddpm.to_pixels(x), columns, pad_value=255)
    path = DOCS / f"{name}.png"
    magnified(grid, zoom).save(path, optimize=True)
    return path


def save_rows(name, titles, rows, zoom=ZOOM):
    """Write docs/NAME.png: rows of images, {label: (columns, C, H, W) in [-1, 1]}, with a title for
    each column."""
    strips = [torch.cat([*images], dim=2) for images in rows.values()]
    grid = magnified(ddpm.to_pixels(torch.cat(strips, dim=1)), zoom)
    tile_width = grid.width / len(titles)
    tile_height = grid.height / len(rows)
    figure = Figure(figsize=(grid.width / DPI, grid.height / DPI), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.imshow(grid, cmap="gray", vmin=0, vmax=255)
    axes.set_xticks((np.arange(len(titles)) + 0.5) * tile_width - 0.5, titles)
    axes.set_yticks((np.arange(len(rows)) + 0.5) * tile_height - 0.5, rows)
    axes.tick_params(length=0, labeltop=True, labelbottom=False, labelsize=11)
    axes.spines[:].set_visible(False)
    path = DOCS / f"{name}.png"
    figure.savefig(path, bbox_inches="tight", pad_inches=0.05)
    return path


# ---------------------------------------------------------------------------------------- pictures


def animals():
    """25 samples of the default recipe, a column for each class."""
    model, _, _ = load("animals.pt")
    return save_grid("animals", sample("animals.pt", model.class_names * 5), 5)


def fashion_mnist():
    """50 samples, a column for each class."""
    model, _, _ = load("fashion_mnist.pt")
    return save_grid("fashion_mnist", sample("fashion_mnist.pt", model.class_names * 5), 10, zoom=3)


def clothes():
    """30 samples of a model of photos, a column for each class."""
    model, _, _ = load("clothes.pt")
    return save_grid("clothes", sample("clothes.pt", model.class_names * 3), len(model.class_names))


def nearest():
    """Training images, and samples above their nearest training images."""
    model, _, config = load("animals.pt")
    images = ddpm.load_images(config)
    known, _ = images.take(images.train, "cpu")
    samples = sample("animals.pt", model.class_names, seed=3)
    distances = (samples[:, None] - known).square().mean(dim=(2, 3, 4))  # (5, 100)
    rows = {
        "training": known[5::20],
        "samples": samples,
        "nearest to\nthem": known[distances.argmin(dim=1)],
    }
    return save_rows("nearest", model.class_names, rows)


def training_times(run):
    """The same noise after several steps of one training run; last, the included model."""
    model, _, config = load("animals.pt")
    rows = {}
    for step in (169, 338, 676):
        epochs = step * config.batch_size / 100  # of 100 images
        grid = Image.open(run / f"generated_epoch{epochs:g}.png")
        rows[f"{step} steps"] = tiles(grid, config.image_size)
    rows[f"{config.steps:,} steps"] = sample("animals.pt", model.class_names)
    return save_rows("training_times", model.class_names, rows)


def choices(run):
    """The same noise by models that were trained with the defaults, and without one of them."""
    rows = {
        "default": "default.pt",
        "--detail_weight 0": "detail_weight.pt",
        "--min_snr 0": "min_snr.pt",
        "--optimizer adamw\n--lr 1e-3": "adamw.pt",
    }
    model, _, _ = load("animals.pt")
    samples = {title: sample(run.resolve() / file, model.class_names) for title, file in rows.items()}
    return save_rows("choices", model.class_names, samples)


def tiles(grid, size):
    """The first row of a grid that training wrote: (columns, C, size, size) in [-1, 1]."""
    pixels = torch.from_numpy(np.array(grid)).permute(2, 0, 1)[:, 2 : 2 + size]
    columns = pixels[:, :, 2:].split(size + 2, dim=2)
    return ddpm.to_network(torch.stack([column[:, :, :size] for column in columns]))


def denoising_steps():
    """The reverse process: x_t, and below it the x0 that is predicted from it."""
    steps = trajectory("animals.pt", ["dog"], seed=17)
    shown = [1, 2, 4, 7, 11, 15, 17, 19]  # x0 changes most in the first
    rows = {
        "x_t": torch.cat([steps[i - 1][1] for i in shown]),  # what the step before left
        "predicted x0": torch.cat([steps[i][2] for i in shown]),
    }
    return save_rows("denoising_steps", [f"t = {steps[i][0]}" for i in shown], rows)


def denoising():
    """The reverse process of three images, as an animation."""
    steps = trajectory("animals.pt", ["cat", "elephant", "lion"], seed=4)
    shown = [0, 4, 7, 9, 11, 13, 15, 16, 17, 18, 19]  # nearly all noise at first
    strips = [torch.cat([*ddpm.to_pixels(steps[i][1])], dim=2) for i in shown]
    first, *others = [magnified(strip).quantize(64, kmeans=1) for strip in strips]
    path = DOCS / "denoising.gif"
    milliseconds = [200] * len(others) + [2500]  # it rests on the last frame
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)
    return path


def inpainting():
    """New images, what is left of them, and three ways in which the model fills it in."""
    mask = torch.zeros(1, 1, 64, 64)
    mask[:, :, 32:] = 1
    masks = {"cat": mask, "tiger": mask.transpose(2, 3), "lion": mask.flip(2)}
    rows = {}
    for kind, mask in masks.items():
        image = unseen(kind)
        steps = trajectory("animals.pt", [kind] * 3, image, mask, strength=1.0, seed=1)
        rows[kind] = torch.cat([image, torch.where(mask > 0, 1.0, image), steps[-1][1]])
    titles = ["image", "white: masked", *["inpainted"] * 3]
    return save_rows("inpainting", titles, rows)


def guidance():
    """The same noise at several guidance scales."""
    model, _, _ = load("animals.pt")
    rows = {
        f"guidance {g}": sample("animals.pt", model.class_names, sampler="ddim", guidance=float(g))
        for g in (1, 2, 4, 8)
    }
    return save_rows("guidance", model.class_names, rows)


def image_to_image():
    """New images, noised to several levels and denoised as another class."""
    strengths = (0.4, 0.55, 0.7, 0.8, 0.9)
    rows = {}
    for kind, target in (("lion", "tiger"), ("lion", "cat"), ("tiger", "cat")):
        image = unseen(kind)
        changed = [trajectory("animals.pt", [target], image, strength=s)[-1][1] for s in strengths]
        rows[f"{kind} to {target}"] = torch.cat([image, *changed])
    titles = ["input"] + [f"strength {s:g}" for s in strengths]
    return save_rows("image_to_image", titles, rows)


def interpolation():
    """From one sample to another of the same class."""
    rows = {}
    for kind, first, last in (("dog", 4, 2), ("cat", 8, 4), ("lion", 0, 1)):
        settings = dict(seed=first, interpolate=last, num_samples=7, sampler="dpm++",
                        guidance=2.0)
        rows[f"{kind}, seed\n{first} to {last}"] = sample("animals.pt", [kind] * 7, **settings)
    return save_rows("interpolation", [""] * 7, rows)


PROMPTS = (  # four that training could have shown, and four with a combination that it did not
    "portrait of a black cat with a red bow tie in the snow",
    "a sitting blue dog wearing yellow glasses by the sea",
    "an orange lion with green eyes in a meadow",
    "night: a pink tiger wearing a blue hat",
    "a white tiger in the snow",
    "portrait of a pink elephant wearing a yellow scarf",
    "an orange cat wearing a green bow tie at night",
    "portrait of a blue lion by the sea",
)


def prompts():
    """Eight prompts above a sample of each."""
    model, diffusion, config = load("animals_text.pt")
    config = ddpm.override(config, prompt=PROMPTS, num_samples=len(PROMPTS), seed=0)
    labels, _ = ddpm.sample_conditions(config, model)
    pixels = ddpm.sample_images(model, diffusion, config, labels, "fp32")
    side = 3 * pixels.shape[-1]
    cell = (side + 8, side + 44)
    page = Image.new("RGB", (4 * cell[0], 2 * cell[1]), "white")
    draw = ImageDraw.Draw(page)
    for i, (text, image) in enumerate(zip(PROMPTS, ddpm.to_images(pixels))):
        x, y = i % 4 * cell[0] + 4, i // 4 * cell[1]
        lines = "\n".join(textwrap.wrap(text, 32))
        draw.text((x, y + 4), lines, "black", ImageFont.load_default(12))
        page.paste(image.resize((side, side), Image.NEAREST), (x, y + 40))
    path = DOCS / "prompts.png"
    ddpm.save_png(page, path)
    return path


PICTURES = {
    picture.__name__: picture
    for picture in (animals, fashion_mnist, clothes, nearest, training_times, choices,
                    denoising_steps, denoising, inpainting, guidance, image_to_image, interpolation,
                    prompts)
}
OF_A_RUN = ("training_times", "choices")


def make(name, run):
    """Make a picture and print its path, or that it is left out."""
    if name == "clothes" and not (ddpm.HERE / "saved_models" / "clothes.pt").exists():
        print("clothes: left out, there is no saved_models/clothes.pt")
        return
    if name in OF_A_RUN and not run:
        print(f"{name}: left out, there is no --run")
        return
    path = PICTURES[name](run) if name in OF_A_RUN else PICTURES[name]()
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PICTURES)}")
    parser.add_argument("--run", type=Path, help=f"folder of a run, for {' and '.join(OF_A_RUN)}")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in PICTURES:
            parser.error(f"there is no picture {name!r}: give some of {', '.join(PICTURES)}")
    for name in arguments.names or PICTURES:
        make(name, arguments.run)
