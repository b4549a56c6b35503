"""Pure tensor functions: what the UNets are trained on and fed with. Noise, time and noise level come in as arguments.

Entry: `diffusion.loss`.
"""
