"""app.py: a page to generate, look inside, edit and watch a run. All that it computes is ddpm.py's.

    pip install streamlit
    streamlit run app.py        # and open http://localhost:8501

It offers the models in saved_models/ and the runs of the folder that it is started in, and writes
nothing.
"""

import contextlib
import io
import math
import tempfile
import time
import zipfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import ddpm

try:
    import streamlit as st
except ImportError:
    raise SystemExit(
        "The page needs Streamlit: pip install streamlit, then: streamlit run app.py") from None
if __name__ == "__main__" and not st.runtime.exists():
    raise SystemExit("This is a page: start it with streamlit run app.py")

WIDTH = 150  # of an image on the page at most, in the browser's pixels
SAMPLERS = {"dpm++sde": "adds noise, sharp", "ddpm": "adds noise, smooth",
            "dpm++": "no noise, sharp", "ddim": "no noise, smooth"}
GRIDS = {"generated": "Sampled from the same noise each time",
         "compared": "Clean, with noise, and as the model predicts them"}
RESIZED = {"crop": "its centre becomes", "pad": "with a border it becomes",
           "stretch": "it is stretched to"}
LAST_SEED = 2**53 - 1  # the largest number that browsers are sure of

# ------------------------------------------------------------------------------------------- models

INCLUDED = ("animals.pt", "animals_text.pt", "fashion_mnist.pt", "clothes.pt")

def model_files():
    """The models in saved_models/, newest first, then those included. No step checkpoints."""
    included = [ddpm.HERE / "saved_models" / name for name in INCLUDED]
    found = set(Path("saved_models").resolve().glob("*.pt*")).difference(included)
    others = [path for path in found if path.is_file() and path.name[0] != "."]
    return [*newest_first(others), *filter(Path.is_file, included)]

def newest_first(files):
    return sorted(files, key=lambda path: (-path.stat().st_mtime, path))

@st.cache_data(max_entries=1000, show_spinner="Looking through saved_models")
def describe(path, changed):
    """What a model was trained on, in a few words, or that it cannot be read."""
    try:
        checkpoint = ddpm.read_checkpoint(path)
        config = ddpm.stored_config(checkpoint, path)
    except ddpm.UserError:
        return f"{path.name}: cannot be read"
    folder = Path(config.data_path)
    data = folder.parent.name if folder.name.lower() in ddpm.SPLITS else folder.name
    size = ddpm.size_text(config.image_size)
    learned = f", {len(checkpoint['classes'])} classes" if checkpoint["classes"] else ""
    if checkpoint["vocabulary"]:
        learned = f", prompts of {len(checkpoint['vocabulary'])} words"
    return f"{path.name}: {data}, {size}{learned}{attention_note(config)}"

def attention_note(config):
    """What sets a network apart from one with full attention, as the default has."""
    if config.arch == "simple" or (config.arch == "unet" and config.attention == "none"):
        return ", without attention"
    if config.arch == "unet" and config.attention == "linear":
        return ", with linear attention"
    return ""

def card(path):
    """What the README beside an included model says about it, or when another was saved."""
    with contextlib.suppress(OSError):
        lines = (ddpm.HERE / "saved_models" / "README.md").read_text().splitlines()
        rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
        for name, *cells in rows:
            if name == f"`{path.name}`" and path.parent == ddpm.HERE / "saved_models":
                headings = rows[0][1:]
                return "; ".join(f"{heading}: {cell}" for heading, cell in zip(headings, cells))
    return f"saved {time.strftime('%Y-%m-%d %H:%M', time.localtime(path.stat().st_mtime))}"

@st.cache_resource(max_entries=4, show_spinner="Opening the model")
def open_model(path, changed):
    """The model in a file, shared until the file changes: (model, diffusion, config, precision)."""
    ddpm.keep_memory()
    config = ddpm.sampling_config(ddpm.read_checkpoint(path), path, {})
    device = ddpm.choose_device(config.device)
    precision = ddpm.choose_precision(config.precision, device)
    model, diffusion, config = ddpm.load_model(path, device, config.ema)
    return model, diffusion, config, precision

def choose_model():
    """The key of the model that the user wants: its path, and when that file last changed."""
    files = {path: path.stat().st_mtime_ns for path in model_files()}
    ddpm.require(files, "There is no model yet: train one with python ddpm.py --mode train")
    path = st.selectbox(
        "Model",
        list(files),
        format_func=lambda path: describe(path, files[path]),
        help="Yours in saved_models, the newest first, then those that come with ddpm.py.",
        key="model",  # without, a new file in the list would undo the choice
        persist_state="session")
    st.caption(card(path))
    return path, files[path]

# --------------------------------------------------------------------------------------- generating

def settings(section, key, num_images=8):
    """The fields of a form that all ways to generate share. Returns the Config to sample with."""
    model, diffusion, config, _ = open_model(*key)

    def kept(name):  # also while another section or model is looked at
        return dict(key=f"{section}, {name}, {key[0]}", persist_state="session")

    given = {}
    left, right = st.columns(2)
    given["num_samples"] = left.number_input("Images", 1, 64, num_images, **kept("images"))
    given["seed"] = right.number_input(
        "Seed",
        min_value=0,
        max_value=LAST_SEED,
        value=min(config.seed, LAST_SEED),
        help="The same seed and settings give the same images.",
        **kept("seed"))
    given["sampler"] = st.selectbox(
        "Sampler",
        list(SAMPLERS),
        index=list(SAMPLERS).index(config.sampler),
        format_func=lambda name: f"{name}: {SAMPLERS[name]}",
        **kept("sampler"))
    usual = {n for n in (5, 10, 20, 50, 100, 250, 1000) if n < diffusion.T}
    given["sampling_steps"] = st.select_slider(
        "Steps: more than 20 rarely help",
        sorted(usual | {config.sampling_steps, diffusion.T}),
        value=config.sampling_steps,
        **kept("steps"))
    if model.class_names:
        chosen = st.multiselect(
            "Classes",
            model.class_names,
            placeholder="all, in turn",
            **kept("classes"))
        given["classes"] = ",".join(chosen) or None
    if model.vocabulary:
        lines = st.text_area(
            "Prompts, one a line",
            "\n".join(config.prompt or model.examples[:4]),
            help="Words that the model knows: " + " ".join(model.vocabulary),
            **kept("prompts"))
        given["prompt"] = tuple(line for line in lines.splitlines() if line.strip())
        st.caption("Such as: " + "; ".join(model.examples))
    if model.class_names or model.vocabulary:
        given["guidance"] = st.slider(
            "Guidance scale: how closely to follow the class or prompt",
            min_value=1.0,
            max_value=8.0,
            value=float(min(max(config.guidance, 1.0), 8.0)),
            step=0.25,
            **kept("guidance"))
    return ddpm.override(config, sample_batch_size=64, **given)

def to_cropped(x, config):
    """Images x (N, C, H, W) in [-1, 1] as uint8 without the border that some networks need."""
    return ddpm.crop(ddpm.to_pixels(x), config.image_size)

def show(x, names, config):
    """Images x (N, C, H, W) in [-1, 1] side by side, as many as the screen is wide, each with its
    name."""
    images = ddpm.to_images(to_cropped(x, config))
    with st.container(horizontal=True):
        for image, name in zip(images, names):
            with thumbnail(image, name):
                st.caption(name)

def thumbnail(image, name):
    """Show a PIL image so that each of its pixels is a square of whole pixels of the browser, if it
    is not too wide. Returns the container, for what stands below it."""
    zoom = WIDTH // image.width
    container = st.container(width=zoom * image.width or WIDTH, gap=None)
    if zoom:  # twice as large as it is shown, for screens with two pixels for each of the browser's
        size = (2 * zoom * image.width, 2 * zoom * image.height)
        image = image.resize(size, Image.Resampling.NEAREST)
    container.image(image, width="stretch", alt=name, output_format="PNG")
    return container

def written(write):
    """The bytes that one of ddpm's functions writes to the path that write(path) hands it."""
    with tempfile.TemporaryDirectory() as folder:
        return Path(write(Path(folder, "file"))).read_bytes()

def generate_images(section, key, config, **edit):
    """Sample with a bar, a button to stop and the images as they emerge; keep the result for this
    section. Any click on the page ends this function where it next touches the page, and nothing is
    kept then."""
    model, diffusion, _, precision = open_model(*key)
    ddpm.check(config)
    num_prompts = len(set(config.prompt))
    ddpm.require(num_prompts <= config.num_samples,
                 f"{num_prompts} prompts need {num_prompts} images or more: raise Images.")
    labels, names = ddpm.sample_conditions(config, model)
    numbered = [f"{i} {name}" for i, name in enumerate(names, 1)]
    steps = len(ddpm.reverse_timesteps(config)) - 1
    animated = set(ddpm.evenly_spaced(np.arange(1, steps + 1), 60).tolist())
    every = math.ceil(steps / 12)
    bar = st.progress(0.0, "Starting")
    st.button("Stop", on_click=st.session_state.update, kwargs=dict(stopped=True))
    emerging = st.empty()
    rows = range(config.num_samples)
    frames = []
    sampling = ddpm.generate(model, diffusion, config, rows, labels, precision, **edit)
    for i, (t, x, x0) in enumerate(sampling, 1):
        bar.progress(i / steps, f"Step {i} of {steps}, t = {t}. The predicted x0:")
        if i % every == 1 or every == 1:
            with emerging.container():
                show(x0, numbered, config)
        if i in animated:
            frames.append(to_cropped(x[:8], config).cpu())
    pixels = to_cropped(x, config).cpu()
    if config.interpolate is not None:
        frames = ddpm.there_and_back(pixels)
    text = ddpm.png_text(config, steps, model, ddpm.model_digest(key[0]))
    texts = [text | dict(prompt=name) if model.vocabulary else text for name in names]
    result = keep_images(pixels, frames, texts)
    result |= dict(names=numbered, about=about(key, text))
    st.session_state[f"generated: {section}"] = result

def about(key, text):
    """The text of the PNGs as a sentence, with the name of the model's file."""
    shown = text | dict(model=key[0].name)
    del shown["version"], shown["torch"]
    return ", ".join(f"{name} {value}" for name, value in shown.items())

def keep_images(pixels, frames, texts):
    """Images (N, C, H, W) uint8 as PNGs with these texts, a ZIP of them, and their animation."""
    pngs = [written(lambda path, image=image, text=text: ddpm.save_png(image, path, text))
            for image, text in zip(ddpm.to_images(pixels), texts)]
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for i, png in enumerate(pngs):
            archive.writestr(f"{i:05d}.png", png)
    gif = written(lambda path: ddpm.save_gif(frames, path))
    return dict(images=pngs, zip=packed.getvalue(), gif=gif)

def show_result(section):
    """What this browser generated last in this section, and buttons to download it."""
    if st.session_state.pop("stopped", False):
        st.info("Stopped.")
    result = st.session_state.get(f"generated: {section}")
    if not result:
        return
    st.caption(result["about"])
    with st.container(horizontal=True):
        for i, (png, name) in enumerate(zip(result["images"], result["names"])):
            with thumbnail(Image.open(io.BytesIO(png)), name):
                st.download_button(
                    name,
                    png,
                    f"{i:05d}.png",
                    "image/png",
                    key=f"png {i}",
                    type="tertiary",
                    icon=":material/download:",
                    on_click="ignore")
    with st.container(horizontal=True):
        for kind, label in (("zip", "All as a ZIP"), ("gif", "Animation as a GIF")):
            st.download_button(
                label,
                result[kind],
                f"images.{kind}",
                icon=":material/download:",
                on_click="ignore")
    with st.expander("Animation"):
        st.image(result["gif"], alt="The images during the reverse process")

def form(section, key, label, num_images=8, extra=dict, **edit):
    """The form, its button, and what comes of it. extra() adds fields and returns settings."""
    left, right = st.columns([1, 2], gap="medium")
    with left.form(section):
        more = extra()
        config = ddpm.override(settings(section, key, num_images), **more)
        pressed = st.form_submit_button(label, type="primary", width="stretch")
    with right:
        if pressed:
            generate_images(section, key, config, **edit)
            st.rerun()
        show_result(section)

# ------------------------------------------------------------------------------------------ uploads

class Upload(io.BytesIO):
    """The bytes of an upload, called by its name in messages."""
    def __init__(self, file):
        super().__init__(file.getvalue())
        self.name = file.name

    def __repr__(self):
        return self.name

def upload(label, config, channels, white=None):
    """The image that the user gives: its name and itself, (1, channels, H, W) in [-1, 1]; or None.
    white: as in ddpm.decode."""
    file = st.file_uploader(label, [suffix[1:] for suffix in sorted(ddpm.image_suffixes())])
    if not file:
        return None
    try:
        with ddpm.open_image(Upload(file)) as image:
            pixels = math.prod(image.size)
    except Exception:  # broken files make decoders raise anything; load_image says what is wrong
        pixels = 0
    ddpm.require(pixels <= 10**8,
                 f"{file.name} has {pixels / 1e6:.0f} million pixels: give at most 100.")
    image = ddpm.load_image(Upload(file), config.image_size, channels, white, config.resize)
    return file.name, image

# --------------------------------------------------------------------------------------------- edit

def rectangle(model, config):
    """A mask (1, 1, H, W) from two sliders: 1 inside, in percent of the image without its
    border."""
    left, right = st.columns(2)
    across = left.slider("From left to right, in %", 0, 100, (50, 100))
    down = right.slider("From top to bottom, in %", 0, 100, (0, 100))
    height, width = ddpm.image_sides(config.image_size)
    x1, x2 = (round(percent * width / 100) for percent in across)
    y1, y2 = (round(percent * height / 100) for percent in down)
    mask = torch.zeros(1, 1, *model.image_shape[1:])
    ddpm.crop(mask, config.image_size)[..., y1:y2, x1:x2] = 1
    return mask

def choose_mask(model, config):
    """The mask (1, 1, H, W) that the user wants, 1 where to inpaint; None before it is
    there."""
    where = st.radio("Where", ["A rectangle", "A mask of yours"], horizontal=True)
    if where == "A rectangle":
        return rectangle(model, config)
    given = upload("The mask: white is inpainted, black is kept", config, 1)
    if not given:
        return None
    _, mask = given
    return (mask > 0).float()

def second_seed():
    return dict(interpolate=st.number_input("Seed of the last image", 0, LAST_SEED, 1))

def strength(name):
    meaning = "Low values keep nearly all of your image, 1 ignores it."
    value = st.slider("Strength", 0.05, 1.0, 0.5, 0.05, help=meaning)
    return dict(init_image=name, strength=value)

def edit(key):
    model, _, config, _ = open_model(*key)
    choices = ["Change an image", "Inpaint a part", "Interpolate between two seeds"]
    task = st.radio("What to do", choices, horizontal=True, key="task", persist_state="session")
    if task == "Interpolate between two seeds":
        return form(task, key, "Interpolate", extra=second_seed)
    label = f"Your image; {RESIZED[config.resize]} {ddpm.size_text(config.image_size)}"
    given = upload(label, config, model.image_channels, model.white)
    if not given:
        return st.info("Give an image, then choose what to do with it.")
    name, image = given
    if task == "Change an image":
        show(image, [name], config)
        return form(task, key, "Change", 4, lambda: strength(name), image=image)
    mask = choose_mask(model, config)
    if mask is None:
        return None
    masked = torch.where(mask > 0, 1.0, image)
    show(torch.cat([image, masked]), [name, "white: inpainted"], config)
    return form(task, key, "Inpaint", 4, lambda: dict(init_image=name), image=image, mask=mask)

# -------------------------------------------------------------------------------------- look inside

@st.cache_data(max_entries=20, show_spinner="Sampling one image, step by step")
def trajectory_of(key, seed, label):
    """The trajectory of one image: {t: (x_t, x0 predicted at t)}, and at -1 the result."""
    model, diffusion, config, precision = open_model(*key)
    config = ddpm.override(config, seed=seed, sampling_steps=min(50, diffusion.T))
    steps = list(ddpm.generate(model, diffusion, config, [0], [label], precision))
    levels = {}
    for (_, x, _), (t, _, x0) in pairwise(steps):  # x0 was predicted from the x of the step before
        levels[t] = (x.cpu(), x0.cpu())
    _, result, _ = steps[-1]
    levels[-1] = (result.cpu(), result.cpu())
    return levels

@st.fragment
def slide(key, name, image, trajectory, label):
    """The slider over t, and an image in the forward and the reverse process at that level of
    noise."""
    model, diffusion, config, precision = open_model(*key)
    levels = sorted(trajectory)[1:]
    t = st.select_slider(
        "Timestep t: from nearly clean to nearly noise",
        levels,
        value=levels[len(levels) // 3])
    device = next(model.parameters()).device
    y = torch.tensor([label], device=device)
    denoise = ddpm.make_denoiser(model, diffusion, y, precision=precision)
    eps = torch.randn(image.shape, generator=torch.Generator().manual_seed(config.seed))
    t_device = torch.tensor([t], device=device)
    xt = diffusion.q_sample(image.to(device), t_device, eps.to(device))
    forward = torch.cat([image, xt.cpu(), denoise(xt, t).cpu()])
    sample, pred_x0 = trajectory[t]
    result, _ = trajectory[-1]
    reverse = torch.cat([sample, pred_x0, result])
    left, right = st.columns(2)
    with left:
        st.write("**Forward process:** an image, the image noised to t, the x0 that the model "
                 "predicts from it")
        show(forward, [name, f"at t = {t}", "predicted x0"], config)
    with right:
        st.write("**Reverse process:** a sample at t, the x0 that the model predicts from it, the "
                 "result")
        show(reverse, [f"at t = {t}", "predicted x0", "the result"], config)

@st.cache_data(max_entries=20, show_spinner="Plotting")
def plots(key, image):
    """The forward process of an image and the noise schedules, as PNGs."""
    _, _, config, _ = open_model(*key)
    x0 = torch.tensor(image)
    forward = written(lambda path: ddpm.plot_forward_process(x0, config, path))
    schedules = written(lambda path: ddpm.plot_schedules(config, path))
    return forward, schedules

def look_inside(key):
    model, diffusion, config, _ = open_model(*key)
    question = "An image of yours; without one, the model generates it"
    given = upload(question, config, model.image_channels, model.white)
    left, right = st.columns(2)
    seed = left.number_input("Seed of the model's image", 0, LAST_SEED, 0)
    label = -1
    if model.class_names:
        class_name = right.selectbox("Its class", model.class_names)
        label = model.class_names.index(class_name)
    if model.vocabulary:
        prompt = right.text_input("Its prompt", model.examples[0])
        ddpm.check_words([prompt], model.vocabulary)
        label = tuple(ddpm.encode([prompt], model.vocabulary)[0])
    trajectory = trajectory_of(key, seed, label)
    generated, _ = trajectory[-1]
    name, image = given or ("the model's image", generated)
    slide(key, name, image, trajectory, label)
    forward, schedules = plots(key, image.numpy())
    st.write(f"**The forward process**, for T = {diffusion.T} timesteps:")
    st.image(forward, width="stretch", alt="The image under more and more noise")
    st.write("**The schedule** sets how much of the image is left at each timestep:")
    meaning = "Signal and signal-to-noise ratio of the noise schedules"
    st.image(schedules, width="stretch", alt=meaning)

# -------------------------------------------------------------------------------------- watch a run

def run_files():
    """Every run's metrics.jsonl in samples/ and two folders deep in the project, newest first."""
    found = {
        *Path("samples").rglob("metrics.jsonl"),
        *Path().glob("*/metrics.jsonl"),
        *Path().glob("*/*/metrics.jsonl")}
    return newest_first(found)

def read_run(path):
    """The Config of a run, and the training rows that it has logged so far."""
    head, rows = ddpm.read_metrics(path)
    return ddpm.stored_config(head, path), [row for row in rows if "loss" in row]

def progress_of(config, row):
    """The progress of a run at one of its rows, 0 to 1."""
    if config.steps:
        return row["step"] / config.steps
    if config.epochs:
        return row["epoch"] / config.epochs
    return row["seconds"] / 60 / config.minutes

def time_left(config, rows):
    """Seconds until a run ends, at the speed of its last rows; None before there are two."""
    recent = rows[-20:]
    first = recent[0]
    last = recent[-1]
    seconds = last["seconds"] - first["seconds"]
    progress = progress_of(config, last) - progress_of(config, first)
    if progress <= 0:
        return None
    return max(1 - progress_of(config, last), 0) * seconds / progress

def in_words(seconds):
    """118 -> "2 min", 4000 -> "1 h 7 min"."""
    minutes = math.ceil(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"

def plot_losses(rows):
    """The loss as a graph in the browser, in all and by quarter of the timesteps, on a scale of
    powers."""
    lines = {"all": [(row["step"], row["loss"]) for row in rows]}
    for q, name in enumerate(ddpm.QUARTERS):
        measured = [row for row in rows if row["loss_quarters"][q] is not None]
        lines[name] = [(row["step"], row["loss_quarters"][q]) for row in measured]
    points = []
    for name, line in lines.items():
        steps = [step for step, _ in line]
        losses = ddpm.smooth([loss for _, loss in line])
        smoothed = np.array([*zip(steps, losses)])
        for step, loss in ddpm.evenly_spaced(smoothed, 300).tolist():
            points.append(dict(step=step, loss=loss, of=name))
    few = dict(tickCount=5)
    powers = dict(type="log", nice=False)
    legend = dict(orient="bottom", direction="vertical", title=None)
    encoding = dict(
        x=dict(field="step", type="quantitative", axis=few),
        y=dict(field="loss", type="quantitative", axis=few, scale=powers),
        color=dict(field="of", type="nominal", sort=list(lines), legend=legend))
    st.vega_lite_chart(
        points,
        dict(mark="line", height=380, encoding=encoding),
        width="stretch",
        alt="The loss, in all and by quarter of the timesteps")

@st.fragment(run_every=3)
def follow(path):
    """A run as it goes, shown anew every few seconds."""
    with errors_shown():
        config, rows = read_run(path)
        if not rows:
            return st.info("The run has started, and has logged nothing yet.")
        row = rows[-1]
        left = time_left(config, rows)
        age = time.time() - path.stat().st_mtime
        progress = min(progress_of(config, row), 1.0)
        state = f"{in_words(left)} left" if left else "time left not known yet"
        if progress == 1:
            state = "finished"
        elif age > 300:
            state = f"no new line for {in_words(age)}: stopped, or busy sampling previews"
        st.progress(progress, f"Step {row['step']}, {progress:.0%}: {state}")
        numbers = {
            "Loss": f"{row['loss']:.4f}",
            "Images per second": f"{row['images_per_s']:.0f}",
            "Epochs": f"{row['epoch']:.1f}"}
        for place, (label, value) in zip(st.columns(3), numbers.items()):
            place.metric(label, value)
        left, right = st.columns(2)
        with left:
            plot_losses(rows)
        for kind, meaning in GRIDS.items():
            grids = path.parent.glob(f"{kind}_epoch*.png")
            newest = max(grids, key=lambda file: file.stat().st_mtime, default=None)
            if newest:
                caption = f"{meaning} ({newest.name})"
                right.image(newest.read_bytes(), caption, width="stretch", alt=meaning)

def watch():
    files = run_files()
    ddpm.require(files, "There is no run here yet: start one with python ddpm.py --mode train")
    path = st.selectbox(
        "Run",
        files,
        format_func=lambda path: f"{path.parent}",
        key="run",
        persist_state="session")
    follow(path)

# --------------------------------------------------------------------------------------------- page

def generate(key):
    form("Generate", key, "Generate")

SECTIONS = {"Generate": generate, "Look inside": look_inside, "Edit": edit, "Watch a run": watch}

@contextlib.contextmanager
def errors_shown():
    """What the user can fix is shown as a sentence on the page."""
    try:
        yield
    except ddpm.UserError as e:
        st.error(str(e))
    except (RuntimeError, MemoryError) as e:
        if ddpm.explain(e) is None:  # a fault of the program
            raise
        st.error("Out of memory: generate fewer images at a time.")
    except OSError as e:  # a model or a run that has just gone
        st.error(f"{e.strerror or e} ({e.filename}). Reload the page.")

def main():
    st.set_page_config("ddpm.py", layout="wide")
    st.title("ddpm.py")
    section = st.segmented_control(
        "Section",
        SECTIONS,
        default="Generate",
        required=True,
        key="section",
        bind="query-params",
        label_visibility="collapsed")
    with errors_shown():
        if section == "Watch a run":
            watch()
        else:
            SECTIONS[section](choose_model())

if __name__ == "__main__":
    main()
