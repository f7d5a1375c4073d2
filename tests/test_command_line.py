"""The command line: every flag and choice, sampling and its files, and the program by itself."""

import ast
import dataclasses
import re
import shutil
from pathlib import Path

import numpy as np
import plant
import pytest
import torch
from conftest import ROOT, TINY, places, randomise, slow, tree
from PIL import Image

import ddpm

FIELDS = {f.name: f for f in dataclasses.fields(ddpm.Config)}
CHOICES = {
    "preset": list(ddpm.PRESETS),
    "schedule": ["linear", "cosine", "quadratic", "exponential", "sigmoid"],
    "predict": ["eps", "x0", "v"],
    "loss": ["l2", "l1", "huber"],
    "arch": ["unet", "simple", "resnet18"],
    "attention": ["full", "linear", "none"],
    "optimizer": ["adam", "adamw", "muon"],
    "lr_schedule": ["constant", "cosine"],
    "logger": ["none", "tensorboard"],
    "precision": ["auto", "fp32", "bf16"],
    "device": ["auto", "cpu"],
    "sampler": ["ddpm", "ddim", "dpm++", "dpm++sde"],
    "spacing": ["uniform", "arcsine"],
    "resize": ["crop", "pad", "stretch"],
}


@pytest.fixture
def train(main, image_folder):
    return lambda *flags: main("--mode train", TINY, "--steps 1 --data_path", image_folder, *flags)


@pytest.fixture
def sample(main, trained):
    more = "--num_samples 3 --sampling_steps 2 --precision fp32 --device cpu"
    return lambda *flags: main("--mode sample --model_path", trained, more, *flags)


def said_once(capsys, what=""):
    """The only line on stderr, which has to begin with error: and hold what is given."""
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("error:") and what in err[0], err
    return err[0]


# ---- every flag and choice


def test_the_choices_tested_here_are_those_of_the_program(main, capsys):
    here_or_not = {"precision": {"fp16"}, "device": {"cuda", "mps"}, "logger": {"wandb"}}
    for name, values in CHOICES.items():
        assert main("--mode train", f"--{name}", "wavy") == 2
        offered = re.search(r"choose from ([^)]*)", said_once(capsys))[1]
        assert set(re.findall(r"[\w+]+", offered)) == set(values) | here_or_not.get(name, set())
    assert main("--help") == 0
    offering = re.findall(r"--(\w+) NAME", capsys.readouterr().out)
    assert sorted(offering) == sorted(["classes", *CHOICES])


# Each choice of each flag once, several flags a run. Presets have a test of their own.
ROWS = [
    {name: v[row] for name, v in CHOICES.items() if row < len(v) and name != "preset"}
    for row in range(5)
]


@pytest.mark.parametrize("chosen", ROWS, ids=lambda chosen: " ".join(chosen.values()))
def test_every_choice_trains_and_samples(train, tmp_path, chosen):
    flags = [f"--{name} {value}" for name, value in chosen.items()]
    more = "--image_size 32 --attention_at 16" if chosen.get("arch") == "resnet18" else ""
    assert train(*flags, more) == 0
    assert (tmp_path / "samples" / "dataset_grid.png").exists()
    _, _, config = ddpm.load_model(tmp_path / "saved_models" / "denoise_model.pt")
    assert {name: getattr(config, name) for name in chosen} == chosen
    assert list((tmp_path / "samples").glob("generated_epoch*.png"))


@pytest.mark.parametrize(
    "name, value", [("precision", "fp16"), ("device", "cuda"), ("device", "mps")]
)
def test_what_this_machine_lacks_is_an_error_or_works(train, capsys, name, value):
    there = {
        "fp16": False,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }[value]
    code = train(f"--{name}", value)
    assert code == 0 if there else code == 1 and value in said_once(capsys)


@pytest.mark.parametrize("name", ddpm.PRESETS)
def test_every_preset_is_free_of_contradictions(name, tmp_path):
    """Settings are checked before the data is looked for."""
    config = ddpm.preset(
        name, data_path=str(tmp_path / "nowhere"), model_path=str(tmp_path / "m.pt")
    )
    with pytest.raises(ddpm.UserError, match="No folder"):
        ddpm.train(config)


# Their networks are large, or of the kind of another preset's; what they are made of has other tests.
LONG_PRESETS = ("cifar10", "flowers_attention")


@pytest.mark.parametrize(
    "name", [slow(name) if name in LONG_PRESETS else name for name in ddpm.PRESETS]
)
def test_every_preset_trains_a_step_and_samples_as_it_is(name, main, image_folder, tmp_path):
    """Its own network, size, schedule, prediction and sampler; few steps and images only."""
    few = "--steps 1 --batch_size 4 --num_samples 2 --sampling_steps 2"
    assert main("--mode train --preset", name, few, *places(tmp_path, image_folder)) == 0
    assert main("--mode sample --model_path", tmp_path / "model.pt", "--num_samples 2") == 0
    grid = Image.open(tmp_path / "samples" / "generated_sample.png")
    side = ddpm.preset(name).image_size
    assert grid.size[1] == side * max(1, 64 // side) + 4


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, settings",
    [
        (
            "animals_cnn",
            dict(
                image_size=64,
                timesteps=1000,
                schedule="linear",
                arch="simple",
                predict="x0",
                batch_size=32,
                optimizer="adam",
                loss="l2",
            ),
        ),
        (
            "cifar10_resnet18",
            dict(
                image_size=64,
                timesteps=500,
                schedule="cosine",
                arch="resnet18",
                predict="eps",
                optimizer="adamw",
                lr=1e-4,
                lr_schedule="cosine",
                batch_size=10,
                epochs=20,
                steps=None,
            ),
        ),
        (
            "fashion_mnist_annotated",
            dict(
                image_size=28,
                timesteps=200,
                schedule="linear",
                beta_start=1e-4,
                beta_end=0.02,
                channels=28,
                channel_mults=(1, 2, 4),
                attention="linear",
                predict="eps",
                loss="huber",
                optimizer="adam",
                lr=1e-3,
                batch_size=128,
                epochs=5,
                hflip=True,
            ),
        ),
        (
            "fashion_mnist_small",
            dict(
                image_size=28, timesteps=1000, schedule="linear", predict="eps", loss="l2", epochs=5
            ),
        ),
        (
            "flowers_simple",
            dict(
                max_images=1000,
                image_size=64,
                timesteps=600,
                arch="simple",
                loss="l1",
                predict="eps",
                beta_start=1e-4,
                beta_end=0.02,
                lr=1e-3,
                batch_size=64,
                epochs=25,
                channels=32,
            ),
        ),
        (
            "flowers_attention",
            dict(
                max_images=1000,
                timesteps=300,
                attention="linear",
                loss="l1",
                optimizer="adam",
                arch="unet",
                lr=1e-3,
                batch_size=64,
            ),
        ),
        (
            "cifar10",
            dict(
                image_size=32,
                timesteps=1000,
                schedule="linear",
                channels=128,
                channel_mults=(1, 2, 2, 2),
                attention_at=(16,),
                dropout=0.1,
                lr=2e-4,
                warmup_steps=5000,
                grad_clip=1.0,
                ema_decay=0.9999,
                batch_size=128,
                optimizer="adam",
                predict="eps",
            ),
        ),
    ],
)
def test_presets_have_the_published_settings(name, settings):
    """The table of recipes in the README, and the papers' and tutorials' own code."""
    config = ddpm.preset(name)
    assert {key: getattr(config, key) for key in settings} == settings
    assert config.min_snr == config.detail_weight == 0 and config.optimizer != "muon"
    assert config.spacing == "uniform"


@pytest.mark.quick
def test_a_preset_is_overridden_by_flags_and_a_length_replaces_the_other(monkeypatch):
    config = ddpm.preset("cifar10_resnet18", steps=10, lr=0.5)
    assert (config.steps, config.epochs, config.lr, config.batch_size) == (10, None, 0.5, 10)
    with pytest.raises(ddpm.UserError, match="steps.*minutes"):
        ddpm.preset("animals", steps=10, minutes=1)
    monkeypatch.setattr(ddpm, "run_locks", lambda *_: pytest.fail("not refused"))
    for both in ddpm.Config(minutes=1), ddpm.Config(steps=None):  # minutes beside the default steps
        with pytest.raises(ddpm.UserError, match="one of --steps, --epochs and --minutes"):
            ddpm.train(both)
    with pytest.raises(ddpm.UserError, match="no preset 'zoo'"):
        ddpm.preset("zoo")


@pytest.mark.quick
def test_dashes_and_underscores_are_alike(train, tmp_path):
    assert (
        train("--batch-size 2 --no-hflip --channel-mults 1 2 2 --attention_at=8 --ema-decay=0.5")
        == 0
    )
    _, _, config = ddpm.load_model(tmp_path / "saved_models" / "denoise_model.pt")
    assert (config.batch_size, config.hflip, config.channel_mults, config.ema_decay) == (
        2,
        False,
        (1, 2, 2),
        0.5,
    )


def test_help_lists_every_group_and_setting(main, capsys):
    assert main("--help") == 0
    out = capsys.readouterr().out
    for group in (
        "recipe",
        "data",
        "diffusion",
        "network",
        "training",
        "running",
        "places",
        "sampling",
    ):
        assert re.search(rf"^{group}:", out, re.MULTILINE)
    for name, f in FIELDS.items():
        assert f"--{name}" in out or f"--no_{name}" in out
        if isinstance(f.default, int | float | str) and not isinstance(f.default, bool):
            assert f"(default: {f.default})" in re.sub(r"\s+", " ", out), name


@pytest.mark.parametrize("typo", ["--batchsize", "--learning-rate"])
def test_an_unknown_flag_is_named(main, tmp_path, capsys, typo):
    assert main("--mode train", typo, "3") == 2
    assert typo.replace("-", "_")[2:] in said_once(capsys) and not tree(tmp_path)


def test_no_mode_is_an_error_in_a_line(main, capsys):
    assert main() == 2
    said_once(capsys, "--mode")


# ---- sampling


def grid_of(path):
    return np.asarray(Image.open(path))


@pytest.mark.quick
def test_sampling_writes_the_grid_the_trajectory_and_their_settings(
    sample, trained, tmp_path, capsys
):
    assert sample("--num_samples 6 --seed 11 --sampler ddim --individual each --gif") == 0
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "samples/generated_sample.png",
        "samples/denoising_steps.png",
        "samples/denoising.gif",
        *(f"each/{i:05d}.png" for i in range(6)),
    }
    out = capsys.readouterr().out
    assert all(str(tmp_path / file) in out for file in files) and "EMA" in out
    for file in ("samples/generated_sample.png", "each/00003.png"):
        text = Image.open(tmp_path / file).text
        assert (
            text["ddpm:seed"] == "11"
            and text["ddpm:sampler"] == "ddim"
            and text["ddpm:steps"] == "2"
        )
        assert re.fullmatch("[0-9a-f]{12}", text["ddpm:model"])
        versions = {"ddpm:version": ddpm.__version__, "ddpm:torch": torch.__version__}
        assert versions.items() <= text.items()
        assert text["ddpm:eta"] == "0.0" and text["ddpm:classes"] == "all"
    gif = Image.open(tmp_path / "samples" / "denoising.gif")
    assert gif.n_frames >= 2
    each = Image.open(tmp_path / "each" / "00000.png")
    assert each.size == (16, 16) and each.mode == "RGB"


@pytest.mark.quick
def test_a_grid_shows_every_pixel_where_it_is(tmp_path):
    """Images of 64 pixels and more are not magnified; 2 pixels of white are around each."""
    pixels = torch.randint(256, (2, 3, 64, 96), dtype=torch.uint8)
    grid = grid_of(ddpm.save_grid(pixels, tmp_path / "grid.png", 2))
    assert grid.shape == (2 + 64 + 2, 2 + 96 + 2 + 96 + 2, 3)
    for image, left in zip(pixels, (2, 2 + 96 + 2)):
        assert np.array_equal(grid[2:66, left : left + 96], image.permute(1, 2, 0))


def test_the_command_line_and_not_the_checkpoint_says_where_images_go(main, trained, tmp_path):
    before = set(trained.parent.rglob("*"))
    assert main("--mode sample --num_samples 1 --sampling_steps 1 --model_path", trained) == 0
    assert (tmp_path / "samples" / "generated_sample.png").exists()
    assert set(trained.parent.rglob("*")) == before


def test_denoising_steps_is_a_real_image(main, trained, tmp_path, real_plots):
    assert main("--mode sample --model_path", trained, "--num_samples 2 --sampling_steps 3") == 0
    image = Image.open(tmp_path / "samples" / "denoising_steps.png")
    assert min(image.size) > 50 and image.text["ddpm:steps"] == "3"
    assert "ddpm:eta" not in image.text  # which only ddim heeds


def test_the_grid_of_very_many_images_shows_the_first_ones(main, trained, tmp_path):
    flags = "--sampling_steps 1 --sample_batch_size 500 --num_samples 2550 --precision fp32"
    assert main("--mode sample --device cpu", flags, "--model_path", trained) == 0
    with Image.open(tmp_path / "samples" / "generated_sample.png") as grid:  # 2500 of three classes
        assert grid.size == (48 * 66 + 2, 53 * 66 + 2)


def sample_tiny(trained, tmp_path, **more):
    settings = dict(
        model_path=str(trained),
        samples_dir=str(tmp_path),
        num_samples=5,
        sampling_steps=3,
        device="cpu",
        sampler="ddim",
        seed=0,
        precision="fp32",
    )
    return ddpm.sample(ddpm.preset("animals", **settings | more)).int()


@pytest.mark.parametrize("precision", ("fp32", "auto", "bf16"))
@pytest.mark.parametrize("sampler", ("ddpm", "ddim", "dpm++", "dpm++sde"))
def test_a_seed_gives_the_same_images_whatever_the_batch(
    trained, tmp_path, sampler, precision
):
    more = dict(sampler=sampler, precision=precision, eta=0.5, guidance=1.5)
    one, two, all_at_once = (
        sample_tiny(trained, tmp_path, sample_batch_size=n, **more) for n in (1, 2, 64)
    )
    assert one.shape == (5, 3, 16, 16)
    assert (one - all_at_once).abs().max() <= 1 and (two - all_at_once).abs().max() <= 1
    assert torch.equal(all_at_once, sample_tiny(trained, tmp_path, **more)), (
        "and the same when run again"
    )


def test_a_seed_gives_each_image_whatever_their_count(trained, tmp_path):
    few, many = (sample_tiny(trained, tmp_path, num_samples=n) for n in (3, 9))
    assert (few - many[:3]).abs().max() <= 1


def test_a_model_from_before_spacing_samples_as_it_did(main, trained, tmp_path):
    checkpoint = ddpm.read_checkpoint(trained)
    del checkpoint["config"]["spacing"]
    torch.save(checkpoint, tmp_path / "older.pt")
    flags = "--num_samples 2 --sampling_steps 7 --precision fp32 --device cpu --samples_dir"
    images = {}
    for name, model, more in (
        ("older", tmp_path / "older.pt", ""),
        ("uniform", trained, "--spacing uniform"),
        ("arcsine", trained, ""),
    ):
        assert main("--mode sample --model_path", model, flags, tmp_path / name, more) == 0
        with Image.open(tmp_path / name / "generated_sample.png") as grid:
            images[name] = np.array(grid)
            assert grid.text["ddpm:spacing"] == ("arcsine" if name == "arcsine" else "uniform")
    assert np.array_equal(images["older"], images["uniform"])
    assert not np.array_equal(images["older"], images["arcsine"])


def test_images_and_seeds_differ(trained, tmp_path):
    a, b = (sample_tiny(trained, tmp_path, seed=s, classes="disc") for s in (0, 1))
    assert len(torch.cat([a, b]).flatten(1).unique(dim=0)) == 10


@pytest.mark.quick
def test_the_flag_no_ema_samples_with_the_plain_weights(trained, tmp_path):
    assert not torch.equal(
        sample_tiny(trained, tmp_path), sample_tiny(trained, tmp_path, ema=False)
    )


@pytest.fixture(scope="module")
def decided(trained, tmp_path_factory):
    """A model whose output depends strongly on the label."""
    saved = torch.load(trained, weights_only=True)
    model, _, _ = ddpm.load_model(trained)
    saved["ema"] = {k: v.clone() for k, v in randomise(model, scale=0.3).state_dict().items()}
    path = tmp_path_factory.mktemp("decided") / "model.pt"
    torch.save(saved, path)
    return path


@pytest.mark.quick
def test_classes_are_sampled_in_turn_or_as_chosen(decided, tmp_path):
    """Image 1 of all classes in turn is of class 1, as it is when only that class is sampled."""
    everything = sample_tiny(decided, tmp_path, num_samples=6)
    squares = sample_tiny(decided, tmp_path, num_samples=6, classes="square")
    mixed = sample_tiny(decided, tmp_path, num_samples=6, classes="stripes,square")
    assert [(everything[i] - squares[i]).abs().max() <= 1 for i in range(6)] == [
        i % 3 == 1 for i in range(6)
    ]
    assert [(mixed[i] - squares[i]).abs().max() <= 1 for i in range(6)] == [
        i % 2 == 1 for i in range(6)
    ]


@pytest.mark.quick
def test_guidance_changes_the_images(decided, tmp_path):
    assert (
        sample_tiny(decided, tmp_path) - sample_tiny(decided, tmp_path, guidance=4.0)
    ).abs().max() > 5


def test_an_unknown_class_is_an_error_naming_the_known(sample, tmp_path, capsys):
    assert sample("--classes disc,unicorn") == 1
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        line.startswith("error:")
        and "unicorn" in line
        and "disc, square, stripes" in line
        and not tree(tmp_path)
    )


def test_a_model_trained_in_fp16_samples_where_there_is_none(train, main, tmp_path, capsys):
    """fp16 was for the GPU that it was trained on; asked for by name it is still refused."""
    assert train() == 0
    path = tmp_path / "saved_models" / "denoise_model.pt"
    saved = torch.load(path, weights_only=True)
    torch.save(saved | dict(config=saved["config"] | dict(precision="fp16")), path)
    assert main("--mode sample --num_samples 1 --sampling_steps 2 --device cpu") == 0
    capsys.readouterr()
    assert (
        main("--mode sample --num_samples 1 --sampling_steps 2 --device cpu --precision fp16") == 1
    )
    assert "fp16 needs a CUDA GPU" in said_once(capsys)


@pytest.mark.parametrize("flags", ("--guidance 3", "--classes disc"))
def test_a_model_without_classes_refuses_flags_for_classes(train, main, tmp_path, capsys, flags):
    assert train("--no_class_cond") == 0
    capsys.readouterr()
    assert main("--mode sample --num_samples 1 --sampling_steps 2", flags) == 1
    assert "without classes" in capsys.readouterr().err


@pytest.mark.quick
@pytest.mark.parametrize(
    "flag, value, was",
    [
        ("--channels", "16", "8"),
        ("--image_size", "32", "16"),
        ("--predict", "eps", "v"),
        ("--timesteps", "100", "50"),
    ],
)
def test_a_flag_that_contradicts_the_checkpoint_is_an_error_naming_both(
    sample, tmp_path, capsys, flag, value, was
):
    assert sample(flag, value) == 1
    assert re.search(rf"{flag} {value} .*\b{was}\b", said_once(capsys)) and not tree(tmp_path)


def test_a_model_flag_that_agrees_with_the_checkpoint_is_no_error(sample):
    assert sample("--channels 8") == 0


def test_more_sampling_steps_than_timesteps_is_an_error(sample, tmp_path, capsys):
    assert sample("--sampling_steps 51") == 1
    assert "50" in said_once(capsys) and not tree(tmp_path)


def test_a_missing_model_is_an_error(main, tmp_path, capsys):
    assert main("--mode sample --model_path gone.pt") == 1
    assert "gone.pt" in said_once(capsys) and not tree(tmp_path)


def test_images_of_28_pixels_come_back_with_28(main, tmp_path):
    (tmp_path / "grey").mkdir()
    for i in range(4):
        Image.new("L", (28, 28), 60 * i).save(tmp_path / "grey" / f"{i}.png")
    assert (
        main("--mode train", TINY, "--image_size 28 --attention_at 16 --steps 1 --data_path grey")
        == 0
    )
    assert main("--mode sample --num_samples 2 --sampling_steps 2 --individual each") == 0
    assert Image.open(tmp_path / "each" / "00000.png").size == (28, 28)
    assert Image.open(tmp_path / "each" / "00000.png").mode == "L"


def test_a_model_trained_on_another_device_samples_on_this_one(
    main, trained, tmp_path
):
    checkpoint = torch.load(trained, weights_only=True)
    checkpoint["config"]["device"] = "cuda"
    torch.save(checkpoint, tmp_path / "there.pt")
    assert main("--mode sample --num_samples 1 --sampling_steps 1 --model_path there.pt") == 0


def test_the_included_model_is_sampled_from_until_there_is_another(
    main, tmp_path, capsys
):
    assert main("--mode sample --num_samples 2 --sampling_steps 1") == 0
    assert (
        "animals.pt" in capsys.readouterr().out
        and (tmp_path / "samples" / "generated_sample.png").exists()
    )
    assert (ROOT / "saved_models" / "animals.pt").stat().st_size < 10e6


# ---- the program by itself


def test_the_file_alone_in_an_empty_folder_trains_and_samples(program, image_folder, tmp_path):
    shutil.copy(ROOT / "ddpm.py", tmp_path)
    flags = ("--mode train", TINY, "--steps 2 --data_path", image_folder)
    result = program(*flags, file="ddpm.py", real=True)
    assert result.returncode == 0, result.stderr
    result = program("--mode sample --num_samples 3 --sampling_steps 2", file="ddpm.py")
    assert result.returncode == 0, result.stderr
    written = [
        line.strip() for line in result.stdout.split("Wrote:")[1].splitlines() if line.strip()
    ]
    assert len(written) == 2 and all(Path(p).is_absolute() and Path(p).exists() for p in written)
    assert grid_of(tmp_path / "samples" / "generated_sample.png").std() > 5


def test_a_mistake_in_the_real_program_exits_with_its_code_and_no_traceback(program, tmp_path):
    result = program("--mode train --data_path nowhere")
    assert result.returncode == 1 and result.stderr.startswith("error: No folder nowhere")
    assert "Traceback" not in result.stderr and not tree(tmp_path)


@pytest.mark.parametrize("flags, meant", [
    ("--mode train --data_pth x", "--data_path"), ("--mode sample --sampling_step 3", "--sampling_steps"),
    ("--mode train --batchsize 8", "--batch_size"), ("--mode train --qqqq", None)])
def test_a_flag_that_does_not_exist_names_the_one_that_was_meant(main, capsys, flags, meant):
    assert main(flags) == 2
    said = capsys.readouterr().err
    assert (f"(did you mean {meant}?); see python ddpm.py --help" in said) == bool(meant)
    assert "did you mean" not in said or meant


@pytest.mark.parametrize("name", [name for name in ddpm.PRESETS if name != "cifar10_resnet18"])
def test_guidance_that_only_the_recipe_gave_is_off_without_classes(
    name, tmp_path, monkeypatch, image_folder
):
    monkeypatch.chdir(tmp_path)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(image_folder.rglob("*.png"))):
        shutil.copy(file, flat / f"{i}.png")
    tiny = dict(data_path=str(flat), image_size=32, arch="simple", channels=4, steps=1, batch_size=4,
                num_samples=2, sampling_steps=2, sample_every=9, download_dir="d", schedule="cosine")
    config = ddpm.preset(name, **tiny)
    ddpm.train(config)
    assert len(ddpm.sample(config)) == 2
    if config.guidance != 1:
        with pytest.raises(ddpm.UserError, match="without classes"):
            ddpm.sample(ddpm.override(config, guidance=3.0))


@pytest.mark.parametrize("flags, meant", [
    ("--steps 50", "--sampling_steps"), ("--batch_size 3", "--sample_batch_size"),
    ("--preset fashion_mnist", "--model_path")])
def test_a_flag_of_training_names_the_one_of_sampling(main, trained, capsys, flags, meant):
    assert main("--mode sample --model_path", trained, flags) == 1
    name = flags.split()[0]
    assert f"error: {name} is for --mode train: leave it out, or give {meant}." in capsys.readouterr().err


def test_the_whole_program_is_short_enough_to_read():
    text = (ROOT / "ddpm.py").read_text()
    lines = text.splitlines()
    assert len(lines) <= 3455 and max(map(len, lines)) <= 100
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef)]
    long = {f.name: n for f in functions if (n := f.end_lineno - f.lineno + 1) > 50}
    assert not long


def test_a_fault_can_be_planted_in_every_chapter():
    """Whether a quick test finds it, tests/tools/plant.py shows."""
    text = (ROOT / "ddpm.py").read_text()
    assert set(plant.FAULTS) == set(re.findall(r"^# -{20,} (.+)$", text, re.M))
    for chapter in plant.FAULTS:
        compile(plant.with_fault(text, chapter), "ddpm.py", "exec")


def test_one_version_stands_everywhere(train, capsys, tmp_path):
    with pytest.raises(SystemExit, match="0"):
        ddpm.main(["--version"])
    assert capsys.readouterr().out.strip() == ddpm.__version__
    assert f"\nversion: {ddpm.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {ddpm.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert train("--steps 1") == 0
    saved = ddpm.read_checkpoint(tmp_path / "saved_models" / "denoise_model.pt")
    assert saved["version"] == ddpm.__version__
    head, _ = ddpm.read_metrics(tmp_path / "samples" / "metrics.jsonl")
    assert head["version"] == ddpm.__version__
