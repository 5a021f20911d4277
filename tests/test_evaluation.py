"""Distances against closed forms and torch-fidelity; toys' measures on samplers whose faults are known."""

import hashlib
import io
import json
import math
import os
import re
import runpy
import socket
import subprocess
import sys
import textwrap
import zipfile
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import Malicious, randn
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import mmd_gan_repulsive
from common import datasets, evaluation, exported, kernels, run
from common.evaluation import Evaluator, common_mmd2, kernel_distance, toy_metrics
from common.run import BadInput

CPU = torch.device("cpu")


# --- Frechet distance ----------------------------------------------------------------------------


def statistics(*parts):
    found = evaluation.Statistics()
    for part in parts:
        found.add(part)
    return found.result()


def frechet_distance(x, y):
    return evaluation.frechet_distance(statistics(x), statistics(y))


@pytest.mark.parametrize("sizes", [[5000], [1, 999, 4000], [256] * 19 + [136]])
def test_statistics_are_those_of_numpy_whatever_the_parts(sizes):
    """Means far from 0, and drifting, so that each part has one of its own."""
    x = (1000 + randn(5000, 3, seed=1) + torch.linspace(0, 9, 5000)[:, None]).float()
    found = statistics(*x.split(sizes))
    assert np.allclose(found["mean"], x.double().mean(0), rtol=1e-14)
    assert np.allclose(found["covariance"], np.cov(x.double().numpy(), rowvar=False), rtol=1e-12)


def with_statistics(n, mean, stds, seed=0):
    """Samples whose mean is exactly mean and whose unbiased covariance is exactly diag(stds^2)."""
    raw = randn(n, len(mean), seed=seed)
    orthonormal = torch.linalg.qr(raw - raw.mean(0))[0]
    return orthonormal * math.sqrt(n - 1) * torch.tensor(stds) + torch.tensor(mean)


def test_frechet_distance_of_diagonal_gaussians():
    """|difference of means|^2 + sum of (difference of standard deviations)^2, for unequal counts too."""
    x = with_statistics(50, [0.0, 1.0, -2.0], [1.0, 2.0, 0.5], seed=1)
    y = with_statistics(31, [1.0, 1.0, 1.0], [3.0, 2.0, 0.25], seed=2)
    assert frechet_distance(x, y) == pytest.approx(1 + 0 + 9 + 4 + 0 + 0.0625, rel=1e-10)


def test_frechet_distance_agrees_with_torch_fidelity():
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    x, y = randn(200, 12, seed=1) @ randn(12, 12, seed=3), randn(150, 12, seed=2) + 0.3
    statistics = [fid_features_to_statistics(features) for features in (x, y)]
    expected = fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"]
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-8)


@pytest.mark.parametrize(
    ("n", "m", "d"), [(40, 40, 40), (12, 9, 40), (12, 90, 40), (90, 12, 40), (41, 41, 40), (6, 300, 200)]
)
def test_frechet_distance_of_singular_covariances(n, m, d):
    """tr (C_x C_y)^(1/2) is the nuclear norm of X Y' / sqrt((n-1)(m-1)), X and Y centred; n or m up to d."""
    x, y = randn(n, d, seed=1), 2 * randn(m, d, seed=2) + 1
    a = (x - x.mean(0)).numpy() / math.sqrt(n - 1)
    b = (y - y.mean(0)).numpy() / math.sqrt(m - 1)
    cross = np.linalg.norm(a @ b.T, "nuc")
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = mean + (a * a).sum() + (b * b).sum() - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_is_computed_in_float64():
    """A mean of 1000 and a spread of 0.01 in float32."""
    x = (1000 + 0.01 * randn(100, 5, seed=1)).float()
    y = (1000 + 0.02 * randn(100, 5, seed=2)).float()
    expected = frechet_distance((x.double() - 1000) * 100, (y.double() - 1000) * 100) / 1e4
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


# --- kernel distance (KID) -----------------------------------------------------------------------


def test_kernel_distance_agrees_with_torch_fidelity():
    """On the same subsets, exactly; over many subsets it tends to torch-fidelity's estimate from all."""
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = randn(44, 6, seed=1), randn(40, 6, seed=2) + 0.5
    options = dict(kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None)
    options |= dict(kid_kernel_poly_coef0=1.0)
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(7):
        subsets = [f[torch.randperm(len(f), generator=generator)[:20]].numpy() for f in (x, y)]
        values.append(kernel_mmd(*subsets, **options))
    assert kernel_distance(x, y, subsets=7)[0] == pytest.approx(np.mean(values), rel=1e-12)
    expected = kernel_mmd(x[:40].numpy(), y.numpy(), **options)
    assert kernel_distance(x[:40], y, subsets=2000)[0] == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("n", [400, 80])
def test_kernel_distance_has_the_standard_error_that_repetition_shows(n):
    """Subsets of 40 of 400, and of 40 of 80: the spread of 100 repetitions, to 25 %."""
    sets = ((randn(n, 3, seed=seed), randn(n, 3, seed=1000 + seed) + 0.5) for seed in range(100))
    values, errors = np.array([kernel_distance(x, y, 20, 40) for x, y in sets]).T
    assert np.std(values, ddof=1) == pytest.approx(np.sqrt(np.mean(errors**2)), rel=0.25)


@pytest.mark.parametrize("subsets", [100, 6])
def test_kernel_distance_is_that_of_float64_from_float32_products(subsets):
    """To 1e-6, of features like Inception's, of which KID is near 0.003; from all pairs and subset by subset,
    against float64 on the same subsets."""
    factors = 0.1 * randn(8, 64, seed=3)
    x, y = (
        (0.35 + (randn(n, 8, seed=seed) + mean) @ factors + 0.2 * randn(n, 64, seed=seed + 5)).relu().float()
        for n, seed, mean in ((700, 1, 0), (600, 2, 0.1))
    )
    found = kernel_distance(x, y, subsets, 200)
    expected = kernel_distance(x.double(), y.double(), subsets, 200)
    generator, values = torch.Generator().manual_seed(0), []
    for _ in range(subsets):
        a, b = (f[torch.randperm(len(f), generator=generator)[:200]].double() for f in (x, y))
        values.append(
            kernels.mmd2(*((p @ q.T / 64 + 1) ** 3 for p, q in ((a, a), (a, b), (b, b))), "unbiased")
        )
    assert expected[0] == pytest.approx(np.mean(values), rel=1e-9)
    assert 0.001 < expected[0] < 0.005
    assert found == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_float64_where_float32_is_not_enough():
    """Features around 500: the kernel is of order 1e16, MMD^2 of order 1e7; against long double."""
    from torch_fidelity.metric_kid import mmd2

    x, y = (randn(400, 4, seed=1) + 500).float(), (randn(400, 4, seed=2) + 500).float()
    generator, exact = torch.Generator().manual_seed(0), []
    for _ in range(5):
        subsets = [f[torch.randperm(400, generator=generator)[:200]] for f in (x, y)]
        a, b = (f.numpy().astype(np.longdouble) for f in subsets)
        exact.append(float(mmd2(*((p @ q.T / 4 + 1) ** 3 for p, q in ((a, a), (a, b), (b, b))))))
    value, error = kernel_distance(x, y, 5)
    assert value == pytest.approx(np.mean(exact), abs=1e-4 * error)


def test_kernel_distance_of_gaussians_has_its_closed_form():
    """N(0, I) and N(0.5, I) in 8 dimensions: 1.117188."""
    d, a = 8, 8 * 0.25
    moments = (1 + a / d) ** 3 + 3 * (1 + a / d) * (2 * a + d) / d**2 + 6 * a / d**3
    closed_form = (1 + 3 / d) + moments - 2 * (1 + 3 * (a + d) / d**2)
    assert closed_form == pytest.approx(1.117188, abs=1e-6)
    values = [kernel_distance(randn(4000, d, seed=s), randn(4000, d, seed=s + 9) + 0.5, 8)[0] for s in (1, 2)]
    assert np.mean(values) == pytest.approx(closed_form, rel=0.06)


def test_an_evaluation_leaves_features_behind(monkeypatch):
    monkeypatch.setattr(evaluation, "KEPT", 100)
    evaluator, data = digits(eval_samples=120)
    evaluator.metrics(sampler_of(data.images.flip(3)))
    real, fake = evaluator.features
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:100]
    torch.testing.assert_close(real, data.images[order].flatten(1).float() / 255)
    torch.testing.assert_close(fake, data.images.flip(3)[:100].flatten(1).float() / 255)


# --- MS-SSIM -------------------------------------------------------------------------------------


def test_ms_ssim_of_a_pair_stands_at_both_images():
    half = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    other = half.clone()
    half[1], other[1] = 50, 100  # two constants: (2ab + c) / (a^2 + b^2 + c)
    c = (0.01 * 255) ** 2
    luminance = (2 * 50 * 100 + c) / (50**2 + 100**2 + c)  # in the coarsest scale, with its exponent
    found = evaluation.ms_ssim(torch.cat([half, other]))
    expected = torch.tensor([1, luminance**0.1333]).repeat(2)[:, None]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert evaluation.ms_ssim(torch.cat([half[:1], 255 - half[:1]])).max() < 0.5
    assert evaluation.ms_ssim(half[:1]).isnan().all()  # no pair
    three = evaluation.ms_ssim(torch.cat([half[:1], other[:1], half[1:]]))
    assert three.isnan().tolist() == [[False], [False], [True]]


def ms_ssim_by_scipy(x, y):
    """Wang et al. 2003 of (h, w, c) float64 in [0, 255], window by window and channel by channel."""
    from scipy.signal import correlate2d

    window = np.exp(-((np.arange(11) - 5)[:, None] ** 2 + (np.arange(11) - 5) ** 2) / (2 * 1.5**2))
    window /= window.sum()
    values = []
    for a, b in zip(np.moveaxis(x, 2, 0), np.moveaxis(y, 2, 0)):
        value = 1
        for scale, power in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
            mean = {name: correlate2d(z, window, "valid") for name, z in {"a": a, "b": b}.items()}
            aa, bb, ab = (correlate2d(z, window, "valid") for z in (a * a, b * b, a * b))
            contrast = 2 * (ab - mean["a"] * mean["b"]) + (0.03 * 255) ** 2
            contrast = contrast / (aa - mean["a"] ** 2 + bb - mean["b"] ** 2 + (0.03 * 255) ** 2)
            luminance = 2 * mean["a"] * mean["b"] + (0.01 * 255) ** 2
            luminance = luminance / (mean["a"] ** 2 + mean["b"] ** 2 + (0.01 * 255) ** 2)
            factor = contrast if scale < 4 else contrast * luminance
            value *= max(0, factor.mean()) ** power
            a, b = (z.reshape(len(z) // 2, 2, -1, 2).mean((1, 3)) for z in (a, b))
        values.append(value)
    return np.mean(values)


def enlarged(image, size):
    """TensorFlow 1's bilinear resizing of (h, w, c): no half pixels, the last row and column repeated."""
    h, w, _ = image.shape
    result = np.zeros((size, size, image.shape[2]))
    for i, j in np.ndindex(size, size):
        row, up = divmod(i * h / size, 1)
        column, left = divmod(j * w / size, 1)
        row, column = int(row), int(column)
        down, right = min(row + 1, h - 1), min(column + 1, w - 1)
        top = image[row, column] * (1 - left) + image[row, right] * left
        bottom = image[down, column] * (1 - left) + image[down, right] * left
        result[i, j] = top * (1 - up) + bottom * up
    return result


@pytest.mark.parametrize(
    ("noise", "tensorflow"), [(20, (0.49568406, 0.75865161)), (90, (0.13384606, 0.21443337))]
)
def test_ms_ssim_is_that_of_tensorflow(noise, tensorflow):
    """Against loops, and what TensorFlow 2.21 gave: a smooth image and a noisy one, of which one channel is
    unlike. Colour, and grey."""
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:48, :32]
    smooth = 128 + 90 * np.sin(rows / 5)[..., None] * np.cos(columns[..., None] / [4, 6, 9])
    noisy = smooth + noise * generator.standard_normal(smooth.shape)
    noisy[..., 2] = 255 - noisy[..., 2]
    pair = np.stack([smooth, noisy]).round().clip(0, 255)
    for channels, recorded in zip(([0, 1, 2], [0]), tensorflow):
        images = pair[..., channels]
        expected = ms_ssim_by_scipy(*(enlarged(image, 256) for image in images))
        found = evaluation.ms_ssim(torch.from_numpy(images).permute(0, 3, 1, 2).to(torch.uint8))
        assert expected == pytest.approx(recorded, rel=1e-4)
        assert found.flatten().tolist() == pytest.approx([expected] * 2, rel=1e-4)


def test_ms_ssim_of_a_run_is_the_mean_over_pairs(monkeypatch):
    """65 images, so that the last is alone; one value at each image."""
    values = torch.rand(65, 1, generator=torch.Generator().manual_seed(0))
    parts = iter([values[:64], torch.full((1, 1), math.nan)])
    monkeypatch.setattr(evaluation, "ms_ssim", lambda images: next(parts))
    evaluator, data = digits(eval_samples=65, ms_ssim=True)
    metrics = evaluator.metrics(sampler_of(data.images))
    assert metrics["ms_ssim"] == pytest.approx(values[:64].mean().item(), rel=1e-6)
    assert "ms_ssim" in evaluator.protocol


# --- the common MMD ------------------------------------------------------------------------------


def test_common_mmd2_against_double_loops():
    real, fake, scale = randn(6, 2, seed=1), randn(5, 2, seed=2) + 1, randn(9, 2, seed=3)
    distances = [np.linalg.norm(scale[i] - scale[j]) for i in range(9) for j in range(i)]
    median = sorted(distances)[(len(distances) - 1) // 2]

    def k(a, b):
        d2 = ((a - b) ** 2).sum().item()
        return sum(math.exp(-d2 / (2 * (median * f) ** 2)) for f in (1 / 8, 1 / 4, 1 / 2, 1, 2))

    xx = np.mean([k(real[i], real[j]) for i in range(6) for j in range(6) if i != j])
    yy = np.mean([k(fake[i], fake[j]) for i in range(5) for j in range(5) if i != j])
    xy = np.mean([k(a, b) for a in real for b in fake])
    assert evaluation.median_distance(scale) == pytest.approx(median, rel=1e-12)
    assert common_mmd2(real, fake, median) == pytest.approx(xx - 2 * xy + yy, abs=1e-12)


# --- toys ----------------------------------------------------------------------------------------


@pytest.fixture
def metrics_of(monkeypatch):
    """toy_metrics with the MMD of 500 samples: of all the samples it takes seconds."""
    mmd2 = lambda real, fake, median: common_mmd2(real[:500], fake[:500], median)  # noqa: E731
    monkeypatch.setattr(evaluation, "common_mmd2", mmd2)
    return toy_metrics


def perfect(name, n):
    return datasets.draw_toy(name, n, 12345)


@pytest.mark.parametrize(
    ("name", "modes", "quality"),
    [("8gaussians", 8, 0.9889), ("25gaussians", 25, 0.9889), ("ring2d", 8, 0.9889),
     ("ring2d-sharp", 8, 0.9889), ("ring3d", 8, 0.9707), ("swissroll", 10, 0.9973)],
)  # fmt: skip
def test_a_perfect_sampler(name, modes, quality, metrics_of):
    """Its share within 3 standard deviations is that of as many normal coordinates as have noise: two, three
    (which needs the right rotation back), and one across the roll."""
    metrics = metrics_of(name, perfect(name, 10_000))
    assert abs(metrics["mmd"]) < 0.03
    assert metrics["high_quality"] == pytest.approx(quality, abs=0.002)
    assert metrics["modes"] == modes
    if name == "swissroll":
        assert metrics["curve_distance"] == pytest.approx(0.25 / 7.5 * math.sqrt(2 / math.pi), rel=0.03)


def drop_modes(name, keep):
    """A sampler that is perfect but for the modes not in keep (numbered as in toy_modes)."""
    points = perfect(name, 10_000)
    centres = datasets.toy_modes(name)[0] @ datasets.rotation(name)
    nearest = torch.cdist(points, centres).argmin(1)
    return points[torch.isin(nearest, torch.tensor(keep))][:1000]


@pytest.mark.parametrize(
    ("name", "keep"),
    [("8gaussians", [3]), ("ring3d", [3]), ("8gaussians", [0, 2, 4, 6]), ("25gaussians", list(range(12)))],
)
def test_a_sampler_of_some_of_the_modes_covers_these(name, keep, metrics_of):
    metrics = metrics_of(name, drop_modes(name, keep))
    assert metrics["modes"] == len(keep)
    assert metrics["high_quality"] > 0.95
    assert metrics["mmd"] > 0.1


@pytest.mark.parametrize(
    ("others", "last", "covered"), [(100, 20, 7), (100, 40, 8), (10, 9, 7), (10, 10, 8), (9, 9, 0)]
)
def test_a_mode_wants_ten_samples_and_a_quarter_of_its_fair_share(others, last, covered, metrics_of):
    """Seven modes of the first number, the eighth of the second; samples of no mode count for none."""
    centres = datasets.toy_modes("8gaussians")[0]
    fake = centres.repeat_interleave(torch.tensor([others] * 7 + [last]), 0)
    for fake in (fake, torch.cat([fake, torch.zeros(1000, 2)])):
        assert metrics_of("8gaussians", fake)["modes"] == covered


def test_quality_ends_at_3_standard_deviations(metrics_of):
    centres, std = datasets.toy_modes("25gaussians")
    for distance, share in ((2.9, 1.0), (3.1, 0.0)):
        fake = centres + torch.tensor([0.6, 0.8]) * distance * std
        assert metrics_of("25gaussians", fake)["high_quality"] == share


def test_a_swiss_roll_of_its_inner_half_covers_half(metrics_of):
    curve = datasets.swissroll_curve(torch.linspace(0, 0.499, 2000))
    metrics = metrics_of("swissroll", curve)
    assert metrics["modes"] == 5
    assert metrics["curve_distance"] < 0.002


# --- Evaluator -----------------------------------------------------------------------------------


def arguments(**kwargs):
    defaults = dict(dataset="digits", data_dir=".", image_size=None, batch_size=4, seed=0)
    defaults |= dict(eval_samples=5000, eval_features="pixels", eval_split="train", inception_weights=None)
    defaults |= dict(device="cpu", ms_ssim=False, eval_metrics="all", eval_only=False)
    return SimpleNamespace(**defaults | kwargs)


def digits(**kwargs):
    """Evaluator and data of the first 600 digits."""
    args = arguments(**kwargs)
    data = datasets.load(args, "train", (-1, 1), CPU, 0, 1)
    data.images = data.images[:600]
    return evaluator_of(args, data), data


def evaluator_of(args, data):
    evaluator = Evaluator(args)
    evaluator.set_reference(data)
    return evaluator


def in_range(images):
    return images.float() / 127.5 - 1


def sampler_of(images):
    return lambda n, i: in_range(images.repeat(2, 1, 1, 1)[i * evaluation.CHUNK :][:n])


def test_metrics_are_those_of_pixels_between_0_and_1():
    """Against the functions, of all digits in the evaluator's order and of their mirror images."""
    evaluator, data = digits()
    metrics = evaluator.metrics(sampler_of(data.images.flip(3)))
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    real, fake = (i.flatten(1).double() / 255 for i in (data.images[order], data.images.flip(3)))
    kid, error = kernel_distance(real, fake)
    expected = {"pixel_frechet": frechet_distance(real, fake), "pixel_kid": kid, "pixel_kid_se": error}
    expected["pixel_mmd"] = common_mmd2(real, fake, evaluation.median_distance(real))
    assert metrics == pytest.approx(expected, rel=1e-5)
    assert min(metrics.values()) > 0.001
    assert (evaluator.count, evaluator.protocol["samples"]) == (600, 600)
    assert "pixels" in evaluator.protocol["features"]


def test_samples_are_rounded_to_8_bits_first():
    """Less than half a grey level of noise, and what is beyond the range, change nothing."""
    evaluator, data = digits(eval_samples=500)
    clean = sampler_of(data.images)

    def disturbed(n, i):
        images = clean(n, i) + 0.45 / 127.5 * (2 * torch.rand(n, 1, 8, 8) - 1)
        return torch.where(images > 0.999, 3.0, images)

    assert evaluator.metrics(disturbed) == evaluator.metrics(clean)


def test_evaluation_neither_reads_nor_moves_the_global_generator():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    evaluator, data = digits(eval_samples=300)
    first = evaluator.metrics(sampler_of(data.images))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    assert digits(eval_samples=300)[0].metrics(sampler_of(data.images)) == first


def test_samples_are_asked_for_in_numbered_chunks():
    evaluator, data = digits()
    asked = []

    def sample(n, i):
        asked.append((n, i))
        return in_range(data.images[:n])

    evaluator.metrics(sample)
    assert asked == [(256, 0), (256, 1), (256, 2)]  # of the last, 88 are kept: batch norm wants a batch


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("dataset", ["digits", "8gaussians"])
def test_samples_that_are_not_finite_are_not_scored(dataset, value, tmp_path):
    """One value in one image of the last chunk; nothing is written of them either."""
    args = arguments(dataset=dataset, eval_samples=300)
    data = datasets.load(args, "train", (-1, 1), CPU, 0, 1)
    evaluator = evaluator_of(args, data)

    def sample(n, i):
        samples = torch.rand(n, *data.shape)
        samples[3].view(-1)[1] = value if i == (evaluator.count - 1) // evaluation.CHUNK else 0
        return samples

    for use in (evaluator.metrics, lambda sample: evaluator.save(tmp_path / "samples.npz", sample)):
        with pytest.raises(run.Failed, match="not finite"):
            use(sample)
    assert [*tmp_path.iterdir()] == []


def test_toys_are_measured_with_2000_samples(metrics_of):
    data = datasets.load(arguments(dataset="25gaussians"), "train", (-1, 1), CPU, 0, 1)
    evaluator = evaluator_of(arguments(dataset="25gaussians"), data)
    points = datasets.draw_toy("25gaussians", 2048, 77)
    metrics = evaluator.metrics(lambda n, i: points[i * n : (i + 1) * n])
    assert evaluator.count == evaluator.protocol["samples"] == 2000
    assert metrics == metrics_of("25gaussians", points[:2000])


# --- Inception's metrics -------------------------------------------------------------------------


def first_pixels(images):
    """In place of Inception, for uint8 images only: features are their first row, logits the next two."""
    assert images.dtype == torch.uint8
    return images[:, :, 0].flatten(1).float(), images[:, :, 1:3].flatten(1) / 64


METRICS = ("fid", "kid", "kid_se", "is", "is_std", "is_all", "precision", "recall")
PIXEL_METRICS = ("pixel_frechet", "pixel_kid", "pixel_kid_se", "pixel_mmd")


@pytest.fixture
def tiny(monkeypatch):
    """first_pixels for Inception; the list has the number of images of each call."""
    calls = []

    def extractor(images):
        calls.append(len(images))
        return first_pixels(images)

    monkeypatch.setattr(evaluation, "load_inception", lambda path, device: (extractor, "6726825d"))
    return calls


def test_metrics_of_inception_against_their_definitions(tiny, tmp_path):
    """FID and KID: above. IS and precision and recall: here, by loops, on the images the sampler gave."""
    evaluator, data = digits(eval_features="inception", eval_samples=300, data_dir=tmp_path)
    images = data.images[300:]
    metrics = evaluator.metrics(sampler_of(images))
    fake, logits = first_pixels(images)
    p = np.exp(logits.double().numpy())
    p /= p.sum(1, keepdims=True)
    scores = [math.exp((q * np.log(q / q.mean(0))).sum(1).mean()) for q in (p, *np.split(p, 10))]
    assert metrics["is_all"] == pytest.approx(scores[0], rel=1e-9)
    assert metrics["is"] == pytest.approx(np.mean(scores[1:]), rel=1e-9)
    assert metrics["is_std"] == pytest.approx(np.std(scores[1:]), rel=1e-6)
    fake, real = fake.double().numpy(), evaluator.reference["features"].double().numpy()

    def share_within(points, of):
        radius = [np.sort(np.linalg.norm(of - o, axis=1))[3] for o in of]  # the 0th is itself
        return np.mean([(np.linalg.norm(of - point, axis=1) <= radius).any() for point in points])

    assert 0.1 < metrics["precision"] < 0.99
    assert metrics["precision"] == pytest.approx(share_within(fake, real), abs=0.01)  # float32 there
    assert metrics["recall"] == pytest.approx(share_within(real, fake), abs=0.01)
    assert metrics["fid"] == pytest.approx(frechet_distance(torch.tensor(real), torch.tensor(fake)), rel=1e-9)


@pytest.mark.parametrize(
    ("features", "weights", "names"),
    [
        ("pixels", None, PIXEL_METRICS),
        ("inception", "6726825d", METRICS),
        ("inception", "0123abcd", tuple(f"{m.replace('fid', 'frechet')}[0123abcd]" for m in METRICS)),
    ],
)
def test_the_frechet_distance_alone_is_that_among_others(monkeypatch, tmp_path, features, weights, names):
    """Which is a FID by the published weights alone."""
    monkeypatch.setattr(evaluation, "load_inception", lambda path, device: (first_pixels, weights))
    monkeypatch.setattr(evaluation, "ms_ssim", lambda images: images[:, 0, 0, :1] / 255)
    found = {}
    for metrics in ("all", "fid"):
        options = dict(eval_features=features, eval_samples=20, ms_ssim=True, data_dir=tmp_path)
        evaluator, data = digits(eval_metrics=metrics, **options)
        found[metrics] = evaluator.metrics(sampler_of(data.images.flip(3)))
        assert ("kid" in evaluator.protocol) == (metrics == "all")
        assert (weights or "pixels") in evaluator.protocol["features"]
    assert tuple(found["all"]) == (*names, "ms_ssim")
    assert found["fid"] == pytest.approx({key: found["all"][key] for key in (names[0], "ms_ssim")}, rel=1e-9)
    assert len([*tmp_path.glob("evaluation/*.npz")]) == (4 if weights else 0)  # of different content


def test_for_the_frechet_distance_alone_no_features_are_kept(tiny, tmp_path):
    """Of 600 images, with 8 features and 16 logits each: numbers that are there at the end."""
    kept = {}
    for metrics in ("all", "fid"):
        evaluator, data = digits(eval_features="inception", eval_metrics=metrics, data_dir=tmp_path)
        chunks = data.images.split(evaluation.CHUNK)
        found, outputs = evaluator.extract(chunks.__getitem__, 600)
        tensors = (*vars(found).values(), *outputs, *evaluator.reference.values())
        kept[metrics] = sum(tensor.numel() for tensor in tensors if isinstance(tensor, torch.Tensor))
    statistics = 2 * (8 + 8 * 8)  # of both sides
    assert kept == {"fid": statistics, "all": statistics + 600 * (8 + 8 + 16)}


# --- the reference, cached -----------------------------------------------------------------------


def cached(tmp_path, **options):
    """Metrics of 300 digits against 280, and what is in the cache."""
    evaluator, data = digits(eval_features="inception", eval_samples=280, data_dir=tmp_path, **options)
    metrics = evaluator.metrics(sampler_of(data.images[300:]))
    return metrics, sorted(
        f for f in (tmp_path / "evaluation").glob("*") if f.name != "lock" and "floor" not in f.name
    )


def test_the_reference_is_computed_once(tiny, tmp_path):
    first, files = cached(tmp_path)
    assert sum(tiny) == 4 * 280  # the reference, twice as many of it for the floor, and the samples
    again, same_files = cached(tmp_path)
    assert sum(tiny) == 5 * 280
    assert again == first
    assert same_files == files
    assert [file.suffix for file in files] == [".npz"]


def test_the_cache_knows_what_it_depends_on(tiny, tmp_path, monkeypatch):
    """Other counts, other images of the same name and number, other weights: each has a file of its own."""
    cached(tmp_path)
    digits(eval_features="inception", eval_samples=281, data_dir=tmp_path)
    monkeypatch.setattr(evaluation, "load_inception", lambda path, device: (first_pixels, "0123abcd"))
    cached(tmp_path)
    flipped = datasets.load_images("digits", ".", None, "train").flip(3)
    monkeypatch.setattr(datasets, "load_images", lambda *args: flipped)
    assert len(cached(tmp_path)[1]) == 4


@pytest.mark.parametrize("damage", ["empty", "text", "truncated", "flipped", "pickle"])
def test_a_damaged_cache_is_computed_again(tiny, tmp_path, capsys, damage):
    first, (file,) = cached(tmp_path)
    content, marker = file.read_bytes(), tmp_path / "was-here"
    if damage == "pickle":
        attack = np.array([Malicious(os.mkdir, str(marker))])
        np.savez(file, **dict.fromkeys(("features", "mean", "covariance"), attack))
    else:
        flipped = bytearray(content)
        flipped[2000] ^= 255
        file.write_bytes(
            {"empty": b"", "text": b"<html>", "flipped": bytes(flipped)}.get(damage, content[:-500])
        )
    assert "warning" not in capsys.readouterr().out
    assert cached(tmp_path)[0] == first
    assert capsys.readouterr().out.count("warning") == 1
    assert cached(tmp_path)[0] == first
    assert "warning" not in capsys.readouterr().out
    assert not marker.exists()


def test_a_cache_that_cannot_be_written_is_done_without(tiny, tmp_path, capsys, monkeypatch):
    (tmp_path / "evaluation").write_text("a file where a folder should be")
    metrics = digits(eval_features="inception", eval_samples=280, data_dir=tmp_path)[0]
    assert capsys.readouterr().out.count("could not be written") == 2  # reference and floor
    assert metrics.reference is not None
    (tmp_path / "evaluation").unlink()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    assert cached(tmp_path)[1] == []  # no half of a file either
    assert "no space left" in capsys.readouterr().out


def test_the_reference_is_the_split_that_was_asked_for(tiny, tmp_path, monkeypatch):
    """Trained on all, compared with train: not with the images at hand. Asked for all: with these."""
    images = torch.randint(256, (80, 1, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(datasets, "load_images", lambda name, data_dir, size, split: images[:60])
    data = SimpleNamespace(name="digits", images=images, shape=(1, 8, 8), value_range=(0, 1), split="all")
    for split, count in (("train", 60), ("all", 80)):
        evaluator = evaluator_of(arguments(eval_split=split), data)
        assert evaluator.count == len(evaluator.reference["features"]) == count
        assert evaluator.protocol["reference"] == f"{count} of {split}"


def test_the_floor_is_what_held_out_images_have(tiny, tmp_path, monkeypatch, capsys):
    """Equally many of the other split against the reference, computed once; printed beside the number."""
    images = datasets.load_images("digits", ".", None, "train")
    splits = {"train": images[:600], "test": images[600:1000]}
    monkeypatch.setattr(datasets, "load_images", lambda name, data_dir, size, split: splits[split])
    data = SimpleNamespace(name="digits", images=images, shape=(1, 8, 8), value_range=(0, 1), split="all")
    for split, other, count in (("train", "test", 400), ("test", "train", 400)):
        args = arguments(eval_split=split, eval_features="inception", data_dir=tmp_path)
        first, again = evaluator_of(args, data), evaluator_of(args, data)
        real, fake = first.reference["features"], first_pixels(splits[other])[0]
        order = torch.randperm(len(fake), generator=torch.Generator().manual_seed(2))[: first.count]
        fake = fake[order]
        assert first.protocol["floor fid"] == pytest.approx(frechet_distance(real, fake), rel=1e-9)
        assert first.protocol["floor kid"] == pytest.approx(kernel_distance(real, fake)[0], rel=1e-9)
        assert first.protocol["floor"] == f"{count} images of the other split against the reference"
        assert again.protocol == first.protocol
    assert sum(tiny) == 600 + 400 + 400 + 400
    np.save(tmp_path / "fake.npy", splits["test"][:50].numpy())
    capsys.readouterr()
    options = dict(data_dir=str(tmp_path), json=str(tmp_path / "results.json"))
    metrics = evaluation.main(evaluation.Args("digits", str(tmp_path / "fake.npy"), **options))
    protocol, out = json.loads((tmp_path / "results.json").read_text())["protocol"], capsys.readouterr().out
    assert protocol["floor"] == "50 images of the other split against the reference"
    assert f"fid                  {metrics['fid']:.6g} ({protocol['floor fid']:.4g} of real images)\n" in out
    assert out.count("warning: of 50 samples") == 1


def test_the_floor_without_held_out_images_is_that_of_two_draws():
    """Which has about twice the noise of one: of all 1797 digits 0.036, of a copy of them 0.019."""
    data = datasets.load(arguments(), "train", (-1, 1), CPU, 0, 1)
    evaluator, generator = evaluator_of(arguments(), data), torch.Generator().manual_seed(5)
    x = data.images.flatten(1).double() / 255
    draws = [x[torch.randint(len(x), (len(x),), generator=generator)] for _ in range(4)]
    expected = (frechet_distance(*draws[:2]) + frechet_distance(*draws[2:])) / 2
    assert evaluator.protocol["floor pixel_frechet"] == pytest.approx(expected, rel=0.3)
    assert evaluator.protocol["floor pixel_frechet"] == pytest.approx(0.036, rel=0.3)
    assert abs(evaluator.protocol["floor pixel_kid"]) < 0.001
    assert (
        evaluator.protocol["floor"] == "1797 images against 1797, drawn from the reference with replacement"
    )


@pytest.mark.parametrize("split", ["train", None])
def test_copies_are_counted_and_drawn(tmp_path, monkeypatch, split):
    """100 samples, 30 of them training images with a little noise, and 70 real images that are not:
    all of the former, and 1 in 100 of the latter, are nearer than 1 in 100 test images; with a loop."""
    digits_ = datasets.load_images("digits", ".", None, "train")
    trained, test, fake = digits_[:800], digits_[800:1600], digits_[1600:1700].clone()
    copied = torch.randperm(800, generator=torch.Generator().manual_seed(1))[:30]
    fake[20:50] = trained[copied]
    fake[20:50, 0, 0, 0] += 9
    splits = {"train": trained, "test": test}

    def load_images(name, data_dir, size, which):
        if split is None:
            raise BadInput("no test images")
        return splits[which]

    monkeypatch.setattr(datasets, "load_images", load_images)
    data = SimpleNamespace(
        name="digits", images=trained, shape=(1, 8, 8), value_range=(0, 255), split="train"
    )
    evaluator = Evaluator(arguments(eval_only=True))
    evaluator.set_reference(data, 100)
    metrics = evaluator.metrics(lambda n, i: fake[:n])

    def nearest(x, y):
        x, y = (images.flatten(1).double().numpy() / 255 for images in (x, y))
        return np.array([min(np.sqrt(((a - b) ** 2).sum()) for b in y) for a in x])

    order = torch.randperm(800, generator=torch.Generator().manual_seed(0))
    real = nearest(test, trained) if split else nearest(trained[order[:400]], trained[order[400:]])
    near = nearest(fake, trained) < np.quantile(real, 0.01)
    assert near[20:50].all()
    assert metrics["pixel_copies"] == near.mean() < 0.36
    evaluator.save(tmp_path / "samples.npz", lambda n, i: fake[:n])
    assert np.array_equal(np.load(tmp_path / "samples.npz")["samples"], fake.permute(0, 2, 3, 1))
    picture = torch.tensor(np.asarray(Image.open(tmp_path / "copies.png")))[..., 0]
    tiles = picture[2:266, 2:530].reshape(4, 66, 8, 66).transpose(1, 2)[:, :, :64:8, :64:8]
    assert torch.equal(tiles[2], fake[:8, 0])  # any samples; above them those that are nearest
    assert all((trained[copied, 0] == tile).all((1, 2)).any() for tile in tiles[1])
    assert all((fake[20:50, 0] == tile).all((1, 2)).any() for tile in tiles[0])
    for sample, neighbour in zip(tiles[2], tiles[3]):
        distances = (trained[:, 0].double() - sample).square().sum((1, 2))
        assert (neighbour.double() - sample).square().sum() == distances.min()


def write_files(folder):
    """The README's lines, which write the samples.npz of a folder as PNG files."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    lines = re.search(r'\n    os\.makedirs\("out/0"\)\n(?:    .*\n)+', readme).group()
    lines = (
        textwrap.dedent(lines)
        .replace('"out', f'"{folder}/out')
        .replace('"samples.npz', f'"{folder}/samples.npz')
    )
    exec(lines, {"os": os, "np": np, "Image": Image})


@pytest.mark.parametrize("channels", [1, 3])
def test_samples_become_files(tmp_path, channels):
    """As torchvision's ImageFolder reads them: all in one class, ordered by their names."""
    images = np.random.default_rng(0).integers(0, 256, (12, 8, 6, channels), dtype=np.uint8)
    np.savez(tmp_path / "samples.npz", samples=images)
    write_files(tmp_path)
    found = torchvision.datasets.ImageFolder(tmp_path / "out")
    order = sorted(range(12), key=str)
    assert found.targets == [0] * 12
    for (image, _), expected in zip(found, images[order], strict=True):
        np.testing.assert_array_equal(image, np.broadcast_to(expected, (8, 6, 3)))


@pytest.mark.slow
def test_samples_are_read_by_torch_fidelity(random_inception, tmp_path):
    """As files; the distance is ours."""
    import torch_fidelity

    evaluator, data = digits(
        eval_features="inception", inception_weights=str(random_inception), eval_samples=40, data_dir=tmp_path
    )
    sample = sampler_of(data.images.flip(3))
    (frechet, *_) = evaluator.metrics(sample).values()
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:40]
    for name in ("real", "fake"):
        (tmp_path / name).mkdir()
    np.savez(tmp_path / "real" / "samples.npz", samples=data.images[order].permute(0, 2, 3, 1))
    evaluator.save(tmp_path / "fake" / "samples.npz", sample)
    for name in ("real", "fake"):
        write_files(tmp_path / name)
    options = dict(fid=True, feature_extractor_weights_path=str(random_inception), cuda=False, cache=False)
    folders = {"input1": str(tmp_path / "fake/out/0"), "input2": str(tmp_path / "real/out/0")}
    found = torch_fidelity.calculate_metrics(**folders, **options)
    assert found["frechet_inception_distance"] == pytest.approx(frechet, rel=1e-4)


def test_pixels_of_large_images_are_means():
    images = torch.randint(256, (3, 2, 64, 32), dtype=torch.uint8)
    (found,) = evaluation.pixels(images)
    expected = images.double().unflatten(2, (32, 2)).mean(3).flatten(1) / 255
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert torch.equal(evaluation.pixels(images[:, :, :32])[0], images[:, :, :32].flatten(1).float() / 255)


def test_a_run_ends_with_every_metric(tiny, tmp_path):
    """A script's whole training, with evaluation on (what stands for) Inception."""
    options = ["--width", "4", "--batch-size", "16", "--total-steps", "1", "--eval-every", "1"]
    options += ["--eval-samples", "10", "--eval-features", "inception", "--data-dir", str(tmp_path)]
    options += ["--ms-ssim", "--runs-dir", str(tmp_path / "runs")]
    metrics = mmd_gan_repulsive.train(run.parse(mmd_gan_repulsive.Args, options))
    (folder,) = (tmp_path / "runs").iterdir()
    results = json.loads((folder / "results.json").read_text())
    assert results["metrics"] == metrics
    assert set(metrics) == {*METRICS, "ms_ssim"}
    assert all(math.isfinite(value) for value in metrics.values())
    assert results["protocol"]["samples"] == 10
    curves = EventAccumulator(str(folder), {"tensors": 0}).Reload()
    assert {f"eval/{name}" for name in metrics} <= set(curves.Tags()["scalars"])
    protocol = curves.Tensors("eval/protocol/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert all(f"|{name}|{value}|" in protocol for name, value in results["protocol"].items())


def test_weights_are_missed_before_images_are_read(tmp_path, monkeypatch):
    """Converting LSUN takes an hour."""
    monkeypatch.setattr(datasets, "load", lambda *args: pytest.fail("images were read first"))
    options = ["--eval-features", "inception", "--inception-weights", str(tmp_path / "none.pth")]
    for script in Path(__file__).parent.parent.glob("*.py"):
        module = import_module(script.stem)
        with pytest.raises(BadInput, match=r"none\.pth is missing or damaged"):
            module.train(run.parse(module.Args, options))


# --- command line --------------------------------------------------------------------------------


def compare(*argv):
    """Run python -m common.evaluation in this process; return its exit status, None for an end."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["evaluation", *map(str, argv)])
        try:
            runpy.run_module("common.evaluation", run_name="__main__")
        except SystemExit as exit_:
            return exit_.code


@pytest.fixture
def sides(tmp_path):
    """Digits, the first 100 and the next 60, as folders and arrays."""
    images = datasets.load_images("digits", ".", None, "train")
    for name, part in (("a", images[:100]), ("b", images[100:160])):
        (tmp_path / name / "deeper").mkdir(parents=True)
        for i, image in enumerate(part):
            Image.fromarray(image[0].numpy()).save(tmp_path / name / "deeper" / f"{i:03d}.png")
        np.save(tmp_path / f"{name}.npy", part.numpy())
        np.savez(
            tmp_path / f"{name}.npz",
            labels=np.arange(3),
            images=part.permute(0, 2, 3, 1).expand(-1, -1, -1, 3),
        )
        np.savez(tmp_path / f"{name}-symmetric.npz", samples=in_range(part).numpy())
        np.save(tmp_path / f"{name}-unit.npy", part.numpy() / np.float32(255))
    return tmp_path


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_folders_arrays_and_data_sets_are_compared_alike(sides, capsys):
    """The same images in any form give the same numbers, which are those of the functions."""
    results, file = [], sides / "results.json"
    for end in ("", ".npz", ".npy", "-symmetric.npz", "-unit.npy"):
        pair = sides / f"a{end}", sides / f"b{end}"
        assert compare(*pair, "--features", "pixels", "--json", file, "--data-dir", sides / "data") is None
        results.append(json.loads(file.read_text()))
        assert f"{results[-1]['metrics']['pixel_frechet']:.6g}" in capsys.readouterr().out
    real, fake = (torch.from_numpy(np.load(sides / f"{n}.npy")).flatten(1).double() / 255 for n in "ab")
    expected = frechet_distance(real, fake)
    for channels, result in zip((3, 3, 1, 1, 1), results):  # grey in three channels counts three times
        assert result["metrics"]["pixel_frechet"] == pytest.approx(channels * expected, rel=1e-5)
        assert result["metrics"]["pixel_kid"] == pytest.approx(results[0]["metrics"]["pixel_kid"], rel=1e-4)
        assert (result["protocol"]["reference"], result["protocol"]["samples"]) == ("100 of REAL", 60)
    for end, distance in (("a.npz", 0), ("b", 3 * expected)):  # grey against colour
        mixed = sides / "a.npy", sides / end, "--data-dir", sides / "data"
        assert compare(*mixed, "--features", "pixels", "--json", file) is None
        found = json.loads(file.read_text())["metrics"]["pixel_frechet"]
        assert found == pytest.approx(distance, rel=1e-5, abs=1e-4)


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_a_data_set_against_an_array_with_ms_ssim(sides, capsys):
    options = ["--features", "pixels", "--ms-ssim", "--eval-samples", "20"]
    assert compare("digits", sides / "b.npy", *options) is None
    out = capsys.readouterr().out
    assert "20 of train" in out
    assert out.count("ms_ssim") == 2  # the number and what it is


def test_a_comparison_by_the_published_inception(tiny, tmp_path, capsys):
    """kid is both a number and what it is: each has its line."""
    metrics = evaluation.main(evaluation.Args("digits", "digits", eval_samples=30, data_dir=str(tmp_path)))
    out = capsys.readouterr().out
    assert tuple(metrics) == (*METRICS, "copies")
    assert f"\nkid                  {metrics['kid']:.6g} (" in out
    assert "\nkid                  unbiased" in out


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["nowhere", "digits"], "REAL nowhere"),
        (["digits", "nowhere.npy"], "FAKE nowhere.npy"),
        (["digits", "8gaussians"], "FAKE 8gaussians"),
        (["digits:test", "digits"], "REAL digits:test"),
        (["digits", "empty"], "FAKE empty"),
        (
            ["digits", "mixed"],
            "error: --image-size is None, but should be given: the images of mixed have sides",
        ),
        (["digits", "mixed", "--features", "inception", "--inception-weights", "no.pth"], "sides of 8 to 9"),
        (["digits", "broken"], "FAKE broken"),
        (["digits", "pickle.npy"], "FAKE pickle.npy"),
        (["digits", "flat.npy"], "(N, H, W, C)"),
        (["digits", "two.npz"], "(N, H, W, C)"),
        (["digits", "bright.npy"], "its values are from 255 to 255, but should be in [0, 1] or [-1, 1]"),
        (["digits", "beyond.npy"], "its values are from -1.01 to 1, but should be in [0, 1] or [-1, 1]"),
        (["constant.npy", "digits"], "the median distance between real images is 0.0, but should be above 0"),
        (["digits", "nan.npy"], "[-1, 1]"),
        (["digits", "whole.npy"], "[-1, 1]"),
        (["digits", "large.npy"], "FAKE is 9 x 9"),
        (["digits", "few.npy"], "the number of images of FAKE is 5"),
        (["digits", "bare"], "no image below bare"),
        (["digits", "digits", "--image-size", "0"], "--image-size is 0"),
        (["digits", "digits", "--eval-samples", "9"], "--eval-samples is 9"),
        (["digits", "digits", "--json", "nowhere/file.json"], "--json is nowhere/file.json"),
        (["digits", "digits", "--device", "nonsense"], "--device nonsense"),
        (["digits", "digits", "--features", "inception", "--inception-weights", "no.pth"], "no.pth"),
    ],
    ids=lambda value: value[1] + value[-1] if isinstance(value, list) else "",
)
def test_what_cannot_be_compared_is_one_line(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "bare", "mixed", "broken"):
        (tmp_path / name).mkdir()
    for side in (8, 9):
        Image.new("L", (side, side)).save(tmp_path / "mixed" / f"{side}.png")
    (tmp_path / "broken" / "a.png").write_bytes(b"no image")
    np.save("pickle.npy", np.array([Malicious(os.mkdir, str(tmp_path / "was-here"))], dtype=object))
    np.save("flat.npy", np.zeros((20, 64), np.uint8))
    np.savez("two.npz", *[np.zeros((20, 8, 8, 1), np.uint8)] * 2)
    np.save("bright.npy", np.full((20, 1, 8, 8), 255.0))
    np.save("beyond.npy", np.linspace(-1.01, 1, 20 * 64).reshape(20, 1, 8, 8))
    np.save("constant.npy", np.full((20, 1, 8, 8), 7, np.uint8))
    np.save("nan.npy", np.full((20, 1, 8, 8), np.nan))
    np.save("whole.npy", np.zeros((20, 1, 8, 8), np.int64))
    np.save("large.npy", np.zeros((20, 1, 9, 9), np.uint8))
    np.save("few.npy", np.zeros((5, 1, 8, 8), np.uint8))
    before = {*tmp_path.rglob("*")}
    assert compare(*argv, *([] if "--features" in argv else ["--features", "pixels"])) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert {*tmp_path.rglob("*")} == before  # nothing was written, and nothing in a file was run


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(-3e-8, 1, "[0, 1]"), (0, 1 + 1e-6, "[0, 1]"), (-1 - 1e-6, 1 + 1e-6, "[-1, 1]"), (-0.5, 0.5, "[-1, 1]")],
)
def test_the_range_of_floats_is_said(low, high, said, sides, capsys):
    """Values that leave [0, 1] or [-1, 1] by rounding are in it; the distance to the same images is 0."""
    images = np.load(sides / "a.npy") / 255.0
    np.save(sides / "floats.npy", images * (high - low) + low)
    expected = images if said == "[0, 1]" else (images * (high - low) + low + 1) / 2
    np.save(sides / "same.npy", (255 * expected).round().clip(0, 255).astype(np.uint8))
    options = ["--features", "pixels", "--json", sides / "results.json"]
    assert compare(sides / "same.npy", sides / "floats.npy", *options) is None
    results = json.loads((sides / "results.json").read_text())
    assert results["metrics"]["pixel_frechet"] == pytest.approx(0, abs=1e-5)
    assert results["protocol"]["fake"] == f"{sides / 'floats.npy'} (floats in {said})"
    assert f"(floats in {said})" in capsys.readouterr().out
    assert results["protocol"]["real"] == f"{sides / 'same.npy'} (8 bits)"


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
def test_results_that_cannot_be_written_are_one_line(sides, capsys):
    """The numbers are printed before."""
    arguments = sides / "a.npy", sides / "b.npy", "--features", "pixels"
    assert compare(*arguments, "--json", "/dev/full") == 1
    out, err = capsys.readouterr()
    assert "pixel_frechet" in out
    assert err.startswith("error: --json /dev/full could not be written")
    assert err.count("\n") == 1


def test_printing_to_a_closed_pipe_is_an_end_without_a_traceback(sides):
    command = [sys.executable, "-m", "common.evaluation", sides / "a.npy", sides / "b.npy", "--features"]
    root = Path(__file__).parent.parent
    with open("/dev/full", "w") as full:
        ended = subprocess.run([*command, "pixels"], cwd=root, stdout=full, stderr=subprocess.PIPE, text=True)
    assert ended.returncode == 1
    assert ended.stderr == "error: [Errno 28] No space left on device\n"


def test_evaluation_under_a_default_type_of_float64(tiny, sides, monkeypatch):
    """Other programs set it; the numbers are the same."""

    def found():
        metrics, pair = {}, (str(sides / "a.npy"), str(sides / "b.npy"))
        for features in ("pixels", "inception"):
            options = dict(eval_features=features, data_dir=str(sides), ms_ssim=True)
            metrics |= evaluation.main(evaluation.Args(*pair, **options))
        return metrics

    expected = found()
    torch.set_default_dtype(torch.float64)
    try:
        assert found() == pytest.approx(expected, rel=1e-4)
        assert toy_metrics("swissroll", perfect("swissroll", 2000))["modes"] == 10
    finally:
        torch.set_default_dtype(torch.float32)


def test_ms_ssim_of_points_is_refused():
    with pytest.raises(BadInput, match="--ms-ssim is on, but should be off"):
        Evaluator(arguments(dataset="8gaussians", ms_ssim=True))


# --- several processes ---------------------------------------------------------------------------


def evaluate_in_process(rank, world_size, folder, port="0"):
    """What each of several processes does: three rounds, the reference computed, cached, and of pixels."""
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    evaluation.load_inception = lambda path, device: (first_pixels, "6726825d")
    found = []
    for features in ("inception", "inception", "pixels"):
        evaluator, data = digits(eval_features=features, data_dir=folder / f"data-{world_size}")
        sample = sampler_of(data.images.flip(3))
        metrics, features = evaluator.metrics(sample), evaluation.from_first(lambda e=evaluator: e.features)
        found.append((metrics, features, len(evaluator.all_samples(sample))))
    torch.save(found, folder / f"{world_size}-{rank}.pt")


@pytest.mark.slow
def test_two_processes_find_what_one_does(tmp_path):
    """600 images are three chunks: the second process has one, and repeats the last."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "load_inception", None)
        patch.setattr(os, "environ", dict(os.environ))
        evaluate_in_process(0, 1, tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.multiprocessing.spawn(evaluate_in_process, (2, tmp_path, port), 2)
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    for a, b, c in zip(one, first, second, strict=True):
        assert a[0] == b[0] == c[0]
        assert a[2] == b[2] == c[2] == 600
        for mine, theirs, others in zip(a[1], b[1], c[1], strict=True):
            assert torch.equal(mine, theirs)
            assert torch.equal(mine, others)
    assert len([*(tmp_path / "data-2" / "evaluation").glob("*.npz")]) == 2


# --- Inception -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def random_inception(tmp_path_factory):
    """A weights file of the right form, its convolutions at random."""
    import torch_fidelity.feature_extractor_inceptionv3 as library

    file = tmp_path_factory.mktemp("weights") / "random.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(library.FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = library.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.nn.init.normal_(network.fc.weight, std=0.05)
    torch.save(network.state_dict(), file)
    return file


def test_other_weights_are_accepted_with_a_warning(random_inception, capsys):
    network, weights = evaluation.load_inception(str(random_inception), CPU)
    assert weights == hashlib.sha256(random_inception.read_bytes()).hexdigest()[:8]
    assert "no FID" in capsys.readouterr().out
    images = torch.randint(256, (2, 1, 8, 8), dtype=torch.uint8)
    features, logits = network(images)
    assert torch.equal(features, network(images.expand(-1, 3, -1, -1))[0])
    assert (features.shape, logits.shape) == ((2, 2048), (2, 1008))
    assert (features[0] - features[1]).norm() > 1e-3 * features.norm()


@pytest.mark.slow
def test_distances_on_other_weights_are_named_after_them(random_inception, tmp_path):
    options = dict(eval_features="inception", inception_weights=str(random_inception), eval_samples=12)
    evaluator, data = digits(data_dir=tmp_path, **options)
    weights = hashlib.sha256(random_inception.read_bytes()).hexdigest()[:8]
    same = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:12]  # the reference's
    near = evaluator.metrics(sampler_of(data.images[same]))
    far = evaluator.metrics(lambda n, i: torch.rand(n, 1, 8, 8) * 2 - 1)
    assert set(near) == {f"{name.replace('fid', 'frechet')}[{weights}]" for name in METRICS}
    assert far[f"frechet[{weights}]"] > 10 * abs(near[f"frechet[{weights}]"])
    assert near[f"precision[{weights}]"] == near[f"recall[{weights}]"] == 1 > far[f"precision[{weights}]"]


@pytest.mark.slow
def test_a_run_on_a_weights_file(random_inception, tmp_path):
    """A script's whole training with evaluation on a real Inception network, offline."""
    options = ["--width", "4", "--batch-size", "16", "--total-steps", "1", "--eval-every", "1"]
    options += ["--eval-samples", "10", "--eval-features", "inception", "--data-dir", str(tmp_path)]
    options += ["--inception-weights", str(random_inception), "--runs-dir", str(tmp_path / "runs")]
    module = mmd_gan_repulsive
    metrics = module.train(run.parse(module.Args, options))
    assert len(metrics) == len(METRICS)
    assert all(math.isfinite(value) for value in metrics.values())


def refused_weights(path):
    with pytest.raises(BadInput) as caught:
        evaluation.load_inception(path and str(path), CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert "--inception-weights" in message
    return message


def test_weights_that_cannot_be_downloaded_are_refused(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = refused_weights(None)
    assert "no network" in message
    assert evaluation.INCEPTION_URL in message


@pytest.mark.parametrize("damage", ["missing", "empty", "text", "truncated"])
def test_damaged_weights_are_refused(random_inception, tmp_path, damage):
    file = tmp_path / "weights.pth"
    content = {"empty": b"", "text": b"<html>not found</html>"}
    if damage != "missing":
        file.write_bytes(content.get(damage, random_inception.read_bytes()[:1_000_000]))
    assert str(file) in refused_weights(file)


@pytest.mark.parametrize("old_format", [False, True])
def test_weights_that_would_run_code_do_not(tmp_path, old_format):
    file, marker = tmp_path / "weights.pth", tmp_path / "was-here"
    torch.save({"a": Malicious(os.mkdir, str(marker))}, file, _use_new_zipfile_serialization=not old_format)
    refused_weights(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # it would have


# --- features of one's own -----------------------------------------------------------------------


class Features(torch.nn.Module):
    """Resizing, a convolution, batch norm, a block of a transformer: what real networks have."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.norm = torch.nn.BatchNorm2d(8)
        self.block = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)

    def forward(self, images):
        images = torch.nn.functional.interpolate(
            images.float() / 255, (16, 16), mode="bicubic", antialias=True, align_corners=False
        )
        tokens = self.norm(self.conv(images - 0.5)).relu().flatten(2).mT
        return self.block(tokens).mean(1)


@pytest.fixture(scope="module")
def exported_features(tmp_path_factory):
    """A network, its file, and one of whose operators PyTorch's core set has not all."""
    torch.manual_seed(0)
    network = Features().eval()
    torch.nn.init.uniform_(network.norm.running_mean)
    sizes = ({0: torch.export.Dim("n"), 2: torch.export.Dim("h"), 3: torch.export.Dim("w")},)
    images = torch.zeros(2, 3, 8, 9, dtype=torch.uint8)
    program = torch.export.export(network, (images,), dynamic_shapes=sizes)
    folder = tmp_path_factory.mktemp("features")
    torch.export.save(program, folder / "raw.pt2")
    torch.export.save(program.run_decompositions(), folder / "network.pt2")
    return network, folder / "network.pt2", folder / "raw.pt2"


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 8, 8), (64, 3, 20, 12)])
def test_an_exported_network_gives_its_own_features(exported_features, shape):
    images = torch.randint(256, shape, dtype=torch.uint8)
    (found,) = exported.Network(exported_features[1], CPU)(images)
    with torch.no_grad():
        torch.testing.assert_close(found, exported_features[0](images), rtol=1e-5, atol=1e-6)


def test_metrics_of_features_of_ones_own_are_named_after_the_file(exported_features, tmp_path):
    """All against the functions, on the features of the network itself; grey images are made colour."""
    network, file, _ = exported_features
    evaluator, data = digits(eval_features=str(file), data_dir=tmp_path)
    metrics = evaluator.metrics(sampler_of(data.images.flip(3)))
    tag = hashlib.sha256(file.read_bytes()).hexdigest()[:8]
    names = ("frechet", "kid", "kid_se", "precision", "recall", "cmmd")
    assert tuple(metrics) == tuple(f"{name}[{tag}]" for name in names)
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pair = data.images[order], data.images.flip(3)
        real, fake = (network(images.expand(-1, 3, -1, -1)) for images in pair)
    assert metrics[f"frechet[{tag}]"] == pytest.approx(frechet_distance(real, fake), rel=1e-3)
    assert metrics[f"kid[{tag}]"] == pytest.approx(kernel_distance(real, fake)[0], rel=1e-3)
    assert metrics[f"cmmd[{tag}]"] == pytest.approx(evaluation.cmmd(real, fake), rel=1e-3)
    assert f"network.pt2, 8, file {tag}" in evaluator.protocol["features"]
    assert len([*tmp_path.glob("evaluation/*.npz")]) == 2
    alone, _ = digits(eval_features=str(file), data_dir=tmp_path, eval_metrics="fid")
    assert tuple(alone.metrics(sampler_of(data.images))) == (f"frechet[{tag}]",)


def test_cmmd_against_a_double_loop():
    """Features of size 1, as CLIP's, which sigma 10 makes nearly equal: M^2 is 1e-6 of the kernel's value."""
    x, y = (torch.nn.functional.normalize(randn(n, 6, seed=n) + n / 20) for n in (12, 9))

    def mean(a, b):
        return (
            math.fsum(math.expm1(-((p - q) ** 2).sum().item() / 200) for p in a for q in b) / len(a) / len(b)
        )

    expected = 1000 * (mean(x, x) - 2 * mean(x, y) + mean(y, y))
    assert 0 < expected < 5
    assert evaluation.cmmd(x.float(), y.float()) == pytest.approx(expected, rel=1e-5)


def changed(file, part, change):
    """A copy of a file of torch.export, of which one part, found by the end of its name, is changed."""
    result = file.with_name("changed.pt2")
    with zipfile.ZipFile(file) as old, zipfile.ZipFile(result, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            new.writestr(name, change(content) if name.endswith(part) else content)
    return result


def test_nothing_in_an_exported_file_is_run(exported_features, tmp_path, monkeypatch):
    """Where torch.export.load unpickles, and evaluates: sample inputs, pickled weights, sizes, guards."""
    monkeypatch.chdir(tmp_path)
    file, attack = exported_features[1], Malicious(os.mkdir, str(tmp_path / "was-here"))
    pickled = io.BytesIO()
    torch.save(attack, pickled)
    code = '__import__("os").mkdir("was-here")'

    def poisoned(content):
        model = json.loads(content)
        model["guards_code"] = [code]
        model["range_constraints"] = {code: {"min_val": 0, "max_val": None}}
        for value in model["graph_module"]["graph"]["sym_int_values"].values():
            value["as_expr"]["expr_str"] = code
        return json.dumps(model).encode()

    harmless = changed(file, "sample_inputs/model.pt", lambda content: pickled.getvalue())
    harmless = harmless.rename(tmp_path / "harmless.pt2")
    images = torch.randint(256, (4, 3, 8, 8), dtype=torch.uint8)
    expected = exported.Network(file, CPU)(images)[0]
    assert torch.equal(exported.Network(harmless, CPU)(images)[0], expected)
    assert torch.equal(exported.Network(changed(harmless, "model.json", poisoned), CPU)(images)[0], expected)
    assert not (tmp_path / "was-here").exists()
    with pytest.raises(Exception):  # noqa: B017, PT011, whatever it says of it
        torch.export.load(harmless)
    assert (tmp_path / "was-here").exists()  # it would have


@pytest.mark.parametrize(
    ("part", "old", "new", "message"),
    [
        ("models/model.json", "torch.ops.aten.relu.default", "torch.ops.aten.from_file.default", "from_file"),
        ("models/model.json", "torch.ops.aten.relu.default", "os.system", "it calls os.system"),
        (
            "models/model.json",
            "torch.ops.aten.relu.default",
            "torch.ops.aten.__init__.mro",
            "no attribute",
        ),
        ("models/model.json", "torch.ops.aten.relu.default", "_operator.call", "it calls _operator.call"),
        ("models/model.json", '"major": 8', '"major": 9', "its format has version 9, not 8"),
        ("weights_config.json", '"use_pickle": false', '"use_pickle": true', "is pickled"),
        ("weights_config.json", '"as_int": 8}', '"as_int": 8000}', "out of bounds"),
    ],
)
def test_exported_files_that_would_do_more_are_refused(exported_features, part, old, new, message):
    def change(content):
        assert old.encode() in content
        return content.replace(old.encode(), new.encode())

    file = changed(exported_features[1], part, change)
    with pytest.raises(BadInput, match=re.escape(message)) as caught:
        Evaluator(arguments(eval_features=str(file)))
    assert str(caught.value).startswith(f"--eval-features {file} cannot be used")
    assert "\n" not in str(caught.value)


def test_what_is_no_network_for_the_images_is_refused(exported_features, tmp_path):
    (tmp_path / "text.pt2").write_text("no network")
    flipped = bytearray(exported_features[1].read_bytes())
    flipped[len(flipped) // 8] ^= 1
    (tmp_path / "flipped.pt2").write_bytes(flipped)
    raw = exported_features[2]
    cases = {"nowhere.pt2": "inception, pixels, or a file", str(raw): "export run_decompositions()"}
    cases |= {str(tmp_path / name): "cannot be used" for name in ("text.pt2", "flipped.pt2")}
    for name, message in cases.items():
        with pytest.raises(BadInput, match=re.escape(message)):
            Evaluator(arguments(eval_features=name))
    program = torch.export.export(torch.nn.ReLU(), (torch.zeros(2, 3, 8, 8, dtype=torch.uint8),))
    torch.export.save(program.run_decompositions(), tmp_path / "images.pt2")
    with pytest.raises(
        BadInput, match=re.escape("the network's output is (1, 3, 8, 8), but should be (1, d)")
    ):
        digits(eval_features=str(tmp_path / "images.pt2"))
