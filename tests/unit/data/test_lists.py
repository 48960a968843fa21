"""Sources as published: csv lists and class folders, missing files told, nothing outside the root touched."""

import csv
import logging
import shutil

import numpy as np
import pytest

from data import lists
from data.clip import ClipSpec
from data.dataset import VideoClips
from data.encode import write_mp4
from data.lists import parse_pairs
from data.sources import open_source, video_frames
from data.video import read_frames

pytestmark = pytest.mark.usefixtures("scan_here")


@pytest.fixture
def put(put_below):
    return put_below("data")


def table(path, head, *rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([head.split(","), *rows])
    return path


WEBVID = "videoid,contentUrl,duration,page_dir,name"
PANDA = "videoID,url,timestamp,caption,matching_score"
K400 = "label,youtube_id,time_start,time_end,split"


@pytest.mark.parametrize(
    "layout", ["{page}/{id}.mp4", "videos/{page}/{id}.mp4", "{id}.mp4", "videos/{id}.mp4"]
)
def test_webvid_rows_are_found_in_each_layout_and_the_missing_ones_are_told(put, tmp_path, layout, caplog):
    names = {n: layout.format(page=f"00{n}_01{n}", id=n) for n in range(5)}
    root = put(*(names[n] for n in range(4)), "other/99.mp4")
    rows = [
        [n, "https://x/y.mp4", "PT00H00M10S", f"00{n}_01{n}", 'A "cat", \n asleep \u4e2d']
        for n in (3, 0, 4, 0, 2)
    ]
    listing = table(tmp_path / "results_10M_val.csv", WEBVID, *rows)
    source = open_source("webvid", root, list_file=listing, index_dir=tmp_path / "index")
    assert [v.record.path for v in source.videos] == [str(root / names[n]) for n in (3, 0, 2)]
    assert (source.class_names, source.videos[0].label) == ([], -1)
    assert "1 videos of the list are not on disk, e.g. 004_014/4.mp4" in caplog.text
    assert (tmp_path / "index" / "webvid-missing.txt").read_text() == "004_014/4.mp4\n"
    put(layout.format(page="004_014", id=4))
    assert len(open_source("webvid", root, list_file=listing, index_dir=tmp_path / "index").videos) == 4
    assert (tmp_path / "index" / "webvid-missing.txt").read_text() == ""


def test_no_list_leads_out_of_its_folder(put, tmp_path):
    root = put("a/1.mp4", "train/eating cake/xx_000001_000011.mp4")
    secret = tmp_path / "secret.mp4"
    shutil.copyfile(root / "a/1.mp4", secret)
    names = [
        "../secret",
        "../../secret",
        str(secret.with_suffix("")),
        "a/../../secret",
        "..\\secret",
        "",
        ".",
        "a//1",
    ]
    for name in names:
        cases = [
            ("webvid", table(tmp_path / "w.csv", WEBVID, [name, "", "", "a", ""])),
            (
                "panda70m",
                table(tmp_path / "p.csv", PANDA, [name, "", "[['0:00:00.000', '0:00:01.000']]", "[]", "[]"]),
            ),
            ("kinetics400", table(tmp_path / "k.csv", K400, ["eating cake", name, "1", "11", "train"])),
        ]
        if name not in ("", "a//1"):
            cases.append(
                ("webvid", table(tmp_path / "d.csv", WEBVID, ["1", "", "", name.lstrip("/") + "/..", ""]))
            )
        for source, listing in cases:
            with pytest.raises(ValueError, match="line 2: .* is not a name below the root"):
                open_source(source, root, list_file=listing)


def test_panda70m_cuts_each_pair_of_times_out_of_its_video(tmp_path, scene, caplog):
    root = tmp_path / "data"
    frames = np.concatenate([scene, scene[::-1]])
    write_mp4(root / "--029bd8GyE.mp4", frames, 25)
    write_mp4(root / "sub" / "b_2.mp4", frames, 30000 / 1001)
    listing = table(
        tmp_path / "panda70m_training_2m.csv",
        PANDA,
        ["b_2", "https://x", "[['0:00:01.001', '0:00:02.002']]", "['A dog.']", "[0.5]"],
        ["gone", "https://x", "[['0:00:01.000', '0:00:02.000']]", "['A cat.']", "[0.5]"],
        [
            "--029bd8GyE",
            "https://x",
            "[['0:00:00.000', '0:00:01.000'], ['0:00:03.990', '0:00:04.440'], "
            "['0:01:00.000', '0:01:05.000']]",
            "['A', \"B's\", 'C']",
            "[0.5, 0.4, 0.3]",
        ],
    )
    source = open_source("panda70m", root, list_file=listing, index_dir=tmp_path / "index")
    assert [(v.name, v.first, v.record.num_frames) for v in source.videos] == [
        ("sub/b_2.mp4[0:00:01.001-0:00:02.002]", 30, 30),
        ("--029bd8GyE.mp4[0:00:00.000-0:00:01.000]", 0, 25),
        ("--029bd8GyE.mp4[0:00:03.990-0:00:04.440]", 100, 11),
    ]
    assert "1 videos of the list are not on disk, e.g. gone" in caplog.text
    assert "1 clips of the list hold no frame" in caplog.text
    for video in source.videos:
        expected = read_frames(video.record.path, [video.first, video.first + 10])
        assert (np.asarray(video_frames(video, [0, 10], 64)) == expected).all()
    clips = VideoClips(source, ClipSpec(num_frames=25, size=16))
    assert ([v.first for v in clips.short], len(clips)) == ([100], 2)
    again = open_source("panda70m", root, list_file=listing, index_dir=tmp_path / "index")
    assert list(again.videos) == list(source.videos)  # out of the index
    parts = [open_source("panda70m", root, list_file=listing, val_fraction=0.5, held_out=h) for h in (0, 1)]
    assert len({v.record.path for part in parts for v in part.videos}) == 2
    assert not {v.record.path for v in parts[0].videos} & {v.record.path for v in parts[1].videos}


def test_panda70m_without_a_list_is_the_folder_its_downloader_writes(put):
    root = put(*(f"00000/000000{v}_0000{c}.mp4" for v in range(4) for c in range(3)))
    (root / "00000" / "0000000_00000.json").write_text("{}")
    parts = [open_source("panda70m", root, val_fraction=0.5, held_out=h).videos for h in (False, True)]
    assert [len(part) for part in parts] == [6, 6]
    assert not {v.name[:13] for v in parts[0]} & {v.name[:13] for v in parts[1]}


def test_time_pairs_are_matched_never_evaluated():
    assert parse_pairs("[[\"0:00:01.000\", \"0:00:02.500\"],[ '0:00:03' , '0:00:04' ]]") == [
        (1000, 2500),
        (3000, 4000),
    ]
    bad = [
        "",
        "[]",
        "[['0:00:02.000', '0:00:01.000']]",
        "[['0:00:01', '0:00:02']",
        "__import__('os').getcwd()",
    ]
    bad += [
        "[['0:00:01', '0:00:02', '0:00:03']]",
        "[['0:00:01', '0:00:02']] + []",
        "[" * 5000,
        "[['9:99:99', '9:99:99.5']]",
    ]
    for text in bad:
        with pytest.raises(ValueError, match="tim"):
            parse_pairs(text)


def test_kinetics400_classes_are_folders_with_their_spaces(put, tmp_path, caplog):
    train = [
        f"train/{c}/abc{n}_-x_00001{n}_00002{n}.mp4" for c in ("riding a bike", "eating cake") for n in (1, 2)
    ]
    root = put(*train, "val/eating cake/val00000000_000001_000011.mp4")
    source = open_source("kinetics400", root)
    assert source.class_names == ["eating cake", "riding a bike"]
    assert [(v.name, v.label) for v in source.videos][1:3] == [
        ("eating cake/abc2_-x_000012_000022.mp4", 0),
        ("riding a bike/abc1_-x_000011_000021.mp4", 1),
    ]
    assert "2 classes, Kinetics-400 has 400" in caplog.text
    assert len(open_source("kinetics400", root, split="val").videos) == 1
    bare = open_source("kinetics400", root / "train")
    assert [(v.name, v.label) for v in bare.videos] == [(v.name, v.label) for v in source.videos]


def test_kinetics400_reads_a_replacement_in_place_of_the_video_of_that_name(put, tmp_path):
    better, name = "replacement/replacement_for_corrupted_k400", "bad_video___000001_000011.mp4"
    root = put(
        f"train/eating cake/{name}", "train/eating cake/good_video__000001_000011.mp4", f"{better}/{name}"
    )
    (root / "train" / "eating cake" / name).write_bytes(b"damaged")
    for top in (root, root / "train"):
        if top != root:
            shutil.move(root / "replacement", top / "replacement")
        source = open_source("kinetics400", top)
        assert sorted(v.record.path.split("/")[-2] for v in source.videos) == [
            "eating cake",
            better.split("/")[1],
        ]
        assert ({v.label for v in source.videos}, source.damaged) == ({0}, [])


def test_a_kinetics400_list_gives_the_classes_of_a_flat_folder(put, tmp_path, caplog):
    root = put("train/a_000001_000011.mp4", "train/b_000012_000022.mp4", "train/c_000003_000013.mp4")
    with pytest.raises(ValueError, match="lies in no class folder.*list_file="):
        open_source("kinetics400", root)
    rows = [
        ["eating cake", "b", "12", "22", "train"],
        ["abseiling", "a", "1", "11", "train"],
        ["zumba", "d", "1", "11", ""],
    ]
    listing = table(tmp_path / "train.csv", K400, *rows)
    source = open_source("kinetics400", root, list_file=listing)
    assert [(v.name, source.class_names[v.label]) for v in source.videos] == [
        ("b_000012_000022.mp4", "eating cake"),
        ("a_000001_000011.mp4", "abseiling"),
    ]
    assert source.class_names == ["abseiling", "eating cake", "zumba"]  # ids do not depend on what is on disk
    assert "e.g. d_000001_000011" in caplog.text


def test_wrong_lists_are_one_line_with_the_place_and_the_way_out(put, tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.CRITICAL)
    root = put("1.mp4")
    monkeypatch.setattr(lists, "_LONGEST_FIELD", 200)
    cases = [
        ("webvid", None, "give its csv, list_file="),
        ("webvid", tmp_path / "absent.csv", "no such file"),
        (
            "webvid",
            table(tmp_path / "1.csv", "videoid,name", ["1", "x"]),
            r"no column page_dir \(it has videoid, name\)",
        ),
        ("webvid", table(tmp_path / "2.csv", WEBVID, ["1", ""]), "line 2: too few columns"),
        ("webvid", table(tmp_path / "3.csv", WEBVID, ["7", "", "", "p", ""]), "no videos in"),
        ("webvid", table(tmp_path / "4.csv", WEBVID, ["1", "x" * 300, "", "", ""]), "not a csv row"),
        ("panda70m", table(tmp_path / "5.csv", PANDA, ["1", "", "[[1, 2]]", "", ""]), "line 2: timestamp"),
        (
            "kinetics400",
            table(tmp_path / "6.csv", K400, ["a", "1", "x", "11", ""]),
            "line 2: times are whole seconds",
        ),
    ]
    for name, listing, message in cases:
        with pytest.raises(ValueError, match=message) as error:
            open_source(name, root, list_file=listing)
        assert "\n" not in str(error.value)


def test_reading_a_list_leaves_the_process_its_own_limit_of_a_csv_field(tmp_path):
    import csv

    from data import lists

    file = tmp_path / "list.csv"
    file.write_text("a,b\n1,2\n")
    before = csv.field_size_limit()
    assert list(lists._rows(file, "b")) == [(2, "2")]
    assert csv.field_size_limit() == before
