"""Messages of two episodes that cross each other must not stop the cell."""

import numpy as np

from robot_bridge.core.arbiter import Arbiter
from robot_bridge.core.modes import Mode

from .cells import one_axis

CONTRACT = one_axis()
TICK = CONTRACT.dt_ns


def offer(arbiter: Arbiter, tick: int) -> str:
    return arbiter.offer_chunk(tick * TICK, ["dx"], np.full((8, 1), 0.5), "1#1", tick * TICK)


def test_a_chunk_of_the_current_tick_survives_the_resume_that_it_overtook():
    arbiter = Arbiter(CONTRACT, lockstep=True)
    arbiter.joint_state(10 * TICK, np.zeros(1), None, 0.0)
    assert offer(arbiter, 10) == ""
    assert arbiter.resume(10 * TICK, 0.0).success
    assert arbiter.waits_for(10 * TICK, 0.0, operator_attached=False) == ""
    decision = arbiter.tick(10 * TICK, 0.0, operator_attached=False)
    assert decision is not None
    assert (arbiter.mode, decision.label) == (Mode.POLICY, "policy:1#1")


def test_an_older_chunk_does_not():
    arbiter = Arbiter(CONTRACT, lockstep=True)
    arbiter.joint_state(10 * TICK, np.zeros(1), None, 0.0)
    assert offer(arbiter, 9) == ""
    assert arbiter.resume(10 * TICK, 0.0).success
    assert arbiter.waits_for(10 * TICK, 0.0, operator_attached=False) == "a chunk"
