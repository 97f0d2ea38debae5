"""The public names: a change here is a change for everybody who uses them."""

from __future__ import annotations

import importlib

import pytest

import flexpert

NAMES = {
    "flexpert": [
        "UNSET",
        "BiasBalancer",
        "CapacityRouting",
        "CheckpointError",
        "ConfigError",
        "DenseRouting",
        "DistributedError",
        "FlexpertError",
        "InputError",
        "MoE",
        "MoEConfig",
        "MoEInfo",
        "Routing",
        "RoutingContext",
        "RoutingStats",
        "__version__",
        "prepack",
        "routing_scope",
        "unpack",
    ],
    "flexpert.balancers": ["BiasBalancer"],
    "flexpert.convert": [
        "METHODS",
        "Clone",
        "ConversionReport",
        "Granular",
        "Importance",
        "LayerReport",
        "Method",
        "Sizes",
        "Slice",
        "choose_mlps",
        "convert",
        "extract",
        "find_mlps",
        "grow",
        "load",
        "measure_model",
        "neuron_importance",
        "save",
        "to_dense",
    ],
    "flexpert.experts": [
        "ConstantExperts",
        "CopyExperts",
        "DropoutGLUExperts",
        "DropoutMLPExperts",
        "ExpertBank",
        "ExpertBatch",
        "GLUExperts",
        "MLPExperts",
        "MixedExperts",
        "ModuleExperts",
        "PackableBank",
        "SharedExpert",
        "StackedModules",
        "ZeroExperts",
        "build_experts",
        "build_shared",
        "prepack",
        "unpack",
    ],
    "flexpert.losses": [
        "balance",
        "balance_first_choice",
        "build_losses",
        "entropy",
        "importance_load",
        "z_loss",
    ],
    "flexpert.routers": [
        "CosineRouter",
        "ExpertChoiceRouter",
        "HashRouter",
        "LinearRouter",
        "Router",
        "SoftRouter",
        "TokenChoiceRouter",
        "build_router",
    ],
    "flexpert.testing": [
        "TOLERANCES",
        "NaiveResult",
        "RankPool",
        "assert_close",
        "naive_moe",
        "relative_error",
        "run_ranks",
    ],
}


@pytest.mark.parametrize("module", NAMES)
def test_names_are_these_and_exist(module):
    room = importlib.import_module(module)
    assert sorted(room.__all__) == sorted(NAMES[module])
    for name in room.__all__:
        assert getattr(room, name) is not None


def test_names_for_configs():
    from flexpert.combine import COMBINES
    from flexpert.core.registry import EXPERTS, LOSSES, ROUTERS

    assert {"cosine", "expert_choice", "hash", "linear", "soft"} <= set(ROUTERS.names())
    assert {"constant", "copy", "glu", "mlp", "zero"} <= set(EXPERTS.names())
    assert {"balance", "balance_first_choice", "entropy", "importance_load", "z"} <= set(LOSSES.names())
    assert sorted(COMBINES) == ["one_plus", "scaled", "sum", "weighted_input"]


def test_version():
    major, minor, patch = flexpert.__version__.split(".")
    assert (major + minor + patch).isdigit()
