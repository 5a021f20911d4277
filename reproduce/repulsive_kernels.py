"""Kernels, their slopes, and where each loss pushes: python -m reproduce.repulsive_kernels, 10 seconds.

Figures 1 and 2 of the repulsive loss's paper. Of the slope |dk/de| of a kernel k(e), e = ||a - b||, the
largest is known: at e = sigma it is exp(-1/2) / sigma for rbf, and for rq it is at e = sqrt(2 alpha / (2
alpha + 1)). Further away and nearer a kernel is saturated, and its pairs move nobody.
"""

import math

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor

import mmd_gan_repulsive
from common import kernels
from reproduce.page import Args, Row, print_table, save

SIGMAS = (1.0, 2**0.5, 2.0, 8**0.5, 4.0)
ALPHAS = (0.2, 0.5, 1.0, 2.0, 5.0)


def kernel_and_slope(kernel: str, bandwidth: float, e: Tensor) -> tuple[Tensor, Tensor]:
    """Return k(e) and dk/de at distances e (n,)."""
    e = e.clone().requires_grad_()
    k = kernels.RADIAL[kernel](e**2, (bandwidth,))
    (slope,) = torch.autograd.grad(k.sum(), e)
    return k.detach(), slope


def scores() -> tuple[Tensor, Tensor]:
    """Return four scores D(x) of real samples and four D(y) of generated ones, in the plane."""
    real = torch.tensor([[0.0, 0.0], [0.9, 0.3], [0.3, 1.0], [-0.4, 0.7]]).double()
    fake = torch.tensor([[2.0, 1.5], [2.7, 1.1], [2.9, 2.0], [2.1, 2.4]]).double()
    return real, fake


def directions(loss: str) -> tuple[Tensor, Tensor]:
    """Return minus the gradient of a loss by the real and by the generated scores."""
    real, fake = (points.requires_grad_() for points in scores())
    lam = -1.0 if loss == "attractive" else 1.0
    args = mmd_gan_repulsive.Args(lam=lam, kernel="rbf", bandwidths=(1.0,))
    c_loss, g_loss, _ = mmd_gan_repulsive.losses(real, fake, args)
    gradients = torch.autograd.grad(g_loss if loss == "generator" else c_loss, (real, fake))
    return -gradients[0], -gradients[1]


def mean_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean distance of a point of a and another one of b."""
    distances = kernels.safe_sqrt(kernels.squared_distances(a, b))
    return distances.sum() / (distances > 0).sum()


def changes(loss: str) -> dict[str, float]:
    """Return how fast mean distances grow when the scores move in the directions of the loss."""
    (real, fake), moves = scores(), directions(loss)
    if loss == "generator":  # it moves the generated ones alone
        moves = torch.zeros_like(moves[0]), moves[1]
    pairs = {"real pairs": (0, 0), "generated pairs": (1, 1), "real and generated": (0, 1)}
    found, step = {}, 1e-4
    for name, (i, j) in pairs.items():
        before = mean_distance((real, fake)[i], (real, fake)[j])
        moved = real + step * moves[0], fake + step * moves[1]
        found[name] = ((mean_distance(moved[i], moved[j]) - before) / step).item()
    return found


def results(quick: bool) -> list[Row]:
    rows, e = [], torch.linspace(0, 6, 601 if quick else 6001).double()
    for kernel, bandwidths in (("rbf", SIGMAS), ("rq", ALPHAS)):
        for b in bandwidths:
            _, slope = kernel_and_slope(kernel, b, e)
            where = b if kernel == "rbf" else math.sqrt(2 * b / (2 * b + 1))
            rows.append(
                Row(f"{kernel} {b:.4g}: distance at which it is steepest", where, e[slope.argmin()].item())
            )
            if kernel == "rbf":
                steepest = math.exp(-0.5) / b
                rows.append(Row(f"{kernel} {b:.4g}: slope there", steepest, -slope.min().item()))
    signs = {  # what section 3 says that each loss does: 1 pushes apart, -1 pulls together
        "attractive": {"real pairs": -1, "generated pairs": -1, "real and generated": 1},
        "repulsive": {"real pairs": 1, "generated pairs": -1},
        "generator": {"generated pairs": 1, "real and generated": -1},
    }
    for loss, wanted in signs.items():
        found = changes(loss)
        for pair, sign in wanted.items():
            row = Row(
                f"{loss} loss, sign of the change of the distance of {pair}",
                sign,
                math.copysign(1, found[pair]),
            )
            row.source = "section 3, Figure 1"
            rows.append(row)
    return rows


def draw(args: Args) -> None:
    figure, axes = plt.subplots(2, 4, figsize=(16, 8))
    e = torch.linspace(0, 6, 101 if args.quick else 601).double()
    for column, kernel, bandwidths, name in ((0, "rbf", SIGMAS, "sigma"), (2, "rq", ALPHAS, "alpha")):
        total = 0
        for b in bandwidths:
            values = torch.stack(kernel_and_slope(kernel, b, e))
            total = total + values / len(bandwidths)
            for ax, value in zip(axes[0, column : column + 2], values):
                ax.plot(e, value, lw=1, label=f"{name} {b:.3g}")
        for ax, value in zip(axes[0, column : column + 2], total):
            ax.plot(e, value, "k--", label="mean")
        axes[0, column].set(title=f"{kernel}", xlabel="e = ||a - b||", ylabel="k")
        axes[0, column + 1].set(title=f"slope of {kernel}", xlabel="e = ||a - b||", ylabel="dk / de")
        axes[0, column].legend(fontsize=8)
    real, fake = scores()
    titles = {
        "attractive": "(a) critic, attractive loss, Eq. (3)",
        "repulsive": "(b) critic, repulsive loss, Eq. (4)",
        "generator": "(c) generator, Eq. (2)",
    }
    for ax, (loss, title) in zip(axes[1], titles.items()):
        moves = directions(loss)
        for name, points, move, colour in (
            ("r", real, moves[0], "tab:blue"),
            ("g", fake, moves[1], "tab:orange"),
        ):
            ax.scatter(*points.T, s=180, facecolors="none", edgecolors=colour)
            for point in points:
                ax.text(*point, name, ha="center", va="center", color=colour)
            if loss != "generator" or name == "g":
                ax.quiver(
                    *points.T, *move.T, color=colour, angles="xy", scale_units="xy", scale=0.35, width=0.006
                )
        ax.set(title=title, xlabel="first score", ylabel="second score", xlim=(-1.5, 4), ylim=(-1, 3.5))
    axes[1, 3].axis("off")
    caption = """
    Figures 2 (above) and 1 (below) of Wang et al. 2019. Above: a kernel is flat where distances are small or
    large beside its bandwidth. Below: minus the gradient of each loss at four real (r) and four generated
    (g) scores, rbf with sigma 1, arrows on one scale. The attractive loss pulls each group together and the
    two apart; the repulsive one pushes real scores apart and pulls generated ones together; the generator's
    moves generated scores towards the real ones and apart.
    """
    save(figure, caption, "repulsive_kernels", args)


def main(args: Args) -> list[Row]:
    rows = results(args.quick)
    print_table(rows)
    draw(args)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
