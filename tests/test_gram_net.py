"""gram_net.py against the paper: density ratio, divergence, both games, networks, pictures."""

import math

import numpy as np
import pytest
import torch
from conftest import parameters
from torch import nn

import gram_net as script
from common import datasets, kernels

FAST = dict(total_steps=3, batch_size=8, width=8, eval_every=0, log_every=1, sample_every=0)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(n=12, d=3, seed=0):
    return randn(n, d, seed=seed), randn(n, d, seed=seed + 100) * 0.8 + 0.5


def gram(a, b, sigma):
    """k(a_i, b_j) = exp(-|a_i - b_j|^2 / (2 sigma^2)) from explicit differences."""
    return torch.exp(-(a[:, None] - b[None]).square().sum(-1) / (2 * sigma**2))


def literal_ratio(de, nu, bandwidths, ridge):
    """Eq. (8) with an explicit inverse, averaged over the bandwidths."""
    total = torch.zeros(len(de), dtype=torch.float64)
    for s in bandwidths:
        inverse = torch.linalg.inv(gram(de, de, s) + ridge * torch.eye(len(de), dtype=torch.float64))
        total += len(de) / len(nu) * (inverse @ gram(de, nu, s) @ torch.ones(len(nu), dtype=torch.float64))
    return total / len(bandwidths)


def literal_mmd2(x, y, bandwidths):
    """Eq. (10): all pairs, the diagonals too."""
    return sum(
        (gram(x, x, s).sum() / len(x) ** 2).item()
        - 2 * (gram(x, y, s).sum() / (len(x) * len(y))).item()
        + (gram(y, y, s).sum() / len(y) ** 2).item()
        for s in bandwidths
    )


def run_losses(x, y, **kwargs):
    return script.losses(x, y, script.Args(**{"bandwidths": (1.0,), **kwargs}))


def ratio_of(x, y, ridge, sigma=1.0):
    """The estimate of p/q at the points y ~ q (n, d), for x ~ p, as the script makes it."""
    _, k_xy, k_yy = kernels.gram_blocks(x, y, "rbf", (sigma,))
    return script.density_ratio(k_yy, k_xy.T, ridge)


# --- the ratio -------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_nu", [9, 14])
def test_ratio_is_equation_8_for_unequal_sizes_and_batches_of_kernels(n_nu):
    de, nu = randn(9, 2), randn(n_nu, 2, seed=1)
    k_de = torch.stack([gram(de, de, s) for s in (0.5, 2.0)])
    k_de_nu = torch.stack([gram(de, nu, s) for s in (0.5, 2.0)])
    ratio = script.density_ratio(k_de, k_de_nu, 1e-2)
    assert ratio.shape == (2, 9)
    for r, s in zip(ratio, (0.5, 2.0)):
        torch.testing.assert_close(r, literal_ratio(de, nu, (s,), 1e-2), rtol=1e-9, atol=1e-9)


def test_ratio_of_identical_sets_is_one():
    """methods.md 12.6, 200 points in two dimensions: mean 0.99996, range 0.9966 to 1.0029."""
    x = randn(200, 2)
    ratio = ratio_of(x, x, 1e-3)
    assert ratio.mean().item() == pytest.approx(1, abs=2e-4)
    assert ratio.min() > 0.99
    assert ratio.max() < 1.01


@pytest.mark.parametrize("bandwidths", [(1.0,), (0.5, 1.0, 2.0, 4.0)])
def test_equal_samples_have_mean_ratio_one_for_any_number_of_bandwidths(bandwidths):
    """D-GRAM-6: with a sum over 4 bandwidths in the place of the mean, the divergence would be about 9."""
    x = randn(100, 2)
    for as_coded in (None, "julia", "notebook"):
        c_loss, g_loss, logged = run_losses(x, x.clone(), bandwidths=bandwidths, as_coded=as_coded)
        assert logged["losses/pearson_divergence"].item() == pytest.approx(0, abs=1e-3)
        assert c_loss.item() == pytest.approx(-1 if as_coded == "notebook" else -100, rel=1e-3)
        assert g_loss.item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(("mu", "divergence"), [(0.5, 0.2840), (1.0, 1.7183)])
def test_ratio_and_divergence_of_two_gaussians(mu, divergence):
    """methods.md 12.6, N = 1000 and ridge 0.1: r(x) = exp(mu x - mu^2 / 2), divergence exp(mu^2) - 1."""
    assert math.expm1(mu**2) == pytest.approx(divergence, abs=1e-4)
    estimates, means, correlations = [], [], []
    for seed in range(3):
        y, x = randn(1000, 1, seed=seed), randn(1000, 1, seed=seed + 50) + mu
        ratio = ratio_of(x, y, 0.1)
        true = (mu * y[:, 0] - mu**2 / 2).exp()
        means.append(ratio.mean())
        estimates.append(script.pearson_divergence(ratio))
        correlations.append(torch.corrcoef(torch.stack([ratio, true]))[0, 1])
    mean = lambda values: torch.stack(values).mean().item()  # noqa: E731
    assert mean(means) == pytest.approx(1, abs=0.02)
    assert mean(estimates) == pytest.approx(divergence, rel=0.3)
    assert mean(correlations) > 0.85


def test_singular_gram_matrix_needs_the_ridge_and_float64():
    """T-11: 200 points in one dimension. The script's solve from float32 features is that of float64."""
    x = randn(200, 1)
    k = gram(x, x, 1.0)
    assert torch.linalg.cond(k) > 1e15
    assert torch.linalg.cond(k + 1e-3 * torch.eye(200)) == pytest.approx(1.2e5, rel=0.5)
    ridged = script.density_ratio(k.float(), k.float(), 1e-3)  # of a float32 matrix, solved in float64
    assert ridged.dtype == torch.float64
    assert (ridged - 1).abs().max() < 0.01
    bare = torch.linalg.solve(k.float(), k.float().sum(1))
    assert (bare - 1).abs().max() > 1  # what the ridge and float64 are for
    single = x.float(), x.float() * 1.1  # features as networks give them: all that follows is float64
    for got, expected in zip(run_losses(*single), run_losses(*(part.double() for part in single))):
        if isinstance(got, torch.Tensor):
            assert got.item() == pytest.approx(expected.item(), rel=1e-9)


def test_far_features_make_an_identity_and_a_useless_ratio():
    """T-10: in 128 dimensions d2 is about 256, the Gram matrix the identity and the ratio zero: PD is 1."""
    x, y = randn(64, 128), randn(64, 128, seed=1)
    _, _, k_yy = kernels.gram_blocks(x, y, "rbf", (1.0,))
    assert (k_yy - torch.eye(64)).abs().max() < 1e-20
    assert torch.linalg.cond(k_yy) == pytest.approx(1)
    assert ratio_of(x, y, 1e-3).abs().max() < 1e-20
    x.requires_grad_(True)
    c_loss, _, logged = run_losses(x, y)
    assert logged["losses/pearson_divergence"].item() == pytest.approx(1)
    assert torch.autograd.grad(c_loss, x)[0].abs().max() < 1e-20
    assert ratio_of(x.detach(), y, 1e-3, sigma=16).mean().item() == pytest.approx(1, abs=0.2)  # one that fits


def test_singular_matrix_without_ridge_gives_no_exception():
    ratio = script.density_ratio(torch.ones(3, 3), torch.ones(3, 3), 0.0)
    assert not ratio.isfinite().all()  # so that run.Finite says which loss, and when


# --- losses ----------------------------------------------------------------------------------------

BANDWIDTHS = (0.5, 1.0, 3.0)


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_losses_are_equations_9_and_10(weight):
    x, y = features()
    c_loss, g_loss, logged = run_losses(x, y, bandwidths=BANDWIDTHS, positivity_weight=weight, ridge=1e-2)
    r = literal_ratio(y, x, BANDWIDTHS, 1e-2)  # p/q at y: the denominator's points are the generated ones
    divergence = sum((v - 1) ** 2 for v in r.tolist()) / 12
    assert c_loss.item() == pytest.approx(-divergence - weight * sum(r.tolist()), rel=1e-9)
    assert g_loss.item() == pytest.approx(literal_mmd2(x, y, BANDWIDTHS), rel=1e-9)
    assert logged["losses/pearson_divergence"].item() == pytest.approx(divergence, rel=1e-9)
    assert logged["losses/mmd2"].item() == pytest.approx(g_loss.item())
    mean = sum(gram(x, y, s) for s in BANDWIDTHS).mean().item()
    assert logged["kernel/k_xy"].item() == pytest.approx(mean)


def test_clipping_leaves_negative_ratios_and_the_sum_out():
    ratio = torch.tensor([-2.0, 0.5, 3.0], dtype=torch.float64, requires_grad=True)
    loss = script.critic_loss(ratio, "clip", 1.0)
    assert loss.item() == pytest.approx(-(1 + 0.25 + 4) / 3)
    assert torch.autograd.grad(loss, ratio)[0].tolist() == pytest.approx([0, 1 / 3, -4 / 3])
    loss = script.critic_loss(ratio, "sum", 2.0)
    assert loss.item() == pytest.approx(-(9 + 0.25 + 4) / 3 - 2 * 1.5)
    assert torch.autograd.grad(loss, ratio)[0].tolist() == pytest.approx([2 - 2, 1 / 3 - 2, -4 / 3 - 2])
    x, y = features(seed=3)
    r = literal_ratio(y, x, (1.0,), 1e-3)
    assert (r < 0).any()
    expected = -sum((max(v, 0) - 1) ** 2 for v in r.tolist()) / 12
    assert run_losses(x, y, positivity="clip")[0].item() == pytest.approx(expected, rel=1e-7)


def test_as_coded_notebook_is_the_notebooks_game():
    x, y = features()
    c_loss, g_loss, logged = run_losses(x, y, bandwidths=BANDWIDTHS, ridge=1e-2, as_coded="notebook")
    r = literal_ratio(x, y, BANDWIDTHS, 1e-2)  # q/p at x
    assert c_loss.item() == pytest.approx(-r.mean().item(), rel=1e-9)
    assert g_loss.item() == pytest.approx(literal_mmd2(x, y, BANDWIDTHS) ** 0.5, rel=1e-9)
    assert logged["losses/mmd2"].item() == pytest.approx(g_loss.item() ** 2)


@pytest.mark.parametrize("positivity", ["sum", "clip"])
def test_as_coded_julia_has_the_papers_critic_and_the_root_of_the_papers_mmd2(positivity):
    """Their gradients too: that of the root is that of MMD^2 over twice the root."""
    x, y = features()
    y.requires_grad_(True)
    options = dict(bandwidths=BANDWIDTHS, ridge=1e-2, positivity=positivity)
    paper_critic, mmd2, _ = run_losses(x, y, **options)
    c_loss, g_loss, _ = run_losses(x, y, **options, as_coded="julia")
    assert c_loss.item() == paper_critic.item()
    assert g_loss.item() == pytest.approx(literal_mmd2(x, y.detach(), BANDWIDTHS) ** 0.5, rel=1e-9)
    (of_root,) = torch.autograd.grad(g_loss, y)
    (of_square,) = torch.autograd.grad(mmd2, y)
    torch.testing.assert_close(of_root * 2 * g_loss.item(), of_square)


def test_second_moment_of_adam_is_that_of_each_code():
    """JuliaGRAM writes 999f-4; what is given counts."""
    resolve = lambda **kwargs: script.resolve(script.Args(**kwargs)).beta2  # noqa: E731
    assert (resolve(), resolve(as_coded="notebook"), resolve(dataset="ring2d")) == (0.999, 0.999, 0.999)
    assert (resolve(as_coded="julia"), resolve(dataset="ring2d", as_coded="julia")) == (0.0999, 0.0999)
    assert resolve(as_coded="julia", beta2=0.9) == 0.9


@pytest.mark.parametrize(
    "kwargs", [{}, {"positivity": "clip"}, {"as_coded": "notebook"}, {"as_coded": "julia"}], ids=str
)
def test_gradients_are_those_of_finite_differences(kwargs):
    x, y = features(n=6, d=2, seed=5)
    inputs = x.requires_grad_(True), y.requires_grad_(True)
    options = {"bandwidths": (0.7, 1.5), "ridge": 1e-2, **kwargs}
    assert torch.autograd.gradcheck(lambda a, b: run_losses(a, b, **options)[:2], inputs, rtol=1e-4)


def test_gradients_with_the_default_ridge_in_the_ill_conditioned_regime():
    """Features in float32, close together: the gradient of float64 finite differences within a percent."""
    x, y = randn(30, 1) * 0.5, randn(30, 1, seed=1) * 0.5 + 0.2
    single = y.float().requires_grad_(True)
    (gradient,) = torch.autograd.grad(run_losses(x.float(), single)[0], single)
    y = single.detach().double()
    for i in (0, 7, 29):
        step = torch.zeros_like(y)
        step[i] = 1e-6
        x64 = x.float().double()
        difference = (run_losses(x64, y + step)[0] - run_losses(x64, y - step)[0]) / 2e-6
        assert gradient[i].item() == pytest.approx(difference.item(), rel=1e-2, abs=1e-2)


def test_critic_separates_and_generator_approaches():
    """One step down the critic's loss raises the divergence, one down the generator's lowers the MMD."""
    x, y = features(40, 2)
    weight = torch.eye(2, dtype=torch.float64, requires_grad=True)  # of a linear critic
    c_loss, _, logged = run_losses(x @ weight, y @ weight, positivity_weight=0.0)
    (gradient,) = torch.autograd.grad(c_loss, weight)
    moved = (weight - 1e-4 * gradient / gradient.norm()).detach()
    after = run_losses(x @ moved, y @ moved)[2]["losses/pearson_divergence"]
    assert after > logged["losses/pearson_divergence"]
    y.requires_grad_(True)
    (gradient,) = torch.autograd.grad(run_losses(x, y)[1], y)
    assert ((x.mean(0) - y.mean(0)) * -gradient.sum(0)).sum() > 0
    assert run_losses(x, (y - 0.1 * gradient).detach())[1] < run_losses(x, y)[1]


# --- what is logged of the ratio -------------------------------------------------------------------


def test_negative_share_counts():
    assert script.negative_share(torch.tensor([-1e-9, 0.0, 2.0, -3.0, 1.0])).item() == 0.4


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 0.5])
def test_condition_number_is_that_of_the_worst_matrix(ridge):
    """The ratio of the largest to the smallest eigenvalue, by NumPy; a float32 matrix is not solved in it."""
    x = randn(7, 2)
    stack = torch.stack([gram(x, x, s) for s in (0.3, 1.0, 0.5)])
    expected = 0.0
    for k in stack.numpy():
        eigenvalues = np.linalg.eigvalsh(k)
        expected = max(expected, (eigenvalues[-1] + ridge) / (eigenvalues[0] + ridge))
    assert script.condition_number(stack, ridge).item() == pytest.approx(expected, rel=1e-6)
    rank_one = torch.ones(1, 5, 5)  # eigenvalues 5 and, four times, 0
    assert script.condition_number(rank_one, 1e-9).item() == pytest.approx(5e9, rel=1e-3)


def test_squared_ratio_difference_is_equation_4_of_known_ratios():
    a, b = [0.5, 2.0, -1.0], [1.0, 2.0, 3.0]
    got = script.squared_ratio_difference(torch.tensor(a), torch.tensor(b)).item()
    assert got == pytest.approx((0.5**2 + 0 + 4**2) / 3)


@pytest.mark.parametrize("as_coded", [None, "julia", "notebook"])
def test_diagnostics_of_samples_and_their_features(as_coded):
    """r on data and r on features, at the same points: the denominator's of the game that is played."""
    real, fake = randn(9, 1, 2, 3), randn(9, 1, 2, 3, seed=1) * 1.5
    projection = randn(6, 2, seed=2) * 0.7
    real_feat, fake_feat = real.flatten(1) @ projection, fake.flatten(1) @ projection
    args = script.Args(bandwidths=BANDWIDTHS, ridge=1e-2, as_coded=as_coded)
    got = script.diagnostics(real, fake, real_feat.requires_grad_(True), fake_feat, args)
    real_feat = real_feat.detach()
    if as_coded == "notebook":
        data, feat = [real, fake], [real_feat, fake_feat]
    else:
        data, feat = [fake, real], [fake_feat, real_feat]
    r_data = literal_ratio(data[0].flatten(1), data[1].flatten(1), BANDWIDTHS, 1e-2)
    r_feat = literal_ratio(*feat, BANDWIDTHS, 1e-2)
    difference = sum((a - b) ** 2 for a, b in zip(r_data.tolist(), r_feat.tolist())) / 9
    worst = max(np.linalg.cond(gram(feat[0], feat[0], s).numpy() + 1e-2 * np.eye(9)) for s in BANDWIDTHS)
    assert (r_feat < 0).any()
    assert (r_feat > 0).any()
    assert got["charts/negative_ratios"].item() == pytest.approx(sum(v < 0 for v in r_feat.tolist()) / 9)
    assert got["charts/condition_number"].item() == pytest.approx(worst, rel=1e-9)
    assert got["charts/squared_ratio_difference"].item() == pytest.approx(difference, rel=1e-9)
    assert not any(value.requires_grad for value in got.values())


def test_features_that_keep_distances_keep_the_ratio():
    """Section 3.1: D* is 0 where the critic is the identity, or a rotation."""
    real, fake = randn(8, 3), randn(8, 3, seed=1)
    rotation, _ = torch.linalg.qr(randn(3, 3, seed=2))
    args = script.Args(bandwidths=(1.0,))
    got = script.diagnostics(real, fake, real @ rotation, fake @ rotation, args)
    assert got["charts/squared_ratio_difference"].item() == pytest.approx(0, abs=1e-12)
    got = script.diagnostics(real, fake, real * 0.5, fake * 0.5, args)
    assert got["charts/squared_ratio_difference"].item() > 1e-3


# --- networks --------------------------------------------------------------------------------------


def widths(module):
    return [
        m.out_features if isinstance(m, nn.Linear) else m.out_channels
        for m in module.modules()
        if isinstance(m, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d))
    ]


def norms(module):
    return sum(isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)) for m in module.modules())


def test_ring_networks():
    """methods.md 12.11."""
    generator, critic = script.Generator((2,), 2, 100), script.Critic((2,), 10, 100, False)
    assert (parameters(generator), parameters(critic)) == (10_602, 11_410)
    assert (widths(generator), widths(critic)) == ([100, 100, 2], [100, 100, 10])
    assert norms(generator) == norms(critic) == 0


def test_mnist_networks_are_those_of_appendix_b4():
    generator, critic = script.Generator((1, 28, 28), 100, 16), script.Critic((1, 28, 28), 100, 16, False)
    assert widths(generator) == [600, 600, 800, 784]
    assert widths(critic) == [16, 32, 32, 100]
    assert critic.layers[-1].in_features == 288
    assert norms(critic) == 3
    batch_norms, convs = 2 * (16 + 32 + 32), (9 * 16 + 16) + (9 * 16 * 32 + 32) + (9 * 32 * 32 + 32)
    assert parameters(critic) == convs + batch_norms + 288 * 100 + 100


def test_cifar_networks_are_tables_5_to_7():
    generator, critic = script.Generator((3, 32, 32), 128, 32), script.Critic((3, 32, 32), 128, 32, False)
    assert widths(generator) == [2048, 64, 32, 3]
    assert widths(critic) == [32, 64, 128, 128]
    assert critic.layers[-1].in_features == 2048
    assert (norms(generator), norms(critic)) == (3, 2)
    weak = script.Critic((3, 32, 32), 128, 32, True)
    assert widths(weak) == [32, 32, 64, 128]
    assert weak.layers[-1].in_features == 1024
    expected = 128 * 2048 + 2048 + 16 * (128 * 64 + 64 * 32 + 32 * 3) + 64 + 32 + 3 + 2 * (128 + 64 + 32)
    assert parameters(generator) == expected
    expected = 16 * (3 * 32 + 32 * 64 + 64 * 128) + 32 + 64 + 128 + 2 * (64 + 128) + 2048 * 128 + 128
    assert parameters(critic) == expected


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 28, 28), (3, 48, 48), (3, 64, 64), (2,), (3,)])
@pytest.mark.parametrize("weak", [False, True])
def test_networks_fit_each_shape(shape, weak):
    fake = script.Generator(shape, 5, 8)(torch.randn(4, 5))
    assert fake.shape == (4, *shape)
    assert script.Critic(shape, 3, 8, weak)(fake).shape == (4, 3)


@pytest.mark.parametrize(("dataset", "layer"), [("digits", 0), ("ring2d", 0), ("ring2d", 2)])
def test_critic_width_is_the_critics_alone(dataset, layer, tmp_path):
    """002 Figures 2 and 7: the generator's width varies, the critic's stays."""
    _, state = train(tmp_path, dataset=dataset, width=8, critic_width=12, total_steps=1)
    critic, generator = state["critic"], state["generator"]
    assert len(critic[f"layers.{layer}.weight"]) == 12
    assert not any(12 in weight.shape for weight in generator.values())
    assert state["args"]["critic_width"] == 12


def test_critic_width_is_the_width_where_none_is_given():
    assert script.resolve(script.Args(dataset="ring2d", width=20)).critic_width == 20
    assert script.resolve(script.Args(dataset="ring2d")).critic_width == 100
    assert script.resolve(script.Args(dataset="ring2d", width=20, critic_width=100)).critic_width == 100


def test_latent_law():
    device = torch.device("cpu")
    toy = script.draw_noise(4000, script.Args(dataset="ring2d", latent_dim=2), device)
    image = script.draw_noise(4000, script.Args(dataset="digits", latent_dim=2), device)
    assert toy.abs().max() > 2.5
    assert toy.std().item() == pytest.approx(1, abs=0.05)
    assert image.abs().max() <= 1
    assert image.std().item() == pytest.approx(3**-0.5, abs=0.02)


# --- training --------------------------------------------------------------------------------------


def read_scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [e.value for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def train(tmp_path, **kwargs):
    script.train(script.Args(**{**FAST, "runs_dir": str(tmp_path), **kwargs}))
    (folder,) = tmp_path.iterdir()
    return folder, torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("dataset", ["digits", "ring3d"])
@pytest.mark.parametrize(
    "variant",
    [
        {},
        {"positivity": "clip"},
        {"as_coded": "notebook"},
        {"as_coded": "julia"},
        {"precision": "bf16"},
    ],
    ids=str,
)
def test_three_steps(tmp_path, dataset, variant):
    folder, state = train(tmp_path, dataset=dataset, feature_dim=4, ema_decay=0.9, **variant)
    scalars = read_scalars(folder)
    wanted = {"losses/critic", "losses/generator", "losses/pearson_divergence", "losses/mmd2"}
    wanted |= {"kernel/k_xx", "kernel/k_xy", "kernel/k_yy", "charts/negative_ratios"}
    wanted |= {"charts/condition_number", "charts/squared_ratio_difference"}
    assert wanted <= set(scalars)
    assert all(math.isfinite(v) for values in scalars.values() for v in values)
    assert len(scalars["losses/critic"]) == 3
    assert state["step"] == 3
    assert (folder / "samples" / "0000003.png").exists()
    for player in ("g_optimizer", "c_optimizer"):  # one step each per update, also when they alternate
        assert {int(s["step"]) for s in state[player]["state"].values()} == {3}
        assert len(state[player]["state"]) > 0


@pytest.mark.parametrize(
    ("dataset", "dim", "title"),
    [
        ("ring2d", 2, "projected space"),
        ("ring3d", 2, "projected space"),
        ("ring2d", 5, "projected space: first two principal components of 5"),
        ("ring2d", 1, "projected space"),
    ],
)
def test_picture_has_both_spaces(tmp_path, monkeypatch, dataset, dim, title):
    from matplotlib.figure import Figure

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: figures.append(figure))
    d = datasets.TOYS[dataset]
    data = datasets.Toy(dataset, (d,), 8, 1, 0, 1, torch.device("cpu"))
    torch.manual_seed(0)
    critic = script.Critic((d,), dim, 16, False)
    fake = torch.randn(50, d)
    script.draw_picture(tmp_path / "x.png", fake, data, critic)
    left, right = figures[0].axes
    assert (left.get_title(), right.get_title()) == ("data space", title)
    assert len(left.collections) == len(right.collections) == 2
    drawn = torch.cat([torch.from_numpy(c.get_offsets().data).float() for c in right.collections])
    feat = critic(torch.cat([datasets.draw_toy(dataset, 50, 0), fake])).detach()
    if dim == 2:
        torch.testing.assert_close(drawn, feat)
    elif dim == 5:  # the variances along the axes are the two largest eigenvalues of the covariance
        largest = torch.linalg.eigvalsh(torch.cov(feat.T)).flip(0)[:2]
        torch.testing.assert_close(drawn.var(0), largest, rtol=1e-3, atol=1e-6)
