"""The judges: clips or folders of videos in, numbers out (FVD, KVD, IS, PSNR, SSIM, LPIPS, memory and speed).

Light on purpose: torch is imported by the modules that need it. Import names from it, not the package itself, because
`import eval` hides the builtin: `from eval.measures import frechet_distance`.
"""
