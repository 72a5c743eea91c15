"""A feature in a notebook: all panels, everything escaped, other scripts and split characters shown well."""

import re
from html.parser import HTMLParser

import pytest
from helpers_features import tiny_index

from scope.features.html import token_html, token_strip

EVIL = '<script>alert("x")</script>'


class Reader(HTMLParser):
    def __init__(self, content):
        super().__init__()
        self.tags, self.text = set(), ""
        self.feed(content)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        assert not [name for name, _ in attrs if name.startswith("on") or name in ("src", "href")]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return tiny_index(tmp_path_factory.mktemp("panels"))[0]


def test_a_feature_shows_the_panels_of_its_page(index):
    feature = int(index.table["n_firings"].idxmax())
    shown = Reader(index.feature(feature)._repr_html_())
    for title in (
        f"Feature {feature}", "firings", "How strongly it fires", "Fires on", "Makes likelier", "Makes less likely",
        "By language", "Decoder neighbours", "Fires with", "Strongest", "Quantile 0.75 to 1", "Quantile 0 to 0.25",
    ):  # fmt: skip
        assert title in shown.text
    assert {"svg", "details"} <= shown.tags
    neighbour = int(index.neighbours(feature, 1)["feature"].iloc[0])
    assert re.search(rf"Decoder neighbours cosine\s*{neighbour} ", shown.text)
    assert shown.text.count(" firings") >= index.histogram(feature)[1].size


def test_labels_notes_and_lists_are_text(index):
    feature = int(index.table["n_firings"].idxmax())
    other = int(index.neighbours(feature, 1)["feature"].iloc[0])
    index.labels.set(feature, text=EVIL + " قط " + "x" * 150, notes=EVIL, starred=True)
    index.labels.set(other, text=EVIL)
    index.labels.add_to_list(feature, "<b>list")
    shown = Reader(index.feature(feature)._repr_html_())
    assert "script" not in shown.tags
    assert "b" not in shown.tags
    assert shown.text.count(EVIL) >= 3
    assert "★" in shown.text
    assert index.feature(feature).label.lists == ("<b>list",)


def test_a_feature_that_never_fires_still_shows_what_it_would_do(index):
    shown = Reader(index.feature(5)._repr_html_())
    assert "It never fires" in shown.text
    assert "Makes likelier" in shown.text
    assert "Strongest" not in shown.text


def test_a_split_character_shows_with_its_share_and_a_line_goes_its_own_way():
    strip = token_strip(["吾 ¹⁄₃", " ²", "قط\n"], [1.0, 0.0, 0.5], 1.0, centre=0)
    assert 'dir="auto"' in strip
    assert "unicode-bidi:plaintext" in strip
    assert re.search(r"吾<span style=\"[^\"]*font-size[^\"]*\">¹⁄₃</span>", strip)
    assert "<span> ²</span>" in strip
    assert "⏎" in strip
    assert token_html(" <b> ¹⁄₂").startswith("␣&lt;b&gt;<span")
