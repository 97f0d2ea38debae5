"""The marker of absence."""

from __future__ import annotations

import copy

from flexpert import UNSET


def test_there_is_one():
    assert copy.deepcopy(UNSET) is UNSET
    assert copy.copy({"a": [UNSET]})["a"][0] is UNSET
    assert repr(UNSET) == "UNSET"
    assert UNSET is not None
