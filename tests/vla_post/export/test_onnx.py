"""The exported file equals the policy, in both layouts and every precision, or is refused."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from safetensors.numpy import load_file, save_file

from trajectory_store.contract import ContractMismatch, load_contract
from vla_post.export.card import hashes, read_policy_card, write_policy_card
from vla_post.export.onnx import BOUNDS, ExportConfig, ExportError, export_policy
from vla_post.export.onnx_policy import OnnxPolicy
from vla_post.export.parity import compare
from vla_post.export.precision import change_precision
from vla_post.export.runtime import PolicyInputError, TorchPolicy, load_policy
from vla_post.policies.build import build_policy
from vla_post.policies.checkpoint import CheckpointError

pytestmark = pytest.mark.filterwarnings("ignore")

SHIPPED = Path(__file__).parents[3] / "sim" / "contracts"
CONTRACT = load_contract(SHIPPED / "metaworld_state.yaml")
TEXT = CONTRACT.tasks["reach"].instruction


def observation(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        key: random.normal(size=feature.shape).astype(np.float32)
        for key, feature in CONTRACT.observations.items()
    }


PROBES = [
    (observation(i), task.instruction) for i, task in enumerate(list(CONTRACT.tasks.values())[:6])
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    """A checkpoint with random weights and odd statistics; its export as one graph, static; and as
    encoder and step graphs, for any batch."""
    root = tmp_path_factory.mktemp("export")
    random = np.random.default_rng(0)
    statistics: dict[str, dict[str, Any]] = {
        key: {
            "mean": random.normal(size=shape),
            "std": random.uniform(0.5, 2.0, size=shape),
            "min": -np.ones(shape),
            "max": np.ones(shape),
        }
        for key, shape in [
            *((key, feature.shape) for key, feature in CONTRACT.vectors.items()),
            ("action", (CONTRACT.action.size,)),
        ]
    }
    checkpoint = build_policy("chunk_flow", CONTRACT, statistics).save(root / "checkpoint")
    report = export_policy(checkpoint, root / "whole", PROBES)
    assert report.parity.observations == 6
    assert report.parity.max_error < 1e-5
    assert report.parity.cosine > 0.9999999
    steps = ExportConfig(layout="steps", dynamic_batch=True)
    assert export_policy(checkpoint, root / "steps", PROBES, steps).parity.max_error < 1e-5
    return checkpoint, root / "whole", root / "steps"


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def rehash(folder: Path) -> None:
    card = read_policy_card_unchecked(folder)
    names = tuple(card["files"])
    card["files"] = hashes(folder, names)
    (folder / "policy.json").write_text(json.dumps(card))


def read_policy_card_unchecked(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "policy.json").read_text())


# Equal ------------------------------------------------------------------------------------------


def test_all_backends_give_one_chunk_for_one_seed(folders: tuple[Path, Path, Path]):
    policies = [load_policy(folder) for folder in folders]
    assert [type(policy) for policy in policies] == [TorchPolicy, OnnxPolicy, OnnxPolicy]
    reference, *exports = policies
    for seed in range(4):
        expected = reference.act(observation(100 + seed), TEXT, seed)
        assert expected.shape == (CONTRACT.chunk_horizon, CONTRACT.action.size)
        for policy in exports:
            got = policy.act(observation(100 + seed), TEXT, seed)
            np.testing.assert_allclose(got, expected, atol=1e-5)
    a = reference.act(observation(103), TEXT, 3)
    assert np.abs(a - reference.act(observation(103), TEXT, 77)).max() > 1e-3
    assert np.abs(a - reference.act(observation(103), "Press a button", 3)).max() > 1e-4


@pytest.mark.parametrize(("rows", "delay"), [(8, 0), (5, 2), (1, 1), (12, 3)])
def test_all_backends_continue_a_running_chunk_alike(
    folders: tuple[Path, Path, Path], rows: int, delay: int
):
    previous = np.random.default_rng(3).normal(size=(rows, CONTRACT.action.size)).astype(np.float32)
    free, followed = [], []
    for folder in folders:
        policy = load_policy(folder)
        assert policy.takes_previous
        free.append(policy.act(observation(1), TEXT, 5))
        followed.append(policy.act(observation(1), TEXT, 5, previous=previous, delay=delay))
    for other in followed[1:]:
        np.testing.assert_allclose(followed[0], other, atol=1e-4)
    overlap = min(rows, len(free[0]))
    before, after = (np.abs(c[1][:overlap] - previous[:overlap]).mean() for c in (free, followed))
    assert after < before


def test_a_checkpoint_continues_a_running_chunk(folders: tuple[Path, Path, Path]):
    """Rows that will have run when the new chunk arrives stay nearly as they were."""
    previous = np.full((5, CONTRACT.action.size), 0.8, np.float32)
    for form in ("identity", "jacobian"):
        policy = load_policy(folders[0], rtc_form=form)
        free = policy.act(observation(1), TEXT, 3)
        follows = policy.act(observation(1), TEXT, 3, previous=previous, delay=3)
        assert follows.shape == free.shape
        assert np.abs(follows[:3] - 0.8).mean() < 0.2 * np.abs(free[:3] - 0.8).mean()
        assert np.isfinite(follows).all()
    with pytest.raises(ValueError, match="form 'identity', not 'jacobian'"):
        load_policy(folders[1], rtc_form="jacobian")


def test_an_item_does_not_depend_on_its_batch(folders: tuple[Path, Path, Path]):
    items = [observation(i) for i in range(4)]
    batch = {key: np.stack([item[key] for item in items]) for key in items[0]}
    for folder in folders:
        policy = load_policy(folder)
        together = policy.act_batch(batch, [TEXT] * 4, np.arange(4))
        for seed, item in enumerate(items):
            np.testing.assert_allclose(together[seed], policy.act(item, TEXT, seed), atol=1e-5)


def test_the_card_says_what_the_graph_takes(folders: tuple[Path, Path, Path]):
    card = read_policy_card(folders[1])
    model = onnx.load(folders[1] / "policy.onnx")
    inputs = {
        i.name: [d.dim_value for d in i.type.tensor_type.shape.dim] for i in model.graph.input
    }
    for key, feature in card.observations.items():
        assert inputs[key] == [1, *feature.shape]
    assert inputs["noise"] == [1, card.horizon, card.noise_size]
    assert card.opset == model.opset_import[0].version == 20
    assert card.contract_sha256 == CONTRACT.sha256
    assert card.the_contract() == CONTRACT
    assert set(card.files) == {"policy.onnx", "example.safetensors"}
    assert {"torch", "onnxruntime"} <= set(card.versions)
    # Nothing of this machine travels with the file.
    assert str(Path(__file__).parents[3]).encode() not in (folders[1] / "policy.onnx").read_bytes()


def test_one_batch_size_or_any(folders: tuple[Path, Path, Path]):
    static, moving = (onnx.load(folders[1] / "policy.onnx"), onnx.load(folders[2] / "step.onnx"))
    assert all(i.type.tensor_type.shape.dim[0].dim_value == 1 for i in static.graph.input)
    assert all(i.type.tensor_type.shape.dim[0].dim_param for i in moving.graph.input)


# Precision --------------------------------------------------------------------------------------


def test_lower_precision_stays_within_its_bounds(folders: tuple[Path, Path, Path], tmp_path: Path):
    reference = TorchPolicy(folders[0])
    full = sum(f.stat().st_size for f in folders[1].glob("*.onnx"))
    span = float(np.ptp(np.asarray(CONTRACT.action.limits.position), axis=1).max())
    card = read_policy_card(folders[1])
    feeds = [
        load_file(folders[1] / "example.safetensors")
        | {key: seen[key][None] for key in card.observations}
        for seen, _ in PROBES
    ]
    errors: dict[str, float] = {}
    for precision in ("fp16", "bf16", "int8", "int8-calibrated"):
        folder = copy(folders[1], tmp_path / precision)
        change_precision(folder, ("policy.onnx",), precision, feeds)
        rehash(folder)
        exported = OnnxPolicy(folder, prove=False)
        parity = compare(reference, exported, PROBES, bound=BOUNDS[precision] * span)
        assert parity.ok, (precision, parity)
        errors[precision] = parity.max_error
        small = (folder / "policy.onnx").stat().st_size
        assert small < full * (0.6 if precision in ("fp16", "bf16") else 0.45)
        onnx.checker.check_model(onnx.load(folder / "policy.onnx"), full_check=True)
    assert 1e-5 < errors["fp16"] < errors["bf16"] < errors["int8-calibrated"]


# Refused ----------------------------------------------------------------------------------------


def test_wrong_inputs_are_named(folders: tuple[Path, Path, Path]):
    state = "observation.state"
    for folder in folders:
        policy = load_policy(folder)
        good = observation(0)
        for value, words in [
            (np.zeros(5, np.float32), r"expected \(4,\)"),
            (np.zeros((1, 4), np.float32), r"expected \(4,\)"),
            (np.full(4, np.nan, np.float32), "NaN"),
            (np.zeros(4, np.int64), "found numbers of int64"),
            (np.array(["a"] * 4), "found numbers of <U1"),
        ]:
            with pytest.raises(PolicyInputError, match=words):
                policy.act(good | {state: value}, TEXT)
        with pytest.raises(PolicyInputError, match=r"lacks 'observation\.state'"):
            policy.act({k: v for k, v in good.items() if k != state}, TEXT)
        rows = np.zeros((2, CONTRACT.action.size), np.float32)
        for previous, delay, words in [
            (np.zeros((2, 9), np.float32), 0, "previous: found shape"),
            (rows * np.nan, 0, "previous holds NaN"),
            (rows, -1, "the delay is negative"),
        ]:
            with pytest.raises(PolicyInputError, match=words):
                policy.act(good, TEXT, previous=previous, delay=delay)
        two = {key: np.stack([value, value]) for key, value in good.items()}
        for texts, seeds in [([TEXT], np.arange(2)), ([TEXT] * 2, np.arange(3))]:
            with pytest.raises(PolicyInputError, match="expected one size"):
                policy.act_batch(two, texts, seeds)
    with pytest.raises(PolicyInputError, match="knows no instruction 'Fly'"):
        OnnxPolicy(folders[1]).act(observation(0), "Fly")


def test_flipped_and_cut_files_never_reach_the_runtime(
    folders: tuple[Path, Path, Path], tmp_path: Path
):
    """A damaged graph can crash a native parser: the hash is looked at before it."""
    random = np.random.default_rng(0)
    for source, name in [
        (folders[1], "policy.onnx"),
        (folders[2], "step.onnx"),
        (folders[1], "example.safetensors"),
    ]:
        folder = copy(source, tmp_path / name)
        data = (folder / name).read_bytes()
        for number in range(40):
            broken = bytearray(data)
            if number % 2:
                broken[int(random.integers(len(data)))] ^= 1 << int(random.integers(8))
            else:
                broken = broken[: int(random.integers(len(data)))]
            (folder / name).write_bytes(bytes(broken))
            with pytest.raises(CheckpointError, match="SHA-256 differs"):
                OnnxPolicy(folder)
        (folder / name).unlink()
        with pytest.raises(CheckpointError, match="missing"):
            OnnxPolicy(folder)


FUZZ = """
import json, sys
from pathlib import Path
import numpy as np
from vla_post.export.card import sha256
from vla_post.export.onnx_policy import OnnxPolicy
from vla_post.policies.checkpoint import CheckpointError

folder, name = Path(sys.argv[1]), sys.argv[2]
data, card = (folder / name).read_bytes(), json.loads((folder / "policy.json").read_text())
random = np.random.default_rng(0)
loaded = refused = 0
for number in range(int(sys.argv[3])):
    broken = bytearray(data)
    if number % 4 == 0:
        broken = broken[: int(random.integers(len(data)))]
    else:
        # Anywhere; in the graph's structure, which comes before the weights; at many places.
        reach = 40_000 if number % 4 == 1 else len(data)
        for _ in range(20 if number % 4 == 3 else 1):
            broken[int(random.integers(reach))] = int(random.integers(256))
    (folder / name).write_bytes(broken)
    card["files"][name] = sha256(folder / name)
    (folder / "policy.json").write_text(json.dumps(card))
    try:
        OnnxPolicy(folder)
        loaded += 1
    except CheckpointError:
        refused += 1
print()
print(loaded, refused)
"""


@pytest.mark.parametrize(("layout", "name"), [(1, "policy.onnx"), (2, "encoder.onnx")])
def test_a_damaged_graph_with_the_hash_of_the_damage_is_refused_or_gives_its_example(
    folders: tuple[Path, Path, Path], tmp_path: Path, layout: int, name: str
):
    """Nothing protects ONNX Runtime from such a file; in a process of its own, to see a crash."""
    folder = copy(folders[layout], tmp_path / "fuzz")
    done = subprocess.run(
        [sys.executable, "-c", FUZZ, str(folder), name, "80"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    # ONNX Runtime itself prints at some damage.
    loaded, refused = map(int, done.stdout.splitlines()[-1].split())
    assert loaded + refused == 80
    assert refused > 30


def test_a_damaged_card_is_refused_or_means_the_same(
    folders: tuple[Path, Path, Path], tmp_path: Path
):
    folder = copy(folders[1], tmp_path / "card")
    text = (folder / "policy.json").read_bytes()
    expected = OnnxPolicy(folder).act(observation(0), TEXT)
    random = np.random.default_rng(1)
    refused = 0
    for number in range(60):
        broken = bytearray(text)
        if number % 3 == 0:
            broken = broken[: int(random.integers(len(text)))]
        else:
            broken[int(random.integers(len(text)))] = int(random.integers(32, 127))
        (folder / "policy.json").write_bytes(bytes(broken))
        try:
            policy = OnnxPolicy(folder, contract=CONTRACT)
            np.testing.assert_allclose(policy.act(observation(0), TEXT), expected, atol=1e-5)
        except (CheckpointError, ContractMismatch, PolicyInputError):
            refused += 1
    assert refused > 20


def test_exports_that_are_not_what_they_say_are_refused(
    folders: tuple[Path, Path, Path], tmp_path: Path
):
    # The hash is right, but the graph is not one.
    cut = copy(folders[1], tmp_path / "cut")
    (cut / "policy.onnx").write_bytes((cut / "policy.onnx").read_bytes()[:5000])
    rehash(cut)
    with pytest.raises(CheckpointError, match="cannot load"):
        OnnxPolicy(cut)

    other = copy(folders[1], tmp_path / "other")
    example = load_file(other / "example.safetensors")
    save_file(example | {"action": example["action"] + 0.01}, other / "example.safetensors")
    rehash(other)
    with pytest.raises(CheckpointError, match="its own example differs"):
        OnnxPolicy(other)

    old = copy(folders[1], tmp_path / "old")
    card = read_policy_card_unchecked(old) | {"format": "vla_post/export/1"}
    (old / "policy.json").write_text(json.dumps(card))
    with pytest.raises(CheckpointError, match="expected format"):
        OnnxPolicy(old)

    strange = copy(folders[1], tmp_path / "strange")
    card = read_policy_card(strange)
    some = dict(list(card.observations.items())[:1])
    write_policy_card(strange, card.model_copy(update={"observations": some}))
    with pytest.raises(CheckpointError, match="the graph wants"):
        OnnxPolicy(strange)

    with pytest.raises(CheckpointError, match="not an exported policy"):
        OnnxPolicy(tmp_path)


def test_a_policy_of_another_cell_is_refused_with_the_fields_that_differ(
    folders: tuple[Path, Path, Path],
):
    pixels = load_contract(SHIPPED / "metaworld_pixels.yaml")
    for folder in folders:
        with pytest.raises(ContractMismatch, match="chunk_horizon"):
            load_policy(folder, contract=pixels)
    assert load_policy(folders[1], contract=CONTRACT).contract_sha256 == CONTRACT.sha256


def test_a_wrong_weight_fails_the_export_and_its_layer_is_named(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from vla_post.export import onnx as module

    simplify = module.simplify

    def spoiled(program: Any) -> onnx.ModelProto:
        model = simplify(program)
        (weight,) = (i for i in model.graph.initializer if "blocks.1.1.bias" in i.name)
        array = numpy_helper.to_array(weight) + 0.5
        weight.CopyFrom(numpy_helper.from_array(array, weight.name))
        return model

    monkeypatch.setattr(module, "simplify", spoiled)
    with pytest.raises(ExportError, match=r"first differs at .*net\.blocks\.1\.1"):
        export_policy(folders[0], tmp_path / "bad", PROBES)
    with pytest.raises(CheckpointError, match="not an exported policy"):
        OnnxPolicy(tmp_path / "bad")


def test_an_operator_without_onnx_is_named(
    folders: tuple[Path, Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    import torch

    from vla_post.policies.flow_nets import MlpHead

    def strange(self: Any, context: torch.Tensor, x: torch.Tensor, time: torch.Tensor) -> Any:
        return torch.linalg.eigvalsh(x @ x.mT)[..., None] + x

    monkeypatch.setattr(MlpHead, "forward", strange)
    with pytest.raises(ExportError, match="eigh"):
        export_policy(folders[0], tmp_path / "x", PROBES)


def test_nothing_to_prove_it_on_or_nothing_to_export(
    folders: tuple[Path, Path, Path], tmp_path: Path
):
    with pytest.raises(ExportError, match="no recorded observation"):
        export_policy(folders[0], tmp_path / "x", [])
    unfinished = copy(folders[0], tmp_path / "unfinished")
    (unfinished / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="weights of this architecture"):
        export_policy(unfinished, tmp_path / "x", PROBES)
    with pytest.raises(CheckpointError, match="not a checkpoint"):
        export_policy(tmp_path / "nothing", tmp_path / "x", PROBES)


# Without torch ----------------------------------------------------------------------------------

WITHOUT = """
import sys
from importlib.abc import MetaPathFinder

class Refuse(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "lerobot", "transformers", "onnx", "mujoco", "scipy"):
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

sys.meta_path.insert(0, Refuse())
import numpy as np
from vla_post.export import load_policy
from vla_post.policies.checkpoint import CheckpointError

policy = load_policy(sys.argv[2])
observation = {key: np.zeros(f.shape, f.dtype) for key, f in policy.card.observations.items()}
chunk = policy.act(observation, next(iter(policy.card.instructions)))
assert np.isfinite(chunk).all()
try:
    load_policy(sys.argv[1])
except CheckpointError as error:
    print(error)
print(chunk.shape, sorted(n for n in sys.modules if n in ("torch", "onnx", "lerobot")))
"""


def test_a_robot_runs_an_export_without_torch(folders: tuple[Path, Path, Path]):
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(folders[0]), str(folders[1])],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    refusal, answer = done.stdout.splitlines()
    assert "PyTorch, which this machine does not have" in refusal
    assert answer == f"{(CONTRACT.chunk_horizon, CONTRACT.action.size)} []"


def test_an_export_is_served_to_other_machines(folders: tuple[Path, Path, Path]):
    command = [sys.executable, "-m", "vla_post.cli.main", "serve", str(folders[1]), "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as it:
        assert it.stdout is not None
        assert it.stderr is not None
        try:
            url = it.stdout.readline().split()[0]
            remote = load_policy(url, contract=CONTRACT)
            previous = np.full((4, CONTRACT.action.size), 0.5, np.float32)
            overlaps: list[dict[str, Any]] = [{}, {"previous": previous, "delay": 1}]
            for overlap in overlaps:
                np.testing.assert_array_equal(
                    remote.act(observation(2), TEXT, 4, **overlap),
                    OnnxPolicy(folders[1]).act(observation(2), TEXT, 4, **overlap),
                )
            remote.close()
        finally:
            it.send_signal(signal.SIGTERM)
        assert it.wait(60) == 0
        assert "served 2 chunks" in it.stderr.read()


def test_reload_takes_other_weights(folders: tuple[Path, Path, Path], tmp_path: Path):
    policy = TorchPolicy(folders[0])
    before = policy.act(observation(0), TEXT, 0)
    other = copy(folders[0], tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    save_file({k: v * 0.5 for k, v in weights.items()}, other / "model.safetensors")
    policy.reload(other)
    assert np.abs(policy.act(observation(0), TEXT, 0) - before).max() > 1e-3
    policy.reload(folders[0])
    np.testing.assert_array_equal(policy.act(observation(0), TEXT, 0), before)
