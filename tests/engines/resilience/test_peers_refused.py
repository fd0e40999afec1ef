"""Copies between keepers, as real processes on the loopback: what is refused, and what is never accepted."""

import hashlib
import json

import pytest

from lightning_plugins._support.errors import InputError
from lightning_plugins.engines.resilience.keeper_client import NoCopyError, TooLittleMemoryError
from lightning_plugins.engines.resilience.keeper_folder import KeeperError
from lightning_plugins.engines.resilience.peer_wire import Answer, AnswerError, Handler, PeerError, PeerServer
from lightning_plugins.engines.resilience.secret import FILE_VARIABLE, VARIABLE, new_secret_file
from lightning_plugins.engines.resilience.slots import HEADER_BYTES, DamagedError
from tests.engines.resilience.keeper_parts import eventually
from tests.engines.resilience.peer_parts import Node, assert_holds, connection_to, damage, derived, node, pair_of, secret

__all__ = ["node", "secret"]


def test_without_a_secret_nobody_listens(tmp_path, monkeypatch):
    monkeypatch.delenv(FILE_VARIABLE, raising=False)
    monkeypatch.delenv(VARIABLE, raising=False)
    alone = Node(tmp_path / "alone")
    try:
        asked = [
            lambda: alone.client.listen("127.0.0.1"),
            lambda: alone.client.partner("127.0.0.1", 9),
            lambda: alone.client.fetch("rank0", 1, "127.0.0.1", 9),
            lambda: alone.client.peer_generations("127.0.0.1", 9),
        ]
        monkeypatch.setenv(VARIABLE, "a secret that comes too late")
        for ask in asked:
            with pytest.raises(KeeperError, match=rf"without the job's secret.*{FILE_VARIABLE}"):
                ask()
        assert alone.client.peer_status() == {}
    finally:
        alone.close()


def test_a_keeper_that_has_outlived_its_secret_says_so(node, tmp_path, monkeypatch):
    one = node("one")
    new_secret_file(tmp_path / "next")
    monkeypatch.setenv(FILE_VARIABLE, str(tmp_path / "next"))
    with pytest.raises(KeeperError, match="another secret than this process has"):
        one.listen()
    assert one.client.peer_status() == {}


def test_a_secret_that_others_can_read_is_refused(node, secret, monkeypatch):
    one = node("one")
    secret.chmod(0o644)
    with pytest.raises(InputError, match="chmod 600"):
        one.listen()
    monkeypatch.delenv(FILE_VARIABLE)
    with pytest.raises(KeeperError, match="chmod 600"):
        one.listen()


@pytest.mark.parametrize("address", ["0.0.0.0", "203.0.113.7", "no such host"])
def test_an_address_that_is_not_one_interface_of_this_host_is_refused(node, address):
    with pytest.raises(KeeperError, match="peers cannot be served"):
        node("one").client.listen(address)


def test_another_secret_is_refused_and_counted(node, secret, tmp_path):
    one, other = node("one"), node("other")
    other.listen()
    other.keep(1)
    secret.unlink()
    new_secret_file(secret)
    with pytest.raises(NoCopyError, match="did not prove"):
        one.client.fetch("rank0", 1, *other.address)
    one.client.partner(*other.address)
    one.keep(2)
    assert eventually(lambda: one.client.peer_status()["failures"].get("foreign", 0) > 0)
    assert other.client.peer_status()["refused"]["foreign"] >= 2
    assert other.held() == [("rank0", 1, "committed", False)]


def test_the_keeper_of_another_job_is_refused_though_it_has_the_secret(node):
    one, other = node("one", job="foreign"), node("other")
    other.listen()
    other.keep(1)
    with pytest.raises(NoCopyError, match="did not prove"):
        one.client.fetch("rank0", 1, *other.address)
    with pytest.raises(NoCopyError):
        one.client.peer_generations(*other.address)
    assert other.client.peer_status()["refused"]["foreign"] == 2


def test_what_is_not_held_is_said(node):
    one, other = node("one"), node("other")
    other.listen()
    other.keep(4)
    with pytest.raises(NoCopyError, match=r"holds no whole step 3; it holds 4 \(committed\)"):
        one.client.fetch("rank0", 3, *other.address)
    with pytest.raises(NoCopyError, match="no step at all"):
        one.client.fetch("rank9", 4, *other.address)
    assert one.held() == []


def push_begin(connection, one, shard="rank0", **changed):
    """Begin a push by hand, with the manifest of what is held at ``one``, changed."""
    found = connection_to(one).request("find", {"shard": "rank0", "step": 1}).header
    manifest = (
        connection_to(one)
        .request(
            "manifest", {"shard": "rank0", "step": 1, "generation": found["generation"]}, into=bytearray(found["manifest_bytes"])
        )
        .data
    )
    request = {"shard": shard, "step": 1, "written_at": 1.0, **found, **changed.pop("header", {})}
    return connection.request("push_begin", request, changed.pop("manifest", manifest)).header


def test_an_oversized_push_is_refused_before_memory_is_taken(node):
    one, other = node("one"), node("other")
    one.listen()
    other.listen()
    one.keep(1, numbers=1000)
    with connection_to(other) as connection:
        for data_bytes in (1 << 50, 1 << 61):
            manifest = {"step": 1, "meta": {}, "skeleton": [0, 0], "tensors": [], "data_bytes": data_bytes, "checksums": []}
            encoded = json.dumps(manifest).encode()
            with pytest.raises(AnswerError, match="checksums"):
                push_begin(connection, one, manifest=encoded, header={"digest": hashlib.sha256(encoded).hexdigest()})
        manifest |= {"data_bytes": 1 << 42, "checksums": [0] * (1 << 20)}
        encoded = json.dumps(manifest).encode()
        with pytest.raises(AnswerError, match="are available"):
            push_begin(connection, one, manifest=encoded, header={"digest": hashlib.sha256(encoded).hexdigest()})
        assert other.client.status()["jobs"]["job"] == 0
        with pytest.raises(PeerError):
            connection.request("push_chunk", {"shard": "rank0"}, bytearray((16 << 20) + 1))
    assert eventually(lambda: other.client.peer_status()["refused"]["oversized"] == 1)
    with connection_to(other) as connection, pytest.raises(AnswerError, match="not the one that was sealed"):
        push_begin(connection, one, manifest=encoded)


def test_a_copy_is_whole_or_it_is_not_there(node):
    one, other = node("one"), node("other")
    one.listen()
    other.listen()
    one.keep(1)
    fetched = one.client.generations()[0]
    with connection_to(one) as source, connection_to(other) as connection:
        generation = source.request("find", {"shard": "rank0", "step": 1}).header["generation"]
        chunks = [
            bytes(
                source.request(
                    "chunk", {"shard": "rank0", "step": 1, "generation": generation, "chunk": n}, into=bytearray(4 << 20)
                ).data
            )
            for n in range(-(-fetched.bytes // (4 << 20)))
        ]
        assert len(chunks) == 3

        def push(pieces, commit=False):
            begun = push_begin(connection, one)
            named = {"shard": "rank0", "generation": begun["generation"]}
            for number, piece in pieces:
                connection.request("push_chunk", {**named, "chunk": number}, piece)
            connection.request("push_seal", named)
            if commit:
                connection.request("push_commit", named)

        for reason, pieces in [
            ("1 of 3 chunks have not arrived", [(0, chunks[0]), (1, chunks[1])]),
            ("chunk 0 of 3 has another checksum", [(0, chunks[1]), (1, chunks[0]), (2, chunks[2])]),
            ("chunk 1 of 3 has another checksum", [(0, chunks[0]), (1, bytes(4 << 20)), (2, chunks[2])]),
            ("has 4194304 bytes, got 4194303", [(0, chunks[0][:-1])]),
            ("there is no chunk 3 of 3", [(3, chunks[0])]),
        ]:
            with pytest.raises(AnswerError, match=reason):
                push(pieces)
            assert [state for _, _, state, _ in other.held() if state != "writing"] == []
        push(list(enumerate(chunks)))
        other.keep(1, "rank1", 1000)  # which commits the step in all shards of its own
        assert ("rank0", 1, "sealed", True) in other.held()
        with pytest.raises(AnswerError, match="no whole generation"):
            connection.request("push_commit", {"shard": "rank0", "generation": 1 << 40})
        push(list(enumerate(chunks)), commit=True)
        assert ("rank0", 1, "committed", True) in other.held()
    assert_holds(other.client, 1)


def test_requests_that_make_no_sense_are_answered(node):
    one = node("one")
    one.listen()
    with connection_to(one) as connection:
        for name, header in [
            ("find", {}),
            ("find", {"shard": "x" * 1001, "step": 1}),
            ("find", {"shard": "rank0", "step": -1}),
            ("chunk", {"shard": "rank0", "step": True}),
            ("push_chunk", {"shard": "rank0", "generation": 1, "chunk": 0}),
            ("push_begin", {"shard": "rank0", "step": 1, "written_at": 1.0, "digest": "no digest"}),
            ("unheard", {}),
        ]:
            with pytest.raises(AnswerError):
                connection.request(name, header)


def test_damage_in_the_partners_memory_is_found_at_the_fetch(node):
    one, other = pair_of(node)
    third = node("third")
    one.keep(1)
    assert one.safe_at_partner(1)
    damage(other)
    with pytest.raises(DamagedError) as caught:
        third.client.fetch("rank0", 1, *other.address)
    assert (caught.value.shard, caught.value.step, caught.value.chunk) == ("rank0", 1, 1)
    assert third.held() == []
    one.listen()
    third.client.fetch("rank0", 1, *one.address)
    assert_holds(third.client, 1)


def test_a_manifest_that_was_damaged_is_found_at_the_fetch(node):
    one, third = node("one"), node("third")
    one.listen()
    one.keep(1)
    damage(one, HEADER_BYTES + one.client.generations()[0].bytes + 64)
    with pytest.raises(DamagedError) as caught:
        third.client.fetch("rank0", 1, *one.address)
    assert caught.value.chunk is None
    assert third.held() == []


def test_damage_in_our_own_memory_does_not_replace_the_partners_copy(node):
    one, other = pair_of(node)
    one.keep(1)
    assert one.safe_at_partner(1)
    one.client.partner("127.0.0.1", 1)  # nobody is there
    one.keep(2)
    damage(one)
    one.client.partner(*other.address)
    assert eventually(lambda: one.client.peer_status()["failures"].get("refused") == 1)
    assert other.held() == [("rank0", 1, "committed", True)]
    assert_holds(other.client, 1)
    assert one.client.peer_status()["safe_step"] == -1


def test_a_fetch_does_not_take_the_slot_that_was_committed_last(node):
    one, other = node("one"), node("other")
    other.listen()
    other.keep(2)
    one.keep(1)
    one.client.fetch("rank0", 2, *other.address)
    assert one.held() == [("rank0", 1, "committed", False), ("rank0", 2, "committed", False)]
    assert_holds(one.client, 1)
    assert_holds(one.client, 2)


def test_a_damaged_step_of_our_own_is_replaced_by_the_partners_copy(node):
    one, other = pair_of(node)
    one.keep(1)
    assert one.safe_at_partner(1)
    damage(one)
    with pytest.raises(DamagedError):
        one.client.load("rank0", 1)
    one.client.fetch("rank0", 1, *other.address)
    assert_holds(one.client, 1)


def test_a_fetch_for_which_there_is_no_memory_is_refused(node):
    """The source describes a shard as large as no host; the fetcher asks its host before it takes anything."""
    manifest = json.dumps({"step": 1, "meta": {}, "data_bytes": 1 << 42, "checksums": [0] * (1 << 20)}).encode()
    found = {"generation": 1, "state": "committed", "data_bytes": 1, "written_at": 1.0, "manifest_bytes": len(manifest)}
    found["digest"] = hashlib.sha256(manifest).hexdigest()
    handlers = {"find": Handler(lambda *_: Answer(found)), "manifest": Handler(lambda *_: Answer({}, manifest))}
    one = node("one")
    with PeerServer(("127.0.0.1", 0), derived(), handlers, 0) as server, pytest.raises(TooLittleMemoryError) as caught:
        one.client.fetch("rank0", 1, *server.address)
    assert caught.value.needed_bytes > 1 << 42
    assert one.held() == []
