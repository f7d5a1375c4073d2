"""What only happens on a GPU, on a pretended one: see pretend_gpu.py for what that can show and
what not."""

from collections import Counter

import numpy as np
import pretend_gpu
import pytest
import torch
from conftest import TINY, exit_code, places, slow, words
from PIL import Image

import ddpm
import evaluate

GPU_TINY = f"{TINY} --device cuda --precision auto"  # the last one counts


def run(where, folder, data, *flags):
    """A short training on the GPU or the CPU, in fp32 unless the flags say otherwise: its
    checkpoint."""
    assert (
        exit_code(
            ddpm.main, "--mode train", TINY, *places(folder, data), f"--device {where}", *flags
        )
        == 0
    )
    return ddpm.read_checkpoint(folder / "model.pt")


def test_the_pretended_gpu_refuses_what_a_real_one_refuses_and_counts_waits():
    with pretend_gpu.there() as waits:
        a = torch.ones(3, device="cuda:0")
        assert a.device == pretend_gpu.GPU and (a + 1).is_cuda and not a.cpu().is_cuda
        with pytest.raises(RuntimeError, match="on the CPU"):
            a + torch.ones(3)
        assert (a * torch.tensor(2.0)).is_cuda  # a number may come from the CPU
        assert waits == {"test: to the CPU": 1}
        assert a.sum().item() == 3 and a.tolist() == [1, 1, 1]
        a.to(pretend_gpu.GPU)
        torch.ones(3).to(pretend_gpu.GPU, non_blocking=True)
        assert waits == {"test: to the CPU": 1, "test: item": 1, "test: tolist": 1}
        torch.ones(3).to(pretend_gpu.GPU)
        torch.tensor(1.0, device=pretend_gpu.GPU)
        assert waits.pop("test: to the GPU") == 2
        with pytest.raises(RuntimeError, match="on the CPU"):
            a.index_add_(0, torch.tensor([0]), a[:1])
        with pytest.raises(RuntimeError, match="on the CPU"):
            torch.ones(3)[torch.zeros(1, dtype=torch.int64, device="cuda:0")]
        with pytest.raises(RuntimeError, match="generator"):
            torch.rand(3, device="cuda:0", generator=torch.Generator())
        assert a[a > 0].shape == a[torch.tensor([0, 1, 2])].shape
        assert waits.pop("test: nonzero") == waits.pop("test: indices to the GPU") == 1
        squares = torch.ones(2, 2, device="cuda:0", requires_grad=True)
        with torch.autocast("cuda", torch.bfloat16):
            product = squares @ squares
            assert product.dtype == torch.bfloat16 and product.softmax(0).dtype == torch.float32
        product.sum().backward()
        assert squares.grad.dtype == torch.float32 and squares.grad.is_cuda
    assert not isinstance(torch.tensor(1), pretend_gpu.OnGPU)


@pytest.mark.parametrize(
    "flags",
    (
        slow("--precision fp32"),
        "--precision fp16",
        "--optimizer adam --hflip --dropout 0.1 --min_snr 5",
        "--attention linear --predict x0 --loss huber --grad_accum 2",
        "--attention none --predict eps --loss l1 --sampler dpm++ --schedule linear",
        "--sampler ddim --eta 0.5 --holdout 0.2 --patch 2",
        "--arch simple --batch_size 8",
        slow("--arch resnet18 --image_size 32"),
        "--no_class_cond --guidance 1 --ema_decay 0",
    ),
)
def test_training_and_sampling_keep_everything_on_the_gpu(
    flags, tmp_path, image_folder, capfd
):
    to = places(tmp_path, image_folder)
    with pretend_gpu.there():
        assert (
            exit_code(ddpm.main, "--mode train", GPU_TINY, *to, flags, "--steps 3 --sample_every 2")
            == 0
        )
        precision = flags.split()[1] if "--precision" in flags else "bf16"
        assert f"Pretended, 80 GiB), {precision}" in capfd.readouterr().out
        assert exit_code(ddpm.main, "--mode sample --num_samples 3 --gif", *to[2:6]) == 0
    checkpoint = ddpm.read_checkpoint(tmp_path / "model.pt")
    assert checkpoint["step"] == 3
    assert all(
        v.device.type == "cpu" and v.isfinite().all() for v in checkpoint["weights"].values()
    )


def test_a_gpu_trains_and_samples_what_the_cpu_does(tmp_path, image_folder):
    """The same random numbers in fp32: the same weights and images, but for rounding. Then either
    run is resumed from half way on the other's device, to the same end."""
    flags = "--steps 6 --lr 1e-3 --hflip --grad_accum 2 --save_every 3"
    cpu = run("cpu", tmp_path / "a", image_folder, flags)
    with pretend_gpu.there():
        gpu = run("cuda", tmp_path / "b", image_folder, flags)
    half_way = ddpm.read_checkpoint(tmp_path / "a" / "model.pt_steps" / "step_00000003.pt")["weights"]
    changed = 0
    for name, weights in cpu["weights"].items():
        torch.testing.assert_close(gpu["weights"][name], weights, rtol=1e-3, atol=2e-5)
        torch.testing.assert_close(gpu["ema"][name], cpu["ema"][name], rtol=1e-3, atol=2e-5)
        changed = max(changed, (weights - half_way[name]).abs().max())
    assert changed > 5e-4  # the weights were trained

    grids = []
    for folder, on in (("a", "cpu"), ("b", "cpu"), ("b", "cuda")):
        to = places(tmp_path / folder, image_folder)[2:6]
        sample = f"--mode sample --num_samples 3 --precision fp32 --device {on} --sampling_steps 5"
        with pretend_gpu.there():
            assert exit_code(ddpm.main, sample, *to) == 0
        grids.append(
            np.asarray(Image.open(tmp_path / folder / "samples" / "generated_sample.png"), int)
        )
    assert grids[0].std() > 10
    assert all(abs(grid - grids[0]).max() <= 2 for grid in grids)

    for folder, on in (("a", "cuda"), ("b", "cpu")):  # either is resumed on the other
        path = ddpm.step_files(tmp_path / folder / "model.pt_steps")[0]
        to = places(tmp_path / folder, image_folder)[2:6]
        with pretend_gpu.there():
            assert exit_code(ddpm.main, f"--mode train --device {on} --resume", path, *to) == 0
        for name, weights in ddpm.read_checkpoint(tmp_path / folder / "model.pt")[
            "weights"
        ].items():
            torch.testing.assert_close(weights, cpu["weights"][name], rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize(
    "flags, room",
    (
        ("--precision bf16", 80 * 2**30),
        slow("--precision bf16", 10_000),
        slow("--precision fp32 --hflip --grad_accum 2", 80 * 2**30),
        ("--precision fp32 --hflip --grad_accum 2", 10_000),
    ),
)
def test_a_step_does_not_wait_for_the_gpu(
    flags, room, tmp_path, image_folder, monkeypatch
):
    """Four steps more without a line, checkpoint or image among them cost not one wait more,
    wherever the images live."""
    counts = []
    for steps in (2, 6):
        with pretend_gpu.there() as waits, monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "mem_get_info", lambda *_: (room, room))
            run(
                "cuda",
                tmp_path / str(steps),
                image_folder,
                flags,
                f"--steps {steps} --log_every 100",
            )
        counts.append(dict(waits))
    assert counts[0] == counts[1] and counts[0]["train_loop: item"] > 0


def test_the_counter_sees_a_wait_in_a_step(tmp_path, image_folder, monkeypatch):
    real, counts = ddpm.update_ema, []

    def update_ema(ema, weights, *args):
        weights[0].sum().item()
        real(ema, weights, *args)

    monkeypatch.setattr(ddpm, "update_ema", update_ema)
    for steps in (2, 6):
        with pretend_gpu.there() as waits:
            run("cuda", tmp_path / str(steps), image_folder, f"--steps {steps} --log_every 100")
        counts.append(sum(waits.values()))
    assert counts[1] - counts[0] == 4


@pytest.mark.parametrize("sampler", list(ddpm.SAMPLERS))
def test_sampling_does_not_wait_for_the_gpu_between_steps(
    sampler, tmp_path, image_folder
):
    """All of it: reading the model, sampling, and the images of the trajectory."""
    with pretend_gpu.there() as waits:
        run("cuda", tmp_path, image_folder, "--steps 2")
        counts, to = [], places(tmp_path, image_folder)[2:6]
        for steps in (9, 13):  # of which nine are shown
            waits.clear()
            flags = (
                f"--mode sample --sampler {sampler} --eta 0.5 --guidance 2 --sampling_steps {steps}"
            )
            assert exit_code(ddpm.main, flags, *to) == 0
            counts.append(Counter(waits))
    assert counts[0] and not counts[1] - counts[0]  # only the nine shown come over, at the end
    assert not any("on_step" in where for where in counts[1])


def test_images_live_on_the_gpu_where_there_is_room(image_folder, monkeypatch):
    config = ddpm.preset("animals", data_path=str(image_folder), image_size=16)
    with pretend_gpu.there(), monkeypatch.context() as patch:
        assert ddpm.load_images(config, pretend_gpu.GPU).pixels.is_cuda
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (10_000, 10_000))
        images = ddpm.load_images(config, pretend_gpu.GPU)
        assert not images.pixels.is_cuda
        x0, y = images.batch(0, 4, 0, 1, pretend_gpu.GPU)
        assert x0.is_cuda and y.is_cuda


def test_checkpointing_gives_the_same_gradients(image_folder, tmp_path):
    with pretend_gpu.there():
        plain = run("cuda", tmp_path / "a", image_folder, "--steps 3 --dropout 0.2")
        again = run("cuda", tmp_path / "b", image_folder, "--steps 3 --dropout 0.2 --checkpointing")
    for name, weights in plain["weights"].items():
        assert torch.equal(again["weights"][name], weights), name


def test_editing_and_evaluation_on_a_gpu(tmp_path, image_folder, monkeypatch):
    image, seen = next(image_folder.rglob("*.png")), []

    def features(pixels):  # in the place of Inception, which would have to be downloaded
        seen.append(pixels.is_cuda)
        return pixels.float().flatten(1)[:, :64]

    monkeypatch.setattr(evaluate, "choose_features", lambda *_: (features, None))
    with pretend_gpu.there():
        run("cuda", tmp_path, image_folder, "--steps 2 --holdout 0.3")
        to = places(tmp_path, image_folder)[2:6]
        sample = words("--mode sample --num_samples 3", *to)
        assert exit_code(ddpm.main, *sample, "--strength 0.8 --init_image", image) == 0
        assert exit_code(ddpm.main, *sample, "--mask", image, "--init_image", image) == 0
        assert exit_code(ddpm.main, *sample, "--interpolate 4") == 0
        measured = exit_code(
            evaluate.main, "--num_samples 6 --bpd_timesteps 3 --bpd_pictures 4", *to
        )
        assert measured == 0 and seen


def test_fp32_is_not_rounded_to_ten_bits(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    with pretend_gpu.there():
        ddpm.choose_device("cuda")
        assert not torch.backends.cudnn.allow_tf32


def test_the_number_of_a_process_is_that_of_its_gpu(monkeypatch):
    with pretend_gpu.there(), monkeypatch.context() as patch:
        assert ddpm.choose_device("auto") == torch.device("cuda", 0)
        patch.setenv("LOCAL_RANK", "1")
        patch.setenv("TORCHELASTIC_RUN_ID", "torchrun")
        with pytest.raises(ddpm.UserError, match="Process 1 has no GPU"):
            ddpm.choose_device("auto")
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        assert ddpm.choose_device("auto") == torch.device("cuda", 1)
        assert ddpm.choose_precision("auto", pretend_gpu.GPU) == "bf16"
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))  # has no bf16
        assert ddpm.choose_precision("auto", pretend_gpu.GPU) == "fp32"
