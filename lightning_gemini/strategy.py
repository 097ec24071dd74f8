"""``Trainer(strategy="gemini")``: Lightning's side of the engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.accelerators import Accelerator
from lightning.pytorch.plugins import Precision
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from typing_extensions import override

from lightning_gemini.budgets import Budgets
from lightning_gemini.checkpoint.fingerprint import fingerprint
from lightning_gemini.checkpoint.loading import LoadedWeights
from lightning_gemini.checkpointing import Checkpointing, StateDictType
from lightning_gemini.core import ConfigurationError, Engine, UpdatePolicy, shard
from lightning_gemini.core.construct import leave_meta, return_to_meta, to_host
from lightning_gemini.core.errors import ended_together
from lightning_gemini.even import require_even
from lightning_gemini.handover import hand_back
from lightning_gemini.precision import GeminiPrecision
from lightning_gemini.pretrained import chunks_come
from lightning_gemini.ranks import StartMethod
from lightning_gemini.resume import ResumableStrategy
from lightning_gemini.resumption import Resume, Resumption
from lightning_gemini.step_file import run_folder, write_step
from lightning_gemini.supported import require_no_waiting_gradients, require_supported

Placement = Literal["auto", "device", "host", "cuda", "cpu"]

_PLACEMENTS = {"auto": "auto", "device": "device", "cuda": "device", "host": "host", "cpu": "host"}


class GeminiStrategy(ResumableStrategy):
    """Trains models that do not fit one device: parameters, gradients and optimizer states in sharded chunks.

    Needs no change to the LightningModule. See ``docs/design.md`` for how it works.

    Args:
        placement: Where parameters and optimizer states live between uses. "device" (or "cuda") keeps them there,
            "host" (or "cpu") keeps them in host memory and brings to the device what is being computed, "auto" keeps
            everything on the device if it fits; else it records one step and plans what is best where and when.
        device_memory: Bytes that this process may use on its device, activations included: a number, a text such as
            "20GiB", or "auto" for what is free. On the CPU accelerator a number emulates a device of that size for
            chunks and gradients (activations are not counted there), and "auto" sets no bound.
        host_memory: Bytes that chunks may use in host memory, for each process, in the same forms; "auto" for an equal
            share of what is free.
        margin: The share of device_memory that plans leave free, for batches that take more than the recorded one;
            "auto" is 0.1, and 0 on the CPU accelerator.
        prefetch: The most chunks that are brought to the device ahead of their need; "auto" for as many as there is
            room for.
        chunk_size: Elements in a chunk; "auto" searches for the size that wastes the least.
        unit_modules: Classes of modules (by name) whose parameters become usable together; by default each module that
            owns parameters is on its own. Name a module that contains rank-dependent control flow.
        update: When weights are updated: "at_step", or "in_backward", each chunk as soon as its gradients are reduced,
            so that no gradient waits: 2 bytes per parameter less. That rules out clipping, accumulating and skipping
            steps, which need all gradients before the first update.
        overlap: Update what lives in host memory in the background, while the next forward runs; each part of the model
            waits for its own weights alone, and the numbers are the same. False makes every step() wait for the update.
        check: Watch every step, not only the first of each kind, for reads of parameters that no hook sees (a loop over
            self.parameters(), a weight in a list), serve them and name them in engine.hidden_reads.
        state_dict_type: What checkpoints are: "sharded", a folder into which each rank writes its shards, or "full",
            one ordinary Lightning file, for which rank 0 gathers everything. Any number of ranks loads either.
        async_save: Write sharded checkpoints while training goes on, from a copy in host memory that counts as such.
            What fails then is raised at the next step.
        save_frozen: Whether parameters that need no gradient are saved. Without them a model has to have their values,
            as pretrained ones do, before a checkpoint is loaded.
        resume: What fit(ckpt_path=...) takes. "exact": everything, and it refuses to go on with another model,
            optimizer or precision. "cast": everything, converted to another precision. "weights": only them.
        process_group_backend: Backend of torch.distributed; by default nccl for CUDA and gloo for the CPU.
        timeout_seconds: Seconds after which a wait for other ranks fails, on all of them. A rank that gets stuck leaves
            gemini_hang-rank0.txt (or its own number) in the run's folder: its stacks, and the state of its chunks.
        start_method: How processes are started where no launcher did: "popen" runs the script again, "spawn", "fork"
            and "forkserver" use multiprocessing; "auto" is fork in a notebook and popen elsewhere.
        accelerator: Set by the Trainer.
        parallel_devices: Set by the Trainer.
        cluster_environment: How ranks find each other; by default found from the environment (torchrun, SLURM, ...).
        checkpoint_io: How checkpoints are written and read.
        precision_plugin: A GeminiPrecision; usually made from Trainer(precision=...).

    Raises:
        ConfigurationError: A setting cannot work.
    """

    strategy_name = "gemini"

    def __init__(
        self,
        placement: Placement = "auto",
        device_memory: int | float | str = "auto",
        host_memory: int | float | str = "auto",
        margin: float | Literal["auto"] = "auto",
        prefetch: int | Literal["auto"] = "auto",
        chunk_size: int | Literal["auto"] = "auto",
        unit_modules: list[str] | None = None,
        update: Literal["at_step", "in_backward"] = "at_step",
        overlap: bool = True,
        check: bool = False,
        state_dict_type: StateDictType = "sharded",
        async_save: bool = False,
        save_frozen: bool = True,
        resume: Resume = "exact",
        process_group_backend: str | None = None,
        timeout_seconds: float = 1800.0,
        start_method: StartMethod = "auto",
        accelerator: Accelerator | None = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: ClusterEnvironment | None = None,
        checkpoint_io: CheckpointIO | None = None,
        precision_plugin: Precision | None = None,
    ) -> None:
        super().__init__(
            process_group_backend,
            timeout_seconds,
            start_method,
            accelerator,
            parallel_devices,
            cluster_environment,
            checkpoint_io,
            precision_plugin,
            checkpoints=Checkpointing(state_dict_type, async_save, save_frozen),
            resumption=Resumption(resume),
        )
        if not isinstance(placement, str) or placement not in _PLACEMENTS:
            raise ConfigurationError(f"placement must be one of {', '.join(_PLACEMENTS)}, got {placement!r}.")
        if chunk_size != "auto" and not (isinstance(chunk_size, int) and chunk_size > 0):
            raise ConfigurationError(f"chunk_size must be 'auto' or a positive number of elements, got {chunk_size!r}.")
        if prefetch != "auto" and (type(prefetch) is not int or prefetch < 0):
            raise ConfigurationError(f"prefetch must be 'auto' or a number of chunks from 0 on, got {prefetch!r}.")
        self._prefetch = None if prefetch == "auto" else int(prefetch)
        self._placement = _PLACEMENTS[placement]
        self._budgets = Budgets(device_memory, host_memory, margin)
        self._chunk_size = chunk_size
        self._unit_modules = unit_modules or ()
        UpdatePolicy(update)  # raises if there is no such time
        if not isinstance(overlap, bool):
            raise ConfigurationError(f"overlap must be True or False, got {overlap!r}.")
        self._update = update
        self._overlap = overlap
        self._check = check
        self._failed = self._parted = False

    def memory_report(self) -> str:
        """The chunks and the memory they take on this rank, in words."""
        return f"{self.engine.layout}\n{self.engine.memory_report()}"

    def summon_full_params(
        self, module: nn.Module | None = None, writeback: bool = False, with_grads: bool = False
    ) -> AbstractContextManager[None]:
        """Gives parameters their whole values inside the block; every rank has to enter. See :meth:`Engine.summon`."""
        return self.engine.summon(module, writeback, with_grads=with_grads)

    def grad_norm(self, norm_type: float = 2.0, module: nn.Module | None = None) -> Tensor:
        """The norm of the gradients that wait for the step; every rank has to call. See :meth:`Engine.grad_norm`."""
        return self.engine.grad_norm(None, norm_type, module)

    def grad_norms(self, norm_type: float = 2.0) -> dict[str, Tensor]:
        """The norm of each parameter's gradient by name, for a logger; every rank has to call."""
        return self.engine.grad_norms(norm_type)

    # Precision

    @property
    @override
    def precision_plugin(self) -> Precision:
        return self._precision_plugin if self._precision_plugin is not None else GeminiPrecision()

    @precision_plugin.setter
    @override
    def precision_plugin(self, precision_plugin: Precision | None) -> None:
        # Lightning makes a plugin of its own for strategies it does not know
        self._precision_plugin = None if precision_plugin is None else GeminiPrecision.from_plugin(precision_plugin)

    # The model

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Iterator[None]:
        with chunks_come(on_meta=bool(empty_init)), self.precision_plugin.tensor_init_context():
            yield

    @override
    def model_to_device(self) -> None:
        pass  # the chunks are there already

    @override
    def setup(self, trainer: L.Trainer) -> None:
        assert self.accelerator is not None
        assert self.lightning_module is not None
        self.accelerator.setup(trainer)
        self._refuse_ignored_precision(trainer)
        require_supported(trainer.callbacks)
        if self._update == "in_backward":
            require_no_waiting_gradients(trainer)
        self._failed = self._parted = False
        self.model = self.lightning_module
        fitting = trainer.state.fn == TrainerFn.FITTING
        self._reset_optimizers_and_schedulers()
        if not fitting and not any(True for _ in self.model.parameters()):
            return  # nothing to shard, and nothing that needs it
        loaded, self._resumption.loaded = self._resumption.loaded, None
        unbuilt = (loaded.unbuilt if loaded is not None else set()) | leave_meta(self.model, self.root_device)
        try:
            if fitting:
                self.setup_optimizers(trainer)
            self.setup_precision_plugin()
            found = fingerprint(self.model, self.optimizers, self.precision_plugin.policy)
            self._resumption.compare(found, self.lightning_module.strict_loading)
            self._checkpoints.begin(found)
            self._engine = self._shard(unbuilt, loaded)
        except BaseException:
            return_to_meta(self.model, unbuilt)  # so that it can be tried again
            if loaded is not None:
                loaded.take_back()
            raise
        self._checkpoints.attach(self._engine, self.make_host_group(), trainer.datamodule)
        self.model = self.precision_plugin.convert_module(self.lightning_module)
        self.precision_plugin.engine = self._engine
        for wrapper, chunks in zip(self._lightning_optimizers, self._engine.optimizers, strict=True):
            # the wrapper inherits from the optimizer's class, so it would find that class's own method
            wrapper.zero_grad = chunks.zero_grad  # type: ignore[method-assign]

    def _shard(self, unbuilt: set[nn.Parameter], loaded: LoadedWeights | None) -> Engine:
        assert self.model is not None
        group, reduce_group = self.make_groups()
        return shard(
            self.model,
            self.optimizers,
            group=group,
            reduce_group=reduce_group,
            device=self.root_device,
            placement=self._placement,  # type: ignore[arg-type]
            device_memory=self._budgets.device_bytes(self.root_device),
            host_memory=self._budgets.host_bytes(self.num_processes),
            chunk_size=self._chunk_size,
            prefetch=self._prefetch,
            unit_modules=self._unit_modules,
            policy=self.precision_plugin.policy,
            update=replace(self.precision_plugin.update_policy(self._update), overlap=self._overlap),
            unbuilt=unbuilt,
            sources=[] if loaded is None else [loaded],
            check=self._check,
            hang_folder=run_folder(self._trainer),
        )

    def _refuse_ignored_precision(self, trainer: L.Trainer) -> None:
        asked = trainer._accelerator_connector._precision_flag
        if asked not in ("32-true", self.precision_plugin.precision):
            raise ConfigurationError(
                f"Trainer(precision={asked!r}) and a precision plugin for {self.precision_plugin.precision!r} inside "
                "GeminiStrategy contradict each other, and Lightning would ignore the first. Give one of them."
            )

    @override
    def on_exception(self, exception: BaseException) -> None:
        self._failed, self._parted = True, not ended_together(exception)
        self.abandon_processes(failed=self._parted)
        if self._engine is not None and self._parted:
            self._engine.leave(exception)

    @override
    def explains(self, what: str) -> AbstractContextManager[None]:
        return super().explains(what) if self._engine is None else self._engine.store.collectives.explains(what)

    @override
    def teardown(self) -> None:
        if self._engine is not None:
            self._checkpoints.close(self._failed, self._parted and self.world_size > 1)
            if self.optimizers and not self._failed:
                self._checkpoints.remember(self._engine, self.lightning_module)
            if not self._failed:
                write_step(self._trainer, self._engine)
            hand_back(self._engine, self._parted and self.world_size > 1, self._budgets.host_bytes(self.num_processes))
            self._engine = None
            self._checkpoints.settle()
        if isinstance(self._precision_plugin, GeminiPrecision):
            self._precision_plugin.engine = None
        # module.cpu() would copy placeholders out to their full size, and fail on meta
        module, self._lightning_module = self._lightning_module, None
        super().teardown()
        self._lightning_module = module
        if module is not None:
            _update_properties(module, device=torch.device("cpu"))
            module._apply(to_host)

    # Steps

    @override
    def training_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self.lightning_module is not None
        with self.precision_plugin.train_step_context(), self.engine.forward("training_step"):
            return self.lightning_module.training_step(*args, **kwargs)

    @override
    def validation_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self.lightning_module is not None
        with self.precision_plugin.val_step_context(), self._evaluation("validation_step"):
            return self.lightning_module.validation_step(*args, **kwargs)

    @override
    def test_step(self, *args: Any, **kwargs: Any) -> STEP_OUTPUT:
        assert self.lightning_module is not None
        with self.precision_plugin.test_step_context(), self._evaluation("test_step"):
            return self.lightning_module.test_step(*args, **kwargs)

    @override
    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        assert self.lightning_module is not None
        with self.precision_plugin.predict_step_context(), self._evaluation("predict_step"):
            return self.lightning_module.predict_step(*args, **kwargs)

    @contextmanager
    def _evaluation(self, name: str) -> Iterator[None]:
        # under NCCL Lightning evaluates in inference mode, and what is allocated there is of no use to a later step
        step = self._engine.forward(name) if self._engine is not None else nullcontext()
        with torch.inference_mode(False), torch.no_grad(), step:
            yield

    def _before_evaluation(self, batches: Sequence[int | float], what: str) -> None:
        if self._engine is not None:
            self._engine.sync_buffers()
            require_even(self._engine.store.collectives, batches, what)

    @override
    def on_validation_start(self) -> None:
        checking = self._trainer.sanity_checking
        self._before_evaluation(
            self._trainer.num_sanity_val_batches if checking else self._trainer.num_val_batches, "validation"
        )

    @override
    def on_test_start(self) -> None:
        self._before_evaluation(self._trainer.num_test_batches, "test")

    @override
    def on_predict_start(self) -> None:
        self._before_evaluation(self._trainer.num_predict_batches, "prediction")

    @override
    def on_train_start(self) -> None:
        self.engine.check_model()
        require_even(self.engine.store.collectives, [self._trainer.num_training_batches], "training")
        super().on_train_start()

    @override
    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self._checkpoints.check()
        if batch_idx == 0:  # loaders may be new ones in each epoch
            require_even(self.engine.store.collectives, [self._trainer.num_training_batches], "training")

    @contextmanager
    @override
    def block_backward_sync(self) -> Iterator[None]:
        with self.engine.accumulate(hear=True):  # Lightning itself lets the ranks wait for each other after each batch
            yield

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        for name, placement in (("gemini", "auto"), ("gemini_device", "device"), ("gemini_host", "host")):
            description = f"chunks of sharded parameters, placement={placement!r}"
            strategy_registry.register(name, cls, description, override=True, placement=placement)


GeminiStrategy.register_strategies(StrategyRegistry)
