"""Small videos of any codec, written on the spot; frame n of them is frame n of a demo scene."""

import shutil

import av
import numpy as np
import pytest

from data import index as index_module
from data.demo import DemoVideos
from data.encode import write_mp4
from data.scan import scan_file


@pytest.fixture(scope="session")
def scene():
    """100 frames of a moving scene, uint8 (100, 64, 64, 3)."""
    return DemoVideos(1, num_frames=100, size=64).frames(0, range(100))


@pytest.fixture
def encode():
    """encode(path, frames, codec, pixel_format="yuv420p", **options): write a video file."""

    def write(path, frames, codec, pixel_format="yuv420p", **options):
        path.parent.mkdir(parents=True, exist_ok=True)
        with av.open(str(path), "w") as container:
            stream = container.add_stream(codec, rate=25, options={k: str(v) for k, v in options.items()})
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = pixel_format
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
                container.mux(stream.encode(frame.reformat(format=pixel_format)))
            container.mux(stream.encode())
        return path

    return write


@pytest.fixture
def scan_here(monkeypatch):
    """Scans run in the test's own process."""
    monkeypatch.setattr(index_module, "scan_all", lambda names, workers, timeout_s: map(scan_file, names))


@pytest.fixture
def put_below(tmp_path, scene):
    """put_below(folder) gives put(name, ...): the same video of 20 frames, one every 40 ms, under each name there."""
    write_mp4(tmp_path / "v.mp4", scene[:20], 25)

    def below(folder):
        def go(*names):
            for name in names:
                path = tmp_path / folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tmp_path / "v.mp4", path)
            return tmp_path / folder

        return go

    return below
