"""reproduce/speed.py runs and prints its table; what it counts is held in test_kernels.py, times nowhere."""

import subprocess
import sys
from pathlib import Path

import torch

from reproduce import speed

ROOT = Path(__file__).parent.parent


def test_it_runs_and_prints_every_row():
    command = [sys.executable, "-m", "reproduce.speed", "--tiny"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split(" | ") for line in done.stdout.splitlines() if line.startswith("| ")]
    assert all(len(row) == 5 for row in rows)
    for what in ("plain / fused", "fused / bare", "memory", "DataLoader", "bf16", *speed.SCRIPTS):
        assert any(what in row[0] for row in rows), what


def test_counter_counts_bytes_that_live_and_operations_that_are_no_views():
    with speed.Counter() as counter:
        a = torch.zeros(1000)  # 4000 bytes
        b = a.view(10, 100).exp()  # 4000 more; the view is free
        del b
        c = a + a
        c.mul_(2)
    assert (counter.operations, counter.live, counter.peak) == (4, 8000, 8000)


def test_steps_are_timed_without_what_comes_before_and_after(tmp_path):
    seconds = speed.step_seconds("mmd_gan_repulsive", 2, str(tmp_path))
    assert seconds.shape == (2,)
    assert (seconds > 0).all()
