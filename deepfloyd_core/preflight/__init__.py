"""All checks that run before anything is made.

Entry: `preflight.check.check_run`. `preflight.load.load_run` only reads and compares the two files.
"""
