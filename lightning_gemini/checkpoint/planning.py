"""torch.distributed.checkpoint as the planner of saves and loads: who writes what, and who reads which part of it."""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner

from lightning_gemini.core.errors import GeminiError

if TYPE_CHECKING:
    from torch.distributed.checkpoint.planner import SavePlan
    from torch.distributed.checkpoint.storage import StorageReader, StorageWriter


def run_save(tensors: Mapping[str, Tensor], writer: StorageWriter, group: dist.ProcessGroup | None) -> None:
    """``torch.distributed.checkpoint.save`` over ``group``, or the same steps in one process alone.

    Raises:
        CheckpointException: a rank failed; with several ranks, on all of them.
        Exception: whatever failed, on one rank.
    """
    planner = _SavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    state = dict(tensors)
    if group is not None:
        state_dict_saver.save(state, storage_writer=writer, planner=planner, process_group=group)
        return
    # it would do the same, but for a warning that torch.distributed is not initialised
    planner.set_up_planner(state, writer.storage_meta(), True)
    writer.set_up_storage_writer(True)
    plans, metadata = planner.create_global_plan([writer.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(writer.prepare_global_plan(plans)[0])
    writer.finish(metadata, [writer.write_data(plan, planner).value()])


def run_load(
    tensors: Mapping[str, Tensor], reader: StorageReader, group: dist.ProcessGroup | None, planner: DefaultLoadPlanner
) -> None:
    """``torch.distributed.checkpoint.load`` over ``group``, or the same steps in one process alone; raises alike."""
    state: dict[str, Any] = dict(tensors)
    if group is not None:
        state_dict_loader.load(state, storage_reader=reader, planner=planner, process_group=group)
        return
    metadata = reader.read_metadata()
    planner.set_up_planner(state, metadata, True)
    reader.set_up_storage_reader(metadata, True)
    plans = planner.create_global_plan([reader.prepare_local_plan(planner.create_local_plan())])
    plan = planner.finish_plan(reader.prepare_global_plan(plans)[0])
    reader.read_data(plan, planner).wait()


def portable(error: Exception) -> Exception:
    """``error`` as other ranks can be told of it: itself where it arrives as it is, else its text.

    What a rank raises is pickled for the others, and one that does not unpickle would leave them waiting.
    """
    if type(error).__module__ == "builtins" or isinstance(error, GeminiError):
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            pass
        else:
            return error
    return RuntimeError(f"{type(error).__name__}: {error}")


@contextlib.contextmanager
def portable_errors() -> Iterator[None]:
    """What is raised inside arrives as it is, or as its text, on every rank."""
    try:
        yield
    except Exception as error:
        raise portable(error) from error


def first_failure(error: BaseException, rank: int) -> tuple[int, BaseException]:
    """The first rank that failed, and what it raised there, from what ``rank`` itself sees as ``error``."""
    if isinstance(error, CheckpointException):
        rank = min(error.failures)
        return rank, error.failures[rank][0]
    return rank, error


def in_words(error: BaseException) -> str:
    """``error`` for people, with its type where the text alone may not tell."""
    text = str(error) if isinstance(error, (OSError, GeminiError)) else f"{type(error).__name__}: {error}"
    return text.rstrip(".")


class _SavePlanner(DefaultSavePlanner):
    def create_local_plan(self) -> SavePlan:
        with portable_errors():
            return super().create_local_plan()
