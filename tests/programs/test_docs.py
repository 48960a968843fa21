"""What the documents name is there."""

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
ROOMS = ("data", "vae", "denoiser", "eval", "pipelines", "configs", "scripts", "tests", "examples", "docs")
FILE = re.compile(rf"(?<![\w./<-])((?:{'|'.join(ROOMS)})/[\w./-]*\w\.(?:py|ya?ml|json|sh|md))\b")


def links(text):
    """Targets of relative links, without their anchors."""
    found = re.findall(r"\]\(([^)\s]+)\)", text)
    return [t.split("#")[0] for t in found if "://" not in t and not t.startswith("#")]


def named(text):
    return set(FILE.findall(text)) | {
        f"{m.replace('.', '/')}.py" for m in re.findall(r"python -m ((?:pipelines|examples)\.\w+)", text)
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_link_and_every_file_that_a_page_names_exists(page):
    text = page.read_text()
    assert not [t for t in links(text) if not (page.parent / t).exists()]
    programs = [(n, ROOT / n.removesuffix(".py") / "__main__.py") for n in named(text)]  # a file or a package
    assert not [n for n, package in programs if not ((ROOT / n).exists() or package.exists())]


def test_the_names_in_a_text_are_found():
    text = "`vae/odvae.py` and [x](a.md#b) [y](https://c) `python -m pipelines.sample`, runs/vae/x.json"
    assert named(text) == {"vae/odvae.py", "pipelines/sample.py"}
    assert links(text) == ["a.md"]


def test_the_architecture_page_names_what_it_says_things_are_called():
    text = (ROOT / "docs" / "architecture.md").read_text()
    pairs = re.findall(r"`(\w+)` in `([\w/]+\.py)`", text)
    assert len(pairs) >= 4
    for name, file in pairs:
        assert re.search(
            rf"^(?:{name}\b.*=|(?:def|class) {name}\b)", (ROOT / file).read_text(), re.MULTILINE
        ), name


def test_the_architecture_page_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    listing = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    rooms = {line.split("/")[0] for line in listing.stdout.splitlines() if "/" in line}
    assert not [r for r in rooms if f"{r}/" not in text]
