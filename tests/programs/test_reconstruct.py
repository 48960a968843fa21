import json
from dataclasses import replace

import numpy as np
import pytest

from data.encode import write_ffv1
from data.video import read_frames
from pipelines import reconstruct, table
from vae import load_vae


@pytest.fixture
def videos(tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for n, frames in enumerate((9, 14, 21)):
        ramp = (
            np.linspace(0, 200, 16 * 16 * 3).reshape(16, 16, 3) + np.arange(frames)[:, None, None, None] * 2
        )
        write_ffv1(folder / f"{n}.mkv", (ramp + rng.integers(0, 20, ramp.shape)).astype(np.uint8), 8)
    return folder


@pytest.fixture
def measure(own_vae, videos, tmp_path):
    def go(name, *more):
        settings = [f"vae.path={own_vae}", f"source.root={videos}", f"source.index_dir={tmp_path / 'index'}"]
        settings += [f"out={tmp_path / name}", "lpips=false", "clip.num_frames=9", "clip.size=16", *more]
        assert reconstruct.main(settings) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "videos.jsonl").read_text().splitlines()]
        return rows, json.loads((tmp_path / name / "summary.json").read_text())

    return go


def test_records_and_summary_agree_with_the_videos_themselves(
    measure, own_vae, videos, capsys, caplog, tmp_path
):
    import torch

    from data.clip import to_float, to_uint8
    from eval.fidelity import psnr

    caplog.set_level("INFO")
    rows, summary = measure("clips", "clip.position=start")
    out = tmp_path / "clips"
    said = f"python -m pipelines.export {own_vae} --out share/odvae --records {out}/summary.json"
    assert caplog.messages[-1].startswith("finished: 3 videos\n")
    assert said in caplog.messages[-1]
    assert [r["video"] for r in rows] == ["0.mkv", "1.mkv", "2.mkv"]
    vae, original = load_vae(own_vae), read_frames(videos / "1.mkv", range(9))
    with torch.inference_mode():
        decoded = to_uint8(vae.decode(vae.encode(to_float(original)[None]).latent_dist.mode()).sample)[0]
    assert rows[1]["psnr"] == pytest.approx(psnr(original, decoded), abs=1e-9)
    assert summary["psnr"] == pytest.approx(np.mean([r["psnr"] for r in rows]))
    assert "lpips" not in summary
    assert "not run" in capsys.readouterr().out


def test_streaming_measures_whole_videos_as_one_clip_does(measure):
    streamed, _ = measure("stream", "--stream")
    assert [r["frames"] for r in streamed] == [9, 13, 21]  # the largest 4k + 1
    for n, frames in ((0, 9), (2, 21)):
        whole, _ = measure(f"whole{frames}", "--num-frames", str(frames), "clip.position=start")
        same = next(r for r in whole if r["video"] == f"{n}.mkv")
        assert streamed[n]["psnr"] == pytest.approx(same["psnr"], abs=1e-9)


def test_tiling_is_another_result_and_streaming_refuses_it(measure):
    plain, _ = measure("plain", "clip.num_frames=21", "clip.position=start")
    tiled, _ = measure("tiled", "clip.num_frames=21", "clip.position=start", "vae.tiling_frames=9")
    assert plain[0]["psnr"] != tiled[0]["psnr"]
    with pytest.raises(ValueError, match="needs no vae.tiling_frames"):
        measure("both", "stream=true", "vae.tiling_frames=9")


def test_only_the_clips_that_training_holds_out_are_judged_when_asked(measure, videos, tmp_path):
    from data.clip import ClipSpec
    from pipelines.training.open import open_clips
    from pipelines.training.settings import SourceConfig

    shared = ["source.val_fraction=0.4"]
    source = SourceConfig(root=str(videos), val_fraction=0.4, index_dir=str(tmp_path / "index"))
    held_out = open_clips(source, ClipSpec(num_frames=9, size=16), 0, held_out=True)
    judged, summary = measure("held_out", "held_out=true", *shared)
    seen, _ = measure("seen", *shared)
    assert [r["video"] for r in judged] == [held_out.name(n) for n in range(len(held_out))]
    assert {r["video"] for r in judged + seen} == {"0.mkv", "1.mkv", "2.mkv"}
    assert len(judged) + len(seen) == 3
    assert summary["settings"]["held_out"]
    with pytest.raises(ValueError, match="val_fraction=0: no videos are held out"):
        measure("none", "held_out=true")


def test_frames_too_small_for_lpips_are_refused_by_size_before_a_video_is_read(measure, tmp_path):
    words = ["lpips=true", "lpips_weights=random:0"]
    with pytest.raises(ValueError, match="16x16: LPIPS's AlexNet needs at least 31 x 31 pixels"):
        measure("small", *words)
    assert not (tmp_path / "small").exists()
    assert not (tmp_path / "index").exists()
    assert measure("large", *words, "clip.size=32")[1]["random-feature lpips (AlexNet, seed 0)"] > 0


def test_rfvd_is_the_fvd_of_the_same_clips_before_and_after(measure, own_vae, videos, capsys):
    import torch

    from data.clip import to_float, to_uint8
    from eval.features import extract_features, i3d_extractor
    from eval.measures import frechet_distance

    words = ("clip.position=start", "rfvd=true", "i3d_weights=random:0")
    summary = measure("judged", *words)[1]
    vae, clips = load_vae(own_vae), [read_frames(videos / f"{n}.mkv", range(9)) for n in range(3)]
    with torch.inference_mode():
        decoded = [vae.decode(vae.encode(to_float(c)[None]).latent_dist.mode()).sample for c in clips]
    i3d = i3d_extractor("random:0")
    sides = [extract_features(side, i3d) for side in (clips, [to_uint8(d)[0] for d in decoded])]
    name = i3d.provenance.metric_name("rFVD")
    assert summary[name] == pytest.approx(frechet_distance(*sides), rel=1e-4)
    assert "random" in name
    assert f"{name}: {summary[name]:.1f}, 95 % [" in capsys.readouterr().out
    with pytest.raises(ValueError, match="num_frames=5: I3D takes 9 frames or more"):
        measure("short", *words, "clip.num_frames=5")
    with pytest.raises(ValueError, match="FVD needs 2 clips or more, here is 1"):
        measure("one", *words, "num_videos=1")


def test_side_by_side_videos_are_written(measure, tmp_path):
    measure("run", "pictures=1")
    assert [p.name for p in (tmp_path / "run").glob("*.mp4")] == ["00000.mp4"]
    assert read_frames(tmp_path / "run" / "00000.mp4", [0]).shape == (1, 16, 48, 3)


def test_the_list_of_vaes_has_the_paper_s_parameter_counts_and_the_autoencoder_s(capsys):
    table.main(["--list-vaes"])
    text = capsys.readouterr().out
    rows = {line.split()[0]: line.split() for line in text.splitlines()[1:]}
    assert rows["tats"][2:4] == ["23,652,227", "52,192,773"]  # the paper counts TATS's training losses too
    assert all(row[2] == row[3] for name, row in rows.items() if name != "tats")
    for count in (
        "239,189,991",
        "83,653,863",
        "97,742,847",
        "182,446,475",
        "393,341,007",
        "68,995,971",
        "52,192,773",
    ):
        assert count in text


def test_only_what_changes_no_setting_of_the_process_is_judged_beside_it_and_workers_change_no_record(
    measure, monkeypatch
):
    """The networks that judge turn TF32 off for the whole process; the VAE would be computed with it or without by chance."""
    import threading

    from eval import fidelity

    seen = {}

    def noted(metric):
        def call(*args, **kwargs):
            seen.setdefault(metric.name, set()).add(threading.current_thread() is threading.main_thread())
            return metric.measure(*args, **kwargs)

        return replace(metric, measure=call)

    monkeypatch.setattr(fidelity, "METRICS", tuple(map(noted, fidelity.METRICS)))
    judged = ["clip.size=32", "lpips=true", "lpips_weights=random:0"]
    ahead, _ = measure("ahead", *judged, "workers=2")
    assert seen == {"PSNR": {False}, "SSIM": {False}, "LPIPS": {True}}
    assert ahead == measure("in_turn", *judged, "workers=0")[0]


def test_another_measurement_is_not_overwritten(measure, own_vae, tmp_path):
    rows, _ = measure("out")
    assert measure("out", "pictures=1", "workers=0")[0] == rows  # the same again, as told before
    measure("out", "source.reader=decord", "source.max_failed_share=0.5")  # change no number
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    del summary["settings"]["held_out"], summary["settings"]["rfvd"]  # as an older one
    (tmp_path / "out" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ValueError, match=r"held_out: False -> True"):
        measure("out", "held_out=true", "source.val_fraction=0.3")
    for other in ("clip.size=24", "num_videos=2", "clip.num_frames=5"):
        with pytest.raises(ValueError, match=r"out=.* holds another measurement \(.*choose another out="):
            measure("out", other)
    vae = load_vae("odvae", own_vae)
    vae.decoder.conv_out.conv.bias.data.add_(1)
    vae.save_pretrained(tmp_path / "trained further")
    with pytest.raises(ValueError, match="holds another measurement .weights: "):
        measure("out", f"vae.path={tmp_path / 'trained further'}")
    assert [json.loads(line) for line in (tmp_path / "out" / "videos.jsonl").read_text().splitlines()] == rows


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("stream=true", "clip.fps=4"), "stream=true takes every frame"),
        (("stream=true", "clip.interval=2"), "stream=true takes every frame"),
        (("num_videos=-1",), "num_videos"),
    ],
)
def test_settings_that_would_be_ignored_are_refused(measure, more, message):
    with pytest.raises(ValueError, match=message):
        measure("out", *more)
