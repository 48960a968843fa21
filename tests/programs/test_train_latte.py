import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from data.clip import ClipSpec
from data.latents import LatentCache
from data.video import probe
from denoiser.diffusion import GaussianDiffusion
from pipelines import cache_latents, train_latte
from pipelines.train_latte import LatteTrainer, TrainLatteConfig
from pipelines.training import distributed
from pipelines.training.checkpoints import Checkpoints
from pipelines.training.config import load
from pipelines.training.latents import real_clips
from pipelines.training.open import open_clips
from pipelines.training.settings import SourceConfig


@pytest.fixture
def stage_two(latte_settings, own_vae, tmp_path):
    """cache and train on the same settings, as scripts/stage2_latte.sh does."""

    def go(name, *more, cache=True):
        run = tmp_path / name
        common = [
            f"vae.path={own_vae}",
            f"cache.dir={tmp_path / 'cache'}",
            f"source.index_dir={tmp_path / 'index'}",
        ]
        settings = [*latte_settings, *common, f"run_dir={run}", *more]
        if cache:
            cache_latents.main(settings)
        train_latte.main(settings)
        return run

    return go


def weights(run, step, name="latte"):
    return load_file(run / "checkpoints" / f"step_{step:08d}" / name / "diffusion_pytorch_model.safetensors")


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def records(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_resumed_training_equals_uninterrupted_to_the_bit(stage_two, tmp_path):
    whole = stage_two("whole", "steps=6", "save_every=3", "log_every=2")
    parts = tmp_path / "parts"
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step_00000006")  # as if killed between steps 3 and 6
    stage_two("parts", "steps=6", "save_every=3", "log_every=2", cache=False)
    for name in ("latte", "latte_ema"):
        assert equal(weights(whole, 6, name), weights(parts, 6, name))
    states = [
        torch.load(r / "checkpoints/step_00000006/trainer.pt", weights_only=True) for r in (whole, parts)
    ]
    moments = [s.pop("optimizer")["state"] for s in states]
    assert states[0] == states[1]
    assert all(equal(a, b) for a, b in zip(moments[0].values(), moments[1].values(), strict=True))
    assert records(whole) == records(parts)
    assert not equal(weights(whole, 6), weights(parts, 3))


def test_accumulated_small_batches_train_as_one_large_batch(stage_two, tmp_path):
    def curve(name, *more):
        return [r[k] for r in records(stage_two(name, "steps=3", *more)) for k in ("loss", "grad_norm")]

    large = curve("large", "micro_batch=4")
    assert curve("small", "micro_batch=1") == pytest.approx(large, rel=1e-5)
    assert curve(
        "other", "micro_batch=4", "seed=1", f"cache.dir={tmp_path / 'other-cache'}"
    ) != pytest.approx(large, rel=1e-3)


def test_first_loss_is_that_of_a_network_which_predicts_zero(stage_two):
    first = records(stage_two("run", "steps=1", "global_batch=64", "micro_batch=64"))[0]
    assert first["loss/mse"] == pytest.approx(1.0, abs=0.03)  # E[noise^2]
    assert 0.0 < first["loss/vb"] < 0.3


def test_cached_moments_equal_a_fresh_encode(stage_two, own_vae, tmp_path, latte_settings):
    import numpy as np

    from pipelines.training.latents import cached_clips
    from vae import load_vae

    stage_two("run", "steps=1", "cache.flips=true")
    settings = [*latte_settings, "cache.flips=true", f"source.index_dir={tmp_path / 'index'}"]
    config = load(TrainLatteConfig, None, settings)
    clips, cache, vae = cached_clips(config), LatentCache(tmp_path / "cache"), load_vae(own_vae)
    assert len(cache) == 8 * 2 * 2
    for row in (0, 5, 11, 31):
        entry = cache[row]
        assert (entry["video"], entry["draw"]) == divmod(row, 4)
        crop, mirrored = divmod(entry["draw"], 2)
        pixels = clips.clip_uint8(entry["video"], np.random.default_rng((config.seed, entry["video"], crop)))
        pixels = pixels[:, :, ::-1] if mirrored else pixels
        x = torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2).float()[None] / 127.5 - 1
        with torch.inference_mode():
            posterior = vae.encode(x).latent_dist
        assert torch.allclose(entry["mean"], posterior.mean[0], atol=1e-6)
        assert torch.allclose(entry["logvar"], posterior.logvar[0], atol=1e-5)
        assert entry["label"] == clips.label(entry["video"])


def test_statistics_of_a_vae_without_a_scaling_rule_are_kept_by_the_cache_and_the_run_and_its_folder_is_left_alone(
    stage_two, own_vae, tmp_path
):
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in own_vae.iterdir()}
    for path in own_vae.iterdir():
        path.chmod(0o444)
    own_vae.chmod(0o555)
    stage_two("run", "steps=1", "save_every=1")
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in own_vae.iterdir()} == before
    config = json.loads((tmp_path / "run" / "pipeline" / "vae" / "config.json").read_text())
    known = Checkpoints(tmp_path / "run").manifest(1)["normalization"]
    assert {k: config[k] for k in known} == known
    cache = LatentCache(tmp_path / "cache")
    entries = [cache[i] for i in range(len(cache))]
    mean, var = (
        torch.stack([f(e) for e in entries]).double()
        for f in (lambda e: e["mean"], lambda e: e["logvar"].exp())
    )
    axes = (0, 2, 3, 4)
    assert config["latents_mean"] == pytest.approx(mean.mean(axes).tolist(), abs=1e-6)
    total = (mean.square() + var).mean(axes) - mean.mean(axes).square()
    assert config["latents_std"] == pytest.approx(total.sqrt().tolist(), abs=1e-6)


def test_training_without_a_scaling_rule_is_refused_with_the_way_out(stage_two):
    with pytest.raises(ValueError, match="no scaling rule .*cache_latents"):
        stage_two("run", "steps=1", "mode=online", cache=False)


def test_a_cache_of_other_clips_is_refused_with_the_difference(stage_two):
    stage_two("run", "steps=1")
    with pytest.raises(ValueError, match=r"clip.num_frames: 9 in the cache, 5 asked for"):
        stage_two("other", "steps=1", "clip.num_frames=5", cache=False)


@pytest.mark.parametrize("setting", ["source.demo_seed=1", "source.demo_edge=0.2"])
def test_a_cache_of_another_demo_world_is_refused(stage_two, setting):
    stage_two("run", "steps=1")
    with pytest.raises(ValueError, match="the cache"):
        stage_two("other", "steps=1", setting, cache=False)


def test_a_cache_of_another_vae_is_refused(stage_two, own_vae):
    stage_two("run", "steps=1")
    from vae import ODVAE

    vae = ODVAE.from_pretrained(own_vae)
    with torch.no_grad():
        vae.decoder.conv_out.conv.bias.add_(1)
    vae.save_pretrained(own_vae)
    with pytest.raises(ValueError, match=r"vae.weights_sha256"):
        stage_two("other", "steps=1", cache=False)


def test_missing_and_incomplete_caches_say_what_to_do(stage_two, tmp_path):
    with pytest.raises(ValueError, match="not a latent cache .*cache_latents"):
        stage_two("run", "steps=1", cache=False)
    stage_two("run", "steps=1")
    index = tmp_path / "cache" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"complete": False}))
    with pytest.raises(ValueError, match="not complete; run the same cache_latents command"):
        stage_two("run2", "steps=1", cache=False)


def test_interrupted_caching_goes_on_and_ends_with_the_same_bytes(stage_two, tmp_path, monkeypatch):
    stage_two("run", "steps=1")
    whole = {p.name: p.read_bytes() for p in (tmp_path / "cache").glob("*.safetensors")}
    assert len(whole) == 3  # 16 entries in shards of 6
    (tmp_path / "cache" / "latents-00001.json").unlink()  # killed after the shard, before its record
    (tmp_path / "cache" / "latents-00002.safetensors").unlink()
    (tmp_path / "cache" / "latents-00002.json").unlink()
    index = tmp_path / "cache" / "index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"complete": False}))
    stage_two("run2", "steps=1")
    assert {p.name: p.read_bytes() for p in (tmp_path / "cache").glob("*.safetensors")} == whole


@pytest.mark.parametrize("workers", [0, 2])
def test_both_mirrored_draws_come_from_one_reading_and_workers_change_no_byte(
    workers, latte_settings, own_vae, tmp_path, monkeypatch
):
    settings = [*latte_settings, f"vae.path={own_vae}", "cache.flips=true", "cache.batch=3"]

    def cache(name, *more):
        cache_latents.main([*settings, f"cache.dir={tmp_path / name}", *more])
        return {f.name: f.read_bytes() for f in (tmp_path / name).glob("latents-*.safetensors")}

    from data.dataset import VideoClips

    jobs, job = [], VideoClips.clip_job
    monkeypatch.setattr(VideoClips, "clip_job", lambda self, n, rng: jobs.append(n) or job(self, n, rng))
    one = cache("one", f"workers={workers}")
    assert len(jobs) == 16  # 8 videos, 2 crops; a mirrored draw of each
    assert one == cache("other", "workers=1", "cache.batch=1")
    rows = LatentCache(tmp_path / "one")
    assert not torch.equal(rows[0]["mean"], rows[1]["mean"])
    assert len(rows) == 32


def test_a_damaged_shard_is_named_when_it_is_read(stage_two, tmp_path):
    stage_two("run", "steps=1")
    shard = tmp_path / "cache" / "latents-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 4
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"latents-00001.safetensors is damaged"):
        LatentCache(tmp_path / "cache")[7]
    assert len(list(LatentCache(tmp_path / "cache").verify())) == 1


def test_online_and_cached_training_both_run_and_say_which(stage_two):
    cached = stage_two("cached", "steps=2")
    online = stage_two("online", "steps=2", "mode=online", cache=False)
    modes = [json.loads((run / "efficiency.json").read_text())["mode"] for run in (cached, online)]
    assert modes == ["cached", "online"]


def test_discrete_vaes_are_refused(latte_settings, tmp_path, monkeypatch):
    from pipelines.training import open as settings

    class Codes:
        discrete = True

    monkeypatch.setattr("pipelines.training.open.load_vae", lambda *_: Codes())
    with pytest.raises(ValueError, match="vae.name=tats: its latents are discrete"):
        settings.open_vae(load(TrainLatteConfig, None, ["vae.name=tats"]).vae)


def test_exported_pipeline_holds_the_ema_weights_and_the_class_names(stage_two):
    from pipelines.video_pipeline import LatentVideoPipeline

    run = stage_two("run", "steps=2", "save_every=2", "samples.every=2", "samples.steps=3")
    pipe = LatentVideoPipeline.from_pretrained(run / "pipeline")
    assert equal(dict(pipe.transformer.state_dict()), weights(run, 2, "latte_ema"))
    assert pipe.config.class_names == ["right", "left", "up", "down"]
    assert pipe.vae.has_scaling_rule
    assert (run / "media" / "samples_00000002.mp4").stat().st_size > 0
    real, generated = (probe(run / "media" / name) for name in ("real.mp4", "samples_00000002.mp4"))
    assert real == generated  # frames and size: tiles of the one stand where those of the other do


def test_real_clips_stand_in_the_order_of_the_generated_ones():
    clips = open_clips(SourceConfig(name="demo", demo_videos=8), ClipSpec(num_frames=9, size=16), 0)
    tiles, names = real_clips(clips, 6)
    for tile, video in enumerate((0, 1, 2, 3, 4, 5)):  # video n of the demo is of class n % 4
        assert np.array_equal(tiles[tile], clips.clip_uint8(video, np.random.default_rng((0, tile))))
        assert names[tile] == clips.name(video)
    assert len(real_clips(clips, 20)[0]) == 20


def test_the_average_follows_the_raw_weights_in_every_step(stage_two):
    run = stage_two(
        "run", "steps=3", "save_every=1", "keep_checkpoints=9", "ema_decay=0.9", "learning_rate=1e-3"
    )
    for step in (2, 3):
        before, after, raw = (
            weights(run, step - 1, "latte_ema"),
            weights(run, step, "latte_ema"),
            weights(run, step),
        )
        assert not equal(before, after)
        for key, value in raw.items():
            torch.testing.assert_close(after[key], 0.9 * before[key] + 0.1 * value, atol=1e-7, rtol=1e-5)


def test_each_update_has_the_optimizer_rate_decay_and_limit_of_the_settings(stage_two, monkeypatch):
    seen, update = [], LatteTrainer.update

    def spied(self, module, optimizer, largest, name):
        group = optimizer.param_groups[0]
        seen.append((type(optimizer.optimizer).__name__, group["weight_decay"], group["lr"], largest))
        return update(self, module, optimizer, largest, name)

    monkeypatch.setattr(LatteTrainer, "update", spied)
    limits = ("clip_start=2", "grad_clip=0.5", "weight_decay=0.03")
    stage_two("run", "steps=4", "learning_rate=1e-3", "warmup_steps=2", *limits)
    expected = ((5e-4, 0.0), (1e-3, 0.0), (1e-3, 0.5), (1e-3, 0.5))
    assert seen == [("AdamW", 0.03, rate, largest) for rate, largest in expected]


# ---- held-out loss ---------------------------------------------------------------------------------------

HELD = ("source.val_fraction=0.25", "val.every=2", "val.num_videos=2", "steps=4", "save_every=4")


def test_the_held_out_loss_of_both_weights_is_logged_and_changes_nothing_of_the_training(stage_two, caplog):
    caplog.set_level("INFO")
    run = stage_two("run", *HELD, "ema_decay=0.9")
    found = {r["step"]: r for r in records(run) if "val/loss" in r}
    assert sorted(found) == [0, 2, 4]
    assert found[0]["val/loss"] == found[0]["val/loss_raw"]  # EMA begins where the weights do
    assert found[4]["val/loss"] != found[4]["val/loss_raw"]
    assert abs(found[4]["val/loss_raw"] - found[0]["val/loss"]) > abs(
        found[4]["val/loss"] - found[0]["val/loss"]
    )
    assert (
        f"step 4: held-out loss EMA {found[4]['val/loss']:.4f}; raw {found[4]['val/loss_raw']:.4f}"
        in caplog.text
    )
    off = stage_two("off", *HELD, "ema_decay=0.9", "val.every=0", cache=False)
    assert equal(weights(run, 4), weights(off, 4))
    assert [r for r in records(run) if "val/loss" not in r] == records(off)


def test_the_held_out_loss_is_the_training_loss_at_fixed_timesteps_and_noise(stage_two, tmp_path, own_vae):
    """With a network that predicts zero the mean squared error is that of the noise: close to 1, the same for every seed."""
    first = [
        next(
            r["val/loss"]
            for r in records(stage_two(name, *HELD, f"seed={seed}", f"cache.dir={tmp_path / name}-cache"))
        )
        for name, seed in (("a", 0), ("b", 1))
    ]
    assert first[0] == pytest.approx(1.0, abs=0.3)
    assert first[0] == pytest.approx(first[1], rel=1e-3)  # the statistics of the cache are its own seed's


def test_each_held_out_clip_is_noised_at_one_timestep_of_every_quarter():
    diffusion, seen = GaussianDiffusion(), []
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device=torch.device("cpu")),
        config=SimpleNamespace(micro_batch=3, precision=None),
        diffusion=diffusion,
        vae=SimpleNamespace(normalize=lambda z: 2 * z),
        latte=SimpleNamespace(config=SimpleNamespace(num_classes=None)),
    )

    def model(x, t):
        seen.extend(zip(x, t.tolist(), strict=True))
        return SimpleNamespace(sample=torch.zeros_like(x))

    held = {"mean": torch.randn(2, 4, 3, 2, 2), "logvar": torch.randn(2, 4, 3, 2, 2), "label": torch.zeros(2)}
    loss, squares = LatteTrainer.held_out_loss(trainer, model, held), []
    assert sorted(t for _, t in seen) == [(2 * k + 1) * 1000 // 16 for k in range(8)]
    for n, (x, t) in enumerate(seen):
        clip, quarter = divmod(n, 4)
        assert t * 4 // 1000 == quarter
        (generator,) = distributed.generators(0, [n])
        posterior, noise = (torch.randn(4, 3, 2, 2, generator=generator) for _ in range(2))
        x0 = 2 * (held["mean"][clip] + (0.5 * held["logvar"][clip]).exp() * posterior)
        torch.testing.assert_close(x, diffusion.q_sample(x0[None], noise[None], torch.tensor([t]))[0])
        squares.append(noise.square().mean().item())
    assert loss == pytest.approx(sum(squares) / 8, rel=1e-5)


def test_another_cache_validates_and_wrong_ones_are_refused(
    stage_two, tmp_path, latte_settings, own_vae, caplog
):
    other, cache = tmp_path / "held", f"val.latents={tmp_path / 'held'}"
    settings = [*latte_settings, f"vae.path={own_vae}", f"source.index_dir={tmp_path / 'index'}"]
    cache_latents.main([*settings, f"cache.dir={other}", "source.demo_seed=9", "cache.crops=1"])
    run = stage_two("run", *HELD[1:], "source.val_fraction=0", cache)
    assert len([r for r in records(run) if "val/loss" in r]) == 3
    assert f"{cache}: 8 of its 8 videos have the name of a training video" in caplog.text
    # which part of a video validates is free: training draws mirrored clips, the cache has none
    online = ["mode=online", "clip.flip=true", "clip.position=random"]
    run = stage_two("online", *HELD[1:], "source.val_fraction=0", *online, cache, cache=False)
    assert len([r for r in records(run) if "val/loss" in r]) == 3
    with pytest.raises(ValueError, match="holds the training's own videos"):
        stage_two("own", *HELD[1:], f"val.latents={tmp_path / 'cache'}", cache=False)
    shorter = tmp_path / "shorter"
    cache_latents.main([*settings, f"cache.dir={shorter}", "source.demo_seed=9", "clip.num_frames=5"])
    with pytest.raises(ValueError, match="val.latents=.*clip: num_frames: 5 in the cache, 9 asked for"):
        stage_two("other", *HELD[1:], f"val.latents={shorter}", cache=False)


def test_a_cache_keeps_the_names_of_its_videos_and_older_caches_get_them(stage_two, tmp_path):
    stage_two("run", "steps=1")
    cache, file = LatentCache(tmp_path / "cache"), tmp_path / "cache" / "videos.jsonl"
    clips = open_clips(SourceConfig(name="demo", demo_videos=8), ClipSpec(num_frames=9, size=16), 0)
    assert [cache.video_names[cache[k]["video"]] for k in (0, 15)] == [clips.name(0), clips.name(7)]
    assert [json.loads(line) for line in file.read_text().splitlines()][3] == {"name": clips.name(3)}
    kept = file.read_bytes()
    file.unlink()
    assert LatentCache(tmp_path / "cache").video_names == []
    stage_two("run2", "steps=1")  # the same cache_latents command adds them
    assert file.read_bytes() == kept
    file.write_text('{"name": "a"}\n')
    assert list(LatentCache(tmp_path / "cache").verify()) == [
        f"{file}: 1 names of 8 videos; remove it and cache again"
    ]
    file.write_text("garbage")
    assert "videos.jsonl is damaged" in next(LatentCache(tmp_path / "cache").verify())


def test_dry_run_prints_the_plan(capsys, own_vae, tmp_path):
    train_latte.main(
        [
            "--dry-run",
            "source.name=demo",
            f"vae.path={own_vae}",
            f"source.index_dir={tmp_path}",
            "clip.num_frames=33",
        ]
    )
    text = capsys.readouterr().out
    assert "latent 4 x 9 x 32 x 32" in text
    assert "steps = 200000" in text
    assert "learning_rate = 0.0001" in text


def test_dry_run_opens_the_videos_and_needs_no_weights(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("OMNILATTE_WEIGHTS", str(tmp_path))
    train_latte.main(["--dry-run", "source.name=demo", "clip.num_frames=17"])
    text = capsys.readouterr().out
    assert "latent 4 x 5 x 32 x 32, 4 classes" in text
    assert "256 videos" in text
    assert "no weights for VAE 'odvae'" in text
    with pytest.raises(ValueError, match="/nowhere' is not a folder"):
        train_latte.main(["--dry-run", "source.root=/nowhere"])


@pytest.mark.parametrize("setting", ["precision=bf16", "gradient_checkpointing=true"])
def test_bf16_and_checkpointing_train_near_plain_fp32(stage_two, setting):
    curves = []
    for name, more in (("plain", []), ("other", [setting])):
        run = stage_two(name, "steps=3", "save_every=3", *more)
        curves.append([r["loss"] for r in records(run)])
        assert all(v.dtype == torch.float32 for v in weights(run, 3).values())
    assert curves[1] == pytest.approx(curves[0], rel=0.02)
    if "bf16" in setting:
        assert curves[1] != curves[0]


def test_a_frozen_vae_encodes_and_decodes_with_bf16_weights_and_is_exported_with_its_own(
    stage_two, own_vae, tmp_path, monkeypatch
):
    from pipelines import sample
    from vae import ODVAE

    seen, files = [], {}

    def spy(way, original):
        def spied(self, x):
            seen.append((way, self.dtype, torch.is_autocast_enabled("cpu")))
            return original(self, x)

        monkeypatch.setattr(ODVAE, way, spied)

    for way in ("_moments", "_pixels", "_encode_steps", "_decode_steps"):
        spy(way, getattr(ODVAE, way))
    more = ["precision=bf16", "steps=1", "samples.every=1", "samples.steps=2"]
    run = stage_two("cached", *more)
    online = stage_two("online", *more, "mode=online", cache=False)
    sample.main([f"pipeline={run / 'pipeline'}", "num_videos=1", "num_steps=2", "precision=bf16"])
    assert {way for way, *_ in seen} == {"_moments", "_encode_steps", "_decode_steps"}
    assert {tuple(how) for _, *how in seen} == {(torch.bfloat16, False)}
    for folder in (own_vae, run / "pipeline" / "vae", online / "pipeline" / "vae"):
        files[folder] = (folder / "diffusion_pytorch_model.safetensors").read_bytes()
    assert len(set(files.values())) == 1


def test_bf16_weights_of_the_vae_move_latents_by_less_than_two_percent(stage_two, tmp_path):
    means = []
    for precision in ("fp32", "bf16"):
        stage_two(
            f"run-{precision}",
            f"precision={precision}",
            "steps=1",
            f"cache.dir={tmp_path / precision / 'cache'}",
        )
        cache = LatentCache(tmp_path / precision / "cache")
        means.append(torch.stack([cache[k]["mean"] for k in range(len(cache))]))
    assert 0 < (means[1] - means[0]).norm() / means[0].norm() < 0.02


@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16"])
def test_products_take_tf32_inside_the_run_only_and_the_speed_record_names_the_precision(
    precision, stage_two, monkeypatch
):
    from pipelines import sample, train_latte
    from pipelines.video_pipeline import LatentVideoPipeline
    from vae import ODVAE

    seen, before = set(), torch.get_float32_matmul_precision()
    assert before == "highest"

    def spy(cls, name, original):
        def spied(self, *a, **k):
            seen.add((name, torch.get_float32_matmul_precision()))
            return original(self, *a, **k)

        monkeypatch.setattr(cls, name, spied)

    for cls, name in (
        (ODVAE, "encode"),
        (train_latte.LatteTrainer, "train_step"),
        (LatentVideoPipeline, "__call__"),
    ):
        spy(cls, name, getattr(cls, name))
    run = stage_two("run", f"precision={precision}", "steps=1", "samples.every=1", "samples.steps=2")
    sample.main([f"pipeline={run / 'pipeline'}", "num_videos=1", "num_steps=2", f"precision={precision}"])
    wanted = "high" if precision == "tf32" else "highest"
    assert seen == {(name, wanted) for name in ("encode", "train_step", "__call__")}
    assert torch.get_float32_matmul_precision() == before
    assert json.loads((run / "efficiency.json").read_text())["precision"] == precision


@pytest.mark.parametrize("mode", ["cached", "online"])
def test_stage_two_is_rehearsed_with_its_samples_and_nothing_changes(mode, stage_two, own_vae, monkeypatch):
    import pipelines.training.trainer
    from denoiser import Latte
    from pipelines.train_latte import LatteTrainer

    file = own_vae / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"scaling_factor": 1.0}))
    more = ["steps=2", "save_every=2", "samples.every=2", "samples.steps=2", "precision=bf16", f"mode={mode}"]
    plain = stage_two("plain", *more)
    seen, original = [], Latte.forward

    def spied(self, *a, **k):
        seen.append((torch.is_grad_enabled(), self.training, tuple(a[0].shape)))
        return original(self, *a, **k)

    def first(self, batches):
        rehearsed.append(list(seen))
        return train_step(self, batches)

    rehearsed, train_step = [], LatteTrainer.train_step
    monkeypatch.setattr(pipelines.training.trainer, "REHEARSED", ("cpu",))
    monkeypatch.setattr(Latte, "forward", spied)
    monkeypatch.setattr(LatteTrainer, "train_step", first)
    run = stage_two("rehearsed", *more, cache=False)
    assert rehearsed[0] == [(True, True, (2, 4, 3, 2, 2)), *[(False, False, (9, 4, 3, 2, 2))] * 2]
    for name in ("latte", "latte_ema"):
        assert equal(weights(plain, 2, name), weights(run, 2, name))
    assert records(plain) == records(run)


def test_a_run_goes_on_with_its_own_normalization_and_classes_only(stage_two, own_vae):
    stage_two("run", "steps=1", "save_every=1")
    config = own_vae / "config.json"
    content = json.loads(config.read_text())
    config.write_text(json.dumps(content | {"latents_mean": [0.0] * 4, "latents_std": [50.0] * 4}))
    with pytest.raises(ValueError, match="was trained with normalization="):
        stage_two("run", "steps=2", cache=False)
    config.write_text(json.dumps(content))
    stage_two("run", "steps=2", cache=False)


def test_drawn_flips_have_no_place_in_a_cache(stage_two):
    with pytest.raises(ValueError, match="cache.flips=true"):
        stage_two("run", "steps=1", "clip.flip=true")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["sd2_1", "svd", "cvvae", "ops"])
def test_every_continuous_vae_of_the_paper_feeds_stage_two_and_sampling(
    name, precision, latte_settings, tmp_path
):
    from pipelines import sample
    from tests.unit.vae.test_baselines import tiny

    tiny(name).save_pretrained(tmp_path / "vae")
    common = [f"vae.name={name}", f"vae.path={tmp_path / 'vae'}", f"cache.dir={tmp_path / 'cache'}"]
    settings = [*latte_settings, *common, f"run_dir={tmp_path / 'run'}", "steps=1", "cache.crops=1"]
    settings += [f"precision={precision}"]
    cache_latents.main(settings)
    train_latte.main(settings)
    pipeline = f"pipeline={tmp_path / 'run' / 'pipeline'}"
    sample.main([pipeline, "num_videos=1", "num_steps=2", f"precision={precision}"])
    assert (tmp_path / "run" / "samples" / "000000.mkv").stat().st_size > 0


def test_samples_that_cannot_be_drawn_are_refused_at_the_start(stage_two, tmp_path):
    for steps in (0, 1, 1001):
        with pytest.raises(ValueError, match=f"samples.steps={steps}: from 2 to 1000"):
            stage_two("run", f"samples.steps={steps}", "samples.every=2")
    with pytest.raises(ValueError, match=r"samples.guidance_scale=7: guidance needs classes"):
        stage_two("run", "samples.guidance_scale=7", "denoiser.label_dropout=0", "samples.every=2")
    assert not (tmp_path / "run" / "checkpoints").exists()
