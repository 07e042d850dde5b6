"""Gemma 4's text model: its config, its tensors in a file, and its math over any weights and any KV cache.

The reference for all of it is `transformers`, `models/gemma4/modeling_gemma4.py`, with eager attention.
"""
