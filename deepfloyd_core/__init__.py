"""The pipeline itself as plain functions: no Prefect, no argument parsing, no environment.

Nothing heavy is imported here, so that configuration errors are answered before torch is loaded.
"""
