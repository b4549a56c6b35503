"""UNets and model folders: found, downloaded, loaded, quantised, made at random, told apart.

Entries: `models.folders.resolve`, `models.unet`.
"""
