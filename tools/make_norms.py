"""Make tests/golden/large_norms.safetensors: Qwen3's norm by weights as large as it has them.

Needs the ``tools`` extra (torch, transformers 5); tests need neither. From the repository's root:

    python tools/make_norms.py
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm


def large_norms(path: Path) -> None:
    """Write x [9, 128], the norm's weight [128], its eps and its result in both dtypes."""
    random = torch.Generator().manual_seed(96)
    x = (torch.randn((9, 128), generator=random) * torch.tensor([0.01, 1, 30]).repeat(3)[:, None]).bfloat16()
    norm = Qwen3RMSNorm(128, eps=1e-6)
    with torch.no_grad():
        norm.weight.copy_(96.5 * torch.rand(128, generator=random))
        norm.weight[::7] = 96.5
        norm.bfloat16()
        found = {
            "x": x,
            "weight": norm.weight.clone(),
            "bfloat16": norm(x),
            "float32": norm.float()(x.float()),
        }
    save_file(found, path)


if __name__ == "__main__":
    large_norms(Path("tests/golden/large_norms.safetensors"))
