"""The gradient of a tile's logits: torch's and Triton's against what a loop over rows makes."""

import pytest
import torch

from fastdpo.kernels.dlogits import BLOCK_T, DLOGITS


@pytest.mark.parametrize("backend", DLOGITS)
@pytest.mark.parametrize("width", [1, 40, BLOCK_T, BLOCK_T + 7])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_are_scaled_and_labels_are_put_in(backend, width, in_place, dtype, device):
    N, start, random = 5, 100, torch.Generator().manual_seed(0)
    p_NT = torch.rand(N, width, generator=random).to(dtype)
    row_scale_N, dlabel_N = torch.randn(2, N, generator=random)
    row_scale_N[3] = dlabel_N[3] = float("nan")
    # the first and the last column, those beside them, and one far away
    labels_N = torch.tensor([start, start + width - 1, start - 1, start + width, 0])
    wanted_NT = p_NT.double() * row_scale_N[:, None]
    for n, label in enumerate(labels_N.tolist()):
        if start <= label < start + width:
            p_NT[n, label - start] = 0  # as the fold leaves it
            wanted_NT[n, label - start] = dlabel_N[n]
    whole_NT = torch.full((N, width + 3), float("nan"), dtype=dtype, device=device)
    out_NT = whole_NT[:, :width]
    tensors = [x.to(device) for x in (row_scale_N, dlabel_N, labels_N)]
    if in_place:
        out_NT.copy_(p_NT)
    DLOGITS[backend](out_NT if in_place else p_NT.to(device), out_NT, *tensors, start)
    error = 2e-3 if dtype == torch.float16 else 1e-6
    torch.testing.assert_close(
        out_NT.cpu().double(), wanted_NT, rtol=error, atol=error, equal_nan=True
    )
    assert whole_NT[:, width:].isnan().all(), "nothing is written beside the tile"
