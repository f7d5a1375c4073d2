"""Measures that take minutes and are run by hand; docs/results.md keeps what they print.

    python tests/tools/benchmark.py quality --model A.pt B.pt     # one table a data set
    python tests/tools/benchmark.py rivals                        # train others as long: same table
    python tests/tools/benchmark.py samplers --model MODEL.pt     # distance by network evaluations
    python tests/tools/benchmark.py features                      # a network for evaluate.py
    python tests/tools/benchmark.py throughput                    # training steps, side by side
    python tests/tools/benchmark.py throughput --device cuda --channels 128 --batch_size 128 \\
        --repeats 30 --fast
    python tests/tools/benchmark.py sampling                      # 64 samples, side by side
    python tests/tools/benchmark.py overhead --images 100000      # time around the network
    python tests/tools/benchmark.py prompts --model MODEL.pt      # does it show what it is asked for?

Rivals are those of `pip install diffusers denoising-diffusion-pytorch`; every program runs in a
process of its own. Rates are medians of programs that take turns in one run.

The table of `quality` and `rivals`. Its first row is of real images that no model was trained on:
--validation FOLDER, the data set's own test split, or what --holdout kept for validation; without
any, the errors are of training images, and the heading says so.

    t = ...     mean squared error of the x0 that the EMA weights predict, in [-1, 1], at the noise
                levels of the cosine schedule of 1000 timesteps; a model with another schedule is
                measured at its nearest timestep. Images as the network sees them, with the border
                of those of 28 pixels. mean: over 16 evenly spaced t. The noise is fixed
    RMS         the same in grey levels of 255, and after the slash that of x_t / sqrt(abar_t): a
                model above it spoils its input
    detail      energy of the samples over that of training images in the horizontal, vertical and
                diagonal band of a Haar step. Noise raises it as detail does; therefore
    grain       the standard deviation of noise in the flattest parts of samples, in grey levels: it
                should be that of the real images. A median: it sees no dots that are few and far
                between, and comes in steps of 0.74
    Frechet     distance of samples from all training images in the features of a small classifier
                that was trained on these. It falls with the number of images, so that samples and
                real images are taken in parts of one size, and the mean is shown. Comparable within
                a table, with no other
    recognised  fraction that the classifier takes for the class asked for; confident: that it gives
                a probability above 0.9 to any class

The table of `prompts`, for a model of captioned drawings without the combinations of draw.UNSEEN
(`animal_data/draw.py --captions --without unseen`). A classifier of all attributes is trained on
other drawings. Every second prompt, "unseen", has such a combination. Cells are fractions of what
the prompts ask for that is recognised:

    animal ... background  this attribute, in the prompts that ask for it; a prompt without an
                accessory asks for none
    all         all of these together, the mean over what is asked for
    prompt      prompts of which everything is recognised
    pair        unseen prompts of which both halves of the combination are recognised
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import multiprocessing
import random
import statistics
import sys
import tempfile
import textwrap
import time
from collections import namedtuple
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "animal_data")]

import draw  # noqa: E402

import ddpm  # noqa: E402
from ddpm import require  # noqa: E402

TIMESTEPS = (0, 20, 62, 125, 250, 500, 750, 937)  # columns of the table
FINE = (0, 20, 62)  # where the error is given in grey levels too
GRID = tuple(int((k + 0.5) * 1000 / 16) for k in range(16))  # of the mean over t
LEVELS = ddpm.Diffusion(ddpm.make_betas("cosine", 1000)).abar[:-1]  # (1000,), of these timesteps

# ---------------------------------------------------------------------------------- real images

# pixels: (N, C, H, W) uint8 as the network sees them; labels: (N,) int64, -1 for none
Labelled = namedtuple("Labelled", "pixels labels")
TEST_SPLITS = ("cifar10", "fashion_mnist", "mnist")


@dataclasses.dataclass
class RealImages:
    """What models are measured against. held_out: Labelled, images that were not trained on, or
    None; origin: what these are, in words; fingerprint: of the images as `TrainState.save` has it.
    """

    name: str
    image_size: int
    class_names: list
    train: Labelled
    held_out: Labelled | None
    origin: str
    fingerprint: str


def select(images, rows):
    """Some rows of the Images of ddpm.py as Labelled."""
    rows = torch.from_numpy(rows)
    return Labelled(images.pixels[rows], images.labels[rows])


def load_test_split(config, channels):
    """The test split of one of torchvision's data sets."""
    dataset = getattr(torchvision.datasets, ddpm.DATASETS[config.data_path])
    data = dataset(config.download_dir, train=False, download=True)
    pixels = [ddpm.decode(image, config.image_size, channels) for image, _ in data]
    return Labelled(torch.from_numpy(np.stack(pixels)), torch.as_tensor(data.targets))


def load_folder(config, folder, images):
    """A folder of validation images, numbered by the classes of `images`."""
    found = ddpm.load_images(ddpm.override(config, data_path=folder))
    known = set(found.all_class_names) & set(images.all_class_names)
    unknown = set(found.all_class_names) - known if known else []  # none is a class: patients, say
    require(not unknown, f"{folder} has classes that the training images lack: {sorted(unknown)}.")
    require(found.white in (None, images.white),
            f"In the images of {folder} {found.white} is white, in those of training "
            f"{images.white or 255}: convert all to 8 bits, on one scale.")
    require(found.channels <= images.channels,
            f"{folder} is in colour and the training images are grey: give grey ones.")
    pixels, labels = select(found, found.train)
    numbers = {name: i for i, name in enumerate(images.all_class_names)}
    numbers = [numbers.get(name, -1) for name in found.all_class_names]
    numbers = torch.tensor([*numbers, -1])  # the last for -1, no class
    return Labelled(pixels.expand(-1, images.channels, -1, -1), numbers[labels])


def load_real(config, validation=None):
    """The RealImages for models with the data settings of this Config. validation: a folder."""
    separate = validation or config.data_path in TEST_SPLITS
    if separate:  # nothing has to be taken from the training images
        config = ddpm.override(config, holdout=0.0, max_images=None)
    images = ddpm.load_images(config)
    held_out = None
    origin = "none were kept for validation"
    if validation:
        held_out = load_folder(config, validation, images)
        origin = f"images of {validation}"
    elif separate:
        held_out = load_test_split(config, images.channels)
        origin = "test images"
    elif len(images.validation):
        held_out = select(images, images.validation)
        origin = f"images of --holdout {config.holdout:g} --seed {config.seed}"
    return RealImages(config.data_path, config.image_size, images.all_class_names,
                      select(images, images.train), held_out, origin, images.fingerprint)


def num_copies(images, others):
    """How many of the images (N, C, H, W) uint8 are, to the last bit, among the others."""
    known = {image.numpy().tobytes() for image in others}
    return sum(image.numpy().tobytes() in known for image in images)


# ----------------------------------------------------------------------------------- classifier


class Classifier(nn.Module):
    """A small convolutional classifier. features(x): (N, num_features), for images (N, C, size,
    size) in [-1, 1] without a border."""

    def __init__(self, channels, size, num_classes, num_features=64):
        super().__init__()
        layers = []
        width = 32
        if size > 32:  # to save time
            layers += [nn.Conv2d(channels, width, 4, 2, 1), nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
            width = 64
            size //= 2
        while size > 4:
            size = math.ceil(size / 2)
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            layers.append(nn.MaxPool2d(2, ceil_mode=True))
            channels = width
            width = min(2 * width, 128)
        self.features = nn.Sequential(
            *layers, nn.Flatten(), nn.Linear(channels * size**2, num_features), nn.ReLU())
        self.dropout = nn.Dropout(0.3)
        self.head = nn.Linear(num_features, num_classes)

    def forward(self, x):
        return self.head(self.dropout(self.features(x)))


def augment(x):
    """Each image (N, C, H, W) shifted by up to a sixteenth of its side, half of them mirrored."""
    N, _, H, W = x.shape
    reach = W // 16
    padded = F.pad(x, (reach,) * 4, mode="replicate")
    down, right = torch.randint(2 * reach + 1, (2, N, 1))
    rows = (down + torch.arange(H))[:, :, None]  # (N, H, 1)
    columns = (right + torch.arange(W))[:, None, :]  # (N, 1, W)
    n = torch.arange(N)[:, None, None]
    shifted = padded.permute(0, 2, 3, 1)[n, rows, columns].permute(0, 3, 1, 2)
    mirrored = torch.rand(N, 1, 1, 1) < 0.5
    return torch.where(mirrored, shifted.flip(3), shifted)


def train_classifier(model, train, image_size, num_images, loss_fn=F.cross_entropy, batch_size=64):
    """Train a Classifier until it has seen so many images of `train`, Labelled. Returns it in eval
    mode."""
    pixels, labels = train
    known = torch.nonzero(labels.view(len(labels), -1).amax(1) >= 0)[:, 0]
    steps = math.ceil(num_images / batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, max(steps, 2))
    for _ in tqdm(range(steps), "classifier", leave=False, mininterval=5):
        rows = known[torch.randint(len(known), (batch_size,))]
        x = augment(ddpm.to_network(ddpm.crop(pixels[rows], image_size)))
        loss = loss_fn(model(x), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def load_classifier(real, folder, num_images=None):
    """The Classifier of the training images, from the folder or trained and kept there under a
    fingerprint of all that it depends on; None if there are no two classes. num_images: that it
    sees; by default a hundred times all, at most 60,000."""
    if len(real.class_names) < 2:
        return None
    num_images = num_images or min(100 * len(real.train.labels), 60_000)
    key = json.dumps([real.image_size, real.class_names, num_images])
    digest = hashlib.sha256(key.encode())
    for tensor in real.train:
        digest.update(tensor.contiguous().numpy())
    path = Path(folder, f"classifier_{digest.hexdigest()[:16]}.pt")
    torch.manual_seed(0)
    model = Classifier(real.train.pixels.shape[1], real.image_size, len(real.class_names))
    if path.exists():
        model.load_state_dict(torch.load(path, weights_only=True))
        return model.eval().requires_grad_(False)
    model = train_classifier(model, real.train, real.image_size, num_images)
    ddpm.atomic_write(path, lambda f: torch.save(model.state_dict(), f))
    return model


def classify(model, pixels):
    """Features (N, 64) and class probabilities (N, num_classes) of images (N, C, H, W) uint8."""
    features = torch.cat([model.features(ddpm.to_network(part)) for part in pixels.split(250)])
    return features, model.head(features).softmax(1)


def features(args):
    """Write the classifier's features of a data set as TorchScript, for evaluate.py --features."""
    config = data_config(args, ddpm.Config(image_size=args.image_size))
    ddpm.check(config)
    real = load_real(config, args.validation)
    classifier = load_classifier(real, args.classifiers, args.classifier_images)
    require(classifier, f"{real.name} has no two classes: there is nothing to classify.")
    examples = ddpm.to_network(ddpm.crop(real.train.pixels[:5], real.image_size))
    net = torch.jit.trace(classifier.features, examples[:2], check_inputs=[examples])
    path = ddpm.atomic_write(args.out, lambda f: torch.jit.save(net, f))
    print(f"{path}: {describe_classifier(Reference(real, classifier))}")


# ------------------------------------------------------------------------------------- measures


def nearest_timestep(abar, level):
    """The timestep of a schedule abar (T,) float64 whose log-SNR is nearest to that of `level`."""
    return (torch.logit(abar) - torch.logit(level)).abs().argmin().item()


@torch.no_grad()
def error_by_timestep(denoise, abar, x0, y, timesteps):
    """{t: mean squared errors (of the predicted x0, of the input x_t / sqrt(abar_t))} at the noise
    levels of `timesteps` in LEVELS, with noise that is a function of t. denoise(xt, t, y) -> x0;
    abar: (T,) of the model; x0: (N, C, H, W) in [-1, 1]; y: (N,)."""
    errors = {}
    for t in timesteps:
        own_t = nearest_timestep(abar, LEVELS[t])
        a = abar[own_t].sqrt().item()
        s = (1 - abar[own_t]).sqrt().item()
        eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(t))
        sums = np.zeros(2)
        for clean, noise, labels in zip(x0.split(50), eps.split(50), y.split(50)):
            xt = a * clean + s * noise
            predicted = denoise(xt, own_t, labels)
            for i, guess in enumerate((predicted, xt / a)):
                sums[i] += (guess - clean).square().sum().item()
        errors[t] = tuple((sums / x0.numel()).tolist())
    return errors


def haar(pixels):
    """One step of the orthonormal Haar transform of images (N, C, H, W): the average and the
    horizontal (differences of left and right neighbours), vertical and diagonal band, (4, N, C,
    H/2, W/2) float32."""
    H, W = (side // 2 * 2 for side in pixels.shape[-2:])
    x = pixels[..., :H, :W].float()
    a, b = x[..., ::2, ::2], x[..., ::2, 1::2]
    c, d = x[..., 1::2, ::2], x[..., 1::2, 1::2]
    return torch.stack([a + b + c + d, a - b + c - d, a + b - c - d, a - b - c + d]) / 2


def detail(pixels):
    """Mean energy of images (N, C, H, W) in the horizontal, vertical and diagonal band: (3,)."""
    parts = pixels.split(1000)
    sums = sum(haar(part)[1:].square().sum((1, 2, 3, 4)).double() for part in parts)
    return sums / pixels.numel() * 4


def grain(pixels):
    """Standard deviation of the noise in the flattest quarter of the 8x8 blocks of each image
    (N, C, H, W), in its grey levels: the median of the diagonal band, which a normal distribution's
    is 0.6745 of (Donoho & Johnstone 1994). Blocks overlap by half; flat is what varies least in the
    average band, which is independent of noise in the diagonal one."""
    found = []
    for part in pixels.split(500):
        average, _, _, diagonal = haar(part)
        N, C = average.shape[:2]
        flatness = F.unfold(average, 4, stride=2).view(N, C, 16, -1).var(2).sum(1)  # (N, blocks)
        flattest = flatness.topk(max(1, flatness.shape[1] // 4), largest=False).indices
        blocks = F.unfold(diagonal, 4, stride=2)  # (N, C * 16, blocks)
        found.append(blocks.gather(2, flattest[:, None].expand(-1, C * 16, -1)).abs().flatten())
    return torch.cat(found).median().item() / 0.6745


def moments(features):
    """Mean (D,) and covariance (D, D) of features (N, D), float64."""
    features = features.double()
    return features.mean(0), features.T.cov()


def frechet(a, b):
    """Frechet distance of two Gaussians, each (mean (D,), covariance (D, D)) (Heusel et al. 2017).
    """
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    roots = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()  # trace of the product's root
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots).item()


def frechet_of_parts(features, target, n):
    """Mean distance of the parts of n images each, a rest left out: features (N, D)."""
    parts = [part for part in features.split(n) if len(part) == n]
    return statistics.mean(frechet(moments(part), target) for part in parts)


class Reference:
    """What all rows of a table share. real: RealImages; classifier: may be None."""

    def __init__(self, real, classifier, num_samples=None):
        few = len(real.train.pixels) < 1000
        self.real = real
        self.classifier = classifier
        self.num_samples = num_samples or (500 if few else 2000)
        self.part_size = self.num_samples  # of the Frechet distance
        if real.held_out:
            self.part_size = min(self.num_samples, len(real.held_out.pixels))
        train = self.cropped(real.train)
        self.detail = detail(train)  # (3,)
        self.grain = grain(train)
        if classifier:
            self.target = moments(classify(classifier, train)[0])

    def cropped(self, images):
        return ddpm.crop(images.pixels, self.real.image_size)

    def labels(self):
        """Classes of the samples (num_samples,): as frequent as among the training images."""
        generator = torch.Generator().manual_seed(0)
        labels = self.real.train.labels
        shuffled = labels[torch.randperm(len(labels), generator=generator)]
        return shuffled.repeat(math.ceil(self.num_samples / len(labels)))[: self.num_samples]

    def measured(self):
        """Images (n, C, H, W) in [-1, 1] and labels (n,) that errors are measured on: up to 256."""
        images = self.real.held_out or self.real.train
        rows = torch.from_numpy(ddpm.evenly_spaced(np.arange(len(images.pixels)), 256))
        return ddpm.to_network(images.pixels[rows]), images.labels[rows]

    def measure_images(self, pixels, labels):
        """What can be said of images (N, C, size, size) uint8 with labels (N,), -1 for none."""
        numbers = dict(detail=(detail(pixels) / self.detail).tolist(), grain=grain(pixels))
        if self.classifier:
            features, probabilities = classify(self.classifier, pixels)
            confidence, classes = probabilities.max(1)
            numbers["frechet"] = frechet_of_parts(features, self.target, self.part_size)
            numbers["confident"] = (confidence > 0.9).float().mean().item()
            if (labels >= 0).all():
                numbers["recognised"] = (classes == labels).float().mean().item()
        return numbers

    @functools.cached_property
    def held_out(self):
        """The numbers of real images, in an order by chance: folders are sorted by class."""
        generator = torch.Generator().manual_seed(0)
        pixels = self.cropped(self.real.held_out)
        order = torch.randperm(len(pixels), generator=generator)
        return self.measure_images(pixels[order], self.real.held_out.labels[order])


# ---------------------------------------------------------------------------------------- models


@dataclasses.dataclass
class Subject:
    """A trained model as the table sees it. denoise(xt, t, y) -> x0 in [-1, 1] by its EMA weights,
    t an int of its own schedule abar (T,); sample(y) -> uint8 images (N, C, size, size); y: (N,)
    labels. conditional: whether it knows the classes."""

    denoise: object
    abar: torch.Tensor
    sample: object
    conditional: bool


def ddpm_subject(path, real, args):
    """The Subject in a checkpoint of ddpm.py, with its own settings but for those in args."""
    model, diffusion, config = ddpm.load_model(path)
    require(not model.vocabulary, f"{path} was trained on captions, and this measures classes: use "
            "the command prompts.")
    channels = real.train.pixels.shape[1]
    require(model.image_channels == channels and config.image_size == real.image_size,
            f"{path} makes images of {model.image_channels} channels and {config.image_size} "
            f"pixels, and those of {real.name} have {channels} and {real.image_size}.")
    unknown = set(model.class_names) - set(real.class_names)
    require(not unknown, f"{path} has classes that {real.name} lacks: {sorted(unknown)}.")
    names = ("sampler", "sampling_steps", "spacing", "guidance")
    given = {name: getattr(args, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    config = ddpm.override(config, seed=args.seed, sample_batch_size=50, **given)
    if not model.class_names:
        config = ddpm.override(config, guidance=1.0)
    ddpm.check(config)
    numbers = {name: i for i, name in enumerate(model.class_names)}
    own = torch.tensor([*(numbers.get(name, -1) for name in real.class_names), -1])
    precision = ddpm.choose_precision("auto", torch.device("cpu"))

    def denoise(xt, t, y):
        return ddpm.make_denoiser(model, diffusion, own[y])(xt, t)

    def sample(y):
        return ddpm.sample_images(model, diffusion, config, own[y].tolist(), precision)

    return Subject(denoise, diffusion.abar[:-1], sample, bool(model.class_names))


def measure(subject, reference):
    """The numbers of a row, and the samples (N, C, size, size) uint8."""
    x0, y = reference.measured()
    timesteps = sorted({*GRID, *TIMESTEPS})
    errors = error_by_timestep(subject.denoise, subject.abar, x0, y, timesteps)
    labels = reference.labels()
    start_time = time.monotonic()
    pixels = subject.sample(labels)
    rate = len(pixels) / (time.monotonic() - start_time)
    asked = labels if subject.conditional else torch.full_like(labels, -1)
    numbers = reference.measure_images(pixels, asked)
    return numbers | dict(errors=errors, rate=rate), pixels


# ----------------------------------------------------------------------------------------- table


COLUMNS = ["mean", *(f"t = {t}" for t in TIMESTEPS), *(f"RMS {t}" for t in FINE), "detail h v d",
           "grain", "Frechet", "recognised", "confident", "samples/s"]


def heading():
    """The first two lines of a table."""
    cells = ["", *COLUMNS]
    return "| " + " | ".join(cells) + " |\n|" + "---|" * len(cells)


def table_row(name, numbers):
    """A line of the table; what was not measured stays empty."""
    cells = dict.fromkeys(COLUMNS, "")
    errors = numbers.get("errors")
    if errors:
        cells["mean"] = f"{statistics.mean(errors[t][0] for t in GRID):.4f}"
        cells |= {f"t = {t}": f"{errors[t][0]:.4f}" for t in TIMESTEPS}
        for t in FINE:
            model, given = (127.5 * math.sqrt(error) for error in errors[t])
            cells[f"RMS {t}"] = f"{model:.1f} / {given:.1f}"
    cells["detail h v d"] = " ".join(f"{band:.2f}" for band in numbers["detail"])
    formats = {"grain": ".1f", "frechet": ".2f", "recognised": ".1%", "confident": ".1%",
               "rate": ".1f"}
    columns = {"frechet": "Frechet", "rate": "samples/s"}
    for key, form in formats.items():
        if key in numbers:
            cells[columns.get(key, key)] = f"{numbers[key]:{form}}"
    return "| " + " | ".join([name, *cells.values()]) + " |"


def describe_classifier(reference):
    """How good the classifier is, in words."""
    if not reference.classifier:
        return "no classifier, for want of classes"
    if not reference.real.held_out:
        return "classifier of unknown accuracy, without held-out images"
    numbers = reference.held_out
    if "recognised" not in numbers:
        return "classifier of unknown accuracy, held-out images without classes"
    return f"classifier recognises {numbers['recognised']:.1%} of the held-out images"


def print_heading(reference):
    """What the table is of, the heading, and the row of real images."""
    real = reference.real
    count = len(real.train.pixels)
    num_measured = len(reference.measured()[0])
    print(f"\n### {real.name}, {real.image_size}x{real.image_size}, {count:,} training images\n")
    if real.held_out:
        copies = num_copies(real.held_out.pixels, real.train.pixels)
        also = f" (and {copies} OF THESE ARE TRAINING IMAGES)" if copies else ""
        print(f"Errors on {num_measured} of {len(real.held_out.pixels):,} {real.origin}{also};")
    else:
        print(f"ERRORS ON {num_measured} TRAINING IMAGES: {real.origin}, so that a model that "
              "memorises does best;")
    print(f"{reference.num_samples:,} samples, Frechet distance of {reference.part_size:,} at a "
          f"time; {describe_classifier(reference)};\ngrain of the training images "
          f"{reference.grain:.1f}; {ddpm.describe_device(torch.device('cpu'))}\n\n{heading()}")
    if real.held_out:
        print(table_row("real, held-out", reference.held_out), flush=True)


def write_grid(pixels, name, args):
    """Write the first 50 samples as a PNG, if there is a folder for it."""
    if args.grids:
        Path(args.grids).mkdir(parents=True, exist_ok=True)
        ddpm.save_grid(pixels[:50], Path(args.grids, f"{name}.png"), 10)


def make_reference(config, args):
    real = load_real(config, args.validation)
    classifier = load_classifier(real, args.classifiers, args.classifier_images)
    return Reference(real, classifier, args.num_samples)


def data_config(args, config):
    """A Config with the data of the command line, if given there."""
    return ddpm.override(config, data_path=args.data or config.data_path,
                         download_dir=args.download_dir)


def quality(args):
    """A table a data set with a row a model. Models that kept other images for validation, and
    could have trained on those of the first, get a table of their own."""
    tables = {}
    for path in args.model:
        config = data_config(args, ddpm.load_model(path)[2])
        split = ()
        if not args.validation and config.data_path not in TEST_SPLITS:
            chosen = config.max_images or config.holdout
            split = (config.max_images, config.holdout, config.seed if chosen else 0)
        key = (config.data_path, config.image_size, split)
        tables.setdefault(key, (config, []))[1].append(path)
    require(not args.validation or len({key[0] for key in tables}) == 1,
            "--validation goes with one data set: give --data, or its models only.")
    for config, paths in tables.values():
        reference = make_reference(config, args)
        print_heading(reference)
        for path in paths:
            numbers, pixels = measure(ddpm_subject(path, reference.real, args), reference)
            data = ddpm.read_checkpoint(path).get("data")
            differs = data not in (None, reference.real.fingerprint)  # None: not stored
            note = " (trained on OTHER images)" * differs
            print(table_row(f"{path}{note}", numbers), flush=True)
            write_grid(pixels, Path(path).stem, args)

# ------------------------------------------------------------------------------------- programs
# Each is (model, step, subject): step(x0, progress) trains on images (N, C, side, side) in [-1, 1]
# when that fraction of the time is over; subject() is the Subject, once it is trained.


def ours(channels, config, device="cpu", memory_format=torch.contiguous_format, mode=None):
    """The steps of ddpm.train, without what it writes; no Subject. mode: of torch.compile."""
    device = torch.device(device)
    runtime = ddpm.Runtime(device, ddpm.choose_precision("auto", device), 0, 1)
    model = ddpm.build_model(config, channels, []).to(device, memory_format=memory_format)
    given = SimpleNamespace(train=[0])  # in place of the decoded images
    state = ddpm.TrainState(ddpm.override(config, compile=False), model, given, runtime)
    if config.compile:
        state.network = torch.compile(model, mode=mode)
    state.lr = config.lr
    diffusion = ddpm.make_diffusion(config, device)
    meter = ddpm.LossMeter(diffusion.T, runtime)
    ddpm.keep_memory()

    def step(x0, progress):
        no_labels = torch.full((len(x0),), -1, device=device)
        given.batch = lambda *_: (x0, no_labels)
        ddpm.train_step(config, state, diffusion, runtime, meter)

    return model, step, None


def faster(step, model, device):
    """The step of another project in bf16, its network compiled."""
    model.compile()

    def fast(x0, progress):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            step(x0, progress)

    return fast


def set_rate(optimizer, lr, progress):
    """The rate of the other projects: half a cosine, as in diffusers' training script."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * progress))


def sample_parts(sample, n):
    """n images (n, C, H, W) of sample(count), a hundred at a time."""
    return torch.cat([sample(min(100, n - i)) for i in range(0, n, 100)])


def diffusers_unet(channels, widths, layers, attention, size):
    """diffusers' UNet2DModel. attention: the stages that have it."""
    import diffusers

    kinds = ["Attn" * (i in attention) for i in range(len(widths))]
    return diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=math.gcd(*widths, 16),
        attention_head_dim=None,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
    )


def diffusers_program(channels, widths, layers, attention, lr, size=32, steps=25, device="cpu",
                      fast=False):
    """diffusers as its script for unconditional training has it: fp32, EMA with its warm-up."""
    import diffusers
    from diffusers.training_utils import EMAModel

    diffusers.utils.logging.disable_progress_bar()
    model = diffusers_unet(channels, widths, layers, attention, size).to(device)
    scheduler = diffusers.DDPMScheduler()
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    ema = EMAModel(model.parameters(), 0.9999, use_ema_warmup=True, power=0.75)

    def step(x0, progress):
        set_rate(optimizer, lr, progress)
        t = torch.randint(1000, (len(x0),), device=device)
        eps = torch.randn_like(x0)
        F.mse_loss(model(scheduler.add_noise(x0, eps, t), t).sample, eps).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    def subject():
        ema.copy_to(model.parameters())
        model.eval()
        abar = scheduler.alphas_cumprod.double()
        ddim = diffusers.DDIMScheduler.from_config(scheduler.config)
        pipeline = diffusers.DDIMPipeline(model, ddim)
        pipeline.set_progress_bar_config(disable=True)

        def denoise(xt, t, y):
            x0 = (xt - (1 - abar[t]).sqrt().float() * model(xt, t).sample) / abar[t].sqrt().float()
            return x0.clamp(-1, 1)

        def sample(n):
            images = pipeline(batch_size=n, num_inference_steps=steps, output_type="np").images
            return torch.from_numpy(images).permute(0, 3, 1, 2) * 2 - 1

        return Subject(denoise, abar, lambda y: sample_parts(sample, len(y)), False)

    return model, faster(step, model, device) if fast else step, subject


def lucidrains_program(channels, mults, lr, dim=32, size=32, steps=25, device="cpu", fast=False):
    """denoising-diffusion-pytorch: its own diffusion, its own EMA, as its Trainer uses them."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    flash = fast and device == "cuda"
    model = Unet(dim=dim, dim_mults=mults, channels=channels, flash_attn=flash)
    diffusion = GaussianDiffusion(model, image_size=size, sampling_timesteps=steps).to(device)
    ema = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr, betas=(0.9, 0.99))

    def step(x0, progress):
        set_rate(optimizer, lr, progress)
        diffusion((x0 + 1) / 2).backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def subject():
        average = ema.ema_model.eval()

        def denoise(xt, t, y):
            ts = torch.full((len(xt),), t, device=xt.device)
            return average.model_predictions(xt, ts, clip_x_start=True).pred_x_start

        def sample(n):
            return average.sample(batch_size=n) * 2 - 1

        abar = average.alphas_cumprod.double().cpu()
        return Subject(denoise, abar, lambda y: sample_parts(sample, len(y)), False)

    return model, faster(step, model, device) if fast else step, subject


def paper(name, args):
    """The programs for throughput: the paper's network, the same of diffusers, and one of about
    its size."""
    require(name in PAPER + ON_A_GPU,
            f"There is no program {name!r}: choose from {', '.join(PAPER + ON_A_GPU)}.")
    c = args.channels
    more = dict(device=args.device, fast=args.fast)
    if name == "diffusers":
        return diffusers_program(3, (c, 2 * c, 2 * c, 2 * c), 2, [1], 2e-4, **more)
    if name == "denoising-diffusion-pytorch":
        return lucidrains_program(3, (1, 2, 4, 8), 2e-4, c // 2, **more)
    _, *flags = name.split(", ")
    compiled = "--compile" in flags or "graphs" in flags
    config = ddpm.preset("cifar10", channels=c, dropout=0.0, compile=compiled,
                         batch_size=args.batch_size)
    channels_last = "channels_last" in flags
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    mode = "reduce-overhead" if "graphs" in flags else None
    return ours(3, config, args.device, memory_format, mode)


PAPER = ["ddpm.py", "ddpm.py, --compile", "diffusers", "denoising-diffusion-pytorch"]
ON_A_GPU = ["ddpm.py, graphs", "ddpm.py, channels_last", "ddpm.py, --compile, channels_last"]

# --------------------------------------------------------------------------------------- rivals

RIVALS = ["ddpm.py", "diffusers", "denoising-diffusion-pytorch"]


def small_program(name, channels, size, lr):
    """Another project's network for minutes of training, attention in its stage of 8x8 pixels."""
    num_stages = max(2, round(math.log2(size / 8)) + 1)
    if name == "diffusers":
        widths = (32, 64, 64, 128, 128, 128)[:num_stages]
        return diffusers_program(channels, widths, 1, [num_stages - 1], lr, size)
    mults = (1, 2, 2, 4, 4, 4)[:num_stages]
    return lucidrains_program(channels, mults, lr, size=size)


def train_ours(config, real, args):
    """Train with ddpm.train: (Subject, parameters, images seen)."""
    path = ddpm.train(config)
    checkpoint = ddpm.read_checkpoint(path)
    parameters = sum(v.numel() for v in checkpoint["weights"].values())
    seen = checkpoint["step"] * config.batch_size
    return ddpm_subject(path, real, args), parameters, seen


def train_rival(name, config, images, real, lr):
    """Train another project for config.minutes on the batches that ddpm.py would see: (Subject,
    parameters, images seen)."""
    torch.manual_seed(config.seed)
    size = images.pixels.shape[-1]  # with the border
    model, step, subject = small_program(name, images.channels, size, lr)
    num_steps = 0
    start_time = time.monotonic()
    while (progress := (time.monotonic() - start_time) / 60 / config.minutes) < 1:
        x0, _ = images.batch(num_steps, config.batch_size)
        step(x0, progress)
        num_steps += 1
    trained = subject()

    def sample(y):
        with torch.no_grad():
            return ddpm.crop(ddpm.to_pixels(trained.sample(y)), real.image_size)

    parameters = sum(p.numel() for p in model.parameters())
    return dataclasses.replace(trained, sample=sample), parameters, num_steps * config.batch_size


def rival_config(args, batch_size, folder):
    """The recipe of --preset on the data, for the minutes and batch size."""
    config = data_config(args, ddpm.preset(args.preset))
    return ddpm.override(config, minutes=args.minutes, batch_size=batch_size,
                         model_path=f"{folder}/model.pt", samples_dir=f"{folder}/samples",
                         sample_every=10**9, save_every=10**9)


def run_rival(name, batch_size, args):
    """Train a program and measure it, in a process of its own: the line of the table."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        config = rival_config(args, batch_size, folder)
        reference = make_reference(config, args)
        if name == "ddpm.py":
            result = train_ours(config, reference.real, args)
        else:
            images = ddpm.load_images(config)
            result = train_rival(name, config, images, reference.real, args.lr)
        subject, parameters, seen = result
        numbers, pixels = measure(subject, reference)
    write_grid(pixels, f"{name}_{batch_size}", args)
    return table_row(f"{name}, batches of {batch_size}, {parameters:,} parameters, {seen:,} images "
                     "seen", numbers)


def rivals(args):
    """Every program trains for as many minutes at every batch size, one after another: the table of
    `quality`, with a row each."""
    for name in args.programs:
        require(name in RIVALS, f"There is no program {name!r}: choose from {', '.join(RIVALS)}.")
    print_heading(make_reference(rival_config(args, 1, "."), args))
    for name in args.programs:
        for batch_size in args.batch_sizes:
            try:
                with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                    row = process.submit(run_rival, name, batch_size, args).result()
            except ImportError as e:
                print_missing(name, e)
                break
            print(row, flush=True)


def print_missing(name, error):
    """One sentence on a program whose packages are not all installed."""
    package = (error.name or name).replace("_", "-")
    print(f"{name} is left out: pip install {package}", file=sys.stderr)


# ------------------------------------------------------------------------------------- samplers


def samplers(args):
    """A table and a plot: the distance of samples from real images by sampler and number of
    evaluations."""
    require(len(args.model) == 1, "--model: give one, since each sampler is a line of its plot.")
    [path] = args.model
    model, diffusion, config = ddpm.load_model(path)
    reference = make_reference(data_config(args, config), args)
    require(reference.classifier, f"{reference.real.name} has no two classes: no distances.")
    print_heading(reference)
    print()
    counts = [*args.steps, *([diffusion.T] * args.all_steps)]
    table = {}
    start_time = time.monotonic()
    for sampler in ddpm.SAMPLERS:
        for steps in counts if sampler == "ddpm" else args.steps:
            args.sampler = sampler
            args.sampling_steps = steps
            subject = ddpm_subject(path, reference.real, args)
            pixels = subject.sample(reference.labels())
            numbers = reference.measure_images(pixels, reference.labels())
            table[sampler, steps] = numbers["frechet"]
            seconds = time.monotonic() - start_time
            print(f"{sampler:6} {steps:5} steps {numbers['frechet']:9.2f} {seconds:6.0f} s",
                  flush=True)
    print("\n| sampler | " + " | ".join(map(str, counts)) + " |\n|---|" + "---|" * len(counts))
    for sampler in ddpm.SAMPLERS:
        cells = [f"{table[sampler, k]:.2f}" if (sampler, k) in table else "" for k in counts]
        print(f"| `{sampler}` | " + " | ".join(cells) + " |")
    print(plot_samplers(table, counts, args.plot))


def plot_samplers(table, counts, path):
    """table: {(sampler, evaluations): distance}. Returns the path."""
    figure = ddpm.new_figure(5.2, 3.4)
    ax = figure.subplots()
    for sampler, colour in zip(ddpm.SAMPLERS, ddpm.COLOURS):
        x = [k for k in counts if (sampler, k) in table]
        y = [table[sampler, k] for k in x]
        ax.plot(x, y, "o-", color=colour, ms=4, lw=1.8, label=sampler)
    ax.set(xscale="log", xlabel="evaluations of the network",
           title="Frechet distance, lower is better")
    ax.set_xticks(counts, counts)
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(fontsize=8, frameon=False)
    return ddpm.save_figure(figure, path)


# --------------------------------------------------------------------------------- side by side


class Turns:
    """A program in a process of its own. start(*args) runs there and returns (info, work); each
    turn() does the work a few times and notes the seconds that it took once."""

    def __init__(self, start, *args):
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.info = self.process.submit(Turns.begin, start, *args).result()
        self.times = []

    @staticmethod
    def begin(start, *args):
        info, Turns.work = start(*args)
        return info

    @staticmethod
    def time(repeats):
        start_time = time.perf_counter()
        for _ in range(repeats):
            Turns.work()
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        return (time.perf_counter() - start_time) / repeats

    def turn(self, repeats):
        self.times.append(self.process.submit(Turns.time, repeats).result())


def side_by_side(start, names, args):
    """{name: Turns} after all turns, of those programs that are installed."""
    programs = {}
    for name in names:
        try:
            programs[name] = Turns(start, name, args)
        except ImportError as e:
            print_missing(name, e)
    for _ in range(args.turns):
        for program in programs.values():
            program.turn(args.repeats)
    return programs


MATRICES = {"bf16 matrix product": torch.bfloat16, "fp32 matrix product": torch.float32}


def matrices(device):
    """The products that rates are compared with: bf16 takes minutes where it is not built in."""
    fast_bf16 = ddpm.choose_precision("auto", torch.device(device)) == "bf16"
    return list(MATRICES) if fast_bf16 else ["fp32 matrix product"]


def matrix_product(dtype, device):
    """(0 parameters, FLOPs), and the work: twenty products of two square matrices."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return (0, 20 * 2 * n**3), lambda: [a @ b for _ in range(20)]


def start_training(name, args):
    """A program whose turn is a training step on so many images; its info is parameters and FLOPs
    a step."""
    from torch.utils.flop_counter import FlopCounterMode

    if name in MATRICES:
        return matrix_product(MATRICES[name], args.device)
    if args.memory:
        ddpm.keep_memory()
    model, step, _ = paper(name, args)
    x0 = torch.rand(args.batch_size, 3, 32, 32, device=args.device) * 2 - 1
    if "channels_last" in name:
        x0 = x0.contiguous(memory_format=torch.channels_last)
    start_time = time.monotonic()
    step(x0, 0)
    print(f"{name}: {time.monotonic() - start_time:.1f} s for the first step", flush=True)
    with FlopCounterMode(display=False) as counter:
        step(x0, 0)
    parameters = sum(p.numel() for p in model.parameters())
    return (parameters, counter.get_total_flops()), lambda: step(x0, 0)


def throughput(args):
    """Images and GFLOP a second of whole training steps."""
    ddpm.choose_device(args.device)  # UserError if there is none
    names = args.programs or PAPER + ON_A_GPU * (args.device == "cuda")
    products = matrices(args.device)
    programs = side_by_side(start_training, [*names, *products], args)
    seconds = {name: statistics.median(program.times) for name, program in programs.items()}
    rates = {name: program.info[1] / seconds[name] / 1e9 for name, program in programs.items()}
    limits = {name: rates.pop(name) for name in products}
    limit = limits[products[0]]
    listed = ", ".join(f"{name} {rate:.0f} GFLOP/s" for name, rate in limits.items())
    device = ddpm.describe_device(torch.device(args.device, 0 if args.device == "cuda" else None))
    notes = ", glibc keeps memory for all" * args.memory
    notes += ", the others in bf16 and compiled" * args.fast
    print(f"\n{device}, torch {torch.__version__}; medians of {args.turns} turns of {args.repeats} "
          f"steps of {args.batch_size} images{notes}\n"
          f"{listed}\n\n"
          "| | parameters | images/s | GFLOP/s | of the matrix rate |\n|---|---|---|---|---|")
    for name, gflops in rates.items():
        parameters = programs[name].info[0]
        images = args.batch_size / seconds[name]
        print(f"| {name} | {parameters:,} | {images:.1f} | {gflops:.0f} | {gflops / limit:.0%} |")
    first, *others = rates
    print()
    for name in others:
        print(f"{first} has {seconds[name] / seconds[first]:.2f} times the images/s of {name}, and "
              f"{rates[first] / rates[name]:.2f} times its GFLOP/s")
    print(json.dumps({name: [round(t, 4) for t in p.times] for name, p in programs.items()}))


def start_sampling(name, args):
    """A program whose turn is the sampling of so many images of 64x64, by models of one shape."""
    who, number = name.split(", ")
    number = int(number)
    if args.memory or who == "ddpm.py":
        ddpm.keep_memory()
    if who == "ddpm.py":
        model, diffusion, config = ddpm.load_model(ddpm.HERE / "saved_models" / "animals.pt")
        labels, _ = ddpm.sample_conditions(ddpm.override(config, num_samples=number), model)
        precision = ddpm.choose_precision("auto", torch.device("cpu"))
        info = f"{config.sampler}, {config.sampling_steps} steps, guidance {config.guidance:g}"
        return info, lambda: ddpm.sample_images(model, diffusion, config, labels, precision)
    config = ddpm.preset("animals")
    widths = [config.channels * m for m in config.channel_mults]
    size = config.image_size
    _, _, subject = diffusers_program(3, widths, config.res_blocks, [2, 3], config.lr, size, 50)
    sample = subject().sample
    return "DDIM, 50 steps, no guidance", lambda: sample([-1] * number)


def sampling(args):
    """Seconds for 64 and for 8 samples of 64x64: the shipped model, and diffusers' DDIM in 50
    steps."""
    names = [f"{who}, {n}" for n in (64, 8) for who in ("ddpm.py", "diffusers")]
    programs = side_by_side(start_sampling, names, args)
    print("\n| | how | seconds |\n|---|---|---|")
    for name, program in programs.items():
        seconds = statistics.median(program.times)
        print(f"| {name} samples | {program.info} | {seconds:.2f} |")
    print(json.dumps({name: [round(t, 2) for t in p.times] for name, p in programs.items()}))


# ------------------------------------------------------------------------------------- overhead


def synthetic(n):
    """A source of n images of 80x60 that are made when they are opened."""

    def image(i):
        pixels = np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8)
        return Image.fromarray(pixels)

    names = [str(i) for i in range(n)]
    return ddpm.ImageSource(names, np.full(n, -1), [], ["synthetic", n], image, [], [""] * n)


def time_calls(owner, name, what, spent, starts):
    """Replace a function by one that adds its seconds to spent[what], and its start to starts."""
    real = getattr(owner, name)

    def call(*given, **more):
        start_time = time.perf_counter()
        result = real(*given, **more)
        starts.append(start_time)
        spent[what] = spent.get(what, 0) + time.perf_counter() - start_time
        return result

    setattr(owner, name, call)


def overhead(args):
    """What a training run spends around the network: a real one, its functions timed."""
    timed = [
        (ddpm.Images, "batch", "data"),
        (ddpm, "update_ema", "EMA"),
        (ddpm.MetricsLogger, "log_training", "metrics"),
        (ddpm.tqdm, "update", "progress bar"),
        (ddpm, "sample_images", "sampling images"),
        (ddpm, "write_previews", "writing images"),
        (ddpm.torch, "save", "checkpoints"),
    ]
    with tempfile.TemporaryDirectory() as folder:
        config = ddpm.preset(args.preset, steps=args.steps, download_dir=args.download_dir,
                             model_path=f"{folder}/model.pt", samples_dir=folder)
        if args.images:
            ddpm.folder_source = lambda *_: synthetic(args.images)
            config = ddpm.override(config, download_dir=folder, class_cond=False)
        spent = {}
        starts = []
        for owner, name, what in timed:
            time_calls(owner, name, what, spent, starts)
        ddpm.train(config)
        total = time.perf_counter() - starts[0]
    print(f"\n{args.preset}, {config.steps} steps of {config.batch_size}, {total:.1f} s in all\n")
    print("| | fraction |\n|---|---|")
    for what, seconds in spent.items():
        print(f"| {what} | {seconds / total:.2%} |")
    print(f"| all of these | {sum(spent.values()) / total:.2%} |")


# -------------------------------------------------------------------------------------- prompts

# text; asked: the attributes that it says; shown: those of a drawing of it; pair: the combination
# of draw.UNSEEN that it has, or None
Prompt = namedtuple("Prompt", "text asked shown pair")
SIZES = [len(values) for values in draw.ATTRIBUTES.values()]


def make_prompts(n, seed):
    """n Prompts; every second has a combination of draw.UNSEEN, each of these in turn."""
    pairs = draw.combinations(draw.UNSEEN)
    prompts = []
    for i in range(n):
        rng = random.Random(f"{seed}/prompt/{i}")
        pair = pairs[i // 2 % len(pairs)] if i % 2 else None
        asked = {}
        while not asked or (pair and not draw.has(asked, pair)):
            shown = draw.choose(rng, () if pair else pairs)
            asked = draw.mention(shown, rng)
        prompts.append(Prompt(draw.caption(asked, rng), asked, shown, pair))
    return prompts


def attribute_labels(described):
    """The numbers of the values, (N, attributes) int64, of [{attribute: value}]; -1: none."""
    names = draw.ATTRIBUTES.items()
    rows = [[values.index(d[name]) if name in d else -1 for name, values in names]
            for d in described]
    return torch.tensor(rows)


def drawings(shown, seed):
    """Drawings of [{attribute: value}]: Labelled, labels (N, attributes)."""
    pixels = [np.asarray(draw.draw_captioned_image(attributes, seed, i))
              for i, attributes in enumerate(tqdm(shown, "drawings", leave=False, mininterval=5))]
    return Labelled(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), attribute_labels(shown))


def attribute_loss(logits, labels):
    """The sum over the attributes, for labels (N, attributes)."""
    parts = zip(logits.split(SIZES, 1), labels.T)
    return sum(F.cross_entropy(part, label, ignore_index=-1) for part, label in parts)


def train_attribute_classifier(num_drawings, num_images):
    """A Classifier whose classes are the values of all attributes."""
    shown = [draw.captioned("classifier", i)[0] for i in range(num_drawings)]
    train = drawings(shown, "classifier")
    torch.manual_seed(0)
    image_size = train.pixels.shape[-1]
    model = Classifier(3, image_size, sum(SIZES), num_features=256)
    return train_classifier(model, train, image_size, num_images, attribute_loss)


def recognise(classifier, pixels):
    """The attributes of images (N, C, H, W) uint8: numbers of the values, (N, attributes)."""
    probabilities = classify(classifier, pixels)[1]
    return torch.stack([part.argmax(1) for part in probabilities.split(SIZES, 1)], 1)


def fraction(right):
    """A cell of the table: the mean of (N,) bool, or nothing for N = 0."""
    return f"{right.float().mean():.1%}" if len(right) else ""


def prompts_row(name, found, prompts):
    """A line of the table. found: attributes of the prompts' images, as `recognise` has them."""
    asked = attribute_labels([p.asked for p in prompts])
    right = found == asked
    pairs = attribute_labels([p.pair or {} for p in prompts])
    has_pair = (pairs >= 0).any(1)
    cells = [fraction(right[asked[:, i] >= 0, i]) for i in range(len(SIZES))]
    cells.append(fraction(right[asked >= 0]))
    cells.append(fraction((right | (asked < 0)).all(1)))
    cells.append(fraction(((found == pairs) | (pairs < 0)).all(1)[has_pair]))
    return f"| {name} | {' | '.join(cells)} |"


def print_prompts_rows(name, found, prompts):
    """The lines of the seen and the unseen combinations."""
    for start, kind in enumerate(("seen", "unseen")):
        print(prompts_row(f"{name}, {kind}", found[start::2], prompts[start::2]), flush=True)


def load_captioned(path):
    """The model, diffusion and Config of a checkpoint that was trained on captioned drawings."""
    model, diffusion, config = ddpm.load_model(path)
    require(model.vocabulary, f"{path} was trained without captions: give a model of drawings by "
            "animal_data/draw.py --captions.")
    return model, diffusion, config


def sample_prompts(loaded, prompts, guidance, args):
    """An image a prompt, uint8 (N, C, size, size)."""
    model, diffusion, config = loaded
    texts = tuple(p.text for p in prompts)
    config = ddpm.override(config, seed=args.seed, guidance=guidance,
                           sampling_steps=args.sampling_steps,
                           sampler=args.sampler or config.sampler,
                           spacing=args.spacing or config.spacing)
    ddpm.check(config)
    ddpm.check_words(texts, model.vocabulary)
    labels = ddpm.encode(texts, model.vocabulary)  # also of prompts that occur twice
    precision = ddpm.choose_precision("auto", torch.device("cpu"))
    return ddpm.sample_images(model, diffusion, config, labels, precision)


def write_sheet(pixels, prompts, path):
    """A PNG of images with their prompts below, eight a row."""
    columns = 8
    rows = math.ceil(len(prompts) / columns)
    figure = ddpm.new_figure(1.6 * columns, 2.2 * rows)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis("off")
    for ax, image, prompt in zip(axes, ddpm.to_images(pixels), prompts):
        ax.imshow(image, interpolation="nearest")
        text = textwrap.fill("unseen: " * bool(prompt.pair) + prompt.text, 24)
        ax.text(0.5, -0.04, text, transform=ax.transAxes, ha="center", va="top", fontsize=6.5)
    return ddpm.save_figure(figure, path)


def prompts(args):
    """Fractions of the attributes that prompts ask for and a classifier recognises, in combinations
    that training showed and in others."""
    loaded = load_captioned(args.model)
    asked = make_prompts(args.samples, args.seed)
    classifier = train_attribute_classifier(args.drawings, args.classifier_images)
    columns = ["", *draw.ATTRIBUTES, "all", "prompt", "pair"]
    print(f"\n### {args.model}, {len(asked)} prompts, {args.sampling_steps} steps\n\n"
          f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    real = drawings([p.shown for p in asked], "prompts").pixels
    print_prompts_rows("drawings", recognise(classifier, real), asked)
    for guidance in args.guidance:
        pixels = sample_prompts(loaded, asked, guidance, args)
        found = recognise(classifier, pixels)
        print_prompts_rows(f"guidance {guidance:g}", found, asked)
    shuffled = torch.randperm(len(found), generator=torch.Generator().manual_seed(0))
    print_prompts_rows("the last, shuffled", found[shuffled], asked)
    if args.sheet:
        ddpm.print_files([write_sheet(pixels[:40], asked[:40], args.sheet)])


# --------------------------------------------------------------------------------- command line


def count(text):
    """A whole number from 1 on: a type for argparse, which names it."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def add_data_flags(parser):
    """What the measures by the classifier share."""
    add = parser.add_argument
    add("--data", help="image folder or name of a data set (default: that of the model's training)")
    add("--validation", metavar="FOLDER", help="images that no model was trained on")
    add("--download_dir", default="data", help="for downloads and decoded images")
    add("--classifiers", default="data", help="folder where trained classifiers are kept")
    add("--classifier_images", type=count, metavar="N", help="training images that a new classifier "
        "sees (default: a hundred times all, at most 60,000)")


def add_sample_flags(parser):
    add = parser.add_argument
    add("--num_samples", type=count, help="default: 2,000, or 500 of fewer than 1,000 real images")
    add("--seed", type=int, default=1, help="of the samples")
    add("--guidance", type=float, help="instead of the model's own")
    add_spacing_flag(parser)


def add_spacing_flag(parser):
    parser.add_argument("--spacing", choices=ddpm.FIELDS["spacing"].metadata["choices"],
                        help="of the sampling steps, instead of the model's own")


def add_table_flags(parser):
    add = parser.add_argument
    add("--sampler", choices=ddpm.SAMPLERS, help="instead of the model's own")
    add("--sampling_steps", type=count, help="instead of the model's own")
    add("--grids", metavar="FOLDER", help="also write a grid of each row's first 50 samples")


def add_turn_flags(parser):
    add = parser.add_argument
    add("--turns", type=count, default=5)
    add("--repeats", type=count, default=3)
    add("--memory", action="store_true", help="glibc keeps freed memory, for all programs")


def make_parser():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(work, *flags):
        """The function that adds a flag to a new command that calls `work`."""
        new = commands.add_parser(work.__name__, help=" ".join(work.__doc__.split()))
        new.set_defaults(work=work)
        for add_flags in flags:
            add_flags(new)
        return new.add_argument

    add_model = functools.partial(dict, nargs="+", action="extend", required=True, metavar="FILE")
    add = command(quality, add_data_flags, add_sample_flags, add_table_flags)
    add("--model", **add_model(help="checkpoints, a row each"))
    add = command(rivals, add_data_flags, add_sample_flags, add_table_flags)
    add("--preset", default="fashion_mnist", help="recipe of ddpm.py, and the data")
    add("--programs", nargs="+", default=RIVALS)
    add("--batch_sizes", type=count, nargs="+", default=[32, 64, 128])
    add("--minutes", type=float, default=10, help="of training, each")
    add("--lr", type=float, default=1e-3, help="of the other projects, falling by a cosine")
    add = command(samplers, add_data_flags, add_sample_flags)
    add("--model", **add_model(help="a checkpoint"))
    add("--steps", type=count, nargs="+", default=[5, 10, 20, 50, 100])
    add("--all_steps", action="store_true", help="ddpm on all T steps as well")
    add("--plot", default="samples/samplers.png")
    add = command(features, add_data_flags)
    commands.choices["features"].set_defaults(data="fashion_mnist")
    add("--image_size", type=count, default=28, help="default: 28, that of the data set's images")
    add("--out", default="data/features.pt", help="TorchScript file to write")
    add = command(throughput, add_turn_flags)
    add("--programs", nargs="+", help="only these")
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--batch_size", type=count, default=32)
    add("--channels", type=count, default=64, help="width of the first stage")
    add("--fast", action="store_true", help="the others in bf16 and compiled")
    command(sampling, add_turn_flags)
    add = command(overhead)
    add("--preset", default="animals")
    add("--steps", type=count, default=3000)
    add("--images", type=count, metavar="N", help="on so many made-up images")
    add("--download_dir", default="data")
    add = command(prompts, add_spacing_flag)
    add("--model", required=True, metavar="FILE", help="a checkpoint of captioned drawings")
    add("--samples", type=count, default=500, help="prompts, an image each")
    add("--guidance", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    add("--sampler", choices=ddpm.SAMPLERS, help="instead of the model's own")
    add("--sampling_steps", type=count, default=20)
    add("--seed", type=int, default=1, help="of the prompts and samples")
    add("--drawings", type=count, default=3000, help="that the classifier is trained on")
    add("--classifier_images", type=count, default=30_000, help="that it sees: each several times")
    add("--sheet", metavar="PNG", help="also write 40 prompts with their images")
    return parser


def main(argv=None):
    args = make_parser().parse_args(argv)
    return ddpm.run(lambda: args.work(args))


if __name__ == "__main__":
    raise SystemExit(main())
