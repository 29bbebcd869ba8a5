"""Backends make integer layers: with oneDNN on CPUs, torch._int_mm on GPUs, or plain PyTorch (`simulated`).

`expanding` wraps one of them to save memory.
"""
