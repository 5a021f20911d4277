"""Which method should I use? On MNIST and CIFAR-10, each with its own paper's networks and settings.

    python -m reproduce.comparison_images --data-dir data
    python -m reproduce.comparison_images --data-dir data --only mnist

600 seconds of one core a method on MNIST, 200 on CIFAR-10, loading and GMMN's auto-encoder included, one
seed. MNIST at 28x28, CIFAR-10 at width 16 (GMMN, whose width is that of dense layers, keeps its own; its
auto-encoder alone takes longer there). All train on the training images and are compared with them: Frechet
distance and KID of pixels of 10,000 samples, beside what real test images have. The page reproduce.comparison
has one pair of networks for all methods.

Results: docs/comparison_images.json, one entry for each run, written when it ends;
docs/comparison_images.md, the tables; docs/comparison_NAME.png, samples.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib import pyplot
from PIL import Image

import gamn
import gmmn
import gram_net
import mmd_gan
import mmd_gan_repulsive
import smmd_gan
from baselines import gan, wgan
from common import run
from reproduce import page, training

NAME = Path(__file__).stem
METHODS = {  # script, and the arguments that make it the method
    "GMMN": (gmmn, {}),
    "GMMN+AE": (gmmn, dict(autoencoder=True)),
    "GAMN": (gamn, {}),
    "MMD-GAN": (mmd_gan, {}),
    "repulsive": (mmd_gan_repulsive, dict(kernel="rbf-b")),
    "SMMD-GAN": (smmd_gan, {}),
    "GRAM-net": (gram_net, {}),
    "GAN": (gan, {}),
    "SN-GAN": (gan, dict(loss="hinge", critic_norm="pim")),
    "WGAN": (wgan, dict(constraint="clip")),
    "WGAN-GP": (wgan, {}),
}
SECONDS = {"mnist": 600, "cifar10": 200}  # of one core
LEFT_OUT = {"cifar10": ["GMMN+AE"]}  # whose auto-encoder alone takes longer
DATA_SETS = {"mnist": dict(image_size=28), "cifar10": dict(width=16)}
COLUMNS = {"pixel_frechet": "Frechet distance of pixels", "pixel_kid": "KID of pixels"}


@dataclass
class Args(training.Args):
    only: tuple[str, ...] = tuple(DATA_SETS)  # data sets


def arguments(name: str, data_set: str, args: Args):
    """Return the arguments of a run."""
    script, own = METHODS[name]
    given = dict(own, dataset=data_set, data_dir=args.data_dir, device="cpu", **DATA_SETS.get(data_set, {}))
    if script is gmmn:
        given.pop("width", None)
    splits = dict(train_split="train", eval_split="train", eval_features="pixels", eval_samples=10_000)
    every = dict(eval_every=10**9, sample_every=0, log_every=100, save_every=100)  # the last step does all
    return script.Args(**given, **splits, **every)


def train(name: str, data_set: str, args: Args) -> dict:
    """Train for SECONDS, and return what came out."""
    script = METHODS[name][0]
    settings = arguments(name, data_set, args)
    begin = time.process_time()
    times = training.update_times(script, settings, 8)
    before = time.process_time() - begin - sum(times)  # what comes before the first update
    second = training.seconds_of_work(script, settings, times)
    seconds = SECONDS.get(data_set, 1)
    settings.total_steps = training.updates_within(seconds - before, second, script, settings)
    if args.quick:
        settings.total_steps = 2
    found = {
        "seconds": seconds,
        "updates": settings.total_steps,
        "seconds before the first": before,
        "seconds of a unit": second,
    }
    try:
        made = training.train_to(script, settings, Path(args.runs_dir, NAME, data_set, name))
    except run.Failed as error:
        print(error)
        return found | {"diverged": True}
    return found | {"diverged": False} | training.read_results(made / "results.json")


def table(found: dict[str, dict]) -> list[str]:
    """Return a Markdown table of a data set's runs."""
    lines = [f"| | {' | '.join(COLUMNS.values())} | updates |", "|---" * (len(COLUMNS) + 2) + "|"]
    floors = {}
    for name, made in found.items():
        cells = ["diverged"] * len(COLUMNS)
        if not made["diverged"]:
            cells = [f"{made['metrics'][metric]:.3g}" for metric in COLUMNS]
            floors = {metric: made["protocol"][f"floor {metric}"] for metric in COLUMNS}
        lines.append(f"| {name} | {' | '.join(cells)} | {made['updates']:,} |")
    cells = [f"{value:.3g}" for value in floors.values()]
    return [*lines, f"| *real test images* | {' | '.join(cells)} | |"]


def draw(data_set: str, names: list[str], args: Args) -> None:
    """Write a row of samples of each of the methods, if their run folders are here."""
    figure, axes = pyplot.subplots(len(names), 1, figsize=(9, 1.15 * len(names)), squeeze=False)
    for place, name in zip(axes.flat, names):
        drawn = sorted(Path(args.runs_dir, NAME, data_set, name).glob("*/samples/*.png"))
        if not drawn:
            pyplot.close(figure)
            return
        picture = Image.open(drawn[-1])
        place.imshow(picture.crop((0, 0, picture.width, picture.height // 8)))  # the first of 8 rows
        place.set_title(name, fontsize=9)
        place.axis("off")
    caption = f"{data_set}: {SECONDS.get(data_set, 1)} CPU seconds a method, seed 1."
    page.save(figure, caption, f"comparison_{data_set}", args)


def main(args: Args) -> dict:
    """Train what is missing, write tables and pictures; return the results."""
    names, only = list(METHODS), args.only
    if args.quick:
        names, only = ["GMMN"], ("digits",)
    for data_set in only:
        ok = data_set in DATA_SETS or args.quick
        run.require(ok, "--only", data_set, f"one or more of {', '.join(DATA_SETS)}")
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    for data_set in only:
        found = results.setdefault(data_set, {})
        here = [name for name in names if name not in LEFT_OUT.get(data_set, [])]
        for name in here:
            if name not in found:
                found[name] = train(name, data_set, args)
                training.write_results(path, results)
        draw(data_set, [name for name in here if not found[name]["diverged"]], args)
    lines = []
    for data_set, found in results.items():
        lines += [f"### {data_set}", "", *table(found), ""]
    text = "\n".join(lines)
    Path(args.folder, f"{NAME}.md").write_text(text)
    print(text)
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Args))
    except (run.BadInput, run.Failed) as error:
        run.give_up(error)
