"""Imported before any of Triton's kernels is: where there is no GPU they run in Triton's interpreter."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
