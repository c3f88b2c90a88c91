"""Render conversations with every public template, compare with transformers, and write docs/templates.md.

    PYTHONPATH=src:tests python tests/parity/template_table.py FOLDER [--write]

FOLDER: as `public_templates` fetched it. The prompt of every answer must be transformers' rendering of the
conversation before it, token for token, and the learned tokens must hold its words and end with a stop. The
tokenizer is one of bytes with the marks that the template names: what is compared is the template."""

from __future__ import annotations

import re
import sys
from collections import Counter
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tunesmith.data.formats import Call, Conversation, Demonstration, Message
from tunesmith.tokens.chat_templates import Choices
from tunesmith.tokens.hugging_face import HFRenderer
from tunesmith.tokens.template import Refused, json_text, thought_of

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
START, END = "<!-- templates -->\n", "<!-- end of templates -->\n"
MARK = re.compile(
    r"<\|[^|<>\s{}']{1,40}\|>|<｜[^｜<>{}]{1,40}｜>|\[/?[A-Z_]{3,30}\]|</?s>|<(?:start|end)_of_\w+>|<\|\w+>"
    r"|<\w+\|>|<SPECIAL_\d+>|<seed:\w+>|<extra_id_\d>|\]~b\]|\[e~\[|\]~!b\[|\[\|\w+\|\]|</assistant>|<sep>"
)
EOS = {
    "Apertus": "<|assistant_end|>",
    "Apriel-1.6": "<|end|>",
    "Hy3": "<｜hy_eos:opensource｜>",
    "Laguna": "</assistant>",
    "Reka": "<sep>",
    "exaone": "[|endofturn|]",
}
STOPS = {
    "GLM": ("<|user|>", "<|observation|>"),
    "glm4": ("<|user|>", "<|observation|>"),
    "gemma4": ("<|tool_response>",),
    "gpt-oss": ("<|call|>",),
}
"""What the models' own tokenizer_config.json and generation_config.json say, by a part of the name."""

TOWN = {"type": "object", "properties": {"town": {"type": "string"}}, "required": ["town"]}
TOOL = {"type": "function", "function": {"name": "weather", "description": "of a town", "parameters": TOWN}}
PARIS, ROME = Call("weather", {"town": "Paris"}), Call("weather", {"town": "Rome"})


def spoken(*turns: str | tuple[Call, ...] | tuple[str, Call], tools: bool = False) -> Conversation:
    """User and assistant in turn; a turn of calls is followed by their results."""
    messages: list[Message] = []
    for turn in turns:
        answers = bool(messages) and messages[-1].role in ("user", "tool")
        if isinstance(turn, str):
            messages.append(Message("assistant" if answers else "user", turn))
            continue
        calls = tuple(part for part in turn if isinstance(part, Call))
        words = "".join(part for part in turn if isinstance(part, str))
        messages.append(Message("assistant", words, calls))
        messages += [Message("tool", '{"sky": "clear"}') for _ in calls]
    return Conversation(tuple(messages), (TOOL,) if tools else ())


PLAIN = spoken("How many?", "Exactly seven.", "And then?", "Eight of them.")
THOUGHT = "<think>\nthree and four\n</think>\n\n"
KINDS = {
    "plain": replace(PLAIN, messages=PLAIN.messages[:2]),
    "many turns": PLAIN,
    "system": replace(PLAIN, messages=(Message("system", "Be brief."), *PLAIN.messages)),
    "tools": spoken("Paris?", (PARIS,), "Clear.", tools=True),
    "two calls": spoken("Paris, Rome?", (PARIS, ROME), "Both clear.", tools=True),
    "words beside calls": spoken("Paris?", ("Let me look.", PARIS), "Clear.", tools=True),
    "reasoning": spoken("How many?", THOUGHT + "Seven.", "And then?", THOUGHT + "Eight."),
}


def tokenizer(name: str, source: str) -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({piece: place for place, piece in enumerate(alphabet)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    eos = next((token for part, token in EOS.items() if part in name), "</s>")
    marks = sorted({*MARK.findall(source), "<s>", eos})
    inner.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token=eos)
    fast.chat_template = source
    return fast


def result(renderer: HFRenderer, fast: PreTrainedTokenizerFast, conversation: Conversation) -> str:
    """exact, or why it was refused. Raises AssertionError if a row is wrong."""
    answers = [place for place, message in enumerate(conversation.messages) if message.role == "assistant"]
    try:
        for place in answers:
            shown = replace(conversation, messages=conversation.messages[: place + 1])
            example = Demonstration(conversation=shown, label=None, id="0", source="x", metadata={})
            (row,) = renderer.rows(example, learn="last")
            ids, start = row.tokens.ids.tolist(), row.tokens.start
            checked = renderer._checked(shown, Counter())
            assert renderer.template is not None
            text = as_transformers(renderer, fast, checked)
            assert renderer.decode(ids[:start]) == text, (renderer.decode(ids[:start]), text)
            assert ids[:start] == fast.encode(text, add_special_tokens=False)
            said, thought = renderer.decode(ids[start:]), thought_of(shown.messages[-1].content)
            assert thought.words in said and thought.reasoning in said and ids[-1] in renderer.eos_ids
    except Refused as error:
        return f"refused: {error.code}"
    return "exact"


def as_transformers(renderer: HFRenderer, fast: PreTrainedTokenizerFast, conversation: Conversation) -> str:
    """The prompt before the last answer, by transformers, as an inference server would ask for it."""
    assert renderer.template is not None
    forms = renderer.template.forms
    before = replace(conversation, messages=conversation.messages[:-1])
    thinking = bool(thought_of(conversation.messages[-1].content).reasoning) and forms.reasoning != "words"
    entries = []
    for message in before.messages:
        thought = thought_of(message.content) if message.role == "assistant" else None
        content = message.content
        if thought is not None and forms.reasoning != "marks":
            content = thought.words
        entry = {"role": message.role, "content": content}
        if forms.contents == "parts":
            entry["content"] = [{"type": "text", "text": content}]
        if thought is not None and thought.reasoning and forms.reasoning not in ("words", "marks", None):
            entry |= {forms.reasoning: thought.reasoning}
        if message.calls:
            as_text = forms.arguments == "text"
            texts = [json_text(call.arguments) if as_text else call.arguments for call in message.calls]
            entry["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": text}}
                for call, text in zip(message.calls, texts, strict=True)
            ]
        names = {"tool_call_id": message.call_id, "name": message.name}
        entries.append(entry | {key: value for key, value in names.items() if value is not None})
    tools = list(before.tools) or ([] if forms.lists_tools else None)
    variables = {**renderer.template._shared(before), **(forms.thinking if thinking else forms.plain)}
    return fast.apply_chat_template(
        entries, tools=tools, tokenize=False, add_generation_prompt=True, **variables
    )


def table(folder: Path) -> list[str]:
    rows, exact = [], Counter()
    files = sorted(folder.glob("*.jinja"))
    for file in files:
        source = file.read_text()
        fast = tokenizer(file.name, source)
        named = [mark for part, marks in STOPS.items() if part in file.name for mark in marks]
        stops = [fast.convert_tokens_to_ids(mark) for mark in named]
        renderer = HFRenderer(fast, Choices({}, datetime.now(UTC).date(), False), stops)
        results = []
        for kind, conversation in KINDS.items():
            try:
                results.append(result(renderer, fast, conversation))
            except AssertionError as error:
                results.append("WRONG")
                print(file.name, kind, str(error)[:300], file=sys.stderr)
        exact.update(kind for kind, cell in zip(KINDS, results, strict=True) if cell == "exact")
        switch = renderer.template.forms.switch if renderer.template is not None else None
        rows.append(f"| {file.stem.replace('--', ' ')} | {' | '.join(results)} | {switch or ''} |")
    head = f"| template | {' | '.join(KINDS)} | thinking by |"
    counts = f"| **exact of {len(files)}** | {' | '.join(str(exact[kind]) for kind in KINDS)} | |"
    return [head, "|---" * (len(KINDS) + 2) + "|", counts, *rows]


if __name__ == "__main__":
    lines = "\n".join(table(Path(sys.argv[1]))) + "\n"
    print(lines)
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(START)[0], page.split(END)[1]
        PAGE.write_text(before + START + lines + END + after, encoding="utf-8")
