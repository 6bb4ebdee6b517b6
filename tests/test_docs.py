"""What the documents point to is there: files, headings, and flags of the command line."""

import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [path for folder in (".", "docs", "kernels", "benchmarks/results") for path in (ROOT / folder).glob("*.md")]
COMMANDS = ("check", "train", "evaluate", "predict", "report", "params", "compare", "phantom", "demo")
PREPARE = tuple(("prepare", name) for name in ("mmc-amd", "derm7pt", "mrnet"))
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_link_leads_somewhere(document):
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        path, _, heading = target.partition("#")
        if "://" in target:
            continue
        found = (document.parent / path).resolve() if path else document
        assert found.exists(), target
        assert not heading or heading in headings(found), target


def headings(document: Path) -> set[str]:
    """The anchors that are made of a document's headings: lower case, no punctuation, spaces to hyphens."""
    lines = re.findall(r"^#+ (.+)$", document.read_text(), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", line.lower()).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("document", DOCUMENTS, ids=NAMES)
def test_every_flag_of_ei_exists(document):
    for words in commands(document.read_text()):
        command = tuple(words[1:3] if words[1] == "prepare" else words[1:2])
        flags = [word.partition("=")[0] for word in words[2:] if word.startswith("--") and word != "--"]
        missing = [flag for flag in flags if flag not in flags_of(command)]
        assert not missing, (command, missing)


@pytest.mark.parametrize("document", ["README.md", "docs/ei.md", "docs/ablations.md", "docs/baselines.md"])
def test_every_flag_that_is_named_alone_exists(document):
    anywhere = set().union(*(flags_of((command,)) for command in COMMANDS), *(flags_of(c) for c in PREPARE))
    named = re.findall(r"[`\s](--[a-z][\w-]*)", (ROOT / document).read_text())
    assert named
    assert not set(named) - anywhere - {"--nproc-per-node", "--work"}


def commands(text: str) -> list[list[str]]:
    """The words of each `ei COMMAND ...` in blocks of code and in backticks."""
    fenced = re.findall(r"^```bash\n(.*?)^```", text, flags=re.M | re.S)
    indented = re.findall(r"^    ei .*$(?:\n {8,}.*$)*", text, flags=re.M)
    inline = re.findall(r"`(ei [^`]+)`", text)
    lines = "\n".join([*fenced, *indented, *inline]).replace("\\\n", " ").splitlines()
    found = [shlex.split(line.partition(" #")[0]) for line in lines if re.search(r"(^|-m )ei [a-z]", line.strip())]
    found = [words[words.index("ei") :] for words in found]
    return [words for words in found if len(words) > 1 and words[1].isalpha()]


@cache
def flags_of(command: tuple[str, ...]) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-m", "ei", *command, "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(re.findall(r"--[a-z][\w-]*", done.stdout))
