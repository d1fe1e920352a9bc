"""Heads of real transformers models, one of each way to change what a head is given or returns."""

# the imports below the skip need the package it looks for
# ruff: noqa: E402

from __future__ import annotations

import contextlib

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="no transformers: make test-integrations")

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from dpo_kernels import reference
from dpo_kernels.integrations.heads import ScoringHead, scoring_head

pytestmark = pytest.mark.integrations

V = 64
SIZES = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OF_XLSTM = {
    name: value
    for name, value in SIZES.items()
    if name not in ("intermediate_size", "num_attention_heads", "num_key_value_heads")
}
OF_INKLING = {
    **SIZES,
    "head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "logits_mup_width_multiplier": 3.0,
}
OF_FALCON_H1 = {
    **SIZES,
    "head_dim": 8,
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_chunk_size": 4,
}
CHAMELEON = {
    **SIZES,
    "vocabulary_map": {"<image>": 9, "IMGIMGBA": 7, "IMGIMGBB": 8},
    "vq_config": {
        "embed_dim": 4,
        "num_embeddings": 4,
        "latent_channels": 4,
        "resolution": 8,
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
    },
}

SERVED = {
    "llama": SIZES,
    "gpt2": {"vocab_size": V, "n_embd": 32, "n_layer": 1, "n_head": 4, "n_positions": 16},
    "opt": {
        **SIZES,
        "ffn_dim": 48,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 16,
    },
    "cohere": {**SIZES, "logit_scale": 0.3},
    "granite": {**SIZES, "logits_scaling": 3.0},
    "hyperclovax": {**SIZES, "logits_scaling": 3.0},
    "minicpm3": {
        **SIZES,
        "num_key_value_heads": 4,
        "dim_model_base": 8,
        "q_lora_rank": 8,
        "kv_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
    },
    "falcon_h1": {**OF_FALCON_H1, "lm_head_multiplier": 0.3},
    "gemma2": {**SIZES, "head_dim": 8, "final_logit_softcapping": 2.0},
    "recurrent_gemma": {**SIZES, "logits_soft_cap": 2.0, "lru_width": 32},
    "xlstm": {**OF_XLSTM, "num_heads": 4, "output_logit_soft_cap": 2.0},
    "inkling_text": OF_INKLING,
}
LEFT = {
    "inkling_text": {**OF_INKLING, "unpadded_vocab_size": V - 3},
    "chameleon": CHAMELEON,
}


# one layer of every kind, whatever a family calls its sizes
SMALL = {
    **SIZES,
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("swa_num_attention_heads", "swa_num_key_value_heads", "mamba_n_heads"), 4),
    **dict.fromkeys(("n_embd", "d_model", "embedding_size", "word_embed_proj_dim"), 32),
    **dict.fromkeys(("lru_width", "attention_hidden_size"), 32),
    **dict.fromkeys(("n_inner", "ffn_dim", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_rope_head_dim", "qk_nope_head_dim"), 8),
    **dict.fromkeys(("swa_head_dim", "global_head_dim", "d_kv", "hidden_size_per_layer_input"), 8),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "state_size", "mamba_d_state"), 8),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "expand", "mamba_expand"), 2),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts"), 1),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers"), 0),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "vocab_size_per_layer_input"), V),
    "moe_intermediate_size": 16,
    "mamba_d_head": 16,
    "rotary_dim": 4,
    "is_decoder": True,
}


def make_model(name: str, **config):
    made = transformers.AutoConfig.for_model(name, **config)
    torch.manual_seed(0)
    if name == "chameleon":
        model = transformers.ChameleonForConditionalGeneration(made)
    else:
        model = transformers.AutoModelForCausalLM.from_config(made)
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_()
    return model.eval()


def make_labels() -> torch.Tensor:
    return torch.randint(10, V - 3, (2, 6), generator=torch.Generator().manual_seed(0))


def run(model, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, ScoringHead]:
    """Logits of a model, what it returns for them with a scoring head, and that head."""
    with torch.no_grad():
        torch.manual_seed(1)
        logits = model(ids, use_cache=False).logits
        with scoring_head(model, ids, shift=True) as head:
            torch.manual_seed(1)
            returned = model(ids, use_cache=False).logits
    return logits, returned, head


def check(logits: torch.Tensor, returned: torch.Tensor, head: ScoringHead, ids) -> None:
    """The log-probs of the logits, or the logits and a reason."""
    if head.logps is None:
        assert head.reason is not None and torch.equal(returned, logits)
    else:
        truth = reference.token_logps(logits, ids, shift=True)
        torch.testing.assert_close(head.logps, truth, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", SERVED)
def test_a_served_head_gives_the_log_probs_of_its_models_logits(name, training):
    model, ids = make_model(name, **SERVED[name]), make_labels()
    if training:
        model.train()
    results = run(model, ids)
    assert results[2].reason is None
    check(*results, ids)


@pytest.mark.parametrize("name", LEFT)
def test_a_head_that_is_left_gives_the_logits_of_its_model(name):
    model, ids = make_model(name, **LEFT[name]), make_labels()
    results = run(model, ids)
    assert type(model).__name__ in results[2].reason
    check(*results, ids)


def small_model(config_class, model_class):
    """None where SMALL is not what its config takes, or there is more to the model than text."""
    sizes = {k: v for k, v in SMALL.items() if k in config_class.__dataclass_fields__}
    if not config_class.sub_configs:
        # a family says in its own way what it lacks, which is of no matter here
        with contextlib.suppress(Exception):
            torch.manual_seed(0)
            return model_class(config_class(**sizes)).float().eval()
    return None


def test_every_family_that_can_be_made_small():
    ids, served, left = make_labels(), [], []
    for config_class, model_class in MODEL_FOR_CAUSAL_LM_MAPPING.items():
        model = small_model(config_class, model_class)
        # xmod wants to be told a language first
        if model is None or config_class.model_type == "xmod":
            continue
        with torch.no_grad():
            model.get_output_embeddings().weight.normal_()
        results = run(model, ids)
        check(*results, ids)
        (left if results[2].logps is None else served).append(config_class.model_type)
    # most of those left have their heads inside another module
    assert len(served) > 120 and len(left) < 20
