"""The data sets: layouts, class ids, splits, damaged files, and errors that say what to do."""

import logging

import numpy as np
import pytest
from PIL import Image

from data import index as index_module
from data.scan import scan_file
from data.sources import open_source, video_frames


@pytest.fixture(autouse=True)
def _scan_in_this_process(monkeypatch):
    monkeypatch.setattr(index_module, "scan_all", lambda names, workers, timeout_s: map(scan_file, names))


@pytest.fixture
def ucf(tmp_path, scene, encode):
    """Classes with both traps: HandstandPushups/v_HandStandPushups_*, and Hammering before/after HammerThrow."""
    base = tmp_path / "data" / "UCF-101"
    video = encode(tmp_path / "v.avi", scene[:6], "mpeg4").read_bytes()
    for folder, stem in (
        ("HammerThrow", "HammerThrow"),
        ("Hammering", "Hammering"),
        ("HandstandPushups", "HandStandPushups"),
    ):
        for group in range(1, 5):
            for clip in (1, 2):
                path = base / folder / f"v_{stem}_g{group:02d}_c{clip:02d}.avi"
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(video)
    (base / "Empty").mkdir()  # a class whose files are not there yet keeps its id
    (base / "Hammering" / "Thumbs.db").touch()
    return tmp_path / "data"


def test_ucf101_classes_are_directories_in_ascii_order(ucf):
    source = open_source("ucf101", ucf)
    assert source.class_names == ["Empty", "HammerThrow", "Hammering", "HandstandPushups"]
    assert len(source.videos) == 24
    labels = {v.name.split("/")[0]: v.label for v in source.videos}
    assert labels == {"HammerThrow": 1, "Hammering": 2, "HandstandPushups": 3}
    inner = open_source("ucf101", ucf / "UCF-101")
    assert [v.name for v in inner.videos] == [v.name for v in source.videos]


def test_ucf101_has_a_test_split_only_where_it_has_a_folder_of_its_own(ucf):
    for root in (ucf, ucf / "UCF-101"):
        with pytest.raises(ValueError, match="source.list_file=ucfTrainTestlist/testlist01.txt"):
            open_source("ucf101", root, split="test")
    (ucf / "latest").symlink_to(ucf / "UCF-101")
    with pytest.raises(ValueError, match="holds all of UCF101"):
        open_source("ucf101", ucf / "latest", split="test")
    (ucf / "UCF-101" / "Hammering").rename(ucf / "moved")
    for split in ("train", "test"):
        (ucf / "parted" / split).mkdir(parents=True)
    (ucf / "moved").rename(ucf / "parted" / "test" / "Hammering")
    (ucf / "UCF-101" / "HammerThrow").rename(ucf / "parted" / "train" / "HammerThrow")
    for root, split, name in (("parted", "test", "Hammering"), ("parted/test", "test", "Hammering")):
        assert open_source("ucf101", ucf / root, split=split).class_names == [name]
    assert open_source("ucf101", ucf / "parted").class_names == ["HammerThrow"]


def test_ucf101_lists_choose_videos_and_their_labels_are_not_used(ucf, tmp_path):
    listing = tmp_path / "trainlist01.txt"
    lines = ["HandStandPushups/v_HandStandPushups_g02_c01.avi 37", "Hammering/v_Hammering_g01_c02.avi 35", ""]
    listing.write_text("\r\n".join(lines))
    (ucf / "UCF-101" / "ucfTrainTestlist").mkdir()
    (ucf / "UCF-101" / "ucfTrainTestlist" / "classInd.txt").write_text("1 ApplyEyeMakeup\n")
    source = open_source("ucf101", ucf, list_file=listing)
    assert [(v.name, v.label) for v in source.videos] == [
        ("HandstandPushups/v_HandStandPushups_g02_c01.avi", 3),
        ("Hammering/v_Hammering_g01_c02.avi", 2),
    ]
    listing.write_text("Hammering/v_Hammering_g09_c01.avi 35\n")
    with pytest.raises(ValueError, match=r"1 of 1 videos are not on disk, e\.g\. Hammering/v_Hammering_g09"):
        open_source("ucf101", ucf, list_file=listing)


def test_held_out_videos_share_no_group_with_the_rest_and_never_move(ucf):
    parts = [open_source("ucf101", ucf, val_fraction=0.3, held_out=h).videos for h in (False, True)]
    groups = [{(v.name.split("/")[0], v.name.split("_")[2]) for v in part} for part in parts]
    assert not groups[0] & groups[1]
    assert [len(g) for g in groups] == [8, 4]
    # frozen: a run that a later version resumes must not train on what it held out
    assert sorted(groups[1]) == [
        ("HammerThrow", "g01"),
        ("HandstandPushups", "g02"),
        ("HandstandPushups", "g03"),
        ("HandstandPushups", "g04"),
    ]
    assert len(parts[0]) + len(parts[1]) == 24
    again = open_source("ucf101", ucf / "UCF-101", val_fraction=0.3, held_out=True, seed=9).videos
    assert [v.name for v in again] == [v.name for v in parts[1]]
    with pytest.raises(ValueError, match=r"val_fraction=0.*0\.05"):
        open_source("ucf101", ucf, held_out=True)


def _sky(root, scene):
    for split, video, clips in (("sky_train", "abc", 3), ("sky_test", "xyz", 1)):
        for clip in range(clips):
            folder = root / split / video / f"{video}_{clip}"
            folder.mkdir(parents=True)
            for n in range(1, 5):
                Image.fromarray(scene[n]).save(folder / f"{video}_{clip}_frames_{n:08d}.jpg")
            (folder / "Thumbs.db").write_bytes(b"junk")
            (folder / ".DS_Store").write_bytes(b"junk")
    (root / "sky_train" / "z6Yr7KDZhm0").mkdir()
    return root


def test_sky_splits_are_folders_and_stray_files_are_no_frames(tmp_path, scene):
    root = _sky(tmp_path / "sky_timelapse", scene)
    source = open_source("sky_timelapse", root)
    assert [v.name for v in source.videos] == ["abc/abc_0", "abc/abc_1", "abc/abc_2"]
    assert {v.record.num_frames for v in source.videos} == {4}
    assert (source.class_names, source.damaged) == ([], [])
    for held in (
        open_source("sky_timelapse", tmp_path, split="test"),
        open_source("sky_timelapse", root, held_out=True),
    ):
        assert [v.name for v in held.videos] == ["xyz/xyz_0"]
    assert np.asarray(video_frames(source.videos[0], [3, 0], 64)).shape == (2, 64, 64, 3)


def test_real_clips_open(assets):
    ucf = open_source("ucf101", assets / "ucf101")
    assert (len(ucf.videos), ucf.class_names) == (
        16,
        ["ApplyEyeMakeup", "BaseballPitch", "BenchPress", "Diving"],
    )
    assert min(v.record.num_frames for v in ucf.videos) == 88
    assert len(open_source("sky_timelapse", assets / "sky").videos) == 15
    assert len(open_source("folder", assets / "web").videos) == 15


def test_folder_is_unconditional_unless_asked(tmp_path, scene, encode):
    for name in ("b/1.avi", "a/deep/2.avi"):
        encode(tmp_path / "data" / name, scene[:3], "mpeg4")
    plain = open_source("folder", tmp_path / "data")
    assert ({v.label for v in plain.videos}, plain.class_names) == ({-1}, [])
    classes = open_source("folder", tmp_path / "data", labels="folder")
    assert [(v.name, v.label) for v in classes.videos] == [("a/deep/2.avi", 0), ("b/1.avi", 1)]
    encode(tmp_path / "data" / "3.avi", scene[:3], "mpeg4")
    with pytest.raises(ValueError, match=r"3\.avi lies in no class folder"):
        open_source("folder", tmp_path / "data", labels="folder")


def test_damaged_videos_are_left_out_named_logged_and_not_touched(tmp_path, scene, encode, caplog):
    data, index = tmp_path / "data", tmp_path / "index"
    good = encode(data / "good.avi", scene[:3], "mpeg4")
    (data / "bad.avi").write_bytes(b"RIFF")
    source = open_source("folder", data, index_dir=index)
    assert [v.name for v in source.videos] == ["good.avi"]
    assert "bad.avi" in caplog.text
    rows = (index / "folder-quarantine.tsv").read_text().splitlines()
    assert rows[0] == "path\treason"
    assert rows[1].startswith(f"{data / 'bad.avi'}\tcannot be decoded")
    assert (data / "bad.avi").read_bytes() == b"RIFF"
    assert sorted(p.name for p in data.iterdir()) == ["bad.avi", "good.avi"]
    (data / "bad.avi").write_bytes(good.read_bytes())
    open_source("folder", data, index_dir=index)
    assert (index / "folder-quarantine.tsv").read_text() == "path\treason\n"


def test_demo_needs_no_folder_and_its_held_out_part_is_other_videos():
    source = open_source("demo", num_videos=6, num_classes=3, size=32, num_frames=20)
    assert [v.label for v in source.videos] == [0, 1, 2, 0, 1, 2]
    assert source.class_names == ["right", "left", "up"]
    held = open_source("demo", num_videos=6, num_classes=3, held_out=True)
    first = [video_frames(s.videos[0], [0], 16, s.demo) for s in (source, held)]
    assert first[0].shape == (1, 16, 16, 3)
    assert (first[0] != first[1]).any()


def test_errors_are_one_line_and_say_what_to_do(tmp_path, scene, encode, caplog):
    caplog.set_level(logging.CRITICAL)
    empty, bad, one = tmp_path / "empty", tmp_path / "bad", tmp_path / "one"
    for folder in (empty, bad):
        folder.mkdir()
    for name in ("1.avi", "2.mp4"):
        (bad / name).write_text("no")
    encode(one / "1.avi", scene[:3], "mpeg4")
    cases = [
        (("folder", empty), {}, r"folder: no videos in .*docs/datasets\.md"),
        (("ucf101", empty), {}, "ucf101: no videos in"),
        (("sky_timelapse", empty), {}, "no sky_train/ in"),
        (("folder", bad), {}, r"2 found, 2 damaged.*1\.avi: cannot be decoded"),
        (("folder", tmp_path / "absent"), {}, "absent' is not a folder"),
        (("folder", None), {}, "root='' is not a folder"),
        (("imagenet", one), {}, "source 'imagenet': choose one of ucf101"),
        (("folder", one), {"split": "val"}, "split='val': choose train or test"),
        (("folder", one), {"labels": "names"}, "labels='names'"),
        (("folder", one), {"index_dir": one / "index"}, "lies inside the data"),
        (("folder", one), {"list_file": one / "x.txt"}, "leave it empty for folder"),
        (("folder", one), {"val_fraction": 0.5}, "1 group of videos cannot be split"),
        (("folder", one), {"val_fraction": 1.5}, r"must lie in \[0, 1\)"),
    ]
    for arguments, options, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            open_source(*arguments, **options)
        assert "\n" not in str(error.value)


def test_the_list_of_damaged_files_keeps_those_of_the_other_split(tmp_path, scene, encode):
    for split in ("train", "val"):
        encode(tmp_path / "data" / split / "a" / "good.avi", scene[:3], "mpeg4")
        (tmp_path / "data" / split / "a" / f"bad_{split}.avi").write_bytes(b"RIFF")
        open_source("kinetics400", tmp_path / "data", split=split, index_dir=tmp_path / "index")
    rows = (tmp_path / "index" / "kinetics400-quarantine.tsv").read_text().splitlines()[1:]
    assert [r.split("\t")[0].rpartition("/")[2] for r in rows] == ["bad_train.avi", "bad_val.avi"]
