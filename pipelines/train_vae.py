"""Stage one: train OD-VAE (paper 3, 4.1).

    python -m pipelines.train_vae --config configs/stage1/odvae.yaml source.root=/data/videos model.init_from=/weights/sd-vae

The same command again resumes. The defaults are the paper's: variant 4, tail initialization, 25 x 256 x 256 clips,
Adam 1e-5 constant, batch 8, EMA 0.999, 650k steps.
"""

import argparse

from data.cli import run
from pipelines.config import parse
from pipelines.vae_settings import TrainVAEConfig


def config_from(argv: list[str] | None) -> tuple[TrainVAEConfig, argparse.Namespace]:
    """The settings of a command line, and its switches."""
    flags = {"--data": "source.root", "--dataset": "source.name"}
    return parse(TrainVAEConfig, argv, "train_vae", __doc__, flags, planned=True)


def main(argv: list[str] | None = None) -> int:
    config, args = config_from(argv)
    if args.plan:
        from pipelines.plan.report import plan_text

        print(plan_text("train_vae", config, args.card))
        return 0
    from pipelines.log import console
    from pipelines.vae_start import plan
    from pipelines.vae_trainer import train

    console()
    if args.dry_run:
        print(plan(config))
        return 0
    train(config)
    return 0


if __name__ == "__main__":
    run(main)
