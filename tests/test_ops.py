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
