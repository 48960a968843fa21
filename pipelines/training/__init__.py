"""Machinery behind the programs that train: settings, run folder, checkpoints, processes, log."""
