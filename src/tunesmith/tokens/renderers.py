"""The two renderers: mistral-common for Mistral v3, and a Hugging Face tokenizer with its own chat
template."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunesmith.data.formats import Conversation, Message
from tunesmith.errors import ModelError
from tunesmith.tokens.template import ANCHOR, SURROGATES, Refused, Renderer, json_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "config.json",
)
LONG_NUMBER = re.compile(rb":\s*\d{8}")
RULES = 2  # part of every fingerprint: change it when unchanged data would give other ids or targets


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
        self.fingerprint = _digest(mistral_common.__version__, file.read_bytes())

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

    def _prompt(self, conversation: Conversation) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        try:
            request = ChatCompletionRequest.from_openai(*_openai(conversation))
            return list(self._mistral.encode_chat_completion(request).tokens)
        except (MistralCommonException, ValueError, AssertionError) as error:
            raise Refused(
                "template", f"mistral-common: {' '.join(str(error).split())}", "change or drop this row"
            ) from error

    def _answered(
        self, before: Conversation, shown: Conversation
    ) -> tuple[list[int], list[int], str, str, str]:
        message = shown.messages[-1]
        prompt, ids = self._prompt(before), self._prompt(shown)
        calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in message.calls]
        wrote = f"[TOOL_CALLS] {json_text(calls)}" if calls else message.content
        return prompt, ids, self.decode(ids[len(prompt) : -1]), wrote, self.decode(ids)


class HFRenderer(Renderer):
    """A Hugging Face tokenizer with its chat template: prompts are those of its ``apply_chat_template``."""

    nine_letters = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = cast(Any, tokenizer)
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self._tokenizer.all_special_tokens)
        self._control = re.compile(
            "|".join((SURROGATES, *map(re.escape, sorted(special, key=len, reverse=True))))
        )
        self._in_text = re.compile(
            "|".join(map(re.escape, sorted(special, key=len, reverse=True))) or r"(?!)"
        )
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.unknown_id = self._tokenizer.unk_token_id
        self.control_ids = frozenset(
            id for id, token in self._tokenizer.added_tokens_decoder.items() if token.special
        )
        added = self._tokenizer.added_tokens_decoder
        self.size = max(len(self._tokenizer), *(id + 1 for id in added), 0)
        self.bos_id = bos if bos in self._tokenizer.encode("a")[:1] and bos not in self._encode("a") else None
        self.eos_ids = () if eos is None else (eos,)
        self.text_end_id = eos
        self._options: dict[str, bool] = {}
        self.chat_bos_id: int | None = None
        self._broken: Refused | None = None
        try:
            self._probe(bos)
        except Refused as error:
            self._broken = error  # plain text can still be rendered
        fast = self._tokenizer.is_fast
        words = self._tokenizer.backend_tokenizer.to_str() if fast else json_text(self._tokenizer.get_vocab())
        self.fingerprint = _digest(words, self._tokenizer.chat_template, bos, self.eos_ids, self._options)

    def _probe(self, bos: int | None) -> None:
        """Finds the token that ends an answer, and whether thinking must be turned off so that an answer
        holds its words only."""
        roles = ("user", "assistant", "user", "assistant")
        spoken = Conversation(tuple(Message(role, f"zq{number}") for number, role in enumerate(roles)))
        for options in ({}, {"enable_thinking": False}):
            self._options = options
            head, full = (
                self._text(replace(spoken, messages=spoken.messages[:3]), True),
                self._text(spoken, False),
            )
            match = self._control.search(full, len(head))
            if match and full.startswith(head) and full[len(head) : match.start()].strip() == "zq3":
                end = self._tokenizer.convert_tokens_to_ids(match.group())
                self.eos_ids = tuple(dict.fromkeys((end, *self.eos_ids)))
                # A BOS that opens every turn, as in some ChatML templates, does not mark the beginning.
                self.chat_bos_id = bos if bos is not None and self._encode(full).count(bos) == 1 else None
                return
        raise Refused(
            "template",
            "the chat template does not render an answer as prompt, words and end token",
            "write a chat_template.jinja that does",
        )

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(
            [*map(int, ids)], skip_special_tokens=False, clean_up_tokenization_spaces=False
        )

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _text(self, conversation: Conversation, generate: bool) -> str:
        if self._broken is not None:
            raise Refused(self._broken.code, self._broken.what, self._broken.hint)
        if self._tokenizer.chat_template is None:
            raise Refused(
                "no_chat_template",
                "this tokenizer has no chat template",
                "set data.instruction_layout: instruct",
            )
        messages, tools = _openai(conversation)
        options = dict(tools=tools, tokenize=False, add_generation_prompt=generate)
        try:
            return self._tokenizer.apply_chat_template(messages, **options, **self._options)
        except Exception as error:  # a template is a program, which may raise anything
            roles = " ".join(message.role for message in conversation.messages)
            raise Refused(
                "template",
                f"the chat template refuses the roles {roles}: {error}",
                "put the system text into the first user message",
            ) from error

    def _prompt(self, conversation: Conversation) -> list[int]:
        return self._encode(self._text(conversation, True))

    def _answered(
        self, before: Conversation, shown: Conversation
    ) -> tuple[list[int], list[int], str, str, str]:
        head, full = self._text(before, True), self._text(shown, False)
        prompt, whole = self._encode(head), self._encode(full)
        if not full.startswith(head):
            return prompt, whole, "", "", full
        ids = self._continue(prompt, full[len(head) :], whole)
        end = next(
            (place for place in range(len(prompt), len(ids)) if ids[place] in self.eos_ids), len(ids) - 1
        )
        wrote = full[len(head) :].partition(self.decode(ids[end : end + 1]))[0]
        return prompt, ids[: end + 1], self._between(ids, len(prompt), end), wrote, full


def load(path: Path | str, spec_name: str = "auto") -> Renderer:
    """The renderer of a model or tokenizer folder, or of ``mistral-v3``: the tokenizer that mistral-common
    ships.

    Raises ModelError if the tokenizer cannot be read. Code that comes with a tokenizer is never run.
    """
    folder = Path(path)
    if str(path) != "mistral-v3" and not folder.is_dir():
        raise ModelError(
            "no such tokenizer folder", where=str(path), hint="give a model's folder, or mistral-v3"
        )
    own = folder / "tokenizer.model.v3" if (folder / "tokenizer.model.v3").is_file() else None
    try:
        if str(path) == "mistral-v3" or spec_name == "mistral-v3" or (own and spec_name == "auto"):
            return MistralRenderer(own)
        return _of_folder(folder, spec_name)
    except (KeyboardInterrupt, SystemExit):
        raise
    except ModelError:
        raise
    except BaseException as error:  # a panic of a library in Rust is not an Exception
        text = _damaged(folder) or f"tokenizer.json, tokenizer_config.json: {type(error).__name__}: {error}"
        raise ModelError(f"the tokenizer cannot be read: {text}", where=str(path)) from error


def _of_folder(folder: Path, spec_name: str) -> Renderer:
    from transformers import AutoTokenizer

    _require_possible_ids(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    v3 = len(tokenizer) == 32768 and tokenizer.convert_tokens_to_ids(["[INST]", "[TOOL_CALLS]"]) == [3, 5]
    return MistralRenderer() if v3 and spec_name == "auto" else HFRenderer(tokenizer)


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


def _openai(conversation: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools in OpenAI's form, but with parsed arguments."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        functions = ((call.id, {"name": call.name, "arguments": call.arguments}) for call in message.calls)
        calls = [{"id": key, "type": "function", "function": function} for key, function in functions]
        optional = {"tool_calls": calls or None, "tool_call_id": message.call_id, "name": message.name}
        given = {key: value for key, value in optional.items() if value is not None}
        messages.append({"role": message.role, "content": message.content, **given})
    return messages, cast("list[dict[str, Any]]", list(conversation.tools)) or None


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr((RULES, *parts)).encode()).hexdigest()
