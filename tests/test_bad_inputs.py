"""Tables of all that can be wrong with flags, folders, images and checkpoints. Each row works as it
should, or ends with an error code and one line that names the thing and the remedy; and nothing is
written over."""

import dataclasses
import functools
import io
import os
import re
import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, tree, words
from PIL import Image

import ddpm

FIELDS = {f.name: f for f in dataclasses.fields(ddpm.Config)}
STORED = Path(__file__).resolve().parent / "checkpoint_format_1.pt"
NUMERIC = [name for name, f in FIELDS.items() if re.search(r"int|float", str(f.type))]
FOR_SAMPLING = ("num_samples", "sample_batch_size", "sampling_steps", "eta", "guidance", "seed")


def assert_only_the_cache_is_new(before, after):
    """Two trees are the same, but for at most one cache of decoded images, whole, in the later
    one."""
    new = [Path(name) for name in after.keys() - before.keys()]
    assert {name: after[name] for name in before if name in after} == before
    assert not new or sorted(path.suffix for path in new) == [".json", ".npy"], new
    assert {str(path.parent) for path in new} <= {"data/.decoded"}, new


@pytest.fixture
def refused(main, tmp_path, capsys):
    """refused(flags, thing, remedy): the command fails with one line that says both, and changes no
    file. If it had got as far as the images, the cache of them stays."""

    def run(flags, *says):
        capsys.readouterr()
        before = tree(tmp_path)
        code = main(*flags) if isinstance(flags, list | tuple) else main(flags)
        err = capsys.readouterr().err.strip().splitlines()
        errors = [line for line in err if line.startswith("error: ")]
        assert code in (1, 2) and len(errors) == 1 and err[-1] == errors[0], (code, err)
        for text in says:
            assert text.lower() in errors[0].lower(), (text, errors[0])
        assert_only_the_cache_is_new(before, tree(tmp_path))
        return errors[0]

    return run


def training(image_folder):
    return words("--mode train", TINY, "--steps 1 --data_path", image_folder)


# ---- every number


def bad_numbers():
    for name in NUMERIC:
        limits, is_float = FIELDS[name].metadata, "float" in str(FIELDS[name].type)
        invalid = "as in 96x64" if name == "image_size" else "--help"
        low, high = limits["low"], limits["high"]
        yield from (
            (name, value, invalid)
            for value in ("text", "1,x", *([] if is_float else ["nan", "0.5"]))
        )
        outside = (
            ["-1", "-inf", "nan", "inf", "1e300"] if is_float else ["-1", str(10**30), "9" * 400]
        )
        outside += ["0"] if low > 0 else []
        yield from ((name, value, f"give {low} to {high}") for value in outside)


@pytest.mark.parametrize("name, value, remedy", list(bad_numbers()))
def test_a_number_out_of_range_or_no_number(refused, image_folder, name, value, remedy):
    """The remedy is the range or, for what is no number, the help."""
    length = [] if name in ("steps", "epochs", "minutes") else ["--steps", "1"]
    flags = (
        words("--mode train", TINY, "--data_path", image_folder) + length + [f"--{name}={value}"]
    )
    assert refused(flags, f"--{name}", remedy)


@pytest.mark.quick
@pytest.mark.parametrize(
    "name, value, remedy", [row for row in bad_numbers() if row[0] in FOR_SAMPLING]
)
def test_a_number_out_of_range_for_sampling(refused, name, value, remedy):
    flags = words("--mode sample --device cpu --model_path", STORED) + [f"--{name}={value}"]
    assert refused(flags, f"--{name}", remedy)


# ---- flags that clash, and names that do not exist

CLASHES = [
    ("--preset zoo", "'zoo'", "choose from 'animals'"),
    ("--schedule wavy", "'wavy'", "choose from 'linear'"),
    ("--sampler euler", "'euler'", "choose from 'ddpm', 'ddim'"),
    ("--arch vit", "'vit'", "choose from 'unet'"),
    ("--loss l3", "'l3'", "choose from 'l2'"),
    ("--optimizer sgd", "'sgd'", "choose from 'adam'"),
    ("--device tpu", "'tpu'", "choose from 'auto', 'cpu'"),
    ("--precision fp8", "'fp8'", "choose from 'auto'"),
    ("--precision fp16", "fp16 needs a CUDA GPU", "use bf16"),
    ("--stepz 3", "--stepz", "see python ddpm.py --help"),
    ("--classes disc,unicorn", "'unicorn'", "its classes are disc, square, stripes"),
    ("--classes disc,,square", "no class ''", "its classes are disc"),
    ("--classes disc --no_class_cond", "--classes disc", "trained without classes"),
    ("--sampling_steps 51", "--sampling_steps 51", "--timesteps 50"),
    ("--image_size 100 --channel_mults 1 2 2 2", "--image_size 100", "use 96 or 104"),
    ("--image_size 9 --channel_mults 1 2 2 2 2", "--image_size 9", "use 16"),
    ("--image_size 20 --arch simple", "--image_size 20", "use 16 or 32"),
    ("--image_size 40 --arch resnet18", "--image_size 40", "use 32 or 64"),
    ("--image_size 16 --patch 16 --channel_mults 1 1", "--image_size 16", "use 32"),
    ("--attention_at 5", "--attention_at 5", "choose among them, or --attention none"),
    ("--channels 7", "--channels 7", "must be even"),
    ("--arch simple --channels 5", "--channels 5", "must be even"),
    ("--channel_mults", "--channel_mults", "see python ddpm.py --help"),
    ("--channel_mults 1 x", "--channel_mults", "see python ddpm.py --help"),
    (
        "--channel_mults 1,2",
        "--channel_mults: invalid int value: '1,2'",
        "see python ddpm.py --help",
    ),
    (
        "--attention_at 16,8",
        "--attention_at: invalid int value: '16,8'",
        "see python ddpm.py --help",
    ),
    ("--timesteps 9", "--timesteps 9", "give 10 to 100000"),
    ("--label_dropout 1.5", "--label_dropout 1.5", "give 0 to 1"),
    ("--channel_mults 0 1", "--channel_mults 0", "give 1 to 64"),
    ("--schedule cosine --beta_end 0.1", "--schedule cosine", "leave them out"),
    ("--schedule linear --beta_start 0.1 --beta_end 0.01", "--beta_start 0.1", "has to grow"),
    ("--schedule linear --beta_start 0.95 --beta_end 0.999", "--timesteps 50", "give fewer"),
    (
        "--schedule linear --beta_start 1e-4 --beta_end 0.02 --timesteps 100000",
        "100000",
        "leaves nothing",
    ),
    ("--resume a.pt --init_from b.pt", "a.pt", "give the path of a file that --mode train wrote"),
    ("--steps 3 --epochs 1", "--steps and --epochs", "give one"),
    ("--steps 3 --minutes 1", "--steps and --minutes", "give one"),
    ("--batch_size 5 --grad_accum 2", "--batch_size 5", "use a multiple of 2"),
    ("--batch_size 4 --grad_accum 8", "--grad_accum 8", "use a multiple of 8"),
    ("--arch simple --batch_size 2 --grad_accum 2", "--batch_size 2", "use 4 or more"),
    ("--arch resnet18 --image_size 32 --batch_size 1", "--batch_size 1", "a larger --image_size"),
    ("--holdout 0.01", "--holdout 0.01", "both need one"),
    ("--init_from gone.pt", "gone.pt", "give the path of a file that --mode train wrote"),
    ("--init_from folder", "folder", "give the path of a file that --mode train wrote"),
    ("--resume gone.pt", "gone.pt", "give the path of a file that --mode train wrote"),
    ("--resume", "model.pt_steps", "leave out --resume to start a run"),
    ("--data_path gone", "no folder gone", "cifar10"),
    ("--data_path notes.txt", "notes.txt", "give --data_path a folder of images"),
    ("--data_path folder", "saw 1 files (.txt 1)", "accepted .png .jpg"),
    ("--data_path empty", "saw 0 files", "accepted .png .jpg"),
    ("--data_path hidden", "No images in hidden", "accepted .png .jpg"),
    (
        "--data_path here --samples_dir here/samples",
        "here/samples is inside",
        "choose another folder",
    ),
    ("--data_path here --samples_dir here", "is inside --data_path", "choose another folder"),
    (
        "--model_path folder",
        "--model_path folder is a folder",
        "give a file in it, as in folder/model.pt",
    ),
    ("--model_path=", "--model_path", "give a file"),
    ("--model_path notes.txt/model.pt", "notes.txt", "choose another --model_path"),
    ("--samples_dir notes.txt", "notes.txt", "choose another --model_path, --samples_dir"),
    ("--samples_dir notes.txt/s", "notes.txt", "choose another --model_path, --samples_dir"),
    ("--batch_size 100000 --image_size 1024 --attention none", "Out of memory", "--grad_accum"),
    (
        "--batch_size 100000 --image_size 1024 --attention none --dry_run",
        "Out of memory",
        "--image_size",
    ),
]


@pytest.fixture
def clutter(tmp_path, image_folder):
    """Files and folders for the flags to stumble over."""
    for name in ("folder", "empty", "hidden/.git", "here"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("folder/a.txt", "notes.txt", "hidden/.a.png"):
        (tmp_path / name).write_text("mine")
    shutil.copy(next(image_folder.rglob("*.png")), tmp_path / "here" / "a.png")
    shutil.copy(next(image_folder.rglob("*.png")), tmp_path / "hidden" / ".git" / "a.png")


@pytest.mark.parametrize("flags, thing, remedy", CLASHES, ids=[row[0] for row in CLASHES])
def test_flags_that_clash(
    refused, image_folder, clutter, tmp_path, monkeypatch, flags, thing, remedy
):
    if "Out of memory" in thing:  # what a run writes before its first step is no loss
        monkeypatch.setattr(ddpm, "open_run", lambda *_: None)
    refused(training(image_folder) + ["--model_path", "model.pt"] + words(flags), thing, remedy)


SAMPLING = [
    ("--classes unicorn", "'unicorn'", "its classes are disc, square, stripes"),
    ("--classes 0,1", "'0'", "its classes are disc"),
    ("--channels 8", "--channels 8", "where it is 4: leave it out"),
    ("--image_size 32", "--image_size 32", "where it is 16: leave it out"),
    ("--predict eps", "--predict eps", "where it is v"),
    ("--steps 5", "--steps is for --mode train", "leave it out, or give --sampling_steps"),
    ("--sampling_steps 101", "--sampling_steps 101", "--timesteps 100"),
    ("--sampler euler", "euler", "choose from"),
    ("--individual notes.txt", "notes.txt", "choose another"),
    ("--samples_dir notes.txt/s", "notes.txt", "choose another"),
    ("--model_path gone.pt", "gone.pt", "give the path of a file that --mode train wrote"),
    ("--model_path folder", "folder", "give the path of a file that --mode train wrote"),
    ("--model_path=", "No checkpoint", "give the path of a file that --mode train wrote"),
    ("--resume", "--resume is for --mode train", "leave it out"),
    ("--sample_batch_size 100000 --num_samples 10000000", "Out of memory", "--sample_batch_size"),
]


@pytest.mark.parametrize("flags, thing, remedy", SAMPLING, ids=[row[0] for row in SAMPLING])
def test_flags_that_clash_with_a_model(
    refused, clutter, monkeypatch, flags, thing, remedy
):
    if "Out of memory" in thing:
        monkeypatch.setattr(ddpm, "generate", lambda *_: torch.empty(10**15))
    base = words(
        "--mode sample --num_samples 2 --sampling_steps 2 --device cpu --model_path", STORED
    )
    refused(base + words(flags), thing, remedy)


def test_a_network_that_is_too_large(refused, image_folder, monkeypatch):
    monkeypatch.setattr(ddpm, "build_model", lambda *_: torch.empty(10**15))
    refused(training(image_folder), "Out of memory", "less --image_size or --channels")


@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "Unable to find a valid cuDNN algorithm to run convolution",
        "GET was unable to find an engine to execute this computation",
        "Invalid buffer size: 12.25 GiB",
        "MPS backend out of memory (MPS allocated: 8.00 GB, max allowed: 9.07 GB)",
    ],
)
def test_a_gpu_without_memory_by_all_its_names(refused, image_folder, monkeypatch, said):
    monkeypatch.setattr(ddpm, "build_model", lambda *_: (_ for _ in ()).throw(RuntimeError(said)))
    refused(training(image_folder), "Out of GPU memory", "--grad_accum")


def no_compiler(*_):
    raise OSError("nothing to compile with")


def test_a_machine_that_cannot_compile(refused, image_folder, monkeypatch):
    """The error comes from PyTorch's own compiler, of which only the last part is replaced."""
    compile = functools.partial(torch.compile, backend=no_compiler)
    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(ddpm, "open_run", lambda *_: None)  # what it writes is no loss
    flags = training(image_folder) + ["--compile"]
    refused(flags, "--compile failed", "nothing to compile with", "give --no_compile")


@pytest.mark.parametrize(
    "said", ["shapes differ", "CUDA error: an illegal memory access was encountered"]
)
def test_an_error_that_is_a_bug_of_ours_is_not_hidden(main, image_folder, monkeypatch, said):
    monkeypatch.setattr(ddpm, "build_model", lambda *_: (_ for _ in ()).throw(RuntimeError(said)))
    with pytest.raises(RuntimeError, match=said):
        main(*training(image_folder))


def test_a_folder_named_after_a_built_in_data_set_is_a_place_for_its_samples(main, monkeypatch):
    """The data are in --download_dir, not in it."""
    said = []
    monkeypatch.setattr(ddpm, "load_images", lambda config, _: said.append(config.samples_dir) or 1)
    with pytest.raises(AttributeError):  # of 1, which has no classes: so far it came
        main("--mode train --data_path mnist --samples_dir mnist/samples --model_path mnist/m.pt")
    assert said == ["mnist/samples"]


# ---- what the known mistakes of the parser were


def test_classes_with_numbers_for_names(main, image_folder, tmp_path):
    shutil.copytree(image_folder, tmp_path / "digits")
    for i, name in enumerate(("disc", "square", "stripes")):
        (tmp_path / "digits" / name).rename(tmp_path / "digits" / str(i))
    assert main(*training("digits"), "--classes 0,2 --channel_mults 1 2 --attention_at 16 8") == 0
    config = ddpm.load_model("saved_models/denoise_model.pt")[2]
    assert (config.channel_mults, config.attention_at, config.classes) == ((1, 2), (16, 8), "0,2")
    assert main("--mode sample --num_samples 2 --sampling_steps 1 --classes 1,2") == 0


@pytest.mark.parametrize("given, left", [("cosine", None), ("quadratic", None), ("linear", 0.02)])
def test_a_schedule_of_ones_own_drops_the_betas_of_the_recipe(given, left):
    config = ddpm.preset("flowers_simple", schedule=given)
    ddpm.check(config)
    assert (config.schedule, config.beta_end) == (given, left)
    assert ddpm.preset("flowers_simple", schedule="quadratic", beta_end=0.03).beta_end == 0.03


# ---- images: one odd one among many


def png(size=(16, 16), mode="RGB", colour=None, kind="PNG", **more):
    file = io.BytesIO()
    Image.new(mode, size, colour or 0).save(file, kind, **more)
    return file.getvalue()


def noise(size, kind, dtype=np.uint8, shape=(3,), **more):
    file = io.BytesIO()
    values = (
        np.random.default_rng(0).integers(0, np.iinfo(dtype).max, (*size, *shape)).astype(dtype)
    )
    Image.fromarray(values).save(file, kind, **more)
    return file.getvalue()


def chunk(kind, content):
    return (
        struct.pack(">I", len(content))
        + kind
        + content
        + struct.pack(">I", zlib.crc32(kind + content))
    )


def bomb(side):
    """A PNG of side x side one-bit pixels, written without ever making them: a few kilobytes a
    gigapixel."""
    packer, row = zlib.compressobj(9), bytes(1 + side // 8)
    packed = b"".join(packer.compress(row * 100) for _ in range(side // 100)) + packer.flush()
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


def text_bomb():
    """An image whose text is 200 MB of one letter."""
    packer = zlib.compressobj(9)
    packed = b"".join(packer.compress(b"a" * 10**6) for _ in range(200)) + packer.flush()
    whole = png()
    return whole[:33] + chunk(b"zTXt", b"k\0\0" + packed) + whole[33:]


def frames(kind):
    return png(
        kind=kind,
        save_all=True,
        append_images=[Image.new("RGB", (16, 16), c) for c in ("red", "blue")],
    )


GOOD = {  # name -> bytes: a model can be trained on each
    "animated.gif": lambda: frames("GIF"),
    "animated.webp": lambda: frames("WEBP"),
    "animated.png": lambda: frames("PNG"),
    "pages.tiff": lambda: frames("TIFF"),
    "sixteen bits.png": lambda: noise((16, 16), "PNG", np.uint16, ()),
    "sixteen bits.tiff": lambda: noise((16, 16), "TIFF", np.uint16, ()),
    "thirty-two bits.tiff": lambda: noise((16, 16), "TIFF", np.int32, ()),
    "cmyk.jpg": lambda: png(mode="CMYK", kind="JPEG"),
    "cmyk.tiff": lambda: png(mode="CMYK", kind="TIFF"),
    "lab.tiff": lambda: png(mode="LAB", kind="TIFF"),
    "palette.png": lambda: png(mode="P"),
    "palette with a hole.png": lambda: png(mode="P", transparency=0),
    "grey and alpha.png": lambda: png(mode="LA"),
    "one bit.png": lambda: png(mode="1"),
    "one pixel.png": lambda: png((1, 1)),
    "one row.png": lambda: png((3000, 1)),
    "one column.png": lambda: png((1, 3000)),
    "100 megapixels.png": lambda: bomb(10_000),
    "a jpeg.png": lambda: png(kind="JPEG"),
    "a png.JPEG": lambda: png(),
    "text.png": lambda: png(pnginfo=evil_text()),
    "progressive.jpg": lambda: noise((64, 64), "JPEG", progressive=True),
    "with an icc profile.png": lambda: png(icc_profile=b"no profile at all"),
    "name with  spaces .png": png,
    "new\nline.png": png,
    "\x1b[31mred.png": png,
    "-rf.png": png,
    "$(touch pwned).png": png,
    "猫と犬.png": png,
    os.fsdecode(b"caf\xe9.png"): png,
    "ﬁ\u202egnp.png": png,
    "n" * 251 + ".png": png,
}


def evil_text():
    from PIL import PngImagePlugin

    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", "$(touch pwned) ../../x \x1b[2J {0.__class__} %s%n")
    return info


BAD = {  # name -> bytes: none of them can be read, and training continues without them
    "empty.png": lambda: b"",
    "signature.png": lambda: png()[:8],
    "cut.png": lambda: noise((64, 64), "PNG")[:3000],
    "cut.jpg": lambda: noise((64, 64), "JPEG")[:2000],
    "cut.gif": lambda: noise((64, 64), "GIF", shape=())[:700],
    "cut.webp": lambda: noise((64, 64), "WEBP")[:900],
    "cut.bmp": lambda: png((64, 64), kind="BMP")[:900],
    "cut.tiff": lambda: noise((64, 64), "TIFF")[:3000],
    "flipped.png": lambda: noise((64, 64), "PNG").replace(b"IDAT", b"IDAT\xff", 1),
    "text.png": lambda: b"this is no image\n" * 9,
    "page.jpg": lambda: b"<!DOCTYPE html><html>404 not found</html>",
    "zip.png": lambda: b"PK\x03\x04" + bytes(99),
    "drawing.png": lambda: (
        b'<svg xmlns="http://www.w3.org/2000/svg"><rect width="9" height="9"/></svg>'
    ),
    "postscript.png": lambda: (
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(pwned) (w) file\n%%EOF\n"
    ),
    "zeros.gif": lambda: bytes(5000),
    "no pixels.png": lambda: (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 0, 0, 8, 2, 0, 0, 0))
    ),
    "claims.png": lambda: (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 2**31 - 1, 9, 8, 2, 0, 0, 0))
    ),
    "bomb.png": lambda: bomb(30_000),
    "text bomb.png": text_bomb,
}


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    """Thirty good images, in a folder that is copied for each row."""
    folder = tmp_path_factory.mktemp("many")
    for i in range(30):
        Image.new("RGB", (16, 16), (8 * i, 100, 50)).save(folder / f"{i:02d}.png")
    return folder


@pytest.fixture
def dry_run(main, many, tmp_path, capsys):
    """dry_run(): look at the images in tmp_path/data; the banner and what is said of unreadable
    ones."""
    shutil.copytree(many, tmp_path / "data")

    def run():
        before = tree(tmp_path)
        assert main("--mode train --data_path data --dry_run --steps 1", TINY) == 0
        assert_only_the_cache_is_new(before, tree(tmp_path))
        return capsys.readouterr()

    return run


@pytest.mark.parametrize("name", GOOD, ids=ascii)
def test_an_odd_image_is_read(dry_run, tmp_path, name):
    (tmp_path / "data" / name).write_bytes(GOOD[name]())
    out, err = dry_run()
    assert (
        "31 found, 31 for training" in out and "0 unreadable" in out and "cannot be read" not in err
    )


@pytest.mark.parametrize("name", BAD)
def test_an_unreadable_image_among_many_is_named_and_left_out(dry_run, tmp_path, name):
    (tmp_path / "data" / name).write_bytes(BAD[name]())
    out, err = dry_run()
    assert "31 found, 30 for training" in out and "1 unreadable" in out
    assert "1 of 31 images cannot be read" in err and repr(name) in err


def a_pipe(path):
    os.mkfifo(path)


def a_link_to_itself(path):
    path.symlink_to(path)


def a_link_to_nowhere(path):
    path.symlink_to("nowhere.png")


def a_device_without_end(path):
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    "make", (a_pipe, a_link_to_itself, a_link_to_nowhere, a_device_without_end)
)
def test_what_is_no_file_is_named_and_never_waited_for(dry_run, tmp_path, make):
    make(tmp_path / "data" / "odd.png")
    out, err = dry_run()
    assert "31 found, 30 for training" in out and "'odd.png'" in err and "no file" in err


def test_folders_that_look_like_images_or_lead_in_a_circle(dry_run, tmp_path):
    (tmp_path / "data" / "folder.png").mkdir()
    shutil.copy(tmp_path / "data" / "00.png", tmp_path / "data" / "folder.png" / "inside.png")
    (tmp_path / "data" / "folder.png" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "up").symlink_to(tmp_path)
    out, _ = dry_run()
    assert "31 found, 31 for training" in out


@pytest.mark.parametrize("name", BAD)
def test_only_unreadable_images_are_too_many(refused, tmp_path, name, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / name).write_bytes(BAD[name]() if "bomb" not in name else b"")
    refused(training("data"), "5 %", "fix or remove")


# ---- checkpoints


def stored():
    return torch.load(STORED, weights_only=True)


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def flipped():
    """One bit of one weight is another: PyTorch would load it without a word."""
    content, (info, *_) = (
        bytearray(STORED.read_bytes()),
        [i for i in zipfile.ZipFile(STORED).infolist() if i.filename.endswith("data/0")],
    )
    name, extra = struct.unpack("<HH", content[info.header_offset + 26 : info.header_offset + 30])
    content[info.header_offset + 30 + name + extra + 3] ^= 64
    return bytes(content)


def with_config(**more):
    return saved(stored() | {"config": stored()["config"] | more})


def without(key):
    return saved({k: v for k, v in stored().items() if k != key})


def a_zip(name, content):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as f:
        f.writestr(name, content)
    return file.getvalue()


def old_torch_file():
    file = io.BytesIO()
    torch.save(stored(), file, _use_new_zipfile_serialization=False)
    return file.getvalue()


def reshaped(v):
    return v.reshape(-1)[:1] if v.dim() else v


DAMAGED, FOREIGN = (
    ("cannot be read safely", "use another checkpoint"),
    ("is not a checkpoint", "give one that"),
)
NO_FIT = "does not fit its own network"
ODD = ("holds other things than ddpm.py writes", "use another")
CANNOT_BE = ("has a configuration that cannot be", "use another")
CHECKPOINTS = {
    "empty": (lambda: b"", *DAMAGED),
    "text": (lambda: b"no checkpoint at all\n" * 99, *DAMAGED),
    "an image": (lambda: STORED.with_suffix(".png").read_bytes(), *DAMAGED),
    "cut early": (lambda: STORED.read_bytes()[:100], *DAMAGED),
    "cut in the middle": (lambda: STORED.read_bytes()[:40_000], *DAMAGED),
    "cut by a byte": (lambda: STORED.read_bytes()[:-1], *DAMAGED),
    "zeros at the end": (lambda: STORED.read_bytes()[:50_000] + bytes(28_000), *DAMAGED),
    "one bit flipped": (flipped, *DAMAGED),
    "another zip": (lambda: a_zip("readme.txt", "hello"), *DAMAGED),
    "a foreign pickle": (
        lambda: a_zip("archive/data.pkl", b"cos\nsystem\n(S'touch pwned'\ntR."),
        *DAMAGED,
    ),
    "a bare pickle": (
        lambda: b"\x80\x02cos\nsystem\nq\x00X\x0b\x00\x00\x00touch pwnedq\x01\x85q\x02Rq\x03.",
        *DAMAGED,
    ),
    "torch's old format": (old_torch_file, *DAMAGED),
    "a list": (lambda: saved([1, 2]), *FOREIGN),
    "a tensor": (lambda: saved(torch.zeros(3)), *FOREIGN),
    "bare weights": (lambda: saved(stored()["weights"]), *FOREIGN),
    "nanoGPT's": (
        lambda: saved({"model": {}, "optimizer": {}, "model_args": {}, "iter_num": 5}),
        *FOREIGN,
    ),
    "no weights": (lambda: without("weights"), *FOREIGN),
    "no configuration": (lambda: without("config"), *FOREIGN),
    "no classes": (lambda: without("classes"), *FOREIGN),
    "no channels": (lambda: without("channels"), *FOREIGN),
    "weights in a list": (lambda: saved(stored() | {"weights": [torch.zeros(3)]}), *FOREIGN),
    "weights that are words": (
        lambda: saved(stored() | {"weights": {"conv_in.weight": "heavy"}}),
        *ODD,
    ),
    "ema that is a list": (lambda: saved(stored() | {"ema": [1]}), *ODD),
    "classes that are numbers": (lambda: saved(stored() | {"classes": [1, 2, 3]}), *ODD),
    "names that are numbers": (lambda: saved(stored() | {"weights": {5: torch.zeros(1)}}), *ODD),
    "77 channels": (lambda: saved(stored() | {"channels": 77}), *ODD),
    "another format": (
        lambda: saved(stored() | {"format": 999}),
        "has format 999",
        "use the version that wrote it",
    ),
    "settings of the future": (lambda: with_config(flavour=1), "flavour", "use a newer one"),
    "a setting of another type": (lambda: with_config(channels="many"), *CANNOT_BE),
    "a setting out of range": (lambda: with_config(channels=10**9), *CANNOT_BE),
    "a schedule of the future": (lambda: with_config(schedule="wavy"), *CANNOT_BE),
    "NaN": (
        lambda: saved(
            stored()
            | {k: {n: v * float("nan") for n, v in stored()[k].items()} for k in ("weights", "ema")}
        ),
        "not finite",
        "use another",
    ),
    "of another width": (lambda: with_config(channels=8), NO_FIT, "use another"),
    "of another shape": (
        lambda: saved(
            stored()
            | {k: {n: reshaped(v) for n, v in stored()[k].items()} for k in ("weights", "ema")}
        ),
        NO_FIT,
        "use another",
    ),
    "more classes than rows": (
        lambda: saved(stored() | {"classes": [str(i) for i in range(9)]}),
        NO_FIT,
        "use another",
    ),
}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_bad_checkpoint_samples_nothing(refused, tmp_path, name):
    make, thing, remedy = CHECKPOINTS[name]
    (tmp_path / "bad.pt").write_bytes(make())
    refused(
        "--mode sample --num_samples 2 --sampling_steps 2 --model_path bad.pt",
        "bad.pt",
        thing,
        remedy,
    )


# --resume looks for a whole run first, and --init_from at the weights alone: neither meets the
# others.
MET_EARLY = [
    name
    for name, (_, thing, _) in CHECKPOINTS.items()
    if thing not in (NO_FIT, *CANNOT_BE) and name != "settings of the future"
]


@pytest.mark.parametrize("name", MET_EARLY)
@pytest.mark.parametrize("use", ("--resume", "--init_from"))
def test_a_bad_checkpoint_starts_nothing(refused, image_folder, tmp_path, use, name):
    make, thing, remedy = CHECKPOINTS[name]
    (tmp_path / "bad.pt").write_bytes(make())
    base = training(image_folder) if use == "--init_from" else words("--mode train")
    refused([*base, use, "bad.pt"], "bad.pt", thing, remedy)


def test_a_model_is_not_a_run_to_resume(refused, main, image_folder, tmp_path):
    """--resume saved_models/x.pt is a likely slip: the error names the flags."""
    assert main(*training(image_folder), "--model_path m/x.pt") == 0
    refused(
        "--mode train --resume m/x.pt --steps 3",
        "m/x.pt is a model to sample from",
        "--resume --model_path m/x.pt",
        "--init_from",
    )


OTHER_STATES = [
    (part, value)
    for part in ("optimizer", "scaler", "step", "ema", "data", "seconds")
    for value in (None, [], {}, "x", {"state": {}, "param_groups": []})
    if part != "scaler"
    or not isinstance(value, dict)  # without fp16 a scaler has no state, nor looks at it
]


@pytest.mark.parametrize("part, value", OTHER_STATES)
def test_a_run_whose_state_is_of_another_shape(
    refused, trained, tmp_path, part, value
):
    [run] = trained.parent.glob("*_steps/step_*.pt")
    whole = torch.load(run, weights_only=True)
    torch.save(whole | {part: value}, "bad.pt")
    more = f"--resume bad.pt --steps {whole['step'] + 2} --model_path m.pt --samples_dir samples"
    refused(f"--mode train {more}", "bad.pt")
