"""convert.py: converts a model of ddpm.py to a pipeline folder of diffusers, or back.

    python convert.py --to_diffusers DIR                   # the model that --mode sample uses
    python convert.py --to_diffusers DIR --classes lion    # one of its classes (default: none)
    python convert.py --from_diffusers DIR                 # writes saved_models/denoise_model.pt

ddpm.UNet, without --patch and --attention linear, is diffusers' UNet2DModel under other names. So
nothing is lost: the same noise gives the same images. This needs the package safetensors, not
diffusers.
"""

import dataclasses
import json
import math
import os
import sys
import tempfile
from pathlib import Path

import torch

import ddpm
from ddpm import UserError, require

# Of weights; the first is what we write.
FILES = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

# --------------------------------------------------------------------------------- names of weights

STEM = {
    "embed.mlp.0": "time_embedding.linear_1",
    "embed.mlp.2": "time_embedding.linear_2",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out"}
RES = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut"}
ATTENTION = {
    "norm": "group_norm",
    "qkv": "to_q to_k to_v",  # one matrix in ours, three in theirs
    "out": "to_out.0"}
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # as in old files

def layer_names(model):
    """What UNet2DModel calls the layers of a ddpm.UNet: {our name: [their name, or three]}."""
    names = {}

    def add(ours, theirs, table):
        for name, their_names in table.items():
            names[ours + name] = [theirs + each for each in their_names.split()]

    add("", "", STEM)
    add("middle.res.", "mid_block.resnets.0.", RES)
    add("middle.attention.", "mid_block.attentions.0.", ATTENTION)
    add("middle2.", "mid_block.resnets.1.", RES)
    for path, layers in (("down", model.down), ("up", model.up)):  # flat in ours, theirs by stages
        stage = 0
        block = 0
        for i, layer in enumerate(layers):
            ours = f"{path}.{i}."
            theirs = f"{path}_blocks.{stage}."
            if isinstance(layer, ddpm.ResAttention):
                add(f"{ours}res.", f"{theirs}resnets.{block}.", RES)
                add(f"{ours}attention.", f"{theirs}attentions.{block}.", ATTENTION)
                block += 1
            else:  # downsamples or upsamples, and ends the stage
                add(ours, f"{theirs}{path}samplers.0.", {"conv": "conv"})
                stage += 1
                block = 0
    return names

def to_their_weights(model, label=-1):
    """The state dict of the UNet2DModel that equals a ddpm.UNet at this label, -1 for none."""
    names = layer_names(model)
    state = model.state_dict()
    labels = state.pop("embed.labels.weight", None)
    if labels is not None:  # it is added to the output of the time MLP's last layer, as a bias is
        state["embed.mlp.2.bias"] = state["embed.mlp.2.bias"] + labels[label]
    weights = {}
    for name, value in state.items():
        layer, _, kind = name.rpartition(".")
        their_names = names[layer]
        parts = value.chunk(len(their_names))
        for their_name, part in zip(their_names, parts):
            weights[f"{their_name}.{kind}"] = part.float().clone()
    return weights

def new_name(name):
    """The name of a weight, without the words of old files."""
    return ".".join(OLD.get(word, word) for word in name.split("."))

def to_our_weights(model, theirs):
    """The reverse, for a model without labels. UserError unless all is there and every tensor is
    used."""
    theirs = {new_name(name): value for name, value in theirs.items()}
    names = layer_names(model)
    weights = {}
    for name, own in model.state_dict().items():
        layer, _, kind = name.rpartition(".")
        their_names = [f"{their_layer}.{kind}" for their_layer in names[layer]]
        shape = (own.shape[0] // len(their_names), *own.shape[1:])
        for n in their_names:
            require(n in theirs, f"its weights lack {n}. Get config.json and weights anew.")
            found = tuple(theirs[n].shape)
            require(found == shape,
                    f"{n} is {found} where its config.json asks for {shape}. Get both anew.")
            require(theirs[n].isfinite().all(),
                    f"{n} has values that are not finite. Use another model.")
        weights[name] = torch.cat([theirs.pop(n).float() for n in their_names])
    unused = ", ".join(list(theirs)[:3])
    require(not theirs, f"its config.json has no place for {unused}. Get both anew.")
    return weights

# ----------------------------------------------------------------------------------------- settings

# Options of diffusers that ddpm.py always has in one way. A head of attention of None channels has
# them all.
UNET = dict(
    _class_name="UNet2DModel",
    center_input_sample=False,
    time_embedding_type="positional",
    time_embedding_dim=None,
    freq_shift=1,
    flip_sin_to_cos=False,
    mid_block_type="UNetMidBlock2D",
    mid_block_scale_factor=1,
    downsample_padding=0,
    downsample_type="conv",
    upsample_type="conv",
    act_fn="silu",
    attention_head_dim=None,
    attn_norm_num_groups=None,
    norm_eps=1e-6,
    resnet_time_scale_shift="default",
    class_embed_type=None,
    num_class_embeds=None)
SCHEDULER = dict(
    clip_sample=True,
    clip_sample_range=1.0,
    thresholding=False,
    rescale_betas_zero_snr=False)
# How to sample, which binds no model. On all T steps DDPMPipeline then does what our ddpm sampler
# does.
SAMPLING = dict(
    variance_type="fixed_large",
    timestep_spacing="trailing",
    steps_offset=0)

# What a file means that leaves an option out, and what else may be in it.
UNET_DEFAULTS = UNET | dict(
    _class_name=None,
    freq_shift=0,
    flip_sin_to_cos=True,
    downsample_padding=1,
    attention_head_dim=8,
    norm_eps=1e-5,
    norm_num_groups=32,
    in_channels=3,
    out_channels=3,
    layers_per_block=2,
    dropout=0.0,
    add_attention=True,
    num_train_timesteps=None)
SCHEDULER_DEFAULTS = SCHEDULER | SAMPLING | dict(
    _class_name=None,
    num_train_timesteps=1000,
    beta_start=1e-4,
    beta_end=0.02,
    beta_schedule="linear",
    trained_betas=None,
    prediction_type="epsilon",
    predict_epsilon=True,
    set_alpha_to_one=True,
    variance_type="fixed_small",
    timestep_spacing="leading",
    dynamic_thresholding_ratio=0.995,
    sample_max_value=1.0,
    tensor_format="pt")

PREDICTS = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
SCHEDULES = dict(
    linear="linear",
    scaled_linear="quadratic",
    squaredcos_cap_v2="cosine",
    sigmoid="sigmoid")

def unet_config(config, model):
    """The config.json of the UNet2DModel that equals a model of ours."""
    _, height, width = model.image_shape
    blocks = [layer for layer in model.down if isinstance(layer, ddpm.ResAttention)]
    kinds = []
    for first_block in blocks[:: config.res_blocks]:  # of each stage
        kinds.append("Attn" if isinstance(first_block.attention, ddpm.Attention) else "")
    return UNET | dict(
        sample_size=height if height == width else [height, width],
        in_channels=model.image_channels,
        out_channels=model.image_channels,
        block_out_channels=[config.channels * multiple for multiple in config.channel_mults],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        layers_per_block=config.res_blocks,
        add_attention=config.attention != "none",
        dropout=config.dropout,
        norm_num_groups=model.norm_out.num_groups)

def scheduler_config(config):
    """The scheduler_config.json of a model of ours: its very betas, whatever the schedule."""
    betas = ddpm.make_betas(
        config.schedule, config.timesteps, config.beta_start, config.beta_end)
    predicts = {ours: theirs for theirs, ours in PREDICTS.items()}
    return SCHEDULER | SAMPLING | dict(
        _class_name="DDPMScheduler",
        num_train_timesteps=config.timesteps,
        trained_betas=betas.tolist(),
        prediction_type=predicts[config.predict])

def compare(given, known, ours, **choices):
    """UserError for the first option given that is not known, or neither as in `ours` nor among
    `choices`."""
    choices = {name: [value] for name, value in ours.items()} | choices
    known = {*known, *choices}
    for name, value in given.items():
        require(name in known or name[0] == "_" or value is None,
                f"{name} is {value}, an option that ddpm.py does not have. Keep this model in "
                "diffusers.")
        can = choices.get(name, [value])
        require(value in can,
                f"{name} is {value} where ddpm.py can only have {' or '.join(map(str, can))}. "
                "Train a model with that, or keep this one in diffusers.")

def read_unet(given, **settings):
    """The Config, with these settings, and the model, names and shapes only, that a config.json
    means."""
    given = UNET_DEFAULTS | given
    first = {name: given[name] for name in ("_class_name", "in_channels")}
    compare(first, (), UNET, in_channels=[1, 3])
    widths = given["block_out_channels"]
    size = given["sample_size"]
    height, width = size if isinstance(size, list) else (size, size)
    kinds = given["down_block_types"]
    stages = [i for i, kind in enumerate(kinds) if kind == "AttnDownBlock2D"]  # with attention
    config = ddpm.override(
        ddpm.Config(),
        image_size=f"{width:d}x{height:d}",
        patch=1,
        channels=widths[0],
        res_blocks=given["layers_per_block"],
        channel_mults=tuple(width // widths[0] for width in widths),
        dropout=given["dropout"],
        min_snr=0.0,
        detail_weight=0.0,
        class_cond=False,
        attention="full" if given["add_attention"] else "none",
        guidance=1.0,
        **settings)
    attention_at = tuple(ddpm.stage_heights(config)[i] for i in stages)
    config = ddpm.override(config, attention_at=attention_at)
    ddpm.check(config)
    with torch.device("meta"):  # no memory for weights
        model = ddpm.build_model(config, given["in_channels"], [])
    ours = unet_config(config, model)
    attention_widths = {widths[i] for i in stages}
    if given["add_attention"]:
        attention_widths.add(widths[-1])  # in the middle
    heads = given["attention_head_dim"]
    is_one_head = attention_widths <= {heads}  # wherever there is attention
    compare(
        given,
        UNET_DEFAULTS,
        ours,
        sample_size=[ours["sample_size"], list(model.image_shape[1:])],
        attention_head_dim=[heads if is_one_head else None],
        act_fn=["silu", "swish"],
        attn_norm_num_groups=[None, given["norm_num_groups"]],
        time_embedding_dim=[None, 4 * widths[0]])
    return config, model

def read_scheduler(given):
    """The settings of ours that a scheduler_config.json amounts to."""
    given = SCHEDULER_DEFAULTS | given
    T = given["num_train_timesteps"]
    betas = given["trained_betas"]
    name = given["beta_schedule"]
    compare(
        given,
        SCHEDULER_DEFAULTS,
        SCHEDULER,
        _class_name=["DDPMScheduler", "DDIMScheduler"],
        prediction_type=list(PREDICTS),
        predict_epsilon=[True],
        variance_type=["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"],
        beta_schedule=[name] if betas else list(SCHEDULES),
        num_train_timesteps=[len(betas) if betas else T])
    schedule = SCHEDULES.get(name)
    start = given["beta_start"]
    end = given["beta_end"]
    if betas:
        schedule, start, end = find_schedule(betas)
    if schedule == "cosine":
        start = None
        end = None
    return dict(
        timesteps=T,
        schedule=schedule,
        beta_start=start,
        beta_end=end,
        sampling_steps=min(50, T),
        spacing="uniform",
        predict=PREDICTS[given["prediction_type"]])

def find_schedule(betas):
    """The name, beta_start and beta_end of our schedule that gives these betas to one in 10,000."""
    first = betas[0]
    last = betas[-1]
    betas = torch.tensor(betas, dtype=torch.float64)
    tail = (last - first) / (math.exp(6) - 1)  # what a sigmoid from -6 to 6 leaves out at each end
    names = ddpm.FIELDS["schedule"].metadata["choices"] if 0 < first <= last else []
    for name in names:
        start = first
        end = last
        if name == "sigmoid":
            start -= tail
            end += tail
        if torch.allclose(ddpm.make_betas(name, len(betas), start, end), betas, 1e-4, 0):
            return name, start, end
    raise UserError(
        "its trained_betas are none of ddpm.py's schedules. Keep this model in diffusers.")

# ------------------------------------------------------------------------------------------ folders

def import_safetensors():
    try:
        import safetensors.torch
    except ImportError:
        raise UserError(
            "Files named .safetensors need a package: pip install safetensors") from None
    return safetensors.torch

def check_expressible(config, diffusion, model_path):
    """UserError for the first setting of a model that diffusers cannot express."""
    for name, fits, use in (
            ("arch", config.arch == "unet", "unet"),
            ("patch", config.patch == 1, "1"),
            ("attention", config.attention != "linear", "full"),
            ("channel_mults", config.channel_mults[0] == 1, "1 and more"),
            ("beta_end", diffusion.abar.min() > 1e-37, "0.02")):  # it has abar_t in float32
        require(fits, f"{model_path} was trained with --{name} {getattr(config, name)}, which "
                f"diffusers cannot express: train one with --{name} {use}.")

def to_diffusers(model_path, folder, classes=None, ema=True):
    """Write a checkpoint's model as a pipeline folder, which appears whole or not at all, for the
    class of this name or for none. Returns the paths of the files. UserError for what diffusers
    cannot express."""
    folder = Path(folder).resolve()
    is_empty = folder.is_dir() and not any(folder.iterdir())
    require(is_empty or not folder.exists(),
            f"{folder} is there already, and not an empty folder: give another.")
    model, diffusion, config = ddpm.load_model(model_path, ema=ema)
    check_expressible(config, diffusion, model_path)
    require(not model.vocabulary, f"{model_path} was trained on captions, which diffusers cannot "
            "express as a UNet2DModel: train one with --no_captions.")
    labels = ddpm.class_labels(classes, model.class_names) if classes else [-1]
    require(len(labels) == 1,
            f"--classes {classes}: give one, since a folder samples one class.")
    label = labels[0]
    index = dict(
        _class_name="DDPMPipeline",
        unet=["diffusers", "UNet2DModel"],
        scheduler=["diffusers", "DDPMScheduler"])
    weights = to_their_weights(model, label)
    files = {
        "model_index.json": to_json(index),
        "unet/config.json": to_json(unet_config(config, model)),
        "scheduler/scheduler_config.json": to_json(scheduler_config(config)),
        f"unet/{FILES[0]}": import_safetensors().save(weights, {"format": "pt"})}
    write_folder(folder, files)
    print(f"model     {model_path}, {model.weights_kind} weights")
    if model.class_names:
        choices = f"none; --classes takes one of {', '.join(model.class_names)}"
        print(f"class     {classes or choices}")
    if model.image_shape[1:] != ddpm.image_sides(config.image_size):
        print("note: its images' sides of 28 pixels are 32 in diffusers, with a border of 2 to crop")
    return [str(folder / name) for name in files]

def to_json(content):
    return (json.dumps(content, indent=2) + "\n").encode()

def write_folder(folder, files):
    """Write files {name: bytes} as a folder, which may exist if it is empty."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as place:
        unfinished = Path(place, folder.name)
        for name, content in files.items():
            ddpm.atomic_write(unfinished / name, lambda f, content=content: f.write(content))
        if folder.exists():
            folder.rmdir()  # it is empty
        os.rename(unfinished, folder)

def read_json(path):
    require(path.is_file(),
            f"there is no {path}. Get the whole folder, as save_pretrained writes it.")
    return json.loads(path.read_bytes())

def read_weights(folder):
    """The weights in a folder, {name: tensor}. Whatever else a file holds is refused, and never
    run."""
    path = next((folder / name for name in FILES if (folder / name).is_file()), None)
    require(path, f"there is no {FILES[0]} in {folder}, nor {FILES[1]}. Get one of them.")
    safetensors = import_safetensors() if path.suffix == ".safetensors" else None
    try:
        if safetensors:
            weights = safetensors.load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        require(all(isinstance(v, torch.Tensor) for v in weights.values()), "")
    except Exception:  # bad bytes can raise anything
        raise UserError(f"{path} is damaged, or holds more than tensors. Get {FILES[0]}.") from None
    return weights

def check_parts(folder):
    """UserError for a pipeline that has more than a network and a scheduler."""
    index = folder / "model_index.json"
    if not index.exists():
        return
    others = {*read_json(index)} - {"unet", "scheduler"}
    parts = sorted(part for part in others if part[0] != "_")
    require(not parts, f"it is a pipeline with {', '.join(parts)}, which ddpm.py does not have. "
            "Keep it in diffusers.")

def read_folder(folder):
    """The Config, the model, names and shapes only, and the weights that a folder means."""
    is_pipeline = (folder / "unet").is_dir()
    unet = folder / "unet" if is_pipeline else folder
    scheduler = folder / "scheduler" if is_pipeline else folder
    scheduler_file = scheduler / "scheduler_config.json"
    check_parts(folder)
    if is_pipeline or scheduler_file.exists():
        settings = read_scheduler(read_json(scheduler_file))
    else:
        settings = read_scheduler({"_class_name": "DDPMScheduler"})
        print(f"note: no {scheduler_file}: taking the paper's T 1000, linear from 1e-4 to 0.02, "
              "predicts eps")
    config, model = read_unet(read_json(unet / "config.json"), data_path=str(folder), **settings)
    weights = to_our_weights(model, read_weights(unet))
    return config, model, weights

def from_diffusers(folder, model_path):
    """Write the model in a pipeline folder, or in one with a config.json, as a checkpoint; an
    earlier one is set aside. Returns the checkpoint's path. UserError for what ddpm.py cannot
    express."""
    folder = Path(folder)
    require(folder.is_dir(),
            f"No folder {folder}: give one that save_pretrained wrote, or download one.")
    require(not Path(model_path).is_dir(),
            f"--model_path {model_path} is a folder: give a file's name.")
    try:
        config, model, weights = read_folder(folder)
    except UserError as e:
        raise UserError(f"{folder} cannot be converted: {e}") from None
    except (TypeError, ValueError, AttributeError, LookupError, ArithmeticError,
            RecursionError) as e:
        raise UserError(
            f"{folder} cannot be converted: a file of its settings is damaged, or lacks one "
            f"({type(e).__name__}: {e}). Get it anew.") from None
    state = dict(
        format=ddpm.FORMAT,
        config=dataclasses.asdict(config),
        classes=[],
        channels=model.image_channels,
        data=None,
        held_out=[],
        step=0,
        seconds=0.0,
        weights=weights,
        ema=weights)
    count = sum(value.numel() for value in weights.values())
    print(f"network   unet, {count:,} parameters, {ddpm.size_text(config.image_size)}, "
          f"{model.image_channels} channels")
    print(f"diffusion T {config.timesteps}, {config.schedule}, predicts {config.predict}")
    with ddpm.model_lock(Path(model_path)):
        ddpm.set_aside_model(model_path)
        return ddpm.atomic_write(model_path, lambda f: torch.save(state, f))

# ------------------------------------------------------------------------------------- command line

def main(argv=None):
    """Run a command line and return its exit code."""
    parser = ddpm.Parser("convert.py", allow_abbrev=False, description=__doc__.splitlines()[0])
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument(
        "--to_diffusers",
        metavar="DIR",
        help="write a pipeline folder of diffusers")
    direction.add_argument(
        "--from_diffusers",
        metavar="DIR",
        help="read one")
    default = ddpm.Config.model_path
    parser.add_argument(
        "--model_path",
        metavar="PATH",
        default=default,
        help=f"checkpoint to read or write (default: {default}; to read, else the one included "
             "with ddpm.py)")
    parser.add_argument(
        "--classes",
        metavar="NAME",
        help="the class for the folder to sample (default: none)")
    parser.add_argument(
        "--no_ema",
        action="store_true",
        help="take the plain weights, not the EMA weights")
    given = parser.parse(sys.argv[1:] if argv is None else argv)
    classes = given.get("classes")
    ema = not given["no_ema"]

    def work():
        if "to_diffusers" in given:
            path = ddpm.find_model(given["model_path"])
            ddpm.print_files(to_diffusers(path, given["to_diffusers"], classes, ema))
        else:
            require(ema and not classes,
                    "--classes and --no_ema are for --to_diffusers, since a folder of diffusers "
                    "has one class and one set of weights: leave them out.")
            path = from_diffusers(given["from_diffusers"], given["model_path"])
            ddpm.print_files([path])

    return ddpm.run(work)

if __name__ == "__main__":
    raise SystemExit(main())
