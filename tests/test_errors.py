"""Every error crosses processes unchanged, by pickle (Dask) and by wire (our own connections), and knows its HTTP answer."""

from __future__ import annotations

import inspect
import pickle
import re

import msgpack
import pytest

from sllmdask import errors
from sllmdask.errors import SllmError, from_wire

EXAMPLES: list[SllmError] = [
    SllmError("something went wrong"),
    errors.ConfigError("port is missing", "server.port"),
    errors.ConfigError("two settings contradict each other"),
    errors.PortInUse("127.0.0.1", 8343),
    errors.DeterminismUnavailable("the processor has no bfloat16"),
    errors.CheckpointError("the files are wrong"),
    errors.CheckpointNotFound("/models/qwen", "there is no such directory"),
    errors.CheckpointCorrupt("model.safetensors", "lm_head.weight", "it ends early"),
    errors.CheckpointCorrupt("model.safetensors", None, "its header is no JSON"),
    errors.CheckpointTooNew("/models/qwen/index.json", 2, 1),
    errors.CheckpointExists("/models/qwen", "something is there already"),
    errors.TensorUnsupported("lm_head.weight", "it is sparse"),
    errors.DiskFull("/models/qwen", 3_000_000_000, 1_000_000_000),
    errors.DiskFull("/models/qwen", 3_000_000_000, 1_000_000_000, "a file may not become so large here"),
    errors.UnsupportedArchitecture("MambaForCausalLM", "it keeps a recurrent state"),
    errors.AdapterUnsupported("polite", "it is for another model"),
    errors.RequestError("send something else"),
    errors.InvalidRequest("temperature must be a number", "temperature"),
    errors.InvalidRequest("The body must be a JSON object."),
    errors.ContextTooLong(5000, 2048),
    errors.ModelNotFound("qwem", ("qwen",)),
    errors.ModelNotFound("gpt"),
    errors.ModelDeleted("qwen"),
    errors.AdapterNotFound("qwen", "polit", ("polite",)),
    errors.AdapterNotFound("qwen", "polite"),
    errors.RecordNotFound("req-7", 2048, 1800.0),
    errors.RecordNotFound("req-7", 0, 0.0),
    errors.NodeDraining("1", "an operator asked"),
    errors.WrongTask("minilm", "embed"),
    errors.WrongTask("qwen", "generate"),
    errors.RouteNotFound("GET", "/v2"),
    errors.MethodNotAllowed("POST", "/v1/models", ("GET", "HEAD")),
    errors.UnsupportedMediaType("text/plain"),
    errors.BodyTooLarge(1024),
    errors.Unavailable("The front door is stopping."),
    errors.QueueFull("qwen", 1024),
    errors.QueueTimeout("qwen", 300.0, "it is still loading"),
    errors.NoWorker("qwen", "no worker is connected"),
    errors.InsufficientMemory("qwen", 3_000_000_000, 1_000_000_000),
    errors.LoadFailed("qwen", "the disk is on fire"),
    errors.HostPoolUnavailable("pool", "its keeper did not start"),
    errors.SourceUnreachable("https://models.example/qwen", "connection refused"),
    errors.SchedulerUnreachable("tcp://10.0.0.1:8786", "connection refused"),
    errors.StateUnwritable("/var/lib/sllmdask/state.sqlite", "database or disk is full"),
    errors.WorkerLost("tcp://10.0.0.2:40000"),
    errors.InstanceGone("qwen/7"),
    errors.InstanceGone("qwen/7", "out of memory"),
    errors.ModelReplaced("qwen"),
    errors.StateRefused("r1", "its KV is in bfloat16, here it is in float32"),
    errors.MoveFailed("The request 'r1'", "1", "there is no room"),
    errors.Cancelled(),
    errors.Cancelled("an operator cancelled it"),
    errors.EngineError("not enough memory for the step"),
]
#: The classes of errors.py; those of client.py stand beside them in the tree of exceptions.
CLASSES = [cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, SllmError)]

each_error = pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)


def told_by(error: SllmError) -> dict[str, object]:
    """All that an error tells: its class, its fields, and its answer over HTTP."""
    answer = {name: getattr(error, name) for name in ("message", "param", "http_status", "type", "code")}
    return {"class": type(error), "args": error.args, **vars(error), **answer}


def test_there_is_an_example_of_every_class() -> None:
    assert {type(error) for error in EXAMPLES} == set(CLASSES)


@each_error
def test_an_error_survives_pickle_with_its_message_and_its_fields(error: SllmError) -> None:
    assert told_by(pickle.loads(pickle.dumps(error))) == told_by(error)


@each_error
def test_an_error_survives_our_own_wire_with_its_message_and_its_fields(error: SllmError) -> None:
    wire = msgpack.unpackb(msgpack.packb(error.as_wire()))
    assert told_by(from_wire(wire)) == told_by(error)


@each_error
def test_an_error_says_something_and_carries_its_http_answer(error: SllmError) -> None:
    assert error.message
    assert str(error) == error.message
    assert 400 <= error.http_status < 600
    assert error.type
    assert error.code


def test_an_error_of_a_class_that_this_version_does_not_know_becomes_a_plain_one_that_names_it() -> None:
    error = from_wire({"error": "FromTheFuture", "args": ["hello"]})
    assert type(error) is SllmError
    assert "FromTheFuture" in error.message
    assert "hello" in error.message


def test_codes_name_one_class_each_so_that_a_client_can_tell_them_apart() -> None:
    own = [cls for cls in CLASSES if "code" in vars(cls)]
    assert len({cls.code for cls in own}) == len(own)


def drawn_tree() -> dict[str, str | None]:
    """Each class in the drawing of errors.py, with its parent there."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        drawn = re.fullmatch(r" {4}((?:│   |    )*(?:├── |└── )?)(\w+)(?: {2,}\S.*)?", line)
        if drawn:
            depth = len(drawn[1]) // 4
            parents[drawn[2]] = above[depth - 1] if depth else None
            above[depth:] = [drawn[2]]
    return parents


def test_the_tree_in_the_docstring_is_the_tree_of_the_classes() -> None:
    drawn = drawn_tree()
    assert drawn.pop("ServerError") == "SllmError"  # of client.py
    assert drawn == {cls.__name__: None if cls is SllmError else cls.__mro__[1].__name__ for cls in CLASSES}
