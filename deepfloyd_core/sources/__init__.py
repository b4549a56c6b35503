"""Where pictures lie: folders, buckets, tar files, tables of URLs, saved Hugging Face data sets; and the captions there.

Entry: `sources.source.open_source`.
"""
