"""Plants a fault in each chapter of ddpm.py, one at a time, and shows which quick test finds it.

python tests/tools/plant.py                 # all chapters: about a minute each
python tests/tools/plant.py data sampling   # some
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

FAULTS = {  # chapter: a piece of it, and what is written instead
    "settings": ("require(low <= v <= high,", "require(low <= v,"),
    "noise schedules": ("(t / T + 0.008) / 1.008", "(t / T + 0.08) / 1.08"),
    "diffusion process": ("return a * xt - s * out", "return a * xt + s * out"),
    "samplers": ("if eta > 0 and u >= 0 else mean", "if eta > 0 else mean"),
    "networks": ("kernel.flip(2, 3).transpose(0, 1)", "kernel.transpose(0, 1)"),
    "data": ("x0.flip(3), x0)", "x0.flip(2), x0)"),
    "optimiser and EMA": (
        "[tensors[i] for i in floats], 1 - decay)",
        "[tensors[i] for i in floats], decay)",
    ),
    "checkpoints": (
        'checkpoint["ema"] if ema and "ema" in checkpoint else',
        'checkpoint["weights"] if ema else',
    ),
    "devices and processes": (
        "except BlockingIOError:\n        return True",
        "except BlockingIOError:\n        return False",
    ),
    "training": ("state.step % config.save_every == 0)", "state.step % config.sample_every == 0)"),
    "sampling": ("(fraction * angle).sin() * b", "(fraction * angle).sin() * a"),
    "grids and plots": ("a.transpose(1, 2, 0)", "a.transpose(2, 1, 0)"),
    "command line": ('name[2:].replace("-", "_")', "name[2:]"),
}


def chapter_of(text, place):
    """The chapter of ddpm.py that a place in its text is in: what its last ruler line says."""
    ruler = next(line for line in reversed(text[:place].splitlines()) if line.startswith("# ----"))
    return ruler.strip("# -")


def plant(project, chapter):
    """Write a copy of ddpm.py with the fault of a chapter into a copy of the project."""
    text = (ROOT / "ddpm.py").read_text()
    right, wrong = FAULTS[chapter]
    assert text.count(right) == 1, f"{right!r} is in ddpm.py {text.count(right)} times"
    assert chapter_of(text, text.index(right)) == chapter
    (project / "ddpm.py").write_text(text.replace(right, wrong))


def quick_tests(project):
    """What the quick tests of a project print, and whether they pass."""
    command = [sys.executable, "-m", "pytest", "-m", "quick", "-q", "-x"]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    return done.stdout, done.returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help=f"of {', '.join(FAULTS)}")
    chosen = parser.parse_args().chapters or list(FAULTS)
    missed = []
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder, "project")
        no_copy = shutil.ignore_patterns(".git", ".venv", "data", "samples", "__pycache__")
        shutil.copytree(ROOT, project, ignore=no_copy)
        for chapter in chosen:
            plant(project, chapter)
            printed, passed = quick_tests(project)
            failures = [line for line in printed.splitlines() if line.startswith("FAILED")]
            found_by = failures[0].split()[1] if failures else "nothing"
            print(f"{chapter:24}{found_by}", flush=True)
            if passed:
                missed.append(chapter)
    return f"not found: {', '.join(missed)}" if missed else 0


if __name__ == "__main__":
    sys.exit(main())
