"""The page in a real browser: Streamlit serves it, Playwright drives a headless Chromium."""

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
import zipfile

import numpy as np
import pytest
from conftest import ONE_THREAD, ROOT, Forked, free_port, make_project, sample_tiny_pt, slow
from PIL import Image

pytest.importorskip("streamlit", reason="the page needs Streamlit")
sync_api = pytest.importorskip("playwright.sync_api", reason="driving a browser needs Playwright")
FLAGS = """--no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking""".split()
SECTIONS = {  # and what only it shows
    "Generate": "Guidance scale",
    "Look inside": "Timestep t",
    "Edit": "What to do",
    "Watch a run": "Images per second",
}


@pytest.fixture(scope="module")
def project(trained, tmp_path_factory):
    return make_project(trained, tmp_path_factory.mktemp("project"))


@pytest.fixture(scope="module")
def browser():
    found = shutil.which("chromium")
    with sync_api.sync_playwright() as playwright:
        try:
            browser = playwright.chromium.launch(executable_path=found, args=FLAGS)
        except sync_api.Error as e:
            pytest.skip(f"no Chromium to drive: {str(e).splitlines()[0]}")
        yield browser
        browser.close()


def start_streamlit(request, project, *flags):
    """Streamlit in a process of its own, in the folder project; its output goes to log.txt. With
    --slow Python is started for it, which is forked otherwise."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("STREAMLIT")} | ONE_THREAD
    if request.config.getoption("--slow"):
        command = [sys.executable, "-m", "streamlit", *flags]
        with open(project / "log.txt", "w") as log:
            return subprocess.Popen(command, cwd=project, env=env, stdout=log, stderr=log)
    start = project / "start.py"
    start.write_text("import streamlit.web.cli\nstreamlit.web.cli.main(prog_name='streamlit')\n")
    log = project / "log.txt"
    return Forked(request.getfixturevalue("zygote"), start, flags, project, env, log, log)


@pytest.fixture(scope="module")
def server(request, browser, project):
    """The address and port of a page that Streamlit serves as the README says, but for the port."""
    port = free_port()
    flags = ["run", str(ROOT / "app.py"), "--server.port", str(port), "--server.headless", "true"]
    served = start_streamlit(request, project, *flags)
    try:
        for _ in range(300):
            try:
                assert (
                    urllib.request.urlopen(f"http://localhost:{port}/_stcore/health").read()
                    == b"ok"
                )
                break
            except OSError:
                assert served.poll() is None, (project / "log.txt").read_text()
                time.sleep(0.2)
        yield f"http://localhost:{port}", port
    finally:
        served.send_signal(signal.SIGTERM)
        served.wait(20)


@pytest.fixture(scope="module")
def shared_tab(browser):
    """A tab that the tests use one after the other: a new one would compile the page's code anew."""
    return new_tab(browser)


def new_tab(browser):
    page = browser.new_context().new_page()
    page.set_default_timeout(60_000)
    return page


@pytest.fixture
def visit(browser, shared_tab, server):
    """visit(section) opens that section in a session of its own, in the tab that the tests share or,
    with alone=True, in a browser that has nothing in common with it."""
    contexts = []

    def visit(section="Generate", alone=False, width=1200, height=1000, scheme="light"):
        page = new_tab(browser) if alone else shared_tab
        if alone:
            contexts.append(page.context)
        page.set_viewport_size(dict(width=width, height=height))
        page.emulate_media(color_scheme=scheme)
        page.goto(f"{server[0]}/?section={section.replace(' ', '+')}")
        settle(page, section)
        return page

    yield visit
    for context in contexts:
        context.close()


def settle(page, section="Generate"):
    """Wait until the page shows this section and has nothing left to do."""
    page.get_by_role("radio", name=section, exact=True, checked=True).wait_for()
    page.get_by_text(SECTIONS[section]).first.wait_for()
    page.locator("[data-test-connection-state=CONNECTED][data-test-script-state=notRunning]").wait_for()
    page.locator("[data-testid=stSkeleton]").first.wait_for(state="detached")  # its code is loading


def submit(page):
    return page.get_by_test_id("stFormSubmitButton").get_by_role("button")


def set_steps(page, *keys):
    """Move the slider for the steps: Home is the fewest, End all."""
    for key in keys:
        page.get_by_role("slider").first.press(key)


def set_number(page, label, number):
    page.get_by_role("spinbutton", name=label).fill(str(number))


def generate(page):
    submit(page).click()
    page.get_by_text("All as a ZIP").wait_for()
    settle(page)


def download(page, label):
    with page.expect_download() as waiting:
        page.get_by_role("button", name=label, exact=True).click()
    return waiting.value.path().read_bytes()


def images(page):
    """The images in the ZIP, uint8 (H, W, C) each."""
    with zipfile.ZipFile(io.BytesIO(download(page, "All as a ZIP"))) as archive:
        return [
            np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in archive.namelist()
        ]


def equal(a, b):
    return len(a) == len(b) and all(np.array_equal(x, y) for x, y in zip(a, b))


def test_sampling_shows_its_progress_and_eight_images_to_download(visit, project):
    page = visit()
    set_steps(page, "End", "ArrowLeft")  # 20
    page.evaluate("""() => {
        window.seen = new Set();
        new MutationObserver(() => {
            for (const e of document.querySelectorAll('[data-testid=stProgress]'))
                seen.add(e.innerText);
        }).observe(document.body, {subtree: true, childList: true, characterData: true});
    }""")
    generate(page)
    seen = page.evaluate("[...seen]")
    steps = [int(text.split()[1]) for text in seen if text.startswith("Step ")]
    assert (
        len(steps) > 3 and steps == sorted(steps) and steps[-1] <= 20
    )  # the bar moves, and forwards

    shown = page.locator("[data-testid=stImage] img")
    shown = [shown.nth(i) for i in range(shown.count()) if shown.nth(i).is_visible()]
    assert len(shown) == 8
    for image in shown:
        pixels = np.asarray(Image.open(io.BytesIO(image.screenshot())).convert("RGB"))
        assert pixels.shape[0] >= 140 and pixels.std() > 5, "a blank image"
        change = np.abs(np.diff(pixels.astype(int), axis=0)).max(axis=(1, 2))  # from row to row
        assert set(np.diff(np.flatnonzero(change[12:-12] > 2))) == {9}, "not crisp"  # 16 pixels, of 9 each

    expected = sample_tiny_pt(project, num_samples=8, sampling_steps=20, gif=True)
    assert equal(images(page), expected)
    third = np.asarray(Image.open(io.BytesIO(download(page, "3 stripes"))))
    assert np.array_equal(third, expected[2])
    gif = download(page, "Animation as a GIF")
    assert gif == (project / "cli" / "denoising.gif").read_bytes()
    assert Image.open(io.BytesIO(gif)).n_frames > 10

    before = shown[0].bounding_box()["width"]
    shown[0].hover()
    page.get_by_role("button", name="Fullscreen").first.click()
    enlarged = "([image, before]) => image.getBoundingClientRect().width > 2 * before"
    page.wait_for_function(enlarged, arg=[shown[0].element_handle(), before])


def test_another_model_can_be_chosen_and_a_long_sampling_be_stopped(visit):
    page = visit()
    page.get_by_role("combobox", name="Model").click()
    page.get_by_role("option", name="animals.pt: animal_data, 64x64, 5 classes").click()
    page.get_by_text("100 drawings").first.wait_for()  # the card of this model
    settle(page)
    set_steps(page, "End")  # 1000: minutes
    submit(page).click()
    page.get_by_text(" of 1000").wait_for()
    page.get_by_test_id("stMain").get_by_role("button", name="Stop").click()
    page.get_by_text("Stopped.").wait_for()
    settle(page)
    assert not page.get_by_text("of 1000").count() and not page.get_by_text("All as a ZIP").count()
    set_steps(page, "Home")  # 5
    set_number(page, "Images", 3)
    generate(page)  # and all is well afterwards
    sampled = images(page)
    assert len(sampled) == 3 and all(p.shape == (64, 64, 3) and p.std() > 20 for p in sampled)
    assert page.get_by_role("button", name="3 elephant", exact=True).count()


def test_two_browsers_at_once_each_get_their_own(visit, project):
    pages = [visit(), visit(alone=True)]
    for seed, page in enumerate(pages, 1):
        set_steps(page, "End", "ArrowLeft")  # 20
        set_number(page, "Images", 2)
        set_number(page, "Seed", seed)
    for page in pages:
        submit(page).click()
    for seed, page in enumerate(pages, 1):
        page.get_by_text("All as a ZIP").wait_for()
        settle(page)
        assert equal(
            images(page), sample_tiny_pt(project, num_samples=2, sampling_steps=20, seed=seed)
        )


def test_the_keyboard_is_enough(visit):
    page = visit()

    def tab_to(kind, label):
        for _ in range(60):
            page.keyboard.press("Tab")
            inside = (
                f"(e => !!e.closest('[data-testid={kind}]') && e.innerText.includes('{label}'))"
            )
            if page.evaluate(f"() => {inside}(document.activeElement)"):
                return
        pytest.fail(f"Tab does not lead to {label}")

    tab_to("stFormSubmitButton", "Generate")
    page.keyboard.press("Enter")
    page.get_by_text("All as a ZIP").wait_for()
    settle(page)
    tab_to("stDownloadButton", "All as a ZIP")
    with page.expect_download() as waiting:
        page.keyboard.press("Enter")
    assert zipfile.is_zipfile(waiting.value.path())


def test_bad_and_huge_uploads_get_a_sentence(visit, project, tmp_path):
    broken, big = tmp_path / "broken.png", tmp_path / "big.png"
    broken.write_bytes(b"no image")
    with open(big, "wb") as f:
        f.truncate(21 * 2**20)
    page = visit("Edit")
    page.locator("input[type=file]").set_input_files(broken)
    page.get_by_text("broken.png cannot be read (UnidentifiedImageError").wait_for()
    page = visit("Edit")
    page.locator("input[type=file]").set_input_files(big)
    page.get_by_text("File must be 20").wait_for()
    page.locator("input[type=file]").set_input_files(
        project / "samples" / "run" / "dataset_grid.png"
    )
    page.get_by_text("Strength").first.wait_for()  # a good one is taken afterwards


@pytest.mark.parametrize("section", ["Generate", *map(slow, list(SECTIONS)[1:])])
def test_a_phone_shows_it_without_scrolling_sideways(visit, section):
    page = visit(section, width=360, height=740)
    if section == "Generate":
        generate(page)
    page.wait_for_timeout(500)
    wide = """() => [...document.querySelectorAll('*')].filter(
        e => e.scrollWidth > e.clientWidth + 1
            && ['auto', 'scroll'].includes(getComputedStyle(e).overflowX)
        ).map(e => e.className)"""
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate(wide) == []
    assert not page.get_by_test_id("stException").count()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_is_readable_in_light_and_dark(visit, scheme):
    page = visit(scheme=scheme)
    colours = page.evaluate("""() => {
        const page = getComputedStyle(document.querySelector('[data-testid=stApp]'));
        const texts = [...document.querySelectorAll('h1, label p')]
            .map(e => getComputedStyle(e).color);
        return [page.backgroundColor, ...texts];
    }""")

    def luminance(colour):  # of WCAG 2
        rgb = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        r, g, b = (v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in rgb)
        return 0.2126 * r + 0.7152 * g + 0.0722 * b

    back, *texts = map(luminance, colours)
    assert (back > 0.5) == (scheme == "light")
    assert len(texts) > 4
    assert all((max(back, text) + 0.05) / (min(back, text) + 0.05) > 4.5 for text in texts)


def test_a_run_is_followed_without_a_click(visit, project):
    lines = (project / "samples" / "run" / "metrics.jsonl").read_text().splitlines()
    head, last = json.loads(lines[0]), json.loads(lines[-1])
    head["config"]["steps"] = 200
    shutil.copytree(project / "samples" / "run", project / "samples" / "live", dirs_exist_ok=True)
    live = project / "samples" / "live" / "metrics.jsonl"
    live.write_text(f"{json.dumps(head)}\n{json.dumps(last)}\n")
    page = visit("Watch a run")
    page.get_by_text("Step 40, 20%").wait_for()
    page.locator(
        "[data-testid=stVegaLiteChart] canvas, [data-testid=stVegaLiteChart] svg"
    ).first.wait_for()
    page.get_by_role("img", name="Sampled from the same noise each time").first.wait_for()
    with open(live, "a") as f:
        f.write(json.dumps(last | dict(step=100, seconds=last["seconds"] + 60)) + "\n")
    page.get_by_text("Step 100, 50%: 2 min left").wait_for(timeout=15_000)


def test_it_talks_to_this_machine_only_and_starts_without_a_warning(visit, server, project):
    page, asked = visit(), []
    page.on("request", lambda request: asked.append(request.url))
    for section in SECTIONS:
        page.get_by_role("radio", name=section, exact=True).click(force=True)
        settle(page, section)
    page.reload()
    settle(page, section)
    assert asked and all(url.startswith((server[0], "data:", "blob:")) for url in asked), asked
    if os.path.exists("/proc/net/tcp"):
        tables = [
            open(f).readlines()[1:]
            for f in ("/proc/net/tcp", "/proc/net/tcp6")
            if os.path.exists(f)
        ]
        listening = [
            line.split()[1] for table in tables for line in table if line.split()[3] == "0A"
        ]
        own = [
            address.split(":")[0]
            for address in listening
            if int(address.split(":")[1], 16) == server[1]
        ]
        assert own and {*own} <= {
            "0100007F",
            "00000000000000000000000001000000",
        }  # 127.0.0.1 and ::1
    log = (project / "log.txt").read_text()
    assert "You can now view" in log
    for word in ("Traceback", "torch.classes", "Warning", "warning", "Error", "deprecated"):
        assert word not in log, log
