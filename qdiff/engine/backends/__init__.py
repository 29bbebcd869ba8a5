"""Backends, which multiply: oneDNN on CPUs, torch._int_mm on GPUs, plain PyTorch; and a wrapper that saves memory."""
