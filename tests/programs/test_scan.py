"""python -m pipelines.scan: a folder or a list, its facts, damaged files with reasons, a contact sheet."""

import pytest
from PIL import Image

from data.encode import write_mp4
from pipelines.scan import main
from tests.programs.runs import noise


@pytest.fixture
def videos(tmp_path):
    for name, frames, size in (("a.mp4", 25, 64), ("sub/b.mp4", 17, 64), ("c.mp4", 9, 32)):
        write_mp4(tmp_path / "videos" / name, noise(frames, size, size), 25)
    (tmp_path / "videos" / "bad.mp4").write_bytes(b"junk")
    return tmp_path / "videos"


@pytest.fixture
def scan(tmp_path, capsys):
    def go(*words):
        assert (
            main([*map(str, words), f"source.index_dir={tmp_path / 'index'}", f"sheet={tmp_path / 's.png'}"])
            == 0
        )
        return capsys.readouterr().out

    return go


def test_a_folder_is_described(videos, scan, tmp_path):
    text = scan(videos)
    for line in (
        "3 videos, 1 damaged",
        "min 9, 5 % 9, median 17, 95 % 25, max 25 frames; 51 in all",
        "9 frames: 3, 17 frames: 2, 25 frames: 1, 49 frames: 0",
        "64 x 64: 2, 32 x 32: 1",
        "25 fps: 3",
        f"damaged  {videos / 'bad.mp4'}: cannot be decoded",
    ):
        assert line in text
    sheet = Image.open(tmp_path / "s.png")
    assert sheet.size == (3 * 160, 174)
    assert len(set(sheet.crop((2, 2, 66, 66)).getdata())) > 100  # a picture of the first video


def test_a_list_is_described_with_all_its_splits(videos, scan):
    rows = ["path,label,split", "a.mp4,x,train", "c.mp4,y,val", "gone.mp4,y,test", "sub/b.mp4,x,"]
    (videos / "l.csv").write_text("\n".join(rows))
    text = scan(videos / "l.csv")
    assert "3 videos, 0 damaged, 1 of the list not on disk" in text
    assert "2 classes  x: 2, y: 1" in text


def test_a_sheet_overwrites_nothing_else_and_does_not_lie_among_the_videos(videos, scan, tmp_path):
    (tmp_path / "mine.txt").write_text("PNG notes")
    Image.new("RGB", (2, 2)).save(tmp_path / "photo.png")
    photo = (tmp_path / "photo.png").read_bytes()
    for name in ("mine.txt", "photo.png"):
        with pytest.raises(ValueError, match=f"{name}: exists and is no contact sheet"):
            main([str(videos), f"sheet={tmp_path / name}"])
    assert (tmp_path / "photo.png").read_bytes() == photo
    with pytest.raises(ValueError, match="lies inside the data"):
        main([str(videos), f"sheet={videos / 's.png'}"])
    scan(videos), scan(videos)
    assert (tmp_path / "mine.txt").read_text() == "PNG notes"
