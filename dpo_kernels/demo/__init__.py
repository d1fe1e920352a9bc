"""A small transformer, its tokenizer, a real corpus and DPO training: what the demo trains."""
