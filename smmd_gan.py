"""Scaled MMD GAN (Arbel, Sutherland, Binkowski & Gretton, NeurIPS 2018; [P]: its poster), and what it is
compared with: the gradient-penalised MMD GAN of Binkowski et al. (ICLR 2018; [B]), plain MMD GAN, SWGAN.

The critic phi maps images to R^d; x, x' are real, y, y' are fake, k is a kernel on critic features, and

    MMD^2 = E k(x, x') - 2 E k(x, y) + E k(y, y')

is estimated without bias. Both players minimise:

    scaled             L_G = s2 MMD^2        L_C = -s2 MMD^2
    gradient-penalty   L_G = MMD^2           L_C = -MMD^2 + lambda_gp E (||grad w(m)|| - 1)^2
                                                   + lambda_activation E (squared outputs of all layers)
    none               L_G = MMD^2           L_C = -MMD^2
    swgan              L_G = s (E phi(x) - E phi(y)),  L_C = -L_G

s2 = s^2 shrinks as the critic gets steeper, which keeps the distance continuous and the critic finite:

    released           s2 = 1 / (1 + lambda E ||grad phi(x)||_F^2),  lambda = 10;  swgan adds ||phi(x)||^2
    poster             s2 = 1 / (lambda + E [k(x, x) + sum_i d2k / dy_i dz_i at y = z = x]),  lambda = 1

(the gradients are those by the pixels of x). w(m) = E k(phi(m), phi(x)) - E k(phi(m), phi(y)) is the
witness function, m lies between a real and a fake image. The continuity of the scaled MMD asks for critic
layers of bounded condition numbers: --critic-norm orthogonal makes them 1, pim controls them in practice [P];
--log-condition-numbers shows them.

Published (CIFAR-10): SMMD IS 7.0, FID 31.5; SN-SMMD 7.3, 25.0 (Wang et al. 2019); [B] 6.51, 39.9.

Deviations from the papers [P], [B] and from the authors' code [C]:
  1. The scale is that of [C], which made the published numbers: lambda weighs the gradient alone, and every
     kernel has the same form. [P]'s adds lambda to the rest: --scale-form poster. For rbf with sigma 1, [C]'s
     is a tenth of [P]'s with lambda -0.9, so the gradient weighs more.
  2. distance is -||a - b||. [C] has sqrt(||a||^2 + e) + sqrt(||b||^2 + e) - sqrt(||a - b||^2 + e), e = 1e-5:
     the first two cancel in MMD^2, e changes its gradient by 1 to 3 percent for d = 1, by less for more.
  3. The penalty is on the norm of the whole gradient: [B]. In [C] of [B] the norm is over the rows of each
     column and channel, which asks for a whole norm of sqrt(w c), 9.8 on CIFAR-10: --as-coded. In [C] of [P]
     it is over the channels of each pixel: sqrt(h w), 32.
  4. rq-linear leaves out its true diagonal, len(bandwidths) + ||phi||^2. [C] subtracts the constant part
     only, which rewards large features in the critic and small ones in the generator: --as-coded.
  5. alpha of rq is the list of [B], five values. The default of [C] is --bandwidths 0.1 1 10.
  6. At 128 pixels and above the residual blocks of the generator have no batch norm, as in [C] of the
     published CelebA runs, which its flag does not reach. [C] of [B] has it in every block.
  7. The vectors of the spectral norm start after 15 iterations (PyTorch), which find 0.98 of the norm of a
     layer. In [C] they start random: the first norms are 0.8 of the true ones, weights a quarter larger.
     Real, fake and m see the same weights, after one iteration in each update of either player. In [C] each
     of the three has an iteration of its own: no difference once the vectors follow the weights.
  8. 5x5 layers of stride 2 pad (2, 1) and not (1, 2): the same network on mirrored images.
  9. The learning rate is constant, as in the runs of [B]. [C] of [P] lowers it by KID: --lr-schedule kid. At
     step 0 and every 2000th (MNIST: 500th) it tests whether KID is better than ten evaluations ago, so first
     at 20,000. Three failures in a row make both rates 0.8 times as large, the generator's 1e-6 at least. The
     test asks for a KID that is lower by 0.004 or more, whatever the noise (a floor under its variance, of
     which ours is another estimate): late in training it is a timetable. The KID of pixels is smaller than
     that: there the floor is 1e-12, and the noise decides. [C]'s step 0 is after the first update.
 10. All processes share one statistic of the whole batch. In [C] each GPU has its own, of 64 images, and
     gradients are clipped on each, then averaged: three on ImageNet, so 192 images per update there.
 11. Ours: one or two levels for images below 32 pixels; the networks of 32 pixels up to 63, of 64 up to 127,
     of 160 from 128 on; MLPs for toys, whose coordinates are no pixels in [0, 1]: lambda 0.1 and no norm.
     Image sets but those of the table have the learning rate of [C]'s ImageNet runs.
 12. Trained on the test images of CIFAR-10 and MNIST and on all of CelebA, as [C] of both papers:
     --train-split train leaves them out. CelebA's random crop and mirroring are drawn once for each image, in
     [C] at each use; LSUN's crop is central, in [C] of [B] random.
 13. gradient-penalty keeps the networks, the latent dimension and the schedule of [P], so that only the
     constraint differs. [B] has DCGAN networks, 100 dimensions and 5 critic updates throughout.
 14. From [C], and not in [P]: the 10 critic updates at the beginning and after each 500th step, and the
     clipping of each variable's gradient. From [P], and not in [C]: --critic-norm orthogonal, PyTorch's.
     Adam is PyTorch's too: its epsilon of 1e-8 comes after the correction of bias, in TensorFlow before it,
     which gradients of that size feel.
 15. The critic's last layer is normalised as its others are. That of [C] below 64 pixels has spectral norm 1
     always, without a factor: what the factor of another layer, or its free weights, can make up for.

Usage:
    python smmd_gan.py
    python smmd_gan.py --dataset cifar10 --constraint scaled --critic-norm none
    python smmd_gan.py --dataset cifar10 --constraint scaled --critic-norm pim
    python smmd_gan.py --dataset cifar10 --constraint none --critic-norm none
    python smmd_gan.py --dataset cifar10 --constraint none --critic-norm pim
    python smmd_gan.py --dataset cifar10 --constraint gradient-penalty
The second to the fifth are [P]'s models SMMD, SN-SMMD, MMD, SN-MMD; the last is [B]. All released runs with a
spectral norm but SN-GAN's learn a factor on their weights; --no-sn-scale leaves the norms at 1.
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
    constraint: Literal["scaled", "gradient-penalty", "none", "swgan"] = "scaled"  # on the critic
    scale_form: Literal["released", "poster"] = "released"  # of scaled and swgan, see above
    lambda_scale: float | None = None  # lambda of the scale, for pixels in [0, 1] (10; 1 in poster form)
    lambda_gp: float = 1.0  # weight of the gradient penalty, with gradient-penalty
    lambda_activation: float = 1.0  # weight of the activation penalty, with gradient-penalty
    as_coded: bool = False  # [C]'s penalty on the norm over rows, and its diagonal of rq-linear
    kernel: Literal["rbf", "rq", "rq-linear", "distance", "linear"] | None = None  # None: by constraint
    bandwidths: tuple[float, ...] | None = None  # sigma of rbf (None: 1), alpha of rq (.2 .5 1 2 5); summed
    feature_dim: int | None = None  # dimension d of the critic's output (None: by constraint)
    critic_norm: Literal["none", "pim", "orthogonal"] | None = None  # of weights (None: by constraint)
    sn_scale: bool = True  # pim: a learned factor on each normalised weight; off: their norm is 1
    log_condition_numbers: bool = False  # of each critic layer's (c_out, rest) matrix, with the curves
    n_critic: int = 5  # critic updates per generator update
    warmup_critic: int = 10  # the same for the first 20 generator updates and after each 500th
    latent_dim: int | None = None  # dimension of the generator's input z ~ U(-1, 1)
    learning_rate: float | None = None  # of the generator
    critic_learning_rate: float | None = None  # of the critic (None: the generator's)
    beta1: float = 0.5  # Adam's first moment, both players
    beta2: float = 0.9  # Adam's second moment, both players
    clip_norm: float = 1.0  # largest norm of the gradient of each variable, both players; 0 is off
    lr_schedule: Literal["constant", "kid"] = "constant"  # kid: x 0.8 where KID is no better, down to 1e-6


# [C] of [P]; with gradient-penalty too: its networks and schedule, so that only the constraint differs.
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=150_000, batch_size=64, width=64, latent_dim=128, learning_rate=2e-4,
        lambda_scale=10.0, eval_every=10_000, eval_features="inception", train_split="train",
        eval_split="train", sample_bn="batch",
    ),
    "cifar10": dict(image_size=32, learning_rate=1e-4, train_split="all", eval_split="all"),  # Deviation 12
    "stl10": dict(image_size=48),  # ours
    "imagenet": dict(batch_size=192),  # Deviation 10
    "celeba": dict(image_size=160, learning_rate=1e-4, train_split="all", eval_split="all"),
    "lsun-bedroom": dict(learning_rate=1e-4),  # [B]
    "mnist": dict(
        image_size=28, total_steps=50_000, learning_rate=1e-4, eval_features="pixels", train_split="all",
        eval_split="all",
    ),  # fashion-mnist too
    "digits": dict(
        image_size=8, total_steps=1000, width=16, learning_rate=1e-3, eval_every=250, eval_features="pixels",
    ),  # ours
    "toys": dict(
        total_steps=5000, batch_size=256, width=128, latent_dim=2, learning_rate=2e-4, eval_every=500,
        lambda_scale=0.1, critic_norm="none",
    ),  # ours
}  # fmt: skip
CONSTRAINTS = {  # [C] of [P], and of [B] for the penalty; Deviation 13
    "scaled": dict(kernel="rbf", feature_dim=1, critic_norm="pim"),
    "gradient-penalty": dict(kernel="rq-linear", feature_dim=16, critic_norm="none"),
    "none": dict(kernel="rbf", feature_dim=1, critic_norm="none"),
    "swgan": dict(kernel="linear", feature_dim=1, critic_norm="pim"),
}
VALUE_RANGE = (0.0, 1.0)
LOWER_BOUNDS = {"lambda_scale": 0, "lambda_gp": 0, "lambda_activation": 0, "clip_norm": 0, "warmup_critic": 1}
LOWEST_RATE = 1e-6  # that --lr-schedule kid goes down to: [C]
KID_ARGS = {"eval_every", "eval_samples", "eval_features", "eval_split", "inception_weights"}  # it counts on
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    family = datasets.family(args.dataset)
    toy = args.dataset in datasets.TOYS
    kid = args.lr_schedule == "kid"
    poster = args.scale_form == "poster"
    tables = [CONSTRAINTS[args.constraint], DEFAULTS["images"]]
    if kid:
        tables.append({"eval_every": 500 if family == "mnist" else 2000})  # [C]
    tables.append(DEFAULTS.get(family, {}))
    if poster:
        tables.append({"lambda_scale": 1.0})
    args = run.resolve(args, *tables, lower_bounds=LOWER_BOUNDS)
    bandwidths = (0.2, 0.5, 1.0, 2.0, 5.0) if args.kernel in ("rq", "rq-linear") else (1.0,)  # Deviation 5
    args = run.resolve(args, {"bandwidths": bandwidths, "critic_learning_rate": args.learning_rate})

    if not toy:
        levels(args.image_size)  # which refuses a size that fits no network
    if args.constraint == "swgan":
        linear = args.kernel == "linear" and args.feature_dim == 1
        expected = "without --kernel and --feature-dim, which are linear and 1"
        run.require(linear, "--constraint", "swgan", expected)
    if poster:
        scaled = args.constraint in ("scaled", "swgan")
        run.require(scaled, "--scale-form", "poster", "left out: this --constraint has no scale")
        expected = "another one, smooth: --scale-form is poster"
        run.require(args.kernel != "distance", "--kernel", "distance", expected)
    if kid and not args.eval_only:
        has_kid = args.eval_every > 0 and args.eval_metrics == "all" and not toy
        expected = "constant: no KID of points, with --eval-every 0 or fid alone"
        run.require(has_kid, "--lr-schedule", "kid", expected)
        expected = f"at least {LOWEST_RATE}, where --lr-schedule kid ends"
        run.require(args.learning_rate >= LOWEST_RATE, "--learning-rate", args.learning_rate, expected)
    if not args.sn_scale:
        expected = "left out, or given with --critic-norm pim"
        run.require(args.critic_norm == "pim", "--no-sn-scale", "given", expected)
    if args.as_coded:
        about = args.constraint == "gradient-penalty" or args.kernel == "rq-linear"
        expected = "left out: it is about the gradient penalty and rq-linear"
        run.require(about, "--as-coded", "on", expected)
    return args


# --- networks --------------------------------------------------------------------------------------


def levels(side: int) -> int:
    """Return how often an image is halved: 1 for 8x8, 3 for 32x32, 4 for 64x64, 5 for 160x160 (to 5x5)."""
    n = side.bit_length() - 3  # Deviation 11
    run.require(n >= 1 and side % 2**n == 0, "--image-size", side, "4, 5, 6 or 7 times 2, 4, 8, ...")
    return n


def initialise(module: nn.Module) -> None:
    """Draw the weights of a layer as [C], and set its bias to 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.trunc_normal_(module.weight, std=0.02, a=-0.04, b=0.04)
    elif isinstance(module, nn.ConvTranspose2d):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
    elif isinstance(module, ResBlock):  # to which apply comes after its convolutions
        nn.init.xavier_uniform_(module.conv1.weight)
        nn.init.xavier_uniform_(module.conv2.weight)
        nn.init.xavier_uniform_(module.shortcut.weight)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


class ResBlock(nn.Module):
    """(B, c_in, h, w) -> (B, c_out, 2h, 2w) if up, else (B, c_out, h/2, w/2)."""

    def __init__(self, c_in: int, c_out: int, up: bool, batch_norm: bool) -> None:
        super().__init__()
        hidden = c_out if up else c_in
        self.up = up
        self.norm1 = nn.BatchNorm2d(c_in) if batch_norm else nn.Identity()
        self.conv1 = nn.Conv2d(c_in, hidden, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(hidden) if batch_norm else nn.Identity()
        self.conv2 = nn.Conv2d(hidden, c_out, 3, 1, 1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.relu(self.norm1(x))
        if self.up:
            h = F.interpolate(h, scale_factor=2)
        h = F.relu(self.norm2(self.conv1(h)))
        h = self.conv2(h)
        if self.up:
            x = F.interpolate(x, scale_factor=2)
        else:
            h = F.avg_pool2d(h, 2)
            x = F.avg_pool2d(x, 2)
        return h + self.shortcut(x)


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape) in [0, 1]; on toys an MLP, whose samples have no bounds."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int) -> None:
        super().__init__()
        if len(shape) == 1:
            first = [nn.Linear(latent_dim, width), nn.ReLU()]
            more = [nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
            self.layers = nn.Sequential(*first, *more, nn.Linear(width, *shape))
            return
        side = shape[1]
        n = levels(side)
        start = side >> n  # 4, 5, 6 or 7 pixels
        doublings = n if side < 128 else n - 1  # from 128 pixels the last layer doubles the image too
        c = width * 2**doublings
        layers = [nn.Linear(latent_dim, c * start * start), nn.Unflatten(1, (c, start, start))]
        for _ in range(doublings):
            if side < 64:  # that of SNDCGAN
                deconv = nn.ConvTranspose2d(c, c // 2, 5, 2, 2, 1)  # Deviation 8
                layers += [nn.BatchNorm2d(c), nn.ReLU(), deconv]
            else:  # ResNet-10
                layers += [ResBlock(c, c // 2, up=True, batch_norm=side < 128)]  # Deviation 6
            c //= 2
        if side < 128:
            last = nn.Conv2d(width, shape[0], 3, 1, 1)
        else:
            last = nn.ConvTranspose2d(width, shape[0], 5, 2, 2, 1)  # Deviation 8
        self.layers = nn.Sequential(*layers, nn.BatchNorm2d(width), nn.ReLU(), last, nn.Sigmoid())
        self.apply(initialise)
        nn.init.normal_(last.weight, std=0.02)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class SumOverSpace(nn.Module):
    """(B, c, h, w) -> (B, c)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sum((2, 3))


def leaky(layer: nn.Module) -> nn.Sequential:
    """Return layer, followed by a leaky ReLU."""
    return nn.Sequential(layer, nn.LeakyReLU(0.2))


class Critic(nn.Module):
    """Samples (B, *shape) -> list of the outputs of all layers, the last the features (B, feature_dim).

    weighted: the layers that normalise and condition_numbers see. No batch norm.
    """

    def __init__(self, shape: tuple[int, ...], feature_dim: int, width: int) -> None:
        super().__init__()
        image = len(shape) == 3
        side = shape[1] if image else 0
        n = levels(side) if image else 0
        end = side >> n  # 4, 5, 6 or 7 pixels
        c = width
        before_last = [nn.Flatten()]
        if not image:
            layers = [leaky(nn.Linear(*shape, width))]
            layers += [leaky(nn.Linear(width, width)), leaky(nn.Linear(width, width))]
            inputs = width
        elif side < 64:  # that of SNDCGAN
            layers = [leaky(nn.Conv2d(shape[0], c, 3, 1, 1))]
            for _ in range(n):
                layers += [leaky(nn.Conv2d(c, 2 * c, 4, 2, 1)), leaky(nn.Conv2d(2 * c, 2 * c, 3, 1, 1))]
                c *= 2
            inputs = c * end * end
        elif side < 128:  # ResNet-10
            layers = [leaky(nn.Conv2d(shape[0], c, 3, 1, 1))]
            for _ in range(n):
                layers += [ResBlock(c, 2 * c, up=False, batch_norm=False)]
                c *= 2
            before_last = [nn.LeakyReLU(0.2), SumOverSpace()]  # no output of their own: [C]
            inputs = c
        else:  # DCGAN, of 5 layers at 128 and 160 pixels
            layers = [leaky(nn.Conv2d(shape[0], c, 5, 2, 2))]  # Deviation 8
            for _ in range(n - 1):
                layers += [leaky(nn.Conv2d(c, 2 * c, 5, 2, 2))]
                c *= 2
            inputs = c * end * end
        last = nn.Linear(inputs, feature_dim)  # Deviation 15
        self.layers = nn.Sequential(*layers, nn.Sequential(*before_last, last))
        self.weighted = [m for m in self.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
        if image:  # on toys, PyTorch's own initial weights
            self.apply(initialise)
            nn.init.normal_(last.weight, std=0.02 if side < 64 else 0.01)
            if 64 <= side < 128:
                nn.init.xavier_uniform_(self.weighted[0].weight)

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for layer in self.layers:
            x = layer(x)
            outputs.append(x)
        return outputs


class Scale(nn.Module):
    """Parametrisation W -> factor * W, the factor learned."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(()))

    def forward(self, weight: Tensor) -> Tensor:
        return self.factor * weight


class InFloat32(nn.Module):
    """Parametrisation that is another one, computed in float32 whatever --precision says."""

    def __init__(self, parametrisation: nn.Module) -> None:
        super().__init__()
        self.parametrisation = parametrisation

    def forward(self, weight: Tensor) -> Tensor:
        with torch.autocast(weight.device.type, enabled=False):
            return self.parametrisation(weight)


def normalise(critic: Critic, norm: str, sn_scale: bool) -> None:
    """Give the weights, as matrices (c_out, rest), spectral norm 1, or orthonormal rows or columns.

    sn_scale: with pim, multiply each by a learned factor.
    """
    if norm == "none":
        return
    register = nn.utils.parametrize.register_parametrization
    for layer in critic.weighted:
        if norm == "orthogonal":  # PyTorch's is that of the last two dimensions: there must be two
            shape = layer.weight.shape
            layer.weight = nn.Parameter(layer.weight.detach().flatten(1))
            nn.utils.parametrizations.orthogonal(layer)
            register(layer, "weight", nn.Unflatten(1, shape[1:]), unsafe=True)
        else:
            nn.utils.parametrizations.spectral_norm(layer)  # Deviation 7
            if sn_scale:
                register(layer, "weight", Scale())
        parts = layer.parametrizations.weight
        for i, part in enumerate(parts):
            parts[i] = InFloat32(part)


def condition_numbers(critic: Critic) -> dict[str, Tensor]:
    """Return largest / smallest singular value of each layer's weight (c_out, rest), by name of curve."""
    critic.eval()  # reading a weight in training mode would move the vectors of its spectral norm
    numbers = {}
    for i, layer in enumerate(critic.weighted, 1):
        matrix = layer.weight.detach().flatten(1).float()
        numbers[f"condition/layer_{i}"] = torch.linalg.cond(matrix)
    critic.train()
    return numbers


def make_networks(args: Args, shape: tuple[int, ...], device: torch.device) -> tuple[Generator, Critic]:
    """Return both players for samples of a shape, drawn from PyTorch's generator."""
    generator = Generator(shape, args.latent_dim, args.width)
    critic = Critic(shape, args.feature_dim, args.width)
    normalise(critic, args.critic_norm, args.sn_scale)
    return generator.to(device), critic.to(device)


# --- losses ----------------------------------------------------------------------------------------


def jacobian_norm2(feat: Tensor, inputs: Tensor, create_graph: bool) -> Tensor:
    """Return ||grad phi||_F^2 (n,), exact, for feat (n, d) = phi(inputs): one backward pass per output."""
    norm2 = 0
    for output in feat.unbind(1):  # (n,), each of its own input alone
        (grad,) = torch.autograd.grad(output.sum(), inputs, retain_graph=True, create_graph=create_graph)
        norm2 = norm2 + kernels.at_least_float32(grad).flatten(1).square().sum(1)
    return norm2


def distance_scale(feat: Tensor, real: Tensor, args: Args, create_graph: bool) -> Tensor | float:
    """Return what multiplies the distance: s2, s for swgan, 1 with no scale; for feat (n, d) = phi(real)."""
    if args.constraint not in ("scaled", "swgan"):
        return 1.0
    norm2 = kernels.gather(jacobian_norm2(feat, real, create_graph)).mean()  # Deviation 10
    feat2 = kernels.gather(feat).square().sum(1).mean()
    if args.scale_form == "poster":  # Deviation 1
        s2 = 1 / (args.lambda_scale + kernel_energy(feat2, norm2, args.kernel, args.bandwidths))
    elif args.constraint == "swgan":
        s2 = 1 / (1 + args.lambda_scale * (norm2 + feat2))
    else:
        s2 = 1 / (1 + args.lambda_scale * norm2)
    return s2.sqrt() if args.constraint == "swgan" else s2


def kernel_energy(feat2: Tensor, norm2: Tensor, kernel: str, bandwidths: tuple[float, ...]) -> Tensor:
    """Return E [k(x, x) + sum_i d2k / dy_i dz_i at y = z = x] of [P], a kernel being a sum over bandwidths.

    For k(a, b) = kappa(||a - b||^2) it is kappa(0) - 2 kappa'(0) E ||grad phi||_F^2, and kappa(0) = 1. A
    kernel of your own needs its own slope. feat2: E ||phi(x)||^2. norm2: E ||grad phi(x)||_F^2.
    """
    energy = 0
    if kernel == "rbf":
        slope = sum(1 / s**2 for s in bandwidths)  # -2 kappa'(0)
        energy = len(bandwidths) + slope * norm2
    elif kernel in ("rq", "rq-linear"):
        energy = len(bandwidths) + len(bandwidths) * norm2  # -2 kappa'(0) = 1 for every alpha
    if kernel in ("linear", "rq-linear"):
        energy = energy + feat2 + norm2  # of <a, b>
    return energy


def squared_mmd(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor, args: Args) -> Tensor:
    """Return the unbiased estimate of MMD^2, which may be negative, for Gram matrices (n, n)."""
    mmd2 = kernels.mmd2(k_xx, k_xy, k_yy, "unbiased")  # Deviation 2, of the kernel distance
    if args.as_coded and args.kernel == "rq-linear":  # Deviation 4
        diagonals = (k_xx.trace() + k_yy.trace()) / len(k_xx)
        left = diagonals - 2 * len(args.bandwidths)  # ||phi||^2: the constant taken off is that of rq alone
        mmd2 = mmd2 + left / (len(k_xx) - 1)
    return mmd2


def critic_distance(
    real_feat: Tensor, fake_feat: Tensor, k_xx: Tensor, k_xy: Tensor, k_yy: Tensor, args: Args
) -> Tensor:
    """Return what the players fight over, not yet scaled: MMD^2, or E phi(x) - E phi(y) for swgan."""
    if args.constraint == "swgan":
        return real_feat.mean() - fake_feat.mean()
    return squared_mmd(k_xx, k_xy, k_yy, args)


def critic_loss(distance: Tensor, scale: Tensor | float) -> Tensor:
    """Return L_C without penalties, minimised: minus the scaled distance, the scale differentiated too."""
    return -scale * distance


def generator_loss(distance: Tensor, scale: Tensor | float) -> Tensor:
    """Return L_G, minimised: the scaled distance, the scale a constant."""
    return scale * distance


def between(real: Tensor, fake: Tensor) -> Tensor:
    """Return m (n, *shape), each at a random place on the line from a real sample to a fake one."""
    u = torch.rand(len(real), device=real.device).reshape(-1, *[1] * (real.ndim - 1))
    return real + u * (fake - real)


def gradient_penalty(m: Tensor, m_feat: Tensor, real_feat: Tensor, fake_feat: Tensor, args: Args) -> Tensor:
    """Return E (||grad w(m)|| - 1)^2 for m (n, *shape) and features (n, d); all three get gradients."""
    _, k_mx, _ = kernels.gram_blocks(m_feat, real_feat, args.kernel, args.bandwidths)
    _, k_my, _ = kernels.gram_blocks(m_feat, fake_feat, args.kernel, args.bandwidths)
    witness = k_mx.mean(1) - k_my.mean(1)  # w(m) = mean_i k(phi(m), phi(x_i)) - mean_j k(phi(m), phi(y_j))
    (grad,) = torch.autograd.grad(witness.sum(), m, create_graph=True)
    norm2 = grad.flatten(1).square().sum(1)
    if args.as_coded and m.ndim == 4:  # Deviation 3
        norm2 = grad.square().sum(2)  # (n, c, w), over the rows
    norm = kernels.gather((norm2 + 1e-5).sqrt())
    return (norm - 1).square().mean()


def activation_penalty(real_outputs: list[Tensor], fake_outputs: list[Tensor]) -> Tensor:
    """Return the mean square of each layer's output (n, ...), summed over layers, and over real and fake."""
    total = sum(kernels.at_least_float32(h).square().mean() for h in [*real_outputs, *fake_outputs])
    return kernels.gather(total[None]).mean()


def clip_each(module: nn.Module, clip_norm: float) -> None:
    """Scale down the gradient of each variable by itself to norm clip_norm at most; 0 does nothing."""
    if clip_norm == 0:
        return
    for parameter in module.parameters():
        nn.utils.clip_grad_norm_(parameter, clip_norm)


# --- sampling --------------------------------------------------------------------------------------


def draw_noise(n: int, args: Args, device: torch.device) -> Tensor:
    """Return z (n, latent_dim) ~ U(-1, 1)."""
    return torch.rand(n, args.latent_dim, device=device) * 2 - 1


def interpolate(noise: Tensor) -> Tensor:
    """Return 8 points from each of 8 z to another (64, latent_dim), given z (16, latent_dim) ~ U(-1, 1)."""
    start, end = noise.split(8)
    t = torch.linspace(0, 1, 8, dtype=noise.dtype, device=noise.device)[:, None]
    return torch.lerp(start[:, None], end[:, None], t).flatten(0, 1)


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


def critic_steps(step: int, args: Args) -> int:
    """Return the number of critic updates before generator update step = 1, 2, ..."""
    return args.warmup_critic if step <= 20 or step % 500 == 1 else args.n_critic  # Deviation 14


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return KID's (<x, y> / d + 1)^3, (n, m), of features (n, d) and (m, d)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_sums(real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Return what a three-sample test needs of features (n, d): small enough to be kept for later tests.

    value: the part of the unbiased MMD^2 that depends on fake. variance: its own part of the test's variance.
    by_real: (n,), the mean of the kernel between each real and all fake. n is at least 3, real the same in
    all tests.
    """
    n = len(real)
    real, fake = real.double(), fake.double()
    k_xy = cubic_kernel(real, fake)
    k_yy = cubic_kernel(fake, fake).fill_diagonal_(0)
    by_real = k_xy.mean(1)  # of each real with all fake
    by_fake = k_xy.mean(0)  # of each fake with all real
    within = k_yy.sum(1) / (n - 1)  # of each fake with all other fake
    value = within.mean() - 2 * by_fake.mean()
    # Hoeffding's second-order terms: variances of the kernel less those of its projections.
    g_yy = k_yy.square().sum() / (n * (n - 1)) - 2 * within.square().mean() + within.mean() ** 2
    g_xy = k_xy.square().mean() - by_fake.square().mean() - by_real.square().mean() + k_xy.mean() ** 2
    second = 2 / (n * (n - 1)) * g_yy + 4 / n**2 * g_xy
    # Means over n have noise of their own, by which the first-order term has the second twice too much.
    variance = 4 / n * (within - by_fake).var() - second
    return {"value": value, "variance": variance, "by_real": by_real}


def three_sample_test(new: dict, old: dict, floor: float = 1e-5) -> tuple[float, float]:
    """Return t = (MMD^2(X, Y) - MMD^2(X, Z)) / sqrt(max(v, floor)) and p = Phi(t), small if Y improves on Z.

    new, old: kernel_sums of X with Y and with Z. v is the variance of the difference of two U-statistics that
    share X: first- and second-order terms (Bounliphone et al. 2016; Binkowski et al. 2018, with the floor).
    """
    shared = 4 / len(new["by_real"]) * (new["by_real"] - old["by_real"]).var()
    variance = new["variance"] + old["variance"] + shared
    t = (new["value"] - old["value"]) / variance.clamp_min(floor).sqrt()
    return t.item(), torch.special.ndtr(t).item()


class KidSchedule:
    """Lowers a learning rate, by factor, where KID stops improving: [C], and that of [B].

    The first 10 evaluations are remembered, each further one is tested against the oldest: if better (p at
    most 0.1) it takes the oldest's place. The third in a row that is not lowers the rate, and of the memory
    only the last two and itself are left. Of inception the test's variance has [C]'s floor; of pixels, whose
    KID is smaller, none to speak of.
    """

    def __init__(self, factor: float, features: str = "inception") -> None:
        self.factor = factor
        self.floor = 1e-5 if features == "inception" else 1e-12
        self.memory = []  # kernel_sums, the oldest first
        self.failures = 0

    def step(self, sums: dict[str, Tensor]) -> float:
        """Return what to multiply the learning rate by after an evaluation, given its kernel_sums."""
        if len(self.memory) < 10:
            self.memory.append(sums)
            return 1.0
        _, p = three_sample_test(sums, self.memory[0], self.floor)
        if p <= 0.1:
            self.memory = [*self.memory[1:], sums]
            self.failures = 0
            return 1.0
        self.failures += 1
        if self.failures < 3:
            return 1.0
        self.memory = [*self.memory[-2:], sums]
        self.failures = 0
        return self.factor

    def state_dict(self) -> dict:
        return {"memory": list(self.memory), "failures": self.failures}

    def load_state_dict(self, state: dict) -> None:
        self.memory = list(state["memory"])
        self.failures = state["failures"]


def may_change(args: Args) -> set[str]:
    """Return the arguments that may differ when a run goes on: none that a KID schedule counts on."""
    if args.lr_schedule == "kid" and not args.eval_only:
        return run.MAY_CHANGE - KID_ARGS
    return run.MAY_CHANGE


def follow_kid(
    schedule: KidSchedule,
    evaluator: evaluation.Evaluator,
    g_optimizer: torch.optim.Optimizer,
    c_optimizer: torch.optim.Optimizer,
) -> None:
    """Let the evaluation that was last decide whether the learning rates fall."""
    factor = schedule.step(evaluation.from_first(lambda: kernel_sums(*evaluator.features)))
    if factor < 1:
        lower_rates(g_optimizer, c_optimizer, factor)


def lower_rates(
    g_optimizer: torch.optim.Optimizer, c_optimizer: torch.optim.Optimizer, factor: float
) -> None:
    """Multiply the generator's learning rate by factor, down to 1e-6; the critic's keeps its ratio to it."""
    old = g_optimizer.param_groups[0]["lr"]
    new = max(LOWEST_RATE, factor * old)
    for group in g_optimizer.param_groups + c_optimizer.param_groups:
        group["lr"] *= new / old


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
    models["lr_schedule"] = schedule = KidSchedule(0.8, args.eval_features)  # Deviation 9
    step = run.load_checkpoint(args, SCRIPT, models, may_change(args))  # 0 without --resume
    if args.compile:
        generator.compile()
        critic.compile(disable=args.constraint != "none")  # its gradient is differentiated again
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
    if args.lr_schedule == "kid" and not schedule.memory:  # the first to be remembered is that of step 0
        evaluate()
        follow_kid(schedule, evaluator, g_optimizer, c_optimizer)
    drawn = sum(critic_steps(i, args) + 1 for i in range(1, step + 1))  # batches
    begin, begin_step = time.time(), step
    steps = range(step + 1, args.total_steps + 1)
    for step in tqdm(steps, initial=step, total=args.total_steps, disable=None if rank == 0 else True):
        # Whatever is random in a step depends on its number alone.
        torch.manual_seed(run.mix(args.seed, run.Stream.STEP, step, rank))
        # Critic: several updates, each with a batch of its own.
        for _ in range(critic_steps(step, args)):
            real = data.batch(drawn)
            drawn += 1
            noise = draw_noise(len(real), args, device)
            with autocast:
                with torch.no_grad():
                    fake = generator(noise)
                with nn.utils.parametrize.cached():  # weights are normalised once for all forwards
                    real_out, fake_out = critic(real.requires_grad_()), critic(fake)  # for the scale
                    if args.constraint == "gradient-penalty":
                        m = between(real, fake.float())
                        m_feat = critic(m)[-1].float()
            real_feat, fake_feat = real_out[-1], fake_out[-1]
            scale = distance_scale(real_feat.float(), real, args, create_graph=True)
            real_feat, fake_feat = kernels.gather(real_feat.float()), kernels.gather(fake_feat.float())
            k_xx, k_xy, k_yy = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
            distance = critic_distance(real_feat, fake_feat, k_xx, k_xy, k_yy, args)
            c_loss = critic_loss(distance, scale)
            if args.constraint == "gradient-penalty":
                c_loss = c_loss + args.lambda_gp * gradient_penalty(m, m_feat, real_feat, fake_feat, args)
                c_loss = c_loss + args.lambda_activation * activation_penalty(real_out, fake_out)
            c_optimizer.zero_grad()
            c_loss.backward(inputs=list(critic.parameters()))
            kernels.average_gradients(critic)
            clip_each(critic, args.clip_norm)
            c_optimizer.step()

        # Generator: one update, with a new batch.
        real = data.batch(drawn)
        drawn += 1
        noise = draw_noise(len(real), args, device)
        with autocast:
            fake = generator(noise)
            with nn.utils.parametrize.cached():
                real_feat, fake_feat = critic(real.requires_grad_())[-1], critic(fake)[-1]
        scale = distance_scale(real_feat.float(), real, args, create_graph=False)  # no function of fake
        real_feat, fake_feat = kernels.gather(real_feat.float()), kernels.gather(fake_feat.float())
        k_xx, k_xy, k_yy = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
        distance = critic_distance(real_feat, fake_feat, k_xx, k_xy, k_yy, args)
        g_loss = generator_loss(distance, scale)
        g_optimizer.zero_grad()
        g_loss.backward(inputs=list(generator.parameters()))
        kernels.average_gradients(generator)
        clip_each(generator, args.clip_norm)
        g_optimizer.step()

        if args.ema_decay:
            run.update_average(models["ema"], generator, args.ema_decay, step)
        finite.note(step, critic=c_loss, generator=g_loss)

        if last_or_every(args.log_every):
            finite.check()
            scalars = {"losses/critic": c_loss, "losses/generator": g_loss}
            rate = g_optimizer.param_groups[0]["lr"]
            scalars |= {"losses/distance": distance, "losses/scale": scale, "charts/learning_rate": rate}
            scalars |= kernels.block_means(k_xx, k_xy, k_yy)
            scalars |= condition_numbers(critic) if args.log_condition_numbers else {}
            scalars |= {"charts/steps_per_second": (step - begin_step) / (time.time() - begin)}
            run.write_scalars(writer, scalars, step)
        if last_or_every(args.sample_every):
            picture()
        if args.eval_every and last_or_every(args.eval_every):
            evaluate()
            if args.lr_schedule == "kid" and step % args.eval_every == 0:  # Deviation 9
                follow_kid(schedule, evaluator, g_optimizer, c_optimizer)
        stopping = run.stop_asked(step) and step < args.total_steps
        if last_or_every(args.save_every) or stopping:
            save()
        if stopping:
            run.leave(writer, folder, step)

    run.finish(writer, folder, args, rank)
    return metrics


if __name__ == "__main__":
    run.main(train, Args)
