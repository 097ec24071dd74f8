"""What a checkpoint says of the models of transformers in it, so that they can be exported: made when saving."""

from __future__ import annotations

import base64
import copy
import json
import re
import sys
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_gemini.transformers_private import describe_conversions

_TOKENIZERS: weakref.WeakKeyDictionary[Any, tuple[str, dict[str, Any]]] = weakref.WeakKeyDictionary()


def describe(module: nn.Module, datamodule: Any = None) -> dict[str, Any] | None:
    """What :func:`huggingface.export` has to know of the models in ``module``, as JSON; on one rank, reads no weights.

    A model that cannot be described does not keep a checkpoint from being saved: why is in the description, and
    exporting it says so.

    Args:
        module: a LightningModule, say; its state dict has the names that the description is about.
        datamodule: where a tokenizer is looked for, as in ``module``: an attribute ``tokenizer`` of transformers.

    Returns:
        ``None`` if there is no model of transformers: then transformers has not even been imported by this.
    """
    if "transformers" not in sys.modules:
        return None
    import transformers

    models = [_describe(prefix, model) for prefix, model in _models(module)]
    if not models:
        return None
    return {
        "transformers": transformers.__version__,
        "models": models,
        "tokenizer": _tokenizer(module) or _tokenizer(datamodule),
    }


def unpack_tokenizer(described: Mapping[str, Any], folder: Path) -> None:
    """Writes the files of a tokenizer as :func:`describe` found it into ``folder``."""
    for name, packed in described["files"].items():
        (folder / Path(name).name).write_bytes(zlib.decompress(base64.b85decode(packed)))


def _models(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The outermost models of transformers and peft, with the beginning of their names in the state dict."""
    import transformers

    kinds: tuple[type, ...] = (transformers.PreTrainedModel,)
    if "peft" in sys.modules:
        kinds += (sys.modules["peft"].PeftModel,)
    inside: tuple[str, ...] = ()
    for name, part in module.named_modules():
        prefix = f"{name}." if name else ""
        if isinstance(part, kinds) and not prefix.startswith(inside or ("\0",)):
            inside += (prefix,)
            yield prefix, part


def _describe(prefix: str, model: Any) -> dict[str, Any]:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    said: dict[str, Any] = {"prefix": prefix, "class": type(base).__name__}
    try:
        if not type(base).__module__.startswith("transformers."):
            raise ValueError(f"{type(base).__module__}.{type(base).__name__} is no class of transformers")
        adapters = getattr(model, "peft_config", None)
        if isinstance(adapters, dict) and adapters:
            return said | {"adapters": {name: _adapter(model, base, name) for name in adapters}}
        generation = getattr(model, "generation_config", None)
        return said | {
            "config": json.loads(model.config.to_json_string()),
            "generation_config": None if generation is None else _generation(generation),
            "conversions": describe_conversions(model),
            "ties": _ties(model),
        }
    except Exception as error:  # training matters more
        return said | {"problem": f"{type(error).__name__}: {error}"}


def _generation(config: Any) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(config.to_json_string())
    said.pop("compile_config", None)  # as save_pretrained does
    return said


def _named(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by their names in the state dict, which cannot be asked for during a run."""
    named: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        buffers = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
        for key, value in (*module._parameters.items(), *buffers.items()):
            if value is not None:
                named[f"{path}.{key}" if path else key] = value
    return named


def _ties(model: nn.Module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, value in _named(model).items():
        groups.setdefault(id(value), []).append(name)
    return [names for names in groups.values() if len(names) > 1]


def _adapter(model: Any, base: Any, name: str) -> dict[str, Any]:
    """An adapter's configuration, and for each tensor in the file that peft writes its name in the state dict."""
    import peft

    config = model.peft_config[name]
    if config.is_prompt_learning:
        raise ValueError(f"the prompts of {type(config).__name__} are no tensors of the model")
    wrapped = model is not base
    stand_ins = {key: torch.empty(value.shape, device="meta") for key, value in _named(model).items()}
    names = {id(value): key for key, value in stand_ins.items()}
    # not "auto", which would ask the hub for the size of the base model's vocabulary
    embeddings = _adapts_embeddings(base, config) or _resized(base, config)
    chosen = peft.get_peft_model_state_dict(model, stand_ins, name, save_embedding_layers=embeddings)
    tensors = {key if wrapped else f"base_model.model.{key}": names[id(value)] for key, value in chosen.items()}
    saved = copy.copy(config)
    saved.inference_mode = True
    if saved.base_model_name_or_path is None:
        saved.base_model_name_or_path = getattr(base, "name_or_path", None) or None
    said = {key: sorted(value) if isinstance(value, set) else value for key, value in saved.to_dict().items()}
    if saved.task_type is None and wrapped:
        said["auto_mapping"] = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    return {"config": json.loads(json.dumps(said)), "tensors": tensors}


def _adapts_embeddings(base: nn.Module, config: Any) -> bool:
    """Whether peft saves the embeddings, although they are frozen: where an adapter is for them."""
    from peft.utils.constants import EMBEDDING_LAYER_NAMES

    targets = getattr(config, "target_modules", None)
    if targets is None or targets == "all-linear" or getattr(config, "trainable_token_indices", None) is not None:
        return False
    if not isinstance(targets, str):
        return any(name in targets for name in EMBEDDING_LAYER_NAMES)
    embeddings = (name for name, _ in base.named_modules() if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES)
    return any(re.fullmatch(targets, name) for name in embeddings)


def _resized(base: Any, config: Any) -> bool:
    """Whether the vocabulary is another one than the base model's, as far as this machine knows the base model."""
    import transformers

    if not config.base_model_name_or_path:
        return False
    try:
        known = transformers.AutoConfig.from_pretrained(config.base_model_name_or_path, local_files_only=True)
    except (OSError, ValueError):
        return False
    return getattr(known, "vocab_size", None) != getattr(base.config, "vocab_size", None)


def _tokenizer(owner: Any) -> dict[str, Any] | None:
    """The files of the tokenizer that ``owner`` has, if there is one; made again when it has changed."""
    import transformers

    try:
        tokenizer = getattr(owner, "tokenizer", None)
        if not isinstance(tokenizer, transformers.PreTrainedTokenizerBase):
            return None
        state = f"{len(tokenizer)} {tokenizer!r}"
        known = _TOKENIZERS.get(tokenizer)
        if known is None or known[0] != state:
            said = {"name_or_path": str(tokenizer.name_or_path), "files": _pack(tokenizer)}
            known = _TOKENIZERS[tokenizer] = (state, said)
        return known[1]
    except Exception as error:  # training matters more
        return {"problem": f"{type(error).__name__}: {error}"}


def _pack(tokenizer: Any) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {
            file.name: base64.b85encode(zlib.compress(file.read_bytes())).decode("ascii")
            for file in sorted(Path(folder).iterdir())
        }
