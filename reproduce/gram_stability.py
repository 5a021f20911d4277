"""GRAM-nets, Figures 2 and 7: twelve settings of the ring, for GAN, GRAM-net, MMD-net and MMD GAN.

    python -m reproduce.gram_stability

Three hidden sizes of the generator, 20, 100 and 200 (the critic keeps the paper's 100), times four
dimensions of the noise, 2, 4, 8 and 16; of MMD GAN, as in Figure 7 (b), three sizes times four dimensions
of the projected space. Rates, batch and kernels are Appendix B.1's, as each script has them (MMD-net:
gmmn.py with Adam 1e-3, where the paper has RMSprop). GRAM-net twice, with the term sum r, and with the
ratio clipped at 0 (footnote 3). 10,000 updates, where the paper has 2,000 epochs; one seed.

A mode is covered, and a sample of high quality, as README.md says. A run diverged if it is not finite, or
if none of its samples is within 3 standard deviations of a mode. docs/gram_stability.json has each run.
"""

import math
from pathlib import Path

import tyro
from matplotlib import pyplot
from PIL import Image

import gmmn
import gram_net
import mmd_gan
from baselines import gan
from common import run
from reproduce import page, training
from reproduce.page import Row
from reproduce.training import Args

NAME = Path(__file__).stem
UPDATES = 10_000
WIDTHS = (20, 100, 200)
DIMENSIONS = (2, 4, 8, 16)
CRITIC = dict(critic_width=100)
METHODS = {  # script, arguments, and what the four dimensions are of
    "GAN": (gan, dict(CRITIC, learning_rate=1e-4), "latent_dim"),
    "GRAM-net": (gram_net, CRITIC, "latent_dim"),
    "GRAM-net, clip": (gram_net, dict(CRITIC, positivity="clip"), "latent_dim"),
    "MMD-net": (gmmn, dict(batch_size=200, bandwidths=(1.0,), drop_step=10**9), "latent_dim"),
    "MMD GAN": (mmd_gan, dict(CRITIC, architecture="gram"), "feature_dim"),
}


def train(name: str, width: int, dimension: int, args: Args, folder: Path) -> dict:
    """Train one run; return its metrics, and whether it diverged."""
    script, own, dimension_of = METHODS[name]
    settings = script.Args(
        **own,
        **{dimension_of: dimension},
        dataset="ring2d",
        width=width,
        total_steps=2 if args.quick else UPDATES,
        eval_every=10**9,
        sample_every=0,
        log_every=1000,
        save_every=500,
        device="cpu",
    )
    try:
        made = training.train_to(script, settings, folder)
    except run.Failed as error:
        print(error)
        return {"modes": 0, "high_quality": 0.0, "diverged": True}
    metrics = training.read_results(made / "results.json")["metrics"]
    return metrics | {"diverged": metrics["high_quality"] == 0}


def draw(name: str, results: dict, args: Args) -> None:
    """Write a method's twelve pictures, if its run folders are here."""
    figure, axes = pyplot.subplots(len(WIDTHS), len(DIMENSIONS), figsize=(12, 9.5))
    for row, width in zip(axes, WIDTHS):
        for place, dimension in zip(row, DIMENSIONS):
            key = f"{name}, {width}, {dimension}"
            drawn = sorted(Path(args.runs_dir, NAME, key).glob("*/samples/*.png"))
            place.axis("off")
            if key not in results:
                pyplot.close(figure)
                return
            if drawn:
                place.imshow(Image.open(drawn[-1]))
            modes = "diverged" if results[key]["diverged"] else f"{results[key]['modes']} of 8 modes"
            place.set_title(f"width {width}, {dimension}: {modes}", fontsize=8)
    of = "projected dimension" if name == "MMD GAN" else "dimension of the noise"
    caption = (
        f"{name}: rows are hidden sizes of the generator, columns the {of}. {UPDATES:,} updates, seed 1."
    )
    page.save(figure, caption, f"{NAME}_{name.lower().replace(' ', '_').replace(',', '')}", args)


def main(args: Args) -> list[Row]:
    """Train what is missing, draw, print and return the table."""
    methods, widths, dimensions = list(METHODS), WIDTHS, DIMENSIONS
    if args.quick:
        methods, widths, dimensions = ["GRAM-net"], (20,), (2,)
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    rows = []
    for name in methods:
        found = []
        for width in widths:
            for dimension in dimensions:
                key = f"{name}, {width}, {dimension}"
                if key not in results:
                    results[key] = train(name, width, dimension, args, Path(args.runs_dir, NAME, key))
                    training.write_results(path, results)
                found.append(results[key])
        draw(name, results, args)
        whole = sum(run["modes"] == 8 for run in found)
        rows.append(Row(f"{name}: settings with all 8 modes, of {len(found)}", math.nan, whole))
        diverged = sum(run["diverged"] for run in found)
        rows.append(Row(f"{name}: settings that diverged", math.nan, diverged))
        worst = min(run["high_quality"] for run in found)
        rows.append(Row(f"{name}: lowest share of high quality", math.nan, worst))
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
