"""The command line: what `deepfloyd` takes and prints. Entry: `cli`."""
