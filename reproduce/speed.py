"""How fast the parts are beside their goals: python -m reproduce.speed, under five minutes on 2 free cores.

Every time is CPU time, with one thread, so that other work on the machine counts little; rows that say "wall"
are of a clock on the wall, since what they compare has processes of its own. What is compared runs in turns,
in one process, and a ratio is the median over the rounds, with the 10 and 90 % quantiles. A goal is a bound
that this project set itself for a ratio, below what was measured when it was set; the last column says
whether the median keeps it. Bytes and operations are exact, and tests hold them; no test looks at a time.

Peers, each as one would write it without this project:
    plain        autograd through the Gram matrix of all samples together, one exponential per bandwidth, as
                 most published code has it
    naive        the same from torch.cdist, squared, block by block
    bare         the products of matrices that the same tiles cannot do without, and one exp
    the authors' the loop of Li et al.'s code (mmd_gan.py), on batches that lie ready
    simultaneous the repulsive loss with PyTorch's spectral_norm, two forward passes and a plain Gram matrix;
                 it asks for no gradient that the update does not need either
"""

import contextlib
import io
import os
import platform
import queue
import resource
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations_with_replacement
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import numpy as np
import torch
import torchvision
import tyro
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

from common import datasets, evaluation, kernels, run
from reproduce import page

BANDWIDTHS = (1.0, 2.0, 4.0, 8.0, 16.0)
SCRIPTS = (
    "gmmn",
    "gamn",
    "mmd_gan",
    "mmd_gan_repulsive",
    "smmd_gan",
    "gram_net",
    "baselines.gan",
    "baselines.wgan",
)


@dataclass
class Args:
    """Measure everything."""

    rounds: int = 9  # times that each side of a short comparison runs; long ones run a third as often
    folder: str = "docs"  # where the picture of growth is written
    tiny: bool = False  # sizes at which nothing is worth knowing, to see that it runs


# --- measuring -------------------------------------------------------------------------------------


def in_turns(sides: dict[str, Callable], rounds: int, clock: Callable = time.process_time) -> dict:
    """Return seconds (rounds,) of each side; every other round goes backwards, the first is dropped."""
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides) if i % 2 else reversed(sides):
            start = clock()
            sides[name]()
            seconds[name].append(clock() - start)
    return {name: np.array(s[1:]) for name, s in seconds.items()}


def cpu_of_all() -> float:
    """Return the CPU seconds of this process and of those that it started, once they have ended."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def print_row(what: str, sizes: str, ratio: str, median: float, goal: str) -> None:
    """Print a line of the table; goal: ">= 2" or "<= 2", which the median keeps or not."""
    sign, bound = goal.split()
    met = median >= float(bound) if sign == ">=" else median <= float(bound)
    print(f"| {what} | {sizes} | {ratio} | {goal} | {'yes' if met else 'no'} |")


def print_ratio(what: str, slow: np.ndarray, fast: np.ndarray, goal: str) -> None:
    """Print the median of slow / fast beside its goal."""
    median, low, high = np.quantile(slow / fast, [0.5, 0.1, 0.9])
    times = f"{1e3 * np.median(slow):.4g} / {1e3 * np.median(fast):.4g} ms"
    print_row(what, times, f"{median:.2f} [{low:.2f}, {high:.2f}]", median, goal)


class Counter(TorchDispatchMode):
    """Counts operations (views left out) and the bytes of the tensors they make: operations, live, peak."""

    def __init__(self) -> None:
        super().__init__()
        self.operations = self.live = self.peak = 0
        self.seen = set()

    def free(self, key: int, size: int) -> None:
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        self.operations += not function.is_view
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.seen | inputs:
                    self.seen.add(storage._cdata)
                    self.live += storage.nbytes()
                    weakref.finalize(storage, self.free, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


# --- MMD -------------------------------------------------------------------------------------------


def plain_gram(x: Tensor, y: Tensor, bandwidths: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return k_xx, k_xy, k_yy of a sum of Gaussians, from one Gram matrix of x and y together."""
    z = torch.cat([x, y])
    products = z @ z.T
    norm2 = products.diagonal()
    d2 = norm2[:, None] - 2 * products + norm2[None]
    k = sum(torch.exp(-0.5 / s**2 * d2) for s in bandwidths)
    n = len(x)
    return k[:n, :n], k[:n, n:], k[n:, n:]


def plain_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased MMD^2 of a sum of Gaussians, by autograd through one Gram matrix of x and y."""
    return kernels.mmd2(*plain_gram(x, y, BANDWIDTHS), "unbiased")


def naive_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Return the same from distances that are squared again, block by block."""
    blocks = []
    for a, b in ((x, x), (x, y), (y, y)):
        d2 = torch.cdist(a, b).square()
        blocks.append(sum(torch.exp(-0.5 / s**2 * d2) for s in BANDWIDTHS))
    return kernels.mmd2(*blocks, "unbiased")


def fused_mmd2(x: Tensor, y: Tensor) -> Tensor:
    return kernels.fused_mmd2(x, y, "rbf", BANDWIDTHS, "unbiased")


def samples(n: int, d: int, both: bool) -> tuple[Tensor, Tensor]:
    """Return x and y (n, d), at distances of about 6 whatever d is; both: x has a gradient too."""
    x, y = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0)) * 4 / d**0.5
    return x.requires_grad_(both), (y + 1 / d**0.5).requires_grad_()


def forward_backward(mmd2: Callable, n: int, d: int, both: bool, repeat: int = 1) -> Callable:
    """Return what makes value and gradient, repeat times."""
    x, y = samples(n, d, both)

    def call() -> None:
        for _ in range(repeat):
            x.grad = y.grad = None
            mmd2(x, y).backward()

    return call


def bare_products(n: int, d: int, both: bool) -> Callable:
    """Return what makes d2 and h z (see kernels._FusedMMD2) of the same tiles, and one pass of exp."""
    z = torch.cat(samples(n, d, both)).detach()
    starts = [*range(0, n, kernels.TILE), *range(n, 2 * n, kernels.TILE)]
    tiles = [slice(i, min(i + kernels.TILE, n if i < n else 2 * n)) for i in starts]

    def call() -> None:
        hz = torch.zeros_like(z)
        for a, b in combinations_with_replacement(tiles, 2):
            h = torch.exp(-(z[a] @ z[b].T).abs_())
            if both or a.start >= n:
                hz[a].addmm_(h, z[b])
            if a is not b and (both or b.start >= n):
                hz[b].addmm_(h.T, z[a])

    return call


def count(mmd2: Callable, n: int, d: int, both: bool) -> Counter:
    """Return the counts of value and gradient."""
    call = forward_backward(mmd2, n, d, both)
    call()  # what is made once and kept is not counted
    with Counter() as counter:
        call()
    return counter


def measure_mmd(rounds: int, tiny: bool) -> None:
    for n, d, both, repeat, goal in (
        (256, 10, True, 3, ">= 2.8"), (1000, 784, True, 1, ">= 2.0"), (1000, 784, False, 1, ">= 3.0"),
    ):  # fmt: skip
        n = 70 if tiny else n
        sides = {f.__name__: forward_backward(f, n, d, both, repeat) for f in (plain_mmd2, fused_mmd2)}
        if d == 784:
            sides["bare"] = bare_products(n, d, both)
        seconds = in_turns(sides, rounds)
        what = f"MMD {n} x {d}, gradient of {'both' if both else 'fake'}"
        print_ratio(f"{what}: plain / fused", seconds["plain_mmd2"], seconds["fused_mmd2"], goal)
        if d == 784:
            print_ratio(f"{what}: fused / bare", seconds["fused_mmd2"], seconds["bare"], "<= 1.5")
            plain, fused = (count(f, n, d, both).peak for f in (plain_mmd2, fused_mmd2))
            sizes = f"{plain / 2**20:.1f} / {fused / 2**20:.1f} MiB"
            print_row(f"{what}: memory, plain / fused", sizes, f"{plain / fused:.2f}", plain / fused, ">= 6")


def measure_growth(args: Args) -> None:
    """Draw time and memory against points, real and fake together, in 64 dimensions: docs/speed_growth.png.

    Plain and naive stop at 4,000: with 16,000 they would take more than 10 GB.
    """
    limits = {"naive": (naive_mmd2, 4000), "plain": (plain_mmd2, 4000), "fused": (fused_mmd2, 16_000)}
    points = (100, 200) if args.tiny else (1000, 2000, 4000, 8000, 16_000)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.5))
    print()
    for name, (mmd2, most) in limits.items():
        sizes = [n for n in points if n <= most]
        seconds, mebibytes = [], []
        for n in sizes:
            call = forward_backward(mmd2, n // 2, 64, both=True)
            seconds.append(np.median(in_turns({name: call}, 1 if n > 4000 else 3)[name]))
            mebibytes.append(count(mmd2, n // 2, 64, both=True).peak / 2**20)
        left.loglog(sizes, seconds, "o-", label=name)
        right.loglog(sizes, mebibytes, "o-", label=name)
        values = zip(sizes, seconds, mebibytes)
        print(f"{name}: " + "; ".join(f"{n:,} points {s:.3g} s, {m:.3g} MiB" for n, s, m in values))
    left.set(xlabel="points", ylabel="CPU seconds of one thread")
    right.set(xlabel="points", ylabel="peak memory [MiB]")
    for axes in (left, right):
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    caption = """Value and gradient of the MMD^2 of as many real as fake points in 64 dimensions, five
    bandwidths. In time all grow by the square of the points; in memory fused does not, since it holds no more
    than tiles of the Gram matrix."""
    page.save(figure, caption, "speed_growth", page.Args(folder=args.folder))


# --- data ------------------------------------------------------------------------------------------


def measure_data(rounds: int, tiny: bool) -> None:
    """Batches of 64 CIFAR-sized images: torchvision's data set, transforms and DataLoader, and ours."""
    n = 256 if tiny else 2048
    pixels = np.random.default_rng(0).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    theirs = torchvision.datasets.CIFAR10.__new__(torchvision.datasets.CIFAR10)  # no files: its __getitem__
    to_float = v2.Compose(
        [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
    )
    theirs.data, theirs.targets, theirs.transform, theirs.target_transform = pixels, [0] * n, to_float, None
    options = dict(batch_size=64, shuffle=True, drop_last=True)
    alone = torch.utils.data.DataLoader(theirs, **options)  # its default: no workers
    helped = torch.utils.data.DataLoader(theirs, **options, num_workers=2, persistent_workers=True)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    ours = datasets.Images("noise", (3, 32, 32), 64, 1, 0, 1, images.device, images, (-1.0, 1.0))
    sides = {
        "no workers": lambda: sum(1 for _ in alone),
        "ours": lambda: [ours.batch(i) for i in range(n // 64)],
    }
    seconds = in_turns(sides, rounds)
    what = f"{n} images: DataLoader / uint8 batches"
    print_ratio(f"{what}, no workers (its default)", seconds["no workers"], seconds["ours"], ">= 10")
    sides["2 workers"] = lambda: sum(1 for _ in helped)
    del sides["no workers"]
    seconds = in_turns(sides, rounds, time.perf_counter)
    print_ratio(f"{what}, 2 workers, wall", seconds["2 workers"], seconds["ours"], ">= 10")


def measure_conversion(tiny: bool, folder: str) -> None:
    """Folders of small JPEGs to one array: a plain loop over Pillow, and ours, each of files never seen."""
    n, rng = 20 if tiny else 6000, np.random.default_rng(0)
    source = Path(folder, "jpegs")
    source.mkdir()
    for i in range(n):
        image = rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)
        Image.fromarray(image).resize((96, 96)).save(source / f"{i:05d}.jpg")
    caches = iter(range(1000))

    def plain() -> None:
        images = []
        for path in sorted(source.iterdir()):
            with Image.open(path) as image:
                images.append(np.asarray(image.convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)))
        np.save(Path(folder, "plain.npy"), np.stack(images))

    def ours() -> None:
        datasets.load_images(f"folder:{source}", str(Path(folder, f"cache{next(caches)}")), 64, "train")

    sides = {"plain": plain, "ours": ours}
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        seconds = in_turns(sides, 1 if tiny else 3, lambda: np.array([cpu_of_all(), time.perf_counter()]))
    what = f"{n} JPEGs to one array: Pillow loop / ours"
    print_ratio(f"{what}, CPU of all processes", seconds["plain"][:, 0], seconds["ours"][:, 0], ">= 1")
    print_ratio(f"{what}, wall", seconds["plain"][:, 1], seconds["ours"][:, 1], ">= 2")


# --- evaluation ------------------------------------------------------------------------------------


def measure_evaluation(tiny: bool) -> None:
    """KID and the statistics of features as many as Inception's, beside torch-fidelity's."""
    from torch_fidelity.metric_fid import fid_features_to_statistics
    from torch_fidelity.metric_kid import kid_features_to_metric

    n, d, subsets, size = (60, 16, 2, 20) if tiny else (3000, 2048, 10, 1000)
    real, fake = torch.randn(2, n, d, generator=torch.Generator().manual_seed(0)).abs()

    def their_kid() -> None:
        kid_features_to_metric(real, fake, kid_subsets=subsets, kid_subset_size=size, verbose=False)

    def our_statistics() -> None:
        statistics = evaluation.Statistics()
        for features in real.split(500):
            statistics.add(features)
        statistics.result()

    rounds = 1 if tiny else 2
    sides = {"theirs": their_kid, "ours": lambda: evaluation.kernel_distance(real, fake, subsets, size)}
    with contextlib.redirect_stderr(io.StringIO()):
        seconds = in_turns(sides, rounds)
    what = f"KID, {subsets} subsets of {size} x {d}: torch-fidelity / ours"
    print_ratio(what, seconds["theirs"], seconds["ours"], ">= 1")
    sides = {"theirs": lambda: fid_features_to_statistics(real), "ours": our_statistics}
    seconds = in_turns(sides, rounds)
    print_ratio(f"statistics of {n} x {d}: torch-fidelity / ours", seconds["theirs"], seconds["ours"], ">= 1")


def measure_pixels(tiny: bool, folder: str) -> None:
    """python -m common.evaluation with the pixels of two small sets of noise."""
    n = 20 if tiny else 1000
    names = []
    for i in range(2):
        pixels = np.random.default_rng(i).integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
        names.append(str(Path(folder, f"{i}.npy")))
        np.save(names[-1], pixels)
    start = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation.main(evaluation.Args(*names, eval_features="pixels", device="cpu", data_dir=folder))
    seconds = time.process_time() - start
    print_row(f"distances of pixels, {n} + {n} of 3x32x32: CPU", "", f"{seconds:.2f} s", seconds, "<= 5")


# --- processes -------------------------------------------------------------------------------------


def run_command(command: str, status: int = 0) -> None:
    """Run python with these words on one thread in the project's folder; RuntimeError: it fails to end so."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    root = Path(__file__).parent.parent
    words = [sys.executable, *command.split()]
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode != status:
        raise RuntimeError(f"python {command} ended with {done.returncode}: {done.stderr}")


def measure_start(folder: str) -> None:
    """CPU time of a script that says its help, that refuses a flag, and that makes one step on digits."""
    one_step = "--total-steps 1 --eval-every 0 --sample-every 0 --device cpu"
    for what, options, status, goal in (
        ("--help", "--help", 0, "<= 3"),
        ("a bad flag", "--no-such-flag", 2, "<= 3"),
        ("one step", one_step, 0, "<= 6"),
    ):
        begin = cpu_of_all()
        run_command(f"mmd_gan_repulsive.py {options} --runs-dir {folder}", status)
        seconds = cpu_of_all() - begin
        print_row(f"mmd_gan_repulsive, digits: start to {what}, CPU", "", f"{seconds:.2f} s", seconds, goal)


def measure_processes(tiny: bool, folder: str) -> None:
    """Updates on digits by one process and by two under gloo, of one thread each, wall clock.

    A short run is taken from a long one, so that the start is in neither. What two processes take beyond
    half of one's time is communication, and waiting for the slower one. Needs two free cores.
    """
    short, long = (1, 2) if tiny else (5, 85)
    options = (
        f"--batch-size 128 --eval-every 0 --sample-every 0 --save-every 0 --device cpu --runs-dir {folder}"
    )
    seconds = {}
    for processes in (1, 2):
        walls = []
        for steps in (short, long):
            launch = f"-m torch.distributed.run --nproc-per-node {processes}"
            begin = time.perf_counter()
            run_command(f"{launch} mmd_gan_repulsive.py --total-steps {steps} {options}")
            walls.append(time.perf_counter() - begin)
        seconds[processes] = (walls[1] - walls[0]) / (long - short)
    efficiency = seconds[1] / 2 / seconds[2]
    times = f"{1e3 * seconds[1]:.4g} / {1e3 * seconds[2]:.4g} ms"
    what = "mmd_gan_repulsive, digits, batch 128: half of one process / two under gloo, wall"
    print_row(what, times, f"{efficiency:.2f}", efficiency, ">= 0.5")


# --- steps -----------------------------------------------------------------------------------------


class Enough(Exception):
    """Ends a training that has made all the steps that were asked for."""


class Training(threading.Thread):
    """A script's train, which makes one step each time that it is asked to: whatever it does between.

    It trains on noise (count, c, side, side), or, without a shape, on its data set. One thread at a time
    works, so the CPU time of the process is that of the step.
    """

    def __init__(self, script: str, folder: str, shape: tuple[int, ...] | None = None, **settings) -> None:
        super().__init__(daemon=True)
        self.module = import_module(script)
        self.noise = None
        if shape is not None:
            rng = np.random.default_rng(0)
            self.noise = torch.from_numpy(rng.integers(0, 256, (256, *shape), dtype=np.uint8))
            settings |= {"image_size": shape[-1]}
        self.args = self.module.Args(total_steps=10**6, eval_every=0, runs_dir=folder, **settings)
        self.asked, self.done = queue.Queue(), queue.Queue()

    def __enter__(self) -> "Training":
        self.patches = contextlib.ExitStack()
        self.patches.enter_context(mock.patch.object(run, "stop_asked", stop_asked))
        if self.noise is not None:
            self.patches.enter_context(mock.patch.object(datasets, "load_images", return_value=self.noise))
        quiet = io.StringIO()
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            self.start()
            try:
                self.wait()  # for the first step, which makes what is made once
            except RuntimeError:
                self.patches.close()
                raise
        return self

    def __exit__(self, *_) -> None:
        self.asked.put(False)
        self.join()
        self.patches.close()

    def run(self) -> None:
        torch.set_num_threads(1)
        try:
            self.module.train(self.args)
        except Enough:
            return
        except Exception as error:  # for the thread that waits
            self.failure = error
            self.done.put(False)

    def wait(self) -> None:
        if not self.done.get():
            raise RuntimeError(f"{self.module.__name__}.py did not train") from self.failure

    def step(self) -> None:
        self.asked.put(True)
        self.wait()


def stop_asked(step: int) -> bool:
    """Stand in for run.stop_asked, which train calls at the end of every step: wait to be asked on."""
    training = threading.current_thread()
    training.done.put(True)
    if not training.asked.get():
        raise Enough
    return False


def authors_mmd_gan(shape: tuple[int, ...], width: int, code: int, batch: int) -> Callable:
    """Return what makes five critic updates and one of the generator, as the code of Li et al. does."""

    def initialise(layer: nn.Module) -> None:
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            layer.weight.data.normal_(0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d):
            layer.weight.data.normal_(1, 0.02)

    def encoder() -> nn.Sequential:
        layers = [nn.Conv2d(shape[0], width, 4, 2, 1, bias=False), nn.LeakyReLU(0.2, inplace=True)]
        side, c = shape[1] // 2, width
        while side > 4:
            layers += [nn.Conv2d(c, 2 * c, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * c)]
            layers += [nn.LeakyReLU(0.2, inplace=True)]
            side, c = side // 2, 2 * c
        return nn.Sequential(*layers, nn.Conv2d(c, code, 4, 1, 0, bias=False))

    def decoder() -> nn.Sequential:
        c = width * shape[1] // 8
        layers = [nn.ConvTranspose2d(code, c, 4, 1, 0, bias=False), nn.BatchNorm2d(c), nn.ReLU(True)]
        while c > width:
            layers += [
                nn.ConvTranspose2d(c, c // 2, 4, 2, 1, bias=False),
                nn.BatchNorm2d(c // 2),
                nn.ReLU(True),
            ]
            c = c // 2
        return nn.Sequential(*layers, nn.ConvTranspose2d(c, shape[0], 4, 2, 1, bias=False), nn.Tanh())

    generator, critic = decoder().apply(initialise), nn.ModuleList([encoder(), decoder()]).apply(initialise)
    g_optimizer = torch.optim.RMSprop(generator.parameters(), 5e-5)
    c_optimizer = torch.optim.RMSprop(critic.parameters(), 5e-5)
    batches = torch.rand(4, batch, *shape) * 2 - 1

    def pass_critic(x: Tensor) -> tuple[Tensor, Tensor]:
        feat = critic[0](x)
        return feat.view(len(x), -1), critic[1](feat)

    def game(real_feat: Tensor, fake_feat: Tensor) -> Tensor:
        mmd2 = F.relu(kernels.mmd2(*plain_gram(real_feat, fake_feat, BANDWIDTHS), "biased"))
        hinge = -F.relu(fake_feat.mean(0) - real_feat.mean(0)).mean()
        return torch.sqrt(mmd2) + 16 * hinge

    def step() -> None:
        critic.requires_grad_(True)
        for i in range(5):
            for parameter in critic[0].parameters():
                parameter.data.clamp_(-0.01, 0.01)
            real = batches[i % 4]
            critic.zero_grad()
            real_feat, real_again = pass_critic(real)
            with torch.no_grad():
                fake = generator(torch.randn(batch, code, 1, 1))
            fake_feat, fake_again = pass_critic(fake)
            errors = (real - real_again).square().mean() + (fake - fake_again).square().mean()
            (8 * errors - game(real_feat, fake_feat)).backward()
            c_optimizer.step()
        critic.requires_grad_(False)
        generator.zero_grad()
        real_feat, _ = pass_critic(batches[-1])
        fake_feat, _ = pass_critic(generator(torch.randn(batch, code, 1, 1)))
        game(real_feat, fake_feat).backward()
        g_optimizer.step()

    return step


def plain_repulsive(shape: tuple[int, ...], width: int, batch: int) -> Callable:
    """Return what makes one simultaneous update with the repulsive loss, of PyTorch's parts alone."""
    script = import_module("mmd_gan_repulsive")
    generator = script.Generator(shape, 128, width)
    critic = script.Critic(shape, 16, width, None, "none")
    for layer in critic.layers:
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            nn.utils.parametrizations.spectral_norm(layer)
    g_optimizer = torch.optim.Adam(generator.parameters(), 2e-4, (0.5, 0.999))
    c_optimizer = torch.optim.Adam(critic.parameters(), 5e-4, (0.5, 0.999))
    batches = torch.rand(4, batch, *shape) * 2 - 1
    c_parameters, g_parameters = list(critic.parameters()), list(generator.parameters())

    def step() -> None:
        real, fake = batches[0], generator(torch.randn(batch, 128))
        k_xx, k_xy, k_yy = plain_gram(critic(real), critic(fake), (1.0,))
        mean_xx, mean_xy, mean_yy = (kernels.off_diagonal_mean(k) for k in (k_xx, k_xy, k_yy))
        c_loss, g_loss = mean_xx - mean_yy, mean_xx - 2 * mean_xy + mean_yy
        c_grads = torch.autograd.grad(c_loss, c_parameters, retain_graph=True)
        g_grads = torch.autograd.grad(g_loss, g_parameters)
        for parameter, grad in zip(c_parameters + g_parameters, c_grads + g_grads):
            parameter.grad = grad
        c_optimizer.step()
        g_optimizer.step()

    return step


def measure_peers(rounds: int, tiny: bool, folder: str) -> None:
    """Whole steps beside their peers', on noise of the papers' sizes with the papers' networks."""
    width = 4 if tiny else 64
    for shape, code, batch in (((1, 32, 32), 10, 64), ((3, 32, 32), 128, 64), ((3, 64, 64), 64, 32)):
        batch = 2 if tiny else batch
        settings = dict(batch_size=batch, width=width, feature_dim=code, latent_dim=code)
        settings |= dict(n_critic=5, warmup_critic=5, clip=0.01)
        theirs = authors_mmd_gan(shape, width, code, batch)
        with Training("mmd_gan", folder, shape, **settings) as ours:
            seconds = in_turns({"theirs": theirs, "ours": ours.step}, rounds)
        what = f"mmd_gan, {'x'.join(map(str, shape))}, batch {batch}: step, the authors' / ours"
        print_ratio(what, seconds["theirs"], seconds["ours"], ">= 1.1")
    batch, shape = 2 if tiny else 64, (3, 32, 32)
    theirs = plain_repulsive(shape, width, batch)
    settings = dict(batch_size=batch, width=width, feature_dim=16, latent_dim=128)
    with Training("mmd_gan_repulsive", folder, shape, **settings) as ours:
        seconds = in_turns({"theirs": theirs, "ours": ours.step}, rounds)
    what = f"mmd_gan_repulsive, 3x32x32, batch {batch}: step, simultaneous / ours"
    print_ratio(what, seconds["theirs"], seconds["ours"], ">= 1.15")


def measure_bf16(rounds: int, tiny: bool, folder: str) -> None:
    """Steps of mmd_gan_repulsive.py with the paper's networks for CIFAR-10, on noise of that size."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("| step, fp32 / bf16 | this CPU has no bf16 | | >= 1.4 | |")
        return
    batch = 2 if tiny else 32
    settings = dict(shape=(3, 32, 32), batch_size=batch, width=8 if tiny else 64)
    with (
        Training("mmd_gan_repulsive", folder, **settings) as fp32,
        Training("mmd_gan_repulsive", folder, **settings, precision="bf16") as bf16,
    ):
        seconds = in_turns({"fp32": fp32.step, "bf16": bf16.step}, rounds)
    what = f"mmd_gan_repulsive, CIFAR-10, batch {batch}: step, fp32 / bf16"
    print_ratio(what, seconds["fp32"], seconds["bf16"], ">= 1.4")


def measure_steps(tiny: bool, folder: str) -> None:
    for script in SCRIPTS:
        with Training(script, folder) as training:
            seconds = in_turns({"step": training.step}, 2 if tiny else 8)["step"]
        print(f"| {script}, digits: a step | {1e3 * np.median(seconds):.1f} ms | | | |")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    rounds = 1 if args.tiny else args.rounds
    few = max(1, rounds // 3)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, torch {torch.__version__}\n")
    print("| what | times | ratio | goal | met |\n|---|---|---|---|---|")
    measure_mmd(rounds, args.tiny)
    measure_data(rounds, args.tiny)
    measure_evaluation(args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        measure_pixels(args.tiny, folder)
        measure_conversion(args.tiny, folder)
        measure_peers(few, args.tiny, folder)
        measure_bf16(few, args.tiny, folder)
        measure_steps(args.tiny, folder)
        measure_start(folder)
        measure_processes(args.tiny, folder)
    measure_growth(args)


if __name__ == "__main__":
    main(tyro.cli(Args))
