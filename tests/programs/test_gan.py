"""The discriminator of stage one: when it begins, what its numbers are, and that its memory is known at the start."""

import copy
import re
import shutil

import pytest
import torch

import pipelines.training.trainer
from data.clip import to_float
from pipelines import train_vae
from pipelines.train_vae import TrainVAEConfig
from pipelines.training.config import load
from pipelines.training.distributed import finite_or_nan, make_accelerator
from pipelines.training.log import read_metrics
from pipelines.training.start import build_vae_model
from vae import losses


@pytest.fixture
def trainer(vae_settings):
    def build(*more):
        config = load(TrainVAEConfig, None, [*vae_settings, *more])
        return train_vae.VAETrainer(config, make_accelerator(config), build_vae_model(config))

    return build


def steps_with(run, name):
    return [r["step"] - 1 for r in read_metrics(run) if name in r]


def test_the_discriminator_learns_during_its_warmup_and_the_vae_feels_it_afterwards(train):
    run = train("run", "steps=6", "loss.gan_schedule=both", "loss.gan_start=1", "loss.gan_warmup=3")
    assert steps_with(run, "gan/discriminator") == [1, 2, 3, 4, 5]
    assert steps_with(run, "gan/logits_real") == [1, 2, 3, 4, 5]
    assert steps_with(run, "gan/weight") == steps_with(run, "gan/generator") == [4, 5]


def test_the_vae_trains_in_the_warmup_as_without_a_discriminator(train):
    runs = [
        train("gan", "steps=3", "loss.gan_schedule=both", "loss.gan_start=0", "loss.gan_warmup=3"),
        train("none", "steps=3", "loss.gan_weight=0"),
    ]
    losses = [[r["loss/nll"] for r in read_metrics(run) if "loss/nll" in r] for run in runs]
    assert losses[0] == losses[1]


@pytest.fixture(autouse=True)
def rehearsed_on_a_cpu_too(monkeypatch):
    monkeypatch.setattr(pipelines.training.trainer, "REHEARSED", ("cpu",))


def state(trainer):
    parts = (trainer.vae, trainer.ema.module, trainer.discriminator)
    tensors = [v.clone() for p in parts for v in p.state_dict().values()]
    moments = [
        v.clone()
        for o in (trainer.optimizer, trainer.discriminator_optimizer)
        for s in o.state_dict()["state"].values()
        for v in s.values()
    ]
    return [*tensors, *moments, torch.get_rng_state(), torch.tensor(trainer.step)]


@pytest.mark.parametrize("schedule", ["alternate", "both"])
def test_a_rehearsal_makes_the_heaviest_step_and_changes_nothing(schedule, trainer, monkeypatch):
    rehearsed = trainer("loss.gan_start=100", "loss.gan_warmup=5", f"loss.gan_schedule={schedule}")
    weighed, original = [], losses.adaptive_weight
    monkeypatch.setattr(losses, "adaptive_weight", lambda *a: weighed.append(original(*a)) or weighed[-1])
    forwards = []
    rehearsed.autoencode.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    before = state(rehearsed)
    rehearsed.rehearse(lambda: forwards.append("look"))
    assert forwards == [True, *([False] if schedule == "alternate" else []), "look"]
    assert len(weighed) == 1
    assert weighed[0].isfinite()
    after = state(rehearsed)
    assert len(before) == len(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    parameters = [*rehearsed.vae.parameters(), *rehearsed.discriminator.parameters()]
    assert all(p.grad is None and p.requires_grad for p in parameters)


def test_every_start_is_rehearsed_with_a_validation_and_the_run_is_the_same_to_the_bit(train, monkeypatch):
    rehearsals, original = [], train_vae.VAETrainer.rehearse

    def counted(self, look):
        looked = []
        original(self, lambda: looked.append(look()))
        rehearsals.append((self.step, len(looked)))

    monkeypatch.setattr(train_vae.VAETrainer, "rehearse", counted)
    rehearsed = train("rehearsed", "steps=2")
    train(
        "rehearsed", "steps=4", "micro_batch=1", "gradient_checkpointing=true"
    )  # it goes on, with other memory
    assert rehearsals == [(0, 1), (0, 1)]
    monkeypatch.setattr(pipelines.training.trainer, "REHEARSED", ())
    plain = train("plain", "steps=2")
    train("plain", "steps=4", "micro_batch=1", "gradient_checkpointing=true")
    assert rehearsals[2:] == [(0, 0), (0, 0)]
    assert (plain / "metrics.jsonl").read_text() == (rehearsed / "metrics.jsonl").read_text()


def test_a_run_without_a_discriminator_is_rehearsed_too(trainer):
    rehearsed = trainer("loss.gan_weight=0")
    forwards = []
    rehearsed.autoencode.register_forward_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    rehearsed.rehearse()
    assert forwards == [True]


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        (torch.OutOfMemoryError, "Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free"),
        (RuntimeError, "FIND was unable to find an engine to execute this computation"),
        (RuntimeError, "cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        (RuntimeError, "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_memory_that_does_not_suffice_is_named_before_the_first_step_with_what_helps(
    kind, text, trainer, monkeypatch
):
    def full(*_):
        raise kind(text)

    rehearsed = trainer()
    monkeypatch.setattr(rehearsed, "discriminator_loss", full)
    before = state(rehearsed)
    with pytest.raises(ValueError, match=re.escape(text.split(". ")[0]) + r"\): gradient_checkpointing=true"):
        rehearsed.rehearse()
    assert all(torch.equal(a, b) for a, b in zip(before, state(rehearsed), strict=True))
    monkeypatch.setattr(rehearsed, "discriminator_loss", lambda *_: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):  # no lack of memory: it stays what it is
        rehearsed.rehearse()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_gives_no_finite_gradient_whatever_its_own_is(value):
    w = torch.ones(3, requires_grad=True)
    finite_or_nan(w.sum() + value).backward()  # its own gradient is 1
    assert w.grad.isnan().all()
    w.grad = None
    loss = w.square().sum()
    assert torch.equal(finite_or_nan(loss), loss)
    finite_or_nan(loss).backward()
    assert torch.equal(w.grad, 2 * w.detach())


def test_an_infinite_adversarial_weight_is_skipped_counted_and_ends_the_run_when_it_persists(
    train, monkeypatch
):
    infinite = torch.tensor(float("inf"))
    monkeypatch.setattr(losses, "adaptive_weight", lambda *_: infinite)
    with pytest.raises(ValueError, match="2 steps in a row had a non-finite loss or gradient"):
        train("run", "steps=9", "loss.gan_schedule=both", "max_skipped=2")


@pytest.mark.parametrize(
    ("schedule", "stops"),
    [
        ("both", [3]),
        pytest.param("both", [1, 4, 5], marks=pytest.mark.slow),
        pytest.param("alternate", [1, 3, 4, 5], marks=pytest.mark.slow),
    ],
)
def test_resumed_training_equals_uninterrupted_to_the_bit_in_every_phase_of_the_gan(
    schedule, stops, train, tmp_path
):
    # checkpoints before D begins, in its warm-up, between a step of the VAE and one of D, and later
    more = ["micro_batch=1", "steps=7", "save_every=1", "keep_checkpoints=9", "log_every=2"]
    more += [f"loss.gan_schedule={schedule}", "loss.gan_start=2", "loss.gan_warmup=2"]
    whole = train("whole", *more)
    for step in stops:
        parts = tmp_path / f"from{step}"
        shutil.copytree(whole, parts)
        for later in range(step + 1, 8):
            shutil.rmtree(parts / "checkpoints" / f"step_{later:08d}")
        train(parts.name, *more)
        for name in ("vae/{}", "vae_ema/{}"):
            file = "checkpoints/step_00000007/" + name.format("diffusion_pytorch_model.safetensors")
            assert (whole / file).read_bytes() == (parts / file).read_bytes()
        states = [
            torch.load(r / "checkpoints/step_00000007/trainer.pt", weights_only=True) for r in (whole, parts)
        ]
        assert same(*states)
        assert (whole / "metrics.jsonl").read_text() == (parts / "metrics.jsonl").read_text()


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_steps_are_those_of_a_plain_loop_with_the_settings_of_the_run(trainer):
    limits = (
        "loss.type=l2",
        "loss.kl_weight=100",
        "adam_betas=[0.5,0.7]",
        "warmup_steps=4",
        "learning_rate=1e-3",
    )
    ours = trainer("loss.gan_weight=0", "micro_batch=4", "global_batch=4", "ema_decay=0.9", *limits)

    def flat(model):  # attention key biases have a gradient of rounding noise only
        return torch.cat([p.detach().flatten() for n, p in model.named_parameters() if ".k." not in n])

    plain = copy.deepcopy(ours.vae)
    begin, adam = flat(plain), torch.optim.Adam(plain.parameters(), lr=1e-3, betas=(0.5, 0.7))
    for step in range(3):
        video = torch.randint(0, 256, (4, 9, 16, 16, 3), dtype=torch.uint8)
        batch = {"video": video, "number": torch.arange(4 * step, 4 * step + 4)}
        # The loss and the update, written out.
        x = to_float(video)
        mean, logvar = plain.encode(x).latent_dist.parameters.chunk(2, dim=1)
        xhat = plain.decode(mean + (0.5 * logvar).exp() * ours.latent_noise(x, batch["number"])).sample
        nll = (x - xhat).square().sum() / (4 * 9)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).sum() / 4
        adam.zero_grad()
        (nll + 100 * kl).backward()
        adam.param_groups[0]["lr"] = 1e-3 * (step + 1) / 4
        adam.step()
        # The same by the trainer, and its average.
        average = flat(ours.ema.module)
        ours.train_step(iter([batch]))
        torch.testing.assert_close(
            flat(ours.ema.module), 0.9 * average + 0.1 * flat(ours.vae), atol=1e-7, rtol=1e-5
        )
    assert (flat(ours.vae) - flat(plain)).norm() < 0.02 * (flat(plain) - begin).norm()


def test_the_weight_of_the_perceptual_loss_is_that_of_the_settings(trainer):
    ours = trainer("loss.gan_weight=0")
    x = torch.rand(1, 3, 9, 16, 16) * 2 - 1
    noise, found = ours.latent_noise(x, [0]), {}
    ours.perceptual = lambda a, b: torch.ones(len(a))
    for weight in (0.25, 1.0):
        ours.config.loss.perceptual_weight = weight
        found[weight] = ours.vae_loss(x, noise)[2]["loss/nll"].item()
    assert found[1.0] - found[0.25] == pytest.approx(0.75 * 3 * 16 * 16, rel=1e-3)
