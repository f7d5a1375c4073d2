"""Random settings, settings of the wrong kind, and damaged bytes: each works, or is refused in a
sentence."""

import dataclasses
import io
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tree
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from PIL import Image

import ddpm

FIELDS = {f.name: f for f in dataclasses.fields(ddpm.Config)}
STORED = Path(__file__).resolve().parent / "checkpoint_format_1.pt"
SLOW = "--slow" in sys.argv


def cases(few, many):
    """The settings of a fuzz: always the same cases, few of them or, with --slow, many."""
    more = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
    return lambda test: seed(0)(settings(max_examples=many if SLOW else few, **more)(test))


# ---- settings

TINY = dict(
    image_size=st.sampled_from([8, 12, 16, 20, 28, 32]),
    max_images=st.sampled_from([None, 1, 7]),
    hflip=st.booleans(),
    holdout=st.sampled_from([0.0, 0.2]),
    timesteps=st.integers(10, 60),
    schedule=st.sampled_from(["linear", "cosine", "quadratic", "exponential", "sigmoid"]),
    beta_start=st.sampled_from([None, None, None, 1e-8, 1e-4, 0.5]),
    beta_end=st.sampled_from([None, None, None, 1e-4, 0.02, 0.999]),
    predict=st.sampled_from(["eps", "x0", "v"]),
    loss=st.sampled_from(["l2", "l1", "huber"]),
    min_snr=st.sampled_from([0.0, 5.0, 1e6]),
    arch=st.sampled_from(["unet", "unet", "unet", "simple"]),
    channels=st.sampled_from([4, 5, 6]),
    channel_mults=st.lists(st.integers(1, 3), min_size=1, max_size=3).map(tuple),
    patch=st.sampled_from([1, 1, 2, 3, 4]),
    res_blocks=st.integers(1, 2),
    attention=st.sampled_from(["full", "linear", "none"]),
    attention_at=st.lists(st.sampled_from([1, 2, 4, 8, 16]), max_size=2).map(tuple),
    dropout=st.sampled_from([0.0, 0.3, 0.95]),
    class_cond=st.booleans(),
    label_dropout=st.sampled_from([0.0, 0.1, 1.0]),
    batch_size=st.integers(1, 5),
    grad_accum=st.integers(1, 3),
    lr=st.sampled_from([1e-9, 1e-3, 1e-2]),
    optimizer=st.sampled_from(["adam", "adamw", "muon"]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    lr_schedule=st.sampled_from(["constant", "cosine"]),
    warmup_steps=st.integers(0, 3),
    grad_clip=st.sampled_from([0.0, 1e-3, 1.0]),
    ema_decay=st.sampled_from([0.0, 0.9, 0.999999]),
    precision=st.sampled_from(["auto", "fp32", "bf16", "fp16"]),
    seed=st.sampled_from([0, 1, 2**63 - 1]),
    save_every=st.integers(1, 3),
    sample_every=st.integers(1, 3),
    log_every=st.integers(1, 3),
    keep_last=st.integers(1, 3),
    num_samples=st.integers(1, 4),
    sample_batch_size=st.integers(1, 4),
    sampler=st.sampled_from(list(ddpm.SAMPLERS)),
    sampling_steps=st.integers(1, 12),
    eta=st.sampled_from([0.0, 0.5, 1.0]),
    classes=st.sampled_from([None, None, "disc", "square, disc", "unicorn"]),
    guidance=st.sampled_from([0.0, 1.0, 2.0]),
    ema=st.booleans(),
    gif=st.booleans(),
)


def test_valid_settings_train_and_sample_or_are_refused_before_a_file_is_written(
    image_folder
):
    counts = dict(trained=0, refused=0)

    @cases(24, 150)
    @given(st.fixed_dictionaries(TINY), st.data())
    def any_settings(given, data):
        if data.draw(
            st.sampled_from([True, True, True, True, False])
        ):  # mostly: what has to fit does
            stride = given["patch"] * 2 ** (len(given["channel_mults"]) - 1)
            stride = 16 if given["arch"] == "simple" else stride
            given["image_size"] = stride * -(-8 // stride) * data.draw(st.integers(1, 2))
            sides = [
                given["image_size"] // given["patch"] >> i
                for i in range(len(given["channel_mults"]))
            ]
            given["attention_at"] = tuple(data.draw(st.lists(st.sampled_from(sides), max_size=2)))
            clash = given["schedule"] == "cosine" or (given["beta_start"] or 0) > 0.01
            given |= dict(beta_start=None, beta_end=None) if clash else {}
            given |= (
                dict(classes=None)
                if given["classes"] == "unicorn" or not given["class_cond"]
                else {}
            )
            given["precision"] = given["precision"].replace("fp16", "bf16")
            given["batch_size"] *= given["grad_accum"]
            given["channels"] += given["channels"] % 2
            given["sampling_steps"] = min(given["sampling_steps"], given["timesteps"])
        with tempfile.TemporaryDirectory() as folder:
            where = dict(
                model_path=f"{folder}/m.pt",
                samples_dir=f"{folder}/s",
                download_dir=f"{folder}/d",
                device="cpu",
            )
            config = ddpm.preset("animals", **given, **where, steps=2, data_path=str(image_folder))
            try:
                ddpm.train(config)
            except ddpm.UserError as e:
                assert not [
                    name for name in tree(folder) if not name.startswith("d/.decoded/")
                ]  # the cache
                assert 20 < len(str(e)) < 400 and str(e)[-1] in ".)", e
                counts["refused"] += 1
                return
            counts["trained"] += 1
            checkpoint = ddpm.read_checkpoint(
                f"{folder}/m.pt"
            )  # which holds no weight that is not finite
            assert checkpoint["step"] == 2
            assert checkpoint["config"] == dataclasses.asdict(config) | dict(
                guidance=config.guidance if checkpoint["classes"] else 1.0
            )
            given = {k: v for k, v in given.items() if k in ddpm.changeable("sample")} | where
            given["guidance"] = config.guidance if checkpoint["classes"] else 1.0
            pixels = ddpm.sample(dataclasses.replace(config, **given))
            size = config.image_size
            assert pixels.shape[0] == config.num_samples and pixels.shape[2:] == (size, size)
            assert not [name for name in tree(folder) if name.endswith(".tmp")]

    any_settings()
    print(counts)
    assert min(counts.values()) >= 2, counts


ANYTHING = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(-3, 3),
    st.floats(),
    st.text(max_size=9),
    st.binary(max_size=9),
    st.lists(st.integers(-1, 9), max_size=3),
    st.lists(st.integers(-1, 9), max_size=3).map(tuple),
    st.lists(st.floats(), max_size=2).map(tuple),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.just(Path("x")),
    st.just(np.int64(5)),
    st.just(np.float32(0.5)),
    st.just(torch.tensor(3)),
    st.just(torch.tensor([1.0, 2.0])),
    st.just(1j),
    st.just(object()),
)


@pytest.mark.parametrize("name", [name for name in FIELDS if name != "preset"])
def test_a_setting_of_any_kind_is_good_or_refused_in_a_sentence(name):
    """And what is good can be kept in a checkpoint, which takes plain values only."""

    @cases(40, 500)
    @given(ANYTHING)
    def any_value(value):
        config = dataclasses.replace(ddpm.Config(), **{name: value})
        try:
            ddpm.check(config)
        except ddpm.UserError as e:
            assert str(e)[-1] in ".)"
            return
        file = io.BytesIO()
        torch.save(dataclasses.asdict(config), file)
        file.seek(0)
        assert torch.load(file, weights_only=True)[name] == value

    any_value()


# ---- bytes


def damaged(data, whole):
    """The bytes with up to eight changes: a bit flipped, a part cut out, put in, overwritten or
    repeated."""
    content = bytearray(whole)
    for _ in range(data.draw(st.sampled_from([1, 1, 1, 2, 3, 8]))):
        at = data.draw(st.integers(0, max(len(content) - 1, 0)))
        kind = data.draw(st.sampled_from(["flip", "cut", "insert", "overwrite", "end", "repeat"]))
        length = data.draw(st.integers(1, 64))
        if kind == "flip" and content:
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "cut":
            del content[at : at + length]
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=64))
        elif kind == "overwrite":
            new = data.draw(st.binary(min_size=1, max_size=64))
            content[at : at + len(new)] = new
        elif kind == "repeat":
            content[at:at] = content[at : at + length]
        else:
            del content[at:]
    return bytes(content)


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_damaged_checkpoint_is_refused_or_the_same_as_ever(tmp_path):
    """Not only finite: no changed bit in what is read goes unseen, since every part has a
    checksum."""
    whole, path, counts = STORED.read_bytes(), tmp_path / "x.pt", dict(refused=0, same=0)
    right = ddpm.load_model(STORED)[0].state_dict()

    @cases(150, 2000)
    @given(st.data())
    def any_bytes(data):
        path.write_bytes(damaged(data, whole))
        try:
            model, _, config = ddpm.load_model(path)
        except ddpm.UserError as e:
            assert "x.pt" in str(e)
            counts["refused"] += 1
            return
        as_stored = ddpm.override(ddpm.load_model(STORED)[2], model_path=str(path))
        assert equal(model.state_dict(), right) and config == as_stored
        counts["same"] += 1

    any_bytes()
    print(counts)
    assert counts["refused"] > 20


def test_a_single_flipped_bit_in_a_checkpoint_is_refused_or_harmless(tmp_path):
    whole, path, counts = STORED.read_bytes(), tmp_path / "x.pt", dict(refused=0, same=0)
    right = ddpm.load_model(STORED)[0].state_dict()

    @cases(150, 2000)
    @given(st.integers(0, 8 * len(whole) - 1))
    def any_bit(bit):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        try:
            state = ddpm.load_model(path)[0].state_dict()
        except ddpm.UserError:
            counts["refused"] += 1
            return
        assert equal(state, right)
        counts["same"] += 1

    any_bit()
    print(counts)
    assert counts["refused"] > 20


NESTED = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-3, 99),
        st.floats(),
        st.text(max_size=5),
        st.just(torch.ones(2)),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(st.text(max_size=5), st.integers(0, 3)), inner, max_size=3),
    ),
    max_leaves=5,
)


def test_a_checkpoint_with_any_value_in_any_place_is_refused_or_works(tmp_path):
    """Well-formed files by a stranger: a part of the checkpoint, a setting or a weight is another
    thing."""
    whole, path, counts = (
        torch.load(STORED, weights_only=True),
        tmp_path / "x.pt",
        dict(refused=0, works=0),
    )

    @cases(100, 1000)
    @given(st.data())
    def any_value(data):
        value, changed = data.draw(NESTED), dict(whole)
        place = data.draw(st.sampled_from([*whole, "config.", "weights.", "ema."]))
        if place[-1] == ".":
            inner = dict(whole[place[:-1]])
            inner[data.draw(st.sampled_from([*inner, "new"]))] = value
            changed[place[:-1]] = inner
        else:
            changed[place] = value
        torch.save(changed, path)
        try:
            model, diffusion, config = ddpm.load_model(path)
            counts["works"] += 1
            assert all(v.isfinite().all() for v in model.state_dict().values())
            ddpm.check(config)
        except ddpm.UserError as e:
            assert "x.pt" in str(e)
            counts["refused"] += 1

    any_value()
    print(counts)
    assert min(counts.values()) > 5, counts


def image_bytes(kind):
    file = io.BytesIO()
    y, x = np.mgrid[:24, :24]
    pixels = np.stack([x * 9, y * 9, (x * y) % 256], 2).astype(np.uint8)
    image = Image.fromarray(pixels[..., 0] if kind == "GIF" else pixels)
    more = dict(save_all=True, append_images=[image.rotate(90)]) if kind in ("GIF", "WEBP") else {}
    image.save(file, kind, **more)
    return file.getvalue()


@pytest.mark.parametrize("kind", ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF"))
def test_a_damaged_image_is_read_or_named_and_left_out(tmp_path, kind, capsys):
    """Thirty good images and a damaged one: never another error, and pixels of the right shape."""
    for i in range(30):
        Image.new("RGB", (8, 8), (8 * i, 0, 0)).save(tmp_path / f"{i}.png")
    whole, odd, counts = (
        image_bytes(kind),
        tmp_path / f"odd.{kind.lower()}",
        dict(read=0, unreadable=0),
    )
    config = ddpm.preset(
        "animals", data_path=str(tmp_path), image_size=8, download_dir=str(tmp_path / "d")
    )
    others = None

    @cases(12 if kind == "TIFF" else 25, 300)  # some damages of TIFF take a second to read
    @given(st.data())
    def any_bytes(data):
        nonlocal others
        odd.write_bytes(damaged(data, whole))
        capsys.readouterr()
        images = ddpm.load_images(config)
        assert (
            images.pixels.shape == (31, 3, 8, 8) and len(images.train) == 31 - images.num_unreadable
        )
        assert images.num_unreadable == ("odd" in capsys.readouterr().err)
        others = images.pixels[:30] if others is None else others
        assert torch.equal(images.pixels[:30], others)
        counts["unreadable" if images.num_unreadable else "read"] += 1

    any_bytes()
    print(kind, counts)
    assert counts["unreadable"] > 0
