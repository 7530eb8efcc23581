"""The line to rank 0 against peers that do not know the key, or send anything at all."""

from __future__ import annotations

import os
import random
import socket
import sys
import threading
import time

import pytest

from para_core.workers import channel
from para_core.workers.channel import MAX_FRAME, TAKEN, Connection, ConnectionLost, Listener, connect

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Unix-domain sockets")
KEY = b"k" * 32


@pytest.fixture
def served(tmp_path):
    return tmp_path / "socket", Listener(tmp_path / "socket", KEY, one_at_a_time=True)


def raw(path):
    line = socket.socket(socket.AF_UNIX)
    line.connect(str(path))  # with a timeout it would fail where many wait
    line.settimeout(10)
    return line


def pair():
    return [Connection(end) for end in socket.socketpair()]


def test_frames_and_descriptors_arrive(served):
    path, listener = served
    client = connect(path, KEY)
    server = listener.accept()
    reading, writing = os.pipe()
    client.send({"a": ["ä", 1]}, [writing])
    os.close(writing)
    frame, (received,) = server.receive()
    assert frame == {"a": ["ä", 1]} and not os.get_inheritable(received)
    os.write(received, b"x")
    assert os.read(reading, 1) == b"x"
    server.send({"b": 2})
    assert client.receive() == ({"b": 2}, [])
    for descriptor in (reading, received):
        os.close(descriptor)


def test_socket_is_the_users_alone(served):
    assert served[0].stat().st_mode & 0o777 == 0o600


def test_peer_with_another_key_gets_nothing(served):
    path, listener = served
    with pytest.raises(ConnectionLost):
        connect(path, b"other key")
    connect(path, KEY)
    assert listener.accept() and listener._accepted.empty()


def test_server_with_another_key_is_refused(tmp_path):
    fake = socket.socket(socket.AF_UNIX)
    fake.bind(str(tmp_path / "socket"))
    fake.listen()

    def answer():
        line, _ = fake.accept()
        line.sendall(b"n" * 32)
        line.recv(64)
        line.sendall(b"p" * 32)

    threading.Thread(target=answer, daemon=True).start()
    with pytest.raises(ConnectionLost, match="does not know the key"):
        connect(tmp_path / "socket", KEY)


def test_second_client_is_told_that_there_is_one_until_it_is_gone(served):
    path, listener = served
    first = connect(path, KEY)
    server = listener.accept()
    second = connect(path, KEY)
    assert second.poll(5) and second.receive() == (TAKEN, [])
    first.send({"still": "there"})
    assert server.receive() == ({"still": "there"}, [])
    first.send({"the": "last"})
    first.close()
    third = connect(path, KEY)
    assert listener.accept().send({"hello": 3}) is None and third.receive() == ({"hello": 3}, [])
    assert server.receive() == ({"the": "last"}, [])  # rank 0 may still be at work for one that is gone
    third.close()


def test_client_that_left_before_it_was_served_keeps_no_place(served):
    path, listener = served
    connect(path, KEY).close()
    while listener._latest is None or not listener._latest.hung_up:  # the handshake ends at the client first
        time.sleep(0.01)
    second = connect(path, KEY)
    with pytest.raises(ConnectionLost):
        listener.accept().receive()
    listener.accept().send({"hello": 2})
    assert second.receive() == ({"hello": 2}, [])
    second.close()


def test_silent_peers_block_nobody_and_are_shown_out(served, monkeypatch):
    monkeypatch.setattr(channel, "HANDSHAKE_TIMEOUT", 3.0)
    path, listener = served
    silent = [raw(path) for _ in range(channel.MAX_HANDSHAKES + 10)]
    begun = time.monotonic()
    client = connect(path, KEY)
    client.send({"hello": 1})
    assert listener.accept().receive()[0] == {"hello": 1} and time.monotonic() - begun < 3
    for line in silent:
        while line.recv(100):  # its nonce, then the end
            pass


def test_ten_thousand_random_and_truncated_messages_before_the_proof(served):
    path, listener = served
    source = random.Random(1)
    before = threading.active_count()
    for round_ in range(10_000):
        line = raw(path)
        try:
            if round_ % 3:
                line.sendall(source.randbytes(source.randint(1, 200)))
            if round_ % 100 == 1:
                line.shutdown(socket.SHUT_WR)
                assert len(line.recv(200)) <= 32, "more than a nonce went to a stranger"
        except (BrokenPipeError, ConnectionResetError):
            pass  # shown out
        line.close()
    client = connect(path, KEY)
    client.send({"still": "there"})
    assert listener.accept().receive()[0] == {"still": "there"} and listener._accepted.empty()
    deadline = time.monotonic() + 10
    while threading.active_count() > before + 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= before + 1 and not listener._handshakes


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", b"\x05\0\0\0hello", b"\x02\0\0\0[]", b"\x09\0\0\0{}", b"\x02\0\0\0\xff\xfe", b"\x01"],
    ids=["too long", "no JSON", "no object", "truncated", "no UTF-8", "half a length"],
)
def test_frames_that_are_none_end_the_connection(data):
    ours, theirs = pair()
    reading, writing = os.pipe()
    socket.send_fds(theirs.line, [data], [writing])
    theirs.close()
    os.close(writing)
    with pytest.raises(ConnectionLost):
        ours.receive()
    assert os.read(reading, 1) == b"", "the descriptor that came along is still open"
    os.close(reading)


def test_frame_that_is_too_long_is_not_sent():
    ours, theirs = pair()
    with pytest.raises(ValueError, match=f"at most {MAX_FRAME}"):
        ours.send({"x": "y" * MAX_FRAME})
    assert not theirs.poll(0)
