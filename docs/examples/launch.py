"""Runs a trainer's own command line with this package in the trainer.

    python launch.py TRAINER MODULE [arguments of MODULE]

TRAINER is a name that dpo_kernels.patch() takes, MODULE what `python -m` would run. A launcher
starts this file in its place:

    deepspeed --module openrlhf.cli.train_dpo --pretrain ...
    deepspeed launch.py openrlhf openrlhf.cli.train_dpo --pretrain ...

    accelerate launch -m axolotl.cli.train config.yml
    accelerate launch launch.py trl axolotl.cli.train config.yml
"""

import runpy
import sys

import dpo_kernels

if __name__ == "__main__":
    trainer, module, *arguments = sys.argv[1:]
    dpo_kernels.patch(trainer)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
