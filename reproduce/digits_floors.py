"""What a perfect model of `digits` would score: the floors of pixel_frechet.

    python -m reproduce.digits_floors

A run compares 1,797 samples with the 1,797 images. Fresh digits cannot be had, so the images stand for their
distribution, and are drawn from with replacement (bootstrap):

    copies    1,797 drawn from the images, against the images: what a model that only copies them gets
    fresh     1,797 drawn from the images, against 1,797 others drawn: what new digits would get
    halves    two random halves of the images: fewer images, so a larger distance; no yardstick for a run

Each is printed as mean, smallest and largest over the draws.
"""

import argparse

import torch
from torch import Tensor

from common import datasets, evaluation


def distance(x: Tensor, y: Tensor) -> float:
    """Return the Frechet distance of pixels of uint8 images (n, 1, 8, 8) and (m, 1, 8, 8)."""
    sides = []
    for images in (x, y):
        statistics = evaluation.Statistics()
        statistics.add(evaluation.pixels(images)[0])
        sides.append(statistics.result())
    return evaluation.frechet_distance(*sides)


def floors(images: Tensor, draws: int) -> dict[str, list[float]]:
    """Return the distances of each floor, one for each draw."""
    generator = torch.Generator().manual_seed(0)
    n = len(images)
    found = {"copies": [], "fresh": [], "halves": []}
    for _ in range(draws):
        one = images[torch.randint(n, (n,), generator=generator)]
        other = images[torch.randint(n, (n,), generator=generator)]
        order = torch.randperm(n, generator=generator)
        found["copies"].append(distance(one, images))
        found["fresh"].append(distance(one, other))
        found["halves"].append(distance(images[order[: n // 2]], images[order[n // 2 :]]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="2 draws, to see that it runs")
    draws = 2 if parser.parse_args().quick else 20
    images = datasets.load_images("digits", "data", None, "train")
    print(f"Frechet distance of pixels, {len(images)} digits, {draws} draws: mean [smallest, largest]")
    for name, values in floors(images, draws).items():
        print(f"{name:8} {sum(values) / draws:.3f} [{min(values):.3f}, {max(values):.3f}]")


if __name__ == "__main__":
    main()
