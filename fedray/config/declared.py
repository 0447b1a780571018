"""Config fields that methods and adapters declare: `fedray.options` of a whole register, as fields of one section."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, Field, create_model

from fedray.data.tasks import Task
from fedray.options import Option, options

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Declared:
    """An option as the config has it: the names of those that have it, and its heading in `--help`."""

    option: Option
    owners: tuple[str, ...]
    group: str

    def field(self) -> tuple[Any, Any]:
        """Type and field for pydantic: None, where it is not set, leaves the declared default."""
        line = self.option.line(", ".join(self.owners))
        return self.option.type | None, Field(
            None, description=line, json_schema_extra={"group": self.group}, **self.option.bounds
        )


def of_register(what: str, register: Mapping[str, type]) -> dict[str, Declared]:
    """All options of a register's classes by name. Raises TypeError where two classes declare one name differently."""
    declarations: dict[str, tuple[Option, list[str]]] = {}
    for owner, cls in register.items():
        for name, option in options(cls).items():
            first, owners = declarations.setdefault(name, (option, []))
            if option != first:
                raise TypeError(f"{what} {owner} declares {name} otherwise than {owners[0]}: give it a name of its own")
            owners.append(owner)
    return {
        name: Declared(option, tuple(owners), f"{what} {', '.join(owners)}")
        for name, (option, owners) in declarations.items()
    }


def of_one(group: str, prefix: str, cls: type) -> dict[str, Declared]:
    """The options of a single class, each name after a prefix."""
    return {f"{prefix}{name}": Declared(option, (), group) for name, option in options(cls).items()}


def of_tasks(tasks: Mapping[str, type[Task]], named: Collection[str]) -> dict[str, Declared]:
    """The keys that tasks declare and the data section does not name itself. Raises TypeError where two say different
    things of one."""
    docs: dict[str, tuple[str, list[str]]] = {}
    for owner, task in tasks.items():
        for name, doc in ((n, d) for n, d in task.options.items() if n not in named):
            first, owners = docs.setdefault(name, (doc, []))
            if doc != first:
                raise TypeError(f"task {owner} says of data.{name} something else than {owners[0]}")
            owners.append(owner)
    return {
        name: Declared(Option(str, None, doc.removesuffix("."), "", {}), (), f"task {', '.join(owners)}")
        for name, (doc, owners) in docs.items()
    }


def with_options(declared: Mapping[str, Declared]) -> Callable[[type[Model]], type[Model]]:
    """A decorator that adds options to a section. Raises TypeError for one whose name the section has itself."""

    def extend(section: type[Model]) -> type[Model]:
        if twice := declared.keys() & section.model_fields:
            raise TypeError(f"{section.__name__} has {min(twice)} itself: an option needs another name")
        fields: dict[str, Any] = {name: one.field() for name, one in declared.items()}
        return create_model(
            section.__name__, __base__=section, __module__=section.__module__, __doc__=section.__doc__, **fields
        )

    return extend
