"""Checksums: of a file's content, and of JSON that carries a checksum of itself."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from stages.storage.files import to_json

SEAL = "checksum"


def seal(value: dict[str, Any]) -> bytes:
    """Encode `value` as JSON with a checksum of the rest of its content."""
    return to_json(value | {SEAL: _digest(value)})


def unseal(content: bytes) -> dict[str, Any]:
    """Decode the output of `seal`.

    Raises:
        ValueError: the content is not JSON, or not what its checksum says.
    """
    value = json.loads(content)
    if not isinstance(value, dict) or value.pop(SEAL, None) != _digest(value):
        raise ValueError("not as it was written")
    return value


def _digest(value: dict[str, Any]) -> str:
    return sha256(json.dumps(value, sort_keys=True).encode())


def sha256(content: bytes) -> str:
    """Return the SHA-256 of a file's content, in hexadecimal."""
    return hashlib.sha256(content).hexdigest()
