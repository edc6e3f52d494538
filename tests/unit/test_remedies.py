"""What an error text tells the user to do, where no group is needed for it; the rest is in
tests/contract/test_remedies.py."""

from __future__ import annotations

import re
import secrets
import subprocess
from pathlib import Path
from typing import Any

import pytest

from mpicoll.errors import GroupClosedError, InvalidCallError
from mpicoll.groups import registry
from mpicoll.stores import FileStore, TCPStore


def test_a_folder_that_others_can_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(InvalidCallError) as caught:
        FileStore(tmp_path)
    found = re.search(r"run: (chmod go-w .*)", str(caught.value))
    assert found
    subprocess.run(found[1].split(), check=True)
    store = FileStore(tmp_path)
    store.set("key", "value")
    assert store.get("key") == b"value"


def test_a_key_where_a_list_is_asked(tmp_path: Path) -> None:
    store = FileStore(tmp_path)
    store.set("key", "value")
    with pytest.raises(InvalidCallError, match=r"write \[key\]"):
        store.check("key")  # type: ignore[arg-type]
    assert store.check(["key"])


def test_a_store_that_was_closed() -> None:
    store = TCPStore("127.0.0.1", 0, is_master=True)
    store.close()
    with pytest.raises(GroupClosedError, match="make a new one"):
        store.set("key", "value")
    store = TCPStore("127.0.0.1", 0, is_master=True)
    store.set("key", "value")
    assert store.get("key") == b"value"
    store.close()


def test_a_store_of_several_tenants() -> None:
    with pytest.raises(InvalidCallError, match="share one TCPStore object instead"):
        TCPStore("127.0.0.1", 0, None, True, multi_tenant=True)
    store = TCPStore("127.0.0.1", 0, is_master=True)
    tenants = [store, store]
    tenants[0].set("key", "value")
    assert tenants[1].get("key") == b"value"
    store.close()


def test_a_store_for_other_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MPICOLL_STORE_SECRET", raising=False)
    with pytest.raises(InvalidCallError) as caught:
        TCPStore("0.0.0.0", 0, is_master=True)
    assert "secret=secrets.token_hex(16)" in str(caught.value)
    assert "set MPICOLL_STORE_SECRET" in str(caught.value)
    secret = secrets.token_hex(16)
    by_argument: dict[str, Any] = {"secret": secret}
    for given in (by_argument, {}):
        if not given:
            monkeypatch.setenv("MPICOLL_STORE_SECRET", secret)
        master = TCPStore("0.0.0.0", 0, is_master=True, **given)
        client = TCPStore("0.0.0.0", master.port, **given)
        client.set("key", "value")
        assert master.get("key") == b"value"
        client.close()
        master.close()


def test_a_backend_whose_name_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_factories", {})

    def factory(*args: Any, **options: Any) -> object:
        return object()

    with pytest.raises(InvalidCallError, match="choose another one"):
        registry.register_backend("auto", factory)
    registry.register_backend("another one", factory)
    assert registry.factory_of("another one") is factory
