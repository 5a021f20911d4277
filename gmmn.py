"""Generative Moment Matching Networks (Li, Swersky & Zemel, ICML 2015; [L]); GMMN and GMMN+AE.

One network, no adversary: the generator G minimises the MMD between the data x and its samples y = G(z),

    generator   L_G = sqrt( E k(x, x') - 2 E k(x, y) + E k(y, y') )                       [G] Eqs. (4), (5)

with the biased estimate and a sum of Gaussian kernels ([G]: the GAMN paper, which restates it). GMMN+AE
(--autoencoder) first trains an auto-encoder, layer by layer and then as a whole, freezes it, and matches
codes instead of pixels; a sample is decoder(G(z)).

Bandwidths: the authors' numbers {2, 5, 10, 20, 40, 80} stand in exp(-d2 / (2 s)), so they are variances.
Here a bandwidth is sigma in exp(-d2 / (2 sigma^2)), and the table below takes their square roots. Codes
of MNIST are matched with the single variance 1, which is the default with --autoencoder.

Published: MNIST log-likelihood 147 +- 2, and 282 +- 2 with the auto-encoder ([L], quoted at second hand);
CIFAR-10 IS 2.45 and 2.78 ([G], Table 2), 3.47 and 3.94 with other networks (Li et al. 2017).

Dropout is that of the authors' code [C]: masked inputs are not made up for in training; after a layer's own
training its weights and biases are divided by 1 - p, once, where the usual rule would multiply them; codes
are then made with the weights as they are. So are its momentum (a velocity with the learning rate in it),
its schedule (changes at updates 10,000, 50 and 200) and its choice of the auto-encoder (of those looked at
every 100 updates that of the lowest training loss). --parzen measures what GMMN was published with:
log-likelihoods of the test images under Gaussian windows around 10,000 samples. For that 5,000 of MNIST's
training images are held out, as in [C].

Deviations from the paper [L] and from the authors' code [C]:
  1. Weight 1 on the loss. [C] has 1000 and divides by the 1000 generated samples, which is the same.
  2. No gradient where MMD^2 is 0, where [C] divides by 2 sqrt(MMD^2) + 1e-10: 1e-10 of the gradient.
  3. Batches: those of the auto-encoder are the first 100 images of the generator's, where [C] shuffles
     for itself; what is left of an epoch is dropped, where [C] begins the next batch with it. Every image
     is as likely as before, but an epoch shows the auto-encoder a tenth of them.
  4. The training loss is looked at after the last update of each part too: [C] looks every 100 only, which
     is the same unless --ae-steps is no multiple of 100.
  5. On toys, which [L] has not: the networks of the GAMN paper (width 512) and Gaussian noise, as WGAN-GP's
     code; PyTorch's initialisation, Adam, and bandwidths of our own, since the published list cannot
     tell the modes apart. Batches of 256, where [G] has GMMN's 1000: fifteen times less work per step and a
     noisier estimate (its floor, the root of the biased MMD^2 of equal distributions, is twice as high).
     On digits: bandwidths that fit its scale, and smaller networks, batches and steps.
  6. Image sets but MNIST take MNIST's settings, whatever their size, and the training loss is that of at
     most 60,000 images. [C] has the Toronto faces beside MNIST, with an auto-encoder of its own (512-512-128,
     dropout 0.1, 15,000 steps).
  7. --kernel rq (alphas of Binkowski et al. 2018), laplacian, distance and --optimizer adam are not in [L].

Usage:
    python gmmn.py
    python gmmn.py --dataset 25gaussians
    python gmmn.py --dataset mnist --autoencoder --parzen
"""

# --- imports ---------------------------------------------------------------------------------------

import copy
import math
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
    autoencoder: bool = False  # GMMN+AE: match the codes of an auto-encoder that is trained first
    ae_steps: int | None = None  # updates of each layer of the auto-encoder, and then of the whole
    kernel: Literal["rbf", "rq", "laplacian", "distance"] = "rbf"  # the paper's is rbf
    bandwidths: tuple[float, ...] | None = None  # sigma of rbf and laplacian, alpha of rq; distance has none
    feature_dim: int = 32  # dimension of the auto-encoder's code
    latent_dim: int | None = None  # dimension of the generator's input z ~ U(-1, 1); on toys N(0, I)
    optimizer: Literal["sgd", "adam"] | None = None  # the paper's is sgd
    learning_rate: float | None = None  # of the generator
    momentum: float = 0.9  # of SGD; Adam's first moment
    drop_step: int | None = None  # step from which on learning rate and 1 - momentum of SGD are a tenth
    parzen: bool = False  # with each evaluation, the log-likelihood that GMMN was published with (mnist)


# [C]'s settings for MNIST; bandwidths: square roots of its variances.
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=40_000, batch_size=1000, width=1024, ae_steps=3000, latent_dim=10,
        bandwidths=tuple(v**0.5 for v in (2, 5, 10, 20, 40, 80)), optimizer="sgd", learning_rate=2.0,
        drop_step=10_000, eval_every=5000, eval_features="inception", train_split="train",
        eval_split="train", sample_bn="running",
    ),
    "cifar10": dict(image_size=32),  # Deviation 6
    "stl10": dict(image_size=48),
    "mnist": dict(image_size=28, eval_features="pixels"),  # fashion-mnist too
    "digits": dict(
        image_size=8, total_steps=4000, batch_size=500, width=512, drop_step=3000, eval_every=1000,
        bandwidths=tuple(v**0.5 for v in (0.25, 0.5, 1, 2, 4, 8)), learning_rate=0.2, eval_features="pixels",
    ),  # ours
    "toys": dict(
        total_steps=4000, batch_size=256, width=512, latent_dim=2, drop_step=3200, eval_every=1000,
        bandwidths=(0.05, 0.1, 0.2, 0.5, 1.0), learning_rate=1e-3, optimizer="adam",
    ),  # ours; Deviation 5
}  # fmt: skip
AE_BATCH = 100  # real images per update of the auto-encoder
AE_RATE = 0.1  # its learning rate
AE_GRADIENT = 10.0  # the largest norm of its gradient
AE_DROPOUT = (0.2, 0.5)  # share of dropped inputs of its encoder's two layers
AE_LOOK = 100  # updates after which the loss of the training images is looked at
AE_LOOK_IMAGES = 60_000  # at most; Deviation 6
HELD_OUT = 5000  # images of MNIST that are not trained on
PARZEN_SAMPLES = 10_000
PARZEN_SIGMAS = tuple(percent / 100 for percent in range(10, 30))  # 0.10, 0.11, ..., 0.29
PARZEN_PROTOCOL = (
    "nats; 10,000 samples, Gaussian windows, their width of 0.10 to 0.29 chosen on the 5,000 held-out images;"
    " mean over all test images, pixels in [0, 1], with its standard error"
)
VALUE_RANGE = (0.0, 1.0)
LOWER_BOUNDS = {"width": 16, "ae_steps": 1, "drop_step": 0}  # bounds of the above
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})
    method = {}
    if args.kernel == "rq":
        method = {"bandwidths": (0.2, 0.5, 1.0, 2.0, 5.0)}  # Deviation 7
    elif args.kernel == "rbf" and args.autoencoder:
        method = {"bandwidths": (1.0,)}  # [C]: one kernel
    toy = args.dataset in datasets.TOYS
    run.require(not (args.autoencoder and toy), "--autoencoder", "on", "left out for a data set of points")
    args = run.resolve(args, *defaults, method, lower_bounds=LOWER_BOUNDS)
    if args.parzen:
        expected = "off but for mnist and fashion-mnist with --train-split train"
        run.require(holds_out(args), "--parzen", "on", expected)
        run.require(args.eval_every or args.eval_only, "--parzen", "on", "off with --eval-every 0")
    return args


def holds_out(args: Args) -> bool:
    """Return whether images are held out: those of MNIST, unless all are asked for."""
    return datasets.family(args.dataset) == "mnist" and args.train_split == "train"


# --- networks --------------------------------------------------------------------------------------


def initialise(module: nn.Module) -> None:
    """Draw weights from N(0, 1 / fan_in) and set biases to 0, as [C]."""
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=module.in_features**-0.5)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape); in [0, 1] for images and codes."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int, toy: bool) -> None:
        super().__init__()
        hidden = [width, width, width] if toy else [width // 16, width // 4, width // 4, width]
        layers, inputs = [], latent_dim
        for outputs in hidden:
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
            inputs = outputs
        layers.append(nn.Linear(inputs, math.prod(shape)))
        if not toy:
            layers.append(nn.Sigmoid())
        self.layers = nn.Sequential(*layers, nn.Unflatten(1, shape))
        if not toy:  # few inputs and no biases would make G(c z) = c G(z): toys keep PyTorch's own
            self.layers.apply(initialise)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Autoencoder(nn.Module):
    """Images (B, *shape) in [0, 1] <-> codes (B, feature_dim) in [0, 1]: two sigmoid layers each way.

    updates: how many it has had, a buffer, so that a checkpoint knows how far its training has come.
    lowest: the lowest loss of the training images that was seen in this part of its training.
    """

    def __init__(self, shape: tuple[int, ...], feature_dim: int, width: int) -> None:
        super().__init__()
        size = math.prod(shape)
        self.encoders = nn.ModuleList([nn.Linear(size, width), nn.Linear(width, feature_dim)])
        self.decoders = nn.ModuleList([nn.Linear(width, size), nn.Linear(feature_dim, width)])
        self.shape = shape
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer("lowest", torch.zeros(()))
        self.apply(initialise)

    def encode_layer(self, x: Tensor, layer: int, dropout: str = "off") -> Tensor:
        """Return the output of layer 0 or 1 of the encoder.

        dropout, as [C]: "mask" drops inputs and leaves the others as they are, in training; "divide" has
        weights and bias divided by 1 - p, when the loss is looked at; "off" takes them as they are.
        """
        p = AE_DROPOUT[layer]
        if dropout == "mask":
            x = x * (torch.rand(len(x), x.shape[1], device=x.device) > p)
        activation = self.encoders[layer](x)
        if dropout == "divide":
            activation = activation / (1 - p)
        return activation.sigmoid()

    def encode(self, x: Tensor, dropout: str = "off") -> Tensor:
        hidden = self.encode_layer(x.flatten(1), 0, dropout)
        return self.encode_layer(hidden, 1, dropout)

    def logits(self, code: Tensor) -> Tensor:
        """Return what decode is the sigmoid of."""
        hidden = self.decoders[1](code).sigmoid()
        return self.decoders[0](hidden).unflatten(1, self.shape)

    def decode(self, code: Tensor) -> Tensor:
        return self.logits(code).sigmoid()


# --- losses ----------------------------------------------------------------------------------------


def generator_loss(real_feat: Tensor, fake_feat: Tensor, kernel: str, bandwidths: tuple) -> Tensor:
    """Return L_G, [G] Eq. (4), of pixels or codes (n, d); at least 0. It has a first derivative only."""
    # E k(x, x') - 2 E k(x, y) + E k(y, y'), diagonals kept; of its Gram matrices only tiles are ever held
    mmd2 = kernels.fused_mmd2(real_feat, fake_feat, kernel, bandwidths, "biased")
    return kernels.safe_sqrt(mmd2)  # Deviations 1 and 2


def layer_loss(autoencoder: Autoencoder, x: Tensor, layer: int, dropout: str = "mask") -> Tensor:
    """Return the cross-entropy of one layer's reconstruction of its own input, the code of those below."""
    target = x.flatten(1)
    if layer == 1:
        with torch.no_grad():
            target = autoencoder.encode_layer(target, 0)
    code = autoencoder.encode_layer(target, layer, dropout)
    logits = autoencoder.decoders[layer](code)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(x)


def autoencoder_loss(autoencoder: Autoencoder, x: Tensor, dropout: str = "mask") -> Tensor:
    """Return the cross-entropy of the whole auto-encoder's reconstruction of x (B, *shape)."""
    logits = autoencoder.logits(autoencoder.encode(x, dropout))
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


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


def draw_picture(path: Path, fake: Tensor, data: datasets.Batches) -> None:
    """Write a grid of generated images, or a scatter plot of real and generated points, as PNG."""
    if fake.ndim == 4:
        from torchvision.utils import save_image

        images = datasets.to_uint8(fake[:64], VALUE_RANGE).float() / 255
        images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-1]))  # small ones enlarged
        save_image(images, path)
    else:
        evaluation.draw_points(path, fake, data.name)


def log_likelihoods(x: Tensor, samples: Tensor, sigmas: tuple[float, ...]) -> Tensor:
    """Return log p_s(x_i) in nats, (len(sigmas), len(x)) float64, of each x_i and each s of sigmas.

    p_s(x) = mean_j N(x; y_j, s^2 I), a Gaussian window around each of the samples y (m, d); x (n, d).
    """
    samples = samples.double()
    dimensions = samples.shape[1]
    found = []
    for rows in x.split(500):  # 500 x 10,000 distances of 8 bytes: 40 MB
        d2 = kernels.squared_distances(rows.double(), samples)
        values = []
        for sigma in sigmas:
            log_sum = torch.logsumexp(d2 / (-2 * sigma**2), 1)
            log_volume = dimensions / 2 * math.log(2 * math.pi * sigma**2)
            values.append(log_sum - math.log(len(samples)) - log_volume)
        found.append(torch.stack(values))
    return torch.cat(found, 1)


def parzen(held_out: Tensor, test: Tensor, sample) -> dict[str, float]:
    """Return the mean log-likelihood of the test images with its standard error, as [C].

    The width of the windows is that of PARZEN_SIGMAS at which the held-out images are likeliest.

    held_out, test: images (n, c, h, w) uint8. sample(1000, i) is chunk i of samples, in [0, 1].
    """
    chunks = PARZEN_SAMPLES // 1000
    samples = torch.cat([sample(1000, i).flatten(1) for i in range(chunks)])
    means = log_likelihoods(held_out.flatten(1).double() / 255, samples, PARZEN_SIGMAS).mean(1)
    sigma = PARZEN_SIGMAS[means.argmax()]
    samples = torch.cat([sample(1000, chunks + i).flatten(1) for i in range(chunks)])  # [C] draws anew
    values = log_likelihoods(test.flatten(1).double() / 255, samples, (sigma,))[0]
    error = values.std(correction=0) / len(values) ** 0.5
    return {
        "parzen": values.mean().item(),
        "parzen_se": error.item(),
        "parzen_sigma": sigma,
        "parzen_held_out": means.max().item(),
    }


# --- training --------------------------------------------------------------------------------------


class Momentum(torch.optim.Optimizer):
    """[C]'s gradient descent: velocity v <- momentum v - learning_rate gradient, weights <- weights + v.

    torch.optim.SGD has the rate outside its velocity, so that its next step shrinks with the rate, where
    here the velocity runs down; and with momentum 0 it keeps none.
    """

    def __init__(self, params: list[nn.Parameter], learning_rate: float, momentum: float) -> None:
        super().__init__(params, {"lr": learning_rate, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Move the parameters that have a gradient."""
        for group in self.param_groups:
            for weights in group["params"]:
                if weights.grad is None:
                    continue
                if "velocity" not in self.state[weights]:
                    self.state[weights]["velocity"] = torch.zeros_like(weights)
                velocity = self.state[weights]["velocity"]
                velocity.mul_(group["momentum"]).sub_(weights.grad, alpha=group["lr"])
                weights.add_(velocity)


def make_optimizer(generator: Generator, args: Args) -> torch.optim.Optimizer:
    """Return the generator's optimiser: [C]'s gradient descent, or Adam."""
    if args.optimizer == "sgd":
        return Momentum(list(generator.parameters()), args.learning_rate, args.momentum)
    return torch.optim.Adam(generator.parameters(), args.learning_rate, (args.momentum, 0.999))


def set_rate(optimizer: torch.optim.Optimizer, step: int, args: Args) -> float:
    """Set, and return, the learning rate of generator update step = 1, 2, ...; with SGD its momentum too."""
    tenth = 0.1 if step >= args.drop_step else 1.0
    group = optimizer.param_groups[0]
    group["lr"] = tenth * args.learning_rate
    if args.optimizer == "sgd":
        group["momentum"] = 1 - tenth * (1 - args.momentum)
    return group["lr"]


def part_of_training(update: int, ae_steps: int) -> tuple[int, int]:
    """Return part 0, 1 (a layer) or 2 (the whole) of the auto-encoder's training, and the iteration in it,
    both of update 1, 2, ...; iterations count from 1."""
    part, before = divmod(update - 1, ae_steps)
    return part, before + 1


def autoencoder_momentum(part: int, iteration: int) -> float:
    """Return the momentum of an update of the auto-encoder; the whole forgets the layers' velocities."""
    if part < 2:
        return 0.5
    if iteration < 50:
        return 0.0
    return 0.5 if iteration < 200 else 0.9


def part_loss(autoencoder: Autoencoder, x: Tensor, part: int, dropout: str) -> Tensor:
    """Return what is minimised in a part of the auto-encoder's training."""
    if part < 2:
        return layer_loss(autoencoder, x, part, dropout)
    return autoencoder_loss(autoencoder, x, dropout)


@torch.no_grad()
def training_loss(autoencoder: Autoencoder, data: datasets.Images, part: int) -> Tensor:
    """Return the loss of the training images, without noise: that by which [C] chooses the best weights."""
    images = data.images[:AE_LOOK_IMAGES]
    total = torch.zeros((), device=data.device)
    for chunk in images.split(1000)[data.rank :: data.world_size]:
        x = chunk.to(data.device).float() / 255
        total += part_loss(autoencoder, x, part, "divide") * len(x)
    return kernels.gather(total[None]).sum() / len(images)


@torch.no_grad()
def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Set target's parameters to those of source."""
    for old, new in zip(target.parameters(), source.parameters()):
        old.copy_(new)


def update_autoencoder(
    autoencoder: Autoencoder,
    best: Autoencoder,
    optimizer: Momentum,
    data: datasets.Images,
    real: Tensor,
    update: int,
    ae_steps: int,
) -> Tensor:
    """Make update 1, 2, ...: ae_steps for each layer, then for the whole auto-encoder; return its loss.

    best holds the weights at which the training loss was lowest, and each part ends with them.
    """
    part, iteration = part_of_training(update, ae_steps)
    if iteration == 1:
        autoencoder.lowest.copy_(training_loss(autoencoder, data, part))
        copy_weights(autoencoder, best)

    loss = part_loss(autoencoder, real, part, "mask")
    optimizer.param_groups[0]["momentum"] = autoencoder_momentum(part, iteration)
    optimizer.zero_grad()
    loss.backward()
    kernels.average_gradients(autoencoder)
    nn.utils.clip_grad_norm_(autoencoder.parameters(), AE_GRADIENT)
    optimizer.step()
    autoencoder.updates += 1

    if iteration % AE_LOOK == 0 or iteration == ae_steps:  # Deviation 4
        now = training_loss(autoencoder, data, part)
        if now < autoencoder.lowest:
            autoencoder.lowest.copy_(now)
            copy_weights(autoencoder, best)
    if iteration == ae_steps:
        copy_weights(best, autoencoder)
        if part < 2:  # [C] divides here, once for all; what follows trains these weights on
            with torch.no_grad():
                for weights in autoencoder.encoders[part].parameters():
                    weights.div_(1 - AE_DROPOUT[part])
    return kernels.gather(loss.detach()[None]).mean()


def hold_out(data: datasets.Images) -> tuple[datasets.Images, Tensor]:
    """Return data without the images that [C] holds out, and those, (HELD_OUT, c, h, w) uint8."""
    order = torch.from_numpy(np.random.RandomState(0).permutation(len(data.images))).to(data.images.device)
    rest = copy.copy(data)
    rest.images = data.images[order[HELD_OUT:]]
    size, most = data.batch_size, len(rest.images)
    run.require(size <= most, "--batch-size", size, f"at most {most}: {HELD_OUT} images are held out")
    return rest, data.images[order[:HELD_OUT]]


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
    if holds_out(args):
        data, held_out = hold_out(data)
    if args.parzen:
        test = datasets.load_images(args.dataset, args.data_dir, args.image_size, "test").to(device)
        evaluator.protocol["parzen"] = PARZEN_PROTOCOL

    # Models; the seed makes every process start from the same weights.
    torch.manual_seed(args.seed)
    code_shape = (args.feature_dim,) if args.autoencoder else data.shape
    generator = Generator(code_shape, args.latent_dim, args.width, args.dataset in datasets.TOYS).to(device)
    g_optimizer = make_optimizer(generator, args)
    models = {"generator": generator, "g_optimizer": g_optimizer}
    if args.autoencoder:
        autoencoder = Autoencoder(data.shape, args.feature_dim, args.width).to(device)
        best = copy.deepcopy(autoencoder)
        ae_optimizer = Momentum(list(autoencoder.parameters()), AE_RATE, 0.0)
        models |= {"autoencoder": autoencoder, "best_autoencoder": best, "ae_optimizer": ae_optimizer}
    models["data"] = data  # of which a checkpoint knows what it is, so that no other is gone on with
    if args.ema_decay:
        models["ema"] = copy.deepcopy(generator)
    step = run.load_checkpoint(args, SCRIPT, models, run.MAY_CHANGE | {"parzen"})  # 0 without --resume
    if args.compile:
        generator.compile()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # Run folder
    folder = run.make_folder(args, SCRIPT, command, rank)
    ae_total, ae_done = (3 * args.ae_steps, int(autoencoder.updates)) if args.autoencoder else (0, 0)
    writer = run.make_writer(folder, args, step + ae_done - ae_total, rank)  # the auto-encoder's end at 0
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
            fake = run.for_sampling(model, args.sample_bn)(noise).float()
            return autoencoder.decode(fake) if args.autoencoder else fake

    def sample(n: int, i: int) -> Tensor:
        """Return chunk i of samples, (n, *shape)."""
        torch.manual_seed(run.mix(args.seed, run.Stream.SAMPLES, i))
        return generate(draw_noise(n, args, device))

    def evaluate() -> None:
        finite.check()
        metrics.update(evaluator.metrics(sample))
        if args.parzen:
            metrics.update(evaluation.from_first(lambda: parzen(held_out, test, sample)))
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

    # The auto-encoder comes before the generator: layer by layer, then as a whole.
    updates = range(ae_done + 1, ae_total + 1)
    for update in tqdm(updates, "auto-encoder", disable=None if rank == 0 and updates else True):
        torch.manual_seed(run.mix(args.seed, run.Stream.AUTOENCODER, update, rank))
        real = data.batch(update - 1)[: max(1, AE_BATCH // world_size)]  # Deviation 3
        ae_loss = update_autoencoder(autoencoder, best, ae_optimizer, data, real, update, args.ae_steps)
        finite.note(update, autoencoder=ae_loss)
        if args.log_every and update % args.log_every == 0:
            run.write_scalars(writer, {"losses/autoencoder": ae_loss}, update - ae_total)
        stopping = run.stop_asked(update)
        if (args.save_every and update % args.save_every == 0) or update == ae_total or stopping:
            save()
        if stopping:
            run.leave(writer, folder, update)
    encode = autoencoder.encode if args.autoencoder else nn.Flatten()

    begin, begin_step = time.time(), step
    steps = range(step + 1, args.total_steps + 1)
    for step in tqdm(steps, initial=step, total=args.total_steps, disable=None if rank == 0 else True):
        # Whatever is random in a step depends on its number alone.
        torch.manual_seed(run.mix(args.seed, run.Stream.STEP, step, rank))
        real = data.batch(step - 1)
        noise = draw_noise(len(real), args, device)

        with torch.no_grad():
            real_feat = encode(real)
        with autocast:
            fake_feat = generator(noise).flatten(1)
        real_feat, fake_feat = kernels.gather(real_feat.float()), kernels.gather(fake_feat.float())
        g_loss = generator_loss(real_feat, fake_feat, args.kernel, args.bandwidths)
        rate = set_rate(g_optimizer, step, args)
        g_optimizer.zero_grad()
        g_loss.backward(inputs=list(generator.parameters()))
        kernels.average_gradients(generator)
        g_optimizer.step()

        if args.ema_decay:
            run.update_average(models["ema"], generator, args.ema_decay, step)
        finite.note(step, generator=g_loss)

        if last_or_every(args.log_every):
            finite.check()
            with torch.no_grad():
                blocks = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
            scalars = {"losses/generator": g_loss, "charts/learning_rate": rate}
            scalars |= kernels.block_means(*blocks)
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
