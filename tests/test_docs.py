"""Every `lightningdit` command in the documentation is parsed by the command line itself, so that none of them can rot."""

import functools
import inspect
import re
import shlex
from pathlib import Path

import pytest

from lightningdit import cli
from lightningdit import config as configuration
from lightningdit.config import DiTConfig

ROOT = Path(__file__).resolve().parent.parent
PAGES = ("README.md", "docs/evaluation.md", "docs/protocol.md")


def commands(page):
    """[arguments] of the commands in the shell blocks of a page, whoever starts them."""
    found = []
    for block in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), re.S):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "lightningdit" in words:
                found.append(words[words.index("lightningdit") + 1 :])
    return found


@pytest.fixture
def parse(monkeypatch):
    """parse(arguments) -> (function, keyword arguments) that the command line would call."""
    called = []

    def recorded(command):
        if isinstance(command, tuple):
            return command[0], {name: recorded(c) for name, c in command[1].items()}

        def call(*positional, **named):
            called.append((command.__name__, inspect.signature(command).bind(*positional, **named).arguments))
            return 0

        return functools.wraps(command)(call)

    monkeypatch.setattr(cli, "COMMANDS", {name: recorded(command) for name, command in cli.COMMANDS.items()})

    def run(arguments):
        assert cli.main(arguments) == 0
        return called.pop()

    return run


@pytest.mark.parametrize("page", PAGES)
def test_commands_parse(parse, page):
    found = commands(page)
    assert len(found) >= 4
    for arguments in found:
        parse(arguments)


def test_a_command_that_rotted_is_found(parse):
    for arguments in (["sample", "--checkpoint", "a", "--steps", "3"], ["sample", "--num", "many", "--checkpoint", "a"], ["sampel"]):
        with pytest.raises(SystemExit):
            parse(arguments)


def test_the_card_agrees_with_the_recipes(parse):
    card = (ROOT / "docs" / "protocol.md").read_text()
    drawn = [arguments for name, arguments in map(parse, commands("docs/protocol.md")) if name == "sample"]
    assert len(drawn) == 4 and all(arguments["num"] == 50_000 and (ROOT / arguments["config"]).is_file() for arguments in drawn)
    made = {Path(arguments["out"]).name for arguments in drawn}
    judged = [arguments for name, arguments in map(parse, commands("docs/protocol.md")) if name == "evaluate_samples"]
    assert len(judged) == 2 and {arguments["images"] for arguments in judged} <= made
    rows = dict(re.findall(r"^\| ([\w =]+?) \| (.*) \|$", card, re.M))
    for i, recipe in enumerate(("lightningdit_xl_64ep", "lightningdit_xl_800ep")):
        sample = configuration.load(DiTConfig, ROOT / "train" / "configs" / f"{recipe}.yaml").sample
        for row, value in {"time shift": sample.shift, "guidance scale": sample.guidance_scale, "guided channels": sample.guidance_channels,
                           "guided from t =": sample.guidance_interval[0]}.items():
            assert float(rows[row].split(" | ")[i]) == value, (row, recipe)
        assert rows["solver"].startswith(f"Euler, {sample.num_steps} intervals") and sample.method == "euler"
