"""Pictures through diffusers' own pipelines: samples of the cascade, `generate`, and Stage I's remakes for Stage II.

Entries: `sampling.jobs`, what is asked for; `sampling.cascade`, `sampling.generate`, `sampling.remakes`.
"""
