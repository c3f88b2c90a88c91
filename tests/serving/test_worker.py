"""The thread that owns the engine: what it answers, and what keeps it going."""

from __future__ import annotations

import asyncio
import ctypes
import time
from dataclasses import replace

import pytest

from tunesmith.adapters import attached
from tunesmith.engine import generation
from tunesmith.engine.engine import Engine
from tunesmith.engine.requests import Request
from tunesmith.errors import ServeError
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.rejections import EngineDied, Overloaded, TimedOut, TooLarge

PROMPTS = [[5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16], [20, 21, 22]]
NAMES = ["base", "writer", "caller"]


async def answer(service, name, ids, **options) -> list[int]:
    served = service.served(name)
    request = Request(ids, served.renderer.eos_ids, **options)
    return [token.token async for token in service.ask(served, request) if token.finish != "stop"]


async def answers(service, **options) -> list[list[int]]:
    """Of every name to every prompt, all at once."""
    return await asyncio.gather(*(answer(service, name, ids, **options) for name in NAMES for ids in PROMPTS))


@pytest.fixture(scope="module")
def alone(tiny_model, served_runs) -> list[list[int]]:
    """The greedy answers of each model without a server, in the order of `answers`."""
    net = loading.load(ModelSpec(path=str(tiny_model))).net

    def generated() -> list[list[int]]:
        return [made.ids for made in generation.generate(net, PROMPTS, max_tokens=12, eos_ids=(2,))]

    made = generated()
    for name in NAMES[1:]:
        with attached(net, checkpoints.choose(Run.open(served_runs[name]))):
            made += generated()
    return made


def engine_of(server):
    return server.service.worker._engine


def wait_until(condition, seconds: float = 40.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.02)


def test_a_mixed_batch_gives_the_tokens_of_each_model_alone(server, alone):
    made = server.call(answers(server.service, max_tokens=12))
    assert made == alone
    assert len({tuple(ids) for ids in made}) > len(PROMPTS), "the adapters must differ from the base"


def test_a_cancelled_request_frees_its_row(server):
    """mlx-openai-server 321: the client is gone, and the worker runs on."""

    async def begin_and_cancel():
        served = server.service.served("base")
        answering = server.service.ask(served, Request([5, 6], max_tokens=4000))
        first = await anext(answering)
        assert server.service.worker.n_rows == 1
        answering.cancel()
        return first

    server.call(begin_and_cancel())
    wait_until(lambda: server.service.worker.n_rows == 0)


def test_a_request_that_nobody_holds_any_more_frees_its_row(server):
    async def begin_and_forget():
        await anext(server.service.ask(server.service.served("base"), Request([5, 6], max_tokens=4000)))

    server.call(begin_and_forget())
    wait_until(lambda: server.service.worker.n_rows == 0)


def test_a_task_that_is_cancelled_frees_its_row(server):
    async def begin():
        task = asyncio.create_task(answer(server.service, "writer", [5, 6], max_tokens=4000))
        await asyncio.sleep(0.1)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    server.call(begin())
    wait_until(lambda: server.service.worker.n_rows == 0)


def test_a_full_queue_refuses_and_says_when_to_come_back(start_server, settings):
    server = start_server(replace(settings, batch_size=1, limits=ServerLimits(queue=2)))

    async def fill():
        service = server.service
        base, request = service.served("base"), Request([5, 6], max_tokens=3000)
        taken = [service.ask(base, request)]
        await anext(taken[0])
        taken += [service.ask(base, request) for _ in range(2)]
        with pytest.raises(Overloaded) as refused:
            service.ask(base, request)
        assert refused.value.retry_after >= 1
        for answering in taken:
            answering.cancel()

    server.call(fill())
    wait_until(lambda: server.service.worker.n_rows == server.service.worker.n_waiting == 0)


@pytest.mark.parametrize(
    ("limits", "what"), [({"first_token_s": 0.2}, "first token"), ({"total_s": 0.2}, "the answer")]
)
def test_time_is_limited(start_server, settings, limits, what, monkeypatch):
    server = start_server(replace(settings, limits=ServerLimits(**limits)))
    step, delay = engine_of(server).advance, 0.05 if "total_s" in limits else 0.5
    monkeypatch.setattr(engine_of(server), "advance", lambda: (time.sleep(delay), step())[1])
    with pytest.raises(TimedOut, match=what):
        server.call(answer(server.service, "base", [5, 6], max_tokens=4000))
    wait_until(lambda: server.service.worker.n_rows == 0)


def raising(error: BaseException):
    def step(*_arguments):
        raise error

    return step


def test_a_dead_engine_ends_its_answers_and_starts_anew(start_server, settings, alone, monkeypatch):
    """mlx-lm 1909, 1672: the generation thread is dead, and HTTP goes on as if nothing were."""
    server = start_server(settings)
    worker = server.service.worker
    for died in (1, 2, 3):
        monkeypatch.setattr(engine_of(server), "advance", raising(RuntimeError("a kernel failed")))
        with pytest.raises(EngineDied, match="ask again"):
            server.call(answer(server.service, "base", [5, 6]))
        wait_until(lambda: worker.healthy)
        assert worker.restarts["died"] == died
        assert server.call(answers(server.service, max_tokens=12)) == alone
    assert any("a kernel failed" in str(notice) for notice in server.notices)


def test_health_says_that_the_engine_is_gone(start_server, settings, monkeypatch):
    server = start_server(settings)
    worker = server.service.worker
    monkeypatch.setattr(worker, "_begin_life", lambda: None)
    monkeypatch.setattr(engine_of(server), "advance", raising(RuntimeError("gone")))
    with pytest.raises(EngineDied):
        server.call(answer(server.service, "base", [5, 6]))
    with server.client() as client:
        assert client.get("/health").status_code == 503
        assert "tunesmith_up 0.0" in client.get("/metrics").text
    with pytest.raises(EngineDied):
        server.call(answer(server.service, "base", [5, 6]))
    monkeypatch.undo()
    server.loop.call_soon_threadsafe(worker._begin_life)
    wait_until(lambda: worker.healthy)


def test_a_hanging_engine_is_replaced_and_never_touches_the_model_again(
    start_server, settings, alone, monkeypatch
):
    server = start_server(replace(settings, limits=ServerLimits(hang_s=2.0)))
    worker, old = server.service.worker, engine_of(server)
    touched = []

    def hang():
        time.sleep(4.0)
        touched.append("after it was given up")
        return []

    monkeypatch.setattr(old, "advance", hang)
    thread = worker._life.thread
    with pytest.raises(EngineDied, match="hung"):
        server.call(answer(server.service, "base", [5, 6]))
    wait_until(lambda: worker.healthy)
    assert worker.restarts["hung"] == 1 and engine_of(server) is not old
    assert server.call(answers(server.service, max_tokens=12)) == alone
    wait_until(lambda: not thread.is_alive())
    assert not touched


def test_a_killed_thread_is_noticed(start_server, settings, alone):
    server = start_server(settings)
    worker = server.service.worker
    killed = worker._life.thread
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(killed.ident), ctypes.py_object(SystemExit))
    wait_until(lambda: worker.restarts["died"] == 1 and worker.healthy)
    assert not killed.is_alive()
    assert server.call(answers(server.service, max_tokens=12)) == alone


def test_out_of_memory_shrinks_the_batch_and_no_answer_changes(start_server, settings, alone, monkeypatch):
    """mlx-lm 854: it aborts the process."""
    server = start_server(settings)
    worker, step = server.service.worker, Engine.advance
    rows, calls = 3, [0]

    def limited(engine):
        calls[0] += 1
        if calls[0] > 4 and worker.n_rows > rows:
            raise RuntimeError("[malloc] Unable to allocate 123 bytes.")
        return step(engine)

    monkeypatch.setattr(Engine, "advance", limited)
    assert server.call(answers(server.service, max_tokens=12)) == alone
    assert worker.batch_size <= rows and worker.out_of_memory >= 1
    assert worker.restarts.total() == 0


def test_a_request_that_runs_out_of_memory_alone_ends_with_an_error(start_server, settings, monkeypatch):
    server = start_server(settings)
    step = Engine.advance
    monkeypatch.setattr(Engine, "advance", raising(RuntimeError("Unable to allocate")))
    with pytest.raises(EngineDied, match="memory ran out"):
        server.call(answer(server.service, "base", [5, 6]))
    monkeypatch.setattr(Engine, "advance", step)
    assert server.call(answer(server.service, "base", [5, 6], max_tokens=3))
    assert server.service.worker.batch_size == settings.batch_size, "it says nothing about others"


def test_what_is_being_loaded_is_reserved(server):
    """mlx-serve 40: a load in flight was not counted, and two loads together did not fit."""
    worker = server.service.worker
    free = worker.memory - worker.weights - worker.reserved

    async def load():
        with worker.reserve(free * 2 // 3):
            with pytest.raises(TooLarge), worker.reserve(free * 2 // 3):
                pass
        with worker.reserve(free * 2 // 3):
            pass

    server.call(load())


def test_a_request_that_would_never_fit_is_refused_at_once(server, monkeypatch):
    worker, service = server.service.worker, server.service
    cost = worker._engine.cost(Request([5, 6], max_tokens=4000))
    monkeypatch.setattr(worker, "memory", worker.weights + worker.reserved + cost - 1)
    with pytest.raises(TooLarge, match="MB"):
        server.call(answer(service, "base", [5, 6], max_tokens=4000))
    assert server.call(answer(service, "base", [5, 6], max_tokens=4))


def test_requests_that_do_not_fit_together_take_turns(start_server, settings, alone, monkeypatch):
    server = start_server(settings)
    worker = server.service.worker
    cost = worker._engine.cost(Request(PROMPTS[2], max_tokens=12))
    monkeypatch.setattr(worker, "memory", worker.weights + worker.reserved + 2 * cost)
    most, step = [0], Engine.advance

    def watched(engine):
        most[0] = max(most[0], worker.n_rows)
        return step(engine)

    monkeypatch.setattr(Engine, "advance", watched)
    assert server.call(answers(server.service, max_tokens=12)) == alone
    assert most[0] == 2


def test_a_request_at_which_the_engine_dies_is_not_lost(start_server, settings, monkeypatch):
    """It has left the queue, and is not under way yet."""
    server = start_server(settings)
    submit = Engine.submit
    monkeypatch.setattr(Engine, "submit", raising(RuntimeError("a kernel failed")))
    with pytest.raises(EngineDied):
        server.call(answer(server.service, "base", [5, 6]))
    monkeypatch.setattr(Engine, "submit", submit)
    wait_until(lambda: server.service.worker.healthy)
    assert server.call(answer(server.service, "base", [5, 6], max_tokens=3))


def test_an_answer_that_differs_when_it_is_computed_again_ends_with_an_error(
    start_server, settings, monkeypatch
):
    server = start_server(settings)
    advance, calls = Engine.advance, [0]

    def forgetful(engine):
        """Runs out of memory once, and gives other tokens afterwards."""
        calls[0] += 1
        if calls[0] == 6:
            raise RuntimeError("Unable to allocate")
        tokens = advance(engine)
        return tokens if calls[0] < 6 else [token._replace(token=token.token + 1) for token in tokens]

    monkeypatch.setattr(Engine, "advance", forgetful)

    async def two():
        asked = (answer(server.service, "base", ids, max_tokens=40) for ids in PROMPTS[:2])
        return await asyncio.gather(*asked, return_exceptions=True)

    made = server.call(two())
    assert all(isinstance(error, EngineDied) and "differs" in str(error) for error in made), made
    wait_until(lambda: server.service.worker.n_rows == 0)


def test_a_job_whose_caller_has_gone_does_not_keep_the_server_busy(server):
    worker, ran = server.service.worker, []

    async def leave() -> None:
        slow, left = worker.run(lambda: time.sleep(0.3)), worker.run(lambda: ran.append("it ran"))
        left.cancel()
        await slow

    server.call(leave())
    wait_until(lambda: not worker.busy, seconds=5)
    assert not ran


def test_a_job_waits_until_its_memory_is_free_and_later_requests_wait_behind_it(server, monkeypatch):
    worker, service = server.service.worker, server.service
    cost = worker._engine.cost(Request([5, 6], max_tokens=300))
    monkeypatch.setattr(worker, "memory", worker.weights + worker.reserved + 2 * cost)
    rows_then = []

    async def ask():
        before = asyncio.create_task(answer(service, "base", [5, 6], max_tokens=300))
        while not worker.n_rows:
            await asyncio.sleep(0.001)
        small = await worker.run(lambda: worker.n_rows, cost)
        job = worker.run(lambda: rows_then.append(worker.n_rows), 2 * cost)
        waiting = worker.n_waiting
        after = asyncio.create_task(answer(service, "base", [5, 6], max_tokens=4))
        await job
        assert before.done() or worker.n_rows == 0
        return small, waiting, await before, await after

    small, waiting, before, after = server.call(ask())
    assert small == 1, "a job that fits does not wait"
    assert (waiting, rows_then) == (1, [0]) and after == before[:4]


def test_a_job_that_hangs_or_fails_is_told_and_the_engine_goes_on(start_server, settings, alone):
    server = start_server(replace(settings, limits=ServerLimits(load_s=3.0)))
    worker = server.service.worker

    async def run(function):
        return await worker.run(function)

    assert server.call(run(lambda: 7)) == 7
    with pytest.raises(ZeroDivisionError):
        server.call(run(lambda: 1 // 0))
    assert worker.restarts.total() == 0
    with pytest.raises(EngineDied, match="hung"):
        server.call(run(lambda: time.sleep(6)))
    wait_until(lambda: worker.restarts["hung"] == 1 and worker.healthy)
    assert server.call(answers(server.service, max_tokens=12)) == alone


def test_a_later_server_starts_from_the_prefixes_that_one_kept_in_a_folder(start_server, settings, tmp_path):
    settings = replace(settings, prefix_folder=tmp_path / "prefixes")
    prompt = [5 + place % 30 for place in range(80)]

    async def answered(service, name):
        served = service.served(name)
        request = Request(prompt, served.renderer.eos_ids, max_tokens=6)
        return [token async for token in service.ask(served, request)]

    first = start_server(settings)
    tokens = [first.call(answered(first.service, name)) for name in NAMES]
    assert [own[0].cached for own in tokens] == [0, 0, 0]
    first.stop()
    second = start_server(replace(settings, targets=settings.targets[:1]))
    for name, own in zip(NAMES[:2], tokens, strict=False):
        again = second.call(answered(second.service, name))
        assert again[0].cached == len(prompt) - 1
        assert [token.token for token in again] == [token.token for token in own]
    models = second.service.models
    assert settings.prefix_folder / models.held_as == next(settings.prefix_folder.iterdir())
    half = replace(models, spec=models.spec.model_copy(update={"dtype": "float16"}))
    assert half.held_as != models.held_as, "other weights in memory have a folder of their own"


def test_a_folder_for_prefixes_that_cannot_be_written_is_refused(start_server, settings, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ServeError, match="cannot be written"):
        start_server(replace(settings, prefix_folder=tmp_path / "file" / "prefixes"))
