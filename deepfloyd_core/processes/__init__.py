"""Code that may die or must give its memory back: a fork server, a pool for hostile pictures, and jobs for torch.

Entries: `processes.pool.Children`, `processes.jobs.run_job`.
"""
