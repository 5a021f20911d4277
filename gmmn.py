"""Generative Moment Matching Networks (Li, Swersky & Zemel, ICML 2015; [L]); GMMN and GMMN+AE.

One network, no adversary: the generator G minimises the MMD between the data x and its samples y = G(z),

    generator   L_G = sqrt( E k(x, x') - 2 E k(x, y) + E k(y, y') )                       [G] Eqs. (4), (5)

with the biased estimate and a sum of Gaussian kernels ([G]: the GAMN paper, which restates it). GMMN+AE
(--autoencoder) first trains an auto-encoder, layer by layer and then as a whole, freezes it, and matches
codes instead of pixels; a sample is decoder(G(z)).

Bandwidths: the authors' numbers {2, 5, 10, 20, 40, 80} stand in exp(-d2 / (2 s)), so they are variances.
Here a bandwidth is sigma in exp(-d2 / (2 sigma^2)), and the table below takes their square roots. Codes
of MNIST are matched with the single variance 1, which is the default with --autoencoder.

Published: CIFAR-10 IS 2.45, and 2.78 with the auto-encoder (GAMN paper, Table 2); 3.47 and 3.94 with
other networks (Li et al. 2017).

Deviations from the paper [L] and from the authors' code [C]:
  1. Weight 1 on the loss. [C] has 1000 and divides by the 1000 generated samples, which is the same.
  2. No gradient where MMD^2 is 0, where [C] divides by 2 sqrt(MMD^2) + 1e-10.
  3. Dropout rescales in training; in [C] the weights are scaled afterwards. The trained function is the
     same, the steps towards it are not.
  4. Trained on all 60,000 digits of MNIST; [C] holds out 5,000 for validation.
  5. On toys: the MLP of the GAMN paper, Gaussian noise, PyTorch's initialisation, Adam, and bandwidths of our
     own, since the published list cannot tell the modes apart; on digits: bandwidths that fit its scale, and
     smaller networks, batches and steps.
  6. Image sets but MNIST take MNIST's settings, whatever their size: [L] has the Toronto faces beside it.
  7. --kernel rq (alphas of Binkowski et al. 2018), laplacian, distance and --optimizer adam are not in [L].

Usage:
    python gmmn.py
    python gmmn.py --dataset 25gaussians
    python gmmn.py --dataset mnist --autoencoder
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
    autoencoder: bool = False  # GMMN+AE: match the codes of an auto-encoder that is trained first
    ae_steps: int | None = None  # updates of each layer of the auto-encoder, and then of the whole
    kernel: Literal["rbf", "rq", "laplacian", "distance"] = "rbf"  # the paper's is rbf
    bandwidths: tuple[float, ...] | None = None  # sigma of rbf and laplacian, alpha of rq; distance has none
    feature_dim: int = 32  # dimension of the auto-encoder's code
    latent_dim: int | None = None  # dimension of the generator's input z ~ U(-1, 1); on toys N(0, I)
    optimizer: Literal["sgd", "adam"] | None = None  # the paper's is sgd
    learning_rate: float | None = None  # of the generator
    momentum: float = 0.9  # of SGD; Adam's first moment
    drop_step: int | None = None  # step after which learning rate and 1 - momentum of SGD are a tenth


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
    "mnist": dict(image_size=28, eval_features="pixels"),  # fashion-mnist too; Deviation 4
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
VALUE_RANGE = (0.0, 1.0)
LOWER_BOUNDS = {"width": 16, "ae_steps": 1, "drop_step": 0}  # bounds of the above
SCRIPT = Path(__file__).stem


def resolve(args: Args) -> Args:
    """Return args with its data set's values where None stands; BadInput if they make no run."""
    defaults = DEFAULTS["images"], DEFAULTS.get(datasets.family(args.dataset), {})
    rq = {"bandwidths": (0.2, 0.5, 1.0, 2.0, 5.0)} if args.kernel == "rq" else {}  # Deviation 7
    code = {"bandwidths": (1.0,)} if args.autoencoder and args.kernel == "rbf" else {}  # [C]: one kernel
    toy = args.dataset in datasets.TOYS
    run.require(not (args.autoencoder and toy), "--autoencoder", "on", "left out for a data set of points")
    return run.resolve(args, *defaults, rq, code, lower_bounds=LOWER_BOUNDS)


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
        hidden = [width] * 3 if toy else [width // 16, width // 4, width // 4, width]
        sizes = [latent_dim, *hidden]
        layers = [m for i, o in zip(sizes, sizes[1:]) for m in (nn.Linear(i, o), nn.ReLU())]
        layers += [nn.Linear(width, math.prod(shape)), nn.Identity() if toy else nn.Sigmoid()]
        self.layers = nn.Sequential(*layers, nn.Unflatten(1, shape))
        if not toy:  # few inputs and no biases would make G(c z) = c G(z): toys keep PyTorch's own
            self.layers.apply(initialise)

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z)


class Autoencoder(nn.Module):
    """Images (B, *shape) in [0, 1] <-> codes (B, feature_dim) in [0, 1]: two sigmoid layers each way.

    updates: how many it has had, a buffer, so that a checkpoint knows how far its training has come.
    """

    def __init__(self, shape: tuple[int, ...], feature_dim: int, width: int) -> None:
        super().__init__()
        size = math.prod(shape)
        self.encoders = nn.ModuleList([nn.Linear(size, width), nn.Linear(width, feature_dim)])
        self.decoders = nn.ModuleList([nn.Linear(width, size), nn.Linear(feature_dim, width)])
        self.dropouts = nn.ModuleList([nn.Dropout(0.2), nn.Dropout(0.5)])  # of encoders' inputs; Deviation 3
        self.shape = shape
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self.apply(initialise)

    def encode(self, x: Tensor, depth: int = 2) -> Tensor:
        x = x.flatten(1)
        for encoder, dropout in zip(self.encoders[:depth], self.dropouts):
            x = encoder(dropout(x)).sigmoid()
        return x

    def logits(self, code: Tensor) -> Tensor:
        """Return what decode is the sigmoid of."""
        return self.decoders[0](self.decoders[1](code).sigmoid()).unflatten(1, self.shape)

    def decode(self, code: Tensor) -> Tensor:
        return self.logits(code).sigmoid()


# --- losses ----------------------------------------------------------------------------------------


def generator_loss(real_feat: Tensor, fake_feat: Tensor, kernel: str, bandwidths: tuple) -> Tensor:
    """Return L_G, [G] Eq. (4), of pixels or codes (n, d); at least 0. It has a first derivative only."""
    # E k(x, x') - 2 E k(x, y) + E k(y, y'), diagonals kept; of its Gram matrices only tiles are ever held
    mmd2 = kernels.fused_mmd2(real_feat, fake_feat, kernel, bandwidths, "biased")
    return kernels.safe_sqrt(mmd2)  # Deviations 1 and 2


def layer_loss(autoencoder: Autoencoder, x: Tensor, layer: int) -> Tensor:
    """Return the cross-entropy of one layer's reconstruction of its own input, the code of those below."""
    with torch.no_grad():
        target = autoencoder.eval().encode(x, layer)  # below, without dropout
    autoencoder.train()
    hidden = autoencoder.encoders[layer](autoencoder.dropouts[layer](target)).sigmoid()
    logits = autoencoder.decoders[layer](hidden)
    return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(x)


def autoencoder_loss(autoencoder: Autoencoder, x: Tensor) -> Tensor:
    """Return the cross-entropy of the whole auto-encoder's reconstruction of x (B, *shape)."""
    logits = autoencoder.logits(autoencoder.train().encode(x))
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


# --- sampling --------------------------------------------------------------------------------------


def draw_noise(n: int, args: Args, device: torch.device) -> Tensor:
    """Return z (n, latent_dim) ~ N(0, I) on toys, ~ U(-1, 1) for images."""
    if args.dataset in datasets.TOYS:
        return torch.randn(n, args.latent_dim, device=device)
    return torch.rand(n, args.latent_dim, device=device) * 2 - 1


def draw_picture(path: Path, fake: Tensor, data: datasets.Batches) -> None:
    """Write a grid of generated images, or a scatter plot of real and generated points, as PNG."""
    if fake.ndim == 4:
        images = datasets.to_uint8(fake[:64], VALUE_RANGE).float() / 255
        images = F.interpolate(images, scale_factor=max(1, 64 // images.shape[-1]))  # small ones enlarged
        torchvision.utils.save_image(images, path)
    else:
        evaluation.draw_points(path, fake, data.name)


# --- training --------------------------------------------------------------------------------------


def update_autoencoder(
    autoencoder: Autoencoder, optimizer: torch.optim.SGD, real: Tensor, update: int, ae_steps: int
) -> Tensor:
    """Make update 1, 2, ...: ae_steps for each layer, then for the whole auto-encoder; return its loss."""
    phase, since = divmod(update - 1, ae_steps)
    if since == 0:
        optimizer.state.clear()
    momentum = 0.5 if phase < 2 else 0.0 if since < 50 else 0.5 if since < 200 else 0.9
    optimizer.param_groups[0]["momentum"] = momentum
    loss = layer_loss(autoencoder, real, phase) if phase < 2 else autoencoder_loss(autoencoder, real)
    optimizer.zero_grad()
    loss.backward()
    kernels.average_gradients(autoencoder)
    nn.utils.clip_grad_norm_(autoencoder.parameters(), 10.0)
    optimizer.step()
    autoencoder.updates += 1
    return kernels.gather(loss.detach()[None]).mean()


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
    code_shape = (args.feature_dim,) if args.autoencoder else data.shape
    generator = Generator(code_shape, args.latent_dim, args.width, args.dataset in datasets.TOYS).to(device)
    if args.optimizer == "sgd":
        g_optimizer = torch.optim.SGD(generator.parameters(), args.learning_rate, args.momentum)
    else:
        g_optimizer = torch.optim.Adam(generator.parameters(), args.learning_rate, (args.momentum, 0.999))
    models = {"generator": generator, "g_optimizer": g_optimizer}
    if args.autoencoder:
        autoencoder = Autoencoder(data.shape, args.feature_dim, args.width).to(device)
        ae_optimizer = torch.optim.SGD(autoencoder.parameters(), 0.1)
        models |= {"autoencoder": autoencoder, "ae_optimizer": ae_optimizer}
    if args.ema_decay:
        models["ema"] = copy.deepcopy(generator)
    step = run.load_checkpoint(args, SCRIPT, models)  # 0 without --resume
    if args.compile:
        generator.compile()
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    # Run folder
    folder = run.make_folder(args, SCRIPT, rank)
    ae_total, ae_done = (3 * args.ae_steps, int(autoencoder.updates)) if args.autoencoder else (0, 0)
    writer = run.make_writer(folder, args, step + ae_done - ae_total, rank)  # the auto-encoder's end at 0
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
            fake = run.for_sampling(model, args.sample_bn)(draw_noise(n, args, device)).float()
            return autoencoder.eval().decode(fake) if args.autoencoder else fake

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

    # The auto-encoder comes before the generator: layer by layer, then as a whole.
    updates = range(ae_done + 1, ae_total + 1)
    for update in tqdm(updates, "auto-encoder", disable=None if rank == 0 and updates else True):
        torch.manual_seed(run.mix(args.seed, run.Stream.AUTOENCODER, update, rank))
        real = data.batch(update - 1)[: max(1, AE_BATCH // world_size)]
        ae_loss = update_autoencoder(autoencoder, ae_optimizer, real, update, args.ae_steps)
        finite.note(update, autoencoder=ae_loss)
        if args.log_every and update % args.log_every == 0:
            writer.add_scalar("losses/autoencoder", ae_loss, update - ae_total)
        stopping = run.stop_asked(update)
        if (args.save_every and update % args.save_every == 0) or update == ae_total or stopping:
            save()
        if stopping:
            run.leave(writer, folder, update)
    encode = autoencoder.eval().encode if args.autoencoder else nn.Flatten()

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
        late = 0.1 if step > args.drop_step else 1.0
        g_optimizer.param_groups[0]["lr"] = late * args.learning_rate
        if args.optimizer == "sgd":
            g_optimizer.param_groups[0]["momentum"] = 1 - late * (1 - args.momentum)
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
                k_xx, k_xy, k_yy = kernels.gram_blocks(real_feat, fake_feat, args.kernel, args.bandwidths)
            scalars = {"losses/generator": g_loss, "charts/learning_rate": late * args.learning_rate}
            scalars |= {"kernel/k_xx": k_xx.mean(), "kernel/k_xy": k_xy.mean(), "kernel/k_yy": k_yy.mean()}
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
