"""Improving MMD-GAN Training with Repulsive Loss Function (Wang, Sun & Halgamuge, ICLR 2019; [P]).

The critic D maps images to R^d, and every expectation is that of a kernel k on its outputs; x, x' are
real, y, y' are fake. Both players minimise:

    generator   L_G  = E k(x, x') - 2 E k(x, y) + E k(y, y')                               Eq. (2)
    critic      L_D  = lambda E k(x, x') - (lambda - 1) E k(x, y) - E k(y, y')             Eq. (5)

--lam -1 is the attractive loss of MMD-GAN, Eq. (3); --lam 1 the repulsive loss, Eq. (4), which
pushes real pairs apart. rbf-b bounds the distances of the critic's kernel only, Eqs. (6), (7). Each layer
of D is divided by its spectral norm, found by power iteration on the convolution itself (PICO,
Appendix C), and multiplied by a gain C; C^K is that of all K layers. Both gradients come from one forward
pass of each network.

Published, CIFAR-10, best of 16 pairs of learning rates. With C = 1.818 for all losses (Table 1): MMD-rep FID
16.65, IS 7.99; MMD-rep-b 16.21, 8.29; MMD-rbf 28.38, 7.05. With the gains that are the defaults here
(Table S3): MMD-rep 17.00; MMD-rep-b 16.65 (no misprint for MMD-rep's 16.65 of Table 1) at critic 1e-3,
generator 5e-4, where the authors' sheet has 18.29 at the defaults; MMD-rbf 26.50; hinge 22.89. The best rates
in that sheet, of single runs, whose cells differ from Table S3 by 0.01 at places: FID, critic's and
generator's rate.

    loss            C^K  CIFAR-10          STL-10            CelebA            LSUN bedrooms
    MMD-rep          64  17.00 5e-4 2e-4   37.16 2e-4 2e-4    6.81 1e-4 2e-4   16.01 2e-4 1e-4
    MMD-rep-b        64  16.66 1e-3 5e-4   37.31 2e-4 2e-4    6.42 5e-4 5e-4   11.22 5e-4 2e-4
    at the defaults  64  18.29 5e-4 2e-4   the same           7.56 1e-4 2e-4   15.64 2e-4 1e-4
    MMD-rbf         128  26.51 1e-4 2e-4
    MMD-rbf          64  29.43 1e-4 1e-4
    hinge            64  23.50 1e-3 2e-4                     10.34 2e-4 1e-4   25.54 1e-4 5e-4
    MMD-rep, d = 4   64  17.87 1e-3 2e-4

Deviations from the paper [P] and from the authors' code [C]:
  1. C = 64^(1/K) for mmd with lambda > 0 and 128^(1/K) for every other loss: Table S3, which has four losses
     (that its two values serve the others too is our reading). [P]'s main text has 1.818 for all (1.818^8 =
     119): --sn-gain 1.818. [C]'s scripts have 64^(1/K) for all.
  2. The norm is taken after the step of power iteration, in [C] before it, with the vector that the update
     before left. Our vector starts normalised, after 20 steps; in [C] it starts unnormalised, which divides
     the weights of the first update by up to 159 (318 at 64x64). It has the shape of a layer's input, in [C]
     that of the smaller of input and output, which has the same norm.
  3. rbf-b is Eq. (6) for lambda < 0, as footnote 5 of [P] says, and Eq. (7), which bounds no pair of real and
     fake, from 0 on. [P] prints Eq. (7) for lambda = 1; that it serves 0 to 2 is our reading, and what [C]
     does. For lambda < 0 [C] bounds no such pair either, but has Eq. (6) as a loss of its own for -1.
  4. sigma = 1 where --bandwidths is not given, for --lam -1 too (Figure 3); MMD-rbf has five in Tables 1, S3.
  5. Linear first layer of the generator for every image size: [P]; [C] has batch norm, ReLU there at 48x48.
  6. Networks by levels for images of other sizes than 32, 48 and 64, and MLPs for toys: ours.
  7. --lambda-gp: [C] has the penalty, but its training step never calls it. Appendix D.1 goes with
     --critic-norm none --feature-dim 1. 1 is taken off for rbf-b too, where [C] leaves it out.
  8. --critic-norm pim has the gains of pico; [P] names gains for pico only.
  9. Both players step at once, from one forward pass: [C]; [P] says one update of D for each of G. Real
     and fake pass D one after the other with the same weights, in [C] joined in one batch, and D has no layer
     to which that would matter.
 10. eval/is_all is the inception score of [C], over all images at once; eval/is is the mean of 10 splits. [C]
     scores 49,984 images, ours are 50,000, as in [P]. For MS-SSIM [C] scales pixels by 128.5 where 127.5
     would fill the range of 255 that it tells the measure; ours fill it.
 11. Adam's epsilon of 1e-8 is added after the correction of the moments' bias (PyTorch), in [C] before it
     (TensorFlow): it matters where gradients are as small.

Usage:
    python mmd_gan_repulsive.py
    python mmd_gan_repulsive.py --dataset cifar10 --kernel rbf-b
    python mmd_gan_repulsive.py --lam -1 --kernel rbf --bandwidths 1 1.4142 2 2.8284 4
    python mmd_gan_repulsive.py --lambda-gp 0.1 --critic-norm none --feature-dim 1
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
    loss: Literal["mmd", "hinge", "non-saturating"] = "mmd"  # the last two: [P]'s baselines (App. B.1)
    lam: float = 1.0  # lambda of Eq. (5): -1 attractive (MMD-GAN), 1 repulsive
    lambda_gp: float = 0.0  # lambda of the gradient-penalised loss, Eq. (S8): 0.1 in the paper; 0 is off
    kernel: Literal["rbf", "rbf-b", "rq"] = "rbf"  # rbf-b bounds the critic's kernel, Eqs. (6), (7)
    bandwidths: tuple[float, ...] | None = None  # sigma of rbf (None: 1), alpha of rq (.2 .5 1 2 5); summed
    feature_dim: int | None = None  # dimension d of the critic's output
    critic_norm: Literal["none", "pim", "pico"] = "pico"  # spectral norm of matrix, or convolution
    sn_gain: float | None = None  # C (None: 64^(1/K) for K layers if loss is mmd and lam > 0, else 128^(1/K))
    latent_dim: int | None = None  # dimension of the generator's input z ~ N(0, I)
    learning_rate: float | None = None  # of the generator
    critic_learning_rate: float | None = None  # of the critic
    beta1: float = 0.5  # Adam's first moment, both players: Deviation 11
    beta2: float = 0.999  # Adam's second moment, both players


# [P] section 5.1; learning rates: [C]'s scripts, the best of their 16 pairs for MMD-rep with C^K = 64.
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=100_000, batch_size=64, width=64, feature_dim=16, latent_dim=128,
        learning_rate=2e-4, critic_learning_rate=1e-4, eval_every=12_500, eval_features="inception",
        train_split="train", eval_split="train", sample_bn="running",  # Deviation 10
    ),
    "cifar10": dict(image_size=32, critic_learning_rate=5e-4),
    "stl10": dict(image_size=48, critic_learning_rate=2e-4),
    "celeba": dict(train_split="all", eval_split="all"),  # [P]: about 203K images
    "lsun-bedroom": dict(learning_rate=1e-4, critic_learning_rate=2e-4),
    "mnist": dict(image_size=28, critic_learning_rate=5e-4, eval_features="pixels"),  # ours
    "digits": dict(image_size=8, total_steps=2000, width=32, eval_every=500, eval_features="pixels"),  # ours
    "toys": dict(total_steps=10_000, batch_size=256, width=512, latent_dim=2, eval_every=1000),  # ours
}  # fmt: skip
VALUE_RANGE = (-1.0, 1.0)
LOWER_BOUNDS = {"lambda_gp": 0, "sn_gain": 1e-15}  # bounds of the above
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})
    bandwidths = (0.2, 0.5, 1.0, 2.0, 5.0) if args.kernel == "rq" else (1.0,)  # Deviation 4
    method = {"bandwidths": bandwidths}
    if args.loss != "mmd":
        method["feature_dim"] = 1
        ok = args.feature_dim in (None, 1) and args.lambda_gp == 0
        run.require(ok, "--loss", args.loss, "mmd where --feature-dim or --lambda-gp is given")
    args = run.resolve(args, *defaults, method, lower_bounds=LOWER_BOUNDS)
    depth = 4 if args.dataset in datasets.TOYS else 2 * levels(args.image_size) + 2  # K
    if args.critic_norm == "none":
        run.require(args.sn_gain is None, "--sn-gain", args.sn_gain, "given with --critic-norm pim or pico")
        return args
    overall = 64 if args.loss == "mmd" and args.lam > 0 else 128  # C^K: Deviation 1
    return run.resolve(args, {"sn_gain": overall ** (1 / depth)})


# --- networks --------------------------------------------------------------------------------------


def levels(side: int) -> int:
    """Return how often an image is halved: 1 for 8x8, 3 for 32x32 (down to 4x4) and 48x48 (to 6x6)."""
    n = side.bit_length() - 3  # Deviation 6
    run.require(n >= 1 and side % 2**n == 0, "--image-size", side, "4, 5, 6 or 7 times 2, 4, 8, ...")
    return n


def initialise(layer: nn.Module, slope: float | None = None) -> None:
    """Draw a layer's weights as [C] does: for a (leaky) ReLU of that slope to follow, else Glorot uniform.

    TensorFlow cuts a normal law at two standard deviations, so 0.88 of the nominal one is left.
    """
    if slope is None:
        nn.init.xavier_uniform_(layer.weight)
    else:
        fan_in = layer.weight[0].numel()  # of a transposed convolution c_out k k, as in [C]
        std = (2 / (1 + slope**2) / fan_in) ** 0.5
        nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.trunc_normal_(layer.bias, std=1e-5, a=-2e-5, b=2e-5)


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape) in [-1, 1]; Tables S1 and S2 (a)."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int) -> None:
        super().__init__()
        if len(shape) == 1:
            sizes = [latent_dim, width, width, width]
            layers = []
            for i, o in zip(sizes, sizes[1:]):
                layers += [nn.Linear(i, o), nn.ReLU()]
            self.layers = nn.Sequential(*layers, nn.Linear(width, *shape))
            return
        n = levels(shape[1])
        c, h, w = width * 2**n, shape[1] >> n, shape[2] >> n
        first = nn.Linear(latent_dim, c * h * w)  # Deviation 5
        initialise(first)
        layers = [first, nn.Unflatten(1, (c, h, w))]
        for _ in range(n):
            deconv = nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False)
            initialise(deconv, slope=0.0)
            c = c // 2
            layers += [deconv, nn.BatchNorm2d(c, eps=1e-3, momentum=0.01), nn.ReLU()]
        last = nn.Conv2d(c, shape[0], 3, 1, 1)
        initialise(last)
        self.layers = nn.Sequential(*layers, last, nn.Tanh())

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class SpectralNorm(nn.Module):
    """Parametrisation W -> gain * W / sigma(W), with one step of power iteration per training forward.

    pico: sigma is the norm of the convolution on inputs of in_shape, Appendix C.1. Otherwise, and for
    dense layers, that of the kernel reshaped to (c_out, c_in * h * w).
    """

    def __init__(self, layer: nn.Module, in_shape: tuple[int, ...], gain: float, norm: str) -> None:
        super().__init__()
        self.gain = gain
        self.is_conv = norm == "pico" and isinstance(layer, nn.Conv2d)
        if self.is_conv:
            self.stride, self.padding = layer.stride, layer.padding
            # Rows and columns of the input that its last stride leaves out: the adjoint makes them too.
            sizes = zip(in_shape[1:], layer.padding, layer.kernel_size, layer.stride)
            self.output_padding = [(side + 2 * p - k) % s for side, p, k, s in sizes]
        size = in_shape if self.is_conv else layer.weight[0].flatten().shape
        v = torch.randn(1, *size, dtype=layer.weight.dtype)
        self.register_buffer("v", v / v.norm())
        self.iterate(layer.weight.detach(), 20)

    def operator(self, w: Tensor, v: Tensor) -> Tensor:
        if self.is_conv:
            return F.conv2d(v, w, None, self.stride, self.padding)
        return v @ w.flatten(1).T

    def adjoint(self, w: Tensor, u: Tensor) -> Tensor:
        if self.is_conv:
            return F.conv_transpose2d(u, w, None, self.stride, self.padding, self.output_padding)
        return u @ w.flatten(1)

    @torch.no_grad()
    def iterate(self, w: Tensor, steps: int) -> None:
        for _ in range(steps):
            u = self.operator(w, self.v)
            v = self.adjoint(w, u / (u.norm() + 1e-10))
            self.v.copy_(v / (v.norm() + 1e-10))

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            if self.training:
                self.iterate(weight, 1)
            v = self.v.clone()  # a constant: the next step of power iteration is not to change it
            sigma = self.operator(weight, v).norm()  # Deviation 2
            return weight * (self.gain / (sigma + 1e-10))  # Deviation 8


def normalise(layer: nn.Module, in_shape: tuple[int, ...], gain: float, norm: str) -> None:
    """Divide the weight of a layer, which sees (B, *in_shape), by its spectral norm; none: do nothing."""
    if norm != "none":
        parametrisation = SpectralNorm(layer, in_shape, gain, norm)
        nn.utils.parametrize.register_parametrization(layer, "weight", parametrisation)


class Critic(nn.Module):
    """Samples (B, *shape) -> features (B, feature_dim); Tables S1 and S2 (b); K = 2 levels + 2 layers."""

    def __init__(
        self, shape: tuple[int, ...], feature_dim: int, width: int, gain: float | None, norm: str
    ) -> None:
        super().__init__()
        if len(shape) == 1:
            hidden = [nn.Linear(*shape, width), nn.Linear(width, width), nn.Linear(width, width)]
        else:
            c = width
            hidden = [nn.Conv2d(shape[0], c, 3, 1, 1)]
            for _ in range(levels(shape[1])):
                hidden += [nn.Conv2d(c, 2 * c, 4, 2, 1), nn.Conv2d(2 * c, 2 * c, 3, 1, 1)]
                c = 2 * c
        layers = []
        x = torch.zeros(1, *shape)  # passed through, to know the shape that each layer sees
        for layer in hidden:
            initialise(layer, slope=0.1)
            out = layer(x).detach()
            normalise(layer, x.shape[1:], gain, norm)
            layers += [layer, nn.LeakyReLU(0.1)]
            x = out
        x = x.flatten(1)
        last = nn.Linear(x.shape[1], feature_dim)
        initialise(last)
        normalise(last, x.shape[1:], gain, norm)
        self.layers = nn.Sequential(*layers, nn.Flatten(), last)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_networks(args: Args, shape: tuple[int, ...], device: torch.device) -> tuple[Generator, Critic]:
    """Return both players for samples of a shape, drawn from PyTorch's generator."""
    generator = Generator(shape, args.latent_dim, args.width)
    critic = Critic(shape, args.feature_dim, args.width, args.sn_gain, args.critic_norm)
    return generator.to(device), critic.to(device)


# --- losses ----------------------------------------------------------------------------------------


def bounded(d2_xx: Tensor, d2_xy: Tensor, d2_yy: Tensor, lam: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return d2 (n, n) as the critic's rbf-b has it: nothing is gained beyond a bound. Deviation 3"""
    b_l, b_u = 0.25, 4.0
    if lam < 0:  # Eq. (6): real pairs and fake pairs are pulled together, mixed ones pushed apart
        return d2_xx.clamp_min(b_l), d2_xy.clamp_max(b_u), d2_yy.clamp_min(b_l)
    return d2_xx.clamp_max(b_u), d2_xy, d2_yy.clamp_min(b_l)  # Eq. (7): real pairs are pushed apart


def critic_loss(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor, lam: float) -> Tensor:
    """Return L_D of Eq. (5), minimised, for Gram matrices (n, n); no mean has the diagonal (Eq. S4)."""
    mean_xx = kernels.off_diagonal_mean(k_xx)
    mean_xy = kernels.off_diagonal_mean(k_xy)
    mean_yy = kernels.off_diagonal_mean(k_yy)
    return lam * mean_xx - (lam - 1) * mean_xy - mean_yy


def penalised(c_loss: Tensor, real_feat: Tensor, real: Tensor, lambda_gp: float) -> Tensor:
    """Return (L_D - 1) / (1 + lambda E ||grad D(x)||_F^2), Eq. (S8); real_feat (B, d) = D(real)."""
    norm2 = 0  # (B,), exact: a gradient for each of the d outputs
    for feat in real_feat.T:
        (grad,) = torch.autograd.grad(feat.sum(), real, create_graph=True)
        norm2 = norm2 + grad.flatten(1).square().sum(1)
    return (c_loss - 1) / (1 + lambda_gp * kernels.gather(norm2).mean())  # Deviation 7


def generator_loss(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor) -> Tensor:
    """Return L_G of Eq. (2) for Gram matrices (n, n), the U-statistic of MMD^2 (Eq. S4); may be negative."""
    return kernels.mmd2(k_xx, k_xy, k_yy, "u-statistic")


def losses(real_feat: Tensor, fake_feat: Tensor, args: Args) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return critic loss, generator loss and what is logged, for features (n, d); once each: Deviation 9."""
    if args.loss == "hinge":
        return F.relu(1 - real_feat).mean() + F.relu(1 + fake_feat).mean(), -fake_feat.mean(), {}
    if args.loss == "non-saturating":
        return F.softplus(-real_feat).mean() + F.softplus(fake_feat).mean(), F.softplus(-fake_feat).mean(), {}
    kernel = args.kernel.removesuffix("-b")
    d2 = kernels.squared_distance_blocks(real_feat, fake_feat)
    k_xx, k_xy, k_yy = [kernels.RADIAL[kernel](block, args.bandwidths) for block in d2]
    g_loss = generator_loss(k_xx, k_xy, k_yy)
    logged = kernels.block_means(k_xx, k_xy, k_yy)
    if args.kernel == "rbf-b":  # the critic's kernel alone: the generator keeps a true MMD
        bounds = bounded(*d2, args.lam)
        k_xx, k_xy, k_yy = [kernels.RADIAL[kernel](block, args.bandwidths) for block in bounds]
    return critic_loss(k_xx, k_xy, k_yy, args.lam), g_loss, logged


# --- sampling --------------------------------------------------------------------------------------


def draw_noise(n: int, args: Args, device: torch.device) -> Tensor:
    """Return z (n, latent_dim) ~ N(0, I)."""
    return torch.randn(n, args.latent_dim, device=device)


def interpolate(noise: Tensor) -> Tensor:
    """Return 8 points from each of 8 z to another (64, latent_dim), given z (16, latent_dim) ~ N(0, I).

    Along great circles: a straight line would pass nearer to 0 than any z does.
    """
    start, end = noise.split(8)
    cosine = F.cosine_similarity(start, end).clamp(-0.999, 0.999)  # of latent_dim 1 it is 1 or -1
    angle = cosine.acos()[:, None, None]
    t = torch.linspace(0, 1, 8, dtype=noise.dtype, device=noise.device)[:, None]
    along = ((1 - t) * angle).sin() * start[:, None] + (t * angle).sin() * end[:, None]
    return (along / angle.sin()).flatten(0, 1)


def draw_picture(path: Path, fake: Tensor, data: datasets.Batches) -> None:
    """Write a grid of generated images, or a scatter plot of real and generated points, as PNG."""
    if fake.ndim == 4:
        from torchvision.utils import save_image

        images = datasets.to_uint8(fake[:64], VALUE_RANGE).float() / 255
        images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-1]))  # small ones enlarged
        save_image(images, path)
    else:
        evaluation.draw_points(path, fake, data.name)


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
        critic.compile(disable=args.lambda_gp > 0)  # its gradient is differentiated again
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

    def evaluate() -> None:
        finite.check()
        metrics.update(evaluator.metrics(sample))
        run.save_results(folder, writer, args, step, metrics, evaluator.protocol, rank)

    @run.failures_noted()
    def picture() -> None:
        finite.check()
        if rank == 0:
            path = folder / "samples" / f"{step:07d}.png"
            draw_picture(path, sample(1000 if len(data.shape) == 1 else 64, 0), data)
            writer.add_image("samples/generator", np.asarray(Image.open(path)), step, dataformats="HWC")

    if args.eval_only:
        evaluate()
        picture()
        if rank == 0 and len(data.shape) == 3:
            torch.manual_seed(run.mix(args.seed, run.Stream.SAMPLES, 0))
            fake = generate(interpolate(draw_noise(16, args, device)))
            draw_picture(folder / "interpolations.png", fake, data)
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
        real = data.batch(step - 1).requires_grad_(args.lambda_gp > 0)
        noise = draw_noise(len(real), args, device)
        # Both players from one graph: simultaneous updates.
        with autocast, nn.utils.parametrize.cached():  # weights are normalised once for both forwards
            fake = generator(noise)
            real_feat, fake_feat = critic(real), critic(fake)
        real_feat, fake_feat = real_feat.float(), fake_feat.float()
        c_loss, g_loss, logged = losses(kernels.gather(real_feat), kernels.gather(fake_feat), args)
        if args.lambda_gp > 0:
            c_loss = penalised(c_loss, real_feat, real, args.lambda_gp)
        c_optimizer.zero_grad()
        g_optimizer.zero_grad()
        c_loss.backward(inputs=list(critic.parameters()), retain_graph=True)
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
