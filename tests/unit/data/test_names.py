"""Data sets as people have them: names of any bytes, lists from other systems, re-encoded files, other folders."""

import os
from pathlib import Path

import pytest

from data import layouts, lists
from data.core.files import escaped, unescaped
from data.sources import open_source

ODD = (
    b"line\nbreak",
    b"tab\there",
    b"cr\rhere",
    b"latin-\xe9",
    b"back\\slash\\n",
    "ünï".encode(),
    b" space ",
)


@pytest.mark.parametrize("name", ODD)
def test_an_escaped_name_is_one_field_of_one_line_and_comes_back(name):
    text = os.fsdecode(name)
    assert not set(escaped(text)) & set("\t\n\r")
    assert unescaped(escaped(text)) == text


def test_damaged_files_of_any_name_are_listed_once_at_every_start(tmp_path, scene, encode):
    encode(tmp_path / "data" / "good.mp4", scene[:4], "mpeg4")
    for name in ODD:
        Path(os.fsdecode(bytes(tmp_path / "data") + b"/" + name + b".mp4")).write_bytes(b"no video")
    tables = []
    for _ in range(3):
        source = open_source("folder", tmp_path / "data", index_dir=tmp_path / "index", workers=1)
        assert len(source.videos) == 1
        tables.append((tmp_path / "index" / "folder-quarantine.tsv").read_bytes())
    assert tables[0] == tables[1] == tables[2]
    rows = tables[0].decode(errors="surrogateescape").split("\n")[1:-1]
    names = {os.path.basename(unescaped(row.split("\t")[0])) for row in rows}
    assert names == {os.fsdecode(name) + ".mp4" for name in ODD}


@pytest.fixture
def ucf(tmp_path):
    """ucf(suffix, below): two classes of one file each."""

    def go(suffix=".avi", below=""):
        for name in ("ApplyEyeMakeup", "Diving"):
            file = tmp_path / "ucf" / below / name / f"v_{name}_g08_c01{suffix}"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(b"x")
        return tmp_path / "ucf"

    return go


ROWS = ["ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1", "Diving/v_Diving_g08_c01.avi 26"]


@pytest.mark.parametrize("head", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("between", ["\n", "\r\n", "\r", "\n\n"])
@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_a_list_of_any_system_names_the_files_even_re_encoded_ones(ucf, tmp_path, head, between, suffix):
    (tmp_path / "list.txt").write_bytes(head + between.join(ROWS).encode())
    found = lists.listed_ucf101(layouts.find_ucf101(ucf(suffix)), tmp_path / "list.txt")
    assert (len(found), found.missing) == (2, [])


def test_what_a_list_names_and_the_disk_lacks_is_told_and_the_rest_used(ucf, tmp_path):
    (tmp_path / "list.txt").write_text("\n".join([*ROWS, "Diving/v_Diving_g09_c01.avi 26"]))
    found = lists.listed_ucf101(layouts.find_ucf101(ucf()), tmp_path / "list.txt")
    assert (len(found), found.missing) == (2, ["Diving/v_Diving_g09_c01.avi"])
    (tmp_path / "list.txt").write_text("Fencing/v_Fencing_g09_c01.avi")
    with pytest.raises(ValueError, match="1 of 1 videos are not on disk"):
        lists.listed_ucf101(layouts.find_ucf101(ucf()), tmp_path / "list.txt")


def test_files_of_a_mac_are_no_videos_and_train_and_test_folders_are_found(ucf):
    root = ucf()
    (root / "Diving" / "._v_Diving_g08_c01.avi").write_bytes(b"x")
    assert len(layouts.find_ucf101(root)) == 2
    root = ucf(below="train")
    assert layouts.find_ucf101(root, "train").base.endswith("train")
    assert layouts.find_ucf101(root, "train").class_names == ["ApplyEyeMakeup", "Diving"]
