"""Toys at the scales of their papers' code, image files in their original formats, and refusals."""

import hashlib
import math
import os
import pickle
import signal
import struct
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import lmdb
import numpy as np
import pytest
import torch
import torchvision
from conftest import Malicious
from PIL import EpsImagePlugin, Image, ImageOps

from common import datasets, evaluation
from common.run import BadInput, Failed

CPU = torch.device("cpu")


def load(dataset, data_dir=".", image_size=None, batch_size=4, seed=0, split="train", **kwargs):
    args = SimpleNamespace(
        dataset=dataset, data_dir=str(data_dir), image_size=image_size, batch_size=batch_size, seed=seed
    )
    options = dict(value_range=(-1, 1), device=CPU, rank=0, world_size=1) | kwargs
    return datasets.load(args, split, **options)


def refusal(*args, **kwargs):
    """The message with which load refuses; always one line."""
    with pytest.raises(BadInput) as caught:
        load(*args, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # which is the data_dir of load

    def fail(*args, **kwargs):
        raise URLError("no network")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", fail)


# --- toys ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modes", "noise"),
    [
        ("8gaussians", 8, 0.02 / 1.414),
        ("25gaussians", 25, 0.05 / 2.828),
        ("ring2d", 8, 0.2),
        ("ring2d-sharp", 8, 0.01),
    ],
)
def test_noise_around_every_mode_has_its_standard_deviation(name, modes, noise):
    """And the modes are equally likely, and sit where toy_modes says."""
    points = datasets.draw_toy(name, 50_000, 0)
    centres = datasets.toy_modes(name)[0]
    nearest = torch.cdist(points, centres).argmin(1)
    share = torch.bincount(nearest, minlength=modes) / len(points)
    assert share.numpy() == pytest.approx(1 / modes, abs=5 * math.sqrt(1 / modes / 50_000))
    rest = points - centres[nearest]
    assert rest.std(0).numpy() == pytest.approx(noise, rel=0.02)
    assert rest.mean(0).abs().max() < noise * 5 / math.sqrt(50_000)


def test_8gaussians_lie_on_a_circle_of_radius_2_over_1_414():
    centres = datasets.toy_modes("8gaussians")[0].double().numpy()
    a = 1 / math.sqrt(2)  # as Gulrajani et al. list them
    listed = [(1, 0), (-1, 0), (0, 1), (0, -1), (a, a), (a, -a), (-a, a), (-a, -a)]
    expected = sorted((2 * x / 1.414, 2 * y / 1.414) for x, y in listed)
    for centre in expected:
        assert np.linalg.norm(centres - centre, axis=1).min() < 1e-6
    assert len(centres) == 8


def test_25gaussians_are_a_grid_of_spacing_2_over_2_828():
    centres = datasets.toy_modes("25gaussians")[0].double().numpy()
    expected = {(i, j) for i in range(-2, 3) for j in range(-2, 3)}
    assert {tuple(p) for p in (centres / 0.70721).round().astype(int)} == expected
    np.testing.assert_allclose(centres, (centres / (2 / 2.828)).round() * 2 / 2.828, atol=1e-6)


@pytest.mark.parametrize("name", ["ring2d", "ring2d-sharp"])
def test_ring2d_has_radius_2_and_starts_at_the_bottom(name):
    centres = datasets.toy_modes(name)[0]
    np.testing.assert_allclose(centres.norm(dim=1), 2, rtol=1e-6)
    np.testing.assert_allclose(centres[0], [0, -2], atol=1e-6)
    gaps = (centres - centres.roll(1, 0)).norm(dim=1)
    np.testing.assert_allclose(gaps, 4 * math.sin(math.pi / 8), rtol=1e-5)


def test_ring3d_is_the_ring_turned_by_60_degrees_about_the_second_axis():
    """Its plane's normal is 60 degrees from the third axis, in which it is 0.1 thick; inside it is ring2d."""
    points = datasets.draw_toy("ring3d", 50_000, 0).double()
    values, vectors = torch.linalg.eigh(torch.cov(points.T))
    normal = vectors[:, 0] * vectors[2, 0].sign()
    assert abs(normal[1]) < 0.01
    assert math.degrees(math.acos(normal[2])) == pytest.approx(60, abs=0.5)
    assert values[0].sqrt().item() == pytest.approx(0.1, rel=0.02)
    assert values[1:].numpy() == pytest.approx(2 + 0.2**2, rel=0.02)  # radius^2 / 2 + noise^2
    in_plane = (points - (points @ normal)[:, None] * normal).norm(dim=1)
    assert in_plane.square().mean().item() == pytest.approx(4 + 2 * 0.2**2, rel=0.01)
    assert points[:, 1].std().item() == pytest.approx(math.sqrt(2.04), rel=0.01)  # the axis stays


def test_swissroll_is_that_of_scikit_learn():
    """Two-sample Kolmogorov-Smirnov on both columns and on two projections."""
    from scipy.stats import ks_2samp
    from sklearn.datasets import make_swiss_roll

    ours = datasets.draw_toy("swissroll", 20_000, 0).double().numpy()
    theirs = make_swiss_roll(20_000, noise=0.25, random_state=0)[0][:, [0, 2]] / 7.5
    for direction in ((1, 0), (0, 1), (1, 1), (1, -1)):
        assert ks_2samp(ours @ direction, theirs @ direction).pvalue > 0.001


def test_swissroll_curve_is_that_of_scikit_learn_without_noise():
    from sklearn.datasets import make_swiss_roll

    points, t = make_swiss_roll(100, noise=0, random_state=0)
    u = (torch.from_numpy(t) / (1.5 * math.pi) - 1) / 2
    np.testing.assert_allclose(datasets.swissroll_curve(u), points[:, [0, 2]] / 7.5, atol=1e-12)


def test_swissroll_noise_is_a_quarter_over_7_5():
    """Distances to the curve are those of one normal coordinate, away from its ends."""
    points = datasets.draw_toy("swissroll", 5000, 0)
    curve = datasets.swissroll_curve(torch.linspace(0, 1, 2000))
    distances, nearest = torch.cdist(points, curve).min(1)
    inside = (nearest > 50) & (nearest < 1950)
    assert distances[inside].square().mean().sqrt().item() == pytest.approx(0.25 / 7.5, rel=0.03)


# --- batches -------------------------------------------------------------------------------------

SOME = ["8gaussians", "swissroll", "ring3d", "digits"]


@pytest.mark.parametrize("name", SOME)
def test_a_batch_depends_on_seed_and_number_only(name):
    """And does not move the global generator."""
    before = torch.get_rng_state()
    data, other = load(name, batch_size=400), load(name, batch_size=400)
    forwards = [data.batch(i) for i in range(9)]  # of digits: more than two epochs
    for i in (8, 0, 5, 5, 3):
        assert torch.equal(other.batch(i), forwards[i])
    assert not torch.equal(forwards[0], forwards[1])
    assert not torch.equal(forwards[0], load(name, batch_size=400, seed=1).batch(0))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("name", SOME)
def test_the_parts_of_all_processes_are_the_batch_of_one(name, world_size):
    for i in (0, 200):
        parts = [load(name, batch_size=12, rank=r, world_size=world_size).batch(i) for r in range(world_size)]
        assert torch.equal(torch.cat(parts), load(name, batch_size=12).batch(i))


@pytest.mark.parametrize("name", datasets.TOYS)
def test_toy_batches_are_float32_of_the_stated_shape(name):
    data = load(name, batch_size=6)
    assert data.shape == (3 if name == "ring3d" else 2,)
    assert data.batch(0).shape == (6, *data.shape)
    assert data.batch(0).dtype == torch.float32


def numbered(n, batch_size, value_range=(0, 255)):
    """n images of one pixel, each with its number."""
    images = torch.arange(n, dtype=torch.uint8).view(n, 1, 1, 1)
    return datasets.Images("numbered", (1, 1, 1), batch_size, 0, 0, 1, CPU, images, value_range)


def test_a_rest_smaller_than_a_batch_is_left_for_another_epoch():
    data = numbered(22, 5)
    seen = Counter()
    for epoch in range(10):
        one = torch.cat([data.batch(4 * epoch + i) for i in range(4)]).flatten().tolist()
        assert len(set(one)) == 20
        seen.update(one)
    assert len(seen) == 22


@pytest.mark.parametrize("value_range", [(-1, 1), (0, 1)])
def test_black_and_white_are_the_exact_ends_of_the_value_range_and_to_uint8_undoes_it(value_range):
    batch = numbered(256, 256, value_range).batch(0)
    levels = torch.sort(batch.flatten())[0]
    assert (levels[0], levels[-1]) == value_range
    assert levels.dtype == torch.float32
    np.testing.assert_allclose(levels.diff(), (value_range[1] - value_range[0]) / 255, rtol=1e-3)
    back = datasets.to_uint8(batch, value_range)
    assert back.dtype == torch.uint8
    assert torch.equal(back.float(), numbered(256, 256).batch(0))


def test_to_uint8_rounds_and_clamps():
    values = torch.tensor([-0.3, 99.4 / 255, 99.6 / 255, 254.6 / 255, 1.7])
    assert datasets.to_uint8(values, (0, 1)).tolist() == [0, 99, 100, 255, 255]
    assert datasets.to_uint8(2 * values - 1, (-1, 1)).tolist() == [0, 99, 100, 255, 255]


@pytest.mark.parametrize(
    ("name", "key"),
    [("25gaussians", "toys"), ("ring3d", "toys"), ("folder:a:b", "folder"), ("fashion-mnist", "mnist")],
)
def test_kind(name, key, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a:b").mkdir()
    assert datasets.family(name) == key


# --- digits and MNIST ----------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    images = datasets.load_images("digits", ".", None, "train")
    assert images.dtype == torch.uint8
    np.testing.assert_allclose(images[:, 0].numpy() * (16 / 255), load_digits().images, atol=0.04)
    assert (images.min(), images.max()) == (0, 255)


def write_mnist(root, train, test):
    """The four files of MNIST, uncompressed, in the IDX format: magic, sizes (big endian), bytes."""
    root.mkdir(parents=True)
    for name, images in (("train", train), ("t10k", test)):
        n = len(images)
        (root / f"{name}-images-idx3-ubyte").write_bytes(
            struct.pack(">IIII", 0x803, n, 28, 28) + images.tobytes()
        )
        (root / f"{name}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, n) + bytes(n))


@pytest.fixture
def mnist(tmp_path):
    """A folder with twelve training and five test images of both MNIST and Fashion-MNIST."""
    images = np.random.default_rng(0).integers(0, 256, (17, 28, 28), dtype=np.uint8)
    write_mnist(tmp_path / "MNIST" / "raw", images[:12], images[12:])
    write_mnist(tmp_path / "FashionMNIST" / "raw", 255 - images[:12], 255 - images[12:])
    return tmp_path, images


def test_mnist_is_read_from_idx_files(mnist):
    root, images = mnist
    for split, part in (("train", images[:12]), ("test", images[12:]), ("all", images)):
        data = load("mnist", root, split=split)
        assert data.split == split
        np.testing.assert_array_equal(data.images[:, 0], part)
    np.testing.assert_array_equal(
        datasets.load_images("fashion-mnist", root, None, "train")[:, 0], 255 - images[:12]
    )


def test_mnist_is_resized(mnist):
    """To 32 x 32, bilinearly: against torch's interpolation in float."""
    root, images = mnist
    data = load("mnist", root, image_size=32)
    assert data.shape == (1, 32, 32)
    expected = torch.nn.functional.interpolate(
        torch.from_numpy(images[:12, None]).double(), size=32, mode="bilinear", antialias=True
    )
    assert (data.images.double() - expected).abs().max() <= 1.01


def test_truncated_mnist_is_refused(mnist):
    root, _ = mnist
    file = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-100])
    assert "--dataset mnist" in refusal("mnist", root)


# --- CIFAR-10 ------------------------------------------------------------------------------------

CIFAR_NAMES = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]


@pytest.fixture
def cifar(tmp_path):
    """A folder of CIFAR-10 with 3 images a batch, (6, 3, 3072) uint8 in the order channel, row, column."""
    arrays = np.random.default_rng(0).integers(0, 256, (6, 3, 3072), dtype=np.uint8)
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name, data in zip(CIFAR_NAMES, arrays):
        batch = {"batch_label": name, "labels": [0, 1, 2], "data": data, "filenames": ["a", "b", "c"]}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    return tmp_path, arrays


def pack(root):
    """Turn the folder into the archive that is distributed."""
    folder, archive = root / "cifar-10-batches-py", root / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as files:
        files.add(folder, folder.name)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    return archive


@pytest.mark.parametrize("packed", [False, True])
def test_cifar10_is_read_from_folder_and_archive(cifar, packed):
    root, arrays = cifar
    if packed:
        pack(root)
    for split, part in (("train", arrays[:5]), ("test", arrays[5:]), ("all", arrays)):
        images = datasets.load_images("cifar10", root, None, split)
        assert images.dtype == torch.uint8
        np.testing.assert_array_equal(images, part.reshape(-1, 3, 32, 32))


def test_cifar10_as_python_2_wrote_it(cifar):
    """The very opcodes of the published files: byte strings, numpy.core.multiarray._reconstruct."""
    root, arrays = cifar
    data = arrays[0]
    written = (
        b"\x80\x02}U\x04datacnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x03M\x00\x0c\x86cnumpy\ndtype\nU\x02u1K\x00K\x01\x87R"
        b"(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89"
        b"T" + struct.pack("<i", data.nbytes) + data.tobytes() + b"tbs."
    )
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(written)
    images = datasets.load_images("cifar10", root, None, "test")
    np.testing.assert_array_equal(images, data.reshape(-1, 3, 32, 32))


@pytest.mark.parametrize("kind", ["os", "eval", "numpy"])
def test_a_malicious_cifar10_runs_nothing(cifar, kind):
    root, _ = cifar
    marker = root / "was-here.npy"
    attack = {
        "os": Malicious(os.mkdir, str(marker)),
        "eval": Malicious(eval, f"__import__('os').mkdir({str(marker)!r})"),
        "numpy": Malicious(np.save, str(marker), 0),
    }[kind]
    content = pickle.dumps({"data": attack}, protocol=2)
    (root / "cifar-10-batches-py" / "data_batch_1").write_bytes(content)
    assert "does not need" in refusal("cifar10", root)
    assert not marker.exists()
    pickle.loads(content)
    assert marker.exists()  # it would have


def test_truncated_cifar10_archive_is_refused(cifar):
    root, _ = cifar
    archive = pack(root)
    archive.write_bytes(archive.read_bytes()[: archive.stat().st_size // 2])
    message = refusal("cifar10", root)
    assert "--dataset cifar10" in message
    assert archive.name in message
    assert str(root) in message


@pytest.mark.parametrize(
    "bad",
    [
        lambda good: b"",
        lambda good: good[:5000],
        lambda good: b"no pickle",
        lambda good: pickle.dumps([1]),
        lambda good: pickle.dumps({"labels": [1]}),
        lambda good: pickle.dumps({"data": np.zeros((3, 3072))}),
        lambda good: pickle.dumps({"data": np.zeros((3, 100), np.uint8)}),
        None,
    ],
    ids=["empty", "truncated", "no pickle", "list", "no data", "other type", "other size", "missing"],
)
def test_a_cifar10_batch_that_is_none_is_refused(cifar, bad):
    file = cifar[0] / "cifar-10-batches-py" / "data_batch_3"
    if bad:
        file.write_bytes(bad(file.read_bytes()))
    else:
        file.unlink()
    message = refusal("cifar10", cifar[0])
    assert "--dataset cifar10" in message
    assert bad or "data_batch_3" in message


# --- folders of images ---------------------------------------------------------------------------


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


def test_folder_finds_nested_images_in_the_order_of_their_names(tmp_path):
    for name, level in (("b/deep/x.png", 20), ("a/y.bmp", 10), ("z.PNG", 30)):
        save(tmp_path / name, np.full((4, 4, 3), level))
    (tmp_path / "notes.txt").write_text("not an image")
    images = load(f"folder:{tmp_path}", image_size=4, batch_size=3).images
    assert images.shape == (3, 3, 4, 4)
    assert images[:, 0, 0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize(("width", "height"), [(31, 20), (20, 31)])
def test_folder_scales_the_shorter_side_and_crops_the_centre(tmp_path, width, height):
    photo(tmp_path / "a.png", width, height)
    (image,) = datasets.load_images(f"folder:{tmp_path}", ".", 10, "train")
    for found, side in zip(place(image, width, height), (width, height)):
        np.testing.assert_allclose(found, expected_place(10, (side - 20) / 2, 2), atol=0.3)


def read(folder, size):
    """The images of a folder, as a run takes them; python -m common.evaluation takes the same."""
    images = datasets.load_images(f"folder:{folder}", "data", size, "train")
    np.testing.assert_array_equal(evaluation.read_images("REAL", str(folder), size, "elsewhere")[0], images)
    return images.numpy()


GREY = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17


def test_folder_lays_what_is_transparent_on_white(tmp_path):
    """Grey and coloured images with an alpha channel, or with one colour or palette entry that is none."""
    alpha = np.array([255, 128, 64, 0], np.uint8).repeat(4).reshape(4, 4)
    save(tmp_path / "0.png", GREY)
    save(tmp_path / "1.png", np.dstack([GREY, alpha]))
    save(tmp_path / "2.webp", np.dstack([GREY, GREY, GREY, np.full_like(GREY, 255)]))
    save(tmp_path / "3.png", np.dstack([GREY, GREY, GREY, alpha]))
    Image.fromarray(GREY).save(tmp_path / "4.png", transparency=0)
    Image.fromarray(GREY).convert("P").save(tmp_path / "5.gif", transparency=0)
    Image.fromarray(GREY.astype(np.uint16) * 257).save(tmp_path / "6.png", transparency=0)
    on_white = 255 - alpha / 255 * (255.0 - GREY)
    first_white = np.where(GREY == 0, 255, GREY)
    images = read(tmp_path, 4)
    for image, expected in zip(
        images, [GREY, on_white, images[2, 0], on_white, first_white, first_white, first_white]
    ):
        np.testing.assert_allclose(image, np.broadcast_to(expected, (3, 4, 4)), atol=1)
    assert (images[2].max() > 250, images[2].min() < 5) == (True, True)


def tag(number, value):
    """An entry of TIFF with one value of 16 bits."""
    return struct.pack("<HHII", number, 3, 1, value)


def test_folder_scales_what_has_more_than_8_bits_by_what_its_format_says(tmp_path):
    levels = GREY.astype(np.uint16) * 257
    for name in ("a.png", "b.tif", "c.pgm", "d.jp2"):
        Image.fromarray(levels).save(tmp_path / name)
    Image.fromarray(levels).save(tmp_path / "e.tif", big_endian=True)
    (tmp_path / "f.pgm").write_bytes(b"P5 4 4 1023\n" + (levels // 64).astype(">u2").tobytes())
    twelve = "".join(f"{level // 16:012b}" for level in levels.flatten())  # bits, in the place of 16 times 16
    content = (tmp_path / "b.tif").read_bytes().replace(tag(258, 16), tag(258, 12))
    content = content.replace(levels.tobytes(), int(twelve, 2).to_bytes(24, "big") + bytes(8))
    (tmp_path / "g.tif").write_bytes(content)
    images = read(tmp_path, 4)
    assert images.shape == (7, 3, 4, 4)
    np.testing.assert_allclose(images, np.broadcast_to(GREY, images.shape), atol=1)
    assert (images[:5] == GREY).all()


@pytest.mark.parametrize(
    "what", ["a.tif of 32 bits", "b.tif of floats", "c.pfm of floats", "d.tif, 0 is white"]
)
def test_other_images_of_more_than_8_bits_are_refused_by_name(tmp_path, what):
    file = tmp_path / what[:5]
    types = {"a": np.int32, "b": np.float32, "c": np.float32, "d": np.uint16}
    Image.fromarray(GREY.astype(types[what[0]])).save(file)
    if what[0] == "d":
        file.write_bytes(file.read_bytes().replace(tag(262, 1), tag(262, 0)))
    message = refusal(f"folder:{tmp_path}", image_size=4)
    assert f"{file} cannot be read" in message
    assert "should be 8 bits, or 16 bits of grey" in message


def test_folder_turns_images_as_their_exif_orientation_says(tmp_path):
    """And TIFF's own tag; imagenet's images stay as they are, for its papers do not turn them."""
    image = np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    quarter, flipped = np.rot90(image, -1), image[:, ::-1]  # clockwise; left is right
    turned = [image, flipped, np.rot90(image, 2), image[::-1]]
    turned += [np.rot90(flipped), quarter, np.rot90(flipped, -1), np.rot90(image)]
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(image).save(tmp_path / f"{orientation}.png", exif=exif)
    Image.fromarray(image).save(tmp_path / "9.tif", tiffinfo={0x0112: 6})
    np.testing.assert_array_equal(read(tmp_path, 6).transpose(0, 2, 3, 1), [*turned, quarter])
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    (tmp_path / "6.png").rename(tmp_path / "imagenet" / "train" / "6.png")
    (found,) = datasets.load_images("imagenet", tmp_path, 256, "train")
    upright = np.asarray(Image.fromarray(image).resize((256, 256), datasets.LANCZOS))
    np.testing.assert_array_equal(found, upright.transpose(2, 0, 1))


def test_what_a_folder_holds_besides_images_is_left_out_and_counted(tmp_path, capsys):
    """Links are followed once, also into themselves; names that begin with a dot are no data."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    for i, name in enumerate(["b/x.png", "folder.png/y.png", os.fsdecode(b"\xff.png"), "z.png"]):
        save(root / name, np.full((4, 4), 10 * i))
    save(outside / "linked.png", np.full((4, 4), 40))
    (root / "a").symlink_to(outside)
    (root / "again").symlink_to(outside)
    (root / "b" / "loop").symlink_to(root)
    (root / "c.png").symlink_to(outside / "linked.png")
    for hidden in (".ipynb_checkpoints/x.png", "b/.hidden/y.png", "._z.png"):
        save(root / hidden, np.full((4, 4), 99))
    for other in ("notes.txt", "page.eps", "table.h5"):
        (root / other).write_text("no image")
    (root / "nowhere.png").symlink_to("nothing")
    os.mkfifo(root / "pipe.png")
    images = datasets.load_images(f"folder:{root}", ".", 4, "train")
    assert images[:, 0, 0, 0].tolist() == [40, 0, 40, 10, 30, 20]  # a/linked, b/x, c, folder.png/y, z, \xff
    assert capsys.readouterr().out.splitlines() == [
        f"{cache_file()} is made once, of 6 images; files left out: 6"
    ]
    np.testing.assert_array_equal(read(root, 4), images)


def test_a_data_set_that_is_not_named_in_utf_8_is_refused(tmp_path):
    save(tmp_path / os.fsdecode(b"\xff") / "x.png", GREY)
    assert "a name in UTF-8" in refusal(
        f"folder:{os.fsdecode(b'%b/%b' % (os.fsencode(tmp_path), bytes([255])))}"
    )


def test_folder_takes_every_extension_of_what_pillow_reads_back(tmp_path):
    """But EPS, for which it runs another program."""
    Image.init()
    ends = []
    for end, kind in Image.registered_extensions().items():
        for mode in ("RGB", "L", "1"):
            try:
                Image.new(mode, (64, 64), "white").save(tmp_path / f"x{end}")
                Image.open(tmp_path / f"x{end}").load()
                ends += [end] if kind != "EPS" else []
                break
            except (OSError, KeyError, ValueError):
                (tmp_path / f"x{end}").unlink(missing_ok=True)
    assert len(ends) > 30
    assert datasets.extensions() >= {*ends}
    images = datasets.load_images(f"folder:{tmp_path}", ".", 16, "train")
    assert len(images) == len(ends)
    assert images.min() > 250


def test_an_image_runs_no_program(tmp_path, monkeypatch):
    """Not PostScript either, under whatever name it comes."""
    ran = []
    program = lambda *args, **kwargs: (ran.append(args), Image.new("RGB", (10, 10)).im)[1]  # noqa: E731
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", program)
    file = tmp_path / "x.png"
    file.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n")
    assert str(file) in refusal(f"folder:{tmp_path}", image_size=4)
    assert ran == []
    with Image.open(file) as image:
        image.load()
    assert len(ran) == 1  # it would have


@pytest.mark.parametrize(
    ("sides", "decoded"), [((1600, 640), (200, 80)), ((1602, 642), (801, 321)), ((1603, 641), None)]
)
def test_a_large_jpeg_is_decoded_at_a_fraction_if_that_moves_no_pixel(tmp_path, sides, decoded):
    """And if it still has four times the size; what comes of it is, within a few levels, the same."""
    file = tmp_path / "a.jpg"
    photo(file, *sides)
    assert datasets.decode(str(file), 80, upright=True).size == (decoded or sides)
    assert datasets.decode(str(file), 81, upright=True).size != (200, 80)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.fit(image, (20, 20), datasets.LANCZOS)).transpose(2, 0, 1)
    (image,) = datasets.load_images(f"folder:{tmp_path}", ".", 20, "train").double()
    np.testing.assert_allclose(image, expected, atol=2)


@pytest.mark.parametrize("damage", ["text", "truncated", "empty"])
def test_an_unreadable_image_is_named(tmp_path, damage):
    for i in range(20):
        save(tmp_path / f"{i}.png", np.random.default_rng(i).integers(0, 256, (16, 16, 3)))
    bad = tmp_path / "13.png"
    bad.write_bytes({"text": b"not an image", "truncated": bad.read_bytes()[:200], "empty": b""}[damage])
    message = refusal(f"folder:{tmp_path}", image_size=16)
    assert "--dataset" in message
    assert str(bad) in message


def test_a_folder_needs_an_image_size_and_has_no_test_split(tmp_path):
    save(tmp_path / "a.png", np.zeros((4, 4)))
    assert "--image-size" in refusal(f"folder:{tmp_path}")
    assert "--train-split" in refusal(f"folder:{tmp_path}", image_size=4, split="test")


# --- STL-10, CelebA, LSUN, ImageNet --------------------------------------------------------------


def gradient(width, height, seed=0):
    """A photo, (height, width, 3): red is the column and green the row, from 20 to 220; blue is the seed."""
    red, green = np.meshgrid(np.linspace(20, 220, width), np.linspace(20, 220, height))
    return np.stack([red, green, np.full_like(red, seed)], 2).round().astype(np.uint8)


def place(image, width, height):
    """Where in a gradient of that size the pixels of image (3, h, w) come from: columns and rows."""
    image = image.double().numpy()
    columns, rows = image[0].mean(0), image[1].mean(1)
    return (columns - 20) * (width - 1) / 200, (rows - 20) * (height - 1) / 200


def expected_place(size, start, step):
    """Centres of size pixels that are step wide, the first of which begins at start."""
    return start + (np.arange(size) + 0.5) * step - 0.5


def photo(path, width, height, seed=0):
    """Save a gradient in the format of the name; return the pixels that a decoder gives (h, w, 3)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(gradient(width, height, seed)).save(path, quality=95)
    return np.asarray(Image.open(path).convert("RGB"))


def write_stl10(folder, unlabeled, test):
    """Images (n, 96, 96, 3) as they are published: channel by channel, each column by column."""
    folder.mkdir(parents=True)
    for name, images in (("unlabeled_X.bin", unlabeled), ("test_X.bin", test)):
        planes = [np.asfortranarray(image[:, :, c]).tobytes("F") for image in images for c in range(3)]
        (folder / name).write_bytes(b"".join(planes))


def test_stl10_is_read_from_its_binary_files(tmp_path, monkeypatch):
    """Against the pixels that were written, and against torchvision's reader; by several processes."""
    monkeypatch.setattr(datasets, "TASK", 1)
    pixels = np.random.default_rng(0).integers(0, 256, (5, 96, 96, 3), dtype=np.uint8)
    write_stl10(tmp_path / "stl10_binary", pixels[:3], pixels[3:])
    for split, part in (("train", pixels[:3]), ("test", pixels[3:]), ("all", pixels)):
        images = datasets.load_images("stl10", tmp_path, 96, split)
        np.testing.assert_array_equal(images, part.transpose(0, 3, 1, 2))
    theirs = torchvision.datasets.STL10.__new__(torchvision.datasets.STL10)
    theirs.root = tmp_path
    np.testing.assert_array_equal(images[:3], theirs._STL10__loadfile("unlabeled_X.bin")[0])


def test_stl10_is_halved(tmp_path):
    """To 48x48 where no size is given; a smooth image stays where it is."""
    write_stl10(tmp_path / "stl10_binary", [gradient(96, 96)], [])
    (image,) = datasets.load_images("stl10", tmp_path, None, "train")
    assert image.shape == (3, 48, 48)
    for found in place(image, 96, 96):
        np.testing.assert_allclose(found[2:-2], expected_place(48, 0, 2)[2:-2], atol=0.5)


def test_stl10_is_downloaded_whole_or_not_at_all(tmp_path, monkeypatch):
    def download(url, root, filename, md5):
        assert (url, md5) == (torchvision.datasets.STL10.url, torchvision.datasets.STL10.tgz_md5)
        write_stl10(tmp_path / "elsewhere", [gradient(96, 96)], [])
        with tarfile.open(os.path.join(root, filename), "w:gz") as files:
            files.add(tmp_path / "elsewhere", "stl10_binary")

    monkeypatch.setattr(torchvision.datasets.utils, "download_url", download)
    assert len(datasets.load_images("stl10", tmp_path / "new", None, "train")) == 1
    assert {p.name for p in (tmp_path / "new").iterdir()} >= {"stl10_binary", "cache"}


def test_stl10_of_another_size_is_refused(tmp_path):
    write_stl10(tmp_path / "stl10_binary", [gradient(96, 96)], [])
    file = tmp_path / "stl10_binary" / "unlabeled_X.bin"
    file.write_bytes(file.read_bytes()[:-1])
    assert "stl10_binary" in refusal("stl10", tmp_path)


@pytest.fixture
def celeba(tmp_path):
    """Six aligned faces with their partition: three to train, one to validate, two to test; their pixels."""
    folder = tmp_path / "celeba"
    pixels = [photo(folder / "img_align_celeba" / f"{i:06}.jpg", 178, 218, 40 * i) for i in range(1, 7)]
    lines = [f"{i:06}.jpg {code}" for i, code in zip(range(1, 7), (0, 0, 0, 1, 2, 2))]
    (folder / "list_eval_partition.txt").write_text("\n".join(lines) + "\n")
    return tmp_path, pixels


def test_celeba_is_split_by_its_partition_file(celeba):
    for split, numbers in (("train", (1, 2, 3)), ("test", (5, 6)), ("all", range(1, 7))):
        images = datasets.load_images("celeba", celeba[0], None, split)
        assert images.shape == (len(numbers), 3, 64, 64)
        assert images[:, 2].double().mean((1, 2)).numpy() == pytest.approx([40 * i for i in numbers], abs=2)


@pytest.mark.parametrize("size", [64, 32, 128])
def test_celeba_covers_72_by_88_of_which_the_centre_is_left(celeba, size):
    image = datasets.load_images("celeba", celeba[0], size, "train")[0]
    scale = 178 / 72 * 64 / size
    columns, rows = place(image, 178, 218)
    np.testing.assert_allclose(columns, expected_place(size, 178 * 4 / 72, scale), atol=1)
    np.testing.assert_allclose(rows, expected_place(size, 109 - scale * size / 2, scale), atol=1)


def test_celeba_at_160_is_a_random_crop_of_the_central_178_often_mirrored(celeba):
    root, pixels = celeba
    images = datasets.load_images("celeba", root, 160, "all")
    lines = [f"{i:06}.jpg 0" for i in range(1, 7)] * 30  # each face many times, to see many crops
    (root / "celeba" / "list_eval_partition.txt").write_text("\n".join(lines))
    many = datasets.load_images("celeba", root, 160, "train")
    np.testing.assert_array_equal(many[:6], images)  # not drawn anew
    seen = []
    for number, image in enumerate(many.numpy()):
        source = pixels[number % 6].transpose(2, 0, 1)
        mirrored = image[0, 80, 0] > image[0, 80, -1]
        image = image[:, :, ::-1] if mirrored else image
        offsets = [(x, y) for x in range(19) for y in range(20, 39)]
        fits = [(x, y) for x, y in offsets if np.array_equal(source[:, y, x : x + 160], image[:, 0])]
        fits = [(x, y) for x, y in fits if np.array_equal(source[:, y : y + 160, x : x + 160], image)]
        assert len(fits) == 1
        seen.append((*fits[0], mirrored))
    for offsets in np.array(seen)[:, :2].T:
        assert len(set(offsets)) == 19
    assert np.mean([mirrored for *_, mirrored in seen]) == pytest.approx(0.5, abs=0.15)


def test_celeba_as_kaggle_has_it(celeba):
    """The partition as .csv, with or without a first line, with a byte-order mark; a folder in the folder."""
    folder = celeba[0] / "celeba"
    expected = datasets.load_images("celeba", celeba[0], None, "test")
    lines = ["image_id,partition", *(folder / "list_eval_partition.txt").read_text().split("\n")]
    (folder / "list_eval_partition.txt").unlink()
    csv = "\r\n".join(line.replace(" ", ",") for line in lines)
    (folder / "list_eval_partition.csv").write_text("\ufeff" + csv, encoding="utf-8")
    (folder / "img_align_celeba").rename(folder / "inner")
    (folder / "img_align_celeba").mkdir()
    (folder / "inner").rename(folder / "img_align_celeba" / "img_align_celeba")
    for split, count in (("train", 3), ("test", 2), ("all", 6)):
        images = datasets.load_images("celeba", celeba[0], None, split)
        assert len(images) == count
        assert split != "test" or torch.equal(images, expected)
    (folder / "list_eval_partition.csv").write_text("\ufeff" + csv.partition("\n")[2], encoding="utf-8")
    assert len(datasets.load_images("celeba", celeba[0], None, "train")) == 3


@pytest.mark.parametrize("text", ["", "image_id,partition\n", "000001.jpg 1\n", "000001.jpg\n", "<html>"])
def test_a_partition_that_names_no_image_is_refused_by_its_name(celeba, text):
    file = celeba[0] / "celeba" / "list_eval_partition.txt"
    file.write_text(text)
    message = refusal("celeba", celeba[0])
    assert str(file) in message
    assert "000001.jpg' is" not in message


@pytest.mark.parametrize("size", [(178, 218), (72, 88), (75, 91), (36, 44), (37, 45)])
def test_center_crop_is_that_of_torchvision(size):
    image = Image.fromarray(gradient(*size))
    expected = torchvision.transforms.functional.center_crop(image, 32)
    np.testing.assert_array_equal(datasets.center_crop(image, 32), expected)


def test_a_missing_face_is_named(celeba):
    (celeba[0] / "celeba" / "img_align_celeba" / "000002.jpg").unlink()
    assert "000002.jpg" in refusal("celeba", celeba[0])


@pytest.mark.parametrize("exported", [False, True])
def test_lsun_is_read_from_lmdb_and_from_exported_images(tmp_path, exported, monkeypatch):
    """The centre of images whose shorter side is 32 already: pixel for pixel, in the order of the keys; by
    several processes."""
    monkeypatch.setattr(datasets, "TASK", 1)
    expected = {}
    for part, sizes in (("train", [(40, 32), (32, 50), (32, 32)]), ("val", [(60, 32)])):
        folder = tmp_path / "lsun" / f"bedroom_{part}_lmdb"
        folder.mkdir(parents=True)
        env = lmdb.open(str(folder), map_size=2**20)
        for i, (width, height) in enumerate(sizes):
            key = f"{(7 * i + 3) % 10}{i}{'ab' * 19}"
            file = tmp_path / "lsun" / f"bedroom_{part}" / "/".join(key[:6]) / f"{key}.webp"
            pixels = photo(file, width, height, 50 * i)
            left, top = (width - 32) // 2, (height - 32) // 2
            expected[part, key] = pixels[top : top + 32, left : left + 32].transpose(2, 0, 1)
            with env.begin(write=True) as transaction:
                transaction.put(key.encode(), file.read_bytes())
            if not exported:
                file.unlink()
        env.close()
        if exported:
            folder.rename(tmp_path / part)
    for split, parts in (("train", ("train",)), ("test", ("val",)), ("all", ("train", "val"))):
        images = datasets.load_images("lsun-bedroom", tmp_path, 32, split)
        wanted = [expected[key] for part in parts for key in sorted(expected) if key[0] == part]
        np.testing.assert_array_equal(images, wanted)


def test_lsun_with_something_else_than_an_image_is_refused(tmp_path):
    folder = tmp_path / "lsun" / "bedroom_train_lmdb"
    folder.mkdir(parents=True)
    with lmdb.open(str(folder), map_size=2**20) as env, env.begin(write=True) as transaction:
        transaction.put(b"0" * 40, b"no image")
    assert "image 0 cannot be read" in refusal("lsun-bedroom", tmp_path)


def test_imagenet_is_cut_to_the_central_square(tmp_path, capsys):
    """In the folders of its classes or not; grey and CMYK images too. What is left out is counted of all."""
    root = tmp_path / "imagenet"
    photo(root / "train" / "n01440764" / "n01440764_10026.JPEG", 500, 375, 100)
    cmyk, grey = root / "train" / "n01443537" / "n01443537_2.JPEG", root / "val" / "ILSVRC2012_val_1.JPEG"
    cmyk.parent.mkdir()
    Image.fromarray(gradient(300, 300)).convert("CMYK").save(cmyk)
    grey.parent.mkdir()
    Image.fromarray(np.full((70, 90), 77, np.uint8)).save(grey)
    (root / "val" / ".DS_Store").touch()
    images = datasets.load_images("imagenet", tmp_path, None, "all")
    assert "of 3 images; files left out: 1\n" in capsys.readouterr().out
    assert images.shape == (3, 3, 64, 64)
    columns, rows = place(images[0], 500, 375)
    np.testing.assert_allclose(columns, expected_place(64, 62.5, 375 / 64), atol=2.5)
    np.testing.assert_allclose(rows, expected_place(64, 0, 375 / 64), atol=2.5)
    assert images[1, 0].double().std() > 40
    assert (images[2] == 77).all()
    assert len(datasets.load_images("imagenet", tmp_path, None, "test")) == 1


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("cifar10", ["no network", "cifar-10-python.tar.gz"]),
        ("stl10", ["stl10_binary/"]),
        ("celeba", ["celeba/img_align_celeba/", "celeba/list_eval_partition.txt"]),
        ("lsun-bedroom", ["lsun/bedroom_train_lmdb/", "lsun/bedroom_val_lmdb/", "lsun/bedroom_train/"]),
        ("imagenet", ["imagenet/train/", "imagenet/val/"]),
    ],
)
@pytest.mark.parametrize("split", ["train", "test", "all"])
def test_a_missing_set_is_refused_with_what_to_put_where(name, parts, split, tmp_path):
    message = refusal(name, tmp_path / "nowhere", split=split)
    assert all(part in message for part in (f"--dataset {name}", f"{tmp_path}/nowhere", "http", *parts))


def test_a_set_of_which_half_is_missing_is_refused(tmp_path):
    photo(tmp_path / "imagenet" / "train" / "a.JPEG", 70, 70)
    message = refusal("imagenet", tmp_path, split="all")
    assert f"{tmp_path}/imagenet/val" in message
    (tmp_path / "imagenet" / "val").mkdir()
    assert f"no image below {tmp_path}/imagenet/val" in refusal("imagenet", tmp_path, split="test")


# --- conversion ----------------------------------------------------------------------------------


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """22 images to be converted 4 at a time; how often which was; and what comes of them."""
    monkeypatch.setattr(datasets, "CHUNK", 4)
    for i in range(22):
        save(tmp_path / "photos" / f"{i:02}.png", np.full((8, 8, 3), 10 * i))
    expected = (torch.arange(22) * 10).to(torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 8, 8)
    converted, crop = [], datasets.crop

    def count(name, size, number, item):
        converted.append(number)
        return crop(name, size, number, item)

    monkeypatch.setattr(datasets, "crop", count)
    return SimpleNamespace(name=f"folder:{tmp_path}/photos", converted=converted, expected=expected)


def load_photos(photos, data_dir="."):
    images = datasets.load_images(photos.name, data_dir, 8, "train")
    assert torch.equal(images, photos.expected)
    return images


def cache_file():
    (file,) = Path("cache").glob("*.npy")
    return file


def test_images_are_converted_once(photos):
    load_photos(photos)
    assert sorted(photos.converted) == list(range(22))
    load_photos(photos)
    assert len(photos.converted) == 22
    np.testing.assert_array_equal(np.load(cache_file()), photos.expected)
    assert not list(Path("cache").glob("*.partial"))


def test_the_cache_is_named_after_all_that_its_images_depend_on(photos, tmp_path):
    """A cache of "crop 1" has other pictures: sideways ones, black where they are transparent."""
    load_photos(photos)
    key = hashlib.sha256(b"crop 2")
    for i in range(22):
        stat = (tmp_path / "photos" / f"{i:02}.png").stat()
        key.update(f"/{i:02}.png {stat.st_size} {stat.st_mtime_ns}\n".encode())
    assert cache_file().name == f"folder-train-8-{key.hexdigest()[:16]}.npy"


def pixel(number, item):
    return np.array([item, os.getpid() % 256], np.uint8)


@pytest.mark.parametrize(("count", "processes"), [(128, 1), (129, 2), (5 * 64 + 1, 2)])
def test_many_images_are_converted_by_a_process_for_each_core(tmp_path, monkeypatch, count, processes):
    """In tasks of 64, by turns; fewer are converted here. The global generator stays where it was."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    state = torch.get_rng_state()
    datasets.write_array(tmp_path / "x.npy", (count, 2), (i % 256 for i in range(count)), pixel)
    assert torch.equal(torch.get_rng_state(), state)
    found = np.load(tmp_path / "x.npy")
    np.testing.assert_array_equal(found[:, 0], np.arange(count) % 256)
    by = [{*found[i : i + 64, 1]} for i in range(0, count, 64)]
    assert all(len(pids) == 1 for pids in by)
    assert len(set.union(*by)) == processes
    assert processes == 1 or {os.getpid() % 256} not in by


def refuse(number, item):
    if number == 200:
        raise BadInput("image 200 cannot be read")
    return np.zeros(1, np.uint8)


def test_a_process_that_cannot_read_an_image_says_so_in_one_line(tmp_path):
    with pytest.raises(BadInput) as caught:
        datasets.write_array(tmp_path / "x.npy", (300, 1), range(300), refuse)
    assert str(caught.value) == "image 200 cannot be read"
    assert [p.name for p in tmp_path.iterdir()] == ["x.lock"]


def slow(number, item):
    Path(f"pid-{os.getpid()}").touch()
    time.sleep(0.01)
    return np.full(4096, item, np.uint8)  # 64 of which are more than a pipe takes


def test_a_conversion_by_several_processes_that_is_killed_goes_on(tmp_path, monkeypatch):
    """And none of those processes is left."""
    monkeypatch.setattr(datasets, "CHUNK", 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1}, raising=False)
    file, partial = tmp_path / "x.npy", tmp_path / "x.partial"
    convert = lambda: datasets.write_array(file, (640, 4096), (i % 256 for i in range(640)), slow)  # noqa: E731
    pid = in_child(convert)
    while not (partial.exists() and partial.stat().st_size > 130 * 4096):
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    assert not file.exists()
    orphans = [Path("/proc", path.name.removeprefix("pid-"), "cmdline") for path in Path().glob("pid-*")]
    assert len(orphans) == 2
    convert()
    np.testing.assert_array_equal(np.load(file)[:, 7], np.arange(640) % 256)
    end = time.monotonic() + 30
    while any(orphan.exists() and orphan.read_bytes() for orphan in orphans):  # nobody may have waited for it
        assert time.monotonic() < end
        time.sleep(0.1)


def gone(number, item):
    if number == 200:
        os.kill(os.getpid(), signal.SIGKILL)
    return np.zeros(3, np.uint8)


def test_a_process_that_is_killed_ends_a_conversion_which_goes_on_later(tmp_path, monkeypatch):
    """As the system does when memory is short."""
    for i in range(201):
        (tmp_path / f"{i:03}.png").touch()
    monkeypatch.setattr(datasets, "crop", lambda name, size, number, item: gone(number, item))
    with pytest.raises(Failed, match="a process that converts images is gone; the same command goes on"):
        datasets.load_images(f"folder:{tmp_path}", ".", 1, "train")
    (partial,) = Path("cache").glob("*.partial")
    assert partial.stat().st_size >= 128


def in_child(function):
    """Run function in a process of its own; return how it ended."""
    pid = os.fork()
    if pid == 0:
        try:
            function()
            os._exit(0)
        finally:
            os._exit(1)
    return pid


def test_a_killed_conversion_goes_on_where_it_was(photos, monkeypatch):
    """SIGKILL in the fifth chunk: the first three are kept, for the fourth may not have reached the disk."""
    crop = datasets.crop

    def killed(name, size, number, item):
        if number == 17:
            os.kill(os.getpid(), signal.SIGKILL)
        return crop(name, size, number, item)

    with monkeypatch.context() as patch:
        patch.setattr(datasets, "crop", killed)
        pid = in_child(lambda: load_photos(photos))
        assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    (partial,) = Path("cache").glob("*.partial")
    assert not list(Path("cache").glob("*.npy"))
    with open(partial, "r+b") as file:  # what is lost when the power fails
        file.seek(-4 * 192, os.SEEK_END)
        file.write(bytes(4 * 192))
    load_photos(photos)
    assert sorted(photos.converted) == list(range(12, 22))


@pytest.mark.parametrize("where", ["header", "chunk", "all"])
def test_a_conversion_goes_on_from_a_partial_file_of_any_length(photos, where):
    load_photos(photos)
    file = cache_file()
    content = file.read_bytes()
    length, left = {"header": (128, 22), "chunk": (128 + 5 * 192, 18), "all": (len(content), 2)}[where]
    file.with_suffix(".partial").write_bytes(content[:length])
    file.unlink()
    photos.converted.clear()
    load_photos(photos)
    assert sorted(photos.converted) == list(range(22 - left, 22))


@pytest.mark.parametrize("damage", ["empty", "garbage", "truncated", "longer", "another shape"])
@pytest.mark.parametrize("suffix", [".npy", ".partial"])
def test_a_damaged_cache_is_made_anew(photos, damage, suffix):
    load_photos(photos)
    file = cache_file()
    content = file.read_bytes()
    bad = {"empty": b"", "garbage": bytes(len(content)), "truncated": content[:-100]}
    bad |= {"longer": content + b"0", "another shape": content.replace(b"(22, 3, 8, 8)", b"(11, 6, 8, 8)")}
    file.unlink()
    file.with_suffix(suffix).write_bytes(bad[damage])
    load_photos(photos)


def test_the_cache_is_another_for_another_source_and_size(photos, tmp_path):
    load_photos(photos)
    assert datasets.load_images(photos.name, ".", 4, "train").shape[-1] == 4
    save(tmp_path / "photos" / "05.png", np.full((8, 8, 3), 99))
    assert datasets.load_images(photos.name, ".", 8, "train")[5, 0, 0, 0] == 99
    (tmp_path / "photos" / "07.png").rename(tmp_path / "photos" / "77.png")
    assert datasets.load_images(photos.name, ".", 8, "train")[-1, 0, 0, 0] == 70
    (tmp_path / "photos" / "77.png").unlink()
    assert len(datasets.load_images(photos.name, ".", 8, "train")) == 21


def test_of_two_processes_one_converts_and_both_read_all(photos, monkeypatch, tmp_path):
    crop, log = datasets.crop, tmp_path / "log"

    def slow(name, size, number, item):
        time.sleep(0.02)
        with open(log, "a") as file:
            file.write(f"{number}\n")
        return crop(name, size, number, item)

    monkeypatch.setattr(datasets, "crop", slow)
    pid = in_child(lambda: load_photos(photos))
    load_photos(photos)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert sorted(map(int, log.read_text().split())) == list(range(22))


def test_a_signal_stops_a_conversion_which_goes_on_later(photos, monkeypatch):
    crop, signals = datasets.crop, []

    def interrupted(name, size, number, item):
        if number == 9:
            signals.append(signal.SIGTERM)
        return crop(name, size, number, item)

    monkeypatch.setattr(datasets, "SIGNALS", signals)
    with monkeypatch.context() as patch:
        patch.setattr(datasets, "crop", interrupted)
        with pytest.raises(SystemExit) as stopped:
            load_photos(photos)
    assert stopped.value.code == 128 + signal.SIGTERM
    assert sorted(photos.converted) == list(range(12))
    signals.clear()
    load_photos(photos)
    assert sorted(photos.converted[12:]) == list(range(8, 22))


def test_images_are_read_no_further_than_a_chunk_ahead_of_the_file(photos):
    """So three million of them never are in memory at a time."""
    partial = Path("many.partial")

    def items():
        for i in range(22):
            assert i < 4 or (partial.stat().st_size - 128) / 3 >= i // 4 * 4
            yield i

    datasets.write_array(Path("many.npy"), (22, 3), items(), lambda i, item: np.full(3, item, np.uint8))
    np.testing.assert_array_equal(np.load("many.npy"), np.arange(22)[:, None].repeat(3, 1))


def test_a_folder_that_cannot_be_written_or_is_full_is_refused(photos, monkeypatch):
    Path("file").write_text("")
    assert "--data-dir" in refusal(photos.name, "file", image_size=8)
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr(datasets.shutil, "disk_usage", lambda path: usage)
    message = refusal(photos.name, image_size=8)
    assert "--data-dir is a disk with 1,000 free bytes" in message
    assert "4,352" in message  # 128 + 22 * 3 * 8 * 8
    usage.free = 5000
    load_photos(photos)


# --- images that do not fit ----------------------------------------------------------------------


@pytest.fixture
def both(photos, monkeypatch):
    """The same images in memory, and read ahead from a memory map; how often np.load mapped its file."""
    modes, array = [], np.load
    whole = load(photos.name, image_size=8)
    monkeypatch.setattr(datasets, "IN_MEMORY", 1000)
    monkeypatch.setattr(np, "load", lambda *a, mmap_mode: (modes.append(mmap_mode), array(*a, mmap_mode))[1])
    mapped = load(photos.name, image_size=8)
    assert modes == ["r"]  # with "c" the system wants memory for all of it
    return whole, mapped


def test_batches_of_a_memory_map_are_those_of_memory(both):
    whole, mapped = both
    assert whole.reader is None  # what is in memory needs no thread
    assert mapped.reader is not None
    for i in (0, 1, 2, 3, 9, 4, 5, 5, 6, 0, 1):  # five batches an epoch
        assert torch.equal(mapped.batch(i), whole.batch(i))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_next_batch_of_a_memory_map_is_gathered_ahead_by_one_thread(both, photos, world_size):
    _, mapped = both
    parts = [load(photos.name, image_size=8, rank=r, world_size=world_size) for r in range(world_size)]
    gathered = []
    note = lambda i: gathered.append((i, threading.get_ident()))  # noqa: E731
    for part in parts:
        part.gather = lambda i, gather=part.gather: (note(i), gather(i))[1]
    for i in range(12):
        together = torch.cat([part.batch(i) for part in parts])
        assert torch.equal(together, mapped.batch(i))
    for part in parts:
        part.ahead.result()
    assert sorted(i for i, _ in gathered) == sorted([*range(13)] * world_size)
    assert len({thread for _, thread in gathered}) == world_size
    assert threading.get_ident() not in {thread for _, thread in gathered}


# --- other refusals ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["8gaussians", "digits"])
def test_a_batch_that_processes_cannot_share_is_refused(name):
    assert "--batch-size is 10" in refusal(name, batch_size=10, world_size=3)
