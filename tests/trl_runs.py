"""Short DPO and KTO runs of TRL's real trainers on tiny models made in code."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field

import datasets
import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from dpo_kernels.integrations.trl import patched_trl

WORDS = [f"w{i}" for i in range(120)]
# every word, the special tokens, and an odd number so that no power of two divides the vocabulary
VOCAB = len(WORDS) + 7
STEPS = 3
# what a run logs about itself, not about the training
UNCOMPARED = ("runtime", "per_second", "total_flos", "epoch", "step_time")

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<{{ message['role'] }}> {{ message['content'] }} <eos> "
    "{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>", "<user>", "<assistant>"]
    vocab = {word: i for i, word in enumerate(special + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<user>", "<assistant>"],
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def _text(rng: torch.Generator, low: int, high: int) -> str:
    length = int(torch.randint(low, high, (), generator=rng))
    return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=rng))


def make_pairs(count: int = 12, conversational: bool = False) -> datasets.Dataset:
    """Preference pairs whose answers differ in length, the rejected longer as often as not."""
    rng = torch.Generator().manual_seed(0)
    rows = {"prompt": [], "chosen": [], "rejected": []}
    for _ in range(count):
        texts = {name: _text(rng, 3, 12) for name in rows}
        for name, text in texts.items():
            role = "user" if name == "prompt" else "assistant"
            message = [{"role": role, "content": text}]
            rows[name].append(message if conversational else text + " ")
    return datasets.Dataset.from_dict(rows)


def make_unpaired(count: int = 12) -> datasets.Dataset:
    rng = torch.Generator().manual_seed(0)
    rows = {"prompt": [], "completion": [], "label": []}
    for i in range(count):
        rows["prompt"].append(_text(rng, 3, 12) + " ")
        rows["completion"].append(_text(rng, 3, 12))
        rows["label"].append(i % 2 == 0)
    return datasets.Dataset.from_dict(rows)


_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}


def make_model(name: str = "llama", dtype: torch.dtype = torch.float32, **changes):
    """A tiny causal language model whose logits spread enough for its losses to differ."""
    sizes = {**_SIZES, "tie_word_embeddings": False, **changes}
    config = {
        "llama": lambda: transformers.LlamaConfig(**sizes),
        "gemma2": lambda: transformers.Gemma2Config(
            **sizes, final_logit_softcapping=2.0, query_pre_attn_scalar=8, sliding_window=64
        ),
        "cohere": lambda: transformers.CohereConfig(**sizes, logit_scale=0.25),
        "granite": lambda: transformers.GraniteConfig(**sizes, logits_scaling=3.0),
        "mixtral": lambda: transformers.MixtralConfig(
            **sizes,
            num_local_experts=4,
            num_experts_per_tok=2,
            output_router_logits=True,
            router_aux_loss_coef=0.05,
        ),
    }[name]()
    torch.manual_seed(1)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        model.get_output_embeddings().weight.normal_(std=0.5)
    return model.to(dtype)


def lora(**options) -> peft.LoraConfig:
    return peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, **options
    )


def lora_model():
    """A model with an adapter trained before: TRL keeps a copy of it, "ref", as the reference."""
    torch.manual_seed(2)
    return peft.get_peft_model(make_model(), lora())


def moved(model, scale: float = 0.02):
    """A copy moved a little, so that a first loss is not the same whatever the loss is."""
    reference = copy.deepcopy(model)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return reference


@dataclass(frozen=True)
class Run:
    """What one training is made of; ``config`` goes to DPOConfig."""

    config: dict = field(default_factory=dict)
    model: Callable = make_model
    reference: Callable = moved
    peft_config: Callable | None = None
    conversational: bool = False
    evaluate: bool = False


def train(run: Run, mode: str, **trainer_options) -> list[dict[str, float]]:
    """The logged rows of a run: "trl" as it is, "patched", or "fused" with FusedDPOTrainer."""
    return train_and_keep(run, mode, **trainer_options)[0]


def train_and_keep(run: Run, mode: str, **trainer_options):
    """(logged rows, trainer)."""
    model = run.model()
    adapted = run.peft_config is not None or isinstance(model, peft.PeftModel)
    options = dict(trainer_options)
    if not adapted and not run.config.get("precompute_ref_log_probs"):
        options["ref_model"] = run.reference(model)
    if run.peft_config is not None:
        options["peft_config"] = run.peft_config()
    pairs = make_pairs(conversational=run.conversational)
    if run.evaluate:
        options["eval_dataset"] = make_pairs(5, conversational=run.conversational)
    config = {"eval_strategy": "steps", "eval_steps": 2} if run.evaluate else {}
    trainer_class = DPOTrainer
    if mode == "fused":
        # not in the TRLs that tests/trainers runs too
        from dpo_kernels.integrations.trl import FusedDPOTrainer as trainer_class
    with _patch(mode == "patched"), tempfile.TemporaryDirectory() as folder:
        trainer = trainer_class(
            model=model,
            args=make_config(DPOConfig, folder, **config, **run.config),
            train_dataset=pairs,
            processing_class=make_tokenizer(),
            **options,
        )
        trainer.train()
    return trainer.state.log_history, trainer


def train_kto(patched: bool, **config) -> list[dict[str, float]]:
    model = make_model()
    with _patch(patched), tempfile.TemporaryDirectory() as folder:
        trainer = KTOTrainer(
            model=model,
            ref_model=moved(model),
            args=make_config(KTOConfig, folder, **config),
            train_dataset=make_unpaired(),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    return trainer.state.log_history


def train_sft(patched: bool) -> list[dict[str, float]]:
    with _patch(patched), tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=make_model(),
            args=make_config(SFTConfig, folder),
            train_dataset=make_unpaired().remove_columns("label"),
            processing_class=make_tokenizer(),
        )
        trainer.train()
    return trainer.state.log_history


def _patch(patched: bool):
    return patched_trl() if patched else contextlib.nullcontext()


def make_config(config_class, folder: str, **changes):
    defaults = {
        "output_dir": folder,
        "per_device_train_batch_size": 4,
        "max_steps": STEPS,
        "logging_steps": 1,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 1.0,
        "seed": 3,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "max_length": 64,
    }
    return config_class(**{**defaults, **changes})


def compared(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Rows without what differs from run to run anyway."""
    return [
        {k: v for k, v in row.items() if not any(part in k for part in UNCOMPARED)} for row in rows
    ]
