"""Tiny settings that every program test shares: real programs, real parts, small widths, the demo source."""

import pytest

VAE = [
    "source.name=demo",
    "source.demo_videos=8",
    "clip.num_frames=9",
    "clip.size=16",
    "model.block_out_channels=[8,8,8,8]",
    "model.norm_num_groups=4",
    "model.layers_per_block=1",
    "model.init=random",
    "loss.perceptual_weight=0",
    "loss.gan_start=2",
    "loss.discriminator_layers=2",
    "loss.discriminator_width=4",
    "global_batch=4",
    "micro_batch=2",
    "learning_rate=1e-3",
    "log_every=1",
    "val_every=2",
    "val_videos=2",
    "workers=0",
]
LATTE = [
    "source.name=demo",
    "source.demo_videos=8",
    "clip.num_frames=9",
    "clip.size=16",
    "cache.crops=2",
    "cache.shard_size=6",
    "denoiser.size=custom",
    "denoiser.depth=2",
    "denoiser.hidden_size=32",
    "denoiser.num_heads=4",
    "denoiser.patch_size=1",
    "global_batch=4",
    "micro_batch=2",
    "log_every=1",
    "samples.every=0",
    "workers=0",
]


@pytest.fixture
def vae_settings():
    return list(VAE)


@pytest.fixture
def latte_settings():
    return list(LATTE)


@pytest.fixture
def train(vae_settings, tmp_path):
    """train(name, *settings): stage one in the folder `name` of the test; returns the folder."""
    from pipelines.train_vae import main

    def go(name, *more):
        run = tmp_path / name
        main([*vae_settings, f"run_dir={run}", f"source.index_dir={tmp_path / 'index'}", *more])
        return run

    return go


@pytest.fixture(scope="session")
def trained_vae(tmp_path_factory):
    """Folder of an OD-VAE after four steps of stage one, without a scaling rule of its own."""
    from pipelines.train_vae import main

    folder = tmp_path_factory.mktemp("stage1")
    main(
        [*VAE, f"run_dir={folder / 'run'}", f"source.index_dir={folder / 'index'}", "steps=4", "save_every=4"]
    )
    return folder / "run" / "vae"


@pytest.fixture
def own_vae(trained_vae, tmp_path):
    """A copy of that folder which a test may change."""
    import shutil

    return shutil.copytree(trained_vae, tmp_path / "vae")
