"""Each Triton kernel compiled for GPUs that are not there: it fits, and spills nothing."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CHIPS = [80, 90, 100]


# In a process of its own: here the kernels may be Triton's interpreter's.
def python(*arguments, cache):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """The report of all chips, made once."""
    cache = tmp_path_factory.mktemp("cache")
    return python("-m", "bench.kernel_report", "--chips", *map(str, CHIPS), cache=cache)


@pytest.mark.parametrize("chip", CHIPS, ids=[f"sm_{chip}" for chip in CHIPS])
def test_every_kernel_compiles_and_fits(chip, report):
    assert report.returncode == 0, report.stdout + report.stderr
    rows = [line for line in report.stdout.splitlines() if f"sm_{chip}" in line]
    for kernel in ("fold Gemma-2-9B", "rescale", "reached product Llama-3-8B", "pair_loss sigmoid"):
        assert any(kernel in row for row in rows), report.stdout


SPILLING = """
import triton, triton.language as tl
from bench.kernel_report import Case, compiled, faults, usage

@triton.jit
def product_kernel(a_ptr, out_ptr, M: tl.constexpr, K: tl.constexpr):
    m, k = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(a_ptr + m[:, None] * K + k[None, :])
    tl.store(out_ptr + m[:, None] * M + m[None, :], tl.dot(a, a.T))

def check(M, K):
    types, constants = {"a_ptr": "*bf16", "out_ptr": "*fp32"}, {"M": M, "K": K}
    case = Case(name="product", kernel=product_kernel, types=types, constants=constants,
                has_product=True)
    used = usage(compiled(case, 80))
    return used, faults(case, 80, used)

used, wrong = check(64, 64)
assert used["tensor_cores"] > 0 and not wrong, (used, wrong)
used, wrong = check(256, 64)
assert any("spills" in fault for fault in wrong), (used, wrong)
assert faults(Case(name="", kernel=None, types={}, constants={}, has_product=True), 80,
              {"stack": 0, "local": 0, "shared": 1 << 20, "tensor_cores": 0})[1:]
"""


def test_the_report_sees_spills_shared_memory_and_tensor_cores(tmp_path):
    (tmp_path / "spilling.py").write_text(SPILLING)  # triton reads a kernel's source from its file
    done = python(str(tmp_path / "spilling.py"), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr


# The launches themselves, on a GPU that is pretended: Triton binds, specialises and compiles as it
# would there, and what it then hands to the GPU is counted and left out.
LAUNCHING = """
import contextlib, torch, triton
from triton.backends.compiler import GPUTarget
from fastdpo.kernels import fold, pair_loss, second_product, tiles
from fastdpo.kernels.linear_logps import linear_logps

grids, guarded = [], []

@contextlib.contextmanager
def device_of(tensor):  # of several GPUs, the tensors' has to be the current one
    guarded.append(tensor)
    yield
    guarded.pop()

def launch(*arguments):
    assert guarded
    grids.append(arguments[:3])

class PretendedGPU:
    utils = property(lambda self: self)
    launcher_cls = staticmethod(lambda source, metadata: launch)
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device: 0)
    get_device_properties = staticmethod(lambda device: {"max_shared_mem": 227 << 10})
    load_binary = staticmethod(lambda *arguments: (1, 1, 32, 0, 1024))
    unload_module = staticmethod(lambda module: None)

triton.runtime.driver.set_active(PretendedGPU())
torch.cuda.device_of = device_of
tiles.TILE_ROWS["cpu"] = tiles.TILE_ROWS["cuda"] // 32
tiles.TILE_COLUMNS["cpu"] = tiles.TILE_COLUMNS["cuda"]

def compiled(kernel):
    return len(next(iter(kernel.device_caches.values()))[0])

def head(N, V, **settings):
    leaves = [torch.zeros(n, 8, requires_grad=True) for n in (N, V)]
    labels_N = torch.zeros(N, dtype=torch.int64)
    settings |= {"backend": "triton", "head_cache_bytes": 1 << 20}
    linear_logps(*leaves, labels_N, **settings).sum().backward()

def losses(*lengths):
    token_logps_C = torch.zeros(sum(lengths), requires_grad=True)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    settings = {"beta": 0.1, "loss_type": ("sigmoid", "ipo")}
    loss_B, _ = pair_loss.pair_loss(
        token_logps_C, cu_seqlens, torch.zeros(len(lengths)), **settings)
    loss_B.sum().backward()

head(16, 16384)
head(500, 16384)
with torch.no_grad():  # which makes no p
    linear_logps(torch.zeros(40, 8), torch.zeros(16384, 8), torch.zeros(40).long())
assert len(grids) > 8 and {grid[1:] for grid in grids} == {(1, 1)}
head(200, 16384, skip_below=2**-12)
assert {grid[1:] for grid in grids} == {(1, 1), (8192 // 32, 1), (2, 1)}, set(grids)
for N in range(16, 600, 37):  # every step scores another number of tokens
    head(N, 16384, skip_below=2**-12)
    head(N, 16384 + 5)
plain = compiled(fold._fold_kernel)
head(40, 16384, softcap=30, scale=2)
assert compiled(fold._fold_kernel) == plain + 1
head(40, 16384, softcap=20.0, scale=0.5)
assert compiled(fold._fold_kernel) == plain + 1
for B in (1, 2, 3, 8, 16, 32, 5, 7):
    losses(*range(3, 3 + 2 * B))
# Triton compiles for what is 1, what is a multiple of 16, and what is neither: the calls above had
# 7 kernels of them when this was written
assert plain < 10, plain
for kernel in (pair_loss._forward_kernel, pair_loss._backward_kernel):
    assert compiled(kernel) == 3, compiled(kernel)
for name in ("_rescale_kernel", "_reached_kernel", "_reached_product_kernel"):
    assert 0 < compiled(getattr(second_product, name)) < 5, name
"""


def test_launches_bind_and_a_batch_of_another_size_compiles_nothing_new(tmp_path):
    (tmp_path / "launching.py").write_text(LAUNCHING)
    done = python(str(tmp_path / "launching.py"), cache=tmp_path / "cache")
    assert done.returncode == 0, done.stdout + done.stderr
