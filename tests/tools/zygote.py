"""Starts Python programs by forking itself: PyTorch is imported already, which takes seconds.

    python zygote.py    reads a request a line, in JSON, and answers it with a line

{"argv": [FILE, FLAG...], "cwd": FOLDER, "env": {...}, "out": FILE, "err": FILE} starts a program in
a session of its own; the answer is the number of its process. {"poll": NUMBER} is answered with the
exit code, as subprocess has it, or null while the process runs. At the end of the input it exits.
Plots come out as dots."""

import json
import os
import runpy
import sys

import matplotlib.backends.backend_agg  # noqa: F401
import matplotlib.ticker  # noqa: F401
import numpy  # noqa: F401
import torch  # noqa: F401
import torch.distributed  # noqa: F401
import torchvision  # noqa: F401
import tqdm  # noqa: F401
from matplotlib.figure import Figure
from PIL import Image


def poll(pid):
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def redirect(number, path, flags):
    """Let a descriptor be a file from now on."""
    descriptor = os.open(path, flags, 0o666)
    os.dup2(descriptor, number)
    os.close(descriptor)


def become(argv, cwd, env, out, err):
    """Run a program in the place of this one."""
    os.setsid()
    redirect(0, os.devnull, os.O_RDONLY)
    for number, path in ((1, out), (2, err)):
        redirect(number, path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    sys.stdout = open(1, "w", buffering=1, encoding="utf-8", closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = argv
    folders = [os.path.dirname(os.path.abspath(argv[0])), *env.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:1] = [folder for folder in folders if folder]
    runpy.run_path(argv[0], run_name="__main__")


def requests():
    """The requests, each as a dictionary, until the input ends."""
    for line in iter(sys.stdin.readline, ""):
        yield json.loads(line)


def write_dot(figure, file, **_):
    Image.new("L", (1, 1)).save(file, "PNG")


def main():
    Figure.savefig = write_dot
    Image.init()
    for request in requests():
        if "poll" in request:
            answer = poll(request["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                return become(**request)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
