"""The schedules, the forward process and its identities, against closed forms and values by
hand."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import ddpm

pytestmark = pytest.mark.quick

SCHEDULES = ("linear", "cosine", "quadratic", "exponential", "sigmoid")
PREDICTIONS = ("eps", "x0", "v")


def make(predict="eps", T=100, kind="linear", **more):
    return ddpm.Diffusion(ddpm.make_betas(kind, T), predict, **more)


def images_and_noise(n=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(n, 3, 8, 8, generator=generator) * 2 - 1, torch.randn(
        n, 3, 8, 8, generator=generator
    )


# ---- schedules


@pytest.mark.parametrize("T", (10, 11, 50, 300, 1000, 4000))
@pytest.mark.parametrize("kind", SCHEDULES)
def test_betas_are_float64_and_in_range(kind, T):
    betas = ddpm.make_betas(kind, T)
    assert betas.dtype == torch.float64 and betas.shape == (T,)
    assert 0 < betas.min() and betas.max() <= 0.999
    assert torch.cumprod(1 - betas, 0)[-1] > 0


@pytest.mark.parametrize("T", (10, 50, 300, 1000, 4000))
@pytest.mark.parametrize("kind", SCHEDULES)
def test_unset_betas_end_in_near_pure_noise_at_any_T(kind, T):
    """The bound is the one above which a run warns. A geometric sequence between the same ends adds
    up to (end - start) / ln(end / start) * T = 3.76: exponential stays at e^-3.76 = 0.023 and gets
    the warning."""
    bound = 0.024 if kind == "exponential" else 0.01
    assert torch.cumprod(1 - ddpm.make_betas(kind, T), 0)[-1] < bound


@pytest.mark.parametrize("kind", ("linear", "quadratic", "exponential"))
def test_unset_betas_are_those_of_ho_et_al_rescaled_to_T(kind):
    """Ho et al. 2020, section 4: 1e-4 to 0.02 at T = 1000; times 1000/T elsewhere."""
    for T in (100, 1000, 4000):
        betas = ddpm.make_betas(kind, T)
        assert betas[0].item() == pytest.approx(1e-4 * 1000 / T, rel=1e-12)
        assert betas[-1].item() == pytest.approx(0.02 * 1000 / T, rel=1e-12)


def test_given_betas_are_taken_literally():
    betas = ddpm.make_betas("linear", 300, 1e-4, 0.02)
    np.testing.assert_allclose(betas.numpy(), np.linspace(1e-4, 0.02, 300), rtol=1e-12)


def test_the_middle_of_each_ramp():
    """With an odd T the middle is half way: of the values, of their roots, of their logarithms."""
    middle = {
        kind: ddpm.make_betas(kind, 1001, 0.0004, 0.01)[500].item()
        for kind in SCHEDULES
        if kind != "cosine"
    }
    assert middle == pytest.approx(
        {
            "linear": 0.0052,
            "quadratic": ((0.02 + 0.1) / 2) ** 2,
            "exponential": 0.002,
            "sigmoid": 0.0052,
        },
        rel=1e-9,
    )


def test_cosine_schedule_is_the_closed_form():
    """Nichol & Dhariwal 2021, eq. 17: abar_t = f(t) / f(0), until beta is capped at 0.999."""

    def f(t):
        return math.cos((t / 1000 + 0.008) / 1.008 * math.pi / 2) ** 2

    abar = torch.cumprod(1 - ddpm.make_betas("cosine", 1000), 0)
    expected = [f(t + 1) / f(0) for t in range(999)]
    np.testing.assert_allclose(abar[:999].numpy(), expected, rtol=1e-9)
    assert ddpm.make_betas("cosine", 1000)[-1] == 0.999


def test_an_unknown_schedule_is_named():
    with pytest.raises(ddpm.UserError, match="wavy"):
        ddpm.make_betas("wavy", 100)


def test_abar_has_one_trailing_one():
    """Index t - 1 is right at t = 0: -1 stands for clean data."""
    d = make(T=100)
    assert d.abar.dtype == torch.float64 and d.abar.shape == (101,)
    assert d.abar[-1] == 1 and d.abar[99] < d.abar[98]
    torch.testing.assert_close(
        d.abar[:-1], torch.cumprod(1 - ddpm.make_betas("linear", 100), 0), rtol=1e-12, atol=0
    )


# ---- forward process and predictions


def test_q_sample_is_equation_4():
    """Ho et al. 2020, eq. 4, with abar multiplied up here."""
    x0, eps = images_and_noise()
    t, betas = torch.tensor([0, 1, 50, 99]), np.linspace(1e-3, 0.2, 100)
    abar = np.array([np.prod(1 - betas[: i + 1]) for i in t.tolist()]).reshape(4, 1, 1, 1)
    expected = np.sqrt(abar) * x0.numpy() + np.sqrt(1 - abar) * eps.numpy()
    np.testing.assert_allclose(make().q_sample(x0, t, eps).numpy(), expected, atol=1e-6)


def target(predict, x0, eps, t, abar):
    """What a perfect network says: v is sqrt(abar) eps - sqrt(1-abar) x0 (Salimans & Ho 2022,
    section 4)."""
    a = abar[t].sqrt().float().view(-1, 1, 1, 1)
    s = (1 - abar[t]).sqrt().float().view(-1, 1, 1, 1)
    return {"eps": eps, "x0": x0, "v": a * eps - s * x0}[predict]


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("predict", PREDICTIONS)
def test_predict_x0_undoes_q_sample(predict, kind):
    d, (x0, eps) = make(predict, kind=kind), images_and_noise()
    t = torch.tensor([0, 10, 50, 90])
    back = d.predict_x0(target(predict, x0, eps, t, d.abar), d.q_sample(x0, t, eps), t)
    torch.testing.assert_close(back, x0, atol=2e-4, rtol=0)


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_the_loss_of_a_perfect_network_is_zero_at_every_timestep(predict):
    d, (x0, eps) = make(predict, T=100), images_and_noise(100)
    t = torch.arange(100)
    losses = d.loss(lambda xt, t, y: target(predict, x0, eps, t, d.abar), x0, t, eps)
    assert losses.shape == (100,) and losses.dtype == torch.float32
    assert losses.max() < 1e-10


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("loss", ("l2", "l1", "huber"))
def test_the_loss_is_one_mean_per_image(loss, predict):
    """Huber's loss is d^2 / 2 up to 1 and d - 1/2 beyond."""
    d, (x0, eps) = make(predict, loss=loss), images_and_noise()
    t = torch.tensor([0, 3, 60, 99])
    said = torch.full_like(x0, 0.3)
    gap = (said - target(predict, x0, eps, t, d.abar)).abs().double()
    by_hand = {"l2": gap**2, "l1": gap, "huber": torch.where(gap < 1, gap**2 / 2, gap - 0.5)}[loss]
    losses = d.loss(lambda xt, t, y: said, x0, t, eps)
    torch.testing.assert_close(losses.double(), by_hand.flatten(1).mean(1), rtol=1e-5, atol=1e-7)


def test_the_loss_shows_the_network_the_noised_image_its_timestep_and_its_label():
    d, (x0, eps), seen = make(), images_and_noise(), []
    t, y = torch.tensor([1, 2, 3, 4]), torch.tensor([0, 1, 2, -1])

    def network(*given):
        seen.extend(given)
        return torch.zeros_like(x0)

    d.loss(network, x0, t, eps, y)
    assert (
        torch.equal(seen[0], d.q_sample(x0, t, eps))
        and torch.equal(seen[1], t)
        and torch.equal(seen[2], y)
    )


@pytest.mark.parametrize("predict", PREDICTIONS)
def test_min_snr_weights(predict):
    """The error of x0 weighs 1 + min(snr, 5), over snr + 1 for v; for eps min(snr, 5) over snr."""
    d, plain, (x0, eps) = make(predict, min_snr=5.0), make(predict), images_and_noise(100)
    t = torch.arange(100)

    def losses(diffusion):
        return diffusion.loss(lambda xt, t, y: torch.zeros_like(xt), x0, t, eps).double()

    snr = (d.abar / (1 - d.abar))[:-1]
    assert snr[0] > 5 > snr[-1]
    capped = torch.minimum(snr, torch.tensor(5.0))
    weight = {"x0": 1 + capped, "eps": capped / snr, "v": (1 + capped) / (1 + snr)}[predict]
    assert weight.max() <= 6, "no timestep takes all"
    torch.testing.assert_close(losses(d), losses(plain) * weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("predict", PREDICTIONS)
@pytest.mark.parametrize("side", (7, 8))
def test_detail_weight_weighs_the_spectrum_of_the_error(predict, side):
    """A difference of neighbours multiplies the frequency f of an image that goes on round its
    edges by 2 sin(pi f). The error here is that: repeated, with the repetition cut off again."""
    d = make(predict, detail_weight=0.75)
    plain, (x0, eps) = make(predict), images_and_noise()
    x0, eps = x0[..., :side, :side], eps[..., :side, :side]
    t = torch.tensor([0, 3, 60, 99])
    wanted = target(predict, x0, eps, t, d.abar).float()
    error = torch.randn(x0.shape, generator=torch.Generator().manual_seed(1))
    error[..., -1] = error[..., 0]  # so that no difference across the edge is left out
    error[..., -1, :] = error[..., 0, :]
    gain = (2 * torch.sin(torch.pi * torch.fft.fftfreq(side - 1))) ** 2
    rows = torch.fft.fft(error.double()[..., :-1], dim=3).abs().square() * gain
    columns = torch.fft.fft(error.double()[..., :-1, :], dim=2).abs().square() * gain[:, None]
    detail = sum(energy.mean(dim=(1, 2, 3)) / (side - 1) for energy in (rows, columns))

    def losses(diffusion):
        return diffusion.loss(lambda xt, t, y: wanted + error, x0, t, eps).double()

    torch.testing.assert_close(losses(d) - losses(plain), 0.75 * detail, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", ("l2", "l1", "huber"))
def test_detail_weight_leaves_an_even_error_as_it_is(loss):
    d, plain, (x0, eps) = make(detail_weight=3.0, loss=loss), make(loss=loss), images_and_noise()
    t = torch.tensor([0, 3, 60, 99])

    def losses(diffusion, error):
        return diffusion.loss(lambda xt, t, y: eps + error, x0, t, eps)

    torch.testing.assert_close(losses(d, 0.25), losses(plain, 0.25), rtol=1e-5, atol=1e-6)
    checked = (torch.arange(8)[:, None] + torch.arange(8)) % 2 * 2.0 - 1
    assert (losses(d, checked) > 2 * losses(plain, checked)).all()


def test_the_best_output_is_the_mean_of_the_targets_with_any_detail_weight():
    """Gradient descent on the loss over four targets at once ends at their mean."""
    d, (targets, _) = make(detail_weight=2.0), images_and_noise()
    out, t = torch.zeros(1, 3, 8, 8, requires_grad=True), torch.zeros(4, dtype=torch.long)

    def network(xt, t, y):
        return out.expand(4, -1, -1, -1)

    for _ in range(500):
        (slope,) = torch.autograd.grad(d.loss(network, targets, t, targets).mean(), out)
        out.data -= 5 * slope
    torch.testing.assert_close(out[0].detach(), targets.mean(0), rtol=0, atol=1e-3)


# ---- the reverse process


def posterior(betas, t, xt, x0):
    """Ho et al. 2020, eq. 7: mean and variance of q(x_{t-1} | x_t, x_0), t counted from 0."""
    alphas = 1 - betas
    abar, before = np.prod(alphas[: t + 1]), np.prod(alphas[:t])
    mean = (np.sqrt(before) * betas[t] * x0 + np.sqrt(alphas[t]) * (1 - before) * xt) / (1 - abar)
    return mean, (1 - before) / (1 - abar) * betas[t]


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_posterior_at_eta_1_is_equation_7_of_ho_et_al(kind):
    betas, (x0, xt) = ddpm.make_betas(kind, 100), (v.double() for v in images_and_noise())
    d = ddpm.Diffusion(betas)
    for t in (0, 1, 2, 50, 98, 99):
        expected, variance = posterior(betas.numpy(), t, xt.numpy(), x0.numpy())
        for eta in ((), (1.0,)):  # which is the default
            mean, std = d.posterior(xt, x0, t, t - 1, *eta)
            np.testing.assert_allclose(mean.numpy(), expected, rtol=1e-7, atol=1e-9)
            assert std**2 == pytest.approx(variance, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_the_posterior_over_several_timesteps_is_the_product_of_two_gaussians(kind):
    """q(x_u | x_t, x_0) is q(x_u | x_0) q(x_t | x_u), normalised: precisions add, and weigh the
    means."""
    betas, (x0, xt) = ddpm.make_betas(kind, 100), (v.double() for v in images_and_noise())
    d, alphas = ddpm.Diffusion(betas), 1 - betas.numpy()
    for t, u in ((99, 98), (99, 0), (50, 7), (7, 5), (1, 0)):
        au, ratio = (
            np.prod(alphas[: u + 1]),
            np.prod(alphas[u + 1 : t + 1]),
        )  # of q(x_u | x_0), q(x_t | x_u)
        precision = 1 / (1 - au) + ratio / (1 - ratio)
        expected = (np.sqrt(au) * x0 / (1 - au) + np.sqrt(ratio) * xt / (1 - ratio)) / precision
        mean, std = d.posterior(xt, x0, t, u)
        torch.testing.assert_close(mean, expected, rtol=1e-7, atol=1e-9)
        assert std**2 == pytest.approx(1 / precision, rel=1e-6)
        assert d.forward_std(t, u) ** 2 == pytest.approx(1 - ratio, rel=1e-6)


@pytest.mark.parametrize("eta", (0.0, 0.3, 0.7, 1.0))
def test_the_posterior_of_any_eta_keeps_the_marginal(eta):
    """Song et al. 2021, lemma 1: over x_t ~ q(x_t | x_0), x_u has the mean and variance of
    q(x_u | x_0)."""
    d, (x0, _) = make(), (v.double() for v in images_and_noise())
    for t, u in ((99, 98), (99, 0), (50, 7), (1, 0), (50, -1)):
        at, au = d.abar[t], d.abar[u]
        mean, std = d.posterior(at.sqrt() * x0, x0, t, u, eta)
        torch.testing.assert_close(mean, au.sqrt() * x0, rtol=1e-9, atol=1e-9)
        slope = d.posterior(at.sqrt() * x0 + 1, x0, t, u, eta)[0] - mean  # of the mean in x_t
        torch.testing.assert_close(
            slope**2 * (1 - at) + std**2, torch.ones_like(x0) * (1 - au), rtol=1e-7, atol=1e-9
        )


@pytest.mark.parametrize("kind", SCHEDULES)
def test_step_with_eta_1_is_the_posterior_of_ho_et_al(kind):
    betas, (x0, xt) = ddpm.make_betas(kind, 100), (v.double() for v in images_and_noise())
    d = ddpm.Diffusion(betas)
    for t in (0, 1, 2, 50, 98, 99):
        mean, variance = posterior(betas.numpy(), t, xt.numpy(), x0.numpy())
        np.testing.assert_allclose(
            d.step(xt, x0, t, t - 1, eta=1.0).numpy(), mean, rtol=1e-7, atol=1e-9
        )
        assert d.posterior_std(t, t - 1) == pytest.approx(math.sqrt(variance), rel=1e-6, abs=1e-12)
        assert d.forward_std(t, t - 1) == pytest.approx(math.sqrt(betas[t]), rel=1e-9)
        noisy = d.step(xt, x0, t, t - 1, eta=1.0, noise=torch.ones_like(xt))
        np.testing.assert_allclose(noisy.numpy(), mean + math.sqrt(variance), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", SCHEDULES)
def test_step_with_eta_0_keeps_the_noise_that_was_predicted(kind):
    """Song et al. 2021, eq. 12 with sigma = 0: from q_sample(x0, t, eps) to
    q_sample(x0, u, eps)."""
    d, (x0, eps) = make(kind=kind), (v.double() for v in images_and_noise())
    for t, u in ((99, 98), (99, 0), (50, 7), (1, 0), (5, -1), (0, -1)):
        at, au = d.abar[t], d.abar[u]
        x = d.step(at.sqrt() * x0 + (1 - at).sqrt() * eps, x0, t, u)
        torch.testing.assert_close(x, au.sqrt() * x0 + (1 - au).sqrt() * eps, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", SCHEDULES)
@pytest.mark.parametrize("T", (10, 1000))
def test_posterior_std_is_zero_at_clean_data_and_finite_everywhere(kind, T):
    d = make(T=T, kind=kind)
    assert all(d.posterior_std(t, -1) == 0 for t in range(T))
    for u in range(T - 1):
        assert 0 < d.posterior_std(T - 1, u) <= d.forward_std(T - 1, u) < 1
        assert 0 < d.posterior_std(u + 1, u) <= d.forward_std(u + 1, u) < 1


@pytest.mark.parametrize("eta", (0.0, 0.5, 1.0))
def test_step_to_clean_data_is_the_predicted_x0(eta):
    d, (x0, xt) = make(), images_and_noise()
    for t in (0, 1, 99):
        torch.testing.assert_close(
            d.step(xt, x0, t, -1, eta, torch.randn_like(xt)), x0, rtol=1e-6, atol=1e-6
        )


# ---- pixels and noise


def test_all_256_pixel_values_survive_the_round_trip():
    pixels = torch.arange(256, dtype=torch.uint8)
    x = ddpm.to_network(pixels)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(ddpm.to_pixels(x), pixels)
    assert torch.equal(ddpm.to_pixels(x + 0.4 / 127.5), pixels), (
        "values are rounded to the nearest, not cut off"
    )


def test_values_out_of_range_are_clipped_not_wrapped():
    assert ddpm.to_pixels(torch.tensor([-3.0, -1.01, 1.01, 7.0])).tolist() == [0, 0, 255, 255]


def test_the_noise_of_an_image_depends_on_neither_its_batch_nor_its_neighbours():
    def two_calls(indices, seed=3):
        noise = ddpm.ImageNoise(seed, indices, (3, 4, 4), "cpu")
        return torch.stack([noise(), noise()])

    together = two_calls(range(5))
    assert together.shape == (2, 5, 3, 4, 4)
    assert torch.equal(two_calls([2, 4]), together[:, [2, 4]])
    different = torch.cat(
        [together.flatten(0, 1), two_calls(range(5), seed=4).flatten(0, 1)]
    ).flatten(1)
    assert len(different.unique(dim=0)) == 20, (
        "seeds, images and calls each have noise of their own"
    )
    assert abs(two_calls(range(200)).std().item() - 1) < 0.02


def test_huber_is_half_the_square_near_zero():
    """PyTorch's huber_loss, which the recipe of fashion_mnist_annotated names, with delta 1."""
    d, (x0, eps) = make(loss="huber"), images_and_noise()
    t = torch.tensor([9, 9, 9, 9])
    expected = F.huber_loss(torch.zeros_like(eps), eps, reduction="none").flatten(1).mean(1)
    torch.testing.assert_close(d.loss(lambda x, t, y: torch.zeros_like(x), x0, t, eps), expected)
