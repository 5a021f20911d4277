"""What pages of reproduce/ that train share: run folders that are gone on from, curves, times of updates."""

import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import run
from reproduce import page


@dataclass
class Args(page.Args):
    data_dir: str = "data"  # folder of the data sets
    runs_dir: str = "runs/reproduce"  # where run folders go; a page that was killed goes on from there


def train_to(script: ModuleType, args, folder: Path) -> Path:
    """Train a script to args.total_steps, below folder, from where it was killed; return the run folder.

    run.Failed: the weights or losses are not finite any more.
    """
    found = sorted(folder.glob("*/checkpoint.pt"))
    if found:
        saved = run.saved_arguments(str(found[-1].parent), script.Args)
        script.train(dataclasses.replace(saved, total_steps=args.total_steps))
    else:
        script.train(dataclasses.replace(args, runs_dir=str(folder)))
    (made,) = folder.glob("*/checkpoint.pt")
    return made.parent


def curve(folder: Path, tag: str) -> dict[int, float]:
    """Return the points of a run folder's curve, step: value; none where there is no such curve."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars(tag)}


def seconds_per_update(script: ModuleType, args, updates: int) -> float:
    """Return the CPU seconds, of all threads, of a generator update: the mean over so many after 5 more."""
    return statistics.fmean(update_times(script, args, updates + 5)[5:])


def update_times(script: ModuleType, args, updates: int) -> list[float]:
    """Return the CPU seconds of all threads that each of the first generator updates takes.

    No evaluation, picture or checkpoint is in them.
    """
    every = dict(eval_every=0, sample_every=0, save_every=0, log_every=0)
    times = []

    def clock(steps: Iterator[int], *label: str, **options) -> Iterator[int]:
        for step in steps:
            begin = time.process_time()
            yield step
            if not label:  # which GMMN's loop of the auto-encoder has
                times.append(time.process_time() - begin)

    progress, script.tqdm = script.tqdm, clock
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            script.train(dataclasses.replace(args, runs_dir=folder, total_steps=updates + 1, **every))
    finally:
        script.tqdm = progress
    return times[:updates]  # the last one draws and saves


def work(script: ModuleType, args, step: int) -> int:
    """Return what an update costs beside others of its script: updates of the critic and the generator."""
    if not hasattr(script, "critic_steps"):
        return 1
    return script.critic_steps(step, args) + 1


def seconds_of_work(script: ModuleType, args, times: list[float]) -> float:
    """Return the CPU seconds of a unit of work, given those of the first updates, of which 5 warm up."""
    args = script.resolve(args)
    units = [work(script, args, step) for step in range(1, len(times) + 1)]
    return sum(times[5:]) / sum(units[5:])


def updates_within(seconds: float, second: float, script: ModuleType, args) -> int:
    """Return how many updates are made within seconds of CPU time; second: those of a unit of work."""
    args = script.resolve(args)
    step, spent = 0, 0.0
    while spent < seconds:
        step += 1
        spent += second * work(script, args, step)
    return step


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing to standard output in this block."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield


def read_results(path: Path) -> dict:
    """Return what write_results wrote; nothing where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else {}


def write_results(path: Path, results: dict) -> None:
    """Write results as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    run.write_json(path, results)
