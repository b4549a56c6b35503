"""Prefect tasks, one module per artifact: choose the spec, call the core's builder, publish what the UI shows."""

import logging
from importlib import metadata

from deepfloyd_core.store.provenance import DISTRIBUTION

# Of every flow. Prefect's default is a hash of the file of the outermost decorator, one for all of ours.
VERSION = metadata.version(DISTRIBUTION)

# Whose records Prefect sends to its server (PREFECT_LOGGING_EXTRA_LOGGERS); it leaves their level at WARNING.
LOGGERS = ("deepfloyd_core", "tasks", "flows")
for name in LOGGERS:
    logging.getLogger(name).setLevel(logging.INFO)
