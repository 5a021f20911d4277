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
from collections.abc import Callable
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

from common import datasets, exported, kernels, run
from common.run import BadInput, Failed, Stream, mix, require

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

        BadInput: a network that cannot be had; what a toy has not.
        """
        self.args, self.only_fid = args, args.eval_metrics == "fid"
        self.looks_for_copies = args.eval_only and not self.only_fid
        self.extractor, self.weights = pixels, None
        self.device, self.rank, self.world_size = run.start(args.device)  # that of the run, if it has begun
        toy = args.dataset in datasets.TOYS
        require(not (args.ms_ssim and toy), "--ms-ssim", "on", "off for a data set of points")
        require(not (self.only_fid and toy), "--eval-metrics", "fid", "all: points have no FID")
        require(toy or args.eval_samples >= 10, "--eval-samples", args.eval_samples, "at least 10")
        if args.eval_features == "inception" and not toy:
            self.extractor, self.weights = load_inception(args.inception_weights, self.device)
        elif args.eval_features not in ("inception", "pixels"):
            self.extractor, self.weights = load_network(args.eval_features, self.device)

    def set_reference(self, data: datasets.Batches, count: int | None = None) -> None:
        """Take the images of data, or of another split if args say so, for the real ones.

        count: how many samples they are compared with; None is as many as there are.
        BadInput: no such split, too few images, or images most of which are equal.
        """
        args, self.data = self.args, data
        if data.name in datasets.TOYS:
            self.count = TOY_SAMPLES
            self.protocol = {"samples": self.count, "mmd": "rbf, unbiased, data space"}
            return
        images = data.images
        if args.eval_split != data.split:
            images = datasets.load_images(data.name, args.data_dir, data.shape[-1], args.eval_split)
        n = min(args.eval_samples, len(images))
        require(n >= 10, f"the number of images of {data.name}", n, "at least 10")
        self.count = count or n
        self.protocol = {"reference": f"{n} of {args.eval_split}"}
        if args.eval_features == "inception":
            features = f"torch-fidelity inception-v3-compat, 2048, float32, weights {self.weights}"
            others = {"is": "10 splits", "precision, recall": "k = 3"}
        elif args.eval_features == "pixels":
            features = "pixels in [0, 1], larger images averaged down to 32 x 32"
            others = {"mmd": "rbf, unbiased"}
        else:
            dimension = try_out(self.extractor, images[:3].to(self.device))
            features = f"{Path(args.eval_features).name}, {dimension}, file {self.weights}"
            others = {"precision, recall": "k = 3", "cmmd": "1000 MMD^2, rbf with sigma 10, biased"}
        self.protocol["features"] = features
        if not self.only_fid:
            kid = "unbiased, cubic kernel, mean of 100 subsets of min(1000, n / 2); kid_se: jackknife"
            self.protocol |= {"kid": kid} | others
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
        path = None
        if self.weights and self.rank == 0:  # a hash of all that the statistics depend on, images included
            key = hashlib.sha256(repr((self.protocol, data.shape, self.device.type)).encode())
            for chunk in order.to(images.device).split(CHUNK):
                key.update(images[chunk].cpu().contiguous().numpy())
            name = f"{data.name.split(':')[0]}-{args.eval_split}-{n}-{key.hexdigest()[:16]}"
            path = Path(args.data_dir, "evaluation", f"{name}.npz")
        self.reference = cached(path, lambda: self.describe(images, order))  # used by the first process alone

        held_out = self.load_held_out(data)
        if held_out is None:
            which, pair = (
                "drawn",
                f"{self.count} images against {n}, drawn from the reference with replacement",
            )
        else:
            which, pair = "held-out", f"{min(self.count, len(held_out))} images of the other split"
            pair += " against the reference"
        path = path and path.with_name(f"{name}-floor-{which}-{self.count}.npz")
        floor = cached(path, lambda: self.floor(images, order, held_out))
        self.protocol |= {"samples": self.count, "floor": pair}
        if self.rank == 0:
            for metric, value in floor.items():
                self.protocol[f"floor {self.name_of(metric)}"] = value.item()
            if not self.only_fid and not self.weights:
                self.median = median_distance(self.reference["features"][:1000])
        if args.ms_ssim:
            self.protocol["ms_ssim"] = "pairs of samples, 256 x 256, 5 scales"
        if self.looks_for_copies:
            self.prepare_copies(
                order, held_out if (data.split, args.eval_split) == ("train", "train") else None
            )

    def prepare_copies(self, order: Tensor, test: Tensor | None) -> None:
        """Keep the features of training images, and how near to one of them 1 in 100 real test images is.

        order: which images the reference has, if they are training images.
        test: images that were not trained on; if there are none, half of the others stands for them.
        """
        most, generator = self.args.eval_samples, torch.Generator().manual_seed(3)
        self.trained_on, trained = order, self.reference
        if self.data.split != self.args.eval_split:
            self.trained_on = torch.randperm(len(self.data.images), generator=generator)[:most]
            trained = self.describe(self.data.images, self.trained_on)
        whose = "one half of them to the other"
        if test is not None:
            chosen = torch.randperm(len(test), generator=generator)[:most]
            tested, whose = self.describe(test, chosen), f"{len(chosen)} test images"
        self.protocol["copies"] = (
            f"nearer to one of {len(self.trained_on)} training images than 1% of {whose}"
        )
        if self.rank == 0:
            self.trained = trained["features"]
            real, others = self.trained.chunk(2) if test is None else (tested["features"], self.trained)
            distances, _ = nearest(real, others, self.device)
            self.near = distances.quantile(0.01)

    def load_held_out(self, data: datasets.Batches) -> Tensor | None:
        """Return the images of the split that is not the reference; None: there is none, or not here."""
        other = {"train": "test", "test": "train"}.get(self.args.eval_split)
        if other is None:
            return None
        try:
            return datasets.load_images(data.name, self.args.data_dir, data.shape[-1], other)
        except BadInput:
            if run.several() and data.name in ("mnist", "fashion-mnist", "cifar10"):
                raise  # the other processes wait for the first to have read it
            return None

    def describe(self, images: Tensor, indices: Tensor) -> dict[str, Tensor] | None:
        """Return, to the first process, statistics of some of the images and, but for FID alone, features."""
        chunks = indices.to(images.device).split(CHUNK)
        statistics, outputs = self.extract(lambda i: images[chunks[i]], len(indices))
        if self.rank > 0:
            return None
        return statistics.result() | ({} if self.only_fid else {"features": outputs[0]})

    def floor(self, images: Tensor, order: Tensor, held_out: Tensor | None) -> dict[str, Tensor] | None:
        """Return, to the first process, the distances of real images: what a perfect generator would have."""
        generator, n = torch.Generator().manual_seed(2), len(order)
        if held_out is None:
            x = self.describe(images, order[torch.randint(n, (n,), generator=generator)])
            y = self.describe(images, order[torch.randint(n, (self.count,), generator=generator)])
        else:
            x = self.reference
            y = self.describe(held_out, torch.randperm(len(held_out), generator=generator)[: self.count])
        if self.rank > 0:
            return None
        values = self.distances(x, y)
        values.pop("kid_se", None)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    def distances(self, x: dict[str, Tensor], y: dict[str, Tensor]) -> dict[str, float]:
        """Return the distances between images that describe returned."""
        values = {"fid": frechet_distance(x, y)}
        if not self.only_fid:
            values["kid"], values["kid_se"] = kernel_distance(x["features"], y["features"])
        return values

    @torch.no_grad()
    def extract(self, chunk: Callable, count: int, pairs: bool = False) -> tuple["Statistics", list[Tensor]]:
        """Return, to the first process, statistics of the features of count images and, but for FID alone,
        what the extractor makes of them: features and, of Inception, logits, (count, ...) on the CPU.

        chunk: of i, images i * CHUNK to (i + 1) * CHUNK, uint8; process r of N asks for every N-th from r on.
        pairs: MS-SSIM is what the extractor makes of them, too, as the last.
        """
        statistics, kept, last = Statistics(), [], (count - 1) // CHUNK
        rounds = range(0, last + 1, self.world_size)
        for first in tqdm(rounds, "evaluating", leave=False, disable=self.rank > 0 or None):
            i = min(first + self.rank, last)  # who has none left repeats the last, which is cut off below
            images = chunk(i)[: count - i * CHUNK].to(self.device)
            batches = []
            for batch in images.split(64):
                outputs = [*self.extractor(batch)]
                if pairs:
                    outputs.append(ms_ssim(batch))
                batches.append(outputs)
            gathered, start = [], first * CHUNK
            for parts in zip(*batches):
                output = torch.cat(parts)
                padded = F.pad(output, (0, 0, 0, CHUNK - len(output)))  # all processes give equally many rows
                gathered.append(kernels.gather(padded).cpu()[: count - start])
            if self.rank == 0:
                for features in gathered[0].split(CHUNK):  # as one process would have them
                    statistics.add(features)
                if self.only_fid:
                    gathered = gathered[-1:] if pairs else []
                if first == 0:
                    kept = [output.new_empty(count, *output.shape[1:]) for output in gathered]
                for whole, output in zip(kept, gathered):
                    whole[start : start + len(output)] = output
        return statistics, kept

    def chunk(self, sample: Callable[[int, int], Tensor], i: int) -> Tensor:
        """Return chunk i of samples, images as uint8; Failed: they are not finite."""
        samples = sample(CHUNK, i)
        if not samples.isfinite().all():
            raise Failed("what the generator makes is not finite, and cannot be evaluated")
        if self.data.name in datasets.TOYS:
            return samples
        return datasets.to_uint8(samples, self.data.value_range)

    def all_samples(self, sample: Callable[[int, int], Tensor]) -> Tensor:
        """Return all that is evaluated, on the CPU. Chunks are whole: batch statistics want a batch."""
        chunks = [self.chunk(sample, i).cpu() for i in range(math.ceil(self.count / CHUNK))]
        return torch.cat(chunks)[: self.count]

    def save(self, path: Path, sample: Callable[[int, int], Tensor]) -> None:
        """Write the samples that are evaluated as the array samples of an .npz file, images as uint8 and
        (n, h, w, c); beside it copies.png, if copies are looked for."""
        if self.rank > 0:
            return
        samples = self.all_samples(sample)
        if self.looks_for_copies and self.data.name not in datasets.TOYS:
            self.draw_copies(path.with_name("copies.png"), samples)
        array = samples.permute(0, 2, 3, 1).numpy() if samples.ndim == 4 else samples.numpy()
        run.write_whole(path, lambda file: np.savez(file, samples=array))

    def draw_copies(self, path: Path, samples: Tensor) -> None:
        """Write a picture of the 8 samples that are nearest to training images, and of 8 others, (n, c, h, w)
        uint8, each with the training image that is nearest to it beneath."""
        from torchvision.utils import save_image

        chosen = torch.cat([self.distance.argsort()[:8], torch.arange(8)])
        found = self.data.images[self.trained_on[self.neighbour[chosen]].to(self.data.images.device)]
        rows = torch.stack([samples[chosen].float(), found.cpu().float()]) / 255  # (2, 16, c, h, w)
        rows = rows.unflatten(1, (2, 8)).transpose(0, 1).flatten(0, 2)  # 8 samples, theirs, 8 samples, theirs
        rows = F.interpolate(rows, scale_factor=max(1, 64 // rows.shape[-1]))
        save_image(rows, path)

    def metrics(self, sample: Callable[[int, int], Tensor]) -> dict[str, float]:
        """Return the metrics of samples: sample(n, i) is chunk i, (n, ...), in the data's value range.

        Failed: samples that are not finite.
        """
        if self.data.name in datasets.TOYS:
            return toy_metrics(self.data.name, self.all_samples(sample))
        statistics, outputs = self.extract(lambda i: self.chunk(sample, i), self.count, self.args.ms_ssim)
        return from_first(lambda: self.compare(statistics, outputs))

    def compare(self, statistics: "Statistics", outputs: list[Tensor]) -> dict[str, float]:
        """Return the metrics, given what extract returned of the samples."""
        others = {"ms_ssim": outputs.pop().nanmean().item()} if self.args.ms_ssim else {}
        found = statistics.result() | ({} if self.only_fid else {"features": outputs[0]})
        values = self.distances(self.reference, found)
        if not self.only_fid:
            real, fake, *logits = self.reference["features"], *outputs
            self.features = real[:KEPT], fake[:KEPT]
            if logits:
                values |= inception_scores(logits[0])
            if self.weights:
                values |= precision_recall(fake.to(self.device), real.to(self.device))
            else:
                values["mmd"] = common_mmd2(real[:TOY_SAMPLES], fake[:TOY_SAMPLES], self.median)
            if self.args.eval_features not in ("inception", "pixels"):
                values["cmmd"] = cmmd(real.to(self.device), fake.to(self.device))
            if self.looks_for_copies:
                self.distance, self.neighbour = nearest(fake, self.trained, self.device)
                values["copies"] = (self.distance < self.near).double().mean().item()
        return {self.name_of(metric): value for metric, value in values.items()} | others

    def name_of(self, metric: str) -> str:
        """Return the name of a metric of features: fid and kid are of the published Inception alone."""
        if self.weights is None:
            return "pixel_" + metric.replace("fid", "frechet")
        if self.weights in INCEPTION_URL:
            return metric
        return f"{metric.replace('fid', 'frechet')}[{self.weights}]"


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
    """Mean and covariance, in float64, of features of which no more are kept than twice their dimensions."""

    def __init__(self) -> None:
        self.n, self.kept = 0, []

    def add(self, features: Tensor) -> None:
        """Take in features (n, d)."""
        self.kept.append(features)
        if sum(map(len, self.kept)) > 2 * features.shape[1]:
            self.fold()

    def fold(self) -> None:
        """Put what is kept into the running mean and sums of products (Chan et al. 1979)."""
        x, self.kept = torch.cat(self.kept).double(), []
        n, mean = len(x), x.mean(0)
        x = x.sub_(mean).numpy()
        products = torch.from_numpy(x.T @ x)  # of which NumPy, as it is symmetric, computes half
        if self.n == 0:
            self.n, self.mean, self.products = n, mean, products
            return
        shift, total = mean - self.mean, self.n + n
        self.products += products
        self.products.addr_(shift, shift, alpha=self.n * n / total)
        self.n, self.mean = total, self.mean + shift * (n / total)

    def result(self) -> dict[str, Tensor]:
        """Return mean (d,) and unbiased covariance (d, d), or, of n <= d features, its root (n, d)."""
        kept = sum(map(len, self.kept))
        if self.n == 0 and kept <= self.kept[0].shape[1]:
            x = torch.cat(self.kept).double()
            return {"mean": x.mean(0), "root": (x - x.mean(0)) / math.sqrt(kept - 1)}
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


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100, size: int = 1000) -> tuple[float, float]:
    """Return KID, the unbiased MMD^2 with the kernel (<x, y> / d + 1)^3, and its standard error.

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
    constant = (d - c @ c) / 2
    x_term = torch.cat([rows.double() @ c for rows in x.split(256)]) + constant
    y_term = torch.cat([rows.double() @ c for rows in y.split(256)]) + constant
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
            # All by NumPy, whose rounding then cancels; of a matrix by itself it computes half.
            left = x[rows].numpy()
            right = left if diagonal else y[columns].numpy()
            products = torch.from_numpy(left @ right.T)
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


def ms_ssim(images: Tensor) -> Tensor:
    """Return the MS-SSIM (n, 1) of images (n, c, h, w) uint8 in pairs: high where samples are alike.

    As Wang et al. 2019, resized to 256 x 256. Images i and i + n / 2 are a pair, whose value stands at both;
    an odd last one has NaN.
    """
    half = len(images) // 2
    values = torch.full((len(images), 1), math.nan, dtype=torch.float32, device=images.device)
    if half > 0:
        # As TensorFlow 1 has it, pixel i is what is at i * side / 256, and past the end the last is repeated.
        padded = F.pad(images[: 2 * half].float(), (0, 1, 0, 1), mode="replicate")
        resized = F.interpolate(padded, (257, 257), mode="bilinear", align_corners=True)[:, :, :256, :256]
        values[: 2 * half, 0] = multiscale_ssim(*resized.split(half)).repeat(2)
    return values


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
    distance = torch.arange(-5, 6, device=x.device, dtype=x.dtype)
    window = torch.softmax(-distance.square() / (2 * 1.5**2), 0)

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


def nearest(x: Tensor, y: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the distance of each of x (n, d) to the nearest of y (m, d), and which one it is, both (n,)."""
    y, parts = y.to(device), []
    for part in x.split(1000):
        d2 = kernels.squared_distances(part.to(device), y)
        parts.append(d2.min(1))
    d2, which = (torch.cat(found).cpu() for found in zip(*parts))
    return d2.sqrt(), which


def inception_scores(logits: Tensor) -> dict[str, float]:
    """Return torch-fidelity's IS of logits (n, classes)."""
    from torch_fidelity.metric_isc import isc_features_to_metric as inception_score

    values = {}
    values["is"], values["is_std"] = inception_score(logits, 10, shuffle=False).values()
    values["is_all"], _ = inception_score(logits, 1, shuffle=False).values()
    return values


def precision_recall(fake: Tensor, real: Tensor) -> dict[str, float]:
    """Return torch-fidelity's precision and recall of features (n, d), (m, d)."""
    from torch_fidelity.metric_prc import calculate_precision_recall_part

    values = calculate_precision_recall_part(fake, real, neighborhood=3, batch_size=1000)
    return dict(zip(("precision", "recall"), values))


@torch.no_grad()
def cmmd(real: Tensor, fake: Tensor) -> float:
    """Return 1000 MMD^2, biased, rbf with sigma 10, of features (n, d), (m, d) (Jayasumana et al. 2024)."""
    return 1000 * kernels.fused_mmd2(real.double(), fake.double(), "rbf", (10.0,), "biased").item()


def load_network(path: str, device: torch.device) -> tuple[Callable, str]:
    """Return the network in a file, and the first 8 digits of the file's sha256; BadInput: it cannot be used.

    It takes uint8 images (n, c, h, w), grey ones too, and returns features (n, d) float32.
    """
    file = Path(path)
    require(file.is_file(), "--eval-features", path, "inception, pixels, or a file that torch.export wrote")
    try:
        network = exported.Network(file, device)
    except Exception as error:  # a file of any content
        problem = f"cannot be used: {str(error) or repr(error):.200}"
        raise BadInput(f"--eval-features {path} {problem}") from error
    weights = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    return lambda images: network(images.expand(-1, 3, -1, -1)), weights


def try_out(network: Callable, images: Tensor) -> int:
    """Return d, if a network makes features (n, d) of images, however many; else BadInput."""
    for n in (1, 3):
        try:
            (features,) = network(images[:n])
        except Exception as error:  # what an operator says of a size
            problem = f"{str(error) or repr(error):.200}"
            raise BadInput(f"--eval-features: {n} images {tuple(images.shape[1:])}: {problem}") from error
        shape, ok = tuple(features.shape), features.ndim == 2 and len(features) == n
        require(ok and features.isfinite().all(), "the network's output", shape, f"({n}, d) and finite")
    return features.shape[1]


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


def cached(path: Path | None, compute: Callable[[], dict[str, Tensor] | None]) -> dict[str, Tensor] | None:
    """Return, to the first process, which knows the path, what is there, or what all processes compute.

    A warning says that a file is damaged, or that it cannot be written.
    """
    found = None
    if path and path.exists():
        try:
            with np.load(path, allow_pickle=False) as arrays:  # a zip file: it has checksums
                found = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        except Exception as error:
            print(f"warning: {path} cannot be read ({error!r:.90}): computed again")
    if from_first(lambda: found is not None):
        return found
    found = compute()
    if path:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name("lock")):  # another run may have come to the same
                run.write_whole(path, lambda file: np.savez(file, **found))
        except OSError as error:
            print(f"warning: {path} could not be written ({error}): to be computed again next time")
    return found


# --- toys and pixels -----------------------------------------------------------------------------


def median_distance(points: Tensor) -> float:
    """Return the median distance between two of the points (n, d); BadInput: it is 0."""
    median = F.pdist(points).median().item()
    expected = "above 0: more than half of the pairs are equal (--eval-metrics fid does not need it)"
    require(median > 0, "the median distance between real images", median, expected)
    return median


def common_mmd2(real: Tensor, fake: Tensor, median: float) -> float:
    """Return the unbiased MMD^2 under one kernel for all methods, so that runs can be compared.

    rbf with sigma = median, a distance between real samples, times 1/8, 1/4, 1/2, 1 and 2. May be negative.
    """
    bandwidths = tuple(median * factor for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2))
    return kernels.fused_mmd2(real.double(), fake.double(), "rbf", bandwidths, "unbiased").item()


def toy_metrics(name: str, fake: Tensor) -> dict[str, float]:
    """Return mmd, high_quality and modes of samples (n, d) of a toy; of the swiss roll, curve_distance too.

    high_quality: the share of samples within 3 standard deviations of the noise of a mode. modes: how many
    have at least 10 of those and a quarter of their fair share. The roll has ten: equal parts of its curve.
    """
    real = datasets.draw_toy(name, TOY_SAMPLES, mix(0, Stream.TOY_REFERENCE))
    median = median_distance(datasets.draw_toy(name, 1000, mix(0, Stream.TOY_SCALE)).double())
    metrics = {"mmd": common_mmd2(real, fake, median)}
    fake = fake.to(real.dtype)  # PyTorch's default
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


Features = Annotated[str, tyro.conf.arg(aliases=["--features"])]


@dataclass
class Args:
    """Compare images: each side a folder, a data set (cifar10, cifar10:test), or an array (N, H, W, C) or
    (N, C, H, W) in an .npy or .npz file, uint8 or floats in [0, 1] or [-1, 1]."""

    real: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="REAL")]  # the reference
    fake: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FAKE")]  # what is measured
    eval_features: Features = "inception"  # or pixels, or a file with a network of your own (torch.export)
    eval_metrics: Literal["all", "fid"] = "all"  # fid: the Frechet distance alone, in bounded memory
    eval_samples: int = 50_000  # images of either side, at most
    image_size: int | None = None  # side to which folders and data sets are resized
    ms_ssim: bool = False  # of pairs of FAKE too
    json: str | None = None  # file to write metrics and protocol to
    copies: str | None = None  # PNG file to draw samples and the images of REAL nearest to them in
    data_dir: str = "data"  # folder of the data sets and of cached statistics
    inception_weights: str | None = None  # file of torch-fidelity's weights (None: torch.hub's copy)
    device: str = "auto"  # a torch device; auto is cuda where there is one, else cpu


def side_of(what: str, source: str, args: Args) -> int | None:
    """Return the side to which REAL or FAKE (what) is resized; BadInput: a folder of several needs one."""
    folder = Path(source.removeprefix("folder:"))
    if args.image_size or not folder.is_dir():
        return args.image_size
    try:
        sides = set()
        for file in datasets.find_folder(folder).files:
            with Image.open(file) as image:
                sides.update(image.size)
    except Exception as error:  # Pillow raises what it likes
        raise BadInput(f"{what} {source} is no folder of images to be used: {error}") from error
    found = f"sides of {min(sides)} to {max(sides)} pixels"
    require(len(sides) == 1, "--image-size", args.image_size, f"given: the images of {source} have {found}")
    return sides.pop()


def read_images(what: str, source: str, side: int | None, data_dir: str) -> tuple[Tensor, str]:
    """Return the images of REAL or FAKE (what), uint8 (N, c, h, w), and how their values were read."""
    path, (name, _, split) = Path(source.removeprefix("folder:")), source.partition(":")
    try:
        if path.is_dir():
            return datasets.load_images(f"folder:{path}", data_dir, side, "train"), "8 bits"
        require(name not in datasets.TOYS, "it", "a toy", "images")
        if path.suffix not in (".npy", ".npz"):
            return datasets.load_images(name, data_dir, side, split or "train"), "8 bits"
        loaded = np.load(path, allow_pickle=False)
        arrays = [loaded[name] for name in loaded.files] if path.suffix == ".npz" else [loaded]
        found = [a for a in arrays if a.ndim == 4 and a.size and {1, 3} & {a.shape[1], a.shape[3]}]
        expected = "one of (N, H, W, C) or (N, C, H, W) with C 1 or 3"
        require(len(found) == 1, "its array", [a.shape for a in arrays], expected)
        images, values = torch.from_numpy(found[0]), "8 bits"
        if images.dtype != torch.uint8:
            low, high = value_range(images)
            images, values = datasets.to_uint8(images, (low, high)), f"floats in [{low}, {high}]"
        return images.permute(0, 3, 1, 2) if images.shape[3] in (1, 3) else images, values
    except Exception as error:  # Pillow and NumPy raise what they like
        problem = str(error) or repr(error)
        raise BadInput(f"{what} {source} is no folder, array or data set to be used: {problem}") from error


def value_range(images: Tensor) -> tuple[int, int]:
    """Return (0, 1) or (-1, 1), in which images are but for rounding; BadInput: they are in neither."""
    require(images.is_floating_point(), "its type", images.dtype, "uint8, or floats in [0, 1] or [-1, 1]")
    low, high, rounding = images.min().item(), images.max().item(), 0.5 / 255
    for bottom in (0, -1):
        if bottom - rounding <= low <= high <= 1 + rounding:  # NaN is not
            return bottom, 1
    raise BadInput(f"its values are from {low:.6g} to {high:.6g}, but should be in [0, 1] or [-1, 1]")


def main(args: Args) -> dict[str, float]:
    """Compare, print a table, write --json; return the metrics. Failed: --json cannot be written."""
    side = args.image_size
    require(side is None or 1 <= side <= 2**14, "--image-size", side, f"between 1 and {2**14}")
    file = args.json and Path(args.json)
    ok = not file or (os.access(file.parent, os.W_OK) and not file.is_dir())
    require(ok, "--json", args.json, "a file in a folder that can be written to")
    sides = side_of("REAL", args.real, args), side_of("FAKE", args.fake, args)
    name, _, split = args.real.partition(":")
    name, split = (name, split or "train") if name in datasets.IMAGES else ("REAL", "REAL")
    require(not args.copies or args.eval_metrics == "all", "--copies", args.copies, "left out for FID alone")
    evaluator = Evaluator(SimpleNamespace(**vars(args), eval_split=split, dataset=name, eval_only=True))
    real, real_values = read_images("REAL", args.real, sides[0], args.data_dir)
    fake, fake_values = read_images("FAKE", args.fake, sides[1], args.data_dir)
    channels = max(real.shape[1], fake.shape[1])
    real, fake = (images.expand(-1, channels, -1, -1) for images in (real, fake))
    sizes, expected = (f"{h} x {w}" for h, w in (fake.shape[2:], real.shape[2:]))
    ok = real.shape[1:] == fake.shape[1:]
    require(ok, "FAKE", sizes, f"{expected} as REAL; --image-size resizes folders and data sets")
    count = min(args.eval_samples, len(fake))
    require(count >= 10, "the number of images of FAKE", count, "at least 10 (of a run: its samples.npz)")
    data = SimpleNamespace(name=name, images=real, shape=real.shape[1:], value_range=(0, 255), split=split)
    evaluator.set_reference(data, count)
    order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(1))[:count]
    metrics = evaluator.metrics(lambda n, i: fake[order[i * n : (i + 1) * n]])
    protocol = evaluator.protocol | {
        "real": f"{args.real} ({real_values})",
        "fake": f"{args.fake} ({fake_values})",
    }
    if evaluator.rank == 0:
        if evaluator.weights and count < 10_000:
            print(f"warning: of {count} samples, distances of features are bias more than anything else")
        for name, value in metrics.items():
            floor = protocol.get(f"floor {name}")
            print(f"{name:20} {value:.6g}" + (f" ({floor:.4g} of real images)" if floor is not None else ""))
        for name, value in protocol.items():
            print(f"{name:20} {value}")
        if args.copies:
            evaluator.draw_copies(Path(args.copies), fake[order])
        if file:
            text = json.dumps({"metrics": metrics, "protocol": protocol}, indent=2, allow_nan=False)
            try:
                file.write_text(text + "\n")
            except OSError as error:
                raise Failed(f"--json {file} could not be written ({error})") from error
    return metrics


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
        run.end()
        sys.stdout.flush()
    except (BadInput, Failed, OSError) as error:
        run.give_up(error)
