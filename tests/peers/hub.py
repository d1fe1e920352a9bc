"""A folder that TRL's tests take for a hub: the names that they ask for, made in code.

transformers and datasets look for a folder of a name before they ask a hub.
"""

from __future__ import annotations

import json
from pathlib import Path

import tokenizers
import transformers

from tests import trl_runs

ORGANISATION = "trl-internal-testing"
SIZES = {name: value for name, value in trl_runs._SIZES.items() if name != "head_dim"}
CONFIGS = {
    "tiny-Qwen2ForCausalLM-2.5": transformers.Qwen2Config,
    "tiny-Qwen2ForSequenceClassification-2.5": transformers.Qwen2Config,
    "tiny-Qwen3ForCausalLM": transformers.Qwen3Config,
    "tiny-LlamaForCausalLM-3.2": transformers.LlamaConfig,
    "tiny-MistralForCausalLM-0.2": transformers.MistralConfig,
}


def make_hub(folder: Path) -> None:
    tokenizer = make_tokenizer()
    for name, config_class in CONFIGS.items():
        config = config_class(**SIZES, tie_word_embeddings=False)
        config.vocab_size = len(tokenizer)
        if "SequenceClassification" in name:
            config.num_labels = 1
            model = transformers.AutoModelForSequenceClassification.from_config(config)
        else:
            model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / ORGANISATION / name)
        tokenizer.save_pretrained(folder / ORGANISATION / name)
    make_data(folder / ORGANISATION / "zen")


def make_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A token a byte: what AutoTokenizer takes for Qwen2 has to be a byte-level BPE."""
    special = ["<pad>", "<eos>", "<unk>"]
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate(special + letters)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    fast.chat_template = trl_runs.CHAT_TEMPLATE
    return fast


def make_data(folder: Path) -> None:
    """ "zen": a few rows of every kind, standard and conversational, in train and test."""
    pairs, answers = list(trl_runs.make_pairs(19)), list(trl_runs.make_unpaired(19))
    kinds = {
        "preference": [(row["prompt"], row["chosen"], row["rejected"], None) for row in pairs],
        "unpaired_preference": [
            (row["prompt"], row["completion"], None, row["label"]) for row in answers
        ],
    }
    tables: dict[str, list[dict]] = {}
    for prompt, chosen, rejected, _ in kinds["preference"]:
        for style, say in (("standard", _plain), ("conversational", _message)):
            question, good, bad = say(prompt, "user"), say(chosen), say(rejected)
            for kind, row in (
                ("preference", {"prompt": question, "chosen": good, "rejected": bad}),
                ("prompt_completion", {"prompt": question, "completion": good}),
                ("prompt_only", {"prompt": question}),
                (
                    "implicit_prompt_preference",
                    {"chosen": question + good, "rejected": question + bad},
                ),
            ):
                tables.setdefault(f"{style}_{kind}", []).append(row)
            text = (
                {"messages": question + good} if style != "standard" else {"text": question + good}
            )
            tables.setdefault(f"{style}_language_modeling", []).append(text)
    for prompt, completion, _, label in kinds["unpaired_preference"]:
        for style, say in (("standard", _plain), ("conversational", _message)):
            row = {"prompt": say(prompt, "user"), "completion": say(completion), "label": label}
            tables.setdefault(f"{style}_unpaired_preference", []).append(row)
    configs = ["---", "configs:"]
    for name, rows in tables.items():
        configs += [f"- config_name: {name}", "  data_files:"]
        for split, part in (("train", rows[:17]), ("test", rows[17:])):
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(json.dumps(row) + "\n" for row in part))
            configs += [f"  - split: {split}", f"    path: {name}/{split}.jsonl"]
    (folder / "README.md").write_text("\n".join([*configs, "---", ""]))


def _plain(text: str, role: str = "assistant") -> str:
    return text


def _message(text: str, role: str = "assistant") -> list[dict[str, str]]:
    return [{"role": role, "content": text}]
