"""The table of what releases lack is true of the release that is installed."""

from __future__ import annotations

import importlib

import pytest
from packaging.version import Version
from since import FEATURES, Feature, installed, missing


def exists(feature: Feature) -> bool:
    module, attribute = feature.probe.split(":")
    try:
        return hasattr(importlib.import_module(module), attribute)
    except ImportError:
        return False


@pytest.mark.parametrize("name", [name for name, feature in FEATURES.items() if feature.probe])
def test_a_release_has_what_the_table_says_and_no_older_one(name):
    feature = FEATURES[name]
    found = installed(feature.package)
    if found is None:
        assert not exists(feature), f"{feature.package} is here under another name"
    else:
        assert exists(feature) == (found >= Version(feature.first)), f"{feature.package} {found}"


def test_a_reason_names_the_release_that_would_do():
    feature = Feature("python", "99", "there is no such Python")
    FEATURES["python of the future"] = feature
    try:
        assert missing("python of the future").startswith("there is no such Python before python 99 (here: 3.")
    finally:
        del FEATURES["python of the future"]
    FEATURES["nothing"] = Feature("a-package-that-nobody-has", "1", "")
    try:
        assert missing("nothing") == "a-package-that-nobody-has is not in this environment"
    finally:
        del FEATURES["nothing"]
