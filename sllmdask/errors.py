"""Every exception of the project, sorted by who can act on it.

    SllmError
    ├── ConfigError                 the operator: a file, a flag or an environment variable is wrong
    │   ├── PortInUse
    │   └── DeterminismUnavailable
    ├── CheckpointError             the operator: the files of a model are wrong
    │   ├── CheckpointNotFound
    │   ├── CheckpointCorrupt
    │   ├── CheckpointTooNew
    │   ├── CheckpointExists
    │   ├── TensorUnsupported
    │   ├── DiskFull
    │   ├── AdapterUnsupported
    │   └── UnsupportedArchitecture
    ├── RequestError                the caller: the same request will fail again
    │   ├── InvalidRequest
    │   ├── ContextTooLong
    │   ├── ModelNotFound
    │   ├── ModelDeleted
    │   ├── AdapterNotFound
    │   ├── RecordNotFound
    │   ├── NodeDraining
    │   ├── WrongTask
    │   ├── RouteNotFound
    │   ├── MethodNotAllowed
    │   ├── UnsupportedMediaType
    │   └── BodyTooLarge
    ├── Unavailable                 nobody yet: the same request may succeed later
    │   ├── QueueFull
    │   ├── QueueTimeout
    │   ├── NoWorker
    │   ├── InsufficientMemory
    │   ├── HostPoolUnavailable
    │   ├── LoadFailed
    │   ├── SourceUnreachable
    │   ├── SchedulerUnreachable
    │   └── StateUnwritable
    ├── WorkerLost                  the cluster: the request may be tried on another worker
    ├── InstanceGone                the cluster: the instance left or died; the request may be tried on another one
    ├── ModelReplaced               the caller: an answer cannot be continued by another checkpoint
    ├── StateRefused                the cluster: a request cannot move with its KV, but it can with its tokens
    ├── MoveFailed                  the cluster: a request or an instance could not go where an operator wanted it
    ├── Cancelled                   the caller went away
    ├── EngineError                 the engine failed this one request
    └── ServerError                 client.py: what a server answered; each is also of the class that its code names

The class carries the HTTP answer, so the front door has no chain of conditions. Fields are passed to ``super().__init__``
one by one, because pickle (Dask) replays ``args``; :meth:`SllmError.as_wire` and :func:`from_wire` carry an error over our
own connections, which know no pickle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def _bytes(nbytes: int) -> str:
    """``"1.5 GiB"``. Here, because the module of units raises our errors."""
    return f"{nbytes / 1024**3:.1f} GiB" if nbytes >= 1024**3 else f"{nbytes / 1024**2:.1f} MiB"


class SllmError(Exception):
    """Base of all errors that may leave an actor. ``http_status``, ``type`` and ``code`` are its answer over HTTP."""

    http_status: int = 500
    type: str = "server_error"
    code: str | None = "internal_error"
    #: The field of the request that was wrong.
    param: str | None = None

    @property
    def message(self) -> str:
        """What was wrong, why, and what to do, for a person."""
        return str(self.args[0]) if self.args else type(self).__name__

    def __str__(self) -> str:
        return self.message

    def as_wire(self) -> dict[str, Any]:
        """This error as plain msgpack types."""
        return {"error": type(self).__name__, "args": list(self.args), "param": self.param}


class ConfigError(SllmError):
    """``ConfigError(message, param=None)``: a setting is unknown, of the wrong type or out of bounds."""

    http_status, type, code = 400, "invalid_request_error", "invalid_config"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.param = param


class PortInUse(ConfigError):
    """``PortInUse(host, port)``."""

    def __init__(self, host: str, port: int) -> None:
        SllmError.__init__(self, host, port)
        self.host, self.port = host, port

    @property
    def message(self) -> str:
        return f"Port {self.port} on {self.host} is taken by another program. Choose another with --port, or stop that program."


class DeterminismUnavailable(ConfigError):
    """``DeterminismUnavailable(reason)``: ``engine.deterministic`` asks for bits that this machine does not keep."""

    def __init__(self, reason: str) -> None:
        SllmError.__init__(self, reason)
        self.reason = reason
        self.param = "deterministic"

    @property
    def message(self) -> str:
        return (
            f"engine.deterministic cannot be kept here: {self.reason}. "
            "Set it to false, or run the model on a worker where it can be kept."
        )


class CheckpointError(SllmError):
    """The files of a model cannot be used."""

    http_status, type, code = 400, "invalid_request_error", "invalid_checkpoint"


class CheckpointNotFound(CheckpointError):
    """``CheckpointNotFound(source, reason)``: no such directory, or one without what a checkpoint needs."""

    code = "checkpoint_not_found"

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    @property
    def message(self) -> str:
        return f"No checkpoint at {self.source!r}: {self.reason}"


class CheckpointCorrupt(CheckpointError):
    """``CheckpointCorrupt(file, tensor, reason)``: a file is truncated or contradicts itself; `tensor` may be ``None``."""

    code = "checkpoint_corrupt"

    def __init__(self, file: str, tensor: str | None, reason: str) -> None:
        super().__init__(file, tensor, reason)
        self.file, self.tensor, self.reason = file, tensor, reason

    @property
    def message(self) -> str:
        where = f"{self.file}, tensor {self.tensor!r}" if self.tensor else self.file
        return f"The checkpoint is damaged ({where}): {self.reason}. Fetch or convert it again."


class CheckpointTooNew(CheckpointError):
    """``CheckpointTooNew(file, version, known)``: `file` is of a later version of our format than `known`, the last one read."""

    code = "checkpoint_too_new"

    def __init__(self, file: str, version: int, known: int) -> None:
        super().__init__(file, version, known)
        self.file, self.version, self.known = file, version, known

    @property
    def message(self) -> str:
        return (
            f"The checkpoint {self.file} is of version {self.version} of the format, but this sllmdask reads up to {self.known}. "
            "Update sllmdask, or convert the checkpoint again with this one."
        )


class CheckpointExists(CheckpointError):
    """``CheckpointExists(path, reason)``: something is where a checkpoint was to be written, and it stays as it is."""

    code = "checkpoint_exists"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    @property
    def message(self) -> str:
        return f"Nothing was written to {self.path!r}: {self.reason}."


class TensorUnsupported(CheckpointError):
    """``TensorUnsupported(tensor, reason)``: no checkpoint can hold this tensor as it is."""

    code = "tensor_unsupported"

    def __init__(self, tensor: str, reason: str) -> None:
        super().__init__(tensor, reason)
        self.tensor, self.reason = tensor, reason

    @property
    def message(self) -> str:
        return f"The tensor {self.tensor!r} cannot be saved: {self.reason}."


class DiskFull(CheckpointError):
    """``DiskFull(path, needed, free, reason)``: a checkpoint of `needed` bytes does not fit; nothing of it is left behind."""

    http_status, type, code = 507, "server_error", "disk_full"

    def __init__(self, path: str, needed: int, free: int, reason: str = "the disk is full") -> None:
        super().__init__(path, needed, free, reason)
        self.path, self.needed, self.free, self.reason = path, needed, free, reason

    @property
    def message(self) -> str:
        sizes = f"It needs {_bytes(self.needed)}, {_bytes(self.free)} are free."
        return f"The checkpoint {self.path!r} was not written: {self.reason}. {sizes} Make room, or choose another disk."


class UnsupportedArchitecture(CheckpointError):
    """``UnsupportedArchitecture(architecture, reason)``: the engine cannot run models of this class."""

    code = "unsupported_architecture"

    def __init__(self, architecture: str, reason: str) -> None:
        super().__init__(architecture, reason)
        self.architecture, self.reason = architecture, reason

    @property
    def message(self) -> str:
        return f"The architecture {self.architecture!r} cannot be served: {self.reason}"


class AdapterUnsupported(CheckpointError):
    """``AdapterUnsupported(adapter, reason)``: this LoRA adapter cannot be used with this base model."""

    code = "unsupported_adapter"

    def __init__(self, adapter: str, reason: str) -> None:
        super().__init__(adapter, reason)
        self.adapter, self.reason = adapter, reason

    @property
    def message(self) -> str:
        return f"The LoRA adapter {self.adapter!r} cannot be used: {self.reason}."


class RequestError(SllmError):
    """The caller's fault; trying again will not help."""

    http_status, type, code = 400, "invalid_request_error", "invalid_request"


class InvalidRequest(RequestError):
    """``InvalidRequest(message, param=None)``: a field is missing, of the wrong type, out of bounds or not supported."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)
        self.param = param


class ContextTooLong(RequestError):
    """``ContextTooLong(n_tokens, limit)``: the prompt leaves no room for an answer in the model's window of `limit` tokens."""

    code = "context_length_exceeded"

    def __init__(self, n_tokens: int, limit: int) -> None:
        super().__init__(n_tokens, limit)
        self.n_tokens, self.limit = n_tokens, limit

    @property
    def message(self) -> str:
        return (
            f"This model's maximum context length is {self.limit} tokens, but the prompt has {self.n_tokens} tokens. "
            "Shorten the prompt."
        )


class ModelNotFound(RequestError):
    """``ModelNotFound(model, near=())``: no deployment of that name; `near` are similar names."""

    http_status, code = 404, "model_not_found"
    param = "model"

    def __init__(self, model: str, near: Sequence[str] = ()) -> None:
        super().__init__(model, list(near))
        self.model, self.near = model, list(near)

    @property
    def message(self) -> str:
        hint = f" Did you mean {', '.join(map(repr, self.near))}?" if self.near else " GET /v1/models lists what is deployed."
        return f"Could not find the model {self.model!r}: it does not exist here.{hint}"


class ModelDeleted(RequestError):
    """``ModelDeleted(model)``: an operator has taken the model away while it answered."""

    http_status, code = 410, "model_deleted"
    param = "model"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    @property
    def message(self) -> str:
        return f"The model {self.model!r} was deleted while it answered. It does not exist any more: choose another one."


class AdapterNotFound(RequestError):
    """``AdapterNotFound(model, adapter, near=())``: `model` has no LoRA adapter of that name; `near` are similar names."""

    http_status, code = 404, "adapter_not_found"
    param = "lora_adapter_name"

    def __init__(self, model: str, adapter: str, near: Sequence[str] = ()) -> None:
        super().__init__(model, adapter, list(near))
        self.model, self.adapter, self.near = model, adapter, list(near)

    @property
    def message(self) -> str:
        hint = f" Did you mean {', '.join(map(repr, self.near))}?" if self.near else " GET /v1/models lists what is deployed."
        return f"Could not find the adapter {self.adapter!r} of the model {self.model!r}: it does not exist here.{hint}"


class RecordNotFound(RequestError):
    """``RecordNotFound(name, n_kept, kept_s)``: nothing is known of a request or model.

    `n_kept` requests that have ended are kept, the oldest of them since `kept_s` seconds.
    """

    http_status, code = 404, "record_not_found"

    def __init__(self, name: str, n_kept: int, kept_s: float) -> None:
        super().__init__(name, n_kept, kept_s)
        self.name, self.n_kept, self.kept_s = name, n_kept, kept_s

    @property
    def message(self) -> str:
        kept = f" The last {self.n_kept} that have ended are kept, the oldest since {self.kept_s:.0f} s." if self.n_kept else ""
        return f"Nothing is known of {self.name!r}: it is no model, and no request that is under way or has ended lately.{kept}"


class NodeDraining(RequestError):
    """``NodeDraining(node, cause)``: something was to be brought to a node that is to be empty soon."""

    http_status, code, param = 409, "node_draining", "node"

    def __init__(self, node: str, cause: str) -> None:
        super().__init__(node, cause)
        self.node, self.cause = node, cause

    @property
    def message(self) -> str:
        what_to_do = "Choose another node, or end that first: sllmdask drain NODE --undo."
        return f"Node {self.node} takes nothing new: it is being drained ({self.cause}). {what_to_do}"


class WrongTask(RequestError):
    """``WrongTask(model, task)``: `model` is for `task`, ``embed`` or ``generate``, and was asked for the other."""

    code = "wrong_task"
    param = "model"

    def __init__(self, model: str, task: str) -> None:
        super().__init__(model, task)
        self.model, self.task = model, task

    @property
    def message(self) -> str:
        if self.task == "embed":
            return f"{self.model!r} is an embedding model: it answers POST /v1/embeddings, and generates no text."
        return (
            f"{self.model!r} generates text, and was deployed without pooling, so it makes no embeddings. Deploy it with "
            '"task": "embed" in backend_config for that, under another name if it is to do both.'
        )


class RouteNotFound(RequestError):
    """``RouteNotFound(method, path)``."""

    http_status, code = 404, "not_found"

    def __init__(self, method: str, path: str) -> None:
        super().__init__(method, path)
        self.method, self.path = method, path

    @property
    def message(self) -> str:
        return f"Nothing is served at {self.method} {self.path}."


class MethodNotAllowed(RequestError):
    """``MethodNotAllowed(method, path, allowed)``."""

    http_status, code = 405, "method_not_allowed"

    def __init__(self, method: str, path: str, allowed: Sequence[str] = ()) -> None:
        super().__init__(method, path, list(allowed))
        self.method, self.path, self.allowed = method, path, list(allowed)

    @property
    def message(self) -> str:
        return f"{self.method} is not allowed on {self.path}; use {' or '.join(self.allowed) or 'another method'}."


class UnsupportedMediaType(RequestError):
    """``UnsupportedMediaType(content_type)``."""

    http_status, code = 415, "unsupported_media_type"

    def __init__(self, content_type: str) -> None:
        super().__init__(content_type)
        self.content_type = content_type

    @property
    def message(self) -> str:
        return f"The body must be application/json, not {self.content_type!r}."


class BodyTooLarge(RequestError):
    """``BodyTooLarge(limit)``: the request's body has more than `limit` bytes."""

    http_status, code = 413, "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit

    @property
    def message(self) -> str:
        return f"The request body is larger than {self.limit} bytes (server.max_body_bytes)."


class Unavailable(SllmError):
    """Not now; the same request may succeed later. ``retry_after_s`` tells when to try again."""

    http_status, type, code = 503, "service_unavailable", "unavailable"
    retry_after_s: int | None = 5


class QueueFull(Unavailable):
    """``QueueFull(model, limit)``: `limit` requests wait already."""

    http_status, type, code = 429, "rate_limit_error", "queue_full"

    def __init__(self, model: str, limit: int) -> None:
        super().__init__(model, limit)
        self.model, self.limit = model, limit

    @property
    def message(self) -> str:
        return f"The queue is full: {self.limit} requests are waiting already. Try again later."


class QueueTimeout(Unavailable):
    """``QueueTimeout(model, waited_s, reason)``: the request's deadline passed before an instance was free."""

    code = "queue_timeout"

    def __init__(self, model: str, waited_s: float, reason: str) -> None:
        super().__init__(model, waited_s, reason)
        self.model, self.waited_s, self.reason = model, waited_s, reason

    @property
    def message(self) -> str:
        return f"Model {self.model!r} could not serve the request within {self.waited_s:.0f} s: {self.reason}"


class NoWorker(Unavailable):
    """``NoWorker(model, reason)``: no connected worker may or can run this model."""

    code = "no_worker"

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model, self.reason = model, reason

    @property
    def message(self) -> str:
        return f"No worker can run model {self.model!r}: {self.reason}"


class InsufficientMemory(Unavailable):
    """``InsufficientMemory(model, needed, available, advice="")`` in bytes: what the model asks for is not free where it runs.

    `needed` is 0 where nobody knows. `advice` says what to do, where it is not a matter of a worker's host memory.
    """

    code = "insufficient_memory"
    retry_after_s = None

    def __init__(self, model: str, needed: int, available: int, advice: str = "") -> None:
        super().__init__(model, needed, available, advice)
        self.model, self.needed, self.available, self.advice = model, needed, available, advice

    @property
    def message(self) -> str:
        advice = self.advice or "Add a larger worker, or raise worker.host_memory."
        if not self.needed:
            return f"Model {self.model!r} needs more memory than a worker has: {_bytes(self.available)} are left. {advice}"
        return f"Model {self.model!r} needs {_bytes(self.needed)} of memory, but a worker has {_bytes(self.available)}. {advice}"


class HostPoolUnavailable(Unavailable):
    """``HostPoolUnavailable(name, reason)``: the node's shared host memory cannot be had."""

    code = "host_pool_unavailable"

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    @property
    def message(self) -> str:
        return f"The shared host memory {self.name!r} of this node cannot be used: {self.reason}"


class LoadFailed(Unavailable):
    """``LoadFailed(model, reason)``."""

    code = "load_failed"

    def __init__(self, model: str, reason: str) -> None:
        super().__init__(model, reason)
        self.model, self.reason = model, reason

    @property
    def message(self) -> str:
        return f"Model {self.model!r} could not be loaded: {self.reason}"


class SourceUnreachable(Unavailable):
    """``SourceUnreachable(source, reason)``: what a checkpoint was to come from does not answer, or no longer."""

    code = "source_unreachable"

    def __init__(self, source: str, reason: str) -> None:
        super().__init__(source, reason)
        self.source, self.reason = source, reason

    @property
    def message(self) -> str:
        return f"The checkpoint did not come from {self.source!r}: {self.reason}"


class SchedulerUnreachable(Unavailable):
    """``SchedulerUnreachable(address, reason)``."""

    code = "scheduler_unreachable"

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address, self.reason = address, reason

    @property
    def message(self) -> str:
        return f"The Dask scheduler at {self.address} is not reachable ({self.reason}). Is it running, with the sllmdask preload?"


class StateUnwritable(Unavailable):
    """``StateUnwritable(path, reason)``: what was asked for could not be kept for the next start, and was not done."""

    code = "state_unwritable"

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path, self.reason = path, reason

    @property
    def message(self) -> str:
        return f"The scheduler cannot write its state to {self.path}, so nothing was changed: {self.reason}."


class WorkerLost(SllmError):
    """``WorkerLost(worker)``: the worker process died or cannot be reached."""

    http_status, code = 502, "worker_lost"

    def __init__(self, worker: str) -> None:
        super().__init__(worker)
        self.worker = worker

    @property
    def message(self) -> str:
        return f"The worker {self.worker} was lost while it served this request. Send the request again."


class InstanceGone(SllmError):
    """``InstanceGone(instance, reason)``: the instance left, or, with a `reason`, its engine died."""

    http_status, code = 503, "instance_gone"

    def __init__(self, instance: str, reason: str = "") -> None:
        super().__init__(instance, reason)
        self.instance, self.reason = instance, reason

    @property
    def message(self) -> str:
        if self.reason:
            return f"The instance {self.instance} died: {self.reason}"
        return f"The instance {self.instance} is not loaded any more."


class ModelReplaced(SllmError):
    """``ModelReplaced(model)``: an answer cannot be continued, since the model is another checkpoint by now."""

    http_status, code = 503, "model_replaced"

    def __init__(self, model: str) -> None:
        super().__init__(model)
        self.model = model

    @property
    def message(self) -> str:
        return f"{self.model!r} was deployed from another checkpoint while it answered. Send the request again."


class Cancelled(SllmError):
    """``Cancelled(reason)``: the client went away, or an operator cancelled the request."""

    http_status, type, code = 499, "cancelled", "cancelled"

    def __init__(self, reason: str = "the client went away") -> None:
        super().__init__(reason)


class StateRefused(SllmError):
    """``StateRefused(request, reason)``: its state cannot be given or taken by this engine; it can go on from its tokens."""

    http_status, type, code = 409, "invalid_request_error", "state_refused"

    def __init__(self, request: str, reason: str) -> None:
        super().__init__(request, reason)
        self.request, self.reason = request, reason

    @property
    def message(self) -> str:
        return f"The state of request {self.request!r} cannot move: {self.reason}. Its tokens can, and are computed again."


class MoveFailed(SllmError):
    """``MoveFailed(what, node, reason)``: it goes on where it was."""

    http_status, type, code = 409, "invalid_request_error", "move_failed"

    def __init__(self, what: str, node: str, reason: str) -> None:
        super().__init__(what, node, reason)
        self.what, self.node, self.reason = what, node, reason

    @property
    def message(self) -> str:
        return f"{self.what} could not be moved to node {self.node}: {self.reason}. It goes on where it was."


class EngineError(SllmError):
    """``EngineError(reason)``: the engine could not go on with this request; others are not affected."""

    code = "engine_error"

    def __init__(self, reason: str) -> None:
        super().__init__(reason)


def _subclasses(cls: type[SllmError]) -> dict[str, type[SllmError]]:
    found = {cls.__name__: cls}
    for child in cls.__subclasses__():
        found.update(_subclasses(child))
    return found


def from_wire(data: Mapping[str, Any]) -> SllmError:
    """The error that :meth:`SllmError.as_wire` wrote; an unknown class becomes a plain :class:`SllmError`."""
    cls = _subclasses(SllmError).get(data["error"])
    if cls is None:
        return SllmError(f"{data['error']}: {data['args']}")
    error = cls(*data["args"])
    error.param = data.get("param", error.param)
    return error
