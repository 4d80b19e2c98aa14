"""`make book`: every link and picture of the site leads somewhere, and nothing needs a network."""

from __future__ import annotations

import os
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import ROOT

pytest.importorskip("myst_nb", reason="the extra `book` is not installed: make book")
pytest.importorskip("furo", reason="the extra `book` is not installed: make book")


class Page(HTMLParser):
    """The ids of a page, what it loads, where it leads, and its pictures without a text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.ids, self.loads, self.leads, self.undescribed = {""}, set(), set(), []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.ids.add(values.get("id") or "")
        address = values.get("src") or values.get("href")
        if tag == "img" and values.get("alt") in {None, "", address}:
            self.undescribed.append(address)
        if address:
            (self.leads if tag == "a" else self.loads).add(address)


def test_links_and_pictures_exist_and_nothing_is_loaded_from_a_network(tmp_path):
    out = tmp_path / "book"
    build = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-c", "docs/book", "."]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([*build, str(out)], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    pages = {path: Page(path) for path in out.rglob("*.html")}
    sources = [*ROOT.glob("*.ipynb"), *(ROOT / "notebooks").glob("*.ipynb")]
    assert {out / path.relative_to(ROOT).with_suffix(".html") for path in sources} <= pages.keys()
    broken = []
    for path, page in pages.items():
        assert [address for address in page.loads if urlsplit(address).netloc] == [], path.name
        assert page.undescribed == [], path.name
        for address in page.loads | page.leads:
            url = urlsplit(address)
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            ids = pages[target].ids if target in pages else {""}
            if not target.is_file() or unquote(url.fragment) not in ids:
                broken.append(f"{path.relative_to(out)}: {address}")
    assert broken == []
