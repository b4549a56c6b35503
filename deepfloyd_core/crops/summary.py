"""The summary of crops: a stage's pixels, their conditioning pictures, or the held-out pictures."""

from deepfloyd_core.store.manifest import Summary


class CropsSummary(Summary):
    """The summary of an artifact of crops."""

    shards: int
    rows: int
    shown_per_epoch: int  # including repeats without a row of their own
    pictures: int
    sizes: tuple[str, ...]  # px, WIDTHxHEIGHT
    decoded: int  # pictures, for the shards that were made
    shards_taken_over: int  # of an older artifact
