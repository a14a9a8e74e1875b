"""What a trainer rank holds, from its parameters: DTensors of any mesh, or plain tensors. Imports torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from railwire.weights.errors import PlanError
from railwire.weights.memory import Storages, dtype_name
from railwire.weights.placements import MAX_DIMS, from_dtensor, local_parts
from railwire.weights.tables import Held, RankTable

Rename = Callable[[str], "str | None"]


@dataclass
class Source:
    """A rank's table, and the tensors behind it.

    Attributes:
        locals: by name, this rank's local tensor (empty shards too).
        parameters: by name, as the trainer gave them: what a gather is made of.
    """

    table: RankTable
    storages: Storages
    locals: dict[str, torch.Tensor]
    parameters: dict[str, torch.Tensor]

    @cached_property
    def held(self) -> dict[tuple[str, tuple[int, ...]], Held]:
        """The table's boxes by name and begin."""
        return {(held.name, held.lo): held for held in self.table.held}


def describe(
    rank: str,
    parameters: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]],
    *,
    rename: Rename | None = None,
) -> Source:
    """Reads placements, shapes and addresses; moves nothing.

    Args:
        parameters: by name, such as ``model.named_parameters(remove_duplicate=False)``. A name that has the memory of
            an earlier one is *tied* to it. Pipeline stages give the parameters that they have.
        rename: from the trainer's names to those of the checkpoint; None leaves a parameter out.

    Raises:
        PlanError: names the parameter that cannot be sent, and why.
    """
    from torch.distributed.tensor import DTensor

    storages = Storages()
    held: list[Held] = []
    names: dict[str, tuple[tuple[int, ...], str]] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    meshes: dict[tuple[object, ...], int] = {}
    locals_: dict[str, torch.Tensor] = {}
    kept: dict[str, torch.Tensor] = {}
    problems: list[str] = []
    items = parameters.items() if isinstance(parameters, Mapping) else parameters
    for given, parameter in items:
        name = given if rename is None else rename(given)
        if name is None:
            continue
        if name in names or name in tied:
            problems.append(f"{name}: two parameters have this name")
            continue
        whole = tuple(parameter.shape)
        try:
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                local = parameter.to_local().detach()
                coordinate = mesh.get_coordinate()
                if coordinate is None:
                    continue  # this rank is not in the parameter's mesh
                key: tuple[object, ...] = (tuple(mesh.mesh.shape), tuple(mesh.mesh.flatten().tolist()))
                placements = from_dtensor(parameter.placements, len(whole))
                expected, parts = local_parts(whole, tuple(mesh.mesh.shape), coordinate, placements)
            else:
                local, key = parameter.detach(), ()
                expected, parts = local_parts(whole, (), (), ())
            if tuple(local.shape) != expected:
                raise PlanError(f"its local tensor is {tuple(local.shape)}, its placements say {expected}")
            if len(whole) > MAX_DIMS:
                raise PlanError(f"{len(whole)} dimensions; the most is {MAX_DIMS}")
        except PlanError as error:
            problems.append(f"{name}: {error}")
            continue
        identity = (local.data_ptr(), whole, tuple(local.shape), tuple(local.stride()), local.dtype)
        if local.numel() and (before := first.setdefault(identity, name)) != name:
            tied[name] = before
            continue
        names[name] = (whole, dtype_name(local.dtype))
        locals_[name], kept[name] = local, parameter
        number = meshes.setdefault(key, len(meshes))
        if not parts:
            continue
        place = storages.place(local)
        for part in parts:
            offset = place.offset + sum(a * b for a, b in zip(part.local, place.strides, strict=True))
            held.append(
                Held(name, whole, dtype_name(local.dtype), part.lo, part.size, place.region, offset, place.strides,
                     number)
            )  # fmt: skip
    if problems:
        raise PlanError([f"trainer {rank}: {problem}" for problem in problems])
    table = RankTable(rank, tuple(held), storages.sizes, tied, names)
    table.check()
    return Source(table, storages, locals_, kept)


class Box(NamedTuple):
    """A part of a tensor that a rank holds: shape of the whole, and where the part begins in it."""

    tensor: torch.Tensor
    shape: tuple[int, ...]
    lo: tuple[int, ...]


def describe_boxes(rank: str, boxes: Mapping[str, Box]) -> Source:
    """As :func:`describe`, for shards that are no DTensors (Megatron's, or one's own). What needs a gather cannot be
    sent of them.

    Raises:
        PlanError: a box outside its tensor.
    """
    storages = Storages()
    held, names = [], {}
    for name, box in boxes.items():
        dtype = dtype_name(box.tensor.dtype)
        names[name] = (box.shape, dtype)
        if box.tensor.numel():
            place = storages.place(box.tensor)
            size = tuple(box.tensor.shape)
            held.append(Held(name, box.shape, dtype, box.lo, size, place.region, place.offset, place.strides))
    table = RankTable(rank, tuple(held), storages.sizes, {}, names)
    table.check()
    locals_ = {name: box.tensor.detach() for name, box in boxes.items()}
    return Source(table, storages, locals_, dict(locals_))
