"""gmmn.py against the paper: loss, auto-encoder, networks, bandwidths."""

import math

import pytest
import torch
from conftest import parameters

import gmmn as script


def test_generator_loss_is_the_root_of_the_biased_mmd():
    torch.manual_seed(0)
    x, y = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)

    def mean(a, b):
        return sum(
            math.exp(-((p - q) ** 2).sum().item() / (2 * s**2)) for p in a for q in b for s in (0.5, 2.0)
        ) / (len(a) * len(b))

    expected = math.sqrt(mean(x, x) - 2 * mean(x, y) + mean(y, y))
    loss = script.generator_loss(x, y, "rbf", (0.5, 2.0))
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_gradient_is_the_authors_closed_form():
    """(2 / sigma^2) (A X - diag(A 1) X) over 2 sqrt(V), with A = s s^T * K and s = 1/n, -1/m."""
    torch.manual_seed(1)
    x, y = torch.randn(6, 2, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    loss = script.generator_loss(x, y, "rbf", (1.3,))
    (gradient,) = torch.autograd.grad(loss, y)
    z = torch.cat([y.detach(), x])
    s = torch.cat([torch.full((5,), 1 / 5), torch.full((6,), -1 / 6)]).double()
    a = s[:, None] * s[None, :] * torch.exp(-((z[:, None] - z[None]) ** 2).sum(2) / (2 * 1.3**2))
    closed = 2 / 1.3**2 * (a @ z - a.sum(1)[:, None] * z) / (2 * math.sqrt(a.sum().item()))
    torch.testing.assert_close(gradient, closed[:5])


def test_published_bandwidths_are_variances():
    """exp(-d2 / (2 s)) over {2, 5, 10, 20, 40, 80}: MMD^2 of N(0, 1) and N(1, 1) is 0.435, not 0.179."""
    grid = torch.special.ndtri((torch.arange(2000, dtype=torch.float64) + 0.5) / 2000)[:, None]
    loss = script.generator_loss(grid, grid + 1, "rbf", script.DEFAULTS["images"]["bandwidths"])
    assert loss.item() ** 2 == pytest.approx(0.435, abs=1e-3)


def test_parameter_counts():
    assert parameters(script.Generator((1, 28, 28), 10, 1024, False)) == 1_149_904
    assert parameters(script.Generator((32,), 10, 1024, False)) == 379_104
    assert parameters(script.Autoencoder((1, 28, 28), 32, 1024)) == 1_674_032
    assert parameters(script.Generator((2,), 2, 512, True)) == 527_874


def test_initialisation():
    torch.manual_seed(0)
    layer = torch.nn.Linear(1024, 500)
    script.initialise(layer)
    assert layer.weight.std().item() == pytest.approx(1 / 32, rel=0.01)
    assert (layer.bias == 0).all()


def test_layer_loss_trains_one_layer_on_the_codes_below_it():
    torch.manual_seed(0)
    autoencoder, x = script.Autoencoder((1, 4, 4), 3, 8), torch.rand(5, 1, 4, 4)
    for dropout in autoencoder.dropouts:
        dropout.p = 0.0
    loss = script.layer_loss(autoencoder, x, 1)
    h = torch.sigmoid(x.flatten(1) @ autoencoder.encoders[0].weight.T)
    code = torch.sigmoid(h @ autoencoder.encoders[1].weight.T)
    p = torch.sigmoid(code @ autoencoder.decoders[1].weight.T)
    expected = -(h * p.log() + (1 - h) * (1 - p).log()).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    trained = {name for name, p in autoencoder.named_parameters() if p.grad is not None}
    assert trained == {"encoders.1.weight", "encoders.1.bias", "decoders.1.weight", "decoders.1.bias"}


def test_autoencoder_loss_and_its_dropout():
    torch.manual_seed(0)
    autoencoder, x = script.Autoencoder((1, 4, 4), 3, 8), torch.rand(5, 1, 4, 4)
    assert script.autoencoder_loss(autoencoder, x) != script.autoencoder_loss(autoencoder, x)
    for dropout in autoencoder.dropouts:
        dropout.p = 0.0
    y = autoencoder.decode(autoencoder.encode(x))
    expected = -(x * y.log() + (1 - x) * (1 - y).log()).sum((1, 2, 3)).mean()
    assert script.autoencoder_loss(autoencoder, x).item() == pytest.approx(expected.item(), rel=1e-5)
    autoencoder.eval()
    assert torch.equal(autoencoder.encode(x), autoencoder.encode(x))
