"""Public chat templates by name and hash: where each comes from, and how to fetch it.

    python tests/parity/public_templates.py FOLDER

writes the templates into FOLDER: from the packages of TRL and llama-cpp-python on PyPI, and from axolotl on
GitHub. ``public_templates.json`` has the name and the SHA-256 of each; a file with another hash is refused.
The files themselves belong to their authors and are not kept here."""

from __future__ import annotations

import hashlib
import http.client
import io
import json
import subprocess
import sys
import tarfile
import urllib.request
import zipfile
from pathlib import Path

LISTED = Path(__file__).with_name("public_templates.json")
TRL, LLAMA = "trl==1.16.0", "llama-cpp-python==0.3.36"
AXOLOTL = (
    "https://raw.githubusercontent.com/axolotl-ai-cloud/axolotl/067b021c8b87a9e5e380b9173c704cf7340e30f5/"
    "src/axolotl/utils/chat_templates/templates/"
)


class Unavailable(Exception):
    """A template that cannot be fetched, or is not the listed one."""


def fetch(folder: Path) -> None:
    """Writes the listed templates into ``folder``. Raises Unavailable, and then writes none of them."""
    folder.mkdir(parents=True, exist_ok=True)
    listed: dict[str, str] = json.loads(LISTED.read_text(encoding="utf-8"))
    contents = packaged(folder)
    for name in (name for name in listed if name.startswith("axolotl--")):
        contents[name] = downloaded(AXOLOTL + name.removeprefix("axolotl--"))
    wrong = [
        name
        for name, digest in listed.items()
        if hashlib.sha256(contents.get(name, b"")).hexdigest() != digest
    ]
    if wrong:
        raise Unavailable(f"not as listed: {', '.join(wrong)}")
    for name in listed:
        (folder / name).write_bytes(contents[name])


def downloaded(address: str) -> bytes:
    """The whole file at ``address``. Raises Unavailable."""
    try:
        with urllib.request.urlopen(address, timeout=60) as answer:
            return answer.read()
    except (OSError, http.client.HTTPException) as error:  # IncompleteRead is not an OSError
        raise Unavailable(f"{address}: {error}") from error


def packaged(folder: Path) -> dict[str, bytes]:
    """The templates in the packages, by name. Raises Unavailable."""
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "-d", str(folder / "packages")]
    for package in ([TRL], ["--no-binary", ":all:", LLAMA]):
        if subprocess.run([*pip, *package], stdout=sys.stderr).returncode:
            raise Unavailable(f"pip cannot download {package[-1]}")
    contents: dict[str, bytes] = {}
    for wheel in (folder / "packages").glob("trl-*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            for path in archive.namelist():
                if path.startswith("trl/chat_templates/") and path.endswith(".jinja"):
                    contents[f"trl--{Path(path).name}"] = archive.read(path)
    for source in (folder / "packages").glob("llama_cpp_python-*.tar.gz"):
        with tarfile.open(fileobj=io.BytesIO(source.read_bytes())) as archive:
            for member in archive.getmembers():
                if "/models/templates/" in member.name and member.name.endswith(".jinja"):
                    file = archive.extractfile(member)
                    contents[f"llama.cpp--{Path(member.name).name}"] = file.read() if file else b""
    return contents


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit("usage: python tests/parity/public_templates.py FOLDER")
    try:
        fetch(Path(sys.argv[1]))
    except Unavailable as error:
        raise SystemExit(str(error)) from None
