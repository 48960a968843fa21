"""Where the official weights of the judges are, and whether a file you have is one of them.

python eval/check_weights.py            # what is needed, from where, and what is already there
python eval/check_weights.py FILE...    # exit code 0: all verified; 1: some fit but have no published digest
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.cli import run
from data.files import sha256_of
from eval.weights import WEIGHT_FILES, find_weights, identify


def kind_of(path: Path) -> str:
    """Which of WEIGHT_FILES a file is meant to be, by its name. Raises ValueError for none."""
    for kind, official in WEIGHT_FILES.items():
        if path.name in (official.file, Path(official.file).with_suffix(".safetensors").name):
            return kind
    if "i3d" in path.name.lower() or path.name.startswith("rgb_imagenet"):
        return "i3d"
    names = ", ".join(official.file for official in WEIGHT_FILES.values())
    raise ValueError(f"{path}: the name says not which weights these are; the official ones are {names}")


def verify(path: Path) -> tuple[bool, str]:
    """(verified, what was found). Raises ValueError for a file that is missing, wrong, or does not fit."""
    from eval.weights import load_c3d, load_i3d

    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    kind = kind_of(path)
    provenance = identify(path, kind)
    if kind == "i3d":
        provenance = load_i3d(path)[1]
    elif kind == "c3d":
        load_c3d(path)
    if kind == "i3d_torchscript" and not provenance.known:
        raise ValueError(f"{path}: not the published file, and a TorchScript file runs code; do not load it")
    if provenance.known:
        return True, provenance.tensors or "the published digest"
    return False, provenance.tensors or f"readable; {WEIGHT_FILES[kind].digest}; sha256 {sha256_of(path)}"


def listing() -> list[str]:
    """A line for each official file."""
    lines = []
    for kind, official in WEIGHT_FILES.items():
        try:
            path = find_weights(kind)
            place = f"found: {path}" if path.name == official.file else f"not needed: {path} is there"
        except ValueError:
            place = "not found below $OMNILATTE_WEIGHTS"
        lines.append(
            f"{official.file} ({official.network}, {official.digest})\n  {official.source}\n  {place}"
        )
    return lines


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE", help="downloaded files to verify")
    files = parser.parse_args(argv).files
    if not files:
        print("\n".join(listing()))
        return 0
    results = []
    for path in files:
        verified, text = verify(path)
        results.append(verified)
        print(f"{path.name}: {'verified' if verified else 'not verified'}: {text}")
    return 0 if all(results) else 1


if __name__ == "__main__":
    run(main)
