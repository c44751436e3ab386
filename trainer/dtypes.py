"""torch's dtypes by the names that settings, reports and checkpoints use, and back. The table itself is in formats/dtypes.py."""

from __future__ import annotations

import torch

from formats.dtypes import CONVERTED

TORCH_DTYPES: dict[str, torch.dtype] = {dtype.name: getattr(torch, dtype.torch) for dtype in CONVERTED}
"""`bf16` → `torch.bfloat16`, …"""

DTYPE_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}
"""`torch.bfloat16` → `bf16`, …"""
