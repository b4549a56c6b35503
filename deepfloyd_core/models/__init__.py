"""UNets and model folders: found, downloaded, loaded, quantised, made at random, identified.

Entries: `models.folders.resolve`, `models.unet`.
"""
