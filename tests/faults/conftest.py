"""The tiny settings of the program tests, and real processes in which files stop growing."""

from tests.programs.conftest import latte_settings, own_vae, trained_vae, vae_settings

__all__ = ["latte_settings", "own_vae", "trained_vae", "vae_settings"]
