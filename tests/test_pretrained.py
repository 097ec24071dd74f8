"""Pretrained models go from their files into the chunks: bit for bit, and no rank ever holds the model."""

from __future__ import annotations

import contextlib
import copy
import ctypes
import json
import pickle
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from lightning_gemini import GeminiStrategy, from_pretrained, transformers_private
from lightning_gemini.causal_lm import CausalLM
from lightning_gemini.core import ConfigurationError, DisagreementError, DtypePolicy, Home, shard
from tests import lightning_cases
from tests.ranks import RankError, run_ranks

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
OPT = TINY | {"ffn_dim": 64, "max_position_embeddings": 32, "word_embed_proj_dim": 32}
LLAMA = TINY | {"intermediate_size": 64, "max_position_embeddings": 32}
MIXTRAL = LLAMA | {"num_key_value_heads": 2, "num_local_experts": 4}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}


def random_model(name: str, config: str, settings: dict[str, Any]) -> transformers.PreTrainedModel:
    """A model whose every tensor says where it belongs, buffers included."""
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**settings))
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.randn(tensor.shape))
    return model


def opt() -> transformers.PreTrainedModel:
    return random_model("OPTForCausalLM", "OPTConfig", OPT)


def llama(**settings: Any) -> transformers.PreTrainedModel:
    return random_model("LlamaForCausalLM", "LlamaConfig", LLAMA | settings)


def mixtral() -> transformers.PreTrainedModel:
    return random_model("MixtralForCausalLM", "MixtralConfig", MIXTRAL)


def as_bin(folder: Path, shards: int) -> None:
    """Makes a checkpoint as transformers wrote it before safetensors, tied weights twice."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    state = list(model.state_dict().items())
    (folder / "model.safetensors").unlink()
    if shards == 1:
        torch.save(dict(state), folder / "pytorch_model.bin")
        return
    names = {key: f"pytorch_model-{i % shards + 1:05}-of-{shards:05}.bin" for i, (key, _) in enumerate(state)}
    for file in set(names.values()):
        torch.save({key: value for key, value in state if names[key] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": names}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def streamed(folder: Path | str, model_class: Any = AutoModelForCausalLM, **settings: Any) -> Any:
    model = from_pretrained(model_class, folder, stream=True, **settings)
    assert all(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))
    return model


def into_chunks(model: nn.Module, **settings: Any) -> None:
    """Through chunks and back."""
    shard(model, **{"home": Home.DEVICE, "chunk_size": 4096} | settings).release()


def assert_equal(model: nn.Module, expected: nn.Module) -> None:
    for method in ("named_parameters", "named_buffers"):
        mine, theirs = (dict(getattr(m, method)(remove_duplicate=False)) for m in (model, expected))
        assert list(mine) == list(theirs)
        for name, value in theirs.items():
            assert mine[name].dtype == value.dtype, name
            assert mine[name].requires_grad == value.requires_grad, name
            assert torch.equal(mine[name], value), name
    assert len(list(model.parameters())) == len(list(expected.parameters())), "tied weights differ"


# The same bits as transformers

CHECKPOINTS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], Any, dict[str, Any]]] = {
    "opt": (opt, AutoModelForCausalLM, {}),
    "llama": (llama, AutoModelForCausalLM, {}),
    "llama_tied": (lambda: llama(tie_word_embeddings=True), AutoModelForCausalLM, {}),
    "mixtral": (mixtral, AutoModelForCausalLM, {}),
    "headless": (llama, AutoModel, {}),
    "resnet": (
        lambda: random_model("ResNetForImageClassification", "ResNetConfig", RESNET),
        transformers.AutoModelForImageClassification,
        {},
    ),
    "t5": (
        lambda: random_model(
            "T5ForConditionalGeneration",
            "T5Config",
            {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4, "vocab_size": 96},
        ),
        transformers.AutoModelForSeq2SeqLM,
        {},
    ),
}


@pytest.mark.parametrize("dtype", ["auto", torch.float32, torch.float16])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_same_as_transformers(name: str, dtype: Any, tmp_path: Path) -> None:
    make, model_class, settings = CHECKPOINTS[name]
    saved = make().bfloat16()
    saved.config.pad_token_id = 7
    saved.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1 or name == "resnet"
    model = streamed(tmp_path, model_class, dtype=dtype, **settings)
    expected = model_class.from_pretrained(tmp_path, dtype=dtype, **settings)
    into_chunks(model)
    assert_equal(model, expected)
    assert model.config.to_dict() == expected.config.to_dict()
    assert model.training == expected.training
    if expected.can_generate():
        assert model.generation_config.to_dict() == expected.generation_config.to_dict()
    model.save_pretrained(tmp_path / "again")  # with the mapping that it was loaded by
    expected.save_pretrained(tmp_path / "expected")
    names = [file.name for file in (tmp_path / "expected").iterdir()]
    assert all((tmp_path / "again" / n).read_bytes() == (tmp_path / "expected" / n).read_bytes() for n in names)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("make", [opt, llama])
def test_bin_files(make: Callable[[], Any], shards: int, tmp_path: Path) -> None:
    make().save_pretrained(tmp_path)
    as_bin(tmp_path, shards)
    model = streamed(tmp_path)
    into_chunks(model)
    assert_equal(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_names_of_long_ago(tmp_path: Path) -> None:
    settings = TINY | {"intermediate_size": 64, "max_position_embeddings": 32}
    random_model("BertForMaskedLM", "BertConfig", settings).save_pretrained(tmp_path)
    model = transformers.AutoModelForMaskedLM.from_pretrained(tmp_path)
    old = {"Norm.weight": "Norm.gamma", "Norm.bias": "Norm.beta"}
    state = {re.sub("Norm.(weight|bias)", lambda m: old[m[0]], key): value for key, value in model.state_dict().items()}
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    streaming = streamed(tmp_path, transformers.AutoModelForMaskedLM)
    into_chunks(streaming)
    assert_equal(streaming, model)


class _Evil:
    def __reduce__(self) -> Any:
        return exec, ("raise SystemExit('a pickle was run')",)


def test_pickles_are_not_run(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save({"model.norm.weight": _Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match=r"weights_only|Weights only"):
        streamed(tmp_path)


def test_tied_weights_that_differ_in_the_files_are_not_tied(tmp_path: Path) -> None:
    saved = llama()
    saved.config.tie_word_embeddings = True  # but they are two
    saved.save_pretrained(tmp_path)
    model = streamed(tmp_path)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert expected.lm_head.weight is not expected.model.embed_tokens.weight
    into_chunks(model)
    assert_equal(model, expected)


def test_a_name_on_the_hub_is_looked_up_in_its_cache(tmp_path: Path) -> None:
    folder = tmp_path / "models--someone--tiny"
    llama().save_pretrained(folder / "snapshots" / "0123abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0123abc")
    model = streamed("someone/tiny", cache_dir=tmp_path)
    into_chunks(model)
    assert_equal(model, AutoModelForCausalLM.from_pretrained("someone/tiny", cache_dir=tmp_path))


def test_masters_are_the_values_in_the_files(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = streamed(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    engine = shard(model, [optimizer], policy=DtypePolicy(torch.bfloat16, master="split", reduce=torch.float32))
    with engine.summon(exact=True):
        assert_equal(model, AutoModelForCausalLM.from_pretrained(tmp_path))
    engine.release()


# What the files do not have, or have in vain


@contextlib.contextmanager
def report() -> Iterator[list[str]]:
    """What transformers says meanwhile."""
    said: list[str] = []

    class Handler(logging.logging.Handler):
        def emit(self, record: Any) -> None:
            said.append(record.getMessage())

    handler = Handler()
    logger = logging.get_logger("transformers")
    logger.addHandler(handler)
    try:
        yield said
    finally:
        logger.removeHandler(handler)


def test_a_new_head_is_initialised_and_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with report() as said:
        model = streamed(tmp_path, AutoModelForSequenceClassification, num_labels=40)
    text = "\n".join(said)
    assert "score.weight" in text
    assert "MISSING" in text
    assert "lm_head.weight" in text
    assert "UNEXPECTED" in text
    torch.manual_seed(1)
    into_chunks(model)
    body = AutoModel.from_pretrained(tmp_path)
    assert_equal(model.model, body)
    assert model.score.weight.std().item() == pytest.approx(0.02, rel=0.15)


def test_other_shapes_are_refused_or_initialised(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        streamed(tmp_path, vocab_size=50)
    model = streamed(tmp_path, vocab_size=50, ignore_mismatched_sizes=True)
    into_chunks(model)
    assert model.lm_head.weight.shape == (50, 32)
    assert model.lm_head.weight.std().item() == pytest.approx(0.02, rel=0.15)
    assert torch.equal(model.model.norm.weight, llama().model.norm.weight)


def test_models_that_changed_while_they_waited(tmp_path: Path) -> None:
    for tied, said in (
        (False, "lm_head.weight .* was replaced on the meta"),
        (True, r"is \(100, 32\).*and \(96, 32\)"),
    ):
        llama(tie_word_embeddings=tied).save_pretrained(tmp_path / str(tied))
        model = streamed(tmp_path / str(tied))
        model.resize_token_embeddings(100, mean_resizing=False)
        with pytest.raises(ConfigurationError, match=f"{said}.*resize"):
            into_chunks(model)
    llama().save_pretrained(tmp_path)
    model = streamed(tmp_path)
    model.lm_head = nn.Linear(32, 96, bias=False, device="meta")
    with pytest.raises(ConfigurationError, match=r"lm_head.weight of LlamaForCausalLM was replaced on the meta device"):
        into_chunks(model)
    model = streamed(tmp_path)
    model.lm_head = head = nn.Linear(32, 7, bias=False)
    before = head.weight.detach().clone()
    into_chunks(model)
    assert torch.equal(model.lm_head.weight, before)
    assert torch.equal(model.model.norm.weight, llama().model.norm.weight)


def test_copies_are_loaded_too(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path)
    student = streamed(tmp_path)
    sent = pickle.loads(pickle.dumps(student))  # as to a process that is spawned
    models = nn.ModuleDict({"student": student, "teacher": copy.deepcopy(student), "sent": sent})
    into_chunks(models)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path)
    for model in models.values():
        assert_equal(model, expected)


def test_a_state_dict_that_is_loaded_while_it_waits_counts(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = streamed(tmp_path)
    norm = torch.randn(32)
    model.load_state_dict({"model.norm.weight": norm}, strict=False)
    into_chunks(model)
    assert torch.equal(model.model.norm.weight, norm)
    assert torch.equal(model.lm_head.weight, llama().lm_head.weight)


# peft

LORA = {"r": 4, "target_modules": ["q_proj", "embed_tokens"], "modules_to_save": ["lm_head"]}


@pytest.mark.parametrize("how", [True, False, "gaussian"])
def test_lora_on_a_base_that_waits(how: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    config = peft.LoraConfig(**LORA, init_lora_weights=how)
    model = peft.get_peft_model(streamed(tmp_path), config)
    expected = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tmp_path), config)
    into_chunks(model)
    for (name, mine), (other, value) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert name == other
        assert mine.requires_grad == value.requires_grad
        if "lora" in name and value.any():
            assert mine.std().item() == pytest.approx(value.std().item(), rel=0.4), name
        else:
            assert torch.equal(mine, value), name


def test_lora_on_a_base_without_files(tmp_path: Path) -> None:
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))
    model = peft.get_peft_model(model, peft.LoraConfig())
    into_chunks(model)
    adapters = {name: value for name, value in model.named_parameters() if "lora" in name}
    assert len(adapters) == 8
    assert all(bool(value.any()) == ("lora_A" in name) for name, value in adapters.items())


def test_saved_adapters_are_kept(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    saved = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tmp_path), peft.LoraConfig(init_lora_weights=False)
    )
    saved.save_pretrained(tmp_path / "adapter")
    model = peft.PeftModel.from_pretrained(streamed(tmp_path), tmp_path / "adapter", is_trainable=True)
    into_chunks(model)
    assert_equal(model, saved)
    with pytest.raises(RuntimeError, match="low_cpu_mem_usage"):
        peft.PeftModel.from_pretrained(streamed(tmp_path), tmp_path / "adapter", low_cpu_mem_usage=True)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(use_dora=True),
        peft.LoraConfig(init_lora_weights="eva"),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    ],
    ids=["dora", "eva", "ia3"],
)
def test_adapters_that_need_the_weights_are_refused_by_name(config: Any, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = peft.get_peft_model(streamed(tmp_path), config)
    with pytest.raises(ConfigurationError, match=r"q_proj.*default: an adapter on the meta device can be initialised"):
        into_chunks(model)


# What cannot be loaded into chunks


@pytest.mark.parametrize("setting", ["device_map", "quantization_config", "gguf_file", "output_loading_info"])
def test_settings_of_whole_models_are_refused(setting: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=rf"from_pretrained\({setting}=...\).*stream=False"):
        from_pretrained(AutoModelForCausalLM, tmp_path, stream=True, **{setting: "auto"})


def test_a_folder_of_adapters_is_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    peft.get_peft_model(base, peft.LoraConfig()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigurationError, match="not adapters"):
        streamed(tmp_path / "adapter")


def test_another_transformers_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    llama().save_pretrained(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(transformers.core_model_loading, "is_env_variable_true", lambda name: False)
        with pytest.raises(ConfigurationError, match=r"has no loading in one thread"):
            streamed(tmp_path)
    monkeypatch.delattr(transformers.core_model_loading, "set_param_for_module")
    with pytest.raises(ConfigurationError, match=r"has no transformers.core_model_loading.set_param_.*5.17 to 5.23"):
        streamed(tmp_path)
    monkeypatch.setattr(transformers.PreTrainedModel, "_load_pretrained_model", staticmethod(lambda model: None))
    transformers_private._loader.cache_clear()
    with pytest.raises(ConfigurationError, match=r"has no PreTrainedModel._load_pretrained_model\(model, state_dict"):
        streamed(tmp_path)
    transformers_private._loader.cache_clear()


def test_nothing_of_transformers_stays_exchanged(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    before = (
        vars(transformers.PreTrainedModel)["_load_pretrained_model"],
        transformers.core_model_loading.set_param_for_module,
        logging.is_progress_bar_enabled(),
    )
    into_chunks(streamed(tmp_path))
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        streamed(tmp_path, vocab_size=50)
    assert before == (
        vars(transformers.PreTrainedModel)["_load_pretrained_model"],
        transformers.core_model_loading.set_param_for_module,
        logging.is_progress_bar_enabled(),
    )
    assert not next(from_pretrained(AutoModelForCausalLM, tmp_path).parameters()).is_meta


# Under Lightning


class Finetuned(L.LightningModule):
    def __init__(self, folder: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.built_on_meta: bool | None = None

    def configure_model(self) -> None:
        if self.built_on_meta is None:
            self.model = from_pretrained(AutoModelForCausalLM, self.hparams["folder"], dtype=torch.float32)
            self.built_on_meta = all(p.is_meta for p in self.parameters())

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        return self.model(input_ids=batch, labels=batch).loss

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3, foreach=False)

    def on_train_end(self) -> None:
        self.trainer.save_checkpoint(Path(self.trainer.default_root_dir) / "end.ckpt")

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader(torch.arange(64).reshape(4, 16) % 96, batch_size=2)


def fitted(folder: Path, strategy: Any, **settings: Any) -> tuple[Finetuned, L.Trainer]:
    model = Finetuned(str(folder))
    trainer = lightning_cases.trainer(strategy, default_root_dir=folder, max_epochs=1, **settings)
    trainer.fit(model)
    return model, trainer


def test_under_lightning_it_is_the_same_run_as_a_plain_one(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    plain, _ = fitted(tmp_path, "auto")
    model, trainer = fitted(tmp_path, GeminiStrategy(state_dict_type="full"))
    assert (plain.built_on_meta, model.built_on_meta) == (False, True)
    assert_equal(model.model, plain.model)
    loaded = Finetuned.load_from_checkpoint(tmp_path / "end.ckpt")
    assert loaded.built_on_meta is False
    assert_equal(loaded.model, model.model)
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(model)  # from the weights that it has now
    trainer = lightning_cases.trainer("auto", default_root_dir=tmp_path, max_epochs=1)
    trainer.fit(plain)
    assert_equal(model.model, plain.model)


def test_a_checkpoint_wins_over_the_files(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    first, _ = fitted(tmp_path, "gemini")
    model = Finetuned(str(tmp_path))
    trainer = lightning_cases.trainer("gemini", default_root_dir=tmp_path, max_epochs=1)
    trainer.fit(model, ckpt_path=tmp_path / "end.ckpt")  # which is at the end of it
    assert_equal(model.model, first.model)


class FailsOnce(Finetuned):
    failed = False

    def configure_optimizers(self) -> Any:
        if not self.failed:
            self.failed = True
            raise ValueError("not yet")
        return super().configure_optimizers()


def test_a_model_that_could_not_be_laid_out_waits_on(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    model = FailsOnce(str(tmp_path))
    trainer = lightning_cases.trainer("gemini", default_root_dir=tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="not yet"):
        trainer.fit(model)
    assert all(p.is_meta for p in model.parameters())
    trainer.fit(model)
    assert_equal(model.model, fitted(tmp_path, "auto")[0].model)


def test_the_language_model_of_this_package(tmp_path: Path) -> None:
    saved = opt()
    saved.save_pretrained(tmp_path)
    model = CausalLM(pretrained=str(tmp_path), warmup_steps=0)
    trainer = lightning_cases.trainer("gemini", default_root_dir=tmp_path)
    with trainer.init_module(empty_init=True):
        model.configure_model()
    assert all(p.is_meta for p in model.parameters())
    assert model.model.training
    into_chunks(model)
    assert_equal(model.model, saved)


# On several ranks


def _load(folder: str, dtype: Any, fails: int | None = None) -> dict[str, Tensor]:
    model = streamed(folder, dtype=dtype)
    if dist.get_rank() == fails:
        transformers_private._open = _broken
    into_chunks(model, group=dist.group.WORLD)
    assert_equal(model, AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
    return {name: value.clone() for name, value in model.state_dict().items()}


def _broken(*args: Any) -> Any:
    raise OSError("the disk is gone")


@pytest.mark.parametrize("make", [opt, mixtral])
def test_two_ranks(make: Callable[[], Any], tmp_path: Path) -> None:
    make().save_pretrained(tmp_path, max_shard_size="20KB")
    first, second = run_ranks(_load, 2, str(tmp_path), torch.bfloat16)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_rank_that_cannot_read_ends_all(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(RankError) as failed:
        run_ranks(_load, 2, str(tmp_path), torch.float32, 1)
    text = str(failed.value)
    assert "\nOSError: the disk is gone" in text
    assert "PeerError: rank 1 could not load the values of the model: OSError: the disk is gone" in text


def _load_own(folders: list[str]) -> None:
    model = streamed(folders[dist.get_rank()])
    with pytest.raises(
        DisagreementError, match=r"different values. Rank 0 reads .*first: 1 file.*rank 1 reads .*second"
    ):
        into_chunks(model, group=dist.group.WORLD)


def test_ranks_with_other_files_are_refused(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "first")
    llama().save_pretrained(tmp_path / "second", max_shard_size="20KB")
    run_ranks(_load_own, 2, [str(tmp_path / "first"), str(tmp_path / "second")])


# Memory


def _anonymous() -> int:
    """Bytes of this process that are no mapped file."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) * 1024


def _measure(folder: str) -> tuple[int, int]:
    ctypes.CDLL(None).mallopt(-3, 2**20)  # M_MMAP_THRESHOLD: what is freed goes back to the system
    streamed(folder)  # what is imported and made once
    before = peak = _anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = streamed(folder, dtype=torch.float32)
    engine = shard(model, group=dist.group.WORLD, home=Home.DEVICE)
    done.set()
    watcher.join()
    return peak - before, sum(chunk.own.nbytes for chunk in engine.store.chunks)


def test_no_rank_holds_the_model(tmp_path: Path) -> None:
    sizes = {"hidden_size": 768, "intermediate_size": 2304, "num_hidden_layers": 6, "num_attention_heads": 4}
    experts = {"num_key_value_heads": 4, "num_local_experts": 2, "vocab_size": 96}
    with torch.device("meta"):
        model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, **experts))
    model = model.bfloat16().to_empty(device="cpu")
    for tensor in model.state_dict().values():
        tensor.fill_(0.5)
    model.save_pretrained(tmp_path, max_shard_size="50MB")
    whole = 4 * sum(p.numel() for p in model.parameters())
    largest = 4 * max(p.numel() for p in model.parameters())
    assert whole > 250 * 2**20
    del model
    for peak, own in run_ranks(_measure, 2, str(tmp_path)):
        assert own < whole * 0.51
        # one tensor that is fused, and its parts, which are joined in two steps
        assert peak < own + 2.5 * largest + 8 * 2**20, (peak, own, largest, whole)
