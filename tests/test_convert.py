"""To and from diffusers: its pipelines sample the same images, its folders are read, and the rest
refused."""

import dataclasses
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, exit_code, metrics, places, randomise, slow, tree, words
from PIL import Image

import convert
import ddpm

SCHEDULES = ddpm.FIELDS["schedule"].metadata["choices"]
UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"
WEIGHTS = f"unet/{convert.FILES[0]}"


def config_of(**settings):
    tiny = dict(
        image_size=16, patch=1, channels=8, channel_mults=(1, 2), attention_at=(8,), predict="v"
    )
    steps = dict(timesteps=50, sampling_steps=10, sampler="ddim", guidance=1.0)
    return ddpm.override(ddpm.Config(), **tiny | steps | settings)


def checkpoint(path, config, channels=3, classes=()):
    """Write a checkpoint with random weights, plain and EMA ones that differ."""
    plain, ema = (
        randomise(ddpm.build_model(config, channels, classes), seed).state_dict() for seed in (0, 1)
    )
    state = dict(format=ddpm.FORMAT, config=dataclasses.asdict(config), classes=list(classes))
    torch.save(state | dict(channels=channels, weights=plain, ema=ema), path)
    return path


def ours(path, n=4, labels=None, **settings):
    """The images (n, C, H, W) in [-1, 1] that ddpm.py samples, as diffusers does without guidance
    and in steps of one length."""
    model, diffusion, config = ddpm.load_model(path)
    config = ddpm.override(config, **dict(guidance=1.0, spacing="uniform") | settings)
    return [*ddpm.generate(model, diffusion, config, range(n), labels or [-1] * n)][-1][1].clamp(
        -1, 1
    )


def theirs(pipeline, n=4, **more):
    """The images that a pipeline of diffusers samples from the same noise."""
    pipeline.set_progress_bar_config(disable=True)
    noise = [torch.Generator().manual_seed(ddpm.derive_seed(0, i)) for i in range(n)]
    return pipeline(batch_size=n, generator=noise, output_type="pt", **more).images * 2 - 1


def ddim(folder, n=4, steps=10):
    pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
    return theirs(pipeline, n, num_inference_steps=steps, use_clipped_model_output=True)


def same(a, b, free=0.2):
    """Images of which enough is neither black nor white to compare, equal to a sixteenth of a grey
    level: to the rounding of float32, which the division by a small sqrt(abar) makes larger, by
    machine up to 1.5e-4."""
    assert (a.abs() < 0.99).float().mean() > free
    torch.testing.assert_close(a, b, rtol=0, atol=5e-4)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*flags) runs convert.py's command line inside this process, in tmp_path; its exit
    code."""
    monkeypatch.chdir(tmp_path)

    return lambda *flags: exit_code(convert.main, *flags)


def refused(capsys, *expected):
    """There is one line on stderr, an error that holds all of these."""
    err = capsys.readouterr().err.strip().splitlines()
    assert len(err) == 1 and err[0].startswith("error:"), err
    assert all(what in err[0] for what in expected), err[0]
    assert err[0][-1] in ".)" or "--help" in err[0] or "pip install" in err[0], err[0]


# ---- to diffusers


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("predict", ["eps", "x0", "v"])
def test_ddim_pipeline_samples_our_images(tmp_path, predict, schedule):
    path = checkpoint(tmp_path / "m.pt", config_of(predict=predict, schedule=schedule))
    convert.to_diffusers(path, tmp_path / "d")
    # What a random network takes for noise hardly matters: nearly all is clipped. A trained one is
    # below.
    same(ours(path), ddim(tmp_path / "d"), free=0.02 if predict == "eps" else 0.2)


@pytest.mark.parametrize("schedule", ["linear", slow("cosine")])
def test_a_trained_model_that_predicts_noise_samples_the_same(
    run, image_folder, schedule
):
    more = (
        f"--predict eps --schedule {schedule} --timesteps 1000 --no_class_cond --steps 60 --lr 1e-2"
    )
    here = places(Path(), image_folder)
    assert (
        ddpm.main(words("--mode train", TINY, more, "--batch_size 8 --ema_decay 0.9", *here)) == 0
    )
    assert run("--to_diffusers d --model_path model.pt") == 0
    same(ours("model.pt", sampler="ddim", sampling_steps=50), ddim("d", steps=50))


@pytest.mark.parametrize(
    "channels, settings",
    [
        (1, dict(channel_mults=(1, 2, 2), attention_at=(8,), res_blocks=2)),
        (3, dict(channels=16, channel_mults=(1, 3), attention_at=(16, 8))),
        (3, dict(channel_mults=(1, 3, 1), attention_at=(4,), res_blocks=3)),
        (1, dict(channels=64, channel_mults=(1,), attention_at=())),
        (3, dict(attention="none")),
        (3, dict(attention="none", attention_at=(64,), dropout=0.5)),
        (1, dict(image_size=28, attention_at=(16,))),
        (
            3,
            dict(
                timesteps=1000, schedule="linear", beta_start=1e-3, beta_end=0.1, sampling_steps=50
            ),
        ),
    ],
)
def test_networks_of_many_forms_sample_the_same(tmp_path, channels, settings):
    config = config_of(**settings)
    path = checkpoint(tmp_path / "m.pt", config, channels)
    convert.to_diffusers(path, tmp_path / "d")
    same(ours(path), ddim(tmp_path / "d", steps=config.sampling_steps))


@pytest.mark.parametrize("predict", ["x0", "v"])
def test_ddpm_pipeline_samples_our_images_on_all_steps(tmp_path, predict):
    path = checkpoint(tmp_path / "m.pt", config_of(predict=predict, timesteps=20))
    convert.to_diffusers(path, tmp_path / "d")
    pipeline = diffusers.DDPMPipeline.from_pretrained(tmp_path / "d")
    same(ours(path, sampler="ddpm", sampling_steps=20), theirs(pipeline, num_inference_steps=20))


def test_diffusers_finds_the_pipeline_by_itself_and_misses_or_ignores_no_option(tmp_path, caplog):
    path = checkpoint(tmp_path / "m.pt", config_of())
    convert.to_diffusers(path, tmp_path / "d")
    diffusers.utils.logging.enable_propagation()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "d")
    diffusers.utils.logging.disable_propagation()
    said = [record.getMessage() for record in caplog.records]
    assert not [
        text for text in said if "accelerate" not in text
    ]  # it would like that to be installed
    assert isinstance(pipeline, diffusers.DDPMPipeline)
    for part, name in ((pipeline.unet, UNET), (pipeline.scheduler, SCHEDULER)):
        written = json.loads((tmp_path / "d" / name).read_text())
        assert written.items() <= dict(part.config, _class_name=type(part).__name__).items()


def test_weights_are_the_ema_ones_or_the_plain_ones(tmp_path):
    path = checkpoint(tmp_path / "m.pt", config_of())
    convert.to_diffusers(path, tmp_path / "ema")
    convert.to_diffusers(path, tmp_path / "plain", ema=False)
    stored = ddpm.read_checkpoint(path)
    for folder, name in (("ema", "ema"), ("plain", "weights")):
        unet = diffusers.UNet2DModel.from_pretrained(tmp_path / folder / "unet")
        assert torch.equal(unet.conv_in.weight, stored[name]["conv_in.weight"])


@pytest.mark.parametrize("label", [-1, 0, 2])
def test_a_class_or_none_becomes_part_of_the_weights(run, capsys, label):
    names = ["cat", "dog", "lion"]
    path = checkpoint("m.pt", config_of(), classes=names)
    flags = ["--classes", names[label]] if label >= 0 else []
    assert run("--to-diffusers d --model-path m.pt", *flags) == 0
    assert "cat, dog, lion" in capsys.readouterr().out or label >= 0
    here = ours(path, labels=[label] * 4)
    same(here, ddim("d"))
    for other in {-1, 0, 1, 2} - {label}:
        assert (here - ours(path, labels=[other] * 4)).abs().max() > 0.02, (
            "two labels sample the same"
        )
    config = json.loads(Path("d", UNET).read_text())
    assert config["num_class_embeds"] is None and config["class_embed_type"] is None


def test_the_snippet_of_the_readme_samples_what_ddpm_samples(run, image_folder):
    """From the README's own lines: both commands, and the Python between them."""
    section = re.search(
        r"## To and from diffusers\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S
    )[1]
    blocks = re.findall(r"((?:^    .*\n|^\n)+)", section, re.M)
    [snippet] = [inspect.cleandoc(block) for block in blocks if "DDIMPipeline" in block]
    commands = re.findall(r"^    python (\S+) (.*)", section, re.M)
    Path("saved_models").mkdir()
    classes = ["cat", "lion"]
    checkpoint("saved_models/denoise_model.pt", config_of(timesteps=100), classes=classes)
    [(_, flags)] = [c for c in commands if "--to_diffusers" in c[1]]
    assert run(flags) == 0
    exec(snippet, variables := {})
    [(_, flags)] = [c for c in commands if "--sampler ddim" in c[1]]
    assert ddpm.main(words(flags, "--individual out --device cpu")) == 0
    sampled = [np.asarray(Image.open(f), dtype=int) for f in sorted(Path("out").iterdir())]
    assert len(sampled) == len(variables["images"]) > 1
    for a, b in zip(sampled, variables["images"]):
        assert a.std() > 20 and abs(a - np.asarray(b, dtype=int)).max() <= 1


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(arch="simple"), ("--arch simple", "--arch unet")),
        (dict(arch="resnet18", image_size=32), ("--arch resnet18", "--arch unet")),
        (dict(patch=2), ("--patch 2", "--patch 1")),
        (dict(attention="linear"), ("--attention linear", "--attention full")),
        (dict(channel_mults=(2, 4)), ("--channel_mults (2, 4)", "--channel_mults 1")),
        (
            dict(timesteps=1000, schedule="linear", beta_end=0.2),
            ("--beta_end 0.2", "--beta_end 0.02"),
        ),
    ],
)
def test_what_diffusers_cannot_express_is_refused(run, capsys, settings, expected):
    checkpoint("m.pt", config_of(**settings))
    assert run("--to_diffusers d --model_path m.pt") == 1
    refused(capsys, "m.pt", "diffusers", *expected)
    assert [*Path().iterdir()] == [Path("m.pt")]


@pytest.mark.parametrize(
    "classes, flags, expected",
    [
        (["cat", "dog"], "--classes lion", ("'lion'", "cat, dog")),
        (["cat", "dog"], "--classes cat,dog", ("give one",)),
        ([], "--classes cat", ("'cat'", "without classes")),
        ([], "--model_path none.pt", ("No checkpoint none.pt",)),
    ],
)
def test_flags_that_fit_no_model_are_refused(run, capsys, classes, flags, expected):
    checkpoint("m.pt", config_of(), classes=classes)
    assert run("--to_diffusers d --model_path m.pt", flags) == 1
    refused(capsys, *expected)
    assert not Path("d").exists()


def test_a_class_may_have_a_comma_in_its_name(run):
    checkpoint("m.pt", config_of(), classes=["cat,black", "dog"])
    assert run("--to_diffusers d --model_path m.pt --classes cat,black") == 0


def test_a_folder_is_written_whole_or_not_at_all_and_never_over_another(run, capsys, monkeypatch):
    checkpoint("m.pt", config_of())
    Path("full").mkdir()
    Path("full", "thesis.txt").write_text("years of work")
    Path("file").write_text("years of work")
    for name in ("full", "file"):
        assert run("--model_path m.pt --to_diffusers", name) == 1
        refused(capsys, name, "not an empty folder")
    Path("empty").mkdir()
    assert run("--model_path m.pt --to_diffusers empty") == 0
    assert run("--model_path m.pt --to_diffusers deep/down/here/") == 0
    assert set(tree("empty")) == set(tree("deep/down/here")) == {INDEX, UNET, SCHEDULER, WEIGHTS}
    assert str(Path("empty", UNET).resolve()) in capsys.readouterr().out

    write, before = ddpm.atomic_write, tree(".")

    def fail(path, content):
        if path.suffix == ".safetensors":
            raise OSError(28, "No space left on device", str(path))
        return write(path, content)

    monkeypatch.setattr(ddpm, "atomic_write", fail)
    assert run("--model_path m.pt --to_diffusers new") == 1
    refused(capsys, "No space left")
    assert tree(".") == before and not Path("new").exists()


def test_without_a_model_of_ones_own_the_included_one_is_taken(run, capsys):
    assert run("--to_diffusers d") == 1
    refused(capsys, "animals.pt was trained with --patch 2")


# ---- from diffusers

PUBLISHED = (
    dict(  # of the model for CIFAR-10 that the paper's authors released, as diffusers has it
        act_fn="silu",
        attention_head_dim=None,
        block_out_channels=[128, 256, 256, 256],
        center_input_sample=False,
        down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        in_channels=3,
        layers_per_block=2,
        mid_block_scale_factor=1,
        norm_eps=1e-6,
        norm_num_groups=32,
        out_channels=3,
        sample_size=32,
        time_embedding_type="positional",
        up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
    )
)
OF_CLASS = dict(_class_name="UNet2DModel", _diffusers_version="0.0.4")
PUBLISHED_SCHEDULER = dict(
    _class_name="DDPMScheduler",
    _diffusers_version="0.1.1",
    beta_end=0.02,
    beta_schedule="linear",
    beta_start=1e-4,
    clip_sample=True,
    num_train_timesteps=1000,
    trained_betas=None,
    variance_type="fixed_large",
)
NO_ATTENTION = dict(
    add_attention=False, down_block_types=["DownBlock2D"] * 4, up_block_types=["UpBlock2D"] * 4
)
SMALL = PUBLISHED | dict(block_out_channels=[8, 16, 16, 16], norm_num_groups=2)


def their_unet(config):
    return randomise(diffusers.UNet2DModel(**config), scale=0.1).eval()


def old_names(state):
    """Attention as in folders from before diffusers 0.15."""
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for word, old in new.items():
        state = {
            re.sub(rf"(attentions\.\d)\.{word}\.", rf"\1.{old}.", k): v for k, v in state.items()
        }
    return state


def same_networks(path, unet, n=2):
    """Both output the same for the same noisy images, at both ends of t and between."""
    model, _, config = ddpm.load_model(path)
    x = torch.randn(n, model.image_channels, config.image_size, config.image_size)
    with torch.no_grad():
        for t in (0, config.timesteps // 2, config.timesteps - 1):
            t = torch.full((n,), t)
            a, b = model(x, t), unet(x, t).sample
            assert b.std() > 0.01, "an output of nothing would be equal for the wrong reason"
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * b.abs().max().item())


def test_the_published_cifar10_model_is_read(run, tmp_path):
    """Its folder is flat, its attention has the old names, its weights are in a .bin."""
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(**PUBLISHED).eval()
    for name in (
        "norm1.weight",
        "norm2.weight",
    ):  # as it comes, a new network outputs next to nothing
        for key, p in unet.named_parameters():
            if key.endswith(name):
                p.data *= 3
    Path("d").mkdir()
    Path("d/config.json").write_text(json.dumps(PUBLISHED | OF_CLASS))
    Path("d/scheduler_config.json").write_text(json.dumps(PUBLISHED_SCHEDULER))
    torch.save(old_names(unet.state_dict()), f"d/{convert.FILES[1]}")
    assert run("--from_diffusers d") == 0
    model, diffusion, config = ddpm.load_model("saved_models/denoise_model.pt")
    assert sum(p.numel() for p in model.parameters()) == 35_746_307
    same_networks("saved_models/denoise_model.pt", unet, n=1)
    recipe = ddpm.preset("cifar10")
    for name in "channels channel_mults attention_at res_blocks patch class_cond schedule".split():
        assert getattr(config, name) == getattr(recipe, name), name
    assert config.predict == "eps" and config.timesteps == 1000 and model.class_names == []
    expected = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    torch.testing.assert_close(diffusion.abar[:-1], expected)


FORMS = dict(
    old_names=dict(old=True),
    bin=dict(safe=False),
    flat=dict(flat=True),
    flat_old_bin=dict(flat=True, old=True, safe=False),
    without_a_scheduler=dict(flat=True, scheduler=False),
)


@pytest.mark.parametrize("form", FORMS)
def test_folders_of_every_form_are_read(run, capsys, form):
    form = dict(old=False, safe=True, flat=False, scheduler=True) | FORMS[form]
    unet = their_unet(SMALL)
    pipeline = diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(prediction_type="epsilon"))
    pipeline.save_pretrained("d", safe_serialization=form["safe"])
    weights = Path("d/unet") / convert.FILES[not form["safe"]]
    if form["old"]:
        read, write = ddpm.torch.load, torch.save
        if form["safe"]:
            read, write = (
                convert.import_safetensors().load_file,
                convert.import_safetensors().save_file,
            )
        write(old_names(read(weights)), weights)
    if form["flat"]:
        for file in [*Path("d/unet").iterdir(), *Path("d/scheduler").iterdir()]:
            file.rename(Path("d", file.name))
        for name in ("unet", "scheduler"):
            Path("d", name).rmdir()
    if not form["scheduler"]:
        Path("d/scheduler_config.json").unlink()
    assert run("--from_diffusers d --model_path m.pt") == 0
    assert ("no d/scheduler_config.json" in capsys.readouterr().out) == (not form["scheduler"])
    same_networks("m.pt", unet)
    assert ddpm.load_model("m.pt")[2].schedule == "linear"


@pytest.mark.parametrize(
    "prediction, settings",
    [
        ("epsilon", dict(in_channels=1, out_channels=1)),
        ("sample", dict(layers_per_block=1, dropout=0.1, act_fn="swish")),
        ("v_prediction", dict(sample_size=[32, 32], time_embedding_dim=32, attn_norm_num_groups=2)),
        ("v_prediction", dict(NO_ATTENTION, attention_head_dim=8)),
        ("v_prediction", dict(attention_head_dim=16)),  # at stages that are 16 wide
    ],
)
def test_networks_of_diffusers_are_read_with_their_prediction(run, prediction, settings):
    unet = their_unet(SMALL | settings)
    scheduler = diffusers.DDIMScheduler(
        num_train_timesteps=40, prediction_type=prediction, timestep_spacing="trailing"
    )
    diffusers.DDIMPipeline(unet, scheduler).save_pretrained("d")
    assert run("--from_diffusers d --model_path m.pt") == 0
    same_networks("m.pt", unet)
    config = ddpm.load_model("m.pt")[2]
    assert config.timesteps == 40
    ddpm.check(config)  # it asks for no more steps than there are
    if prediction != "epsilon":
        sampled = ours("m.pt", n=2, sampler="ddim", sampling_steps=10)
        same(sampled, ddim("d", n=2))


@pytest.mark.parametrize("given", ["name", "betas"])
@pytest.mark.parametrize("kind", SCHEDULES)
def test_schedules_are_found_by_their_betas(run, kind, given):
    """What comes back has diffusers' own alpha-bars, be they given by name or one by one."""
    name = {"quadratic": "scaled_linear", "cosine": "squaredcos_cap_v2"}.get(kind, kind)
    ends = dict(beta_start=2e-4, beta_end=0.03)
    if given == "name" and kind != "exponential":  # which diffusers has not
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=200, beta_schedule=name, **ends)
    else:
        betas = ddpm.make_betas(kind, 200, 2e-4, 0.03).float().tolist()
        scheduler = diffusers.DDPMScheduler(num_train_timesteps=200, trained_betas=betas)
    diffusers.DDPMPipeline(their_unet(SMALL), scheduler).save_pretrained("d")
    assert run("--from_diffusers d --model_path m.pt") == 0
    _, diffusion, config = ddpm.load_model("m.pt")
    assert config.schedule == kind
    torch.testing.assert_close(
        diffusion.abar[:-1].float(), scheduler.alphas_cumprod, rtol=1e-3, atol=1e-6
    )
    x0, eps = torch.randn(2, 2, 3, 8, 8)
    losses = diffusion.loss(lambda xt, t, y: torch.zeros_like(xt), x0, torch.tensor([0, 99]), eps)
    torch.testing.assert_close(losses, eps.square().mean(dim=(1, 2, 3)), msg="diffusers' own loss")


@pytest.mark.parametrize(
    "attention, schedule", [*(("full", s) for s in SCHEDULES), ("none", "linear")]
)
def test_there_and_back_gives_the_same_weights_and_settings(run, attention, schedule):
    settings = dict(dropout=0.1, channel_mults=(1, 2, 2), res_blocks=2)
    config = config_of(schedule=schedule, attention=attention, **settings)
    checkpoint("m.pt", config, channels=1)
    assert run("--to_diffusers d --model_path m.pt") == 0
    assert run("--from_diffusers d --model_path back.pt") == 0
    before, after = ddpm.read_checkpoint("m.pt"), ddpm.read_checkpoint("back.pt")
    assert before["ema"].keys() == after["ema"].keys() == after["weights"].keys()
    for name, value in before["ema"].items():
        assert torch.equal(value, after["ema"][name]) and torch.equal(
            value, after["weights"][name]
        ), name
    a, b = (ddpm.load_model(path)[1].abar for path in ("m.pt", "back.pt"))
    torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-12)
    kept = ddpm.load_model("back.pt")[2]
    same = {*ddpm.flag_groups()["network"], "predict", "timesteps", "schedule", "image_size"}
    different = {n for n in same if getattr(kept, n) != getattr(config, n)}
    assert different <= {"attention_at" if attention == "none" else "", "class_cond"}


def test_a_converted_checkpoint_samples_and_starts_a_training(
    run, main, image_folder, capsys
):
    kinds = dict(
        down_block_types=SMALL["down_block_types"][:2], up_block_types=SMALL["up_block_types"][2:]
    )
    unet = SMALL | kinds | dict(block_out_channels=[8, 16], sample_size=16, layers_per_block=1)
    scheduler = diffusers.DDPMScheduler(num_train_timesteps=50, prediction_type="v_prediction")
    diffusers.DDPMPipeline(their_unet(unet), scheduler).save_pretrained("d")
    assert run("--from_diffusers d --model_path m.pt") == 0
    assert main("--mode sample --model_path m.pt --num_samples 4 --individual out") == 0
    sampled = np.stack([np.asarray(Image.open(f)) for f in sorted(Path("out").iterdir())])
    assert sampled.shape == (4, 16, 16, 3) and sampled.std() > 20
    capsys.readouterr()
    more = "--no_class_cond --steps 2 --init_from m.pt"
    assert main("--mode train", TINY, more, *places(Path("on"), image_folder)) == 0
    out = capsys.readouterr().out
    own = len(ddpm.read_checkpoint("m.pt")["weights"])
    assert f"{own} of {own} tensors; new: none" in out
    assert len(metrics("on/samples")[1]) == 2


def test_an_earlier_checkpoint_is_kept(run, capsys):
    diffusers.DDPMPipeline(their_unet(SMALL), diffusers.DDPMScheduler()).save_pretrained("d")
    Path("m.pt").write_text("weeks of training")
    assert run("--from_diffusers d --model_path m.pt") == 0
    assert "m.pt.previous" in capsys.readouterr().out
    assert Path("m.pt.previous").read_text() == "weeks of training"
    assert ddpm.load_model("m.pt")


# ---- what is refused


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A good pipeline folder, to be spoiled."""
    place = tmp_path_factory.mktemp("folder") / "d"
    diffusers.DDPMPipeline(their_unet(SMALL), diffusers.DDPMScheduler()).save_pretrained(place)
    return place


def option(file, name, value):
    def spoil(folder):
        content = json.loads((folder / file).read_text())
        (folder / file).write_text(json.dumps(content | {name: value}))

    return spoil


def without(name):
    def spoil(folder):
        shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()

    return spoil


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def tensors(change):
    def spoil(folder):
        safe = convert.import_safetensors()
        weights = safe.load_file(folder / WEIGHTS)
        change(weights)
        safe.save_file(weights, folder / WEIGHTS)

    return spoil


class Malicious:
    def __reduce__(self):
        return Path.touch, (Path("ran"),)


def pickled(content):
    def spoil(folder):
        (folder / WEIGHTS).unlink()
        torch.save(content, folder / "unet" / convert.FILES[1])

    return spoil


RISING = np.linspace(1e-4, 0.02, 1000)
BENT = RISING * (1 + 0.01 * np.sin(np.linspace(0, np.pi, 1000)))  # by 1 % in the middle
PLAIN = [
    option(UNET, f"{side.lower()}_block_types", [f"{side}Block2D"] * 4) for side in ("Down", "Up")
]
ATTENTIVE = ["AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"]
REFUSED = {
    # parts that are missing or damaged
    "no unet config": (without(UNET), "config.json"),
    "no scheduler": (without("scheduler"), "scheduler_config.json"),
    "no weights": (without(WEIGHTS), convert.FILES[0]),
    "json": (text(UNET, "{"), "damaged"),
    "json list": (text(SCHEDULER, "[1]"), "damaged"),
    "json null": (text(UNET, "null"), "damaged"),
    "cut short": (text(WEIGHTS, "x" * 100), "damaged"),
    "vae": (option(INDEX, "vqvae", ["diffusers", "VQModel"]), "vqvae"),
    # other networks
    "conditional": (option(UNET, "_class_name", "UNet2DConditionModel"), "UNet2DConditionModel"),
    "nameless": (option(UNET, "_class_name", None), "UNet2DModel"),
    "down blocks": (
        option(UNET, "down_block_types", ["ResnetDownsampleBlock2D"] * 4),
        "down_block_types",
    ),
    "up blocks": (option(UNET, "up_block_types", ["AttnUpBlock2D"] * 4), "up_block_types"),
    "attention in the middle only": (
        lambda folder: [spoil(folder) for spoil in PLAIN],
        "down_block_types",
    ),
    "unequal": (option(UNET, "down_block_types", ATTENTIVE), "up_block_types"),
    "class names": (option(UNET, "num_class_embeds", 10), "num_class_embeds"),
    "class times": (option(UNET, "class_embed_type", "timestep"), "class_embed_type"),
    "gelu": (option(UNET, "act_fn", "gelu"), "act_fn"),
    "scale and shift": (
        option(UNET, "resnet_time_scale_shift", "scale_shift"),
        "resnet_time_scale_shift",
    ),
    "frequencies": (option(UNET, "freq_shift", 0), "freq_shift"),
    "cosines first": (option(UNET, "flip_sin_to_cos", True), "flip_sin_to_cos"),
    "fourier": (option(UNET, "time_embedding_type", "fourier"), "time_embedding_type"),
    "time width": (option(UNET, "time_embedding_dim", 64), "time_embedding_dim"),
    "epsilon": (option(UNET, "norm_eps", 1e-5), "norm_eps"),
    "groups": (option(UNET, "norm_num_groups", 4), "norm_num_groups"),
    "groups of attention": (option(UNET, "attn_norm_num_groups", 4), "attn_norm_num_groups"),
    "middle": (option(UNET, "mid_block_type", None), "mid_block_type"),
    "middle scale": (option(UNET, "mid_block_scale_factor", 2), "mid_block_scale_factor"),
    "attention but not in the middle": (option(UNET, "add_attention", False), "down_block_types"),
    "heads": (option(UNET, "attention_head_dim", 8), "attention_head_dim"),
    "padding": (option(UNET, "downsample_padding", 1), "downsample_padding"),
    "downsampling": (option(UNET, "downsample_type", "resnet"), "downsample_type"),
    "upsampling": (option(UNET, "upsample_type", "resnet"), "upsample_type"),
    "centred": (option(UNET, "center_input_sample", True), "center_input_sample"),
    "latents": (option(UNET, "in_channels", 4), "in_channels"),
    "learned variance": (option(UNET, "out_channels", 6), "out_channels"),
    "widths": (option(UNET, "block_out_channels", [8, 16, 16, 20]), "block_out_channels"),
    "odd width": (option(UNET, "block_out_channels", [7, 14, 14, 14]), "even"),
    "no size": (option(UNET, "sample_size", None), "settings"),
    "size in words": (option(UNET, "sample_size", "32"), "settings"),
    "three sides": (option(UNET, "sample_size", [32, 32, 32]), "settings"),
    "size that does not halve": (option(UNET, "sample_size", 20), "20 must be divisible by 8"),
    "padded size": (option(UNET, "sample_size", 28), "sample_size"),
    "no widths": (option(UNET, "block_out_channels", []), "settings"),
    "zero width": (option(UNET, "block_out_channels", [0, 0, 0, 0]), "settings"),
    "giant": (option(UNET, "block_out_channels", [2**40] * 4), "out of range"),
    "newer option": (option(UNET, "warp_speed", 9), "warp_speed"),
    # other schedulers
    "foreign scheduler": (
        option(SCHEDULER, "_class_name", "ScoreSdeVeScheduler"),
        "ScoreSdeVeScheduler",
    ),
    "thresholding": (option(SCHEDULER, "thresholding", True), "thresholding"),
    "unclipped": (option(SCHEDULER, "clip_sample", False), "clip_sample"),
    "clip range": (option(SCHEDULER, "clip_sample_range", 2.0), "clip_sample_range"),
    "zero snr": (option(SCHEDULER, "rescale_betas_zero_snr", True), "rescale_betas_zero_snr"),
    "prediction": (option(SCHEDULER, "prediction_type", "flow"), "prediction_type"),
    "old prediction": (option(SCHEDULER, "predict_epsilon", False), "predict_epsilon"),
    "variance": (option(SCHEDULER, "variance_type", "learned_range"), "variance_type"),
    "schedule": (option(SCHEDULER, "beta_schedule", "laplace"), "beta_schedule is laplace"),
    "betas": (option(SCHEDULER, "trained_betas", [0.01, 0.02] * 500), "trained_betas"),
    "falling betas": (option(SCHEDULER, "trained_betas", RISING[::-1].tolist()), "trained_betas"),
    "bent betas": (option(SCHEDULER, "trained_betas", BENT.tolist()), "trained_betas"),
    "few betas": (option(SCHEDULER, "trained_betas", [0.01] * 999), "num_train_timesteps"),
    "betas of nan": (option(SCHEDULER, "trained_betas", [float("nan")] * 1000), "trained_betas"),
    "beta of 2": (option(SCHEDULER, "beta_end", 2.0), "beta_end"),
    "T in words": (option(SCHEDULER, "num_train_timesteps", "1000"), "settings"),
    "newer noise": (option(SCHEDULER, "use_karras_sigmas", True), "use_karras_sigmas"),
    # weights
    "missing tensor": (tensors(lambda w: w.pop("mid_block.attentions.0.to_k.bias")), "to_k.bias"),
    "tensor too many": (tensors(lambda w: w.update(extra=torch.zeros(1))), "extra"),
    "shape": (
        tensors(lambda w: w.update({"conv_in.bias": torch.zeros(9)})),
        "conv_in.bias is (9,)",
    ),
    "nan": (
        tensors(lambda w: w["conv_in.bias"].fill_(float("nan"))),
        "conv_in.bias has values that are not",
    ),
    "infinite": (tensors(lambda w: w["conv_out.bias"].fill_(float("inf"))), "conv_out.bias"),
    "malicious": (pickled(Malicious()), "more than tensors"),
    "malicious value": (pickled({"conv_in.bias": Malicious()}), "more than tensors"),
    "tensor alone": (pickled(torch.zeros(3)), "more than tensors"),
    "text": (pickled({"conv_in.bias": "zero"}), "more than tensors"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_we_cannot_express_is_refused_by_name_and_nothing_is_touched(
    run, folder, capsys, case
):
    spoil, expected = REFUSED[case]
    shutil.copytree(folder, "d")
    spoil(Path("d"))
    Path("m.pt").write_text("weeks of training")
    before = tree(".")
    assert run("--from_diffusers d --model_path m.pt") == 1
    refused(capsys, "d cannot be converted", expected)
    assert tree(".") == before  # among it: no file that a pickle made


def test_a_folder_that_is_not_there_is_refused(run, capsys):
    assert run("--from_diffusers somewhere/else") == 1
    refused(capsys, "No folder somewhere/else", "download")


def test_a_folder_is_no_checkpoint(run, folder, capsys):
    shutil.copytree(folder, "d")
    assert run("--from_diffusers d --model_path d") == 1
    refused(capsys, "--model_path d is a folder")
    assert tree("d") == tree(folder)


def test_a_good_folder_is_not_refused(run, folder):
    """Or else the table above would prove nothing."""
    assert run("--model_path m.pt --from_diffusers", folder) == 0


def test_the_defaults_are_those_of_diffusers():
    for kind, defaults in (
        (diffusers.UNet2DModel, convert.UNET_DEFAULTS),
        (diffusers.DDPMScheduler, convert.SCHEDULER_DEFAULTS),
        (diffusers.DDIMScheduler, convert.SCHEDULER_DEFAULTS),
    ):
        for name, p in list(inspect.signature(kind.__init__).parameters.items())[1:]:
            written = name in (
                "sample_size",
                "block_out_channels",
                "down_block_types",
                "up_block_types",
            )
            assert written or defaults[name] == p.default, name


BOTH = "--to_diffusers a --from_diffusers b"


@pytest.mark.parametrize("flags", ["", BOTH, "--to_diffusers", "--to_diff a"])
def test_a_command_line_needs_one_direction(run, capsys, flags):
    assert run(flags) == 2
    refused(capsys, "convert.py --help")


@pytest.mark.parametrize("flags", ["--classes cat", "--no-ema"])
def test_reading_takes_no_flags_of_writing(run, folder, capsys, flags):
    assert run("--model_path m.pt --from_diffusers", folder, flags) == 1
    refused(capsys, "--classes and --no_ema")
    assert not Path("m.pt").exists()


def test_converting_needs_safetensors_and_not_diffusers(run, folder, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    assert run("--model_path m.pt --from_diffusers", folder) == 0
    assert run("--model_path m.pt --to_diffusers d") == 0
    capsys.readouterr()
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    assert run("--model_path m.pt --to_diffusers e") == 1
    refused(capsys, "pip install safetensors")
    assert run("--model_path n.pt --from_diffusers d") == 1
    refused(capsys, "pip install safetensors")


def test_a_model_that_a_run_writes_is_not_moved(run, folder, capsys):
    Path("m.pt").write_bytes(b"the run's")
    with ddpm.model_lock(Path("m.pt")):
        assert run("--from_diffusers", folder, "--model_path m.pt") == 1
    refused(capsys, "m.pt is in use by another run")
    assert Path("m.pt").read_bytes() == b"the run's"
    assert run("--from_diffusers", folder, "--model_path m.pt") == 0
    assert Path("m.pt.previous").read_bytes() == b"the run's"


def test_settings_nested_without_end_are_a_sentence(run, folder, tmp_path, capsys):
    shutil.copytree(folder, "deep")
    Path("deep/unet/config.json").write_text("[" * 200_000)
    assert run("--from_diffusers deep --model_path m.pt") == 1
    refused(capsys, "deep cannot be converted", "Get it anew")


@pytest.mark.parametrize("size", (28, 32))
def test_a_border_that_diffusers_keeps_is_told(run, capsys, size):
    checkpoint("m.pt", config_of(image_size=size, attention_at=(16,)))
    assert run("--model_path m.pt --to_diffusers d") == 0
    assert ("with a border of 2 to crop" in capsys.readouterr().out) == (size == 28)
