"""The README and the pages in docs/: what they say can be run, and their figures agree."""

import dataclasses
import inspect
import re
import shlex
from pathlib import Path

import pictures
import pytest
import torch
from conftest import ROOT, TINY, words
from PIL import Image

import ddpm

README = (ROOT / "README.md").read_text()
RESULTS = (ROOT / "docs" / "results.md").read_text()
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]


def section(text, heading):
    """What stands between a heading and the next of its level."""
    return re.search(rf"^## {re.escape(heading)}\n(.*?)(?=^## |\Z)", text, re.M | re.S)[1]


def table_rows(text):
    """The cells of every table row but the rulers, without the marks around code."""
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def code_blocks(text):
    """The indented blocks of a page, as they are typed."""
    blocks = re.findall(r"((?:^    .*\n|^\n)+)", text, re.M)
    return [inspect.cleandoc(block) for block in blocks if block.strip()]


def commands(page, program):
    """The arguments of every call of a program in a page's code blocks."""
    code = "\n".join(code_blocks(page.read_text())).replace("\\\n", " ")
    return [shlex.split(found, comments=True) for found in re.findall(rf"{program} (.*)", code)]


# ------------------------------------------------------------------------------------------- code


def test_the_python_of_the_readme_runs(image_folder, tmp_path, monkeypatch):
    """Its ten lines, with a network and a length that a test needs no more than."""
    [snippet] = [b for b in code_blocks(section(README, "Use from Python")) if "import ddpm" in b]
    assert len([line for line in snippet.splitlines() if line]) == 10
    monkeypatch.chdir(tmp_path)
    Path("MY_IMAGES").symlink_to(image_folder, target_is_directory=True)
    preset = ddpm.preset

    def tiny_preset(name, minutes=None, **given):
        if minutes is None:  # not of the snippet: `sample` looks up what the recipe gives
            return preset(name, **given)
        assert preset(name, minutes=minutes, **given).minutes == minutes  # valid as it is
        parser = ddpm.Parser("ddpm.py")
        parser.add_settings(ddpm.flag_groups())
        tiny = parser.parse(words(TINY, "--steps 2"))
        lists = {name: tuple(value) for name, value in tiny.items() if isinstance(value, list)}
        return preset(name, **(tiny | lists), **given)

    monkeypatch.setattr(ddpm, "preset", tiny_preset)
    exec(snippet, names := {})
    assert names["pixels"].shape == (8, 3, 16, 16)
    assert (ddpm.to_pixels(names["x"]) == names["pixels"]).all()
    assert len(names["images"]) == 8
    assert Path("saved_models/mine.pt").is_file()
    assert Path("samples/generated_sample.png").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_is_accepted(page, monkeypatch, capsys):
    """Flags and values of each call of ddpm.py, up to the point where it would start."""
    calls = []
    monkeypatch.setattr(ddpm, "run_mode", lambda mode, given: calls.append((mode, given)))
    found = [c for c in commands(page, "ddpm.py") if "--mode" in c and "X0" not in c]
    for command in found:
        assert ddpm.main(command) == 0, (command, capsys.readouterr().err)
    assert len(calls) == len(found)
    for mode, given in calls:
        if mode == "train":
            ddpm.check(ddpm.preset(given.pop("preset", "animals"), **given))


def test_the_readme_shows_how_each_program_is_called():
    assert len(commands(ROOT / "README.md", "ddpm.py")) > 15
    for program in ("evaluate.py", "convert.py", "tests/tools/benchmark.py"):
        assert commands(ROOT / "README.md", program), program


def test_flags_and_presets_of_the_readme_are_all_there():
    flags = {
        flag
        for first, *_ in table_rows(section(README, "Flags"))
        for flag in re.findall(r"--(\w+)", first)
    }
    assert len(flags) > 20
    assert flags <= {field.name for field in dataclasses.fields(ddpm.Config)}
    for text, heading in ((README, "Recipes"), (RESULTS, "Presets")):
        named = {
            name
            for first, *_ in table_rows(section(text, heading))
            for name in re.findall(r"`(\w+)`", first)
        }
        assert ddpm.PRESETS.keys() <= named, heading


# ---------------------------------------------------------------------------------------- figures


def test_figures_of_the_readme_are_those_of_the_results():
    """Each row of its table has the name and the value of one of results.md."""
    there = {row[0]: row[1] for row in table_rows(section(RESULTS, "At a glance"))}
    here = {row[0]: row[1] for row in table_rows(section(README, "Figures"))}
    assert len(here) > 4
    assert here.items() <= there.items()


# Numbers with a unit in the README's text that are no measurements.
NOT_MEASURED = {
    "4 GB": "what a machine should have",
    "50 %": "of copies, by definition",
    "100 %": "of copies, by definition",
    "5 %": "of unreadable images: a limit in ddpm.py",
}


def test_whatever_else_looks_measured_in_the_readme_is_in_the_results():
    """A number and a unit, outside of code."""
    text = re.sub(r"^    .*$|`[^`]*`", "", README, flags=re.M)
    unit = r"(?:ms|s|min|minutes|hours|seconds|[kMG]B|images/s|samples/s|%)"
    found = set(re.findall(rf"(?<![\w.])\d[\d.,]* {unit}(?!\w)", text))
    assert "115 ms" in found
    unknown = {figure for figure in found - NOT_MEASURED.keys() if figure not in RESULTS}
    assert not unknown
    assert NOT_MEASURED.keys() <= found, "an exception that is no longer needed"


def test_the_default_recipe_is_as_the_pages_say():
    network = ddpm.build_model(ddpm.Config(), 3, ["cat", "dog", "elephant", "lion", "tiger"])
    parameters = f"{sum(p.numel() for p in network.parameters()):,} parameters"
    mults = " ".join(map(str, ddpm.Config.channel_mults))
    for text in (README, RESULTS):
        assert parameters in text
    assert f"{ddpm.Config.steps:,} steps of {ddpm.Config.batch_size} images" in RESULTS
    assert f"--channels {ddpm.Config.channels} --channel_mults {mults}" in RESULTS
    assert f"loss weight 1 + min(snr, {ddpm.Config.min_snr:g})" in RESULTS
    assert f"loss = (1 + min(snr_t, {ddpm.Config.min_snr:g}))" in README
    assert f"+ {ddpm.Config.detail_weight:g} |grad e|^2" in README
    default = f"`--sampler {ddpm.Config.sampler}` in {ddpm.Config.sampling_steps} steps"
    assert f"The default, {default}" in README


# ------------------------------------------------------------------------------------------ links


def anchors(text):
    """The names that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_images_lead_somewhere(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            assert anchor in anchors(file.read_text()), f"{page.name} links to {target}"


# -------------------------------------------------------------------------------------- pictures


def test_every_picture_is_shown_and_small_enough():
    """No link to a picture that is not there, no picture that no page shows, none that is heavy."""
    shown = set()
    for page in PAGES:
        links = re.findall(r"!\[[^]]*\]\(([^)]+)\)|<img src=\"([^\"]+)\"", page.read_text())
        shown |= {page.parent / (link or source) for link, source in links}
    present = {path for path in (ROOT / "docs").rglob("*") if path.suffix in (".png", ".gif")}
    assert shown == present
    heavy = {path.name: path.stat().st_size for path in present if path.stat().st_size > 330_000}
    assert not heavy


def test_the_script_for_pictures_knows_the_pictures_of_the_pages():
    written = {path.stem for path in (ROOT / "docs").glob("*.*") if path.suffix != ".md"}
    assert set(pictures.PICTURES) <= written


def test_a_grid_of_a_run_is_taken_apart(tmp_path):
    """`tiles` of what `ddpm.save_grid` writes gives the images of the first row."""
    pixels = torch.randint(256, (10, 3, 64, 64), dtype=torch.uint8)
    grid = Image.open(ddpm.save_grid(pixels, tmp_path / "grid.png", 5))
    assert (ddpm.to_pixels(pictures.tiles(grid, 64)) == pixels[:5]).all()
