"""Values that wait elsewhere, in files say, until there are chunks to put them into: one at a time, on every rank."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lightning_gemini.core.construct import leave_meta_to_load
from lightning_gemini.core.errors import ConfigurationError, DisagreementError, PeerError
from lightning_gemini.core.store import Store

_ORIGIN, _NAMES = "_gemini_origin", "_gemini_source_names"


class Source(Protocol):
    """Where the values of a model on ``meta`` come from; ``str()`` of it names it.

    Each rank has its own and reads it by itself. Copies of a module share it, so it is its own ``copy.deepcopy``.

    Attributes:
        fingerprint: a text that is the same where the values are the same.
    """

    fingerprint: str

    def load(self, names: Collection[str], put: Callable[[str, Tensor], None]) -> None:
        """Calls ``put(name, value)`` for each of ``names``, and for others if that is easier, one after the other.

        ``value`` is in host memory and of any dtype; it is of no use once ``put`` has returned.
        """


@dataclass(frozen=True)
class _Origin:
    """Where a module's own tensors come from: by attribute, the names that the source has for them."""

    source: Source
    names: Mapping[str, str]


def attach(root: nn.Module, source: Source, names: Collection[str]) -> None:
    """Notes on the modules of ``root``, which is on ``meta``, that ``source`` has their values.

    The notes move with the modules, into wrappers and copies, until the values have been loaded.

    Args:
        names: of parameters and buffers, as in ``root.state_dict()``. Of tied ones, one name is enough.
    """
    tensors = [(path, module, key, value) for path, module in root.named_modules() for key, value in _own(module)]
    first: dict[Tensor, str] = {}
    for path, _, key, value in tensors:
        name = f"{path}.{key}" if path else key
        if name in names:
            first.setdefault(value, name)
    for module in root.modules():
        mine = {key: first[value] for key, value in _own(module) if value in first}
        if mine:
            module.__dict__[_ORIGIN] = _Origin(source, mine)
    root.__dict__[_NAMES] = frozenset(names)
    root.register_load_state_dict_pre_hook(_make_room)


def load_sources(
    root: nn.Module, store: Store, index_of: Mapping[nn.Parameter, int], unbuilt: Collection[nn.Parameter]
) -> set[nn.Parameter]:
    """Puts into the chunks what sources have of ``unbuilt``, and gives buffers on ``meta`` their values.

    Every rank calls it. One that fails ends it on all of them.

    Returns:
        the parameters of ``unbuilt`` that have values now.

    Raises:
        ConfigurationError: a source does not have what the model needs of it.
        DisagreementError: the ranks have sources with other values.
        PeerError: another rank failed.
    """
    wanted = _Wanted(root, store, index_of, set(unbuilt))
    _require_agreement(wanted.sources, store)
    failure: Exception | None = None
    try:
        wanted.refuse_what_is_lost()
        wanted.load()
    except Exception as error:  # the other ranks would wait for this one
        failure = error
    words = store.collectives.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for rank, said in enumerate(words):
        if said is not None:
            raise PeerError(f"rank {rank} could not load the values of the model: {said}")
    for module in root.modules():
        module.__dict__.pop(_ORIGIN, None)
        module.__dict__.pop(_NAMES, None)
    return wanted.loaded


def _make_room(
    root: nn.Module, state: Mapping[str, Any], prefix: str, metadata: Mapping[str, Any], *others: Any
) -> None:
    """Has what is loaded into ``root`` be kept: values loaded into tensors on ``meta`` are dropped otherwise."""
    errors = others[-1]
    if not metadata.get("assign_to_params_buffers", False):
        leave_meta_to_load(root, {key.removeprefix(prefix) for key in state})
    elif state and any(hasattr(module, "adapter_layer_names") for module in root.modules()):
        errors.append(
            "peft would move the adapters that are loaded to the meta device, and their values be lost. Give "
            "PeftModel.from_pretrained no low_cpu_mem_usage=True."
        )


def _require_agreement(sources: Sequence[Source], store: Store) -> None:
    """Raises DisagreementError if another rank has sources with other values."""
    everyone = store.collectives.gather_objects([(source.fingerprint, str(source)) for source in sources])
    prints = [[fingerprint for fingerprint, _ in known] for known in everyone]
    for rank, other in enumerate(prints):
        if other != prints[0]:
            said = [", ".join(f"{name}: {print}" for print, name in everyone[r]) or "nothing" for r in (0, rank)]
            raise DisagreementError(
                f"the ranks would load different values. Rank 0 reads {said[0]}; rank {rank} reads {said[1]}. Give all "
                "of them the same files."
            )


class _Wanted:
    """What a model still needs, by source and name."""

    def __init__(
        self, root: nn.Module, store: Store, index_of: Mapping[nn.Parameter, int], unbuilt: set[nn.Parameter]
    ) -> None:
        self._root = root
        self._store = store
        self._index_of = index_of
        self._unbuilt = unbuilt
        self._places: dict[int, dict[str, list[tuple[nn.Module, str]]]] = {}
        self._covered: set[nn.Parameter] = set()
        self.sources: list[Source] = []
        self.loaded: set[nn.Parameter] = set()
        for module in root.modules():
            origin: _Origin | None = module.__dict__.get(_ORIGIN)
            if origin is not None:
                for key, name in origin.names.items():
                    self._want(origin.source, name, module, key)

    def _want(self, source: Source, name: str, module: nn.Module, key: str) -> None:
        param, buffer = module._parameters.get(key), module._buffers.get(key)
        if (param is None or param not in self._unbuilt) and (buffer is None or not buffer.is_meta):
            return
        if param is not None:
            self._covered.add(param)
        if id(source) not in self._places:
            self._places[id(source)] = {}
            self.sources.append(source)
        self._places[id(source)].setdefault(name, []).append((module, key))

    def refuse_what_is_lost(self) -> None:
        """Raises ConfigurationError for a parameter on ``meta`` in the place of one that a source has values for."""
        for module in self._root.modules():
            names = module.__dict__.get(_NAMES, ())
            for name, param in module.named_parameters(remove_duplicate=False) if names else ():
                if name in names and param in self._unbuilt and param not in self._covered:
                    raise ConfigurationError(
                        f"{name} of {type(module).__name__} was replaced on the meta device (resize_token_embeddings "
                        "does that), so the values that wait for it would be lost. Give the model a module that has "
                        "values, built under torch.device('cpu'), or change a model that is loaded whole, save it, and "
                        "start from that."
                    )

    def load(self) -> None:
        """Loads from every source.

        Raises:
            ConfigurationError: a value is missing or has another shape.
        """
        for source in self.sources:
            places = self._places[id(source)]

            def put(name: str, value: Tensor, places: dict[str, list[tuple[nn.Module, str]]] = places) -> None:
                for module, key in places.pop(name, ()):
                    self._put(name, value, module, key)

            with torch.no_grad():
                source.load(tuple(places), put)
            if places:
                raise ConfigurationError(f"{source} has no values for {', '.join(places)}. Build the model anew.")

    def _put(self, name: str, value: Tensor, module: nn.Module, key: str) -> None:
        param, buffer = module._parameters.get(key), module._buffers.get(key)
        tensor = buffer if param is None else param
        assert tensor is not None
        if value.shape != tensor.shape:
            raise ConfigurationError(
                f"{name} is {tuple(tensor.shape)} in the model and {tuple(value.shape)} where its values are. If it "
                "was resized since it was built (resize_token_embeddings), resize a model that is loaded whole, save "
                "it, and start from that."
            )
        if param is None:
            module._buffers[key] = torch.empty_like(tensor, device=self._store.device.device).copy_(value)
        elif param not in self.loaded:
            self._store.write(self._index_of[param], value)
            self.loaded.add(param)


def _own(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for held in (module._parameters, module._buffers):
        yield from ((key, value) for key, value in held.items() if value is not None)
