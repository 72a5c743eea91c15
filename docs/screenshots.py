"""Screenshots of every page of the dashboard, in both themes, as wide as a desk and as narrow as a phone.

    python docs/screenshots.py workspace --out shots      # every page: light and dark, 1440 and 390 pixels wide
    python docs/screenshots.py workspace --ship           # the ones in docs/pages: light, 1440 pixels, as WebP

1. The workspace is served by a thread of this process, at a free port.
2. `views` names an address for each page, from what the workspace holds; pages that need two SAEs or a training are
   left out, and said, where there is none.
3. Chromium (CHROMIUM=/path, else the one on the PATH) opens each address, waits for what the page is about, and takes
   the picture. A page that shows an error, or scrolls sideways, is reported, and the exit status is 1.
"""

import argparse
import base64
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from dashboards.app import PAGES, bind
from dashboards.columns import umap_of
from dashboards.links import (
    circuit_link,
    compare_link,
    feature_link,
    features_link,
    lens_link,
    prompt_link,
    steer_link,
    training_link,
    workspace_link,
)
from scope.workspace import Workspace

HERE = Path(__file__).parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
SIZES = {1440: 960, 390: 844}
"""Width and height of the window, in pixels."""
MODEL_TIMEOUT = 180_000
"""Milliseconds that a page may take: the model is loaded for the first prompt."""
QUALITY = 82
TEXT = "The capital of France is Paris. The opposite of hot is"
SHOWN = {"workspace", "features", "feature", "prompt", "lens", "circuit", "steer", "training", "compare"}
"""Pages with addresses of their own here; any other is opened as it comes."""
TWO = ("The opposite of hot is", "The opposite of big is")


class Shot(NamedTuple):
    """A page to photograph."""

    name: str
    address: str
    ready: str
    """A selector of what the page is about."""
    page: str
    """Of `dashboards.app.PAGES`."""


def views(workspace: Workspace) -> Iterator[Shot]:
    """An address for each page, as far as the workspace has something to show on it."""
    yield Shot("workspace", workspace_link(), ".workspace-page", "workspace")
    for entry in workspace.indexes()[:1]:
        id, index = entry.id, workspace.index(entry.id)
        has_umap = umap_of(index) is not None
        yield Shot("features", features_link(id, colour="top_language"), ".cell-spark", "features")
        if has_umap:
            yield Shot("umap", features_link(id, plot="umap", colour="top_language"), ".cell-spark", "features")
        yield Shot("feature", feature_link(id, telling_feature(index)), ".example .tok, .state", "feature")
        yield Shot("prompt", prompt_link(id, text=TEXT, token=5), ".firing", "prompt")
        yield Shot("two-prompts", prompt_link(id, text=TWO[0], text2=TWO[1]), ".next-rows", "prompt")
        yield Shot("lens", lens_link(id, text=TWO[0]), "#lens-chart .main-svg", "lens")
        pushed = f"{telling_feature(index)}:2"
        yield Shot("steer", steer_link(id, text="I think that", push=pushed, n=20), ".steer-changes", "steer")
        for page in PAGES.keys() - SHOWN:
            yield Shot(page, f"/{page}?index={id}", "#content > *", page)
    graphs = workspace.graphs()
    ready = "[data-node]" if graphs else "#content > *"
    yield Shot("circuit", circuit_link(graphs[0].id if graphs else ""), ready, "circuit")
    yield Shot("training", training_link(), ".training-page", "training")
    for run in workspace.trainings()[:1]:
        yield Shot("one-training", training_link(run.id), ".training-page .main-svg", "training")
    saes = [entry for entry in workspace.saes() if entry.problem is None]
    if len(saes) > 1:
        yield Shot("compare", compare_link(a=saes[0].id, b=saes[1].id), "#compare-histogram .main-svg", "compare")


def telling_feature(index: Any) -> int:
    """A feature with something to see: not rare, not dense, on several words and on hardly anything else."""
    table = index.table
    words = table["top_tokens"].map(lambda tokens: all(str(token).strip().isalpha() for token in list(tokens)[:5]))
    several = table["token_entropy"].between(1.5, 3.5) & (table["top_token_share"] < 0.5)
    told = table[words & several & (table["n_firings"] >= 60) & (table["density"] < 0.01)]
    chosen = told if len(told) else table
    return int(chosen.sort_values("n_firings", ascending=False)["feature"].iloc[0])


def photograph(url: str, shots: list[Shot], out: Path, *, ship: bool, full: bool) -> list[str]:
    """Take the pictures into `out`; returns what is wrong with them, a line each."""
    from playwright.sync_api import sync_playwright

    executable = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
    if executable is None:
        raise SystemExit("There is no Chromium: install it, or name it with CHROMIUM=/path.")
    out.mkdir(parents=True, exist_ok=True)
    troubles = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=executable, args=FLAGS)
        for theme in ("light",) if ship else ("light", "dark"):
            for width, height in list(SIZES.items())[: 1 if ship else 2]:
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
                context.set_default_timeout(MODEL_TIMEOUT)
                page = context.new_page()
                for shot in shots:
                    page.goto(url + shot.address)
                    page.wait_for_selector(shot.ready)
                    page.wait_for_load_state("networkidle")
                    page.wait_for_timeout(400)
                    name = shot.name if ship else f"{shot.name}-{width}-{theme}"
                    _save(context, page, out / name, ship=ship, full=full)
                    troubles += [f"{name}: {trouble}" for trouble in _troubles(page, width)]
                    sys.stderr.write(f"{out / name}\n")
                context.close()
        browser.close()
    return troubles


def _save(context: Any, page: Any, path: Path, *, ship: bool, full: bool) -> None:
    if not ship:
        page.screenshot(path=path.with_suffix(".png"), full_page=full)
        return
    # Playwright itself writes no WebP.
    session = context.new_cdp_session(page)
    found = session.send("Page.captureScreenshot", {"format": "webp", "quality": QUALITY})
    path.with_suffix(".webp").write_bytes(base64.b64decode(found["data"]))


def _troubles(page: Any, width: int) -> Iterator[str]:
    for text in page.locator(".state.error").all_text_contents():
        yield f"shows an error: {text[:200]}"
    wide = page.evaluate("document.documentElement.scrollWidth")
    if wide > width:
        yield f"is {wide} pixels wide in a window of {width}"


def main() -> int:
    """Parse the arguments, serve, photograph."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workspace", type=Path, help="the folder of a workspace, such as the one that make demo makes")
    parser.add_argument(
        "--out", type=Path, default=None, help="where to; by default docs/pages with --ship, else shots"
    )
    parser.add_argument("--ship", action="store_true", help="one of each: light, 1440 pixels, as WebP")
    parser.add_argument("--full", action="store_true", help="the whole page, however long, not one window of it")
    parser.add_argument("--only", default="", help="names of pages, separated by commas")
    given = parser.parse_args()
    workspace = Workspace(given.workspace)
    only = set(filter(None, given.only.split(",")))
    shots = [shot for shot in views(workspace) if not only or shot.name in only]
    missing = sorted(PAGES.keys() - {shot.page for shot in shots})
    if missing and not only:
        sys.stderr.write(f"Nothing to show on: {', '.join(missing)}\n")
    server, (url, *_) = bind(workspace, "127.0.0.1", 0)
    threading.Thread(target=server.run, daemon=True).start()
    out = given.out or (HERE / "pages" if given.ship else Path("shots"))
    troubles = photograph(url, shots, out, ship=given.ship, full=given.full)
    sys.stderr.write("".join(f"{trouble}\n" for trouble in troubles))
    return 1 if troubles else 0


if __name__ == "__main__":
    sys.exit(main())
