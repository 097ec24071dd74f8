"""What each rank adds to a checkpoint so that a run goes on from it as if it had not been interrupted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import lightning as L
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.fabric.utilities.types import _PATH, _Stateful
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from typing_extensions import override

from lightning_gemini.checkpoint_strategy import CheckpointStrategy
from lightning_gemini.checkpointing import EXTRA
from lightning_gemini.even import even
from lightning_gemini.loaders import PositionedIterator, PositionedLoader, resumable
from lightning_gemini.random_state import State, random_state, set_random_state, state_for
from lightning_gemini.restart import batches_remain, prepare, restart, set_epoch


@dataclass(frozen=True)
class _Place:
    """Where the run is to go on.

    Attributes:
        own: what this rank has saved; ``None`` from a checkpoint of another strategy.
        loaders: states of loaders that another strategy has saved.
        ending: whether the batches of an epoch are done, and its end is not.
    """

    own: State | None
    loaders: list[Any]
    ending: bool


class ResumableStrategy(CheckpointStrategy):
    """Saves for each rank what Lightning leaves out, and goes on with it: random numbers, and positions in the data."""

    _place: _Place | None = None
    _left: State | None = None  # of this rank, after a fit

    @override
    def process_dataloader(self, dataloader: object) -> object:
        _auto_add_worker_init_fn(dataloader, self.global_rank)  # Lightning's, which would not reach what is wrapped
        if self._trainer.training:
            dataloader = resumable(dataloader)
        if self.world_size > 1:
            dataloader = even(dataloader, self.reduce_boolean_decision)
        return super().process_dataloader(dataloader)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None) -> None:
        self.add_ranks(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    @override
    def load_checkpoint(self, checkpoint_path: _PATH, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = super().load_checkpoint(checkpoint_path, weights_only)
        self.take_rank(checkpoint)
        return checkpoint

    def add_ranks(self, checkpoint: dict[str, Any]) -> None:
        """Adds every rank's part to a checkpoint of Lightning that is about to be written; all ranks have to call.

        It goes to ``checkpoint["lightning_gemini"]["ranks"]``, a list by rank. What Lightning itself has noted of
        loaders is reduced to those that look after themselves, so that plain Lightning can load it.
        """
        noted = _noted(checkpoint)
        if "combined_loader" in noted:
            stateful = [loader for loader in _flattened(self._trainer) if isinstance(loader, _Stateful)]
            states = zip(stateful, noted["combined_loader"], strict=True)
            noted["combined_loader"] = [state for loader, state in states if not _is_positioned(loader)]
        if "optimizer_states" not in checkpoint or self._trainer.state.fn != TrainerFn.FITTING:
            return  # weights alone, or nothing to go on with
        if self._engine is not None:
            _warn_of_gradients(self._trainer)
        own = self._left if self._engine is None and self._left is not None else _own_state(self._trainer)
        if self._place is not None and self._place.own is not None:  # loaded, and nothing of it has been done yet
            own = {**self._place.own, "ending": self._place.ending}
        ranks = self.exchange(own)
        checkpoint.setdefault(EXTRA, {})["ranks"] = ranks

    def take_rank(self, checkpoint: dict[str, Any]) -> None:
        """Takes this rank's part of a checkpoint that has been loaded, for ``on_train_start`` to go on with.

        Where there were fewer ranks, rank 0's part is taken, with random numbers derived from its own and the rank.
        """
        if self._trainer.state.fn != TrainerFn.FITTING or "loops" not in checkpoint:
            return
        loaders = _noted(checkpoint).pop("combined_loader", [])  # Lightning would give all ranks rank 0's
        ranks, own = checkpoint.get(EXTRA, {}).get("ranks"), None
        if ranks:
            own = ranks[self.global_rank if self.global_rank < len(ranks) else 0]
            if self.global_rank >= len(ranks):
                own = {**own, "random": state_for(own["random"], self.global_rank)}
        if ranks and own is not None and own["remain"] and len(ranks) != self.world_size:
            rank_zero_warn(
                f"the checkpoint was saved by {len(ranks)} rank(s) in the middle of an epoch, and there are "
                f"{self.world_size} now: the epoch goes on with the same batch number, so some samples come twice in "
                "it or not at all. The next epochs are whole. Save at the end of an epoch to avoid it."
            )
        ending = prepare(checkpoint, own is not None and own["remain"])
        self._place = _Place(own, loaders, ending or (own is not None and own.get("ending", False)))

    @override
    def on_train_start(self) -> None:
        super().on_train_start()
        place, self._place, self._left = self._place, None, None
        if place is not None:
            _go_on(self._trainer, place)

    @override
    def on_train_end(self) -> None:
        super().on_train_end()
        self._left = _own_state(self._trainer)  # the loops let go of their loaders

    @override
    def teardown(self) -> None:
        self._place = None
        super().teardown()


def _noted(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """What Lightning notes of the fit loop beside its progress."""
    noted: dict[str, Any] = checkpoint.get("loops", {}).get("fit_loop", {}).get("state_dict", {})
    return noted


def _warn_of_gradients(trainer: L.Trainer) -> None:
    if trainer.fit_loop.epoch_loop._should_accumulate():
        rank_zero_warn(
            "a checkpoint is saved while gradients are being accumulated, and gradients are not saved: a run that goes "
            "on from it makes its first step without those of the batches before. Save after a step to go on exactly."
        )


def _own_state(trainer: L.Trainer) -> State:
    metrics = {name: value.detach().cpu().clone() for name, value in trainer.callback_metrics.items()}
    remain = batches_remain(trainer)
    state = {
        "random": random_state(),
        "loaders": list(_positions(trainer, remain)),
        "seeds": [loader.seed if _is_positioned(loader) else None for loader in _flattened(trainer)],
        "remain": remain,
        "metrics": metrics,
    }
    if trainer.reload_dataloaders_every_n_epochs:
        fit_loop = trainer.fit_loop
        epochs = fit_loop._last_train_dl_reload_epoch, fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch
        state["reloaded"] = list(epochs)
    return state


def _flattened(trainer: L.Trainer) -> list[Any]:
    loader = trainer.fit_loop._combined_loader
    return [] if loader is None else loader.flattened


def _is_positioned(loader: object) -> bool:
    return isinstance(getattr(loader, "_loader", loader), PositionedLoader)


def _positions(trainer: L.Trainer, remain: bool) -> Iterator[State]:
    """Where each training loader is, after the batches that are done; only its generators if no batches ``remain``."""
    fetcher, progress = trainer.fit_loop._data_fetcher, trainer.fit_loop.epoch_loop.batch_progress.current
    if fetcher is None or fetcher.iterator is None:
        return
    waiting = len(getattr(fetcher, "batches", ()))  # fetched in advance
    iterators = fetcher.combined_loader._iterator.iterators
    for loader, iterator in zip(_flattened(trainer), iterators, strict=True):
        kind = _kind(loader)
        if kind == "position" and not remain:
            yield {kind: {"generators": {name: {"now": state} for name, state in loader.generator_states().items()}}}
        elif isinstance(iterator, PositionedIterator):
            yield {kind: iterator.position(waiting + progress.ready - progress.processed)}
        elif kind != "unknown" and remain:
            yield {kind: loader.state_before() if waiting and hasattr(loader, "state_before") else loader.state_dict()}
        else:
            yield {kind: None}


def _go_on(trainer: L.Trainer, place: _Place) -> None:
    fit_loop, own = trainer.fit_loop, place.own
    middle = fit_loop.restarted_mid_epoch
    if own is None:
        remain = middle and not fit_loop.epoch_loop._num_ready_batches_reached()
        positions = _guessed_positions(trainer, place.loaders) if remain else []
    else:
        device = trainer.strategy.root_device
        trainer.callback_metrics.update({name: value.to(device) for name, value in own["metrics"].items()})
        remain, positions = own["remain"], own["loaders"]
    restart(trainer, remain, place.ending, own is not None)
    first = not middle and trainer.current_epoch == 0
    if positions and _match(trainer, positions):
        seeds = own["seeds"] if own is not None else [None] * len(positions)
        _place_loaders(trainer, positions, seeds, remain and (middle or first))
    if own is not None:
        if "reloaded" in own:
            epochs = own["reloaded"]
            fit_loop._last_train_dl_reload_epoch, fit_loop.epoch_loop.val_loop._last_val_dl_reload_epoch = epochs
        set_random_state(own["random"])
        if first and not remain:
            iter(fit_loop._data_fetcher)  # Lightning made the first epoch's iterator before these random numbers


def _guessed_positions(trainer: L.Trainer, states: list[Any]) -> list[State]:
    """What a checkpoint of another strategy says: how many batches were done, and rank 0's loaders that have states."""
    rank_zero_warn(
        "the checkpoint was written by another strategy in the middle of an epoch, without random states: batches that "
        "were done are left out, by their number, and random numbers (dropout, shuffling by a RandomSampler) go on as "
        "in a new run."
    )
    batches, rest = trainer.fit_loop.epoch_loop.batch_progress.current.processed, iter(states)
    kinds = map(_kind, _flattened(trainer))
    return [{kind: {"batches": batches} if kind == "position" else next(rest, None)} for kind in kinds]


def _match(trainer: L.Trainer, positions: list[State]) -> bool:
    kinds = [_kind(loader) for loader in _flattened(trainer)]
    saved = [kind for position in positions for kind in position]
    if kinds != saved:
        rank_zero_warn(
            f"the checkpoint holds the positions of {len(saved)} training loaders ({', '.join(saved)}), but this run "
            f"has {len(kinds)} ({', '.join(kinds)}): their data starts from the beginning of the epoch."
        )
    return kinds == saved


def _place_loaders(trainer: L.Trainer, positions: list[State], seeds: list[int | None], middle: bool) -> None:
    """Makes the iterators of an epoch anew, where they were, in the ``middle`` of it; else sets their generators."""
    loaders, fetcher = _flattened(trainer), trainer.fit_loop._data_fetcher
    assert fetcher is not None
    for loader, position, seed in zip(loaders, positions, seeds, strict=True):
        ((kind, state),) = position.items()
        if seed is not None and kind == "position" and loader.seed is not None:
            getattr(loader, "_loader", loader).seed = seed
        if kind == "position" and not middle:
            loader.set_generators(state)
        elif state is not None and middle:
            loader.load_state_dict(state)
    if not middle:
        return
    set_epoch(trainer)
    iter(fetcher)
    if fetcher.length is None and {"unknown": None} in positions:  # where there is a length, Lightning says so
        rank_zero_warn(
            "a training loader is an iterable without state_dict() and load_state_dict(): its data starts from the "
            "beginning, though the checkpoint was written in the middle of an epoch."
        )


def _kind(loader: object) -> str:
    return "position" if _is_positioned(loader) else "state" if isinstance(loader, _Stateful) else "unknown"
