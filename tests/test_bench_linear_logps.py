"""bench/bench_linear_logps.py: a wrong head is not timed."""

import pytest

from bench import bench_linear_logps as heads
from bench.head_ways import WAYS, dpo_loss, naive


@pytest.mark.parametrize("mode", ["forward", "frozen", "trained"])
def test_a_right_head_passes(mode):
    heads.errors("naive", heads.step("naive", mode, *heads.inputs("tiny")), heads.truth("tiny")[1])


def test_a_head_without_a_gradient_is_wrong(monkeypatch):
    def of_a_frozen_head(hidden_ND, head_VD, labels_N):
        return dpo_loss(naive(hidden_ND, head_VD.detach(), labels_N))

    monkeypatch.setitem(WAYS, "naive", of_a_frozen_head)
    made = heads.step("naive", "trained", *heads.inputs("tiny"))
    with pytest.raises(AssertionError, match="a gradient is missing"):
        heads.errors("naive", made, heads.truth("tiny")[1])
