"""Dispatch modes that see what every operator of a piece of code does."""

import math
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fastdpo.kernels.products import has_good_onednn

# on a GPU, operators whose result, or its size, the CPU waits for
WAITS = {"_local_scalar_dense", "bincount", "equal", "masked_select", "nonzero", "_unique2"}


def waits(func, args, kwargs):
    """Whether the CPU would wait for a GPU in this call of an operator."""
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):  # a mask is counted
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    if name == "repeat_interleave":
        return kwargs.get("output_size") is None
    return name in WAITS


class Watch(TorchDispatchMode):
    """Fails on what makes the CPU wait for a GPU, and keeps the size of the largest tensor made.

    It does not see .tolist(), .cpu() and .numpy() of a tensor that is on the CPU already.
    """

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert not waits(func, args, kwargs or {}), func
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.nbytes)
        return out


class Live(TorchDispatchMode):
    """The most bytes of new storages that were alive at once."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = [x for x in (*args, *(kwargs or {}).values()) if isinstance(x, torch.Tensor)]
        given = {x.untyped_storage()._cdata for x in given}
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, torch.Tensor):
                storage = x.untyped_storage()
                if storage._cdata not in given | self.seen:
                    self._add(storage)
        return out

    def _add(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.seen.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def freed():
            self.seen.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def _onednn_flops(x_shape, *_, out_shape, **__):
    return 2 * x_shape[1] * math.prod(out_shape)


def counting_flops():
    """A FlopCounterMode that knows oneDNN's products too."""
    has_good_onednn()  # which looks once, at two products
    return FlopCounterMode(
        display=False, custom_mapping={torch.ops.mkldnn._linear_pointwise: _onednn_flops}
    )
