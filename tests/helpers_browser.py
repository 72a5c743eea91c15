"""What tests of several pages in a browser ask."""

from typing import Any
from urllib.parse import parse_qs, urlsplit

AXE = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"], "resultTypes": ["violations"]}


def query(page: Any) -> dict[str, str]:
    """What the address says."""
    return {name: values[0] for name, values in parse_qs(urlsplit(page.url).query).items()}


def serious(page: Any, within: str | None = None) -> list[tuple[str, str]]:
    """What axe finds of serious and critical faults of accessibility: the rule, and the first element."""
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page, context=within, options=AXE).response["violations"]
    return [(one["id"], one["nodes"][0]["html"][:300]) for one in found if one["impact"] in ("serious", "critical")]
