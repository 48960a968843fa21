"""Stage two: train Latte on the latents of a VAE (paper 4.1), from a cache or encoded in every step.

    python -m pipelines.cache_latents --config configs/stage2/ucf101.yaml --vae odvae
    python -m pipelines.train_latte   --config configs/stage2/ucf101.yaml --vae odvae

Both programs read the same settings. The same command again resumes. Several GPUs and DeepSpeed:
accelerate launch --config_file configs/accelerate/FILE.yaml -m pipelines.train_latte ...
"""

import argparse

from data.cli import run
from pipelines.config import parse
from pipelines.latte_settings import FLAGS, TrainLatteConfig


def config_from(argv: list[str] | None) -> tuple[TrainLatteConfig, argparse.Namespace]:
    """The settings of a command line, and its switches."""
    return parse(TrainLatteConfig, argv, "train_latte", __doc__, FLAGS, planned=True)


def main(argv: list[str] | None = None) -> int:
    config, args = config_from(argv)
    if args.plan:
        from pipelines.plan.report import plan_text

        print(plan_text("train_latte", config, args.card))
        return 0
    from pipelines.latte_trainer import plan, train
    from pipelines.log import console

    console()
    if args.dry_run:
        print(plan(config))
        return 0
    train(config)
    return 0


if __name__ == "__main__":
    run(main)
