"""Measures that take minutes and are run by hand; docs/results.md keeps what they print.

    python tests/tools/benchmark.py features                      # trains the small feature network, once
    python tests/tools/benchmark.py samplers --model_path MODEL   # quality against the number of evaluations
    python tests/tools/benchmark.py quality                       # ten minutes of training each, side by side
    python tests/tools/benchmark.py throughput                    # training steps, beside other projects
    python tests/tools/benchmark.py throughput --device cuda --channels 128 --batch_size 128 --repeats 30 \\
        --fast
    python tests/tools/benchmark.py drawing                       # 64 samples, side by side
    python tests/tools/benchmark.py waste --pictures 100000       # what is spent around the network

The other projects are those of `pip install diffusers denoising-diffusion-pytorch`. Every program runs in a
process of its own. Rates are of programs that take turns in one run, medians over the turns. Quality is the
Frechet distance of the features of a small classifier of Fashion-MNIST: comparable within one table, with no
other.
"""

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import ddpm  # noqa: E402

# ---------------------------------------------------------------------------------------------------- quality


class Eye(nn.Module):
    """A classifier of Fashion-MNIST. features(x): images (N, C, H, W) in [-1, 1], of any size, grey or in
    colour, as 64 numbers each: they are looked at in grey, at 28x28."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 32, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, 1, 1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, 1, 1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(64 * 49, 64),
            nn.ReLU(),
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x):
        grey = F.interpolate(x.mean(1, keepdim=True), (28, 28), mode="bilinear", antialias=True)
        return self.body(grey)


def fashion(root, train):
    """Fashion-MNIST as x (N, 1, 28, 28) in [-1, 1] and labels (N,)."""
    data = torchvision.datasets.FashionMNIST(root, train=train, download=True)
    return ddpm.to_network(data.data[:, None]), data.targets


def features(args):
    """Train the eye and write it as TorchScript, for here and for evaluate.py --features."""
    torch.manual_seed(0)
    eye, (x, y), (test_x, test_y) = Eye(), fashion(args.download_dir, True), fashion(args.download_dir, False)
    epochs, batch = 3, 128
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.AdamW(eye.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for step in tqdm(range(steps), mininterval=5):
        if step % (len(x) // batch) == 0:
            order = torch.randperm(len(x))
        rows = order[step % (len(x) // batch) * batch :][:batch]
        loss = F.cross_entropy(eye.head(eye(x[rows])), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        right = torch.cat([eye.head(eye(part)).argmax(1) for part in test_x.split(500)]) == test_y
    torch.jit.trace(eye.eval(), test_x[:2], check_inputs=[test_x[:5]]).save(args.features)
    print(f"{args.features}: {right.float().mean():.1%} of the test images recognised")


def moments(eye, x):
    """Mean and covariance of the features of images (N, C, H, W) in [-1, 1], float64."""
    with torch.no_grad():
        f = torch.cat([eye(part) for part in x.split(250)]).double()
    return f.mean(0), f.T.cov()


def frechet(a, b):
    """Frechet distance of two Gaussians, each (mean (D,), covariance (D, D))."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    roots = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()  # trace of the root of the product
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots).item()


def samplers(args):
    """A table and a plot: the distance of samples from real images by sampler and number of evaluations."""
    ddpm.keep_memory()
    eye = torch.jit.load(args.features).eval()
    model, diffusion, config = ddpm.load_model(args.model_path)
    config = ddpm.override(config, **({} if args.guidance is None else dict(guidance=args.guidance)))
    if config.data_path == "fashion_mnist":
        real, name = fashion(args.download_dir, False)[0], "the 10,000 test images"
    else:
        images = ddpm.load_images(config)
        real, name = images.take(images.train, "cpu")[0], f"the {len(images.train)} training images"
    target, n = moments(eye, real), args.num_samples
    labels = ddpm.sample_labels(config.classes, model.class_names, n)
    precision = ddpm.choose_precision("auto", torch.device("cpu"))
    counts, table, start_time = [*args.steps, *([diffusion.T] * args.all_steps)], {}, time.monotonic()
    for sampler in ddpm.SAMPLERS:
        for steps in counts if sampler == "ddpm" else args.steps:
            c = ddpm.override(config, sampler=sampler, sampling_steps=steps, seed=1)
            pixels = ddpm.sample_images(model, diffusion, c, labels, precision)
            x = ddpm.to_network(pixels)
            table[sampler, steps] = frechet(moments(eye, x), target)
            seconds = time.monotonic() - start_time
            print(f"{sampler:6} {steps:5} steps {table[sampler, steps]:9.2f} {seconds:6.0f} s", flush=True)
    half = len(real) // 2
    print(
        f"\n{n} samples of {args.model_path}, guidance {config.guidance:g}, against {name}; half of them "
        f"against the rest: {frechet(moments(eye, real[::2][:half]), moments(eye, real[1::2][:half])):.2f}\n"
    )
    print("| sampler | " + " | ".join(map(str, counts)) + " |\n|---|" + "---|" * len(counts))
    for sampler in ddpm.SAMPLERS:
        cells = [f"{table[sampler, k]:.1f}" if (sampler, k) in table else "" for k in counts]
        print(f"| `{sampler}` | " + " | ".join(cells) + " |")
    print(plot_samplers(table, counts, args.plot))


def plot_samplers(table, counts, path):
    """table: {(sampler, evaluations): distance}. Returns the path."""
    figure = ddpm.new_figure(5.2, 3.4)
    a = figure.subplots()
    for sampler, colour in zip(ddpm.SAMPLERS, ddpm.COLOURS):
        x = [k for k in counts if (sampler, k) in table]
        a.plot(x, [table[sampler, k] for k in x], "o-", color=colour, ms=4, lw=1.8, label=sampler)
    a.set(
        xscale="log",
        xlabel="evaluations of the network",
        title="Frechet distance, lower is better",
    )
    a.set_xticks(counts, counts)
    a.minorticks_off()
    a.set_ylim(bottom=0)
    a.spines[["top", "right"]].set_visible(False)
    a.grid(alpha=0.25)
    a.legend(fontsize=8, frameon=False)
    return ddpm.save_figure(figure, path)


# ----------------------------------------------------------------------------------------------- the programs
# Each is a function that makes (model, step, sample): step(x0, progress) trains on images (N, C, 32, 32) in
# [-1, 1] when that fraction of the time is over; sample(n) gives so many of them.


def ours(channels, config, device="cpu", memory_format=torch.contiguous_format, mode=None):
    """The steps of ddpm.train, without what it writes. It is not asked to sample. mode: of torch.compile."""
    device = torch.device(device)
    model = ddpm.build_model(config, channels, []).to(device, memory_format=memory_format)
    ema, diffusion = ddpm.copy.deepcopy(model), ddpm.make_diffusion(config, device)
    net = torch.compile(model, mode=mode) if config.compile else model
    optimizer, count = torch.optim.Adam(model.parameters(), config.lr, fused=True), [0]
    precision = ddpm.choose_precision("auto", device)
    ddpm.keep_memory()
    averages, weights = (list(m.state_dict().values()) for m in (ema, model))

    def step(x0, progress):
        t, eps = torch.randint(config.timesteps, (len(x0),), device=device), torch.randn_like(x0)
        with ddpm.autocast(device, precision):
            loss = diffusion.loss(net, x0, t, eps).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ddpm.update_ema(averages, weights, count[0], config.ema_decay)
        count[0] += 1

    return model, step, None


def faster(step, model, device):
    """The step of another project in bf16, its network compiled."""
    model.compile()

    def fast(x0, progress):
        with torch.autocast(torch.device(device).type, torch.bfloat16):
            step(x0, progress)

    return fast


def falling(optimizer, lr, progress):
    """The rate for the other projects: half a cosine, as in diffusers' training script."""
    for group in optimizer.param_groups:
        group["lr"] = lr * (0.5 + 0.5 * math.cos(math.pi * progress))


def diffusers_program(channels, widths, layers, attention, lr, size=32, steps=25, device="cpu", fast=False):
    """diffusers as its script for unconditional training puts it together: fp32, EMA with its warm-up."""
    import diffusers
    from diffusers.training_utils import EMAModel

    diffusers.utils.logging.disable_progress_bar()
    kinds = ["Attn" * (i in attention) for i in range(len(widths))]
    model = diffusers.UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=widths,
        layers_per_block=layers,
        norm_num_groups=math.gcd(*widths, 16),
        attention_head_dim=None,
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
    ).to(device)
    scheduler, optimizer = diffusers.DDPMScheduler(), torch.optim.AdamW(model.parameters(), lr)
    ema = EMAModel(model.parameters(), 0.9999, use_ema_warmup=True, power=0.75)

    def step(x0, progress):
        falling(optimizer, lr, progress)
        t, eps = torch.randint(1000, (len(x0),), device=device), torch.randn_like(x0)
        F.mse_loss(model(scheduler.add_noise(x0, eps, t), t).sample, eps).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    def sample(n):
        ema.copy_to(model.parameters())
        pipeline = diffusers.DDIMPipeline(model, diffusers.DDIMScheduler.from_config(scheduler.config))
        pipeline.set_progress_bar_config(disable=True)
        parts = [
            pipeline(batch_size=min(100, n - i), num_inference_steps=steps, output_type="np").images
            for i in range(0, n, 100)
        ]
        return torch.from_numpy(np.concatenate(parts)).permute(0, 3, 1, 2) * 2 - 1

    return model, faster(step, model, device) if fast else step, sample


def lucidrains_program(channels, mults, lr, dim=32, device="cpu", fast=False):
    """denoising-diffusion-pytorch: its own diffusion, its own EMA, as its Trainer uses them."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    model = Unet(dim=dim, dim_mults=mults, channels=channels, flash_attn=fast and device == "cuda")
    diffusion = GaussianDiffusion(model, image_size=32, sampling_timesteps=25).to(device)
    ema = EMA(diffusion, beta=0.995, update_every=10)
    optimizer = torch.optim.Adam(diffusion.parameters(), lr, betas=(0.9, 0.99))

    def step(x0, progress):
        falling(optimizer, lr, progress)
        diffusion((x0 + 1) / 2).backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    def sample(n):
        parts = [ema.ema_model.sample(batch_size=min(100, n - i)) for i in range(0, n, 100)]
        return torch.cat(parts) * 2 - 1

    return model, faster(step, model, device) if fast else step, sample


def paper(name, args):
    """The programs for throughput: the paper's network, the same of diffusers, and one of about its size."""
    if name not in PAPER + ON_A_GPU:
        raise SystemExit(f"There is no program {name!r}: choose from {PAPER + ON_A_GPU}.")
    c, more = args.channels, dict(device=args.device, fast=args.fast)
    if name == "diffusers":
        return diffusers_program(3, (c, 2 * c, 2 * c, 2 * c), 2, [1], 2e-4, **more)
    if name == "denoising-diffusion-pytorch":
        return lucidrains_program(3, (1, 2, 4, 8), 2e-4, c // 2, **more)
    _, *flags = name.split(", ")
    config = ddpm.preset(
        "cifar10", channels=c, dropout=0.0, compile="--compile" in flags or "graphs" in flags
    )
    return ours(
        3,
        config,
        args.device,
        torch.channels_last if "channels_last" in flags else torch.contiguous_format,
        "reduce-overhead" if "graphs" in flags else None,
    )


PAPER = ["ddpm.py", "ddpm.py, --compile", "diffusers", "denoising-diffusion-pytorch"]
ON_A_GPU = ["ddpm.py, graphs", "ddpm.py, channels_last", "ddpm.py, --compile, channels_last"]
SMALL = {  # for grey images and ten minutes
    "diffusers": lambda: diffusers_program(1, (32, 64, 64), 1, [2], 1e-3),
    "denoising-diffusion-pytorch": lambda: lucidrains_program(1, (1, 2, 2), 1e-3),
}

# ----------------------------------------------------------------------------------------------- side by side


class Turns:
    """A program in a process of its own. start(*args) runs there and returns (info, work); each
    turn() does the work a few times and returns the seconds that it took once."""

    def __init__(self, start, *args):
        self.process = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.info, self.times = self.process.submit(Turns.begin, start, *args).result(), []

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
            print(f"{name} is left out: pip install {e.name.replace('_', '-')}")
    for _ in range(args.turns):
        for program in programs.values():
            program.turn(args.repeats)
    return programs


MATRICES = {"bf16 matrix product": torch.bfloat16, "fp32 matrix product": torch.float32}


def matrix_product(dtype, device):
    """(0 parameters, FLOPs), and the work: twenty products of two square matrices."""
    n = 8192 if device == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return (0, 20 * 2 * n**3), lambda: [a @ b for _ in range(20)]


def start_training(name, args):
    """A program whose turn is a training step on so many images; its info is parameters and FLOPs a step."""
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
    return (sum(p.numel() for p in model.parameters()), counter.get_total_flops()), lambda: step(x0, 0)


def throughput(args):
    """Images and GFLOP a second of whole training steps."""
    names = args.programs or PAPER + ON_A_GPU * (args.device == "cuda")
    programs = side_by_side(start_training, [*names, *MATRICES], args)
    seconds = {name: statistics.median(program.times) for name, program in programs.items()}
    rates = {name: program.info[1] / seconds[name] / 1e9 for name, program in programs.items()}
    rate, fp32 = (rates.pop(name) for name in MATRICES)
    device = ddpm.describe_device(torch.device(args.device, 0 if args.device == "cuda" else None))
    notes = ", glibc keeps memory for all" * args.memory + ", the others in bf16 and compiled" * args.fast
    print(f"\n{device}, torch {torch.__version__}; medians of {args.turns} turns", end=" ")
    print(f"of {args.repeats} steps of {args.batch_size} images{notes}")
    print(f"matrix product {rate:.0f} GFLOP/s in bf16, {fp32:.0f} in fp32\n")
    print("| | parameters | images/s | GFLOP/s | of the matrix rate |\n|---|---|---|---|---|")
    for name, gflops in rates.items():
        parameters, images = programs[name].info[0], args.batch_size / seconds[name]
        print(f"| {name} | {parameters:,} | {images:.1f} | {gflops:.0f} | {gflops / rate:.0%} |")
    first, *others = rates
    print()
    for name in others:
        print(
            f"{first} has {seconds[name] / seconds[first]:.2f} times the images/s of {name}, and "
            f"{rates[first] / rates[name]:.2f} times its GFLOP/s"
        )
    print(json.dumps({name: [round(t, 4) for t in p.times] for name, p in programs.items()}))


# --------------------------------------------------------------------------------------------------- sampling


def start_sampling(name, args):
    """A program whose turn is the sampling of so many images of 64x64, by models of one shape."""
    who, number = name.split(", ")
    number, config = int(number), ddpm.preset("animals")
    if args.memory or who == "ddpm.py":
        ddpm.keep_memory()
    if who == "ddpm.py":
        model, diffusion, config = ddpm.load_model(ddpm.HERE / "saved_models" / "animals.pt")
        labels = ddpm.sample_labels(config.classes, model.class_names, number)
        precision = ddpm.choose_precision("auto", torch.device("cpu"))

        def sample():
            ddpm.sample_images(model, diffusion, config, labels, precision)

        return f"{config.sampler}, {config.sampling_steps} steps, guidance {config.guidance:g}", sample
    widths = [config.channels * m for m in config.channel_mults]
    _, _, sample = diffusers_program(3, widths, config.res_blocks, [2, 3], config.lr, config.image_size, 50)
    return "DDIM, 50 steps, no guidance", lambda: sample(number)


def sampling(args):
    """Seconds for 64 and for 8 samples of 64x64: the shipped model, and diffusers' DDIM in 50 steps."""
    names = [f"{who}, {n}" for n in (64, 8) for who in ("ddpm.py", "diffusers")]
    programs = side_by_side(start_sampling, names, args)
    print("\n| | how | seconds |\n|---|---|---|")
    for name, program in programs.items():
        print(f"| {name} samples | {program.info} | {statistics.median(program.times):.2f} |")
    print(json.dumps({name: [round(t, 2) for t in p.times] for name, p in programs.items()}))


# ----------------------------------------------------------------------------------------- quality per minute


PLACES = dict(model_path=".pt", samples_dir="")  # of our run, beside --plot


def learn(name, args):
    """Train a program on Fashion-MNIST for args.minutes; returns args.num_samples of its samples, (N, 1, 28,
    28) in [-1, 1], and what it took."""
    torch.manual_seed(0)
    if name == "ddpm.py":
        places = {k: str(Path(args.plot).with_name("quality" + end)) for k, end in PLACES.items()}
        config = ddpm.preset("fashion_mnist", minutes=args.minutes, download_dir=args.download_dir, **places)
        ddpm.train(config)
        rows = Path(config.samples_dir, "metrics.jsonl").read_text().splitlines()
        model, diffusion, config = ddpm.load_model(config.model_path)
        seen = max(json.loads(row)["step"] for row in rows[1:]) * config.batch_size
        labels = ddpm.sample_labels(config.classes, model.class_names, args.num_samples)
        precision, start_time = ddpm.choose_precision("auto", torch.device("cpu")), time.monotonic()
        pixels = ddpm.sample_images(model, diffusion, config, labels, precision)
        x = ddpm.to_network(pixels)
    else:
        model, step, sample = SMALL[name]()
        x, _ = fashion(args.download_dir, True)
        x, seen, start_time = F.pad(x, (2, 2, 2, 2), value=-1.0), 0, time.monotonic()
        while (progress := (time.monotonic() - start_time) / 60 / args.minutes) < 1:
            if seen % (len(x) // 128 * 128) == 0:
                order = torch.randperm(len(x))
            at = seen % (len(x) // 128 * 128)
            step(x[order[at : at + 128]], progress)
            seen += 128
        start_time = time.monotonic()
        with torch.no_grad():
            x = sample(args.num_samples)[..., 2:-2, 2:-2]
    parameters = sum(p.numel() for p in model.parameters())
    return x, parameters, seen, time.monotonic() - start_time


def quality(args):
    """Every program learns for as many minutes, one after another, and samples; the distances from the
    training images, and that of as many test images. Writes a grid of each."""
    eye, (real, _), (test, _) = (
        torch.jit.load(args.features).eval(),
        fashion(args.download_dir, True),
        fashion(args.download_dir, False),
    )
    target, n = moments(eye, real), args.num_samples
    base = statistics.median(
        frechet(
            moments(eye, test[torch.randperm(len(test), generator=torch.Generator().manual_seed(k))[:n]]),
            target,
        )
        for k in range(5)
    )
    print(
        f"{n} real test images against the training images: {base:.2f}, the median of five choices\n",
        flush=True,
    )
    print(
        "| | parameters | images seen | distance | of the real one's | sampling |\n|---|---|---|---|---|---|"
    )
    for name in args.programs or ["ddpm.py", *SMALL]:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
            x, parameters, seen, seconds = process.submit(learn, name, args).result()
        distance = frechet(moments(eye, x), target)
        cells = f"{parameters:,} | {seen:,} | {distance:.1f} | {distance / base:.1f} | {seconds:.0f} s"
        print(f"| {name} | {cells} |", flush=True)
        grid = torchvision.utils.make_grid(ddpm.to_pixels(x[:50]), 10, pad_value=255)
        ddpm.save_png(ddpm.to_images(grid[None])[0], Path(args.plot).with_name(f"quality_{name}.png"))


# ------------------------------------------------------------------------------------------------------ waste


def synthetic(n):
    """A source of n images of 80x60 that are made when they are opened."""

    def image(i):
        return Image.fromarray(np.random.default_rng(i).integers(0, 256, (60, 80, 3), dtype=np.uint8))

    return ddpm.ImageSource([str(i) for i in range(n)], np.full(n, -1), [], ["synthetic", n], image)


def waste(args):
    """What a training run spends around the network: a real one, its functions timed on the way."""
    with tempfile.TemporaryDirectory() as folder:
        config = ddpm.preset(
            args.preset,
            steps=args.steps[0],
            download_dir=args.download_dir,
            model_path=f"{folder}/model.pt",
            samples_dir=folder,
        )
        if args.pictures:
            ddpm.folder_source = lambda root: synthetic(args.pictures)
            config = ddpm.override(config, download_dir=folder, class_cond=False)
        spent, starts = {}, []

        def timed(owner, name, what):
            real = getattr(owner, name)

            def call(*given, **more):
                start_time = time.perf_counter()
                result = real(*given, **more)
                starts.append(start_time)
                spent[what] = spent.get(what, 0) + time.perf_counter() - start_time
                return result

            setattr(owner, name, call)

        timed(ddpm.Images, "batch", "data")
        timed(ddpm, "update_ema", "EMA")
        timed(ddpm.MetricsLogger, "log_training", "metrics")
        timed(ddpm.tqdm, "update", "progress bar")
        timed(ddpm, "sample_images", "sampling images")
        timed(ddpm, "write_previews", "writing images")
        timed(ddpm.torch, "save", "checkpoints")
        ddpm.train(config)
        total = time.perf_counter() - starts[0]
    print(f"\n{args.preset}, {config.steps} steps of {config.batch_size}, {total:.1f} s in all\n")
    print("| | fraction |\n|---|---|")
    for what, seconds in spent.items():
        print(f"| {what} | {seconds / total:.2%} |")
    print(f"| all of these | {sum(spent.values()) / total:.2%} |")


def main():
    commands = dict(
        features=features,
        samplers=samplers,
        quality=quality,
        throughput=throughput,
        drawing=sampling,
        waste=waste,
    )
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=commands)
    parser.add_argument("--download_dir", default="data")
    parser.add_argument(
        "--features", default="data/fashion_features.pt", help="where the feature network is kept"
    )
    parser.add_argument("--model_path", default="saved_models/animals.pt")
    parser.add_argument("--preset", default="animals", help="recipe for waste")
    parser.add_argument("--pictures", type=int, help="for waste: so many made-up images")
    parser.add_argument("--programs", nargs="+", help="for quality and throughput: only these")
    parser.add_argument("--minutes", type=float, default=10, help="for quality: of training, each")
    parser.add_argument("--num_samples", type=int, default=300)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument("--all_steps", action="store_true", help="ddpm on all T steps as well")
    parser.add_argument("--guidance", type=float, help="instead of the model's own")
    parser.add_argument("--plot", default="samples/samplers.png")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="glibc keeps freed memory, for all programs")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="for throughput")
    parser.add_argument("--batch_size", type=int, default=32, help="for throughput")
    parser.add_argument("--channels", type=int, default=64, help="for throughput: width of the first stage")
    parser.add_argument("--fast", action="store_true", help="for throughput: the others in bf16 and compiled")
    args = parser.parse_args()
    commands[args.what](args)


if __name__ == "__main__":
    main()
