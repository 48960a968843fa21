"""Export a trained model as a folder to share: weights, a model card with its numbers, a few videos.

    python -m pipelines.export runs/odvae --out share/odvae --records runs/reconstruct/summary.json
    python -m pipelines.export runs/latte --out share/latte --samples runs/latte/samples --records scores.jsonl
    python -m pipelines.export runs/latte --out share/latte --push NAME/REPO          # private unless --public

Plain diffusers opens it: AutoModel (a VAE) or DiffusionPipeline, .from_pretrained(DIR, trust_remote_code=True); the code
that this needs is written beside the weights (omnilatte_*.py), and this project never runs it from there. Numbers come
from the records that are given; what is not given is "not measured".
"""

import argparse
import sys
from pathlib import Path

from data.core.cli import run
from data.core.lazy import lazy
from pipelines.training.log import box, command

hub = lazy("huggingface_hub.utils")
shared = lazy("pipelines.results.shared")


def main(argv: list[str] | None = None) -> int:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m pipelines.export", description=__doc__, formatter_class=formatter
    )
    add, records = parser.add_argument, "the judges' JSONL, reconstruct's summary.json"
    add("model", type=Path, metavar="RUN_OR_FOLDER", help="run_dir of a training, or a folder of weights")
    add("--out", type=Path, required=True, metavar="DIR", help="new folder, or one this program made")
    add("--samples", type=Path, metavar="DIR", help="videos to show (default: the run's newest preview)")
    add("--records", nargs="+", type=Path, default=[], metavar="FILE", help=records)
    add("--license", default="other", help="of the weights, as the Hugging Face Hub writes it")
    add("--push", default="", metavar="REPO", help="upload to this repository of the Hugging Face Hub")
    add("--public", action="store_true", help="with --push: make a new repository public")
    args = parser.parse_args(argv)
    if args.public and not args.push:
        raise ValueError("--public: only with --push REPO")
    if args.push:
        hub.validate_repo_id(args.push)
    shared.export(args.model, args.out, args.samples, args.records, args.license, args.push)
    print(f"wrote {args.out}")
    rows = {"folder": str(args.out), "how to open it": f"{args.out}/README.md"}
    if args.push:
        print(f"pushed to {shared.push(args.out, args.push, args.public)}")
    else:
        words = sys.argv[1:] if argv is None else argv
        rows["next"] = command("export", *words, "--push", "NAME/REPO")
    box("finished: export", rows)
    return 0


if __name__ == "__main__":
    run(main)
