"""Finished things: a directory, a manifest written last, locks, reuse, and the versions that were published.

Entry: `store.artifacts.materialise`.
"""
