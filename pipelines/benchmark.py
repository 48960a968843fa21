"""Speed: of the VAE's four variants as in the paper's Table 3, and of everything against peers' code or the plain way.

    python -m pipelines.benchmark vae                    # CSpeed: encoder, 1 x 3 x 81 x 256 x 256
    python -m pipelines.benchmark vae num_frames=17 size=128 "block_out_channels=[32,64,128,128]" repeats=3
    python -m pipelines.benchmark all --peer ~/Open-Sora-Plan,~/Latte,~/content-debiased-fvd out=speed.jsonl
    python -m pipelines.benchmark vae --model card=h100  # modelled: milliseconds, bytes, kernels, layout copies

A row of the first kind runs in a process of its own. `train`, `cache`, `sample`, `data`, `eval`, `all`, and `vae` with
--peer, time ways to do the same thing in turns: medians, spread, how much faster, share of the machine's own speed.
"""

import argparse
import json
import logging
import multiprocessing
import platform
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.core.cli import run
from data.core.lazy import lazy
from data.core.option import option
from pipelines.training.config import at_least, parse
from pipelines.training.settings import Precision

cards = lazy("pipelines.plan.cards")
cases = lazy("pipelines.bench.cases")
distributed = lazy("pipelines.training.distributed")
efficiency = lazy("pipelines.efficiency")
files = lazy("data.core.files")
model = lazy("pipelines.bench.model")
pairs = lazy("pipelines.bench.pairs")
peers = lazy("pipelines.bench.peers")
plan_report = lazy("pipelines.plan.report")
programs = lazy("pipelines.plan.programs")
run_folder = lazy("pipelines.training.folder")
torch = lazy("torch")
vaes = lazy("vae")

log = logging.getLogger(__name__)


@dataclass
class BenchmarkConfig:
    preset: str = option("odvae", "odvae|osp_v1_2")
    variants: list[int] = option([1, 2, 3, 4], "rows")
    block_out_channels: list[int] = option([128, 256, 512, 512], "widths of the four levels")
    layers_per_block: int = option(2, "residual blocks of a level")
    norm_num_groups: int = option(32, "groups of each GroupNorm; divides every width")
    num_frames: int = option(81, "frames of the clip")
    size: int = option(256, "its side in pixels")
    batch: int = option(1, "clips at once")
    precision: Precision = option(
        Precision.fp32, "bf16: of weights and clip; tf32: of the products of fp32 ones"
    )
    compile: bool = option(False, "torch.compile a step of the encoder and of the decoder")
    decode: bool = option(True, "measure decoding too")
    warmup: int = option(2, "runs before the clock starts")
    repeats: int = option(10, "timed runs; the median counts")
    out: str = option("", "append the rows to this JSONL file")


@dataclass
class ComparisonConfig:
    peer: str = option("", "checkouts of Open-Sora-Plan v1.2.0, Latte and cd-fvd, separated by commas")
    only: str = option("", "only cases whose name holds this")
    size: str = option("", "tiny|reduced|full; default full on a GPU, else reduced")
    rounds: int = option(5, "timed runs of each way; the median counts")
    warmup: int = option(1, "runs before the clock starts")
    threads: int = option(1, "of the CPU")
    card: str = option("h100", "of --model: h100|h200|a100|a100-40|l40s|rtx4090|rtx3090")
    out: str = option("", "append the records to this JSONL file")


KINDS = ("vae", "train", "cache", "sample", "data", "eval")


def compare(argv: list[str]) -> int:
    """`benchmark KIND [--peer FOLDERS] [--model]`: our ways and others in turns, or what they cost on a card."""
    modelled = "print what the work costs at full size on card=h100, from a simulation, then stop"
    # Which kinds, and whether the settings make sense.
    kinds = KINDS if argv[0] == "all" else argv[:1]
    config, args = parse(
        ComparisonConfig, argv[1:], "benchmark", __doc__, {"--peer": "peer"}, {"--model": modelled}
    )
    at_least(config, 1, "rounds", "threads")
    at_least(config, 0, "warmup")
    if config.size not in ("", "tiny", "reduced", "full"):
        raise ValueError(f"size={config.size}: one of tiny, reduced, full")
    if args.model:
        kinds = [kind for kind in kinds if kind in model.KINDS]
        if not kinds:
            known = ", ".join(model.KINDS)
            raise ValueError(f"{argv[0]} --model: no model of this kind; those with one are {known}, all")

    if args.dry_run:
        print(run_folder.summary(config))
        return 0
    if config.out:
        files.claim_file(config.out, files.is_json_object)
        Path(config.out).parent.mkdir(parents=True, exist_ok=True)
    # Each case is printed, and appended to the file, as soon as it is measured.
    rows = _modelled(kinds, config) if args.model else _measured(kinds, config)
    made = {"versions": run_folder.versions(), "command": sys.argv}
    found = False
    for row, text in rows:
        found = found or "case" in row
        print(text, flush=True)
        if config.out:
            files.append_line(config.out, json.dumps({**row, **made}))
    if not found:
        raise ValueError(f"only={config.only}: no case of {', '.join(kinds)} has this in its name")
    return 0


def _modelled(kinds: Iterable[str], config: ComparisonConfig) -> Iterator[tuple[dict[str, Any], str]]:

    card = cards.find_card(config.card)
    for kind in kinds:
        for row in model.rows(kind, card):
            if config.only in row["case"]:
                words = f"{row['kernels']:7d} kernels {row['layout_copies']:6d} layout copies"
                yield row, f"{row['case']:64s} {row['ms']:9.1f} ms {row['bytes'] / 1e9:8.1f} GB {words}"


def _measured(kinds: Iterable[str], config: ComparisonConfig) -> Iterator[tuple[dict[str, Any], str]]:

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(config.threads)
    modules, clock = peers.load_peers(config.peer), pairs.Clock(device)
    # What this machine reaches at most, for the share of it that each case reaches.
    best = pairs.peaks(clock, device)
    where = torch.cuda.get_device_name() if clock.cuda else f"{platform.machine()}, {config.threads} threads"
    machine = {"device": where, "clock": clock.unit, "peaks": best}
    yield (
        {"machine": machine},
        f"{where}, {clock.unit}; at most {best['conv'] / 1e9:.0f} GFLOP/s in a convolution, "
        f"{best['matmul'] / 1e9:.0f} in a product, copies {best['copy'] / 1e9:.1f} GB/s",
    )
    size = config.size or ("full" if clock.cuda else "reduced")
    for kind in kinds:
        for case in cases.KINDS[kind](cases.Setup(size, device, modules, config.only)):
            if config.only not in case.name:
                continue
            row = pairs.record(case, config.rounds, config.warmup, clock, best)
            yield {"kind": kind, **row, "machine": machine}, "\n".join(pairs.lines(row))


def measure(config: BenchmarkConfig, variant: int) -> dict[str, Any]:
    """One row: encode and decode speed and peak memory of a variant."""
    import resource

    # A variant with random weights: its speed is that of a trained one.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if config.precision is Precision.bf16 else torch.float32
    vae = vaes.ODVAE.preset(
        config.preset,
        variant=variant,
        block_out_channels=tuple(config.block_out_channels),
        layers_per_block=config.layers_per_block,
        norm_num_groups=config.norm_num_groups,
    )
    vae = (vae.bfloat16() if dtype is torch.bfloat16 else vae).to(device).eval()
    clip = (
        torch.rand(config.batch, 3, config.num_frames, config.size, config.size, device=device, dtype=dtype)
        * 2
        - 1
    )
    if config.compile:
        vae.compile_steps()
    s = vae.spatial_compression_ratio
    sides = vae.latent_frames(config.num_frames), config.size // s, config.size // s
    z = torch.randn(config.batch, vae.latent_channels, *sides, device=device, dtype=dtype)
    row = {"variant": variant, "params": vae.num_parameters(), "precision": config.precision.value}
    runs = {"encode": lambda x: vae.encode(x).latent_dist.mode()}
    if config.decode:
        runs["decode"] = lambda _: vae.decode(z).sample
    with distributed.matrix_products(config):
        for name, go in runs.items():
            row[name] = efficiency.encoder_speed(go, clip, config.warmup, config.repeats)
    # kilobytes on Linux, bytes on macOS
    row["host_peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
        2**20 if sys.platform == "darwin" else 2**10
    )
    return row


def line(row: dict[str, Any]) -> str:
    encode, decode = row["encode"], row.get("decode")

    def speed(measured: dict[str, Any] | None) -> str:
        if measured and measured["batches_per_s"]:
            return f"{measured['batches_per_s']:8.3f} it/s"
        return f"{(measured and measured['out_of_memory']) or '-':>13}"

    memory = encode["allocated_mib"]
    where = f"{memory:8.0f} MiB GPU" if memory is not None else f"{row['host_peak_mib']:8.0f} MiB host"
    words = f"encode {speed(encode)}  decode {speed(decode)}"
    return f"variant {row['variant']}  {row['params']:>12,}  {words}  {where}"


def config_from(argv: list[str] | None) -> tuple[BenchmarkConfig, argparse.Namespace]:
    """The settings of a command line, and its switches."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv[:1] == ["vae"]:
        argv = argv[1:]
    elif "--help" not in argv and "-h" not in argv:
        raise ValueError(
            f"say what to measure: python -m pipelines.benchmark {'|'.join(KINDS)}|all [key=value ...]"
        )
    return parse(BenchmarkConfig, argv, "benchmark", __doc__, planned=True)


def main(argv: list[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    # Comparisons have settings of their own; the rest is the speed of the four variants.
    kind, options = "".join(words[:1]), {word.split("=")[0] for word in words}
    if kind in (*KINDS[1:], "all") or (kind == "vae" and options & {"--peer", "--model", "peer"}):
        return compare(words)
    config, args = config_from(argv)
    if args.plan:
        print(plan_report.plan_text("benchmark", programs.benchmark, config, args.card))
        return 0

    if args.dry_run:
        print(run_folder.summary(config))
        return 0
    if config.out:
        files.claim_file(config.out, files.is_json_object)
    # Each variant in a process of its own, whose peak of memory is then the variant's.
    made = run_folder.versions()
    for variant in config.variants:
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            row = pool.apply(measure, (config, variant))
        print(line(row), flush=True)
        if config.out:
            Path(config.out).parent.mkdir(parents=True, exist_ok=True)
            files.append_line(config.out, json.dumps({**row, "versions": made, "command": sys.argv}))
    return 0


if __name__ == "__main__":
    # Under its own name: the measuring process imports the settings from there.
    from pipelines.benchmark import main as program

    run(program)
