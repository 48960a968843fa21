"""The latent cache: any damaged byte found and named, every clip there once, what failed tried again, many writers at once."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from data.demo import DemoVideos
from data.encode import write_mp4
from data.latents import LatentCache
from pipelines import cache_latents, train_latte
from pipelines.cache_latents import my_share
from pipelines.training import latents
from tests.faults.disk import program

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def cache(latte_settings, own_vae, tmp_path):
    """A cache of 16 clips in 3 shards, and the settings that made it."""
    settings = [*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / 'cache'}"]
    cache_latents.main(settings)
    return tmp_path / "cache", settings


def verify(settings, capsys):
    capsys.readouterr()
    code = program(cache_latents.main, *settings, "--verify")
    return code, capsys.readouterr().out


def test_verify_checks_every_shard_names_each_damaged_one_and_changes_nothing(cache, capsys):
    folder, settings = cache
    assert verify(settings, capsys) == (
        0,
        f"{folder}: 16 clips in 3 shards, 0 clips could not be read, 0 shards damaged\n",
    )
    for name in ("latents-00000.safetensors", "latents-00002.safetensors"):
        content = bytearray((folder / name).read_bytes())
        content[-1] ^= 1
        (folder / name).write_bytes(content)
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    code, text = verify(settings, capsys)
    assert code == 1
    first, second, total = text.splitlines()
    assert (
        "latents-00000.safetensors is damaged (sha256); delete latents-00000.safetensors and its .json"
        in first
    )
    assert "latents-00002.safetensors" in second
    assert total.endswith("2 shards damaged")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_the_way_out_that_a_damaged_shard_names_works(cache, capsys, tmp_path):
    folder, settings = cache
    good = {p.name: p.read_bytes() for p in folder.iterdir()}
    (folder / "latents-00001.safetensors").write_bytes(b"damaged")
    code, _ = program(train_latte.main, *settings, f"run_dir={tmp_path / 'run'}", "steps=3"), None
    assert code == 2
    assert "delete latents-00001.safetensors and its .json" in capsys.readouterr().err
    for name in ("latents-00001.safetensors", "latents-00001.json"):
        (folder / name).unlink()
    assert program(cache_latents.main, *settings) == 0
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == good


def test_a_shard_is_read_through_once_and_again_only_after_it_was_written_to(cache, monkeypatch, caplog):
    from data import latents

    folder, _ = cache
    read, original = [], latents.sha256_of
    monkeypatch.setattr(latents, "sha256_of", lambda path: read.append(path.name) or original(path))

    def rows():
        read.clear()
        rows = latents.LatentCache(folder)  # as each process of a loader has it
        return [rows[k]["mean"] for k in range(len(rows))]

    first = rows()
    shards = sorted(p.name for p in folder.glob("*.safetensors"))
    assert sorted(read) == shards
    assert all(torch.equal(a, b) for a, b in zip(first, rows(), strict=True))
    assert read == []
    assert list(latents.LatentCache(folder).verify()) == []
    assert sorted(read) == shards  # --verify believes no note
    shard = folder / shards[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=f"{shards[1]} is damaged"):
        rows()
    with pytest.raises(ValueError, match=f"{shards[1]} is damaged"):  # nor did that leave a note
        rows()


def test_a_clip_that_is_there_twice_or_not_at_all_is_found(cache, capsys):
    from safetensors.torch import load_file, save_file

    from data.core.files import sha256_of

    folder, settings = cache
    shard = folder / "latents-00001.safetensors"
    tensors = load_file(shard)
    tensors["draw"][2], tensors["video"][2] = tensors["draw"][3], tensors["video"][3]
    save_file(tensors, shard)
    sidecar = shard.with_suffix(".json")
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | {"sha256": sha256_of(shard)}))
    code, text = verify(settings, capsys)
    assert code == 1
    assert "latents-00001.safetensors: clips missing or double" in text


@pytest.fixture
def videos(tmp_path):
    scenes = DemoVideos(4, num_frames=12, size=32)
    for n in range(4):
        write_mp4(tmp_path / "videos" / f"{n}.mp4", scenes.frames(n, range(12)), 8)
    return tmp_path / "videos"


@pytest.fixture
def settings_of_videos(latte_settings, own_vae, videos, tmp_path):
    """The settings of a cache of four videos in two shards; its folder is to be added."""
    settings = [s for s in latte_settings if not s.startswith("source.")]
    settings += [f"source.root={videos}", f"source.index_dir={tmp_path / 'index'}", f"vae.path={own_vae}"]
    return [*settings, "cache.crops=1", "cache.shard_size=2", "source.scan_workers=1"]


@pytest.fixture
def the_last_video_vanishes(videos, tmp_path, monkeypatch):
    """A context in which it does so after each scan, to aside.mp4."""
    original = latents.cached_clips

    def vanishing(config):
        clips = original(config)
        (videos / "3.mp4").rename(tmp_path / "aside.mp4")
        return clips

    @contextlib.contextmanager
    def go():
        with monkeypatch.context() as patch:
            patch.setattr(latents, "cached_clips", vanishing)
            yield

    return go


def test_a_clip_that_failed_is_tried_again_by_the_next_run_and_only_its_shard_changes(
    settings_of_videos, the_last_video_vanishes, videos, tmp_path
):
    settings, whole, parts = settings_of_videos, tmp_path / "whole", tmp_path / "parts"
    cache_latents.main([*settings, f"cache.dir={whole}"])
    with the_last_video_vanishes():
        cache_latents.main([*settings, f"cache.dir={parts}", "source.max_failed_share=0.25"])
    index = json.loads((parts / "index.json").read_text())
    assert [f["entry"] for f in index["failed"]] == [3]
    assert len(LatentCache(parts)) == 3
    assert (
        program(cache_latents.main, *settings, f"cache.dir={parts}", "--verify") == 2
    )  # other videos: refused
    (tmp_path / "aside.mp4").rename(videos / "3.mp4")
    untouched = (parts / "latents-00000.safetensors").stat().st_mtime_ns
    cache_latents.main([*settings, f"cache.dir={parts}"])
    assert {p.name: p.read_bytes() for p in parts.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }
    assert (parts / "latents-00000.safetensors").stat().st_mtime_ns == untouched


def test_a_cache_whose_shard_is_newer_than_its_index_is_not_read(cache):
    folder, _ = cache
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps(index | {"rows": [5, 6, 4]}))
    with pytest.raises(
        ValueError, match="has 6 rows, index.json says 5; run the same cache_latents command again"
    ):
        LatentCache(folder)[0]


def test_shards_without_an_index_are_not_adopted(cache):
    folder, settings = cache
    (folder / "index.json").unlink()
    with pytest.raises(ValueError, match="has shards but no index.json"):
        cache_latents.main(settings)


def test_processes_share_the_shards_and_each_begins_elsewhere(monkeypatch):
    todo = list(range(3, 40))
    parts = [my_share(todo, rank, 3) for rank in range(3)]
    assert sorted(s for part in parts for s in part) == todo
    starts = set()
    for number in range(50):
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        starts.add(my_share(todo, 0, 1)[0])
    assert len(starts) > 20
    assert my_share([], 0, 1) == []


@pytest.mark.slow
def test_two_launches_at_once_write_one_cache_with_the_bytes_of_one_launch(cache, tmp_path):
    folder, settings = cache
    shutil.rmtree(tmp_path / "both", ignore_errors=True)
    command = [sys.executable, "-m", "pipelines.cache_latents", *settings, f"cache.dir={tmp_path / 'both'}"]
    more = ["cache.shard_size=6"]
    started = [
        subprocess.Popen([*command, *more], cwd=ROOT, stderr=subprocess.PIPE, text=True) for _ in range(3)
    ]
    for process in started:
        _, text = process.communicate(timeout=300)
        assert process.returncode == 0, text
    both = {p.name: p.read_bytes() for p in (tmp_path / "both").iterdir()}
    assert both == {p.name: p.read_bytes() for p in folder.iterdir()}
    assert all(torch.isfinite(LatentCache(tmp_path / "both")[k]["mean"]).all() for k in range(16))


def test_a_cache_that_lacks_too_many_clips_is_not_sealed(
    settings_of_videos, the_last_video_vanishes, videos, tmp_path, capsys
):
    settings = [*settings_of_videos, f"cache.dir={tmp_path / 'cache'}"]
    with the_last_video_vanishes():
        assert program(cache_latents.main, *settings) == 2
    said = capsys.readouterr().err
    assert "1 of 4 clips (25.0%) could not be read, first: 3.mp4: " in said
    assert "source.max_failed_share=0.5" in said
    index = tmp_path / "cache" / "index.json"
    assert not json.loads(index.read_text())["complete"]
    (tmp_path / "aside.mp4").rename(videos / "3.mp4")
    cache_latents.main(settings)
    assert len(LatentCache(tmp_path / "cache")) == 4
