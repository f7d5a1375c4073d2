"""evaluate.py: how good is a model? Bits per dimension, loss by timestep, copying; FID and KID on request.

    python evaluate.py                               # the model that --mode sample draws with
    python evaluate.py --num_samples 50000           # of more samples, and with FID and KID
    python evaluate.py --features NETWORK.pt         # FID and KID by features of your own, not Inception's
    torchrun --nproc_per_node=8 evaluate.py --num_samples 50000

It measures on pictures that --holdout kept out of training, and beside them on pictures that were trained on:
a model that does better on these knows them by heart. FID and KID are dear, and say nothing about a handful
of samples, so they come only when --num_samples or --features is given. Papers, besides those in ddpm.py:

    Kingma et al. 2021, Variational diffusion models                     arXiv:2107.00630
    Heusel et al. 2017, Two time-scale update rule (FID)                 arXiv:1706.08500
    Binkowski et al. 2018, Demystifying MMD GANs (KID)                   arXiv:1801.01401
"""

import dataclasses
import hashlib
import json
import math
import platform
import sys
import textwrap
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
        "data_path", "download_dir", "num_samples", "sample_batch_size", "sampler", "sampling_steps", "eta",
        "classes", "guidance", "ema", "seed", "device", "precision"]}
COMPARED = 1000  # at most so many samples, and as many real pictures, are held against the training pictures

class Unavailable(UserError):
    """Something is missing that the rest can do without."""

def gathered(mine):
    """What every one of torchrun's processes gives, in their order: a list, the same in all."""
    given = [mine] * (dist.get_world_size() if dist.is_initialized() else 1)
    if len(given) > 1:
        dist.all_gather_object(given, mine)
    return given

def shared_out(what, work, rows, size):
    """[work(part) for part in parts], at most `size` of the rows (n,) each, done by torchrun's processes in
    turn: the same list in all of them. what: for the progress bar."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    n = max(math.ceil(len(rows) / size), min(len(rows), world))
    parts = np.array_split(rows, n) if n else []
    mine = tqdm(parts[rank::world], what, leave=False, delay=2, disable=rank > 0)
    done = gathered([work(part) for part in mine])
    return [done[i % world][i // world] for i in range(len(parts))]

# -------------------------------------------------------------------------------- bits per dimension and loss

def strata(T, n):
    """The timesteps 0..T-1 as ranges (first, beyond): t = 0 alone, and n that share the others, shorter
    towards t = 1, where the bound's terms are largest. From n = T-1 on, every timestep is a range."""
    n = min(n, T - 1)
    k = np.arange(n + 1)
    edges = 1 + np.maximum(k, np.round((T - 1) * (k / n) ** 2)).astype(int)
    return [(0, 1), *zip(edges.tolist(), edges[1:].tolist())]

def step_term(diffusion, x0, guess, t):
    """KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of Ho et al. 2020, eq. 5, for t >= 1, in nats a picture:
    (n,) float64. Both Gaussians have the posterior's variance (fixed-small); what is left is the squared
    error of the guess times half of what SNR loses (Kingma et al. 2021). x0, guess: (n, C, H, W); t: (n,)."""
    snr = diffusion.abar[:-1] / (1 - diffusion.abar[:-1])  # (T,)
    return (snr[t - 1] - snr[t]) / 2 * (x0 - guess).square().flatten(1).sum(1).cpu().double()

def decoder_term(x0, mean, std):
    """-log p(x_0 | x_1) in nats, (N, C, H, W) float64: a Gaussian's mass in the bin of 2/255 around x0, where
    the bins at -1 and 1 reach to infinity (Ho et al. 2020, eq. 13)."""
    pixels = ddpm.to_pixels(x0).cpu().double()
    error = pixels / 127.5 - 1 - mean.cpu().double()
    low = torch.where(pixels == 0, -math.inf, (error - 1 / 255) / std)
    high = torch.where(pixels == 255, math.inf, (error + 1 / 255) / std)
    right = low + high > 0  # where a distribution function rounds to 1: mirror it to the left tail
    low, high = torch.where(right, -high, low), torch.where(right, -low, high)
    a, b = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return -(b + torch.log(-torch.expm1(a - b)))  # of e^b - e^a

def prior_term(diffusion, x0):
    """KL(q(x_T | x_0) || N(0, 1)) in nats a picture: (n,) float64."""
    abar = diffusion.abar[-2]
    return (abar * (x0.cpu().double().square() - 1) - torch.log1p(-abar)).flatten(1).sum(1) / 2

@torch.no_grad()
def measure(model, diffusion, x0, y, rows, parts, seed, precision):
    """The bound and the loss of pictures x0 (n, C, H, W) of classes y (n,), whose noise is drawn by seed and
    rows (n,). Each looks once into each of the strata `parts`, at a random timestep. Returns prior (n,) and
    terms (strata, n) in nats a picture and timestep, losses as in training (strata, n): float64."""
    noise, terms, losses = ddpm.PictureNoise(ddpm.mix(seed, 5), rows, x0.shape[1:], x0.device), [], []
    for first, beyond in parts:
        t = torch.stack([torch.randint(first, beyond, (), generator=g) for g in noise.generators])
        at, eps = t.to(x0.device), noise()
        xt = diffusion.q_sample(x0, at, eps)
        with ddpm.autocast(x0.device, precision):
            out = model(xt, at, y).float()
        guess = diffusion.predict_x0(out, xt, at).clamp(-1, 1)
        if first:
            terms.append(step_term(diffusion, x0, guess, t))
        else:  # at t = 0 the posterior's variance is 0: DDPM's code takes that of t = 1
            terms.append(decoder_term(x0, guess, diffusion.posterior_std(1, 0)).flatten(1).sum(1))
        losses.append(diffusion.loss(lambda *_, out=out: out, x0, at, eps, y).cpu().double())
    return prior_term(diffusion, x0), torch.stack(terms), torch.stack(losses)

def summarise(prior, terms, losses, parts, values):
    """Figures from what `measure` returns: means over pictures, in bits per dimension of so many values."""
    width = torch.tensor([beyond - first for first, beyond in parts]).double()[:, None]
    bits = torch.cat([prior[None], terms * width]) / math.log(2) / values  # (1 + strata, n)
    total, (prior, decoder, *steps), loss = bits.sum(0), bits.mean(1).tolist(), losses.mean(1)
    curve = [dict(first=first, last=beyond - 1, bits=b, loss=v)
             for (first, beyond), b, v in zip(parts, [decoder, *steps], loss.tolist())]
    n, error = len(total), total.std().item() / len(total) ** 0.5 if len(total) > 1 else None
    return dict(pictures=n, bits=total.mean().item(), bits_error=error, prior=prior, steps=sum(steps),
                decoder=decoder, loss=((loss * width[:, 0]).sum() / width.sum()).item(),
                by_timestep=curve)

def measure_rows(model, diffusion, images, rows, parts, config, precision):
    """What `summarise` makes of the pictures in some rows, which are measured a few at a time."""
    index = [model.classes.index(k) if k in model.classes else -1 for k in images.class_names] + [-1]
    labels = torch.tensor(index)[images.labels]  # as the model counts classes
    device = next(model.parameters()).device
    def bound(some):
        x0, y = images.take(some, device)[0], labels[torch.from_numpy(some)].to(device)
        return measure(model, diffusion, x0, y, some, parts, config.seed, precision)

    found = shared_out("measuring", bound, rows, 32)
    values = model.channels * config.image_size**2  # a border counts as part of the picture
    return summarise(*(torch.cat(part, -1) for part in zip(*found)), parts, values)

def plot_by_timestep(sets, path):
    """Loss and bits by timestep, a line for each set of figures {name: figures}. Returns the path."""
    figure, axes = ddpm.plot_pair(["loss", "bits per dimension of one timestep"], "timestep t")
    for (name, figures), colour in zip(reversed(sets.items()), ddpm.COLOURS):
        rows = figures["by_timestep"]
        middle = np.array([(row["first"] + row["last"]) / 2 for row in rows])
        bits = [row["bits"] / (row["last"] - row["first"] + 1) for row in rows]
        style = dict(color=colour, lw=1.8, label=f"{name}, {figures['pictures']} pictures")
        axes[0].plot(middle, [row["loss"] for row in rows], **style)
        axes[1].plot(middle + 1, bits, **style)
    axes[1].set_xscale("log")  # most bits go to the first few timesteps
    axes[1].set_xlabel("timestep t, plus 1")
    for a in axes:
        a.set_yscale("log")
        a.legend(fontsize=8, frameon=False)
    return ddpm.save_figure(figure, path)

# ---------------------------------------------------------------------------------------------------- copying

def pick(images, rows):
    """Pixels (n, C, H, W) uint8 of some rows, on the device where all of them are."""
    return images.pixels[torch.as_tensor(rows).to(images.pixels.device)]

def flat(pixels, config, device):
    """Pictures (n, C, H, W) uint8 as vectors (n, D) whose distance is the root mean square difference in grey
    levels; pictures of more than 64 pixels are averaged down to that."""
    side = min(64, config.image_size)
    parts = [F.adaptive_avg_pool2d(ddpm.crop(part, config).to(device).float() - 127.5, side).flatten(1)
             for part in pixels.split(64)]
    return torch.cat(parts) / parts[0].shape[1] ** 0.5

def nearest(pixels, images, config, device, own=None):
    """The training picture nearest to each of pixels (n, C, H, W) uint8, mirror images counting where
    training drew them. own: rows (n,) that are the pictures themselves, which do not count. Returns distances
    (n,), rows (n,), whether mirrored (n,)."""
    queries, n = flat(pixels, config, device), len(pixels)
    own = torch.full((n,), -1) if own is None else torch.as_tensor(own)
    def among(some):
        part, rows, found = pick(images, some), torch.from_numpy(some), []
        for flip in (False, True)[: 1 + config.hflip]:
            distance = torch.cdist(queries, flat(part.flip(3) if flip else part, config, device)).cpu()
            distance[own[:, None] == rows] = math.inf
            least, at = distance.min(1)
            found.append((least, rows[at], torch.full((n,), flip)))
        return found

    size = min(2**26 // pixels[0].numel(), 2**16)  # in 64 MiB, so that any number fits
    found = sum(shared_out("comparing", among, images.train, size), [])
    least, rows, mirrored = (torch.stack(part) for part in zip(*found))  # (parts and mirror images, n) each
    best = least.argmin(0, keepdim=True)
    return tuple(each.gather(0, best)[0] for each in (least, rows, mirrored))

def copying(samples, images, config, device):
    """Are samples (N, C, H, W) uint8 nearer to the training pictures than real pictures are? Those are the
    held out or, without any, the training pictures, each against the rest. Returns figures, and up to 16
    samples, each beside its nearest, as rows of pictures (rows, columns, C, H, W) uint8."""
    others = ddpm.spread(images.held_out if len(images.held_out) else images.train, COMPARED)
    distance, rows, mirrored = nearest(samples[:COMPARED], images, config, device)
    usual = nearest(pick(images, others), images, config, device, others)[0].median().item()
    n = min(len(samples), 16) // 4 * 4 or len(samples)
    shown = pick(images, rows[:n]).cpu()
    shown = torch.where(mirrored[:n, None, None, None], shown.flip(3), shown)
    pairs = torch.stack([samples[:n], shown], 1).unflatten(0, (-1, min(n, 4))).flatten(1, 2)  # rows of pairs
    alone = math.isinf(usual)  # a single training picture, and none held out
    figures = dict(samples=len(distance), share=None if alone else (distance < usual).double().mean().item(),
                   median=distance.median().item(), others=len(others),
                   others_median=None if alone else usual,
                   others_are="held-out" if len(images.held_out) else "training",
                   first=[dict(distance=d, row=r) for d, r in zip(distance[:n].tolist(), rows[:n].tolist())])
    return figures, pairs

def plot_copies(pairs, path, config):
    """Write what `copying` returns as a PNG. Returns the path."""
    rows = {" " * i: row for i, row in enumerate(pairs)}  # without a name
    return ddpm.plot_rows(rows, ["sample", "nearest"] * (pairs.shape[1] // 2), path, config)

# ------------------------------------------------------------------------------------------------ FID and KID

def inception(device):
    """features(pixels (n, C, H, W) uint8) -> (n, 2048): what FID is defined by, grey repeated to three
    channels."""
    from torch_fidelity import feature_extractor_inceptionv3 as source
    try:
        net = source.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"]).to(device)
    except (OSError, RuntimeError) as e:  # no way there, or a damaged file
        raise Unavailable(f"no FID and KID: Inception's weights could not be downloaded ({e}). Put the file "
                          f"{source.URL_INCEPTION_V3} into {torch.hub.get_dir()}/checkpoints, or give "
                          "--features FILE") from None
    return lambda pixels: net(pixels.to(device).expand(-1, 3, -1, -1))[0]

def load_features(path, example, device):
    """features(pixels (n, C, H, W) uint8) -> (n, D) by the TorchScript network in a file, for float32
    pictures in [-1, 1]. The only file not read with weights_only: TorchScript is code that runs, so it has to
    be trusted."""
    require(Path(path).is_file(), f"No file {path}: give --features the path of a TorchScript network.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # newer versions of PyTorch prefer torch.export
            net = torch.jit.load(path, map_location=device).eval()
    except (RuntimeError, ValueError):
        raise UserError(f"{path} is not TorchScript, or damaged: write one with "
                        "torch.jit.trace(network, pictures).save(FILE).") from None
    features, shape = lambda pixels: net(ddpm.to_network(pixels).to(device)), tuple(example.shape)
    try:
        out = features(example)
        good = out.ndim == 2 and len(out) == len(example) and out.isfinite().all()
        found = f"returns {tuple(out.shape)} for" if good or out.isfinite().all() else "is not finite on"
    except Exception as e:  # it is anybody's code
        good, found = False, f"fails ({(str(e).strip() or repr(e)).splitlines()[-1]}) on"
    require(good, f"The network in {path} {found} pictures {shape}: it has to return (pictures, features).")
    return features

def choose_features(path, images, config, device):
    """The features for FID and KID: of the network at `path`, or Inception's. None and a sentence where
    something that they need is missing."""
    try:
        import torchmetrics  # noqa: F401
        example = ddpm.crop(pick(images, images.train[:2]), config)
        return load_features(path, example, device) if path else inception(device), None
    except ImportError as e:
        return None, f"no FID and KID without {e.name}: pip install torchmetrics torch-fidelity"
    except Unavailable as e:
        return None, str(e)

@torch.no_grad()
def distances(features, samples, images, sets, config):
    """FID and KID of samples (N, C, H, W) uint8 from each of the sets {name: rows of images}, by
    torchmetrics: FID of all pictures, KID, for which the features are kept, of 10,000 at most. Returns {name:
    figures}."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance
    sets = {name: rows for name, rows in sets.items() if len(rows) > 1}  # or there is no covariance
    same, meters, found = nn.Identity(), {}, {}  # the features come from outside, once for both
    same.num_features = features(ddpm.crop(samples[:2], config)).shape[1]
    for name, rows in sets.items():
        size = min(1000, len(rows), len(samples))
        subsets = 100 if size < max(len(rows), len(samples)) else 1  # of everything there is only one
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about memory
            kid = KernelInceptionDistance(feature=same, subsets=subsets, subset_size=size,
                                          sync_on_compute=False)  # every process has all of its features
        meters[name] = FrechetInceptionDistance(feature=same), kid
        meters[name][0].update(torch.zeros(0, same.num_features), real=True)  # a process may have no share

    def show(pixels, rows, names, real):
        def look(some):
            f = features(ddpm.crop(pixels[torch.from_numpy(some).to(pixels.device)], config)).float().cpu()
            for name in names:
                meters[name][0].update(f, real=real)  # adds up, over all processes when it is asked
            return f

        order = np.random.default_rng(config.seed).permutation(rows)  # for KID
        for f in shared_out("features", look, order[:10_000], 64):
            for name in names:
                meters[name][1].update(f, real=real)
        shared_out("features", lambda some: look(some).shape, order[10_000:], 64)  # none is kept

    show(samples, np.arange(len(samples)), sets, False)
    for name, rows in sets.items():
        show(images.pixels, rows, [name], True)
        fid, kid = meters.pop(name)
        torch.manual_seed(config.seed)  # for the subsets
        mean, std = (v.item() for v in kid.compute())
        found[name] = dict(fid=fid.compute().item(), kid=mean, kid_error=std if kid.subsets > 1 else None,
                           kid_subsets=kid.subsets, kid_subset_size=kid.subset_size, reference=len(rows),
                           features=same.num_features)
    return found

# ------------------------------------------------------------------------------------------------ the command

def say(name, text):
    """Print a line, or a few, of what there is to know; nothing for no text."""
    if text:
        whole = dict(break_long_words=False, break_on_hyphens=False)  # paths
        print(textwrap.fill(f"{name:9} {text}", 100, subsequent_indent=" " * 10, **whole))

ROWS = [  # of the table: name, figure, its format, the figure for +-
    ("pictures measured", "pictures", ",", None), ("bits per dimension", "bits", ".3f", "bits_error"),
    ("  prior, L_T", "prior", ".2g", None), ("  steps, L_1 to L_T-1", "steps", ".3f", None),
    ("  decoder, L_0", "decoder", ".3f", None), ("loss", "loss", ".4g", None),
    ("pictures for FID", "reference", ",", None), ("FID of the samples", "fid", ".4g", None),
    ("KID of the samples", "kid", ".4g", "kid_error")]

def print_table(sets):
    """The figures of all sets {name: figures}, a column each; what was not measured is left out."""
    print(f"\n{'':22}", *(f"{name:>20}" for name in sets))
    for name, key, form, error in ROWS:
        cells = [f"{f[key]:{form}}" + (f" +- {f[error]:{form}}" if f.get(error) is not None else "")
                 if key in f else "" for f in sets.values()]
        if any(cells):
            print(f"{name:22}", *(f"{cell:>20}" for cell in cells))
    print()

def doubts(images, checkpoint, found, samples):
    """What has to be known to read the figures: sentences."""
    was = checkpoint.get("data")
    if not len(images.held_out):
        yield "no picture was held out of training (--holdout): figures of training pictures flatter"
    if not was:
        yield "the model does not say which pictures it was trained on"
    elif was != images.fingerprint:
        yield (f"the model was trained on other pictures ({was}; here {images.fingerprint}): held out and "
               "training mean nothing to it")
    if any(f["bits"] > 8 for f in found.values()):
        yield ("above 8 bits the bound says nothing: at the least noise the network's x0 is coarser than the "
               "decoder expects, as is usual with --predict x0; the samples can be good all the same")
    for name, f in found.items():
        if "fid" in f and (n := min(samples, f["reference"])) <= f["features"]:
            yield (f"FID, {name}: {n:,} pictures do not fix the covariance of {f['features']:,} features, "
                   "so that the figure compares with no other; look at KID")

def evaluate(given, features=None, bpd_timesteps=50, bpd_pictures=64):
    """Measure a model, print a table, write pictures and evaluation.json. Returns what that file has, None in
    processes other than the first. given: settings in FLAGS that differ from the checkpoint's; features: path
    of a TorchScript network; bpd_timesteps, bpd_pictures: how finely to measure the bound."""
    path = ddpm.find_model(ddpm.override(ddpm.Config(), **given))
    checkpoint = ddpm.read_checkpoint(path)
    c = ddpm.drawing_config(checkpoint, path, given, {name for names in FLAGS.values() for name in names})
    ddpm.check(c)
    compare = features or "num_samples" in given
    require(c.num_samples > 1 or not compare, "--num_samples 1: FID and KID need two pictures or more.")
    require(min(bpd_timesteps, bpd_pictures) > 0, "--bpd_timesteps and --bpd_pictures: give 1 or more.")
    device = ddpm.choose_device(c.device)
    rank, world = ddpm.join_processes(device)
    precision = ddpm.choose_precision(c.precision, device)
    model, diffusion, stored = ddpm.load_model(path, device, c.ema)
    # Before the drawing, which may take long: what can go wrong.
    images = ddpm.load_images(ddpm.override(c, seed=stored.seed), device)  # that seed chose the held-out
    require(images.channels == model.channels, f"{path} draws pictures of {model.channels} channels, and "
            f"those in {c.data_path} have {images.channels}: give the --data_path of its training.")
    require(len({*gathered(images.fingerprint)}) == 1, "The processes see different pictures: give all of "
            "them the same in --data_path.")
    network, missing = choose_features(features, images, c, device) if compare else (None, None)
    missing = next(filter(None, gathered(missing)), None)  # if it is in one process, all do without
    if missing:
        network = None
        say("note", missing)
    ddpm.keep_memory()
    labels = ddpm.sample_labels(c, model.classes, c.num_samples)
    folder = Path(c.samples_dir)
    folder.mkdir(parents=True, exist_ok=True)  # if that cannot be, say so now
    steps = math.ceil(len(labels) / world / c.sample_batch_size) * c.sampling_steps
    with tqdm(total=steps, desc="drawing", unit="step", disable=rank > 0, leave=False) as bar:
        samples = ddpm.draw(model, diffusion, c, labels, precision, lambda *_: bar.update() and None)

    # ---- figures
    sets = {"held out": images.held_out, "training": images.train}
    sets = {name: rows for name, rows in sets.items() if len(rows)}
    parts = strata(diffusion.T, bpd_timesteps)
    some = {name: ddpm.spread(rows, bpd_pictures) for name, rows in sets.items()}
    found = {name: measure_rows(model, diffusion, images, rows, parts, c, precision)
             for name, rows in some.items()}
    copies, pairs = copying(samples, images, c, device)
    if network:
        for name, figures in distances(network, samples, images, sets, c).items():
            found[name] |= figures
    if world > 1:
        dist.destroy_process_group()
    if rank > 0:
        return None

    # ---- say it
    digest, k = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:12], copies
    at = "every timestep" if len(parts) == diffusion.T else (
        f"t = 0 and {len(parts) - 1} ranges of timesteps, a picture at a random one of each")
    result = dict(
        model=f"{Path(path).resolve()} ({digest}), {'averaged (EMA)' if c.ema else 'plain'} weights",
        pictures=f"{c.data_path}, {c.image_size}x{c.image_size}: {len(images.train):,} trained on, "
                 f"{len(images.held_out):,} held out ({images.fingerprint})",
        samples=f"{len(samples):,}: {c.sampler}, {c.sampling_steps} steps, trailing spacing, x0 clipped, "
                f"guidance {c.guidance:g}, seed {c.seed}, classes {c.classes or 'all'}",
        bound=f"{model.channels * c.image_size**2:,} values a picture; {at}; variance fixed-small, at t = 0 "
              "that of t = 1; x0 clipped; labels given, no guidance; +- is the standard error over pictures",
        features=network and f"{features or 'Inception'}; KID +- is the deviation of its subsets",
        device=f"{ddpm.describe(device)}, {precision}")
    for name, text in result.items():
        say(name, text)
    print_table(found)
    result["copies"] = k["share"] is not None and (
        f"{k['share']:.0%} of {k['samples']:,} samples are nearer to a training picture than the median of "
        f"{k['others']:,} {k['others_are']} pictures is (root mean square in grey levels: samples "
        f"{k['median']:.1f}, {k['others_are']} {k['others_median']:.1f}). New pictures give about 50 %, "
        "copies 100 %; blurred ones are near to everything")
    say("copies", result["copies"])
    notes = [missing] * bool(missing) + [*doubts(images, checkpoint, found, len(samples))]
    for text in notes:
        say("note", text)
    result |= dict(
        sets=found, copying=copies, notes=notes, num_samples=len(samples), ema=c.ema,
        config=dataclasses.asdict(c), torch=torch.__version__, torchvision=torchvision.__version__,
        python=platform.python_version())
    written = json.dumps(result, indent=1).encode()
    ddpm.print_files([
        plot_by_timestep(found, folder / "loss_by_timestep.png"),
        plot_copies(pairs, folder / "nearest.png", c),
        ddpm.atomic_write(folder / "evaluation.json", lambda f: f.write(written))])
    return result

def main(argv=None):
    """Run a command line and return its exit code."""
    parser = ddpm.Parser("evaluate.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    own = parser.add_argument_group("measuring; FID and KID come with --num_samples or --features")
    own.add_argument("--features", metavar="FILE", help="TorchScript network for FID and KID: float32 "
                     "pictures (N, C, H, W) in [-1, 1] to (N, D). Its code is run, so you have to trust it")
    own.add_argument("--bpd_timesteps", type=int, default=50, metavar="N",
                     help="ranges of timesteps: bound and loss look at one t of each (default: 50)")
    own.add_argument("--bpd_pictures", type=int, default=64, metavar="N",
                     help="pictures held out, and as many trained on, to measure (default: 64)")
    given = ddpm.parse(parser, FLAGS, sys.argv[1:] if argv is None else argv)
    mine = {name: given.pop(name) for name in ("features", "bpd_timesteps", "bpd_pictures") if name in given}
    return ddpm.run(lambda: evaluate(given, **mine))

if __name__ == "__main__":
    raise SystemExit(main())
