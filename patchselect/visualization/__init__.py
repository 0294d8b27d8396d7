"""Pictures of what was kept; `python -m patchselect.visualization` draws one from the command line."""

from .drawing import denormalise, draw_selection, fused_shares, kept_map, relevance_map

__all__ = ["denormalise", "draw_selection", "fused_shares", "kept_map", "relevance_map"]
