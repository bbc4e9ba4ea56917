"""save -> load gives every bit back, for any dtype, shape, pattern and mask."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import sparseworks as sw
from sparseworks.core.masks import Masks
from sparseworks.io.codes import code_bits, codes_to_mask, mask_to_codes
from sparseworks.io.container import DTYPES

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf support")
ALL_DTYPES = [*DTYPES.values(), torch.complex128, torch.complex32]


class Holder(nn.Module):
    """A module with the given tensors: a parameter where the dtype allows one, else a buffer."""

    def __init__(self, **tensors: Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if tensor.is_floating_point() or tensor.is_complex():
                self.register_parameter(name, nn.Parameter(tensor, requires_grad=False))
            else:
                self.register_buffer(name, tensor)


def bits(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Any bit pattern: NaN payloads, infinities, denormals, -0.0."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, (count,), generator=generator).bool().view(shape)
    raw = torch.randint(0, 256, (count * dtype.itemsize,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).view(shape)


def zeroed(tensor: Tensor, where: Tensor, negative: bool = False) -> Tensor:
    """A copy in which some elements are 0 (or have only their top bit set), by their bytes."""
    raw = tensor.clone().reshape(-1).view(torch.uint8).view(-1, tensor.dtype.itemsize)
    raw[where.reshape(-1)] = 0
    if negative:
        raw[where.reshape(-1), -1] = 0x80
    return raw.reshape(-1).view(tensor.dtype).view(tensor.shape)


def reload(model: nn.Module, folder: Path, **options: bool) -> nn.Module:
    """The model saved, and loaded into one whose bits are all different."""
    sw.save(model, folder / "m.safetensors", **options)
    other = Holder(**{n: torch.empty_like(t) for n, t in model.state_dict().items()})
    for tensor in other.state_dict().values():
        if tensor.numel() and tensor.dtype != torch.bool:
            tensor.view(-1).view(torch.uint8).fill_(0x5A)
    return sw.load(folder / "m.safetensors", other)


shapes = st.sampled_from(
    [(), (0,), (1,), (7,), (8,), (3, 0), (5, 9), (16, 8), (4, 6, 3, 3), (2, 3, 8), (33, 31)]
)


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(ALL_DTYPES),
    density=st.sampled_from([0.0, 0.05, 0.5, 0.95, 1.0]),
    negative=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_every_bit_comes_back_without_a_mask(
    shape, dtype, density, negative, seed, tmp_path_factory
):
    tensor = random_bits(shape, dtype, seed)
    drop = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) >= density
    tensor = zeroed(tensor, drop, negative and dtype != torch.bool)
    model = Holder(a=tensor)
    back = reload(model, tmp_path_factory.mktemp("rt"))
    assert bits(back.a) == bits(tensor)
    assert sw.masks(back) is None


@settings(max_examples=150, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from(ALL_DTYPES),
    density=st.sampled_from([0.0, 0.5, 0.9]),
    masked=st.booleans(),
    pattern=st.sampled_from(["unstructured", "2:4"]),
    seed=st.integers(0, 2**31),
)
def test_without_signed_zeros_all_other_bits_come_back(
    shape, dtype, density, masked, pattern, seed, tmp_path_factory
):
    """Where a number is equal to 0 it comes back as +0.0, for every dtype that has a -0.0."""
    kept = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < density
    tensor = random_bits(shape, dtype, seed)
    if dtype != torch.bool:
        tensor = zeroed(tensor, ~kept, True)
    before = bits(tensor)
    model = Holder(a=tensor)
    if masked and isinstance(model.a, nn.Parameter):
        sw.attach(model, Masks.of({"a": kept}, "wanda", pattern))
    back = reload(model, tmp_path_factory.mktemp("rt"), signed_zeros=False)
    numbers = torch.view_as_real(tensor) if dtype.is_complex else tensor
    if numbers.is_floating_point():
        zero = numbers.to(torch.float64) == 0
        numbers = zeroed(numbers, zero)
    assert bits(back.a) == bits(numbers) and bits(model.a) == before


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fnuz])
def test_a_lone_top_bit_is_a_zero_only_where_it_is_minus_zero(dtype, tmp_path):
    """The smallest integer, and the NaN of types without -0.0, count as weights."""
    tensor = zeroed(torch.ones(64).to(dtype), torch.arange(64) % 2 == 0, True)
    info = sw.save(Holder(a=tensor), tmp_path / "m.safetensors", signed_zeros=False)
    assert info.tensors[0].sparsity == 0.0 and info.signed_zero_bytes == 0


@settings(max_examples=200, deadline=None)
@given(
    shape=shapes,
    dtype=st.sampled_from([d for d in ALL_DTYPES if d.is_floating_point or d.is_complex]),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    outside=st.sampled_from(["zero", "minus zero", "some values", "mixed"]),
    zero_inside=st.booleans(),
    pattern=st.sampled_from(["unstructured", "row", "block2x2", "2:4"]),
    seed=st.integers(0, 2**31),
)
def test_values_and_mask_come_back(
    shape, dtype, density, outside, zero_inside, pattern, seed, tmp_path_factory
):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(shape, generator=generator) < density
    tensor = random_bits(shape, dtype, seed)
    if outside in ("zero", "mixed"):
        tensor = zeroed(tensor, ~mask)
    if outside == "minus zero":
        tensor = zeroed(tensor, ~mask, True)
    if outside == "mixed":
        tensor = zeroed(tensor, ~mask & (torch.rand(shape, generator=generator) < 0.5), True)
    if zero_inside:
        tensor = zeroed(tensor, mask & (torch.rand(shape, generator=generator) < 0.3))
    model = Holder(a=tensor, b=torch.ones(3))
    sw.attach(model, Masks.of({"a": mask}, "wanda", pattern))
    back = reload(model, tmp_path_factory.mktemp("rt"))
    assert bits(back.a) == bits(tensor)
    record = sw.masks(back)
    assert record is not None and list(record) == ["a"] and record.method == "wanda"
    assert torch.equal(record["a"], mask)
    assert record.entry("a").pattern == pattern
    assert record.entry("a").kept == int(mask.sum())


def nm_mask(shape: tuple[int, ...], n: int, m: int, axis: int, seed: int) -> Tensor:
    """Exactly n of every m along an axis, chosen one run at a time."""
    generator = torch.Generator().manual_seed(seed)
    moved = torch.zeros(shape, dtype=torch.bool).movedim(axis, -1).contiguous()
    for run in moved.view(-1, m):
        run[torch.randperm(m, generator=generator)[:n]] = True
    return moved.movedim(-1, axis).contiguous()


@settings(max_examples=80, deadline=None)
@given(
    case=st.sampled_from(
        [
            ((16, 32), 1),
            ((16, 32), 0),
            ((8, 16, 3, 3), 1),
            ((3, 16, 32), 2),
            ((3, 16, 8), 1),
            ((96,), 0),
        ]
    ),
    nm=st.sampled_from([(2, 4), (1, 4), (3, 4), (4, 8), (1, 2), (7, 16), (5, 8)]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float64]),
    negative=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_nm_masks_come_back(case, nm, dtype, negative, seed, tmp_path_factory):
    shape, axis = case
    n, m = nm
    if shape[axis] % m:
        return
    mask = nm_mask(shape, n, m, axis, seed)
    tensor = zeroed(random_bits(shape, dtype, seed), ~mask, negative)
    model = Holder(a=tensor)
    sw.attach(model, Masks.of({"a": mask}, "magnitude", f"{n}:{m}"))
    back = reload(model, tmp_path_factory.mktemp("rt"))
    assert bits(back.a) == bits(tensor)
    assert torch.equal(sw.masks(back)["a"], mask)


def test_slices_join_exactly(tmp_path, monkeypatch):
    """Tensors longer than a slice, with slice ends at every offset of a byte and a run."""
    for module in ("encoding", "packed", "plain"):
        monkeypatch.setattr(f"sparseworks.io.{module}.SLICE", 72)
    for seed, (shape, pattern) in enumerate(
        [((37, 29), "unstructured"), ((40, 36), "3:9"), ((24, 20), "2:5"), ((40, 48), "2:4")]
    ):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.3
        if ":" in pattern:
            n, m = map(int, pattern.split(":"))
            mask = nm_mask(shape, n, m, 1 if shape[1] % m == 0 else 0, seed)
        for negative in (False, True):
            half = torch.rand(shape, generator=torch.Generator().manual_seed(9)) < 0.5
            tensor = zeroed(torch.randn(shape), ~mask)
            tensor = zeroed(tensor, ~mask & half, negative)
            model = Holder(a=tensor, b=torch.randn(50, 7))
            sw.attach(model, Masks.of({"a": mask}, "x", pattern))
            back = reload(model, tmp_path)
            assert bits(back.a) == bits(tensor) and bits(back.b) == bits(model.b)
            assert torch.equal(sw.masks(back)["a"], mask)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2), (8, 16), (1, 3)])
def test_codes_are_a_bijection(n, m):
    """Every legal run has a code of its own within the promised number of bits."""
    patterns = [p for p in range(1 << m) if p.bit_count() == n]
    mask = torch.tensor([[(p >> i) & 1 for i in range(m)] for p in patterns]).bool()
    packed = mask_to_codes(mask.reshape(-1), n, m)
    assert packed is not None
    assert packed.numel() == (len(patterns) * code_bits(n, m) + 7) // 8
    assert torch.equal(codes_to_mask(packed, len(patterns), n, m), mask.reshape(-1))
    assert 2 ** code_bits(n, m) >= len(patterns) > 2 ** (code_bits(n, m) - 1)


def test_a_run_that_does_not_keep_n_has_no_code():
    assert mask_to_codes(torch.tensor([1, 1, 1, 0]).bool(), 2, 4) is None


def test_strides_do_not_matter(tmp_path):
    """Transposed and channels-last tensors come back equal, into either kind of memory."""
    weight = torch.randn(8, 6, 3, 3)
    weight[weight < 0] = 0
    model = Holder(a=weight.contiguous(memory_format=torch.channels_last), b=weight[0, 0].t())
    sw.save(model, tmp_path / "m.safetensors")
    for other in (
        Holder(a=torch.empty(8, 6, 3, 3), b=torch.empty(3, 3)),
        Holder(
            a=torch.empty(8, 6, 3, 3).contiguous(memory_format=torch.channels_last),
            b=torch.empty(3, 3).t(),
        ),
    ):
        sw.load(tmp_path / "m.safetensors", other)
        assert torch.equal(other.a, model.a) and torch.equal(other.b, model.b)


def test_tied_weights_are_stored_once_and_buffers_are_kept(tmp_path):
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(100, 16)
            self.norm = nn.BatchNorm1d(16)
            self.head = nn.Linear(16, 100, bias=False)
            self.head.weight = self.embed.weight

    model, other = Tied(), Tied()
    model.norm.running_mean.copy_(torch.randn(16))
    info = sw.save(model, tmp_path / "m.safetensors")
    assert info.file_bytes < 100 * 16 * 4 + 4096 and info.ties == {"head.weight": "embed.weight"}
    sw.load(tmp_path / "m.safetensors", other)
    assert torch.equal(other.embed.weight, model.embed.weight)
    assert other.head.weight is other.embed.weight
    assert torch.equal(other.norm.running_mean, model.norm.running_mean)
    other.head.weight = nn.Parameter(torch.zeros(100, 16))
    sw.load(tmp_path / "m.safetensors", other)
    assert torch.equal(other.head.weight, model.embed.weight)


def test_masks_under_an_alias_keep_their_name(tmp_path):
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    mask = torch.rand(8, 8) < 0.5
    record = Masks.of({"b.weight": mask}, "m")
    record.apply(model)
    sw.attach(model, record)
    sw.save(model, tmp_path / "m.safetensors")
    other = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    sw.load(tmp_path / "m.safetensors", other)
    assert list(sw.masks(other)) == ["b.weight"]
    assert torch.equal(sw.masks(other)["b.weight"], mask)


def test_loading_replaces_the_mask_record(tmp_path):
    model, other = nn.Linear(8, 8), nn.Linear(8, 8)
    sw.attach(other, Masks.of({"weight": torch.rand(8, 8) < 0.5}))
    sw.save(model, tmp_path / "m.safetensors")
    sw.load(tmp_path / "m.safetensors", other)
    assert sw.masks(other) is None


def test_meta_parameters_are_created(tmp_path):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    sw.save(model, tmp_path / "m.safetensors")
    with torch.device("meta"):
        other = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    other[1].weight.requires_grad_(False)
    sw.load(tmp_path / "m.safetensors", other)
    assert torch.equal(other[1].weight, model[1].weight) and not other[1].weight.requires_grad
    assert other[0].weight.requires_grad


def test_other_readers_see_the_parts(tmp_path):
    """The file is a valid safetensors file for the format's own library."""
    from safetensors import safe_open

    model = nn.Linear(64, 64)
    mask = torch.rand(64, 64) < 0.1
    record = Masks.of({"weight": mask}, "magnitude")
    record.apply(model)
    sw.attach(model, record)
    sw.save(model, tmp_path / "m.safetensors")
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert set(file.keys()) == {"weight::values", "weight::bitmask", "bias"}
        assert torch.equal(file.get_tensor("weight::values"), model.weight[mask])
        assert torch.equal(file.get_tensor("bias"), model.bias)


def test_wrappers_are_looked_through(tmp_path):
    """`torch.compile` and data-parallel wrappers add prefixes that no one wants in a file."""
    for wrap in (nn.DataParallel, lambda m: torch.compile(m, backend="eager")):
        model, other = nn.Linear(8, 8), nn.Linear(8, 8)
        record = Masks.of({"weight": torch.rand(8, 8) < 0.5}, "m")
        record.apply(model)
        sw.attach(model, record)
        sw.save(wrap(model), tmp_path / "m.safetensors")
        wrapped = wrap(other)
        assert sw.load(tmp_path / "m.safetensors", wrapped) is wrapped
        assert torch.equal(other.weight, model.weight)
        assert torch.equal(sw.masks(other)["weight"], record["weight"])


def test_a_record_of_the_wrapper_is_kept(tmp_path):
    model = nn.Linear(8, 8)
    wrapped = nn.DataParallel(model)
    record = Masks.of({"module.weight": torch.rand(8, 8) < 0.5}, "m")
    record.apply(wrapped)
    sw.attach(wrapped, record)
    sw.save(wrapped, tmp_path / "m.safetensors")
    other = sw.load(tmp_path / "m.safetensors", nn.Linear(8, 8))
    assert torch.equal(sw.masks(other)["weight"], record["module.weight"])
    sw.save(nn.Linear(8, 8), tmp_path / "m.safetensors")
    sw.load(tmp_path / "m.safetensors", wrapped)
    assert sw.masks(wrapped) is None and sw.masks(model) is None


def test_a_module_without_tensors(tmp_path):
    assert sw.save(nn.ReLU(), tmp_path / "m.safetensors").tensors == ()
    sw.load(tmp_path / "m.safetensors", nn.ReLU())


def test_every_part_is_aligned_for_its_dtype(tmp_path):
    """Readers that map the file need it; the format allows no gaps to make it so afterwards."""
    from safetensors.torch import load_file

    from sparseworks.io.container import Container

    model = Holder(
        a=torch.ones(3, dtype=torch.uint8),
        b=torch.randn(5).double(),
        c=torch.randn(7).bfloat16(),
        d=zeroed(torch.randn(9, 11), torch.rand(9, 11) < 0.9),
        e=torch.randn(3),
    )
    sw.save(model, tmp_path / "m.safetensors")
    with Container(tmp_path / "m.safetensors") as file:
        assert len(file.raw_header) % 8 == 0
        assert all(part.start % part.dtype.itemsize == 0 for part in file.parts.values())
    found = load_file(tmp_path / "m.safetensors")
    assert torch.equal(found["b"], model.b) and torch.equal(found["c"], model.c)


@settings(max_examples=60, deadline=None)
@given(
    nm=st.sampled_from(
        [(2, 4), (1, 4), (4, 8), (1, 2), (8, 16), (1, 16), (1, 3), (5, 11), (7, 13)]
    ),
    runs=st.integers(0, 40),
    seed=st.integers(0, 2**31),
)
def test_codes_are_what_the_format_says(nm, runs, seed):
    """Rank of each pattern in ascending order, one after another, lowest bit first."""
    n, m = nm
    legal = [p for p in range(1 << m) if p.bit_count() == n]
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.randint(0, len(legal), (runs,), generator=generator).tolist()
    mask = torch.tensor([[legal[r] >> i & 1 for i in range(m)] for r in ranks], dtype=torch.bool)
    number = sum(r << (code_bits(n, m) * i) for i, r in enumerate(ranks))
    expected = number.to_bytes((runs * code_bits(n, m) + 7) // 8, "little")
    packed = mask_to_codes(mask.reshape(-1), n, m)
    assert packed is not None and packed.numpy().tobytes() == expected
    assert torch.equal(codes_to_mask(packed, runs, n, m), mask.reshape(-1))
