"""Sharded checkpoints: a folder that holds, at any moment, one whole checkpoint or says that it holds none."""

from lightning_gemini.checkpoint.manifest import Manifest, Piece, StoredFile, StoredTensor
from lightning_gemini.checkpoint.plain import load_checkpoint, save_checkpoint
from lightning_gemini.checkpoint.reader import CheckpointReader, load, open_checkpoint
from lightning_gemini.checkpoint.removal import remove
from lightning_gemini.checkpoint.writer import CheckpointWriter, save

__all__ = [
    "CheckpointReader",
    "CheckpointWriter",
    "Manifest",
    "Piece",
    "StoredFile",
    "StoredTensor",
    "load",
    "load_checkpoint",
    "open_checkpoint",
    "remove",
    "save",
    "save_checkpoint",
]
