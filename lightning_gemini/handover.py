"""The model after a run: an ordinary module again, with its weights where that can be."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_gemini.core import Engine


def hand_back(engine: Engine, parted: bool, host_memory: int | None) -> None:
    """Releases the engine on every rank, and says so where the model cannot have its weights.

    Args:
        parted: whether a rank has failed, so that nothing can be gathered.
        host_memory: bytes of host memory that this rank may use, ``None`` for no bound.
    """
    fits = host_memory is None or engine.weight_bytes <= host_memory
    room = not parted and all(engine.store.collectives.gather_objects(fits))
    whole = engine.release(keep_weights=room)
    if room:
        return
    if parted:
        reason = "the run ended in an exception on some rank"
    else:
        reason = "the whole weights do not fit into the host memory of every rank"
    if whole:
        rank_zero_warn(f"{reason}: the model holds the weights of the last step that succeeded.")
    else:
        rank_zero_warn(
            f"{reason}: the weights stay in pieces on the ranks, and the model holds placeholders (NaN). Take them "
            "from a checkpoint, or use summon_full_params before the run ends."
        )
