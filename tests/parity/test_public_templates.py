"""Every public chat template: rows are exactly what transformers renders, or refused because the template
cannot write them, as docs/templates.md says. Fetching them checks their hashes."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from parity import public_templates, template_table, templates
from tokens import test_prefixes
from tokens.test_prefixes import both_ways

NAMES: dict[str, str] = json.loads(public_templates.LISTED.read_text(encoding="utf-8"))
FOLDER = "PUBLIC_TEMPLATES"


@pytest.fixture(scope="session")
def public_folder(tmp_path_factory) -> Path | None:
    """The folder of the public templates, fetched if the environment names none; None if it cannot be."""
    if FOLDER in os.environ:
        return Path(os.environ[FOLDER])
    folder = tmp_path_factory.mktemp("templates")
    try:
        public_templates.fetch(folder)
    except (OSError, public_templates.Unavailable):
        return None
    return folder


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_rows_are_those_of_transformers_or_the_template_cannot_write_them(name, public_folder):
    if public_folder is None or not (public_folder / name).is_file():
        pytest.skip(f"public template is absent: {name}")
    source = (public_folder / name).read_text(encoding="utf-8")
    assert hashlib.sha256(source.encode()).hexdigest() == NAMES[name]
    results, switch = templates.measured(name, source)
    assert not [cell for cell in results.values() if cell.startswith("WRONG")]
    assert not [kind for kind in template_table.BAR if results[kind].startswith("refused")]
    row = template_table.page_rows()[Path(name).stem.replace("--", " ")]
    assert row == [*results.values(), switch or ""]


@pytest.mark.parity
@pytest.mark.parametrize("name", NAMES)
def test_rows_from_one_run_are_those_of_prompts_rendered_one_by_one(name, public_folder, monkeypatch):
    if public_folder is None or not (public_folder / name).is_file():
        pytest.skip(f"public template is absent: {name}")
    source = (public_folder / name).read_text(encoding="utf-8")
    for kind in ("system", "reasoning", "calls"):
        first, second = both_ways(
            lambda: templates.Template(name, source).renderer, test_prefixes.KINDS[kind], monkeypatch
        )
        assert first == second


def test_the_page_has_a_row_of_each_public_template():
    rows = template_table.page_rows()
    assert set(rows) == {Path(name).stem.replace("--", " ") for name in NAMES}
    assert not [name for name, row in rows.items() for cell in row if cell.startswith("WRONG")]


@pytest.fixture
def published(tmp_path, monkeypatch) -> dict[str, str]:
    """The hashes of three templates that are published in two packages and a file."""
    packages, files = tmp_path / "packages", tmp_path / "files"
    packages.mkdir()
    files.mkdir()
    with zipfile.ZipFile(packages / "trl-1.16.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("trl/chat_templates/one.jinja", "first")
        metadata = "Metadata-Version: 2.1\nName: trl\nVersion: 1.16.0\n"
        wheel.writestr("trl-1.16.0.dist-info/METADATA", metadata)
        wheel.writestr("trl-1.16.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\n")
        wheel.writestr("trl-1.16.0.dist-info/RECORD", "")
    root = "llama_cpp_python-0.3.36"
    with tarfile.open(packages / f"{root}.tar.gz", "w:gz") as archive:
        for name, text in (
            ("vendor/llama.cpp/models/templates/two.jinja", "second"),
            ("PKG-INFO", "Metadata-Version: 2.1\nName: llama_cpp_python\nVersion: 0.3.36\n"),
            ("pyproject.toml", '[build-system]\nrequires = []\nbuild-backend = "b"\nbackend-path = ["."]\n'),
            ("b.py", BACKEND),
        ):
            member = tarfile.TarInfo(f"{root}/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    (files / "three.jinja").write_text("third")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(packages))
    monkeypatch.setattr(public_templates, "AXOLOTL", files.as_uri() + "/")
    texts = {"trl--one.jinja": "first", "llama.cpp--two.jinja": "second", "axolotl--three.jinja": "third"}
    return {name: hashlib.sha256(text.encode()).hexdigest() for name, text in texts.items()}


BACKEND = """
import pathlib

def prepare_metadata_for_build_wheel(folder, config_settings=None):
    info = pathlib.Path(folder, "llama_cpp_python-0.3.36.dist-info")
    info.mkdir()
    metadata = "Metadata-Version: 2.1\\nName: llama_cpp_python\\nVersion: 0.3.36\\n"
    info.joinpath("METADATA").write_text(metadata)
    return info.name
"""


def test_fetching_writes_the_listed_templates(tmp_path, published, monkeypatch):
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps(published))
    monkeypatch.setattr(public_templates, "LISTED", listed)
    public_templates.fetch(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.jinja")) == sorted(published)
    assert (tmp_path / "out" / "llama.cpp--two.jinja").read_text() == "second"


def test_a_template_that_changed_is_named_and_nothing_is_written(tmp_path, published, monkeypatch):
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps(published | {"axolotl--three.jinja": "0" * 64}))
    monkeypatch.setattr(public_templates, "LISTED", listed)
    with pytest.raises(public_templates.Unavailable, match=r"axolotl--three\.jinja$"):
        public_templates.fetch(tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jinja"))


class Site(BaseHTTPRequestHandler):
    """``/here/`` has the template, ``/moved/`` refers to it; ``/part/`` announces it, and sends a part."""

    def do_GET(self) -> None:
        folder, name = self.path.rsplit("/", 1)
        if folder == "/moved":
            self.send_response(302)
            self.send_header("Location", f"/here/{name}")
            self.end_headers()
        elif folder in ("/here", "/part"):
            self.send_response(200)
            self.send_header("Content-Length", str(len(b"third")))
            self.end_headers()
            self.wfile.write(b"third" if folder == "/here" else b"thi")
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: object) -> None:
        """Writes nothing to the output of the tests."""


@pytest.fixture
def site() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Site)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def fetched_from(site, tmp_path, published, monkeypatch):
    """``fetched_from(folder)``: what is written if the file of axolotl is asked for in this folder."""
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps(published))
    monkeypatch.setattr(public_templates, "LISTED", listed)

    def fetch(folder: str) -> list[str]:
        monkeypatch.setattr(public_templates, "AXOLOTL", f"{site}/{folder}/")
        try:
            public_templates.fetch(tmp_path / "out")
        finally:
            written = sorted(path.name for path in (tmp_path / "out").glob("*.jinja"))
        return written

    return fetch


@pytest.mark.parametrize("folder", ["here", "moved"])
def test_a_file_is_fetched_from_where_it_is_or_where_it_moved_to(fetched_from, published, folder):
    assert fetched_from(folder) == sorted(published)


@pytest.mark.parametrize(
    ("folder", "reason"), [("gone", "HTTP Error 404"), ("part", "IncompleteRead.3 bytes read, 2 more")]
)
def test_a_file_that_does_not_arrive_is_named_with_the_reason(fetched_from, tmp_path, folder, reason):
    with pytest.raises(public_templates.Unavailable, match=rf"/{folder}/three\.jinja: {reason}"):
        fetched_from(folder)
    assert not list((tmp_path / "out").glob("*.jinja"))


def test_a_file_with_another_hash_is_named(fetched_from, tmp_path, published):
    listed = tmp_path / "listed.json"
    listed.write_text(json.dumps(published | {"axolotl--three.jinja": "0" * 64}))
    with pytest.raises(public_templates.Unavailable, match=r"not as listed: axolotl--three\.jinja$"):
        fetched_from("here")
    assert not list((tmp_path / "out").glob("*.jinja"))
