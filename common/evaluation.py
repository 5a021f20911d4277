"""How good are the samples? FID, IS, KID, precision and recall of images; coverage and a common MMD of toys.

    python -m common.evaluation REAL FAKE [--features pixels] [--ms-ssim] [--json FILE]

compares two folders of images, .npy or .npz arrays, or data sets (cifar10, cifar10:test). On the published
Inception weights the Frechet distance is called fid; on pixels or on other weights it is named for what it
is. Statistics are computed in float64.
"""

import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from filelock import FileLock
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from common import datasets, kernels, run
from common.run import BadInput, Stream, mix, require

INCEPTION = "weights-inception-2015-12-05-6726825d.pth"  # the sha256 of the file begins with 6726825d
INCEPTION_URL = f"https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/{INCEPTION}"
CHUNK = 256  # samples generated at a time, by one process
TOY_SAMPLES = 2000
KEPT = 2048  # features of either side that an evaluation leaves behind


class Evaluator:
    """Compares samples with a reference; the network that it needs is found, or refused, when it is made.

    Several processes share the work: all must call set_reference and metrics, and get the same.

    count: how many samples are evaluated. protocol: what the numbers are, to be stored beside them.
    features: on the first process, those of at most KEPT real images and of as many samples, (n, d) each, of
    the evaluation that was last; toys and --eval-metrics fid leave none.
    """

    def __init__(self, args) -> None:
        """Of args dataset, device, data_dir, ms_ssim, inception_weights and all of eval_... are read.

        BadInput: Inception weights that cannot be had; what a toy has not.
        """
        self.args, self.extractor, self.weights = args, pixels, None
        self.device, self.rank, self.world_size = run.start(args.device)  # that of the run, if it has begun
        toy = args.dataset in datasets.TOYS
        require(not (args.ms_ssim and toy), "--ms-ssim", "on", "off for a data set of points")
        require(not (args.eval_metrics == "fid" and toy), "--eval-metrics", "fid", "all: points have no FID")
        require(toy or args.eval_samples >= 10, "--eval-samples", args.eval_samples, "at least 10")
        if args.eval_features == "inception" and not toy:
            self.extractor, self.weights = load_inception(args.inception_weights, self.device)
        self.only_fid, extractor = args.eval_metrics == "fid", self.extractor
        if self.only_fid:
            self.extractor = lambda images: extractor(images)[:1]  # without logits

    def set_reference(self, data: datasets.Batches) -> None:
        """Take the images of data, or of another split if args say so, for the real ones.

        BadInput: no such split, too few images.
        """
        args, self.data = self.args, data
        if data.name in datasets.TOYS:
            self.count = TOY_SAMPLES
            self.protocol = {"samples": self.count, "mmd": "rbf, unbiased, data space"}
            return
        images = data.images
        if args.eval_split != data.split:
            images = datasets.load_images(data.name, args.data_dir, data.shape[-1], args.eval_split)
        self.count = n = min(args.eval_samples, len(images))
        require(n >= 10, f"the number of images of {data.name}", n, "at least 10")
        features = "pixels in [0, 1], larger images averaged down to 32 x 32"
        others = {"mmd": "rbf, unbiased"}
        if self.weights:
            features = f"torch-fidelity inception-v3-compat, 2048, float32, weights {self.weights}"
            others = {"is": "10 splits", "precision, recall": "k = 3"}
        self.protocol = {"samples": n, "reference": f"{n} of {args.eval_split}", "features": features}
        if not self.only_fid:
            kid = "unbiased, cubic kernel, mean of 100 subsets of min(1000, n / 2); kid_se: jackknife"
            self.protocol |= {"kid": kid} | others
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
        chunks, path = order[:n].split(CHUNK), None
        if self.weights and self.rank == 0:  # a hash of all that the statistics depend on, images included
            key = hashlib.sha256(repr((self.protocol, data.shape, self.device.type)).encode())
            for chunk in chunks:
                key.update(images[chunk].cpu().contiguous().numpy())
            name = f"{data.name.split(':')[0]}-{args.eval_split}-{n}-{key.hexdigest()[:16]}.npz"
            path = Path(args.data_dir, "evaluation", name)
        self.reference = read_reference(path) if path else None  # used by the first process alone
        if not from_first(lambda: self.reference is not None):
            statistics, kept = self.look_at(lambda i: images[chunks[i]], self.extractor)
            if self.rank == 0:
                self.reference = statistics.result() | ({} if self.only_fid else {"features": kept[0]})
            if path:
                write_reference(path, self.reference)
        if args.ms_ssim:
            self.protocol |= {"ms_ssim": "pairs of samples, 256 x 256, 5 scales"}

    @torch.no_grad()
    def look_at(self, chunk: Callable, *extractors: Callable) -> tuple["Statistics", list[Tensor]]:
        """Return, to the first process, what extractors make of images: the statistics of their features, and
        all their outputs, each (count, d) float32 on the CPU; of features that serve FID alone none is kept.

        chunk: of i, images i * CHUNK to (i + 1) * CHUNK, uint8; process r of N asks for every N-th from r on.
        extractors: each returns a tuple of tensors (n, d) for at most 64 images; features come first.
        """
        statistics, kept, last = Statistics(), [], (self.count - 1) // CHUNK
        quiet = None if self.rank == 0 else True
        for start in tqdm(range(0, last + 1, self.world_size), "evaluating", leave=False, disable=quiet):
            i = min(start + self.rank, last)  # who has none left repeats the last, and it is cut off below
            images = chunk(i)[: self.count - i * CHUNK].to(self.device)
            outputs = ([part for e in extractors for part in e(batch)] for batch in images.split(64))
            outputs = [torch.cat(parts) for parts in zip(*outputs)]
            padded = (F.pad(output, (0, 0, 0, CHUNK - len(output))) for output in outputs)
            outputs = [kernels.gather(output).cpu()[: self.count - start * CHUNK] for output in padded]
            if self.rank == 0:
                for part in outputs[0].split(CHUNK):
                    statistics.add(part)
                kept.append(outputs[1:] if self.only_fid else outputs)
        return statistics, [torch.cat(parts) for parts in zip(*kept)]

    def samples(self, sample: Callable[[int, int], Tensor]) -> Iterable[Tensor]:
        """Yield what is evaluated, drawn CHUNK at a time, then cut: batch statistics want a batch."""
        for i, start in enumerate(range(0, self.count, CHUNK)):
            yield sample(CHUNK, i)[: self.count - start]

    def save(self, path: Path, sample: Callable[[int, int], Tensor]) -> None:
        """Write the samples that are evaluated as the array samples of an .npz file; images as uint8."""
        if self.rank > 0:
            return
        images = len(self.data.shape) == 3
        to_file = (lambda x: datasets.to_uint8(x, self.data.value_range)) if images else (lambda x: x)
        np.savez(path, samples=torch.cat([to_file(x).cpu() for x in self.samples(sample)]).numpy())

    def metrics(self, sample: Callable[[int, int], Tensor]) -> dict[str, float]:
        """Return the metrics of samples: sample(n, i) is chunk i, (n, ...), in the data's value range."""
        if self.data.name in datasets.TOYS:
            return toy_metrics(self.data.name, torch.cat([*self.samples(sample)]).cpu())
        extractors = (self.extractor, ms_ssim) if self.args.ms_ssim else (self.extractor,)
        value_range = self.data.value_range
        found = self.look_at(lambda i: datasets.to_uint8(sample(CHUNK, i), value_range), *extractors)
        return from_first(lambda: self.compare(*found))

    def compare(self, statistics: "Statistics", outputs: list[Tensor]) -> dict[str, float]:
        """Return the metrics, given what look_at returned of the samples."""
        ms_ssim = {"ms_ssim": outputs.pop().nanmean().item()} if self.args.ms_ssim else {}
        values = {"fid": frechet_distance(self.reference, statistics.result())}
        if not self.only_fid:
            real, (fake, *logits) = self.reference["features"], outputs
            self.features = real[:KEPT], fake[:KEPT]
            values["kid"], values["kid_se"] = kernel_distance(real, fake)
            if logits:
                values |= inception_metrics(logits[0], fake.to(self.device), real.to(self.device))
            else:
                x, y = real[:TOY_SAMPLES].double(), fake[:TOY_SAMPLES].double()
                values["mmd"] = common_mmd2(x, y, x[:1000])
        if self.weights is None or self.weights not in INCEPTION_URL:
            before, after = ("", f"[{self.weights}]") if self.weights else ("pixel_", "")
            values = {before + name.replace("fid", "frechet") + after: v for name, v in values.items()}
        return values | ms_ssim


def from_first(compute: Callable[[], object]):
    """Return, on every process, what compute() returns on the first."""
    if not run.several():
        return compute()
    result = [compute() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(result)
    return result[0]


# --- images --------------------------------------------------------------------------------------


def pixels(images: Tensor) -> tuple[Tensor]:
    """Return uint8 images as features (n, c * h * w) in [0, 1]; larger ones as means, of 32 x 32 areas.

    The Frechet distance of d features takes d^3 operations: minutes already for 3 x 64 x 64.
    """
    sides = [min(32, side) for side in images.shape[2:]]
    return (F.adaptive_avg_pool2d(images.float() / 255, sides).flatten(1),)


class Statistics:
    """Mean and covariance, in float64, of features of which no more are kept than they have dimensions."""

    def __init__(self) -> None:
        self.n, self.kept = 0, []

    def add(self, features: Tensor) -> None:
        """Take in features (n, d)."""
        self.kept.append(features)
        if sum(map(len, self.kept)) > features.shape[1]:
            self.fold()

    def fold(self) -> None:
        """Put what is kept into the running mean and sums of products (Chan et al. 1979)."""
        x, self.kept = torch.cat(self.kept).double(), []
        if self.n == 0:
            self.mean, self.products = x.new_zeros(x.shape[1]), x.new_zeros(x.shape[1], x.shape[1])
        mean, n = x.mean(0), self.n + len(x)
        shift, x = mean - self.mean, x.sub_(mean).numpy()
        self.products += torch.from_numpy(x.T @ x)  # of which NumPy, as it is symmetric, computes half
        self.products.addr_(shift, shift, alpha=self.n * len(x) / n)
        self.mean, self.n = self.mean + shift * (len(x) / n), n

    def result(self) -> dict[str, Tensor]:
        """Return mean (d,) and unbiased covariance (d, d), or, of n <= d features, its root (n, d)."""
        if self.n == 0:
            x = torch.cat(self.kept).double()
            return {"mean": x.mean(0), "root": (x - x.mean(0)) / math.sqrt(len(x) - 1)}
        if self.kept:
            self.fold()
        return {"mean": self.mean, "covariance": self.products / (self.n - 1)}


def frechet_distance(x: dict[str, Tensor], y: dict[str, Tensor]) -> float:
    """Return the Frechet distance of two Gaussians, given as Statistics.result gives them.

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)). With C_x = A^T A the trace of the root is the sum
    of the roots of the eigenvalues of the symmetric A C_y A^T; with C_y = B^T B, of the singular values of
    A B^T. A is the root of few samples, Cholesky's factor or, where C_x is singular (constant pixels),
    w^(1/2) V^T from C_x = V w V^T.
    """
    if "root" not in x:
        x, y = y, x  # the distance is symmetric
    root = x["root"] if "root" in x else matrix_root(x["covariance"])
    if "root" in y:
        trace_y = y["root"].square().sum()
        trace_of_root = torch.linalg.svdvals(root @ y["root"].T).sum()
    else:
        trace_y = y["covariance"].trace()
        squares = torch.linalg.eigvalsh(root @ y["covariance"] @ root.T)
        trace_of_root = squares.clamp_min(0).sqrt().sum()
    means = (x["mean"] - y["mean"]).square().sum()
    return (means + root.square().sum() + trace_y - 2 * trace_of_root).item()


def matrix_root(covariance: Tensor) -> Tensor:
    """Return some A (d, d) with A^T A = covariance (d, d)."""
    lower, singular = torch.linalg.cholesky_ex(covariance)
    if not singular:
        return lower.T
    w, v = torch.linalg.eigh(covariance)
    return w.clamp_min(0).sqrt()[:, None] * v.T


def cubic_kernel(x: Tensor, y: Tensor) -> Tensor:
    """Return KID's (<x, y> / d + 1)^3, (n, m), of features (n, d) and (m, d)."""
    return (x @ y.T / x.shape[1] + 1) ** 3


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """Return KID, the unbiased MMD^2 with cubic_kernel, and its standard error.

    KID is the mean over random subsets. The error is the delete-d jackknife's, which scales their spread by
    size / (n - size) for what sampling n images does, plus 1 / subsets for what drawing subsets does.

    x, y: features (n, d) and (m, d), of which each subset has min(size, n / 2, m / 2), drawn without
    replacement.
    """
    generator, n, d = torch.Generator().manual_seed(0), min(len(x), len(y)), x.shape[1]
    size, of_x, of_y = min(size, n // 2), [], []
    for _ in range(subsets):
        of_x.append(torch.randperm(len(x), generator=generator)[:size])
        of_y.append(torch.randperm(len(y), generator=generator)[:size])
    # <x, y> + d = <x - c, y - c> + x_term + y_term. The first is small, and the rounding errors of its
    # float32 products average out; all else is float64.
    centre = x.mean(0)
    c = centre.double()
    x_term, y_term = (
        torch.cat([rows.double() @ c for rows in z.split(256)]) + (d - c @ c) / 2 for z in (x, y)
    )
    if max(len(x), len(y)) <= subsets**0.5 * size:  # all pairs are no more than those of the subsets
        everything = torch.ones(len(x), dtype=torch.bool), torch.ones(len(y), dtype=torch.bool)
        in_x = torch.zeros(len(x), subsets, dtype=torch.float64).scatter_(0, torch.stack(of_x, 1), 1)
        in_y = torch.zeros(len(y), subsets, dtype=torch.float64).scatter_(0, torch.stack(of_y, 1), 1)
        groups = [(*everything, in_x, in_y)]
    else:
        whole = torch.ones(size, 1, dtype=torch.float64)
        groups = [(i, j, whole, whole) for i, j in zip(of_x, of_y)]
    values = []
    for i, j, in_x, in_y in groups:
        real, fake = (x[i] - centre, x_term[i], in_x), (y[j] - centre, y_term[j], in_y)
        within = cube_sums(real, real) + cube_sums(fake, fake)
        values.append(within / (size * (size - 1)) - 2 * cube_sums(real, fake) / size**2)
    values = torch.cat(values) / d**3
    return values.mean().item(), values.std().item() * (size / (n - size) + 1 / subsets) ** 0.5


def cube_sums(x: tuple[Tensor, Tensor, Tensor], y: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    """Return sum_ij (<x_i, y_j> + x_term_i + y_term_j)^3, for each subset over its pairs, (subsets,) float64.

    x, y: points (n, d), terms (n,), and in which subsets each point is, (n, subsets) of 0 and 1. If y is x,
    the sums are over i != j.
    """
    (x, x_term, in_x), (y, y_term, in_y), same = x, y, y is x
    sums = torch.zeros(in_x.shape[1], dtype=torch.float64)
    for rows in slices(len(x), 1000):
        for columns in slices(len(y), 1000):
            diagonal = same and rows == columns
            if same and columns.start < rows.start:
                continue  # its mirror image counts twice
            if diagonal:
                matrix = x[rows].numpy()
                products = torch.from_numpy(matrix @ matrix.T)  # of which NumPy computes half
            else:
                products = x[rows] @ y[columns].T
            for part in slices(len(products), 32):  # as much as stays in a cache
                k = products[part].double().add_(x_term[rows][part, None]).add_(y_term[columns])
                k = (k * k).mul_(k)
                if diagonal:
                    k[:, part].fill_diagonal_(0)
                part_sums = ((k @ in_y[columns]) * in_x[rows][part]).sum(0)
                sums += part_sums if diagonal or not same else 2 * part_sums
    return sums


def slices(n: int, size: int) -> list[slice]:
    """Return 0 to n in parts of size and a rest."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def ms_ssim(images: Tensor) -> tuple[Tensor]:
    """Return the MS-SSIM (n, 1) of images (n, c, h, w) uint8 in pairs: high where samples are alike.

    As Wang et al. 2019, resized to 256 x 256. Images i and i + n / 2 are a pair, whose value stands at both;
    an odd last one has NaN.
    """
    half = len(images) // 2
    values = torch.full((len(images), 1), math.nan, device=images.device)
    if half > 0:
        x, y = resize_from_corner(images[: 2 * half].float(), 256).split(half)
        values[: 2 * half, 0] = multiscale_ssim(x, y).repeat(2)
    return (values,)


def resize_from_corner(images: Tensor, size: int) -> Tensor:
    """Resize images (n, c, h, w) bilinearly as TensorFlow 1 does: pixel i is what is at i * side / size."""

    def weights(side: int) -> Tensor:
        position = torch.arange(size, device=images.device) * (side / size)
        below = position.long()
        above = (below + 1).clamp_max(side - 1)
        fraction = (position - below)[:, None]
        return F.one_hot(below, side) * (1 - fraction) + F.one_hot(above, side) * fraction  # (size, side)

    return weights(images.shape[2]) @ images @ weights(images.shape[3]).T


def multiscale_ssim(x: Tensor, y: Tensor) -> Tensor:
    """Return the MS-SSIM (n,) of images x and y (n, c, h, w) in [0, 255], as tf.image.ssim_multiscale does.

    The contrast of four scales and the SSIM of the fifth, to Wang et al. 2003's powers, multiplied; of each
    channel, then averaged. Sides must be at least 176 and divisible by 16.
    """
    product = 1.0
    for power in (0.0448, 0.2856, 0.3001, 0.2363):
        _, contrast = ssim(x, y)
        product = product * contrast.relu() ** power
        x, y = F.avg_pool2d(x, 2), F.avg_pool2d(y, 2)
    coarsest, _ = ssim(x, y)
    return (product * coarsest.relu() ** 0.1333).mean(1)


def ssim(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return SSIM and its factor of contrast and structure, both (n, c), of x and y (n, c, h, w) in [0, 255].

    Means over all places of a Gaussian window, 11 x 11 with sigma 1.5, that lies within the image.
    """
    distance = torch.arange(-5.0, 6.0, device=x.device)
    window = torch.softmax(-distance.square() / (2 * 1.5**2), 0).to(x.dtype)

    def local_mean(z: Tensor) -> Tensor:
        rows = F.conv2d(z.flatten(0, 1)[:, None], window[None, None, :, None])
        return F.conv2d(rows, window[None, None, None, :]).view(*z.shape[:2], -1)

    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    mean_x, mean_y = local_mean(x), local_mean(y)
    covariance = local_mean(x * y) - mean_x * mean_y
    variances = local_mean(x * x + y * y) - mean_x**2 - mean_y**2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    contrast = (2 * covariance + c2) / (variances + c2)
    return (luminance * contrast).mean(2), contrast.mean(2)


def inception_metrics(logits: Tensor, fake: Tensor, real: Tensor) -> dict[str, float]:
    """Return torch-fidelity's IS of logits (n, classes), precision and recall of features (n, d), (m, d)."""
    from torch_fidelity.metric_isc import isc_features_to_metric as inception_score
    from torch_fidelity.metric_prc import calculate_precision_recall_part as precision_recall

    values = {}
    values["is"], values["is_std"] = inception_score(logits, 10, shuffle=False).values()
    values["is_all"], _ = inception_score(logits, 1, shuffle=False).values()
    values["precision"], values["recall"] = precision_recall(fake, real, neighborhood=3, batch_size=1000)
    return values


def load_inception(path: str | None, device: torch.device) -> tuple[Callable, str]:
    """Return torch-fidelity's Inception and the first 8 digits of the sha256 of its weights.

    It takes uint8 images (n, c, h, w), grey ones too, and returns features (n, 2048) and logits (n, 1008).
    path: a weights file; None takes torch.hub's copy, downloading it where there is none. BadInput: it cannot
    be had, or does not hold these weights.
    """
    from torch_fidelity.utils import create_feature_extractor

    file = Path(path or Path(torch.hub.get_dir(), "checkpoints", INCEPTION))
    try:
        if path is None and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, file, "6726825d")
        weights = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        torch.load(file, map_location="cpu", weights_only=True)  # the library would run what is in it
        options = dict(feature_extractor_weights_path=str(file), cuda=device.type == "cuda", verbose=False)
        network = create_feature_extractor("inception-v3-compat", ["2048", "logits_unbiased"], **options)
    except Exception as error:
        remedy = f"put the file of {INCEPTION_URL} there, or use --eval-features pixels"
        problem = f"is missing or damaged ({str(error) or repr(error):.90}); {remedy}"
        raise BadInput(f"--inception-weights {file} {problem}") from error
    if weights not in INCEPTION_URL and os.environ.get("RANK", "0") == "0":
        print(f"warning: {file} is not the published Inception: its distances are no FID and no KID")
    network.to(memory_format=torch.channels_last)  # on a CPU, too, half as fast again
    return lambda images: network(images.expand(-1, 3, -1, -1)), weights


def read_reference(path: Path) -> dict[str, Tensor] | None:
    """Return what write_reference wrote, or None: nothing is there, or, with a warning, it is damaged."""
    try:
        with np.load(path, allow_pickle=False) as arrays:  # a zip file: it has checksums
            return {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:
        print(f"warning: {path} cannot be read ({error!r:.90}): computed again")
        return None


def write_reference(path: Path, reference: dict[str, Tensor]) -> None:
    """Write a reference whole or not at all; where that cannot be, a warning says so."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_name("lock")):  # another run may have come to the same
            run.write_whole(path, lambda file: np.savez(file, **reference))
    except OSError as error:
        print(f"warning: {path} could not be written ({error}): to be computed again next time")


# --- toys and pixels -----------------------------------------------------------------------------


def common_mmd2(real: Tensor, fake: Tensor, scale: Tensor) -> float:
    """Return the unbiased MMD^2 under one kernel for all methods, so that runs can be compared.

    rbf with sigma = the median distance within scale (n, d), times 1/8, 1/4, 1/2, 1 and 2. May be negative.
    """
    median = F.pdist(scale).square().median()
    bandwidths = tuple(median.sqrt().item() * factor for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2))
    return kernels.mmd2(*kernels.shifted_gram_blocks(real, fake, "rbf", bandwidths), "unbiased").item()


def toy_metrics(name: str, fake: Tensor) -> dict[str, float]:
    """Return mmd, high_quality and modes of samples (n, d) of a toy; of the swiss roll, curve_distance too.

    high_quality: the share of samples within 3 standard deviations of the noise of a mode. modes: how many
    have at least 10 of those and a quarter of their fair share. The roll has ten: equal parts of its curve.
    """
    real = datasets.draw_toy(name, TOY_SAMPLES, mix(0, Stream.TOY_REFERENCE))
    scale = datasets.draw_toy(name, 1000, mix(0, Stream.TOY_SCALE))
    metrics = {"mmd": common_mmd2(real.double(), fake.double(), scale.double())}
    if name == "swissroll":
        centres, std = datasets.swissroll_curve(torch.linspace(0, 1, 2000)), datasets.SWISSROLL_STD
    else:
        centres, std = datasets.toy_modes(name)
        fake = fake @ datasets.rotation(name).T
    d2, nearest = kernels.squared_distances(fake / std, centres / std).min(1)
    if name == "swissroll":
        metrics["curve_distance"], nearest = d2.sqrt().mean().item() * std, nearest // 200
    good, modes = d2 <= 9, 10 if name == "swissroll" else len(centres)
    counts = torch.bincount(nearest[good], minlength=modes)
    covered = counts >= max(10, counts.sum().item() / modes / 4)
    return metrics | {"high_quality": good.float().mean().item(), "modes": covered.sum().item()}


def draw_points(path: Path, fake: Tensor, name: str) -> None:
    """Write a scatter plot of a toy's real points and of generated ones (n, d) as PNG."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(6, 6)).add_subplot(projection="3d" if fake.shape[1] == 3 else None)
    for points, label in ((datasets.draw_toy(name, len(fake), 0), "real"), (fake, "generated")):
        axes.scatter(*points.cpu().T, s=3, alpha=0.6, label=label)
    axes.legend(loc="upper right")
    axes.figure.savefig(path)


# --- command line --------------------------------------------------------------------------------


Features = Annotated[Literal["inception", "pixels"], tyro.conf.arg(aliases=["--features"])]


@dataclass
class Args:
    """Compare images: each side a folder, a data set (cifar10, cifar10:test), or an array (N, H, W, C) or
    (N, C, H, W) in an .npy or .npz file, uint8 or floats in [0, 1] or [-1, 1]."""

    real: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REAL")]  # the reference
    fake: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FAKE")]  # what is measured
    eval_features: Features = "inception"  # pixels need no weights, and give no FID
    eval_metrics: Literal["all", "fid"] = "all"  # fid: the Frechet distance alone, in bounded memory
    eval_samples: int = 50_000  # images of either side, at most
    image_size: int | None = None  # side to which folders and data sets are resized
    ms_ssim: bool = False  # of pairs of FAKE too
    json: str | None = None  # file to write metrics and protocol to
    data_dir: str = "data"  # folder of the data sets and of cached statistics
    inception_weights: str | None = None  # file of torch-fidelity's weights (None: torch.hub's copy)
    device: str = "auto"  # a torch device; auto is cuda where there is one, else cpu


def read_images(what: str, source: str, args: Args) -> Tensor:
    """Return the images of REAL or FAKE (what), uint8 (N, c, h, w)."""
    path, (name, _, split) = Path(source.removeprefix("folder:")), source.partition(":")
    try:
        if path.is_dir():
            files = datasets.find_folder(path).files
            sides = {args.image_size} if args.image_size else {n for f in files for n in Image.open(f).size}
            expected = "one side (square images), or be resized with --image-size"
            require(len(sides) == 1, "the set of its images' sides", sides, expected)
            return datasets.load_images(f"folder:{path}", args.data_dir, sides.pop(), "train")
        require(name not in datasets.TOYS, "it", "a toy", "images")
        if path.suffix not in (".npy", ".npz"):
            return datasets.load_images(name, args.data_dir, args.image_size, split or "train")
        loaded = np.load(path, allow_pickle=False)
        arrays = [loaded[name] for name in loaded.files] if path.suffix == ".npz" else [loaded]
        found = [a for a in arrays if a.ndim == 4 and a.size and {1, 3} & {a.shape[1], a.shape[3]}]
        expected = "one of (N, H, W, C) or (N, C, H, W) with C 1 or 3"
        require(len(found) == 1, "its array", [a.shape for a in arrays], expected)
        images = torch.from_numpy(found[0])
        if images.dtype != torch.uint8:
            known = images.is_floating_point() and bool((images.abs() <= 1).all())  # NaN is not
            require(known, "its type", images.dtype, "uint8, or floats in [0, 1] or [-1, 1]")
            images = datasets.to_uint8(images, (-1.0 if images.min() < 0 else 0.0, 1.0))
        return images.permute(0, 3, 1, 2) if images.shape[3] in (1, 3) else images
    except Exception as error:  # Pillow and NumPy raise what they like
        problem = str(error) or repr(error)
        raise BadInput(f"{what} {source} is no folder, array or data set to be used: {problem}") from error


def main(args: Args) -> dict[str, float]:
    """Compare, print a table, write --json; return the metrics."""
    side = args.image_size
    require(side is None or 1 <= side <= 2**14, "--image-size", side, f"between 1 and {2**14}")
    file = args.json and Path(args.json)
    ok = not file or (os.access(file.parent, os.W_OK) and not file.is_dir())
    require(ok, "--json", args.json, "a file in a folder that can be written to")
    evaluator = Evaluator(SimpleNamespace(**vars(args), eval_split="REAL", dataset="REAL"))
    real, fake = (read_images(*source, args) for source in (("REAL", args.real), ("FAKE", args.fake)))
    channels = max(real.shape[1], fake.shape[1])
    real, fake = (images.expand(-1, channels, -1, -1) for images in (real, fake))
    sizes, expected = (f"{h} x {w}" for h, w in (fake.shape[2:], real.shape[2:]))
    ok = real.shape[1:] == fake.shape[1:]
    require(ok, "FAKE", sizes, f"{expected} as REAL; --image-size resizes folders and data sets")
    count = min(args.eval_samples, len(fake))
    require(count >= 10, "the number of images of FAKE", count, "at least 10 (of a run: its samples.npz)")
    data = SimpleNamespace(name="REAL", images=real, shape=real.shape[1:], value_range=(0, 255), split="REAL")
    evaluator.set_reference(data)
    evaluator.count = count  # of FAKE may differ from that of REAL
    order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(1))[:count]
    metrics = evaluator.metrics(lambda n, i: fake[order[i * n : (i + 1) * n]])
    protocol = evaluator.protocol | {"samples": count, "real": args.real, "fake": args.fake}
    if evaluator.rank == 0:
        for name, value in metrics.items():
            print(f"{name:20} {value:.6g}")
        for name, value in protocol.items():
            print(f"{name:20} {value}")
        if file:
            file.write_text(json.dumps({"metrics": metrics, "protocol": protocol}, indent=2) + "\n")
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
        run.end()
    except BadInput as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
