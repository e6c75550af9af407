"""Prefill, decoding and serving of one model: ours, transformers', and the machine's floor."""
