"""What a robot needs of the learner's side: versions, their checks, and the runtime.

Importing this needs neither torch nor ROS.
"""

from vla_post.export.adoption import AdoptionRefused, require_fit
from vla_post.export.registry import Registry, RegistryError, Version, VersionDamaged
from vla_post.export.runtime import ChunkPolicy, PolicyInputError, load_policy

__all__ = [
    "AdoptionRefused",
    "ChunkPolicy",
    "PolicyInputError",
    "Registry",
    "RegistryError",
    "Version",
    "VersionDamaged",
    "load_policy",
    "require_fit",
]
