"""One picture: from a file's bytes to an upright RGB picture, to a crop at a training size, to a sheet for people.

Entries: `pictures.decode`, `pictures.geometry`, `pictures.resize`.
"""
