"""An update that runs again finds what it found when it began, as often as it has to."""

from types import SimpleNamespace

import torch

from fastdpo.update_start import UpdateStart


def test_an_update_may_start_again_twice():
    model = torch.nn.Linear(2, 2)
    model.weight.grad = torch.ones(2, 2)  # of an earlier batch; the bias has none
    args = SimpleNamespace(device=torch.device("cpu"))
    trainer = SimpleNamespace(model=model, args=args, counts={"pairs": [1]})
    start, drawn = UpdateStart(trainer, ["counts"]), []
    for _ in range(3):
        assert torch.equal(model.weight.grad, torch.ones(2, 2)) and model.bias.grad is None
        assert trainer.counts == {"pairs": [1]}
        trainer.counts["pairs"].append(2)
        drawn.append(torch.rand(()).item())
        model(torch.ones(1, 2)).sum().backward()
        start.restore()
    assert len({*drawn}) == 1
