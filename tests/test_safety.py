"""Safety, with the damage done for real: kills, full disks, signals, half files, names by
strangers."""

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ONE_THREAD,
    ROOT,
    TINY,
    Malicious,
    before_step,
    checkpoint,
    metrics,
    places,
    quick_python,
    slow,
    torchrun,
    tree,
    words,
)
from PIL import Image

import ddpm

HERE = Path(__file__).resolve().parent
NOBODY = 65534


@pytest.fixture
def train(main, image_folder, tmp_path):
    """train(*flags) trains a tiny model in tmp_path/run, saving at every step, and returns the exit
    code."""

    def run(*flags, data=image_folder):
        more = [] if "--resume" in words(*flags) else [TINY, "--steps 2 --save_every 1"]
        return main("--mode train", *more, *places(tmp_path / "run", data), *flags)

    return run


def steps(folder):
    names = [p.stem for p in Path(folder, "model.pt_steps").glob("step_*.pt")]
    return sorted(int(name[5:]) for name in names if name[5:].isdigit())


def models(folder):
    return {name: content for name, content in tree(folder).items() if ".pt" in name}


def half_files(folder):
    return [str(p) for p in Path(folder).rglob("*.tmp")]


def the_error(capsys):
    """What stderr ends with: one line that starts with error:."""
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: "), last
    return last


# ---- kill -9


@pytest.mark.parametrize("num_runs, kills, slow_kills", [(1, 6, 120), (2, 3, 40)])
def test_kill_nine_at_any_moment_loses_nothing(
    request, program, image_folder, record_property, num_runs, kills, slow_kills
):
    """After every kill all checkpoints load and none is lost; the end is that of an uninterrupted
    run. Two runs in one folder never write to each other's files."""
    if request.config.getoption("--slow"):
        kills = slow_kills
    memory = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # a kill spares the page cache
    flags = words(
        TINY,
        "--channel_mults 1 --attention none --steps 12 --save_every 1 --sample_every 5",
        "--dropout 0.2 --hflip --grad_accum 2 --optimizer adam --ema_decay 0.9 --lr 3e-3",
        "--warmup_steps 3 --data_path",
        image_folder,
    )
    with tempfile.TemporaryDirectory(dir=memory) as folder:
        arguments = [str(kills), "0", str(num_runs), folder, *flags]
        result = program(*arguments, file=HERE / "tools" / "killer.py", seconds=3000)
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    record_property("kills", report)
    print(report)
    assert report["killed"] == sum(report["places"].values()) >= kills
    assert len(report["places"]) >= min(kills // 2, 6), (
        "kills inside a save as well as at random moments"
    )
    assert report["finished"] == report["equal"] >= num_runs and report["halves"] > 0
    assert report["left"] == [] and report["foreign"] == []


# ---- no room, no right, no folder


@contextlib.contextmanager
def no_file_above(size):
    """No file can grow beyond so many bytes, as on a full disk, for root too."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("room", (10_000, 450_000), ids=["half a file", "the model, not the run"])
def test_no_room_for_a_checkpoint(train, tmp_path, capsys, room):
    assert train() == 0
    good = models(tmp_path)
    assert min(map(len, good.values())) < 450_000 < max(map(len, good.values()))
    with no_file_above(room):
        assert train("--resume --steps 4") == 1
    said = the_error(capsys)
    assert "File too large" in said and "Make room" in said and "safe" in said
    assert models(tmp_path) == good and not half_files(tmp_path)
    assert train("--resume --steps 4") == 0 and steps(tmp_path / "run") == [2, 3, 4], (
        "2 is the one resumed from"
    )


def test_no_room_for_the_cache(train, tmp_path, capsys):
    with no_file_above(10_000):
        assert train() == 1
    assert "Make room" in the_error(capsys) and not tree(tmp_path)
    assert train() == 0


def test_no_room_on_a_real_disk(train, tmp_path, capsys):
    """A disk of one megabyte: the cache of 24 images of 256x256 must not die of SIGBUS in
    mid-write."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True
    ).returncode:
        pytest.skip("no right to mount a file system")
    try:
        big = "--image_size 256 --patch 16"
        assert train("--download_dir", disk, big) == 1
        said = the_error(capsys)
        assert "No space left" in said and "Make room" in said and not tree(disk)
        assert (
            train("--model_path", disk / "model.pt", "--steps 3") == 1
        )  # 0.9 MB a step, 0.4 MB the model
        assert "No space left" in the_error(capsys) and not half_files(disk)
        files = list(disk.rglob("*.pt"))
        assert files and all(ddpm.read_checkpoint(f) for f in files)
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.fixture
def plain_user():
    """A folder of nobody's, and a context in which this process has no right to write elsewhere."""
    folder = Path(tempfile.mkdtemp())

    @contextlib.contextmanager
    def being():
        os.seteuid(NOBODY if os.geteuid() == 0 else os.geteuid())
        try:
            yield
        finally:
            os.seteuid(os.getuid())

    folder.chmod(0o755)
    yield folder, being
    shutil.rmtree(folder)


@pytest.mark.parametrize("flag", ("--model_path", "--samples_dir", "--download_dir"))
def test_a_folder_that_may_not_be_written_to(
    plain_user, main, image_folder, monkeypatch, capsys, flag
):
    """Said before the first step, not at the first save."""
    folder, being = plain_user
    shutil.copytree(image_folder, folder / "data")
    (folder / "data").chmod(0o755)
    for name in ("free", "locked"):
        (folder / name).mkdir()
    if os.geteuid() == 0:
        os.chown(folder / "free", NOBODY, -1)
    (folder / "locked").chmod(0o555)
    before_step(monkeypatch, 0, lambda: pytest.fail("a step was computed"))
    to = {"--model_path": "model.pt", "--samples_dir": "samples", "--download_dir": "d"}
    where = [
        word
        for k, v in to.items()
        for word in (k, folder / ("locked" if k == flag else "free") / v)
    ]
    before = tree(folder / "locked")
    with being():
        assert main("--mode train", TINY, "--steps 1 --data_path", folder / "data", *where) == 1
    said = the_error(capsys)
    assert "Permission denied" in said and str(folder / "locked") in said and "permit" in said
    assert tree(folder / "locked") == before and not half_files(folder)
    assert not list((folder / "free").rglob("*.pt"))


def test_folders_and_images_that_may_not_be_read(
    plain_user, main, image_folder, monkeypatch, capsys
):
    folder, being = plain_user
    shutil.copytree(image_folder, folder / "data")
    (folder / "data").chmod(0o755)
    (folder / "data" / "disc" / "0.png").chmod(0)
    (folder / "cache").mkdir()
    (folder / "cache").chmod(0o777)
    monkeypatch.chdir(folder)
    flags = words("--mode train --dry_run --download_dir cache --data_path", folder / "data", TINY)
    with being():
        assert ddpm.main(flags) == 0
    assert "disc/0.png" in capsys.readouterr().err
    (folder / "data" / "disc").chmod(0)
    with being():
        assert ddpm.main(flags) == 0
    said = capsys.readouterr().out
    assert "data/disc (Permission denied) cannot be read" in said, "no class goes without a word"
    (folder / "data").chmod(0)
    with being():
        assert ddpm.main(flags) == 1
    said = the_error(capsys)
    assert "data (Permission denied)" in said and "--samples_dir" not in said
    (folder / "data").chmod(0o755)
    (folder / "data" / "disc").chmod(0o755)


def test_the_folder_of_images_vanishes_and_is_made_again(train, tmp_path, monkeypatch):
    run = tmp_path / "run"
    before_step(monkeypatch, 2, lambda: shutil.rmtree(run / "samples"))
    assert train("--steps 5") == 0
    assert steps(run) == [4, 5] and list((run / "samples").glob("generated_epoch*.png"))
    assert [row["step"] for row in metrics(run / "samples")[1]] == [1, 2, 3, 4, 5]


def test_the_folder_of_models_vanishes_and_is_made_again(train, tmp_path, monkeypatch):
    run = tmp_path / "run"
    before_step(monkeypatch, 2, lambda: shutil.rmtree(run / "model.pt_steps"))
    assert train("--steps 5") == 0
    assert steps(run) == [4, 5] and all(ddpm.read_checkpoint(f) for f in run.rglob("*.pt"))


def test_a_file_takes_the_place_of_the_folder_of_models(train, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run" / "model.pt_steps"

    def replace():
        shutil.rmtree(folder)
        folder.write_text("mine")

    before_step(monkeypatch, 2, replace)
    assert train("--steps 5") == 1
    assert "model.pt_steps" in the_error(capsys) and folder.read_text() == "mine"
    assert ddpm.load_model(tmp_path / "run" / "model.pt") and not half_files(tmp_path)


def test_an_error_in_the_loop_starts_a_line_of_its_own(train, tmp_path, monkeypatch, capsys):
    before_step(monkeypatch, 1, lambda: (_ for _ in ()).throw(ddpm.UserError("stopped here.")))
    assert train() == 1
    assert capsys.readouterr().err.endswith("\nerror: stopped here.\n")


# ---- signals


def start(folder, *flags):
    """torchrun with two processes in a process group of its own, writing to folder/log."""
    command = [sys.executable, *torchrun(2), str(ROOT / "ddpm.py"), *words(*flags)]
    environment = os.environ | ONE_THREAD | quick_python() | {"PYTHONUNBUFFERED": "1"}
    log = open(folder / "log", "w")
    return subprocess.Popen(
        command, cwd=folder, stdout=log, stderr=log, env=environment, start_new_session=True
    )


def wait_for(process, condition, seconds=200):
    start_time = time.monotonic()
    while not condition():
        assert process.poll() is None and time.monotonic() - start_time < seconds, (
            "it ended, or took for ever"
        )
        time.sleep(0.05)


@pytest.mark.parametrize("what, code", [(signal.SIGTERM, 143), slow(signal.SIGINT, 130)])
def test_a_signal_while_sampling(background, trained, tmp_path, what, code):
    """The shortest way out: nothing is written but whole images, and it is no traceback."""
    flags = "--num_samples 100000 --sampling_steps 50 --sample_batch_size 8 --individual each"
    process = background("--mode sample --device cpu", flags, "--model_path", trained)
    wait_for(process, lambda: "step/s" in (tmp_path / "log").read_text())
    process.send_signal(what)
    assert process.wait(60) == code
    assert "Traceback" not in (tmp_path / "log").read_text()
    others = [name for name in tree(tmp_path) if name != "log"]
    assert all(Image.open(tmp_path / name).size == (16, 16) for name in others)
    assert {Path(name).parent for name in others} <= {Path("each")}


@pytest.mark.parametrize("what, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_while_a_preview_is_sampled(train, tmp_path, monkeypatch, what, code):
    """The preview is finished, the state is saved after at most one more step, and the run can be
    resumed."""
    real, sampled = ddpm.generate, []

    def generate(*args, **kwargs):
        for i, item in enumerate(real(*args, **kwargs)):
            sampled.append(i)
            if i == 2:
                os.kill(os.getpid(), what)
            yield item

    with monkeypatch.context() as patch:
        patch.setattr(ddpm, "generate", generate)
        assert train("--steps 9 --save_every 100 --sample_every 3 --sampling_steps 40") == code
    assert sampled == list(range(40)) and steps(tmp_path / "run") in ([3], [3, 4])
    assert len(list((tmp_path / "run" / "samples").glob("generated_epoch*.png"))) == 1
    assert train("--resume") == 0 and steps(tmp_path / "run")[-1] == 9


def test_a_second_ctrl_c_quits_at_once(background, image_folder, tmp_path):
    """The first one comes in a step that would take for ever; what was saved before stays whole."""
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import sys, time, ddpm\nreal = ddpm.Images.batch\n"
        "def batch(self, step, *args, **kwargs):\n"
        "    while step == 3: print('in the step', flush=True); time.sleep(0.1)\n"
        "    return real(self, step, *args, **kwargs)\n"
        "ddpm.Images.batch = batch\nraise SystemExit(ddpm.main(sys.argv[1:]))\n"
    )
    flags = ["--mode train", TINY, "--steps 9 --save_every 1 --data_path", image_folder]
    process = background(*flags, file=slow, PYTHONPATH=str(ROOT))
    log = tmp_path / "log"
    wait_for(process, lambda: "in the step" in log.read_text())
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first one waits for the end of the step"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == 130
    files = list((tmp_path / "saved_models").rglob("*.pt"))
    assert (
        files
        and max(checkpoint(f)["step"] for f in files) == 3
        and "Traceback" not in log.read_text()
    )


@pytest.mark.parametrize(
    "way",
    [
        "Ctrl-C",
        pytest.param("SIGTERM", marks=pytest.mark.slow),
        pytest.param("one", marks=pytest.mark.slow),
    ],
)
def test_several_processes_stop_on_the_same_step(train, image_folder, tmp_path, way):
    """Ctrl-C reaches the group, and the launcher passes it on; SIGTERM comes to the launcher or one
    process. If they stopped on different steps, they would wait for each other for ever."""
    run = tmp_path / "run"
    more = "--steps 100000 --save_every 100000 --log_every 10 --device cpu"
    process = start(tmp_path, "--mode train", TINY, more, *places(run, image_folder))
    metrics = run / "samples" / "metrics.jsonl"
    wait_for(process, lambda: metrics.exists() and metrics.read_text().count('"loss"') >= 2)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    if way == "Ctrl-C":
        os.killpg(process.pid, signal.SIGINT)
    elif way == "SIGTERM":
        process.terminate()
    else:
        os.kill(int(children.stdout.split()[-1]), signal.SIGTERM)
    try:
        assert process.wait(60) != 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    log = (tmp_path / "log").read_text()
    assert log.count("and saved. To continue: --mode train --resume --model_path") == 1, log
    (last,) = steps(run)
    assert last >= 10
    assert train("--resume --grad_accum 2 --steps", last + 2) == 0 and steps(run)[-1] == last + 2


# ---- resuming from what is there


def test_a_new_checkpoint_is_not_rotated_away_by_a_later_one_of_another_branch(
    train, tmp_path, capsys
):
    assert train("--steps 8 --keep_last 9") == 0
    folder = tmp_path / "run" / "model.pt_steps"
    assert train("--resume", folder / "step_00000004.pt", "--steps 6 --keep_last 2") == 0
    assert steps(tmp_path / "run") == [4, 5, 6], "4 is the one resumed from"
    kept = sorted(p.name for p in folder.glob("*.previous"))
    assert kept == [f"step_{n:08d}.pt.previous" for n in (5, 6, 7, 8)]
    assert "step_00000008.pt.previous" in capsys.readouterr().out
    assert train("--resume --steps 7") == 0 and steps(tmp_path / "run")[-1] == 7


def test_an_unreadable_latest_checkpoint_does_not_cost_the_new_ones(train, tmp_path):
    assert train("--steps 4 --keep_last 1") == 0
    torn = tmp_path / "run" / "model.pt_steps" / "step_00000009.pt"
    torn.write_bytes(b"torn")
    assert train("--resume --steps 6") == 0
    assert steps(tmp_path / "run") == [4, 6] and Path(f"{torn}.previous").read_bytes() == b"torn"


def test_half_files_of_a_crash_are_cleared_away_and_others_are_not(train, tmp_path):
    assert train() == 0
    run = tmp_path / "run"
    ours = [run / ".model.pt.123.tmp", run / "model.pt_steps" / ".step_00000009.pt.123.tmp"]
    others = [run / ".other.pt.123.tmp", run / "notes.tmp", run / "model.pt_steps" / "notes.tmp"]
    for file in ours + others:
        file.write_bytes(b"half")
    assert train("--resume --steps 3") == 0
    assert [f.exists() for f in ours + others] == [False] * 2 + [True] * 3


@pytest.mark.parametrize(
    "end", (b'{"step": 2, "lo', b"\x00" * 500, b"\xff\xfe\x80", b"[1]\n5\n", b'{"a": 1}\n')
)
def test_metrics_that_a_crash_spoiled_do_not_stop_a_resume(train, tmp_path, end):
    assert train() == 0
    file = tmp_path / "run" / "samples" / "metrics.jsonl"
    file.write_bytes(file.read_bytes() + end)
    assert train("--resume --steps 4") == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()[1:]]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]


# ---- never silently wrong


def test_weights_that_overflow_while_the_loss_is_finite_are_not_saved(
    train, tmp_path, monkeypatch, capsys
):
    """Norms and unused rows can hide an overflow from the loss. Here a step spoils one row of the
    labels."""
    real, calls = ddpm.update_ema, []

    def update_ema(ema, weights, *args):
        calls.append(1)
        if len(calls) == 3:
            next(w for w in weights if len(w) == 4)[0, 0] = float("inf")  # three classes and none
        return real(ema, weights, *args)

    monkeypatch.setattr(ddpm, "update_ema", update_ema)
    assert train("--steps 3") == 1
    said = the_error(capsys)
    assert (
        "Non-finite weights, not saved, at step 3" in said
        and "step_00000002.pt" in said
        and "lower --lr" in said
    )
    assert steps(tmp_path / "run") == [1, 2] and ddpm.load_model(tmp_path / "run" / "model.pt")


@pytest.mark.parametrize("kind", ("weights", "ema"))
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize(
    "use", ("--mode sample --model_path", "--mode train --init_from", "--mode train --resume")
)
def test_weights_that_are_not_finite_are_never_loaded(
    train, main, tmp_path, capsys, kind, value, use
):
    assert train() == 0
    source = tmp_path / "run" / "model.pt_steps" / "step_00000002.pt"
    saved = checkpoint(source)
    saved[kind]["conv_in.weight"].view(-1)[5] = value
    torch.save(saved, tmp_path / "bad.pt")
    before = tree(tmp_path)
    assert main(use, tmp_path / "bad.pt") == 1
    said = the_error(capsys)
    assert (
        "bad.pt" in said
        and "not finite" in said
        and "use another" in said
        and tree(tmp_path) == before
    )


STORED = HERE / "checkpoint_format_1.pt"


def test_a_checkpoint_of_format_1_still_loads_and_samples_the_same_images(tmp_path):
    """File and images were made when format 1 was new: they have to come back, to one grey
    level."""
    expected = np.asarray(Image.open(STORED.with_suffix(".png")))
    settings = dict(
        model_path=str(STORED), samples_dir=str(tmp_path), num_samples=6, sampler="ddim", seed=7
    )
    samples = ddpm.sample(
        ddpm.preset(
            "animals",
            **settings,
            sampling_steps=8,
            spacing="uniform",
            guidance=1.5,
            device="cpu",
            precision="fp32",
        )
    )
    row = np.concatenate(list(samples.permute(0, 2, 3, 1).numpy()), axis=1)
    assert row.shape == expected.shape and expected.std() > 30
    assert np.abs(row.astype(int) - expected).max() <= 1
    stored = ddpm.read_checkpoint(STORED)
    assert stored["classes"] == ["disc", "square", "stripes"]
    own = ddpm.stored_config(stored, STORED)
    assert (own.sampler, own.spacing, own.guidance) == ("ddpm", "uniform", 2.0)
    assert own.min_snr == own.detail_weight == 0


def test_a_run_of_the_old_program_is_opened_and_resumed(train, tmp_path):
    """Its fingerprint says "N pictures, N bad"; the same images are meant, and no other number of
    them."""
    assert train("--steps 4") == 0
    whole = checkpoint(tmp_path / "run" / "model.pt")
    new = tmp_path / "run" / "model.pt_steps" / "step_00000003.pt"
    saved = checkpoint(new)
    old = saved["data"].replace(" images,", " pictures,").replace(" unreadable,", " bad,")
    assert re.search(r"24 pictures, .*0 bad,", old) and old != saved["data"]
    torch.save(saved | {"data": old}, tmp_path / "old.pt")
    assert ddpm.read_checkpoint(tmp_path / "old.pt")["data"] == saved["data"]
    assert train("--resume", tmp_path / "old.pt", "--steps 4") == 0
    again = checkpoint(tmp_path / "run" / "model.pt")
    assert again["data"] == whole["data"] and again["step"] == 4
    assert all(torch.equal(again[k][n], v) for k in ("weights", "ema") for n, v in whole[k].items())
    torch.save(saved | {"data": old.replace("24 pictures", "23 pictures")}, tmp_path / "other.pt")
    assert train("--resume", tmp_path / "other.pt", "--steps 5") == 1


def test_a_checkpoint_of_another_format_says_so(main, tmp_path, capsys):
    torch.save(checkpoint(STORED) | {"format": 2}, tmp_path / "new.pt")
    assert main("--mode sample --model_path new.pt") == 1
    said = the_error(capsys)
    assert "new.pt has format 2" in said and "reads format 1" in said and "use the version" in said


# ---- safe by default


def test_nothing_in_the_sources_runs_what_it_reads():
    for file in ROOT.glob("*.py"):
        text = file.read_text()
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, f"{file.name}: {call}"
        danger = r"(?<![.\w])(eval|exec|compile|__import__)\(|os\.(system|popen)\(|"
        danger += r"shell=True|allow_pickle=True|"
        danger += r"\bimport (pickle|marshal|shelve|dill|subprocess)|yaml\.load|torch\.hub\.load\("
        assert not re.search(danger, text), f"{file.name}: {re.search(danger, text)[0]}"


@pytest.mark.parametrize(
    "use", ("--mode sample --model_path", "--mode train --init_from", "--mode train --resume")
)
@pytest.mark.parametrize("place", ("extra", "config", "classes", "weights"))
def test_a_checkpoint_that_would_run_code_is_refused(main, tmp_path, capsys, place, use):
    torch.save(checkpoint(STORED) | {place: Malicious(tmp_path / "pwned")}, tmp_path / "bad.pt")
    before = tree(tmp_path)
    assert main(use, "bad.pt") == 1
    said = the_error(capsys)
    assert (
        "bad.pt cannot be read safely" in said
        and "Use another" in said
        and tree(tmp_path) == before
    )


NASTY = [
    "../../outside",
    "/absolute",
    "\x1b[2J\x1b]0;owned\x07",
    "a\nerror: b\r",
    "$(touch pwned)",
    "\u202etxt.exe",
]


def test_names_in_a_checkpoint_reach_no_path_and_no_terminal(main, tmp_path, capsys):
    """Names of classes, the data's path and the folder of single images, as a stranger may choose
    them."""
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    os.chdir(inner)
    saved = checkpoint(STORED)
    rows = torch.randn(len(NASTY) + 1, saved["ema"]["embed.labels.weight"].shape[1])
    for kind in ("weights", "ema"):
        saved[kind]["embed.labels.weight"] = rows
    config = saved["config"] | dict(
        data_path="x\x1b[31m", individual="../outside", gif=False, samples_dir="../outside"
    )
    torch.save(saved | dict(classes=NASTY, config=config), "model.pt")
    base = "--mode sample --model_path model.pt --num_samples 6 --sampling_steps 2 --device cpu"
    assert main(base, "--individual each") == 0
    assert main(base) == 0
    assert main(base, "--classes unicorn") == 1
    written = {name for name in tree(tmp_path) if "each" not in name}
    assert written == {
        f"a/b/{n}"
        for n in ("model.pt", "samples/generated_sample.png", "samples/denoising_steps.png")
    }
    assert sorted(os.listdir("each")) == [f"{i:05d}.png" for i in range(6)]
    out, err = capsys.readouterr()
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u202e]", out + err.split("error:")[1])
    assert (
        r"\x1b[2J" in err
        and r"\nerror: b" in err
        and err.strip().splitlines()[-1].startswith("error: --classes")
    )


def test_names_of_classes_reach_no_terminal_in_training(train, tmp_path, capsys):
    for name in ("\x1b[2J\x07", "two\nlines", "ünï ☃", os.fsdecode(b"caf\xe9")):
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16), (9, 9, 9)).save(tmp_path / "data" / name / "p.png")
    assert train(data=tmp_path / "data") == 0
    out = capsys.readouterr().out
    assert (
        r"\x1b[2J\x07 1" in out
        and r"two\nlines 1" in out
        and "ünï ☃ 1" in out
        and r"caf\udce9 1" in out
    )
    assert (
        "\x1b" not in out
        and len(ddpm.load_model(tmp_path / "run" / "model.pt")[0].class_names) == 4
    )
    assert train("--resume --steps 3", data=tmp_path / "data") == 0


def test_a_terminal_without_the_letters_of_a_name_is_no_reason_to_stop(
    program, image_folder, tmp_path, monkeypatch
):
    shutil.copytree(image_folder, tmp_path / "data")
    (tmp_path / "data" / "disc").rename(tmp_path / "data" / "żółw")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    result = program("--mode train --dry_run --data_path data", TINY)
    assert result.returncode == 0, result.stderr
    assert r"\u017c\xf3\u0142w 8" in result.stdout


@pytest.mark.parametrize("mask, expected", [(0o022, 0o644), (0o027, 0o640)])
def test_files_have_the_rights_that_the_umask_leaves(train, main, tmp_path, mask, expected):
    before = os.umask(mask)
    try:
        assert train("--sample_every 1") == 0
        assert (
            main(
                "--mode sample --num_samples 1 --sampling_steps 1 --gif --model_path",
                tmp_path / "run" / "model.pt",
            )
            == 0
        )
    finally:
        os.umask(before)
    modes = {str(p): p.stat().st_mode & 0o777 for p in tmp_path.rglob("*") if p.is_file()}
    assert set(modes.values()) == {expected} and any("decoded" in name for name in modes), modes


def test_a_copy_of_a_checkpoint_with_a_name_of_its_own_is_no_step_of_the_run(train, tmp_path):
    """It is not taken for the latest, and neither removed nor counted by --keep_last."""
    assert train() == 0
    folder = tmp_path / "run" / "model.pt_steps"
    for name in ("step_00000002_good.pt", "step_best.pt"):
        shutil.copy(folder / "step_00000001.pt", folder / name)
    own = tree(folder)["step_best.pt"]
    assert train("--resume --steps 4 --keep_last 1") == 0
    assert steps(tmp_path / "run") == [2, 4]  # which it began from, and the last
    assert tree(folder)["step_best.pt"] == tree(folder)["step_00000002_good.pt"] == own


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(
    train, tmp_path, monkeypatch, capsys
):
    """Nor is an earlier one taken instead of it, after which it would be set aside."""
    assert train() == 0
    newest = tmp_path / "run" / "model.pt_steps" / "step_00000002.pt"
    before = tree(tmp_path)
    real = zipfile.ZipFile

    def opened(path):
        if Path(path) == newest:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(zipfile, "ZipFile", opened)
    assert train("--resume --steps 4") == 1
    said = the_error(capsys)
    assert "Permission denied" in said and newest.name in said and "damaged" not in said
    assert tree(tmp_path) == before


def test_a_run_that_ended_before_its_first_checkpoint_leaves_nothing_to_set_aside(
    train, tmp_path, monkeypatch, capsys
):
    with monkeypatch.context() as patch:
        before_step(patch, 0, lambda: pytest.fail("here"))
        for _ in range(2):
            with pytest.raises(pytest.fail.Exception):
                train()
    assert not list((tmp_path / "run" / "model.pt_steps").iterdir())
    capsys.readouterr()
    assert train() == 0
    assert "earlier model.pt_steps" not in capsys.readouterr().out
    assert not list((tmp_path / "run").glob("*.previous*"))


def test_a_damaged_line_in_the_metrics_costs_no_other(train, tmp_path):
    """As a disk that was full for a moment leaves it: a row cut short, and the next behind it."""
    assert train("--steps 3 --log_every 1") == 0
    path = tmp_path / "run" / "samples" / "metrics.jsonl"
    head, first, second, *rest = path.read_text().splitlines()
    path.write_text("\n".join([head, first[:20] + second, *rest]) + "\n")
    assert train("--resume --steps 4") == 0
    _, rows = metrics(path.parent)
    assert [row["step"] for row in rows] == [3, 4]


# ---- the cache of decoded images


@pytest.fixture
def cached(image_folder, tmp_path):
    """load() decodes through a cache in tmp_path; with the right pixels, and the two files of the
    cache."""
    settings = dict(data_path=str(image_folder), image_size=16, download_dir=str(tmp_path / "d"))
    elsewhere = settings | dict(download_dir=str(tmp_path / "elsewhere"))
    right = ddpm.load_images(ddpm.preset("animals", **elsewhere)).pixels.clone()
    shutil.rmtree(tmp_path / "elsewhere")

    def load(**more):
        return ddpm.load_images(ddpm.preset("animals", **settings | more)).pixels

    assert torch.equal(load(), right)
    (pixels,), (reasons,) = (
        list((tmp_path / "d" / ".decoded").glob(f"*.{kind}")) for kind in ("npy", "json")
    )
    return load, right, pixels, reasons


@pytest.mark.parametrize(
    "damage",
    [
        "no npy",
        "no json",
        "neither",
        "empty npy",
        "cut header",
        "cut pixels",
        "empty json",
        "cut json",
        "text npy",
    ],
)
def test_a_damaged_cache_is_decoded_anew(cached, damage):
    load, right, pixels, reasons = cached
    kind, file = damage.split()[0], reasons if "json" in damage else pixels
    if kind in ("no", "neither"):
        file.unlink()
        reasons.unlink(missing_ok=kind == "no" and file == reasons) if kind == "neither" else None
    else:
        whole = file.read_bytes()
        parts = {
            "empty npy": b"",
            "empty json": b"",
            "cut header": whole[:50],
            "cut pixels": whole[:-99],
        }
        file.write_bytes(parts.get(damage, b"{" if file == reasons else b"no array at all"))
    assert torch.equal(load(), right)
    assert sorted(p.name for p in pixels.parent.iterdir()) == sorted([pixels.name, reasons.name])
    np.testing.assert_array_equal(np.load(pixels), right.numpy())


def test_the_second_start_reads_the_cache_and_decodes_nothing(cached, monkeypatch):
    load, right, pixels, reasons = cached
    before = [(f.read_bytes(), f.stat().st_mtime_ns) for f in (pixels, reasons)]
    monkeypatch.setattr(ddpm, "decode", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(load(), right)
    assert before == [(f.read_bytes(), f.stat().st_mtime_ns) for f in (pixels, reasons)]


def test_two_folders_with_the_same_names_sizes_and_times_have_caches_of_their_own(cached, tmp_path):
    """Bitmaps of one size have one length, and unpacked archives often one time."""
    load = cached[0]
    for name, colour in (("a", (255, 0, 0)), ("b", (0, 0, 255))):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), colour).save(tmp_path / name / "0.bmp")
        os.utime(tmp_path / name / "0.bmp", ns=(10**18, 10**18))
    assert load(data_path=str(tmp_path / "a"))[0, 0].min() == 255
    assert load(data_path=str(tmp_path / "b"))[0, 0].max() == 0


def test_an_image_that_has_become_readable_is_read(cached, image_folder, tmp_path, monkeypatch):
    """Its size and time of change are the same, as after a change of its permissions."""
    folder = tmp_path / "data"
    shutil.copytree(image_folder, folder)
    locked = next(folder.rglob("*.png"))
    real = ddpm.open_image

    def open_image(path):
        if path == locked:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    settings = ddpm.preset(
        "animals", data_path=str(folder), image_size=16, download_dir=str(tmp_path / "d")
    )
    with monkeypatch.context() as patch:
        patch.setattr(ddpm, "open_image", open_image)
        assert ddpm.load_images(settings).num_unreadable == 1
    locked.chmod(0o600)
    assert ddpm.load_images(settings).num_unreadable == 0


def test_an_image_replaced_by_one_of_its_size_and_time_is_decoded_anew(cached, tmp_path):
    load = cached[0]
    path = tmp_path / "one" / "0.bmp"
    path.parent.mkdir()
    for colour, channel in (((255, 0, 0), 0), ((0, 0, 255), 2)):
        Image.new("RGB", (16, 16), colour).save(path)
        os.utime(path, ns=(10**18, 10**18))
        assert load(data_path=str(path.parent))[0, channel].min() == 255


def test_machines_with_equal_process_numbers_do_not_decode_into_one_file(
    cached, tmp_path, monkeypatch
):
    """Two containers with one shared folder: each is the process of number 1 in its own."""
    load, right, pixels, reasons = cached
    pixels.unlink()
    monkeypatch.setattr(os, "getpid", lambda: 1)
    real, waiting = ddpm.new_pixel_file, []

    def new_pixel_file(path, shape):
        opened = real(path, shape)
        if not waiting:  # the other one comes while this one has its file open
            waiting.append(path)
            assert torch.equal(load(), right)
        return opened

    monkeypatch.setattr(ddpm, "new_pixel_file", new_pixel_file)
    assert torch.equal(load(), right) and waiting
    assert sorted(p.name for p in pixels.parent.iterdir()) == sorted([pixels.name, reasons.name])


def test_ctrl_c_does_not_wait_for_all_images_to_be_decoded():
    done = []

    def work(row):
        if row == 100:  # all have been submitted
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        done.append(row)

    with pytest.raises(KeyboardInterrupt):
        ddpm.for_each_row(work, range(1000), "decoding")
    assert len(done) < 500


def test_an_interrupted_decoding_leaves_nothing_behind(cached, tmp_path, monkeypatch):
    load, right, pixels, reasons = cached
    pixels.unlink()
    reasons.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            ddpm, "decode", lambda *_: os.kill(os.getpid(), signal.SIGINT) or time.sleep(0.01)
        )
        with pytest.raises(KeyboardInterrupt):
            load()
            time.sleep(1)
    assert not tree(tmp_path / "d") and torch.equal(load(), right)


@pytest.mark.parametrize(
    "name, value",
    [
        ("vocabulary", None),
        ("examples", 5),
        ("vocabulary", ["word"]),  # and no examples
        ("weights", torch.zeros(2, 2).to_sparse()),
        ("weights", torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8)),
        ("weights", torch.zeros(2, device="meta")),
    ],
)
def test_a_checkpoint_of_other_kinds_of_values_is_refused(trained, tmp_path, name, value):
    saved = checkpoint(trained)
    if name == "weights":
        value = saved["weights"] | {next(iter(saved["weights"])): value}
    torch.save(saved | {name: value}, tmp_path / "other.pt")
    with pytest.raises(ddpm.UserError, match="use another|Use another"):
        ddpm.read_checkpoint(tmp_path / "other.pt")


@pytest.mark.parametrize(
    "strange, said",
    [
        (dict(model_path=5), "Use another"),
        (dict(samples_dir=None), "Use another"),
        (dict(of_next_year=1), "Use a newer one"),
    ],
)
def test_a_step_checkpoint_with_strange_settings_is_not_passed_over(
    main, image_folder, tmp_path, capsys, strange, said
):
    """It is whole: going on from the one before would undo steps that a newer version made."""
    to = places(tmp_path / "run", image_folder)
    assert main("--mode train", TINY, "--steps 2 --save_every 1", *to) == 0
    last = max(tmp_path.glob("run/model.pt_steps/*.pt"))
    saved = checkpoint(last)
    saved["config"] |= strange
    torch.save(saved, last)
    before = tree(tmp_path)
    assert main("--mode train --resume --steps 3 --model_path run/model.pt") == 1
    message = capsys.readouterr().err
    assert last.name in message and said in message and tree(tmp_path) == before


def test_a_step_checkpoint_without_model_path_is_resumed_where_it_is(main, image_folder, tmp_path):
    to = places(tmp_path / "run", image_folder)
    assert main("--mode train", TINY, "--steps 2", *to) == 0
    [last] = tmp_path.glob("run/model.pt_steps/*.pt")
    saved = checkpoint(last)
    del saved["config"]["model_path"]
    torch.save(saved, last)
    assert main("--mode train --steps 3 --device cpu --resume", last) == 0
    assert checkpoint(tmp_path / "run" / "model.pt")["step"] == 3


def test_damaged_files_beside_a_run_do_not_stop_it(main, image_folder, tmp_path):
    to = places(tmp_path / "run", image_folder)
    assert main("--mode train", TINY, "--steps 2", *to) == 0
    for about in tmp_path.glob("run/data/.decoded/*.json"):
        about.write_text("{}")
    lock = tmp_path / "run" / ".model.pt.lock"
    lock.write_bytes(b"\xff\xfe")
    os.utime(lock, (0, 0))  # or another machine could hold it
    for damaged in ('{"config": 5}', "[" * 100_000, '{"config": {"model_path": 5}}'):
        metrics = tmp_path / "run" / "samples" / "metrics.jsonl"
        metrics.write_text(damaged + "\n")
        assert main("--mode train --resume --steps 4 --device cpu --model_path run/model.pt") == 0
        shutil.rmtree(tmp_path / "run" / "samples" / "previous", ignore_errors=True)


def test_a_slash_at_the_end_of_a_file_is_no_damage(trained):
    assert ddpm.read_checkpoint(f"{trained}/")["classes"]


def test_a_size_of_the_world_without_torchrun_is_a_sentence(main, image_folder, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert main("--mode train", TINY, "--data_path", image_folder) == 1
    assert "unset WORLD_SIZE" in capsys.readouterr().err
