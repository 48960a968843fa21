"""Videos in, clips out: readers, sources, the endless sample stream and the latent cache.

The pixel rule: uint8 (T, H, W, 3) RGB on disk and from decoders; float32 (3, T, H, W) in [-1, 1] to models.
"""
