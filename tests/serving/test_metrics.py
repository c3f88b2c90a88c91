"""What Prometheus reads, and the board that shows it."""

from __future__ import annotations

import json
import re

from prometheus_client.parser import text_string_to_metric_families


def samples(server) -> dict[str, list]:
    with server.client() as client:
        text = client.get("/metrics").text
    return {family.name: family.samples for family in text_string_to_metric_families(text)}


def test_the_board_shows_every_measure_and_no_other(server):
    families = samples(server)
    suffixes = {"counter": ["_total"], "histogram": ["_bucket"], "gauge": [""]}
    with server.client() as client:
        board = client.get("/metrics/grafana.json").json()
        text = client.get("/metrics").text
    kinds = {family.name: family.type for family in text_string_to_metric_families(text)}
    measured = {name + suffix for name in families for suffix in suffixes[kinds[name]]}
    shown = set(re.findall(r"tunesmith_\w+", json.dumps(board["panels"])))
    assert shown == measured and len(shown) >= 20
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"]) >= 10


def test_tokens_and_times_are_counted_by_model(start_server, settings):
    server = start_server(settings)
    body = {
        "model": "writer",
        "messages": [{"role": "user", "content": "the cat sat on a mat"}],
        "max_tokens": 6,
    }
    with server.client() as client:
        used = [client.post("/v1/chat/completions", json=body).json()["usage"] for _ in range(2)]
    counted = {
        (sample.name, sample.labels.get("hit")): sample.value
        for family in samples(server).values()
        for sample in family
        if sample.labels.get("model") == "writer" and "le" not in sample.labels
    }
    assert counted["tunesmith_prompt_tokens_total", None] == sum(usage["prompt_tokens"] for usage in used)
    assert counted["tunesmith_answer_tokens_total", None] == sum(usage["completion_tokens"] for usage in used)
    cached = used[1]["prompt_tokens_details"]["cached_tokens"]
    assert cached > 0 and counted["tunesmith_cached_tokens_total", None] == cached
    assert counted["tunesmith_prefix_lookups_total", "true"] == 1
    assert counted["tunesmith_first_token_seconds_count", None] == 2
    tokens = counted["tunesmith_answer_tokens_total", None]
    assert counted["tunesmith_next_token_seconds_count", None] == tokens - 2
    assert counted["tunesmith_request_seconds_count", None] == 2
    [requests] = [
        sample
        for sample in samples(server)["tunesmith_requests"]
        if sample.name.endswith("_total") and sample.labels["model"] == "writer"
    ]
    assert requests.labels["endpoint"] == "/v1/chat/completions" and requests.value == 2


def test_clients_cannot_make_up_labels(server):
    with server.client() as client:
        client.post("/v1/chat/completions", json={"model": "made-up-by-me", "messages": []})
        client.get("/made/up/by/me")
        assert "made" not in client.get("/metrics").text
