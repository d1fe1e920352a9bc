"""NeMo-RL's prepare_loss_input and DPOLossFn, from a checkout: its trainers start Ray on GPUs."""

from __future__ import annotations

import functools

import nemo_rl
import torch
from nemo_rl.algorithms.loss import utils
from nemo_rl.algorithms.loss.interfaces import LossInputType

from tests import trl_runs

from . import loop
from .report import report, version_of_checkout


class Loss:
    """What prepare_loss_input looks at."""

    input_type = LossInputType.LOGPROB


def score(logits, ids):
    given, _ = utils.prepare_loss_input(logits, {"input_ids": ids}, Loss())
    return given["next_token_logprobs"][:, loop.PROMPT - 1 :].sum(-1)


def main() -> None:
    # the one call of NeMo-RL's own that a CPU cannot serve
    torch.Tensor.cuda = lambda self: self
    version = version_of_checkout(nemo_rl)
    train = functools.partial(loop.train, score)
    report("nemo_rl", "its loss's input in a loop", version, train, trl_runs.VOCAB)


if __name__ == "__main__":
    main()
