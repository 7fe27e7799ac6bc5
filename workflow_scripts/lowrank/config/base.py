"""What every section of the config is made of: the base class, and types of values that can describe themselves."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Self, TypeVar, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    model_serializer,
    model_validator,
)
from pydantic_core import PydanticCustomError

LARGEST = 10**12
"""No count, length or seed is larger: every product of them that the study forms stays exact."""

_EXPONENT = re.compile(r"[-+]?\d+[eE][-+]?\d+")
Item = TypeVar("Item")


@dataclass(frozen=True)
class Says:
    """What a value must be, in words for the user: "must be <words>, not 0"."""

    words: str


def wrong(key: str, reason: str) -> PydanticCustomError:
    """The error of a check that types cannot state.

    Args:
        key: the key to blame; the message's YAML path ends with it. Empty for a check of one value.
        reason: what is wrong with it.
    """
    return PydanticCustomError("wrong_key", "{reason}", {"key": key, "reason": reason})


def _number(value: Any) -> Any:
    """YAML 1.1 reads `1e-3` as text, since it has no dot; everybody means the number."""
    return float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value


def _distinct(values: list[Item]) -> list[Item]:
    for index, value in enumerate(values):
        if value in values[:index]:
            raise wrong("", f"{value} is listed twice; keep one")
    return values


def _some_documents(documents: tuple[int, int | None]) -> tuple[int, int | None]:
    start, stop = documents
    if stop is not None and stop <= start:
        reason = f"[{start}, {stop}] holds no document; the second number must be the larger one"
        raise wrong("", reason)
    return documents


LONGEST_NAME = 50
"""Of the names of a config: SLURM's plugin makes a folder's name, which may have 255 bytes, of up to four of them."""

Text = Annotated[str, StringConstraints(min_length=1), Says("text")]
Name = Annotated[
    str,
    StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=LONGEST_NAME),
    Says(f"a name (letters, digits, `.`, `_`, `-`; a letter or digit first; at most {LONGEST_NAME})"),
]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$"), Says("a sha256 of 64 lower-case hex digits")]
Percent = Annotated[int, Field(ge=1, le=90)]
Positive = Annotated[int, Field(ge=1, le=LARGEST), Says("a whole number of at least 1")]
NotNegative = Annotated[int, Field(ge=0, le=LARGEST), Says("a whole number of at least 0")]
AtLeastTwo = Annotated[int, Field(ge=2, le=LARGEST), Says("a whole number of at least 2")]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1)]
Number = Annotated[float, BeforeValidator(_number)]
Share = Annotated[Number, Field(gt=0, lt=1)]
Distinct = Annotated[list[Item], AfterValidator(_distinct)]
Documents = Annotated[
    tuple[NotNegative, Positive | None],
    AfterValidator(_some_documents),
    Field(description="first document, and the one after the last (null: to the end)"),
    Says("a list of two whole numbers: the first document, and the one after the last (or null)"),
]


class Section(BaseModel):
    """Base of all sections: unknown keys are errors, types are not guessed, values do not change after the check."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    def plain(self) -> dict[str, Any]:
        """The section as a plain JSON value with all defaults filled in: what a rule passes to its stage."""
        return self.model_dump(mode="json")

    @classmethod
    def unread(cls, given: Mapping[str, Any]) -> dict[str, str]:
        """Keys that say nothing beside the others, each with the reason; they must be left out, or at their default.

        Both the check and the messages, which list the keys that may be named, ask this.

        Args:
            given: keys and values of an entry; of a wrong one too, so a value may be anything or missing.
        """
        return {}

    @classmethod
    def readable(cls, given: Mapping[str, Any]) -> list[str]:
        """The keys that an entry may name beside those given."""
        unread = cls.unread(given)
        return [key for key in cls.model_fields if key not in unread]

    @classmethod
    def default_of(cls, key: str) -> Any:
        """What a key is where an entry leaves it out."""
        return cls.model_fields[key].get_default(call_default_factory=True)

    @model_validator(mode="after")
    def _nothing_goes_unread(self) -> Self:
        for key, reason in self.unread({name: getattr(self, name) for name in type(self).model_fields}).items():
            if getattr(self, key) != self.default_of(key):
                raise wrong(key, reason)
        return self

    @model_serializer(mode="wrap")
    def _order_of_keys_means_nothing(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        """Mappings whose keys the user chooses are sorted: another order in YAML is the same value."""
        free = {name for name in type(self).model_fields if isinstance(getattr(self, name), dict)}
        return {key: dict(sorted(value.items())) if key in free else value for key, value in dump(self).items()}

    @model_validator(mode="before")
    @classmethod
    def _lists_are_tuples(cls, value: Any) -> Any:
        """YAML and JSON write a tuple as a list, which a strict check would refuse."""
        if not isinstance(value, dict):
            return value
        tuples = {name for name, field in cls.model_fields.items() if get_origin(field.annotation) is tuple}
        return {key: tuple(item) if key in tuples and isinstance(item, list) else item for key, item in value.items()}
