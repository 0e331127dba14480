"""Log-probabilities that a reference gave to pairs in earlier runs, in a file for each reference.

A reference is known by its weights, its configuration, and the very bits of what it gives to PROBE:
those tell apart what no configuration does, such as hooks, scales of adapters, and the precision or
layout it runs in where that rounds otherwise. A pair is known by its token ids once they are cut.
So runs with other hyperparameters, batches and neighbouring rows find what is there.

A file is a row of RECORDs, appended as pairs are scored, so that a run that was killed goes on near
where it stopped. A record that is torn, or another reference's, is not taken.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from numpy import ndarray
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel
from transformers.utils import logging

from fastdpo import pairs_cache
from fastdpo.columns import ID_COLUMNS, Cut, Pair
from fastdpo.model import causal_lm_of

logger = logging.get_logger(__name__)

RECORD = struct.Struct("<16s16s8s")  # a pair's key, two float64, a digest of both
PROBE = (3, 15, 63, 255)  # tokens of both completions of its pairs, behind one of prompt
NO_MATTER = ("_name_or_path", "use_cache", "pad_token_id")  # of a model's configuration
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
        records = self._records(set(keys))
        nothing = struct.pack("<2d", np.nan, np.nan)
        logps_N2 = np.frombuffer(b"".join(records.get(key, nothing) for key in keys), "<f8")
        logps_N2 = logps_N2.reshape(-1, 2).astype(np.float64)
        self.found += len(keys) - int(np.isnan(logps_N2).any(1).sum())
        return logps_N2

    def add(self, keys: list[bytes], logps_N2: ndarray) -> None:
        """Append these, but for NaN, with a warning where the file cannot be written."""
        pairs = zip(keys, logps_N2.astype("<f8"), strict=True)
        entries = [(key, x.tobytes()) for key, x in pairs if not np.isnan(x).any()]
        records = b"".join(RECORD.pack(*entry, self._checksum(*entry)) for entry in entries)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                with contextlib.suppress(OSError):  # file systems without locks
                    fcntl.flock(file, fcntl.LOCK_EX)  # until the file is closed
                torn = file.seek(0, os.SEEK_END) % RECORD.size  # by a run that was killed
                file.write(b"\0" * (-torn % RECORD.size) + records)
        except OSError as error:
            logger.warning_once(
                f"the reference's log-probabilities are not kept for the next run: {error}"
            )

    def _records(self, wanted: set[bytes]) -> dict[bytes, bytes]:
        """Log-probabilities by key, of those wanted that are whole and of this reference."""
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
            if key in wanted and checksum == self._checksum(key, logps)
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


def probe_pairs(causal_lm: PreTrainedModel) -> list[Pair]:
    """PROBE's pairs, whatever the data: tokens of the model's vocabulary, at its positions."""
    config = causal_lm.config.get_text_config()
    V, P = config.vocab_size, getattr(config, "max_position_embeddings", None) or max(PROBE)
    lengths = [min(length, P - 1) for length in PROBE]
    ids = [np.arange(2 * length + 1) * 7919 % V for length in lengths]
    return [
        dict(zip(ID_COLUMNS, np.split(each, [1, length + 1]), strict=True))
        for each, length in zip(ids, lengths, strict=True)
    ]


def open_cache(
    reference: nn.Module, cut: Cut, probe_logps_S: Tensor, *, adapters_off: bool, **settings: Any
) -> ReferenceCache | None:
    """The cache of `reference`, beside the pairs of pairs_cache.py.

    probe_logps_S: what it gives to probe_pairs. adapters_off: whether it runs without what trains
    in it. settings: whatever else its numbers depend on. None where weights are not at hand.
    """
    weights = _weights(reference, adapters_off)
    if any(tensor.is_meta or is_traceable_wrapper_subclass(tensor) for tensor in weights):
        return None
    config = causal_lm_of(reference).config.to_dict()
    known = {name: config[name] for name in config if name not in NO_MATTER}
    known |= settings | {"probe": probe_logps_S.tolist()}
    digest = hashlib.sha256(json.dumps(known, sort_keys=True, default=str).encode())
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        for each in pool.map(_digest, weights):
            digest.update(each)
    name = f"reference-{digest.hexdigest()[:32]}.logps"
    return ReferenceCache(pairs_cache.folder() / name, cut)


def _weights(reference: nn.Module, adapters_off: bool) -> list[Tensor]:
    """Its parameters and buffers, by their order: adapters give other names to what they wrap."""
    parameters = reference.parameters()
    kept = [each for each in parameters if not (adapters_off and each.requires_grad)]
    return [*kept, *reference.buffers()]


def _digest(tensor: Tensor) -> bytes:
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    kind = f"{tensor.dtype} {(*tensor.shape,)}".encode()
    return hashlib.sha256(kind + hashlib.sha256(data).digest()).digest()
