from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # in a background job of a shell
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture
def engines() -> Iterator[None]:
    """Releases what ``background.built`` has built; threads of other tests are of no concern."""
    from tests.background import note_threads, release_all

    note_threads()
    yield
    release_all()


@pytest.fixture
def gates() -> Iterator[Any]:
    """Holds updates in the background back."""
    from tests.background import gated

    with gated() as gates:
        yield gates
