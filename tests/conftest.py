"""What the tests share: the program, a tiny folder of images, and ways to run the command line."""

import gc
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

gc.disable()  # until everything is imported, of which there is nothing to collect

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "tools"))

import ddpm  # noqa: E402

# The network, batch and length that a test needs no more than. Later flags override earlier ones.
TINY = """--image_size 16 --patch 1 --channels 8 --channel_mults 1 2 --attention_at 8 --timesteps 50
    --predict v --batch_size 4 --warmup_steps 0 --ema_decay 0.99 --num_samples 3 --sampling_steps 2
    --log_every 1 --precision fp32 --device cpu"""


def words(*flags):
    """Flags as a list of strings: "--steps 2", path -> --steps, 2, path."""
    return [
        word for flag in flags for word in (flag.split() if isinstance(flag, str) else [str(flag)])
    ]


def slow(*values):
    """Parameters of a long form of a test, which only --slow runs."""
    return pytest.param(*values, marks=pytest.mark.slow)


ONE_THREAD = {"OMP_NUM_THREADS": "1"}


def quick_python(*folders):
    """The PYTHONPATH for a Python that is started for a test, and these folders in it: one that
    collects no garbage, which is a third of the time to import PyTorch and end."""
    before = os.environ.get("PYTHONPATH")
    paths = [ROOT / "tests" / "tools" / "quick", *folders, *([before] if before else [])]
    return {"PYTHONPATH": os.pathsep.join(map(str, paths))}


def torchrun(processes):
    """What stands before the name of a program, for several processes of it."""
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]


def exit_code(main, *flags):
    """What a program's main returns for these flags, or exits with."""
    try:
        return main(words(*flags))
    except SystemExit as e:
        return e.code


def places(folder, data):
    """The flags that name the images and send all output below a folder."""
    return [
        *words("--data_path", data, "--model_path", folder / "model.pt"),
        *words("--samples_dir", folder / "samples", "--download_dir", folder / "data"),
    ]


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="a long form: give --slow"))


def write_dot(_, path, text=None):
    """Stands for a function that plots: an image of one pixel."""
    return ddpm.save_png(Image.new("L", (1, 1)), path, text)


# What takes the place of plots, since a figure takes longer than the training in a test.
DOTS = dict(
    plot_rows=lambda rows, titles, path, text=None: write_dot(rows, path, text),
    plot_schedules=write_dot,
    plot_loss=write_dot,
    save_figure=write_dot,
)
PLOTS = {name: getattr(ddpm, name) for name in DOTS}


def pytest_configure():
    for name, dot in DOTS.items():
        setattr(ddpm, name, dot)
    os.fsync = os.fstat  # waiting for a disk is most of a short run; it fails for what is no file
    if (
        signal.getsignal(signal.SIGINT) == signal.SIG_IGN
    ):  # as in a shell's background: tests send it
        signal.signal(signal.SIGINT, signal.default_int_handler)
    ddpm.keep_memory = lambda: (
        None
    )  # it is for a process of its own; this one would grow to gigabytes
    torch.set_num_threads(1)  # for networks this small a second thread costs more than it gives


def pytest_collection_finish():
    """Let collections pass over what has been imported: it stays until the end, and a look at all
    of it takes a fifth of a second, as after each run of the page."""
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_unconfigure():
    gc.freeze()  # an end of Python that frees every object takes a second


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory):
    """24 images of 20x20 pixels in three classes: discs, squares and stripes, each of two
    colours."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    y, x = np.mgrid[:20, :20]
    for name in ("disc", "square", "stripes"):
        (root / name).mkdir()
        for i in range(8):
            a, b, r = rng.uniform(6, 14), rng.uniform(6, 14), rng.uniform(3, 6)
            inside = {
                "disc": (x - a) ** 2 + (y - b) ** 2 < r**2,
                "square": (abs(x - a) < r) & (abs(y - b) < r),
                "stripes": (x * a + y * b) % (8 * r) < 4 * r,
            }[name]
            back, front = rng.integers(0, 256, (2, 3))
            pixels = np.where(inside[..., None], front, back).astype(np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return root


class Forked:
    """A program in a process that the zygote forked: what tests need of subprocess.Popen."""

    def __init__(self, ask, file, flags, cwd, env, out, err):
        self.ask = ask
        self.code = None
        for path in (out, err):
            Path(path).touch()
        argv = [str(file), *words(*flags)]
        self.pid = ask(argv=argv, cwd=str(cwd), env=env, out=str(out), err=str(err))

    def poll(self):
        if self.code is None:
            self.code = self.ask(poll=self.pid)
        return self.code

    def wait(self, seconds=300):
        end = time.monotonic() + seconds
        while self.poll() is None:
            assert time.monotonic() < end, "it took for ever"
            time.sleep(0.05)
        return self.code

    def send_signal(self, what):
        if self.poll() is None:
            os.kill(self.pid, what)


@pytest.fixture(scope="session")
def zygote():
    """zygote(**request) is the answer of tools/zygote.py, which runs as long as the tests."""
    command = [sys.executable, str(ROOT / "tests" / "tools" / "zygote.py")]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with subprocess.Popen(command, env=os.environ | ONE_THREAD, **pipes) as process:

        def ask(**request):
            print(json.dumps(request), file=process.stdin, flush=True)
            return json.loads(process.stdout.readline())

        yield ask
        process.stdin.close()


@pytest.fixture
def background(request, tmp_path):
    """background(*flags) starts the real command line in a process of its own, in tmp_path, and
    returns it. Its output goes to tmp_path/log, or to out and err. With --slow Python is started for
    it, which is forked otherwise."""
    started = []

    def start(*flags, file=ROOT / "ddpm.py", cwd=tmp_path, out=tmp_path / "log", err=None, **more):
        env = os.environ | ONE_THREAD | more
        err = err or out
        if request.config.getoption("--slow"):
            command = [sys.executable, "-u", str(file), *words(*flags)]
            with open(out, "a") as to_out, open(err, "a") as to_err:
                to = dict(stdout=to_out, stderr=to_err, start_new_session=True)
                process = subprocess.Popen(command, cwd=cwd, env=env, **to)
        else:
            ask = request.getfixturevalue("zygote")
            process = Forked(ask, file, flags, cwd, env, out, err)
        started.append(process)
        return process

    yield start
    for process in started:
        process.send_signal(signal.SIGKILL)
        process.wait()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def like_torchrun(rank, size, port):
    """The environment that torchrun gives to a process."""
    names = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=size, LOCAL_WORLD_SIZE=size, MASTER_PORT=port)
    values = {name: str(value) for name, value in names.items()}
    return values | dict(MASTER_ADDR="127.0.0.1", TORCHELASTIC_RUN_ID="tests")


@pytest.fixture
def program(request, background, tmp_path, tmp_path_factory):
    """program(*flags) runs the real command line in processes of its own, in tmp_path. They are
    forked, unless real is true or --slow given: then Python and, for several, torchrun are started.
    """

    def run(*flags, file=ROOT / "ddpm.py", cwd=tmp_path, processes=1, real=False, seconds=300):
        if real or request.config.getoption("--slow"):
            launcher = torchrun(processes) if processes > 1 else ()
            command = [sys.executable, *launcher, str(file), *words(*flags)]
            env = os.environ | ONE_THREAD
            if not request.config.getoption("--slow"):
                env |= quick_python()
            return subprocess.run(
                command, cwd=cwd, env=env, capture_output=True, text=True, timeout=seconds
            )
        output = tmp_path_factory.mktemp("output")
        to = dict(file=file, cwd=cwd, out=output / "out", err=output / "err")
        ranks = [{}]
        if processes > 1:
            port = free_port()
            ranks = [like_torchrun(rank, processes, port) for rank in range(processes)]
        started = [background(*flags, **to, **rank) for rank in ranks]
        codes = [process.wait(seconds) for process in started]
        text = [(output / name).read_text() for name in ("out", "err")]
        return subprocess.CompletedProcess(flags, max(codes, key=abs), *text)

    return run


@pytest.fixture
def main(tmp_path, monkeypatch):
    """main(*flags) runs the command line inside this process, in tmp_path, and returns its exit
    code.

    Flags may share a string, as in main("--mode train --steps 2"); paths stand alone."""
    monkeypatch.chdir(tmp_path)

    return lambda *flags: exit_code(ddpm.main, *flags)


def use_real_plots(patch):
    """Plot as the program does. patch: a MonkeyPatch."""
    for name, function in PLOTS.items():
        patch.setattr(ddpm, name, function)


@pytest.fixture
def real_plots(monkeypatch):
    """Plots are real ones; in other tests they are dots."""
    use_real_plots(monkeypatch)


@pytest.fixture(scope="session")
def trained(image_folder, tmp_path_factory):
    """The path of a tiny class-conditional model trained for a few steps."""
    folder = tmp_path_factory.mktemp("trained")
    more = "--steps 40 --lr 1e-2 --ema_decay 0.9 --batch_size 8 --log_every 40"
    assert ddpm.main(words("--mode train", TINY, more, *places(folder, image_folder))) == 0
    return folder / "model.pt"


def randomise(model, seed=0, scale=0.2):
    """Give every weight a random value, so that no layer is left at its initial zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * scale)
    return model


def checkpoint(path):
    return torch.load(path, map_location="cpu", weights_only=True)


class Malicious:
    """Pickled, it creates a file when it is read."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return open, (str(self.target), "w")


def before_step(monkeypatch, number, do):
    """Call do() when the batch of the step of that number is taken, counted from 0."""
    real = ddpm.Images.batch

    def batch(self, step, *args, **kwargs):
        if step == number:
            do()
        return real(self, step, *args, **kwargs)

    monkeypatch.setattr(ddpm.Images, "batch", batch)


def make_project(trained, folder):
    """Fill a folder that the page is started in: the tiny model as tiny.pt, newer than the included
    one, and its run in samples/run."""
    (folder / "saved_models").mkdir()
    shutil.copy(trained, folder / "saved_models" / "tiny.pt")
    os.utime(folder / "saved_models" / "tiny.pt")
    shutil.copytree(trained.parent / "samples", folder / "samples" / "run")
    return folder


def sample_tiny_pt(project, **settings):
    """The images (H, W, C) that --mode sample makes with tiny.pt, the settings of its checkpoint
    and these."""
    path = str(project / "saved_models" / "tiny.pt")
    stored = ddpm.stored_config(ddpm.read_checkpoint(path), path)
    given = dict(model_path=path, samples_dir=str(project / "cli")) | settings
    return list(ddpm.sample(ddpm.override(stored, **given)).permute(0, 2, 3, 1).numpy())


def tree(folder):
    """The files below a folder, with their contents."""
    files = [p for p in sorted(Path(folder).rglob("*")) if p.is_file()]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def metrics(folder):
    """The lines of a run's metrics.jsonl: the first, then those of training."""
    head, *rows = map(json.loads, Path(folder, "metrics.jsonl").read_text().splitlines())
    return head, [row for row in rows if "loss" in row]


def sampled_labels(monkeypatch):
    """The labels of all images sampled from now on, in a list."""
    seen = []
    real = ddpm.generate

    def generate(model, diffusion, config, numbers, labels, *args):
        seen.extend(labels)
        return real(model, diffusion, config, numbers, labels, *args)

    monkeypatch.setattr(ddpm, "generate", generate)
    return seen
