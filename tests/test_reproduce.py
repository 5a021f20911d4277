"""Each page of reproduce/ prints its table, agrees with what is exact, and draws its picture."""

from importlib import import_module

import pytest
from PIL import Image

from reproduce.page import Args

PAGES = {"smmd_dirac": 0.005}  # and how far a quick one may be from what is exact, relatively


@pytest.mark.parametrize("name", PAGES)
def test_page(name, tmp_path, capsys):
    rows = import_module(f"reproduce.{name}").main(Args(quick=True, folder=str(tmp_path)))
    printed = capsys.readouterr().out
    exact = [row for row in rows if row.source == "exact"]
    assert exact
    for row in exact:
        assert row.ours == pytest.approx(row.wanted, rel=PAGES[name]), row.what
    assert all(row.what in printed for row in rows)
    with Image.open(tmp_path / f"{name}.png") as picture:
        assert min(picture.size) > 300
