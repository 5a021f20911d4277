"""Data sets as batches that are a pure function of (seed, i): no loader, no workers, no state to save.

Images are kept as uint8 until the batch is made, on the device of training where they fit, else in a memory
map that a thread reads ahead; the toys are drawn afresh.
"""

import codecs
import functools
import hashlib
import importlib.util
import io
import math
import os
import pickle
import shutil
import sys
import tarfile
import threading
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from filelock import FileLock
from PIL import Image, ImageOps, TiffImagePlugin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from common.run import SIGNALS, BadInput, Failed, Stream, mix, require, several

TOYS = {  # name: dimension
    "8gaussians": 2,
    "25gaussians": 2,
    "swissroll": 2,
    "ring2d": 2,
    "ring2d-sharp": 2,
    "ring3d": 3,
}
RINGS = {  # name: radius, standard deviation of the noise, angle of the first of eight modes
    "8gaussians": (2 / 1.414, 0.02 / 1.414, 0.0),
    "ring2d": (2.0, 0.2, -math.pi / 2),
    "ring2d-sharp": (2.0, 0.01, -math.pi / 2),
    "ring3d": (2.0, 0.2, -math.pi / 2),
}
SWISSROLL_STD = 0.25 / 7.5
IMAGES = {  # name: what has to be under --data-dir, and where it comes from
    "digits": "scikit-learn",
    "mnist": "MNIST/raw/ with the four files of https://ossci-datasets.s3.amazonaws.com/mnist/, unpacked",
    "fashion-mnist": "FashionMNIST/raw/ with the four files of https://github.com/zalandoresearch/fashion-mnist,"
    " unpacked",
    "cifar10": "cifar-10-python.tar.gz of https://www.cs.toronto.edu/~kriz/, packed or not",
    "stl10": "stl10_binary/ of http://ai.stanford.edu/~acoates/stl10/stl10_binary.tar.gz",
    "celeba": "celeba/img_align_celeba/ (img_align_celeba.zip, unpacked) and celeba/list_eval_partition.txt"
    " (or Kaggle's .csv) of https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    "lsun-bedroom": "lsun/bedroom_train_lmdb/ and lsun/bedroom_val_lmdb/ (and: pip install lmdb) of"
    " http://dl.yf.io/lsun/scenes/, or images exported from those to lsun/bedroom_train/ and bedroom_val/",
    "imagenet": "imagenet/train/ and imagenet/val/ with the images, in folders or not, of"
    " ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar of https://image-net.org",
}
LARGE = {"stl10": 48, "celeba": 64, "lsun-bedroom": 64, "imagenet": 64}  # converted once; name: default size
IN_MEMORY = 4e9  # bytes; of more images a memory map is read
LANCZOS = Image.Resampling.LANCZOS
CHUNK = 1024  # images converted, and made safe on the disk, at a time
TASK = 64  # of those, by one process at a time
REDUCE = 4  # how many times the size that is wanted a JPEG still has that is decoded at 1/2, 1/4 or 1/8
# Formats that Pillow lists but only recognises, and EPS, for which it runs another program.
NOT_DECODED = {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}


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
    device: torch.device

    def __post_init__(self) -> None:
        n, size = self.world_size, self.batch_size
        expected = f"a multiple of the {n} processes, at least 2 for each"
        require(size % n == 0 and size >= 2 * n, "--batch-size", size, expected)

    def state_dict(self) -> dict:
        """Return what tells these data from others, to be kept in a checkpoint."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Compare with what state_dict gave in an earlier run; BadInput if that had other data."""
        if state != self.state_dict():
            expected = f"the {state.get('count')} images of before, unchanged, there or at another place"
            raise BadInput(f"--resume: the images of {self.name} ({self.state_dict()}) should be {expected}")

    def own_part(self, whole: Tensor) -> Tensor:
        """Return this process's rows of the global batch."""
        n = self.batch_size // self.world_size
        return whole[self.rank * n : (self.rank + 1) * n]


@dataclass
class Toy(Batches):
    """Points without end: batch i is drawn with a generator of its own."""

    def batch(self, i: int) -> Tensor:
        """Return batch i, (batch_size / world_size, d), of PyTorch's default type."""
        points = draw_toy(self.name, self.batch_size, mix(self.seed, Stream.TOY_BATCH, i))
        return self.own_part(points).to(self.device, non_blocking=True)


@dataclass
class Images(Batches):
    """images: (N, c, h, w) uint8; value_range: what 0 and 255 become; split: which of the set they are.

    Of images that are more than IN_MEMORY, or not on the device, one thread gathers the next batch while this
    one is used.
    """

    images: Tensor
    value_range: tuple[float, float]
    split: str = "train"

    def __post_init__(self) -> None:
        super().__post_init__()
        n, size = len(self.images), self.batch_size
        require(size <= n, "--batch-size", size, f"at most {n}, the size of {self.name}")
        self.epoch = -1  # of which order is
        self.next = -1  # the batch that the reader has ahead
        here = self.images.device.type == self.device.type and self.images.nbytes <= IN_MEMORY
        self.reader = None if here else ThreadPoolExecutor(1)

    def state_dict(self) -> dict:
        """Return the number of images, and a hash of 256 of them (or all, where there are no more)."""
        chosen = torch.linspace(0, len(self.images) - 1, min(256, len(self.images))).long()
        pixels = self.images[chosen.to(self.images.device)].cpu().contiguous().numpy()
        return {"count": len(self.images), "sha256": hashlib.sha256(pixels).hexdigest()}

    def batch(self, i: int) -> Tensor:
        """Return batch i, (batch_size / world_size, c, h, w) in value_range, of PyTorch's default type.

        Every epoch is a new order of all images; a rest smaller than a batch is left for another epoch.
        """
        if self.reader is None:
            chosen = self.images[self.own_indices(i)]
        else:
            ahead = self.ahead if i == self.next else self.reader.submit(self.gather, i)
            self.next, self.ahead = i + 1, self.reader.submit(self.gather, i + 1)
            chosen = ahead.result().to(self.device, non_blocking=True)
        low, high = self.value_range
        return chosen.to(torch.get_default_dtype()).mul_((high - low) / 255).add_(low)

    def own_indices(self, i: int) -> Tensor:
        """Return which images are this process's part of batch i."""
        epoch, position = divmod(i, len(self.images) // self.batch_size)
        if epoch != self.epoch:
            generator = torch.Generator().manual_seed(mix(self.seed, Stream.EPOCH, epoch))
            order = torch.randperm(len(self.images), generator=generator)
            self.epoch, self.order = epoch, order.to(self.images.device)
        start = position * self.batch_size
        return self.own_part(self.order[start : start + self.batch_size])

    def gather(self, i: int) -> Tensor:
        """Return batch i as uint8. NumPy reads it on one thread, and lets the others run meanwhile."""
        chosen = torch.from_numpy(np.take(self.images.numpy(), self.own_indices(i).numpy(), 0))
        return chosen.pin_memory() if self.device.type == "cuda" else chosen


def family(name: str) -> str:
    """Return toys, folder, mnist for both MNISTs, or the name: what a script's table DEFAULTS is keyed by.

    BadInput: there is no such data set, or no such folder.
    """
    readable = name.encode(errors="replace").decode() == name
    require(readable, "--dataset", ascii(name), "a name in UTF-8: it goes into the curves")
    folder = name.startswith("folder:") and os.path.isdir(name.removeprefix("folder:"))
    names = f"one of {', '.join((*TOYS, *IMAGES))}, or folder:PATH with the PATH of a folder"
    require(folder or name in TOYS or name in IMAGES, "--dataset", name, names)
    return "toys" if name in TOYS else name.split(":")[0].removeprefix("fashion-")


def to_uint8(images: Tensor, value_range: tuple[float, float]) -> Tensor:
    """Return images as uint8, rounded once, after clamping to value_range."""
    low, high = value_range
    return ((images.float() - low) * (255 / (high - low))).round_().clamp_(0, 255).to(torch.uint8)


def load(args, split: str, value_range: tuple[float, float], device, rank: int, world_size: int) -> Batches:
    """Return split (train, test, all) of the data set args.dataset, in batches of args.batch_size.

    Of args data_dir, image_size and seed are read too. value_range: what the pixel values 0 and 255 become.
    BadInput: an unknown name, missing or damaged files, a set smaller than a batch.
    """
    one_split = args.dataset in TOYS or family(args.dataset) in ("digits", "folder")
    expected = f"train: {family(args.dataset)} has no other"
    require(split == "train" or not one_split, "--train-split", split, expected)
    batches = args.batch_size, args.seed, rank, world_size, device
    if args.dataset in TOYS:
        return Toy(args.dataset, (TOYS[args.dataset],), *batches)
    images = load_images(args.dataset, args.data_dir, args.image_size, split)
    room = torch.cuda.mem_get_info(device)[0] / 2 if device.type == "cuda" else IN_MEMORY
    if images.nbytes <= min(room, IN_MEMORY):
        images = images.to(device)
    return Images(args.dataset, tuple(images.shape[1:]), *batches, images, value_range, split)


# --- toys ----------------------------------------------------------------------------------------


def toy_modes(name: str) -> tuple[Tensor, Tensor]:
    """Return the centres (modes, d) and the noise's standard deviations (d,) of a toy made of Gaussians.

    8gaussians, 25gaussians: Gulrajani et al. 2017, as in their code (coordinates of standard deviation 1).
    ring2d, ring3d (before its rotation): the code of the GRAM-nets paper. ring2d-sharp: the noise of 0.01
    that this paper prints.
    """
    if name == "25gaussians":
        grid = torch.arange(-2.0, 3.0) * (2 / 2.828)
        return torch.cartesian_prod(grid, grid), torch.full((2,), 0.05 / 2.828)
    radius, std, first = RINGS[name]
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

    split: of stl10 train is the unlabelled images; of lsun-bedroom and imagenet test is their validation
    images; of celeba all has its validation images too. BadInput: as load.
    """
    data_dir = Path(data_dir)
    folder = family(name) == "folder"
    if folder or name == "digits":
        require(split == "train", "--eval-split", split, f"train: {family(name)} has no other")
    require(image_size or not folder, "--image-size", image_size, "given with --dataset folder:PATH")
    parts = ("train", "test") if split == "all" else (split,)
    try:
        if folder or name in LARGE:
            return _convert(name, data_dir, image_size or LARGE[name], parts)
        if several() and dist.get_rank() > 0:
            dist.barrier()  # the first process downloads what is missing
        images = torch.cat([_read(name, data_dir, part) for part in parts])
        if several() and dist.get_rank() == 0:
            dist.barrier()
    except (BadInput, Failed):
        raise
    except Exception as error:  # whatever a reader says of files that are not there or not whole
        require(not folder, "--dataset", name, f"a folder with images ({error})")
        problem = f"not found or damaged under {data_dir} ({str(error) or repr(error):.300})"
        raise BadInput(f"--dataset {name}: {problem}; put there {IMAGES[name]}") from error
    if image_size not in (None, images.shape[-1]):
        from torchvision.transforms.v2.functional import resize

        images = torch.cat([resize(chunk, [image_size] * 2) for chunk in images.split(1000)])
    return images


# --- small sets ----------------------------------------------------------------------------------


def _read(name: str, data_dir: Path, split: str) -> Tensor:
    if name == "digits":
        # scikit-learn's file, without importing it, which takes nearly as long as importing PyTorch.
        (sklearn,) = importlib.util.find_spec("sklearn").submodule_search_locations
        rows = np.loadtxt(Path(sklearn, "datasets", "data", "digits.csv.gz"), np.float64, delimiter=",")
        images = torch.from_numpy(rows[:, :64]).view(-1, 1, 8, 8)  # 17 grey levels, 0 to 16; then the label
        return (images * (255 / 16)).round().to(torch.uint8)
    if name == "cifar10":
        return read_cifar10(data_dir, split)
    from torchvision.datasets import MNIST, FashionMNIST

    loader = MNIST if name == "mnist" else FashionMNIST
    return loader(data_dir, train=split == "train", download=True).data[:, None]


class ArrayUnpickler(pickle.Unpickler):
    """Reads the pickles of CIFAR: NumPy arrays and plain containers, and runs nothing else."""

    def find_class(self, module: str, name: str) -> object:
        reconstruct = np.ndarray(0).__reduce__()[0]  # its module differs between versions of NumPy
        allowed = dict(_reconstruct=reconstruct, ndarray=np.ndarray, dtype=np.dtype, encode=codecs.encode)
        if module.split(".")[0] in ("numpy", "_codecs") and name in allowed:
            return allowed[name]
        raise pickle.UnpicklingError(f"holds {module}.{name}, which image data does not need")


def read_cifar10(data_dir: Path, split: str) -> Tensor:
    """Return CIFAR-10 as uint8 (N, 3, 32, 32) from cifar-10-batches-py/ or cifar-10-python.tar.gz."""
    folder = data_dir / "cifar-10-batches-py"
    archive = data_dir / "cifar-10-python.tar.gz"
    names = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    if folder.exists():
        return torch.from_numpy(np.concatenate([_cifar_images((folder / name).open("rb")) for name in names]))
    if not archive.exists():
        from torchvision.datasets import CIFAR10, utils

        utils.download_url(CIFAR10.url, data_dir, archive.name, CIFAR10.tgz_md5)
    with tarfile.open(archive) as files:
        arrays = [_cifar_images(files.extractfile(f"{folder.name}/{name}")) for name in names]
    return torch.from_numpy(np.concatenate(arrays))


def _cifar_images(file) -> np.ndarray:
    with file:
        data = ArrayUnpickler(file, encoding="latin1").load()["data"]  # (n, 3072): channel, row, column
    if data.dtype != np.uint8:
        raise ValueError(f"images of type {data.dtype}, not uint8")
    return data.reshape(-1, 3, 32, 32)


# --- large sets ----------------------------------------------------------------------------------


@dataclass
class Found:
    """Images that are to be converted."""

    count: int
    items: Iterable  # the images, as yet encoded: what decode takes
    files: list  # that they come from
    left_out: int = 0  # files beside them


def _convert(name: str, data_dir: Path, size: int, parts: tuple[str, ...]) -> Tensor:
    """Return a large set or a folder as uint8 (N, 3, size, size), converted where that was not done before.

    The cache is one file, data_dir/cache/NAME-PARTS-SIZE-KEY.npy. Its key names what the images depend on:
    the crop, and name, size and time of every file that they come from.
    """
    if name.startswith("folder:"):
        root = Path(name.removeprefix("folder:"))
        found = find_folder(root)
    else:
        root = data_dir
        found = FIND[name](root, parts)
    key = hashlib.sha256(b"crop 2")
    for file in found.files:
        stat = os.stat(file)
        key.update(os.fsencode(str(file).removeprefix(str(root))))
        key.update(f" {stat.st_size} {stat.st_mtime_ns}\n".encode())
    cache = f"{family(name)}-{'+'.join(parts)}-{size}-{key.hexdigest()[:16]}.npy"
    path = data_dir / "cache" / cache
    shape = (found.count, 3, size, size)
    note = f"; files left out: {found.left_out:,}" if found.left_out else ""
    write_array(path, shape, found.items, functools.partial(crop, name, size), note)
    images = np.load(path, mmap_mode="r" if math.prod(shape) > IN_MEMORY else None)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a map that cannot be written: one that can needs the memory
        return torch.from_numpy(images)


def find_stl10(root: Path, parts: tuple[str, ...]) -> Found:
    """Return STL-10 in its binary files, downloaded if they are not there; train: the unlabelled images."""
    folder = root / "stl10_binary"
    if not folder.exists():
        with FileLock(root / "stl10.lock"):
            if not folder.exists():
                download_stl10(root, folder)
    files = [folder / ("unlabeled_X.bin" if part == "train" else "test_X.bin") for part in parts]
    arrays = [np.memmap(file, np.uint8, "r").reshape(-1, 3, 96, 96) for file in files]
    return Found(sum(map(len, arrays)), chain(*arrays), files)


def download_stl10(root: Path, folder: Path) -> None:
    """Download and unpack STL-10 to folder, whole or not at all."""
    from torchvision.datasets import STL10, utils

    unpacked = root / "stl10.partial"
    utils.download_and_extract_archive(STL10.url, root, unpacked, md5=STL10.tgz_md5, remove_finished=True)
    os.replace(unpacked / folder.name, folder)


def find_celeba(root: Path, parts: tuple[str, ...]) -> Found:
    """Return the faces that CelebA's partition names, as text or as Kaggle's .csv; all has validation too.

    BadInput: the partition has a line that is none, or names no image of these parts.
    """
    images = root / "celeba" / "img_align_celeba"
    if (images / images.name).is_dir():  # Kaggle's archive
        images = images / images.name
    partition = root / "celeba" / "list_eval_partition.csv"
    if not partition.exists():
        partition = partition.with_suffix(".txt")
    codes = {("train",): ["0"], ("test",): ["2"]}.get(parts, ["0", "1", "2"])
    files = []
    for line in partition.read_text("utf-8-sig").splitlines():
        fields = line.replace(",", " ").split()
        if fields in ([], ["image_id", "partition"]):
            continue
        ok = len(fields) == 2 and fields[1] in ("0", "1", "2")
        require(ok, f"a line of {partition}", repr(line), "the name of an image, and 0, 1 or 2")
        if fields[1] in codes:
            files.append(f"{images}/{fields[0]}")
    require(len(files) > 0, str(partition), "a list of no image", f"one with code {' or '.join(codes)}")
    return Found(len(files), files, files)


def find_lsun(root: Path, parts: tuple[str, ...]) -> Found:
    """Return LSUN's bedrooms in LMDB, or exported from it; its test images are those to validate."""
    found = []
    for part in parts:
        folder = f"{root}/lsun/bedroom_{'train' if part == 'train' else 'val'}"
        database = f"{folder}_lmdb"
        found.append(find_lmdb(database) if os.path.isdir(database) else find_folder(folder))
    return join(found)


def find_lmdb(folder: str) -> Found:
    """Return the images of an LMDB database: as items, its environment and the key of each."""
    import lmdb

    env = lmdb.open(folder, readonly=True, lock=False, readahead=False, meminit=False)
    count = env.stat()["entries"]
    if count == 0:
        raise FileNotFoundError(f"no image in {folder}")
    keys = env.begin().cursor().iternext(values=False)
    return Found(count, ((env, key) for key in keys), [f"{folder}/data.mdb"])


def read_lmdb(env, key: bytes) -> bytes:
    """Return what an LMDB database has under a key."""
    with env.begin() as transaction:
        return transaction.get(key)


def find_imagenet(root: Path, parts: tuple[str, ...]) -> Found:
    """Return the images below imagenet/; its test images are those to validate."""
    return join([find_folder(f"{root}/imagenet/{'train' if part == 'train' else 'val'}") for part in parts])


FIND = {"stl10": find_stl10, "celeba": find_celeba, "lsun-bedroom": find_lsun, "imagenet": find_imagenet}


def join(parts: list[Found]) -> Found:
    """Return the images of all parts, one part after the other."""
    count = sum(part.count for part in parts)
    items = chain(*(part.items for part in parts))
    files = [*chain(*(part.files for part in parts))]
    return Found(count, items, files, sum(part.left_out for part in parts))


def find_folder(folder: str | Path) -> Found:
    """Return the images below a folder, in the order of their names: all files that Pillow decodes, by name.

    Links are followed, but no folder is entered twice. Names that begin with a dot are left out. OSError: a
    folder that cannot be read, or in which no image is found.
    """
    files, left_out, entered = [], 0, set()
    for place, folders, names in os.walk(folder, onerror=_raise, followlinks=True):
        if os.path.realpath(place) in entered:
            folders.clear()
            continue
        entered.add(os.path.realpath(place))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in names:
            file = os.path.join(place, name)
            image = os.path.splitext(name)[1].lower() in extensions() and os.path.isfile(file)  # no pipe
            if image and not name.startswith("."):
                files.append(file)
            else:
                left_out += 1
    if not files:
        raise FileNotFoundError(f"no image below {folder}")
    files.sort()
    return Found(len(files), files, files, left_out)


def _raise(error: OSError) -> None:
    raise error


@functools.cache
def formats() -> list[str]:
    """Return Pillow's names of the formats that it decodes itself, the frequent ones first."""
    Image.init()
    return [name for name in Image.ID if name not in NOT_DECODED]


@functools.cache
def extensions() -> set[str]:
    """Return Pillow's own list of what the names of such files end with, as .png."""
    decoded = {*formats(), "MPO"}  # which the decoder of JPEG reads too
    return {end for end, name in Image.registered_extensions().items() if name in decoded}


def crop(name: str, size: int, number: int, item: str | np.ndarray | bytes) -> np.ndarray:
    """Return image number of a set as uint8 (3, size, size), cut and scaled as the set's papers do.

    celeba: covers 72x88, of which the central 64x64 is left (Wang et al. 2019), and so in proportion; at 160
    any 160x160 of the central 178x178, half of them mirrored (Arbel et al. 2018), drawn once for each image.
    imagenet: by way of 256x256 (Arbel et al. 2018). Others: shorter side to size, central square.

    item: as decode. BadInput: it cannot be decoded.
    """
    by_way_of = max(size, 256) if name == "imagenet" else size
    try:
        image = decode(item, REDUCE * by_way_of, upright=name.startswith("folder:"))
    except Exception as error:  # Pillow's decoders raise what they like
        what = item if isinstance(item, str) else f"image {number}"
        raise BadInput(f"--dataset {name}: {what} cannot be read, remove or repair it ({error})") from error
    if name == "celeba" and size == 160:
        left, top, mirrored = np.random.default_rng(number).integers((19, 19, 2))
        image = center_crop(image, 178).crop((left, top, left + 160, top + 160))
        image = ImageOps.mirror(image) if mirrored else image
    elif name == "celeba":
        image = center_crop(ImageOps.fit(image, (size * 9 // 8, size * 11 // 8), LANCZOS), size)
    elif name == "imagenet" and size < 256:
        image = ImageOps.fit(image, (256, 256), LANCZOS).resize((size, size), Image.Resampling.BILINEAR)
    else:
        image = ImageOps.fit(image, (size, size), LANCZOS)
    return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))


def center_crop(image: Image.Image, side: int) -> Image.Image:
    """Return the central square of an image."""
    left, top = round((image.width - side) / 2), round((image.height - side) / 2)
    return image.crop((left, top, left + side, top + side))


def decode(item: str | np.ndarray | bytes, enough: int, upright: bool) -> Image.Image:
    """Return an image as RGB of 8 bits; what is transparent is laid on white.

    item: a file's name, a file's content, or pixels (3, width, height).
    enough: a JPEG is decoded at 1/8, 1/4 or 1/2 of its size if its sides are multiples of that (no pixel is
    moved then) and still as long as enough. Scaled down fourfold or more afterwards, photos differ by 0.22 of
    255 levels, no pixel by more than 7 (of four photos, three qualities, sides 16 to 160).
    upright: turn it as its EXIF orientation says.

    ValueError: pixels of more than 8 bits of which the format does not say what is white.
    """
    if isinstance(item, np.ndarray):
        return Image.fromarray(item.transpose(2, 1, 0))
    file = io.BytesIO(item) if isinstance(item, bytes) else item
    with Image.open(file, formats=formats()) as image:
        for divisor in (8, 4, 2):
            if all(side % divisor == 0 and side // divisor >= enough for side in image.size):
                image.draft(None, (image.width // divisor, image.height // divisor))
                break
        image.load()
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        if image.mode[0] in "IF":
            return to_8_bits(image).convert("RGB")
        if image.has_transparency_data:
            white = Image.new("RGBA", image.size, "white")
            return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")
        return image if image.mode == "RGB" else image.convert("RGB")


def to_8_bits(image: Image.Image) -> Image.Image:
    """Return a grey image of more than 8 bits with 8. ValueError: its format does not say what is white."""
    white = 2**16 - 1  # to which Pillow scales what PGM and JPEG 2000 say is white
    known = (image.format, image.mode) in {("PNG", "I;16"), ("PNG", "I"), ("PPM", "I"), ("JPEG2000", "I;16")}
    if image.format == "TIFF" and image.mode in ("I;16", "I;16B"):
        known = image.tag_v2.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 1  # black is zero
        white = 2 ** image.tag_v2[TiffImagePlugin.BITSPERSAMPLE][0] - 1
    if not known:
        expected = "8 bits, or 16 bits of grey in PNG, PGM, JPEG 2000 or TIFF (0 is black)"
        raise ValueError(f"{image.format} with pixels of Pillow's type {image.mode}, should be {expected}")
    levels = np.asarray(image)
    if "transparency" in image.info:
        levels = np.where(levels == image.info["transparency"], white, levels)
    return Image.fromarray(np.rint(levels * (255 / white)).astype(np.uint8))


def write_array(
    path: Path, shape: tuple[int, ...], items: Iterable, convert: Callable, note: str = ""
) -> None:
    """Write convert(i, item) of all items as uint8 to a .npy file, whole or not at all; note is printed.

    What a killed process left is gone on from, but for the last chunk, which may not have reached the disk.
    One process writes, others wait for it. A file of another size or header is made anew. BadInput: it cannot
    be written, or convert raised it. Failed: a process was killed. SystemExit: a signal asked to stop.
    """
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "|u1", "fortran_order": False, "shape": shape})
    header = buffer.getvalue()
    count, row = shape[0], math.prod(shape[1:])  # images, bytes of each
    whole = len(header) + count * row
    partial = path.with_suffix(".partial")

    def size(file: Path) -> int:
        """Return the bytes of a file that begins with this header; of none and of others 0."""
        if not file.exists():
            return 0
        with open(file, "rb") as opened:
            return file.stat().st_size if opened.read(len(header)) == header else 0

    if size(path) == whole:
        return
    print(f"{path} is made once, of {count:,} images{note}", flush=True)
    try:
        with FileLock(path.with_suffix(".lock")):
            if size(path) == whole:
                return
            free = shutil.disk_usage(path.parent).free + size(partial)
            require(free > whole, "--data-dir", f"a disk with {free:,} free bytes", f"one with {whole:,}")
            done = max(0, size(partial) - len(header) - 1) // (CHUNK * row) * CHUNK
            bar = tqdm(total=count, initial=done, desc="converting", unit="image", disable=None)
            with open(partial, "ab") as file, bar:
                if done:
                    file.truncate(len(header) + done * row)
                else:
                    file.truncate(0)
                    file.write(header)
                for part in convert_all(islice(enumerate(items), done, None), count - done, convert):
                    file.write(part)
                    done += len(part) // row
                    bar.update(len(part) // row)
                    if done % CHUNK == 0:
                        file.flush()
                        os.fsync(file.fileno())
                    if SIGNALS:
                        print(f"stopped by signal {SIGNALS[0]}; the same command goes on from here")
                        sys.exit(128 + SIGNALS[0])
            os.replace(partial, path)
    except BadInput:  # what mends it changes the name of the file
        partial.unlink(missing_ok=True)
        raise
    except OSError as error:
        raise BadInput(f"--data-dir: {path} cannot be written ({error})") from error


def convert_all(numbered: Iterable[tuple], count: int, convert: Callable) -> Iterable[bytes]:
    """Yield convert(i, item) of count numbered items (i, item) as bytes, of TASK items at a time, in order.

    Of more than 2 TASKs each core converts some, in a process of its own: threads wait for one another
    wherever Pillow runs Python, and two take as long as one for small images.
    BadInput: convert raised it. Failed: a process was killed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    workers = min(cores, 16) if count > 2 * TASK else 0
    loader = DataLoader(
        Converter(convert),
        batch_size=None,
        sampler=tasks(numbered),
        num_workers=workers,
        worker_init_fn=leave_with_parent,
        generator=torch.Generator(),  # or it would draw from the global one
    )
    try:
        for part in loader:
            if isinstance(part, BadInput):
                raise part
            yield part
    except RuntimeError as error:
        raise Failed(f"a process that converts images is gone; the same command goes on ({error})") from error


def leave_with_parent(worker: int) -> None:
    """End this process once the one that started it is killed: it would wait for ever to be read from."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def tasks(numbered: Iterable[tuple]) -> Iterable[list[tuple]]:
    """Yield numbered items (i, item) in lists; those of LMDB are read here, where it is open."""
    numbered = iter(numbered)
    while task := list(islice(numbered, min(TASK, CHUNK))):
        yield [(i, read_lmdb(*item) if isinstance(item, tuple) else item) for i, item in task]


class Converter(Dataset):
    """What a DataLoader's processes do with a task, a list of (i, item)."""

    def __init__(self, convert: Callable) -> None:
        self.convert = convert

    def __getitem__(self, task: list[tuple]) -> bytes | BadInput:
        """Return what a DataLoader hands on as it is: arrays it would make tensors in shared memory, and to
        the text of an error that is raised it would add a traceback."""
        try:
            return b"".join(self.convert(i, item).tobytes() for i, item in task)
        except BadInput as error:
            return error
