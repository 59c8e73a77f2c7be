"""diffusion_policy-style zarr: `data/<name>` arrays end to end and `meta/episode_ends`, out and
in."""

from pathlib import Path
from typing import Any, cast
from uuid import NAMESPACE_URL, uuid5

import numpy as np
import zarr

from trajectory_store import Filter, Outcome, Source, Store
from trajectory_store.writer import StoreWriter
from vla_post.convert.common import (
    ConversionError,
    Progress,
    clear_target,
    is_whole,
    make_contract,
    quiet,
)

ROWS = 256
"""Ticks copied at once, and rows of a chunk of images."""


def to_zarr(
    store: Store,
    target: str | Path,
    *,
    filter: Filter | None = None,
    force: bool = False,
    progress: Progress = quiet,
) -> list[str]:
    """Writes `data/action`, `data/<feature less "observation.">` and `meta/episode_ends` (zarr v2).

    Also `data/source`, `data/stamp_ns`, `data/reward`. Images become decoded uint8 arrays, as that
    format wants. Written beside `target` and renamed when whole; after an interruption or a kill, a
    second call with the same episodes goes on.

    Raises:
        ConversionError, FeatureMissing
    """
    keep = filter or Filter()
    chosen = [e for e in store.table if keep.keeps(e)]
    if not chosen:
        raise ConversionError(f"{store.location}: no finished episode passes the filter")
    target = Path(target)
    clear_target(target, force)
    building = target.with_name(f".{target.name}.partial")
    rows = np.concatenate([np.arange(e.first_row, e.first_row + len(e)) for e in chosen])
    names = {k: k.removeprefix("observation.") for k in store.contract.observations}
    names |= {k: k for k in ("action", "source", "stamp_ns", "reward")}
    names = {k: name.replace(".", "_") for k, name in names.items()}
    plan = {
        "contract": store.contract.sha256,
        "episodes": [e.uuid for e in chosen],
        "tasks": [e.task for e in chosen],
        "outcomes": [str(e.outcome) for e in chosen],
    }
    root, done = _begin(building, store, names, len(rows), plan)
    # By whole chunks of the target, so that one which a kill has cut is written anew.
    for start in range(done, len(rows), ROWS):
        progress(target.name, start, len(rows))
        some = slice(start, start + ROWS)
        for key, name in names.items():
            root[f"data/{name}"][some] = store.read(key, rows[some])
        root.attrs["rows_written"] = min(start + ROWS, len(rows))
    ends = np.cumsum([len(e) for e in chosen]).astype(np.int64)
    root.require_group("meta").create_array("episode_ends", data=ends, overwrite=True)
    building.replace(target)
    progress("", len(rows), len(rows))
    return [e.uuid for e in chosen]


def _begin(
    building: Path, store: Store, names: dict[str, str], total: int, plan: dict[str, Any]
) -> tuple[Any, int]:
    """The group to write to, and how many of its rows are there already."""
    try:
        root = zarr.open_group(str(building), mode="r+")
        found = dict(root.attrs)
        if {k: found[k] for k in plan} == plan and all(f"data/{n}" in root for n in names.values()):
            for cut in building.rglob("*.partial"):  # zarr's own files, of a write that was killed
                cut.unlink()
            return root, int(cast(int, found["rows_written"]))
    except (OSError, ValueError, KeyError):
        pass  # nothing there, or killed before it could say what is
    clear_target(building, True)
    root = zarr.open_group(str(building), mode="w", zarr_format=2)
    data = root.create_group("data")
    for key, name in names.items():
        if key in store.frames:
            shape, dtype = store.frames[key].feature.shape, store.frames[key].numpy
        else:
            shape, dtype = store.columns[key].shape, store.columns[key].numpy
        rows = 1 if key in store.frames else ROWS
        data.create_array(name, shape=(total, *shape), chunks=(rows, *shape), dtype=dtype)
    root.attrs.update(plan | {"rows_written": 0})
    return root, 0


def from_zarr(
    source: str | Path,
    target: str | Path,
    *,
    control_hz: float = 10.0,
    task: str = "task",
    instruction: str = "",
    outcome: Outcome | str = Outcome.SUCCESS,
    codec: str = "jpeg",
    progress: Progress = quiet,
) -> list[str]:
    """Reads such a folder (zarr v2 or v3) into a store; again after an interruption, it goes on.

    (N, D) arrays become vectors, (N, height, width, 1 or 3) arrays images, `action` the action.

    Args:
        control_hz: the format does not say; diffusion_policy's own data is at 10 Hz.

    Raises:
        ConversionError: no `data/action` or `meta/episode_ends`, or lengths that disagree.
    """
    place = Path(source)
    try:
        root: Any = zarr.open_group(str(place), mode="r")
        arrays: dict[str, Any] = dict(root["data"].arrays())
        ends = np.asarray(root["meta"]["episode_ends"][:], np.int64)
        action = arrays.pop("action")
    except (KeyError, OSError, ValueError) as error:
        raise ConversionError(
            f"{place}: expected a zarr folder with data/action and meta/episode_ends ({error})"
        ) from None
    total = int(ends[-1]) if len(ends) else 0
    wrong = {k: a.shape[0] for k, a in (arrays | {"action": action}).items() if a.shape[0] != total}
    if wrong or (np.diff(ends) <= 0).any() or total == 0:
        raise ConversionError(
            f"{place}: meta/episode_ends says {total} ticks in {len(ends)} episodes; arrays of "
            f"other lengths: {wrong or 'none'}"
        )
    known = {k: arrays.pop(k) for k in ("source", "stamp_ns", "reward") if k in arrays}
    images = {k: a for k, a in arrays.items() if a.ndim == 4 and a.shape[3] in (1, 3)}
    vectors = {k: a for k, a in arrays.items() if a.ndim == 2}
    keys = {k: f"observation.images.{k.removeprefix('images_')}" for k in images}
    keys |= {k: f"observation.{k}" for k in vectors}
    size = action.shape[1]
    contract = make_contract(
        cell=place.stem,
        robot="robot",
        control_hz=control_hz,
        vectors={keys[k]: [f"{k}_{i}" for i in range(a.shape[1])] for k, a in vectors.items()},
        images={keys[k]: a.shape[1:] for k, a in images.items()},
        action=[f"action_{i}" for i in range(size)],
        tasks={task: instruction or task},
        codec=codec,
    )
    uuids = list(root.attrs.get("episodes", ()))
    outcomes = list(root.attrs.get("outcomes", ()))
    written: list[str] = []
    with StoreWriter.create_or_open(target, contract, writer="from_zarr") as writer:
        present = {e.uuid: e for e in Store(target).table}
        for i, (start, stop) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
            progress(f"episode {i}", i, len(ends))
            name = f"{place.absolute()}#{i}"
            uuid = uuids[i] if len(uuids) == len(ends) else str(uuid5(NAMESPACE_URL, name))
            ending = Outcome(outcomes[i] if len(outcomes) == len(ends) else outcome)
            if is_whole(writer, present.get(uuid), int(stop - start), ending):
                continue
            rows = slice(int(start), int(stop))
            observation = {keys[k]: a[rows].astype(np.float32) for k, a in vectors.items()}
            for k, a in images.items():
                pixels = a[rows]
                if pixels.dtype != np.uint8:  # diffusion_policy keeps some images as floats 0..255
                    pixels = np.clip(np.rint(pixels), 0, 255).astype(np.uint8)
                observation[keys[k]] = pixels
            writer.write_episode(
                task,
                observation,
                action[rows].astype(np.float32),
                outcome=ending,
                source=known["source"][rows] if "source" in known else Source.HUMAN,
                stamp_ns=known["stamp_ns"][rows] if "stamp_ns" in known else None,
                reward=known["reward"][rows] if "reward" in known else None,
                uuid=uuid,
            )
            written.append(uuid)
    progress("", len(ends), len(ends))
    return written
