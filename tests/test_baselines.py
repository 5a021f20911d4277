"""Losses, constraints and networks of the baselines against closed forms, counts and the other scripts."""

import math

import pytest
import torch
from torch import nn

import gamn
import gram_net
from baselines import gan, wgan


def parameters(network):
    return sum(p.numel() for p in network.parameters())


LOGITS = torch.tensor([[0.5], [-2.0], [3.0]], dtype=torch.float64)


def log_sigmoid(a):
    return -math.log(1 + math.exp(-a))


@pytest.mark.parametrize("loss", ["minimax", "non-saturating", "boundary-seeking", "hinge"])
def test_losses_are_those_of_the_docstring(loss):
    real, fake = LOGITS, 1 - 2 * LOGITS
    a, b = real.flatten().tolist(), fake.flatten().tolist()
    c_loss = -sum(map(log_sigmoid, a)) / 3 - sum(log_sigmoid(-v) for v in b) / 3  # 1 - s(a) = s(-a)
    if loss == "hinge":
        c_loss = sum(max(0, 1 - v) for v in a) / 3 + sum(max(0, 1 + v) for v in b) / 3
    g_loss = {
        "minimax": sum(log_sigmoid(-v) for v in b) / 3,
        "non-saturating": -sum(map(log_sigmoid, b)) / 3,
        "boundary-seeking": sum(v * v for v in b) / 6,
        "hinge": -sum(b) / 3,
    }[loss]
    assert gan.critic_loss(real, fake, loss).item() == pytest.approx(c_loss, abs=1e-14)
    assert gan.generator_loss(fake, loss).item() == pytest.approx(g_loss, abs=1e-14)


def test_constraints_of_a_linear_critic():
    """f(x) = <w, x> has the gradient w everywhere; ||w|| = 3."""
    critic = nn.Linear(2, 1).double()
    critic.weight.data = torch.tensor([[1.8, -2.4]], dtype=torch.float64)
    real, fake = torch.randn(2, 5, 2, dtype=torch.float64)
    assert wgan.gradient_penalty(critic, real, fake).item() == pytest.approx((3 - 1) ** 2)
    omega = wgan.sobolev_norm(critic, real, fake)
    assert omega.item() == pytest.approx(9)
    expected = -0.25 * (1 - 9) + 0.5 / 2 * (9 - 1) ** 2
    assert wgan.lagrangian(omega, torch.tensor(0.25), 0.5).item() == pytest.approx(expected)


def test_the_multiplier_descends_its_own_gradient():
    """Of lambda (1 - Omega), by finite differences: it rises where the critic is too steep."""
    multiplier = wgan.Multiplier().double()
    omega, rho, h = torch.tensor(4.0, dtype=torch.float64), 0.1, 1e-6
    objective = lambda value: (value * (1 - omega)).item()  # noqa: E731
    gradient = (objective(h) - objective(-h)) / (2 * h)
    multiplier.update(omega, rho)
    assert multiplier.value.item() == pytest.approx(-rho * gradient)
    assert multiplier.value > 0


def test_a_gradient_of_zero_is_penalised_without_nan():
    critic = nn.Linear(2, 1)
    critic.weight.data.zero_()
    penalty = wgan.gradient_penalty(critic, torch.randn(4, 2), torch.randn(4, 2))
    penalty.backward()
    assert penalty.item() == 1
    assert critic.weight.grad.isfinite().all()


def test_sizes_of_the_networks():
    """SNDCGAN at 32 pixels by hand, layer by layer; rings: 2-100-100-1 and 2-100-100-2."""
    convolutions = [(3, 64, 3), (64, 128, 4), (128, 128, 3), (128, 256, 4), (256, 256, 3), (256, 512, 4)]
    convolutions.append((512, 512, 3))
    critic = sum(c_in * c_out * k * k + c_out for c_in, c_out, k in convolutions) + 512 * 16 + 1
    assert parameters(gan.Critic((3, 32, 32), 64, "sndcgan", False, "none")) == critic == 5_860_865
    generator = 129 * 512 * 16 + sum(c * (c // 2) * 16 + c for c in (512, 256, 128)) + 64 * 3 * 9 + 3
    assert parameters(gan.Generator((3, 32, 32), 128, 64, "sndcgan")) == generator == 3_811_907
    assert parameters(gan.Generator((2,), 2, 100, "sndcgan")) == 10_602
    assert parameters(gan.Critic((2,), 100, "sndcgan", False, "none")) == 10_501


@pytest.mark.parametrize("weak", [False, True])
def test_networks_of_the_gram_paper(weak):
    ours = gan.Generator((3, 32, 32), 128, 32, "gram"), gan.Critic((3, 32, 32), 32, "gram", weak, "none")
    theirs = gram_net.Generator((3, 32, 32), 128, 32), gram_net.Critic((3, 32, 32), 1, 32, weak)
    for a, b in zip(ours, theirs):
        assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]


@pytest.mark.parametrize("side", [28, 32, 64])
@pytest.mark.parametrize("constraint", ["clip", "gradient-penalty", "sobolev"])
def test_networks_of_wgan(side, constraint):
    """gamn.py's, but for the norms: batch norm with clip, else none below 64 pixels."""
    shape = (3, side, side)
    a, b = wgan.Critic(shape, 8, constraint), gamn.Critic(shape, 1, 8)
    weights = lambda network: [p.shape for p in network.parameters() if p.ndim > 1]  # noqa: E731
    assert weights(a) == weights(b)
    norms = [type(m) for m in a.modules() if isinstance(m, (nn.BatchNorm2d, nn.GroupNorm))]
    expected = nn.BatchNorm2d if constraint == "clip" else nn.GroupNorm
    count = 0 if constraint != "clip" and side < 64 else len(gamn.sides(side)) - 2
    assert norms == [expected] * count
    a, b = wgan.Generator(shape, 16, 8), gamn.Generator(shape, 16, 8)
    assert [p.shape for p in a.parameters()] == [p.shape for p in b.parameters()]


def test_spectral_norms_are_1():
    critic = gan.Critic((1, 8, 8), 4, "sndcgan", False, "pim")
    for _ in range(200):
        critic(torch.randn(2, 1, 8, 8))
    critic.eval()
    for layer in critic.layers:
        if hasattr(layer, "weight"):
            assert torch.linalg.matrix_norm(layer.weight.flatten(1), 2).item() == pytest.approx(1, abs=1e-3)
