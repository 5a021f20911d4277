"""gamn.py against the paper: losses and their signs, regularisers, networks, Algorithm 1."""

import math
from pathlib import Path

import pytest
import torch
from conftest import parameters
from torch import nn
from torch.nn import functional as F

import gamn as script
from common import kernels


def norm_layers(module):
    return [m for m in module.modules() if isinstance(m, (nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d))]


# --- losses ----------------------------------------------------------------------------------------


def test_mapper_and_generator_losses():
    """Eqs. (7) to (10) with the sign that works: the mapper drives M up and its regulariser down."""
    mmd, reg, data_mmd = (torch.tensor(v, requires_grad=True) for v in (0.3, 2.0, 0.5))
    c_loss = script.critic_loss(mmd, reg, 0.1)
    g_loss = script.generator_loss(mmd, data_mmd, 0.25)
    assert c_loss.item() == pytest.approx(-0.3 + 0.2)
    assert g_loss.item() == pytest.approx(0.3 + 0.125)
    assert [g.item() for g in torch.autograd.grad(c_loss, (mmd, reg))] == pytest.approx([-1, 0.1])
    assert [g.item() for g in torch.autograd.grad(g_loss, (mmd, data_mmd))] == pytest.approx([1, 0.25])


# --- regularisers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [1.0, 0.5])
@pytest.mark.parametrize("shape", [(3,), (2, 4, 4)])
def test_gradient_penalty_of_a_linear_mapper(shape, target):
    """The gradient of the sum of outputs x W^T + b is the sum of the rows of W, for every sample."""
    mapper = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), 4))
    real, fake = torch.randn(5, *shape), torch.randn(5, *shape)
    expected = (math.sqrt(sum(v**2 for v in mapper[1].weight.sum(0).tolist())) - target) ** 2
    assert script.gradient_penalty(mapper, real, fake, target).item() == pytest.approx(expected, rel=1e-5)


def test_gradient_penalty_is_one_sample_at_a_time_and_between_the_samples():
    """F(t) = (t1^2, t2^2) / 2 has the gradient t itself: E (||t|| - 1)^2 over the segments, on average."""

    class Square(nn.Module):
        def forward(self, x):
            return x**2 / 2

    torch.manual_seed(0)
    real, fake = torch.tensor([[1.0, 0.0]]).repeat(4000, 1), torch.tensor([[3.0, 0.0]]).repeat(4000, 1)
    # t1 is uniform on [1, 3], each sample's own: the mean of (t1 - 1)^2 is 4 / 3.
    assert script.gradient_penalty(Square(), real, fake, 1.0).item() == pytest.approx(4 / 3, abs=0.06)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (1, 28, 28)])
def test_gradient_of_the_penalty_by_finite_differences(shape):
    """Double backward through layer norm and convolutions, in float64."""
    torch.manual_seed(1)
    mapper = script.Critic(shape, 3, 4).double()
    real, fake = torch.randn(3, *shape).double(), torch.randn(3, *shape).double()

    def penalty():
        torch.manual_seed(2)
        return script.gradient_penalty(mapper, real, fake, 1.0)

    norm = norm_layers(mapper)[0].weight
    (gradient,) = torch.autograd.grad(penalty(), norm)
    for i in range(2):
        with torch.no_grad():
            norm[i] += 1e-6
        above = penalty().item()
        with torch.no_grad():
            norm[i] -= 2e-6
        below = penalty().item()
        with torch.no_grad():
            norm[i] += 1e-6
        assert gradient[i].item() == pytest.approx((above - below) / 2e-6, rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 32, 32)])
def test_l1_and_l2_see_the_normalisation_alone(shape):
    mapper = script.Critic(shape, 3, 4)
    norms = norm_layers(mapper)
    assert norms
    for parameter in mapper.parameters():
        nn.init.normal_(parameter)
    values = [v for m in norms for p in (m.weight, m.bias) for v in p.flatten().tolist()]
    everything = [v for p in mapper.parameters() for v in p.flatten().tolist()]
    expected = {
        "l1": sum(map(abs, values)), "l2": sum(v * v for v in values),
        "weight-decay": sum(v * v for v in everything),
    }  # fmt: skip
    for name, value in expected.items():
        reg = script.regularization(mapper, None, None, script.Args(regularizer=name))
        assert reg.item() == pytest.approx(value, rel=1e-4)
        gradients = torch.autograd.grad(reg, list(mapper.parameters()), allow_unused=True)
        inside = {id(p) for m in norms for p in m.parameters()}
        for parameter, gradient in zip(mapper.parameters(), gradients):
            assert (gradient is not None) == (name == "weight-decay" or id(parameter) in inside)


# --- networks --------------------------------------------------------------------------------------


def test_parameter_counts_on_toys():
    """methods.md 3.2: three hidden layers of 512 and a linear one; the normalisation comes on top."""
    generator, mapper = script.Generator((2,), 2, 512), script.Critic((2,), 10, 512)
    assert parameters(generator) == 527_874
    assert parameters(mapper) - 3 * 2 * 512 == 531_978
    assert norm_layers(generator) == []
    assert [m.num_groups for m in norm_layers(mapper)] == [1] * 3


@pytest.mark.parametrize(
    ("shape", "width", "start", "channels"),
    [((1, 28, 28), 64, 4, (64, 128, 256)), ((3, 32, 32), 128, 4, (128, 256, 512)),
     ((3, 64, 64), 64, 4, (64, 128, 256, 512)),
     ((3, 48, 48), 64, 6, (64, 128, 256)), ((1, 8, 8), 32, 4, (32,))],
)  # fmt: skip
def test_networks_of_the_images(shape, width, start, channels):
    """methods.md 3.2: 5x5 kernels, dense 128 -> start^2 c, dense -> 10, all with biases; normed maps."""
    sizes = (shape[0], *channels)
    convs = sum(25 * i * o for i, o in zip(sizes, sizes[1:]))
    last = channels[-1] * start**2
    generator, mapper = script.Generator(shape, 128, width), script.Critic(shape, 10, width)
    first = last if shape[1] in (28, 32) else channels[-1]  # of the batch norm: each unit or each channel
    assert parameters(generator) == convs + 129 * last + sum(sizes[:-1]) + 2 * (first + sum(channels[:-1]))
    normed = channels[1:] or channels
    assert parameters(mapper) == convs + sum(channels) + 10 * last + 10 + 2 * sum(normed)
    fake = generator(torch.randn(3, 128))
    assert fake.shape == (3, *shape)
    assert fake.abs().max() <= 1
    assert mapper(fake).shape == (3, 10)
    maps = [m(torch.zeros(1, *shape)).shape[-1] for m in (mapper.layers[:-2],)]
    assert maps == [start]


@pytest.mark.parametrize(("side", "before", "after"), [(8, 1, 2), (28, 1, 2), (7, 2, 2), (14, 1, 2)])
def test_same_padding(side, before, after):
    """ceil(side / 2) outputs, 5x5 windows 2 apart; the total padding split with the larger part after."""
    half = -(-side // 2)
    total = (half - 1) * 2 + 5 - side
    assert (total // 2, total - total // 2) == (before, after)
    shape = (1, side, side) if side >= 7 else None
    mapper = script.Critic(shape, 3, 2)
    x = torch.randn(1, 1, side, side)
    conv = mapper.layers[1]
    padded = F.pad(x, (before, after, before, after))
    torch.testing.assert_close(conv(mapper.layers[0](x)), F.conv2d(padded, conv.weight, conv.bias, stride=2))
    assert conv(mapper.layers[0](x)).shape[-1] == half


@pytest.mark.parametrize("side", [8, 7])
def test_transposed_convolutions_are_the_adjoint_of_same_padding(side):
    torch.manual_seed(0)
    deconv = nn.Sequential(nn.ConvTranspose2d(2, 3, 5, 2, 1, bias=False), script.crop(side)).double()
    small = torch.randn(1, 2, 4, 4, dtype=torch.float64)
    large = torch.randn(1, 3, side, side, dtype=torch.float64)
    if side == 8:
        same = F.conv2d(F.pad(large, (1, 2, 1, 2)), deconv[0].weight, stride=2)
    else:  # 28x28's: made for 8x8, the last row and column then cut
        same = F.conv2d(F.pad(large, (1, 3, 1, 3)), deconv[0].weight, stride=2)
    assert (deconv(small) * large).sum().item() == pytest.approx((small * same).sum().item(), rel=1e-10)


def test_layer_norm_is_over_channels_and_places_of_one_sample():
    layer = norm_layers(script.Critic((1, 28, 28), 3, 4))[0]
    x = torch.randn(2, 8, 7, 7)
    torch.testing.assert_close(layer(x), F.layer_norm(x, x.shape[1:]), rtol=1e-4, atol=1e-5)


def test_the_mapper_of_toys_sees_how_far_a_point_is():
    """With zero biases layer norm makes F(2x) = F(x), and the generator learns directions only."""
    torch.manual_seed(0)
    mapper, x = script.Critic((2,), 10, 512), torch.randn(64, 2)
    assert (mapper(2 * x) - mapper(x)).norm() > 0.05 * (mapper(-x) - mapper(x)).norm()


def test_initialisation_on_toys():
    torch.manual_seed(0)
    hidden1, hidden2, hidden3, last = (
        m.weight for m in script.Critic((2,), 10, 512).modules() if isinstance(m, nn.Linear)
    )
    for weight, bound in ((hidden1, 3**0.5), (hidden2, (6 / 512) ** 0.5), (hidden3, (6 / 512) ** 0.5)):
        assert weight.abs().max().item() == pytest.approx(bound, rel=0.02)  # He, uniform
    assert last.abs().max().item() == pytest.approx((6 / 522) ** 0.5, rel=0.02)  # Glorot


def test_initialisation_of_images():
    """Uniform: 0.02 sqrt(3) at 64 pixels; at 28 and 32 Glorot's of dense layers, and of convolutions
    sqrt(3) sqrt(4 / (fan_in + fan_out)) with a stride of 2, so that a quarter of the windows has an input."""
    torch.manual_seed(0)
    up = [(12 / (25 * (i / 4 + o))) ** 0.5 for i, o in ((512, 256), (256, 128), (128, 3))]
    down = [(12 / (25 * (i + o / 4))) ** 0.5 for i, o in ((3, 128), (128, 256), (256, 512))]
    wanted = {
        (3, 32, 32): [[(6 / (128 + 8192)) ** 0.5, *up], [*down, (6 / (8192 + 10)) ** 0.5]],
        (3, 64, 64): [[0.02 * 3**0.5] * 5] * 2,
        (1, 8, 8): [[0.02 * 3**0.5] * 2] * 2,
    }
    for shape, (of_generator, of_mapper) in wanted.items():
        width = 128 if shape[1] == 32 else 64
        networks = script.Generator(shape, 128, width), script.Critic(shape, 10, width)
        for network, bounds in zip(networks, (of_generator, of_mapper)):
            layers = [
                m for m in network.modules() if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
            ]
            for layer, bound in zip(layers, bounds, strict=True):
                assert layer.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
                assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)
                assert not layer.bias.any()


def test_adams_first_moment_is_0_at_64_pixels():
    sets = (
        "celeba",
        "lsun-bedroom",
        "imagenet",
        "cifar10",
        "stl10",
        "mnist",
        "fashion-mnist",
        "digits",
        "swissroll",
    )
    found = {name: script.resolve(script.Args(dataset=name)).beta1 for name in sets}
    assert found == {name: 0.0 if name in sets[:3] else 0.5 for name in sets}


# --- training --------------------------------------------------------------------------------------


def train(tmp_path, **kwargs):
    values = dict(dataset="8gaussians", total_steps=3, batch_size=16, width=8, eval_every=0)
    return script.train(script.Args(runs_dir=str(tmp_path), **{**values, **kwargs}))


def state(tmp_path):
    (path,) = tmp_path.glob("*/checkpoint.pt")
    return torch.load(path, weights_only=True)


VARIANTS = [
    {}, dict(regularizer="l1"), dict(regularizer="l2"), dict(regularizer="weight-decay"), dict(feature_dim=2),
    dict(data_mmd_weight=1.0), dict(n_generator=2, n_critic=2), dict(gp_target=0.5), dict(kernel="rq"),
    dict(kernel="laplacian"), dict(bandwidths=(2.0,)), dict(ema_decay=0.9),
]  # fmt: skip


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("dataset", ["digits", "swissroll"])
def test_variants_run(tmp_path, dataset, kwargs):
    assert train(tmp_path, dataset=dataset, **{"n_critic": 1, **kwargs}) == {}
    assert state(tmp_path)["step"] == 3


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_mmd_of_samples_is_logged_where_it_is_minimised(tmp_path, weight):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(tmp_path, data_mmd_weight=weight, log_every=1)
    (folder,) = tmp_path.iterdir()
    curves = EventAccumulator(str(folder)).Reload()
    assert ("losses/data_mmd" in curves.Tags()["scalars"]) == (weight > 0)
    if weight:
        losses = {
            name: curves.Scalars(f"losses/{name}")[-1].value for name in ("generator", "mmd", "data_mmd")
        }
        assert losses["data_mmd"] > 0
        assert losses["generator"] == pytest.approx(losses["mmd"] + weight * losses["data_mmd"], rel=1e-5)


@pytest.mark.parametrize(
    ("kwargs", "weight"),
    [({}, 1.0), (dict(dataset="digits"), 10.0), (dict(regularizer="l1"), 1e-3),
     (dict(regularizer="l2"), 1e-3), (dict(regularizer="weight-decay"), 1e-3), (dict(lambda_reg=0.0), 0.0)],
)  # fmt: skip
def test_default_weights(tmp_path, kwargs, weight):
    train(tmp_path, total_steps=1, n_critic=1, **kwargs)
    assert state(tmp_path)["args"]["lambda_reg"] == weight


def test_schedule_is_algorithm_1():
    for n_critic, n_generator in ((5, 1), (2, 3), (1, 4)):
        args = script.Args(n_critic=n_critic, n_generator=n_generator)
        counts = [script.critic_steps(step, args) for step in range(1, 25)]
        assert counts == ([n_critic] + [0] * (n_generator - 1)) * (24 // n_generator)


def test_mapper_alone_parts_real_from_fake():
    """On its own loss M rises and the penalty falls; with the sign that the paper prints it would rise."""
    torch.manual_seed(0)
    real, fake = torch.randn(32, 2), torch.randn(32, 2) * 0.5 + 1
    mapper, args = script.Critic((2,), 4, 32), script.Args()
    optimiser = torch.optim.Adam(mapper.parameters(), 1e-2)
    first = None
    for _ in range(60):
        mmd = kernels.sqrt_mmd(*kernels.gram_blocks(mapper(real), mapper(fake), "rbf", (1.0, 2.0)))
        reg = script.regularization(mapper, real, fake, args)
        first = first or (mmd.item(), reg.item())
        optimiser.zero_grad()
        script.critic_loss(mmd, reg, 1.0).backward()
        optimiser.step()
    assert mmd > first[0]
    assert reg < first[1]


def test_what_the_paper_leaves_open_is_said_in_the_help():
    """[P] gives Adam, batch sizes, d and the regularisers; every other argument of the method says so."""
    lines = Path(script.__file__).read_text().split("    # --- method ---\n")[1].split("\n\n")[0].splitlines()
    given = {"kernel", "regularizer", "feature_dim", "gp_target"}
    fields = [line.split(":")[0].strip() for line in lines]
    assert [f for f, line in zip(fields, lines) if "not given in the paper" not in line] == [
        f for f in fields if f in given
    ]
