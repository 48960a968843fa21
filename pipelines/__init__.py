"""Programs: train the VAE, cache latents, train the denoiser, sample, report. Each is `python -m pipelines.NAME`."""
