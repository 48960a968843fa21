"""The program that makes the tables, with every command it starts, at preset tiny on procedural videos."""

import csv
import json

import pytest

from pipelines.results.tables import names, read
from pipelines.table import main


def run(out, *words):
    return main([*words, "--preset", "tiny", "--out", str(out), "--data", str(out / "none")])


def values(out, table):
    return list(csv.DictReader((out / table / f"{table}.csv").open()))


def test_rows_of_table_1_are_measured_once_and_stand_beside_the_papers_numbers(tmp_path, capsys):
    rows = "VQGAN;OD-VAE, exact design, trained here"
    words = ["table1", "--dataset", "webvid", "--rows", rows, "--run"]
    assert run(tmp_path, *words) == 0
    found = values(tmp_path, "table1")
    assert len(found) == 2 * 8
    assert all(r["value"] and r["commit"] and r["protocol"] for r in found)
    assert {r["label"] for r in found if "LPIPS" in r["column"]} == {"random-feature LPIPS"}
    assert {r["label"] for r in found if "LPIPS" not in r["column"]} == {""}
    text = (tmp_path / "table1" / "table1.md").read_text()
    assert "(paper 26.26)" in text
    frames = {
        r["column"]: json.loads(r["protocol"].split("clip.num_frames=")[1].split(";")[0]) for r in found
    }
    assert frames["WebVid-10M 25f PSNR"] == 25
    assert frames["WebVid-10M 33f PSNR"] == 33
    journals = sorted((tmp_path / "steps").glob("*.json"))
    before = [j.read_text() for j in journals]
    capsys.readouterr()
    assert run(tmp_path, *words) == 0
    assert [j.read_text() for j in journals] == before
    assert capsys.readouterr().out.count("done") == 2


def test_dry_run_prints_the_commands_and_writes_nothing(tmp_path, capsys):
    assert run(tmp_path / "out", "table2", "--dataset", "ucf101", "--rows", "SVD-VAE", "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("python -m ") for line in lines)
    programs = [line.split()[2] for line in lines]
    assert programs[-1] == "pipelines.train_latte"
    assert not any(word in line for line in lines for word in ("RUNS", "DATA", "WEIGHTS"))
    assert (
        programs.index("pipelines.cache_latents")
        < programs.index("pipelines.sample")
        < programs.index("eval.fvd")
    )
    assert not (tmp_path / "out").exists()


def test_without_data_and_weights_every_row_of_the_papers_table_says_what_to_get(tmp_path, capsys):
    where = [
        "--data",
        str(tmp_path / "d"),
        "--weights-dir",
        str(tmp_path / "w"),
        "--out",
        str(tmp_path / "o"),
    ]
    assert main(["table1", *where]) == 0
    text = capsys.readouterr().out
    assert text.count("  missing  ") == 8
    assert f"to get: {tmp_path / 'd' / 'webvid'}" in text
    assert "sd-vae-ft-mse" in text
    assert "GPU hours" in text
    found = values(tmp_path / "o", "table1")
    assert found
    assert all(r["reason"].startswith(("no weights", "no data")) and not r["value"] for r in found)


@pytest.mark.slow
def test_every_row_of_every_table_and_the_figure_completes(tmp_path):
    assert run(tmp_path, "all", "--run") == 0
    for name in names():
        assert {r["row"] for r in values(tmp_path, name)} == {r["name"] for r in read(name)["rows"]}
        for cell in values(tmp_path, name):
            told = ("equal to", "not measured")  # TMem needs a GPU
            assert cell["value"] or cell["reason"].startswith(told), cell
            if "TMem" not in cell["column"] and not cell["value"]:
                assert name == "table4", cell
            if cell["column"].split()[-1] in ("FVD", "KVD", "IS") and cell["value"]:
                assert cell["label"] == "random-feature score"
        for ending in ("md", "html", "tex"):
            assert (tmp_path / name / f"{name}.{ending}").is_file()
