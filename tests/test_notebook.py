"""The notebook runs from top to bottom, shows its images, and its answers are right."""

import base64
import io
import re

import nbclient
import nbformat
import numpy as np
import pytest
from conftest import ROOT, quick_python, slow
from PIL import Image

NOTEBOOK = ROOT / "test_single_sample.ipynb"
SHOWN = ("schedule", "images", "forward", "predicted", "trajectory", "steps", "guidance", "training")
ANSWERS = ("exercise_1", "exercise_2", "exercise_3")


def outputs_of(notebook):
    """All outputs, in order; no cell may have failed or written to the error stream."""
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    return outputs


def images_of(notebook):
    """The PNGs among the outputs, in order."""
    shown = [o["data"]["image/png"] for o in outputs_of(notebook) if "image/png" in o.get("data", {})]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(png))).convert("L")) for png in shown]


def text_of(notebook):
    return "".join(o["text"] for o in outputs_of(notebook) if o.output_type == "stream")


def looks_right(images, names=SHOWN):
    assert len(images) == len(names)
    for pixels in images:
        assert pixels.shape[0] > 100 and pixels.shape[1] > 150
        assert pixels.std() > 20, "a blank image"


def learns(notebook, fraction=0.5):
    """The text says that the loss on new images fell to less than that fraction, a half."""
    [(before, after)] = re.findall(r"new images: ([\d.]+) before, ([\d.]+) after", text_of(notebook))
    assert float(after) < fraction * float(before)


# What takes long, and what takes its place.
SHORTER = {
    "counts = [1, 2, 3, 5, 10, 50]": "counts = [1, 2, 3, 4, 5, 6]\n"
    "config = ddpm.override(config, sampling_steps=4)",
    "for step in range(50):": "for step in range(10):",
    "quantize(192, kmeans=3)": "quantize(192)",
    "x = torch.randn(1, 3, 64, 64).repeat(4, 1, 1, 1)": "timesteps = timesteps[::5]\n"
    "x = torch.randn(1, 3, 64, 64).repeat(4, 1, 1, 1)",
}


def shorten(notebook):
    """Take fewer steps in sampling and training."""
    for text, shorter in SHORTER.items():
        [cell] = [c for c in notebook.cells if c.cell_type == "code" and text in c.source]
        cell.source = cell.source.replace(text, shorter)


def execute(notebook, folder):
    place = {"metadata": {"path": str(folder)}}
    client = nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place)
    client.execute()


def test_it_is_stored_with_its_images_and_names_no_machine():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    looks_right(images_of(notebook))
    learns(notebook)
    assert str(ROOT) not in NOTEBOOK.read_text()
    assert NOTEBOOK.stat().st_size <= 500_000


@pytest.mark.parametrize("length", ["short", slow("whole")])
def test_it_runs_and_makes_its_images(tmp_path, monkeypatch, length):
    """And so do the folded answers to its exercises, after it."""
    monkeypatch.setenv(*quick_python(ROOT).popitem())
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("TQDM_DISABLE", "1")  # decoding shows a bar if it takes more than 2 seconds
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    folded = "".join(re.findall("<details>.*?</details>", notebook.cells[-1].source, re.S))
    answers = re.findall("```python\n(.*?)```", folded, re.S)
    notebook.cells += [nbformat.v4.new_code_cell(answer) for answer in answers]
    if length == "short":
        shorten(notebook)
    execute(notebook, tmp_path)
    looks_right(images_of(notebook), SHOWN + ANSWERS)
    learns(notebook, 0.7 if length == "short" else 0.5)
    written = {p.stem for p in tmp_path.glob("samples/notebook/*.png")}
    assert written == {*SHOWN, *ANSWERS}


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a clone, so nothing to clone from")
def test_its_first_cell_fetches_the_program_where_it_is_not(tmp_path, monkeypatch):
    """As on Colab: an empty folder, and nothing but the notebook."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv(*quick_python().popitem())
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # the requirements are installed here
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    first = next(c for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == "code")
    assert first.source.count('"URL"') == 1
    fetch = first.source.replace('"URL"', f'"file://{ROOT}"')
    use = "import ddpm\nprint(ddpm.__file__)"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in (fetch, use)])
    execute(notebook, tmp_path)
    assert str(tmp_path / "ddpm.py" / "ddpm.py") in text_of(notebook)
