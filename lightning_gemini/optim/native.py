"""The CPU's kernel: ``native.cpp``, built by the system's compiler when it is first needed and kept in a cache."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from lightning_gemini.optim.operands import Operands
from lightning_gemini.optim.rounding import counter
from lightning_gemini.optim.rule import Rule
from lightning_gemini.optim.tensor_kernel import TensorKernel

_SOURCE = Path(__file__).with_name("native.cpp")
_FLAGS = (
    "-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC", "-pthread",
)  # fmt: skip
_TUNING = (("-march=native",), ())  # for this processor, or, where the compiler does not know it, for any
_COMPILERS = ("c++", "g++", "clang++")
_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
_VALUES = {
    (torch.float32, None): "plain",
    (torch.bfloat16, None): "low",
    (torch.bfloat16, torch.float32): "master",
    (torch.bfloat16, torch.int16): "split",
}
_PATIENCE_SECONDS = 300  # for a compiler that takes two, alone on its machine
_HALF_BLOCK = 2**20  # elements of fp16, which native.cpp does not know, that are converted at a time


class UnavailableError(RuntimeError):
    """The native kernel cannot be built or loaded; carries what the compiler said."""


class NativeKernel:
    """One pass in ``torch.get_num_threads()`` threads; its bits depend neither on their number nor on cuts.

    Raises:
        UnavailableError: there is no compiler, or it cannot build the kernel.
    """

    name = "native"

    def __init__(self) -> None:
        library = _library(None)
        self._sums = {dtype: getattr(library, f"square_sum_{name}") for dtype, name in _TYPES.items()}
        for function in self._sums.values():
            function.restype = ctypes.c_double
        self._eager = TensorKernel(compiled=False)
        self._failed: set[str] = set()

    def prepare(self, rule: Rule) -> bool:
        """Builds what ``rule`` needs; where that fails, it runs operation by operation, with a warning."""
        if rule.symbol not in self._failed:
            try:
                _library(rule.symbol)
            except UnavailableError as error:
                self._failed.add(rule.symbol)
                warnings.warn(f"{rule} runs operation by operation, several times slower: {error}", stacklevel=2)
        return rule.symbol not in self._failed

    def update(self, rule: Rule, scalars: Sequence[float], operands: Operands) -> None:
        """One step of ``rule``, in place.

        Raises:
            ValueError: the operands are not in host memory or not as many as the rule's.
        """
        if operands.shard.device.type != "cpu" or len(operands.states) != len(rule.state_names):
            raise ValueError(
                f"{rule} has the states {rule.state_names} in host memory here, "
                f"not {len(operands.states)} on {operands.shard.device}"
            )
        if not self.prepare(rule):
            self._eager.update(rule, scalars, operands)
            return
        if torch.float16 in (operands.shard.dtype, operands.grad.dtype):
            for start in range(0, operands.shard.numel(), _HALF_BLOCK):
                self._update_half(rule, scalars, operands.block(start, start + _HALF_BLOCK))
            return
        master = operands.master
        names = (
            _VALUES[operands.shard.dtype, None if master is None else master.dtype],
            _TYPES[operands.grad.dtype],
            _TYPES[operands.states[0].dtype if operands.states else torch.float32],
        )
        getattr(_library(rule.symbol), "_".join(("update", *names)))(
            _address(operands.shard),
            None if master is None else _address(master),
            _address(operands.grad),
            (ctypes.c_void_p * 3)(*(state.data_ptr() for state in operands.states)),
            ctypes.c_int64(operands.shard.numel()),
            (ctypes.c_float * len(scalars))(*scalars),
            ctypes.c_float(float(operands.factor)),
            ctypes.c_float(float(operands.limit)),
            ctypes.c_uint32(counter(operands.seed, operands.first)),
            ctypes.c_int(torch.get_num_threads()),
        )

    def square_sum(self, values: Tensor) -> Tensor:
        """The sum of squares, a 0-d fp64 tensor, accumulated in fp64."""
        if values.dtype == torch.float16:
            return torch.stack([self.square_sum(block.float()) for block in values.split(_HALF_BLOCK)]).sum()
        values = values.contiguous()
        numel, threads = ctypes.c_int64(values.numel()), ctypes.c_int(torch.get_num_threads())
        total = self._sums[values.dtype](_address(values), numel, threads)
        return torch.tensor(total, dtype=torch.float64)

    @torch.no_grad()
    def _update_half(self, rule: Rule, scalars: Sequence[float], block: Operands) -> None:
        """Through fp32: its master is the shard of a plain update."""
        shard, grad = block.shard, block.grad.float() if block.grad.dtype == torch.float16 else block.grad
        half = shard.dtype == torch.float16
        value = (shard.float() if block.master is None else block.master) if half else shard
        master = None if half else block.master
        full = Operands(value, grad, master, block.states, block.factor, block.limit, block.seed, block.first)
        self.update(rule, scalars, full)
        if half:
            shard.copy_(value)


def _address(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@cache
def _library(rule: str | None) -> ctypes.CDLL:
    """The library with the updates of ``rule``, from the cache or built."""
    compiler = _compiler()
    define = [] if rule is None else [f"-DRULE={rule}"]
    command = repr((compiler, _FLAGS, _TUNING, define, _version(compiler), _processor()))
    key = _digest(_SOURCE.read_bytes(), command.encode())
    try:
        folder = _cache()
        for path in _intact(folder, key):
            with suppress(OSError):
                return ctypes.CDLL(str(path))
        with tempfile.TemporaryDirectory(dir=folder) as private:
            built = _build(compiler, define, Path(private))
            path = folder / f"{key}-{_digest(built.read_bytes())}.so"
            os.replace(built, path)  # whoever else builds the same puts an equally good file there
        return ctypes.CDLL(str(path))
    except OSError:  # nothing can be kept there; what is loaded needs its file no more
        with tempfile.TemporaryDirectory() as private:
            return _load(_build(compiler, define, Path(private)))


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(base):
        raise OSError("there is no home")
    folder = Path(base, "lightning_gemini")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _intact(folder: Path, key: str) -> Iterator[Path]:
    """The files built for ``key`` whose contents are what their names say; to load another one could end us."""
    for path in folder.glob(f"{key}-*.so"):
        if path.stem == f"{key}-{_digest(path.read_bytes())}":
            yield path


def _load(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise UnavailableError(f"what the compiler built cannot be loaded: {error}") from error


def _build(compiler: Sequence[str], define: Sequence[str], folder: Path) -> Path:
    path = folder / "built.so"
    for tuning in _TUNING:
        command = [*compiler, *_FLAGS, *tuning, *define, str(_SOURCE), "-o", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_PATIENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(f"{shlex.join(command)} took more than {_PATIENCE_SECONDS} s") from error
        if done.returncode == 0:
            return path
    raise UnavailableError(f"{shlex.join(command)} failed:\n{done.stderr.strip()}")


def _compiler() -> list[str]:
    """The command of the compiler."""
    named = os.environ.get("CXX")
    commands = [shlex.split(named)] if named else [[name] for name in _COMPILERS]
    for command in commands:
        if shutil.which(command[0]):
            return command
    raise UnavailableError(f"no C++ compiler found, looked for {', '.join(command[0] for command in commands)}")


def _version(compiler: Sequence[str]) -> str:
    return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=False).stdout


def _processor() -> str:
    """Model and features: a home folder may be shared by machines that do not know each other's instructions."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    about = {line for line in lines if line.lower().startswith(("model name", "flags", "features", "cpu part"))}
    return "\n".join([platform.machine(), platform.processor(), *sorted(about)])


def _digest(*parts: bytes) -> str:
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:32]
