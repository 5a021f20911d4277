"""Kernels and MMD estimators against float64 loops, closed forms, quadrature and torch-fidelity."""

import math

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import nn

from common import kernels
from common.kernels import fused_mmd2, gram_blocks, mmd2, sqrt_mmd, squared_distances
from reproduce.speed import Counter, count, plain_mmd2
from reproduce.speed import fused_mmd2 as fused_rbf

# name: bandwidths. More than one, unequal: a mean instead of a sum, or a mixed-up order, would show.
KERNELS = {
    "rbf": (0.5, 1.0, 3.0),
    "rq": (0.2, 1.0, 5.0),
    "rq-linear": (0.1, 1.0, 10.0),
    "laplacian": (0.7, 2.0),
    "distance": (),
    "linear": (),
}
SEMIDEFINITE = [name for name in KERNELS if name != "distance"]
ESTIMATORS = ["biased", "unbiased", "u-statistic"]


def kernel_of_two_points(name, a, b):
    """The definition of each kernel, for two float64 NumPy points."""
    d2, dot = float(((a - b) ** 2).sum()), float((a * b).sum())
    rq = sum((1 + d2 / (2 * s)) ** (-s) for s in KERNELS[name])
    return {
        "rbf": sum(math.exp(-d2 / (2 * s * s)) for s in KERNELS[name]),
        "rq": rq,
        "rq-linear": rq + dot,
        "laplacian": sum(math.exp(-math.sqrt(d2) / s) for s in KERNELS[name]),
        "distance": -math.sqrt(d2),
        "linear": dot,
    }[name]


def gram_by_loop(name, x, y):
    return np.array([[kernel_of_two_points(name, a, b) for b in y.numpy()] for a in x.numpy()])


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def relative_error(got, reference):
    return ((got.double() - reference).norm() / reference.norm()).item()


# --- squared distances ---------------------------------------------------------------------------


def features(case, n=64, m=48):
    """Pairs of float32 feature sets (n, 16) and (m, 16), and the typical size of their entries."""
    x, y = randn(n, 16, seed=1, dtype=torch.float32), randn(m, 16, seed=2, dtype=torch.float32)
    if case == "offset":
        return x + 300, y + 300, 1.0
    if case == "duplicates":
        return torch.cat([x[: n // 2]] * 2), torch.cat([x[: m // 2], y[: m // 2]]), 1.0
    if case == "close pairs":
        return x, x[:m] + 1e-4 * y / y.norm(dim=1, keepdim=True), 1.0
    scale = {"generic": 1.0, "large": 1000.0, "small": 0.001}[case]
    return x * scale, y * scale, scale


CASES = ["generic", "offset", "duplicates", "large", "small", "close pairs"]


@pytest.mark.parametrize("case", CASES)
def test_squared_distances_are_accurate(case):
    x, y, _ = features(case)
    reference = (x.double()[:, None] - y.double()[None]).square().sum(2)
    got = squared_distances(x, y)
    assert got.shape == (64, 48)
    assert got.dtype == torch.float32
    assert (got >= 0).all()
    assert relative_error(got, reference) <= (1e-4 if case == "close pairs" else 5e-6)


@pytest.mark.parametrize("functional", ["random", "rbf"])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_squared_distances_are_accurate(case, functional):
    """Of a random linear functional of d2, and of the sum of an rbf of it, in both arguments."""
    x, y, scale = features(case)
    weights = randn(64, 48, seed=3)

    def of(d2):
        if functional == "random":
            return (d2 * weights.to(d2.dtype)).sum()
        return kernels.rbf(d2, (scale, 4 * scale)).sum()

    x64, y64 = x.double().requires_grad_(), y.double().requires_grad_()
    references = torch.autograd.grad(of((x64[:, None] - y64[None]).square().sum(2)), (x64, y64))
    x, y = x.requires_grad_(), y.requires_grad_()
    gradients = torch.autograd.grad(of(squared_distances(x, y)), (x, y))
    for got, reference in zip(gradients, references):
        assert reference.norm() > 0
        assert relative_error(got, reference) <= (1e-4 if case == "close pairs" else 5e-6)


def test_pairs_close_together_keep_their_distances():
    """The matched pairs alone, 1e-4 apart and 1e-4 from each other: no far pair hides their error."""
    x = 1e-4 * randn(20, 16, seed=1, dtype=torch.float32) + 1
    y = 1e-4 * randn(20, 16, seed=2, dtype=torch.float32) + 1
    reference = (x.double()[:, None] - y.double()[None]).square().sum(2)
    assert relative_error(squared_distances(x, y), reference) <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_types_are_promoted_and_float64_is_kept_also_under_autocast(dtype):
    x, y = randn(8, 4, seed=1).to(dtype), randn(6, 4, seed=2).to(dtype)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    outside = squared_distances(x, y)
    with torch.autocast("cpu", torch.bfloat16):
        inside = squared_distances(x, y)
    assert outside.dtype == inside.dtype == expected
    assert torch.equal(outside, inside)
    assert relative_error(outside, (x.double()[:, None] - y.double()[None]).square().sum(2)) < 1e-6


@pytest.mark.parametrize("name", KERNELS)
def test_gram_blocks_do_not_feel_autocast(name):
    x, y = randn(8, 4, seed=1, dtype=torch.float32), randn(6, 4, seed=2, dtype=torch.float32)
    outside = gram_blocks(x, y, name, KERNELS[name])
    with torch.autocast("cpu", torch.bfloat16):
        inside = gram_blocks(x, y, name, KERNELS[name])
    for a, b in zip(outside, inside):
        assert a.dtype == b.dtype == torch.float64
        assert torch.equal(a, b)


# --- kernels -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_gram_blocks_against_double_loops(name):
    x, y = randn(7, 3, seed=1), randn(5, 3, seed=2) + 0.5
    k_xx, k_xy, k_yy = gram_blocks(x, y, name, KERNELS[name])
    np.testing.assert_allclose(k_xx.numpy(), gram_by_loop(name, x, x), rtol=0, atol=1e-12)
    np.testing.assert_allclose(k_xy.numpy(), gram_by_loop(name, x, y), rtol=0, atol=1e-12)
    np.testing.assert_allclose(k_yy.numpy(), gram_by_loop(name, y, y), rtol=0, atol=1e-12)


def test_every_kernel_is_defined_here_too():
    message = "add a row to KERNELS, and the definition to kernel_of_two_points"
    assert set(kernels.RADIAL) | {"linear"} == set(KERNELS), message


@pytest.mark.parametrize("name", sorted(set(kernels.RADIAL) - {"rq-linear"}))
def test_radial_kernels_of_given_distances(name):
    """At distance 0, 1, 2 and far away, one pair at a time."""
    distances = [0.0, 1.0, 2.0, 30.0]
    got = kernels.RADIAL[name](torch.tensor(distances, dtype=torch.float64).square(), KERNELS[name])
    expected = [kernel_of_two_points(name, np.array([0.0]), np.array([d])) for d in distances]
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-14, atol=3e-26)  # exp(-60), up to three times


@pytest.mark.parametrize("name", sorted(set(kernels.RADIAL) - {"rq", "rq-linear", "distance"}))
def test_no_number_underflows_however_far_the_points(name):
    """Each float32 of value and gradient is 0 or normal: others take a CPU a hundred times as long."""
    d2 = torch.logspace(-3, 8, 2000).requires_grad_()
    k = kernels.RADIAL[name](d2, KERNELS[name])
    (gradient,) = torch.autograd.grad(k, d2, torch.full_like(k, 1e-6))  # 1 / n^2
    normal = torch.finfo(torch.float32).tiny
    assert k.min() >= normal
    assert (gradient.abs()[gradient != 0] >= normal).all()
    assert gradient[-1] == 0  # as good as: e^-60 is 9e-27


@pytest.mark.parametrize(("name", "at_zero"), [("rbf", 3), ("rq", 3), ("laplacian", 2), ("distance", 0)])
def test_diagonal_is_exactly_the_kernel_at_zero(name, at_zero):
    """Also of large float32 features, whose rounding would show."""
    x, y = (100 * randn(30, 16, seed=s, dtype=torch.float32) for s in (1, 2))
    k_xx, _, k_yy = gram_blocks(x, y, name, KERNELS[name])
    assert (k_xx.diagonal() == at_zero).all()
    assert (k_yy.diagonal() == at_zero).all()


@pytest.mark.parametrize("name", KERNELS)
def test_gradients_are_finite_for_identical_points(name):
    x = torch.ones(5, 3, requires_grad=True)
    y = torch.ones(4, 3, requires_grad=True)
    sum(k.sum() for k in gram_blocks(x, y, name, KERNELS[name])).backward()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(kernels.RADIAL))
def test_the_derivative_at_distance_0_is_finite(name):
    d2 = torch.zeros(3, requires_grad=True)
    kernels.RADIAL[name](d2, KERNELS[name]).sum().backward()
    assert d2.grad.isfinite().all()


@pytest.mark.parametrize("name", sorted(set(kernels.RADIAL) - {"rq-linear"}))
def test_coinciding_points_do_not_push_each_other(name):
    """By symmetry the gradient at distance 0 is 0 (for the kinks: taken as 0)."""
    x = randn(20, 3, seed=1, dtype=torch.float32).requires_grad_()
    gram_blocks(x, x.detach().clone(), name, KERNELS[name])[1].diagonal().sum().backward()
    assert x.grad.abs().max() < 1e-2  # of the energy kernel it is 1 wherever it is not 0


# --- gradients of the estimators -----------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", KERNELS)
def test_first_and_second_derivatives_of_mmd2(name, estimator):
    def loss(x, y):
        return mmd2(*gram_blocks(x, y, name, KERNELS[name]), estimator)

    x, y = randn(4, 2, seed=1).requires_grad_(), (randn(4, 2, seed=2) + 1).requires_grad_()
    assert torch.autograd.gradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(loss, (x, y))


@pytest.mark.parametrize("name", KERNELS)
def test_first_and_second_derivatives_of_sqrt_mmd(name):
    def loss(x, y):
        return sqrt_mmd(*gram_blocks(x, y, name, KERNELS[name]))

    x, y = randn(4, 2, seed=1).requires_grad_(), (randn(3, 2, seed=2) + 1).requires_grad_()
    assert loss(x, y) > 0.1
    assert torch.autograd.gradcheck(loss, (x, y))
    assert torch.autograd.gradgradcheck(loss, (x, y))


def test_sqrt_mmd_is_the_root_of_the_biased_estimate_and_0_below_0():
    k = torch.eye(2, dtype=torch.float64)
    assert sqrt_mmd(k, 0 * k, k).item() == pytest.approx(1.0)  # 1/2 - 0 + 1/2
    below = [(k - 2).requires_grad_() for _ in range(3)]
    value = sqrt_mmd(below[0], below[1].abs(), below[2])
    value.backward()
    assert value == 0
    assert all((b.grad == 0).all() for b in below)


# --- closed forms between Gaussians (one dimension unless said) -----------------------------------


def gaussian_expectations(name, bandwidths, mean, std=1.0):
    """E k(x, x'), E k(x, y), E k(y, y') for x ~ N(0, 1) and y ~ N(mean, std^2).

    By the trapezoid rule, here exact to rounding for smooth kernels; to O(step^2) for those with a kink.
    """
    step = 0.02 if name in ("laplacian", "distance") else 0.05
    t = torch.arange(-10, 11, step, dtype=torch.float64)
    p, q = (
        step * torch.exp(-0.5 * ((t - m) / s) ** 2) / (s * math.sqrt(2 * math.pi))
        for m, s in ((0, 1), (mean, std))
    )
    grams = gram_blocks(t[:, None], t[:, None], name, bandwidths)
    return [(a @ k @ b).item() for k, a, b in zip(grams, (p, p, q), (p, q, q))]


CLOSED_FORMS = [
    ("rbf", (1.0,), 1, 1, 0.177268),
    ("rbf", (1.0,), 2, 1, 0.561858),
    ("rbf", (1.0,), 0, 2, 0.094187),
    ("rbf", (0.5,), 1, 1, 0.132842),
    ("rbf", (1.0,), 0.1, 1, 0.00192290),
    ("rbf", (1.0, 2.0, 4.0, 8.0, 16.0), 1, 1, 0.378213),
    ("rbf", (2.0, 4.0, 8.0, 16.0, 32.0), 1, 1, 0.201919),
    ("rbf", tuple(math.sqrt(v) for v in (2, 5, 10, 20, 40, 80)), 1, 1, 0.435166),
    ("rbf", (2.0, 5.0, 10.0, 20.0, 40.0, 80.0), 1, 1, 0.178821),
    ("rq", (0.1,), 1, 1, 0.051522),
    ("rq", (0.2,), 1, 1, 0.078953),
    ("rq", (0.5,), 1, 1, 0.119357),
    ("rq", (1.0,), 1, 1, 0.144689),
    ("rq", (2.0,), 1, 1, 0.161032),
    ("rq", (5.0,), 1, 1, 0.171278),
    ("rq", (10.0,), 1, 1, 0.174433),
    ("rq", (0.2, 0.5, 1.0, 2.0, 5.0), 1, 1, 0.675308),
    ("rq", (0.1, 1.0, 10.0), 1, 1, 0.370644),
    ("rq-linear", (0.1, 1.0, 10.0), 1, 1, 1.370644),  # the linear term adds the squared mean difference
    ("laplacian", (1.0,), 1, 1, 0.125216),
    ("laplacian", (2.0,), 1, 1, 0.119577),
    ("distance", (), 1, 1, 0.541807),
]


@pytest.mark.parametrize(("name", "bandwidths", "mean", "std", "expected"), CLOSED_FORMS)
def test_population_mmd2_of_gaussians(name, bandwidths, mean, std, expected):
    k_xx, k_xy, k_yy = gaussian_expectations(name, bandwidths, mean, std)
    kink = name in ("laplacian", "distance")
    digits = 5e-9 if expected < 0.01 else 1e-5 if kink else 6e-7
    assert k_xx - 2 * k_xy + k_yy == pytest.approx(expected, abs=digits)


def test_population_rbf_expectations_of_gaussians():
    k_xx, k_xy, k_yy = gaussian_expectations("rbf", (1.0,), 1)
    assert k_xx == pytest.approx(0.577350, abs=6e-7)
    assert k_yy == pytest.approx(0.577350, abs=6e-7)
    assert k_xy == pytest.approx(0.488716, abs=6e-7)


def test_mmd2_of_quantiles_converges_to_the_energy_distance():
    """The estimators, not a quadrature: on the quantiles of N(0, 1) and N(1, 1), 0.541807."""
    x = torch.special.ndtri((torch.arange(1000, dtype=torch.float64) + 0.5) / 1000)[:, None]
    value = mmd2(*gram_blocks(x, x + 1, "distance", ()), "biased").item()
    assert value == pytest.approx(0.541807, abs=1e-4)


@pytest.mark.parametrize(
    ("d", "expected", "tolerance"), [(2, 0.188979, 0.045), (10, 0.006676, 1.2e-3), (16, 0.000283651, 5e-5)]
)
def test_unbiased_mmd2_of_samples_in_several_dimensions(d, expected, tolerance):
    """A unit shift in every coordinate; tolerances are about four standard deviations."""
    x, y = randn(1500, d, seed=1), randn(1500, d, seed=2) + 1
    value = mmd2(*gram_blocks(x, y, "rbf", (1.0,)), "unbiased").item()
    assert value == pytest.approx(expected, abs=tolerance)


# --- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", KERNELS)
def test_mmd_of_a_set_with_itself_is_0_with_finite_gradients(name):
    x = randn(12, 3, seed=1).requires_grad_()
    y = x.detach().clone().requires_grad_()
    grams = gram_blocks(x, y, name, KERNELS[name])
    rounding = 1e-9 if name in ("laplacian", "distance") else 1e-12  # a square root magnifies it
    assert abs(mmd2(*grams, "biased").item()) < rounding
    (mmd2(*grams, "biased") + sqrt_mmd(*grams)).backward()
    assert x.grad.isfinite().all()
    assert y.grad.isfinite().all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_only_the_u_statistic_sees_the_order_of_one_side(estimator):
    x, y, order = randn(9, 3, seed=1), randn(9, 3, seed=2), torch.arange(8, -1, -1)

    def of(x, y):
        return mmd2(*gram_blocks(x, y, "rbf", (1.0,)), estimator).item()

    assert of(x[order], y[order]) == pytest.approx(of(x, y), abs=1e-12)
    moved = abs(of(x[order], y) - of(x, y))
    assert moved > 1e-4 if estimator == "u-statistic" else moved < 1e-12


@pytest.mark.parametrize(("name", "diagonal"), [("rbf", 3), ("rq", 3), ("laplacian", 2), ("distance", 0)])
def test_biased_minus_unbiased(name, diagonal):
    """V = U + (2c - A - B) / m for a constant diagonal c and off-diagonal means A, B."""
    m = 8
    grams = gram_blocks(randn(m, 3, seed=1), randn(m, 3, seed=2), name, KERNELS[name])
    off = ~np.eye(m, dtype=bool)
    a, b = grams[0].numpy()[off].mean(), grams[2].numpy()[off].mean()
    difference = (mmd2(*grams, "biased") - mmd2(*grams, "unbiased")).item()
    assert difference == pytest.approx((2 * diagonal - a - b) / m, abs=1e-12)


def test_linear_kernel_compares_means():
    x, y = randn(9, 3, seed=1), randn(5, 3, seed=2) + 2
    value = mmd2(*gram_blocks(x, y, "linear", ()), "biased").item()
    assert value == pytest.approx(((x.mean(0) - y.mean(0)) ** 2).sum().item(), rel=1e-12)


# --- null behaviour ------------------------------------------------------------------------------


def null_estimates(name, bandwidths, d, draws, m=64):
    """(draws, 3): the three estimates between sets of m points, all from N(0, I)."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for _ in range(draws):
        x, y = torch.randn(2, m, d, generator=generator, dtype=torch.float64)
        grams = gram_blocks(x, y, name, bandwidths)
        rows.append([mmd2(*grams, estimator).item() for estimator in ESTIMATORS])
    return np.array(rows)


def test_null_in_one_dimension():
    """Mean V = 2/m (1 - 3^(-1/2)) = 0.013208, mean U = mean W = 0, standard deviation of W 0.01208."""
    estimates = null_estimates("rbf", (1.0,), 1, draws=2000)
    error = 4 * 0.0125 / math.sqrt(2000)
    np.testing.assert_allclose(estimates.mean(0), [0.013208, 0, 0], atol=error)
    assert estimates[:, 2].std() == pytest.approx(0.01208, rel=0.1)
    assert 0.5 < (estimates[:, 1] < 0).mean() < 0.75  # measured 63 %


def test_null_in_sixteen_dimensions():
    """Mean V = 2/m (1 - 3^(-8)) = 0.031245 with a standard deviation of only 6.9e-5."""
    estimates = null_estimates("rbf", (1.0,), 16, draws=200)
    np.testing.assert_allclose(estimates.mean(0), [0.031245, 0, 0], atol=4 * 7e-5 / math.sqrt(200))


def test_null_of_a_kernel_whose_diagonal_is_not_constant():
    """rq-linear: taking its diagonal for constant would give a mean of (16 + 16) / 63 = 0.508."""
    unbiased = null_estimates("rq-linear", (0.1, 1.0, 10.0), 16, draws=200)[:, 1:]
    assert (np.abs(unbiased.mean(0)) < 4 * unbiased.std(0) / math.sqrt(200)).all()
    assert (unbiased.std(0) < 0.3).all()  # so that the line above could not hold with 0.508


# --- estimators ----------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", KERNELS)
def test_mmd2_agrees_with_torch_fidelity(name, estimator):
    from torch_fidelity.metric_kid import mmd2 as reference

    grams = gram_blocks(randn(11, 3, seed=1), randn(11, 3, seed=2) + 0.5, name, KERNELS[name])
    expected = reference(*(k.numpy() for k in grams), mmd_est=estimator)
    assert mmd2(*grams, estimator).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("unbiased", [False, True])
def test_mmd2_of_unequal_sizes_against_double_loops(unbiased):
    """Random matrices in place of kernels, so that no symmetry or constant diagonal helps."""
    n, m = 7, 4
    k_xx, k_xy, k_yy = randn(n, n, seed=1), randn(n, m, seed=2), randn(m, m, seed=3)
    xx = [k_xx[i, j].item() for i in range(n) for j in range(n) if i != j or not unbiased]
    yy = [k_yy[i, j].item() for i in range(m) for j in range(m) if i != j or not unbiased]
    xy = [k_xy[i, j].item() for i in range(n) for j in range(m)]
    expected = sum(xx) / len(xx) - 2 * sum(xy) / len(xy) + sum(yy) / len(yy)
    value = mmd2(k_xx, k_xy, k_yy, "unbiased" if unbiased else "biased").item()
    assert value == pytest.approx(expected, abs=1e-12)


def test_unknown_estimator_is_an_error():
    with pytest.raises(ValueError, match="'median'"):
        mmd2(*[torch.eye(3)] * 3, "median")


@pytest.mark.parametrize("estimator", ["unbiased", "u-statistic"])
def test_one_sample_a_side_is_an_error(estimator):
    with pytest.raises(ValueError, match="2 x 2"):
        mmd2(*[torch.ones(1, 1)] * 3, estimator)


def test_u_statistic_of_unequal_sizes_is_an_error():
    with pytest.raises(ValueError, match="square"):
        mmd2(torch.eye(3), torch.ones(3, 4), torch.eye(4), "u-statistic")


# --- fused ---------------------------------------------------------------------------------------

FUSED = {"rbf": (0.5, 1.0, 1.7, 2.0, 8.0), "rq": (0.2, 1.0, 5.0)}  # doubled: 8 (expm1), 2, 1, 0.5; expm1: 1.7
WHOLE, TILED = 512, 5  # sizes of tiles: all points in one for each side, or several


@pytest.mark.parametrize("tiles", [WHOLE, TILED, 4])
@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("name", FUSED)
def test_fused_mmd2_is_the_plain_one_in_float64(name, estimator, tiles, monkeypatch):
    """Value, gradient times an upstream one, and gradients of one side; n != m where that is allowed."""
    monkeypatch.setattr(kernels, "TILE", tiles)
    x = randn(11, 3, seed=1).requires_grad_()
    y = (randn(11 if estimator == "u-statistic" else 13, 3, seed=2) + 0.5).requires_grad_()
    plain = mmd2(*gram_blocks(x, y, name, FUSED[name]), estimator)
    fused = fused_mmd2(x, y, name, FUSED[name], estimator)
    assert fused.item() == pytest.approx(plain.item(), abs=1e-14)
    expected = torch.autograd.grad(-3 * plain, (x, y))
    torch.testing.assert_close(torch.autograd.grad(-3 * fused, (x, y)), expected, rtol=1e-12, atol=1e-15)
    for sides in ((x.detach(), y), (x, y.detach()), (x.detach(), y.detach())):
        value = fused_mmd2(*sides, name, FUSED[name], estimator)
        assert value.item() == fused.item()
        for side, gradient in zip(sides, expected):
            if side.requires_grad:
                torch.testing.assert_close(torch.autograd.grad(-3 * value, side)[0], gradient)


@pytest.mark.parametrize("tiles", [WHOLE, TILED])
@pytest.mark.parametrize("name", FUSED)
def test_fused_gradient_against_finite_differences(name, tiles, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tiles)
    x, y = randn(7, 2, seed=1).requires_grad_(), (randn(6, 2, seed=2) + 1).requires_grad_()
    for estimator in ("biased", "unbiased"):
        assert torch.autograd.gradcheck(lambda x, y: fused_mmd2(x, y, name, FUSED[name], estimator), (x, y))  # noqa: B023


@pytest.mark.parametrize(("n", "m"), [(64, 48), (96, 64), (600, 300)])  # one tile, three, six
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("name", "bandwidths"), [("rbf", (1, 2, 4, 8, 16)), ("rq", (0.2, 0.5, 1, 2, 5))])
def test_fused_mmd2_is_accurate(name, bandwidths, case, n, m):
    """In float32, against float64 by differences; rbf at the features' scale, else value or gradient is 0."""
    x, y, scale = features(case, n, m)
    bandwidths = tuple(s * scale if name == "rbf" else s for s in bandwidths)
    z = torch.cat([x, y]).double().requires_grad_()
    k = kernels.RADIAL[name]((z[:, None] - z[None]).square().sum(2), bandwidths)
    reference = mmd2(k[:n, :n], k[:n, n:], k[n:, n:], "biased")
    (gradient,) = torch.autograd.grad(reference, z)
    x, y = x.requires_grad_(), y.requires_grad_()
    value = fused_mmd2(x, y, name, bandwidths, "biased")
    got = torch.cat(torch.autograd.grad(value, (x, y)))
    assert got.dtype == torch.float32
    # Duplicates: 5.1e-6 on an AMD EPYC without AVX-512, whose sums have another order.
    bound = {"close pairs": 1e-4, "duplicates": 2e-5}.get(case, 5e-6)
    assert relative_error(got, gradient) <= bound
    # The value is a difference of means of up to len(bandwidths) each: an ulp or two of those.
    assert value.item() == pytest.approx(reference.item(), abs=2e-7 * len(bandwidths))


def close_features(n, d, noise, spread):
    """Pairs of float32 features near to 0: independent ones, or real ones and copies with some noise."""
    x = randn(n, d, seed=1) * spread / d**0.5
    y = randn(n, d, seed=2) * spread / d**0.5
    if noise is not None:
        y = x + noise * y
    return x.float().requires_grad_(), y.float().requires_grad_()


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("count", [1, 5])
@pytest.mark.parametrize("name", ["rbf", "rq", "laplacian"])
@pytest.mark.parametrize(("n", "d"), [(64, 10), (64, 16), (256, 10), (1000, 784)])
def test_small_mmd2_keeps_its_digits_in_float32(n, d, name, count, fused):
    """Biased MMD^2 and its gradient to 1e-4 of float64, where k is within 1e-2 of k(0), MMD^2 above 1e-7."""
    bandwidths = (1, 2, 4, 8, 16) if name == "rbf" else (0.2, 0.5, 1, 2, 5)
    seen = 0
    for noise in (None, 0.3, 0.03):
        for spread in (0.09, 0.03):
            x, y = close_features(n, d, noise, spread if name != "laplacian" else 0.1 * spread**2)
            x64, y64 = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
            z = torch.cat([x64, y64])
            # Differences, not products, but for the largest, where they would take 10 GB.
            d2 = (z[:, None] - z[None]).square().sum(2) if n < 1000 else squared_distances(z, z)
            k = kernels.RADIAL[name](d2, bandwidths[:count])
            reference = mmd2(k[:n, :n], k[:n, n:], k[n:, n:], "biased")
            if reference < 1e-7:
                continue
            seen += 1
            assert count - k[:n, n:].mean().item() <= 1.05e-2 * count
            if fused:
                value = fused_mmd2(x, y, name, bandwidths[:count], "biased")
            else:
                value = mmd2(*gram_blocks(x, y, name, bandwidths[:count]), "biased")
            expected = torch.cat(torch.autograd.grad(reference, (x64, y64)))
            got = torch.cat(torch.autograd.grad(value, (x, y)))
            assert got.dtype == torch.float32
            assert value.item() == pytest.approx(reference.item(), rel=1e-4)
            assert relative_error(got, expected) <= 1e-4
    assert seen >= 3


def test_float32_would_not_keep_them():
    """What float64 is for: the same estimate from values of k in float32 is off by a tenth."""
    x, y = close_features(64, 10, None, 3e-3)
    exact = mmd2(*gram_blocks(x, y, "rbf", (1, 2, 4, 8, 16)), "biased").item()
    d2 = [squared_distances(a, b) for a, b in ((x, x), (x, y), (y, y))]
    rounded = mmd2(*[kernels.rbf(block, (1, 2, 4, 8, 16)) for block in d2], "biased").item()
    assert abs(rounded / exact - 1) > 1e-2


@pytest.mark.parametrize("name", sorted([*kernels.RADIAL, "linear"]))
def test_curves_are_means_without_diagonals(name):
    x, y = randn(7, 3, seed=1), randn(5, 3, seed=2) + 1
    blocks = gram_blocks(x, y, name, KERNELS[name])
    means = kernels.block_means(*blocks)
    off = ~torch.eye(7, dtype=torch.bool)
    assert means["kernel/k_xx"].item() == pytest.approx(blocks[0][off].mean().item())
    assert means["kernel/k_xy"].item() == pytest.approx(blocks[1].mean().item())
    assert means["kernel/k_yy"].item() == pytest.approx(blocks[2][off[:5, :5]].mean().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("tiles", [WHOLE, TILED])
@pytest.mark.parametrize("name", FUSED)
def test_fused_mmd2_promotes_half_and_does_not_feel_autocast(name, tiles, dtype, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tiles)
    x, y = (randn(8, 4, seed=seed).to(dtype).requires_grad_() for seed in (1, 2))
    outside = fused_mmd2(x, y, name, FUSED[name], "unbiased")
    with torch.autocast("cpu", torch.bfloat16):
        inside = fused_mmd2(x, y, name, FUSED[name], "unbiased")
    gradients = [torch.cat(torch.autograd.grad(value, (x, y))) for value in (outside, inside)]
    assert outside.dtype == torch.float64
    assert torch.equal(outside, inside)
    assert gradients[0].dtype == dtype
    assert torch.equal(*gradients)


@pytest.mark.parametrize("tiles", [WHOLE, TILED])
@pytest.mark.parametrize("name", FUSED)
def test_fused_mmd2_of_far_points_and_of_what_is_not_finite(name, tiles, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", tiles)
    x, y = 1e6 * randn(8, 4, seed=1, dtype=torch.float32), 1e6 * randn(8, 4, seed=2, dtype=torch.float32)
    far = fused_mmd2(x.requires_grad_(), y, name, FUSED[name], "biased")
    (gradient,) = torch.autograd.grad(far, x)
    assert far.item() == pytest.approx(2 * len(FUSED[name]) / 8, rel=0.1)  # the diagonals alone
    assert gradient.abs().max() < 1e-20 if name == "rbf" else gradient.isfinite().all()
    again = fused_mmd2(x, x.detach().clone(), name, FUSED[name], "biased")  # rounded d2 below 0 among pairs
    assert -1e-3 <= again.item() <= 2 * len(FUSED[name]) / 8 + 1e-3
    assert torch.autograd.grad(again, x)[0].isfinite().all()
    x.data[3, 2] = math.nan
    assert fused_mmd2(x, y, name, FUSED[name], "biased").isnan()


@pytest.mark.parametrize("name", FUSED)
def test_fused_mmd2_cannot_be_differentiated_twice(name):
    """Also where nothing but x and y could carry a second derivative, so that 0 would come out unnoticed."""
    x, y = randn(5, 2, seed=1).requires_grad_(), randn(5, 2, seed=2).requires_grad_()
    (gradient,) = torch.autograd.grad(fused_mmd2(x, y, name, (1.0,), "biased"), y, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        (x.sum() + gradient.square().sum()).backward()


def test_other_kernels_take_the_plain_way():
    x, y = randn(5, 2, seed=1), randn(6, 2, seed=2)
    for name in KERNELS:
        expected = mmd2(*gram_blocks(x, y, name, KERNELS[name]), "unbiased").item()
        assert fused_mmd2(x, y, name, KERNELS[name], "unbiased").item() == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize(
    ("n", "m", "estimator"),
    [(3, 3, "median"), (1, 3, "unbiased"), (3, 1, "u-statistic"), (3, 4, "u-statistic")],
)
def test_fused_mmd2_refuses_what_mmd2_refuses(n, m, estimator):
    x, y = randn(n, 2, seed=1), randn(m, 2, seed=2)
    for function in (fused_mmd2, lambda *args: mmd2(*gram_blocks(*args[:-1]), args[-1])):
        with pytest.raises(ValueError, match=r"median|unbiased|u-statistic|square"):
            function(x, y, "rbf", (1.0,), estimator)


# --- what fused_mmd2 costs: exact counts ----------------------------------------------------------


@pytest.mark.parametrize("both", [True, False])
def test_memory_of_fused_mmd2_at_1000_by_784(both):
    """A sixth of the plain way's at most; 143 and 20 MiB."""
    plain, fused = (count(f, 1000, 784, both).peak for f in (plain_mmd2, fused_rbf))
    assert plain > 8 * 4 * 2000**2  # what it cannot do without: five exponentials and their sum, and d2
    assert 6 * fused <= plain
    assert fused > 2 * 4 * 2000 * 784  # z and its gradient


class Largest(Counter):
    """Also notes all names of operations, and the size of the largest tensor that one made."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = super().__torch_dispatch__(function, types, args, kwargs)
        self.names.append(function.__name__.split(".")[0])
        self.largest = max(self.largest, out.numel() if isinstance(out, torch.Tensor) else 0)
        return out


def operations(x, y, kernel, bandwidths):
    kernels.fused_mmd2(x, y, kernel, bandwidths, "unbiased")  # what is made once is not counted
    with Largest() as counter:
        kernels.fused_mmd2(x, y, kernel, bandwidths, "unbiased").backward()
    return counter


@pytest.mark.parametrize(("both", "products"), [(True, 16), (False, 8)])
def test_tiles_are_visited_once_and_sides_without_gradient_not_multiplied(both, products, monkeypatch):
    """Four rows of tiles: 10 tiles for d2, and h z for the 4 + 2 * 6 rows of tiles that are wanted."""
    monkeypatch.setattr(kernels, "TILE", 100)
    x, y = randn(200, 3, seed=1).requires_grad_(both), randn(200, 3, seed=2).requires_grad_()
    counter = operations(x, y, "rbf", (1.0,))
    assert counter.names.count("mm") == 10
    assert counter.names.count("addmm_") == products
    assert counter.largest == 100 * 100  # neither n x n nor n x n x scales


@pytest.mark.parametrize(
    ("bandwidths", "exponentials"),
    [((1, 2, 4, 8, 16), 1), ((16, 4, 1), 1), ((16, 0.5), 2), ((1, 2, 4), 1), ((1, 2, 3), 2),
     ((1, 1.5, 2.7), 3), ((2, 2), 1),
     ([v**0.5 for v in (2, 5, 10, 20, 40, 80)], 2)],
)  # fmt: skip
def test_ladders_of_bandwidths_are_doubled(bandwidths, exponentials, monkeypatch):
    monkeypatch.setattr(kernels, "TILE", 100)
    x, y = randn(20, 3, seed=1).requires_grad_(), randn(20, 3, seed=2).requires_grad_()
    assert operations(x, y, "rbf", bandwidths).names.count("exp_") == 3 * exponentials


# --- properties ----------------------------------------------------------------------------------

points = arrays(np.float64, st.tuples(st.integers(2, 8), st.just(3)), elements=st.floats(-10, 10, width=32))
quick = settings(max_examples=20, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", KERNELS)
@given(x=points)
@quick
def test_gram_matrices_are_symmetric(name, x):
    k_xx, k_xy, k_yy = gram_blocks(torch.from_numpy(x), torch.from_numpy(x), name, KERNELS[name])
    for k in (k_xx, k_xy, k_yy):
        torch.testing.assert_close(k, k.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", SEMIDEFINITE)
@given(x=points)
@quick
def test_gram_matrices_are_positive_semidefinite(name, x):
    k = gram_blocks(torch.from_numpy(x), torch.from_numpy(x), name, KERNELS[name])[0]
    assert torch.linalg.eigvalsh(k)[0] >= -1e-12 * max(1.0, k.trace().item())


@pytest.mark.parametrize("name", KERNELS)
@given(x=points, y=points, random=st.randoms(use_true_random=False))
@quick
def test_mmd2_does_not_feel_the_order(name, x, y, random):
    def shuffled(a):
        return torch.from_numpy(a[random.sample(range(len(a)), len(a))])

    for estimator in ("biased", "unbiased"):
        before, after = (
            mmd2(*gram_blocks(a, b, name, KERNELS[name]), estimator)
            for a, b in ((torch.from_numpy(x), torch.from_numpy(y)), (shuffled(x), shuffled(y)))
        )
        assert after.item() == pytest.approx(before.item(), abs=1e-6)  # sqrt magnifies rounding near 0


@given(x=points, y=points, shift=arrays(np.float64, 3, elements=st.floats(-100, 100)))
@quick
def test_squared_distances_do_not_feel_a_translation(x, y, shift):
    before = squared_distances(torch.from_numpy(x), torch.from_numpy(y))
    after = squared_distances(torch.from_numpy(x + shift), torch.from_numpy(y + shift))
    torch.testing.assert_close(after, before, rtol=1e-11, atol=1e-11)


# --- several processes ---------------------------------------------------------------------------


def test_gather_and_average_gradients_do_nothing_on_one_process():
    x, layer = randn(3, 2), nn.Linear(2, 1).double()
    layer(x).sum().backward()
    before = [p.grad.clone() for p in layer.parameters()]
    kernels.average_gradients(layer)
    assert kernels.gather(x) is x
    assert all(torch.equal(p.grad, b) for p, b in zip(layer.parameters(), before))


def small_critic_loss(real, fake):
    """Loss and modules of a critic and a scale of the fakes, the same wherever it is called."""
    torch.manual_seed(0)
    critic, fakes = nn.Linear(3, 2).double(), nn.Linear(3, 3).double()
    f_real, f_fake = kernels.gather(critic(real)), kernels.gather(critic(fakes(fake)))
    plain = mmd2(*gram_blocks(f_real, f_fake, "rq", (0.5, 2.0)), "unbiased")
    return plain + kernels.fused_mmd2(f_real, f_fake, "rbf", (1.0, 2.0), "biased"), critic, fakes


def one_of_two_processes(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    real, fake = randn(8, 3, seed=1)[rank * 4 :][:4], randn(8, 3, seed=2)[rank * 4 :][:4]
    loss, *modules = small_critic_loss(real, fake)
    loss.backward()
    kernels.average_gradients(*modules)
    grads = [p.grad for module in modules for p in module.parameters()]
    torch.save({"loss": loss.detach(), "grads": grads}, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path):
    mp.spawn(one_of_two_processes, (str(tmp_path),), nprocs=2)
    loss, *modules = small_critic_loss(randn(8, 3, seed=1), randn(8, 3, seed=2))
    loss.backward()
    grads = [p.grad for module in modules for p in module.parameters()]
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        assert found["loss"].item() == pytest.approx(loss.item(), abs=1e-12)
        for got, expected in zip(found["grads"], grads):
            assert expected.norm() > 0 or expected.numel() == 2  # mmd does not see the critic's bias
            torch.testing.assert_close(got, expected, rtol=0, atol=1e-12)
