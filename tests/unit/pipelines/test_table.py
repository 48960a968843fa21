"""Tables as data: every shipped table in every preset."""

import re
from types import SimpleNamespace

import pytest
import yaml

from pipelines.plan import hours
from pipelines.plan.hours import BEGIN, END, page_table
from pipelines.results.records import config_of, wanted
from pipelines.results.tables import TABLES, load_table, names, paper_numbers, presets, read
from tests.unit.pipelines.tables import ROOT

EVERY = [(name, preset) for preset in presets() for name in names(preset)]


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_every_cell_has_a_command_of_its_row_or_a_reason_and_the_order_can_run(name, preset, places):
    table = load_table(name, preset, places)
    titles = {c.title for c in table.columns}
    for row in table.rows:
        for column in table.columns:
            has = bool(table.sources.get((row.name, column.source)))
            assert has or column.title in row.blank, f"{row.name}, {column.title}: a command or a reason"
        assert set(row.blank) <= titles
        order = [c.name for c in table.commands_of(row)]
        assert all(order.index(e) < order.index(c) for c in order for e in table.commands[c].after)
    for curve in table.curves:
        assert set(curve.rows) <= {r.name for r in table.rows}


@pytest.mark.parametrize("preset", presets())
def test_every_command_is_one_that_its_program_accepts(preset, places):
    for name in names(preset):
        for command in load_table(name, preset, places).commands.values():
            assert config_of(command.program, command.arguments)


@pytest.mark.parametrize(("name", "preset"), EVERY)
def test_a_command_is_plain_text_that_a_person_can_copy(name, preset):
    for row in read(name, preset)["rows"]:
        for text in row["commands"].values():
            assert text.startswith("python -m ")
            assert not re.search(r"[{}$@]", text.replace("block_out_channels", "")), text
            assert set(re.findall(r"\b[A-Z]{4,}\b", text)) <= {"DATA", "WEIGHTS", "RUNS", "SEED"}


def test_the_numbers_of_the_paper_stand_in_one_file_under_rows_and_columns_that_exist(places):
    for name, rows in paper_numbers().items():
        table = load_table(name, "paper", places)
        assert rows.keys() <= {r.name for r in table.rows}
        assert all(numbers.keys() <= {c.title for c in table.columns} for numbers in rows.values())
        assert [r.paper for r in table.rows if r.name in rows] == list(rows.values())


def test_the_readme_and_the_configs_print_the_papers_numbers_as_they_are():
    known = {n for rows in paper_numbers().values() for numbers in rows.values() for n in numbers.values()}
    readme = (ROOT / "README.md").read_text().split("| paper | ours |")[1].split("parameters of")[0]
    texts = [line.split("|")[2] for line in readme.splitlines() if line.startswith("| Table")]
    for folder in ("stage1", "stage2", "sample"):
        for file in (ROOT / "configs" / folder).glob("*.yaml"):
            texts += re.findall(r"# Expected \(paper, (?:[^)]*)\): (.*)", file.read_text())
    printed = [float(n) for text in texts for n in re.findall(r"\d+\.\d+", text)]
    assert len(printed) > 20
    assert not set(printed) - known


def test_tables_share_the_work_they_have_in_common(places):
    two, four = load_table("table2", "paper", places), load_table("table4", "paper", places)
    shared = two.commands.keys() & four.commands.keys()
    assert {"latte-odvae-ucf101", "samples-odvae-ucf101", "fvd-odvae-ucf101"} <= shared
    assert all(two.commands[n] == four.commands[n] for n in shared)


@pytest.mark.parametrize("preset", ["paper", "tiny"])
def test_the_row_with_tiling_caches_trains_and_samples_tiled_and_no_other_row_does(preset, places):
    table = load_table("table4", preset, places)
    keys = dict.fromkeys(("cache_latents", "train_latte", "reconstruct"), "vae.tiling_frames")
    keys["sample"] = "tiling_frames"
    for row in table.rows:
        found = {c.program.split(".")[-1]: c for c in table.commands_of(row)}
        asked = {name: wanted(found[name])[key] for name, key in keys.items() if name in found}
        assert set(asked.values()) == {33 if "with tiling" in row.name else 0}, row.name
        assert ("sample" in asked) == ("streaming" not in row.name)
        if preset == "tiny" and "cache_latents" in found:  # more than one group, else nothing is tried
            assert wanted(found["cache_latents"])["clip.num_frames"] > 33


def test_the_small_preset_judges_the_clips_that_its_training_holds_out(places):
    commands = load_table("table4", "small", places).commands.values()
    judged = [wanted(c) for c in commands if c.program == "pipelines.reconstruct"]
    trained = [wanted(c) for c in commands if c.name.startswith("odvae-v4-tail")]
    assert all(s["held_out"] for s in judged)
    sources = [{k: v for k, v in s.items() if k.startswith("source.")} for s in judged + trained]
    assert sources[0]["source.val_fraction"] > 0
    assert all(source == sources[0] for source in sources)


def test_the_figure_logs_the_lpips_that_its_curves_show(places):
    table = load_table("figure4", "paper", places)
    trained = [c for c in table.commands.values() if c.program == "pipelines.train_vae"]
    assert len(trained) == 6
    assert all(config_of(c.program, c.arguments).val_lpips for c in trained)


@pytest.mark.parametrize("preset", presets())
def test_no_two_tables_write_different_things_to_one_folder(preset, places):
    commands = {}
    for name in names(preset):
        for command in load_table(name, preset, places).commands.values():
            assert commands.setdefault(command.name, command) == command


def test_two_commands_for_one_folder_are_refused(places, tmp_path, monkeypatch):
    content = read("norm_scope")
    second = content["rows"][1]["commands"]
    second["stage one"] = second["stage one"].replace("osp_v1_2-v4", "odvae-v4")
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets" / "paper.yaml").write_text("about: x")
    (tmp_path / "norm_scope.yaml").write_text(yaml.safe_dump(content))
    monkeypatch.setattr("pipelines.results.tables.TABLES", tmp_path)
    with pytest.raises(ValueError, match="two different commands write to odvae-v4-tail-seed0"):
        load_table("norm_scope", "paper", places)


def test_the_paper_s_speeds_are_timed_with_its_arithmetic_and_table_3_caches_no_data_set_for_them(places):
    for name in ("table2", "table3"):
        table = load_table(name, "paper", places)
        speeds = [c for c in table.commands.values() if c.name.startswith("speed-")]
        assert {wanted(c)["precision"] for c in speeds} == {"tf32"}
        assert {config_of(c.program, c.arguments).steps for c in speeds} == {200}
        assert speeds
    caches = [wanted(c) for c in table.commands.values() if c.program == "pipelines.cache_latents"]
    assert {(c["cache.num_videos"], c["cache.crops"], c["cache.flips"]) for c in caches} == {(256, 1, False)}


def test_no_column_mixes_the_online_and_the_cached_training_speed(places):
    for name in ("table2", "table3"):
        table = load_table(name, "paper", places)
        for column in (c for c in table.columns if "TSpeed" in c.name):
            found = [table.commands[n] for r in table.rows for n in table.sources[r.name, column.source]]
            mode = "online" if "online" in column.name else "cached"
            assert {config_of(c.program, c.arguments).mode.value for c in found} == {mode}


def test_a_dataset_and_rows_choose_a_part_of_a_table(places):
    table = load_table("table2", "paper", places, ["OD-VAE"], "ucf101")
    assert [r.name for r in table.rows] == ["OD-VAE"]
    assert table.columns
    assert all(c.dataset == "ucf101" for c in table.columns)
    assert not [c for c in table.commands if "sky" in c]
    with pytest.raises(ValueError, match="OPS-VAE"):
        load_table("table2", "paper", places, ["nobody"])
    with pytest.raises(ValueError, match="figure4"):
        load_table("table9", "paper", places)
    with pytest.raises(ValueError, match="preset small"):
        load_table("table1", "small", places)


def test_a_seed_is_part_of_the_folders_that_depend_on_it_and_of_no_other(places):
    table = load_table("figure4", "small", places)
    cell = table.sources["variant 4, tail", "stage one"]
    assert cell == [f"odvae-v4-tail-seed{s}" for s in (0, 1, 2)]
    assert str(table.commands[cell[1]].folder) == f"{places.out}/runs/odvae-v4-tail-seed1"
    assert "seed=1" in table.commands[cell[1]].arguments
    speed = load_table("variant_speed", "small", places).sources["variant 2", "cspeed"]
    assert speed == ["cspeed-odvae-v2"]


def test_a_command_waits_for_those_whose_folders_it_reads_and_for_what_the_user_brings(places):
    commands = load_table("table2", "paper", places, ["SVD-VAE"], "ucf101").commands
    assert commands["latte-svd-ucf101"].after == ("cache-svd-ucf101",)
    assert commands["fvd-svd-ucf101"].after == ("samples-svd-ucf101",)
    needs = {what: str(path) for what, path in commands["cache-svd-ucf101"].needs}
    assert needs == {"weights: svd": f"{places.weights_dir}/svd", "data: ucf101": f"{places.data}/ucf101"}
    tiny = load_table("table2", "tiny", places).commands.values()
    assert not [c.name for c in tiny if c.needs]  # its stand-ins come first


def test_every_long_command_of_the_paper_has_modelled_hours():
    costs = yaml.safe_load((TABLES / "presets" / "hours.yaml").read_text())
    assert costs["odvae-full-seed0"]["hours"] > costs["odvae-v4-tail-seed0"]["hours"] > 24
    assert all(cost["hours"] > 0 and cost["disk_gb"] > 0 for cost in costs.values())
    page = (ROOT / "docs" / "reproduce.md").read_text()
    assert page.split(BEGIN)[1].split(END)[0] == page_table()


def test_hours_and_disk_of_a_command_are_its_units_times_what_one_takes(places, monkeypatch):
    unit = SimpleNamespace(resident={"weights": 3 * 10**9}, seconds=lambda card, tf32: 2.0)
    vae = SimpleNamespace(latent_channels=4, spatial_compression_ratio=8, latent_frames=lambda T: 21)
    monkeypatch.setattr(hours, "simulate", lambda program, config: unit)
    monkeypatch.setattr(hours.programs, "sample", lambda config, trained: unit)
    monkeypatch.setattr(hours, "imagined_vae", lambda settings: vae)
    commands, found = load_table("table2", "paper", places, ["SD-VAE"], "ucf101").commands, {}
    for name, command in commands.items():
        if cost := hours.cost_of(command, [commands[n] for n in command.after], {}):
            found[name.removesuffix("-sd2_1-ucf101")] = cost["hours"], cost["disk_gb"]
    clips = 13_320 * 4 * 2  # videos, crops, mirrored or not
    assert found == {
        "cache": pytest.approx((clips * 2 / 3600, clips * 2 * 4 * 21 * 32 * 32 * 2 / 1e9)),
        "latte": pytest.approx((200_000 * 2 / 3600, 3 * 3)),
        "samples": pytest.approx((2048 * 2 / 3600, 2048 * 81 * 256**2 * 3 / 2 / 1e9)),
    }
