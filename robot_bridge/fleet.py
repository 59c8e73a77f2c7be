"""Several simulated cells of one contract, each in a namespace of its own, and few operators.

Like `cell_nodes`, this is data: `vla-post fleet` starts it as processes, `fleet.launch.py` as
launch_ros nodes.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from robot_bridge.bringup import CellConfig, NodeSpec, Value, cell_nodes
from trajectory_store.contract import load_contract
from trajectory_store.repository import normalise

HIGHEST_DOMAIN = 101
"""Above it, DDS needs ports that the kernel also hands out to others."""


@dataclass(frozen=True, kw_only=True)
class FleetConfig:
    """N cells and M operators."""

    cell: CellConfig
    """What runs on each; `store`, `bag`, `events_log` and `shadow_log` are folders here, with an
    entry for each cell. `console` is one for all of them."""
    cells: int = 2
    operators: int = 0
    """People who share the cells: takeovers queue. 0, or as many as cells: everybody has one."""
    first_domain: int | None = None
    """Cell i gets ROS domain `first_domain` + i. None: all share the domain of the environment."""
    figures: Path | None = None
    """A file that gets how busy the operators were and how long cells waited for them."""

    def __post_init__(self) -> None:
        if self.cells < 1 or self.operators < 0:
            raise ValueError(
                f"cells is {self.cells} and operators {self.operators}; a fleet has at least one "
                "cell, and 0 operators means one for each"
            )
        if not self.cell.simulated:
            raise ValueError("a fleet is of simulated cells; bring real ones up one by one")
        if self.first_domain is not None:
            last = self.first_domain + self.cells - 1
            if self.first_domain < 0 or last > HIGHEST_DOMAIN:
                raise ValueError(
                    f"domains {self.first_domain} to {last}; they must lie in 0..{HIGHEST_DOMAIN}"
                )
            if self.shared:
                raise ValueError(
                    "operators who share cells need all of them in one ROS domain; drop "
                    "first_domain, or give every cell an operator"
                )
            if self.cell.console is not None and self.cells > 1:
                raise ValueError(
                    f"a console sees one ROS domain, and first_domain gives the {self.cells} cells "
                    "one each; leave the console out (console:=false, --no-console), or drop "
                    "first_domain"
                )

    @property
    def shared(self) -> bool:
        return self.cell.operator is not None and 0 < self.operators < self.cells

    @property
    def namespaces(self) -> list[str]:
        name = self.cell.namespace.strip("/") or load_contract(self.cell.contract).cell
        return [f"/{name}_{i}" for i in range(self.cells)]


def fleet_nodes(config: FleetConfig) -> list[NodeSpec]:
    """Of all cells; names are CELL/NODE.

    Each cell has a clock of its own at /CELL/clock, since two robots cannot share /clock.

    Raises:
        ContractError: the contract is missing or wrong.
    """
    specs: list[NodeSpec] = []
    for i, namespace in enumerate(config.namespaces):
        name = namespace.strip("/")
        operator = None
        if config.cell.operator is not None:
            seed = int(str(config.cell.operator.get("seed", 0))) + 10_000 * i
            operator = dict(config.cell.operator) | {"seed": seed}
            if config.shared:
                operator["shared_attention"] = True

        def own(folder: Path | None, suffix: str = "", name: str = name) -> Path | None:
            return None if folder is None else folder / f"{name}{suffix}"

        cell = replace(
            config.cell,
            namespace=namespace,
            operator=operator,
            console=None,
            store=own(config.cell.store),
            bag=own(config.cell.bag),
            events_log=own(config.cell.events_log, ".jsonl"),
            shadow_log=own(config.cell.shadow_log, ".jsonl"),
            remappings=dict(config.cell.remappings) | {"/clock": f"{namespace}/clock"},
        )
        environment = (
            {} if config.first_domain is None else {"ROS_DOMAIN_ID": str(config.first_domain + i)}
        )
        specs += [
            replace(spec, name=f"{name}/{spec.name}", environment=environment)
            for spec in cell_nodes(cell)
        ]
    if config.shared:
        figures = {} if config.figures is None else {"figures": str(config.figures.resolve())}
        specs.append(
            NodeSpec(
                name="fleet/attention",
                module="sim.nodes.attention",
                namespace="/fleet",
                parameters={"operators": config.operators} | figures,
            )
        )
    if config.cell.console is not None:
        specs.append(_console(config))
    return specs


def _console(config: FleetConfig) -> NodeSpec:
    """One for all cells."""
    cell = config.cell
    shown: dict[str, Value] = {
        name: normalise(place)
        for name, place in (("store", cell.store), ("registry", cell.registry))
        if place is not None
    }
    domain = config.first_domain
    return NodeSpec(
        name="fleet/console",
        module="robot_bridge.nodes.console",
        namespace="/fleet",
        parameters={"contract": str(cell.contract.resolve()), "cells": config.namespaces}
        | shown
        | dict(cell.console or {}),
        remappings=cell.remappings,
        environment={} if domain is None else {"ROS_DOMAIN_ID": str(domain)},
        essential=False,
    )
