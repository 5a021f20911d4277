"""Scaled MMD GAN: scale, penalty, normalisation and schedule against closed forms and restatements."""

import copy
import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import parameters, randn
from torch import nn

import smmd_gan as S
from common import evaluation, kernels, run

torch.set_default_dtype(torch.float32)
W = torch.tensor([[1.0, 2, 2], [0, 3, 4]], dtype=torch.float64)


def arguments(**given):
    """Arguments of the method alone, as train would have resolved them."""
    constraint = given.get("constraint", "scaled")
    base = S.CONSTRAINTS[constraint] | {"bandwidths": (1.0,), "lambda_scale": 10.0}
    return S.Args(**base | given)


# --- the scale -------------------------------------------------------------------------------------


def test_scale_of_a_linear_critic():
    x = randn(5, 3).requires_grad_()
    norm2 = S.jacobian_norm2(x @ W.T, x, create_graph=False)
    assert norm2.tolist() == [34.0] * 5
    assert S.distance_scale(x @ W.T, x, arguments(), create_graph=False).item() == pytest.approx(
        0.00293255, rel=1e-6
    )
    x_signed = (2 * x.detach() - 1).requires_grad_()  # the same function of pixels in [-1, 1]
    norm2 = S.jacobian_norm2((x_signed + 1) / 2 @ W.T, x_signed, create_graph=False)
    assert norm2.tolist() == pytest.approx([8.5] * 5)
    forty = S.distance_scale(
        (x_signed + 1) / 2 @ W.T, x_signed, arguments(lambda_scale=40.0), create_graph=False
    )
    assert forty.item() == pytest.approx(0.00293255, rel=1e-6)


def kernel_value(a, b, kernel, bandwidths):
    d2 = (a - b).square().sum()
    value = 0.0
    for s in bandwidths if kernel != "linear" else ():
        value = value + (torch.exp(-d2 / (2 * s * s)) if kernel == "rbf" else (1 + d2 / (2 * s)) ** (-s))
    return value + (a @ b if kernel in ("linear", "rq-linear") else 0)


@pytest.mark.parametrize(
    ("kernel", "bandwidths"),
    [
        ("rbf", (1.0,)),
        ("rbf", (1.0, 2.0, 0.5)),
        ("rq", (0.2, 1.0, 5.0)),
        ("rq-linear", (0.1, 10.0)),
        ("linear", (1.0,)),
    ],
)
def test_poster_scale_is_the_kernel_and_its_second_derivatives(kernel, bandwidths):
    """1 / (lambda + E [k(X, X) + sum_i d2 k(y, z) / dy_i dz_i]), by autograd on the kernel itself."""
    network = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x = randn(3, 4).requires_grad_()
    total = 0.0
    for point in x.detach():
        y, z = point.clone().requires_grad_(), point.clone().requires_grad_()
        value = kernel_value(network(y), network(z), kernel, bandwidths)
        (by_y,) = torch.autograd.grad(value, y, create_graph=True)
        second = sum(torch.autograd.grad(by_y[i], z, retain_graph=True)[0][i] for i in range(4))
        total += (value + second).item()
    args = arguments(scale_form="poster", lambda_scale=1.0, kernel=kernel, bandwidths=bandwidths)
    got = S.distance_scale(network(x), x, args, create_graph=False)
    assert got.item() == pytest.approx(1 / (1 + total / 3), rel=1e-9)


def test_scale_of_the_other_constraints():
    x = randn(5, 3).requires_grad_()
    feat = x @ W[:1].T
    assert S.distance_scale(feat, x, arguments(constraint="none"), False) == 1
    assert S.distance_scale(feat, x, arguments(constraint="gradient-penalty"), False) == 1
    energy = 9 + sum((row @ W[0]).item() ** 2 for row in x) / 5  # value_and_grad
    got = S.distance_scale(feat, x, arguments(constraint="swgan"), False)
    assert got.item() == pytest.approx((1 + 10 * energy) ** -0.5)


def literal_critic_loss(critic, real, fake, lam):
    """-s2 MMD^2 for rbf of sigma 1, with loops, and the Jacobian by finite differences."""
    n, h = len(real), 1e-5
    k = lambda a, b: math.exp(-(critic(a) - critic(b)).square().sum().item() / 2)  # noqa: E731
    within = sum(k(s[i], s[j]) for s in (real, fake) for i in range(n) for j in range(n) if i != j)
    across = sum(k(a, b) for a in real for b in fake)
    norm2 = 0.0
    for x in real:
        for i in range(len(x)):
            e = torch.zeros_like(x)
            e[i] = h
            norm2 += ((critic(x + e) - critic(x - e)) / (2 * h)).square().sum().item()
    return -(within / (n * (n - 1)) - 2 * across / n**2) / (1 + lam * norm2 / n)


def test_double_backward_against_finite_differences():
    """d L_C / d parameters, the scale differentiated too, of the loss restated without autograd."""
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    real, fake = randn(3, 2).requires_grad_(), randn(3, 2, seed=1) + 1

    def loss(create_graph):
        feat, args = critic(real), arguments()
        blocks = kernels.gram_blocks(feat, critic(fake), "rbf", (1.0,))
        return S.critic_loss(S.squared_mmd(*blocks, args), S.distance_scale(feat, real, args, create_graph))

    value = loss(True)
    with torch.no_grad():
        assert value.item() == pytest.approx(literal_critic_loss(critic, real, fake, 10.0), rel=1e-8)
    for parameter, grad in zip(critic.parameters(), torch.autograd.grad(value, list(critic.parameters()))):
        for i in range(parameter.numel()):
            with torch.no_grad():
                entry, values = parameter.view(-1)[i], []
                old = entry.item()
                for h in (1e-4, -1e-4):
                    entry.fill_(old + h)
                    values.append(literal_critic_loss(critic, real, fake, 10.0))
                entry.fill_(old)
            expected = (values[0] - values[1]) / 2e-4
            assert grad.flatten()[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


def test_signs():
    blocks = kernels.gram_blocks(randn(8, 2), randn(8, 2, seed=1) + 3, "rbf", (1.0,))
    mmd2, s2 = S.squared_mmd(*blocks, arguments()), torch.tensor(0.5)
    assert mmd2 > 0.5
    assert S.critic_loss(mmd2, s2) == -S.generator_loss(mmd2, s2) == -0.5 * mmd2


# --- DiracGAN: P = delta_0, Q = delta_theta, phi(x) = psi x ------------------------------------------


def dirac(theta, psi, args):
    """Critic and generator loss, by the script's own functions; theta and psi are float64 scalars."""
    real = torch.zeros(2, 1, dtype=torch.float64).requires_grad_()
    fake = theta.expand(2, 1)
    blocks = kernels.gram_blocks(psi * real, psi * fake, "rbf", (1.0,))
    mmd2 = S.squared_mmd(*blocks, args)
    return [
        loss(mmd2, S.distance_scale(psi * real, real, args, graph))
        for loss, graph in ((S.critic_loss, True), (S.generator_loss, False))
    ]


def best(theta, args):
    """Maximise the scaled MMD over psi by golden-section search on log psi."""
    theta = torch.tensor(theta, dtype=torch.float64)
    value = lambda t: -dirac(theta, torch.tensor(math.exp(t), dtype=torch.float64), args)[0].item()  # noqa: E731
    low, high, ratio = -4.0, 4.0, (5**0.5 - 1) / 2
    for _ in range(45):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if value(a) > value(b) else (a, high)
    return math.exp(low), math.sqrt(value(low))


@pytest.mark.parametrize(
    ("theta", "u", "smmd"),
    [
        (0.1, 6.289, 0.03113),
        (0.5, 1.232, 0.14639),
        (1.0, 0.6008, 0.27212),
        (2.0, 0.2861, 0.47508),
        (4.0, 0.1307, 0.74981),
        (10.0, 0.0418, 1.11175),
        (0.01, None, 0.00316),
    ],
)
def test_optimised_dirac(theta, u, smmd):
    psi, value = best(theta, arguments())
    assert value == pytest.approx(smmd, abs=6e-6)
    assert u is None or psi**2 == pytest.approx(u, rel=2e-3)


@pytest.mark.slow
def test_optimised_dirac_of_the_other_forms():
    for theta, smmd in ((0.1, 0.09520), (0.5, 0.39695), (1.0, 0.65127), (2.0, 0.94226), (4.0, 1.18279)):
        assert best(theta, arguments(lambda_scale=1.0))[1] == pytest.approx(smmd, abs=6e-6)
        zero = arguments(lambda_scale=0.0, scale_form="poster")
        assert best(theta, zero)[1] == pytest.approx(smmd, abs=6e-6)
    poster = arguments(lambda_scale=1.0, scale_form="poster")
    assert best(1.0, poster)[1] == pytest.approx(0.56378, abs=6e-6)
    assert best(2.0, poster)[1] == pytest.approx(0.75936, abs=6e-6)
    plain = arguments(constraint="none")
    assert best(0.5, plain)[1] == pytest.approx(2**0.5, abs=1e-6)  # discontinuous: 0 at theta = 0


def flow(theta, psi, args, step, steps, moves_theta=True):
    """Integrate theta' = -dL_G/dtheta, psi' = -dL_C/dpsi (Runge-Kutta of order 4)."""

    def velocity(state):
        theta, psi = (value.detach().requires_grad_() for value in state)
        c_loss, g_loss = dirac(theta, psi, args)
        (by_psi,) = torch.autograd.grad(c_loss, psi, retain_graph=True)
        (by_theta,) = torch.autograd.grad(g_loss, theta)
        return torch.stack([-by_theta * moves_theta, -by_psi])

    state = torch.tensor([theta, psi], dtype=torch.float64)
    for _ in range(steps):
        a = velocity(state)
        b = velocity(state + step / 2 * a)
        c = velocity(state + step / 2 * b)
        state = state + step / 6 * (a + 2 * b + 2 * c + velocity(state + step * c))
    return state.tolist()


def test_simultaneous_flows_of_dirac():
    theta, psi = flow(1.0, 0.5, arguments(), 1.5, 60)
    assert abs(theta) < 1e-3
    assert psi == pytest.approx(0.666, abs=1e-3)
    theta, psi = flow(1.0, 0.5, arguments(lambda_scale=1.0), 0.5, 40)
    assert abs(theta) < 1e-3
    assert psi == pytest.approx(0.933, abs=1e-3)
    theta, psi = flow(1.0, 0.5, arguments(constraint="none"), 0.05, 20)
    assert theta**2 + psi**2 == pytest.approx(1.25, abs=1e-6)  # conserved on the way
    theta, psi = flow(1.0, 0.5, arguments(constraint="none"), 0.2, 30)
    assert abs(theta) < 1e-3
    assert psi == pytest.approx(1.1180, abs=1e-4)


def test_critic_at_fixed_theta_settles():
    assert flow(1.0, 0.5, arguments(), 4.0, 20, moves_theta=False)[1] == pytest.approx(0.77512, abs=1e-4)


# --- gradient and activation penalty, diagonal -------------------------------------------------------


def linear_witness_penalty(shape, as_coded):
    """The penalty of a linear critic with kernel linear, whose witness has a constant gradient g."""
    n, d = 4, 3
    weight = randn(d, math.prod(shape), seed=3)
    real, fake, m = randn(n, *shape), randn(n, *shape, seed=1), randn(n, *shape, seed=2).requires_grad_()
    feats = [x.flatten(1) @ weight.T for x in (m, real, fake)]
    args = arguments(constraint="gradient-penalty", kernel="linear", as_coded=as_coded)
    g = weight.T @ (feats[1].mean(0) - feats[2].mean(0))
    return S.gradient_penalty(m, *feats, args).item(), g.detach().reshape(shape)


def test_penalty_is_on_the_norm_of_the_whole_gradient():
    got, g = linear_witness_penalty((3, 4, 5), False)
    assert got == pytest.approx((math.sqrt(g.square().sum() + 1e-5) - 1) ** 2)


def test_as_coded_penalty_is_on_the_norm_over_rows():
    got, g = linear_witness_penalty((3, 4, 5), True)
    parts = [
        (math.sqrt(sum(g[c, row, w].item() ** 2 for row in range(4)) + 1e-5) - 1) ** 2
        for c in range(3)
        for w in range(5)
    ]
    assert got == pytest.approx(sum(parts) / 15)
    points, whole = linear_witness_penalty((2,), True), linear_witness_penalty((2,), False)
    assert points[0] == whole[0]  # flat vectors, for which the code was written


@pytest.mark.parametrize(("shape", "target"), [((1, 28, 28), 5.3), ((3, 32, 32), 9.8)])
def test_as_coded_penalty_asks_for_a_larger_gradient(shape, target):
    """It is 0 where every column has norm 1: the whole gradient then has sqrt(W C)."""
    g = torch.full(shape, shape[1] ** -0.5, dtype=torch.float64)
    assert g.norm().item() == pytest.approx(target, abs=0.05)
    m = torch.zeros(2, *shape, dtype=torch.float64).requires_grad_()
    feats = [(x * g).sum((1, 2, 3))[:, None] for x in (m, torch.ones_like(m) * 0, torch.ones_like(m) * 0)]
    feats[1] = feats[1] + 1  # difference of the means 1: the witness is <g, m>
    args = arguments(constraint="gradient-penalty", kernel="linear", as_coded=True)
    assert S.gradient_penalty(m, *feats, args).item() < 1e-9


@pytest.mark.parametrize("kernel", ["rbf", "rq", "rq-linear", "distance", "linear"])
def test_penalty_against_finite_differences_of_the_witness(kernel):
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    real, fake = randn(5, 2), randn(5, 2, seed=1) + 1
    m = real.lerp(fake, 0.3).requires_grad_()
    args = arguments(constraint="gradient-penalty", kernel=kernel, bandwidths=(0.5, 2.0))

    def witness(x):
        one = lambda a, b: (  # noqa: E731
            -(a - b).norm() if kernel == "distance" else kernel_value(a, b, kernel, args.bandwidths)
        )
        return (
            sum(one(critic(x), critic(a)) - one(critic(x), critic(b)) for a, b in zip(real, fake)).item() / 5
        )

    def penalty():
        return S.gradient_penalty(m, critic(m), critic(real), critic(fake), args)

    expected, h = 0.0, 1e-5
    for x in m.detach():
        slopes = [(witness(x + e) - witness(x - e)) / (2 * h) for e in h * torch.eye(2, dtype=torch.float64)]
        expected += (math.sqrt(slopes[0] ** 2 + slopes[1] ** 2 + 1e-5) - 1) ** 2 / 5
    assert penalty().item() == pytest.approx(expected, rel=1e-6)
    weight = critic[0].weight  # and its gradient by the critic, through all three features
    (grad,) = torch.autograd.grad(penalty(), weight)
    with torch.no_grad():
        weight[0, 0] += h
    high = penalty().item()
    with torch.no_grad():
        weight[0, 0] -= 2 * h
    assert grad[0, 0].item() == pytest.approx((high - penalty().item()) / (2 * h), rel=1e-4)


def test_activation_penalty():
    outputs = [[randn(4, 2, 3, 3, seed=i), randn(4, 5, seed=i + 1)] for i in (0, 7)]
    expected = 0.0
    for side in outputs:
        for layer in side:
            expected += sum(v**2 for v in layer.flatten().tolist()) / layer.numel()
    assert S.activation_penalty(*outputs).item() == pytest.approx(expected)
    critic = S.Critic((1, 8, 8), 16, 4)
    assert [tuple(h.shape) for h in critic(torch.rand(2, 1, 8, 8))] == [
        (2, 4, 8, 8), (2, 8, 4, 4), (2, 8, 4, 4), (2, 16)
    ]  # fmt: skip


def test_diagonal_of_rq_linear():
    """D-BIN-2: taking off len(bandwidths) per entry leaves (E||x||^2 + E||y||^2) / (m - 1) = 0.508."""
    exact, coded = (
        arguments(kernel="rq-linear", as_coded=c, bandwidths=(0.1, 1.0, 10.0)) for c in (False, True)
    )
    values = []
    for draw in range(200):
        x, y = randn(64, 16, seed=draw), randn(64, 16, seed=1000 + draw)
        blocks = kernels.gram_blocks(x, y, "rq-linear", exact.bandwidths)
        values.append([S.squared_mmd(*blocks, exact), S.squared_mmd(*blocks, coded)])
        k_xx, k_xy, k_yy = kernels.gram_blocks(x, y, "rq-linear", exact.bandwidths)
        literal = (k_xx.sum() - 64 * 3 + k_yy.sum() - 64 * 3) / (64 * 63) - 2 * k_xy.mean()
        assert values[-1][1].item() == pytest.approx(literal.item())
    mean_exact, mean_coded = torch.tensor(values).mean(0).tolist()
    assert mean_coded - mean_exact == pytest.approx(0.508, abs=0.005)
    assert abs(mean_exact) < 0.05
    blocks = kernels.gram_blocks(x, y, "rbf", (1.0,))  # where the constant is right, nothing changes
    assert S.squared_mmd(*blocks, arguments(as_coded=True)) == S.squared_mmd(*blocks, arguments())


# --- schedule and clipping ---------------------------------------------------------------------------


def test_schedule():
    args = arguments()
    counts = [S.critic_steps(step, args) for step in range(1, 1503)]
    expected = [10 if i < 20 or i % 500 == 0 else 5 for i in range(1502)]  # i = generator updates done
    assert counts == expected
    assert sum(counts) == 1502 * 5 + 5 * (20 + 3)
    assert {S.critic_steps(step, arguments(warmup_critic=5)) for step in range(1, 1503)} == {5}


def test_clipping_is_per_variable():
    network = nn.Linear(3, 2)
    network.weight.grad, network.bias.grad = torch.full((2, 3), 2.0), torch.tensor([0.3, 0.4])
    S.clip_each(network, 0)
    assert network.weight.grad.norm().item() == pytest.approx(24**0.5)
    S.clip_each(network, 1.0)
    assert network.weight.grad.norm().item() == pytest.approx(1, abs=1e-5)
    assert network.bias.grad.tolist() == pytest.approx([0.3, 0.4])  # a global norm would have moved it


# --- three-sample test ---------------------------------------------------------------------------


def cubic(a, b):
    return (np.dot(a, b) / len(a) + 1) ** 3


def test_kernel_sums_against_loops():
    """The estimates restated: means, and variances of means less those of their noise, pair by pair."""
    n = 7
    x, y, z = (randn(n, 3, seed=s).numpy() + s / 4 for s in (1, 2, 3))
    mmd2, own, by_real = {}, {}, {}
    pairs = [(i, j) for i in range(n) for j in range(n)]
    for name, f in (("y", y), ("z", z)):
        within = [np.mean([cubic(f[j], f[i]) for i in range(n) if i != j]) for j in range(n)]
        across = [np.mean([cubic(x[i], f[j]) for i in range(n)]) for j in range(n)]
        by_real[name] = [np.mean([cubic(x[i], f[j]) for j in range(n)]) for i in range(n)]
        mmd2[name] = np.mean(within) - 2 * np.mean(across)
        kernel2 = np.mean([cubic(f[i], f[j]) ** 2 for i, j in pairs if i != j])
        g_yy = kernel2 - 2 * np.mean(np.square(within)) + np.mean(within) ** 2
        kernel2 = np.mean([cubic(x[i], f[j]) ** 2 for i, j in pairs])
        g_xy = kernel2 - np.mean(np.square(across)) - np.mean(np.square(by_real[name])) + np.mean(across) ** 2
        first = np.var([w - a for w, a in zip(within, across)], ddof=1)
        own[name] = 4 / n * first - (2 * g_yy / (n * (n - 1)) + 4 * g_xy / n**2)
    shared = 4 / n * np.var([a - b for a, b in zip(by_real["y"], by_real["z"])], ddof=1)
    new, old = (S.kernel_sums(*map(torch.tensor, (x, f))) for f in (y, z))
    t, p = S.three_sample_test(new, old)
    assert t == pytest.approx((mmd2["y"] - mmd2["z"]) / math.sqrt(own["y"] + own["z"] + shared), rel=1e-10)
    assert p == pytest.approx((1 + math.erf(t / math.sqrt(2))) / 2, rel=1e-10)
    assert S.three_sample_test(new, old, floor=100.0)[0] == pytest.approx(
        (mmd2["y"] - mmd2["z"]) / 10, rel=1e-10
    )


# Distributions on two or three points of the line, where expectations are sums.
POINTS = [0.0, 1.0, -0.5]
LAWS = {"x": [0.5, 0.5, 0.0], "y": [0.3, 0.7, 0.0], "z": [0.6, 0.4, 0.0]}


def exact_variance(laws, n):
    """Hoeffding's: first-order terms of y, z and x, second-order ones of the kernels' remainders."""
    k = np.array([[cubic([a], [b]) for b in POINTS] for a in POINTS])
    x, y, z = (np.array(laws[name]) for name in "xyz")

    def variance(values, law):
        return values**2 @ law - (values @ law) ** 2

    def remainder(law, other):
        total = law @ k**2 @ other - (law @ k @ other) ** 2
        return total - variance(k @ other, law) - variance(k.T @ law, other)

    first = variance(k @ y - k @ x, y) + variance(k @ z - k @ x, z) + variance(k @ y - k @ z, x)
    second = 2 / (n * (n - 1)) * (remainder(y, y) + remainder(z, z))
    return 4 / n * first + second + 4 / n**2 * (remainder(x, y) + remainder(x, z))


def test_the_variance_that_is_estimated_is_that_of_the_difference():
    """The formula against all 512 outcomes of three draws from each law on two points."""
    n, outcomes = 3, []
    for drawn in itertools.product((0, 1), repeat=3 * n):
        p = np.prod([LAWS[name][i] for name, i in zip("xxxyyyzzz", drawn)])
        x, y, z = np.array(POINTS)[np.reshape(drawn, (3, n))][..., None]
        new, old = (S.kernel_sums(*map(torch.tensor, (x, f))) for f in (y, z))
        outcomes.append((p, (new["value"] - old["value"]).item()))
    p, difference = np.array(outcomes).T
    assert p.sum() == pytest.approx(1)
    assert p @ difference**2 - (p @ difference) ** 2 == pytest.approx(exact_variance(LAWS, n), rel=1e-10)


@pytest.mark.parametrize("degenerate", [False, True])
def test_the_variance_is_estimated_without_much_bias(degenerate):
    """The mean of 300 estimates from 100 samples each; of equal laws the first-order term vanishes."""
    laws = {name: [0.2, 0.3, 0.5] for name in "xyz"} if degenerate else LAWS
    generator = np.random.default_rng(0)
    found = []
    for _ in range(300):
        draws = (generator.choice(POINTS, (100, 1), p=laws[name]) for name in "xyz")
        x, y, z = map(torch.tensor, draws)
        new, old = S.kernel_sums(x, y), S.kernel_sums(x, z)
        shared = 4 / 100 * (new["by_real"] - old["by_real"]).var()
        found.append((new["variance"] + old["variance"] + shared).item())
    assert np.mean(found) == pytest.approx(exact_variance(laws, 100), rel=0.05)


def test_the_test_is_calibrated():
    """d = 8, 200 samples, both shifted by 0.5: t has the standard deviation 1 (0.97 in methods.md 12.4)."""
    found = []
    for seed in range(400):
        x, y, z = (randn(200, 8, seed=3 * seed + i) + (0.5 if i else 0.0) for i in range(3))
        sums = S.kernel_sums(x, y), S.kernel_sums(x, z)
        found.append(S.three_sample_test(*sums))
    t, p = np.array(found).T
    assert t.std() == pytest.approx(1, abs=0.08)
    assert abs(t.mean()) < 0.15
    assert np.mean(p <= 0.1) == pytest.approx(0.1, abs=0.04)


def test_an_improvement_is_seen_and_its_opposite_is_not():
    x, near, far = randn(200, 8, seed=1), randn(200, 8, seed=2) + 0.1, randn(200, 8, seed=3) + 0.6
    near, far = S.kernel_sums(x, near), S.kernel_sums(x, far)
    assert S.three_sample_test(near, far)[1] < 0.001
    assert S.three_sample_test(far, near)[1] > 0.999


# --- learning rate by KID ------------------------------------------------------------------------


def evaluated(value):
    """kernel_sums of an evaluation with this KID, whose test has the floor for variance: 0.00316^2."""
    sums = dict(value=value, variance=0.0)
    return {k: torch.tensor(v, dtype=torch.float64) for k, v in sums.items()} | {"by_real": torch.zeros(5)}


def test_a_scripted_sequence():
    """methods.md 12.10: ten appends, three failures, memory of 3, seven appends, tests again."""
    schedule, lengths = S.KidSchedule(0.5), []
    for i in range(1, 14):
        assert schedule.step(evaluated(0.1)) == (0.5 if i == 13 else 1.0)
        lengths.append(len(schedule.memory))
    assert lengths == [*range(1, 11), 10, 10, 3]
    assert [schedule.step(evaluated(0.1)) for _ in range(9)] == [1.0] * 9  # 7 appends, and failures 1 and 2
    assert len(schedule.memory) == 10
    assert schedule.step(evaluated(0.1)) == 0.5


def test_which_evaluation_is_compared_with_which():
    schedule = S.KidSchedule(0.8)
    for value in range(10):  # 1.0, 0.9, ... 0.1
        schedule.step(evaluated(1 - value / 10))
    assert schedule.step(evaluated(0.95)) == 1.0  # better than the oldest, though worse than the last
    assert [round(sums["value"].item(), 2) for sums in schedule.memory] == [
        0.9,
        *(i / 10 for i in range(8, 0, -1)),
        0.95,
    ]
    assert schedule.step(evaluated(0.897)) == 1.0  # by 0.003, less than 1.28 * 0.00316: not enough
    assert schedule.failures == 1
    assert schedule.memory[-1]["value"] == 0.95  # the memory stays as it is
    assert schedule.step(evaluated(0.895)) == 1.0  # by 0.005
    assert schedule.failures == 0
    assert schedule.memory[0]["value"] == 0.8
    for expected in (1.0, 1.0, 0.8):
        assert schedule.step(evaluated(0.8)) == expected
    assert [round(sums["value"].item(), 3) for sums in schedule.memory] == [0.95, 0.895, 0.8]


def test_a_schedule_goes_on_from_a_checkpoint(tmp_path):
    generator = np.random.default_rng(0)
    values = generator.normal(0.1, 0.004, 60)
    expected, whole = [], S.KidSchedule(0.8)
    for value in values:
        expected.append(whole.step(evaluated(value)))
    assert expected.count(0.8) >= 2
    schedule, found = S.KidSchedule(0.8), []
    for value in values:
        found.append(schedule.step(evaluated(value)))
        torch.save({"schedule": schedule.state_dict()}, tmp_path / "checkpoint.pt")
        schedule = S.KidSchedule(0.8)
        state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
        schedule.load_state_dict(state["schedule"])
    assert found == expected


# --- networks ----------------------------------------------------------------------------------------


def made(shape, norm, sn_scale=False):
    torch.manual_seed(0)
    critic = S.Critic(shape, 1, 2 if shape[-1] == 64 else 8)
    S.normalise(critic, norm, sn_scale)
    return critic


def matrices(critic):
    critic.eval()
    found = [layer.weight.detach().flatten(1) for layer in critic.weighted]
    critic.train()
    return found


@pytest.mark.parametrize("norm", ["pim", "orthogonal"])
def test_a_copy_of_a_critic_normalises_its_own_weights(norm):
    """And layers without a bias, which a network of one's own may have."""
    torch.manual_seed(0)
    critic = S.Critic((1, 8, 8), 1, 8)
    for layer in critic.weighted[:-1]:
        layer.bias = None
    S.normalise(critic, norm, sn_scale=norm == "pim")
    copied, x = copy.deepcopy(critic).eval(), torch.rand(4, 1, 8, 8)
    before = copied(x)[-1]
    assert before.norm() > 0
    with torch.no_grad():
        for p in critic.parameters():
            p.mul_(3)
    assert torch.equal(copied(x)[-1], before)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 64, 64)])
def test_norms_against_the_svd(shape):
    plain = matrices(made(shape, "none"))
    spectral, orthogonal = made(shape, "pim"), made(shape, "orthogonal")
    for _ in range(200):
        [layer.weight for layer in spectral.weighted]  # a step of power iteration each
    for before, after in zip(plain, matrices(spectral)):
        assert torch.linalg.matrix_norm(after, 2).item() == pytest.approx(1, abs=2e-3)
        torch.testing.assert_close(after / after.norm(), before / before.norm())  # a factor, nothing else
    for matrix in matrices(orthogonal):
        values = torch.linalg.svdvals(matrix)
        torch.testing.assert_close(values, torch.ones_like(values), rtol=0, atol=1e-4)
    x = torch.rand(3, *shape)
    assert all(made(shape, norm)(x)[-1].shape == (3, 1) for norm in ("none", "pim", "orthogonal"))


@pytest.mark.parametrize("norm", ["pim", "orthogonal"])
def test_norms_stay_in_float32_under_autocast(norm, monkeypatch):
    """On a CPU only the products of orthogonal would be in bfloat16; on a GPU mv, of spectral, too."""
    critic, mv, seen = made((1, 8, 8), norm, True), torch.mv, []
    expected = matrices(critic)
    watched = lambda *args, **out: (seen.append(torch.is_autocast_enabled("cpu")), mv(*args, **out))[1]  # noqa: E731
    monkeypatch.setattr(torch, "mv", watched)
    with torch.autocast("cpu", torch.bfloat16):
        found = matrices(critic)
        assert critic(torch.rand(2, 1, 8, 8))[-1].dtype == torch.bfloat16
    assert all(torch.equal(a, b) for a, b in zip(found, expected))
    assert all(matrix.dtype == torch.float32 for matrix in found)
    assert len(seen) > 0 or norm == "orthogonal"
    assert not any(seen)


def test_learned_scale_multiplies_the_normalised_weight():
    critic, without = made((1, 8, 8), "pim", True), made((1, 8, 8), "pim")
    factors = [p for name, p in critic.named_parameters() if name.endswith("factor")]
    assert len(factors) == len(critic.weighted) == 4
    assert not any(name.endswith("factor") for name, _ in without.named_parameters())
    before = matrices(critic)
    with torch.no_grad():
        factors[1].fill_(3.0)
    for i, (a, b) in enumerate(zip(matrices(critic), before)):
        torch.testing.assert_close(a, b * (3.0 if i == 1 else 1.0))


def test_condition_numbers():
    for norm in ("none", "pim", "orthogonal"):
        critic = made((1, 8, 8), norm)
        state = copy.deepcopy(critic.state_dict())
        got = list(S.condition_numbers(critic).values())
        weights = matrices(critic)
        assert [m.shape for m in weights] == [(8, 9), (16, 128), (16, 144), (1, 256)]
        for number, matrix in zip(got, weights, strict=True):
            values = torch.linalg.svdvals(matrix)
            assert number.item() == pytest.approx((values[0] / values[-1]).item(), rel=1e-4)
            assert norm != "orthogonal" or number.item() == pytest.approx(1, abs=1e-4)
        assert critic.training
        assert all(torch.equal(state[name], value) for name, value in critic.state_dict().items())


def test_networks_are_those_of_methods_7_4():
    def conv(i, o, k, bias=1):
        return i * o * k * k + bias * o

    def pair(side):
        with torch.device("meta"):  # shapes alone
            generator, critic = S.Generator((3, side, side), 128, 64), S.Critic((3, side, side), 1, 64)
            return generator, critic, [tuple(h.shape[1:]) for h in critic(generator(torch.rand(2, 128)))]

    generator, critic, shapes = pair(32)  # sngan
    expected = 128 * 8192 + 8192 + conv(512, 256, 5) + conv(256, 128, 5) + conv(128, 64, 5) + conv(64, 3, 3)
    assert parameters(generator) == expected + 2 * (512 + 256 + 128 + 64)
    expected = conv(3, 64, 3) + conv(64, 128, 4) + conv(128, 128, 3) + conv(128, 256, 4) + conv(256, 256, 3)
    assert parameters(critic) == expected + conv(256, 512, 4) + conv(512, 512, 3) + 512 * 16 + 1
    assert [shape[0] for shape in shapes] == [64, 128, 128, 256, 256, 512, 512, 1]

    generator, critic, shapes = pair(64)  # snresnet
    block = lambda i, o, bias: conv(i, o, 3, bias) + conv(o, o, 3) + conv(i, o, 1)  # noqa: E731
    pairs = [(64, 128), (128, 256), (256, 512), (512, 1024)]
    expected = (
        128 * 16384 + 16384 + sum(block(o, i, 0) + 2 * (i + o) for i, o in pairs) + 128 + conv(64, 3, 3)
    )
    assert parameters(generator) == expected
    down = lambda i, o: conv(i, i, 3, 0) + conv(i, o, 3) + conv(i, o, 1)  # noqa: E731
    assert parameters(critic) == conv(3, 64, 3) + sum(down(i, o) for i, o in pairs) + 1024 + 1 == 10_103_297
    assert shapes[-2:] == [(1024, 4, 4), (1,)]  # the sum over space is no output

    generator, critic, shapes = pair(160)  # g-resnet5 and dcgan5
    assert critic.weighted[-1].in_features == 25_600
    assert shapes[-2] == (1024, 5, 5)
    expected = 128 * 25_600 + 25_600 + sum(block(o, i, 0) for i, o in pairs) + 128 + conv(64, 3, 5)
    assert parameters(generator) == expected  # batch norm in the last layer only
    assert parameters(critic) == conv(3, 64, 5) + sum(conv(i, o, 5) for i, o in pairs) + 25_600 + 1


def glorot(layer):
    """Standard deviation of Glorot's uniform law for a convolution."""
    fans = (layer.in_channels + layer.out_channels) * layer.kernel_size[0] ** 2
    return (2 / fans) ** 0.5


@pytest.mark.parametrize("side", [8, 32, 64, 128])
def test_initial_laws(side):
    """Those of [C], measured: standard deviation (0.88 of nominal if truncated), largest entry, biases."""
    torch.manual_seed(0)
    generator, critic = S.Generator((3, side, side), 128, 32), S.Critic((3, side, side), 4, 32)
    last = generator.layers[-2]
    expected = {generator.layers[0]: (0.01, "normal"), last: (0.02, "normal")}
    expected |= {m: (0.02, "normal") for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)}
    *convolutions, features = critic.weighted
    expected[features] = (0.02 if side < 64 else 0.01, "normal")
    for block in [m for m in [*generator.modules(), *critic.modules()] if isinstance(m, S.ResBlock)]:
        expected |= {m: (glorot(m), "uniform") for m in (block.conv1, block.conv2, block.shortcut)}
    first = convolutions[0]
    if side == 64:
        expected[first] = glorot(first), "uniform"
    expected |= {m: (0.02 * 0.8796, "truncated") for m in convolutions if m not in expected}
    largest = {"uniform": 3**0.5, "truncated": 2 / 0.8796, "normal": 5.5}  # in standard deviations
    for layer, (std, law) in expected.items():
        weight = layer.weight.detach()
        few = 4 * (2 * weight.numel()) ** -0.5  # four standard errors of a standard deviation
        assert weight.std().item() == pytest.approx(std, rel=few)
        assert weight.abs().max() <= largest[law] * std * 1.0001
        if law == "normal" and weight.numel() > 500:  # 1 in 22 of a normal is beyond two deviations
            assert weight.abs().max() > 2.4 * std
        if layer.bias is not None:
            assert not layer.bias.any()
    layers = [m for m in [*generator.modules(), *critic.modules()] if hasattr(m, "kernel_size")]
    assert {*layers, generator.layers[0], features} <= expected.keys()


@pytest.mark.parametrize("up", [False, True])
def test_residual_block_against_loops(up):
    """[C]'s: halves by the mean of four slices, after the second convolution and before the shortcut."""
    torch.manual_seed(0)
    block = S.ResBlock(2, 3, up, batch_norm=False).double()
    assert block.conv1.bias is None
    x = randn(2, 2, 4, 4)

    def convolution(x, layer, padding):
        x, weight = nn.functional.pad(x, [padding] * 4), layer.weight
        k = weight.shape[2]
        out = torch.zeros(len(x), len(weight), x.shape[2] - k + 1, x.shape[3] - k + 1, dtype=x.dtype)
        for i in range(out.shape[2]):
            for j in range(out.shape[3]):
                window = x[:, :, i : i + k, j : j + k]
                out[:, :, i, j] = torch.einsum("nckl,ockl->no", window, weight)
        return out if layer.bias is None else out + layer.bias[:, None, None]

    def halved(x):
        return sum(x[:, :, i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4

    def doubled(x):
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = x.clamp_min(0)
    h = convolution(doubled(h) if up else h, block.conv1, 1)
    h = convolution(h.clamp_min(0), block.conv2, 1)
    shortcut = convolution(doubled(x) if up else halved(x), block.shortcut, 0)
    torch.testing.assert_close(block(x), shortcut + (h if up else halved(h)))


def test_features_are_of_the_sum_over_space():
    torch.manual_seed(0)
    critic = S.Critic((1, 64, 64), 3, 2)
    *_, before, features = critic(torch.rand(2, 1, 64, 64))
    total = torch.where(before > 0, before, 0.2 * before).sum((2, 3))
    last = critic.weighted[-1]
    torch.testing.assert_close(features, total @ last.weight.T + last.bias)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (1, 28, 28), (3, 64, 64), (1, 128, 128)])
def test_second_derivatives_of_the_networks(shape):
    """A directional derivative of the log of the scale by the critic's parameters, in float64."""
    torch.manual_seed(0)
    critic = S.Critic(shape, 2, 2)
    for parameter in critic.parameters():
        nn.init.normal_(parameter, std=0.3)
    critic.double()
    real = torch.rand(2, *shape).double().requires_grad_()

    def loss():
        return S.distance_scale(critic(real)[-1], real, arguments(), True).log()

    direction = [torch.randn_like(p) for p in critic.parameters()]
    grads = torch.autograd.grad(loss(), list(critic.parameters()), allow_unused=True)
    expected = sum((g * d).sum() for g, d in zip(grads, direction) if g is not None).item()
    values = []
    for h in (1e-6, -2e-6):
        with torch.no_grad():
            for p, d in zip(critic.parameters(), direction):
                p += h * d
        values.append(loss().item())
    assert expected == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3)


def test_batch_statistics_and_range():
    assert S.DEFAULTS["images"]["sample_bn"] == "batch"
    noise = S.draw_noise(4000, arguments(latent_dim=3), torch.device("cpu"))
    assert noise.min() < -0.99
    assert noise.max() > 0.99
    assert noise.std().item() == pytest.approx(3**-0.5, abs=0.01)
    images = S.Generator((1, 8, 8), 3, 4)(noise)
    assert images.min() >= 0
    assert images.max() <= 1


# --- runs --------------------------------------------------------------------------------------------

SMALL = ["--width", "4", "--batch-size", "8", "--log-every", "1", "--eval-samples", "16"]
SMALL += ["--warmup-critic", "2", "--eval-every", "0"]


def smoke(tmp_path, *options):
    S.train(run.parse(S.Args, [*SMALL, "--total-steps", "2", "--runs-dir", str(tmp_path), *options]))
    (folder,) = tmp_path.iterdir()
    return json.loads((folder / "args.json").read_text()), torch.load(folder / "checkpoint.pt")


@pytest.mark.parametrize(
    "options",
    [
        "--critic-norm none --log-condition-numbers",
        "--critic-norm pim --log-condition-numbers",
        "--critic-norm pim --no-sn-scale",
        "--critic-norm orthogonal --log-condition-numbers",
        "--constraint none",
        "--constraint none --critic-norm pim --no-sn-scale",
        "--constraint swgan",
        "--constraint swgan --scale-form poster",
        "--constraint gradient-penalty",
        "--constraint gradient-penalty --as-coded --bandwidths 0.1 1 10",
        "--constraint gradient-penalty --kernel distance --critic-norm pim",
        "--constraint gradient-penalty --precision bf16",
        "--scale-form poster --kernel rq --feature-dim 3",
        "--kernel linear",
        "--kernel rq-linear --precision bf16",
        "--clip-norm 0 --critic-norm orthogonal --precision bf16",
    ],
)
@pytest.mark.parametrize("dataset", ["digits", "8gaussians"])
def test_variants_train(options, dataset, tmp_path):
    _, state = smoke(tmp_path, "--dataset", dataset, *options.split())
    assert state["step"] == 2
    steps = {int(s["step"]) for s in state["c_optimizer"]["state"].values()}
    assert steps == {4}  # warm-up of 2, twice


def test_defaults_by_constraint(tmp_path):
    args, _ = smoke(tmp_path / "a")
    assert (args["kernel"], args["feature_dim"], args["lambda_scale"]) == ("rbf", 1, 10.0)
    args, _ = smoke(tmp_path / "b", "--constraint", "gradient-penalty")
    assert (args["kernel"], args["feature_dim"], args["critic_norm"]) == ("rq-linear", 16, "none")
    assert args["bandwidths"] == [0.2, 0.5, 1.0, 2.0, 5.0]
    args, _ = smoke(tmp_path / "c", "--scale-form", "poster", "--dataset", "swissroll")
    assert args["lambda_scale"] == 1.0


def test_images_per_update_and_steps_between_tests_of_kid():
    """On ImageNet those of three GPUs with 64 each; [C] tests every 2000 steps, on MNIST every 500."""
    per_update = {
        name: S.resolve(S.Args(dataset=name)).batch_size for name in ("imagenet", "cifar10", "celeba")
    }
    assert per_update == {"imagenet": 192, "cifar10": 64, "celeba": 64}
    every = lambda name, **given: S.resolve(S.Args(dataset=name, lr_schedule="kid", **given)).eval_every  # noqa: E731
    assert [every(name) for name in ("cifar10", "celeba", "mnist", "fashion-mnist")] == [2000, 2000, 500, 500]
    assert (every("digits"), every("cifar10", eval_every=7)) == (250, 7)
    assert S.resolve(S.Args(dataset="cifar10")).eval_every == 10_000


def test_rate_falls_where_kid_stops_improving(tmp_path, monkeypatch):
    """Those of steps 0 to 9 are not tested, 10 to 12 fail: 0.8 for both players, kept by a checkpoint."""
    tests = []
    monkeypatch.setattr(S, "three_sample_test", lambda *_: (tests.append(1), (0.0, 0.5))[1])
    features = lambda images: (images.flatten(1).float() / 255, images.flatten(1)[:, :9].float() / 255)  # noqa: E731
    monkeypatch.setattr(evaluation, "load_inception", lambda path, device: (features, "00000000"))
    options = ["--lr-schedule", "kid", "--n-critic", "1", "--warmup-critic", "1"]
    options += ["--eval-features", "inception", "--data-dir", str(tmp_path / "data")]
    options += ["--critic-learning-rate", "2e-3"]
    smoke(tmp_path / "runs", *options, "--total-steps", "11", "--eval-every", "1")
    (folder,) = (tmp_path / "runs").iterdir()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert (len(tests), state["lr_schedule"]["failures"]) == (2, 2)
    rates = lambda state: [state[name]["param_groups"][0]["lr"] for name in ("g_optimizer", "c_optimizer")]  # noqa: E731
    assert rates(state) == [1e-3, 2e-3]
    with pytest.raises(run.BadInput, match="--eval-samples 12"):
        S.train(run.parse(S.Args, ["--resume", str(folder), "--eval-samples", "12"]))
    S.train(run.parse(S.Args, ["--resume", str(folder), "--total-steps", "12"]))
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    assert rates(state) == pytest.approx([8e-4, 1.6e-3])
    assert len(state["lr_schedule"]["memory"]) == 3


def test_rates_fall_to_a_floor_and_keep_their_ratio():
    """0.8 at a time from 1.8e-6: 1.44e-6, 1.152e-6, then the floor; the critic's is a tenth all the way."""
    weight = nn.Parameter(torch.zeros(1))
    g_optimizer, c_optimizer = torch.optim.Adam([weight], 1.8e-6), torch.optim.Adam([weight], 1.8e-7)
    found = []
    for _ in range(4):
        S.lower_rates(g_optimizer, c_optimizer, 0.8)
        found.append([optimizer.param_groups[0]["lr"] for optimizer in (g_optimizer, c_optimizer)])
    expected = [1.44e-6, 1.44e-7, 1.152e-6, 1.152e-7, 1e-6, 1e-7, 1e-6, 1e-7]
    assert [rate for pair in found for rate in pair] == pytest.approx(expected)


def test_the_evaluation_of_step_0_is_the_first_that_is_remembered(tmp_path, monkeypatch):
    """Also by a run that was stopped before it: its checkpoint of step 0 remembers none."""
    noted = []
    step = S.KidSchedule.step
    monkeypatch.setattr(S.KidSchedule, "step", lambda self, sums: (noted.append(sums), step(self, sums))[1])
    options = ["--lr-schedule", "kid", "--n-critic", "1", "--warmup-critic", "1", "--total-steps", "3"]
    save = run.save_checkpoint
    monkeypatch.setattr(run, "save_checkpoint", lambda *given: save(*given) if given[3] == 0 else None)
    smoke(tmp_path, *options, "--eval-every", "2")
    assert len(noted) == 2  # steps 0 and 2; that of the last step is no multiple of 2
    assert not torch.equal(noted[0]["value"], noted[1]["value"])
    (folder,) = tmp_path.iterdir()
    assert torch.load(folder / "checkpoint.pt")["lr_schedule"]["memory"] == []
    monkeypatch.setattr(run, "save_checkpoint", save)
    S.train(run.parse(S.Args, ["--resume", str(folder)]))
    state = torch.load(folder / "checkpoint.pt")
    for sums, again, kept in zip(noted[:2], noted[2:], state["lr_schedule"]["memory"], strict=True):
        assert torch.equal(sums["by_real"], again["by_real"])
        assert torch.equal(sums["by_real"], kept["by_real"])


def test_rate_on_pixels_is_decided_by_the_noise(tmp_path, monkeypatch):
    """The authors' floor of the variance would hide what the KID of pixels says."""
    floors = []
    monkeypatch.setattr(S, "three_sample_test", lambda *a: (floors.append(a[2]), (0.0, 0.0))[1])
    options = ["--lr-schedule", "kid", "--n-critic", "1", "--warmup-critic", "1", "--total-steps", "10"]
    smoke(tmp_path, *options, "--eval-every", "1")
    assert floors == [1e-12]
