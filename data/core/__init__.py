"""What every package may use and what knows nothing about videos, models or scores."""
