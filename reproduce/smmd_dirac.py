"""The DiracGAN of the scaled MMD's poster: python -m reproduce.smmd_dirac, half a minute.

The data are one point, 0; the generator makes one point, theta; the critic is phi(x) = psi x, the kernel rbf
with sigma 1. The poster shows this game where it says that the optimised MMD

    D(theta) = sup over psi of MMD(psi)                                = sqrt(2), but 0 at theta = 0

is not continuous: a generator that comes near the data is told nothing. With the scale it is continuous. The
exact numbers are those of the same functions of one variable, maximised or integrated apart from this code.
"""

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor

import smmd_gan
from common import kernels
from reproduce.page import Args, Row, follow, print_table, save

GRID = (0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)
RBF = dict(kernel="rbf", bandwidths=(1.0,))
GAMES = {
    "MMD: no constraint": smmd_gan.Args(constraint="none", **RBF),
    "gradient penalty, weight 1": smmd_gan.Args(constraint="gradient-penalty", **RBF),
    "scaled MMD, as released, lambda 10": smmd_gan.Args(lambda_scale=10.0, **RBF),
    "scaled MMD, as on the poster, lambda 1": smmd_gan.Args(lambda_scale=1.0, scale_form="poster", **RBF),
}


def losses(theta: Tensor, psi: Tensor, args: smmd_gan.Args) -> tuple[Tensor, Tensor, Tensor]:
    """Return L_C, L_G and the scaled MMD^2 of the points 0 and theta, for the critic psi x."""
    real = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    fake = theta.view(1, 1)
    real_feat, fake_feat = psi * real, psi * fake
    gram = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
    mmd2 = kernels.mmd2(*gram, "biased")  # of single points: there is no pair but with itself
    scale = smmd_gan.distance_scale(real_feat, real, args, create_graph=True)
    c_loss = smmd_gan.critic_loss(mmd2, scale)
    if args.constraint == "gradient-penalty":
        between = torch.linspace(0.05, 0.95, 10, dtype=torch.float64)[
            :, None
        ]  # in the place of random points
        between = (between * fake).detach().requires_grad_()
        penalty = smmd_gan.gradient_penalty(between, psi * between, real_feat, fake_feat, args)
        c_loss = c_loss + args.lambda_gp * penalty
    constant = scale.detach() if isinstance(scale, Tensor) else scale
    return c_loss, smmd_gan.generator_loss(mmd2, constant), scale * mmd2


def descent(point: Tensor, args: smmd_gan.Args) -> Tensor:
    """Return (theta', psi'): both players go down the gradients of their losses at the same time."""
    theta, psi = (value.clone().requires_grad_() for value in point)
    c_loss, g_loss, _ = losses(theta, psi, args)
    (for_theta,) = torch.autograd.grad(g_loss, theta, retain_graph=True)
    (for_psi,) = torch.autograd.grad(c_loss, psi)
    return -torch.stack([for_theta, for_psi])


def best_critic(theta: float, args: smmd_gan.Args, largest: float, count: int = 30) -> tuple[float, float]:
    """Return psi and the scaled MMD of the best critic with 0 < psi <= largest.

    The best of a grid of count, then the best of such a grid between its neighbours.
    """
    theta = torch.tensor(theta, dtype=torch.float64)
    low, high = 0.0, largest
    for _ in range(2):
        step = (high - low) / count
        grid = torch.linspace(low + step, high, count, dtype=torch.float64)
        values = torch.stack([losses(theta, psi, args)[2].detach() for psi in grid])
        psi = grid[values.argmax()].item()
        low, high = max(psi - step, 0.0), min(psi + step, largest)
    return psi, values.max().sqrt().item()


def flow(args: smmd_gan.Args, count: int) -> Tensor:
    """Return theta and psi on their way from (1, 0.5)."""
    return follow(lambda point: descent(point, args), torch.tensor([1.0, 0.5]).double(), 0.25, count)


def results(quick: bool) -> list[Row]:
    released_10 = GAMES["scaled MMD, as released, lambda 10"]
    released_1 = smmd_gan.Args(lambda_scale=1.0, **RBF)
    poster_1 = GAMES["scaled MMD, as on the poster, lambda 1"]
    rows = []
    for args, name, thetas in (
        (released_10, "released, lambda 10", {0.5: 0.14639, 1.0: 0.27212, 2.0: 0.47508, 4.0: 0.74981}),
        (released_1, "released, lambda 1", {0.5: 0.39695, 1.0: 0.65127, 2.0: 0.94226}),
        (poster_1, "poster, lambda 1", {1.0: 0.56378, 2.0: 0.75936}),
    ):
        for theta, wanted in list(thetas.items())[: 1 if quick else None]:
            psi, value = best_critic(theta, args, 3.0)
            rows.append(Row(f"best scaled MMD, {name}, theta {theta:g}", wanted, value))
            if args is released_10 and theta == 1:
                rows.append(Row("psi of that critic", 0.77512, psi))
    plain = flow(GAMES["MMD: no constraint"], 20 if quick else 60)[-1]
    rows.append(Row("end of the flow from (1, 0.5), MMD: psi", 1.1180, plain[1].item()))
    rows.append(Row("the same: theta^2 + psi^2, which it keeps", 1.25, plain.square().sum().item()))
    if not quick:
        for args, name, wanted in ((released_10, "10", 0.666), (released_1, "1", 0.933)):
            psi = flow(args, 300)[-1][1].item()
            rows.append(Row(f"end of that flow, released, lambda {name}: psi", wanted, psi))
    return rows


def draw(args: Args) -> None:
    figure, axes = plt.subplots(1, 5, figsize=(18, 4.6))
    thetas = [-2, -0.1, 0.1, 2] if args.quick else [sign * t for sign in (-1, 1) for t in GRID]
    thetas, count = sorted(thetas), 10 if args.quick else 30
    for largest in (1.0, 4.0, 40.0):
        values = [best_critic(t, GAMES["MMD: no constraint"], largest, count)[1] for t in thetas]
        axes[0].plot(thetas, values, "--", label=f"MMD, psi at most {largest:g}")
    for name in list(GAMES)[2:]:
        values = [best_critic(t, GAMES[name], 8.0, count)[1] for t in thetas]
        axes[0].plot(thetas, values, label=name)
    axes[0].axhline(2**0.5, color="grey", lw=0.5)
    axes[0].set(title="Optimised distance", xlabel="theta", ylabel="sup over psi of the distance")
    axes[0].set_ylim(0, 2.4)
    axes[0].legend(fontsize=7, loc="upper center")

    side = 4 if args.quick else 13
    theta_axis, psi_axis = torch.linspace(-1.5, 1.5, side).double(), torch.linspace(0.05, 2.0, side).double()
    for ax, (name, game) in zip(axes[1:], GAMES.items()):
        rows = []
        for psi in psi_axis:
            rows.append(torch.stack([descent(torch.stack([theta, psi]), game) for theta in theta_axis]))
        field = torch.stack(rows)  # (psi, theta, 2)
        speed = field.norm(dim=2)
        ax.streamplot(
            theta_axis.numpy(), psi_axis.numpy(), field[..., 0].numpy(), field[..., 1].numpy(),
            density=0.3 if args.quick else 0.9,
            color=speed.log10().clamp(-3, 1).numpy(), cmap="viridis", linewidth=0.8,
        )  # fmt: skip
        path = flow(game, 10 if args.quick else 80)
        ax.plot(path[:, 0], path[:, 1], color="red", lw=1.5)
        ax.plot(path[-1:, 0], path[-1:, 1], "ro")
        ax.axvline(0, color="grey", lw=0.5)
        ax.set(xlabel="theta (generator)", ylabel="psi (critic)", xlim=(-1.5, 1.5), ylim=(0.05, 2.0))
        ax.set_title(name, fontsize=9)
    caption = """
    DiracGAN (poster of the scaled MMD GAN): data at 0, the generator at theta. Left: the distance for the
    best critic. That of the MMD is sqrt(2) (grey) for every theta but 0 where psi has no bound: it does not
    tell how far the generator is; the scaled ones go to 0 with theta. Others: both players go down their
    gradients at once; colour: speed, dark is slow; red: the way from (1, 0.5). Without a constraint theta^2 +
    psi^2 is kept, and the critic ends the steeper, the further away it began; the released scale keeps it
    flatter.
    """
    save(figure, caption, "smmd_dirac", args)


def main(args: Args) -> list[Row]:
    rows = results(args.quick)
    print_table(rows)
    draw(args)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
