"""Muon for matrices, AdamW for the rest, in one optimizer, on one process or sharded over many.

The surprising choice: there is no second, distributed optimizer. A bucket is a list of tensors of one shape, cut
into units (a matrix for Muon, a single number for AdamW); each rank owns a run of units, receives their summed
gradient (reduce-scatter), updates them and sends them round (all-gather). On one process a rank owns them all.
So muon_update and adamw_update (updates.py) are the only updates there are, and the optimizer's memory is divided
by the number of ranks.

Note that Muon's update has the same length whatever the gradient's: 1e-6 of a gradient moves the weights as far as
the whole, and a zero gradient moves them by its momentum. A step without signal must therefore not be taken:
`step(scale=0)` changes nothing at all, momentum and step count included.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import UserError, World
from nanochat.updates import adamw_update, fused, muon_update

State = dict[str, Tensor]
Group = dict[str, Any]

CPU_BLOCK = 2**18
"""Numbers that a CPU updates at once."""


@dataclass
class Bucket:
    """Parameters of one shape and one group, and this rank's share of their gradient and optimizer state."""

    names: list[str]
    params: list[nn.Parameter]
    group: Group
    world: World
    grads: Tensor | None = None
    state: State = field(default_factory=dict)

    def __post_init__(self) -> None:
        shard = self.mine(self.pack([param.data for param in self.params]))
        kinds = ("momenta",) if self.group["kind"] == "muon" else ("mean", "square")
        self.state = {kind: torch.zeros_like(shard) for kind in kinds}
        self.state["step"] = torch.zeros((), device=shard.device)

    @property
    def key(self) -> str:
        """Names this bucket in a saved state."""
        return f"{self.group['kind']} {' '.join(self.names)}"

    @property
    def unit_shape(self) -> torch.Size:
        return self.params[0].shape if self.group["kind"] == "muon" else torch.Size()

    @property
    def num_units(self) -> int:
        return sum(param.numel() for param in self.params) // self.unit_shape.numel()

    @property
    def shard_units(self) -> int:
        return -(-self.num_units // self.world.size)

    def pack(self, tensors: list[Tensor]) -> Tensor:
        """One tensor (units, *unit_shape), padded with zeros to a multiple of the ranks; a view where it can be."""
        packed = tensors[0].unsqueeze(0) if len(tensors) == 1 else torch.stack(tensors)
        packed = packed.reshape(-1, *self.unit_shape)
        missing = self.shard_units * self.world.size - len(packed)
        return torch.cat([packed, packed.new_zeros(missing, *self.unit_shape)]) if missing else packed

    def unpack(self, packed: Tensor) -> None:
        """Write `packed` back into the parameters, unless it is their own memory."""
        if packed.data_ptr() != self.params[0].data_ptr():
            whole = packed[: self.num_units].view(len(self.params), *self.params[0].shape)
            torch._foreach_copy_([param.data for param in self.params], list(whole.unbind()))

    def mine(self, packed: Tensor) -> Tensor:
        """This rank's units of a packed tensor: a view."""
        start = self.world.rank * self.shard_units
        return packed[start : start + self.shard_units]

    def gradients(self) -> list[Tensor]:
        """The parameters' own gradients; a parameter, or a rank, without one counts as zeros."""
        return [torch.zeros_like(param) if param.grad is None else param.grad for param in self.params]

    def start_reduce(self) -> dist.Work | None:
        """Begin to sum this rank's share of the gradient over the ranks."""
        packed = self.pack(self.gradients())
        self.grads = torch.empty_like(self.mine(packed))
        return dist.reduce_scatter_tensor(self.grads, packed, async_op=True)

    def update(self, weights: Tensor, scale: Tensor, *, fuse: bool, want_norm: bool) -> Tensor:
        """Apply this bucket's rule to this rank's weights, in place; return the change's squared norm, or 0."""
        grads = self.pack(self.gradients()) if self.grads is None else self.grads
        alive = (scale > 0).float()
        self.state["step"].add_(alive)
        square = torch.zeros_like(scale)
        # A CPU is faster on what fits its cache, a GPU on everything at once.
        units = len(weights) if weights.is_cuda else max(1, CPU_BLOCK // self.unit_shape.numel())
        for start in range(0, len(weights), units):
            block = slice(start, start + units)
            # where, not only times: a gradient that is not finite must not leave its mark as 0 * nan
            scaled = torch.where(alive > 0, grads[block] * scale, 0.0)
            change = self._rule(weights[block], scaled, block, alive, fuse)
            if want_norm:
                square += change.square().sum()
        return square

    def _rule(self, weights: Tensor, grads: Tensor, block: slice, alive: Tensor, fuse: bool) -> Tensor:
        group, state = self.group, self.state
        # tensors, because a compiled function would be compiled anew for every new number
        lr, decay = (torch.full((), group[key], device=weights.device) for key in ("lr", "weight_decay"))
        if group["kind"] == "muon":
            function = fused(muon_update) if fuse else muon_update
            momenta, tail = state["momenta"][block], (group["momentum"], group["dtype"])
            return function(weights, grads, momenta, state["step"], alive, lr, decay, *tail)
        function = fused(adamw_update) if fuse else adamw_update
        moments, tail = (state["mean"][block], state["square"][block]), (group["betas"], group["eps"])
        return function(weights, grads, *moments, state["step"], alive, lr, decay, *tail)


class MuonAdamW:
    """The optimizer of every stage; each group's "kind" is muon or adamw.

    Gradients of the ranks are summed, so a rank's loss must already be divided by what the whole step divides by.
    """

    def __init__(self, groups: Iterable[Group], world: World, *, fuse: bool = False) -> None:
        self.world = world
        self.fuse = fuse
        """Compile the updates: worth its half minute on a GPU."""
        self.param_groups = [group | {"initial_lr": group["lr"]} for group in groups]
        self.buckets = [bucket for group in self.param_groups for bucket in make_buckets(group, world)]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for bucket in self.buckets:
            bucket.grads = None
            for param in bucket.params:
                if set_to_none:
                    param.grad = None
                elif param.grad is not None:
                    param.grad.zero_()

    @torch.no_grad()
    def reduce(self) -> None:
        """Sum the gradients over the ranks, each rank keeping its share; done once a step."""
        if self.world.size > 1 and self.buckets[0].grads is None:
            for work in [bucket.start_reduce() for bucket in self.buckets]:
                if work is not None:
                    work.wait()

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """Norm of the whole gradient, all parameters and ranks together."""
        self.reduce()
        parts = [b.gradients() if b.grads is None else [b.grads] for b in self.buckets]
        norms = torch._foreach_norm([tensor for part in parts for tensor in part])
        return self.world.sum(torch.stack(list(norms)).square().sum()).sqrt()

    @torch.no_grad()
    def step(self, *, scale: Tensor | float = 1.0, want_norm: bool = False) -> Tensor | None:
        """Update once with gradients times `scale`; 0 is no step at all. With want_norm return the update's norm.

        The parameters' own .grad is cleared by zero_grad.
        """
        self.reduce()
        if not isinstance(scale, Tensor):
            scale = torch.full((), scale, device=self.world.device)
        square = torch.zeros_like(scale)
        pending = []
        for bucket in self.buckets:
            packed = bucket.pack([param.data for param in bucket.params])
            weights = bucket.mine(packed)
            square += bucket.update(weights, scale, fuse=self.fuse, want_norm=want_norm)
            bucket.grads = None
            if self.world.size == 1:
                bucket.unpack(packed)
            else:
                work = dist.all_gather_into_tensor(packed, weights.clone(), async_op=True)
                pending.append((bucket, packed, work))
        for bucket, packed, work in pending:
            if work is not None:
                work.wait()
            bucket.unpack(packed)
        return self.world.sum(square).sqrt() if want_norm else None

    def state_dict(self) -> dict[str, Any]:
        """This rank's share of the state: tensors, strings and numbers only. See recut for another number of ranks."""
        buckets = {
            bucket.key: {"num_units": bucket.num_units, "tensors": dict(bucket.state)}
            for bucket in self.buckets
        }
        return {"rank": self.world.rank, "size": self.world.size, "buckets": buckets}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take a state that state_dict gave for the same model, rank and number of ranks."""
        if (state["rank"], state["size"]) != (self.world.rank, self.world.size):
            raise UserError(
                f"optimizer state of rank {state['rank']} of {state['size']} does not fit rank {self.world.rank} "
                f"of {self.world.size}; cut it anew with optim.recut"
            )
        if differing := {bucket.key for bucket in self.buckets} ^ set(state["buckets"]):
            raise UserError(
                f"optimizer state is of another model or kind: {min(differing)} is only in one of them"
            )
        for bucket in self.buckets:
            for name, tensor in bucket.state.items():
                theirs = state["buckets"][bucket.key]["tensors"][name]
                if theirs.shape != tensor.shape:
                    raise UserError(
                        f"optimizer state of {bucket.key}: {name} is {tuple(theirs.shape)}, "
                        f"the model needs {tuple(tensor.shape)}"
                    )
                tensor.copy_(theirs)


def consolidate(shards: list[dict[str, Any]]) -> dict[str, Any]:
    """Join the state of all ranks into that of one process."""
    shards = sorted(shards, key=lambda shard: shard["rank"])
    if [shard["rank"] for shard in shards] != list(range(shards[0]["size"])):
        raise UserError(f"optimizer state is not whole: have {len(shards)} of {shards[0]['size']} ranks")

    def join(key: str, name: str, num_units: int) -> Tensor:
        parts = [shard["buckets"][key]["tensors"][name].cpu() for shard in shards]
        return (
            torch.cat(parts)[:num_units] if parts[0].dim() else parts[0]
        )  # the step count is the same everywhere

    buckets = {}
    for key, entry in shards[0]["buckets"].items():
        tensors = {name: join(key, name, entry["num_units"]) for name in entry["tensors"]}
        buckets[key] = {"num_units": entry["num_units"], "tensors": tensors}
    return {"rank": 0, "size": 1, "buckets": buckets}


def recut(whole: dict[str, Any], *, rank: int, size: int) -> dict[str, Any]:
    """The share of `rank` among `size` of a state that consolidate gave."""

    def cut(tensor: Tensor, num_units: int) -> Tensor:
        if not tensor.dim():
            return tensor
        share = -(-num_units // size)
        padding = tensor.new_zeros(share * size - num_units, *tensor.shape[1:])
        return torch.cat([tensor, padding])[rank * share : (rank + 1) * share].clone()

    buckets = {}
    for key, entry in whole["buckets"].items():
        tensors = {name: cut(tensor, entry["num_units"]) for name, tensor in entry["tensors"].items()}
        buckets[key] = {"num_units": entry["num_units"], "tensors": tensors}
    return {"rank": rank, "size": size, "buckets": buckets}


def make_buckets(group: Group, world: World) -> list[Bucket]:
    """Sort a group's parameters by shape, keeping their order."""
    by_shape: dict[torch.Size, list[tuple[str, nn.Parameter]]] = {}
    for name, param in group["params"]:
        by_shape.setdefault(param.shape, []).append((name, param))
    return [Bucket([n for n, _ in some], [p for _, p in some], group, world) for some in by_shape.values()]


def make_optimizer(
    model: nn.Module,
    *,
    matrix_lr: float,
    embedding_lr: float,
    unembedding_lr: float,
    world: World,
    weight_decay: float = 0.0,
    scalar_lr: float = 3e-3,
    momentum: float = 0.95,
    betas: tuple[float, float] = (0.8, 0.95),
    fuse: bool = False,
) -> MuonAdamW:
    """Muon on the blocks' matrices, AdamW on embeddings, head and smear.

    AdamW's rates are for a model 768 wide and grow as its width's root shrinks; Muon's need no such scaling.
    weight_decay is for the matrices: an embedding that is never seen should not fade.
    """
    sorts: dict[str, list[tuple[str, nn.Parameter]]] = {"matrix": [], "wte": [], "lm_head": [], "smear": []}
    for name, param in model.named_parameters():
        sorts["matrix" if ".h." in name else name.split(".")[-2]].append((name, param))
    width_scale = (sorts["wte"][0][1].size(1) / 768) ** -0.5
    # Iterating in bf16 is twice as fast where the hardware has it, and several times slower where it has not.
    dtype = world.dtype if world.device.type == "cuda" else torch.float32
    muon = {
        "kind": "muon",
        "lr": matrix_lr,
        "weight_decay": weight_decay,
        "momentum": momentum,
        "dtype": dtype,
    }
    adamw = {"kind": "adamw", "weight_decay": 0.0, "betas": betas, "eps": 1e-10}
    rates = {
        "wte": embedding_lr * width_scale,
        "lm_head": unembedding_lr * width_scale,
        "smear": scalar_lr,
    }
    groups = [muon | {"params": sorts["matrix"]}]
    groups += [adamw | {"lr": lr, "params": sorts[sort]} for sort, lr in rates.items() if sorts[sort]]
    return MuonAdamW(groups, world, fuse=fuse)


def make_adamw(
    model: nn.Module,
    *,
    lr: float,
    world: World,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    fuse: bool = False,
) -> MuonAdamW:
    """AdamW on everything, at one rate: for RL, where the size of the gradient should mean something."""
    group = {"kind": "adamw", "lr": lr, "weight_decay": weight_decay, "betas": betas, "eps": eps}
    return MuonAdamW([group | {"params": list(model.named_parameters())}], world, fuse=fuse)
