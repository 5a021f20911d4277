"""How good are the samples? Frechet distance and KID of images; coverage and a common MMD of toys.

On the published Inception weights the Frechet distance is called fid; on pixels or on other weights it is
named for what it is. Statistics are computed in float64.
"""

import hashlib
import math
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from common import datasets, kernels
from common.run import BadInput, mix, require

INCEPTION_URL = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/"
    "weights-inception-2015-12-05-6726825d.pth"  # the sha256 of the file begins with 6726825d
)
CHUNK = 256  # samples generated and featurised at a time
TOY_SAMPLES = 2000


class Evaluator:
    """Compares samples with a reference; what it needs is found, or refused, when it is made.

    protocol: what the numbers are, to be stored beside them.
    """

    def __init__(self, args, data: datasets.Batches) -> None:
        """Read dataset, data_dir, image_size, eval_samples, eval_features, eval_split, inception_weights.

        Raises:
            BadInput: no such split, fewer than 4 images, Inception weights that cannot be had.
        """
        self.data, self.extractor = data, None
        sampling = {"batch_norm": args.sample_bn, "ema_decay": args.ema_decay}
        if data.name in datasets.TOYS:
            self.count = TOY_SAMPLES
            self.protocol = {"samples": self.count, "mmd": "rbf, unbiased, data space"} | sampling
            return
        images = data.images
        if args.eval_split != "train":
            images = datasets.load_images(data.name, args.data_dir, data.shape[-1], args.eval_split)
        self.count = min(args.eval_samples, len(images))
        require(self.count >= 4, "--eval-samples", self.count, "at least 4")
        features, self.names = "pixels in [0, 1]", ("pixel_frechet", "pixel_kid", "pixel_mmd")
        if args.eval_features == "inception":
            self.extractor, weights = load_inception(args.inception_weights, data.images.device)
            features = f"torch-fidelity inception-v3-compat, 2048, weights {weights}"
            self.names = (f"frechet[{weights}]", f"kid[{weights}]", f"mmd[{weights}]")
            if weights in INCEPTION_URL:
                self.names = ("fid", "kid", "inception_mmd")
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).to(images.device)
        self.reference = self.features(images[i] for i in order[: self.count].split(CHUNK))
        self.protocol = {
            "features": features,
            "samples": self.count,
            "reference": f"{self.count} of {args.eval_split}",
            "kid": "unbiased, cubic kernel, 100 subsets of min(1000, n / 2)",
            "mmd": "rbf, unbiased",
        } | sampling

    @torch.no_grad()
    def features(self, chunks: Iterable[Tensor]) -> Tensor:
        """Return the features (n, d) float64, on the CPU, of uint8 images that come in chunks."""
        found = []
        for images in chunks:
            if self.extractor is None:
                found.append((images.flatten(1).double() / 255).cpu())
            else:
                rgb = images.expand(-1, 3, -1, -1)  # grey is repeated, colour stays
                found.append(self.extractor(rgb)[0].double().cpu())
        return torch.cat(found)

    def samples(self, sample: Callable[[int, int], Tensor]) -> Iterable[Tensor]:
        """Yield the samples that are evaluated, in chunks.

        All are drawn CHUNK at a time, cut afterwards: batch statistics want a batch.
        """
        for i, start in enumerate(range(0, self.count, CHUNK)):
            yield sample(CHUNK, i)[: self.count - start]

    def metrics(self, sample: Callable[[int, int], Tensor]) -> dict[str, float]:
        """Return the metrics of samples: sample(n, i) is chunk i, (n, ...), in the data's value range."""
        if self.data.name in datasets.TOYS:
            return toy_metrics(self.data.name, torch.cat([*self.samples(sample)]).cpu())
        chunks = self.samples(sample)
        fake = self.features(datasets.to_uint8(chunk, self.data.value_range) for chunk in chunks)
        values = (
            frechet_distance(self.reference, fake),
            kernel_distance(self.reference, fake),
            common_mmd2(self.reference[:TOY_SAMPLES], fake[:TOY_SAMPLES], self.reference[:1000]),
        )
        return dict(zip(self.names, values))


# --- images --------------------------------------------------------------------------------------


def frechet_distance(x: Tensor, y: Tensor) -> float:
    """Return the Frechet distance of Gaussians fitted to features (n, d) and (m, d), in float64.

    |mean_x - mean_y|^2 + tr(C_x + C_y - 2 (C_x C_y)^(1/2)) with the unbiased covariances C; right for
    singular ones too. With C = A^T A and A = Q R, the trace of the root is the nuclear norm of R_x R_y^T.
    """
    x, y = x.double(), y.double()
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x, y))
    r_x, r_y = (torch.linalg.qr(z, mode="r").R for z in (a, b))
    cross = torch.linalg.svdvals(r_x @ r_y.T).sum()
    squares = (x.mean(0) - y.mean(0)).square().sum() + a.square().sum() + b.square().sum()
    return (squares - 2 * cross).item()


def kernel_distance(x: Tensor, y: Tensor, subsets: int = 100) -> float:
    """Return KID: unbiased MMD^2 with k(a, b) = (<a, b> / d + 1)^3, mean over random subsets.

    Args:
        x, y: features (n, d) and (m, d).
        subsets: how many; each has min(1000, n / 2, m / 2) of either side, without replacement.
    """
    x, y, generator = x.double(), y.double(), torch.Generator().manual_seed(0)
    size = min(1000, len(x) // 2, len(y) // 2)
    total = 0.0
    for _ in range(subsets):
        a = x[torch.randperm(len(x), generator=generator)[:size]]
        b = y[torch.randperm(len(y), generator=generator)[:size]]
        k_xx, k_xy, k_yy = ((p @ q.T / x.shape[1] + 1) ** 3 for p, q in ((a, a), (a, b), (b, b)))
        total += kernels.mmd2(k_xx, k_xy, k_yy, "unbiased").item()
    return total / subsets


def load_inception(path: str | None, device: torch.device) -> tuple[torch.nn.Module, str]:
    """Return torch-fidelity's Inception and the first 8 digits of the sha256 of its weights.

    Args:
        path: a weights file; None takes torch.hub's copy, downloading it where there is none.

    Raises:
        BadInput: the file cannot be had or does not hold these weights.
    """
    from torch_fidelity.utils import create_feature_extractor

    file = Path(path or Path(torch.hub.get_dir(), "checkpoints", Path(INCEPTION_URL).name))
    try:
        if path is None and not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(INCEPTION_URL, file, "6726825d")
        weights = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
        torch.load(file, map_location="cpu", weights_only=True)  # the library would run what is in it
        extractor = create_feature_extractor(
            "inception-v3-compat",
            ["2048"],
            cuda=device.type == "cuda",
            feature_extractor_weights_path=str(file),
            verbose=False,
        )
    except Exception as error:
        raise BadInput(
            f"--inception-weights {file} is missing or damaged ({str(error) or repr(error):.90});"
            f" put the file of {INCEPTION_URL} there, or use --eval-features pixels, or --eval-every 0"
        ) from error
    if weights not in INCEPTION_URL:
        print(f"warning: {file} is not the published Inception: its distances are no FID and no KID")
    return extractor, weights


# --- toys and pixels -----------------------------------------------------------------------------


def common_mmd2(real: Tensor, fake: Tensor, scale: Tensor) -> float:
    """Return the unbiased MMD^2 under one kernel for all methods, so that runs can be compared.

    rbf with sigma = the median distance within scale (n, d), times 1/8, 1/4, 1/2, 1 and 2. May be negative.
    """
    median = torch.nn.functional.pdist(scale).square().median()
    bandwidths = tuple(median.sqrt().item() * factor for factor in (1 / 8, 1 / 4, 1 / 2, 1, 2))
    return kernels.mmd2(*kernels.gram_blocks(real, fake, "rbf", bandwidths), "unbiased").item()


def toy_metrics(name: str, fake: Tensor) -> dict[str, float]:
    """Return mmd, high_quality and modes of samples (n, d) of a toy; of the swiss roll, curve_distance too.

    high_quality: the share of samples within 3 standard deviations of the noise of a mode. modes: how many
    have at least a quarter of their fair share of those. The roll's "modes" are ten equal parts of its curve.
    """
    real, scale = datasets.draw_toy(name, TOY_SAMPLES, mix(0, 5)), datasets.draw_toy(name, 1000, mix(0, 6))
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
    covered = (counts >= math.ceil(max(1, good.sum().item() / modes / 4))).sum().item()
    return metrics | {"high_quality": good.float().mean().item(), "modes": covered}
