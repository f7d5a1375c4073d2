"""Measures that take minutes and are run by hand; docs/results.md keeps what they print.

    python tests/benchmark.py features                      # trains the small feature network, once
    python tests/benchmark.py samplers --model_path MODEL   # quality against the number of evaluations
    python tests/benchmark.py throughput                    # training steps, side by side with other projects

Rates are of programs that take turns in one run, medians over the turns. Quality is the Frechet distance
of the features of a small classifier of Fashion-MNIST: comparable within one table, with no other.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import ddpm  # noqa: E402

# ---------------------------------------------------------------------------------------------------- quality


class Eye(nn.Module):
    """A classifier of Fashion-MNIST. features(x): pictures (N, C, H, W) in [-1, 1], of any size, grey or in
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
    print(f"{args.features}: {right.float().mean():.1%} of the test pictures recognised")


def moments(eye, x):
    """Mean and covariance of the features of pictures (N, C, H, W) in [-1, 1], float64."""
    with torch.no_grad():
        f = torch.cat([eye(part) for part in x.split(250)]).double()
    return f.mean(0), f.T.cov()


def frechet(a, b):
    """Frechet distance of two Gaussians, each (mean (D,), covariance (D, D))."""
    (mean_a, cov_a), (mean_b, cov_b) = a, b
    roots = torch.linalg.eigvals(cov_a @ cov_b).sqrt().real.sum()  # trace of the root of the product
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * roots).item()


def samplers(args):
    """A table and a plot: the distance of drawn from real pictures by sampler and number of evaluations."""
    ddpm.keep_memory()
    eye = torch.jit.load(args.features).eval()
    model, diffusion, config = ddpm.load_model(args.model_path)
    config = ddpm.override(config, **({} if args.guidance is None else dict(guidance=args.guidance)))
    if config.data_path == "fashion_mnist":
        real, name = fashion(args.download_dir, False)[0], "the 10,000 test pictures"
    else:
        images = ddpm.load_images(config)
        real, name = images.take(images.train, "cpu")[0], f"the {len(images.train)} training pictures"
    target, n = moments(eye, real), args.num_samples
    labels = ddpm.sample_labels(config, model.classes, n)
    precision = ddpm.choose_precision("auto", torch.device("cpu"))
    counts, table, began = [*args.steps, *([diffusion.T] * args.all_steps)], {}, time.monotonic()
    for sampler in ddpm.SAMPLERS:
        for steps in counts if sampler == "ddpm" else args.steps:
            c = ddpm.override(config, sampler=sampler, sampling_steps=steps, seed=1)
            pixels = ddpm.draw(model, diffusion, c, range(n), labels, precision, lambda *_: None)
            x = ddpm.to_network(ddpm.crop(pixels, c))
            table[sampler, steps] = frechet(moments(eye, x), target)
            print(
                f"{sampler:6} {steps:5} steps {table[sampler, steps]:9.2f} {time.monotonic() - began:6.0f} s",
                flush=True,
            )
    half = len(real) // 2
    print(
        f"\n{n} pictures of {args.model_path}, guidance {config.guidance:g}, against {name}; half of them "
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


# ------------------------------------------------------------------------------------------------- throughput


def ours(config):
    """One training step as ddpm.train takes it, of the paper's network with 64 channels on 32x32 pictures."""
    model = ddpm.build_model(config, 3, [])
    ema, diffusion = ddpm.copy.deepcopy(model), ddpm.make_diffusion(config)
    optimizer, count = torch.optim.Adam(model.parameters(), 2e-4, fused=True), [0]
    precision = ddpm.choose_precision("auto", torch.device("cpu"))

    def step(x0):
        t, eps = torch.randint(config.timesteps, (len(x0),)), torch.randn_like(x0)
        with ddpm.autocast(x0.device, precision):
            loss = diffusion.loss(model, x0, t, eps).mean()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ddpm.update_ema(ema, model, count[0], 0.9999)
        count[0] += 1

    return model, step


def theirs_diffusers():
    """diffusers' training script: its scheduler, its EMA, fp32 as it comes."""
    import diffusers
    from diffusers.training_utils import EMAModel

    model = diffusers.UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128, 128, 128),
        norm_num_groups=16,
        attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )
    scheduler = diffusers.DDPMScheduler()
    ema, optimizer = EMAModel(model.parameters(), 0.9999), torch.optim.AdamW(model.parameters(), 2e-4)

    def step(x0):
        t, eps = torch.randint(1000, (len(x0),)), torch.randn_like(x0)
        F.mse_loss(model(scheduler.add_noise(x0, eps, t), t).sample, eps).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.step(model.parameters())

    return model, step


def theirs_lucidrains():
    """denoising-diffusion-pytorch's own diffusion and EMA."""
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet
    from ema_pytorch import EMA

    model = Unet(dim=32, dim_mults=(1, 2, 4, 8), flash_attn=False)
    diffusion = GaussianDiffusion(model, image_size=32)
    ema, optimizer = (
        EMA(diffusion, beta=0.995, update_every=10),
        torch.optim.Adam(diffusion.parameters(), 2e-4),
    )

    def step(x0):
        diffusion((x0 + 1) / 2).backward()
        nn.utils.clip_grad_norm_(diffusion.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        ema.update()

    return model, step


def matrix_rate():
    """GFLOP/s of a bf16 product of matrices of 2048x2048, the best of ten."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    times = []
    for _ in range(10):
        began = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - began)
    return 2 * 2048**3 / min(times) / 1e9


def throughput(args):
    """Pictures and GFLOP a second of whole training steps; the programs take turns."""
    from torch.utils.flop_counter import FlopCounterMode

    if args.memory:
        ddpm.keep_memory()  # for all of them alike: it is a setting of the process
    config = ddpm.preset("cifar10", channels=64, dropout=0.0)
    x0, rows = torch.rand(32, 3, 32, 32) * 2 - 1, {}
    makers = {
        "ddpm.py": lambda: ours(config),
        "diffusers": theirs_diffusers,
        "denoising-diffusion-pytorch": theirs_lucidrains,
    }
    for name, make in makers.items():
        try:
            model, step = make()
        except ImportError as e:
            print(f"{name} is left out: pip install {e.name.replace('_', '-')}")
            continue
        step(x0)
        with FlopCounterMode(display=False) as counter:
            step(x0)
        rows[name] = dict(
            step=step,
            flops=counter.get_total_flops(),
            times=[],
            parameters=sum(p.numel() for p in model.parameters()),
        )
    for _ in range(args.turns):
        for row in rows.values():
            began = time.perf_counter()
            for _ in range(args.repeats):
                row["step"](x0)
            row["times"].append((time.perf_counter() - began) / args.repeats)
    rate, threads = matrix_rate(), torch.get_num_threads()
    print(
        f"\nbf16 matrix product {rate:.0f} GFLOP/s, {threads} threads, torch {torch.__version__}; "
        f"medians of {args.turns} turns of {args.repeats} steps of {len(x0)} pictures"
        f"{', memory kept for all' if args.memory else ''}\n"
    )
    print("| | parameters | pictures/s | GFLOP/s | of the matrix rate |\n|---|---|---|---|---|")
    for name, row in rows.items():
        seconds = statistics.median(row["times"])
        pictures, gflops = len(x0) / seconds, row["flops"] / seconds / 1e9
        print(f"| {name} | {row['parameters']:,} | {pictures:.1f} | {gflops:.0f} | {gflops / rate:.0%} |")
    print(json.dumps({name: [round(t, 4) for t in row["times"]] for name, row in rows.items()}))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("features", "samplers", "throughput"))
    parser.add_argument("--download_dir", default="data")
    parser.add_argument(
        "--features", default="data/fashion_features.pt", help="where the feature network is kept"
    )
    parser.add_argument("--model_path", default="saved_models/animals.pt")
    parser.add_argument("--num_samples", type=int, default=300)
    parser.add_argument("--steps", type=int, nargs="+", default=[5, 10, 20, 50, 100])
    parser.add_argument("--all_steps", action="store_true", help="ddpm on all T steps as well")
    parser.add_argument("--guidance", type=float, help="instead of the model's own")
    parser.add_argument("--plot", default="samples/samplers.png")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", action="store_true", help="glibc keeps freed memory, for all programs")
    args = parser.parse_args()
    {"features": features, "samplers": samplers, "throughput": throughput}[args.what](args)


if __name__ == "__main__":
    main()
