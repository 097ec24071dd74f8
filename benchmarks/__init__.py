"""What the engine costs beside plain PyTorch, DDP and FSDP2; ``python -m benchmarks`` runs it."""
