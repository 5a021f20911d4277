"""reproduce/speed.py runs and prints its table; what it counts is held in test_kernels.py, times nowhere."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from reproduce import speed

ROOT = Path(__file__).parent.parent


def missing(printed, scripts):
    """What should begin a row of five columns, and does not."""
    rows = [line for line in printed.splitlines() if line.startswith("| ") and line.count("|") == 6]
    wanted = (
        "plain / fused",
        "fused / bare",
        "memory",
        "DataLoader",
        "bf16",
        *(f"{s}, digits" for s in scripts),
    )
    return [what for what in wanted if not any(what in row.split("|")[1] for row in rows)]


def test_it_runs_and_prints_every_row(monkeypatch, capsys):
    monkeypatch.setattr(speed, "SCRIPTS", ("gmmn", "gram_net"))
    speed.main(speed.Args(tiny=True))
    assert missing(capsys.readouterr().out, speed.SCRIPTS) == []


@pytest.mark.slow
def test_the_command():
    command = [sys.executable, "-m", "reproduce.speed", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert missing(done.stdout, speed.SCRIPTS) == []


def test_counter_counts_bytes_that_live_and_operations_that_are_no_views():
    with speed.Counter() as counter:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100).exp()  # 4000 more; the view is free
        del b
        c = a + a
        c.mul_(2)
    assert (counter.operations, counter.live, counter.peak) == (4, 8000, 8000)


def test_steps_are_timed_and_the_run_ends_after_them(tmp_path):
    seconds = speed.step_seconds("gram_net", 2, str(tmp_path))
    assert seconds.shape == (2,)
    assert (seconds > 0).all()
    assert not list(tmp_path.glob("*/results.json"))
