"""Names for types that several modules share."""

from collections.abc import Callable
from typing import Any

Json = dict[str, Any]  # an object in JSON, with what JSON can say
Report = Callable[[str, int, int, str], None]  # stage, steps done, steps in all, a note
