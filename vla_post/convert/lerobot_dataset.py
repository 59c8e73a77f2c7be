"""LeRobot dataset format v3, out and in.

Out: what lerobot trains on, plus columns of ours that its policies ignore (`vla_post.*`,
`next.*`): true stamps, source, the policy's proposal, outcome. `meta/vla_post.json` keeps the
contract and the episode rows, so that the way back loses nothing but what JPEG or video lost.
"""

import errno
import json
import os
import shutil
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import NAMESPACE_URL, uuid5

import numpy as np

from trajectory_store import Contract, Episode, Filter, FleetView, Outcome, Source, Store
from trajectory_store.contract import parse_contract
from trajectory_store.writer import StoreWriter
from vla_post.convert.common import (
    ConversionError,
    Progress,
    clear_target,
    is_whole,
    make_contract,
    names_of,
    quiet,
    slug,
)
from vla_post.convert.lerobot_segments import GrowingDataset

SIDECAR = "meta/vla_post.json"
OUTCOMES = list(Outcome)
PNG_END = b"IEND\xaeB`\x82"
SEGMENT_EPISODES = 25
"""What is written between two checkpoints at most: what a kill costs, and how much a file holds."""
SEGMENT_BYTES = 200 * 2**20
"""Likewise, of all cameras together; lerobot's own files end at 100 MB of data, 200 MB of video."""


def to_lerobot(
    data: Store | FleetView,
    target: str | Path,
    *,
    repo_id: str = "local/vla_post",
    filter: Filter | None = None,
    use_videos: bool = True,
    force: bool = False,
    progress: Progress = quiet,
) -> list[str]:
    """Writes episodes as a LeRobot v3 dataset and returns their uuids.

    Written beside `target` and renamed when whole. The same call goes on after an interruption, an
    error or a kill, at most `SEGMENT_EPISODES` episodes before where it was. Depth images are left
    out: the format is 8 bit here.

    Raises:
        ConversionError: the target exists, stores of different contracts, nothing to write, a
            control rate that is not whole (the format's fps is an integer), a full disk, or
            another process that writes this target.
        FeatureMissing: a camera has no frame at some tick.
    """
    stores = data.stores if isinstance(data, FleetView) else [data]
    keep = filter or Filter()
    chosen = [(s, e) for s in stores for e in s.table if keep.keeps(e)]
    if not chosen:
        raise ConversionError("no finished episode passes the filter; nothing to convert")
    contract = chosen[0][0].contracts[chosen[0][1].contract_sha256]
    for store, episode in chosen:
        contract.require_same(
            store.contracts[episode.contract_sha256], here="first episode", there=episode.uuid
        )
    if contract.control_hz != round(contract.control_hz):
        raise ConversionError(
            f"control_hz is {contract.control_hz}; LeRobot's fps is a whole number"
        )
    target = Path(target)
    clear_target(target, force)
    images = [k for k, f in contract.images.items() if not f.unit.startswith("depth16")]
    plan = {"contract": contract.to_dict(), "videos": use_videos}
    rows = [json.loads(e.to_json()) for _, e in chosen]
    with GrowingDataset.held(target.with_name(f".{target.name}.partial"), plan, rows) as growing:
        while growing.done < len(chosen):
            dataset = _open(growing, repo_id, contract, images, use_videos)
            number = growing.done
            try:
                for store, e in chosen[number : number + SEGMENT_EPISODES]:
                    progress(e.uuid, number, len(chosen))
                    _add(dataset, store, e, contract, images)
                    number += 1
                    if growing.loose_bytes >= SEGMENT_BYTES:
                        break
            except BaseException:
                # Now, or lerobot does it at some later time, when the files may be another run's.
                with suppress(Exception):
                    dataset.finalize()
                raise
            dataset.finalize()
            growing.commit(number)
        (growing.root / SIDECAR).write_text(json.dumps(plan | {"episodes": rows}))
        growing.root.replace(target)
    progress("", len(chosen), len(chosen))
    return [e.uuid for _, e in chosen]


def _open(
    growing: GrowingDataset, repo_id: str, contract: Contract, images: list[str], use_videos: bool
) -> Any:
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    # H.264, not lerobot's AV1: run by root, that encoder (SVT-AV1) makes the calling process and
    # all that it starts later SCHED_FIFO 99, which takes the cores from a robot's control loop.
    encoder = RGBEncoderConfig(vcodec="h264", crf=20)
    if growing.done:
        return LeRobotDataset.resume(repo_id, root=growing.root, rgb_encoder=encoder)
    return LeRobotDataset.create(
        repo_id,
        fps=round(contract.control_hz),
        features=_features(contract, images, use_videos),
        root=growing.root,
        robot_type=contract.robot,
        use_videos=use_videos,
        rgb_encoder=encoder,
    )


def _add(dataset: Any, store: Store, e: Episode, contract: Contract, images: list[str]) -> None:
    columns = _columns(store, e, contract)
    for i in range(len(e)):
        frame: dict[str, Any] = {k: v[i] for k, v in columns.items()}
        for key in images:
            frame[key] = store.read(key, [e.first_row + i])[0]
        dataset.add_frame(frame | {"task": e.instruction})
    # lerobot only logs that it could not write a picture, and goes on without it or with its start.
    for key in images:
        for path in map(Path, dataset.writer.episode_buffer[key]):
            if path.is_file() and path.read_bytes().endswith(PNG_END):
                continue
            if shutil.disk_usage(path.parent).free < np.prod(contract.images[key].shape):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            raise ConversionError(
                f"{key} of episode {e.uuid}: lerobot could not write {path.name}; its message "
                "above says why"
            )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        # One camera after the other, each on all cores. lerobot's other way forks this process
        # beside the store's threads, and its encoders outlive a kill and then delete pictures under
        # the next run's hands.
        dataset.save_episode(parallel_encoding=False)


def _features(contract: Contract, images: list[str], use_videos: bool) -> dict[str, Any]:
    def vector(names: tuple[str, ...], dtype: str = "float32") -> dict[str, Any]:
        return {"dtype": dtype, "shape": (len(names),), "names": list(names)}

    size = contract.action.size
    features = {k: vector(f.names) for k, f in contract.vectors.items()}
    features["action"] = vector(contract.action.names)
    for key in images:
        features[key] = {
            "dtype": "video" if use_videos else "image",
            "shape": tuple(contract.images[key].shape),
            "names": ["height", "width", "channels"],
        }
    one = {"shape": (1,), "names": None}
    return features | {
        "next.reward": one | {"dtype": "float32"},
        "next.done": one | {"dtype": "bool"},
        "vla_post.truncated": one | {"dtype": "bool"},
        "vla_post.stamp_ns": one | {"dtype": "int64"},
        "vla_post.source": one | {"dtype": "int64"},
        "vla_post.outcome": one | {"dtype": "int64"},
        "vla_post.policy_version": one | {"dtype": "int64"},
        "vla_post.action_policy": {"dtype": "float32", "shape": (size,), "names": None},
        "vla_post.has_action_policy": one | {"dtype": "bool"},
        "vla_post.action_human": {"dtype": "float32", "shape": (size,), "names": None},
        "vla_post.has_action_human": one | {"dtype": "bool"},
    }


def _columns(store: Store, e: Episode, contract: Contract) -> dict[str, np.ndarray]:
    def one(name: str, dtype: str) -> np.ndarray:
        return store.read(name, e).astype(dtype)[:, None]

    proposals: dict[str, np.ndarray] = {}
    for who in ("policy", "human"):  # the format knows no absent value
        proposed = store.read(f"action.{who}", e)
        has: np.ndarray = np.all(np.isfinite(proposed), axis=1)
        proposals[f"vla_post.action_{who}"] = np.where(has[:, None], proposed, 0).astype(np.float32)
        proposals[f"vla_post.has_action_{who}"] = has[:, None]
    assert e.outcome is not None
    return {k: store.read(k, e) for k in (*contract.vectors, "action")} | {
        "next.reward": one("reward", "float32"),
        "next.done": one("terminated", "bool"),
        "vla_post.truncated": one("truncated", "bool"),
        "vla_post.stamp_ns": one("stamp_ns", "int64"),
        "vla_post.source": one("source", "int64"),
        "vla_post.outcome": np.full((len(e), 1), OUTCOMES.index(e.outcome)),
        "vla_post.policy_version": one("policy_version", "int64"),
        **proposals,
    }


def from_lerobot(
    source: str | Path,
    target: str | Path,
    *,
    repo_id: str = "local/dataset",
    outcome: Outcome | str = Outcome.SUCCESS,
    codec: str = "jpeg",
    progress: Progress = quiet,
) -> list[str]:
    """Reads any v3 dataset on disk, with image or video features, into a store.

    Run again after an interruption, it goes on: an episode's uuid follows from the dataset and its
    index.

    Args:
        outcome: for data sets that do not say how an episode ended.
        codec: how images are stored: `jpeg` (quality 95), `png` or `raw` (exact).

    Returns:
        uuids written now.

    Raises:
        ConversionError: not a v3 dataset, or no action.
    """
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    root = Path(source)
    if not (root / "meta" / "info.json").is_file():
        raise ConversionError(
            f"{root}: no meta/info.json; expected the folder of a LeRobot v3 dataset"
        )
    info = json.loads((root / "meta" / "info.json").read_text())
    if not str(info.get("codebase_version", "")).startswith("v3"):
        raise ConversionError(
            f"{root}: version {info.get('codebase_version')}, expected v3; lerobot's own converter "
            "brings older ones up to date"
        )
    if "action" not in info["features"]:
        raise ConversionError(f"{root}: no feature called action")
    dataset = LeRobotDataset(repo_id, root=root)
    sidecar = root / SIDECAR
    saved = json.loads(sidecar.read_text()) if sidecar.is_file() else None
    contract, tasks = _contract(dataset, info, saved, root.name, codec)
    written: list[str] = []
    with StoreWriter.create_or_open(target, contract, writer="from_lerobot") as writer:
        present = {e.uuid: e for e in Store(target).table}
        episodes: Any = dataset.meta.episodes
        total = dataset.meta.total_episodes
        for number in range(total):
            progress(f"episode {number}", number, total)
            old = Episode.from_json(json.dumps(saved["episodes"][number])) if saved else None
            name = f"{root.absolute()}#{number}"
            uuid = old.uuid if old else str(uuid5(NAMESPACE_URL, name))
            first = int(episodes[number]["dataset_from_index"])
            stop = int(episodes[number]["dataset_to_index"])
            ending = old.outcome if old and old.outcome else Outcome(outcome)
            if is_whole(writer, present.get(uuid), stop - first, ending):
                continue
            _write(writer, dataset, (first, stop), uuid, old, tasks, ending)
            written.append(uuid)
    progress("", total, total)
    return written


def _contract(
    dataset: Any, info: dict[str, Any], saved: Any, name: str, codec: str
) -> tuple[Contract, dict[str, str]]:
    """The contract, and instruction -> task name."""
    if saved:
        contract = parse_contract(json.dumps(saved["contract"]))
        present = [k for k in contract.observations if k in info["features"]]
        data = contract.to_dict()
        data["observations"] = {k: data["observations"][k] for k in present}
        return Contract.model_validate(data), {}
    vectors: dict[str, Any] = {}
    images: dict[str, tuple[int, int, int]] = {}
    for key, f in info["features"].items():
        if not key.startswith("observation."):
            continue
        if f["dtype"] in ("image", "video"):
            shape = list(f["shape"])
            if shape[0] in (1, 3) and shape[2] not in (1, 3):
                shape = [shape[1], shape[2], shape[0]]
            new = key if key.startswith("observation.images.") else f"observation.images.{key[12:]}"
            images[new] = (shape[0], shape[1], shape[2])
        elif len(f["shape"]) == 1 and f["dtype"].startswith("float"):
            vectors[key] = names_of(f.get("names"), f["shape"][0], key.rsplit(".", 1)[1])
    texts = [str(t) for t in dataset.meta.tasks.index]
    tasks = {text: slug(text, "task") for text in texts}
    if len(set(tasks.values())) < len(tasks):
        tasks = {text: f"task_{i}" for i, text in enumerate(texts)}
    action = info["features"]["action"]
    contract = make_contract(
        cell=name,
        robot=str(info.get("robot_type") or "robot"),
        control_hz=float(info["fps"]),
        vectors=vectors,
        images=images,
        action=names_of(action.get("names"), action["shape"][0], "action"),
        tasks={v: k for k, v in tasks.items()},
        codec=codec,
    )
    return contract, tasks


def _write(
    writer: StoreWriter,
    dataset: Any,
    span: tuple[int, int],
    uuid: str,
    old: Episode | None,
    tasks: dict[str, str],
    outcome: Outcome,
) -> None:
    contract = writer.contract
    columns = dataset.hf_dataset.with_format("numpy", columns=_small(dataset))[slice(*span)]
    n = span[1] - span[0]

    def column(key: str, fallback: Any = None) -> Any:
        return np.asarray(columns[key]) if key in columns else fallback

    def proposal(who: str) -> np.ndarray | None:
        values, has = column(f"vla_post.action_{who}"), column(f"vla_post.has_action_{who}")
        return None if values is None else np.where(has.reshape(n, 1), values, np.nan)

    observation: dict[str, Any] = {k: column(k).astype(np.float32) for k in contract.vectors}
    decoded = _Items(dataset, span)
    observation |= {key: _Pixels(decoded, key) for key in contract.images}
    default = (np.arange(n) * contract.dt_ns).reshape(n)
    stamps = column("vla_post.stamp_ns", default).reshape(n)
    if (np.diff(stamps) <= 0).any():
        stamps = default
    source = column("vla_post.source", np.full(n, int(Source.HUMAN))).reshape(n)
    ends, cut = column("next.done"), column("vla_post.truncated")
    instruction = str(dataset.meta.tasks.index[int(column("task_index")[0])])
    writer.write_episode(
        old.task if old else tasks[instruction],
        observation,
        column("action").astype(np.float32),
        outcome=outcome,
        source=source,
        stamp_ns=stamps,
        reward=column("next.reward", np.zeros(n)).reshape(n),
        terminated=None if ends is None else ends.reshape(n),
        truncated=None if cut is None else cut.reshape(n),
        action_policy=proposal("policy"),
        action_human=proposal("human"),
        instruction=instruction,
        operator=old.operator if old else "",
        policy_version=old.policy_version if old else 0,
        uuid=uuid,
        notes=old.notes if old else "",
    )


def _small(dataset: Any) -> list[str]:
    """Columns that are no images."""
    return [
        key
        for key in dataset.hf_dataset.column_names
        if dataset.meta.features[key]["dtype"] not in ("image", "video")
    ]


class _Items:
    """Decoded items of an episode, of which only the last is held."""

    def __init__(self, dataset: Any, span: tuple[int, int]) -> None:
        self.dataset, self.span = dataset, span
        self._last: tuple[int, Any] = (-1, None)

    def __getitem__(self, i: int) -> Any:
        if self._last[0] != i:
            self._last = (i, self.dataset[self.span[0] + i])
        return self._last[1]


class _Pixels:
    """One camera of an episode, (height, width, C) u1 each."""

    def __init__(self, items: _Items, key: str) -> None:
        self._items, self._key = items, key

    def __len__(self) -> int:
        return self._items.span[1] - self._items.span[0]

    def __getitem__(self, i: int) -> np.ndarray:
        item = self._items[i]
        short = "observation." + self._key.removeprefix("observation.images.")
        pixels = np.asarray(item[self._key if self._key in item else short])
        if pixels.dtype != np.uint8:
            pixels = np.rint(pixels * 255).astype(np.uint8)
        return np.ascontiguousarray(np.moveaxis(pixels, 0, -1))
