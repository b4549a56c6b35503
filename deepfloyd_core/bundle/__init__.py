"""What is published: the bundle and its model card, what would be made, `verify`.

Entries: `bundle.build`, `bundle.planned.planned_bundle`, `bundle.verify`.
"""
