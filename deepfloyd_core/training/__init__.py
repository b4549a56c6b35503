"""The trainer: order, draws, forward pass, optimizer, checkpoints, validation.

Entry: `training.trainer.train`.
"""
