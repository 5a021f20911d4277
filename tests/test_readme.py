"""Every command of the README is accepted by its program, and those that need no files are run."""

import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest
import tyro

from common import evaluation, run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PROGRAM = r"(?:python|torchrun .*?) (?:-m )?(\w+(?=\.py)|baselines\.\w+)"
COMMANDS = re.findall(rf"^ +{PROGRAM}(?:\.py)?([^`\n]*)$", README, re.MULTILINE)
QUICK = [(s, o) for s, o in COMMANDS if not re.search("resume|folder:|cifar10|mnist", o)]


def test_readme_names_every_script():
    """A file that stands beside them, such as a copy, need not be named."""
    rows = set(re.findall(r"`([\w/]+)\.py` \|", README))
    ours = {"gmmn", "gamn", "mmd_gan", "mmd_gan_repulsive", "smmd_gan", "gram_net"}
    assert rows == ours | {"baselines/gan", "baselines/wgan"}
    assert all((ROOT / f"{row}.py").is_file() for row in rows)
    assert len(COMMANDS) >= 13
    assert {"baselines.gan", "mmd_gan_repulsive"} <= {script for script, _ in COMMANDS}
    assert len(QUICK) >= 4


@pytest.mark.parametrize(("script", "options"), COMMANDS)
def test_command_parses(script, options, tmp_path, monkeypatch):
    args_class = import_module(script).Args
    monkeypatch.chdir(tmp_path)
    if "--resume" in options:  # of a run that there must be
        folder = run.make_folder(args_class(train_split="train"), script, "", 0)
        options = re.sub(r"runs/RUN|\$run", str(folder), options)
    run.parse(args_class, shlex.split(options))


def test_evaluation_commands_parse():
    commands = re.findall(r"^ +python -m common\.evaluation (.*)$", README, re.MULTILINE)
    assert len(commands) == 3
    for options in commands:
        tyro.cli(evaluation.Args, args=shlex.split(options))


@pytest.mark.parametrize(("script", "options"), QUICK)
def test_command_runs(script, options, tmp_path):
    """A few small steps of it."""
    module = import_module(script)
    small = ["--total-steps", "2", "--width", "16", "--batch-size", "16", "--eval-samples", "32"]
    args = run.parse(module.Args, [*shlex.split(options), *small, "--runs-dir", str(tmp_path)])
    assert module.train(args)
    assert next(tmp_path.glob("*/samples/0000002.png")).stat().st_size > 0


def test_pictures_are_there():
    for path in re.findall(r"!\[.*?\]\((.*?)\)", README):
        assert (ROOT / path).is_file()


ROWS = re.findall(r"^\| `(\w+)\.py` \| (\d+; .*?) \| (.*?) \| (.*?) \| (.*?) \|$", README, re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0])
def test_table_of_what_compares(row):
    """Sides, splits and batch norm are those of each script's table DEFAULTS."""
    script, *cells, batch_norm = row
    module = import_module(script)
    for dataset, cell in zip(("cifar10", "mnist", "celeba"), cells, strict=True):
        found = module.DEFAULTS["images"] | module.DEFAULTS.get(dataset, {})
        side, train, compared = cell.replace(" less 5,000", "").split("; ")
        assert (int(side), train, compared) == (
            found["image_size"],
            found["train_split"],
            found["eval_split"],
        )
    if script != "gmmn":
        assert batch_norm == {"batch": "the batch's", "running": "running"}[found["sample_bn"]]


def test_table_has_every_script():
    assert len(ROWS) == 6
