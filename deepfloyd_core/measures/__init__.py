"""Pictures in, figures out.

Entry: `measures.upscaling.measure_upscalers`.
"""
