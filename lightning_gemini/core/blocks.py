"""Optimizer states in blocks: bitsandbytes keeps 8-bit codes, and for each 256 elements the scale of their codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_gemini.core.errors import ConfigurationError

#: Elements that share a scale. Where parameters and shards start at multiples of it, no block has two owners.
BLOCK = 256

_SCALES = frozenset({"absmax1", "absmax2"})
_CODE_BOOKS = frozenset({"qmap1", "qmap2"})
_STACKED = frozenset({"state1"})  # AdEMAMix keeps two averages in one tensor
_OVERRIDABLE = frozenset({"optim_bits", "min_8bit_size"})


def in_blocks(optimizer: Optimizer) -> bool:
    """Whether it keeps its states as bitsandbytes does; told by its class, as bitsandbytes need not be there."""
    return any(
        cls.__name__ == "Optimizer8bit" and cls.__module__.partition(".")[0] == "bitsandbytes"
        for cls in type(optimizer).__mro__
    )


def state_bytes(optimizer: Optimizer) -> float:
    """Bytes of an element's two states: two codes with their share of two fp32 scales, or two fp32 numbers."""
    quantizer: Any = optimizer
    return 2 * (1 + 4 / BLOCK) if quantizer.args.optim_bits == 8 else 2 * 4


def is_code_book(key: str) -> bool:
    """Whether the state ``key`` is what codes stand for: the same for all, and never written."""
    return key in _CODE_BOOKS


def is_scale(key: str) -> bool:
    """Whether the state ``key`` has one entry for each block."""
    return key in _SCALES


def is_stacked(key: str, value: Tensor, shape: Sequence[int]) -> bool:
    """Whether ``value`` holds two states of a parameter of that shape."""
    return key in _STACKED and value.dim() == len(shape) + 1


def zero_code(key: str, state: Mapping[str, Any]) -> int:
    """What stands for zero in the state ``key``: what lies between parameters must not raise the scale of a block."""
    book = state.get({"state1": "qmap1", "state2": "qmap2"}.get(key, ""))
    return 0 if book is None else int(book.abs().argmin())


def grain(key: str, value: Any, numel: int) -> int:
    """How many of a segment's ``numel`` elements an entry of its state (in the last dimension) is for; 0 for all."""
    if not isinstance(value, Tensor) or value.dim() == 0 or key in _CODE_BOOKS:
        return 0
    if key in _SCALES:
        return BLOCK
    return int((value.dim() == 1 or key in _STACKED) and value.shape[-1] == numel)


def entries(start: int, stop: int, grain: int) -> slice:
    """The entries of a state that are for the elements ``start:stop``, of which ``start`` begins one."""
    return slice(start // grain, -(-stop // grain))


def bits(optimizer: Optimizer, group: int, params: Sequence[Tensor]) -> list[int]:
    """For each of ``params``, which are in that group, whether its states have 8 bits or 32.

    bitsandbytes decides by the size of the parameter (and by overrides for single ones), so a segment, which may be
    smaller than its parameter or larger than several, must be told.

    Raises:
        ConfigurationError: an override changes more than that; it goes by a position that segments do not have.
    """
    quantizer: Any = optimizer
    settings = optimizer.param_groups[group]
    places = {id(param): place for place, param in enumerate(settings["params"])}
    quantizer.check_overrides()  # takes what was asked for by module; its first step would do it too late
    found = []
    for param in params:
        config = quantizer.get_config(group, places[id(param)], settings)
        plain = {**vars(quantizer.args), **{key: settings[key] for key in config.keys() & settings.keys()}}
        changed = sorted(key for key in config.keys() & plain.keys() - _OVERRIDABLE if config[key] != plain[key])
        if changed:
            raise ConfigurationError(
                f"bitsandbytes' GlobalOptimManager overrides {', '.join(changed)} for a parameter of shape "
                f"{tuple(param.shape)}, but chunks are updated in other pieces than parameters. Give the parameter a "
                "group of its own; optim_bits and min_8bit_size can be overridden."
            )
        found.append(8 if config["optim_bits"] == 8 and param.numel() >= config["min_8bit_size"] else 32)
    return found


def init_state(optimizer: Optimizer, group: dict[str, Any], param: Tensor, bits: int) -> None:
    """Has the optimizer make the states of ``param`` with that many bits, whatever its size."""
    quantizer: Any = optimizer
    config = {**vars(quantizer.args), "optim_bits": bits, "min_8bit_size": 0}
    quantizer.get_config = lambda *_: config
    try:
        quantizer.init_state(group, param, 0, 0)
    finally:
        del quantizer.get_config


def scales_by_norm(optimizer: Optimizer) -> bool:
    """Whether the update of a parameter is scaled by that parameter's norm, as in LAMB and LARS."""
    return in_blocks(optimizer) and bool(vars(getattr(optimizer, "args", None) or object).get("max_unorm"))


def require_contiguous(optimizer: Optimizer, name: str) -> None:
    """Raises ConfigurationError if a parameter's blocks are not runs of its memory, on which bitsandbytes insists."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            if not param.is_contiguous():
                raise ConfigurationError(
                    f"{name} ({type(optimizer).__name__}) keeps states for blocks of {BLOCK} elements in row-major "
                    f"order, but a parameter of shape {tuple(param.shape)} has strides {tuple(param.stride())}. Make "
                    "it contiguous (no channels_last), or use torch.optim.AdamW."
                )


def wrapped(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """One parameter's state as ``state_dict()`` has it: newer versions put what belongs to blocks into a dict."""
    key = getattr(optimizer, "_FSDP_WRAPPED_QUANT_STATE_KEY", None)
    inner = {k: v for k, v in state.items() if k in getattr(optimizer, "non_castable_tensor_keys", ())}
    if key is None or not inner:
        return dict(state)
    return {**{k: v for k, v in state.items() if k not in inner}, key: inner}


def unwrapped(optimizer: Optimizer, state: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of :func:`wrapped`; what an older version has saved is as it should be."""
    key = getattr(optimizer, "_FSDP_WRAPPED_QUANT_STATE_KEY", "")
    return {**{k: v for k, v in state.items() if k != key}, **state.get(key, {})}
