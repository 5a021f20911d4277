"""How fast the parts are beside their goals: python -m reproduce.speed, about a minute on 2 free cores.

Every time is CPU time of one thread, so that other work on the machine counts little; what is compared runs
in turns, in one process, and a ratio is the median over the rounds, with the 10 and 90 % quantiles. Bytes
and operations are exact, and tests hold them to their goals; no test looks at a time.

Plain: autograd through the Gram matrix of all samples together, one exponential per bandwidth, as most
published code has it. Bare: the products of matrices that the same tiles cannot do without, and one exp.
"""

import contextlib
import io
import os
import platform
import tempfile
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from itertools import combinations_with_replacement
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torchvision
import tyro
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torchvision.transforms import v2

from common import datasets, kernels, run

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

    rounds: int = 9  # times that each side of a comparison runs
    tiny: bool = False  # sizes at which nothing is worth knowing, to see that it runs


# --- measuring -------------------------------------------------------------------------------------


def in_turns(sides: dict[str, Callable], rounds: int) -> dict[str, np.ndarray]:
    """Return seconds of CPU (rounds,) of each side; every other round goes backwards, one is dropped."""
    seconds = {name: [] for name in sides}
    for i in range(rounds + 1):
        for name in list(sides) if i % 2 else reversed(sides):
            start = time.thread_time()
            sides[name]()
            seconds[name].append(time.thread_time() - start)
    return {name: np.array(s[1:]) for name, s in seconds.items()}


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


def plain_mmd2(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased MMD^2 of a sum of Gaussians, by autograd through one Gram matrix of x and y."""
    z = torch.cat([x, y])
    products = z @ z.T
    sq = products.diagonal()
    d2 = sq[:, None] - 2 * products + sq[None]
    k = sum(torch.exp(-0.5 / s**2 * d2) for s in BANDWIDTHS)
    n = len(x)
    return kernels.mmd2(k[:n, :n], k[:n, n:], k[n:, n:], "unbiased")


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
    rows = [
        slice(i, min(i + kernels.TILE, e)) for i, e in ((0, n), (n, 2 * n)) for i in range(i, e, kernels.TILE)
    ]

    def call() -> None:
        hz = torch.zeros_like(z)
        for a, b in combinations_with_replacement(rows, 2):
            h = torch.exp(-(z[a] @ z[b].T).abs_())
            for i, j, h_ij in [(a, b, h), (b, a, h.T)][: 1 if a is b else 2]:
                if both or i.start >= n:
                    hz[i].addmm_(h_ij, z[j])

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
        (64, 16, True, 20, ">= 1.6"), (256, 10, True, 3, ">= 2.8"),
        (1000, 784, True, 1, ">= 2.0"), (1000, 784, False, 1, ">= 3.0"),
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
    loader = torch.utils.data.DataLoader(theirs, 64, shuffle=True, drop_last=True)
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    ours = datasets.Images("noise", (3, 32, 32), 64, 1, 0, 1, images.device, images, (-1.0, 1.0))
    sides = {
        "theirs": lambda: sum(1 for _ in loader),
        "ours": lambda: [ours.batch(i) for i in range(n // 64)],
    }
    seconds = in_turns(sides, rounds)
    print_ratio(f"{n} images: DataLoader / uint8 batches", seconds["theirs"], seconds["ours"], ">= 10")


# --- steps -----------------------------------------------------------------------------------------


class Enough(Exception):
    pass


def step_seconds(script: str, n: int, runs_dir: str, **settings) -> np.ndarray:
    """Return seconds (n,) of CPU of a script's steps, the first left out: whatever its train does between."""
    module, moments = import_module(script), []

    def stop_asked(step: int) -> bool:  # which train calls at the end of every step
        moments.append(time.thread_time())
        if len(moments) > n + 1:
            raise Enough
        return False

    args = module.Args(total_steps=n + 10, eval_every=0, runs_dir=runs_dir, **settings)
    quiet = contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO())
    with mock.patch.object(run, "stop_asked", stop_asked), quiet[0], quiet[1], contextlib.suppress(Enough):
        module.train(args)
    return np.diff(moments)[-n:]


def measure_bf16(rounds: int, tiny: bool, folder: str) -> None:
    """Steps of mmd_gan_repulsive.py with the paper's networks for CIFAR-10, on noise of that size."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        print("| step, fp32 / bf16 | this CPU has no bf16 | | >= 1.4 | |")
        return
    batch, rng = 2 if tiny else 32, np.random.default_rng(0)
    for i in range(batch):
        Path(folder, "images").mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(f"{folder}/images/{i}.png")
    settings = {"dataset": f"folder:{folder}/images", "image_size": 32, "batch_size": batch}
    settings |= {"width": 8} if tiny else {}
    n, seconds = 1 if tiny else 2, {"fp32": [], "bf16": []}
    for i in range(rounds):
        for precision in list(seconds) if i % 2 else reversed(seconds):
            times = step_seconds("mmd_gan_repulsive", n, folder, precision=precision, **settings)
            seconds[precision].append(np.median(times))
    fp32, bf16 = map(np.array, seconds.values())
    print_ratio(f"mmd_gan_repulsive, CIFAR-10, batch {batch}: step, fp32 / bf16", fp32, bf16, ">= 1.4")


def measure_steps(tiny: bool, folder: str) -> None:
    for script in SCRIPTS:
        seconds = step_seconds(script, 2 if tiny else 8, folder)
        print(f"| {script}, digits: a step | {1e3 * np.median(seconds):.1f} ms | | | |")


def main(args: Args) -> None:
    torch.set_num_threads(1)
    rounds = 1 if args.tiny else args.rounds
    machine = f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"
    print(f"{machine}, torch {torch.__version__}\n")
    print("| what | times | ratio | goal | met |\n|---|---|---|---|---|")
    measure_mmd(rounds, args.tiny)
    measure_data(rounds, args.tiny)
    with tempfile.TemporaryDirectory() as folder:
        measure_bf16(max(1, rounds // 3), args.tiny, folder)
        measure_steps(args.tiny, folder)


if __name__ == "__main__":
    main(tyro.cli(Args))
