"""ddpm.py: a denoising diffusion model in one file: trains on a folder of images, samples new ones.

    python ddpm.py --mode train                         # the five animals; 3 to 12 min on two cores
    python ddpm.py --mode sample                        # sample from the model just trained
    python ddpm.py --mode train --data_path MY_IMAGES  # flat, a sub-folder per class, or captions
    torchrun --nproc_per_node=8 ddpm.py --mode train --preset cifar10

docs/animals.png shows samples of the first command's model; docs/results.md has all figures and
their commands. Each chapter starts with a ruler line. A new schedule goes into make_betas, a
sampler into SAMPLERS, a network into build_model and total_stride; its name into the choices of
Config. Formats: image_suffixes, read_captions, read_checkpoint. Papers, cited below by name:

    Ho et al. 2020, Denoising diffusion probabilistic models             arXiv:2006.11239
    Song et al. 2021, Denoising diffusion implicit models                arXiv:2010.02502
    Nichol & Dhariwal 2021, Improved DDPM                                arXiv:2102.09672
    Ho & Salimans 2022, Classifier-free diffusion guidance               arXiv:2207.12598
    Salimans & Ho 2022, Progressive distillation (v-prediction)          arXiv:2202.00512
    Nichol et al. 2022, GLIDE: text-guided diffusion models              arXiv:2112.10741
    Lu et al. 2022, DPM-Solver++                                         arXiv:2211.01095
    Hang et al. 2023, Efficient diffusion training via min-SNR           arXiv:2303.09556
    Jordan 2024, Muon: an optimizer for hidden layers                    kellerjordan.github.io
    Lee et al. 2024, Beta sampling is all you need                       arXiv:2407.12173
    Liu et al. 2025, Muon is scalable for LLM training                   arXiv:2502.16982
"""

import argparse
import contextlib
import copy
import csv
import ctypes
import dataclasses
import datetime
import difflib
import enum
import functools
import hashlib
import io
import json
import math
import os
import platform
import re
import secrets
import shlex
import signal
import sys
import tempfile
import textwrap
import threading
import time
import types
import typing
import zipfile
from collections import Counter, namedtuple
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute_in_backward
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
__version__ = "2.0.0"
FORMAT = 1  # of checkpoints; raised when an older file can no longer be read as it is

class UserError(Exception):
    """Something that the user can fix: what is wrong, what was expected and the remedy."""

def require(condition, message):
    if not condition:
        raise UserError(message)

def printable(text):
    """The text with all that could steer a terminal or break the line escaped, as in \\x1b."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))

@contextlib.contextmanager
def optional(what):
    """A failure while in this context is a warning, and the program goes on."""
    try:
        yield
    except Exception as e:
        warn_of_failure(what, e)

def warn_of_failure(what, error):
    message = f"warning: {what} failed ({type(error).__name__}: {error}); going on without"
    print(printable(message), file=sys.stderr)

def short_hash(text):
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:12]

def evenly_spaced(items, n):
    """Up to n of the items of a list or an array, evenly spaced from the first to the last."""
    places = np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)
    return items[places] if isinstance(items, np.ndarray) else [items[i] for i in places]

# What a seed is for: the second number of derive_seed. ImageNoise puts the image's index there.
Stream = enum.IntEnum("Stream", "SUBSET HOLDOUT ORDER TRAINING PREVIEW EVALUATION", start=0)

def derive_seed(*numbers):
    """One 63-bit seed from integers >= 0; zeros at the end make no difference."""
    state = np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)
    return int(state[0] >> 1)

# ----------------------------------------------------------------------------------------- settings

# What a stored setting may be changed for: to resume its run, to sample from its model, or both.
# ONCE: both, and the value in a checkpoint is never used.
RESUME = ("resume",)
SAMPLE = ("sample",)
BOTH = ("resume", "sample")
ONCE = ("resume", "sample", "once")

def flag(default, meaning, low=None, high=None, choices="", group="", change_on=()):
    """A setting. choices: separated by blanks. group: the heading in --help that it begins."""
    metadata = dict(meaning=meaning, low=low, high=high, choices=choices.split() or None,
                    group=group, change_on=change_on)
    return dataclasses.field(default=default, metadata=metadata)

DATASETS = {  # torchvision's name of each
    "cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST", "mnist": "MNIST",
    "flowers102": "Flowers102", "celeba": "CelebA"}

@dataclasses.dataclass
class Config:
    """Every setting, its default and meaning. The command line is made of it. The defaults, which
    are also read as Config.steps and so on, are the recipe `animals`."""
    preset: str = flag("animals", "recipe; any other flag overrides it", group="recipe")
    data_path: str = flag("animal_data", f"folder, or one of {' '.join(DATASETS)}", group="data",
                          change_on=RESUME)
    download_dir: str = flag("data", "folder for downloads and decoded images", change_on=RESUME)
    image_size: int | str = flag(64, "side of square images in pixels, or WIDTHxHEIGHT", 8, 1024)
    resize: str = flag("crop", "how to resize images of another aspect ratio",
                       choices="crop pad stretch")
    captions: bool = flag(True, "condition on captions, where there are any", change_on=RESUME)
    max_images: int | None = flag(None, "use at most N random images (default: all)", 1, 10**12)
    hflip: bool = flag(False, "mirror half of the training images, left to right")
    holdout: float = flag(0.0, "fraction of the images kept for validation", 0, 0.9)
    timesteps: int = flag(1000, "number of noise levels T", 10, 100_000, group="diffusion")
    schedule: str = flag("cosine", "noise schedule",
                         choices="linear cosine quadratic exponential sigmoid")
    beta_start: float | None = flag(None, "first beta (default: 1e-4 * 1000 / T)", 1e-8, 0.999)
    beta_end: float | None = flag(None, "last beta (default: 0.02 * 1000 / T)", 1e-8, 0.999)
    predict: str = flag("x0", "what the network predicts", choices="eps x0 v")
    loss: str = flag("l2", "loss between prediction and target", choices="l2 l1 huber")
    min_snr: float = flag(4.0, "cap g in the weight of errors of x0: 1 + min(snr, g), min(snr, g) "
                          "with eps; 0: off", 0, 1e6)
    detail_weight: float = flag(2.0, "weight in the loss of errors of differences between "
                                "neighbouring pixels; 0: off, better with eps", 0, 1000)
    arch: str = flag("unet", "network", choices="unet simple resnet18", group="network")
    channels: int = flag(32, "channels of the first stage (unet, simple)", 4, 4096)
    channel_mults: tuple[int, ...] = flag(
        (1, 1, 3, 5), "channels of each stage, as multiples of --channels (unet)", 1, 64)
    patch: int = flag(2, "side of the pixel squares that become channels (unet)", 1, 16)
    res_blocks: int = flag(1, "residual blocks per stage, one more in the decoder (unet)", 1, 16)
    attention: str = flag("full", "kind of attention (unet)", choices="full linear none")
    attention_at: tuple[int, ...] = flag(
        (), "heights of feature maps with attention (default: of the last two stages)", 1, 1024)
    dropout: float = flag(0.0, "dropout inside residual blocks (unet)", 0, 0.95)
    class_cond: bool = flag(True, "condition on the class (of two or more) or the caption")
    label_dropout: float = flag(0.1, "fraction of labels hidden in training, for --guidance", 0, 1)
    pretrained: bool = flag(False, "start the encoder from ImageNet weights, downloaded (resnet18)")
    steps: int | None = flag(1350, "length of training in steps", 1, 10**12, group="training",
                             change_on=RESUME)
    epochs: float | None = flag(None, "or in epochs", 1e-6, 1e9, change_on=RESUME)
    minutes: float | None = flag(None, "or in minutes", 1e-3, 1e7, change_on=RESUME)
    batch_size: int = flag(16, "images per optimiser step, over all processes", 1, 10**6)
    grad_accum: int = flag(1, "micro-batches per batch, to save memory", 1, 10**6, change_on=RESUME)
    lr: float = flag(2.5e-3, "learning rate after warm-up", 1e-9, 10, change_on=RESUME)
    optimizer: str = flag("muon", "optimiser", choices="adam adamw muon")
    weight_decay: float = flag(0.0, "weight decay, decoupled with adamw", 0, 10)
    lr_schedule: str = flag("cosine", "learning rate after warm-up", choices="constant cosine")
    warmup_steps: int = flag(100, "steps over which the learning rate rises from 0", 0, 10**9)
    grad_clip: float = flag(1.0, "maximum gradient norm; 0 is off", 0, 1e9)
    ema_decay: float = flag(0.999, "largest decay of the EMA weights; 0 is off", 0, 0.999999)
    precision: str = flag("auto", "number format of the network; auto: bf16 if native",
                          choices="auto fp32 bf16 fp16", change_on=BOTH)
    compile: bool = flag(False, "torch.compile the network: for long GPU runs", change_on=RESUME)
    checkpointing: bool = flag(False, "recompute activations for memory (unet)", change_on=RESUME)
    device: str = flag("auto", "where to compute", choices="auto cpu cuda mps", change_on=BOTH)
    seed: int = flag(0, "seed of everything random", 0, 2**63 - 1, change_on=SAMPLE)
    resume: str | None = flag(None, "resume a run: from this step checkpoint, or the latest",
                              group="running", change_on=("resume", "once"))
    init_from: str | None = flag(None, "start from these weights", change_on=("resume", "once"))
    save_every: int = flag(450, "steps between checkpoints", 1, 10**9, change_on=RESUME)
    sample_every: int = flag(450, "steps between grids of samples", 1, 10**9, change_on=RESUME)
    log_every: int = flag(20, "steps between lines of metrics.jsonl", 1, 10**9, change_on=RESUME)
    keep_last: int = flag(2, "step checkpoints to keep", 1, 10**6, change_on=RESUME)
    logger: str = flag("none", "also log to", choices="none tensorboard wandb", change_on=RESUME)
    dry_run: bool = flag(False, "check data and memory in two steps, then exit", change_on=RESUME)
    model_path: str = flag("saved_models/denoise_model.pt", "what train writes and sample reads",
                           group="places", change_on=BOTH)
    samples_dir: str = flag("samples", "folder for images, plots and metrics.jsonl", change_on=BOTH)
    num_samples: int = flag(25, "images to sample", 1, 10**7, group="sampling", change_on=BOTH)
    sample_batch_size: int = flag(64, "images sampled at a time", 1, 10**5, change_on=BOTH)
    sampler: str = flag("dpm++sde", "sampling algorithm", choices="ddpm ddim dpm++ dpm++sde",
                        change_on=BOTH)
    sampling_steps: int = flag(20, "steps from noise to image, at most T", 1, 10**5, change_on=BOTH)
    spacing: str = flag("arcsine", "sampling timesteps: even, or denser at both ends",
                        choices="uniform arcsine", change_on=BOTH)
    eta: float = flag(0.0, "fresh noise in ddim: 0 none, 1 as much as ddpm", 0, 1, change_on=BOTH)
    classes: str | None = flag(None, "only these, as in lion,tiger (default: all)", change_on=BOTH)
    prompt: tuple[str, ...] = flag(
        (), 'captions to sample, in turn, as in "a white cat" "a lion"', change_on=BOTH)
    prompts: str | None = flag(None, "file of captions to sample, one a line", change_on=ONCE)
    guidance: float = flag(1.75, "classifier-free guidance scale; 1 is off", 0, 100, change_on=BOTH)
    ema: bool = flag(True, "sample with the EMA weights", change_on=BOTH)
    individual: str | None = flag(None, "folder for one file per image", change_on=ONCE)
    gif: bool = flag(False, "also write the reverse process as an animation", change_on=ONCE)
    init_image: str | None = flag(None, "image to start from instead of noise", change_on=ONCE)
    strength: float | None = flag(None, "how far back towards noise (default: 0.5; with --mask 1)",
                                  0.001, 1, change_on=ONCE)
    mask: str | None = flag(None, "inpaint where this image is white", change_on=ONCE)
    interpolate: int | None = flag(None, "go from the first image of --seed to that of this seed",
                                   0, 2**63 - 1, change_on=ONCE)

    def __post_init__(self):
        self.image_size = square_as_number(self.image_size)

FIELDS = {field.name: field for field in dataclasses.fields(Config)}
LENGTHS = ("steps", "epochs", "minutes")

def square_as_number(image_size):
    """The number 64 for "64" and "64x64"; any other --image_size, even a wrong one, as it is."""
    side = str(image_size).partition("x")[0]
    is_square = str(image_size) in (side, f"{side}x{side}")
    return int(side) if is_square and re.fullmatch(r"\d{1,9}", side) else image_size

def image_sides(image_size):
    """(height, width) of images of this --image_size."""
    sides = str(image_size).split("x")  # [side], or [width, height]
    limits = FIELDS["image_size"].metadata
    require(len(sides) <= 2 and all(re.fullmatch(r"\d{1,9}", side) for side in sides),
            f"--image_size {image_size}: give {limits['low']} to {limits['high']} or, for "
            "other shapes than squares, WIDTHxHEIGHT, as in 96x64.")
    return int(sides[-1]), int(sides[0])

def size_text(image_size):
    """An image size as text, as in "64x64"."""
    height, width = image_sides(image_size)
    return f"{width}x{height}"

def flag_groups():
    """{heading of --help: names of its settings}; no group means the last one named."""
    groups = {}
    heading = ""
    for name, field in FIELDS.items():
        heading = field.metadata["group"] or heading
        groups.setdefault(heading, []).append(name)
    return groups

def changeable(command):
    """The settings of a checkpoint that may change to "resume" its run or "sample" from it."""
    return {name for name, field in FIELDS.items() if command in field.metadata["change_on"]}

# Settings that several recipes share; each recipe is Config's defaults changed by its entry.
# PLAIN: Ho et al. 2020, made small. LITERAL: with betas that do not depend on T.
FASHION = dict(data_path="fashion_mnist", image_size=28, batch_size=128, num_samples=50)
PLAIN = dict(schedule="linear", predict="eps", min_snr=0.0, detail_weight=0.0, patch=1,
             class_cond=False, optimizer="adam", lr=1e-3, sampler="ddpm", guidance=1.0,
             sampling_steps=50, spacing="uniform")
LITERAL = PLAIN | dict(
    beta_start=1e-4, beta_end=0.02, lr_schedule="constant", warmup_steps=0, hflip=True)
FLOWERS = LITERAL | dict(
    data_path="flowers102", max_images=1000, loss="l1", batch_size=64, num_samples=16)
PRESETS = {
    "animals": dict(),
    "animals_text": dict(
        data_path="animals_text_data", detail_weight=0.0, batch_size=32, steps=8200,
        num_samples=24, sampler="ddpm", guidance=2.0, spacing="uniform", save_every=1000,
        sample_every=1000),
    "fashion_mnist": FASHION | dict(
        channel_mults=(1, 2, 4), attention_at=(8,), batch_size=32, lr=1.2e-3, steps=6000,
        sampling_steps=15, guidance=1.25),
    "animals_cnn": PLAIN | dict(arch="simple", predict="x0", batch_size=32, epochs=600),
    "cifar10_resnet18": PLAIN | dict(
        data_path="cifar10", arch="resnet18", timesteps=500, schedule="cosine", optimizer="adamw",
        lr=1e-4, weight_decay=0.01, batch_size=10, epochs=20, warmup_steps=0, hflip=True,
        save_every=5000, sample_every=5000),
    "fashion_mnist_annotated": FASHION | LITERAL | dict(
        timesteps=200, loss="huber", channels=28, channel_mults=(1, 2, 4), res_blocks=2,
        attention="linear", attention_at=(32, 16, 8), epochs=5),
    "fashion_mnist_small": FASHION | PLAIN | dict(
        channels=16, channel_mults=(1, 2, 2), attention="none", epochs=5),
    "flowers_simple": FLOWERS | dict(arch="simple", timesteps=600, epochs=25),
    "flowers_attention": FLOWERS | dict(
        patch=2, channel_mults=(1, 2, 4, 8), attention="linear", attention_at=(32, 16, 8),
        timesteps=300, warmup_steps=500, epochs=100),  # without warm-up it learns nothing
    "cifar10": PLAIN | dict(
        data_path="cifar10", image_size=32, channels=128, channel_mults=(1, 2, 2, 2), res_blocks=2,
        attention_at=(16,), dropout=0.1, lr=2e-4, lr_schedule="constant", warmup_steps=5000,
        hflip=True, ema_decay=0.9999, batch_size=128, steps=800_000, save_every=5000,
        sample_every=5000, log_every=100, num_samples=64),
}

def override(config, **given):
    """A copy of `config` with the given settings; a given length of training replaces any other."""
    lengths = [name for name in LENGTHS if given.get(name) is not None]
    require(len(lengths) < 2,
            f"--{' and --'.join(lengths)} both set the length of training: give one.")
    if lengths:
        given = dict(steps=None, epochs=None, minutes=None) | given
    return dataclasses.replace(config, **given)

def preset(name, **overrides):
    """The Config of a recipe in PRESETS, with settings overridden: preset("cifar10", steps=10)."""
    require(name in PRESETS, f"There is no preset {name!r}: choose from {', '.join(PRESETS)}.")
    config = override(Config(preset=name), **PRESETS[name])
    if overrides.get("schedule", config.schedule) != config.schedule:
        config = override(config, beta_start=None, beta_end=None)  # they suit its own schedule
    return override(config, **overrides)

def check(config):
    """Raise UserError for the first setting that is out of its range or contradicts another."""
    for name, field in FIELDS.items():
        check_value(name, getattr(config, name), field)
    check_diffusion(config)
    check_sampling(config)
    check_network(config)
    require(not (config.resume and config.init_from),
            "--resume continues a run and --init_from starts one: give one of them.")

def check_value(name, value, field):
    """Raise UserError unless the value has the type, range and choices of its field of Config."""
    choices = field.metadata["choices"]
    if choices:
        require(value in choices, f"--{name} {value}: choose from {', '.join(choices)}.")
    allowed = typing.get_args(field.type) or (field.type,)  # (int, NoneType) of int | None
    if float in allowed:
        allowed = (int, *allowed)  # 1 will do for 1.0
    type_name = field.type.__name__ if isinstance(field.type, type) else field.type
    wrong_type = f"--{name} {value!r}: give {type_name}."
    values = [value]
    if name == "image_size":
        values = image_sides(value)
    elif typing.get_origin(field.type) is tuple:
        require(type(value) is tuple, wrong_type)
        values = value
    low = field.metadata["low"]
    high = field.metadata["high"]
    for v in values:
        require(type(v) in allowed and "\0" not in str(v), wrong_type)  # no file name may have \0
        require(v != "" or name == "prompt",
                f"--{name} is empty: give a file, a folder or a name, or leave it out.")
        if low is not None and v is not None:
            require(low <= v <= high, f"--{name} {v} is out of range: give {low} to {high}.")

def check_diffusion(config):
    require(config.schedule != "cosine" or not (config.beta_start or config.beta_end),
            "--schedule cosine has no --beta_start and --beta_end: leave them out.")
    T = config.timesteps
    first, last = beta_range(T, config.beta_start, config.beta_end)
    require(first <= last,
            f"--beta_start {first:g} is above --beta_end {last:g}: noise has to grow.")
    require(make_diffusion(config).abar_T > 1e-60,
            f"--timesteps {T} with such betas leaves nothing of an image: give fewer timesteps, or "
            "a smaller --beta_start and --beta_end.")

def check_sampling(config):
    require(config.sampling_steps <= config.timesteps, f"--sampling_steps "
            f"{config.sampling_steps} is more than --timesteps {config.timesteps}.")
    require(config.init_image or not (config.mask or config.strength),
            "--mask and --strength need --init_image FILE.")
    require(config.interpolate is None or not config.init_image,
            "--interpolate and --init_image cannot be combined: give one.")
    require(config.interpolate != config.seed,
            f"--interpolate {config.interpolate} is --seed as well: give two different ones.")

UNET_ONLY = "channel_mults patch res_blocks attention attention_at dropout checkpointing"
UNUSED = {  # settings that have no effect with the value of another
    ("arch", "unet"): "pretrained",
    ("arch", "simple"): f"{UNET_ONLY} pretrained",
    ("arch", "resnet18"): f"{UNET_ONLY} channels",
    ("attention", "none"): "attention_at",
    ("sampler", "ddpm"): "eta",
    ("sampler", "dpm++"): "eta",
    ("sampler", "dpm++sde"): "eta",
    ("guidance", 0): "classes prompt prompts",  # 0: the output without labels; 1 is off
}

def warn_of_unused(config, given):
    """Print which of the settings `given` have no effect."""
    changed = {name for name, value in given.items() if value != FIELDS[name].default}
    for (setting, value), unused in UNUSED.items():
        if getattr(config, setting) == value:
            for name in sorted(changed & set(unused.split())):
                print(f"warning: --{name} has no effect with --{setting} {value}")

def check_network(config):
    require(config.channel_mults, "--channel_mults is empty: give a number per stage, as in 1 2 2.")
    stride = total_stride(config)
    remedy = " or ".join(map(str, nearest_sizes(config))) or "fewer --channel_mults"
    require(all(side % stride == 0 for side in padded_sides(config.image_size)),
            f"--image_size {config.image_size} must be divisible by {stride}: use {remedy}.")
    require(config.channels % 2 == 0 or config.arch == "resnet18",
            f"--channels {config.channels} must be even: half sines, half cosines.")
    if config.arch == "unet" and config.attention != "none":
        heights = stage_heights(config)
        wanted = " ".join(map(str, config.attention_at))
        require(set(config.attention_at) <= set(heights), f"--attention_at {wanted}: the stages "
                f"have heights {' '.join(map(str, heights))}; choose among them, or "
                "--attention none.")

def padded(side):
    """A side of the images in the network: MNIST's 28 cannot be halved often and gets a border."""
    return 32 if side == 28 else side

def padded_sides(image_size):
    """(height, width) of the images in the network."""
    return tuple(map(padded, image_sides(image_size)))

def nearest_sizes(config):
    """The next smaller and the next larger --image_size that the network of a Config can take."""
    stride = total_stride(config)
    limits = FIELDS["image_size"].metadata
    possible = range(limits["low"], limits["high"] + 1)
    fitting = [n for n in possible if n % stride == padded(n) % stride == 0]  # 28 counts as 32
    if not fitting:
        return []
    sides = image_sides(config.image_size)
    smaller = [max([n for n in fitting if n <= side], default=fitting[0]) for side in sides]
    larger = [min([n for n in fitting if n >= side], default=fitting[-1]) for side in sides]
    sizes = [square_as_number(f"{width}x{height}") for height, width in (smaller, larger)]
    return list(dict.fromkeys(sizes))  # one, if the size fits

def total_stride(config):
    """How many pixels of an image are one pixel of the network's deepest feature map."""
    if config.arch == "unet":
        return config.patch * 2 ** (len(config.channel_mults) - 1)
    return {"simple": 16, "resnet18": 32}[config.arch]

def stage_heights(config):
    """Heights of the feature maps in the stages of a UNet."""
    height, _ = padded_sides(config.image_size)
    return [height // config.patch >> stage for stage in range(len(config.channel_mults))]

# ---------------------------------------------------------------------------------- noise schedules

def beta_range(T, start=None, end=None):
    """First and last beta: as given, else DDPM's 1e-4 and 0.02 times 1000/T, at most 0.999."""
    first = 1e-4 * 1000 / T if start is None else start
    last = 0.02 * 1000 / T if end is None else end
    return min(first, 0.999), min(last, 0.999)

def make_betas(kind, T, start=None, end=None):
    """The noise schedule: beta_t, the variance that step t adds, (T,) float64 in (0, 0.999]."""
    start, end = beta_range(T, start, end)
    ramp = torch.linspace(0, 1, T, dtype=torch.float64)  # from t = 0 to t = T-1
    if kind == "linear":  # Ho et al. 2020, section 4
        betas = start + (end - start) * ramp
    elif kind == "quadratic":  # Song et al. 2021's code; "scaled linear" in latent diffusion
        betas = (start**0.5 + (end**0.5 - start**0.5) * ramp) ** 2
    elif kind == "exponential":  # geometric, as in Song & Ermon (arXiv:1907.05600)
        betas = start * (end / start) ** ramp
    elif kind == "sigmoid":  # an S from start to end, as in GeoDiff (arXiv:2203.02923)
        betas = start + (end - start) * torch.sigmoid(12 * ramp - 6)
    elif kind == "cosine":  # Nichol & Dhariwal 2021, eq. 17, with s = 0.008
        t = torch.arange(T + 1, dtype=torch.float64)
        f = torch.cos((t / T + 0.008) / 1.008 * math.pi / 2) ** 2  # f(0), f(1), ..., f(T)
        betas = 1 - f[1:] / f[:-1]  # abar is f / f(0), and f(0) cancels
    else:
        raise UserError(f"There is no schedule {kind!r}: see the choices of --schedule.")
    return betas.clamp(max=0.999)

# -------------------------------------------------------------------------------- diffusion process

class Diffusion:
    """The forward process q, and what follows from it. Timesteps t: 0..T-1 (the paper's 1..T).
    abar[t]: the paper's alpha-bar (alphas_cumprod elsewhere), float64; abar[-1] = 1 is clean data.
    A reverse step goes from level t to a lower level u, which is -1, clean data, at the end.
    predict: what the network outputs, the noise eps, the clean image x0 (x_start elsewhere), or v.
    loss: l2, l1 or huber. min_snr: the cap in the weight of the loss, 0 for no weight.
    detail_weight: the weight of differences between neighbouring pixels in the loss."""
    def __init__(self, betas, predict="eps", loss="l2", min_snr=0.0, device="cpu",
                 detail_weight=0.0):
        self.T = len(betas)
        self.predict = predict
        self.detail_weight = detail_weight
        self.loss_fn = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[loss]
        abar = torch.cumprod(1 - betas.double().cpu(), 0)  # (T,): its [-1] is the last timestep
        self.abar = torch.cat([abar, torch.ones(1, dtype=torch.float64)])  # (T + 1,): [-1] is 1
        self.abar_T = abar[self.T - 1].item()  # what is left of an image at the last timestep
        weight = torch.ones_like(abar)
        if min_snr:
            snr = abar / (1 - abar)
            x0_weight = snr.clamp(max=min_snr)  # Hang et al. 2023: uncapped, small t would dominate
            if predict != "eps":  # with eps the 1 would become 1 / snr, which is unbounded
                x0_weight = x0_weight + 1  # Salimans & Ho 2022, section 4
            # Squared error of the output / squared error of the x0 that it implies, at one x_t.
            error_ratio = {"x0": 1, "eps": snr, "v": snr + 1}[predict]
            weight = x0_weight / error_ratio
        # sqrt(abar_t) and sqrt(1 - abar_t), for a tensor of t: (T,) float32, on the device.
        self.a = abar.sqrt().float().to(device)
        self.s = (1 - abar).sqrt().float().to(device)
        self.weight = weight.float().to(device)

    def scales(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply images: (N, 1, 1, 1)."""
        return self.a[t].view(-1, 1, 1, 1), self.s[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) (Ho et al. 2020, eq. 4). x0, eps, result: (N, C, H, W); t: (N,)."""
        a, s = self.scales(t)
        return a * x0 + s * eps

    def predict_x0(self, out, xt, t):
        """The clean image that the network's output stands for, not clipped: (N, C, H, W)."""
        a, s = self.scales(t)
        if self.predict == "eps":
            return (xt - s * out) / a  # Ho et al. 2020, eq. 15
        if self.predict == "v":
            return a * xt - s * out  # Salimans & Ho 2022, appendix D
        return out

    def loss(self, model, x0, t, eps, y=None):
        """Loss per image, (N,) float32: Ho et al. 2020, eq. 14, if eps, l2 and unweighted. x0, eps:
        (N, C, H, W); t: (N,); y: the labels, as networks take them."""
        a, s = self.scales(t)
        target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[self.predict]
        out = model(self.q_sample(x0, t, eps), t, y).float()  # (N, C, H, W)
        require(out.shape == x0.shape,
                f"The network outputs {tuple(out.shape)} for {tuple(x0.shape)}.")
        loss = self.mean_error(out, target)
        if self.detail_weight:  # with l2 a Sobolev norm of the error: the same minimiser
            for dim in (2, 3):
                detail = self.mean_error(out.diff(dim=dim), target.diff(dim=dim))
                loss = loss + self.detail_weight * detail
        return self.weight[t] * loss

    def mean_error(self, out, target):
        """The mean over each image, (N,), of l2, l1 or huber."""
        return self.loss_fn(out, target, reduction="none").mean(dim=(1, 2, 3))

    def forward_std(self, t, u):
        """Std of q(x_t | x_u), sqrt(beta_t) if u = t - 1: the larger sigma of Ho et al. 2020,
        section 3.2 (sigma-hat of Song et al. 2021, section 5). t > u: ints, here and below."""
        return math.sqrt(1 - self.abar[t].item() / self.abar[u].item())

    def posterior_std(self, t, u):
        """Std of q(x_u | x_t, x_0), the smaller sigma: Song et al. 2021, eq. 16, at eta = 1."""
        noise_ratio = (1 - self.abar[u].item()) / (1 - self.abar[t].item())
        return math.sqrt(noise_ratio) * self.forward_std(t, u)

    def posterior(self, xt, x0, t, u, eta=1.0):
        """Mean (N, C, H, W) and std of x_u given x_t and x_0 (Song et al. 2021, eq. 7, where alpha
        is our abar). At eta = 1 and u = t - 1 they are those of Ho et al. 2020, eq. 7."""
        abar_t = self.abar[t].item()
        abar_u = self.abar[u].item()
        std = eta * self.posterior_std(t, u)
        eps = (xt - math.sqrt(abar_t) * x0) / math.sqrt(1 - abar_t)  # the noise that x0 implies
        mean = math.sqrt(abar_u) * x0 + math.sqrt(max(1 - abar_u - std**2, 0)) * eps
        return mean, std

    def step(self, xt, x0, t, u, eta=0.0, noise=None):
        """x_u (Song et al. 2021, eq. 12): DDPM at eta = 1, DDIM at 0; without noise the mean."""
        mean, std = self.posterior(xt, x0, t, u, eta)
        return mean if noise is None else mean + std * noise

def make_diffusion(config, device="cpu"):
    betas = make_betas(config.schedule, config.timesteps, config.beta_start, config.beta_end)
    return Diffusion(betas, config.predict, config.loss, config.min_snr, device,
                     config.detail_weight)

# ----------------------------------------------------------------------------------------- samplers
# A sampler takes x at noise level ts[0] down the timesteps ts, which end at -1. After each step it
# yields (t, x, x0): the level it left, x at the next level, the clean image predicted at t. It sees
# a model only as denoise(x, t) -> x0. noise() is fresh Gaussian noise of x's shape.

def ddpm(diffusion, denoise, x, ts, noise, eta=0.0):
    """Ho et al. 2020, algorithm 2: its line 4 is eq. 7 at the predicted x0. eta is ignored."""
    every_timestep = all(t - u == 1 for t, u in pairwise(ts))
    for t, u in pairwise(ts):
        x0 = denoise(x, t)
        mean, std = diffusion.posterior(x, x0, t, u)
        if every_timestep:  # the larger sigma, better only with all T steps (Song et al., table 1)
            std = diffusion.forward_std(t, u)
        x = mean + std * noise() if u >= 0 else mean  # the last step adds no noise
        yield t, x, x0

def ddim(diffusion, denoise, x, ts, noise, eta=0.0):
    """Song et al. 2021, eq. 12: deterministic at eta = 0."""
    for t, u in pairwise(ts):
        x0 = denoise(x, t)
        x = diffusion.step(x, x0, t, u, eta, noise() if eta > 0 and u >= 0 else None)
        yield t, x, x0

def dpmpp(diffusion, denoise, x, ts, noise, eta=0.0):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), deterministic: eta is ignored."""
    return multistep(diffusion, denoise, x, ts, noise, eta=0.0)

def dpmpp_sde(diffusion, denoise, x, ts, noise, eta=0.0):
    """SDE-DPM-Solver++(2M), its stochastic form (Lu et al. 2022, section 5): eta is ignored."""
    return multistep(diffusion, denoise, x, ts, noise, eta=1.0)

def multistep(diffusion, denoise, x, ts, noise, eta):
    """As ddim (eta 0), or ddpm with the smaller sigma (eta 1), but second order: each step takes D
    in place of x0: the last two x0, extrapolated to the middle of the step in log-SNR."""
    half_log_snr = (torch.logit(diffusion.abar) / 2).tolist()  # lambda in the paper; [-1] is inf
    last_x0 = last_h = None  # of the step before
    for t, u in pairwise(ts):
        x0 = denoise(x, t)
        h = half_log_snr[u] - half_log_snr[t]  # the length of the step
        D = x0  # in the first step, and in the last, where h is infinite and x becomes x0
        if last_h and u >= 0:
            D = x0 + (x0 - last_x0) * (h / 2 / last_h)  # half a step on, at the last slope
        x = diffusion.step(x, D, t, u, eta, noise() if eta > 0 and u >= 0 else None)
        last_x0 = x0
        last_h = h
        yield t, x, x0

SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpmpp, "dpm++sde": dpmpp_sde}

def spaced_timesteps(T, n, spacing="uniform"):
    """n falling timesteps from T-1 and a last -1: n + 1 integers. uniform: evenly spaced (trailing
    spacing); arcsine: at the quantiles of Beta(1/2, 1/2), denser at both ends, where log-SNR
    changes fastest (Lee et al. 2024)."""
    require(1 <= n <= T,
            f"{n} sampling steps: give 1 to {T}, the number of timesteps of the model.")
    ts = np.linspace(T - 1, -1, n + 1)
    if spacing == "arcsine":
        ts = T * np.sin(np.linspace(math.pi / 2, 0, n + 1)) ** 2 - 1
    i = np.arange(n + 1)
    ts = np.round(ts).clip(n - 1 - i, T - 1 - i)  # distinct, also where they are dense
    return ts.astype(int).tolist()

def make_denoiser(model, diffusion, y=None, guidance=1.0, clip=True, precision="fp32"):
    """denoise(x, t) -> x0. x, x0: (N, C, H, W) in [-1, 1]; t: int; y: labels for networks.
    guidance g: uncond + g * (cond - uncond), in one batch (Ho & Salimans 2022, with w = g - 1)."""
    @torch.no_grad()
    def denoise(x, t):
        ts = torch.full((len(x),), t, device=x.device)  # (N,)
        with autocast(x.device, precision):
            if guidance == 1 or y is None:
                out = model(x, ts, y).float()
            else:
                no_label = torch.full_like(y, -1)
                both = model(torch.cat([x, x]), torch.cat([ts, ts]), torch.cat([no_label, y]))
                uncond, cond = both.float().chunk(2)  # (N, C, H, W) each
                out = uncond + guidance * (cond - uncond)
        x0 = diffusion.predict_x0(out, x, ts)
        return x0.clamp(-1, 1) if clip else x0
    return denoise

class ImageNoise:
    """noise() -> (n, *shape), from one generator per image, seeded by (seed, number of the image):
    an image depends neither on the batch size nor on the device."""
    def __init__(self, seed, indices, shape, device):
        self.generators = [torch.Generator().manual_seed(derive_seed(seed, i)) for i in indices]
        self.shape = shape
        self.device = device

    def __call__(self):
        noise = torch.stack([torch.randn(self.shape, generator=g) for g in self.generators])
        return to_device(noise, self.device)

# ----------------------------------------------------------------------------------------- networks
# All are called as net(x, t, y): x (N, C, H, W), t (N,), and y the labels or None. Labels are (N,)
# class indices, or (N, L) word indices padded with -1. Only -1 means: no label.

def autocast(device, precision):
    """Mixed precision: a torch.autocast context for bf16 and fp16, one without effect for fp32."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

class TimeLabelEmbedding(nn.Module):
    """Sinusoids of t (Ho et al. 2020, appendix B) through an MLP, plus a vector per label."""
    def __init__(self, base_channels, embedding_dim, num_classes):
        super().__init__()
        self.num_frequencies = base_channels // 2
        self.mlp = nn.Sequential(nn.Linear(base_channels, embedding_dim), nn.SiLU(),
                                 nn.Linear(embedding_dim, embedding_dim))
        self.no_label = num_classes  # the last row of the table
        self.labels = nn.Embedding(num_classes + 1, embedding_dim) if num_classes else None

    def forward(self, t, y):
        fractions = torch.arange(self.num_frequencies, device=t.device) / (self.num_frequencies - 1)
        frequencies = torch.exp(-math.log(10000) * fractions)         # from 1 to 1 / 10000
        angle = t[:, None].float() * frequencies                      # (N, base_channels / 2)
        emb = self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))  # (N, embedding_dim)
        if self.labels is None:
            return emb
        if y is None:
            y = torch.full_like(t, -1)
        return emb + self.labels(torch.where(y < 0, self.no_label, y))

MAX_WORDS = 64  # of a caption; the rest is cut off

# What a TextEncoder makes of captions. tokens: (N, 1 + L, width); bias: (N, 1, 1 + L), added to
# attention scores, -inf at padding; pooled: (N, embedding_dim).
Text = namedtuple("Text", "tokens bias pooled")

class TextEncoder(nn.Module):
    """A small transformer over the words of captions, learned with the rest of the network. Each
    caption begins with a learned token; an empty caption is that token alone."""
    def __init__(self, vocabulary_size, width, embedding_dim):
        super().__init__()
        self.words = nn.Embedding(vocabulary_size + 1, width)  # row 0 begins each caption
        self.positions = nn.Parameter(0.02 * torch.randn(1 + MAX_WORDS, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0.0,
                                       batch_first=True, norm_first=True)
            for _ in range(2))
        self.norm = nn.LayerNorm(width)
        self.pool = nn.Linear(width, embedding_dim)

    def forward(self, y):
        numbers = F.pad(y + 1, (1, 0))                # (N, 1 + L), 0 at the start and at padding
        is_token = F.pad(y >= 0, (1, 0), value=True)  # (N, 1 + L), False at padding
        bias = torch.where(is_token, 0.0, -math.inf)
        h = self.words(numbers) + self.positions[: numbers.shape[1]]  # (N, 1 + L, width)
        for layer in self.layers:
            h = layer(h, src_key_padding_mask=bias)
        tokens = self.norm(h)
        weight = is_token / is_token.sum(1, keepdim=True)
        mean = (weight[:, None].to(tokens.dtype) @ tokens)[:, 0]      # (N, width)
        return Text(tokens, bias[:, None], self.pool(mean))

class Attention(nn.Module):
    """One-head self-attention over all pixels, and a skip connection. full: softmax(q k^T) v,
    where a Text, if any, adds keys and values (Nichol et al. 2022, section 4); linear: softmax(q)
    (softmax(k)^T v) (Shen et al. 2021, arXiv:1812.01243), without Text."""
    def __init__(self, channels, groups, kind="full", text_width=0):
        super().__init__()
        self.kind = kind
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))
        self.text_kv = nn.Linear(text_width, 2 * channels) if text_width else None

    def forward(self, x, text=None):
        n, c, h, w = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # (N, HW, C)
        q, k, v = self.qkv(tokens).chunk(3, dim=2)        # (N, HW, C) each
        bias = None
        if text:
            text_k, text_v = self.text_kv(text.tokens).chunk(2, dim=2)  # (N, 1 + L, C) each
            k = torch.cat([k, text_k], dim=1)
            v = torch.cat([v, text_v], dim=1)
            bias = F.pad(text.bias, (h * w, 0)).to(q.dtype)  # (N, 1, HW + 1 + L)
        if self.kind == "linear":
            context = k.softmax(1).transpose(1, 2) @ v  # over the pixels: (N, C, C)
            mixed = (q.softmax(2) * c**-0.5) @ context  # over the channels: (N, HW, C)
        else:
            mixed = softmax_attention(q, k, v, bias)    # (N, HW, C)
        return x + self.out(mixed).transpose(1, 2).reshape(n, c, h, w)

def softmax_attention(q, k, v, bias=None):
    """softmax(q k^T / sqrt(C) + bias) v of one head. q, result: (N, HW, C)."""
    if q.is_cuda:
        mask = None if bias is None else bias[:, None]
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)
        return out[:, 0]
    # The same; three times as fast on a CPU, forward and backward.
    scores = (q * q.shape[2] ** -0.5) @ k.transpose(1, 2)
    if bias is not None:
        scores = scores + bias
    return scores.softmax(2) @ v

class ResBlock(nn.Module):
    """Twice norm, SiLU, convolution, with the embedding added in between, and a skip connection."""
    def __init__(self, in_channels, out_channels, embedding_dim, groups, dropout=0.0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)  # eps as in the paper's code
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Linear(embedding_dim, out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.shortcut = nn.Identity()
        if in_channels != out_channels:
            self.shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))             # (N, out_channels, H, W)
        h = h + self.time(F.silu(emb))[:, :, None, None]
        h = self.conv2(self.dropout(F.silu(self.norm2(h))))
        return self.shortcut(x) + h

class ResAttention(nn.Module):
    """A residual block, followed by attention of this kind, unless it is "none"."""
    def __init__(self, in_channels, out_channels, embedding_dim, groups, dropout, kind, text_width):
        super().__init__()
        self.res = ResBlock(in_channels, out_channels, embedding_dim, groups, dropout)
        self.attention = None
        if kind != "none":
            self.attention = Attention(out_channels, groups, kind, text_width)

    def forward(self, x, emb, text):
        h = self.res(x, emb)
        return self.attention(h, text) if self.attention else h

class Downsample(nn.Module):
    """A 3x3 convolution of stride 2, padded to the right and below as in the paper's code."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))

class Upsample(nn.Module):
    """Nearest-neighbour upsampling by 2 and a 3x3 convolution, fused: 4/9 of the multiply-adds."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        # Equals self.conv(F.interpolate(x, scale_factor=2.0)). There each input pixel is a 2x2
        # square: summing the 3x3 kernel at the four places of the square gives a 4x4 kernel.
        kernel = self.conv.weight                                           # (C, C, 3, 3)
        kernel = F.pad(kernel, (0, 0, 0, 1)) + F.pad(kernel, (0, 0, 1, 0))  # (C, C, 4, 3)
        kernel = F.pad(kernel, (0, 1)) + F.pad(kernel, (1, 0))              # (C, C, 4, 4)
        # As conv_transpose2d lays it out; MPS misreads some views (pytorch#192212), hence the copy.
        transposed = kernel.flip(2, 3).transpose(0, 1).contiguous()
        return F.conv_transpose2d(x, transposed, self.conv.bias, stride=2, padding=1)

class UNet(nn.Module):
    """The network of Ho et al. 2020, appendix B, as diffusers' UNet2DModel. attention: "full",
    "linear" or "none", in attention_stages (0: of the largest maps); the middle has full attention
    with either. num_classes, vocabulary_size: 0 for none. patch: side of the squares that become
    channels (pixel unshuffle). Sides of images: multiples of patch * 2^(stages - 1)."""
    def __init__(self, image_channels=3, base_channels=128, channel_mults=(1, 2, 2, 2),
                 res_blocks=2, attention="full", attention_stages=(1,), dropout=0.0, num_classes=0,
                 patch=1, vocabulary_size=0):
        super().__init__()
        widths = [base_channels * mult for mult in channel_mults]
        kinds = [attention if i in attention_stages else "none" for i in range(len(widths))]
        groups = math.gcd(group_count(widths), base_channels)  # which the first block has
        embedding_dim = 4 * base_channels
        text_width = 2 * base_channels if vocabulary_size else 0

        def block(c_in, c_out, kind):
            return ResAttention(c_in, c_out, embedding_dim, groups, dropout, kind, text_width)

        self.patch = patch
        self.checkpointing = False  # activation checkpointing
        self.embed = TimeLabelEmbedding(base_channels, embedding_dim, num_classes)
        self.text = None
        if vocabulary_size:
            self.text = TextEncoder(vocabulary_size, text_width, embedding_dim)
        self.conv_in = nn.Conv2d(image_channels * patch**2, base_channels, 3, padding=1)
        self.down = nn.ModuleList()
        self.up = nn.ModuleList()  # filled below; here so that its parameters precede the middle's
        channels = base_channels   # of the feature map at this point of the network
        skip_channels = [channels]  # those of the maps that `forward` keeps as skips
        for i, width in enumerate(widths):
            if i > 0:
                self.down.append(Downsample(channels))
                skip_channels.append(channels)
            for _ in range(res_blocks):
                self.down.append(block(channels, width, kinds[i]))
                channels = width
                skip_channels.append(channels)
        self.middle = block(channels, channels, "none" if attention == "none" else "full")
        self.middle2 = ResBlock(channels, channels, embedding_dim, groups, dropout)
        for i, width in reversed(list(enumerate(widths))):
            for _ in range(res_blocks + 1):
                self.up.append(block(channels + skip_channels.pop(), width, kinds[i]))
                channels = width
            if i > 0:
                self.up.append(Upsample(channels))
        self.norm_out = nn.GroupNorm(groups, channels, eps=1e-6)
        self.conv_out = zero(nn.Conv2d(channels, image_channels * patch**2, 3, padding=1))
        init_weights(self)

    def forward(self, x, t, y=None):
        emb = self.embed(t, y)                              # (N, embedding_dim)
        text = None
        if self.text:
            words = torch.full_like(t, -1)[:, None] if y is None else y  # (N, L)
            text = self.text(words)
            emb = emb + text.pooled
        h = self.conv_in(F.pixel_unshuffle(x, self.patch))  # (N, base_channels, H / p, W / p)
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Downsample) else self.run_block(layer, h, emb, text)
            skips.append(h)
        h = self.run_block(self.middle, h, emb, text)
        h = self.middle2(h, emb)
        for layer in self.up:
            if isinstance(layer, Upsample):
                h = layer(h)
            else:
                h = self.run_block(layer, torch.cat([h, skips.pop()], dim=1), emb, text)
        h = self.conv_out(F.silu(self.norm_out(h)))
        return F.pixel_shuffle(h, self.patch)               # (N, C, H, W)

    def run_block(self, block, *inputs):
        if self.checkpointing and torch.is_grad_enabled():
            return recompute_in_backward(block, *inputs, use_reentrant=False)
        return block(*inputs)

def group_count(widths):
    """The number of GroupNorm groups: the most, up to 32, with four channels or more in each."""
    for groups in (32, 16, 8, 4, 2):
        if all(width % groups == 0 and width >= 4 * groups for width in widths):
            return groups
    return 1

def zero(layer):
    """The layer with weights and bias 0, so that its output is 0 at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    layer.starts_at_zero = True
    return layer

def init_weights(network):
    """Xavier, as in the paper's code, save for `zero` layers: PyTorch's default learns slower."""
    qkv_layers = {module.qkv for module in network.modules() if isinstance(module, Attention)}
    for layer in network.modules():
        if isinstance(layer, (nn.Conv2d, nn.Linear)) and not hasattr(layer, "starts_at_zero"):
            gain = 2**0.5 if layer in qkv_layers else 1  # as if q, k and v were three layers
            nn.init.xavier_uniform_(layer.weight, gain)
            nn.init.zeros_(layer.bias)

class ConvBlock(nn.Module):
    """A convolution of any kind, BatchNorm, the embedding added, SiLU."""
    def __init__(self, conv, embedding_dim):
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(conv.out_channels)
        self.time = nn.Linear(embedding_dim, conv.out_channels)

    def forward(self, x, emb):
        return F.silu(self.norm(self.conv(x)) + self.time(F.silu(emb))[:, :, None, None])

class Decoder(nn.Module):
    """From the deepest feature map up: upsample, concatenate the encoder's map, merge."""
    def __init__(self, widths, embedding_dim):
        super().__init__()
        pairs = list(pairwise(widths))[::-1]  # (outer, inner), from the deepest up
        self.up = nn.ModuleList(
            ConvBlock(nn.ConvTranspose2d(inner, outer, 4, 2, 1), embedding_dim)
            for outer, inner in pairs)
        self.merge = nn.ModuleList(
            ConvBlock(nn.Conv2d(2 * outer, outer, 3, 1, 1), embedding_dim)
            for outer, inner in pairs)

    def forward(self, maps, emb):
        h, *skips = reversed(maps)
        for up, merge, skip in zip(self.up, self.merge, skips):
            h = merge(torch.cat([up(h, emb), skip], dim=1), emb)
        return h

class SimpleUNet(nn.Module):
    """A plain U-Net with BatchNorm, strided and transposed convolutions. Sides: multiples of 16."""
    def __init__(self, image_channels=3, base_channels=32, num_classes=0):
        super().__init__()
        widths = [base_channels * 2**i for i in range(5)]  # 32 64 128 256 512
        embedding_dim = 4 * base_channels
        self.embed = TimeLabelEmbedding(base_channels, embedding_dim, num_classes)
        self.conv_in = nn.Conv2d(image_channels, base_channels, 3, padding=1)
        self.down = nn.ModuleList(
            ConvBlock(nn.Conv2d(outer, inner, 4, 2, 1), embedding_dim)
            for outer, inner in pairwise(widths))
        self.decoder = Decoder(widths, embedding_dim)
        self.conv_out = nn.Conv2d(base_channels, image_channels, 3, padding=1)

    def forward(self, x, t, y=None):
        emb = self.embed(t, y)
        maps = [self.conv_in(x)]
        for down in self.down:
            maps.append(down(maps[-1], emb))
        return self.conv_out(self.decoder(maps, emb))

class ResNetUNet(nn.Module):
    """ResNet-18 as encoder, time and attention after each stage. Sides: multiples of 32."""
    def __init__(self, image_channels=3, num_classes=0, pretrained=False):
        super().__init__()
        resnet = make_resnet18(image_channels, pretrained)
        widths = [32, 64, 64, 128, 256, 512]  # at 1, 1/2, 1/4, 1/8, 1/16 and 1/32 of the side
        self.embed = TimeLabelEmbedding(128, 256, num_classes)
        self.conv_in = nn.Conv2d(image_channels, 32, 3, padding=1)
        self.encoder = nn.ModuleList([
            nn.Sequential(resnet.conv1, resnet.bn1, resnet.relu),
            nn.Sequential(resnet.maxpool, resnet.layer1),
            resnet.layer2, resnet.layer3, resnet.layer4])
        self.time = nn.ModuleList(nn.Linear(256, width) for width in widths[1:])
        self.attention = nn.ModuleList(Attention(width, 32) for width in widths[1:])
        self.decoder = Decoder(widths, 256)
        self.conv_out = nn.Conv2d(32, image_channels, 3, padding=1)

    def forward(self, x, t, y=None):
        emb = self.embed(t, y)
        maps = [self.conv_in(x)]  # only for the decoder: the encoder begins at x
        h = x
        for stage, time_layer, attention in zip(self.encoder, self.time, self.attention):
            h = stage(h) + time_layer(F.silu(emb))[:, :, None, None]
            h = attention(h)
            maps.append(h)
        return self.conv_out(self.decoder(maps, emb))

def make_resnet18(image_channels, pretrained):
    """torchvision's ResNet-18, random or with ImageNet weights, for images of so many channels."""
    weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1 if pretrained else None
    try:
        resnet = torchvision.models.resnet18(weights=weights)
    except OSError as e:
        raise UserError(
            f"The ImageNet weights could not be downloaded ({e}). Put {weights.url} into "
            f"{torch.hub.get_dir()}/checkpoints, or leave out --pretrained.") from None
    if image_channels == 1:  # grey stands for three equal colours
        resnet.conv1.weight = nn.Parameter(resnet.conv1.weight.data.sum(1, keepdim=True))
    return resnet

def build_model(config, image_channels, class_names, vocabulary=(), examples=()):
    """The network of a Config for images of so many channels, and these classes or this vocabulary,
    [] for none. examples: captions that it is trained on."""
    num_classes = len(class_names)
    require(not vocabulary or (config.arch == "unet" and config.attention == "full"),
            "Captions need --arch unet --attention full: give these, or --no_captions.")
    if config.arch == "simple":
        model = SimpleUNet(image_channels, config.channels, num_classes)
    elif config.arch == "resnet18":
        model = ResNetUNet(image_channels, num_classes, config.pretrained)
    else:
        heights = stage_heights(config)
        attention_at = config.attention_at or heights[-2:]
        attention_stages = [i for i, height in enumerate(heights) if height in attention_at]
        model = UNet(image_channels, config.channels, config.channel_mults, config.res_blocks,
                     config.attention, attention_stages, config.dropout, num_classes, config.patch,
                     len(vocabulary))
        model.checkpointing = config.checkpointing
    model.image_channels = image_channels
    model.image_shape = (image_channels, *padded_sides(config.image_size))  # (C, H, W)
    model.class_names = list(class_names)
    model.vocabulary = list(vocabulary)
    model.examples = list(examples)
    return model

# --------------------------------------------------------------------------------------------- data

# Formats that Pillow lists but are no images, or that it needs another program to open.
NO_IMAGES = {"PDF", "EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5", "IPTC"}
ADVICE = {  # about files that are no images
    "unpack archives": ".zip .tar .gz .tgz .bz2 .xz .7z .rar",
    "convert arrays to images": ".npy .npz .mat .h5 .hdf5 .pkl .parquet .tfrecord .csv",
    "for .heic: pip install pillow-heif": ".heic .heif"}
SPLITS = {"train", "training", "val", "valid", "validation", "dev", "test", "testing"}
DECODER_VERSION = 7  # raised when `decode` gives other pixels, so that old caches are not used

# Images before decoding. labels: (N,) ints, -1 for none; captions: N strings, "" for none; key:
# changes whenever the images do; open(i): the PIL image; notes: sentences about what else there is.
ImageSource = namedtuple("ImageSource", "names labels class_names key open notes captions")

# What `decode_all` wrote. pixels: (N, C, H, W) uint8; unreadable: {row: error}; white: the value
# that became white in images of more than 8 bits, None without any; shape: the median of width /
# height, and how many images have it, to 5 %; notes: sentences about the pixels.
Decoded = namedtuple("Decoded", "pixels unreadable white shape notes")

def to_network(pixels):
    """uint8 pixels 0..255 -> float32 in [-1, 1], the range that the network sees. Any shape."""
    return pixels.float() / 127.5 - 1

def to_pixels(x):
    """float in [-1, 1], clipped to it -> uint8 pixels 0..255: the inverse of `to_network`."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def crop(images, image_size):
    """Images (..., H, W) without the border that `decode` gave those of 28 pixels."""
    return torchvision.transforms.functional.center_crop(images, image_sides(image_size))

def to_device(x, device):
    """The tensor on the device. Only CUDA need not wait (MPS spoils the data: pytorch#189690)."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")

def open_image(path):
    Image.MAX_IMAGE_PIXELS = 2**28  # twice this and more is refused as a decompression bomb
    return Image.open(path)

def has_more_bits(image):
    """Whether a PIL image holds integers of more than 8 bits, or floats."""
    return image.mode[0] in "IF"

def largest_value(image):
    values = np.asarray(image, dtype=np.float64)
    return values[np.isfinite(values)].max(initial=0)

# What can be white: 1, 2, 4 to 128 for floats, and the largest integers of 8, 9 and more bits.
WHITE_LEVELS = [2**k for k in range(8)] + [2**bits - 1 for bits in range(8, 129)]

def white_level(largest):
    """What is white where values go up to the largest: the first level that holds it."""
    return next(level for level in WHITE_LEVELS if level >= largest)

def to_8_bits(image, white):
    """A PIL image of more than 8 bits as one of 8, where white becomes 255."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    return Image.fromarray((values.clip(0, white) / white * 255).round().astype(np.uint8))

def decode(image, image_size, channels, white=None, resize="crop"):
    """The pixels of a PIL image, which is turned upright, as the network sees them: (channels, H,
    W) uint8. white: the value that becomes white if it has more than 8 bits; None: by its own."""
    height, width = image_sides(image_size)
    enough = 2 * max(height, width)
    image.draft(None, (enough, enough))  # a JPEG need not be decoded at full size
    image.load()  # fails if the pixels are damaged
    with contextlib.suppress(Exception):  # damaged EXIF raises anything
        ImageOps.exif_transpose(image, in_place=True)
    if has_more_bits(image):
        image = to_8_bits(image, white or white_level(largest_value(image)))
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if resize == "crop":
        image = ImageOps.fit(image, (width, height), Image.BICUBIC)
    elif resize == "pad":
        image = ImageOps.pad(image, (width, height), Image.BICUBIC, edge_colour(image))
    else:
        image = image.resize((width, height), Image.BICUBIC)
    pixels = np.asarray(image).reshape(height, width, channels).transpose(2, 0, 1)
    top = (padded(height) - height) // 2
    left = (padded(width) - width) // 2
    return np.pad(pixels, ((0, 0), (top, top), (left, left)), mode="edge")

def edge_colour(image):
    """The mean colour of a PIL image's first and last rows and columns."""
    pixels = np.asarray(image)  # (H, W) or (H, W, 3)
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    return tuple(np.atleast_1d(edges.mean(axis=0)).round().astype(int).tolist())

def load_image(path, image_size, channels, white=None, resize="crop"):
    """The image in a file, decoded as a network sees it: (1, channels, H, W) in [-1, 1]."""
    try:
        with open_image(path) as image:
            pixels = decode(image, image_size, channels, white, resize)
    except Exception as e:  # broken files make decoders raise anything
        raise UserError(
            f"{path} cannot be read ({type(e).__name__}: {e}). Give an image file.") from None
    return to_network(torch.tensor(pixels))[None]

@functools.cache
def image_suffixes():
    """The suffixes of images that the installed Pillow opens."""
    with contextlib.suppress(ImportError):  # a plugin for .heic and .heif
        import pillow_heif
        pillow_heif.register_heif_opener()
    Image.preinit()  # or opening would try rare formats before PNG and JPEG
    Image.init()
    kinds = Image.OPEN.keys() - NO_IMAGES
    registered = Image.registered_extensions()
    return {suffix for suffix, kind in registered.items() if kind in kinds} | {".mpo"}  # as JPEG

def list_images(root):
    """Below a folder: the image files, all others but hidden ones, and what cannot be read."""
    files = []
    others = []
    dead_links = []
    errors = []  # of folders that cannot be read
    visited = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=errors.append):
        real = os.path.realpath(folder)
        if real in visited:  # a link that leads round in a circle
            subfolders.clear()
            continue
        visited.add(real)
        subfolders[:] = sorted(name for name in subfolders if name[0] != ".")
        for name in sorted(name for name in names if name[0] != "."):
            path = Path(folder, name)
            if path.suffix.lower() in image_suffixes():
                files.append(path)
            elif os.path.exists(path):
                others.append(path)
            else:
                dead_links.append(f"{path} (a link to nowhere)")
    unread = [f"{error.filename} ({error.strerror})" for error in errors]
    return files, others, unread + dead_links

def advice_on(suffixes):
    """What to do with files of these suffixes, which are no images: a part of a sentence, or ""."""
    advice = [what for what, known in ADVICE.items() if suffixes & set(known.split())]
    return f" ({'; '.join(advice)})" if advice else ""

def list_suffixes(paths):
    """How many files there are of each suffix, and advice: a part of a sentence."""
    suffixes = Counter(path.suffix.lower() or "no suffix" for path in paths)
    listed = ", ".join(f"{suffix} {n}" for suffix, n in suffixes.most_common(8))
    return listed + advice_on(suffixes.keys())

def check_folder(root):
    """UserError unless --data_path is a folder."""
    suffix = root.suffix.lower()
    example = f", such as {root.parent}" if suffix in image_suffixes() else ""
    require(not root.is_file(), f"{root} is a file{advice_on({suffix})}: give --data_path a folder "
            f"of images{example}.")
    remedy = f"give --data_path an image folder, or one of {', '.join(DATASETS)}"
    if root.name == PRESETS["animals_text"]["data_path"]:
        remedy = ("make it with python animal_data/draw.py --captions --count 5000 "
                  f"--seed 1 --without unseen --out {root}")
    require(root.is_dir(), f"No folder {root}: {remedy}.")

def read_captions(files, others):
    """The captions of image files, {file: text}; notes; and the files of `others` without captions.
    They are in metadata.csv or metadata.jsonl in any folder, as in Hugging Face's image folders,
    or else in a .txt beside the image."""
    captions = {}
    notes = []
    used = set()
    for path in others:  # deeper ones come later and count more
        if path.name in ("metadata.csv", "metadata.jsonl"):
            captions |= read_metadata(path, notes)
            used.add(path)
    missing = sorted(captions.keys() - set(files))
    if missing:
        notes.append(f"warning: captions name {len(missing)} images that are not there, such as "
                     f"{missing[0]}")
    existing = set(others)
    for file in files:
        text_file = file.with_suffix(".txt")
        if file not in captions and text_file in existing:
            captions[file] = one_line(read_utf8(text_file))
            used.add(text_file)
    return captions, notes, [path for path in others if path not in used]

def read_metadata(path, notes):
    """The captions in a metadata.csv or metadata.jsonl, {file: text}; a note is added of files that
    it names twice. UserError for a bad line; its number does not count empty ones."""
    lines = io.StringIO(read_utf8(path), newline="")
    if path.suffix == ".csv":
        csv.field_size_limit(2**30)
        rows = csv.DictReader(lines)
        first_line = 2  # after that of names
    else:
        rows = map(json.loads, filter(str.strip, lines))
        first_line = 1
    captions = []
    try:
        for row in rows:
            file = path.parent / os.path.normpath(row["file_name"])
            captions.append((file, one_line(row["text"] or "")))
    except Exception as e:  # what is no JSON, no CSV, no string or not there raises anything
        number = first_line + len(captions)
        raise UserError(f"{path}, line {number}, is no caption ({type(e).__name__}: {e}): each "
                        "needs file_name and text. Fix it, or give --no_captions.") from None
    num_repeated = len(captions) - len(dict(captions))
    if num_repeated:
        notes.append(f"warning: {path} names {num_repeated} images again: the last caption counts")
    return dict(captions)

def one_line(text):
    return " ".join(text.split())

def read_utf8(path):
    """The text of a file. UserError if there is none."""
    try:
        return Path(path).read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"{path} cannot be read ({e}): give a text file in UTF-8.") from None

def split_words(text):
    """The words and punctuation marks of a caption, in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())

def encode(captions, vocabulary):
    """A list of each caption's word indices, all padded with -1 to one length. Words that are not
    in the vocabulary, and those after MAX_WORDS, are left out."""
    number = {word: i for i, word in enumerate(vocabulary)}
    rows = []
    for caption in captions:
        words = split_words(caption)[:MAX_WORDS]
        rows.append([number[word] for word in words if word in number])
    length = max([1, *map(len, rows)])
    return [row + [-1] * (length - len(row)) for row in rows]

def folder_source(root, with_captions=True):
    """The images below a folder, with captions or else classes, the first sub-folder of each."""
    check_folder(root)
    files, others, problems = list_images(root)
    unread = f" Cannot be read: {', '.join(problems[:8])}." if problems else ""
    require(files, f"No images in {root}: saw {len(others)} files ({list_suffixes(others)}); "
            f"accepted .png .jpg .webp and whatever else Pillow opens.{unread}")
    captions = {}
    notes = []
    if with_captions:
        captions, notes, others = read_captions(files, others)
    texts = [captions.get(file, "") for file in files]
    parts = [file.relative_to(root).parts for file in files]  # (sub-folders ..., name) of each
    names = ["/".join(p) for p in parts]
    class_names = [] if any(texts) else sorted({p[0] for p in parts if len(p) > 1})
    class_number = {name: i for i, name in enumerate(class_names)}
    labels = np.array([class_number.get(p[0], -1) for p in parts])  # -1: in no sub-folder
    stats = [file.stat() if file.is_file() else None for file in files]  # None: see `open_file`
    versions = [stat and (stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]
    key = [str(root.resolve()), *zip(names, versions)]
    notes += [f"warning: {problem} cannot be read, and is left out" for problem in problems]
    if others:
        notes.append(f"left out  {len(others)} other files: {list_suffixes(others)}")
    notes += notes_on_folders(root, parts)

    def open_file(i):
        require(stats[i], "a link to nowhere, or no file")  # opening a pipe blocks
        return open_image(files[i])

    return ImageSource(names, labels, class_names, key, open_file, notes, texts)

def notes_on_folders(root, parts):
    """A note if sub-folders may be no classes; UserError for splits. parts: of all paths."""
    tops = {p[0] for p in parts if len(p) > 1}
    training = [str(root / name) for name in tops if name.lower() in ("train", "training")]
    are_splits = training and len(tops) > 1 and {name.lower() for name in tops} <= SPLITS
    require(not are_splits, f"The sub-folders of {root}, {', '.join(sorted(tops))}, look like "
            "splits of one data set, not like classes: give --data_path "
            f"{' or '.join(training)}.")
    deeper = {p[1] for p in parts if len(p) > 2}
    if len(tops) != 1 or len(deeper) < 2:
        return []
    return [f"note: all sub-folders are in {root / min(tops)}: give --data_path that one if they "
            "are classes"]

def torchvision_source(name, root):
    """One of torchvision's data sets, downloaded if needed: its training images."""
    make = getattr(torchvision.datasets, DATASETS[name])
    options = [{}]
    if name == "flowers102":
        options = [dict(split=split) for split in ("train", "val", "test")]
    try:
        parts = [make(root, download=True, **option) for option in options]
    except ImportError as e:
        raise UserError(
            f"The data set {name} needs the package {e.name}: pip install {e.name}") from None
    except Exception as e:  # truncated files raise anything
        reason = str(e).partition("\n")[0] or repr(e)
        raise UserError(
            f"{name} could not be downloaded ({reason}). Put its files where torchvision looks for "
            f"them, in {Path(root).resolve()}, or give a folder.") from None
    data = torch.utils.data.ConcatDataset(parts)
    if name == "celeba":
        labels = np.full(len(data), -1)
        class_names = []
    elif name == "flowers102":
        labels = np.concatenate([part._labels for part in parts])
        class_names = [f"flower_{i + 1}" for i in range(102)]
    else:
        labels = np.asarray(parts[0].targets)
        class_names = [c.replace("/", "-") for c in parts[0].classes]
    names = [f"{name}/{i}" for i in range(len(data))]
    captions = [""] * len(data)
    return ImageSource(names, labels, class_names, [name], lambda i: data[i][0], [], captions)

def load_images(config, device="cpu"):
    """The images of a Config, decoded, as `Images`. UserError for none, or too many bad ones."""
    source, chosen, decoded = local_main_process_first(lambda: decoded_images(config))
    return Images(source, chosen, decoded, config, device)

def decoded_images(config):
    """The ImageSource of a Config, the numbers of the images chosen from it, and these decoded."""
    source = open_source(config)
    rng = np.random.default_rng(derive_seed(config.seed, Stream.SUBSET))
    chosen = np.sort(rng.permutation(len(source.names))[: config.max_images])
    return source, chosen, decode_cached(config, source, chosen)

def open_source(config):
    """The ImageSource of --data_path."""
    if config.data_path in DATASETS:
        if Path(config.data_path).is_dir():
            print(f"note: --data_path {config.data_path} is a known data set; for your folder of "
                  f"that name, give --data_path ./{config.data_path}")
        return torchvision_source(config.data_path, config.download_dir)
    folder = Path(config.data_path)
    if config.data_path == Config.data_path and not folder.exists():
        folder = HERE / folder  # the starter images, from wherever ddpm.py is called
    return folder_source(folder, config.captions and config.class_cond)

def cache_folder(config):
    return Path(config.download_dir, ".decoded")  # hidden, and so no class in a folder of images

def decode_cached(config, source, chosen):
    """What `read_cache` returns for the chosen images; decoded first if there is no cache yet."""
    subset_seed = config.seed if config.max_images else None
    options = [config.image_size, config.resize, config.max_images, subset_seed]
    origin = short_hash(json.dumps([source.key[0], options]))  # stays when the images change
    content = short_hash(json.dumps([DECODER_VERSION, source.key, chosen.tolist()]))
    cache = cache_folder(config) / f"{origin}-{content}.npy"
    decoded = read_cache(cache)
    if decoded is None:
        decode_all(source, chosen, config, cache)
        decoded = read_cache(cache)
        remove_old_caches(cache, origin)
    require(decoded, f"{cache} cannot be read back: give another --download_dir.")
    return decoded

def remove_old_caches(cache, origin):
    """Remove the caches of earlier states of the same folder, and what crashes left of them."""
    for old in cache.parent.glob(f"{origin}-*"):
        with contextlib.suppress(OSError):  # Windows does not remove what another run has mapped
            hours = (time.time() - old.stat().st_mtime) / 3600
            is_being_written = old.suffix == ".tmp" and hours < 24
            if old.stem != cache.stem and not is_being_written:
                old.unlink()

def read_cache(path):
    """What `decode_all` wrote, as `Decoded`; or None."""
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        about["unreadable"] = {int(row): error for row, error in about["unreadable"].items()}
        pixels = np.load(path, mmap_mode="c")  # writable, as torch.from_numpy wants it
        return Decoded(pixels, **about)
    except (OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None  # damaged, or gone

def look_at_all(source, chosen):
    """Which chosen images are in colour (N,), and one white for all those of more than 8 bits."""
    coloured = np.zeros(len(chosen), dtype=bool)
    largest = np.zeros(len(chosen))

    def look(row):
        with contextlib.closing(source.open(chosen[row])) as image:
            if has_more_bits(image):  # and so is grey
                largest[row] = largest_value(image)
            else:
                coloured[row] = image.mode not in ("1", "L", "LA", "La")

    for_each_row(look, range(len(chosen)), "opening")  # its errors come again in decoding
    return coloured, white_level(largest.max()) if largest.any() else None

def decode_all(source, chosen, config, path):
    """Decode the chosen images into a file of pixels, and one beside it with the rest of `Decoded`.
    Both get their names once whole: a crash or a second process cannot leave a wrong one."""
    coloured, white = look_at_all(source, chosen)
    channels = 3 if coloured.any() else 1
    shape = (len(chosen), channels, *padded_sides(config.image_size))
    contrast = np.full(len(chosen), 255)  # of each image, the largest difference of two pixels
    ratios = np.ones(len(chosen))         # its width / height

    def decode_row(row):
        with contextlib.closing(source.open(chosen[row])) as image:
            own_pixels = decode(image, config.image_size, channels, white, config.resize)
            ratios[row] = image.width / image.height  # after `decode` has turned it upright
        contrast[row] = np.ptp(own_pixels, axis=(1, 2)).max()  # by channel: 0 if all is red
        pixels[row] = own_pixels  # in the file opened below

    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{secrets.token_hex(4)}.tmp")
    try:
        pixels = new_pixel_file(partial, shape)
        errors = for_each_row(decode_row, range(len(chosen)), "decoding")
        pixels.flush()
        names = [source.names[i] for i in chosen]
        notes = notes_on_pixels(names, white, coloured, contrast)
        median = np.median(ratios)
        num_alike = int(np.sum(abs(ratios / median - 1) < 0.05))
        about = dict(unreadable=errors, white=white, shape=(median, num_alike), notes=notes)
        atomic_write(path.with_suffix(".json"), lambda f: f.write(json.dumps(about).encode()))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)

def new_pixel_file(path, shape):
    """A memory-mapped .npy file of uint8."""
    pixels = np.lib.format.open_memmap(path, "w+", np.uint8, shape)
    if hasattr(os, "posix_fallocate"):  # or a full disk would kill the process later
        with open(path, "r+b") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
    return pixels

def for_each_row(work, rows, description):
    """Call work(row) for every row, in threads. Returns {row: error message} of those that fail."""
    errors = {}
    pool = ThreadPoolExecutor(os.cpu_count())
    try:
        futures = [pool.submit(work, row) for row in rows]
        for row, future in zip(rows, tqdm(futures, description, leave=False, delay=2)):
            error = future.exception()  # broken files make decoders raise anything
            if error:
                errors[row] = f"{type(error).__name__}: {error}"
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, those that have not begun
    return errors

class Images:
    """Decoded images: row i is image chosen[i] of the source. pixels: (N, C, H, W) uint8, on the
    GPU if it has room. labels: int64, for networks. train, validation: rows. class_names: what the
    network learns, all_class_names or none. captions: N strings, "" for none. vocabulary: the words
    of those in training; examples: some of those. white: as in `Decoded`. notes: sentences about
    the images."""
    def __init__(self, source, chosen, decoded, config, device):
        names = [source.names[i] for i in chosen]
        report_unreadable(names, decoded.unreadable)
        self.num_found = len(source.names)
        self.num_unreadable = len(decoded.unreadable)
        self.white = decoded.white
        self.notes = source.notes + decoded.notes
        self.notes += notes_on_shape(decoded.shape, len(names), config)
        self.train, self.validation = split_rows(len(chosen), decoded.unreadable, config)
        self.all_class_names = source.class_names
        learn_classes = config.class_cond and len(source.class_names) > 1
        self.class_names = source.class_names if learn_classes else []
        self.labels = torch.from_numpy(source.labels[chosen].astype(np.int64))
        self.captions = [source.captions[i] for i in chosen]
        in_training = [self.captions[row] for row in self.train]
        words = {word for text in in_training for word in split_words(text)[:MAX_WORDS]}
        self.vocabulary = sorted(words)
        if self.vocabulary:
            self.labels = torch.tensor(encode(self.captions, self.vocabulary))
        different = list(dict.fromkeys(text[:300] for text in in_training if text))
        self.examples = evenly_spaced(different, 8)
        self.pixels = torch.from_numpy(decoded.pixels)
        if torch.device(device).type == "cuda":
            free_bytes, _ = torch.cuda.mem_get_info(device)
            if self.pixels.nbytes < free_bytes // 3:
                self.pixels = self.pixels.to(device)
        self.channels = self.pixels.shape[1]
        self.seed = config.seed
        self.hflip = config.hflip
        self.last_order = (None, None)  # (epoch, rows)
        self.fingerprint = f"{len(chosen)} images, {self.num_unreadable} unreadable"
        self.fingerprint += ", names " + short_hash("\n".join(names))
        if self.vocabulary:
            self.fingerprint += ", captions " + short_hash("\n".join(self.captions))

    def order(self, epoch):
        """The training rows in the order of this epoch: a permutation by the seed."""
        if self.last_order[0] != epoch:
            rng = np.random.default_rng(derive_seed(self.seed, Stream.ORDER, epoch))
            self.last_order = (epoch, rng.permutation(self.train))
        return self.last_order[1]

    def take(self, rows, device):
        """Images x0 (n, C, H, W) in [-1, 1] and labels of the given rows, on the device."""
        rows = torch.from_numpy(rows)
        pixels = self.pixels[to_device(rows, self.pixels.device)]
        return to_network(to_device(pixels, device)), to_device(self.labels[rows], device)

    def batch(self, step, batch_size, micro_batch=0, num_micro_batches=1, device="cpu"):
        """x0 and labels of one micro-batch of a step: a function of the arguments, the seed and,
        for flips, torch's generator. Epochs follow each other without a gap."""
        n = batch_size // num_micro_batches
        positions = step * batch_size + micro_batch * n + np.arange(n)  # since training started
        epochs, places = np.divmod(positions, len(self.train))  # which epoch, and where in it
        rows = np.array([self.order(epoch)[place] for epoch, place in zip(epochs, places)])
        x0, y = self.take(rows, device)
        if self.hflip:
            flip = to_device(torch.rand(n) < 0.5, device)
            x0 = torch.where(flip[:, None, None, None], x0.flip(3), x0)
        return x0, y

def report_unreadable(names, unreadable):
    """Print the images that could not be decoded, {row: error}; UserError from 5 % on."""
    if unreadable:
        print(f"{len(unreadable)} of {len(names)} images cannot be read:", file=sys.stderr)
        for row in list(unreadable)[:10]:
            print(f"  {names[row]!r}: {printable(unreadable[row])}", file=sys.stderr)
    require(len(unreadable) < 0.05 * len(names),
            "That is 5 % of the images or more: fix or remove them.")

def notes_on_pixels(names, white, coloured, contrast):
    """What became of the images with these names, as sentences. white, coloured: as `look_at_all`
    returns them; contrast: of each, the largest difference of two pixels."""
    notes = []
    if white:
        notes.append(f"scale     images of more than 8 bits: 0 is black, {white} white")
    is_rare = coloured.mean() < 0.1
    kinds = [("note", coloured & is_rare, "are in colour, and give three channels to all"),
             ("warning", contrast < 16, "show next to nothing: black, white or one colour")]
    for kind, which, what in kinds:
        if which.any():
            some = f"{which.sum()} of {len(names)} images, such as {names[which.argmax()]},"
            notes.append(f"{kind}: {some} {what}")
    return notes

def notes_on_shape(shape, num_images, config):
    """A sentence if nearly all images have one shape that cropping takes much from."""
    ratio, num_alike = shape
    if config.resize != "crop" or num_alike < 0.9 * num_images:
        return []

    def kept(image_size):  # the fraction of an image that cropping to this size keeps
        height, width = image_sides(image_size)
        return min(ratio, width / height) / max(ratio, width / height)

    now = config.image_size
    side = min(image_sides(now))  # the shorter side, which stays as it is
    same_shape = f"{round(side * max(1, ratio))}x{round(side * max(1, 1 / ratio))}"
    alternatives = nearest_sizes(override(config, image_size=same_shape))
    best = max([now, *alternatives], key=kept)
    if kept(best) - kept(now) <= 0.15:
        return []
    return [f"note: {num_alike} of {num_images} images are {ratio:.3g} times as wide as high, and "
            f"cropping to {size_text(now)} keeps {kept(now):.0%} of each: --image_size {best} "
            f"keeps {kept(best):.0%}, --resize pad all"]

def split_rows(n, unreadable, config):
    """The readable rows, --holdout of them for validation: (training, validation), sorted."""
    readable = np.setdiff1d(np.arange(n), list(unreadable))
    rng = np.random.default_rng(derive_seed(config.seed, Stream.HOLDOUT))
    shuffled = rng.permutation(readable)
    n_validation = round(config.holdout * len(readable))
    n_train = len(readable) - n_validation
    require(n_train and (n_validation or not config.holdout),
            f"--holdout {config.holdout:g} of {len(readable)} images leaves {n_train} for training "
            f"and {n_validation} for validation: both need one.")
    return np.sort(shuffled[n_validation:]), np.sort(shuffled[:n_validation])

# -------------------------------------------------------------------------------- optimiser and EMA

def make_optimizer(config, model, device):
    options = dict(lr=config.lr, weight_decay=config.weight_decay, fused=device.type != "mps")
    if config.optimizer == "muon":
        return Muon(model, **options)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    return kind(model.parameters(), **options)

class Muon(torch.optim.AdamW):
    """Muon (Jordan 2024) for all convolutions but the first and last, AdamW for the other weights.
    A kernel, as a matrix (shape[0], all else), is moved by its orthogonalised momentum, scaled to
    the size of Adam's updates (Liu et al. 2025, section 2.2): one learning rate serves both.
    Attention and embeddings gain too little to pay for its time on a CPU. torch.optim.Muon takes
    only matrices, no kernels."""
    def __init__(self, model, **options):
        super().__init__(model.parameters(), **options)
        self._step_supports_amp_scaling = False  # have GradScaler skip a step that is not finite
        self.convolutions = [
            weight for name, weight in model.named_parameters()
            if weight.ndim == 4 and not name.startswith(("conv_in.", "conv_out."))]

    @torch.no_grad()
    def step(self, closure=None):
        options = self.param_groups[0]
        for weight in self.convolutions:
            state = self.state[weight]
            if not state:
                state["step"] = torch.tensor(0.0)  # unused; loading asks for one in every state
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 0.05)
            update = weight.grad.lerp(state["momentum"], 0.95).flatten(1)  # Nesterov momentum
            size = 0.2 * max(update.shape) ** 0.5
            update = orthogonalize(update).view_as(weight)
            weight.mul_(1 - options["lr"] * options["weight_decay"])
            weight.sub_(update, alpha=options["lr"] * size)
            weight.grad = None  # AdamW leaves it alone
        super().step(closure)

def orthogonalize(matrix):
    """A matrix (m, n) with its singular values brought to about 1, by five Newton-Schulz steps
    (Jordan 2024): X <- P X with P = 3.4445 I - 4.7750 A + 2.0315 A A and A = X X^T. The loop only
    updates A and the product of all P, which are smaller than X, and X is multiplied once."""
    m, n = matrix.shape
    if m > n:
        return orthogonalize(matrix.T).T
    X = matrix / (matrix.norm() + 1e-7)
    A = X @ X.T                                               # (m, m)
    product = torch.eye(m, device=matrix.device)              # of all P so far
    for _ in range(5):
        P = torch.addmm(A, A, A, beta=-4.7750, alpha=2.0315)  # beta A + alpha A A
        P.diagonal().add_(3.4445)                             # + 3.4445 I
        product = P @ product
        A = P @ A @ P                                         # of the next X: (P X) (P X)^T
    return product @ X                                        # (m, n)

def learning_rate(config, step, progress):
    """A linear rise over warmup_steps; then constant, or half a cosine down to 0 at progress 1."""
    lr = config.lr * min(1, (step + 1) / (config.warmup_steps + 1))
    if config.lr_schedule == "cosine":
        lr *= 0.5 + 0.5 * math.cos(math.pi * progress)
    return lr

@torch.no_grad()
def update_ema(averages, tensors, updates, decay):
    """Move the EMA tensors towards the model's, in the same order. Integer buffers are copied."""
    if decay:  # low at first, as in TensorFlow's ExponentialMovingAverage; 0 is a plain copy
        decay = min(decay, (1 + updates) / (10 + updates))
    floats = [i for i, average in enumerate(averages) if average.is_floating_point()]
    torch._foreach_lerp_([averages[i] for i in floats], [tensors[i] for i in floats], 1 - decay)
    for average, tensor in zip(averages, tensors):
        if not average.is_floating_point():
            average.copy_(tensor)

# -------------------------------------------------------------------------------------- checkpoints

def atomic_write(path, write):
    """Call write(file) for a file that appears whole or not at all. Returns its absolute path."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except RuntimeError as e:
        if isinstance(e.__context__, OSError):  # as of a full disk, which torch.save hides
            raise e.__context__ from None
        raise
    finally:
        partial.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # make the new name durable too
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    return str(path)

def remove_partial_files(folder, name):
    """Remove what a crash left of `atomic_write`, for files whose names match a pattern."""
    for path in folder.glob(".*.tmp"):
        if re.fullmatch(rf"\.{name}\.[0-9a-f]+\.tmp", path.name):
            path.unlink()

def read_checkpoint(path):
    """The dictionary in a checkpoint, tensors on the CPU. UserError if it cannot be trusted."""
    require(Path(path).is_file(),
            f"No checkpoint {path}: give the path of a file that --mode train wrote.")
    try:
        with zipfile.ZipFile(Path(path)) as f:  # PyTorch does not compare its own checksums
            if f.testzip():
                raise zipfile.BadZipFile
        checkpoint = torch.load(Path(path), map_location="cpu", weights_only=True)
    except (PermissionError, MemoryError):  # of a file that may be good
        raise
    except Exception as e:  # bad bytes can raise anything
        raise UserError(f"{path} cannot be read safely: it is damaged, or no checkpoint "
                        f"of tensors and plain values ({type(e).__name__}). Use another "
                        "checkpoint.") from None
    needed = dict(format=int, config=dict, weights=dict, classes=list, channels=int)
    require(isinstance(checkpoint, dict) and has_types(checkpoint, needed),
            f"{path} is not a checkpoint of ddpm.py: format number, configuration or weights are "
            "missing. Give one that --mode train wrote.")
    require(checkpoint["format"] == FORMAT, f"{path} has format {checkpoint['format']}, and this "
            f"ddpm.py reads format {FORMAT}: use the version that wrote it.")
    # Older files lack these; 65535 was white in all images of more than 8 bits.
    checkpoint = dict(vocabulary=[], examples=[], white=65535) | checkpoint
    check_contents(checkpoint, path)
    if isinstance(checkpoint.get("data"), str):  # which older files word differently
        data = checkpoint["data"].replace(" pictures,", " images,")
        checkpoint["data"] = data.replace(" bad,", " unreadable,")
    return checkpoint

def check_contents(checkpoint, path):
    """UserError if there are other things in a checkpoint than `TrainState.save` writes."""
    other_things = f"{path} holds other things than ddpm.py writes: use another."
    weights = checkpoint["weights"]
    ema = checkpoint.get("ema", {})
    require(isinstance(ema, dict) and checkpoint["channels"] in (1, 3), other_things)
    require(has_types(checkpoint, dict(vocabulary=list, examples=list)), other_things)
    require(checkpoint["examples"] or not checkpoint["vocabulary"], other_things)
    tensors = [*weights.values(), *ema.values()]
    texts = [*weights, *ema, *checkpoint["config"], *checkpoint["classes"],
             *checkpoint["vocabulary"], *checkpoint["examples"]]
    require(all(type(v) is torch.Tensor and v.layout == torch.strided and v.device.type == "cpu"
                and not v.is_quantized for v in tensors), other_things)
    require(all(type(text) is str for text in texts), other_things)
    require(all_finite(weights, ema), f"{path} has weights that are not finite: use another.")

def has_types(values, types):
    """Whether a dictionary has a value of each of these types, {key: type}."""
    return all(isinstance(values.get(key), kind) for key, kind in types.items())

def all_finite(*state_dicts):
    return all(v.isfinite().all().item() for state in state_dicts for v in state.values())

def stored_config(checkpoint, path):
    """The Config in a checkpoint, with the defaults of settings that are newer than the file."""
    unknown = ", ".join(checkpoint["config"].keys() - FIELDS.keys())
    require(not unknown,
            f"{path} has settings that this ddpm.py does not know: {unknown}. Use a newer one.")
    never_used = {name: field.default for name, field in FIELDS.items()
                  if "once" in field.metadata["change_on"]}
    stored = {name: tuple(value) if isinstance(value, list) else value  # a list in metrics.jsonl
              for name, value in checkpoint["config"].items()
              if value != ""}  # older versions took empty ones for the default
    stored = dict(spacing="uniform", detail_weight=0.0) | stored  # older files lack these
    config = Config(**stored | never_used)
    try:
        check(config)
    except UserError as e:
        raise UserError(f"{path} has a configuration that cannot be ({e}) Use another.") from None
    return config

def merged_config(checkpoint, path, given, changes):
    """A checkpoint's Config with the settings `given`. UserError for a change not in `changes`."""
    config = stored_config(checkpoint, path)
    for name, value in given.items():
        if name not in changes:
            stored = getattr(config, name)
            require("once" not in FIELDS[name].metadata["change_on"],
                    f"--{name} is for --mode train: leave it out.")
            require(value == stored, f"--{name} {value} contradicts {path}, where it is {stored}: "
                    "leave it out or train anew.")
    return override(config, **given)

def sampling_config(checkpoint, path, given, changes=None):
    """A checkpoint's Config to sample with: settings as `given`, default device and samples_dir."""
    defaults = dict(samples_dir=Config.samples_dir, device=Config.device)
    if checkpoint["config"].get("precision") == "fp16":  # which not every machine has
        defaults["precision"] = Config.precision
    similar = dict(steps="sampling_steps", batch_size="sample_batch_size", preset="model_path")
    for name in given.keys() & similar:
        raise UserError(f"--{name} is for --mode train: leave it out, or give "
                        f"--{similar[name]}.")
    given = defaults | given | dict(model_path=str(path))
    return merged_config(checkpoint, path, given, changes or changeable("sample"))

def load_weights(model, state_dict, path):
    """Load weights strictly, whatever wrapper they were saved from."""
    plain = {name.removeprefix("module.").removeprefix("_orig_mod."): v
             for name, v in state_dict.items()}
    try:
        model.load_state_dict(plain)
    except RuntimeError as e:
        detail = str(e).splitlines()[1].strip()
        raise UserError(f"{path} does not fit its own network: {detail} Use another.") from None

def model_from_checkpoint(checkpoint, path, ema=True):
    """The network in a checkpoint, in eval mode on the CPU. ema: prefer the EMA weights, the only
    ones in a model made small. model.weights_kind: "EMA" or "plain"."""
    config = override(stored_config(checkpoint, path), pretrained=False)
    model = build_model(config, checkpoint["channels"], checkpoint["classes"],
                        checkpoint["vocabulary"], checkpoint["examples"])
    weights = checkpoint["ema"] if ema and "ema" in checkpoint else checkpoint["weights"]
    load_weights(model, weights, path)
    model.weights_kind = "EMA" if ema or "ema" not in checkpoint else "plain"
    if not ema and "ema" not in checkpoint:
        print(f"note: {path} has the EMA weights alone, which are sampled")
    model.white = checkpoint["white"]
    return model.eval().requires_grad_(False)

def load_model(path, device="cpu", ema=True):
    """What a checkpoint holds: (model in eval mode, diffusion, config); UserError if it is no good.
    ema: prefer the EMA weights. model.class_names, model.vocabulary: its classes, its words."""
    checkpoint = read_checkpoint(path)
    config = override(stored_config(checkpoint, path), model_path=str(path))  # perhaps renamed
    model = model_from_checkpoint(checkpoint, path, ema)
    return model.to(device), make_diffusion(config, device), config

def find_model(model_path):
    """The model to sample from: model_path, or by default the one that comes with ddpm.py."""
    shipped = HERE / "saved_models" / "animals.pt"
    if model_path == Config.model_path and not Path(model_path).exists() and shipped.exists():
        print(f"There is no {model_path} yet: using the model that comes with ddpm.py.")
        return str(shipped)
    return model_path

def model_digest(path):
    """A short hash that tells model files apart."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]

def step_folder(model_path):
    """The folder of a model's step checkpoints. UserError if the path is no file's."""
    path = Path(model_path)
    require(path.name and not path.is_dir(),
            f"--model_path {model_path} is a folder: give a file in it, as in {path / 'model.pt'}.")
    return path.with_name(path.name + "_steps")

def step_files(folder):
    """The step checkpoints in a folder, oldest first: names of eight digits sort by step."""
    return sorted(folder.glob(f"step_{8 * '[0-9]'}.pt"))

def resumable_folder(model_path):
    """The folder with a model's step checkpoints: `step_folder` or, if that has none, what the
    first version called it, without the model's suffix: lr0.1 and lr0.2 shared lr0_steps."""
    folder = step_folder(model_path)
    if step_files(folder):
        return folder
    return folder.with_name(Path(model_path).stem + "_steps")

def find_resume(resume, model_path):
    """What --resume means, (path, checkpoint): the one named, or the latest that can be read."""
    if resume != "latest":
        return resume, read_checkpoint(resume)
    folder = resumable_folder(model_path)
    for path in reversed(step_files(folder)):
        try:
            checkpoint = read_checkpoint(path)
        except UserError as e:
            print(printable(f"warning: {e} Trying the one before."), file=sys.stderr)
            continue
        written_for = Path(stored_config(checkpoint, path).model_path).name
        may_be_shared = folder != step_folder(model_path)  # see `resumable_folder`
        if not may_be_shared or written_for == Path(model_path).name:
            return str(path), checkpoint
    raise UserError(f"Nothing to resume in {step_folder(model_path)}: leave out --resume to "
                    "start a run, or give the --model_path of the run to resume.")

def set_aside(path):
    """Rename what an earlier run wrote, lest a new one overwrite it, and print its new name."""
    if path.is_file() or path.is_dir() and any(path.iterdir()):
        kept = free_path(path.with_name(f"{path.name}.previous"))
        path.rename(kept)
        print(f"kept      the earlier {path.name}, as {kept.name}")

def set_aside_model(model_path):
    """Set aside a model and its step checkpoints."""
    set_aside(Path(model_path))
    set_aside(step_folder(model_path))

RUN_FILES = ("metrics.jsonl", "loss_graph.png", "dataset_grid.png", "schedules.png",
             "forward_process.png", "*_epoch*.png", "tensorboard")

def set_aside_samples(folder):
    """Move what an earlier run wrote to --samples_dir, if any, into a folder in it."""
    if not (folder / "metrics.jsonl").exists():
        return
    kept = free_path(folder / "previous")
    kept.mkdir()
    for pattern in RUN_FILES:
        for path in folder.glob(pattern):
            path.rename(kept / path.name)
    print(f"kept      the earlier run's metrics and images, in {kept}")

def free_path(path):
    """The path, or the first of path2, path3 and so on that does not exist."""
    numbered = path
    n = 2
    while numbered.exists():
        numbered = path.with_name(f"{path.name}{n}")
        n += 1
    return numbered

def load_matching_weights(model, checkpoint, config):
    """Load the weights of --init_from that fit. Returns a line about them. UserError if few do."""
    path = config.init_from
    stored = stored_config(checkpoint, path)
    own = model.state_dict()
    given = checkpoint.get("ema", checkpoint["weights"])
    fitting = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    if checkpoint["classes"] != model.class_names:  # rows of the label table mean other classes
        fitting.pop("embed.labels.weight", None)
    if checkpoint["vocabulary"] != model.vocabulary:  # and those of the word table other words
        fitting.pop("text.words.weight", None)
    num_fitting = sum(weight.numel() for weight in fitting.values())
    fraction = num_fitting / sum(weight.numel() for weight in own.values())
    remedy = ", ".join(differences(stored, config, NETWORK)) or "another checkpoint"
    require(fraction > 0.25, f"Only {100 * fraction:.0f} % of the network's weights fit "
            f"{path}: use {remedy}.")
    other_meaning = ", ".join(differences(stored, config, DIFFUSION))
    if other_meaning:
        print(f"warning: {path} was trained with {other_meaning}: its weights mean something else "
              "here, and may be worse than none")
    model.load_state_dict(fitting, strict=False)
    new = [name for name in own if name not in fitting]
    return (f"start     from {path}: {len(fitting)} of {len(own)} tensors; new: "
            f"{', '.join(new[:6]) or 'none'}")

# The settings that weights depend on: for their shapes, and for what they compute.
NETWORK = ("arch", "channels", "channel_mults", "patch", "res_blocks", "attention", "attention_at")
DIFFUSION = ("predict", "timesteps", "schedule", "beta_start", "beta_end")

def differences(stored, config, names):
    """Those of the settings in which a stored Config differs from another, as its flags."""
    return [flag_text(name, getattr(stored, name)) for name in names
            if getattr(stored, name) != getattr(config, name)]

def flag_text(name, value):
    """A setting as it is given on the command line, as in --channel_mults 1 2."""
    if value in (None, ()):
        return f"the default --{name}"
    values = value if isinstance(value, tuple) else (value,)
    return f"--{name} {' '.join(map(str, values))}"

# ---------------------------------------------------------------------------- devices and processes

@dataclasses.dataclass
class Runtime:
    """Where and how a command computes."""
    device: torch.device
    precision: str  # fp32, bf16 or fp16
    rank: int
    world_size: int

    @property
    def is_main(self):
        return self.rank == 0  # it prints and writes

def start_runtime(config):
    """The Runtime of a command. From now on processes that torchrun started can communicate."""
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    rank = int(os.environ.get("RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        require(device.type != "mps", "Several processes cannot share --device mps: start one "
                "without torchrun, or give --device cpu.")
        # What is on the CPU goes by gloo even beside GPUs, and does not wait for them.
        has_nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
        backend = "cpu:gloo,cuda:nccl" if has_nccl else "gloo"
        two_hours = datetime.timedelta(hours=2)  # while one decodes
        try:
            dist.init_process_group(backend, timeout=two_hours)
        except ValueError as e:  # a variable of the environment is missing
            raise UserError(f"WORLD_SIZE is set, but this is no process of torchrun ({e}). Start "
                            "with torchrun, or unset WORLD_SIZE.") from None
    return Runtime(device, precision, rank, world_size)

def local_main_process_first(work):
    """work(), in one process of each machine before the others, which then find what it wrote."""
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first:
        result = work()
    if dist.is_initialized():
        dist.barrier()  # here the others wait
    if not is_first:
        result = work()
    return result

def leave_processes():
    if dist.is_initialized():
        dist.destroy_process_group()

def choose_device(name):
    """The torch.device for --device: auto is CUDA, else Apple's MPS, else the CPU."""
    available = dict(
        cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available(), cpu=True)
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    require(available[name], f"--device {name}: PyTorch sees none here. Give --device auto, or "
            "install another PyTorch.")
    if name != "cuda":
        return torch.device(name)
    index = int(os.environ.get("LOCAL_RANK", 0))
    count = torch.cuda.device_count()
    if count == 1 and "TORCHELASTIC_RUN_ID" not in os.environ:
        index = 0  # Slurm can show each process a GPU of its own
    require(index < count, f"Process {index} has no GPU: there are {count}. Give torchrun "
            "--nproc_per_node as many, or --device cpu.")
    torch.cuda.set_device(index)  # or every process would use the first one too
    torch.backends.cudnn.allow_tf32 = False  # or fp32 convolutions would round to ten bits
    return torch.device(name, index)

def choose_precision(name, device):
    """fp32, bf16 or fp16 for --precision: auto is bf16 where the hardware has it built in."""
    require(name != "fp16" or device.type == "cuda",
            f"--precision fp16 needs a CUDA GPU, not {device.type}: use bf16.")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    has_bf16 = device.type == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bf16" if has_bf16 else "fp32"

def describe_device(device):
    """What a device is called, with its memory or threads."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{device} ({gpu.name}, {gpu.total_memory / 2**30:.0f} GiB)"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, IndexError):  # only Linux has this file
        name = re.findall("model name\t: (.*)", Path("/proc/cpuinfo").read_text())[0]
    return f"{device.type} ({name}, {torch.get_num_threads()} threads)"

def peak_memory(device):
    """The most memory in use so far, in MB: the GPU's, else the process's; 0: unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    try:
        import resource
    except ImportError:  # Windows has none
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6)

def keep_memory():
    """Have glibc keep freed memory, not fault it in again each step: 5 to 30 % faster on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap

@contextlib.contextmanager
def stop_requests():
    """An object that notes SIGTERM and Ctrl-C; a second Ctrl-C is KeyboardInterrupt."""
    request = types.SimpleNamespace(signum=0)  # or the number of the signal

    def note(signum, frame):
        if request.signum and signum == signal.SIGINT:
            raise KeyboardInterrupt
        request.signum = signum

    previous = {}
    with contextlib.suppress(ValueError):  # only the main thread may handle signals
        for signum in (signal.SIGINT, signal.SIGTERM):
            previous[signum] = signal.signal(signum, note)
    try:
        yield request
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)

HEARTBEAT = 30  # seconds between the signs of life that a run gives

@contextlib.contextmanager
def run_locks(config, runtime):
    """While in this context, refuse all other runs that would write to the same places."""
    if config.dry_run or not runtime.is_main:
        yield
        return
    with (model_lock(Path(config.model_path)),
          lock(Path(config.samples_dir, ".run.lock"), "--samples_dir", config.samples_dir)):
        yield

def model_lock(model_path):
    """A context in which only this process writes the model."""
    return lock(model_path.with_name(f".{model_path.name}.lock"), "--model_path", model_path)

@contextlib.contextmanager
def lock(path, flag, place):
    """Hold a lock file while in this context. UserError if another run holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", errors="replace") as f:
        f.seek(0)
        host, _, process = f.read().partition(" ")
        require(not is_held(f, host), f"{flag} {place} is in use by another run, process {process} "
                f"on {host}: wait for its end, stop it, or give another {flag}.")
        f.truncate(0)
        f.write(f"{platform.node()} {os.getpid()}")
        f.flush()
        stop = threading.Event()
        threading.Thread(target=renew, args=(path, stop), daemon=True).start()
        try:
            yield
        finally:
            stop.set()
            f.truncate(0)
            with contextlib.suppress(OSError):  # Windows does not remove what is open
                path.unlink()

def is_held(file, host):
    """Lock this open file unless a living run, on the machine `host`, has it. Whether one has."""
    try:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        is_locked = True
    except BlockingIOError:  # another process of this machine has locked it
        return True
    except (ImportError, OSError):  # Windows has no fcntl, and some network drives no locks
        is_locked = False
    status = os.fstat(file.fileno())
    if status.st_nlink == 0:  # removed since it was opened: its run has just ended
        return True
    if host == "":  # the file is new
        return False
    if is_locked and host == platform.node():  # its process, ours to see, is gone
        return False
    # A lock of another machine may be invisible here, but its run renews the time of the file.
    with tempfile.TemporaryFile(dir=Path(file.name).parent) as new:  # for the disk's own clock
        age = os.fstat(new.fileno()).st_mtime - status.st_mtime
    return age < 4 * HEARTBEAT

def renew(path, stop):
    """Give a file the present time again and again, until the event `stop`."""
    while not stop.wait(HEARTBEAT):
        with contextlib.suppress(OSError):
            os.utime(path)

def agree(runtime, stop_signal, progress):
    """(stop_signal, progress) for all processes: any may ask to stop, and rank 0's clock counts."""
    if runtime.world_size == 1:
        return stop_signal, progress
    if not runtime.is_main:
        progress = 0.0  # so that the largest is that of rank 0
    largest = torch.tensor([stop_signal, progress], dtype=torch.float64)
    dist.all_reduce(largest, dist.ReduceOp.MAX)
    return int(largest[0]), largest[1].item()

# ----------------------------------------------------------------------------------------- training

class TrainState:
    """What changes during training. network: the model as training calls it, perhaps compiled."""
    def __init__(self, config, model, images, runtime):
        device = runtime.device
        self.config = config
        self.images = images
        self.precision = runtime.precision
        self.model = model.to(device)
        self.ema = copy.deepcopy(model).eval().requires_grad_(False)
        self.network = torch.compile(model) if config.compile else model
        if runtime.world_size > 1:
            device_ids = [device.index] if device.type == "cuda" else None
            self.network = nn.parallel.DistributedDataParallel(self.network, device_ids)
        self.optimizer = make_optimizer(config, model, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=runtime.precision == "fp16")
        self.ema_tensors = list(self.ema.state_dict().values())  # collecting them takes time
        self.model_tensors = list(model.state_dict().values())
        self.step = 0
        self.start_step = 0  # where this run was resumed
        self.total_steps = config.steps  # None with --minutes
        if config.epochs:
            self.total_steps = math.ceil(config.epochs * len(images.train) / config.batch_size)
        self.seconds_before = 0.0  # spent on this run before it was resumed
        self.started = time.monotonic()
        self.lr = 0.0  # of the last step, as is grad_norm
        self.grad_norm = None

    def seconds(self):
        return self.seconds_before + time.monotonic() - self.started

    def epochs(self):
        return self.step * self.config.batch_size / len(self.images.train)

    def epoch_name(self):
        """The epochs so far as text, with enough digits to tell steps apart, but at least two."""
        steps_per_epoch = len(self.images.train) / self.config.batch_size
        digits = max(2, 1 + math.ceil(math.log10(steps_per_epoch)))
        return f"{self.epochs():.{digits}f}".rstrip("0").rstrip(".")

    def progress(self):
        """The fraction of the planned steps, or of the time budget, that is over: 0 to 1."""
        if self.total_steps:
            return min(self.step / self.total_steps, 1.0)
        return min(self.seconds() / (60 * self.config.minutes), 1.0)

    def save(self):
        """Write the model and a step checkpoint, delete those beyond --keep_last. Returns paths."""
        model_state = dict(
            format=FORMAT, version=__version__, config=dataclasses.asdict(self.config),
            classes=self.model.class_names, channels=self.model.image_channels,
            white=self.images.white, data=self.images.fingerprint,
            held_out=self.images.validation.tolist(), step=self.step, seconds=self.seconds(),
            weights=dict(self.model.state_dict()), ema=dict(self.ema.state_dict()))
        if self.model.vocabulary:
            model_state |= dict(vocabulary=self.model.vocabulary, examples=self.model.examples)
        if not all_finite(model_state["weights"], model_state["ema"]):
            self.fail_non_finite("weights, not saved,", self.step)
        full_state = model_state | dict(
            optimizer=self.optimizer.state_dict(), scaler=self.scaler.state_dict())
        model_path = self.config.model_path
        step_path = step_folder(model_path) / f"step_{self.step:08d}.pt"
        written = [atomic_write(step_path, lambda f: torch.save(full_state, f)),
                   atomic_write(model_path, lambda f: torch.save(model_state, f))]
        resumed_from = Path(self.config.resume).resolve() if self.config.resume else None
        for old in step_files(step_path.parent)[: -self.config.keep_last]:  # the new one is on disk
            if old.resolve() != resumed_from:
                old.unlink(missing_ok=True)
        return written

    def load(self, checkpoint, path):
        """Continue from what `save` wrote. UserError for other data, network or optimiser."""
        require(checkpoint.get("data") == self.images.fingerprint, f"{path} was trained on other "
                f"data ({checkpoint.get('data')}; here {self.images.fingerprint}): restore the "
                "images, or start a new run with --init_from.")
        white = checkpoint["white"]
        require(white == self.images.white or self.images.white is None,
                f"{path} was trained on images in which {white} is white, and here it is "
                f"{self.images.white}: restore them, or start a new run with --init_from.")
        load_weights(self.model, checkpoint["weights"], path)
        load_weights(self.ema, checkpoint["ema"], path)
        try:
            for group in checkpoint["optimizer"]["param_groups"]:
                group["fused"] = self.optimizer.defaults["fused"]  # as it suits this device
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if checkpoint["scaler"] and self.scaler.is_enabled():  # fp16 then and now
                self.scaler.load_state_dict(checkpoint["scaler"])
        except Exception as e:  # they do not check what they are given
            raise UserError(
                f"{path} has no state of this optimiser ({printable(e)}): use another.") from None
        self.step = self.start_step = checkpoint["step"]
        self.seconds_before = checkpoint["seconds"]

    def fail_non_finite(self, what, step):
        remedy = "a lower --lr"
        if self.precision != "fp32":
            remedy = f"--precision fp32 or {remedy}"
        advice = f"No checkpoint yet: start again with {remedy}."
        files = step_files(step_folder(self.config.model_path))
        if files:
            advice = f"Resume the last good checkpoint with --resume {files[-1]} and {remedy}."
        message = f"Non-finite {what} at step {step} (lr {self.lr:.2g}, {self.precision}). {advice}"
        raise UserError(message)

class LossMeter:
    """The training loss since the last `read`, in all and by quarter of the timesteps; and whether
    the run has failed, as it does when `patience` steps in a row are not finite. All of it stays on
    the device until read, because each look at it would wait for the device."""
    def __init__(self, T, runtime):
        self.T = T
        self.world_size = runtime.world_size
        self.patience = 50 if runtime.precision == "fp16" else 1  # a scaler overflows at first
        self.sums = torch.zeros(2, 4, device=runtime.device)  # of losses, of images
        self.bad_in_a_row = torch.zeros((), dtype=torch.int64, device=runtime.device)
        self.failed_step = torch.full((), -1, device=runtime.device)  # -1: not failed
        self.since = time.monotonic()

    def add(self, losses, t):
        """Count the losses (n,) of images at timesteps t (n,)."""
        losses = losses.detach()
        counts = torch.ones_like(losses)
        self.sums.index_add_(1, t * 4 // self.T, torch.stack([losses, counts]))

    def end_step(self, step, loss, grad_norm):
        """Note whether the loss and the gradient of a step, scalar tensors, were finite."""
        is_finite = torch.isfinite(loss) & torch.isfinite(grad_norm)
        self.bad_in_a_row = torch.where(is_finite, 0, self.bad_in_a_row + 1)
        has_failed = (self.bad_in_a_row == self.patience) & (self.failed_step < 0)  # the first time
        self.failed_step = torch.where(has_failed, step, self.failed_step)

    def read(self):
        """Means over all processes as a dictionary, empty without images; starts anew."""
        if self.world_size > 1:
            dist.all_reduce(self.sums)
        losses, counts = self.sums.tolist()
        seconds = time.monotonic() - self.since
        self.sums.zero_()
        self.since = time.monotonic()
        if not sum(counts):
            return {}
        quarters = [loss / n if n else None for loss, n in zip(losses, counts)]
        return dict(loss=sum(losses) / sum(counts), loss_quarters=quarters,
                    images_per_s=float(f"{sum(counts) / seconds:.4g}"))

def train(config):
    """Train and write model, checkpoints and images. Returns the model's path. UserError for what
    the user can fix; SystemExit 130 or 143 after a clean stop by Ctrl-C or SIGTERM."""
    checkpoint = None
    if config.resume is not None:
        config, checkpoint = resumed_config(dataclasses.asdict(config))
    return train_run(config, checkpoint)

def resumed_config(given):
    """What --resume means, with the settings `given`: the Config and the checkpoint of the run."""
    model_path = given.get("model_path", Config.model_path)
    path, checkpoint = find_resume(given["resume"], model_path)
    needed = dict(ema=dict, optimizer=dict, scaler=dict, step=int, seconds=float)
    require(has_types(checkpoint, needed), f"{path} is a model to sample from, not all that is "
            f"needed to resume a run: to do so give --resume --model_path {path}, or start a new "
            f"run with --init_from {path}.")
    stored = stored_config(checkpoint, path)
    given = places_beside(path, stored) | given | dict(resume=str(path))
    return merged_config(checkpoint, path, given, changeable("resume")), checkpoint

def places_beside(path, stored):
    """Where a run writes, resumed from the step checkpoint at this path: its model_path and, if
    known, samples_dir. They are beside the checkpoint's folder, which may have been moved, copied
    or renamed since the run. stored: the Config in the checkpoint, with the old places."""
    folder = Path(path).parent
    if not folder.name.endswith("_steps"):  # no folder of step checkpoints
        return {}
    old_model = Path(stored.model_path)
    old_samples = Path(stored.samples_dir)
    new_model = folder.with_name(folder.name.removesuffix("_steps"))
    if new_model.name == old_model.stem:  # the first version called the folder of a.pt a_steps
        new_model = folder.with_name(old_model.name)
    places = dict(model_path=str(new_model))
    if old_samples.is_relative_to(old_model.parent):  # so they were moved with the model
        places["samples_dir"] = str(new_model.parent / old_samples.relative_to(old_model.parent))
    return places

def train_run(config, checkpoint=None):
    """Train from the start, or on from a step checkpoint. Returns the model's path."""
    check(config)
    runtime = start_runtime(config)
    check_run(config, runtime)
    with run_locks(config, runtime):
        initial = read_checkpoint(config.init_from) if config.init_from else None  # fails early
        images = load_images(config, runtime.device)
        keep_memory()  # not before: decoding large images takes much that is not needed again
        if not (images.class_names or images.vocabulary):
            config = override(config, guidance=1.0)  # there is nothing to guide by
        torch.manual_seed(config.seed)
        pretrained = config.pretrained and not checkpoint  # whose weights are loaded below
        model = build_model(override(config, pretrained=pretrained), images.channels,
                            images.class_names, images.vocabulary, images.examples)
        origin = load_matching_weights(model, initial, config) if initial else None
        state = TrainState(config, model, images, runtime)
        if checkpoint:
            state.load(checkpoint, config.resume)
            origin = f"resuming  {config.resume} at step {state.step}"
            if state.progress() >= 1:
                length = next(name for name in LENGTHS if getattr(config, name))
                origin += f": the run is finished. To train on, give a larger --{length}"
            checkpoint.clear()  # to free its memory
        diffusion = make_diffusion(config, runtime.device)
        print_banner(config, state, runtime, diffusion.abar_T, origin)
        previewer = Previewer(config, images, diffusion, runtime)  # fails now if --classes is wrong
        if config.dry_run:
            dry_run(config, state, diffusion, runtime)
            return None
        logger = open_run(config, state) if runtime.is_main else None
        stop_signal = train_loop(config, state, diffusion, runtime, previewer, logger)
        if logger:
            close_run(config, runtime, logger, stop_signal)
        leave_processes()
    if stop_signal:
        raise SystemExit(128 + stop_signal)
    return Path(config.model_path)

def check_run(config, runtime):
    """UserError if the run would train on its own output, or its batches do not split up."""
    step_folder(config.model_path)  # fails if the path is no file's
    lengths = [f"--{name}" for name in LENGTHS if getattr(config, name)]
    require(len(lengths) == 1, "Give one of --steps, --epochs and --minutes as the length of "
            f"training; here: {' and '.join(lengths) or 'none'}.")
    for name in ("individual", "gif", "init_image", "mask", "strength", "interpolate"):
        require(getattr(config, name) == FIELDS[name].default,
                f"--{name} is for --mode sample: leave it out.")
    samples_dir = Path(config.samples_dir).resolve()
    data_path = Path(config.data_path).resolve()
    require(config.data_path in DATASETS or not samples_dir.is_relative_to(data_path),
            f"--samples_dir {samples_dir} is inside --data_path {data_path}, and what is written "
            "there would be trained on too: choose another folder.")
    n = runtime.world_size * config.grad_accum
    require(config.batch_size % n == 0, f"--batch_size {config.batch_size} does not split into {n} "
            f"({runtime.world_size} processes, --grad_accum {config.grad_accum}): use a multiple "
            f"of {n}, or to resume another --grad_accum or number of processes.")
    if config.arch != "unet":  # BatchNorm needs two values
        num_pixels = math.prod(padded_sides(config.image_size)) // total_stride(config) ** 2
        require(num_pixels > 1 or config.batch_size > n, f"--batch_size {config.batch_size} "
                f"leaves --arch {config.arch} one pixel to normalise by: use {2 * n} or more, or a "
                "larger --image_size.")

def train_loop(config, state, diffusion, runtime, previewer, logger):
    """Train to the end or a stop request. Returns its signal, or 0. logger: None unless is_main."""
    meter = LossMeter(diffusion.T, runtime)
    forecast_due = True
    warm_since = 0.0  # when the first step ended, which starts up libraries, or compiles
    state.started = time.monotonic()  # --minutes counts from here
    with stop_requests() as stop, progress_bar(state, runtime) as bar:
        while True:
            # ------------------------------------------- agree whether to go on, log, save, preview
            stop_signal, progress = agree(runtime, stop.signum, state.progress())
            finished = progress >= 1
            stopped = stop_signal > 0 and not finished  # at the end there is nothing to stop
            is_new = state.step > state.start_step  # what it starts from is saved and shown already
            preview_due = finished or (is_new and state.step % config.sample_every == 0)
            save_due = preview_due or (is_new and (stopped or state.step % config.save_every == 0))
            if save_due or state.step % config.log_every == 0:
                failed_step = meter.failed_step.item()  # waits for the device
                if failed_step >= 0:
                    state.fail_non_finite("loss", failed_step)
                means = meter.read()
                if logger and means:
                    logger.log_training(state, means)
                    warm_steps = state.step - state.start_step - 1
                    if forecast_due and warm_steps > 0:
                        seconds = time.monotonic() - warm_since
                        print_forecast(state, warm_steps * config.batch_size / seconds)
                        forecast_due = False
                    bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            if save_due and logger:  # first: a preview can outlast the time from SIGTERM to SIGKILL
                logger.files += state.save()
            if preview_due and not stopped:
                before = time.monotonic()
                preview = previewer.make(state.ema)
                if logger:
                    logger.log_preview(state, preview)
                pause = time.monotonic() - before  # not spent on training
                meter.since += pause
                warm_since += pause
            if finished or stopped:
                return stop_signal if stopped else 0
            # -------------------------------------------------------------------- one training step
            state.lr = learning_rate(config, state.step, progress)
            train_step(config, state, diffusion, runtime, meter)
            if state.step == state.start_step + 1:
                warm_since = time.monotonic()
            bar.update(round(state.progress() * bar.total) - bar.n)  # in steps, or seconds

def train_step(config, state, diffusion, runtime, meter):
    """One step of the optimiser and the EMA. Returns the last micro-batch's x0 and losses."""
    for group in state.optimizer.param_groups:
        group["lr"] = state.lr
    num_micro_batches = runtime.world_size * config.grad_accum
    for i in range(config.grad_accum):
        # Everything random is a function of the seed, the step and the micro-batch.
        micro_batch = runtime.rank * config.grad_accum + i
        torch.manual_seed(derive_seed(config.seed, Stream.TRAINING, state.step, micro_batch))
        x0, y = state.images.batch(
            state.step, config.batch_size, micro_batch, num_micro_batches, runtime.device)
        hidden = torch.rand(len(y), device=runtime.device) < config.label_dropout
        if y.ndim == 2:
            hidden = hidden[:, None]  # all words of a caption
        y = torch.where(hidden, -1, y)
        t = torch.randint(config.timesteps, (len(x0),), device=runtime.device)
        eps = torch.randn_like(x0)
        skip_sync = runtime.world_size > 1 and i + 1 < config.grad_accum  # average gradients once
        with state.network.no_sync() if skip_sync else contextlib.nullcontext():
            with autocast(runtime.device, runtime.precision):
                losses = diffusion.loss(state.network, x0, t, eps, y)  # (n,)
            state.scaler.scale(losses.mean() / config.grad_accum).backward()
        meter.add(losses, t)
    state.scaler.unscale_(state.optimizer)
    max_norm = config.grad_clip or math.inf
    state.grad_norm = nn.utils.clip_grad_norm_(state.model.parameters(), max_norm)
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad(set_to_none=True)
    update_ema(state.ema_tensors, state.model_tensors, state.step, config.ema_decay)
    meter.end_step(state.step, losses.sum(), state.grad_norm)
    state.step += 1
    return x0, losses.detach()

def dry_run(config, state, diffusion, runtime):
    """Two training steps that write nothing, and what they took: the memory of the optimiser's
    state counts from the second on."""
    meter = LossMeter(diffusion.T, runtime)
    for _ in range(2):
        state.lr = learning_rate(config, state.step, state.progress())
        x0, losses = train_step(config, state, diffusion, runtime, meter)
    print(f"dry run   in and out {tuple(x0.shape)}, from {x0.min():.2f} to {x0.max():.2f}; loss "
          f"{losses.mean():.3f}; peak memory {peak_memory(runtime.device)} MB. No model written")
    leave_processes()

ENOUGH_FOR_PHOTOS = 300_000  # seen in training; ten kinds of clothes took 130,000

def print_banner(config, state, runtime, abar_T, origin):
    """Print what the run will do. origin: where its weights come from; None: random."""
    images = state.images
    n = len(images.train)
    parameters = sum(p.numel() for p in state.model.parameters())
    if state.total_steps:
        seen = state.total_steps * config.batch_size
        length = f"{state.total_steps} steps, {seen:,} images, {seen / n:.4g} epochs"
    else:
        length = f"{config.minutes:g} minutes"
    num_unused = images.num_found - len(images.pixels)
    unused = f", {num_unused} not used (--max_images)" if num_unused else ""
    print(f"data      {printable(config.data_path)}: {images.num_found} found, {n} for training, "
          f"{len(images.validation)} for validation, {images.num_unreadable} unreadable{unused}; "
          f"{size_text(config.image_size)}, {images.channels} channels\n"
          f"cache     {images.pixels.nbytes / 1e6:.3g} MB in {cache_folder(config).resolve()}\n"
          f"{describe_labels(images)}\n"
          f"network   {config.arch}, {parameters:,} parameters\n"
          f"device    {describe_device(runtime.device)}, {runtime.precision}, processes "
          f"{runtime.world_size}, torch {torch.__version__}\n"
          f"diffusion T {config.timesteps}, {config.schedule}, predicts {config.predict}, "
          f"{config.loss} loss, abar_T {abar_T:.2g}\n"
          f"plan      {length} in batches of {config.batch_size}; a checkpoint every "
          f"{config.save_every} steps, the last {config.keep_last} kept in "
          f"{step_folder(config.model_path).resolve()}")
    for note in images.notes:
        print(printable(note))
    if abar_T > 0.01:
        print("warning: abar_T is above 0.01: sampling starts from purer noise than the network "
              "is trained on. Leave out --beta_start and --beta_end (a recipe's own go with "
              "--schedule cosine), or expect wrong colours")
    if config.predict == "eps" and config.detail_weight:
        print("note: --predict eps learns better with --detail_weight 0")
    if n < config.batch_size:
        print(f"warning: {n} images for a batch of {config.batch_size}: they repeat in it")
    if n < 1000:
        print(f"note: {n} images will be memorised; from about 1,000 on a model generalises")
    if origin:
        print(origin)

def describe_labels(images):
    """The line of the banner about captions, or about classes and their images for training."""
    if images.vocabulary:
        n = sum(map(bool, images.captions))
        num_cut = sum(len(split_words(text)) > MAX_WORDS for text in images.captions)
        cut = f", {num_cut} cut at {MAX_WORDS} words" if num_cut else ""
        examples = "; ".join(map(printable, images.examples[::3]))
        return (f"captions  {n} of {len(images.captions)} images have one{cut}; "
                f"{len(images.vocabulary)} different words; such as: {examples}")
    counts = Counter(images.labels[images.train].tolist())
    names = map(printable, images.all_class_names)
    classes = [f"{name} {counts[label]}" for label, name in enumerate(names)]
    if len(classes) > 12:
        classes[12:] = [f"{len(classes) - 12} more"]
    listed = ", ".join(classes) or "none"
    if images.class_names:
        return f"classes   {listed}"
    not_learned = "; not learned" if classes else ""
    return f"classes   {listed}{not_learned}: --guidance and --label_dropout have no effect"

def print_forecast(state, images_per_s):
    """Print how long the run, or what is left of it on --resume, takes at the speed of its first
    steps, and whether that is enough."""
    config = state.config
    if state.total_steps:
        num_steps = state.total_steps - state.start_step
        minutes = num_steps * config.batch_size / images_per_s / 60
    else:
        minutes = config.minutes - state.seconds_before / 60
    num_images = 60 * minutes * images_per_s
    tqdm.write(f"speed     {images_per_s:.3g} images/s: {num_images:,.0f} images in "
               f"{minutes:.3g} minutes")
    may_be_photos = state.images.channels == 3 and len(state.images.train) >= 200
    from_scratch = not (config.init_from or config.resume)  # a resumed run has been told
    if may_be_photos and num_images < ENOUGH_FOR_PHOTOS and from_scratch:
        enough = math.ceil(ENOUGH_FOR_PHOTOS / images_per_s / 60)
        smaller = ", --image_size 32" if max(image_sides(config.image_size)) > 32 else ""
        tqdm.write(f"note: varied photos need about {ENOUGH_FOR_PHOTOS:,} images seen in training "
                   f"before shapes appear, not only textures. Try --minutes {enough}{smaller}, or "
                   "--init_from a model of photos, such as saved_models/clothes.pt")

def progress_bar(state, runtime):
    """A bar of the steps, or of the seconds of --minutes."""
    unit = "step" if state.total_steps else "s"
    total = state.total_steps or round(60 * state.config.minutes)
    interval = 0.1 if sys.stderr.isatty() else 10  # seconds; in a file every update stays
    return tqdm(total=total, initial=round(state.progress() * total), unit=unit, smoothing=0.05,
                mininterval=interval, dynamic_ncols=True, disable=not runtime.is_main)

def open_run(config, state):
    """Prepare the folders of a run and write the plots of its start. Returns its MetricsLogger."""
    start_logger(config)  # fails now, before anything is renamed
    model_path = Path(config.model_path)
    folder = step_folder(model_path)
    remove_partial_files(folder, r"step_\d+\.pt")
    remove_partial_files(folder.parent, re.escape(model_path.name))
    own_folder = resumable_folder(model_path).resolve()
    continues = config.resume and Path(config.resume).resolve().parent == own_folder
    if continues:
        for file in step_files(folder):
            if file.stem > f"step_{state.step:08d}":  # unreadable, or of another branch of the run
                set_aside(file)
    else:  # what is there is of another run
        set_aside_model(model_path)
    os.remove(atomic_write(folder / "probe", lambda f: None))  # fails now if it cannot be written
    logger = MetricsLogger(config, state.images.fingerprint, state.step if continues else 0)
    with optional("the plots of the start"):
        logger.files += write_start_plots(config, state.images)
    return logger

def close_run(config, runtime, logger, stop_signal):
    """Print how a run ended and what it wrote."""
    if stop_signal:
        print(f"Stopped by {signal.Signals(stop_signal).name} and saved. To continue: --mode train "
              f"--resume --model_path {shlex.quote(config.model_path)}")
    print(f"memory    at most {peak_memory(runtime.device)} MB were in use")
    print_files([file for file in logger.files if Path(file).exists()])  # old checkpoints are gone

# What the EMA weights can do at some step. rows: {"clean", "noisy", "pred": images}, at these
# timesteps; generated: samples; names: their classes or captions. Images: uint8 (n, C, H, W).
Preview = namedtuple("Preview", "timesteps rows generated names validation_loss")

class Previewer:
    """Makes previews of the same images, timesteps and noise each time, so that grids compare."""
    def __init__(self, config, images, diffusion, runtime):
        self.config = config
        self.diffusion = diffusion
        self.runtime = runtime
        self.labels, self.names = sample_conditions(config, images)
        generator = torch.Generator().manual_seed(derive_seed(config.seed, Stream.PREVIEW))
        self.examples = self.fixed_batch(images, evenly_spaced(images.train, 8), generator)
        rows = evenly_spaced(images.validation, 256)  # sorted by class, unlike the t of each
        rows = np.random.default_rng(derive_seed(config.seed, Stream.PREVIEW)).permutation(rows)
        self.validation = self.fixed_batch(images, rows, generator)

    def fixed_batch(self, images, rows, generator):
        """x0, evenly spaced t, eps and y of some rows, as `Diffusion.loss` takes them."""
        device = self.runtime.device
        x0, y = images.take(rows, device)
        middles = (torch.arange(len(rows)) + 0.5) / len(rows)
        t = (middles * self.config.timesteps).long()
        eps = torch.randn(x0.shape, generator=generator)
        return x0, t.to(device), eps.to(device), y

    def make(self, ema):
        """A Preview of the EMA weights."""
        x0, t, eps, y = self.examples
        xt = self.diffusion.q_sample(x0, t, eps)
        with torch.no_grad(), autocast(self.runtime.device, self.runtime.precision):
            predicted = self.diffusion.predict_x0(ema(xt, t, y).float(), xt, t)
            validation_loss = self.validation_loss(ema)
        generated = sample_images(
            ema, self.diffusion, self.config, self.labels, self.runtime.precision)
        rows = {name: crop(to_pixels(x).cpu(), self.config.image_size)
                for name, x in dict(clean=x0, noisy=xt, pred=predicted).items()}
        return Preview(t.tolist(), rows, generated, self.names, validation_loss)

    def validation_loss(self, ema):
        """The mean loss of the validation images, None without any."""
        if not len(self.validation[0]):
            return None
        batches = zip(*(tensor.split(64) for tensor in self.validation))
        losses = [self.diffusion.loss(ema, *batch) for batch in batches]
        return torch.cat(losses).mean().item()

def read_metrics(path):
    """The contents of a metrics.jsonl: (first line: configuration and versions, rows since)."""
    lines = []
    for line in Path(path).read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a line cut short, or damaged
            lines.append(json.loads(line))
    require(lines and isinstance(lines[0], dict) and isinstance(lines[0].get("config"), dict),
            f"{path} is not the metrics.jsonl of a run.")
    renamed = dict(pictures_per_s="images_per_s", held_out_loss="validation_loss")  # in older files
    rows = []
    for row in lines[1:]:
        if isinstance(row, dict) and type(row.get("step")) is int:  # a crash can leave anything
            rows.append({renamed.get(key, key): value for key, value in row.items()})
    return lines[0], rows

def rows_of_run(path, config):
    """The rows in a metrics.jsonl of the run that a Config resumes; None if it is of another."""
    with contextlib.suppress(UserError, OSError, KeyError, TypeError):  # damaged, or gone
        head, rows = read_metrics(path)
        if relative_model_path(head["config"]) == relative_model_path(vars(config)):
            return rows
    return None

def relative_model_path(settings):
    """A run's model_path relative to its samples_dir: the same after the run was moved."""
    with contextlib.suppress(ValueError):  # if they are on two drives of Windows
        return os.path.relpath(settings["model_path"], settings["samples_dir"])
    return settings["model_path"]

class MetricsLogger:
    """metrics.jsonl, the image grids of a run, and --logger. files: all that the run wrote."""
    def __init__(self, config, data, step):
        """step: from which the run resumes, or 0. What is there of another run is set aside."""
        self.config = config
        self.folder = Path(config.samples_dir)
        self.path = self.folder / "metrics.jsonl"
        earlier = rows_of_run(self.path, config) if step else None
        if earlier is None:
            set_aside_samples(self.folder)
            earlier = []
        self.rows = [row for row in earlier if row["step"] <= step]
        self.tracker = None  # TensorBoard's, which hides what was logged after this step
        if config.logger != "none":
            from torch.utils.tensorboard import SummaryWriter
            self.tracker = SummaryWriter(self.folder / "tensorboard", purge_step=step + 1)
        self.head = dict(
            config=dataclasses.asdict(config), data=data, version=__version__,
            torch=torch.__version__, torchvision=torchvision.__version__,
            python=platform.python_version())
        self.files = [self.write()]
        if self.tracker:
            self.files.append(str(self.folder.resolve() / "tensorboard"))

    def write(self):
        """Write metrics.jsonl as a whole. Returns its path."""
        text = "".join(json.dumps(row) + "\n" for row in [self.head, *self.rows])
        return atomic_write(self.path, lambda f: f.write(text.encode()))

    def log(self, state, **values):
        """Append a row, and log the numbers in it to the tracker."""
        row = dict(step=state.step, **values, seconds=round(state.seconds(), 1))
        self.rows.append(row)
        with optional("writing metrics.jsonl"):
            if self.path.exists():
                with open(self.path, "a") as f:
                    f.write(json.dumps(row) + "\n")
            else:  # somebody removed it
                self.write()
        numbers = {name: v for name, v in values.items() if isinstance(v, int | float)}
        quarters = enumerate(values.get("loss_quarters", ()), 1)
        numbers |= {f"loss/quarter_{q}": loss for q, loss in quarters if loss is not None}
        self.track(state.step, numbers, {})

    def log_training(self, state, means):
        """A row about training since the last one. means: of LossMeter.read."""
        device = next(state.model.parameters()).device
        grad_norm = state.grad_norm.item()
        if not math.isfinite(grad_norm):  # of a step that fp16 left out; JSON has no infinity
            grad_norm = None
        self.log(state, epoch=round(state.epochs(), 3), lr=state.lr,
                 grad_norm=grad_norm, memory_mb=peak_memory(device), **means)

    def log_preview(self, state, preview):
        """Write the grids of a Preview, its validation loss and the loss graph."""
        if preview.validation_loss is not None:
            self.log(state, validation_loss=preview.validation_loss)
        with optional("writing the grids"):
            grids = write_previews(preview, state.epoch_name(), state.model, self.folder)
            self.files += grids.values()
            tracked = {name: grids[name] for name in ("compared", "generated")}
            self.track(state.step, {}, tracked)
            self.files.append(plot_loss(self.rows, self.folder / "loss_graph.png"))

    def track(self, step, numbers, image_files):
        """Log numbers, {name: value}, and images, {name: path}, to --logger. A failure ends it."""
        if self.tracker is None:
            return
        try:
            for name, value in numbers.items():
                self.tracker.add_scalar(name, value, step)
            for name, path in image_files.items():
                pixels = np.asarray(Image.open(path).convert("RGB"))
                self.tracker.add_image(name, pixels, step, dataformats="HWC")
            self.tracker.flush()
        except Exception as e:
            self.tracker = None
            warn_of_failure(f"--logger {self.config.logger}", e)

def start_logger(config):
    """Make --logger ready, or UserError: wandb gets all that is written for TensorBoard."""
    if config.logger == "none":
        return
    Path(config.samples_dir).mkdir(parents=True, exist_ok=True)
    try:
        import torch.utils.tensorboard  # noqa: F401
        if config.logger == "wandb":
            import wandb
            wandb.init(project="ddpm", dir=config.samples_dir, config=vars(config),
                       sync_tensorboard=True)
    except ImportError as e:
        package = (e.name or config.logger).rpartition(".")[2]
        raise UserError(f"--logger {config.logger} needs the package {package}: "
                        f"pip install {package}") from None
    except Exception as e:  # of wandb
        raise UserError(
            f"--logger {config.logger} cannot start ({e}). Log in with: wandb login; or set "
            "WANDB_MODE=offline; or leave out --logger.") from None

# ----------------------------------------------------------------------------------------- sampling

def sample_conditions(config, model):
    """The labels of --num_samples images, as `generate` takes them, and the class or caption that
    each stands for, "" for none. model: or the Images that it is trained on."""
    if model.vocabulary:
        require(not config.classes, f"--classes {config.classes}: the model was trained on "
                "captions, not on classes; give --prompt.")
        names = read_prompts(config, model.vocabulary) or model.examples
        labels = encode(names, model.vocabulary)
    else:
        require(not config.prompt and not config.prompts,
                "--prompt: the model was trained without captions; leave it out, or give another "
                "--model_path, such as saved_models/animals_text.pt.")
        labels = class_labels(config.classes, model.class_names)
        names = [model.class_names[label] for label in labels] if model.class_names else [""]
    if config.interpolate is not None:  # all of them are of one kind
        labels = labels[:1]
    numbers = [i % len(labels) for i in range(config.num_samples)]  # in turn
    return [labels[i] for i in numbers], [names[i] for i in numbers]

def read_prompts(config, vocabulary):
    """The captions of --prompt and --prompts, each once; UserError for unknown words."""
    prompts = list(config.prompt)
    if config.prompts:
        lines = read_utf8(config.prompts).splitlines()
        prompts += [one_line(line) for line in lines if line.strip()]
        require(prompts, f"--prompts {config.prompts} is empty: write a caption a line.")
    check_words(prompts, vocabulary)
    prompts = list(dict.fromkeys(prompts))
    if len(prompts) > config.num_samples:
        print(f"note: the first {config.num_samples} of {len(prompts)} prompts are sampled; for "
              f"all, give --num_samples {len(prompts)}")
    return prompts

def check_words(prompts, vocabulary):
    """UserError for a word that is not in the vocabulary, with those that are most like it."""
    for word in split_words(" ".join(prompts)):
        if word not in vocabulary:
            nearest = difflib.get_close_matches(word, vocabulary, 3)
            longer = [word for word in vocabulary if len(word) > 2]
            nearest = nearest or evenly_spaced(longer or vocabulary, 20)
            raise UserError(f"--prompt: the model has never read {word!r}. Give other words, such "
                            f"as {', '.join(nearest)}, of the {len(vocabulary)} that it knows.")

def class_labels(classes, class_names):
    """The indices of the classes named, as in "lion,tiger", or of all; [-1] if there are none."""
    names = split_classes(classes, class_names) if classes else class_names
    known = "it was trained without classes"
    if class_names:
        known = f"its classes are {', '.join(class_names)}"
    for name in names:
        require(name in class_names,
                f"--classes {classes}: the model has no class {name!r}; {known}.")
    return [class_names.index(name) for name in names] or [-1]

def split_classes(text, class_names):
    """The names in a list of classes like "lion,tiger". Names of classes may have commas."""
    known = {name.strip(): name for name in class_names}
    names = []
    parts = text.split(",")
    while parts:
        n = len(parts)  # how many of them are the next name: as many as can be, at least one
        while n > 1 and ",".join(parts[:n]).strip() not in known:
            n -= 1
        name = ",".join(parts[:n]).strip()
        names.append(known.get(name, name))
        parts = parts[n:]
    return names

def reverse_timesteps(config):
    """The timesteps to sample at: from pure noise, or from the noise level of --strength."""
    strength = config.strength or 1
    noise_levels = max(1, round(strength * config.timesteps))
    steps = max(1, round(strength * config.sampling_steps))
    return spaced_timesteps(noise_levels, steps, config.spacing)

def generate(model, diffusion, config, indices, labels, precision="fp32", image=None, mask=None):
    """Sample the images number `indices` with these labels: class indices, -1 for none, or equally
    long lists of word indices, padded with -1. Yields (t, x, x0) after each step, x and x0
    (n, C, H, W) float32. An image does not depend on the others. To edit: image (1, C, H, W) in
    [-1, 1] to start from, kept where mask (1, 1, H, W) is 0."""
    require(config.guidance == 1 or model.class_names or model.vocabulary, f"--guidance "
            f"{config.guidance:g}: the model was trained without classes; leave it out.")
    device = next(model.parameters()).device
    if config.interpolate is None:
        noise = ImageNoise(config.seed, indices, model.image_shape, device)
    else:
        fraction = torch.tensor(indices, device=device) / max(config.num_samples - 1, 1)
        first = ImageNoise(config.seed, [0], model.image_shape, device)
        last = ImageNoise(config.interpolate, [0], model.image_shape, device)

        def noise():
            return slerp(first(), last(), fraction)

    y = torch.tensor(labels, device=device)
    denoise = make_denoiser(model, diffusion, y, config.guidance, precision=precision)
    ts = reverse_timesteps(config)
    x = noise()
    if image is not None:  # SDEdit: start part of the way (Meng et al. 2022, arXiv:2108.01073)
        x = diffusion.q_sample(image.to(device), torch.tensor(ts[:1], device=device), x)
    if mask is not None:
        denoise = inpaint(denoise, image.to(device), mask.to(device))
    yield from SAMPLERS[config.sampler](diffusion, denoise, x, ts, noise, config.eta)

def inpaint(denoise, image, mask):
    """A denoiser whose x0 is the image where the mask is 0, so that all steps agree with it."""
    return lambda x, t: mask * denoise(x, t) + (1 - mask) * image

def slerp(a, b, fraction):
    """Points (n, C, H, W) on the great circle from noise a to noise b, (1, C, H, W) each, at each
    fraction (n,) of the way; all have unit variance (Song et al. 2021, eq. 67)."""
    fraction = fraction.view(-1, 1, 1, 1)
    angle = F.cosine_similarity(a.flatten(), b.flatten(), 0).acos()
    return (((1 - fraction) * angle).sin() * a + (fraction * angle).sin() * b) / angle.sin()

def process_share(n):
    """The numbers of the images, of n in all, that this process samples."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    return range(math.ceil(n * rank / world_size), math.ceil(n * (rank + 1) / world_size))

def sample_batches(model, diffusion, config, labels, precision, indices, on_step=None, image=None,
                   mask=None):
    """Sample the images number `indices`; image i has labels[i]. Yields (numbers, images uint8
    (n, C, H, W) on the CPU) after each batch. on_step(start, t, x) is called after each step of the
    batch that starts with image number `start`. image, mask: as in `generate`."""
    for first in range(0, len(indices), config.sample_batch_size):
        batch = indices[first : first + config.sample_batch_size]
        batch_labels = [labels[i] for i in batch]
        steps = generate(model, diffusion, config, batch, batch_labels, precision, image, mask)
        for t, x, _ in steps:
            if on_step:
                on_step(batch[0], t, x)
        yield batch, crop(to_pixels(x), config.image_size).cpu()  # x of the last step

def sample_images(model, diffusion, config, labels, precision):
    """An image per label, uint8 (N, C, H, W) on the CPU of each process; they share the work."""
    mine = process_share(len(labels))
    batches = sample_batches(model, diffusion, config, labels, precision, mine)
    return gather_images([pixels for _, pixels in batches], config, model)

def gather_images(batches, config, model):
    """The batches of all processes, (n, C, H, W) uint8, as one, in each of them."""
    no_images = torch.empty(0, model.image_channels, *image_sides(config.image_size)).byte()
    pixels = torch.cat([no_images, *batches])
    if not dist.is_initialized():
        return pixels
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, pixels)
    return torch.cat(gathered)

def sample(config):
    """Sample from the model at config.model_path. Returns the images, uint8 (N, C, H, W)."""
    path = find_model(config.model_path)
    checkpoint = read_checkpoint(path)
    given = {name: getattr(config, name) for name in changeable("sample")}
    conditional = checkpoint["classes"] or checkpoint["vocabulary"]
    if config.guidance == preset(config.preset).guidance and not conditional:  # not asked for
        given["guidance"] = 1.0
    return sample_run(sampling_config(checkpoint, path, given), checkpoint)

MAX_SHOWN = 2500  # images in the grid of a sampling: nobody looks at more

def sample_run(config, checkpoint, max_kept=math.inf):
    """Sample from a checkpoint's model and write the images. Returns uint8 (N, C, H, W), the first
    max_kept of them: with --individual the others are in their files and take no memory."""
    check(config)
    runtime = start_runtime(config)
    keep_memory()
    model = model_from_checkpoint(checkpoint, config.model_path, config.ema).to(runtime.device)
    diffusion = make_diffusion(config, runtime.device)
    config, image, mask = load_edit(config, model)
    labels, names = sample_conditions(config, model)
    for folder in filter(None, (config.samples_dir, config.individual)):
        Path(folder).mkdir(parents=True, exist_ok=True)  # fails now if that cannot be
    digest = model_digest(config.model_path)
    ts = reverse_timesteps(config)
    num_steps = len(ts) - 1
    print(f"model     {config.model_path} ({digest}), {model.weights_kind} weights, "
          f"trained on {printable(config.data_path)}\n"
          f"sampling  {config.num_samples} images, {config.sampler}, {num_steps} steps, seed "
          f"{config.seed}, guidance {config.guidance:g}, on {describe_device(runtime.device)} in "
          f"{runtime.precision}")
    if config.num_samples > max_kept and not config.individual:
        print(f"note: the grid shows the first {max_kept}; for all, give --individual FOLDER")
    text = png_text(config, num_steps, model, digest)
    texts = [text | dict(prompt=name) if model.vocabulary else text for name in names]
    mine = process_share(config.num_samples)
    todo = images_to_sample(config, mine, texts)
    kept = {}  # {number of an image: its pixels}
    num_batches = math.ceil(len(todo) / config.sample_batch_size)
    with tqdm(total=num_batches * num_steps, unit="step", dynamic_ncols=True,
              disable=not runtime.is_main) as bar:
        frames = Frames(config, ts, bar)
        for indices, pixels in sample_batches(model, diffusion, config, labels, runtime.precision,
                                              todo, frames.on_step, image, mask):
            kept |= {i: single for i, single in zip(indices, pixels) if i < max_kept}
            if config.individual:
                for i, single in zip(indices, to_images(pixels)):
                    save_png(single, image_path(config, i), texts[i])
    for i in mine:
        if i < max_kept and i not in kept:  # sampled before a stop
            with Image.open(image_path(config, i)) as png:
                kept[i] = torchvision.transforms.functional.pil_to_tensor(png)
    pixels = gather_images([kept[i][None] for i in sorted(kept)], config, model)
    leave_processes()
    if runtime.is_main:
        files = write_samples(config, pixels, frames.shown, model, names, text)
        print_files([*list_individual(config), *files])
    return pixels

class Frames:
    """What a sampling shows of its steps: a progress bar and, of the first eight images, frames at
    up to 9 timesteps, or 60 for --gif. shown: (level, uint8 (n, C, H, W)), still on the device."""
    def __init__(self, config, ts, bar):
        self.bar = bar
        self.size = config.image_size
        chosen = evenly_spaced(list(pairwise(ts)), 60 if config.gif else 9)
        self.next_level = dict(chosen)  # {t: the level that the step from t reaches}
        self.shown = []

    def on_step(self, start, t, x):
        """Keep x if it is of the first batch, which starts with image 0, and t was chosen."""
        self.bar.update()
        if start == 0 and t in self.next_level:
            self.shown.append((self.next_level[t], crop(to_pixels(x[:8]), self.size)))

def image_path(config, i):
    """The file of --individual for image number i."""
    return Path(config.individual, f"{i:05d}.png")

def images_to_sample(config, mine, texts):
    """The numbers in `mine` but those whose files --individual has, of this sampling when it was
    stopped. The first batch is always sampled, to show its steps. texts: of each image's file."""
    depends_on_more = config.interpolate is not None or config.init_image is not None  # than texts
    if not config.individual or depends_on_more:
        return mine
    todo = [i for i in mine if i < config.sample_batch_size
            or not is_from(image_path(config, i), texts[i])]
    if len(todo) < len(mine):
        print(f"going on: {len(mine) - len(todo)} images are in {config.individual} already")
    return todo

def is_from(path, text):
    """Whether a PNG has these text entries, and no other of ours."""
    try:
        with Image.open(path) as image:
            ours = {key: value for key, value in image.info.items() if key.startswith("ddpm:")}
        return ours == prefixed(text)
    except (OSError, ValueError, SyntaxError):  # no file, no PNG, or a damaged one
        return False

def list_individual(config):
    """The files that --individual wrote. A note is printed of those of an earlier sampling."""
    if not config.individual:
        return []
    folder = Path(config.individual).resolve()
    stale = [path.name for path in sorted(folder.glob("*.png"))
             if path.stem.isdecimal() and int(path.stem) >= config.num_samples]
    if stale:
        print(f"note: {len(stale)} files of an earlier sampling are left in {config.individual}, "
              f"such as {stale[0]}")
    return [str(folder / image_path(config, i).name) for i in range(config.num_samples)]

def load_edit(config, model):
    """For --init_image and --mask: (config with a strength, image or None, mask or None)."""
    if not config.init_image:
        return config, None, None
    image = load_image(config.init_image, config.image_size, model.image_channels, model.white,
                       config.resize)
    mask = None
    if config.mask:
        mask = (load_image(config.mask, config.image_size, 1, resize=config.resize) > 0).float()
    strength = config.strength or (1.0 if config.mask else 0.5)
    return override(config, strength=strength), image, mask

def png_text(config, num_steps, model, digest):
    """What a PNG sampled by `model` says about itself, {key: value}."""
    text = dict(seed=config.seed, sampler=config.sampler, steps=num_steps, spacing=config.spacing,
                guidance=config.guidance, model=digest, weights=model.weights_kind,
                version=__version__, torch=torch.__version__)
    if config.sampler == "ddim":
        text["eta"] = config.eta
    if model.class_names:
        text["classes"] = config.classes or "all"
    for name in ("init_image", "strength", "mask", "interpolate"):
        if getattr(config, name) is not None:
            text[name] = Path(str(getattr(config, name))).name
    return text

def write_samples(config, pixels, frames, model, names, text):
    """Write samples (N, C, H, W) uint8 of these classes or captions, and frames. Returns paths."""
    folder = Path(config.samples_dir)
    if model.vocabulary:
        text = text | dict(prompt=" | ".join(dict.fromkeys(names)))
    files = []
    if config.interpolate is None:
        path = folder / "generated_sample.png"
        files.append(save_samples(pixels[:MAX_SHOWN], names, model, path, text))
    else:
        files.append(save_grid(pixels, folder / "interpolation.png", len(pixels), text))
        files.append(save_gif(there_and_back(pixels), folder / "interpolation.gif"))
    if config.gif:
        files.append(save_gif([images for _, images in frames], folder / "denoising.gif"))
    with optional("plotting denoising_steps.png"):
        files.append(plot_trajectory(frames, names, folder / "denoising_steps.png", text))
    return files

# ---------------------------------------------------------------------------------- grids and plots

def grid_columns(n, class_names):
    """Columns for n images: one or more a class if that fits, else about square."""
    side = math.ceil(math.sqrt(n))
    if 2 <= len(class_names) <= min(n, 12):
        return max(1, side // len(class_names)) * len(class_names)
    return side

def to_images(pixels):
    """(N, C, H, W) uint8 -> PIL images, grey or in colour."""
    arrays = pixels.cpu().numpy()
    return [Image.fromarray(a[0] if len(a) == 1 else a.transpose(1, 2, 0)) for a in arrays]

def prefixed(text):
    """Text entries of a PNG, {key: value}, as they are called in the file."""
    return {f"ddpm:{key}": printable(value) for key, value in (text or {}).items()}

def save_png(image, path, text=None):
    """Write a PIL image, with text entries in the file. Returns the absolute path."""
    info = PngImagePlugin.PngInfo()
    for key, value in prefixed(text).items():
        info.add_text(key, value)
    return atomic_write(path, lambda f: image.save(f, "PNG", pnginfo=info))

def magnified(pixels):
    """Images (N, C, H, W), small ones enlarged by an integer factor to about 64 pixels."""
    zoom = max(1, 64 // max(pixels.shape[2:]))
    return pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)

def save_grid(pixels, path, columns, text=None):
    """Write images (N, C, H, W) uint8 as one PNG, small ones magnified. Returns the path."""
    grid = torchvision.utils.make_grid(magnified(pixels), columns, pad_value=255)
    return save_png(to_images(grid[None])[0], path, text)

def save_samples(pixels, names, model, path, text=None):
    """Write samples (N, C, H, W) uint8 as one PNG: in columns by class, or in rows with the caption
    beside them. names: of the classes or captions, in turn. Returns the path."""
    rows = list(dict.fromkeys(names))
    if not model.vocabulary or len(rows) > 50:
        return save_grid(pixels, path, grid_columns(len(pixels), rows), text)
    pixels = magnified(pixels)
    height, width = (side + 2 for side in pixels.shape[2:])  # with a gap
    columns = math.ceil(len(pixels) / len(rows))
    page = Image.new("RGB", (200 + columns * width, len(rows) * height), "white")
    for i, image in enumerate(to_images(pixels)):
        column, row = divmod(i, len(rows))
        page.paste(image, (200 + column * width, row * height))
    draw = ImageDraw.Draw(page)
    for i, name in enumerate(rows):
        max_lines = max(1, (height - 2) // 13)
        lines = textwrap.wrap(printable(name), 30, max_lines=max_lines, placeholder=" …")
        draw.text((4, i * height + 4), "\n".join(lines), "black", ImageFont.load_default(12))
    return save_png(page, path, text)

def save_gif(frames, path):
    """Write up to 60 of the frames, (n, C, H, W) uint8 each, as an animation. Returns the path."""
    chosen = evenly_spaced(frames, 60)
    rows = [torchvision.utils.make_grid(frame, len(frame), pad_value=255) for frame in chosen]
    first, *others = to_images(torch.stack(rows))
    milliseconds = [80] * len(others) + [2000]  # it rests on the last frame
    return atomic_write(path, lambda f: first.save(
        f, "GIF", save_all=True, append_images=others, duration=milliseconds, loop=0))

def there_and_back(pixels):
    """The frames of an animation through images (N, C, H, W) that ends where it began."""
    return [*pixels[:, None], *pixels[1:-1, None].flip(0)]

COLOURS = ("#1b6ca8", "#e07b39", "#3c8d5a", "#9b4f96", "#8a7a1f")

def new_figure(width, height):
    """An empty figure, width x height inches; pyplot, not used, would look for a window system."""
    from matplotlib.figure import Figure  # takes a second to import, and --help needs no plots
    return Figure(figsize=(width, height), layout="constrained")

def save_figure(figure, path, text=None):
    return atomic_write(
        path, lambda f: figure.savefig(f, format="png", dpi=110, metadata=prefixed(text)))

def plot_pair(titles, xlabel):
    """Two plots side by side in the style of all our plots: (figure, axes)."""
    figure = new_figure(9.2, 3.4)
    axes = figure.subplots(1, 2)
    for ax, title in zip(axes, titles):
        ax.set_title(title, fontsize=11)
        ax.set_xlabel(xlabel)
        ax.spines[["top", "right"]].set_visible(False)
        ax.grid(alpha=0.25)
    return figure, axes

def plot_rows(rows, titles, path, text=None):
    """Rows of images, {name: (columns, C, H, W) uint8}, with a title per column."""
    height, width = next(iter(rows.values())).shape[2:]
    cell_width = 0.95 * min(max(width / height, 1), 4)  # inches
    cell_height = 0.95 * min(max(height / width, 1), 4)
    figure = new_figure(cell_width * len(titles), cell_height * len(rows) + 0.3)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for row_axes, (name, row) in zip(axes, rows.items()):
        for ax, image in zip(row_axes, to_images(row)):
            ax.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
        row_axes[0].set_ylabel(name, fontsize=10)
    for ax, title in zip(axes[0], titles):
        ax.set_title(title, fontsize=10, pad=3)
    return save_figure(figure, path, text)

def plot_schedules(config, path):
    """abar_t and the log signal-to-noise ratio of every schedule, the chosen one thick."""
    titles = [r"remaining signal, $\bar\alpha_t$", "log signal-to-noise ratio"]
    figure, (left, right) = plot_pair(titles, "timestep t")
    for kind, colour in zip(FIELDS["schedule"].metadata["choices"], COLOURS, strict=True):
        betas = make_betas(kind, config.timesteps)
        style = dict(color=colour, lw=1.2, label=kind)
        if kind == config.schedule:
            betas = make_betas(kind, config.timesteps, config.beta_start, config.beta_end)
            style = dict(color=colour, lw=3, label=f"{kind}, chosen")
        abar = torch.cumprod(1 - betas, 0)
        left.plot(abar, **style)
        right.plot((abar / (1 - abar)).log(), **style)
    right.set_ylim(-14, 11)
    left.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)

def plot_forward_process(x0, config, path):
    """One image (1, C, H, W), clean and noised at six timesteps: 100, 300, ..., 999 of 1000."""
    T = config.timesteps
    ts = [T * tenths // 10 for tenths in (1, 3, 5, 7, 9)] + [T - 1]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(config.seed))
    noised = make_diffusion(config).q_sample(x0, torch.tensor(ts), eps)
    row = crop(to_pixels(torch.cat([x0, noised])), config.image_size)
    return plot_rows({"": row}, ["clean"] + [f"t = {t}" for t in ts], path)

def plot_trajectory(frames, names, path, text=None):
    """The reverse process of five images. frames: (noise level t, or -1; uint8 (n, C, H, W))."""
    chosen = evenly_spaced(frames, 9)
    titles = [f"t = {t}" if t >= 0 else "result" for t, _ in chosen]
    trajectories = torch.stack([images[:5] for _, images in chosen], dim=1)  # (n, steps, C, H, W)
    numbered = enumerate(zip(names, trajectories), 1)
    rows = {f"{axis_label(name)} {i}": row for i, (name, row) in numbered}
    return plot_rows(rows, titles, path, text)

def axis_label(name):
    """A name as it can stand beside a row of images: short, and "" if the font lacks a letter."""
    from matplotlib.font_manager import findfont, get_font  # not at the top: see `new_figure`
    name = printable(name)
    if len(name) > 10:
        name = name[:9] + "…"
    font = get_font(findfont("DejaVu Sans"))
    drawable = all(font.get_char_index(ord(letter)) for letter in name)
    return name.replace("$", r"\$") if drawable else ""  # $ begins a formula

def smooth(values):
    """The mean of each value and up to len / 40 neighbours on either side, fewer at the ends."""
    values = np.asarray(values)
    widths = [min(i, len(values) // 40) for i in range(len(values))]
    return [np.mean(values[i - width : i + width + 1]) for i, width in enumerate(widths)]

QUARTERS = ("t < T/4: detail", "T/4 to T/2", "T/2 to 3T/4", "t > 3T/4: composition")

def plot_loss(rows, path):
    """The loss, of validation too, and by quarter of the timesteps. rows: of metrics.jsonl."""
    from matplotlib.ticker import LogLocator  # not at the top, for the reason in `new_figure`
    figure, (left, right) = plot_pair(["loss", "loss by quarter of the timesteps"], "step")
    training = [row for row in rows if "loss" in row]
    steps = [row["step"] for row in training]
    losses = [row["loss"] for row in training]
    left.plot(steps, losses, color=COLOURS[0], alpha=0.25, lw=1)
    left.plot(steps, smooth(losses), color=COLOURS[0], lw=2, label="training, smoothed")
    validation = [(r["step"], r["validation_loss"]) for r in rows if "validation_loss" in r]
    if validation:
        left.plot(*zip(*validation), "o-", color=COLOURS[1], ms=4, label="validation (EMA weights)")
    for q, name in enumerate(QUARTERS):
        measured = [row for row in training if row["loss_quarters"][q] is not None]
        steps = [row["step"] for row in measured]
        losses = [row["loss_quarters"][q] for row in measured]
        right.plot(steps, smooth(losses), color=COLOURS[q], lw=1.8, label=name)
    for ax in (left, right):
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.minorticks_off()  # their labels would touch
        ax.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
    return save_figure(figure, path)

def write_start_plots(config, images):
    """Write what training starts from: images, the schedules, one image noised. Returns paths."""
    folder = Path(config.samples_dir)
    x0, _ = images.take(evenly_spaced(images.train, 64), "cpu")
    pixels = crop(to_pixels(x0), config.image_size)
    return [save_grid(pixels, folder / "dataset_grid.png", grid_columns(len(pixels), [])),
            plot_schedules(config, folder / "schedules.png"),
            plot_forward_process(x0[:1], config, folder / "forward_process.png")]

def write_previews(preview, epoch_name, model, folder):
    """Write the grids of a Preview. Returns {name: path}."""
    ending = f"_epoch{epoch_name}.png"  # as in _epoch0.64.png
    grids = {name: save_grid(pixels, folder / f"{name}{ending}", len(pixels))
             for name, pixels in preview.rows.items()}
    path = folder / f"generated{ending}"
    grids["generated"] = save_samples(preview.generated, preview.names, model, path)
    titles = [f"t = {t}" for t in preview.timesteps]
    grids["compared"] = plot_rows(preview.rows, titles, folder / f"compared{ending}")
    return grids

def print_files(files):
    """Print where everything is; of very many files, the first and the folders."""
    files = list(dict.fromkeys(files))  # each once
    print("Wrote:", *files[:40], sep="\n  ")
    if len(files) > 40:
        folders = sorted({str(Path(file).parent) for file in files})
        print(f"  and {len(files) - 40} more in {', '.join(folders)}")

# ------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """Print one line, with the flag that an unknown one may stand for, and exit with code 2."""
        for word in re.findall(r"unrecognized arguments: (--\w+)", message):
            for flag_meant in difflib.get_close_matches(word, self._option_string_actions, 1):
                message += f" (did you mean {flag_meant}?)"
        print(f"error: {message}; see python {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def parse(self, argv):
        """What a command line gives, {name: value}. Flags may be written with - for _."""
        words = []
        for word in argv:
            name, equals, value = word.partition("=")
            if word.startswith("--"):
                name = "--" + name[2:].replace("-", "_")
            words.append(name + equals + value)
        given = {name: v for name, v in vars(self.parse_args(words)).items() if v is not None}
        return {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}

    def add_settings(self, groups):
        """A flag for each setting. groups: {heading: names of fields of Config}."""
        for heading, names in groups.items():
            section = self.add_argument_group(heading)
            for name in names:
                self.add_setting(section, name, FIELDS[name])

    def add_setting(self, section, name, field):
        meaning = field.metadata["meaning"].replace("%", "%%")
        if field.type is bool:  # two flags, and None if neither is given
            if field.default:
                meaning += f"; --no_{name} turns it off"
            section.add_argument(f"--{name}", action="store_const", const=True, help=meaning)
            section.add_argument(f"--no_{name}", action="store_const", const=False, dest=name,
                                 help=argparse.SUPPRESS)
            return
        kind = (typing.get_args(field.type) or [field.type])[0]  # int, of tuple[int, ...] too
        is_tuple = typing.get_origin(field.type) is tuple
        choices = list(PRESETS) if name == "preset" else field.metadata["choices"]
        if choices:
            meaning += f": {' '.join(choices)}"
        if field.default not in (None, ()):
            default = " ".join(map(str, field.default)) if is_tuple else field.default
            meaning += f" (default: {default})"
        metavar = "NAME" if choices else {int: "N", float: "X", str: "PATH"}[kind]
        options = dict(type=kind, choices=choices, metavar=metavar)
        if is_tuple:
            options["nargs"] = "+"
        special = dict(
            image_size=dict(type=square_as_number, metavar="SIZE"), classes=dict(metavar="NAME"),
            prompt=dict(metavar="TEXT"), resume=dict(nargs="?", const="latest"))
        options |= special.get(name, {})
        section.add_argument(f"--{name}", help=meaning, **options)

def run(work):
    """Do a command's work and return its exit code. What the user can fix is printed as a line."""
    with contextlib.suppress(AttributeError):  # stdout may be another object, as in a notebook
        sys.stdout.reconfigure(errors="backslashreplace")  # for letters that a terminal lacks
    is_main = os.environ.get("RANK", "0") == "0"
    try:
        with contextlib.redirect_stdout(sys.stdout if is_main else open(os.devnull, "w")):
            work()
        return 0
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except (UserError, OSError, MemoryError, RuntimeError) as e:
        message = explain(e)  # only the text: the traceback would keep its tensors alive
        if message is None:
            raise
    print(f"error: {printable(message)}", file=sys.stderr)
    return 1

def explain(error):
    """The sentence for an error that the user can fix; None for a fault of the program."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError):
        return (f"{error.strerror or error} ({error.filename or 'while writing a file'}). What was "
                "saved is safe. Make room or permit access, or choose another --model_path, "
                "--samples_dir or --download_dir.")
    text = str(error)
    # PyTorch has no exception type for every kind of missing memory, nor for lost processes.
    on_gpu = isinstance(error, torch.OutOfMemoryError) or re.search(
        "out of memory|ALLOC_FAILED|Invalid buffer size|find an engine|valid cuDNN algorithm", text)
    if isinstance(error, MemoryError) or on_gpu or "you tried to allocate" in text:
        where = "GPU memory" if on_gpu else "memory"
        reason = text.partition("\n")[0] or "no reason is given"
        return (f"Out of {where} ({reason}). Try a smaller --sample_batch_size or, to train, "
                "--checkpointing, a larger --grad_accum, or less --image_size or --channels.")
    if type(error).__module__ in ("torch._dynamo.exc", "torch._inductor.exc"):
        reason = " ".join(text.splitlines()[:2]).strip()
        return (f"--compile failed ({reason}). It needs a C++ compiler and, on a GPU, Triton, in "
                "versions that PyTorch can use. Install such, or give --no_compile.")
    if dist.is_initialized() and any(s in text.lower() for s in ("gloo", "nccl", "timed out")):
        return (f"The processes lost each other ({text.splitlines()[0]}). Fix what another one "
                "reports, or the network between them; then start again (training: with --resume).")
    return None

def run_mode(mode, given):
    """Train or sample with the settings that a command line gives."""
    if mode == "sample":
        path = find_model(given.get("model_path", Config.model_path))
        checkpoint = read_checkpoint(path)
        config = sampling_config(checkpoint, path, given)
        warn_of_unused(config, given)
        max_kept = MAX_SHOWN if config.interpolate is None else math.inf
        sample_run(config, checkpoint, max_kept)
        return
    checkpoint = None
    if "resume" in given:
        config, checkpoint = resumed_config(given)
    else:
        config = preset(given.get("preset", Config.preset), **given)
    warn_of_unused(config, given)
    train_run(config, checkpoint)

def main(argv=None):
    """Run a command line and return its exit code."""
    formatter = functools.partial(argparse.HelpFormatter, max_help_position=27, width=100)
    parser = Parser(
        "ddpm.py", usage="python ddpm.py --mode train|sample [flags]", allow_abbrev=False,
        description=__doc__.splitlines()[0], formatter_class=formatter)
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument("--mode", choices=("train", "sample"), required=True, help="what to do")
    parser.add_settings(flag_groups())
    given = parser.parse(sys.argv[1:] if argv is None else argv)
    mode = given.pop("mode")
    return run(lambda: run_mode(mode, given))

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and clean up, as after Ctrl-C
    raise SystemExit(main())
