"""Batched closed-loop episodes: the rules of chunks, takeovers and recording."""

import numpy as np
import pytest

import sim
from sim.cell import make_cell
from sim.expert import make_expert
from sim.operator import OperatorConfig
from sim.rollout import Case, rollout
from trajectory_store import Source, load_contract

STATE = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
PIXELS = load_contract(sim.CONTRACTS / "metaworld_pixels.yaml")
ENVIRONMENT = "observation.environment_state"


class Oracle:
    """A policy that repeats the expert's command for its whole chunk; reads vectors only."""

    def __init__(self) -> None:
        self.experts = {STATE.tasks[t].instruction: make_expert(STATE, t) for t in STATE.tasks}
        self.batches: list[int] = []

    def __call__(self, observation: dict[str, np.ndarray], instruction: list[str]) -> np.ndarray:
        self.batches.append(len(instruction))
        scenes = observation[ENVIRONMENT].astype(np.float64)
        assert scenes.shape == (len(instruction), 25)
        now = np.pad(scenes, ((0, 0), (0, 2)))
        commands = [
            self.experts[text].act(scene) for text, scene in zip(instruction, now, strict=True)
        ]
        return np.repeat(np.array(commands)[:, None], STATE.chunk_horizon, axis=1)


def shaky(
    observation: dict[str, np.ndarray], instruction: list[str], seeds: np.ndarray
) -> np.ndarray:
    return np.stack(
        [np.random.default_rng(s).uniform(-1, 1, (STATE.chunk_horizon, 4)) for s in seeds]
    )


def test_results_come_in_order_and_do_not_depend_on_the_number_of_slots():
    cases = [Case(task, seed) for seed in range(3) for task in ("reach", "door-open", "push")]
    alone = rollout(Oracle(), STATE, cases, slots=1)
    oracle = Oracle()
    together = rollout(oracle, STATE, cases, slots=6)
    assert [r.case for r in together] == cases
    assert max(oracle.batches) == 6
    for a, b in zip(alone, together, strict=True):
        assert (a.success, a.steps, a.inferences) == (b.success, b.steps, b.inferences)
    assert np.mean([r.success for r in together]) > 0.7
    for result in together:
        assert result.inferences == -(-result.steps // STATE.execute_steps)


def test_noise_seeds_make_an_episode_independent_of_its_batch():
    cases = [Case("reach", seed) for seed in range(5)]
    alone = rollout(shaky, STATE, cases[3:4], record=True)[0].episode
    together = rollout(shaky, STATE, cases, record=True)[3].episode
    assert alone is not None
    assert together is not None
    np.testing.assert_array_equal(alone.action, together.action)
    np.testing.assert_array_equal(alone.observation[ENVIRONMENT], together.observation[ENVIRONMENT])


def test_two_policies_meet_the_same_scenes():
    cases = [Case("reach", seed, name) for seed in range(3) for name in ("good", "shaky")]
    results = rollout({"good": Oracle(), "shaky": shaky}, STATE, cases, record=True)
    for good, bad in zip(results[::2], results[1::2], strict=True):
        assert good.episode is not None
        assert bad.episode is not None
        first = [r.observation[ENVIRONMENT][0] for r in (good.episode, bad.episode)]
        np.testing.assert_array_equal(*first)
    assert sum(r.success for r in results[::2]) > sum(r.success for r in results[1::2])


def test_a_recorded_episode_replays_to_the_same_scene():
    episode = rollout(Oracle(), STATE, [Case("push", 5)], record=True)[0].episode
    assert episode is not None
    cell = make_cell(STATE, "push")
    cell.reset(seed=5)
    for k, action in enumerate(episode.action):
        np.testing.assert_array_equal(cell.vector(ENVIRONMENT), episode.observation[ENVIRONMENT][k])
        # Sent commands are float64, rows float32; the simulator rounds to float32 as well.
        cell.step(action)
        assert cell.task_reward == pytest.approx(episode.task_reward[k], abs=1e-5)
    assert cell.success == episode.success


def test_takeover_and_hand_back_are_labelled_row_by_row():
    config = OperatorConfig(patience=4, window=4, reaction_delay=2, min_drive=8, recovered=3)
    results = rollout(
        shaky, STATE, [Case("door-open", seed) for seed in range(3)], operator=config, record=True
    )
    for result in results:
        episode = result.episode
        assert episode is not None
        assert result.takeovers == episode.takeovers >= 1
        human = episode.source == Source.HUMAN
        assert human.sum() == result.human_steps > 0
        assert episode.human_share == result.human_share
        np.testing.assert_array_equal(np.isfinite(episode.action_human).all(axis=1), human)
        np.testing.assert_array_equal(episode.action[human], episode.action_human[human])
        policy = episode.source == Source.POLICY
        np.testing.assert_array_equal(
            episode.action[policy], np.clip(episode.action_policy[policy], -1, 1)
        )
        # Never straight back: between human and policy there is a HOLD row, then a new chunk.
        for k in np.flatnonzero(human[:-1] & ~human[1:]):
            assert episode.source[k + 1] == Source.HOLD
            np.testing.assert_array_equal(episode.action[k + 1, :3], 0)
            if k + 2 < len(episode) and episode.source[k + 2] == Source.POLICY:
                assert episode.chunk_step[k + 2] == 0
                assert episode.chunk_id[k + 2] > episode.chunk_id[: k + 2].max()


def test_wrong_policies_are_refused():
    case = [Case("reach", 0)]
    with pytest.raises(KeyError, match="other"):
        rollout({"one": shaky}, STATE, [Case("reach", 0, "other")])
    with pytest.raises(ValueError, match=r"returned shape \(1, 2, 4\)"):
        rollout(lambda o, i: np.zeros((len(i), 2, 4)), STATE, case)
    with pytest.raises(ValueError, match="NaN"):
        rollout(lambda o, i: np.full((len(i), 8, 4), np.nan), STATE, case)


@pytest.mark.pixels
def test_images_reach_the_policy_as_they_are_recorded():
    key = "observation.images.corner"
    seen: list[np.ndarray] = []

    def policy(observation: dict[str, np.ndarray], instruction: list[str]) -> np.ndarray:
        assert observation[key].shape == (1, 64, 64, 3)
        assert observation[key].dtype == np.uint8
        seen.append(observation[key][0].copy())
        return np.full((1, PIXELS.chunk_horizon, 4), 0.3)

    result = rollout(policy, PIXELS, [Case("drawer-open", 1)], record=True, frames_every=50)[0]
    episode = result.episode
    assert episode is not None
    assert len(seen) == result.inferences == 25
    assert len(episode.jpeg[key]) == len(episode) == 200
    from sim.camera import decode_jpeg

    for number, image in enumerate(seen):
        np.testing.assert_array_equal(image, decode_jpeg(episode.jpeg[key][8 * number]))
    assert len(set(episode.jpeg[key])) <= 50  # 20 Hz for 2.5 s
    assert [f.shape for f in result.frames] == [(240, 320, 3)] * 5
