"""Pictures from diffusers' own pipelines: samples of the cascade, `generate`, and Stage I's remakes for Stage II.

Entries: `sampling.jobs` (the requests); `sampling.cascade`, `sampling.generate`, `sampling.remakes`.
"""
