"""Writes torch_bin/pytorch_model.bin, tensors of every kind that a state dict holds, and their values.

Run with an interpreter that has torch 2.13 (a throwaway virtual environment; torch is no dependency of the tests):

    python tests/golden/make_torch_bin.py
"""

from pathlib import Path

import numpy as np
import torch

OUT = Path(__file__).parent / "torch_bin"


def main() -> None:
    torch.manual_seed(0)
    base = torch.randn(6, 4)
    state = {
        "float32": base,
        "transposed": base.t(),
        "part": base[2:5, 1:3],
        "tied": base,
        "bfloat16": torch.randn(3, 5).bfloat16(),
        "float16": torch.randn(7).half(),
        "scalar": torch.tensor(3.5),
        "empty": torch.zeros(0, 4),
        "parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "int64": torch.arange(4),
    }
    OUT.mkdir(exist_ok=True)
    module = torch.nn.Module()
    ordered = module.state_dict()  # an OrderedDict with _metadata, as Hugging Face saves it
    ordered.update(state)
    torch.save(ordered, OUT / "pytorch_model.bin")
    values = {name: tensor.detach().float().numpy() for name, tensor in state.items()}
    np.savez_compressed(OUT / "values.npz", **values)


if __name__ == "__main__":
    main()
