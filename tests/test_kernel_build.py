"""Which kernel runs where, and how the native one is built and kept."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch

from lightning_gemini.optim import kernel as kernel_module
from lightning_gemini.optim import native
from lightning_gemini.optim.kernel import VARIABLE, kernel_for
from lightning_gemini.optim.lion import LionRule
from lightning_gemini.optim.native import NativeKernel, UnavailableError
from lightning_gemini.optim.tensor_kernel import TensorKernel
from tests.test_kernels import BF16, CPU, FP32, assert_same_bits, native_kernel, start, train

# Which kernel


@pytest.fixture
def _afresh() -> Iterator[None]:
    """Nothing is remembered of what has been built."""
    caches = (native._library, kernel_module._native)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.usefixtures("_afresh")
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({"CXX": "no-such-compiler -v"}, "looked for no-such-compiler$"),
        ({"CXX": "", "PATH": ""}, r"looked for c\+\+, g\+\+, clang\+\+$"),
        ({"CXX": f"{sys.executable} -c 1/0"}, "ZeroDivisionError"),
    ],
)
def test_without_a_compiler_the_cpu_runs_eagerly(
    environment: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(VARIABLE, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.warns(UserWarning, match=r"install g\+\+ or clang\+\+") as caught:
        kernel, again = kernel_for(CPU), kernel_for(CPU)
    assert again is kernel
    assert len(caught) == 1
    with pytest.raises(UnavailableError, match=says):
        NativeKernel()
    assert kernel.name == "eager"
    assert_same_bits(
        train(kernel, LionRule(), start((BF16, FP32))),
        train(TensorKernel(compiled=False), LionRule(), start((BF16, FP32))),
    )
    monkeypatch.setenv(VARIABLE, "native")
    with pytest.raises(UnavailableError):
        kernel_for(CPU)


@pytest.mark.usefixtures("_afresh")
def test_a_rule_that_cannot_be_built_runs_eagerly(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that ends for lack of memory, say, after it has built what is common to all rules."""
    build = native._build

    def fails(compiler: Sequence[str], define: Sequence[str], folder: Path) -> Path:
        if define:
            raise UnavailableError("killed")
        return build(compiler, define, folder)

    kernel = NativeKernel()
    monkeypatch.setattr(native, "_build", fails)
    monkeypatch.setattr(native, "_intact", lambda *_: iter(()))
    with pytest.warns(UserWarning, match="runs operation by operation, several times slower: killed") as caught:
        ours = train(kernel, LionRule(), start((BF16, FP32)))
    assert len(caught) == 1
    assert_same_bits(ours, train(TensorKernel(compiled=False), LionRule(), start((BF16, FP32))))


def test_the_variable_forces_a_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("compiled", "eager"):
        monkeypatch.setenv(VARIABLE, name)
        assert kernel_for(CPU).name == name
    monkeypatch.setenv(VARIABLE, "native")
    assert kernel_for(torch.device("meta")).name == "compiled"
    assert kernel_for(CPU).name == native_kernel().name
    monkeypatch.setenv(VARIABLE, "fast")
    with pytest.raises(ValueError, match=f"{VARIABLE} is 'fast'; it must be one of native, compiled, eager"):
        kernel_for(CPU)


# The cache of what has been built


def built(folder: Path) -> list[Path]:
    return sorted((folder / "lightning_gemini").iterdir())


@pytest.mark.usefixtures("_afresh")
def test_a_library_is_built_once_and_again_when_spoilt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native_kernel()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    builds = []
    build = native._build
    monkeypatch.setattr(native, "_build", lambda *args: builds.append(args) or build(*args))

    def load() -> float:
        native._library.cache_clear()
        return NativeKernel().square_sum(torch.ones(5)).item()

    assert [load(), load()] == [5, 5]
    (library,) = built(tmp_path)
    assert len(builds) == 1
    intact = library.read_bytes()
    for spoilt in (b"", b"no library", intact[: len(intact) // 2]):
        library.unlink()  # the one that is loaded must stay as it is
        library.write_bytes(spoilt)
        assert load() == 5
        assert built(tmp_path) == [library]
        assert library.read_bytes() == intact
    assert len(builds) == 4


@pytest.mark.usefixtures("_afresh")
def test_a_cache_that_cannot_be_written_is_done_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native_kernel()
    native._library.cache_clear()
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert NativeKernel().square_sum(torch.ones(5)).item() == 5


def test_several_may_build_at_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """All ranks do, at the start; threads share no more than processes here: the disk."""
    native_kernel()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build, together = native._build, Barrier(3)

    def build_together(*args: Any) -> Path:
        path = build(*args)
        together.wait(60)
        return path

    monkeypatch.setattr(native, "_build", build_together)
    with ThreadPoolExecutor(3) as pool:
        libraries = [future.result() for future in [pool.submit(native._library.__wrapped__, None) for _ in range(3)]]
    assert all(library.square_sum_fp32 for library in libraries)
    assert all(path.stem.endswith(native._digest(path.read_bytes())) for path in built(tmp_path))


def test_another_processor_gets_another_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    native_kernel()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for processor in ("old", "new"):
        monkeypatch.setattr(native, "_processor", lambda processor=processor: processor)
        native._library.__wrapped__(None)
    assert len(built(tmp_path)) == 2


def test_no_warning_where_all_is_well(monkeypatch: pytest.MonkeyPatch) -> None:
    native_kernel()
    monkeypatch.delenv(VARIABLE, raising=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_for(CPU).name == "native"
