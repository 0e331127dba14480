"""On a GPU the kernels run as compiled, elsewhere under Triton's interpreter."""

import os
import sys
import tempfile
from pathlib import Path

import pytest
import torch

# of several GPUs the first: a trainer in one process refuses more
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before a kernel is imported
CACHE = tempfile.TemporaryDirectory(prefix="fastdpo-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name  # before datasets is imported


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("wants a GPU")


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty comes filled with NaN, so that a cell that a kernel forgets is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def same_random_numbers():
    """Each test draws the same numbers in every run, whatever ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch) -> Path:
    """Where pairs and what a reference gave them are kept, each test's own; not there yet."""
    folder = tmp_path_factory.mktemp("cache") / "datasets"
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder))
    if "datasets" in sys.modules:  # kernels are tested without
        monkeypatch.setattr(sys.modules["datasets"].config, "HF_DATASETS_CACHE", folder)
    return folder / "fastdpo"


@pytest.fixture(scope="module")
def tokenizer():
    import tiny  # whose transformers import triton

    return tiny.tokenizer()


@pytest.fixture
def nothing_spent(monkeypatch):
    """Rows that are tokenised, or weights that are loaded, fail the test."""
    from fastdpo import row_trainer, trainer

    def spend(*args, **kwargs):
        raise AssertionError("compute was spent")

    monkeypatch.setattr(row_trainer, "prepare_pairs", spend)
    monkeypatch.setattr(trainer, "load_tokenizer", spend)


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def backend(request) -> str:
    """Each implementation of linear_logps."""
    return request.param


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles of 4 rows by 2 blocks, so that a test's few rows are walked as thousands are."""
    from fastdpo.kernels import fold, tiles
    from fastdpo.kernels.fold import BLOCK_T

    monkeypatch.setattr(fold, "MOST_IN_REGISTERS", BLOCK_T)
    monkeypatch.setitem(tiles.TILE_ROWS, "cpu", 4)
    monkeypatch.setitem(tiles.TILE_COLUMNS, "cpu", 2 * BLOCK_T)
    # a GPU's would have 512 columns where D is 16: never a row that is read twice, or a full one
    tile_shape = tiles.tile_shape
    monkeypatch.setattr(tiles, "tile_shape", lambda _, *sizes: tile_shape("cpu", *sizes))


@pytest.fixture
def narrow_operands(monkeypatch):
    """Operands and p in bfloat16 as they are on a GPU, their products done here in float32.

    (The interpreter of Triton cuts off what a GPU would round.)
    """
    from fastdpo.kernels import linear_logps, second_product, vocabulary_walk

    def product(a, b, out, *, accumulate, batch_invariant=False):
        assert (a.dtype, b.dtype) == (torch.bfloat16,) * 2 and out.dtype == torch.float32
        assert out.stride(1) == 1 and out.stride(0) % 16 == 0
        out.copy_(a.float() @ b.float() + (out if accumulate else 0))

    monkeypatch.setattr(linear_logps, "_operand_dtypes", lambda hidden_ND: (hidden_ND.dtype, None))
    for each in (vocabulary_walk, second_product):
        monkeypatch.setattr(each, "product", product)
