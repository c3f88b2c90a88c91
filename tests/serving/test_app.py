"""The HTTP side: what every request meets, whatever it asks."""

from __future__ import annotations


def test_an_unknown_path_is_refused_in_openai_s_shape(server):
    with server.client() as client:
        answer = client.get("/v1/nothing")
    assert answer.status_code == 404
    assert answer.json()["error"].keys() == {"message", "type", "param", "code"}
