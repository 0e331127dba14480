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
    for kernel in ("fold Qwen2.5-0.5B", "fold Gemma-2-9B", "pair_loss sigmoid"):
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
