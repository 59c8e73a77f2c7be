"""Bounded caches for the sampler: chunks of columns in one arena, decoded frames by reference."""

import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from trajectory_store.coding import decode_frame
from trajectory_store.errors import DamagedChunk
from trajectory_store.reader import Store
from trajectory_store.schema import CHUNK_ROWS


class Blocks:
    """Chunks of the wanted columns, the least recently used leaving first.

    All chunks lie one after the other in one array per column, so that a batch is gathered with one
    fancy index per column, wherever its rows come from.
    """

    def __init__(self, names: Sequence[str], limit_bytes: int) -> None:
        self._names = list(names)
        self._limit_bytes = limit_bytes
        self._stores: list[Store] = []
        self._slots: OrderedDict[tuple[str, int], int] = OrderedDict()
        self._rows_at_use: dict[str, int] = {}
        self._arena: dict[str, np.ndarray] = {}
        self._capacity = 0
        self._page: list[np.ndarray] = []
        self._lock = threading.Lock()

    def use(self, stores: Sequence[Store]) -> None:
        """Declares the stores that numbers in `gather` refer to; keeps what is still right."""
        with self._lock:
            for store in stores:
                before = self._rows_at_use.get(store.location)
                if before is not None and before != store.rows:
                    # The last chunk of a column grows; all others never change.
                    self._slots.pop((store.location, min(before, store.rows) // CHUNK_ROWS), None)
                self._rows_at_use[store.location] = store.rows
            self._stores = list(stores)
            self._page = [
                np.full(store.rows // CHUNK_ROWS + 1, -1, np.int64) for store in self._stores
            ]
            number = {s.location: i for i, s in enumerate(self._stores)}
            for (location, chunk), slot in list(self._slots.items()):
                if location in number and chunk < len(self._page[number[location]]):
                    self._page[number[location]][chunk] = slot

    def gather(
        self, store: np.ndarray, wanted: Mapping[str, tuple[np.ndarray, list[str]]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Values of columns at rows.

        Args:
            store: (B,) number of the store of each item.
            wanted: label -> (rows (B, T), column names).

        Returns:
            label -> column -> (B, T, ...).
        """
        with self._lock:
            chunks = {label: rows // CHUNK_ROWS for label, (rows, _) in wanted.items()}
            every = np.concatenate([c.reshape(len(store), -1) for c in chunks.values()], axis=1)
            stride = 1 << 40
            flat = np.unique(store[:, None] * stride + every)
            self._load(flat, stride)
            out: dict[str, dict[str, np.ndarray]] = {}
            lookup = np.array([self._page[k // stride][k % stride] for k in flat.tolist()])
            for label, (rows, names) in wanted.items():
                at = np.searchsorted(flat, store[:, None] * stride + chunks[label])
                index = lookup[at] * CHUNK_ROWS + rows % CHUNK_ROWS
                out[label] = {name: self._arena[name][index] for name in names}
            return out

    def _load(self, flat: np.ndarray, stride: int) -> None:
        keys = [divmod(k, stride) for k in flat.tolist()]
        missing: list[tuple[int, int]] = []
        for number, chunk in keys:
            if self._page[number][chunk] < 0:
                missing.append((number, chunk))
            else:
                self._slots.move_to_end((self._stores[number].location, chunk))
        if not missing:
            return
        self._reserve(len(missing), len(keys))
        for number, chunk in missing:
            store = self._stores[number]
            slot = self._free_slot()
            rows = slice(slot * CHUNK_ROWS, (slot + 1) * CHUNK_ROWS)
            for name in self._names:
                if name in store.columns:
                    self._arena[name][rows] = store.read_chunk(name, chunk)
            self._slots[store.location, chunk] = slot
            self._page[number][chunk] = slot

    def _free_slot(self) -> int:
        if len(self._slots) < self._capacity:
            return len(self._slots)
        (location, chunk), slot = self._slots.popitem(last=False)
        for number, store in enumerate(self._stores):
            if store.location == location and chunk < len(self._page[number]):
                self._page[number][chunk] = -1
        return slot

    def _reserve(self, more: int, batch: int) -> None:
        """Grows the arena up to the bound; one batch always fits, whatever the bound."""
        columns = {n: c for s in self._stores for n, c in s.columns.items() if n in self._names}
        block = CHUNK_ROWS * sum(c.row_bytes for c in columns.values())
        bound = max(self._limit_bytes // max(block, 1), batch, 1)
        wanted = min(bound, max(len(self._slots) + more, 2 * self._capacity))
        wanted = max(wanted, batch)
        if wanted <= self._capacity:
            return
        for name in self._names:
            column = columns[name]
            grown = np.empty((wanted * CHUNK_ROWS, *column.shape), column.numpy)
            if self._capacity:
                grown[: self._capacity * CHUNK_ROWS] = self._arena[name]
            self._arena[name] = grown
        self._capacity = wanted


class FrameCache:
    """Decoded frames in memory, bounded in bytes; the least recently used leave first."""

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.hits = self.misses = 0
        self._bytes = 0
        self._frames: OrderedDict[tuple[str, str, int], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key: tuple[str, str, int]) -> np.ndarray | None:
        with self._lock:
            frame = self._frames.get(key)
            if frame is None:
                self.misses += 1
            else:
                self.hits += 1
                self._frames.move_to_end(key)
            return frame

    def put(self, key: tuple[str, str, int], frame: np.ndarray) -> None:
        if frame.nbytes > self.limit_bytes:
            return
        with self._lock:
            if key not in self._frames:
                self._frames[key] = frame.copy()
                self._bytes += frame.nbytes
            while self._bytes > self.limit_bytes:
                _, old = self._frames.popitem(last=False)
                self._bytes -= old.nbytes


class Frames:
    """Fetches and decodes the frames of one batch, each distinct frame once."""

    def __init__(self, stores: Sequence[Store], cache: FrameCache) -> None:
        self._stores, self._cache = stores, cache

    def decode(self, key: str, store: np.ndarray, places: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Args:
            store: (B,) number of the store of each item.
            places: per moment (B, T, 3), values of `<key>.frame`.

        Returns:
            Per moment (B, T, height, width, C).
        """
        shape = next(s.frames[key].feature.shape for s in self._stores if key in s.frames)
        kind = next(s.frames[key].numpy for s in self._stores if key in s.frames)
        outs = [np.empty((*p.shape[:2], *shape), kind) for p in places]
        targets: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
        spans: dict[tuple[int, int], tuple[int, int, int]] = {}
        for m, place in enumerate(places):
            rows = place.tolist()
            for b, number in enumerate(store.tolist()):
                for t, (frame, offset, size) in enumerate(rows[b]):
                    targets.setdefault((number, frame), []).append((m, b, t))
                    spans[number, frame] = (frame, offset, size)
        waiting: dict[int, list[int]] = {}
        for (number, frame), where in targets.items():
            cached = None
            if self._cache.limit_bytes:
                cached = self._cache.get((self._stores[number].location, key, frame))
            if cached is None:
                waiting.setdefault(number, []).append(frame)
            else:
                for m, b, t in where:
                    outs[m][b, t] = cached
        for number, frames in waiting.items():
            reader = self._stores[number]
            feature = reader.frames[key].feature
            wanted = np.array([spans[number, f] for f in frames], np.int64)
            for frame, data in zip(frames, reader.read_frames(key, wanted), strict=True):
                (m, b, t), *others = targets[number, frame]
                first = outs[m][b, t]
                try:
                    decode_frame(feature, data, first)
                except (ValueError, RuntimeError) as error:
                    raise DamagedChunk(
                        f"{reader.location}: {key}, frame {frame} does not decode ({error})"
                    ) from error
                for m, b, t in others:
                    outs[m][b, t] = first
                if self._cache.limit_bytes:
                    self._cache.put((reader.location, key, frame), first)
        return outs
