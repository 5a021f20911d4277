"""Every command of the README must at least be one that its script accepts."""

import re
from importlib import import_module
from pathlib import Path

import pytest

from common import run

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"python (\w+)\.py([^`\n]*)$", README, re.MULTILINE)


def test_readme_names_every_script():
    assert set(re.findall(r"`(\w+)\.py` \|", README)) == {path.stem for path in ROOT.glob("*.py")}
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize(("script", "options"), COMMANDS)
def test_command_parses(script, options, tmp_path, monkeypatch):
    args_class = import_module(script).Args
    monkeypatch.chdir(tmp_path)
    if "--resume" in options:  # of a run that there must be
        folder = run.make_folder(args_class(), script, 0)
        options = options.replace("runs/RUN", str(folder))
    run.parse(args_class, options.split())
