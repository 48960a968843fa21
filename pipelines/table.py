"""What the paper compares.

python -m pipelines.table --list-vaes
"""

import argparse

from data.cli import run


def vae_rows() -> list[tuple[str, ...]]:
    """Name, parameters as the paper counts them, VCPR nominal and effective at 81 frames, latent frames, licence."""
    from vae import describe_vaes

    rows = [("name", "paper's name", "params", "VCPR", "at 81", "latent frames of 25/33/81", "licence")]
    for vae in describe_vaes():
        frames = "/".join(str(vae["latent_frames"][T]) for T in (25, 33, 81))
        nominal, effective = str(vae["vcpr_nominal"]), f"{vae['vcpr_effective_81']:.1f}"
        rows.append(
            (
                vae["name"],
                vae["paper_name"],
                f"{vae['params_paper_counts']:,}",
                nominal,
                effective,
                frames,
                vae["licence"],
            )
        )
    return rows


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pipelines.table", description="What the paper compares")
    parser.add_argument("--list-vaes", action="store_true", required=True, help="the seven VAEs of Table 1")
    parser.parse_args(argv)
    rows = vae_rows()
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return 0


if __name__ == "__main__":
    run(main)
