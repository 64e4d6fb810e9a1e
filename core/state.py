"""Machine state that resets in a microsecond: declared fields, a journal of what changed, explicit snapshots.

All state of a machine hangs in one tree of `Stateful` objects and `StateDict` containers (plus the pages of
`core.memory`, which follow the same idea). Field values are immutable - int, bytes, str, enum members, tuples - or
again a `Stateful` or a `StateDict`; so a shallow copy of the fields is a complete copy of one object.

How a reset costs only what changed: `Journal.mark` walks the tree once and turns every object *clean*. A clean object
has a class whose `__setattr__` first notes the object and its boot values in the journal, and then switches the object
to its plain class, so that every later write in the sequence is a plain slot store. `Journal.reset` walks the noted
objects only. Nobody has to remember to announce a write, and an untouched object costs nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import attrgetter
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, dataclass_transform

from sevlab.core.errors import InvariantViolation

K = TypeVar("K")
V = TypeVar("V")

_set = object.__setattr__


class StateImage(NamedTuple):
    """Explicit, immutable data of one object of the state tree; equal images mean equal state."""

    kind: type
    values: tuple[Any, ...]


class Journal:
    """What changed since the last mark, with the means to take it back."""

    __slots__ = ("_roots", "changed")

    def __init__(self) -> None:
        self.changed: list[Stateful | StateDict[Any, Any]] = []
        self._roots: tuple[Stateful | StateDict[Any, Any], ...] = ()

    def mark(self, roots: Iterable[Stateful | StateDict[Any, Any]]) -> None:
        """Make the present values of everything below `roots` the state that `reset` returns to."""
        self._roots = tuple(roots)
        self.changed.clear()
        for root in self._roots:
            _adopt(root, self)

    def reset(self) -> None:
        """Put every object that changed since `mark` back to its value then."""
        for item in self.changed:
            item._rewind()  # one module, one mechanism
        self.changed.clear()


def _adopt(item: Any, journal: Journal) -> None:
    """Turn `item` and everything below it clean."""
    if isinstance(item, (Stateful, StateDict)):
        for child in item._children():
            _adopt(child, journal)
        item._clean(journal)
    elif isinstance(item, tuple):
        for child in item:
            _adopt(child, journal)


def parts(item: Any) -> Iterator[Stateful | StateDict[Any, Any]]:
    """`item` and everything of the state tree below it."""
    if isinstance(item, (Stateful, StateDict)):
        yield item
        for child in item._children():
            yield from parts(child)
    elif isinstance(item, tuple):
        for child in item:
            yield from parts(child)


@dataclass_transform(kw_only_default=True)
class StatefulMeta(type):
    """Turns annotated fields into slots, a capture function and a class for clean objects."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any], *, clean: bool = False) -> Any:
        if clean:
            return super().__new__(mcs, name, bases, namespace)
        inherited: dict[str, Any] = {}
        for base in bases:
            inherited.update(getattr(base, "_defaults", {}))
        own = [
            field
            for field, kind in namespace.get("__annotations__", {}).items()
            if not str(kind).startswith(("ClassVar", "typing.ClassVar")) and field not in namespace.get("__slots__", ())
        ]
        defaults = {field: namespace.pop(field) for field in own if field in namespace}
        missing = [field for field in own if field not in defaults]
        if missing:
            raise TypeError(f"{name}: state needs a default for {', '.join(missing)}: a restored object is made empty")
        namespace["__slots__"] = (*namespace.get("__slots__", ()), *own)
        cls: Any = super().__new__(mcs, name, bases, namespace)
        cls._defaults = inherited | defaults
        cls.FIELDS = tuple(cls._defaults)
        cls._capture = staticmethod(_capture_function(cls.FIELDS))
        cls._load = _load_function(cls.FIELDS)
        cls._fresh = staticmethod(_fresh_function(tuple(cls._defaults.values())))
        cls._raw_class = cls
        cls._clean_class = mcs(
            name, (cls,), {"__slots__": (), "__setattr__": _note, "__module__": cls.__module__}, clean=True
        )
        return cls

    def __init__(cls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **_: bool) -> None:
        super().__init__(name, bases, namespace)


def _capture_function(fields: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    if not fields:
        return lambda _item: ()
    getter = attrgetter(*fields)
    return getter if len(fields) > 1 else lambda item: (getter(item),)


def _load_function(fields: tuple[str, ...]) -> Callable[[Any, tuple[Any, ...]], None]:
    """One generated assignment: plain slot stores, about 15 ns a field."""
    if not fields:
        return lambda _item, _values: None
    targets = ", ".join(f"item.{field}" for field in fields)
    scope: dict[str, Any] = {}
    exec(f"def load(item, values):\n    {targets}, = values\n", scope)  # noqa: S102  # field names only
    return scope["load"]  # type: ignore[no-any-return]


def _fresh_function(defaults: tuple[Any, ...]) -> Callable[[], tuple[Any, ...]]:
    """The values of a new object, with what it makes for itself."""
    if not any(isinstance(default, New) for default in defaults):
        return lambda: defaults
    return lambda: tuple(default() if isinstance(default, New) else default for default in defaults)


def _note(item: Any, name: str, value: object) -> None:
    """`__setattr__` of a clean object: journal it, make it plain, and store."""
    item_class = item._raw_class
    boot = item._boot
    if boot is None:
        boot = item._capture(item)
    _set(item, "__class__", item_class)
    item._boot = boot
    item._journal.changed.append(item)
    setattr(item, name, value)


class Stateful(metaclass=StatefulMeta):
    """A part of the machine with declared, journaled fields.

    Every annotated field needs a default; a mutable default is written `field: StateDict[int, X] = new(StateDict)`.
    """

    __slots__ = ("_boot", "_journal")

    FIELDS: ClassVar[tuple[str, ...]] = ()
    _defaults: ClassVar[Mapping[str, Any]] = {}
    _raw_class: ClassVar[type]
    _clean_class: ClassVar[type]

    def __init__(self, **values: Any) -> None:
        self._boot: tuple[Any, ...] | None = None
        self._journal: Journal | None = None
        type(self)._load(self, type(self)._fresh())  # type: ignore[attr-defined]
        for name, value in values.items():
            if name not in self._defaults:
                raise TypeError(f"{type(self).__name__} has no field {name!r}; it has {', '.join(self.FIELDS)}")
            setattr(self, name, value)

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={getattr(self, name)!r}" for name in self.FIELDS)
        return f"{type(self).__name__}({fields})"

    def _children(self) -> Iterator[Any]:
        for name in self.FIELDS:
            value = getattr(self, name)
            if isinstance(value, (Stateful, StateDict, tuple)):
                yield value

    def _clean(self, journal: Journal) -> None:
        _set(self, "__class__", self._raw_class)
        self._journal = journal
        self._boot = None
        _set(self, "__class__", self._clean_class)

    def _rewind(self) -> None:
        # The boot tuple stays: the object equals it again, so the next first write need not capture anew.
        type(self)._load(self, self._boot)  # type: ignore[attr-defined]
        _set(self, "__class__", self._clean_class)


class New:
    """A default that is made anew for each object."""

    __slots__ = ("_make",)

    def __init__(self, make: Callable[[], object]) -> None:
        self._make = make

    def __call__(self) -> object:
        return self._make()


def new(make: Callable[[], V]) -> V:
    """Declare a field default that each object makes for itself, e.g. `new(StateDict)`."""
    return New(make)  # type: ignore[return-value]  # the metaclass replaces it per object


class StateDict(dict[K, V], Generic[K, V]):
    """A dictionary of the state tree; journaled like a `Stateful`, plain once it has changed."""

    __slots__ = ("_boot", "_journal")

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._boot: dict[K, V] | None = None
        self._journal: Journal | None = None

    def _children(self) -> Iterator[Any]:
        yield from self.values()

    def _clean(self, journal: Journal) -> None:
        self._journal = journal
        self._boot = None
        self.__class__ = _CleanStateDict

    def _rewind(self) -> None:
        boot = self._boot
        if boot is None:
            raise InvariantViolation("state.rewind", "a container is in the journal without its boot value")
        dict.clear(self)
        dict.update(self, boot)
        self.__class__ = _CleanStateDict

    def _note(self) -> None:
        if self._boot is None:
            self._boot = dict(self)
        self.__class__ = StateDict
        if self._journal is not None:
            self._journal.changed.append(self)


def _journaling(name: str) -> Callable[..., Any]:
    plain = getattr(dict, name)

    def method(self: StateDict[Any, Any], *args: Any, **kwargs: Any) -> Any:
        self._note()
        return plain(self, *args, **kwargs)

    method.__name__ = name
    return method


class _CleanStateDict(StateDict[K, V]):
    """The unchanged form: every mutator notes first."""

    __slots__ = ()

    __setitem__ = _journaling("__setitem__")
    __delitem__ = _journaling("__delitem__")
    __ior__ = _journaling("__ior__")
    pop = _journaling("pop")
    popitem = _journaling("popitem")
    clear = _journaling("clear")
    update = _journaling("update")
    setdefault = _journaling("setdefault")


def capture(item: Any) -> Any:
    """The value of `item` as explicit immutable data: `StateImage` for objects and containers, itself otherwise."""
    if isinstance(item, Stateful):
        return StateImage(item._raw_class, tuple(capture(getattr(item, name)) for name in item.FIELDS))
    if isinstance(item, StateDict):
        return StateImage(StateDict, tuple((key, capture(value)) for key, value in item.items()))
    if type(item) is tuple:
        return tuple(capture(value) for value in item)
    return item


def restore(item: Any, image: Any) -> Any:
    """Give `item` the value of `image`, in place where the kinds agree; returns the object that now holds it."""
    if isinstance(image, StateImage):
        if image.kind is StateDict:
            target = item if isinstance(item, StateDict) else StateDict()
            values = {key: restore(target.get(key), value) for key, value in image.values}
            target.clear()
            target.update(values)
            return target
        if not isinstance(item, image.kind):
            item = image.kind()
        for name, value in zip(image.kind.FIELDS, image.values, strict=True):  # type: ignore[attr-defined]
            setattr(item, name, restore(getattr(item, name), value))
        return item
    if type(image) is tuple:
        old = item if type(item) is tuple and len(item) == len(image) else (None,) * len(image)
        return tuple(restore(before, value) for before, value in zip(old, image, strict=True))
    return image
