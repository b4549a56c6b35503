"""Pure tensor functions: the UNets' inputs and training losses. Noise, time and noise level are arguments.

Entry: `diffusion.loss`.
"""
