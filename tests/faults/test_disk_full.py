"""On a full disk: one line with path and bytes, what was there stays, and only logging may fail without an end."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest

from data.latents import LatentCache
from pipelines import cache_latents, sample, train_latte, train_vae
from pipelines.training.checkpoints import Checkpoints, export_folder, folder_bytes
from pipelines.training.log import read_metrics
from tests.faults.disk import fill, on_small_disk, program


def errors(folder: Path) -> list[str]:
    lines = folder.with_name(f"{folder.name}.log").read_text().splitlines()
    assert not [line for line in lines if line.startswith("Traceback")]
    return [line for line in lines if line.startswith("error:")]


@pytest.fixture
def settings(vae_settings):
    return [*vae_settings, "source.val_fraction=0", "save_every=2"]


def test_a_checkpoint_that_does_not_fit_ends_in_one_line_and_the_run_goes_on_when_there_is_space(
    settings, tmp_path
):
    train_vae.main([*settings, f"run_dir={tmp_path / 'whole'}", "steps=6"])
    size = folder_bytes(tmp_path / "whole/checkpoints/step_00000006")
    run = tmp_path / "run"

    def work():
        disk = tmp_path / "disk"
        command = [*settings, f"run_dir={disk / 'run'}"]
        code = [program(train_vae.main, *command, "steps=4")]
        filler = fill(disk, size // 2)
        code.append(program(train_vae.main, *command, "steps=6"))
        hidden = [p.name for p in (disk / "run/checkpoints").glob(".*")]
        kept = [Checkpoints(disk / "run").steps(), Checkpoints(disk / "run").latest()]
        filler.unlink()
        code.append(program(train_vae.main, *command, "steps=6"))
        shutil.copytree(disk / "run", run)
        return {"code": code, "hidden": hidden, "kept": kept}

    result = on_small_disk(tmp_path / "disk", 5 * size, work)
    assert result == {"code": [0, 2, 0], "hidden": [], "kept": [[2, 4], 4]}
    [line] = errors(tmp_path / "disk")
    assert "cannot write" in line
    assert "step_00000006" in line
    assert re.search(r"needs about [\d,]+ bytes, [\d,]+ are free", line)
    for name in ("vae", "vae_ema"):
        file = f"checkpoints/step_00000006/{name}/diffusion_pytorch_model.safetensors"
        assert (run / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    assert (run / "metrics.jsonl").read_bytes() == (tmp_path / "whole" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "space",
    [
        80_000,
        pytest.param(1_000, marks=pytest.mark.slow),
        pytest.param(30_000, marks=pytest.mark.slow),
        pytest.param(160_000, marks=pytest.mark.slow),
    ],
)
def test_wherever_in_a_first_checkpoint_the_disk_is_full_no_half_one_is_left(settings, tmp_path, space):
    def work():
        (tmp_path / "disk" / "run").mkdir()
        # config.yaml, env.json and the first event file come before
        fill(tmp_path / "disk", 40_000 + space)
        code = program(train_vae.main, *settings, f"run_dir={tmp_path / 'disk/run'}", "steps=2")
        return [code, [p.name for p in (tmp_path / "disk/run/checkpoints").iterdir()]]

    assert on_small_disk(tmp_path / "disk", 1_000_000, work) == [2, []]
    [line] = errors(tmp_path / "disk")
    assert re.search(r"cannot write .*step_00000002: .* needs more than [\d,]+ bytes", line)


def test_a_full_log_disk_costs_the_log_not_the_training_and_the_loss_is_counted(settings, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / ".prepared").write_text("")
    train_vae.main([*settings, f"run_dir={tmp_path / 'whole'}", "steps=6"])

    def work():
        fill(run / "tb", 0)
        (run / "metrics.jsonl").symlink_to("/dev/full")
        return program(train_vae.main, *settings, f"run_dir={run}", "steps=6")

    train_vae.main([*settings, f"run_dir={run}", "steps=1"])
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "tb")
    assert on_small_disk(run / "tb", 64 << 10, work) == 0
    text = (run / "tb.log").read_text()
    assert text.count("cannot write to") == 2  # once for each file
    assert "metrics.jsonl (" in text
    assert "records lost because they could not be written: 5 of metrics.jsonl, " in text
    weights = "checkpoints/step_00000006/vae/diffusion_pytorch_model.safetensors"
    assert (run / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()


def test_a_line_of_the_log_that_is_cut_off_is_taken_back(tmp_path):
    def work():
        from pipelines.training.log import MetricLog

        disk = tmp_path / "disk"
        log = MetricLog(disk, -1)
        log.scalars(1, {"loss": 0.5})
        filler = fill(disk, 0)
        for step in range(2, 400):
            log.scalars(step, {"loss": 0.5})
        filler.unlink()
        log.scalars(400, {"loss": 0.25})
        return [
            read_metrics(disk),
            (disk / "metrics.jsonl").read_text().count("\n"),
            log.lost["metrics.jsonl"],
        ]

    records, lines, lost = on_small_disk(tmp_path / "disk", 256 << 10, work)
    assert lines == len(records) == 400 - lost
    assert lost > 100
    assert records[-1] == {"step": 400, "loss": 0.25}


def test_an_export_that_does_not_fit_leaves_the_old_one(tmp_path):
    def work():
        disk = tmp_path / "disk"

        def write(folder, size):
            folder.mkdir()
            (folder / "weights").write_bytes(b"1" * size)

        export_folder(disk / "vae", lambda f: write(f, 20_000), {"step": 1})
        try:
            export_folder(disk / "vae", lambda f: write(f, 200_000), {"step": 2})
        except OSError as error:
            message = str(error)
        sizes = {p.name: p.stat().st_size for p in (disk / "vae").iterdir()}
        return [
            message,
            sizes["weights"],
            json.loads((disk / "vae/export.json").read_text()),
            os.listdir(disk),
        ]

    message, size, record, listing = on_small_disk(tmp_path / "disk", 128 << 10, work)
    assert "cannot write" in message
    assert "bytes" in message
    assert (size, record["step"], listing) == (20_000, 1, ["vae"])


def test_a_cache_that_does_not_fit_names_the_shard_and_goes_on_when_there_is_space(
    latte_settings, own_vae, tmp_path
):
    disk = tmp_path / "disk"
    common = [*latte_settings, f"vae.path={own_vae}", "cache.shard_size=2"]
    cache_latents.main([*common, f"cache.dir={tmp_path / 'whole'}"])

    def work():
        cache = disk / "cache"
        filler = fill(disk, 40_000)
        codes = [program(cache_latents.main, *common, f"cache.dir={cache}")]
        hidden = [p.name for p in cache.glob(".*")]
        filler.unlink()
        codes.append(program(cache_latents.main, *common, f"cache.dir={cache}"))
        codes.append(program(cache_latents.main, *common, f"cache.dir={cache}", "--verify"))
        return [codes, hidden, {p.name: p.read_bytes().hex() for p in cache.glob("*")}]

    codes, hidden, files = on_small_disk(disk, 1 << 20, work)
    assert codes == [2, 0, 0]
    assert hidden == []
    [line] = errors(disk)
    assert "cannot write" in line
    assert "bytes" in line
    assert files == {p.name: p.read_bytes().hex() for p in (tmp_path / "whole").iterdir()}
    assert len(LatentCache(tmp_path / "whole")) == 16


@pytest.mark.slow
def test_samples_that_do_not_fit_name_the_file_and_those_made_stay(latte_settings, own_vae, tmp_path):
    common = [*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"]
    cache_latents.main(common)
    train_latte.main([*common, f"run_dir={tmp_path / 'run'}", "steps=1"])
    disk = tmp_path / "disk"

    def work():
        settings = [
            f"pipeline={tmp_path / 'run/pipeline'}",
            f"out={disk / 'out'}",
            "num_steps=2",
            "num_videos=24",
        ]
        filler = fill(disk, 60_000)
        codes = [program(sample.main, *settings)]
        made = sorted(p.name for p in (disk / "out").glob("*"))
        filler.unlink()
        codes.append(program(sample.main, *settings))
        complete = json.loads((disk / "out/manifest.json").read_text())["complete"]
        return [codes, made, complete, len(list((disk / "out").glob("*.mkv")))]

    codes, made, complete, count = on_small_disk(disk, 4 << 20, work)
    assert codes == [2, 0]
    assert "manifest.json" in made
    assert 1 < len(made) < 25
    assert (complete, count) == (True, 24)
    [line] = errors(disk)
    assert "cannot write" in line
    assert ".mkv" in line
    assert "bytes" in line
