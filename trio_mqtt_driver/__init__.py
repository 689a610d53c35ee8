"""A Trio-based structured-concurrency MQTT driver: ``async with MQTTDriver("mqtt://localhost") as driver: ...``."""

from ._arguments import PublishArguments as PublishArguments, SubscribeArguments as SubscribeArguments
from ._backoff import BackoffConfig as BackoffConfig
from ._config import (
    Attempt as Attempt,
    Authenticator as Authenticator,
    Availability as Availability,
    DriverArguments as DriverArguments,
    DriverConfig as DriverConfig,
    Endpoint as Endpoint,
    Will as Will,
)
from ._driver import MQTTDriver as MQTTDriver
from ._endpoints import EndpointHealth as EndpointHealth, FailoverConfig as FailoverConfig
from ._errors import (
    AckTimeoutError as AckTimeoutError,
    ConnectError as ConnectError,
    ConnectionLostError as ConnectionLostError,
    DriverClosedError as DriverClosedError,
    DriverInternalError as DriverInternalError,
    KeepAliveError as KeepAliveError,
    MessageDroppedError as MessageDroppedError,
    MessageExpiredError as MessageExpiredError,
    MessageLostError as MessageLostError,
    MQTTDriverError as MQTTDriverError,
    NotConnectedError as NotConnectedError,
    OptionsError as OptionsError,
    OutboxFileError as OutboxFileError,
    OutboxFullError as OutboxFullError,
    PayloadError as PayloadError,
    ProbeError as ProbeError,
    ProtocolError as ProtocolError,
    ProtocolVersionError as ProtocolVersionError,
    PublishError as PublishError,
    PublishRefusedError as PublishRefusedError,
    PublishTimeoutError as PublishTimeoutError,
    QuarantinedError as QuarantinedError,
    RefusedError as RefusedError,
    ServerDisconnectedError as ServerDisconnectedError,
    ServerLimitError as ServerLimitError,
    StaleDataError as StaleDataError,
    SubscribeError as SubscribeError,
    SupersededError as SupersededError,
    SuspendedError as SuspendedError,
    TLSError as TLSError,
    TransportError as TransportError,
    UnsubscribeError as UnsubscribeError,
)
from ._events import EventStream as EventStream
from ._history import Event as Event
from ._outbox_file import Quarantined as Quarantined, quarantined_messages as quarantined_messages
from ._outgoing import Receipt as Receipt, Undelivered as Undelivered
from ._registration import SubscriptionOptions as SubscriptionOptions
from ._state_view import StateView as StateView
from ._status import Status as Status, SubscriptionStatistics as SubscriptionStatistics
from ._subscription import Subscription as Subscription
from ._tls import TLSConfig as TLSConfig
from ._types import (
    Acknowledge as Acknowledge,
    Diagnosis as Diagnosis,
    Message as Message,
    OfflinePolicy as OfflinePolicy,
    Overflow as Overflow,
    PayloadFormat as PayloadFormat,
    PublishProperties as PublishProperties,
    PublishResult as PublishResult,
    QoS as QoS,
    ReasonCode as ReasonCode,
    RetainHandling as RetainHandling,
    State as State,
)
