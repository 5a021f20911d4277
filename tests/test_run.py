"""The machinery of a run: arguments, random streams, averages, checkpoints, what a disk or a person does."""

import fcntl
import json
import math
import os
import random
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from test_scripts import ROOT, SCRIPTS, SMALL, checkpoint, curves, same, train
from torch import nn
from torch.utils.tensorboard import SummaryWriter

from common import datasets, run

# --- arguments -------------------------------------------------------------------------------------


@pytest.mark.parametrize("script", SCRIPTS)
def test_training_split_of_the_papers(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    everything = {
        "smmd_gan": {"cifar10", "mnist", "fashion-mnist", "celeba"},
        "mmd_gan_repulsive": {"celeba"},
    }
    module = import_module(script)
    for name in (*datasets.TOYS, *datasets.IMAGES, "folder:photos"):
        size = 32 if name.startswith("folder") else None
        split = module.resolve(module.Args(dataset=name, image_size=size)).train_split
        assert split == ("all" if name in everything.get(script, ()) else "train"), name


@pytest.mark.parametrize("name", ["digits", "folder:photos", "ring2d"])
def test_training_split_is_refused_where_there_is_one(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "photos").mkdir()
    options = ["--dataset", name, "--train-split", "all", "--image-size", "8", "--eval-every", "0"]
    with pytest.raises(run.BadInput, match="--train-split is all, but should be train"):
        train("gmmn", *options, runs=tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_training_split_decides_the_images_and_is_recorded(tmp_path, monkeypatch):
    asked = []
    images = torch.randint(256, (40, 1, 8, 8), dtype=torch.uint8)
    monkeypatch.setattr(datasets, "load_images", lambda *args: asked.append(args[-1]) or images)
    options = ["--dataset", "cifar10", "--train-split", "all", "--eval-split", "test", "--image-size", "8"]
    options += ["--eval-features", "pixels"]
    folder = train("gmmn", *options, "--total-steps", "1", "--eval-every", "1", runs=tmp_path)
    assert asked[:2] == ["all", "test"]  # what else is read serves the floor of distances
    assert json.loads((folder / "args.json").read_text())["train_split"] == "all"
    assert json.loads((folder / "results.json").read_text())["protocol"]["train_split"] == "all"
    with pytest.raises(run.BadInput, match=r"--train-split train \(was all\)"):
        train("gmmn", "--resume", str(folder), "--train-split", "train", runs=tmp_path)


@pytest.mark.parametrize(
    ("options", "warned"),
    [
        ({}, False),
        ({"eval_split": "test"}, False),
        ({"eval_split": "all"}, True),
        ({"train_split": "all"}, True),
        ({"train_split": "all", "eval_split": "test"}, True),
        ({"train_split": "all", "eval_split": "test", "eval_every": 0}, False),
    ],
)
def test_overlap_of_training_and_reference_images_is_said_once(options, warned, capsys):
    module = import_module("mmd_gan")
    module.resolve(module.Args(dataset="cifar10", **options))
    assert capsys.readouterr().out.count("are trained on (--train-split") == warned


def test_overlap_in_the_papers_own_protocol_is_not_warned_of(capsys):
    module = import_module("smmd_gan")
    module.resolve(module.Args(dataset="cifar10"))
    assert capsys.readouterr().out == ""
    module.resolve(module.Args(dataset="cifar10", eval_split="test"))  # which trains on them, too
    assert capsys.readouterr().out.count("images of --eval-split test are trained on") == 1


# --- random streams, averages, losses --------------------------------------------------------------


def test_streams_keep_their_numbers():
    """Of which every random number of an older run was made."""
    names = ["STEP", "SAMPLES", "AUTOENCODER", "TOY_BATCH", "EPOCH", "TOY_REFERENCE", "TOY_SCALE"]
    assert [(stream.name, stream.value) for stream in run.Stream] == [(n, i) for i, n in enumerate(names)]
    assert run.mix(7, run.Stream.EPOCH, 3) == run.mix(7, 4, 3)


def test_average_forgets_the_first_network():
    """Against the recursion in double precision; buffers are those of the model."""
    model, average = nn.BatchNorm1d(3).double(), nn.BatchNorm1d(3).double()
    expected, share = average.weight.detach().clone(), 1.0
    for step in range(1, 1001):
        model.weight.data.normal_()
        model.running_mean.normal_()
        run.update_average(average, model, 0.999, step)
        decay = (1 + step) / (10 + step)  # below 0.999 until step 8990
        expected, share = decay * expected + (1 - decay) * model.weight.detach(), share * decay
    torch.testing.assert_close(average.weight.detach(), expected, rtol=1e-12, atol=1e-14)
    assert torch.equal(average.running_mean, model.running_mean)
    assert share < 1e-15  # of the first network; without a warm-up 0.37
    before = average.weight.detach().clone()
    run.update_average(average, model, 0.999, 10**6)
    late = 0.999 * before + 0.001 * model.weight.detach()
    torch.testing.assert_close(average.weight.detach(), late, rtol=1e-12, atol=1e-14)


def test_the_first_step_that_is_not_finite_is_remembered():
    finite = run.Finite()
    finite.check()
    for step, loss in ((3, 1.0), (4, math.inf), (5, 0.0), (6, math.nan)):
        finite.note(step, generator=torch.tensor(loss, requires_grad=True), critic=torch.tensor(0.0))
    with pytest.raises(run.Failed, match="the generator loss was not finite at step 4;"):
        finite.check()


# --- the command line ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("script", "options"),
    [
        ("mmd_gan", []),
        ("mmd_gan", ["--dataset", "folder:my photos/it's", "--seed", "7", "--bandwidths", "1.0", "0.5"]),
        ("smmd_gan", ["--no-sn-scale", "--compile", "--learning-rate", "1e-05", "--image-size", "8"]),
        ("mmd_gan_repulsive", ["--lam", "-1.0"]),
    ],
)
def test_first_line_can_be_pasted(script, options):
    module = import_module(script)
    args = run.parse(module.Args, options)
    python, file, *again = shlex.split(run.command(args))
    assert (python, Path(file).resolve()) == ("python", Path(module.__file__))
    assert sorted(again) == sorted(options)  # nothing but what differs from the defaults
    assert run.parse(module.Args, again) == args


def test_first_line_of_a_resumed_run_has_what_is_new(tmp_path, capsys):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    capsys.readouterr()
    train("gmmn", "--resume", str(folder), "--total-steps", "2", "--runs-dir", str(tmp_path), runs=tmp_path)
    file = os.path.relpath(import_module("gmmn").__file__)
    assert capsys.readouterr().out.splitlines()[0] == f"python {file} --resume {folder} --total-steps 2"


def test_first_line_under_torchrun(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert run.command(import_module("gmmn").Args()).startswith("torchrun --nproc-per-node 3 ")


def test_arguments_of_a_run_that_are_not_what_they_should_be(tmp_path):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    good = json.loads((folder / "args.json").read_text())
    bad = [{"seed": "x"}, {"seed": 1.5}, {"batch_size": [1, 2]}, {"compile": 3}, {"bandwidths": "wide"}]
    bad += [{"kernel": "linear"}, {"no_such": 1}, {"learning_rate": {}}]
    for text in ("[]", "3", "{", *(json.dumps(good | change) for change in bad)):
        (folder / "args.json").write_text(text)
        with pytest.raises(run.BadInput, match=f"--resume {folder}: not a run folder of this script"):
            train("gmmn", "--resume", str(folder), runs=tmp_path)
    (folder / "args.json").write_text(json.dumps(good))
    assert run.saved_arguments(str(folder), import_module("gmmn").Args).bandwidths == tuple(
        good["bandwidths"]
    )


@pytest.mark.parametrize("step", ["3", None, 1.5, "missing"])
def test_a_checkpoint_without_a_step_is_refused(step, tmp_path):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    state = checkpoint(folder) | {"step": step}
    if step == "missing":
        del state["step"]
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(run.BadInput, match=r"checkpoint.pt is missing, damaged or no checkpoint .*step"):
        train("gmmn", "--resume", str(folder), runs=tmp_path)


@pytest.mark.parametrize("variables", [{"WORLD_SIZE": "2"}, {"WORLD_SIZE": "2", "RANK": "0"}, {"RANK": "x"}])
def test_processes_that_torchrun_did_not_start(variables, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(run.BadInput, match=r"processes do not find each other .*; torchrun sets RANK"):
        run.start("cpu")


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("dataset", ["digits", "ring3d"])
def test_float64_as_the_default_type(script, dataset, tmp_path):
    """Networks are in it; losses as ever."""
    torch.set_default_dtype(torch.float64)
    try:
        options = ["--dataset", dataset, "--total-steps", "1", "--eval-every", "1", "--ema-decay", "0.5"]
        folder = train(script, *options, runs=tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    assert next(iter(checkpoint(folder)["generator"].values())).dtype == torch.float64
    assert (folder / "results.json").exists()


# --- checkpoints -----------------------------------------------------------------------------------


def test_a_bit_that_flips_in_a_checkpoint_is_seen(tmp_path):
    """It is refused, or loads the same: 400 bits anywhere, and those that mark an entry as a folder."""
    args = import_module("gmmn").Args(total_steps=3, train_split="train")
    models = {"generator": nn.Linear(5, 40)}
    models["g_optimizer"] = torch.optim.Adam(models["generator"].parameters())
    models["generator"](torch.ones(1, 5)).sum().backward()
    models["g_optimizer"].step()
    run.save_checkpoint(tmp_path, args, "gmmn", 3, models, 0)
    path, args.resume = tmp_path / "checkpoint.pt", str(tmp_path)
    good = path.read_bytes()
    state = models["generator"].state_dict() | models["g_optimizer"].state_dict()["state"]

    draw = random.Random(0)
    bits = [draw.randrange(8 * len(good)) for _ in range(400)]
    folders = [8 * (match.start() + 38) + 4 for match in re.finditer(b"PK\x01\x02", good)]
    assert len(folders) > 5
    refused = 0
    for bit in bits + folders:
        bad = bytearray(good)
        bad[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bad)
        again = {"generator": nn.Linear(5, 40)}
        again["g_optimizer"] = torch.optim.Adam(again["generator"].parameters())
        try:
            assert run.load_checkpoint(args, "gmmn", again) == 3
        except run.BadInput:
            refused += 1
            continue
        assert bit not in folders
        found = again["generator"].state_dict() | again["g_optimizer"].state_dict()["state"]
        assert same(found, state), bit
    assert refused > 200


def test_what_is_not_finite_replaces_no_results(tmp_path):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "1", runs=tmp_path)
    before = (folder / "results.json").read_bytes()
    args = run.saved_arguments(str(folder), import_module("gmmn").Args)
    with pytest.raises(run.Failed, match="kid was nan at step 7"):
        run.save_results(folder, run.Silent(), args, 7, {"fid": 1.0, "kid": math.nan}, {}, 0)
    with pytest.raises(ValueError, match="JSON"):
        run.write_json(folder / "results.json", {"fid": math.inf})
    assert (folder / "results.json").read_bytes() == before


@pytest.mark.parametrize("script", SCRIPTS)
def test_samples_that_are_not_finite_are_not_scored(script, tmp_path, monkeypatch, capsys):
    """Neither in training, where no loss is looked at, nor by --eval-only; and not drawn."""
    folder = train(script, "--total-steps", "1", "--eval-every", "1", "--sample-every", "0", runs=tmp_path)
    before = (folder / "results.json").read_bytes()
    state = checkpoint(folder)
    for value in state["generator"].values():
        if value.is_floating_point():
            value.fill_(math.nan)
    torch.save(state, folder / "checkpoint.pt")
    pictures = sorted(folder.rglob("*.png"))
    assert main(script, "--resume", str(folder), "--eval-only", monkeypatch=monkeypatch) == 1
    assert "not finite" in capsys.readouterr().err
    options = ["--total-steps", "4", "--log-every", "0", "--save-every", "0"]
    for often in (["--eval-every", "2", "--sample-every", "0"], ["--eval-every", "0", "--sample-every", "2"]):
        assert main(script, "--resume", str(folder), *options, *often, monkeypatch=monkeypatch) == 1
        error = capsys.readouterr().err
        assert "loss was not finite at step 2" in error
        assert error.count("\n") == 1
    assert (folder / "results.json").read_bytes() == before
    assert sorted(folder.rglob("*.png")) == pictures
    assert not (folder / "samples.npz").exists()


# --- data ------------------------------------------------------------------------------------------


def photos(folder, n, dark=0):
    folder.mkdir(parents=True)
    for i in range(n):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels if i < n - dark else 0 * pixels).save(folder / f"{i:03}.png")
    return f"folder:{folder}"


def test_resuming_on_other_images_is_refused_and_on_the_same_ones_elsewhere_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = ["--image-size", "8", "--eval-features", "pixels", "--eval-every", "0"]
    old = photos(tmp_path / "old", 40)
    folder = train("gmmn", "--dataset", old, *options, "--total-steps", "1", runs=tmp_path / "runs")
    resumed = ["--resume", str(folder), "--total-steps", "2"]
    more, other = photos(tmp_path / "more", 60, dark=20), photos(tmp_path / "other", 40, dark=1)
    for name in (more, other):
        with pytest.raises(run.BadInput, match=r"images of folder:.* should be the 40 images of before"):
            train("gmmn", *resumed, "--dataset", name, runs=tmp_path / "runs")
    with pytest.raises(run.BadInput, match="--dataset digits"):
        train("gmmn", *resumed, "--dataset", "digits", runs=tmp_path / "runs")
    shutil.copytree(tmp_path / "old", tmp_path / "new")  # whose files have other times
    shutil.rmtree(tmp_path / "old")
    with pytest.raises(run.BadInput, match=r"--dataset is folder:.*old, but should be"):
        train("gmmn", *resumed, runs=tmp_path / "runs")
    new = f"folder:{tmp_path / 'new'}"
    train("gmmn", "--resume", str(folder), "--dataset", new, "--eval-only", runs=tmp_path / "runs")
    assert (folder / "samples.npz").exists()
    train("gmmn", *resumed, "--dataset", new, runs=tmp_path / "runs")
    assert checkpoint(folder)["step"] == 2
    train("gmmn", "--resume", str(folder), "--total-steps", "3", runs=tmp_path / "runs")  # from now on there


@pytest.mark.parametrize("name", ["x" * 200 + "/" + "y" * 200, "ü" * 120])
def test_any_name_of_a_folder_makes_a_name_of_a_run(name, tmp_path):
    dataset = photos(tmp_path / name, 40)
    options = ["--image-size", "8", "--eval-features", "pixels", "--total-steps", "1", "--eval-every", "0"]
    options += ["--data-dir", str(tmp_path / "data")]
    folder = train("gmmn", "--dataset", dataset, *options, runs=tmp_path / "runs")
    assert len(os.fsencode(folder.name)) <= 255
    assert json.loads((folder / "args.json").read_text())["dataset"] == dataset


def test_a_name_that_is_no_text_is_refused(tmp_path):
    with pytest.raises(run.BadInput, match=r"--runs-dir is '.*caf\\udce9', but should be a name in UTF-8"):
        train("gmmn", runs=tmp_path / "caf\udce9")
    assert list(tmp_path.iterdir()) == []


# --- what a disk, a pipe, another process or a clock does ------------------------------------------


def main(script, *options, monkeypatch):
    """Run a script as its command line does; return its exit status."""
    module = import_module(script)
    monkeypatch.setattr(sys, "argv", [script, *options])
    try:
        run.main(module.train, module.Args)
    except SystemExit as error:
        return error.code
    return 0


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def fill_the_disk(place, patch):
    """Let the third step and later find no room there: stubs of the calls that write."""
    if place == "picture":
        patch.setattr(import_module("gmmn"), "draw_picture", full)
    elif place == "results":
        write = run.write_json
        choose = lambda path: full if path.name == "results.json" else write  # noqa: E731
        patch.setattr(run, "write_json", lambda path, content: choose(path)(path, content))
    elif place == "output":
        patch.setattr(sys, "stdout", open("/dev/full", "w", buffering=1))  # noqa: SIM115
    else:
        patch.setattr(SummaryWriter, {"curve": "add_scalar", "flush": "flush", "close": "close"}[place], full)


@pytest.mark.parametrize("place", ["picture", "results", "curve", "flush", "close", "output"])
def test_what_cannot_be_written_costs_no_step(place, tmp_path, monkeypatch, capsys):
    options = ["--total-steps", "4", "--save-every", "0", "--sample-every", "1", "--eval-every", "1"]
    whole = train("gmmn", *options, runs=tmp_path / "a")
    batch = datasets.Images.batch

    def filling(self, i):
        if i == 2:
            fill_the_disk(place, patch)
        return batch(self, i)

    with monkeypatch.context() as patch:
        patch.setattr(datasets.Images, "batch", filling)
        status = main("gmmn", *SMALL, *options, "--runs-dir", str(tmp_path / "b"), monkeypatch=patch)
    (part,) = (tmp_path / "b").iterdir()
    error = capsys.readouterr().err
    assert status == 1
    assert error.startswith("error: [Errno 28] No space left on device")
    assert error.count("\n") == 1
    assert checkpoint(part)["step"] == (4 if place in ("flush", "close") else 3)
    json.loads((part / "results.json").read_text())  # whole
    train("gmmn", "--resume", str(part), runs=tmp_path / "b")
    assert same(checkpoint(whole), checkpoint(part))


def test_a_run_folder_that_is_gone_ends_the_run_in_one_line(tmp_path, monkeypatch, capsys):
    batch = datasets.Images.batch

    def removing(self, i):
        if i == 2:
            shutil.rmtree(next(tmp_path.iterdir()))
        return batch(self, i)

    monkeypatch.setattr(datasets.Images, "batch", removing)
    options = ["--total-steps", "4", "--sample-every", "1", "--eval-every", "0"]
    assert main("gmmn", *SMALL, *options, "--runs-dir", str(tmp_path), monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert re.fullmatch(r"error: .*checkpoint.pt could not be written .*; it is gone\n", error)


@pytest.mark.slow
@pytest.mark.parametrize("output", ["/dev/full", "a closed pipe"])
def test_output_that_cannot_be_written_in_a_process_of_its_own(output, tmp_path):
    """Nothing is said by Python at its end, and the status is not its own."""
    options = [*SMALL, "--total-steps", "2", "--eval-every", "1", "--runs-dir", str(tmp_path)]
    if output == "/dev/full":
        stdout = open(output, "w")  # noqa: SIM115
    else:
        reader, stdout = os.pipe()
        os.close(reader)
    command = [sys.executable, import_module("gmmn").__file__, *options]
    process = subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert process.returncode == 1
    assert re.fullmatch(r"error: \[Errno \d+\] .*\n", process.stderr)


def test_two_processes_do_not_write_to_one_run(tmp_path, monkeypatch, capsys):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    run.LOCKS.pop().release(force=True)  # as the end of its process does
    before = (folder / "args.json").read_bytes()
    with open(folder / "lock") as file:  # another one, since a lock belongs to the file as it was opened
        fcntl.flock(file, fcntl.LOCK_EX)
        status = main("gmmn", "--resume", str(folder), "--total-steps", "2", monkeypatch=monkeypatch)
    error = capsys.readouterr().err
    assert status == 2
    assert error == f"error: --resume {folder}: another process is at work on this run\n"
    assert (folder / "args.json").read_bytes() == before
    assert main("gmmn", "--resume", str(folder), "--total-steps", "2", monkeypatch=monkeypatch) == 0


def test_eval_only_on_a_run_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    """A stub of the lock's opening, since root may write anywhere."""
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "1", runs=tmp_path)
    first = json.loads((folder / "results.json").read_text())
    before = sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*"))

    def read_only(*args, **kwargs):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(FileLock, "acquire", read_only)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    train("gmmn", "--resume", str(folder), "--eval-only", runs=tmp_path)
    said = capsys.readouterr().out
    assert f"warning: {folder} cannot be written ([Errno 30] Read-only file system)" in said
    (place,) = tmp_path.glob(f"{folder.name}-*")
    assert str(place) in said.splitlines()[-1]
    again = json.loads((place / "results.json").read_text())
    assert again["metrics"].items() >= first["metrics"].items()  # and copies
    assert (place / "samples.npz").exists()
    assert sorted((path.name, path.stat().st_mtime_ns) for path in folder.rglob("*")) == before
    with pytest.raises(run.BadInput, match=r"cannot be written: .*Read-only"):
        train("gmmn", "--resume", str(folder), "--total-steps", "2", runs=tmp_path)


def test_a_clock_that_is_set_back_takes_no_point_from_the_curves(tmp_path, monkeypatch):
    whole = train("gmmn", "--total-steps", "4", "--eval-every", "1", runs=tmp_path / "a")
    part = train("gmmn", "--total-steps", "2", "--eval-every", "1", runs=tmp_path / "b")
    for file in part.glob("events.*"):
        file.rename(re.sub(r"tfevents\.\d+", f"tfevents.{int(time.time()) + 10**6:010}", str(file)))
    train("gmmn", "--resume", str(part), "--total-steps", "3", runs=tmp_path / "b")
    train("gmmn", "--resume", str(part), "--total-steps", "4", runs=tmp_path / "b")  # in the same second
    assert len([*part.glob("events.*")]) == 3
    assert curves(part) == curves(whole)


# --- what is imported ------------------------------------------------------------------------------


def test_arguments_are_read_before_what_is_slow_to_import():
    """--help and a bad flag wait for PyTorch alone."""
    slow = {"torchvision", "torch._dynamo", "tensorboard", "matplotlib", "sklearn", "scipy", "torch_fidelity"}
    code = f"import sys, {', '.join(SCRIPTS)}; print(sorted({slow} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
