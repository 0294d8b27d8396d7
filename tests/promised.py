"""The hosts on which every promise of the contract is tested."""

from __future__ import annotations

import pytest
from hosts import HOSTS
from since import SLOW

RATE = 0.5
NAMES = [*HOSTS, "llava", "vipllava", "paligemma"]
every_host = pytest.mark.parametrize("name", NAMES)
packed_too = pytest.mark.parametrize(
    "name", [*NAMES, *(["qwen2_vl", "qwen2_5_vl", "qwen3_vl"] if SLOW else ["qwen2_vl"])]
)
"""Hosts whose images stand one behind the other as well; test_multimodal_packed.py has what differs there."""
