"""What an audit shows says what was found, and no text of the data is ever more than text: on a terminal and
in a browser."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from html.parser import HTMLParser
from os import fsencode
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.console import Console

import colours
from tunesmith.auditing import page, registry, screen
from tunesmith.auditing.findings import Audit, Finding, FindingRow, gravest_first
from tunesmith.display.text import percent
from tunesmith.errors import ConfigError

HOSTILE = (
    "<b>b</b></script><img src=x onerror='window.hacked=1'>\"&lt;{{7*7}}`<i>` javascript:window.hacked=1 "
    "%{x} "
    "\x00\x1b[31m\ud800\u202e\u2028"
)
SHOWN = HOSTILE.partition("`")[0]
"""What is left of `HOSTILE` for the eye, up to the backticks."""


def charts(rows: int, text: str = "a prompt", file: str = "rows.jsonl") -> dict[str, Any]:
    """Every chart, of ``rows`` rows in three clusters, the last of which is small; each third label is
    another."""
    at = range(rows)
    part = {
        "edges": [0.0, 50.0, 100.0, 150.0],
        "counts": [rows - 3, 2, 1],
        "quantiles": {"5": 3.0, "50": 20.0, "100": 140.0},
        "mean": 25.0,
    }
    return {
        "map": {
            "x": [10.0 * (row % 40) for row in at],
            "y": [10.0 * (row // 40) for row in at],
            "source": [f"{file}:{row + 1}" for row in at],
            "text": [f"{text} {row}" for row in at],
            "cluster": [2 if row == rows - 1 else row % 2 for row in at],
            "label": [(True, False, None)[row % 3] for row in at],
            "names": [f"even {text}", f"odd {text}", f"last {text}"],
            "method": f"words, {text}",
        },
        "lengths": {
            "unit": f"tokens of {text}",
            "limit": 120,
            "parts": {"prompt": part, "answer": part, "total": part},
        },
        "types": [{"type": f"{text} {kind}", "true": 9, "false": 3, "none": 1} for kind in range(30)],
        "worst": [
            {"source": f"{file}:{row + 1}", "score": 10.0 + row, "why": ["content.x", text], "text": text}
            for row in at[:20]
        ],
    }


def an_audit(text: str = "a text", file: str = "rows.jsonl", rows: int = 120) -> Audit:
    """An audit with everything in it, ``text`` wherever a text may be."""
    named = tuple(FindingRow(f"{file}:{row + 1}", f"note {row} {text}") for row in range(250))
    findings = [
        Finding(
            "duplicates.exact",
            "warning",
            f"many repeat {text}",
            300,
            1000,
            rows=named,
            hint=f"use `--fix OUT` {text}",
        ),
        Finding(
            "contamination.exact", "error", f"3 leak {text}", 3, 800, None, "0", named[:3], "take them out"
        ),
        Finding(
            "diversity.trigrams", "warning", f"few trigrams {text}", of=1000, value=0.583, threshold="> 70%"
        ),
        Finding("content.refusals", "note", "19 refuse", 19, 1000, accepted="warning"),
        Finding("balance.types", "good", "enough types", value=4.21, threshold=f"> 2.5 bits {text}"),
        Finding(f"of its own.{text}", "note", "1 is odd", 1, rows=(FindingRow(text[:4000], "no line"),)),
    ]
    quality = {f"{file}:{row + 1}": 10.0 + 90 * row / rows for row in range(rows)}
    return Audit(
        {file: "5f" * 32}, rows, gravest_first(findings), quality, charts(rows, text, file), seconds=6.3
    )


NOTHING = Audit({}, 0, [], {})


# The file


def test_only_a_page_of_an_audit_is_replaced(tmp_path):
    path = tmp_path / "new" / "page.html"
    page.write(NOTHING, path)
    page.write(an_audit(), path)
    assert "many repeat" in path.read_text(encoding="utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]
    mine = tmp_path / "mine.html"
    mine.write_bytes(b"<p>my own</p>")
    for other in (mine, tmp_path):
        with pytest.raises(ConfigError) as caught:
            page.write(NOTHING, other)
        assert str(other) in str(caught.value) and "hint: name a file that does not exist yet" in str(
            caught.value
        )
    assert mine.read_bytes() == b"<p>my own</p>"
    with pytest.raises(ConfigError, match="cannot be written") as caught:
        page.write(NOTHING, mine / "page.html")
    assert caught.value.hint


def test_a_page_that_cannot_be_finished_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "page.html"
    page.write(NOTHING, path)
    before = path.read_bytes()

    def full(self, *arguments, **named):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(ConfigError, match="No space left"):
        page.write(an_audit(), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_the_same_audit_gives_the_same_page():
    assert page.html(an_audit()) == page.html(an_audit())


def test_large_audits_make_small_pages():
    rows = 1_000
    named = tuple(FindingRow(f"rows.jsonl:{row + 1}", "漢" * 100_000) for row in range(rows))
    many = [
        Finding(f"content.{at}", "warning", "w" * 100_000, rows, rows, rows=named, hint="h" * 100_000)
        for at in range(60)
    ]
    audit = an_audit("長" * 100_000, rows=rows)
    wide = Audit(audit.files, rows, [*audit.findings, *many], audit.quality, audit.charts)
    size = len(page.html(wide).encode())
    assert size < 3e6
    assert len(page.html(NOTHING)) < 100_000


def test_the_page_of_1_000_rows_has_less_than_500_kB():
    text = (
        "Move the notes of last week's meeting into the archive, and tell me how many there were before that."
    )
    assert 200_000 < len(page.html(an_audit(text, rows=1_000)).encode()) < 500_000


def test_of_200_000_rows_2_000_points_are_drawn_and_every_row_is_counted():
    rows = 200_000
    tags = Tags()
    tags.feed(page.html(an_audit(rows=rows)))
    drawn = [tag for tag, attributes in tags.tags if "point" in (attributes.get("class") or "").split()]
    assert 1_000 < len(drawn) <= 2_000 + len("circle, cross and diamond of the legend".split())
    assert len(json.loads(tags.data)["points"]) <= 2_000
    counts = [int(title.split(": ")[1].replace(",", "")) for title in tags.titles["quality"]]
    assert len(counts) <= 100 and sum(counts) == rows


@pytest.mark.parametrize("absent", ["map", "lengths", "types", "worst"])
def test_any_chart_may_be_absent_and_every_section_that_is_named_is_there(absent):
    whole = an_audit()
    kept = {name: chart for name, chart in whole.charts.items() if name != absent}
    text = page.html(Audit(whole.files, whole.rows, whole.findings, whole.quality, kept))
    left_out = {
        "map": {"map"},
        "lengths": {"length-prompt", "length-answer", "length-total"},
        "types": {"types"},
        "worst": set(),
    }
    tags, every = Tags(), Tags()
    tags.feed(text)
    every.feed(page.html(whole))
    assert len(every.drawn) == 6 and every.drawn - tags.drawn == left_out[absent]
    named = {attributes["id"] for _, attributes in tags.tags if "id" in attributes}
    links = [
        attributes["href"]
        for tag, attributes in tags.tags
        if tag == "a" and (attributes.get("href") or "").startswith("#")
    ]
    assert len(links) > 10 and {link[1:] for link in links if link} <= named


CHARTS = ["length-prompt", "length-answer", "length-total", "types", "map", "quality"]


class Tags(HTMLParser):
    """The start tags of a page, and the text of its data."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.chart = ""
        self.titles: dict[str, list[str]] = {}  # of the bars of each chart

    @property
    def drawn(self) -> set[str]:
        return {attributes["id"] or "" for _, attributes in self.tags if attributes.get("id") in CHARTS}

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.chart = dict(attrs).get("id") or self.chart

    def handle_data(self, data):
        if self.tags and self.tags[-1][1].get("id") == "data":
            self.data += data
        elif self.tags and self.tags[-1][0] == "title" and data.strip():
            self.titles.setdefault(self.chart, []).append(data)


@settings(max_examples=10, deadline=None)
@given(st.text(st.characters(), min_size=1, max_size=60))
@example(HOSTILE)
@example("<!--<script>")
@example("]]>\u2029\x85")
def test_no_text_adds_a_tag_and_every_text_can_be_written(text):
    def skeleton(html: str) -> list[tuple[str, list[str]]]:
        html.encode()
        tags = Tags()
        tags.feed(html)
        assert json.loads(tags.data)["rows"]
        return [
            (tag, sorted(attributes)) for tag, attributes in tags.tags if tag != "code"
        ]  # backticks are meant to be code

    assert skeleton(page.html(an_audit(text, rows=9))) == skeleton(page.html(an_audit("x", rows=9)))


# Links


@given(
    st.text(st.characters(exclude_characters="\x00/", exclude_categories=("Cs",)), min_size=1, max_size=30)
)
@example("a b 'c' \"d\" é漢 #1?x=%20&y<z>")
@example("\udcff.jsonl")
def test_a_link_leads_to_the_file_whatever_its_name(name):
    if name in (".", ".."):
        return
    address = page._address(f"/data/{name}")
    assert address.isascii() and not set(address) & set("\"'<> #?")
    assert unquote_to_bytes(urlsplit(address).path) == fsencode(f"/data/{name}")


def test_links_of_relative_and_windows_paths_and_of_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert page._address("a/../b c.jsonl") == f"{tmp_path.resolve().as_uri()}/b%20c.jsonl"
    assert page._address("C:\\my data\\é.jsonl") == "file:///C:/my%20data/%C3%A9.jsonl"
    assert page._address("\ud800") == page._address("a/\x00/b") == ""


def test_a_name_stands_without_its_folder_where_it_is_the_only_one():
    places = page._Places()
    assert [
        places.of(source)
        for source in ("a/x.jsonl:3", "b/x.jsonl:4", "c/y.jsonl:5", "a/x.jsonl:9", "c/y.jsonl")
    ] == [(0, "3"), (1, "4"), (2, "5"), (0, "9"), (2, "")]
    assert [file["name"] for file in places.files()] == ["a/x.jsonl", "b/x.jsonl", "y.jsonl"]


# In a browser


def until(tab: Any, condition: str) -> None:
    """Playwright's own waiting needs eval, which the page forbids."""
    for _ in range(2400):
        if tab.evaluate(condition):
            return
        tab.wait_for_timeout(50)
    raise AssertionError(condition)


class Window:
    """Pages in one browser, and all that they asked for or complained about."""

    def __init__(self, browser: Any, folder: Path) -> None:
        self.browser, self.folder = browser, folder
        self.asked: list[str] = []
        self.told: list[str] = []

    def show(self, audit: Audit, name: str = "page.html") -> Any:
        page.write(audit, path := self.folder / name)
        tab = self.browser.new_page(viewport={"width": 1280, "height": 900})
        tab.set_default_timeout(120_000)
        tab.on("request", lambda request: self.asked.append(request.url))
        tab.on("console", lambda message: self.told.append(message.text))
        tab.on("pageerror", lambda error: self.told.append(str(error)))
        tab.on("dialog", lambda dialog: self.told.append(dialog.message))
        tab.goto(path.as_uri())
        return tab


@pytest.fixture
def window(browser, tmp_path) -> Iterator[Window]:
    """At the end nothing but the page was asked for, and nothing was wrong."""
    yield (here := Window(browser, tmp_path))
    assert {url.rpartition("/")[0] for url in here.asked} == {tmp_path.as_uri()} and here.told == []


@pytest.fixture(scope="module")
def tab(browser, tmp_path_factory) -> Iterator[Any]:
    """The page of `an_audit`, in a file with an odd name. Tests leave it as they find it."""
    here = Window(browser, folder := tmp_path_factory.mktemp('it\'s a "page" #1 é'))
    yield here.show(an_audit(file=str(folder / "rows of mine.jsonl")))
    assert here.asked == [(folder / "page.html").as_uri()] and here.told == []


def address_of(tab: Any, line: int) -> str:
    """Of a line of the rows that the page of ``tab`` is about."""
    return f"{tab.url.rpartition('/')[0]}/rows%20of%20mine.jsonl#L{line}"


def visible_findings(tab: Any) -> list[str]:
    return tab.eval_on_selector_all(
        ".finding",
        "all => all.filter(one => one.checkVisibility()).map(one => one.querySelector('.rule').textContent)",
    )


def test_the_page_shows_the_verdict_first_and_draws_every_chart(tab):
    assert tab.locator("body").inner_text().startswith(f"tunesmith audit\n\n✗ {an_audit().verdict}\n")
    drawn = charts_of(tab)
    assert drawn == CHARTS
    assert [tab.locator(f"#{name} .bar, #{name} .point").count() for name in drawn] == [3, 3, 3, 75, 120, 25]
    for part in ("prompt", "answer", "total"):
        assert tab.locator(f"#length-{part} text.mark").text_content() == "limit 120"
        assert tab.locator(f"#length-{part} line.mark").count() == 1
    cards = tab.locator(".cards h3").all_inner_texts()
    assert (
        cards[: len(registry.rules())] == [rule.name for rule in registry.rules()]
        and cards[-1] == "of its own"
    )
    assert (
        tab.locator("#instruction-types .lead").inner_text()
        == "Most frequent first. 65 rows of other types are not drawn."
    )
    clusters = [" ".join(row.split()) for row in tab.locator(".clusters tbody tr").all_inner_texts()]
    assert clusters == ["1 even a text 60 50.0%", "2 odd a text 59 50.0%", "3 last a text 1"]
    assert tab.locator("#map text.mark").all_text_contents() == ["1", "2", "3"]
    for link in tab.locator("nav a").all():
        assert tab.locator(link.get_attribute("href")).count() == 1
    titles = tab.locator(".zoom button").evaluate_all("all => all.map(one => one.title)")
    assert titles == ["Zoom in", "Zoom out", "Show all"]


def charts_of(tab: Any) -> list[str]:
    return tab.eval_on_selector_all(".plot[id], .bars[id]", "all => all.map(one => one.id)")


def test_what_there_is_nothing_of_is_left_out(window):
    tab = window.show(NOTHING)
    assert tab.locator(".plot, table, nav a >> nth=2").count() == 0
    assert tab.locator("h1").inner_text() == "✓ There are no rows."
    assert "Nothing was found." in tab.locator("main").inner_text()
    whole = an_audit()
    tab = window.show(Audit(whole.files, whole.rows, [], whole.quality, {"lengths": whole.charts["lengths"]}))
    assert charts_of(tab) == ["length-prompt", "length-answer", "length-total", "quality"]
    assert tab.locator("#quality-of-rows .findings tbody tr").first.inner_text().startswith("10.0")


def test_pointing_at_a_prompt_shows_its_row_and_a_click_keeps_it_with_its_link(tab):
    dot, tip = (
        tab.locator("#map .trace").nth(1).locator(".point").nth(3),
        tab.locator("#tip"),
    )  # the fourth of the odd rows
    dot.hover(force=True)
    tip.wait_for()
    assert tip.inner_text().split("\n\n") == ["rows of mine.jsonl:8", "false · odd a text", "a text 7"]
    box = dot.bounding_box()
    tab.mouse.click(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    link = tab.locator("#kept a")
    assert (
        link.evaluate("link => link.href") == address_of(tab, 8)
        and link.inner_text() == "rows of mine.jsonl:8"
    )
    tab.mouse.move(2, 2)
    tip.wait_for(state="hidden")
    tab.locator("#map").focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    assert (
        tip.inner_text().startswith("rows of mine.jsonl:9\n")
        and "a text 8" in tab.locator("#kept").inner_text()
    )
    tab.keyboard.press("Escape")
    assert tip.is_hidden()


def test_the_map_can_be_enlarged_and_moved_and_dots_keep_their_size(tab):
    dot = tab.locator("#map .trace").nth(1).locator(".point").nth(20)

    def view() -> list[float]:
        return [float(number) for number in tab.locator("#map").get_attribute("viewBox").split()]

    whole, size = view(), dot.bounding_box()["width"]
    tab.get_by_title("Zoom in").click()
    near = view()
    assert near[2] == pytest.approx(whole[2] / 1.6) and near[0] > 0
    assert dot.bounding_box()["width"] == pytest.approx(size, abs=0.2)
    area = tab.locator("#map").bounding_box()
    tab.mouse.move(area["x"] + 200, area["y"] + 200)
    tab.mouse.down()
    tab.mouse.move(area["x"] + 260, area["y"] + 200)
    tab.mouse.up()
    assert view()[0] == pytest.approx(near[0] - 60 * near[2] / area["width"], abs=0.5)
    tab.get_by_title("Show all").click()
    assert view() == whole


def test_colour_goes_by_cluster_or_by_label_and_the_marker_by_label_always(tab):
    def looks() -> list[tuple[int, str, str]]:
        """Cluster, form and colour of each point."""
        return [
            tuple(one)
            for one in tab.evaluate("""[...document.querySelectorAll('#map .trace')].flatMap(
            (trace, cluster) => [...trace.querySelectorAll('.point')].map(
                dot => [cluster, dot.getAttribute('d'), getComputedStyle(dot).fill]))""")
        ]

    before = looks()
    assert {(cluster, colour) for cluster, _, colour in before} == {
        (0, "rgb(51, 153, 255)"),
        (1, "rgb(217, 130, 43)"),
        (2, "rgb(119, 51, 255)"),
    }
    tab.get_by_role("radio", name="by label").check()
    after = looks()
    assert [one[:2] for one in after] == [one[:2] for one in before]
    assert (
        len({one[1:] for one in after})
        == len({form for _, form, _ in after})
        == len({colour for *_, colour in after})
        == 3
    )
    tab.get_by_role("radio", name="by cluster").check()
    assert looks() == before
    alone = tab.locator(".clusters button").nth(1)
    faint = "all => all.map(one => getComputedStyle(one).opacity)"
    alone.click()
    assert tab.eval_on_selector_all("#map .trace", faint) == ["0.08", "0.9", "0.08"]
    alone.click()
    assert tab.eval_on_selector_all("#map .trace", faint) == ["0.9"] * 3


def test_findings_are_filtered_by_severity_and_searched_with_their_rows(tab):
    every = visible_findings(tab)
    assert every[:3] == ["contamination.exact", "duplicates.exact", "diversity.trigrams"] and len(every) == 6
    warnings, errors = (tab.locator(f".choice[data-severity={name}]") for name in ("warning", "error"))
    warnings.click()
    assert visible_findings(tab) == [
        rule for rule in every if rule not in ("duplicates.exact", "diversity.trigrams")
    ]
    assert tab.locator("#shown").inner_text() == "4 of 6 shown"
    errors.press("Enter")
    assert visible_findings(tab) == every[3:]
    warnings.click()
    errors.click()
    search = tab.get_by_role("searchbox")
    for words, fits in {
        "TRIGRAMS": ["diversity.trigrams"],
        " note 199 ": ["duplicates.exact"],
        "nowhere": [],
        "": every,
    }.items():
        search.fill(words)
        assert visible_findings(tab) == fits
        assert tab.locator("#none").is_visible() == (not fits)
    search.fill("note 199")
    tab.locator(".open:visible").click()
    assert "1 of 200 rows fit the search." in tab.locator("#rows-1").inner_text()
    assert tab.locator("#rows-1 td a").all_inner_texts() == ["rows of mine.jsonl:200"]
    tab.locator(".cards a", has_text="trigrams").click()
    assert search.input_value() == "" and visible_findings(tab) == every
    assert tab.evaluate("document.activeElement.id") == "finding-2"
    tab.locator("#finding-1 .open").click()


def test_a_finding_opens_to_its_rows_with_links_and_says_how_many_more_there_are(tab):
    button, rows = tab.locator("#finding-1 .open"), tab.locator("#rows-1 tbody tr")
    assert button.inner_text() == "250 rows" and tab.locator("#rows-1").is_hidden()
    button.focus()
    tab.keyboard.press("Enter")
    assert button.get_attribute("aria-expanded") == "true" and rows.count() == 200
    assert rows.nth(4).inner_text() == "rows of mine.jsonl:5copy\tnote 4 a text"
    assert rows.nth(4).locator("a").evaluate("link => link.href") == address_of(tab, 5)
    assert (
        tab.locator("#rows-1 p").inner_text()
        == "50 more rows: see --json. Of 300 rows concerned 250 are named."
    )
    tab.context.grant_permissions(["clipboard-read", "clipboard-write"])
    rows.nth(4).locator("button").click()
    until(tab, "document.querySelectorAll('#rows-1 button')[4].textContent === 'copied'")
    copied = tab.evaluate("navigator.clipboard.readText()")
    assert copied == f"{next(iter(tab_files(tab)))}:5" and Path(copied).name == "rows of mine.jsonl:5"
    button.click()
    assert tab.locator("#rows-1").is_hidden()


def tab_files(tab: Any) -> list[str]:
    return tab.locator("#files td:first-child").all_inner_texts()


def test_hostile_texts_are_shown_as_text_and_run_nothing(window):
    tab = window.show(an_audit(HOSTILE, file="C:\\data\\x.jsonl"))
    for button in tab.locator(".open").all():
        button.click()
    tab.locator("#map .point").nth(4).hover(force=True)
    tab.locator("#tip").wait_for()
    for place in (
        ".what >> nth=0",
        ".hint >> nth=1",
        "#rows-1 tbody tr >> nth=7",
        "#tip",
        ".clusters tbody tr >> nth=0",
        "#quality-of-rows .findings tbody >> nth=0",
        "#prompts .lead",
        "#lengths .lead",
        ".cards >> nth=0",
    ):
        assert SHOWN[:30] in tab.locator(place).inner_text(), place
    assert any(SHOWN[:30] in rule for rule in tab.locator("td.rule").all_inner_texts())
    tip = tab.locator("#tip").inner_text()
    assert SHOWN in tip and "\\x00" in tip and "\\ud800" in tip and "\\u202e" in tip
    assert tab.locator("#types th bdi").first.text_content().startswith(SHOWN[:7])
    assert tab.locator("#rows-1 a").first.get_attribute("href") == "file:///C:/data/x.jsonl#L1"
    assert SHOWN[:30] in tab.locator("#types .bar title").first.text_content()
    assert tab.evaluate(
        "[window.hacked, document.querySelectorAll('img, iframe, [onerror], svg a').length]"
    ) == [None, 0]
    assert tab.evaluate("[...document.links].every(link => link.protocol === 'file:')")


def test_a_script_that_got_into_the_page_could_not_run_nor_ask_for_anything(window):
    tab = window.show(NOTHING)
    tab.evaluate("""() => new Promise(done => {
        setTimeout(done, 2000);
        document.addEventListener('securitypolicyviolation', event => {
            (window.refused ??= []).push(event.effectiveDirective);
            if (window.refused.length === 3) done();
        });
        document.querySelector('main').insertAdjacentHTML('beforeend',
            '<img src="file:///x.png"><b onclick="window.hacked=1">b</b><iframe srcdoc="x"></iframe>');
        const script = Object.assign(document.createElement('script'), { textContent: 'window.hacked=1' });
        document.querySelector('main').append(script);
        document.querySelector('main b').click();
    })""")
    assert tab.evaluate("window.hacked") is None
    assert {"img-src", "script-src-attr", "script-src-elem"} <= set(tab.evaluate("window.refused"))
    assert window.told and window.asked[1:] == ["file:///x.png"]
    del window.told[:], window.asked[1:]


def test_nothing_is_wider_than_the_screen_and_no_label_is_cut(window):
    tab = window.show(an_audit("a_rather_long_name_of_a_tool_without_any_space_in_it", rows=400))
    tab.set_viewport_size({"width": 400, "height": 900})
    assert tab.locator("#rows-1").is_hidden() and tab.locator(".choice:visible").count() == 4
    for button in tab.locator(".open").all():
        button.click()
    for width in (1280, 400):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") == width
        cut = tab.evaluate("""[...document.querySelectorAll('.plot')].flatMap(plot => {
            const box = plot.getBoundingClientRect();
            return [...plot.querySelectorAll('text')]
                .map(text => [text.textContent, text.getBoundingClientRect()])
                .filter(([words, own]) => words && own.width
                    && (own.left < box.left - 1 || own.right > box.right + 1
                    || own.top < box.top - 1 || own.bottom > box.bottom + 1))
                .map(([words]) => `${plot.id}: ${words}`);
        })""")
        assert cut == []


def test_words_stand_out_from_the_ground_in_light_and_dark_and_paper_is_white(tab):
    shown = "all => all.filter(one => one.checkVisibility()).length"
    for media, scheme in colours.SHOWN:
        colours.require(tab, media, scheme)
        assert tab.evaluate("getComputedStyle(document.querySelector('.plot text')).fill") == tab.evaluate(
            "getComputedStyle(document.querySelector('.lead')).color"
        )
        assert (
            tab.eval_on_selector_all("#lengths .bar, #types .bar, #map .point, #quality .bar", shown) == 229
        )
        assert (tab.eval_on_selector_all("nav, .copy, #search, .zoom", shown) == 0) == (media == "print")
    tab.emulate_media(media="screen", color_scheme="light")


# On a terminal


def printed(audit: Audit, width: int = 100, **options: Any) -> list[str]:
    stream = io.StringIO()
    screen.render(audit, Console(file=stream, width=width, **options))
    return stream.getvalue().splitlines()


def test_the_screen_has_the_verdict_every_dimension_what_to_do_and_the_worst_rows():
    lines = printed(an_audit(file="data/rows.jsonl"))
    text = "\n".join(lines)
    assert lines[0].startswith("✗ Do not train on this yet: 1 error and 2 warnings. First: 3 leak")
    first = {
        line[11:].split()[0]: line.split()[:2]
        for line in lines
        if line[:1] in "✗!i✓" and len(line) > 11 and line[11:].split()
    }
    for rule in registry.rules():
        assert any(line[11:].startswith(rule.name) for line in lines), rule.name
    assert first["contamination"] == ["✗", "error"] and first["diversity"] == ["!", "warning"]
    for words in (
        "trigrams 58.3%",
        "> 70%",
        "→ use `--fix OUT`",
        "median 55",
        "no finding",
        "duplicates.exact · 300 of 1,000 rows · 30.0% · rows.jsonl:1, :2, :3",
        "2 notes (1 accepted) and 1 bar met: see --html or --json",
    ):
        assert words in text, words
    assert [line.split(" · ")[0].split() for line in lines if "content.x" in line] == [
        ["10", "rows.jsonl:1"],
        ["11", "rows.jsonl:2"],
        ["12", "rows.jsonl:3"],
    ]
    bars = next(line for line in lines if line.startswith("quality")).split()[2]
    assert len(bars) == 10 and bars[0] == "·" and bars[-1] in "▇█"


@given(st.integers(0, 30), st.integers(0, 60))
@settings(deadline=None, max_examples=30)
def test_however_much_is_found_it_is_one_screen_and_the_rest_is_counted(n_errors, n_warnings):
    kinds = ["error"] * n_errors + ["warning"] * n_warnings
    found = [
        Finding(
            f"content.x{at}",
            kind,
            f"number {at} is wrong " + "so " * (at % 50),
            at,
            1000,
            hint="mend it " * (at % 20),
        )
        for at, kind in enumerate(kinds)
    ]
    base = an_audit()
    lines = printed(Audit(base.files, 1000, gravest_first(found), base.quality, base.charts))
    assert len(lines) <= 45
    shown = sum("content.x" in line and " of 1,000 rows" in line for line in lines)
    more = next((line for line in lines if line.startswith("… ")), "")
    assert shown + sum(int(word) for word in more.split() if word.isdecimal()) == len(found)
    assert shown >= min(3, len(found))


@given(st.text(st.characters(), max_size=200), st.integers(20, 160))
@settings(deadline=None, max_examples=50)
@example(HOSTILE, 100)
@example("漢字" * 5000, 41)
@example("w" * 100_000, 60)
def test_no_text_reaches_the_terminal_as_a_command_and_none_is_wider_than_it(text, width):
    from rich.cells import cell_len

    for line in printed(an_audit(text, file="C:\\" + text.replace("\n", "")), width):
        line.encode()
        assert not any(
            letter < " " or "\x7f" <= letter < "\xa0" or "\u202a" <= letter <= "\u202e" for letter in line
        )
        assert cell_len(line) <= width


def test_without_colour_there_is_nothing_but_text_and_with_it_the_same_text(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    plain = printed(an_audit())
    coloured = "\n".join(printed(an_audit(), force_terminal=True, color_system="standard"))
    assert "\x1b[31m✗ error" in coloured and "\x1b" not in "".join(plain)
    monkeypatch.setenv("NO_COLOR", "1")
    assert printed(an_audit(), force_terminal=True, color_system="standard") == plain


def test_an_audit_of_nothing_is_told_too():
    lines = printed(NOTHING)
    assert lines[:2] == ["✓ There are no rows.", "0 rows · 0 s"]
    assert (
        sum("no finding" in line for line in lines) == len(registry.rules())
        and len(lines) == len(registry.rules()) + 5
    )


@given(st.integers(0, 10_000), st.integers(1, 10_000))
@example(1, 10_000)
@example(9_999, 10_000)
def test_a_share_is_all_or_nothing_only_where_it_is(count, of):
    told = percent(min(count, of) / of)
    assert (
        (told == "0%") == (count == 0)
        and (told == "100%") == (count >= of)
        and told not in ("0.0%", "100.0%")
    )


def test_rows_without_fault_are_not_called_worst():
    fine = Audit({}, 3, [], {"a:1": 100.0, "a:2": 100.0}, {"worst": []})
    assert printed(fine)[-1] == "quality   0 ·········█ 100, median 100"
    assert "The worst rows" not in page.html(fine)
    bare = Audit({}, 3, [], {"a:1": 40.0, "a:2": 100.0})
    assert printed(bare)[-2].split() == ["40", "a:1"] and "The worst rows" in page.html(bare)


def test_every_score_is_in_one_bin():
    values = [random.Random(at).uniform(0, 100) for at in range(500)] + [0.0, 4.0, 100.0]
    for bins in (1, 10, 25):
        counts = screen.binned(values, bins)
        assert sum(counts) == len(values) and len(counts) == bins
    assert screen.binned([0.0, 3.999, 4.0, 100.0], 25)[0] == 2 and screen.binned([100.0], 25)[-1] == 1
