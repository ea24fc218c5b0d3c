from __future__ import annotations

import json

import pytest

from stages.storage.sealing import SEAL, seal, unseal


def test_a_seal_opens_to_the_sealed_content() -> None:
    value = {"b": [1, {"a": None}], "c": "é"}
    content = seal(value)
    assert json.loads(content).keys() == {"b", "c", SEAL}
    assert unseal(content) == value


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"{", b"\xff", b'{"a": 1}'])
def test_content_without_its_seal_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError):  # also of JSON and of its encoding
        unseal(content)


def test_a_changed_digit_breaks_the_seal() -> None:
    with pytest.raises(ValueError, match="not as it was written"):
        unseal(seal({"a": 12}).replace(b"12", b"13"))
