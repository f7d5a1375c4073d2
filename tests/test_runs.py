"""Two runs never hurt each other, and a run can move: names, locks, folders that several runs write
to, and what may change between a run and its resumption."""

import contextlib
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import TINY, before_step, checkpoint, metrics, places, tree, words
from PIL import Image

import ddpm

DOT = Image.new("L", (1, 1))
SMALL = "--channel_mults 1 --attention none --num_samples 1 --sampling_steps 1"


@pytest.fixture
def train(main, image_folder, tmp_path, monkeypatch):
    """train(*flags) trains a tiny model, by default run/model.pt, and returns the exit code. It
    plots nothing, which would take longer than the training."""
    monkeypatch.setattr(ddpm, "plot_schedules", lambda config, path: path)
    monkeypatch.setattr(ddpm, "plot_loss", lambda rows, path: path)
    monkeypatch.setattr(ddpm, "plot_rows", lambda rows, titles, path, *_: ddpm.save_png(DOT, path))

    def run(*flags):
        more = [] if "--resume" in words(*flags) else [TINY, SMALL, "--steps 2 --save_every 1"]
        where = places(Path("run"), image_folder)
        if "--resume" in words(*flags):  # only what is given
            where = words("--download_dir run/data")
        return main("--mode train", *more, *where, *flags)

    return run


def the_error(capsys):
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: "), last
    return last


def set_steps(folder):
    return sorted(int(path.stem[5:]) for path in Path(folder).glob("step_*.pt"))


# ---- one name for one thing


@pytest.mark.quick
def test_models_whose_names_differ_after_a_dot_have_folders_of_their_own(train):
    for seed, name in enumerate(("lr0.001", "lr0.01")):
        assert train("--model_path", f"m/{name}", "--steps 3 --seed", seed) == 0
    before = tree("m")
    assert train("--resume --steps 4 --model_path m/lr0.001") == 0
    assert checkpoint("m/lr0.001")["config"]["seed"] == 0
    after = tree("m")
    assert all(after[name] == before[name] for name in before if name.startswith("lr0.01"))


def test_a_folder_of_step_checkpoints_of_an_earlier_version_is_found(train, capsys):
    assert train() == 0
    Path("run/model.pt_steps").rename("run/model_steps")
    Path("run/model_steps/step_00000009.pt").write_bytes(b"torn")
    before = tree("run/model_steps")
    assert train("--resume --steps 3 --model_path run/model.pt") == 0
    assert "step_00000009.pt cannot be read" in capsys.readouterr().err
    assert checkpoint("run/model.pt")["step"] == 3
    assert set_steps("run/model.pt_steps") == [3] and tree("run/model_steps") == before
    assert train("--resume --steps 4 --model_path run/model.pt") == 0
    assert "step_00000003.pt at step 3" in capsys.readouterr().out, "no longer the old one"


def test_a_named_checkpoint_of_an_earlier_version_goes_on_with_its_run(train):
    assert train() == 0
    Path("run/model.pt_steps").rename("run/model_steps")
    assert train("--resume run/model_steps/step_00000002.pt --steps 3") == 0
    assert set_steps("run/model.pt_steps") == [3]
    assert not list(Path("run").rglob("*previous*")), "nothing was another run's"
    assert train("--resume run/model_steps/step_00000002.pt --steps 4 --save_every 9") == 0
    assert set_steps("run/model.pt_steps.previous") == [3], "of another branch of the run"


def test_only_the_partial_files_of_this_model_are_removed(train):
    Path("run").mkdir()
    for name in (".model.pt.4242.tmp", ".model.pt.1.4242.tmp"):
        Path("run", name).write_bytes(b"half")
    assert train() == 0
    assert [path.name for path in Path("run").glob(".*.tmp")] == [".model.pt.1.4242.tmp"]


def test_a_folder_of_an_earlier_version_that_is_another_models_is_left_alone(train, capsys):
    assert train("--model_path m/lr0.01") == 0
    Path("m/lr0.01_steps").rename("m/lr0_steps")
    before = tree("m/lr0_steps")
    assert train("--resume --model_path m/lr0.001") == 1
    assert "Nothing to resume in m/lr0.001_steps" in the_error(capsys)
    assert tree("m/lr0_steps") == before


# ---- locks


@contextlib.contextmanager
def another_process_holds(path):
    """Another process that has a lock file locked, as a run does, and its number."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    code = (
        "import fcntl, os, platform, sys, time\n"
        "file = open(sys.argv[1], 'w')\n"
        "fcntl.flock(file, fcntl.LOCK_EX)\n"
        "print(platform.node(), os.getpid(), file=file, end='', flush=True)\n"
        "print('held', flush=True)\n"
        "time.sleep(100)"
    )
    command = [sys.executable, "-S", "-c", code, path]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


@pytest.mark.quick
def test_a_run_is_refused_while_another_writes_to_its_places(train, capsys):
    assert train() == 0
    with another_process_holds("run/.model.pt.lock") as other:
        before = tree("run")
        for flags in ("", "--resume --steps 4 --model_path run/model.pt"):
            assert train(flags) == 1
            said = the_error(capsys)
            assert "--model_path run/model.pt is in use by another run" in said
            assert f"process {other.pid} on" in said
        assert tree("run") == before
        assert train("--model_path run/other.pt --samples_dir elsewhere") == 0
        other.kill()
        other.wait()
        assert train() == 0, "SIGKILL leaves a lock file, and no lock"
    assert not list(Path("run").rglob(".*.lock"))


def test_two_models_cannot_write_to_one_samples_dir_at_once(train, capsys):
    with another_process_holds("run/samples/.run.lock"):
        assert train("--model_path other.pt") == 1
    assert "--samples_dir run/samples is in use" in the_error(capsys)


@pytest.mark.parametrize("silent, refused", [(60, True), (200, False)])
def test_a_lock_of_another_machine_counts_while_its_time_is_renewed(
    train, capsys, silent, refused
):
    path = Path("run/.model.pt.lock")
    path.parent.mkdir()
    path.write_text("elsewhere 77")
    os.utime(path, times=(time.time() - silent,) * 2)
    assert train() == refused
    if refused:
        assert "process 77 on elsewhere" in the_error(capsys)


def test_a_run_renews_its_lock_and_removes_it(tmp_path, monkeypatch):
    monkeypatch.setattr(ddpm, "HEARTBEAT", 0.01)
    path = tmp_path / ".m.lock"
    with ddpm.lock(path, "--model_path", "m"):
        assert path.read_text() == f"{platform.node()} {os.getpid()}"
        os.utime(path, times=(0, 0))
        time.sleep(0.1)
        assert path.stat().st_mtime > 1
    assert not path.exists()


def test_a_start_while_another_run_ends_is_refused(tmp_path, monkeypatch):
    """The second opens the lock file of the first, which ends, and removes the file, before the
    second has locked it: a third could then lock another file of the same name."""
    path = tmp_path / ".m.lock"
    is_held = ddpm.is_held
    first = contextlib.ExitStack()
    first.enter_context(ddpm.lock(path, "--model_path", "m"))

    def is_held_after_the_end_of_the_first(*args):
        first.close()
        return is_held(*args)

    monkeypatch.setattr(ddpm, "is_held", is_held_after_the_end_of_the_first)
    with pytest.raises(ddpm.UserError, match="in use"), ddpm.lock(path, "--model_path", "m"):
        pass
    monkeypatch.undo()
    with ddpm.lock(path, "--model_path", "m"):
        assert path.exists()


def test_where_files_cannot_be_locked_the_time_of_the_file_decides(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    path = tmp_path / ".m.lock"
    with ddpm.lock(path, "--model_path", "m"):
        with pytest.raises(ddpm.UserError, match="in use"), ddpm.lock(path, "--model_path", "m"):
            pass
        os.utime(path, times=(0, 0))
        with ddpm.lock(path, "--model_path", "m"):
            pass


def test_a_dry_run_needs_no_lock(train):
    with another_process_holds("run/.model.pt.lock"):
        assert train("--dry_run") == 0


# ---- one folder of samples


def test_a_new_run_keeps_the_metrics_and_images_of_the_earlier_one(train, capsys):
    assert train("--steps 3") == 0
    Path("run/samples/mine.png").write_bytes(b"mine")
    before = tree("run/samples")
    del before["mine.png"]
    assert train("--steps 2 --seed 1") == 0
    assert "metrics and images, in run/samples/previous" in capsys.readouterr().out
    assert tree("run/samples/previous") == before and Path("run/samples/mine.png").exists()
    assert train("--steps 2 --seed 2") == 0
    assert tree("run/samples/previous") == before
    assert metrics("run/samples/previous2")[0]["config"]["seed"] == 1


def test_two_models_that_share_a_samples_dir_are_not_mixed(train):
    assert train("--model_path a.pt --steps 2") == 0
    assert train("--model_path b.pt --steps 3 --seed 1") == 0
    assert train("--resume --steps 4 --model_path a.pt") == 0
    head, rows = metrics("run/samples")
    assert head["config"]["model_path"] == "a.pt" and [row["step"] for row in rows] == [3, 4]
    _, rows = metrics("run/samples/previous2")
    assert [row["step"] for row in rows] == [1, 2, 3], "of b.pt, whole"


def test_a_resumed_run_knows_its_samples_on_another_drive_of_windows(train, monkeypatch):
    def relpath(path, start):
        raise ValueError("path is on mount 'C:', start on mount 'D:'")

    monkeypatch.setattr(ddpm.os.path, "relpath", relpath)
    assert train("--steps 2") == 0
    assert train("--resume --steps 3 --model_path run/model.pt") == 0
    assert [row["step"] for row in metrics("run/samples")[1]] == [1, 2, 3]


def test_a_damaged_metrics_file_is_kept(train):
    assert train() == 0
    Path("run/samples/metrics.jsonl").write_text("not mine to overwrite")
    assert train("--resume --steps 3 --model_path run/model.pt") == 0
    kept = Path("run/samples/previous/metrics.jsonl").read_text()
    assert kept == "not mine to overwrite"


def test_tensorboard_has_a_folder_for_each_run(train):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def steps(folder):
        events = EventAccumulator(folder).Reload()
        return [event.step for event in events.Scalars("loss")]

    assert train("--logger tensorboard --steps 4") == 0
    assert train("--logger tensorboard --steps 3 --seed 1") == 0
    assert steps("run/samples/previous/tensorboard") == [1, 2, 3, 4]
    assert steps("run/samples/tensorboard") == [1, 2, 3]
    latest = "run/model.pt_steps/step_00000002.pt"
    assert train("--resume", latest, "--steps 4 --logger tensorboard") == 0
    assert steps("run/samples/tensorboard") == [1, 2, 3, 4], "each once"


def test_a_resume_from_a_checkpoint_of_elsewhere_overwrites_no_other_run(train):
    """The folder of a run that was set aside, or a single file that was copied out of it."""
    assert train("--steps 3") == 0
    assert train("--steps 2 --seed 1") == 0
    of_second = {checkpoint(path)["config"]["seed"] for path in Path("run/model.pt_steps").iterdir()}
    assert of_second == {1}
    second = tree("run/model.pt_steps")
    assert train("--resume run/model.pt_steps.previous/step_00000003.pt --steps 4") == 0
    assert tree("run/model.pt_steps.previous2") == second
    assert set_steps("run/model.pt_steps") == [4]
    assert checkpoint("run/model.pt")["config"]["seed"] == 0


# ---- names of classes


@pytest.mark.parametrize(
    "text, names",
    [
        ("cats, small", ["cats, small"]),
        ("dogs,cats, small", ["dogs", "cats, small"]),
        ("cats, small , dogs", ["cats, small", "dogs"]),
        ("cats,dogs", ["cats", "dogs"]),
        ("cats, big", ["cats", "big"]),
        (" padded ", [" padded "]),
    ],
)
def test_names_of_classes_may_have_commas(text, names):
    class_names = ["cats, small", "cats", "dogs", " padded "]
    assert ddpm.split_classes(text, class_names) == names


def test_a_class_with_a_comma_is_trained_and_sampled(main, train, tmp_path):
    for name in ("cats, small", "dogs"):
        Path("D", name).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (16, 16), (40 * i, 90, 0)).save(Path("D", name, f"{i}.png"))
    flags = ["--data_path D --steps 1 --classes", "cats, small"]
    assert ddpm.main([*words("--mode train", TINY, SMALL), *words(*flags[:1]), flags[1]]) == 0
    sample = words("--mode sample --num_samples 2 --sampling_steps 1 --classes")
    assert ddpm.main([*sample, "cats, small, dogs"]) == 0
    assert ddpm.main([*sample, "cats, tall"]) == 1


# ---- a run that moves


@pytest.fixture
def own_images(image_folder, tmp_path):
    """A copy of the images that a test may move: its path."""
    shutil.copytree(image_folder, tmp_path / "D")
    return Path("D")


def test_images_that_were_moved_are_accepted_and_others_are_not(train, own_images, capsys):
    assert train("--data_path D") == 0
    own_images.rename("E")
    assert train("--resume --steps 3 --model_path run/model.pt") == 1
    assert "No folder D: give --data_path" in the_error(capsys)
    assert train("--resume --steps 3 --model_path run/model.pt --data_path E") == 0
    assert checkpoint("run/model.pt")["config"]["data_path"] == "E"
    Path("E/disc/0.png").unlink()
    assert train("--resume --steps 4 --model_path run/model.pt") == 1
    assert "was trained on other data" in the_error(capsys)


@pytest.mark.quick
def test_a_copied_folder_is_resumed_in_the_copy(train):
    assert train() == 0
    before = tree("run")
    shutil.copytree("run", "copy")
    assert train("--resume copy/model.pt_steps/step_00000002.pt --steps 3") == 0
    assert tree("run") == before
    assert checkpoint("copy/model.pt")["step"] == 3
    assert [row["step"] for row in metrics("copy/samples")[1]] == [1, 2, 3]


@pytest.mark.parametrize(
    "resumed, model, samples",
    [
        ("m/a.pt_steps/step_1.pt", "m/a.pt", "m/samples"),  # where it was
        ("/new/a.pt_steps/step_1.pt", "/new/a.pt", "/new/samples"),
        ("new/b.pt_steps/step_1.pt", "new/b.pt", "new/samples"),  # renamed
        ("new/a_steps/step_1.pt", "new/a.pt", "new/samples"),  # of an earlier version
        ("a.pt_steps.previous/step_1.pt", None, None),
        ("step_1.pt", None, None),
    ],
)
def test_where_a_resumed_run_writes(resumed, model, samples):
    places = ddpm.places_beside(resumed, ddpm.Config(model_path="m/a.pt", samples_dir="m/samples"))
    assert (places.get("model_path"), places.get("samples_dir")) == (model, samples)
    elsewhere = ddpm.places_beside(resumed, ddpm.Config(model_path="m/a.pt", samples_dir="samples"))
    assert "samples_dir" not in elsewhere, "it is not part of the folder that moved"


def test_precision_and_learning_rate_may_change_on_resuming(train):
    assert train() == 0
    fp16 = checkpoint("run/model.pt_steps/step_00000002.pt")
    fp16["config"]["precision"] = "fp16"
    fp16["scaler"] = dict(
        scale=2.0**16, growth_factor=2.0, backoff_factor=0.5, growth_interval=2000, _growth_tracker=0
    )
    torch.save(fp16, "run/model.pt_steps/step_00000002.pt")
    more = "--resume --steps 3 --model_path run/model.pt"
    assert train(more) == 1, "this machine has no CUDA"
    assert train(more, "--precision bf16 --lr 1e-4") == 0
    config = checkpoint("run/model.pt")["config"]
    assert (config["precision"], config["lr"]) == ("bf16", 1e-4)


def test_a_run_from_before_detail_weight_goes_on_without_it(train):
    assert train() == 0
    older = checkpoint("run/model.pt_steps/step_00000002.pt")
    assert older["config"].pop("detail_weight") == 2.0, "the default"
    torch.save(older, "run/model.pt_steps/step_00000002.pt")
    assert train("--resume --steps 3 --model_path run/model.pt") == 0
    assert checkpoint("run/model.pt")["config"]["detail_weight"] == 0.0


def test_the_advice_after_a_loss_that_is_not_finite_can_be_followed(train, monkeypatch, capsys):
    loss = ddpm.Diffusion.loss
    steps = iter(range(100))

    def not_finite_at_the_third(*args):
        return loss(*args) * (float("nan") if next(steps) == 2 else 1)

    monkeypatch.setattr(ddpm.Diffusion, "loss", not_finite_at_the_third)
    assert train("--steps 4 --precision bf16") == 1
    advice = re.search(r"(--resume \S+) and (--precision fp32) or a lower (--lr)", the_error(capsys))
    assert train(*advice.group(1, 2)) == 0
    monkeypatch.setattr(ddpm.Diffusion, "loss", loss)
    assert train(advice[1], advice[3], "1e-5") == 0


def test_a_finished_run_says_so_and_how_to_go_on(train, capsys):
    assert train() == 0
    Path("run/model.pt").unlink()  # as by a crash before it was written
    assert train("--resume --model_path run/model.pt") == 0
    assert "the run is finished. To train on, give a larger --steps" in capsys.readouterr().out
    assert checkpoint("run/model.pt")["step"] == 2
    assert train("--resume --model_path run/model.pt --steps 3") == 0
    assert "run is finished" not in capsys.readouterr().out


def test_a_run_from_pretrained_weights_resumes_without_them(train, monkeypatch):
    """They are in the checkpoint already, and a machine without a network could not resume."""
    pretrained = []
    build = ddpm.build_model

    def build_model(config, *args):
        pretrained.append(config.pretrained)
        return build(config, *args)

    monkeypatch.setattr(ddpm, "build_model", build_model)
    assert train("--pretrained --steps 1") == 0  # which is for resnet18, and expensive
    assert train("--resume --steps 2 --model_path run/model.pt") == 0
    assert pretrained == [True, False] and checkpoint("run/model.pt")["config"]["pretrained"]


@pytest.mark.parametrize(
    "environment, index",
    [({"LOCAL_RANK": "1"}, 0), ({"LOCAL_RANK": "1", "TORCHELASTIC_RUN_ID": "x"}, None)],
)
def test_the_only_gpu_that_a_process_sees_is_its_own(monkeypatch, environment, index):
    """Slurm can show each process one GPU; torchrun with too many processes is still told."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if index is None:
        with pytest.raises(ddpm.UserError, match="Process 1 has no GPU"):
            ddpm.choose_device("cuda")
    else:
        assert ddpm.choose_device("cuda") == torch.device("cuda", index)


def test_the_command_to_continue_can_be_pasted(train, monkeypatch, capsys):
    before_step(monkeypatch, 1, lambda: os.kill(os.getpid(), signal.SIGTERM))
    where = ["--model_path", "my models/m.pt"]
    assert ddpm.main([*words("--mode train", TINY, SMALL, "--data_path"), "D", *where]) == 1
    Path("D").mkdir()
    Image.new("RGB", (16, 16)).save("D/1.png")
    with pytest.raises(SystemExit):
        ddpm.main([*words("--mode train", TINY, SMALL, "--data_path"), "D", *where])
    command = capsys.readouterr().out.partition("To continue: ")[2].splitlines()[0]
    assert ddpm.main([*shlex.split(command), "--steps", "3"]) == 0


# ---- a sampling that goes on where it stopped


@pytest.fixture
def sample(main, trained, monkeypatch):
    """sample(*flags) samples in batches of two into out/ and returns the exit code; its plot is a
    dot."""
    monkeypatch.setattr(ddpm, "plot_rows", lambda rows, titles, path, *_: ddpm.save_png(DOT, path))
    flags = "--mode sample --sampling_steps 2 --sample_batch_size 2 --individual out --model_path"
    return lambda *more: main(flags, trained, *more)


class Stopped(Exception):
    pass


def count_batches(monkeypatch, stop_at=None):
    """The numbers of the images of each batch that is sampled from now on, in a list."""
    real = ddpm.generate
    batches = []

    def generate(model, diffusion, config, indices, *args):
        if len(batches) == stop_at:
            raise Stopped
        batches.append(list(indices))
        return real(model, diffusion, config, indices, *args)

    monkeypatch.setattr(ddpm, "generate", generate)
    return batches


def test_files_of_an_interpolation_are_not_taken_for_a_sampling(sample, monkeypatch):
    assert sample("--num_samples 7 --interpolate 5") == 0
    batches = count_batches(monkeypatch)
    assert sample("--num_samples 7") == 0
    assert batches == [[0, 1], [2, 3], [4, 5], [6]]


def test_images_are_written_as_they_are_made_and_a_second_start_goes_on(
    sample, monkeypatch, capsys
):
    assert sample("--num_samples 7") == 0
    whole = tree("out")
    grid = Path("samples/generated_sample.png").read_bytes()
    shutil.rmtree("out")
    with monkeypatch.context() as patch:
        count_batches(patch, stop_at=2)
        with pytest.raises(Stopped):
            sample("--num_samples 7")
    assert sorted(tree("out")) == [f"{i:05d}.png" for i in range(4)]
    batches = count_batches(monkeypatch)
    capsys.readouterr()
    assert sample("--num_samples 7") == 0
    assert batches == [[0, 1], [4, 5], [6]], "the first again, for its steps"
    assert "going on: 2 images are in out already" in capsys.readouterr().out
    assert tree("out") == whole and Path("samples/generated_sample.png").read_bytes() == grid


@pytest.mark.parametrize(
    "more", ("--seed 5", "--no_ema", "--sampler ddim", "--guidance 1", "--classes disc", "damaged")
)
def test_files_of_another_sampling_are_not_taken_for_ours(sample, monkeypatch, more):
    assert sample("--num_samples 4") == 0
    if more == "damaged":
        Path("out/00002.png").write_bytes(b"\x89PNG")
        Path("out/00003.png").write_bytes(b"")
        more = ""
    batches = count_batches(monkeypatch)
    assert sample("--num_samples 4", more) == 0
    assert batches == [[0, 1], [2, 3]]


def test_files_that_are_left_of_an_earlier_sampling_are_named(sample, capsys):
    assert sample("--num_samples 6") == 0
    Path("out/mine.png").write_bytes(b"")
    assert "left in" not in capsys.readouterr().out
    assert sample("--num_samples 3") == 0
    said = capsys.readouterr().out
    assert "3 files of an earlier sampling are left in out, such as 00003.png" in said


def test_a_sampling_keeps_only_what_it_shows(sample, monkeypatch):
    """The other images are in their files: the memory does not grow with their number."""
    shown = []
    real = ddpm.write_samples

    def write_samples(config, pixels, *args):
        shown.append(len(pixels))
        return real(config, pixels, *args)

    monkeypatch.setattr(ddpm, "write_samples", write_samples)
    monkeypatch.setattr(ddpm, "MAX_SHOWN", 3)
    assert sample("--num_samples 6") == 0
    assert shown == [3] and len(tree("out")) == 6


def test_a_sampling_says_that_its_grid_does_not_show_all(main, trained, monkeypatch, capsys):
    monkeypatch.setattr(ddpm, "MAX_SHOWN", 3)
    flags = "--mode sample --sampling_steps 2 --model_path"
    for more, is_said in ("--num_samples 4", True), ("--num_samples 3", False):
        assert main(flags, trained, more) == 0
        note = "note: the grid shows the first 3; for all, give --individual FOLDER"
        assert (note in capsys.readouterr().out) == is_said
    assert main(flags, trained, "--num_samples 4 --individual out") == 0
    assert "note" not in capsys.readouterr().out and len(tree("out")) == 4


def test_a_renamed_model_is_the_one_that_its_config_samples(trained, tmp_path, monkeypatch):
    """Also where a model of the name that it had in training is there too."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained, "renamed.pt")
    _, _, config = ddpm.load_model("renamed.pt")
    assert config.model_path == "renamed.pt"
    pixels = ddpm.sample(ddpm.override(config, num_samples=2, sampling_steps=2, samples_dir="s"))
    assert pixels.shape[2:] == (16, 16)


def test_the_function_returns_all_images(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ddpm, "MAX_SHOWN", 3)
    _, _, config = ddpm.load_model(trained)
    config = ddpm.override(config, model_path=str(trained), num_samples=5, samples_dir="s")
    assert len(ddpm.sample(config)) == 5
