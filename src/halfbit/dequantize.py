"""Weights that a checkpoint stores in four or eight bits, as bfloat16.

MXFP4 (gpt-oss): 32 values share one power of two; two 4-bit floats (e2m1) per byte, the low nibble first.
    X_blocks uint8 [experts, out, in / 32, 16]     X_scales uint8 [experts, out, in / 32], exponent + 127
    -> [experts, in, out], the orientation of transformers' GptOssExperts
    (OCP Microscaling Formats v1.0, https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf)

FP8 (DeepSeek-V3): float8_e4m3fn with one float scale per rectangle of `block` rows and columns. In spite of its name
`weight_scale_inv` is multiplied (https://huggingface.co/deepseek-ai/DeepSeek-V3/blob/main/README_WEIGHTS.md).
"""

import torch
from torch import Tensor

# the sixteen e2m1 values: sign, two exponent bits (bias 1), one mantissa bit
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """bfloat16 [experts, in, out]. Exact: two significant bits times a power of two fit in bfloat16."""
    nibbles = torch.stack([blocks & 15, blocks >> 4], dim=-1).flatten(-2)  # [experts, out, groups, 32]
    values = torch.tensor(E2M1, dtype=torch.bfloat16)[nibbles.to(torch.int64)]
    values = torch.ldexp(values, scales.to(torch.int32)[..., None] - 127)
    return values.flatten(-2).transpose(1, 2).contiguous()


def fp8(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """bfloat16 [..., out, in]: `weight` times the scale of its rectangle; the last rectangles may be cut off."""
    rows, columns = weight.shape[-2:]
    scale = scale.to(torch.float32)
    # a block that is larger than the weight must not make the scales larger than it
    scale = scale.repeat_interleave(min(block[0], rows), dim=-2)[..., :rows, :]
    scale = scale.repeat_interleave(min(block[1], columns), dim=-1)[..., :columns]
    return (weight.to(torch.float32) * scale).to(torch.bfloat16)
