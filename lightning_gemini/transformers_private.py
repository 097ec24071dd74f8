"""What this package uses of transformers that is not its public interface; nowhere else.

Known to be there, as it is used here, in transformers 5.17 to 5.23. Where something is missing, an error says so.
"""

from __future__ import annotations

import copy
import inspect
import os
import re
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import TYPE_CHECKING, Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn

from lightning_gemini.core.errors import ConfigurationError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_META = torch.device("meta")
_LOCK = threading.RLock()  # of the functions of transformers that are exchanged for a while


@dataclass(frozen=True)
class Recipe:
    """How the files of a checkpoint become the tensors of a model.

    Attributes:
        skeleton: the model as its class builds it, on ``meta``; nobody else uses it.
        files: all of them ``.safetensors``, or all of them pickles.
        settings: transformers' own, with the dtype and the mapping of names.
        keys: for each tensor of the model that the files have: the keys it is made of. Tensors that are made together
            have equal ones.
    """

    skeleton: PreTrainedModel
    files: tuple[str, ...]
    settings: Any
    keys: Mapping[str, tuple[str, ...]]

    def convert(self, names: Collection[str], put: Callable[[str, Tensor], None], progress: bool = False) -> None:
        """Makes the tensors ``names``, and what is made along with them, and gives each to ``put`` before the next.

        At most those that are made together are in memory, with their parts; files are mapped, not read as a whole.

        Args:
            progress: whether transformers shows its progress bar.

        Raises:
            ConfigurationError: the files do not convert.
        """
        keys = {key for name in names for key in self.keys[name]}

        def give(model: nn.Module, target_name: str, param_value: Tensor, *args: Any, **kwargs: Any) -> None:
            put(target_name, param_value)

        with ExitStack() as stack:
            values = {key: _Lazy(read) for key, read in _open(self.files, stack).items() if key in keys}
            stack.enter_context(_progress_bar(progress))
            stack.enter_context(_exchanged(_core(), "set_param_for_module", lambda original: give))
            outcome = _load(self.skeleton, values, copy.deepcopy(self.settings))
        if errors := getattr(outcome[0], "conversion_errors", None):
            raise ConfigurationError(f"transformers cannot convert {', '.join(errors)}: {next(iter(errors.values()))}")


def on_meta(load: Callable[[], PreTrainedModel]) -> tuple[PreTrainedModel, Recipe]:
    """Runs ``load``, a call of ``from_pretrained``, so that the model stays on ``meta``.

    The rest is as ever: dtypes, ties, the generation config, what is reported and what is refused. Values are read
    only of weights that are to be tied and that the files have twice.

    Raises:
        ConfigurationError: these are no plain weights: quantized ones, adapters, a GGUF file.
    """
    recipes: list[Recipe] = []
    signature = inspect.signature(_loader())

    def hold(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        files, settings = given["checkpoint_files"], given["load_config"]
        if recipes or given["state_dict"] is not None or not files:
            raise ConfigurationError(
                "only a model's own files (safetensors or .bin, with an index if there are several) can be loaded into "
                "chunks, not adapters, GGUF files or state dicts. Load the model whole, with stream=False."
            )
        if settings.hf_quantizer is not None:
            raise ConfigurationError("quantized weights can neither be loaded into chunks nor trained there.")
        recipe, outcome = _dry_run(given["model"], tuple(files), settings)
        recipes.append(recipe)
        return outcome

    model_class = _attribute("transformers.modeling_utils", "PreTrainedModel")
    with _progress_bar(False), _exchanged(model_class, "_load_pretrained_model", lambda original: hold):
        model = load()
    if not recipes:
        raise ConfigurationError("a checkpoint of this format cannot be loaded into chunks. Load it with stream=False.")
    _return_to_meta(model)
    return model, recipes[0]


def _dry_run(model: PreTrainedModel, files: tuple[str, ...], settings: Any) -> tuple[Recipe, Any]:
    """Converts the files on ``meta``, without reading values, and notes what is made of what."""
    skeleton, pristine = copy.deepcopy(model), copy.deepcopy(settings)
    shapes = {name: getattr(tensor, "shape", None) for name, tensor in model.state_dict().items()}
    keys: dict[str, tuple[str, ...]] = {}
    touched: list[str] = []  # since the last tensor was made
    together: tuple[str, ...] = ()

    def noting(original: Callable[..., None]) -> Callable[..., None]:
        def set_param(model: nn.Module, target_name: str, param_value: Tensor, *args: Any, **kwargs: Any) -> None:
            nonlocal together
            if touched:
                together = tuple(touched)
                touched.clear()
            if shapes[target_name] is None:
                raise ConfigurationError(f"{target_name} is no tensor and cannot be loaded into chunks.")
            if param_value.shape == shapes[target_name]:  # else transformers says what it thinks of it
                keys[target_name] = together
            original(model, target_name, param_value, *args, **kwargs)

        return set_param

    object.__setattr__(settings, "device_map", {"": _META})  # it is frozen; what follows the loading goes by it, too
    with ExitStack() as stack:
        values = {key: _Lazy(read, partial(touched.append, key)) for key, read in _open(files, stack).items()}
        stack.enter_context(_exchanged(_core(), "set_param_for_module", noting))
        outcome = _load(model, values, settings)
    recipe = Recipe(skeleton, files, pristine, keys)
    ties = getattr(model, "all_tied_weights_keys", {}).items()
    if twice := {name for pair in ties if all(name in keys for name in pair) for name in pair}:
        # transformers ties them if they are equal
        recipe.convert(twice, lambda name, value: _set(model, name, value) if name in twice else None)
    return recipe, outcome


def _load(model: PreTrainedModel, values: Mapping[str, Any], settings: Any) -> Any:
    """transformers' own loading, one tensor after the other."""
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")
    os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = "1"  # else threads read ahead as far as they can
    try:
        return _loader()(model=model, state_dict=values, checkpoint_files=None, load_config=settings)
    finally:
        if before is None:
            del os.environ["HF_DEACTIVATE_ASYNC_LOAD"]
        else:
            os.environ["HF_DEACTIVATE_ASYNC_LOAD"] = before


class _Lazy:
    """Stands for a tensor in a file, which is mapped when transformers asks for its values."""

    def __init__(self, read: Callable[[], Tensor], note: Callable[[], None] = lambda: None) -> None:
        self._read = read
        self._note = note
        self._thread = threading.get_ident()

    def __getitem__(self, index: Any) -> Tensor:
        if threading.get_ident() != self._thread:  # threads read ahead, in any order
            raise _unknown("loading in one thread (HF_DEACTIVATE_ASYNC_LOAD)")
        self._note()
        return self._read()[index]


def _open(files: Collection[str], stack: ExitStack) -> dict[str, Callable[[], Tensor]]:
    """How to read each tensor in the files, for as long as ``stack`` is open."""
    from safetensors import safe_open

    reads: dict[str, Callable[[], Tensor]] = {}
    for file in files:
        if file.endswith(".safetensors"):
            handle = stack.enter_context(safe_open(file, framework="pt"))
            reads |= {key: partial(handle.get_tensor, key) for key in handle.keys()}  # noqa: SIM118, it is no mapping
        else:
            # the format before torch 1.6 cannot be mapped
            values = torch.load(file, map_location="cpu", weights_only=True, mmap=is_zipfile(file))
            reads |= {key: partial(values.__getitem__, key) for key in values}
    return reads


def _set(model: nn.Module, name: str, value: Tensor) -> None:
    path, _, key = name.rpartition(".")
    module = model.get_submodule(path)
    old = getattr(module, key)
    setattr(module, key, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)
    getattr(module, key)._is_hf_initialized = True


def _return_to_meta(model: nn.Module) -> None:
    """Puts what has values on ``meta``; what is tied stays tied."""
    moved: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for key, param in module._parameters.items():
            if param is not None and not param.is_meta:
                if param not in moved:
                    moved[param] = nn.Parameter(torch.empty_like(param, device=_META), param.requires_grad)
                module._parameters[key] = moved[param]
        for key, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[key] = buffer.to(_META)


def describe_conversions(model: PreTrainedModel) -> list[dict[str, Any]] | None:
    """How the names and shapes in the files that a model was loaded from differ from its own, as JSON.

    ``None`` for a model that was not loaded: transformers then knows by its class how they are saved.
    """
    used = getattr(model, "_weight_conversions", None)
    return None if used is None else [_describe(conversion) for conversion in used]


class Reversal:
    """From the tensors of a model to those that ``save_pretrained`` writes.

    Args:
        skeleton: the model, on ``meta``; it is changed.
        conversions: see :func:`describe_conversions`.
        ties: names that are one tensor.

    Raises:
        ConfigurationError: this version of transformers does not know a conversion.
    """

    def __init__(
        self, skeleton: PreTrainedModel, conversions: Sequence[Mapping[str, Any]] | None, ties: Sequence[Sequence[str]]
    ) -> None:
        self._skeleton = skeleton
        self._revert = _attribute("transformers.core_model_loading", "revert_weight_conversion")
        self._without_ties = _attribute("transformers.modeling_utils", "remove_tied_weights_from_state_dict")
        mapping = _attribute("transformers.conversion_mapping", "get_model_conversion_mapping")
        known = mapping(skeleton) or []
        if conversions is not None:
            known = [_find(described, known) for described in conversions]
            skeleton._weight_conversions = known  # what is looked at by what reverts
        converter = _attribute("transformers.core_model_loading", "WeightConverter")
        try:
            self._converters = [c.reverse_transform() for c in reversed(known) if isinstance(c, converter)]
        except AttributeError as error:
            raise _unknown(f"conversion of weights that can be reversed ({error})") from None
        _retie(skeleton, ties)

    def saved(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Without what is tied to another one of ``tensors`` (on ``meta``), and what the model leaves out."""
        left_out = getattr(self._skeleton, "_keys_to_ignore_on_save", None) or ()
        own = self._skeleton.state_dict().keys()
        kept = {name: value for name, value in tensors.items() if name in own and name not in left_out}
        others = {name: value for name, value in tensors.items() if name not in own}
        untied: dict[str, Tensor] = self._without_ties(kept, self._skeleton)
        return untied | others

    def groups(self, names: Iterable[str]) -> list[list[str]]:
        """``names`` in groups of those that have to be reverted together."""
        groups: dict[tuple[bool, str], list[str]] = {}
        for name in names:
            found = (converter.rename_source_key(name) for converter in self._converters)
            target = next((target for target, pattern in found if pattern is not None), None)
            groups.setdefault((target is not None, target or name), []).append(name)
        return list(groups.values())

    def revert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What ``save_pretrained`` makes of ``tensors``, by the names in its files."""
        reverted: dict[str, Tensor] = self._revert(self._skeleton, dict(tensors))
        return reverted


def kept_in_fp32(model: PreTrainedModel, dtype: torch.dtype) -> Callable[[str], bool]:
    """Which tensors of a model are in fp32 although it is loaded in ``dtype``."""
    make = getattr(model, "_get_dtype_plan", None)
    plan: Mapping[str, torch.dtype] = {} if make is None else make(dtype)
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in plan]
    return lambda name: any(pattern.search(name) for pattern in patterns)


def _describe(conversion: Any) -> dict[str, Any]:
    return {
        "class": type(conversion).__name__,
        "from": list(conversion._original_source_patterns),
        "to": list(conversion._original_target_patterns),
        "scope": conversion.scope_prefix,
        "base": conversion.base_model_prefix,
    }


def _find(described: Mapping[str, Any], known: Sequence[Any]) -> Any:
    for conversion in known:
        if _describe(conversion) == described:
            return conversion
    if described["class"] == "WeightRenaming":  # the user's own, given as key_mapping
        renaming = _attribute("transformers.core_model_loading", "WeightRenaming")
        return renaming(list(described["from"]), list(described["to"]))
    raise _unknown(f"conversion of weights from {described['from']} to {described['to']}")


def _retie(model: nn.Module, ties: Sequence[Sequence[str]]) -> None:
    """Has those parameters of a model on ``meta`` be one that ``ties`` name together, and no others."""
    first = {name: group[0] for group in ties for name in group}
    made: dict[str, nn.Parameter] = {}
    for name, param in list(model.named_parameters(remove_duplicate=False)):
        path, _, key = name.rpartition(".")
        which = first.get(name, name)
        if which not in made:
            made[which] = nn.Parameter(torch.empty_like(param), requires_grad=False)
        model.get_submodule(path)._parameters[key] = made[which]


@contextmanager
def _exchanged(owner: Any, name: str, make: Callable[[Any], Any]) -> Iterator[None]:
    """Has what this thread calls as ``owner.name`` be ``make(original)``."""
    with _LOCK:
        held, original, mine = vars(owner)[name], getattr(owner, name), threading.get_ident()
        replacement = make(original)

        def choose(*args: Any, **kwargs: Any) -> Any:
            return (replacement if threading.get_ident() == mine else original)(*args, **kwargs)

        setattr(owner, name, staticmethod(choose) if isinstance(held, staticmethod) else choose)
        try:
            yield
        finally:
            setattr(owner, name, held)


@contextmanager
def _progress_bar(shown: bool) -> Iterator[None]:
    from transformers.utils import logging

    if shown or not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


@cache
def _loader() -> Any:
    """The function that loads values into a model."""
    load = getattr(_attribute("transformers.modeling_utils", "PreTrainedModel"), "_load_pretrained_model", None)
    expected = {"model", "state_dict", "checkpoint_files", "load_config"}
    if load is None or not expected <= inspect.signature(load).parameters.keys():
        raise _unknown("PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, load_config)")
    return load


def _core() -> Any:
    """The module in which values are given to a model."""
    _attribute("transformers.core_model_loading", "set_param_for_module")
    from transformers import core_model_loading

    return core_model_loading


def _attribute(module: str, name: str) -> Any:
    from importlib import import_module

    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError):
        raise _unknown(f"{module}.{name}") from None


def _unknown(what: str) -> ConfigurationError:
    import transformers

    return ConfigurationError(
        f"transformers {transformers.__version__} has no {what}, which this version of lightning-gemini needs here. "
        "Install transformers 5.17 to 5.23, or load the model whole with transformers' own from_pretrained."
    )
