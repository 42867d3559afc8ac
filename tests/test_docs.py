"""What README and docs say holds: their links lead somewhere, programs have the flags that are shown, one version everywhere.
That every command runs as it stands is for docs/check_commands.py to see, which needs port 8500 and a quarter of an hour."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

import config

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
README_WORDS = 1100
FENCED = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"`((?:python |\./server\.sh |client/\.venv/bin/python )[^`]*)`")


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", text_of(page)), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings_that_there_are(page: Path):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text_of(page))):
        if link.startswith(("http://", "https://")):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_the_readme_is_read_in_five_minutes():
    assert len(text_of(ROOT / "README.md").split()) <= README_WORDS


def test_one_version_everywhere():
    assert f"\nversion: {config.VERSION}\n" in text_of(ROOT / "CITATION.cff")
    newest = re.search(r"^## ([0-9.]+)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)
    assert newest
    assert newest[1] == config.VERSION
    said = subprocess.run([sys.executable, "config.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert said.stdout == f"BatchLab {config.VERSION}\n"


def shown_commands() -> list[str]:
    """In blocks and in sentences, those of this project's own programs; a server's is not run here, but read."""
    commands = []
    for page in PAGES:
        text = text_of(page)
        for block in re.findall(r"^```bash\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
            lines = block.replace("\\\n", " ").splitlines()
            commands += [re.sub(r"(^|\s)#.*", "", line).strip() for line in lines]
        commands += INLINE.findall(FENCED.sub("", text))
    return sorted({command for command in commands if program_of(command)})


def program_of(command: str) -> tuple[str, ...] | None:
    """How to ask the command's program for its help; None for other people's programs."""
    words = command.split()
    if words[:1] == ["./server.sh"]:
        return ("config.py",)
    if words[:1] not in (["python"], ["client/.venv/bin/python"]) or len(words) < 2:
        return None
    if words[1] == "-m" and words[2].split(".")[0] in ("benchmarks", "teaching", "simulator", "tests"):
        sub = words[3:4] if words[2] == "simulator" and words[3:4] and words[3].isalpha() else []
        return ("-m", words[2], *sub)
    return ("client/client.py",) if words[1] == "client/client.py" else None


@cache
def help_of(program: tuple[str, ...]) -> str:
    asked = subprocess.run([sys.executable, *program, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert asked.returncode == 0, f"{program}: {asked.stderr}"
    return asked.stdout


def test_programs_have_the_flags_that_the_pages_show():
    commands = shown_commands()
    assert len(commands) > 30
    for command in commands:
        words = shlex.split(command) if command.count("'") % 2 == 0 else command.split()
        program = program_of(command)
        assert program
        for flag in (word.split("=")[0] for word in words if re.fullmatch(r"--[a-z][a-z_-]*(=.*)?", word)):
            assert re.search(rf"(?<![\w-]){flag}(?![\w-])", help_of(program)), f"{command}: no {flag}"


@pytest.mark.thorough
def test_the_page_of_modes_is_what_the_policies_say():
    made = subprocess.run([sys.executable, "docs/make_modes.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr[-2000:]
