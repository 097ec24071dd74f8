"""Train models larger than the GPU with the Lightning code you already have."""
