"""The registry on a real S3 server: atomic, hashed, small to send, and there when the network is
not."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save, save_file

from trajectory_store.contract import Contract, load_contract
from vla_post.export.bucket import BucketRegistry, _Objects
from vla_post.export.delta import NoDelta, decode, encode
from vla_post.export.registry import Registry, RegistryError, VersionDamaged, open_registry
from vla_post.policies.checkpoint import write_card

CONTRACT = Path(__file__).parents[3] / "sim" / "contracts" / "metaworld_state.yaml"
ROOT = "s3://fleet/registry"


@pytest.fixture(scope="module")
def contract() -> Contract:
    return load_contract(CONTRACT)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def robot(s3, tmp_path):
    """Opens the registry as another machine would, with a cache of its own."""

    def go(name: str) -> BucketRegistry:
        return BucketRegistry(ROOT, cache=tmp_path / f"cache-{name}")

    return go


def weights(seed: int = 0, **changes: np.ndarray) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    base = {
        "backbone": rng.normal(size=(128, 256)).astype(np.float32),
        "head": rng.normal(size=(64, 16)).astype(np.float32),
        "steps": np.arange(5),
    }
    return base | changes


def checkpoint(folder: Path, contract: Contract, tensors: dict[str, np.ndarray]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    write_card(folder, kind="test", contract=contract, statistics={})
    return folder


def test_delta_is_exact_for_every_bit_pattern():
    rng = np.random.default_rng(3)
    for kind in (np.float32, np.float16, np.float64, np.int32, np.uint8, np.bool_):
        if kind is np.bool_:
            raw = [rng.integers(0, 2, 4096, dtype=np.uint8).view(kind) for _ in range(2)]
        else:
            size = 4096 * np.dtype(kind).itemsize
            raw = [rng.integers(0, 256, size, dtype=np.uint8).view(kind) for _ in range(2)]
        base, new = (save({"same": np.ones(7, np.float32), "w": r}) for r in raw)
        assert decode(base, encode(base, new)) == new
    empty = save({"w": np.zeros((0, 3), np.float32)})
    assert decode(empty, encode(empty, empty)) == empty


def test_delta_is_small_where_little_moved_and_refused_where_tensors_differ():
    base = save(weights())
    rng = np.random.default_rng(1)
    moved = weights()["backbone"] * (1 + 1e-4 * rng.normal(size=(128, 256))).astype(np.float32)
    everything = encode(base, save(weights(backbone=moved)))
    assert len(everything) < 0.5 * len(base)
    head_only = encode(base, save(weights(head=rng.normal(size=(64, 16)).astype(np.float32))))
    assert len(head_only) < 0.05 * len(base)
    for other in (save({"head": weights()["head"]}), b"", b"\xff" * 64, b"no file"):
        with pytest.raises(NoDelta):
            encode(base, other)
    with pytest.raises(NoDelta, match="not a difference"):
        decode(base, base)
    with pytest.raises(NoDelta, match="another file"):
        decode(save({"x": weights()["head"]}), head_only)


def test_versions_travel_whole_or_as_differences_and_arrive_bit_for_bit(
    s3, tmp_path, contract, robot
):
    learner = open_registry(ROOT)
    rng = np.random.default_rng(0)
    folders, tensors = [], weights()
    for number in range(4):
        folders.append(checkpoint(tmp_path / str(number), contract, tensors))
        learner.publish(folders[-1], contract=contract, learner_step=number)
        step = (1 + 1e-3 * rng.normal(size=(128, 256))).astype(np.float32)
        tensors = tensors | {"backbone": tensors["backbone"] * step}
    late = robot("late")  # sees only the last: the base and one difference
    assert late.active() == learner.version(4)
    for number, folder in enumerate(folders, start=1):
        version = late.verify(number, contract=contract)
        assert version.files.keys() == {"model.safetensors", "vla_post.json"}
        for name in version.files:
            assert (late.path(number) / name).read_bytes() == (folder / name).read_bytes()
    stored = [v.stored["model.safetensors"] for v in late.versions()]
    whole = stored[0].removeprefix("files/")
    assert all(key.endswith(f"-{whole}") and key.startswith("deltas/") for key in stored[1:])
    sent = [v.sent_bytes for v in late.versions()]
    assert all(s < 0.6 * sent[0] for s in sent[1:]), sent
    # Another shape of network is sent whole, and becomes the base of what follows.
    other = checkpoint(tmp_path / "other", contract, {"w": rng.normal(size=(200, 200))})
    version = learner.publish(other, contract=contract)
    assert version.stored["model.safetensors"].startswith("files/")
    assert load_file(late.path(5) / "model.safetensors")["w"].shape == (200, 200)


def test_a_robot_goes_on_without_the_bucket_and_nobody_changes_it_blindly(
    s3, tmp_path, contract, robot
):
    learner, cell = open_registry(ROOT), robot("cell")
    for number in range(2):
        folder = checkpoint(tmp_path / str(number), contract, weights(number))
        learner.publish(folder, contract=contract)
    assert cell.active() == learner.version(2)
    cell.verify(2)
    s3.mode = "cut"
    assert cell.active() == learner.version(2)
    assert "did not answer" in cell.problem
    assert robot("cell").wanted("a").number == 2  # also after a restart of the robot's process
    with pytest.raises(RegistryError, match="did not answer"):
        cell.rollback()
    with pytest.raises(RegistryError, match="did not answer"):
        robot("new").active()
    s3.mode = "open"
    assert cell.rollback(reason="dropped it").number == 1
    assert learner.active().number == 1
    assert not cell.problem


def test_a_bucket_that_was_emptied_does_not_leave_its_versions_in_caches(
    s3, tmp_path, contract, robot
):
    for seed in range(2):
        learner = open_registry(ROOT)
        learner.publish(
            checkpoint(tmp_path / str(seed), contract, weights(seed)), contract=contract
        )
        cell = robot("cell")
        assert cell.active().number == 1
        cell.verify(1)
        found = load_file(cell.path(1) / "model.safetensors")
        np.testing.assert_array_equal(found["head"], weights(seed)["head"])
        for folder in ("versions", "files", "deltas", ""):
            for name, _ in learner._objects.list(folder):
                learner._objects.delete(f"{folder}/{name}" if folder else name)


def test_a_damaged_object_never_reaches_a_robot(s3, tmp_path, contract, robot):
    learner = open_registry(ROOT)
    learner.publish(checkpoint(tmp_path / "1", contract, weights()), contract=contract)
    whole = learner.version(1).stored["model.safetensors"]
    cell = robot("cell")
    cell.verify(1)
    # In the robot's own cache: fetched again.
    path = cell.path(1) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    assert cell.verify(1).number == 1
    # In the bucket: refused, by a robot that has nothing yet.
    good = learner._objects.get(whole)
    assert good is not None
    for bad in (good[:-1] + bytes([good[-1] ^ 1]), good[:100]):
        learner._objects.put(whole, bad)
        with pytest.raises(VersionDamaged, match="SHA-256 is not the manifest's"):
            robot(f"fresh-{len(bad)}").verify(1)
    learner._objects.delete(whole)
    with pytest.raises(VersionDamaged, match="missing"):
        robot("later").verify(1)
    assert list((tmp_path / "cache-later").glob("v*")) == []


PUBLISH = """
import sys
from trajectory_store.contract import load_contract
from vla_post.export.registry import open_registry
for _ in range(4):
    open_registry(sys.argv[1]).publish(sys.argv[2], contract=load_contract(sys.argv[3]))
"""


def test_publishers_at_the_same_time_take_different_numbers(s3, tmp_path, contract):
    folder = checkpoint(tmp_path / "a", contract, weights())
    words = [sys.executable, "-c", PUBLISH, ROOT, str(folder), str(CONTRACT)]
    publishers = [subprocess.Popen(words) for _ in range(2)]
    assert [p.wait(100) for p in publishers] == [0, 0]
    registry = open_registry(ROOT)
    assert [v.number for v in registry.versions()] == list(range(1, 9))
    # No entry of the history was overwritten by the other publisher's.
    published = [e["version"] for e in registry.history() if e["action"] == "publish"]
    assert sorted(published) == list(range(1, 9))


def test_a_lost_answer_makes_no_second_version(s3, tmp_path, contract, monkeypatch):
    registry = BucketRegistry("s3://fleet/registry")
    create = _Objects.create

    def twice(self: _Objects, key: str, data: bytes) -> bool:
        """As the client does when the first answer is lost."""
        create(self, key, data)
        return create(self, key, data)

    monkeypatch.setattr(_Objects, "create", twice)
    folder = checkpoint(tmp_path / "start", contract, weights())
    one = registry.publish(folder, contract=contract, publication="once")
    assert registry.numbers() == [1]
    # The publisher itself did not see the answer, and asks again.
    assert registry.publish(folder, contract=contract, publication="once") == one
    assert registry.numbers() == [1]
    assert registry.publish(folder, contract=contract, publication="other").number == 2


def test_prune_leaves_what_is_needed(s3, tmp_path, contract, robot, monkeypatch):
    monkeypatch.setattr("vla_post.export.bucket.YOUNG", -np.timedelta64(1, "h").astype(object))
    learner = open_registry(ROOT)
    for number in range(6):
        tensors = weights(head=np.full((64, 16), float(number), np.float32))
        learner.publish(checkpoint(tmp_path / str(number), contract, tensors), contract=contract)
    learner.start_canary(3, cells=["a"])
    assert learner.prune(keep=1) == [1, 2, 4]
    assert learner.numbers() == [3, 5, 6]  # the canary, where a rollback leads, the active one
    left = {f"{f}/{n}" for f in ("files", "deltas") for n, _ in learner._objects.list(f)}
    cell = robot("cell")
    for number in (3, 5, 6):
        cell.verify(number)
        assert set(cell.version(number).stored.values()) <= left
    assert len([key for key in left if key.startswith("deltas/")]) == 3
    with pytest.raises(RegistryError, match="no version v000001"):
        cell.verify(1)
    with pytest.raises(RegistryError, match="keep is 0"):
        learner.prune(keep=0)


@pytest.fixture(params=["folder", "bucket"])
def registry(request, tmp_path, contract) -> Registry:
    if request.param == "bucket":
        request.getfixturevalue("s3")
    registry = open_registry(ROOT if request.param == "bucket" else tmp_path / "registry")
    for number in range(3):
        folder = checkpoint(tmp_path / str(number), contract, weights(number))
        registry.publish(folder, contract=contract, promote=number < 2)
    return registry


def test_sop6_a_publication_that_is_completed_late_never_moves_robots_back(
    registry, tmp_path, contract, monkeypatch
):
    """The publisher died before the pointer moved; another one was quicker than its return."""
    folder = checkpoint(tmp_path / "late", contract, weights(9))

    class Killed(BaseException):
        pass

    def die(*_: object) -> None:
        raise Killed

    ran = [registry.wanted("cell_1").number]
    with monkeypatch.context() as patched:
        patched.setattr(Registry, "_change", die)
        patched.setattr(type(registry), "_change", die)
        with pytest.raises(Killed):
            registry.publish(folder, contract=contract, publication="late")
    late = registry.numbers()[-1]
    ran.append(registry.wanted("cell_1").number)
    newer = registry.publish(
        checkpoint(tmp_path / "newer", contract, weights(10)), contract=contract
    ).number
    ran.append(registry.wanted("cell_1").number)
    assert registry.publish(folder, contract=contract, publication="late").number == late
    ran.append(registry.wanted("cell_1").number)
    assert ran == sorted(ran)
    assert ran[-1] == newer > late
    told = [e["version"] for e in registry.history() if e["action"] == "publish"]
    assert told[-2:] == [newer, late]


def test_canary_on_a_share_of_the_cells(registry, tmp_path, contract):
    assert registry.active().number == 2
    with pytest.raises(RegistryError, match="beside itself"):
        registry.start_canary(2, share=0.5)
    for share in (0.0, 1.5):
        with pytest.raises(RegistryError, match="a canary needs"):
            registry.start_canary(3, share=share)
    canary = registry.start_canary(3, share=0.25, cells=["cell_7"], reason="try")
    cells = [f"cell_{i}" for i in range(400)]
    on = [c for c in cells if registry.canary.takes(c)]
    # 400 draws of 1/4: three standard errors are 0.065.
    assert abs(len(on) / 400 - 0.25) < 0.065
    assert "cell_7" in on
    assert registry.wanted("cell_7").number == 3
    assert registry.wanted(next(c for c in cells if c not in on)).number == 2
    # Publishing waits while a canary is out.
    folder = checkpoint(tmp_path / "4", contract, weights(4))
    assert registry.publish(folder, contract=contract).number == 4
    assert registry.active().number == 2
    assert registry.end_canary(reason="worse") == canary
    assert registry.rejected == [3]
    assert registry.wanted("cell_7").number == 2
    with pytest.raises(RegistryError, match="no canary"):
        registry.end_canary()
    registry.start_canary(4, share=1.0)
    registry.promote(4)
    assert registry.canary is None
    assert registry.wanted("cell_0").number == 4
    # A rollback is for all cells, and never leads to what was rejected.
    registry.promote(3)
    registry.promote(4)
    registry.start_canary(1, cells=["x"])
    assert registry.rollback().number == 3
    assert registry.wanted("x").number == 3
    assert registry.rejected == [4]
    assert [e["action"] for e in registry.history()][-2:] == ["canary", "rollback"]
    assert json.loads(json.dumps(registry.history()))
