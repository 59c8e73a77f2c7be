"""Several processes train one policy: what they share, through torch.distributed.

Every process draws the same batch, works on its own slice of it and averages gradients with the
others, so that N processes follow the loss curve of one with the same whole batch: noise, flow
times and normalisers are those of the whole batch too. Alone, all of this does nothing. B batch.

Processes come from `vla-post train --processes N` on one machine, or from torchrun on several.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

PATIENCE = timedelta(minutes=10)
"""How long a process waits for the others before it gives up."""


def world() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is; 0 leads: it looks at the stores, publishes and keeps the log."""
    return dist.get_rank() if world() > 1 else 0


def total(value: Tensor) -> Tensor:
    """Sum over the processes, without gradient."""
    value = value.detach().clone()
    if world() > 1:
        dist.all_reduce(value)
    return value


def mean(value: Tensor) -> Tensor:
    """Mean over the processes, without gradient; equal slices make it the whole batch's."""
    return total(value) / world()


def gather(value: Tensor) -> Tensor:
    """Rows of all processes, (world * B, ...), in the order of the whole batch."""
    if world() == 1:
        return value
    rows = [torch.empty_like(value) for _ in range(world())]
    dist.all_gather(rows, value.contiguous())
    return torch.cat(rows)


def share(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's rows of what `draw` makes for the whole batch.

    All generators stay in step, since each draws everything.
    """
    if world() == 1:
        return draw(rows)
    return draw(rows * world())[rank() * rows : (rank() + 1) * rows]


def average_gradients(parameters: Sequence[nn.Parameter]) -> None:
    """One all-reduce over all of them; what no process has a gradient for keeps none.

    Those of sharded parameters are averaged already, by FSDP (`vla_post.sharding`).
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if world() == 1 or not parameters:
        return
    device = parameters[0].device
    has = torch.tensor([p.grad is not None for p in parameters], device=device).int()
    dist.all_reduce(has)
    trained = [p for p, count in zip(parameters, has.tolist(), strict=True) if count]
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= world()
    for parameter, part in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        parameter.grad = part.view_as(parameter)


def tell(message: dict[str, Any] | None = None) -> dict[str, Any]:
    """The leader's message, in every process; JSON, so that nothing is unpickled.

    Args:
        message: of the leader; the others leave it out.
    """
    if world() == 1:
        assert message is not None
        return message
    text = json.dumps(message).encode() if rank() == 0 else b""
    size = torch.tensor([len(text)])
    dist.broadcast(size, 0)
    data = torch.zeros(int(size), dtype=torch.uint8)
    if rank() == 0:
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    dist.broadcast(data, 0)
    return json.loads(bytes(data.tolist()))


def device_for(device: str) -> str:
    """A process's own GPU where the policy runs on GPUs."""
    if world() > 1 and device.startswith("cuda"):
        return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    return device


@contextmanager
def together(processes: int = 1) -> Generator[None]:
    """Inside, this process trains with the others.

    Under torchrun (it sets RANK and WORLD_SIZE) it joins them. Otherwise it leads, and starts
    `processes - 1` more of the same command, which end with it.

    Raises:
        ValueError: fewer than one process.
    """
    if processes < 1:
        raise ValueError(f"processes is {processes}; it must be at least 1")
    children: list[subprocess.Popen[bytes]] = []
    joins = int(os.environ.get("WORLD_SIZE", "1")) > 1
    if not joins and processes == 1:
        yield
        return
    environment = dict(os.environ)
    if not joins:
        environment |= {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(processes),
        }
        command = [sys.executable, "-m", "vla_post.cli.main", *sys.argv[1:]]
        for number in range(1, processes):
            mine = environment | {"RANK": str(number), "LOCAL_RANK": str(number)}
            # In sessions of their own: Ctrl-C is for the leader, which tells the others.
            children.append(subprocess.Popen(command, env=mine, start_new_session=True))
        environment |= {"RANK": "0", "LOCAL_RANK": "0"}
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    address = f"tcp://{environment['MASTER_ADDR']}:{environment['MASTER_PORT']}"
    try:
        dist.init_process_group(
            backend,
            init_method="env://" if joins else address,
            rank=int(environment["RANK"]),
            world_size=int(environment["WORLD_SIZE"]),
            timeout=PATIENCE,
        )
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        for child in children:
            try:
                child.wait(30)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def free_port() -> int:
    """A port of this machine that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
