"""A training begins with trained weights as they are: longer clips, other data, another rate, other classes."""

import pytest
import torch

from denoiser.latte import Latte
from pipelines import train_latte
from pipelines.export import main as export
from pipelines.train_vae import main
from vae import load_vae


def from_weights(settings, source, *more):
    kept = [word for word in settings if not word.startswith("model.init")]
    return [*kept, "model.init=weights", f"model.init_from={source}", "loss.gan_weight=0", *more]


def test_a_stage_with_longer_clips_begins_where_the_one_before_ended(
    vae_settings, trained_vae, tmp_path, monkeypatch
):
    given = load_vae(trained_vae)
    begun = {}

    def look(trainer, *_args, **_more):
        begun.update({k: v.clone() for k, v in trainer.vae.state_dict().items()})

    monkeypatch.setattr("pipelines.train_vae.VAETrainer.fit", look)
    main(from_weights(vae_settings, trained_vae, "clip.num_frames=13", f"run_dir={tmp_path}"))
    assert all(torch.equal(begun[k], v) for k, v in given.state_dict().items())
    assert begun.keys() == given.state_dict().keys()


def test_another_design_or_a_folder_of_something_else_is_refused(vae_settings, trained_vae, tmp_path):
    for more, message in (
        (["model.variant=2"], "variant: 4 there, 2 here"),
        (["model.layers_per_block=2"], "layers_per"),
    ):
        with pytest.raises(ValueError, match=message):
            main(from_weights(vae_settings, trained_vae, *more, f"run_dir={tmp_path / 'run'}"))
    with pytest.raises(ValueError, match=r"init=weights needs model\.init_from"):
        main([*vae_settings, "model.init=weights", f"run_dir={tmp_path / 'run'}"])


@pytest.mark.parametrize("method", ["tail", "average"])
def test_a_video_vae_is_not_inflated_as_if_it_were_an_image_vae(vae_settings, trained_vae, tmp_path, method):
    settings = [*vae_settings, f"model.init={method}", f"run_dir={tmp_path / 'run'}"]
    for source in (trained_vae, trained_vae / "diffusion_pytorch_model.safetensors"):
        with pytest.raises(ValueError, match="a video VAE; .*model.init=weights takes it as it is"):
            main([*settings, f"model.init_from={source}"])
    image = [
        *vae_settings,
        f"run_dir={tmp_path / 'image'}",
        "clip.num_frames=1",
        "loss.gan_weight=0",
        "steps=1",
    ]
    main(image)
    main([*settings, f"model.init_from={tmp_path / 'image/vae'}", "steps=1", "loss.gan_weight=0"])


@pytest.fixture
def latte(latte_settings, own_vae, tmp_path):
    from pipelines import cache_latents

    def go(name, *more):
        common = [*latte_settings, f"vae.path={own_vae}", f"cache.dir={tmp_path / f'cache-{name}'}", *more]
        cache_latents.main(common)
        train_latte.main([*common, f"run_dir={tmp_path / name}", "steps=1"])
        return tmp_path / name / "pipeline"

    return go


def test_a_latte_begins_with_trained_weights_and_makes_the_table_of_other_classes_anew(
    latte, monkeypatch, caplog
):
    first = latte("first")
    begun = {}
    original = train_latte.LatteTrainer.train_step

    def look(self, batches):
        if not begun:
            begun.update({k: v.clone() for k, v in self.latte.state_dict().items()})
        original(self, batches)

    monkeypatch.setattr(train_latte.LatteTrainer, "train_step", look)
    given = Latte.from_pretrained(first / "transformer").state_dict()
    caplog.set_level("INFO")
    latte("same", f"denoiser.init_from={first}")
    assert all(torch.equal(begun[k], v) for k, v in given.items())
    exported = first.parents[1] / "share"
    assert export([str(first.parent), "--out", str(exported)]) == 0
    begun.clear()
    latte("exported", f"denoiser.init_from={exported}")
    assert all(torch.equal(begun[k], v) for k, v in given.items())
    assert "other classes" not in caplog.text  # the class table too: a new one may be equal by its seed
    begun.clear()
    latte("other", f"denoiser.init_from={first}", "source.demo_classes=2")
    assert "other classes: their table is made again" in caplog.text
    table = {k for k in given if k.startswith("y_embedder.")}
    assert table
    assert all(torch.equal(begun[k], v) for k, v in given.items() if k not in table)
    with pytest.raises(ValueError, match="is another Latte"):
        latte("wide", f"denoiser.init_from={first}", "denoiser.hidden_size=64")
    with pytest.raises(ValueError, match="neither a pipeline nor a Latte"):
        latte("none", f"denoiser.init_from={first / 'vae'}")
