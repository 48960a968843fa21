"""Encode videos to latents that another project can read with safetensors alone.

    python -m pipelines.encode /videos latents --vae-path runs/odvae/vae      # every video, whole, at its own size
    python -m pipelines.encode in.mp4 in.safetensors --vae-path runs/odvae/vae
    python -m pipelines.decode latents decoded --vae-path runs/odvae/vae

A file has the tensor `latents`, (C, t, h, w) float32, posterior means (codebook entries of a discrete VAE), not
normalised; and in its header, as text: num_frames, height, width (of the video, without the padding that is in the
latents), fps, window (frames encoded at once; 0: the whole video as one stream), source, vae, vae_sha256, and what a
diffusion model normalises by: scaling_factor, latents_mean, latents_std. Of a variable frame rate also when each frame is
shown: ticks, and tick, the seconds of one as [numerator, denominator].
"""

from pathlib import Path

from data.core.cli import run
from data.core.lazy import lazy
from data.finding import VIDEO_SUFFIXES
from data.video import iterate_frames, probe
from pipelines import video_files
from pipelines.training.log import command

clips = lazy("vae.clips")


def main(argv: list[str] | None = None) -> int:
    parser = video_files.parser(
        "encode", __doc__, "video file or folder of videos", ".safetensors file or folder"
    )
    window = "frames at once, for a VAE that cannot be streamed"
    parser.add_argument("--window", type=int, default=33, metavar="N", help=window)
    # The VAE, what the header says of it, and the files that are not done yet.
    args = parser.parse_args(argv)
    vae, digest = video_files.open_vae(args)
    about = {"vae": type(vae).__name__, "vae_sha256": digest, **vae.latent_rule()}
    settings = {"vae_sha256": digest, "window": args.window, "bf16": args.bf16}
    todo = video_files.pairs(args.given, args.out, ".safetensors", VIDEO_SUFFIXES, "encode", settings)

    def work(given: Path, out: Path) -> str:
        # Every frame that the container promises, or none: a file cut short is refused.
        info = probe(given)
        video = clips.encode_video(vae, iterate_frames(given), args.window)
        if video.num_frames != info.num_frames:
            raise ValueError(f"{given}: {video.num_frames} of {info.num_frames} frames were read")
        own = {"fps": info.fps, "source": given.name}
        if info.clock:
            own |= {"tick": info.clock.base.as_integer_ratio(), "ticks": info.clock.ticks}
        video_files.save_latents(out, video, about | own)
        return f"{given} -> {out}: {video_files.frames_line(info)}; latents {tuple(video.latents.shape)}"

    # What comes next: the way back.
    bad = video_files.each(todo, "encode", work)
    one = args.out.is_file()
    decoded = args.out.with_name(f"{args.out.stem}-decoded.mp4") if one else f"{args.out}-decoded"
    back = command("decode", str(args.out), str(decoded), *video_files.of_vae(args))
    return video_files.end(args, todo, bad, back)


if __name__ == "__main__":
    run(main)
