"""What is optional is never fatal, and an input that has no effect, or another than its name says,
is told."""

import os
import re
import shutil
import sys
import types
from pathlib import Path

import pytest
from conftest import TINY, before_step, checkpoint, places, words
from PIL import Image

import ddpm

SMALL = "--channel_mults 1 --attention none --num_samples 1 --sampling_steps 1 --steps 2"


@pytest.fixture
def train(main, image_folder, tmp_path):
    """train(*flags) trains a tiny model run/model.pt and returns the exit code."""

    def run(*flags, data=image_folder):
        given = [*words(TINY, SMALL), *places(Path("run"), data), *words(*flags)]
        return ddpm.main(["--mode", "train", *given])

    return run


# ---- trackers and plots


def test_a_tracker_that_fails_is_left_out_and_training_goes_on(train, monkeypatch, capsys):
    before_step(monkeypatch, 1, lambda: shutil.rmtree("run/samples/tensorboard"))
    assert train("--logger tensorboard --steps 4") == 0
    assert checkpoint("run/model.pt")["step"] == 4
    assert capsys.readouterr().err.count("warning: --logger tensorboard failed") == 1


@pytest.mark.parametrize("what", ("numbers", "image_files"))
def test_no_failure_of_a_tracker_is_fatal(capsys, tmp_path, what):
    config = ddpm.Config(logger="tensorboard", samples_dir=str(tmp_path))
    logger = ddpm.MetricsLogger(config, "data", 0)
    logger.track(1, {"loss": 0.5}, {})
    wrong = dict(numbers={}, image_files={}) | {what: {"loss": "neither a number nor a file"}}
    for _ in range(2):
        logger.track(2, **wrong)
    said = capsys.readouterr().err
    assert said.count("warning: --logger tensorboard failed") == 1


def test_wandb_without_a_login_is_a_sentence_before_training(train, monkeypatch, capsys):
    def init(**_):
        raise ValueError("api_key not configured (no-tty)")

    wandb = types.ModuleType("wandb")
    wandb.init = init
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train() == 0
    before = checkpoint("run/model.pt")["seconds"]
    before_step(monkeypatch, 0, lambda: pytest.fail("a step was computed"))
    assert train("--logger wandb") == 1
    assert checkpoint("run/model.pt")["seconds"] == before, "the earlier model is where it was"
    said = capsys.readouterr().err
    assert "api_key not configured" in said and "wandb login" in said and "Traceback" not in said


def test_the_package_that_is_missing_is_the_one_named(monkeypatch, tmp_path):
    """wandb itself is there, and one of the packages that it needs is not."""
    (tmp_path / "wandb.py").write_text("import a_package_that_is_missing")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ddpm.UserError, match="pip install a_package_that_is_missing"):
        ddpm.start_logger(ddpm.Config(logger="wandb", samples_dir=str(tmp_path)))


def test_a_full_disk_for_images_does_not_end_a_training(train, monkeypatch, capsys):
    def full():
        def write(*args):
            raise OSError(28, "No space left on device", "run/samples")

        monkeypatch.setattr(ddpm, "write_previews", write)
        Path("run/samples/metrics.jsonl").unlink()
        Path("run/samples/metrics.jsonl").mkdir()

    before_step(monkeypatch, 1, full)
    assert train() == 0 and checkpoint("run/model.pt")["step"] == 2
    said = capsys.readouterr().err
    assert "warning: writing metrics.jsonl failed" in said and "No space left" in said
    assert "warning: writing the grids failed" in said


@pytest.mark.parametrize("failing", ("plot_schedules", "plot_loss", "plot_rows"))
def test_no_failure_of_a_plot_is_fatal(train, monkeypatch, capsys, failing):
    def fail(*args):
        raise ValueError("no such font")

    monkeypatch.setattr(ddpm, failing, fail)
    assert train() == 0 and checkpoint("run/model.pt")["step"] == 2
    assert list(Path("run/samples").glob("generated_epoch*.png"))
    assert "no such font" in capsys.readouterr().err


ODD_NAMES = ["$10_to_$20", "Ba$$in", os.fsdecode(b"caf\xe9"), "猫", "a name that is far too long"]


@pytest.fixture(scope="module")
def oddly_named(tmp_path_factory):
    """A folder of classes whose names are hard to draw."""
    root = tmp_path_factory.mktemp("odd")
    for i, name in enumerate(ODD_NAMES):
        (root / name).mkdir()
        Image.new("RGB", (16, 16), (40 * i, 90, 200)).save(root / name / "1.png")
    return root


def test_names_that_are_hard_to_draw(main, oddly_named, recwarn, real_plots):
    """Real plots: $ begins a formula in them, bytes that are no UTF-8 no text, and a font has not
    all letters."""
    where = places(Path("run"), oddly_named)
    assert ddpm.main(["--mode", "train", *words(TINY, SMALL, "--steps 1"), *where]) == 0
    image = Path(os.fsdecode(b"caf\xe9.png"))
    shutil.copy(oddly_named / "猫" / "1.png", image)
    flags = words("--mode sample --model_path run/model.pt --num_samples 5 --sampling_steps 2")
    assert ddpm.main([*flags, "--init_image", str(image)]) == 0
    with Image.open("samples/denoising_steps.png") as plot:
        assert plot.info["ddpm:init_image"] == r"caf\udce9.png"
    assert not [w for w in recwarn if "missing from font" in str(w.message)]


@pytest.mark.parametrize(
    "name, label",
    [
        ("elephant", "elephant"),
        ("$10", r"\$10"),
        ("猫", ""),
        ("a name that is long", "a name th…"),
        ("", ""),
    ],
)
def test_the_label_of_a_row(name, label):
    assert ddpm.axis_label(name) == label


def test_images_are_written_before_plots(main, trained, monkeypatch, capsys):
    def fail(*args):
        raise ValueError("no such font")

    monkeypatch.setattr(ddpm, "plot_trajectory", fail)
    flags = "--mode sample --num_samples 2 --sampling_steps 1 --individual out --model_path"
    assert main(flags, trained) == 0
    assert Path("samples/generated_sample.png").exists()
    assert [path.name for path in sorted(Path("out").iterdir())] == ["00000.png", "00001.png"]
    assert "no such font" in capsys.readouterr().err


# ---- a wrong meaning that passes


@pytest.mark.parametrize(
    "flags, named",
    [
        ("--predict eps", "--predict v"),
        ("--schedule linear", "--schedule cosine"),
        ("--timesteps 100", "--timesteps 50"),
        ("--schedule linear --beta_end 0.5", "the default --beta_end"),
    ],
)
def test_weights_of_another_meaning_are_warned_of(train, trained, capsys, flags, named):
    same_network = "--channel_mults 1 2 --attention full --dry_run --init_from"
    assert train(same_network, trained, flags) == 0
    said = capsys.readouterr().out
    assert "warning" in said and "was trained with" in said and named in said
    assert train(same_network, trained) == 0
    assert "was trained with" not in capsys.readouterr().out


def test_too_few_tensors_that_fit_are_refused_with_the_flags_that_would(train, trained, capsys):
    assert train("--dry_run --channels 24 --init_from", trained) == 1
    said = capsys.readouterr().err
    assert re.search(r"Only [0-9] % of the network's weights fit", said)
    advice = said.partition(": use ")[2].strip().rstrip(".").replace(",", "")
    assert advice == "--channels 8 --channel_mults 1 2 --attention full"
    assert train("--dry_run --channels 24 --init_from", trained, advice) == 0


@pytest.mark.parametrize(
    "flags, warning",
    [
        ("--arch simple --patch 4 --res_blocks 2", "--patch has no effect with --arch simple"),
        ("--pretrained", "--pretrained has no effect with --arch unet"),
        ("--arch simple --checkpointing", "--checkpointing has no effect with --arch simple"),
        ("--eta 0.5", "--eta has no effect with --sampler dpm++sde"),
        ("--attention none --attention_at 8", "--attention_at has no effect with --attention"),
        ("--guidance 0 --classes disc", "--classes has no effect with --guidance 0"),
    ],
)
def test_a_flag_without_effect_is_told(train, capsys, flags, warning):
    assert train("--dry_run", flags) == 0
    assert f"warning: {warning}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "folder, flags, classes",
    [("disc", "", "none"), (".", "--no_class_cond", "disc 8, square 8, stripes 8; not learned")],
)
def test_guidance_without_classes_is_told_once(train, image_folder, capsys, folder, flags, classes):
    assert train("--dry_run --guidance 3", flags, data=image_folder / folder) == 0
    said = capsys.readouterr().out
    assert f"{classes}: --guidance and --label_dropout have no effect\n" in said
    assert said.count("--guidance") == 1


def test_the_defaults_warn_of_nothing(train, capsys):
    assert train("--dry_run --attention full --channel_mults 1 2") == 0
    assert "no effect" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag",
    ("--individual out", "--init_image x.png --strength 0.3", "--interpolate 5", "--gif"),
)
def test_flags_of_sampling_are_refused_in_training(train, capsys, flag):
    """--interpolate and --strength would change what the previews show."""
    assert train(flag) == 1
    assert f"{flag.split()[0]} is for --mode sample: leave it out" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ("--resume", "--init_from x.pt"))
def test_flags_of_training_are_refused_in_sampling(main, trained, capsys, flag):
    assert main("--mode sample --num_samples 1 --model_path", trained, flag) == 1
    assert f"{flag.split()[0]} is for --mode train: leave it out" in capsys.readouterr().err
