"""mmd_gan_repulsive.py against the paper: losses, bounds, PICO, networks, the two-parameter game."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mmd_gan_repulsive as script
from common import kernels


def features(seed=0, n=6, d=3):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=g, dtype=torch.float64), torch.randn(
        n, d, generator=g, dtype=torch.float64
    ) + 1


def literal(x, y, kernel):
    """E k(x, x'), E k(x, y), E k(y, y') as double loops over i != j, of kernel(d2, pair)."""
    n = len(x)
    sums = {"xx": 0.0, "xy": 0.0, "yy": 0.0}
    for i in range(n):
        for j in range(n):
            if i != j:
                for name, a, b in (("xx", x[i], x[j]), ("xy", x[i], y[j]), ("yy", y[i], y[j])):
                    sums[name] += kernel(((a - b) ** 2).sum().item(), name) / (n * (n - 1))
    return sums["xx"], sums["xy"], sums["yy"]


def run_losses(x, y, **kwargs):
    return script.losses(x, y, script.Args(**{"bandwidths": (1.0,), **kwargs}))


@pytest.mark.parametrize("lam", [-1, -0.5, 0, 0.5, 1, 2])
def test_losses_are_equations_2_and_5(lam):
    x, y = features()
    xx, xy, yy = literal(x, y, lambda d2, _: math.exp(-d2 / 2))
    c_loss, g_loss, means = run_losses(x, y, lam=lam)
    assert c_loss.item() == pytest.approx(lam * xx - (lam - 1) * xy - yy, abs=1e-12)
    assert g_loss.item() == pytest.approx(xx - 2 * xy + yy, abs=1e-12)
    whole_xy = torch.exp(-(x[:, None] - y[None]).square().sum(2) / 2).mean().item()  # the curve has all pairs
    assert [m.item() for m in means.values()] == pytest.approx([xx, whole_xy, yy], abs=1e-12)


def test_rq_and_mixtures_are_sums():
    x, y = features()
    alphas = (0.2, 0.5, 1.0, 2.0, 5.0)
    xx, xy, yy = literal(x, y, lambda d2, _: sum((1 + d2 / (2 * a)) ** -a for a in alphas))
    c_loss, g_loss, _ = run_losses(x, y, kernel="rq", bandwidths=alphas)
    assert (c_loss.item(), g_loss.item()) == pytest.approx((xx - yy, xx - 2 * xy + yy), abs=1e-12)


@pytest.mark.parametrize("lam", [-1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
def test_bounded_kernel_is_equations_6_and_7(lam):
    """Footnote 5: Eq. (6) for lambda < 0. From 0 on Eq. (7), which names no pairs of real and fake."""
    x, y = features(1, 8, 1)

    def kernel(d2, pair):
        if lam < 0:
            d2 = min(d2, 4) if pair == "xy" else max(d2, 0.25)
        elif pair != "xy":
            d2 = min(d2, 4) if pair == "xx" else max(d2, 0.25)
        return math.exp(-d2 / 2)

    mixed = [((a - b) ** 2).sum().item() for a in x for b in y]
    assert min(mixed) < 0.25 < 4 < max(mixed)  # a bound on mixed pairs would be seen
    xx, xy, yy = literal(x, y, kernel)
    c_loss, g_loss, _ = run_losses(x, y, lam=lam, kernel="rbf-b")
    assert c_loss.item() == pytest.approx(lam * xx - (lam - 1) * xy - yy, abs=1e-12)
    unbounded = run_losses(x, y, lam=lam)
    assert g_loss.item() == unbounded[1].item()  # the generator's kernel is never bounded
    assert c_loss.item() != unbounded[0].item()


def test_values_and_gradients_at_the_bounds():
    """Beyond a bound the kernel is constant, between them it is the RBF."""
    real = torch.tensor([[0.0], [3.0]], dtype=torch.float64, requires_grad=True)  # d2 = 9
    fake = torch.tensor([[0.0], [0.1]], dtype=torch.float64, requires_grad=True)  # d2 = 0.01
    c_loss, g_loss, _ = run_losses(real, fake, kernel="rbf-b")
    assert c_loss.item() == pytest.approx(math.exp(-2) - math.exp(-0.125), abs=1e-12)
    assert c_loss.item() == pytest.approx(0.13534 - 0.88250, abs=1e-5)  # its lower end
    gradients = torch.autograd.grad(c_loss, (real, fake), retain_graph=True)
    assert all((g == 0).all() for g in gradients)
    assert all((g != 0).any() for g in torch.autograd.grad(g_loss, (real, fake)))
    near = torch.tensor([[0.0], [1.0]], dtype=torch.float64, requires_grad=True)  # d2 = 1, within
    c_loss, _, _ = run_losses(near, fake, kernel="rbf-b")
    (gradient,) = torch.autograd.grad(c_loss, near)
    assert gradient.flatten().tolist() == pytest.approx([math.exp(-0.5), -math.exp(-0.5)])


def test_identities_between_the_losses():
    """L_att = -L_G, L_rep = L_G + 2 (E k(x, y) - E k(y, y')), and 0 for equal samples."""
    x, y = features(2)
    attractive, g_loss, means = run_losses(x, y, lam=-1)
    repulsive, _, _ = run_losses(x, y, lam=1)
    assert attractive.item() == pytest.approx(-g_loss.item(), abs=1e-14)
    k_xx, k_yy = means["kernel/k_xx"], means["kernel/k_yy"]
    k_xy = (k_xx + k_yy - g_loss) / 2  # without its diagonal, as in the losses
    assert repulsive.item() == pytest.approx((g_loss + 2 * (k_xy - k_yy)).item(), abs=1e-14)
    for lam in (-1, 0.5, 2):
        assert run_losses(x, x, lam=lam)[0].item() == pytest.approx(0, abs=1e-14)


def test_generator_loss_falls_when_fake_moves_towards_real():
    x, y = features(3)
    y.requires_grad_(True)
    _, g_loss, _ = run_losses(x, y)
    (gradient,) = torch.autograd.grad(g_loss, y)
    assert run_losses(x, (y - 0.1 * gradient).detach())[1] < g_loss
    assert ((x.mean(0) - y.mean(0)) * -gradient.sum(0)).sum() > 0


def test_baselines_of_appendix_b1():
    x, y = features(4, 5, 1)
    softplus = torch.nn.Softplus()
    c_loss, g_loss, _ = run_losses(x, y, loss="hinge")
    assert c_loss.item() == pytest.approx(sum(max(0, 1 - a) + max(0, 1 + b) for a, b in zip(x, y)).item() / 5)
    assert g_loss.item() == pytest.approx(-sum(y.flatten().tolist()) / 5)
    c_loss, g_loss, _ = run_losses(x, y, loss="non-saturating")
    assert c_loss.item() == pytest.approx((softplus(-x).mean() + softplus(y).mean()).item())
    assert g_loss.item() == pytest.approx(sum(math.log1p(math.exp(-b)) for b in y.flatten().tolist()) / 5)


# --- spectral normalisation ------------------------------------------------------------------------


def conv_matrix(weight, in_shape, stride, padding):
    """The convolution as a matrix, column by column."""
    basis = torch.eye(math.prod(in_shape), dtype=weight.dtype).view(-1, *in_shape)
    return F.conv2d(basis, weight, stride=stride, padding=padding).flatten(1).T


def converged(layer, in_shape, gain=1.0, norm="pico", steps=500):
    parametrisation = script.SpectralNorm(layer, in_shape, gain, norm)
    parametrisation.iterate(layer.weight.detach(), steps)
    return parametrisation.eval()


@pytest.mark.parametrize(
    ("side", "kernel", "stride", "padding", "expected"),
    [
        (4, 3, 1, 1, 6.854102), (8, 3, 1, 1, 8.290859), (16, 3, 1, 1, 8.796837), (32, 3, 1, 1, 8.945746),
        (8, 4, 2, 1, 7.0), (16, 4, 2, 1, 7.719342), (8, 2, 2, 0, 2.0),
    ],
)  # fmt: skip
def test_pico_of_kernels_of_ones(side, kernel, stride, padding, expected):
    """By SVD of the operator; for 3x3 the closed form (1 + 2 cos(pi / (H + 1)))^2."""
    layer = nn.Conv2d(1, 1, kernel, stride, padding)
    nn.init.ones_(layer.weight)
    parametrisation = converged(layer, (1, side, side))
    sigma = (layer.weight / parametrisation(layer.weight)).mean().item()
    assert sigma == pytest.approx(expected, rel=1e-5)


def test_pim_of_kernels_of_ones_is_that_of_the_matrix():
    layer = nn.Conv2d(1, 1, 3, 1, 1)
    nn.init.ones_(layer.weight)
    parametrisation = converged(layer, (1, 8, 8), norm="pim")
    assert (layer.weight / parametrisation(layer.weight)).mean().item() == pytest.approx(3, rel=1e-6)


@pytest.mark.parametrize(("c", "side", "k", "s"), [((3, 4), 6, 3, 1), ((4, 8), 8, 4, 2), ((2, 3), 7, 4, 2)])
@pytest.mark.parametrize("gain", [1.0, 1.818])
def test_normalised_convolution_has_the_gain_as_its_exact_norm(c, side, k, s, gain):
    torch.manual_seed(0)
    layer = nn.Conv2d(*c, k, s, 1).double()
    parametrisation = converged(layer, (c[0], side, side), gain)
    matrix = conv_matrix(parametrisation(layer.weight).detach(), (c[0], side, side), s, 1)
    assert torch.linalg.svdvals(matrix)[0].item() == pytest.approx(gain, rel=1e-3)


@pytest.mark.parametrize("side", [6, 7, 8, 9])
@pytest.mark.parametrize(("k", "s"), [(3, 1), (4, 2)])
def test_adjoint(side, k, s):
    torch.manual_seed(1)
    layer = nn.Conv2d(2, 3, k, s, 1).double()
    parametrisation = script.SpectralNorm(layer, (2, side, side), 1.0, "pico")
    w = layer.weight.detach()
    v = torch.randn(1, 2, side, side, dtype=torch.float64)
    u = torch.randn_like(parametrisation.operator(w, v))
    left = (parametrisation.operator(w, v) * u).sum().item()
    assert left == pytest.approx((v * parametrisation.adjoint(w, u)).sum().item(), rel=1e-10)


def test_dense_layer_matches_the_svd():
    torch.manual_seed(2)
    layer = nn.Linear(20, 7)
    normalised = converged(layer, (20,), gain=2.0)(layer.weight)
    assert torch.linalg.svdvals(normalised)[0].item() == pytest.approx(2.0, rel=1e-4)


def test_gradient_goes_through_the_norm_but_not_through_its_vector():
    """d/dW of <A, W / sigma(W)> with sigma = ||conv(v)|| and v constant, by finite differences."""
    torch.manual_seed(3)
    layer = nn.Conv2d(2, 3, 3, 1, 1).double()
    parametrisation = converged(layer, (2, 5, 5))
    weight = layer.weight.detach().requires_grad_(True)
    assert torch.autograd.gradcheck(parametrisation, weight)


def test_power_iteration_advances_in_training_only():
    layer = nn.utils.parametrize.register_parametrization
    conv = nn.Conv2d(2, 3, 3, 1, 1)
    layer(conv, "weight", script.SpectralNorm(conv, (2, 5, 5), 1.0, "pico"))
    vector = conv.parametrizations.weight[0].v
    before = vector.clone()
    conv.eval()(torch.zeros(1, 2, 5, 5))
    assert torch.equal(vector, before)
    conv.train()(torch.zeros(1, 2, 5, 5))
    assert not torch.equal(vector, before)


def test_spectral_norm_stays_in_float32_under_autocast():
    critic = script.Critic((1, 8, 8), 4, 8, 1.0, "pico")
    with torch.autocast("cpu", torch.bfloat16):
        assert critic.layers[0].weight.dtype == torch.float32
        assert critic(torch.zeros(2, 1, 8, 8)).dtype == torch.bfloat16


# --- networks --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "generator", "critic", "depth"),
    [(32, 3_811_907, 5_983_760, 8), (48, 5_132_867, 6_147_600, 8), (64, 13_258_307, 23_942_672, 10)],
)
def test_parameter_counts_of_the_papers_networks(side, generator, critic, depth):
    shape = (3, side, side)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(script.Generator(shape, 128, 64)) == generator
    assert count(script.Critic(shape, 16, 64, 1.0, "pim")) == critic
    assert len(script.Critic(shape, 16, 8, 1.0, "pim").layers) == 2 * depth


@pytest.mark.parametrize(
    ("options", "overall"),
    [
        (dict(), 64), (dict(kernel="rbf-b"), 64), (dict(lam=0.5), 64), (dict(lam=2.0), 64),
        (dict(lam=0.0), 128), (dict(lam=-1.0), 128), (dict(loss="hinge"), 128),
        (dict(loss="non-saturating"), 128),
    ],
)  # fmt: skip
def test_gain_of_all_layers_is_that_of_table_s3(options, overall):
    for dataset, depth in (("cifar10", 8), ("stl10", 8), ("celeba", 10), ("digits", 4), ("ring2d", 4)):
        gain = script.resolve(script.Args(dataset=dataset, **options)).sn_gain
        assert gain**depth == pytest.approx(overall)
    assert script.resolve(script.Args(sn_gain=1.818, **options)).sn_gain == 1.818


def test_weights_start_with_the_laws_of_the_authors_framework():
    """Normal laws cut at two standard deviations, of which 0.8796 is left, and Glorot uniform ones."""
    torch.manual_seed(0)
    generator, critic = (
        script.Generator((3, 32, 32), 128, 64),
        script.Critic((3, 32, 32), 16, 64, 1.0, "none"),
    )
    cut = []  # weights and nominal standard deviations
    for layer in generator.layers:
        if isinstance(layer, nn.ConvTranspose2d):
            cut.append((layer.weight, (2 / (16 * layer.out_channels)) ** 0.5))
            assert layer.bias is None
    for layer in critic.layers:
        if isinstance(layer, nn.Conv2d):
            cut.append((layer.weight, (2 / 1.01 / (layer.in_channels * layer.kernel_size[0] ** 2)) ** 0.5))
    assert len(cut) == 3 + 7
    for weight, std in cut:
        assert weight.std().item() == pytest.approx(0.87963 * std, rel=0.03)
        assert 1.9 * std < weight.abs().max() <= 2 * std
    ends = [
        (generator.layers[0], 128, 8192),
        (generator.layers[-2], 9 * 64, 9 * 3),
        (critic.layers[-1], 8192, 16),
    ]
    for layer, fan_in, fan_out in ends:
        bound = (6 / (fan_in + fan_out)) ** 0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    biases = torch.cat(
        [p for m in (generator, critic) for n, p in m.named_parameters() if n.endswith("bias")]
    )
    assert 0 < biases.abs().max() <= 2e-5  # batch norm's are 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 48, 48), (2,), (3,)])
def test_networks_fit_each_shape(shape):
    fake = script.Generator(shape, 5, 8)(torch.randn(4, 5))
    critic = script.Critic(shape, 3, 8, 1.0, "pico")
    assert fake.shape == (4, *shape)
    assert critic(fake).shape == (4, 3)
    normalised = [m for m in critic.modules() if isinstance(m, script.SpectralNorm)]
    assert len(normalised) == (4 if len(shape) == 1 else 2 * script.levels(shape[1]) + 2)


def test_penalised_loss_is_equation_s8():
    """With D(x) = W x the squared Frobenius norm of the gradient is that of W: rows (1, 2, 2), (0, 3, 4)."""
    w = torch.tensor([[1.0, 2, 2], [0, 3, 4]], dtype=torch.float64, requires_grad=True)
    real = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    c_loss = torch.tensor(0.3, dtype=torch.float64)
    loss = script.penalised(c_loss, real @ w.T, real, 0.1)
    assert loss.item() == pytest.approx((0.3 - 1) / (1 + 0.1 * 34))
    (gradient,) = torch.autograd.grad(loss, w)  # through the norm: d(1 / (1 + 0.1 |W|^2)) / dW
    torch.testing.assert_close(gradient, (0.7 * 0.2 / 4.4**2) * w.detach())


def test_second_derivative_of_the_penalised_loss():
    torch.manual_seed(0)
    critic = script.Critic((1, 8, 8), 2, 2, 1.0, "none").double()
    real, fake = (torch.rand(3, 1, 8, 8, dtype=torch.float64) for _ in range(2))
    args = script.Args(bandwidths=(1.0,))
    weight = critic.layers[0].weight

    def loss():
        x = real.clone().requires_grad_()
        feat = critic(x), critic(fake)
        return script.penalised(script.losses(*feat, args)[0], feat[0], x, 10.0)

    (gradient,) = torch.autograd.grad(loss(), weight)
    direction = torch.randn_like(weight)
    values = []
    for step in (1e-6, -1e-6):
        with torch.no_grad():
            weight.add_(step * direction)
        values.append(loss().item())
        with torch.no_grad():
            weight.sub_(step * direction)
    assert (gradient * direction).sum().item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5)


def test_gradient_penalty_trains(tmp_path):
    args = {
        "total_steps": 2,
        "batch_size": 8,
        "width": 4,
        "eval_every": 0,
        "feature_dim": 1,
        "critic_norm": "none",
    }
    script.train(script.Args(**args, lambda_gp=0.1, runs_dir=str(tmp_path / "a")))
    script.train(script.Args(**args, runs_dir=str(tmp_path / "b")))
    a, b = (torch.load(next((tmp_path / n).iterdir()) / "checkpoint.pt", weights_only=True) for n in "ab")
    assert not torch.equal(a["critic"]["layers.0.weight"], b["critic"]["layers.0.weight"])


# --- the two-parameter game of Appendix A.2 --------------------------------------------------------


def flow(lam, start, real, steps, lr=0.5):
    """Gradient flow of G(z) = w1 z, D(x) = w2 x^2, sigma = 0.5, on quantiles in the place of samples."""
    n = len(real)
    z = (torch.arange(n, dtype=torch.float64) + 0.5) / n * 2 - 1
    w1, w2 = (torch.tensor(w, dtype=torch.float64, requires_grad=True) for w in start)
    for _ in range(steps):
        x, y = (w2 * real**2)[:, None], (w2 * (w1 * z) ** 2)[:, None]
        gram = kernels.gram_blocks(x, y, "rbf", (0.5,))
        (g2,) = torch.autograd.grad(script.critic_loss(*gram, lam), w2, retain_graph=True)
        (g1,) = torch.autograd.grad(script.generator_loss(*gram), w1)
        w1, w2 = (w1 - lr * g1).detach().requires_grad_(), (w2 - lr * g2).detach().requires_grad_()
    return w1.item(), w2.item()


def normal_quantiles(n):
    return torch.special.ndtri((torch.arange(n, dtype=torch.float64) + 0.5) / n)


def test_repulsive_game_ends_at_its_equilibrium():
    """(1.5536, 0.3071) by quadrature for N(0, 1), from two starts. The paper reports (1.55, 0.32)."""
    for start in ((0.5, 0.5), (2.0, 1.5)):
        w1, w2 = flow(1.0, start, normal_quantiles(150), steps=200)
        assert (w1, w2) == pytest.approx((1.5536, 0.3071), abs=0.02)


@pytest.mark.slow
def test_attractive_game_ends_elsewhere():
    """(1.4839, 0.7959) by quadrature, slow in w2. The paper reports (1.55, 0.74)."""
    w1, w2 = flow(-1.0, (1.5, 0.85), normal_quantiles(150), steps=300)
    assert (w1, w2) == pytest.approx((1.4839, 0.7959), abs=0.03)


@pytest.mark.slow
def test_repulsive_game_has_a_trivial_solution():
    """For U(-1, 1), from (2, 0.5) the critic dies; from (0.5, 0.5) w1 becomes 1, and w2 stays away from 0."""
    uniform = (torch.arange(100, dtype=torch.float64) + 0.5) / 50 - 1
    assert flow(1.0, (2.0, 0.5), uniform, 300)[1] == pytest.approx(0.0, abs=1e-3)
    w1, w2 = flow(1.0, (0.5, 0.5), uniform, 300)
    assert w1 == pytest.approx(1.0, abs=0.01)
    assert w2 > 0.8
