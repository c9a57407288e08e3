"""Numbers, loopback addresses and endpoints."""

from __future__ import annotations

from ipaddress import IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.errors import UsageError
from appliance.protocol import address

HOST = st.from_regex(r"[a-z0-9]([a-z0-9.-]{0,40}[a-z0-9])?", fullmatch=True)
V6 = st.integers(min_value=0, max_value=2**128 - 1).map(lambda value: str(IPv6Address(value)))
PORT = st.integers(min_value=0, max_value=65535)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1, "127.1.0.1"),
        (255, "127.1.0.255"),
        (256, "127.1.1.0"),
        (65536, "127.2.0.0"),
        (address.MAX_SE_NUMBER, "127.127.255.255"),
    ],
)
def test_number_one_is_the_address_of_the_source_document(number: int, text: str) -> None:
    assert address.se_address(number) == text
    assert address.se_number(text) == number


@given(st.integers(min_value=1, max_value=address.MAX_SE_NUMBER))
def test_every_se_number_survives_the_way_there_and_back(number: int) -> None:
    assert address.se_number(address.se_address(number)) == number


@pytest.mark.parametrize("number", [-1, 0, address.MAX_SE_NUMBER + 1])
def test_a_number_without_an_address_is_refused(number: int) -> None:
    with pytest.raises(UsageError, match=f"SE number {number} is outside"):
        address.se_address(number)


@pytest.mark.parametrize(
    "text",
    ["127.0.0.1", "127.1.0.0", "127.128.0.1", "128.1.0.1", "0.0.0.0", "", "localhost", "127.1", "::1", "127.1.0.01"],
)
def test_an_address_that_is_no_ses_has_no_number(text: str) -> None:
    assert address.se_number(text) is None


@pytest.mark.parametrize(("number", "text"), [(1, "127.128.0.1"), (address.MAX_NODE_NUMBER, "127.128.255.255")])
def test_nodes_have_a_range_of_their_own(number: int, text: str) -> None:
    assert address.node_address(number) == text
    assert address.se_number(text) is None


@pytest.mark.parametrize("number", [-1, 0, address.MAX_NODE_NUMBER + 1])
def test_a_node_number_without_an_address_is_refused(number: int) -> None:
    with pytest.raises(UsageError, match=f"node number {number} is outside"):
        address.node_address(number)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("controller.example", ("controller.example", 8443)),
        ("controller.example.:1", ("controller.example.", 1)),
        ("192.0.2.1:0", ("192.0.2.1", 0)),
        ("a:65535", ("a", 65535)),
        ("2001:db8::1", ("2001:db8::1", 8443)),
        ("[2001:db8::1]", ("2001:db8::1", 8443)),
        ("[::]:8443", ("::", 8443)),
    ],
)
def test_an_endpoint_is_host_and_port(text: str, expected: tuple[str, int]) -> None:
    assert address.parse_endpoint(text, default_port=8443) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":1",
        "a:",
        "a:65536",
        "a:-1",
        "a:+1",
        "a:1_0",
        "a:٣",
        "a:" + "9" * 5000,
        "a b:1",
        "a\n:1",
        "-oProxyCommand=x",
        "a/b",
        "user@a",
        "x" * 254,
        "a:b:c",
        "[::1",
        "[]:1",
        "[::1]1",
        "[::1]:",
        "[::1]]",
        "[controller.example]:1",
        "https://a",
    ],
)
def test_what_is_no_endpoint_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UsageError, match="is no address") as caught:
        address.parse_endpoint(text, default_port=8443)
    assert "for example" in caught.value.hint


@given(HOST | V6, PORT)
def test_every_endpoint_survives_the_way_there_and_back(host: str, port: int) -> None:
    assert address.parse_endpoint(address.format_endpoint(host, port), default_port=1) == (host, port)


@given(st.text(max_size=80))
def test_any_text_is_parsed_or_refused(text: str) -> None:
    try:
        host, port = address.parse_endpoint(text, default_port=8443)
    except UsageError:
        return
    assert not set(host) & set(" \t\r\n/@[]")
    assert 0 <= port <= 65535
