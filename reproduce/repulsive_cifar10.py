"""The first command of this project, in small: the repulsive loss with its bounded kernel on CIFAR-10.

    python -m reproduce.repulsive_cifar10 --data-dir data

`python mmd_gan_repulsive.py --dataset cifar10 --kernel rbf-b` at width 32 instead of 64 and for 6,000 updates
instead of 100,000, seed 1: samples after 1,000, 2,000, 4,000 and 6,000 updates; Frechet distance and KID of
pixels against updates (the paper's FID needs weights that are downloaded), 10,000 samples.
docs/repulsive_cifar10.json has the numbers, and what the paper's 100,000 updates at width 64 would take.
"""

import dataclasses
import math
from pathlib import Path

import tyro
from matplotlib import pyplot
from PIL import Image

import mmd_gan_repulsive
from reproduce import page, training
from reproduce.page import Row
from reproduce.training import Args

NAME = Path(__file__).stem
SHOWN = (1000, 2000, 4000, 6000)  # updates after which samples are shown
METRICS = {"pixel_frechet": "Frechet distance of pixels", "pixel_kid": "KID of pixels"}


def main(args: Args) -> list[Row]:
    """Train, draw, print and return the table."""
    shown, dataset, width, samples, updates = SHOWN, "cifar10", 32, 10_000, 10
    if args.quick:
        shown, dataset, width, samples, updates = (1, 2), "digits", 4, 100, 2
    settings = mmd_gan_repulsive.Args(
        dataset=dataset,
        data_dir=args.data_dir,
        kernel="rbf-b",
        width=width,
        total_steps=shown[-1],
        eval_every=shown[0],
        sample_every=shown[0],
        save_every=100,
        eval_features="pixels",
        eval_samples=samples,
        device="cpu",
    )
    folder = training.train_to(mmd_gan_repulsive, settings, Path(args.runs_dir, NAME))
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    results["command"] = f"python -m reproduce.{NAME} --data-dir data"
    results["protocol"] = protocol = training.read_results(folder / "results.json")["protocol"]
    for metric in METRICS:
        results[metric] = training.curve(folder, f"eval/{metric}")
    for of_width in (width, 2 * width):
        key = f"seconds of one core per update, width {of_width}"
        if key not in results:
            wider = dataclasses.replace(settings, width=of_width)
            results[key] = training.seconds_per_update(mmd_gan_repulsive, wider, updates)
    days = 100_000 * results[key] / 86_400  # at the paper's width
    training.write_results(path, results)

    figure = pyplot.figure(figsize=(12, 9))
    grid = figure.add_gridspec(2, 2 * len(shown), height_ratios=(1.5, 1))
    for i, step in enumerate(shown):
        axes = figure.add_subplot(grid[0, 2 * i : 2 * i + 2])
        axes.imshow(Image.open(folder / "samples" / f"{step:07d}.png"))
        axes.set_title(f"{step:,} updates")
        axes.axis("off")
    for i, (metric, label) in enumerate(METRICS.items()):
        axes = figure.add_subplot(grid[1, i * len(shown) : (i + 1) * len(shown)])
        axes.plot(results[metric].keys(), results[metric].values(), "o-", label="samples")
        axes.axhline(protocol[f"floor {metric}"], color="grey", linestyle="--", label="real images")
        axes.set_xlabel("generator updates")
        axes.set_ylabel(label)
        axes.set_ylim(0)
        axes.legend()
    page.save(figure, __doc__.split("\n\n")[2], NAME, args)

    rows = []
    for metric, label in METRICS.items():
        for step, value in results[metric].items():
            rows.append(Row(f"{label}, {step:,} updates", math.nan, value))
        rows.append(Row(f"{label}, real images", math.nan, protocol[f"floor {metric}"]))
    for of_width in (width, 2 * width):
        seconds = results[f"seconds of one core per update, width {of_width}"]
        rows.append(Row(f"CPU seconds per update, width {of_width}", math.nan, seconds))
    rows.append(Row(f"days for 100,000 updates at width {2 * width}", math.nan, days))
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
