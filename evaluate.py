"""evaluate.py: how good is a model? Bits per dimension, loss by timestep, copying, FID and KID.

    python evaluate.py                               # the model that --mode sample samples from
    python evaluate.py --num_samples 50000           # of more samples, and with FID and KID
    python evaluate.py --features NETWORK.pt         # FID and KID by features of your own
    torchrun --nproc_per_node=8 evaluate.py --num_samples 50000

It measures on the images that --holdout kept for validation, and beside them on training images: a
model that does better on these has memorised them. FID and KID are expensive, and say nothing about
a handful of samples, so they come only when --num_samples or --features is given. Papers, besides
those in ddpm.py:

    Kingma et al. 2021, Variational diffusion models                     arXiv:2107.00630
    Heusel et al. 2017, Two time-scale update rule (FID)                 arXiv:1706.08500
    Binkowski et al. 2018, Demystifying MMD GANs (KID)                   arXiv:1801.01401
"""

import dataclasses
import json
import math
import platform
import sys
import textwrap
import typing
import warnings
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

import ddpm
from ddpm import UserError, require

FLAGS = {  # settings of ddpm.py that can be given here
    "places": ["model_path", "samples_dir"],
    "as the model's checkpoint has it, unless given": [
        "data_path", "download_dir", "num_samples", "sample_batch_size", "sampler",
        "sampling_steps", "spacing", "eta", "classes", "prompt", "prompts", "guidance", "ema", "seed",
        "device", "precision"]}
MAX_COMPARED = 1000  # samples, and real images, whose nearest training images are looked for
MAX_KID = 10_000  # images of a set for KID, which keeps their features

class Unavailable(UserError):
    """Something is missing that the rest can do without."""

# -------------------------------------------------------------------------------- several processes

def all_gather(value):
    """The values of torchrun's processes in their order: a list, the same in all of them."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    values = [value] * world_size
    if world_size > 1:
        dist.all_gather_object(values, value)
    return values

def distribute(description, work, rows, size):
    """[work(part) for part in parts], at most `size` of the rows (n,) each, done by torchrun's
    processes in turn: the same list in all of them. description: for the progress bar."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    n = max(math.ceil(len(rows) / size), min(len(rows), world_size))
    parts = np.array_split(rows, n) if n else []
    mine = tqdm(parts[rank::world_size], description, leave=False, delay=2, disable=rank > 0)
    results = all_gather([work(part) for part in mine])
    return [results[i % world_size][i // world_size] for i in range(len(parts))]

# ---------------------------------------------------------------------- bits per dimension and loss

def make_strata(T, n):
    """The timesteps 0..T-1 as ranges (first, beyond): t = 0 alone, and n ranges of the others,
    shorter towards t = 1, where the bound's terms are largest. From n = T-1 on, every timestep is a
    range."""
    n = min(n, T - 1)
    k = np.arange(n + 1)
    quadratic = np.round((T - 1) * (k / n) ** 2)
    edges = (1 + np.maximum(k, quadratic).astype(int)).tolist()
    return [(0, 1), *zip(edges, edges[1:])]

def step_term(diffusion, x0, pred_x0, t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of Ho et al. 2020, eq. 5, for t >= 1, in nats
    per image: (n,) float64. Both Gaussians have the posterior's variance (fixed-small); what is
    left is the squared error of the predicted x0 times half of what the SNR loses (Kingma et al.
    2021). x0, pred_x0: (n, C, H, W); t: (n,)."""
    snr = diffusion.abar[:-1] / (1 - diffusion.abar[:-1])                       # (T,)
    squared_error = (x0 - pred_x0).square().flatten(1).sum(1).cpu().double()    # (n,)
    return (snr[t - 1] - snr[t]) / 2 * squared_error

def decoder_term(x0, mean, std):
    """-log p(x_0 | x_1) in nats, (N, C, H, W) float64: a Gaussian's mass in the bin of 2/255 around
    x0, where the bins at -1 and 1 reach to infinity (Ho et al. 2020, eq. 13)."""
    pixels = ddpm.to_pixels(x0).cpu().double()
    error = pixels / 127.5 - 1 - mean.cpu().double()
    low = torch.where(pixels == 0, -math.inf, (error - 1 / 255) / std)
    high = torch.where(pixels == 255, math.inf, (error + 1 / 255) / std)
    # In the right tail the distribution function rounds to 1: mirror the bin to the left.
    in_right_tail = low + high > 0
    left = torch.where(in_right_tail, -high, low)
    right = torch.where(in_right_tail, -low, high)
    log_left = torch.special.log_ndtr(left)
    log_right = torch.special.log_ndtr(right)
    # -log(e^log_right - e^log_left)
    return -(log_right + torch.log(-torch.expm1(log_left - log_right)))

def prior_term(diffusion, x0):
    """KL(q(x_T | x_0) || N(0, 1)) in nats per image: (n,) float64."""
    abar = diffusion.abar[-2]
    per_value = abar * (x0.cpu().double().square() - 1) - torch.log1p(-abar)
    return per_value.flatten(1).sum(1) / 2

@torch.no_grad()
def measure_batch(model, diffusion, x0, y, rows, strata, seed, precision):
    """The bound and the loss of images x0 (n, C, H, W) with labels y (n,), at one random timestep
    of each of the strata; the noise is a function of the seed and the rows (n,). Returns prior (n,)
    and terms (strata, n) in nats per image and timestep, losses as in training (strata, n):
    float64."""
    stream = ddpm.derive_seed(seed, ddpm.Stream.EVALUATION)
    noise = ddpm.ImageNoise(stream, rows, x0.shape[1:], x0.device)
    terms = []
    losses = []
    for first, beyond in strata:
        t = torch.stack([torch.randint(first, beyond, (), generator=g) for g in noise.generators])
        t_device = t.to(x0.device)
        eps = noise()
        xt = diffusion.q_sample(x0, t_device, eps)
        with ddpm.autocast(x0.device, precision):
            out = model(xt, t_device, y).float()                                # (n, C, H, W)
        pred_x0 = diffusion.predict_x0(out, xt, t_device).clamp(-1, 1)
        if first:
            terms.append(step_term(diffusion, x0, pred_x0, t))
        else:  # at t = 0 the posterior's variance is 0: DDPM's code takes that of t = 1
            std = diffusion.posterior_std(1, 0)
            terms.append(decoder_term(x0, pred_x0, std).flatten(1).sum(1))
        loss = diffusion.loss(lambda *_, out=out: out, x0, t_device, eps, y)
        losses.append(loss.cpu().double())
    return prior_term(diffusion, x0), torch.stack(terms), torch.stack(losses)

def summarise(prior, terms, losses, strata, num_values):
    """Numbers from what `measure_batch` returns: means over the images, in bits per dimension of so
    many values per image."""
    width = torch.tensor([beyond - first for first, beyond in strata]).double()  # (strata,)
    nats = torch.cat([prior[None], terms * width[:, None]])                      # (1 + strata, n)
    bits = nats / math.log(2) / num_values
    total = bits.sum(0)                                                          # (n,)
    n = len(total)
    prior_bits, decoder_bits, *step_bits = bits.mean(1).tolist()
    loss = losses.mean(1)                                                        # (strata,)
    by_timestep = []
    for (first, beyond), b, v in zip(strata, [decoder_bits, *step_bits], loss.tolist()):
        by_timestep.append(dict(first=first, last=beyond - 1, bits=b, loss=v))
    return dict(
        images=n,
        bits=total.mean().item(),
        bits_error=total.std().item() / n**0.5 if n > 1 else None,
        prior=prior_bits,
        steps=sum(step_bits),
        decoder=decoder_bits,
        loss=((loss * width).sum() / width.sum()).item(),
        by_timestep=by_timestep)

def labels_of_model(images, model):
    """The labels of all images as the model counts its words (N, L), or its classes (N,); -1 for a
    class it does not know."""
    if model.vocabulary:
        return torch.tensor(ddpm.encode(images.captions, model.vocabulary))
    numbers = {name: i for i, name in enumerate(model.class_names)}
    table = [numbers.get(name, -1) for name in images.all_class_names]
    return torch.tensor([*table, -1])[images.labels]  # label -1 picks the last

def labels_in_proportion(images, model, n):
    """n labels of the model's classes, each as often as among the training images, which FID and
    KID compare with; [] if it knows none of their classes."""
    labels = labels_of_model(images, model)[np.sort(images.train)]
    known = labels[labels >= 0].tolist()
    return [known[len(known) * i // n] for i in range(n)] if known else []

def measure_rows(setup, rows, strata):
    """What `summarise` returns for the images in some rows, which are measured a few at a time."""
    labels = labels_of_model(setup.images, setup.model)
    device = setup.runtime.device

    def measure_part(part):
        x0, _ = setup.images.take(part, device)
        y = labels[torch.from_numpy(part)].to(device)
        return measure_batch(setup.model, setup.diffusion, x0, y, part, strata, setup.config.seed,
                             setup.runtime.precision)

    results = distribute("measuring", measure_part, rows, 32)
    prior, terms, losses = (torch.cat(parts, -1) for parts in zip(*results))
    return summarise(prior, terms, losses, strata, setup.num_values)

def plot_by_timestep(sets, path):
    """Loss and bits by timestep, a line for each set {name: numbers}. Returns the path."""
    titles = ["loss", "bits per dimension of one timestep"]
    figure, (left, right) = ddpm.plot_pair(titles, "timestep t")
    for (name, numbers), colour in zip(reversed(sets.items()), ddpm.COLOURS):
        rows = numbers["by_timestep"]
        middle = np.array([(row["first"] + row["last"]) / 2 for row in rows])
        losses = [row["loss"] for row in rows]
        bits = [row["bits"] / (row["last"] - row["first"] + 1) for row in rows]
        style = dict(color=colour, lw=1.8, label=f"{name}, {numbers['images']} images")
        left.plot(middle, losses, **style)
        right.plot(middle + 1, bits, **style)
    right.set_xscale("log")  # most bits go to the first few timesteps
    right.set_xlabel("timestep t, plus 1")
    for ax in (left, right):
        ax.set_yscale("log")
        ax.legend(fontsize=8, frameon=False)
    return ddpm.save_figure(figure, path)

# --------------------------------------------------------------------------------- memorised images

def pick(images, rows, config):
    """Cropped pixels (n, C, H, W) uint8 of some rows, on the device where all of them are."""
    rows = torch.as_tensor(rows).to(images.pixels.device)
    return ddpm.crop(images.pixels[rows], config.image_size)

def to_vectors(pixels, device):
    """Images (n, C, H, W) uint8 as vectors (n, D) whose distance is the root mean square difference
    in grey levels; images of more than 64 pixels are averaged down to that."""
    size = [min(64, side) for side in pixels.shape[2:]]
    parts = []
    where = "cpu" if torch.device(device).type == "mps" else device  # MPS pools to few sizes only
    for part in pixels.split(64):
        centred = part.to(where).float() - 127.5
        parts.append(F.adaptive_avg_pool2d(centred, size).flatten(1).to(device))
    return torch.cat(parts) / parts[0].shape[1] ** 0.5

def nearest(pixels, images, config, device, own=None):
    """The training image nearest to each of pixels (n, C, H, W) uint8; mirrored ones count where
    training used them. own: rows (n,) of these images themselves, which do not count. Returns
    distances (n,), rows (n,), whether mirrored (n,)."""
    n = len(pixels)
    queries = to_vectors(pixels, device)
    own = torch.full((n,), -1) if own is None else torch.as_tensor(own)

    def nearest_in(part):
        candidates = pick(images, part, config)
        rows = torch.from_numpy(part)
        found = []
        for flip in (False, True) if config.hflip else (False,):
            vectors = to_vectors(candidates.flip(3) if flip else candidates, device)
            distance = torch.cdist(queries, vectors).cpu()                      # (n, part)
            distance[own[:, None] == rows] = math.inf
            least, at = distance.min(1)
            found.append((least, rows[at], torch.full((n,), flip)))
        return found

    size = min(2**26 // pixels[0].numel(), 2**16)  # 64 MiB at a time, so that any number fits
    found = sum(distribute("comparing", nearest_in, images.train, size), [])
    distances, rows, mirrored = (torch.stack(each) for each in zip(*found))     # (found, n) each
    best = distances.argmin(0, keepdim=True)
    return tuple(each.gather(0, best)[0] for each in (distances, rows, mirrored))

def copying(samples, images, config, device):
    """Are samples (N, C, H, W) uint8 nearer to the training images than real images are? Those are
    of validation or, without any, of training, each against the rest. Returns numbers, and up to 16
    samples, each beside its nearest, as rows of images (rows, columns, C, H, W) uint8."""
    has_validation = len(images.validation) > 0
    candidates = images.validation if has_validation else images.train
    real_rows = ddpm.evenly_spaced(candidates, MAX_COMPARED)
    real = pick(images, real_rows, config)
    real_distance, _, _ = nearest(real, images, config, device, real_rows)
    real_median = real_distance.median().item()
    distance, rows, mirrored = nearest(samples[:MAX_COMPARED], images, config, device)
    comparable = math.isfinite(real_median)  # it is not for one training image and no validation
    n = min(len(samples), 16) // 4 * 4 or len(samples)
    first = [dict(distance=d, row=row) for d, row in zip(distance[:n].tolist(), rows[:n].tolist())]
    numbers = dict(
        samples=len(distance),
        fraction=(distance < real_median).double().mean().item() if comparable else None,
        median=distance.median().item(),
        real=len(real_rows),
        real_median=real_median if comparable else None,
        real_set="validation" if has_validation else "training",
        first=first)
    found = pick(images, rows[:n], config).cpu()
    found = torch.where(mirrored[:n, None, None, None], found.flip(3), found)
    pairs = torch.stack([samples[:n], found], 1)                            # (n, 2, C, H, W)
    return numbers, pairs.unflatten(0, (-1, min(n, 4))).flatten(1, 2)       # up to 4 pairs a row

def plot_copies(pairs, path):
    """Write what `copying` returns as a PNG. Returns the path."""
    rows = {" " * i: row for i, row in enumerate(pairs)}  # without a name
    titles = ["sample", "nearest"] * (pairs.shape[1] // 2)
    return ddpm.plot_rows(rows, titles, path)

# -------------------------------------------------------------------------------------- FID and KID

def inception(device):
    """features(pixels (n, C, H, W) uint8) -> (n, 2048): what FID is defined by, grey repeated to
    three channels."""
    from torch_fidelity import feature_extractor_inceptionv3 as source
    try:
        net = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except (OSError, RuntimeError) as e:  # no network connection, or a damaged file
        raise Unavailable(
            f"no FID and KID: Inception's weights could not be downloaded ({e}). Put the file "
            f"{source.URL_INCEPTION_V3} into {torch.hub.get_dir()}/checkpoints, or give "
            "--features FILE"
        ) from None
    return lambda pixels: net(pixels.to(device).expand(-1, 3, -1, -1))[0]

def load_features(path, example, device):
    """features(pixels (n, C, H, W) uint8) -> (n, D) by the TorchScript network in a file, for
    float32 images in [-1, 1]. The only file not read with weights_only: TorchScript is code that
    runs, so it has to be trusted. example: images to try it on."""
    require(Path(path).is_file(),
            f"No file {path}: give --features the path of a TorchScript network.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of PyTorch prefer torch.export
            net = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError):
        raise UserError(f"{path} is not TorchScript, or damaged: write one with "
                        "torch.jit.trace(network, images).save(FILE).") from None
    features = lambda pixels: net(ddpm.to_network(pixels).to(device))  # noqa: E731
    fault = features_fault(features, example)
    require(not fault, f"The network in {path} {fault} images {tuple(example.shape)}: it has to "
            "return (images, features).")
    return features

def features_fault(features, example):
    """What is wrong with the features of example images, in a few words; None for nothing."""
    try:
        out = features(example)
        if not out.isfinite().all():
            return "is not finite on"
        if out.ndim != 2 or len(out) != len(example):
            return f"returns {tuple(out.shape)} for"
    except Exception as e:  # the code may be anybody's
        reason = str(e).strip() or repr(e)
        return f"fails ({reason.splitlines()[-1]}) on"
    return None

def choose_features(path, images, config, device):
    """The features for FID and KID, of the network at `path` or Inception's: (features, None), or
    (None, a sentence) where something that they need is missing."""
    try:
        import torchmetrics  # noqa: F401
        if not path:
            return inception(device), None
        example = pick(images, images.train[:2], config)
        return load_features(path, example, device), None
    except ImportError as e:
        return None, f"no FID and KID without {e.name}: pip install torchmetrics torch-fidelity"
    except Unavailable as e:
        return None, str(e)

class FidAndKid:
    """FID and KID of samples from one set of real images, by torchmetrics, from their features."""
    def __init__(self, num_features, num_samples, num_real):
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.kid import KernelInceptionDistance
        identity = nn.Identity()  # the features are computed outside, once for all sets
        identity.num_features = num_features
        size = min(1000, num_real, num_samples)
        subsets = 100 if size < max(num_real, num_samples) else 1  # of everything there is only one
        self.num_features = num_features
        self.num_real = num_real
        self.fid = FrechetInceptionDistance(feature=identity)  # adds up over all processes
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about memory
            self.kid = KernelInceptionDistance(  # every process has all of its features
                feature=identity, subsets=subsets, subset_size=size, sync_on_compute=False)
        self.fid.update(torch.zeros(0, num_features), real=True)  # a process may have no part

    def compute(self, seed):
        """The numbers; seed: of KID's subsets."""
        torch.manual_seed(seed)
        kid, kid_std = self.kid.compute()
        return dict(
            fid=self.fid.compute().item(),
            kid=kid.item(),
            kid_error=kid_std.item() if self.kid.subsets > 1 else None,
            kid_subsets=self.kid.subsets,
            kid_subset_size=self.kid.subset_size,
            reference=self.num_real,
            features=self.num_features)

def add_features(features, pixels_of, rows, real, meters, seed):
    """Compute the features of the images in some rows, for each of the meters, `FidAndKid`: FID of
    all of them, KID of MAX_KID at most. pixels_of(rows): (n, C, H, W) uint8; real: not samples."""
    def add_to_fid(part):
        f = features(pixels_of(part)).float().cpu()                             # (part, D)
        for meter in meters:
            meter.fid.update(f, real=real)
        return f

    def add_and_drop(part):
        add_to_fid(part)

    order = np.random.default_rng(seed).permutation(rows)
    for f in distribute("features", add_to_fid, order[:MAX_KID], 64):
        for meter in meters:
            meter.kid.update(f, real=real)
    distribute("features", add_and_drop, order[MAX_KID:], 64)

@torch.no_grad()
def distances(features, samples, images, sets, config):
    """FID and KID of samples (N, C, H, W) uint8 from each of the sets of real images, {name: rows}.
    Returns {name: numbers}."""
    sets = {name: rows for name, rows in sets.items() if len(rows) > 1}  # one has no covariance
    num_features = features(samples[:2]).shape[1]
    meters = {name: FidAndKid(num_features, len(samples), len(rows)) for name, rows in sets.items()}

    def samples_of(rows):
        return samples[torch.from_numpy(rows)]

    def images_of(rows):
        return pick(images, rows, config)

    all_samples = np.arange(len(samples))
    add_features(features, samples_of, all_samples, False, meters.values(), config.seed)
    numbers = {}
    for name, rows in sets.items():
        meter = meters.pop(name)  # so that its memory is free after each turn
        add_features(features, images_of, rows, True, [meter], config.seed)
        numbers[name] = meter.compute(config.seed)
    return numbers

# -------------------------------------------------------------------------------------- the command

@dataclasses.dataclass
class Setup:
    """All that is loaded before anything is measured. path: of the checkpoint; trained_on:
    fingerprint of its training images, None if unknown; labels: of the samples; features: None for
    no FID and KID; missing: why there are none although they were asked for, else None."""
    path: str
    trained_on: str | None
    config: ddpm.Config
    runtime: ddpm.Runtime
    model: nn.Module
    diffusion: ddpm.Diffusion
    images: ddpm.Images
    labels: list
    features: typing.Callable | None
    features_name: str
    missing: str | None

    @property
    def num_values(self):
        """Values of an image; where it has a border, the bound is of the whole, per value inside
        it."""
        height, width = ddpm.image_sides(self.config.image_size)
        return self.model.image_channels * height * width

@dataclasses.dataclass
class Measured:
    """sets: {name: numbers}; copies, pairs: of `copying`."""
    num_samples: int
    strata: list
    sets: dict
    copies: dict
    pairs: torch.Tensor

def load(given, features_path):
    """The Setup for some settings; what can go wrong goes wrong here, before the sampling, which
    may take long. given, features_path: as in `evaluate`."""
    path = ddpm.find_model(given.get("model_path", ddpm.Config.model_path))
    checkpoint = ddpm.read_checkpoint(path)
    changes = {name for names in FLAGS.values() for name in names}
    all_kinds = dict(classes=None, prompt=(), prompts=None)  # training's are of its previews alone
    config = ddpm.sampling_config(checkpoint, path, all_kinds | given, changes)
    ddpm.check(config)
    ddpm.warn_of_unused(config, given)
    with_features = features_path or "num_samples" in given
    require(config.num_samples > 1 or not with_features,
            "--num_samples 1: FID and KID need two images or more.")
    runtime = ddpm.start_runtime(config)
    model = ddpm.model_from_checkpoint(checkpoint, path, config.ema).to(runtime.device)
    split_seed = ddpm.stored_config(checkpoint, path).seed  # it chose the validation images
    as_trained = dict(seed=split_seed, captions=bool(model.vocabulary))
    images = ddpm.load_images(ddpm.override(config, **as_trained), runtime.device)
    require(images.channels == model.image_channels,
            f"{path} samples images of {model.image_channels} channels, and those in "
            f"{config.data_path} have {images.channels}: give the --data_path of its training.")
    require(images.white in (None, model.white),
            f"In the images of {config.data_path} {images.white} is white, in those of the model's "
            f"training {model.white or 255}: convert all to 8 bits, on one scale.")
    require(len(set(all_gather(images.fingerprint))) == 1,
            "The processes see different images: give all of them the same in --data_path.")
    features = None
    missing = None
    if with_features:
        features, missing = choose_features(features_path, images, config, runtime.device)
    missing = next(filter(None, all_gather(missing)), None)
    if missing:  # in one process: all do without
        features = None
        print_entry("note", missing)
    if images.vocabulary:  # sample what the images show, unless there is a --prompt
        rows = ddpm.evenly_spaced(images.train, config.num_samples)
        model.examples = [images.captions[row] for row in rows]
    labels, _ = ddpm.sample_conditions(config, model)
    if model.class_names and not config.classes:
        labels = labels_in_proportion(images, model, config.num_samples) or labels
    Path(config.samples_dir).mkdir(parents=True, exist_ok=True)  # fails now if that cannot be
    return Setup(
        path=path, trained_on=checkpoint.get("data"), config=config, runtime=runtime, model=model,
        diffusion=ddpm.make_diffusion(config, runtime.device), images=images, labels=labels,
        features=features, features_name=str(features_path or "Inception"), missing=missing)

def sample(setup):
    """The samples to measure, uint8 (N, C, H, W), with a progress bar."""
    config = setup.config
    runtime = setup.runtime
    mine = ddpm.process_share(len(setup.labels))
    total = math.ceil(len(mine) / config.sample_batch_size) * config.sampling_steps
    with tqdm(total=total, desc="sampling", unit="step", leave=False,
              disable=not runtime.is_main) as bar:
        batches = [pixels for _, pixels in ddpm.sample_batches(
            setup.model, setup.diffusion, config, setup.labels, runtime.precision, mine,
            lambda *_: bar.update())]
    return ddpm.gather_images(batches, config, setup.model)

def measure(setup, bpd_timesteps, bpd_images):
    """Measure a Setup, in all processes: `Measured`."""
    samples = sample(setup)
    images = setup.images
    rows_of = {"validation": images.validation, "training": images.train}
    rows_of = {name: rows for name, rows in rows_of.items() if len(rows)}
    strata = make_strata(setup.diffusion.T, bpd_timesteps)
    sets = {}
    for name, rows in rows_of.items():
        sets[name] = measure_rows(setup, ddpm.evenly_spaced(rows, bpd_images), strata)
    copies, pairs = copying(samples, images, setup.config, setup.runtime.device)
    if setup.features:
        found = distances(setup.features, samples, images, rows_of, setup.config)
        for name, numbers in found.items():
            sets[name] |= numbers
    return Measured(len(samples), strata, sets, copies, pairs)

def describe(setup, measured):
    """What was measured and how, {name: sentence}; None for nothing to say."""
    config = setup.config
    images = setup.images
    digest = ddpm.model_digest(setup.path)
    coverage = "every timestep"
    if len(measured.strata) < setup.diffusion.T:
        coverage = (f"t = 0 and {len(measured.strata) - 1} ranges of timesteps, an image at a "
                    "random one of each")
    asked = "without classes"
    given = ""
    if setup.model.class_names:
        asked = f"classes {config.classes or 'all'}"
        given = "labels given, no guidance; "
    elif setup.model.vocabulary:
        asked = "captions as asked for" if config.prompt or config.prompts else "training captions"
        given = "captions given, no guidance; "
    features = None
    if setup.features:
        features = f"{setup.features_name}; KID +- is the standard deviation over its subsets"
    return dict(
        model=f"{Path(setup.path).resolve()} ({digest}), {setup.model.weights_kind} weights",
        images=f"{config.data_path}, {ddpm.size_text(config.image_size)}: "
               f"{len(images.train):,} for training, {len(images.validation):,} for validation "
               f"({images.fingerprint})",
        samples=f"{measured.num_samples:,}: {config.sampler}, {config.sampling_steps} steps, "
                f"{config.spacing} spacing, x0 clipped, guidance {config.guidance:g}, "
                f"seed {config.seed}, {asked}",
        bound=f"{setup.num_values:,} values per image; {coverage}; variance fixed-small, at t = 0 "
              f"that of t = 1; x0 clipped; {given}+- is the standard error over images",
        features=features,
        device=f"{ddpm.describe_device(setup.runtime.device)}, {setup.runtime.precision}")

def describe_copies(numbers):
    """The numbers of `copying` as a sentence; None if there is nothing to compare the samples
    with."""
    if numbers["fraction"] is None:
        return None
    real_set = numbers["real_set"]
    return (f"{numbers['fraction']:.0%} of {numbers['samples']:,} samples are nearer to a training "
            f"image than the median of {numbers['real']:,} {real_set} images is (root mean square "
            f"in grey levels: samples {numbers['median']:.1f}, {real_set} "
            f"{numbers['real_median']:.1f}). New images give about 50 %, memorised ones 100 %; "
            "blurred ones are near to everything")

def caveats(setup, measured):
    """What has to be known to read the numbers: sentences."""
    if setup.missing:
        yield setup.missing
    if not len(setup.images.validation):
        yield ("no image was kept for validation (--holdout): the numbers of training images are "
               "better than those of new ones")
    here = setup.images.fingerprint
    if not setup.trained_on:
        yield "the model does not say which images it was trained on"
    elif setup.trained_on != here:
        yield (f"the model was trained on other images ({setup.trained_on}; here {here}): "
               "so the split into training and validation images does not apply")
    if any(numbers["bits"] > 8 for numbers in measured.sets.values()):
        yield ("above 8 bits the bound says nothing: at the least noise the predicted x0 is "
               "coarser than the decoder expects, as is usual with --predict x0; the samples can "
               "be good all the same")
    for name, numbers in measured.sets.items():
        if "fid" not in numbers:
            continue
        n = min(measured.num_samples, numbers["reference"])
        if n <= numbers["features"]:
            yield (f"FID, {name}: {n:,} images do not determine the covariance of "
                   f"{numbers['features']:,} features, so that the number compares with no other; "
                   "look at KID")

def print_entry(name, text):
    """Print a name and its text, on several lines if it is long; nothing for no text."""
    if text:
        wrapped = textwrap.fill(
            f"{name:9} {text}", 100, subsequent_indent=" " * 10,
            break_long_words=False, break_on_hyphens=False)  # paths stay whole
        print(wrapped)

ROWS = [  # of the table: name, number, its format, the number for +-
    ("images measured", "images", ",", None),
    ("bits per dimension", "bits", ".3f", "bits_error"),
    ("  prior, L_T", "prior", ".2g", None),
    ("  steps, L_1 to L_T-1", "steps", ".3f", None),
    ("  decoder, L_0", "decoder", ".3f", None),
    ("loss", "loss", ".4g", None),
    ("images for FID", "reference", ",", None),
    ("FID of the samples", "fid", ".4g", None),
    ("KID of the samples", "kid", ".4g", "kid_error")]

def table_cell(numbers, key, form, error_key):
    """One number as text, with its +- if there is one; empty if it was not measured."""
    if key not in numbers:
        return ""
    cell = f"{numbers[key]:{form}}"
    error = numbers.get(error_key)
    return cell if error is None else f"{cell} +- {error:{form}}"

def print_table(sets):
    """The numbers of all sets {name: numbers}, a column each; what was not measured is left out."""
    print(f"\n{'':22}", *(f"{name:>20}" for name in sets))
    for name, key, form, error_key in ROWS:
        cells = [table_cell(numbers, key, form, error_key) for numbers in sets.values()]
        if any(cells):
            print(f"{name:22}", *(f"{cell:>20}" for cell in cells))
    print()

def report(setup, measured):
    """Print all numbers, write plots and evaluation.json. Returns what that file has."""
    config = setup.config
    folder = Path(config.samples_dir)
    result = describe(setup, measured)
    for name, text in result.items():
        print_entry(name, text)
    print_table(measured.sets)
    result["copies"] = describe_copies(measured.copies)
    print_entry("copies", result["copies"])
    notes = list(caveats(setup, measured))
    for note in notes:
        print_entry("note", note)
    result |= dict(
        sets=measured.sets, copying=measured.copies, notes=notes, num_samples=measured.num_samples,
        ema=setup.model.weights_kind == "EMA", config=dataclasses.asdict(config),
        torch=torch.__version__,
        torchvision=torchvision.__version__, python=platform.python_version())
    written = json.dumps(result, indent=1).encode()
    files = [ddpm.atomic_write(folder / "evaluation.json", lambda f: f.write(written))]
    with ddpm.optional("plotting"):
        files.append(plot_by_timestep(measured.sets, folder / "loss_by_timestep.png"))
        files.append(plot_copies(measured.pairs, folder / "nearest.png"))
    ddpm.print_files(files)
    return result

def evaluate(given, features=None, bpd_timesteps=50, bpd_pictures=64):
    """Measure a model, print a table, write plots and evaluation.json. Returns what that file has,
    None in processes other than the first. given: settings in FLAGS that differ from the
    checkpoint's; features: path of a TorchScript network; bpd_timesteps, bpd_pictures: how finely
    to measure the bound."""
    require(min(bpd_timesteps, bpd_pictures) > 0,
            "--bpd_timesteps and --bpd_pictures: give 1 or more.")
    setup = load(given, features)
    ddpm.keep_memory()
    measured = measure(setup, bpd_timesteps, bpd_pictures)
    ddpm.leave_processes()
    if not setup.runtime.is_main:
        return None
    return report(setup, measured)

def main(argv=None):
    """Run a command line and return its exit code."""
    parser = ddpm.Parser("evaluate.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    own = parser.add_argument_group("measuring; FID and KID come with --num_samples or --features")
    own.add_argument(
        "--features", metavar="FILE", help="TorchScript network for FID and KID: float32 images "
        "(N, C, H, W) in [-1, 1] to (N, D). Its code is run, so you have to trust it")
    own.add_argument(
        "--bpd_timesteps", type=int, default=50, metavar="N",
        help="ranges of timesteps: bound and loss are measured at one t of each (default: 50)")
    own.add_argument(
        "--bpd_pictures", type=int, default=64, metavar="N",
        help="validation images, and as many training images, to measure (default: 64)")
    parser.add_settings(FLAGS)
    given = parser.parse(sys.argv[1:] if argv is None else argv)
    own_names = ("features", "bpd_timesteps", "bpd_pictures")
    own_values = {name: given.pop(name) for name in own_names if name in given}
    return ddpm.run(lambda: evaluate(given, **own_values))

if __name__ == "__main__":
    raise SystemExit(main())
