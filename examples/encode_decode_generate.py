"""Encode a video, decode it, generate a new one. After bash scripts/demo.sh: python -m examples.encode_decode_generate

With other models: python -m examples.encode_decode_generate PIPELINE VIDEO OUT (folder, file, folder for the two mp4).
"""

import sys
from pathlib import Path

import torch

from data.clip import to_float, to_uint8
from data.encode import write_mp4
from data.video import read_frames
from pipelines.video_pipeline import LatentVideoPipeline

demo = ("runs/demo/latte/pipeline", "runs/demo/samples/000000.mkv", "runs/demo/example")
pipeline, video, out = sys.argv[1:] or demo
for path in (pipeline, video):
    if not Path(path).exists():
        sys.exit(f"error: {path} is not there; run bash scripts/demo.sh first, or name PIPELINE VIDEO OUT")

pipe = LatentVideoPipeline.from_pretrained(pipeline)  # a VAE and a Latte
vae = pipe.vae.eval()
x = to_float(read_frames(video, range(9)))[None]  # (1, 3, 9, H, W) in [-1, 1]; H and W divide by 8
with torch.inference_mode():
    z = vae.encode(x).latent_dist.mode()  # (1, C, 3, H / 8, W / 8): OD-VAE makes 4k + 1 frames to k + 1
    decoded = vae.decode(z).sample  # (1, 3, 9, H, W)
generated = pipe(num_inference_steps=50, seeds=[0], output_type="video").frames  # (1, 3, T, H, W) in [-1, 1]

write_mp4(Path(out) / "decoded.mp4", to_uint8(decoded)[0], fps=8)
write_mp4(Path(out) / "generated.mp4", to_uint8(generated)[0], fps=8)
print(
    f"{tuple(x.shape)} -> {tuple(z.shape)} -> {tuple(decoded.shape)}; generated {tuple(generated.shape)}: {out}"
)
