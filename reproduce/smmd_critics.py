"""Optimal critics and the balls that they are taken from: python -m reproduce.smmd_critics, 5 seconds.

Two drawings of the scaled MMD's poster. First, the critic that is best for a few samples, beside the one
that is best for the distributions: that of the Wasserstein distance, whose slope is 1 or -1 everywhere,
turns at each place where the samples' distribution functions cross; that of the MMD, f(t) = E k(X, t) - E
k(Y, t), is smooth for both. Second, the sets of critics among which the best is sought, in the RKHS H of the
kernel, S the data, lambda 1:

    Lipschitz             ||f||_Lip^2 + lambda ||f||^2 <= 1
    gradient-constrained  E f(S)^2 + E ||grad f(S)||^2 + lambda ||f||^2 <= 1
    scaled                ||f|| <= sigma_k, the scale of the script's poster form

The last is in the second, and E ||grad f(S)||^2 <= 1 there.
"""

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor

import smmd_gan
from common import kernels
from reproduce.page import Args, Row, print_table, save

SHIFT = 0.3  # of Y from X in the drawing
CENTRES = torch.tensor([[-0.7], [0.7]], dtype=torch.float64)  # of the functions in the plane that is drawn


def normal_points(count: int, mean: float = 0.0) -> Tensor:
    """Return points (count, 1) for N(mean, 1): its quantiles at the middle of count equal parts."""
    share = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(share)[:, None] + mean


def mmd_critic(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return E k(t, X) - E k(t, Y) at t (n, 1)."""
    k_tx = kernels.gram_blocks(t, x, "rbf", (1.0,))[1]
    k_ty = kernels.gram_blocks(t, y, "rbf", (1.0,))[1]
    return k_tx.mean(1) - k_ty.mean(1)


def wasserstein_critic(t: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Return the best 1-Lipschitz critic at t (n, 1), 0 at t = 0, for points on a line.

    E f(X) - E f(Y) is the integral of f' (F_Y - F_X), so that f' is the sign of F_Y - F_X.
    """
    places = torch.cat([x, y, t, torch.zeros(1, 1, dtype=torch.float64)]).flatten().sort().values
    below_x = (x.flatten()[None] <= places[:, None]).double().mean(1)
    below_y = (y.flatten()[None] <= places[:, None]).double().mean(1)
    steps = (below_y - below_x).sign()[:-1] * places.diff()
    values = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])
    values = values - values[torch.searchsorted(places, 0.0)]
    return values[torch.searchsorted(places, t.flatten())]


def scale2(real: Tensor) -> float:
    """Return sigma_k^2 of the poster, lambda 1, as the script has it, for phi(x) = x and rbf with sigma 1."""
    args = smmd_gan.Args(kernel="rbf", bandwidths=(1.0,), scale_form="poster", lambda_scale=1.0)
    real = real.clone().requires_grad_()
    return smmd_gan.distance_scale(1.0 * real, real, args, create_graph=False).item()


def ball_norms(weights: Tensor, data: Tensor) -> dict[str, float]:
    """Return what each ball bounds by 1, for f = sum_i weights_i k(., c_i) with weights (2,)."""
    grid = torch.linspace(-4, 4, 801, dtype=torch.float64)[:, None]
    at = torch.cat([data, grid]).requires_grad_()
    f = kernels.gram_blocks(at, CENTRES, "rbf", (1.0,))[1] @ weights
    (slope,) = torch.autograd.grad(f.sum(), at)
    f, slope, n = f.detach(), slope.flatten(), len(data)
    rkhs2 = weights @ kernels.gram_blocks(CENTRES, CENTRES, "rbf", (1.0,))[0] @ weights
    return {
        "Lipschitz": (slope[n:].abs().max().square() + rkhs2).item(),
        "gradient-constrained": (f[:n].square().mean() + slope[:n].square().mean() + rkhs2).item(),
        "scaled": rkhs2.item() / scale2(data),
    }


def ball_edges(data: Tensor, count: int) -> dict[str, Tensor]:
    """Return points (count, 2) on the edge of each ball, in the plane of the weights."""
    angles = torch.linspace(0, 2 * torch.pi, count, dtype=torch.float64)
    edges = {"Lipschitz": [], "gradient-constrained": [], "scaled": []}
    for angle in angles:
        direction = torch.stack([angle.cos(), angle.sin()])
        for name, norm in ball_norms(direction, data).items():
            edges[name].append(direction / norm**0.5)  # each norm grows with the square of the weights
    return {name: torch.stack(points) for name, points in edges.items()}


def results(quick: bool) -> list[Row]:
    count = 300 if quick else 1000
    x, y = normal_points(count), normal_points(count, 1.0)
    critic = mmd_critic(torch.cat([x, y]), x, y)
    rows = [
        Row(
            "MMD^2 of N(0, 1) and N(1, 1), E f(X) - E f(Y)",
            0.177268,
            (critic[:count].mean() - critic[count:].mean()).item(),
        )
    ]
    critic = wasserstein_critic(torch.cat([x, y]), x, y)
    rows.append(
        Row("their Wasserstein distance", 1.0, (critic[:count].mean() - critic[count:].mean()).item())
    )
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(20, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    critic = wasserstein_critic(torch.cat([a, b]), a, b)
    transport = (a.flatten().sort().values - b.flatten().sort().values).abs().mean().item()
    rows.append(
        Row(
            "20 samples: cost of the best transport",
            transport,
            (critic[:20].mean() - critic[20:].mean()).item(),
        )
    )
    data = normal_points(count)
    rows.append(Row("sigma_k^2, rbf with sigma 1, lambda 1: 1 / (1 + 1 + 1)", 1 / 3, scale2(data)))

    # The best critic in the scaled ball is the MMD's, of norm sigma_k.
    at = x.clone().requires_grad_()
    witness = mmd_critic(at, x, y)
    norm2 = kernels.mmd2(*kernels.gram_blocks(x, y, "rbf", (1.0,)), "biased")
    (slope,) = torch.autograd.grad(witness.sum(), at)
    steepness = (slope.square().mean() * scale2(x) / norm2).item()
    rows.append(
        Row("E ||grad f(X)||^2 of the best critic in the scaled ball", 1.0, steepness, "poster: at most 1")
    )
    edges = ball_edges(data, 13 if quick else 91)
    share = (edges["scaled"].norm(dim=1) / edges["gradient-constrained"].norm(dim=1)).max().item()
    rows.append(
        Row("scaled ball over gradient-constrained ball, at most", 1.0, share, "it is inside: at most 1")
    )
    return rows


def draw(args: Args) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(16, 5))
    t = torch.linspace(-2.7, 2.7, 100 if args.quick else 701, dtype=torch.float64)[:, None]
    generator = torch.Generator().manual_seed(2)
    x, y = normal_points(1000), normal_points(1000, SHIFT)
    samples_x, samples_y = (torch.randn(25, 1, generator=generator, dtype=torch.float64) for _ in range(2))
    samples_y = samples_y + SHIFT
    for ax, name, critic in ((axes[0], "Wasserstein", wasserstein_critic), (axes[1], "MMD", mmd_critic)):
        ax.plot(t, critic(t, x, y), "k", label="best for the distributions")
        ax.plot(t, critic(t, samples_x, samples_y), "tab:red", label="best for 25 + 25 samples")
        ax.plot(samples_x, torch.full_like(samples_x, ax.get_ylim()[0]), "|", color="tab:blue", label="X")
        ax.plot(samples_y, torch.full_like(samples_y, ax.get_ylim()[0]), "|", color="tab:orange", label="Y")
        ax.set(title=f"{name}: optimal critic", xlabel="t", ylabel="f(t)")
        ax.legend(fontsize=8, loc="upper right")
    for name, edge in ball_edges(normal_points(200), 25 if args.quick else 181).items():
        axes[2].plot(*edge.T, label=name)
    axes[2].set(
        title="balls of critics", xlabel="weight of k(., -0.7)", ylabel="weight of k(., 0.7)", aspect="equal"
    )
    axes[2].legend(fontsize=8, loc="upper right")
    caption = """
    Poster of the scaled MMD GAN. Left, middle: X is N(0, 1), Y is N(0.3, 1). The best critic of the
    Wasserstein distance is a straight line; that of 25 samples a side turns wherever their distribution
    functions cross, while that of the MMD (rbf, sigma 1) stays as smooth as the kernel. Right: functions a
    k(., -0.7) + b k(., 0.7) in the Lipschitz, the gradient-constrained and the scaled ball, S = N(0, 1),
    lambda 1. The scaled one is inside the gradient-constrained one; it has the shape of the RKHS ball and
    one number for its size.
    """
    save(figure, caption, "smmd_critics", args)


def main(args: Args) -> list[Row]:
    rows = results(args.quick)
    print_table(rows)
    draw(args)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
