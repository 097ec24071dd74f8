"""The others that a GPU is measured with: FSDP2 with its parameters in host memory, and plain PyTorch."""

from __future__ import annotations

import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

_TILE = 2**20  # random numbers that are used again and again: to draw billions on the host would take minutes
_STD = 0.02


def build_plain(model: nn.Module, device: torch.device) -> None:
    """Gives a model on ``meta`` fp32 values on ``device``."""
    model.to_empty(device=device)
    model.tie_weights()  # type: ignore[operator]
    _fill(model)


def shard_fully(model: nn.Module, blocks: list[nn.Module], device: torch.device) -> None:
    """FSDP2 on one rank as its documentation has it: each block and the rest a group, parameters in (pinned) host
    memory, computing in bf16, gradients reduced in fp32."""
    cuda = device.type == "cuda"
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    if not dist.is_initialized():
        store = dist.FileStore(str(Path(tempfile.mkdtemp(), "store")), 1)
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", store=store, rank=0, world_size=1)
    settings: dict[str, Any] = {
        "mesh": init_device_mesh(device.type, (1,)),
        "mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32),
        "offload_policy": CPUOffloadPolicy(pin_memory=cuda),
    }
    for block in blocks:
        fully_shard(block, **settings)
    fully_shard(model, **settings)
    model.to_empty(device="cpu")
    model.tie_weights()  # type: ignore[operator]
    _fill(model)
    for name, buffer in list(model.named_buffers()):
        parent, _, key = name.rpartition(".")
        model.get_submodule(parent)._buffers[key] = buffer.to(device)


@torch.no_grad()
def _fill(model: nn.Module) -> None:
    """OPT's initial values: normal in matrices, zero in biases, one in the weights of norms; none in buffers."""
    tile = torch.randn(_TILE, generator=torch.Generator().manual_seed(0)) * _STD
    norms = {id(p) for m in model.modules() if isinstance(m, nn.LayerNorm) for p in m.parameters(recurse=False)}
    for name, param in model.named_parameters():
        values: Tensor = param.to_local() if hasattr(param, "to_local") else param  # type: ignore[operator]
        flat = values.view(-1)
        if name.endswith("bias"):
            flat.zero_()
        elif id(param) in norms:
            flat.fill_(1.0)
        else:
            numbers = tile.to(flat.device)
            for start in range(0, flat.numel(), _TILE):
                piece = flat[start : start + _TILE]
                piece.copy_(numbers[: piece.numel()])
