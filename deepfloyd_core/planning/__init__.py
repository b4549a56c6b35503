"""What a run would do, before it does: data, artifacts, steps, memory, disk and time. No torch.

Entry: `planning.plan.plan_run`.
"""
