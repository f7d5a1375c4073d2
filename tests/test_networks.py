"""The networks: UNet against diffusers' UNet2DModel with the same weights; shapes, labels,
learning."""

import copy

import diffusers
import pytest
import torch
import torch.nn.functional as F
import torchvision
from conftest import randomise, slow
from torch.utils.flop_counter import FlopCounterMode

import convert
import ddpm


@pytest.mark.parametrize(
    "channels, base_channels, mults, res_blocks, attention, groups",
    [(3, 16, (1, 2, 2), 2, (1,), 4), (1, 8, (1, 2), 1, (0, 1), 2), (4, 32, (1, 2, 3), 1, (), 8)],
)
def test_unet_equals_diffusers_unet_with_the_same_weights(
    channels, base_channels, mults, res_blocks, attention, groups
):
    ours = randomise(
        ddpm.UNet(channels, base_channels, mults, res_blocks, attention_stages=attention)
    ).eval()
    kinds = ["Attn" if i in attention else "" for i in range(len(mults))]
    theirs = diffusers.UNet2DModel(
        sample_size=16,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=res_blocks,
        block_out_channels=[base_channels * m for m in mults],
        down_block_types=[f"{k}DownBlock2D" for k in kinds],
        up_block_types=[f"{k}UpBlock2D" for k in kinds[::-1]],
        norm_num_groups=groups,
        norm_eps=1e-6,
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
    ).eval()
    theirs.load_state_dict(convert.to_their_weights(ours))
    x, t = torch.randn(3, channels, 16, 16), torch.tensor([0, 500, 999])
    with torch.no_grad():
        a, b = ours(x, t), theirs(x, t).sample
    assert b.std() > 0.05, "an output that says nothing would be equal for the wrong reason"
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@pytest.mark.quick
@pytest.mark.parametrize("side", [1, 2, 5])
def test_upsampling_is_nearest_neighbours_and_a_convolution(side):
    upsample = ddpm.Upsample(6).double()
    x = torch.randn(2, 6, side, side, dtype=torch.float64)
    torch.testing.assert_close(
        upsample(x), upsample.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    )


def test_the_cifar10_network_has_the_parameters_of_the_paper():
    """Ho et al. 2020, section 4: 35.7 million; the released code has 35,746,307."""
    c = ddpm.preset("cifar10")
    model = ddpm.UNet(3, c.channels, c.channel_mults, c.res_blocks, c.attention, [1], c.dropout)
    assert sum(p.numel() for p in model.parameters()) == 35_746_307


@pytest.mark.quick
def test_weight_initialisation_is_that_of_the_papers_code():
    """Uniform, of variance 2 / (inputs + outputs); zero what ends a block, attention and the
    network. There q, k and v are a layer each."""
    model, zero = ddpm.build_model(ddpm.preset("cifar10"), 3, []), set()
    for name, layer in model.named_modules():
        if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
            assert not layer.bias.any()
            if not layer.weight.any():
                zero.add(name.split(".")[-1])
                continue
            outputs, inputs = layer.weight.shape[:2]
            outputs = inputs if name.endswith("qkv") else outputs
            variance = 2 / (inputs + outputs) / layer.weight[0, 0].numel()
            assert layer.weight.abs().max() <= (3 * variance) ** 0.5
            assert layer.weight.var().item() == pytest.approx(variance, rel=0.1)
    assert zero == {"conv2", "out", "conv_out"}


def multiply_adds(model):
    """Of one more image in the forward pass."""
    costs = []
    for n in (2, 3):
        x = torch.zeros(n, *model.image_shape)
        with FlopCounterMode(display=False) as counter:
            model(x, torch.zeros(n, dtype=torch.int64))
        costs.append(counter.get_total_flops() // 2)
    return costs[1] - costs[0]


def saved_bytes(model, x):
    """Of the activations that a forward pass of x saves for the backward pass."""
    saved = {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = model(x, torch.tensor([3, 9]))
    return sum(saved.values()), out


def test_multiply_adds_are_those_published():
    """12.44 GFLOP per image for the paper's network, that is 6.22 G multiply-adds; by hand for one
    layer. Ours saves five ninths of what the three convolutions after upsampling take, to 8, 16 and
    32 pixels."""
    model = ddpm.build_model(ddpm.preset("cifar10"), 3, [])
    saved = 5 * 256 * 256 * (8**2 + 16**2 + 32**2)
    assert round((multiply_adds(model) + saved) / 1e9, 2) == 6.22
    model = ddpm.build_model(ddpm.preset("animals_cnn"), 3, [])
    model.forward = lambda x, t: model.conv_in(x)
    assert multiply_adds(model) == 3 * 32 * 9 * 64 * 64


def test_checkpointing_changes_no_gradient():
    """Dropout gets the same random numbers when a block is recomputed; fewer activations are
    saved."""
    gradients, saved = [], []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = randomise(
            ddpm.UNet(3, 8, (1, 2), 2, attention_stages=(1,), dropout=0.5), scale=0.1
        ).train()
        model.checkpointing = checkpointing
        torch.manual_seed(1)
        size, out = saved_bytes(model, torch.randn(2, 3, 16, 16))
        saved.append(size)
        out.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients))
    assert saved[1] < saved[0] / 2


def test_checkpointing_comes_from_the_config():
    assert ddpm.build_model(ddpm.preset("animals", checkpointing=True), 3, []).checkpointing
    assert not ddpm.build_model(ddpm.preset("animals"), 3, []).checkpointing


UNETS = [name for name in ddpm.PRESETS if ddpm.preset(name).arch == "unet"]


@pytest.mark.parametrize("name", UNETS)
def test_the_unet_of_a_preset_has_as_many_parameters_as_diffusers_would(name):
    """Space-to-depth makes more channels to diffusers; the label table is ours alone."""
    c, labels = ddpm.preset(name), ["a", "b", "c"]
    ours = ddpm.build_model(c, 3, labels)
    widths = [c.channels * m for m in c.channel_mults]
    sides = ddpm.stage_heights(c)
    at = [c.attention != "none" and side in (c.attention_at or sides[-2:]) for side in sides]
    kinds = ["Attn" if there else "" for there in at]
    theirs = diffusers.UNet2DModel(
        in_channels=3 * c.patch**2,
        out_channels=3 * c.patch**2,
        layers_per_block=c.res_blocks,
        block_out_channels=widths,
        down_block_types=[f"{k}DownBlock2D" for k in kinds],
        up_block_types=[f"{k}UpBlock2D" for k in kinds[::-1]],
        norm_num_groups=4,
        attention_head_dim=None,
        add_attention=c.attention != "none",
    )
    table = (len(labels) + 1) * 4 * c.channels
    assert sum(p.numel() for p in ours.parameters()) == table + sum(
        p.numel() for p in theirs.parameters()
    )


def embedding_size(channels, width, outputs):
    """Weights of the time MLP, and of the layer that projects the embedding for each block."""
    return (channels + 1) * width + (width + 1) * width + sum((width + 1) * c for c in outputs)


@pytest.mark.parametrize("name", ("animals_cnn", "flowers_simple"))
def test_the_simple_network_has_the_parameters_of_its_description(name):
    """32-64-128-256-512: 4x4 down, 4x4 up, 3x3 merging what joins; two more a channel for each
    BatchNorm."""
    down = sum(16 * c * 2 * c + 2 * c + 4 * c for c in (32, 64, 128, 256))
    up = sum(16 * 2 * c * c + c + 2 * c for c in (32, 64, 128, 256))
    merge = sum(9 * 2 * c * c + c + 2 * c for c in (32, 64, 128, 256))
    ends = 9 * 3 * 32 + 32 + 9 * 32 * 3 + 3
    emb = embedding_size(32, 128, [64, 128, 256, 512, *(32, 64, 128, 256) * 2])
    model = ddpm.build_model(ddpm.preset(name), 3, [])
    assert sum(p.numel() for p in model.parameters()) == down + up + merge + ends + emb


def test_the_resnet_has_the_parameters_of_torchvision_and_a_mirror():
    """The mirror goes one scale further than the encoder: to the whole side, entered by a 3x3
    convolution."""
    widths = (32, 64, 64, 128, 256, 512)
    encoder = (
        sum(p.numel() for p in torchvision.models.resnet18().parameters()) - 513 * 1000
    )  # less its fc
    attention = sum(2 * c + (c + 1) * 4 * c for c in widths[1:])
    pairs = list(zip(widths, widths[1:]))
    up = sum(16 * b * a + a + 2 * a for a, b in pairs)
    merge = sum(9 * 2 * a * a + a + 2 * a for a, _ in pairs)
    ends = 9 * 3 * 32 + 32 + 9 * 32 * 3 + 3
    emb = embedding_size(128, 256, [*widths[1:], *widths[:-1], *widths[:-1]])
    model = ddpm.build_model(ddpm.preset("cifar10_resnet18"), 3, [])
    assert (
        sum(p.numel() for p in model.parameters()) == encoder + attention + up + merge + ends + emb
    )


def test_the_pretrained_encoder_is_torchvisions_and_grey_is_three_equal_colours(monkeypatch):
    torch.manual_seed(0)
    given, asked = torchvision.models.resnet18(), []
    monkeypatch.setattr(
        torchvision.models,
        "resnet18",
        lambda weights: asked.append(weights) or copy.deepcopy(given),
    )
    colour, grey = ddpm.ResNetUNet(3, pretrained=True), ddpm.ResNetUNet(1, pretrained=True)
    assert asked == [torchvision.models.ResNet18_Weights.IMAGENET1K_V1] * 2
    assert torch.equal(colour.encoder[4][1].conv2.weight, given.layer4[1].conv2.weight)
    x = torch.randn(2, 1, 32, 32)
    for model, image in ((colour, x.repeat(1, 3, 1, 1)), (grey, x)):
        torch.testing.assert_close(
            model.encoder[0][0](image), given.conv1(x.repeat(1, 3, 1, 1)), atol=1e-5, rtol=1e-4
        )


def test_pretrained_weights_that_cannot_be_had_are_an_error(monkeypatch):
    def offline(weights):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "resnet18", offline)
    with pytest.raises(
        ddpm.UserError, match=r"no network.*resnet18-.*\.pth.*leave out --pretrained"
    ):
        ddpm.ResNetUNet(3, pretrained=True)


@pytest.mark.parametrize(
    "base_channels, mults", [(20, (2, 4)), (40, (2, 4)), (36, (2, 4)), (6, (16,)), (80, (2, 2))]
)
def test_stages_may_be_divided_into_more_groups_than_the_first_layer(base_channels, mults):
    stages = len(mults)
    model = ddpm.UNet(3, base_channels, mults, 1, attention_stages=(stages - 1,))
    side = 2 ** (stages - 1) * 4
    out = model(torch.randn(1, 3, side, side), torch.tensor([5]))
    out.sum().backward()
    assert out.shape == (1, 3, side, side) and model.conv_in.weight.grad is not None


# ---- all three


def unet(channels=3, num_classes=0, **more):
    return ddpm.UNet(channels, 8, (1, 2), 1, attention_stages=(1,), num_classes=num_classes, **more)


def linear_unet(channels=3, num_classes=0):
    return unet(channels, num_classes, attention="linear")


def patch_unet(channels=3, num_classes=0):
    return unet(channels, num_classes, patch=2)


def simple(channels=3, num_classes=0):
    return ddpm.SimpleUNet(channels, 8, num_classes)


NETWORKS = [unet, linear_unet, patch_unet, simple, ddpm.ResNetUNet]
every_network = pytest.mark.parametrize("make", NETWORKS, ids=lambda make: make.__name__)


def build(make, channels=3, classes=0):
    torch.manual_seed(0)
    return make(channels, num_classes=classes)


@pytest.mark.quick
@every_network
@pytest.mark.parametrize("classes", (0, 1, 2, 7))
@pytest.mark.parametrize("channels", (1, 3))
def test_the_output_has_the_shape_of_the_image(make, channels, classes):
    model, x = build(make, channels, classes).eval(), torch.randn(2, channels, 32, 32)
    with torch.no_grad():
        assert model(x, torch.tensor([0, 999])).shape == x.shape
        assert model(x, torch.tensor([0, 999]), torch.tensor([classes - 1, -1])).shape == x.shape
        assert model(x[:1], torch.tensor([5]), torch.tensor([-1])).shape == x[:1].shape


@pytest.mark.parametrize("make", (unet, simple), ids=lambda make: make.__name__)
def test_images_need_not_be_square(make):
    assert build(make)(torch.randn(1, 3, 32, 16), torch.tensor([5])).shape == (1, 3, 32, 16)


@pytest.mark.quick
@every_network
def test_labels_matter_and_no_label_is_minus_one(make):
    model, x, t = build(make, classes=3).eval(), torch.randn(1, 3, 32, 32), torch.tensor([300])
    with torch.no_grad():
        for p in model.parameters():  # layers that start at zero let nothing through
            if not p.any():
                p.normal_(std=0.2)
        said = [model(x, t, torch.tensor([k])) for k in (-1, 0, 1, 2)]
        assert torch.equal(model(x, t), said[0])
    for i in range(4):
        for j in range(i):
            assert (said[i] - said[j]).abs().max() > 1e-4 * said[i].abs().max(), (
                "two labels give one output"
            )


@pytest.mark.quick
@every_network
def test_each_image_of_a_batch_is_computed_by_itself(make):
    model, x = randomise(build(make, classes=2), scale=0.05).eval(), torch.randn(3, 3, 32, 32)
    t, y = torch.tensor([0, 400, 999]), torch.tensor([1, -1, 0])
    with torch.no_grad():
        together = model(x, t, y)
        alone = torch.cat([model(x[i : i + 1], t[i : i + 1], y[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4 * together.abs().max().item())


@pytest.mark.quick
@every_network
def test_the_timestep_matters(make):
    model, x = randomise(build(make), scale=0.05).eval(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        said = [model(x, torch.tensor([t])) for t in (0, 1, 500, 999)]
    assert all((a - b).abs().max() > 1e-5 * a.abs().max() for a, b in zip(said, said[1:]))


@pytest.mark.quick
@every_network
def test_the_gradient_reaches_every_parameter(make):
    model = randomise(build(make, classes=2), scale=0.05).train()
    x, t, y = (
        torch.randn(4, 3, 32, 32),
        torch.tensor([1, 300, 600, 999]),
        torch.tensor([0, 1, -1, 0]),
    )
    model(x, t, y).square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


@pytest.mark.quick
@every_network
def test_bf16_is_fp32_within_its_rounding(make):
    """bf16 keeps 8 bits, a relative 0.4 %; no more than a few times that is left of all layers."""
    model, outputs, gradients = randomise(build(make), scale=0.05), [], []
    x, t, target = (
        torch.randn(4, 3, 32, 32),
        torch.tensor([0, 300, 600, 999]),
        torch.randn(4, 3, 32, 32),
    )
    for precision in ("fp32", "bf16"):
        model.zero_grad()
        with ddpm.autocast(x.device, precision):
            out = model(x, t).float()
        F.mse_loss(out, target).backward()
        outputs.append(out.detach())
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert 1e-4 < (outputs[1] - outputs[0]).norm() / outputs[0].norm() < 0.02, "and it was bf16"
    assert F.cosine_similarity(*gradients, 0) > 0.999


@pytest.mark.parametrize("channels", (4, 6, 8, 12, 28, 36, 100, 128))
def test_any_even_number_of_channels_makes_a_network(channels):
    x = torch.randn(1, 3, 16, 16)
    assert ddpm.UNet(3, channels, (1, 2, 3), 1)(x, torch.tensor([5])).shape == x.shape


@pytest.mark.parametrize(
    "make, steps",
    [(unet, 200), (linear_unet, 200), (simple, 200), slow(ddpm.ResNetUNet, 60)],
    ids=["unet", "linear", "simple", "resnet"],
)
def test_four_images_are_memorised(make, steps):
    """Only timestep and label say which one, and half of the input has to come through: one deaf to
    either misses by 0.5 (the spread of two images), one without connections past the bottom by
    0.25."""
    model, size = build(make, 1, 2).train(), 32 if make is ddpm.ResNetUNet else 16
    images = torch.rand(4, 1, 4, 4).round() * 2 - 1
    x = torch.randn(1, 1, size, size).expand(4, -1, -1, -1)
    target = F.interpolate(images, size=size) + 0.5 * x
    t, y = torch.tensor([100, 100, 900, 900]), torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(steps):
        loss = F.mse_loss(model(x, t, y), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


SCHEDULES, PREDICTIONS, LOSSES = (
    ddpm.FIELDS[name].metadata["choices"] for name in ("schedule", "predict", "loss")
)


def combinations():
    """All of them; by default of the large network only a few, among which each value is."""
    for i, schedule in enumerate(SCHEDULES):
        for j, predict in enumerate(PREDICTIONS):
            for k, loss in enumerate(LOSSES):
                for make in (unet, linear_unet, simple):
                    yield make, schedule, predict, loss
                few = j == i % 3 and k == (2 * i) % 3
                large = (ddpm.ResNetUNet, schedule, predict, loss)
                yield large if few else slow(*large)


@pytest.mark.parametrize("make, schedule, predict, loss", list(combinations()))
def test_any_combination_of_schedule_prediction_and_loss_learns(make, schedule, predict, loss):
    """A few steps on one batch at a fixed timestep lower its loss."""
    model, size = build(make, 1, 2).train(), 32 if make is ddpm.ResNetUNet else 16
    diffusion = ddpm.Diffusion(ddpm.make_betas(schedule, 50), predict, loss)
    x0, eps = (
        torch.rand(4, 1, 1, 1) * 2 - 1 + torch.zeros(4, 1, size, size),
        torch.randn(4, 1, size, size),
    )
    t, y = torch.tensor([5, 20, 30, 45]), torch.tensor([0, 1, -1, 0])
    optimizer, losses = torch.optim.Adam(model.parameters(), 3e-3), []
    for _ in range(4):
        losses.append(diffusion.loss(model, x0, t, eps, y).mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].isfinite() and losses[-1] < losses[0]


@pytest.mark.parametrize("arch", ("unet", "simple", "resnet18"))
def test_convolutions_get_their_weights_in_one_piece(arch):
    """MPS misreads some that are views (pytorch#192212)."""
    from torch.utils._python_dispatch import TorchDispatchMode

    pieces = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.overloadpacket is torch.ops.aten.convolution:
                pieces.append(args[1].is_contiguous())
            return func(*args, **(kwargs or {}))

    model = ddpm.build_model(ddpm.Config(arch=arch, image_size=32), 3, [])
    with Watch():
        model(torch.randn(2, 3, 32, 32), torch.tensor([0, 5]))
    assert len(pieces) > 5 and all(pieces)
