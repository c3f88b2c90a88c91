"""A merged model as GGUF in llama.cpp's k-quants, whose errors are weighed by an importance matrix that is
measured on the run's own training rows.

llama.cpp quantises; the package that has it is an extra."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from tunesmith.errors import ExportError
from tunesmith.events import Sink
from tunesmith.exports import importance
from tunesmith.exports.kind import Importance, Tolerance, Tuned, register
from tunesmith.exports.kinds.gguf import MergedGGUF
from tunesmith.model.gguf import ggml

INSTEAD = "--to gguf-q5_0, which needs no training rows"


class MixedGGUF(MergedGGUF):
    """Abstract."""

    def require_installed(self) -> None:
        ggml.library()

    def accepts(self, tuned: Tuned) -> None:
        super().accepts(tuned)
        if missing := [path for path in tuned.run.hashes["data"] if not Path(path).is_file()]:
            what = f"{self.name}: the importance matrix is measured on the training rows, which are gone"
            raise ExportError(what, where=missing[0], hint=f"put the file back, or {INSTEAD}")

    def importance(self, tuned: Tuned, notify: Sink) -> Importance:
        return importance.of_run(tuned, self.name, INSTEAD, notify)


@register
class GGUFQ6K(MixedGGUF):
    name: ClassVar[str] = "gguf-q6_k"
    what: ClassVar[str] = "merged model as GGUF, 6.6 bits a weight, with an importance matrix"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.02, p99=0.2, top=0.95, lost=0.25)
    more_precise: ClassVar[str | None] = "gguf-q8_0"
    type: ClassVar[str] = "Q6_K"


@register
class GGUFQ5KM(MixedGGUF):
    name: ClassVar[str] = "gguf-q5_k_m"
    what: ClassVar[str] = "merged model as GGUF, about 5.7 bits a weight, with an importance matrix"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.04, p99=0.4, top=0.92, lost=0.35)
    more_precise: ClassVar[str | None] = "gguf-q6_k"
    type: ClassVar[str] = "Q5_K_M"


@register
class GGUFQ4KM(MixedGGUF):
    name: ClassVar[str] = "gguf-q4_k_m"
    what: ClassVar[str] = "merged model as GGUF, about 4.9 bits a weight, with an importance matrix"
    tolerance: ClassVar[Tolerance] = Tolerance(kl=0.08, p99=1.5, top=0.87, lost=0.45)
    more_precise: ClassVar[str | None] = "gguf-q5_k_m"
    type: ClassVar[str] = "Q4_K_M"
