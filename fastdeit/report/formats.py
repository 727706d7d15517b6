"""Numbers, durations and times as the page writes them."""

from datetime import datetime


def percent(share: float | None, digits: int = 2) -> str:
    return "–" if share is None else f"{100 * share:.{digits}f}"


def duration(seconds: float) -> str:
    """3.4 s, 2 min 05 s, 7 h 03 min, 2 d 4 h."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def moment(seconds: float) -> str:
    """A time of the clock in the local zone; seconds since 1970."""
    when = datetime.fromtimestamp(seconds)
    return f"{when.day} {when:%B %Y, %H:%M}"


def count(number: int, name: str) -> str:
    return f"{number:,} {name}{'' if number == 1 else 's'}"
