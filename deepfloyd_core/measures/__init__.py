"""Pictures in, quality figures out.

Entry: `measures.upscaling.measure_upscalers`; the table of measures: `measures.registry.MEASURES`.
"""
