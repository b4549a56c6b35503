"""Prefect tasks, one module per artifact: choose the spec, call the core's builder, publish what the UI shows."""

import logging

# Prefect forwards this logger to its server (PREFECT_LOGGING_EXTRA_LOGGERS) but leaves its level at WARNING.
logging.getLogger("deepfloyd_core").setLevel(logging.INFO)
