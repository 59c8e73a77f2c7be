"""What can go wrong with a store: each error names the place, what was found, expected, and the
remedy."""


class StoreError(ValueError):
    """Base of everything this package raises for a caller's data, files or arguments."""


class NotAStore(StoreError):
    """The folder or prefix exists (or not) and holds no trajectory store."""


class NewerFormat(StoreError):
    """Written by a later version of this software."""


class SchemaMismatch(StoreError):
    """The contract differs from the store's in a way that old rows could not honour."""


class StoreBusy(StoreError):
    """Another writer holds this store; the message names it."""


class StoreTaken(StoreError):
    """Another robot feeds this store; the message names it."""


class StoreUnavailable(StoreError):
    """The disk is full or read-only, or the object storage does not answer."""


class SpoolFull(StoreUnavailable):
    """The store has been unreachable for so long that the local spool reached its bound."""


class DamagedChunk(StoreError):
    """Bytes on disk do not match their checksum, or are missing."""


class BadTick(StoreError):
    """A tick that the schema does not allow: shape, dtype, NaN, stamp or frame."""


class EpisodeState(StoreError):
    """Called at the wrong moment: append outside an episode, begin inside one, unknown uuid."""


class FeatureMissing(StoreError):
    """A feature was asked for that some of the chosen episodes do not have."""


class NothingToSample(StoreError):
    """The stores are empty, or the filters leave no tick to start a chunk at."""
