"""The parts of the fused MoR linear on a GPU, one by one: what bounds them, and which tile is fastest.

    PYTHONPATH=.:kernels python benchmarks/bench_mor_linear_gpu_tiles.py --out benchmarks/results

1. The library's GEMM as it is and adding to its result (beta = 1), forward and for dx: what the branch form leans on.
2. Every kernel of mor_kernels at every candidate tile: time, achieved bandwidth (the bytes it has to move, each input
   read once and each output written once) and, for matmul_tail, the speed as a fraction of the library's GEMM.

Each kernel's result is compared with float64 before it is timed (for dy_side and weight_grad from the narrow dz that
the shipped tile makes; bench_mor_linear_gpu_forms.py compares the whole). All times are CUDA-graph replays on a cold
L2 cache.
The last lines are the winners as entries for kernels/mor_kernels/blocks.py.

    ... --device cpu --blocks tiny --rows 40     tries the whole path in Triton's interpreter; its times mean nothing
"""

import argparse
import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path

import torch
from bench_mor_linear_gpu_forms import BLOCKS, RANKS, SCALING, captured, draw, environment, in_turn
from torch import Tensor

# rows, inner, columns, warps, stages; and whether persistent
CANDIDATES = {
    "shrink": [(t, k, 0, w, 3) for t, k, w in itertools.product((16, 32, 64, 128), (128, 256), (4, 8))],
    "branch": [
        (t, k, n, 8 if t == 128 else 4, 3)
        for t, k, n in itertools.product((16, 32, 64, 128), (128, 256), (128, 256))
    ],
    "dy_side": [(t, k, 128, w, 3) for t, k, w in itertools.product((16, 32, 64, 128), (128, 256), (4, 8))],
    "weight_grad": [(0, t, d, 4, s) for t, d, s in itertools.product((32, 64, 128), (128, 256), (3, 4))],
    "matmul_tail": [
        (128, 64, 256, 8, 3), (128, 64, 256, 8, 4), (128, 64, 128, 4, 4), (128, 64, 128, 8, 3), (128, 64, 128, 8, 4),
        (256, 64, 128, 8, 3), (64, 64, 256, 4, 4), (64, 64, 128, 4, 4), (128, 128, 128, 8, 3), (64, 128, 128, 4, 3),
        (128, 32, 256, 8, 4), (64, 64, 64, 4, 5),
        (128, 64, 256, 8, 3, True), (128, 64, 128, 8, 4, True), (128, 64, 128, 4, 4, True), (256, 64, 128, 8, 3, True),
    ],
}  # fmt: skip


def work(kernel: str, tensors: dict[str, Tensor]) -> tuple[Callable[[], Tensor], Tensor, int]:
    """A launch of this kernel and its main result, what that is in float64, and the bytes the launch must move."""
    from mor_kernels.branch import branch
    from mor_kernels.dy_side import dy_side
    from mor_kernels.matmul_tail import matmul_tail
    from mor_kernels.ranks import rank_layout
    from mor_kernels.shrink import shrink
    from mor_kernels.weight_grad import x_partials

    layout = rank_layout(RANKS, SCALING, True)
    t = {name: value.detach() for name, value in tensors.items()}
    x, dy, a, b, router = t["x"], t["dy"], t["A"], t["B"], t["router_weight"]
    rows, size = len(x), x.element_size()
    y, dx = torch.empty_like(dy), torch.empty_like(x)
    h = x.new_empty(rows, layout.rank_sum)
    gates = x.new_empty(rows, layout.gates, dtype=torch.float32)
    gated = shrink(x, a, router, t["router_bias"], layout, h, gates)
    dz, _, _ = dy_side(dy, b, h, gates, a, router, layout, dx=dx, with_weights=True)
    kept = h.nbytes + gates.nbytes
    exact_gates = (x.double() @ router.double().T + t["router_bias"].double()).softmax(-1)
    factor = [g[:, None].expand(-1, r) * s for g, r, s in zip(exact_gates.T, RANKS, SCALING, strict=False)]
    exact_gated = x.double() @ a.double().T * torch.cat(factor, 1)
    narrow = exact_gated @ b.double()

    if kernel == "shrink":
        return (
            lambda: shrink(x, a, router, t["router_bias"], layout, h, gates),
            torch.nn.functional.pad(exact_gated, (0, gated.shape[1] - len(b))),
            x.nbytes + kept + gated.nbytes,
        )
    if kernel == "branch":

        def run_branch() -> Tensor:
            branch(x, a, router, t["router_bias"], b, t["bias"], layout, y, h, gates)
            return y

        return run_branch, narrow + t["bias"].double(), x.nbytes + y.nbytes + kept
    if kernel == "dy_side":
        expected = dz.double()[:, : len(a) + len(router)] @ torch.cat([a, router]).double()

        def run_dy_side() -> Tensor:
            dy_side(dy, b, h, gates, a, router, layout, dx=dx, with_weights=True)
            return dx

        return run_dy_side, expected, dy.nbytes + dx.nbytes + kept + rows * layout.columns * size
    if kernel == "weight_grad":
        expected = (dz.double().T @ x.double())[: len(a) + len(router)]

        def run_weight_grad() -> Tensor:
            return x_partials(x, dz, layout)

        return run_weight_grad, expected, x.nbytes + dz.nbytes

    def run_matmul_tail() -> Tensor:
        matmul_tail(x, t["weight"].t(), gated, b, None, t["bias"], out=y)
        return y

    expected = x.double() @ t["weight"].double().T + t["bias"].double() + narrow
    return run_matmul_tail, expected, x.nbytes + y.nbytes + t["weight"].nbytes + gated.nbytes


def library(tensors: dict[str, Tensor]) -> dict[str, Callable[[], Tensor]]:
    x, weight, bias, dy = (tensors[name].detach() for name in ("x", "weight", "bias", "dy"))
    y, dx = torch.zeros_like(dy), torch.zeros_like(x)
    return {
        "linear": lambda: torch.nn.functional.linear(x, weight, bias),
        "matmul": lambda: torch.mm(x, weight.t(), out=y),
        "matmul, beta = 1": lambda: y.addmm_(x, weight.t()),
        "dx": lambda: torch.mm(dy, weight, out=dx),
        "dx, beta = 1": lambda: dx.addmm_(dy, weight),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", nargs="+", default=["ViT-B"], choices=BLOCKS)
    parser.add_argument("--rows", nargs="+", type=int, default=[1576, 12608, 65536])
    parser.add_argument("--kernels", nargs="*", default=list(CANDIDATES))
    parser.add_argument("--linears", nargs="+", default=None)
    parser.add_argument("--first", type=int, default=None, help="candidates to try of each kernel; default all")
    parser.add_argument("--seconds", type=float, default=0.03, help="of timing for each candidate")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--out", type=Path, default=None, help="folder for the JSON file")
    options = parser.parse_args()
    device = options.device
    if device == "cpu":
        os.environ["TRITON_INTERPRET"], options.dtype = "1", "float16"
    dtype = getattr(torch, options.dtype)
    result: dict = {"environment": environment(device), "dtype": options.dtype, "library": [], "kernels": []}
    print(json.dumps(result["environment"]))

    from mor_kernels import blocks

    def timed(calls: dict[str, Callable[[], Tensor]]) -> dict[str, list[float]]:
        ready = {n: captured(c) for n, c in calls.items()} if device == "cuda" else calls
        return in_turn(ready, options.seconds * len(calls), device == "cuda", device)

    sums: dict[tuple, dict[str, list[float]]] = {}
    for block, rows in itertools.product(options.blocks, options.rows):
        for linear, (width, out) in BLOCKS[block].items():
            if options.linears and linear not in options.linears:
                continue
            tensors = draw(rows, width, out, dtype, device)
            where = {"block": block, "linear": linear, "rows": rows}
            gemm = timed(library(tensors))
            result["library"].append(where | {"microseconds": gemm})
            flops = 2 * rows * width * out
            print(
                f"{block} {linear} T={rows}: linear {gemm['linear'][0]:.1f} us"
                f" ({flops / gemm['linear'][0] / 1e6:.0f} TFLOP/s)"
                f", beta = 1 costs {gemm['matmul, beta = 1'][0] / gemm['matmul'][0]:.3f}"
                f", dx {gemm['dx'][0]:.1f} us, beta = 1 {gemm['dx, beta = 1'][0] / gemm['dx'][0]:.3f}",
                flush=True,
            )
            for kernel in options.kernels:
                launch, expected, bytes_moved = work(kernel, tensors)
                key = (kernel, blocks.kind(tensors["x"]), blocks.capability(tensors["x"].device))
                shipped = blocks.TABLE.get(key)
                calls: dict[str, Callable[[], Tensor]] = {}
                refused: dict[str, str] = {}
                for candidate in CANDIDATES[kernel][: options.first]:
                    blocks.TABLE[key] = blocks.Blocks(*candidate)
                    try:
                        got = launch()
                        got = got.sum(0) if kernel == "weight_grad" else got
                        error = float((got.double() - expected).norm() / expected.norm())
                        if not error < 2e-2:
                            refused[str(candidate)] = f"error {error:.1e}"
                        elif device == "cuda":
                            calls[str(candidate)] = captured(launch)
                        else:
                            calls[str(candidate)] = launch
                    except Exception as reason:  # a tile too large for the chip, for one
                        refused[str(candidate)] = f"{type(reason).__name__}: {reason}"[:200]
                if shipped is None:
                    blocks.TABLE.pop(key)
                else:
                    blocks.TABLE[key] = shipped
                times = in_turn(calls, options.seconds * len(calls), device == "cuda", device)
                result["kernels"].append(
                    where | {"kernel": kernel, "bytes": bytes_moved, "microseconds": times, "refused": refused}
                )
                for name, (median, _, _) in times.items():
                    sums.setdefault(key, {}).setdefault(name, []).append(median / min(v[0] for v in times.values()))
                best = sorted(times, key=lambda name: times[name][0])[:3]
                print(
                    f"    {kernel}: "
                    + "  ".join(
                        f"{n} {times[n][0]:.1f} us {bytes_moved / times[n][0] / 1e6:.2f} TB/s"
                        + (f" {gemm['linear'][0] / times[n][0]:.2f} of linear" if kernel == "matmul_tail" else "")
                        for n in best
                    )
                    + f"; {len(refused)} refused",
                    flush=True,
                )
            if options.out:
                options.out.mkdir(parents=True, exist_ok=True)
                card = "cpu" if device == "cpu" else torch.cuda.get_device_name().split()[-1].lower()
                (options.out / f"mor_linear_gpu_tiles_{card}.json").write_text(json.dumps(result, indent=1) + "\n")

    print("\nsmallest mean slowdown against the best tile of each problem:")
    for key, slowdowns in sums.items():
        complete = max(map(len, slowdowns.values()))
        mean = {name: sum(v) / len(v) for name, v in slowdowns.items() if len(v) == complete}
        name = min(mean, key=mean.get)
        print(f"    {key}: Blocks{name},  # {mean[name]:.3f}")


if __name__ == "__main__":
    main()
