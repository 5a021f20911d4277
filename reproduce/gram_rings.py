"""GRAM-nets, Figures 1, 6 and 9: data and projected space through training.

    python -m reproduce.gram_rings

Three trainings with a projected space of two dimensions, at the paper's settings and one seed: GRAM-net
on the ring (Figure 1) and on the ring in three dimensions (Figure 6), MMD GAN on the ring (Figure 9, which
ends at 1,000 updates, where it diverged). Above, real and generated points; below, their projections,
after 10, 100, 1,000 and 10,000 updates (MMD GAN: 100, 500, 1,000 and 4,000). Of the ring also the traces
of both objectives (Figure 1b): MMD^2, and D* of Eq. (5), on logarithmic axes.

docs/gram_rings.json has modes and shares of high quality at each of these.
"""

import math
from pathlib import Path
from types import ModuleType

import torch
import tyro
from matplotlib import pyplot
from torch import Tensor

import gram_net
import mmd_gan
from common import datasets, run
from reproduce import page, training
from reproduce.page import Row
from reproduce.training import Args

NAME = Path(__file__).stem
SHOWN = (10, 100, 1000, 10_000)  # generator updates
POINTS = 1000
TRAININGS = {  # title: script, arguments, updates that are shown
    "Figure 1: GRAM-net, ring2d": (gram_net, dict(dataset="ring2d", feature_dim=2), SHOWN),
    "Figure 6: GRAM-net, ring3d": (gram_net, dict(dataset="ring3d", feature_dim=2), SHOWN),
    "Figure 9: MMD GAN, ring2d": (
        mmd_gan,
        dict(dataset="ring2d", feature_dim=2, architecture="gram"),
        (100, 500, 1000, 4000),
    ),
}


@torch.no_grad()
def project(script: ModuleType, folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return real and generated points (POINTS, d), and the features of both (POINTS, 2), of a run."""
    checkpoint = torch.load(folder / "checkpoint.pt", map_location="cpu", weights_only=True)
    args = script.Args(**checkpoint["args"])
    generator, critic = script.make_networks(args, (datasets.TOYS[args.dataset],), torch.device("cpu"))
    generator.load_state_dict(checkpoint["generator"])
    critic.load_state_dict(checkpoint["critic"])
    torch.manual_seed(0)
    fake = generator(script.draw_noise(POINTS, args, torch.device("cpu")))
    real = datasets.draw_toy(args.dataset, POINTS, seed=0)
    return real, fake, critic(real), critic(fake)


def train(title: str, args: Args) -> tuple[dict[int, dict], dict[int, tuple], Path]:
    """Train; return metrics and what project returns, by numbers of updates, and the run folder.

    A training that diverges has what it was before, and no metrics after it.
    """
    script, own, shown = TRAININGS[title]
    if args.quick:
        shown = (1, 2)
    settings = script.Args(**own, eval_every=10**9, sample_every=0, log_every=10, device="cpu")
    metrics, points = {}, {}
    folder = Path(args.runs_dir, NAME, title.split(":")[0].replace(" ", ""))
    for step in shown:  # a training of its own for each: the same to the bit, as far as it goes
        settings.total_steps = step
        try:
            made = training.train_to(script, settings, folder / f"{step}")
        except run.Failed as error:
            print(f"{title} diverged: {error}")
            break
        metrics[step] = training.read_results(made / "results.json")["metrics"]
        points[step] = project(script, made)
    return metrics, points, made


def draw(title: str, points: dict[int, tuple], args: Args) -> None:
    """Write the points and their projections after each number of updates."""
    figure, axes = pyplot.subplots(2, len(points), figsize=(3.2 * len(points), 6.8), squeeze=False)
    for i, (step, (real, fake, real_feat, fake_feat)) in enumerate(points.items()):
        rows = (("data", real, fake), ("projected", real_feat, fake_feat))
        for place, (what, x, y) in zip(axes[:, i], rows):
            place.scatter(x[:, 0], x[:, 1], s=2, label="real")
            place.scatter(y[:, 0], y[:, 1], s=2, label="generated")
            place.set_title(f"{what}, {step:,} updates", fontsize=9)
    axes[0, 0].legend(loc="upper right", fontsize=8)
    number = title.split(":")[0].split()[1]
    caption = f"GRAM-nets, {title}, seed 1."
    if "3d" in title:
        caption += " Of the three dimensions of the data the first two are shown."
    page.save(figure, caption, f"{NAME}_{number}", args)


def draw_traces(folder: Path, args: Args) -> None:
    """Write both objectives of a GRAM-net against its updates."""
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4))
    traces = {"losses/mmd2": "MMD^2 of the projections", "charts/squared_ratio_difference": "D* of Eq. (5)"}
    for place, (tag, label) in zip(axes, traces.items()):
        points = training.curve(folder, tag)
        place.plot(points.keys(), points.values(), linewidth=0.7)
        place.set_yscale("log")
        place.set_xlabel("updates")
        place.set_title(label, fontsize=9)
    page.save(figure, "GRAM-nets, Figure 1b: what generator and critic minimise.", f"{NAME}_traces", args)


def main(args: Args) -> list[Row]:
    """Train, draw, print and return the table."""
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    rows = []
    titles = list(TRAININGS)
    if args.quick:
        titles = titles[:1]
    for title in titles:
        metrics, points, folder = train(title, args)
        results[title] = metrics
        training.write_results(path, results)
        draw(title, points, args)
        if title.startswith("Figure 1:"):
            draw_traces(folder, args)
        for step, values in metrics.items():
            rows.append(Row(f"{title}, {step:,} updates: modes", math.nan, values["modes"]))
            rows.append(Row(f"{title}, {step:,} updates: high quality", math.nan, values["high_quality"]))
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
