from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Role(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ROLE_UNSPECIFIED: _ClassVar[Role]
    ROLE_INPUT: _ClassVar[Role]
    ROLE_WEIGHT: _ClassVar[Role]
    ROLE_GRAD_OUTPUT: _ClassVar[Role]

class Compression(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    COMPRESSION_UNSPECIFIED: _ClassVar[Compression]
    COMPRESSION_NONE: _ClassVar[Compression]
    COMPRESSION_ZSTD: _ClassVar[Compression]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_FINISHED: _ClassVar[Outcome]
    OUTCOME_FAILED: _ClassVar[Outcome]
ROLE_UNSPECIFIED: Role
ROLE_INPUT: Role
ROLE_WEIGHT: Role
ROLE_GRAD_OUTPUT: Role
COMPRESSION_UNSPECIFIED: Compression
COMPRESSION_NONE: Compression
COMPRESSION_ZSTD: Compression
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_FINISHED: Outcome
OUTCOME_FAILED: Outcome

class ClientMessage(_message.Message):
    __slots__ = ("open", "stats", "finish", "heartbeat", "histograms", "more")
    OPEN_FIELD_NUMBER: _ClassVar[int]
    STATS_FIELD_NUMBER: _ClassVar[int]
    FINISH_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    HISTOGRAMS_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    open: Open
    stats: StatsBatch
    finish: Finish
    heartbeat: Heartbeat
    histograms: HistogramBatch
    more: bool
    def __init__(self, open: _Optional[_Union[Open, _Mapping]] = ..., stats: _Optional[_Union[StatsBatch, _Mapping]] = ..., finish: _Optional[_Union[Finish, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ..., histograms: _Optional[_Union[HistogramBatch, _Mapping]] = ..., more: bool = ...) -> None: ...

class ServerMessage(_message.Message):
    __slots__ = ("opened", "ack", "window", "draining", "requests", "turns")
    OPENED_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    WINDOW_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    REQUESTS_FIELD_NUMBER: _ClassVar[int]
    TURNS_FIELD_NUMBER: _ClassVar[int]
    opened: Opened
    ack: Ack
    window: int
    draining: bool
    requests: _containers.RepeatedCompositeFieldContainer[Request]
    turns: int
    def __init__(self, opened: _Optional[_Union[Opened, _Mapping]] = ..., ack: _Optional[_Union[Ack, _Mapping]] = ..., window: _Optional[int] = ..., draining: bool = ..., requests: _Optional[_Iterable[_Union[Request, _Mapping]]] = ..., turns: _Optional[int] = ...) -> None: ...

class Open(_message.Message):
    __slots__ = ("run", "project", "rank", "world_size", "incarnation", "source_uuid", "started_unix_ns", "sent_unix_ns", "agent_version", "slots", "config_json", "environment", "tags", "notes")
    class EnvironmentEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    PROJECT_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_SIZE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SOURCE_UUID_FIELD_NUMBER: _ClassVar[int]
    STARTED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    AGENT_VERSION_FIELD_NUMBER: _ClassVar[int]
    SLOTS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    ENVIRONMENT_FIELD_NUMBER: _ClassVar[int]
    TAGS_FIELD_NUMBER: _ClassVar[int]
    NOTES_FIELD_NUMBER: _ClassVar[int]
    run: str
    project: str
    rank: int
    world_size: int
    incarnation: int
    source_uuid: str
    started_unix_ns: int
    sent_unix_ns: int
    agent_version: str
    slots: _containers.RepeatedCompositeFieldContainer[Slot]
    config_json: str
    environment: _containers.ScalarMap[str, str]
    tags: _containers.RepeatedScalarFieldContainer[str]
    notes: str
    def __init__(self, run: _Optional[str] = ..., project: _Optional[str] = ..., rank: _Optional[int] = ..., world_size: _Optional[int] = ..., incarnation: _Optional[int] = ..., source_uuid: _Optional[str] = ..., started_unix_ns: _Optional[int] = ..., sent_unix_ns: _Optional[int] = ..., agent_version: _Optional[str] = ..., slots: _Optional[_Iterable[_Union[Slot, _Mapping]]] = ..., config_json: _Optional[str] = ..., environment: _Optional[_Mapping[str, str]] = ..., tags: _Optional[_Iterable[str]] = ..., notes: _Optional[str] = ...) -> None: ...

class Slot(_message.Message):
    __slots__ = ("slot", "layer", "role", "format", "recipe", "margin", "module_class", "in_features", "out_features")
    SLOT_FIELD_NUMBER: _ClassVar[int]
    LAYER_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    FORMAT_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    MARGIN_FIELD_NUMBER: _ClassVar[int]
    MODULE_CLASS_FIELD_NUMBER: _ClassVar[int]
    IN_FEATURES_FIELD_NUMBER: _ClassVar[int]
    OUT_FEATURES_FIELD_NUMBER: _ClassVar[int]
    slot: int
    layer: str
    role: Role
    format: str
    recipe: str
    margin: int
    module_class: str
    in_features: int
    out_features: int
    def __init__(self, slot: _Optional[int] = ..., layer: _Optional[str] = ..., role: _Optional[_Union[Role, str]] = ..., format: _Optional[str] = ..., recipe: _Optional[str] = ..., margin: _Optional[int] = ..., module_class: _Optional[str] = ..., in_features: _Optional[int] = ..., out_features: _Optional[int] = ...) -> None: ...

class StatsBatch(_message.Message):
    __slots__ = ("seq", "sent_unix_ns", "rows", "compression", "columns_bytes", "columns_crc32", "columns", "scalars", "drops", "extras", "config_json")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_BYTES_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_CRC32_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    SCALARS_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    EXTRAS_FIELD_NUMBER: _ClassVar[int]
    CONFIG_JSON_FIELD_NUMBER: _ClassVar[int]
    seq: int
    sent_unix_ns: int
    rows: int
    compression: Compression
    columns_bytes: int
    columns_crc32: int
    columns: bytes
    scalars: _containers.RepeatedCompositeFieldContainer[Scalar]
    drops: _containers.RepeatedCompositeFieldContainer[Drop]
    extras: _containers.RepeatedCompositeFieldContainer[Extra]
    config_json: str
    def __init__(self, seq: _Optional[int] = ..., sent_unix_ns: _Optional[int] = ..., rows: _Optional[int] = ..., compression: _Optional[_Union[Compression, str]] = ..., columns_bytes: _Optional[int] = ..., columns_crc32: _Optional[int] = ..., columns: _Optional[bytes] = ..., scalars: _Optional[_Iterable[_Union[Scalar, _Mapping]]] = ..., drops: _Optional[_Iterable[_Union[Drop, _Mapping]]] = ..., extras: _Optional[_Iterable[_Union[Extra, _Mapping]]] = ..., config_json: _Optional[str] = ...) -> None: ...

class StatsColumns(_message.Message):
    __slots__ = ("step", "slot", "amax", "scale_min", "scale_max", "numel", "zeros", "overflow", "underflow", "subnormal", "nonfinite", "sum_sq", "err_sq")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    AMAX_FIELD_NUMBER: _ClassVar[int]
    SCALE_MIN_FIELD_NUMBER: _ClassVar[int]
    SCALE_MAX_FIELD_NUMBER: _ClassVar[int]
    NUMEL_FIELD_NUMBER: _ClassVar[int]
    ZEROS_FIELD_NUMBER: _ClassVar[int]
    OVERFLOW_FIELD_NUMBER: _ClassVar[int]
    UNDERFLOW_FIELD_NUMBER: _ClassVar[int]
    SUBNORMAL_FIELD_NUMBER: _ClassVar[int]
    NONFINITE_FIELD_NUMBER: _ClassVar[int]
    SUM_SQ_FIELD_NUMBER: _ClassVar[int]
    ERR_SQ_FIELD_NUMBER: _ClassVar[int]
    step: bytes
    slot: bytes
    amax: bytes
    scale_min: bytes
    scale_max: bytes
    numel: bytes
    zeros: bytes
    overflow: bytes
    underflow: bytes
    subnormal: bytes
    nonfinite: bytes
    sum_sq: bytes
    err_sq: bytes
    def __init__(self, step: _Optional[bytes] = ..., slot: _Optional[bytes] = ..., amax: _Optional[bytes] = ..., scale_min: _Optional[bytes] = ..., scale_max: _Optional[bytes] = ..., numel: _Optional[bytes] = ..., zeros: _Optional[bytes] = ..., overflow: _Optional[bytes] = ..., underflow: _Optional[bytes] = ..., subnormal: _Optional[bytes] = ..., nonfinite: _Optional[bytes] = ..., sum_sq: _Optional[bytes] = ..., err_sq: _Optional[bytes] = ...) -> None: ...

class Scalar(_message.Message):
    __slots__ = ("step", "name", "value")
    STEP_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    step: int
    name: str
    value: float
    def __init__(self, step: _Optional[int] = ..., name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class Extra(_message.Message):
    __slots__ = ("step", "slot", "name", "value")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    NAME_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    step: int
    slot: int
    name: str
    value: float
    def __init__(self, step: _Optional[int] = ..., slot: _Optional[int] = ..., name: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...

class HistogramBatch(_message.Message):
    __slots__ = ("seq", "sent_unix_ns", "rows", "compression", "columns_bytes", "columns_crc32", "columns", "drops")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    COMPRESSION_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_BYTES_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_CRC32_FIELD_NUMBER: _ClassVar[int]
    COLUMNS_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    sent_unix_ns: int
    rows: int
    compression: Compression
    columns_bytes: int
    columns_crc32: int
    columns: bytes
    drops: _containers.RepeatedCompositeFieldContainer[Drop]
    def __init__(self, seq: _Optional[int] = ..., sent_unix_ns: _Optional[int] = ..., rows: _Optional[int] = ..., compression: _Optional[_Union[Compression, str]] = ..., columns_bytes: _Optional[int] = ..., columns_crc32: _Optional[int] = ..., columns: _Optional[bytes] = ..., drops: _Optional[_Iterable[_Union[Drop, _Mapping]]] = ...) -> None: ...

class HistogramColumns(_message.Message):
    __slots__ = ("step", "slot", "first_bin", "bins", "counts")
    STEP_FIELD_NUMBER: _ClassVar[int]
    SLOT_FIELD_NUMBER: _ClassVar[int]
    FIRST_BIN_FIELD_NUMBER: _ClassVar[int]
    BINS_FIELD_NUMBER: _ClassVar[int]
    COUNTS_FIELD_NUMBER: _ClassVar[int]
    step: bytes
    slot: bytes
    first_bin: bytes
    bins: bytes
    counts: bytes
    def __init__(self, step: _Optional[bytes] = ..., slot: _Optional[bytes] = ..., first_bin: _Optional[bytes] = ..., bins: _Optional[bytes] = ..., counts: _Optional[bytes] = ...) -> None: ...

class Drop(_message.Message):
    __slots__ = ("reason", "rows")
    REASON_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    reason: str
    rows: int
    def __init__(self, reason: _Optional[str] = ..., rows: _Optional[int] = ...) -> None: ...

class Finish(_message.Message):
    __slots__ = ("seq", "finished_unix_ns", "outcome", "message", "last_step", "drops")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    FINISHED_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    LAST_STEP_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    seq: int
    finished_unix_ns: int
    outcome: Outcome
    message: str
    last_step: int
    drops: _containers.RepeatedCompositeFieldContainer[Drop]
    def __init__(self, seq: _Optional[int] = ..., finished_unix_ns: _Optional[int] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., message: _Optional[str] = ..., last_step: _Optional[int] = ..., drops: _Optional[_Iterable[_Union[Drop, _Mapping]]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("sent_unix_ns", "drops")
    SENT_UNIX_NS_FIELD_NUMBER: _ClassVar[int]
    DROPS_FIELD_NUMBER: _ClassVar[int]
    sent_unix_ns: int
    drops: _containers.RepeatedCompositeFieldContainer[Drop]
    def __init__(self, sent_unix_ns: _Optional[int] = ..., drops: _Optional[_Iterable[_Union[Drop, _Mapping]]] = ...) -> None: ...

class Opened(_message.Message):
    __slots__ = ("incarnation", "up_to_seq", "server_version", "takes_histograms")
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    UP_TO_SEQ_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    TAKES_HISTOGRAMS_FIELD_NUMBER: _ClassVar[int]
    incarnation: int
    up_to_seq: int
    server_version: str
    takes_histograms: bool
    def __init__(self, incarnation: _Optional[int] = ..., up_to_seq: _Optional[int] = ..., server_version: _Optional[str] = ..., takes_histograms: bool = ...) -> None: ...

class Ack(_message.Message):
    __slots__ = ("up_to_seq",)
    UP_TO_SEQ_FIELD_NUMBER: _ClassVar[int]
    up_to_seq: int
    def __init__(self, up_to_seq: _Optional[int] = ...) -> None: ...

class Request(_message.Message):
    __slots__ = ("id", "layers", "sample_every", "take_histograms")
    ID_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    SAMPLE_EVERY_FIELD_NUMBER: _ClassVar[int]
    TAKE_HISTOGRAMS_FIELD_NUMBER: _ClassVar[int]
    id: int
    layers: _containers.RepeatedScalarFieldContainer[str]
    sample_every: SampleEvery
    take_histograms: TakeHistograms
    def __init__(self, id: _Optional[int] = ..., layers: _Optional[_Iterable[str]] = ..., sample_every: _Optional[_Union[SampleEvery, _Mapping]] = ..., take_histograms: _Optional[_Union[TakeHistograms, _Mapping]] = ...) -> None: ...

class SampleEvery(_message.Message):
    __slots__ = ("steps", "for_steps")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    FOR_STEPS_FIELD_NUMBER: _ClassVar[int]
    steps: int
    for_steps: int
    def __init__(self, steps: _Optional[int] = ..., for_steps: _Optional[int] = ...) -> None: ...

class TakeHistograms(_message.Message):
    __slots__ = ("count",)
    COUNT_FIELD_NUMBER: _ClassVar[int]
    count: int
    def __init__(self, count: _Optional[int] = ...) -> None: ...
