"""The page without a browser: Streamlit's AppTest runs it. It samples what the command line
samples."""

import importlib.metadata
import io
import json
import os
import shutil
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, make_project, sample_tiny_pt, sampled_labels
from PIL import Image

import ddpm

pytest.importorskip("streamlit", reason="the page needs Streamlit")
os.environ["STREAMLIT_LOGGER_LEVEL"] = "error"
import streamlit as st  # noqa: E402
from streamlit.testing.v1 import AppTest  # noqa: E402

import app  # noqa: E402


@pytest.fixture
def project(trained, tmp_path, monkeypatch):
    """A folder with the tiny model and its run, in which the page starts; it has cached nothing."""
    make_project(trained, tmp_path)
    monkeypatch.chdir(tmp_path)
    st.cache_resource.clear()
    st.cache_data.clear()
    return tmp_path


@pytest.fixture
def page(project, monkeypatch):
    """page(section) -> that section of the page as AppTest shows it, with the tiny model chosen.
    Streamlit finds no packages, whose descriptions it reads for each AppTest."""
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [])

    def open_section(section="Generate"):
        at = AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
        return at if section == "Generate" else at.segmented_control[0].set_value(section).run()

    return open_section


def labelled(widgets, label):
    return next(w for w in widgets if w.label.startswith(label))


def press(at):
    """Press the form's button; nothing may fail."""
    at.button[0].click().run()
    assert not at.exception and not at.error
    return at


def generated(at, section="Generate"):
    """The images that a section has generated: uint8 (N, H, W, C)."""
    images = at.session_state[f"generated: {section}"]["images"]
    return [np.asarray(Image.open(io.BytesIO(image))) for image in images]


def png(pixels):
    Image.fromarray(pixels).save(file := io.BytesIO(), "PNG")
    return file.getvalue()


IMAGE = png(np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8))


def give(at, content, name="mine.png"):
    """Upload into the last field for files."""
    at.file_uploader[-1].set_value((name, content, "image/png"))
    return at.run()


# ---- models


def test_every_model_is_listed_with_what_it_was_trained_on(page, project):
    models = project / "saved_models"
    (models / "broken.pt").write_bytes(b"not a checkpoint")
    os.utime(models / "broken.pt", (1, 1))
    shutil.copy(models / "tiny.pt", models / "tiny.pt.previous")
    shutil.copy(models / "tiny.pt", models / ".tiny.pt.77.tmp")
    (models / "tiny.pt_steps").mkdir()
    shutil.copy(models / "tiny.pt", models / "tiny.pt_steps" / "step_00000040.pt")
    options = page().selectbox[0].options
    data = ddpm.read_checkpoint(models / "tiny.pt")["config"]["data_path"].split("/")[-1]
    assert {
        "animals.pt: animal_data, 64x64, 5 classes",
        "animals_text.pt: animals_text_data, 64x64, prompts of 39 words",
        "broken.pt: cannot be read",
        "clothes.pt: clothes, 64x64, 10 classes",
        "fashion_mnist.pt: fashion_mnist, 28x28, 10 classes",
        f"tiny.pt: {data}, 16x16, 3 classes",
        f"tiny.pt.previous: {data}, 16x16, 3 classes",
    } <= set(options)
    names = [option.partition(":")[0] for option in options]
    assert names[0].startswith("tiny.pt") and names[2] == "broken.pt"  # the newest first
    assert names[3:] == [name for name in app.INCLUDED if (ROOT / "saved_models" / name).exists()]


@pytest.mark.parametrize(
    "network, expected",
    [
        (dict(arch="unet", attention="full"), ""),
        (dict(arch="unet", attention="none"), ", without attention"),
        (dict(arch="unet", attention="linear"), ", with linear attention"),
        (dict(arch="simple", attention="full"), ", without attention"),
        (dict(arch="resnet18", attention="full"), ""),
    ],
)
def test_models_of_the_same_data_are_told_apart_by_their_attention(project, network, expected):
    path = project / "saved_models" / "flower.pt"
    checkpoint = ddpm.read_checkpoint(project / "saved_models" / "tiny.pt")
    checkpoint["config"] |= network | dict(
        data_path="oxford/flowers", image_size=32, attention_at=(16,)
    )
    torch.save(checkpoint, path)
    assert app.describe(path, 0) == f"flower.pt: flowers, 32x32, 3 classes{expected}"


def test_the_chosen_model_shows_its_card(page, project):
    at = page()
    assert at.caption[0].value.startswith("saved 20")
    included = next(o for o in at.selectbox[0].options if o.startswith("animals.pt"))
    at.selectbox[0].select(included).run()
    assert not at.exception
    card = at.caption[0].value
    assert card.startswith("trained on: `animal_data`, 100 drawings") and "licence" in card
    assert "memorised" in card and card.count(": ") >= 5


def test_thumbnails_have_whole_pixels(project, monkeypatch):
    """Each pixel of an image becomes a square of an even number of pixels, none is mixed."""
    shown = []
    monkeypatch.setattr(st.delta_generator.DeltaGenerator, "image", lambda s, *a, **k: shown.append(a))
    pixels = np.random.default_rng(0).integers(0, 256, (28, 28), dtype=np.uint8)
    app.thumbnail(Image.fromarray(pixels), "grey")
    [(image,)] = shown
    assert image.size == (280, 280)
    assert np.array_equal(np.asarray(image), pixels.repeat(10, 0).repeat(10, 1))
    app.thumbnail(Image.new("RGB", (400, 200)), "wide")
    assert shown[1][0].size == (400, 200)


def test_a_broken_model_gives_a_sentence(page, project):
    (project / "saved_models" / "broken.pt").write_bytes(b"not a checkpoint")
    at = page()
    assert not at.exception and len(at.error) == 1
    assert "broken.pt cannot be read safely" in at.error[0].value


def test_a_model_is_loaded_once_for_all_until_its_file_changes(page, project, monkeypatch):
    loads, load = [], ddpm.load_model
    monkeypatch.setattr(ddpm, "load_model", lambda *a: loads.append(a) or load(*a))
    press(page())
    press(page()).run()
    assert len(loads) == 1
    os.utime(project / "saved_models" / "tiny.pt", (2e9, 2e9))
    page()
    assert len(loads) == 2


def test_no_path_but_those_listed_is_taken(page, trained, monkeypatch):
    at = page()
    monkeypatch.setattr(type(at.selectbox[0]), "index", 0)
    box, opened, read = at.selectbox[0], [], ddpm.read_checkpoint
    monkeypatch.setattr(ddpm, "read_checkpoint", lambda path: opened.append(path) or read(path))
    box._value, box.options = (
        str(trained),
        [str(trained)],
    )  # a browser's forged message names another file
    assert box._widget_state.string_value == str(trained)
    at.run()
    assert str(trained) not in map(str, opened)
    assert (
        not at.exception and "50" in labelled(at.select_slider, "Steps").options
    )  # the listed model's form


# ---- generate


def test_the_images_are_those_of_the_command_line(page, project):
    at = page()
    assert labelled(at.number_input, "Images").value == 8
    press(at)
    expected = sample_tiny_pt(project, num_samples=8, gif=True, individual=str(project / "each"))
    assert len(generated(at)) == 8
    assert all(np.array_equal(a, b) for a, b in zip(generated(at), expected))
    kept = at.session_state["generated: Generate"]
    assert kept["gif"] == (project / "cli" / "denoising.gif").read_bytes()
    with zipfile.ZipFile(io.BytesIO(kept["zip"])) as archive:
        assert archive.namelist() == sorted(file.name for file in (project / "each").iterdir())
        assert [archive.read(name) for name in archive.namelist()] == kept["images"]


def test_a_new_model_does_not_take_the_place_of_the_chosen_one(page, project):
    models = project / "saved_models"
    shutil.copy(models / "tiny.pt", models / "chosen.pt")
    os.utime(models / "chosen.pt", (1, 1))
    at = page()
    box = at.selectbox[0]
    box.select(next(option for option in box.options if option.startswith("chosen.pt"))).run()
    shutil.copy(models / "tiny.pt", models / "new.pt")  # as a training saves it meanwhile
    labelled(at.number_input, "Images").set_value(1)
    press(at)
    assert at.selectbox[0].options[0].startswith("new.pt") and at.selectbox[0].value.name == "chosen.pt"
    assert "model chosen.pt" in at.session_state["generated: Generate"]["about"]


def test_memory_that_runs_out_gives_a_sentence_and_a_fault_of_ours_none(page, monkeypatch):
    def fail(message):
        def generate(*_, **__):
            raise RuntimeError(message)

        monkeypatch.setattr(ddpm, "generate", generate)
        return page().button[0].click().run()

    at = fail("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")
    assert "generate fewer images" in at.error[0].value and not at.exception
    at = fail("shapes differ")
    assert "shapes differ" in at.exception[0].value


def test_every_setting_reaches_the_sampler(page, project):
    at = page()
    labelled(at.number_input, "Images").set_value(5)
    labelled(at.number_input, "Seed").set_value(7)
    labelled(at.selectbox, "Sampler").set_value("ddim")
    labelled(at.select_slider, "Steps").set_value(10)
    labelled(at.multiselect, "Classes").set_value(["square", "disc"])
    labelled(at.slider, "Guidance").set_value(3.5)
    press(at)
    expected = sample_tiny_pt(
        project,
        num_samples=5,
        seed=7,
        sampler="ddim",
        sampling_steps=10,
        guidance=3.5,
        classes="square,disc",
    )
    assert len(generated(at)) == 5 and all(
        np.array_equal(a, b) for a, b in zip(generated(at), expected)
    )
    assert at.session_state["generated: Generate"]["names"][:3] == [
        "1 square",
        "2 disc",
        "3 square",
    ]
    text = Image.open(io.BytesIO(at.session_state["generated: Generate"]["images"][0])).text
    assert text["ddpm:seed"] == "7" and text["ddpm:sampler"] == "ddim"


def test_a_model_with_a_whole_number_as_guidance_is_shown(page, project):
    """As Config allows from Python."""
    path = project / "saved_models" / "tiny.pt"
    checkpoint = ddpm.read_checkpoint(path)
    checkpoint["config"]["guidance"] = 2
    torch.save(checkpoint, path)
    at = page()
    assert not at.exception and labelled(at.slider, "Guidance").value == 2.0


def test_steps_run_up_to_all_timesteps_and_no_further(page):
    assert labelled(page().select_slider, "Steps").options == ["2", "5", "10", "20", "50"]  # T = 50


def test_a_stop_is_shown_once_and_earlier_images_stay(page):
    at = press(page())
    before = at.session_state["generated: Generate"]["images"]
    at.session_state["stopped"] = True
    assert [message.value for message in at.run().info] == ["Stopped."]
    assert not at.run().info
    assert at.session_state["generated: Generate"]["images"] == before


def test_settings_outlive_a_look_at_another_section(page):
    at = page()
    labelled(at.number_input, "Seed").set_value(5)
    at = press(at).segmented_control[0].set_value("Watch a run").run()
    at = at.segmented_control[0].set_value("Generate").run()
    assert labelled(at.number_input, "Seed").value == 5
    assert len(generated(at)) == 8


# ---- edit


def test_variations_are_those_of_the_command_line(page, project):
    (project / "mine.png").write_bytes(IMAGE)
    at = give(page("Edit"), IMAGE)
    assert labelled(at.slider, "Strength").value == 0.5
    labelled(at.slider, "Strength").set_value(0.4)
    labelled(at.select_slider, "Steps").set_value(20)
    press(at)
    expected = sample_tiny_pt(
        project, num_samples=4, init_image="mine.png", strength=0.4, sampling_steps=20
    )
    assert len(expected) == 4
    assert all(np.array_equal(a, b) for a, b in zip(generated(at, "Change an image"), expected))


@pytest.mark.parametrize("shape", ["A rectangle", "A mask of yours"])
def test_inpainting_is_that_of_the_command_line(page, project, shape):
    mask = np.zeros((16, 16), np.uint8)
    mask[4:, 8:12] = 255  # 50 to 75 % across, 25 to 100 % down
    (project / "mine.png").write_bytes(IMAGE)
    (project / "mask.png").write_bytes(png(mask))
    at = page("Edit")
    give(at.radio[0].set_value("Inpaint a part").run(), IMAGE)
    labelled(at.radio, "Where").set_value(shape).run()
    if shape == "A rectangle":
        labelled(at.slider, "From left").set_value((50, 75))
        labelled(at.slider, "From top").set_value((25, 100)).run()
    else:
        assert not at.button  # nothing to press before the mask is there
        give(at, png(mask), "mask.png")
    labelled(at.select_slider, "Steps").set_value(10)
    press(at)
    expected = sample_tiny_pt(
        project, num_samples=4, init_image="mine.png", mask="mask.png", sampling_steps=10
    )
    assert all(np.array_equal(a, b) for a, b in zip(generated(at, "Inpaint a part"), expected))
    original = ddpm.decode(Image.open(io.BytesIO(IMAGE)), 16, 3).transpose(1, 2, 0)
    assert np.array_equal(expected[0][:, :8], original[:, :8])


def test_going_between_two_seeds_is_that_of_the_command_line(page, project):
    at = page("Edit")
    at.radio[0].set_value("Interpolate between two seeds").run()
    labelled(at.number_input, "Seed of the last").set_value(9)
    press(at)
    expected = sample_tiny_pt(project, num_samples=8, interpolate=9)
    assert all(np.array_equal(a, b) for a, b in zip(generated(at, "Interpolate between two seeds"), expected))
    kept = at.session_state["generated: Interpolate between two seeds"]
    assert kept["gif"] == (project / "cli" / "interpolation.gif").read_bytes()


def test_the_same_seed_twice_gives_a_sentence(page):
    at = page("Edit")
    at.radio[0].set_value("Interpolate between two seeds").run()
    labelled(at.number_input, "Seed of the last").set_value(0)
    at.button[0].click().run()
    assert not at.exception and "two different ones" in at.error[0].value


@pytest.mark.parametrize("section", ["Edit", "Look inside"])
def test_bad_uploads_get_a_sentence(page, section):
    broken = give(page(section), b"this is no image", "holiday.png")
    assert not broken.exception and len(broken.error) == 1
    assert broken.error[0].value.startswith("holiday.png cannot be read (UnidentifiedImageError")
    assert "0x" not in broken.error[0].value  # no object's address
    Image.new("1", (20_000, 6_000)).save(bomb := io.BytesIO(), "PNG")  # a small file of many pixels
    assert len(bomb.getvalue()) < 10**6
    huge = give(page(section), bomb.getvalue(), "huge.png")
    assert not huge.exception
    assert [e.value for e in huge.error] == ["huge.png has 120 million pixels: give at most 100."]


# ---- look inside


def test_the_trajectory_is_that_of_the_sampler(project):
    path = project / "saved_models" / "tiny.pt"
    trajectory = app.trajectory_of((path, 1), 3, 1)
    model, diffusion, config = ddpm.load_model(path)
    config = ddpm.override(config, seed=3, sampling_steps=50)
    steps = list(ddpm.generate(model, diffusion, config, [0], [1]))
    assert sorted(trajectory) == list(range(-1, 49))  # the first level is pure noise, and left out
    for (_, x, _), (t, _, x0) in zip(steps, steps[1:]):
        assert torch.equal(trajectory[t][0], x) and torch.equal(trajectory[t][1], x0)
    assert torch.equal(trajectory[-1][0], steps[-1][1])


def test_looking_inside_works_with_an_image_and_without(page, real_plots):
    at = page("Look inside")
    assert not at.exception and not at.error
    captions = [c.value for c in at.caption]
    assert captions[1] == "the model's image" and "at t = 16" in captions
    at.select_slider[0].set_value(40).run()
    assert "at t = 40" in [c.value for c in at.caption]
    at = give(at, IMAGE)
    assert not at.exception and not at.error
    assert [c.value for c in at.caption][1] == "mine.png"


def test_looking_inside_shows_the_class_chosen(page, monkeypatch):
    labels = sampled_labels(monkeypatch)
    at = page("Look inside")
    labelled(at.selectbox, "Its class").set_value("square").run()
    assert not at.exception and labels == [0, 1]


# ---- watch a run


def run_of(folder, rows, **config):
    """A run's folder with these lines in its metrics.jsonl; its path."""
    head = dict(config=dict(preset="animals") | config)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [head, *rows]))
    return folder / "metrics.jsonl"


def row(step, seconds, epoch=0.0):
    return dict(
        step=step,
        seconds=seconds,
        epoch=epoch,
        loss=0.5,
        loss_quarters=[0.1, 0.2, None, 0.4],
        lr=1e-3,
        grad_norm=1.0,
        memory_mb=1,
        images_per_s=160.0,
    )


def test_time_left_follows_from_the_last_lines(tmp_path):
    # the last 20 lines make 10 steps in 20 s each, the ones before were slower
    rows = [row(10 * i, 100 * i, i / 5) for i in range(1, 11)]
    rows += [row(100 + 10 * i, 1000 + 20 * i, 2 + i / 5) for i in range(1, 31)]
    lengths = [
        (dict(steps=1000), 600 * 2),
        (dict(steps=None, epochs=20.0), 12 * 100),
        (dict(steps=None, minutes=40.0), 2400 - 1600),
    ]
    for length, expected in lengths:
        config, read = app.read_run(run_of(tmp_path, rows, **length))
        assert len(read) == 40
        assert app.time_left(config, read) == pytest.approx(expected)
    assert app.time_left(config, read[:1]) is None
    assert [app.in_words(s) for s in (5, 118, 3600, 4020)] == [
        "1 min",
        "2 min",
        "1 h 0 min",
        "1 h 7 min",
    ]


def test_a_run_is_shown_as_it_goes(page, project):
    path = run_of(project / "deep" / "er", [row(10, 10), row(20, 20)], steps=100)
    with open(path, "a") as f:
        f.write('{"step": 30, "los')  # a line being written
    shutil.copy(next((project / "samples" / "run").glob("generated_epoch*.png")), path.parent)
    at = page("Watch a run")
    assert not at.exception and not at.error
    assert at.selectbox[0].options == ["deep/er", "samples/run"]  # the newest first
    assert at.get("progress")[0].proto.text == "Step 20, 20%: 2 min left"
    assert [m.value for m in at.metric] == ["0.5000", "160", "0.0"]
    os.utime(path, (1, 1))
    at = page("Watch a run")
    assert at.get("progress")[0].proto.text == "Step 40, 100%: finished"
    at.selectbox[0].select("deep/er").run()
    run_of(project / "another", [row(10, 10)])  # begun meanwhile, and so the first in the list
    assert str(at.run().selectbox[0].value.parent) == "deep/er"


def test_a_run_that_stopped_or_has_just_started_or_is_no_run(page, project):
    path = run_of(project / "samples" / "stopped", [row(10, 10), row(20, 20)], steps=100)
    shutil.rmtree(project / "samples" / "run")
    os.utime(path, (1, 1))
    assert (
        ": stopped, or busy sampling previews" in page("Watch a run").get("progress")[0].proto.text
    )
    run_of(path.parent, [])
    assert "has logged nothing yet" in page("Watch a run").info[0].value
    path.write_text("other\n")
    assert "is not the metrics.jsonl of a run" in page("Watch a run").error[0].value
    path.unlink()
    assert "no run here yet" in page("Watch a run").error[0].value


# ---- the program


@pytest.mark.parametrize("installed", [True, False])
def test_started_as_a_program_it_says_how_to_open_the_page(program, tmp_path, monkeypatch, installed):
    if not installed:
        (tmp_path / "streamlit.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = program(file=ROOT / "app.py")
    assert done.returncode == 1 and done.stdout == ""
    assert (
        done.stderr.splitlines()[-1].endswith("streamlit run app.py")
        and "Traceback" not in done.stderr
    )
    assert ("pip install streamlit" in done.stderr) == (not installed)
