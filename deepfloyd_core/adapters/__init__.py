"""The trainable parts of a UNet: LoRA, BitFit, ControlNet-LoRA, or all of it; added, saved, loaded again, removed.

Entry: `adapters.method.method_of`.
"""
