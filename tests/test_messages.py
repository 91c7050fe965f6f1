"""The schema: a message that is right becomes one typed value, anything else one Malformed that says what is wrong and
whose answer finds its way (README, messages)."""

from __future__ import annotations

import datetime
import decimal
import enum
import itertools
import json
import math
import re
import tracemalloc
import uuid
from typing import Any, get_args

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from msgspec import UNSET, Raw

from raftnode import messages
from raftnode.config import Settings
from raftnode.errors import NotCommitted, ProtocolError, RaftnodeError, RequestError, error_for
from raftnode.messages import (
    CODES,
    GENESIS,
    LMDB_KEY_BYTES,
    PEER_TYPES,
    REQUEST_TYPES,
    AnyAnswer,
    AnyRequest,
    Data,
    Entry,
    EntryId,
    Get,
    Heartbeat,
    Malformed,
    PingAnswer,
    Put,
    check_value,
    data_object,
    decode_answer,
    decode_object,
    decode_request,
    encode,
    encode_object,
    failure,
    store_key,
    to_request,
)

fixed = settings(derandomize=True, database=None, deadline=None, max_examples=300)
DEFAULTS = Settings()
DEEP = b"[" * 100_000 + b"]" * 100_000
"""Deeper than the decoder follows: to the interpreter's limit, 1,000 by default, and some thousands from 3.12 on."""
EDGE = 2**1024 - 2**970
"""Half-way between the largest double and the next power of two: the first whole number that no double comes near."""

# --- helpers --------------------------------------------------------------------------------------------------


def malformed(frame: bytes) -> Malformed:
    with pytest.raises(Malformed) as caught:
        decode_request(frame)
    return caught.value


def parts_of(value: Any) -> list[Any]:
    """The value and everything in it."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value, *(part for child in inner for part in parts_of(child))]


def is_finite(value: Any) -> bool:
    return all(math.isfinite(part) for part in parts_of(value) if isinstance(part, float))


def line(**fields: Any) -> bytes:
    return json.dumps(fields).encode()


# --- what is refused, and in which words ----------------------------------------------------------------------

BAD: list[tuple[str, bytes, str, str]] = [
    # name, frame, code, words
    ("nothing", b"", "bad_request", "not JSON"),
    ("blanks", b"  ", "bad_request", "not JSON"),
    ("words", b"hello", "bad_request", "not JSON"),
    ("http", b"GET / HTTP/1.1", "bad_request", "not JSON"),
    ("half", b'{"type":"get","key"', "bad_request", "not JSON"),
    ("more after", b'{"type":"ping"}x', "bad_request", "not JSON.*trailing"),
    ("two", b'{"type":"ping"}{"type":"ping"}', "bad_request", "not JSON.*trailing"),
    ("byte order mark", b'\xef\xbb\xbf{"type":"ping"}', "bad_request", "not JSON"),
    ("utf-16", '{"type":"ping"}'.encode("utf-16"), "bad_request", "not JSON"),
    ("single quotes", b"{'type':'ping'}", "bad_request", "not JSON"),
    ("NaN", b'{"type":"put","key":"a","value":NaN}', "bad_request", "not JSON"),
    ("Infinity", b'{"type":"put","key":"a","value":-Infinity}', "bad_request", "not JSON"),
    ("zero in front", b'{"type":"put","key":"a","value":01}', "bad_request", "not JSON"),
    ("control character", b'{"type":"get","key":"a\x00"}', "bad_request", "not JSON"),
    ("a list", b"[]", "bad_request", "expected a JSON object, got an array"),
    ("null", b"null", "bad_request", "expected a JSON object, got null"),
    ("a string", b'"get"', "bad_request", "expected a JSON object, got a string"),
    ("a number", b"17", "bad_request", "expected a JSON object, got a number"),
    ("a fraction", b"1.5", "bad_request", "expected a JSON object, got a number"),
    ("a boolean", b"true", "bad_request", "expected a JSON object, got a boolean"),
    ("no type", b"{}", "bad_request", 'no "type"'),
    ("type null", b'{"type":null}', "bad_request", "type"),
    ("type a number", b'{"type":5}', "bad_request", '"type" must be a string, got a number'),
    ("type a list", b'{"type":["get"]}', "bad_request", '"type" must be a string, got an array'),
    ("type an object", b'{"type":{}}', "bad_request", '"type" must be a string, got an object'),
    ("type a boolean", b'{"type":true}', "bad_request", '"type" must be a string, got a boolean'),
    ("another type", b'{"type":"fetch"}', "unknown_type", "'fetch'.*put, get, delete"),
    ("another case", b'{"type":"GET","key":"a"}', "unknown_type", "'GET'"),
    ("empty type", b'{"type":""}', "unknown_type", "''"),
    ("type of an answer", b'{"type":"error"}', "unknown_type", "'error'"),
    ("no key", b'{"type":"get"}', "bad_request", "get: .*missing.*`key`"),
    ("no value", b'{"type":"put","key":"a"}', "bad_request", "put: .*missing.*`value`"),
    ("no address", b'{"type":"add_peer"}', "bad_request", "add_peer: .*missing.*`address`"),
    ("key a number", b'{"type":"get","key":5}', "bad_request", r"get: Expected `str`, got `int`.*key"),
    ("key null", b'{"type":"get","key":null}', "bad_request", r"get: Expected `str`, got `null`.*key"),
    ("namespace null", b'{"type":"get","key":"a","namespace":null}', "bad_request", r"get: .*namespace"),
    ("consistency", b'{"type":"get","key":"a","consistency":"weak"}', "bad_request", r"get: .*'weak'.*consistency"),
    ("forwarded", b'{"type":"get","key":"a","forwarded":1}', "bad_request", r"get: Expected `bool`.*forwarded"),
    ("id a fraction", b'{"type":"get","key":"a","id":1.5}', "bad_request", r"get: .*`int \| str`.*id"),
    ("id null", b'{"type":"get","key":"a","id":null}', "bad_request", r"get: .*`int \| str`.*id"),
    ("id a boolean", b'{"type":"get","key":"a","id":true}', "bad_request", r"get: .*`int \| str`.*id"),
    ("id a list", b'{"type":"get","key":"a","id":[1]}', "bad_request", r"get: .*`int \| str`.*id"),
    ("id without end", b'{"type":"get","key":"a","id":' + b"9" * 5000 + b"}", "bad_request", "out of range"),
    ("key not UTF-8", b'{"type":"get","key":"\xff"}', "bad_request", "not UTF-8: byte 0xff"),
    ("key a raw surrogate", b'{"type":"get","key":"\xed\xa0\x80"}', "bad_request", "not UTF-8: byte 0xed"),
    ("key half a character", b'{"type":"get","key":"\xc3"}', "bad_request", "not UTF-8"),
    ("key an escaped surrogate", b'{"type":"get","key":"\\ud800"}', "bad_request", "not JSON"),
    ("key a reversed pair", b'{"type":"get","key":"\\udc00\\ud800"}', "bad_request", "not JSON"),
    ("key over-long UTF-8", b'{"type":"get","key":"\xc0\x80"}', "bad_request", "not UTF-8"),
    ("type not UTF-8", b'{"type":"\xff"}', "bad_request", "not UTF-8"),
    ("nested too deep", b'{"type":"put","key":"a","value":' + DEEP + b"}", "bad_request", "nested too deep"),
    ("deep and open", b'{"type":"put","key":"a","value":' + b"[" * 100_000, "bad_request", "nested too deep"),
    ("deep elsewhere", b'{"type":"ping","more":' + DEEP + b"}", "bad_request", "nested too deep"),
    ("objects too deep", b'{"a":' * 100_000 + b"1" + b"}" * 100_000, "bad_request", "nested too deep"),
    ("term negative", line(type="heartbeat", term=-1, leader="a", commit_id=0), "bad_request", "heartbeat: .*term"),
    ("term too large", line(type="heartbeat", term=2**63, leader="a", commit_id=0), "bad_request", "heartbeat: .*term"),
    ("term huge", line(type="heartbeat", term=10**400, leader="a", commit_id=0), "bad_request", "heartbeat: .*term"),
    ("term a fraction", line(type="heartbeat", term=1.5, leader="a", commit_id=0), "bad_request", "heartbeat: .*term"),
    ("term a text", line(type="heartbeat", term="1", leader="a", commit_id=0), "bad_request", "heartbeat: .*term"),
    ("term true", line(type="heartbeat", term=True, leader="a", commit_id=0), "bad_request", "heartbeat: .*term"),
    (
        "term 1e400",
        b'{"type":"heartbeat","term":1e400,"leader":"a","commit_id":0}',
        "bad_request",
        "out of (the )?range",
    ),
    ("vote of nobody", line(type="vote_request", term=1, commit_id=0), "bad_request", "vote_request: .*`staged`"),
    (
        "vote for a negative log",
        line(type="vote_request", term=1, commit_id=0, staged={"address": "a", "term": -1, "commit_id": 0}),
        "bad_request",
        r"vote_request: .*staged.*term",
    ),
    (
        "another action",
        line(type="data", action="cut", term=1, leader="a", previous={"term": 0, "commit_id": 0}),
        "bad_request",
        r"data: .*'cut'.*action",
    ),
    (
        "checksum too large",
        line(
            type="data",
            action="log",
            term=1,
            leader="a",
            previous={"term": 0, "commit_id": 0},
            entries=[{"term": 1, "commit_id": 1, "time": 0, "checksum": 2**32, "command": {}}],
        ),
        "bad_request",
        r"data: .*checksum",
    ),
    ("hello without a name", line(type="hello", cluster="c", node="n"), "bad_request", "hello: .*`address`"),
]


@pytest.mark.parametrize(("frame", "code", "words"), [row[1:] for row in BAD], ids=[row[0] for row in BAD])
def test_bad_input_has_a_code_and_words(frame: bytes, code: str, words: str) -> None:
    """The table of what people and broken programs send: each gets one code of the published ones and words that say
    what is wrong, as an answer that can be sent."""
    error = malformed(frame)
    assert error.code == code
    assert code in CODES
    assert re.search(words, str(error)), str(error)
    assert isinstance(error, ProtocolError)
    assert isinstance(error, RaftnodeError)
    answer = json.loads(encode(error.answer()))
    assert not answer["data"]
    assert answer["error"] == {"code": code, "message": str(error)}
    assert len(answer["error"]["message"]) < 300, "an error does not send the message back"


def test_the_key_a_message_has_twice_counts_once() -> None:
    """Of a field that comes twice the last one counts, as everywhere in JSON; a type that comes twice is refused."""
    found = decode_request(b'{"type":"get","key":"a","key":"b"}')
    assert isinstance(found, Get)
    assert found.key == "b"
    assert malformed(b'{"type":"get","type":"put","key":"a"}').code == "bad_request"


def test_fields_that_are_not_known_are_passed_over() -> None:
    """Newer clients may send more; what is in such fields is not looked at, and the order makes no difference."""
    found = decode_request(b'{"key":"a","more":{"x":[1,2]},"type":"get","later":1e5}')
    assert found == Get(key="a")
    assert found == Get(key="a", namespace="default", consistency="linearizable", forwarded=False)


@pytest.mark.parametrize(
    "id",
    [0, -1, 2**63 - 1, 2**63, 2**64, -(2**70), 10**400, "", "x", "é", "\0", "x" * 1000],
    ids=lambda i: repr(i)[:20],
)
@pytest.mark.parametrize("place", ["first", "last"])
def test_a_readable_id_comes_back_whatever_else_is_wrong(id: Any, place: str) -> None:
    """A client with several requests under way needs the id to know which one failed: it is in the answer to a good
    request and to a bad one, wherever the id stands and whatever else is broken (wrong field, unknown type, no type,
    bytes that are no UTF-8, a number out of range); a huge number as well as a text."""
    own = b'"id":' + json.dumps(id).encode()
    broken = (
        b'"type":"get","key":5',
        b'"type":"get"',
        b'"type":"nothing"',
        b'"type":5',
        b'"more":1',
        b'"type":"get","key":"\xff"',
        b'"type":"get","key":5,"more":1e999',
        b'"type":"get","key":5,"more":' + b"9" * 5000,
    )
    for fields in broken:
        error = malformed(b"{" + (own + b"," + fields if place == "first" else fields + b"," + own) + b"}")
        assert error.id == id, fields
        assert json.loads(encode(error.answer()))["id"] == id
    found = decode_request(b'{"type":"ping",' + own + b"}")
    assert found.id == id
    assert json.loads(encode(messages.PingAnswer(id=found.id)))["id"] == id


@pytest.mark.parametrize("fields", [b'"id":1.5', b'"id":null', b'"id":true', b'"id":[]', b'"id":{}', b'"id":"\xff"'])
def test_an_id_that_is_none_is_not_echoed(fields: bytes) -> None:
    """What is no number and no text is not sent back as an id: the answer goes without one."""
    error = malformed(b'{"type":"get","key":"a",' + fields + b"}")
    assert error.id is UNSET
    assert "id" not in json.loads(encode(error.answer()))


def test_the_answer_to_a_bad_message_has_its_type() -> None:
    """A known type comes back in the answer, so that a client finds it where it looks; else the type is `error`."""
    for kind in (*REQUEST_TYPES, *PEER_TYPES):
        answer = json.loads(encode(malformed(line(type=kind, id=1.5, term="x")).answer()))
        assert answer["type"] == kind
    assert json.loads(encode(malformed(b'{"type":"x"}').answer()))["type"] == "error"


# --- any bytes ------------------------------------------------------------------------------------------------

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(2**63)
anything = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
field_names = st.sampled_from(
    ["type", "id", "key", "value", "namespace", "term", "leader", "commit_id", "previous", "entries", "action",
     "staged", "address", "cluster", "node", "consistency", "round", "protocol"]
)  # fmt: skip
kinds = st.sampled_from([*REQUEST_TYPES, *PEER_TYPES, "error", ""])
near_messages = st.fixed_dictionaries({"type": kinds}, optional={"id": st.integers() | st.text(max_size=5)}).flatmap(
    lambda fields: st.dictionaries(field_names, anything, max_size=6).map(lambda more: {**more, **fields})
)
frames = st.one_of(
    st.binary(max_size=80),
    near_messages.map(lambda found: json.dumps(found).encode()),
    st.tuples(near_messages, st.integers(0, 60), st.binary(max_size=3)).map(
        lambda parts: (text := json.dumps(parts[0]).encode())[: parts[1]] + parts[2] + text[parts[1] :]
    ),
)


def readable_id(frame: bytes) -> Any:
    """What another JSON reader finds as id; UNSET when there is none, or nothing can be read."""
    try:
        found = json.loads(frame.decode(), parse_constant=int)["id"]
        json.dumps(found, ensure_ascii=False).encode()
    except (ValueError, TypeError, KeyError):
        return UNSET
    return found if isinstance(found, int | str) and not isinstance(found, bool) else UNSET


@fixed
@given(frame=frames)
@example(frame=b'{"type":"put","key":"a","value":' + b"9" * 400 + b"}")
@example(frame=b'{"type":"zzz","id":"\\ud83d"}')
def test_any_bytes_are_a_message_or_malformed(frame: bytes) -> None:
    """Whatever comes, there is a typed message that can be written and read again as the same, or one Malformed whose
    answer can be written; nothing else is raised (package docstring, "a decoder either returns a valid message or
    raises one error"). An id that is readable comes back either way."""
    try:
        found: AnyRequest | Malformed = decode_request(frame)
    except Malformed as malformed:
        found = malformed
    if isinstance(found, Malformed):
        assert found.code in ("bad_request", "unknown_type")
        answer = json.loads(encode(found.answer()))
        assert answer["error"]["code"] == found.code
        assert readable_id(frame) in (UNSET, answer.get("id", UNSET))
    else:
        assert isinstance(found, get_args(AnyRequest))
        assert encode(decode_request(encode(found))) == encode(found)
        assert readable_id(frame) in (UNSET, found.id)


@fixed
@given(frame=frames)
def test_any_answer_is_typed_or_an_error(frame: bytes) -> None:
    """The same for what comes back: a typed answer, or a ProtocolError."""
    try:
        found = decode_answer(frame)
    except ProtocolError:
        return
    assert isinstance(found, get_args(AnyAnswer))
    again = decode_answer(encode(found))
    assert encode(again) == encode(found)


@fixed
@given(frame=frames)
def test_any_object_is_a_dict_or_malformed(frame: bytes) -> None:
    """`decode_object` gives a dict or Malformed, and the dict can be written again."""
    try:
        found = decode_object(frame)
    except Malformed:
        return
    assert isinstance(found, dict)
    assert decode_object(encode_object(found)) == found


@fixed
@given(data=st.data())
def test_requests_come_back(data: st.DataObject) -> None:
    """Every request with any fields in range is read as it was written, on one line."""
    text, count = st.text(max_size=8), st.integers(0, 2**63 - 1)
    ids = st.just(UNSET) | st.integers() | text
    entry_id, count32 = st.builds(EntryId, count, count), st.integers(0, 2**32 - 1)
    raw = st.sampled_from([b"1.10", b"1E5", b"[1, 2]", b'"\\u0061"', b"{}", b"123456789012345678901234567890"]).map(Raw)
    entry = st.builds(Entry, count, count, count, st.integers(0, 2**32 - 1), raw)
    kind = data.draw(st.sampled_from(get_args(AnyRequest)))
    known = {
        "id": ids, "key": text, "value": raw, "namespace": text, "address": text, "cluster": text, "node": text,
        "leader": text, "client": text, "term": count, "commit_id": count, "round": count, "protocol": count,
        "previous": entry_id, "entries": st.lists(entry, max_size=3), "action": st.sampled_from(["log", "commit"]),
        "consistency": st.sampled_from(["local", "linearizable"]), "forwarded": st.booleans(),
        "pre_vote": st.booleans(), "link": st.booleans(), "first": count, "last": count,
        "old": text, "new": text, "to": text, "force": st.booleans(), "transfer": st.booleans(), "membership": entry_id,
        "reminder": st.just(UNSET) | st.builds(messages.Reminder, node=text, term=count, held=entry_id, vote=text),
        "staged": st.builds(lambda a, t, c: messages.Staged(address=a, term=t, commit_id=c), text, count, count),
        "seq": count, "at_least": count, "gone": st.lists(st.tuples(text, text), max_size=2),
        "records": st.lists(st.builds(messages.SnapshotRecord, text, text, count, count, count, count, count32, raw)),
        "end": st.just(UNSET)
        | st.builds(messages.SnapshotEnd, id=entry_id, checksum=count32, keys=count, membership=raw),
    }  # fmt: skip
    if kind in (messages.Snapshot, messages.Backup):
        known["transfer"] = count
    written = kind(**{name: data.draw(known[name], label=name) for name in kind.__struct_fields__})
    sent = encode(written)
    assert sent.count(b"\n") == 1
    found = decode_request(sent)
    assert type(found) is kind
    assert encode(found) == sent


# --- values ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value",
    [
        b"null", b"true", b"0", b"-0", b"-0.0", b"1.10", b"1E5", b"1e-400", b"5e-324", b"1.7976931348623157e308",
        b"123456789012345678901234567890", b"1" + b"0" * 308, b"9" * 308, b"0." + b"1" * 400, b"1" * 308 + b".5",
        b'"\\u00e9\\ud83d\\ude00"', '"é😀"'.encode(), b'"' + b"9" * 400 + b'"', b'["' + b"[" * 1000 + b'"]',
        b'{"' + b"9" * 400 + b'":1}', b'{"":{}}', b"[" * 128 + b"]" * 128, b"[[1],{}]",
        b'{"a":' * 128 + b"1" + b"}" * 128, b"[1e308," + b"9" * 308 + b"]", str(EDGE - 1).encode(),
        str(1 - EDGE).encode(), b"[" + str(EDGE - 1).encode() + b"]",
        b"[" + b",".join([b"[]"] * 1000) + b"]", b'"\\u0000"',
    ],
    ids=lambda v: v.decode()[:24],
)  # fmt: skip
def test_a_value_that_everyone_can_read_is_taken(value: bytes) -> None:
    """Any JSON value is taken: long texts of digits or brackets, numbers up to the largest double, 128 levels; and
    another program (here Python's json) reads the same from it, with finite numbers."""
    check_value(Raw(value), DEFAULTS)
    found = json.loads(value)
    assert is_finite(found)
    assert all(math.isfinite(float(part)) for part in parts_of(found) if isinstance(part, int))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (b"", "not JSON"),
        (b" ", "not JSON"),
        (b"[1", "not JSON"),
        (b"1 2", "not JSON"),
        (b"NaN", "not JSON"),
        (b'"\xff"', "not UTF-8: byte 0xff"),
        (b'"\xed\xa0\x80"', "not UTF-8"),
        (b'{"a":["\xc3"]}', "not UTF-8"),
        (b'{"\xff":1}', "not UTF-8"),
        (b'"\\ud800"', "not JSON"),
        (b"1e999", "range of a double"),
        (b"[1,-1e999]", "out of (the )?range"),
        (b"1.8e308", "range of a double"),
        (b"9" * 309, "range of a double"),
        (b"9" * 400, "range of a double"),
        (b"-" + b"9" * 400, "range of a double"),
        (b'{"a":[' + b"9" * 400 + b"]}", "range of a double"),
        (b"9" * 5000, "out of range"),
        (b"1" * 400 + b".5", "range of a double"),
        (str(EDGE).encode(), "range of a double"),
        (str(-EDGE).encode(), "range of a double"),
        (b"[0," + str(EDGE).encode() + b"]", "range of a double"),
        (b"[" * 129 + b"]" * 129, "deeper than 128"),
        (b'{"a":' * 129 + b"1" + b"}" * 129, "deeper than 128"),
        (b'[{"a":' * 65 + b"1" + b"}]" * 65, "deeper than 128"),
        (DEEP, "nested too deep"),
    ],
    ids=lambda v: v.decode("latin-1")[:24] if isinstance(v, bytes) else "",
)
def test_a_value_that_not_everyone_can_read_is_refused(value: bytes, words: str) -> None:
    """What some reader would get as another value, or not at all, is a bad request with a reason: bytes that are no
    UTF-8, half characters, numbers past the range of a double (from half-way past the largest one on, where rounding
    leads to infinity), nesting without end."""
    with pytest.raises(ProtocolError, match=words) as refused:
        check_value(Raw(value), DEFAULTS)
    assert refused.value.code == "bad_request"
    assert str(refused.value).startswith("value: ")


@pytest.mark.parametrize("depth", [1, 2, 5])
def test_the_depth_is_a_setting(depth: int) -> None:
    """`json_depth` counts arrays and objects around each other; brackets in texts and beside each other do not."""
    limit = Settings(json_depth=depth)
    check_value(Raw(b"[" * depth + b'"[[[[[[[["' + b"]" * depth), limit)
    check_value(Raw(b"[" * (depth - 1) + b'{"a":1,"b":2}' + b"]" * (depth - 1)), limit)
    with pytest.raises(ProtocolError, match=f"deeper than {depth}"):
        check_value(Raw(b"[" * (depth + 1) + b"]" * (depth + 1)), limit)
    with pytest.raises(ProtocolError, match=f"deeper than {depth}"):
        check_value(Raw(b"[" * depth + b"[],{}" + b"]" * depth), limit)


@fixed
@given(value=anything)
def test_every_finite_json_value_is_taken(value: Any) -> None:
    """Whatever Python's json writes of values in range is taken; whatever it writes as NaN or Infinity is not."""
    text = json.dumps(value).encode()
    if not is_finite(value):
        with pytest.raises(ProtocolError):
            check_value(Raw(text), DEFAULTS)
    else:
        check_value(Raw(text), DEFAULTS)


# --- keys -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("namespace", "key"),
    [
        ("default", "a"), ("n", "\0"), ("n", "a\0b"), ("n", "\0\0"), ("é" * 64, "é"), ("x" * 64, " "), ("n", "x" * 509),
        ("n", "é" * 254), ("😀" * 64, "x" * 254), ("default", "x" * 503),
    ],
)  # fmt: skip
def test_a_good_key_is_taken(namespace: str, key: str) -> None:
    """A key is any text of at least one byte, NUL included, that fits LMDB's 511 bytes with its namespace; two
    different pairs never meet."""
    full = store_key(namespace, key)
    assert full == namespace.encode() + b"\0" + key.encode()
    assert len(full) <= LMDB_KEY_BYTES == 511
    before, _, after = full.partition(b"\0")
    assert (before.decode(), after.decode()) == (namespace, key)


@pytest.mark.parametrize(
    ("namespace", "key", "code"),
    [
        ("default", "", "bad_request"),
        ("", "a", "bad_request"),
        ("x" * 65, "a", "bad_request"),
        ("a\0b", "a", "bad_request"),
        ("\0", "a", "bad_request"),
        ("n", "\ud800", "bad_request"),
        ("\udfff", "a", "bad_request"),
        ("n", "x" * 510, "key_too_long"),
        ("default", "x" * 504, "key_too_long"),
        ("n", "é" * 255, "key_too_long"),
        ("😀" * 64, "x" * 255, "key_too_long"),
        ("n", "x" * 1_000_000, "key_too_long"),
    ],
    ids=lambda v: ascii(v)[:16],
)
def test_a_bad_key_is_refused(namespace: str, key: str, code: str) -> None:
    """An empty key, a bad namespace and a half character are bad requests; one byte too many is `key_too_long`, and
    bytes count, not characters."""
    with pytest.raises(ProtocolError) as refused:
        store_key(namespace, key)
    assert refused.value.code == code


def test_the_words_for_a_long_key_are_right() -> None:
    """The error says how long the key is and what would fit."""
    with pytest.raises(ProtocolError, match=r"the key has 600 bytes; in this namespace 503 fit"):
        store_key("default", "x" * 600)
    with pytest.raises(ProtocolError, match=r"the key has 510 bytes; in this namespace 508 fit"):
        store_key("é", "é" * 255)


@fixed
@given(
    one=st.tuples(st.text("ab\x01é", min_size=1, max_size=3), st.text("ab\0é", min_size=1, max_size=3)),
    other=st.tuples(st.text("ab\x01é", min_size=1, max_size=3), st.text("ab\0é", min_size=1, max_size=3)),
)
def test_keys_meet_only_when_they_are_the_same(one: tuple[str, str], other: tuple[str, str]) -> None:
    """Two pairs of namespace and key have one store key only when both are equal."""
    assert (store_key(*one) == store_key(*other)) == (one == other)


# --- dicts ----------------------------------------------------------------------------------------------------


class Colour(enum.Enum):
    RED = 1


NOT_JSON: dict[str, Any] = {
    "nan": math.nan,
    "inf": math.inf,
    "-inf": -math.inf,
    "nan in a list": [1, [math.nan]],
    "nan in a tuple": ((math.nan,),),
    "inf in an object": {"a": {"b": -math.inf}},
    "a set": {1},
    "a frozenset": frozenset(),
    "bytes": b"x",
    "bytes inside": {"a": [b"x"]},
    "a bytearray": bytearray(b"x"),
    "a memoryview": memoryview(b"x"),
    "an object": object(),
    "a complex": 1j,
    "a decimal": decimal.Decimal("1.10"),
    "a date": datetime.date(2020, 1, 1),
    "a uuid": uuid.UUID(int=1),
    "an enum": Colour.RED,
    "a range": range(3),
    "half a character": "\ud800",
    "half a character as key": {"\ud800": 1},
    "too many digits": 10**5000,
    "None as key": {None: 1},
    "a tuple as key": {(1,): 1},
    "bytes as key": {b"a": 1},
    "nan as key": {math.nan: 1},
    "a number as key": {1: 1},
    "a fraction as key": {"a": [{1.5: 1}]},
}


@pytest.mark.parametrize("name", NOT_JSON)
def test_what_json_cannot_hold_is_refused_and_not_changed(name: str) -> None:
    """Values that the encoder would write as something else (NaN as null, a set as a list, bytes and keys that are no
    text as text) are bad requests: what is read is what was put."""
    with pytest.raises(ProtocolError, match="JSON") as refused:
        encode_object({"type": "put", "key": "a", "value": NOT_JSON[name]})
    assert refused.value.code == "bad_request"


def test_a_value_without_an_end_is_refused() -> None:
    """A list that holds itself, or one that is nested a hundred thousand times."""
    endless: list[Any] = []
    endless.append(endless)
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for value in (endless, deep):
        with pytest.raises(ProtocolError) as refused:
            encode_object({"a": value})
        assert refused.value.code == "bad_request"


@fixed
@given(value=anything)
def test_what_json_can_hold_comes_back(value: Any) -> None:
    """Everything else is read as it was written; on one line."""
    if not is_finite(value):
        with pytest.raises(ProtocolError):
            encode_object({"a": value})
        return
    sent = encode_object({"a": value})
    assert sent.count(b"\n") == 1
    assert decode_object(sent) == {"a": value}
    request = to_request({"type": "put", "key": "k", "value": value})
    assert isinstance(request, Put)
    assert json.loads(bytes(request.value)) == value


def test_a_dict_is_checked_as_a_message_is() -> None:
    """`to_request` refuses what the wire would refuse, and keeps a raw value as it was spelt."""
    request = to_request({"type": "put", "key": "k", "value": Raw(b"1.10")})
    assert isinstance(request, Put)
    assert bytes(request.value) == b"1.10"
    for bad in (
        {"type": "put", "key": "k"},
        {"type": "x"},
        {},
        {"type": "get", "key": 5},
        {"type": "put", "key": "k", "value": Raw(b"[")},
    ):
        with pytest.raises(ProtocolError):
            to_request(bad)


@pytest.mark.parametrize("spelling", [b"1.10", b"1E5", b"1e+05", b"-0.0", b"12345678901234567890123", b'"\\u0061"'])
def test_commands_keep_their_bytes_through_a_dict(spelling: bytes) -> None:
    """`data_object` gives a dict of a `data` message; written as JSON and read again it has the same commands byte for
    byte, as the checksums are over their bytes."""
    command = Raw(b'{"kind":"put","namespace":"n","key":"k","value":' + spelling + b"}")
    data = Data(action="log", term=1, leader="a:1", previous=GENESIS, entries=[Entry(1, 1, 0, 7, command)])
    for found in (to_request(data_object(data)), decode_request(encode(data))):
        assert isinstance(found, Data)
        assert bytes(found.entries[0].command) == bytes(command)
        assert encode(found) == encode(data)


# --- ids and answers ------------------------------------------------------------------------------------------


def test_entry_ids_are_ordered_by_term_first() -> None:
    """ "At least as up to date" is a plain comparison: a later term beats a longer log (thesis 3.6.1, TRAPS 3)."""
    assert EntryId(2, 1) > EntryId(1, 100)
    assert EntryId(2, 5) >= EntryId(2, 5)
    assert EntryId(2, 4) < EntryId(2, 5)
    assert min(GENESIS, EntryId(0, 1)) == GENESIS


@pytest.mark.parametrize("kind", [*REQUEST_TYPES, *PEER_TYPES, "error", "another"])
@pytest.mark.parametrize("id", [UNSET, 5, "x"])
def test_a_failure_says_so_in_every_type(kind: str, id: Any) -> None:
    """A failed request of any type has `"data": false` (null for reads) and the error; it reads back typed."""
    answer = failure(kind, "no_leader", "words", id)
    found = json.loads(encode(answer))
    known = kind in (*REQUEST_TYPES, *PEER_TYPES)
    assert found["type"] == (kind if known else "error")
    assert found["data"] is (None if kind in ("get", "status") else False)
    assert found["error"] == {"code": "no_leader", "message": "words"}
    assert found.get("id", UNSET) == id
    assert type(decode_answer(encode(answer))) is type(answer)


def test_every_code_has_its_error() -> None:
    """Each published code becomes an error of a client that carries the code; a code of a newer version counts as an
    open outcome, the safe reading (TRAPS 24)."""
    for code in CODES:
        error = error_for(code, "words")
        assert isinstance(error, RequestError)
        assert error.code == code
        assert "words" in str(error)
    assert type(error_for("brand_new", "words")) is NotCommitted


def test_no_answer_is_a_request_and_no_request_an_answer() -> None:
    """The two directions share types, not fields: a request that is sent back is not taken for an answer that grants
    something."""
    heartbeat = Heartbeat(term=3, leader="a:1", commit_id=2)
    echoed = decode_answer(encode(heartbeat))
    assert isinstance(echoed, messages.HeartbeatAnswer)
    for request in (
        messages.VoteRequest(term=1, commit_id=0, staged=messages.Staged(address="a", term=0, commit_id=0)),
        Data(action="log", term=1, leader="a", previous=GENESIS),
        Put(key="a", value=Raw(b"1")),
        messages.AddPeer(address="a:1"),
    ):
        with pytest.raises(ProtocolError):
            decode_answer(encode(request))


def test_checksums_are_the_crc_of_everything_that_counts() -> None:
    """Term, position, time and command each change the checksum, and so does the history before."""
    found = [
        messages.chain(previous, term, commit_id, time, command)
        for previous, term, commit_id, time, command in itertools.product((0, 1), (1, 2), (1, 2), (0, 1), (b"a", b"b"))
    ]
    assert len(set(found)) == len(found)
    assert messages.chain(0, 1, 1, 0, b"a") == messages.chain(0, 1, 1, 0, Raw(b"a"))


def test_encoding_leaves_nothing_behind() -> None:
    """A node encodes for months: what a message takes while it becomes a line is given back, all of it. Seen: memory in
    use is the same after ten thousand lines as after a thousand. (The encoder keeps 48 bytes of each tuple of messages
    that it is given.)"""
    message = PingAnswer(node="a:1")

    def memory_after(lines: int) -> int:
        for _ in range(lines):
            encode(message)
        return tracemalloc.get_traced_memory()[0]

    tracemalloc.start()
    try:
        before = memory_after(1000)
        assert memory_after(10_000) - before < 10_000
    finally:
        tracemalloc.stop()
