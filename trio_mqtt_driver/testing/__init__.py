"""Brokers to test against: in memory, embedded, installed; and a proxy that breaks the network."""

from __future__ import annotations

from ._access import ACL as ACL, Access as Access
from ._broker_errors import (
    BrokerFailedError as BrokerFailedError,
    BrokerNotInstalledError as BrokerNotInstalledError,
)
from ._broker_process import BrokerProcess as BrokerProcess, TLSFiles as TLSFiles
from ._brokers import Ejabberd as Ejabberd, EmbeddedBroker as EmbeddedBroker, Mosquitto as Mosquitto
from ._driver_probe import DriverProbe as DriverProbe
from ._fault_proxy import FaultProxy as FaultProxy
from ._faults import Direction as Direction, Faults as Faults, Rule as Rule
from ._iotcore import Iotcore as Iotcore
from ._leaks import LeakCheck as LeakCheck, LeakError as LeakError
from ._memory_broker import MemoryBroker as MemoryBroker
from ._packets import (
    Ack as Ack,
    Auth as Auth,
    Connack as Connack,
    Connect as Connect,
    Disconnect as Disconnect,
    Packet as Packet,
    Pingreq as Pingreq,
    Pingresp as Pingresp,
    Publish as Publish,
    Suback as Suback,
    Subscribe as Subscribe,
    SubscriptionRequest as SubscriptionRequest,
    Unsuback as Unsuback,
    Unsubscribe as Unsubscribe,
    Will as Will,
)
from ._pipe import PipeStream as PipeStream, open_pipe as open_pipe
from ._properties import Kind as Kind, Properties as Properties, PropertyValue as PropertyValue, WireError as WireError
from ._proxied import ConnectionEnd as ConnectionEnd, ConnectionReport as ConnectionReport
from ._raw_client import RawClient as RawClient
from ._session import Published as Published, Session as Session, Subscription as Subscription
from ._state import AuthenticationRefusedError as AuthenticationRefusedError, BrokerOptions as BrokerOptions
from ._watch import Watch as Watch
from ._wire import Decoder as Decoder, encode as encode
