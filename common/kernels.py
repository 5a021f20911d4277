"""Gram matrices and estimators of the squared maximum mean discrepancy (MMD).

Everywhere x = real and y = fake: k_xx is real-real, k_xy real-fake, k_yy fake-fake. A Gram matrix is
a sum over its bandwidths, never a mean. Half types are promoted to float32, float64 is kept.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn


def at_least_float32(x: Tensor) -> Tensor:
    """Return x itself in float32 or float64, and a float32 copy of a half type."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Gather(torch.autograd.Function):
    """(B, d) on each of N processes -> (N * B, d); PyTorch's own is deprecated or private."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _SumAndSplit.apply(grad)


class _SumAndSplit(torch.autograd.Function):
    """The adjoint of _Gather: sum (N * B, d) over processes, keep one's own (B, d)."""

    @staticmethod
    def forward(ctx, grad: Tensor) -> Tensor:
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()].clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Gather.apply(grad)


def gather(features: Tensor) -> Tensor:
    """Join the features of all processes, (B, d) on each of N -> (N * B, d), with their gradients.

    MMD is a statistic of the whole batch, not a mean over its parts. Backward sums what every process
    has to say about this one's features, so gradients that are then averaged over processes are those
    of one process with the whole batch. Twice differentiable; on one process the identity.
    """
    single = not dist.is_initialized() or dist.get_world_size() == 1
    return features if single else _Gather.apply(features)


def average_gradients(*modules: nn.Module) -> None:
    """Average the gradients of modules over processes, after backward; on one process do nothing."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        grads = [p.grad for module in modules for p in module.parameters() if p.grad is not None]
        mean = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        for grad, part in zip(grads, mean.split([grad.numel() for grad in grads])):
            grad.copy_(part.view_as(grad))


# --- squared distances ---------------------------------------------------------------------------


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """Return d2[i, j] = ||x_i - y_j||^2, clamped at 0.

    ||x||^2 + ||y||^2 - 2 <x, y> after taking the joint mean off both, which leaves distances as they
    are and removes the cancellation between large terms that features far from 0 would cause.

    Args:
        x: (n, d).
        y: (m, d).

    Returns:
        (n, m), at least float32, differentiable any number of times.
    """
    x, y = at_least_float32(x), at_least_float32(y)
    with torch.autocast(x.device.type, enabled=False):
        mean = torch.cat([x, y]).mean(0).detach()  # d2 does not depend on it: no gradient to follow
        x, y = x - mean, y - mean
        d2 = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2 * x @ y.T  # (n, m)
    return d2.clamp_min(0)


def squared_distance_blocks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return d2_xx (n, n), d2_xy (n, m), d2_yy (m, m); the diagonals of d2_xx and d2_yy are exactly 0.

    Args:
        x: (n, d), real features.
        y: (m, d), fake features.
    """
    d2_xx, d2_xy, d2_yy = squared_distances(x, x), squared_distances(x, y), squared_distances(y, y)
    # A point's distance to itself: rounding must neither move it nor send gradients through it.
    return _zero_diagonal(d2_xx), d2_xy, _zero_diagonal(d2_yy)


def _zero_diagonal(d2: Tensor) -> Tensor:
    return d2.masked_fill(torch.eye(len(d2), dtype=torch.bool, device=d2.device), 0)


# --- kernels of squared distances ----------------------------------------------------------------


def rbf(d2: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Return sum_s exp(-d2 / (2 s^2)) over the bandwidths s > 0, of the shape of d2."""
    return sum(torch.exp(d2 * (-0.5 / s**2)) for s in bandwidths)


def rational_quadratic(d2: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Return sum_a (1 + d2 / (2 a))^(-a) over the bandwidths a > 0 (Binkowski et al. 2018)."""
    return sum(torch.exp(-a * torch.log1p(d2 * (0.5 / a))) for a in bandwidths)


def laplacian(d2: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Return sum_s exp(-sqrt(d2) / s) over the bandwidths s > 0; the gradient at d2 = 0 is taken as 0."""
    d = safe_sqrt(d2)
    return sum(torch.exp(d * (-1 / s)) for s in bandwidths)


def distance(d2: Tensor, bandwidths: tuple[float, ...] = ()) -> Tensor:
    """Return -sqrt(d2), whose MMD^2 is the energy distance; the gradient at d2 = 0 is taken as 0.

    ||a|| + ||b|| - ||a - b|| of Binkowski et al. differs by terms that cancel in every MMD^2. It has
    no scale, so bandwidths are not read; only conditionally positive definite.
    """
    return -safe_sqrt(d2)


def safe_sqrt(d2: Tensor) -> Tensor:
    """Return sqrt(d2), and 0 with gradient 0 where d2 <= 0 (where the gradient of sqrt is infinite)."""
    positive = ~(d2 <= 0)  # and so is NaN, which must not become 0
    return torch.where(positive, torch.where(positive, d2, 1.0).sqrt(), 0.0)


RADIAL = {
    "rbf": rbf,
    "rq": rational_quadratic,
    "rq-linear": rational_quadratic,
    "laplacian": laplacian,
    "distance": distance,
}


def gram_blocks(
    x: Tensor, y: Tensor, kernel: str, bandwidths: tuple[float, ...]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the Gram matrices k_xx (n, n), k_xy (n, m), k_yy (m, m), twice differentiable.

    Args:
        x: (n, d), real features.
        y: (m, d), fake features.
        kernel: rbf, rq, laplacian, distance; rq-linear, which adds <a, b> to rq (the published rq*);
            linear, <a, b> alone.
        bandwidths: sigma of rbf and laplacian, alpha of rq; not read by distance and linear.
    """
    x, y = at_least_float32(x), at_least_float32(y)
    blocks = [0, 0, 0]
    if kernel != "linear":
        blocks = [RADIAL[kernel](d2, bandwidths) for d2 in squared_distance_blocks(x, y)]
    if kernel in ("linear", "rq-linear"):
        with torch.autocast(x.device.type, enabled=False):
            blocks = [k + a @ b.T for k, (a, b) in zip(blocks, ((x, x), (x, y), (y, y)))]
    k_xx, k_xy, k_yy = blocks
    return k_xx, k_xy, k_yy


# --- estimators of MMD^2 -------------------------------------------------------------------------


def off_diagonal_mean(k: Tensor) -> Tensor:
    """Return the mean of a square matrix (n, n) without its diagonal, whatever stands there.

    Raises:
        ValueError: the matrix is not square or smaller than 2 x 2.
    """
    n = len(k)
    if k.shape != (n, n) or n < 2:
        raise ValueError(f"needs a square matrix of at least 2 x 2, got {tuple(k.shape)}")
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1))


def mmd2(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor, estimator: str) -> Tensor:
    """Return an estimate of MMD^2 = E k(x, x') - 2 E k(x, y) + E k(y, y') (Gretton et al. 2012).

    Args:
        k_xx: (n, n), real-real.
        k_xy: (n, m), real-fake.
        k_yy: (m, m), fake-fake.
        estimator: "biased", diagonals kept, never negative but for rounding; "unbiased", diagonals of
            k_xx and k_yy dropped; "u-statistic", that of k_xy dropped too (Wang et al. 2019, Eq. S4),
            which asks for n = m. The last two have mean 0 and either sign when real and fake agree.

    Returns:
        A scalar.

    Raises:
        ValueError: an unknown estimator; fewer than 2 samples a side for the last two.
    """
    if estimator == "biased":
        return k_xx.mean() - 2 * k_xy.mean() + k_yy.mean()
    if estimator == "unbiased":
        return off_diagonal_mean(k_xx) - 2 * k_xy.mean() + off_diagonal_mean(k_yy)
    if estimator == "u-statistic":
        return off_diagonal_mean(k_xx) - 2 * off_diagonal_mean(k_xy) + off_diagonal_mean(k_yy)
    raise ValueError(f"unknown estimator {estimator!r}")


def sqrt_mmd(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor) -> Tensor:
    """Return sqrt(max(MMD^2, 0)) of the biased estimate, with gradient 0 where MMD^2 is 0.

    The unbiased estimates are negative about half of the time near equality: no square root there.
    """
    return safe_sqrt(mmd2(k_xx, k_xy, k_yy, "biased"))
