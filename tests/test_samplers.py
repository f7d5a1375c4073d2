"""The samplers, against closed forms for Gaussian data, diffusers' schedulers and its published
values."""

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from conftest import randomise

import ddpm

pytestmark = pytest.mark.quick

LINEAR = np.linspace(1e-4, 0.02, 1000)
STEPS = (1, 2, 3, 7, 10, 50, 100)


def walk(name, diffusion, denoise, x, ts, noise=None, **more):
    """All of (t, x, x0) that a sampler yields."""
    return list(
        ddpm.SAMPLERS[name](
            diffusion, denoise, x, ts, noise or (lambda: torch.randn_like(x)), **more
        )
    )


# ---- closed form: data N(MEAN, STD^2), whose best denoiser is known

MEAN, STD = 0.3, 0.5


def ideal(diffusion):
    """E[x0 | xt] for Gaussian data: the mean of a product of two Gaussians."""
    abar = diffusion.abar.tolist()

    def denoise(x, t):
        a, variance = math.sqrt(abar[t]), abar[t] * STD**2 + 1 - abar[t]
        return MEAN + STD**2 * a / variance * (x - a * MEAN)

    return denoise


def exact(diffusion, x, t, u):
    """Where the probability-flow equation takes x from level t to u: the marginals' quantiles are
    kept."""

    def marginal(v):
        abar = diffusion.abar[v].item()
        return math.sqrt(abar) * MEAN, math.sqrt(abar * STD**2 + 1 - abar)

    (mt, st), (mu, su) = marginal(t), marginal(u)
    return mu + su * (x - mt) / st


def orders(name, diffusion, lists):
    """log2 of how much the largest error falls from each list of timesteps to the next, twice as
    fine."""
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    errors = []
    for ts in lists:
        last = walk(name, diffusion, ideal(diffusion), x, ts)[-1][1]
        errors.append((last - exact(diffusion, x, ts[0], ts[-1])).abs().max().item())
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]


def test_the_error_of_ddim_halves_as_steps_double():
    d = ddpm.Diffusion(ddpm.make_betas("linear", 4000))
    found = orders("ddim", d, [ddpm.spaced_timesteps(4000, n) for n in (40, 80, 160, 320)])
    assert all(0.85 < order < 1.2 for order in found), found


def even_in_log_snr(points):
    """A Diffusion whose half log-SNR falls evenly from 3 to -3: even timesteps are even in it."""
    abar = torch.sigmoid(2 * torch.linspace(3, -3, points, dtype=torch.float64))
    return ddpm.Diffusion(1 - abar / torch.cat([torch.ones(1), abar[:-1]]))


@pytest.mark.parametrize("name, least, most", [("ddim", 0.85, 1.2), ("dpm++", 1.7, 2.6)])
def test_order_of_convergence_on_even_steps_in_log_snr(name, least, most):
    """DPM-Solver++(2M) is of second order (Lu et al. 2022, theorem 4.1), DDIM of first."""
    d = even_in_log_snr(1281)
    found = orders(name, d, [list(range(1280, -1, -stride)) for stride in (64, 32, 16, 8)])
    assert all(least < order < most for order in found), found


@pytest.mark.parametrize(
    "name, steps, eta",
    [
        ("ddpm", 1000, 1.0),
        ("ddpm", 250, 1.0),
        ("ddim", 250, 1.0),
        ("ddim", 250, 0.5),
        ("ddim", 250, 0.0),
        ("dpm++", 50, 0.0),
        ("dpm++sde", 100, 0.0),
    ],
)
def test_samples_have_the_mean_and_standard_deviation_of_the_data(name, steps, eta):
    d = ddpm.Diffusion(ddpm.make_betas("linear", 1000))
    x = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    noise = lambda: torch.randn(x.shape, generator=generator, dtype=torch.float64)  # noqa: E731
    last = walk(name, d, ideal(d), x, ddpm.spaced_timesteps(1000, steps), noise, eta=eta)[-1][1]
    assert last.mean().item() == pytest.approx(MEAN, abs=0.015)
    assert last.std().item() == pytest.approx(STD, rel=0.025)


@pytest.mark.parametrize("steps, large", [(1000, True), (250, False)])
def test_ddpm_adds_the_fixed_large_noise_on_all_steps_and_the_fixed_small_on_fewer(steps, large):
    """Ho et al. 2020, section 3.2. The noise that was added is what differs from a run with
    none."""
    d, x = ddpm.Diffusion(ddpm.make_betas("linear", 1000)), torch.zeros(1, dtype=torch.float64)
    ts = ddpm.spaced_timesteps(1000, steps)

    def first(z):
        return next(
            ddpm.SAMPLERS["ddpm"](d, lambda x, t: x * 0, x, ts, lambda: torch.full_like(x, z))
        )[1]

    stds = {True: d.forward_std(ts[0], ts[1]), False: d.posterior_std(ts[0], ts[1])}
    assert (first(1.0) - first(0.0)).item() == pytest.approx(stds[large], rel=1e-9)
    assert stds[True] != stds[False]


# ---- diffusers: the values that its own tests publish, for its dummy model x * t / (t + 1)


def dummy_model(x, t, y):
    return x * (t / (t + 1)).view(-1, 1, 1, 1)


def dummy_sample():
    return (torch.arange(4 * 3 * 8 * 8).reshape(3, 8, 8, 4) / (4 * 3 * 8 * 8)).permute(3, 0, 1, 2)


def dummy_diffusion(predict):
    return ddpm.Diffusion(torch.tensor(LINEAR), predict)


@pytest.mark.parametrize(
    "predict, total, mean", [("eps", 258.9606, 0.3372), ("v", 202.0296, 0.2631)]
)
def test_all_steps_with_the_small_variance_give_the_published_ddpm_values(predict, total, mean):
    """diffusers, test_scheduler_ddpm.py, test_full_loop_no_noise and ..._with_v_prediction."""
    d, x, generator = dummy_diffusion(predict), dummy_sample(), torch.manual_seed(0)
    denoise = ddpm.make_denoiser(dummy_model, d)
    for t in range(999, -1, -1):
        noise = torch.randn(x.shape, generator=generator) if t else None
        x = d.step(x, denoise(x, t), t, t - 1, 1.0, noise)
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-2)
    assert x.abs().mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    "predict, total, mean", [("eps", 172.0067, 0.223967), ("v", 52.5302, 0.0684)]
)
def test_ten_leading_steps_give_the_published_ddim_values(predict, total, mean):
    """diffusers, test_scheduler_ddim.py, test_full_loop_no_noise and ..._with_v_prediction."""
    d = dummy_diffusion(predict)
    ts = [*range(900, -1, -100), -1]
    x = walk("ddim", d, ddpm.make_denoiser(dummy_model, d), dummy_sample(), ts)[-1][1]
    assert x.abs().sum().item() == pytest.approx(total, abs=1e-2)
    assert x.abs().mean().item() == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize("end, mean", [(0, 0.3301), (-1, 0.2409)])
def test_ten_steps_give_the_published_dpm_solver_values(end, mean):
    """diffusers, test_scheduler_dpm_multi.py, test_full_loop_no_noise; 0.2409 with a list that ends
    at -1."""
    d = dummy_diffusion("eps")
    ts = [*np.linspace(0, 999, 11).round().astype(int)[:0:-1].tolist(), end]
    x = walk("dpm++", d, ddpm.make_denoiser(dummy_model, d, clip=False), dummy_sample(), ts)[-1][1]
    assert x.abs().mean().item() == pytest.approx(mean, abs=1e-3)


# ---- diffusers: whole trajectories with a network, step by step


PREDICTION_TYPE = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}


def compare(name, theirs, diffusion, steps, clip=True, spacing="uniform", ours=(), **more):
    """Our sampler and diffusers' scheduler take the same steps from the same noise, to a relative
    1e-4. Another spacing than the scheduler's own is given to it."""
    network = randomise(ddpm.UNet(3, 8, (1, 2), 1, attention_stages=()), scale=0.15).eval()
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    our_noise, their_noise = torch.Generator().manual_seed(6), torch.Generator().manual_seed(6)
    ts = ddpm.spaced_timesteps(diffusion.T, steps, spacing)
    trajectory = walk(
        name,
        diffusion,
        ddpm.make_denoiser(network, diffusion, clip=clip),
        x,
        ts,
        lambda: torch.randn(x.shape, generator=our_noise),
        **dict(ours),
    )
    if spacing == "uniform":
        theirs.set_timesteps(steps)
    else:
        theirs.set_timesteps(timesteps=ts[:-1])
    for t, (our_t, our_x, _) in zip(theirs.timesteps, trajectory, strict=True):
        with torch.no_grad():
            out = network(x, t.expand(2))
        x = theirs.step(out, t, x, generator=their_noise, **more).prev_sample
        assert t == our_t and ((x - our_x).norm() / x.norm()).item() < 1e-4, f"at t = {t}"


def common(predict, kind="linear", T=100):
    betas = ddpm.make_betas(kind, T)
    config = dict(
        num_train_timesteps=T,
        trained_betas=betas.float().numpy(),
        timestep_spacing="trailing",
        prediction_type=PREDICTION_TYPE[predict],
    )
    return ddpm.Diffusion(betas, predict), config


@pytest.mark.parametrize("predict", PREDICTION_TYPE)
@pytest.mark.parametrize("steps, variance", [(100, "fixed_large"), (20, "fixed_small")])
def test_ddpm_takes_the_steps_of_diffusers_ddpm(predict, steps, variance):
    d, config = common(predict)
    compare("ddpm", diffusers.DDPMScheduler(**config, variance_type=variance), d, steps)


@pytest.mark.parametrize("predict", PREDICTION_TYPE)
@pytest.mark.parametrize("steps", (10, 50, 100))
@pytest.mark.parametrize("eta", (0.0, 0.7))
def test_ddim_takes_the_steps_of_diffusers_ddim(predict, steps, eta):
    d, config = common(predict)
    compare(
        "ddim",
        diffusers.DDIMScheduler(**config),
        d,
        steps,
        ours={"eta": eta},
        eta=eta,
        use_clipped_model_output=True,
    )


@pytest.mark.parametrize("predict", PREDICTION_TYPE)
@pytest.mark.parametrize("steps, spacing", [(5, "uniform"), (20, "uniform"), (20, "arcsine")])
@pytest.mark.parametrize("name, theirs", [("dpm++", "dpmsolver++"), ("dpm++sde", "sde-dpmsolver++")])
def test_dpmpp_takes_the_steps_of_diffusers_dpm_solver(predict, steps, spacing, name, theirs):
    d, config = common(predict)
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **config, solver_order=2, algorithm_type=theirs, final_sigmas_type="zero"
    )
    compare(name, scheduler, d, steps, clip=False, spacing=spacing)


# ---- what every sampler keeps to


@pytest.mark.parametrize("T", (10, 100, 1000))
def test_timesteps_start_at_the_noisiest_and_end_clean(T):
    for n in (1, 2, 3, 7, 10, 50, T):
        if n <= T:
            ts = ddpm.spaced_timesteps(T, n)
            assert len(ts) == n + 1 and ts[0] == T - 1 and ts[-1] == -1
            gaps = -np.diff(ts)
            assert gaps.min() >= 1 and gaps.max() - gaps.min() <= 1, (
                "the spacing is even, to rounding"
            )
    assert ddpm.spaced_timesteps(T, T) == list(range(T - 1, -2, -1))


def test_timesteps_are_trailing():
    """Lin et al. 2023, arXiv:2305.08891, table 2: 999, 799, ... for five steps."""
    assert ddpm.spaced_timesteps(1000, 5) == [999, 799, 599, 399, 199, -1]


@pytest.mark.parametrize("T", (10, 100, 1000))
def test_arcsine_spacing_is_at_the_quantiles_of_the_arcsine_distribution(T):
    """Its distribution function is 2 / pi arcsin(sqrt(x)); an interval of 1 of t holds its quantile
    of i / n, unless the steps there would fall together."""
    for n in (1, 2, 3, 7, 10, 20, 50, T):
        if n > T:
            continue
        ts = ddpm.spaced_timesteps(T, n, "arcsine")
        assert len(ts) == n + 1 and ts[0] == T - 1 and ts[-1] == -1
        assert np.diff(ts).max() <= -1, "each step goes down"
        for i, t in enumerate(reversed(ts)):
            if t in (i - 1, T - 1 - (n - i)):
                continue  # as near to its end as it can be
            low, high = (math.asin(math.sqrt((t + 1 + d) / T)) * 2 / math.pi for d in (-0.51, 0.51))
            assert low <= i / n <= high
    assert ddpm.spaced_timesteps(T, T, "arcsine") == list(range(T - 1, -2, -1))


def test_arcsine_spacing_is_denser_at_both_ends():
    assert ddpm.spaced_timesteps(1000, 6, "arcsine") == [999, 932, 749, 499, 249, 66, -1]


@pytest.mark.parametrize("n", (0, 101))
def test_no_steps_and_more_than_T_are_errors(n):
    with pytest.raises(ddpm.UserError, match="1 to 100"):
        ddpm.spaced_timesteps(100, n)


@pytest.mark.parametrize("kind", ("linear", "cosine", "quadratic", "exponential", "sigmoid"))
@pytest.mark.parametrize("predict", PREDICTION_TYPE)
@pytest.mark.parametrize("name", ddpm.SAMPLERS)
def test_every_sampler_stays_finite_and_in_range(name, predict, kind):
    d = ddpm.Diffusion(ddpm.make_betas(kind, 100), predict)
    denoise = ddpm.make_denoiser(lambda x, t, y: x * 3 + 1, d)
    start = torch.randn(1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    for steps in STEPS:
        trajectory = walk(name, d, denoise, start, ddpm.spaced_timesteps(100, steps))
        assert [t for t, _, _ in trajectory] == ddpm.spaced_timesteps(100, steps)[:-1]
        assert all(x.isfinite().all() and x0.isfinite().all() for _, x, x0 in trajectory)
        assert trajectory[-1][1].abs().max() <= 1 + 1e-5, (
            "the last image is a predicted, clipped one"
        )


@pytest.mark.parametrize("eta", (0.0, 1.0))
@pytest.mark.parametrize("steps", (1, 4, 100))
@pytest.mark.parametrize("name", ddpm.SAMPLERS)
def test_the_last_step_adds_no_noise(name, steps, eta):
    d, x = ddpm.Diffusion(ddpm.make_betas("linear", 100)), torch.zeros(1, dtype=torch.float64)
    calls = []

    def noise():
        calls.append(1)
        return torch.full_like(x, 1e6 if len(calls) == steps else 0.0)

    _, last, x0 = walk(
        name,
        d,
        lambda x, t: torch.full_like(x, 0.25),
        x,
        ddpm.spaced_timesteps(100, steps),
        noise,
        **({"eta": eta} if name == "ddim" else {}),
    )[-1]
    assert last.item() == pytest.approx(0.25, abs=1e-9) and x0.item() == 0.25
    assert len(calls) == (0 if name == "dpm++" or name == "ddim" and eta == 0 else steps - 1)


@pytest.mark.parametrize("predict", PREDICTION_TYPE)
def test_the_clip_is_effective_and_can_be_left_out(predict):
    d, x = ddpm.Diffusion(ddpm.make_betas("linear", 100), predict), torch.full((1, 1, 2, 2), 5.0)
    wild = lambda x, t, y: torch.full_like(x, -40.0)  # noqa: E731
    free, clipped = (ddpm.make_denoiser(wild, d, clip=clip)(x, 50) for clip in (False, True))
    assert free.abs().min() > 1 and torch.equal(clipped, free.clamp(-1, 1))


@pytest.mark.parametrize("name", ddpm.SAMPLERS)
def test_a_sampler_continues_from_the_clipped_image(name):
    """A network that says 9 everywhere takes the path of one that says 1."""
    d, x = ddpm.Diffusion(ddpm.make_betas("linear", 100), "x0"), torch.full((1, 1, 2, 2), 0.5)
    ends = [
        walk(
            name,
            d,
            ddpm.make_denoiser(lambda x, t, y, v=v: torch.full_like(x, v), d),
            x,
            [60, 30, 10],
            lambda: torch.zeros_like(x),
        )[-1][1]
        for v in (1.0, 9.0)
    ]
    assert torch.equal(*ends)


# ---- guidance


def labelled(x, t, y):
    """A stand-in whose output depends on the label it is given: -1 gives -0.1, class k gives
    0.1 k."""
    return x * 0 + (torch.full((len(x),), -1) if y is None else y).view(-1, 1, 1, 1) * 0.1


def test_guidance_is_uncond_plus_g_times_the_difference():
    """Ho & Salimans 2022, eq. 6, with g = w + 1."""
    d, x, y = (
        ddpm.Diffusion(ddpm.make_betas("linear", 100), "x0"),
        torch.zeros(3, 1, 2, 2),
        torch.tensor([0, 1, 2]),
    )
    found = ddpm.make_denoiser(labelled, d, y, guidance=2.5)(x, 50)[:, 0, 0, 0].tolist()
    assert found == pytest.approx([-0.1 + 2.5 * (0.1 * k + 0.1) for k in range(3)], abs=1e-6)


@pytest.mark.parametrize("predict", PREDICTION_TYPE)
def test_guidance_with_a_network_is_the_formula_on_two_separate_calls(predict):
    d, y = ddpm.Diffusion(ddpm.make_betas("linear", 100), predict), torch.tensor([2, 0])
    network = randomise(ddpm.UNet(1, 8, (1, 2), 1, attention_stages=(), num_classes=3)).eval()
    x, t = (
        torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)),
        torch.tensor([40, 40]),
    )
    with torch.no_grad():
        uncond, cond = network(x, t), network(x, t, y)
    expected = d.predict_x0(uncond + 3 * (cond - uncond), x, t)
    found = ddpm.make_denoiser(network, d, y, guidance=3.0, clip=False)(x, 40)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(uncond, cond, atol=1e-2)


def test_guidance_1_is_the_plain_conditional_model_in_one_call():
    d, y, sizes = ddpm.Diffusion(ddpm.make_betas("linear", 100), "x0"), torch.tensor([0, 2]), []

    def network(x, t, y):
        sizes.append(len(x))
        return labelled(x, t, y)

    found = ddpm.make_denoiser(network, d, y)(torch.zeros(2, 1, 2, 2), 50)[:, 0, 0, 0].tolist()
    assert found == pytest.approx([0, 0.2]) and sizes == [2]


@pytest.mark.parametrize("name", ddpm.SAMPLERS)
def test_a_sampler_is_at_most_25_lines(name):
    assert len(inspect.getsource(ddpm.SAMPLERS[name]).splitlines()) <= 25
