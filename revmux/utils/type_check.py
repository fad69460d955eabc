"""Type checks of values that are read from files into a dataclass."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from revmux.errors import UserError


def check_types(settings: type, values: Mapping[str, Any], where: str) -> None:
    """Check that values have the types of their fields. An integer is valid for a float; a string is not.

    Args:
        settings: the dataclass.
        values: values by field name. Missing fields keep their defaults.
        where: where the values come from, for the error message.

    Raises:
        UserError: a value has the wrong type.
    """
    for name, value in values.items():
        try:
            _checker(settings, name).validate_python(value, strict=True)
        except ValidationError as error:
            # The code that uses a choice checks it, with an error that lists the valid values.
            wrong = [problem for problem in error.errors() if problem["type"] != "literal_error"]
            if wrong:
                place = ".".join(str(part) for part in (name, *wrong[0]["loc"]))
                raise UserError(
                    f"{where}: {place} is {wrong[0]['input']!r:.80}: {wrong[0]['msg'].lower()}; correct it"
                ) from None


@cache
def _checker(settings: type, name: str) -> TypeAdapter[Any]:
    """Checks a field of a dataclass. Building one takes far longer than a check."""
    return TypeAdapter(get_type_hints(settings)[name])
