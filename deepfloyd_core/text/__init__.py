"""Captions to T5's rows, stored once, and to each stage's projection of them.

Entries: `text.encode` makes the embeds, `text.embeds.Embeds` reads them.
"""
