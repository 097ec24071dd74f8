"""Hugging Face models, and adapters on them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lightning_gemini.core import Home
from tests.cases.base import CASES, VOCAB, WIDTH, case, tokens


def _lm_loss(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch, use_cache=False).loss


@case(tokens, _lm_loss)
def opt() -> nn.Module:
    from transformers import OPTConfig, OPTForCausalLM

    return OPTForCausalLM(
        OPTConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            ffn_dim=64,
            num_attention_heads=4,
            word_embed_proj_dim=WIDTH,
            max_position_embeddings=32,
            dropout=0.0,
            attention_dropout=0.0,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
            pad_token_id=1,
            bos_token_id=2,
            eos_token_id=2,
        )
    )


@case(tokens, _lm_loss)
def llama() -> nn.Module:
    return _llama()


@case(tokens, _lm_loss)
def llama_checkpoint() -> nn.Module:
    model = _llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


@case(tokens, _lm_loss)
def llama_checkpoint_reentrant() -> nn.Module:
    model = _llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return model.train()


@case(tokens, _lm_loss)
def opt_cached() -> nn.Module:
    """Keeps the key-value cache: an output that is neither a tensor nor a container."""
    model = CASES["opt"].build()
    model.config.use_cache = True
    return model


@case(tokens, lambda model, batch: model(input_ids=batch, labels=batch).loss)
def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=VOCAB,
            hidden_size=WIDTH,
            num_hidden_layers=2,
            intermediate_size=64,
            num_attention_heads=4,
            max_position_embeddings=32,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


@case(tokens, lambda model, batch: model(input_ids=batch, labels=batch).loss)
def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=VOCAB,
            d_model=WIDTH,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_decoder_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
            pad_token_id=0,
        )
    )


@case(tokens, _lm_loss, options={"unit_modules": ["OPTDecoderLayer"]})
def opt_by_layer() -> nn.Module:
    return CASES["opt"].build()


def _in_two_calls(model: nn.Module, batch: Tensor) -> Tensor:
    first = model(input_ids=batch[:, :6], labels=batch[:, :6], use_cache=True)
    second = model(input_ids=batch[:, 6:], labels=batch[:, 6:], past_key_values=first.past_key_values)
    return first.loss + second.loss


@case(tokens, _in_two_calls)
def llama_cache_between_calls() -> nn.Module:
    return _llama()


def _mixtral(experts: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=32,
        output_router_logits=True,
        pad_token_id=1,
        bos_token_id=2,
        eos_token_id=2,
    )
    return MixtralForCausalLM._from_config(config, experts_implementation=experts)


@case(tokens, _lm_loss)
def mixtral() -> nn.Module:
    """All experts of a layer are one parameter."""
    return _mixtral("grouped_mm")


@case(tokens, _lm_loss)
def mixtral_eager() -> nn.Module:
    return _mixtral("eager")


@case(tokens, _lm_loss)
def mixtral_checkpoint() -> nn.Module:
    model = _mixtral("eager")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def _with_lora(model: nn.Module, **settings: Any) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **settings)
    model = get_peft_model(model, config)
    for name, param in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(param, std=0.1)
    return model


@case(tokens, _lm_loss)
def lora_opt() -> nn.Module:
    """The optimizer is given the frozen parameters too."""
    return _with_lora(CASES["opt"].build())


@case(tokens, _lm_loss, groups=lambda model: [p for p in model.parameters() if p.requires_grad])
def lora_llama() -> nn.Module:
    return _with_lora(_llama(), modules_to_save=["lm_head"])


@case(tokens, _lm_loss, groups=lambda model: [p for p in model.parameters() if p.requires_grad])
def lora_llama_checkpoint() -> nn.Module:
    model = _llama()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    return _with_lora(model).train()


@case(tokens, _lm_loss)
def dora_llama() -> nn.Module:
    """Reads the weight of the layer it adapts."""
    return _with_lora(_llama(), use_dora=True)


def _seeded_lm(model: nn.Module, batch: Tensor) -> Tensor:
    torch.manual_seed(int(batch.sum()))
    return _lm_loss(model, batch)


@case(tokens, _seeded_lm)
def lora_dropout() -> nn.Module:
    return _with_lora(_llama(), lora_dropout=0.2)


@case(tokens, _seeded_lm)
def opt_dropout() -> nn.Module:
    model = CASES["opt"].build()
    for module in model.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.2
    return model


@case(tokens, _seeded_lm, several=(Home.FULL,))
def opt_layerdrop() -> nn.Module:
    """Skips layers by chance, on each rank others."""
    model = CASES["opt"].build()
    model.config.layerdrop = model.model.decoder.layerdrop = 0.5
    return model
