"""Tables as data: every shipped table in every preset."""

from importlib import import_module

import pytest

from pipelines.tables.plan import load_table
from pipelines.tables.protocol import wanted
from pipelines.tables.spec import fill, names, presets, read

EVERY = [(n, p) for n in names() for p in presets() if p in read(n).get("presets", presets())]


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_every_table_has_a_plan_in_each_of_its_presets(name, preset, places):
    table = load_table(name, preset, places)
    for row in table.rows:
        for column in table.columns:
            cells = table.cells.get((row.name, column.title), [])
            assert bool(cells) != (column.title in row.blank), (
                f"{row.name}, {column.title}: a cell or a reason"
            )
        assert set(row.paper) <= {c.title for c in table.columns}, f"{row.name}: a number without its column"
        assert set(row.blank) <= {c.title for c in table.columns}
        order = [s.name for s in table.steps_of(row)]
        assert all(order.index(e) < order.index(s) for s in order for e in table.steps[s].after)
    for curve in table.curves:
        assert set(curve.rows) <= {r.name for r in table.rows} or not curve.step


@pytest.mark.parametrize("preset", presets())
def test_every_command_is_one_that_its_program_accepts(preset, places):
    tables = [load_table(n, p, places) for n, p in EVERY if p == preset]
    for step in {s.name: s for t in tables for s in t.steps.values()}.values():
        if step.program.startswith("pipelines.") and step.program != "pipelines.stand_in":
            wanted(step)
        elif step.program:
            import_module(step.program).parse(list(step.arguments))


def test_tables_share_the_work_they_have_in_common(places):
    two, four = load_table("table2", "paper", places), load_table("table4", "paper", places)
    shared = two.steps.keys() & four.steps.keys()
    assert {"latte-odvae-ucf101", "samples-odvae-ucf101", "fvd-odvae-ucf101"} <= shared
    assert all(two.steps[n] == four.steps[n] for n in shared)


@pytest.mark.parametrize(("preset", "frames"), [("paper", 33), ("tiny", 9)])
def test_the_row_with_tiling_caches_trains_and_samples_tiled_and_no_other_row_does(preset, frames, places):
    table = load_table("table4", preset, places)
    keys = {
        "cache_latents": "vae.tiling_frames",
        "train_latte": "vae.tiling_frames",
        "sample": "tiling_frames",
    }
    keys |= {"reconstruct": "vae.tiling_frames"}
    for row in table.rows:
        steps = [s for s in table.steps_of(row) if s.program.split(".")[-1] in keys]
        asked = {s.program.split(".")[-1]: wanted(s)[keys[s.program.split(".")[-1]]] for s in steps}
        assert set(asked.values()) == {frames if "with tiling" in row.name else 0}, row.name
        assert ("sample" in asked) == ("streaming" not in row.name)


def test_the_small_preset_judges_the_clips_that_its_training_holds_out(places):
    steps = load_table("table4", "small", places).steps.values()
    judged = [wanted(s) for s in steps if s.program == "pipelines.reconstruct"]
    trained = [wanted(s) for s in steps if s.name.startswith("odvae-v4-tail")]
    assert all(s["held_out"] for s in judged)
    sources = [{k: v for k, v in s.items() if k.startswith("source.")} for s in judged + trained]
    assert sources[0]["source.val_fraction"] > 0
    assert all(source == sources[0] for source in sources)


def test_the_figure_logs_the_lpips_that_its_curves_show(places):
    table = load_table("figure4", "paper", places)
    trained = [s for s in table.steps.values() if s.name.startswith("odvae-v")]
    assert len(trained) == 6
    assert all("val_lpips=true" in s.arguments and "alexnet" in s.judges for s in trained)


@pytest.mark.parametrize("preset", presets())
def test_no_two_tables_write_different_things_to_one_folder(preset, places):
    steps = {}
    for name in (n for n, p in EVERY if p == preset):
        for step in load_table(name, preset, places).steps.values():
            assert steps.setdefault(step.name, step) == step


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_what_runs_on_several_processes_can_share_its_batch_among_eight(name, preset, places):
    steps = load_table(name, preset, places).steps.values()
    batches = {s.name: wanted(s)["global_batch"] for s in steps if s.parallel and "train" in s.program}
    if preset == "paper":
        assert {k: b for k, b in batches.items() if b % 8} == {}
    assert not [s.name for s in steps if s.parallel and s.name.startswith("speed-")]


def test_the_paper_s_speeds_are_timed_with_its_arithmetic_and_table_3_caches_no_data_set_for_them(places):
    for name in ("table2", "table3"):
        table = load_table(name, "paper", places)
        speeds = [s for s in table.steps.values() if s.name.startswith("speed-")]
        assert {wanted(s)["precision"] for s in speeds} == {"tf32"}
        assert speeds
    caches = [wanted(s) for s in table.steps.values() if s.program == "pipelines.cache_latents"]
    assert {(c["cache.num_videos"], c["cache.crops"], c["cache.flips"]) for c in caches} == {(256, 1, False)}
    assert sum(float(s.cost.get("hours", 0)) for s in table.steps.values()) < 3


def test_no_column_mixes_the_online_and_the_cached_training_speed(places):
    for name in ("table2", "table3"):
        table = load_table(name, "paper", places)
        for column in (c for c in table.columns if "TSpeed" in c.name):
            modes = {
                a
                for r in table.rows
                for n in table.cells[r.name, column.title]
                for a in table.steps[n].arguments
            }
            mode, other = ("online", "cached") if "online" in column.name else ("cached", "online")
            assert f"mode={mode}" in modes
            assert f"mode={other}" not in modes


def test_a_dataset_and_rows_choose_a_part_of_a_table(places):
    table = load_table("table2", "paper", places, ["OD-VAE"], "ucf101")
    assert [r.name for r in table.rows] == ["OD-VAE"]
    assert table.columns
    assert all(c.values["dataset"] == "ucf101" for c in table.columns)
    with pytest.raises(ValueError, match="OPS-VAE"):
        load_table("table2", "paper", places, ["nobody"])
    with pytest.raises(ValueError, match="figure4"):
        load_table("table9", "paper", places)
    with pytest.raises(ValueError, match="preset small"):
        load_table("table1", "small", places)


def test_a_seed_is_part_of_the_folders_that_depend_on_it_and_of_no_other(places):
    table = load_table("figure4", "small", places)
    cell = table.cells["variant 4, tail", "held-out PSNR"]
    assert cell == [f"odvae-v4-tail-seed{s}" for s in (0, 1, 2)]
    assert str(table.steps[cell[1]].folder) == f"{places.out}/runs/odvae-v4-tail-seed1"
    assert "seed=1" in table.steps[cell[1]].arguments
    speed = load_table("variant_speed", "small", places).cells["variant 2", "CSpeed, it/s"]
    assert speed == ["cspeed-odvae-v2"]


def test_a_placeholder_without_a_value_is_an_error_that_names_it():
    assert fill("x-{a}", {"a": 1}) == "x-1"
    with pytest.raises(ValueError, match="{b}"):
        fill("x-{b}", {"a": 1})
