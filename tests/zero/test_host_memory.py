"""The arena of evicted states: slices that do not touch, storages of their own; too little memory is refused."""

from __future__ import annotations

import pytest
import torch

from agsel.zero.host_memory import ALIGNMENT, Arena, available_bytes, require_host_memory

SHAPES = [torch.Size((3, 5)), torch.Size((3, 1000)), torch.Size((3, 1))]


def test_slices_do_not_touch_and_start_aligned() -> None:
    arena = Arena(SHAPES, torch.float32, pin=False)
    for number, tensor in enumerate(arena.tensors):
        tensor.fill_(number)
    for number, (tensor, shape) in enumerate(zip(arena.tensors, SHAPES, strict=True)):
        assert tensor.shape == shape
        assert (tensor == number).all()
        assert (tensor.data_ptr() - arena.tensors[0].data_ptr()) % ALIGNMENT == 0
    last = arena.tensors[-1]
    assert last.data_ptr() + last.nbytes <= arena.tensors[0].data_ptr() + arena.nbytes


def test_every_slice_has_a_storage_of_its_own_and_outlives_the_arena() -> None:
    tensors = Arena(SHAPES, torch.float32, pin=False).tensors
    assert [t.untyped_storage().nbytes() for t in tensors] == [t.nbytes for t in tensors]
    for tensor in tensors:
        assert (tensor == 0).all()
        tensor.fill_(1)


def test_what_fits_is_accepted(one_rank: None) -> None:
    require_host_memory(available_bytes() // 2, None)


def test_too_little_memory_is_refused_with_the_numbers(one_rank: None) -> None:
    with pytest.raises(ValueError, match=r"need 1000000\.0 GB of host memory on .*--offload_states false"):
        require_host_memory(10**15, None)
