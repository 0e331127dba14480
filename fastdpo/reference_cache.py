"""Log-probabilities that a reference gave to pairs in earlier runs, in a file for each reference.

A reference is known by its weights, its configuration and its precision, a pair by its token ids
once they are cut: runs with other hyperparameters, batches, layouts and neighbouring rows find what
is there. A file is a row of RECORDs, appended as pairs are scored, so that a run that was killed
goes on where it stopped. A record that is torn, or another reference's, is not taken.
"""

import hashlib
import json
import struct
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
import transformers
from datasets import Dataset
from numpy import ndarray
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers.utils import logging

import fastdpo
from fastdpo.columns import ID_COLUMNS, Cut
from fastdpo.model import causal_lm_of

logger = logging.get_logger(__name__)

RECORD = struct.Struct("<16s16s8s")  # a pair's key, two float64, a digest of both
HASHED_AT_ONCE = 4  # tensors, each copied to CPU memory for that moment


@dataclass(slots=True)
class ReferenceCache:
    """What the reference of this file gave to pairs that are cut so; `found` counts them."""

    path: Path
    cut: Cut
    found: int = 0

    def keys(self, pairs: Dataset) -> list[bytes]:
        """The key of each pair."""
        batches = pairs.with_format("numpy", columns=[*ID_COLUMNS]).iter(1000)
        return [
            self._key(*ids)
            for batch in batches
            for ids in zip(*(batch[name] for name in ID_COLUMNS), strict=True)
        ]

    def find(self, keys: list[bytes]) -> ndarray:
        """(N, 2) float64, chosen and rejected; NaN of a pair that is not there."""
        records = self._records()
        nothing = struct.pack("<2d", np.nan, np.nan)
        logps_N2 = np.frombuffer(b"".join(records.get(key, nothing) for key in keys), "<f8")
        logps_N2 = logps_N2.reshape(-1, 2).astype(np.float64)
        self.found += len(keys) - int(np.isnan(logps_N2).any(1).sum())
        return logps_N2

    def add(self, keys: list[bytes], logps_N2: ndarray) -> None:
        """Append these, with a warning where the file cannot be written."""
        pairs = zip(keys, logps_N2.astype("<f8"), strict=True)
        entries = ((key, logps_2.tobytes()) for key, logps_2 in pairs)
        records = b"".join(RECORD.pack(*entry, self._checksum(*entry)) for entry in entries)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab", buffering=0) as file:
                torn = file.tell() % RECORD.size  # by a run that was killed
                file.write(b"\0" * (-torn % RECORD.size) + records)
        except OSError as error:
            logger.warning_once(
                f"the reference's log-probabilities are not kept for the next run: {error}"
            )

    def _records(self) -> dict[bytes, bytes]:
        """Log-probabilities by key, of the records that are whole and of this reference."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return {}
        except OSError as error:
            logger.warning(f"the reference's log-probabilities of earlier runs: {error}")
            return {}
        whole = data[: len(data) // RECORD.size * RECORD.size]
        return {
            key: logps
            for key, logps, checksum in RECORD.iter_unpack(whole)
            if checksum == self._checksum(key, logps)
        }

    def _checksum(self, key: bytes, logps: bytes) -> bytes:
        reference = self.path.stem.encode()
        return hashlib.blake2b(key + logps, key=reference, digest_size=8).digest()

    def _key(self, prompt: ndarray, chosen: ndarray, rejected: ndarray) -> bytes:
        digest = hashlib.blake2b(digest_size=16)
        for completion in (chosen, rejected):
            for ids in self.cut(prompt, completion):
                digest.update(len(ids).to_bytes(8, "little") + ids.astype("<i8").tobytes())
        return digest.digest()


def open_cache(
    reference: nn.Module, cut: Cut, *, adapters_off: bool, settings: Mapping[str, Any]
) -> ReferenceCache | None:
    """The cache of `reference`, in the folder fastdpo of `datasets`' own.

    adapters_off: whether it runs without what trains in it. settings: whatever else its numbers
    depend on, by name. None where `datasets` is to keep nothing, and where weights are not at hand.
    """
    if not datasets.is_caching_enabled():
        return None
    weights = _weights(reference, adapters_off)
    if any(tensor.is_meta or is_traceable_wrapper_subclass(tensor) for tensor in weights):
        return None
    digest = hashlib.sha256(_description(reference, adapters_off, settings).encode())
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        for each in pool.map(_digest, weights):
            digest.update(each)
    name = f"reference-{digest.hexdigest()[:32]}.logps"
    return ReferenceCache(Path(datasets.config.HF_DATASETS_CACHE, "fastdpo", name), cut)


def _weights(reference: nn.Module, adapters_off: bool) -> list[Tensor]:
    """Its tensors, in the order of its modules: adapters put other names on what is below them."""
    parameters = reference.named_parameters(remove_duplicate=False)
    off = {name for name, weight in parameters if adapters_off and weight.requires_grad}
    return [tensor for name, tensor in reference.state_dict().items() if name not in off]


def _description(reference: nn.Module, adapters_off: bool, settings: Mapping[str, Any]) -> str:
    causal_lm = causal_lm_of(reference)
    config = causal_lm.config.to_dict()
    config = {name: config[name] for name in config if name not in ("_name_or_path", "use_cache")}
    parts = {
        "versions": (fastdpo.__version__, transformers.__version__),
        "class": f"{type(causal_lm).__module__}.{type(causal_lm).__qualname__}",
        "config": config,
        "settings": settings,
    }
    if not adapters_off and hasattr(reference, "peft_config"):
        adapters = {name: each.to_dict() for name, each in reference.peft_config.items()}
        parts |= {"adapters": adapters, "active": reference.active_adapters}
    return json.dumps(parts, sort_keys=True, default=_plain)


def _plain(value: Any) -> Any:
    """What JSON has no way to write."""
    return sorted(map(str, value)) if isinstance(value, set) else str(value)


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    kind = f"{tensor.dtype} {(*tensor.shape,)}".encode()
    return hashlib.sha256(kind + hashlib.sha256(data).digest()).digest()
