"""Decode what pipelines.encode wrote to videos of their own size, rate and length, without sound.

    python -m pipelines.decode latents decoded --vae-path runs/odvae/vae            # .mp4, or with --lossless .mkv
    python -m pipelines.decode in.safetensors out.mkv --vae-path runs/odvae/vae

The VAE must be the one that encoded them.
"""

import json
import shlex
from pathlib import Path

from data.core.cli import run
from data.core.lazy import lazy
from data.encode import writing_video
from pipelines import video_files

clips = lazy("vae.clips")


def main(argv: list[str] | None = None) -> int:
    parser = video_files.parser(
        "decode", __doc__, "what pipelines.encode wrote: file or folder", ".mp4, .mkv or folder"
    )
    parser.add_argument(
        "--lossless", action="store_true", help="in a folder OUT: .mkv (FFV1) instead of .mp4"
    )
    # The VAE that encoded, and the files that are not done yet.
    args = parser.parse_args(argv)
    vae, digest = video_files.open_vae(args)
    suffix, settings = ".mkv" if args.lossless else ".mp4", {"vae_sha256": digest, "bf16": args.bf16}
    todo = video_files.pairs(args.given, args.out, suffix, (".safetensors",), "decode", settings)

    def work(given: Path, out: Path) -> str:
        # Only with the weights that made the latents; others would give another video without any error.
        video, header = video_files.read_latents(given)
        if header.get("vae_sha256") != digest:
            raise ValueError(
                f"{given}: encoded by another VAE ({header.get('vae')}, weights {str(header.get('vae_sha256'))[:12]}; "
                f"this one: {digest[:12]}); give that one as --vae-path"
            )
        # Piece by piece into the file, at the rate and the times of the original.
        fps = float(json.loads(header.get("fps", "0"))) or video_files.FALLBACK_FPS
        clock = video_files.clock_of(header, video.num_frames, given)
        with writing_video(out, video.height, video.width, fps, clock=clock) as write:
            for frames in clips.decode_stream(vae, video):
                write(frames)
        return f"{given} -> {out}: {video.num_frames} frames of {video.width} x {video.height}, {fps:.4g} frames/s"

    # What comes next: a lossless result can be measured.
    bad = video_files.each(todo, "decode", work)
    exact = args.lossless or args.out.suffix == ".mkv"  # what H.264 loses is not the VAE's fault
    original = "ORIGINAL_VIDEO" if args.out.is_file() else "FOLDER_OF_ORIGINALS"
    judge = f"python eval/fidelity.py --real {original} --fake {shlex.quote(str(args.out))}" if exact else ""
    return video_files.end(args, todo, bad, judge)


if __name__ == "__main__":
    run(main)
