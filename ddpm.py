"""ddpm.py: a denoising diffusion model in one file. It learns from a folder of pictures and draws new ones.

    python ddpm.py --mode train                              # the five animals; ten minutes on two cores
    python ddpm.py --mode sample                             # draws with the model just trained
    python ddpm.py --mode train --data_path MY_PICTURES      # your own, flat or one sub-folder a class
    torchrun --nproc_per_node=8 ddpm.py --mode train --preset cifar10

docs/animals.png is what the first one's model draws; docs/results.md has all figures and their commands.
This file reads from top to bottom: settings, schedules, diffusion process, samplers, networks, data, EMA and
checkpoints, training, sampling, pictures, command line. Papers, cited below by name:

    Ho et al. 2020, Denoising diffusion probabilistic models             arXiv:2006.11239
    Song et al. 2021, Denoising diffusion implicit models                arXiv:2010.02502
    Nichol & Dhariwal 2021, Improved DDPM                                arXiv:2102.09672
    Ho & Salimans 2022, Classifier-free diffusion guidance               arXiv:2207.12598
    Salimans & Ho 2022, Progressive distillation (v-prediction)          arXiv:2202.00512
    Lu et al. 2022, DPM-Solver++                                         arXiv:2211.01095
    Hang et al. 2023, Efficient diffusion training via min-SNR           arXiv:2303.09556
"""

import argparse
import contextlib
import copy
import ctypes
import dataclasses
import datetime
import difflib
import glob
import hashlib
import json
import math
import os
import platform
import re
import signal
import sys
import time
import typing
import zipfile
from collections import Counter, OrderedDict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from torch.utils.checkpoint import checkpoint as compute_again
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
FORMAT = 1  # of checkpoints; raised when an older file can no longer be read as it is

class UserError(Exception):
    """Something the user can mend: the message names the thing, what was expected and the remedy."""

def require(condition, message):
    if not condition:
        raise UserError(message)

def shown(text):
    """The text with all that could steer a terminal, or break the line, spelt out as in \\x1b."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))

# --------------------------------------------------------------------------------------------------- settings

def flag(default, meaning, low=None, high=math.inf, choices=None, group=None):
    """A setting: default, meaning, bounds or choices, and, where a group of --help begins, its name."""
    limits = dict(meaning=meaning, low=low, high=high, choices=choices and choices.split(), group=group)
    return dataclasses.field(default=default, metadata=limits)

DATASETS = {  # what torchvision calls them, and the parts that are taken of those that have parts
    "cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST", "mnist": "MNIST",
    "flowers102": "Flowers102 train val test", "celeba": "CelebA train"}

@dataclasses.dataclass
class Config:
    """Every setting with its default (together: `animals`) and meaning: the command line is made of it."""
    preset: str = flag("animals", "start from this recipe; any other flag overrides it", group="recipe")
    data_path: str = flag("animal_data", f"folder of pictures, or one of {' '.join(DATASETS)}", group="data")
    download_dir: str = flag("data", "folder for downloads and for the cache of decoded pictures")
    image_size: int = flag(64, "side of the square pictures, in pixels", 8, 1024)
    max_images: int | None = flag(None, "at most so many pictures, drawn by --seed (default: all)", 1, 10**12)
    hflip: bool = flag(False, "mirror half of the training pictures, left to right")
    holdout: float = flag(0.0, "share of the pictures kept out of training, to measure on", 0, 0.9)
    timesteps: int = flag(1000, "number of noise levels T", 10, 100_000, group="diffusion")
    schedule: str = flag("cosine", "how noise grows", choices="linear cosine quadratic exponential sigmoid")
    beta_start: float | None = flag(None, "first beta (default: 1e-4 * 1000 / T)", 1e-8, 0.999)
    beta_end: float | None = flag(None, "last beta (default: 0.02 * 1000 / T)", 1e-8, 0.999)
    predict: str = flag("x0", "what the network predicts", choices="eps x0 v")
    loss: str = flag("l2", "distance of the prediction from its target", choices="l2 l1 huber")
    min_snr: float = flag(0.0, "gamma of min-SNR weighting; 5 is usual, 0 is off", 0, 1e6)
    arch: str = flag("unet", "network", choices="unet simple resnet18", group="network")
    channels: int = flag(24, "width of the first stage (unet, simple)", 4, 4096)
    channel_mults: tuple[int, ...] = flag((1, 2, 4, 6), "width of each stage, times --channels (unet)", 1, 64)
    patch: int = flag(2, "side of the squares of pixels that are folded into channels at first (unet)", 1, 16)
    res_blocks: int = flag(1, "residual blocks a stage going down; one more going up (unet)", 1, 16)
    attention: str = flag("full", "kind, in the stages of --attention_at (unet)", choices="full linear none")
    attention_at: tuple[int, ...] = flag((), "sides of stages with attention (default: last two)", 1, 1024)
    dropout: float = flag(0.0, "dropout inside residual blocks (unet)", 0, 0.95)
    class_cond: bool = flag(True, "learn the classes, where the data has two or more")
    label_dropout: float = flag(0.1, "share of training pictures whose label is hidden, for --guidance", 0, 1)
    pretrained: bool = flag(False, "start the encoder from ImageNet weights, downloaded (resnet18)")
    steps: int | None = flag(3000, "length of training: optimiser steps,", 1, 10**12, group="training")
    epochs: float | None = flag(None, "or passes over the pictures,", 1e-6, 1e9)
    minutes: float | None = flag(None, "or minutes by the clock", 1e-3, 1e7)
    batch_size: int = flag(16, "pictures an optimiser step sees, over all processes and slices", 1, 10**6)
    grad_accum: int = flag(1, "slices that a batch is computed in, one by one, to save memory", 1, 10**6)
    lr: float = flag(1e-3, "learning rate after warm-up", 1e-9, 10)
    optimizer: str = flag("adamw", "optimiser", choices="adam adamw")
    weight_decay: float = flag(0.0, "weight decay, decoupled with adamw", 0, 10)
    lr_schedule: str = flag("cosine", "rate after warm-up, kept or falling to 0", choices="constant cosine")
    warmup_steps: int = flag(100, "steps over which the rate rises from 0", 0, 10**9)
    grad_clip: float = flag(1.0, "largest norm of the gradient; 0 is off", 0, 1e9)
    ema_decay: float = flag(0.999, "largest decay of the averaged weights; 0 is no averaging", 0, 0.999999)
    precision: str = flag("auto", "of the network; auto: bf16 if built in", choices="auto fp32 bf16 fp16")
    compile: bool = flag(False, "torch.compile the network: slow to start, then faster on a GPU")
    device: str = flag("auto", "where to compute", choices="auto cpu cuda mps")
    seed: int = flag(0, "seed of everything random", 0, 2**63 - 1)
    resume: str | None = flag(None, "go on with a run: a step checkpoint, or the latest", group="running")
    init_from: str | None = flag(None, "start a new run from the weights in this checkpoint")
    save_every: int = flag(500, "steps between checkpoints", 1, 10**9)
    sample_every: int = flag(1500, "steps between pictures in --samples_dir", 1, 10**9)
    log_every: int = flag(20, "steps between lines of metrics.jsonl", 1, 10**9)
    keep_last: int = flag(2, "step checkpoints to keep", 1, 10**6)
    logger: str = flag("none", "tracker to tell as well", choices="none tensorboard wandb")
    dry_run: bool = flag(False, "check data, shapes and memory on one batch, then exit")
    model_path: str = flag("saved_models/denoise_model.pt", "what train writes, sample reads", group="places")
    samples_dir: str = flag("samples", "folder for pictures, plots and metrics.jsonl")
    num_samples: int = flag(25, "pictures to draw", 1, 10**7, group="sampling")
    sample_batch_size: int = flag(64, "pictures drawn at a time", 1, 10**5)
    sampler: str = flag("ddpm", "way back from noise", choices="ddpm ddim dpm++")
    sampling_steps: int = flag(20, "steps from pure noise to a picture, at most T", 1, 10**5)
    eta: float = flag(0.0, "fresh noise in ddim: 0 none, 1 as much as ddpm", 0, 1)
    classes: str | None = flag(None, "draw only these, as in lion,tiger (default: all in turn)")
    guidance: float = flag(2.0, "strength of classifier-free guidance; 1 is off", 0, 100)
    ema: bool = flag(True, "draw with the averaged weights")
    individual: str | None = flag(None, "also write every picture by itself, into this folder")
    gif: bool = flag(False, "also write the reverse process as an animation")
    init_image: str | None = flag(None, "start from this picture instead of noise")
    strength: float | None = flag(None, "share of the way to noise (default: 0.5; with --mask 1)", 0.001, 1)
    mask: str | None = flag(None, "redraw --init_image where this picture is white, and only there")
    interpolate: int | None = flag(None, "go from the first picture of --seed to this seed's", 0, 2**63 - 1)

FIELDS = {f.name: f for f in dataclasses.fields(Config)}
GROUPS = {}  # name of a group -> its settings
for _f in FIELDS.values():  # one that names no group is in that of the one before
    GROUPS.setdefault(_f.metadata["group"] or list(GROUPS)[-1], []).append(_f.name)
LENGTHS = ("steps", "epochs", "minutes")
# What belongs to one command, and is never taken from a checkpoint.
EDITING = ("init_image", "strength", "mask", "interpolate")
FOR_ONCE = ("resume", "init_from", "individual", *EDITING)
# What --mode sample may be told, and what a resumed run may change; the rest is fixed by the checkpoint.
FOR_SAMPLING = {*GROUPS["places"], *GROUPS["sampling"], "device", "precision", "seed"}
FOR_RESUMING = {*GROUPS["places"], *GROUPS["sampling"], *GROUPS["running"], *LENGTHS,
                "device", "compile", "grad_accum", "download_dir"}

FASHION = dict(data_path="fashion_mnist", image_size=28, channels=32, batch_size=128, num_samples=50)
PLAIN = dict(schedule="linear", predict="eps", channels=32, patch=1, class_cond=False, guidance=1.0,
             optimizer="adam", sampling_steps=50)  # Ho et al. 2020, made small
LITERAL = dict(PLAIN, beta_start=1e-4, beta_end=0.02, lr_schedule="constant", warmup_steps=0, hflip=True)
FLOWERS = dict(LITERAL, data_path="flowers102", max_images=1000, loss="l1", batch_size=64, num_samples=16)
PRESETS = {
    "animals": dict(),
    "fashion_mnist": dict(
        FASHION, channel_mults=(1, 2, 4), attention_at=(8,), batch_size=32, lr=1.2e-3, steps=6000,
        guidance=1.5, sampling_steps=30),
    "animals_cnn": dict(PLAIN, arch="simple", predict="x0", batch_size=32, epochs=600),
    "cifar10_resnet18": dict(
        PLAIN, data_path="cifar10", arch="resnet18", timesteps=500, schedule="cosine", optimizer="adamw",
        lr=1e-4, weight_decay=0.01, batch_size=10, epochs=20, warmup_steps=0, hflip=True, save_every=5000,
        sample_every=5000),
    "fashion_mnist_annotated": FASHION | LITERAL | dict(
        timesteps=200, loss="huber", channels=28, channel_mults=(1, 2, 4), res_blocks=2, attention="linear",
        attention_at=(32, 16, 8), epochs=5),
    "fashion_mnist_small": FASHION | PLAIN | dict(
        channels=16, channel_mults=(1, 2, 2), attention="none", epochs=5),
    "flowers_simple": dict(FLOWERS, arch="simple", timesteps=600, epochs=25),
    "flowers_attention": dict(FLOWERS, patch=2, channel_mults=(1, 2, 4, 8), attention="linear",
                              attention_at=(32, 16, 8), timesteps=300, epochs=100),
    "cifar10": dict(
        PLAIN, data_path="cifar10", image_size=32, channels=128, channel_mults=(1, 2, 2, 2), res_blocks=2,
        attention_at=(16,), dropout=0.1, lr=2e-4, lr_schedule="constant", warmup_steps=5000, hflip=True,
        ema_decay=0.9999, batch_size=128, steps=800_000, save_every=5000, sample_every=5000, log_every=100,
        num_samples=64),
}

def override(config, **given):
    """A copy of `config` with the given settings; a given length of training replaces any other."""
    unknown, lengths = [*given.keys() - FIELDS.keys()], [n for n in LENGTHS if given.get(n) is not None]
    require(not unknown, f"There is no setting {', '.join(unknown)}: they are the fields of Config.")
    require(len(lengths) < 2, f"--{' and --'.join(lengths)} both set the length of training: give one.")
    return dataclasses.replace(config, **(dict.fromkeys(LENGTHS) if lengths else {}) | given)

def preset(name, **overrides):
    """The Config of a recipe in PRESETS, with any settings overridden: preset("cifar10", steps=10)."""
    require(name in PRESETS, f"There is no preset {name!r}: choose from {', '.join(PRESETS)}.")
    config = override(Config(preset=name), **PRESETS[name])
    if overrides.get("schedule", config.schedule) != config.schedule:
        config = override(config, beta_start=None, beta_end=None)  # they belong to the recipe's own schedule
    return override(config, **overrides)

def check(config):
    """Raise UserError for the first setting that is out of its range or clashes with another."""
    c = config
    for name, f in FIELDS.items():
        value, low, high, choices = getattr(c, name), *(f.metadata[k] for k in ("low", "high", "choices"))
        if choices:
            require(value in choices, f"--{name} {value}: choose from {', '.join(choices)}.")
        kinds = {*typing.get_args(f.type), f.type}  # float | None -> float, NoneType, float | None
        kinds |= {int} if float in kinds else set()
        values = [value]
        if typing.get_origin(f.type) is tuple:  # in the place of a tuple, anything else is as bad as None
            values = value if type(value) is tuple else [None]
        # A checkpoint can hold no other types, and the name of a file no \0.
        good = all(type(v) in kinds and not (type(v) is str and "\0" in v) for v in values)
        require(good, f"--{name} {value!r}: give {f.type.__name__ if isinstance(f.type, type) else f.type}.")
        for v in values:
            good = low is None or v is None or low <= v <= high and v != math.inf
            require(good, f"--{name} {v} is out of range: give {low} to {high}.")
    require(c.channel_mults, "--channel_mults is empty: give a number for each stage, as in 1 2 2.")
    require(any(getattr(c, n) for n in LENGTHS), "No length: give one of --steps, --epochs, --minutes.")
    T, (start, end) = c.timesteps, beta_range(c.timesteps, c.beta_start, c.beta_end)
    require(c.schedule != "cosine" or not (c.beta_start or c.beta_end),
            "--schedule cosine has no --beta_start and --beta_end: leave them out.")
    require(start <= end, f"--beta_start {start:g} is above --beta_end {end:g}: noise has to grow.")
    require(make_diffusion(c).abar[-2] > 1e-60, f"--timesteps {T} of such betas leave nothing of a picture: "
            "give fewer, or smaller --beta_start and --beta_end.")
    require(c.sampling_steps <= T, f"--sampling_steps {c.sampling_steps} is more than --timesteps {T}.")
    require(not (c.resume and c.init_from), "--resume goes on with a run, --init_from starts one: give one.")
    require(c.init_image or not (c.mask or c.strength), "--mask and --strength need --init_image FILE.")
    require(c.interpolate is None or not c.init_image, "--interpolate and --init_image: give one.")
    require(c.interpolate != c.seed, f"--interpolate {c.seed} is --seed as well: give two different ones.")
    side, unet = network_size(c.image_size), c.patch * 2 ** (len(c.channel_mults) - 1)
    stride = {"unet": unet, "simple": 16, "resnet18": 32}[c.arch]
    fits = " or ".join(str(n * stride) for n in (side // stride, side // stride + 1) if n)
    require(side % stride == 0, f"--image_size {side} must be divisible by {stride}: use {fits}.")
    even = c.channels % 2 == 0 or c.arch == "resnet18"
    require(even, f"--channels {c.channels} must be even: half sines, half cosines.")
    if c.arch == "unet":
        sides, at = stage_sides(c), " ".join(map(str, c.attention_at))
        require(c.attention == "none" or {*c.attention_at} <= {*sides}, f"--attention_at {at}: the stages "
                f"have sides {' '.join(map(str, sides))}; choose among them, or --attention none.")

def network_size(image_size):
    """Side of the pictures inside the network: 28 pixels are padded to 32, and cropped back when saved."""
    return 32 if image_size == 28 else image_size

def stage_sides(config):
    """Sides of the feature maps in the stages of a UNet."""
    return [network_size(config.image_size) // config.patch >> i for i in range(len(config.channel_mults))]

# -------------------------------------------------------------------------------------------------- schedules

def beta_range(T, start=None, end=None):
    """First and last beta: as given, else DDPM's 1e-4 and 0.02 times 1000/T, at most 0.999."""
    betas = (1e-4 * 1000 / T if start is None else start, 0.02 * 1000 / T if end is None else end)
    return tuple(min(beta, 0.999) for beta in betas)

def make_betas(kind, T, start=None, end=None):
    """The noise schedule: beta_t, the variance that step t adds, as (T,) float64 in (0, 0.999].
    kind: a choice of --schedule. start, end: see `beta_range`; cosine has none."""
    start, end = beta_range(T, start, end)
    ramp = torch.linspace(0, 1, T, dtype=torch.float64)  # from t = 0 to t = T-1
    if kind == "linear":  # Ho et al. 2020, section 4
        betas = start + (end - start) * ramp
    elif kind == "quadratic":  # Song et al. 2021's code; "scaled linear" in latent diffusion
        betas = (start**0.5 + (end**0.5 - start**0.5) * ramp) ** 2
    elif kind == "exponential":  # geometric, as are the noise levels of Song & Ermon (arXiv:1907.05600)
        betas = start * (end / start) ** ramp
    elif kind == "sigmoid":  # an S from start to end, as in GeoDiff (arXiv:2203.02923)
        betas = start + (end - start) * torch.sigmoid(12 * ramp - 6)
    elif kind == "cosine":  # Nichol & Dhariwal 2021, eq. 17, with s = 0.008
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        raise UserError(f"There is no schedule {kind!r}: see the choices of --schedule.")
    return betas.clamp(max=0.999)

# ------------------------------------------------------------------------------------------ diffusion process

class Diffusion:
    """The forward process q, and what follows. Timesteps t: 0..T-1 (the paper's 1..T); -1: clean data.
    abar[t] is the paper's alpha-bar (alphas_cumprod elsewhere), float64 with a last 1, so that abar[-1] = 1.
    predict: what the network says: the noise eps, the clean picture x0 (x_start elsewhere), or v."""
    def __init__(self, betas, predict="eps", loss="l2", min_snr=0.0, device="cpu"):
        self.T, self.predict = len(betas), predict
        self.distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[loss]
        abar = torch.cumprod(1 - betas.double().cpu(), 0)
        self.abar = torch.cat([abar, torch.ones(1, dtype=torch.float64)])
        snr, weight = abar / (1 - abar), torch.ones_like(abar)
        if min_snr:  # Hang et al. 2023, section 3.4: min(snr, gamma) / (error / error of x0)
            weight = snr.clamp(max=min_snr) / {"x0": 1, "eps": snr, "v": snr + 1}[predict]
        # What training looks up by a tensor of t: (T,) float32 each, on the device.
        self.a, self.s, self.weight = (v.float().to(device) for v in (abar.sqrt(), (1 - abar).sqrt(), weight))

    def scales(self, t):
        """sqrt(abar_t) and sqrt(1 - abar_t), shaped to multiply pictures."""
        return self.a[t].view(-1, 1, 1, 1), self.s[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) (Ho et al. 2020, eq. 4). x0, eps and the result: (N, C, H, W); t: (N,) int64."""
        a, s = self.scales(t)
        return a * x0 + s * eps

    def predict_x0(self, out, xt, t):
        """The clean picture that the network's output amounts to, not clipped: (N, C, H, W)."""
        a, s = self.scales(t)
        if self.predict == "eps":
            return (xt - s * out) / a  # Ho et al. 2020, eq. 15
        return out if self.predict == "x0" else a * xt - s * out  # v: Salimans & Ho 2022, appendix D

    def loss(self, model, x0, t, eps, y=None):
        """Training loss a picture, (N,) float32 (Ho et al. 2020, eq. 14, for l2, eps and no min-SNR)."""
        a, s = self.scales(t)
        target = {"eps": eps, "x0": x0, "v": a * eps - s * x0}[self.predict]
        out = model(self.q_sample(x0, t, eps), t, y).float()
        require(out.shape == x0.shape, f"The network gives {tuple(out.shape)} for {tuple(x0.shape)}.")
        return self.weight[t] * self.distance(out, target, reduction="none").mean(dim=(1, 2, 3))

    def posterior_std(self, t, u, large=False):
        """Standard deviation of x_u given x_t and x_0 (Ho et al. 2020, eq. 7). T > t > u >= -1.
        large: the paper's other choice, that of the forward process from u to t (section 3.2)."""
        at, au = self.abar[t].item(), self.abar[u].item()
        return math.sqrt(1 - at / au) * (1 if large else math.sqrt((1 - au) / (1 - at)))

    def step(self, x, x0, t, u, eta=0.0, noise=None):
        """From x_t to x_u given x0 (Song et al. 2021, eq. 12): DDPM's posterior at eta = 1, DDIM at eta = 0,
        and without noise its mean. x, x0, noise and the result: (N, C, H, W)."""
        at, au, std = self.abar[t].item(), self.abar[u].item(), eta * self.posterior_std(t, u)
        eps = (x - math.sqrt(at) * x0) / math.sqrt(1 - at)
        mean = math.sqrt(au) * x0 + math.sqrt(max(1 - au - std**2, 0)) * eps
        return mean if noise is None else mean + std * noise

def make_diffusion(config, device="cpu"):
    betas = make_betas(config.schedule, config.timesteps, config.beta_start, config.beta_end)
    return Diffusion(betas, config.predict, config.loss, config.min_snr, device)

# --------------------------------------------------------------------------------------------------- samplers
# A sampler takes x at noise level ts[0] down the timesteps ts, which end at -1, and yields after each step
# (t, x, x0): the level it left, x at the next one, the clean picture predicted at t. All it knows of a model
# is denoise(x, t) -> x0; noise() gives fresh Gaussian noise of x's shape; eta is for ddim alone.

def ddpm(diffusion, denoise, x, ts, noise, eta=0.0):
    """Ancestral sampling (Ho et al. 2020, algorithm 2): the large variance if no timestep is skipped."""
    large = len(ts) == ts[0] + 2  # ts goes down one by one: none is left out
    for t, u in zip(ts, ts[1:]):
        x0 = denoise(x, t)
        x = diffusion.step(x, x0, t, u, eta=1.0)  # the mean
        if u >= 0:  # the last step adds none, whatever that deviation is
            x = x + diffusion.posterior_std(t, u, large) * noise()
        yield t, x, x0

def ddim(diffusion, denoise, x, ts, noise, eta=0.0):
    """Song et al. 2021, eq. 12: deterministic at eta = 0."""
    for t, u in zip(ts, ts[1:]):
        x0 = denoise(x, t)
        x = diffusion.step(x, x0, t, u, eta, noise() if eta > 0 and u >= 0 else None)
        yield t, x, x0

def dpmpp(diffusion, denoise, x, ts, noise, eta=0.0):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step; deterministic."""
    alpha, sigma = diffusion.abar.sqrt().tolist(), (1 - diffusion.abar).sqrt().tolist()
    before, h_before = None, None
    for t, u in zip(ts, ts[1:]):
        x0 = d = denoise(x, t)
        if u < 0:  # log-SNR is infinite at clean data, and the step's limit is x0
            x = x0
        else:
            h = math.log(alpha[u] / sigma[u]) - math.log(alpha[t] / sigma[t])
            if before is not None:
                d = x0 + (x0 - before) * (h / h_before / 2)
            x = sigma[u] / sigma[t] * x - alpha[u] * math.expm1(-h) * d
            before, h_before = x0, h
        yield t, x, x0

SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpmpp}

def spaced_timesteps(T, n):
    """n of the timesteps with trailing spacing, T-1 first, and a last -1: n + 1 integers."""
    require(1 <= n <= T, f"{n} sampling steps: give 1 to {T}, the number of timesteps of the model.")
    return np.round(np.linspace(T - 1, -1, n + 1)).astype(int).tolist()

def make_denoiser(model, diffusion, y=None, guidance=1.0, clip=True, precision="fp32"):
    """denoise(x, t) -> x0, all that a sampler sees of a model. x, x0: (N, C, H, W) in [-1, 1]; t: int.
    y: (N,) int64 classes, -1 for none. Guidance g other than 1 is uncond + g * (cond - uncond) (Ho & Salimans
    2022, with w = g - 1), both in one batch. precision: fp32, or bf16 or fp16 inside the network."""
    @torch.no_grad()
    def denoise(x, t):
        ts = torch.full((len(x),), t, device=x.device)
        with autocast(x.device, precision):
            if guidance == 1 or y is None:
                out = model(x, ts, y).float()
            else:
                both = model(torch.cat([x, x]), torch.cat([ts, ts]), torch.cat([torch.full_like(y, -1), y]))
                uncond, cond = both.float().chunk(2)
                out = uncond + guidance * (cond - uncond)
        x0 = diffusion.predict_x0(out, x, ts)
        return x0.clamp(-1, 1) if clip else x0
    return denoise

class PictureNoise:
    """Noise for pictures number `indices` of those a seed stands for: one generator a picture, so that what
    becomes of a picture depends on neither the batch that it is drawn in nor the device."""
    def __init__(self, seed, indices, shape, device):
        self.generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
        self.shape, self.device = shape, device

    def __call__(self):
        return send(torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]), self.device)

def mix(*numbers):
    """One 63-bit seed from several integers >= 0; others below 2^32 give an unrelated one, but for zeros at
    the end. The second says what for: 0 which pictures, 1 held out, 2 order, 3 training, 4 previews."""
    return int(np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)[0] >> 1)

# --------------------------------------------------------------------------------------------------- networks
# All are called as net(x, t, y): x (N, C, H, W), t (N,), y (N,) class index or -1 for none, or no y at all.

def autocast(device, precision):
    """The context in which networks compute: convolutions and matrix products in bf16 or fp16, or as is."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()

class TimeLabelEmbedding(nn.Module):
    """Sinusoids of t (Ho et al. 2020, appendix B) through two layers, plus a learned vector for the label."""
    def __init__(self, channels, width, classes):
        super().__init__()
        self.frequencies = channels // 2
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(classes + 1, width) if classes else None  # the last row: no label

    def forward(self, t, y):
        exponent = torch.arange(self.frequencies, device=t.device) / (self.frequencies - 1)
        angle = t[:, None].float() * torch.exp(-math.log(10000) * exponent)  # (N, channels / 2)
        emb = self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))  # (N, width)
        if self.labels is None:
            return emb
        y = torch.full_like(t, -1) if y is None else y
        return emb + self.labels(y % self.labels.num_embeddings)  # -1 is the last row

def zero(layer):
    """The layer with weights and bias 0, so that it adds nothing at first."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer

class Attention(nn.Module):
    """One-head self-attention over all pixels, and a shortcut. full: softmax(q k') v, quadratic in them;
    linear: softmax(q) (softmax(k)' v) (Shen et al. 2021, arXiv:1812.01243)."""
    def __init__(self, channels, groups, kind="full"):
        super().__init__()
        self.kind, self.norm = kind, nn.GroupNorm(groups, channels, eps=1e-6)
        self.qkv, self.out = nn.Linear(channels, 3 * channels), zero(nn.Linear(channels, channels))

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=2)  # (N, HW, C) each
        if self.kind == "linear":
            a = (q.softmax(2) * c**-0.5) @ (k.softmax(1).transpose(1, 2) @ v)
        elif x.is_cuda:
            a = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:  # the same; on a CPU three times as fast, forward and backward, as the call above
            a = (q * c**-0.5 @ k.transpose(1, 2)).softmax(2) @ v
        return x + self.out(a).transpose(1, 2).reshape(n, c, h, w)

class ResBlock(nn.Module):
    """norm, SiLU, convolution, twice, with the embedding added in between and a shortcut around it all."""
    def __init__(self, c_in, c_out, embedding, groups, dropout=0.0):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)  # eps as in the paper's code
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(embedding, c_out)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x))) + self.time(F.silu(emb))[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))

class ResAttention(nn.Module):
    """A residual block and, where a kind of it is named, attention."""
    def __init__(self, c_in, c_out, embedding, groups, dropout, attention=None):
        super().__init__()
        self.res = ResBlock(c_in, c_out, embedding, groups, dropout)
        self.attention = Attention(c_out, groups, attention) if attention else nn.Identity()

    def forward(self, x, emb):
        return self.attention(self.res(x, emb))

class Upsample(nn.Module):
    """Nearest neighbours at twice the size, then a 3x3 convolution: in one, as a transposed convolution, each
    of whose 4x4 weights sums those of the 3x3 that meet the same pixel. 4/9 of the multiply-adds."""
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        # = self.conv(F.interpolate(x, scale_factor=2))
        rows = F.pad(self.conv.weight, (0, 0, 0, 1)) + F.pad(self.conv.weight, (0, 0, 1, 0))
        sums = F.pad(rows, (0, 1)) + F.pad(rows, (1, 0))  # (C, C, 4, 4)
        return F.conv_transpose2d(x, sums.flip(2, 3).transpose(0, 1), self.conv.bias, stride=2, padding=1)

class UNet(nn.Module):
    """The network of Ho et al. 2020, appendix B, as diffusers' UNet2DModel. width of the first stage, times
    mults for each; res_blocks a stage; attention (full, linear, none) in the stages numbered in
    attention_stages, full in the middle unless none; classes, 0 for an unconditional network; patch, the side
    of the squares of pixels folded into channels. Sides of pictures divisible by patch * 2^(stages-1)."""
    def __init__(self, image_channels=3, width=128, mults=(1, 2, 2, 2), res_blocks=2, attention="full",
                 attention_stages=(1,), dropout=0.0, classes=0, patch=1):
        super().__init__()
        widths, pixel = [width * m for m in mults], image_channels * patch**2
        # One number of groups for the whole net: the most, up to 32, with at least four channels in each.
        groups = max(g for g in (1, 2, 4, 8, 16, 32) if all(w % g == 0 and w >= 4 * g for w in widths))
        block = (4 * width, groups, dropout)  # what every residual block is told
        attention = None if attention == "none" else attention
        kinds = [attention if i in attention_stages else None for i in range(len(mults))]
        self.patch, self.embed = patch, TimeLabelEmbedding(width, 4 * width, classes)
        self.recompute = False  # activation checkpointing: only inputs of blocks are kept
        self.conv_in = nn.Conv2d(pixel, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips = [width]  # channels of the feature maps that the way up will join
        for i, w in enumerate(widths):
            if i:  # halve the sides, padded to the right and below as in the paper's code
                pad, conv = nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(skips[-1], skips[-1], 3, stride=2)
                self.down.append(nn.Sequential(OrderedDict(pad=pad, conv=conv)))  # named in checkpoints
                skips.append(skips[-1])
            for _ in range(res_blocks):
                self.down.append(ResAttention(skips[-1], w, *block, kinds[i]))
                skips.append(w)
        c = widths[-1]
        self.middle = ResAttention(c, c, *block, attention and "full")
        self.middle2 = ResBlock(c, c, *block)
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(res_blocks + 1):
                self.up.append(ResAttention(c + skips.pop(), w, *block, kinds[i]))
                c = w
            if i:
                self.up.append(Upsample(c))
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = zero(nn.Conv2d(c, pixel, 3, padding=1))
        for name, layer in self.named_modules():  # as in the paper's code; PyTorch's weights learn slower
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and not name.endswith(("conv2", "out")):  # these: 0
                nn.init.xavier_uniform_(layer.weight, 2**0.5 if name.endswith("qkv") else 1)  # three in one
                nn.init.zeros_(layer.bias)

    def forward(self, x, t, y=None):
        def apply(stage, *inputs):
            again = self.recompute and torch.is_grad_enabled()
            return compute_again(stage, *inputs, use_reentrant=False) if again else stage(*inputs)

        emb, h = self.embed(t, y), self.conv_in(F.pixel_unshuffle(x, self.patch))
        skips = [h]
        for layer in self.down:
            h = apply(layer, h, emb) if isinstance(layer, ResAttention) else layer(h)
            skips.append(h)
        h = self.middle2(apply(self.middle, h, emb), emb)
        for layer in self.up:
            join = isinstance(layer, ResAttention)
            h = apply(layer, torch.cat([h, skips.pop()], 1), emb) if join else layer(h)
        return F.pixel_shuffle(self.conv_out(F.silu(self.norm_out(h))), self.patch)

class ConvBlock(nn.Module):
    """A convolution of any kind, BatchNorm, the embedding added, SiLU."""
    def __init__(self, conv, embedding):
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(conv.out_channels)
        self.time = nn.Linear(embedding, conv.out_channels)

    def forward(self, x, emb):
        return F.silu(self.norm(self.conv(x)) + self.time(F.silu(emb))[:, :, None, None])

class Decoder(nn.Module):
    """From the deepest feature map up through the widths: double the sides, join the encoder's map, merge."""
    def __init__(self, widths, embedding):
        super().__init__()
        pairs = list(zip(widths, widths[1:]))[::-1]  # (outer, inner) from the bottom up
        self.up = nn.ModuleList(ConvBlock(nn.ConvTranspose2d(b, a, 4, 2, 1), embedding) for a, b in pairs)
        self.merge = nn.ModuleList(ConvBlock(nn.Conv2d(2 * a, a, 3, 1, 1), embedding) for a, _ in pairs)

    def forward(self, maps, emb):
        h, *skips = maps[::-1]
        for up, merge, skip in zip(self.up, self.merge, skips):
            h = merge(torch.cat([up(h, emb), skip], dim=1), emb)
        return h

class SimpleUNet(nn.Module):
    """A plain U-Net with BatchNorm: strided 4x4 convolutions down, transposed ones up, the width doubled
    at each of four halvings. Sides divisible by 16."""
    def __init__(self, image_channels=3, width=32, classes=0):
        super().__init__()
        widths = [width * 2**i for i in range(5)]  # 32 64 128 256 512
        self.embed = TimeLabelEmbedding(width, 4 * width, classes)
        self.conv_in = nn.Conv2d(image_channels, width, 3, padding=1)
        self.down = nn.ModuleList(ConvBlock(nn.Conv2d(c, 2 * c, 4, 2, 1), 4 * width) for c in widths[:-1])
        self.decoder = Decoder(widths, 4 * width)
        self.conv_out = nn.Conv2d(width, image_channels, 3, padding=1)

    def forward(self, x, t, y=None):
        emb, maps = self.embed(t, y), [self.conv_in(x)]
        for down in self.down:
            maps.append(down(maps[-1], emb))
        return self.conv_out(self.decoder(maps, emb))

class ResNetUNet(nn.Module):
    """torchvision's ResNet-18 as the encoder, with time and self-attention added at each of its scales, and a
    mirrored decoder of transposed convolutions. Sides divisible by 32."""
    def __init__(self, image_channels=3, classes=0, pretrained=False):
        super().__init__()
        weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1 if pretrained else None
        try:
            net = torchvision.models.resnet18(weights=weights)
        except OSError as e:
            raise UserError(f"The ImageNet weights could not be downloaded ({e}). Put {weights.url} into "
                            f"{torch.hub.get_dir()}/checkpoints, or leave out --pretrained.") from None
        if image_channels == 1:  # grey stands for three equal colours
            net.conv1.weight = nn.Parameter(net.conv1.weight.data.sum(1, keepdim=True))
        widths = [32, 64, 64, 128, 256, 512]  # at the whole side, 1/2, 1/4, 1/8, 1/16 and 1/32 of it
        stem, pooled = nn.Sequential(net.conv1, net.bn1, net.relu), nn.Sequential(net.maxpool, net.layer1)
        self.embed = TimeLabelEmbedding(128, 256, classes)
        self.conv_in = nn.Conv2d(image_channels, 32, 3, padding=1)
        self.encoder = nn.ModuleList([stem, pooled, net.layer2, net.layer3, net.layer4])
        self.time = nn.ModuleList(nn.Linear(256, c) for c in widths[1:])
        self.attention = nn.ModuleList(Attention(c, 32) for c in widths[1:])
        self.decoder = Decoder(widths, 256)
        self.conv_out = nn.Conv2d(32, image_channels, 3, padding=1)

    def forward(self, x, t, y=None):
        emb, h, maps = self.embed(t, y), x, [self.conv_in(x)]
        for encode, time_of, attend in zip(self.encoder, self.time, self.attention):
            h = attend(encode(h) + time_of(F.silu(emb))[:, :, None, None])
            maps.append(h)
        return self.conv_out(self.decoder(maps, emb))

def build_model(config, image_channels, classes):
    """The network of a Config. model.channels are the pictures' (config.channels is the width)."""
    c = config
    if c.arch == "simple":
        model = SimpleUNet(image_channels, c.channels, len(classes))
    elif c.arch == "resnet18":
        model = ResNetUNet(image_channels, len(classes), c.pretrained)
    else:
        at = c.attention_at or stage_sides(c)[-2:]
        stages = [i for i, side in enumerate(stage_sides(c)) if side in at]
        model = UNet(image_channels, c.channels, c.channel_mults, c.res_blocks, c.attention, stages,
                     c.dropout, len(classes), c.patch)
    model.image_size, model.channels = network_size(c.image_size), image_channels
    model.classes = list(classes)
    return model

# ------------------------------------------------------------------------------------------------------- data

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
DECODER = 1  # version of `decode`; raised when it gives other pixels, so that old caches are left alone
IN_MEMORY = 2**28  # bytes of pixels above which they live in a memory-mapped file

# Pictures before decoding: names, labels (-1: none), class names, what a cache's key is made of, and open(i).
Source = namedtuple("Source", "names labels classes key open")

def to_network(pixels):
    """uint8 pixels 0..255 -> float32 in [-1, 1], the range that the network sees. Any shape."""
    return pixels.float() / 127.5 - 1

def to_pixels(x):
    """float in [-1, 1], clipped to it -> uint8 pixels 0..255: the inverse of `to_network`."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

def send(x, device):
    """The tensor on the device, waiting for CUDA only if it must (MPS could spoil it: pytorch#189690)."""
    return x.to(device, non_blocking=torch.device(device).type == "cuda")

def decode(image, size, channels):
    """A PIL picture upright, over white, its central square resized: (channels, size, size) uint8."""
    image.draft(None, (2 * size, 2 * size))  # a JPEG need not be decoded at full size
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # 16 bits, or floats up to 1, 255 or 65535
        values = np.asarray(image, dtype=np.float64)
        top = 65535 if image.mode[0] == "I" else next((n for n in (1, 255) if values.max() <= n), 65535)
        image = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if "A" in image.mode.upper() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (size, size), Image.BICUBIC)
    pixels = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
    border = ((network_size(size) - size) // 2,) * 2
    return np.pad(pixels, ((0, 0), border, border), mode="edge")

def open_picture(path):
    Image.MAX_IMAGE_PIXELS = 2**28  # twice this and more is refused as a decompression bomb
    return Image.open(path)

def load_picture(path, size, channels):
    """The picture in a file as a network sees it, (1, channels, size, size) in [-1, 1], or UserError."""
    try:
        with open_picture(path) as image:
            return to_network(torch.tensor(decode(image, size, channels)))[None]
    except Exception as e:  # broken files make decoders raise anything
        raise UserError(f"{path} cannot be read ({type(e).__name__}: {e}). Give a picture file.") from None

def folder_source(root):
    """The picture files below a folder; the first sub-folder on the way to a file is its class."""
    require(root.is_dir(), f"No folder {root}: give --data_path pictures, or one of {', '.join(DATASETS)}.")
    files, others, seen = [], Counter(), set()
    def cannot_list(error):
        raise error

    for place, folders, names in os.walk(root, followlinks=True, onerror=cannot_list):
        if (real := os.path.realpath(place)) in seen:  # a link that leads round in a circle
            folders.clear()
            continue
        seen.add(real)
        folders[:] = sorted(f for f in folders if f[0] != ".")
        good = [name for name in sorted(names) if Path(name).suffix.lower() in SUFFIXES and name[0] != "."]
        files += [Path(place, name) for name in good]
        others.update(Path(name).suffix.lower() or name for name in {*names} - {*good})
    saw = f"{others.total()} files ({', '.join(f'{suffix} {n}' for suffix, n in sorted(others.items())[:8])})"
    require(files, f"No pictures in {root}: saw {saw}; accepted {' '.join(SUFFIXES)}.")
    parts, stats = [f.relative_to(root).parts for f in files], [f.is_file() and f.stat() for f in files]
    classes = sorted({p[0] for p in parts if len(p) > 1})
    number = {name: i for i, name in enumerate(classes)}
    labels = np.array([number[p[0]] if len(p) > 1 else -1 for p in parts])
    names = ["/".join(p) for p in parts]
    key = [str(root.resolve()), *zip(names, [s and (s.st_size, s.st_mtime_ns) for s in stats])]
    def opened(i):
        require(stats[i], "a link to nowhere, or no file")  # to wait for a pipe would be for ever
        return open_picture(files[i])
    return Source(names, labels, classes, key, opened)

def torchvision_source(name, root):
    """One of torchvision's data sets, downloaded if need be: the training pictures (of flowers102, all)."""
    kind, *splits = DATASETS[name].split()
    try:
        given = [dict(split=split) for split in splits] or [{}]
        parts = [getattr(torchvision.datasets, kind)(root, download=True, **split) for split in given]
    except ImportError as e:
        package = {"flowers102": "scipy", "celeba": "gdown"}.get(name, e.name)
        raise UserError(f"The data set {name} needs the package {package}: pip install {package}") from None
    except Exception as e:  # of files cut short too
        why, place = [*str(e).splitlines(), repr(e)][0], Path(root).resolve()
        raise UserError(f"{name} could not be downloaded ({why}). Put its files where torchvision looks for "
                        f"them, in {place}, or give a folder.") from None
    data = torch.utils.data.ConcatDataset(parts)
    if name == "celeba":
        labels, classes = np.full(len(data), -1), []
    elif name == "flowers102":
        labels, classes = np.concatenate([p._labels for p in parts]), [f"flower_{i + 1}" for i in range(102)]
    else:
        labels, classes = np.asarray(parts[0].targets), [c.replace("/", "-") for c in parts[0].classes]
    return Source([f"{name}/{i}" for i in range(len(data))], labels, classes, [name], lambda i: data[i][0])

def load_images(config, device="cpu"):
    """The pictures that a Config names, decoded, as `Images`. UserError for none, or too many bad ones."""
    first = os.environ.get("LOCAL_RANK", "0") == "0"  # downloads and decodes for all processes of a machine
    if dist.is_initialized() and not first:
        dist.barrier()
    path = Path(config.data_path)
    if config.data_path == Config.data_path and not path.exists():
        path = HERE / path  # the starter pictures
    fetch = config.data_path in DATASETS
    source = torchvision_source(path.name, config.download_dir) if fetch else folder_source(path)
    chosen = np.arange(len(source.names))
    if config.max_images and config.max_images < len(chosen):
        chosen = np.sort(np.random.default_rng(mix(config.seed, 0)).permutation(chosen)[: config.max_images])
    key = json.dumps([DECODER, config.image_size, source.key, chosen.tolist()])
    cache = Path(config.download_dir, "decoded", hashlib.sha256(key.encode()).hexdigest()[:24] + ".npy")
    pixels, bad = decode_all(source, chosen, config.image_size, cache)
    if dist.is_initialized() and first:
        dist.barrier()  # the others go on, and find it done
    return Images(source, chosen, pixels, bad, config, device)

def decode_all(source, chosen, size, cache):
    """Decode the chosen pictures on all cores: (N, C, H, W) uint8, and {row: reason} of bad ones. Small sets
    stay in memory. A large one is written to a file that gets its name, `cache`, when it is whole: neither a
    crash nor a second start at the same time can make a wrong one."""
    reasons = cache.with_suffix(".json")
    with contextlib.suppress(OSError, ValueError, EOFError):  # there is none, or a damaged one: decode anew
        bad = json.loads(reasons.read_text())
        return np.load(cache, mmap_mode="c"), {int(row): reason for row, reason in bad.items()}
    def every(work, what):  # work(image) of each picture in turn; of one that fails the reason, a string
        def attempt(i):
            try:
                with contextlib.closing(source.open(i)) as image:
                    return work(image)
            except Exception as e:  # broken files make decoders raise anything
                return f"{type(e).__name__}: {e}"
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            yield from tqdm(pool.map(attempt, chosen), what, len(chosen), leave=False, delay=2)

    coloured = [*every(lambda image: image.mode[0] not in "1LIF", "looking")]
    channels, side, bad = 3 if True in coloured else 1, network_size(size), {}
    shape, partial = (len(chosen), channels, side, side), cache.with_suffix(f".{os.getpid()}.tmp")
    large = math.prod(shape) > IN_MEMORY
    try:
        pixels = None if large else np.zeros(shape, np.uint8)
        if large:
            cache.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            if hasattr(os, "posix_fallocate"):  # or a full disk would kill the process in mid-write
                with open(partial, "r+b") as f:
                    os.posix_fallocate(f.fileno(), 0, partial.stat().st_size)
        for row, result in enumerate(every(lambda image: decode(image, size, channels), "decoding")):
            if isinstance(result, str):
                bad[row] = result
            else:
                pixels[row] = result
        if large:
            pixels.flush()
            atomic_write(reasons, lambda f: f.write(json.dumps(bad).encode()))
            os.replace(partial, cache)
            pixels = np.load(cache, mmap_mode="c")
    finally:
        if large:
            partial.unlink(missing_ok=True)
    return pixels, bad

class Images:
    """Decoded pictures. pixels: (N, C, H, W) uint8, on the GPU if it has room; labels: (N,) int64, -1: none;
    classes: their names, none where they are not learned; train and held_out: the rows of either."""
    def __init__(self, source, chosen, pixels, bad, config, device):
        if bad:
            listed = [f"\n  {source.names[chosen[row]]!r}: {shown(bad[row])}" for row in list(bad)[:10]]
            print(f"{len(bad)} of {len(chosen)} pictures cannot be read:{''.join(listed)}", file=sys.stderr)
        require(len(bad) < 0.05 * len(chosen), "That is 5 % of the pictures or more: mend or remove them.")
        good = np.setdiff1d(np.arange(len(chosen)), list(bad))
        order = np.random.default_rng(mix(config.seed, 1)).permutation(good)
        n = round(config.holdout * len(good))
        self.held_out, self.train = np.sort(order[:n]), np.sort(order[n:])
        require(len(self.train) and (n or not config.holdout), f"--holdout {config.holdout:g} of {len(good)} "
                f"pictures leaves {len(self.train)} to train on and {n} held out: both need one.")
        self.found, self.bad, self.class_names = len(source.names), len(bad), source.classes
        self.classes = source.classes if config.class_cond and len(source.classes) > 1 else []
        self.labels = torch.from_numpy(source.labels[chosen].astype(np.int64))
        self.pixels = torch.from_numpy(pixels)
        if torch.device(device).type == "cuda" and pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 3:
            self.pixels = self.pixels.to(device)
        self.channels, self.seed, self.hflip, self._order = pixels.shape[1], config.seed, config.hflip, {}
        names = "\n".join(source.names[i] for i in chosen).encode(errors="surrogatepass")
        names = hashlib.sha256(names).hexdigest()[:12]
        self.fingerprint = f"{len(chosen)} pictures, {len(bad)} bad, names {names}"

    def order(self, epoch):
        """The rows to train on in the order of this pass over them, a permutation drawn by the seed."""
        if epoch not in self._order:
            self._order = {epoch: np.random.default_rng(mix(self.seed, 2, epoch)).permutation(self.train)}
        return self._order[epoch]

    def take(self, rows, device):
        """Pictures x0 (n, C, H, W) in [-1, 1] and labels (n,) of some rows, on the device."""
        rows = torch.from_numpy(rows)
        pixels = self.pixels[send(rows, self.pixels.device)]
        return to_network(send(pixels, device)), send(self.labels[rows], device)

    def batch(self, step, batch_size, slice=0, slices=1, device="cpu"):
        """x0 and labels of a slice of a step's batch, by arguments, seed and (flips) torch's generator."""
        n, total = batch_size // slices, len(self.train)
        passes, places = np.divmod(step * batch_size + slice * n + np.arange(n), total)  # over and over again
        rows = np.concatenate([self.order(e)[places[passes == e]] for e in np.unique(passes)])
        x0, y = self.take(rows, device)
        if self.hflip:
            x0 = torch.where(send(torch.rand(n) < 0.5, device)[:, None, None, None], x0.flip(3), x0)
        return x0, y

# ---------------------------------------------------------------------------------------- EMA and checkpoints

@torch.no_grad()
def update_ema(averages, weights, updates, decay):
    """Average the weights: decay min(d, (1 + n) / (10 + n)) after n updates, little at first, to forget the
    start. Both are lists of tensors, of the same order; float buffers are averaged, integer ones copied."""
    d = min(decay, (1 + updates) / (10 + updates)) if decay else 0
    pairs = list(zip(averages, weights))
    floats = [pair for pair in pairs if pair[0].is_floating_point()]
    torch._foreach_lerp_([a for a, _ in floats], [b for _, b in floats], 1 - d)
    for a, b in pairs:
        if not a.is_floating_point():
            a.copy_(b)

def atomic_write(path, write):
    """Call write(file) for a file that appears at `path` whole or not at all. Returns the absolute path."""
    path = Path(path).resolve()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except RuntimeError as e:  # torch.save's on a full disk hides the error that caused it
        raise (e.__context__ if isinstance(e.__context__, OSError) else e) from None
    finally:
        partial.unlink(missing_ok=True)
    if hasattr(os, "O_DIRECTORY"):  # make the new name durable too
        folder = os.open(path.parent, os.O_DIRECTORY)
        os.fsync(folder)
        os.close(folder)
    return str(path)

def read_checkpoint(path):
    """The dictionary in a checkpoint, tensors on the CPU. UserError if it cannot be trusted or understood."""
    require(Path(path).is_file(), f"No checkpoint {path}: give the path of a file that --mode train wrote.")
    try:
        with zipfile.ZipFile(path) as f:  # PyTorch does not compare the checksums that it writes
            if f.testzip():
                raise zipfile.BadZipFile
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # bad bytes can raise anything
        raise UserError(f"{path} cannot be read safely: it is damaged, or holds more than tensors and plain "
                        f"values ({type(e).__name__}). Use another checkpoint.") from None
    kinds = dict(format=int, config=dict, weights=dict, classes=list, channels=int)
    good = isinstance(checkpoint, dict) and all(isinstance(checkpoint.get(k), v) for k, v in kinds.items())
    require(good, f"{path} is not a checkpoint of ddpm.py: format number, configuration or weights are "
            "missing. Give one that --mode train wrote.")
    require(checkpoint["format"] == FORMAT, f"{path} has format {checkpoint['format']}, and this ddpm.py "
            f"reads format {FORMAT}: use the version that wrote it.")
    states = [checkpoint["weights"], checkpoint.get("ema", {})]
    named = (*states, checkpoint["config"], checkpoint["classes"])
    good = checkpoint["channels"] in (1, 3) and all(isinstance(state, dict) for state in states)
    good = good and all(type(v) is torch.Tensor for state in states for v in state.values())
    good = good and all(type(name) is str for some in named for name in some)
    require(good, f"{path} holds other things than ddpm.py writes: use another.")
    require(all_finite(*states), f"{path} has weights that are not finite: use another.")
    return checkpoint

def all_finite(*states):
    """Whether every tensor in some state dictionaries is free of NaN and infinities."""
    return all(v.isfinite().all().item() for state in states for v in state.values())

def stored_config(checkpoint, path, given=None, allowed=()):
    """The Config in a checkpoint with those `given` settings that may differ, UserError for any that may not.
    Settings that did not exist when it was written have their defaults."""
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint["config"].items()}  # of JSON
    unknown, given = ", ".join(stored.keys() - FIELDS.keys()), given or {}
    require(not unknown, f"{path} has settings that this ddpm.py does not know: {unknown}. Use a newer one.")
    config = Config(**stored | dict.fromkeys(FOR_ONCE))
    try:
        check(config)
    except UserError as e:
        raise UserError(f"{path} has a configuration that cannot be ({e}) Use another.") from None
    for name, value in given.items():
        was = getattr(config, name)
        require(name in allowed or value == was,
                f"--{name} {value} contradicts {path}, where it is {was}: leave it out or train anew.")
    return override(config, **{name: value for name, value in given.items() if name in allowed})

def drawing_config(checkpoint, path, given, allowed=FOR_SAMPLING):
    """The Config to draw with: the checkpoint's, but where its run wrote and computed, and what is given."""
    own = dict(samples_dir=Config.samples_dir, device=Config.device)
    if checkpoint["config"].get("precision") == "fp16":  # which not every machine has
        own["precision"] = Config.precision
    return stored_config(checkpoint, path, own | given, allowed)

def load_weights(model, state, path):
    """Load weights strictly, whatever wrapper they were saved from."""
    try:
        model.load_state_dict({re.sub(r"^(module\.)?(_orig_mod\.)?", "", k): v for k, v in state.items()})
    except RuntimeError as e:
        raise UserError(f"{path} does not fit its own network: {str(e).splitlines()[1].strip()} "
                        "Use another.") from None

def load_model(path, device="cpu", ema=True):
    """The model in a checkpoint: (model in eval mode, diffusion, config). model.classes names its classes.
    ema: take the averaged weights where there are both. UserError if it is missing, foreign or damaged."""
    checkpoint = read_checkpoint(path)
    config = stored_config(checkpoint, path)
    model = build_model(override(config, pretrained=False), checkpoint["channels"], checkpoint["classes"])
    load_weights(model, checkpoint["ema" if ema and "ema" in checkpoint else "weights"], path)
    return model.to(device).eval().requires_grad_(False), make_diffusion(config, device), config

# --------------------------------------------------------------------------------------------------- training

def choose_device(name):
    """The torch.device for --device: auto is CUDA, else Apple's MPS, else the CPU."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in there if there[n]) if name == "auto" else name
    require(there[name], f"--device {name}: PyTorch sees none here. Give --device auto, or install another.")
    index = int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None
    require(not index or index < torch.cuda.device_count(), f"Process {index} has no GPU: there are "
            f"{torch.cuda.device_count()}. Give torchrun --nproc_per_node as many, or --device cpu.")
    if name == "cuda":
        torch.cuda.set_device(index)  # or every process would use the first one too
        torch.backends.cudnn.allow_tf32 = False  # or fp32 convolutions would round to ten bits
    return torch.device(name, index)

def join_processes(device):
    """This process's number among those that torchrun started, which can talk from now on, and how many."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:  # what is on the CPU goes by gloo even then, and does not wait for the GPU
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=datetime.timedelta(hours=2))  # while one decodes
    return rank, world

def choose_precision(name, device):
    """fp32, bf16 or fp16 for --precision: auto is bf16 where the hardware has instructions for it."""
    kind = device.type
    require(name != "fp16" or kind == "cuda", f"--precision fp16 needs a CUDA GPU, not {kind}: use bf16.")
    bf16 = torch.cuda.get_device_capability(device) >= (8, 0) if kind == "cuda" else (
        kind == "cpu" and torch.cpu._is_avx512_bf16_supported())
    return name if name != "auto" else "bf16" if bf16 else "fp32"

def keep_memory():
    """Have glibc keep freed memory, not fault it in again at every step: 5 to 30 % faster on a CPU."""
    with contextlib.suppress(OSError, AttributeError):  # where there is no glibc
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no mappings of their own for large blocks
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap

@contextlib.contextmanager
def stop_requests():
    """Collects SIGTERM and Ctrl-C in a list that a loop can look at; a second Ctrl-C quits at once."""
    asked = []
    def handle(number, _):
        if asked and number == signal.SIGINT:
            os._exit(130)
        asked.append(number)

    with contextlib.ExitStack() as undo:
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for s in (signal.SIGINT, signal.SIGTERM):
                undo.callback(signal.signal, s, signal.signal(s, handle))
        yield asked

class Clock:
    """How far training is: steps done, seconds spent, and the share of the planned length, 0 to 1."""
    def __init__(self, c, pictures):
        self.steps = math.ceil(c.epochs * pictures / c.batch_size) if c.epochs else c.steps
        self.limit = 60 * (c.minutes or 0)
        self.step, self.before, self.started = 0, 0.0, time.monotonic()
        # --minutes includes the last pictures. Until some have been drawn and timed (self.ending), what they
        # cost is guessed in training steps: to evaluate the network once is half of training on a picture.
        self.ending, evaluations = None, c.num_samples * c.sampling_steps
        self.ending_in_steps = evaluations * (1 if c.guidance == 1 else 2) / c.batch_size / 2

    def seconds(self):
        return self.before + time.monotonic() - self.started

    def share(self):
        if self.steps:
            return min(self.step / self.steps, 1)
        ending = self.ending or self.ending_in_steps * self.seconds() / max(self.step, 1)
        return min(self.seconds() / (self.limit - min(ending, self.limit / 2)), 1)  # half at least trains

def learning_rate(config, step, share):
    """A linear rise over warmup_steps; then constant, or half a cosine down to 0 at the end of training."""
    fall = 0.5 + 0.5 * math.cos(math.pi * share) if config.lr_schedule == "cosine" else 1
    return config.lr * min(1, (step + 1) / (config.warmup_steps + 1)) * fall

def step_files(model_path):
    """The folder of a model's step checkpoints, and those in it, oldest first."""
    path = Path(model_path)
    require(path.name and not path.is_dir(),
            f"--model_path {model_path} is a folder: give a file in it, as in {path / 'model.pt'}.")
    folder = path.with_name(path.stem + "_steps")
    return folder, sorted(folder.glob("step_*.pt"))

def find_resume(config):
    """What --resume means, (path, checkpoint): the latest that can be read, or exactly the one named."""
    if config.resume != "latest":
        return config.resume, read_checkpoint(config.resume)
    folder, files = step_files(config.model_path)
    for path in reversed(files):
        try:
            return path, read_checkpoint(path)
        except UserError as e:
            print(shown(f"warning: {e} Trying the one before."), file=sys.stderr)
    raise UserError(f"Nothing to resume in {folder}: leave out --resume to start a run.")

def set_aside(*paths):
    """Rename what an earlier run wrote, lest a new one overwrite it or mix with it, and say so."""
    for path in paths:
        if path.exists():
            names = (path.with_name(f"{path.name}.previous{n if n > 1 else ''}") for n in range(1, 10**6))
            kept = path.rename(next(name for name in names if not name.exists()))
            print(f"kept      the earlier {path.name}, as {kept.name}")

def initialise(model, path):
    """Load what fits of a checkpoint into a new model. Returns a sentence that names what does not."""
    checkpoint, own = read_checkpoint(path), model.state_dict()
    given = checkpoint.get("ema", checkpoint["weights"])
    fits = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    if checkpoint["classes"] != model.classes:  # a row of the label table means another class there
        fits.pop("embed.labels.weight", None)
    require(fits, f"Nothing in {path} fits this network: choose the same --arch and --channels.")
    model.load_state_dict(fits, strict=False)
    new = ", ".join([k for k in own if k not in fits][:6]) or "none"
    return f"start     from {path}: {len(fits)} of {len(own)} tensors; new: {new}"

def train(config):
    """Train as the Config says and write model, checkpoints and pictures. Returns the model's path. UserError
    for what the user can mend; SystemExit 130 or 143 after a clean stop by Ctrl-C or SIGTERM."""
    check(config)
    there, data = Path(config.samples_dir).resolve(), Path(config.data_path).resolve()
    require(not there.is_relative_to(data), f"--samples_dir {there} is inside --data_path {data}, and what "
            "is written there would be learned too: choose another folder.")
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    rank, world = join_processes(device)
    slices = world * config.grad_accum
    require(config.batch_size % slices == 0, f"--batch_size {config.batch_size} does not split into {slices} "
            f"({world} processes, --grad_accum {config.grad_accum}): use a multiple of {slices}.")
    deepest = network_size(config.image_size) // {"simple": 16, "resnet18": 32}.get(config.arch, 1)
    require(deepest > 1 or config.batch_size > slices, f"--batch_size {config.batch_size} leaves --arch "
            f"{config.arch} one pixel to normalise by: use {2 * slices} or more, or a larger --image_size.")

    # ---- data, network, optimiser, and where an earlier run left off
    path, resumed = find_resume(config) if config.resume else (None, None)
    if resumed:
        kinds = dict(ema=dict, optimizer=dict, scaler=dict, step=int, seconds=float)
        require(all(isinstance(resumed.get(k), kind) for k, kind in kinds.items()),
                f"{path} is a model to sample from, not all that a run needs to go on: give --resume one of "
                f"{step_files(config.model_path)[0]}, or start a new run with --init_from {path}.")
        config = stored_config(resumed, path, dataclasses.asdict(config), FOR_RESUMING)
    images = load_images(config, device)
    keep_memory()  # not before: large pictures being decoded take much that is not needed again
    if not images.classes:
        config = override(config, guidance=1.0)  # there is nothing to guide by
    torch.manual_seed(config.seed)
    model = build_model(config, images.channels, images.classes)
    origin = initialise(model, config.init_from) if config.init_from else None
    ema = copy.deepcopy(model).eval().requires_grad_(False).to(device)
    model.to(device)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(model.parameters(), weight_decay=config.weight_decay, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    clock = Clock(config, len(images.train))
    if resumed:
        require(resumed.get("data") == images.fingerprint,
                f"{path} was trained on other data ({resumed.get('data')}; here {images.fingerprint}): "
                "restore the pictures, or start a new run with --init_from.")
        load_weights(model, resumed["weights"], path)
        load_weights(ema, resumed["ema"], path)
        try:
            optimizer.load_state_dict(resumed["optimizer"])
            scaler.load_state_dict(resumed["scaler"])
        except Exception as e:  # they look into it without care
            raise UserError(f"{path} has no state of this optimiser ({shown(e)}): use another.") from None
        clock.step, clock.before = resumed["step"], resumed["seconds"]
        origin = f"resuming  {path} at step {clock.step}"
        del resumed  # or it would take memory to the end
    madds, kept = measure(model, device, precision)  # of one more picture
    # A step takes half as much again as it keeps for going back; a weight with its gradient, average and
    # optimiser's moments is five floats.
    memory = 1.5 * kept * config.batch_size / slices + 20 * sum(p.numel() for p in model.parameters())
    free = free_memory(device)
    model.recompute = config.arch == "unet" and memory > 0.7 * free
    diffusion = make_diffusion(config, device)
    net = torch.compile(model) if config.compile else model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)
    cost = f"{madds / 1e9:.3g} G multiply-adds and {kept / 1e6:.3g} MB a picture"
    space = f"about {memory / 1e9:.2g} GB a step, {free / 1e9:.3g} GB free"
    if model.recompute:
        space += "; too much, so stages are computed again going back, for two thirds of it"
    if memory > free:
        space += f"; try --grad_accum {2 * config.grad_accum}"
    machine = f"{describe(device)}, {precision}, processes {world}, torch {torch.__version__}"
    banner(config, images, model, clock, cost, machine, space, origin)
    if config.dry_run:
        return dry_run(net, diffusion, images, config, device, precision, slices, optimizer)
    preview = make_previews(config, images, diffusion, device, precision, world)
    log = RunLog(config, images, clock, device) if rank == 0 else None  # one process tells and writes

    def require_finite(good, what, step):
        last = good or (step_files(config.model_path)[1] or ["none yet"])[-1]
        require(good, f"Non-finite {what} at step {step} (lr {lr:.2g}, {precision}). Last good checkpoint: "
                f"{last}. Try --precision fp32 or a lower --lr.")

    def save():
        state = dict(
            format=FORMAT, config=dataclasses.asdict(config), classes=model.classes, channels=model.channels,
            data=images.fingerprint, held_out=images.held_out.tolist(), step=clock.step,
            seconds=clock.seconds(), weights=dict(model.state_dict()), ema=dict(ema.state_dict()))
        require_finite(all_finite(state["weights"], state["ema"]), "weights, not saved,", clock.step)
        whole = state | dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict())
        step_path = step_files(config.model_path)[0] / f"step_{clock.step:08d}.pt"
        log.wrote(atomic_write(step_path, lambda f: torch.save(whole, f)),  # all that is needed to go on
                  atomic_write(config.model_path, lambda f: torch.save(state, f)))
        for old in step_files(config.model_path)[1][: -config.keep_last]:  # the new ones are durable by now
            if old.resolve() != Path(path or "").resolve():  # never the one resumed from
                old.unlink(missing_ok=True)

    # Kept on the device and read only to print or save: sums of loss and pictures by quarter of the steps t;
    # how many steps in a row were not finite; the first step at which they were too many (-1: none).
    sums = torch.zeros(2, 4, device=device)
    streak, bad_step = torch.zeros((), dtype=torch.int64, device=device), torch.full((), -1, device=device)
    patience = 50 if scaler.is_enabled() else 1  # a scaler finds its scale by overflowing
    begun = drawn = clock.step  # where this process began, and last drew
    lr, grad_norm = 0.0, None  # of the step before
    averages, weights = (list(m.state_dict().values()) for m in (ema, model))  # to gather them takes time
    clock.started = time.monotonic()  # --minutes counts from here

    with stop_requests() as asked, log.bar if log else contextlib.nullcontext():  # closes the bar
        while True:
            # ---- rare things: stop, print, save, draw
            stopping = asked[0] if asked else 0  # the number of the signal
            share = clock.share()
            if world > 1:  # every tenth step: any process can ask to stop, and the first one's clock counts
                if clock.step % 10 == 0 or clock.step in (begun, clock.steps):
                    said = torch.tensor([stopping, share if rank == 0 else 0.0])
                    dist.all_reduce(said, dist.ReduceOp.MAX)
                    said = said.tolist()
                stopping, share = int(said[0]), share if clock.steps else said[1]
            done = share >= 1
            leave = done or stopping
            save_now = leave or clock.step % config.save_every == 0
            if clock.step % config.log_every == 0 or save_now:
                require_finite(bad_step.item() < 0, "loss", bad_step.item())
                if world > 1:
                    dist.all_reduce(sums)
                if log and sums[1].sum() > 0:
                    log.line(sums.tolist(), grad_norm.item(), lr)
                sums.zero_()
            if clock.step > begun and save_now and log:
                save()
            if clock.step > drawn and (clock.step % config.sample_every == 0 or done) and not stopping:
                began, drawn = time.monotonic(), clock.step
                pictures = preview(ema, asked)
                if log and pictures:
                    log.pictures(*pictures)
                clock.ending = max(clock.ending or 0, time.monotonic() - began)
            if leave:
                break
            # ------------------------------------------------------------------------------ one training step
            lr = learning_rate(config, clock.step, share)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for i in range(config.grad_accum):
                number = rank * config.grad_accum + i  # all that is drawn depends on seed, step and slice
                torch.manual_seed(mix(config.seed, 3, clock.step, number))
                x0, y = images.batch(clock.step, config.batch_size, number, slices, device)
                y = torch.where(torch.rand(len(y), device=device) < config.label_dropout, -1, y)
                t = torch.randint(config.timesteps, (len(x0),), device=device)
                eps = torch.randn_like(x0)
                wait = world > 1 and i < config.grad_accum - 1  # gradients meet after the last slice
                with net.no_sync() if wait else contextlib.nullcontext():
                    with autocast(device, precision):
                        losses = diffusion.loss(net, x0, t, eps, y)  # (n,)
                    scaler.scale(losses.mean() / config.grad_accum).backward()
                losses = losses.detach()  # or every step's graph would hang on the sums for ever
                sums.index_add_(1, t * 4 // config.timesteps, torch.stack([losses, torch.ones_like(losses)]))
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            update_ema(averages, weights, clock.step, config.ema_decay)
            streak = torch.where(torch.isfinite(grad_norm + losses.sum()), 0, streak + 1)
            bad_step = torch.where((bad_step < 0) & (streak >= patience), clock.step, bad_step)
            clock.step += 1
            # ------------------------------------------------------------------------------------------------
            if log:
                log.tick()
    if log:
        log.close(stopping)
    if world > 1:
        dist.destroy_process_group()
    if stopping:
        raise SystemExit(128 + stopping)
    return Path(config.model_path)

def make_previews(config, images, diffusion, device, precision, world):
    """preview(ema, asked) -> (t, (clean, noisy, predicted), generated, held-out loss or None); None if it was
    stopped. It takes the same pictures, timesteps and noise each time, so that grids compare."""
    labels = sample_labels(config, images.classes, config.num_samples)
    generator = torch.Generator().manual_seed(mix(config.seed, 4, 1))
    def fixed(rows):  # x0, t spread over 0..T-1, eps, y
        x0, y = images.take(rows, device)
        t = ((torch.arange(len(rows)) + 0.5) * config.timesteps / max(len(rows), 1)).long()
        return x0, t.to(device), torch.randn(x0.shape, generator=generator).to(device), y

    x0, t, eps, y = fixed(spread(images.train, 8))
    held_out = fixed(spread(images.held_out, 256))  # the same four of these
    xt = diffusion.q_sample(x0, t, eps)
    @torch.no_grad()
    def preview(ema, asked):
        with autocast(device, precision):
            pred = diffusion.predict_x0(ema(xt, t, y).float(), xt, t)
            parts = zip(*(v.split(64) for v in held_out)) if len(images.held_out) else ()
            losses = [diffusion.loss(ema, *part) for part in parts]
        drawn = draw(ema, diffusion, config, labels, precision, lambda *_: asked and world == 1)
        held = torch.cat(losses).mean().item() if losses else None
        return None if drawn is None else (t.tolist(), (x0, xt, pred), drawn, held)
    return preview

def banner(config, images, model, clock, cost, machine, space, origin):
    """Say what the run will do, and what to expect of it, before it begins."""
    c, n, abar = config, len(images.train), make_diffusion(config).abar[-2].item()
    counts = torch.bincount(images.labels[images.train] + 1, minlength=len(images.class_names) + 1)
    counts = counts[1:].tolist()  # without those of no class
    classes = [f"{shown(name)} {k}" for name, k in zip(images.class_names, counts)]
    if len(classes) > 12:
        classes[12:] = [f"{len(classes) - 12} more"]
    told = (", ".join(classes) or "none") + ("; not learned" if classes and not model.classes else "")
    seen, length = (clock.steps or 0) * c.batch_size, f"{c.minutes or 0:g} minutes"
    if seen:
        length = f"{clock.steps} steps, {seen:,} pictures, {seen / n:.4g} passes"
    print(f"data      {shown(c.data_path)}: {images.found} found, {n} to train on, {len(images.held_out)} "
          f"held out, {images.bad} unreadable; {c.image_size}x{c.image_size}, {images.channels} channels\n"
          f"classes   {told}\n"
          f"network   {c.arch}, {sum(p.numel() for p in model.parameters()):,} parameters, {cost}\n"
          f"device    {machine}\nmemory    {space}\n"
          f"diffusion T {c.timesteps}, {c.schedule}, predicts {c.predict}, {c.loss} loss, abar_T {abar:.2g}\n"
          f"plan      {length} in batches of {c.batch_size}; a checkpoint every {c.save_every} steps, the "
          f"last {c.keep_last} kept in {step_files(c.model_path)[0].resolve()}")
    notes = [
        (counts and max(counts) > 10 * min(counts),
         "warning: the classes are far out of balance; expect the small ones to look worse"),
        (abar > 0.01, "warning: abar_T is above 0.01: sampling starts from purer noise than the network ever "
         "sees. Leave out --beta_start and --beta_end (a recipe's own go with --schedule cosine), or expect "
         "wrong colours"),
        (n < c.batch_size, f"warning: {n} pictures for a batch of {c.batch_size}: they repeat in it"),
        (n < 1000, f"note: {n} pictures will be learned by heart; from about 1,000 on a model invents"),
        (origin, origin)]  # where the weights come from, if not from chance
    print("".join(f"{note}\n" for holds, note in notes if holds), end="")

class RunLog:
    """What a run tells and writes: progress bar, metrics.jsonl, pictures, and the list of its files."""
    def __init__(self, config, images, clock, device):
        self.config, self.clock, self.device, self.total = config, clock, device, len(images.train)
        self.classes, self.files, self.rows, self.folder = images.classes, {}, [], Path(config.samples_dir)
        self.track = make_tracker(config)
        self.metrics, self.last = self.folder / "metrics.jsonl", (clock.step, time.monotonic())
        there = clock.step and self.metrics.exists()
        earlier = self.metrics.read_text(errors="replace").splitlines()[1:] if there else []
        with contextlib.suppress(ValueError, KeyError, TypeError):  # a line that a crash cut short
            self.rows.extend(row for row in map(json.loads, earlier) if row["step"] <= clock.step)
        folder, steps = step_files(config.model_path)
        name = glob.escape(Path(config.model_path).name)
        for half in [*folder.glob(".step_*.tmp"), *folder.parent.glob(f".{name}.*.tmp")]:
            half.unlink()  # a crash left it
        later = [f for f in steps if f.stem > f"step_{clock.step:08d}"]  # unreadable, or of another branch
        set_aside(*(later if clock.step else [Path(config.model_path), folder]))
        os.remove(atomic_write(folder / "probe", lambda f: None))  # if it cannot be written to, say so now
        head = dict(config=dataclasses.asdict(config), data=images.fingerprint, torch=torch.__version__,
                    torchvision=torchvision.__version__, python=platform.python_version())
        text = "".join(json.dumps(row) + "\n" for row in [head, *self.rows])
        x0, _ = images.take(spread(images.train, 64), "cpu")
        self.wrote(atomic_write(self.metrics, lambda f: f.write(text.encode())),
                   save_grid(to_pixels(x0), self.folder / "dataset_grid.png", config),
                   plot_schedules(config, self.folder / "schedules.png"),
                   plot_forward_process(x0[:1], config, self.folder / "forward_process.png"))
        total, unit = (clock.steps, "step") if clock.steps else (round(clock.limit), "s")
        often = 0.1 if sys.stderr.isatty() else 10  # seconds; in a file every turn of the bar stays
        self.bar = tqdm(total=total, unit=unit, dynamic_ncols=True, smoothing=0.05, mininterval=often)
        self.tick()

    def wrote(self, *paths):
        self.files.update(dict.fromkeys(paths))

    def tick(self):
        at = self.clock.step if self.clock.steps else int(self.clock.seconds())
        self.bar.update(min(at, self.bar.total) - self.bar.n)

    def write(self, **row):
        self.rows.append(dict(step=self.clock.step, **row, seconds=round(self.clock.seconds(), 1)))
        with open(self.metrics, "a") as f:
            f.write(json.dumps(self.rows[-1]) + "\n")
        quarters = {f"loss/quarter_{q + 1}": v for q, v in enumerate(row.pop("loss_quarters", ()))}
        self.track(self.clock.step, {k: v for k, v in (row | quarters).items() if v is not None}, {})

    def line(self, sums, grad_norm, lr):
        """A line of metrics.jsonl: means since the line before."""
        (loss, count), (step, then), self.last = sums, self.last, (self.clock.step, time.monotonic())
        seen, mean = self.clock.step * self.config.batch_size, sum(loss) / sum(count)
        self.write(epoch=round(seen / self.total, 3), loss=mean, lr=lr, grad_norm=grad_norm,
                   loss_quarters=[a / b if b else None for a, b in zip(loss, count)],
                   memory_mb=peak_memory(self.device),
                   pictures_per_s=round((seen - step * self.config.batch_size) / (self.last[1] - then), 1))
        self.bar.set_postfix(loss=f"{mean:.4f}", refresh=False)

    def pictures(self, t, fixed, generated, held_out):
        c, passes = self.config, self.clock.step * self.config.batch_size / self.total
        end = "_epoch" + f"{passes:.2f}".rstrip("0").rstrip(".") + ".png"  # _epoch288.png, or _epoch0.64.png
        columns = grid_columns(len(generated), self.classes)
        rows = dict(zip(("clean", "noisy", "pred"), (to_pixels(x).cpu() for x in fixed)))
        for name, pixels in rows.items():
            self.wrote(save_grid(pixels, self.folder / f"{name}{end}", c, len(pixels)))
        both = dict(compared=plot_rows(rows, [f"t = {n}" for n in t], self.folder / f"compared{end}", c),
                    generated=save_grid(generated, self.folder / f"generated{end}", c, columns))
        self.wrote(*both.values())
        self.track(self.clock.step, {}, both)
        if held_out is not None:
            self.write(held_out_loss=held_out)
        self.wrote(plot_loss(self.rows, self.folder / "loss_graph.png"))
        self.last = self.clock.step, time.monotonic()  # pictures do not count as slow steps

    def close(self, stopped):
        self.bar.close()
        if stopped:
            print(f"Stopped by {signal.Signals(stopped).name} and saved. To go on: --mode train --resume "
                  f"--model_path {self.config.model_path}")
        print(f"memory    at most {peak_memory(self.device)} MB were in use")
        print_files([file for file in self.files if Path(file).exists()])  # old checkpoints are gone

def make_tracker(config):
    """track(step, numbers by name, paths of pictures by name): what --logger tells the tracker."""
    try:
        if config.logger == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter
            writer = SummaryWriter(Path(config.samples_dir, "tensorboard"))
            def track(step, numbers, pictures):
                for name, value in numbers.items():
                    writer.add_scalar(name, value, step)
                for name, path in pictures.items():
                    writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, None, "HWC")
                writer.flush()
            return track
        if config.logger == "wandb":
            import wandb
            Path(config.samples_dir).mkdir(parents=True, exist_ok=True)
            run = wandb.init(project="ddpm", dir=config.samples_dir, config=dataclasses.asdict(config))
            return lambda step, numbers, pictures: run.log(
                numbers | {name: wandb.Image(path) for name, path in pictures.items()}, step=step)
    except ImportError:
        raise UserError(f"--logger {config.logger} needs its package: pip install {config.logger}") from None
    return lambda *_: None

def describe(device):
    """What a device is called, with its memory or threads."""
    if device.type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return f"{device} ({gpu.name}, {gpu.total_memory / 2**30:.0f} GiB)"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.findall(r"model name\s*: (.+)", info) or [platform.processor() or platform.machine()]
    return f"{device.type} ({name[0]}, {torch.get_num_threads()} threads)"

def peak_memory(device):
    """The most memory in use so far, in MB: the GPU's if there is one, else the process's, 0 if unknown."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    with contextlib.suppress(ImportError):  # Windows has none
        from resource import RUSAGE_SELF, getrusage
        return round(getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e6)
    return 0

def measure(model, device, precision):
    """What one more picture costs a step: (multiply-adds going forward, bytes kept for going back)."""
    from torch.utils.flop_counter import FlopCounterMode
    costs = []
    for n in (2, 3):
        x, kept = torch.zeros(n, model.channels, model.image_size, model.image_size, device=device), {}
        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor.detach()  # itself, it could never be freed: a node may keep its own output

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False) as counter, hooks, autocast(device, precision):
            alive = copy.deepcopy(model)(x, x.new_zeros(n, dtype=torch.int64))  # noqa: F841
        costs.append((counter.get_total_flops() // 2, sum(kept.values())))
    return [b - a for a, b in zip(*costs)]

def free_memory(device):
    """Bytes that a run may still take: of the GPU if there is one, else of the machine."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if Path("/proc/meminfo").exists():
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    return math.inf

def dry_run(net, diffusion, images, config, device, precision, slices, optimizer):
    """A step on one slice of a batch: what goes in and, in the same shape, comes out; the memory it takes."""
    x0, y = images.batch(0, config.batch_size, 0, slices, device)
    t = torch.randint(config.timesteps, (len(x0),), device=device)
    with autocast(device, precision):
        loss = diffusion.loss(net, x0, t, torch.randn_like(x0), y).mean()
    loss.backward()
    optimizer.step()
    print(f"dry run   in and out {tuple(x0.shape)}, from {x0.min().item():.2f} to {x0.max().item():.2f}; "
          f"loss {loss.item():.3f}; peak memory {peak_memory(device)} MB. No model was written")

# --------------------------------------------------------------------------------------------------- sampling

def sample_labels(config, classes, n):
    """The class of each of n pictures: those of --classes, else all, in turn; -1 each if there are none."""
    names = [name.strip() for name in config.classes.split(",")] if config.classes else classes
    known = f"its classes are {', '.join(classes)}" if classes else "it was trained without classes"
    for name in names:
        require(name in classes, f"--classes {config.classes}: the model has no class {name!r}; {known}.")
    return [classes.index(names[i % len(names)]) if names else -1 for i in range(n)]

def reverse_timesteps(config):
    """The timesteps that drawing goes down through: from pure noise, or --strength of the way there."""
    T, n = (max(1, round((config.strength or 1) * k)) for k in (config.timesteps, config.sampling_steps))
    return spaced_timesteps(T, n)

def generate(model, diffusion, config, indices, labels, precision="fp32", picture=None, mask=None):
    """Draw the pictures number `indices` with these labels (-1: none); yields (t, x, x0) after each step, x
    and x0 (n, C, H, W) float32. They depend on the Config's seed and sampling settings alone, and on what is
    edited: picture (1, C, H, W) in [-1, 1], and mask (1, 1, H, W), 1 where it is drawn anew, 0 where kept."""
    c, ts = config, reverse_timesteps(config)
    require(c.guidance == 1 or model.classes,
            f"--guidance {c.guidance:g}: the model was trained without classes; leave it out.")
    device, shape = next(model.parameters()).device, (model.channels, model.image_size, model.image_size)
    noise = PictureNoise(c.seed, indices, shape, device)
    if c.interpolate is not None:
        noise = between(*(PictureNoise(s, [0], shape, device) for s in (c.seed, c.interpolate)),
                        torch.tensor(indices, device=device) / max(c.num_samples - 1, 1))
    labels = torch.tensor(labels, device=device)
    denoise, x = make_denoiser(model, diffusion, labels, c.guidance, precision=precision), noise()
    if picture is not None:  # noised part of the way only (SDEdit, Meng et al. 2022, arXiv:2108.01073)
        x = diffusion.q_sample(picture.to(device), torch.tensor(ts[:1], device=device), x)
    if mask is not None:
        denoise = keep_known(denoise, picture.to(device), mask.to(device))
    yield from SAMPLERS[c.sampler](diffusion, denoise, x, ts, noise, c.eta)

def keep_known(denoise, picture, mask):
    """A denoiser that knows the picture where the mask is 0: steps and result agree with it there."""
    return lambda x, t: mask * denoise(x, t) + (1 - mask) * picture

def between(first, second, share):
    """Noise on the great circle from one source of it to another (Song et al. 2021, eq. 67), share[i] of the
    way for picture i: it has unit variance everywhere, and at 0 and 1 it is that of either source."""
    share = share.view(-1, 1, 1, 1)
    def noise():
        a, b = first(), second()
        angle = F.cosine_similarity(a.flatten(), b.flatten(), 0).acos()
        return (((1 - share) * angle).sin() * a + (share * angle).sin() * b) / angle.sin()
    return noise

def draw(model, diffusion, config, labels, precision, watch=lambda *_: None, **edit):
    """A picture for each label, some at a time, shared out among torchrun's processes: uint8 (N, C, H, W) on
    the CPU of each. watch(start, t, x) sees each step of the pictures from number start on; None if it says
    stop by a true value, which it must not with several processes. edit: picture and mask of `generate`."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(*(math.ceil(len(labels) * r / world) for r in (rank, rank + 1)))
    parts = [torch.empty(0, model.channels, model.image_size, model.image_size, dtype=torch.uint8)]
    for start in range(0, len(mine), config.sample_batch_size):
        some = mine[start : start + config.sample_batch_size]
        own = [labels[i] for i in some]
        for t, x, _ in generate(model, diffusion, config, some, own, precision, **edit):
            if watch(some[0], t, x):
                return None
        parts.append(to_pixels(x).cpu())
    shares = [torch.cat(parts)] * world
    if world > 1:
        dist.all_gather_object(shares, shares[rank])
    return torch.cat(shares)

def find_model(config):
    """The model to sample from: --model_path, or the one that comes with the program while there is none."""
    shipped = HERE / "saved_models" / "animals.pt"
    if config.model_path != Config.model_path or Path(config.model_path).exists() or not shipped.exists():
        return config.model_path
    print(f"There is no {config.model_path} yet: drawing with the model that comes with ddpm.py.")
    return str(shipped)

def sample(config):
    """Draw pictures with the model at config.model_path and write them. Returns them: uint8 (N, C, H, W)."""
    path, given = find_model(config), {name: getattr(config, name) for name in FOR_SAMPLING}
    device = choose_device(config.device)
    model, diffusion, stored = load_model(path, device, config.ema)
    c = override(stored, **given)
    if not model.classes and c.guidance == Config.guidance:  # not asked for, nothing to guide by
        c = override(c, guidance=1.0)
    check(c)
    keep_memory()
    rank, world = join_processes(device)
    precision = choose_precision(c.precision, device)
    labels = sample_labels(c, model.classes, c.num_samples)
    labels = labels if c.interpolate is None else labels[:1] * len(labels)
    edit = dict(picture=load_picture(c.init_image, c.image_size, model.channels)) if c.init_image else {}
    if edit and not c.strength:
        c = override(c, strength=1.0 if c.mask else 0.5)
    if c.mask:
        edit["mask"] = (load_picture(c.mask, c.image_size, 1) > 0).float()
    for place in filter(None, (c.samples_dir, c.individual)):  # if that cannot be, say so before drawing
        Path(place).mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    steps = len(reverse_timesteps(c)) - 1
    print(f"model     {path} ({digest}), {'averaged (EMA)' if c.ema else 'plain'} weights of "
          f"{shown(c.data_path)}\ndrawing   {c.num_samples} pictures, {c.sampler}, {steps} steps, seed "
          f"{c.seed}, guidance {c.guidance:g}, on {describe(device)} in {precision}")
    way = []  # (t, x) of the first few pictures
    def watch(start, t, x):
        bar.update()
        if start == 0:
            way.append((t, to_pixels(x[:8])))  # on the GPU still, so as not to wait for it at every step

    batches = math.ceil(c.num_samples / world / c.sample_batch_size)
    with tqdm(total=batches * steps, unit="step", dynamic_ncols=True, disable=rank > 0) as bar:
        pixels = draw(model, diffusion, c, labels, precision, watch, **edit)
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return crop(pixels, c)
    way = [(t, x.cpu()) for t, x in way]
    folder, names = Path(c.samples_dir), c.classes.split(",") if c.classes else model.classes
    text = dict(seed=c.seed, sampler=c.sampler, steps=steps, eta=c.eta, guidance=c.guidance,
                classes=c.classes or "all", model=digest, version=torch.__version__)
    text |= {name: Path(str(getattr(c, name))).name for name in EDITING if getattr(c, name) is not None}
    drawn = [model.classes[i] if i >= 0 else "" for i in labels]
    files = [plot_chain(way, drawn, folder / "denoising_steps.png", c, text)]
    if c.interpolate is None:
        some = pixels[:2500]  # who would look at more
        columns = grid_columns(len(some), names)
        files.append(save_grid(some, folder / "generated_sample.png", c, columns, text))
    else:  # a strip, and there and back again
        files += [save_grid(pixels, folder / "interpolation.png", c, len(pixels), text),
                  save_gif([*pixels[:, None], *pixels[1:-1, None].flip(0)], folder / "interpolation.gif", c)]
    if c.gif:
        files.append(save_gif([x for _, x in way], folder / "denoising.gif", c))
    pixels = crop(pixels, c)
    if c.individual:
        each = enumerate(to_images(pixels))
        files += [save_png(image, Path(c.individual, f"{i:05d}.png"), text) for i, image in each]
    print_files(files)
    return pixels

# --------------------------------------------------------------------------------------------------- pictures

def crop(pixels, config):
    """Pictures (..., H, W) without the border that those of 28 pixels are padded with."""
    return torchvision.transforms.functional.center_crop(pixels, config.image_size)

def spread(items, n):
    """n of the items, or all if there are fewer, at even distances from the first to the last."""
    return items[np.linspace(0, len(items) - 1, min(n, len(items))).round().astype(int)]

def grid_columns(n, classes):
    """Columns for n pictures: a multiple of the classes, so that each is of one; else near square."""
    root = math.ceil(math.sqrt(n))
    full = next((columns for columns in range(root, 2 * root) if n % columns == 0), root)
    return max(1, root // len(classes)) * len(classes) if 2 <= len(classes) <= min(n, 12) else full

def to_images(pixels):
    """(N, C, H, W) uint8 -> PIL pictures, grey or in colour."""
    return [Image.fromarray(p[0] if len(p) == 1 else p.transpose(1, 2, 0)) for p in pixels.numpy()]

def save_png(image, path, text=None):
    """Write a PIL picture, with text entries in the file. Returns the absolute path."""
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(f"ddpm:{key}", str(value))
    return atomic_write(path, lambda f: image.save(f, "PNG", pnginfo=info))

def save_grid(pixels, path, config, columns=None, text=None):
    """Write pictures (N, C, H, W) uint8 as one PNG, small ones magnified. Returns the absolute path."""
    pixels = crop(pixels, config)
    zoom = max(1, 64 // pixels.shape[-1])
    pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    grid = torchvision.utils.make_grid(pixels, columns or math.ceil(math.sqrt(len(pixels))), pad_value=255)
    return save_png(to_images(grid[None])[0], path, text)

def save_gif(frames, path, config):
    """Write the pictures (n, C, H, W) of each step as an animation resting on the last. Returns the path."""
    frames = [crop(frames[i], config) for i in spread(np.arange(len(frames)), 60)]
    rows = [torchvision.utils.make_grid(frame, len(frame), pad_value=255) for frame in frames]
    first, *rest = to_images(torch.stack(rows))
    more = dict(save_all=True, append_images=rest, duration=[80] * len(rest) + [2000], loop=0)  # milliseconds
    return atomic_write(path, lambda f: first.save(f, "GIF", **more))

COLOURS = ("#1b6ca8", "#e07b39", "#3c8d5a", "#9b4f96", "#8a7a1f")

def new_figure(width, height):
    """An empty figure of so many inches. Without pyplot, so that no window system is looked for."""
    from matplotlib.figure import Figure  # it takes a second to import, and --help needs no plots
    return Figure(figsize=(width, height), layout="constrained")

def save_figure(figure, path, text=None):
    text = {f"ddpm:{key}": str(value) for key, value in (text or {}).items()}
    return atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=110, metadata=text))

def plot_pair(titles, xlabel):
    """A figure with two plots side by side, in the look of all our plots."""
    figure = new_figure(9.2, 3.4)
    axes = figure.subplots(1, 2)
    for a, title in zip(axes, titles):
        a.set_title(title, fontsize=11)
        a.set_xlabel(xlabel)
        a.spines[["top", "right"]].set_visible(False)
        a.grid(alpha=0.25)
    return figure, axes

def plot_rows(rows, titles, path, config, text=None):
    """Rows of pictures by name, each (columns, C, H, W) uint8, with a title a column. Returns the path."""
    figure = new_figure(0.95 * len(titles), 0.95 * len(rows) + 0.3)
    figure.get_layout_engine().set(w_pad=0.015, h_pad=0.015, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(titles), squeeze=False)
    for line, (name, row) in zip(axes, rows.items()):
        for a, picture in zip(line, to_images(crop(row, config))):
            a.imshow(picture, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            a.set(xticks=[], yticks=[])
            a.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=10)
    for a, title in zip(axes[0], titles):
        a.set_title(title, fontsize=10, pad=3)
    return save_figure(figure, path, text)

def plot_schedules(config, path):
    """abar_t and the log signal-to-noise ratio of every schedule, the chosen one drawn thick."""
    titles = [r"signal that is left, $\bar\alpha_t$", "log signal-to-noise ratio"]
    figure, (left, right) = plot_pair(titles, "timestep t")
    for kind, colour in zip(FIELDS["schedule"].metadata["choices"], COLOURS):
        chosen = kind == config.schedule
        given = (config.beta_start, config.beta_end) if chosen else ()
        abar = Diffusion(make_betas(kind, config.timesteps, *given)).abar[:-1]
        style = dict(color=colour, lw=3 if chosen else 1.2, label=f"{kind}, chosen" if chosen else kind)
        left.plot(abar, **style)
        right.plot((abar / (1 - abar)).log(), **style)
    right.set_ylim(-14, 11)
    left.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)

def plot_forward_process(x0, config, path):
    """One picture (1, C, H, W), clean and noised at t = 100, 300, 500, ..., T-1; evenly spaced if T < 500."""
    T = config.timesteps
    ts = [*(range(100, T - 1, 200) if T >= 500 else [round(T * k / 6) for k in range(1, 6)]), T - 1]
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(config.seed))
    row = torch.cat([x0, make_diffusion(config).q_sample(x0, torch.tensor(ts), eps)])
    return plot_rows({"": to_pixels(row)}, ["clean"] + [f"t = {t}" for t in ts], path, config)

def plot_chain(way, names, path, config, text=None):
    """The reverse process. way: list of (t, (n, C, H, W) uint8 after the step from t); names: classes."""
    some = spread(np.arange(len(way)), 9)
    titles = [f"t = {way[i + 1][0]}" if i + 1 < len(way) else "result" for i in some]  # the level they are at
    rows = torch.stack([way[i][1][:5] for i in some], dim=1)  # (n, columns, C, H, W)
    named = {f"{name} {i + 1}": row for i, (name, row) in enumerate(zip(names, rows))}
    return plot_rows(named, titles, path, config, text)

def smooth(values):
    """The mean of each value and its neighbours: up to one in forty of all either side, fewer at the ends."""
    reach = [min(i, len(values) // 40) for i in range(len(values))]
    return [np.mean(values[i - n : i + n + 1]) for i, n in enumerate(reach)]

def plot_loss(rows, path):
    """The loss, held-out too, and by quarter of the timesteps. rows: lines of metrics.jsonl."""
    from matplotlib.ticker import LogLocator  # not at the top, for the reason in `new_figure`
    figure, (left, right) = plot_pair(["loss", "loss by quarter of the timesteps"], "step")
    lines, held = [r for r in rows if "loss" in r], [r for r in rows if "held_out_loss" in r]
    steps, loss = [r["step"] for r in lines], [r["loss"] for r in lines]
    left.plot(steps, loss, color=COLOURS[0], alpha=0.25, lw=1)
    left.plot(steps, smooth(loss), color=COLOURS[0], lw=2, label="training, smoothed")
    if held:
        left.plot([r["step"] for r in held], [r["held_out_loss"] for r in held], "o-", color=COLOURS[1], ms=4,
                  label="held out (EMA weights)")
    for q, name in enumerate(("t < T/4: detail", "T/4 to T/2", "T/2 to 3T/4", "t > 3T/4: composition")):
        known = [(r["step"], r["loss_quarters"][q]) for r in lines if r["loss_quarters"][q] is not None]
        x, y = [s for s, _ in known], smooth([v for _, v in known])
        right.plot(x, y, color=COLOURS[q], lw=1.8, label=name)
    for a in (left, right):
        a.set_yscale("log")
        low, high = a.get_ylim()
        a.set_ylim(low, high * (high / low) ** 0.25)  # room for the legend
        ticks = LogLocator(subs=(1, 2, 5) if high > 100 * low else (1, 2, 3, 5, 7))  # or they would touch
        a.yaxis.set(major_locator=ticks, major_formatter="{x:g}", minor_formatter="")
        a.legend(fontsize=8, frameon=False, loc="upper right", ncols=2)
    return save_figure(figure, path)

def print_files(files):
    """Say where everything is; of very many files, the first and the folders."""
    print("Wrote:", *list(files)[:40], sep="\n  ")
    if len(files) > 40:
        print(f"  and {len(files) - 40} more in {', '.join(sorted({str(Path(f).parent) for f in files}))}")

# ----------------------------------------------------------------------------------------------- command line

class Parser(argparse.ArgumentParser):
    def error(self, message):
        """One line and exit code 2, with the nearest flag for one that does not exist."""
        unknown = re.match(r"unrecognized arguments: (--\w+)", message)
        near = difflib.get_close_matches(unknown[1], self._option_string_actions, 1) if unknown else []
        hint = f"did you mean {near[0]}?" if near else f"see python {self.prog} --help"
        print(f"error: {message}; {hint}", file=sys.stderr)
        raise SystemExit(2)

def integers(text):
    """The type of flags that take a list: numbers between blanks or commas."""
    return tuple(int(part) for part in text.split(","))

def parse(parser, groups, argv):
    """What a command line gives, {name: value}. groups: {heading: names of fields of Config}, each a flag."""
    for group, names in groups.items():
        section = parser.add_argument_group(group)
        for name in names:
            f, said = FIELDS[name], FIELDS[name].metadata["meaning"].replace("%", "%%")
            if f.type is bool:
                said += f"; --no_{name} turns it off" if f.default else ""
                for word, value, help in ((name, True, said), (f"no_{name}", False, argparse.SUPPRESS)):
                    section.add_argument(f"--{word}", dest=name, action="store_const", const=value, help=help)
                continue
            kind, default = (*typing.get_args(f.type), f.type)[0], f.default  # int of int | None
            more = dict(type=kind, choices=list(PRESETS) if name == "preset" else f.metadata["choices"])
            if not more["choices"]:
                more["metavar"] = {int: "N", float: "X", str: "NAMES" if name == "classes" else "PATH"}[kind]
            if name == "resume":
                more |= dict(nargs="?", const="latest")
            if isinstance(default, tuple):
                more, default = more | dict(nargs="+", type=integers), " ".join(map(str, default))
            said += "" if default in (None, "") else f" (default: {default})"
            section.add_argument(f"--{name}", help=said, **more)
    # Flags may be written with - for _.
    argv = [re.sub(r"^--[\w-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in argv]
    given = {name: value for name, value in vars(parser.parse_args(argv)).items() if value is not None}
    return {name: sum(v, ()) if isinstance(v, list) else v for name, v in given.items()}

def run(work):
    """Do a command's work and return its exit code. What the user can mend is told in a sentence."""
    with contextlib.suppress(AttributeError):  # a terminal may lack letters that names of files have
        sys.stdout.reconfigure(errors="backslashreplace")
    told = sys.stdout if os.environ.get("RANK", "0") == "0" else open(os.devnull, "w")  # one process tells
    try:
        with contextlib.redirect_stdout(told):
            work()
        return 0
    except UserError as e:
        message = str(e)  # not e: with it, all that its frames hold would live on
    except (MemoryError, RuntimeError) as e:
        said = f"{type(e).__name__} {e}".lower()
        if re.search("memoryerror|(out of|enough|allocate) memory", said):
            gpu = "GPU " if isinstance(e, torch.OutOfMemoryError) else ""
            message = (f"Out of {gpu}memory. Try a larger --grad_accum, or less --image_size, --channels, "
                       "--sample_batch_size.")
        elif dist.is_initialized() and re.search("gloo|nccl|timed out", said):
            message = (f"The processes lost each other ({str(e).splitlines()[0]}). Mend what another one "
                       "says, or the network between them; then start again (training: with --resume).")
        else:
            raise
    except OSError as e:
        message = (f"{e.strerror or e} ({e.filename or 'while writing a file'}). What was saved is safe. "
                   "Make room or permit it, or choose another --model_path, --samples_dir or --download_dir.")
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    print(f"error: {shown(message)}", file=sys.stderr)
    return 1

def main(argv=None):
    """Run a command line and return its exit code."""
    parser = Parser("ddpm.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("--mode", choices=("train", "sample"), required=True, help="learn, or draw pictures")
    given = parse(parser, GROUPS, sys.argv[1:] if argv is None else argv)
    mode = given.pop("mode")
    def work():
        if mode == "sample":
            path = find_model(override(Config(), **given))
            config = drawing_config(read_checkpoint(path), path, given)
            sample(override(config, model_path=path))
        elif "resume" in given:
            path, checkpoint = find_resume(override(Config(), **given))
            config = stored_config(checkpoint, path, given | dict(resume=str(path)), FOR_RESUMING)
            del checkpoint  # train reads it again, and this one would take memory to the end
            train(config)
        else:
            train(preset(given.get("preset", Config.preset), **given))
    return run(work)

if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # clean up on the way out, as after Ctrl-C
    raise SystemExit(main())
