"""Generative Adversarial Mapping Networks (the GAMN paper; [P]).

The critic is [P]'s mapper F: it takes samples to R^d, where real and fake are compared by their MMD. The
mapper drives it up, the generator G drives it down. x is real, y = G(z) is fake; both players minimise:

    generator   L_G = M [+ w M_data]                                                       Eqs. (6), (10)
    mapper      L_D = -M + lambda Reg                                              Eqs. (7) to (9), see 1

    M   = sqrt( E k(F(x), F(x')) - 2 E k(F(x), F(y)) + E k(F(y), F(y')) )    Eqs. (3), (4): biased, see 2
    Reg = E (|| grad_t sum_i F_i(t) || - 1)^2, t between x and y          --regularizer gp, Eq. (7)
          sum |w_n|, sum w_n^2 over the scales and shifts of F's layer norm              l1, l2: Eqs. (9), (8)
          sum w^2 over all parameters of F                          weight-decay: "classical L2", Table 3

k is a sum of RBF kernels. The penalty is on the gradient of the SUM of the outputs: one backward pass.
M_data is the MMD of the samples themselves (--data-mmd-weight), which [P] finds of slight use with gp.

Published: CIFAR-10, best IS over training: gp 6.44 (d = 10), 6.43 (d = 2 and 3), l1 6.35, l2 6.25,
weight-decay 6.01 (Tables 2, 3); MMD on toys 0.276, 0.284, 0.286, by a kernel that is not given (Table 1).

Deviations from the paper [P], which has no code; [W] is that of Gulrajani et al. 2017, which it builds on:
  1. The regulariser is subtracted from what the mapper maximises. [P] adds it in Eq. (7) and in Algorithm 1,
     by which the mapper would drive its penalty up.
  2. Fake samples in the third expectation of Eq. (3), where [P] writes real ones; no gradient where M is 0.
  3. [P] gives batch sizes, d, Adam and the names of the layers, and nothing else of what is set below: each
     help says so, but for those of the run block. What is filled in is [W]'s; bandwidths are MMD-GAN's, on
     toys ours.
  4. Which layers are normalised: in G all but the last, on toys none (batch statistics blur a sample by more
     than the width of a mode); in F each convolution but the first (as [W]; the only one of an 8x8 image
     too) and each hidden layer on toys. Layer norm is over (c, h, w) with one scale per channel, as [W].
     On toys biases start as PyTorch's, where [W] has 0 and no norm: else F could not see how far a point is.
  5. tanh and pixels in [-1, 1] for grey images too, where [W] has a sigmoid; weights from N(0, 0.02^2) for
     all images, as [W]'s for 64x64.
  6. Networks for images that are not 28, 32 or 64 pixels: ours. So is what toys are trained with: [W] has
     100,000 steps at 1e-4 for both players, width 512, 5 mapper updates and lambda 0.1, and with few steps
     of that kind the mapper runs ahead and the generator drops modes.
  7. --kernel laplacian and rq, the latter with the alphas of Binkowski et al. 2018: [P] has rbf alone.

Usage:
    python gamn.py
    python gamn.py --dataset 25gaussians --lambda-reg 10 --ema-decay 0.995 --total-steps 8000
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
    beta1: float = 0.5  # Adam's first moment, both players; not given in the paper
    beta2: float = 0.9  # Adam's second moment, both players; not given in the paper


# Batch sizes: [P]; the rest: [W]. Deviation 3
DEFAULTS = {
    "images": dict(
        image_size=64, total_steps=200_000, batch_size=64, width=64, latent_dim=128, learning_rate=1e-4,
        critic_learning_rate=1e-4, n_critic=5, eval_every=12_500, eval_features="inception",
        train_split="train", eval_split="train", sample_bn="batch",
    ),
    "cifar10": dict(image_size=32, width=128),
    "stl10": dict(image_size=48),  # ours
    "mnist": dict(image_size=28, batch_size=50, eval_features="pixels"),  # fashion-mnist too
    "digits": dict(
        image_size=8, total_steps=1000, width=32, latent_dim=32, learning_rate=5e-4,
        critic_learning_rate=5e-4, eval_every=500, eval_features="pixels",
    ),  # ours
    "toys": dict(
        total_steps=4000, batch_size=256, width=256, latent_dim=2, learning_rate=5e-4,
        critic_learning_rate=1e-4, n_critic=2, eval_every=500, sample_bn="running",
    ),  # ours
}  # fmt: skip
VALUE_RANGE = (-1.0, 1.0)
LOWER_BOUNDS = {"lambda_reg": 0, "gp_target": 0, "data_mmd_weight": 0, "n_generator": 1}
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})
    toy = args.dataset in datasets.TOYS
    method = {"lambda_reg": 1e-3 if args.regularizer != "gp" else 1.0 if toy else 10.0}
    bandwidths = (0.05, 0.1, 0.2, 0.5, 1.0) if toy else (1.0, 2.0, 4.0, 8.0, 16.0)
    bandwidths = (0.2, 0.5, 1.0, 2.0, 5.0) if args.kernel == "rq" else bandwidths  # Deviation 7
    args = run.resolve(args, *defaults, method, {"bandwidths": bandwidths}, lower_bounds=LOWER_BOUNDS)
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


def initialise(module: nn.Module) -> None:
    """Draw weights from N(0, 0.02^2) and set biases to 0."""
    if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def mlp(inputs: int, width: int, outputs: int, norm: nn.Module) -> nn.Sequential:
    """Return three hidden layers with norm and a linear one; He's law and Glorot's, as [W]."""
    dense = [nn.Linear(i, o) for i, o in ((inputs, width), (width, width), (width, width), (width, outputs))]
    for layer in dense:
        nn.init.kaiming_uniform_(layer.weight)  # biases are PyTorch's: Deviation 4
    nn.init.xavier_uniform_(dense[-1].weight)
    return nn.Sequential(*(m for d in dense[:-1] for m in (d, copy.deepcopy(norm), nn.ReLU())), dense[-1])


def crop(side: int) -> nn.Module:
    """Return the layer that keeps side of the 2s + 1 rows and columns of a transposed convolution."""
    return nn.ZeroPad2d((0, -1 - side % 2, 0, -1 - side % 2))


class Generator(nn.Module):
    """z (B, latent_dim) -> samples (B, *shape) in [-1, 1]; batch norm in all layers but the last."""

    def __init__(self, shape: tuple[int, ...], latent_dim: int, width: int) -> None:
        super().__init__()
        if len(shape) == 1:
            self.layers = mlp(latent_dim, width, *shape, nn.Identity())  # Deviation 4
            return
        *targets, start = sides(shape[1])  # 32, 16, 8 and 4
        c = width * 2 ** (len(targets) - 1)
        layers = [nn.Linear(latent_dim, c * start**2), nn.Unflatten(1, (c, start, start))]
        for side in reversed(targets[1:]):
            # Padding 1 and the crop: 1 row before and 2 after, as "SAME" in [W]; 8x8 becomes 7x7 for 28x28.
            layers += [nn.BatchNorm2d(c), nn.ReLU(), nn.ConvTranspose2d(c, c // 2, 5, 2, 1), crop(side)]
            c //= 2
        layers += [nn.BatchNorm2d(c), nn.ReLU(), nn.ConvTranspose2d(c, shape[0], 5, 2, 1), crop(shape[1])]
        self.layers = nn.Sequential(*layers, nn.Tanh()).apply(initialise)  # Deviation 5

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Critic(nn.Module):
    """The mapper F: samples (B, *shape) -> features (B, feature_dim); layer norm, Deviation 4."""

    def __init__(self, shape: tuple[int, ...], feature_dim: int, width: int) -> None:
        super().__init__()
        if len(shape) == 1:
            self.layers = mlp(*shape, width, feature_dim, nn.GroupNorm(1, width))
            return
        (*sizes, end), layers, i, o = sides(shape[1]), [], shape[0], width
        for side in sizes:
            pad = nn.ZeroPad2d((1 + side % 2, 2) * 2)  # "SAME": 1 before and 2 after; odd: 2 and 2
            norm = nn.GroupNorm(1, o) if layers or len(sizes) == 1 else nn.Identity()
            layers += [pad, nn.Conv2d(i, o, 5, 2), norm, nn.LeakyReLU(0.2)]
            i, o = o, 2 * o
        layers += [nn.Flatten(), nn.Linear(i * end**2, feature_dim)]
        self.layers = nn.Sequential(*layers).apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


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
    weights = [w for m in critic.modules() if isinstance(m, nn.GroupNorm) for w in m.parameters()]  # w_n
    return sum(w.abs().sum() if args.regularizer == "l1" else w.square().sum() for w in weights)


def critic_loss(mmd: Tensor, reg: Tensor, lambda_reg: float) -> Tensor:
    """Return L_D = -M + lambda Reg of Eqs. (7) to (10), minimised; M of features, Eqs. (3), (4)."""
    return -mmd + lambda_reg * reg  # Deviations 1 and 2


def generator_loss(mmd: Tensor, data_mmd: Tensor | float, data_mmd_weight: float) -> Tensor:
    """Return L_G = M + w M_data, minimised; M of features, Eq. (6), M_data of samples, Eq. (10)."""
    return mmd + data_mmd_weight * data_mmd


# --- sampling --------------------------------------------------------------------------------------


def draw_noise(n: int, args: Args, device: torch.device) -> Tensor:
    """Return z (n, latent_dim) ~ N(0, I)."""
    return torch.randn(n, args.latent_dim, device=device)


def draw_picture(path: Path, fake: Tensor, data: datasets.Batches) -> None:
    """Write a grid of generated images, or a scatter plot of real and generated points, as PNG."""
    if fake.ndim == 4:
        images = datasets.to_uint8(fake[:64], VALUE_RANGE).float() / 255
        images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-1]))  # small ones enlarged
        torchvision.utils.save_image(images, path)
    else:
        evaluation.draw_points(path, fake, data.name)


# --- training --------------------------------------------------------------------------------------


def critic_steps(step: int, args: Args) -> int:
    """Return the number of critic updates before generator update step = 1, 2, ..., as Algorithm 1."""
    return 0 if (step - 1) % args.n_generator else args.n_critic


def train(args: Args) -> dict[str, float]:
    """Train, evaluate and save; return the final metrics."""
    # Set-up: nothing is written before all that can be wrong with the input has been found.
    args = resolve(args)
    device, rank, world_size = run.start(args.device)
    evaluator = evaluation.Evaluator(args) if args.eval_every or args.eval_only else None
    data = datasets.load(args, args.train_split, VALUE_RANGE, device, rank, world_size)
    if evaluator:
        evaluator.set_reference(data)

    # Models; the seed makes every process start from the same weights.
    torch.manual_seed(args.seed)
    generator = Generator(data.shape, args.latent_dim, args.width).to(device)
    critic = Critic(data.shape, args.feature_dim, args.width).to(device)
    g_optimizer = torch.optim.Adam(generator.parameters(), args.learning_rate, (args.beta1, args.beta2))
    c_optimizer = torch.optim.Adam(critic.parameters(), args.critic_learning_rate, (args.beta1, args.beta2))
    models = dict(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer)
    run.prepare(models, device)  # on GPUs: channels last, batch norm over all processes
    if args.ema_decay:
        models["ema"] = copy.deepcopy(generator)
    step = run.load_checkpoint(args, SCRIPT, models)  # 0 without --resume
    if args.compile:
        generator.compile()
        critic.compile(disable=args.regularizer == "gp")  # its gradient is differentiated again
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

    def evaluate() -> None:
        metrics.update(evaluator.metrics(sample))
        run.save_results(folder, writer, args, step, metrics, evaluator.protocol, rank)

    def picture() -> None:
        if rank == 0:
            path = folder / "samples" / f"{step:07d}.png"
            draw_picture(path, sample(1000 if len(data.shape) == 1 else 64, 0), data)
            writer.add_image("samples/generator", np.asarray(Image.open(path)), step, dataformats="HWC")

    if args.eval_only:
        evaluate()
        picture()
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
            k_xx, k_xy, k_yy = kernels.shifted_gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
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
        k_xx, k_xy, k_yy = kernels.shifted_gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
        mmd = kernels.sqrt_mmd(k_xx, k_xy, k_yy)
        data_mmd = 0.0
        if args.data_mmd_weight:
            samples = kernels.gather(real.flatten(1)), kernels.gather(fake.float().flatten(1))
            data_mmd = kernels.sqrt_mmd(*kernels.shifted_gram_blocks(*samples, args.kernel, args.bandwidths))
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
            scalars |= {"losses/mmd": mmd, "losses/regularization": reg, "losses/data_mmd": data_mmd}
            at_zero = kernels.value_at_zero(args.kernel, args.bandwidths)
            scalars |= kernels.block_means(k_xx, k_xy, k_yy, at_zero)
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
