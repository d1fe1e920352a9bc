"""Ten steps of every trainer, the real package unpatched and patched: ``make test-trainers``.

- environments.py: what is installed for each, over the environment of make test-integrations
- __main__.py: makes the environments, runs what is below in each, writes results.md
- report.py, memory.py: what a run has to show, and prints
- run_*.py: one trainer each, on a tiny model made in code
- loop.py: a loop for trainers whose own a CPU cannot start
- stubs: what trainers import, and these runs call at most in plain PyTorch
"""
