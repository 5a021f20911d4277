"""The two-parameter game of the repulsive loss's paper, Figure S1: python -m reproduce.repulsive_game.

z is uniform on [-1, 1], the generator makes y = w1 z, the critic is D(x) = w2 x^2, the kernel is rbf with
sigma 0.5. The data are uniform on [-1, 1], which w1 = 1 makes, or N(0, 1), which no w1 makes. Gradients are
those of the population: expectations are sums over fine grids, with the density for weights.

The paper finds the equilibria (1.55, 0.74) for MMD-rbf and (1.55, 0.32) for MMD-rep, data N(0, 1), and says
that both have the same w1. We find w1 = 1.484 for MMD-rbf; at the paper's point its gradient is not 0. It
says too that a lower rate of the generator shrinks the region from which MMD-rep comes to the trivial
solution w2 = 0: so it is with data N(0, 1), and the reverse with U(-1, 1).
"""

import math

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor

import mmd_gan_repulsive
from common import kernels
from reproduce.page import Args, Row, follow, print_table, save

ATTRACTIVE, REPULSIVE = -1.0, 1.0  # lambda of Eq. (5): MMD-rbf and MMD-rep
SIGMA = 0.5


def law(name: str, count: int) -> tuple[Tensor, Tensor]:
    """Return points (count,) of a symmetric law's upper half, the midpoints of a grid, and their weights."""
    end = {"uniform": 1.0, "normal": 5.0}[name]
    x = (torch.arange(count, dtype=torch.float64) + 0.5) * (end / count)
    density = torch.ones_like(x) if name == "uniform" else torch.exp(-(x**2) / 2)
    return x, density / density.sum()


class Game:
    """Data of that law against the generator; lam: lambda of the critic's loss, Eq. (5)."""

    def __init__(self, data: str, lam: float, count: int, sigma: float = SIGMA) -> None:
        self.x, self.p = law(data, count)
        self.z, self.q = law("uniform", max(20, count // 2))
        self.lam, self.sigma = lam, sigma

    def losses(self, w1: Tensor, w2: Tensor) -> tuple[Tensor, Tensor]:
        """Return L_D and L_G of the population.

        What the script's losses take the mean of, without the diagonal, are here two-by-two matrices of which
        each element is the population's mean.
        """
        real_feat, fake_feat = w2 * self.x[:, None] ** 2, w2 * (w1 * self.z[:, None]) ** 2
        matrices = []
        for a, p, b, q in (
            (real_feat, self.p, real_feat, self.p),
            (real_feat, self.p, fake_feat, self.q),
            (fake_feat, self.q, fake_feat, self.q),
        ):
            k = kernels.rbf(kernels.squared_distances(a, b), (self.sigma,))
            matrices.append((p @ k @ q).expand(2, 2))
        c_loss = mmd_gan_repulsive.critic_loss(*matrices, self.lam)
        return c_loss, mmd_gan_repulsive.generator_loss(*matrices)

    def descent(self, w: Tensor) -> Tensor:
        """Return (w1', w2') at w (2,), both players going down the gradients of their losses."""
        w1, w2 = w
        for_w1 = torch.func.grad(lambda w1: self.losses(w1, w2)[1])(w1)
        for_w2 = torch.func.grad(lambda w2: self.losses(w1, w2)[0])(w2)
        return -torch.stack([for_w1, for_w2])

    def descents(self, w: Tensor) -> Tensor:
        """Return the same for points w (n, 2)."""
        return torch.func.vmap(self.descent)(w)

    def equilibrium(self, w: Tensor, steps: int = 4) -> tuple[Tensor, Tensor]:
        """Return where both gradients vanish, by Newton's method from w, and the flow's eigenvalues there."""
        for _ in range(steps):
            jacobian = torch.func.jacrev(self.descent)(w)
            w = w - torch.linalg.solve(jacobian, self.descent(w))
        return w, torch.linalg.eigvals(torch.func.jacrev(self.descent)(w)).real.sort().values


def train(game: Game, w: Tensor, generator_rate: float, steps: int, rate: float = 0.5) -> Tensor:
    """Return w (n, 2) after simultaneous gradient descent; the generator's rate is a multiple of rate."""
    rates = torch.tensor([rate * generator_rate, rate]).double()
    for _ in range(steps):
        w = w + rates * game.descents(w)
    return w


def starts(side: int) -> Tensor:
    """Return a grid of starting points (side * side, 2), w1 in (0, 3], w2 in (0, 1.5]."""
    w1 = torch.linspace(0.1, 3.0, side).double()
    w2 = torch.linspace(0.05, 1.5, side).double()
    return torch.cartesian_prod(w1, w2)


def trivial(data: str, generator_rate: float, side: int, steps: int) -> tuple[Tensor, float]:
    """Return the starts from which MMD-rep comes to the trivial solution w2 = 0, and their share of all."""
    w = starts(side)
    count = {"uniform": 20, "normal": 40}[data]
    end = train(Game(data, REPULSIVE, count), w, generator_rate, steps)
    lost = end[:, 1].abs() < 0.02
    return w[lost], lost.double().mean().item()


def results(quick: bool) -> list[Row]:
    count = 60 if quick else 200
    rows = []
    paper = {REPULSIVE: (1.55, 0.32), ATTRACTIVE: (1.55, 0.74)}
    exact = {REPULSIVE: (1.5536, 0.3071), ATTRACTIVE: (1.4839, 0.7959)}
    eigenvalues = {REPULSIVE: (-2.154, -0.259), ATTRACTIVE: (-0.377, -0.043)}
    for lam, name in ((ATTRACTIVE, "MMD-rbf"), (REPULSIVE, "MMD-rep")):
        found, values = Game("normal", lam, count).equilibrium(torch.tensor(paper[lam]).double())
        for i, w in enumerate(("w1", "w2")):
            what = f"{name}, data N(0, 1): {w} of the equilibrium"
            rows.append(Row(what, paper[lam][i], found[i].item(), "Figure S1"))
            rows.append(Row("  the same, quadrature apart from this code", exact[lam][i], found[i].item()))
        for wanted, value in zip(eigenvalues[lam], values):
            rows.append(Row("  eigenvalue of the flow there, negative: stable", wanted, value.item()))
    at_paper = Game("normal", ATTRACTIVE, count).descent(torch.tensor([1.55, 0.74]).double())
    rows.append(Row("MMD-rbf, gradient in w1 at (1.55, 0.74)", 0.023, -at_paper[0].item()))
    wide = Game("normal", REPULSIVE, count, sigma=1.0).equilibrium(torch.tensor([1.55, 0.6]).double())[0]
    rows.append(Row("MMD-rep with sigma 1: w1, which does not depend on it", 1.5536, wide[0].item()))
    rows.append(Row("MMD-rep with sigma 1: w2", 0.614, wide[1].item()))
    for lam, start, wanted in (
        (ATTRACTIVE, (0.5, 0.5), (1.000, 0.709)),
        (REPULSIVE, (0.5, 0.5), (1.000, 0.904)),
        (REPULSIVE, (2.0, 0.5), (math.nan, 0.000)),
    ):
        if quick and lam == REPULSIVE:
            continue
        game = Game("uniform", lam, 20)
        end = follow(game.descent, torch.tensor(start).double(), 0.5, 12 if quick else 80)[-1]
        name = "MMD-rbf" if lam == ATTRACTIVE else "MMD-rep"
        rows.append(Row(f"{name}, data U(-1, 1), flow from {start}: w1 at the end", wanted[0], end[0].item()))
        rows.append(Row("  w2 at the end", wanted[1], end[1].item()))
    for data in ("uniform", "normal"):
        for rate, steps in ((1.0, 5),) if quick else ((1.0, 100), (0.25, 150)):
            _, share = trivial(data, rate, 3 if quick else 7, steps)
            what = f"MMD-rep, data {data}, generator's rate x {rate:g}: share of starts that end at w2 = 0"
            rows.append(Row(what, math.nan, share, "A.2: it shrinks with the rate"))
    return rows


def draw(args: Args) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(17, 5))
    side, count = (3, 20) if args.quick else (17, 50)
    w1, w2 = torch.linspace(0.02, 3, side).double(), torch.linspace(0.0, 1.5, side).double()
    panels = (
        ("(a) MMD-rbf, data U(-1, 1)", "uniform", ATTRACTIVE, None),
        ("(b) MMD-rep, data U(-1, 1)", "uniform", REPULSIVE, None),
        ("(c) MMD-rbf, data N(0, 1)", "normal", ATTRACTIVE, (1.55, 0.74)),
        ("(d) MMD-rep, data N(0, 1)", "normal", REPULSIVE, (1.55, 0.32)),
    )
    for ax, (title, data, lam, paper) in zip(axes, panels):
        game = Game(data, lam, count)
        field = torch.stack([game.descents(torch.stack([w1, w.expand(side)], 1)) for w in w2])  # (w2, w1, 2)
        ax.streamplot(
            w1.numpy(), w2.numpy(), field[..., 0].numpy(), field[..., 1].numpy(), linewidth=0.8,
            density=0.3 if args.quick else 1.1,
            color=field.norm(dim=2).log10().clamp(-3, 0).numpy(), cmap="viridis",
        )  # fmt: skip
        if paper is None:
            ax.axvline(1, color="red", label="w1 = 1: the data")
        else:
            w, _ = Game(data, lam, 40 if args.quick else 200).equilibrium(torch.tensor(paper).double())
            ax.plot(*paper, "kx", ms=9, mew=2, label=f"paper {paper}")
            ax.plot(*w, "ro", label=f"ours ({w[0]:.3f}, {w[1]:.3f})")
        if lam == REPULSIVE:
            lost, _ = trivial(data, 1.0, *((3, 5) if args.quick else (10, 100)))
            ax.plot(*lost.T, ".", color="orange", ms=4, label="ends at w2 = 0")
        ax.set(title=title, xlabel="w1 (generator)", ylabel="w2 (critic)", xlim=(0, 3), ylim=(-0.02, 1.5))
        ax.legend(fontsize=8, loc="upper right")
    caption = """
    Figure S1 of Wang et al. 2019: G(z) = w1 z, D(x) = w2 x^2, rbf with sigma 0.5, both players going down
    their gradients; colour: speed, dark is slow. In (c) the paper's equilibrium and ours differ, and the two
    losses do not share w1. Orange: starts from which gradient descent (rate 0.5 for both) ends at the
    trivial solution w2 = 0.
    """
    save(figure, caption, "repulsive_game", args)


def main(args: Args) -> list[Row]:
    rows = results(args.quick)
    print_table(rows)
    draw(args)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
