"""What the planner predicts against what was measured: on this CPU, and frozen from a real card."""

import gc
import itertools
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile

from pipelines.plan import programs
from pipelines.plan.cards import CARDS, find_card, seconds
from pipelines.plan.cost import GIB, INT32, Cost, Costs, Work
from pipelines.plan.programs import Simulation, Task, stage_one, stage_two
from pipelines.plan.report import plan_text
from pipelines.plan.tasks import ROWS
from pipelines.train_latte import LatteTrainer
from pipelines.train_vae import TrainVAEConfig, VAETrainer
from pipelines.training.config import load
from vae import ODVAE


def train(vae, x):
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-4)
    for _ in range(2):
        z = vae.encode(x).latent_dist.mode()
        (vae.decode(z).sample - x).abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(("frames", "size"), [(9, 32), (5, 64)])
def test_peak_memory_is_within_5_percent_of_what_the_cpu_allocates(frames, size):
    """The same two steps, with data and without; torch's profiler notes each allocation of the first."""

    def make():
        return ODVAE.preset("odvae", block_out_channels=(32, 32, 64, 64)), torch.zeros(
            2, 3, frames, size, size
        )

    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        vae, x = make()
        train(vae, x)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del vae, x
    gc.collect()
    with FakeTensorMode(), Costs("cpu", round_to=64) as costs:
        vae, x = make()
        train(vae, x)
    assert peak > 2**24
    assert costs.cost.peak == pytest.approx(peak, rel=0.05)


def row(name):
    return next(r for r in ROWS if r.name == name)


def test_stage_one_s_peaks_are_those_of_an_h200():
    """Measured with torch 2.11: docs/results/gpu/h200-2026-11-27.md. The kernels of another torch may need a little more."""
    found = stage_one(VAETrainer, row("stage one, 25 x 256 x 256, bf16").config())
    measured = {
        "before the discriminator": 50.88,
        "VAE, with the discriminator's term": 50.88,
        "discriminator": 6.5,
    }
    for task in found.tasks:
        assert task.cost.peak / GIB == pytest.approx(measured[task.name], rel=0.05), task.name
        assert task.cost.largest < INT32
    assert found.syncs == []


def test_stage_two_s_peak_and_time_are_those_of_an_h200():
    found = stage_two(LatteTrainer, row("the same, 8 clips").config())
    assert found.peak / GIB == pytest.approx(80.44, rel=0.03)
    assert seconds(found.tasks[0].cost, CARDS["h200"]) == pytest.approx(0.414, rel=0.2)


def test_a_step_that_is_too_large_comes_with_what_makes_it_fit():
    small = ["model.block_out_channels=[8,8,16,16]", "model.norm_num_groups=4", "clip.num_frames=9"]
    large = ["clip.size=128", "global_batch=512", "micro_batch=512"]
    config = load(TrainVAEConfig, None, [*small, *large, "loss.perceptual_weight=0", "loss.gan_weight=0"])
    text = plan_text("train_vae", partial(stage_one, VAETrainer), config, "rtx4090")
    assert "DOES NOT FIT" in text
    assert "gradient_checkpointing=true" in text
    assert text.splitlines()[-1].endswith("fits")
    assert "modelled" in text.lower()


def test_an_unknown_card_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="card=voodoo: known are h100"):
        find_card("voodoo")


def test_a_step_of_five_micro_batches_is_counted_from_steps_of_one_and_two():
    class Trainer:
        def __init__(self):
            self.config = SimpleNamespace(global_batch=10, micro_batch=2)
            self.accelerator, self.step = SimpleNamespace(), 7

        def train_step(self, batches):
            total = torch.zeros(4, 4)
            for _ in range(self.accelerator.gradient_accumulation_steps):
                total = total + next(batches) @ next(batches)
            total.exp()
            self.step += 1

    trainer, batches = Trainer(), itertools.repeat(torch.ones(4, 4))
    with Costs("cpu") as costs:
        found = programs._train_step(trainer, costs, batches)
        assert trainer.step == 7
        trainer.accelerator.gradient_accumulation_steps = 5
        real = programs._measure(costs, lambda: trainer.train_step(batches))
    assert (found.works, found.operations) == (real.works, real.operations)


@pytest.mark.parametrize(
    ("work", "tf32", "each"),
    [
        (Work("mm", "half", 312 * 10**12, 0, 1), False, 2.0),  # half of the A100's rate is reached
        (Work("conv", "conv32", 156 * 10**12, 0, 1), False, 2.0),
        (Work("mm", "matmul32", 195 * 10**11, 0, 1), False, 2.0),
        (Work("mm", "matmul32", 156 * 10**12, 0, 1), True, 2.0),
        (Work("add", "fp32", 195 * 10**11, 0, 1), True, 2.0),
        (Work("add", "fp32", 0, 204 * 10**10, 1), False, 1 / 0.7),
        (Work("add", "fp32", 0, 0, 1000), False, 0.002),
    ],
)
def test_work_is_bound_by_arithmetic_memory_launches_or_the_host(work, tf32, each):
    card, cost = CARDS["a100"], Cost(operations=1)
    cost.works[work] = 3
    assert seconds(cost, card, tf32) == pytest.approx(3 * each)
    unit = Simulation("step", [Task("a", cost, 0.25), Task("b", cost, 2.0)])
    assert unit.seconds(card, tf32) == pytest.approx(2.25 * 3 * each)
    cost.operations = 10**7
    assert seconds(cost, card, tf32) == pytest.approx(50)
