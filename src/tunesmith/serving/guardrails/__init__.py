"""Which texts may reach the model, and which may leave it? Guardrails screen prompts and answers, and flag,
redact or block what they detect."""

from tunesmith.serving.guardrails.answers import AnswerScreen, Guard, PromptBlocked
from tunesmith.serving.guardrails.guardrail import Action, Detection, Guardrail, Span, register
from tunesmith.serving.guardrails.screening import TextScreen, screened
from tunesmith.serving.guardrails.settings import guardrail_settings, load_guardrails, table

__all__ = [
    "Action",
    "AnswerScreen",
    "Detection",
    "Guard",
    "Guardrail",
    "PromptBlocked",
    "Span",
    "TextScreen",
    "guardrail_settings",
    "load_guardrails",
    "register",
    "screened",
    "table",
]
