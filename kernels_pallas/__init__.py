"""Attention, KV-cache and sampling kernels for paged LLM inference. Depends on jax alone."""
