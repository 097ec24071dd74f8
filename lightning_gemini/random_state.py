"""The state of random number generators as plain data: numbers, texts, bytes and tensors, which load without pickle."""

from __future__ import annotations

import hashlib
import random
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = dict[str, Any]

#: those that are drawn from where no other is named
_GLOBAL = {"python": random, "numpy": np.random, "torch": torch.default_generator}
_GENERATORS = (random.Random, np.random.Generator, np.random.RandomState, torch.Generator)


def random_state() -> State:
    """The state of the global generators of this process: about 10 KB.

    Returns:
        One entry each for Python's ``random``, numpy's ``np.random`` and torch on the CPU, and one for torch on the
        current CUDA device if CUDA has been initialised.
    """
    state = {name: generator_state(generator) for name, generator in _GLOBAL.items()}
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def set_random_state(state: Mapping[str, Any]) -> None:
    """Puts the global generators where they were when ``state`` was taken by :func:`random_state`.

    A state of CUDA is left out where there is no CUDA.
    """
    for name, generator in _GLOBAL.items():
        set_generator_state(generator, state[name])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def same_state(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two states of the global generators are equal."""
    return one.keys() == other.keys() and all(_same(one[name], other[name]) for name in one)


def state_for(state: Mapping[str, Any], rank: int) -> State:
    """A state for a rank that has none, made of another rank's: the same one each time, another one for each rank."""
    digest = hashlib.blake2b(struct.pack("<q", rank), digest_size=32)
    for name in _GLOBAL:
        digest.update(repr(_hashable(state[name])).encode())
    seeds = struct.unpack("<4Q", digest.digest())
    made = {
        "python": generator_state(random.Random(seeds[0])),
        "numpy": generator_state(np.random.RandomState(np.array([seeds[1] % 2**32, seeds[1] >> 32]))),
        "torch": generator_state(torch.Generator().manual_seed(seeds[2])),
    }
    if "cuda" in state:  # the seed and how far the generator is, 8 bytes each
        made["cuda"] = torch.frombuffer(bytearray(struct.pack("<Qq", seeds[3], 0)), dtype=torch.uint8)
    return made


def is_generator(value: object) -> bool:
    """Whether :func:`generator_state` can read it, and it is none of the global ones."""
    return type(value) in _GENERATORS and value is not torch.default_generator


def generator_state(generator: Any) -> Any:
    """The state of one generator of Python, numpy or torch, as plain data."""
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return _plain(generator.bit_generator.state)
    if hasattr(generator, "get_state"):
        return _plain(generator.get_state(legacy=False))
    version, words, gauss = generator.getstate()
    return {"version": version, "words": struct.pack(f"<{len(words)}I", *words), "gauss": gauss}


def set_generator_state(generator: Any, state: Any) -> None:
    """Puts a generator where another one of its kind was when ``state`` was taken by :func:`generator_state`."""
    if isinstance(generator, torch.Generator):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = _live(state)
    elif hasattr(generator, "set_state"):
        generator.set_state(_live(state))
    else:
        words = struct.unpack(f"<{len(state['words']) // 4}I", state["words"])
        generator.setstate((state["version"], words, state["gauss"]))


def _plain(state: Any) -> Any:
    """numpy's states are dictionaries of numbers, texts and arrays."""
    if isinstance(state, np.ndarray):
        return {"dtype": state.dtype.str, "shape": list(state.shape), "bytes": state.tobytes()}
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    return state.item() if isinstance(state, np.generic) else state


def _live(state: Any) -> Any:
    if not isinstance(state, dict):
        return state
    if "bytes" in state:
        return np.frombuffer(state["bytes"], state["dtype"]).reshape(state["shape"]).copy()
    return {key: _live(value) for key, value in state.items()}


def _hashable(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.numpy().tobytes()
    return sorted((key, _hashable(value)) for key, value in state.items()) if isinstance(state, dict) else state


def _same(one: Any, other: Any) -> bool:
    return torch.equal(one, other) if isinstance(one, Tensor) else one == other
