"""A policy divided among the processes that train it, through torch's FSDP2.

Each process holds its rows of the large weights, of their gradients and of all that is computed
from them. FSDP gathers a weight around a module's call and frees it afterwards. A policy here is
called through its parts (one encoder pass, several flow passes), so what is sharded is each layer
that is only ever called as a module: linear layers, convolutions, embeddings. The rest (norms,
positions, tied weights) is small or shared and stays whole everywhere.

FSDP averages the gradients of what it shards over the processes, as `parallel.average_gradients`
does for the rest. Checkpoints hold whole tensors, so they resume on any number of processes.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from vla_post import parallel

LAYERS = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d)
"""Exactly these: a subclass may be a part of something that reads its weight directly, such as the
output layer of `nn.MultiheadAttention`."""
SMALLEST = 1024
"""Numbers in a layer; gathering a smaller one would not be worth what it saves."""
FAMILIES = ("chunk_flow", "smolvla", "pi0", "pi05")
"""Policy types that call all such layers as modules. ACT reads the weights of embeddings."""

Shards = Mapping[nn.Parameter, nn.Parameter]
"""A parameter as it was -> what took its place."""


@runtime_checkable
class Shardable(Protocol):
    """A learner whose policy may be sharded under it."""

    def adopt(self, shards: Shards) -> None:
        """Its optimiser goes on with the policy's new parameters; before the first update."""
        ...


def require_shardable(kind: str, learner: object) -> Shardable:
    """The learner, if its policy can be sharded.

    Args:
        kind: of the policy.

    Raises:
        ValueError: it cannot; the message says why.
    """
    if parallel.world() == 1:
        raise ValueError(
            "shard divides the policy among processes, and this is one process; add --processes N, "
            "or leave --shard out"
        )
    if kind not in FAMILIES:
        raise ValueError(
            f"shard is for policies of type {', '.join(FAMILIES)}; this is {kind!r}, which is "
            "small or reads weights outside of the layers' calls. Leave --shard out"
        )
    if not isinstance(learner, Shardable):
        raise ValueError(
            f"{type(learner).__name__} does not train a sharded policy: hg-dagger, recap, ptr and "
            "ptr-hg-dagger do. It samples from the policy, copies it, or was not tried. Leave "
            "--shard out"
        )
    return learner


def divide(module: nn.Module) -> Shards:
    """Divides a policy's layers among the processes, in place.

    Copies of the module must be made before: a sharded one cannot be copied.
    """
    # Seconds to import, which processes that never shard need not wait for.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    device = next(module.parameters()).device
    mesh = init_device_mesh(device.type, (parallel.world(),))
    layers = [layer for layer in module.modules() if type(layer) in LAYERS]
    uses = Counter(p for part in module.modules() for p in part.parameters(recurse=False))
    shards: dict[nn.Parameter, nn.Parameter] = {}
    for layer in layers:
        before = dict(layer.named_parameters(recurse=False))
        tied = any(uses[p] > 1 for p in before.values())
        if tied or sum(p.numel() for p in before.values()) < SMALLEST:
            continue
        # Freed after each call also in the outermost module, which for FSDP each layer is.
        fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        after = dict(layer.named_parameters(recurse=False))
        shards |= {before[name]: after[name] for name in before}
    return shards


def local(tensor: Tensor) -> Tensor:
    """The part that this process holds, in the same memory; all of a tensor that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def complete(tensor: Tensor) -> Tensor:
    """All of a tensor, in every process; they call it together."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def whole(value: Any) -> Any:
    """A nested dict or list with whole tensors in place of sharded ones.

    All processes call it together. The leader gets them, on the CPU, and the others nothing: None
    in their place. What is not sharded stays as it is.
    """
    if isinstance(value, DTensor):
        # One at a time, so that no device ever holds more than one whole tensor.
        full = complete(value.detach())
        return full.cpu() if parallel.rank() == 0 else None
    if isinstance(value, Mapping):
        return {key: whole(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [whole(inner) for inner in value]
    return value


def placed(full: Tensor, like: Tensor) -> Tensor:
    """A whole tensor, which every process has, where `like` is and divided as it is."""
    full = full.to(like.device)
    if not isinstance(like, DTensor):
        return full
    return distribute_tensor(full, like.device_mesh, like.placements, src_data_rank=None)


def held(tensors: Iterable[Any]) -> int:
    """Bytes that this process holds of tensors; nested dicts and lists are looked into."""
    count = 0
    for value in tensors:
        if isinstance(value, Tensor):
            part = local(value.detach())
            count += part.numel() * part.element_size()
        elif isinstance(value, Mapping):
            count += held(value.values())
        elif isinstance(value, (list, tuple)):
            count += held(value)
    return count


def shorten(parameters: Iterable[nn.Parameter], longest: float) -> Tensor:
    """Clips the gradient to a length, as `clip_grad_norm_` does; returns its length before."""
    grads = [p.grad for p in parameters if p.grad is not None]
    mine = [local(g.detach()) for g in grads if isinstance(g, DTensor)]
    rest = [g for g in grads if not isinstance(g, DTensor)]
    if not mine:
        norm = nn.utils.get_total_norm(rest)
    else:
        norm = parallel.total(nn.utils.get_total_norm(mine).float() ** 2)
        if rest:
            norm = norm + nn.utils.get_total_norm(rest).float() ** 2
        norm = norm.sqrt()
    torch._foreach_mul_(  # pyright: ignore[reportPrivateUsage] (one kernel for all)
        [*mine, *rest], (longest / (norm + 1e-6)).clamp(max=1.0)
    )
    return norm
