"""Text-to-image diffusion with few-bit integers and fewer tokens."""

import os

# Large tensors in large pages (Linux), for which the system makes room several times faster. PyTorch reads it when it
# makes the first tensor.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
