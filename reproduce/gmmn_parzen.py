"""GMMN's table: Parzen-window log-likelihood of MNIST, for GMMN on pixels and with an auto-encoder.

    python -m reproduce.gmmn_parzen --data-dir data

`python gmmn.py --dataset mnist --parzen`, and the same with `--autoencoder`, at the published settings and
their 40,000 updates, seed 1; the log-likelihood of the 10,000 test images, in nats, after each 10,000 updates
(the protocol stands in docs/gmmn_parzen.json). Published, and known to us at second hand: 147 +- 2 and
282 +- 2. The pictures have samples of each, the table Frechet distances of pixels with their floor.
"""

import math
from pathlib import Path

import tyro
from matplotlib import pyplot
from PIL import Image

import gmmn
from reproduce import page, training
from reproduce.page import Row
from reproduce.training import Args

NAME = Path(__file__).stem
MODELS = {  # title: arguments, published log-likelihood
    "GMMN": ({}, 147.0),
    "GMMN+AE": (dict(autoencoder=True), 282.0),
}
CURVES = ("parzen", "parzen_se", "parzen_sigma", "pixel_frechet")


def main(args: Args) -> list[Row]:
    """Train what is missing, draw, print and return the table."""
    updates, models = 40_000, MODELS
    shortened = {}
    if args.quick:
        updates, models, shortened = (
            2,
            {"GMMN": MODELS["GMMN"]},
            dict(dataset="digits", parzen=False, width=32),
        )
    path = Path(args.folder, f"{NAME}.json")
    results = training.read_results(path)
    for title, (own, _) in models.items():
        folder = Path(args.runs_dir, NAME, title)
        if title not in results:
            settings = dict(
                own, dataset="mnist", parzen=True, total_steps=updates, eval_every=updates // 4 or 1
            )
            made = training.train_to(
                gmmn, gmmn.Args(**settings | shortened, data_dir=args.data_dir, device="cpu"), folder
            )
            curves = {name: training.curve(made, f"eval/{name}") for name in CURVES}
            protocol = training.read_results(made / "results.json")["protocol"]
            results[title] = {"protocol": protocol, "by updates": curves}
            training.write_results(path, results)
        drawn = sorted(folder.glob("*/samples/*.png"))
        if drawn:
            figure, axes = pyplot.subplots(figsize=(6, 6.5))
            axes.imshow(Image.open(drawn[-1]))
            axes.axis("off")
            page.save(figure, f"{title}, MNIST, {updates:,} updates, seed 1.", f"{NAME}_{title}", args)

    rows = []
    for title, (_, published) in models.items():
        protocol, curves = results[title]["protocol"], results[title]["by updates"]
        for step, value in curves["parzen"].items():
            last = int(step) == updates
            wanted = published if last else math.nan
            rows.append(Row(f"{title}, {int(step):,} updates: log-likelihood", wanted, value, "published"))
            rows.append(Row("    its standard error", math.nan, curves["parzen_se"][step]))
        for step, value in curves["pixel_frechet"].items():
            rows.append(Row(f"{title}, {int(step):,} updates: pixel_frechet", math.nan, value))
        rows.append(Row("    of real images", math.nan, protocol["floor pixel_frechet"]))
    page.print_table(rows)
    return rows


if __name__ == "__main__":
    main(tyro.cli(Args))
