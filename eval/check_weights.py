"""Where the official weights of the judges are, and whether a file you have is one of them.

python eval/check_weights.py            # what is needed, from where, and what is already there
python eval/check_weights.py FILE...    # exit code 0: all verified; 1: some fit but have no published digest
"""

import argparse
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from data.core.cli import run
from data.core.environment import weights_folder
from data.core.files import sha256_of
from data.core.lazy import lazy
from eval.weight_files import LPIPS_NAMES, WEIGHT_FILES
from eval.weights import accepted_names, find_weights, identify

fidelity = lazy("eval.fidelity")
weights = lazy("eval.weights")


def kind_of(path: Path) -> str:
    """Tell by its name which of WEIGHT_FILES a file is meant to be. Raises ValueError for none."""
    for kind in reversed(WEIGHT_FILES):  # i3d, which takes a TorchScript's name too, last
        if path.name in accepted_names(kind):
            return kind
    if "i3d" in path.name.lower() or path.name.startswith("rgb_imagenet"):
        return "i3d"
    names = ", ".join(official.file for official in WEIGHT_FILES.values())
    raise ValueError(f"{path}: the name says not which weights these are; the official ones are {names}")


def verify(path: Path) -> tuple[bool, str]:
    """Return (verified, what was found). Raises ValueError for a file that is missing, wrong, or does not fit."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    # A program with weights is identified by its digest only: loading it would run it.
    kind = kind_of(path)
    if kind == "i3d_torchscript":
        provenance = identify(path, kind)
        if not provenance.known:
            raise ValueError(
                f"{path}: not the published file, and a TorchScript file runs code; do not load it"
            )
    # All others are loaded into their network, so that keys and shapes are checked too.
    elif kind in LPIPS_NAMES:
        _, provenance = fidelity.load_lpips(path, net=LPIPS_NAMES[kind])
    else:
        load = {"i3d": weights.load_i3d, "c3d": weights.load_c3d, "c3d_mean": weights.load_c3d_mean}
        _, provenance = load[kind](path)
    if provenance.known:
        return True, provenance.tensors or "the published digest"
    return False, provenance.tensors or f"readable; {WEIGHT_FILES[kind].digest}; sha256 {sha256_of(path)}"


def listing() -> list[str]:
    """Describe each official file: name, digest, source, and where it was found."""
    lines = []
    for kind, official in WEIGHT_FILES.items():
        try:
            path = find_weights(kind)
            its_own = path.name in (official.file, official.fetched)
            place = f"found: {path}" if its_own else f"not needed: {path} is there"
        except ValueError:
            place = f"not found in {weights_folder()}"
            place += "; bash scripts/fetch_weights.sh gets it" if official.fetched else ""
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
