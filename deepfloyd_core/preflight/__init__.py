"""Everything that is checked before anything is made.

Entry: `preflight.load.load_run`.
"""
