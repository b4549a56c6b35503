"""Prefect flows and the command line: which artifacts are made, in which order."""
