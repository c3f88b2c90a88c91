"""Screens a text while it grows, so that nothing that a guardrail redacts or blocks leaves.

The text is decided in segments of `STEP` characters. A segment is decided once the characters after it that
the guardrails need (`Guardrail.reach`) are there, or the text has ended; a detection that touches the end of
what was looked at waits for more. Where segments and windows end depends on the text alone, never on how it
arrives. A whole answer goes through the same steps, so what a stream shows is a prefix of what it shows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tunesmith.serving.guardrails.guardrail import WHOLE, Action, Detection, Direction, Guardrail, Span

STEP = 32
"""Characters that are decided together: few, so that a stream is not delayed."""
WHOLE_STEP = 16_384
"""The same where the whole text is there."""
BEFORE = 256
"""Characters before a segment that its window also shows: what is detected depends on the words before."""
LONGEST = 16_384
"""A window that grows because a detection touches its end grows no further."""


class _Track:
    """Decides a growing text for guardrails that have the same consequence for the delay."""

    def __init__(self, guardrails: Sequence[Guardrail], step: int) -> None:
        self._guardrails = guardrails
        whole = any(guardrail.reach() == WHOLE for guardrail in guardrails)
        self._step = WHOLE_STEP if whole else step
        self._reported = [0] * len(guardrails)
        self._grown: float | None = None
        """The reach that the next segment needs, if its window has grown."""
        self._wanted = 0.0
        """Characters of the text before which looking again is in vain."""
        self.decided = 0
        """The end of the last decided segment."""

    def decide(self, text: str, ended: bool, final: bool) -> Iterator[list[tuple[Guardrail, Span]]]:
        """The new detections of each further segment that can be decided, by their position. Nothing before
        the end of an earlier detection of the same guardrail is detected twice. ended: `text` has a border at
        its end. final: and nothing follows."""
        if not self._guardrails:
            return
        if final and not text:
            yield self._new(self._find(text, 0, final))
        while self.decided < len(text) and (ended or len(text) >= self._wanted):
            stop = (self.decided // self._step + 1) * self._step
            if stop > len(text):
                if not ended:
                    return
                stop = len(text)
            spans = self._look(text, stop, ended, final)
            if spans is None:
                return
            new = self._new(spans)
            # What a detection longer than its window covers is not looked at again.
            far = max((span.end for _, span in new), default=0)
            self.decided = max(stop, far) if self._grown else stop
            self._grown = None
            yield new

    def _look(self, text: str, stop: int, ended: bool, final: bool) -> list[tuple[int, Span]] | None:
        """What guardrails detect in the window of the segment before ``stop``; None if more of the text is
        needed."""
        reach = self._grown or self._reach()
        while True:
            end = stop + reach
            if end > len(text):
                if not ended:
                    self._wanted = end
                    return None
                end = len(text)
            complete = ended and end == len(text)
            spans = self._find(text, int(end), complete and final)
            touching = any(span.end == end and span.start < stop for _, span in spans)
            if complete or not touching or reach >= LONGEST:
                return [
                    (number, span) for number, span in spans if self.decided < span.end and span.start < stop
                ]
            reach *= 2
            self._grown = reach

    def _reach(self) -> float:
        reaches = [
            max(guardrail.reach() - self.decided, 1) if guardrail.opening else guardrail.reach()
            for guardrail in self._guardrails
        ]
        return max(reaches, default=1)

    def _find(self, text: str, end: int, final: bool) -> list[tuple[int, Span]]:
        first = max(0, self.decided - BEFORE)
        window = text[first:end]
        spans: list[tuple[int, Span]] = []
        for number, guardrail in enumerate(self._guardrails):
            whole = guardrail.reach() == WHOLE
            if (whole and not final) or ((whole or guardrail.opening) and first > 0):
                continue
            spans += [
                (number, Span(first + span.start, first + span.end, span.kind))
                for span in guardrail.find(window)
            ]
        return spans

    def _new(self, spans: Sequence[tuple[int, Span]]) -> list[tuple[Guardrail, Span]]:
        new: list[tuple[Guardrail, Span]] = []
        for number, span in sorted(spans, key=lambda numbered: (numbered[1].start, -numbered[1].end)):
            start = max(span.start, self._reported[number])
            if span.end > start or span.end == 0:
                self._reported[number] = span.end
                new.append((self._guardrails[number], Span(start, span.end, span.kind)))
        return new


class TextScreen:
    """Screens one text that arrives in parts. ``report`` is called with every detection."""

    def __init__(
        self,
        guardrails: Sequence[Guardrail],
        direction: Direction,
        report: Callable[[Detection], None],
        step: int = STEP,
    ) -> None:
        self._direction: Direction = direction
        self._report = report
        holding, flagging = (
            [guardrail for guardrail in guardrails if guardrail.action(direction) in actions]
            for actions in (("redact", "block"), ("flag",))
        )
        self._holding, self._flagging = _Track(holding, step), _Track(flagging, step)
        self._holds, self._looks = bool(holding), bool(holding or flagging)
        self._text = ""
        self._redacted: list[Span] = []
        self._shown = 0
        self.blocked: Detection | None = None
        """What blocked the text, from where on nothing is shown."""

    def feed(self, text: str) -> str:
        """What may be shown now."""
        if not self._looks:
            return text
        self._text += text
        return self._advance(ended=False, final=False)

    def pause(self) -> str:
        """What may be shown now that something else comes, after which the text may go on."""
        return self._advance(ended=True, final=False)

    def end(self) -> str:
        """What may be shown now that nothing follows."""
        return self._advance(ended=True, final=True)

    def _advance(self, ended: bool, final: bool) -> str:
        if self.blocked is not None:
            return ""
        for detected in self._flagging.decide(self._text, ended, final):
            for guardrail, span in detected:
                self._report(self._detection(guardrail, span, "flag"))
        if not self._holds:
            start, self._shown = self._shown, len(self._text)
            return self._text[start:]
        parts: list[str] = []
        for detected in self._holding.decide(self._text, ended, final):
            for guardrail, span in detected:
                action = guardrail.action(self._direction)
                detection = self._detection(guardrail, span, action)
                self._report(detection)
                if action == "block":
                    self.blocked = detection
                    return "".join([*parts, self._show(span.start)])
                self._redacted.append(span)
            parts.append(self._show(self._holding.decided))
        return "".join(parts)

    def _detection(self, guardrail: Guardrail, span: Span, action: Action) -> Detection:
        return Detection(guardrail.name, span.kind, self._direction, action)

    def _show(self, stop: int) -> str:
        """The text up to ``stop`` that was not shown, without what is redacted."""
        parts: list[str] = []
        for span in sorted(self._redacted, key=lambda span: (span.start, -span.end)):
            if span.end > self._shown and span.start < stop:
                parts += [self._text[self._shown : span.start], f"[{span.kind.upper()}]"]
                self._shown = span.end
        if self._shown < stop:
            parts.append(self._text[self._shown : stop])
            self._shown = stop
        self._redacted = [span for span in self._redacted if span.end > self._shown]
        return "".join(parts)


def screened(
    text: str, guardrails: Sequence[Guardrail], direction: Direction, report: Callable[[Detection], None]
) -> tuple[str, Detection | None]:
    """A complete text as it may be shown, and what blocked it or None."""
    screen = TextScreen(guardrails, direction, report, WHOLE_STEP)
    return screen.feed(text) + screen.end(), screen.blocked
