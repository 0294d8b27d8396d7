"""Text-relevant patch selection for vision transformers: `apply`, `guide`, `remove`."""

from importlib.metadata import PackageNotFoundError, version

from . import losses, metrics, visualization
from .adapter import Adapter
from .budget import keep_rate_for_budget
from .functional import keep_and_fuse, num_kept
from .guiding import guide
from .last_block import skip_unread_outputs
from .pairs.encode import encode_prefix
from .pairs.prefix import Prefix
from .pairs.score import score_pairs
from .patching import Handle, apply, handle_of, remove
from .recording import Selected, Trace, restore
from .reduction import Reduction
from .relevance import Candidates, Relevance
from .selection import PatchSelection
from .shortening import shorten

try:
    __version__ = version("patchselect")
except PackageNotFoundError:  # pragma: no cover - a source tree that is not installed
    __version__ = "0"

__all__ = [
    "Adapter",
    "Candidates",
    "Handle",
    "PatchSelection",
    "Prefix",
    "Reduction",
    "Relevance",
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
    "shorten",
    "skip_unread_outputs",
    "visualization",
]
