"""What both trainers share: updates that leave out what is not finite, decided on the device and read later."""

import copy
import logging
from types import SimpleNamespace

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3

from pipelines.training.distributed import as_fused, make_accelerator
from pipelines.training.trainer import Trainer


@pytest.fixture
def build():
    """build(): a Trainer, its model and its optimizer, prepared."""

    def go():
        accelerator = make_accelerator()
        config = SimpleNamespace(global_batch=1, ema_decay=0.5, ema_warmup=False)
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
        return Trainer(config, accelerator), *accelerator.prepare(model, optimizer)

    return go


def step(trainer, model, optimizer, value=1.0, largest=0.0):
    (model(torch.ones(1, 3)).sum() * value).backward()
    finite = trainer.update(model, optimizer, largest, "norm")
    trainer.finish_step(finite)
    return finite


def state(model, optimizer):
    moments = [v for s in optimizer.state_dict()["state"].values() for v in s.values()]
    return copy.deepcopy([*model.state_dict().values(), *moments])


def test_a_gradient_that_is_not_finite_changes_neither_weights_nor_moments_nor_their_average(build):
    trainer, model, optimizer = build()
    ema = trainer.ema = ModelEmaV3(model, decay=0.5)
    trainer.update_ema(model, step(trainer, model, optimizer))
    before = state(model, optimizer) + state(ema.module, optimizer)
    for value in (float("nan"), float("inf")):
        trainer.update_ema(model, step(trainer, model, optimizer, value))
    after = state(model, optimizer) + state(ema.module, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    trainer.update_ema(model, step(trainer, model, optimizer))
    after = state(model, optimizer) + state(ema.module, optimizer)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True) if a.ndim)


def test_the_average_is_timm_s_to_the_bit(build):
    trainer, model, _ = build()
    mine, theirs = ModelEmaV3(model, decay=0.999), ModelEmaV3(model, decay=0.999)
    trainer.ema, trainer.config.ema_decay = mine, 0.999
    torch.nn.init.normal_(model.weight)
    trainer.update_ema(model, torch.tensor(True))
    theirs.update(model)
    assert torch.equal(mine.module.weight, theirs.module.weight)


@pytest.mark.parametrize("largest", [0.0, 0.5])
def test_without_a_limit_the_gradient_is_measured_and_left_alone(largest, build, monkeypatch):
    trainer, model, optimizer = build()
    seen = []
    monkeypatch.setattr(optimizer.optimizer, "step", lambda *_: seen.append(model.weight.grad.clone()))
    step(trainer, model, optimizer, largest=largest)
    norm = 8**0.5  # six ones in the weight, two in the bias
    assert trainer.flush_window() == {"norm": pytest.approx(norm)}
    assert torch.allclose(seen[0], torch.full((2, 3), min(1.0, largest / norm) if largest else 1.0))
    versions = []
    monkeypatch.setattr(optimizer.optimizer, "step", lambda *_: versions.append(model.weight.grad._version))
    model(torch.ones(1, 3)).sum().backward()
    fresh = model.weight.grad._version
    trainer.update(model, optimizer, largest, "norm")
    assert (versions[0] > fresh) == bool(largest)  # no limit: not even multiplied by 1


def test_a_step_left_out_is_named_one_step_later_and_counted_in_its_own_window(build, caplog):
    caplog.set_level(logging.WARNING)
    trainer, model, optimizer = build()
    step(trainer, model, optimizer, float("nan"))
    trainer.count_skipped(everything=False)
    assert (trainer.skipped_in_row, caplog.text) == (0, "")
    assert trainer.flush_window() == {"skipped": 1.0}  # a norm that is not finite is in no mean
    step(trainer, model, optimizer, float("nan"))
    trainer.count_skipped(everything=False)
    assert trainer.skipped_in_row == 1
    assert "step 0: loss or gradient is not finite" in caplog.text
    assert trainer.counters()["skipped_in_row"] == 2  # a checkpoint knows all
    assert "step 1" in caplog.text
    step(trainer, model, optimizer)
    trainer.count_skipped()
    assert trainer.skipped_in_row == 0


def test_the_optimizer_of_an_older_checkpoint_is_taken_over_and_leaves_steps_out_too(build):
    trainer, model, optimizer = build()
    old = torch.optim.Adam(model.parameters(), lr=0.1)  # as stage one had it: not fused
    model(torch.ones(1, 3)).sum().backward()
    old.step()
    old.zero_grad()
    saved = old.state_dict()
    assert not saved["param_groups"][0]["fused"]
    optimizer.load_state_dict(as_fused(saved))
    before = state(model, optimizer)
    step(trainer, model, optimizer, float("nan"))
    assert all(torch.equal(a, b) for a, b in zip(before, state(model, optimizer), strict=True))
    step(trainer, model, optimizer)
    assert optimizer.state_dict()["state"][0]["step"] == 2


def test_the_rate_rises_linearly_in_the_warm_up_and_is_constant_afterwards(build):
    trainer, _, optimizer = build()
    trainer.config.learning_rate, trainer.config.warmup_steps = 0.4, 4
    seen = []
    for trainer.step in range(6):
        trainer.set_learning_rate(optimizer)
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.4, 0.4])
    trainer.step, trainer.config.warmup_steps = 0, 0
    trainer.set_learning_rate(optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.4
