"""Triton or torch, and that both refuse alike."""

import pytest
import torch

from fastdpo import ops
from fastdpo.kernels import pair_loss as kernel


@pytest.mark.parametrize(
    ("device", "name"),
    [("cuda", "triton"), ("cuda:1", "triton"), ("cpu", "torch"), ("mps", "torch")],
)
def test_triton_runs_on_cuda_and_torch_on_all_else(device, name):
    assert ops.backend_for(torch.device(device)) == name


def test_a_cpu_scores_in_float64():
    hidden_ND, head_VD = torch.randn(3, 5).double(), torch.randn(7, 5).double()
    labels_N = torch.tensor([0, 6, 3])
    expected = (hidden_ND @ head_VD.T).log_softmax(1).gather(1, labels_N[:, None]).squeeze(1)
    torch.testing.assert_close(ops.linear_logps(hidden_ND, head_VD, labels_N), expected)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (-100, r"labels in \[0, 7\), got -100 in scored row 1"),
        (7, r"labels in \[0, 7\), got 7 in scored row 1"),
        ("hidden", "NaN or Inf in scored row 1"),
    ],
)
def test_the_debug_flag_names_the_first_row(monkeypatch, broken, message):
    hidden_ND, head_VD = torch.ones(4, 5), torch.ones(7, 5)
    labels_N = torch.tensor([0, 0, 6, 0])
    if broken == "hidden":
        hidden_ND[[1, 3], 3] = torch.inf
    else:
        labels_N[[1, 3]] = broken
    for flag in ("", "0"):
        monkeypatch.setenv("FASTDPO_DEBUG", flag)
        assert ops.linear_logps(hidden_ND, head_VD, labels_N).isnan().sum() == 2
    monkeypatch.setenv("FASTDPO_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        ops.linear_logps(hidden_ND, head_VD, labels_N)


LENGTHS = torch.tensor([0, 2, 5], dtype=torch.int32)
TWINS = [ops.pair_loss, kernel.pair_loss]


@pytest.mark.parametrize("twin", TWINS, ids=["here", "triton"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"loss_type": ("nope",)}, "want loss_type of .*'nope'"),
        ({"loss_type": ()}, "want loss_type of"),
        ({"loss_type": ("sigmoid", "hinge"), "loss_weights": (1.0,)}, "a weight for each"),
        ({"f_divergence_type": "nope"}, "want f_divergence_type in"),
        ({"loss_type": ("robust",), "label_smoothing": 0.5}, "from 0 and below 0.5"),
        ({"loss_type": ("exo_pair",), "label_smoothing": 0.0}, "above 0 and below 0.5"),
        ({"label_smoothing": -0.1}, "from 0 and below 0.5"),
    ],
    ids=str,
)
def test_both_losses_refuse_the_same_settings(twin, settings, message):
    with pytest.raises(ValueError, match=message):
        twin(torch.zeros(5), LENGTHS, torch.zeros(2), beta=0.1, **settings)


@pytest.mark.parametrize("twin", TWINS, ids=["here", "triton"])
def test_both_losses_refuse_the_same_tensors(twin):
    for arguments in (
        (torch.zeros(5), LENGTHS, torch.zeros(4)),
        (torch.zeros(5), LENGTHS.long(), torch.zeros(2)),
        (torch.zeros(5).bfloat16(), LENGTHS, torch.zeros(2)),
    ):
        with pytest.raises(ValueError, match="want"):
            twin(*arguments, beta=0.1)


def test_on_a_cpu_lengths_that_do_not_fit_the_tokens_are_refused():
    ops.pair_loss(torch.zeros(5), LENGTHS, torch.zeros(2), beta=0.1)
    for wrong in ([0, 2, 4], [0, 2, 6], [1, 2, 5], [0, 6, 5]):
        lengths = torch.tensor(wrong, dtype=torch.int32)
        with pytest.raises(ValueError, match="want cu_seqlens that rise from 0 to 5"):
            ops.pair_loss(torch.zeros(5), lengths, torch.zeros(2), beta=0.1)


def test_a_compiler_does_not_unroll_the_walk_over_the_vocabulary():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    hidden_ND, head_VD = torch.randn(20, 8), torch.randn(50, 8)
    labels_N = torch.arange(20)
    doubled = torch.compile(lambda x: ops.linear_logps(2 * x, head_VD, labels_N), backend=backend)
    assert torch.equal(doubled(hidden_ND), ops.linear_logps(2 * hidden_ND, head_VD, labels_N))
    calls = [node.name for g in graphs for node in g.graph.nodes if node.op.startswith("call")]
    assert calls == ["mul"]
