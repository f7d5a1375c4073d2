"""Starts Python programs by forking itself: PyTorch is imported already, which takes seconds.

    python zygote.py    reads a request a line, in JSON, and answers it with a line

{"argv": [FILE, FLAG...], "cwd": FOLDER, "env": {...}, "out": FILE, "err": FILE} starts a program in
a session of its own; the answer is the number of its process. {"poll": NUMBER} is answered with the
exit code, as subprocess has it, or null while the process runs. At the end of the input it exits.
Plots come out as dots."""

import atexit
import gc
import json
import os
import runpy
import sys

gc.disable()  # until everything is imported, of which there is nothing to collect
exit_code = None  # of this process, once it is known


@atexit.register
def leave():
    """End at once. To free the objects of PyTorch one by one takes a second. This was registered
    before all others, so it is called after them."""
    if exit_code is not None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)


import matplotlib.backends.backend_agg  # noqa: E402, F401
import matplotlib.ticker  # noqa: E402, F401
import numpy  # noqa: E402, F401
import torch  # noqa: E402, F401
import torch.distributed  # noqa: E402, F401
import torchvision  # noqa: E402, F401
import tqdm  # noqa: E402, F401
from matplotlib.figure import Figure  # noqa: E402
from PIL import Image  # noqa: E402


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
    encoding = env.get("PYTHONIOENCODING", "utf-8")
    sys.stdout = open(1, "w", buffering=1, encoding=encoding, closefd=False)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv[:] = argv
    folders = [os.path.dirname(os.path.abspath(argv[0])), *env.get("PYTHONPATH", "").split(os.pathsep)]
    sys.path[:1] = [folder for folder in folders if folder]
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as e:
        set_exit_code(e.code)
        raise
    set_exit_code(0)


def set_exit_code(code):
    """Leave the others, such as a text to print, to Python."""
    global exit_code
    if code is None or isinstance(code, int):
        exit_code = (code or 0) & 255


def requests():
    """The requests, each as a dictionary, until the input ends."""
    for line in iter(sys.stdin.readline, ""):
        yield json.loads(line)


def write_dot(figure, file, **_):
    Image.new("L", (1, 1)).save(file, "PNG")


def main():
    Figure.savefig = write_dot
    Image.init()
    gc.collect()
    gc.freeze()  # or the first collection in each process copies the memory of all these objects
    gc.enable()
    for request in requests():
        if "poll" in request:
            answer = poll(request["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                return become(**request)
        print(json.dumps(answer), flush=True)
    set_exit_code(0)


if __name__ == "__main__":
    main()
