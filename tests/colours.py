"""Whether words and lines of a page stand out from what they are on: contrast as WCAG 2.2 counts it."""

from __future__ import annotations

from typing import Any

GROUNDS = ("ground", "card", "chip")
WORDS = ("ink", "soft", "link", "error", "warning", "note", "good")
SHOWN = (("screen", "light"), ("screen", "dark"), ("print", "dark"))


def light(colour: str) -> float:
    """Relative luminance of ``#rgb`` or ``#rrggbb``."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def require(tab: Any, media: str, scheme: str, lines: tuple[str, ...] = ()) -> None:
    """4.5 for words on each ground, 3 for ``lines`` on cards; dark only on a dark screen. Leaves the page as
    it is shown so."""
    tab.emulate_media(media=media, color_scheme=scheme)
    found = tab.evaluate(
        """names => {
            const style = getComputedStyle(document.documentElement);
            return Object.fromEntries(names.map(name => [name, style.getPropertyValue('--' + name).trim()]));
        }""",
        [*GROUNDS, *WORDS, *lines],
    )
    assert (light(found["ground"]) < 0.5) == ((media, scheme) == ("screen", "dark"))
    for one, ground, least in [(word, ground, 4.5) for word in WORDS for ground in GROUNDS] + [
        (one, "card", 3) for one in lines
    ]:
        high, low = sorted((light(found[one]), light(found[ground])), reverse=True)
        assert (high + 0.05) / (low + 0.05) >= least, (media, scheme, one, ground)
