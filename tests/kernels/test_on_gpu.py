"""What only a card can show: bf16, sizes that matter, CUDA graphs, inductor. Skipped elsewhere."""

import pytest
import torch

import mor_kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

FORMS = ("branch", "tail")
OPTIONS = {"ranks": (2, 4, 8), "scaling": (2.0, 2.0, 2.0), "bypass": True}


def leaves(rows: int, width: int, out: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """x, weight, bias, A, B, router_weight, router_bias."""

    def draw(*shape: int, scale: float) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    trained = [draw(14, width, scale=width**-0.5), draw(14, out, scale=0.1), draw(4, width, scale=width**-0.5)]
    x, bias_r = draw(rows, width, scale=1.0), draw(4, scale=0.5)
    frozen = [draw(out, width, scale=width**-0.5), draw(out, scale=0.1)]
    return [x.requires_grad_(), *frozen, *(t.requires_grad_() for t in trained), bias_r.requires_grad_()]


def loop(x, weight, bias, A, B, router_weight, router_bias, *, ranks, scaling, bypass):
    y = torch.nn.functional.linear(x, weight, bias)
    gates = torch.nn.functional.linear(x, router_weight, router_bias).softmax(-1)
    start = 0
    for i, rank in enumerate(ranks):
        y = y + gates[:, i : i + 1] * scaling[i] * (x @ A[start : start + rank].T @ B[start : start + rank])
        start += rank
    return y


def everything(function, tensors, dy, **options) -> list[torch.Tensor]:
    y = function(*tensors, **OPTIONS, **options)
    wanted = [t for t in tensors if t.requires_grad]
    return [y.detach(), *torch.autograd.grad(y, wanted, dy)]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [197, 1576, 6288, 65536])
@pytest.mark.parametrize(("width", "out"), [(768, 3072), (3072, 768), (1024, 1024)])
def test_error_is_at_most_125_percent_of_eager(form, dtype, rows, width, out):
    tensors = leaves(rows, width, out, dtype)
    dy = torch.randn(rows, out, device="cuda").to(dtype)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in tensors]
    expected = everything(loop, exact, dy.double())
    eager = everything(loop, tensors, dy)
    got = everything(mor_kernels.mor_linear, tensors, dy, form=form)
    for g, e, x in zip(got, eager, expected, strict=True):
        assert (g.double() - x).norm() <= 1.25 * (e.double() - x).norm()
        assert (g.double() - x).abs().max() <= 2.0 * (e.double() - x).abs().max()


@pytest.mark.parametrize("form", FORMS)
def test_cuda_graph_follows_its_inputs(form):
    tensors, dy = leaves(1576, 768, 3072, torch.bfloat16), torch.randn(1576, 3072, device="cuda").bfloat16()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, which a capture could not
        everything(mor_kernels.mor_linear, tensors, dy, form=form)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = everything(mor_kernels.mor_linear, tensors, dy, form=form)
    with torch.no_grad():
        for t in (tensors[0], tensors[3], dy):
            t.copy_(torch.randn_like(t))
    graph.replay()
    expected = everything(mor_kernels.mor_linear, tensors, dy, form=form)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("form", FORMS)
def test_outputs_beyond_two_to_the_31_elements(form):
    tensors = leaves(700_000, 64, 3072, torch.bfloat16)
    with torch.no_grad():
        y = mor_kernels.mor_linear(*tensors, **OPTIONS, form=form)
        last = [tensors[0][-64:], *tensors[1:]]
        expected = loop(*(t.double() for t in last), **OPTIONS)
    assert (y[-64:].double() - expected).norm() < 1e-2 * expected.norm()


def test_autocast_with_gradient_scaler_sees_an_overflow():
    tensors = leaves(64, 64, 64, torch.float32)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**40)
    with torch.autocast("cuda", torch.float16):
        y = mor_kernels.mor_linear(*tensors, **OPTIONS)
    optimizer = torch.optim.SGD([tensors[3]], lr=1.0)
    before = tensors[3].detach().clone()
    scaler.scale(y.float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(tensors[3].detach(), before) and scaler.get_scale() < 2.0**40
