"""Whether sanitizers find anything in a few training steps that copy between host and device on streams of their own.

``python -m benchmarks.sanitizer`` trains these steps; :func:`check` runs that under NVIDIA's ``compute-sanitizer``,
whose memcheck looks for accesses out of bounds and whose racecheck for races within kernels, and under torch's own
sanitizer, which looks for accesses from two streams that no event orders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from benchmarks.result import Record
from lightning_gemini.core import DtypePolicy, shard

_BINARY = "compute-sanitizer"
_FOLDERS = ("/usr/local/cuda/bin", "/opt/cuda/bin")
_FOUND = 9  # the exit code of compute-sanitizer where there were errors
_TAIL = 2000  # characters of the output that are kept
_WIDTH, _DEPTH, _STEPS = 256, 6, 5
_ROOT = Path(__file__).parents[1]

#: Name, whether it needs the binary, what it is started with, and the environment.
_CHECKS: tuple[tuple[str, tuple[str, ...], dict[str, str]], ...] = (
    ("memcheck", ("--tool", "memcheck"), {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    ("racecheck", ("--tool", "racecheck"), {}),
    ("torch's stream sanitizer", (), {"TORCH_CUDA_SANITIZER": "1"}),
)


def find() -> str | None:
    """The path of ``compute-sanitizer``, ``None`` if this machine has none."""
    return shutil.which(_BINARY) or next((p for f in _FOLDERS if (p := shutil.which(_BINARY, path=f))), None)


def check(seconds: Callable[[], float], has_gpu: bool) -> list[Record]:
    """Runs all checks, each for at most ``seconds()``.

    Returns:
        for each its ``tool``, its ``outcome`` (``"clean"``, ``"errors"``, ``"not present"`` or why it was not done)
        and the end of its ``output``.
    """
    binary = find()
    return [_check(binary, *one, seconds=seconds(), has_gpu=has_gpu) for one in _CHECKS]


def train(device: torch.device) -> list[float]:
    """Some steps with all homes in host memory, so that every chunk is copied both ways; the losses."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH) for _ in range(_DEPTH)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    policy = DtypePolicy(torch.bfloat16, master="split")
    chunk = _WIDTH * (_WIDTH + 1) + 64
    engine = shard(model, [optimizer], device=device, placement="host", chunk_size=chunk, policy=policy)
    batch = torch.randn(8, _WIDTH, generator=torch.Generator().manual_seed(1)).to(device, torch.bfloat16)
    losses = []
    for _ in range(_STEPS):
        loss = model(batch).float().square().mean()
        loss.backward()
        engine.clip_grad_norm(optimizer, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    engine.release()
    return losses


def _check(
    binary: str | None, tool: str, options: tuple[str, ...], environment: dict[str, str], seconds: float, has_gpu: bool
) -> Record:
    if options and binary is None:
        return {"tool": tool, "outcome": "not present", "output": ""}
    if not has_gpu or seconds < 1:
        return {"tool": tool, "outcome": "not run: " + ("no time was left" if has_gpu else "no GPU"), "output": ""}
    command = [sys.executable, "-m", "benchmarks.sanitizer"]
    if options and binary is not None:
        command = [binary, *options, "--error-exitcode", str(_FOUND), "--report-api-errors", "no", *command]
    # compiled kernels would take minutes
    full = {**os.environ, "LIGHTNING_GEMINI_KERNEL": "eager", **environment}
    try:
        done = subprocess.run(
            command, cwd=_ROOT, env=full, capture_output=True, text=True, timeout=seconds, check=False
        )
    except subprocess.TimeoutExpired:
        return {"tool": tool, "outcome": f"not done within {seconds:.0f} s", "output": ""}
    output = (done.stdout + done.stderr)[-_TAIL:]
    outcomes = {0: "clean", _FOUND: "errors"}
    return {
        "tool": tool,
        "outcome": outcomes.get(done.returncode, f"failed (exit {done.returncode})"),
        "output": output,
    }


if __name__ == "__main__":
    print(train(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")))
