"""Layers by what multiplies: oneDNN, torch._int_mm, plain PyTorch; and one that expands packed weights as it runs."""
