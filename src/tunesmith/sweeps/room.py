"""Is there memory for one more trial? Asked before a second process is started beside the first."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from tunesmith.errors import TunesmithError
from tunesmith.machine import memory
from tunesmith.preflight.plan import plan
from tunesmith.sweeps.spec import BaseSpec
from tunesmith.sweeps.trials import SweptSetting, configured


@dataclass
class TrialRoom:
    """What the trials of each setting need, as ``tunesmith plan`` estimates it, without loading weights."""

    base: BaseSpec
    settings: tuple[SweptSetting, ...]
    _needed: dict[int, int] = field(default_factory=dict)

    def needed(self, setting: int) -> int:
        """Bytes of a whole process, at the high end of the interval; 0 if that cannot be said."""
        if setting not in self._needed:
            try:
                resolved = configured(self.base, self.settings[setting].changes, os.environ)
                self._needed[setting] = round(plan(resolved).forecast.needed.high)
            except TunesmithError:  # the trial says what is wrong with it
                self._needed[setting] = 0
        return self._needed[setting]

    @staticmethod
    def free() -> int:
        """Bytes that other programs, and the trials that run, leave."""
        return memory.room().free
