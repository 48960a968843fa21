"""States, protocols, marks and formats of a table, on records written by hand."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.stats

from pipelines.results.records import Command, find
from pipelines.results.render import (
    cells_of,
    comma_separated,
    differences,
    latex,
    markdown,
    mean_and_spread,
    render,
    tex,
)
from pipelines.results.run_table import Desk, row_state
from pipelines.results.tables import load_table
from tests.unit.pipelines.tables import reconstruction, run_folder, score, table_of, write_summary


def judged(folder):
    """The command of fvd with its record in a folder."""
    return Command(
        "fvd", "eval.fvd", ("--real", "r", "--fake", "f", "--out", f"{folder}/scores.jsonl"), folder
    )


def test_a_row_says_which_weights_and_data_are_missing_and_where_from(desk, places):
    table = load_table("table2", "paper", places, ["SVD-VAE"], "ucf101")
    word, reason = row_state(desk, table, table.rows[0])
    assert word == "missing"
    assert "no weights: svd" in reason
    assert "no data: ucf101" in reason
    assert "no weights: i3d" in reason
    assert "no weights: c3d" in reason
    cell = cells_of(desk, table)["SVD-VAE", "UCF101 FVD"]
    assert cell.text == "no weights: svd"
    assert "stable-video-diffusion" in cell.sources[0].detail
    (places.runs.parent.parent / "weights" / "svd").mkdir(parents=True)
    (places.runs.parent.parent / "weights" / "svd" / "config.json").write_text("{}")
    assert "svd" not in row_state(Desk(places), table, table.rows[0])[1]


def test_a_finished_step_is_recognised_by_its_record(desk, places):
    step = reconstruction(places, "r")
    table = table_of({"a": [step]}, rows=["a"])
    assert row_state(desk, table, table.rows[0])[0] == "not run"
    write_summary(step, 31.25)
    desk = Desk(places)
    assert row_state(desk, table, table.rows[0]) == ("done", "")
    source = cells_of(desk, table)["a", "PSNR"].sources[0]
    assert (source.value, source.git, source.record) == (31.25, "abc", "../runs/r/summary.json")
    assert "clip.num_frames=25" in source.protocol


@pytest.mark.parametrize("setting", [{"clip.num_frames": 33}, {"vae.tiling_frames": 17}, {"stream": True}])
def test_a_record_of_another_protocol_is_no_number(setting, desk, places):
    step = reconstruction(places, "r")
    write_summary(step, 31.25, **setting)
    cell = cells_of(desk, table_of({"a": [step]}, rows=["a"]))["a", "PSNR"]
    assert cell.text == "other protocol"
    assert cell.mean is None
    assert next(iter(setting)) in cell.sources[0].detail


def test_a_record_of_the_same_protocol_from_elsewhere_is_a_number(desk, places):
    step = reconstruction(places, "r")
    write_summary(step, 30.0, **{"source.root": "/elsewhere", "source.index_dir": "/i", "vae.path": "/w"})
    assert cells_of(desk, table_of({"a": [step]}, rows=["a"]))["a", "PSNR"].mean == 30.0


@pytest.mark.parametrize(
    ("older", "same"), [({}, True), ({"tiling_frames": 0}, True), ({"tiling_frames": 17}, False)]
)
def test_a_record_from_before_a_setting_says_what_was_then(older, same, desk, places):
    step = reconstruction(places, "r")
    write_summary(step, 30.0)
    file = step.folder / "summary.json"
    content = json.loads(file.read_text())
    del content["settings"]["vae"]["tiling_frames"], content["settings"]["held_out"]
    content["settings"] |= older
    file.write_text(json.dumps(content))
    assert find(step).state == ("done" if same else "other")
    for asked in ("vae.tiling_frames=33", "held_out=true"):
        assert find(replace(step, arguments=(*step.arguments, asked))).state == "other"


def test_a_damaged_record_is_unfinished_work(desk, places):
    step = reconstruction(places, "r")
    step.folder.mkdir(parents=True)
    (step.folder / "summary.json").write_text('{"psnr": 3')
    assert find(step).state == "partly"


@pytest.mark.parametrize(("complete", "state"), [(True, "done"), (False, "partly")])
def test_a_cache_is_done_when_its_index_says_so_whatever_its_vae_does(complete, state, places):
    folder = places.runs / "cache"
    words = (f"cache.dir={folder}", "source.root=r", "vae.tiling_frames=33")
    folder.mkdir(parents=True)
    (folder / "index.json").write_text(json.dumps({"complete": complete}))
    assert find(Command("cache", "pipelines.cache_latents", words, folder)).state == state


def test_a_training_is_done_at_its_last_step_and_with_its_export(places):
    found = find(run_folder(places))
    assert (found.state, found.values["val/psnr"], found.git) == ("done", 24.0, "abc")
    assert find(run_folder(places, "early", steps=3)).note == "step 3 of 4"
    assert find(run_folder(places, "bare", export=False)).state == "partly"
    longer = find(run_folder(places, "longer", steps=9, asked=4))
    assert longer.state == "other"
    assert "steps is 9, asked 4" in longer.note
    other = run_folder(places, "changed")
    found = find(replace(other, arguments=(*other.arguments, "learning_rate=1")))
    assert found.state == "other"
    assert "learning_rate" in found.note
    assert not found.shared


def test_seeds_give_mean_and_spread_and_say_how_many_there_are(desk, places):
    steps = [run_folder(places, f"s{n}", seed=n) for n in range(3)]
    table = table_of({"a": steps}, rows=["a"], key="val/psnr")
    assert cells_of(desk, table)["a", "PSNR"].text == "25.00 ± 1.00 (n = 3)"
    (steps[2].folder / "vae" / "config.json").unlink()
    assert cells_of(Desk(places), table)["a", "PSNR"].text == "24.50 ± 0.71 (n = 2)"


def test_rows_are_compared_with_the_first_seed_by_seed(desk, places):
    """a spreads over 20 dB between seeds; b is 1 dB above it in each of them, c by anything."""
    gains = {"a": (0, 0, 0), "b": (1.0, 1.1, 0.9), "c": (5.0, -5.0, 1.0)}
    steps = {}
    for row, gain in gains.items():
        steps[row] = [reconstruction(places, f"{row}{n}") for n in range(3)]
        for n, step in enumerate(steps[row]):
            write_summary(step, 20.0 + 10 * n + gain[n])
    table = table_of(steps, rows="abc")
    b, c = differences(table, cells_of(desk, table)).to_dict("records")
    low, high = scipy.stats.t.interval(0.95, 2, loc=1.0, scale=0.1 / 3**0.5)
    assert (b["rows"], b["difference"], b["seeds"], b["result"]) == ("b against a", "+1.00", 3, "differs")
    assert b["95 % interval"] == f"{low:+.2f} to {high:+.2f}"
    assert c["result"] == "no difference shown"
    assert "| b against a | +1.00 |" in markdown(table, cells_of(desk, table), [])


def test_one_seed_is_not_compared(desk, places):
    steps = {row: [reconstruction(places, row)] for row in "ab"}
    for row, value in zip("ab", (20.0, 30.0), strict=True):
        write_summary(steps[row][0], value)
    table = table_of(steps)
    assert differences(table, cells_of(desk, table)).empty
    assert "Differences" not in markdown(table, cells_of(desk, table), [])


def test_curves_have_the_mean_and_the_spread_of_the_steps_that_all_runs_share():
    steps, mean, low, high = mean_and_spread([[(0, 1.0), (1, 2.0), (2, 9.0)], [(0, 3.0), (1, 2.0)]])
    assert steps.tolist() == [0, 1]
    assert mean.tolist() == [2.0, 2.0]
    assert (high - mean).tolist() == pytest.approx([2**0.5, 0])
    assert (mean - low).tolist() == pytest.approx([2**0.5, 0])


@pytest.mark.parametrize(
    ("better", "marks"), [("up", ["best", "second", ""]), ("down", ["", "second", "best"])]
)
def test_best_and_second_are_marked_in_ours_and_in_the_papers(better, marks, desk, places):
    steps = {}
    for row, value in zip("abc", (3.0, 2.0, 1.0), strict=True):
        steps[row] = [reconstruction(places, row)]
        write_summary(steps[row][0], value)
    paper = {"a": {"PSNR": 1.0}, "b": {"PSNR": 1.0}, "c": {"PSNR": 2.0}}
    cells = cells_of(desk, table_of(steps, "abc", better, paper))
    assert [cells[r, "PSNR"].mark for r in "abc"] == marks
    best = {"up": ["second", "second", "best"], "down": ["best", "best", "second"]}[better]
    assert [cells[r, "PSNR"].paper_mark for r in "abc"] == best


def test_a_score_of_random_weights_is_never_shown_as_the_score(desk, places):
    folder = places.runs / "fvd"
    folder.mkdir(parents=True)
    real = judged(folder)
    trial = replace(real, arguments=(*real.arguments, "--weights", "random:0"))
    names = ("random-feature FVD (I3D, seed 0)", "random-feature KVD (I3D, seed 0)")
    (folder / "scores.jsonl").write_text("".join(score(n, 5.0) + "\n" for n in names))
    table = table_of({"a": [real]}, rows=["a"], key="FVD", column="FVD")
    assert cells_of(desk, table)["a", "FVD"].text == "other protocol"
    table = table_of({"a": [trial]}, rows=["a"], key="FVD", column="FVD")
    cell = cells_of(Desk(places), table)["a", "FVD"]
    assert cell.mean == 5.0
    assert cell.label == "random-feature score"
    assert "random-feature score" in markdown(table, {("a", "FVD"): cell}, [])


def test_the_newest_score_of_the_protocol_asked_for_counts(places):
    folder = places.runs / "fvd"
    folder.mkdir(parents=True)
    step = judged(folder)
    lines = [score("FVD", 1.0), score("KVD", 2.0), score("FVD", 3.0, num_frames=81), score("FVD", 4.0)]
    (folder / "scores.jsonl").write_text("\n".join(lines) + "\n")
    found = find(step)
    assert found.state == "done"
    assert (found.values["FVD"], found.values["KVD"]) == (4.0, 2.0)
    (folder / "scores.jsonl").write_text(score("FVD", 3.0, num_frames=81))
    found = find(step)
    assert found.state == "other"
    assert found.shared
    assert "num_frames" in found.note


def test_a_score_at_a_rate_and_one_without_do_not_stand_for_each_other(places):
    folder = places.runs / "fvd"
    folder.mkdir(parents=True)
    plain = judged(folder)
    slow = replace(plain, arguments=(*plain.arguments, "--real-fps", "8"))
    before = [json.loads(score(metric, 1.0)) for metric in ("FVD", "KVD")]
    for row in before:
        del row["protocol"]["real_fps"]  # of before the option
    (folder / "scores.jsonl").write_text("\n".join(map(json.dumps, before)))
    assert (find(plain).state, find(slow).state) == ("done", "other")
    rows = [score(metric, 2.0, real_fps=8.0) for metric in ("FVD", "KVD")]
    (folder / "scores.jsonl").write_text("\n".join(rows))
    assert (find(plain).state, find(slow).state) == ("other", "done")


def test_latex_and_markdown_escape_what_they_would_read_as_commands(desk, places):
    assert tex(r"50% of a_b & {c} $ # ~ ^ \x ±") == (
        r"50\% of a\_b \& \{c\} \$ \# \textasciitilde{} \textasciicircum{} \textbackslash{}x $\pm$"
    )
    table = table_of({"a|<b>": [reconstruction(places, "r")]}, rows=["a|<b>"])
    text = markdown(table, cells_of(desk, table), [])
    assert r"a\|&lt;b>" in text
    assert "not run" in latex(table, cells_of(desk, table))


def test_the_csv_has_one_line_a_number_with_its_protocol(desk, places):
    steps = [run_folder(places, f"s{n}", seed=n) for n in range(2)]
    table = table_of({"a": steps, "b": [reconstruction(places, "r")]}, key="val/psnr")
    lines = list(csv.DictReader(io.StringIO(comma_separated(table, cells_of(desk, table)))))
    assert [(r["row"], r["value"], r["commit"]) for r in lines] == [
        ("a", "24.0", "abc"),
        ("a", "25.0", "abc"),
        ("b", "", ""),
    ]
    assert "clip.num_frames=9" in lines[0]["protocol"]
    assert lines[2]["reason"].startswith("not run")


def test_a_table_renders_without_a_single_run(desk, places):
    table = load_table("figure4", "paper", places)
    folder = render(desk, table)
    for ending in ("md", "html", "csv", "tex"):
        assert (folder / f"figure4.{ending}").stat().st_size > 500
    page = (folder / "figure4.html").read_text()
    assert page.count("<img") == len(table.curves)
    assert "no weights: sd2_1" in page
    assert f"{places.data}/stage1: put the videos of stage1 here" in page


def test_marks_leave_rows_out_and_equal_prints_share_them(desk, places):
    steps = {}
    for row, value in zip("abcd", (9.0, 3.001, 3.002, 2.0), strict=True):
        steps[row] = [reconstruction(places, row)]
        write_summary(steps[row][0], value)
    paper = {"a": {"PSNR": 9.0}, "b": {"PSNR": 8.0}, "c": {"PSNR": 7.0}}
    table = table_of(steps, "abcd", paper=paper)
    table.rows[0] = replace(table.rows[0], marked=False)
    cells = cells_of(desk, table)
    assert [cells[r, "PSNR"].mark for r in "abcd"] == ["", "best", "best", "second"]
    assert [cells[r, "PSNR"].paper_mark for r in "abc"] == ["", "best", "second"]


def test_a_random_feature_score_is_neither_best_nor_second(desk, places):
    steps, random = {}, "random-feature FVD (I3D, seed 0)"
    for row, metric, value in (("a", "FVD", 5.0), ("b", random, 1.0), ("c", "FVD", 7.0)):
        folder = places.runs / row
        folder.mkdir(parents=True)
        words = ("--weights", "random:0") if metric == random else ()
        step = judged(folder)
        steps[row] = [replace(step, name=row, arguments=(*step.arguments, *words))]
        lines = [score(name, value) for name in (metric, metric.replace("FVD", "KVD"))]
        (folder / "scores.jsonl").write_text("\n".join(lines))
    cells = cells_of(desk, table_of(steps, "abc", better="down", key="FVD", column="FVD"))
    assert [cells[r, "FVD"].mark for r in "abc"] == ["best", "", "second"]


def test_a_column_scales_what_the_record_has(desk, places):
    step = reconstruction(places, "r")
    write_summary(step, 2_500_000.0)
    table = table_of({"a": [step]}, rows=["a"])
    table.columns[0] = replace(table.columns[0], scale=1e-6)
    assert cells_of(desk, table)["a", "PSNR"].text == "2.50"


def test_a_table_does_not_fill_a_folder_of_the_users_own(desk, places):
    mine = Path(places.out) / "t" / "t.md"
    mine.parent.mkdir(parents=True)
    mine.write_text("my notes")
    table = table_of({"a": [reconstruction(places, "r")]}, rows=["a"])
    with pytest.raises(ValueError, match="not empty and not made by table"):
        render(desk, table)
    assert [p.name for p in mine.parent.iterdir()] == ["t.md"]
    assert mine.read_text() == "my notes"
