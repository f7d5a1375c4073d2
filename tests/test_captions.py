"""Text to image: reading captions, the words, the text encoder, training and prompts."""

import csv
import io
import json

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, checkpoint, exit_code, places, randomise
from PIL import Image

import convert
import ddpm
import evaluate

COLOURS = dict(red=(230, 20, 20), green=(20, 200, 20), blue=(20, 20, 230), yellow=(230, 220, 20))
CAPTIONS = {f"{name}.png": f"A {name} square, please" for name in COLOURS}
SHORT = "--steps 3 --lr 1e-3 --log_every 3"


def write_image(path, colour):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((16, 16, 3), np.uint8)
    pixels[4:12, 4:12] = colour
    Image.fromarray(pixels).save(path)


def write_images(root):
    for name, colour in COLOURS.items():
        write_image(root / f"{name}.png", colour)
    return root


def write_jsonl(folder, rows):
    lines = [json.dumps(dict(file_name=name, text=text)) + "\n" for name, text in rows]
    (folder / "metadata.jsonl").write_text("".join(lines))
    return folder


@pytest.fixture
def images(tmp_path):
    return write_images(tmp_path / "data")


def captions_of(root):
    source = ddpm.folder_source(root)
    return dict(zip(source.names, source.captions)), source


# ----------------------------------------------------------------------------------------- reading


def test_jsonl_csv_and_text_files_say_the_same(tmp_path):
    roots = [write_images(tmp_path / kind) for kind in ("jsonl", "csv", "txt")]
    write_jsonl(roots[0], CAPTIONS.items())
    with open(roots[1] / "metadata.csv", "w", newline="") as f:
        csv.writer(f).writerows([("text", "file_name"), *((t, n) for n, t in CAPTIONS.items())])
    for name, text in CAPTIONS.items():
        (roots[2] / name).with_suffix(".txt").write_text(text + "\n")
    for root in roots:
        captions, source = captions_of(root)
        assert captions == CAPTIONS and not source.class_names and (source.labels == -1).all()
        assert not any("left out" in note for note in source.notes)


def test_metadata_in_sub_folders_in_the_layout_of_hugging_face(tmp_path):
    rows = [(f"{name}.png", text) for name, text in zip(COLOURS, CAPTIONS.values())]
    for split in ("train", "train/more"):
        write_jsonl(write_images(tmp_path / split), rows)
    write_jsonl(tmp_path, [("train/red.png", "overruled below"), ("train/more/../blue.png", "too")])
    captions, _ = captions_of(tmp_path)
    assert captions == {f"{f}/{n}": t for f in ("train", "train/more") for n, t in rows}


def test_the_layout_that_datasets_reads(images, tmp_path):
    datasets = pytest.importorskip("datasets")
    write_jsonl(images, CAPTIONS.items())
    loaded = datasets.load_dataset("imagefolder", data_dir=str(images), cache_dir=str(tmp_path))
    assert sorted(loaded["train"]["text"]) == sorted(captions_of(images)[0].values())


def test_sub_folders_are_classes_without_captions_or_when_asked(tmp_path, images):
    for name in COLOURS:
        write_image(tmp_path / "sorted" / name / "0.png", COLOURS[name])
    (tmp_path / "sorted" / "README.txt").write_text("no caption")
    _, source = captions_of(tmp_path / "sorted")
    assert source.class_names == sorted(COLOURS) and not any(source.captions)
    (tmp_path / "sorted" / "red" / "0.txt").write_text("red, I say")
    captions, source = captions_of(tmp_path / "sorted")
    assert not source.class_names and sorted(captions.values()) == ["", "", "", "red, I say"]
    for given in (dict(captions=False), dict(class_cond=False)):
        config = ddpm.Config(data_path=str(tmp_path / "sorted"), **given)
        assert not any(ddpm.open_source(config).captions)


ROW = '{"file_name": "red.png", "text": "ok"}\n'
BAD = {
    "broken JSON": ("jsonl", ROW + '{"file_name": "red.png", "te', "line 2, is no caption"),
    "nested JSON": ("jsonl", "[" * 100_000, "line 1, is no caption"),
    "a list": ("jsonl", "[1, 2]\n", "line 1, is no caption"),
    "no text": ("jsonl", ROW + '\n{"file_name": "red.png", "label": 3}\n', "KeyError: 'text'"),
    "a number": ("jsonl", '{"file_name": "red.png", "text": 3}\n', "line 1, is no caption"),
    "no file_name": ("csv", "name,text\nred.png,red\n", "line 2, .*KeyError: 'file_name'"),
    "not UTF-8": ("jsonl", ROW.encode() + b"\xff\xfe", "cannot be read .*UTF-8"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_metadata_is_refused_with_the_file_and_line(images, name):
    suffix, content, message = BAD[name]
    path = images / f"metadata.{suffix}"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ddpm.UserError, match=message) as e:
        ddpm.folder_source(images)
    assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert len(ddpm.folder_source(images, with_captions=False).names) == 4


def test_odd_metadata_does_what_people_expect(images):
    long = "a very long caption, " * 100_000
    rows = [("red.png", "first"), ("red.png", "last"), ("gone.png", "x"), ("blue.png", None)]
    write_jsonl(images, [*rows, ("green.png", long), ("yellow.png", "ein gelbes Stück\u2028 黄色")])
    with open(images / "metadata.jsonl", "a") as f:
        f.write("\n\n")
    captions, source = captions_of(images)
    assert captions["red.png"] == "last" and captions["blue.png"] == ""
    assert (
        captions["yellow.png"] == "ein gelbes Stück 黄色" and captions["green.png"] == long.strip()
    )
    told = "\n".join(source.notes)
    assert "1 images again: the last caption counts" in told
    assert "1 images that are not there" in told and "gone.png" in told
    config = ddpm.Config(data_path=str(images), image_size=16, download_dir=str(images / ".cache"))
    data = ddpm.load_images(config)
    assert data.labels.shape == (4, ddpm.MAX_WORDS) and "stück" in data.vocabulary
    assert max(map(len, data.examples)) <= 300
    line = ddpm.describe_labels(data)
    assert "3 of 4 images have one, 1 cut at 64 words; 10 different words" in line


def test_empty_captions_are_none(images):
    write_jsonl(images, [("red.png", ""), ("blue.png", " ")])
    assert captions_of(images)[1].captions == [""] * 4
    config = ddpm.Config(data_path=str(images), image_size=16, download_dir=str(images / ".cache"))
    data = ddpm.load_images(config)
    assert data.vocabulary == data.examples == [] and "captions" not in data.fingerprint


# ------------------------------------------------------------------------------------------- words


def test_words_and_punctuation_in_lower_case():
    assert ddpm.split_words("A lion's RED hat,\n Ünder 2 trees!") == (
        ["a", "lion", "'", "s", "red", "hat", ",", "ünder", "2", "trees", "!"]
    )
    assert ddpm.encode(["b a", "", "x b"], ["a", "b"]) == [[1, 0], [-1, -1], [1, -1]]
    assert ddpm.encode([""], ["a"]) == [[-1]]


def test_the_vocabulary_is_of_the_training_captions_alone(images):
    write_jsonl(images, CAPTIONS.items())
    config = ddpm.Config(data_path=str(images), image_size=16, download_dir=str(images / ".cache"))
    data = ddpm.load_images(ddpm.override(config, holdout=0.25))
    held_out = data.captions[data.validation[0]].split()[1]
    assert held_out in COLOURS and held_out not in data.vocabulary
    expected = {"a", ",", "please", "square", *COLOURS} - {held_out}
    assert data.vocabulary == sorted(expected)
    x0, y = data.take(data.train, "cpu")
    for row, number in zip(y, data.train):
        read = [data.vocabulary[i] for i in row if i >= 0]
        assert read == ddpm.split_words(data.captions[number])
    assert sorted(data.examples) == sorted(data.captions[row] for row in data.train)


# ----------------------------------------------------------------------------------------- network


def tiny_unet(vocabulary_size=9, seed=0):
    net = ddpm.UNet(3, 8, (1, 2), 1, attention_stages=(1,), vocabulary_size=vocabulary_size)
    return randomise(net, seed, scale=0.15).eval()


def inputs(n=3):
    x = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(n) * 10, torch.tensor([[3, 1, 4], [1, 5, -1], [-1, -1, -1]])[:n]


@torch.no_grad()
def test_a_caption_depends_on_neither_its_neighbours_nor_the_padding():
    net = tiny_unet()
    x, t, y = inputs()
    out = net(x, t, y)
    padded = torch.cat([y, torch.full((3, 20), -1)], dim=1)
    assert torch.allclose(net(x, t, padded), out, atol=1e-6)
    for i, length in enumerate((3, 2, 1)):
        alone = net(x[i : i + 1], t[i : i + 1], y[i : i + 1, :length])
        assert torch.allclose(alone, out[i : i + 1], atol=1e-6)


@torch.no_grad()
def test_words_their_order_and_no_caption_each_make_a_difference():
    net = tiny_unet()
    x, t, y = inputs()
    out = net(x, t, y)
    swapped = net(x, t, y[:, [1, 0, 2]])
    none = net(x, t, torch.full_like(y, -1))
    assert out.isfinite().all() and none.isfinite().all()
    assert torch.allclose(net(x, t), none, atol=1e-6)  # y=None is no caption
    assert torch.allclose(out[2], none[2], atol=1e-6)
    for other in (swapped, none):
        assert (other[:2] - out[:2]).abs().amax((1, 2, 3)).min() > 1e-4


def test_captions_without_words_learn_finite_gradients():
    net = tiny_unet().train()
    x, t, _ = inputs()
    net(x, t, torch.full((3, 4), -1)).square().mean().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert net.text.words.weight.grad[0].abs().max() > 0  # the row that begins each caption
    assert net.text.words.weight.grad[1:].abs().max() == 0


def test_attention_is_that_of_pytorch_over_pixels_and_words():
    torch.manual_seed(0)
    attention = randomise(ddpm.Attention(8, 2, text_width=16))
    x, tokens = torch.randn(2, 8, 3, 3), torch.randn(2, 5, 16)
    is_word = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]).bool()
    bias = torch.where(is_word, 0.0, -torch.inf)[:, None]
    pixels = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = attention.qkv(pixels).chunk(3, dim=2)
    extra = attention.text_kv(tokens)
    k, v = torch.cat([k, extra[..., :8]], 1), torch.cat([v, extra[..., 8:]], 1)
    mask = torch.cat([torch.ones(2, 9).bool(), is_word], 1)[:, None]
    mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    expected = x + attention.out(mixed).transpose(1, 2).reshape(x.shape)
    assert torch.allclose(attention(x, ddpm.Text(tokens, bias, None)), expected, atol=1e-5)


def test_nets_with_classes_or_nothing_have_no_text_weights():
    def names(*args):
        return {
            name
            for name, _ in ddpm.UNet(3, 8, (1, 2), 1, "full", (1,), 0.0, *args).named_parameters()
        }

    assert not [name for name in names(5) if "text" in name]
    new = names(0, 1, 9) - names(0)
    assert new and all(name.startswith("text.") or ".attention.text_kv." in name for name in new)


def test_checkpointing_and_bf16_give_the_same():
    net = tiny_unet().train()
    x, t, y = inputs()
    gradients = []
    for net.checkpointing in (False, True):
        net.zero_grad()
        net(x, t, y).square().mean().backward()
        gradients.append(net.text.words.weight.grad.clone())
    assert torch.equal(*gradients) and gradients[0].abs().max() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(net(x, t, y).float(), net(x, t, y).float(), atol=0.1)


@pytest.mark.parametrize("given", (dict(arch="simple"), dict(attention="linear")))
def test_networks_without_full_attention_are_refused(given):
    with pytest.raises(ddpm.UserError, match="--arch unet --attention full.*--no_captions"):
        ddpm.build_model(ddpm.override(ddpm.Config(), **given), 3, [], ["a"])


# ------------------------------------------------------------------------------ training, sampling


def train(folder, data, *more):
    return exit_code(ddpm.main, "--mode train", TINY, *places(folder, data), *more)


@pytest.fixture(scope="module")
def captioned(tmp_path_factory):
    """Four captioned squares, and a tiny model that has learned them by heart: (data, model)."""
    folder = tmp_path_factory.mktemp("captioned")
    data = write_jsonl(write_images(folder / "data"), CAPTIONS.items())
    more = "--steps 250 --lr 5e-3 --ema_decay 0.9 --batch_size 8 --log_every 50 --sample_every 250"
    assert train(folder, data, more, "--save_every 250 --num_samples 5 --label_dropout 0.2") == 0
    return data, folder / "model.pt"


def sample(path, *flags):
    return exit_code(ddpm.main, "--mode sample", "--model_path", path, *flags)


def test_a_prompt_brings_its_colour(captioned):
    _, path = captioned
    asked = ["a blue square", "yellow", "A RED SQUARE, please"]
    config = ddpm.Config(
        model_path=str(path), prompt=tuple(asked), num_samples=6, sampling_steps=10
    )
    pixels = ddpm.sample(ddpm.override(config, samples_dir=str(path.parent / "prompted")))
    found = pixels[:, :, 6:10, 6:10].float().mean((2, 3))  # (6, 3), the middles
    every = torch.tensor(list(COLOURS.values())).float()  # red, green, blue, yellow
    assert torch.cdist(found, every).argmin(1).tolist() == [2, 3, 0] * 2
    with Image.open(path.parent / "prompted" / "generated_sample.png") as grid:
        assert grid.info["ddpm:prompt"] == " | ".join(asked)
        assert "ddpm:classes" not in grid.info
        assert grid.size == (200 + 2 * 66, 3 * 66)  # a row a prompt
        first = np.asarray(grid)[:64, 200:264][::4, ::4].transpose(2, 0, 1)
    assert (first == pixels[0].numpy()).all()


def test_the_model_carries_words_and_examples(captioned):
    _, path = captioned
    model, _, config = ddpm.load_model(path)
    assert model.vocabulary == sorted({"a", ",", "square", "please", *COLOURS})
    assert sorted(model.examples) == sorted(CAPTIONS.values()) and not model.class_names
    stored = checkpoint(path)
    assert all(type(word) is str for word in stored["vocabulary"] + stored["examples"])
    labels, names = ddpm.sample_conditions(ddpm.override(config, num_samples=6), model)
    assert names == [*model.examples, *model.examples[:2]]
    assert [model.vocabulary[i] for i in labels[4] if i >= 0] == ddpm.split_words(names[0])


def test_prompts_on_the_command_line(captioned, main, tmp_path, capsys):
    _, path = captioned
    (tmp_path / "list.txt").write_text("a red square\n\n  green \n")
    own = (
        "--samples_dir",
        tmp_path / "s",
        "--num_samples 3 --sampling_steps 2 --individual single",
    )
    assert sample(path, "--prompts", tmp_path / "list.txt", *own) == 0
    assert "note" not in capsys.readouterr().out
    for i, prompt in enumerate(("a red square", "green", "a red square")):
        with Image.open(tmp_path / "single" / f"{i:05d}.png") as image:
            assert image.info["ddpm:prompt"] == prompt
    assert sample(path, "--prompts", tmp_path / "list.txt", *own, "--num_samples 1") == 0
    said = capsys.readouterr().out
    assert "the first 1 of 2 prompts are sampled; for all, give --num_samples 2" in said
    (tmp_path / "empty.txt").write_text("\n")
    for flags, message in {
        ("--prompts", tmp_path / "empty.txt"): "is empty",
        ("--prompts", tmp_path / "none.txt"): "none.txt cannot be read",
        ("--prompt", "a", "rde", "square"): "'rde'. Give other words, such as red,",
        ("--prompt", "qqqq"): "such as blue, green,",
        ("--classes", "lion"): "trained on captions, not on classes; give --prompt",
    }.items():
        assert sample(path, *flags, *own) == 1
        assert message in capsys.readouterr().err


def test_a_vocabulary_of_short_words_is_suggested_from_too():
    with pytest.raises(ddpm.UserError, match="such as 犬, 猫, of the 2"):
        ddpm.check_words(["鳥"], ["犬", "猫"])


def test_a_class_model_refuses_prompts(trained, main, capsys):
    assert sample(trained, "--prompt", "disc") == 1
    assert "trained without captions" in capsys.readouterr().err


def test_an_image_depends_on_its_prompt_number_and_seed_alone(captioned, tmp_path):
    _, path = captioned
    own = dict(model_path=str(path), samples_dir=str(tmp_path), sampling_steps=3)
    config = ddpm.Config(num_samples=5, prompt=("red", "a blue square, please"), **own)
    all_five = ddpm.sample(config)
    in_batches = ddpm.sample(ddpm.override(config, sample_batch_size=2))
    assert (all_five.int() - in_batches.int()).abs().max() <= 1
    blue = ddpm.sample(ddpm.override(config, prompt=("a blue square, please",), num_samples=2))
    assert (blue[1].int() - all_five[1].int()).abs().max() <= 1
    assert not torch.equal(blue[0], all_five[0])


@pytest.mark.parametrize("kind", ("interpolate", "init_image", "mask"))
def test_edits_take_prompts(captioned, tmp_path, kind):
    data, path = captioned
    image = str(data / "red.png")
    given = dict(interpolate=dict(interpolate=3), init_image=dict(init_image=image, strength=0.9))
    given["mask"] = dict(init_image=image, mask=str(data / "yellow.png"))
    own = dict(model_path=str(path), samples_dir=str(tmp_path), sampling_steps=5, num_samples=3)
    results = [
        ddpm.sample(ddpm.Config(prompt=(prompt,), **own, **given[kind]))
        for prompt in ("a blue square", "a yellow square")
    ]
    assert results[0].shape == (3, 3, 16, 16) and not torch.equal(*results)


def test_resuming_is_exact_and_other_captions_are_refused(images, tmp_path, capsys):
    write_jsonl(images, CAPTIONS.items())
    more = "--steps 6 --lr_schedule constant --save_every 3 --holdout 0.25 --hflip"
    assert train(tmp_path / "a", images, more) == 0
    assert train(tmp_path / "b", images, more, "--steps 3") == 0
    resume = ("--mode train --resume --steps 6", *places(tmp_path / "b", images))
    assert exit_code(ddpm.main, *resume) == 0
    a, b = (checkpoint(tmp_path / run / "model.pt") for run in "ab")
    assert a["step"] == b["step"] == 6 and ", captions " in a["data"]
    assert all(torch.equal(a[k][name], b[k][name]) for k in ("weights", "ema") for name in a[k])
    decoded = sorted((tmp_path / "b" / "data" / ".decoded").iterdir())
    write_jsonl(images, [("red.png", "another")])
    capsys.readouterr()
    assert exit_code(ddpm.main, *resume, "--steps 9") == 1
    assert "was trained on other data" in capsys.readouterr().err
    assert sorted((tmp_path / "b" / "data" / ".decoded").iterdir()) == decoded


def test_init_from_drops_the_words_of_another_vocabulary(captioned, tmp_path, capsys):
    _, path = captioned
    other = write_jsonl(
        write_images(tmp_path / "other" / "data"), {**CAPTIONS, "red.png": "purple"}.items()
    )
    for data, missing in ((captioned[0], "new: none"), (other, "new: text.words.weight")):
        assert train(tmp_path / "run", data, "--steps 1 --init_from", path) == 0
        assert missing in capsys.readouterr().out


def test_two_processes_train_and_sample_as_one(captioned, program, tmp_path):
    data, path = captioned
    flags = ("--mode train", TINY, SHORT, *places(tmp_path, data))
    assert program(*flags, processes=2).returncode == 0
    assert train(tmp_path / "one", data, SHORT, "--grad_accum 2") == 0
    two, one = (checkpoint(p / "model.pt")["weights"] for p in (tmp_path, tmp_path / "one"))
    assert all(torch.allclose(two[name], one[name], atol=2e-4) for name in one)


# ----------------------------------------------------------------------------------- other programs


def test_convert_refuses_in_a_sentence(captioned, tmp_path):
    _, path = captioned
    with pytest.raises(ddpm.UserError, match="trained on captions.*diffusers"):
        convert.to_diffusers(path, tmp_path / "folder")


def test_evaluate_measures_with_the_captions_of_the_images(captioned, tmp_path, capsys):
    data, path = captioned
    flags = ("--model_path", path, "--data_path", data, "--samples_dir", tmp_path / "samples")
    assert exit_code(evaluate.main, *flags, "--bpd_timesteps 2 --num_samples 4") == 0


def test_evaluate_takes_prompts_and_none_that_training_had(captioned, tmp_path, monkeypatch):
    data, path = captioned
    saved = ddpm.read_checkpoint(path)
    saved["config"]["prompt"] = ["a red square"]
    torch.save(saved, tmp_path / "m.pt")
    texts = []
    real = ddpm.encode
    monkeypatch.setattr(ddpm, "encode", lambda names, words: texts.append(names) or real(names, words))
    flags = ("--model_path", tmp_path / "m.pt", "--data_path", data, "--samples_dir", tmp_path / "s")
    for more, asked in (
        ([], set(CAPTIONS.values())),
        (["--prompt red yellow"], {"red", "yellow"}),
    ):
        texts.clear()
        assert exit_code(evaluate.main, *flags, "--bpd_timesteps 2 --num_samples 12", *more) == 0
        assert any(set(names) == asked for names in texts)


def test_the_page_samples_prompts_and_names_a_word_never_read(
    captioned, tmp_path, monkeypatch
):
    testing = pytest.importorskip("streamlit.testing.v1", reason="the page needs Streamlit")
    (tmp_path / "saved_models").mkdir()
    path = tmp_path / "saved_models" / "text.pt"
    path.write_bytes(captioned[1].read_bytes())  # newest, and so the one that is chosen
    monkeypatch.chdir(tmp_path)
    page = testing.AppTest.from_file(str(ROOT / "app.py"), default_timeout=60).run()
    page.text_area[0].set_value("a blue square\nyellow")
    page.button[0].click().run()
    assert not page.exception and not page.error
    kept = page.session_state["generated: Generate"]
    shown = [np.asarray(Image.open(io.BytesIO(image))) for image in kept["images"]]
    stored = ddpm.stored_config(ddpm.read_checkpoint(path), path)
    config = ddpm.override(
        stored, model_path=str(path), samples_dir=str(tmp_path), num_samples=len(shown),
        prompt=("a blue square", "yellow")
    )  # fmt: skip
    expected = ddpm.sample(config).permute(0, 2, 3, 1).numpy()
    assert all(np.array_equal(a, b) for a, b in zip(shown, expected, strict=True))
    assert "yellow" in kept["names"][1]
    page.text_area[0].set_value("a bleu square")
    page.button[0].click().run()
    assert "bleu" in page.error[0].value and "blue" in page.error[0].value
    page.text_area[0].set_value("a blue square\nyellow")
    page.number_input[0].set_value(1)
    page.button[0].click().run()
    assert page.error[0].value == "2 prompts need 2 images or more: raise Images."
    page.number_input[0].set_value(2)
    page.button[0].click().run()
    assert not page.error and not page.exception
