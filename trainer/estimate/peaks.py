"""Look up the peak dense tensor-core speed of NVIDIA GPUs, by precision: the denominator of MFU.

Numbers are TFLOP/s without sparsity, with accumulation in fp32, from NVIDIA's datasheets and architecture whitepapers: V100
(2020), A100 (2021), A10 (2021), Ada whitepaper (RTX 4090), L40S (2023), H100 (2023, also GH200), H200 (2024), HGX and DGX B200,
GB200 NVL72 per GPU (2024). Where a datasheet prints the number with sparsity, the table has half of it. Names are those of
`torch.cuda.get_device_name`; knows nothing of clocks, power limits or what a kernel reaches.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

_HOPPER_SXM = {"fp16": 989, "bf16": 989, "fp8": 1979}
_HOPPER_NVL = {"fp16": 835, "bf16": 835, "fp8": 1671}

PEAKS: tuple[tuple[str, Mapping[str, float]], ...] = (
    # A slice of a GPU.
    ("MIG", {}),
    ("GB200", {"fp16": 2500, "bf16": 2500, "fp8": 5000, "fp4": 10000}),
    ("B200", {"fp16": 2250, "bf16": 2250, "fp8": 4500, "fp4": 9000}),
    ("GH200", _HOPPER_SXM),
    ("H200 NVL", _HOPPER_NVL),
    ("H200", _HOPPER_SXM),
    ("H100 NVL", _HOPPER_NVL),
    ("H100 PCIe", {"fp16": 756, "bf16": 756, "fp8": 1513}),
    ("H100", _HOPPER_SXM),
    ("A100", {"fp16": 312, "bf16": 312}),
    ("L40S", {"fp16": 362, "bf16": 362, "fp8": 733}),
    ("A10", {"fp16": 125, "bf16": 125}),
    # Other chips under the same number.
    ("RTX 4090 Laptop", {}),
    ("RTX 4090 D", {}),
    ("RTX 4090", {"fp16": 165.2, "bf16": 165.2, "fp8": 330.3}),
    ("V100 PCIe", {"fp16": 112}),
    ("V100", {"fp16": 125}),
)
"""TFLOP/s; the first row whose words are all in the device's name counts, so special cases come first."""


def peak_flops(device_name: str, *, precision: str) -> float | None:
    """Return the FLOP/s of one GPU in `fp16`, `bf16`, `fp8` or `fp4`; None for a device or precision that the table does not
    have.

    Of a run in fp8, only the matrix products of the layers are in fp8; its MFU against the fp8 peak says how far it could go.
    """
    words = _words(device_name)
    for model, speeds in PEAKS:
        if _words(model) <= words:
            return speeds[precision] * 1e12 if precision in speeds else None
    return None


def _words(name: str) -> set[str]:
    """`A10` is a substring of `A100` and `A10G`, which are other chips: whole words are compared."""
    return set(re.split(r"[^a-z0-9]+", name.lower())) - {""}
