"""The judges as programs: from any folder, uninstalled, light --help, errors are one line, honest records."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.encode import write_ffv1
from eval.fidelity import main as fidelity_main
from eval.fvd import fvd_of_clips
from eval.fvd import main as fvd_main
from eval.inception_score import main as is_main
from pipelines.scores import main as report_main

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("fvd", "inception_score", "fidelity", "check_weights", "fetch_weights")


def video(seed: int, T: int, side: int = 24) -> np.ndarray:
    """A drifting gradient with noise: different in each video."""
    rng = np.random.default_rng(seed)
    x = np.arange(side)[None, :, None, None] + np.arange(side)[None, None, :, None] * rng.random()
    x = x * 4 + np.arange(T)[:, None, None, None] * 6 + rng.integers(0, 80, (T, side, side, 3))
    return (x % 256).astype(np.uint8)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("OMNILATTE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("videos")
    for n in range(4):
        write_ffv1(root / "real" / f"class{n % 2}" / f"{n}.mkv", video(n, 20), fps=8)
        write_ffv1(root / "fake" / f"{n}.mkv", video(100 + n, 9), fps=8)
    return root


def execute(program: str, *arguments: str, cwd: Path, **env: str) -> subprocess.CompletedProcess:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | env
    command = [sys.executable, str(ROOT / "eval" / f"{program}.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_works_from_any_folder_without_torch(program, tmp_path):
    (tmp_path / "torch.py").write_text("raise SystemExit('torch was imported by --help')\n")
    done = execute(program, "--help", cwd=tmp_path, PYTHONPATH=str(tmp_path))
    assert done.returncode == 0, done.stderr + done.stdout
    assert ("--fake" if program in ("fvd", "inception_score", "fidelity") else "usage") in done.stdout


@pytest.mark.parametrize(
    ("program", "file"),
    [
        ("fvd", "i3d_pretrained_400.pt"),
        ("inception_score", "conv3d_deepnetA_ucf.npz"),
        ("fidelity", "--no-lpips"),
    ],
)
def test_missing_weights_are_one_line_and_exit_code_2(program, file, folders, tmp_path):
    real = () if program == "inception_score" else ("--real", str(folders / "fake"))
    done = execute(program, *real, "--fake", str(folders / "fake"), cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert file in done.stderr


def fvd_arguments(folders, *more: str) -> list[str]:
    real, fake = str(folders / "real"), str(folders / "fake")
    return [
        "--real",
        real,
        "--fake",
        fake,
        "--num-frames",
        "9",
        "--weights",
        "random:0",
        "--device",
        "cpu",
        "--workers",
        "0",
        *more,
    ]


def test_fvd_of_random_features_is_labelled_everywhere_and_equals_the_library(folders, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    fvd_main(fvd_arguments(folders, "--num-videos", "4", "--position", "start", "--out", str(out)))
    printed = capsys.readouterr().out
    assert "random-feature FVD (I3D, seed 0) " in printed
    assert "random-feature KVD (I3D, seed 0) " in printed
    assert not any(line.startswith(("FVD", "KVD")) for line in printed.splitlines())
    assert "N = 4 < 2048" in printed
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert [r["metric"] for r in records] == [
        "random-feature FVD (I3D, seed 0)",
        "random-feature KVD (I3D, seed 0)",
    ]
    fvd = records[0]
    assert fvd["label"] == "fvd4_9f"
    assert fvd["weights"]["seed"] == 0
    assert fvd["protocol"]["size"] == [24, 24]
    assert (fvd["real"]["clips"], fvd["real"]["short"], fvd["fake"]["storage"]) == (4, 0, "lossless")
    assert fvd["interval"]["low"] <= fvd["value"] <= fvd["interval"]["high"]
    assert (fvd["floor"]["num_videos"], fvd["floor"]["same_num_videos"]) == (2, False)  # only 4 real videos
    assert "floor, real against real" in printed
    assert "fewer clips than the number's, so a larger bias" in printed
    assert len(fvd["fake"]["files_sha256"]) == 64
    assert fvd["versions"]["torch"]
    from eval.features import i3d_extractor

    real, fake = [video(n, 20)[:9] for n in range(4)], [video(100 + n, 9) for n in range(4)]
    values = fvd_of_clips(real, fake, i3d_extractor("random:0", "cpu"), batch_size=3)
    for record in records:
        assert values[record["metric"]] == pytest.approx(record["value"], rel=1e-4)


def test_a_folder_against_itself_scores_zero(folders, capsys):
    arguments = fvd_arguments(folders, "--num-videos", "2")
    arguments[1] = arguments[3]
    fvd_main(arguments)
    printed = capsys.readouterr().out
    assert float(printed.split()[5]) == pytest.approx(0.0, abs=1e-8)
    assert "at N = 2 (the same N)" in printed


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--num-videos", "9"), r"4 clips, 9 needed.*--num-videos 4"),
        (("--num-videos", "2", "--real-interval", "3"), r"/real: 0 clips, 2 needed .*shorter than 25 frames"),
        (("--num-videos", "1"), "at least 2"),
    ],
)
def test_what_cannot_be_compared_is_an_error_with_a_way_out(folders, more, message):
    with pytest.raises(ValueError, match=message):
        fvd_main(fvd_arguments(folders, *more))


def test_inception_score_of_random_features_is_labelled_and_recorded(tmp_path, capsys):
    np.save(tmp_path / "fakes.npy", np.stack([video(n, 16) for n in range(3)]))
    out = tmp_path / "scores.jsonl"
    arguments = [
        "--fake",
        str(tmp_path / "fakes.npy"),
        "--num-videos",
        "3",
        "--splits",
        "1",
        "--weights",
        "random:5",
        "--out",
        str(out),
    ]
    is_main([*arguments, "--device", "cpu"])
    assert capsys.readouterr().out.startswith("random-feature IS (C3D, seed 5) ")
    (record,) = (json.loads(line) for line in out.read_text().splitlines())
    assert record["label"] == "is3_16f_splits1"
    assert record["interval"]["low"] <= record["value"] <= record["interval"]["high"]
    assert record["metric"] == "random-feature IS (C3D, seed 5)"
    assert 1.0 < record["value"] <= 3.0
    assert record["fake"]["clips"] == 3


def test_fidelity_prints_psnr_ssim_and_labelled_lpips(folders, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    for n in range(2):
        write_ffv1(tmp_path / "real" / f"{n}.mkv", video(n, 5), fps=8)
        noisy = np.clip(video(n, 5).astype(int) + 3, 0, 255).astype(np.uint8)
        write_ffv1(tmp_path / "fake" / f"{n}.mkv", noisy, fps=8)
    sides = ["--real", str(tmp_path / "real"), "--fake", str(tmp_path / "fake")]
    fidelity_main([*sides, "--no-lpips"])
    printed = capsys.readouterr().out
    assert "LPIPS" not in printed
    assert printed.startswith("PSNR 38.")
    fidelity_main(
        [
            *sides,
            "--weights",
            "random:0",
            "--size",
            "64",
            "--num-frames",
            "2",
            "--device",
            "cpu",
            "--out",
            str(out),
        ]
    )
    records = {r["metric"]: r for r in map(json.loads, out.read_text().splitlines())}
    assert set(records) == {"PSNR", "SSIM", "random-feature LPIPS (AlexNet, seed 0)"}
    assert set(records["PSNR"]["per_video"]) == {"0.mkv", "1.mkv"}
    with pytest.raises(ValueError, match="no partner"):
        fidelity_main(["--real", str(folders / "real"), "--fake", str(tmp_path / "fake"), "--no-lpips"])


def test_each_protocol_runs_and_names_itself_and_what_was_changed(folders, tmp_path, capsys):
    out, values = tmp_path / "scores.jsonl", {}
    for protocol in ("omnilatte", "tats", "stylegan-v", "videogpt"):
        more = ("--protocol", f"{protocol}/fvd2_9f", "--floor", "half", "--size", "20x30", "--out", str(out))
        fvd_main([a for a in fvd_arguments(folders, *more) if a not in ("--num-frames", "9")])
        record = json.loads(out.read_text().splitlines()[-2])
        assert (record["protocol"]["name"], record["label"], record["protocol"]["overrides"]) == (
            protocol,
            "fvd2_9f",
            {},
        )
        values[protocol] = record["value"]
    assert len(set(values.values())) == 4  # other knobs, other numbers
    capsys.readouterr()
    fvd_main(fvd_arguments(folders, "--protocol", "tats", "--num-videos", "2", "--ddof", "0"))
    assert "protocol tats with ddof=0" in capsys.readouterr().out


def test_longer_samples_are_judged_in_part_and_that_is_said(tmp_path, folders, capsys):
    np.save(tmp_path / "fakes.npy", np.stack([video(n, 81) for n in range(2)]))
    arguments = fvd_arguments(folders, "--num-videos", "2")
    arguments[3] = str(tmp_path / "fakes.npy")
    fvd_main(arguments)
    assert "fake videos have up to 81 frames, clips cover 9" in capsys.readouterr().out


def test_samples_of_several_sizes_are_judged_at_one_and_that_is_said(tmp_path, folders, capsys):
    for n, side in enumerate((32, 24)):
        np.save(tmp_path / f"{n}.npy", video(n, 9, side))
    arguments = fvd_arguments(folders, "--num-videos", "2")
    arguments[3] = str(tmp_path)
    arguments += ["--no-cache"]
    fvd_main(arguments)
    assert "differ in size" in (printed := capsys.readouterr().out)
    assert "24x24" in printed
    assert "32x32" in printed
    assert "all judged at 32x32" in printed


def test_the_cache_inside_the_videos_is_refused(folders):
    with pytest.raises(ValueError, match="choose a folder outside"):
        fvd_main(fvd_arguments(folders, "--num-videos", "2", "--cache-dir", str(folders / "fake" / "cache")))


@pytest.mark.slow
def test_one_two_and_three_processes_give_the_same_digits(folders, tmp_path):
    for world in (1, 2, 3):
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
        arguments = fvd_arguments(
            folders, "--num-videos", "4", "--batch-size", "1", "--no-cache", "--workers", "1"
        )
        command = [sys.executable, *launch, str(ROOT / "eval" / "fvd.py"), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        more = ["--out", str(tmp_path / "scores.jsonl")]
        done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("random-feature FVD") == 1  # one process speaks
    records = [json.loads(line) for line in (tmp_path / "scores.jsonl").read_text().splitlines()]
    assert [r["processes"] for r in records] == [1, 1, 2, 2, 3, 3]
    for key in ("value", "interval", "floor", "real", "fake"):
        assert records[0][key] == records[2][key] == records[4][key]
        assert records[1][key] == records[3][key] == records[5][key]


RECORD = {"metric": "FVD", "value": 1300.5, "protocol": {"name": "tats", "num_videos": 2048, "overrides": {}}}


def test_the_report_puts_the_papers_number_beside_ours_and_never_beside_a_random_one(tmp_path, capsys):
    records = [
        {
            **RECORD,
            "tag": "ucf101/OD-VAE",
            "floor": {"value": 6.5, "num_videos": 1024, "same_num_videos": False},
        },
        {**RECORD, "metric": "random-feature FVD (I3D, seed 0)", "tag": "ucf101/OD-VAE"},
        {**RECORD, "tag": "<b>|mine"},
    ]
    path = tmp_path / "scores.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    report_main([str(path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| metric | tag | ours |")
    assert "| 1300.5000 |  | 6.5000 (N = 1024) | 1315.1300 |" in lines[2]
    assert "1315" not in "".join(lines[3:])
    for form in ("csv", "html"):
        report_main([str(path), "--out", str(tmp_path / f"scores.{form}")])
    rows = list(csv.DictReader((tmp_path / "scores.csv").open()))
    assert [row["paper"] for row in rows] == ["1315.1300", "", ""]
    assert rows[2]["tag"] == "<b>|mine"
    assert "&lt;b&gt;|mine" in (tmp_path / "scores.html").read_text()


def test_records_of_every_judge_are_rendered(folders, tmp_path, capsys):
    out = tmp_path / "scores.jsonl"
    fvd_main(fvd_arguments(folders, "--num-videos", "2", "--out", str(out), "--tag", "mine"))
    sides = ["--real", str(folders / "fake"), "--fake", str(folders / "fake")]
    fidelity_main([*sides, "--no-lpips", "--size", "16x20", "--out", str(out)])
    capsys.readouterr()
    report_main([str(out)])
    printed = capsys.readouterr().out
    assert "| random-feature KVD (I3D, seed 0) | mine |" in printed
    assert "| PSNR |  | 100.0000 |" in printed
    assert "real lossless, fake lossless" in printed


@pytest.mark.parametrize(
    ("text", "message"),
    [("", "no records"), ("{", r"s\.jsonl:1: not JSON"), ("[1]", "not a record of a judge")],
)
def test_what_is_no_record_is_refused_with_its_line(tmp_path, text, message):
    (tmp_path / "s.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        report_main([str(tmp_path / "s.jsonl")])
    with pytest.raises(ValueError, match="give --format"):
        report_main([str(tmp_path / "s.jsonl"), "--out", "report.pdf"])


@pytest.mark.parametrize("side", ["real", "fake"])
def test_the_interval_of_each_side_is_its_own(side, folders, tmp_path):
    from eval.features import i3d_extractor

    out = tmp_path / "scores.jsonl"
    more = ("--num-videos", "4", "--position", "start", "--floor", "half", "--out", str(out))
    arguments = fvd_arguments(folders, *more, f"--{side}-interval", "2")
    if side == "fake":  # the longer videos take the interval
        arguments[1], arguments[3] = arguments[3], arguments[1]
    fvd_main(arguments)
    record = json.loads(out.read_text().splitlines()[0])
    long, short = [video(n, 20)[:17:2] for n in range(4)], [video(100 + n, 9) for n in range(4)]
    sides = (long, short) if side == "real" else (short, long)
    values = fvd_of_clips(*sides, i3d_extractor("random:0", "cpu"))
    assert record["value"] == pytest.approx(values[record["metric"]], rel=1e-4)
    assert record["label"] == ("fvd4_9f_step2" if side == "real" else "fvd4_9f_fakestep2")


def test_real_clips_are_cut_at_the_rate_of_the_training_whatever_their_own(tmp_path):
    """Videos of 24 and 16 frames a second are, at 8, frame by frame those of the other side: no distance."""
    for n in range(4):
        frames, times = video(n, 9), (3, 2)[n % 2]
        write_ffv1(tmp_path / "fake" / f"{n}.mkv", frames, fps=8)
        between = np.repeat(frames, times, axis=0)
        between[1::times] = 0  # what a clip of 8 frames a second does not show
        write_ffv1(tmp_path / "real" / f"{n}.mkv", between, fps=8 * times)
    found = {}
    for fps in ((), ("--real-fps", "8")):
        out = tmp_path / f"scores{len(fps)}.jsonl"
        more = ("--num-videos", "4", "--position", "start", "--floor", "half", "--out", str(out), *fps)
        fvd_main(fvd_arguments(tmp_path, *more))
        record = json.loads(out.read_text().splitlines()[0])
        found[record["label"]] = record["value"]
        assert record["protocol"]["real_fps"] == (8.0 if fps else None)
    assert found["fvd4_9f_8fps"] < 1e-3 * found["fvd4_9f"]
    with pytest.raises(
        ValueError, match=r"1.mkv cannot be shown at 20 frames a second: it has 16 .*--real-fps"
    ):
        fvd_main(fvd_arguments(tmp_path, "--num-videos", "4", "--real-fps", "20"))
    np.save(tmp_path / "arrays.npy", np.stack([video(n, 9) for n in range(4)]))
    arrays = fvd_arguments(tmp_path, "--num-videos", "4", "--real-fps", "8")
    arrays[1] = str(tmp_path / "arrays.npy")
    with pytest.raises(ValueError, match="an array file has no rate"):
        fvd_main(arrays)
    with pytest.raises(ValueError, match="real_fps=0.0: frames a second, above 0"):
        fvd_main(fvd_arguments(tmp_path, "--real-fps", "0"))


@pytest.mark.parametrize("judge", [fvd_main, is_main, fidelity_main])
def test_no_record_is_added_to_a_file_of_the_users_own(judge, folders, tmp_path):
    notes, fake = tmp_path / "notes.txt", str(folders / "fake")
    notes.write_text("my notes\n")
    words = ["--no-lpips"] if judge is fidelity_main else ["--weights", "random:0"]
    words += [] if judge is is_main else ["--real", fake]
    with pytest.raises(ValueError, match=r"notes\.txt: holds something else and would be lost"):
        judge([*words, "--fake", fake, "--out", str(notes)])
    assert notes.read_text() == "my notes\n"
