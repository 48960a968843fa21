"""Video in, video out: reconstruct IN OUT, encode and decode, at the video's own size, rate, length and sound."""

import errno
import json
import os
import re
import time
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from data.core.files import temporary_name
from data.encode import Clock, write_mp4, writing_video
from data.video import probe, read_frames
from eval import fidelity
from eval.fidelity import psnr, ssim
from pipelines import decode, encode, reconstruct, video_files
from tests.unit.vae.test_baselines import TINY
from vae import build_vae, decode_video, encode_video, load_vae
from vae.adapter import AdaptedAllegro
from vae.clips import padded

OD = {"block_out_channels": (8, 8, 16, 16), "norm_num_groups": 4, "layers_per_block": 1}
VAES = {
    "stream": ("odvae", OD),
    "released": ("odvae", OD | {"norm_scope": "clip", "spatial_up": "trilinear", "temporal_up": "linear"}),
    "images": ("sd2_1", TINY["sd2_1"]),
    "4n": ("ops", TINY["ops"]),
    "discrete": ("tats", TINY["tats"]),
}
FPS = Fraction(30000, 1001)


def film(path, frames=11, height=35, width=50, sound=True, begin=0, sound_begin=Fraction(0)):
    """A moving gradient with a tone, written as a phone does: H.264 and AAC. begin: frames before; sound_begin: seconds."""
    t, y, x = np.mgrid[:frames, :height, :width]
    pixels = np.stack([(x * 4 + t * 9) % 256, (y * 6 + t * 5) % 256, (x + y + t * 3) % 256], axis=-1)
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "4"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv444p"
        tone = container.add_stream("aac", rate=16000) if sound else None
        for n, picture in enumerate(pixels.astype(np.uint8), begin):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = n, 1 / FPS
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound:
            wave = (8000 * np.sin(np.arange(4096) / 9)).astype(np.int16)
            frame = av.AudioFrame.from_ndarray(wave[None], format="s16", layout="mono")
            frame.sample_rate, frame.pts = 16000, int(sound_begin * 16000)
            container.mux(tone.encode(frame))
            container.mux(tone.encode())
    return path


def packets(path) -> list[bytes]:
    with av.open(str(path)) as container:
        return [bytes(packet) for packet in container.demux(audio=0) if packet.size]


def times(path, kind) -> np.ndarray:
    """When each packet of the first "video" or "audio" stream is shown, in seconds, in the order of the file."""
    with av.open(str(path)) as container:
        stream = getattr(container.streams, kind)[0]
        return np.array([float(p.pts * p.time_base) for p in container.demux(stream) if p.size])


@pytest.fixture(params=list(VAES))
def vae_folder(request, tmp_path):
    kind, config = VAES[request.param]
    torch.manual_seed(0)
    build_vae(kind, **config).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def od_folder(tmp_path):
    torch.manual_seed(0)
    build_vae("odvae", **OD).save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


def frames_of(path) -> np.ndarray:
    return np.asarray(read_frames(path, range(probe(path).num_frames)))


def run(program, *words) -> int:
    return program.main([str(word) for word in words])


def test_a_reconstruction_has_the_size_rate_length_and_sound_of_its_video(vae_folder, tmp_path, capsys):
    given = film(tmp_path / "in.mp4")
    for suffix in (".mp4", ".mkv"):
        out = tmp_path / f"out{suffix}"
        assert run(reconstruct, given, out, "--vae-path", vae_folder, "--window", 4) == 0
        assert probe(out) == probe(given)
        assert packets(out) == packets(given) != []
        line = capsys.readouterr().out
        assert "all 11 frames of 50 x 35, 29.97 frames/s" in line
        assert "LPIPS not run (no AlexNet weights here" in line
    original, decoded = frames_of(given), frames_of(tmp_path / "out.mkv")  # without loss: what was measured
    scores = re.search(r"PSNR (\S+), SSIM (\S+), LPIPS", line)
    pairs = [(a[None], b[None]) for a, b in zip(original, decoded, strict=True)]
    assert float(scores[1]) == round(np.mean([psnr(*p) for p in pairs]), 2)
    assert float(scores[2]) == round(np.mean([ssim(*p) for p in pairs]), 4)


@pytest.mark.parametrize("early", [Fraction(0), Fraction(1, 10)])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_stays_with_the_picture_of_a_video_that_begins_late(tmp_path, early, suffix):
    begin = 5 * 1001 / 1000  # seconds at frame 150
    given = film(tmp_path / "in.mkv", begin=150, sound_begin=Fraction(5005, 1000) - early)
    assert times(given, "video")[0] == pytest.approx(begin, abs=0.001)
    out = tmp_path / f"out{suffix}"
    with writing_video(out, 35, 50, float(FPS), given) as write:
        write(frames_of(given))
    heard, shown = times(out, "audio"), times(out, "video").min()
    wanted = times(given, "audio") - begin
    wanted = wanted[wanted + 1024 / 16000 > -0.002]  # packets that end before the first picture are gone
    np.testing.assert_allclose(heard - shown, wanted, atol=0.003)


def test_each_program_ends_with_where_things_are_and_the_next_command_which_works(
    od_folder, tmp_path, caplog, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    caplog.set_level("INFO")

    def ending() -> dict[str, str]:
        title, *rows = caplog.messages[-1].splitlines()
        assert title == "finished: 1 of 1 videos"
        return {name: text.strip() for name, _, text in (row.strip().partition("  ") for row in rows)}

    def words(said, program) -> list[str]:
        assert said["next"].startswith(f"python -m pipelines.{program} ")
        return said["next"].split()[3:]

    film(tmp_path / "in.mp4")
    frame_folder(tmp_path / "frames")
    for given in ("in.mp4", "frames"):
        assert run(reconstruct, given, "out.mp4", "--vae-path", od_folder) == 0
        said = ending()
        assert said["in"] == "out.mp4"
        assert run(encode, *words(said, "encode")) == 0
        said = ending()
        assert said["in"] == "out.safetensors"
        assert run(decode, *words(said, "decode")) == 0
        assert ending() == {"in": "out-decoded.mp4"}
        for made in tmp_path.glob("out*.*"):
            made.unlink()

    assert run(encode, "frames", "all", "--vae-path", od_folder) == 0  # into folders
    assert words(ending(), "decode")[:2] == ["all", "all-decoded"]
    assert run(decode, *words(ending(), "decode"), "--lossless") == 0
    assert ending()["next"] == "python eval/fidelity.py --real FOLDER_OF_ORIGINALS --fake all-decoded"

    assert run(encode, "in.mp4", "z.safetensors", "--vae-path", od_folder) == 0
    assert run(decode, "z.safetensors", "out.mkv", "--vae-path", od_folder) == 0
    said = ending()["next"].replace("ORIGINAL_VIDEO", "in.mp4").split()
    assert said == "python eval/fidelity.py --real in.mp4 --fake out.mkv".split()
    assert fidelity.main([*said[2:], "--no-lpips"]) is None


UNEVEN = [
    0,
    40,
    73,
    500,
    510,
    900,
    1700,
    1733,
    2400,
    2440,
    4000,
]  # ms, of 11 frames; the header says 25 a second


def uneven(path):
    """A video of a variable frame rate."""
    frames = np.random.default_rng(0).integers(0, 256, (len(UNEVEN), 16, 24, 3), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width, stream.height, stream.pix_fmt = 24, 16, "bgr0"
        stream.codec_context.time_base = Fraction(1, 1000)
        for tick, picture in zip(UNEVEN, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="bgr0")
            frame.pts, frame.time_base = 7000 + tick, Fraction(1, 1000)  # it begins late
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_each_frame_of_a_variable_rate_keeps_its_own_time(od_folder, tmp_path, capsys, suffix):
    given, latents = uneven(tmp_path / "in.mkv"), tmp_path / "a.safetensors"
    assert probe(given).fps == pytest.approx(10 / 4.0)  # not what the header says
    vae = ("--vae-path", od_folder)
    run(reconstruct, given, tmp_path / f"a{suffix}", *vae)
    assert "2.5 frames/s in the mean, each at its own time" in capsys.readouterr().out
    run(encode, given, latents, *vae)
    run(decode, latents, tmp_path / f"b{suffix}", *vae)
    for name in "ab":
        shown = np.sort(times(tmp_path / f"{name}{suffix}", "video"))
        np.testing.assert_allclose(shown - shown[0], np.array(UNEVEN) / 1000, atol=1e-6)
    broken = tmp_path / "broken.safetensors"
    with safe_open(latents, "pt") as file:
        save_file({"latents": file.get_tensor("latents")}, broken, file.metadata() | {"ticks": "[0, 1]"})
    with pytest.raises(ValueError, match="its time stamps are damaged .2 times of 11 frames"):
        run(decode, broken, tmp_path / "c.mkv", *vae)


NS = Fraction(1, 10**9)


@pytest.mark.parametrize(
    ("suffix", "base", "ticks", "wanted"),  # wanted: seconds
    [
        (".mp4", NS, [0, 33_000_000, 70_000_000, 4_400_000_000], [0, 0.033, 0.07, 4.4]),
        (".mp4", NS, [0, 10, 20, 4_400_000_000], [0, 1 / 90000, 2 / 90000, 4.4]),
        (".mkv", NS, [0, 33_000_000, 33_300_000, 4_400_000_000], [0, 0.033, 0.034, 4.4]),
        (".mkv", Fraction(1, 90000), [0, 3000, 3010, 3020], [0, 0.033, 0.034, 0.035]),
        (".mp4", Fraction(1, 90000), [0, 3000, 3010, 3020], [0, 3000 / 90000, 3010 / 90000, 3020 / 90000]),
    ],
)
def test_times_finer_than_a_file_counts_still_rise(tmp_path, suffix, base, ticks, wanted):
    out = tmp_path / f"out{suffix}"
    with writing_video(out, 16, 24, 25, clock=Clock(base, tuple(ticks))) as write:
        write(np.zeros((len(ticks), 16, 24, 3), np.uint8))
    np.testing.assert_allclose(np.sort(times(out, "video")), wanted, atol=6e-6)


def test_a_video_far_faster_than_its_file_counts_is_refused_and_not_stretched(tmp_path):
    fast = Clock(Fraction(1, 10_000), tuple(range(40)))
    with pytest.raises(
        ValueError, match="out.mkv: its frames come faster .* 1000 a second; a .mp4 counts finest"
    ):
        with writing_video(tmp_path / "out.mkv", 16, 24, 25, clock=fast):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_steady_rate_has_no_clock_whatever_its_file_rounds(tmp_path):
    for suffix in (".mp4", ".mkv"):
        assert probe(film(tmp_path / f"in{suffix}")).clock is None
    assert probe(film(tmp_path / "late.mkv", begin=150)).clock is None


def test_latents_are_decoded_to_what_reconstruct_writes_and_are_read_without_this_project(
    vae_folder, tmp_path, capsys
):
    given = film(tmp_path / "in" / "deep" / "a.mp4")
    write_mp4(tmp_path / "in" / "b.mp4", np.full((1, 16, 24, 3), 90, np.uint8), 12)  # one frame
    flags = ("--vae-path", vae_folder)
    assert run(encode, tmp_path / "in", tmp_path / "latents", *flags, "--window", 4) == 0
    assert run(decode, tmp_path / "latents", tmp_path / "out", *flags, "--lossless") == 0
    assert run(reconstruct, *flags, "--window", 4, tmp_path / "in", tmp_path / "direct", "--lossless") == 0
    for name in ("deep/a.mkv", "b.mkv"):
        np.testing.assert_array_equal(
            frames_of(tmp_path / "out" / name), frames_of(tmp_path / "direct" / name)
        )
        assert probe(tmp_path / "out" / name).fps == pytest.approx(probe(tmp_path / "direct" / name).fps)
    with safe_open(tmp_path / "latents" / "deep" / "a.safetensors", "pt") as file:
        z, header = file.get_tensor("latents"), file.metadata()
    vae = load_vae(vae_folder)
    assert header["source"] == "a.mp4"
    assert [json.loads(header[k]) for k in ("num_frames", "height", "width")] == [11, 35, 50]
    assert json.loads(header["fps"]) == pytest.approx(float(FPS))
    assert json.loads(header["scaling_factor"]) == vae.latent_rule()["scaling_factor"]
    assert z.dtype == torch.float32
    assert (z.shape[0], z.shape[2]) == (vae.latent_channels, -(-35 // vae.spatial_compression_ratio))
    video = encode_video(vae, frames_of(given), 4)
    assert torch.equal(video.latents, z)
    np.testing.assert_array_equal(decode_video(vae, video), frames_of(tmp_path / "out" / "deep" / "a.mkv"))


def test_a_streamed_video_has_the_latents_of_the_whole_clip(od_folder):
    vae = load_vae(od_folder)
    pixels = np.random.default_rng(0).integers(0, 256, (9, 16, 24, 3), dtype=np.uint8)
    video = encode_video(vae, pixels)
    with torch.no_grad():
        x = torch.from_numpy(pixels).movedim(-1, 0)[None] / 127.5 - 1
        assert torch.equal(video.latents, vae.encode(x).latent_dist.mode()[0])
    assert video.window == 0
    assert decode_video(vae, video).shape == pixels.shape


def test_each_side_is_padded_by_its_own_rule():
    allegro = SimpleNamespace(kernel=(24, 320, 320), stride=(16, 200, 240))
    allegro.check_sides = partial(AdaptedAllegro.check_sides, allegro)
    assert padded(allegro, 720, 1280) == (720, 1280)
    assert padded(allegro, 100, 561) == (320, 800)
    assert padded(allegro, 721, 1279) == (920, 1280)
    assert padded(build_vae("odvae", **OD), 35, 50) == (40, 56)


def test_a_video_that_does_not_fit_in_memory_is_left_out(tmp_path):
    def work(given, out):
        if given.name == "big":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nmore")
        if given.name == "odd":
            raise RuntimeError("a fault of ours")
        return "done"

    todo = [(Path(name), tmp_path / name) for name in ("a", "big", "c")]
    [(name, reason)] = video_files.each(todo, "test", work)
    assert name == Path("big")
    assert reason.startswith("CUDA out of memory. Tried to allocate 9 GiB.; use a smaller --window")
    with pytest.raises(ValueError, match="smaller --window"):
        video_files.each(todo[1:2], "test", work)
    with pytest.raises(RuntimeError, match="a fault of ours"):
        video_files.each([*todo, (Path("odd"), tmp_path)], "test", work)


def test_a_file_of_latents_that_cannot_be_read_is_left_out(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).symlink_to(tmp_path / "nowhere")
    todo = [(tmp_path / name, tmp_path / "out") for name in ("a", "b")]
    bad = video_files.each(todo, "test", lambda given, out: str(video_files.read_latents(given)))
    assert [given for given, _ in bad] == [given for given, _ in todo]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_disk_that_fails_is_not_a_fault_of_the_video(number, tmp_path):
    with pytest.raises(OSError, match="cannot write .*out.mp4: the disk") as caught:
        with writing_video(tmp_path / "out.mp4", 16, 16, 8):
            raise av.error.OSError(number, "the disk")
    assert not isinstance(caught.value, ValueError)
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_only_sound_that_cannot_be_copied_is_blamed_on_the_sound(tmp_path):
    given = tmp_path / "in.mkv"
    with av.open(str(given), "w") as container:
        sound = container.add_stream("pcm_u8", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 64), np.uint8), format="u8", layout="mono")
        frame.sample_rate = 16000
        container.mux(sound.encode(frame))
    with pytest.raises(ValueError, match=r"out.mp4: the sound cannot be copied \(.*pcm_u8.*--no-audio"):
        with writing_video(tmp_path / "out.mp4", 16, 16, 8, given):
            pass
    with pytest.raises(ValueError, match="out.mp4") as caught:
        with writing_video(tmp_path / "out.mp4", 16, 16, 8, None):
            raise av.error.InvalidDataError(1, "damaged")
    assert "--no-audio" not in str(caught.value)


def test_a_folder_leaves_out_what_is_damaged_and_goes_on_where_it_was(od_folder, tmp_path, capsys):
    film(tmp_path / "in" / "a.mp4", sound=False)
    film(tmp_path / "in" / "b.mp4")
    (tmp_path / "in" / "c.mp4").write_bytes(b"no video")
    words = (tmp_path / "in", tmp_path / "out", "--vae-path", od_folder)
    assert run(reconstruct, *words) == 1
    assert "1 of 3 could not be done: c.mp4" in capsys.readouterr().out
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").glob("*.mp4")}
    assert sorted(p.name for p in times) == ["a.mp4", "b.mp4"]
    film(tmp_path / "in" / "d.mp4", frames=2)
    assert run(reconstruct, *words) == 1
    assert {p: p.stat().st_mtime_ns for p in times} == times
    assert probe(tmp_path / "out" / "d.mp4").num_frames == 2
    with pytest.raises(ValueError, match=r"out: made with other settings \(.*settings.json\)"):
        run(reconstruct, *words, "--bf16")


def test_latents_are_files_like_any_other_and_half_written_ones_are_no_input(
    od_folder, tmp_path, monkeypatch
):
    film(tmp_path / "in" / "a.mp4", frames=1)
    flags, half = ("--vae-path", od_folder), ".b.safetensors.tmp-elsewhere-1.safetensors"
    (tmp_path / "plain").touch()
    written = []
    monkeypatch.setattr("data.encode.fsync", lambda path: written.append(path.name))
    assert run(encode, tmp_path / "in", tmp_path / "z", *flags) == 0
    assert (tmp_path / "z" / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert str(os.getpid()) in written[0]  # a name that no other process takes
    mine = temporary_name(tmp_path / "z" / "c.safetensors", ".safetensors")
    mine.write_bytes(b"killed")
    (tmp_path / "z" / half).write_bytes(b"half")
    assert run(encode, tmp_path / "in", tmp_path / "z", *flags) == 0
    assert not mine.exists()
    assert (tmp_path / "z" / half).exists()
    assert run(decode, tmp_path / "z", tmp_path / "out", *flags) == 0
    assert [p.name for p in (tmp_path / "out").glob("*.mp4")] == ["a.mp4"]


def frame_folder(path):
    path.mkdir(parents=True)
    for n in range(2):
        Image.fromarray(np.full((16, 24, 3), 90 * n, np.uint8)).save(path / f"{n}.png")
    return path


def test_folders_of_frames_keep_their_names_and_one_may_be_the_input(od_folder, tmp_path):
    many, flags = tmp_path / "many", ("--vae-path", od_folder)
    one = frame_folder(many / "clip_0.5s")
    frame_folder(many / "clip_0.7s")
    assert run(encode, many, tmp_path / "z", *flags) == 0
    assert run(decode, tmp_path / "z", tmp_path / "decoded", *flags) == 0
    assert run(encode, one, tmp_path / "z1", *flags) == 0
    assert run(encode, one, tmp_path / "one.safetensors", *flags) == 0
    assert run(reconstruct, one, tmp_path / "r1", *flags) == 0
    made = {
        p.relative_to(tmp_path).as_posix()
        for kind in ("mp4", "safetensors")
        for p in tmp_path.rglob(f"*.{kind}")
    }
    assert {name for name in made if not name.startswith("vae/")} == {
        *(f"z/clip_0.{n}s.safetensors" for n in (5, 7)),
        *(f"decoded/clip_0.{n}s.mp4" for n in (5, 7)),
        *("z1/clip_0.5s.safetensors", "one.safetensors", "r1/clip_0.5s.mp4"),
    }


def test_names_that_would_be_one_file_are_found_among_many(tmp_path, monkeypatch):
    names = [f"{n}.mp4" for n in range(20_000)]
    monkeypatch.setattr(video_files, "video_names", lambda given: [*names, "7.mkv"])
    began = time.process_time()
    with pytest.raises(ValueError, match="7.mp4, 7.mkv would be one file in .*out; rename them"):
        video_files.pairs(tmp_path, tmp_path.parent / "out", ".mp4", video_files.VIDEO_SUFFIXES, "test", {})
    assert time.process_time() - began < 10  # comparing all with all takes minutes


@pytest.mark.parametrize("program", [reconstruct, encode, decode])
def test_several_processes_are_refused(program, od_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="WORLD_SIZE=2: .* start one process each"):
        run(program, film(tmp_path / "in.mp4", frames=1), tmp_path / "out", "--vae-path", od_folder)
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_done_is_one_clear_line_and_leaves_nothing(od_folder, tmp_path):
    given, flags = film(tmp_path / "in.mp4"), ("--vae-path", od_folder)
    (tmp_path / "there.mp4").write_bytes(b"mine")
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    before = sorted(p.name for p in tmp_path.iterdir())
    for words, message in (
        ((given, tmp_path / "there.mp4"), "there.mp4: there already; choose another name"),
        ((given, tmp_path / "out.webm"), r"out.webm: .mp4 \(H.264\) or .mkv"),
        ((tmp_path / "none.mp4", tmp_path / "out.mp4"), "none.mp4: no such file or folder"),
        ((tmp_path / "bad.mp4", tmp_path / "out.mp4"), "bad.mp4: not a readable video"),
    ):
        with pytest.raises(ValueError, match=message):
            run(reconstruct, *words, *flags)
    assert run(encode, given, tmp_path / "z.safetensors", *flags) == 0
    torch.manual_seed(1)
    build_vae("odvae", **OD).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="z.safetensors: encoded by another VAE"):
        run(decode, tmp_path / "z.safetensors", tmp_path / "out.mp4", "--vae-path", tmp_path / "other")
    with pytest.raises(ValueError, match="vae.*: not latents of pipelines.encode"):
        run(decode, next(od_folder.glob("*.safetensors")), tmp_path / "out.mp4", *flags)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([*before, "other", "z.safetensors"])
    assert (tmp_path / "there.mp4").read_bytes() == b"mine"


@pytest.mark.parametrize("program", [reconstruct, encode])
@pytest.mark.parametrize("out", ["in", "in/out", "in/deep/../out"])
def test_a_result_folder_inside_the_input_is_refused_and_nothing_is_written(
    program, out, od_folder, tmp_path
):
    film(tmp_path / "in" / "a.mp4", frames=2)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"lies in .*choose a folder of its own"):
        run(program, tmp_path / "in", tmp_path / out, "--vae-path", od_folder)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("stream", "5 of 9 frames decoded: these are the latents of another VAE"),
        ("4n", r"\d+ latent frames, \d+ needed for 9 frames"),
    ],
)
def test_latents_that_hold_fewer_frames_than_they_say_are_refused(kind, message):
    name, config = VAES[kind]
    vae, pixels = build_vae(name, **config), np.zeros((9, 16, 16, 3), np.uint8)
    video = encode_video(vae, pixels, 4)
    with pytest.raises(ValueError, match=message):
        decode_video(vae, replace(video, latents=video.latents[:, :-1]))


def test_what_is_no_video_is_refused_before_anything_is_encoded():
    vae = build_vae("odvae", **OD)
    good = np.zeros((16, 16, 3), np.uint8)
    with pytest.raises(ValueError, match="a video without frames"):
        encode_video(vae, [])
    for bad in (good.astype(np.float32), np.zeros((16, 24, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"frame 1: .*all frames are uint8"):
            encode_video(vae, [good, bad])


@pytest.mark.parametrize("program", [reconstruct, encode])
def test_results_of_another_vae_and_files_of_the_user_are_not_mixed_with_ours(program, od_folder, tmp_path):
    film(tmp_path / "in" / "a.mp4", frames=2)
    words = (tmp_path / "in", tmp_path / "out", "--vae-path")
    assert run(program, *words, od_folder) == 0
    torch.manual_seed(1)
    build_vae("odvae", **OD).save_pretrained(tmp_path / "other")
    film(tmp_path / "in" / "b.mp4", frames=2)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match="out: made with other settings"):
        run(program, *words, tmp_path / "other")
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("x")
    with pytest.raises(ValueError, match="mine: not empty and not made by"):
        run(program, tmp_path / "in", tmp_path / "mine", "--vae-path", od_folder)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["notes.txt"]
