"""Activations: text -> tokens -> Hessians. Knows torch, not quantization."""
