"""Adapters of peft on ``meta``: initialised as peft does, which is neither what a model nor what a layer would do."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_gemini.core.errors import ConfigurationError

#: The parts of LoRA that are initialised without looking at the weights they adapt.
_LORA = {"lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B"}


def initialise_adapters(root: nn.Module, unbuilt: set[nn.Parameter]) -> set[nn.Parameter]:
    """Initialises adapters among ``unbuilt`` by their own rules; knows them by peft's names, without importing it.

    Returns:
        the parameters that are initialised.

    Raises:
        ConfigurationError: an adapter's values depend on weights that are not there yet, or its rule is unknown.
    """
    done: set[nn.Parameter] = set()
    configs = _configs(root)
    for path, layer in root.named_modules():
        for part, adapter, params in _parts(layer):
            mine = unbuilt.intersection(params)
            if not mine:
                continue
            how = getattr(configs.get(adapter), "init_lora_weights", None)
            if part not in _LORA or not (how in (True, False) or how == "gaussian"):
                raise ConfigurationError(
                    f"{path}.{part}.{adapter}: an adapter on the meta device can be initialised if it is plain LoRA, "
                    f"with init_lora_weights True, False or 'gaussian' (got {how!r}) and without DoRA. Add others to "
                    "a model that is loaded whole, with transformers' own from_pretrained."
                )
            if not mine <= done:
                done |= _reset(layer, adapter, how)
    return done


def _reset(layer: Any, adapter: str, how: bool | str) -> set[nn.Parameter]:
    held = [(part, params) for part, name, params in _parts(layer) if part in _LORA and name == adapter]
    if how is not False:
        layer.reset_lora_parameters(adapter, how)
    else:
        for part, params in held:
            if "embedding" in part:
                for param in params:
                    nn.init.normal_(param)
            else:
                getattr(layer, part)[adapter].reset_parameters()
    return {param for _, params in held for param in params}


def _parts(layer: Any) -> Iterator[tuple[str, str, list[nn.Parameter]]]:
    """The parameters of the adapters in a layer, by the attribute that holds them and the adapter's name."""
    for part in getattr(layer, "adapter_layer_names", ()):
        held = getattr(layer, part, None)
        if isinstance(held, (nn.ModuleDict, nn.ParameterDict)):
            for adapter, one in held.items():
                if isinstance(one, Tensor):
                    yield part, adapter, [one] if isinstance(one, nn.Parameter) else []
                else:
                    yield part, adapter, list(one.parameters())


def _configs(root: nn.Module) -> Mapping[str, Any]:
    """The configurations of all adapters by name."""
    found: dict[str, Any] = {}
    for module in root.modules():
        configs = module.__dict__.get("peft_config")
        found |= configs if isinstance(configs, dict) else {}
    return found
