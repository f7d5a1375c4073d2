"""Kills training with SIGKILL again and again and resumes it: test_safety.py runs it as a program
of its own.

    python killer.py KILLS SEED FOLDER FLAG...   prints JSON: how many kills, where, what came of it

It imports ddpm once and forks a process for every start of the command line, so that a start takes
a fraction of a second. Half of the kills come from here at a random moment; the other half a
process sends to itself at a named place inside a save."""

import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from conftest import ROOT  # noqa: F401  (puts the program on the path)
from matplotlib.figure import Figure
from PIL import Image

import ddpm

# Where in a save a process can kill itself: after so many bytes of the file, before fsync, before
# and after the rename, between the step checkpoint and the model, and in the middle of the
# rotation.
PLACES = ("bytes", "fsync", "rename", "renamed", "model", "rotation")


FLAGS = (
    os.WEXITED | os.WNOHANG | os.WNOWAIT
)  # look whether a process has ended, and leave it as it is


def start(argv, log):
    """Fork a process that runs the command line; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        code = ddpm.main(argv)
    except SystemExit as e:
        code = e.code
    finally:
        os._exit(code)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def arm(place, rng):
    """Have this process kill itself at that place in one of the next few saves."""
    left = [int(rng.integers(1, 4))]

    def due():
        left[0] -= 1
        return left[0] == 0

    replace, fsync, unlink, save = os.replace, os.fsync, Path.unlink, torch.save

    def patched_replace(a, b):
        ours = str(b).endswith(".pt")
        if ours and (
            place == "rename" and due() or place == "model" and "step_" not in str(b) and due()
        ):
            die()
        replace(a, b)
        if ours and place == "renamed" and due():
            die()

    def patched_fsync(fd):
        if place == "fsync" and due():
            die()
        fsync(fd)

    def patched_unlink(self, *args, **kwargs):
        old = self.suffix == ".pt"
        if old and place == "rotation" and due():
            die()
        unlink(self, *args, **kwargs)

    def patched_save(what, file):
        if place == "bytes" and due():
            real, until = file.write, int(rng.integers(1, 60_000))

            class Dying:
                def write(self, data):
                    if file.tell() + len(data) > until:
                        real(bytes(data)[: max(until - file.tell(), 0)])
                        file.flush()
                        die()
                    return real(data)

                def flush(self):
                    file.flush()

            save(what, Dying())
            die()
        save(what, file)

    os.replace, os.fsync, Path.unlink, torch.save = (
        patched_replace,
        patched_fsync,
        patched_unlink,
        patched_save,
    )


def steps_of(folder):
    """The step checkpoints of the run, all of which have to be loadable: {step: checkpoint}."""
    found = {}
    for file in sorted((folder / "model.pt_steps").glob("step_*.pt")):
        found[int(file.stem[5:])] = ddpm.read_checkpoint(file)
    return found


def state(checkpoint):
    return {k: checkpoint[k] for k in ("step", "weights", "ema", "optimizer", "scaler", "data")}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def finish(argv, folder, log):
    """Run to the end; the last state, and the seconds that it took."""
    start_time = time.monotonic()
    _, status = os.waitpid(start(argv, log), 0)
    assert os.waitstatus_to_exitcode(status) == 0, Path(log).read_text()
    return state(steps_of(folder)[max(steps_of(folder))]), time.monotonic() - start_time


def main(kills, seed, folder, flags):
    rng, folder = np.random.default_rng(seed), Path(folder)
    Figure.savefig = lambda self, file, **_: Image.new("L", (1, 1)).save(
        file, "PNG"
    )  # or plots take longest
    torch.set_num_threads(1)
    log = str(folder / "log")

    def places(name):
        return [
            "--model_path",
            f"{folder}/{name}/model.pt",
            "--samples_dir",
            f"{folder}/{name}/samples",
        ]

    whole, seconds = finish(["--mode", "train", *flags, *places("whole")], folder / "whole", log)
    run, report = (
        folder / "run",
        dict(killed=0, finished=0, equal=0, halves=0, started=0, places={}),
    )
    while report["killed"] < kills:
        before = max(steps_of(run), default=0)
        argv = ["--mode", "train", *(["--resume"] if before else flags), *places("run")]
        place = "moment" if report["killed"] % 2 else PLACES[report["killed"] // 2 % len(PLACES)]
        report["started"], start_time = report["started"] + 1, time.monotonic()
        if place == "moment":
            until, pid = start_time + rng.uniform(0, seconds), start(argv, log)
            while time.monotonic() < until and not os.waitid(os.P_PID, pid, FLAGS):
                time.sleep(0.002)
            os.kill(pid, signal.SIGKILL)  # of one that has ended it does nothing
        else:
            kept = os.replace, os.fsync, Path.unlink, torch.save
            arm(place, rng)
            pid = start(argv, log)
            os.replace, os.fsync, Path.unlink, torch.save = kept
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (-signal.SIGKILL, 0), Path(log).read_text()
        report["halves"] += any(run.rglob(".*.pt.*.tmp"))
        found = steps_of(run)  # raises for one that cannot be loaded
        assert max(found, default=0) >= before, "a step that was safe is gone"
        if (run / "model.pt").exists():
            ddpm.load_model(run / "model.pt")
        if code == 0:  # it came to its end first
            seconds = min(seconds, time.monotonic() - start_time)
            report["finished"] += 1
            report["equal"] += same(state(found[max(found)]), whole)
            shutil.rmtree(run)
        else:
            report["killed"] += 1
            report["places"][place] = report["places"].get(place, 0) + 1
    last, _ = finish(
        ["--mode", "train", *(["--resume"] if steps_of(run) else flags), *places("run")], run, log
    )
    report["finished"] += 1
    report["equal"] += same(last, whole)
    report["left"] = [str(p) for p in run.rglob("*.pt*.tmp")]
    print(json.dumps(report))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4:])
