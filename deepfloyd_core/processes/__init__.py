"""Code that may crash or must free its memory: a fork server, a pool for hostile pictures, and jobs for torch.

Entries: `processes.pool.Children`, `processes.jobs.run_job`.
"""
