"""python -m pipelines.benchmark vae: a row for each variant, measured in a process of its own."""

import json

import pytest
import torch

from pipelines.benchmark import BenchmarkConfig, line, main, measure
from pipelines.training.config import load
from vae import ODVAE

SMALL = ["num_frames=5", "size=16", "block_out_channels=[32,32,32,32]", "repeats=1", "warmup=0"]


def test_encoding_and_decoding_are_measured_and_the_row_is_appended(capsys, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"earlier": 1}\n')
    main(["vae", *SMALL, "variants=[4]", f"out={tmp_path / 'rows.jsonl'}"])
    printed = capsys.readouterr().out
    assert printed.startswith("variant 4     1,336,167  encode ")
    assert printed.count("it/s") == 2
    earlier, row = (json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines())
    assert earlier == {"earlier": 1}
    assert row["params"] == 1_336_167
    assert row["encode"]["batches_per_s"] > 0
    assert (row["decode"]["frames"], row["decode"]["height"]) == (5, 16)
    assert row["host_peak_mib"] > 0
    assert row["versions"]


@pytest.mark.parametrize("preset", ["odvae", "osp_v1_2"])
def test_every_preset_and_variant_is_measured_in_half_precision_too(preset):
    config = load(BenchmarkConfig, None, [*SMALL, f"preset={preset}", "precision=bf16", "decode=false"])
    rows = [measure(config, variant) for variant in config.variants]
    assert all("decode" not in row and row["encode"]["dtype"] == "bfloat16" for row in rows)
    assert len({row["params"] for row in rows}) == 4


def test_a_row_that_does_not_fit_says_so_from_its_first_run_on(monkeypatch):
    def full(self, x):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(ODVAE, "encode", full)
    row = measure(load(BenchmarkConfig, None, [*SMALL, "batch=2", "precision=tf32"]), 4)
    assert row["encode"]["out_of_memory"] == "OOM at b=2"
    assert row["decode"]["batches_per_s"] > 0
    assert row["precision"] == "tf32"
    assert "encode    OOM at b=2  decode" in line(row)


@pytest.mark.parametrize("preset", ["odvae", pytest.param("osp_v1_2", marks=pytest.mark.slow)])
def test_what_is_compiled_is_a_step_however_long_the_clip_is(preset, monkeypatch):
    graphs, compile_ = [], torch.compile
    backend = lambda module, _: graphs.append(len(module.graph.nodes)) or module.forward  # noqa: E731
    monkeypatch.setattr(torch, "compile", lambda step: compile_(step, backend=backend))
    sizes = []
    for frames in (13, 21):
        torch.compiler.reset()
        config = [
            *SMALL,
            f"preset={preset}",
            f"num_frames={frames}",
            "layers_per_block=1",
            "compile=true",
            "decode=false",
        ]
        measure(load(BenchmarkConfig, None, config), 4)
        sizes.append(list(graphs))
        graphs.clear()
    assert sizes[0] == sizes[1] != []


def test_the_plan_is_the_paper_s_clip(capsys):
    main(["vae", "--dry-run"])
    text = capsys.readouterr().out
    assert "num_frames = 81" in text
    assert "size = 256" in text


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="say what to measure"):
        main([])
    for setting, message in (("repeats=0", "repeats=0"), ("num_frames=6", "T=6: ODVAE needs .*, e.g. 5")):
        with pytest.raises(ValueError, match=message):
            measure(load(BenchmarkConfig, None, [*SMALL, setting]), 4)


def test_no_row_is_added_to_a_file_of_the_users_own(tmp_path):
    (tmp_path / "notes.txt").write_text("my notes\n")
    with pytest.raises(ValueError, match="holds something else"):
        main(["vae", *SMALL, "variants=[4]", f"out={tmp_path / 'notes.txt'}"])
    assert (tmp_path / "notes.txt").read_text() == "my notes\n"
