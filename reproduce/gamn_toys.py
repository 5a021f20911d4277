"""GAMN, Table 1 and Figure 1: WGAN, WGAN-GP, GMMN and GAMN on three toys.

    python -m reproduce.gamn_toys

The paper prints the MMD of data and samples, averaged over the last 1,000 iterations, under a kernel that
it does not give: what can be compared is the order of the methods. Here it is one kernel for all, that of
eval/mmd (rbf, sigma the median distance of real points times 1/8 to 2, unbiased, 2,000 fresh points a
side), every 50 updates; its square root is averaged over the last 500 of 2,000 generator updates.
Shortened: width 256 (the paper's is 512), and those 2,000 updates. Batch 256, the paper's; two seeds; all
else as each script has it.

On 8 Gaussians also Table 3's choices, for which the paper has scores on CIFAR-10 alone: regularisers of
the mapper, dimensions of its output; and the data-space MMD term beside GP, which it says helps a little.

Results: docs/gamn_toys.json, one entry for each run, written when it ends.
"""

import math
import statistics
from pathlib import Path
from types import ModuleType

import tyro
from matplotlib import pyplot
from PIL import Image

import gamn
import gmmn
from baselines import wgan
from reproduce import page, training
from reproduce.page import Row
from reproduce.training import Args

NAME = Path(__file__).stem
TOYS = ("8gaussians", "25gaussians", "swissroll")
SEEDS = (1, 2)
UPDATES = 2000
LAST = 500  # updates whose MMD is averaged
METHODS = {  # script, and the arguments that make it the method
    "WGAN": (wgan, dict(constraint="clip")),
    "WGAN-GP": (wgan, {}),
    "GMMN": (gmmn, {}),
    "GAMN": (gamn, {}),
}
PUBLISHED = {  # Table 1, in the order of TOYS
    "WGAN": (0.300, 0.312, 0.305),
    "WGAN-GP": (0.285, 0.294, 0.298),
    "GMMN": (0.281, 0.291, 0.289),
    "GAMN": (0.276, 0.284, 0.286),
}
VARIANTS = {  # of GAMN with GP and d = 10, on 8 Gaussians
    "GAMN, l1": dict(regularizer="l1"),
    "GAMN, l2": dict(regularizer="l2"),
    "GAMN, weight-decay": dict(regularizer="weight-decay"),
    "GAMN, d = 2": dict(feature_dim=2),
    "GAMN, d = 3": dict(feature_dim=3),
    "GAMN, data-space MMD": dict(data_mmd_weight=1.0),
}


def train(script: ModuleType, own: dict, toy: str, seed: int, args: Args, folder: Path) -> dict:
    """Train one run; return its mean MMD over the last updates, and the metrics of the end."""
    updates, every = (4, 2) if args.quick else (UPDATES, 50)
    settings = script.Args(
        **own,
        dataset=toy,
        seed=seed,
        width=16 if args.quick else 256,
        batch_size=256,
        total_steps=updates,
        eval_every=every,
        sample_every=0,
        log_every=every,
        save_every=100,
        device="cpu",
    )
    made = training.train_to(script, settings, folder)
    mmd2 = training.curve(made, "eval/mmd")
    last = [math.sqrt(max(value, 0)) for step, value in mmd2.items() if step > updates - LAST]
    metrics = training.read_results(made / "results.json")["metrics"]
    return {"mmd": statistics.fmean(last), "modes": metrics["modes"], "high_quality": metrics["high_quality"]}


def draw(args: Args) -> None:
    """Write Figure 1, samples of seed 1 on the real points, if all run folders are here."""
    figure, axes = pyplot.subplots(len(TOYS), len(METHODS), figsize=(14, 11))
    for row, toy in zip(axes, TOYS):
        for place, name in zip(row, METHODS):
            drawn = sorted(Path(args.runs_dir, NAME, toy, f"{name}-1").glob("*/samples/*.png"))
            if not drawn:
                pyplot.close(figure)
                return
            place.imshow(Image.open(drawn[-1]))
            place.set_title(f"{name}, {toy}", fontsize=9)
            place.axis("off")
    page.save(figure, f"GAMN, Figure 1: {UPDATES:,} updates, width 256, seed 1.", NAME, args)


def main(args: Args) -> list[Row]:
    """Train what is missing, draw, print and return the table."""
    toys, seeds, methods, variants = TOYS, SEEDS, METHODS, VARIANTS
    if args.quick:
        toys, seeds, methods, variants = ("8gaussians",), (1,), {"GMMN": METHODS["GMMN"]}, {}
    runs = []
    for toy in toys:
        for name, (script, own) in methods.items():
            runs.append((name, toy, script, own))
    runs += [(name, "8gaussians", gamn, own) for name, own in variants.items()]
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    for seed in seeds:
        for name, toy, script, own in runs:
            key = f"{toy}, {name}, seed {seed}"
            if key not in results:
                folder = Path(args.runs_dir, NAME, toy, f"{name}-{seed}")
                results[key] = train(script, own, toy, seed, args, folder)
                training.write_results(path, results)
    draw(args)
    rows = []
    for name, toy, _, _ in runs:
        found = [results[f"{toy}, {name}, seed {seed}"] for seed in seeds]
        published = PUBLISHED[name][TOYS.index(toy)] if name in PUBLISHED else math.nan
        mmd = statistics.fmean(run["mmd"] for run in found)
        rows.append(Row(f"{toy}, {name}: MMD", published, mmd, "GAMN, Table 1"))
        for metric in ("modes", "high_quality"):
            mean = statistics.fmean(run[metric] for run in found)
            rows.append(Row(f"{toy}, {name}: {metric}", math.nan, mean))
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
