"""Where pictures lie: folders, buckets, tar files, tables of URLs, Hugging Face's saved data sets, and what lies there.

Entry: `sources.source.open_source`.
"""
