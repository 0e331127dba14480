"""A Tree goes where a batch's tensors go."""

import torch
from accelerate.utils import send_to_device

from fastdpo.tree import Branch, Tree, Trunk

TENSORS = ("cu_seqlens_q", "cu_seqlens_k", "key_indices")


def tree():
    return Tree.of([Trunk(0, 5), Trunk(5, 8)], [Branch(8, 10, 5, 2)])


def test_what_a_branch_sees_is_gathered_from_its_own_trunk():
    assert tree().key_indices.tolist() == [*range(8), 5, 6, 8, 9]
    assert tree().cu_seqlens_q.tolist() == [0, 5, 8, 10] and tree().max_seqlen_q == 5
    assert tree().cu_seqlens_k.tolist() == [0, 5, 8, 12] and tree().max_seqlen_k == 5


def test_a_tree_moves_with_its_batch_and_is_pinned_with_it(monkeypatch):
    moved = send_to_device({"tree": tree()}, "meta")["tree"]
    assert {getattr(moved, name).device.type for name in TENSORS} == {"meta"}
    assert moved.trunks == tree().trunks and moved.branches == tree().branches

    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # needs a GPU
    monkeypatch.setattr(
        torch.Tensor, "to", lambda tensor, device, **how: copies.append(how) or tensor
    )
    pinned = torch.utils.data._utils.pin_memory.pin_memory({"tree": tree()})["tree"]
    assert pinned.key_indices.tolist() == [*range(1, 9), 6, 7, 9, 10]
    send_to_device(pinned, "cpu", non_blocking=True)
    assert copies == [{"non_blocking": True}] * len(TENSORS)
