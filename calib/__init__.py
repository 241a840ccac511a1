"""Activations: text -> tokens -> Hessians. Knows torch, and nothing of the weights' quantization."""
