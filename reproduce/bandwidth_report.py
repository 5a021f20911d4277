"""Report on MMD GAN, Figures 1 to 4, on MNIST: sigma 1 to 16, sigma 2 to 32, and the Laplacian that it plans.

    python -m reproduce.bandwidth_report --data-dir data

The report trains MMD GAN with its own sigmas and with larger ones, each for 1000 epochs (149,640 generator
updates), plots M^2 of the last critic batch before each generator update, and finds that the larger sigmas
give a lower M^2 that converges "more rapidly", a curve that is "less smooth", and rare batches of distorted
images. It plans a Laplacian kernel, from which it expects "less smooth results and faster convergence".

Here M^2 of every critic batch is summed three times from the same features: exactly, in float64; in float32
as the authors' code does, which rounds; and exactly with the first list of sigmas, the same for all runs. So
rounding and unit are told from training, which has none of that rounding (the script's Gram matrices are
float64).

    first, end     M^2 of the last critic batch, before the first generator update; mean of the last 100
    roughness      rms of M^2 of the last critic batch about its moving mean over 25 updates, relative to that
    rounding       rms of what float32 adds to M^2 of the last critic batch, relative to that
    worst batch    the largest M^2 of any critic batch, relative to the moving mean of all, and its update
    pixel_mmd      MMD^2 of 2,000 samples under one kernel on pixels, the same for all runs

The first 100 updates are left out of roughness, rounding and worst batch. Shortened: 1,500 generator updates,
about 12 epochs with the bursts of 100 critic updates, and width 32 (the authors' is 64), about 15 minutes of
one core a run; at the authors' rate, 5e-5, and at 1e-3. Seed 1 alone. The first epoch ends with the 9th
generator update, as in the authors' code.

Results: docs/bandwidth_report.json, one entry for each run, written when it ends.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch
import tyro
from matplotlib import pyplot
from PIL import Image
from torch import Tensor

import mmd_gan
from common import kernels, run
from reproduce import page, training
from reproduce.mmd_estimators import LI, REPORT
from reproduce.page import Row
from reproduce.training import Args

NAME = Path(__file__).stem
UPDATES = 1500
FIRST_EPOCH = 9  # generator updates
WINDOW = 25  # updates of a moving mean
SETTLED = 100  # updates before roughness is measured
KERNELS = {"sigma 1 to 16": ("rbf", LI), "sigma 2 to 32": ("rbf", REPORT), "Laplacian": ("laplacian", LI)}
RATES = (5e-5, 1e-3)
METRICS = ("pixel_mmd", "pixel_frechet")


# --- M^2 of every critic batch ---------------------------------------------------------------------


def exact_mmd2(real: Tensor, fake: Tensor, kernel: str, bandwidths: tuple[float, ...]) -> float:
    """Return the biased MMD^2 of features (n, d) in float64."""
    blocks = kernels.gram_blocks(real, fake, kernel, bandwidths)
    return kernels.mmd2(*blocks, "biased").item()


def rounded_mmd2(real: Tensor, fake: Tensor, kernel: str, bandwidths: tuple[float, ...]) -> float:
    """Return the same of float32 features as the authors' code does: all in float32."""
    z = torch.cat([real, fake])
    products = z @ z.T
    norms = products.diagonal()
    k = kernels.RADIAL[kernel](norms[:, None] + norms[None, :] - 2 * products, bandwidths)
    n = len(real)
    return (k[:n, :n].mean() - 2 * k[:n, n:].mean() + k[n:, n:].mean()).item()


@contextlib.contextmanager
def every_batch() -> Iterator[None]:
    """Add to the points of a run's curves what M^2 was in the critic batches since the point before."""
    exact, rounded, first_list = [], [], []
    gram_blocks, write_scalars = kernels.gram_blocks, run.write_scalars

    def watch(real_feat: Tensor, fake_feat: Tensor, kernel: str, bandwidths: tuple[float, ...]):
        if real_feat.requires_grad:  # the critic's update; for the generator's real features are constants
            features = real_feat.detach(), fake_feat.detach()
            exact.append(exact_mmd2(*features, kernel, bandwidths))
            rounded.append(rounded_mmd2(*features, kernel, bandwidths))
            first_list.append(exact_mmd2(*features, "rbf", LI))
        return gram_blocks(real_feat, fake_feat, kernel, bandwidths)

    def write(writer, scalars: dict, step: int) -> None:
        if exact and "losses/critic_mmd2" in scalars:
            scalars = scalars | {
                "batches/mean": sum(exact) / len(exact),
                "batches/largest": max(exact),
                "batches/last": exact[-1],
                "batches/last_rounded": rounded[-1],
                "batches/last_first_list": first_list[-1],
            }
            exact.clear()
            rounded.clear()
            first_list.clear()
        write_scalars(writer, scalars, step)

    watched = mock.patch.object(kernels, "gram_blocks", watch)
    with watched, mock.patch.object(run, "write_scalars", write):
        yield


# --- runs ------------------------------------------------------------------------------------------


def train(name: str, rate: float, args: Args, folder: Path) -> dict:
    """Train one run; return what the docstring of this file lists."""
    kernel, bandwidths = KERNELS[name]
    updates, first_epoch, settled = (4, 2, 0) if args.quick else (UPDATES, FIRST_EPOCH, SETTLED)
    settings = mmd_gan.Args(
        dataset="digits" if args.quick else "mnist",
        data_dir=args.data_dir,
        width=4 if args.quick else 32,
        kernel=kernel,
        bandwidths=bandwidths,
        learning_rate=rate,
        critic_learning_rate=rate,
        warmup_critic=1 if args.quick else None,
        log_every=1,
        eval_every=2 if args.quick else 250,
        eval_samples=100 if args.quick else 5000,
        sample_every=0,
        save_every=50,
        device="cpu",
    )
    with every_batch():
        if not list(folder.glob("*/checkpoint.pt")):
            settings.total_steps = first_epoch  # whose end draws a picture
            training.train_to(mmd_gan, settings, folder)
        settings.total_steps = updates
        made = training.train_to(mmd_gan, settings, folder)
    curves = {}
    for what in ("mean", "largest", "last", "last_rounded", "last_first_list"):
        curves[what] = torch.tensor([*training.curve(made, f"batches/{what}").values()], dtype=torch.float64)
    ended = training.read_results(made / "results.json")
    result = measure(curves, settled)
    for metric in METRICS:
        points = training.curve(made, f"eval/{metric}")
        result[metric] = {str(step): value for step, value in points.items()}
    result["floor pixel_frechet"] = ended["protocol"]["floor pixel_frechet"]
    return result


def moving_mean(values: Tensor) -> Tensor:
    """Return the mean of the WINDOW values about each value (n,), of fewer at the ends."""
    sums = torch.cat([torch.zeros(1, dtype=values.dtype), values.cumsum(0)])
    at = torch.arange(len(values))
    low, high = (at - WINDOW // 2).clamp_min(0), (at + WINDOW // 2 + 1).clamp_max(len(values))
    return (sums[high] - sums[low]) / (high - low)


def measure(curves: dict[str, Tensor], settled: int) -> dict:
    """Return the numbers of a run, and its curves as means (of largest: maxima) over WINDOW updates each."""
    result = {"first": curves["last"][0].item()}
    for what in ("last", "last_rounded", "last_first_list"):
        values = curves[what]
        mean = moving_mean(values)
        result[f"end, {what}"] = values[-100:].mean().item()
        roughness = (values / mean - 1)[settled:].square().mean().sqrt()
        result[f"roughness, {what}"] = roughness.item()
    error = curves["last_rounded"] / curves["last"] - 1
    result["rounding"] = error[settled:].square().mean().sqrt().item()
    ratio = (curves["largest"] / moving_mean(curves["mean"]))[settled:]
    result["worst batch"] = ratio.max().item()
    result["worst batch, at update"] = settled + 1 + ratio.argmax().item()
    result["curves"] = {}
    for what, values in curves.items():
        parts = values.split(WINDOW)
        points = [part.max() if what == "largest" else part.mean() for part in parts]
        result["curves"][what] = [float(f"{point:.4g}") for point in points]
    return result


# --- what is shown ---------------------------------------------------------------------------------


def draw(results: dict, args: Args) -> None:
    """Draw Figure 4, with and without rounding, and the distances in pixels."""
    run_rates = {key.split(", rate ")[1] for key in results}
    rates = [rate for rate in RATES if f"{rate:g}" in run_rates]
    figure, axes = pyplot.subplots(len(rates), 3, figsize=(16, 4.5 * len(rates)), squeeze=False)
    for (own, common, pixels), rate in zip(axes, rates):
        for i, name in enumerate(KERNELS):
            found = results.get(f"{name}, rate {rate:g}")
            if found is None:
                continue
            curves, style = found["curves"], {"color": f"C{i}", "label": name}
            steps = [WINDOW * (j + 0.5) for j in range(len(curves["last"]))]
            own.semilogy(steps, curves["last"], **style)
            own.semilogy(steps, curves["largest"], ".", color=f"C{i}", ms=3)
            own.semilogy(steps, [max(value, 1e-8) for value in curves["last_rounded"]], ":", color=f"C{i}")
            common.semilogy(steps, curves["last_first_list"], **style)
            pixels.plot(
                [int(step) for step in found["pixel_mmd"]], found["pixel_mmd"].values(), "o-", **style
            )
        own.set_title(f"rate {rate:g}: M^2 of the run's own kernel", fontsize=10)
        common.set_title("the same features, sigma 1 to 16 for all", fontsize=10)
        pixels.set_title("pixel_mmd: one kernel on pixels for all", fontsize=10)
        for place in (own, common, pixels):
            place.set_xlabel("generator updates")
            place.legend(fontsize=8)
    caption = f"""
    Report on MMD GAN, Figure 4, on MNIST, width 32, seed 1; above at the authors' learning rate, below at
    1e-3. Left: M^2 of the last critic batch, means over {WINDOW} updates; dotted: the same summed in float32
    as the authors' code does; dots: the largest of all critic batches in those updates. Middle: the same
    features under one kernel. Right: samples under one kernel.
    """
    page.save(figure, caption, NAME, args)


def draw_samples(results: dict, args: Args) -> None:
    """Draw Figures 2 and 3, samples of the first epoch and of the end, if the run folders are here."""
    figure, axes = pyplot.subplots(len(results), 2, figsize=(11, 0.6 + 1.8 * len(results)), squeeze=False)
    for row, key in zip(axes, results):
        drawn = sorted(Path(args.runs_dir, NAME, key).glob("*/samples/*.png"))
        if len(drawn) < 2:
            pyplot.close(figure)
            return
        for place, path in zip(row, (drawn[0], drawn[-1])):
            picture = Image.open(path)
            place.imshow(picture.crop((0, 0, picture.width, picture.height // 4)))  # 2 of 8 rows
            place.set_title(f"{key}, update {int(path.stem):,}", fontsize=9)
            place.axis("off")
    page.save(figure, "Report on MMD GAN, Figures 2 and 3, in small. Seed 1.", f"{NAME}_samples", args)


def main(args: Args) -> list[Row]:
    """Train what is missing, draw, print and return the table."""
    names, rates = list(KERNELS), RATES
    if args.quick:
        names, rates = ["sigma 2 to 32"], RATES[:1]
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    for rate, name in itertools.product(rates, names):
        key = f"{name}, rate {rate:g}"
        if key not in results:
            results[key] = train(name, rate, args, Path(args.runs_dir, NAME, key))
            training.write_results(path, results)
    draw(results, args)
    draw_samples(results, args)
    rows = []
    for key, found in results.items():
        published = 6.443e-3 if key == "sigma 2 to 32, rate 5e-05" else math.nan  # after one update
        rows.append(Row(f"{key}: M^2, first", published, found["first"], "the report's log, width 64"))
        for what, value in found.items():
            if isinstance(value, float | int) and what != "first":
                rows.append(Row(f"{key}: {what}", math.nan, value))
        for metric in METRICS:
            rows.append(Row(f"{key}: {metric}", math.nan, list(found[metric].values())[-1]))
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
