"""app.py: a page for drawing, looking inside, editing and watching a run. All that it computes is ddpm.py's.

    pip install streamlit
    streamlit run app.py        # and open http://localhost:8501

It offers the models in saved_models/ and the runs of the folder that it is started in, and writes nothing.
"""

import contextlib
import io
import json
import math
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch

import ddpm

try:
    import streamlit as st
except ImportError:
    raise SystemExit("The page needs Streamlit: pip install streamlit, then: streamlit run app.py") from None
if __name__ == "__main__" and not st.runtime.exists():
    raise SystemExit("This is a page: start it with streamlit run app.py")

SIDE = 150  # of a picture on the page, in the browser's pixels
SAMPLERS = {"ddpm": "the original", "ddim": "without fresh noise", "dpm++": "good from 10 steps"}
GRIDS = {"generated": "Drawn from the same noise each time",
         "compared": "Before noise, with noise, and as the model guesses them"}
QUARTERS = ("t < T/4: detail", "T/4 to T/2", "T/2 to 3T/4", "t > 3T/4: composition")
LAST_SEED = 2**53 - 1  # the largest number that browsers are sure of

# ----------------------------------------------------------------------------------------------------- models

def model_files():
    """The models in saved_models/, newest first, and the one that comes along. No step checkpoints."""
    found = {*Path("saved_models").resolve().glob("*.pt*"), ddpm.HERE / "saved_models" / "animals.pt"}
    found = [path for path in found if path.is_file() and path.name[0] != "."]
    return sorted(found, key=lambda path: (-path.stat().st_mtime, path))

@st.cache_data(max_entries=1000, show_spinner="Looking through saved_models")
def describe(path, changed):
    """What a model was trained on, in a few words, or that it cannot be read."""
    try:
        checkpoint = ddpm.read_checkpoint(path)
        config = ddpm.stored_config(checkpoint, path)
    except ddpm.UserError:
        return f"{path.name}: cannot be read"
    classes = f", {len(checkpoint['classes'])} classes" if checkpoint["classes"] else ""
    return f"{path.name}: {Path(config.data_path).name}, {config.image_size}x{config.image_size}{classes}"

@st.cache_resource(max_entries=4, show_spinner="Opening the model")
def open_model(path, changed):
    """The model in a file, shared until the file changes: (model, diffusion, config, precision)."""
    ddpm.keep_memory()
    config = ddpm.drawing_config(ddpm.read_checkpoint(path), path, {})
    device = ddpm.choose_device(config.device)
    precision = ddpm.choose_precision(config.precision, device)
    return *ddpm.load_model(path, device, config.ema), precision

def choose_model():
    """The key of the model that the user wants: its path, and when that file last changed."""
    files = {path: path.stat().st_mtime_ns for path in model_files()}
    ddpm.require(files, "There is no model yet: train one with python ddpm.py --mode train")
    path = st.selectbox("Model", list(files), format_func=lambda path: describe(path, files[path]))
    return path, files[path]

# ---------------------------------------------------------------------------------------------------- drawing

def settings(section, key, pictures=8):
    """The fields of a form that every way of drawing has. Returns the Config to draw with."""
    model, diffusion, c, _ = open_model(*key)
    def kept(name):  # also while another section or model is looked at
        return dict(key=f"{section}, {name}, {key[0]}", persist_state="session")

    left, right = st.columns(2)
    given = dict(
        num_samples=left.number_input("Pictures", 1, 64, pictures, **kept("pictures")),
        seed=right.number_input("Seed", 0, LAST_SEED, min(c.seed, LAST_SEED), **kept("seed"),
                                help="The same seed and settings give the same pictures."),
        sampler=st.selectbox("Sampler", list(SAMPLERS), index=[*SAMPLERS].index(c.sampler),
                             format_func=lambda name: f"{name}: {SAMPLERS[name]}", **kept("sampler")))
    usual = {n for n in (5, 10, 20, 50, 100, 250, 1000) if n < diffusion.T}
    steps = sorted(usual | {c.sampling_steps, diffusion.T})
    label = "Steps: fewer are faster, more are better"
    given["sampling_steps"] = st.select_slider(label, steps, c.sampling_steps, **kept("steps"))
    if model.classes:
        chosen = st.multiselect("Classes", model.classes, placeholder="all, in turn", **kept("classes"))
        given["classes"] = ",".join(chosen) or None
        given["guidance"] = st.slider("Guidance: how much to insist on the class", 1.0, 8.0, step=0.5,
                                      value=min(max(c.guidance, 1.0), 8.0), **kept("guidance"))
    return ddpm.override(c, sample_batch_size=64, **given)

def show(x, names, config):
    """Pictures x (N, C, H, W) in [-1, 1] side by side, as many as the screen is wide, each with its name."""
    with st.container(horizontal=True):
        for image, name in zip(ddpm.to_images(ddpm.crop(ddpm.to_pixels(x).cpu(), config)), names):
            with st.container(width=SIDE, gap=None):
                st.image(image, width="stretch", alt=name, output_format="PNG")
                st.caption(name)

def written(write):
    """The bytes that one of ddpm's functions writes to the path that write(path) hands it."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(write(Path(folder, "file"))).read_bytes()

def draw(section, key, c, **edit):
    """Draw with a bar, a button to stop and the pictures as they emerge; keep the result for this section.
    Any click on the page ends this function where it next touches the page, and nothing is kept then."""
    model, diffusion, _, precision = open_model(*key)
    ddpm.check(c)
    labels = ddpm.sample_labels(c, model.classes, c.num_samples)
    labels = labels if c.interpolate is None else labels[:1] * len(labels)
    names = [f"{i + 1} {model.classes[label] if model.classes else ''}" for i, label in enumerate(labels)]
    steps = len(ddpm.reverse_timesteps(c)) - 1
    frames, way, every = ddpm.spread(np.arange(steps), 60), [], math.ceil(steps / 12)
    bar = st.progress(0.0, "Starting")
    st.button("Stop", on_click=st.session_state.update, kwargs=dict(stopped=True))
    emerging = st.empty()
    drawing = ddpm.generate(model, diffusion, c, range(c.num_samples), labels, precision, **edit)
    for i, (t, x, x0) in enumerate(drawing, 1):
        bar.progress(i / steps, f"Step {i} of {steps}, t = {t}. What the model takes the pictures to be:")
        if i % every == 1 or every == 1:
            with emerging.container():
                show(x0, names, c)
        if i - 1 in frames:
            way.append(ddpm.to_pixels(x[:8]).cpu())
    pixels = ddpm.to_pixels(x).cpu()
    if c.interpolate is not None:  # there and back again
        way = [*pixels[:, None], *pixels[1:-1, None].flip(0)]
    text = dict(model=key[0].name, seed=c.seed, interpolate=c.interpolate, picture=c.init_image,
                strength=c.strength, sampler=c.sampler, steps=c.sampling_steps)
    text |= dict(classes=c.classes or "all", guidance=c.guidance) if model.classes else {}
    text = {name: value for name, value in text.items() if value is not None}
    images = ddpm.to_images(ddpm.crop(pixels, c))
    images = [written(lambda path, image=image: ddpm.save_png(image, path, text)) for image in images]
    with zipfile.ZipFile(packed := io.BytesIO(), "w") as archive:
        for i, image in enumerate(images):
            archive.writestr(f"{i:05d}.png", image)
    gif = written(lambda path: ddpm.save_gif(way, path, c))
    about = ", ".join(f"{name} {value}" for name, value in text.items())
    st.session_state[f"drawn: {section}"] = dict(
        images=images, names=names, about=about, zip=packed.getvalue(), gif=gif)

def show_result(section):
    """What this browser drew last in this section, and buttons to take it along."""
    if st.session_state.pop("stopped", False):
        st.info("Stopped.")
    if not (result := st.session_state.get(f"drawn: {section}")):
        return
    st.caption(result["about"])
    with st.container(horizontal=True):
        for i, (png, name) in enumerate(zip(result["images"], result["names"])):
            with st.container(width=SIDE, gap=None):
                st.image(png, width="stretch", alt=name)
                st.download_button(name, png, f"{i:05d}.png", "image/png", key=f"png {i}", type="tertiary",
                                   icon=":material/download:", on_click="ignore")
    with st.container(horizontal=True):
        for kind, label in (("zip", "All as a ZIP"), ("gif", "Animation as a GIF")):
            st.download_button(label, result[kind], f"pictures.{kind}", on_click="ignore",
                               icon=":material/download:")
    with st.expander("Animation"):
        st.image(result["gif"], alt="The pictures as they came about")

def form(section, key, label, pictures=8, extra=dict, **edit):
    """The form, its button, and what comes of it. extra() adds fields and returns settings."""
    left, right = st.columns([1, 2], gap="medium")
    with left.form(section):
        more = extra()
        config = ddpm.override(settings(section, key, pictures), **more)
        pressed = st.form_submit_button(label, type="primary", width="stretch")
    with right:
        if pressed:
            draw(section, key, config, **edit)
            st.rerun()
        show_result(section)

# ---------------------------------------------------------------------------------------------------- uploads

class Upload(io.BytesIO):
    """The bytes of an upload, called by its name in messages."""
    def __init__(self, file):
        super().__init__(file.getvalue())
        self.name = file.name

    def __repr__(self):
        return self.name

def upload(label, size, channels):
    """The picture that the user gives: its name and itself, (1, channels, size, size) in [-1, 1]; or None."""
    if not (file := st.file_uploader(label, [suffix[1:] for suffix in ddpm.SUFFIXES])):
        return None
    try:
        with ddpm.open_picture(Upload(file)) as image:
            pixels = math.prod(image.size)
    except Exception:  # broken files make decoders raise anything; load_picture says what is wrong
        pixels = 0
    ddpm.require(pixels <= 10**8, f"{file.name} has {pixels / 1e6:.0f} million pixels: give at most 100.")
    return file.name, ddpm.load_picture(Upload(file), size, channels)

# ------------------------------------------------------------------------------------------------------- edit

def rectangle(size, config):
    """A mask (1, 1, size, size) from two sliders: 1 inside, in shares of the picture without its padding."""
    left, right = st.columns(2)
    across = left.slider("From left to right, in %", 0, 100, (50, 100))
    down = right.slider("From top to bottom, in %", 0, 100, (0, 100))
    x1, x2, y1, y2 = (round(share * config.image_size / 100) for share in (*across, *down))
    mask = torch.zeros(1, 1, size, size)
    ddpm.crop(mask, config)[..., y1:y2, x1:x2] = 1
    return mask

def edit(key):
    model, _, config, _ = open_model(*key)
    ways = ["Vary a picture", "Redraw a part", "Between two seeds"]
    way = st.radio("What to do", ways, horizontal=True, key="way", persist_state="session")
    if way == ways[2]:
        def second():
            return dict(interpolate=st.number_input("Seed of the last picture", 0, LAST_SEED, 1))
        return form(way, key, "Go from one to the other", extra=second)
    if not (given := upload("Your picture; its central square is taken", config.image_size, model.channels)):
        return st.info("Give a picture, then say what is to become of it.")
    name, picture = given
    if way == ways[0]:
        show(picture, [name], config)
        def strength():
            help = "Little keeps nearly all of your picture, 1 forgets it."
            return dict(init_image=name, strength=st.slider("Strength", 0.05, 1.0, 0.5, 0.05, help=help))
        return form(way, key, "Vary", 4, strength, picture=picture)
    if st.radio("Where", ["A rectangle", "A mask of yours"], horizontal=True) == "A rectangle":
        mask = rectangle(model.image_size, config)
    elif given := upload("The mask: white is drawn anew, black is kept", config.image_size, 1):
        mask = (given[1] > 0).float()
    else:
        return None
    both = torch.cat([picture, torch.where(mask > 0, 1.0, picture)])
    show(both, [name, "white: drawn anew"], config)
    return form(way, key, "Redraw", 4, lambda: dict(init_image=name), picture=picture, mask=mask)

# ------------------------------------------------------------------------------------------------ look inside

@st.cache_data(max_entries=20, show_spinner="Drawing one picture, step by step")
def way_back(key, seed, label):
    """One picture's way out of noise: {t: (x_t, the clean picture predicted at t)}, and -1: the result."""
    model, diffusion, config, precision = open_model(*key)
    config = ddpm.override(config, seed=seed, sampling_steps=min(50, diffusion.T))
    way = list(ddpm.generate(model, diffusion, config, [0], [label], precision))
    levels = {t: (x.cpu(), x0.cpu()) for (_, x, _), (t, _, x0) in zip(way, way[1:])}
    return levels | {-1: (way[-1][1].cpu(),) * 2}

@st.fragment
def slide(key, name, picture, way, label):
    """The slider over t, and the two ways of a picture at that level of noise."""
    model, diffusion, config, precision = open_model(*key)
    levels = sorted(way)[1:]
    t = st.select_slider("Timestep t: from nearly clean to nearly noise", levels, levels[len(levels) // 3])
    device = next(model.parameters()).device
    denoise = ddpm.make_denoiser(model, diffusion, torch.tensor([label], device=device), precision=precision)
    eps = torch.randn(picture.shape, generator=torch.Generator().manual_seed(config.seed))
    xt = diffusion.q_sample(picture.to(device), torch.tensor([t], device=device), eps.to(device))
    into = torch.cat([picture, xt.cpu(), denoise(xt, t).cpu()])
    out = torch.cat([*way[t], way[-1][0]])
    left, right = st.columns(2)
    with left:
        st.write("**Into noise:** a picture, what t leaves of it, and what the model takes it to have been")
        show(into, [name, f"at t = {t}", "the guess"], config)
    with right:
        st.write("**Out of noise:** a picture on its way, what the model takes it for, what becomes of it")
        show(out, [f"at t = {t}", "the guess", "the result"], config)

@st.cache_data(max_entries=20, show_spinner="Plotting")
def plots(key, picture):
    """The forward process of a picture and the noise schedules, as PNGs."""
    config = open_model(*key)[2]
    return (written(lambda path: ddpm.plot_forward_process(torch.tensor(picture), config, path)),
            written(lambda path: ddpm.plot_schedules(config, path)))

def look_inside(key):
    model, diffusion, config, _ = open_model(*key)
    label = "A picture of yours; without one, the model draws it"
    given = upload(label, config.image_size, model.channels)
    left, right = st.columns(2)
    seed = left.number_input("Seed of the model's picture", 0, LAST_SEED, 0)
    label = model.classes.index(right.selectbox("Its class", model.classes)) if model.classes else -1
    way = way_back(key, seed, label)
    name, picture = given or ("the model's picture", way[-1][0])
    slide(key, name, picture, way, label)
    forward, schedules = plots(key, picture.numpy())
    st.write(f"**The forward process**, for T = {diffusion.T} timesteps:")
    st.image(forward, width="stretch", alt="The picture under more and more noise")
    st.write("**The schedule** says how much of the picture is left at each timestep:")
    st.image(schedules, width="stretch", alt="Signal and signal-to-noise ratio of the noise schedules")

# ------------------------------------------------------------------------------------------------ watch a run

def run_files():
    """Every run's metrics.jsonl in samples/ and two folders deep in the project, newest first."""
    name, here = "metrics.jsonl", Path()
    found = {*Path("samples").rglob(name), *here.glob(f"*/{name}"), *here.glob(f"*/*/{name}")}
    return sorted(found, key=lambda path: (-path.stat().st_mtime, path))

def read_run(path):
    """The Config of a run, and the lines that it has written so far."""
    rows = []
    with contextlib.suppress(ValueError):  # a last line that is being written
        rows.extend(map(json.loads, path.read_text().splitlines()))
    ddpm.require(rows and "config" in rows[0], f"{path} is not the metrics.jsonl of a run.")
    return ddpm.stored_config(rows[0], path), [row for row in rows[1:] if "loss" in row]

def share_done(config, row):
    """How far a run is at one of its lines, 0 to 1."""
    if config.steps:
        return row["step"] / config.steps
    return row["epoch"] / config.epochs if config.epochs else row["seconds"] / 60 / config.minutes

def time_left(config, rows):
    """Seconds until a run ends, at the speed of its last lines; None before there are two."""
    first, last = rows[-20:][0], rows[-1]
    seconds, share = last["seconds"] - first["seconds"], share_done(config, last) - share_done(config, first)
    return max(1 - share_done(config, last), 0) * seconds / share if share > 0 else None

def in_words(seconds):
    """118 -> "2 min", 4000 -> "1 h 7 min"."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

def plot_losses(rows):
    """The loss as a graph in the browser, in all and by quarter of the timesteps, on a scale of powers."""
    lines = {"all": [(row["step"], row["loss"]) for row in rows]}
    for q, name in enumerate(QUARTERS):
        lines[name] = [(row["step"], loss) for row in rows if (loss := row["loss_quarters"][q]) is not None]
    points = []
    for name, line in lines.items():
        steps, losses = zip(*line) if line else ((), ())
        smoothed = np.array([*zip(steps, ddpm.smooth(losses))])
        points += [dict(step=step, loss=loss, of=name) for step, loss in ddpm.spread(smoothed, 300).tolist()]
    legend = dict(orient="bottom", direction="vertical", title=None)
    spec = dict(mark="line", height=380, encoding=dict(
        x=dict(field="step", type="quantitative", axis=dict(tickCount=5)),
        y=dict(field="loss", type="quantitative", scale=dict(type="log", nice=False), axis=dict(tickCount=5)),
        color=dict(field="of", type="nominal", sort=[*lines], legend=legend)))
    st.vega_lite_chart(points, spec, width="stretch", alt="The loss, in all and by quarter of the timesteps")

@st.fragment(run_every=3)
def follow(path):
    """A run as it goes, shown anew every few seconds."""
    with errors_shown():
        config, rows = read_run(path)
        if not rows:
            return st.info("The run has begun, and has written no line yet.")
        row, left, age = rows[-1], time_left(config, rows), time.time() - path.stat().st_mtime
        share = min(share_done(config, row), 1.0)
        state = "finished" if share == 1 else f"{in_words(left)} left" if left else "time left not known yet"
        if share < 1 and age > 300:
            state = f"no new line for {in_words(age)}: stopped, or busy with pictures"
        st.progress(share, f"Step {row['step']}, {share:.0%}: {state}")
        numbers = {"Loss": f"{row['loss']:.4f}", "Pictures a second": f"{row['pictures_per_s']:.0f}",
                   "Passes over the pictures": f"{row['epoch']:.1f}"}
        for place, (label, value) in zip(st.columns(3), numbers.items()):
            place.metric(label, value)
        left, right = st.columns(2)
        with left:
            plot_losses(rows)
        for kind, meaning in GRIDS.items():
            files = sorted(path.parent.glob(f"{kind}_epoch*.png"), key=lambda file: file.stat().st_mtime)
            for file in files[-1:]:
                right.image(file.read_bytes(), f"{meaning} ({file.name})", width="stretch", alt=meaning)

def watch():
    files = run_files()
    ddpm.require(files, "There is no run here yet: start one with python ddpm.py --mode train")
    follow(st.selectbox("Run", files, format_func=lambda path: f"{path.parent}"))

# ------------------------------------------------------------------------------------------------------- page

def generate(key):
    form("Generate", key, "Generate")

SECTIONS = {"Generate": generate, "Look inside": look_inside, "Edit": edit, "Watch a run": watch}

@contextlib.contextmanager
def errors_shown():
    """What the user can mend is told in a sentence on the page."""
    try:
        yield
    except ddpm.UserError as e:
        st.error(str(e))
    except torch.OutOfMemoryError:
        st.error("Out of GPU memory: draw fewer pictures at a time.")
    except OSError as e:  # a model or a run that has just gone
        st.error(f"{e.strerror or e} ({e.filename}). Reload the page.")

def main():
    st.set_page_config("ddpm.py", layout="wide")
    st.title("ddpm.py")
    section = st.segmented_control("Section", SECTIONS, default="Generate", required=True, key="section",
                                   bind="query-params", label_visibility="collapsed")
    with errors_shown():
        if section == "Watch a run":
            watch()
        else:
            SECTIONS[section](choose_model())

if __name__ == "__main__":
    main()
