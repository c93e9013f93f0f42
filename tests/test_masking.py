"""Known secrets are replaced in whatever form they are said; other text is left alone."""

import base64
import json
import urllib.parse

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hayhost.logs.masking import MASK, Masker, secrets_in

SECRET = "s3cr3t/+é'\"\\ x"


def masker(*secrets: str) -> Masker:
    one = Masker()
    one.add(secrets)
    return one


def basic(user: str, secret: str) -> str:
    return base64.b64encode(f"{user}:{secret}".encode()).decode()


@pytest.mark.parametrize(
    "said",
    [
        SECRET,
        json.dumps({"key": SECRET}),
        json.dumps({"key": SECRET}, ensure_ascii=False),
        repr([SECRET]),
        repr(ValueError(f"bad key {SECRET}")),
        f"https://x.example/?key={urllib.parse.quote(SECRET)}&a=1",
        f"https://x.example/?key={urllib.parse.quote(SECRET, safe='')}",
        f"https://x.example/?{urllib.parse.urlencode({'key': SECRET})}",
        f"Authorization: Basic {basic('u', SECRET)}",
        f"Authorization: Basic {basic('us', SECRET)}",
        f"Authorization: Basic {basic('use', SECRET)}",
        base64.urlsafe_b64encode(SECRET.encode()).decode(),
    ],
)
def test_forms(said: str) -> None:
    shown = masker(SECRET).text(said)
    assert MASK in shown
    assert "s3cr3t" not in shown
    for user in ("", "u:", "us:", "use:"):
        assert base64.b64encode((user + SECRET).encode()).decode()[4:14] not in shown


@given(before=st.text(), secret=st.text(min_size=6), after=st.text())
@example(before="", secret=MASK + "*", after="")
def test_no_secret_is_left(before: str, secret: str, after: str) -> None:
    one = masker(secret)
    shown = one.text(before + secret + after)
    assert secret not in shown.replace(MASK, "\0")


@given(st.text(alphabet="abcdef", max_size=2_000))
def test_what_is_no_secret_stays(text: str) -> None:
    assert masker("ghijkl", "mnopqrst").text(text) == text


def test_short_values_are_not_masked() -> None:
    assert masker("12345", "").text("12345 and nothing") == "12345 and nothing"


def test_of_two_secrets_one_within_the_other() -> None:
    assert masker("secret", "secret-and-more").text("a secret-and-more, a secret") == f"a {MASK}, a {MASK}"


def test_lines_of_a_long_secret() -> None:
    key = "-----BEGIN PRIVATE KEY-----\nMIIEvQIBADANBgkqhkiG9w0\nshort\n-----END PRIVATE KEY-----\n"
    one = masker(key)
    assert one.text("MIIEvQIBADANBgkqhkiG9w0") == MASK
    assert one.text("short") == "short"
    assert one.text(f"key: {key}") == f"key: {MASK}"


@pytest.mark.parametrize("cut", range(6, 20))
def test_a_secret_that_was_cut_off(cut: int) -> None:
    one = masker("secret-0123456789-abc")
    filling = "x" * 500
    assert one.text(filling + "secret-0123456789-abc"[:cut]) == filling + MASK
    told = "… (123 more characters)"
    assert one.text(filling + "secret-0123456789-abc"[:cut] + told) == filling + MASK + told
    assert one.text("the secret") == "the secret"  # too short to have been cut


def test_fields() -> None:
    one = masker("secret", "1234567")
    fields = {"a": "a secret", "secret": [{"b": ["secret"]}, 1234567, 12.5, True, None]}
    assert one.fields(fields) == {"a": f"a {MASK}", MASK: [{"b": [MASK]}, MASK, 12.5, True, None]}


def test_fields_that_are_too_deep() -> None:
    deep: list[object] = []
    for _ in range(100):
        deep = [deep]
    with pytest.raises(ValueError, match="nested deeper"):
        masker("secret").fields({"a": deep})


def test_tokens_of_hosts() -> None:
    token = f"hay_{'0' * 16}_{'a' * 43}"
    assert masker().text(f"Bearer {token}!") == f"Bearer {MASK}!"


def test_only_so_many_are_looked_for_and_the_longest_count() -> None:
    one = masker(*(f"value{number:06d}" for number in range(500)), "a-much-longer-one")
    assert one.text("a-much-longer-one") == MASK
    assert one.text("value000000" * 2).count(MASK) in (0, 2)


def test_secrets_in() -> None:
    value = {"a": ["one", {"b": "two"}], "c": 3, "d": None, "e": True, "f": 4.5}
    assert sorted(secrets_in(value)) == ["3", "4.5", "one", "two"]
    assert list(secrets_in(None)) == []
