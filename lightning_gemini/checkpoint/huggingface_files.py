"""What goes into which file of an exported model, as a plan, and the tensors for it, one after the other."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from lightning_gemini.checkpoint.manifest import StoredTensor
from lightning_gemini.checkpoint.reader import CheckpointReader
from lightning_gemini.core.errors import ConfigurationError, IncompatibleCheckpointError
from lightning_gemini.transformers_private import Reversal, kept_in_fp32

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_STATE = "state_dict."
_SHOWN = 5


class ExportPlan(Protocol):
    """The files of one model.

    Attributes:
        texts: the content of those that are text, by name.
        weights: the tensors (on ``meta``) of those that are not, by name and key.
    """

    texts: dict[str, str]
    weights: dict[str, dict[str, Tensor]]

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """File, key and value of each tensor; it is read when it is asked for."""


class ModelFiles:
    """A whole model, as ``save_pretrained`` writes it.

    Args:
        said: of the model, by :func:`huggingface_about.describe`.
        dtype: see :func:`huggingface.export`.
        max_shard_size: likewise.

    Raises:
        ConfigurationError: ``max_shard_size`` is no size.
        IncompatibleCheckpointError: the checkpoint has not all of it, or this transformers does not know it.
    """

    def __init__(
        self, reader: CheckpointReader, said: Mapping[str, Any], dtype: torch.dtype | None, max_shard_size: int | str
    ) -> None:
        self._reader = reader
        self._prefix = _STATE + said["prefix"]
        stored = _stored(reader, said["prefix"])
        skeleton = _skeleton(said, dtype or _dtype_of(stored))
        self._reversal = Reversal(skeleton, said["conversions"], said["ties"])
        own = skeleton.state_dict()
        self._source = _sources(own, stored, said, reader.where)
        self._dtypes = {
            name: _target(stored[source].dtype, dtype, own[name].dtype if name in own else dtype)
            for name, source in self._source.items()
        }
        if dtype is not None:
            in_fp32 = kept_in_fp32(skeleton, dtype)
            self._dtypes |= {n: torch.float32 for n, d in self._dtypes.items() if d.is_floating_point and in_fp32(n)}
        state = self._reversal.saved(
            {n: torch.empty(stored[s].shape, dtype=self._dtypes[n], device="meta") for n, s in self._source.items()}
        )
        whole = self._reversal.revert(state)
        self._groups = self._reversal.groups(state)
        apart = [self._reversal.revert({name: state[name] for name in group}) for group in self._groups]
        if _forms(*apart) != _forms(whole):
            self._groups = [list(state)]  # some conversion looks at more than it says
        self._place(whole, max_shard_size, skeleton.num_parameters())
        skeleton.config.architectures = [said["class"]]
        skeleton.config.dtype = str(dtype or _dtype_of(stored)).removeprefix("torch.")
        self.texts["config.json"] = skeleton.config.to_json_string()
        if said["generation_config"] is not None:
            self.texts["generation_config.json"] = (
                json.dumps(said["generation_config"], indent=2, sort_keys=True) + "\n"
            )

    def _place(self, whole: Mapping[str, Tensor], max_shard_size: int | str, parameters: int) -> None:
        """Shares the tensors out to files."""
        from huggingface_hub import split_torch_state_dict_into_shards

        # without views of each other, whose memory would be counted twice
        alone = {key: torch.empty(value.shape, dtype=value.dtype, device="meta") for key, value in whole.items()}
        try:
            split = split_torch_state_dict_into_shards(
                alone, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size
            )
        except ValueError as error:
            raise ConfigurationError(f"max_shard_size={max_shard_size!r} is no size such as '5GB': {error}") from error
        self._file_of = split.tensor_to_filename
        self.weights = {name: {key: alone[key] for key in keys} for name, keys in split.filename_to_tensors.items()}
        self.texts: dict[str, str] = {}
        if split.is_sharded:
            index = {
                "metadata": {"total_parameters": parameters, **split.metadata},
                "weight_map": split.tensor_to_filename,
            }
            self.texts["model.safetensors.index.json"] = json.dumps(index, indent=2, sort_keys=True) + "\n"

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """File, key and value of each tensor; in memory are those that are converted together."""
        for group in self._groups:
            values = {
                name: self._reader.tensor(self._prefix + self._source[name]).to(self._dtypes[name]) for name in group
            }
            made = self._reversal.revert(values)
            del values
            while made:
                key, value = made.popitem()
                yield self._file_of[key], key, value


class AdapterFiles:
    """The adapters of a model, as peft writes them; arguments and errors as of :class:`ModelFiles`."""

    def __init__(
        self, reader: CheckpointReader, said: Mapping[str, Any], dtype: torch.dtype | None, max_shard_size: int | str
    ) -> None:
        self._reader = reader
        self._prefix = _STATE + said["prefix"]
        self._names: dict[str, dict[str, str]] = {}
        self.texts: dict[str, str] = {}
        self.weights: dict[str, dict[str, Tensor]] = {}
        stored = _stored(reader, said["prefix"])
        for adapter, parts in said["adapters"].items():
            folder = "" if adapter == "default" else f"{adapter}/"
            self.texts[f"{folder}adapter_config.json"] = json.dumps(parts["config"], indent=2, sort_keys=True)
            _require({*parts["tensors"].values()}, stored, said, reader.where)
            file = f"{folder}adapter_model.safetensors"
            self._names[file] = parts["tensors"]
            self.weights[file] = {
                key: torch.empty(stored[name].shape, dtype=_target(stored[name].dtype, dtype, dtype), device="meta")
                for key, name in parts["tensors"].items()
            }

    def tensors(self) -> Iterator[tuple[str, str, Tensor]]:
        """File, key and value of each tensor."""
        for file, names in self._names.items():
            for key, name in names.items():
                yield file, key, self._reader.tensor(self._prefix + name).to(self.weights[file][key].dtype)


def _stored(reader: CheckpointReader, prefix: str) -> dict[str, StoredTensor]:
    """The tensors of the model in the checkpoint, by its own names."""
    start = _STATE + prefix
    return {name.removeprefix(start): it for name, it in reader.manifest.tensors.items() if name.startswith(start)}


def _dtype_of(stored: Mapping[str, StoredTensor]) -> torch.dtype:
    """The dtype of most of the weights."""
    counts: dict[torch.dtype, int] = {torch.float32: 0}
    for tensor in stored.values():
        if tensor.dtype.is_floating_point:
            counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.nbytes
    return max(counts, key=counts.__getitem__)


def _target(stored: torch.dtype, asked: torch.dtype | None, own: torch.dtype | None) -> torch.dtype:
    """What a tensor is written in: ``own`` is what the model would have it in."""
    if asked is None or own is None or not (stored.is_floating_point and own.is_floating_point):
        return stored
    return own


def _skeleton(said: Mapping[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """The model on ``meta``."""
    import transformers

    model_class = getattr(transformers, said["class"], None)
    if model_class is None:
        raise IncompatibleCheckpointError(f"transformers {transformers.__version__} has no {said['class']}.")
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(said["config"]), "utf-8")
        config = model_class.config_class.from_pretrained(folder)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            return model_class(config)
    finally:
        torch.set_default_dtype(before)


def _sources(
    own: Mapping[str, Tensor], stored: Mapping[str, StoredTensor], said: Mapping[str, Any], where: str
) -> dict[str, str]:
    """For each name of the model, in its order and with what was added to it, the name in the checkpoint."""
    tied = {name: next((n for n in group if n in stored), name) for group in said["ties"] for name in group}
    sources = {name: name if name in stored else tied.get(name, name) for name in (*own, *stored)}
    _require({*sources.values()}, stored, said, where)
    return sources


def _require(names: set[str], stored: Mapping[str, StoredTensor], said: Mapping[str, Any], where: str) -> None:
    """Raises IncompatibleCheckpointError if the checkpoint has not all of ``names``."""
    missing = sorted(names - stored.keys())
    if missing:
        more = f" and {len(missing) - _SHOWN} more" if len(missing) > _SHOWN else ""
        raise IncompatibleCheckpointError(
            f"{where} has not all of the {said['class']} at {said['prefix']}*: {', '.join(missing[:_SHOWN])}{more} "
            "missing. A save with save_frozen=False leaves frozen weights out; export one with all weights."
        )


def _forms(*made: Mapping[str, Tensor]) -> dict[str, tuple[torch.Size, torch.dtype]]:
    return {key: (value.shape, value.dtype) for tensors in made for key, value in tensors.items()}
