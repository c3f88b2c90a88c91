"""The two renderers: mistral-common for Mistral v3, and a Hugging Face tokenizer with its own chat template."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from tunesmith.errors import ModelError
from tunesmith.formats import Conversation, Message
from tunesmith.template import SURROGATES, Answered, Refused, Renderer, json_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RULES = b"1"  # part of every fingerprint: change it when unchanged data would give other ids or targets


class MistralRenderer(Renderer):
    """Mistral v3: the ids of mistral-common's ``encode_chat_completion``, which never reads text as control."""

    name = "mistral-v3"
    _nine = True
    _control = re.compile(SURROGATES)

    def __init__(self, path: Path | None = None) -> None:
        """path: a ``tokenizer.model.v3``; None is the one that mistral-common ships. Raises ModelError."""
        import mistral_common
        from mistral_common.protocol.instruct.validator import ValidationMode
        from mistral_common.tokens.tokenizers.base import TokenizerVersion
        from mistral_common.tokens.tokenizers.mistral import MistralTokenizer
        from mistral_common.tokens.tokenizers.sentencepiece import SentencePieceTokenizer

        file = Path(path or cast(SentencePieceTokenizer, MistralTokenizer.v3().instruct_tokenizer.tokenizer).file_path)
        # "agnostic" checks as the other modes do, but a request may end with the user or with the assistant.
        self._mistral = MistralTokenizer.from_file(file, mode=ValidationMode.agnostic)
        pieces = self._mistral.instruct_tokenizer.tokenizer
        if not isinstance(pieces, SentencePieceTokenizer) or pieces.version != TokenizerVersion.v3:
            raise ModelError("not a Mistral v3 tokenizer", where=str(file))
        self._pieces = pieces
        self._special = {token: pieces.id_to_piece(token) for token in pieces.special_ids}
        self.bos_id = self._chat_bos = pieces.bos_id
        self.eos_ids, self.vocabulary = (pieces.eos_id,), pieces.n_words
        self.fingerprint = _digest(self.name, mistral_common.__version__, file.read_bytes())

    def decode(self, ids: Sequence[int]) -> str:
        text, space = "", ""
        for special, run in groupby(map(int, ids), self._special.__contains__):
            if special:
                text += "".join(names := [self._special[token] for token in run])
                # Written out, a space follows every control token but BOS and EOS.
                space = " " if names[-1].startswith("[") else ""
            else:
                text += space + self._pieces.decode(list(run))
        return text

    def _encode(self, text: str) -> list[int]:
        return self._pieces.encode(text, bos=False, eos=False)

    def _drops(self, tool: dict[str, Any]) -> int:
        return len({*tool, *tool["function"]} - {"type", "function", "name", "description", "parameters"})

    def _prompt(self, conversation: Conversation) -> list[int]:
        from mistral_common.exceptions import MistralCommonException
        from mistral_common.protocol.instruct.request import ChatCompletionRequest

        if next((message.role for message in conversation.messages if message.role != "system"), None) != "user":
            raise Refused("order", "Mistral's format begins with the user", "put a user message first")
        messages, tools = _openai(conversation)
        try:
            request = ChatCompletionRequest.from_openai(messages=messages, tools=tools)
            return list(self._mistral.encode_chat_completion(request).tokens)
        except (MistralCommonException, ValueError, AssertionError) as error:
            raise Refused("template", f"mistral-common: {' '.join(str(error).split())}") from error

    def _answered(self, before: Conversation, shown: Conversation) -> Answered:
        message = shown.messages[-1]
        if message.calls and message.content:
            raise Refused("words_and_calls", "Mistral v3 has words or tool calls in one answer, not both",
                          "drop the words, or make them an answer of its own")  # fmt: skip
        prompt, ids = self._prompt(before), self._prompt(shown)
        calls = [{"name": call.name, "arguments": call.arguments, "id": call.id} for call in message.calls]
        wrote = f"[TOOL_CALLS] {json_text(calls)}" if calls else message.content
        return Answered(prompt, ids, self.decode(ids[len(prompt) : -1]), wrote, self.decode(ids))


class HFRenderer(Renderer):
    """A Hugging Face tokenizer with its chat template: prompts are those of its ``apply_chat_template``."""

    name = "hf"
    _nine = False

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = cast(Any, tokenizer)
        self.vocabulary = len(self._tokenizer)
        special = {token.content for token in self._tokenizer.added_tokens_decoder.values() if token.special}
        special |= set(self._tokenizer.all_special_tokens)
        self._control = re.compile("|".join((SURROGATES, *map(re.escape, sorted(special, key=len, reverse=True)))))
        bos, eos = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.bos_id = bos if bos in self._tokenizer.encode("a")[:1] and bos not in self._encode("a") else None
        self.eos_ids = () if eos is None else (eos,)
        self._options: dict[str, bool] = {}
        self._chat_bos = None
        try:
            self._broken = self._probe(bos)
        except Refused as error:
            self._broken = error  # plain text can still be rendered
        fast = self._tokenizer.is_fast
        words = self._tokenizer.backend_tokenizer.to_str() if fast else json_text(self._tokenizer.get_vocab())
        rules = (self._tokenizer.chat_template, bos, self.eos_ids, self._options)
        self.fingerprint = _digest(self.name, words, repr(rules))

    def _probe(self, bos: int | None) -> Refused | None:
        """Finds the token that ends an answer, and whether thinking must be off for an answer to be its words alone."""
        roles = ("user", "assistant", "user", "assistant")
        spoken = Conversation(tuple(Message(role, f"zq{at}") for at, role in enumerate(roles)))
        for options in ({}, {"enable_thinking": False}):
            self._options = options
            head, full = self._text(replace(spoken, messages=spoken.messages[:3]), True), self._text(spoken, False)
            found = self._control.search(full, len(head))
            if found and full.startswith(head) and full[len(head) : found.start()].strip() == "zq3":
                end = self._tokenizer.convert_tokens_to_ids(found.group())
                self.eos_ids = tuple(dict.fromkeys((end, *self.eos_ids)))
                # A BOS that opens every turn, as in some ChatML templates, is no mark of the beginning.
                self._chat_bos = bos if bos is not None and self._encode(full).count(bos) == 1 else None
                return None
        return Refused("template", "the chat template does not write an answer as prompt, words and end token",
                       "put a template that does into chat_template.jinja")  # fmt: skip

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([*map(int, ids)], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _drops(self, tool: dict[str, Any]) -> int:
        return 0  # templates write tools as JSON; their names are checked in every rendering

    def _text(self, conversation: Conversation, generate: bool) -> str:
        if self._tokenizer.chat_template is None:
            raise Refused("no_chat_template", "this tokenizer has no chat template",
                          "for a base model set data.instruction_layout: instruct")  # fmt: skip
        messages, tools = _openai(conversation)
        try:
            return self._tokenizer.apply_chat_template(
                messages, tools=tools, tokenize=False, add_generation_prompt=generate, **self._options
            )
        except Exception as error:  # a template is somebody's program: it may raise anything
            roles = " ".join(message.role for message in conversation.messages)
            raise Refused("template", f"the chat template refuses the roles {roles}: {error}",
                          "a system text can stand in the first user message") from error  # fmt: skip

    def _prompt(self, conversation: Conversation) -> list[int]:
        if self._broken is not None:
            raise Refused(self._broken.code, self._broken.what, self._broken.hint)
        return self._encode(self._text(conversation, True))

    def _answered(self, before: Conversation, shown: Conversation) -> Answered:
        prompt, head, full = self._prompt(before), self._text(before, True), self._text(shown, False)
        if not full.startswith(head):
            return Answered(prompt, self._encode(full), "", "", full)
        ids = self._continue([], head, prompt, full[len(head) :])
        end = next((at for at in range(len(prompt), len(ids)) if ids[at] in self.eos_ids), len(ids) - 1)
        wrote = full[len(head) :].partition(self.decode(ids[end : end + 1]))[0]
        return Answered(prompt, ids[: end + 1], self._between(ids, len(prompt), end), wrote, full)


def _openai(conversation: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools in OpenAI's form, but with parsed arguments."""
    messages: list[dict[str, Any]] = []
    for message in conversation.messages:
        entry: dict[str, Any] = {"role": message.role, "content": message.content}
        functions = [(call.id, {"name": call.name, "arguments": call.arguments}) for call in message.calls]
        calls = [{"id": key, "type": "function", "function": function} for key, function in functions]
        entry |= {"tool_calls": calls} if calls else {}
        entry |= {} if message.call_id is None else {"tool_call_id": message.call_id}
        entry |= {} if message.name is None else {"name": message.name}
        messages.append(entry)
    return messages, cast("list[dict[str, Any]]", list(conversation.tools)) or None


def _digest(*parts: str | bytes) -> str:
    digest = hashlib.sha256(RULES)
    for part in parts:
        data = part if isinstance(part, bytes) else part.encode()
        digest.update(len(data).to_bytes(8) + data)
    return digest.hexdigest()
