"""Scaled MMD GAN (a poster): the condition number of the critic's first layer, its four models and one more.

    python -m reproduce.smmd_condition --data-dir data
    python -m reproduce.smmd_condition --only digits

The theory of the poster asks that each layer of the critic has a bounded condition number. Its figure shows
that of the first layer against generator updates, on an axis from 0 to 600, for SMMD, SN-SMMD, MMD and
SN-MMD; "orthogonal normalization or spectral normalization control the condition number in practice", it
says. The fifth model here is the first of these two, SMMD with --critic-norm orthogonal, whose numbers are 1
by construction: what it costs is to be seen in the samples.

The condition number of a convolution is that of its kernel as a matrix (c_out, rest), as the spectral norm of
the authors' code has it. The last layer has one output, and so always 1. Point 0 is before the first update;
what the table has of the second half is the median of its points.

Shortened: the poster has 60,000 updates on images of 64 or 160 pixels. Here digits, with all settings of
`python smmd_gan.py`, 1,000 updates; and MNIST, width 16 (the default is 64), 800 updates, about 8 minutes of
one core for each model. Seed 1 alone. Frechet distance of pixels of 1,797 (MNIST: 10,000) samples at the end.

Results: docs/smmd_condition.json, one entry for each run, written when it ends.
"""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from matplotlib import pyplot

import smmd_gan
from common import datasets, run
from reproduce import page, training
from reproduce.page import Row

NAME = Path(__file__).stem
MODELS = {
    "SMMD": dict(critic_norm="none"),
    "SN-SMMD": dict(critic_norm="pim"),
    "MMD": dict(constraint="none", critic_norm="none"),
    "SN-MMD": dict(constraint="none", critic_norm="pim"),
    "orthogonal SMMD": dict(critic_norm="orthogonal"),
}
DATA_SETS = {
    "digits": dict(total_steps=1000),
    "mnist": dict(total_steps=800, width=16),
}
EVERY = 20  # updates between points of the curves


@dataclass
class Args(training.Args):
    only: tuple[str, ...] = tuple(DATA_SETS)  # data sets


def start(settings: smmd_gan.Args) -> dict[str, float]:
    """Return the condition numbers of the critic's layers before the first update."""
    settings = smmd_gan.resolve(settings)
    images = datasets.load_images(
        settings.dataset, settings.data_dir, settings.image_size, settings.train_split
    )
    torch.manual_seed(settings.seed)
    _, critic = smmd_gan.make_networks(settings, tuple(images.shape[1:]), torch.device("cpu"))
    return {tag: value.item() for tag, value in smmd_gan.condition_numbers(critic).items()}


def train(model: str, data_set: str, args: Args) -> dict:
    """Train one model; return the condition numbers of all layers, and the Frechet distance of the end."""
    settings = smmd_gan.Args(
        dataset=data_set,
        data_dir=args.data_dir,
        **MODELS[model],
        **DATA_SETS[data_set],
        log_condition_numbers=True,
        log_every=EVERY,
        sample_every=0,
        eval_every=DATA_SETS[data_set]["total_steps"],
        save_every=100,
        eval_samples=10_000,
        device="cpu",
    )
    if args.quick:
        settings.total_steps, settings.width, settings.log_every = 2, 4, 1
        settings.eval_every, settings.eval_samples = 2, 100
    folder = Path(args.runs_dir, NAME, data_set, model.replace(" ", "-"))
    try:
        training.train_to(smmd_gan, settings, folder)
        diverged = False
    except run.Failed as error:
        print(error)
        diverged = True
    (made,) = [path.parent for path in folder.glob("*/checkpoint.pt")]
    result = {"diverged": diverged, "condition": {}}
    for tag, value in start(settings).items():
        points = {0: value} | training.curve(made, tag)
        layer = tag.removeprefix("condition/")
        result["condition"][layer] = {str(step): round(value, 3) for step, value in points.items()}
    if not diverged:
        ended = training.read_results(made / "results.json")
        result["pixel_frechet"] = ended["metrics"]["pixel_frechet"]
        result["floor"] = ended["protocol"]["floor pixel_frechet"]
    return result


def hidden(result: dict) -> list[dict]:
    """Return the curves of the layers between the first and the last, which has one output."""
    return list(result["condition"].values())[1:-1]


def largest(curves: list[dict]) -> dict[str, float]:
    """Return the largest value at each step."""
    return {step: max(curve[step] for curve in curves) for step in curves[0]}


def draw(results: dict, args: Args) -> None:
    """Draw the curves of the first layer and of the others, and the Frechet distances."""
    figure, axes = pyplot.subplots(len(results), 3, figsize=(14, 4.2 * len(results)), squeeze=False)
    for (first, others, bars), (data_set, found) in zip(axes, results.items()):
        for i, (model, result) in enumerate(found.items()):
            curves = {first: result["condition"]["layer_1"], others: largest(hidden(result))}
            for place, curve in curves.items():
                place.semilogy([int(step) for step in curve], curve.values(), label=model)
            bars.bar(i, result.get("pixel_frechet", math.nan), label=model)
        bars.axhline(next(iter(found.values())).get("floor", math.nan), color="grey", linestyle="--")
        first.set(title=f"{data_set}: condition number, layer 1", xlabel="generator updates")
        others.set(title="largest of the layers after it", xlabel="generator updates")
        bars.set(title="Frechet distance of pixels")
        bars.set_xticks(range(len(found)), [model.replace(" ", "\n") for model in found], fontsize=8)
        first.margins(y=0.25)  # room for the legend
        first.legend(ncols=2, fontsize=8)
    caption = """
    Condition numbers of the critic's layers through training, as matrices (c_out, rest), and the Frechet
    distance of pixels at the end; dashed: real images. Seed 1. The poster's figure has layer 1 of the first
    four, on 64 or 160 pixels, and an axis up to 600.
    """
    page.save(figure, caption, NAME, args)


def main(args: Args) -> list[Row]:
    """Train what is missing, draw, print and return the table."""
    only, models = args.only, list(MODELS)
    if args.quick:
        only, models = ("digits",), ["SN-SMMD"]
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    for data_set in only:
        run.require(data_set in DATA_SETS, "--only", data_set, f"one or more of {', '.join(DATA_SETS)}")
        found = results.setdefault(data_set, {})
        for model in models:
            if model not in found:
                found[model] = train(model, data_set, args)
                training.write_results(path, results)
    draw(results, args)
    rows = []
    for data_set, found in results.items():
        for model, result in found.items():
            first = list(result["condition"]["layer_1"].values())
            later = list(largest(hidden(result)).values())
            half = len(first) // 2
            what = f"{data_set}, {model}"
            rows.append(Row(f"{what}: layer 1, at the start", math.nan, first[0]))
            rows.append(Row(f"{what}: layer 1, largest", math.nan, max(first)))
            rows.append(Row(f"{what}: layer 1, second half", math.nan, statistics.median(first[half:])))
            rows.append(
                Row(f"{what}: worst later layer, second half", math.nan, statistics.median(later[half:]))
            )
            if not result["diverged"]:
                rows.append(Row(f"{what}: pixel_frechet", math.nan, result["pixel_frechet"]))
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
