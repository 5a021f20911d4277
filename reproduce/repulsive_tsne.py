"""Repulsive loss, Figure 4: t-SNE of the critic's outputs, coloured by class, attractive against repulsive.

    python -m reproduce.repulsive_tsne --data-dir data

The paper shows 2,560 real images of CIFAR-10 and says that the attractive loss (MMD-rbf) "ignored the class
structure in data", while the repulsive one (MMD-rep) "learned to concentrate the data from the same class and
separate different classes to some extent". Neither saw a label in training, nor does here.

Here 2,560 test images of MNIST and, as controls, a critic that is not trained, and pixels. Beside each
picture two numbers: the share of images whose 5 nearest neighbours among the others vote for their class, and
the variance within classes over all variance, of the 16 outputs (not of the 2 coordinates that t-SNE finds).

Both losses have the paper's kernels: sigma 1, sqrt(2), 2, 2 sqrt(2), 4 for MMD-rbf, 1 for MMD-rep; and its
C^K = 1.818^8, over 6 layers. Shortened: 5,000 updates (the paper has 100,000) at width 16 (64), about 8
minutes of one core for each. Seed 1 alone.

Results: docs/repulsive_tsne.json, one entry for each critic, written when it is trained.
"""

import math
from pathlib import Path

import torch
import tyro
from matplotlib import pyplot
from sklearn.datasets import load_digits
from sklearn.manifold import TSNE
from torch import Tensor
from torchvision.datasets import MNIST

import mmd_gan_repulsive
from common import datasets, run
from reproduce import page, training
from reproduce.page import Row
from reproduce.training import Args

NAME = Path(__file__).stem
UPDATES = 5000
IMAGES = 2560
LAYERS = 6  # of the critic on MNIST: K
LOSSES = {
    "attractive": dict(lam=-1.0, bandwidths=(1.0, 2**0.5, 2.0, 2 * 2**0.5, 4.0)),
    "repulsive": dict(lam=1.0, bandwidths=(1.0,)),
}


def labelled_images(args: Args) -> tuple[Tensor, Tensor]:
    """Return images (n, 1, h, w) as the critic sees them, and their classes (n,)."""
    if args.quick:
        images = datasets.load_images("digits", args.data_dir, None, "train")
        labels = torch.from_numpy(load_digits().target)
    else:
        images = datasets.load_images("mnist", args.data_dir, None, "test")
        labels = MNIST(args.data_dir, train=False).targets  # in the order of the images
    n = 100 if args.quick else IMAGES
    chosen = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:n]
    low, high = mmd_gan_repulsive.VALUE_RANGE
    return low + (high - low) * images[chosen].float() / 255, labels[chosen]


def train(loss: str, args: Args) -> Path:
    """Train with one loss; return the run folder."""
    updates = 2 if args.quick else UPDATES
    settings = mmd_gan_repulsive.Args(
        **LOSSES[loss],
        dataset="digits" if args.quick else "mnist",
        data_dir=args.data_dir,
        width=4 if args.quick else 16,
        sn_gain=1.818 ** (8 / LAYERS),
        total_steps=updates,
        eval_every=updates,
        eval_samples=100 if args.quick else 10_000,
        sample_every=0,
        save_every=100,
        device="cpu",
    )
    return training.train_to(mmd_gan_repulsive, settings, Path(args.runs_dir, NAME, loss))


@torch.no_grad()
def outputs(folder: Path, images: Tensor, trained: bool) -> Tensor:
    """Return what a run's critic makes of images (n, 1, h, w): (n, d), trained or as it was before it."""
    settings = run.saved_arguments(str(folder), mmd_gan_repulsive.Args)
    torch.manual_seed(settings.seed)
    _, critic = mmd_gan_repulsive.make_networks(settings, tuple(images.shape[1:]), torch.device("cpu"))
    if trained:
        state = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
        critic.load_state_dict(state["critic"])
    critic.eval()  # reading a weight in training mode would move the vectors of its spectral norm
    return torch.cat([critic(batch) for batch in images.split(256)])


def describe(features: Tensor, labels: Tensor) -> dict[str, float]:
    """Return how well features (n, d) tell classes (n,) apart: see the docstring of this file."""
    features = features.double()
    distances = torch.cdist(features, features).fill_diagonal_(math.inf)
    neighbours = distances.topk(5, largest=False).indices
    votes = labels[neighbours].mode(1).values
    within = 0.0
    for label in labels.unique():
        own = features[labels == label]
        within += (own - own.mean(0)).square().sum()
    total = (features - features.mean(0)).square().sum()
    return {
        "5 nearest neighbours": (votes == labels).double().mean().item(),
        "within classes": (within / total).item(),
    }


def draw(found: dict[str, Tensor], labels: Tensor, results: dict, args: Args) -> None:
    """Draw the t-SNE of each critic's outputs (n, d)."""
    figure, axes = pyplot.subplots(1, len(found), figsize=(6 * len(found), 6))
    for place, (name, features) in zip(axes, found.items()):
        points = TSNE(init="pca", random_state=0).fit_transform(features.numpy())
        dots = place.scatter(*points.T, c=labels, cmap="tab10", s=6)
        share, within = results[name]["5 nearest neighbours"], results[name]["within classes"]
        place.set_title(f"{name}: 5 neighbours {share:.1%}, within classes {within:.2f}", fontsize=10)
        place.axis("off")
    axes[0].legend(*dots.legend_elements(), title="class", fontsize=8)
    caption = f"""
    t-SNE of what the critic makes of {len(labels):,} images that it was not trained on, coloured by class,
    after {UPDATES:,} updates at width 16, seed 1. 5 neighbours: the share whose nearest ones in the critic's
    outputs vote for their class. Within classes: the variance there over all variance of the outputs.
    """
    page.save(figure, caption, NAME, args)


def main(args: Args) -> list[Row]:
    """Train what is missing, draw, print and return the table."""
    images, labels = labelled_images(args)
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    for loss in LOSSES:
        if loss not in results:
            folder = train(loss, args)
            results[loss] = describe(outputs(folder, images, trained=True), labels)
            ended = training.read_results(folder / "results.json")
            results[loss]["pixel_frechet"] = ended["metrics"]["pixel_frechet"]
            results[loss]["floor"] = ended["protocol"]["floor pixel_frechet"]
            training.write_results(path, results)
    folders = {}
    for loss in LOSSES:
        for checkpoint in Path(args.runs_dir, NAME, loss).glob("*/checkpoint.pt"):
            folders[loss] = checkpoint.parent
    if len(folders) == len(LOSSES):
        found = {"not trained": outputs(folders["repulsive"], images, trained=False)}
        results["not trained"] = describe(found["not trained"], labels)
        results["pixels"] = describe(images.flatten(1), labels)
        training.write_results(path, results)
        found |= {loss: outputs(folder, images, trained=True) for loss, folder in folders.items()}
        draw(found, labels, results, args)
    rows = []
    for name, values in results.items():
        rows += [Row(f"{name}: {what}", math.nan, value) for what, value in values.items()]
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
