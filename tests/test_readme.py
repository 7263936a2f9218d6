"""Quoted lines stand in the files, links lead somewhere, train.py knows the README's commands."""

import re
import shlex
import sys
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "classroom").glob("*.md"))]
COMMANDS = re.findall(r"\bpython (train\.py[^#`\n]*)", PAGES[0].read_text(encoding="utf-8"))


def quoted_lines(page):
    """(file that the heading links to, line of code) for each row of a table of lines of code."""
    for section in re.split("^## ", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        heading = section.splitlines()[0] if section else ""
        for table in re.findall(r"\| line of code \|\n.*\n((?:\|.*\n)+)", section):
            file = page.parent / re.search(r"\]\((\S+\.py)\)", heading)[1]
            yield from ((file, re.search(r"`([^`]+)` \|$", row)[1]) for row in table.splitlines())


def test_each_equation_stands_beside_a_line_that_exists():
    quotes = [quote for page in PAGES for quote in quoted_lines(page)]
    assert len(quotes) >= 20
    for file, line in quotes:
        lines = [code.strip() for code in file.read_text(encoding="utf-8").splitlines()]
        found = any(code == line or code.startswith(f"{line}  #") for code in lines)
        assert found, f"{file.name} has no line: {line}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_each_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


@pytest.mark.parametrize("command", sorted({c.strip() for c in COMMANDS}))
def test_each_training_command_is_understood(command, monkeypatch):
    monkeypatch.setattr(sys, "argv", shlex.split(command))
    args = train.parse_settings()
    assert train.model_configs(args, vocab_size=257)["calm"]["alpha"] == args.alpha
