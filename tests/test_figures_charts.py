"""Figures: what they draw, that markup stays text, that colours can be read."""

import json

import numpy as np
import pandas as pd
import pytest

from scope import figures
from scope.figures import CONFIG, PALETTES
from scope.figures.axes import log_axis
from scope.figures.colours import contrast, mix, ramp
from scope.figures.text import as_label, one_in, short_number, visible_token

THEMES = ("light", "dark")
EVIL = "<script>alert(1)</script> & <b>x</b>"


def table(n: int = 30) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    return pd.DataFrame(
        {
            "feature": np.arange(n),
            "density": 10 ** rng.normal(-3, 0.5, n),
            "max_value": rng.gamma(2, 100, n),
            "top_language": rng.choice(list("abcdefghijklm"), n),
            "top_token": [EVIL] * n,
        }
    )


def all_figures(theme):
    edges, counts = np.linspace(0, 5, 41), np.arange(40)[::-1]
    yield figures.activation_histogram(figures.histogram_frame(edges, counts), theme=theme)
    rates = {"rate": [0.2, 0.1], "rate_low": [0.1, 0.0], "rate_high": [0.3, 0.2]}
    yield figures.rate_bars(pd.DataFrame({"language": [EVIL, "ar"], **rates}), theme=theme)
    yield figures.feature_scatter(table(), log_x=True, theme=theme)
    yield figures.feature_scatter(table(), colour="density", theme=theme)
    yield figures.feature_scatter(table(), colour="top_language", theme=theme)
    yield figures.logit_bars(pd.DataFrame({"token": [EVIL, " b\n"], "effect": [0.3, -0.1]}), theme=theme)
    yield figures.logit_histogram(np.linspace(-1, 2, 41), np.arange(40), theme=theme)
    curves = pd.DataFrame({"tokens": [0, 10], "fvu": [1.0, 0.1], "l0": [3.0, 4.0]})
    yield figures.training_curves(curves, theme=theme)
    yield figures.training_curves(pd.concat([curves.assign(run=EVIL), curves.assign(run="b")]), theme=theme)
    rows = [("graph", 1, 0.2), ("random", 1, 0.1), ("graph", 200, 0.9), ("all", 300, 1.0)]
    curve = pd.DataFrame(rows, columns=["nodes", "size", "faithfulness"]).assign(errors="kept", low=0.0, high=0.2)
    yield figures.faithfulness_curves(pd.concat([curve, curve.assign(errors="ablated")]), theme=theme)
    steps = {"step": [0, 1], "n_firings": [5, 2], "n_rows": [9, 9]} | rates
    yield figures.step_rates(pd.DataFrame(steps), theme=theme)
    commits = pd.DataFrame({"step": [0, 1, -1], "n_tokens": [4, 2, 1], "share": [0.5, 0.3, 0.2]})
    yield figures.commit_bars(commits, theme=theme)
    heat = pd.DataFrame({"position": [0, 1], "feature": [7, 3], "value": [1.0, 2.0]})
    yield figures.token_feature_heatmap(heat, [EVIL, " x"], labels={7: EVIL}, theme=theme)


@pytest.mark.parametrize("theme", THEMES)
def test_every_figure_says_what_it_shows(theme):
    for figure in all_figures(theme):
        assert figure.layout.title.text
        assert figure.layout.template.layout.paper_bgcolor == PALETTES[theme].page
        content = json.loads(figure.to_json())
        axes = [axis for name, axis in content["layout"].items() if name.startswith(("xaxis", "yaxis"))]
        named = [axis for axis in axes if axis.get("title", {}).get("text")]
        assert any(name.startswith("xaxis") for name in content["layout"])
        assert len(named) >= 2


@pytest.mark.parametrize("theme", THEMES)
def test_markup_stays_text(theme):
    for figure in all_figures(theme):
        content = figure.to_json().replace("\\u003c", "<")
        assert "<script" not in content
        assert "<b>" not in content


def test_empty_figures_say_so():
    edges = np.zeros(41)
    figure = figures.activation_histogram(figures.histogram_frame(edges, np.zeros(40, int)))
    assert "never fires" in figure.layout.annotations[0].text
    empty = pd.DataFrame({"position": [], "feature": [], "value": []})
    assert "No feature" in figures.token_feature_heatmap(empty, ["a"]).layout.annotations[0].text
    assert figures.logit_bars(pd.DataFrame({"token": [], "effect": []})).data[0].x is not None


def test_histogram_bars_have_the_colour_of_their_strength():
    edges, counts = np.array([0.0, 1.0, 2.0]), np.array([3, 0])
    bar = figures.activation_histogram(figures.histogram_frame(edges, counts)).data[0]
    assert list(bar.x) == [0.5, 1.5]
    assert list(bar.marker.color) == [0.5, 1.5]
    assert bar.y[0] == 3
    assert np.isnan(bar.y[1])


def test_logit_bars_keep_both_ends():
    frame = pd.DataFrame({"token": [str(n) for n in range(100)], "effect": np.arange(100) - 50.0})
    bar = figures.logit_bars(frame, limit=3).data[0]
    assert list(bar.x) == [-50, -49, -48, 47, 48, 49]
    palette = PALETTES["light"]
    assert list(bar.marker.color) == [palette.negative] * 3 + [palette.positive] * 3


def test_logit_histogram_colours_by_sign_and_leaves_empty_bins_empty():
    bar = figures.logit_histogram(np.array([-2.0, -1.0, 0.0, 1.0]), np.array([5, 0, 3])).data[0]
    assert list(bar.x) == [-1.5, -0.5, 0.5]
    assert np.isnan(bar.y[1])
    palette = PALETTES["light"]
    assert list(bar.marker.color) == [palette.negative, palette.negative, palette.positive]


def test_scatter_groups_what_comes_after_eight():
    figure = figures.feature_scatter(table(300), colour="top_language")
    assert len(figure.data) == 8
    assert figure.data[-1].name == "other"
    assert sum(len(trace.x) for trace in figure.data) == 300
    assert set(np.concatenate([trace.customdata for trace in figure.data])) == set(range(300))


def test_heatmap_puts_firings_where_they_are():
    frame = pd.DataFrame({"position": [2, 0, 1], "feature": [7, 3, 3], "value": [1.0, 2.0, 5.0]})
    heat = figures.token_feature_heatmap(frame, ["a", "b", "c"]).data[0]
    assert (heat.zmin, heat.zmax) == (0, 5)
    z = np.array(heat.z, float)
    assert z[0].tolist()[:2] == [2, 5]
    assert z[1][2] == 1
    assert np.isnan(z[1][0])


@pytest.mark.parametrize("theme", THEMES)
def test_text_can_be_read_everywhere(theme):
    palette = PALETTES[theme]
    for share in np.linspace(0, 1, 21):
        for fill in (palette.accent, palette.negative_fill, palette.positive_fill):
            assert contrast(palette.text, mix(palette.page, fill, share)) >= 4.5
    for colour in (palette.muted, palette.accent_text, palette.negative, palette.positive):
        assert contrast(colour, palette.page) >= 4.5
    assert contrast(palette.muted, palette.surface) >= 4.5
    assert len(palette.categories) == len(set(palette.categories)) == 8
    assert all(contrast(colour, palette.page) >= 3 for colour in palette.categories)


def test_scales_are_even_and_end_where_they_should():
    assert mix("#000000", "#ffffff", 0) == "#000000"
    assert mix("#000000", "#ffffff", 2) == "#ffffff"
    assert mix("#123456", "#abcdef", 1) == "#abcdef"
    for theme in THEMES:
        palette = PALETTES[theme]
        assert palette.sequential[0] == (0, palette.page)
        assert palette.sequential[-1] == (1, palette.accent)
        assert palette.diverging[4] == (0.5, palette.page)
        assert figures.activation_colour(0, 5, theme) == palette.page
        assert figures.activation_colour(9, 5, theme) == palette.accent
        assert figures.activation_colour(1, 0, theme) == palette.page
        assert figures.effect_colour(-2, 2, theme) == palette.negative_fill
    assert [place for place, _ in ramp("#000000", "#ffffff", n=3)] == [0, 0.5, 1]


def test_css_variables_name_the_whole_palette():
    light, dark = figures.css_variables("light"), figures.css_variables("dark")
    assert light.keys() == dark.keys()
    assert light["--scope-page"] == PALETTES["light"].page
    assert {f"--scope-category-{n}" for n in range(1, 9)} <= light.keys()


def test_nothing_leaves_the_machine():
    assert CONFIG["showSendToCloud"] is False
    assert CONFIG["plotlyServerURL"] == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (1234.5, "1,234"),
        (999.7, "1,000"),
        (12.345, "12.3"),
        (99.96, "100"),
        (0.99999, "1.00"),
        (0.012345, "0.0123"),
        (-3.14159, "−3.14"),
        (1.5e-6, "1.50e−6"),
        (2.5e8, "2.50e8"),
        (float("nan"), "–"),
        (None, "–"),
    ],
)
def test_numbers_are_short(value, text):
    assert short_number(value) == text


def test_words():
    assert one_in(1 / 2400) == "1 in 2,400"
    assert one_in(0) == "never"
    assert visible_token(" the") == "␣the"
    assert visible_token("a b\n") == "a b⏎"
    assert visible_token("  ") == "␣␣"
    assert as_label("<b>") == "&lt;b&gt;"
    assert as_label("x" * 50, 10) == "x" * 9 + "…"


@pytest.mark.parametrize(
    "values", [[0.055, 0.0762], [32.0], [1e-3, 0.6], [3e-9, 1e7], [1.0, 1.0000001], [2.0, 9.0], [0.04, 0.0041]]
)
def test_log_axes_have_a_few_ticks_that_can_be_read(values):
    axis = log_axis([*values, 0.0, np.nan])
    low, high = (10**end for end in axis["range"])
    assert low < min(values) <= max(values) < high
    assert 1 <= len(axis["tickvals"]) <= 6
    assert all(low <= tick <= high for tick in axis["tickvals"])
    for tick, text in zip(axis["tickvals"], axis["ticktext"], strict=True):
        assert float(text.replace(",", "")) == pytest.approx(tick)
    assert log_axis([0.0, -1.0]) == {"type": "log"}


def test_figures_import_without_plotly():
    import subprocess
    import sys

    code = "import sys, scope.figures; assert not {'plotly', 'pandas', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
