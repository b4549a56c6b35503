"""The code that trained the shipped weights and drew the demo's pictures."""
