"""Generative Ratio Matching Networks, GRAM-nets (Srivastava, Xu, Gutmann & Sutton, ICLR 2020; [P]).

The critic f maps samples to R^K, where every kernel k is Gaussian; x, x' are real and have the density p
there, y, y' are fake and have q. It is no zero-sum game: the critic maximises the Pearson divergence of p
from q, so as to keep the density ratio of the data space, and the generator minimises the MMD. Both losses
are made of the same Gram matrices, and minimised:

    ratio       r    = (k_yy + ridge I)^-1 k_yx 1, p/q at the generated points             Eq. (8)
    critic      L_D  = -( mean (r - 1)^2 + lambda sum r )                                  Eq. (9), negated
    generator   L_G  = E k(x, x') - 2 E k(x, y) + E k(y, y')                               Eq. (10)

Updates are simultaneous, from one graph (Algorithm 1). mean r is about 1 whatever p and q are, and small
batches put the divergence far too high: neither tells how good the samples are. sum r grows with the batch.

Published (Table 1, FID on held-out images, three runs): CIFAR-10 24.85 +- 0.94, with the weaker critic
24.82 +- 0.62; inception score (Table 8) 5.73, 5.44, 5.45.

Deviations from the paper [P], from the notebook that the authors name for CIFAR-10 [N], and from their Julia
code [J]:
  1. [N] plays another game: q/p at real points, the critic maximises mean r, critic and generator step in
     turn on the same batch and noise, square root of the MMD^2. Here that is --as-coded, with a ridge. The
     rest of [N]: --bandwidths 1 1.4142 2 2.8284 4 and both learning rates 1e-4.
  2. A ridge of 1e-3, as [J], and a solve in float64. [P] has no ridge (--ridge 0), [N] neither, and inverts
     in float32. The Gram matrix of 200 points in one dimension has a condition number beyond 1e19.
  3. r is the mean over the bandwidths, each solved by itself ([J], [N]); [P] shows a single kernel. MMD^2 is
     the sum over them. The factor n_de / n_nu of [J] is 1 for batches of equal size.
  4. Real and fake pass the critic one after the other, each with its own batch statistics, as in [J] and [N];
     [P] does not say.
  5. No batch norm on the critic's first layer, as in [N] and DCGAN; [P] says only that there is some. 4x4
     kernels of [P], not the 5x5 of [N]. Table 3's, for MNIST, has it on each layer. Its generator has it as
     in [J]; [P] does not say.
  6. Images in [-1, 1] and tanh throughout; for MNIST [P] has a sigmoid, which is (1 + tanh(a / 2)) / 2.
  7. The rings' noise is 0.2 ([J]); [P] says 0.01.
  8. Glorot weights ([J]'s default) and biases 0; [N] has N(0, 0.02). Sampling by batch statistics as [N].
  9. Networks of other image sizes by levels, those of 8x8, and the other toys' settings: ours.
 10. lambda sum r as [P]; [J] has mean r there, a --positivity-weight of 1 / batch size. With --positivity
     clip that term is gone, as in [J].

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
import torchvision
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
    eval_features: Literal["pixels", "inception"] | None = None  # inception: FID, IS, KID, precision, recall
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
    positivity_weight: float = 1.0  # lambda of Eq. (9); not read by clip and --as-coded
    ridge: float = 1e-3  # added to the diagonal of k_yy before Eq. (8) is solved; 0 is [P]
    as_coded: bool = False  # the game of [N]: q/p at real points, mean ratio, alternating, sqrt of MMD^2
    weak_critic: bool = False  # Table 7 in the place of Table 6
    feature_dim: int | None = None  # dimension K of the projected space, the critic's output
    latent_dim: int | None = None  # dimension of the generator's input z ~ U(-1, 1); on toys N(0, I)
    learning_rate: float | None = None  # of the generator
    critic_learning_rate: float | None = None  # of the critic
    beta1: float = 0.5  # Adam's first moment, both players
    beta2: float = 0.999  # Adam's second moment, both players


# [P] section 4 and Appendix B; the number of steps: 200 epochs of [N], and the end of Figures 1 and 8.
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=156_000, batch_size=64, width=32, bandwidths=(1.0, 2.0, 4.0, 8.0, 16.0),
        feature_dim=128, latent_dim=128, learning_rate=5e-5, critic_learning_rate=5e-5, eval_every=7800,
        eval_features="inception", train_split="train", eval_split="train", sample_bn="batch",
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
    ),  # ours; Deviation 9
    "toys": dict(
        total_steps=10_000, batch_size=200, width=100, bandwidths=(1.0,), feature_dim=10, latent_dim=2,
        learning_rate=1e-3, critic_learning_rate=1e-3, eval_every=1000,
    ),  # Appendix B.1 with h = 2; Deviations 7 and 9
}  # fmt: skip
VALUE_RANGE = (-1.0, 1.0)
LOWER_BOUNDS = {"ridge": 0, "positivity_weight": 0}  # bounds of the above
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})
    ok = not args.as_coded or args.positivity == "sum"
    run.require(ok, "--positivity", "clip", "left out: --as-coded has no such term")
    args = run.resolve(args, *defaults, lower_bounds=LOWER_BOUNDS)
    if args.dataset not in datasets.TOYS:
        levels(args.image_size)  # which refuses a size that fits no network
    return args


# --- networks --------------------------------------------------------------------------------------

MNIST = (1, 28, 28)  # the shape of images that have networks of their own, Appendix B.4


def levels(side: int) -> int:
    """Return how often an image is halved: 1 for 8x8, 3 for 32x32 (down to 4x4) and 48x48 (to 6x6)."""
    n = side.bit_length() - 3  # Deviation 9
    run.require(n >= 1 and side % 2**n == 0, "--image-size", side, "4, 5, 6 or 7 times 2, 4, 8, ...")
    return n


def initialise(module: nn.Module) -> None:
    """Draw the weights of dense and convolution layers as Glorot, set biases to 0; Deviation 8."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape), images in [-1, 1]; Appendix B, Table 5."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int) -> None:
        super().__init__()
        if len(shape) == 1:  # width 100: h-100-100-2
            sizes = [latent_dim, width, width]
            hidden = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
            layers = [*hidden, nn.Linear(width, *shape)]
        elif shape == MNIST:  # width 16: 100-600-600-800-784
            sizes = [latent_dim, *(width * n // 2 for n in (75, 75, 100))]
            layers = []
            for i, o in zip(sizes, sizes[1:]):
                layers += [nn.Linear(i, o), nn.BatchNorm1d(o), nn.ReLU()]
            layers += [nn.Linear(sizes[-1], 28 * 28), nn.Unflatten(1, shape), nn.Tanh()]  # Deviation 6
        else:  # Table 5
            n = levels(shape[1])
            sizes = [*(width * 2**i for i in reversed(range(n))), shape[0]]
            start = (sizes[0], shape[1] >> n, shape[2] >> n)
            layers = [nn.Linear(latent_dim, start[0] * start[1] * start[2]), nn.Unflatten(1, start)]
            for i, o in zip(sizes, sizes[1:]):
                layers += [nn.BatchNorm2d(i), nn.ReLU(), nn.ConvTranspose2d(i, o, 4, 2, 1)]
            layers.append(nn.Tanh())
        self.layers = nn.Sequential(*layers).apply(initialise)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Critic(nn.Module):
    """Samples (B, *shape) -> features (B, feature_dim); Appendix B.1, Tables 3, 6 and 7 (weak)."""

    def __init__(self, shape: tuple[int, ...], feature_dim: int, width: int, weak: bool) -> None:
        super().__init__()
        if len(shape) == 1:
            layers = [nn.Linear(*shape, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        elif shape == MNIST:  # Table 3
            layers = []
            for i, o in ((1, width), (width, 2 * width), (2 * width, 2 * width)):
                layers += [nn.Conv2d(i, o, 3, 1, 1), nn.BatchNorm2d(o), nn.ReLU(), nn.MaxPool2d(2)]
        else:  # Table 6: 32, 64, 128; Table 7: 32, 32, 64
            sizes = [width * 2 ** max(0, i - weak) for i in range(levels(shape[1]))]
            layers = [nn.Conv2d(shape[0], width, 4, 2, 1), nn.LeakyReLU(0.2)]  # Deviation 5
            for i, o in zip(sizes, sizes[1:]):
                layers += [nn.Conv2d(i, o, 4, 2, 1), nn.BatchNorm2d(o), nn.LeakyReLU(0.2)]
        size = nn.Sequential(*layers)(torch.zeros(2, *shape))[0].numel()
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(size, feature_dim)).apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


# --- losses ----------------------------------------------------------------------------------------


def density_ratio(k_de: Tensor, k_de_nu: Tensor, ridge: float) -> Tensor:
    """Return the density ratio numerator / denominator at the n_de points of the denominator, Eq. (8).

    (n_de / n_nu) (k_de + ridge I)^-1 k_de_nu 1, solved in float64, for Gram matrices k_de (..., n_de, n_de)
    and k_de_nu (..., n_de, n_nu); the result is (..., n_de). Single values may be negative.
    """
    n_de, n_nu = k_de_nu.shape[-2:]
    k_de = k_de.double() + ridge * torch.eye(n_de, dtype=torch.float64, device=k_de.device)  # Deviation 2
    # solve_ex leaves a singular matrix to run.Finite, and does not wait for the device.
    return torch.linalg.solve_ex(k_de, k_de_nu.double().sum(-1)).result * (n_de / n_nu)


def pearson_divergence(ratio: Tensor) -> Tensor:
    """Return the estimate mean (r - 1)^2 of the Pearson divergence, Eq. (7), for ratios (n,)."""
    return (ratio - 1).square().mean()


def critic_loss(ratio: Tensor, positivity: str, weight: float) -> Tensor:
    """Return Eq. (9) of ratios p/q at generated points (n,), negated: [P] maximises, here it is minimised.

    mean (r - 1)^2 + weight * sum r; with positivity "clip", mean (max(r, 0) - 1)^2 alone (footnote 3).
    """
    if positivity == "clip":
        return -pearson_divergence(ratio.clamp_min(0))
    return -(pearson_divergence(ratio) + weight * ratio.sum())  # Deviation 10


def generator_loss(k_xx: Tensor, k_xy: Tensor, k_yy: Tensor) -> Tensor:
    """Return Eq. (10) for Gram matrices (n, n): the biased MMD^2, at least 0."""
    return kernels.mmd2(k_xx, k_xy, k_yy, "biased")


def losses(real_feat: Tensor, fake_feat: Tensor, args: Args) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Return critic loss, generator loss and what is logged beside them, for features (n, d); Algorithm 1."""
    d2 = kernels.squared_distance_blocks(real_feat.double(), fake_feat.double())
    # (S, n, n) each, S bandwidths: both losses are made of these, Algorithm 1.
    k_xx, k_xy, k_yy = (torch.stack([kernels.rbf(block, (s,)) for s in args.bandwidths]) for block in d2)
    gram = [k.sum(0) for k in (k_xx, k_xy, k_yy)]
    if args.as_coded:  # Deviation 1
        ratio = density_ratio(k_xx, k_xy, args.ridge).mean(0)  # q/p at real points
        c_loss, g_loss = -ratio.mean(), kernels.sqrt_mmd(*gram)
    else:
        ratio = density_ratio(k_yy, k_xy.mT, args.ridge).mean(0)  # p/q at generated points; Deviation 3
        c_loss, g_loss = critic_loss(ratio, args.positivity, args.positivity_weight), generator_loss(*gram)
    logged = {f"kernel/k_{pair}": k.mean() for pair, k in zip(("xx", "xy", "yy"), gram)}
    logged |= {"losses/pearson_divergence": pearson_divergence(ratio), "losses/mmd2": generator_loss(*gram)}
    return c_loss, g_loss, logged | {"charts/negative_ratios": (ratio < 0).double().mean()}


# --- sampling --------------------------------------------------------------------------------------


def draw_noise(n: int, args: Args, device: torch.device) -> Tensor:
    """Return z (n, latent_dim) ~ N(0, I) on toys, ~ U(-1, 1) for images."""
    if args.dataset in datasets.TOYS:
        return torch.randn(n, args.latent_dim, device=device)
    return torch.rand(n, args.latent_dim, device=device) * 2 - 1


def draw_picture(path: Path, fake: Tensor, data: datasets.Batches, critic: nn.Module) -> None:
    """Write a grid of generated images, or scatter plots of the data space and the projected one, as PNG."""
    if fake.ndim == 4:
        images = datasets.to_uint8(fake[:64], VALUE_RANGE).float() / 255
        images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-1]))  # small ones enlarged
        torchvision.utils.save_image(images, path)
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 6))
    axes = figure.add_subplot(1, 2, 1, projection="3d" if fake.shape[1] == 3 else None, title="data space")
    real = datasets.draw_toy(data.name, len(fake), 0).to(fake.device)
    for points, name in ((real, "real"), (fake, "generated")):
        axes.scatter(*points.cpu().T, s=3, alpha=0.6, label=name)
    axes.legend(loc="upper right")
    with torch.no_grad():
        feat = critic(torch.cat([real, fake])).float()  # a toy's critic has no state to disturb
    title = "projected space"
    if feat.shape[1] > 2:
        title += f": first two principal components of {feat.shape[1]}"
        feat = (feat - feat.mean(0)) @ torch.linalg.svd(feat - feat.mean(0), full_matrices=False).Vh[:2].T
    axes = figure.add_subplot(1, 2, 2, title=title)
    for points in F.pad(feat, (0, 2 - feat.shape[1])).cpu().chunk(2):  # K = 1 is drawn on a line
        axes.scatter(*points.T, s=3, alpha=0.6)
    axes.figure.savefig(path)


# --- training --------------------------------------------------------------------------------------


def train(args: Args) -> dict[str, float]:
    """Train, evaluate and save; return the final metrics."""
    # Set-up: nothing is written before all that can be wrong with the input has been found.
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
    generator = Generator(data.shape, args.latent_dim, args.width).to(device)
    critic = Critic(data.shape, args.feature_dim, args.width, args.weak_critic).to(device)
    g_optimizer = torch.optim.Adam(generator.parameters(), args.learning_rate, (args.beta1, args.beta2))
    c_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, (args.beta1, args.beta2))
    models = dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer)
    run.prepare(models, device)  # on GPUs: channels last, batch norm over all processes
    if args.ema_decay:
        models["ema"] = copy.deepcopy(generator)
    step = run.load_checkpoint(args, SCRIPT, models)  # 0 without --resume
    if args.compile:
        generator.compile()
        critic.compile()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # Run folder
    folder = run.make_folder(args, SCRIPT, rank)
    writer = run.make_writer(folder, args, step, rank)
    finite = run.Finite()
    metrics = {}

    def last_or_every(n: int) -> bool:
        return step == args.total_steps or (n > 0 and step % n == 0)

    def save() -> None:
        finite.check()
        writer.flush()  # the curves up to a checkpoint are not lost with what comes after it
        run.save_checkpoint(folder, args, SCRIPT, step, models, rank)

    def sample(n: int, i: int) -> Tensor:
        """Return chunk i of samples, (n, *shape), from a copy: sampling leaves no trace in training."""
        torch.manual_seed(run.mix(args.seed, run.Stream.SAMPLES, i))
        model = copy.deepcopy(models["ema"] if args.ema_decay else generator)
        with torch.no_grad():
            return run.for_sampling(model, args.sample_bn)(draw_noise(n, args, device)).float()

    def project_and_compare(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return what losses returns, for samples (B, *shape)."""
        with autocast:
            feats = critic(real), critic(fake)  # (B, K) each; Deviation 4
        return losses(*(kernels.gather(feat.float()) for feat in feats), args)

    def evaluate() -> None:
        metrics.update(evaluator.metrics(sample))
        run.save_results(folder, writer, args, step, metrics, evaluator.protocol, rank)

    def picture() -> None:
        if rank == 0:
            path = folder / "samples" / f"{step:07d}.png"
            draw_picture(path, sample(1000 if len(data.shape) == 1 else 64, 0), data, critic)
            writer.add_image("samples/generator", np.asarray(Image.open(path)), step, dataformats="HWC")

    if args.eval_only:
        evaluate()
        picture()
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
        c_loss, g_loss, logged = project_and_compare(real, fake)
        c_optimizer.zero_grad()
        g_optimizer.zero_grad()
        c_loss.backward(inputs=list(critic.parameters()), retain_graph=True)
        if args.as_coded:  # Deviation 1: the critic steps first, and the generator sees its new features
            kernels.average_gradients(critic)
            c_optimizer.step()
            c_optimizer.zero_grad()  # without a gradient, the critic stays where it is below
            _, g_loss, _ = project_and_compare(real, fake)
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
            for tag, value in scalars.items():
                writer.add_scalar(tag, value, step)
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
