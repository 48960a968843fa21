"""What the demo says of its own models: the checks that learning is visible, scores, speeds, and the clips to show."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.clip import to_float, to_uint8
from data.progress import Progress
from data.video import read_frames
from denoiser.latte import Latte
from eval.extraction import Judged
from eval.features import extract_features, i3d_extractor
from eval.fidelity import load_lpips
from eval.fvd import distances, floor_text
from eval.fvd import score as judge_features
from eval.protocol import Protocol
from eval.weight_files import WEIGHT_FILES
from eval.weights import find_weights, open_weights
from pipelines.efficiency import encoder_speed
from pipelines.sample import file_name
from pipelines.train_vae import evaluate
from pipelines.training.distributed import draw_seed
from pipelines.training.log import read_metrics
from pipelines.training.open import open_clips
from pipelines.training.start import build_vae_model
from pipelines.video_pipeline import LatentVideoPipeline
from vae import load_vae

NUM_FRAMES = 16  # of a clip that is scored: one window of I3D
PSNR_GAIN = 6.0  # dB that training must add on held-out clips
ERROR_RATIO = 0.4  # of the noise's error in the first log window, at most
# Of the way from the untrained generator's FVD to that of the VAE alone, the best on its latents.
FVD_WAY = 0.4
FVD_RATIO = 0.5  # of the untrained generator's random-feature distance, at most
Rows = list[tuple[str, ...]]


@dataclass
class Outcome:
    """Rows of tables, and clips uint8 (T, H, W, 3)."""

    checks: Rows  # name, untrained -> trained, rule, "pass", "fail" or "not judged"
    scores: Rows  # name, value, how it was made
    speeds: Rows
    decoded: np.ndarray  # original | reconstruction | error, of held-out clips
    real: list[np.ndarray]
    fake: list[np.ndarray]
    class_names: list[str]


def weights_of(kind: str) -> Path | None:
    """The file of a judging network, None when it is not there. ValueError for a file that cannot be used."""
    try:
        path = find_weights(kind)
    except ValueError:
        return None
    open_weights(kind, path)
    return path


def untrained_samples(samples: Any, seed: int, count: int) -> list[np.ndarray]:
    """The same pipeline with a freshly initialised denoiser: what the trained one is compared with."""
    pipe = LatentVideoPipeline.from_pretrained(samples.pipeline)
    torch.manual_seed(seed)
    fresh = Latte.from_config(pipe.transformer.config).eval()
    pipe = LatentVideoPipeline(vae=pipe.vae, transformer=fresh, class_names=pipe.config.class_names)
    seeds = [draw_seed(samples.seed, i) for i in range(count)]
    pipe.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": samples.num_steps, "sampler": samples.sampler, "output_type": "video"}
    return list(to_uint8(pipe(num_videos=count, seeds=seeds, **call).frames))


def reached(untrained: float, trained: float, best: float) -> float:
    """How far a trained generator has come: 0 where it began, 1 at the best value that its VAE allows."""
    return (untrained - trained) / (untrained - best)


def score(sets: dict[str, list[np.ndarray]], numbers: np.ndarray) -> tuple[dict[str, dict], Protocol, Any]:
    """`eval.fvd.score` of the generated videos with the distances of the other sets, the protocol, the provenance.

    sets: "fake", "untrained" and "decoded", N clips each; "real", of the videos `numbers`, those beyond the first N
    are for the floor. Without weights a random I3D, named so.
    """
    # Features of all sets, by one network
    i3d, num = i3d_extractor(weights_of("i3d") or "random:0"), len(sets["fake"])
    features = {}
    with Progress(sum(map(len, sets.values())), "I3D", "clip") as bar:
        for name, clips in sets.items():
            features[name] = extract_features([c[:NUM_FRAMES] for c in clips], i3d, on_batch=bar.update)
    # The score of the generated videos, as the judge itself would give it
    fakes = np.arange(num)
    real, fake = Judged(features["real"], numbers, numbers, {}), Judged(features["fake"], fakes, fakes, {})
    frames, height, width, _ = sets["fake"][0].shape
    protocol = Protocol(num_videos=num, num_frames=min(frames, NUM_FRAMES), size=(height, width))
    found = judge_features(real, fake, protocol)
    # What it is compared with: the untrained generator, and the VAE alone
    for name in ("untrained", "decoded"):
        for metric, value in distances(features["real"][:num], features[name]).items():
            found[metric][name] = value
    return found, protocol, i3d.provenance


def score_rows(found: dict[str, dict], protocol: Protocol, provenance: Any) -> Rows:
    """FVD and KVD with interval, floor and protocol, what the VAE alone costs, and why there is no IS."""
    # FVD and KVD, with what is needed to read them
    rows, size = [], "x".join(map(str, protocol.size))
    for metric, values in found.items():
        name, interval = provenance.metric_name(metric), values["interval"]
        low, high = interval["low"], interval["high"]
        how = f"95 % [{low:.1f}, {high:.1f}], floor {floor_text(values['floor'])}, {size} px"
        how += f", {protocol.label(metric.lower())}, protocol {protocol.title()}, I3D {provenance.file}"
        rows.append((name, f"{values['value']:.1f}", how))
        rows.append(
            (f"{name} of the VAE alone", f"{values['decoded']:.1f}", "real clips, encoded and decoded")
        )
    # IS needs weights that the demo does not fetch.
    official = WEIGHT_FILES["c3d"]
    missing = f"{official.network} weights are missing: {official.file} is at {official.source}"
    path = weights_of("c3d")
    reason = f"{path} is there: bash scripts/evaluate.sh measures it" if path else missing
    return [*rows, ("IS", "not run", reason)]


def lpips_row(value: float | None, weights: Any, how: str) -> tuple[str, ...]:
    if value is None:
        return "LPIPS", "not run", "AlexNet weights are missing: bash scripts/fetch_weights.sh gets them"
    return weights.metric_name("LPIPS"), f"{value:.4f}", f"AlexNet, {weights.file}, {how}"


def logged(config: Any, name: str) -> list[float]:
    """The values of a metric in the log of a training."""
    return [record[name] for record in read_metrics(Path(config.run_dir)) if name in record]


def speed_rows(vae: Any, *trainings: Any) -> Rows:
    """TSpeed and TMem of the trainings and CSpeed, with what they were measured on."""
    # Each training's own record
    rows: Rows = []
    for config in trainings:
        found = json.loads((Path(config.run_dir) / "efficiency.json").read_text())
        speed = f"{found['tspeed']:.3f} it/s" if found["tspeed"] else "not measured (too few steps)"
        memory = found["tmem"]["device_mib"]
        memory = f"{memory:,.0f} MiB" if memory else "not measured, no GPU here"
        size = " x ".join(map(str, (config.clip.num_frames, config.clip.size, config.clip.size)))
        how = f"mode {found['mode']}, global batch {found['global_batch']}, {size}; TMem {memory}"
        rows.append((f"TSpeed, {found['program']}", speed, how))
    # The encoder alone, on a clip of the first stage's size
    clip = torch.zeros(1, 3, trainings[0].clip.num_frames, trainings[0].clip.size, trainings[0].clip.size)
    found = encoder_speed(lambda x: vae.encode(x).latent_dist.mode(), clip, warmup=1, repeats=3)
    how = f"encoder, {' x '.join(map(str, clip.shape))}, {found['dtype']}, {found['device']}"
    return [*rows, ("CSpeed", f"{found['batches_per_s']:.3f} it/s", how)]


def judge(stage_one: Any, latte: Any, samples: Any, num: int, short: bool) -> Outcome:
    """Score `num` videos of each kind. The settings: of stage one, stage two and sampling.

    real: one window of each training video in turn. The VAE is judged on held-out clips, and its own FVD on those real
    clips that give the floor.
    """
    # Reconstruction: the trained VAE and an untrained one on held-out clips.
    vae = load_vae("odvae", latte.vae.path)
    network, weights = load_lpips() if weights_of("alexnet") else (None, None)
    still = replace(stage_one.clip, position="center")
    held_out = open_clips(stage_one.source, still, 0, held_out=True)
    torch.manual_seed(stage_one.seed)
    where = held_out, stage_one.val_videos, torch.device("cpu")
    before = evaluate(build_vae_model(stage_one), *where)[0]["val/psnr"]
    after, picture = evaluate(vae, *where, network)
    tail = logged(stage_one, "val/psnr")[0]

    # Four sets of clips: real, generated, real through the VAE, and generated by an untrained network.
    clips = open_clips(latte.source, latte.clip, latte.seed)
    numbers = np.arange(min(max(num, len(clips)), 2 * num)) % len(clips)
    rng = np.random.default_rng(latte.seed)
    real = [clips.clip_uint8(i, rng) for i in numbers]
    frames = range(latte.clip.num_frames)
    fake = [read_frames(samples.folder / file_name(i), frames) for i in range(samples.num_videos)]
    with torch.inference_mode():
        decoded = []
        for clip in real[-num:]:
            z = vae.encode(to_float(clip)[None]).latent_dist.mode()
            decoded.append(to_uint8(vae.decode(z).sample)[0])
    sets = {"real": real, "fake": fake[:num], "decoded": decoded}
    sets["untrained"] = untrained_samples(samples, latte.seed, num)
    found, protocol, i3d = score(sets, numbers)

    def check(name: str, before: float, after: float, rule: str, good: bool) -> tuple:
        verdict = "not judged (--short)" if short else "pass" if good else "fail"
        return name, f"{before:.2f} -> {after:.2f}", rule, verdict

    # Is learning visible? One check each for the VAE, the denoiser and both together.
    psnr, fvd = after["val/psnr"], found["FVD"]
    rule, good = f"at least +{PSNR_GAIN:g}", psnr - before >= PSNR_GAIN
    checks = [check("held-out PSNR of the VAE, dB", before, psnr, rule, good)]
    error = logged(latte, "loss/mse")
    last, rule = float(np.mean(error[-5:])), f"at most {ERROR_RATIO:g} x the first"
    checks += [check("error of the predicted noise", error[0], last, rule, last <= ERROR_RATIO * error[0])]
    if weights_of("i3d"):
        rule = f"{FVD_WAY:.0%} of the way to the VAE alone"
        good = reached(fvd["untrained"], fvd["value"], fvd["decoded"]) >= FVD_WAY
    else:
        rule = f"at most {FVD_RATIO:g} x untrained"
        good = fvd["value"] <= FVD_RATIO * fvd["untrained"]
    checks += [check(i3d.metric_name("FVD"), fvd["untrained"], fvd["value"], rule, good)]
    # The rows of the page: each number with what it was measured on.
    how = f"{min(stage_one.val_videos, len(held_out))} held-out clips, posterior mean, in memory on uint8"
    scores = score_rows(found, protocol, i3d)
    scores += [("PSNR at tail initialization", f"{tail:.2f} dB", "the same held-out clips, before stage one")]
    scores += [("PSNR", f"{psnr:.2f} dB", how), ("SSIM", f"{after['val/ssim']:.4f}", how)]
    scores += [lpips_row(after.get("val/lpips"), weights, how)]
    rows = speed_rows(vae, stage_one, latte)
    return Outcome(checks, scores, rows, picture, real, fake, list(clips.class_names))
