"""The family of errors."""

from __future__ import annotations

import pytest

import flexpert


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("ConfigError", ValueError),
        ("InputError", ValueError),
        ("CheckpointError", RuntimeError),
        ("DistributedError", RuntimeError),
    ],
)
def test_each_is_ours_and_of_a_builtin_kind(name, builtin):
    error = getattr(flexpert, name)
    assert issubclass(error, flexpert.FlexpertError)
    assert issubclass(error, builtin)
