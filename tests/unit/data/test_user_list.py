"""A list of one's own: csv, tsv, jsonl and metadata.csv; relative paths, cuts, splits, and each mistake with its line."""

import json
import shutil

import numpy as np
import pytest

from data.sources import open_source, video_frames
from data.video import read_frames

pytestmark = pytest.mark.usefixtures("scan_here")


@pytest.fixture
def put(put_below):
    return put_below("lab")


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8-sig")
    return path


def names_and_labels(source):
    return [(video.name, video.label) for video in source.videos]


@pytest.mark.parametrize("kind", ["csv", "csv;", "tsv", "jsonl"])
def test_each_form_of_a_list_gives_the_same_videos_and_class_names(put, tmp_path, kind):
    root = put("clips/a, b.mp4", "clips/c.mp4", "d.mp4")
    rows = [("clips/a, b.mp4", "walk"), (str(root / "clips/c.mp4"), "run"), ("../lab/d.mp4", "walk")]
    if kind == "jsonl":
        text = "\n".join(json.dumps({"path": path, "label": label, "caption": "x"}) for path, label in rows)
    else:
        mark = {"csv": ",", "csv;": ";", "tsv": "\t"}[kind]
        text = "\n".join(mark.join(f'"{cell}"' for cell in row) for row in [("path", "label"), *rows])
    listing = write(root / f"mine.{kind.strip(';')}", text)
    source = open_source("csv", list_file=listing, index_dir=root / "index")
    assert names_and_labels(source) == [("clips/a, b.mp4", 1), ("clips/c.mp4", 0), ("d.mp4", 1)]
    assert source.class_names == ["run", "walk"]


def test_whole_numbers_as_labels_keep_their_order(put):
    root = put("a.mp4")
    listing = write(
        root / "l.csv", "path,label\n" + "".join(f"{'a' if n == 10 else n}.mp4,{n}\n" for n in (10, 9, 2))
    )
    source = open_source("csv", list_file=listing)
    assert (source.class_names, names_and_labels(source)) == (["2", "9", "10"], [("a.mp4", 2)])


def test_paths_are_below_root_when_it_is_given(put, tmp_path):
    root = put("a.mp4", "b.mp4")
    listing = write(tmp_path / "elsewhere" / "l.csv", "file_name\na.mp4\n")
    assert [v.record.path for v in open_source("csv", root, list_file=listing).videos] == [
        str(root / "a.mp4")
    ]
    with pytest.raises(
        ValueError, match="none of the 1 videos of the list is on disk, the first is .*elsewhere/a.mp4"
    ):
        open_source("csv", list_file=listing)


def test_missing_files_are_counted_and_repeated_rows_named(put, tmp_path, caplog):
    root = put("a.mp4")
    listing = write(root / "l.csv", "path\na.mp4\ngone.mp4\n./a.mp4\n")
    source = open_source("csv", list_file=listing, index_dir=tmp_path / "index")
    assert len(source.videos) == 1
    assert "1 videos of the list are not on disk, e.g. gone.mp4" in caplog.text
    assert "1 rows of the list are there twice and count once, e.g. ./a.mp4" in caplog.text
    assert (tmp_path / "index" / "csv-missing.txt").read_text() == "gone.mp4\n"


def test_times_cut_clips_out_of_a_video_and_without_them_it_is_whole(put):
    root = put("a.mp4", "b.mp4")
    listing = write(root / "l.csv", "path,start_s,end_s\na.mp4,0.2,0.4\na.mp4,0.6,\nb.mp4,,\n")
    videos = open_source("csv", list_file=listing).videos
    assert [v.name for v in videos] == ["a.mp4[0:00:00.200-0:00:00.400]", "a.mp4[0:00:00.600-]", "b.mp4"]
    assert [v.record.num_frames for v in videos] == [5, 5, 20]
    assert videos[2].tick is None
    for video, first in zip(videos, (5, 15, 0), strict=True):
        shown = np.asarray(video_frames(video, [0, 4], 64))
        assert np.array_equal(shown, read_frames(video.record.path, [first, first + 4]))


def test_clips_of_one_file_stay_on_one_side(put):
    root = put("a.mp4", "b.mp4")
    listing = write(
        root / "l.csv", "path,start_s\n" + "".join(f"{v}.mp4,0.{n}\n" for v in "ab" for n in (1, 2, 3))
    )
    for held_out in (False, True):
        videos = open_source("csv", list_file=listing, val_fraction=0.5, held_out=held_out).videos
        assert len({v.record.path for v in videos}) == 1
        assert len(videos) == 3


def test_a_split_column_says_what_is_held_out(put):
    root = put("a.mp4", "b.mp4", "c.mp4")
    listing = write(root / "l.csv", "path,label,split\na.mp4,x,train\nb.mp4,y,validation\nc.mp4,z,test\n")
    wanted = {("train", False): ["a.mp4"], ("train", True): ["b.mp4"], ("test", False): ["c.mp4"]}
    for (split, held_out), names in wanted.items():
        source = open_source("csv", list_file=listing, split=split, val_fraction=0.05, held_out=held_out)
        assert [v.name for v in source.videos] == names
        assert source.class_names == ["x", "y", "z"]


def test_the_metadata_of_a_videofolder_is_found_in_the_root_or_in_its_splits(put, tmp_path):
    root = put("train/a.mp4", "validation/b.mp4")
    write(root / "train" / "metadata.csv", "file_name,text\na.mp4,a dog\n")
    write(root / "validation" / "metadata.jsonl", '{"file_name": "b.mp4", "text": "a cat"}\n')
    assert [v.name for v in open_source("csv", root).videos] == ["train/a.mp4"]
    assert [v.name for v in open_source("csv", root, val_fraction=0.5, held_out=True).videos] == [
        "validation/b.mp4"
    ]
    with pytest.raises(ValueError, match=r"csv: give the list, source\.list_file=FILE\.csv"):
        open_source("csv", tmp_path)
    write(tmp_path / "metadata.csv", "file_name\nlab/train/a.mp4\n")
    assert [v.name for v in open_source("csv", tmp_path).videos] == ["lab/train/a.mp4"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\na.mp4,x\n", r"no column path or file_name \(it has name, label\)"),
        ("path,label\na.mp4,x\nb.mp4,\n", "line 3: no label, but other rows have one"),
        ("path,label\na.mp4,x\na.mp4,y\n", r"line 3: a\.mp4 is also .*line 2, with another label"),
        ("path,split\na.mp4,trian\n", "line 2: split 'trian': write train, val or test"),
        ("path,start_s\na.mp4,soon\n", "line 2: start_s='soon': write seconds"),
        ("path,start_s\na.mp4,-1\n", "line 2: start_s='-1': write seconds"),
        (
            "path,start_s,end_s\na.mp4,2,1\n",
            "line 2: start_s='2', end_s='1': a clip must end after it begins",
        ),
        ("path,label\n,x\n", "line 2: path '' is not a file's name"),
        ("path,split\na.mp4,test\n", r"source\.split=train: the list has \{'test': 1\}"),
        ("", "no videos in"),
    ],
)
def test_a_wrong_row_is_told_with_its_line(put, text, message):
    listing = write(put("a.mp4", "b.mp4") / "l.csv", text)
    with pytest.raises(ValueError, match=message):
        open_source("csv", list_file=listing)


def test_a_broken_json_line_is_told(put):
    listing = write(put("a.mp4") / "l.jsonl", '{"path": "a.mp4"}\n["a.mp4"]\n')
    with pytest.raises(ValueError, match="line 2: need one JSON object a line"):
        open_source("csv", list_file=listing)


def test_a_held_out_part_that_is_all_damaged_takes_one_more_video(put, tmp_path):
    root = put(*(f"{n}.mp4" for n in range(4)))
    held = [v.name for v in open_source("folder", root, val_fraction=0.25, held_out=True).videos]
    (root / held[0]).write_bytes(b"junk")
    parts = [open_source("folder", root, val_fraction=0.25, held_out=h) for h in (False, True)]
    kept = [{v.name for v in part.videos} for part in parts]
    assert [len(part) for part in kept] == [2, 1]
    assert not kept[0] & kept[1]
    assert [len(part.damaged) for part in parts] == [0, 1]


def test_rows_of_another_folder_do_not_change_what_is_held_out(put, tmp_path):
    lab = put(*(f"{n}.mp4" for n in range(8)))
    rows = "".join(f"{n}.mp4\n" for n in range(8))
    held = {}
    shutil.copyfile(tmp_path / "v.mp4", tmp_path / "other.mp4")
    for name, more in (("a", ""), ("b", f"{tmp_path / 'other.mp4'}\n")):
        list_file = write(lab / f"{name}.csv", f"path\n{rows}{more}")
        part = open_source("csv", list_file=list_file, index_dir=None, val_fraction=0.3, held_out=True)
        held[name] = {video.name.rpartition("/")[2] for video in part.videos}
    assert held["a"] - {"other.mp4"} <= held["b"]


def test_a_tsv_is_cut_at_tabs_whatever_its_names_hold(put):
    lab = put("a,b,c.mp4")
    found = open_source(
        "csv", list_file=write(lab / "l.tsv", "path\na,b,c.mp4\n"), index_dir=None, val_fraction=0
    )
    assert [video.name for video in found.videos] == ["a,b,c.mp4"]
