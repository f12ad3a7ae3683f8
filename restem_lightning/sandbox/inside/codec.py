"""The closed encoding in which values cross between processes: JSON with tags, no code.

What is decoded has exact builtin types (or the standard library's own Counter, OrderedDict, deque,
Fraction, Decimal), never a subclass. Anything else crosses as an opaque: a number that stands for
the object in its own process, and whether it was true.
"""

import collections
import decimal
import fractions
import json
import socket
import struct
from collections.abc import Callable
from typing import Any

MAX_FRAME = 1 << 24
_HEADER = struct.Struct(">I")
_MAX_PLAIN_BITS = 10_000  # beyond, decimal digits are slow, or refused by the interpreter
_MAX_BITS = 1 << 23


class ChannelError(BaseException):
    """The other side is gone or speaks nonsense; no `except Exception` of a test hides it."""


class Channel:
    """Messages over a stream socket: a length, then a value in the closed encoding."""

    def __init__(
        self,
        stream: socket.socket,
        to_opaque: Callable[[Any], list[Any]] | None = None,
        from_opaque: Callable[[int, bool], Any] | None = None,
    ) -> None:
        """Speaks over a connected socket.

        Args:
            stream: the socket.
            to_opaque: gives [number, truth] for an object that has no encoding.
            from_opaque: gives the object for a number and its truth.
        """
        self._stream = stream
        self._to_opaque, self._from_opaque = to_opaque, from_opaque

    def send(self, message: Any) -> None:
        """Sends one message.

        Raises:
            ChannelError: it is too large, or the other side is gone.
            TypeError: it holds an object that has no encoding.
        """
        payload = encode(message, self._to_opaque)
        try:
            self._stream.sendall(_HEADER.pack(len(payload)) + payload)
        except OSError as error:
            raise ChannelError(f"the other side is gone ({error})") from None

    def receive(self) -> Any:
        """Returns the next message.

        Raises:
            ChannelError: the other side is gone, or sends what is no message.
        """
        (size,) = _HEADER.unpack(self._read(_HEADER.size))
        if size > MAX_FRAME:
            raise ChannelError(f"a message of {size} bytes; at most {MAX_FRAME} are read")
        return decode(self._read(size), self._from_opaque)

    def _read(self, size: int) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            try:
                part = self._stream.recv(min(size - len(parts), 1 << 18))
            except OSError as error:
                raise ChannelError(f"the other side is gone ({error})") from None
            if not part:
                raise ChannelError("the other side is gone")
            parts += part
        return bytes(parts)


def frame(message: Any) -> bytes:
    """Returns a whole message as bytes, for a first message that is sent ahead."""
    payload = encode(message, None)
    return _HEADER.pack(len(payload)) + payload


def encode(value: Any, to_opaque: Callable[[Any], list[Any]] | None) -> bytes:
    """Returns the bytes of a value.

    Raises:
        ChannelError: more than MAX_FRAME bytes.
        TypeError: no encoding, and `to_opaque` is None.
    """
    payload = json.dumps(_to_json(value, to_opaque), separators=(",", ":")).encode()
    if len(payload) > MAX_FRAME:
        raise ChannelError(f"a value of {len(payload)} bytes; at most {MAX_FRAME} are sent")
    return payload


def decode(payload: bytes, from_opaque: Callable[[int, bool], Any] | None) -> Any:
    """Returns the value that bytes stand for.

    Raises:
        ChannelError: they are not in the encoding.
    """

    def from_tag(pairs: list[tuple[str, Any]]) -> Any:
        ((tag, content),) = pairs
        if tag == "opaque":
            number, truth = content
            if type(number) is not int or type(truth) is not bool or from_opaque is None:
                raise ValueError("an opaque")
            return from_opaque(number, truth)
        return _FROM_JSON[tag](content)

    try:
        return json.loads(payload, object_pairs_hook=from_tag)
    except (ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        raise ChannelError(f"a message that cannot be read ({error})") from None


def _to_json(value: Any, to_opaque: Callable[[Any], list[Any]] | None) -> Any:
    kind = type(value)
    if kind in (str, bool, float) or value is None:
        return value
    if kind is int:
        bits = value.bit_length()
        if bits > _MAX_BITS:
            raise ChannelError(f"a whole number of {bits} bits; at most {_MAX_BITS} are sent")
        return value if bits <= _MAX_PLAIN_BITS else {"int": hex(value)}
    if kind is list:
        return [_to_json(item, to_opaque) for item in value]
    if kind in _ITEMS:
        return {kind.__name__: [_to_json(item, to_opaque) for item in value]}
    if kind in _PAIRS:
        pairs = [[_to_json(k, to_opaque), _to_json(v, to_opaque)] for k, v in value.items()]
        return {"dict" if kind is collections.defaultdict else kind.__name__: pairs}
    if kind in _PARTS:
        return {kind.__name__: _PARTS[kind](value)}
    if kind is type and _TYPES.get(value.__name__) is value:
        return {"type": value.__name__}
    if tuple in kind.__mro__ and hasattr(kind, "_fields"):  # a named tuple equals a plain one
        return {"tuple": [_to_json(item, to_opaque) for item in tuple.__iter__(value)]}
    if to_opaque is None:
        raise TypeError(f"{kind} has no encoding")
    return {"opaque": to_opaque(value)}


def _pairs_of(kind: type) -> Callable[[Any], Any]:
    """Returns a decoder of pairs that keeps what the type's own constructor might change."""

    def build(content: Any) -> Any:
        result = kind()
        dict.update(result, [(key, item) for key, item in content])
        return result

    return build


_TYPES = {
    kind.__name__: kind
    for kind in (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)
}
_ITEMS = (tuple, set, frozenset, collections.deque)
_PAIRS = (dict, collections.Counter, collections.OrderedDict, collections.defaultdict)
_PARTS: dict[type, Callable[[Any], Any]] = {
    complex: lambda value: [value.real, value.imag],
    bytes: bytes.hex,
    bytearray: bytearray.hex,
    range: lambda value: [value.start, value.stop, value.step],
    fractions.Fraction: lambda value: [str(value.numerator), str(value.denominator)],
    decimal.Decimal: str,
}
_FROM_JSON: dict[str, Callable[[Any], Any]] = {
    "int": lambda content: int(content, 16),
    "type": _TYPES.__getitem__,
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "deque": collections.deque,
    "dict": _pairs_of(dict),
    "Counter": _pairs_of(collections.Counter),
    "OrderedDict": lambda content: collections.OrderedDict([(k, v) for k, v in content]),
    "complex": lambda content: complex(*content),
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "range": lambda content: range(*content),
    "Fraction": lambda content: fractions.Fraction(int(content[0]), int(content[1])),
    "Decimal": decimal.Decimal,
}
