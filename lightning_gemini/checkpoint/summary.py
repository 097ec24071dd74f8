"""What is in a checkpoint, in words."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from typing import Any

import torch

from lightning_gemini.checkpoint.contents import STATE_DICT
from lightning_gemini.checkpoint.full_file import place_in_file, tensors_in
from lightning_gemini.checkpoint.manifest import Manifest
from lightning_gemini.checkpoint.state import OPTIMIZERS
from lightning_gemini.core.memory import format_bytes

_Sizes = Iterable[tuple[torch.dtype, int]]  # of tensors: dtype and number of elements


def describe_sharded(manifest: Manifest) -> str:
    """Steps, ranks, weights, optimizers, bytes and time of a sharded checkpoint, a line for each."""
    about, writer = manifest.about, manifest.writer
    time = datetime.strptime(manifest.save_id.partition("-")[0], "%Y%m%dT%H%M%S%f")
    sizes = {name: (tensor.dtype, tensor.nbytes // tensor.dtype.itemsize) for name, tensor in manifest.tensors.items()}
    lines = [
        f"sharded checkpoint, written by {manifest.world_size} rank(s) in {len(manifest.files)} files of "
        f"{format_bytes(manifest.nbytes)}",
        f"saved: {time:%Y-%m-%d %H:%M:%S} UTC, lightning-gemini {writer.get('version', 'unknown')}",
        *_progress(about),
    ]
    fingerprint = about.get("fingerprint", {})
    if "precision" in fingerprint:
        lines.append(f"precision: {fingerprint['precision']}")
    lines.append(f"weights: {_sizes(_below(sizes, STATE_DICT))}")
    if about.get("left_out"):
        lines.append(f"left out: {len(about['left_out'])} frozen parameters")
    for number, optimizer in enumerate(fingerprint.get(OPTIMIZERS, ())):
        lines.append(
            f"optimizer {number}: {optimizer['class']}, {len(optimizer['groups'])} group(s), "
            f"{_sizes(_below(sizes, f'{OPTIMIZERS}.{number}'))}"
        )
    others = [size for name, size in sizes.items() if not name.startswith((f"{STATE_DICT}.", f"{OPTIMIZERS}."))]
    if others:
        lines.append(f"other tensors: {_sizes(others)}")
    attachments = ", ".join(f"{name} {format_bytes(manifest.files[name].nbytes)}" for name in manifest.attachments)
    return "\n".join([*lines, f"the rest: {attachments or 'nothing'}"])


def describe_full(checkpoint: Mapping[str, Any], nbytes: int, time: datetime | None) -> str:
    """The same of a checkpoint in one file; ``nbytes`` and ``time`` are the file's."""
    lines = [f"checkpoint in one file of {format_bytes(nbytes)}"]
    version = checkpoint.get("pytorch-lightning_version")
    saved = f"{time.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC" if time else "at an unknown time"
    lines.append(f"saved: {saved}, {'Lightning ' + version if version else 'not by a Trainer'}")
    lines += _progress(checkpoint)
    if isinstance(checkpoint.get(STATE_DICT), Mapping):
        lines.append(f"weights: {_sizes(_of(checkpoint[STATE_DICT]))}")
    for number, state in enumerate(checkpoint.get("optimizer_states", ())):
        groups = len(state.get("param_groups", ()))
        lines.append(f"optimizer {number}: {groups} group(s), {_sizes(_of(state))}")
    rest = {key: value for key, value in checkpoint.items() if key not in (STATE_DICT, "optimizer_states")}
    others = list(_of(rest))
    return "\n".join([*lines, f"other tensors: {_sizes(others)}"] if others else lines)


def _progress(about: Mapping[str, Any]) -> Iterator[str]:
    if "global_step" in about:
        yield f"step {about['global_step']}, epoch {about.get('epoch', 'unknown')}"


def _below(sizes: Mapping[str, tuple[torch.dtype, int]], prefix: str) -> _Sizes:
    return [size for name, size in sizes.items() if name.startswith(f"{prefix}.")]


def _of(tree: Any) -> _Sizes:
    """Tied weights, which have one place in the file, count as one."""
    seen = set()
    for _, tensor in tensors_in(tree):
        place = place_in_file(tensor) if tensor.layout == torch.strided else None
        if place is None or place not in seen:
            seen.add(place)
            yield tensor.dtype, tensor.numel()


def _sizes(sizes: _Sizes) -> str:
    by_dtype: dict[torch.dtype, int] = {}
    count = 0
    for dtype, numel in sizes:
        by_dtype[dtype] = by_dtype.get(dtype, 0) + numel
        count += 1
    ordered = sorted(by_dtype.items(), key=lambda item: -item[1])
    parts = ", ".join(f"{numel:,} x {str(dtype).removeprefix('torch.')}" for dtype, numel in ordered)
    nbytes = sum(numel * dtype.itemsize for dtype, numel in ordered)
    return f"{count} tensors of {format_bytes(nbytes)}" + (f" ({parts})" if parts else "")
