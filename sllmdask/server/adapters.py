"""LoRA adapters in requests: the fields that name one, and adapters among the models. Pure: no sockets, no clock."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from sllmdask.errors import InvalidRequest

#: How ServerlessLLM's clients and its documentation name the adapter of a request.
FIELDS = ("lora_adapter_name", "adapter_name")


def split(body: Any) -> tuple[Any, str | None]:
    """`body` without the fields that name an adapter, and the name; raises :class:`InvalidRequest`."""
    if not isinstance(body, dict):
        return body, None
    names = {field: body[field] for field in FIELDS if body.get(field) is not None}
    for field, name in names.items():
        if not isinstance(name, str):
            raise InvalidRequest(f"{field} must be the name of an adapter, as a text.", field)
    if len(set(names.values())) > 1:
        raise InvalidRequest(f"{' and '.join(names)} name different adapters.", FIELDS[0])
    rest = {field: value for field, value in body.items() if field not in FIELDS}
    return rest, next(iter(names.values()), None) or None


def with_adapters(rows: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """`rows` of models, and behind each a row for each of its adapters, under the name by which a request may ask for it."""
    for row in rows:
        yield row
        for adapter in row.get("adapters") or ():
            yield {**row, "model": f"{row['model']}:{adapter}", "parent": row["model"]}
