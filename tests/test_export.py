"""Exported models are what save_pretrained of the whole model writes, made tensor by tensor; or there is nothing."""

from __future__ import annotations

import copy
import ctypes
import errno
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_gemini import from_pretrained
from lightning_gemini.checkpoint import CheckpointReader, save
from lightning_gemini.checkpoint.huggingface import Exported, export
from lightning_gemini.checkpoint.huggingface_about import describe
from lightning_gemini.checkpoint.weight_file import WeightFile
from lightning_gemini.cli import main
from lightning_gemini.core.errors import ConfigurationError, CorruptCheckpointError, IncompatibleCheckpointError
from lightning_gemini.data import TextData
from tests import lightning_cases
from tests.ranks import run_ranks
from tests.test_pretrained import CHECKPOINTS, LLAMA, _anonymous, assert_equal, llama, mixtral, opt, random_model


class Module(L.LightningModule):
    def __init__(self, model: nn.Module, **others: Any) -> None:
        super().__init__()
        self.model = model
        for name, value in others.items():
            setattr(self, name, value)


def saved(folder: Path, module: nn.Module, datamodule: Any = None, dtype: torch.dtype | None = None) -> Path:
    """A sharded checkpoint of ``module``, with weights in ``dtype`` as masters are."""
    said = describe(module, datamodule)
    tensors = {f"state_dict.{name}": value.to(dtype) for name, value in module.state_dict().items()}
    save(folder, tensors, {}, {} if said is None else {"huggingface": json.loads(json.dumps(said))})
    return folder


def exported(folder: Path, module: nn.Module, **settings: Any) -> list[Exported]:
    return export(CheckpointReader(saved(folder / "checkpoint", module)), folder / "out", **settings)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_same_files(out: Path, expected: Path, *others: str) -> None:
    """Byte for byte; ``others`` are in ``expected`` alone."""
    mine, theirs = contents(out), contents(expected)
    for name in [name for name in theirs if name.endswith("adapter_config.json")]:
        # peft writes sets in any order
        one, other = (json.loads(held.pop(name)) for held in (mine, theirs))
        assert all(sorted(one[key]) == sorted(other[key]) for key in one if isinstance(one[key], list))
        assert {k: v for k, v in one.items() if not isinstance(v, list)} == {
            k: v for k, v in other.items() if not isinstance(v, list)
        }
    assert sorted(mine) == sorted(theirs.keys() - set(others))
    assert [name for name in mine if mine[name] != theirs[name]] == []


def assert_same_state(model: nn.Module, expected: nn.Module) -> None:
    mine, theirs = model.state_dict(), expected.state_dict()
    assert list(mine) == list(theirs)
    assert all(mine[name].dtype == value.dtype and torch.equal(mine[name], value) for name, value in theirs.items())


# The same bytes as save_pretrained


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "headless"])
def test_the_same_files_as_save_pretrained(name: str, dtype: torch.dtype | None, tmp_path: Path) -> None:
    model = CHECKPOINTS[name][0]()
    (done,) = exported(tmp_path, Module(model), dtype=dtype)
    model.save_pretrained(tmp_path / "expected")
    if dtype is not None:  # some weights of T5 stay in fp32
        model = CHECKPOINTS[name][1].from_pretrained(tmp_path / "expected", dtype=dtype)
        model.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "out", tmp_path / "expected")
    assert done.folder == tmp_path / "out"
    assert (done.kind, done.adapters, done.tokenizer) == (type(model).__name__, False, None)
    assert done.nbytes < (tmp_path / "out" / "model.safetensors").stat().st_size < done.nbytes + 20_000
    assert_same_state(CHECKPOINTS[name][1].from_pretrained(tmp_path / "out", dtype=dtype), model)


@pytest.mark.parametrize("make", [opt, llama])
def test_several_files(make: Callable[[], Any], tmp_path: Path) -> None:
    exported(tmp_path, Module(make()), max_shard_size="20KB")
    make().save_pretrained(tmp_path / "expected", max_shard_size="20KB")
    assert (tmp_path / "out" / "model.safetensors.index.json").exists()
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_fused_weights_in_several_files(tmp_path: Path) -> None:
    model = mixtral()
    (done,) = exported(tmp_path, Module(model), max_shard_size="20KB")
    assert len(done.weights) > 1
    assert all((tmp_path / "out" / name).stat().st_size < 24_000 for name in done.weights)
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_loaded_models_are_saved_by_the_names_that_they_were_loaded_from(tmp_path: Path) -> None:
    def fresh(name: str, **settings: Any) -> Any:
        return transformers.AutoModelForMaskedLM.from_pretrained(tmp_path / name, **settings)

    settings = LLAMA | {"intermediate_size": 64}
    random_model("BertForMaskedLM", "BertConfig", settings).save_pretrained(tmp_path / "new")
    old = {k.replace("Norm.weight", "Norm.gamma"): v for k, v in fresh("new").state_dict().items()}
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_bytes((tmp_path / "new" / "config.json").read_bytes())
    torch.save(old, tmp_path / "old" / "pytorch_model.bin")
    for name, model in {
        "as_it_is": fresh("new"),
        "of_long_ago": fresh("old"),
        "mapped": fresh("new", key_mapping={"^bert.encoder": "bert.encoder"}),
    }.items():
        exported(tmp_path / name, Module(model))
        model.save_pretrained(tmp_path / name / "expected")
        assert_same_files(tmp_path / name / "out", tmp_path / name / "expected")


def test_ties_are_those_of_the_model_and_not_of_its_configuration(tmp_path: Path) -> None:
    model = llama()
    model.config.tie_word_embeddings = True  # but they are two
    exported(tmp_path, Module(model))
    model.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_masters_are_exported_unless_a_dtype_is_given(tmp_path: Path) -> None:
    model = llama().bfloat16()
    checkpoint = saved(tmp_path / "checkpoint", Module(model), dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        out = tmp_path / str(dtype)
        export(CheckpointReader(checkpoint), out, dtype=None if dtype is torch.float32 else dtype)
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        assert_same_state(loaded, copy.deepcopy(model).to(dtype))
        model.to(dtype).save_pretrained(tmp_path / f"expected {dtype}")
        assert_same_files(out, tmp_path / f"expected {dtype}")


def test_weights_that_the_model_wants_in_fp32_stay_so(tmp_path: Path) -> None:
    settings = LLAMA | {
        "moe_intermediate_size": 16, "n_routed_experts": 4, "num_key_value_heads": 4, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "v_head_dim": 8,
        "qk_nope_head_dim": 8, "first_k_dense_replace": 1,
    }  # fmt: skip
    model = random_model("DeepseekV3ForCausalLM", "DeepseekV3Config", settings)
    exported(tmp_path, Module(model), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "fp32")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.float32 in {value.dtype for value in loaded.state_dict().values()}
    assert_equal(loaded, AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16))


def test_weights_that_were_added_are_written_too(tmp_path: Path) -> None:
    model = llama()
    model.value_head = nn.Linear(32, 1)
    exported(tmp_path, Module(model))
    model.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def test_weights_that_files_cannot_hold_are_refused(tmp_path: Path) -> None:
    model = llama()
    model.spectrum = nn.Parameter(torch.zeros(3, dtype=torch.complex128))
    with pytest.raises(IncompatibleCheckpointError, match=r"spectrum is torch.complex128, which safetensors"):
        exported(tmp_path, Module(model))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_several_models_have_folders_of_their_own(tmp_path: Path) -> None:
    student, teacher = llama(), opt()
    done = exported(tmp_path, Module(student, heads=nn.ModuleDict({"teacher": teacher}), scale=nn.Linear(2, 2)))
    assert [one.folder.name for one in done] == ["model", "heads.teacher"]
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "model"), student)
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "heads.teacher"), teacher)


# In a run


class Training(L.LightningModule):
    """Saves as a strategy does, in the end of a run and while the weights are in chunks."""

    def __init__(self, folder: Path, lora: bool) -> None:
        super().__init__()
        self.folder, self.lora, self.model = folder, lora, None

    def configure_model(self) -> None:
        if self.model is None:
            self.model = from_pretrained(AutoModelForCausalLM, self.folder / "base", dtype=torch.float32)
            if self.lora:
                self.model = peft.get_peft_model(self.model, peft.LoraConfig(target_modules=["q_proj"]))

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.arange(64).reshape(4, 16) % 96, batch_size=2)

    def on_train_end(self) -> None:
        about = {"huggingface": describe(self)}
        with self.trainer.strategy.summon_full_params():
            tensors = {f"state_dict.{name}": value.clone() for name, value in self.state_dict().items()}
        save(self.folder / "checkpoint", tensors, {}, about)


@pytest.mark.parametrize("lora", [False, True])
def test_a_model_that_was_streamed_trained_and_saved(lora: bool, tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "base")
    module = Training(tmp_path, lora)
    lightning_cases.trainer("gemini_host", default_root_dir=tmp_path, max_epochs=1).fit(module)
    export(CheckpointReader(tmp_path / "checkpoint"), tmp_path / "out")
    module.model.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "out", tmp_path / "expected", *(["README.md"] if lora else []))


# Adapters


def _adapted(base: Any) -> Any:
    return peft.get_peft_model(base, peft.LoraConfig(init_lora_weights=False, modules_to_save=["lm_head"]))


def _two(base: Any) -> Any:
    config = peft.LoraConfig(init_lora_weights=False, task_type="CAUSAL_LM", use_dora=True)
    model = peft.get_peft_model(base, config)
    model.add_adapter("other", peft.LoraConfig(init_lora_weights=False, target_modules=["o_proj", "embed_tokens"]))
    return model


def _ia3(base: Any) -> Any:
    return peft.get_peft_model(base, peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]))


@pytest.mark.parametrize("adapt", [_adapted, _two, _ia3])
def test_adapters_alone(adapt: Callable[[Any], Any], tmp_path: Path) -> None:
    base = llama()
    base.save_pretrained(tmp_path / "base")
    model = adapt(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    (done,) = exported(tmp_path, Module(model))
    assert (done.kind, done.adapters) == ("LlamaForCausalLM", True)
    model.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "out", tmp_path / "expected", "README.md")
    fresh = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "out").state_dict()
    adapters = {name: value for name, value in loaded.items() if ".default" in name}
    assert adapters
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in adapters.items())


def test_adapters_of_a_model_of_transformers(tmp_path: Path) -> None:
    model = llama()
    model.add_adapter(peft.LoraConfig(init_lora_weights=False))
    exported(tmp_path, Module(model), dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "expected")
    mine, theirs = (peft.utils.load_peft_weights(str(tmp_path / name)) for name in ("out", "expected"))
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(mine[name], theirs[name].bfloat16()) for name in theirs)


def test_adapters_without_their_frozen_base(tmp_path: Path) -> None:
    module = Module(_adapted(llama()))
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    tensors = {f"state_dict.{name}": value for name, value in module.state_dict().items() if name in trained}
    save(tmp_path / "checkpoint", tensors, {}, {"huggingface": describe(module)})
    export(CheckpointReader(tmp_path / "checkpoint"), tmp_path / "out")
    module.model.save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "out", tmp_path / "expected", "README.md")


# Tokenizers


@pytest.fixture
def texts(tmp_path: Path) -> TextData:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 200)
    data = TextData(path=str(tmp_path / "text.txt"), tokenizer="bpe", vocab_size=300, cache_dir=str(tmp_path / "cache"))
    data.prepare_data()
    return data


def test_the_tokenizer_of_the_data_goes_along(texts: TextData, tmp_path: Path) -> None:
    checkpoint = saved(tmp_path / "checkpoint", Module(llama()), texts)
    (done,) = export(CheckpointReader(checkpoint), tmp_path / "out")
    assert done.tokenizer == "the checkpoint"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "the lazy fox, naïve"
    assert tokenizer(text)["input_ids"] == texts.encode(text)
    assert tokenizer.eos_token == "<|endoftext|>"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_another_tokenizer_can_be_given(texts: TextData, tmp_path: Path) -> None:
    texts.tokenizer.save_pretrained(tmp_path / "mine")
    checkpoint = saved(tmp_path / "checkpoint", Module(llama()))
    (done,) = export(CheckpointReader(checkpoint), tmp_path / "out", tokenizer=str(tmp_path / "mine"))
    assert done.tokenizer == str(tmp_path / "mine")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("dog") == texts.tokenizer("dog")
    with pytest.raises(ConfigurationError, match="tokenizer 'nowhere/at-all' cannot be loaded"):
        export(CheckpointReader(checkpoint), tmp_path / "out2", tokenizer="nowhere/at-all")
    assert not (tmp_path / "out2").exists()


def test_a_tokenizer_is_described_again_when_it_has_changed(texts: TextData) -> None:
    tokenizer = copy.deepcopy(texts.tokenizer)
    module = Module(llama(), tokenizer=tokenizer)
    first, again = describe(module), describe(module)
    assert first["tokenizer"] is again["tokenizer"]
    tokenizer.add_tokens(["<new>"])
    assert describe(module)["tokenizer"]["files"] != first["tokenizer"]["files"]


def test_bytes_have_no_tokenizer_of_transformers(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("x" * 5000)
    data = TextData(path=str(tmp_path / "text.txt"), cache_dir=str(tmp_path / "cache"))
    assert describe(Module(llama()), data)["tokenizer"] is None


# What cannot be exported


def test_no_model_of_transformers(tmp_path: Path) -> None:
    assert describe(Module(nn.Linear(2, 2))) is None
    with pytest.raises(IncompatibleCheckpointError, match=r"no model of transformers in it.*consolidate"):
        exported(tmp_path, Module(nn.Linear(2, 2)))


class Own(transformers.LlamaForCausalLM):
    pass


def test_what_cannot_be_described_is_saved_and_named_later(tmp_path: Path) -> None:
    for number, model in enumerate((Own(transformers.LlamaConfig(**LLAMA)), _prompts())):
        with pytest.raises(
            IncompatibleCheckpointError, match=r"at model.\* cannot be exported; .* no (class|tensors) of"
        ):
            exported(tmp_path / str(number), Module(model))


def _prompts() -> Any:
    return peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def test_a_broken_tokenizer_does_not_keep_a_checkpoint_from_being_saved(texts: TextData, tmp_path: Path) -> None:
    tokenizer = copy.deepcopy(texts.tokenizer)
    tokenizer.save_pretrained = None
    assert "TypeError" in describe(Module(llama(), tokenizer=tokenizer))["tokenizer"]["problem"]
    (done,) = exported(tmp_path, Module(llama(), tokenizer=tokenizer))
    assert done.tokenizer is None


def test_weights_that_are_missing(tmp_path: Path) -> None:
    module = Module(llama())
    tensors = {f"state_dict.{name}": value for name, value in module.state_dict().items() if "embed" not in name}
    save(tmp_path / "checkpoint", tensors, {}, {"huggingface": describe(module)})
    with pytest.raises(IncompatibleCheckpointError, match=r"model.embed_tokens.weight missing.*save_frozen"):
        export(CheckpointReader(tmp_path / "checkpoint"), tmp_path / "out")


def test_another_transformers(tmp_path: Path) -> None:
    model = mixtral()
    model.save_pretrained(tmp_path / "base")
    module = Module(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    said = describe(module)
    unknown = copy.deepcopy(said)
    fused = [one for one in unknown["models"][0]["conversions"] if one["class"] == "WeightConverter"]
    fused[0]["from"] = ["nobody knows"]
    older = copy.deepcopy(said)
    older["models"][0]["class"] = "OldForCausalLM"
    tensors = {f"state_dict.{name}": value for name, value in module.state_dict().items()}
    for about, match in ((unknown, "has no conversion of weights from"), (older, "has no OldForCausalLM")):
        save(tmp_path / "checkpoint", tensors, {}, {"huggingface": about})
        with pytest.raises((ConfigurationError, IncompatibleCheckpointError), match=match):
            export(CheckpointReader(tmp_path / "checkpoint"), tmp_path / "out")


def test_a_folder_with_something_in_it_is_left_alone(tmp_path: Path) -> None:
    reader = CheckpointReader(saved(tmp_path / "checkpoint", Module(llama())))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(ConfigurationError, match=f"{name} exists and is no empty folder"):
            export(reader, tmp_path / name)
    (tmp_path / "empty").mkdir()
    export(reader, tmp_path / "empty")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "empty") is not None


def test_settings_that_cannot_work(tmp_path: Path) -> None:
    reader = CheckpointReader(saved(tmp_path / "checkpoint", Module(llama())))
    with pytest.raises(ConfigurationError, match="max_shard_size='a lot' is no size"):
        export(reader, tmp_path / "out", max_shard_size="a lot")
    with pytest.raises(ConfigurationError, match=r"floating-point numbers, got torch.int8"):
        export(reader, tmp_path / "out", dtype=torch.int8)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


# All or nothing


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_nothing(error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reader = CheckpointReader(saved(tmp_path / "checkpoint", Module(llama())))
    write, count = WeightFile.write, iter(range(100))

    def failing(self: WeightFile, name: str, tensor: Tensor) -> int:
        if next(count) == 7:
            raise error
        return write(self, name, tensor)

    monkeypatch.setattr(WeightFile, "write", failing)
    with pytest.raises(type(error)):
        export(reader, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_damaged_weight_is_named_and_nothing_left(tmp_path: Path) -> None:
    saved(tmp_path / "checkpoint", Module(llama()))
    (file,) = (tmp_path / "checkpoint").rglob("*.safetensors")
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptCheckpointError, match=r"state_dict.model"):
        export(CheckpointReader(tmp_path / "checkpoint"), tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("at", [0, 5, 20])
def test_a_kill_leaves_no_folder_that_looks_whole(at: int, tmp_path: Path) -> None:
    reader = CheckpointReader(saved(tmp_path / "checkpoint", Module(llama())))
    count = iter(range(100))

    def killing(done: int, total: int) -> None:
        if next(count) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            export(reader, tmp_path / "out", progress=killing)
        finally:
            os._exit(1)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert not (tmp_path / "out").exists()
    export(CheckpointReader(tmp_path / "checkpoint"), tmp_path / "out")
    assert_equal(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), llama())


# The command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved(tmp_path / "checkpoint", Module(llama()))
    paths = [str(tmp_path / "checkpoint"), str(tmp_path / "out")]
    main(["export", *paths, "--format", "huggingface", "--dtype", "bf16", "--max-shard-size", "20KB"])
    said = capsys.readouterr().out
    assert f"{paths[1]}: LlamaForCausalLM, 0.1 MiB in " in said
    assert "no tokenizer (--tokenizer" in said
    assert_same_state(AutoModelForCausalLM.from_pretrained(paths[1], dtype="auto"), llama().bfloat16())
    with pytest.raises(SystemExit, match=r"lightning-gemini export: .*out exists and is no empty folder"):
        main(["export", *paths])
    with pytest.raises(SystemExit, match=r"lightning-gemini export: .*nothing"):
        main(["export", str(tmp_path / "nothing"), paths[1]])


def test_progress_adds_up(tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    (done,) = exported(tmp_path, Module(mixtral()), progress=lambda *numbers: told.append(numbers))
    assert told[0] == (0, done.nbytes)
    assert told[-1] == (done.nbytes, done.nbytes)
    assert [numbers[0] for numbers in told] == sorted({numbers[0] for numbers in told})


# Several ranks, and memory


def _save(folder: str) -> None:
    module = Module(mixtral())
    names = sorted(module.state_dict())
    mine = [name for number, name in enumerate(names) if number % 2 == dist.get_rank()]
    tensors = {f"state_dict.{name}": module.state_dict()[name] for name in mine}
    save(folder, tensors, {}, {"huggingface": describe(module)} if dist.get_rank() == 0 else {}, dist.group.WORLD)


def test_saved_by_two_ranks(tmp_path: Path) -> None:
    run_ranks(_save, 2, str(tmp_path / "checkpoint"))
    export(CheckpointReader(tmp_path / "checkpoint"), tmp_path / "out")
    mixtral().save_pretrained(tmp_path / "expected")
    assert_same_files(tmp_path / "out", tmp_path / "expected")


def _measure(folder: str) -> tuple[int, int]:
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    sizes = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 4, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 4, "num_local_experts": 2, "vocab_size": 96}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts))
    module = Module(model.to_empty(device="cpu"))
    for tensor in module.state_dict().values():
        tensor.fill_(0.5)
    saved(Path(folder, "checkpoint"), module)
    largest = max(p.nbytes for p in module.parameters())
    whole = sum(p.nbytes for p in module.parameters())
    del module, model, tensor
    export(CheckpointReader(saved(Path(folder, "tiny"), Module(mixtral()))), Path(folder, "warm"))
    reader = CheckpointReader(Path(folder, "checkpoint"))
    before = peak = _anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    export(reader, Path(folder, "out"), dtype=torch.bfloat16)
    done.set()
    watcher.join()
    assert whole > 7 * largest
    return peak - before, largest


def test_memory_is_that_of_the_largest_tensor(tmp_path: Path) -> None:
    ((peak, largest),) = run_ranks(_measure, 1, str(tmp_path))
    # as it is stored, in half the precision, and split up
    assert peak < 2.2 * largest + 8 * 2**20, (peak, largest)
