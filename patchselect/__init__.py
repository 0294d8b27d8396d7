"""Text-relevant patch selection for vision transformers: `apply`, `guide`, `remove`."""

from importlib.metadata import PackageNotFoundError, version

from . import losses, metrics, visualization
from .adapter import Adapter
from .budget import keep_rate_for_budget
from .functional import keep_and_fuse, num_kept
from .guidance import guide
from .pairs import score_pairs
from .patching import Handle, apply, handle_of, remove
from .pooled import skip_unread_outputs
from .prefix import Prefix, encode_prefix
from .recording import Selected, Trace, restore
from .selection import PatchSelection

try:
    __version__ = version("patchselect")
except PackageNotFoundError:  # pragma: no cover - a source tree that is not installed
    __version__ = "0"

__all__ = [
    "Adapter",
    "Handle",
    "PatchSelection",
    "Prefix",
    "Selected",
    "Trace",
    "apply",
    "encode_prefix",
    "guide",
    "handle_of",
    "keep_and_fuse",
    "keep_rate_for_budget",
    "losses",
    "metrics",
    "num_kept",
    "remove",
    "restore",
    "score_pairs",
    "skip_unread_outputs",
    "visualization",
]
