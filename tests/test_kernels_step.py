"""The kernels of the fast training step against their plain forms: on the CPU always, as Triton kernels on a GPU."""

import os

import pytest
import torch
from helpers_training import one_thread  # noqa: F401  # a fixture
from torch import Tensor

from scope.kernels import step
from scope.kernels.adam import adam_rows, adam_rows_reference
from scope.kernels.topk import keep_largest, keep_largest_reference, largest_of_all, linear_topk, topk

pytestmark = pytest.mark.usefixtures("one_thread")

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""With it the tests of the CPU run the Triton kernels too, in Triton's interpreter."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SHAPES = [(1, 3, 5, 1), (9, 37, 50, 5), (70, 130, 900, 33)]
"""batch, d_in, d_sae, k: odd ones."""


def off(got: Tensor, expected: Tensor) -> float:
    """‖got - expected‖ / ‖expected‖."""
    return float((got.float() - expected.float()).norm() / expected.float().norm().clamp_min(1e-30))


def entries(batch: int, d_sae: int, k: int, device: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    # Features of very different density, some never, and some entries with value 0.
    scores = torch.rand(batch, d_sae, generator=generator) - torch.linspace(0, 0.8, d_sae)
    values, ids = scores.topk(k, dim=-1)
    values = values.abs() * (torch.rand(batch, k, generator=generator) > 0.2)
    return values.to(device), ids.int().to(device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("some", [False, True])
def test_residual_and_dots(device: str, dtype: torch.dtype, shape: tuple[int, int, int, int], some: bool) -> None:
    batch, d_in, d_sae, k = shape
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, d_in, generator=generator).to(device)
    W = torch.randn(d_sae, d_in, generator=generator).to(device, dtype)
    b = torch.randn(d_in, generator=generator).to(device)
    values, ids = entries(batch, d_sae, k, device)
    counted = None
    if some:  # entries of value 0 whose products are wanted, others that are none, and a row without any
        counted = torch.rand(batch, k, generator=generator) > 0.4
        counted[2:3] = False
        counted = counted.to(device)
        values = torch.where(counted, values, 0.0)
    expected = step.residual_and_dots_reference(x, 0.7, values, ids, W, b, counted)
    got = step.residual_and_dots(x, 0.7, values, ids, W, b, counted)
    bound = 1e-5 if dtype == torch.float32 else 3e-2
    for one, other in zip(got, expected, strict=True):
        assert off(one, other) < bound
    centred, squares = step.centre(x, 0.7, b, dtype)
    assert off(centred, 0.7 * x - b) < bound
    torch.testing.assert_close(squares, (0.7 * x).square().sum(1))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n_dense", [2, 2048])
@pytest.mark.parametrize("some", [False, True])
def test_sums_over_entries(
    device: str,
    dtype: torch.dtype,
    shape: tuple[int, int, int, int],
    n_dense: int,
    some: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device == "cuda" or INTERPRETED:
        from scope.kernels.triton import products

        monkeypatch.setattr(products, "DENSE_FEATURES", n_dense)
    batch, d_in, d_sae, k = shape
    values, ids = entries(batch, d_sae, k, device)
    generator = torch.Generator().manual_seed(1)
    gradients = torch.randn(batch, k, generator=generator).to(device)
    source = torch.randn(batch, d_in, generator=generator).to(device, dtype)
    counted = values > 0 if some else torch.ones_like(ids, dtype=torch.bool)
    gradients = torch.where(counted, gradients, 0.0)
    groups = step.group_entries(ids, d_sae, counted if some else None)
    n_entries = int(counted.sum())
    flat = ids.flatten()[groups.order.long()[:n_entries]]
    assert (flat.diff() >= 0).all()
    counts = torch.bincount(ids[counted].long(), minlength=d_sae)
    assert torch.equal(groups.offsets.diff().long(), counts)
    assert torch.equal(counts[groups.ranked.long()], counts.sort(descending=True).values)

    sums = step.feature_sums(values, gradients, ids, groups)
    expected = step.feature_sums_reference(values.cpu(), gradients.cpu(), ids.cpu(), d_sae)
    for one, other in zip(sums, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other, rtol=1e-5, atol=1e-5)

    further = torch.randn(2, d_in, generator=generator).to(device, dtype)
    slots = torch.full((d_sae,), -1, dtype=torch.int32, device=device)
    slots[0], slots[-1] = 1, 0
    whole = torch.zeros(d_sae, d_in, device=device)
    whole[0], whole[-1] = further[1].float(), further[0].float()
    for given, extra in (((), torch.zeros_like(whole)), ((slots, further), whole)):
        out = torch.full((d_sae, d_in), torch.nan, dtype=dtype, device=device)
        squares = step.feature_rows(source, gradients, ids, groups, out, *given)
        rows = step.feature_rows_reference(source, gradients, ids, extra)
        active = (counts > 0) | (extra != 0).any(dim=1)
        assert off(out[active], rows[active]) < (1e-5 if dtype == torch.float32 else 1e-2)
        assert off(squares, rows.square().sum(1)) < (1e-5 if dtype == torch.float32 else 2e-2)

        halves = [slice(0, d_sae // 2), slice(d_sae // 2, d_sae)]
        in_parts = torch.full_like(out, torch.nan)
        at_each: list[Tensor] = []

        def note(number: int, at_each: list[Tensor] = at_each, of: Tensor = in_parts) -> None:
            at_each.append(of.clone()[: d_sae // 2] if number == 0 else of.clone()[d_sae // 2 :])

        by_parts = step.feature_rows(
            source, gradients, ids, groups, in_parts, *(given or (None, None)), parts=halves, written=note
        )
        assert torch.equal(torch.cat(at_each), in_parts)
        assert torch.equal(in_parts, torch.where(active[:, None], out, torch.zeros_like(out)))
        assert torch.equal(by_parts, squares)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("unit", [True, False])
def test_adam(device: str, unit: bool) -> None:
    generator = torch.Generator().manual_seed(2)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    start = random(45, 37)
    start /= start.norm(dim=1, keepdim=True)
    gradient, counts = random(45, 37), (random(45) > 0).int()
    gradient[counts == 0] = torch.nan  # not to be read
    slots = torch.full_like(counts, -1)
    along = random(45) if unit else None
    control = torch.tensor([0.3, 1.0], device=device)
    ours, expected = ([start.clone(), torch.zeros_like(start), torch.zeros_like(start)] for _ in range(2))
    copies = [torch.zeros(45, 37, dtype=torch.bfloat16, device=device) for _ in range(2)]
    for number in (1, 2, 3):
        shared = {"lr": 0.01, "betas": (0.9, 0.95), "step": number, "along": along}
        adam_rows(*ours, gradient.clone(), control, counts=counts, slots=slots, copy=copies[0], **shared)
        adam_rows_reference(*expected, gradient, control, active=counts > 0, copy=copies[1], **shared)
    for one, other in zip([*ours, copies[0]], [*expected, copies[1]], strict=True):
        assert off(one, other) < (1e-2 if one.dtype == torch.bfloat16 else 1e-5)
    if unit:
        torch.testing.assert_close(ours[0].norm(dim=1), torch.ones(45, device=device))
    before = [tensor.clone() for tensor in ours]
    control[1] = 0.0
    adam_rows(*ours, gradient.clone(), control, counts=counts, slots=slots, copy=copies[0], **shared)
    assert all(torch.equal(one, other) for one, other in zip(ours, before, strict=True))


def test_adam_equals_torch() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.nn.Parameter(torch.randn(20, 7, generator=generator))
    ours, mean, square = weight.detach().clone(), torch.zeros(20, 7), torch.zeros(20, 7)
    optimiser = torch.optim.Adam([weight], lr=0.02, betas=(0.8, 0.9))
    for number in (1, 2, 3):
        gradient = torch.randn(20, 7, generator=generator)
        weight.grad = gradient.clone()
        optimiser.step()
        adam_rows_reference(
            ours, mean, square, gradient, torch.tensor([1.0, 1.0]), lr=0.02, betas=(0.8, 0.9), step=number
        )
    torch.testing.assert_close(ours, weight.detach())


def pre_activations(kind: str, batch: int, n: int) -> Tensor:
    pre = torch.randn(batch, n, generator=torch.Generator().manual_seed(n))
    if kind == "ties":
        pre = (2 * pre).round()
    if kind == "equal":
        pre = torch.ones(batch, n)
    if kind == "negative":
        pre = -1 - pre.abs()
    return pre.bfloat16()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "negative"])
@pytest.mark.parametrize(
    ("n", "n_valid", "k"), [(1, 1, 1), (100, 77, 10), (100, 5, 10), (300, 300, 300), (1030, 999, 8)]
)
def test_keep_largest(device: str, kind: str, n: int, n_valid: int, k: int) -> None:
    pre = pre_activations(kind, 7, n).to(device)
    n_taken = torch.tensor(n_valid, device=device)
    got = keep_largest(pre, n_taken, k)
    assert torch.equal(got.float(), keep_largest_reference(pre.float(), n_taken, k))
    kept = (got > 0).sum(dim=1)
    assert (kept <= n_valid).all()
    if kind == "random":
        assert (kept <= k).all()
        assert (got[:, n_valid:] == 0).all()


@pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1"
)
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "negative"])
@pytest.mark.parametrize(
    ("n", "k"), [(17, 3), (512, 5), (777, 7), (1000, 16), (4096, 32), (16_384, 64), (65_536, 64), (65_536, 256)]
)
def test_topk_of_bfloat16_rows(kind: str, n: int, k: int) -> None:
    from scope.kernels.triton import selection

    pre = pre_activations(kind, 3, n) if INTERPRETED else pre_activations(kind, 33, n).cuda()
    found = selection.topk_rows(pre, k)
    assert found is not None
    values, ids = found
    expected = torch.topk(pre.float(), k).values
    assert torch.equal(values.sort(descending=True).values, expected)
    assert torch.equal(pre.gather(1, ids.long()).float(), values)
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    again = selection.topk_rows(pre, k)
    assert again is not None
    assert torch.equal(again[1], ids)
    assert torch.equal(topk(pre, k).ids, ids.long())


@pytest.mark.parametrize("device", DEVICES)
def test_largest_of_all(device: str) -> None:
    values = pre_activations("ties", 9, 30).float().to(device)
    for n in (0, 1, 40, 270):
        kept = largest_of_all(values, n)
        assert int(kept.sum()) == n
        assert torch.equal(values[kept].sort().values, values.flatten().sort().values[270 - n :])
        tied = values == values[kept].min() if n else torch.zeros_like(kept)
        assert (kept[tied].int().diff() <= 0).all()  # of equal ones the first


def test_linear_topk_in_pieces() -> None:
    generator = torch.Generator().manual_seed(5)
    x, W, b = (torch.randn(*shape, generator=generator) for shape in ((1100, 6), (40, 6), (40,)))
    got = linear_topk(x, W, b, 3)
    expected = torch.topk(x @ W.T + b, 3)
    torch.testing.assert_close(got.values.sort(descending=True).values, expected.values)
