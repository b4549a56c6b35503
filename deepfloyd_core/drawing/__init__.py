"""Drawing with a version: from options that are checked to finished pictures.

Entries: `drawing.generated.draw`, `drawing.upscaled.upscale`.
"""
