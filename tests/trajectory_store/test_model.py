"""Random operations beside a plain list of episodes: append, end, flush, reopen, crash, edit."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from trajectory_store import Contract, Outcome, Source, Store, StoreWriter, Tick, maintenance
from trajectory_store.contract import parse_contract

WRIST, STATE = "observation.images.wrist", "observation.state"
CONTRACT: Contract | None = None


class StoreBesideAModel(RuleBasedStateMachine):
    """`model` is what was appended; what is committed is always a prefix of it."""

    @initialize()
    def begin(self) -> None:
        assert CONTRACT is not None
        self.folder = Path(tempfile.mkdtemp())
        self.model: list[dict[str, Any]] = []
        self.clock = 0
        self.safe = 0
        """Ticks that a flush has promised."""
        self.open()

    def open(self) -> None:
        # The hour-long interval leaves every commit to the rules.
        self.writer = StoreWriter.create_or_open(
            self.folder / "store",
            CONTRACT,
            commit_interval_s=3600,
            spool=self.folder / "spool",
        )

    @property
    def running(self) -> bool:
        return bool(self.model) and self.model[-1]["outcome"] is None

    @precondition(lambda self: not self.running)
    @rule(task=st.sampled_from(["pick", "place"]))
    def begin_episode(self, task: str) -> None:
        uuid = self.writer.begin_episode(task)
        self.model.append({"uuid": uuid, "task": task, "rows": [], "outcome": None, "gone": False})

    @precondition(lambda self: self.running)
    @rule(
        n=st.integers(1, 40),
        source=st.sampled_from(list(Source)),
        frame=st.one_of(st.none(), st.integers(0, 3)),
    )
    def append(self, n: int, source: Source, frame: int | None) -> None:
        for _ in range(n):
            self.clock += 1
            values = np.array([self.clock, frame or 0, source], np.float32)
            observation: dict[str, Any] = {STATE: values}
            if frame is not None:
                observation[WRIST] = np.full((4, 4, 3), frame * 60, np.uint8)
            self.writer.append(
                Tick(
                    observation=observation, action=-values[:2], source=source, stamp_ns=self.clock
                )
            )
            before = self.model[-1]["rows"][-1][2] if self.model[-1]["rows"] else None
            self.model[-1]["rows"].append((values, source, before if frame is None else frame * 60))

    @precondition(lambda self: self.running)
    @rule(outcome=st.sampled_from(list(Outcome)))
    def end_episode(self, outcome: Outcome) -> None:
        self.writer.end_episode(outcome)
        self.model[-1]["outcome"] = outcome

    @rule()
    def flush(self) -> None:
        self.writer.flush()
        self.safe = sum(len(e["rows"]) for e in self.model)

    @rule()
    def close_and_reopen(self) -> None:
        if self.running:
            self.model[-1]["outcome"] = Outcome.INTERRUPTED
        self.writer.close()
        self.safe = sum(len(e["rows"]) for e in self.model)
        self.open()

    @rule()
    def crash_and_reopen(self) -> None:
        """The process dies: what was not committed is gone, a running episode is interrupted."""
        with self.writer._mutex:
            self.writer._closed = True
            self.writer._mutex.notify_all()
        self.writer._thread.join()
        self.writer._lock.release()
        self.open()
        table = Store(self.folder / "store").table
        rows = sum(len(e) for e in table)
        assert rows >= self.safe
        self.model = self.model[: len(table)]
        for mine, e in zip(self.model, table, strict=True):
            mine["rows"] = mine["rows"][: len(e)]
            if mine["outcome"] is None or (e.outcome == "interrupted" and mine is self.model[-1]):
                mine["outcome"] = Outcome.INTERRUPTED
        self.safe = rows

    @precondition(lambda self: any(e["outcome"] for e in self.model))
    @rule(pick=st.integers(0, 10**6), hide=st.booleans(), outcome=st.sampled_from(list(Outcome)))
    def edit(self, pick: int, hide: bool, outcome: Outcome) -> None:
        self.close_and_reopen()
        self.writer.close()
        if self.model:
            mine = self.model[pick % len(self.model)]
            change = maintenance.delete if hide else maintenance.undelete
            change(self.folder / "store", [mine["uuid"]])
            maintenance.relabel(self.folder / "store", [mine["uuid"]], outcome=outcome)
            mine["gone"], mine["outcome"] = hide, outcome
        self.open()

    @invariant()
    def store_is_a_prefix_of_the_model(self) -> None:
        store = Store(self.folder / "store")
        assert store.rows >= self.safe
        for mine, e in zip(self.model, store.table, strict=False):
            assert (e.uuid, e.task, e.deleted) == (mine["uuid"], mine["task"], mine["gone"])
            rows = mine["rows"][: len(e)]
            assert len(rows) == len(e)
            if rows:
                np.testing.assert_array_equal(store.read(STATE, e), [r[0] for r in rows])
                np.testing.assert_array_equal(store.read("action", e), [-r[0][:2] for r in rows])
                assert store.read("source", e).tolist() == [r[1] for r in rows]
                seen = [i for i, r in enumerate(rows) if r[2] is not None]
                pixels = store.read(WRIST, np.array(seen, int) + e.first_row)[:, 0, 0, 0]
                assert pixels.tolist() == [rows[i][2] for i in seen]
            if e.outcome is not None:
                assert e.outcome == mine["outcome"]
                assert len(e) == len(mine["rows"])

    def teardown(self) -> None:
        if hasattr(self, "writer"):
            self.writer.close()
            shutil.rmtree(self.folder)


def _run(contract: Contract, examples: int) -> None:
    global CONTRACT
    camera = (
        '"observation.images.wrist":{"topic":"w","type":"sensor_msgs/Image","shape":[4,4,3],'
        '"unit":"rgb8","codec":"raw"},'
    )
    CONTRACT = parse_contract(
        contract.to_json().replace('"observations":{', '"observations":{' + camera)
    )
    run_state_machine_as_test(
        StoreBesideAModel,
        settings=settings(
            max_examples=examples,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_random_operations(contract):
    _run(contract, 12)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_random_operations_at_length(contract):
    _run(contract, 400)
