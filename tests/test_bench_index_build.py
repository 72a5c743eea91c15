"""The benchmark of building an index runs, says what it should, and leaves nothing behind."""

from pathlib import Path

import pytest
from test_cli import scope


def test_the_figures(tmp_path: Path) -> None:
    given = ("--rows", 4096, "--d-in", 24, "--d-sae", 200, "--k", 4, "--device", "cpu", "--folder", tmp_path)
    figures = scope("bench", "index-build", *given, "--json")
    assert figures["rows"] == 4096
    assert 0.9 * 4 * 4096 < figures["firings"] <= 4 * 4096
    assert figures["ratio_to_encode"] == pytest.approx(
        figures["build_rows_per_second"] / max(figures["encode_rows_per_second_of_each_turn"])
    )
    assert figures["cpu_ratio_to_encode"] > 0
    assert 4 < figures["bytes_per_firing"] < 14, "few firings, so where the lists begin counts for much"
    assert figures["peak_memory_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


def test_what_makes_no_sense() -> None:
    assert "rows is 9" in scope("bench", "index-build", "--rows", 9, "--json", code=2)["error"]["message"]
    assert "k is 99" in scope("bench", "index-build", "--k", 99, "--d-sae", 9, "--json", code=2)["error"]["message"]
