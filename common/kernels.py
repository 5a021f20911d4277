"""Gram matrices and estimators of the squared maximum mean discrepancy (MMD).

Everywhere x = real and y = fake: k_xx is real-real, k_xy real-fake, k_yy fake-fake. A Gram matrix is
a sum over its bandwidths, never a mean.

MMD^2 is what is left of three means of nearly the same size, and in float32 that is rounding where features
are close together. So whatever there is one number of for each pair of points is float64; of a training step
that is a small part.
"""

import math
from itertools import combinations_with_replacement

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def at_least_float32(x: Tensor) -> Tensor:
    """Return x itself in float32 or float64, and a float32 copy of a half type."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


class _Sum(torch.autograd.Function):
    """The sum over processes, which is its own adjoint; PyTorch's own is deprecated or private."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        return _Sum.apply(grad)


def gather(features: Tensor) -> Tensor:
    """Join the features of all processes, (B, d) on each of N -> (N * B, d), with their gradients.

    MMD is a statistic of the whole batch, not a mean over its parts. Backward sums what every process
    has to say about this one's features, so gradients that are then averaged over processes are those
    of one process with the whole batch. Twice differentiable; on one process the identity.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return features
    parts = [torch.zeros_like(features)] * dist.get_world_size()  # each process adds its own
    parts[dist.get_rank()] = features
    return _Sum.apply(torch.cat(parts))


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
    """Return d2[i, j] = ||x_i - y_j||^2 (n, m), clamped at 0, of x (n, d) and y (m, d).

    ||x||^2 + ||y||^2 - 2 <x, y> after taking the joint mean off both, which leaves distances as they
    are and removes the cancellation between large terms that features far from 0 would cause. At least
    float32, differentiable any number of times.
    """
    x, y = at_least_float32(x), at_least_float32(y)
    with torch.autocast(x.device.type, enabled=False):
        mean = torch.cat([x, y]).mean(0).detach()  # d2 does not depend on it: no gradient to follow
        x, y = x - mean, y - mean
        d2 = (x * x).sum(1)[:, None] + (y * y).sum(1)[None, :] - 2 * x @ y.T  # (n, m)
    return d2.clamp_min(0)


def squared_distance_blocks(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return d2_xx (n, n), d2_xy (n, m), d2_yy (m, m) of real x (n, d) and fake y (m, d), in float64.

    A point's distance to itself is exactly 0: rounding must neither move it nor send gradients through it.
    """
    x, y = x.double(), y.double()

    def within(z: Tensor) -> Tensor:
        return squared_distances(z, z).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), 0)

    return within(x), squared_distances(x, y), within(y)


# --- kernels of squared distances ----------------------------------------------------------------


def rbf(d2: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Return sum_s exp(-d2 / (2 s^2)) over the bandwidths s > 0, of the shape of d2."""
    return sum(_exp(d2 * (-0.5 / s**2)) for s in bandwidths)


def rational_quadratic(d2: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Return sum_a (1 + d2 / (2 a))^(-a) over the bandwidths a > 0 (Binkowski et al. 2018)."""
    return sum(_exp(-a * torch.log1p(d2 * (0.5 / a))) for a in bandwidths)


def laplacian(d2: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Return sum_s exp(-sqrt(d2) / s) over the bandwidths s > 0; the gradient at d2 = 0 is taken as 0."""
    d = safe_sqrt(d2)
    return sum(_exp(d * (-1 / s)) for s in bandwidths)


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


def _exp(exponent: Tensor) -> Tensor:
    """Return exp(max(exponent, -60)): of less, a CPU is a hundred times slower in exp and in products."""
    return exponent.clamp_min(-60).exp()


RADIAL = {  # in a copy of your own: kernels.RADIAL["mine"] = mine, and "mine" in your script's --kernel
    "rbf": rbf,
    "rq": rational_quadratic,
    "rq-linear": rational_quadratic,
    "laplacian": laplacian,
    "distance": distance,
}


# --- Gram matrices -------------------------------------------------------------------------------


def gram_blocks(x: Tensor, y: Tensor, kernel: str, bandwidths: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Return k_xx (n, n), k_xy (n, m), k_yy (m, m) of real x (n, d) and fake y (m, d), twice differentiable.

    They are float64, whatever x and y are.

    Args:
        kernel: rbf, rq, laplacian, distance; rq-linear, which adds <a, b> to rq (the published rq*);
            linear, <a, b> alone.
        bandwidths: sigma of rbf and laplacian, alpha of rq; not read by distance and linear.
    """
    blocks = (0, 0, 0)
    if kernel != "linear":
        blocks = [RADIAL[kernel](d2, bandwidths) for d2 in squared_distance_blocks(x, y)]
    if kernel in ("linear", "rq-linear"):
        x, y = x.double(), y.double()
        with torch.autocast(x.device.type, enabled=False):
            products = x @ x.T, x @ y.T, y @ y.T
        blocks = [k + product for k, product in zip(blocks, products)]
    return tuple(blocks)


def block_means(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor) -> dict[str, Tensor]:
    """Return the curves of the means of k, those of k_xx and k_yy without their diagonals."""
    return {
        "kernel/k_xx": off_diagonal_mean(k_xx),
        "kernel/k_xy": k_xy.mean(),
        "kernel/k_yy": off_diagonal_mean(k_yy),
    }


# --- estimators of MMD^2 -------------------------------------------------------------------------


def off_diagonal_mean(k: Tensor) -> Tensor:
    """Return the mean of a square matrix (n, n), n > 1 (else ValueError), without its diagonal."""
    n = len(k)
    if k.shape != (n, n) or n < 2:
        raise ValueError(f"needs a square matrix of at least 2 x 2, got {tuple(k.shape)}")
    return (k.sum() - k.diagonal().sum()) / (n * (n - 1))


def mmd2(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor, estimator: str) -> Tensor:
    """Return an estimate of MMD^2 = E k(x, x') - 2 E k(x, y) + E k(y, y') (Gretton et al. 2012).

    Args:
        k_xx, k_xy, k_yy: as from gram_blocks.
        estimator: "biased", diagonals kept, never negative but for rounding; "unbiased", diagonals of
            k_xx and k_yy dropped; "u-statistic", that of k_xy dropped too (Wang et al. 2019, Eq. S4),
            which asks for n = m. The last two have mean 0 and either sign when real and fake agree, and
            raise ValueError for fewer than 2 samples a side, as an unknown one does.
    """
    if estimator == "biased":
        means = k_xx.mean(), k_xy.mean(), k_yy.mean()
    elif estimator == "unbiased":
        means = off_diagonal_mean(k_xx), k_xy.mean(), off_diagonal_mean(k_yy)
    elif estimator == "u-statistic":
        means = (off_diagonal_mean(k) for k in (k_xx, k_xy, k_yy))
    else:
        raise ValueError(f"unknown estimator {estimator!r}")
    mean_xx, mean_xy, mean_yy = means
    return mean_xx - 2 * mean_xy + mean_yy


def sqrt_mmd(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor) -> Tensor:
    """Return sqrt(max(MMD^2, 0)) of the biased estimate, with gradient 0 where MMD^2 is 0.

    The unbiased estimates are negative about half of the time near equality: no square root there.
    """
    return safe_sqrt(mmd2(k_xx, k_xy, k_yy, "biased"))


# --- MMD^2 without Gram matrices -----------------------------------------------------------------

TILE = 512  # rows and columns of a tile on a CPU, whose cache holds it; four times as many fill a GPU


def fused_mmd2(x: Tensor, y: Tensor, kernel: str, bandwidths: tuple[float, ...], estimator: str) -> Tensor:
    """Return mmd2(*gram_blocks(x, y, kernel, bandwidths), estimator), its gradient made on the way.

    For rbf and rq only a tile of the Gram matrix is ever held, and there is no second derivative
    (RuntimeError); other kernels take the plain way. Products of matrices are as precise as x and y, but
    float64 where all points are one tile. Arguments and ValueError: as gram_blocks and mmd2.
    """
    if kernel not in ("rbf", "rq"):
        return mmd2(*gram_blocks(x, y, kernel, bandwidths), estimator)
    fewest = {"biased": 1, "unbiased": 2, "u-statistic": 2}.get(estimator, math.inf)
    if min(len(x), len(y)) < fewest or (estimator == "u-statistic" and len(x) != len(y)):
        raise ValueError(f"no {estimator!r} estimate can be made of {len(x)} and {len(y)} samples")
    x, y = at_least_float32(x), at_least_float32(y)
    if len(x) + len(y) <= TILE:  # the fewer the pairs, the less their rounding averages out
        x, y = x.double(), y.double()
    with torch.autocast(x.device.type, enabled=False):
        return _FusedMMD2.apply(x, y, kernel, bandwidths, estimator)


class _FusedMMD2(torch.autograd.Function):
    """With z = [x; y], K(d2) = k(d2) - k(0), and w_ij = w_ji the estimator's weight of the pair z_i, z_j,

        MMD^2       = sum_ij w_ij K(d2_ij)
        dMMD^2/dz_i = 4 sum_j h_ij (z_i - z_j) = 4 (h 1)_i z_i - 4 (h z)_i,   h_ij = w_ij K'(d2_ij)

    K(0) = 0: a point's pair with itself adds nothing to either, whether an estimator counts it or not.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, kernel: str, bandwidths: tuple, estimator: str) -> Tensor:
        n, m = len(x), len(y)
        z = torch.cat([x, y])
        z -= z.mean(0)  # as in squared_distances
        norm2 = torch.linalg.vector_norm(z, dim=1, dtype=torch.float64).square()
        paired = estimator == "u-statistic"
        w_xx = 1 / (n * n) if estimator == "biased" else 1 / (n * (n - 1))
        w_yy = 1 / (m * m) if estimator == "biased" else 1 / (m * (m - 1))
        w_xy = -1 / (n * (m - 1)) if paired else -1 / (n * m)

        size = TILE if z.is_cpu else 4 * TILE
        x_tiles = [slice(i, min(i + size, n)) for i in range(0, n, size)]
        y_tiles = [slice(i, min(i + size, n + m)) for i in range(n, n + m, size)]
        need_x, need_y = ctx.needs_input_grad[:2]
        wanted = x_tiles * need_x + y_tiles * need_y  # the rows whose gradient is asked for
        value = torch.zeros_like(norm2[0])
        row_sums = torch.zeros_like(norm2)  # 4 h 1
        gradient = torch.zeros_like(z)

        def add_to_gradient(i: slice, h: Tensor, j: slice, weight: float) -> None:
            """Add what the columns j say about rows i to 4 h 1, and to the gradient - 4 h z."""
            if i in wanted:
                row_sums[i].add_(h.sum(1), alpha=4 * weight)
                gradient[i].addmm_(h.to(z.dtype), z[j], alpha=-4 * weight)

        for a, b in combinations_with_replacement(x_tiles + y_tiles, 2):  # h is symmetric: half of the tiles
            d2 = norm2[a, None] + norm2[b]
            d2.sub_(z[a] @ z[b].T, alpha=2)
            within = a is b
            # The diagonal is of z_i and itself, or of x_i and y_i, which the U-statistic leaves out.
            left_out = within or (paired and b.start == a.start + n)
            if left_out:
                d2.fill_diagonal_(0)
            k, h = _kernel_and_derivative(d2, kernel, bandwidths)
            if left_out:
                h.fill_diagonal_(0)
            weight = w_yy if a.start >= n else w_xx if b.start < n else w_xy
            value += k * (weight if within else 2 * weight)
            add_to_gradient(a, h, b, weight)
            if not within:
                add_to_gradient(b, h.T, a, weight)
        gradient.addcmul_(row_sums[:, None].to(z.dtype), z)
        ctx.save_for_backward(x, y, gradient)
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return _scaled_gradient(ctx, upstream, *ctx.saved_tensors)


@once_differentiable  # looks at its arguments only: without x and y, a second derivative could be a silent 0
def _scaled_gradient(ctx, upstream: Tensor, x: Tensor, y: Tensor, gradient: Tensor):
    of_x, of_y = (upstream * gradient).split([len(x), len(y)])
    need_x, need_y = ctx.needs_input_grad[:2]
    return of_x if need_x else None, of_y if need_y else None, None, None, None


def _kernel_and_derivative(d2: Tensor, kernel: str, bandwidths: tuple) -> tuple[Tensor, Tensor]:
    """Return the sum of K(d2) = k(d2) - k(0) over a tile, and K'(d2), of the shape of d2."""
    d2.clamp_min_(0)
    total, derivative = -len(bandwidths) * d2.numel(), torch.zeros_like(d2)
    if kernel == "rq":
        for s in bandwidths:  # k = q^(-s) with q = 1 + d2 / (2 s), and k' = -k / q / 2
            q = d2.mul(0.5 / s).add_(1)
            k = q.log().mul_(-s).exp_()
            total = total + k.sum()
            derivative.addcdiv_(k, q, value=-0.5)
        return total, derivative
    k, k_rate = None, math.nan
    for s in sorted(bandwidths, reverse=True):  # k = exp(rate d2), and k' = rate k
        rate = -0.5 / s**2
        doublings = math.log2(rate / k_rate)
        if doublings < 4.5 and math.isclose(
            doublings, round(doublings), abs_tol=1e-9
        ):  # no NaN, which is first
            for _ in range(round(doublings)):
                k.mul_(k)  # exp(2 a) from k = exp(a), in a quarter of the time on a CPU
        else:
            k = (d2 * rate).clamp_min_(-60).exp_()  # as _exp, in place
        k_rate = rate
        total = total + k.sum()
        derivative.add_(k, alpha=rate)
    return total, derivative
