"""gmmn.py against the paper: loss, auto-encoder, networks, bandwidths."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from conftest import parameters
from test_scripts import train

import gmmn as script
from common import datasets


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


# --- the auto-encoder ------------------------------------------------------------------------------


def test_layer_loss_trains_one_layer_on_the_codes_below_it(monkeypatch):
    monkeypatch.setattr(script, "AE_DROPOUT", (0.0, 0.0))
    torch.manual_seed(0)
    autoencoder, x = script.Autoencoder((1, 4, 4), 3, 8), torch.rand(5, 1, 4, 4)
    loss = script.layer_loss(autoencoder, x, 1)
    h = torch.sigmoid(x.flatten(1) @ autoencoder.encoders[0].weight.T)
    code = torch.sigmoid(h @ autoencoder.encoders[1].weight.T)
    p = torch.sigmoid(code @ autoencoder.decoders[1].weight.T)
    expected = -(h * p.log() + (1 - h) * (1 - p).log()).sum(1).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    loss.backward()
    trained = {name for name, p in autoencoder.named_parameters() if p.grad is not None}
    assert trained == {"encoders.1.weight", "encoders.1.bias", "decoders.1.weight", "decoders.1.bias"}


def test_autoencoder_loss_is_the_cross_entropy_of_the_reconstruction(monkeypatch):
    monkeypatch.setattr(script, "AE_DROPOUT", (0.0, 0.0))
    torch.manual_seed(0)
    autoencoder, x = script.Autoencoder((1, 4, 4), 3, 8), torch.rand(5, 1, 4, 4)
    y = autoencoder.decode(autoencoder.encode(x))
    expected = -(x * y.log() + (1 - x) * (1 - y).log()).sum((1, 2, 3)).mean()
    assert script.autoencoder_loss(autoencoder, x).item() == pytest.approx(expected.item(), rel=1e-5)


def test_dropout_masks_and_leaves_the_others_as_they_are():
    """Inputs of 1 and weights of 1: the activation counts what is left, 0.8 and 0.5 of it in the mean."""
    torch.manual_seed(0)
    autoencoder = script.Autoencoder((1000,), 2, 1000)
    for layer, kept in enumerate((0.8, 0.5)):
        torch.nn.init.constant_(autoencoder.encoders[layer].weight, 1e-3)
        x = torch.ones(64, 1000)
        activation = autoencoder.encode_layer(x, layer, "mask").logit()
        assert activation.mean().item() == pytest.approx(kept, abs=0.01)
        assert activation.std() > 0.01
        assert autoencoder.encode_layer(x, layer, "off").logit().mean().item() == pytest.approx(1, rel=1e-5)
        divided = autoencoder.encode_layer(x, layer, "divide").logit().mean().item()
        assert divided == pytest.approx(1 / kept, rel=1e-5)


# --- the authors' training of it, in NumPy ---------------------------------------------------------
# A network is a list of sigmoid layers [W (inputs, outputs), b], masks are of each layer's input.


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def loss_and_gradients(layers, x, masks):
    """The cross-entropy of x and its reconstruction, mean over rows, and its gradient by each W and b."""
    hidden, inputs = [x], []
    for (w, b), mask in zip(layers, masks):
        inputs.append(hidden[-1] * mask)
        hidden.append(sigmoid(inputs[-1] @ w + b))
    y = hidden[-1]
    loss = -(x * np.log(y) + (1 - x) * np.log(1 - y)).sum() / len(x)
    gradients = [None] * len(layers)
    slope = (y - x) / len(x)  # of the loss, by the last activation
    for i in reversed(range(len(layers))):
        gradients[i] = [inputs[i].T @ slope, slope.sum(0)]
        slope = (slope @ layers[i][0].T) * masks[i] * hidden[i] * (1 - hidden[i])
    return loss, gradients


def looked_at(layers, rates, x):
    """The loss of all of x without noise, for which weights and biases are divided by 1 - p."""
    divided = [[w / (1 - p), b / (1 - p)] for (w, b), p in zip(layers, rates)]
    return loss_and_gradients(divided, x, [1.0] * len(layers))[0]


def descend(layers, rates, x, batches, masks, momentum):
    """Iterations 1, 2, ...; after every hundredth the loss of x is looked at, and before the first.

    Return the weights of the lowest, all weights after each iteration, and the losses.
    """
    velocity = [[0 * w, 0 * b] for w, b in layers]
    lowest, best, seen, losses = looked_at(layers, rates, x), copy.deepcopy(layers), [], []
    for iteration in range(1, len(batches) + 1):
        loss, gradients = loss_and_gradients(layers, batches[iteration - 1], masks[iteration - 1])
        norm = np.sqrt(sum((g**2).sum() for layer in gradients for g in layer))
        for layer, v, gradient in zip(layers, velocity, gradients):
            for k in range(2):
                v[k] = momentum(iteration) * v[k] - 0.1 * min(1, 10 / norm) * gradient[k]
                layer[k] = layer[k] + v[k]
        losses.append(loss)
        seen.append(copy.deepcopy(layers))
        if iteration % 100 == 0 and looked_at(layers, rates, x) < lowest:
            lowest, best = looked_at(layers, rates, x), copy.deepcopy(layers)
    return best, seen, losses


def test_the_auto_encoder_is_trained_as_the_authors_do(monkeypatch):
    """Every weight after every update, and every loss, in float64, of three parts of 300 updates.

    In the second half of each part the batches are negatives: the loss of the images rises, and the part has
    to end with the weights that it had after 100 updates.
    """
    steps, drop = 300, script.AE_DROPOUT
    assert drop == (0.2, 0.5)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        autoencoder = script.Autoencoder((1, 3, 4), 3, 8)
        best = copy.deepcopy(autoencoder)
        enc, dec = (
            [[m.weight.detach().T.clone().numpy(), m.bias.detach().clone().numpy()] for m in part]
            for part in (autoencoder.encoders, autoencoder.decoders)
        )
        optimizer = script.Momentum(autoencoder.parameters(), script.AE_RATE, 0.0)
        images = (torch.rand(20, 1, 3, 4) ** 3 * 255).round().to(torch.uint8)
        data = datasets.Images("digits", (1, 3, 4), 10, 1, 0, 1, torch.device("cpu"), images, (0.0, 1.0))
        x = images.flatten(1).double().numpy() / 255
        batches = []
        for iteration in range(1, steps + 1):
            batch = x[np.arange(10) + iteration % 11]
            batches.append(batch if iteration <= steps // 2 else 1 - batch)
        drawn, rand = [], torch.rand

        def recorded(*shape, device):
            drawn.append(rand(*shape))
            return drawn[-1]

        monkeypatch.setattr(torch, "rand", recorded)
        ours, losses = [], []
        for update in range(1, 3 * steps + 1):
            real = torch.from_numpy(batches[(update - 1) % steps]).view(-1, 1, 3, 4)
            loss = script.update_autoencoder(autoencoder, best, optimizer, data, real, update, steps)
            losses.append(loss.item())
            ours.append(copy.deepcopy(autoencoder.state_dict()))
    finally:
        torch.set_default_dtype(torch.float32)

    def same(kind, layer, state, weights):
        np.testing.assert_allclose(state[f"{kind}s.{layer}.weight"].numpy().T, weights[0], rtol=1e-9)
        np.testing.assert_allclose(state[f"{kind}s.{layer}.bias"].numpy(), weights[1], rtol=1e-9, atol=1e-12)

    kept = [[(u.numpy() > p) for u in drawn[i * steps : (i + 1) * steps]] for i, p in enumerate(drop)]
    both = [
        (u.numpy() > drop[0], v.numpy() > drop[1])
        for u, v in zip(drawn[2 * steps :: 2], drawn[2 * steps + 1 :: 2])
    ]
    codes = lambda rows: sigmoid(rows @ enc[0][0] + enc[0][1])  # noqa: E731, without noise
    for part in range(2):
        targets = [x, *batches] if part == 0 else [codes(rows) for rows in (x, *batches)]
        masks = [(mask, 1.0) for mask in kept[part]]
        layers, rates = [enc[part], dec[part]], (drop[part], 0)
        found, seen, wanted = descend(layers, rates, targets[0], targets[1:], masks, lambda i: 0.5)
        for i in range(steps - 1):
            same("encoder", part, ours[part * steps + i], seen[i][0])
            same("decoder", part, ours[part * steps + i], seen[i][1])
        np.testing.assert_allclose(losses[part * steps : (part + 1) * steps], wanted, rtol=1e-9)
        assert not np.allclose(found[0][0], seen[-1][0][0])
        enc[part] = [w / (1 - drop[part]) for w in found[0]]
        dec[part] = found[1]
        same("encoder", part, ours[(part + 1) * steps - 1], enc[part])
        same("decoder", part, ours[(part + 1) * steps - 1], dec[part])

    def momentum(iteration):
        return 0 if iteration < 50 else 0.5 if iteration < 200 else 0.9

    masks = [(*mask, 1.0, 1.0) for mask in both]
    found, seen, wanted = descend([*enc, dec[1], dec[0]], (*drop, 0, 0), x, batches, masks, momentum)
    seen[-1] = found
    for i in range(steps):
        for (kind, layer), weights in zip(
            (("encoder", 0), ("encoder", 1), ("decoder", 1), ("decoder", 0)), seen[i]
        ):
            same(kind, layer, ours[2 * steps + i], weights)
    np.testing.assert_allclose(losses[2 * steps :], wanted, rtol=1e-9)
    codes = sigmoid(sigmoid(x @ found[0][0] + found[0][1]) @ found[1][0] + found[1][1])
    encoded = autoencoder.encode(torch.from_numpy(x))
    np.testing.assert_allclose(encoded.detach().numpy(), codes, rtol=1e-9)


# --- Parzen windows --------------------------------------------------------------------------------


def test_log_likelihoods_are_those_of_scikit_learn():
    from sklearn.neighbors import KernelDensity

    rng = np.random.RandomState(0)
    samples, x = rng.rand(301, 6), rng.rand(1203, 6)
    found = script.log_likelihoods(torch.from_numpy(x), torch.from_numpy(samples), (0.1, 0.25))
    for sigma, values in zip((0.1, 0.25), found):
        wanted = KernelDensity(bandwidth=sigma, rtol=1e-12).fit(samples).score_samples(x)
        np.testing.assert_allclose(values.numpy(), wanted, rtol=1e-8)


def test_log_likelihoods_of_what_is_far_away_are_finite_and_right():
    """784 dimensions, as MNIST: exp(-d2 / (2 s^2)) alone is 0 there, even in float64."""
    x, samples = torch.zeros(2, 784), torch.full((3, 784), 0.9)
    expected = -784 * 0.81 / (2 * 0.1**2) - 392 * math.log(2 * math.pi * 0.1**2)
    found = script.log_likelihoods(x, samples.double(), (0.1,))
    assert found.dtype == torch.float64
    assert found.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-6)


def test_parzen_chooses_the_width_on_the_held_out_images_and_scores_the_others(monkeypatch):
    from scipy.stats import norm

    rng = np.random.RandomState(1)
    held_out, test = rng.randint(256, size=(30, 5)), rng.randint(100, 256, size=(20, 5))
    windows = rng.rand(4, 20, 5)  # chunks, of which the first two are for the choice
    monkeypatch.setattr(script, "PARZEN_SAMPLES", 2000)

    def scores(x, centres, sigma):  # a double loop
        return [np.log(np.mean([norm.pdf(row / 255, y, sigma).prod() for y in centres])) for row in x]

    sigmas = [0.1 + 0.01 * i for i in range(20)]
    means = [np.mean(scores(held_out, windows[:2].reshape(40, 5), sigma)) for sigma in sigmas]
    best = int(np.argmax(means))
    assert 0 < best < 19
    wanted = scores(test, windows[2:].reshape(40, 5), sigmas[best])

    def sample(n, i):
        assert n == 1000
        return torch.from_numpy(windows[i]).view(20, 1, 1, 5)

    images = (torch.from_numpy(x).view(-1, 1, 1, 5).to(torch.uint8) for x in (held_out, test))
    assert script.parzen(*images, sample) == {
        "parzen": pytest.approx(np.mean(wanted), rel=1e-9),
        "parzen_se": pytest.approx(np.std(wanted) / 20**0.5, rel=1e-9),
        "parzen_sigma": pytest.approx(sigmas[best]),
        "parzen_held_out": pytest.approx(means[best], rel=1e-9),
    }


def test_5000_images_of_mnist_are_held_out():
    numbers = torch.arange(60_000).view(-1, 1, 1, 1)  # in the place of images
    data = datasets.Images("mnist", (1, 1, 1), 1000, 1, 0, 1, torch.device("cpu"), numbers, (0.0, 1.0))
    rest, held_out = script.hold_out(data)
    np.random.seed(0)  # as dataio/mnist.py of the authors
    order = np.random.permutation(60_000)
    assert held_out.flatten().tolist() == order[:5000].tolist()
    assert rest.images.flatten().tolist() == order[5000:].tolist()
    epoch = torch.cat([rest.batch(i) for i in range(55)])
    assert sorted((epoch.flatten() * 255).round().long().tolist()) == sorted(order[5000:].tolist())


def test_a_finished_run_is_scored_without_training(tmp_path, monkeypatch):
    seed = torch.Generator().manual_seed(0)
    images = {
        split: torch.randint(256, (n, 1, 8, 8), generator=seed, dtype=torch.uint8)
        for split, n in (("train", 50), ("test", 12))
    }
    monkeypatch.setattr(datasets, "load_images", lambda name, folder, size, split: images[split])
    monkeypatch.setattr(script, "HELD_OUT", 10)
    monkeypatch.setattr(script, "PARZEN_SAMPLES", 1000)
    short = "--total-steps", "1", "--eval-every", "0"
    folder = train("gmmn", "--dataset", "mnist", "--image-size", "8", *short, runs=tmp_path)
    weights = (folder / "checkpoint.pt").read_bytes()
    train("gmmn", "--resume", str(folder), "--eval-only", "--parzen", runs=tmp_path)
    assert (folder / "checkpoint.pt").read_bytes() == weights
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"]["parzen_sigma"] in script.PARZEN_SIGMAS
    assert {"parzen", "parzen_se", "parzen_held_out", "pixel_frechet"} <= results["metrics"].keys()
    assert results["protocol"]["parzen"] == script.PARZEN_PROTOCOL
    samples = torch.from_numpy(np.load(folder / "samples.npz")["samples"])
    assert samples.dtype == torch.uint8  # written beside
