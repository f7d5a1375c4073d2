"""Kills training with SIGKILL again and again and resumes it: test_safety.py runs it as a program
of its own.

    python killer.py KILLS SEED RUNS FOLDER FLAG...   prints JSON: how many kills, where, what came
    of it, and which files of one run another has written to

RUNS is 1, or 2 for two models that are trained at the same time in one folder, from the same images.
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
from conftest import DOTS  # which puts the program on the path, too

import ddpm

# Where in a save a process can kill itself: after so many bytes of the file, before fsync, before
# and after the rename, between the step checkpoint and the model, and in the middle of the
# rotation.
PLACES = ("bytes", "fsync", "rename", "renamed", "model", "rotation")

NAMES = ("run", "run.pt.other")  # of the models, less .pt: one begins as files of the other do


def start(argv, run):
    """Fork a process that runs the command line for a Run; its number."""
    pid = os.fork()
    if pid:
        return pid
    code = 99
    try:
        watch(run.name, run.folder, run.folder.with_name("foreign"))
        sink = os.open(run.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
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


def watch(owner, folder, log):
    """Note in a file what this process writes to below the folder that is another run's."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event, args):
        paths = args[:1] if event in ("open", "os.remove", "os.rmdir", "os.utime") else ()
        if event == "open" and not args[2] & writing:
            return
        for path in args[:2] if event == "os.rename" else paths:
            if isinstance(path, str | os.PathLike) and owner_of(path, folder) not in (owner, None):
                with open(log, "a") as file:
                    print(owner, event, path, file=file)

    sys.addaudithook(hook)


def owner_of(path, folder):
    """Which run a path is of, by its name; None: of none."""
    path = Path(os.path.abspath(path))
    if not path.is_relative_to(folder) or path == folder:
        return None
    top = path.relative_to(folder).parts[0].lstrip(".")
    return max((name for name in NAMES if top.startswith(name)), key=len, default=None)


def state(checkpoint):
    return {k: checkpoint[k] for k in ("step", "weights", "ema", "optimizer", "scaler", "data")}


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


class Run:
    """A training in a folder that others are in too."""

    def __init__(self, folder, name, flags):
        self.folder = folder
        self.name = name
        self.flags = flags
        self.log = str(folder.with_name(f"{name}.log"))
        self.pid = None

    def steps(self):
        """Its step checkpoints, all of which have to be loadable: {step: checkpoint}."""
        files = sorted((self.folder / f"{self.name}.pt_steps").glob("step_*.pt"))
        return {int(file.stem[5:]): ddpm.read_checkpoint(file) for file in files}

    def files(self):
        return [path for path in self.folder.iterdir() if owner_of(path, self.folder) == self.name]

    def halves(self):
        """Files of checkpoints that are half written."""
        files = [file for top in self.files() for file in (top, *top.rglob(".*"))]
        return [str(file) for file in files if ".pt." in file.name and file.suffix == ".tmp"]

    def start(self, place="moment", rng=None):
        """Begin, or go on; it kills itself at that place unless that is a moment."""
        self.place = place
        self.before = max(self.steps(), default=0)
        places = f"--model_path {self.folder / self.name}.pt --samples_dir {self.folder / self.name}_samples"
        argv = ["--mode", "train", *(["--resume"] if self.before else self.flags), *places.split()]
        kept = os.replace, os.fsync, Path.unlink, torch.save
        if place != "moment":
            arm(place, rng)
        self.pid = start(argv, self)
        os.replace, os.fsync, Path.unlink, torch.save = kept
        self.started = time.monotonic()

    def wait(self, options=0):
        """Its exit code, None while it runs (with os.WNOHANG)."""
        pid, status = os.waitpid(self.pid, options)
        if not pid:
            return None
        code = os.waitstatus_to_exitcode(status)
        assert code in (-signal.SIGKILL, 0), Path(self.log).read_text()
        assert max(self.steps(), default=0) >= self.before, "a step that was safe is gone"
        if (self.folder / f"{self.name}.pt").exists():
            ddpm.load_model(self.folder / f"{self.name}.pt")
        return code

    def end(self):
        """Its last state, and the steps in its metrics.jsonl."""
        found = self.steps()
        lines = (self.folder / f"{self.name}_samples" / "metrics.jsonl").read_text().splitlines()
        rows = [row["step"] for row in map(json.loads, lines[1:]) if "loss" in row]
        return [state(found[max(found)]), rows]

    def remove(self):
        for path in self.files():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def main(kills, seed, folder, flags, num_runs):
    rng, folder = np.random.default_rng(seed), Path(folder).resolve()
    for function, dot in DOTS.items():  # or plots take longest
        setattr(ddpm, function, dot)
    torch.set_num_threads(1)
    flags = [*flags, "--download_dir", str(folder / "data")]
    (folder / "whole").mkdir()
    (folder / "runs").mkdir()
    runs, ends = [], []
    for i, name in enumerate(NAMES[:num_runs]):
        own_flags = [*flags, "--seed", str(i)]
        whole = Run(folder / "whole", name, own_flags)
        whole.start()
        assert whole.wait() == 0
        seconds = (time.monotonic() - whole.started) * num_runs  # they share the processor
        ends.append(whole.end())
        runs.append(Run(folder / "runs", name, own_flags))
    report = dict(killed=0, finished=0, equal=0, halves=0, started=0, places={})
    while report["killed"] < kills or any(run.pid for run in runs):
        for run, end in zip(runs, ends):
            if not run.pid:
                if report["killed"] < kills:
                    number = report["started"]
                    report["started"] += 1
                    run.start("moment" if number % 2 else PLACES[number // 2 % len(PLACES)], rng)
                    run.until = run.started + rng.uniform(0, seconds)
                continue
            if run.place == "moment" and time.monotonic() > run.until:
                os.kill(run.pid, signal.SIGKILL)  # of one that has ended it does nothing
            code = run.wait(os.WNOHANG)
            if code is None:
                continue
            run.pid = None
            report["halves"] += len(run.halves()) > 0
            if code == 0:  # it came to its end first
                report["finished"] += 1
                report["equal"] += same(run.end(), end)
                run.remove()
            else:
                report["killed"] += 1
                report["places"][run.place] = report["places"].get(run.place, 0) + 1
        time.sleep(0.002)
    for run, end in zip(runs, ends):
        run.start()
        assert run.wait() == 0
        report["finished"] += 1
        report["equal"] += same(run.end(), end)
    report["left"] = [half for run in runs for half in run.halves()]
    foreign = folder / "foreign"
    report["foreign"] = foreign.read_text().splitlines() if foreign.exists() else []
    print(json.dumps(report))


if __name__ == "__main__":
    kills, seed, num_runs = map(int, sys.argv[1:4])
    main(kills, seed, sys.argv[4], sys.argv[5:], num_runs)
