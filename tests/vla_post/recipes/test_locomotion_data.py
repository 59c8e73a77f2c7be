"""`vla-post data`: same seed, same data; store and file agree; mistakes have names."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest

import sim
from sim.locomotion.config import PpoConfig
from trajectory_store import FleetView, Outcome, Store, StoreWriter
from trajectory_store.contract import load_contract
from vla_post.cli.main import main
from vla_post.convert.d4rl import from_stores
from vla_post.learners.uni_o4.data import BadTransitions, Transitions, check
from vla_post.recipes.locomotion import (
    AlreadyThere,
    ExtraMissing,
    LocomotionData,
    UnknownQuality,
    make_dataset,
)

TINY = PpoConfig(
    envs=2, rollout_steps=40, iterations=2, batch_size=20, epochs=2, evaluation_episodes=2
)
COMMAND = (
    *("data", "locomotion", "--env", "Hopper-v5", "--transitions", "120"),
    *("--medium-score", "-50", "--expert-score", "-40"),
    *("--ppo.envs", "2", "--ppo.rollout-steps", "40", "--ppo.iterations", "2"),
    *("--ppo.batch-size", "20", "--ppo.epochs", "2", "--ppo.evaluation-episodes", "2"),
)
ARRAYS = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "home-state"))


def quiet(_: str) -> None:
    pass


def test_medium_expert_is_written_twice_alike_and_store_and_file_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    for name in ("a", "b"):
        main([*COMMAND, "--quality", "medium-expert", "--out", str(tmp_path / name)])
    captured = capsys.readouterr()
    assert "Hopper-v5: 160 steps, return" in captured.err
    assert json.loads(captured.out[: captured.out.index("}\n{") + 1])["transitions"] == 240

    first, second = (Transitions.load(tmp_path / n / "transitions.hdf5") for n in "ab")
    for array in ARRAYS:
        np.testing.assert_array_equal(getattr(first, array), getattr(second, array))
    assert len(first) == 240
    assert first.terminals.any()
    assert first.timeouts.any()
    assert not (first.terminals & first.timeouts).any()
    inside = ~first.ends[:-1]
    np.testing.assert_array_equal(
        first.next_observations[:-1][inside], first.observations[1:][inside]
    )
    check(first, batch_size=64)

    # The store holds the same episodes; what an unfinished one led to is known to the file alone.
    store = Store(tmp_path / "a" / "store")
    np.testing.assert_array_equal(store.read("action", slice(None)), first.actions)
    np.testing.assert_array_equal(store.read("reward", slice(None)), first.rewards)
    np.testing.assert_array_equal(store.read("observation.state", slice(None)), first.observations)
    np.testing.assert_array_equal(store.read("terminated", slice(None)), first.terminals)
    np.testing.assert_array_equal(store.read("truncated", slice(None)), first.timeouts)
    outcomes = {e.outcome for e in store.episodes}
    assert outcomes <= {Outcome.FAILURE, Outcome.SUCCESS, Outcome.ABORTED}
    other = Store(tmp_path / "b" / "store")
    assert [e.uuid for e in other.episodes] == [e.uuid for e in store.episodes]
    back = from_stores(FleetView(tmp_path / "a" / "store"), reward="stored")
    assert int(back.terminals.sum()) == int(first.terminals.sum())
    assert len(back) == 240 - int(first.timeouts.sum())
    rows = ~first.timeouts
    np.testing.assert_array_equal(back.observations, first.observations[rows])
    followed = ~back.terminals
    np.testing.assert_array_equal(
        back.next_observations[followed], first.next_observations[rows][followed]
    )

    about = json.loads((tmp_path / "a" / "about.json").read_text())
    assert set(about["levels"]) == {"medium", "expert"}
    assert about["versions"]["stable-baselines3"]
    assert about["references"] == {"random": -20.272305, "expert": 3234.3}
    import h5py

    with h5py.File(tmp_path / "a" / "transitions.hdf5") as file:
        assert json.loads(str(file.attrs["about"])) == about
        assert set(ARRAYS) <= set(file)


def test_a_stopped_data_set_goes_on_and_a_finished_one_is_kept(tmp_path: Path):
    options = LocomotionData(env="Hopper-v5", quality="medium-replay", medium_score=-50.0, ppo=TINY)
    agent, out = tmp_path / "agent", tmp_path / "out"

    def stop(line: str) -> None:
        if line.startswith("writing"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_dataset(options, out, agent_folder=agent, say=stop)
    (out / "store").mkdir()  # half of a store, as a kill may leave it
    lines: list[str] = []
    about = make_dataset(options, out, agent_folder=agent, say=lines.append)
    assert len(lines) == 1  # nothing was trained again
    assert about["transitions"] == TINY.round_steps
    with pytest.raises(AlreadyThere, match="--force"):
        make_dataset(options, out, agent_folder=agent, say=quiet)
    again = make_dataset(options, out, agent_folder=agent, force=True, say=quiet)
    assert again == about

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").touch()
    with pytest.raises(AlreadyThere, match=r"thesis\.tex"):
        make_dataset(options, tmp_path / "mine", force=True, say=quiet)
    assert (tmp_path / "mine" / "thesis.tex").exists()
    with pytest.raises(AlreadyThere, match="is a file"):
        make_dataset(options, tmp_path / "mine" / "thesis.tex", say=quiet)


def test_a_full_length_run_is_a_timeout_in_the_file_and_a_success_in_the_store(tmp_path: Path):
    options = LocomotionData(
        env="HalfCheetah-v5", quality="medium", transitions=2000, medium_score=-50.0, ppo=TINY
    )
    about = make_dataset(options, tmp_path / "out", say=quiet)
    data = Transitions.load(tmp_path / "out" / "transitions.hdf5")
    assert not data.terminals.any()
    np.testing.assert_array_equal(np.flatnonzero(data.timeouts), [999, 1999])
    assert about["mean_return_of_whole_episodes"] == pytest.approx(
        data.episode_returns().mean(), rel=1e-4
    )
    episodes = Store(tmp_path / "out" / "store").episodes
    assert [(len(e), e.outcome) for e in episodes] == [(1000, Outcome.SUCCESS)] * 2


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["--env", "Ant-v5", "--quality", "medium"], "no locomotion environment 'Ant-v5'"),
        (["--transitions", "0", "--env", "Hopper-v5", "--quality", "medium"], "transitions is 0"),
        (["--env", "Hopper-v5", "--quality", "medium", "--expert-score", "9"], "the better one"),
    ],
)
def test_mistakes_are_one_line(
    words: list[str], found: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit) as ended:
        main(["data", "locomotion", *words, "--out", str(tmp_path / "x")])
    assert ended.value.code == 1
    error = capsys.readouterr().err
    assert found in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_unknown_quality_and_missing_packages_have_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with pytest.raises(UnknownQuality, match=r"'expert'.*medium, medium-replay, medium-expert"):
        LocomotionData(env="Hopper-v5", quality="expert")  # pyright: ignore[reportArgumentType]
    monkeypatch.setitem(sys.modules, "stable_baselines3", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'vla-post\[locomotion\]'"):
        make_dataset(LocomotionData(env="Hopper-v5", quality="medium"), tmp_path / "x", say=quiet)
    assert not (tmp_path / "x").exists()


def test_a_noisy_expert_on_a_cell_becomes_sparse_transitions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    contract = str(sim.CONTRACTS / "metaworld_state.yaml")
    words = ["data", "cell", "--contract", contract, "--tasks", "pick-place"]
    main([*words, "--noise", "1", "--episodes", "4", "--out", str(tmp_path / "s")])
    assert "of 4 episodes" in capsys.readouterr().out
    episodes = Store(tmp_path / "s").episodes
    successes = [e.outcome == Outcome.SUCCESS for e in episodes]
    assert 0 < sum(successes) < 4  # both kinds, with these seeds
    main(["data", "d4rl", str(tmp_path / "s"), "--out", str(tmp_path / "s.npz")])
    data = Transitions.load(tmp_path / "s.npz")
    # A success ends in a terminal with reward 1; a time-out loses its last step and has no reward.
    assert data.terminals.sum() == sum(successes)
    assert data.timeouts.sum() == 4 - sum(successes)
    assert len(data) == sum(len(e) - (not s) for e, s in zip(episodes, successes, strict=True))
    np.testing.assert_array_equal(data.rewards, data.terminals.astype(np.float32))
    assert data.state_size == 4 + 25
    np.testing.assert_array_equal(data.action_low, [-1, -1, -1, -1])
    inside = ~data.ends[:-1]
    np.testing.assert_array_equal(
        data.next_observations[:-1][inside], data.observations[1:][inside]
    )
    for bad, said in (
        ([str(tmp_path / "s"), "--out", str(tmp_path / "s.npz")], "nothing is overwritten"),
        ([str(tmp_path / "none"), "--out", str(tmp_path / "n.npz")], "stores in or under it"),
        (
            [str(tmp_path / "s"), "--task", "sew", "--out", str(tmp_path / "n.npz")],
            "recorded tasks: pick-place",
        ),
    ):
        with pytest.raises(SystemExit):
            main(["data", "d4rl", *bad])
        assert said in capsys.readouterr().err


def test_a_labelled_success_is_a_terminal_and_stores_of_two_cells_do_not_mix(tmp_path: Path):
    contract = load_contract(sim.CONTRACTS / "metaworld_state.yaml")
    vectors = {k: np.arange(3 * f.shape[0]).reshape(3, -1) for k, f in contract.vectors.items()}
    with StoreWriter.create_or_open(tmp_path / "s" / "one", contract) as writer:
        for outcome in (Outcome.SUCCESS, Outcome.ABORTED):
            writer.write_episode(
                "reach",
                vectors,
                np.zeros((3, 4)),
                outcome=outcome,
                terminated=np.zeros(3, bool),
                truncated=np.zeros(3, bool),
            )
    data = from_stores(FleetView(tmp_path / "s"))
    np.testing.assert_array_equal(data.rewards, [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(data.terminals, [0, 0, 1, 0, 0])
    np.testing.assert_array_equal(data.timeouts, [0, 0, 0, 0, 1])
    from sim.locomotion.facts import environment

    hopper = environment("Hopper-v5").contract()
    with StoreWriter.create_or_open(tmp_path / "s" / "two", hopper) as writer:
        writer.write_episode(
            "run", {"observation.state": np.zeros((2, 11))}, np.zeros((2, 3)), outcome="success"
        )
    with pytest.raises(BadTransitions, match=r"'hopper'.*'sawyer_state'|'sawyer_state'.*'hopper'"):
        from_stores(FleetView(tmp_path / "s"))
