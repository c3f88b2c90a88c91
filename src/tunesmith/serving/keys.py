"""Who may ask, which models, and how often."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Key:
    """``digest``: SHA-256 of the key. ``per_minute``: most requests; None: no limit. ``models``: those that
    it may ask; empty: all. ``admin``: whether it may change what is served."""

    name: str
    digest: str
    per_minute: int | None = None
    models: tuple[str, ...] = ()
    admin: bool = False
