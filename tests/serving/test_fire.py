"""Under fire nothing is lost, nothing is mixed up, and nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import pytest
from serving import fire
from serving.conftest import Server
from serving.test_worker import wait_until

from tunesmith.serving.limits import ServerLimits


@pytest.mark.parametrize(
    ("n_requests", "n_at_once", "n_kills"),
    [pytest.param(400, 60, 1, id="short"), pytest.param(10_000, 500, 3, id="whole", marks=pytest.mark.sweep)],
)
def test_no_request_is_lost_or_gets_another_s_answer(settings, n_requests, n_at_once, n_kills):
    before = fire.open_things()
    server = Server(
        replace(settings, batch_size=16, limits=ServerLimits(queue=n_at_once * 3 // 4, first_token_s=600.0))
    ).start()
    try:
        outcome = asyncio.run(fire.storm(server, n_requests, n_at_once, n_kills))
        print(dict(sorted(outcome.counts.items())), [size >> 20 for size in outcome.resident])
        print(outcome.n_refused, "times refused with 429 or 503")
        assert outcome.wrong == []
        assert outcome.counts.total() == n_requests
        died = sum(count for name, count in outcome.counts.items() if "engine_died" in name)
        assert died <= 16 * n_kills, "those that were under way, and no others"
        worker = server.service.worker
        assert worker.restarts == ({"died": n_kills} if n_kills else {})
        wait_until(lambda: worker.n_rows == worker.n_waiting == 0)
        if n_requests >= 10_000:
            assert max(outcome.resident[2:]) <= 1.1 * outcome.resident[1], "memory must stay flat"
    finally:
        server.stop()
    end = time.monotonic() + 5
    while fire.open_things() != before and time.monotonic() < end:
        time.sleep(0.1)
    threads, files = fire.open_things()
    assert threads <= before[0] and files <= before[1]
