"""MMD GAN: Towards Deeper Understanding of Moment Matching Network (Li et al., NeurIPS 2017; [L]).

The critic is an encoder f, with a decoder d of its own; x is real, y = G(z) is fake. As the authors' code
[C] has it, from which every published number comes, both players minimise:

    generator         L_G = M + 16 H
    critic, decoder   L_D = -(M + 16 H) + 8 R(x) + 8 R(y)

    M    = sqrt( E k(f(x), f(x')) - 2 E k(f(x), f(y)) + E k(f(y), f(y')) )    biased estimate of MMD
    H    = -(1/K) sum_j max(0, E f_j(y) - E f_j(x))       <= 0, the rank hinge (feasible set reduction)
    R(x) = mean over all elements of (x - d(f(x)))^2                               the auto-encoder

k is a sum of RBF kernels. f is kept Lipschitz by clipping its parameters to +-0.01 before each of its
updates: 100 of them before each of the first 25 updates of G and after each 500th, else 5. Real and
fake pass f separately, so batch normalisation takes from each its own mean and variance.
--lambda-ae 0, --lambda-rank 0 and --clip 0 switch off one constraint each (Table 4 of the GRAM paper, [S]).

The bandwidth report [B] compares --bandwidths 1 2 4 8 16 with 2 4 8 16 32. Its Figure 4 plots M^2 of the
last critic update before each update of G (losses/critic_mmd2), each by its run's own kernel, which says
little: clipped features are small, where M^2 is about sum_s 1/s^2 times ||E f(x) - E f(y)||^2, and that sum
is 4 times smaller for the second set. Nor is its "less smooth" curve all training: where M^2 is near 1e-5,
[C]'s sums in float32 make 12% of error (rms) in M^2 of the first set, 32% in that of the second.
eval/pixel_mmd (of images, with --eval-features pixels) and eval/mmd (of toys) use one kernel in data space,
whatever the run's own: compare runs by these. [B] only plans --kernel laplacian.

Published: CIFAR-10 IS 6.17 [L]; IS 5.35, without auto-encoder 5.40, without hinge 3.26 (Table 4 of [S]); FID
on the test images (--eval-split test) 38.39 and, with --architecture gram, 40.00, with --weak-critic too
210.85 (Tables 1 and 2 of [S]).

Deviations from the paper [L] and from the authors' code [C]:
  1. M, not its square, and the hinge in both players: [C]. [L]'s game is on MMD^2, and a one-sided
     constraint needs the hinge in the critic only.
  2. The bursts of 100 critic updates: [C]. [L] has 5 throughout.
  3. Batches come from an endless stream of epochs, none of them short. In [C] the last one of an epoch is
     short, and the generator's update is skipped where an epoch ends during the critic's. --total-steps is
     what [C] makes in 1000 epochs, but for LSUN, where its 7,281 an epoch would be 7 million: ours there are
     20 epochs. CelebA is cropped as in Wang et al. 2019; [C] keeps its whole width.
  4. No gradient where M is 0, where [C] has NaN.
  5. --kernel rq and laplacian: neither has them; rq takes its alphas from Binkowski et al. 2018.
  6. Image sizes but 32 and 64, MLPs and bandwidths for toys: ours, with larger steps and a wider clip. No
     hinge on toys: the generator is rewarded for leaving the feasible set, and where no tanh bounds its
     samples they ran away. There the critic has a tenth of the generator's rate: at equal rates M stays near
     0.6 and the samples circle.
  7. --architecture gram on images, Tables 5 to 7 of [S]: a dense layer that is read as (c, 4, 4), and one
     that reads it flattened, are the 4x4 convolutions at the two ends of [C]'s networks, without a bias; what
     is left is the width, and batch norm after the critic's first layer too. Its initialisation, latent law
     and decoder are not in [S]: [C]'s.
  8. --architecture gram on points, Appendix B of [S]: its networks, hinge, clip 0.1, 5 critic updates, rate
     5e-5, sigma 1. RMSprop is [C]'s; [S] says that all else is as for GRAM-nets, which have Adam. Not given
     is the decoder: ours is as wide as the critic. [S] trains 4,000 epochs; 10,000 steps without bursts are
     ours. Figure 7 (b) varies --width and --feature-dim with --critic-width 100.
  9. M^2 and the Gram matrices are float64, which is the same but for rounding: [C]'s float32 errs as said
     above.

Usage:
    python mmd_gan.py
    python mmd_gan.py --dataset 8gaussians --ema-decay 0.999
    python mmd_gan.py --dataset mnist --bandwidths 2 4 8 16 32
    python mmd_gan.py --dataset cifar10 --architecture gram --weak-critic
    python mmd_gan.py --dataset ring2d --architecture gram --feature-dim 2
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
    kernel: Literal["rbf", "laplacian", "rq"] = "rbf"  # of the critic's features
    bandwidths: tuple[float, ...] | None = None  # sigma (None: 1 2 4 8 16; toys .05 to 1), or alpha; summed
    lambda_ae: float = 8.0  # weight of the auto-encoder's loss in the critic's; 0 is off, with no decoder
    lambda_rank: float | None = None  # weight of the rank hinge in both losses; 0 is off
    clip: float | None = None  # bound on the critic's parameters before each of its updates; 0 is off
    n_critic: int | None = None  # critic updates per generator update (None: 5, on toys 2)
    warmup_critic: int | None = None  # the same for the first 25 generator updates and after each 500th
    architecture: Literal["li", "gram"] = "li"  # networks of [C], or of [S]: DCGAN, on toys small MLPs
    weak_critic: bool = False  # with --architecture gram, for images: the smaller critic of [S], Table 7
    critic_width: int | None = None  # width of critic and decoder; None: --width ([S], Figure 7: 100)
    feature_dim: int | None = None  # dimension K of the critic's output, the auto-encoder's code
    latent_dim: int | None = None  # dimension of the generator's input z ~ N(0, I)
    learning_rate: float | None = None  # of the generator, RMSprop
    critic_learning_rate: float | None = None  # of critic and decoder, RMSprop


# [C]'s settings.
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=150_000, batch_size=64, width=64, feature_dim=128, latent_dim=128,
        learning_rate=5e-5, critic_learning_rate=5e-5, lambda_rank=16.0, clip=0.01, n_critic=5,
        warmup_critic=100, eval_every=12_500, eval_features="inception", train_split="train",
        eval_split="train", sample_bn="batch",
    ),
    "cifar10": dict(image_size=32, total_steps=124_614),
    "stl10": dict(image_size=48),  # ours
    "celeba": dict(total_steps=410_336, feature_dim=64, latent_dim=64),
    "mnist": dict(
        image_size=32, total_steps=149_640, feature_dim=10, latent_dim=10, eval_features="pixels",
    ),  # fashion-mnist too
    "digits": dict(
        image_size=8, total_steps=1500, width=32, feature_dim=16, latent_dim=16, learning_rate=1e-3,
        critic_learning_rate=1e-3, clip=0.1, warmup_critic=5, eval_every=500, eval_features="pixels",
    ),  # ours
    "toys": dict(
        total_steps=5000, batch_size=256, width=256, feature_dim=16, latent_dim=2, learning_rate=5e-4,
        critic_learning_rate=5e-5, lambda_rank=0.0, clip=0.1, n_critic=2, warmup_critic=2, eval_every=500,
    ),  # ours
}  # fmt: skip
GRAM = {  # what --architecture gram has instead
    "images": dict(width=32),  # Deviation 7
    "toys": dict(
        total_steps=10_000, batch_size=200, width=100, feature_dim=10, learning_rate=5e-5,
        critic_learning_rate=5e-5, lambda_rank=16.0, n_critic=5, warmup_critic=5, eval_every=1000,
    ),  # Deviation 8
}  # fmt: skip
VALUE_RANGE = (-1.0, 1.0)
LOWER_BOUNDS = {"lambda_ae": 0, "lambda_rank": 0, "clip": 0, "warmup_critic": 1}  # bounds of the above
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = [DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})]
    toy = args.dataset in datasets.TOYS
    gram = args.architecture == "gram"
    run.require(gram or not args.weak_critic, "--weak-critic", "on", "given with --architecture gram")
    run.require(not (toy and args.weak_critic), "--weak-critic", "on", "off for a data set of points")
    if gram:
        defaults.append(GRAM["toys" if toy else "images"])
    bandwidths = (1.0, 2.0, 4.0, 8.0, 16.0)
    if args.kernel == "rq":
        bandwidths = (0.2, 0.5, 1.0, 2.0, 5.0)  # Deviation 5
    elif toy:
        bandwidths = (1.0,) if gram else (0.05, 0.1, 0.2, 0.5, 1.0)
    args = run.resolve(args, *defaults, {"bandwidths": bandwidths}, lower_bounds=LOWER_BOUNDS)
    if args.critic_width is None:
        args.critic_width = args.width
    if not toy:
        levels(args.image_size)  # which refuses a size that fits no network
    return args


# --- networks --------------------------------------------------------------------------------------


def levels(side: int) -> int:
    """Return how often an image is halved: 1 for 8x8, 3 for 32x32 (down to 4x4) and 48x48 (to 6x6)."""
    n = side.bit_length() - 3  # Deviation 6
    run.require(n >= 1 and side % 2**n == 0, "--image-size", side, "4, 5, 6 or 7 times 2, 4, 8, ...")
    return n


def initialise(module: nn.Module) -> None:
    """Draw weights of convolutions from N(0, 0.02^2) and scales of batch norm from N(1, 0.02^2), as [C]."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1.0, std=0.02)


def mlp(inputs: int, width: int, outputs: int, hidden: int) -> nn.Sequential:
    """Return so many hidden layers and a linear one: every network on toys."""
    layers = []
    for _ in range(hidden):
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape), images in [-1, 1]."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int, gram: bool = False) -> None:
        super().__init__()
        if len(shape) == 1:
            self.layers = mlp(latent_dim, width, shape[0], hidden=2 if gram else 3)
            return
        n = levels(shape[1])
        c = width * 2 ** (n - 1)  # 256 for width 64 and 32x32
        first = nn.ConvTranspose2d(latent_dim, c, shape[1] // 2**n, bias=False)  # from 1x1
        layers = [nn.Unflatten(1, (latent_dim, 1, 1)), first]
        for _ in range(n - 1):
            deconv = nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False)
            layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True), deconv]
            c = c // 2
        last = nn.ConvTranspose2d(c, shape[0], 4, 2, 1, bias=False)
        layers += [nn.BatchNorm2d(c), nn.ReLU(inplace=True), last, nn.Tanh()]
        self.layers = nn.Sequential(*layers).apply(initialise)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Critic(nn.Module):
    """The encoder: samples (B, *shape) -> features (B, feature_dim)."""

    def __init__(self, shape: tuple[int, ...], feature_dim: int, width: int, gram: bool, weak: bool) -> None:
        super().__init__()
        if len(shape) == 1:
            self.layers = mlp(shape[0], width, feature_dim, hidden=2 if gram else 3)
            return
        n = levels(shape[1])
        layers = [nn.Conv2d(shape[0], width, 4, 2, 1, bias=False)]
        if gram:
            layers.append(nn.BatchNorm2d(width))
        layers.append(nn.LeakyReLU(0.2, inplace=True))
        c_out = width
        for level in range(1, n):  # 64, 128, 256 channels for width 64 and 32x32; weak, width 32: 32, 32, 64
            c_in = c_out
            c_out = c_in if weak and level == 1 else 2 * c_in
            conv = nn.Conv2d(c_in, c_out, 4, 2, 1, bias=False)
            layers += [conv, nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2, inplace=True)]
        last = nn.Conv2d(c_out, feature_dim, shape[1] // 2**n, bias=False)  # to 1x1
        self.layers = nn.Sequential(*layers, last, nn.Flatten()).apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class Decoder(Generator):
    """Features (B, feature_dim) -> samples (B, *shape): the generator's topology, weights of its own."""


def make_networks(args: Args, shape: tuple[int, ...], device: torch.device) -> tuple[Generator, Critic]:
    """Return both players for samples of a shape, drawn from PyTorch's generator.

    The decoder is a part of the critic, so that it is trained, averaged and saved with it.
    """
    gram = args.architecture == "gram"
    generator = Generator(shape, args.latent_dim, args.width, gram)
    critic = Critic(shape, args.feature_dim, args.critic_width, gram, args.weak_critic)
    critic.decoder = nn.Identity()
    if args.lambda_ae > 0:
        critic.decoder = Decoder(shape, args.feature_dim, args.critic_width, gram)
    for network in (generator, critic):
        network.to(device, memory_format=torch.channels_last)  # on a CPU too: a step is a sixth faster
    return generator, critic


# --- losses ----------------------------------------------------------------------------------------


def rank_hinge(real_feat: Tensor, fake_feat: Tensor) -> Tensor:
    """Return H = -(1/K) sum_j max(0, E f_j(y) - E f_j(x)), at most 0, of features (n, K) and (m, K).

    It is 0 in the feasible set, where no feature is larger for fake samples than for real ones on average.
    """
    return -F.relu(fake_feat.mean(0) - real_feat.mean(0)).mean()


def reconstruction(decoder: nn.Module, x: Tensor, feat: Tensor) -> Tensor:
    """Return R(x) = mean of (x - d(f(x)))^2 over all elements; x (B, *shape), feat = f(x) (B, K)."""
    return kernels.gather(F.mse_loss(decoder(feat).float(), x.float())[None]).mean()


def autoencoder_loss(
    decoder: nn.Module, real: Tensor, real_feat: Tensor, fake: Tensor, fake_feat: Tensor, args: Args
) -> Tensor | float:
    """Return R(x) + R(y) of samples (B, *shape) and features (B, K); 0 where --lambda-ae is."""
    if args.lambda_ae == 0:
        return 0.0
    return reconstruction(decoder, real, real_feat) + reconstruction(decoder, fake, fake_feat)


def critic_loss(mmd: Tensor, hinge: Tensor, ae_loss: Tensor, lambda_rank: float, lambda_ae: float) -> Tensor:
    """Return L_D = -(M + lambda_rank H) + lambda_ae ae_loss, minimised; ae_loss = R(x) + R(y). Deviation 4"""
    return -(mmd + lambda_rank * hinge) + lambda_ae * ae_loss


def generator_loss(mmd: Tensor, hinge: Tensor, lambda_rank: float) -> Tensor:
    """Return L_G = M + lambda_rank H, minimised; the hinge has the sign that it has in [C]."""
    return mmd + lambda_rank * hinge  # Deviations 1 and 9


@torch.no_grad()
def clip_parameters(module: nn.Module, bound: float) -> None:
    """Clamp all parameters, those of batch norm included, to [-bound, bound]; 0 does nothing."""
    if bound > 0:
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


def critic_steps(step: int, args: Args) -> int:
    """Return the number of critic updates before generator update step = 1, 2, ..."""
    return args.warmup_critic if step <= 25 or step % 500 == 1 else args.n_critic  # Deviations 2 and 3


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
    g_optimizer = torch.optim.RMSprop(generator.parameters(), args.learning_rate)
    c_optimizer = torch.optim.RMSprop(critic.parameters(), args.critic_learning_rate)
    models = dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer)
    run.prepare(models, device)  # on GPUs: channels last, batch norm over all processes
    models["data"] = data  # of which a checkpoint knows what it is, so that no other is gone on with
    if args.ema_decay:
        models["ema"] = copy.deepcopy(generator)
    step = run.load_checkpoint(args, SCRIPT, models)  # 0 without --resume
    if args.compile:
        generator.compile()
        critic.compile()
        critic.decoder.compile()
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
    drawn = sum(critic_steps(i, args) + 1 for i in range(1, step + 1))  # batches
    begin, begin_step = time.time(), step
    steps = range(step + 1, args.total_steps + 1)
    for step in tqdm(steps, initial=step, total=args.total_steps, disable=None if rank == 0 else True):
        # Whatever is random in a step depends on its number alone.
        torch.manual_seed(run.mix(args.seed, run.Stream.STEP, step, rank))
        # Critic: several updates, each with a batch of its own.
        for _ in range(critic_steps(step, args)):
            clip_parameters(critic.layers, args.clip)  # not the decoder
            real = data.batch(drawn)
            drawn += 1
            noise = draw_noise(len(real), args, device)
            with autocast:
                with torch.no_grad():
                    fake = generator(noise)
                real_feat, fake_feat = critic(real), critic(fake)
                ae_loss = autoencoder_loss(critic.decoder, real, real_feat, fake, fake_feat, args)
            real_feat, fake_feat = kernels.gather(real_feat.float()), kernels.gather(fake_feat.float())
            k_xx, k_xy, k_yy = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
            mmd = kernels.sqrt_mmd(k_xx, k_xy, k_yy)
            hinge = rank_hinge(real_feat, fake_feat)
            c_loss = critic_loss(mmd, hinge, ae_loss, args.lambda_rank, args.lambda_ae)
            c_optimizer.zero_grad()
            c_loss.backward(inputs=list(critic.parameters()))
            kernels.average_gradients(critic)
            c_optimizer.step()
        critic_mmd2 = mmd.square()

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
        hinge = rank_hinge(real_feat, fake_feat)
        g_loss = generator_loss(mmd, hinge, args.lambda_rank)
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
            scalars |= {"losses/mmd": mmd, "losses/rank_hinge": hinge, "losses/critic_mmd2": critic_mmd2}
            scalars |= {"losses/autoencoder": ae_loss} if args.lambda_ae > 0 else {}
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
