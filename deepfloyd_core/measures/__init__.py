"""Pictures in, figures out.

Entry: `measures.upscaling.measure_upscalers`; which measures there are: `measures.registry.MEASURES`.
"""
