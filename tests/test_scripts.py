"""What every script must do alike: the skeleton, resuming, signals, errors, the command line."""

import ast
import difflib
import importlib.machinery
import json
import math
import multiprocessing
import os
import random
import re
import runpy
import shlex
import signal
import subprocess
import sys
import time
import types
import warnings
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import Malicious
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from common import datasets, run

ROOT = Path(__file__).parent.parent
BASELINES = [f"baselines.{p.stem}" for p in sorted(ROOT.glob("baselines/[!_]*.py"))]
ALL = sorted(p.stem for p in ROOT.glob("*.py")) + BASELINES  # names of modules
README = (ROOT / "README.md").read_text()
SCRIPTS = [s for s in ALL if f"`{s.replace('.', '/')}.py`" in README]  # others need only run
assert len(SCRIPTS) >= 6
SMALL = ["--width", "16", "--batch-size", "16", "--log-every", "1", "--eval-samples", "32"]
METHOD = {"gmmn": ["--ae-steps", "2"], "gamn": ["--n-generator", "2"]}


def source_file(script):
    return ROOT / f"{script.replace('.', '/')}.py"


def train(script, *options, runs):
    """Run a script's train in process; return its run folder."""
    module = import_module(script)
    before = set(runs.glob("*"))
    small = [] if "--resume" in options else [*SMALL, *METHOD.get(script, [])]
    module.train(run.parse(module.Args, [*small, "--runs-dir", str(runs), *options]))
    return next(iter(set(runs.glob("*")) - before), None)


def stopped(script, *options, runs, i, number, monkeypatch):
    """Run a script as its command line does, and send it a signal when batch i is drawn."""
    batch, module = datasets.Images.batch, import_module(script)

    def interrupted(self, j):
        if j == i:
            signal.raise_signal(number)
        return batch(self, j)

    options = [*SMALL, *METHOD.get(script, []), "--runs-dir", str(runs), *options]
    with monkeypatch.context() as patch:
        patch.setattr(datasets.Images, "batch", interrupted)
        patch.setattr(sys, "argv", [script, *options])
        with pytest.raises(SystemExit) as exit_:
            run.main(module.train, module.Args)
    assert exit_.value.code == 128 + number
    return next(runs.iterdir())


def checkpoint(folder):
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def same(a, b):
    """Are two checkpoints equal, bit for bit, but for arguments that may change?"""
    leaves = torch.utils._pytree.tree_leaves
    a, b = ({key: value for key, value in c.items() if key != "args"} for c in (a, b))
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in pairs)


def curves(folder):
    """All scalars but speed, as {tag: [(step, value), ...]}, with what was taken back left out."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag != "charts/steps_per_second"]
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}


# --- side by side ----------------------------------------------------------------------------------


def section(script, first, last):
    text = source_file(script).read_text()
    return text[text.index(first) : text.index(last)]


def lines_of_train(script):
    return [line for line in section(script, "\ndef train(", "\nif __name__").splitlines() if line.strip()]


@pytest.mark.parametrize("script", SCRIPTS)
def test_shared_sections_are_identical(script):
    strip = lambda text: text.replace("import math\n", "")  # noqa: E731
    for first, last in (("# --- imports", "# --- arguments"), ("    # --- run ---", "    # --- method ---")):
        a, b = (strip(section(name, first, last)).splitlines() for name in ("mmd_gan_repulsive", script))
        assert a == b, "\n".join(difflib.unified_diff(a, b, "mmd_gan_repulsive", script, lineterm="", n=0))


# What is reached, in percent of the lines of train (a point is left for a line or two): to be raised, or
# lowered where lines that all share go to common/, or what is one method's leaves it.
FLOORS = {
    ("mmd_gan", "gamn"): 88,
    ("mmd_gan", "smmd_gan"): 80,
    ("gamn", "smmd_gan"): 81,
    ("mmd_gan_repulsive", "gram_net"): 83,
    ("mmd_gan_repulsive", "mmd_gan"): 73,
    ("mmd_gan_repulsive", "gamn"): 75,
    ("mmd_gan_repulsive", "smmd_gan"): 71,
    ("gmmn", "mmd_gan_repulsive"): 66,
    ("gmmn", "mmd_gan"): 62,
    ("baselines.wgan", "gamn"): 70,
    ("baselines.wgan", "baselines.gan"): 70,
}


@pytest.mark.parametrize("pair", FLOORS, ids="-".join)
def test_train_shares_its_lines(pair):
    a, b = map(lines_of_train, pair)
    blocks = difflib.SequenceMatcher(None, a, b, autojunk=False).get_matching_blocks()
    share = 200 * sum(block.size for block in blocks) / (len(a) + len(b))
    assert share >= FLOORS[pair], "\n".join(difflib.unified_diff(a, b, *pair, lineterm="", n=0))


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_script_has_its_cases(script):
    """In the lists that cannot find it by themselves."""
    import test_distributed
    import test_hot_loop
    import test_updates

    from reproduce import speed

    lists = {
        "FLOORS of test_scripts": {name for pair in FLOORS for name in pair},
        "BAD of test_scripts": {row.split()[0] for row in BAD},
        "CASES of test_updates": {name for name, _ in test_updates.CASES},
        "GAMES and METHOD of test_updates": test_updates.GAMES.keys() & test_updates.METHOD.keys(),
        "CASES of test_distributed": {name for name, _ in test_distributed.CASES},
        "CASES of test_hot_loop": {row.split()[0] for row in test_hot_loop.CASES},
        "SCRIPTS of reproduce/speed.py": speed.SCRIPTS,
    }
    missing = [where for where, names in lists.items() if script not in names]
    assert not missing, f"{script}.py is not held to what the others are: add it to {', '.join(missing)}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_banners(script):
    source = source_file(script).read_text()
    banners = re.findall(r"^# --- (.*?) -+$", source, re.MULTILINE)
    assert banners == ["imports", "arguments", "networks", "losses", "sampling", "training"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_is_read(script):
    sources = [source_file(script), *(ROOT / "common").glob("*.py")]
    nodes = [node for path in sources for node in ast.walk(ast.parse(path.read_text()))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)}
    resolved = {"log_every", "sample_every", "save_every"}
    names = {field.name for field in fields(import_module(script).Args)}
    assert names - read - resolved == set()


@pytest.mark.parametrize("script", SCRIPTS)
def test_deviations_named_in_the_code_are_listed(script):
    module = import_module(script)
    listed = set(re.findall(r"^ +(\d+)\. ", module.__doc__, re.MULTILINE))
    marks = re.findall(r"Deviations? (\d+)(?: and (\d+))?", section(script, "# --- imports", "if __name__"))
    assert listed
    marked = {number for mark in marks for number in mark if number}
    assert marked == listed, f"not marked in the code: {listed - marked}; not listed: {marked - listed}"


@pytest.mark.parametrize("script", SCRIPTS)
def test_usage_lines_parse(script):
    module = import_module(script)
    program = rf"-m {script}" if script in BASELINES else rf"{script}\.py"
    commands = re.findall(rf"^    python {program}(.*)$", module.__doc__, re.MULTILINE)
    assert len(commands) >= 2
    for options in commands:
        run.parse(module.Args, options.split())


# --- a run -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", ALL)
@pytest.mark.parametrize("dataset", ["digits", "ring3d"])
def test_run_folder(script, dataset, tmp_path, capsys):
    folder = train(script, "--dataset", dataset, "--total-steps", "2", "--eval-every", "2", runs=tmp_path)
    assert folder.name.startswith(f"{dataset}__{script.removeprefix('baselines.')}__1__")
    assert {p.name for p in folder.iterdir()} >= {"args.json", "checkpoint.pt", "results.json", "samples"}
    assert [p.name for p in (folder / "samples").iterdir()] == ["0000002.png"]
    results = json.loads((folder / "results.json").read_text())
    assert results["step"] == 2
    assert all(math.isfinite(value) for value in results["metrics"].values())
    assert results["protocol"]["samples"] == (32 if dataset == "digits" else 2000)
    tags = curves(folder)
    assert {"losses/generator", *(f"eval/{name}" for name in results["metrics"])} <= set(tags)
    assert script in BASELINES or {"kernel/k_xx", "kernel/k_xy", "kernel/k_yy"} <= set(tags)
    assert [step for step, _ in tags["losses/generator"]] == [1, 2]
    said = capsys.readouterr().out.splitlines()
    assert str(folder) in said[-1]
    program = ["-m", script] if script in BASELINES else [os.path.relpath(source_file(script))]
    assert shlex.split(said[0])[: 1 + len(program)] == ["python", *program]
    arguments = json.loads((folder / "args.json").read_text())
    assert arguments["learning_rate"] is not None  # resolved


@pytest.mark.parametrize("script", SCRIPTS)
def test_resumed_run_equals_the_one_never_stopped(script, tmp_path):
    """N + M steps = N, stop, resume, M, with pictures and evaluations on one side only."""
    average = ["--ema-decay", "0.5"]
    whole = train(script, "--total-steps", "5", "--eval-every", "0", *average, runs=tmp_path / "a")
    often = ["--eval-every", "1", "--sample-every", "1", "--save-every", "2", *average]
    part = train(script, "--total-steps", "3", *often, runs=tmp_path / "b")
    assert not same(checkpoint(whole), checkpoint(part))
    train(script, "--resume", str(part), "--total-steps", "5", runs=tmp_path / "b")
    assert same(checkpoint(whole), checkpoint(part))
    a, b = curves(whole), curves(part)
    assert all(a[tag] == b[tag] for tag in a)


def test_resume_within_the_auto_encoder(tmp_path, monkeypatch):
    options = ["--autoencoder", "--ae-steps", "3", "--total-steps", "2", "--eval-every", "0"]
    whole = train("gmmn", *options, runs=tmp_path / "a")
    part = stopped("gmmn", *options, runs=tmp_path / "b", i=4, number=signal.SIGTERM, monkeypatch=monkeypatch)
    assert checkpoint(part)["autoencoder"]["updates"] == 5
    train("gmmn", "--resume", str(part), runs=tmp_path / "b")
    assert same(checkpoint(whole), checkpoint(part))
    assert curves(part) == curves(whole)
    assert [step for step, _ in curves(whole)["losses/autoencoder"]] == list(range(-8, 1))


@pytest.mark.parametrize(
    ("script", "number"), [*((script, signal.SIGTERM) for script in SCRIPTS), ("gmmn", signal.SIGINT)]
)
def test_signal_finishes_the_step_and_saves(script, number, tmp_path, monkeypatch, capsys):
    options = ["--total-steps", "3", "--eval-every", "0", "--save-every", "0"]
    whole = train(script, *options, runs=tmp_path / "a")
    part = stopped(script, *options, runs=tmp_path / "b", i=1, number=number, monkeypatch=monkeypatch)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # put back
    assert f"--resume {part}" in capsys.readouterr().out
    assert 0 < checkpoint(part)["step"] < 3
    train(script, "--resume", str(part), runs=tmp_path / "b")
    assert same(checkpoint(whole), checkpoint(part))


def child(script, options):
    module = import_module(script)
    module.train(run.parse(module.Args, options))


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_any_moment(kills, tmp_path):
    """SIGKILL at random points of a real process, also within a save: nothing is lost, nothing differs."""
    quiet = ["--save-every", "1", "--eval-every", "0", "--sample-every", "40"]
    options = [*SMALL, *quiet, "--runs-dir", str(tmp_path / "b"), "--total-steps", "100000"]
    context, moments, steps = multiprocessing.get_context("forkserver"), random.Random(kills), [0]
    context.set_forkserver_preload(["gmmn"])
    for _ in range(kills):
        process = context.Process(target=child, args=("gmmn", options))
        process.start()
        saves = set()
        while len(saves) < 2:  # until it trains: the first save may be that of the process before
            time.sleep(0.01)
            saves |= {path.stat().st_mtime_ns for path in tmp_path.glob("b/*/checkpoint.pt")}
        time.sleep(moments.uniform(0, 0.2))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        (part,) = (tmp_path / "b").iterdir()
        steps.append(checkpoint(part)["step"])
        options = ["--resume", str(part)]
        time.sleep(1)  # TensorBoard orders its files by the second in which they were begun
    assert steps == sorted(steps)
    end = ["--total-steps", str(steps[-1] + 5)]
    train("gmmn", *options, *end, runs=tmp_path / "b")
    whole = train("gmmn", *quiet, *end, runs=tmp_path / "a")
    assert same(checkpoint(whole), checkpoint(part))
    assert curves(whole) == curves(part)
    assert not list(part.glob("*.partial"))


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_describes_every_flag(script, capsys):
    args_class = import_module(script).Args
    with pytest.raises(SystemExit) as exit_:
        run.parse(args_class, ["--help"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert not re.search("--- (run|method) ---", text), "a flag's help must end the line that the flag begins"
    for field in fields(args_class):
        assert f"--{field.name.replace('_', '-')} " in text or f"--{field.name.replace('_', '-')}," in text


@pytest.mark.parametrize("script", SCRIPTS)
def test_nan_ends_the_run_and_never_enters_a_checkpoint(script, tmp_path, monkeypatch):
    batch = datasets.Images.batch
    bad = lambda self, i: batch(self, i) * (math.nan if i >= 4 else 1)  # noqa: E731
    monkeypatch.setattr(datasets.Images, "batch", bad)
    with pytest.raises(run.Failed, match=r"loss was not finite at step [1-8];"):  # the first; seen at the 9th
        train(script, "--total-steps", "9", "--log-every", "0", "--save-every", "0", runs=tmp_path)
    (folder,) = tmp_path.iterdir()
    state = checkpoint(folder)
    assert all(t.isfinite().all() for t in torch.utils._pytree.tree_leaves(state) if hasattr(t, "isfinite"))


def test_nan_in_the_auto_encoder_is_named(tmp_path, monkeypatch):
    batch = datasets.Images.batch
    bad = lambda self, i: batch(self, i) * (math.nan if i == 2 else 1)  # noqa: E731
    monkeypatch.setattr(datasets.Images, "batch", bad)
    options = ["--autoencoder", "--ae-steps", "2", "--total-steps", "2", "--eval-every", "0"]
    with pytest.raises(run.Failed, match="the autoencoder loss was not finite at step 3"):
        train("gmmn", *options, runs=tmp_path)


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    model = torch.nn.Linear(1, 1)
    model.weight.data.fill_(math.inf)
    with pytest.raises(run.Failed, match="weights were not finite at step 7"):
        run.save_checkpoint(tmp_path, import_module("gmmn").Args(), "gmmn", 7, {"generator": model}, 0)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("script", SCRIPTS)
def test_eval_only(script, tmp_path, capsys):
    folder = train(script, "--total-steps", "1", "--eval-every", "1", runs=tmp_path)
    first = json.loads((folder / "results.json").read_text())
    weights = (folder / "checkpoint.pt").read_bytes()
    (folder / "results.json").unlink()
    train(script, "--resume", str(folder), "--eval-only", runs=tmp_path)
    assert capsys.readouterr().out.splitlines()[-1].startswith(str(folder))
    again = json.loads((folder / "results.json").read_text())
    assert 0 <= again["metrics"].pop("pixel_copies") <= 1
    assert again["protocol"].pop("copies").startswith("nearer to one of 32 training images")
    assert again == first
    assert (folder / "checkpoint.pt").read_bytes() == weights
    with np.load(folder / "samples.npz") as samples:
        assert samples["samples"].shape == (32, 8, 8, 1)
    assert (folder / "copies.png").exists()
    assert Image.open(folder / "interpolations.png").size == (8 * 66 + 2, 8 * 66 + 2)


@pytest.mark.parametrize("script", SCRIPTS)
def test_interpolations_run_from_one_draw_to_another(script):
    """From z_i to z_(8 + i) in 8 steps: for normal noise by equal angles, for uniform by equal distances."""
    module = import_module(script)
    args = types.SimpleNamespace(dataset="digits", latent_dim=20)
    torch.manual_seed(0)
    noise = module.draw_noise(16, args, torch.device("cpu")).double()
    paths = module.interpolate(noise).view(8, 8, 20)
    torch.testing.assert_close(paths[:, 0], noise[:8])
    torch.testing.assert_close(paths[:, -1], noise[8:])
    if noise.abs().max() > 1:  # normal
        units = torch.nn.functional.normalize(noise, dim=1)
        start, end = units[:, None].split(8)
        weights = torch.linalg.lstsq(torch.cat([start, end], 1).mT, paths.mT).solution.mT  # (8, 8, 2)
        lengths = noise.norm(dim=1).view(2, 8).T[:, None]
        weights = weights / lengths  # sin((1 - t) angle) and sin(t angle) over sin(angle)
        angle = (start * end).sum(2).acos()
        t = torch.linspace(0, 1, 8, dtype=torch.float64)
        torch.testing.assert_close(weights[..., 1], (t * angle).sin() / angle.sin())
        torch.testing.assert_close(weights[..., 0], ((1 - t) * angle).sin() / angle.sin())
    else:
        steps = paths.diff(dim=1)
        torch.testing.assert_close(steps, (noise[8:] - noise[:8])[:, None].expand(8, 7, 20) / 7)
    one = module.interpolate(torch.randn(16, 1))
    assert one.isfinite().all()


GENERATORS = {  # what a script's Generator takes beside shape, latent_dim and width
    "gmmn": "False",
    "mmd_gan": 'args.architecture == "gram"',
    "baselines.gan": "args.architecture",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_run_of_a_gpu_is_loaded_from_python_and_evaluated(script, tmp_path, monkeypatch):
    """The README's lines: the samples are those of --eval-only, where each image's are its own.

    In the checkpoint, tensors are marked as those of a GPU that no machine has."""
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
    folder = train(script, "--total-steps", "2", "--sample-bn", "running", runs=tmp_path)
    train(script, "--resume", str(folder), "--eval-only", runs=tmp_path)
    with pytest.raises(RuntimeError, match="CUDA device"):
        torch.load(folder / "checkpoint.pt", weights_only=True)

    lines = re.search(r"## From Python\n\n((?:    .*\n)+)", README).group(1)
    lines = re.sub("^    ", "", lines, flags=re.MULTILINE)
    lines = lines.replace("mmd_gan_repulsive as", f"{script} as").replace("runs/RUN", str(folder))
    if script in GENERATORS:
        lines = lines.replace("args.width)", f"args.width, {GENERATORS[script]})")
    first, *others, last = lines.splitlines()
    assert (first.split()[0], last) == ("import", 'images = generator(script.draw_noise(64, args, "cpu"))')
    found = {}
    exec("\n".join([first, *others]), found)
    torch.manual_seed(run.mix(1, run.Stream.SAMPLES, 0))
    exec(last.replace("64", "256"), found)  # as many as an evaluation draws at a time

    images = datasets.to_uint8(found["images"], found["script"].VALUE_RANGE).permute(0, 2, 3, 1)
    with np.load(folder / "samples.npz") as samples:
        assert (images[:32].int() - torch.from_numpy(samples["samples"]).int()).abs().max() <= 1


def test_a_run_of_a_gpu_is_gone_on_with(tmp_path, monkeypatch):
    whole = train("smmd_gan", "--total-steps", "3", "--eval-every", "0", runs=tmp_path / "a")
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:99")
    part = train("smmd_gan", "--total-steps", "2", "--eval-every", "0", runs=tmp_path / "b")
    monkeypatch.undo()
    train("smmd_gan", "--resume", str(part), "--total-steps", "3", runs=tmp_path / "b")
    assert same(checkpoint(whole), checkpoint(part))


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS)
def test_seed_decides_everything(script, tmp_path):
    options = ["--total-steps", "2", "--eval-every", "0", "--seed"]
    states = [checkpoint(train(script, *options, s, runs=tmp_path / str(i))) for i, s in enumerate("112")]
    assert same(states[0], states[1])
    assert not same(states[0], states[2])


@pytest.mark.parametrize("script", SCRIPTS)
def test_bf16_and_average_of_weights(script, tmp_path):
    options = ["--total-steps", "2", "--precision", "bf16", "--ema-decay", "0.9", "--eval-every", "2"]
    state = checkpoint(train(script, *options, runs=tmp_path))
    leaves = torch.utils._pytree.tree_leaves(state)
    assert all(leaf.dtype != torch.bfloat16 for leaf in leaves if hasattr(leaf, "dtype"))
    name = next(k for k, v in state["generator"].items() if v.is_floating_point() and v.numel() > 1)
    assert not torch.equal(state["ema"][name], state["generator"][name])


def test_track_mirrors_the_curves_or_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # cannot be imported
    with pytest.raises(run.BadInput, match="cannot be used: import of wandb halted"):
        train("gmmn", "--track", runs=tmp_path)
    calls = []
    wandb = types.ModuleType("wandb", "a stand-in")
    wandb.__spec__, wandb.init = importlib.machinery.ModuleSpec("wandb", None), lambda **kw: calls.append(kw)
    wandb.login = lambda: None
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    folder = train("gmmn", "--track", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    (call,) = calls
    assert (call["id"], call["sync_tensorboard"]) == (folder.name, True)
    assert json.loads(json.dumps(call["config"])) == json.loads((folder / "args.json").read_text())
    run.LOCKS.pop().release(force=True)  # of the folder's old name
    train("gmmn", "--track", "--resume", str(folder.rename(tmp_path / "a #1")), runs=tmp_path)
    assert calls[1]["id"] == "a--1"  # W&B takes no other signs

    def not_logged_in():
        raise ValueError("No API key configured")

    wandb.login = not_logged_in
    with pytest.raises(run.BadInput, match="--track is on, but Weights & Biases cannot be used: No API key"):
        train("gmmn", "--track", runs=tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_two_runs_in_the_same_second_get_two_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda _: "same")
    args = import_module("gmmn").Args(runs_dir=str(tmp_path))
    folders = {run.make_folder(args, "gmmn", "python gmmn.py", 0) for _ in range(3)}
    assert len(folders) == 3


# --- refusals --------------------------------------------------------------------------------------

BAD = """
baselines.gan --architecture gram --dataset ring2d | --architecture is gram
baselines.gan --weak-critic                       | --weak-critic is on
baselines.gan --architecture gram --weak-critic   | --weak-critic is on, but should be off
baselines.wgan --clip 0                           | --clip is 0
baselines.wgan --rho 0                            | --rho is 0
baselines.wgan --image-size 6                     | --image-size is 6
gmmn --dataset cifar11                            | --dataset is cifar11, but should be one of 8gaussians
gmmn --dataset folder:nowhere                     | --dataset is folder:nowhere
gmmn --dataset folder:README.md                   | --dataset is folder:README.md
gmmn --dataset mnist --data-dir nowhere           | --dataset mnist
gmmn --dataset 8gaussians --autoencoder           | --autoencoder is on
gmmn --batch-size 0                               | --batch-size is 0
gmmn --batch-size 1798                            | --batch-size is 1798, but should be at most 1797
gmmn --batch-size 1                               | --batch-size is 1
gmmn --total-steps -1                             | --total-steps is -1
gmmn --width 0                                    | --width is 0, but should be at least 16
gmmn --image-size 0                               | --image-size is 0
gmmn --seed -1                                    | --seed is -1
gmmn --seed 99999999999999999999                  | --seed is 99999999999999999999
gmmn --ae-steps 0 --autoencoder                   | --ae-steps is 0
gmmn --drop-step -1                               | --drop-step is -1
gmmn --parzen                                     | --parzen is on, but should be off but for mnist
gmmn --dataset mnist --train-split all --parzen   | --parzen is on, but should be off but for mnist
gmmn --dataset mnist --parzen --eval-every 0      | --parzen is on, but should be off with --eval-every 0
gmmn --momentum 1                                 | --momentum is 1.0
gmmn --log-every -5                               | --log-every is -5
gmmn --sample-every -5                            | --sample-every is -5
gmmn --save-every -5                              | --save-every is -5
gmmn --ema-decay 1                                | --ema-decay is 1.0
gmmn --ema-decay nan                              | --ema-decay is nan
gmmn --bandwidths 1 0                             | --bandwidths is (1.0, 0.0)
gmmn --bandwidths inf                             | --bandwidths is (inf,)
gmmn --bandwidths                                 | --bandwidths is ()
gmmn --learning-rate 0                            | --learning-rate is 0.0
gmmn --learning-rate nan                          | --learning-rate is nan
gmmn --latent-dim 0                               | --latent-dim is 0
gmmn --feature-dim 0                              | --feature-dim is 0
gmmn --device nonsense                            | --device nonsense
gmmn --device meta                                | --device meta
gmmn --device cuda:7                              | --device cuda:7
gmmn --eval-split test                            | --eval-split is test
gmmn --eval-only                                  | --eval-only
gmmn --eval-samples 2                             | --eval-samples is 2
gmmn --eval-features inception --inception-weights nowhere.pth | --inception-weights nowhere.pth
gmmn --resume nowhere                             | --resume nowhere
gmmn --resume README.md                           | --resume README.md
gmmn --runs-dir README.md/runs                    | README.md/runs
gamn --lambda-reg -1                              | --lambda-reg is -1.0
gamn --gp-target -1                               | --gp-target is -1.0
gamn --data-mmd-weight -1                         | --data-mmd-weight is -1.0
gamn --n-generator 0                              | --n-generator is 0
gamn --dataset folder:. --eval-features pixels    | should be a folder with images (no image below .)
mmd_gan --lambda-ae -1                            | --lambda-ae is -1.0
mmd_gan --lambda-rank inf                         | --lambda-rank is inf
mmd_gan --clip -0.01                              | --clip is -0.01
mmd_gan --lambda-rank -1                          | --lambda-rank is -1.0
mmd_gan --warmup-critic 0                         | --warmup-critic is 0
mmd_gan --n-critic 0                              | --n-critic is 0
mmd_gan --weak-critic                             | --weak-critic
mmd_gan --dataset ring2d --architecture gram --weak-critic | --weak-critic is on
mmd_gan --critic-width 0                          | --critic-width is 0
mmd_gan --image-size 30                           | --image-size is 30
mmd_gan_repulsive --lam nan                       | --lam is nan
mmd_gan_repulsive --lambda-gp -0.1                | --lambda-gp is -0.1
mmd_gan_repulsive --loss hinge --feature-dim 16   | --loss is hinge
mmd_gan_repulsive --loss hinge --lambda-gp 0.1    | --loss is hinge
mmd_gan_repulsive --sn-gain 0                     | --sn-gain is 0.0
mmd_gan_repulsive --critic-norm none --sn-gain 2  | --sn-gain is 2.0
mmd_gan_repulsive --sn-gain 1e300                 | --sn-gain is 1e+300
gmmn --seed 1HUGE                                 | --seed is 1000
mmd_gan_repulsive --beta1 1                       | --beta1 is 1.0
mmd_gan_repulsive --image-size 7                  | --image-size is 7
smmd_gan --constraint swgan --kernel rbf          | --constraint is swgan
smmd_gan --constraint swgan --feature-dim 2       | --constraint is swgan
smmd_gan --constraint none --scale-form poster    | --scale-form is poster
smmd_gan --as-coded                               | --as-coded is on
smmd_gan --critic-norm none --no-sn-scale         | --no-sn-scale is given
smmd_gan --scale-form poster --kernel distance    | --kernel is distance
smmd_gan --lambda-scale -1                        | --lambda-scale is -1.0
smmd_gan --lambda-gp -1                           | --lambda-gp is -1.0
smmd_gan --lambda-activation -1                   | --lambda-activation is -1.0
smmd_gan --clip-norm -1                           | --clip-norm is -1.0
smmd_gan --lr-schedule kid --dataset swissroll    | --lr-schedule is kid
smmd_gan --lr-schedule kid --eval-every 0         | --lr-schedule is kid
smmd_gan --lr-schedule kid --eval-metrics fid     | --lr-schedule is kid
gamn --dataset 8gaussians --eval-metrics fid      | --eval-metrics is fid
smmd_gan --lr-schedule kid --learning-rate 1e-7   | --learning-rate is 1e-07
smmd_gan --warmup-critic 0                        | --warmup-critic is 0
gram_net --ridge -1                               | --ridge is -1.0
gram_net --positivity-weight -1                   | --positivity-weight is -1.0
gram_net --as-coded notebook --positivity clip    | --positivity is clip
gram_net --critic-width 0                         | --critic-width is 0
gram_net --critic-width 99999999                  | --critic-width is 99999999
gram_net --beta2 1                                | --beta2 is 1.0
gram_net --weak-critic                            | --weak-critic is on
gram_net --weak-critic --dataset ring2d           | --weak-critic is on
gram_net --image-size 9                           | --image-size is 9
gmmn --runs-dir /proc/runs                        | run folder /proc/runs
mmd_gan --dataset folder:. --image-size 30 --eval-features pixels | --image-size is 30
smmd_gan --dataset folder:. --image-size 100 --eval-features pixels | --image-size is 100
gram_net --dataset folder:. --image-size 30 --eval-features pixels | --image-size is 30
gamn --dataset folder:. --image-size 6 --eval-features pixels | --image-size is 6
gamn --dataset folder:. --eval-features pixels --eval-samples 3 | --eval-samples is 3
gmmn --width 999999999999999999999                | --width is 999999999999999999999
smmd_gan --feature-dim 99999999999                | --feature-dim is 99999999999
smmd_gan --bandwidths 1e300                       | --bandwidths is (1e+300,)
gram_net --bandwidths 1e-200                      | --bandwidths is (1e-200,)
gmmn --train-split all                            | --train-split is all, but should be train
""".strip().splitlines()
# What tyro refuses: it says so itself.
MISTYPED = """
gmmn --batch-size 2.5
gmmn --seed x
gmmn --optimizer lbfgs
gmmn --kernel linear
gmmn --bandwidths 1 x
gmmn --precision fp8
gmmn --no-such-flag
gmmn stray
gamn --regularizer l3
mmd_gan_repulsive --kernel laplacian
gram_net --as-coded tensorflow
gmmn --train-split test
""".strip().splitlines()


@pytest.mark.parametrize("case", BAD, ids=lambda case: case.split("|")[0].strip())
def test_bad_input_is_one_line_and_leaves_nothing(case, tmp_path, monkeypatch, capsys):
    command, message = (part.strip() for part in case.split("|"))
    script, *options = command.replace("HUGE", "0" * 400).split()
    import_module(script)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("a file, not a folder")
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
    monkeypatch.setattr(warnings, "warn", lambda *args, **kwargs: None)  # of a module run and imported
    with pytest.raises(SystemExit) as exit_:
        runpy.run_module(script, run_name="__main__", alter_sys=True)  # a module with a file
    error = capsys.readouterr().err
    assert message in error
    assert exit_.value.code == 2
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir() if path.name != "nowhere"] == ["README.md"]


@pytest.mark.parametrize("command", MISTYPED)
def test_what_is_mistyped_is_named(command, tmp_path, monkeypatch, capsys):
    script, *options = command.split()
    module = import_module(script)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *options])
    with pytest.raises(SystemExit) as exit_:
        run.main(module.train, module.Args)
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert options[-1] in error
    assert options[0] in error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_bad_input_in_processes_of_their_own(tmp_path):
    commands = [f"{script} --batch-size 0" for script in SCRIPTS]
    for command in commands:
        script, *options = command.split()
        program = ["-m", script] if script in BASELINES else [source_file(script)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.run(
            [sys.executable, *program, *options],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
        )
        expected = "error: --batch-size is 0, but should be"
        assert (process.returncode, process.stdout, process.stderr[: len(expected)]) == (2, "", expected)
        assert process.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_resume_refuses_what_makes_another_run(tmp_path):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    with pytest.raises(run.BadInput, match=r"--seed 2 \(was 1\), --momentum 0.5 \(was 0.9\)"):
        train("gmmn", "--resume", str(folder), "--seed", "2", "--momentum", "0.5", runs=tmp_path)
    with pytest.raises(run.BadInput, match="not a run folder of this script"):
        train("mmd_gan_repulsive", "--resume", str(folder), runs=tmp_path)
    with pytest.raises(run.BadInput, match="--total-steps is 0, but should be at least 1"):
        train("gmmn", "--resume", str(folder), "--total-steps", "0", runs=tmp_path)
    good = (folder / "checkpoint.pt").read_bytes()
    state = torch.load(folder / "checkpoint.pt", weights_only=True)
    torch.save(state | {"step": 3}, folder / "checkpoint.pt")
    before = (folder / "args.json").read_bytes()
    with pytest.raises(run.BadInput, match="--total-steps is 2, but should be 3 or more"):
        train("gmmn", "--resume", str(folder), "--total-steps", "2", runs=tmp_path)
    assert (folder / "args.json").read_bytes() == before
    state["generator"].popitem()
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(run.BadInput, match=r"does not fit the networks of gmmn\.py"):
        train("gmmn", "--resume", str(folder), runs=tmp_path)
    (folder / "checkpoint.pt").write_bytes(good[: len(good) // 2])
    with pytest.raises(run.BadInput, match="damaged"):
        train("gmmn", "--resume", str(folder), runs=tmp_path)
    (folder / "checkpoint.pt").unlink()
    with pytest.raises(run.BadInput, match="missing"):
        train("gmmn", "--resume", str(folder), runs=tmp_path)


def test_checkpoint_does_not_execute_what_is_in_it(tmp_path, monkeypatch):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    monkeypatch.chdir(tmp_path)
    torch.save({"script": Malicious(os.mkdir, "executed")}, folder / "checkpoint.pt")
    with pytest.raises(run.BadInput, match="damaged"):
        train("gmmn", "--resume", str(folder), runs=tmp_path)
    assert not Path("executed").exists()


def test_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    good = (folder / "checkpoint.pt").read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(run.Failed, match="No space left"):
        train("gmmn", "--resume", str(folder), "--total-steps", "2", runs=tmp_path)
    assert (folder / "checkpoint.pt").read_bytes() == good


@pytest.mark.slow
def test_command_line_in_a_process_of_its_own(tmp_path):
    options = [*SMALL, "--total-steps", "2", "--eval-every", "0"]
    command = [sys.executable, ROOT / "mmd_gan_repulsive.py", *options]
    good = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (good.returncode, good.stderr) == (0, "")  # quiet where there is no terminal
    assert good.stdout.splitlines()[-1].startswith("runs/digits__mmd_gan_repulsive__1__")


@pytest.mark.slow
def test_cifar10_in_the_original_format_at_the_papers_width(tmp_path):
    """A few genuine-format images, the paper's networks, two steps; without the archive, one clear line."""
    import pickle
    import tarfile

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for i in range(1, 6):
        data = np.random.default_rng(i).integers(0, 256, (4, 3072), dtype=np.uint8)
        (folder / f"data_batch_{i}").write_bytes(pickle.dumps({"data": data, "labels": [0] * 4}, protocol=2))
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    module = import_module("mmd_gan_repulsive")
    options = ["--dataset", "cifar10", "--data-dir", str(tmp_path), "--batch-size", "4", "--total-steps", "2"]
    options += ["--eval-features", "pixels", "--eval-every", "2", "--kernel", "rbf-b"]
    options += ["--runs-dir", str(tmp_path / "r")]
    metrics = module.train(run.parse(module.Args, options))
    assert math.isfinite(metrics["pixel_frechet"])
    state = checkpoint(next((tmp_path / "r").iterdir()))
    assert state["args"]["width"] == 64
    assert state["generator"]["layers.0.weight"].shape == (8192, 128)
