"""What ``python -m dpo_kernels`` runs; one command or one idea a file."""
