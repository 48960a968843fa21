"""Steps of both trainings on a pretended GPU: every phase runs, and none waits for the device."""

import itertools

import pytest
import torch

from pipelines.plan import programs
from pipelines.plan.cost import INT32
from pipelines.train_latte import LatteTrainer, TrainLatteConfig
from pipelines.train_vae import TrainVAEConfig, VAETrainer
from pipelines.training.config import load
from pipelines.training.distributed import make_accelerator

STAGE1 = [
    "model.block_out_channels=[8,8,16,16]",
    "model.norm_num_groups=4",
    "model.layers_per_block=1",
    "clip.num_frames=9",
    "clip.size=32",
    "loss.discriminator_width=8",
    "loss.gan_start=10",
    "global_batch=4",
    "micro_batch=2",
]
STAGE2 = [
    "denoiser.size=custom",
    "denoiser.depth=2",
    "denoiser.hidden_size=24",
    "denoiser.num_heads=2",
    "denoiser.patch_size=2",
    "clip.num_frames=9",
    "clip.size=32",
    "global_batch=4",
    "micro_batch=2",
]


def in_pairs(*lists):
    """Every combination; few of them meet all pairs of values, the others are slow tests."""
    cases = list(itertools.product(*lists))
    pairs = {case: set(itertools.combinations(enumerate(case), 2)) for case in cases}
    missing, quick = set().union(*pairs.values()), set()
    while missing:
        best = max(cases, key=lambda case: len(pairs[case] & missing))
        quick.add(best)
        missing -= pairs[best]
    return [pytest.param(*case, marks=[] if case in quick else pytest.mark.slow) for case in cases]


@pytest.mark.parametrize(
    ("precision", "schedule", "checkpointing"),
    in_pairs(["bf16", "tf32", "fp32"], ["alternate", "both"], ["false", "true"]),
)
def test_stage_one_in_every_phase(precision, schedule, checkpointing):
    settings = [
        f"precision={precision}",
        f"loss.gan_schedule={schedule}",
        f"gradient_checkpointing={checkpointing}",
        "steps=100",
    ]
    found = programs.stage_one(
        VAETrainer, load(TrainVAEConfig, None, [*STAGE1, *settings, "loss.perceptual_weight=0"])
    )
    shares = [0.1, 0.45, 0.45] if schedule == "alternate" else [0.1, 0.9]
    assert [task.times for task in found.tasks] == pytest.approx(shares)
    assert found.syncs == []


@pytest.mark.parametrize("variant", [1, 2, 3])
def test_stage_one_of_the_other_variants(variant):
    settings = ["precision=bf16", f"model.variant={variant}", "loss.perceptual_weight=0"]
    assert programs.stage_one(VAETrainer, load(TrainVAEConfig, None, [*STAGE1, *settings])).syncs == []


@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_stage_one_with_its_perceptual_loss(net):
    found = programs.stage_one(
        VAETrainer, load(TrainVAEConfig, None, [*STAGE1, f"loss.perceptual_net={net}", "precision=bf16"])
    )
    assert found.syncs == []


@pytest.mark.parametrize(
    ("precision", "mode", "source", "checkpointing"),
    in_pairs(
        ["bf16", "tf32", "fp32"],
        ["cached", "online"],
        ["ucf101", "sky_timelapse"],  # with classes and without
        ["false", "true"],
    ),
)
def test_stage_two(precision, mode, source, checkpointing):
    settings = [f"precision={precision}", f"mode={mode}", f"gradient_checkpointing={checkpointing}"]
    config = load(TrainLatteConfig, None, [*STAGE2, *settings, f"source.name={source}", "vae.name=sd2_1"])
    found = programs.stage_two(LatteTrainer, config)
    assert found.syncs == []


def test_a_value_read_in_a_step_is_found(monkeypatch):
    """The test above would see it."""
    from pipelines.train_vae import VAETrainer

    real = VAETrainer.vae_loss

    def reads(self, x, noise):
        total, xhat, logged = real(self, x, noise)
        float(total)
        return total, xhat, logged

    monkeypatch.setattr(VAETrainer, "vae_loss", reads)
    found = programs.stage_one(VAETrainer, load(TrainVAEConfig, None, [*STAGE1, "loss.perceptual_weight=0"]))
    assert any("a value is read" in line for line in found.syncs)


def test_the_rehearsal_meets_the_largest_step():
    """It runs the phases that a fresh run meets thousands of steps later, those without gradients too."""
    config = load(TrainVAEConfig, None, [*STAGE1, "precision=bf16", "loss.perceptual_weight=0"])
    accelerator = make_accelerator(config)
    with programs._device() as (_, costs):
        trainer, batches, phases = programs.stage_one_parts(
            VAETrainer, config, accelerator, torch.device("cpu")
        )
        peaks = {}
        for _ in range(2):  # optimizers have their states in the second round
            for name, (at, _) in phases.items():
                trainer.step = at
                costs.start()
                trainer.train_step(batches)
                peaks[name] = costs.cost.peak
        trainer.step = 0
        held = costs.live
        costs.start()
        trainer.rehearse(lambda: None)
        moments = sum(2 * 4 * p.numel() for m in (trainer.vae, trainer.discriminator) for p in m.parameters())
        assert costs.live == pytest.approx(held, rel=1e-3)
        # in this process the optimizers' states are there already, beside what the rehearsal puts in their place
        assert costs.cost.peak - moments == pytest.approx(max(peaks.values()), rel=0.05)


def test_caching_and_sampling_run_and_stay_small():
    from pipelines.sample import SampleConfig

    cached = programs.cache(
        load(TrainLatteConfig, None, ["precision=bf16", "clip.num_frames=9", "clip.size=64"])
    )
    assert cached.tasks[0].cost.largest < INT32
    assert cached.syncs == []
    drawn = programs.sample(load(SampleConfig, None, ["precision=bf16", "batch=1", "guidance_scale=4"]))
    assert drawn.peak < 6 * 2**30
    (encode,), (_, decode) = cached.tasks, drawn.tasks
    assert (encode.cost.layout_copies, decode.cost.layout_copies) == (0, 0)


def test_the_frames_of_a_video_are_copied_once():
    """However many pieces its decoder makes them in."""
    from pipelines.video_pipeline import LatentVideoPipeline
    from tests.gpu_rules.test_networks import WIDTHS, latte
    from vae import ODVAE

    with programs._device() as (gpu, _), torch.inference_mode():
        vae = ODVAE.preset("odvae", **WIDTHS).eval().to("cuda", torch.bfloat16)
        pipe = LatentVideoPipeline(vae=vae, transformer=latte().eval().to("cuda"))
        gpu.syncs.found.clear()
        assert pipe.decode_latents(torch.zeros(2, 4, 21, 32, 32, device="cuda")).shape == (2, 3, 81, 256, 256)
        assert len(gpu.syncs.found) == 2
