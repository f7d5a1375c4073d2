"""Make a model small enough to ship: its EMA weights alone, in half precision.

    python tests/tools/shrink.py saved_models/denoise_model.pt saved_models/animals.pt
"""

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import ddpm  # noqa: E402


def shrink(source, target):
    """Write what `ddpm.load_model` needs of a checkpoint. Returns the path."""
    checkpoint = ddpm.read_checkpoint(source)
    weights = checkpoint["ema"] if "ema" in checkpoint else checkpoint["weights"]
    needed = ("format", "config", "classes", "channels", "vocabulary", "examples", "white")
    small = {key: checkpoint[key] for key in needed}
    config = small["config"]
    places = ("download_dir", "model_path", "samples_dir", "resume", "init_from")
    config |= {name: getattr(ddpm.Config, name) for name in places}  # of this machine
    data = Path(config["data_path"])
    if data.is_absolute():
        config["data_path"] = "/".join(data.parts[1:][-2:])  # as in clothes/train
    small["weights"] = {
        name: weight.half() if weight.is_floating_point() else weight
        for name, weight in weights.items()
    }
    return ddpm.atomic_write(target, lambda f: torch.save(small, f))


def main(source, target):
    path = Path(shrink(source, target))
    print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("target")
    arguments = parser.parse_args()
    raise SystemExit(ddpm.run(lambda: main(arguments.source, arguments.target)))
