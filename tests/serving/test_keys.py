"""The file of keys: what it may say, and that nothing of a key is ever shown. And the page on limits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tunesmith.errors import ConfigError
from tunesmith.serving import keys
from tunesmith.serving.keys import Doorkeeper, Key, digest_of
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.rejections import Rejection

SECRET = "a-secret-of-thirty-letters-xyz"


def test_a_key_may_be_given_by_its_hash(tmp_path):
    file = tmp_path / "keys.json"
    file.write_text(json.dumps([{"name": "a", "key": SECRET}]))
    [by_key] = keys.read(file)
    file.write_text(json.dumps([{"name": "a", "sha256": digest_of(SECRET).upper()}]))
    assert keys.read(file) == (by_key,) and by_key.digest == digest_of(SECRET)


@pytest.mark.parametrize(
    "entries",
    [
        [],
        {},
        [{"name": "a"}],
        [{"name": "a", "key": "short"}],
        [{"name": "a", "key": SECRET, "sha256": "0" * 64}],
        [{"name": "a", "key": SECRET, "models": "writer"}],
        [{"name": "a", "key": SECRET, "per_minute": 0}],
        [{"name": "a", "key": SECRET, "limit": 3}],
        [{"name": "a", "key": SECRET}, {"name": "a", "key": SECRET + "2"}],
        [{"name": "a", "key": SECRET}, {"name": "b", "key": SECRET}],
        [{"name": "a", "sha256": "xyz"}],
        [{"name": "a", "key": f"{SECRET} ü"}],
        [{"name": "a", "key": f"{SECRET}\n"}],
    ],
)
def test_a_wrong_file_is_refused_and_no_key_is_quoted(tmp_path, entries):
    file = tmp_path / "keys.json"
    file.write_text(json.dumps(entries))
    with pytest.raises(ConfigError) as refused:
        keys.read(file)
    assert SECRET not in str(refused.value) and str(file) in str(refused.value)


def test_a_minute_s_requests_are_counted_and_forgotten(monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(keys.time, "monotonic", lambda: clock[0])
    key = Key("a", digest_of(SECRET), per_minute=2)
    doorkeeper = Doorkeeper([key])
    doorkeeper.count(key)
    clock[0] += 30
    doorkeeper.count(key)
    with pytest.raises(Rejection) as refused:
        doorkeeper.count(key)
    assert refused.value.headers["Retry-After"] == "30"
    clock[0] += 30
    doorkeeper.count(key)


def test_every_key_is_compared_whatever_the_first_says(monkeypatch):
    compared = []
    compare = keys.hmac.compare_digest

    def watched(one, other):
        compared.append((one, other))
        return compare(one, other)

    monkeypatch.setattr(keys.hmac, "compare_digest", watched)
    doorkeeper = Doorkeeper([Key(name, digest_of(SECRET + name)) for name in "abc"])
    assert doorkeeper.require({"authorization": f"bearer {SECRET}a"}).name == "a"
    assert len(compared) == 3


def limits_table() -> str:
    lines = ["| limit | default | meaning |", "|---|---|---|"]
    for name, limit in ServerLimits.model_fields.items():
        lines.append(f"| `{name}` | {limit.default:g} | {limit.description} |")
    return "\n".join(lines)


def test_the_page_shows_every_limit():
    page = Path(__file__).parents[2] / "docs" / "serving.md"
    assert limits_table() in page.read_text("utf-8")
