"""Training through the real command line: exact resuming, files, EMA, micro-batches, stops and
failures."""

import copy
import functools
import io
import json
import os
import platform
import re
import shutil
import signal
import stat
import sys
import time
import types
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import (
    ROOT,
    TINY,
    Malicious,
    before_step,
    checkpoint,
    metrics,
    places,
    randomise,
    slow,
    tree,
    words,
)
from PIL import Image

import ddpm

# All that could make a resumed run differ: dropout, flips, hidden labels, EMA, accumulation, a
# falling rate.
LIVELY = """--dropout 0.2 --hflip --label_dropout 0.3 --optimizer adam --grad_accum 2
    --ema_decay 0.9 --lr 3e-3 --lr_schedule cosine --warmup_steps 3 --steps 12 --sample_every 100"""


@pytest.fixture
def train(main, image_folder, tmp_path):
    """train(*flags, name=...) trains a tiny model in tmp_path/name and returns the exit code."""

    def run(*flags, name="run", data=image_folder):
        given = words(*flags)
        length = "" if {"--steps", "--epochs", "--minutes"} & set(given) else "--steps 2"
        more = "" if "--resume" in given else f"{TINY} {length}"
        return main("--mode train", more, *places(tmp_path / name, data), *given)

    return run


def last_step(folder):
    return checkpoint(sorted(Path(folder, "model.pt_steps").glob("step_*.pt"))[-1])


def differences(a, b, where=""):
    """The places where two nested checkpoints are not equal bit for bit."""
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [k for k in {**a, **b} if k not in a or k not in b]
        return keys + [d for k in a if k in b for d in differences(a[k], b[k], f"{where}.{k}")]
    if isinstance(a, list) and isinstance(b, list):
        return [
            d
            for i, (x, y) in enumerate(zip(a, b, strict=True))
            for d in differences(x, y, f"{where}[{i}]")
        ]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    return [] if same else [where]


def state(folder):
    kept = ("weights", "ema", "optimizer", "scaler", "step", "data")
    return {k: v for k, v in last_step(folder).items() if k in kept}


def interrupt_in_step(monkeypatch, number, what=signal.SIGTERM):
    """Send this process a signal while it computes the step of that number, counted from 0."""
    before_step(monkeypatch, number, lambda: os.kill(os.getpid(), what))


# ---- resuming


@pytest.fixture(scope="module")
def whole(image_folder, tmp_path_factory):
    """The last state of twelve lively steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    assert ddpm.main(words("--mode train", TINY, LIVELY, *places(folder, image_folder))) == 0
    return state(folder)


@pytest.mark.parametrize(
    "stops, previews",  # in mid-epoch, at its end, after it, and twice in a row
    [
        ((3,), ""),
        slow((6,), ""),
        slow((7,), ""),
        slow((6, 7), ""),
        slow((3,), "--sample_every 2"),
        slow((6,), "--sample_every 2"),
        slow((7,), "--sample_every 2"),
        ((6, 7), "--sample_every 2"),
    ],
)
def test_twelve_steps_equal_some_a_resume_and_the_rest(
    train, tmp_path, monkeypatch, whole, stops, previews
):
    """Six steps are an epoch. The interruption is a real SIGTERM inside a step."""
    for i, stop in enumerate(stops):
        with monkeypatch.context() as patch:
            interrupt_in_step(patch, stop - 1)
            assert train("--resume" if i else LIVELY, previews) == 143
        assert last_step(tmp_path / "run")["step"] == stop
    assert train("--resume", previews) == 0
    assert whole["step"] == 12 and not differences(whole, state(tmp_path / "run"))


def test_a_run_with_muon_resumes_exactly_after_a_stop(train, tmp_path, monkeypatch):
    """With its rate falling, in the middle of an epoch; above it is Adam."""
    muon = f"{LIVELY} --optimizer muon"
    assert train(muon, name="whole") == 0
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 6)
        assert train(muon) == 143
    assert train("--resume") == 0
    assert not differences(state(tmp_path / "whole"), state(tmp_path / "run"))


def test_the_comparison_of_checkpoints_can_fail(train, tmp_path):
    assert train(LIVELY, name="a") == train(LIVELY, "--seed 1", name="b") == 0
    found = differences(state(tmp_path / "a"), state(tmp_path / "b"))
    assert {".weights.conv_in.weight", ".ema.conv_in.weight", ".optimizer.state.0.exp_avg"} <= set(
        found
    )


@pytest.mark.quick
@pytest.mark.parametrize(
    "more",
    [
        slow("--arch simple"),
        slow("--schedule linear --predict eps --loss l1"),
        "--optimizer adamw --weight_decay 0.1 --precision bf16",
        "--optimizer muon --weight_decay 0.1",
    ],
)
def test_a_longer_run_resumes_where_a_finished_one_ended(train, tmp_path, more):
    """Six steps, then --resume --steps 12; the rate is constant, as a falling one depends on the
    length."""
    more = f"{LIVELY} --lr_schedule constant {more}"
    assert train(more, name="whole") == 0
    assert train(more, "--steps 6") == train("--resume --steps 12") == 0
    assert not differences(state(tmp_path / "whole"), state(tmp_path / "run"))


def test_the_latest_that_can_be_read_is_resumed_and_a_named_one_is_that_one(
    train, tmp_path, capsys
):
    assert train(LIVELY, "--save_every 4 --keep_last 9") == 0
    steps = tmp_path / "run" / "model.pt_steps"
    (steps / "step_00000012.pt").write_bytes(b"torn")
    assert train("--resume", steps / "step_00000012.pt") == 1, "an explicit path never falls back"
    capsys.readouterr()
    assert train("--resume --steps 9") == 0
    assert capsys.readouterr().err.count("Trying the one before") == 1
    assert checkpoint(steps / "step_00000009.pt")["step"] == 9
    assert train("--resume", steps / "step_00000004.pt", "--steps 5") == 0
    assert checkpoint(steps / "step_00000005.pt")["step"] == 5


def test_nothing_to_resume_is_an_error(train, tmp_path, capsys):
    assert train("--resume") == 1
    assert "Nothing to resume" in capsys.readouterr().err
    assert train("--resume", tmp_path / "gone.pt") == 1
    assert "gone.pt" in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "flag, value, was",
    [
        ("--channels", "16", "8"),
        ("--grad_clip", "0.5", "1.0"),
        ("--seed", "3", "0"),
        ("--schedule", "linear", "cosine"),
        ("--batch_size", "8", "4"),
    ],
)
def test_a_setting_that_changes_on_resume_is_an_error_naming_both_values(
    train, tmp_path, capsys, flag, value, was
):
    assert train(LIVELY, "--steps 1") == 0
    before = tree(tmp_path)
    assert train("--resume", flag, value) == 1
    said = capsys.readouterr().err
    assert f"{flag} {value}" in said and was in said and tree(tmp_path) == before


def test_other_images_on_resume_are_an_error(train, image_folder, tmp_path, capsys):
    shutil.copytree(image_folder, tmp_path / "mine")
    assert train("--steps 1", data=tmp_path / "mine") == 0
    shutil.copy(tmp_path / "mine" / "disc" / "0.png", tmp_path / "mine" / "disc" / "new.png")
    assert train("--resume --steps 2", data=tmp_path / "mine") == 1
    assert "other data" in capsys.readouterr().err


def test_metrics_continue_after_a_resume_without_a_gap_or_a_repeat(train, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 4)
        assert train(LIVELY, "--save_every 3") == 143
    metrics_file = tmp_path / "run" / "samples" / "metrics.jsonl"
    metrics_file.write_text(metrics_file.read_text() + '{"step": 6, "lo')  # cut short by a crash
    assert train("--resume") == 0
    assert [row["step"] for row in metrics(metrics_file.parent)[1]] == list(range(1, 13))


# ---- the EMA weights


@pytest.mark.quick
def test_the_first_ema_updates_by_hand(train, tmp_path):
    """After n updates e <- d e + (1 - d) w with d = min(decay, (1 + n) / (10 + n))."""
    assert train("--steps 4 --save_every 1 --keep_last 9 --ema_decay 0.2 --lr 1e-2") == 0
    steps = [
        checkpoint(tmp_path / "run" / "model.pt_steps" / f"step_{n:08d}.pt") for n in (1, 2, 3, 4)
    ]
    for n, (before, after) in enumerate(zip(steps, steps[1:]), start=1):
        d = min(0.2, (1 + n) / (10 + n))
        for name, new in after["ema"].items():
            expected = d * before["ema"][name].double() + (1 - d) * after["weights"][name].double()
            torch.testing.assert_close(new.double(), expected, rtol=1e-5, atol=1e-7)
    assert (1 + 1) / (10 + 1) < 0.2 < (1 + 2) / (10 + 2), "both arms of the minimum are seen"


@pytest.mark.quick
def test_update_ema_averages_float_buffers_and_copies_integer_ones():
    """At n = 0 the decay is 1/10."""
    model = randomise(ddpm.SimpleUNet(1, 4))
    ema = copy.deepcopy(model)
    before = {k: v.clone() for k, v in ema.state_dict().items()}
    randomise(model, seed=1)
    model.train()(torch.randn(4, 1, 16, 16), torch.zeros(4, dtype=torch.int64))
    ddpm.update_ema([*ema.state_dict().values()], [*model.state_dict().values()], 0, 0.999)
    now, after = model.state_dict(), ema.state_dict()
    counters = [k for k in after if "num_batches_tracked" in k]
    assert counters and all(after[k].item() == now[k].item() == 1 for k in counters)
    for k in after:
        if k not in counters:
            torch.testing.assert_close(
                after[k], 0.1 * before[k] + 0.9 * now[k], rtol=1e-5, atol=1e-6
            )
    assert any("running_mean" in k and not torch.equal(after[k], before[k]) for k in after)


@pytest.mark.quick
def test_orthogonalize_is_the_newton_schulz_iteration_on_the_matrix_itself():
    for shape in ((24, 90), (90, 24), (16, 16)):
        g = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
        x = g / g.norm()
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x - 4.7750 * gram @ x + 2.0315 * gram @ gram @ x
        ours = ddpm.orthogonalize(g.float())
        torch.testing.assert_close(ours.double(), x, rtol=1e-3, atol=1e-3)
        values = torch.linalg.svdvals(ours)
        assert values.max() < 1.3 and values[:-1].min() > 0.5, "the last of a square one is small"


@pytest.mark.quick
@pytest.mark.parametrize("shape", [(24, 15, 2, 2), (60, 6, 2, 2)])
def test_muon_agrees_with_pytorchs_on_a_convolution_as_a_matrix(shape):
    """torch.optim.Muon takes only matrices, and iterates in bfloat16."""
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("PyTorch has it from 2.9 on")
    torch.manual_seed(0)
    network = torch.nn.Sequential(torch.nn.Conv2d(shape[1], shape[0], 2, bias=False))
    weight = network[0].weight
    theirs = torch.nn.Parameter(weight.detach().flatten(1).clone())
    options = dict(lr=0.01, weight_decay=0.1)
    our_optimizer = ddpm.Muon(network, **options)
    their_optimizer = torch.optim.Muon([theirs], adjust_lr_fn="match_rms_adamw", **options)
    for step in range(4):
        weight.grad = torch.randn(shape, generator=torch.Generator().manual_seed(step))
        theirs.grad = weight.grad.flatten(1)
        before = weight.detach().clone()
        our_optimizer.step()
        their_optimizer.step()
        moved = (weight - before).norm()
        assert (weight.flatten(1) - theirs).norm() < 0.02 * moved * (step + 1)


def test_muon_moves_the_inner_convolutions_and_adamw_the_rest():
    images = torch.randn(2, 3, 16, 16)
    model = ddpm.UNet(3, 8, (1, 2), 1, num_classes=2)
    randomise(model)
    adamw = copy.deepcopy(model)
    for network in (model, adamw):
        network(images, torch.tensor([3, 90]), torch.tensor([0, -1])).square().mean().backward()
    before = copy.deepcopy(model.state_dict())
    optimizer = ddpm.Muon(model, lr=0.01, weight_decay=0.0)
    optimizer.step()
    torch.optim.AdamW(adamw.parameters(), lr=0.01, weight_decay=0.0).step()
    moved_by_muon = []
    for (name, weight), other in zip(model.named_parameters(), adamw.parameters()):
        if torch.equal(weight, other):
            continue
        moved_by_muon.append(name)
        moved = (before[name] - weight).flatten(1)
        values = torch.linalg.svdvals(moved / (0.01 * 0.2 * max(moved.shape) ** 0.5))
        assert 0.7 < values.max() < 1.3, name
    inner = {
        name for name, weight in model.named_parameters()
        if weight.ndim == 4 and name not in ("conv_in.weight", "conv_out.weight")
    }
    assert set(moved_by_muon) == inner


@pytest.mark.quick
def test_loading_takes_the_ema_weights_unless_it_is_given_ema_false(trained):
    saved = checkpoint(trained)
    assert differences(saved["ema"], saved["weights"])
    for ema, kind in ((True, "ema"), (False, "weights")):
        model, _, _ = ddpm.load_model(trained, ema=ema)
        assert not differences(dict(model.state_dict()), saved[kind]) and not model.training


# ---- micro-batches and processes


def gradient(folder):
    """The averaged gradient of a run's only step: Adam's first moment holds (1 - 0.9) of it."""
    moments = last_step(folder)["optimizer"]["state"]
    return torch.cat([m["exp_avg"].flatten() for m in moments.values()]).double() * 10


ONE_STEP = """--steps 1 --grad_clip 0 --batch_size 12 --dropout 0.2 --label_dropout 0.5 --hflip
    --optimizer adam"""


@pytest.fixture
def two(program):
    """two(*flags) runs ddpm.py, or another file, in two processes."""

    def run(*flags, **more):
        result = program(*flags, processes=2, **more)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def test_two_processes_see_the_gradient_of_one_with_two_micro_batches(
    train, two, image_folder, trained, tmp_path
):
    """Relative 1e-5. It starts from a trained model, since in a new one most gradients are zero."""
    assert train(ONE_STEP, "--grad_accum 2 --init_from", trained, name="one") == 0
    more = [*places(tmp_path / "two", image_folder), "--init_from", trained]
    said = two("--mode train", TINY, ONE_STEP, *more)
    alone, shared = gradient(tmp_path / "one"), gradient(tmp_path / "two")
    assert ((alone - shared).norm() / alone.norm()).item() < 1e-5 and alone.norm() > 1e-3
    rows = [metrics(tmp_path / name / "samples")[1][0] for name in ("one", "two")]
    assert rows[0]["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)
    assert rows[0]["loss"] == pytest.approx(rows[1]["loss"], rel=1e-4)
    assert said.count("Wrote:") == said.count("plan  ") == 1, "only the first process prints"


@pytest.mark.parametrize("flags", ("--grad_accum 2", slow("--arch simple --batch_size 8")))
def test_a_compiled_network_trains_to_the_same_weights(train, tmp_path, monkeypatch, flags):
    """PyTorch's compiler up to the machine code, which needs more than PyTorch: the network is one
    graph, compiled once, and that is what trains."""
    graphs = []
    calls = []

    def backend(graph, _):
        graphs.append(graph)
        return lambda *inputs: calls.append(1) or graph(*inputs)

    compile = functools.partial(torch.compile, backend=backend, fullgraph=True)
    monkeypatch.setattr(torch, "compile", compile)
    assert train("--steps 3", flags, name="plain") == 0 and not graphs
    assert train("--steps 3 --compile", flags, name="compiled") == 0
    assert len(graphs) == 1 and len(calls) == 3 * (2 if "accum" in flags else 1)
    plain, compiled = (last_step(tmp_path / name) for name in ("plain", "compiled"))
    for kind in ("weights", "ema", "optimizer"):
        assert not differences(plain[kind], compiled[kind])


@pytest.mark.parametrize("before, after", [(1, 2), slow(2, 1)])
def test_a_run_is_resumed_with_another_number_of_processes(
    train, two, image_folder, tmp_path, before, after
):
    """And arrives where one process with two micro-batches arrives."""

    def train_on(processes, more):
        if processes == 1:
            assert train("--grad_accum 2", more, name="changed") == 0
        else:
            tiny = TINY if "--resume" not in more else ""
            two(
                "--mode train",
                *places(tmp_path / "changed", image_folder),
                tiny,
                "--grad_accum 1",
                more,
            )

    assert train("--grad_accum 2 --steps 3", name="one") == 0
    assert train("--resume --steps 6", name="one") == 0
    train_on(before, "--steps 3")
    train_on(after, "--resume --steps 6")
    alone, shared = (last_step(tmp_path / name) for name in ("one", "changed"))
    assert alone["step"] == shared["step"] == 6
    for name, weight in alone["weights"].items():
        assert torch.allclose(weight, shared["weights"][name], atol=1e-5), name


def test_any_process_may_stop_all_and_the_clock_of_the_first_counts(monkeypatch):
    def agreed(rank, stop_signal, progress, of_the_other):
        def all_reduce(largest, op):
            largest.copy_(torch.maximum(largest, torch.tensor(of_the_other).to(largest)))

        monkeypatch.setattr(ddpm.dist, "all_reduce", all_reduce)
        runtime = ddpm.Runtime(torch.device("cpu"), "fp32", rank, world_size=2)
        return ddpm.agree(runtime, stop_signal, progress)

    third = 1 / 3
    assert agreed(0, 0, third, (float(signal.SIGTERM), 0.0)) == (signal.SIGTERM, third)
    assert agreed(1, signal.SIGINT, 0.9, (0.0, 0.5)) == (signal.SIGINT, 0.5)


def test_one_process_of_a_machine_decodes_for_the_others(two, image_folder, tmp_path):
    """The others wait, then find the cache: none downloads into, or decodes beside, what is not
    there yet."""
    counting = tmp_path / "counting.py"
    counting.write_text(f"""import os, sys, time
sys.path.insert(0, {str(ROOT)!r})
import ddpm
decode = ddpm.decode

def slowly(*args):
    time.sleep(0.05)
    open({str(tmp_path)!r} + "/decoded_by_" + os.environ["RANK"], "a").write(".")
    return decode(*args)

ddpm.decode = slowly
raise SystemExit(ddpm.main(sys.argv[1:]))
""")
    two("--mode train", TINY, "--steps 1", *places(tmp_path / "two", image_folder), file=counting)
    assert (
        len((tmp_path / "decoded_by_0").read_text()) == 24
        and not (tmp_path / "decoded_by_1").exists()
    )


def test_processes_that_lose_each_other_say_what_to_do(program, image_folder, tmp_path):
    """One of two leaves without a word: the other prints a sentence and fails, soon."""
    leaving = tmp_path / "leaving.py"
    leaving.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import ddpm
take, asked = ddpm.Images.batch, []

def batch(*args):
    asked.append(1)
    if os.environ["RANK"] == "1" and len(asked) == 3:
        os._exit(0)
    return take(*args)

ddpm.Images.batch = batch
raise SystemExit(ddpm.main(sys.argv[1:]))
""")
    more = places(tmp_path / "two", image_folder)
    result = program("--mode train", TINY, "--steps 9", *more, processes=2, file=leaving)
    assert result.returncode != 0 and "--resume" in result.stderr
    assert re.search(r"^error: The processes lost each other \(", result.stderr, re.M)


def test_gradients_meet_once_a_step_after_the_last_micro_batch(two, image_folder, tmp_path):
    """Counted by DistributedDataParallel's own hook, which sees every exchange."""
    counting = tmp_path / "counting.py"
    counting.write_text(f"""import os, sys
sys.path.insert(0, {str(ROOT)!r})
import ddpm
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

exchanges, Parallel = [], ddpm.nn.parallel.DistributedDataParallel

class Counting(Parallel):
    def __init__(self, *args):
        super().__init__(*args, bucket_cap_mb=1000)
        self.register_comm_hook(None, self.count)
    def count(self, _, bucket):
        exchanges.append(bucket.is_last())
        return allreduce_hook(None, bucket)

ddpm.nn.parallel.DistributedDataParallel = Counting
code = ddpm.main(sys.argv[1:])
if os.environ["RANK"] == "0":
    print("exchanges", sum(exchanges))
sys.exit(code)
""")
    more = [
        TINY,
        "--steps 3 --batch_size 8 --grad_accum 4",
        *places(tmp_path / "run", image_folder),
    ]
    assert "exchanges 3\n" in two("--mode train", *more, file=counting)


@pytest.mark.parametrize("number", [5, slow(1)])
def test_two_processes_sample_what_one_samples(two, main, trained, tmp_path, number):
    """Also where there is nothing to do for one of them."""
    flags = ["--mode sample --precision fp32 --device cpu --sampling_steps 3 --gif --individual"]
    more = ["--sample_batch_size 2 --num_samples", number, "--model_path", trained, "--samples_dir"]
    said = two(*flags, tmp_path / "each2", *more, tmp_path / "two")
    assert main(*flags, tmp_path / "each1", *more, tmp_path / "one") == 0
    assert said.count("sampling  ") == said.count("Wrote:") == 1, "only the first process prints"
    each = [tree(tmp_path / name) for name in ("each1", "each2")]
    assert len(each[0]) == number and each[0] == each[1]
    names = [{*tree(tmp_path / name)} for name in ("one", "two")]
    assert (
        names[0] == names[1] and "generated_sample.png" in names[0] and "denoising.gif" in names[0]
    )
    one, other = (
        np.asarray(Image.open(tmp_path / n / "generated_sample.png")) for n in ("one", "two")
    )
    assert np.array_equal(one, other)


def test_two_processes_check_one_batch_and_print_once(two, image_folder, tmp_path):
    said = two("--mode train --dry_run", TINY, *places(tmp_path / "run", image_folder))
    assert said.count("dry run ") == 1 and not (tmp_path / "run" / "model.pt").exists()


@pytest.mark.quick
def test_accumulation_averages_the_gradients_of_its_micro_batches(
    train, trained, tmp_path, monkeypatch
):
    """Of the whole batch, computed here from what the loss was given."""
    real, given = ddpm.Diffusion.loss, []

    def loss(self, model, *args):
        if model.training:
            given.append((self, *(a.clone() for a in args)))
        return real(self, model, *args)

    monkeypatch.setattr(ddpm.Diffusion, "loss", loss)
    assert train(ONE_STEP, "--dropout 0 --grad_accum 3 --init_from", trained) == 0
    assert [len(g[1]) for g in given] == [4, 4, 4]
    model, _, _ = ddpm.load_model(trained)
    model.requires_grad_(True)
    diffusion, (x0, t, eps, y) = given[0][0], [torch.cat(parts) for parts in list(zip(*given))[1:]]
    real(diffusion, model, x0, t, eps, y).mean().backward()
    by_hand = torch.cat([p.grad.flatten() for p in model.parameters()]).double()
    assert ((gradient(tmp_path / "run") - by_hand).norm() / by_hand.norm()).item() < 1e-4


@pytest.mark.parametrize("more", ["--grad_accum 3", "--grad_accum 8"])
def test_a_batch_that_does_not_divide_is_an_error(train, tmp_path, capsys, more):
    assert train(more) == 1
    assert "multiple of" in capsys.readouterr().err and not (tmp_path / "run").exists()


# ---- what is random in each step


@pytest.fixture
def given_to_loss(train, monkeypatch):
    """given_to_loss(*flags): every (x0, t, eps, y) that the training loss was given in a run."""

    def run(*flags):
        real, given = ddpm.Diffusion.loss, []

        def loss(self, model, x0, t, eps, y=None):
            if model.training:
                given.append((x0, t, eps, y))
            return real(self, model, x0, t, eps, y)

        with monkeypatch.context() as patch:
            patch.setattr(ddpm.Diffusion, "loss", loss)
            assert train(*flags) == 0
        return [torch.cat(parts) for parts in zip(*given)]

    return run


@pytest.mark.quick
def test_every_timestep_is_trained_both_ends_too(given_to_loss):
    _, t, _, _ = given_to_loss("--timesteps 10 --steps 10 --batch_size 48")
    counts = torch.bincount(t, minlength=10)
    assert len(counts) == 10 and counts.min() > 20 and counts.max() < 90, counts


@pytest.mark.quick
def test_labels_are_hidden_one_image_at_a_time(given_to_loss):
    _, _, _, y = given_to_loss("--label_dropout 0.5 --steps 10 --batch_size 48")
    hidden = (y == -1).reshape(10, 48).float().mean(1)
    assert 0.2 < hidden.min() and hidden.max() < 0.8, "one coin for a whole batch"
    assert hidden.mean().item() == pytest.approx(0.5, abs=0.1)
    assert given_to_loss("--label_dropout 0 --steps 2")[3].min() >= 0


def test_noise_is_standard_and_new_in_every_micro_batch_and_step(given_to_loss):
    x0, _, eps, _ = given_to_loss("--steps 6 --batch_size 8 --grad_accum 2")
    assert len(eps.flatten(1).unique(dim=0)) == 48
    assert abs(eps.mean().item()) < 0.02 and abs(eps.std().item() - 1) < 0.02
    assert x0.min() >= -1 and x0.max() <= 1 and x0.min() < -0.5


# ---- how long, how fast


def test_the_loss_falls(train, tmp_path):
    """A network that says zero has the loss 1 in predicting eps, and so does a new one."""
    plain = "--predict eps --min_snr 0 --detail_weight 0 --optimizer adamw --lr 1e-2"
    assert train("--steps 120 --batch_size 12", plain) == 0
    losses = [row["loss"] for row in metrics(tmp_path / "run" / "samples")[1]]
    assert (
        len(losses) == 120
        and losses[0] == pytest.approx(1, abs=0.1)
        and np.mean(losses[-20:]) < 0.5
    )


def test_an_epoch_is_as_many_steps_as_the_images_fill(train, tmp_path):
    assert train("--epochs 2.5 --log_every 1") == 0
    rows = metrics(tmp_path / "run" / "samples")[1]
    assert rows[-1]["step"] == 15 and rows[-1]["epoch"] == pytest.approx(2.5)


def test_minutes_are_a_wall_clock_budget(train, tmp_path):
    start = time.monotonic()
    assert train("--minutes 0.05 --log_every 1") == 0
    assert 2 < time.monotonic() - start < 12
    rows = metrics(tmp_path / "run" / "samples")[1]
    assert rows[-1]["step"] > 3 and rows[-1]["seconds"] < 4
    assert rows[0]["lr"] > 0.9e-3 and rows[-1]["lr"] < 0.2e-3, "the rate follows the clock"


def test_progress_of_minutes_is_the_elapsed_fraction(image_folder, tmp_path):
    config = ddpm.preset(
        "animals", minutes=10, data_path=str(image_folder), download_dir=str(tmp_path)
    )
    images = ddpm.load_images(config)
    model = ddpm.build_model(config, 3, [])
    state = ddpm.TrainState(config, model, images, ddpm.Runtime(torch.device("cpu"), "fp32", 0, 1))
    state.started = time.monotonic() - 30
    assert state.progress() == pytest.approx(30 / 600, abs=0.01)
    state.seconds_before = 300  # of the run that is resumed
    assert state.progress() == pytest.approx(330 / 600, abs=0.01)
    state.started = time.monotonic() - 3000
    assert state.progress() == 1
    assert type(state.progress()) is float, "processes exchange it: all must have one type"


@pytest.mark.quick
@pytest.mark.parametrize(
    "schedule, expected", [("constant", [1 / 4, 2 / 4, 3 / 4, 1, 1, 1, 1, 1]), ("cosine", None)]
)
def test_the_learning_rate_rises_then_stays_or_falls(train, tmp_path, schedule, expected):
    """Half a cosine over the whole run, times a linear rise over three warm-up steps."""
    assert train("--steps 8 --lr 1e-3 --warmup_steps 3 --lr_schedule", schedule) == 0
    rise = np.minimum((np.arange(8) + 1) / 4, 1)
    expected = expected or rise * (0.5 + 0.5 * np.cos(np.pi * np.arange(8) / 8))
    found = [row["lr"] / 1e-3 for row in metrics(tmp_path / "run" / "samples")[1]]
    assert found == pytest.approx(list(expected), rel=1e-6)


def test_the_gradient_is_clipped_to_its_norm(train, trained, tmp_path):
    flags = [ONE_STEP, "--init_from", trained]
    assert train(*flags, name="free") == train(*flags, "--grad_clip 0.01", name="clipped") == 0
    free, clipped = gradient(tmp_path / "free"), gradient(tmp_path / "clipped")
    assert free.norm() > 0.02 and clipped.norm().item() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(clipped / clipped.norm(), free / free.norm(), rtol=1e-3, atol=1e-6)


# ---- what a run writes


def test_the_files_that_a_run_writes(train, tmp_path, capsys):
    assert train("--steps 12 --sample_every 6 --save_every 6 --holdout 0.25") == 0
    run = tmp_path / "run"
    expected = {
        "dataset_grid.png",
        "schedules.png",
        "forward_process.png",
        "loss_graph.png",
        "metrics.jsonl",
    }
    files = {p.name for p in (run / "samples").iterdir()}
    grids = files - expected
    assert expected <= files
    for kind in ("clean", "noisy", "pred", "compared", "generated"):
        of_a_kind = [
            name for name in grids if name.startswith(f"{kind}_epoch") and name.endswith(".png")
        ]
        assert len(of_a_kind) == 2, grids
        grids -= set(of_a_kind)
    assert not grids
    assert {str(p.relative_to(run)) for p in run.rglob("*.pt")} == {
        "model.pt",
        "model.pt_steps/step_00000006.pt",
        "model.pt_steps/step_00000012.pt",
    }
    for file in (run / "samples").glob("*.png"):
        Image.open(file).load()
    said = capsys.readouterr().out.split("Wrote:")[1].split("\n")
    written = {
        str(p) for p in run.rglob("*") if p.is_file() and ".decoded" not in p.parts
    }  # but the cache
    assert {line.strip() for line in said if line.strip()} == written


def test_previews_of_any_steps_have_names_of_their_own(train, tmp_path):
    assert train("--steps 3 --sample_every 1 --batch_size 1") == 0
    names = {path.name for path in (tmp_path / "run" / "samples").glob("generated_epoch*")}
    assert names == {f"generated_epoch{epoch}.png" for epoch in ("0.042", "0.083", "0.125")}


@pytest.mark.parametrize("n, batch_size", [(60_000, 32), (10**6, 1), (999, 1000), (3, 2), (1, 16)])
def test_the_names_of_steps_are_different_and_short(n, batch_size):
    config = ddpm.Config(batch_size=batch_size)
    state = types.SimpleNamespace(config=config, images=types.SimpleNamespace(train=range(n)))
    state.epochs = lambda: ddpm.TrainState.epochs(state)
    names = set()
    for state.step in [*range(2000), *range(10**6, 10**6 + 2000)]:
        names.add(ddpm.TrainState.epoch_name(state))
    assert len(names) == 4000
    state.step = round(24 * n / batch_size)
    assert len(ddpm.TrainState.epoch_name(state)) <= 5 + (n > batch_size)


def test_plots_are_real_images(main, image_folder, tmp_path, real_plots):
    """Of a run with validation images, and quarters of the timesteps that no step has met."""
    more = "--steps 2 --sample_every 1 --timesteps 600 --holdout 0.25"
    assert main("--mode train", TINY, "--data_path", image_folder, more) == 0
    for name in ("schedules", "forward_process", "loss_graph"):
        image = np.asarray(Image.open(tmp_path / "samples" / f"{name}.png").convert("L"))
        assert min(image.shape) > 60 and image.std() > 5


def test_metrics_parse_and_start_with_configuration_and_versions(train, tmp_path):
    assert train("--steps 3 --sample_every 2 --holdout 0.25") == 0
    lines = (tmp_path / "run" / "samples" / "metrics.jsonl").read_text().splitlines()
    head, *rows = [
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        for line in lines
    ]
    assert (
        head["config"]["channels"] == 8
        and head["torch"] == torch.__version__
        and head["torchvision"]
    )
    training = [row for row in rows if "loss" in row]
    assert [row["step"] for row in training] == [1, 2, 3]
    for row in training:
        assert {"lr", "grad_norm", "loss_quarters", "images_per_s", "memory_mb"} <= row.keys()
        known = [q for q in row["loss_quarters"] if q is not None]
        assert known and min(known) <= row["loss"] <= max(known) and row["grad_norm"] > 0
    assert (
        all(row["validation_loss"] > 0 for row in rows if "validation_loss" in row)
        and len(rows) == 5
    )


def test_the_validation_loss_is_measured_on_all_classes(tmp_path):
    """Of many validation images it takes 256, and files are sorted by class: not the first ones,
    then."""
    for i in range(600):
        (tmp_path / "ab"[i // 300]).mkdir(exist_ok=True)
        Image.new("L", (8, 8), i % 256).save(tmp_path / "ab"[i // 300] / f"{i}.png")
    config = ddpm.preset(
        "animals",
        data_path=str(tmp_path),
        image_size=8,
        holdout=0.9,
        num_samples=1,
        sampling_steps=1,
    )
    images, seen = ddpm.load_images(config), []
    model = ddpm.build_model(
        ddpm.override(config, channels=4, channel_mults=(1,)), 1, images.class_names
    )
    model.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[2]))
    runtime = ddpm.Runtime(torch.device("cpu"), "fp32", 0, 1)
    ddpm.Previewer(config, images, ddpm.make_diffusion(config), runtime).make(model)
    labels = torch.cat([y for y in seen if len(y) == 64])
    assert len(labels) == 256 and 100 < (labels == 1).sum() < 156
    early = (labels[:128] == 1).sum()  # the t of the batches rise
    assert 40 < early < 88, "each class at all timesteps"


def test_a_dry_run_finds_classes_that_do_not_exist(train, capsys):
    assert train("--dry_run --classes lyon") == 1
    assert "has no class 'lyon'" in capsys.readouterr().err


def test_a_recipe_without_classes_trains_and_samples_from_python(image_folder, tmp_path):
    """Nobody gave a guidance, so none may stand in the way."""
    places = dict(
        data_path=str(image_folder), model_path=f"{tmp_path}/m.pt", samples_dir=f"{tmp_path}/s"
    )
    small = dict(
        channels=8, attention="none", steps=1, batch_size=2, num_samples=2, sampling_steps=2
    )
    config = ddpm.preset("cifar10", **places, **small)
    ddpm.train(config)
    assert ddpm.sample(config).shape == (2, 3, 32, 32)


def test_a_flat_folder_trains_and_samples_from_python_with_the_default_recipe(
    image_folder, tmp_path
):
    """Its guidance is for classes, which there are none of here."""
    config = ddpm.Config(
        data_path=str(image_folder / "disc"),
        model_path=f"{tmp_path}/m.pt",
        samples_dir=f"{tmp_path}/s",
        image_size=16,
        steps=1,
        num_samples=2,
        sampling_steps=2,
    )
    ddpm.train(config)
    assert ddpm.sample(config).shape == (2, 3, 16, 16)


def test_a_network_of_another_shape_is_refused():
    """The loss would stretch one shape to the other."""
    d = ddpm.Diffusion(ddpm.make_betas("cosine", 10))
    x0, t = torch.zeros(2, 3, 8, 8), torch.tensor([1, 2])
    with pytest.raises(ddpm.UserError, match=r"\(2, 1, 8, 8\) for \(2, 3, 8, 8\)"):
        d.loss(lambda x, t, y: x[:, :1], x0, t, x0)


@pytest.mark.quick
def test_the_grid_of_the_data_shows_the_training_images(train, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(4):
        Image.new("RGB", (16, 16), (60 * i, 10, 200)).save(flat / f"{i}.png")
    assert train("--steps 1", data=flat) == 0
    grid = np.asarray(Image.open(tmp_path / "run" / "samples" / "dataset_grid.png").convert("RGB"))
    colours = {tuple(c) for c in grid.reshape(-1, 3).tolist()}
    assert colours == {(60 * i, 10, 200) for i in range(4)} | {(255, 255, 255)}


@pytest.mark.quick
@pytest.mark.parametrize("keep, expected", [(1, [7]), (2, [6, 7]), (3, [4, 6, 7])])
def test_the_last_checkpoints_are_kept_and_no_others(train, tmp_path, keep, expected):
    assert train("--steps 7 --save_every 2 --keep_last", keep) == 0
    names = sorted(p.name for p in (tmp_path / "run" / "model.pt_steps").iterdir())
    assert names == [f"step_{n:08d}.pt" for n in expected]


def test_the_checkpoint_that_was_resumed_from_is_kept(train, tmp_path):
    assert train("--steps 2") == 0
    steps = tmp_path / "run" / "model.pt_steps"
    assert (
        train("--resume", steps / "step_00000002.pt", "--steps 8 --save_every 2 --keep_last 1") == 0
    )
    assert sorted(p.name for p in steps.iterdir()) == ["step_00000002.pt", "step_00000008.pt"]


def test_a_new_run_keeps_the_earlier_model(train, tmp_path, capsys):
    run, contents = tmp_path / "run", []
    for seed in range(3):
        assert train("--steps 1 --seed", seed) == 0
        contents.append(
            (
                (run / "model.pt").read_bytes(),
                (run / "model.pt_steps" / "step_00000001.pt").read_bytes(),
            )
        )
    assert "model.pt.previous" in capsys.readouterr().out
    kept = {p.read_bytes() for p in run.glob("model.pt*") if p.is_file()}
    assert kept == {model for model, _ in contents} and len(kept) == 3
    assert {p.read_bytes() for p in run.glob("model.pt_steps*/*.pt")} == {step for _, step in contents}
    assert (run / "model.pt.previous").read_bytes() == contents[0][0]


def test_a_dry_run_writes_no_model(train, tmp_path, capsys):
    assert train("--dry_run") == 0
    assert "(4, 3, 16, 16)" in capsys.readouterr().out and not list(tmp_path.rglob("*.pt"))


def test_checkpointing_gives_the_same_model(train, tmp_path):
    """Bit for bit, with dropout; a run may be resumed with it or without."""
    weights = []
    for flag in ("", "--checkpointing"):
        assert train("--steps 3 --dropout 0.2", flag) == 0
        weights.append(checkpoint(tmp_path / "run" / "model.pt")["weights"])
    assert all(torch.equal(weights[0][k], weights[1][k]) for k in weights[0])
    assert train("--resume --steps 4 --no_checkpointing") == 0


def test_checkpointing_saves_activations_and_gives_the_same_gradients():
    """Bit for bit; what autograd saves in the forward pass becomes less than half."""
    model = randomise(ddpm.UNet(3, 8, (1, 2), 2, "full", (1,), num_classes=3))
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([3, 40]), torch.tensor([0, -1])
    saved, gradients = [], []
    for model.checkpointing in (False, True):
        sizes = []
        hooks = torch.autograd.graph.saved_tensors_hooks
        with hooks(lambda v, into=sizes: into.append(v.nbytes) or v, lambda v: v):
            loss = model(x, t, y).square().mean()
        saved.append(sum(sizes))
        gradients.append(torch.autograd.grad(loss, list(model.parameters())))
    assert all(map(torch.equal, *gradients)) and any(g.any() for g in gradients[0])
    assert saved[1] < 0.5 * saved[0]


@pytest.mark.parametrize("arch", ("simple", "resnet18"))
def test_checkpointing_is_warned_of_for_other_networks(train, capsys, arch):
    assert train("--dry_run --checkpointing --image_size 32 --arch", arch) == 0
    assert f"--checkpointing has no effect with --arch {arch}" in capsys.readouterr().out


def test_the_banner_says_what_the_run_costs(train, capsys):
    assert train("--dry_run") == 0
    said = capsys.readouterr().out
    for pattern in (
        r"[\d,]+ parameters",
        r"device    cpu \(.+ threads\), fp32",
        r"in and out \(4, 3, 16, 16\), from -[01]\.\d\d to [01]\.\d\d; loss [\d.]+; "
        r"peak memory \d+ MB",
    ):
        assert re.search(pattern, said), pattern


def test_the_first_steps_say_how_long_the_run_takes(train, capsys):
    assert train("--steps 3 --log_every 3 --save_every 1") == 0
    said = capsys.readouterr().out
    assert said.count("speed ") == 1 and "12 images in" in said


@pytest.mark.parametrize("sample_every", (1, 100))
def test_the_forecast_does_not_count_the_first_step_or_previews(train, monkeypatch, sample_every):
    """The first starts up libraries, or compiles: it takes a hundred seconds here, as a preview does,
    each other step two."""
    step = ddpm.train_step
    make = ddpm.Previewer.make
    now = [0.0]

    def timed_step(config, state, *others):
        now[0] += 2 if state.step else 100
        return step(config, state, *others)

    def timed_make(*args):
        now[0] += 100
        return make(*args)

    rates = []
    monkeypatch.setattr(ddpm, "train_step", timed_step)
    monkeypatch.setattr(ddpm.Previewer, "make", timed_make)
    monkeypatch.setattr(ddpm, "time", types.SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    monkeypatch.setattr(ddpm, "print_forecast", lambda state, rate: rates.append(rate))
    flags = "--steps 9 --log_every 5 --save_every 1 --batch_size 4 --sample_every"
    assert train(flags, sample_every) == 0
    assert rates == [2.0]


@pytest.mark.parametrize("length", ("--steps 6", "--minutes 0.1"))
def test_the_forecast_of_a_resumed_run_is_of_what_is_left(train, tmp_path, monkeypatch, length):
    said = []
    monkeypatch.setattr(ddpm.tqdm, "write", said.append)
    monkeypatch.setattr(ddpm.TrainState, "seconds", lambda self: float(self.step))  # one a step
    assert train("--batch_size 4 --steps 2") == 0
    assert train("--resume --log_every 3", length) == 0
    line = [text for text in said if text.startswith("speed")][-1]
    numbers = re.findall(r"\d[\d.,e+-]*", line)
    speed, images, minutes = (float(n.replace(",", "")) for n in numbers)
    if length == "--steps 6":
        assert images == 16
    else:
        assert minutes == pytest.approx(0.1 - 2 / 60, rel=0.01)


def test_a_step_that_fp16_left_out_is_logged_as_json(train, tmp_path, monkeypatch):
    step = ddpm.train_step

    def overflowing_step(config, state, *others):
        result = step(config, state, *others)
        state.grad_norm = torch.tensor(float("inf"))
        return result

    monkeypatch.setattr(ddpm, "train_step", overflowing_step)
    assert train("--steps 1") == 0
    for line in (tmp_path / "run" / "samples" / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert row["step"] == 1 and row["grad_norm"] is None


def test_a_dry_run_counts_the_memory_of_the_optimiser(train, monkeypatch):
    """The second step has its state from the start."""
    had_state = []
    step = ddpm.train_step

    def noting_step(config, state, *others):
        had_state.append(bool(state.optimizer.state))
        return step(config, state, *others)

    monkeypatch.setattr(ddpm, "train_step", noting_step)
    assert train("--dry_run") == 0 and had_state == [False, True]


@pytest.mark.parametrize("optimizer", ("adam", slow("adamw"), "muon"))
def test_a_run_that_moves_to_another_device_uses_the_optimiser_made_for_that(
    train, tmp_path, monkeypatch, optimizer
):
    """fused is no setting of the run: MPS does without, and fp16 fails without."""
    assert train("--steps 2 --optimizer", optimizer) == 0
    path = next((tmp_path / "run" / "model.pt_steps").glob("*.pt"))
    saved = checkpoint(path)
    saved["optimizer"]["param_groups"][0]["fused"] = False
    torch.save(saved, path)
    states = []
    save = ddpm.TrainState.save
    monkeypatch.setattr(ddpm.TrainState, "save", lambda self: states.append(self) or save(self))
    given = []  # by which PyTorch decides where the numbers of steps belong
    load = torch.optim.Optimizer.load_state_dict
    monkeypatch.setattr(torch.optim.Optimizer, "load_state_dict", lambda self, state: (
        given.extend(group["fused"] for group in state["param_groups"]), load(self, state)))
    assert train("--steps 3 --resume") == 0
    assert [group["fused"] for group in states[-1].optimizer.param_groups] == [True]
    assert given == [True]


def test_processes_cannot_share_the_gpu_of_a_mac(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ddpm, "choose_device", lambda name: torch.device("mps"))
    with pytest.raises(ddpm.UserError, match="give --device cpu"):
        ddpm.start_runtime(ddpm.Config(precision="fp32"))


@pytest.mark.parametrize("has_nccl, backend", [(True, "cpu:gloo,cuda:nccl"), (False, "gloo")])
def test_gpus_without_nccl_communicate_by_gloo(monkeypatch, has_nccl, backend):
    asked = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(ddpm, "choose_device", lambda name: torch.device("cuda", 0))
    monkeypatch.setattr(ddpm.dist, "is_nccl_available", lambda: has_nccl)
    monkeypatch.setattr(ddpm.dist, "init_process_group", lambda name, **_: asked.append(name))
    ddpm.start_runtime(ddpm.Config(precision="fp32"))
    assert asked == [backend]


@pytest.mark.parametrize(
    "length, num_images, expected",
    [
        ("--steps", 1000, "--minutes 500, --image_size 32, or"),
        ("--minutes", 1000, "--minutes 500, --image_size 32, or"),
        ("32 pixels", 1000, "--minutes 500, or"),
        ("--steps", 270, "--minutes 500, --image_size 32, or"),
        ("--steps", 199, ""),
        ("long enough", 1000, ""),
        ("grey", 1000, ""),
        ("--init_from", 1000, ""),
        ("--resume", 1000, ""),
    ],
)
def test_a_run_too_short_for_photos_says_what_would_do(capsys, length, num_images, expected):
    """At ten images a second 300,000 take 500 minutes."""
    steps = {"--minutes": None, "long enough": 18_750}.get(length, 1500)
    config = ddpm.Config(steps=steps, minutes=None if steps else 40.0)
    config.image_size = 32 if length == "32 pixels" else 64
    config.init_from = "clothes.pt" if length == "--init_from" else None
    config.resume = length == "--resume"
    channels = 1 if length == "grey" else 3
    images = types.SimpleNamespace(train=range(num_images), channels=channels)
    state = types.SimpleNamespace(
        config=config, images=images, total_steps=steps, start_step=0, seconds_before=0.0)
    ddpm.print_forecast(state, 10.0)
    said = capsys.readouterr().out
    assert ("300,000 images in 500" if length == "long enough" else "24,000 images in 40 m") in said
    assert expected in said and ("note:" in said) == bool(expected)


def test_tensorboard_gets_the_numbers_and_the_grids(train, tmp_path, capsys):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert train("--steps 9 --sample_every 6 --holdout 0.2 --logger tensorboard") == 0
    folder = tmp_path / "run" / "samples" / "tensorboard"
    [file] = folder.iterdir()
    assert f"  {folder}\n" in capsys.readouterr().out.partition("Wrote:")[2]
    events = EventAccumulator(str(tmp_path / "run" / "samples" / "tensorboard")).Reload()
    tags, (_, rows) = events.Tags(), metrics(tmp_path / "run" / "samples")
    quarters = {f"loss/quarter_{q}" for q in (1, 2, 3, 4)}
    others = {"loss", "lr", "grad_norm", "images_per_s", "memory_mb", "epoch", "validation_loss"}
    assert {*tags["scalars"]} == quarters | others
    assert [e.step for e in events.Scalars("loss")] == [row["step"] for row in rows]
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([row["loss"] for row in rows])
    assert {*tags["images"]} == {"compared", "generated"}
    shown = Image.open(io.BytesIO(events.Images("generated")[-1].encoded_image_string))
    grid = next(tmp_path.rglob("generated_epoch*.png"))
    assert shown.size == Image.open(grid).size
    assert train("--steps 12 --resume --logger none") == 0
    assert str(folder) not in capsys.readouterr().out, "it is of the part before"


def test_wandb_gets_the_numbers_and_the_grids(train, tmp_path, monkeypatch):
    """As its documentation has it: with sync_tensorboard=True, given before a SummaryWriter is
    made, it takes everything that is written for TensorBoard."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = tmp_path / "run" / "samples" / "tensorboard"
    calls = []
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **options: calls.append((options, events.exists()))
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    assert train("--steps 4 --sample_every 4 --logger wandb") == 0
    [(options, too_late)] = calls
    assert options["project"] == "ddpm" and options["config"]["steps"] == 4
    assert options["sync_tensorboard"] is True and not too_late
    written = EventAccumulator(str(events)).Reload()
    assert [e.step for e in written.Scalars("loss")] == [1, 2, 3, 4]
    assert {*written.Tags()["images"]} == {"compared", "generated"}


@pytest.mark.parametrize(
    "logger, module", [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_tracker_that_is_not_installed_is_named(
    train, tmp_path, capsys, monkeypatch, logger, module
):
    monkeypatch.setitem(sys.modules, module, None)
    assert train("--steps 1 --logger", logger) == 1
    assert f"pip install {logger}" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.pt"))


def test_no_step_leaves_its_graph_behind(train, monkeypatch):
    """A graph that is kept costs a megabyte a step: an overnight run would fill the memory."""
    graphs, alive, loss = [], [], ddpm.Diffusion.loss

    class Probe(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            alive.append(sum(graph() is not None for graph in graphs))
            graphs.append(weakref.ref(ctx))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    monkeypatch.setattr(ddpm.Diffusion, "loss", lambda *args: Probe.apply(loss(*args)))
    assert train("--steps 12 --log_every 5 --grad_accum 2") == 0
    assert len(alive) == 24 and max(alive) <= 1


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is a setting of glibc")
def test_freed_memory_is_kept(program, tmp_path):
    """In a process of its own: most blocks as large as one freed before fault in nothing. Not all:
    a small object may have settled where the block was, and then a place is found for the next
    one."""
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import resource, statistics, torch, ddpm
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def block():
    before = faults()
    torch.ones(64 * 2**18)  # 64 MB
    return faults() - before
print(statistics.median(block() for _ in range(9)))
ddpm.keep_memory()
print(statistics.median(block() for _ in range(9)))
"""
    (tmp_path / "faults.py").write_text(code)
    said = program(file=tmp_path / "faults.py")
    assert said.returncode == 0, said.stderr
    faults, kept_faults = map(int, said.stdout.split())
    assert kept_faults == 0 and faults >= 32  # 2 MB at a time, or 4 kB


def test_checkpoints_carry_plain_names_and_values(trained):
    saved = checkpoint(trained)
    assert saved["config"]["image_size"] == 16 and saved["classes"] == ["disc", "square", "stripes"]
    assert not any("module" in k or "_orig_mod" in k for k in [*saved["weights"], *saved["ema"]])


@pytest.mark.parametrize("prefix", ("module.", "_orig_mod.", "module._orig_mod."))
def test_names_from_wrapped_modules_are_understood(trained, tmp_path, prefix):
    saved = checkpoint(trained)
    wrapped = saved | {
        kind: {prefix + k: v for k, v in saved[kind].items()} for kind in ("weights", "ema")
    }
    torch.save(wrapped, tmp_path / "wrapped.pt")
    model, _, _ = ddpm.load_model(tmp_path / "wrapped.pt")
    assert not differences(dict(model.state_dict()), saved["ema"])


# ---- starting from given weights


def test_init_from_loads_what_fits_and_names_the_rest(train, trained, tmp_path, capsys):
    """A second residual block a stage: most of the weights fit, and the rest are new."""
    assert train("--steps 1 --lr 1e-9 --ema_decay 0 --res_blocks 2 --init_from", trained) == 0
    said, saved = capsys.readouterr().out, checkpoint(trained)["ema"]
    new = checkpoint(tmp_path / "run" / "model.pt")["weights"]
    fits = [k for k in new if k in saved and saved[k].shape == new[k].shape]
    assert "conv_in.weight" in fits and 0 < len(fits) < len(new)
    for k in fits:
        torch.testing.assert_close(new[k], saved[k], rtol=0, atol=1e-6)
    assert f"{len(fits)} of {len(new)}" in said and next(k for k in new if k not in fits) in said


def test_init_from_other_classes_has_a_new_label_table(train, image_folder, trained, tmp_path):
    shutil.copytree(image_folder, tmp_path / "mine")
    (tmp_path / "mine" / "disc").rename(tmp_path / "mine" / "zebra")
    assert train("--steps 1 --lr 1e-9 --init_from", trained, data=tmp_path / "mine") == 0
    saved, new = checkpoint(trained)["ema"], checkpoint(tmp_path / "run" / "model.pt")["weights"]
    other = [k for k in new if not torch.allclose(new[k], saved[k], rtol=0, atol=1e-6)]
    assert other == ["embed.labels.weight"]


def test_init_from_what_fits_nowhere_is_an_error(train, trained, tmp_path, capsys):
    (tmp_path / "grey").mkdir()
    Image.new("L", (16, 16), 100).save(tmp_path / "grey" / "p.png")
    assert (
        train("--steps 1 --arch simple --channels 12 --init_from", trained, data=tmp_path / "grey")
        == 1
    )
    assert "Only 0 % of the network's weights fit" in capsys.readouterr().err
    assert not tree(tmp_path / "run" / "samples") and not list(
        (tmp_path / "run").rglob("*.pt")
    )


# ---- failures and stops


def fail_from_step(monkeypatch, number, value):
    """From the training step of that number on, counted from 1, the loss is multiplied by value."""
    real, calls = ddpm.Diffusion.loss, []

    def loss(self, model, *args):
        calls.append(model.training)
        return real(self, model, *args) * (value if sum(calls) >= number and model.training else 1)

    monkeypatch.setattr(ddpm.Diffusion, "loss", loss)


@pytest.mark.parametrize("precision, patience", [("fp32", 1), ("fp16", 50)])
def test_a_run_fails_after_so_many_steps_in_a_row_that_are_not_finite(precision, patience):
    meter = ddpm.LossMeter(1000, ddpm.Runtime(torch.device("cpu"), precision, 0, 1))
    good, bad = torch.tensor(1.0), torch.tensor(float("nan"))
    steps = [*[(good, bad)] * (patience - 1), (good, good), *[(bad, good)] * patience, (bad, bad)]
    for step, (loss, grad_norm) in enumerate(steps):
        assert meter.failed_step.item() == (-1 if step < len(steps) - 1 else step - 1)
        meter.end_step(step, loss, grad_norm)
    assert meter.failed_step.item() == len(steps) - 2, "the step at which it failed, not the last"
    for step, loss in enumerate([good, *[bad] * patience], start=len(steps)):  # it fails once more
        meter.end_step(step, loss, good)
    assert meter.failed_step.item() == len(steps) - 2, "the first step at which it failed"


def test_a_very_slow_training_has_a_speed_too(monkeypatch):
    """One image in 100 seconds, as of large images on a small machine, is not 0 images/s."""
    meter = ddpm.LossMeter(1000, ddpm.Runtime(torch.device("cpu"), "fp32", 0, 1))
    meter.add(torch.ones(1), torch.tensor([3]))
    meter.since -= 100
    assert meter.read()["images_per_s"] == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize("given, is_said", [("--predict eps", True), ("", False),
                                            ("--predict eps --detail_weight 0", False)])
def test_a_loss_that_does_not_suit_the_target_is_named(train, capsys, given, is_said):
    assert train("--dry_run", given) == 0
    note = "note: --predict eps learns better with --detail_weight 0"
    assert (note in capsys.readouterr().out) == is_said


@pytest.mark.quick
@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("log_every", ("1", "100"))
def test_a_loss_that_is_not_finite_stops_and_spoils_no_file(
    train, tmp_path, capsys, monkeypatch, value, log_every
):
    fail_from_step(monkeypatch, 4, value)
    assert train("--steps 9 --save_every 2 --log_every", log_every, "--sample_every 100") == 1
    said = capsys.readouterr().err
    assert (
        "error: Non-finite loss at step 3 (lr " in said
        and "step_00000002.pt" in said
        and "--lr" in said
    )
    assert [p.name for p in (tmp_path / "run" / "model.pt_steps").iterdir()] == ["step_00000002.pt"]
    ddpm.load_model(tmp_path / "run" / "model.pt")


def test_weights_that_are_not_finite_are_not_loaded(trained, tmp_path):
    saved = checkpoint(trained)
    next(iter(saved["ema"].values())).view(-1)[0] = float("nan")
    torch.save(saved, tmp_path / "nan.pt")
    with pytest.raises(ddpm.UserError, match="not finite"):
        ddpm.load_model(tmp_path / "nan.pt")


@pytest.mark.parametrize("what, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_inside_a_step_saves_and_exits(train, tmp_path, monkeypatch, capsys, what, code):
    with monkeypatch.context() as patch:
        interrupt_in_step(patch, 2, what)
        assert train("--steps 1000") == code
    assert "--resume" in capsys.readouterr().out
    assert last_step(tmp_path / "run")["step"] == 3
    ddpm.load_model(tmp_path / "run" / "model.pt")


@pytest.fixture
def sigterm_in_previews(monkeypatch):
    real = ddpm.generate

    def generate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    monkeypatch.setattr(ddpm, "generate", generate)


def test_a_signal_while_a_preview_is_sampled_saves_and_exits(
    train, tmp_path, sigterm_in_previews
):
    assert train("--steps 1000 --sample_every 3 --save_every 1000") == 143
    assert last_step(tmp_path / "run")["step"] in (3, 4), "at most one more step is done"
    assert list((tmp_path / "run" / "samples").glob("generated_epoch*.png"))


def test_a_signal_during_the_last_preview_leaves_a_finished_run(
    train, tmp_path, sigterm_in_previews
):
    assert train("--steps 2") == 0
    assert last_step(tmp_path / "run")["step"] == 2
    assert list((tmp_path / "run" / "samples").glob("generated_epoch*.png"))


def test_signal_handlers_are_put_back(train):
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    assert train("--steps 1") == 0
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


def test_sigterm_to_the_real_program_then_resume(background, program, image_folder, tmp_path):
    process = background("--mode train", TINY, "--steps 100000 --data_path", image_folder)
    rows = 0
    metrics_file = tmp_path / "samples" / "metrics.jsonl"
    start = time.monotonic()
    while rows < 3 and time.monotonic() - start < 120 and process.poll() is None:
        time.sleep(0.1)
        rows = metrics_file.read_text().count('"loss"') if metrics_file.exists() else 0
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert "Traceback" not in (tmp_path / "log").read_text()
    step = last_step_of(tmp_path)
    assert step >= 3
    result = program("--mode train --resume --steps", step + 2)
    assert result.returncode == 0, result.stderr
    assert last_step_of(tmp_path) == step + 2


def last_step_of(folder):
    return checkpoint(sorted(Path(folder, "saved_models", "denoise_model.pt_steps").iterdir())[-1])[
        "step"
    ]


class Unpicklable:
    def __reduce__(self):
        raise RuntimeError("half way")


@pytest.mark.quick
def test_a_write_that_fails_leaves_the_directory_as_it_was(tmp_path):
    target = tmp_path / "model.pt"
    for existing in (None, b"good"):
        if existing:
            target.write_bytes(existing)
        before = tree(tmp_path)
        with pytest.raises(RuntimeError, match="half way"):
            ddpm.atomic_write(target, lambda f: torch.save([torch.zeros(1000), Unpicklable()], f))
        assert tree(tmp_path) == before


def test_a_write_reaches_the_disk_before_and_after_it_gets_its_name(tmp_path, monkeypatch):
    """First the file, whole and under another name; then the name, which is in the folder."""
    replace, calls = os.replace, []

    def watched_replace(partial, target):
        calls.append("replace")
        replace(partial, target)

    def watched_fsync(descriptor):
        status = os.fstat(descriptor)
        calls.append("folder" if stat.S_ISDIR(status.st_mode) else f"{status.st_size} bytes")

    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(os, "fsync", watched_fsync)
    ddpm.atomic_write(tmp_path / "m.pt", lambda f: f.write(b"whole"))
    assert calls == ["5 bytes", "replace", "folder"]


def test_a_full_disk_is_an_error_that_keeps_the_last_good_files(
    train, tmp_path, monkeypatch, capsys
):
    assert train("--steps 2 --save_every 1") == 0
    good, real = tree(tmp_path / "run" / "model.pt_steps"), torch.save

    def full(what, file):
        file.write(b"half of it")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    assert train("--resume --steps 4") == 1
    assert "No space left" in capsys.readouterr().err
    assert tree(tmp_path / "run" / "model.pt_steps") == good and not list(tmp_path.rglob("*.tmp"))
    monkeypatch.setattr(torch, "save", real)
    assert train("--resume --steps 4") == 0


@pytest.mark.quick
def test_a_checkpoint_that_runs_code_is_refused(trained, tmp_path):
    torch.save(checkpoint(trained) | {"extra": Malicious(tmp_path / "pwned")}, tmp_path / "bad.pt")
    with pytest.raises(ddpm.UserError, match="cannot be read safely"):
        ddpm.load_model(tmp_path / "bad.pt")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "cannot be read"),
        (b"PK\x03\x04 and no more", "cannot be read"),
        ({"weights": {}}, "not a checkpoint"),
        ([1, 2], "not a checkpoint"),
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_in_a_sentence(tmp_path, content, said):
    path = tmp_path / "x.pt"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    with pytest.raises(ddpm.UserError, match=said):
        ddpm.load_model(path)


@pytest.mark.parametrize("size", (100, 5000, -1))
def test_a_truncated_checkpoint_is_refused(trained, tmp_path, size):
    (tmp_path / "cut.pt").write_bytes(Path(trained).read_bytes()[:size])
    with pytest.raises(ddpm.UserError, match="cannot be read"):
        ddpm.load_model(tmp_path / "cut.pt")


@pytest.mark.parametrize(
    "change, said", [({"format": 999}, "999"), ({"config": {"new_thing": 1}}, "new_thing")]
)
def test_a_checkpoint_from_another_version_is_refused(trained, tmp_path, change, said):
    torch.save(checkpoint(trained) | change, tmp_path / "other.pt")
    with pytest.raises(ddpm.UserError, match=said):
        ddpm.load_model(tmp_path / "other.pt")


def test_training_on_one_image_and_without_classes(train, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    Image.new("L", (16, 16), 100).save(flat / "p.png")
    assert train("--steps 2", data=flat) == 0
    saved = checkpoint(tmp_path / "run" / "model.pt")
    assert saved["channels"] == 1 and saved["classes"] == []
    assert "repeat" in capsys.readouterr().out
