"""Each Triton kernel compiled for GPUs that are not there: it fits, and spills nothing."""

import os
import subprocess
import sys

import pytest

CHIPS = [80, 90, 100]

# Run in a process of its own: here the kernels may be Triton's interpreter's.
COMPILE = """
import re, subprocess, sys, tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdpo.kernels import pair_loss, tiles

chip = int(sys.argv[1])
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def check(name, kernel, types, constants):
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    names = list(kernel.arg_names)
    signature = {arg: signature[arg] for arg in names}
    values = {(names.index(arg),): value for arg, value in constants.items()}
    source = ASTSource(kernel, signature, values)
    compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"num_warps": 4})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name],
            capture_output=True, text=True, check=True,
        ).stdout
    stack, local = (int(re.search(rf"{word}:(\\d+)", usage)[1]) for word in ("STACK", "LOCAL"))
    print(name, "registers", re.search(r"REG:(\\d+)", usage)[1], "stack", stack, "local", local)
    assert stack == local == 0, (name, usage)
    assert compiled.metadata.shared <= 160 * 1024, name


float32, int32 = "*fp32", "i32"
fold = tiles._fold_kernel
for p_type in ("*fp32", "*bf16"):
    for bias, cap, sums in ((False, False, False), (False, False, True), (True, True, True)):
        types = {
            "z_ptr": float32, "p_ptr": p_type, "labels_ptr": "*i64", "peak_ptr": float32,
            "total_ptr": float32, "target_ptr": float32, "rescale_ptr": float32,
            "start": int32, "width": int32, "z_stride": int32, "p_stride": int32,
            "scale": "fp32", "softcap": "fp32",
        }
        constants = {"HAS_BIAS": bias, "CAP": cap, "SUMS": sums, "BLOCK_V": tiles.BLOCK_V}
        for pointer, present in (("bias_ptr", bias), ("weighted_ptr", sums), ("sum_ptr", sums)):
            if present:
                types[pointer] = float32
            else:
                constants[pointer] = None
        check(f"fold {p_type} bias={bias} cap={cap} sums={sums}", fold, types, constants)

block = {"BLOCK_C": pair_loss.BLOCK_C}
pointers = ("token_logps_ptr", "reference_logps_ptr", "loss_ptr", "metrics_ptr", "slope_ptr")
scalars = ("beta", "label_smoothing", "f_alpha_divergence_coef", "discopop_tau", "ld_alpha")
types = dict.fromkeys(pointers, float32) | dict.fromkeys(scalars, "fp32")
types |= {"cu_seqlens_ptr": "*i32", "B": int32}
everything = (pair_loss.LOSS_TYPES, "reverse_kl")
alone = [((name,), "reverse_kl") for name in pair_loss.LOSS_TYPES]
divergences = [(("sigmoid",), name) for name in pair_loss.F_DIVERGENCES[1:]]
for losses, divergence in (everything, *alone, *divergences):
    weights = tuple(0.5 + i for i in range(len(losses)))
    constants = {"LOSS_TYPES": losses, "LOSS_WEIGHTS": weights, "F_DIVERGENCE": divergence}
    name = f"pair_loss {losses} {divergence}"
    check(name, pair_loss._forward_kernel, types, constants | block)
types = dict.fromkeys(("dloss_ptr", "slope_ptr", "dtoken_logps_ptr"), float32)
types |= {"cu_seqlens_ptr": "*i32", "B": int32, "ld_alpha": "fp32"}
check("pair_loss backward", pair_loss._backward_kernel, types, block)
"""


@pytest.mark.parametrize("chip", CHIPS, ids=[f"sm_{chip}" for chip in CHIPS])
def test_every_kernel_compiles_without_spills(chip, tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE, str(chip)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("stack 0 local 0") == 22
