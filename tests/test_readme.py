"""The README keeps its word: lines it quotes are in the files, its links lead somewhere, its commands are understood."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def quoted_lines():
    """(file, line of code) for each row of the tables that put an equation beside the line that is it."""
    for section in re.split(r"^### ", README, flags=re.MULTILINE)[1:]:
        file = re.search(r"\]\((\w+\.py)\)", section.splitlines()[0])
        table = re.search(r"\| the line that is it \|\n(.*\n)((?:\|.*\n)+)", section)
        if file and table:
            yield from ((file[1], re.search(r"`([^`]+)` \|$", row)[1]) for row in table[2].splitlines())


def test_every_equation_stands_beside_a_line_that_exists():
    lines = list(quoted_lines())
    assert len(lines) >= 20
    for file, line in lines:
        assert line in (ROOT / file).read_text(encoding="utf-8"), f"{file} has no line: {line}"


def test_every_link_leads_somewhere():
    headings = {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in re.findall(r"^#+ (.*)$", README, flags=re.MULTILINE)}
    for target in re.findall(r"\]\(([^)\s]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in headings, target
        elif "://" not in target:
            assert (ROOT / target).exists(), target


def test_the_lines_of_the_five_files_are_counted_right():
    files = re.findall(r"^\| \[`(\w+\.py)`\]", README, flags=re.MULTILINE)
    lines = sum(len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in files)
    assert len(files) == 5 and f"Five files, {lines // 1000} {lines % 1000:03} lines" in README


@pytest.mark.parametrize("command", sorted(set(re.findall(r"python (train\.py[^#`\n]*)", README))))
def test_every_training_command_is_understood(command, monkeypatch):
    if "--resume" not in command:  # which asks for a run
        monkeypatch.setattr(sys, "argv", [*shlex.split(command.strip(" .,:;)")), "--device", "cpu"])
        settings, _ = train.parse_settings()
        train.model_configs(settings, 257)
