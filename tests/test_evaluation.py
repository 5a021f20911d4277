"""Distances against closed forms and torch-fidelity; toys' measures on samplers whose faults are known."""

import hashlib
import math
import os
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch

from common import datasets, evaluation
from common.evaluation import Evaluator, common_mmd2, frechet_distance, kernel_distance, toy_metrics
from common.run import BadInput

CPU = torch.device("cpu")


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- Frechet distance ----------------------------------------------------------------------------


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


def test_frechet_distance_of_singular_covariances():
    """tr (C_x C_y)^(1/2) is the nuclear norm of X Y' / sqrt((n-1)(m-1)), X and Y centred: n, m < d."""
    n, m, d = 12, 9, 40
    x, y = randn(n, d, seed=1), 2 * randn(m, d, seed=2) + 1
    a = (x - x.mean(0)).numpy() / math.sqrt(n - 1)
    b = (y - y.mean(0)).numpy() / math.sqrt(m - 1)
    cross = np.linalg.norm(a @ b.T, "nuc")
    mean = ((x.mean(0) - y.mean(0)) ** 2).sum().item()
    expected = mean + (a * a).sum() + (b * b).sum() - 2 * cross
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("n", [100, 10])
def test_frechet_distance_of_a_set_with_itself_is_0(n):
    x = randn(n, 20, seed=1)
    assert abs(frechet_distance(x, x.flip(0))) < 1e-5  # root of a rounding of 1e-16 per null direction


def test_frechet_distance_is_computed_in_float64():
    """A mean of 1000 and a spread of 0.01 in float32."""
    x = (1000 + 0.01 * randn(100, 5, seed=1)).float()
    y = (1000 + 0.02 * randn(100, 5, seed=2)).float()
    expected = frechet_distance((x.double() - 1000) * 100, (y.double() - 1000) * 100) / 1e4
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-5)


# --- kernel distance (KID) -----------------------------------------------------------------------


def test_kernel_distance_of_constant_features():
    """Whatever the subsets: k(a, a) - 2 k(a, b) + k(b, b) with k = (<a, b> / d + 1)^3."""
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])
    value = kernel_distance(a.expand(10, 2), b.expand(8, 2), subsets=3)
    assert value == pytest.approx(3.5**3 - 2 * 0.0**3 + 1.5**3, rel=1e-12)


def test_kernel_distance_agrees_with_torch_fidelity():
    """Over many subsets it tends to the estimate from all, here torch-fidelity's."""
    from torch_fidelity.metric_kid import kernel_mmd

    x, y = randn(40, 6, seed=1), randn(40, 6, seed=2) + 0.5
    options = dict(kid_kernel="poly", kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None)
    expected = kernel_mmd(x.numpy(), y.numpy(), **options, kid_kernel_poly_coef0=1.0)
    assert kernel_distance(x, y, subsets=2000) == pytest.approx(expected, rel=0.03)


def test_kernel_distance_of_gaussians_has_its_closed_form():
    """N(0, I) and N(0.5, I) in 8 dimensions: 1.117188."""
    d, a = 8, 8 * 0.25
    moments = (1 + a / d) ** 3 + 3 * (1 + a / d) * (2 * a + d) / d**2 + 6 * a / d**3
    closed_form = (1 + 3 / d) + moments - 2 * (1 + 3 * (a + d) / d**2)
    assert closed_form == pytest.approx(1.117188, abs=1e-6)
    values = [kernel_distance(randn(4000, d, seed=s), randn(4000, d, seed=s + 9) + 0.5, 8) for s in (1, 2)]
    assert np.mean(values) == pytest.approx(closed_form, rel=0.06)


def test_kernel_distance_is_0_on_average_where_sets_agree():
    values = [kernel_distance(randn(60, 4, seed=2 * s), randn(60, 4, seed=2 * s + 1), 5) for s in range(60)]
    assert abs(np.mean(values)) < 4 * np.std(values) / math.sqrt(60)
    assert min(values) < 0 < max(values)


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
    assert common_mmd2(real, fake, scale) == pytest.approx(xx - 2 * xy + yy, abs=1e-12)


# --- toys ----------------------------------------------------------------------------------------


def perfect(name, n):
    return datasets.draw_toy(name, n, 12345)


@pytest.fixture
def without_mmd(monkeypatch):
    """For samples too many for a Gram matrix."""
    monkeypatch.setattr(evaluation, "common_mmd2", lambda *features: 0.0)


@pytest.mark.parametrize("name", datasets.TOYS)
def test_a_perfect_sampler_has_no_mmd(name):
    assert abs(toy_metrics(name, perfect(name, 1000))["mmd"]) < 0.005


@pytest.mark.parametrize(("name", "modes"), [("8gaussians", 8), ("25gaussians", 25), ("ring2d", 8)])
@pytest.mark.usefixtures("without_mmd")
def test_a_perfect_sampler_of_gaussians_in_the_plane(name, modes):
    """Share within 3 standard deviations: 1 - e^(-4.5) = 98.89 %; ring2d's neighbours overlap a little."""
    metrics = toy_metrics(name, perfect(name, 10_000))
    assert metrics["high_quality"] == pytest.approx(1 - math.exp(-4.5), abs=0.005)
    assert metrics["modes"] == modes


@pytest.mark.usefixtures("without_mmd")
def test_a_perfect_sampler_of_ring3d():
    """Three normal coordinates within 3 standard deviations: 97.07 %, which needs the right rotation back."""
    metrics = toy_metrics("ring3d", perfect("ring3d", 10_000))
    assert metrics["high_quality"] == pytest.approx(0.9707, abs=0.006)
    assert metrics["modes"] == 8


@pytest.mark.usefixtures("without_mmd")
def test_a_perfect_sampler_of_the_swiss_roll():
    """Its distance to the curve is that of one normal coordinate: noise sqrt(2 / pi)."""
    metrics = toy_metrics("swissroll", perfect("swissroll", 10_000))
    assert metrics["curve_distance"] == pytest.approx(0.25 / 7.5 * math.sqrt(2 / math.pi), rel=0.03)
    assert metrics["high_quality"] > 0.99
    assert metrics["modes"] == 10


def drop_modes(name, keep):
    """A sampler that is perfect but for the modes not in keep (numbered as in toy_modes)."""
    points = perfect(name, 10_000)
    centres = datasets.toy_modes(name)[0] @ datasets.rotation(name)
    nearest = torch.cdist(points, centres).argmin(1)
    return points[torch.isin(nearest, torch.tensor(keep))][:1000]


@pytest.mark.parametrize("name", ["8gaussians", "25gaussians", "ring3d"])
def test_a_sampler_collapsed_to_one_mode_covers_one(name):
    metrics = toy_metrics(name, drop_modes(name, [3]))
    assert metrics["modes"] == 1
    assert metrics["high_quality"] > 0.95
    assert metrics["mmd"] > 0.1


@pytest.mark.parametrize(
    ("name", "keep"),
    [("8gaussians", [0, 2, 4, 6]), ("8gaussians", [0, 1, 2, 3]), ("25gaussians", list(range(12)))],
)
def test_a_sampler_of_half_of_the_modes_covers_half(name, keep):
    assert toy_metrics(name, drop_modes(name, keep))["modes"] == len(keep)


def test_a_mode_with_under_a_quarter_of_its_fair_share_is_not_covered():
    """Seven modes with 100 each; the eighth with 20 does not count, with 40 it does."""
    centres = datasets.toy_modes("8gaussians")[0]
    for last, covered in ((20, 7), (40, 8)):
        fake = centres.repeat_interleave(torch.tensor([100] * 7 + [last]), 0)
        assert toy_metrics("8gaussians", fake)["modes"] == covered


def test_quality_ends_at_3_standard_deviations():
    centres, std = datasets.toy_modes("25gaussians")
    for distance, share in ((2.9, 1.0), (3.1, 0.0)):
        fake = centres + torch.tensor([0.6, 0.8]) * distance * std
        assert toy_metrics("25gaussians", fake)["high_quality"] == share


def test_a_swiss_roll_of_its_inner_half_covers_half():
    curve = datasets.swissroll_curve(torch.linspace(0, 0.499, 2000))
    metrics = toy_metrics("swissroll", curve)
    assert metrics["modes"] == 5
    assert metrics["curve_distance"] < 0.002


def test_samples_off_the_swiss_roll_have_their_distance_to_it():
    """The origin: at the radius of the roll's inner end or farther from every point."""
    points = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)) * 0.01
    expected = torch.cdist(points, datasets.swissroll_curve(torch.linspace(0, 1, 20_000))).min(1)[0].mean()
    metrics = toy_metrics("swissroll", points)
    assert metrics["curve_distance"] == pytest.approx(expected.item(), rel=1e-3)
    assert metrics["high_quality"] == 0


@pytest.mark.usefixtures("without_mmd")
def test_a_standard_normal_sampler_of_8gaussians_is_of_low_quality():
    """Its share is the density at the radius times the area of the discs: 0.26 %."""
    radius, std = 2 / 1.414, 0.02 / 1.414
    share = 8 * math.pi * (3 * std) ** 2 * math.exp(-(radius**2) / 2) / (2 * math.pi)
    metrics = toy_metrics("8gaussians", randn(100_000, 2, seed=1).float())
    assert metrics["high_quality"] == pytest.approx(share, rel=0.3)


# --- Evaluator -----------------------------------------------------------------------------------


def arguments(**kwargs):
    defaults = dict(dataset="digits", data_dir=".", image_size=None, batch_size=4, seed=0)
    defaults |= dict(sample_bn="running", ema_decay=0.0)
    defaults |= dict(eval_samples=5000, eval_features="pixels", eval_split="train", inception_weights=None)
    return SimpleNamespace(**defaults | kwargs)


def digits(**kwargs):
    """Evaluator and data of the first 600 digits."""
    args = arguments(**kwargs)
    data = datasets.load(args, "train", (-1, 1), CPU, 0, 1)
    data.images = data.images[:600]
    return Evaluator(args, data), data


def in_range(images):
    return images.float() / 127.5 - 1


def sampler_of(images):
    return lambda n, i: in_range(images.repeat(2, 1, 1, 1)[i * evaluation.CHUNK :][:n])


def test_real_digits_against_themselves():
    evaluator, data = digits()
    metrics = evaluator.metrics(sampler_of(data.images))
    assert evaluator.count == 600
    assert set(metrics) == {"pixel_frechet", "pixel_kid", "pixel_mmd"}
    assert abs(metrics["pixel_frechet"]) < 1e-5
    assert abs(metrics["pixel_kid"]) < 0.001
    assert abs(metrics["pixel_mmd"]) < 0.02  # of order 2 k(0) / 600: pairs of equal images count in k_xy only


def test_metrics_are_those_of_pixels_between_0_and_1():
    """Against the reference statistics computed here from all digits and the rows of a shifted copy."""
    evaluator, data = digits()
    metrics = evaluator.metrics(sampler_of(data.images.flip(3)))
    real, fake = (i.flatten(1).double() / 255 for i in (data.images, data.images.flip(3)))
    assert metrics["pixel_frechet"] == pytest.approx(frechet_distance(real, fake), rel=1e-6)
    assert metrics["pixel_frechet"] > 0.5


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


def test_toys_are_measured_with_2000_samples():
    data = datasets.load(arguments(dataset="25gaussians"), "train", (-1, 1), CPU, 0, 1)
    evaluator = Evaluator(arguments(dataset="25gaussians"), data)
    points = datasets.draw_toy("25gaussians", 2048, 77)
    metrics = evaluator.metrics(lambda n, i: points[i * n : (i + 1) * n])
    assert evaluator.count == evaluator.protocol["samples"] == 2000
    assert metrics == toy_metrics("25gaussians", points[:2000])


def test_the_protocol_says_what_was_compared():
    protocol = digits(eval_samples=300)[0].protocol
    assert protocol["reference"] == "300 of train"
    assert protocol["samples"] == 300
    assert "pixels" in protocol["features"]


@pytest.mark.parametrize(
    ("flag", "options"), [("--eval-split", {"eval_split": "test"}), ("--eval-samples", {"eval_samples": 3})]
)
def test_what_digits_do_not_have_is_refused(flag, options):
    with pytest.raises(BadInput, match=f"^{flag} .*") as caught:
        digits(**options)
    assert "\n" not in str(caught.value)


# --- Inception -----------------------------------------------------------------------------------


class FirstPixels(torch.nn.Module):
    """In place of Inception: takes uint8 RGB images only, and returns their first row."""

    def forward(self, images):
        assert images.dtype == torch.uint8
        assert images.shape[1:] == (3, 8, 8)
        return (images[:, :, 0].flatten(1),)


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ("6726825d", ("fid", "kid", "inception_mmd")),
        ("0123abcd", ("frechet[0123abcd]", "kid[0123abcd]", "mmd[0123abcd]")),
    ],
)
def test_only_the_published_weights_give_a_fid(monkeypatch, weights, names):
    monkeypatch.setattr(evaluation, "load_inception", lambda path, device: (FirstPixels(), weights))
    evaluator, data = digits(eval_features="inception", eval_samples=50)
    metrics = evaluator.metrics(sampler_of(data.images[50:]))
    assert tuple(metrics) == names
    assert weights in evaluator.protocol["features"]
    assert all(math.isfinite(value) for value in metrics.values())


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
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    features = network(images)[0]
    assert features.shape == (2, 2048)
    assert (features[0] - features[1]).norm() > 1e-3 * features.norm()


@pytest.mark.slow
def test_distances_on_other_weights_are_named_after_them(random_inception):
    options = dict(eval_features="inception", inception_weights=str(random_inception), eval_samples=4)
    evaluator, data = digits(**options)
    weights = hashlib.sha256(random_inception.read_bytes()).hexdigest()[:8]
    same = torch.randperm(600, generator=torch.Generator().manual_seed(0))[:4]  # the reference's
    near = evaluator.metrics(sampler_of(data.images[same]))
    far = evaluator.metrics(lambda n, i: torch.rand(n, 1, 8, 8) * 2 - 1)
    assert set(near) == {f"frechet[{weights}]", f"kid[{weights}]", f"mmd[{weights}]"}
    assert far[f"frechet[{weights}]"] > 10 * abs(near[f"frechet[{weights}]"])


def refused_weights(path):
    with pytest.raises(BadInput) as caught:
        evaluation.load_inception(path and str(path), CPU)
    message = str(caught.value)
    assert "\n" not in message
    assert "--inception-weights" in message
    return message


def test_missing_weights_are_refused(tmp_path):
    assert "nowhere.pth" in refused_weights(tmp_path / "nowhere.pth")


def test_weights_that_cannot_be_downloaded_are_refused(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    message = refused_weights(None)
    assert "no network" in message
    assert evaluation.INCEPTION_URL in message


@pytest.mark.parametrize("damage", ["empty", "text", "truncated"])
def test_damaged_weights_are_refused(random_inception, tmp_path, damage):
    file = tmp_path / "weights.pth"
    content = {"empty": b"", "text": b"<html>not found</html>"}
    file.write_bytes(content.get(damage, random_inception.read_bytes()[:1_000_000]))
    assert str(file) in refused_weights(file)


class Malicious:
    """Loaded by an unwary reader, it makes a folder."""

    def __init__(self, folder):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("old_format", [False, True])
def test_weights_that_would_run_code_do_not(tmp_path, old_format):
    file, marker = tmp_path / "weights.pth", tmp_path / "was-here"
    torch.save({"a": Malicious(marker)}, file, _use_new_zipfile_serialization=not old_format)
    refused_weights(file)
    assert not marker.exists()
    torch.load(file, weights_only=False)
    assert marker.exists()  # it would have
