"""Edges from what fires, piece by piece of the positions, and batches of targets that are near to each other."""

from types import SimpleNamespace

import pytest
import torch
from helpers_models import one_thread as one_thread
from hypothesis import given
from hypothesis import strategies as st

from scope.attribution import firing_effects
from scope.attribution.firing_effects import effects, pieces_of
from scope.attribution.frozen import tensor_cores
from scope.attribution.graph import _Expansion
from scope.attribution.graph_settings import GraphSettings
from scope.attribution.reading import Firing

D_MODEL, D_SAE = 6, 10


@pytest.mark.parametrize("chunk", [1, 4, 100])
@pytest.mark.parametrize("rows", [1, 6, 11])
def test_they_are_the_products_that_they_stand_for(chunk: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing fires on some positions, all features on others."""
    monkeypatch.setattr(firing_effects, "POSITION_CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    features = torch.rand(11, D_SAE, generator=generator) * torch.tensor([0, 1, 0, 0, 1, 1, 0, 1, 0, 1, 1])[:, None]
    features[4:6] *= torch.rand(2, D_SAE, generator=generator) < 0.4
    position, feature = features.nonzero(as_tuple=True)
    firing = Firing(position, feature, features[position, feature])
    decoder = torch.randn(D_SAE, D_MODEL, generator=generator)
    gradient = torch.randn(3, rows, D_MODEL, generator=generator)
    found = effects(pieces_of(firing, 11), firing, gradient, lambda ids: decoder[ids])
    whole = torch.zeros(3, 11, D_SAE)
    whole[:, :rows] = gradient @ decoder.T * features[:rows]
    torch.testing.assert_close(found, whole[:, position, feature])


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 50)), min_size=1, max_size=60), st.integers(1, 9))
def test_batches_hold_every_feature_once_and_neighbours_together(places: list[tuple[int, int]], size: int) -> None:
    positions = torch.tensor([position for _, position in sorted(places)])
    work = SimpleNamespace(settings=GraphSettings(batch_size=size), position=positions)
    batches = _Expansion._batches(work, torch.arange(len(places)))  # type: ignore[arg-type]
    assert sorted(torch.cat(batches).tolist()) == list(range(len(places)))
    assert all(0 < len(batch) <= size for batch in batches)
    assert len(batches) == -(-len(places) // size)
    assert all(positions[batch].diff().ge(0).all() for batch in batches)


def test_products_of_a_cpu_stay_as_they_are() -> None:
    before = torch.get_float32_matmul_precision()
    with tensor_cores(SimpleNamespace(device=torch.device("cpu"), dtype=torch.bfloat16)):
        assert torch.get_float32_matmul_precision() == before


def test_a_gpu_takes_tensor_cores_for_a_model_in_half_precision_and_gives_them_back() -> None:
    before = torch.get_float32_matmul_precision()
    for dtype, expected in ((torch.bfloat16, "high"), (torch.float32, before)):
        with tensor_cores(SimpleNamespace(device=torch.device("cuda"), dtype=dtype)):
            assert torch.get_float32_matmul_precision() == expected
        assert torch.get_float32_matmul_precision() == before
