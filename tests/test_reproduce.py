"""Each page of reproduce/ prints its table, agrees with what is exact, and draws its picture.

Pages that train run here with --quick, and what they left in docs/ is complete.
"""

import json
import math
import re
import shlex
import statistics
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from PIL import Image

import gmmn
import mmd_gan
import smmd_gan
from common import run
from reproduce import bandwidth_report, comparison, mmd_estimators, training
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
TRAINED = [  # those that train
    "bandwidth_report",
    "comparison",
    "comparison_images",
    "gamn_toys",
    "gmmn_parzen",
    "gram_rings",
    "gram_stability",
    "repulsive_cifar10",
    "repulsive_digits",
    "repulsive_tsne",
    "smmd_condition",
]


def test_every_page_is_tested():
    shared = ("page", "training", "speed", "digits_floors")  # the last two are tested elsewhere
    pages = [path.stem for path in ROOT.glob("reproduce/*.py") if path.stem not in shared]
    assert sorted(pages) == sorted([*PAGES, *TRAINED])
    assert all(f"`python -m reproduce.{name}" in MAP for name in pages)


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


# --- pages that train ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRAINED)
def test_trained_page(name, tmp_path):
    module = import_module(f"reproduce.{name}")
    args = module.Args(quick=True, folder=str(tmp_path / "docs"), runs_dir=str(tmp_path / "runs"))
    results = module.main(args)
    assert results
    assert json.loads((tmp_path / "docs" / f"{name}.json").read_text())
    checkpoints = list((tmp_path / "runs").rglob("checkpoint.pt"))
    times = [path.stat().st_mtime_ns for path in checkpoints]
    assert checkpoints
    assert module.main(args) == results  # nothing is trained again
    assert times == [path.stat().st_mtime_ns for path in checkpoints]


def test_training_goes_on_where_it_was_killed(tmp_path, monkeypatch):
    every = dict(eval_every=0, log_every=1, save_every=2)
    settings = gmmn.Args(dataset="8gaussians", width=16, batch_size=8, total_steps=4, **every)
    whole = training.train_to(gmmn, settings, tmp_path / "whole")

    def killed(writer, scalars, step):
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(run, "write_scalars", killed)
        with pytest.raises(KeyboardInterrupt):
            training.train_to(gmmn, settings, tmp_path / "killed")
    resumed = training.train_to(gmmn, settings, tmp_path / "killed")
    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (resumed, whole))
    assert ours["step"] == theirs["step"] == 4
    for name, weights in theirs["generator"].items():
        assert torch.equal(ours["generator"][name], weights)
    assert training.curve(resumed, "losses/generator").keys() == {3, 4}  # 1 and 2 went to the killed writer


def test_mmd2_of_every_batch(tmp_path):
    every = dict(eval_every=0, log_every=1, sample_every=0, save_every=0)
    settings = mmd_gan.Args(width=4, total_steps=3, n_critic=3, warmup_critic=3, device="cpu", **every)
    with bandwidth_report.every_batch():
        made = training.train_to(mmd_gan, settings, tmp_path)
    exact = training.curve(made, "batches/last")
    assert exact.keys() == {1, 2, 3}
    assert exact == pytest.approx(training.curve(made, "losses/critic_mmd2"), rel=1e-4)
    largest, mean = (training.curve(made, f"batches/{what}") for what in ("largest", "mean"))
    assert all(largest[step] > mean[step] > 0 for step in exact)
    assert mean != exact  # there are three batches in each update


def test_rounding_of_the_authors_code():
    errors = []
    for seed in range(50):
        features = [x.float() for x in mmd_estimators.features(seed, 0.01, 0.0025)]
        exact = bandwidth_report.exact_mmd2(*features, "rbf", mmd_estimators.REPORT)
        rounded = bandwidth_report.rounded_mmd2(*features, "rbf", mmd_estimators.REPORT)
        errors.append(rounded - exact)
    assert 2e-7 < statistics.fmean(abs(error) for error in errors) < 5e-6  # of sums of 5 in float32


@pytest.mark.parametrize("name", comparison.METHODS)
def test_comparison_has_one_pair_of_networks(name, tmp_path):
    method = comparison.METHODS[name]
    trained = []

    def save(folder, args, script, step, models, rank):
        trained.append(models)

    for data_set in ("8gaussians", "digits"):
        settings = comparison.arguments(method, data_set, 1, "data")
        settings = replace(settings, total_steps=1, eval_every=0, runs_dir=str(tmp_path), save_every=0)
        with comparison.one_for_all(method), pytest.MonkeyPatch.context() as patched:
            patched.setattr(run, "save_checkpoint", save)
            method.script.train(settings)
        models = trained[-1]
        assert type(models["generator"]) is comparison.Generator
        for optimizer in ("g_optimizer", "c_optimizer"):
            if optimizer in models:
                group = models[optimizer].param_groups[0]
                assert type(models[optimizer]) is torch.optim.Adam
                assert (group["lr"], group["betas"]) == (5e-4, (0.5, 0.999))
        if "critic" in models:
            assert isinstance(models["critic"], comparison.Critic)
            hidden = [layer.weight.shape for layer in models["critic"].weighted[:-1]]
            wanted = {"8gaussians": [(128, 2), (128, 128), (128, 128)]}
            wanted["digits"] = [(16, 1, 3, 3), (32, 16, 4, 4), (64, 32, 3, 3)]
            assert hidden == wanted[data_set]


def test_comparison_that_was_killed_between_its_tables_goes_on(tmp_path):
    args = comparison.Args(quick=True, folder=str(tmp_path / "docs"), runs_dir=str(tmp_path / "runs"))
    whole = comparison.main(args)
    file = tmp_path / "docs" / "comparison.json"
    results = json.loads(file.read_text())
    del results["8gaussians"]["runs"]["GMMN, seed 1"]["time"]
    file.write_text(json.dumps(results))
    assert comparison.main(args) == whole


def test_equal_times_count_work():
    args = smmd_gan.Args(dataset="digits")  # 10 critic updates for each of the first 20, then 5
    resolved = smmd_gan.resolve(args)
    assert [training.work(smmd_gan, resolved, step) for step in (1, 21)] == [11, 6]
    assert training.seconds_of_work(smmd_gan, args, [9.0] * 5 + [22.0, 44.0]) == 3.0
    assert training.updates_within(20 * 11 + 10 * 6, 1.0, smmd_gan, args) == 30


def test_comparison_table():
    runs = {}
    for seed, frechet in ((1, 0.1), (2, 0.3), (3, 0.2)):
        metrics = {"pixel_frechet": frechet, "pixel_kid": 0.5, "pixel_mmd": 0.25}
        made = {"steps": 60, "diverged": False, "metrics": metrics, "protocol": {"floor pixel_frechet": 0.03}}
        runs[f"GMMN, seed {seed}"] = {"updates": made, "time": made}
        runs[f"GAN, seed {seed}"] = {"updates": made, "time": {"steps": 120, "diverged": True}}
    lines = comparison.table("digits", "time", {"runs": runs})
    assert lines[2] == "| GMMN | 0.2 (0.1 to 0.3) | 0.5 | 0.25 | 60 | 1 | 0 |"
    assert lines[3] == "| GAN | - | - | - | 120 | 2 | 3 |"
    assert lines[4] == "| *real samples* | 0.03 | - | - | | | |"
