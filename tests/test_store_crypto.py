"""What the store encrypts: with which keys, for which place only, and how keys are exchanged."""

import asyncio
import base64
import os
import re
import stat
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from hayhost.installs import Auth
from hayhost.store import Keyring, NotFoundError, SecretKeyError, StoreError, rotation, schema
from hayhost.store.keys import VARIABLE, Place

from .storing import BACKENDS, KEYS, make_url, opened, run, sql

OLD, NEW = b"k" * 32, b"n" * 32
BOTH, OLD_FIRST = Keyring([NEW, OLD]), Keyring([OLD, NEW])
AUTH = Auth("apiKey", {"apiKey": "sk_5ecret"})
TEXT = st.text(max_size=8)


@pytest.fixture(params=BACKENDS)
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return make_url(request.param, tmp_path)


@given(TEXT, TEXT, TEXT, TEXT, st.binary(max_size=50))
def test_what_is_sealed_opens_in_its_place(purpose: str, org: str, plugin: str, field: str, plain: bytes) -> None:
    place = Place(purpose, org, plugin, field)
    sealed = KEYS.seal(plain, place)
    assert KEYS.open(sealed, place) == plain
    assert sealed != KEYS.seal(plain, place)
    parts = [purpose, org, plugin, field]
    for position in range(4):  # also when characters move from one part to its neighbour
        moved = parts.copy()
        moved[position] += "x"
        with pytest.raises(SecretKeyError):
            KEYS.open(sealed, Place(*moved))
        if position and parts[position]:
            moved = parts.copy()
            moved[position - 1] += moved[position][0]
            moved[position] = moved[position][1:]
            with pytest.raises(SecretKeyError):
                KEYS.open(sealed, Place(*moved))


def test_every_byte_counts() -> None:
    place = Place("config", "acme", "stripe", "key")
    version, identifier, encoded = KEYS.seal(b"5ecret", place).split(".")
    data = base64.urlsafe_b64decode(encoded)
    for position in range(len(data)):
        changed = data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]
        with pytest.raises(SecretKeyError, match="acme/stripe/key: does not decrypt"):
            KEYS.open(f"{version}.{identifier}.{base64.urlsafe_b64encode(changed).decode()}", place)
    for wrong in ("", ".", "v1", "v1..", f"v1.{identifier}.", f"v1.{identifier}.é", f"v2.{identifier}.{encoded}"):
        with pytest.raises(SecretKeyError):
            KEYS.open(wrong, place)
    with pytest.raises(SecretKeyError, match=rf"encrypted with the key {identifier}, which is not among"):
        Keyring([NEW]).open(f"{version}.{identifier}.{encoded}", place)


def test_keys_are_read_from_hex_and_base64(tmp_path: Path) -> None:
    key = bytes(range(220, 252))
    forms = [key.hex(), key.hex().upper(), base64.b64encode(key).decode(), base64.urlsafe_b64encode(key).decode()]
    forms += [form.rstrip("=") for form in forms[2:]]
    for form in forms:
        assert Keyring.load(tmp_path / "none", {VARIABLE: f" {form} ,\n"}).ids == Keyring([key]).ids
    several = Keyring.load(tmp_path / "none", {VARIABLE: f"{NEW.hex()},{OLD.hex()}"})
    assert several.ids == BOTH.ids
    assert several.primary == BOTH.primary
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "there is no key"),
        (" , ", "there is no key"),
        (OLD.hex()[:-2], "key 1 is not 32 bytes"),
        (f"{OLD.hex()},{NEW.hex()}00", "key 2 is not 32 bytes"),
        (f"{OLD.hex()},{OLD.hex()}", "key 2 is there twice"),
        ("0" * 64, "key 1 is not 32 bytes"),
        ("correct horse battery staple", "key 1 is not 32 bytes"),
        ("é" * 43, "key 1 is not 32 bytes"),
    ],
)
def test_wrong_keys_are_explained_and_not_shown(text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(SecretKeyError) as caught:
        Keyring.load(tmp_path / "none", {VARIABLE: text})
    assert str(caught.value).startswith(f"HAYHOST_SECRET_KEY: {told}")
    assert caught.value.__suppress_context__
    for word in filter(None, re.split(r"[ ,]", text)):
        assert word not in str(caught.value)


def test_a_key_file_is_made_once_and_for_its_owner_only(tmp_path: Path) -> None:
    file = tmp_path / "new" / "secret.key"
    made = Keyring.load(file, {})
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert Keyring.load(file, {}).ids == made.ids
    assert [path.name for path in file.parent.iterdir()] == ["secret.key"]
    text = file.read_text()
    assert text.strip() not in repr(made)
    file.write_text(f"{NEW.hex()}\n{text}")
    assert Keyring.load(file, {}).ids == (Keyring([NEW]).primary, made.primary)


def test_key_files_that_cannot_be_trusted_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "secret.key"
    file.write_text(OLD.hex())
    for mode in (0o640, 0o604, 0o620, 0o666):
        file.chmod(mode)
        with pytest.raises(SecretKeyError, match=r"can be read or changed by others; use `chmod 600"):
            Keyring.load(file, {})
    file.chmod(0o600)
    assert Keyring.load(file, {}).ids == KEYS.ids
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(SecretKeyError, match="is not a key file"):
        Keyring.load(file, {})
    file.write_text("")
    with pytest.raises(SecretKeyError, match=r"secret\.key: there is no key"):
        Keyring.load(file, {})
    file.unlink()
    os.mkfifo(file, 0o600)
    with pytest.raises(SecretKeyError, match="is not a key file"):
        Keyring.load(file, {})
    file.unlink()
    file.symlink_to(tmp_path / "nowhere")
    for wrong in (file, tmp_path, Path("/proc/none/key")):
        with pytest.raises(SecretKeyError):
            Keyring.load(wrong, {})


def test_no_secret_is_in_the_database_as_it_is(url: str, tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")
            config = {"key": "sk_5ecret", "shown": "here"}
            await store.installations.put(
                "stripe", "acme", if_revision=0, actor="t", config=config, sensitive=["key"], auth=AUTH
            )
            dump = str(await sql(url, "SELECT * FROM installations")) + str(await sql(url, "SELECT * FROM audit"))
            assert "here" in dump
            assert "5ecret" not in dump

    run(main())
    for file in tmp_path.glob("store.db*"):
        assert b"5ecret" not in file.read_bytes()


@pytest.mark.parametrize(
    "column", ["sealed", "credentials", "'{\"b\":' || substr(sealed, 6) AS sealed", "credentials_of_other_plugin"]
)
def test_what_is_copied_elsewhere_does_not_decrypt(url: str, column: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            for org, plugin in (("acme", "stripe"), ("evil", "stripe"), ("acme", "crm")):
                if plugin == "stripe":
                    await store.orgs.create(org, actor="t")
                await store.installations.put(
                    plugin, org, if_revision=0, actor="t", config={"a": org}, sensitive=["a"], auth=AUTH
                )
            org, plugin = ("acme", "crm") if column == "credentials_of_other_plugin" else ("evil", "stripe")
            if " AS " in column:  # the field a as field b of the same row
                org, plugin = "acme", "stripe"
            expression = column.replace("_of_other_plugin", "").split(" AS ")[0]
            target = column.replace("_of_other_plugin", "").split(" AS ")[-1]
            source = f"(SELECT {expression} FROM installations WHERE org = 'acme' AND plugin = 'stripe')"
            await sql(url, f"UPDATE installations SET {target} = {source} WHERE org = '{org}' AND plugin = '{plugin}'")
            with pytest.raises(SecretKeyError, match=f"{org}/{plugin}/.*: does not decrypt: it was tampered with"):
                await store.installations.get(plugin, org)
            with pytest.raises(SecretKeyError):
                await store.installs.load(plugin, org)
            assert (await store.installations.of_org(org)).items

    run(main())


def test_a_flow_of_another_plugin_does_not_decrypt(url: str) -> None:
    async def main() -> None:
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")
            state = await store.flows.begin("crm", "acme", "oauth", verifier="v", browser="b", actor="t")
            await sql(url, "UPDATE oauth_flows SET plugin = 'evil'")
            with pytest.raises(SecretKeyError):
                await store.flows.take(state, browser="b", actor="t")
            with pytest.raises(NotFoundError):
                await store.flows.take(state, browser="b", actor="t")

    run(main())


def test_a_store_with_the_wrong_keys_does_not_open(url: str) -> None:
    async def main() -> None:
        async with opened(url):
            pass
        told = f"encrypted with the key {KEYS.primary}, which is not among the given keys"
        with pytest.raises(SecretKeyError, match=told) as caught:
            await opened(url, Keyring([NEW])).__aenter__()
        assert NEW.hex() not in str(caught.value)
        assert await sql(url, "SELECT count(*) FROM secret_keys") == [(1,)]
        async with opened(url, BOTH):
            pass
        with pytest.raises(SecretKeyError):
            await opened(url).__aenter__()
        await sql(url, "UPDATE secret_keys SET proof = (SELECT min(proof) FROM secret_keys)")
        with pytest.raises(SecretKeyError):
            await opened(url, BOTH).__aenter__()

    run(main())


def test_hosts_with_different_keys_that_start_at_once_do_not_both_open(url: str) -> None:
    async def main() -> None:
        stores = [opened(url, Keyring([bytes([number]) * 32])) for number in range(1, 4)]
        results = await asyncio.gather(*(store.__aenter__() for store in stores), return_exceptions=True)
        [winner] = [result for result in results if not isinstance(result, BaseException)]
        assert all(isinstance(result, SecretKeyError) for result in results if result is not winner)
        await winner.__aexit__()

    run(main())


def test_a_rotation_leaves_nothing_to_the_old_key(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "_BATCH", 3)

    async def main() -> None:
        made = []
        async with opened(url) as store:
            await store.orgs.create("acme", actor="t")
            for number in range(10):
                config = {"s": number, "n": 1}
                values: dict[str, Any] = {"config": config, "sensitive": ["s"]} if number % 2 else {"auth": AUTH}
                made.append(await store.installations.put(f"p{number}", "acme", if_revision=0, actor="t", **values))
            await store.installations.put("plain", "acme", if_revision=0, actor="t", config={"n": 1})
            state = await store.flows.begin("p1", "acme", "oauth", verifier="v", browser="b", actor="t")
        async with opened(url, BOTH) as store:
            rewritten = 0
            batch = rotation._batch

            async def broken_off(*arguments: Any) -> Any:
                nonlocal rewritten
                if rewritten:
                    raise StoreError("broken off")
                done = await batch(*arguments)
                rewritten += len(done)
                return done

            monkeypatch.setattr(rotation, "_batch", broken_off)
            with pytest.raises(StoreError, match="broken off"):
                await store.rotate(actor="t")
            monkeypatch.setattr(rotation, "_batch", batch)
            assert await store.rotate(actor="t") + rewritten == 11
            assert await store.rotate(actor="t") == 0
            entry = (await store.audit.list(action="keys.rotate")).items[0]
            assert entry.details["retired"] == [KEYS.primary]
        assert KEYS.primary not in str(await sql(url, "SELECT * FROM installations"))
        async with opened(url, Keyring([NEW])) as store:
            for before in made:
                assert await store.installations.get(before.plugin, "acme") == before
            assert (await store.flows.take(state, browser="b", actor="t")).verifier == "v"
        with pytest.raises(SecretKeyError):
            await opened(url).__aenter__()

    run(main())


def test_a_rotation_while_hosts_write_loses_nothing(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rotation, "_BATCH", 2)

    async def main() -> None:
        async with opened(url, OLD_FIRST) as old, opened(url, BOTH) as new:
            await old.orgs.create("acme", actor="t")
            written: dict[str, int] = {}

            async def write(plugin: str) -> None:
                for number in range(1_000):
                    await old.installations.put(
                        plugin, "acme", if_revision=None, actor="t", config={"n": number}, sensitive=["n"]
                    )
                    written[plugin] = number
                raise AssertionError("the key was never retired")

            writers = [asyncio.create_task(write(f"p{number}")) for number in range(8)]
            while len(written) < 8:
                await asyncio.wait(writers, timeout=0.01)
            await new.rotate(actor="t")
            for result in await asyncio.gather(*writers, return_exceptions=True):
                assert isinstance(result, SecretKeyError)
                assert "was retired by a rotation" in str(result)
            found = {
                item.plugin: item.config for item in [await old.installations.get(name, "acme") for name in written]
            }
            assert found == {plugin: {"n": number} for plugin, number in written.items()}
            async with new._database.read() as connection:
                query = sa.select(schema.installations.c.key_id).distinct()
                assert list((await connection.execute(query)).scalars()) == [BOTH.primary]
        async with opened(url, Keyring([NEW])) as store:
            for plugin, number in written.items():
                assert (await store.installations.get(plugin, "acme")).config == {"n": number}

    run(main())


def test_what_does_not_decrypt_stops_a_rotation_and_retires_no_key(url: str) -> None:
    async def main() -> None:
        async with opened(url, OLD_FIRST) as store:
            await store.orgs.create("acme", actor="t")
            await store.installations.put("stripe", "acme", if_revision=0, actor="t", auth=AUTH)
            await sql(url, "UPDATE installations SET credentials = credentials || 'AAAA'")
        async with opened(url, BOTH) as store:
            with pytest.raises(SecretKeyError, match="acme/stripe/credentials"):
                await store.rotate(actor="t")
            assert await sql(url, "SELECT count(*) FROM secret_keys") == [(2,)]

    run(main())
