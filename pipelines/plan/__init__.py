"""What a program would cost on a GPU, found out without one: its own code on tensors without data."""
