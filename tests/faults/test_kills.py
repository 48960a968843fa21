"""The short form of `bash scripts/kill_test.sh`: real SIGKILLs, and an end equal to the bit."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).with_name("kills.py")


def survive(tmp_path, *arguments):
    out = tmp_path / "kills.json"
    done = subprocess.run([sys.executable, KILLS, "--out", out, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())["programs"]


def test_training_that_is_killed_again_and_again_ends_as_if_it_had_never_been(tmp_path):
    short = ["--kills", "4", "--saves", "2", "--steps", "12"]
    result = survive(tmp_path, *short, "--programs", "train_vae,train_latte")
    for program in ("train_vae", "train_latte"):
        assert result[program]["kills"] >= 4
        assert result[program]["inside"]["save"] >= 2
        assert result[program]["differences"] == []


@pytest.mark.slow
def test_caching_and_sampling_that_are_killed_end_as_if_they_had_never_been(tmp_path):
    result = survive(tmp_path, "--kills", "6", "--programs", "cache_latents,sample")
    assert [r["differences"] for r in result.values()] == [[], []]
