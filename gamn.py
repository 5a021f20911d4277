"""Generative Adversarial Mapping Networks (the GAMN paper; [P]).

The critic is [P]'s mapper F: it takes samples to R^d, where real and fake are compared by their MMD. The
mapper drives it up, the generator G drives it down. x is real, y = G(z) is fake; both players minimise:

    generator   L_G = M [+ w M_data]                                     Eq. (6) [section Robustness]
    mapper      L_D = -M + lambda Reg                                              Eqs. (7) to (10), see 1

    M   = sqrt( E k(F(x), F(x')) - 2 E k(F(x), F(y)) + E k(F(y), F(y')) )    Eqs. (3), (4): biased, see 2
    Reg = E (|| grad_t sum_i F_i(t) || - 1)^2, t between x and y          --regularizer gp, Eq. (7)
          sum |w_n|, sum w_n^2 over the scales and shifts of F's layer norm              l1, l2: Eqs. (9), (8)
          sum w^2 over all parameters of F                          weight-decay: "classical L2", Table 3

k is a sum of RBF kernels. The penalty is on the gradient of the SUM of the outputs: one backward pass.
M_data is the MMD of the samples themselves (--data-mmd-weight), with the same k; [P] recommends to add it
with gp, for a slight gain on images. On 25gaussians it finds more of the modes.

Published: CIFAR-10, best IS over training: gp 6.44 (d = 10), 6.43 (d = 2 and 3), l1 6.35, l2 6.25,
weight-decay 6.01 (Tables 2, 3); MMD on toys 0.276, 0.284, 0.286, by a kernel that is not given (Table 1).

Deviations from the paper [P], which has no code; [W] is that of Gulrajani et al. 2017, of which [P] has data
sets, baselines and batch sizes:
  1. The regulariser is subtracted from what the mapper maximises. [P] adds it in Eqs. (7) to (10) and in
     Algorithm 1, by which the mapper would drive its penalty up.
  2. M: fake samples in the third expectation of Eq. (3), where [P] writes real ones; the mean of k is under
     the root of Eq. (4), where [P] prints 1 / m^2 before it, which would be M / m (at most 0.0124 for
     m = 256 and five kernels: Table 1's 0.28 excludes it); no gradient where M is 0, where the root has none.
  3. [P] gives batch sizes, d, Adam, toys' four layers of 512 units and the kinds of normalisation, and
     nothing else of what is set below: each help says so, but for those of the run block. What is filled in
     is [W]'s, but for the bandwidths (MMD-GAN's, on toys ours), 1e-3 for l1, l2 and weight-decay (ours) and
     what 6 says.
  4. Which layers are normalised: in G all but the last, on toys none (batch statistics blur a sample by more
     than the width of a mode); in F each convolution but the first (the only one of an 8x8 image too) and
     each hidden layer on toys. So have [W]'s DCGAN of 64x64; its critics for 28 and 32 pixels have no norm,
     nor has its generator for 28. Layer norm is over (c, h, w) with one scale per channel, as [W]. At 28
     pixels batch norm sees the 7x7 that are kept, where [W] cuts them from 8x8 after its norm.
     On toys biases start as PyTorch's, where [W] has 0 and no norm: else F could not see how far a point is.
  5. Grey images in [-1, 1] and tanh, where [W] has [0, 1] and a sigmoid. Distances between images are twice
     [W]'s, so F may rise twice as much from black to white; --gp-target 0.5 is [W]'s penalty.
  6. Ours: networks of images that are not 28, 32 or 64 pixels (their weights start as those of 64x64), and
     how toys are trained. [P] has width 512, for which a step takes twice as long as for our 256. [W] has
     100,000 steps at 1e-4 for both players, 5 mapper updates and lambda 0.1; with a few thousand steps of
     that kind the mapper runs ahead and the generator drops modes.
  7. --kernel laplacian and rq, the latter with the alphas of Binkowski et al. 2018: [P] has rbf alone.

Usage:
    python gamn.py
    python gamn.py --dataset 25gaussians --data-mmd-weight 1 --lambda-reg 10 --ema-decay 0.995
    python gamn.py --regularizer l1 --feature-dim 2
    python gamn.py --dataset cifar10 --feature-dim 3
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
    kernel: Literal["rbf", "laplacian", "rq"] = "rbf"  # of the mapper's features; the paper's is rbf
    bandwidths: tuple[float, ...] | None = None  # (1-16; toys .05-1; rq .2-5); not given in the paper
    regularizer: Literal["gp", "l1", "l2", "weight-decay"] = "gp"  # Reg in the mapper's loss
    lambda_reg: float | None = None  # of Reg (None: gp 10, on toys 1; others 1e-3); not given in the paper
    gp_target: float = 1.0  # norm of the gradient that gp asks for
    data_mmd_weight: float = 0.0  # w of M_data in the generator's loss; not given in the paper
    n_critic: int | None = None  # mapper updates per round (None: 5, on toys 2); not given in the paper
    n_generator: int = 1  # generator updates per round; not given in the paper
    feature_dim: int = 10  # dimension d of the mapper's output
    latent_dim: int | None = None  # dimension of the generator's input z ~ N(0, I); not given in the paper
    learning_rate: float | None = None  # of the generator; not given in the paper
    critic_learning_rate: float | None = None  # of the mapper; not given in the paper
    beta1: float | None = None  # Adam's first moment (0.5; 64-pixel sets, folders: 0); not given in the paper
    beta2: float = 0.9  # Adam's second moment, both players; not given in the paper


# Batch sizes: [P]; the rest: [W]. Deviation 3
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=200_000, batch_size=64, width=64, latent_dim=128, learning_rate=1e-4,
        critic_learning_rate=1e-4, beta1=0.0, n_critic=5, eval_every=12_500, eval_features="inception",
        train_split="train", eval_split="train", sample_bn="batch",
    ),
    "cifar10": dict(image_size=32, width=128, beta1=0.5),
    "stl10": dict(image_size=48, beta1=0.5),  # ours
    "mnist": dict(image_size=28, batch_size=50, beta1=0.5, eval_features="pixels"),  # fashion-mnist too
    "digits": dict(
        image_size=8, total_steps=1000, width=32, latent_dim=32, learning_rate=5e-4,
        critic_learning_rate=5e-4, beta1=0.5, eval_every=500, eval_features="pixels",
    ),  # ours
    "toys": dict(
        total_steps=4000, batch_size=256, width=256, latent_dim=2, learning_rate=5e-4,
        critic_learning_rate=1e-4, beta1=0.5, n_critic=2, eval_every=500, sample_bn="running",
    ),  # ours; Deviation 6
}  # fmt: skip
VALUE_RANGE = (-1.0, 1.0)
LOWER_BOUNDS = {"lambda_reg": 0, "gp_target": 0, "data_mmd_weight": 0, "n_generator": 1}
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})
    toy = args.dataset in datasets.TOYS
    bandwidths = (0.05, 0.1, 0.2, 0.5, 1.0) if toy else (1.0, 2.0, 4.0, 8.0, 16.0)
    if args.kernel == "rq":
        bandwidths = (0.2, 0.5, 1.0, 2.0, 5.0)  # Deviation 7
    lambda_reg = 1e-3
    if args.regularizer == "gp":
        lambda_reg = 1.0 if toy else 10.0
    method = {"bandwidths": bandwidths, "lambda_reg": lambda_reg}
    args = run.resolve(args, *defaults, method, lower_bounds=LOWER_BOUNDS)
    if not toy:
        sides(args.image_size)  # which refuses a size that fits no network
    return args


# --- networks --------------------------------------------------------------------------------------


def sides(side: int) -> list[int]:
    """Return the sides of the feature maps: 8, 4 for 8x8; 28, 14, 7, 4; 32, 16, 8, 4; 48, 24, 12, 6."""
    run.require(side >= 7, "--image-size", side, "at least 7")
    found = [side]  # Deviation 6
    while found[-1] > 6:
        found.append((found[-1] + 1) // 2)
    return found


def initialise(layer: nn.Module, side: int) -> None:
    """Draw the weights of a layer for images of side pixels from [W]'s uniform laws; set biases to 0."""
    if isinstance(layer, nn.Linear):
        std = (2 / (layer.in_features + layer.out_features)) ** 0.5  # Glorot's
    elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
        fan_in, fan_out = 25 * layer.in_channels, 25 * layer.out_channels
        if isinstance(layer, nn.Conv2d):  # of stride 2: an input is in a quarter of the windows
            fan_out /= 4
        else:
            fan_in /= 4
        std = (4 / (fan_in + fan_out)) ** 0.5
    else:
        return
    if side not in (28, 32):  # Deviation 6
        std = 0.02
    nn.init.uniform_(layer.weight, -std * 3**0.5, std * 3**0.5)
    nn.init.zeros_(layer.bias)


def mlp(inputs: int, width: int, outputs: int, norm: bool) -> nn.Sequential:
    """Return three hidden layers and a linear one; weights by He's law, the last by Glorot's, as [W]."""
    layers = []
    for size in (inputs, width, width):
        dense = nn.Linear(size, width)  # its biases are PyTorch's: Deviation 4
        nn.init.kaiming_uniform_(dense.weight)
        layers.append(dense)
        if norm:
            layers.append(nn.GroupNorm(1, width))
        layers.append(nn.ReLU())
    last = nn.Linear(width, outputs)
    nn.init.xavier_uniform_(last.weight)
    return nn.Sequential(*layers, last)


def crop(side: int) -> nn.Module:
    """Return the layer that keeps side of the 2s + 1 rows and columns of a transposed convolution."""
    return nn.ZeroPad2d((0, -1 - side % 2, 0, -1 - side % 2))


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape) in [-1, 1]; batch norm in all layers but the last."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int) -> None:
        super().__init__()
        if len(shape) == 1:
            self.layers = mlp(latent_dim, width, *shape, norm=False)  # Deviation 4
            return
        *targets, start = sides(shape[1])  # 32, 16, 8 and 4
        channels = width * 2 ** (len(targets) - 1)
        units = channels * start**2
        to_maps = nn.Unflatten(1, (channels, start, start))
        layers = [nn.Linear(latent_dim, units)]
        if shape[1] in (28, 32):  # [W]'s first batch norm is of each unit there, of each channel at 64
            layers += [nn.BatchNorm1d(units), to_maps, nn.ReLU()]
        else:
            layers += [to_maps, nn.BatchNorm2d(channels), nn.ReLU()]
        for side in reversed(targets[1:]):
            # Padding 1 and the crop: 1 row before and 2 after, as "SAME" in [W]; 8x8 becomes 7x7 for 28x28.
            layers += [nn.ConvTranspose2d(channels, channels // 2, 5, 2, 1), crop(side)]
            channels //= 2
            layers += [nn.BatchNorm2d(channels), nn.ReLU()]
        layers += [nn.ConvTranspose2d(channels, shape[0], 5, 2, 1), crop(shape[1]), nn.Tanh()]  # Deviation 5
        for layer in layers:
            initialise(layer, shape[1])
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Critic(nn.Module):
    """The mapper F: samples (B, *shape) -> features (B, feature_dim); layer norm, Deviation 4."""

    def __init__(self, shape: tuple[int, ...], feature_dim: int, width: int) -> None:
        super().__init__()
        if len(shape) == 1:
            self.layers = mlp(*shape, width, feature_dim, norm=True)
            return
        *targets, end = sides(shape[1])
        layers = []
        inputs, outputs = shape[0], width
        for side in targets:
            before = 1 + side % 2  # "SAME": 1 row before and 2 after; of odd sides 2 and 2
            layers += [nn.ZeroPad2d((before, 2, before, 2)), nn.Conv2d(inputs, outputs, 5, 2)]
            if side < shape[1] or len(targets) == 1:  # all but the first
                layers.append(nn.GroupNorm(1, outputs))
            layers.append(nn.LeakyReLU(0.2))
            inputs, outputs = outputs, 2 * outputs
        layers += [nn.Flatten(), nn.Linear(inputs * end**2, feature_dim)]
        for layer in layers:
            initialise(layer, shape[1])
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_networks(args: Args, shape: tuple[int, ...], device: torch.device) -> tuple[Generator, Critic]:
    """Return both players for samples of a shape, drawn from PyTorch's generator."""
    generator = Generator(shape, args.latent_dim, args.width)
    critic = Critic(shape, args.feature_dim, args.width)
    return generator.to(device), critic.to(device)


# --- losses ----------------------------------------------------------------------------------------


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor, target: float) -> Tensor:
    """Return E (|| grad_t sum_i F_i(t) || - target)^2 of Eq. (7), t uniform between x and y (B, *shape)."""
    u = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device)
    mid = (real + u * (fake - real)).requires_grad_()
    (gradient,) = torch.autograd.grad(critic(mid).sum(), mid, create_graph=True)  # of each sample
    return (kernels.gather(gradient.flatten(1).norm(dim=1)) - target).square().mean()


def regularization(critic: nn.Module, real: Tensor, fake: Tensor, args: Args) -> Tensor:
    """Return Reg, at least 0, for samples (B, *shape): gp Eq. (7), l1 Eq. (9), l2 Eq. (8), weight-decay."""
    if args.regularizer == "gp":
        return gradient_penalty(critic, real, fake, args.gp_target)
    if args.regularizer == "weight-decay":
        return sum(w.square().sum() for w in critic.parameters())
    weights = []  # w_n
    for module in critic.modules():
        if isinstance(module, nn.GroupNorm):
            weights += [module.weight, module.bias]
    if args.regularizer == "l1":
        return sum(w.abs().sum() for w in weights)
    return sum(w.square().sum() for w in weights)


def critic_loss(mmd: Tensor, reg: Tensor, lambda_reg: float) -> Tensor:
    """Return L_D = -M + lambda Reg of Eqs. (7) to (10), minimised; M of features, Eqs. (3), (4)."""
    return -mmd + lambda_reg * reg  # Deviations 1 and 2


def generator_loss(mmd: Tensor, data_mmd: Tensor | float, data_mmd_weight: float) -> Tensor:
    """Return L_G = M + w M_data, minimised: Eq. (6), of features, and what [P] adds with gp, of samples."""
    return mmd + data_mmd_weight * data_mmd


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


def critic_steps(step: int, args: Args) -> int:
    """Return the number of critic updates before generator update step = 1, 2, ..., as Algorithm 1."""
    return 0 if (step - 1) % args.n_generator else args.n_critic


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
        critic.compile(disable=args.regularizer == "gp")  # its gradient is differentiated again
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
    drawn = sum(critic_steps(i, args) + 1 for i in range(1, step + 1))  # batches
    c_loss = torch.zeros((), device=device)  # until the mapper's next round
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
                real_feat, fake_feat = critic(real), critic(fake)
            reg = regularization(critic, real, fake.float(), args)
            real_feat, fake_feat = kernels.gather(real_feat.float()), kernels.gather(fake_feat.float())
            k_xx, k_xy, k_yy = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
            mmd = kernels.sqrt_mmd(k_xx, k_xy, k_yy)
            c_loss = critic_loss(mmd, reg, args.lambda_reg)
            c_optimizer.zero_grad()
            c_loss.backward(inputs=list(critic.parameters()))
            kernels.average_gradients(critic)
            c_optimizer.step()

        # Generator: one update, with a new batch.
        real = data.batch(drawn)
        drawn += 1
        noise = draw_noise(len(real), args, device)
        with autocast:
            fake = generator(noise)
            with torch.no_grad():
                real_feat = critic(real)
            fake_feat = critic(fake)
        real_feat, fake_feat = kernels.gather(real_feat.float()), kernels.gather(fake_feat.float())
        k_xx, k_xy, k_yy = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
        mmd = kernels.sqrt_mmd(k_xx, k_xy, k_yy)
        data_mmd = 0.0
        if args.data_mmd_weight:
            samples = kernels.gather(real.flatten(1)), kernels.gather(fake.float().flatten(1))
            data_mmd = kernels.sqrt_mmd(*kernels.gram_blocks(*samples, args.kernel, args.bandwidths))
        g_loss = generator_loss(mmd, data_mmd, args.data_mmd_weight)
        g_optimizer.zero_grad()
        g_loss.backward(inputs=list(generator.parameters()))
        kernels.average_gradients(generator)
        g_optimizer.step()

        if args.ema_decay:
            run.update_average(models["ema"], generator, args.ema_decay, step)
        finite.note(step, critic=c_loss, generator=g_loss)

        if last_or_every(args.log_every):
            finite.check()
            if critic_steps(step, args) == 0:  # the mapper rests: its loss as it is now
                reg = regularization(critic, real, fake.detach().float(), args)
                c_loss = critic_loss(mmd, reg, args.lambda_reg)
            scalars = {"losses/critic": c_loss, "losses/generator": g_loss}
            scalars |= {"losses/mmd": mmd, "losses/regularization": reg}
            scalars |= {"losses/data_mmd": data_mmd} if args.data_mmd_weight else {}
            scalars |= kernels.block_means(k_xx, k_xy, k_yy)
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
