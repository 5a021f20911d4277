"""Generative Ratio Matching Networks, GRAM-nets (Srivastava, Xu, Gutmann & Sutton, ICLR 2020; [P]).

The critic f maps samples to R^K, where every kernel k is Gaussian; x, x' are real and have the density p
there, y, y' are fake and have q. It is no zero-sum game: the critic maximises the Pearson divergence of p
from q, so as to keep the density ratio of the data space, and the generator minimises the MMD. Both losses
are made of the same Gram matrices, and minimised:

    ratio       r    = (k_yy + ridge I)^-1 k_yx 1, p/q at the generated points             Eq. (8)
    critic      L_D  = -( mean (r - 1)^2 + lambda sum r )                                  Eq. (9), negated
    generator   L_G  = E k(x, x') - 2 E k(x, y) + E k(y, y')                               Eq. (10)

Updates are simultaneous, from one graph (Algorithm 1).

What to read in the curves. The critic's loss is mostly sum r, which grows with the batch and says nothing
of the samples: mean r estimates E_q[p/q] = 1, and is near 1 where the kernel is wide for the features, near
0 where it is narrow (before training, on CIFAR-10 0.0, 0.0, 0.2, 0.9, 1.0 for sigma 1, 2, 4, 8, 16; on MNIST
0.0, 0.0, 0.9, 1.0 for 0.1, 1, 10, 100). Small batches put the divergence far too high. charts/ has what the
ratio is worth: the share of negative ratios, the condition number of the solve, and the squared ratio
difference D* of Eq. (4), which the critic is meant to lower (Figures 1b and 8b).

Published (Table 1, FID on held-out images, three runs): CIFAR-10 24.85 +- 0.94, with the weaker critic
24.82 +- 0.62; CelebA 27.04 +- 4.24; inception score on CIFAR-10 (Table 8) 5.73, 5.44, 5.45.

Deviations from the paper [P], from the notebook that the authors name for CIFAR-10 [N] (GRAMFlow), and from
their code for rings and MNIST [J] (JuliaGRAM). The default is [P], but where an entry says otherwise:
  1. [N] plays another game: the ratio is q/p at real points, the critic maximises mean r (all but a
     constant, so it follows the estimate's error), steps before the generator on the same batch and noise,
     and the generator minimises the square root of the MMD^2. --as-coded notebook plays it, with our ridge.
     The rest of [N]: --bandwidths 1 1.4142 2 2.8284 4 (its 1 to 16 are variances) and both learning rates
     1e-4.
  2. [J] minimises the square root of the MMD^2 (its gradient is that of [P] over twice the root, so it
     grows as the MMD falls) by Adam with a beta2 of 0.0999 (written 999f-4: it remembers hardly more than
     one step). --as-coded julia has both; its critic is that of [P] (in earlier versions mean r instead of
     sum r). The rest of [J]: --batch-size 100, on rings --latent-dim 20 --total-steps 180000, on MNIST
     --total-steps 12000.
  3. A ridge of 1e-3, as [J], and a solve in float64. [P] has no ridge (--ridge 0); [N] neither, and inverts
     in float32. Without one the Gram matrix of 200 points in one dimension is singular in float64; with
     1e-3 a quarter to two fifths of the ratios is negative on ring2d and digits.
  4. r is the mean over the bandwidths, each solved by itself, and MMD^2 the sum over them ([J], [N]); [P]
     shows a single kernel. The factor n_de / n_nu of [J] is 1 for batches of equal size.
  5. Real and fake pass the critic one after the other, each with its own batch statistics, as in [J] and
     [N]; [P] does not say.
  6. Batch norm is on all critic layers but the first, as in [N] and DCGAN ([P]: "used in both"), and has a
     learnable scale, which [N] has not; on each layer for MNIST (Table 3). 4x4 kernels of [P], 5x5 in [N]:
     its CIFAR-10 generator has 522,915 parameters, ours 430,115. The slope 0.2 is [N]'s, [P] gives none.
  7. Images in [-1, 1] and tanh throughout; for MNIST [P] has a sigmoid, which is (1 + tanh(a / 2)) / 2. Its
     generator has batch norm as in [J]; [P] does not name any.
  8. The noise of ring2d and ring3d is 0.2 ([J]), with which modes have "spreads" as [P] sees them in
     Appendix B.3; [P] prints 0.01: --dataset ring2d-sharp.
  9. Glorot weights ([J]'s default) and biases 0; [N] has N(0, 0.02); [P] does not say. Samples are drawn
     with the statistics of their batch, as in [N].
 10. Image sizes other than 28 and 32 have Tables 5 and 6 with a level more or less ([P] does not give
     CelebA's networks or size); the networks and settings of digits are ours.
 11. Lengths: [P] gives none for images. CIFAR-10 has the 200 epochs of [N], rings and MNIST stop where
     Figures 1 and 8 end. [P] trains rings for 2,000 epochs of a set whose size it does not give. The latent
     dimension of the rings is the least of Figure 2. Settings of other toys: ours. On 25gaussians they do
     not resolve the modes. Of what we tried, --ridge 1 --bandwidths 0.05 0.1 0.2 0.5 1 --width 256
     --critic-learning-rate 3e-4 --ema-decay 0.995 came closest: after 10,000 steps 55% of the samples are
     of high quality, and 19 of 25 modes covered (one seed). With that ridge sum r draws the features
     together until their median distance is 1 to 2 times the least bandwidth, whatever that is.

Usage:
    python gram_net.py
    python gram_net.py --dataset ring2d --feature-dim 2
    python gram_net.py --dataset cifar10 --weak-critic
"""

# --- imports ---------------------------------------------------------------------------------------

import copy
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from common import datasets, evaluation, kernels, run

# --- arguments -------------------------------------------------------------------------------------


@dataclass
class Args:
    """None as a default: the value that the table DEFAULTS has for the data set, or what the help says."""

    # --- run ---
    dataset: str = "digits"  # a name in the README's table of data sets, or folder:PATH
    data_dir: str = "data"  # folder that holds the data sets, and that they are downloaded to
    image_size: int | None = None  # side in pixels to which images are resized
    train_split: Literal["train", "all"] | None = None  # images trained on; digits, folders: train alone
    total_steps: int | None = None  # generator updates: the unit of everything that counts steps
    batch_size: int | None = None  # real samples per update, over all processes
    seed: int = 1  # seeds weights, order of the data, and noise
    device: str = "auto"  # a torch device; auto is cuda where there is one, else cpu
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: networks under autocast, losses in float32
    compile: bool = False  # torch.compile the networks where no double backward is needed
    width: int | None = None  # base channel count of the networks; on toys, units of a hidden layer
    ema_decay: float = 0.0  # sample from a moving average of the generator, which ends at this decay; 0: off
    log_every: int = 100  # steps between points of the curves; 0 is never; the last step always logs
    sample_every: int = 500  # steps between pictures; 0 is never; the last step always draws one
    eval_every: int | None = None  # steps between evaluations, the last step included; 0 is never
    save_every: int = 1000  # steps between checkpoints; 0 is never; the last step always saves
    eval_samples: int = 50_000  # images per evaluation, at most those of the reference; toys take 2000
    eval_features: str | None = None  # inception, pixels, or a file with a network (common/exported.py)
    eval_split: Literal["train", "test", "all"] | None = None  # the reference images
    eval_metrics: Literal["all", "fid"] = "all"  # fid: the Frechet distance alone, in bounded memory
    inception_weights: str | None = None  # file of torch-fidelity's weights (None: torch.hub's copy)
    ms_ssim: bool = False  # evaluate MS-SSIM of pairs of samples too
    sample_bn: Literal["running", "batch"] | None = None  # batch norm's statistics when sampling
    runs_dir: str = "runs"  # folder of run folders
    resume: str | None = None  # run folder to go on from, with its arguments
    eval_only: bool = False  # with --resume: evaluate, draw a picture, write samples.npz, stop
    track: bool = False  # mirror the curves to Weights & Biases

    # --- method ---
    bandwidths: tuple[float, ...] | None = None  # sigma of rbf; ratio: mean over them, MMD: sum over them
    positivity: Literal["sum", "clip"] = "sum"  # lambda sum r in Eq. (9), or r clipped at 0 (footnote 3)
    positivity_weight: float = 1.0  # lambda of Eq. (9); not read by clip and --as-coded notebook
    ridge: float = 1e-3  # added to the diagonal of k_yy before Eq. (8) is solved; 0 is [P]
    as_coded: Literal["notebook", "julia"] | None = None  # the game of the authors' code: Deviations 1 and 2
    weak_critic: bool = False  # Table 7 in the place of Table 6
    critic_width: int | None = None  # width of the critic alone; None: --width (Figures 2 and 7: 100)
    feature_dim: int | None = None  # dimension K of the projected space, the critic's output
    latent_dim: int | None = None  # dimension of the generator's input z ~ U(-1, 1); on toys N(0, I)
    learning_rate: float | None = None  # of the generator
    critic_learning_rate: float | None = None  # of the critic
    beta1: float = 0.5  # Adam's first moment, both players
    beta2: float | None = None  # Adam's second moment, both players; 0.999, of julia 0.0999


# [P] section 4 and Appendix B; the number of steps: 200 epochs of [N], and the end of Figures 1 and 8.
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=156_000, batch_size=64, width=32, bandwidths=(1.0, 2.0, 4.0, 8.0, 16.0),
        feature_dim=128, latent_dim=128, learning_rate=5e-5, critic_learning_rate=5e-5, beta2=0.999,
        eval_every=7800, eval_features="inception", train_split="train", eval_split="train",
        sample_bn="batch",
    ),
    "cifar10": dict(image_size=32, eval_split="test"),
    "celeba": dict(eval_split="test"),
    "stl10": dict(image_size=48),  # ours
    "mnist": dict(
        image_size=28, total_steps=5000, batch_size=200, width=16, bandwidths=(0.1, 1.0, 10.0, 100.0),
        feature_dim=100, latent_dim=100, learning_rate=1e-3, critic_learning_rate=1e-3, eval_every=1000,
        eval_features="pixels", eval_split="test",
    ),  # fashion-mnist too
    "digits": dict(
        image_size=8, total_steps=2000, batch_size=200, width=64, feature_dim=16, latent_dim=16,
        learning_rate=1e-3, critic_learning_rate=1e-3, eval_every=500, eval_features="pixels",
    ),  # ours; Deviation 10
    "toys": dict(
        total_steps=10_000, batch_size=200, width=100, bandwidths=(1.0,), feature_dim=10, latent_dim=2,
        learning_rate=1e-3, critic_learning_rate=1e-3, eval_every=1000,
    ),  # Appendix B.1 with h = 2; Deviations 8 and 11
}  # fmt: skip
VALUE_RANGE = (-1.0, 1.0)
LOWER_BOUNDS = {"ridge": 0, "positivity_weight": 0}  # bounds of the above
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = [DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})]
    if args.as_coded == "julia":
        defaults.append(dict(beta2=0.0999))  # Deviation 2
    ok = args.as_coded != "notebook" or args.positivity == "sum"
    run.require(ok, "--positivity", "clip", "left out: --as-coded notebook has no such term")
    args = run.resolve(args, *defaults, lower_bounds=LOWER_BOUNDS)
    if args.critic_width is None:
        args.critic_width = args.width
    if args.dataset not in datasets.TOYS:
        levels(args.image_size)  # which refuses a size that fits no network
    return args


# --- networks --------------------------------------------------------------------------------------

MNIST = (1, 28, 28)  # the shape of images that have networks of their own, Appendix B.4


def levels(side: int) -> int:
    """Return how often an image is halved: 1 for 8x8, 3 for 32x32 (down to 4x4) and 48x48 (to 6x6)."""
    n = side.bit_length() - 3  # Deviation 10
    run.require(n >= 1 and side % 2**n == 0, "--image-size", side, "4, 5, 6 or 7 times 2, 4, 8, ...")
    return n


def initialise(module: nn.Module) -> None:
    """Draw the weights of dense and convolution layers as Glorot, set biases to 0; Deviation 9."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape), images in [-1, 1]; Appendix B, Table 5."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int) -> None:
        super().__init__()
        if len(shape) == 1:  # width 100: h-100-100-2
            layers = [nn.Linear(latent_dim, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            layers.append(nn.Linear(width, shape[0]))
        elif shape == MNIST:  # width 16: 100-600-600-800-784
            sizes = [latent_dim, width * 75 // 2, width * 75 // 2, width * 50]
            layers = []
            for n_in, n_out in zip(sizes, sizes[1:]):
                layers += [nn.Linear(n_in, n_out), nn.BatchNorm1d(n_out), nn.ReLU()]
            layers += [nn.Linear(sizes[-1], 28 * 28), nn.Unflatten(1, shape), nn.Tanh()]  # Deviation 7
        else:  # Table 5: 128, 64, 32 channels for width 32
            n = levels(shape[1])
            start = (width * 2 ** (n - 1), shape[1] // 2**n, shape[2] // 2**n)
            layers = [nn.Linear(latent_dim, start[0] * start[1] * start[2]), nn.Unflatten(1, start)]
            for level in reversed(range(n)):
                c_in = width * 2**level
                c_out = c_in // 2 if level > 0 else shape[0]
                layers += [nn.BatchNorm2d(c_in), nn.ReLU(), nn.ConvTranspose2d(c_in, c_out, 4, 2, 1)]
            layers.append(nn.Tanh())
        self.layers = nn.Sequential(*layers).apply(initialise)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Critic(nn.Module):
    """Samples (B, *shape) -> features (B, feature_dim); Appendix B.1, Tables 3, 6 and 7 (weak)."""

    def __init__(self, shape: tuple[int, ...], feature_dim: int, width: int, weak: bool) -> None:
        super().__init__()
        if len(shape) == 1:  # width 100: 2-100-100-K
            layers = [nn.Linear(shape[0], width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            size = width
        elif shape == MNIST:  # Table 3: 16, 32, 32 channels for width 16
            layers = []
            for c_in, c_out in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
                layers += [nn.Conv2d(c_in, c_out, 3, 1, 1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.MaxPool2d(2)]
            size = 2 * width * 3 * 3
        else:  # Table 6: 32, 64, 128 channels for width 32; Table 7, the weaker one: 32, 32, 64
            n = levels(shape[1])
            layers = [nn.Conv2d(shape[0], width, 4, 2, 1), nn.LeakyReLU(0.2)]  # Deviation 6
            c_out = width
            for level in range(1, n):
                c_in = c_out
                c_out = c_in if weak and level == 1 else 2 * c_in
                layers += [nn.Conv2d(c_in, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
            size = c_out * (shape[1] // 2**n) * (shape[2] // 2**n)
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, feature_dim)).apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_networks(args: Args, shape: tuple[int, ...], device: torch.device) -> tuple[Generator, Critic]:
    """Return both players for samples of a shape, drawn from PyTorch's generator."""
    generator = Generator(shape, args.latent_dim, args.width)
    critic = Critic(shape, args.feature_dim, args.critic_width, args.weak_critic)
    return generator.to(device), critic.to(device)


# --- losses ----------------------------------------------------------------------------------------


def gram_matrices(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return k_xx (S, n, n), k_xy (S, n, m) and k_yy (S, m, m) in float64, a matrix for each of S bandwidths,
    of real x (n, d) and fake y (m, d)."""
    d2_xx, d2_xy, d2_yy = kernels.squared_distance_blocks(x, y)
    k_xx = torch.stack([kernels.rbf(d2_xx, (sigma,)) for sigma in bandwidths])
    k_xy = torch.stack([kernels.rbf(d2_xy, (sigma,)) for sigma in bandwidths])
    k_yy = torch.stack([kernels.rbf(d2_yy, (sigma,)) for sigma in bandwidths])
    return k_xx, k_xy, k_yy


def add_ridge(k_de: Tensor, ridge: float) -> Tensor:
    """Return k_de + ridge I in float64, for Gram matrices k_de (..., n, n)."""
    identity = torch.eye(k_de.shape[-1], dtype=torch.float64, device=k_de.device)
    return k_de.double() + ridge * identity  # Deviation 3


def density_ratio(k_de: Tensor, k_de_nu: Tensor, ridge: float) -> Tensor:
    """Return the density ratio numerator / denominator at the n_de points of the denominator, Eq. (8).

    (n_de / n_nu) (k_de + ridge I)^-1 k_de_nu 1, solved in float64, for Gram matrices k_de (..., n_de, n_de)
    and k_de_nu (..., n_de, n_nu); the result is (..., n_de). Single values may be negative.
    """
    n_de, n_nu = k_de_nu.shape[-2:]
    # solve_ex leaves a singular matrix to run.Finite, and does not wait for the device.
    solved = torch.linalg.solve_ex(add_ridge(k_de, ridge), k_de_nu.double().sum(-1)).result
    return solved * (n_de / n_nu)


def batch_ratio(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor, args: Args) -> Tensor:
    """Return the density ratio of a batch (n,), of what gram_matrices returns: the mean over the bandwidths.

    p/q at the generated points, Eq. (8); with --as-coded notebook q/p at the real ones.
    """
    if args.as_coded == "notebook":
        ratio = density_ratio(k_xx, k_xy, args.ridge)  # Deviation 1
    else:
        ratio = density_ratio(k_yy, k_xy.mT, args.ridge)
    return ratio.mean(0)  # Deviation 4


def pearson_divergence(ratio: Tensor) -> Tensor:
    """Return the estimate mean (r - 1)^2 of the Pearson divergence, Eq. (7), for ratios (n,)."""
    return (ratio - 1).square().mean()


def critic_loss(ratio: Tensor, positivity: str, weight: float) -> Tensor:
    """Return Eq. (9) of ratios p/q at generated points (n,), negated: [P] maximises, here it is minimised.

    mean (r - 1)^2 + weight * sum r; with positivity "clip", mean (max(r, 0) - 1)^2 alone (footnote 3).
    """
    if positivity == "clip":
        return -pearson_divergence(ratio.clamp_min(0))
    return -(pearson_divergence(ratio) + weight * ratio.sum())


def generator_loss(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor) -> Tensor:
    """Return Eq. (10) for Gram matrices (n, n): the biased MMD^2, at least 0."""
    return kernels.mmd2(k_xx, k_xy, k_yy, "biased")


def losses(real_feat: Tensor, fake_feat: Tensor, args: Args) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return critic loss, generator loss and what is logged beside them, for features (n, d); Algorithm 1."""
    k_xx, k_xy, k_yy = gram_matrices(real_feat, fake_feat, args.bandwidths)  # both losses are made of these
    gram = [k.sum(0) for k in (k_xx, k_xy, k_yy)]
    ratio = batch_ratio(k_xx, k_xy, k_yy, args)
    mmd2 = generator_loss(*gram)
    if args.as_coded == "notebook":
        c_loss = -ratio.mean()  # Deviation 1
    else:
        c_loss = critic_loss(ratio, args.positivity, args.positivity_weight)
    g_loss = mmd2 if args.as_coded is None else kernels.safe_sqrt(mmd2)  # Deviations 1 and 2
    logged = kernels.block_means(*gram)
    logged |= {"losses/pearson_divergence": pearson_divergence(ratio), "losses/mmd2": mmd2}
    return c_loss, g_loss, logged


# How far the ratio can be trusted: logged, and part of no loss.


def negative_share(ratio: Tensor) -> Tensor:
    """Return the share of ratios (n,) below 0, which no ratio of densities is."""
    return (ratio < 0).double().mean()


def condition_number(k_de: Tensor, ridge: float) -> Tensor:
    """Return the condition number of what Eq. (8) solves, k_de + ridge I, the largest of k_de (S, n, n).

    Its decimal logarithm is about the number of digits that the solve loses, of the 16 of float64.
    """
    return torch.linalg.cond(add_ridge(k_de, ridge)).max()


def squared_ratio_difference(data_ratio: Tensor, feat_ratio: Tensor) -> Tensor:
    """Return the mean (r_x - r)^2 of D*, Eq. (4), for ratios (n,) estimated on data and on their features.

    At the generated points, which have the density q (D* of Figures 1b and 8b).
    """
    return (data_ratio - feat_ratio).square().mean()


@torch.no_grad()
def diagnostics(
    real: Tensor, fake: Tensor, real_feat: Tensor, fake_feat: Tensor, args: Args
) -> dict[str, Tensor]:
    """Return what is logged of the ratio, for samples (n, *shape) and their features (n, K).

    The ratio on data has the bandwidths and the ridge of that on features, as in [J], which clips it at 0.
    Where these bandwidths are narrow for the data it is 0, and D* the mean of r^2.
    """
    of_data = gram_matrices(real.flatten(1), fake.flatten(1), args.bandwidths)
    of_feat = gram_matrices(real_feat, fake_feat, args.bandwidths)
    ratio = batch_ratio(*of_feat, args)
    solved = of_feat[0] if args.as_coded == "notebook" else of_feat[2]
    return {
        "charts/negative_ratios": negative_share(ratio),
        "charts/condition_number": condition_number(solved, args.ridge),
        "charts/squared_ratio_difference": squared_ratio_difference(batch_ratio(*of_data, args), ratio),
    }


# --- sampling --------------------------------------------------------------------------------------


def draw_noise(n: int, args: Args, device: torch.device) -> Tensor:
    """Return z (n, latent_dim) ~ N(0, I) on toys, ~ U(-1, 1) for images."""
    if args.dataset in datasets.TOYS:
        return torch.randn(n, args.latent_dim, device=device)
    return torch.rand(n, args.latent_dim, device=device) * 2 - 1


def interpolate(noise: Tensor) -> Tensor:
    """Return 8 points from each of 8 z to another (64, latent_dim), given z (16, latent_dim) ~ U(-1, 1)."""
    start, end = noise.split(8)
    t = torch.linspace(0, 1, 8, dtype=noise.dtype, device=noise.device)[:, None]
    return torch.lerp(start[:, None], end[:, None], t).flatten(0, 1)


def draw_picture(path: Path, fake: Tensor, data: datasets.Batches, critic: nn.Module) -> None:
    """Write a grid of generated images, or scatter plots of the data space and the projected one, as PNG."""
    if fake.ndim == 4:
        from torchvision.utils import save_image

        images = datasets.to_uint8(fake[:64], VALUE_RANGE).float() / 255
        images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-1]))  # small ones enlarged
        save_image(images, path)
    else:
        draw_spaces(path, fake, data, critic)


def draw_spaces(path: Path, fake: Tensor, data: datasets.Batches, critic: nn.Module) -> None:
    """Write scatter plots of generated points (n, d) and as many real ones, and of their features, as PNG."""
    from matplotlib.figure import Figure

    real = datasets.draw_toy(data.name, len(fake), 0).to(fake.device)
    figure = Figure(figsize=(12, 6))
    projection = "3d" if fake.shape[1] == 3 else None
    axes = figure.add_subplot(1, 2, 1, projection=projection, title="data space")
    axes.scatter(*real.cpu().T, s=3, alpha=0.6, label="real")
    axes.scatter(*fake.cpu().T, s=3, alpha=0.6, label="generated")
    axes.legend(loc="upper right")

    with torch.no_grad():
        feat = critic(torch.cat([real, fake])).float()  # a toy's critic has no state to disturb
    title = "projected space"
    if feat.shape[1] > 2:
        title += f": first two principal components of {feat.shape[1]}"
        feat = feat - feat.mean(0)
        directions = torch.linalg.svd(feat, full_matrices=False).Vh
        feat = feat @ directions[:2].T
    if feat.shape[1] == 1:
        feat = torch.cat([feat, torch.zeros_like(feat)], 1)  # drawn on a line
    real_feat, fake_feat = feat.cpu().chunk(2)
    axes = figure.add_subplot(1, 2, 2, title=title)
    axes.scatter(*real_feat.T, s=3, alpha=0.6)
    axes.scatter(*fake_feat.T, s=3, alpha=0.6)
    figure.savefig(path)


# --- training --------------------------------------------------------------------------------------


def train(args: Args) -> dict[str, float]:
    """Train, evaluate and save; return the final metrics."""
    # Set-up: nothing is written before all that can be wrong with the input has been found.
    command = run.command(args)
    args = resolve(args)
    device, rank, world_size = run.start(args.device)
    evaluator = evaluation.Evaluator(args) if args.eval_every or args.eval_only else None
    data = datasets.load(args, args.train_split, VALUE_RANGE, device, rank, world_size)
    if evaluator:
        evaluator.set_reference(data)
    has_weak = len(data.shape) == 3 and data.shape != MNIST and levels(data.shape[1]) > 1
    run.require(has_weak or not args.weak_critic, "--weak-critic", "on", "off for data of this shape")

    # Models; the seed makes every process start from the same weights.
    torch.manual_seed(args.seed)
    generator, critic = make_networks(args, data.shape, device)
    g_optimizer = torch.optim.Adam(generator.parameters(), args.learning_rate, (args.beta1, args.beta2))
    c_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, (args.beta1, args.beta2))
    models = dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer)
    run.prepare(models, device)  # on GPUs: channels last, batch norm over all processes
    models["data"] = data  # of which a checkpoint knows what it is, so that no other is gone on with
    if args.ema_decay:
        models["ema"] = copy.deepcopy(generator)
    step = run.load_checkpoint(args, SCRIPT, models)  # 0 without --resume
    if args.compile:
        generator.compile()
        critic.compile()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # Run folder
    folder = run.make_folder(args, SCRIPT, command, rank)
    writer = run.make_writer(folder, args, step, rank)
    finite = run.Finite()
    metrics = {}

    def last_or_every(n: int) -> bool:
        return step == args.total_steps or (n > 0 and step % n == 0)

    def save() -> None:
        finite.check()
        with run.failures_noted():
            writer.flush()  # the curves up to a checkpoint are not lost with what comes after it
        run.save_checkpoint(folder, args, SCRIPT, step, models, rank)

    def generate(noise: Tensor) -> Tensor:
        """Return samples (n, *shape), from a copy: sampling leaves no trace in training."""
        model = copy.deepcopy(models["ema"] if args.ema_decay else generator)
        with torch.no_grad():
            return run.for_sampling(model, args.sample_bn)(noise).float()

    def sample(n: int, i: int) -> Tensor:
        """Return chunk i of samples, (n, *shape)."""
        torch.manual_seed(run.mix(args.seed, run.Stream.SAMPLES, i))
        return generate(draw_noise(n, args, device))

    def project(samples: Tensor) -> Tensor:
        """Return the features (n, K) of samples (B, *shape), those of all processes joined."""
        with autocast:
            feat = critic(samples)
        return kernels.gather(feat.float())

    def evaluate() -> None:
        finite.check()
        metrics.update(evaluator.metrics(sample))
        run.save_results(folder, writer, args, step, metrics, evaluator.protocol, rank)

    @run.failures_noted()
    def picture() -> None:
        finite.check()
        if rank == 0:
            path = folder / "samples" / f"{step:07d}.png"
            draw_picture(path, sample(1000 if len(data.shape) == 1 else 64, 0), data, critic)
            writer.add_image("samples/generator", np.asarray(Image.open(path)), step, dataformats="HWC")

    if args.eval_only:
        evaluate()
        picture()
        if rank == 0 and len(data.shape) == 3:
            torch.manual_seed(run.mix(args.seed, run.Stream.SAMPLES, 0))
            fake = generate(interpolate(draw_noise(16, args, device)))
            draw_picture(folder / "interpolations.png", fake, data, critic)
        evaluator.save(folder / "samples.npz", sample)
        run.finish(writer, folder, args, rank)
        return metrics
    if step == 0:
        save()  # from here on there is always something to resume from
    begin, begin_step = time.time(), step
    steps = range(step + 1, args.total_steps + 1)
    for step in tqdm(steps, initial=step, total=args.total_steps, disable=None if rank == 0 else True):
        # Whatever is random in a step depends on its number alone.
        torch.manual_seed(run.mix(args.seed, run.Stream.STEP, step, rank))
        real = data.batch(step - 1)
        noise = draw_noise(len(real), args, device)
        # Both players from one graph: simultaneous updates.
        with autocast:
            fake = generator(noise)
        real_feat, fake_feat = project(real), project(fake)  # Deviation 5
        c_loss, g_loss, logged = losses(real_feat, fake_feat, args)
        c_optimizer.zero_grad()
        g_optimizer.zero_grad()
        c_loss.backward(inputs=list(critic.parameters()), retain_graph=True)
        if args.as_coded == "notebook":  # Deviation 1: the generator sees the features of the stepped critic
            kernels.average_gradients(critic)
            c_optimizer.step()
            _, g_loss, _ = losses(project(real), project(fake), args)
            g_loss.backward(inputs=list(generator.parameters()))
            kernels.average_gradients(generator)
        else:
            g_loss.backward(inputs=list(generator.parameters()))
            kernels.average_gradients(critic, generator)
            c_optimizer.step()
        g_optimizer.step()

        if args.ema_decay:
            run.update_average(models["ema"], generator, args.ema_decay, step)
        finite.note(step, critic=c_loss, generator=g_loss)

        if last_or_every(args.log_every):
            finite.check()
            scalars = {"losses/critic": c_loss, "losses/generator": g_loss}
            scalars |= logged
            scalars |= diagnostics(kernels.gather(real), kernels.gather(fake), real_feat, fake_feat, args)
            scalars |= {"charts/steps_per_second": (step - begin_step) / (time.time() - begin)}
            run.write_scalars(writer, scalars, step)
        if last_or_every(args.sample_every):
            picture()
        if args.eval_every and last_or_every(args.eval_every):
            evaluate()
        stopping = run.stop_asked(step) and step < args.total_steps
        if last_or_every(args.save_every) or stopping:
            save()
        if stopping:
            run.leave(writer, folder, step)

    run.finish(writer, folder, args, rank)
    return metrics


if __name__ == "__main__":
    run.main(train, Args)
