"""GANs with a discriminator, with which the papers of this collection compare: minimax and non-saturating
(Goodfellow et al. 2014), hinge (Lim & Ye 2017), boundary-seeking (Hjelm et al. 2018), SN-GAN (Miyato et al.).

The critic gives a logit a, large for real samples x and small for fake ones y = G(z). Both players minimise:

    minimax            L_D = -E log s(a(x)) - E log(1 - s(a(y)))        L_G = E log(1 - s(a(y)))
    non-saturating     L_D as minimax                                   L_G = -E log s(a(y))
    boundary-seeking   L_D as minimax                                   L_G = E a(y)^2 / 2
    hinge              L_D = E max(0, 1 - a(x)) + E max(0, 1 + a(y))    L_G = -E a(y)

s is the sigmoid. --critic-norm pim divides each weight of the critic by its spectral norm: SN-GAN.

Published, CIFAR-10: with a normalised critic non-saturating FID 23.23, IS 7.39, and hinge 23.50 (Wang et al.
2019), SN-GAN 26.7, 7.2 (poster of the scaled MMD GAN); with --architecture gram FID 26.82 +- 0.49, with
--weak-critic too 31.64 +- 2.10 (GRAM paper, Table 1).

Deviations from the papers:
  1. Networks of images are SNDCGAN's (slope 0.1), or with --architecture gram those of the GRAM paper's
     Table 1; by levels for images of other sizes than 32, 48 and 64. Weights are Glorot's and biases 0.
  2. The spectral norm is PyTorch's, of the weight as a matrix, and 1 for each layer, as in Miyato et al.;
     Wang et al. multiply each by a gain: 128^(1/K) for K layers.
  3. Rates of 2e-4 and one critic update, as Miyato et al. for SNDCGAN. The GRAM paper gives no rate for its
     GAN: that of gram_net.py.
  4. On toys the networks and the batch size of the GRAM paper; rates of 1e-3, ours.

Usage:
    python -m baselines.gan
    python -m baselines.gan --loss hinge --critic-norm pim
    python -m baselines.gan --dataset ring2d --latent-dim 4 --width 20 --critic-width 100
    python -m baselines.gan --dataset cifar10 --architecture gram --weak-critic
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
    loss: Literal["minimax", "non-saturating", "hinge", "boundary-seeking"] = "non-saturating"  # see above
    critic_norm: Literal["none", "pim"] = "none"  # of the critic's weights; pim: SN-GAN
    architecture: Literal["sndcgan", "gram"] = "sndcgan"  # networks of images
    weak_critic: bool = False  # with --architecture gram: the smaller critic of the GRAM paper, Table 7
    critic_width: int | None = None  # width of the critic (None: width)
    n_critic: int = 1  # critic updates per generator update
    latent_dim: int | None = None  # dimension of the generator's input z ~ N(0, I)
    learning_rate: float | None = None  # of the generator
    critic_learning_rate: float | None = None  # of the critic (None: the generator's)
    beta1: float = 0.5  # Adam's first moment, both players
    beta2: float = 0.999  # Adam's second moment, both players


# Deviations 3 and 4
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=100_000, batch_size=64, width=64, latent_dim=128, learning_rate=2e-4,
        eval_every=12_500, eval_features="inception", train_split="train", eval_split="train",
        sample_bn="running",
    ),
    "cifar10": dict(image_size=32),
    "stl10": dict(image_size=48),
    "mnist": dict(image_size=28, eval_features="pixels"),  # fashion-mnist too; ours
    "digits": dict(
        image_size=8, total_steps=2000, width=32, latent_dim=32, eval_every=500, eval_features="pixels",
    ),  # ours
    "toys": dict(
        total_steps=10_000, batch_size=200, width=100, latent_dim=2, learning_rate=1e-3, eval_every=1000,
    ),  # ours
}  # fmt: skip
GRAM = dict(width=32, learning_rate=5e-5, sample_bn="batch")  # --architecture gram, of images
VALUE_RANGE = (-1.0, 1.0)
LOWER_BOUNDS = {}  # none but those that all scripts have
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = [DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})]
    toy, gram = args.dataset in datasets.TOYS, args.architecture == "gram"
    if gram:
        run.require(not toy, "--architecture", "gram", "left out: points have one architecture")
        defaults.append(GRAM)
    run.require(gram or not args.weak_critic, "--weak-critic", "on", "given with --architecture gram")
    args = run.resolve(args, *defaults, lower_bounds=LOWER_BOUNDS)
    args = run.resolve(args, {"critic_learning_rate": args.learning_rate, "critic_width": args.width})
    if not toy:
        n = levels(args.image_size)  # which refuses a size that fits no network
        run.require(n > 1 or not args.weak_critic, "--weak-critic", "on", "off: one level leaves nothing out")
    return args


# --- networks --------------------------------------------------------------------------------------


def levels(side: int) -> int:
    """Return how often an image is halved: 1 for 8x8, 3 for 32x32 (down to 4x4) and 48x48 (to 6x6)."""
    n = side.bit_length() - 3  # Deviation 1
    run.require(n >= 1 and side % 2**n == 0, "--image-size", side, "4, 5, 6 or 7 times 2, 4, 8, ...")
    return n


def initialise(module: nn.Module) -> None:
    """Draw the weights of dense and convolution layers as Glorot, set biases to 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def mlp(inputs: int, width: int, outputs: int) -> list[nn.Module]:
    """Return two hidden layers and a linear one: both networks of toys, Appendix B.1 of the GRAM paper."""
    first = [nn.Linear(inputs, width), nn.ReLU()]
    second = [nn.Linear(width, width), nn.ReLU()]
    return [*first, *second, nn.Linear(width, outputs)]


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape), images in [-1, 1]."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int, architecture: str) -> None:
        super().__init__()
        if len(shape) == 1:  # width 100: h-100-100-2
            layers = mlp(latent_dim, width, *shape)
        elif architecture == "gram":  # Table 5 of the GRAM paper: 128, 64, 32 channels for width 32
            n = levels(shape[1])
            c, side = width * 2 ** (n - 1), shape[1] >> n
            layers = [nn.Linear(latent_dim, c * side * side), nn.Unflatten(1, (c, side, side))]
            for level in reversed(range(n)):
                c_out = c // 2 if level > 0 else shape[0]
                layers += [nn.BatchNorm2d(c), nn.ReLU(), nn.ConvTranspose2d(c, c_out, 4, 2, 1)]
                c = c_out
            layers.append(nn.Tanh())
        else:  # Table S1 of Wang et al.: 512, 256, 128, 64 channels for width 64
            n = levels(shape[1])
            c, side = width * 2**n, shape[1] >> n
            layers = [nn.Linear(latent_dim, c * side * side), nn.Unflatten(1, (c, side, side))]
            for _ in range(n):
                layers += [
                    nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False),
                    nn.BatchNorm2d(c // 2),
                    nn.ReLU(),
                ]
                c = c // 2
            layers += [nn.Conv2d(c, shape[0], 3, 1, 1), nn.Tanh()]
        self.layers = nn.Sequential(*layers).apply(initialise)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Critic(nn.Module):
    """Samples (B, *shape) -> logits (B, 1)."""

    def __init__(self, shape: tuple[int, ...], width: int, architecture: str, weak: bool, norm: str) -> None:
        super().__init__()
        if len(shape) == 1:  # width 100: 2-100-100-1
            layers = mlp(*shape, width, 1)
        elif architecture == "gram":  # Table 6: 32, 64, 128 channels for width 32; Table 7, weak: 32, 32, 64
            n = levels(shape[1])
            c = width
            layers = [nn.Conv2d(shape[0], c, 4, 2, 1), nn.LeakyReLU(0.2)]
            for level in range(1, n):
                c_out = c if weak and level == 1 else 2 * c
                layers += [nn.Conv2d(c, c_out, 4, 2, 1), nn.BatchNorm2d(c_out), nn.LeakyReLU(0.2)]
                c = c_out
            layers += [nn.Flatten(), nn.Linear(c * (shape[1] >> n) ** 2, 1)]
        else:  # Table S1 of Wang et al.: 64, 128, 128, 256, 256, 512, 512 channels for width 64
            n = levels(shape[1])
            c = width
            layers = [nn.Conv2d(shape[0], c, 3, 1, 1), nn.LeakyReLU(0.1)]  # Deviation 1
            for _ in range(n):
                layers += [nn.Conv2d(c, 2 * c, 4, 2, 1), nn.LeakyReLU(0.1)]
                layers += [nn.Conv2d(2 * c, 2 * c, 3, 1, 1), nn.LeakyReLU(0.1)]
                c = 2 * c
            layers += [nn.Flatten(), nn.Linear(c * (shape[1] >> n) ** 2, 1)]
        self.layers = nn.Sequential(*layers).apply(initialise)
        if norm == "pim":
            for layer in self.layers:
                if isinstance(layer, (nn.Linear, nn.Conv2d)):
                    nn.utils.parametrizations.spectral_norm(layer)  # Deviation 2

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


def make_networks(args: Args, shape: tuple[int, ...], device: torch.device) -> tuple[Generator, Critic]:
    """Return both players for samples of a shape, drawn from PyTorch's generator."""
    generator = Generator(shape, args.latent_dim, args.width, args.architecture)
    critic = Critic(shape, args.critic_width, args.architecture, args.weak_critic, args.critic_norm)
    return generator.to(device), critic.to(device)


# --- losses ----------------------------------------------------------------------------------------


def critic_loss(real_feat: Tensor, fake_feat: Tensor, loss: str) -> Tensor:
    """Return L_D of logits (n, 1), minimised; -log s(a) = softplus(-a), and -log(1 - s(a)) = softplus(a)."""
    if loss == "hinge":
        return F.relu(1 - real_feat).mean() + F.relu(1 + fake_feat).mean()
    return F.softplus(-real_feat).mean() + F.softplus(fake_feat).mean()


def generator_loss(fake_feat: Tensor, loss: str) -> Tensor:
    """Return L_G of logits (n, 1), minimised."""
    if loss == "minimax":
        return -F.softplus(fake_feat).mean()
    if loss == "non-saturating":
        return F.softplus(-fake_feat).mean()
    if loss == "boundary-seeking":
        return fake_feat.square().mean() / 2
    return -fake_feat.mean()


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
            real = data.batch(drawn)
            drawn += 1
            noise = draw_noise(len(real), args, device)
            with autocast, nn.utils.parametrize.cached():  # weights are normalised once for both
                with torch.no_grad():
                    fake = generator(noise)
                real_feat, fake_feat = critic(real), critic(fake)
            real_feat, fake_feat = kernels.gather(real_feat.float()), kernels.gather(fake_feat.float())
            c_loss = critic_loss(real_feat, fake_feat, args.loss)
            c_optimizer.zero_grad()
            c_loss.backward(inputs=list(critic.parameters()))
            kernels.average_gradients(critic)
            c_optimizer.step()

        # Generator: one update.
        noise = draw_noise(len(real), args, device)
        with autocast:
            fake_feat = critic(generator(noise))
        fake_feat = kernels.gather(fake_feat.float())
        g_loss = generator_loss(fake_feat, args.loss)
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
            scalars |= {"charts/real_logit": real_feat.mean(), "charts/fake_logit": fake_feat.mean()}
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
