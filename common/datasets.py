"""Data sets as batches that are a pure function of (seed, i): no loader, no workers, no state to save.

Images are kept as uint8 on the device of training until the batch is made; the toys are drawn afresh.
"""

import codecs
import math
import pickle
import tarfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import center_crop, resize
from tqdm import tqdm

from common.run import BadInput, mix, require

TOYS = {"8gaussians": 2, "25gaussians": 2, "swissroll": 2, "ring2d": 2, "ring3d": 3}  # name: dimension
SWISSROLL_STD = 0.25 / 7.5
IMAGES = ("digits", "mnist", "fashion-mnist", "cifar10")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"
CIFAR10_MD5 = "c58f30108f718f92721af3b95e74349a"
IMAGE_FILES = {".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".ppm", ".pgm"}


@dataclass
class Batches:
    """A data set, cut into batches of which every process gets its own part.

    shape: of one sample, (c, h, w) of an image or (d,) of a toy.
    """

    name: str
    shape: tuple[int, ...]
    batch_size: int  # over all processes
    seed: int
    rank: int
    world_size: int

    def __post_init__(self) -> None:
        n, expected = self.world_size, f"a multiple of the {self.world_size} processes, at least 2 for each"
        require(
            self.batch_size % n == 0 and self.batch_size >= 2 * n, "--batch-size", self.batch_size, expected
        )

    def part(self, whole: Tensor) -> Tensor:
        """Return this process's rows of the global batch."""
        n = self.batch_size // self.world_size
        return whole[self.rank * n : (self.rank + 1) * n]


@dataclass
class Toy(Batches):
    """Points without end: batch i is drawn with a generator of its own."""

    device: torch.device

    def batch(self, i: int) -> Tensor:
        """Return batch i, (batch_size / world_size, d) float32."""
        return self.part(draw_toy(self.name, self.batch_size, mix(self.seed, 3, i))).to(self.device)


@dataclass
class Images(Batches):
    """images: (N, c, h, w) uint8; value_range: what 0 and 255 become; split: which of the set they are."""

    images: Tensor
    value_range: tuple[float, float]
    split: str = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        n = len(self.images)
        require(
            self.batch_size <= n, "--batch-size", self.batch_size, f"at most {n}, the size of {self.name}"
        )
        self.epoch = -1

    def batch(self, i: int) -> Tensor:
        """Return batch i, (batch_size / world_size, c, h, w) float32 in value_range.

        Every epoch is a new order of all images; a rest smaller than a batch is left for another epoch.
        """
        epoch, position = divmod(i, len(self.images) // self.batch_size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, 4, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            self.epoch, self.order = epoch, order.to(self.images.device)
        start = position * self.batch_size
        low, high = self.value_range
        chosen = self.images[self.part(self.order[start : start + self.batch_size])]
        return chosen.float().mul_((high - low) / 255).add_(low)


def kind(name: str) -> str:
    """Return toys, folder, or the name itself: what a script's table of defaults is keyed by."""
    return "toys" if name in TOYS else name.split(":")[0].removeprefix("fashion-")


def to_uint8(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return images as uint8, rounded once, after clamping to value_range."""
    low, high = value_range
    return ((images.float() - low) * (255 / (high - low))).round_().clamp_(0, 255).to(torch.uint8)


def load(args, split: str, value_range: tuple[float, float], device, rank: int, world_size: int) -> Batches:
    """Return the data set args.dataset in batches of args.batch_size (over all processes).

    Args:
        args: dataset, data_dir, image_size, batch_size and seed are read.
        split: train, test, or all.
        value_range: what the pixel values 0 and 255 become; not read for toys.

    Raises:
        BadInput: an unknown name, missing or damaged files, a set smaller than a batch.
    """
    batches = args.batch_size, args.seed, rank, world_size
    if args.dataset in TOYS:
        return Toy(args.dataset, (TOYS[args.dataset],), *batches, device)
    images = load_images(args.dataset, args.data_dir, args.image_size, split)
    return Images(args.dataset, tuple(images.shape[1:]), *batches, images.to(device), value_range, split)


# --- toys ----------------------------------------------------------------------------------------


def toy_modes(name: str) -> tuple[Tensor, Tensor]:
    """Return the centres (modes, d) and the noise's standard deviations (d,) of a toy made of Gaussians.

    8gaussians, 25gaussians: Gulrajani et al. 2017, as in their code (coordinates of standard deviation 1).
    ring2d, ring3d (before its rotation): the code of the GRAM-nets paper.
    """
    if name == "25gaussians":
        grid = torch.arange(-2.0, 3.0) * (2 / 2.828)
        return torch.cartesian_prod(grid, grid), torch.full((2,), 0.05 / 2.828)
    radius, std, first = (2 / 1.414, 0.02 / 1.414, 0.0) if name == "8gaussians" else (2.0, 0.2, -math.pi / 2)
    angle = first + torch.arange(8) * (math.pi / 4)
    centres = radius * torch.stack([angle.cos(), angle.sin(), torch.zeros(8)], 1)
    return centres[:, : TOYS[name]], torch.tensor([std, std, 0.1])[: TOYS[name]]


def swissroll_curve(u: Tensor) -> Tensor:
    """Return points (n, 2) of the noiseless roll at u in [0, 1]: scikit-learn's columns 0 and 2, / 7.5."""
    t = 1.5 * math.pi * (1 + 2 * u)
    return torch.stack([t * t.cos(), t * t.sin()], 1) / 7.5


def rotation(name: str) -> Tensor:
    """Return the matrix (d, d) that turns a toy's points, as rows, from the right: 60 degrees for ring3d."""
    if name != "ring3d":
        return torch.eye(TOYS[name])
    c, s = math.cos(math.pi / 3), math.sin(math.pi / 3)
    return torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]])  # about the second axis


def draw_toy(name: str, n: int, seed: int) -> Tensor:
    """Return n points (n, d) float32 of a toy distribution, at the scales of its paper's code."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, TOYS[name], generator=generator)
    if name == "swissroll":
        return swissroll_curve(torch.rand(n, generator=generator)) + noise * SWISSROLL_STD
    centres, std = toy_modes(name)
    which = torch.randint(len(centres), (n,), generator=generator)
    return (centres[which] + std * noise) @ rotation(name)


# --- images --------------------------------------------------------------------------------------


def load_images(name: str, data_dir: str, image_size: int | None, split: str) -> Tensor:
    """Return all images of a split as uint8 (N, c, h, w), resized where image_size asks for it.

    Raises:
        BadInput: as load.
    """
    if name.startswith("folder:"):
        require(image_size is not None, "--image-size", image_size, "given with --dataset folder:PATH")
        require(split == "train", "--eval-split", split, "train: a folder has no other")
        return read_folder(Path(name.removeprefix("folder:")), image_size)
    names = f"one of {', '.join((*TOYS, *IMAGES))}, or folder:PATH"
    require(name in IMAGES, "--dataset", name, names)
    if name == "digits":
        require(split == "train", "--eval-split", split, "train: digits has no other")
    parts = [
        _read(name, Path(data_dir), part) for part in (("train", "test") if split == "all" else (split,))
    ]
    images = torch.cat(parts)
    if image_size not in (None, images.shape[-1]):
        images = torch.cat([resize(chunk, [image_size] * 2) for chunk in images.split(1000)])
    return images


def _read(name: str, data_dir: Path, split: str) -> Tensor:
    try:
        if name == "digits":
            from sklearn.datasets import load_digits

            images = torch.from_numpy(load_digits().images)  # 17 grey levels, 0 to 16
            return (images * (255 / 16)).round().to(torch.uint8)[:, None]
        if name == "cifar10":
            return read_cifar10(data_dir, split)
        loader = torchvision.datasets.MNIST if name == "mnist" else torchvision.datasets.FashionMNIST
        return loader(data_dir, train=split == "train", download=True).data[:, None]
    except BadInput:
        raise
    except Exception as error:  # whatever a reader says of files that are not there or not whole
        raise BadInput(
            f"--dataset {name}: not found or damaged under {data_dir}, and could not be downloaded there"
            f" ({str(error) or repr(error):.150})"
        ) from error


class ArrayUnpickler(pickle.Unpickler):
    """Reads the pickles of CIFAR: NumPy arrays and plain containers, and runs nothing else."""

    def find_class(self, module: str, name: str) -> object:
        reconstruct = np.ndarray(0).__reduce__()[0]  # its module differs between versions of NumPy
        allowed = {
            "_reconstruct": reconstruct,
            "ndarray": np.ndarray,
            "dtype": np.dtype,
            "encode": codecs.encode,
        }
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"holds {module}.{name}, which image data does not need")


def read_cifar10(data_dir: Path, split: str) -> Tensor:
    """Return CIFAR-10 as uint8 (N, 3, 32, 32) from cifar-10-batches-py/ or cifar-10-python.tar.gz."""
    folder, archive = data_dir / "cifar-10-batches-py", data_dir / "cifar-10-python.tar.gz"
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    if not folder.exists() and not archive.exists():
        try:
            torchvision.datasets.utils.download_url(CIFAR10_URL, data_dir, archive.name, CIFAR10_MD5)
        except Exception as error:
            raise BadInput(
                f"--dataset cifar10: {archive} is missing and could not be downloaded ({error});"
                f" put the file from {CIFAR10_URL} there"
            ) from error
    try:
        if folder.exists():
            arrays = [_cifar_images((folder / name).open("rb")) for name in names]
        else:
            with tarfile.open(archive) as files:
                arrays = [_cifar_images(files.extractfile(f"{folder.name}/{name}")) for name in names]
        return torch.from_numpy(np.concatenate(arrays))
    except (
        OSError,
        EOFError,
        KeyError,
        ValueError,
        zlib.error,
        tarfile.TarError,
        pickle.UnpicklingError,
    ) as e:
        source = folder if folder.exists() else archive
        raise BadInput(f"--dataset cifar10: {source} is damaged or incomplete ({e}); delete it") from e


def _cifar_images(file) -> np.ndarray:
    with file:
        data = ArrayUnpickler(file, encoding="latin1").load()["data"]  # (n, 3072): channel, row, column
    if data.dtype != np.uint8:
        raise ValueError(f"images of type {data.dtype}, not uint8")
    return data.reshape(-1, 3, 32, 32)


def read_folder(path: Path, image_size: int) -> Tensor:
    """Return every image below path as uint8 (N, 3, s, s): shorter side scaled to s, centre cropped."""
    require(path.is_dir(), "--dataset", f"folder:{path}", "an existing folder")
    files = sorted(f for f in path.rglob("*") if f.suffix.lower() in IMAGE_FILES and f.is_file())
    require(len(files) > 0, "--dataset", f"folder:{path}", "a folder that holds images, of which it has none")

    def read(file: Path) -> Tensor:
        try:
            with Image.open(file) as image:
                small = center_crop(resize(image.convert("RGB"), image_size), image_size)
                return torch.from_numpy(np.array(small)).permute(2, 0, 1)
        except Exception as error:  # Pillow's decoders raise what they like
            raise BadInput(f"--dataset folder:{path}: {file} cannot be read ({error})") from error

    with ThreadPoolExecutor() as pool:
        images = tqdm(pool.map(read, files), total=len(files), desc=f"reading {path}", disable=None)
        return torch.stack(list(images))
