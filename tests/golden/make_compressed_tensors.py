"""Write `compressed_tensors.safetensors`: weights as compressed-tensors stores them, and as it reads them again.

pip install --target DIR --no-deps compressed-tensors==0.20.0 loguru
PYTHONPATH=DIR python tests/golden/make_compressed_tensors.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import save_file

INT4 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
FP8 = {"num_bits": 8, "type": "float"}
KINDS = {
    "int4": ("pack-quantized", {**INT4, "symmetric": True}),
    "int4_zero_points": ("pack-quantized", {**INT4, "symmetric": False}),
    "fp8_rows": ("float-quantized", {**FP8, "strategy": "channel"}),
    "fp8_tensor": ("float-quantized", {**FP8, "strategy": "tensor"}),
    "fp8_blocks": ("float-quantized", {**FP8, "strategy": "block", "block_structure": [16, 16]}),
}


def ranges(weight: torch.Tensor, args: QuantizationArgs) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest and the largest value under each scale."""
    rows, columns = weight.shape
    match args.strategy:
        case "group":
            grouped = weight.reshape(rows, -1, args.group_size)
            return grouped.amin(-1), grouped.amax(-1)
        case "channel":
            return weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        case "block":
            height, width = args.block_structure
            grid = weight.reshape(rows // height, height, columns // width, width)
            return grid.amin((1, 3)), grid.amax((1, 3))
        case _:
            return weight.amin().reshape(1), weight.amax().reshape(1)


def main() -> None:
    torch.manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, (kind, settings) in KINDS.items():
        weight = (torch.randn(32 if "fp8" in name else 28, 64) * 0.05).bfloat16()
        args = QuantizationArgs(**settings)
        scale, zero_point = calculate_qparams(*ranges(weight, args), args)
        scheme = QuantizationScheme(targets=["Linear"], weights=args)
        compressor = BaseCompressor.get_value_from_registry(kind)
        state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero_point}
        stored = compressor.compress(state, scheme)
        meant = compressor.decompress(dict(stored), scheme)["weight"]
        tensors |= {f"{name}.{part}": value.contiguous() for part, value in stored.items()}
        tensors[f"{name}.meant"] = meant.contiguous()
    save_file(tensors, Path(__file__).parent / "compressed_tensors.safetensors")


if __name__ == "__main__":
    main()
