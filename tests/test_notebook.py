"""The notebook runs from top to bottom and shows its images."""

import base64
import io
import os

import nbclient
import nbformat
import numpy as np
from conftest import ROOT
from PIL import Image

SHOWN = ("predicted", "trajectory", "ddpm", "fewer")


def images_of(notebook):
    """The PNGs among the outputs, in order; no cell may have failed or written to the error
    stream."""
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    shown = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")) for png in shown]


def looks_right(images):
    assert len(images) == len(SHOWN)
    for pixels in images:
        assert pixels.shape[0] > 100 and pixels.shape[1] > 400
        assert pixels.std() > 20, "a blank image"


def test_it_is_stored_with_its_images_and_names_no_machine():
    notebook = nbformat.read(ROOT / "test_single_sample.ipynb", as_version=4)
    nbformat.validate(notebook)
    looks_right(images_of(notebook))
    assert str(ROOT) not in (ROOT / "test_single_sample.ipynb").read_text()


def test_it_runs_and_makes_its_images(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(ROOT / "test_single_sample.ipynb", as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    place = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    looks_right(images_of(notebook))
    assert {p.stem for p in tmp_path.glob("samples/notebook/*.png")} == {*SHOWN}
