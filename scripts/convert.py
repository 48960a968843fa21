"""Convert an official weight file into a folder that this project loads, or back.

    python scripts/convert.py FAMILY --src FILE_OR_DIR --dst DIR
    python scripts/convert.py open-sora-plan --export --src DIR --dst FILE_OR_DIR

Keys and shapes are checked strictly: missing, extra and wrongly shaped ones are listed, nothing is written and the exit
code is 2. Sizes come from the shapes and from a config.json beside the weights. The result is written to a temporary
name and renamed when complete. FAMILY: sd-vae, vqgan, tats, cvvae, ops, open-sora-plan (VAEs), latte (denoiser),
i3d, c3d (judges).
"""

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

if not __package__:  # run as a file, perhaps not installed: import from the repository
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.core.cli import run
from data.core.lazy import lazy

baseline_release = lazy("vae.baselines.release")
denoiser_release = lazy("denoiser.release")
denoisers = lazy("denoiser")
safetensors = lazy("safetensors.torch")
vae_release = lazy("vae.release")
vaes = lazy("vae")
weights = lazy("eval.weights")

BASELINES = ("sd-vae", "vqgan", "tats", "cvvae", "ops")
JUDGES = {"i3d": "i3d_pretrained_400.safetensors", "c3d": "conv3d_deepnetA_ucf.safetensors"}
EXPORTS = ("open-sora-plan", "latte")
FAMILIES = (*BASELINES, "open-sora-plan", "latte", *JUDGES)


def write_folder(dst: Path, save: Callable[[Path], None]) -> None:
    """Call save(folder) on a temporary folder beside dst and rename it to dst. dst may be an empty folder."""
    if dst.exists() and (not dst.is_dir() or any(dst.iterdir())):
        raise ValueError(f"{dst} exists and is not an empty folder: name another --dst, or remove it")
    dst.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{dst.name}-", dir=dst.parent))
    try:
        save(temporary)
        temporary.chmod(0o755)
        os.replace(temporary, dst)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_file(dst: Path, save: Callable[[Path], None]) -> None:
    """Call save(file) on a temporary file beside dst and rename it to dst, which must not exist."""
    if dst.exists():
        raise ValueError(f"{dst} exists: name another --dst, or remove it")
    dst.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{dst.name}-", dir=dst.parent) as folder:
        temporary = Path(folder) / dst.name
        save(temporary)
        os.replace(temporary, dst)


def load_source(family: str, src: Path, **latte: int | None):
    """Load the model that the official file `src` holds, in eval mode. latte: num_heads and num_frames, for a Latte."""
    if family in BASELINES:
        return baseline_release.convert_baseline(family, src)
    if family == "open-sora-plan":
        return vae_release.from_release(src)
    if family == "latte":
        return denoiser_release.from_release(src, **latte)
    return {"i3d": weights.load_i3d, "c3d": weights.load_c3d}[family](src)[0]


def convert(family: str, src: Path, dst: Path, **latte: int | None) -> str:
    """Convert an official file or folder to the folder dst; return what was written, in words."""
    model = load_source(family, src, **latte)
    if family in JUDGES:
        write_folder(dst, lambda folder: safetensors.save_file(model.state_dict(), folder / JUDGES[family]))
    else:
        write_folder(dst, model.save_pretrained)
    count = sum(parameter.numel() for parameter in model.parameters())
    return f"{dst}: {type(model).__name__}, {count:,} parameters"


def export(family: str, src: Path, dst: Path) -> str:
    """Write our folder in upstream's layout; return what was written, in words."""
    if family == "open-sora-plan":
        model = vaes.load_vae("odvae", src)
        write_folder(dst, lambda folder: vae_release.save_release(model, folder))
    else:
        model = denoisers.Latte.from_pretrained(src)
        write_file(dst, lambda file: denoiser_release.save_release(model, file))
    return f"{dst}: {type(model).__name__} in upstream's layout"


def main(argv: list[str] | None = None) -> int | None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("family", choices=FAMILIES, metavar="FAMILY", help=", ".join(FAMILIES))
    parser.add_argument(
        "--src", type=Path, required=True, help="official file or its folder; with --export ours"
    )
    parser.add_argument(
        "--dst", type=Path, required=True, help="folder to write (latte --export: a .pt file)"
    )
    parser.add_argument(
        "--export", action="store_true", help=f"back to upstream's layout: {', '.join(EXPORTS)}"
    )
    parser.add_argument("--num-heads", type=int, help="latte only: attention heads of an unpublished size")
    parser.add_argument(
        "--num-frames",
        type=int,
        help="latte only: latent frames of the new model, e.g. 21 from 16-frame weights",
    )
    args = parser.parse_args(argv)
    # Options that do not fit are refused before anything is read.
    if args.export and args.family not in EXPORTS:
        raise ValueError(f"--export {args.family}: only {' and '.join(EXPORTS)} can be written back")
    for name in ("num_heads", "num_frames"):
        flag, value = f"--{name.replace('_', '-')}", getattr(args, name)
        if value is not None and (args.family != "latte" or args.export):
            raise ValueError(f"{flag} belongs to `latte` without --export")
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if not args.src.exists():
        raise ValueError(f"--src {args.src}: no such file or folder")
    # Convert; what goes wrong inside is told with the file that it is about.
    try:
        if args.export:
            print(export(args.family, args.src, args.dst))
        else:
            latte = {"num_heads": args.num_heads, "num_frames": args.num_frames}
            print(convert(args.family, args.src, args.dst, **latte))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # odd shapes and settings fail wherever they are first used
        told = isinstance(error, ValueError)
        if told and (str(args.src) in str(error) or str(args.dst) in str(error)):
            raise
        raise ValueError(
            f"--src {args.src}: not taken as weights of {args.family} ({'' if told else f'{type(error).__name__}: '}{error})"
        ) from error


if __name__ == "__main__":
    run(main)
