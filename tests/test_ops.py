import pytest
import torch

from fastdpo import ops


@pytest.mark.parametrize(
    ("broken", "message"),
    [("label", r"labels in \[0, 7\), got -100 in row 2"), ("hidden", "NaN or Inf in row 1")],
)
def test_the_debug_flag_names_the_row(monkeypatch, broken, message):
    hidden_ND, head_VD = torch.ones(3, 5), torch.ones(7, 5)
    labels_N = torch.zeros(3, dtype=torch.int64)
    if broken == "label":
        labels_N[2] = -100
    else:
        hidden_ND[1, 3] = torch.inf
    assert ops.linear_logps(hidden_ND, head_VD, labels_N).isnan().sum() == 1
    monkeypatch.setenv("FASTDPO_DEBUG", "1")
    with pytest.raises(ValueError, match=message):
        ops.linear_logps(hidden_ND, head_VD, labels_N)


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
