from __future__ import annotations

import pytest

from stages.app.server import address_of, listen
from stages.errors import UserError


def test_a_port_in_use_is_refused() -> None:
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of(listener) == f"http://127.0.0.1:{port}"
        with pytest.raises(UserError, match=f"port={port}: .*in use.*: name another port"):
            listen("127.0.0.1", port)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(UserError, match="host=192.0.2.1 port=0: "):
        listen("192.0.2.1", 0)
