"""The judges with their real networks, against the reference programs, on real clips. Run wherever both are."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.video import probe, read_frames
from eval.features import extract_features, i3d_extractor
from eval.fidelity import load_lpips, lpips_distance
from eval.fvd import distances
from vae.losses import LPIPSLoss

FROZEN = json.loads((Path(__file__).parent / "golden" / "eval_judges_real.json").read_text())


def windows(assets: Path, name: str) -> list[np.ndarray]:
    """The clips of a set, each (16, 240, 320, 3) uint8, by the reader that they were frozen with, and checked to be those."""
    decord = pytest.importorskip("decord", reason="not run: the frozen windows are decord's")
    clips = []
    for window in FROZEN["inputs"]["sets"][name]:
        file = assets / "ucf101" / "UCF-101" / window["file"]
        indices = range(window["start"], window["start"] + FROZEN["inputs"]["frames"])
        clip = decord.VideoReader(str(file), num_threads=1).get_batch(list(indices)).asnumpy()
        assert hashlib.sha256(clip.tobytes()).hexdigest() == window["sha256"], window
        clips.append(clip)
    return clips


@pytest.mark.timeout(1800)  # 96 clips through I3D: 140 CPU seconds
def test_fvd_and_kvd_of_real_clips_are_those_of_tats_own_code(assets, real_weights):
    i3d = i3d_extractor(real_weights, "cpu")
    assert i3d.provenance.known
    a, b = (extract_features(windows(assets, name), i3d) for name in "AB")
    frozen, found = FROZEN["reference"]["tats A B"], distances(a, b)
    assert found["FVD"] == pytest.approx(frozen["FVD_float64"], rel=1e-6)
    assert found["KVD"] == pytest.approx(frozen["KVD"], rel=1e-6)
    assert found["FVD"] == pytest.approx(frozen["FVD_float32_as_upstream"], rel=1e-4)
    frozen, found = FROZEN["reference"]["tats A A"], distances(a, a)
    assert found["FVD"] == pytest.approx(frozen["FVD_float64"], abs=1e-3)
    assert found["KVD"] == pytest.approx(frozen["KVD"], rel=1e-6)
    assert found["FVD"] == pytest.approx(frozen["FVD_float32_as_upstream"], abs=3)  # what float32 adds


@pytest.mark.parametrize(
    ("file", "name", "least"),
    [
        ("ucf101/UCF-101/BenchPress/v_BenchPress_g01_c01.avi", "bench pressing", 0.99),
        ("ucf101/UCF-101/Diving/v_Diving_g01_c01.avi", "springboard diving", 0.9),
        ("ucf101/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c01.avi", "filling eyebrows", 0.0),
        ("ucf101/UCF-101/ApplyEyeMakeup/v_ApplyEyeMakeup_g01_c03.avi", "applying cream", 0.9),
        ("web/flipping_a_pancake.mkv", "flipping pancake", 0.9),
        ("web/mmaction2_demo.mp4", "arm wrestling", 0.9),
    ],
)
def test_i3d_names_the_action_of_real_clips(file, name, least, assets, real_weights):
    start = (probe(assets / file).num_frames - 64) // 2
    clip = read_frames(assets / file, range(start, start + 64))
    logits = extract_features([clip], i3d_extractor(real_weights, "cpu", resize="short"))[0]
    probabilities = torch.from_numpy(logits).softmax(0)
    assert probabilities.argmax() == FROZEN["i3d_classes"][name]
    assert probabilities.max() >= least


def test_lpips_gives_its_authors_example_values_in_the_judge_and_in_the_loss(golden, real_weights):
    images = {n: np.asarray(Image.open(golden / f"eval_lpips_ex_{n}.png")) for n in ("ref", "p0", "p1")}
    network, provenance = load_lpips(real_weights)
    assert provenance.known
    loss = LPIPSLoss(network)
    tensors = {n: torch.from_numpy(v.copy()).permute(2, 0, 1)[None] / 127.5 - 1 for n, v in images.items()}
    for other, rounded in (("p0", 0.722), ("p1", 0.138)):
        frozen = FROZEN["lpips"]["alex"][f"ref,{other}"]
        assert frozen == pytest.approx(rounded, abs=5e-4)
        value = lpips_distance(images["ref"][None], images[other][None], network)
        assert value == pytest.approx(frozen, abs=1e-6)
        assert loss(tensors["ref"], tensors[other]).item() == pytest.approx(frozen, abs=2e-6)


def test_the_trunks_of_both_networks_are_known_and_give_different_distances(golden, real_weights):
    pair = [np.asarray(Image.open(golden / f"eval_lpips_ex_{n}.png"))[None] for n in ("ref", "p0")]
    values = {}
    for net in ("alex", "vgg"):
        network, provenance = load_lpips(real_weights, net=net)
        assert provenance.known
        assert provenance.tensors.startswith("all equal")
        values[net] = lpips_distance(*pair, network)
    assert values["vgg"] == pytest.approx(0.568613, abs=2e-6)  # by the reference package with the same trunk
    assert values["alex"] == pytest.approx(0.721881, abs=2e-6)
