"""A data set as a table: every input file becomes one row of the ledger, accepted or with one named reason, with captions.

Entry: `index.index.build_index`.
"""
