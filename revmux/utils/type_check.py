"""Values from files held to the types of the dataclass that they fill."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from revmux.errors import UserError


def check_types(settings: type, values: Mapping[str, Any], where: str) -> None:
    """Refuse values that are not of their field's type; a whole number serves for a float, a text for no number.

    Args:
        settings: the dataclass.
        values: by field; fields that are missing keep their defaults.
        where: they come from, for the message.

    Raises:
        UserError: naming the field, its value and what it should be.
    """
    types = get_type_hints(settings)
    for name, value in values.items():
        try:
            TypeAdapter(types[name]).validate_python(value, strict=True)
        except ValidationError as error:
            # Choices are checked by what they decide, which names the legal ones.
            wrong = [problem for problem in error.errors() if problem["type"] != "literal_error"]
            if wrong:
                place = ".".join(str(part) for part in (name, *wrong[0]["loc"]))
                raise UserError(
                    f"{where}: {place} is {wrong[0]['input']!r:.80}: {wrong[0]['msg'].lower()}; correct it"
                ) from None
