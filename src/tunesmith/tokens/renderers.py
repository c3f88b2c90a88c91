"""Which renderer a model has, and the one of Mistral v3, by mistral-common."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, date, datetime
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, cast

from tunesmith.data.formats import Conversation, Message
from tunesmith.errors import ConfigError, ModelError, TunesmithError
from tunesmith.machine.ranks import Ranks
from tunesmith.tokens.chat_templates import Choices, openai
from tunesmith.tokens.first_rules import FirstRules
from tunesmith.tokens.hugging_face import HFRenderer
from tunesmith.tokens.pieces import sentencepiece_bytes
from tunesmith.tokens.template import (
    ANCHOR,
    SURROGATES,
    Answered,
    Refused,
    Renderer,
    TemplateSpec,
    digest,
    json_text,
)

__all__ = ["FirstRules", "HFRenderer", "MistralRenderer", "Recorded", "load"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
LONG_NUMBER = re.compile(rb":\s*\d{8}")
RULES = 2  # part of Mistral's fingerprint: change it when unchanged data would give other ids or targets


class MistralRenderer(Renderer):
    """Mistral v3: the ids of mistral-common's ``encode_chat_completion``, which never reads text as
    control."""

    nine_letters = True
    _control = re.compile(SURROGATES)
    _in_text = re.compile(r"\[/?(?:INST|TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]|\A\s*<s>|</s>\s*\Z")

    def __init__(self, path: Path | None = None) -> None:
        """path: a ``tokenizer.model.v3``; None is the one that mistral-common ships."""
        import mistral_common
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

        file = Path(
            path or cast(SentencePieceTokenizer, MistralTokenizer.v3().instruct_tokenizer.tokenizer).file_path
        )
        # "agnostic" checks as the other modes do, but a request may end with the user or with the assistant.
        self._mistral = MistralTokenizer.from_file(file, mode=ValidationMode.agnostic)
        self._pieces = pieces = cast(SentencePieceTokenizer, self._mistral.instruct_tokenizer.tokenizer)
        self._special = {token: pieces.id_to_piece(token) for token in pieces.special_ids}
        self.bos_id = self.chat_bos_id = pieces.bos_id
        self.eos_ids = (pieces.eos_id,)
        self.unknown_id, self.control_ids = pieces.unk_id, frozenset(pieces.special_ids)
        self.size = pieces.n_words
        self.fingerprint = digest(RULES, mistral_common.__version__, file.read_bytes())

    def decode(self, ids: Sequence[int]) -> str:
        text = ""
        for special, run in groupby(map(int, ids), self._special.__contains__):
            if special:
                text += "".join(self._special[token] for token in run)
            else:  # written out, a space follows every control token but BOS and EOS
                text += " " * text.endswith("]")
                for known, part in groupby(run, lambda token: token < self.size):
                    ids = list(part)
                    text += self._pieces.decode(ids) if known else "\ufffd" * len(ids)
        return text

    def token_bytes(self) -> list[bytes]:
        special = self._special
        return [
            special[token].encode()
            if token in special
            else sentencepiece_bytes(self._pieces.id_to_piece(token))
            for token in range(self.size)
        ]

    def _encode(self, text: str) -> list[int]:
        return self._pieces.encode(text, bos=False, eos=False)

    def _text_ids(self, text: str) -> list[int]:
        if self.text_control != "read":
            return self._encode(text)
        control = {piece: token for token, piece in self._special.items()}
        pattern = re.compile("(" + "|".join(map(re.escape, control)) + ")")
        ids: list[int] = []
        for part in pattern.split(text):
            bracket = bool(ids) and self._special.get(ids[-1], "").endswith("]")
            if part in control:
                ids.append(control[part])
            elif bracket and not part.startswith(" "):  # written out, a space follows these tokens
                ids += self._encode(ANCHOR + part)[len(self._encode(ANCHOR)) :]
            else:
                ids += self._encode(part.removeprefix(" ") if bracket else part)
        return ids

    def unframed(self, text: str) -> str:
        return text

    def _prompt(self, conversation: Conversation) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            request = ChatCompletionRequest.from_openai(*openai(conversation))
            return list(self._mistral.encode_chat_completion(request).tokens)
        except (MistralCommonException, ValueError, AssertionError) as error:
            raise Refused(
                "template", f"mistral-common: {' '.join(str(error).split())}", "change or drop this row"
            ) from error

    def _answered(self, before: Conversation, answer: Message) -> Answered:
        shown = replace(before, messages=(*before.messages, answer))
        prompt, ids = self._prompt(before), self._prompt(shown)
        calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in answer.calls]
        wrote = f"[TOOL_CALLS] {json_text(calls)}" if calls else answer.content
        return Answered(prompt, ids, self.decode(ids[len(prompt) : -1]), wrote, self.decode(ids))


class Recorded(NamedTuple):
    """What a run recorded of its renderer. fingerprint: None for a run that begins now. day: the date that
    its template sees. thinking: whether its prompts ask for reasoning."""

    fingerprint: str | None
    day: date
    thinking: bool

    @classmethod
    def now(cls) -> Recorded:
        """Of a run that begins now."""
        return cls(None, datetime.now(UTC).date(), False)

    @classmethod
    def on_first_rank(cls, among: Ranks) -> Recorded:
        """Of a run that begins now, on the first rank's day: another rank may start after midnight."""
        own = cls.now()
        return own._replace(day=date.fromisoformat(among.from_first(own.day.isoformat())))


def load(path: Path | str, spec: TemplateSpec | None = None, recorded: Recorded | None = None) -> Renderer:
    """The renderer of a model or tokenizer folder, or of ``mistral-v3``: the tokenizer that mistral-common
    ships. recorded: of the run that is opened, whose rules are followed if they are those of 0.1.0.

    Raises ModelError if the tokenizer cannot be read. Code that comes with a tokenizer is never run.
    """
    spec, folder = spec or TemplateSpec.model_validate({}), Path(path)
    if str(path) != "mistral-v3" and not folder.is_dir():
        raise ModelError(
            "no such tokenizer folder", where=str(path), hint="give a model's folder, or mistral-v3"
        )
    own = folder / "tokenizer.model.v3" if (folder / "tokenizer.model.v3").is_file() else None
    try:
        if str(path) == "mistral-v3" or spec.renderer == "mistral-v3" or (own and spec.renderer == "auto"):
            return _with_effect(spec, MistralRenderer(own))
        return _with_effect(spec, _of_folder(folder, spec, recorded))
    except (KeyboardInterrupt, SystemExit, TunesmithError):
        raise
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        text = _damaged(folder) or f"tokenizer.json, tokenizer_config.json: {type(error).__name__}: {error}"
        raise ModelError(f"the tokenizer cannot be read: {text}", where=str(path)) from error


def _with_effect(spec: TemplateSpec, renderer: Renderer) -> Renderer:
    """``renderer``. Raises ConfigError for a setting that its template does not read."""
    template = renderer.template if isinstance(renderer, HFRenderer) else None
    if template is None and not isinstance(renderer, MistralRenderer):
        return renderer  # of a run of 0.1.0; or it cannot render a conversation, and says so
    unread = [f"options.{name}" for name in spec.options if template is None or not template.names(name)]
    if spec.date is not None and (template is None or not template.uses_date):
        unread.append("date")
    if spec.thinking == "on" and not renderer.thinking_switch:
        unread.append("thinking")
    if unread:
        names = ", ".join(f"template.{name}" for name in unread)
        raise ConfigError(
            f"{names}: the chat template does not read it", hint="leave it out, or correct the name"
        )
    return renderer


def _of_folder(folder: Path, spec: TemplateSpec, recorded: Recorded | None) -> Renderer:
    from transformers import AutoTokenizer

    _require_possible_ids(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    v3 = len(tokenizer) == 32768 and tokenizer.convert_tokens_to_ids(["[INST]", "[TOOL_CALLS]"]) == [3, 5]
    if v3 and spec.renderer == "auto":
        return MistralRenderer()
    if recorded is not None and recorded.fingerprint is not None:
        first = FirstRules(tokenizer, recorded.day)
        if first.fingerprint == recorded.fingerprint:
            return first
    day = recorded.day if recorded else datetime.now(UTC).date()
    day = day if spec.date is None else date.fromisoformat(spec.date)
    thinking = recorded.thinking if recorded and spec.thinking == "auto" else spec.thinking == "on"
    choices = Choices(dict(spec.options), day, spec.date is not None)
    return HFRenderer(tokenizer, choices, _stops(folder), thinking=thinking)


def _stops(folder: Path) -> tuple[int, ...]:
    """The end tokens that generation_config.json names; inference servers stop at each of them."""
    file = folder / "generation_config.json"
    if not file.is_file():
        return ()
    try:
        stops = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ModelError(f"generation_config.json cannot be read: {error}", where=str(folder)) from error
    listed = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if not all(isinstance(token, int) for token in listed):
        raise ModelError(
            f"generation_config.json: eos_token_id is {stops!r}, ids expected", where=str(folder)
        )
    return tuple(listed)


def _require_possible_ids(folder: Path) -> None:
    """Raises ModelError for an id of eight or more digits: the library would make a list of that length."""
    file = folder / "tokenizer.json"
    if not file.is_file() or not LONG_NUMBER.search(file.read_bytes()):  # parsing it takes ten times as long
        return
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        pairs = [*content["model"]["vocab"].items()]
        pairs += [(token["content"], token["id"]) for token in content.get("added_tokens") or ()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return  # the library says what is wrong
    for token, number in pairs:
        if isinstance(number, int) and number >= 10**7:
            text = f"tokenizer.json: the id of {token!r} is {number}, and it has {len(pairs):,} tokens"
            raise ModelError(f"the tokenizer cannot be read: {text}", where=str(folder))


def _damaged(folder: Path) -> str:
    """The files of a tokenizer that are not a JSON object, and why; empty if all are."""
    problems: list[str] = []
    for name in TOKENIZER_FILES:
        if (folder / name).is_file():
            try:
                content = json.loads((folder / name).read_text(encoding="utf-8"))
            except (OSError, ValueError, RecursionError) as error:
                problems.append(f"{name} is not JSON: {error}")
            else:
                if not isinstance(content, dict):
                    problems.append(f"{name} holds {type(content).__name__}, an object expected")
    return "; ".join(problems)
