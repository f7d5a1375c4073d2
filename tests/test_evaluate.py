"""evaluate.py: the bound against closed forms, copying, FID and KID by their definitions, the
command."""

import json
import math
import shutil
import sys
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, places, sampled_labels, slow, tree, words
from PIL import Image

import ddpm
import evaluate

STD = 0.25  # of the Gaussian data below


def diffusion(T=50, predict="x0", schedule="linear"):
    return ddpm.Diffusion(ddpm.make_betas(schedule, T), predict)


def ideal(d, mean=0.1, std=STD):
    """The network for images of independent Gaussian values: it returns E[x0 | xt], as d wants
    it."""

    def model(xt, t, y):
        abar = d.abar[:-1][t].float().view(-1, 1, 1, 1)
        gain = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar)
        x0 = mean + gain * (xt - abar.sqrt() * mean)
        eps = (xt - abar.sqrt() * x0) / (1 - abar).sqrt()
        return {"x0": x0, "eps": eps, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x0}[d.predict]

    return model


def gaussian_images(n, side=16, mean=0.1, std=STD):
    generator = torch.Generator().manual_seed(0)
    return mean + std * torch.randn(n, 1, side, side, generator=generator)


def measured(d, model, x0, K, seed=0):
    strata = evaluate.make_strata(d.T, K)
    rows = np.arange(len(x0))
    return strata, *evaluate.measure_batch(model, d, x0, None, rows, strata, seed, "fp32")


# ---- strata


@pytest.mark.parametrize("T", [10, 50, 1000])
@pytest.mark.parametrize("n", [1, 2, 7, 49, 50, 999, 5000])
def test_strata_partition_the_timesteps(T, n):
    strata = evaluate.make_strata(T, n)
    assert [t for first, beyond in strata for t in range(first, beyond)] == list(range(T))
    assert strata[0] == (0, 1) and len(strata) == min(n, T - 1) + 1
    widths = [beyond - first for first, beyond in strata]
    assert all(b >= a - 1 for a, b in zip(widths, widths[1:]))  # wider and wider, but for rounding


# ---- the three kinds of terms


def kl(mean1, var1, mean2, var2):
    return 0.5 * (math.log(var2 / var1) + (var1 + (mean1 - mean2) ** 2) / var2 - 1)


def gaussians(d, t):
    """beta_t, abar_t, abar_{t-1} and the posterior's variance (Ho et al. 2020, eq. 7), by plain
    float64."""
    at, au = d.abar[t].item(), d.abar[t - 1].item()
    beta = 1 - at / au
    return beta, at, au, (1 - au) / (1 - at) * beta


def posterior_mean(d, t, xt, x0):
    beta, at, au, _ = gaussians(d, t)
    return math.sqrt(au) * beta / (1 - at) * x0 + math.sqrt(1 - beta) * (1 - au) / (1 - at) * xt


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_a_step_term_is_the_divergence_of_the_two_gaussians(schedule):
    d, generator = diffusion(20, schedule=schedule), torch.Generator().manual_seed(0)
    x0, pred_x0, xt = (torch.randn(19, 2, 3, 3, generator=generator).clamp(-1, 1) for _ in range(3))
    t = torch.arange(1, 20)
    for i, got in enumerate(evaluate.step_term(d, x0, pred_x0, t).tolist()):
        var, want = gaussians(d, i + 1)[3], 0
        for a, b, x in zip(*(v[i].flatten().tolist() for v in (x0, pred_x0, xt))):
            want += kl(posterior_mean(d, i + 1, x, a), var, posterior_mean(d, i + 1, x, b), var)
        assert got == pytest.approx(want, rel=1e-5)


def test_the_prior_term_is_the_divergence_from_a_standard_normal():
    d, x0 = diffusion(10), torch.linspace(-1, 1, 12).view(3, 1, 2, 2)
    abar = d.abar[-2].item()
    for got, image in zip(evaluate.prior_term(d, x0).tolist(), x0):
        want = sum(kl(math.sqrt(abar) * x, 1 - abar, 0, 1) for x in image.flatten().tolist())
        assert got == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("std", [0.001, 0.01, 0.3, 5.0])
@pytest.mark.parametrize("mean", [-1.0, -0.3, 0.0, 0.7, 1.0])
def test_the_decoder_divides_all_of_the_mass_among_the_256_pixel_values(std, mean):
    x0 = ddpm.to_network(torch.arange(256)).view(1, 1, 16, 16)
    terms = evaluate.decoder_term(x0, torch.full_like(x0, mean), std).flatten()
    assert torch.exp(-terms).sum().item() == pytest.approx(1, abs=1e-6)
    assert terms.isfinite().all()  # however far away
    cdf = torch.distributions.Normal(float(torch.tensor(mean)), std).cdf
    edges = torch.linspace(-1 - 1 / 255, 1 + 1 / 255, 257, dtype=torch.float64)
    edges[0], edges[-1] = -math.inf, math.inf
    mass = cdf(edges[1:]) - cdf(edges[:-1])
    sure = mass > 1e-9
    assert sure.any() and torch.allclose(torch.exp(-terms)[sure], mass[sure], rtol=1e-4)


def test_far_tails_of_the_decoder_are_the_asymptotic_ones():
    """log of the mass of a narrow bin z standard deviations away, by the leading terms of Mills'
    ratio."""
    std, far = 0.005, torch.tensor([-0.6, 0.6]).view(1, 1, 1, 2)
    for got in evaluate.decoder_term(far, torch.zeros_like(far), std).flatten().tolist():
        z = (0.6 - 1 / 255) / std
        assert got == pytest.approx(z * z / 2 + math.log(z * math.sqrt(2 * math.pi)), rel=1e-4)


# ---- the whole bound


@pytest.mark.parametrize("predict", ["x0", "eps", "v"])
def test_gaussian_data_and_the_ideal_network_give_the_known_terms(predict):
    """The predicted x0 is off by the posterior's variance of x0, 1 / (1 / std^2 + snr), in the
    mean."""
    d, n = diffusion(30, predict), 64
    x0 = gaussian_images(n)
    strata, prior, terms, losses = measured(d, ideal(d), x0, 29)
    assert [first for first, _ in strata] == list(range(30))
    snr = (d.abar / (1 - d.abar))[:-1]
    for t in range(1, 30):
        want = (snr[t - 1] - snr[t]).item() / 2 / (STD**-2 + snr[t].item())  # nats a value
        got = terms[t].mean().item() / x0[0].numel()
        assert got == pytest.approx(want, rel=5 * math.sqrt(2 / x0.numel()))
    error = 1 / (STD**-2 + snr)  # of x0; as a loss: of what the network predicts
    want = {"x0": error, "eps": error * snr, "v": error * (1 + snr)}[predict]
    assert torch.allclose(losses.mean(1), want, rtol=5 * math.sqrt(2 / x0.numel()))


def test_the_bound_is_above_the_entropy_of_gaussian_pixels():
    """No bound is below the entropy of the pixels, log2(std sqrt(2 pi e) / bin); more steps come
    nearer."""
    entropy, found = math.log2(STD * math.sqrt(2 * math.pi * math.e) / (2 / 255)), []
    for T in (30, 1000):
        d = diffusion(T)
        x0 = ddpm.to_network(ddpm.to_pixels(gaussian_images(64)))
        strata, *rest = measured(d, ideal(d), x0, 60)
        found.append(evaluate.summarise(*rest, strata, x0[0].numel())["bits"])
    assert entropy < found[1] < entropy + 1 < found[0]


def test_the_whole_bound_by_loops_over_every_value():
    """Two images of four pixels, all by plain float64 numbers and the noise of the measurement."""
    d, seed = diffusion(10, "eps"), 3
    x0 = ddpm.to_network(torch.tensor([[0, 255, 7, 100], [128, 31, 255, 64]], dtype=torch.uint8))
    x0 = x0.view(2, 1, 2, 2)

    def model(x, t, y):
        return torch.sin(3 * x) + t.view(-1, 1, 1, 1) / 20

    strata, *rest = measured(d, model, x0, 9, seed)
    got, total = evaluate.summarise(*rest, strata, 4), []
    noise = ddpm.ImageNoise(ddpm.derive_seed(seed, 5), range(2), (1, 2, 2), "cpu")
    for t in range(10):
        for g in noise.generators:
            torch.randint(t, t + 1, (), generator=g)
        eps = noise().double()
        at, std0 = d.abar[t].item(), math.sqrt(gaussians(d, 1)[3])
        for x, e in zip(x0.double().flatten().tolist(), eps.flatten().tolist()):
            xt = math.sqrt(at) * x + math.sqrt(1 - at) * e
            pred = (xt - math.sqrt(1 - at) * (math.sin(3 * xt) + t / 20)) / math.sqrt(at)
            pred = min(max(pred, -1), 1)
            if t == 0:
                phi = [
                    0.5 * math.erfc(-(x - pred + s / 255) / std0 / math.sqrt(2)) for s in (-1, 1)
                ]
                low, high = 0 if x < -0.999 else phi[0], 1 if x > 0.999 else phi[1]
                total.append(-math.log(high - low))
            else:
                var = gaussians(d, t)[3]
                total.append(
                    kl(posterior_mean(d, t, xt, x), var, posterior_mean(d, t, xt, pred), var)
                )
    at = d.abar[-2].item()
    total += [kl(math.sqrt(at) * x, 1 - at, 0, 1) for x in x0.double().flatten().tolist()]
    assert got["bits"] == pytest.approx(sum(total) / 8 / math.log(2), rel=1e-4)
    assert got["bits"] == pytest.approx(got["prior"] + got["steps"] + got["decoder"], rel=1e-9)


def test_strata_estimate_the_sum_over_all_timesteps():
    d, x0 = diffusion(200), gaussian_images(48, side=8)
    bound = {}
    for K in (199, 12):
        strata, *rest = measured(d, ideal(d), x0, K, seed=K)
        bound[K] = evaluate.summarise(*rest, strata, 64)
    errors = math.hypot(bound[199]["bits_error"], bound[12]["bits_error"])
    assert abs(bound[12]["bits"] - bound[199]["bits"]) < 4 * errors
    assert bound[12]["loss"] == pytest.approx(bound[199]["loss"], rel=0.1)
    assert sum(row["bits"] for row in bound[12]["by_timestep"]) == pytest.approx(
        bound[12]["bits"] - bound[12]["prior"]
    )


def test_numbers_depend_on_neither_batch_nor_neighbours():
    d, x0, strata = diffusion(20), gaussian_images(5, side=4), evaluate.make_strata(20, 6)
    together = evaluate.measure_batch(ideal(d), d, x0, None, np.arange(5), strata, 0, "fp32")
    alone = evaluate.measure_batch(ideal(d), d, x0[3:4], None, np.arange(3, 4), strata, 0, "fp32")
    for a, b in zip(together, alone):
        assert torch.allclose(a[..., 3:4], b, rtol=1e-5)


def test_one_image_has_no_standard_error():
    d = diffusion(10)
    strata, *rest = measured(d, ideal(d), gaussian_images(1), 3)
    assert evaluate.summarise(*rest, strata, 256)["bits_error"] is None


# ---- copying


def some_images(n_train, n_validation, size=8, seed=0, channels=1):
    """What load_images returns, as far as it matters here: images of independent pixels."""
    n = n_train + n_validation
    pixels = np.random.default_rng(seed).integers(0, 256, (n, channels, size, size), dtype=np.uint8)
    return SimpleNamespace(
        pixels=torch.from_numpy(pixels), train=np.arange(n_train), validation=np.arange(n_train, n)
    )


def config(size=8, **more):
    return ddpm.override(ddpm.Config(), image_size=size, **more)


def test_the_nearest_image_is_that_of_a_plain_search():
    images, queries = some_images(40, 0), some_images(7, 0, seed=1).pixels
    distance, rows, mirrored = evaluate.nearest(queries, images, config(), "cpu")
    plain = (
        (queries[:, None].double() - images.pixels[None].double()).square().mean((2, 3, 4)).sqrt()
    )
    assert torch.allclose(distance.double(), plain.min(1).values, rtol=1e-4)
    assert rows.tolist() == plain.argmin(1).tolist() and not mirrored.any()


def test_an_image_is_not_its_own_neighbour_and_mirrored_ones_count_where_training_used_them():
    images = some_images(10, 0)
    distance, rows, _ = evaluate.nearest(images.pixels, images, config(), "cpu", np.arange(10))
    assert (rows != torch.arange(10)).all() and distance.min() > 20
    mirror = images.pixels.flip(3)
    assert evaluate.nearest(mirror, images, config(), "cpu")[0].min() > 20
    distance, rows, mirrored = evaluate.nearest(mirror, images, config(hflip=True), "cpu")
    assert distance.max() < 0.5 and rows.tolist() == list(range(10)) and mirrored.all()


def test_images_in_pieces_give_the_same_neighbours(monkeypatch):
    images, queries = some_images(300, 0, size=64), some_images(3, 0, size=64, seed=1).pixels
    whole = evaluate.nearest(queries, images, config(64), "cpu")
    monkeypatch.setattr(evaluate, "math", SimpleNamespace(**vars(math) | {"ceil": lambda x: 7}))
    for a, b in zip(whole, evaluate.nearest(queries, images, config(64), "cpu")):
        assert torch.allclose(a.float(), b.float())


def test_large_images_are_compared_at_64_pixels_and_borders_not_at_all():
    x = torch.randint(0, 256, (2, 3, 128, 128), dtype=torch.uint8)
    small = x.float().unflatten(2, (64, 2)).unflatten(4, (64, 2)).mean((3, 5))
    want = (small[0] - small[1]).square().mean().sqrt().item()
    a, b = evaluate.to_vectors(x, "cpu")
    assert (a - b).norm().item() == pytest.approx(want, rel=1e-4)
    padded = torch.zeros(2, 1, 32, 32, dtype=torch.uint8)
    padded[1, :, :2], padded[1, :, 10, 10] = 255, 28
    images = SimpleNamespace(pixels=padded, train=np.arange(2))
    cropped = evaluate.pick(images, [0, 1], config(28))
    assert cropped.shape == (2, 1, 28, 28)
    a, b = evaluate.to_vectors(cropped, "cpu")
    assert (a - b).norm().item() == pytest.approx(1)  # 28 / sqrt(28 * 28)
    distance, rows, _ = evaluate.nearest(cropped, images, config(28), "cpu", np.arange(2))
    assert distance.tolist() == pytest.approx([1, 1]) and rows.tolist() == [1, 0]


@pytest.mark.parametrize("n_validation", [60, 0])
def test_copies_are_found_and_new_images_are_not(n_validation, tmp_path):
    images = some_images(60, n_validation)
    copies, _ = evaluate.copying(images.pixels[:20], images, config(), "cpu")
    assert copies["fraction"] == 1 and copies["median"] < 0.5 and copies["real"] == 60
    assert [pair["row"] for pair in copies["first"]] == list(range(16))
    assert copies["real_set"] == ("validation" if n_validation else "training")
    new, _ = evaluate.copying(some_images(400, 0, seed=1).pixels, images, config(), "cpu")
    assert 0.35 < new["fraction"] < 0.65


@pytest.mark.parametrize(
    "n, size", [(1, (2, 1)), (3, (6, 1)), (4, (8, 1)), (7, (8, 1)), (50, (8, 4))]
)
def test_samples_stand_beside_their_nearest(n, size, tmp_path, monkeypatch):
    images, plotted = some_images(5, 2), {}
    monkeypatch.setattr(
        ddpm, "plot_rows", lambda rows, titles, *_: plotted.update(rows=rows, titles=titles)
    )
    samples = images.pixels[torch.arange(n) % 5]
    evaluate.plot_copies(evaluate.copying(samples, images, config(), "cpu")[1], tmp_path)
    rows = torch.stack(list(plotted["rows"].values()))
    assert (rows.shape[1], rows.shape[0]) == size and len(plotted["titles"]) == size[0]
    assert torch.equal(rows[:, ::2], rows[:, 1::2])  # copies: each sample is its nearest
    assert torch.equal(rows[:, ::2].flatten(0, 1), samples[: size[0] * size[1] // 2])


def test_a_single_training_image_says_nothing_about_copies(tmp_path):
    images = some_images(1, 0)
    numbers, _ = evaluate.copying(images.pixels, images, config(), "cpu")
    assert numbers["fraction"] is None and numbers["real_median"] is None
    assert evaluate.describe_copies(numbers) is None


# ---- FID and KID


class Moments(torch.nn.Module):
    """A network of features that a test can compute by hand: some pixels and their products."""

    def forward(self, x):
        x = x.flatten(1)
        return torch.cat([x[:, :3], x[:, 3:5] * x[:, 5:7], x[:, :1] + x[:, 7:8]], dim=1)


class Volume(torch.nn.Module):
    def forward(self, x):
        return x


class Unhappy(torch.nn.Module):
    def forward(self, x):
        return x.flatten(1) / 0.0


@pytest.fixture
def script(tmp_path):
    """script(network) writes it as TorchScript and returns the path."""

    def write(net):
        path = tmp_path / f"{type(net).__name__}.pt"
        torch.jit.script(net).save(path)
        return path

    return write


def features_of(pixels):
    return Moments()(ddpm.to_network(pixels)).double()


def frechet(a, b):
    """|difference of means|^2 + trace(A + B - 2 (A^1/2 B A^1/2)^1/2), the roots by symmetric
    eigenvalues."""

    def root(m):
        values, vectors = np.linalg.eigh(m)
        return vectors @ np.diag(np.sqrt(values.clip(0))) @ vectors.T

    A, B = np.cov(a.T), np.cov(b.T)
    between = root(root(A) @ B @ root(A))
    return ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(A + B - 2 * between)


def squared_mmd(a, b):
    """The unbiased estimate with the kernel (a'b / d + 1)^3 (Binkowski et al. 2018, eq. 4), by
    loops."""

    def k(x, y):
        return (sum(x * y) / len(x) + 1) ** 3

    n, m = len(a), len(b)
    same = sum(k(a[i], a[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    same += sum(k(b[i], b[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return same - 2 * sum(k(x, y) for x in a for y in b) / (n * m)


def test_fid_and_kid_are_those_of_their_definitions(script):
    images, samples = some_images(150, 30), some_images(30, 0, seed=1).pixels // 2
    features = evaluate.load_features(script(Moments()), images.pixels[:2], "cpu")
    sets = {"validation": images.validation, "training": images.train}
    found = evaluate.distances(features, samples, images, sets, config())
    fake = features_of(samples).numpy()
    for name, rows in sets.items():
        real = features_of(images.pixels[rows]).numpy()
        assert found[name]["fid"] == pytest.approx(frechet(real, fake), rel=1e-3)
        assert found[name]["reference"] == len(rows) and found[name]["features"] == 6
    real = features_of(images.pixels[images.validation]).numpy()
    assert found["validation"]["kid"] == pytest.approx(squared_mmd(real, fake), rel=1e-3)
    assert found["validation"]["kid_error"] is None and found["validation"]["kid_subsets"] == 1
    assert found["training"]["kid_error"] > 0 and found["training"]["kid_subset_size"] == 30


def test_a_process_without_a_part_adds_up_with_the_others(script, monkeypatch):
    """All of them are asked for the numbers, and torchmetrics wants to have seen the features'
    type."""
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    seen, none = [], torch.tensor(0.0)
    monkeypatch.setattr(evaluate, "distribute", lambda *_: [])
    monkeypatch.setattr(
        FrechetInceptionDistance, "compute", lambda fid: seen.append(fid.orig_dtype) or none
    )
    monkeypatch.setattr(KernelInceptionDistance, "compute", lambda kid: (none, none))
    images = some_images(9, 3)
    features = evaluate.load_features(script(Moments()), images.pixels[:2], "cpu")
    sets = {"validation": images.validation, "training": images.train}
    evaluate.distances(features, images.pixels, images, sets, config())
    assert seen == [torch.float32] * 2


def test_a_set_is_at_no_distance_from_itself(script):
    images = some_images(100, 0)
    features = evaluate.load_features(script(Moments()), images.pixels[:2], "cpu")
    same = evaluate.distances(features, images.pixels, images, {"training": images.train}, config())
    other = evaluate.distances(
        features, images.pixels // 2, images, {"training": images.train}, config()
    )
    assert abs(same["training"]["fid"]) < 1e-3 < 0.1 < other["training"]["fid"]


def test_fid_of_gaussian_features_is_the_closed_form():
    """Features N(0, 1) and N(m, s^2), one by one: m^2 + (s - 1)^2 each."""
    rng, n, d = np.random.default_rng(0), 20_000, 3
    table = torch.from_numpy(rng.normal(size=(2, n, d))).float()
    table[1] = table[1] * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([1.0, 0.0, -2.0])

    def features(pixels):  # each image carries its number
        number = pixels.flatten(1).long() @ torch.tensor([1, 256, 65536, 0] + [0] * 60)
        return table.flatten(0, 1)[number]

    numbers = torch.arange(2 * n)
    pixels = torch.zeros(2 * n, 64, dtype=torch.uint8)
    for i in range(3):
        pixels[:, i] = (numbers >> (8 * i) & 255).to(torch.uint8)
    pixels = pixels.view(-1, 1, 8, 8)
    images = SimpleNamespace(pixels=pixels[:n])
    found = evaluate.distances(features, pixels[n:], images, {"training": np.arange(n)}, config())
    assert found["training"]["fid"] == pytest.approx(1 + 0 + 4 + 0 + 1 + 0.25, rel=0.03)


def test_features_see_cropped_images_between_minus_one_and_one(script):
    class Extremes(torch.nn.Module):
        def forward(self, x):
            v = x.flatten(1)
            side = torch.full((len(x), 1), float(x.shape[3]))
            return torch.cat([v.amin(1, keepdim=True), v.amax(1, keepdim=True), side], dim=1)

    path = script(Extremes())
    images, seen = some_images(4, 0, size=32), []
    features = evaluate.load_features(path, images.pixels[:2, :, 2:-2, 2:-2], "cpu")

    def watch(pixels):
        seen.append(features(pixels))
        return seen[-1]

    samples = ddpm.crop(images.pixels, 28)  # as they come from sample_images
    evaluate.distances(watch, samples, images, {"training": images.train}, config(28))
    for f in seen:
        assert (f[:, 2] == 28).all() and (-1 <= f[:, 0]).all() and (f[:, 1] <= 1).all()
        assert f[:, 0].max() < -0.8 and f[:, 1].min() > 0.8


def test_inception_sees_grey_as_three_equal_channels(monkeypatch):
    seen = []

    class Net(torch.nn.Module):
        def __init__(self, name, layers):
            super().__init__()
            assert layers == ["2048"]

        def forward(self, x):
            seen.append(x)
            return (torch.zeros(len(x), 2048),)

    source = SimpleNamespace(FeatureExtractorInceptionV3=Net)
    monkeypatch.setitem(
        sys.modules, "torch_fidelity", SimpleNamespace(feature_extractor_inceptionv3=source)
    )
    features = evaluate.inception("cpu")
    for pixels in (some_images(2, 0).pixels, some_images(2, 0, channels=3).pixels):
        assert features(pixels).shape == (2, 2048)
        assert seen[-1].dtype == torch.uint8 and torch.equal(seen[-1], pixels.expand(2, 3, 8, 8))


# ---- the command


@pytest.fixture(scope="session")
def half_trained(image_folder, tmp_path_factory):
    """A tiny model trained without half of the images, which has seen the others often."""
    folder = tmp_path_factory.mktemp("half")
    more = "--steps 60 --lr 1e-2 --ema_decay 0.9 --batch_size 8 --log_every 60 --holdout 0.5"
    assert ddpm.main(words("--mode train", TINY, more, *places(folder, image_folder))) == 0
    return folder / "model.pt"


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags) evaluates in tmp_path and returns the exit code."""
    monkeypatch.chdir(tmp_path)

    def run(*flags):
        try:
            return evaluate.main(
                words("--bpd_pictures 4 --bpd_timesteps 5 --precision fp32", *flags)
            )
        except SystemExit as e:
            return e.code

    return run


def result(folder):
    return json.loads((folder / "samples" / "evaluation.json").read_text())


def test_one_command_prints_it_all(run, half_trained, tmp_path, capsys, script, real_plots):
    assert (
        run("--model_path", half_trained, "--features", script(Moments()), "--num_samples 9") == 0
    )
    out, found = capsys.readouterr().out, result(tmp_path)
    assert sorted(tree(tmp_path / "samples")) == [
        "evaluation.json",
        "loss_by_timestep.png",
        "nearest.png",
    ]
    wrote = [line.strip() for line in out.split("Wrote:")[1].splitlines() if line.strip()]
    assert {str(tmp_path / "samples" / name) for name in tree(tmp_path / "samples")} == set(wrote)
    assert list(found["sets"]) == ["validation", "training"]
    assert all("8 bits" in note for note in found["notes"])  # a model this small, for sure
    assert (
        found["num_samples"] == 9
        and found["ema"] is True
        and found["config"]["sampling_steps"] == 2
    )
    assert found["torch"] == torch.__version__
    for numbers in found["sets"].values():
        assert (
            numbers["images"] == 4
            and numbers["reference"] == 12
            and len(numbers["by_timestep"]) == 6
        )
        for key, form in (("bits", ".3f"), ("loss", ".4g"), ("fid", ".4g"), ("kid", ".4g")):
            assert f"{numbers[key]:{form}}" in out
    printed = " ".join(out.split())
    for text in (
        "9: dpm++sde, 2 steps, arcsine spacing, x0 clipped",
        "EMA weights",
        "768 values per image",
    ):
        assert text in printed
    fraction = f"{found['copying']['fraction']:.0%} of 9 samples"
    assert fraction in printed and "12 validation images" in printed
    for name in ("nearest.png", "loss_by_timestep.png"):
        assert Image.open(tmp_path / "samples" / name).size[0] > 500


def test_what_is_measured_is_the_validation_set_of_training(
    run, half_trained, tmp_path, monkeypatch
):
    """Another --seed gives other samples, but leaves the split of the training run."""
    validation, asked = torch.load(half_trained, weights_only=True)["held_out"], []
    measure = evaluate.measure_batch
    monkeypatch.setattr(
        evaluate, "measure_batch", lambda *a: asked.append(a[4].tolist()) or measure(*a)
    )
    digests = []
    for seed in (0, 5):
        assert run("--model_path", half_trained, "--bpd_pictures 99 --seed", seed) == 0
        assert asked[0] == validation and sorted(asked[0] + asked[1]) == list(range(24))
        asked.clear()
        digests.append(result(tmp_path)["copying"]["first"])
    assert digests[0] != digests[1]


def test_labels_are_those_of_the_model(
    run, half_trained, image_folder, tmp_path, monkeypatch
):
    """Class folders are matched by name, and a folder that the model does not know has no label."""
    seen, folder = {}, tmp_path / "other"
    for name in ("aardvark", "stripes", "disc"):
        (folder / name).mkdir(parents=True)
        for i in range(4):
            source = image_folder / ("disc" if name == "aardvark" else name) / f"{i}.png"
            (folder / name / f"{i}.png").write_bytes(source.read_bytes())
    measure = evaluate.measure_batch

    def watch(*args):
        seen.update(zip(args[4].tolist(), args[3].tolist()))
        return measure(*args)

    monkeypatch.setattr(evaluate, "measure_batch", watch)
    assert run("--model_path", half_trained, "--bpd_pictures 99 --data_path", folder) == 0
    assert [seen[row] for row in range(12)] == [-1] * 4 + [0] * 4 + [2] * 4
    assert any("trained on other images" in note for note in result(tmp_path)["notes"])


def test_images_of_another_scale_are_refused(run, half_trained, image_folder, tmp_path, capsys):
    """Their brightness would mean something else than to the model."""
    shutil.copytree(image_folder, tmp_path / "other")
    scan = np.full((16, 16), 4000, dtype=np.uint16)
    Image.fromarray(scan).save(tmp_path / "other" / "disc" / "scan.png")
    assert run("--model_path", half_trained, "--data_path", tmp_path / "other") == 1
    assert "4095 is white, in those of the model's training 255" in capsys.readouterr().err


def test_settings_come_from_the_checkpoint_unless_given(run, half_trained, tmp_path):
    assert run("--model_path", half_trained) == 0
    before = result(tmp_path)
    assert before["config"]["num_samples"] == 3 and before["config"]["sampler"] == ddpm.Config.sampler
    sampling = "--sampler ddim --sampling-steps 5 --guidance 1 --classes disc"
    more = f"{sampling} --no_ema --samples_dir elsewhere"
    assert run("--model_path", half_trained, more) == 0
    after = json.loads((tmp_path / "elsewhere" / "evaluation.json").read_text())
    changed = {k for k, v in after["config"].items() if v != before["config"][k]}
    assert changed == {"sampler", "sampling_steps", "guidance", "classes", "ema", "samples_dir"}
    assert after["sets"]["training"]["bits"] != before["sets"]["training"]["bits"]  # other weights
    assert not any("fid" in numbers for numbers in after["sets"].values())  # not asked for


@pytest.mark.parametrize("n", [8, 16, 24])
def test_classes_are_sampled_as_often_as_the_images_have_them(
    run, trained, image_folder, tmp_path, monkeypatch, n
):
    """Else FID and KID would measure the mixture: the model knows disc, square and stripes."""
    for name, number in (("disc", 6), ("stripes", 2), ("unknown", 4)):
        (tmp_path / "other" / name).mkdir(parents=True)
        for i in range(number):
            source = image_folder / ("square" if name == "unknown" else name) / f"{i}.png"
            (tmp_path / "other" / name / f"{i}.png").write_bytes(source.read_bytes())
    seen = sampled_labels(monkeypatch)
    flags = ("--model_path", trained, "--sampling_steps 1 --data_path", tmp_path / "other")
    assert run(*flags, f"--sample_batch_size {n} --num_samples {n}") == 0
    assert [seen.count(label) for label in range(3)] == [n * 6 // 8, 0, n * 2 // 8]
    seen.clear()
    assert run(*flags, "--sample_batch_size 4 --num_samples 4 --classes square,disc") == 0
    assert seen == [1, 0, 1, 0]


def test_what_training_showed_in_its_previews_is_not_all_that_is_measured(
    run, trained, tmp_path, monkeypatch
):
    saved = ddpm.read_checkpoint(trained)
    saved["config"]["classes"] = "square"
    torch.save(saved, tmp_path / "m.pt")
    seen = sampled_labels(monkeypatch)
    assert run("--model_path m.pt --num_samples 6 --sampling_steps 1") == 0
    assert sorted(seen) == [0, 0, 1, 1, 2, 2]
    assert result(tmp_path)["config"]["classes"] is None


def test_without_validation_images_there_is_a_note(run, trained, tmp_path, capsys):
    assert run("--model_path", trained) == 0
    assert list(result(tmp_path)["sets"]) == ["training"]
    assert "no image was kept for validation" in capsys.readouterr().out


def test_too_few_images_for_the_features_give_a_note(
    run, half_trained, tmp_path, script
):
    assert run("--model_path", half_trained, "--num_samples 5 --features", script(Moments())) == 0
    assert sum("do not determine the covariance" in note for note in result(tmp_path)["notes"]) == 2


def fail_to_download(*_, **__):
    raise OSError("no route to host")


@pytest.mark.parametrize("lacking", ["torchmetrics", "torch_fidelity", "weights"])
def test_the_rest_runs_without_what_fid_needs(
    lacking, run, half_trained, tmp_path, monkeypatch, capsys
):
    if lacking == "weights":
        from torch_fidelity import feature_extractor_inceptionv3 as source

        monkeypatch.setattr(source, "load_state_dict_from_url", fail_to_download)
    else:
        monkeypatch.setitem(sys.modules, lacking, None)
    assert run("--model_path", half_trained, "--num_samples 3") == 0
    assert result(tmp_path)["sets"]["validation"]["bits"] > 0
    printed = " ".join(capsys.readouterr().out.split())
    remedy = {"weights": "/checkpoints, or give --features"}
    want = remedy.get(lacking, "pip install torchmetrics torch-fidelity")
    assert "no FID and KID" in printed and want in printed


@pytest.mark.parametrize(
    "flags, code, message",
    [
        ("--model_path nowhere.pt", 1, "No checkpoint nowhere.pt"),
        ("--model_path junk", 1, "cannot be read safely"),
        ("--features nowhere.pt", 1, "No file nowhere.pt"),
        ("--features junk", 1, "not TorchScript"),
        ("--features MODEL", 1, "not TorchScript"),
        ("--features Volume.pt", 1, "returns (2, 3, 16, 16) for images (2, 3, 16, 16)"),
        ("--features Unhappy.pt", 1, "not finite"),
        ("--features Moments.pt --num_samples 1", 1, "two images or more"),
        ("--num_samples 1", 1, "two images or more"),
        ("--num_samples 0", 1, "--num_samples 0 is out of range"),
        ("--sampling_steps 51", 1, "more than --timesteps 50"),
        ("--classes dragon", 1, "no class 'dragon'"),
        ("--data_path nowhere", 1, "No folder nowhere"),
        ("--data_path grey", 1, "samples images of 3 channels, and those in grey have 1"),
        ("--bpd_timesteps 0", 1, "give 1 or more"),
        ("--bpd_pictures 0", 1, "give 1 or more"),
        ("--timesteps 10", 2, "unrecognized arguments: --timesteps"),
        ("--featurs x", 2, "unrecognized arguments: --featurs x"),
        ("--bpd_timesteps many", 2, "invalid int value"),
    ],
)
def test_mistakes_print_one_sentence(
    flags, code, message, run, half_trained, tmp_path, script, capsys
):
    (tmp_path / "junk").write_bytes(b"PK junk")
    (tmp_path / "grey").mkdir()
    for i in range(4):
        Image.new("L", (16, 16), 50 * i).save(tmp_path / "grey" / f"{i}.png")
    for net in (Volume(), Unhappy(), Moments()):
        script(net)
    flags = flags.replace("MODEL", str(half_trained))
    model = [] if "--model_path" in flags else ["--model_path", half_trained]
    assert run(*model, flags) == code
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("error:") and message in err[0], err
    assert not (tmp_path / "samples").exists()


def test_a_network_that_fails_is_reported_with_its_reason(run, half_trained, tmp_path, capsys):
    net = torch.jit.trace(torch.nn.Linear(7, 2), torch.zeros(1, 7))
    net.save(tmp_path / "linear.pt")
    assert run("--model_path", half_trained, "--features linear.pt") == 1
    err = capsys.readouterr().err
    assert "linear.pt fails (" in err and "Traceback" not in err and err.count("\n") == 1


@pytest.mark.parametrize("processes", [slow(2), 3])
def test_several_processes_measure_what_one_does(
    processes, program, run, half_trained, script, tmp_path
):
    flags = [
        "--bpd_pictures 5 --bpd_timesteps 3 --precision fp32 --device cpu --model_path",
        half_trained,
    ]
    flags += ["--num_samples 5 --features", script(Moments())]
    done = program(*flags, file=ROOT / "evaluate.py", processes=processes)
    assert done.returncode == 0 and done.stdout.count("Wrote:") == 1, done.stderr
    several = result(tmp_path)
    assert run(*flags, "--samples_dir one") == 0
    one = json.loads((tmp_path / "one" / "evaluation.json").read_text())
    assert one["num_samples"] == 5 and one["copying"] == several["copying"]
    for name, numbers in one["sets"].items():
        found = several["sets"][name]
        assert {*numbers} == {*found} and "fid" in numbers and "kid" in numbers
        for key, value in numbers.items():
            if key == "by_timestep":
                value, found[key] = (
                    [list(row.values()) for row in rows] for rows in (value, found[key])
                )
                np.testing.assert_allclose(found[key], value, rtol=1e-5)
            else:
                assert found[key] == (value and pytest.approx(value, rel=1e-4)), key


@pytest.mark.parametrize(
    "n, size, processes", [(0, 4, 1), (1, 4, 3), (7, 3, 1), (7, 3, 2), (9, 2, 4)]
)
def test_work_is_distributed_in_order(n, size, processes, monkeypatch):
    rows, lists = np.arange(n) * 10, []
    monkeypatch.setattr(evaluate.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(evaluate.dist, "get_world_size", lambda: processes)

    def process(rank, all_gather):
        monkeypatch.setattr(evaluate.dist, "get_rank", lambda: rank)
        monkeypatch.setattr(evaluate, "all_gather", all_gather)
        return evaluate.distribute("", list, rows, size)

    for rank in range(processes):  # each records its part, and gets nothing of the others
        process(rank, lambda mine: lists.append(mine) or [defaultdict(list)] * processes)
    parts = process(0, lambda mine: lists)
    assert sum(parts, []) == rows.tolist() and all(0 < len(part) <= size for part in parts)
    taken = [len(part) for part in lists]
    assert sum(taken) == len(parts) and max(taken) - min(taken) <= 1


def test_help_needs_no_model_and_warns_of_code(run, tmp_path, capsys):
    assert run("--help") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "Its code is run, so you have to trust it" in printed and not tree(tmp_path)
