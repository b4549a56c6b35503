"""From captions to T5's hidden states, stored once, and to each stage's projection of them.

Entries: `text.encode` makes the embeds, `text.embeds.Embeds` reads them.
"""
