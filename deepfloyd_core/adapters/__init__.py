"""What can be trained of a UNet: LoRA, BitFit, ControlNet-LoRA, all of it; put on, saved, loaded again, taken off.

Entry: `adapters.method.method_of`.
"""
