"""Compile every shipped kernel ahead of time, with no GPU, and print one JSON line for each.

    PYTHONPATH=kernels python tests/kernels/compile_matrix.py [--targets 80 90] [--dtypes bfloat16] [--rows 65536]

The operators' own launch code runs on meta tensors; each launch is caught and handed to the compiler as it stands, so
what is checked is what would run. Exits with 1 where a kernel spills registers, asks for more shared memory than the
chip has, or misses the tensor cores. test_ahead_of_time.py runs a part of it; the whole takes some minutes.
"""

import argparse
import json
import re
import subprocess
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

import mor_kernels.blocks
import mor_kernels.matmul_tail_tma
from mor_kernels.branch import branch
from mor_kernels.dy_side import dy_side
from mor_kernels.matmul_tail import matmul_tail
from mor_kernels.ranks import RankLayout
from mor_kernels.shrink import shrink
from mor_kernels.weight_grad import sum_partials, x_partials

TYPES = {torch.float32: "*fp32", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
SHARED_LIMIT = {80: 166912, 86: 101376, 89: 101376, 90: 232448, 100: 232448}  # bytes a block may ask for
OPTIONS = {"num_warps", "num_stages", "enable_fp_fusion"}


def launches(rows, width, out, dtype, parameter_dtype, layout, capability, forms=("branch", "tail")):
    """Every (kernel, arguments, options) that a forward and a backward would launch, in both forms."""
    caught = []

    def catch(self, *args, grid, warmup, **kwargs):
        options = {k: kwargs.pop(k) for k in OPTIONS & kwargs.keys()}
        names = self.arg_names
        caught.append((self, dict(zip(names, args, strict=False)) | kwargs, options))

    original, known = JITFunction.run, mor_kernels.blocks.capability
    JITFunction.run, mor_kernels.blocks.capability = catch, lambda device: capability
    mor_kernels.matmul_tail_tma.multiprocessors = lambda device: 132
    try:
        with torch.device("meta"):
            x, dy = torch.empty(rows, width, dtype=dtype), torch.empty(rows, out, dtype=dtype)
            weight, bias = torch.empty(out, width, dtype=dtype), torch.empty(out, dtype=dtype)
            a = torch.empty(layout.rank_sum, width, dtype=parameter_dtype)
            b = torch.empty(layout.rank_sum, out, dtype=parameter_dtype)
            router = torch.empty(layout.gates, width, dtype=parameter_dtype) if layout.gates else None
            router_bias = torch.empty(layout.gates, dtype=parameter_dtype) if layout.gates else None
            h = torch.empty(rows, layout.rank_sum, dtype=dtype)
            gates = torch.empty(rows, layout.gates)
        y, dx = torch.empty_like(dy), torch.empty_like(x)
        for form in forms:
            if form == "branch":
                branch(x, a, router, router_bias, b, bias, layout, y, h, gates)
            else:
                gated = shrink(x, a, router, router_bias, layout, h, gates)
                matmul_tail(x, weight.t(), gated, b, None, bias, out=y)
            dz, partial_b, partial_bias = dy_side(
                dy, b, h, gates, a, router, layout, dx=dx if form == "branch" else None, with_weights=True
            )
            if form == "tail":
                matmul_tail(dy, weight, dz, a, router, None, out=dx)
        partial_x = x_partials(x, dz, layout)
        grads = [None if t is None else torch.empty_like(t) for t in (b, a, router, router_bias)]
        sum_partials(partial_b, partial_x, partial_bias, layout, *grads)
    finally:
        JITFunction.run, mor_kernels.blocks.capability = original, known
    return caught


def source(kernel, arguments):
    """The specialisation that the just-in-time compiler would make of these arguments."""
    signature, constants, attributes = {}, {}, {}
    for parameter in kernel.params:
        value, where = arguments[parameter.name], (parameter.num,)
        if (
            parameter.is_constexpr
            or value is None
            or (isinstance(value, int) and value == 1 and not parameter.do_not_specialize)
        ):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
        elif isinstance(value, TensorDescriptor):
            signature[parameter.name] = f"tensordesc<{TYPES[value.base.dtype][1:]}{value.block_shape}>".replace(" ", "")
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            attributes[where] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "i32"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[where] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, attributes)


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack and local bytes from the compiler's report."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}


def trouble(line: dict) -> list[str]:
    """What is wrong with one compiled kernel: spills, too much shared memory, or no tensor core where one is due."""
    found = []
    if line["LOCAL"] or line["STACK"] > (0 if line["dtype"] != "float32" else 16):
        found.append("spills")
    if line["shared"] > SHARED_LIMIT[line["target"]]:
        found.append("shared memory")
    if line["target"] == 90 and line["kernel"].startswith("matmul_tail") and line["dtype"] != "float32":
        found += ["no wgmma"] * (not line["wgmma"])
        found += ["no copy engine"] * ("tma" in line["kernel"] and not line["tma"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--targets", type=int, nargs="+", default=[80, 86, 89, 90, 100])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--parameter-dtype", default=None, help="of A, B and the router; default: as x")
    parser.add_argument("--rows", type=int, nargs="+", default=[1576, 65536])
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--out", type=int, default=3072)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--kernels", nargs="+", default=None)
    parser.add_argument(
        "--persistent", type=int, nargs=5, help="also try matmul_tail_tma: rows inner columns warps stages"
    )
    parser.add_argument("--forms", nargs="+", default=["branch", "tail"])
    options = parser.parse_args()
    layout = RankLayout(tuple(options.ranks), (2.0,) * len(options.ranks), True)
    failures = 0
    if options.persistent:
        tile = mor_kernels.blocks.Blocks(*options.persistent, persistent=True)
        mor_kernels.blocks.TABLE |= {key: tile for key in mor_kernels.blocks.TABLE if key[0] == "matmul_tail"}
    for target in options.targets:
        seen = set()
        for name in options.dtypes:
            dtype = getattr(torch, name)
            parameter_dtype = getattr(torch, options.parameter_dtype) if options.parameter_dtype else dtype
            for rows in options.rows:
                caught = launches(
                    rows,
                    options.width,
                    options.out,
                    dtype,
                    parameter_dtype,
                    layout,
                    divmod(target, 10),
                    options.forms,
                )
                for kernel, arguments, compile_options in caught:
                    if options.kernels and kernel.__name__ not in options.kernels:
                        continue
                    built = source(kernel, arguments)
                    key = (built.hash(), tuple(sorted(compile_options.items())))
                    if key in seen:
                        continue
                    seen.add(key)
                    compiled = triton.compile(built, target=GPUTarget("cuda", target, 32), options=compile_options)
                    ptx = compiled.asm["ptx"]
                    line = {
                        "kernel": kernel.__name__, "target": target, "dtype": name, "rows": rows, **compile_options,
                        "blocks": {k: v for k, v in arguments.items() if k.startswith(("BLOCK", "SLICE_", "WITH"))},
                        "shared": compiled.metadata.shared, **resources(compiled.asm["cubin"]),
                        "wgmma": ptx.count("wgmma.mma_async"),
                        "tma": ptx.count("cp.async.bulk.tensor"), "mma": ptx.count("mma.sync"),
                        "async16": len(re.findall(r"cp\.async\.cg\.shared\.global \[[^]]*\], \[[^]]*\], 0x10", ptx)),
                        "async_any": ptx.count("cp.async.c"),
                        "load16": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
                        "load2": len(re.findall(r"ld\.global\S*\.b16 ", ptx)),
                    }  # fmt: skip
                    found = trouble(line)
                    failures += bool(found)
                    print(json.dumps(line | {"trouble": found}), flush=True)
    raise SystemExit(1 if failures else 0)


if __name__ == "__main__":
    main()
