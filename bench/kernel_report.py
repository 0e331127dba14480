"""What do the Triton kernels cost on GPUs that are not here: registers, spills, shared memory?

    python -m bench.kernel_report               every kernel, for sm_80, sm_90 and sm_100
    python -m bench.kernel_report --chips 89    for others: SHARED_BYTES has those it knows

Compiles each kernel as it would be launched for real models' heads, and exits with 1 where one
spills, asks for more shared memory than the chip has, or has a product without tensor cores.
Needs no GPU; not under TRITON_INTERPRET.
"""

import argparse
import itertools
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastdpo.kernels import dlogits, fold, pair_loss, second_product
from fastdpo.kernels.tiles import TILE_COLUMNS, tile_shape

CHIPS = (80, 90, 100)  # A100; H100 and H200; B200
SHARED_BYTES = {80: 163 << 10} | dict.fromkeys((90, 100, 103), 227 << 10)  # a block's, at most
SHARED_BYTES |= dict.fromkeys((86, 89, 120), 99 << 10)  # RTX 30, 40 and 50
TENSOR_CORES = re.compile(r"\b(?:wgmma|tcgen05|mma)\.\S*(?:mma|sync)")
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
HEADS = {  # vocabulary V, hidden size D, whether the logits are capped
    "Qwen2.5-0.5B": (151936, 896, False),
    "Llama-3.2-1B": (128256, 2048, False),
    "Llama-3-8B": (128256, 4096, False),
    "Gemma-2-9B": (256000, 3584, True),
    "GPT-2": (50257, 768, False),  # its last tile has an odd width
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel as one call launches it: the types of its arguments and its constants."""

    name: str
    kernel: object
    types: dict[str, str]
    constants: dict
    divisible: tuple[str, ...] = ()  # arguments that are multiples of 16
    has_product: bool = False
    num_warps: int = 4
    num_stages: int = 3


FOLDS = {  # optional arguments
    "alone": (),
    "a step's sums": ("exp_z_sum_ptr", "z_sum_ptr"),  # entropy and mean logit
    "bias and all sums": ("bias_ptr", "exp_z_sum_ptr", "z_sum_ptr", "exp_square_sum_ptr"),
}


def fold_cases():
    """The fold of a tile: each head's of 1024, 4096 and 8192 rows, and a last one, as in FOLDS."""
    pointers = ("z", "peak", "total", "label_logit", "rescale")
    integers = ("width", "start", "z_stride", "p_stride")
    every = {"softcap", *FOLDS["bias and all sums"]}
    kinds = itertools.product(HEADS.items(), ("*bf16", "*fp32"), FOLDS.items())
    for (head, (V, D, capped)), p_type, (kind, optional) in kinds:
        types = {f"{name}_ptr": "*fp32" for name in pointers}
        types |= {"labels_ptr": "*i64", "p_ptr": p_type, "scale": "fp32"}
        types |= dict.fromkeys(integers, "i32")
        types |= {"softcap": "fp32"} if capped else {}
        types |= dict.fromkeys(optional, "*fp32")
        constants = dict.fromkeys(every - types.keys())  # None is a constant
        rows = ((1024, 0), (4096, 0), (8192, 8192))  # with room where a trained head's p is kept
        widths = [tile_shape("cuda", N, V, D, room)[1] for N, room in rows]
        for width in (*widths, V % TILE_COLUMNS["cuda"]):
            launch = fold.launch_of(width, has_sums=bool(optional))
            num_warps = launch.pop("num_warps")
            yield Case(
                name=f"fold {head} {width} columns {p_type[1:]} {kind}",
                kernel=fold._fold_kernel,
                types=types,
                constants=constants | launch,
                divisible=integers if width % 16 == 0 else integers[1:],
                num_warps=num_warps,
            )


def dlogits_cases():
    """The gradient of a full tile's logits, and of one of an odd width."""
    types = {"row_scale_ptr": "*fp32", "dlabel_ptr": "*fp32", "labels_ptr": "*i64"}
    integers = ("start", "p_stride", "out_stride", "width")
    types |= dict.fromkeys(integers, "i32")
    for dtype, divisible in itertools.product(("*bf16", "*fp32"), (integers, integers[:-1])):
        yield Case(
            name=f"dlogits {dtype[1:]} {'full' if divisible is integers else 'odd'} tile",
            kernel=dlogits._dlogits_kernel,
            types=types | {"p_ptr": dtype, "out_ptr": dtype},
            constants={"BLOCK_T": dlogits.BLOCK_T},
            divisible=divisible,
        )


def second_product_cases():
    """Rescaling u, and the filter: its look at p and its product, of each head's last tile."""
    for head, (V, _, _) in HEADS.items():
        width = () if V % TILE_COLUMNS["cuda"] % 16 else ("T",)
        yield Case(
            name=f"rescale {head}",
            kernel=second_product._rescale_kernel,
            types={"u_ptr": "*fp32", "rescale_ptr": "*fp32", "K": "i32", "u_stride": "i32"},
            constants={"BLOCK_K": second_product.RESCALED_AT_ONCE},
            divisible=("K", "u_stride"),
        )
        for dtype, operand_bytes in (("*bf16", 2), ("*fp32", 4)):
            blocks = ("BLOCK_N", "BLOCK_T", "BLOCK_K")
            constants = dict(zip(blocks, second_product.BLOCKS[operand_bytes], strict=True))
            pointers = {"p_ptr": dtype, "w_ptr": dtype, "u_ptr": "*fp32"}
            pointers |= {"order_ptr": "*i64", "counts_ptr": "*i64"}
            strides = ("p_stride", "w_stride_T", "u_stride")
            integers = dict.fromkeys(("N", "T", "K", "order_stride", *strides), "i32")
            yield Case(
                name=f"reached product {head} {dtype[1:]}",
                kernel=second_product._reached_product_kernel,
                types=pointers | integers,
                constants=constants | {"w_stride_K": 1},
                divisible=(*width, "K", *strides),
                has_product=True,
                num_warps=second_product.NUM_WARPS,
                num_stages=second_product.NUM_STAGES,
            )
            pointers = {"p_ptr": dtype, "total_ptr": "*fp32", "reached_ptr": "*i32"}
            del constants["BLOCK_K"]
            yield Case(
                name=f"reached blocks {head} {dtype[1:]}",
                kernel=second_product._reached_kernel,
                types=pointers
                | dict.fromkeys(("N", "T", "p_stride"), "i32")
                | {"skip_below": "fp32"},
                constants=constants,
                divisible=(*width, "p_stride"),
                num_warps=second_product.NUM_WARPS,
            )


def pair_loss_cases():
    """Every loss and divergence alone, and all losses at once."""
    floats = ("token_logps", "reference_logps", "loss", "metrics", "slope")
    scalars = ("beta", "label_smoothing", "f_alpha_divergence_coef", "discopop_tau", "ld_alpha")
    types = {f"{name}_ptr": "*fp32" for name in floats} | dict.fromkeys(scalars, "fp32")
    types |= {"cu_seqlens_ptr": "*i32", "B": "i32"}
    alone = [((name,), "reverse_kl") for name in pair_loss.LOSSES]
    divergences = [(("sigmoid",), name) for name in pair_loss.F_DIVERGENCES[1:]]
    for losses, divergence in ((pair_loss.LOSSES, "reverse_kl"), *alone, *divergences):
        weights = tuple(0.5 + i for i in range(len(losses)))
        constants = {"NAMES": losses, "WEIGHTS": weights, "F_DIVERGENCE": divergence}
        yield Case(
            name=f"pair_loss {'+'.join(losses)} {divergence}",
            kernel=pair_loss._forward_kernel,
            types=types,
            constants=constants | {"BLOCK_C": pair_loss.BLOCK_C},
        )
    types = dict.fromkeys(("dloss_ptr", "slope_ptr", "dtoken_logps_ptr"), "*fp32")
    yield Case(
        name="pair_loss backward",
        kernel=pair_loss._backward_kernel,
        types=types | {"cu_seqlens_ptr": "*i32", "B": "i32", "ld_alpha": "fp32"},
        constants={"BLOCK_C": pair_loss.BLOCK_C},
    )


CASES = (fold_cases, dlogits_cases, second_product_cases, pair_loss_cases)


def compiled(case: Case, chip: int):
    names = case.kernel.arg_names
    signature = {name: case.types.get(name, "constexpr") for name in names}
    constants = {(names.index(name),): value for name, value in case.constants.items()}
    specialised = {p.name for p in case.kernel.params if not p.do_not_specialize_on_alignment}
    pointers = {name for name in specialised if signature[name].startswith("*")}
    aligned = [name for name in names if name in pointers.union(case.divisible)]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(case.kernel, signature, constants, attributes)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def usage(kernel) -> dict[str, int]:
    """registers, stack and local bytes a thread, shared bytes, tensor-core instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [TOOLS / "cuobjdump", "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    words = {"registers": "REG", "stack": "STACK", "local": "LOCAL"}
    found = {name: int(re.search(rf"{word}:(\d+)", text)[1]) for name, word in words.items()}
    found["shared"] = kernel.metadata.shared
    found["tensor_cores"] = len(TENSOR_CORES.findall(kernel.asm["ptx"]))
    return found


def faults(case: Case, chip: int, used: dict[str, int]) -> list[str]:
    wrong = []
    if used["stack"] or used["local"]:
        wrong.append(f"spills {used['stack']} bytes of stack, {used['local']} of local memory")
    if used["shared"] > SHARED_BYTES[chip]:
        wrong.append(f"{used['shared']} bytes of shared memory, the chip has {SHARED_BYTES[chip]}")
    if case.has_product and not used["tensor_cores"]:
        wrong.append("a product without tensor cores")
    return wrong


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    known = sorted(SHARED_BYTES)
    parser.add_argument("--chips", type=int, nargs="+", choices=known, default=CHIPS)
    failed = 0
    print("| kernel | chip | registers | stack | local | shared | tensor cores |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for chip in parser.parse_args(arguments).chips:
        for case in (case for cases in CASES for case in cases()):
            used = usage(compiled(case, chip))
            wrong = faults(case, chip, used)
            failed += bool(wrong)
            note = "; ".join(wrong) or (used["tensor_cores"] if case.has_product else "no product")
            numbers = " | ".join(str(used[n]) for n in ("registers", "stack", "local", "shared"))
            print(f"| {case.name} | sm_{chip} | {numbers} | {note} |", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
