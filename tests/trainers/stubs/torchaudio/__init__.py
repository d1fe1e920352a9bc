"""Stands in for torchaudio, which LLaMA-Factory imports for audio: text needs none of it."""
