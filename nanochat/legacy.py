"""What older checkpoints look like inside, turned into what ours look like.

October 2025 nanochat and its forks (peers of this project) save a model's weights with the embedding in bf16 when
trained on a GPU, sometimes with the prefix that torch.compile gives names, and the optimizers of base and mid as a list
of two state dicts: torch's AdamW over [head, embedding], and Muon's momenta by matrix. https://github.com/karpathy/nanochat
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.optim import MuonAdamW


def plain_weights(saved: Any, path: Path) -> dict[str, Tensor]:
    """Weights by our names, in fp32."""
    if not isinstance(saved, dict) or not all(isinstance(value, Tensor) for value in saved.values()):
        raise UserError(f"{path} does not hold a model's weights by name")
    return {str(name).removeprefix("_orig_mod."): tensor.float() for name, tensor in saved.items()}


def check_weights(weights: dict[str, Tensor], model: nn.Module, path: Path) -> None:
    """Raise UserError unless names and shapes are the model's."""
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if strange := sorted(set(weights) - set(ours)):
        raise UserError(
            f"{path} holds weights that this architecture does not have ({', '.join(strange[:4])})"
        )
    if missing := sorted(set(ours) - set(weights)):
        raise UserError(f"{path} lacks weights that its config asks for ({', '.join(missing[:4])})")
    for name, shape in ours.items():
        if tuple(weights[name].shape) != shape:
            raise UserError(f"{path}: {name} is {tuple(weights[name].shape)}, its config asks for {shape}")


def optimizer_state(saved: Any, optimizer: MuonAdamW, path: Path) -> dict[str, Any]:
    """The state that MuonAdamW.state_dict would give on one process, from the pair of 2025."""
    matrices = [
        entry for group in optimizer.param_groups for entry in group["params"] if group["kind"] == "muon"
    ]
    try:
        adamw, muon = saved
        adamw_states = dict(zip(("lm_head.weight", "transformer.wte.weight"), _in_order(adamw), strict=True))
        step = max(float(state["step"]) for state in adamw_states.values())
        momenta = _momenta(muon, dict(matrices))
        buckets: dict[str, Any] = {}
        for bucket in optimizer.buckets:
            if bucket.group["kind"] == "muon":
                tensors = {"momenta": torch.stack([momenta[name] for name in bucket.names])}
            else:
                states = [adamw_states[name] for name in bucket.names]
                tensors = {
                    "mean": torch.cat([state["exp_avg"].float().flatten() for state in states]),
                    "square": torch.cat([state["exp_avg_sq"].float().flatten() for state in states]),
                }
            tensors["step"] = torch.tensor(step)
            buckets[bucket.key] = {"num_units": bucket.num_units, "tensors": tensors}
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
        raise UserError(
            f"{path} is not the optimizer state of a model of this shape trained on one GPU ({error!r}); "
            "older code kept only one GPU's share of it, so go on without it"
        ) from None
    return {"rank": 0, "size": 1, "buckets": buckets}


def _in_order(saved: dict[str, Any]) -> list[dict[str, Any]]:
    """The states of a torch optimizer in the order of its parameters."""
    return [saved["state"][index] for group in saved["param_groups"] for index in group["params"]]


def _momenta(muon: dict[str, Any], matrices: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Muon's momentum by name: its groups hold the matrices of one size each, in the model's order."""
    momenta: dict[str, Tensor] = {}
    for group in muon["param_groups"]:
        buffers = [muon["state"][index]["momentum_buffer"].float() for index in group["params"]]
        names = [name for name, weight in matrices.items() if weight.numel() == buffers[0].numel()]
        for name, buffer in zip(names, buffers, strict=True):
            if buffer.shape != matrices[name].shape:
                raise ValueError(
                    f"{name} is {tuple(matrices[name].shape)}, its momentum {tuple(buffer.shape)}"
                )
            momenta[name] = buffer
    return momenta
