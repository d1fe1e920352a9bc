"""Stands in for flash-attn, which no CPU has; OpenRLHF imports its functions for padding."""
