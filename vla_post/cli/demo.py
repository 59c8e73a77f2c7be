"""`vla-post demo`: the closed loop on a simulated cell, from a weak policy to a report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The whole loop on a simulated cell: work, correct, learn, adopt, compare, export, report.

    Starts the robot side as a real ROS 2 graph in processes of their own, a learner beside it, and
    ends with a paired evaluation of the first against the last policy version.
    """

    policy: Literal["pixels", "state"] = "pixels"
    """pixels: a tiny SmolVLA on three tasks from one camera. state: a small flow policy on one."""
    seed: int = 0
    """Of the scenes, the operator's hand and the learner."""
    episodes: int | None = None
    """How many the robot works through; the recipe's number by default."""
    evaluation_episodes: int | None = None
    """Paired scenes of the final comparison, over all tasks; the recipe's number by default."""
    learn_s: float = 300.0
    """Wall time after which the robot's session ends, however many episodes it has played."""
    out: Path | None = None
    """Run folder; runs/DATE-TIME-POLICY by default."""
    export: bool = True
    """Export the last version to ONNX and compare it with PyTorch."""
    console: bool = True
    """Serve the web console while the robot works; its address is printed. Watching costs CPU time
    that the learner would have had."""
    keep_going: bool = False
    """Use a run folder that exists already, overwriting what is in it."""

    def __post_init__(self) -> None:
        for name in ("episodes", "evaluation_episodes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.learn_s <= 0:
            raise ValueError(f"learn_s is {self.learn_s}; it must be above 0")

    def run(self) -> None:
        from vla_post.cli.closed_loop import ClosedLoop

        ClosedLoop(self).run()
