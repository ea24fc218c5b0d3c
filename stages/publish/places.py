"""Files that name places on this machine, as they are uploaded. The files here stay as they are."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import yaml

from stages.base.places import map_strings, public
from stages.errors import UserError
from stages.records.plans import DATASET_FILE, plan_digests
from stages.records.schema import DatasetInfo
from stages.storage.fields import read_fields
from stages.storage.files import to_json
from stages.storage.sealing import seal, unseal

CONFIG_FILE, GENERATION_FILE = "config.yaml", "generation.json"
DATA = (".json", ".yaml")
TEXT = (*DATA, ".html", ".md")
UNDECODED = "surrogateescape"  # bytes that are no UTF-8 stay as they are


def public_contents(contents: dict[str, bytes], info: DatasetInfo) -> dict[str, bytes]:
    """The files of a dataset without the places on this machine, and without the options of the run that made it.

    A commit record carries the digest of its unit's plan. Where a place was part of that plan, as that of the prompts
    is, the record gets the digest of the plan as it is published. Everything else stays as it is, byte for byte.
    """
    described = unseal(contents[DATASET_FILE])
    published = map_strings(described, public)
    digests = zip(plan_digests(info), plan_digests(read_fields(DatasetInfo, published)), strict=True)
    renamed = {old: new for (_, old), (_, new) in digests if old != new}
    changed = {DATASET_FILE: seal(published)} if published != described else {}
    for name in [name for name in contents if renamed and name.startswith("commits/")]:
        commit = unseal(contents[name])
        if commit["plan"] in renamed:
            changed[name] = seal(commit | {"plan": renamed[commit["plan"]]})
    if CONFIG_FILE in contents:
        changed[CONFIG_FILE] = _to_yaml(published["config"])
    if GENERATION_FILE in contents:
        changed[GENERATION_FILE] = to_json(_counts(json.loads(contents[GENERATION_FILE])))
    return contents | changed


def _counts(generation: dict[str, Any]) -> dict[str, Any]:
    """The content of `generation.json` without its workers' addresses, and the words of errors, which name places."""
    return {key: value for key, value in generation.items() if key not in ("workers", "quarantined")}


def public_texts(texts: dict[str, bytes]) -> dict[str, bytes]:
    """Texts without the places on this machine that one of them holds as a value.

    Raises:
        UserError: one of them is damaged.
    """
    values = {name: _value(name, text) for name, text in texts.items() if name.endswith(DATA)}
    strings = {string for value in values.values() for string in _strings(value)}
    places = {place: new for place in strings if (new := public(place)) != place}
    changed = {}
    for name, text in texts.items():
        if name not in values:
            changed[name] = _without(text.decode(errors=UNDECODED), places, (str, _in_html)).encode(errors=UNDECODED)
        elif (value := map_strings(values[name], partial(_without, places=places))) != values[name]:
            changed[name] = to_json(value) if name.endswith(".json") else _to_yaml(value)
    return texts | changed


def _without(text: str, places: dict[str, str], spellings: tuple[Callable[[str], str], ...] = (str,)) -> str:
    """Replace places where they begin in a text; not within a word or a picture in base64."""
    for place in sorted(places, key=len, reverse=True):  # the longest first: it may begin with another one
        for spelled in spellings:
            found = rf"(?<![\w<+/.:-]){re.escape(spelled(place))}(?![\w+=-])"
            text = re.sub(found, lambda _: spelled(places[place]), text)  # noqa: B023  called at once
    return text


def _in_html(text: str) -> str:
    """Escape a text as Jinja does."""
    return html.escape(text, quote=False).replace('"', "&#34;").replace("'", "&#39;")


def _to_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False, allow_unicode=True).encode()


def _value(name: str, text: bytes) -> Any:
    """
    Raises:
        UserError: the text is damaged.
    """
    try:
        return (json.loads if name.endswith(".json") else yaml.safe_load)(text)
    except (yaml.YAMLError, ValueError) as error:
        raise UserError(f"{name}: is damaged: write it again, or remove it; nothing was uploaded") from error


def _strings(value: Any) -> Iterator[str]:
    inner = [value]
    while inner:
        value = inner.pop()
        if isinstance(value, str):
            yield value
        else:
            inner += value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
