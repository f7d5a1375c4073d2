"""The program that draws the example images, and its captions."""

import hashlib
import json
import random
import re
import subprocess
import sys

import pytest
from conftest import ROOT
from PIL import Image

sys.path.insert(0, str(ROOT / "animal_data"))

import draw  # noqa: E402


def run_draw(*flags):
    command = [sys.executable, ROOT / "animal_data" / "draw.py", *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("kind, index", [("cat", 1), ("dog", 3), ("elephant", 0), ("lion", 9), ("tiger", 0)])
def test_the_images_of_the_repository_are_drawn_again(kind, index):
    """Also what captions need, such as collars that come off, leaves these as they are."""
    stored = Image.open(ROOT / "animal_data" / kind / f"{kind}_{index:02d}.png")
    assert draw.draw_image(kind, 0, index).tobytes() == stored.tobytes()


def test_captioned_drawings_remove_no_file_that_they_did_not_write(tmp_path):
    """Samples of --individual have the same names."""
    for name in ("00001.png", "00002.png"):
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "own.png", "text": "mine"}\n' * 3)
    (tmp_path / "own.png").write_bytes(b"mine")
    assert run_draw("--captions", "--count", 1, "--out", tmp_path).returncode == 0
    for name in ("00001.png", "00002.png", "own.png"):
        assert (tmp_path / name).read_bytes() == b"mine"


@pytest.mark.parametrize("line", ['{"file_name": "00000.png", "text": "my cat"}', "5", "{", "\udcff"])
def test_captions_of_somebody_else_are_kept(tmp_path, line):
    foreign = line.encode(errors="surrogateescape") + b"\n"
    (tmp_path / "metadata.jsonl").write_bytes(foreign)
    flags = ("--captions", "--count", 1, "--out", tmp_path)
    done = run_draw(*flags)
    assert done.returncode == 0 and "metadata.jsonl.previous" in done.stdout, done.stderr
    assert (tmp_path / "metadata.jsonl.previous").read_bytes() == foreign
    assert run_draw(*flags).returncode == 0  # over what it has written itself
    (tmp_path / "metadata.jsonl").write_bytes(foreign)
    assert run_draw(*flags).returncode == 2
    for name in ("metadata.jsonl", "metadata.jsonl.previous"):
        assert (tmp_path / name).read_bytes() == foreign


def test_captioned_drawings_are_a_function_of_seed_and_index(tmp_path):
    for name, count in (("a", 4), ("b", 5), ("b", 3)):  # the last takes the place of the one before
        done = run_draw("--captions", "--count", count, "--seed", 5, "--out", tmp_path / name)
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "a" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 4
    assert lines[:3] == (tmp_path / "b" / "metadata.jsonl").read_text().splitlines()
    assert len(list((tmp_path / "b").glob("*.png"))) == 3
    assert not (tmp_path / "b" / "00004.png").exists()
    digests = set()
    for line in lines[:3]:
        row = json.loads(line)
        first, second = (tmp_path / name / row["file_name"] for name in "ab")
        assert first.read_bytes() == second.read_bytes()
        assert Image.open(first).size == (64, 64)
        digests.add(hashlib.sha256(first.read_bytes()).digest())
    assert len(digests) == 3
    shown, _, text = draw.captioned(5, 2)
    assert json.loads(lines[2]) == {"file_name": "00002.png", "text": text, **shown}
    assert draw.captioned(6, 2) != draw.captioned(5, 2)


def test_without_keeps_combinations_out_of_2000_captions():
    without = draw.combinations(["unseen", "red hat", "blue eyes snow"])
    assert len(without) == len(draw.UNSEEN) + 2
    pairs = [("white", "tiger"), ("lion", "hat"), ("elephant", "glasses"), ("red", "hat")]
    counts = dict.fromkeys(pairs, 0)
    for index in range(2000):
        shown, _, text = draw.captioned(0, index, without)
        for pair in pairs:
            assert not set(pair) <= set(shown.values()) - {shown["eyes"]}, text
        assert (shown["eyes"], shown["background"]) != ("blue", "snow")
        for pair in pairs:
            counts[pair] += set(pair) <= set(draw.captioned(0, index)[0].values())
    assert min(counts.values()) > 50  # they are there when nothing is kept out


def test_all_values_are_left_without_the_unseen_combinations():
    """Each is seen with others, and about as often as without the flag."""
    without = draw.combinations(["unseen"])
    drawings = [draw.captioned(0, index, without)[0] for index in range(2000)]
    for name, values in draw.ATTRIBUTES.items():
        for value in values:
            count = sum(shown.get(name) == value for shown in drawings)
            assert count > 0.6 * len(drawings) / len(values) * (0.8 if name == "colour" else 1)


@pytest.mark.parametrize("texts, problem", [
    (["green tiger"], '"green tiger" is no combination of attributes: give some of cat, dog'),
    (["unseen", "zebra"], '"zebra" is no combination'),
    ([""], '"" is no combination'),
    (["cat dog"], '"cat dog" names two values of animal'),
    (["red hat scarf"], '"red hat scarf" names two values of accessory'),
    (list(draw.COATS), "--without leaves nothing to draw"),
])
def test_without_refuses_what_it_does_not_know(tmp_path, texts, problem):
    done = run_draw("--captions", "--out", tmp_path, "--without", *texts)
    assert done.returncode == 2
    assert problem in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("flags, problem", [
    (["--captions"], "give --out FOLDER"),
    (["--without", "unseen", "--out", "x"], "--without needs --captions"),
])
def test_flags_that_need_each_other(flags, problem):
    done = run_draw(*flags)
    assert done.returncode == 2
    assert problem in done.stderr


def test_captions_say_what_is_mentioned_and_nothing_else():
    """Read back with patterns of their own."""
    colours = "red|yellow|green|blue"
    tokens = set()
    for index in range(2000):
        shown, said, text = draw.captioned(1, index)
        assert said.items() <= shown.items()
        read = {}
        words = re.findall(r"\w+|[^\w\s]", text)
        tokens.update(words)
        assert len(words) <= 16
        eyes = re.search(rf"\b({colours}) eyes", text)
        if eyes:
            read["eyes"] = eyes[1]
        worn = re.search(rf"(?:({colours}) )?(scarf|hat|glasses|bow tie)", text)
        read["accessory"] = worn[2] if worn else "none"
        if worn and worn[1]:
            read["colour"] = worn[1]
        animal = re.search(r"(?:(white|black|orange|blue|pink) )?(cat|dog|elephant|lion|tiger)", text)
        read["animal"] = animal[2]
        if animal[1]:
            read["coat"] = animal[1]
        for name in ("pose", "background"):
            for value in draw.ATTRIBUTES[name]:
                if value in words:
                    read[name] = value
        assert read == said, text
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|  |^ | $|\ba (\w+ )?glasses", text), text
    assert len(tokens) < 45


def test_attributes_are_sometimes_left_out_and_phrasings_differ():
    said = [draw.captioned(2, index)[1] for index in range(500)]
    for name in ("coat", "eyes", "pose", "background"):
        assert 0.7 < sum(name in attributes for attributes in said) / len(said) < 0.9
    attributes = dict(animal="cat", coat="white", eyes="green", accessory="scarf", colour="red",
                      background="night")
    texts = {draw.caption(attributes, random.Random(i)) for i in range(20)}
    assert texts == {
        "a white cat with green eyes and a red scarf at night",
        "night: a white cat wearing a red scarf, green eyes",
        "a red scarf on a white cat at night, green eyes",
    }
