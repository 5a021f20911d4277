"""The machinery of a run: arguments, random streams, averages, checkpoints, what a disk or a person does."""

import json
import math
from importlib import import_module

import pytest
import torch
from test_scripts import SCRIPTS, checkpoint, train
from torch import nn

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
    assert asked == ["all", "test"]
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


def test_a_run_of_before_the_training_split_is_asked_for_it(tmp_path):
    folder = train("gmmn", "--total-steps", "1", "--eval-every", "0", runs=tmp_path)
    saved = json.loads((folder / "args.json").read_text())
    del saved["train_split"]
    (folder / "args.json").write_text(json.dumps(saved))
    state = checkpoint(folder)
    del state["args"]["train_split"]
    torch.save(state, folder / "checkpoint.pt")
    with pytest.raises(run.BadInput, match="--train-split is left out, but should be given"):
        train("gmmn", "--resume", str(folder), runs=tmp_path)
    train("gmmn", "--resume", str(folder), "--train-split", "train", "--total-steps", "2", runs=tmp_path)
    assert checkpoint(folder)["step"] == 2
    train("gmmn", "--resume", str(folder), "--total-steps", "3", runs=tmp_path)  # from now on it is known


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
