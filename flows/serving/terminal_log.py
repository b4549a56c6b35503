"""Prints our own log records on the terminal, above the progress bars; those of Prefect go to its server alone."""

import logging


def log_to_terminal() -> None:
    """From now on. Imports Prefect, which sets up its logging."""
    import prefect.main  # noqa: F401

    from tasks import LOGGERS
    from tasks.progress import LogLines

    for handler in logging.getLogger().handlers + logging.getLogger("prefect._internal").handlers:
        handler.setLevel(logging.CRITICAL + 1)  # errors reach the user once, through main()
    lines = LogLines()
    for name in LOGGERS:
        logging.getLogger(name).addHandler(lines)
