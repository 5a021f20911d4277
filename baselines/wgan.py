"""Wasserstein GANs, with which the papers of this collection compare: clipped (Arjovsky, Chintala & Bottou
2017), with gradient penalty (Gulrajani et al. 2017), and the Sobolev GAN (Mroueh et al. 2018).

The critic f gives a number, larger for real samples x than for fake ones y = G(z). Both players minimise:

    generator   L_G = -E f(y)
    critic      L_D = -(E f(x) - E f(y)) + C

    clip               C = 0, and all parameters of f are clipped to +-c before each of its updates
    gradient-penalty   C = lambda_gp E (||grad f(t)|| - 1)^2, t between x and y
    sobolev            C = -lambda (1 - Omega) + rho / 2 (Omega - 1)^2

Omega = (E ||grad f(x)||^2 + E ||grad f(y)||^2) / 2 is held at 1 by an augmented Lagrangian: f maximises
E f(x) - E f(y) + lambda (1 - Omega) - rho / 2 (Omega - 1)^2, and lambda, which starts at 0, descends its
gradient in steps of rho.

Published: CIFAR-10, WGAN IS 5.61, improved WGAN 6.16 (best over training; GAMN paper, Table 2); WGAN-GP 6.9,
FID 31.1, Sobolev GAN 7.0, 30.3 (poster of the scaled MMD GAN). MMD on toys, by a kernel that is not given:
WGAN 0.300, 0.312, 0.305, improved WGAN 0.285, 0.294, 0.298 (GAMN paper, Table 1).

Deviations from the papers and from the code of Gulrajani et al. [W], which has the first two:
  1. --rho 1e-5 is from memory of the Sobolev GAN's paper and was not verified.
  2. Norms: batch norm in the generator (on toys none); in the critic from its second convolution on batch
     norm with clip, layer norm with a penalty from 64 pixels on, none with a penalty below. That [W] has
     batch norm with clip, and at 28 pixels in the generator with clip only, is from memory, not verified.
  3. Grey images in [-1, 1] and tanh, where [W] has [0, 1] and a sigmoid.
  4. Ours: networks of images that are not 28, 32 or 64 pixels, and how digits and toys are trained. On toys
     [W] has width 512, 100,000 steps at 1e-4 and five critic updates; lambda_gp 0.1 is its.

Usage:
    python -m baselines.wgan
    python -m baselines.wgan --constraint clip
    python -m baselines.wgan --dataset 8gaussians --constraint sobolev
    python -m baselines.wgan --dataset cifar10
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
    constraint: Literal["clip", "gradient-penalty", "sobolev"] = "gradient-penalty"  # on the critic
    clip: float = 0.01  # c of clip
    lambda_gp: float | None = None  # weight of the gradient penalty (None: 10, on toys 0.1)
    rho: float = 1e-5  # of sobolev; this default was not verified
    n_critic: int | None = None  # critic updates per generator update (None: 5)
    latent_dim: int | None = None  # dimension of the generator's input z ~ N(0, I)
    learning_rate: float | None = None  # of the generator (None: 1e-4; with clip 5e-5; digits, toys 5e-4)
    critic_learning_rate: float | None = None  # of the critic (None: the generator's)
    beta1: float | None = None  # Adam's first moment (None: 0.5; at 64 pixels and in folders 0)
    beta2: float = 0.9  # Adam's second moment, both players


# [W]. Deviation 4
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=200_000, batch_size=64, width=64, latent_dim=128, lambda_gp=10.0,
        n_critic=5, learning_rate=1e-4, beta1=0.0, eval_every=12_500, eval_features="inception",
        train_split="train", eval_split="train", sample_bn="batch",
    ),
    "cifar10": dict(image_size=32, width=128, beta1=0.5),
    "stl10": dict(image_size=48, beta1=0.5),  # ours
    "mnist": dict(image_size=28, batch_size=50, beta1=0.5, eval_features="pixels"),  # fashion-mnist too
    "digits": dict(
        image_size=8, total_steps=1000, width=32, latent_dim=32, learning_rate=5e-4, beta1=0.5,
        eval_every=500, eval_features="pixels",
    ),  # ours
    "toys": dict(
        total_steps=4000, batch_size=256, width=256, latent_dim=2, learning_rate=5e-4, beta1=0.5,
        lambda_gp=0.1, eval_every=500, sample_bn="running",
    ),  # ours
}  # fmt: skip
VALUE_RANGE = (-1.0, 1.0)
LOWER_BOUNDS = {"clip": 1e-15, "lambda_gp": 0, "rho": 1e-15}
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})
    method = {}
    if args.constraint == "clip" and datasets.family(args.dataset) not in ("digits", "toys"):
        method = {"learning_rate": 5e-5}
    args = run.resolve(args, *defaults, method, lower_bounds=LOWER_BOUNDS)
    args = run.resolve(args, {"critic_learning_rate": args.learning_rate})
    if args.dataset not in datasets.TOYS:
        sides(args.image_size)  # which refuses a size that fits no network
    return args


# --- networks --------------------------------------------------------------------------------------


def sides(side: int) -> list[int]:
    """Return the sides of the feature maps: 8, 4 for 8x8; 28, 14, 7, 4; 32, 16, 8, 4; 48, 24, 12, 6."""
    run.require(side >= 7, "--image-size", side, "at least 7")
    found = [side]  # Deviation 4
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
    if side not in (28, 32):  # Deviation 4
        std = 0.02
    nn.init.uniform_(layer.weight, -std * 3**0.5, std * 3**0.5)
    nn.init.zeros_(layer.bias)


def mlp(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Return three hidden layers and a linear one; weights by He's law, the last by Glorot's, as [W]."""
    layers = []
    for size in (inputs, width, width):
        dense = nn.Linear(size, width)  # its biases are PyTorch's
        nn.init.kaiming_uniform_(dense.weight)
        layers += [dense, nn.ReLU()]
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
            self.layers = mlp(latent_dim, width, *shape)
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
        layers += [nn.ConvTranspose2d(channels, shape[0], 5, 2, 1), crop(shape[1]), nn.Tanh()]  # Deviation 3
        for layer in layers:
            initialise(layer, shape[1])
        self.layers = nn.Sequential(*layers)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Critic(nn.Module):
    """Samples (B, *shape) -> f (B, 1), without bounds."""

    def __init__(self, shape: tuple[int, ...], width: int, constraint: str) -> None:
        super().__init__()
        if len(shape) == 1:
            self.layers = mlp(*shape, width, 1)
            return
        *targets, end = sides(shape[1])
        layers = []
        inputs, outputs = shape[0], width
        for side in targets:
            before = 1 + side % 2  # "SAME": 1 row before and 2 after; of odd sides 2 and 2
            layers += [nn.ZeroPad2d((before, 2, before, 2)), nn.Conv2d(inputs, outputs, 5, 2)]
            if side < shape[1]:  # all but the first; Deviation 2
                if constraint == "clip":
                    layers.append(nn.BatchNorm2d(outputs))
                elif shape[1] >= 64:
                    layers.append(nn.GroupNorm(1, outputs))
            layers.append(nn.LeakyReLU(0.2))
            inputs, outputs = outputs, 2 * outputs
        layers += [nn.Flatten(), nn.Linear(inputs * end**2, 1)]
        for layer in layers:
            initialise(layer, shape[1])
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Multiplier(nn.Module):
    """lambda of sobolev: a buffer, so that a checkpoint has it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("value", torch.zeros(()))

    @torch.no_grad()
    def update(self, omega: Tensor, rho: float) -> None:
        """Descend the gradient of lambda (1 - Omega), which is 1 - Omega, in a step of rho."""
        self.value -= rho * (1 - omega)


def make_networks(args: Args, shape: tuple[int, ...], device: torch.device) -> tuple[Generator, Critic]:
    """Return both players for samples of a shape, drawn from PyTorch's generator."""
    generator = Generator(shape, args.latent_dim, args.width)
    critic = Critic(shape, args.width, args.constraint)
    return generator.to(device), critic.to(device)


# --- losses ----------------------------------------------------------------------------------------


def gradient_norms2(critic: nn.Module, x: Tensor) -> Tensor:
    """Return ||grad f(x_i)||^2 (B,) of samples (B, *shape), which can be differentiated."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)  # of each sample
    return gradient.flatten(1).square().sum(1)


def gradient_penalty(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Return E (||grad f(t)|| - 1)^2, t uniform between x and y (B, *shape)."""
    u = torch.rand(len(real), *[1] * (real.ndim - 1), device=real.device)
    norms2 = kernels.gather(gradient_norms2(critic, real + u * (fake - real)))
    return (kernels.safe_sqrt(norms2) - 1).square().mean()


def sobolev_norm(critic: nn.Module, real: Tensor, fake: Tensor) -> Tensor:
    """Return Omega = (E ||grad f(x)||^2 + E ||grad f(y)||^2) / 2 of samples (B, *shape)."""
    return kernels.gather(gradient_norms2(critic, torch.cat([real, fake]))).mean()


def lagrangian(omega: Tensor, multiplier: Tensor, rho: float) -> Tensor:
    """Return C = -lambda (1 - Omega) + rho / 2 (Omega - 1)^2; rho is not verified: Deviation 1."""
    return -multiplier * (1 - omega) + rho / 2 * (omega - 1).square()


def critic_loss(real_feat: Tensor, fake_feat: Tensor, constraint: Tensor | float) -> Tensor:
    """Return L_D = -(E f(x) - E f(y)) + C, minimised, of f (n, 1)."""
    return -(real_feat.mean() - fake_feat.mean()) + constraint


def generator_loss(fake_feat: Tensor) -> Tensor:
    """Return L_G = -E f(y), minimised, of f (n, 1)."""
    return -fake_feat.mean()


@torch.no_grad()
def clip_parameters(module: nn.Module, bound: float) -> None:
    """Clamp all parameters, those of batch norm included, to [-bound, bound]."""
    for parameter in module.parameters():
        parameter.clamp_(-bound, bound)


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
    if args.constraint == "clip":
        g_optimizer = torch.optim.RMSprop(generator.parameters(), args.learning_rate)
        c_optimizer = torch.optim.RMSprop(critic.parameters(), args.critic_learning_rate)
    else:
        betas = args.beta1, args.beta2
        g_optimizer = torch.optim.Adam(generator.parameters(), args.learning_rate, betas)
        c_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, betas)
    models = dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer)
    models["multiplier"] = multiplier = Multiplier().to(device)
    run.prepare(models, device)  # on GPUs: channels last, batch norm over all processes
    models["data"] = data  # of which a checkpoint knows what it is, so that no other is gone on with
    if args.ema_decay:
        models["ema"] = copy.deepcopy(generator)
    step = run.load_checkpoint(args, SCRIPT, models)  # 0 without --resume
    if args.compile:
        generator.compile()
        critic.compile(disable=args.constraint != "clip")  # its gradient is differentiated again
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
    drawn = step * args.n_critic  # batches
    begin, begin_step = time.time(), step
    steps = range(step + 1, args.total_steps + 1)
    for step in tqdm(steps, initial=step, total=args.total_steps, disable=None if rank == 0 else True):
        # Whatever is random in a step depends on its number alone.
        torch.manual_seed(run.mix(args.seed, run.Stream.STEP, step, rank))
        # Critic: several updates, each with a batch of its own.
        for _ in range(args.n_critic):
            if args.constraint == "clip":
                clip_parameters(critic, args.clip)
            real = data.batch(drawn)
            drawn += 1
            noise = draw_noise(len(real), args, device)
            with autocast:
                with torch.no_grad():
                    fake = generator(noise)
                real_feat, fake_feat = critic(real), critic(fake)
            constraint = 0.0
            if args.constraint == "gradient-penalty":
                norm = gradient_penalty(critic, real, fake.float())
                constraint = args.lambda_gp * norm
            elif args.constraint == "sobolev":
                norm = sobolev_norm(critic, real, fake.float())
                constraint = lagrangian(norm, multiplier.value.clone(), args.rho)
            real_feat, fake_feat = kernels.gather(real_feat.float()), kernels.gather(fake_feat.float())
            c_loss = critic_loss(real_feat, fake_feat, constraint)
            c_optimizer.zero_grad()
            c_loss.backward(inputs=list(critic.parameters()))
            kernels.average_gradients(critic)
            c_optimizer.step()
            if args.constraint == "sobolev":
                multiplier.update(norm, args.rho)

        # Generator: one update.
        noise = draw_noise(len(real), args, device)
        with autocast:
            fake_feat = critic(generator(noise))
        fake_feat = kernels.gather(fake_feat.float())
        g_loss = generator_loss(fake_feat)
        g_optimizer.zero_grad()
        g_loss.backward(inputs=list(generator.parameters()))
        kernels.average_gradients(generator)
        g_optimizer.step()

        if args.ema_decay:
            run.update_average(models["ema"], generator, args.ema_decay, step)
        finite.note(step, critic=c_loss, generator=g_loss)

        if last_or_every(args.log_every):
            finite.check()
            scalars = {"losses/critic": c_loss, "losses/generator": g_loss}
            scalars |= {"losses/distance": constraint - c_loss}
            if args.constraint != "clip":
                scalars |= {"losses/constraint": norm}
            if args.constraint == "sobolev":
                scalars |= {"losses/multiplier": multiplier.value}
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
