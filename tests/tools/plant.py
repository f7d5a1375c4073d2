"""Plants a fault in each chapter of ddpm.py, one at a time, and shows which quick test finds it.
Without a fault all of them have to pass, which is looked at first.

python tests/tools/plant.py                 # all chapters: a few minutes
python tests/tools/plant.py data sampling   # some
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FAULTS = {  # chapter: a piece of it, what is written instead, and the tests that are tried first
    "settings": ("require(low <= v <= high,", "require(low <= v,", "bad_inputs"),
    "noise schedules": ("(t / T + 0.008) / 1.008", "(t / T + 0.08) / 1.08", "process"),
    "diffusion process": ("return a * xt - s * out", "return a * xt + s * out", "process"),
    "samplers": ("(h / 2 / last_h)", "(h / last_h)", "samplers"),
    "networks": ("kernel.flip(2, 3).transpose(0, 1)", "kernel.transpose(0, 1)", "networks"),
    "data": ("x0.flip(3), x0)", "x0.flip(2), x0)", "data"),
    "optimiser and EMA": (
        "[tensors[i] for i in floats], 1 - decay)",
        "[tensors[i] for i in floats], decay)",
        "training",
    ),
    "checkpoints": (
        'checkpoint["ema"] if ema and "ema" in checkpoint else',
        'checkpoint["weights"] if ema else',
        "training",
    ),
    "devices and processes": (
        "has locked it\n        return True",
        "has locked it\n        return False",
        "runs",
    ),
    "training": (
        "state.step % config.save_every == 0)",
        "state.step % config.sample_every == 0)",
        "training",
    ),
    "sampling": ("(fraction * angle).sin() * b", "(fraction * angle).sin() * a", "editing"),
    "grids and plots": ("a.transpose(1, 2, 0)", "a.transpose(2, 1, 0)", "command_line"),
    "command line": ('name[2:].replace("-", "_")', "name[2:]", "command_line"),
}


def chapter_of(text, place):
    """The chapter of ddpm.py that a place in its text is in: what its last ruler line says."""
    ruler = next(line for line in reversed(text[:place].splitlines()) if line.startswith("# ----"))
    return ruler.strip("# -")


def plant(project, chapter):
    """Write a copy of ddpm.py with the fault of a chapter into a copy of the project."""
    (project / "ddpm.py").write_text(with_fault((ROOT / "ddpm.py").read_text(), chapter))


def with_fault(text, chapter):
    """The text of ddpm.py with the fault of a chapter."""
    right, wrong, _ = FAULTS[chapter]
    assert text.count(right) == 1, f"{right!r} is in ddpm.py {text.count(right)} times"
    assert chapter_of(text, text.index(right)) == chapter
    return text.replace(right, wrong)


def run_quick_tests(project, *more):
    """The first quick test that fails in a project, or None."""
    command = [sys.executable, "-m", "pytest", "-m", "quick", "-q", "-x", *more]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    if done.returncode not in (0, 1) and not failures:
        raise SystemExit(f"pytest itself failed:\n{done.stdout}{done.stderr}")
    return failures[0] if failures else None


def find(project, chapter):
    """The quick test that finds the fault of a chapter, or None: of one file, else of all."""
    likely = f"tests/test_{FAULTS[chapter][2]}.py"
    return run_quick_tests(project, "-n", "0", likely) or run_quick_tests(project)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help=f"of {', '.join(FAULTS)}")
    chosen = parser.parse_args().chapters or list(FAULTS)
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        no_copy = shutil.ignore_patterns(".git", ".venv", "data", "samples", "__pycache__")
        shutil.copytree(ROOT, project, ignore=no_copy)
        failed = run_quick_tests(project)
        if failed:
            return f"{failed} fails without a fault: mend that first"
        for chapter in chosen:
            plant(project, chapter)
            found_by = find(project, chapter)
            print(f"{chapter:24}{found_by or 'nothing'}", flush=True)
            if not found_by:
                missed.append(chapter)
    return f"not found: {', '.join(missed)}" if missed else 0


if __name__ == "__main__":
    sys.exit(main())
