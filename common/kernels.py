"""Gram matrices and estimators of the squared maximum mean discrepancy (MMD).

Everywhere x = real and y = fake: k_xx is real-real, k_xy real-fake, k_yy fake-fake. A Gram matrix is
a sum over its bandwidths, never a mean. Half types are promoted to float32, float64 is kept.
"""

import functools
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
    """Return d2_xx (n, n), d2_xy (n, m), d2_yy (m, m) of real x (n, d) and fake y (m, d).

    A point's distance to itself is exactly 0: rounding must neither move it nor send gradients through it.
    """

    def within(z: Tensor) -> Tensor:
        return squared_distances(z, z).masked_fill(torch.eye(len(z), dtype=torch.bool, device=z.device), 0)

    return within(x), squared_distances(x, y), within(y)


# --- kernels of squared distances ----------------------------------------------------------------


def rbf(d2: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Return sum_s exp(-d2 / (2 s^2)) over the bandwidths s > 0, of the shape of d2."""
    return sum(_exp(d2 * (-0.5 / s**2)) for s in bandwidths)


def _exp(exponent: Tensor) -> Tensor:
    """Return exp(max(exponent, -60)): of less, a CPU is a hundred times slower in exp and in products."""
    return exponent.clamp_min(-60).exp()


def rational_quadratic(d2: Tensor, bandwidths: tuple[float, ...]) -> Tensor:
    """Return sum_a (1 + d2 / (2 a))^(-a) over the bandwidths a > 0 (Binkowski et al. 2018)."""
    return sum(torch.exp(-a * torch.log1p(d2 * (0.5 / a))) for a in bandwidths)


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


RADIAL = {  # in a copy of your own: kernels.RADIAL["mine"] = mine, and "mine" in your script's --kernel
    "rbf": rbf,
    "rq": rational_quadratic,
    "rq-linear": rational_quadratic,
    "laplacian": laplacian,
    "distance": distance,
}


def gram_blocks(x: Tensor, y: Tensor, kernel: str, bandwidths: tuple) -> tuple[Tensor, Tensor, Tensor]:
    """Return k_xx (n, n), k_xy (n, m), k_yy (m, m) of real x (n, d) and fake y (m, d), twice differentiable.

    Args:
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
    return tuple(blocks)


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


# --- MMD^2 without Gram matrices -----------------------------------------------------------------

SMALL, TILE = 128, 512  # points, real and fake, up to which there is one tile; rows of a tile beyond


def fused_mmd2(x: Tensor, y: Tensor, kernel: str, bandwidths: tuple[float, ...], estimator: str) -> Tensor:
    """Return mmd2(*gram_blocks(x, y, kernel, bandwidths), estimator), with its gradient made on the way.

    For rbf and rq only a tile of the Gram matrix is ever held, and there is no second derivative
    (RuntimeError); other kernels take the plain way. Arguments and ValueError: as gram_blocks and mmd2.
    """
    if kernel not in ("rbf", "rq"):
        return mmd2(*gram_blocks(x, y, kernel, bandwidths), estimator)
    fewest = {"biased": 1, "unbiased": 2, "u-statistic": 2}.get(estimator, math.inf)
    if min(len(x), len(y)) < fewest or (estimator == "u-statistic" and len(x) != len(y)):
        raise ValueError(f"no {estimator!r} estimate can be made of {len(x)} and {len(y)} samples")
    return _FusedMMD2.apply(at_least_float32(x), at_least_float32(y), kernel, bandwidths, estimator)


class _FusedMMD2(torch.autograd.Function):
    """With z = [x; y], d2_ij = ||z_i - z_j||^2 and the estimator's weights w_ij = w_ji,

    MMD^2 = sum_ij w_ij K(d2_ij), so with h_ij = w_ij K'(d2_ij)
    dMMD^2 / dz_i = 4 sum_j h_ij (z_i - z_j) = 4 (h 1)_i z_i - 4 (h z)_i: beside d2, one more product.
    Of two tiles that mirror each other only one is visited.
    """

    @staticmethod
    def forward(ctx, x: Tensor, y: Tensor, kernel: str, bandwidths: tuple, estimator: str) -> Tensor:
        n, m, (need_x, need_y) = len(x), len(y), ctx.needs_input_grad[:2]
        z = torch.cat([x, y])
        z -= z.mean(0)  # as in squared_distances
        sq = (z * z).sum(1)
        gap, paired = estimator != "biased", estimator == "u-statistic"
        w_xx, w_xy, w_yy = blocks = 1 / (n * (n - gap)), -1 / (n * (m - paired)), 1 / (m * (m - gap))
        # First that of points with themselves, which are at distance 0; then of all the others.
        value = 0 if gap else len(bandwidths) * (1 / n + 1 / m)
        hz, h1, whole = torch.zeros_like(z), torch.zeros_like(sq), n + m <= SMALL
        size = n + m if whole else TILE if z.is_cpu else 4 * TILE  # what a cache holds; what fills a GPU
        ends = [(0, n + m)] if whole else [(0, n), (n, n + m)]
        rows = [slice(i, min(i + size, end)) for i, end in ends for i in range(i, end, size)]
        for a, b in combinations_with_replacement(rows, 2):
            d2 = (sq[a, None] + sq[b]).addmm_(z[a], z[b].T, alpha=-2)  # in place: autocast leaves it alone
            if whole:
                k, h = _kernel_and_derivative(d2, kernel, bandwidths, few=True)
                weight, weights = 1, _weights(n, m, blocks, paired, z.dtype, z.device)
                value = value + k.mul_(weights).sum()
                h.mul_(weights)
            else:
                # The diagonal is of z_i and itself, or of x_i and y_i, which this estimator leaves out.
                alone = a is b or (paired and b.start == a.start + n)
                if alone:
                    d2.fill_diagonal_(0)
                k, h = _kernel_and_derivative(d2, kernel, bandwidths, few=False)
                if alone:
                    h.fill_diagonal_(0)  # z_i - z_i is 0, but not a difference of rounded multiples of it
                weight = (w_xx if b.start < n else w_xy if a.start < n else w_yy) * (1 if a is b else 2)
                value = value + (k - alone * len(d2) * len(bandwidths)) * weight
            for i, j, h_ij in [(a, b, h), (b, a, h.T)][: 1 if a is b else 2]:
                if (need_x and i.start < n) or (need_y and i.stop > n):
                    factor, depth, hz_i = weight * (4 if a is b else 2), 24 if whole else 128, hz[i]
                    h1[i].add_(h_ij.sum(1), alpha=factor)
                    for part in zip(h_ij.split(depth, 1), z[j].split(depth)):  # short sums: close pairs have
                        hz_i.addmm_(*part, alpha=-factor)  # large terms that must cancel
        ctx.save_for_backward(x, y, hz.addcmul_(h1[:, None], z))
        return value

    @staticmethod
    def backward(ctx, upstream: Tensor):
        return _scaled_gradient(ctx, upstream, *ctx.saved_tensors)


@once_differentiable  # looks at its arguments only: without x and y, a second derivative could be a silent 0
def _scaled_gradient(ctx, upstream: Tensor, x: Tensor, y: Tensor, gradient: Tensor):
    parts = (upstream * gradient).split([len(x), len(y)])
    return *(part if need else None for part, need in zip(parts, ctx.needs_input_grad)), None, None, None


def _kernel_and_derivative(d2: Tensor, kernel: str, bandwidths: tuple, few: bool) -> tuple[Tensor, Tensor]:
    """Return K(d2) if there are few points, else its sum, and K'(d2)."""
    rates = sorted((-0.5 / s ** (2 if kernel == "rbf" else 1) for s in bandwidths), reverse=True)
    if few:  # few launches: every operation is on all bandwidths at once
        rate = _constants(tuple(rates), d2.dtype, d2.device)
        k, dk = _term(d2, kernel, rate)
        return k.sum(0), dk.mul_(rate if kernel == "rbf" else -0.5).sum(0)
    k, dk, k_s, base, done = 0, None, None, math.nan, 0
    for rate in rates:
        power = math.log2(rate / base)
        if kernel == "rbf" and power < 4.5 and math.isclose(power, round(power), abs_tol=1e-9):
            # exp(2 r d2) is the square of exp(r d2). Each squaring doubles the relative error: four at most.
            torch.threshold_(k_s, 1e-38**0.5 ** (round(power) - done), 0)
            while done < round(power):
                k_s.square_()
                done += 1
        else:
            (k_s, dk_s), base, done = _term(d2, kernel, rate), rate, 0
        scale = rate if kernel == "rbf" else -0.5
        k = k + k_s.sum()
        dk = dk_s * scale if dk is None else dk.add_(dk_s, alpha=scale)
    return k, dk


def _term(d2: Tensor, kernel: str, rate: Tensor | float) -> tuple[Tensor, Tensor]:
    """Return k = exp(rate d2), or (1 - rate d2)^(1 / (2 rate)), and dk/dd2 over rate, or over -1/2."""
    if kernel == "rbf":  # 0 where float32 has no normal number: a CPU is a hundred times slower there
        k = torch.threshold_((d2 * rate).clamp_(-87, 0).exp_(), 2e-38, 0)
        return k, k
    q = (d2 * -rate).clamp_min_(0)
    k = torch.log1p(q).mul_(0.5 / rate).exp_()
    return k, k / q.add_(1)


@functools.cache
def _constants(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return values (len, 1, 1), copied to the device once: a copy waits for all that is under way there."""
    return torch.tensor(values, dtype=dtype, device=device)[:, None, None]


@functools.cache
def _weights(n: int, m: int, blocks: tuple, paired: bool, dtype, device) -> Tensor:
    """Return weights (n + m, n + m) of pairs by block; 0 for z_i, z_i, and if paired for x_i, y_i."""
    weights = torch.full((n + m, n + m), blocks[1], dtype=dtype, device=device)
    weights[:n, :n], weights[n:, n:] = blocks[0], blocks[2]
    for offset in [0] + [n, -n] * paired:
        weights.diagonal(offset).zero_()
    return weights
