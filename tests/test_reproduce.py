"""Each page of reproduce/ prints its table, agrees with what is exact, and draws its picture."""

import math
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
from PIL import Image

from common import run
from reproduce.page import Args

ROOT = Path(__file__).parent.parent
MAP = (ROOT / "reproduce" / "README.md").read_text()
PAGES = {  # and how far a quick one may be from what is exact, relatively
    "mmd_estimators": 0.2,  # means of 150 draws
    "repulsive_game": 0.01,
    "repulsive_kernels": 0.02,
    "repulsive_pico": 1e-5,
    "smmd_critics": 0.002,
    "smmd_dirac": 0.005,
}


def test_every_page_is_tested():
    pages = [path.stem for path in ROOT.glob("reproduce/*.py") if "reproduce.page" in path.read_text()]
    assert sorted(pages) == sorted(PAGES)
    assert all(f"`python -m reproduce.{name}`" in MAP for name in PAGES)


COMMANDS = re.findall(r"`python (\w+)\.py ([^`]*)`", MAP) + re.findall(
    r"`python -m (baselines\.\w+) ([^`]*)`", MAP
)


@pytest.mark.parametrize(("script", "options"), COMMANDS)
def test_command_of_the_map(script, options):
    module = import_module(script)
    module.resolve(run.parse(module.Args, shlex.split(options)))


@pytest.mark.parametrize("name", PAGES)
def test_page(name, tmp_path, capsys):
    rows = import_module(f"reproduce.{name}").main(Args(quick=True, folder=str(tmp_path)))
    printed = capsys.readouterr().out
    exact = [row for row in rows if row.source == "exact" and not math.isnan(row.wanted)]
    assert exact
    for row in exact:
        assert row.ours == pytest.approx(row.wanted, rel=PAGES[name], abs=1e-3), row.what
    assert all(row.what in printed for row in rows)
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert min(picture.size) > 300


def test_pictures_are_those_of_whole_pages():
    for name in PAGES:
        with Image.open(ROOT / "docs" / f"{name}.png") as picture:
            assert min(picture.size) > 300
