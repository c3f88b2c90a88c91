"""What is pushed arrives whole at the hub, over HTTP: here a small server that keeps what it is sent."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from runs import planted
from typer.testing import CliRunner

import tunesmith
from tunesmith.cli import app
from tunesmith.errors import ConfigError, DataError, EvaluationError, ExportError

WEIGHTS = bytes(range(256)) * 40


class Hub(BaseHTTPRequestHandler):
    """The part of the hub's API that a commit of small files needs. ``refuses``: status of every answer."""

    refuses = 0
    requests: list[tuple[str, str | None, Any]] = []  # noqa: RUF012
    files: dict[str, bytes] = {}  # noqa: RUF012

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        content = (
            [json.loads(line) for line in body.splitlines()] if "/commit/" in self.path else json.loads(body)
        )
        Hub.requests.append((self.path, self.headers.get("Authorization"), content))
        if Hub.refuses:
            self.answer({"error": "You may not write here"}, Hub.refuses)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/{content['organization']}/{content['name']}"})
        elif "/preupload/" in self.path:
            modes = [{"path": file["path"], "uploadMode": "regular"} for file in content["files"]]
            self.answer({"files": [{**mode, "shouldIgnore": False} for mode in modes]})
        elif self.path == "/api/validate-yaml":  # the metadata of the card
            self.answer({"errors": [], "warnings": []})
        else:
            for line in content:
                if line["key"] == "file":
                    Hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            address = f"http://{self.headers['Host']}/me/tool/commit/abc"
            self.answer({"commitUrl": address, "commitOid": "abc", "hookOutput": "", "success": True})

    def answer(self, content: object, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[str]:
    Hub.refuses = 0
    Hub.requests.clear()
    Hub.files.clear()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def run(tmp_path) -> Path:
    """A run with a model card and an accepted export."""
    path = planted.run(tmp_path / "run")
    (path / "model_card.md").write_text("---\nlicense: mit\n---\n# It\n")
    export(path, "peft", accepted=True)
    return path


def export(run: Path, kind: str, *, accepted: bool) -> Path:
    folder = planted.export(run, kind, accepted=accepted)
    (folder / "deep").mkdir()
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "deep" / "settings.json").write_text("{}")
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    (folder / ".draft").write_text("unfinished")
    (folder / "README.md").write_text("of the base")
    return folder


def verb(run: Path, hub: str, *words: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """``tunesmith push`` in a process of its own, for which ``hub`` is the hub."""
    settings = {"HF_ENDPOINT": hub, "HF_TOKEN": "hf_secret", "HF_HOME": str(run.parent / "hf")}
    settings |= {"HF_HUB_OFFLINE": "0", **environ}
    command = [sys.executable, "-m", "tunesmith", "push", str(run), "--to", "me/tool", *words]
    return subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=120)


def test_the_files_and_the_card_arrive_in_one_commit_of_a_private_repository(run, hub):
    done = verb(run, hub)
    assert done.returncode == 0, done.stderr
    assert f"{hub}/me/tool/commit/abc" in done.stdout
    assert Hub.files == {
        "README.md": (run / "model_card.md").read_bytes(),
        "adapter_model.safetensors": WEIGHTS,
        "adapter_config.json": b'{"base_model_name_or_path": "org/base"}',
        "deep/settings.json": b"{}",
    }
    (_, token, created), *_, (address, _, _) = Hub.requests
    assert created == {"name": "tool", "organization": "me", "visibility": "private"}
    assert token == "Bearer hf_secret" and address == "/api/models/me/tool/commit/main"
    assert [path for path, _, _ in Hub.requests if "/commit/" in path] == [address]
    assert "hf_secret" not in done.stdout + done.stderr


def test_a_repository_is_public_only_on_request(run, hub):
    assert verb(run, hub, "--public").returncode == 0
    assert Hub.requests[0][2]["visibility"] == "public"


@pytest.mark.parametrize(("words", "environ"), [(["--dry-run"], {}), ([], {"HF_HUB_OFFLINE": "1"})])
def test_a_dry_run_and_a_machine_that_is_offline_send_nothing_and_list_the_files(run, hub, words, environ):
    done = verb(run, hub, *words, "--json", **environ)
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    sizes = {file["path"]: file["bytes"] for file in content["files"]}
    assert sizes["adapter_model.safetensors"] == len(WEIGHTS) and len(sizes) == 4
    assert content["why_not"] in ("a dry run", "HF_HUB_OFFLINE is set") and content["url"] is None
    assert content["size_bytes"] == sum(sizes.values()) and Hub.requests == []
    assert "nothing was pushed" in verb(run, hub, *words, **environ).stdout


def test_without_a_token_nothing_is_sent(run, hub):
    done = verb(run, hub, HF_TOKEN="")
    assert done.returncode == 8 and "no token" in done.stderr and "hf auth login" in done.stderr
    assert Hub.requests == []


def test_a_hub_that_refuses_is_an_error_with_its_words(run, hub):
    Hub.refuses = 403
    done = verb(run, hub)
    assert done.returncode == 8 and "403" in done.stderr and "You may not write here" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_hub_that_is_not_there_is_an_error(run):
    done = verb(run, "http://127.0.0.1:9")
    assert done.returncode == 8 and "cannot be reached" in done.stderr and "Traceback" not in done.stderr


def test_what_may_not_be_pushed_is_refused(run):
    export(run, "mlx", accepted=False)
    export(run, "cluster", accepted=True)
    for kind, reason in {
        "mlx": "the export was rejected: inert",
        "cluster": "rows of the training data",
        "hf": "has no export hf that was accepted; there are: cluster, peft",
    }.items():
        with pytest.raises(ExportError, match=reason):
            tunesmith.push(run, to="me/tool", kind=kind, dry_run=True)
    with pytest.raises(ConfigError, match="is not a repository"):
        tunesmith.push(run, to="me/tool/much", dry_run=True)
    (run / "model_card.md").unlink()
    with pytest.raises(DataError, match="is missing") as caught:
        tunesmith.push(run, to="me/tool", dry_run=True)
    assert "tunesmith report" in str(caught.value)


@pytest.mark.parametrize(("spelled", "kind"), [("mlx:4", "mlx-4bit"), ("gguf", "gguf-q8_0"), ("mlx", "mlx")])
def test_a_kind_is_spelled_as_for_the_export(run, spelled, kind):
    export(run, kind, accepted=True)
    assert tunesmith.push(run, to="me/tool", kind=spelled, dry_run=True).kind == kind


def test_a_path_is_not_a_kind(run):
    with pytest.raises(ConfigError, match="is not a kind of export"):
        tunesmith.push(run, to="me/tool", kind="../exports/peft", dry_run=True)


def test_a_damaged_record_is_named(run):
    (run / "exports" / "peft" / "export.json").write_text('{"kind": "peft"}')
    with pytest.raises(EvaluationError, match="the key checkpoint is missing"):
        tunesmith.push(run, to="me/tool", dry_run=True)


def test_a_base_that_is_a_folder_of_this_machine_is_a_warning(run):
    (run / "exports" / "peft" / "adapter_config.json").write_text('{"base_model_name_or_path": "/home/me/m"}')
    result = CliRunner().invoke(
        app, ["push", str(run), "--to", "me/tool", "--dry-run"], catch_exceptions=False
    )
    assert result.exit_code == 0 and "names the base by a folder: /home/me/m" in result.output
