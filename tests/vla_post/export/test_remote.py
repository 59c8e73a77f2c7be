"""A policy on another machine gives the same chunks, and everything that goes wrong is an error."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect
from websockets.sync.server import serve

from trajectory_store.contract import Contract, ContractMismatch, load_contract
from vla_post.export import PolicyInputError, load_policy
from vla_post.export.remote import RemoteError, RemotePolicy, RemoteRefused
from vla_post.export.server import PolicyServer
from vla_post.export.wire import Act, Array, Failure, Hello, WireError, arrays, decode, encode

from ...certificate import self_signed

SHIPPED = Path(__file__).parents[3] / "sim" / "contracts"
CONTRACT = load_contract(SHIPPED / "metaworld_pixels.yaml")
TEXT = "Open a drawer"
TOKEN = "correct horse battery staple"


class Sums:
    """A policy whose chunk says what it was asked; no network is under test here."""

    def __init__(self, contract: Contract) -> None:
        self.observation_keys = tuple(contract.observations)
        self.horizon, self.action_size = contract.chunk_horizon, contract.action.size
        self.contract_sha256 = contract.sha256
        self.takes_previous = True
        self.wait = threading.Event()
        self.wait.set()

    def act(
        self,
        observation: Any,
        instruction: str,
        seed: int = 0,
        *,
        previous: np.ndarray | None = None,
        delay: int = 0,
    ) -> np.ndarray:
        self.wait.wait(10.0)
        if instruction == "raise":
            raise RuntimeError("a bug in the policy")
        if instruction not in (TEXT, "shape"):
            raise PolicyInputError(f"knows no {instruction!r}")
        if instruction == "shape":
            return np.zeros((2, 2), np.float32)
        told = [float(v.astype(np.float64).mean()) for v in observation.values()]
        told += [seed, delay, -1.0 if previous is None else float(previous.sum())]
        chunk = np.zeros((self.horizon, self.action_size), np.float32)
        chunk.flat[: len(told)] = told
        return chunk

    def act_batch(self, observation: Any, instructions: Any, seeds: Any) -> Any:
        raise AssertionError("a server is asked one at a time")

    def reload(self, path: Any) -> None: ...

    def close(self) -> None: ...


def observation(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {
        key: random.integers(256, size=f.shape, dtype=np.uint8)
        if f.is_image
        else random.normal(size=f.shape).astype(np.float32)
        for key, f in CONTRACT.observations.items()
    }


@pytest.fixture
def policy() -> Sums:
    return Sums(CONTRACT)


@pytest.fixture
def server(policy: Sums) -> Iterator[PolicyServer]:
    with PolicyServer(policy, CONTRACT, token=TOKEN) as server:
        yield server


def test_the_same_chunk_as_on_the_spot(server: PolicyServer, policy: Sums):
    with RemotePolicy(server.url, token=TOKEN, contract=CONTRACT) as remote:
        assert remote.observation_keys == policy.observation_keys
        assert (remote.horizon, remote.action_size) == (policy.horizon, policy.action_size)
        assert remote.contract_sha256 == CONTRACT.sha256
        previous = np.random.default_rng(1).normal(size=(5, 4)).astype(np.float32)
        overlaps: list[dict[str, Any]] = [{}, {"previous": previous, "delay": 2}]
        for seed in range(3):
            for overlap in overlaps:
                np.testing.assert_array_equal(
                    remote.act(observation(seed), TEXT, seed, **overlap),
                    policy.act(observation(seed), TEXT, seed, **overlap),
                )
        batch = {key: np.stack([observation(i)[key] for i in range(2)]) for key in observation()}
        both = remote.act_batch(batch, [TEXT, TEXT], np.arange(2))
        np.testing.assert_array_equal(both[1], policy.act(observation(1), TEXT, 1))
        assert {"wire_p50_ms", "wire_p99_ms"} == remote.wire_ms.keys()
        with pytest.raises(ValueError, match="the server chooses its policy"):
            remote.reload("v2")
    assert server.served == 8


def test_several_robots_at_once(server: PolicyServer, policy: Sums):
    wrong: list[int] = []

    def robot(number: int) -> None:
        with RemotePolicy(server.url, token=TOKEN, timeout_s=30.0) as remote:
            for seed in range(10):
                chunk = remote.act(observation(number), TEXT, 100 * number + seed)
                if chunk.flat[len(observation())] != 100 * number + seed:
                    wrong.append(number)

    robots = [threading.Thread(target=robot, args=(number,)) for number in range(4)]
    for thread in robots:
        thread.start()
    for thread in robots:
        thread.join(60.0)
    assert wrong == []
    assert server.served == 40


def test_a_wrong_token_or_cell_is_refused(server: PolicyServer, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("VLA_POST_TOKEN", raising=False)
    for token in ("", "guess", TOKEN.upper()):
        with pytest.raises(RemoteRefused, match="wrong or missing token"):
            RemotePolicy(server.url, token=token)
    other = load_contract(SHIPPED / "metaworld_state.yaml")
    with pytest.raises(ContractMismatch, match="another contract") as refusal:
        RemotePolicy(server.url, token=TOKEN, contract=other)
    assert "cell: sawyer_state -> sawyer_pixels" in str(refusal.value)
    monkeypatch.setenv("VLA_POST_TOKEN", TOKEN)
    policy = load_policy(server.url, contract=CONTRACT)
    assert policy.act(observation(), TEXT).shape == (16, 4)
    policy.close()


def test_no_browser_page_may_connect(server: PolicyServer):
    headers = {"Authorization": f"Bearer {TOKEN}", "Origin": "https://example.org"}
    with pytest.raises(Exception, match="403"):
        connect(server.url, additional_headers=headers, proxy=None)


def test_wrong_inputs_leave_the_connection_usable(server: PolicyServer):
    with RemotePolicy(server.url, token=TOKEN) as remote:
        with pytest.raises(PolicyInputError, match="knows no 'Fly'"):
            remote.act(observation(), "Fly")
        with pytest.raises(PolicyInputError, match="expected"):
            remote.act(observation() | {"observation.state": np.zeros(9, np.float32)}, TEXT)
        with pytest.raises(RemoteError, match="RuntimeError: a bug in the policy"):
            remote.act(observation(), "raise")
        with pytest.raises(RemoteError, match=r"chunk of shape \(2, 2\)"):
            remote.act(observation(), "shape")
        assert remote.act(observation(), TEXT).shape == (16, 4)


def test_a_server_that_dies_is_an_error_until_it_is_back(policy: Sums):
    with PolicyServer(policy, CONTRACT) as first:
        remote = RemotePolicy(first.url, timeout_s=2.0)
        assert remote.act(observation(), TEXT).shape == (16, 4)
    for _ in range(2):
        with pytest.raises(RemoteError, match=r"no policy server|connection broke"):
            remote.act(observation(), TEXT)
    with PolicyServer(policy, CONTRACT, port=first.port):
        assert remote.act(observation(), TEXT).shape == (16, 4)
        remote.close()
    other = load_contract(SHIPPED / "metaworld_state.yaml")
    with (
        PolicyServer(Sums(other), other, port=first.port),
        pytest.raises(RemoteRefused, match="serves another policy than before"),
    ):
        remote.act(observation(), TEXT)


def test_an_answer_that_comes_too_late_is_never_taken_for_the_next(policy: Sums):
    with (
        PolicyServer(policy, CONTRACT) as server,
        RemotePolicy(server.url, timeout_s=0.3) as remote,
    ):
        policy.wait.clear()
        with pytest.raises(RemoteError, match="no answer within"):
            remote.act(observation(1), TEXT, 1)
        policy.wait.set()
        remote._timeout_s = 10.0  # pyright: ignore[reportPrivateUsage]
        np.testing.assert_array_equal(
            remote.act(observation(2), TEXT, 2), policy.act(observation(2), TEXT, 2)
        )


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\xc1",
        b"\x91" * 3000,
        "text",
        msgpack.packb({"type": "chunk", "id": 1}),
        msgpack.packb({"type": "card", "protocol": 9}),
        encode(Hello()),
        encode(Failure(id=-1, code="malformed", text="no")),
    ],
    ids=["empty", "garbage", "nested", "text", "partial", "protocol", "wrong", "failure"],
)
def test_a_bad_server_is_an_error(answer: Any):
    def reply(connection: Any) -> None:
        for _ in connection:
            connection.send(answer)

    with serve(reply, "127.0.0.1", 0) as bad:
        thread = threading.Thread(target=bad.serve_forever)
        thread.start()
        port = bad.socket.getsockname()[1]
        with pytest.raises(RemoteError):
            RemotePolicy(f"ws://127.0.0.1:{port}", timeout_s=5.0)
        bad.shutdown()
        thread.join(10.0)


def test_what_is_no_server_is_an_error():
    with pytest.raises(ValueError, match="is no policy server; expected ws://"):
        RemotePolicy("http://localhost:1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        with pytest.raises(RemoteError, match="vla-post serve"):
            RemotePolicy(f"ws://127.0.0.1:{port}", connect_s=2.0)
        closed.listen()  # takes connections and never says a word
        with pytest.raises(RemoteError, match="no policy server"):
            RemotePolicy(f"ws://127.0.0.1:{port}", connect_s=0.5)


@pytest.mark.parametrize("damage", ["garbage", "text", "oversized", "bomb", "lying array"])
def test_a_bad_robot_does_not_end_the_server(server: PolicyServer, damage: str):
    headers = {"Authorization": f"Bearer {TOKEN}"}
    act = Act(id=7, observation=arrays(observation()), instruction=TEXT, seed=0)
    lying = act.model_copy(
        update={"observation": {"observation.state": Array(dtype="float32", shape=[4], data=b"1")}}
    )
    sent: Any = {
        "garbage": os.urandom(100),
        "text": "hello",
        "oversized": b"\x00" * (65 << 20),
        "bomb": b"\xdd\xff\xff\xff\xff" + b"\x90" * 100,
        "lying array": encode(lying),
    }[damage]
    with connect(server.url, additional_headers=headers, proxy=None, max_size=None) as bad:
        if damage == "oversized":
            with contextlib.suppress(ConnectionClosed):
                bad.send(sent)
            with pytest.raises(ConnectionClosed):
                bad.recv(timeout=20.0)
        else:
            bad.send(sent)
            answer = decode(bad.recv(timeout=20.0))
            assert isinstance(answer, Failure)
            assert answer.code == "malformed"
    with RemotePolicy(server.url, token=TOKEN) as good:
        assert good.act(observation(), TEXT).shape == (16, 4)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=400))
def test_any_bytes_are_a_message_or_a_wire_error(data: bytes):
    with contextlib.suppress(WireError):
        decode(data)


@settings(deadline=None, max_examples=300)
@given(st.integers(0, 10_000), st.integers(0, 7))
def test_a_flipped_bit_is_a_message_or_a_wire_error(place: int, bit: int):
    small = {"observation.state": np.arange(4, dtype=np.float32)}
    data = bytearray(encode(Act(id=1, observation=arrays(small), instruction=TEXT, seed=3)))
    data[place % len(data)] ^= 1 << bit
    with contextlib.suppress(WireError):
        message = decode(bytes(data))
        if isinstance(message, Act):
            for array in message.observation.values():
                array.numpy()


def test_an_open_server_needs_a_token_and_tls(policy: Sums, tmp_path: Path):
    with pytest.raises(ValueError, match="without a token"):
        PolicyServer(policy, CONTRACT, host="0.0.0.0")
    with pytest.raises(ValueError, match="without TLS"):
        PolicyServer(policy, CONTRACT, host="0.0.0.0", token=TOKEN)
    with PolicyServer(policy, CONTRACT, host="0.0.0.0", token=TOKEN, plain=True) as server:
        remote = RemotePolicy(f"ws://127.0.0.1:{server.port}", token=TOKEN)
        assert remote.act(observation(), TEXT).shape == (16, 4)
        remote.close()


def test_tls(policy: Sums, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    certificate, key = self_signed(tmp_path)
    with PolicyServer(policy, CONTRACT, token=TOKEN, certificate=certificate, key=key) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        assert url.startswith("wss://")
        with pytest.raises(RemoteError, match="CERTIFICATE_VERIFY_FAILED"):
            RemotePolicy(url, token=TOKEN)
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
        with RemotePolicy(url, token=TOKEN) as remote:
            assert remote.act(observation(), TEXT).shape == (16, 4)
        with pytest.raises(RemoteError):
            RemotePolicy(url.replace("wss", "ws"), token=TOKEN)


def test_the_wire_needs_no_torch():
    code = (
        "import sys; import vla_post.export.remote, vla_post.export.server; "
        "print([n for n in ('torch', 'lerobot', 'onnx') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
