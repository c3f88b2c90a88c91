"""From a question to the pieces of its answer: the prompt as the run's own renderer writes it, the request to
the engine, the tokens put together, and the guardrails. If the model that was asked cannot answer, those of
``--fallback`` are asked in their order, as long as nothing was delivered."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar, TypeVarTuple, cast

from tunesmith.checks.schemas import checked
from tunesmith.data.asking import question as asked_for
from tunesmith.data.formats import Conversation
from tunesmith.engine.grammars import GrammarConstraint, Grammars
from tunesmith.engine.requests import Request, TokenConstraint
from tunesmith.errors import ModelError, ServeError, TemplateError
from tunesmith.model import vocabulary
from tunesmith.serving import access
from tunesmith.serving.assembly import OPENED, AnswerReading, Assembler
from tunesmith.serving.pieces import AnswerEnded, Piece, WholeAnswer, joined
from tunesmith.serving.question import Prompted, Question, prompt_size
from tunesmith.serving.rejections import Rejection, TimedOut
from tunesmith.serving.served import Served
from tunesmith.serving.service import Service
from tunesmith.serving.votes import RememberedAnswer, message_of
from tunesmith.tokens.template import Refused, Renderer

T = TypeVar("T")
Arguments = TypeVarTuple("Arguments")
CHARACTERS_PER_TOKEN = 16
"""Of a prompt of the greatest length: no text has more on average, so a longer one is refused unread."""
SHORT = 8192
"""Characters that are screened, rendered and encoded on the event loop, in milliseconds."""
OPENING_TOKENS = 16
"""Of the end of a prompt, in which a mark that opens reasoning stands."""


class ConstraintFailed(ServeError):
    """No token could follow, or the grammar was given up."""


@dataclass(frozen=True)
class PreparedQuestion:
    """A question as the engine gets it. ``constraints``: one for each answer, or none."""

    served: Served
    renderer: Renderer
    request: Request
    reading: AnswerReading
    constraints: Sequence[TokenConstraint] = ()


@dataclass
class AskedOnce:
    """A question that was screened, and who answers it. ``prepared``: for that model. ``seed``: its own, or
    a new one. ``test``: the A/B test that chose the model, or None. ``for_fallbacks``: as `prepared`, for
    those that were asked."""

    question: Question
    served: Served
    prepared: PreparedQuestion
    seed: int
    test: str | None = None
    for_fallbacks: dict[Served, PreparedQuestion] = field(default_factory=dict)
    _alone: asyncio.Lock = field(default_factory=asyncio.Lock, repr=False)

    async def prepared_for(self, service: Service, served: Served) -> PreparedQuestion:
        """The question for ``served``, prepared once for all answers. Raises as `prepare` does."""
        if served is self.served:
            return self.prepared
        async with self._alone:
            if served not in self.for_fallbacks:
                self.for_fallbacks[served] = await prepare(service, self.question, served, self.seed)
            return self.for_fallbacks[served]

    @property
    def fingerprint(self) -> str | None:
        """Of the weights that answer; None in an A/B test, whose users must not know them apart."""
        return f"fp_{self.served.digest[:12]}" if self.test is None else None


@dataclass
class Delivery:
    """One answer on its way. ``id``: by which it can be voted on. ``served``: who answers. ``fallback``: why
    it is not the model that was asked, or None."""

    id: str
    served: Served
    fallback: str | None = None


def deliveries(asked: AskedOnce, answer_id: str) -> list[Delivery]:
    """One for each answer that is asked for."""
    n = asked.question.n
    ids = [answer_id] if n == 1 else [f"{answer_id}/{index}" for index in range(n)]
    return [Delivery(own_id, asked.served) for own_id in ids]


async def ask(service: Service, question: Question) -> AskedOnce:
    """The question, ready to be answered. Raises Rejection, or what `rejection_of` understands, if it cannot
    be."""
    _require_limits(service, question)
    served, test = service.answerer(question)
    size = prompt_size(question.prompt)
    question = await off_loop(size, service.guard.screen_question, question)
    seed = secrets.randbits(31) if question.seed is None else question.seed % 2**64
    prepared = await prepare(service, question, served, seed)
    record = access.current()
    record.model, record.adapter = served.name, served.adapter
    record.prompt_tokens += len(prepared.request.ids)
    return AskedOnce(question, served, prepared, seed, test)


def _require_limits(service: Service, question: Question) -> None:
    limits, prompt = service.limits, question.prompt
    require_readable(service, prompt_size(prompt), "messages")
    counts = [
        ("n", question.n, limits.choices),
        ("max_tokens", question.max_tokens or 1, limits.answer_tokens),
        ("messages", len(prompt.messages) if isinstance(prompt, Conversation) else 1, limits.messages),
    ]
    for name, count, most in counts:
        if count > most:
            message = f"{name}: {count:,}, and this server allows {most:,}"
            raise Rejection(400, message, name, "limit_exceeded")


async def prepare(service: Service, question: Question, served: Served, seed: int) -> PreparedQuestion:
    """The request to the engine, and how its answer is read. Raises Rejection if the template cannot express
    the prompt, or what is asked of the answer cannot be enforced."""
    size = prompt_size(question.prompt)
    try:
        renderer, ids = await off_loop(size, _rendered, question, served)
    except TemplateError as error:
        raise Rejection(400, str(error), "messages", "template") from error
    is_chat = isinstance(question.prompt, Conversation)
    thinks = is_chat and opens_reasoning(renderer, ids)
    if thinks and question.thinking is False:
        message = "the template opens reasoning in every prompt: it cannot be turned off"
        raise Rejection(400, message, "reasoning_effort", "template")
    require_short(service, ids, "messages")
    request = Request(
        ids,
        renderer.eos_ids,
        question.max_tokens or service.limits.default_answer_tokens,
        question.temperature,
        question.top_p,
        seed,
        top_k=question.top_k,
        min_p=question.min_p,
        repetition_penalty=question.repetition_penalty,
        presence_penalty=question.presence_penalty,
        frequency_penalty=question.frequency_penalty,
        logit_bias=question.logit_bias,
        logprobs=question.logprobs,
    )
    reading = AnswerReading(
        question.stop,
        question.calls_tools,
        question.one_call,
        await off_loop(size, _strict_schemas, question),
        thinks,
        is_chat,
        question.tools,
    )
    constraints = await _constraints(service, question, renderer)
    if question.logprobs is not None:  # else the first token that is shown would stop every stream
        await asyncio.to_thread(service.lexicons.of(renderer).token, 0)
    return PreparedQuestion(served, renderer, request, reading, constraints)


def prompt_ids(renderer: Renderer, prompt: Prompted, served: Served) -> list[int]:
    """The ids that the run was evaluated with for this prompt. Raises TemplateError if the template cannot
    express it."""
    if isinstance(prompt, tuple):
        return list(prompt)
    if isinstance(prompt, str):
        return renderer.text_prompt(prompt)
    if served.asked_as == "chat":
        return renderer.whole_prompt(prompt)
    roles = [message.role for message in prompt.messages]
    known = ["user"] if served.asked_as == "text" else ["system", "user", "assistant"]
    if prompt.tools or not {*roles} <= {*known} or (served.asked_as == "text" and len(roles) > 1):
        raise Refused(
            "asked_as",
            f"{served.name} was trained on plain text, which has no place for this conversation",
            "ask with one message of the user, or use /v1/completions",
        )
    text = asked_for(prompt.messages, served.asked_as)
    assert isinstance(text, str)
    return renderer.text_prompt(text)


def _rendered(question: Question, served: Served) -> tuple[Renderer, list[int]]:
    """(the renderer of the run, with reasoning as the client asks for it; ids of the prompt)."""
    thinking = question.thinking
    renderer = served.renderer if thinking is None else served.renderer.with_thinking(thinking)
    return renderer, prompt_ids(renderer, question.prompt, served)


async def off_loop(size: int, function: Callable[[*Arguments], T], *arguments: *Arguments) -> T:
    """``function(*arguments)``, in a thread if it reads so many characters that streams would stand still."""
    return function(*arguments) if size <= SHORT else await asyncio.to_thread(function, *arguments)


def constrained(question: Question) -> bool:
    """Whether the answer must have a form of its own: JSON, or calls."""
    return question.format is not None or (question.calls_tools and question.tool_choice == "required")


def opens_reasoning(renderer: Renderer, ids: Sequence[int]) -> bool:
    """Whether the prompt ends within reasoning."""
    return renderer.decode(ids[-OPENING_TOKENS:]).rstrip().endswith(OPENED)


def _most_tokens(service: Service) -> int:
    """Of a prompt."""
    positions = vocabulary.limits(service.models.loaded.net).positions
    return min(service.limits.prompt_tokens, positions or service.limits.prompt_tokens)


def require_readable(service: Service, size: int, param: str) -> None:
    """Raises Rejection if a prompt of ``size`` characters is too long, whatever they are."""
    most = CHARACTERS_PER_TOKEN * _most_tokens(service)
    if size > most:
        message = f"the prompt has {size:,} characters, and at most {most:,} are read"
        raise Rejection(400, message, param, "context_length_exceeded")


def require_short(service: Service, ids: Sequence[int], param: str) -> None:
    """Raises Rejection if a prompt of ``ids`` is too long."""
    most = _most_tokens(service)
    if len(ids) > most:
        message = f"the prompt has {len(ids):,} tokens, and at most {most:,} are possible"
        raise Rejection(400, message, param, "context_length_exceeded")


def _functions(question: Question) -> list[Mapping[str, Any]]:
    return [cast("dict[str, Any]", tool)["function"] for tool in question.tools]


def _strict_schemas(question: Question) -> dict[str, Any]:
    """Validators for the arguments of strict tools."""
    return {
        function["name"]: checked(function.get("parameters") or {})
        for function in _functions(question)
        if function["name"] in question.strict_tools
    }


async def _constraints(service: Service, question: Question, renderer: Renderer) -> list[TokenConstraint]:
    """What keeps each answer to its form. Raises Rejection if what is asked cannot be enforced."""
    if not constrained(question):
        return []
    form = question.format
    if form is not None and question.calls_tools:
        message = "JSON and tools at once cannot be enforced: leave out one of them, or set tool_choice: none"
        raise Rejection(400, message, form.param, "unsupported_value")

    def make(grammars: Grammars) -> TokenConstraint:
        if form is None:
            named = cast("Sequence[Mapping[str, Any]]", question.tools)
            return grammars.calls(named, one_named=question.named_tool, parallel=not question.one_call)
        return grammars.json_object() if form.schema is None else grammars.json_schema(form.schema)

    try:
        return await service.lexicons.of(renderer).compiled(
            lambda grammars: [make(grammars) for _ in range(question.n)], service.limits.first_token_s
        )
    except ModelError as error:
        param = "tools" if form is None else form.param
        raise Rejection(400, str(error), param, "unsupported_schema") from error


async def answer(service: Service, asked: AskedOnce, index: int, delivery: Delivery) -> AsyncGenerator[Piece]:
    """The pieces of answer ``index``, which can be voted on when it has ended. ``delivery`` says at its first
    piece who gives it. Raises what `rejection_of` understands."""
    pieces: list[Piece] = []
    async with aclosing(_delivered(service, asked, index, delivery)) as delivered:
        async for piece in delivered:
            pieces.append(piece)
            yield piece
    question, served = asked.question, delivery.served
    if isinstance(question.prompt, Conversation):
        # The models of an A/B test are compared by their own answers, not by those of a fallback.
        test = asked.test if delivery.fallback is None else None
        service.answers.add(
            RememberedAnswer(
                delivery.id,
                question.prompt,
                message_of(pieces),
                served.name,
                served.digest,
                test,
                question.user,
            )
        )


async def _delivered(
    service: Service, asked: AskedOnce, index: int, delivery: Delivery
) -> AsyncGenerator[Piece]:
    """The pieces of an answer by the first model that can give it. If the last cannot take the prompt, the
    client gets what the model that was asked gave: its error, or the answer that was cut."""
    candidates = [asked.served, *_fallbacks(service, asked.served)]
    first: Exception | list[Piece] | None = None
    for served in candidates:
        is_last, failure = served is candidates[-1], None
        held: list[Piece] = []
        delivered = False
        try:
            prepared = await asked.prepared_for(service, served)
            async with aclosing(_answer_of(service, prepared, index)) as pieces:
                async for piece in pieces:
                    if not (is_last or delivered) and (failure := _failure(piece, prepared)):
                        first = first or [*held, piece]
                        break
                    held.append(piece)
                    if is_last or asked.question.stream:
                        delivered = True
                        yield held.pop()
        except (TimedOut, ConstraintFailed, Rejection) as error:
            refused = is_last and isinstance(error, Rejection)
            if refused and isinstance(first, Exception):
                raise first from error
            if refused and isinstance(first, list):
                held = first
                delivery.served, delivery.fallback = asked.served, None
                access.current().fallback = None
            elif is_last or delivered:
                raise
            else:
                first, failure = first or error, _reason(error)
        if failure is None:
            for piece in held:
                yield piece
            return
        instead = candidates[candidates.index(served) + 1]
        service.metrics.fallbacks.labels(asked.served.name, instead.name, failure).inc()
        access.current().fallback = f"{instead.name}: {failure}"
        delivery.served, delivery.fallback = instead, failure


def _fallbacks(service: Service, asked: Served) -> list[Served]:
    """The models of ``--fallback``, without ``asked`` and those that the key of the request may not ask."""
    others = [service.models.resolve(name) for name in service.fallback]
    allowed = [other for other in others if service.allows_names(other.names)]
    return [service.hold(other) for other in allowed if other is not asked]


def _reason(error: Exception) -> str:
    """Why another model should answer, after ``error``."""
    if isinstance(error, Rejection):  # of a fallback whose template cannot express the prompt
        return "refused"
    return "timeout" if isinstance(error, TimedOut) else "invalid"


def _failure(piece: Piece, prepared: PreparedQuestion) -> str | None:
    """Why another model should answer instead, or None."""
    if not isinstance(piece, AnswerEnded):
        return None
    if piece.reason == "content_filter":
        return "guardrail"
    return "invalid" if piece.reason == "length" and prepared.constraints else None


async def _answer_of(service: Service, prepared: PreparedQuestion, index: int) -> AsyncGenerator[Piece]:
    """The pieces of an answer by one model."""
    constraint = prepared.constraints[index] if prepared.constraints else None
    request = replace(prepared.request, stream=index, constraint=constraint)
    assembler = Assembler(prepared.renderer, prepared.reading, len(request.ids))
    screen = service.guard.screen_answer()
    tokens = service.ask(prepared.served, request)
    try:
        async for token in tokens:
            for piece in assembler.feed(token):
                if isinstance(piece, AnswerEnded):
                    _require_valid(constraint)
                    access.current().ended = piece.reason
                for shown in screen.feed(piece):
                    yield shown
                if screen.blocked is not None:
                    access.current().ended = "content_filter"
                    yield AnswerEnded("content_filter", assembler.usage)
                    return
            if assembler.over:
                return
    finally:
        tokens.cancel()


def _require_valid(constraint: TokenConstraint | None) -> None:
    """Raises ConstraintFailed if the answer could not follow its constraint to the end."""
    if isinstance(constraint, GrammarConstraint) and constraint.problem is not None:
        raise ConstraintFailed(f"the answer could not be kept to its form: {constraint.problem}")


async def whole(streams: Sequence[AsyncIterator[Piece]]) -> list[WholeAnswer]:
    """Several answers, complete."""
    pieces: list[list[Piece]] = [[] for _ in streams]
    async with aclosing(merged(streams)) as found:
        async for place, piece in found:
            pieces[place].append(piece)
    return [joined(answer_pieces) for answer_pieces in pieces]


async def merged(streams: Sequence[AsyncIterator[Piece]]) -> AsyncGenerator[tuple[int, Piece]]:
    """The pieces of several answers, each with the place of its answer, as they come."""
    queue: asyncio.Queue[tuple[int, Piece] | BaseException | None] = asyncio.Queue()

    async def drain(place: int, stream: AsyncIterator[Piece]) -> None:
        try:
            async for piece in stream:
                queue.put_nowait((place, piece))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(drain(place, stream)) for place, stream in enumerate(streams)]
    try:
        running = len(tasks)
        while running:
            entry = await queue.get()
            if isinstance(entry, BaseException):
                raise entry
            if entry is None:
                running -= 1
            else:
                yield entry
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
