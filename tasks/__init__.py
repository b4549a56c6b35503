"""Prefect tasks, one module per artifact: choose the spec, call the core's builder, publish what the UI shows."""
