"""What must not happen to weights behind the chunks' back: refused, by name and with the remedy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import increment_version
from torch.utils.hooks import RemovableHandle

from lightning_gemini.core.chunk import Chunk
from lightning_gemini.core.errors import ConfigurationError, StateError
from lightning_gemini.core.inert import Attached
from lightning_gemini.core.units import Unit


class Guard:
    """Watches the managed parameters between the engine's own changes.

    Args:
        chunks: all of them.
        units: whose modules' ``state_dict`` and ``load_state_dict`` are guarded.
        whole: whether the parameters hold their whole, exact values now.
        open_to_writes: whether the user may write to them now.
    """

    def __init__(
        self,
        chunks: Sequence[Chunk],
        units: Sequence[Unit],
        whole: Callable[[], bool],
        open_to_writes: Callable[[], bool],
    ) -> None:
        self._chunks = chunks
        self._whole = whole
        self._open_to_writes = open_to_writes
        self._versions: dict[Chunk, list[int]] = {}
        self._handles: list[RemovableHandle] = []
        for module in {owner: None for unit in units for owner in unit.owners}:
            if not isinstance(module, torch.jit.ScriptModule):  # which takes no such hooks
                self._handles += [
                    module.register_state_dict_pre_hook(Attached(self._before_state_dict)),
                    module.register_load_state_dict_pre_hook(Attached(self._before_load)),
                ]
        self.note()

    def note(self) -> None:
        """Takes the parameters as they are now for right."""
        for chunk in self._chunks:
            self._versions[chunk] = [param._version for param in chunk.params]

    def updated(self, chunk: Chunk, used: Sequence[bool]) -> None:
        """An optimizer has changed the ``used`` parameters of a chunk: a backward through the old ones must notice."""
        increment_version([param for param, flag in zip(chunk.params, used, strict=True) if flag])
        self._versions[chunk] = [param._version for param in chunk.params]

    def check(self) -> None:
        """Compares with the last :meth:`note`.

        Raises:
            StateError: a parameter was written to, or given other data; each such change would be lost.
        """
        changed = [
            name
            for chunk, versions in self._versions.items()
            for name, param, version in zip(chunk.names, chunk.params, versions, strict=True)
            if param._version != version
        ]
        changed += [name for chunk in self._chunks for name in chunk.strayed()]
        if changed:
            raise StateError(
                f"{', '.join(changed[:3])}{' and others' if len(changed) > 3 else ''}: the parameter was changed from "
                "outside while its values live in a chunk, where the change is lost on some placements and some ranks. "
                "Change weights inside `with trainer.strategy.summon_full_params(writeback=True):` (engine.summon "
                "without a Trainer), on all ranks."
            )

    def before_copy(self) -> None:
        """Raises StateError if a copy or a pickle of the model would hold placeholders."""
        if not self._whole():
            raise StateError(
                "the model cannot be copied or pickled while its weights are spread over chunks. Do it inside "
                "`with trainer.strategy.summon_full_params():`, on all ranks."
            )

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _before_state_dict(self, module: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not self._whole():
            raise StateError(
                f"state_dict() of {type(module).__name__} ({prefix.removesuffix('.') or 'the model'}) would hold "
                "placeholders or rounded weights: they are spread over chunks. Call it (or save_pretrained, or "
                "torch.save) inside `with trainer.strategy.summon_full_params():`, on all ranks, or use "
                "trainer.save_checkpoint."
            )

    def _before_load(self, module: nn.Module, *_: Any) -> None:
        if not self._open_to_writes():
            raise StateError(
                f"load_state_dict() of {type(module).__name__} would be lost: the weights live in chunks. Call it "
                "inside `with trainer.strategy.summon_full_params(writeback=True):`, on all ranks, or before fit."
            )


def require_same_parameters(model: nn.Module, params: Sequence[nn.Parameter], names: Sequence[str]) -> None:
    """Raises ConfigurationError if ``model`` has other parameters than ``params``, which were called ``names``."""
    now, known = dict.fromkeys(model.parameters()), set(params)
    new = [name for name, param in model.named_parameters() if param not in known]
    gone = [name for name, param in zip(names, params, strict=True) if param not in now]
    if new or gone:
        raise ConfigurationError(
            "the model's parameters changed after the chunks were laid out: "
            + "; ".join(f"{what}: {', '.join(names)}" for what, names in (("new", new), ("gone", gone)) if names)
            + ". Change the model in __init__, setup or configure_model, before fit lays it out."
        )
