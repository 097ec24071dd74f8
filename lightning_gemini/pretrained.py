"""Pretrained models of transformers that no rank ever holds: built on ``meta``, loaded tensor by tensor into chunks."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_gemini.core.errors import ConfigurationError
from lightning_gemini.core.sources import attach
from lightning_gemini.transformers_private import Recipe, on_meta

_CHUNKS_COME: ContextVar[bool] = ContextVar("chunks_come", default=False)

_REFUSED = (
    "device_map", "max_memory", "offload_folder", "quantization_config", "distributed_config", "device_mesh", "tp_plan",
    "tp_size", "gguf_file", "state_dict", "output_loading_info",
)  # fmt: skip


def from_pretrained(model_class: Any, name: str | Path, *args: Any, stream: bool | None = None, **kwargs: Any) -> Any:
    """``model_class.from_pretrained(name, ...)``, without the weights where they are to go into chunks.

    Called in ``configure_model``, or under ``trainer.init_module()``, with the gemini strategy, it builds the model on
    ``meta`` and reads nothing but the headers of its files. When the chunks are there, each rank reads the files tensor
    by tensor and keeps its part; the values are those of transformers' own loading, bit for bit. Anywhere else, under
    another strategy or in ``load_from_checkpoint``, it is transformers' own ``from_pretrained``.

    As ever the model is in evaluation mode: call ``train()`` to have dropout. Weights that the files do not have (a new
    head) are initialised by the model's own rule, and transformers names them in its report, with those that the model
    has no use for. peft's LoRA can be added to the model at once.

    Args:
        model_class: a class of transformers, such as ``AutoModelForCausalLM``.
        name: a folder, or a name on the hub; with files in safetensors' format or ``.bin``, one or several.
        args, kwargs: as for ``model_class.from_pretrained``: ``dtype``, ``revision``, ``attn_implementation``, ...
        stream: True builds on ``meta`` wherever it is called, for a model that is given to ``shard()``; False loads the
            model whole.

    Returns:
        the model, a ``PreTrainedModel``.

    Raises:
        ConfigurationError: something that cannot be loaded into chunks: quantized weights, GGUF files, adapters.
    """
    if not (_CHUNKS_COME.get() if stream is None else stream):
        # weights that exist cannot be loaded on meta
        with torch.device("cpu") if torch.get_default_device().type == "meta" else nullcontext():
            return model_class.from_pretrained(name, *args, **kwargs)
    refused = [key for key in _REFUSED if kwargs.get(key) is not None and kwargs[key] is not False]
    if refused:
        raise ConfigurationError(
            f"from_pretrained({', '.join(f'{key}=...' for key in refused)}) says where a whole model goes or how it "
            "is made, but this one goes into chunks. Leave it out, or load the model whole with stream=False."
        )
    with torch.device("cpu") if torch.get_default_device().type != "cpu" else nullcontext():
        model, recipe = on_meta(lambda: model_class.from_pretrained(name, *args, **kwargs))
    attach(model, Checkpoint(str(name), recipe), recipe.keys)
    return model


@contextmanager
def chunks_come(on_meta: bool) -> Iterator[None]:
    """Around what builds a model that will be moved into chunks.

    Args:
        on_meta: whether all of it is built on ``meta``; never on the device, which may be smaller than the model.
    """
    token = _CHUNKS_COME.set(True)
    try:
        with torch.device("meta") if on_meta else nullcontext():
            yield
    finally:
        _CHUNKS_COME.reset(token)


class Checkpoint:
    """The files of a pretrained model, as a source of values (see :mod:`lightning_gemini.core.sources`)."""

    def __init__(self, name: str, recipe: Recipe) -> None:
        self._name = name
        self._recipe = recipe
        # by what their names and headers say; two models of one kind have the same
        files = [(Path(file).name, Path(file).stat().st_size) for file in recipe.files]
        digest = hashlib.sha256(repr((files, sorted(recipe.keys.items()))).encode()).hexdigest()[:8]
        self.fingerprint = f"{len(files)} file(s), {sum(size for _, size in files):,} bytes, {digest}"

    def __str__(self) -> str:
        return self._name

    def load(self, names: Collection[str], put: Callable[[str, Tensor], None]) -> None:
        """Gives the tensors ``names`` to ``put``, with a progress bar on rank 0."""
        first = not dist.is_initialized() or dist.get_rank() == 0
        self._recipe.convert(names, put, progress=first)

    def __deepcopy__(self, memo: dict[int, Any]) -> Checkpoint:
        return self  # it never changes
