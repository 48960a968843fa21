"""What `python -m pipelines.benchmark` compares, with whom, and how it times it."""
