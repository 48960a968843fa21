"""The published tables of docs/results/scenes are what their records give, and say nothing that these do not."""

import json
import shutil
from pathlib import Path

import pytest

from pipelines.table import main

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = ROOT / "docs" / "results" / "scenes"
NAMES = sorted(folder.name for folder in PUBLISHED.iterdir() if folder.name != "runs")


def test_six_tables_are_published():
    assert NAMES == ["designs", "generation", "initialisation", "longer", "tiling", "variants"]


@pytest.mark.parametrize("name", NAMES)
def test_a_table_is_made_again_from_its_records(name, tmp_path):
    shutil.copytree(PUBLISHED / "runs", tmp_path / "runs")
    out = ["--preset", "scenes", "--out", str(tmp_path), "--weights-dir", str(tmp_path / "none")]
    assert main([name, *out]) == 0
    for ending in ("md", "csv", "tex"):
        made, published = (folder / name / f"{name}.{ending}" for folder in (tmp_path, PUBLISHED))
        assert made.read_text() == published.read_text()
    assert "not run" not in (PUBLISHED / name / f"{name}.md").read_text()


def test_the_records_name_their_commit_and_no_place_of_a_machine():
    files = [file for file in (PUBLISHED / "runs").rglob("*") if file.is_file()]
    assert len(files) > 100
    for file in files:
        assert not any(place in file.read_text() for place in ("/tmp", "/root", "/home", "/work"))
    for file in (PUBLISHED / "runs").glob("*/summary.json"):
        assert len(json.loads(file.read_text())["versions"]["git"]) == 40
