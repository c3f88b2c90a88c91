"""The site is built without a warning, reads as the pages do on GitHub, and works in a browser that asks no
other host: light, dark, on a phone, with its search."""

from __future__ import annotations

import functools
import json
import logging
import re
import threading
from collections.abc import Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
TAGS = ("li", "table", "tr", "td", "pre", "ol", "ul", "h2", "h3", "strong", "img")
"""What must be on the site as often as on GitHub: the two read lists and tables by different rules."""
SEARCHES = {
    "out of memory": {"troubleshooting.html", "reference/errors.html", "concepts/memory.html"},
    "never stops": {"troubleshooting.html"},
    "learning rate": {"probe.html", "hyperparameters.html", "reference/settings.html"},
    "sample_packing": {"migration.html"},
    "dpo beta": {"reference/settings.html#objectivebeta-dpo"},
    "weight decay": {"reference/settings.html#optimizerweight_decay"},
}
"""Words → pages, or places in them, of which one must be among the first five."""
PAGES = (
    "index.html",
    "reference/settings.html",
    "reference/python.html",
    "evaluation.html",
    "data.html",
    "first-fine-tune.html",
)


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Iterator[Path]:
    """The folder of the built site. A warning of mkdocs fails here, since it is strict."""
    config_of = pytest.importorskip("mkdocs.config").load_config
    from mkdocs.commands.build import build

    folder = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NO_MKDOCS_2_WARNING", "1")
        levels = {name: logging.getLogger(name).level for name in ("mkdocs", "MARKDOWN")}
        build(config_of(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
    yield folder


@pytest.fixture(scope="module")
def address(site) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def opened(browser: Any, page: str, **options: Any) -> tuple[Any, list[str], list[str]]:
    """A page of the site with the requests and the errors that it caused."""
    context = browser.new_context(**options)
    context.set_default_timeout(60_000)
    tab = context.new_page()
    requests: list[str] = []
    errors: list[str] = []
    tab.on("request", lambda request: requests.append(request.url))
    tab.on("pageerror", lambda error: errors.append(str(error)))
    tab.goto(page, wait_until="networkidle")
    return tab, requests, errors


def test_every_page_is_on_the_site_with_what_it_has_on_github(site):
    markdown = MarkdownIt("commonmark").enable("table")
    count = 0
    for page in sorted(DOCS.rglob("*.md")):
        github = markdown.render(page.read_text("utf-8"))
        text = (site / page.relative_to(DOCS).with_suffix(".html")).read_text("utf-8")
        article = text[text.index("<article") : text.index("</article>")]
        for tag in TAGS:
            there, here = (len(re.findall(f"<{tag}[ />]", html)) for html in (github, article))
            assert there == here, f"{page.relative_to(DOCS)}: {there} {tag} on GitHub, {here} on the site"
        count += 1
    assert count >= 30


def test_files_of_the_repository_that_pages_link_to_are_on_the_site(site):
    copies = [path for path in (site / "repository").rglob("*") if path.is_file()]
    assert (site / "repository" / "index.html").is_file()  # the README
    assert len(copies) >= 6


def test_no_heading_swallows_its_text_in_the_search(site):
    """A ``<`` in a heading is a tag to the search, and what follows becomes a part of the title."""
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    assert len(index["docs"]) >= 500
    assert not [entry["location"] for entry in index["docs"] if "<" in entry["title"]]


def test_nothing_on_the_site_names_another_host_as_something_to_load(site):
    loads = re.compile(
        r'<(?:script|img|iframe|source)[^>]+src="(https?:)?//|<link[^>]+href="https?://(?!127)'
    )
    for path in site.rglob("*.html"):
        found = [match[0] for match in loads.finditer(path.read_text("utf-8"))]
        assert not found, f"{path.relative_to(site)}: {found[:3]}"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_loads_from_its_own_host_alone_and_follows_the_scheme(browser, address, page, scheme):
    tab, requests, errors = opened(browser, f"{address}/{page}", color_scheme=scheme)
    assert requests and all(url.startswith((address, "data:", "blob:")) for url in requests), requests
    assert not errors
    chosen = {"light": "default", "dark": "slate"}[scheme]  # by a script, after the page is there
    tab.wait_for_function(f"document.body.getAttribute('data-md-color-scheme') === '{chosen}'")
    dark = (
        "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).every(one => one < 100)"
    )
    tab.wait_for_function(dark if scheme == "dark" else f"!({dark})")  # colours change by a transition
    tab.context.close()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_fits_the_width_of_a_phone(browser, address, page):
    tab, _, _ = opened(browser, f"{address}/{page}", viewport={"width": 375, "height": 700})
    assert tab.evaluate("document.documentElement.scrollWidth") <= 375
    tab.context.close()


def test_the_scheme_can_be_changed_by_hand(browser, address):
    tab, _, _ = opened(browser, f"{address}/index.html", color_scheme="light")
    for _ in range(2):  # from the system's to light, and to dark
        tab.locator("label.md-header__button[for^=__palette]:visible").first.click()
    assert tab.evaluate("document.body.getAttribute('data-md-color-scheme')") == "slate"
    tab.context.close()


@pytest.mark.parametrize("words", SEARCHES)
def test_the_search_finds_what_people_look_for(browser, address, words):
    tab, requests, _ = opened(browser, f"{address}/index.html")
    tab.locator("input.md-search__input").first.click()
    tab.keyboard.type(words)
    found = """wanted => [...document.querySelectorAll("a.md-search-result__link")].slice(0, 5).some(
        link => [link.pathname, link.pathname + link.hash].some(place => wanted.includes(place.slice(1))))"""
    # The results of the letters typed so far come first.
    tab.wait_for_function(found, arg=sorted(SEARCHES[words]))
    assert all(url.startswith((address, "data:", "blob:")) for url in requests)
    tab.context.close()


def test_the_search_index_has_every_page(site):
    index = json.loads((site / "search" / "search_index.json").read_text("utf-8"))
    places = {entry["location"].partition("#")[0] for entry in index["docs"]}
    pages = {page.relative_to(DOCS).with_suffix(".html").as_posix() for page in DOCS.rglob("*.md")}
    assert pages <= places
