"""Everything that is checked before anything is made.

Entry: `preflight.check.check_run`. `preflight.load.load_run` reads and compares the two files alone.
"""
