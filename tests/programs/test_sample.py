import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from data.video import read_frames
from denoiser import Latte
from pipelines.sample import SampleConfig, as_trained, classes_of, main
from pipelines.video_pipeline import LatentVideoPipeline

ROOT = Path(__file__).parents[2]


@pytest.fixture
def pipeline(trained_vae, tmp_path):
    """A saved pipeline whose denoiser's output is not zero."""
    from vae import ODVAE

    vae = ODVAE.from_pretrained(trained_vae)
    vae.set_latent_statistics([0.0] * 4, [1.0] * 4)
    torch.manual_seed(0)
    latte = Latte(
        depth=2, hidden_size=32, num_heads=4, patch_size=1, num_frames=3, sample_size=2, num_classes=3
    )
    for parameter in latte.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    torch.nn.init.normal_(latte.y_embedder.embedding_table.weight, std=5.0)
    LatentVideoPipeline(vae=vae, transformer=latte, class_names=["a", "b", "c"]).save_pretrained(
        tmp_path / "pipeline"
    )
    return tmp_path / "pipeline"


def videos(folder):
    return {p.name: read_frames(p, range(9)) for p in sorted(folder.glob("*.mkv"))}


@pytest.fixture
def sample(pipeline, tmp_path):
    def go(name, *more):
        main([f"pipeline={pipeline}", f"out={tmp_path / name}", "num_steps=4", *more])
        return videos(tmp_path / name)

    return go


def close(a, b):
    return a.keys() == b.keys() and all(np.abs(a[k].astype(int) - b[k]).max() <= 1 for k in a)


@pytest.mark.parametrize(
    ("clip", "options"),
    [("fps: 8.0", " --real-fps 8"), ("interval: 3", " --real-interval 3"), ("fps: 0\n  interval: 1", "")],
)
def test_the_command_that_judges_cuts_real_clips_as_the_training_did(clip, options, tmp_path):
    (tmp_path / "config.yaml").write_text(f"clip:\n  {clip}\n")
    assert as_trained(tmp_path / "pipeline") == options


def test_a_video_does_not_depend_on_the_batch_size(sample):
    one, many = sample("one", "num_videos=5", "batch=1"), sample("many", "num_videos=5", "batch=4")
    assert close(one, many)
    assert not close(one, sample("seed", "num_videos=5", "seed=1"))


def test_the_same_command_again_makes_only_what_is_missing(sample, tmp_path):
    first = sample("run", "num_videos=3")
    kept = tmp_path / "run" / "000000.mkv"
    before = kept.stat().st_mtime_ns
    (tmp_path / "run" / "000001.mkv").unlink()
    (tmp_path / "run" / "000002.mkv").write_bytes(b"")
    again = sample("run", "num_videos=5")
    assert kept.stat().st_mtime_ns == before
    assert close({k: again[k] for k in first}, first)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["complete"]
    assert manifest["files"] == sorted(again)


def test_samples_of_other_settings_are_not_mixed_in(sample, tmp_path):
    sample("run", "num_videos=2")
    with pytest.raises(ValueError, match=r"holds other samples \(guidance_scale: 1.0 -> 3.0\)"):
        sample("run", "num_videos=2", "guidance_scale=3")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "holiday.mp4").write_bytes(b"mine")
    with pytest.raises(ValueError, match="not empty"):
        sample("full", "num_videos=2")
    assert (tmp_path / "full" / "holiday.mp4").read_bytes() == b"mine"


def test_labels_by_name_and_guidance_change_the_videos(sample):
    plain = sample("a", "num_videos=1", "labels=[a]")
    assert not close(plain, sample("b", "num_videos=1", "labels=[b]"))
    assert not close(plain, sample("guided", "num_videos=1", "labels=[a]", "guidance_scale=9"))
    with pytest.raises(ValueError, match="label 'z': the classes are a, b, c"):
        sample("z", "num_videos=1", "labels=[z]")


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "ddim_upstream"])
def test_every_sampler_gives_finite_videos(sample, sampler):
    assert len(sample(sampler, "num_videos=1", f"sampler={sampler}")) == 1


def test_ddpm_takes_250_steps_by_default(pipeline, tmp_path, capsys):
    main([f"pipeline={pipeline}", "--dry-run"])
    text = capsys.readouterr().out
    assert "num_steps = 250" in text
    assert "2048 videos" in text


def test_a_missing_pipeline_is_one_clear_line(tmp_path):
    with pytest.raises(ValueError, match="no model_index.json there; train one"):
        main([f"pipeline={tmp_path}", f"out={tmp_path / 'x'}"])
    assert not (tmp_path / "x").exists()


def test_pipeline_survives_saving_and_loading(pipeline):
    pipe = LatentVideoPipeline.from_pretrained(pipeline)
    again = LatentVideoPipeline.from_pretrained(pipeline)
    videos = [p(["b"], 3, seeds=[7], output_type="video").frames for p in (pipe, again)]
    assert torch.equal(*videos)
    assert videos[0].shape == (1, 3, 9, 16, 16)
    assert videos[0].abs().max() <= 1


@torch.no_grad()
def test_videos_are_decoded_as_a_stream_and_equal_the_whole_clip_to_the_bit(pipeline, monkeypatch):
    pipe = LatentVideoPipeline.from_pretrained(pipeline)
    z = torch.randn(2, 4, 3, 2, 2)
    want = torch.cat([pipe.vae.decode(one[None]).sample.clamp(-1, 1) for one in pipe.vae.denormalize(z)])
    monkeypatch.setattr(type(pipe.vae), "decode", None)  # only the stream is left
    assert torch.equal(pipe.decode_latents(z), want)


def test_samples_of_another_vae_are_not_mixed_in(sample, pipeline):
    sample("run", "num_videos=1")
    pipe = LatentVideoPipeline.from_pretrained(pipeline)
    pipe.vae.set_latent_statistics([0.0] * 4, [3.0] * 4)
    pipe.save_pretrained(pipeline)
    with pytest.raises(ValueError, match=r"holds other samples \(normalization"):
        sample("run", "num_videos=2")


def test_fewer_videos_do_not_shrink_a_finished_set(sample, tmp_path):
    sample("run", "num_videos=3")
    sample("run", "num_videos=1")
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["num_videos"] == 3
    assert manifest["complete"]


def test_folders_of_another_kind_are_refused(sample, pipeline, tmp_path):
    with pytest.raises(ValueError, match="is not that of a Latte"):
        sample("run", f"transformer={pipeline / 'vae'}")
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "manifest.json").write_text("[]")
    with pytest.raises(ValueError, match="no manifest of samples"):
        sample("odd", "num_videos=1")


def test_an_error_of_the_writer_ends_the_program_and_the_same_command_continues(
    sample, tmp_path, monkeypatch
):
    from pipelines import sample as program

    def full(path, *_):
        if path.name == "000001.mkv":
            raise OSError(f"{path}: no space left")
        write(path, *_)

    write = program.write_ffv1
    monkeypatch.setattr(program, "write_ffv1", full)
    with pytest.raises(OSError, match=r"000001.mkv: no space left"):
        sample("run", "num_videos=8", "batch=1")
    assert list(videos(tmp_path / "run")) == ["000000.mkv"]
    assert not json.loads((tmp_path / "run" / "manifest.json").read_text())["complete"]
    monkeypatch.setattr(program, "write_ffv1", write)
    assert len(sample("run", "num_videos=8", "batch=1")) == 8


def test_compiled_blocks_sample_the_same_videos_into_the_same_folder(sample, monkeypatch):
    compiled, compile_module = [], torch.nn.Module.compile

    def compile_it(module, **kw):
        compiled.append(type(module).__name__)
        compile_module(module, backend="aot_eager", **kw)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_it)
    torch.compiler.reset()
    plain = sample("run", "num_videos=2")
    assert not compiled
    assert close(plain, sample("other", "num_videos=2", "compile=true"))
    assert compiled == ["LatteBlock", "TemporalLatteBlock"]
    assert len(sample("run", "num_videos=3", "compile=true")) == 3  # not another set of samples
    torch.compiler.reset()


def test_a_run_says_how_long_it_waited(sample, caplog):
    with caplog.at_level("INFO"):
        sample("run", "num_videos=2")
    assert any("waiting" in line for line in caplog.messages)


def test_the_classes_take_turns_by_the_number_of_the_video(sample):
    turns = sample("turns", "num_videos=4")
    alone = {label: sample(label, "num_videos=4", f"labels=[{label}]") for label in "abc"}
    for name, label in zip(sorted(turns), "abca", strict=True):
        assert close({name: turns[name]}, {name: alone[label][name]})
        other = alone["c" if label == "a" else "a"]
        assert not close({name: turns[name]}, {name: other[name]})


def test_a_class_whose_name_is_a_number_is_meant_by_it(pipeline):
    pipe = LatentVideoPipeline.from_pretrained(pipeline)
    pipe.register_to_config(class_names=["1", "2", "7"])
    assert classes_of(SampleConfig(labels=["1", "7"]), pipe) == ["1", "7"]
    assert pipe.labels(["1", "7"], 2).tolist() == [0, 2]
    assert classes_of(SampleConfig(labels=["0"]), pipe) == [0]  # no name: an id
    assert classes_of(SampleConfig(), pipe) == [0, 1, 2]


def test_a_folder_from_when_a_number_was_an_id_is_not_continued(sample, pipeline, tmp_path):
    index = json.loads((pipeline / "model_index.json").read_text())
    (pipeline / "model_index.json").write_text(json.dumps(index | {"class_names": ["1", "2", "7"]}))
    for label, refused in (("1", True), ("0", False)):
        sample(label, "num_videos=1", f"labels=[{label}]")
        manifest = tmp_path / label / "manifest.json"
        content = json.loads(manifest.read_text())
        content["settings"].pop("labels_are_names", None)
        manifest.write_text(json.dumps(content))
        if refused:
            with pytest.raises(ValueError, match="labels_are_names: None -> True"):
                sample(label, "num_videos=2", f"labels=[{label}]")
        else:
            assert len(sample(label, "num_videos=2", f"labels=[{label}]")) == 2


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_make_what_is_missing_as_one_does(sample, pipeline, tmp_path):
    one, two = sample("one", "num_videos=6"), tmp_path / "two"
    shutil.copytree(tmp_path / "one", two)
    for number in (0, 2, 3, 5):  # as a kill leaves them
        (two / f"{number:06d}.mkv").unlink()
    before = (two / "000001.mkv").stat().st_mtime_ns
    command = [Path(sys.executable).parent / "torchrun", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "pipelines.sample", f"pipeline={pipeline}", f"out={two}", "num_steps=4", "num_videos=7"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = videos(two)
    assert len(found) == 7
    assert close({name: found[name] for name in one}, one)
    assert (two / "000001.mkv").stat().st_mtime_ns == before
    assert json.loads((two / "manifest.json").read_text())["complete"]


@pytest.mark.parametrize(
    "wrong", ["sampler=ddim num_steps=3", "labels=[z]", "num_steps=2000", "sampler=nosuch", "fps=0"]
)
def test_a_wrong_setting_is_refused_before_anything_is_written(sample, wrong, tmp_path):
    with pytest.raises(ValueError, match=r"."):
        sample("run", "num_videos=1", *wrong.split())
    assert not (tmp_path / "run").exists()


def test_samples_of_other_weights_are_not_mixed_in(sample, pipeline, tmp_path):
    first = sample("run", "num_videos=1")
    latte = Latte.from_pretrained(pipeline / "transformer")
    latte.final_layer.linear.bias.data.add_(1)
    latte.save_pretrained(tmp_path / "other")
    other = f"transformer={tmp_path / 'other'}"
    with pytest.raises(ValueError, match=r"holds other samples \(weights_sha256: "):
        sample("run", "num_videos=2", other)
    assert not close(sample("changed", "num_videos=1", other), first)
    pipe = LatentVideoPipeline.from_pretrained(pipeline)
    pipe.vae.decoder.conv_out.conv.bias.data.add_(1)
    pipe.save_pretrained(pipeline)
    with pytest.raises(ValueError, match=r"holds other samples \(vae_sha256: "):
        sample("run", "num_videos=2")


def test_a_preview_of_videos_that_do_not_fit_at_once(sample, monkeypatch, tmp_path):
    monkeypatch.setattr("data.video._AT_ONCE", 1)
    sample("run", "num_videos=2")
    assert json.loads((tmp_path / "run" / "manifest.json").read_text())["complete"]
