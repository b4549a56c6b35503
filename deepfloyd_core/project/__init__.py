"""A new project: looks at a folder of pictures and at this machine, and writes a run file and a data file that suit both.

Start at `look.look_at`; `choose.choose` is pure, and `write` makes the files.
"""
