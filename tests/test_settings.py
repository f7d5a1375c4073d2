"""Each setting reaches what it names: what the parts do is tested elsewhere, and here that a Config
hands its values on to them. A setting that were ignored would pass every other test."""

import sys
import types
from pathlib import Path

import benchmark
import numpy as np
import pytest
import torch
from conftest import TINY, checkpoint, metrics, places, tree, words
from PIL import Image

import convert
import ddpm
import evaluate


def train(folder, data, *flags):
    given = words("--mode train", TINY, "--steps 2", *flags)
    return ddpm.main([*given, *map(str, places(folder, data))])


@pytest.fixture(scope="module")
def model_path(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("settings")
    assert train(folder, image_folder, "--steps 12 --ema_decay 0.5 --lr 1e-2") == 0
    return folder / "model.pt"


def sample(model_path, folder, *flags):
    """The pixels that a command line samples."""
    given = words("--mode sample --num_samples 2 --sampling_steps 4 --device cpu", *flags)
    assert ddpm.main([*given, "--model_path", str(model_path), "--samples_dir", str(folder)]) == 0
    return np.asarray(Image.open(folder / "generated_sample.png"))


# ---- the diffusion process


@pytest.mark.parametrize(
    "given, by_hand",
    [
        (dict(loss="l1"), dict(loss="l1")),
        (dict(loss="huber"), dict(loss="huber")),
        (dict(min_snr=5.0), dict(min_snr=5.0)),
        (dict(detail_weight=3.0), dict(detail_weight=3.0)),
        (dict(predict="v"), dict(predict="v")),
    ],
)
def test_the_loss_is_that_of_the_settings(given, by_hand):
    plain = dict(loss="l2", min_snr=0.0, detail_weight=0.0, predict="x0")
    generator = torch.Generator().manual_seed(0)
    x0, eps, out = torch.randn(3, 4, 3, 8, 8, generator=generator)
    t = torch.tensor([0, 30, 60, 99])

    def loss(diffusion):
        return diffusion.loss(lambda *_: out, x0, t, eps)

    config = ddpm.Config(timesteps=100, **plain | given)
    betas = ddpm.make_betas("cosine", 100)
    found = loss(ddpm.make_diffusion(config))
    assert torch.equal(found, loss(ddpm.Diffusion(betas, **plain | by_hand)))
    assert not torch.allclose(found, loss(ddpm.Diffusion(betas, **plain)))


def test_the_betas_are_those_of_the_settings():
    config = ddpm.Config(timesteps=50, schedule="linear", beta_start=0.01, beta_end=0.3)
    expected = torch.cumprod(1 - torch.linspace(0.01, 0.3, 50, dtype=torch.float64), 0)
    assert torch.allclose(ddpm.make_diffusion(config).abar[:-1], expected)


# ---- the network


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_dropout_is_in_every_residual_block(dropout):
    model = ddpm.build_model(ddpm.Config(dropout=dropout), 3, []).train()
    found = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    assert set(found) == {dropout} and len(found) == 14
    block = model.middle2
    torch.nn.init.ones_(block.conv2.weight)
    x, emb = torch.randn(1, 160, 4, 4), torch.zeros(1, 128)
    assert torch.equal(block(x, emb), block(x, emb)) == (dropout == 0)


@pytest.mark.parametrize("kind", ["full", "linear", "none"])
def test_attention_is_of_the_kind_and_at_the_heights_given(kind):
    heights = dict(attention_at=(32, 4)) if kind != "none" else {}
    model = ddpm.build_model(ddpm.Config(attention=kind, **heights), 3, [])
    found = {n: m.kind for n, m in model.named_modules() if isinstance(m, ddpm.Attention)}
    middle = found.pop("middle.attention", None)
    assert middle == (None if kind == "none" else "full")
    assert set(found.values()) == (set() if kind == "none" else {kind})
    expected = {"down.0", "down.6", "up.0", "up.1", "up.9", "up.10"}
    assert {name.removesuffix(".attention") for name in found} == (expected if found else set())


def test_channels_are_those_of_the_simple_network_too():
    model = ddpm.build_model(ddpm.Config(arch="simple", channels=12), 3, [])
    assert model.conv_in.out_channels == 12 and model.conv_out.in_channels == 12


@pytest.mark.parametrize("pretrained", [True, False])
def test_pretrained_asks_for_the_weights_of_imagenet(monkeypatch, pretrained):
    asked = []
    make = ddpm.torchvision.models.resnet18

    def resnet18(weights):
        asked.append(weights)
        return make()

    monkeypatch.setattr(ddpm.torchvision.models, "resnet18", resnet18)
    config = ddpm.Config(arch="resnet18", image_size=32, pretrained=pretrained)
    ddpm.build_model(config, 3, [])
    weights = ddpm.torchvision.models.ResNet18_Weights.IMAGENET1K_V1
    assert asked == [weights if pretrained else None]


# ---- the optimiser


@pytest.mark.parametrize("optimizer", ["adam", "adamw", "muon"])
def test_the_optimiser_and_its_weight_decay(optimizer):
    """With a gradient of zero only the decay moves weights: AdamW and Muon shrink all alike, by lr
    times weight_decay; for Adam it is a gradient, of which only the sign matters at first."""
    config = ddpm.Config(optimizer=optimizer, lr=0.01, weight_decay=0.5)
    model = torch.nn.Sequential(torch.nn.Conv2d(2, 3, 3), torch.nn.Linear(3, 4))
    before = [p.detach().clone() for p in model.parameters()]
    made = ddpm.make_optimizer(config, model, torch.device("cpu"))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    made.step()
    for old, new in zip(before, model.parameters()):
        expected = old - 0.01 * old.sign() if optimizer == "adam" else old * (1 - 0.01 * 0.5)
        assert torch.allclose(new, expected, rtol=1e-4, atol=1e-6)


# ---- training


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_training_previews_and_sampling_are_in_the_precision_given(
    precision, image_folder, tmp_path, monkeypatch
):
    """In which the network computes, in each of the three."""
    dtypes = []
    forward = ddpm.UNet.forward

    def noting_forward(self, x, t, y=None):
        out = forward(self, x, t, y)
        dtypes.append((torch.is_grad_enabled(), out.dtype))
        return out

    monkeypatch.setattr(ddpm.UNet, "forward", noting_forward)
    given = f"--precision {precision} --holdout 0.2"
    assert train(tmp_path, image_folder, given) == 0
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    assert set(dtypes) == {(True, dtype), (False, dtype)}
    dtypes.clear()
    sample(tmp_path / "model.pt", tmp_path / "out", "--precision", precision)
    assert set(dtypes) == {(False, dtype)}


def test_previews_show_the_ema_weights(image_folder, tmp_path, monkeypatch):
    shown = []
    make = ddpm.Previewer.make

    def noting_make(self, model):
        shown.append({name: value.clone() for name, value in model.state_dict().items()})
        return make(self, model)

    monkeypatch.setattr(ddpm.Previewer, "make", noting_make)
    assert train(tmp_path, image_folder, "--ema_decay 0.9") == 0
    saved = checkpoint(tmp_path / "model.pt")
    assert all(torch.equal(shown[-1][name], value) for name, value in saved["ema"].items())
    assert any(not torch.equal(shown[-1][name], value) for name, value in saved["weights"].items())


@pytest.fixture
def seen(monkeypatch):
    """What training computes the loss of: (x0, t, eps, y) of each step."""
    calls = []
    loss = ddpm.Diffusion.loss

    def noting_loss(self, model, x0, t, eps, y=None):
        if torch.is_grad_enabled():
            calls.append((x0.clone(), t.clone(), eps.clone(), y.clone()))
        return loss(self, model, x0, t, eps, y)

    monkeypatch.setattr(ddpm.Diffusion, "loss", noting_loss)
    return calls


def test_the_seed_decides_the_order_the_timesteps_and_the_noise(image_folder, tmp_path, seen):
    for name, seed in dict(a=0, b=0, c=1).items():
        assert train(tmp_path / name, image_folder, f"--no_hflip --seed {seed}") == 0
    a, b, c = seen[:2], seen[2:4], seen[4:]
    for i in range(3):
        assert torch.equal(a[1][i], b[1][i]) and not torch.equal(a[1][i], c[1][i])


def test_previews_are_of_the_same_noise_each_time_and_of_another_with_another_seed(image_folder):
    def noise(seed, draws_before):
        config = ddpm.Config(
            data_path=str(image_folder), image_size=16, channel_mults=(1, 2), seed=seed
        )
        images = ddpm.load_images(config)
        runtime = ddpm.Runtime(torch.device("cpu"), "fp32", 0, 1)
        torch.rand(draws_before)
        previewer = ddpm.Previewer(config, images, ddpm.make_diffusion(config), runtime)
        return previewer.examples[2]

    assert torch.equal(noise(0, 1), noise(0, 5)) and not torch.equal(noise(0, 1), noise(1, 1))


def test_the_quarters_of_the_loss_begin_with_the_least_noise():
    meter = ddpm.LossMeter(100, ddpm.Runtime(torch.device("cpu"), "fp32", 0, 1))
    meter.add(torch.tensor([1.0, 2.0, 3.0, 4.0, 6.0]), torch.tensor([0, 25, 74, 75, 99]))
    assert meter.read()["loss_quarters"] == [1.0, 2.0, 3.0, 5.0]


def test_a_resumed_run_counts_the_time_before(image_folder, tmp_path):
    assert train(tmp_path, image_folder) == 0
    path = next((tmp_path / "model.pt_steps").glob("*.pt"))
    saved = checkpoint(path)
    saved["seconds"] = 5000.0
    torch.save(saved, path)
    more = words("--mode train --steps 3 --device cpu --resume", path)
    assert ddpm.main([*more, *map(str, places(tmp_path, image_folder))]) == 0
    assert 5000 <= metrics(tmp_path / "samples")[1][-1]["seconds"] < 6000


def test_previews_and_what_is_before_the_first_step_do_not_count_as_training(
    image_folder, tmp_path, monkeypatch
):
    """On a clock that only previews, loading and steps move: of four images a step, one a second."""
    now = [0.0]
    clock = types.SimpleNamespace(monotonic=lambda: now[0], time=lambda: 0.0)

    def slow(seconds, function):
        def slowly(*args):
            now[0] += seconds
            return function(*args)

        return slowly

    monkeypatch.setattr(ddpm, "time", clock)
    monkeypatch.setattr(ddpm, "train_step", slow(4, ddpm.train_step))
    monkeypatch.setattr(ddpm.Previewer, "make", slow(1000, ddpm.Previewer.make))
    monkeypatch.setattr(ddpm, "print_banner", slow(500, ddpm.print_banner))
    given = "--steps 6 --batch_size 4 --log_every 2 --sample_every 2"
    assert train(tmp_path, image_folder, given) == 0
    rows = metrics(tmp_path / "samples")[1]
    assert [row["images_per_s"] for row in rows if "images_per_s" in row] == [1.0, 1.0, 1.0]
    assert rows[0]["seconds"] == 8  # after two steps: loading and the banner do not count


def test_a_run_is_logged_every_so_many_steps(image_folder, tmp_path):
    assert train(tmp_path, image_folder, "--steps 7 --log_every 3 --save_every 100") == 0
    assert [row["step"] for row in metrics(tmp_path / "samples")[1]] == [3, 6, 7]


def test_the_banner_names_how_often_and_how_many(image_folder, tmp_path, capsys):
    given = "--dry_run --save_every 31 --sample_every 32 --keep_last 33"
    assert train(tmp_path, image_folder, given) == 0
    assert "a checkpoint every 31 steps, the last 33 kept" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flags, said",
    [
        ("--schedule linear --beta_end 0.01", "warning: abar_T is above 0.01"),
        ("--schedule linear --beta_end 0.5", ""),
    ],
)
def test_too_little_noise_is_warned_of(image_folder, tmp_path, capsys, flags, said):
    assert train(tmp_path, image_folder, "--dry_run", flags) == 0
    assert ("abar_T is above" in (out := capsys.readouterr().out)) == bool(said) and said in out


def test_few_images_are_said_to_be_memorised_and_many_classes_are_not_listed(tmp_path, capsys):
    for i in range(15):
        folder = tmp_path / "few" / f"class{i:02d}"
        folder.mkdir(parents=True)
        for j in range(2):
            Image.new("RGB", (16, 16), (i, j * 90, 200)).save(folder / f"{j}.png")
    assert train(tmp_path, tmp_path / "few", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "note: 30 images will be memorised" in out
    assert "class11 2" in out and "class12" not in out and "3 more" in out


def test_a_run_is_resumed_into_the_places_given(image_folder, tmp_path):
    """And leaves those that it came from as they are."""
    assert train(tmp_path / "old", image_folder) == 0
    before = tree(tmp_path / "old")
    [path] = (tmp_path / "old" / "model.pt_steps").iterdir()
    more = words("--mode train --steps 3 --device cpu --resume", path)
    assert ddpm.main([*more, *map(str, places(tmp_path / "new", image_folder))]) == 0
    assert checkpoint(tmp_path / "new" / "model.pt")["step"] == 3
    assert metrics(tmp_path / "new" / "samples")[1] and tree(tmp_path / "old") == before


# ---- captions


@pytest.fixture
def captioned(tmp_path):
    """Twenty images with captions of two words, the first of which numbers them."""
    folder = tmp_path / "captioned"
    folder.mkdir()
    for i in range(20):
        Image.new("RGB", (16, 16), (12 * i, 0, 90)).save(folder / f"{i:02d}.png")
        (folder / f"{i:02d}.txt").write_text(f"number{i:02d} image")
    return folder


def test_all_words_of_a_caption_are_hidden_or_none(captioned, tmp_path, seen):
    given = "--steps 4 --batch_size 8 --attention full --channel_mults 1 2 --label_dropout 0.5"
    assert train(tmp_path / "run", captioned, given) == 0
    y = torch.cat([y for _, _, _, y in seen])
    hidden = (y == -1).all(1)
    assert 5 < hidden.sum() < 27 and (y[~hidden] >= 0).all()


def test_examples_are_from_the_first_to_the_last_caption(captioned, tmp_path):
    config = ddpm.Config(data_path=str(captioned), image_size=16, download_dir=str(tmp_path))
    examples = ddpm.load_images(config).examples
    assert len(examples) == 8
    assert examples[0] == "number00 image" and examples[-1] == "number19 image"


def test_prompts_of_the_command_line_and_of_a_file_are_both_sampled(tmp_path):
    (tmp_path / "file.txt").write_text("a b\n\nb\n")
    config = ddpm.Config(prompt=("a",), prompts=str(tmp_path / "file.txt"))
    assert ddpm.read_prompts(config, ["a", "b"]) == ["a", "a b", "b"]


def test_the_captioned_drawings_that_are_missing_come_with_their_command():
    with pytest.raises(ddpm.UserError, match="draw.py --captions --count 5000 .*animals_text_data"):
        ddpm.folder_source(Path("animals_text_data"))


def test_images_of_phones_are_registered(monkeypatch):
    calls = []
    fake = types.SimpleNamespace(register_heif_opener=lambda: calls.append(1))
    monkeypatch.setitem(sys.modules, "pillow_heif", fake)
    ddpm.image_suffixes.__wrapped__()
    assert calls == [1]


# ---- data sets with a name


class FakeSet(torch.utils.data.Dataset):
    """As torchvision's: two images a part, whose red is the number of the part and the image."""

    classes = ["T-shirt/top", "bag"]
    _labels = targets = [1, 0]

    def __init__(self, root, download, split="train"):
        self.part = ["train", "val", "test"].index(split)

    def __len__(self):
        return 2

    def __getitem__(self, i):
        return Image.new("RGB", (16, 16), (10 * self.part + i, 0, 0)), None


@pytest.mark.parametrize(
    "name, reds, labels, class_names",
    [
        ("fashion_mnist", [0, 1], [1, 0], ["T-shirt-top", "bag"]),
        ("flowers102", [0, 1, 10, 11, 20, 21], [1, 0] * 3, [f"flower_{i}" for i in range(1, 103)]),
        ("celeba", [0, 1], [-1, -1], []),
    ],
)
def test_known_data_sets_keep_their_images_labels_and_names(
    monkeypatch, name, reds, labels, class_names
):
    monkeypatch.setattr(ddpm.torchvision.datasets, ddpm.DATASETS[name], FakeSet)
    source = ddpm.torchvision_source(name, "data")
    assert [source.open(i).getpixel((0, 0))[0] for i in range(len(source.names))] == reds
    assert list(source.labels) == labels and source.class_names == class_names


# ---- devices


def test_auto_is_cuda_then_mps_then_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for has_mps, expected in ((True, "mps"), (False, "cpu")):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda has=has_mps: has)
        assert ddpm.choose_device("auto").type == expected


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_is_bf16_where_the_cpu_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bf16)
    assert ddpm.choose_precision("auto", torch.device("cpu")) == ("bf16" if has_bf16 else "fp32")
    assert ddpm.choose_precision("auto", torch.device("mps")) == "fp32"


# ---- sampling


def test_eta_reaches_ddim(model_path, tmp_path, monkeypatch):
    etas = []
    step = ddpm.Diffusion.step

    def noting_step(self, xt, x0, t, u, eta=0.0, noise=None):
        etas.append((eta, noise is not None))
        return step(self, xt, x0, t, u, eta, noise)

    monkeypatch.setattr(ddpm.Diffusion, "step", noting_step)
    sample(model_path, tmp_path, "--sampler ddim --eta 0.7")
    assert etas == [(0.7, True)] * 3 + [(0.7, False)]


@pytest.mark.parametrize(
    "flags, unused",
    [
        ("--sampler ddpm --eta 0.5", "--eta has no effect with --sampler ddpm"),
        ("--sampler dpm++ --eta 0.5", "--eta has no effect with --sampler dpm++"),
        ("--sampler dpm++sde --eta 0.5", "--eta has no effect with --sampler dpm++sde"),
        ("--sampler ddim --eta 0.5", ""),
        ("--guidance 0 --classes disc", "--classes has no effect with --guidance 0"),
    ],
)
def test_sampling_flags_without_effect_are_named(model_path, tmp_path, capsys, flags, unused):
    sample(model_path, tmp_path, flags)
    out = capsys.readouterr().out
    assert ("has no effect" in out) == bool(unused) and unused in out


@pytest.mark.parametrize("arch", ["simple", "resnet18"])
@pytest.mark.parametrize(
    "name", ["channel_mults", "patch", "res_blocks", "attention", "attention_at", "dropout"]
)
def test_settings_of_the_unet_without_effect_are_named(capsys, arch, name):
    given = dict(arch=arch) | {name: dict(attention="none", dropout=0.5).get(name, (4,))}
    ddpm.warn_of_unused(types.SimpleNamespace(**vars(ddpm.Config()) | given), given)
    assert f"--{name} has no effect with --arch {arch}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "given",
    [
        dict(guidance=0.0, prompt=("a",)),
        dict(guidance=0.0, prompts="file"),
        dict(arch="resnet18", channels=64),
    ],
)
def test_other_settings_without_effect_are_named(capsys, given):
    ddpm.warn_of_unused(types.SimpleNamespace(**vars(ddpm.Config()) | given), given)
    assert f"--{list(given)[1]} has no effect with --{list(given)[0]}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "name", ["arch", "channels", "channel_mults", "patch", "res_blocks", "attention"]
)
def test_the_remedy_for_weights_that_do_not_fit_names_each_setting_of_the_network(name):
    other = dict(arch="simple", channels=64, channel_mults=(1, 2), patch=4, res_blocks=3)
    other |= dict(attention="none")
    stored = ddpm.override(ddpm.Config(), **{name: other[name]})
    (advice,) = ddpm.differences(stored, ddpm.Config(), ddpm.NETWORK)
    assert advice.startswith(f"--{name} ")


@pytest.mark.parametrize("mask, strength", [(False, 0.5), (True, 1.0)])
def test_the_strength_of_an_edit_by_default(model_path, image_folder, mask, strength):
    image = str(next(image_folder.rglob("*.png")))
    model, _, config = ddpm.load_model(model_path)
    given = dict(init_image=image) | (dict(mask=image) if mask else {})
    edited, _, _ = ddpm.load_edit(ddpm.override(config, **given), model)
    assert edited.strength == strength


def test_images_that_are_interpolated_are_of_one_class(model_path):
    model, _, config = ddpm.load_model(model_path)
    labels, names = ddpm.sample_conditions(ddpm.override(config, num_samples=4), model)
    assert labels == [0, 1, 2, 0]
    between = ddpm.override(config, num_samples=4, interpolate=7)
    assert ddpm.sample_conditions(between, model)[0] == [0, 0, 0, 0]


def test_an_animation_has_more_frames_than_the_plot_and_rests_at_its_end(model_path, tmp_path):
    sample(model_path, tmp_path, "--gif --sampling_steps 30")
    with Image.open(tmp_path / "denoising.gif") as gif:
        assert gif.n_frames == 30
        milliseconds = []
        for i in range(gif.n_frames):
            gif.seek(i)
            milliseconds.append(gif.info["duration"])
    assert milliseconds == [80] * 29 + [2000]


def test_a_long_list_of_files_is_cut(capsys):
    ddpm.print_files([f"folder/{i}" for i in range(45)])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 42 and lines[-1].strip() == "and 5 more in folder"


def test_more_prompts_than_fit_beside_a_grid_are_left_out(tmp_path):
    model = types.SimpleNamespace(vocabulary=["a"])
    widths = []
    for n in (50, 51):
        pixels = torch.zeros(n, 3, 64, 64, dtype=torch.uint8)
        path = ddpm.save_samples(pixels, [f"prompt {i}" for i in range(n)], model, tmp_path / "s.png")
        widths.append(Image.open(path).width)
    assert widths == [200 + 66, 8 * 66 + 2]  # one column beside the prompts; eight without


def test_models_of_before_took_65535_as_white(tmp_path):
    """Those of images of more than 8 bits; the white of a later one is in its file."""
    saved = checkpoint(Path(__file__).with_name("checkpoint_format_1.pt"))
    saved.pop("white", None)
    torch.save(saved, tmp_path / "old.pt")
    assert ddpm.read_checkpoint(tmp_path / "old.pt")["white"] == 65535
    torch.save(saved | dict(white=1023), tmp_path / "new.pt")
    assert ddpm.read_checkpoint(tmp_path / "new.pt")["white"] == 1023


def test_no_ema_of_a_model_that_has_the_ema_weights_alone(model_path, tmp_path, capsys):
    saved = checkpoint(model_path)
    shrunk = {key: value for key, value in saved.items() if key != "ema"}
    torch.save(shrunk | dict(weights=saved["ema"]), tmp_path / "shrunk.pt")
    expected = sample(model_path, tmp_path / "ema")
    assert (sample(tmp_path / "shrunk.pt", tmp_path / "out", "--no_ema") == expected).all()
    assert "has the EMA weights alone" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "generated_sample.png").text["ddpm:weights"] == "EMA"
    convert.to_diffusers(tmp_path / "shrunk.pt", tmp_path / "theirs", ema=False)
    assert "EMA weights\n" in capsys.readouterr().out
    setup = evaluate.load(dict(model_path=str(tmp_path / "shrunk.pt"), ema=False), None)
    measured = types.SimpleNamespace(strata=range(3), num_samples=4)
    assert "EMA weights" in evaluate.describe(setup, measured)["model"]


@pytest.mark.parametrize(
    "name",
    ["init_from", "data_path", "download_dir", "classes", "prompts", "individual", "mask", "samples_dir"],
)
def test_an_empty_path_is_not_passed_over(model_path, image_folder, tmp_path, capsys, name):
    """As of an unset variable of a shell."""
    if name in ("init_from", "data_path", "download_dir"):
        given = words("--mode train", TINY, "--samples_dir", tmp_path)
        assert ddpm.main([*given, f"--{name}="]) == 1
    else:
        given = words("--mode sample --device cpu --init_image x.png --model_path", model_path)
        assert ddpm.main([*given, f"--{name}="]) == 1
    said = f"error: --{name} is empty: give a file, a folder or a name, or leave it out."
    assert said in capsys.readouterr().err


def test_an_empty_setting_of_an_earlier_version_is_the_default(model_path, tmp_path):
    """Which took --classes= for all of them."""
    saved = checkpoint(model_path)
    saved["config"]["classes"] = ""
    torch.save(saved, tmp_path / "old.pt")
    assert ddpm.load_model(tmp_path / "old.pt")[2].classes is None


# ---- the programs beside it


class CountingMeter:
    """Stands for evaluate.FidAndKid: how many features of real images and of samples it got."""

    def __init__(self):
        self.counts = {"fid": [0, 0], "kid": [0, 0]}
        for name in self.counts:
            setattr(self, name, types.SimpleNamespace(update=self.updater(name)))

    def updater(self, name):
        def update(features, real):
            self.counts[name][real] += len(features)

        return update


def test_fid_is_of_all_images_and_kid_of_as_many_as_it_can_keep(monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_KID", 100)
    meter = CountingMeter()
    pixels = torch.zeros(230, 1, 2, 2)
    for real in (True, False):
        evaluate.add_features(
            lambda p: p.flatten(1), lambda rows: pixels[rows], np.arange(230), real, [meter], 0
        )
    assert meter.counts == {"fid": [230, 230], "kid": [100, 100]}


def test_no_more_samples_are_compared_than_it_says(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate, "MAX_COMPARED", 18)
    config = ddpm.Config(data_path=str(image_folder), image_size=16, download_dir=str(tmp_path))
    images = ddpm.load_images(config)
    numbers, _ = evaluate.copying(images.pixels[:20], images, config, "cpu")
    assert numbers["samples"] == numbers["real"] == 18


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_bound_is_measured_in_the_precision_given(precision):
    enabled = []

    def model(x, t, y):
        enabled.append(torch.is_autocast_enabled("cpu"))
        return x

    diffusion = ddpm.Diffusion(ddpm.make_betas("linear", 10), "x0")
    x0 = torch.zeros(2, 1, 4, 4)
    strata = evaluate.make_strata(10, 2)
    evaluate.measure_batch(model, diffusion, x0, None, np.arange(2), strata, 0, precision)
    assert set(enabled) == {precision == "bf16"}


def setup_for_evaluation(model_path, image_folder, tmp_path, seed=0):
    """What evaluate.py measures with, as far as `measure_rows`, `describe` and `caveats` need it."""
    model, diffusion, config = ddpm.load_model(model_path)
    config = ddpm.override(
        config, data_path=str(image_folder), download_dir=str(tmp_path), seed=seed
    )
    images = ddpm.load_images(config)
    runtime = ddpm.Runtime(torch.device("cpu"), "fp32", 0, 1)
    num_values = images.pixels[0].numel()
    return types.SimpleNamespace(
        model=model, diffusion=diffusion, config=config, images=images, runtime=runtime,
        num_values=num_values, missing=None, trained_on=images.fingerprint, path=model_path,
        features=None)


def test_the_bound_is_measured_with_the_noise_of_the_seed(model_path, image_folder, tmp_path):
    bits = []
    for seed in (0, 0, 1):
        setup = setup_for_evaluation(model_path, image_folder, tmp_path, seed)
        strata = evaluate.make_strata(setup.diffusion.T, 3)
        bits.append(evaluate.measure_rows(setup, np.arange(4), strata)["bits"])
    assert bits[0] == bits[1] != bits[2]


def test_an_evaluation_says_which_timesteps_and_images_it_is_of(model_path, image_folder, tmp_path):
    setup = setup_for_evaluation(model_path, image_folder, tmp_path)
    T = setup.diffusion.T
    for n, said in ((5, "t = 0 and 5 ranges of timesteps"), (T - 1, "every timestep")):
        measured = types.SimpleNamespace(strata=evaluate.make_strata(T, n), num_samples=2, sets={})
        assert said in evaluate.describe(setup, measured)["bound"]
    unknown = "the model does not say which images it was trained on"
    for trained_on, said in ((setup.trained_on, ""), (None, unknown), ("others", "other images")):
        setup.trained_on = trained_on
        text = " ".join(evaluate.caveats(setup, measured))
        assert said in text and (unknown in text) == (said == unknown)


def test_an_evaluation_without_classes_speaks_of_none(model_path, image_folder, tmp_path):
    setup = setup_for_evaluation(model_path, image_folder, tmp_path)
    measured = types.SimpleNamespace(strata=range(3), num_samples=4)
    for names, said in ((setup.model.class_names, "classes all"), ([], "without classes")):
        setup.model.class_names = names
        texts = evaluate.describe(setup, measured)
        assert said in texts["samples"] and ("labels given" in texts["bound"]) == bool(names)


def test_evaluation_takes_all_that_sampling_depends_on():
    given = {name for names in evaluate.FLAGS.values() for name in names}
    for_one_sampling = {"individual", "gif", "init_image", "strength", "mask", "interpolate"}
    assert given == ddpm.changeable("sample") - for_one_sampling | {"data_path", "download_dir"}


@pytest.mark.parametrize("flags, kind", [("", "ema"), ("--no_ema", "weights")])
def test_diffusers_gets_the_weights_asked_for(model_path, tmp_path, flags, kind):
    folder = tmp_path / "theirs"
    given = words("--to_diffusers", folder, "--model_path", model_path, flags)
    assert convert.main(given) == 0
    theirs = convert.import_safetensors().load_file(
        folder / "unet" / "diffusion_pytorch_model.safetensors")
    ours = checkpoint(model_path)
    other = "weights" if kind == "ema" else "ema"
    assert torch.equal(theirs["conv_in.weight"], ours[kind]["conv_in.weight"])
    assert not torch.equal(theirs["conv_in.weight"], ours[other]["conv_in.weight"])


def test_the_benchmark_samples_as_it_is_told(model_path, monkeypatch):
    configs = []
    monkeypatch.setattr(
        ddpm, "sample_images", lambda model, diffusion, config, *_: configs.append(config))
    args = types.SimpleNamespace(
        sampler="ddim", sampling_steps=7, spacing=None, guidance=3.0, seed=9)
    real = types.SimpleNamespace(
        train=types.SimpleNamespace(pixels=torch.zeros(1, 3, 16, 16)), image_size=16,
        name="shapes", class_names=["disc", "square", "stripes"])
    benchmark.ddpm_subject(model_path, real, args).sample(torch.tensor([0]))
    (config,) = configs
    assert (config.sampler, config.sampling_steps, config.guidance, config.seed) == ("ddim", 7, 3.0, 9)
    assert config.spacing == ddpm.load_model(model_path)[2].spacing
