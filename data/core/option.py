"""Settings as fields of dataclasses: a default, a help text, and a closed list of choices where there is one."""

import dataclasses
import enum
from typing import Any


def option(default: Any, text: str, free: bool = False, of: type | None = None) -> Any:
    """Declare a dataclass field with its help text. `free`: may differ when a run is resumed.

    of: the field maps names to dataclasses of this type, set by `key.NAME.setting=value`; its default is `dict`.
    """
    metadata = {"help": text, "free": free, "of": of}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_choices(settings: Any) -> None:
    """Turn texts into the enums that the dataclass declares; ValueError names the choices."""
    for field in dataclasses.fields(settings):
        kind, value = type(field.default), getattr(settings, field.name)
        if isinstance(field.default, enum.Enum) and not isinstance(value, kind):
            if value not in list(kind):
                raise ValueError(f"{field.name}={value!r}: choose one of {', '.join(kind)}")
            setattr(settings, field.name, kind(value))
