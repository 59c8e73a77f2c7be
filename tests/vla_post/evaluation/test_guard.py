"""The guard's false alarms and speed by simulation, and what it does to a real registry."""

import numpy as np
import pytest
from safetensors.numpy import save_file
from scipy.stats import beta

import sim
from trajectory_store import FleetView, StoreWriter, load_contract
from vla_post.evaluation.guard import (
    Guard,
    GuardConfig,
    Rates,
    alarm,
    log_evidence,
    upper_bound,
)
from vla_post.export.registry import Registry
from vla_post.policies.checkpoint import write_card


def test_evidence_is_the_mean_of_the_likelihood_ratio():
    # By quadrature of (G2): 3 bad of 5 against a bound of 0.2.
    p = (np.arange(200_000) + 0.5) / 200_000 * 0.8 + 0.2
    ratio = (p / 0.2) ** 3 * ((1 - p) / 0.8) ** 2
    assert log_evidence(3, 5, 0.2) == pytest.approx(np.log(ratio.mean()), abs=1e-6)
    assert log_evidence(0, 0, 0.3) == pytest.approx(0.0)
    assert log_evidence(0, 400, 0.999) < -2000  # no underflow on the way
    assert log_evidence(400, 400, 0.001) > 1000
    with pytest.raises(ValueError, match="bound is 1"):
        log_evidence(1, 1, 1.0)
    # One more bad episode is never less evidence, one more good one never more.
    for bad, n in ((0, 3), (2, 7), (9, 10)):
        assert log_evidence(bad + 1, n + 1, 0.3) > log_evidence(bad, n, 0.3)
        assert log_evidence(bad, n + 1, 0.3) < log_evidence(bad, n, 0.3)


def test_clopper_pearson():
    assert upper_bound(0, 10, 0.05) == pytest.approx(1 - 0.05**0.1)
    assert upper_bound(10, 10, 0.05) == 1.0
    assert upper_bound(3, 20, 0.0125) == pytest.approx(beta.ppf(0.9875, 4, 17))


def simulated_alarms(
    before: float, now: float, *, runs: int, baseline: int, episodes: int, seed: int
) -> np.ndarray:
    """Episode at which each run raises an alarm about interventions; 0 for never.

    Only the count of bad episodes matters, so its evidence is a table.
    """
    config = GuardConfig()
    level = config.false_alarm / 4
    rng = np.random.default_rng(seed)
    first = rng.binomial(baseline, before, runs)
    bad = np.cumsum(rng.random((runs, episodes)) < now, axis=1)
    out = np.zeros(runs, int)
    for k in np.unique(first):
        bound = upper_bound(int(k), baseline, level) + config.margin
        rows = np.flatnonzero(first == k)
        if bound >= 0.999:
            continue
        table = np.array(
            [
                [log_evidence(min(s, n), n, bound) for s in range(episodes + 1)]
                for n in range(1, episodes + 1)
            ]
        )
        over = table[np.arange(episodes), bad[rows]] >= -np.log(level)
        out[rows] = np.where(over.any(1), over.argmax(1) + 1, 0)
    return out


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_false_alarms_stay_below_what_is_stated(rate):
    """The rate rises by exactly the margin; one looks after each of 100 episodes.

    One of the two statistics, so half of the stated 5 % is its share.
    """
    runs = 2000
    alarms = simulated_alarms(rate, rate + 0.1, runs=runs, baseline=40, episodes=100, seed=3)
    share = np.mean(alarms > 0)
    assert share <= 0.025 + 3 * np.sqrt(0.025 * 0.975 / runs)


def test_a_broken_version_is_seen_within_a_dozen_episodes():
    alarms = simulated_alarms(0.1, 1.0, runs=300, baseline=40, episodes=30, seed=4)
    assert (alarms > 0).all()
    assert alarms.max() <= 12
    worse = simulated_alarms(0.1, 0.7, runs=300, baseline=40, episodes=60, seed=5)
    assert np.mean(worse > 0) > 0.9


def test_alarm_says_which_rate_rose():
    config = GuardConfig()
    fine = Rates(40, 4, 8)
    assert alarm(fine, Rates(30, 3, 6), config) == ""
    assert alarm(fine, Rates(0, 0, 0), config) == ""
    assert "interventions in 20 of 20 episodes, 8 of 40 before" in alarm(
        fine, Rates(20, 2, 20), config
    )
    assert alarm(fine, Rates(20, 18, 8), config).startswith("failures in 18 of 20")
    # Where people always helped, more help cannot be told apart; failures still can.
    assert "failures" in alarm(Rates(40, 0, 40), Rates(12, 12, 12), config)
    assert alarm(Rates(40, 0, 40), Rates(40, 0, 40), config) == ""
    for wrong in (
        {"margin": 1.0},
        {"false_alarm": 0.0},
        {"baseline_least": 0},
        {"accept_after": 0},
    ):
        with pytest.raises(ValueError, match="expected"):
            GuardConfig(**wrong)


class Fleet:
    """A registry with versions and a store into which episodes of a version are written."""

    def __init__(self, folder) -> None:
        self.contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
        self.folder = folder
        self.registry = Registry(folder / "registry")
        self.writer = StoreWriter.create_or_open(
            folder / "stores" / "a", self.contract, durability="process"
        )
        self._made = 0

    def publish(self, promote: bool = True) -> int:
        self._made += 1
        checkpoint = self.folder / f"checkpoint-{self._made}"
        checkpoint.mkdir()
        save_file({"w": np.full(3, float(self._made))}, checkpoint / "model.safetensors")
        write_card(checkpoint, kind="test", contract=self.contract, statistics={})
        version = self.registry.publish(checkpoint, contract=self.contract, promote=promote)
        return version.number

    def play(self, version: int, n: int, *, intervened: bool = False, outcome: str = "success"):
        sources = np.array([0, 0, 1, 1 if intervened else 0, 0]) * int(intervened)
        observation = {k: np.zeros((5, *f.shape)) for k, f in self.contract.vectors.items()}
        for _ in range(n):
            self.writer.write_episode(
                next(iter(self.contract.tasks)),
                observation,
                np.zeros((5, self.contract.action.size)),
                outcome=outcome,
                source=sources,
                policy_version=version,
            )
        self.writer.flush()

    def guard(self, **config) -> Guard:
        return Guard(self.registry, FleetView(self.folder / "stores"), GuardConfig(**config))


@pytest.fixture
def fleet(tmp_path):
    fleet = Fleet(tmp_path)
    yield fleet
    fleet.writer.close()


def test_a_worse_version_is_taken_back_and_a_good_one_kept(fleet):
    one = fleet.publish()
    fleet.play(one, 8)
    guard = fleet.guard(accept_after=15)
    fleet.play(one, 12)
    assert guard.look().action == "watches"
    two = fleet.publish()
    fleet.play(two, 15)
    assert guard.look().action == "accepted"
    three, four = fleet.publish(), fleet.publish()  # the second comes before the first is judged
    assert fleet.registry.active().number == four
    fleet.play(three, 2, intervened=True)
    assert guard.look().action == "watches"
    fleet.play(four, 8, outcome="aborted")  # says nothing about the policy
    assert guard.look().now == Rates(2, 0, 2)
    fleet.play(four, 8, intervened=True)
    verdict = guard.look()
    assert verdict.action == "rolled back"
    assert verdict.version == four
    assert "interventions in 10 of 10 episodes, 0 of 35 before" in verdict.reason
    assert fleet.registry.active().number == two
    assert fleet.registry.pinned
    assert verdict.reason in fleet.registry.history()[-1]["reason"]
    assert guard.look().action == "watches"


def test_canaries_are_sent_out_promoted_and_withdrawn(fleet):
    one = fleet.publish()
    guard = fleet.guard(canary_share=0.25, accept_after=12)
    two = fleet.publish(promote=False)
    assert guard.look().action == "waits"  # nothing to compare with yet
    fleet.play(one, 20)
    assert guard.look().action == "canary"
    assert fleet.registry.canary.version == two
    three = fleet.publish()  # pinned: waits for the guard
    assert fleet.registry.active().number == one
    fleet.play(two, 12)
    fleet.play(one, 12, intervened=True)  # of other cells, after the canary began: not the baseline
    assert guard.look().action == "promoted"
    assert fleet.registry.active().number == two
    assert guard.look().action == "canary"
    fleet.play(three, 12, outcome="failure")
    assert guard.look().action == "withdrew"
    assert fleet.registry.active().number == two
    assert fleet.registry.rejected == [three]
    assert guard.look().reason == "nothing new"  # it is not tried again


def test_guard_command(fleet, capsys):
    import json

    from vla_post.cli.main import main

    one = fleet.publish()
    fleet.play(one, 3)
    words = [
        "registry",
        "guard",
        str(fleet.registry.root),
        "--stores",
        str(fleet.folder / "stores"),
    ]
    main([*words, "--once"])
    assert json.loads(capsys.readouterr().out)["action"] == "watches"
    with pytest.raises(SystemExit):
        main([*words, "--once", "--margin", "2"])
    assert "margin is 2.0" in capsys.readouterr().err
