"""Finished artifacts: a directory, a manifest written last, locks, reuse, and the published versions.

Entry: `store.artifacts.materialise`.
"""
