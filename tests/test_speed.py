"""reproduce/speed.py runs and prints its table; what it counts is held in test_kernels.py, times nowhere."""

import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch

from common import run
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
        "no workers",
        "2 workers",
        "KID",
        "statistics",
        "distances of pixels",
        "JPEGs",
        "the authors'",
        "simultaneous",
        "bf16",
        *(f"{s}, digits" for s in scripts),
    )
    return [what for what in wanted if not any(what in row.split("|")[1] for row in rows)]


def test_it_runs_and_prints_every_row(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speed, "SCRIPTS", ("gmmn", "gram_net"))
    for of_processes in ("measure_start", "measure_processes"):  # seconds each: in the slow test below
        monkeypatch.setattr(speed, of_processes, lambda *args: None)
    speed.main(speed.Args(tiny=True, folder=str(tmp_path)))
    printed = capsys.readouterr().out
    assert missing(printed, speed.SCRIPTS) == []
    assert all(f"{name}: 100 points" in printed for name in ("fused", "plain", "naive"))
    assert (tmp_path / "speed_growth.png").stat().st_size > 10_000


@pytest.mark.slow
def test_the_command(tmp_path):
    command = [sys.executable, "-m", "reproduce.speed", "--tiny", "--folder", tmp_path]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert missing(done.stdout, speed.SCRIPTS) == []
    for what in ("--help", "a bad flag", "one step", "under gloo"):
        assert what in done.stdout


def test_a_command_that_fails_is_not_timed():
    with pytest.raises(RuntimeError, match="ended with 2"):
        speed.run_command("-c exit(2)")


def test_counter_counts_bytes_that_live_and_operations_that_are_no_views():
    with speed.Counter() as counter:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100).exp()  # 4000 more; the view is free
        del b
        c = a + a
        c.mul_(2)
    assert (counter.operations, counter.live, counter.peak) == (4, 8000, 8000)


def test_a_training_makes_the_steps_that_it_is_asked_for_and_ends(tmp_path):
    steps, mix = [], run.mix

    def note(*numbers):
        if numbers[1] == run.Stream.STEP:
            steps.append(numbers[2])
        return mix(*numbers)

    with mock.patch.object(run, "mix", note), speed.Training("gram_net", str(tmp_path)) as training:
        assert steps == [1]  # the first is made before anything is timed
        seconds = speed.in_turns({"step": training.step}, 2)["step"]
    assert steps[:4] == [1, 2, 3, 4]  # one more, which in_turns drops
    assert len(seconds) == 2
    assert (seconds > 0).all()
    assert not training.is_alive()
    assert not list(tmp_path.glob("*/results.json"))


def test_a_training_that_fails_says_so(tmp_path):
    with (
        pytest.raises(RuntimeError, match="did not train"),
        speed.Training("gram_net", str(tmp_path), width=0),
    ):
        pass


def test_naive_and_plain_are_the_same_mmd2():
    x, y = torch.randn(2, 20, 3, dtype=torch.float64)
    values = [f(x, y).item() for f in (speed.naive_mmd2, speed.plain_mmd2, speed.fused_mmd2)]
    assert values == pytest.approx([values[0]] * 3, rel=1e-9)
