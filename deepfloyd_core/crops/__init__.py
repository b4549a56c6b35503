"""From the ledger to what is trained on: the plan of crops, Parquet shards, their live rows, the held-out pictures.

Entries: `crops.pixels.plan_shards`, `build_shard`, `finish_pixels`.
"""
