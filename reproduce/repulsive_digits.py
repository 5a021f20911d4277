"""Repulsive loss, Figure 3 and Tables S3 and S5, in small: lambda, learning rates, kernels, outputs, gains.

    python -m reproduce.repulsive_digits

The paper trains each setting on CIFAR-10 for 100,000 updates and shows the FID. Here: digits, 1,000 updates,
seed 1 alone, all else as `python mmd_gan_repulsive.py` has it; the Frechet distance of pixels of 1,797
samples. A run whose losses were not finite has diverged. One whose distance is above 1 is poor (the paper's
line is a FID of 30, not quite twice its best).

Figure 3: lambda -1, -0.5, 0, 0.5, 1, 2 with rbf and rbf-b, for 4 of the paper's 16 pairs of learning rates;
C^K = 1.818^8, the paper's there, over the 4 layers that the critic of digits has.
Table S5: 1, 4, 16 and 64 outputs of the critic. Table S3 and Figure S2: PICO and PIM, C^K of 16, 32, 64, 128
(the paper has one PIM, whose gain it does not name). Both for the repulsive loss with rbf, at the pair of
rates that is best for it in Figure 3, and with C^K = 64 where nothing else is said; the paper takes the best
of 16 pairs for each.

Results: docs/repulsive_digits.json, one entry for each run, written when it ends.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib import pyplot

import mmd_gan_repulsive
from common import run
from reproduce import page, training
from reproduce.page import Row
from reproduce.training import Args

NAME = Path(__file__).stem
UPDATES = 1000
LAYERS = 4  # of the critic on digits: K
POOR = 1.0  # Frechet distance of pixels
LAMBDAS = (-1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
KERNELS = ("rbf", "rbf-b")
RATES = ((2e-4, 2e-4), (2e-4, 1e-3), (1e-3, 2e-4), (1e-3, 1e-3))  # critic's, generator's
FIGURE_3 = 1.818**8  # its C^K
DIMENSIONS = (1, 4, 16, 64)
GAINS = (16, 32, 64, 128)  # C^K
NORMS = ("pico", "pim")


@dataclass(frozen=True)
class Setting:
    """What differs between runs."""

    rates: tuple[float, float]  # critic's, generator's
    lam: float = 1.0
    kernel: str = "rbf"
    dimension: int = 16  # of the critic's output
    norm: str = "pico"
    gain: float = 64  # C^K

    def __str__(self) -> str:
        critic, generator = self.rates
        game = f"lambda {self.lam:g}, {self.kernel}, rates {critic:g} {generator:g}"
        return f"{game}, d {self.dimension}, {self.norm} {self.gain:.3g}"


def figure_3(lambdas: Iterable[float], rates: Iterable[tuple[float, float]]) -> list[Setting]:
    """Return the settings of Figure 3."""
    found = []
    for kernel in KERNELS:
        for lam in lambdas:
            found += [Setting(pair, lam=lam, kernel=kernel, gain=FIGURE_3) for pair in rates]
    return found


def best_rates(runs: dict[str, dict], rates: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Return the pair of rates that is best for the repulsive loss with rbf in Figure 3."""
    return min(rates, key=lambda pair: distance(runs, Setting(pair, gain=FIGURE_3)))


def distance(runs: dict[str, dict], setting: Setting) -> float:
    """Return the Frechet distance of a run, infinite where it diverged."""
    found = runs[str(setting)]
    return math.inf if found["diverged"] else found["pixel_frechet"]


def train(setting: Setting, args: Args) -> dict:
    """Train one run; return its Frechet distance, with the protocol's floor, or that it diverged."""
    updates = 2 if args.quick else UPDATES
    critic, generator = setting.rates
    settings = mmd_gan_repulsive.Args(
        dataset="digits",
        lam=setting.lam,
        kernel=setting.kernel,
        feature_dim=setting.dimension,
        critic_norm=setting.norm,
        sn_gain=setting.gain ** (1 / LAYERS),
        critic_learning_rate=critic,
        learning_rate=generator,
        width=4 if args.quick else None,
        total_steps=updates,
        eval_every=updates,
        eval_samples=100 if args.quick else 50_000,
        sample_every=0,
        save_every=500,
        device="cpu",
    )
    folder = Path(args.runs_dir, NAME, str(setting).replace(", ", "__").replace(" ", "-"))
    try:
        made = training.train_to(mmd_gan_repulsive, settings, folder)
    except run.Failed as error:
        print(error)
        return {"diverged": True}
    results = training.read_results(made / "results.json")
    floor = results["protocol"]["floor pixel_frechet"]
    return {"diverged": False, "pixel_frechet": results["metrics"]["pixel_frechet"], "floor": floor}


def draw(runs: dict[str, dict], grid: list[Setting], args: Args) -> None:
    """Draw Figure 3 as two maps of numbers, and the two tables as curves."""
    figure, axes = pyplot.subplots(1, 4, figsize=(18, 5), width_ratios=(1, 1, 0.8, 0.8))
    rates = list(dict.fromkeys(setting.rates for setting in grid))
    lambdas = list(dict.fromkeys(setting.lam for setting in grid))
    for place, kernel in zip(axes, KERNELS):
        rows = []
        for lam in lambdas:
            rows.append([distance(runs, Setting(pair, lam, kernel, gain=FIGURE_3)) for pair in rates])
        shown = [[math.log10(value) if value < math.inf else math.nan for value in row] for row in rows]
        place.imshow(shown, cmap="viridis_r", vmin=-1.2, vmax=1.2, aspect="auto")
        for i, row in enumerate(rows):
            for j, value in enumerate(row):
                text = f"{value:.2f}" if value < math.inf else "diverged"
                place.text(j, i, text, ha="center", va="center", color="w" if value > 0.6 else "k")
        place.set_xticks(range(len(rates)), [f"{critic:g}\n{generator:g}" for critic, generator in rates])
        place.set_yticks(range(len(lambdas)), [f"{lam:g}" for lam in lambdas])
        place.set(title=f"{kernel}, Frechet distance of pixels", ylabel="lambda")
        place.set_xlabel("learning rate of critic, of generator")
    pair = best_rates(runs, rates)
    settings = [Setting(pair, dimension=d) for d in DIMENSIONS]
    plot(axes[2], runs, DIMENSIONS, settings, "MMD-rep, C^K 64")
    axes[2].set(title="outputs of the critic", xlabel="d")
    for norm in NORMS:
        plot(axes[3], runs, GAINS, [Setting(pair, norm=norm, gain=gain) for gain in GAINS], norm)
    axes[3].set(title="gain and norm", xlabel="C^K")
    floor = next(found["floor"] for found in runs.values() if not found["diverged"])
    for place in axes[2:]:
        place.axhline(floor, color="grey", linestyle="--", label="real images")
        place.set_xscale("log", base=2)
        place.set_ylim(0)
        place.legend()
    caption = f"""
    Repulsive loss on digits, {UPDATES:,} updates, seed 1. From left: Figure 3 with rbf and with rbf-b; the
    dimension of the critic's output (Table S5); spectral norm of the convolution (PICO) and of the matrix
    (PIM) at several overall gains (Table S3), both at rates {pair[0]:g} and {pair[1]:g}. A value that
    is missing is that of a run that diverged.
    """
    page.save(figure, caption, NAME, args)


def plot(place, runs: dict[str, dict], x: Iterable[float], settings: list[Setting], label: str) -> None:
    """Draw the distances of those settings that have been run; none where one diverged."""
    found = {at: runs[str(setting)] for at, setting in zip(x, settings) if str(setting) in runs}
    distances = [made.get("pixel_frechet", math.nan) for made in found.values()]
    place.plot(found.keys(), distances, "o-", label=label)


def main(args: Args) -> list[Row]:
    """Train what is missing, draw, print and return the table."""
    lambdas, rates, dimensions, gains, norms = LAMBDAS, RATES, DIMENSIONS, GAINS, NORMS
    if args.quick:
        lambdas, rates, dimensions, gains, norms = (1.0,), RATES[:1], (1,), (64,), ("pim",)
    path = Path(args.folder, f"{NAME}.json")
    runs = training.read_results(path)

    def run_all(settings: Iterable[Setting]) -> None:
        for setting in settings:
            if str(setting) not in runs:
                runs[str(setting)] = train(setting, args)
                training.write_results(path, runs)

    grid = figure_3(lambdas, rates)
    run_all(grid)
    pair = best_rates(runs, rates)
    by_dimension = {d: Setting(pair, dimension=d) for d in dimensions}
    by_gain = {(norm, gain): Setting(pair, norm=norm, gain=gain) for norm in norms for gain in gains}
    run_all([*by_dimension.values(), *by_gain.values()])
    draw(runs, grid, args)

    rows = []
    for kernel in KERNELS:
        for lam in lambdas:
            found = [distance(runs, Setting(pair, lam, kernel, gain=FIGURE_3)) for pair in rates]
            what = f"Figure 3, {kernel}, lambda {lam:g}"
            rows.append(Row(f"{what}: best of {len(found)} pairs of rates", math.nan, min(found)))
            rows.append(Row(f"{what}: poor or diverged", math.nan, sum(value > POOR for value in found)))
    for d, setting in by_dimension.items():
        rows.append(Row(f"Table S5, {d} outputs", math.nan, distance(runs, setting)))
    for (norm, gain), setting in by_gain.items():
        rows.append(Row(f"Table S3, {norm}, C^K {gain}", math.nan, distance(runs, setting)))
    floor = next(found["floor"] for found in runs.values() if not found["diverged"])
    rows.append(Row("real images", math.nan, floor))
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
