"""From the ledger to the training data: the plan of crops, Parquet shards, their live rows, the held-out pictures.

Entries: `crops.pixels.plan_shards`, `build_shard`, `finish_pixels`.
"""
