"""Spectral norms of convolutions, PICO and PIM: python -m reproduce.repulsive_pico, half a minute.

Appendix C of the repulsive loss's paper. PIM is the norm of the kernel as a matrix (c_out, c_in h w), PICO
that of the convolution itself, by power iteration. The exact norm is the largest singular value of the
matrix of the convolution, or for a kernel of ones a formula. The bound on the critic is the product of the
exact norms of its normalised layers: C^K = 64 if each is C.
"""

import math
from statistics import mean

import matplotlib.pyplot as plt
import torch
import tyro
from torch import Tensor, nn

import mmd_gan_repulsive
from common import datasets
from reproduce.page import Args, Row, print_table, save


def norm_of(layer: nn.Module, side: int, norm: str, steps: int) -> mmd_gan_repulsive.SpectralNorm:
    """Return the script's spectral norm of a layer on inputs (c_in, side, side), steps iterations on."""
    torch.manual_seed(0)
    found = mmd_gan_repulsive.SpectralNorm(layer, (layer.in_channels, side, side), 1.0, norm)
    found.iterate(layer.weight.detach(), steps)
    return found


def estimate(found: mmd_gan_repulsive.SpectralNorm, weight: Tensor) -> float:
    """Return sigma as the script has it."""
    return found.operator(weight, found.v).norm().item()


def exact_norm(layer: nn.Module, side: int) -> float:
    """Return the largest singular value of the matrix of what the layer makes of unit vectors."""
    inputs = torch.eye(layer.in_channels * side * side, dtype=layer.weight.dtype)
    outputs = nn.functional.conv2d(
        inputs.view(-1, layer.in_channels, side, side), layer.weight, None, layer.stride, layer.padding
    )
    return torch.linalg.matrix_norm(outputs.flatten(1).detach(), 2).item()


def ones(size: int, stride: int, padding: int) -> nn.Conv2d:
    layer = nn.Conv2d(1, 1, size, stride, padding).double()
    nn.init.ones_(layer.weight)
    return layer


def ratios(size: int, stride: int, side: int, count: int) -> list[float]:
    """Return exact norm / PIM of random kernels."""
    found = []
    for seed in range(count):
        torch.manual_seed(seed)
        layer = nn.Conv2d(3, 4, size, stride, 1).double()
        nn.init.normal_(layer.weight)
        weight = layer.weight.detach()
        found.append(exact_norm(layer, side) / torch.linalg.matrix_norm(weight.flatten(1), 2).item())
    return found


def bound_through_training(norm: str, steps: int) -> list[float]:
    """Return the product of exact norms of the critic's layers before each of the first steps on digits."""
    script = mmd_gan_repulsive
    args = script.resolve(script.Args(dataset="digits", width=8, critic_norm=norm, device="cpu"))
    data = datasets.load(args, "train", script.VALUE_RANGE, torch.device("cpu"), 0, 1)
    torch.manual_seed(args.seed)
    generator = script.Generator(data.shape, args.latent_dim, args.width)
    critic = script.Critic(data.shape, args.feature_dim, args.width, args.sn_gain, norm)
    g_optimizer = torch.optim.Adam(generator.parameters(), args.learning_rate, (args.beta1, args.beta2))
    c_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, (args.beta1, args.beta2))
    layers = [m for m in critic.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    sides = (8, 8, 4)  # of the inputs of the convolutions
    bounds = []
    for step in range(steps):
        critic.eval()
        norms = [exact_norm(layer, side) for layer, side in zip(layers, sides)]
        norms.append(torch.linalg.matrix_norm(layers[-1].weight.detach(), 2).item())
        bounds.append(math.prod(norms))
        critic.train()
        real = data.batch(step)
        fake = generator(script.draw_noise(len(real), args, torch.device("cpu")))
        with nn.utils.parametrize.cached():  # one iteration for real and fake, as in the script
            real_feat, fake_feat = critic(real), critic(fake)
        c_loss, g_loss, _ = script.losses(real_feat, fake_feat, args)
        c_gradients = torch.autograd.grad(c_loss, [*critic.parameters()], retain_graph=True)
        g_gradients = torch.autograd.grad(g_loss, [*generator.parameters()])
        for network, gradients in ((critic, c_gradients), (generator, g_gradients)):
            for p, gradient in zip(network.parameters(), gradients):
                p.grad = gradient
        c_optimizer.step()
        g_optimizer.step()
    return bounds


def results(quick: bool, bounds: dict[str, list[float]]) -> list[Row]:
    rows = []
    for side in (4, 8) if quick else (4, 8, 16, 32):
        layer = ones(3, 1, 1)
        wanted = (1 + 2 * math.cos(math.pi / (side + 1))) ** 2
        found = estimate(norm_of(layer, side, "pico", 300), layer.weight.detach())
        rows.append(
            Row(f"PICO, 3x3 kernel of ones, {side}x{side}: (1 + 2 cos(pi / {side + 1}))^2", wanted, found)
        )
    layer = ones(3, 1, 1)
    rows.append(
        Row("PIM, the same kernel", 3.0, estimate(norm_of(layer, 8, "pim", 0), layer.weight.detach()))
    )
    for side, wanted in ((8, 7.0), (16, 7.719342)):
        layer = ones(4, 2, 1)
        found = estimate(norm_of(layer, side, "pico", 300), layer.weight.detach())
        rows.append(Row(f"PICO, 4x4 kernel of ones, stride 2, {side}x{side}", wanted, found))
    rows.append(
        Row("PIM, the same kernel", 4.0, estimate(norm_of(layer, 8, "pim", 0), layer.weight.detach()))
    )
    count = 5 if quick else 50
    for size, stride, side in ((3, 1, 6), (4, 2, 8)):
        found = ratios(size, stride, side, count)
        what = f"exact norm / PIM, random {size}x{size} kernels, stride {stride}"
        rows.append(Row(f"{what}: smallest", 1.0, min(found), "Appendix C: at least 1"))
        rows.append(Row(f"{what}: largest", size, max(found), "Appendix C: at most the root of h w"))
    for norm, values in bounds.items():
        source = "C^K" if norm == "pico" else "C^K, which PIM does not bound"
        rows.append(
            Row(f"{norm}: bound on the critic, the mean of {len(values)} steps", 64, mean(values), source)
        )
        rows.append(Row(f"{norm}: the largest", 64, max(values), source))
    return rows


def draw(args: Args, bounds: dict[str, list[float]]) -> None:
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.8))
    sides = (4, 6, 8) if args.quick else (4, 6, 8, 12, 16, 24, 32)
    layer = ones(3, 1, 1)
    weight = layer.weight.detach()
    axes[0].plot(
        sides, [(1 + 2 * math.cos(math.pi / (s + 1))) ** 2 for s in sides], "k-", label="exact, formula"
    )
    axes[0].plot(sides, [estimate(norm_of(layer, s, "pico", 300), weight) for s in sides], "o", label="PICO")
    axes[0].plot(sides, [estimate(norm_of(layer, s, "pim", 0), weight) for s in sides], "s", label="PIM")
    axes[0].set(title="3x3 kernel of ones", xlabel="side of the image (pixels)", ylabel="norm", ylim=(0, 10))

    torch.manual_seed(0)
    layer = nn.Conv2d(4, 8, 4, 2, 1).double()
    weight = layer.weight.detach()
    found = mmd_gan_repulsive.SpectralNorm(layer, (4, 8, 8), 1.0, "pico")
    torch.manual_seed(1)
    v = torch.randn_like(found.v)
    found.v.copy_(v / v.norm())  # the script starts after 20 iterations; here from none
    values = []
    for _ in range(20 if args.quick else 200):
        values.append(estimate(found, weight))
        found.iterate(weight, 1)
    axes[1].plot(values, label="PICO")
    axes[1].axhline(exact_norm(layer, 8), color="k", lw=0.8, label="exact")
    axes[1].axhline(
        torch.linalg.matrix_norm(weight.flatten(1), 2).item(), color="tab:green", lw=0.8, label="PIM"
    )
    axes[1].axvline(20, color="grey", ls=":", label="where the script starts")
    axes[1].set(
        title="random 4x4 kernel, stride 2, 8x8",
        xlabel="iterations",
        ylabel="norm",
        xscale="symlog",
        xlim=(0, 200),
    )

    for size, stride, side in ((3, 1, 6), (4, 2, 8)):
        label = f"{size}x{size}, stride {stride}"
        axes[2].hist(ratios(size, stride, side, 5 if args.quick else 100), bins=15, alpha=0.6, label=label)
    axes[2].set(title="random kernels, 3 to 4 channels", xlabel="exact norm / PIM", ylabel="kernels")

    for norm, values in bounds.items():
        axes[3].plot(values, label=norm.upper())
    axes[3].axhline(64, color="k", lw=0.8, label="C^K = 64")
    axes[3].set(
        title="critic on digits, 4 layers", xlabel="step", ylabel="product of exact norms", yscale="log"
    )
    for ax in axes:
        ax.legend(fontsize=8)
    caption = """
    Appendix C of Wang et al. 2019. From left: the norm of a convolution grows with the image, PIM's does not
    see that; power iteration from a random vector comes to the exact norm from below; for random kernels the
    exact norm is 1.1 to 1.9 times PIM's; a critic whose layers are normalised by PICO, with one iteration a
    step, keeps the bound that it was given, normalised by PIM it exceeds it.
    """
    save(figure, caption, "repulsive_pico", args)


def main(args: Args) -> list[Row]:
    steps = 3 if args.quick else 100
    bounds = {norm: bound_through_training(norm, steps) for norm in ("pico", "pim")}
    rows = results(args.quick, bounds)
    print_table(rows)
    draw(args, bounds)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
