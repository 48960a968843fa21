"""pipelines.table vaes: several VAEs on the same clips, in one table and one page."""

import csv
import json
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch

from data.encode import write_ffv1
from pipelines.results import vaes
from pipelines.table import main
from tests.parity.diffusers_small import OTHER, SMALL
from vae import build_vae, load_vae


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root, made = tmp_path_factory.mktemp("vaes"), {}
    for name in ("wan", "mochi", "vidtok, not causal"):
        cls, config, *_ = (SMALL | OTHER)[name]
        torch.manual_seed(1)
        made[name.split(",")[0]] = root / name.split(",")[0]
        getattr(diffusers, cls)(**config).save_pretrained(made[name.split(",")[0]])
    file = made["wan"] / "config.json"  # as Wan 2.2's, which has a key that its class lacks
    file.write_text(json.dumps(json.loads(file.read_text()) | {"clip_output": False}))
    build_vae(
        "sd2_1", block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4
    ).save_pretrained(root / "sd")
    return made | {"sd": root / "sd"}


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for n in range(2):
        frames = np.random.default_rng(n).integers(0, 256, (30, 64, 64, 3), dtype=np.uint8)
        write_ffv1(root / f"{n}.mkv", frames, 8)
    return root


def words(folders, videos, out, *more):
    judges = [
        "--lpips-weights",
        "random:0",
        "--i3d-weights",
        "random:0",
        "--index-dir",
        str(out.parent / "index"),
    ]
    return [
        "vaes",
        "--data",
        str(videos),
        "--out",
        str(out),
        "--size",
        "64",
        "--clips",
        "2",
        *judges,
        *more,
    ] + [f"{name}={folder}" for name, folder in folders.items()]


def test_the_table_of_four_and_the_same_again_from_its_records(
    folders, videos, tmp_path, monkeypatch, capsys
):
    record = tmp_path / "fvd.jsonl"
    record.write_text(json.dumps({"metric": "FVD", "value": 123.4, "protocol": {}}) + "\n")
    line = words(folders, videos, tmp_path / "out", "--latte", f"wan={record}")
    assert main(line) == 0
    rows = {row["VAE"]: row for row in csv.DictReader((tmp_path / "out" / "vaes.csv").open())}
    assert list(rows) == list(folders)
    assert {row["frames"] for row in rows.values()} == {
        "25",
        "25, padded to 32",
    }  # 1 + lcm(4, 6) k, and VidTok's 16k
    assert rows["vidtok"]["frames"] == "25, padded to 32"
    wan = load_vae(folders["wan"])
    assert float(rows["wan"]["numbers per pixel"]) == pytest.approx(7 * 4 * 8 * 8 / (25 * 64 * 64), abs=1e-4)
    assert rows["wan"]["parameters"] == f"{sum(p.numel() for p in wan.parameters()):,}"
    assert rows["wan"]["FVD of Latte"] == "123.40 (FVD)"
    assert rows["mochi"]["FVD of Latte"] == "not run"
    assert all("modelled" in row["peak MiB"] for row in rows.values())  # or why it is not
    assert "random-feature LPIPS (AlexNet, seed 0)" in rows["sd"]
    low, high = rows["sd"]["random-feature rFVD (I3D, seed 0)"].split("[")[1].rstrip("]").split(", ")
    assert float(low) < float(high)
    page = (tmp_path / "out" / "vaes.html").read_text()
    assert page.count("data:image/webp") == 2
    assert page.count("data:image/svg") == 2
    assert "From left to right: original, wan, mochi" in page
    monkeypatch.setattr(vaes, "measure", lambda *_: pytest.fail("measured twice"))
    text = (tmp_path / "out" / "vaes.md").read_text()
    assert main(line) == 0
    assert (tmp_path / "out" / "vaes.md").read_text() == text
    other = tmp_path / "other"
    for file in sorted(videos.iterdir()):  # the same names, other pictures
        write_ffv1(other / file.name, np.full((30, 64, 64, 3), 9, np.uint8), 8)
    with pytest.raises(pytest.fail.Exception, match="measured twice"):
        main(words(folders, other, tmp_path / "out"))


def test_scores_are_those_of_reconstruct(folders, videos, tmp_path):
    from pipelines import reconstruct

    main(words({"wan": folders["wan"]}, videos, tmp_path / "out"))
    row = next(csv.DictReader((tmp_path / "out" / "vaes.csv").open()))
    reconstruct.main(
        [
            f"vae.path={folders['wan']}",
            "vae.name=wan",
            f"source.root={videos}",
            "clip.num_frames=17",
            "clip.size=64",
            f"out={tmp_path / 'rec'}",
            f"source.index_dir={tmp_path / 'index'}",
            "lpips=false",
        ]
    )
    other = json.loads((tmp_path / "rec" / "summary.json").read_text())
    assert (row["PSNR, dB"], row["SSIM"]) == (f"{other['psnr']:.2f}", f"{other['ssim']:.4f}")


def test_a_judge_without_weights_is_named_and_left_out(folders, videos, tmp_path):
    line = words({"wan": folders["wan"]}, videos, tmp_path / "out")
    start = line.index("--lpips-weights")
    del line[start : start + 4]
    assert main(line) == 0
    text = (tmp_path / "out" / "vaes.md").read_text()
    assert "LPIPS not run: " in text
    assert "rFVD not run: " in text


@pytest.mark.parametrize(
    ("clips", "frames", "why"), [(1, 17, "1 clips: .* two"), (2, 5, "5 frames: I3D takes 9")]
)
def test_what_i3d_cannot_judge_is_a_remark(clips, frames, why):
    judges = vaes.open_judges("random:0", "random:0", 64, clips, frames, torch.device("cpu"))
    assert judges.i3d is None
    assert judges.network is not None
    (remark,) = judges.remarks
    assert re.match(f"rFVD not run: (clips of )?{why}", remark)


def test_fewer_videos_than_clips_are_judged_all_the_same(folders, videos, tmp_path):
    (tmp_path / "one").mkdir()
    shutil.copy(videos / "0.mkv", tmp_path / "one")
    assert main(words({"wan": folders["wan"]}, tmp_path / "one", tmp_path / "out")) == 0
    assert "rFVD not run: 1 clips" in (tmp_path / "out" / "vaes.md").read_text()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--size", "60"], "--size 60 for wan: .*multiples of 8"),
        (["wan=x"], "each name once"),
        (["original=x"], "not 'original'"),
        (["nonsense"], "written NAME=PATH"),
        (["--latte", "other=x"], "--latte other=x: the table has wan"),
        (["--clips", "0"], "--clips 0: at least one"),
    ],
)
def test_bad_words_are_refused_and_nothing_is_written(folders, videos, tmp_path, more, message):
    with pytest.raises(ValueError, match=message):
        main(words({"wan": folders["wan"]}, videos, tmp_path / "out", *more))
    assert not (tmp_path / "out").exists()


def test_a_vae_whose_weights_changed_is_measured_again(folders, videos, tmp_path):
    folder, seen = shutil.copytree(folders["wan"], tmp_path / "wan"), []
    for _ in range(2):
        main(words({"wan": folder}, videos, tmp_path / "out"))
        seen.append(next(csv.DictReader((tmp_path / "out" / "vaes.csv").open()))["PSNR, dB"])
        vae = load_vae(folder)
        vae.decoder.conv_out.bias.data.add_(0.5)
        vae.save_pretrained(folder)
    assert seen[0] != seen[1]


def test_the_table_fills_no_folder_of_the_users_own_and_none_of_videos(folders, videos, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    one = {"wan": folders["wan"]}
    with pytest.raises(ValueError, match="not empty and not made by table vaes"):
        main(words(one, videos, tmp_path / "mine"))
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    with pytest.raises(ValueError, match=r"--out=.* lies inside the data"):
        main(words(one, videos, videos / "out"))
    assert not (videos / "out").exists()
