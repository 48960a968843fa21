"""Exactly N clips of a folder: seeded, screened for damage, different from each other, counted."""

import json

import numpy as np
import pytest

from data.encode import write_ffv1
from eval.extraction import RunOptions
from eval.options import selection_of
from eval.protocol import Protocol
from eval.selection import Selection, list_folder


def frames(seed: int, T=12, H=16, W=16) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (T, H, W, 3), dtype=np.uint8)


@pytest.fixture
def folder(tmp_path):
    for n in range(7):
        np.save(tmp_path / f"{n}.npy", frames(n, T=12 + n))
    return tmp_path


def names(clips) -> list[str]:
    return [clip.video.name for clip in clips]


def test_the_choice_is_a_function_of_the_seed_and_the_beginning_of_a_longer_one(folder):
    seven = Selection(folder, 9, seed=1).take(7)
    assert seven == Selection(folder, 9, seed=1).take(7)
    assert seven[:3] == Selection(folder, 9, seed=1).take(3)
    assert names(seven) != names(Selection(folder, 9, seed=2).take(7))
    assert sorted(names(seven)) == [f"{n}.npy" for n in range(7)]


def test_a_clip_is_exactly_the_frames_of_the_protocol(folder):
    for clip in Selection(folder, 9, interval=1, position="random").take(7):
        steps = np.diff(clip.indices)
        assert (len(clip.indices), set(steps.tolist())) == (9, {1})
        assert 0 <= clip.indices[0] <= clip.indices[-1] < clip.total
        assert clip.source == (16, 16)
    starts = [clip.indices[0] for clip in Selection(folder, 9, position="center").take(7)]
    totals = [clip.total for clip in Selection(folder, 9, position="center").take(7)]
    assert starts == [(total - 9) // 2 for total in totals]


def test_fewer_videos_than_asked_is_an_error_with_two_ways_out(folder):
    with pytest.raises(ValueError, match=r"7 clips, 20 needed.*--num-videos 7 or --clips-per-video 3"):
        Selection(folder, 9).take(20)
    assert len(Selection(folder, 9, clips_per_video=3).take(20)) == 20


def test_a_video_never_gives_the_same_clip_twice(folder):
    clips = Selection(folder, 9, clips_per_video=100).take(49)  # 4 + 5 + ... + 10 windows
    assert len({(clip.video.name, clip.indices[0]) for clip in clips}) == 49
    assert len(set(names(clips[:7]))) == 7  # a clip of each video first
    with pytest.raises(ValueError, match="49 clips, 50 needed"):
        Selection(folder, 9, clips_per_video=100).take(50)


def test_sampling_over_clips_draws_every_window_once_so_long_videos_weigh_more(folder):
    clips = Selection(folder, 9, sampling="clips").take(49)
    assert len({(clip.video.name, clip.indices[0]) for clip in clips}) == 49
    assert names(clips).count("6.npy") == 10
    assert names(clips).count("0.npy") == 4
    with pytest.raises(ValueError, match=r"49 clips, 50 needed"):
        Selection(folder, 9, sampling="clips").take(50)


def test_short_and_damaged_videos_are_counted_listed_and_replaced(folder):
    np.save(folder / "short.npy", frames(8, T=8))
    (folder / "broken.npy").write_bytes(b"not an array")
    (folder / "broken.npz").write_bytes(b"not an array")
    (folder / "broken.avi").write_bytes(b"RIFF")
    np.save(folder / "float.npy", frames(9) / 255.0)
    np.save(folder / "object.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    write_ffv1(folder / "cut.mkv", frames(10, T=40), 8)
    (folder / "cut.mkv").write_bytes((folder / "cut.mkv").read_bytes()[:15000])
    (folder / "notes.txt").write_text("not a video")
    selection = Selection(folder, 9)
    clips = selection.take(7)
    with pytest.raises(
        ValueError, match=r"7 clips, 8 needed \(14 videos found, 1 shorter than 9 frames, 6 damaged\)"
    ):
        selection.take(8)
    summary = selection.summary(clips)
    assert (summary["short"], summary["short_names"]) == (1, ["short.npy"])
    assert set(summary["damaged_reasons"]) == {
        "broken.npy", "broken.npz", "broken.avi", "float.npy", "object.npy", "cut.mkv"
    }  # fmt: skip
    assert all(summary["damaged_reasons"].values())
    assert summary["ignored_files"] == 1
    assert summary["frames"] == {str(12 + n): 1 for n in range(7)}


def test_a_video_that_fails_after_the_scan_is_replaced_by_the_next_one(folder):
    selection = Selection(folder, 9)
    first = selection.take(5)
    selection.reject(first[1].video, "vanished")
    second = selection.take(5)
    assert [c for c in first if c.video != first[1].video] == second[:4]
    assert first[1].video.name not in names(second)
    assert selection.summary(second)["damaged_reasons"] == {first[1].video.name: "vanished"}


def test_the_record_tells_content_apart_and_not_places(folder, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    for path in sorted(folder.iterdir(), reverse=True):  # another order on the disk
        (copy / path.name).write_bytes(path.read_bytes())

    def digest(root) -> str:
        selection = Selection(root, 9)
        return selection.summary(selection.take(7))["files_sha256"]

    assert digest(folder) == digest(copy)
    changed = np.load(copy / "0.npy")
    changed[-1, 0, 0, 0] ^= 1
    np.save(copy / "0.npy", changed)
    assert digest(folder) != digest(copy)


def test_the_scan_is_kept_outside_and_not_repeated(tmp_path, monkeypatch):
    write_ffv1(tmp_path / "videos" / "a.mkv", frames(0), 8)
    kept = tmp_path / "cache" / "scan.sqlite"
    assert len(Selection(tmp_path / "videos", 9, scan_file=kept).take(1)) == 1
    assert sorted(p.name for p in (tmp_path / "videos").iterdir()) == ["a.mkv"]
    monkeypatch.setattr("data.index.scan_all", None)  # a second scan would fail
    assert len(Selection(tmp_path / "videos", 9, scan_file=kept).take(1)) == 1


def write_manifest(folder, **changes) -> None:
    content = {
        "num_videos": 7,
        "files": [f"{n}.npy" for n in range(7)],
        "complete": True,
        "settings": {"seed": 3},
    }
    (folder / "manifest.json").write_text(json.dumps({**content, **changes}))


def test_a_stale_file_of_an_older_run_is_left_out_and_recorded(folder):
    write_manifest(folder)
    np.save(folder / "stale.npy", frames(99))
    selection = Selection(folder, 9)
    clips = selection.take(7)
    summary = selection.summary(clips)
    assert "stale.npy" not in names(clips)
    assert (summary["stale"], summary["stale_names"]) == (1, ["stale.npy"])
    assert summary["manifest"]["settings"] == {"seed": 3}
    with pytest.raises(ValueError, match=r"1 not in the manifest"):
        selection.take(8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"complete": False}, "not complete; run pipelines.sample again"),
        (
            {"files": [f"{n}.npy" for n in range(8)], "num_videos": 8},
            r"1 of 8 files are missing, e.g. 7\.npy",
        ),
        ({"num_videos": 9}, "num_videos=9 but 7"),
        ({"files": "all"}, "no list `files`"),
    ],
)
def test_samples_that_are_not_what_the_manifest_says_are_refused(folder, changes, message):
    write_manifest(folder, **changes)
    with pytest.raises(ValueError, match=message):
        list_folder(folder)


def test_a_manifest_that_is_no_json_is_refused(folder):
    (folder / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match="not JSON"):
        list_folder(folder)


def test_frames_of_a_clip_are_an_interval_apart_and_every_window_fits(folder):
    drawn = Selection(folder, 5, interval=3).take(6)  # a clip covers 13 frames: 0.npy has 12
    windows = Selection(folder, 5, interval=3, sampling="clips").take(21)  # 1 + 2 + ... + 6
    for clip in drawn + windows:
        assert np.diff(clip.indices).tolist() == [3, 3, 3, 3]
        assert clip.indices[-1] < clip.total
    assert {c.indices[-1] for c in windows if c.video.name == "6.npy"} == set(range(12, 18))
    for sampling, most in (("videos", 6), ("clips", 21)):
        with pytest.raises(ValueError, match=f"{most} clips, {most + 1} needed .*1 shorter than 13"):
            Selection(folder, 5, interval=3, sampling=sampling).take(most + 1)


def test_the_knobs_of_a_protocol_reach_the_choice_of_clips(folder):
    protocol = Protocol(num_frames=9, clips_per_video=3, seed=5)
    found = selection_of(str(folder), protocol, 1, RunOptions(workers=0)).take(20)
    assert found == Selection(folder, 9, clips_per_video=3, seed=5).take(20)
    assert found != Selection(folder, 9, clips_per_video=3, seed=0).take(20)
