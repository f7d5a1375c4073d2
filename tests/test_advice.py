"""The advice in an error can be followed as it is written: each test reads it and does what it says."""

import re
import shutil

import pytest
from conftest import TINY, exit_code, places, words

import ddpm


@pytest.fixture
def train(image_folder, tmp_path, monkeypatch):
    """train(*flags) is the exit code of a short training in tmp_path; later flags count."""
    monkeypatch.chdir(tmp_path)
    base = ["--mode train", TINY, "--steps 2", *places(tmp_path / "run", image_folder)]
    return lambda *flags: exit_code(ddpm.main, *base, *flags)


@pytest.fixture
def run(image_folder, tmp_path, monkeypatch):
    """run(*flags) is the exit code of a whole command line in tmp_path."""
    monkeypatch.chdir(tmp_path)
    return lambda *flags: exit_code(ddpm.main, *flags)


def advice(capsys, pattern):
    """What the groups of a pattern find in the one line on stderr, an error."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1, lines
    found = re.search(pattern, lines[0])
    assert found, lines[0]
    return found.groups()


# A mistake, and what its error names: each value named is then given to the same flag.
VALUES = {
    "--image_size 18 --attention none --channel_mults 1 2 2": r"use (\d+) or (\d+)\.",
    "--image_size 42x18 --attention none --channel_mults 1 2 2": r"use (\d+x\d+) or (\d+x\d+)\.",
    "--image_size 30 --arch simple": r"use (\d+) or (\d+)\.",
    "--dropout 2": r"give (\S+) to (\S+)\.",
    "--holdout 1": r"give (\S+) to 0\.9\.",
    "--label_dropout 1.5": r"give (\S+) to (\S+)\.",
    "--timesteps 5": r"give (\d+) to 100000\.",
    "--attention_at 5": r"the stages have heights (\d+) (\d+); choose among them",
    "--preset wavy": r"choose from '(animals)'",
    "--schedule wavy": r"choose from '(\w+)', '(\w+)', '(\w+)', '(\w+)', '(\w+)'",
    "--optimizer wavy": r"choose from '(\w+)', '(\w+)', '(\w+)'",
    "--sampling_steps 60": r"is more than --timesteps (\d+)\.",
    "--batch_size 4 --grad_accum 3": r"use a multiple of (\d+)",
}


@pytest.mark.parametrize("mistake", VALUES)
def test_each_value_that_is_named_works(train, capsys, mistake):
    name = "--batch_size" if "multiple" in VALUES[mistake] else mistake.split()[0]
    assert train(mistake) in (1, 2)
    others = mistake.partition(" --")[2]
    for value in advice(capsys, VALUES[mistake]):
        assert train(others and f"--{others}", name, value) == 0, value


# A mistake, and the flag that its error says to leave out.
LEFT_OUT = {
    "--schedule cosine --beta_start 1e-4": ("--beta_start 1e-4", "leave them out"),
    "--gif": ("--gif", "leave it out"),
    "--individual out": ("--individual out", "leave it out"),
    "--resume": ("--resume", "leave out --resume"),
    "--steps 2 --epochs 1": ("--epochs 1", "give one"),
}


@pytest.mark.parametrize("mistake", LEFT_OUT)
def test_it_works_without_the_flag_that_is_to_be_left_out(train, capsys, mistake):
    flag, remedy = LEFT_OUT[mistake]
    assert train(mistake) == 1
    advice(capsys, re.escape(remedy))
    assert train(mistake.replace(flag, "")) == 0


def test_a_folder_for_a_model_is_told_a_file_in_it(train, capsys, tmp_path):
    (tmp_path / "models").mkdir()
    assert train("--model_path models") == 1
    (file,) = advice(capsys, r"give a file in it, as in (\S+)\.$")
    assert train("--model_path", file) == 0 and (tmp_path / file).is_file()


@pytest.mark.parametrize("given", ["image.png", "splits", "gone"])
def test_the_folder_of_images_that_is_named_works(train, capsys, tmp_path, image_folder, given):
    shutil.copytree(image_folder, tmp_path / "splits" / "train")
    shutil.copytree(image_folder, tmp_path / "splits" / "test")
    shutil.copy(next(image_folder.rglob("*.png")), tmp_path / "splits" / "train" / "image.png")
    path = next((tmp_path / "splits" / "train").glob(given), tmp_path / given)
    assert train("--data_path", path) == 1
    patterns = {
        "image.png": r"give --data_path a folder of images, such as (\S+)\.$",
        "splits": r"give --data_path (\S+)\.$",
        "gone": r"give --data_path an image folder, or one of (\w+), ",
    }
    (folder,) = advice(capsys, patterns[given])
    if given == "gone":
        assert folder in ddpm.DATASETS  # which needs a network
    else:
        assert train("--data_path", folder) == 0


def test_samples_inside_the_images_are_told_to_go_elsewhere(train, capsys, tmp_path, image_folder):
    data = shutil.copytree(image_folder, tmp_path / "mine")
    assert train("--data_path", data, "--samples_dir", data / "samples") == 1
    advice(capsys, "choose another folder")
    assert train("--data_path", data, "--samples_dir", tmp_path / "elsewhere") == 0


def test_a_model_to_resume_is_told_its_model_path_and_init_from(train, run, capsys, tmp_path):
    assert train() == 0
    capsys.readouterr()
    model = tmp_path / "run" / "model.pt"
    assert run("--mode train --resume", model, "--steps 3") == 1
    path, start = advice(
        capsys, r"give --resume --model_path (\S+), or .* with --init_from (\S+)\.$"
    )
    assert train("--model_path other.pt --samples_dir other --init_from", start) == 0
    assert run("--mode train --resume --model_path", path, "--steps 3") == 0


def test_a_finished_run_goes_on_with_more_of_what_it_names(train, run, capsys, tmp_path):
    assert train() == 0
    again = ("--mode train --resume", "--model_path", tmp_path / "run" / "model.pt")
    capsys.readouterr()
    assert run(*again) == 0
    name = re.search(r"To train on, give a larger (--\w+)", capsys.readouterr().out)[1]
    assert run(*again, name, "4") == 0
    assert ddpm.read_checkpoint(tmp_path / "run" / "model.pt")["step"] == 4


def test_a_contradicting_flag_is_left_out_or_a_new_run_begins(train, run, capsys, tmp_path):
    assert train() == 0
    again = ("--mode train --resume --steps 3", "--model_path", tmp_path / "run" / "model.pt")
    capsys.readouterr()
    assert run(*again, "--channels 16") == 1
    advice(capsys, "contradicts .*: leave it out or train anew")
    assert run(*again) == 0 and train("--channels 16") == 0


SAMPLING = {  # a mistake in sampling, what its error says, and what is then given
    "--mask": ("need --init_image FILE", "--init_image {image} --mask {image}"),
    "--strength 0.5": ("need --init_image FILE", "--init_image {image} --strength 0.5"),
    "--interpolate 0": ("give two different ones", "--interpolate 1"),
    "--classes unicorn": (r"its classes are ([\w-]+), ", "--classes {0}"),
    "--channels 16": ("leave it out", ""),
    "--steps 9": ("leave it out", ""),
    "--sampling_steps 60": (r"is more than --timesteps (\d+)\.", "--sampling_steps {0}"),
    "--prompt lion": ("leave it out", ""),
    "--init_image text.txt": ("Give an image file", "--init_image {image}"),
}


@pytest.mark.parametrize("mistake", SAMPLING)
def test_advice_in_sampling_works(run, trained, image_folder, tmp_path, capsys, mistake):
    (tmp_path / "text.txt").write_text("no image")
    image = next(image_folder.rglob("*.png"))
    remedy, good = SAMPLING[mistake]
    base = words("--mode sample --num_samples 2 --sampling_steps 2 --model_path", trained)
    given = [mistake, image] if mistake == "--mask" else [mistake]
    assert run(*base, *given) == 1
    found = advice(capsys, remedy)
    assert run(*base, good.format(*found, image=image)) == 0


def test_the_included_model_is_sampled_from_as_an_error_says(run, tmp_path, capsys, trained):
    assert run("--mode sample --model_path gone.pt") == 1
    advice(capsys, "give the path of a file that --mode train wrote")
    assert run("--mode sample --num_samples 2 --sampling_steps 2 --model_path", trained) == 0
