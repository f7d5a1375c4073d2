"""ddpm.py: a denoising diffusion model in one file. It trains on a folder of pictures and draws new ones.

    python ddpm.py --mode train                                  # the five animals, ten minutes on two CPU cores
    python ddpm.py --mode sample                                 # draws with the model just trained
    python ddpm.py --mode train --data_path MY_PICTURES          # your own, flat or one sub-folder a class
    torchrun --nproc_per_node=8 ddpm.py --mode train --preset cifar10

The file reads from top to bottom: settings, schedules, diffusion process, samplers, networks, data, EMA and
checkpoints, training, sampling, pictures, command line. RESULT_LINE

Papers, cited below by name:
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
import difflib
import hashlib
import json
import math
import os
import platform
import signal
import sys
import time
import typing
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps, PngImagePlugin
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
FORMAT = 1  # of checkpoints; raised when an older file can no longer be read as it is


class UserError(Exception):
    """Something the user can mend. The message names the thing, what was expected and the remedy."""


# ---------------------------------------------------------------------------------------------------- settings


def flag(group, default, meaning, *, low=None, above=None, high=None, choices=None):
    """One setting: its group in --help, default, meaning, and the values it may take (bounds, or choices)."""
    limits = dict(group=group, meaning=meaning, low=low, above=above, high=high, choices=choices)
    return dataclasses.field(default=default, metadata=limits)


DATASETS = ("cifar10", "fashion_mnist", "mnist", "flowers102", "celeba")


@dataclass
class Config:
    """Every setting with its default, which is the `animals` recipe, and its meaning.

    The command line is made from these lines; a checkpoint carries them.
    """

    preset: str = flag("recipe", "animals", "start from this recipe; any other flag overrides it")

    data_path: str = flag("data", "animal_data", f"folder of pictures (flat, or a sub-folder a class), or one of {' '.join(DATASETS)}")
    download_dir: str = flag("data", "data", "folder for downloads and for the cache of decoded pictures")
    image_size: int = flag("data", 64, "side of the square pictures, in pixels", low=8, high=1024)
    max_images: int | None = flag("data", None, "use at most this many pictures, chosen by --seed (default: all)", low=1)
    hflip: bool = flag("data", True, "mirror half of the training pictures, left to right")
    holdout: float = flag("data", 0.0, "share of the pictures kept out of training, to measure on", low=0, high=0.9)

    timesteps: int = flag("diffusion", 1000, "number of noise levels T", low=10, high=100_000)
    schedule: str = flag("diffusion", "cosine", "how noise grows with t", choices=("linear", "cosine", "quadratic", "exponential", "sigmoid"))
    beta_start: float | None = flag("diffusion", None, "first beta (default: 1e-4 * 1000 / T)", above=0, high=0.999)
    beta_end: float | None = flag("diffusion", None, "last beta (default: 0.02 * 1000 / T)", above=0, high=0.999)
    predict: str = flag("diffusion", "v", "what the network predicts", choices=("eps", "x0", "v"))
    loss: str = flag("diffusion", "l2", "distance between prediction and target", choices=("l2", "l1", "huber"))
    min_snr: float = flag("diffusion", 0.0, "cap gamma of min-SNR weighting; 5 is usual, 0 is off", low=0)

    arch: str = flag("network", "unet", "network", choices=("unet", "simple", "resnet18"))
    channels: int = flag("network", 32, "width of the first stage (unet, simple)", low=4, high=4096)
    channel_mults: tuple[int, ...] = flag("network", (1, 2, 3, 4), "width of each stage, in units of --channels (unet)", low=1, high=64)
    res_blocks: int = flag("network", 1, "residual blocks a stage on the way down; one more on the way up (unet)", low=1, high=16)
    attention: str = flag("network", "full", "attention inside the stages of --attention_at (unet)", choices=("full", "linear", "none"))
    attention_at: tuple[int, ...] = flag("network", (8,), "sides of the feature maps that get attention, in pixels (unet)", low=1)
    dropout: float = flag("network", 0.0, "dropout inside residual blocks (unet)", low=0, high=0.95)
    class_cond: bool = flag("network", True, "learn the classes, where the data has two or more")
    label_dropout: float = flag("network", 0.1, "share of training pictures whose label is hidden, for guidance", low=0, high=1)
    pretrained: bool = flag("network", False, "start the encoder from ImageNet weights, downloaded (resnet18)")

    steps: int | None = flag("training", 2000, "length of training in optimiser steps", low=1)
    epochs: float | None = flag("training", None, "length of training in passes over the pictures", above=0)
    minutes: float | None = flag("training", None, "length of training in minutes of wall clock", above=0)
    batch_size: int = flag("training", 32, "pictures an optimiser step sees, over all processes and slices", low=1)
    grad_accum: int = flag("training", 1, "slices a batch is computed in, one after the other, to save memory", low=1)
    lr: float = flag("training", 1e-3, "learning rate after warm-up", above=0, high=10)
    optimizer: str = flag("training", "adamw", "optimiser", choices=("adam", "adamw"))
    weight_decay: float = flag("training", 0.0, "weight decay (decoupled with adamw)", low=0, high=10)
    lr_schedule: str = flag("training", "cosine", "learning rate after warm-up: as it is, or falling to 0", choices=("constant", "cosine"))
    warmup_steps: int = flag("training", 100, "steps over which the rate rises from 0", low=0)
    grad_clip: float = flag("training", 1.0, "largest norm of the gradient; 0 is off", low=0)
    ema_decay: float = flag("training", 0.999, "decay of the averaged weights, at most; 0 is no averaging", low=0, high=0.999999)
    precision: str = flag("training", "auto", "arithmetic in the network; auto is bf16 where the hardware gains by it", choices=("auto", "fp32", "bf16", "fp16"))
    compile: bool = flag("training", False, "torch.compile the network: minutes at first, faster steps after")
    device: str = flag("training", "auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    seed: int = flag("training", 0, "seed of everything random", low=0, high=2**63 - 1)

    resume: str | None = flag("running", None, "go on with a run: a step checkpoint's path, or nothing for the latest")
    init_from: str | None = flag("running", None, "start a new run from the weights of this checkpoint")
    save_every: int = flag("running", 500, "steps between checkpoints", low=1)
    sample_every: int = flag("running", 500, "steps between pictures in --samples_dir", low=1)
    log_every: int = flag("running", 20, "steps between lines of metrics.jsonl", low=1)
    keep_last: int = flag("running", 2, "step checkpoints to keep", low=1)
    dry_run: bool = flag("running", False, "check data, shapes and memory on one batch, then exit")

    model_path: str = flag("places", "saved_models/denoise_model.pt", "the model: written by train, read by sample")
    samples_dir: str = flag("places", "samples", "folder for pictures, plots and metrics.jsonl")

    num_samples: int = flag("sampling", 25, "pictures to draw", low=1)
    sample_batch_size: int = flag("sampling", 64, "pictures drawn at a time", low=1)
    sampler: str = flag("sampling", "dpm++", "way back from noise", choices=("ddpm", "ddim", "dpm++"))
    sampling_steps: int = flag("sampling", 20, "network evaluations a picture, at most T", low=1)
    eta: float = flag("sampling", 0.0, "fresh noise in ddim: 0 none, 1 as much as ddpm", low=0, high=1)
    classes: str | None = flag("sampling", None, "draw these classes only, as in lion,tiger (default: all, in turn)")
    guidance: float = flag("sampling", 1.0, "strength of classifier-free guidance; 1 is off", low=0, high=100)
    ema: bool = flag("sampling", True, "draw with the averaged weights")
    individual: str | None = flag("sampling", None, "also write every picture by itself, into this folder")
    gif: bool = flag("sampling", False, "also write the reverse process as an animation")


LENGTHS = ("steps", "epochs", "minutes")
FIELDS = {f.name: f for f in dataclasses.fields(Config)}
TYPES = typing.get_type_hints(Config)

# What a resumed run may change: how long, where to and how it runs, not what it computes.
MAY_CHANGE = {f for f in FIELDS if FIELDS[f].metadata["group"] in ("running", "places", "sampling")}
MAY_CHANGE |= {*LENGTHS, "grad_accum", "compile", "device", "download_dir"}
# What may be said to --mode sample: the rest is in the checkpoint.
FOR_SAMPLING = {f for f in FIELDS if FIELDS[f].metadata["group"] in ("places", "sampling")}
FOR_SAMPLING |= {"device", "precision", "seed", "compile"}

PRESETS = {
    "animals": {},
    "fashion_mnist": dict(
        data_path="fashion_mnist", image_size=28, hflip=False, channels=32, channel_mults=(1, 2, 2),
        attention_at=(8,), lr=2e-3, batch_size=128, steps=3000, num_samples=50,
    ),
    "animals_cnn": dict(
        schedule="linear", predict="x0", arch="simple", class_cond=False, optimizer="adam", batch_size=32,
        epochs=600, num_samples=25,
    ),
    "cifar10_resnet18": dict(
        data_path="cifar10", timesteps=500, schedule="cosine", predict="eps", arch="resnet18", lr=1e-4,
        batch_size=10, epochs=20, warmup_steps=0, weight_decay=0.01, class_cond=False, num_samples=64,
    ),
    "fashion_mnist_annotated": dict(
        data_path="fashion_mnist", image_size=28, timesteps=200, schedule="linear", beta_start=1e-4, beta_end=0.02,
        predict="eps", loss="huber", channels=28, channel_mults=(1, 2, 4), res_blocks=2, attention="linear",
        attention_at=(32, 16, 8), class_cond=False, optimizer="adam", batch_size=128, epochs=5, lr_schedule="constant",
        warmup_steps=0, num_samples=64,
    ),
    "fashion_mnist_small": dict(
        data_path="fashion_mnist", image_size=28, schedule="linear", predict="eps", hflip=False, channels=16,
        channel_mults=(1, 2, 2), attention="none", class_cond=False, optimizer="adam", batch_size=128, epochs=5,
        num_samples=64,
    ),
    "flowers_simple": dict(
        data_path="flowers102", max_images=1000, timesteps=600, schedule="linear", beta_start=1e-4, beta_end=0.02,
        predict="eps", loss="l1", arch="simple", class_cond=False, optimizer="adam", batch_size=64, epochs=25,
        lr_schedule="constant", warmup_steps=0, num_samples=16,
    ),
    "flowers_attention": dict(
        data_path="flowers102", max_images=1000, timesteps=300, schedule="linear", beta_start=1e-4, beta_end=0.02,
        predict="eps", loss="l1", channels=32, channel_mults=(1, 2, 4, 8), attention="linear", attention_at=(32, 16, 8),
        class_cond=False, optimizer="adam", batch_size=64, epochs=100, lr_schedule="constant", warmup_steps=0,
        num_samples=16,
    ),
    "cifar10": dict(
        data_path="cifar10", image_size=32, schedule="linear", predict="eps", channels=128, channel_mults=(1, 2, 2, 2),
        res_blocks=2, attention_at=(16,), dropout=0.1, class_cond=False, optimizer="adam", lr=2e-4,
        lr_schedule="constant", warmup_steps=5000, ema_decay=0.9999, batch_size=128, steps=800_000,
        save_every=5000, sample_every=5000, log_every=100, num_samples=64, sampling_steps=50,
    ),
}


def override(config, **given):
    """A copy of `config` with the given settings; a given length replaces any other. UserError on a clash."""
    unknown = [name for name in given if name not in FIELDS]
    if unknown:
        raise UserError(f"There is no setting {unknown[0]!r}. The settings are the fields of Config.")
    lengths = [name for name in LENGTHS if given.get(name) is not None]
    if len(lengths) > 1:
        raise UserError(f"--{lengths[0]} and --{lengths[1]} both set the length of training: give one of them.")
    if lengths:
        given = {**dict.fromkeys(LENGTHS), **given}
    return dataclasses.replace(config, **given)


def preset(name, **overrides):
    """The Config of a recipe in PRESETS, with any settings overridden: preset("cifar10", steps=10)."""
    if name not in PRESETS:
        raise UserError(f"There is no preset {name!r}: choose from {', '.join(PRESETS)}.")
    return override(override(Config(preset=name), **PRESETS[name]), **overrides)


def check(config):
    """Raise UserError for the first setting that is out of its range or clashes with another."""
    for name, f in FIELDS.items():
        limits, values = f.metadata, getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if value is None or isinstance(value, bool):
                continue
            if limits["choices"] and value not in limits["choices"]:
                raise UserError(f"--{name} {value}: choose from {', '.join(limits['choices'])}.")
            if isinstance(value, float) and not math.isfinite(value):
                raise UserError(f"--{name} {value}: a finite number is needed.")
            if limits["low"] is not None and value < limits["low"]:
                raise UserError(f"--{name} {value} is too small: {limits['low']} or more is needed.")
            if limits["above"] is not None and value <= limits["above"]:
                raise UserError(f"--{name} {value} is too small: more than {limits['above']} is needed.")
            if limits["high"] is not None and value > limits["high"]:
                raise UserError(f"--{name} {value} is too large: {limits['high']} or less is needed.")
    if all(getattr(config, name) is None for name in LENGTHS):
        raise UserError("Training has no length: give one of --steps, --epochs and --minutes.")
    if config.schedule == "cosine" and (config.beta_start or config.beta_end):
        raise UserError("--beta_start and --beta_end mean nothing to --schedule cosine: leave them out.")
    start, end = beta_range(config.timesteps, config.beta_start, config.beta_end)
    if start > end:
        raise UserError(f"--beta_start {start:g} is above --beta_end {end:g}: noise has to grow.")
    if config.sampling_steps > config.timesteps:
        raise UserError(f"--sampling_steps {config.sampling_steps} is more than the {config.timesteps} timesteps of "
                        f"the model: give at most {config.timesteps}.")
    if config.resume and config.init_from:
        raise UserError("--resume goes on with a run and --init_from starts one: give one of them.")
    if config.batch_size % config.grad_accum:
        raise UserError(f"--batch_size {config.batch_size} does not split into --grad_accum {config.grad_accum} "
                        "equal slices: change one of them.")
    side, stride = network_size(config), network_stride(config)
    if side % stride:
        lower = max(side // stride, 1) * stride
        raise UserError(f"--image_size {side} must be divisible by {stride}: use {lower} or {lower + stride}.")
    if config.arch == "unet":
        if config.channels % 2:
            raise UserError(f"--channels {config.channels} must be even: half are sines, half cosines of t.")
        sides = [side >> i for i in range(len(config.channel_mults))]
        for s in config.attention_at if config.attention != "none" else ():
            if s not in sides:
                raise UserError(f"--attention_at {s}: the feature maps have sides {', '.join(map(str, sides))}.")


def network_size(config):
    """Side of the pictures inside the network: 28 pixels are padded to 32, and cropped back when saved."""
    return 32 if config.image_size == 28 else config.image_size


def network_stride(config):
    """The number that picture sides must be divisible by."""
    return {"unet": 2 ** (len(config.channel_mults) - 1), "simple": 16, "resnet18": 32}[config.arch]


# --------------------------------------------------------------------------------------------------- schedules


def beta_range(T, start=None, end=None):
    """First and last beta: given ones literally, else DDPM's 1e-4 and 0.02 times 1000/T, at most 0.999."""
    scaled = [1e-4 * 1000 / T, 0.02 * 1000 / T]
    return tuple(min(s if given is None else given, 0.999) for s, given in zip(scaled, (start, end), strict=True))


def make_betas(kind, T, start=None, end=None):
    """Noise schedule: the variance beta_t added at each step.

    Args: kind, one of linear, cosine, quadratic, exponential, sigmoid; T >= 1, the number of steps; start and end,
    the first and last beta (see `beta_range`; cosine has none).
    Returns: (T,) float64 in (0, 0.999].
    """
    start, end = beta_range(T, start, end)
    ramp = torch.linspace(0, 1, T, dtype=torch.float64)  # 0 at t = 0, 1 at t = T-1
    if kind == "linear":  # Ho et al. 2020, section 4
        betas = start + (end - start) * ramp
    elif kind == "quadratic":  # Song et al. 2021's code; "scaled linear" in latent diffusion
        betas = (start**0.5 + (end**0.5 - start**0.5) * ramp) ** 2
    elif kind == "exponential":  # a geometric sequence, as the noise levels of Song & Ermon 2019 (arXiv:1907.05600)
        betas = start * (end / start) ** ramp
    elif kind == "sigmoid":  # an S-curve between the ends, as in GeoDiff (Xu et al. 2022, arXiv:2203.02923)
        betas = start + (end - start) * torch.sigmoid(12 * ramp - 6)
    elif kind == "cosine":  # Nichol & Dhariwal 2021, eq. 17, with s = 0.008
        f = torch.cos((torch.arange(T + 1, dtype=torch.float64) / T + 0.008) / 1.008 * math.pi / 2) ** 2
        betas = 1 - f[1:] / f[:-1]
    else:
        raise UserError(f"There is no schedule {kind!r}: choose from {', '.join(FIELDS['schedule'].metadata['choices'])}.")
    return betas.clamp(max=0.999)


# ------------------------------------------------------------------------------------------- diffusion process


class Diffusion:
    """The forward process q and what follows from it. Timesteps t run over 0..T-1; -1 stands for clean data.

    `abar[t]` is the paper's alpha-bar (alphas_cumprod elsewhere), in float64 with one trailing 1: abar[-1] = 1.
    `predict` says what the network gives: the noise eps, the clean picture x0, or v (Salimans & Ho 2022).
    """

    def __init__(self, betas, predict="eps", loss="l2", min_snr=0.0, device="cpu"):
        self.T, self.predict, self.loss_kind = len(betas), predict, loss
        self.abar = torch.cat([torch.cumprod(1 - betas.double().cpu(), 0), torch.ones(1, dtype=torch.float64)])
        snr = self.abar[:-1] / (1 - self.abar[:-1])
        weight = torch.ones_like(snr)
        if min_snr:  # Hang et al. 2023, section 3.4: min(snr, gamma) on x0, carried over to the other targets
            weight = snr.clamp(max=min_snr) / {"x0": 1.0, "eps": snr, "v": snr + 1}[predict]
        # The tables that training looks things up in, by a tensor of t, on the device: (T,) float32 each.
        tables = (self.abar[:-1].sqrt(), (1 - self.abar[:-1]).sqrt(), weight)
        self.sqrt_abar, self.sqrt_1m_abar, self.weight = (table.float().to(device) for table in tables)

    def _scales(self, t):
        return self.sqrt_abar[t].view(-1, 1, 1, 1), self.sqrt_1m_abar[t].view(-1, 1, 1, 1)

    def q_sample(self, x0, t, eps):
        """x_t ~ q(x_t | x_0) (Ho et al. 2020, eq. 4). x0, eps: (N, C, H, W); t: (N,) int64. Returns (N, C, H, W)."""
        a, s = self._scales(t)
        return a * x0 + s * eps

    def target(self, x0, t, eps):
        """What the network should have said about q_sample(x0, t, eps)."""
        a, s = self._scales(t)
        return {"eps": lambda: eps, "x0": lambda: x0, "v": lambda: a * eps - s * x0}[self.predict]()

    def predict_x0(self, out, xt, t):
        """The clean picture that the network's output speaks of, not clipped. All (N, C, H, W); t: (N,)."""
        a, s = self._scales(t)
        if self.predict == "eps":
            return (xt - s * out) / a  # Ho et al. 2020, eq. 15
        return out if self.predict == "x0" else a * xt - s * out  # v: Salimans & Ho 2022, appendix D

    def loss(self, model, x0, t, eps, y=None):
        """Training loss of each picture, (N,) float32: the mean over its pixels (Ho et al. 2020, eq. 14)."""
        out = model(self.q_sample(x0, t, eps), t, y).float()
        distance = {"l2": F.mse_loss, "l1": F.l1_loss, "huber": F.huber_loss}[self.loss_kind]
        return self.weight[t] * distance(out, self.target(x0, t, eps), reduction="none").mean(dim=(1, 2, 3))

    def posterior_std(self, t, u, large=False):
        """Standard deviation of x_u given x_t and x_0, for u < t (Ho et al. 2020, eq. 7): 0 at u = -1.

        `large` gives the paper's other choice, the forward process's own: beta_t when u = t-1 (section 3.2).
        """
        at, au = self.abar[t].item(), self.abar[u].item()
        return math.sqrt(1 - at / au) * (1.0 if large else math.sqrt((1 - au) / (1 - at)))

    def step(self, x, x0, t, u, eta=0.0, noise=None):
        """From x_t to x_u, given the predicted x0 (Song et al. 2021, eq. 12). t, u: int, T > t > u >= -1.

        eta = 1 is DDPM's posterior and eta = 0 is DDIM. Without `noise`, the mean.
        """
        at, au, std = self.abar[t].item(), self.abar[u].item(), eta * self.posterior_std(t, u)
        eps = (x - math.sqrt(at) * x0) / math.sqrt(1 - at)
        x = math.sqrt(au) * x0 + math.sqrt(max(1 - au - std**2, 0.0)) * eps
        return x if noise is None else x + std * noise


def make_diffusion(config, device="cpu"):
    betas = make_betas(config.schedule, config.timesteps, config.beta_start, config.beta_end)
    return Diffusion(betas, config.predict, config.loss, config.min_snr, device)


# ---------------------------------------------------------------------------------------------------- samplers
# A sampler takes x at noise level ts[0] down the list ts of timesteps, which ends at -1, and yields (t, x, x0) after
# each step: the level it left, the picture at the next level, the clean picture predicted at t. It sees the model
# only through denoise(x, t) -> x0; noise() gives fresh Gaussian noise of x's shape.


def ddpm(diffusion, denoise, x, ts, noise, eta=1.0):
    """Ancestral sampling (Ho et al. 2020, algorithm 2): large variance on all T steps, small on fewer."""
    large = len(ts) == diffusion.T + 1
    for t, u in zip(ts, ts[1:]):
        x0 = denoise(x, t)
        x = diffusion.step(x, x0, t, u, eta=1.0)
        if u >= 0:  # the last step adds no noise
            x = x + diffusion.posterior_std(t, u, large) * noise()
        yield t, x, x0


def ddim(diffusion, denoise, x, ts, noise, eta=0.0):
    """Song et al. 2021: deterministic at eta = 0, on any subset of the timesteps."""
    for t, u in zip(ts, ts[1:]):
        x0 = denoise(x, t)
        x = diffusion.step(x, x0, t, u, eta, noise() if eta > 0 and u >= 0 else None)
        yield t, x, x0


def dpmpp(diffusion, denoise, x, ts, noise, eta=0.0):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2): second order, one evaluation a step."""
    alpha, sigma = diffusion.abar.sqrt().tolist(), (1 - diffusion.abar).sqrt().tolist()
    before, h_before = None, None
    for t, u in zip(ts, ts[1:]):
        x0 = denoise(x, t)
        if u < 0:  # clean data: log-SNR is infinite and the step is its limit
            x = x0
        else:
            h = math.log(alpha[u] / sigma[u]) - math.log(alpha[t] / sigma[t])
            d = x0 if before is None else x0 + (x0 - before) * (h / h_before / 2)
            x = sigma[u] / sigma[t] * x - alpha[u] * math.expm1(-h) * d
            before, h_before = x0, h
        yield t, x, x0


SAMPLERS = {"ddpm": ddpm, "ddim": ddim, "dpm++": dpmpp}


def spaced_timesteps(T, n):
    """n of the T timesteps, evenly spaced with trailing spacing, from T-1 down, and a last -1: n + 1 integers."""
    if not 1 <= n <= T:
        raise UserError(f"{n} sampling steps: give 1 to {T}, the number of timesteps of the model.")
    return np.round(np.linspace(T - 1, -1, n + 1)).astype(int).tolist()


def make_denoiser(model, diffusion, y=None, guidance=1.0, clip=True, precision="fp32"):
    """denoise(x, t) -> x0, all that a sampler sees of a model. x, x0: (N, C, H, W) in [-1, 1]; t: int.

    y: (N,) int64 class of each picture, -1 for none. guidance g > 1 gives uncond + g * (cond - uncond) (Ho & Salimans
    2022, with w = g - 1), both in one batch. precision: fp32, or bf16 or fp16 for the network alone.
    """

    @torch.no_grad()
    def denoise(x, t):
        twice = guidance != 1 and y is not None
        xx, yy = (torch.cat([x, x]), torch.cat([torch.full_like(y, -1), y])) if twice else (x, y)
        with autocast(x.device, precision):
            out = model(xx, torch.full((len(xx),), t, device=x.device), yy).float()
        if twice:
            uncond, cond = out.chunk(2)
            out = uncond + guidance * (cond - uncond)
        x0 = diffusion.predict_x0(out, x, torch.full((len(x),), t, device=x.device))
        return x0.clamp(-1, 1) if clip else x0

    return denoise


class PictureNoise:
    """Noise for pictures number `indices` of a run of samples: one generator a picture, seeded by (seed, index).

    A picture's noise thus depends on neither the batch it is drawn in nor the device.
    """

    def __init__(self, seed, indices, shape, device):
        self.generators = [torch.Generator().manual_seed(mix(seed, i)) for i in indices]
        self.shape, self.device = shape, device

    def __call__(self):
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)


def mix(*numbers):
    """One 63-bit seed from several non-negative integers, such that different ones give unrelated seeds."""
    return int(np.random.SeedSequence([int(n) for n in numbers]).generate_state(1, np.uint64)[0] >> 1)


# ---------------------------------------------------------------------------------------------------- networks
# All three are called as net(x, t, y): x (N, C, H, W), t (N,), y (N,) class index or -1 for none, or no y at all.


def autocast(device, precision):
    """The context in which networks compute: convolutions and matrix products in bf16 or fp16, or as they are."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype) if dtype else contextlib.nullcontext()


class TimeLabelEmbedding(nn.Module):
    """Sinusoids of t (Ho et al. 2020, appendix B) through two layers, plus a learned vector for the label."""

    def __init__(self, channels, width, classes):
        super().__init__()
        self.frequencies = channels // 2
        self.mlp = nn.Sequential(nn.Linear(channels, width), nn.SiLU(), nn.Linear(width, width))
        self.labels = nn.Embedding(classes + 1, width) if classes else None  # the last row stands for no label

    def forward(self, t, y):
        exponent = torch.arange(self.frequencies, device=t.device) / (self.frequencies - 1)
        angle = t[:, None].float() * torch.exp(-math.log(10000) * exponent)  # (N, channels / 2)
        emb = self.mlp(torch.cat([angle.sin(), angle.cos()], dim=1))  # (N, width)
        if self.labels is None:
            return emb
        y = torch.full_like(t, -1) if y is None else y
        return emb + self.labels(y % self.labels.num_embeddings)  # -1 is the last row


def group_norm(groups, channels):
    return nn.GroupNorm(groups, channels, eps=1e-6)  # eps as in the paper's code


class ResBlock(nn.Module):
    """norm, SiLU, convolution, twice, with the embedding added in between and a shortcut around it all."""

    def __init__(self, c_in, c_out, embedding, groups, dropout=0.0):
        super().__init__()
        self.norm1 = group_norm(groups, c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(embedding, c_out)
        self.norm2 = group_norm(groups, c_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero(nn.Conv2d(c_out, c_out, 3, padding=1))
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        h = h + self.time(F.silu(emb))[:, :, None, None]
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class Attention(nn.Module):
    """Self-attention over all pixels, one head, with a shortcut around it.

    kind full: softmax(q k^T) v, quadratic in the number of pixels. kind linear: softmax(q) (softmax(k)^T v), linear in
    it (Shen et al. 2021, arXiv:1812.01243).
    """

    def __init__(self, channels, groups, kind="full"):
        super().__init__()
        self.kind = kind
        self.norm = group_norm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zero(nn.Linear(channels, channels))

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = self.qkv(self.norm(x).flatten(2).transpose(1, 2)).chunk(3, dim=2)  # (N, HW, C) each
        if self.kind == "linear":
            a = (q.softmax(2) * c**-0.5) @ (k.softmax(1).transpose(1, 2) @ v)
        elif x.is_cuda:
            a = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        else:  # the same; on a CPU three times as fast, forward and backward, as the call above
            a = ((q * c**-0.5) @ k.transpose(1, 2)).softmax(2) @ v
        return x + self.out(a).transpose(1, 2).reshape(n, c, h, w)


class Down(nn.Module):
    """Halve the sides: a strided convolution, padded to the right and below as in the paper's code."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Up(nn.Module):
    """Double the sides: nearest neighbours, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def zero(layer):
    """The layer with weights and bias 0, so that what it ends begins as the identity."""
    for p in layer.parameters():
        nn.init.zeros_(p)
    return layer


class Stage(nn.Module):
    """A residual block and, in some stages, attention behind it."""

    def __init__(self, c_in, c_out, embedding, groups, dropout, attention=None):
        super().__init__()
        self.res = ResBlock(c_in, c_out, embedding, groups, dropout)
        self.attention = Attention(c_out, groups, attention) if attention else nn.Identity()

    def forward(self, x, emb):
        return self.attention(self.res(x, emb))


class UNet(nn.Module):
    """The network of Ho et al. 2020, appendix B, laid out as diffusers' UNet2DModel; sides divisible by 2^(stages-1).

    Args: image_channels of the pictures; width of the first stage, times mults for each; res_blocks a stage;
    attention (full, linear, none) in the stages numbered in attention_stages, and full in the middle unless none;
    classes, 0 for an unconditional model.
    """

    def __init__(self, image_channels=3, width=128, mults=(1, 2, 2, 2), res_blocks=2, attention="full",
                 attention_stages=(1,), dropout=0.0, classes=0):
        super().__init__()
        widths = [width * m for m in mults]
        # One number of groups for the whole net: the most, up to 32, that leave every group four channels.
        groups = next(g for g in (32, 16, 8, 4, 2, 1) if g == 1 or all(w % g == 0 and w // g >= 4 for w in widths))
        kind = [attention if attention != "none" and i in attention_stages else None for i in range(len(widths))]
        shared = dict(embedding=4 * width, groups=groups, dropout=dropout)

        self.embed = TimeLabelEmbedding(width, 4 * width, classes)
        self.conv_in = nn.Conv2d(image_channels, width, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        c, skips = width, [width]
        for i, w in enumerate(widths):
            for _ in range(res_blocks):
                self.down.append(Stage(c, w, attention=kind[i], **shared))
                c = w
                skips.append(c)
            if i < len(widths) - 1:
                self.down.append(Down(c))
                skips.append(c)
        self.middle = Stage(c, c, attention=None if attention == "none" else "full", **shared)
        self.middle2 = ResBlock(c, c, **shared)
        for i, w in reversed(list(enumerate(widths))):
            for _ in range(res_blocks + 1):
                self.up.append(Stage(c + skips.pop(), w, attention=kind[i], **shared))
                c = w
            if i:
                self.up.append(Up(c))
        self.norm_out = group_norm(groups, c)
        self.conv_out = zero(nn.Conv2d(c, image_channels, 3, padding=1))

    def forward(self, x, t, y=None):
        emb = self.embed(t, y)
        h = self.conv_in(x)
        skips = [h]
        for layer in self.down:
            h = layer(h) if isinstance(layer, Down) else layer(h, emb)
            skips.append(h)
        h = self.middle2(self.middle(h, emb), emb)
        for layer in self.up:
            h = layer(h) if isinstance(layer, Up) else layer(torch.cat([h, skips.pop()], dim=1), emb)
        return self.conv_out(F.silu(self.norm_out(h)))


class SimpleUNet(nn.Module):
    """A plain convolutional U-Net: strided 4x4 convolutions down, transposed ones up, BatchNorm, SiLU, time added.

    Width `width` at full size, doubled at each of four halvings: sides divisible by 16.
    """

    def __init__(self, image_channels=3, width=32, classes=0):
        super().__init__()
        widths = [width * 2**i for i in range(5)]  # 32 64 128 256 512
        pairs = list(zip(widths, widths[1:], strict=False))
        self.embed = TimeLabelEmbedding(width, 4 * width, classes)
        self.conv_in = nn.Conv2d(image_channels, width, 3, padding=1)
        self.down = nn.ModuleList(ConvBlock(nn.Conv2d(a, b, 4, stride=2, padding=1), 4 * width) for a, b in pairs)
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for a, b in reversed(pairs):
            self.up.append(ConvBlock(nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), 4 * width))
            self.merge.append(ConvBlock(nn.Conv2d(2 * a, a, 3, padding=1), 4 * width))
        self.conv_out = nn.Conv2d(width, image_channels, 3, padding=1)

    def forward(self, x, t, y=None):
        emb = self.embed(t, y)
        h = self.conv_in(x)
        skips = []
        for down in self.down:
            skips.append(h)
            h = down(h, emb)
        for up, merge in zip(self.up, self.merge, strict=True):
            h = merge(torch.cat([up(h, emb), skips.pop()], dim=1), emb)
        return self.conv_out(h)


class ConvBlock(nn.Module):
    """A convolution of any kind, BatchNorm, the embedding added, SiLU."""

    def __init__(self, conv, embedding):
        super().__init__()
        self.conv, self.norm = conv, nn.BatchNorm2d(conv.out_channels)
        self.time = nn.Linear(embedding, conv.out_channels)

    def forward(self, x, emb):
        return F.silu(self.norm(self.conv(x)) + self.time(F.silu(emb))[:, :, None, None])


class ResNetUNet(nn.Module):
    """torchvision's ResNet-18 as the encoder, time and self-attention at each scale, and a mirrored decoder of
    transposed convolutions. Sides divisible by 32."""

    def __init__(self, image_channels=3, classes=0, pretrained=False):
        super().__init__()
        weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1 if pretrained else None
        try:
            net = torchvision.models.resnet18(weights=weights)
        except OSError as e:
            folder = Path(torch.hub.get_dir()) / "checkpoints"
            raise UserError(f"The ImageNet weights could not be downloaded ({e}). Put {weights.url} into {folder}, "
                            "or leave out --pretrained.") from None
        if image_channels != 3:
            kernel = net.conv1.weight.data.mean(1, keepdim=True) * 3 / image_channels
            net.conv1 = nn.Conv2d(image_channels, 64, 7, stride=2, padding=3, bias=False)
            net.conv1.weight.data = kernel.repeat(1, image_channels, 1, 1)
        widths = [64, 64, 128, 256, 512]  # at 1/2, 1/4, 1/8, 1/16 and 1/32 of the side
        self.embed = TimeLabelEmbedding(128, 256, classes)
        self.encoder = nn.ModuleList([
            nn.Sequential(net.conv1, net.bn1, net.relu), nn.Sequential(net.maxpool, net.layer1),
            net.layer2, net.layer3, net.layer4,
        ])
        self.time = nn.ModuleList(nn.Linear(256, c) for c in widths)
        self.attend = nn.ModuleList(Attention(c, 32) for c in widths)
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for a, b in reversed(list(zip(widths, widths[1:], strict=False))):
            self.up.append(ConvBlock(nn.ConvTranspose2d(b, a, 4, stride=2, padding=1), 256))
            self.merge.append(ConvBlock(nn.Conv2d(2 * a, a, 3, padding=1), 256))
        self.last = ConvBlock(nn.ConvTranspose2d(64, 64, 4, stride=2, padding=1), 256)
        self.conv_out = nn.Conv2d(64 + image_channels, image_channels, 3, padding=1)

    def forward(self, x, t, y=None):
        emb = self.embed(t, y)
        h, skips = x, []
        for encode, time_, attend in zip(self.encoder, self.time, self.attend, strict=True):
            h = attend(encode(h) + time_(F.silu(emb))[:, :, None, None])
            skips.append(h)
        h = skips.pop()
        for up, merge in zip(self.up, self.merge, strict=True):
            h = merge(torch.cat([up(h, emb), skips.pop()], dim=1), emb)
        return self.conv_out(torch.cat([self.last(h, emb), x], dim=1))


def build_model(config, image_channels, classes):
    """The network that a Config describes, for pictures of so many channels and classes of these names."""
    if config.arch == "simple":
        model = SimpleUNet(image_channels, config.channels, len(classes))
    elif config.arch == "resnet18":
        model = ResNetUNet(image_channels, len(classes), config.pretrained)
    else:
        stages = [i for i in range(len(config.channel_mults)) if network_size(config) >> i in config.attention_at]
        model = UNet(image_channels, config.channels, config.channel_mults, config.res_blocks, config.attention,
                     stages, config.dropout, len(classes))
    model.image_size, model.channels, model.classes = network_size(config), image_channels, list(classes)
    return model


# -------------------------------------------------------------------------------------------------------- data

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")
DECODER = 1  # version of `decode`; raised when it gives other pixels, so that old caches are not used
IN_MEMORY = 2**28  # bytes of pixels above which they live in a memory-mapped file


def to_network(pixels):
    """uint8 pixels 0..255 -> float32 in [-1, 1], the range that the network sees. Any shape."""
    return pixels.float() / 127.5 - 1


def to_pixels(x):
    """float in [-1, 1] (clipped to it) -> uint8 pixels 0..255, the inverse of `to_network`."""
    return ((x.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


def is_grey(image):
    return image.mode in ("1", "L", "LA", "I", "F") or image.mode.startswith("I;16")


def decode(image, size, channels):
    """A PIL picture, upright, over white, cropped to a centred square and resized: uint8 (channels, size, size)."""
    image.draft(None, (2 * size, 2 * size))  # a JPEG need not be decoded at full size
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):  # 16 bits, or floats in [0, 1]
        values = np.asarray(image, dtype=np.float64)
        top = 1.0 if image.mode == "F" and values.max() <= 1 else 255.0 if values.max() <= 255 else 65535.0
        image = Image.fromarray((values / top * 255).clip(0, 255).round().astype(np.uint8))
    if image.mode in ("LA", "PA", "RGBA", "RGBa", "La") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("L" if channels == 1 else "RGB")
    image = ImageOps.fit(image, (size, size), method=Image.Resampling.BICUBIC)  # antialiased
    pixels = np.asarray(image).reshape(size, size, channels).transpose(2, 0, 1)
    pad = (32 - size) // 2 if size == 28 else 0
    return np.pad(pixels, ((0, 0), (pad, pad), (pad, pad)), mode="edge")


def load_picture(path, size, channels):
    """A picture file as the network sees it: (channels, size, size) float32 in [-1, 1]."""
    try:
        with Image.open(path) as image:
            return to_network(torch.from_numpy(decode(image, size, channels)))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as e:
        raise UserError(f"{path} cannot be read as a picture ({e}).") from None


class Folder:
    """The picture files below a folder; the first sub-folder on a file's way is its class."""

    def __init__(self, root):
        root = Path(root)
        if not root.is_dir():
            raise UserError(f"No folder {root}: give --data_path a folder of pictures, or one of {', '.join(DATASETS)}.")
        files, other, seen = [], {}, set()
        for place, folders, names in os.walk(root, followlinks=True):
            real = os.path.realpath(place)
            folders[:] = sorted(f for f in folders if not f.startswith(".")) if real not in seen else []
            if real in seen:  # a link that leads back
                continue
            seen.add(real)
            for name in sorted(names):
                suffix = Path(name).suffix.lower()
                if suffix in SUFFIXES and not name.startswith("."):
                    files.append(Path(place) / name)
                else:
                    other[suffix or name] = other.get(suffix or name, 0) + 1
        if not files:
            saw = ", ".join(f"{suffix} {n}" for suffix, n in sorted(other.items())[:8]) or "nothing"
            raise UserError(f"No pictures in {root}: saw {sum(other.values())} files ({saw}); accepted {' '.join(SUFFIXES)}.")
        parts = [f.relative_to(root).parts for f in files]
        self.files, self.classes = files, sorted({p[0] for p in parts if len(p) > 1})
        self.labels = np.array([self.classes.index(p[0]) if len(p) > 1 else -1 for p in parts])
        stats = [f.stat() for f in files]
        self.names = ["/".join(p) for p in parts]
        self.key = [f"{n} {s.st_size} {s.st_mtime_ns}" for n, s in zip(self.names, stats, strict=True)]

    def open(self, i):
        return Image.open(self.files[i])


class Torchvision:
    """One of torchvision's data sets, downloaded if need be: its training pictures (of flowers102, all of them)."""

    def __init__(self, name, root):
        sets, common = torchvision.datasets, dict(root=root, download=True)
        try:
            if name == "flowers102":
                parts = [sets.Flowers102(split=s, **common) for s in ("train", "val", "test")]
                self.labels = np.concatenate([p._labels for p in parts])
                self.classes = list(getattr(parts[0], "classes", None) or [f"flower_{i + 1}" for i in range(102)])
            elif name == "celeba":
                parts = [sets.CelebA(split="train", target_type="identity", **common)]
                self.labels, self.classes = np.full(len(parts[0]), -1), []
            else:
                kind = {"cifar10": sets.CIFAR10, "fashion_mnist": sets.FashionMNIST, "mnist": sets.MNIST}[name]
                parts = [kind(train=True, **common)]
                self.labels = np.asarray(parts[0].targets)
                self.classes = [c.replace("/", "-") for c in parts[0].classes]
        except ImportError as e:
            package = {"flowers102": "scipy", "celeba": "gdown"}.get(name, e.name)
            raise UserError(f"The data set {name} needs the package {package}: pip install {package}") from None
        except (OSError, RuntimeError) as e:
            reason = str(e).splitlines()[0] if str(e) else type(e).__name__
            raise UserError(f"{name} could not be downloaded ({reason}). Put its files by hand where torchvision "
                            f"looks for them, in {Path(root).resolve()}, or give --data_path a folder.") from None
        self.data = torch.utils.data.ConcatDataset(parts)
        self.names = [f"{name}/{i}" for i in range(len(self.data))]
        self.key = [name]

    def open(self, i):
        return self.data[i][0]


def load_images(config, device="cpu"):
    """The pictures that a Config names, decoded: an `Images`. UserError where there are none or too many are bad."""
    if config.data_path in DATASETS:
        source = Torchvision(config.data_path, config.download_dir)
    else:
        path = Path(config.data_path)
        default = HERE / FIELDS["data_path"].default
        source = Folder(default if str(path) == FIELDS["data_path"].default and not path.exists() else path)
    chosen = np.arange(len(source.names))
    if config.max_images and config.max_images < len(chosen):
        chosen = np.sort(np.random.default_rng(config.seed).permutation(len(chosen))[: config.max_images])
    key = [DECODER, config.image_size, source.key, chosen.tolist()]
    key = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]
    cache = Path(config.download_dir) / "decoded" / f"{key}.npy"
    if cache.exists():
        pixels, bad = np.load(cache, mmap_mode="c"), json.loads(cache.with_suffix(".json").read_text())
    else:
        pixels, bad = decode_all(source, chosen, config.image_size, cache)
    return Images(source, chosen, pixels, bad, config, device)


def decode_all(source, chosen, size, cache):
    """Decode the chosen pictures on all cores: (N, C, H, W) uint8, and {row: reason} for those that are bad.

    Small sets come back in memory. Large ones are written to the file `cache`, whole and under its name at once, so
    that neither a crash nor a second start at the same time can leave half of one.
    """

    def grey(i):
        try:
            with contextlib.closing(source.open(i)) as image:
                return is_grey(image)
        except Exception:  # whatever a broken file makes a decoder raise: `work` names it
            return True

    def work(i):
        try:
            with contextlib.closing(source.open(i)) as image:
                return decode(image, size, channels)
        except Exception as e:
            return f"{type(e).__name__}: {e}"

    Image.MAX_IMAGE_PIXELS = 2**28  # pictures above twice this are refused as decompression bombs
    bad = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        channels = 1 if all(tqdm(pool.map(grey, chosen), "looking", len(chosen), leave=False, delay=2)) else 3
        side = 32 if size == 28 else size
        shape = (len(chosen), channels, side, side)
        large = math.prod(shape) > IN_MEMORY
        partial = cache.with_suffix(f".{os.getpid()}.tmp")
        if large:
            cache.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
        else:
            pixels = np.empty(shape, np.uint8)
        for row, result in enumerate(tqdm(pool.map(work, chosen), "decoding", len(chosen), leave=False, delay=2)):
            if isinstance(result, str):
                bad[row] = result
            pixels[row] = 0 if isinstance(result, str) else result
    if large:
        pixels.flush()
        atomic_write(cache.with_suffix(".json"), lambda f: f.write(json.dumps(bad).encode()))
        os.replace(partial, cache)
        pixels = np.load(cache, mmap_mode="c")
    return pixels, bad


class Images:
    """Decoded pictures, their labels, and which of them are for training and which held out.

    pixels: (N, C, H, W) uint8, on the device where there is room; labels: (N,) int64, -1 for none; classes: names.
    """

    def __init__(self, source, chosen, pixels, bad, config, device):
        bad = {int(row): reason for row, reason in bad.items()}
        if bad:
            listed = "\n".join(f"  {source.names[chosen[row]]!r}: {reason}" for row, reason in list(bad.items())[:10])
            print(f"{len(bad)} of {len(chosen)} pictures cannot be read:\n{listed}", file=sys.stderr)
            if len(bad) >= 0.05 * len(chosen):
                raise UserError("That is 5 % or more of the pictures: mend or remove them and start again.")
        self.found, self.bad = len(source.names), bad
        self.classes = source.classes if config.class_cond and len(source.classes) > 1 else []
        self.class_names, self.seed, self.hflip = source.classes, config.seed, config.hflip
        self.labels = torch.from_numpy(source.labels[chosen].astype(np.int64))
        good = np.setdiff1d(np.arange(len(chosen)), list(bad))
        held = round(config.holdout * len(good))
        order = np.random.default_rng(mix(config.seed, 1)).permutation(good)
        self.held_out, self.train = np.sort(order[:held]), np.sort(order[held:])
        if not len(self.train) or (config.holdout and not held):
            raise UserError(f"--holdout {config.holdout:g} of {len(good)} pictures leaves {len(self.train)} to train "
                            f"on and {held} held out: both need one.")
        self.pixels = torch.from_numpy(pixels)
        if torch.device(device).type == "cuda":
            if self.pixels.nbytes < torch.cuda.mem_get_info(device)[0] // 3:
                self.pixels = self.pixels.to(device)
        names = hashlib.sha256("\n".join(source.names[i] for i in chosen).encode()).hexdigest()[:16]
        self.fingerprint = f"{len(chosen)} pictures, {len(bad)} bad, names {names}"
        self._order = (None, None)

    @property
    def channels(self):
        return self.pixels.shape[1]

    def order(self, epoch):
        """The training pictures in the order of this pass over them: a permutation that depends on the seed."""
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng(mix(self.seed, 2, epoch)).permutation(self.train)
        return self._order[1]

    def batch(self, step, batch_size, slice=0, slices=1, device="cpu"):
        """Slice `slice` of `slices` of the batch of a step: x0 (n, C, H, W) in [-1, 1] and labels (n,).

        A pure function of its arguments, the seed and, for the flips, torch's generator.
        """
        n, total = batch_size // slices, len(self.train)
        place = step * batch_size + slice * n + np.arange(n)
        rows = np.concatenate([self.order(e)[place[place // total == e] % total] for e in np.unique(place // total)])
        rows = torch.from_numpy(rows)
        flipped = torch.rand(n) < 0.5 if self.hflip else None
        x0 = to_network(self.pixels[rows.to(self.pixels.device)].to(device))
        if self.hflip:
            x0 = torch.where(flipped.to(device)[:, None, None, None], x0.flip(3), x0)
        return x0, self.labels[rows].to(device)


# ------------------------------------------------------------------------------------------ EMA and checkpoints


@torch.no_grad()
def update_ema(ema, model, updates, decay):
    """Move the averaged module towards `model`: decay min(d, (1 + n) / (10 + n)) after n updates, so that the early
    weights are soon forgotten. Float buffers are averaged too, integer ones copied."""
    d = min(decay, (1 + updates) / (10 + updates)) if decay else 0.0
    pairs = list(zip(ema.state_dict().values(), model.state_dict().values(), strict=True))
    torch._foreach_lerp_([a for a, b in pairs if b.is_floating_point()],
                         [b for a, b in pairs if b.is_floating_point()], 1 - d)
    for a, b in pairs:
        if not b.is_floating_point():
            a.copy_(b)


def atomic_write(path, write):
    """Call write(file) for a new file at `path`, which appears there whole or not at all."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(partial, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    if hasattr(os, "O_DIRECTORY"):  # make the new name durable as well
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def save_checkpoint(path, checkpoint):
    atomic_write(path, lambda f: torch.save(checkpoint, f))


def read_checkpoint(path):
    """The dictionary in a checkpoint file, tensors on the CPU. UserError if it is not one that we can trust and read."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"No checkpoint {path}: give the path of a model that --mode train wrote.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # unpickling bad bytes can raise anything
        raise UserError(f"{path} is not a checkpoint that can be read safely: it is damaged, or holds more than tensors "
                        f"and plain values ({type(e).__name__}).") from None
    if not isinstance(checkpoint, dict) or not {"format", "config", "weights"} <= checkpoint.keys():
        raise UserError(f"{path} is not a checkpoint of ddpm.py: it has no format number, configuration and weights.")
    if checkpoint["format"] != FORMAT:
        raise UserError(f"{path} has format {checkpoint['format']}; this ddpm.py reads format {FORMAT}: use the version "
                        "that wrote it, or train again.")
    for name in ("weights", "ema"):
        state = {k: v for k, v in checkpoint.get(name, {}).items()}
        if not all(torch.isfinite(v).all() for v in state.values() if v.is_floating_point()):
            raise UserError(f"{path} holds weights that are not finite: use an earlier checkpoint.")
    return checkpoint


def stored_config(checkpoint, path):
    """The Config in a checkpoint; settings that did not exist when it was written take their defaults."""
    stored = {k: tuple(v) if isinstance(v, list) else v for k, v in checkpoint["config"].items()}
    unknown = sorted(stored.keys() - FIELDS.keys())
    if unknown:
        raise UserError(f"{path} has the setting {unknown[0]}, which this ddpm.py does not know: use a newer one.")
    return Config(**stored)


def load_weights(model, state, path):
    """Load a state_dict strictly, whatever wrapper it was saved from."""
    state = {k.removeprefix("_orig_mod.").removeprefix("module."): v for k, v in state.items()}
    try:
        model.load_state_dict(state)
    except RuntimeError as e:
        raise UserError(f"{path} does not fit the network that its configuration describes: "
                        f"{str(e).splitlines()[1].strip()}") from None


def load_model(path, device="cpu", ema=True):
    """The model in a checkpoint: (model in eval mode, diffusion, config). model.classes names its classes.

    ema: the averaged weights, if the file has them. UserError where the file is missing, foreign or damaged.
    """
    checkpoint = read_checkpoint(path)
    config = stored_config(checkpoint, path)
    model = build_model(override(config, pretrained=False), checkpoint["channels"], checkpoint["classes"])
    load_weights(model, checkpoint["ema" if ema and "ema" in checkpoint else "weights"], path)
    return model.to(device).eval().requires_grad_(False), make_diffusion(config, device), config


# ---------------------------------------------------------------------------------------------------- training


def choose_device(name):
    """The torch.device for --device: auto is CUDA, then Apple's MPS, then the CPU. UserError if it is not there."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    name = next(n for n in there if there[n]) if name == "auto" else name
    if not there[name]:
        raise UserError(f"--device {name}: PyTorch sees no such device here. Leave the flag out, or install a PyTorch "
                        "build for it.")
    return torch.device(name, int(os.environ.get("LOCAL_RANK", 0)) if name == "cuda" else None)


def choose_precision(name, device):
    """fp32, bf16 or fp16 for --precision: auto is bf16 where the hardware has instructions for it."""
    if name == "fp16" and device.type != "cuda":
        raise UserError(f"--precision fp16 needs a CUDA GPU, and this is {device.type}: use bf16 or fp32.")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp32"
    return "bf16" if device.type == "cpu" and torch.cpu._is_avx512_bf16_supported() else "fp32"


def keep_memory():
    """Have the C library keep freed memory instead of giving it back after each tensor: steps on a CPU get up to a
    third faster, having no pages to fault in again. Does nothing where there is no glibc."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-4, 0)  # M_MMAP_MAX: no separate mappings for large blocks
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never shrink the heap


class StopRequest:
    """Turns the first SIGTERM or Ctrl-C into a request that a loop can see; a second Ctrl-C quits at once."""

    def __enter__(self):
        self.signal, self.old = 0, {}
        with contextlib.suppress(ValueError):  # only the main thread may handle signals
            for s in (signal.SIGINT, signal.SIGTERM):
                self.old[s] = signal.signal(s, self._handle)
        return self

    def __exit__(self, *_):
        for s, handler in self.old.items():
            signal.signal(s, handler)

    def _handle(self, number, _):
        if self.signal and number == signal.SIGINT:
            os._exit(130)
        self.signal = number


class Clock:
    """How far training is: steps done, seconds spent, and the share of the planned length, 0 to 1."""

    def __init__(self, config, pictures, step=0, seconds=0.0):
        self.steps = config.steps or (math.ceil(config.epochs * pictures / config.batch_size) if config.epochs else None)
        self.limit = 60 * config.minutes if config.minutes else None
        self.step, self.earlier, self.started, self.ending = step, seconds, time.monotonic(), 0.0

    @property
    def seconds(self):
        return self.earlier + time.monotonic() - self.started

    @property
    def share(self):
        """`ending` seconds are set aside for the last pictures and the last save, which --minutes includes."""
        return min(self.step / self.steps if self.steps else self.seconds / max(self.limit - self.ending, 1e-9), 1.0)


def learning_rate(config, step, share):
    """Linear warm-up over warmup_steps; then constant, or half a cosine down to 0 at the end of training."""
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    return config.lr * warm * (0.5 + 0.5 * math.cos(math.pi * share) if config.lr_schedule == "cosine" else 1.0)


def step_files(model_path):
    """The step checkpoints beside a model, oldest first."""
    folder = Path(model_path).with_name(Path(model_path).stem + "_steps")
    return folder, sorted(folder.glob("step_*.pt"))


def find_resume(config):
    """The checkpoint that --resume means: (path, checkpoint). The latest that can be read, or exactly the one given."""
    if config.resume != "latest":
        return config.resume, read_checkpoint(config.resume)
    folder, files = step_files(config.model_path)
    for path in reversed(files):
        try:
            return path, read_checkpoint(path)
        except UserError as e:
            print(f"warning: {e} Trying an earlier one.", file=sys.stderr)
    raise UserError(f"Nothing to resume in {folder}: start with --mode train without --resume.")


def set_aside(model_path):
    """Rename an earlier model and its step checkpoints to NAME.previous, so that a new run overwrites nothing."""
    renamed = []
    for path in (Path(model_path), step_files(model_path)[0]):
        if path.exists():
            target, n = path.with_name(path.name + ".previous"), 1
            while target.exists():
                n += 1
                target = path.with_name(f"{path.name}.previous{n}")
            path.rename(target)
            renamed.append(target.name)
    return renamed


def initialise(model, path, talk):
    """Load what fits of a checkpoint's weights into a new model, and name what does not."""
    checkpoint = read_checkpoint(path)
    given = checkpoint.get("ema", checkpoint["weights"])
    own = model.state_dict()
    fits = {k: v for k, v in given.items() if k in own and own[k].shape == v.shape}
    if checkpoint["classes"] != model.classes:  # a label's row means another class: learn the table anew
        fits.pop("embed.labels.weight", None)
    if not fits:
        raise UserError(f"Nothing in {path} fits this network ({checkpoint['config']['arch']} there): choose the same "
                        "--arch, --channels and --channel_mults.")
    model.load_state_dict(fits, strict=False)
    if talk:
        left = [k for k in own if k not in fits]
        print(f"Started from {path}: {len(fits)} of {len(own)} tensors" + (f"; new: {', '.join(left[:6])}" if left else ""))


def merge(stored, given, allowed, path):
    """The stored Config with the given settings that are `allowed` to differ. UserError for another that does."""
    for name, value in given.items():
        if name not in allowed and value != getattr(stored, name):
            raise UserError(f"--{name} {value} contradicts {path}, which has {name} {getattr(stored, name)}: leave the "
                            "flag out, or train a model with it.")
    return override(stored, **{name: value for name, value in given.items() if name in allowed})


def non_finite(step, optimizer, precision, config):
    """What to say when loss or gradient were not finite at a step."""
    files = step_files(config.model_path)[1]
    last = f"Last good checkpoint: {files[-1].resolve()}." if files else "There is no checkpoint yet."
    return (f"Non-finite loss at step {step} (lr {optimizer.param_groups[0]['lr']:.2g}, {precision}). {last} "
            "Try --precision fp32 or a lower --lr.")


def train(config):
    """Train as the Config says, and write the model, its checkpoints and the pictures. Returns the model's path.

    UserError for whatever the user can mend; SystemExit 130 or 143 after a clean stop by Ctrl-C or SIGTERM.
    """
    check(config)
    keep_memory()
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    slices = world * config.grad_accum
    if config.batch_size % slices:
        raise UserError(f"--batch_size {config.batch_size} does not split over {world} processes with --grad_accum "
                        f"{config.grad_accum}: use a multiple of {slices}.")

    # ---- data, network, optimiser, and where an earlier run left off
    resumed = None
    if config.resume:
        path, resumed = find_resume(config)
        config = merge(stored_config(resumed, path), dataclasses.asdict(config), MAY_CHANGE, path)
    images = load_images(config, device)
    torch.manual_seed(config.seed)
    model = build_model(config, images.channels, images.classes).to(device)
    if config.init_from and not resumed:
        initialise(model, config.init_from, talk=rank == 0)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.optimizer]
    optimizer = kind(model.parameters(), config.lr, weight_decay=config.weight_decay, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    clock = Clock(config, len(images.train))
    if resumed:
        if resumed["data"] != images.fingerprint:
            raise UserError(f"{path} was trained on other data ({resumed['data']}; now {images.fingerprint}): restore "
                            "the pictures, or start a new run with --init_from.")
        load_weights(model, resumed["weights"], path)
        load_weights(ema, resumed["ema"], path)
        optimizer.load_state_dict(resumed["optimizer"])
        scaler.load_state_dict(resumed["scaler"])
        clock = Clock(config, len(images.train), resumed["step"], resumed["seconds"])
    diffusion = make_diffusion(config, device)
    net = torch.compile(model) if config.compile else model
    if world > 1:
        net = nn.parallel.DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)
    parameters = list(model.parameters())

    # ---- what the run will do, said before it does it
    log = RunLog(config, images, clock, path if resumed else None) if rank == 0 else None
    if log:
        log.banner(model, clock, device, precision, world)
    if config.dry_run:
        dry_run(net, diffusion, images, config, device, precision, slices)
        return None
    previews = Previews(config, images, diffusion, device, precision, rank, world)
    if log:
        renamed = [] if resumed else set_aside(config.model_path)
        if renamed:
            log.say(f"The earlier model is kept as {' and '.join(renamed)}.")
        log.start(clock, diffusion)

    def save(final=False):
        """The step checkpoint, the model to sample from, and no more than --keep_last of the former."""
        state = dict(format=FORMAT, config=dataclasses.asdict(config), classes=images.classes, channels=images.channels,
                     data=images.fingerprint, held_out=images.held_out.tolist(), step=clock.step, seconds=clock.seconds,
                     weights=model.state_dict(), ema=ema.state_dict())
        folder, files = step_files(config.model_path)
        path = folder / f"step_{clock.step:08d}.pt"
        save_checkpoint(path, {**state, "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
        save_checkpoint(config.model_path, state)
        keep = {path, *files[-config.keep_last + 1 :]} if config.keep_last > 1 else {path}
        for old in set(files) - keep - {Path(config.resume or "")}:
            old.unlink(missing_ok=True)
        log.wrote(config.model_path, path)

    # Sums since the last print, on the device: loss by quarter of the timesteps, pictures by quarter, and the first
    # step that was not finite (-1: none). They are read when printing and before saving, and never in between.
    sums, bad_step = torch.zeros(2, 4, device=device), torch.full((), -1, device=device)
    unfinite = torch.zeros((), dtype=torch.int64, device=device)  # steps in a row that were not
    patience = 50 if scaler.is_enabled() else 1  # a scaler finds its scale by overflowing
    saved = clock.step if resumed else -1

    clock.started = time.monotonic()
    with StopRequest() as stop:
        while True:
            # ---- rare things: stop, print, save, draw
            done, stopping = clock.share >= 1, stop.signal
            beat = clock.step % (10 if world > 1 else 1) == 0 or done
            if world > 1 and beat:  # one process decides for all, and any of them can ask to stop
                ask = torch.tensor([float(stopping)], device=device)
                dist.all_reduce(ask, dist.ReduceOp.MAX)
                lead = torch.tensor([clock.share, clock.seconds], dtype=torch.float64).float().to(device)
                dist.broadcast(lead, 0)
                stopping, share = int(ask.item()), lead[0].item()
                done = share >= 1
            elif beat:
                share = clock.share
            leave = beat and (done or stopping)
            printing = clock.step % config.log_every == 0 or leave
            saving = clock.step != saved and (clock.step % config.save_every == 0 or leave) and clock.step > 0
            drawing = clock.step > 0 and (clock.step % config.sample_every == 0 or done) and not stopping
            if printing or saving:
                if bad_step.item() >= 0:
                    raise UserError(non_finite(bad_step.item(), optimizer, precision, config))
                if world > 1:
                    dist.all_reduce(sums)
            if log and printing and sums[1].sum() > 0:
                log.line(clock, sums.tolist(), grad_norm.item(), optimizer.param_groups[0]["lr"], device)
            if printing or saving:
                sums.zero_()
            if saving and log:
                save()
                saved = clock.step
            if drawing:
                began = time.monotonic()
                drawn = previews.draw(ema, stop)
                if log and drawn:
                    log.pictures(*drawn, clock)
                clock.ending = max(clock.ending, 1.2 * (time.monotonic() - began))
            if leave:
                break
            # ------------------------------------------------------------------------------- one training step
            lr = learning_rate(config, clock.step, share)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for i in range(config.grad_accum):
                number = rank * config.grad_accum + i
                torch.manual_seed(mix(config.seed, 3, clock.step, number))
                x0, y = images.batch(clock.step, config.batch_size, number, slices, device)
                y = torch.where(torch.rand(len(y), device=device) < config.label_dropout, -1, y)
                t = torch.randint(config.timesteps, (len(x0),), device=device)
                eps = torch.randn_like(x0)
                last = i == config.grad_accum - 1
                with contextlib.nullcontext() if last or world == 1 else net.no_sync():
                    with autocast(device, precision):
                        losses = diffusion.loss(net, x0, t, eps, y)  # (n,)
                    scaler.scale(losses.mean() / config.grad_accum).backward()
                sums[0].index_add_(0, t * 4 // config.timesteps, losses.detach())
                sums[1].index_add_(0, t * 4 // config.timesteps, torch.ones_like(losses))
            scaler.unscale_(optimizer)
            grad_norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip or math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            update_ema(ema, model, clock.step, config.ema_decay)
            unfinite = torch.where(torch.isfinite(grad_norm + losses.sum()), 0, unfinite + 1)
            bad_step = torch.where((bad_step < 0) & (unfinite >= patience), clock.step, bad_step)
            clock.step += 1
            # ---------------------------------------------------------------------------------------------------
            if log:
                log.tick(clock)

    if log:
        log.close(stop.signal)
    if world > 1:
        dist.destroy_process_group()
    if stopping:
        raise SystemExit(128 + stopping)
    return Path(config.model_path)


class Previews:
    """What is drawn during training: always the same pictures, timesteps and noise, so that grids can be compared."""

    def __init__(self, config, images, diffusion, device, precision, rank, world):
        self.config, self.diffusion, self.precision, self.rank, self.world = config, diffusion, precision, rank, world
        some = images.train[np.linspace(0, len(images.train) - 1, min(8, len(images.train))).astype(int)]
        some, held = torch.from_numpy(some), torch.from_numpy(images.held_out[:256])
        g = torch.Generator().manual_seed(mix(config.seed, 4))

        def fixed(rows):  # pictures with a timestep each, spread evenly over 0..T-1, and noise
            x0 = to_network(images.pixels[rows.to(images.pixels.device)].to(device))
            t = ((torch.arange(len(rows)) + 0.5) * config.timesteps / max(len(rows), 1)).long()
            return x0, t.to(device), torch.randn(x0.shape, generator=g).to(device), images.labels[rows].to(device)

        self.batch, self.held = fixed(some), fixed(held)
        self.labels = sample_labels(config, images.classes, config.num_samples)

    @torch.no_grad()
    def draw(self, ema, stop):
        """((clean, noisy, predicted) of the fixed batch, generated pictures, held-out loss or None); None if stopped."""
        (x0, t, eps, y), d, size = self.batch, self.diffusion, self.config.sample_batch_size
        xt = d.q_sample(x0, t, eps)
        with autocast(x0.device, self.precision):
            pred = d.predict_x0(ema(xt, t, y).float(), xt, t).clamp(-1, 1)
            held = [d.loss(ema, *part) for part in zip(*(v.split(64) for v in self.held), strict=True)]
        mine = list(range(self.rank, len(self.labels), self.world))  # every process draws its share
        drawn = torch.empty(0, *x0.shape[1:], dtype=torch.uint8)
        for chunk in (mine[i : i + size] for i in range(0, len(mine), size)):
            labels = [self.labels[i] for i in chunk]
            for _, x, _ in generate(ema, d, self.config, chunk, labels, self.precision):
                if stop.signal and self.world == 1:
                    return None
            drawn = torch.cat([drawn, to_pixels(x).cpu()])
        if self.world > 1:
            shares = [None] * self.world
            dist.all_gather_object(shares, drawn)
            drawn = torch.stack([shares[i % self.world][i // self.world] for i in range(len(self.labels))])
        return (x0, xt, pred), drawn, torch.cat(held).mean().item() if len(self.held[0]) else None


class RunLog:
    """What a run tells: banner, progress bar, metrics.jsonl, pictures and the list of files. On the first process."""

    def __init__(self, config, images, clock, resumed=None):
        self.config, self.images, self.resumed = config, images, resumed
        self.folder, self.files, self.rows = Path(config.samples_dir), {}, []
        self.since, self.bar = (clock.step, time.monotonic()), None

    def say(self, text):
        tqdm.write(text) if self.bar is not None else print(text, flush=True)

    def wrote(self, *paths):
        self.files.update(dict.fromkeys(str(Path(p).resolve()) for p in paths))

    def banner(self, model, clock, device, precision, world):
        c, im, n = self.config, self.images, len(self.images.train)
        size = network_size(c)
        self.say(f"data      {c.data_path}: {im.found} found, {n} to train on, {len(im.held_out)} held out, {len(im.bad)} "
                 f"unreadable; {c.image_size}x{c.image_size}, {im.channels} channel{'s' * (im.channels > 1)}")
        if im.class_names:
            counts = torch.bincount(im.labels[im.train].clamp(min=0), minlength=len(im.class_names)).tolist()
            pairs = [f"{name} {k}" for name, k in zip(im.class_names, counts, strict=True)]
            kind = "classes" if im.classes else "folders (labels not used)"
            self.say(f"{kind:9s} " + ", ".join(pairs[:12]) + (f" and {len(pairs) - 12} more" if len(pairs) > 12 else ""))
            if max(counts) > 10 * max(min(counts), 1):
                self.say("          The classes are far out of balance: expect the small ones to look worse.")
        parameters = sum(p.numel() for p in model.parameters())
        self.say(f"network   {c.arch}, {parameters:,} parameters, {multiply_adds(model, size) / 1e9:.2f} G multiply-adds a picture")
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
        if device.type == "cuda":
            memory = torch.cuda.mem_get_info(device)[1]
        else:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
        self.say(f"device    {device} ({name}, {memory / 2**30:.0f} GiB), {precision}, {world} process{'es' * (world > 1)}, "
                 f"torch {torch.__version__}")
        abar_T = make_diffusion(c).abar[-2].item()
        self.say(f"diffusion T {c.timesteps}, {c.schedule}, predicts {c.predict}, {c.loss}; abar_T {abar_T:.2g}")
        if abar_T > 0.01:
            self.say("warning: abar_T is above 0.01, so training never sees pure noise, which sampling starts from: "
                     "expect greyish or tinted pictures. Leave out --beta_start and --beta_end to mend it.")
        if clock.steps:
            total, planned = clock.steps, f"{clock.steps} steps"
            seen = total * c.batch_size
            plan = f"{planned} of {c.batch_size} = {seen:,} pictures, {seen / n:.1f} passes; {-(-total // c.save_every)} checkpoints"
        else:
            plan = f"{c.minutes:g} minutes, batches of {c.batch_size}"
        self.say(f"plan      {plan}, keeping {c.keep_last}, in {step_files(c.model_path)[0].resolve()}")
        if n < c.batch_size:
            self.say(f"warning: a batch of {c.batch_size} is more than the {n} pictures: they repeat within a batch.")
        if n < 1000:
            self.say(f"note: with {n} pictures the model will learn them by heart; about 1,000 and more make it invent.")
        if self.resumed:
            self.say(f"resuming  {self.resumed} at step {clock.step}")

    def start(self, clock, diffusion):
        """The pictures made before the first step, the first line of metrics.jsonl, and the progress bar."""
        c, im, folder = self.config, self.images, self.folder
        folder.mkdir(parents=True, exist_ok=True)
        metrics = folder / "metrics.jsonl"
        head = dict(config=dataclasses.asdict(c), torch=torch.__version__, python=platform.python_version(),
                    torchvision=torchvision.__version__, data=im.fingerprint)
        lines = metrics.read_text().splitlines() if self.resumed and metrics.exists() else []
        for line in lines[1:]:
            with contextlib.suppress(ValueError):  # a last line cut short by a crash
                row = json.loads(line)
                if row.get("step", math.inf) <= clock.step:
                    self.rows.append(row)
        text = "".join(json.dumps(row) + "\n" for row in [head, *self.rows])
        atomic_write(metrics, lambda f: f.write(text.encode()))
        rows = im.train[np.linspace(0, len(im.train) - 1, min(64, len(im.train))).astype(int)]
        pixels = im.pixels[torch.from_numpy(rows).to(im.pixels.device)].cpu()
        self.wrote(metrics, save_grid(pixels, folder / "dataset_grid.png", c),
                   plot_schedules(c, folder / "schedules.png"),
                   plot_forward_process(to_network(pixels[:1]), diffusion, folder / "forward_process.png", c))
        total = clock.steps or round(clock.limit)
        self.bar = tqdm(total=total, initial=min(clock.step if clock.steps else int(clock.seconds), total),
                        unit="step" if clock.steps else "s", dynamic_ncols=True, smoothing=0.05)

    def tick(self, clock):
        self.bar.update((clock.step if clock.steps else min(int(clock.seconds), self.bar.total)) - self.bar.n)

    def line(self, clock, sums, grad_norm, lr, device):
        """One line of metrics.jsonl: means over the steps since the line before."""
        (loss, count), now = sums, time.monotonic()
        steps, seconds = clock.step - self.since[0], now - self.since[1]
        self.since = clock.step, now
        row = dict(
            step=clock.step, epoch=round(clock.step * self.config.batch_size / len(self.images.train), 3),
            loss=sum(loss) / sum(count), loss_quarters=[a / b if b else None for a, b in zip(loss, count, strict=True)],
            lr=lr, grad_norm=grad_norm, pictures_per_s=round(steps * self.config.batch_size / seconds, 1),
            memory_mb=memory_mb(device), seconds=round(clock.seconds, 1),
        )
        self.write(row)
        self.bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)

    def write(self, row):
        self.rows.append(row)
        with open(self.folder / "metrics.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")

    def pictures(self, fixed, drawn, held, clock):
        c = self.config
        epochs = clock.step * c.batch_size / len(self.images.train)
        often = c.sample_every * c.batch_size < len(self.images.train)  # more than once an epoch
        tag = f"epoch{round(epochs, 2):g}" if often else f"epoch{int(epochs)}"
        for name, x in zip(("clean", "noisy", "pred"), fixed, strict=True):
            self.wrote(save_grid(to_pixels(x).cpu(), self.folder / f"{name}_{tag}.png", c, columns=len(x)))
        columns = grid_columns(len(drawn), self.images.classes)
        self.wrote(save_grid(drawn, self.folder / f"generated_{tag}.png", c, columns=columns))
        if held is not None:
            self.write(dict(step=clock.step, held_out_loss=held, seconds=round(clock.seconds, 1)))
        self.wrote(plot_loss(self.rows, self.folder / "loss_graph.png"))

    def close(self, stopped):
        self.bar.close()
        if stopped:
            self.say(f"Stopped by {signal.Signals(stopped).name}: saved. Go on with --mode train --resume.")
        print_files(self.files)


def memory_mb(device):
    """Peak memory so far in MB: the GPU's where there is one, else the process's (0 where it cannot be told)."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e6)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e6)


@torch.no_grad()
def multiply_adds(model, size):
    """Multiplications with an addition that one picture costs, forward."""
    device, training = next(model.parameters()).device, model.training
    model.eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, model.channels, size, size, device=device), torch.zeros(1, dtype=torch.int64, device=device))
    model.train(training)
    return counter.get_total_flops() / 2


def dry_run(net, diffusion, images, config, device, precision, slices):
    """One slice of a batch forward and backward, to see that it works and what memory it takes."""
    x0, y = images.batch(0, config.batch_size, 0, slices, device)
    t = torch.randint(config.timesteps, (len(x0),), device=device)
    with autocast(device, precision):
        losses = diffusion.loss(net, x0, t, torch.randn_like(x0), y)
    losses.mean().backward()
    print(f"dry run   pictures {tuple(x0.shape)} in [{x0.min().item():.2f}, {x0.max().item():.2f}], loss "
          f"{losses.mean().item():.4f}, peak memory {memory_mb(device)} MB; nothing was written")


# ---------------------------------------------------------------------------------------------------- sampling


def sample_labels(config, classes, n):
    """The class of each of n pictures: those of --classes, or all, in turn; -1 each where there are none."""
    names = [name.strip() for name in config.classes.split(",")] if config.classes else classes
    for name in names:
        if name not in classes:
            known = f"it knows {', '.join(classes)}" if classes else "it was trained without classes"
            raise UserError(f"--classes: the model has no class {name!r}; {known}.")
    return [classes.index(names[i % len(names)]) if names else -1 for i in range(n)]


def generate(model, diffusion, config, indices, labels, precision="fp32"):
    """Draw pictures number `indices` with these labels (-1: none), all at once; yields (t, x, x0) after each step.

    x and x0 are (n, C, H, W) float32 in [-1, 1]. They depend on the Config's seed and sampling settings only.
    """
    device = next(model.parameters()).device
    shape = (model.channels, model.image_size, model.image_size)
    noise = PictureNoise(config.seed, indices, shape, device)
    y = torch.tensor(labels, device=device)
    if config.guidance != 1 and not model.classes:
        raise UserError(f"--guidance {config.guidance:g} needs a model with classes: leave it out.")
    denoise = make_denoiser(model, diffusion, y, config.guidance, precision=precision)
    timesteps = spaced_timesteps(diffusion.T, config.sampling_steps)
    yield from SAMPLERS[config.sampler](diffusion, denoise, noise(), timesteps, noise, config.eta)


def find_model(config):
    """The model to sample from: --model_path, or the one shipped with the program until there is one."""
    path, shipped = Path(config.model_path), HERE / "saved_models" / "animals.pt"
    if not path.exists() and config.model_path == FIELDS["model_path"].default and shipped.exists():
        print(f"There is no {path} yet: drawing with the shipped model {shipped}.")
        return shipped
    return path


def sample(config):
    """Draw pictures with the model at config.model_path and write them. Returns uint8 (N, C, H, W)."""
    path = find_model(config)
    checkpoint = stored_config(read_checkpoint(path), path)
    config = merge(checkpoint, {name: getattr(config, name) for name in FOR_SAMPLING}, FOR_SAMPLING, path)
    check(config)
    keep_memory()
    device = choose_device(config.device)
    precision = choose_precision(config.precision, device)
    model, diffusion, _ = load_model(path, device, config.ema)
    labels = sample_labels(config, model.classes, config.num_samples)
    model_hash = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12]
    print(f"model     {path} ({model_hash}), {'averaged (EMA)' if config.ema else 'plain'} weights, trained on {config.data_path}")
    print(f"drawing   {config.num_samples} pictures, {config.sampler}, {config.sampling_steps} steps, seed {config.seed}, "
          f"guidance {config.guidance:g}, on {device} in {precision}")

    shown = min(8, config.num_samples)  # of these the whole way is kept, for denoising_steps.png and the GIF
    parts, way, size = [], [], config.sample_batch_size
    chunks = [list(range(i, min(i + size, config.num_samples))) for i in range(0, config.num_samples, size)]
    with tqdm(total=len(chunks) * config.sampling_steps, unit="step", dynamic_ncols=True) as bar:
        for chunk in chunks:
            frames = []
            for t, x, _ in generate(model, diffusion, config, chunk, [labels[i] for i in chunk], precision):
                frames.append((t, to_pixels(x[: shown if chunk[0] == 0 else 0]).cpu()))
                bar.update()
            parts.append(to_pixels(x).cpu())
            way = way or frames
    pixels = torch.cat(parts)

    folder, files = Path(config.samples_dir), {}
    text = dict(seed=config.seed, sampler=config.sampler, steps=config.sampling_steps, eta=config.eta,
                guidance=config.guidance, classes=config.classes or "all", model=model_hash)
    columns = grid_columns(len(pixels), model.classes if not config.classes else [])
    files[save_grid(pixels, folder / "generated_sample.png", config, columns, text)] = None
    files[plot_chain(way, diffusion.T, folder / "denoising_steps.png", config, text)] = None
    if config.gif:
        files[save_gif([frame for _, frame in way], folder / "denoising.gif", config)] = None
    if config.individual:
        for i, picture in enumerate(pixels):
            files[save_grid(picture[None], Path(config.individual) / f"{i:05d}.png", config, 1, text, whole=False)] = None
    print_files(files)
    return crop(pixels, config)


# ---------------------------------------------------------------------------------------------------- pictures


def crop(pixels, config):
    """Pictures as they are saved: without the border that 28 pixels are padded with. (N, C, H, W)."""
    border = (network_size(config) - config.image_size) // 2
    return pixels[..., border : border + config.image_size, border : border + config.image_size]


def grid_columns(n, classes):
    """Columns of a grid of n pictures: one a class where that fits, else about as many as rows."""
    return len(classes) if 2 <= len(classes) <= 12 and n >= len(classes) else math.ceil(math.sqrt(n))


def to_image(pixels):
    """(C, H, W) uint8 -> PIL picture."""
    array = pixels.permute(1, 2, 0).numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array[..., :3])


def save_grid(pixels, path, config, columns=None, text=None, whole=True):
    """Write pictures (N, C, H, W) uint8 as one PNG, small ones magnified in whole steps. Returns the path.

    `whole` draws a grid with gaps; without it, the one picture itself, at its own size. `text` goes into the PNG.
    """
    pixels = crop(pixels, config)
    if whole:
        zoom = max(1, 64 // pixels.shape[-1])
        pixels = pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
        columns = columns or math.ceil(math.sqrt(len(pixels)))
        image = to_image(torchvision.utils.make_grid(pixels, columns, padding=2, pad_value=255))
    else:
        image = to_image(pixels[0])
    info = PngImagePlugin.PngInfo()
    for key, value in (text or {}).items():
        info.add_text(f"ddpm:{key}", str(value))
    atomic_write(path, lambda f: image.save(f, "PNG", pnginfo=info))
    return str(Path(path).resolve())


def save_gif(frames, path, config):
    """The pictures (n, C, H, W) of each step as one animation that rests on the last. Returns the path."""
    frames = [frames[i] for i in np.unique(np.linspace(0, len(frames) - 1, min(60, len(frames))).astype(int))]
    images = [to_image(torchvision.utils.make_grid(crop(f, config), len(f), padding=2, pad_value=255)) for f in frames]
    durations = [80] * (len(images) - 1) + [2000]
    save = dict(save_all=True, append_images=images[1:], duration=durations, loop=0)
    atomic_write(path, lambda f: images[0].save(f, "GIF", **save))
    return str(Path(path).resolve())


INK, PAPER = "#222222", "#ffffff"
COLOURS = ("#1b6ca8", "#e07b39", "#3c8d5a", "#9b4f96", "#b8a125", "#777777")


def save_figure(figure, path):
    atomic_write(path, lambda f: figure.savefig(f, format="png", dpi=110, facecolor=PAPER))
    return str(Path(path).resolve())


def new_axes(*titles, width=4.6, height=3.4):
    """A figure with one plot beside the other, in the look of all our plots. Returns (figure, axes)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * len(titles), height), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for a, title in zip(axes, titles, strict=True):
        a.set_title(title, fontsize=11, color=INK)
        a.spines[["top", "right"]].set_visible(False)
        a.grid(alpha=0.25)
    return figure, axes


def show_rows(rows, column_titles, row_titles, path, config):
    """Pictures in rows, (C, H, W) uint8 each, with a title a column and a row. Returns the path."""
    from matplotlib.figure import Figure

    tile = 0.95
    figure = Figure(figsize=(tile * len(rows[0]) + (1.0 if any(row_titles) else 0.1), tile * len(rows) + 0.35),
                    layout="constrained")
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), len(rows[0]), squeeze=False)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            a = axes[i, j]
            a.imshow(to_image(crop(picture[None], config)[0]), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            a.set_xticks([])
            a.set_yticks([])
            a.spines[:].set_visible(False)
            if i == 0:
                a.set_title(column_titles[j], fontsize=10, color=INK, pad=3)
        axes[i, 0].set_ylabel(row_titles[i], fontsize=10, color=INK, rotation=0, ha="right", va="center")
    return save_figure(figure, path)


def plot_schedules(config, path):
    """abar_t and log-SNR of every schedule over t, the chosen one drawn thick."""
    figure, (left, right) = new_axes("signal left: $\\bar\\alpha_t$", "log signal-to-noise ratio")
    for kind, colour in zip(FIELDS["schedule"].metadata["choices"], COLOURS, strict=False):
        chosen = kind == config.schedule
        given = (config.beta_start, config.beta_end) if chosen else ()
        abar = Diffusion(make_betas(kind, config.timesteps, *given)).abar[:-1]
        style = dict(color=colour, lw=3 if chosen else 1.2, label=f"{kind} (chosen)" if chosen else kind)
        left.plot(abar, **style)
        right.plot(torch.log(abar / (1 - abar)), **style)
    for a in (left, right):
        a.set_xlabel("timestep t")
    right.set_ylim(-15, 12)
    left.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def plot_forward_process(x0, diffusion, path, config):
    """One picture (1, C, H, W) in [-1, 1], clean and noised at t = 100, 300, 500, ..., T-1 (fewer where T is small)."""
    T = diffusion.T
    ts = [t for t in range(100, T - 1, 200)] if T >= 500 else [round(T * k / 5) for k in range(1, 5)]
    device = diffusion.sqrt_abar.device
    x0, eps = x0.to(device), torch.randn(x0.shape, generator=torch.Generator().manual_seed(0)).to(device)
    row = [x0] + [diffusion.q_sample(x0, torch.tensor([t], device=device), eps) for t in [*ts, T - 1]]
    titles = ["clean"] + [f"t = {t}" for t in [*ts, T - 1]]
    return show_rows([[to_pixels(x)[0].cpu() for x in row]], titles, [""], path, config)


def plot_chain(way, T, path, config, text=None):
    """Some of the drawn pictures along the reverse process. way: (t, (n, C, H, W) uint8) after each step."""
    some = np.unique(np.linspace(0, len(way) - 1, min(9, len(way))).round().astype(int))
    titles = [f"t = {way[i][0]}" if i < len(way) - 1 else "result" for i in some]
    n = min(5, len(way[0][1]))
    return show_rows([[way[i][1][k] for i in some] for k in range(n)], titles, [""] * n, path, config)


def smooth(values, weight):
    """Exponential moving average without the bias of a zero start."""
    total, norm, out = 0.0, 0.0, []
    for v in values:
        total, norm = weight * total + (1 - weight) * v, weight * norm + 1 - weight
        out.append(total / norm)
    return out


def plot_loss(rows, path):
    """The loss by step, smoothed, with the held-out loss; and by quarter of the timesteps."""
    figure, (left, right) = new_axes("training loss", "loss by quarter of the timesteps")
    lines = [r for r in rows if "loss" in r]
    steps, weight = [r["step"] for r in lines], 0.9 if len(lines) > 20 else 0.5
    loss = [r["loss"] for r in lines]
    left.plot(steps, loss, color=COLOURS[0], alpha=0.25, lw=1)
    left.plot(steps, smooth(loss, weight), color=COLOURS[0], lw=2, label="training, smoothed")
    held = [(r["step"], r["held_out_loss"]) for r in rows if "held_out_loss" in r]
    if held:
        left.plot(*zip(*held, strict=True), "o-", color=COLOURS[1], ms=4, label="held out (EMA weights)")
    for q, name in enumerate(("t < T/4: fine detail", "to T/2", "to 3T/4", "to T: composition")):
        points = [(r["step"], r["loss_quarters"][q]) for r in lines if r["loss_quarters"][q] is not None]
        if points:
            x, y = zip(*points, strict=True)
            right.plot(x, smooth(y, weight), color=COLOURS[q], lw=1.8, label=name)
    for a in (left, right):
        a.set_yscale("log")
        a.set_xlabel("step")
        a.legend(fontsize=8, frameon=False)
    return save_figure(figure, path)


def print_files(files):
    """Say where everything is: a line a file, or a line a kind when there are many."""
    files = sorted(files)
    print("Wrote:")
    for path in files if len(files) <= 16 else files[:14]:
        print(f"  {path}")
    if len(files) > 16:
        print(f"  and {len(files) - 14} more in {', '.join(sorted({str(Path(f).parent) for f in files}))}")


# ------------------------------------------------------------------------------------------------ command line


def as_type(kind, text):
    """One word of the command line as int, float, str or, for tuples, several numbers between commas."""
    if kind is str:
        return text
    if kind == tuple[int, ...]:
        return tuple(int(part) for part in text.replace(",", " ").split())
    return kind(text)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        near = ""
        if "unrecognized arguments" in message:
            word = message.split(": ", 1)[1].split()[0]
            found = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
            near = f" Did you mean {found[0]}?" if found else ""
        print(f"error: {message}.{near} See python ddpm.py --help.", file=sys.stderr)
        raise SystemExit(2)


def make_parser():
    """The command line, made from the fields of Config."""
    parser = Parser("ddpm.py", description=__doc__.split("\n\n")[0], allow_abbrev=False, add_help=True)
    parser.add_argument("--mode", choices=("train", "sample"), required=True, help="learn from pictures, or draw new ones")
    groups = {}
    for name, f in FIELDS.items():
        limits, kind = f.metadata, TYPES[name]
        group = limits["group"]
        groups[group] = groups.get(group) or parser.add_argument_group(group)
        default = ",".join(map(str, f.default)) if isinstance(f.default, tuple) else f.default
        text = limits["meaning"] + ("" if f.default is None or kind is bool else f" (default: {default})")
        text = text.replace("%", "%%")
        if kind is bool:
            on = " (default)" if f.default else ""
            groups[group].add_argument(f"--{name}", action="store_const", const=True, help=text + on)
            groups[group].add_argument(f"--no_{name}", dest=name, action="store_const", const=False, help=argparse.SUPPRESS)
            continue
        base = next((a for a in typing.get_args(kind) if a is not type(None)), kind) if kind != tuple[int, ...] else kind
        choices = tuple(PRESETS) if name == "preset" else limits["choices"]
        extra = dict(nargs="?", const="latest", metavar="PATH") if name == "resume" else {}
        if base == tuple[int, ...]:
            extra = dict(nargs="+", metavar="N")
        elif not choices and name != "resume":
            extra = dict(metavar={int: "N", float: "X", str: "TEXT"}[base])
        word = int if base == tuple[int, ...] else base

        def convert(s, base=base, name=name):
            try:
                return as_type(base, s)
            except ValueError:
                wanted = {int: "a whole number", float: "a number"}.get(base, "whole numbers")
                raise argparse.ArgumentTypeError(f"{s!r} is not {wanted}") from None

        groups[group].add_argument(f"--{name}", type=convert, choices=choices, help=text, **extra)
        del word
    return parser


def parse(argv):
    """The command line as (mode, the settings that it gives)."""
    argv = [a.split("=")[0].replace("-", "_").replace("__", "--", 1) + a[len(a.split("=")[0]) :] if a.startswith("--") else a
            for a in argv]
    given = {k: v for k, v in vars(make_parser().parse_args(argv)).items() if v is not None}
    for name in given:
        if TYPES.get(name) == tuple[int, ...]:
            given[name] = tuple(n for part in given[name] for n in part)
    return given.pop("mode"), given


def main(argv=None):
    """Run the command line; returns the exit code. Errors that the user can mend are printed without a traceback."""
    mode, given = parse(sys.argv[1:] if argv is None else argv)
    try:
        if mode == "train":
            if given.get("resume"):
                path, checkpoint = find_resume(override(Config(), **given))
                config = merge(stored_config(checkpoint, path), given, MAY_CHANGE, path)
            else:
                config = preset(given.get("preset", Config.preset), **given)
            train(config)
        else:
            path = find_model(override(Config(), **given))
            config = merge(stored_config(read_checkpoint(path), path), given, FOR_SAMPLING, path)
            sample(override(config, model_path=str(path)))
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    except torch.OutOfMemoryError:
        print("error: Out of GPU memory: try a larger --grad_accum, a smaller --image_size or --sample_batch_size.", file=sys.stderr)
        return 1
    except OSError as e:
        print(f"error: {e.strerror or e}: {e.filename or 'a file could not be written'}. Nothing that was saved before is "
              "lost: make room or choose another --model_path or --samples_dir.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
