"""CausalLM and TokensPerSecond: models, loss, schedule, generation, and what they refuse."""

import math

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_gemini.callbacks import TokensPerSecond
from lightning_gemini.causal_lm import CausalLM
from lightning_gemini.data import ByteTokenizer
from tests.lightning_cases import as_file

TINY = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
TINY_OPT = TINY | {"ffn_dim": 32, "max_position_embeddings": 32, "dropout": 0.0}


class Letters(L.LightningDataModule):
    """Eight windows of sixteen bytes, always "abcabc..."."""

    vocab_size = 256
    sequence_length = 16
    bytes_per_token = 2.0

    def _loader(self):
        row = torch.tensor(list(b"abcabcabcabcabca"))
        return DataLoader([{"input_ids": row, "labels": row}] * 8, batch_size=2)

    train_dataloader = val_dataloader = test_dataloader = predict_dataloader = _loader


def tiny(**arguments):
    return CausalLM(**{"config": TINY_OPT, "warmup_steps": 2, "learning_rate": 1e-2} | arguments)


def trainer(tmp_path, **arguments):
    quiet = {
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator="cpu", devices=1, default_root_dir=tmp_path, **quiet | arguments)


def built(**arguments):
    torch.manual_seed(0)
    model = tiny(**{"vocab_size": 256} | arguments)
    model.configure_model()
    return model


def weights(model):
    return {name: weight.clone() for name, weight in model.state_dict().items()}


# The model


def test_opt_for_bytes_takes_no_byte_for_padding():
    model = built()
    config = model.model.config
    assert (config.vocab_size, config.word_embed_proj_dim) == (256, 16)
    assert config.pad_token_id is config.bos_token_id is config.eos_token_id is None
    assert model.model.lm_head.weight is model.model.model.decoder.embed_tokens.weight
    assert model.model.training


def test_configure_model_keeps_the_model_it_made():
    model = built()
    first = model.model
    model.configure_model()
    assert model.model is first


def test_follows_the_context_of_the_strategy():
    model = tiny(vocab_size=256)
    with torch.device("meta"):
        model.configure_model()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    model, default = tiny(vocab_size=256), torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        model.configure_model()
    finally:
        torch.set_default_dtype(default)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_other_architectures(model_type):
    model = built(model_type=model_type, config=TINY)
    ids = torch.arange(12).reshape(2, 6)
    assert model(ids).logits.shape == (2, 6, 256)


def test_pretrained_weights_are_kept_whatever_the_context(tmp_path):
    saved = built()
    saved.model.half().save_pretrained(tmp_path)
    model = tiny(config=None, pretrained=str(tmp_path))
    with torch.device("meta"):
        model.configure_model()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.model.training
    for name, weight in saved.state_dict().items():
        assert torch.equal(weight.float(), model.state_dict()[name])


def test_gradient_checkpointing_gives_the_same_gradients():
    ids = torch.arange(16).reshape(2, 8)
    gradients = []
    for checkpointing in (False, True):
        model, calls = built(gradient_checkpointing=checkpointing), []
        model.model.model.decoder.layers[0].fc1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model(ids, labels=ids).loss.backward()
        assert len(calls) == 1 + checkpointing
        gradients.append([parameter.grad for parameter in model.parameters()])
    torch.testing.assert_close(*gradients)


# Training


def test_fit_learns_and_logs(tmp_path):
    torch.manual_seed(0)
    model, run = tiny(), trainer(tmp_path, max_epochs=15)
    run.fit(model, datamodule=Letters())
    assert model.vocab_size == 256
    metrics = run.callback_metrics
    assert {"train_loss", "val_loss", "val_nats_per_byte"} <= metrics.keys()
    assert metrics["val_loss"] < 1  # it began at log(256)
    assert metrics["val_nats_per_byte"] == pytest.approx(metrics["val_loss"].item() / 2)


def test_evaluation_and_prediction_agree(tmp_path):
    model, run = built(), trainer(tmp_path)
    (metrics,) = run.test(model, datamodule=Letters(), verbose=False)
    nats = torch.cat(run.predict(model, datamodule=Letters()))
    assert nats.shape == (8,)
    assert nats.mean().item() == pytest.approx(metrics["test_loss"], rel=1e-5)


def test_nats_per_byte_needs_the_bytes_of_a_token(tmp_path):
    class Plain(Letters):
        bytes_per_token = None

    for model, expected in ((built(), None), (built(bytes_per_token=4.0), 4.0)):
        (metrics,) = trainer(tmp_path).validate(model, datamodule=Plain(), verbose=False)
        assert metrics.get("val_nats_per_byte") == (pytest.approx(metrics["val_loss"] / expected) if expected else None)


def test_optimizer_decays_matrices_only(tmp_path):
    model = tiny(weight_decay=0.3, betas=(0.8, 0.9))
    trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(model, datamodule=Letters())
    decayed, others = model.optimizers().optimizer.param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    assert decayed["betas"] == (0.8, 0.9)
    assert all(parameter.ndim == 2 for parameter in decayed["params"])
    assert all(parameter.ndim == 1 for parameter in others["params"])
    assert len(decayed["params"]) + len(others["params"]) == len(list(model.parameters()))


def test_learning_rate_rises_and_falls():
    factor = built(warmup_steps=4, final_learning_rate=0.1)._learning_rate_factor(20)
    factors = [factor(step) for step in range(25)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[4:21] == sorted(factors[4:21], reverse=True)
    assert factors[12] == pytest.approx(0.55)
    assert factors[20:] == pytest.approx([0.1] * 5)
    assert built(warmup_steps=4)._learning_rate_factor(math.inf)(1000) == 1.0


def test_learning_rate_moves_every_step(tmp_path):
    model = tiny(warmup_steps=3)
    trainer(tmp_path, max_steps=2, limit_val_batches=0).fit(model, datamodule=Letters())
    assert model.lr_schedulers().get_last_lr() == pytest.approx([1e-2 * 3 / 4] * 2)


def test_checkpoint_loads_without_the_data(tmp_path):
    model = tiny()
    run = trainer(tmp_path, max_steps=1, enable_checkpointing=True, callbacks=ModelCheckpoint(tmp_path, "saved"))
    run.fit(model, datamodule=Letters())
    loaded = CausalLM.load_from_checkpoint(as_file(tmp_path / "saved.ckpt"))
    assert loaded.vocab_size == 256
    torch.testing.assert_close(weights(loaded), weights(model))


# Generation


def generate(model, **arguments):
    tokenizer = ByteTokenizer()
    return model.generate_text(
        lambda text: tokenizer.encode(text).tolist(), tokenizer.decode, **{"prompt": "abc"} | arguments
    )


def test_generation_continues_what_was_learned(tmp_path):
    torch.manual_seed(0)
    model = tiny()
    trainer(tmp_path, max_epochs=15, limit_val_batches=0).fit(model, datamodule=Letters())
    assert generate(model, max_new_tokens=9, temperature=0) == "abcabcabc"


def test_generation_is_seeded_and_leaves_no_trace():
    model = built().train()
    state, before = torch.get_rng_state(), weights(model)
    text = generate(model, max_new_tokens=20, seed=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    torch.testing.assert_close(weights(model), before)
    torch.rand(3)
    assert generate(model, max_new_tokens=20, seed=1) == text
    assert generate(model, max_new_tokens=20, seed=2) != text


def test_generation_keeps_the_end_of_a_long_prompt():
    model = built()
    long, short = generate(model, prompt="x" * 50, max_new_tokens=20), "x" * 12
    assert long == generate(model, prompt=short, max_new_tokens=20)


def test_generation_refuses_what_cannot_work():
    with pytest.raises(ValueError, match="max_new_tokens=32 must be below the model's 32 positions"):
        generate(built(), max_new_tokens=32)
    with pytest.raises(ValueError, match="The prompt has no tokens"):
        generate(built(), prompt="", max_new_tokens=3)
    with pytest.raises(RuntimeError, match="There is no model yet"):
        generate(tiny())


# What it says when it cannot


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model_type": "llamma"}, "model_type='llamma' is no causal language model .* Did you mean llama"),
        ({"config": {"hiden_size": 3}}, "'hiden_size', which is no setting of OPTConfig. Did you mean hidden"),
        ({"vocab_size": None}, "vocab_size is unknown: give it"),
    ],
)
def test_unknown_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        built(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab_size": 100}, "The data has 256 token ids, the model only 100"),
        (
            {"config": TINY_OPT | {"max_position_embeddings": 15}},
            "sequence_length=16 is more than the model's max_position_embeddings=15",
        ),
    ],
)
def test_models_that_do_not_fit_the_data(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, fast_dev_run=True).fit(tiny(**arguments), datamodule=Letters())


# TokensPerSecond


def test_tokens_per_second_counts_after_the_warm_up(tmp_path, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr("lightning_gemini.callbacks.time.perf_counter", lambda: float(next(clock)))
    speed = TokensPerSecond(warmup_steps=2)
    assert speed.tokens_per_second is None
    run = trainer(tmp_path, max_epochs=1, callbacks=speed)
    run.fit(tiny(), datamodule=Letters())
    assert speed.tokens_per_second == 32.0  # 2 windows of 16 tokens a step, a second a step
    assert run.callback_metrics["tokens_per_s"] == 32.0


def test_tokens_per_second_leaves_validation_out(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("lightning_gemini.callbacks.time.perf_counter", lambda: now[0])

    class Slow(CausalLM):
        def training_step(self, batch, batch_idx):
            now[0] += 1
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            now[0] += 100
            return super().validation_step(batch, batch_idx)

    speed = TokensPerSecond(warmup_steps=1)
    run = trainer(tmp_path, max_epochs=2, val_check_interval=1, callbacks=speed)
    run.fit(Slow(config=TINY_OPT), datamodule=Letters())
    assert speed.tokens_per_second == 32.0


def test_tokens_per_second_names_the_missing_entry(tmp_path):
    class Tuples(Letters):
        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.zeros(4, 1)))

    class AnyBatch(CausalLM):
        def training_step(self, batch, batch_idx):
            return sum(parameter.sum() for parameter in self.parameters())

    def fit(data, **arguments):
        callbacks = TokensPerSecond(warmup_steps=0, **arguments)
        run = trainer(tmp_path, max_epochs=1, limit_val_batches=0, callbacks=callbacks)
        run.fit(AnyBatch(config=TINY_OPT), datamodule=data)
        return callbacks

    assert fit(Letters(), key="labels").tokens_per_second is not None
    with pytest.raises(ValueError, match=r"batch\['tokens'\], but the batch has the keys 'input_ids', 'labels'"):
        fit(Letters(), key="tokens")
    with pytest.raises(ValueError, match=r"batch\['input_ids'\], but the batch has list"):
        fit(Tuples())
