"""What each run needs over the environment of make test-integrations: one folder a trainer.

A folder goes before that environment on the path, so that only what differs is fetched. Nothing
brings its dependencies: they would bring another torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

STUBS = Path(__file__).parent / "stubs"
# TRL 0.24 and LLaMA-Factory are of the time of transformers 4
TRANSFORMERS_4 = (
    "transformers==4.57.3",
    "huggingface_hub==0.36.0",
    "tokenizers==0.22.1",
    "peft==0.18.1",
    "accelerate==1.11.0",
    "datasets==4.0.0",
    "dill==0.3.8",
    "multiprocess==0.70.16",
    "fsspec==2025.3.0",
    "requests",
    "urllib3",
    "certifi",
    "charset-normalizer",
)
OMEGACONF = ("omegaconf==2.3.0", "antlr4-python3-runtime==4.9.3")
DEEPSPEED = ("deepspeed==0.19.6", "hjson", "einops", "msgpack", "py-cpuinfo")


class Environment(NamedTuple):
    module: str  # run in it, of tests.trainers
    packages: tuple[str, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    # a checkout that it takes, and the folders of that on the path
    checkout: str | None = None
    folders: tuple[str, ...] = ("",)


_CHAT = "applications/DeepSpeed-Chat"

ENVIRONMENTS = {
    "trl-0.24": Environment("run_trl", ("trl==0.24.0", *TRANSFORMERS_4)),
    "trl-1.12": Environment("run_trl", ("trl==1.12.0",)),
    "trl-1.13": Environment("run_trl", ("trl==1.13.0",)),
    "trl-1.14": Environment("run_trl", ("trl==1.14.1",)),
    # its own head is Triton's alone
    "trl-1.15": Environment("run_trl", ("trl==1.15.0",), (("TRITON_INTERPRET", "1"),)),
    "trl-1.16": Environment("run_trl"),
    "llamafactory": Environment(
        "run_llama_factory",
        ("llamafactory==0.9.5", "trl==0.24.0", "torchdata==0.11.0", *OMEGACONF, *TRANSFORMERS_4),
        # what it pins is for its user interface too
        (("DISABLE_VERSION_CHECK", "1"),),
    ),
    "openrlhf": Environment(
        "run_openrlhf",
        (
            "openrlhf==0.11.2",
            *DEEPSPEED,
            "pylatexenc",
            "jsonlines",
            "loralib",
            "torchdata",
            "torchmetrics",
            "lightning-utilities",
            "optree",
        ),
    ),
    "torchtune": Environment(
        "run_torchtune",
        (
            "torchtune==0.6.1",
            "torchao==0.9.0",
            *OMEGACONF,
            "sentencepiece",
            "tiktoken",
            "blobfile",
        ),
    ),
    "verl": Environment(
        "run_verl",
        (
            "verl==0.9.1",
            "tensordict==0.10.0",
            "pyvers",
            "orjson",
            "cloudpickle",
            "ray",
            "msgpack",
            "protobuf",
            "jsonschema",
            "jsonschema-specifications",
            "referencing",
            "rpds-py",
            "attrs",
            "hydra-core",
            "codetiming",
            "requests",
            "urllib3",
            "certifi",
            "charset-normalizer",
            *OMEGACONF,
        ),
    ),
    "deepspeed_chat": Environment(
        "run_deepspeed_chat",
        (*DEEPSPEED, *TRANSFORMERS_4),
        checkout="DeepSpeedExamples",
        folders=(_CHAT, f"{_CHAT}/training/step2_dpo_finetuning"),
    ),
}
