"""Every setting, with its default, unit and bounds; one reader for JSON and YAML.

Two families. A *deployment* is one model: the files of ServerlessLLM are read unchanged. *Settings* are the cluster's; they
live in Dask's configuration tree under ``sllmdask:`` and are written out with comments in ``configs/reference.yaml``, which
a test compares with the defaults here. Models are frozen; an unknown key is refused, naming the nearest known one.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from sllmdask.errors import ConfigError
from sllmdask.units import parse_bytes, parse_rate, parse_seconds

Bytes = Annotated[int, BeforeValidator(lambda value: value if value is None else parse_bytes(value))]


def _some_bytes_or_auto(value: Any) -> Any:
    if value is None or value == "auto":
        return value
    if (nbytes := parse_bytes(value)) < 1:
        raise ValueError("write 'auto', or a size of 1 byte or more")
    return nbytes


BytesOrAuto = Annotated[int | Literal["auto"], BeforeValidator(_some_bytes_or_auto)]
BytesPerSecond = Annotated[float, BeforeValidator(parse_rate)]
Seconds = Annotated[float, BeforeValidator(parse_seconds)]

#: ``auto`` is what the checkpoint is in. On a CPU, float16 becomes bfloat16, or float32 where the processor has no bfloat16.
Dtype = Literal["auto", "float32", "float16", "bfloat16"]

#: A model's name: what users write in requests, and a part of keys and paths, so no ``..``, no leading slash.
_MODEL_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._:-]*(?:/[A-Za-z0-9][A-Za-z0-9._:-]*)*$")


#: An adapter's name: requests may write it behind that of its base, with a colon between them. A backend's is of that kind.
_ADAPTER_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9._-]*$")

#: What the wire can carry, and more than anybody means.
MAX_COUNT = 2**31 - 1


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


# --- one model -------------------------------------------------------------------------------------------------------


class AutoScaling(Frozen):
    """How many instances of a model there are."""

    metric: Literal["concurrency"] = "concurrency"
    #: Requests per instance: an instance is added when ``ceil(load / target)`` exceeds the number of instances.
    target: int = Field(default=8, ge=1, le=MAX_COUNT)
    min_instances: int = Field(default=0, ge=0, le=MAX_COUNT)
    max_instances: int = Field(default=10, ge=1, le=MAX_COUNT)
    #: Seconds an instance stays without a request; 0 unloads at once, -1 never. ``None``: the cluster's default.
    keep_alive: Seconds | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.min_instances > self.max_instances:
            raise ValueError(f"min_instances ({self.min_instances}) is above max_instances ({self.max_instances})")
        return self


class PlacementSpec(Frozen):
    """Which nodes (Dask worker names) may run the model, have its files on disk, and have it in host memory.

    Files and memory are seen to when the model is deployed, and when such a node joins later.
    """

    target_nodes: tuple[str, ...] = ()
    local_disk: tuple[str, ...] = ()
    memory_pool: tuple[str, ...] = ()

    @property
    def nodes(self) -> tuple[str, ...]:
        """Nodes that may run the model; empty: any. Without `target_nodes` it runs where its files are."""
        return self.target_nodes or self.local_disk


class RouterConfig(Frozen):
    #: Tokens of un-synced tail at which a migration by token handoff stops its rounds.
    migration_delta: int = Field(default=20, ge=0, le=MAX_COUNT)


class CostPriors(Frozen):
    """Priors of the KV recompute time, ``alpha * n_tokens + beta`` seconds (ServerlessLLM, section 5.2)."""

    alpha: float = Field(default=0.01, ge=0)
    beta: float = Field(default=0.1, ge=0)


class BackendConfig(Frozen):
    """Where the weights are and how they are run; the names are ServerlessLLM's and transformers'."""

    pretrained_model_name_or_path: str | None = None
    device_map: str | dict[str, Any] = "auto"
    #: What the weights are served in; ``auto``: what engine.dtype says.
    torch_dtype: Dtype = "auto"
    hf_model_class: str = "AutoModelForCausalLM"
    #: What the model is for: ``embed``, vectors; ``generate``, text; ``auto``: what the checkpoint is made for.
    task: Literal["auto", "generate", "embed"] = "auto"
    #: How an embedding is made of the hidden states of a text; ``None``: what the checkpoint says.
    pooling: Literal["cls", "last", "max", "mean"] | None = None
    #: Whether embeddings have the length 1; ``None``: what the checkpoint says.
    normalize: bool | None = None
    quantization_config: dict[str, Any] | None = None
    enable_lora: bool = False
    #: LoRA adapters that requests may ask for: name -> directory on the workers, or hub id.
    lora_adapters: dict[str, str] | None = None
    #: Longest prompt plus answer in tokens; ``None``: what the checkpoint says.
    max_model_len: int | None = Field(default=None, ge=1, le=MAX_COUNT)

    @property
    def wanted_task(self) -> str:
        """``embed`` where anything asks for embeddings; otherwise `task`."""
        asks = self.hf_model_class == "AutoModel" or self.pooling is not None or self.normalize is not None
        return "embed" if asks else self.task

    @property
    def embedding(self) -> dict[str, Any] | None:
        """How vectors are made, for a worker; ``None`` for a model that generates text, once `task` is known."""
        return {"pooling": self.pooling, "normalize": self.normalize} if self.task == "embed" else None

    @property
    def variant(self) -> str:
        """What instances of one checkpoint that are served in different ways differ in."""
        return self.torch_dtype if self.task != "embed" else f"{self.torch_dtype} embed {self.pooling} {self.normalize}"


class Deployment(Frozen):
    """One model as an operator describes it. Source of the shape: ServerlessLLM's deployment file."""

    model: str
    #: What runs it, by the name under which an installed distribution brings it; the workers know which there are.
    backend: str = "transformers"
    #: Slots an instance takes: GPUs on a GPU worker, slots of the worker on a CPU.
    num_gpus: int = Field(default=1, ge=1, le=MAX_COUNT)
    auto_scaling_config: AutoScaling = AutoScaling()
    placement_config: PlacementSpec = PlacementSpec()
    router_config: RouterConfig = RouterConfig()
    scheduler_config: CostPriors = CostPriors()
    backend_config: BackendConfig = BackendConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not _MODEL_NAME.match(self.model) or len(self.model) > 200:
            raise ValueError(f"model {self.model!r} is not a name: use letters, digits and . _ : - / without '..'")
        if not _ADAPTER_NAME.match(self.backend) or len(self.backend) > 200:
            raise ValueError(f"backend {self.backend!r} is not a name: use letters, digits and . _ -")
        backend = self.backend_config
        if backend.hf_model_class not in ("AutoModelForCausalLM", "AutoModel"):
            known = "only AutoModelForCausalLM is, and AutoModel for embeddings"
            raise ValueError(f"hf_model_class {backend.hf_model_class!r} is not supported; {known}")
        if backend.task == "generate" and backend.wanted_task != "generate":
            raise ValueError("task is 'generate', but pooling, normalize and hf_model_class AutoModel are for embeddings")
        if backend.quantization_config:
            raise ValueError("quantization_config is not supported: serve an unquantised checkpoint")
        if backend.lora_adapters and not backend.enable_lora and "enable_lora" in backend.model_fields_set:
            raise ValueError("lora_adapters are given, but enable_lora is false: leave enable_lora out, or make it true")
        if backend.lora_adapters and backend.wanted_task == "embed":
            raise ValueError("lora_adapters are for models that generate text, not for embedding models")
        for name in backend.lora_adapters or ():
            if not _ADAPTER_NAME.match(name) or len(name) > 200:
                raise ValueError(f"lora_adapters: {name!r} is not a name: use letters, digits and . _ -")
        return self

    @property
    def source(self) -> str:
        """A directory, an http(s) address, a hub id, or ``demo:NAME``."""
        return self.backend_config.pretrained_model_name_or_path or self.model

    @property
    def variant(self) -> str:
        """What instances of one checkpoint that are served in different ways differ in."""
        return f"{self.backend} {self.backend_config.variant}"

    def warnings(self) -> list[str]:
        """Settings that were given and have no effect here, one sentence each."""
        found = []
        if self.backend_config.device_map != "auto":
            found.append("backend_config.device_map has no effect: an instance runs on one device, which engine.device names")
        if self.backend_config.enable_lora and not self.backend_config.lora_adapters:
            found.append("backend_config.enable_lora has no effect without lora_adapters, which names the adapters")
        return found


# --- the cluster -----------------------------------------------------------------------------------------------------


class EngineSettings(Frozen):
    """One instance's engine."""

    #: ``cpu`` or ``cuda``; ``auto`` takes a GPU when the worker sees one.
    device: Literal["auto", "cpu", "cuda"] = "auto"
    #: What weights and KV are in, unless a deployment says otherwise.
    dtype: Dtype = "auto"
    #: Tokens per KV block.
    block_size: int = Field(default=16, ge=1, le=256)
    #: Bytes of KV cache of one instance; ``auto``: what its share of the worker's memory leaves beside its weights, and no more
    #: than `max_running` requests of the model's full length can use.
    kv_memory: BytesOrAuto = "auto"
    #: Sequences that decode together.
    max_running: int = Field(default=64, ge=1)
    #: Tokens in one forward pass: prefill is cut into chunks so that decoding never waits for longer.
    max_batch_tokens: int = Field(default=512, ge=1)
    #: Of these, tokens of prefill beside requests that decode, which wait for each other's step; 0: 128 on a CPU, on a GPU all.
    prefill_beside_decode: int = Field(default=0, ge=0, le=MAX_COUNT)
    #: Whether a request begins with the KV of tokens that another one began with, too.
    prefix_reuse: bool = True
    #: Bytes of host memory for the KV of requests that gave way, where that is quicker than to compute it again; 0: none.
    parking_memory: Bytes = Field(default=64 * 1024**2, ge=0)
    #: Seconds of waiting that are worth one level of priority; 0: waiting counts for nothing.
    ageing: Seconds = Field(default=30.0, ge=0)
    #: LoRA adapters that one instance holds at once; the one that was used longest ago gives way.
    max_adapters: int = Field(default=8, ge=1, le=MAX_COUNT)
    #: Whether an instance begins to serve while its weights are read: layer by layer, behind the reader.
    execute_while_loading: bool = True
    #: Threads of one instance; 0: the host's cores divided by the slots, of all workers that ``up`` starts, or of a worker
    #: started by hand, which does not know its neighbours.
    n_threads: int = Field(default=0, ge=0)
    #: What computes attention: ``auto`` is the fastest for the device.
    attention: Literal["auto", "sdpa", "numba", "triton"] = "auto"
    #: Whether decode steps on a GPU are recorded as CUDA graphs.
    cuda_graphs: bool = True
    #: Whether a request's logits have the same bits alone, in any batch, and computed again. CPU only.
    deterministic: bool = False
    #: Whether linear layers run over weights rearranged for the matrix library, on a CPU. ``always``: from the first token on;
    #: ``auto``: rearranged in the background when the model is hot.
    pack_weights: Literal["auto", "always", "never"] = "auto"
    #: Steps with work after which a model is hot.
    pack_after: int = Field(default=32, ge=0, le=MAX_COUNT)
    #: Bytes of one instance's rearranged weights beside the plain ones; 0: half of the memory that is available then. Never more
    #: than is left of what the worker's instances may take.
    pack_memory: Bytes = Field(default=0, ge=0)


class WorkerSettings(Frozen):
    """One worker process: a node, or one GPU of it."""

    #: Instances' worth of compute: the sum of ``num_gpus`` over loaded instances never exceeds it.
    slots: int = Field(default=1, ge=1)
    #: Bytes of host memory for checkpoints, loaded ones included; 0: half of the host's memory, which the workers that ``up``
    #: starts share, and which a worker started by hand has alone.
    host_memory: Bytes = Field(default=0, ge=0)
    #: Of a GPU's memory, the part that instances may take. On a CPU, of the host's memory, the part that a worker may take, for
    #: `host_memory` and its instances together; the workers that ``up`` starts share it, one started by hand has it alone.
    memory_fraction: float = Field(default=0.9, gt=0, le=1)
    #: Whether the workers of a host have their host memory in common: one copy of a checkpoint for all, which outlives them.
    shared_memory: bool = True
    #: Seconds that shared host memory is kept when no worker of the host is left, for one that is restarted.
    memory_grace: Seconds = Field(default=60.0, ge=0)
    #: Whether to have pages ready for a checkpoint of the size that was seen, so that its load need not wait for them.
    prefault: bool = True
    #: Where checkpoints that came from elsewhere are kept.
    store_dir: str = "~/.cache/sllmdask"
    #: Bytes that they may take there; what was used longest ago gives way. 0: what the disk holds.
    disk_quota: Bytes = Field(default=0, ge=0)
    #: Servers that checkpoints may be fetched from, ``https://*.example.org`` for instance; http to private hosts is allowed.
    remote_hosts: tuple[str, ...] = ("https://*",)
    #: Whether workers supply each other with checkpoints.
    peers: bool = True
    #: Bytes of KV per second that requests which leave a worker may send together; 0: what the network carries.
    migration_bandwidth: BytesPerSecond = Field(default=0.0, ge=0)
    #: Seconds that the worker to which a request moves may take for an answer.
    migration_answer: Seconds = Field(default=10.0, gt=0)
    #: Seconds without a word of the source after which what was reserved for a request is given up.
    migration_reservation: Seconds = Field(default=15.0, gt=0)
    #: Seconds that requests have to move away, or to end, after SIGTERM; 0: none. The workers of ``up`` have none.
    grace: Seconds = Field(default=25.0, ge=0)
    #: Bytes per read.
    chunk_size: Bytes = Field(default=2 * 1024**2, ge=4096)
    #: Threads that read one checkpoint.
    n_readers: int = Field(default=4, ge=1, le=64)
    #: Bytes per second that loads may read from the disk, together; 0: as many as it gives.
    read_limit: BytesPerSecond = Field(default=0.0, ge=0)


class SchedulerSettings(Frozen):
    """What the controller assumes unless a deployment says otherwise."""

    #: Seconds an idle instance stays loaded.
    keep_alive: Seconds = 300.0
    #: Seconds a request may wait for an instance, loading included.
    request_deadline: Seconds = Field(default=300.0, gt=0)
    #: Seconds a request waits when no worker is connected that may run it.
    worker_wait: Seconds = Field(default=20.0, ge=0)
    #: Requests that may wait, over all models.
    max_queue: int = Field(default=1024, ge=1)
    #: Seconds an instance stays loaded at least, before another model may take its slot.
    min_residency: Seconds = Field(default=0.0, ge=0)
    #: Seconds after which a request that waits for a slot closes the instances that hold it to newcomers.
    patience: Seconds = Field(default=10.0, ge=0)
    #: Whether running instances go to other workers to make room, where that is predicted to serve a request the soonest.
    migrate: bool = True
    #: A file to which every event and decision is appended, for ``sllmdask simulate replay``; empty: none is written.
    event_log: str = ""
    #: A file with the hardware of nodes, which estimates begin with; empty: none.
    hardware_config: str = ""
    #: The file that deployments return from when the scheduler is started again. ``auto``: one for its port, where that was
    #: given; empty: none.
    state: str = "auto"


class ServerSettings(Frozen):
    """The front door."""

    host: str = "127.0.0.1"
    port: int = Field(default=8343, ge=0, le=65535)
    #: Bytes of one request body.
    max_body_bytes: Bytes = Field(default=8 * 1024**2, ge=1024)
    #: Seconds between SSE comments while nothing else is sent.
    heartbeat: Seconds = Field(default=5.0, gt=0)
    #: Seconds without a word from a worker, which is asked for one ten times in that time, after which it counts as lost.
    worker_silence: Seconds = Field(default=20.0, gt=0)
    #: Seconds that a request may be nowhere because it moves; then it is continued from what its client has.
    move_patience: Seconds = Field(default=5.0, gt=0)


class Settings(Frozen):
    """Dask's configuration under ``sllmdask:``."""

    engine: EngineSettings = EngineSettings()
    worker: WorkerSettings = WorkerSettings()
    scheduler: SchedulerSettings = SchedulerSettings()
    server: ServerSettings = ServerSettings()


class NodeHardware(Frozen):
    """Priors of one node, from ``--hardware-config``; measured loads refine them. Sizes bound what is used."""

    host_size: Bytes | None = Field(default=None, gt=0)
    host_bandwidth: BytesPerSecond | None = Field(default=None, gt=0)
    disk_size: Bytes | None = Field(default=None, gt=0)
    disk_bandwidth: BytesPerSecond | None = Field(default=None, gt=0)
    network_bandwidth: BytesPerSecond | None = Field(default=None, gt=0)
    pcie_bandwidth: BytesPerSecond | None = Field(default=None, gt=0)


# --- reading ---------------------------------------------------------------------------------------------------------

T = TypeVar("T", bound=BaseModel)


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _known_keys(cls: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    """Names that would have been right at the place where `path` ends."""
    for part in path[:-1]:
        if isinstance(part, int):  # a place in a list
            continue
        models = _models_in(cls.model_fields[str(part)].annotation) if str(part) in cls.model_fields else []
        if not models:
            return []
        cls = models[0]
    return list(cls.model_fields)


def parse(cls: type[T], data: Any, what: str = "the configuration") -> T:
    """`data` as a `cls`; raises :class:`ConfigError` with the key, the value, the rule and the nearest known key."""
    try:
        return cls.model_validate(data)
    except ValidationError as error:
        problems = []
        for problem in error.errors():
            where = ".".join(str(part) for part in problem["loc"])
            if problem["type"] == "extra_forbidden":
                known = _known_keys(cls, problem["loc"])
                near = difflib.get_close_matches(str(problem["loc"][-1]), known, n=1)
                hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}."
                problems.append((where, f"unknown key {where!r}; {hint}"))
            elif problem["type"] == "missing":
                problems.append((where, f"{where} is missing"))
            else:
                rule = problem["msg"].removeprefix("Value error, ")
                problems.append((where, f"{where}: {rule}" if where else rule))
        message = f"{what[0].upper()}{what[1:]} is wrong: " + "; ".join(text for _, text in problems)
        raise ConfigError(message, problems[0][0] or None) from None
    except ConfigError as error:
        raise ConfigError(f"{what[0].upper()}{what[1:]} is wrong: {error.message}", error.param) from None


def read_file(path: str | os.PathLike[str]) -> Any:
    """The contents of a JSON or YAML file; raises :class:`ConfigError`."""
    path = Path(path).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"Cannot read {path}: {error}") from None
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (json.JSONDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} is neither JSON nor YAML: {' '.join(str(error).split())}") from None


def read_deployment(path: str | os.PathLike[str]) -> Deployment:
    """The deployment that a file describes."""
    return parse(Deployment, read_file(path), f"the deployment {path}")


def read_hardware(path: str | os.PathLike[str]) -> dict[str, NodeHardware]:
    """Priors by node name, from a hardware file."""
    data = read_file(path)
    if not isinstance(data, Mapping) or not data:
        raise ConfigError(f"The hardware file {path} must map node names to their hardware")
    return {str(name): parse(NodeHardware, node, f"node {name!r} of {path}") for name, node in data.items()}
