"""What is published: the bundle and its model card, the plan of a bundle, `verify`.

Entries: `bundle.build`, `bundle.planned.planned_bundle`, `bundle.verify`.
"""
