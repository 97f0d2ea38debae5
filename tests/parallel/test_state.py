"""Models over ranks as those of one process: out whole, in by parts."""

from __future__ import annotations

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexpert.core.errors import FlexpertError
from flexpert.parallel import expert_mesh, full_state_dict, load_full_state_dict, parallelize
from flexpert.testing import run_ranks
from tests.parallel.cases import D, make_layer

LAYOUTS = {2: {"replicas": 2}, 3: {}, 4: {"slices": 2}}


def build(seed, dense, experts=12):
    """A layer between dense ones, all values from the seed; laid out where there are ranks."""
    torch.manual_seed(seed)
    layer = make_layer("glu", num_experts=experts)
    model = torch.nn.Sequential(torch.nn.Linear(D, D), layer, torch.nn.Linear(D, 5)).double()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(generator=generator)
    if dist.is_initialized():
        parallelize(model, expert_mesh(experts, **LAYOUTS[dist.get_world_size()]), dense=dense)
    return model


def same(got, want):
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def export(dense):
    model = build(1, dense)
    model(torch.ones(3, D, dtype=torch.float64))
    return [full_state_dict(model, rank=rank) for rank in (0, dist.get_world_size() - 1)]


def test_an_export_is_the_model_of_one_process():
    want = build(1, None).state_dict()
    for world in LAYOUTS:
        for dense in ("ddp", "fsdp"):
            ranks = run_ranks(export, world, dense)
            for rank, (first, last) in enumerate(ranks):
                assert same(first, want) if rank == 0 else first == {}, (world, dense, rank)
                assert same(last, want) if rank == world - 1 else last == {}, (world, dense, rank)
            assert list(ranks[0][0]) == list(want)


def test_an_export_is_a_copy():
    model = build(1, None)
    exported = full_state_dict(model)
    want = {name: tensor.clone() for name, tensor in exported.items()}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert same(exported, want)


def imports(dense, tensors, path):
    """What the model is after it took the tensors in each of the ways."""
    exports = []
    for way in (
        lambda model: load_full_state_dict(model, tensors),
        lambda model: load_full_state_dict(model, path),
        lambda model: model.load_state_dict(tensors),
        lambda model: [
            part.load_state_dict({k[2:]: v for k, v in tensors.items() if k.startswith(f"{i}.")})
            for i, part in enumerate(model)
        ],
    ):
        model = build(2, dense)
        pointers = [p.data_ptr() for p in model[1].experts.parameters()]
        model(torch.ones(3, D, dtype=torch.float64))  # FSDP has put the dense parameters together
        way(model)
        assert pointers == [p.data_ptr() for p in model[1].experts.parameters()]
        exports.append(full_state_dict(model))
    return exports


def test_tensors_of_one_process_come_in(tmp_path):
    want = build(1, None).state_dict()
    path = tmp_path / "model.safetensors"
    save_file(want, path)
    for world in LAYOUTS:
        for dense in ("ddp", "fsdp"):
            first, *others = run_ranks(imports, world, dense, dict(want), path)
            assert all(same(exported, want) for exported in first), (world, dense)
            assert all(not exported for exported in [e for exported in others for e in exported])


def test_a_round_trip_of_a_model_that_is_not_distributed(tmp_path):
    model, path = build(1, None), tmp_path / "model.safetensors"
    save_file(full_state_dict(model), path)
    assert same(load_file(path), model.state_dict())
    other = build(2, None)
    load_full_state_dict(other, path)
    assert same(other.state_dict(), model.state_dict())
    load_full_state_dict(other, {k: v.float() for k, v in build(3, None).state_dict().items()})
    assert all(t.dtype is torch.float64 for t in other.state_dict().values())


class Counting:
    """A safetensors slice that notes how many elements are read."""

    read = 0

    def __init__(self, inner):
        self.inner = inner

    def __getitem__(self, index):
        part = self.inner[index]
        Counting.read += part.numel()
        return part

    def __getattr__(self, name):
        return getattr(self.inner, name)


def count_elements(path):
    import safetensors

    class File:
        def __init__(self, *args, **kwargs):
            self.inner = safe_open(*args, **kwargs)

        def get_slice(self, name):
            return Counting(self.inner.get_slice(name))

        def __enter__(self):
            self.inner.__enter__()
            return self

        def __exit__(self, *error):
            return self.inner.__exit__(*error)

        def __getattr__(self, name):
            return getattr(self.inner, name)

    model = build(2, None)
    Counting.read, genuine, safetensors.safe_open = 0, safetensors.safe_open, File
    try:
        load_full_state_dict(model, path)
    finally:
        safetensors.safe_open = genuine
    return Counting.read, sum(p.to_local().numel() for p in model[1].experts.parameters())


def test_a_rank_reads_its_experts_only(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file(build(1, None).state_dict(), path)
    for read, held in run_ranks(count_elements, 3, path):
        assert read == held > 0


def error_of(work):
    try:
        work()
    except FlexpertError as error:
        return f"{type(error).__name__}: {error}"
    return None


def refusals(tensors, folder):
    model = build(2, "fsdp")
    before, given = full_state_dict(model), dict(tensors)
    if dist.get_rank() == 1:
        del given["0.weight"]
        given["1.experts.w1"] = given["1.experts.w1"][:4]
        given["3.weight"] = torch.zeros(1)
    (folder / "damaged.safetensors").write_bytes(b"12")
    sources = given, folder / "absent.safetensors", folder / "damaged.safetensors"
    errors = [error_of(lambda s=source: load_full_state_dict(model, s)) for source in sources]
    unchanged = same(full_state_dict(model), before)
    short = {**tensors, "1.experts.w1": tensors["1.experts.w1"][:4]}
    return [*errors, error_of(lambda: model.load_state_dict(short))], unchanged


def test_what_does_not_fit_is_refused_on_all_ranks_and_nothing_is_copied(tmp_path):
    tensors = dict(build(1, None).state_dict())
    for errors, unchanged in run_ranks(refusals, 2, tensors, tmp_path):
        assert unchanged
        listed, absent, damaged, shape = errors
        for part in (
            "missing: 0.weight",
            "unknown: 3.weight",
            "1.experts.w1 [4, 2, 8, 6] instead of [12, 2,",
        ):
            assert part in listed
        assert "absent.safetensors cannot be read" in absent
        assert "damaged.safetensors cannot be read" in damaged
        assert "1.experts.w1 has shape (4, 2, 8, 6) in the checkpoint, (12, 2, 8, 6) in this layer" in shape


def buffers_over_ranks(dense, start):
    """What a rank holds of a bank with buffers, and the model after a call and after each way in."""
    torch.manual_seed(5)
    world = dist.get_world_size()
    model = torch.nn.Sequential(torch.nn.Linear(D, D), make_layer("stacked", num_experts=12)).double()
    parallelize(model, expert_mesh(12, **LAYOUTS[world]), dense=dense)
    bank = model[1].experts
    held = sum(t.to_local().numel() for t in [*bank.parameters(), *bank.buffers()])
    plain = [name for name, t in bank.state_dict().items() if not hasattr(t, "to_local")]
    ways = [lambda: load_full_state_dict(model, start), lambda: model.load_state_dict(start)]
    exports = []
    for way in ways:
        with torch.no_grad():
            for tensor in [*bank.parameters(), *bank.buffers()]:
                tensor.to_local().zero_()
        way()
        exports.append(full_state_dict(model))
    return held, plain, exports, model(torch.ones(3, D, dtype=torch.float64)).detach()


def test_buffers_are_cut_as_parameters_are():
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(D, D), make_layer("stacked", num_experts=12)).double()
    want, y = model.state_dict(), model(torch.ones(3, D, dtype=torch.float64)).detach()
    assert {"1.experts.module.scale", "1.experts.module.place"} <= want.keys()
    each = sum(tensor[0].numel() for tensor in model[1].experts.state_dict().values())
    for world, dense in ((3, "ddp"), (3, "fsdp"), (2, "ddp")):
        ranks = run_ranks(buffers_over_ranks, world, dense, dict(want))
        for rank, (held, plain, exports, got) in enumerate(ranks):
            assert plain == []
            assert held == each * (4 if world == 3 else 12)  # of two ranks each is a replica
            torch.testing.assert_close(got, y)
            for exported in exports:
                assert same(exported, want) if rank == 0 else exported == {}
