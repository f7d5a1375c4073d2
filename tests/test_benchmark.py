"""tests/tools/benchmark.py: its measures against closed forms, its table on tiny models."""

import argparse
import dataclasses
import math
from pathlib import Path

import benchmark
import draw
import numpy as np
import pytest
import shrink
import torch
from conftest import ROOT, randomise, words
from PIL import Image

import ddpm


def noise(shape, std=1.0, seed=0):
    return std * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ---- detail


def test_a_constant_image_has_no_detail():
    bands = benchmark.haar(torch.full((2, 3, 8, 8), 100.0))
    assert torch.equal(bands[0], torch.full((2, 3, 4, 4), 200.0))
    assert not bands[1:].any()


@pytest.mark.parametrize("band", [1, 2, 3])
def test_each_band_has_its_own_pattern(band):
    y, x = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    stripes = {1: x % 2, 2: y % 2, 3: (x + y) % 2}[band]  # between neighbours left, above, both
    energy = benchmark.detail(10 * stripes[None, None].float())
    expected = torch.zeros(3, dtype=torch.float64)
    expected[band - 1] = 10.0**2
    torch.testing.assert_close(energy, expected)


def test_the_bands_of_noise_have_its_variance_and_keep_all_energy():
    x = noise((50, 3, 32, 32), std=5.0)
    bands = benchmark.haar(x)
    torch.testing.assert_close(bands.square().sum(), x.square().sum())
    expected = torch.full((3,), 25.0, dtype=torch.float64)
    torch.testing.assert_close(benchmark.detail(x), expected, rtol=0.02, atol=0)


def test_an_odd_last_row_is_left_out():
    assert benchmark.haar(torch.zeros(1, 1, 9, 7)).shape == (4, 1, 1, 4, 3)


# ---- grain


@pytest.fixture(scope="module")
def animals(tmp_path_factory):
    """The starter images, (100, 3, 64, 64) uint8."""
    config = ddpm.preset("animals", download_dir=str(tmp_path_factory.mktemp("data")))
    return ddpm.load_images(config).pixels


@pytest.mark.parametrize("std", [4.0, 8.0])
def test_grain_reads_noise_that_is_added_to_real_images(animals, std):
    assert benchmark.grain(animals) == 0.0
    noisy = animals + noise(animals.shape, std)
    assert benchmark.grain(noisy) == pytest.approx(std, rel=0.15)
    stored = noisy.round().clamp(0, 255).to(torch.uint8)
    assert benchmark.grain(stored) == pytest.approx(std, rel=0.15)


@pytest.mark.parametrize("shape", [(40, 1, 28, 28), (20, 3, 64, 64)])
def test_grain_of_noise_alone_is_its_standard_deviation(shape):
    """Choosing the flattest blocks must not choose those with the least noise."""
    assert benchmark.grain(128 + noise(shape, 6.0)) == pytest.approx(6.0, rel=0.03)


def test_detail_is_no_grain_and_grain_raises_detail(animals):
    flat = torch.full((4, 1, 64, 64), 128.0)
    detailed = flat.clone()
    detailed[..., :32, :32] += 60 * noise((4, 1, 32, 32)).sign()
    assert benchmark.detail(detailed).min() > 100
    assert benchmark.grain(detailed) == 0.0
    noisy = animals + noise(animals.shape, 8.0)
    gain = benchmark.detail(noisy) / benchmark.detail(animals)
    assert gain[2] > 1.2  # what energy alone would take for detail


# ---- Frechet distance


def test_frechet_of_known_gaussians():
    mean = torch.tensor([1.0, 2.0, 3.0]).double()
    a = (torch.zeros(3).double(), torch.diag(torch.tensor([1.0, 4.0, 9.0]).double()))
    b = (mean, torch.diag(torch.tensor([4.0, 4.0, 1.0]).double()))
    # |difference of means|^2 + sum of (difference of standard deviations)^2
    assert benchmark.frechet(a, b) == pytest.approx(14 + 1 + 0 + 4)
    assert benchmark.frechet(a, a) == pytest.approx(0, abs=1e-9)


def test_frechet_of_gaussians_that_do_not_commute():
    """Against the symmetric form of the root: sqrt(sqrt(A) B sqrt(A))."""
    root_a, root_b = (m @ m.T for m in noise((2, 4, 4)).double())
    a, b = root_a @ root_a, root_b @ root_b
    root = torch.linalg.eigvalsh(root_a @ b @ root_a).sqrt().sum()
    expected = (a.trace() + b.trace() - 2 * root).item()
    zero = torch.zeros(4).double()
    assert benchmark.frechet((zero, a), (zero, b)) == pytest.approx(expected)


def test_parts_have_one_size_and_their_distances_a_mean():
    features = noise((50, 3))
    target = benchmark.moments(noise((1000, 3), seed=1))
    parts = [benchmark.frechet(benchmark.moments(features[i : i + 20]), target) for i in (0, 20)]
    found = benchmark.frechet_of_parts(features, target, 20)  # the last ten are left out
    assert found == pytest.approx(sum(parts) / 2)


# ---- errors


def test_levels_are_those_of_the_cosine_schedule_and_the_nearest_timestep_is_found():
    found = [benchmark.nearest_timestep(benchmark.LEVELS, level) for level in benchmark.LEVELS]
    assert found == list(range(1000))
    half = ddpm.Diffusion(ddpm.make_betas("cosine", 500)).abar[:-1]
    assert abs(benchmark.nearest_timestep(half, benchmark.LEVELS[500]) - 250) <= 1
    linear = ddpm.Diffusion(ddpm.make_betas("linear", 1000)).abar[:-1]
    t = benchmark.nearest_timestep(linear, benchmark.LEVELS[500])
    assert linear[t].item() == pytest.approx(benchmark.LEVELS[500].item(), rel=0.01)


def test_errors_are_those_of_what_the_model_returns():
    x0 = noise((120, 1, 16, 16), 0.3).clamp(-1, 1)  # more than one batch
    y = torch.arange(120)
    seen = []

    def denoise(xt, t, labels):
        seen.extend(labels.tolist())
        return torch.full_like(xt, 0.5)

    errors = benchmark.error_by_timestep(denoise, benchmark.LEVELS, x0, y, (0, 62, 750))
    assert seen == 3 * y.tolist()
    for t, (model, given) in errors.items():
        assert model == pytest.approx((x0 - 0.5).square().mean().item(), rel=1e-5)
        abar = benchmark.LEVELS[t].item()
        assert given == pytest.approx((1 - abar) / abar, rel=0.02)  # the noise over sqrt(abar)
    again = benchmark.error_by_timestep(denoise, benchmark.LEVELS, x0, y, (62,))
    assert again[62] == errors[62]


# ---- data and classifier


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """60 images of 16x16 pixels in two classes: level and upright stripes in grey."""
    root = tmp_path_factory.mktemp("stripes")
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    for name, place in dict(level=y, upright=x).items():
        (root / name).mkdir()
        for i in range(30):
            low, high = sorted(rng.choice(256, 2, replace=False))
            pixels = np.where((place + i) % 8 < 4, low, high).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


def config_of(folder, tmp_path, **more):
    return ddpm.preset("animals", data_path=str(folder), image_size=16,
                       download_dir=str(tmp_path), **more)


def test_held_out_images_are_those_of_the_checkpoints_holdout(folder, tmp_path):
    config = config_of(folder, tmp_path, holdout=0.2, seed=3)
    real = benchmark.load_real(config)
    images = ddpm.load_images(config)
    assert torch.equal(real.held_out.pixels, images.pixels[images.validation])
    assert len(real.train.pixels) == 48 and "--holdout 0.2 --seed 3" in real.origin
    assert benchmark.load_real(config_of(folder, tmp_path)).held_out is None


def test_validation_images_have_the_numbers_of_the_training_classes(folder, tmp_path):
    validation = tmp_path / "validation" / "upright"
    validation.mkdir(parents=True)
    for i in (0, 1):
        (validation / f"{i}.png").write_bytes((folder / "upright" / f"{i}.png").read_bytes())
    config = config_of(folder, tmp_path, holdout=0.2)
    real = benchmark.load_real(config, str(tmp_path / "validation"))
    assert real.held_out.labels.tolist() == [1, 1]
    assert len(real.train.pixels) == 60  # nothing has to be held out of them
    assert benchmark.num_copies(real.held_out.pixels, real.train.pixels) == 2
    (tmp_path / "validation" / "slanted").mkdir()
    Image.new("L", (16, 16)).save(tmp_path / "validation" / "slanted" / "0.png")
    with pytest.raises(ddpm.UserError, match="slanted"):
        benchmark.load_real(config, str(tmp_path / "validation"))


def test_validation_images_in_folders_that_are_no_classes_have_no_label(folder, tmp_path):
    """As those of patients, where training has no such folders."""
    patient = tmp_path / "validation" / "patient 7"
    patient.mkdir(parents=True)
    (patient / "0.png").write_bytes((folder / "upright" / "0.png").read_bytes())
    config = config_of(folder, tmp_path)
    real = benchmark.load_real(config, str(patient.parent))
    assert real.held_out.labels.tolist() == [-1]
    Image.fromarray(np.full((16, 16), 4000, dtype=np.uint16)).save(patient / "scan.png")
    with pytest.raises(ddpm.UserError, match="4095 is white, in those of training 255"):
        benchmark.load_real(config, str(patient.parent))


def test_a_test_split_is_decoded_as_training_images_are(monkeypatch, tmp_path):
    image = Image.fromarray(np.arange(28 * 28, dtype=np.uint8).reshape(28, 28))
    images = ddpm.decode(image, 28, 1)

    class FashionMNIST:
        def __init__(self, root, train, download):
            assert not train
            self.targets = [7, 3]

        def __iter__(self):
            return iter([(image, 7), (image, 3)])

    monkeypatch.setattr(benchmark.torchvision.datasets, "FashionMNIST", FashionMNIST)
    config = ddpm.preset("fashion_mnist", download_dir=str(tmp_path))
    pixels, labels = benchmark.load_test_split(config, 1)
    assert torch.equal(pixels, torch.from_numpy(np.stack([images, images])))
    assert labels.tolist() == [7, 3]


def test_the_classifier_learns_is_kept_and_is_that_of_its_data(folder, tmp_path):
    real = benchmark.load_real(config_of(folder, tmp_path, holdout=0.2))
    model = benchmark.load_classifier(real, tmp_path, 1280)
    features, probabilities = benchmark.classify(model, real.held_out.pixels)
    assert features.shape == (12, 64)
    assert (probabilities.argmax(1) == real.held_out.labels).float().mean() > 0.8
    [kept] = tmp_path.glob("classifier_*.pt")
    stamp = kept.stat().st_mtime_ns
    again = benchmark.load_classifier(real, tmp_path, 1280)
    assert torch.equal(benchmark.classify(again, real.held_out.pixels)[1], probabilities)
    assert kept.stat().st_mtime_ns == stamp
    other = benchmark.load_real(config_of(folder, tmp_path, holdout=0.2, seed=1))
    benchmark.load_classifier(other, tmp_path, 64)
    assert len(list(tmp_path.glob("classifier_*.pt"))) == 2


@pytest.mark.parametrize("channels, size", [(1, 16), (1, 28), (3, 32), (3, 64), (3, 100)])
def test_the_classifier_takes_images_of_any_size(channels, size):
    model = benchmark.Classifier(channels, size, 7).eval()
    pixels = torch.zeros(2, channels, size, size, dtype=torch.uint8)
    with torch.no_grad():
        features, probabilities = benchmark.classify(model, pixels)
    assert features.shape == (2, 64) and probabilities.shape == (2, 7)


def test_augmented_images_are_shifted_or_mirrored():
    torch.manual_seed(0)
    x = noise((64, 1, 16, 16))
    found = benchmark.augment(x)
    middle = x[..., 2:-2, 2:-2]
    for image, core in zip(found, middle):
        candidates = [
            side[:, 2 + down : 14 + down, 2 + right : 14 + right]
            for side in (image, image.flip(2))
            for down in (-1, 0, 1)
            for right in (-1, 0, 1)
        ]
        assert any(torch.equal(candidate, core) for candidate in candidates)
    assert not torch.equal(found, x)


def test_classes_are_as_frequent_as_in_the_training_images():
    labels = torch.tensor([0] * 6 + [1] * 2)
    pixels = torch.zeros(8, 1, 16, 16, dtype=torch.uint8)
    train = benchmark.Labelled(pixels, labels)
    real = benchmark.RealImages("", 16, ["a", "b"], train, None, "", "")
    reference = benchmark.Reference(real, None, 40)
    assert torch.bincount(reference.labels()).tolist() == [30, 10]
    assert benchmark.Reference(real, None).num_samples == 500


# ---- the commands


@pytest.fixture(scope="module")
def model(folder, tmp_path_factory):
    """A tiny model of the stripes with random weights, which kept a fifth of them for validation.
    """
    place = tmp_path_factory.mktemp("model")
    config = config_of(folder, place, holdout=0.2, channels=8, channel_mults=(1, 2), timesteps=50,
                       sampling_steps=2)
    network = randomise(ddpm.build_model(config, 1, ["level", "upright"]))
    torch.save(dict(format=ddpm.FORMAT, config=dataclasses.asdict(config), channels=1,
                    classes=network.class_names, data=ddpm.load_images(config).fingerprint,
                    weights=network.state_dict()), place / "model.pt")
    return place / "model.pt"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags) -> (exit code, what was printed, what was printed as errors), in tmp_path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "GRID", (468, 531))

    def call(*flags):
        code = benchmark.main(words(*flags))
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


def cells(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def table(text):
    """[{column: cell}] of the table in what was printed."""
    head, _, *rows = [line for line in text.splitlines() if line.startswith("|")]
    return [dict(zip(cells(head), cells(row))) for row in rows]


def test_quality_prints_a_row_of_real_images_and_one_a_model(run, model):
    code, text, _ = run("quality --num_samples 12 --classifier_images 640 --grids grids --model",
                        model, model)
    assert code == 0 and "12 images of --holdout 0.2 --seed 0" in text
    real, *rows = table(text)
    assert real[""] == "real, held-out" and real["mean"] == "" and real["Frechet"]
    assert len(rows) == 2 and rows[0][""] == str(model)
    timed = [row.pop("samples/s") for row in rows]
    assert all(float(rate) > 0 for rate in timed)
    assert rows[0] == rows[1]  # the noise, the samples and the classifier are fixed
    assert all(rows[0].values())
    error, given = rows[0]["RMS 0"].split(" / ")
    assert float(error) == pytest.approx(127.5 * math.sqrt(float(rows[0]["t = 0"])), rel=0.02)
    assert 0 < float(given) < float(error)
    assert Image.open("grids/model.png").size[0] > 16


def test_the_heading_says_that_training_images_are_measured(run, model, folder, tmp_path):
    code, text, _ = run("quality --num_samples 4 --classifier_images 64 --model", model,
                        "--data", folder, "--validation", folder)
    assert code == 0 and "60 OF THESE ARE TRAINING IMAGES" in text
    checkpoint = torch.load(model, weights_only=True)
    checkpoint["config"]["holdout"] = 0.0
    torch.save(checkpoint, tmp_path / "all.pt")
    code, text, _ = run("quality --num_samples 4 --classifier_images 64 --model all.pt", model)
    assert code == 0 and "ERRORS ON 60 TRAINING IMAGES" in text
    assert text.count("###") == 2  # the models kept different images for validation
    checkpoint["data"] = "others"
    torch.save(checkpoint, tmp_path / "all.pt")
    _, text, _ = run("quality --num_samples 4 --classifier_images 64 --model all.pt")
    assert "all.pt (trained on OTHER images)" in text


def test_a_model_of_other_images_is_refused_in_a_sentence(run, model):
    flags = "quality --num_samples 4 --classifier_images 64 --data"
    code, _, err = run(flags, ROOT / "animal_data", "--model", model)
    assert code == 1 and "error: " in err and "has classes that" not in err
    assert "makes images of 1 channels and 16 pixels" in err and "Traceback" not in err
    code, _, err = run("rivals --programs nobody")
    assert code == 1 and "There is no program 'nobody'" in err


def test_images_without_classes_leave_cells_empty(run, model, folder, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in (folder / "level").iterdir():
        (flat / file.name).write_bytes(file.read_bytes())
    checkpoint = torch.load(model, weights_only=True)
    checkpoint["classes"] = []
    network = ddpm.build_model(ddpm.Config(**checkpoint["config"]), 1, [])
    checkpoint["weights"] = network.state_dict()
    torch.save(checkpoint, tmp_path / "plain.pt")
    code, text, _ = run("quality --num_samples 4 --model plain.pt --data", flat)
    [_, row] = table(text)
    assert code == 0 and "no classifier" in text
    assert row["Frechet"] == row["recognised"] == "" and row["grain"] and row["mean"]


def test_another_program_is_measured_at_the_same_noise_levels(folder, tmp_path, monkeypatch):
    """diffusers' network trains for a moment; its row has all but the classes."""
    pytest.importorskip("diffusers")
    args = benchmark.make_parser().parse_args(
        words("rivals --num_samples 4 --classifier_images 64 --minutes 0.001 --data", folder,
              "--download_dir", tmp_path, "--classifiers", tmp_path))
    config = ddpm.override(benchmark.rival_config(args, 4, tmp_path), image_size=16)
    reference = benchmark.make_reference(config, args)
    x0, y = reference.measured()
    monkeypatch.setattr(benchmark, "GRID", (468,))
    monkeypatch.setattr(reference, "measured", lambda: (x0[:4], y[:4]))
    images = ddpm.load_images(config)
    subject, parameters, seen = benchmark.train_rival(
        "diffusers", config, images, reference.real, 1e-3)
    numbers, pixels = benchmark.measure(subject, reference)
    assert parameters > 1000 and seen >= 4 and pixels.shape == (4, 1, 16, 16)
    for t in benchmark.FINE:  # the noise levels differ by less than a step of the schedule
        abar = benchmark.LEVELS[t].item()
        own = subject.abar[benchmark.nearest_timestep(subject.abar, benchmark.LEVELS[t])].item()
        assert numbers["errors"][t][1] == pytest.approx((1 - own) / own, rel=0.2)
        assert own == pytest.approx(abar, abs=1e-3)
    row = dict(zip(["", *benchmark.COLUMNS], cells(benchmark.table_row("it", numbers))))
    assert row["recognised"] == "" and row["Frechet"] and row["confident"]


def test_a_program_that_is_not_installed_is_a_sentence(monkeypatch, capsys):
    benchmark.print_missing("diffusers", ImportError("no", name="ema_pytorch"))
    assert capsys.readouterr().err == "diffusers is left out: pip install ema-pytorch\n"


def test_our_training_step_is_that_of_train(monkeypatch):
    monkeypatch.setattr(ddpm, "keep_memory", lambda: None)
    config = ddpm.preset("cifar10", channels=8, channel_mults=(1, 2), image_size=16,
                         attention_at=(8,), batch_size=2)
    network, step, _ = benchmark.ours(3, config)
    before = [p.clone() for p in network.parameters()]
    step(noise((2, 3, 16, 16)), 0.0)
    assert any(not torch.equal(a, b) for a, b in zip(before, network.parameters()))


# ---- prompts


def test_every_second_prompt_says_an_unseen_combination_and_no_other_does():
    pairs = [set(draw.combination(words).items()) for words in draw.UNSEEN]
    prompts = benchmark.make_prompts(200, 1)
    assert len({p.text for p in prompts}) > 180
    for i, prompt in enumerate(prompts):
        assert prompt.asked.items() <= prompt.shown.items()
        assert bool(prompt.pair) == bool(i % 2)
        has_pair = any(pair <= set(prompt.asked.items()) for pair in pairs)
        assert has_pair == bool(prompt.pair), prompt.text
    counts = [sum(p.pair == draw.combination(words) for p in prompts) for words in draw.UNSEEN]
    assert counts == [10] * 10
    assert prompts[:50] == benchmark.make_prompts(50, 1)
    assert prompts[:50] != benchmark.make_prompts(50, 2)


def test_a_row_counts_what_prompts_ask_for_and_nothing_else():
    white_tiger = dict(animal="tiger", coat="white")
    asked = [white_tiger | dict(accessory="none"),
             white_tiger | dict(accessory="hat", colour="red", background="snow")]
    found = [white_tiger | dict(eyes="blue", pose="sitting", accessory="none", colour="green",
                                background="sea"),
             dict(animal="tiger", coat="black", eyes="blue", pose="sitting", accessory="hat",
                  colour="blue", background="snow")]
    prompts = [benchmark.Prompt("", words, words, white_tiger) for words in asked]
    row = benchmark.prompts_row("both", benchmark.attribute_labels(found), prompts)
    assert cells(row) == ["both", "100.0%", "50.0%", "", "", "100.0%", "0.0%", "100.0%",
                          "75.0%", "50.0%", "50.0%"]


def striped(shown, seed, index):
    """An image whose attributes are easily read: the brightness of seven bars across it."""
    image = np.zeros((28, 28, 3), np.uint8)
    for i, (name, values) in enumerate(draw.ATTRIBUTES.items()):
        if name in shown:
            image[4 * i : 4 * i + 4] = 50 * (1 + values.index(shown[name]))
    return Image.fromarray(image)


def test_images_of_the_prompts_score_as_drawings_do_and_shuffled_ones_by_chance(
    run, monkeypatch, real_plots
):
    """A model that does what is asked at guidance 1, and shows one image at guidance 2."""
    monkeypatch.setattr(draw, "draw_captioned_image", striped)

    def sample(loaded, prompts, guidance, args):
        shown = [(p if guidance == 1 else prompts[0]).shown for p in prompts]
        return benchmark.drawings(shown, 0).pixels

    monkeypatch.setattr(benchmark, "load_captioned", lambda path: None)
    monkeypatch.setattr(benchmark, "sample_prompts", sample)
    code, text, err = run("prompts --model m.pt --samples 120 --drawings 400 --sheet s/sheet.png",
                          "--classifier_images 5000 --guidance 2 1")
    assert code == 0, err
    rows = table(text)
    names = ["drawings", "guidance 2", "guidance 1", "the last, shuffled"]
    assert [row.pop("") for row in rows] == [
        f"{name}, {kind}" for name in names for kind in ("seen", "unseen")]
    assert rows[4:6] == rows[0:2]
    for row in rows[0:2]:
        assert float(row["all"].strip("%")) > 90
    for row in [*rows[2:4], *rows[6:]]:
        assert 15 < float(row["all"].strip("%")) < 45
        assert float(row["prompt"].strip("%")) < 10
    assert rows[0]["pair"] == "" and float(rows[1]["pair"].strip("%")) > 80
    assert float(rows[7]["pair"].strip("%")) < 30
    assert Image.open("s/sheet.png").width > 1000


@pytest.fixture
def text_model(tmp_path):
    """The path of an untrained model of the words of prompts."""
    prompts = benchmark.make_prompts(200, 0)
    vocabulary = sorted({word for p in prompts for word in ddpm.split_words(p.text)})
    config = ddpm.Config(channels=8, channel_mults=(1, 2), timesteps=50, sampling_steps=2)
    network = randomise(ddpm.build_model(config, 3, [], vocabulary))
    torch.save(dict(format=ddpm.FORMAT, config=dataclasses.asdict(config), channels=3, classes=[],
                    vocabulary=vocabulary, examples=[p.text for p in prompts[:8]],
                    weights=network.state_dict()), tmp_path / "text.pt")
    return tmp_path / "text.pt"


def test_a_model_of_captions_is_measured_and_one_of_classes_refused(run, model, text_model):
    flags = "prompts --samples 4 --drawings 8 --classifier_images 64 --guidance 2 --model"
    code, text, err = run(flags, text_model, "--sampling_steps 2")
    assert code == 0, err
    assert len(table(text)) == 6
    code, _, err = run(flags, model)
    assert code == 1
    assert "was trained without captions" in err


def test_a_prompt_that_occurs_twice_has_an_image_each_time(text_model, monkeypatch):
    """Else all images behind it would be scored against another prompt than theirs."""
    asked = [*benchmark.make_prompts(1, 0), *benchmark.make_prompts(4, 0)]
    args = argparse.Namespace(seed=1, sampling_steps=2, sampler=None, spacing=None)
    loaded = benchmark.load_captioned(text_model)
    seen = []
    monkeypatch.setattr(ddpm, "sample_images", lambda *given: seen.append(given[3]))
    benchmark.sample_prompts(loaded, asked, 2.0, args)
    assert seen == [ddpm.encode([p.text for p in asked], loaded[0].vocabulary)]
    assert len(seen[0]) == 5


def test_a_model_of_captions_is_refused_where_classes_are_measured(run, text_model, folder):
    flags = "quality --num_samples 4 --classifier_images 64 --data"
    code, _, err = run(flags, folder, "--model", text_model)
    assert code == 1
    assert "use the command prompts" in err


def test_samplers_prints_a_distance_for_each_and_plots_them(run, model, real_plots):
    flags = "samplers --num_samples 4 --classifier_images 64 --steps 1 2 --plot plot.png --model"
    code, text, _ = run(flags, model)
    rows = table(text[text.index("| sampler") :])  # after that of the real images
    assert code == 0 and [row["sampler"].strip("`") for row in rows] == list(ddpm.SAMPLERS)
    assert all(float(row["1"]) > 0 and float(row["2"]) > 0 for row in rows)
    assert Image.open("plot.png").size[0] > 100


def test_features_are_those_of_the_classifier(run, folder):
    flags = "features --classifier_images 64 --image_size 16 --classifiers . --out f.pt --data"
    assert run(flags, folder)[0] == 0
    assert torch.jit.load("f.pt")(torch.zeros(3, 1, 16, 16)).shape[0] == 3


def test_throughput_times_training_steps_beside_a_bare_product(run):
    flags = "throughput --turns 1 --repeats 1 --batch_size 2 --channels 8 --programs ddpm.py"
    code, text, _ = run(flags)
    (row,) = table(text)
    assert code == 0 and row[""] == "ddpm.py" and float(row["images/s"]) > 0


def test_overhead_times_a_real_run_on_made_up_images(run, monkeypatch):
    for owner, name in ((ddpm.Images, "batch"), (ddpm, "update_ema"), (ddpm.torch, "save"),
                        (ddpm.MetricsLogger, "log_training"), (ddpm.tqdm, "update"),
                        (ddpm, "sample_images"), (ddpm, "write_previews"),
                        (ddpm, "folder_source")):
        monkeypatch.setattr(owner, name, getattr(owner, name))  # it replaces them: put them back
    tiny = dict(image_size=16, channels=8, channel_mults=(1,), attention="none", num_samples=1)
    monkeypatch.setitem(ddpm.PRESETS, "animals", tiny)
    code, text, _ = run("overhead --images 20 --steps 2")
    assert code == 0 and "20 found" in text
    shares = {row[""]: float(row["fraction"].rstrip("%")) for row in table(text)}
    assert len(shares) == 8 and all(0 <= share <= 100 for share in shares.values())
    assert sum(shares.values()) > 0


@pytest.mark.parametrize(
    "flags, said",
    [
        ("quality --guidance nan", "--guidance nan"),
        ("quality --guidance -1", "--guidance -1"),
        ("quality --seed -1", "--seed -1"),
        ("quality --sampling_steps 51", "--sampling_steps 51"),
        ("throughput --device cuda", "--device cuda"),
        ("features --image_size 5 --data stripes", "--image_size 5"),
    ],
)
def test_a_value_out_of_range_is_a_sentence(run, model, monkeypatch, flags, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    more = ["--num_samples 4 --classifier_images 64 --model", model] * flags.startswith("quality")
    code, _, err = run(flags, *more)
    assert code == 1 and err.strip().splitlines()[-1].startswith(f"error: {said}")


@pytest.mark.parametrize("flag", ["quality --num_samples", "throughput --turns", "prompts --samples"])
@pytest.mark.parametrize("value", ["0", "-3", "x"])
def test_a_count_is_at_least_one(run, capsys, flag, value):
    with pytest.raises(SystemExit):
        run(flag, value)
    assert f"{flag.split()[1]}: invalid count value: '{value}'" in capsys.readouterr().err


def test_every_command_has_help(capsys):
    for name in ("quality", "rivals", "samplers", "features", "throughput", "sampling", "overhead",
                 "prompts"):
        with pytest.raises(SystemExit):
            benchmark.main([name, "--help"])
        assert "usage" in capsys.readouterr().out


def test_a_shrunk_model_samples_what_the_whole_one_samples(trained, tmp_path):
    small = shrink.shrink(trained, tmp_path / "small.pt")
    assert Path(small).stat().st_size < 0.6 * Path(trained).stat().st_size
    grids = []
    for path in (trained, small):
        model, diffusion, config = ddpm.load_model(path)
        config = ddpm.override(config, num_samples=2, sampling_steps=2)
        grids.append(ddpm.sample_images(model, diffusion, config, [-1, -1], "fp32").int())
    assert (grids[0] - grids[1]).abs().max() <= 2, "grey levels"


def test_a_shrunk_model_knows_its_white_and_no_place_of_this_machine(trained, tmp_path):
    whole = ddpm.read_checkpoint(trained)
    assert Path(whole["config"]["data_path"]).is_absolute()
    whole["white"] = 4095
    whole["config"]["resume"] = str(trained)
    torch.save(whole, tmp_path / "whole.pt")
    small = ddpm.read_checkpoint(shrink.shrink(tmp_path / "whole.pt", tmp_path / "small.pt"))
    assert small["white"] == 4095
    assert str(tmp_path.parent) not in str(small["config"])
    whole["config"]["data_path"] = "/data"
    torch.save(whole, tmp_path / "whole.pt")
    small = ddpm.read_checkpoint(shrink.shrink(tmp_path / "whole.pt", tmp_path / "small.pt"))
    assert small["config"]["data_path"] == "data"


@pytest.mark.parametrize("path", sorted((ROOT / "saved_models").glob("*.pt")), ids=lambda path: path.name)
def test_an_included_model_has_no_absolute_path(path):
    texts = [v for v in ddpm.read_checkpoint(path)["config"].values() if isinstance(v, str)]
    assert texts and not any(Path(text).is_absolute() for text in texts)
