"""What the pages of reproduce/ share: arguments, the table that they print, the picture that they write."""

import math
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch
from torch import Tensor

matplotlib.use("Agg")  # into files, where there is no screen


@dataclass
class Args:
    quick: bool = False  # coarser, within 3 seconds
    folder: str = "docs"  # where the picture is written


@dataclass
class Row:
    """One quantity beside what it is compared with."""

    what: str
    wanted: float  # NaN: there is nothing to compare with
    ours: float
    source: str = "exact"  # of wanted: "exact", or the paper's figure or section


def print_table(rows: list[Row]) -> None:
    """Print the rows, the columns one below the other."""
    width = max(len(row.what) for row in rows)
    print(f"{'':{width}}  {'wanted':>10}  {'ours':>10}  source of wanted")
    for row in rows:
        wanted, source = f"{row.wanted:.5g}", row.source
        if math.isnan(row.wanted):
            wanted, source = "-", ""
        print(f"{row.what:{width}}  {wanted:>10}  {row.ours:10.5g}  {source}")


def save(figure, caption: str, name: str, args: Args) -> Path:
    """Write the figure with its caption below it as folder/name.png; return the path."""
    inches = figure.get_size_inches()
    text = textwrap.fill(" ".join(caption.split()), width=int(14 * inches[0]))
    lines = text.count("\n") + 1
    bottom = (0.17 * lines + 0.1) / inches[1]
    figure.tight_layout(rect=(0, bottom, 1, 1))
    figure.text(0.02, 0.05 / inches[1], text, fontsize=9, va="bottom")
    path = Path(args.folder, f"{name}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    matplotlib.pyplot.close(figure)
    print(f"wrote {path}")
    return path


def follow(field: Callable[[Tensor], Tensor], start: Tensor, step: float, count: int) -> Tensor:
    """Return points (count + 1, ...) of the flow x' = field(x) from start, by Runge and Kutta's method."""
    points = [start]
    for _ in range(count):
        x = points[-1]
        k1 = field(x)
        k2 = field(x + step / 2 * k1)
        k3 = field(x + step / 2 * k2)
        k4 = field(x + step * k3)
        points.append(x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return torch.stack(points)
