"""Expert files: networks whose weights are sums of experts, readable expert by expert.

A file in the safetensors format: a JSON header with names, shapes and places of the tensors, then their
bytes, so that some experts of a stack are read without the others. Nothing in it can be executed. Names of
tensors:

    KIND/experts/NAME    [K, *shape]: stack of experts of the weight NAME of the plain network
    KIND/heads/NAME      [T, *shape]: what each of the T tasks has for itself
    KIND/shared/NAME     weights that all share
    KIND/gate/NAME       from composition and task to the coefficients of the experts; `out.weight` and
                         `out.bias` have a row per expert
    tasks/TASK/composition, tasks/TASK/linear_references    float64
    tasks/TASK/samples/NAME    some of its training structures (`checkpoint.samples`); may be missing

with KIND `raw` or `averaged`, as in native checkpoints. The header's `__metadata__` holds `format`
("equiformer2.experts") and `content`, a JSON document:

    format_version   1
    model_config     ModelConfig.to_dict() of the plain network
    settings         plain values: settings of the mixture (`equiformer2.experts.ExpertSettings`)
    tasks            [{"name", "energy_kind", "energy": {"mean", "std"}, "forces": {"mean", "std"},
                     "provenance": plain values}], in the order of the stacks
    units, provenance    as in native checkpoints
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from datasets_oc20.untrusted import load_json, open_regular
from equiformer2.checkpoint.contents import EnergyKind, WeightsKind, check_energy_kind
from equiformer2.checkpoint.normalizers import Normalizer, Normalizers
from equiformer2.checkpoint.samples import Samples
from equiformer2.checkpoint.tensor_files import plain
from equiformer2.checkpoint.weights import config_from_values
from equiformer2.errors import InputError
from equiformer2.files import as_input_error, whole_file
from equiformer2.model.config import ModelConfig
from equiformer2.values import Number, Whole, mapping, shown, shown_name

FORMAT = "equiformer2.experts"
FORMAT_VERSION = 1
UNITS = {"energy": "eV", "forces": "eV/Å", "length": "Å"}
MOST_TASKS = 1000
_KEYS = {"format_version", "model_config", "settings", "tasks", "units", "provenance"}
_TASK_KEYS = {"name", "energy_kind", "energy", "forces", "provenance"}
_GATE_OUTPUTS = ("out.weight", "out.bias")
_GROUPS = ("experts", "heads", "shared", "gate")
_GATE_TASKS = "tasks.weight"
_NOT_PER_TASK = "has no entry for each of the tasks"
_MAX_HEADER = 16 << 20
_SHARES_TOLERANCE = 1e-6
_TASK_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


@dataclass(frozen=True)
class TaskInfo:
    """Meaning of a task's answers.

    Attributes:
        name: of the data set.
        energy_kind: of its energies.
        normalizers: to eV and eV/Å, with the references of its energies.
        composition: `[Z]` float64, mean shares of the elements over its training structures.
        provenance: plain values: what its training data hold.
        samples: some of its training structures; None where the file has none.
    """

    name: str
    energy_kind: EnergyKind
    normalizers: Normalizers
    composition: Tensor
    provenance: dict[str, Any]
    samples: Samples | None = None


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of an expert network, by the names of the plain network.

    Attributes:
        experts: `[K, *shape]`.
        heads: `[T, *shape]`.
        shared: `[*shape]`.
        gate: by the names of the gate.
    """

    experts: Mapping[str, Tensor]
    heads: Mapping[str, Tensor]
    shared: Mapping[str, Tensor]
    gate: Mapping[str, Tensor]

    def groups(self) -> dict[str, Mapping[str, Tensor]]:
        """Return the four dictionaries by name."""
        return {name: getattr(self, name) for name in _GROUPS}


@dataclass(frozen=True)
class ExpertContents:
    """An expert file, read but not yet made into a network.

    Attributes:
        source: name of the file, for errors.
        config: of the plain network.
        settings: plain values: of the mixture (`num_experts` of the whole file).
        tasks: by name, in the order of the stacks of heads.
        weights: `raw`, `averaged` or both.
        provenance: plain values.
        experts: numbers of the experts in `weights`, in the file's numbering. The gate has the
            outputs of all.
        bytes_read: from the file.
    """

    source: str
    config: ModelConfig
    settings: dict[str, Any]
    tasks: Mapping[str, TaskInfo]
    weights: Mapping[WeightsKind, ExpertWeights]
    provenance: dict[str, Any]
    experts: tuple[int, ...]
    bytes_read: int = 0

    @property
    def available_weights(self) -> tuple[WeightsKind, ...]:
        """Kinds of weights in the file, `raw` first."""
        return tuple(kind for kind in get_args(WeightsKind) if kind in self.weights)

    def choose_weights(self, kind: str | None) -> WeightsKind:
        """Return the kind of weights to use: the given one, else `averaged` where there is such.

        Raises:
            InputError: there are no such weights.
        """
        for candidate in (kind,) if kind else ("averaged", "raw"):
            if candidate in self.weights:
                return candidate  # type: ignore[return-value]
        raise InputError(
            f"{self.source} does not hold {shown(kind)} weights, only "
            f"{' and '.join(self.available_weights)} ones"
        )

    def task(self, name: str) -> TaskInfo:
        """Return a task by its name.

        Raises:
            InputError: there is no such task; the known ones are named.
        """
        if name not in self.tasks:
            raise InputError(
                f"{self.source} has no task {shown(name)}: its tasks are {', '.join(self.tasks)}"
            )
        return self.tasks[name]


def check_task_name(name: object, where: str) -> str:
    """Return the name of a task: up to 64 letters, digits, `_` and `-`.

    Raises:
        InputError: it is something else.
    """
    if not isinstance(name, str) or not _TASK_NAME.fullmatch(name):
        raise InputError(f"{where}: {shown(name)} is no name of a task: use letters, digits, _ and -")
    return name


def is_expert_file(path: str | os.PathLike[str]) -> bool:
    """Tell whether a file is in the safetensors format of this module; False for a missing one."""
    try:
        return _metadata(Path(path)).get("format") == FORMAT
    except (OSError, InputError):
        return False


def write_experts(path: str | os.PathLike[str], contents: ExpertContents) -> None:
    """Write an expert file atomically.

    Args:
        path: the file.
        contents: of a network; where some of its experts were read, these become the file's.

    Raises:
        InputError: a weight is not finite, or the header would be too long to be read.
        OSError: the file cannot be written.
    """
    if contents.experts != tuple(range(contents.settings["num_experts"])):
        contents = with_experts(contents, range(len(contents.experts)))
    tensors: dict[str, Tensor] = {}
    for kind, weights in contents.weights.items():
        for group, values in weights.groups().items():
            for name, value in values.items():
                tensors[f"{kind}/{group}/{name}"] = value
    for name, task in contents.tasks.items():
        tensors[f"tasks/{name}/composition"] = task.composition.double()
        references = task.normalizers.linear_references
        if references is not None:
            tensors[f"tasks/{name}/linear_references"] = references
        if task.samples is not None:
            for part, value in task.samples.tensors().items():
                tensors[f"tasks/{name}/samples/{part}"] = value
    for name, value in tensors.items():
        if not bool(torch.isfinite(value).all()):
            raise InputError(f"{path} was not written, because {name} holds numbers that are not finite")
    written = {
        "written_with": {"equiformer2": version("equiformer2"), "torch": str(torch.__version__)},
        "written_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    content = {
        "format_version": FORMAT_VERSION,
        "model_config": plain(contents.config.to_dict()),
        "settings": plain(contents.settings),
        "tasks": [_task_values(name, task) for name, task in contents.tasks.items()],
        "units": UNITS,
        "provenance": {**plain(contents.provenance), **written},
    }
    # A copy of each, because tensors that share memory are refused.
    copies = {
        name: value.detach().to("cpu", copy=True).contiguous() for name, value in sorted(tensors.items())
    }
    metadata = {"format": FORMAT, "content": json.dumps(content, ensure_ascii=False, allow_nan=False)}
    names = sum(len(name) + 200 for name in copies)  # with types, shapes and places
    if (length := len(json.dumps(metadata)) + names) > _MAX_HEADER:
        raise InputError(
            f"{path} was not written, because its header of {length:,} bytes is longer than the "
            f"{_MAX_HEADER:,} that are read: there are too many tasks, or too many experts"
        )
    with whole_file(path) as file:
        try:
            save_file(copies, file.name, metadata)
        except SafetensorError as error:
            raise OSError(f"could not write {path}: {error}") from error


def _task_values(name: str, task: TaskInfo) -> dict[str, Any]:
    energy, forces = task.normalizers.energy, task.normalizers.forces
    return {
        "name": check_task_name(name, "experts"),
        "energy_kind": check_energy_kind(task.energy_kind, name),
        "energy": {"mean": energy.mean, "std": energy.std},
        "forces": {"mean": forces.mean, "std": forces.std},
        "provenance": plain(task.provenance),
    }


def read_experts(
    path: str | os.PathLike[str],
    only: Sequence[int] | None = None,
    weights: str | None = None,
) -> ExpertContents:
    """Read an expert file, or some of its experts; nothing in it is executed.

    Args:
        path: the file.
        only: numbers of the experts to read, in the order of the stacks to return; None for all. With none of
            them nothing is read but tasks and gate, which decide which experts are needed.
        weights: `raw` or `averaged`, to read these alone; None for all that the file holds.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is damaged, no expert file, or of a newer version; or lacks such experts or weights.
    """
    return ExpertFile(path).read(only, weights)


class ExpertFile:
    """An open expert file, of which parts are read when they are asked for.

    Tasks and gates are read once. A file that is replaced on disk stays what it was here.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: there is no such file.
        InputError: it is damaged, no expert file, or of a newer version.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.source, metadata = str(path), _metadata(Path(path))
        if metadata.get("format") != FORMAT:
            raise InputError(
                f"{self.source} is no file of an expert network, or is cut off: give one that equiformer2 "
                "train wrote with experts.num_experts"
            )
        with as_input_error():
            content = load_json(str(metadata.get("content", "")), f"{self.source}: content", _MAX_HEADER)
        content = _checked_content(content, self.source)
        where = f"{self.source}: model_config"
        self._config = config_from_values(mapping(content["model_config"], where), self.source)
        self._settings = dict(mapping(content["settings"], f"{self.source}: settings"))
        count = self._settings.get("num_experts")
        self._count = Whole(1, 1 << 20).read(count, f"{self.source}: settings.num_experts")
        provenance = mapping(plain(content["provenance"]), f"{self.source}: provenance")
        self._provenance = dict(provenance)
        self._listed = dict(_tasks(content, self.source))
        self._infos: dict[str, TaskInfo] = {}
        try:
            file = safe_open(self.source, framework="pt", device="cpu")
            self._reader = _Reader(file, self.source, self._count, len(self._listed))
        except SafetensorError as error:
            raise InputError(f"{self.source} is damaged and cannot be read ({error})") from error
        with as_input_error(), open_regular(path) as start:
            self._reader.bytes_read = 8 + int.from_bytes(start.read(8), "little")

    @property
    def bytes_read(self) -> int:
        """Bytes read so far: the header, and tensors or parts of them."""
        return self._reader.bytes_read

    def read(
        self,
        only: Sequence[int] | None = None,
        weights: str | None = None,
        tasks: Sequence[str] | None = None,
    ) -> ExpertContents:
        """Read the file or some of its experts and tasks; arguments and errors as of `read_experts`."""
        source, count = self.source, self._count
        kept = tuple(range(count)) if only is None else tuple(int(each) for each in only)
        if len(set(kept)) < len(kept) or not set(kept) <= set(range(count)):
            raise InputError(
                f"{source} has the experts 0 to {count - 1}, and {shown(list(kept))} were asked for"
            )
        names = list(self._listed) if tasks is None else list(tasks)
        for name in names:
            if name not in self._listed:
                raise InputError(
                    f"{source} has no task {shown(name)}: its tasks are {', '.join(self._listed)}"
                )
        rows = None if tasks is None else [list(self._listed).index(name) for name in names]
        try:
            for name in names:
                if name not in self._infos:
                    self._infos[name] = _read_task(self._reader, self._listed[name], self._config)
            states = {
                kind: self._reader.weights(kind, None if only is None else kept, rows)
                for kind in get_args(WeightsKind)
                if weights in (None, kind) and self._reader.has(kind)
            }
        except SafetensorError as error:
            raise InputError(f"{source} is damaged and cannot be read ({error})") from error
        if not states:
            raise InputError(f"{source} holds no {'' if weights is None else f'{shown(weights)} '}weights")
        return ExpertContents(
            source=source,
            config=self._config,
            settings=self._settings,
            tasks={name: self._infos[name] for name in names},
            weights=states,
            provenance=self._provenance,
            experts=kept,
            bytes_read=self.bytes_read,
        )


def _metadata(path: Path) -> dict[str, Any]:
    """Read `__metadata__` of a safetensors file; empty for a file of another format."""
    with as_input_error(), open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(_MAX_HEADER, size - 8):
            return {}
        header = file.read(length)
    if not header.startswith(b"{"):
        return {}
    with as_input_error():
        values = load_json(header.rstrip(b" "), f"{path}: header", _MAX_HEADER)
    metadata = values.get("__metadata__")
    return metadata if isinstance(metadata, dict) else {}


def _checked_content(content: Any, source: str) -> Mapping[str, Any]:
    content = mapping(content, f"{source}: content")
    stated = content.get("format_version")
    if not isinstance(stated, int) or isinstance(stated, bool) or stated < 1:
        raise InputError(f"{source} states no valid format_version: {shown(stated)}")
    if stated > FORMAT_VERSION:
        raise InputError(
            f"{source} is of expert format version {shown(stated)}, newer than the {FORMAT_VERSION} that "
            f"equiformer2 {version('equiformer2')} reads: update equiformer2"
        )
    if set(content) != _KEYS:
        missing, unknown = (
            sorted(_KEYS - set(content)),
            [shown_name(key) for key in content if key not in _KEYS],
        )
        raise InputError(
            f"{source} is not a valid expert file: missing parts {missing}, unknown parts {unknown[:5]}"
        )
    if content["units"] != UNITS:
        raise InputError(f"{source} is in units {shown(content['units'])}; only {UNITS} are read")
    return content


def _tasks(content: Mapping[str, Any], source: str) -> list[tuple[str, Mapping[str, Any]]]:
    """List names and values of the tasks."""
    listed = content["tasks"]
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_TASKS:
        raise InputError(f"{source}: tasks must be a list of 1 to {MOST_TASKS} tasks")
    found = []
    for number, values in enumerate(listed):
        values = mapping(values, f"{source}: task {number}")
        if set(values) != _TASK_KEYS:
            raise InputError(f"{source}: task {number} must hold {', '.join(sorted(_TASK_KEYS))}")
        found.append((check_task_name(values["name"], source), values))
    if len(dict(found)) < len(found):
        raise InputError(f"{source} has two tasks of one name")
    return found


def _read_task(reader: _Reader, values: Mapping[str, Any], config: ModelConfig) -> TaskInfo:
    name, source = values["name"], reader.source
    where = f"{source}: task {name}"
    normalizers = {}
    for part in ("energy", "forces"):
        numbers = mapping(values[part], f"{where}: {part}")
        read = [Number().read(numbers.get(key), f"{where}: {part}.{key}") for key in ("mean", "std")]
        try:
            normalizers[part] = Normalizer(*read)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    references = reader.optional(f"tasks/{name}/linear_references")
    composition = reader.tensor(f"tasks/{name}/composition")
    composition = composition.double()
    total = float(composition.sum())
    if (
        composition.shape != (config.max_num_elements,)
        or not abs(total - 1) < _SHARES_TOLERANCE
        or bool((composition < 0).any())
    ):
        raise InputError(
            f"{where}: the composition must be {config.max_num_elements} shares that add up to 1"
        )
    try:
        both = Normalizers(normalizers["energy"], normalizers["forces"], references)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    both.check_model(config, where)
    prefix = f"tasks/{name}/samples/"
    parts = {
        full.removeprefix(prefix): reader.tensor(full) for full in reader.names if full.startswith(prefix)
    }
    return TaskInfo(
        name=name,
        energy_kind=check_energy_kind(values["energy_kind"], where),
        normalizers=both,
        composition=composition,
        provenance=dict(mapping(plain(values["provenance"]), f"{where}: provenance")),
        samples=Samples.from_tensors(parts, f"{where}: samples") if parts else None,
    )


class _Reader:
    """Tensors of an open file.

    Args:
        file: of `safe_open`.
        source: name of the file, for errors.
        num_experts, num_tasks: of the file.
    """

    def __init__(self, file: Any, source: str, num_experts: int, num_tasks: int) -> None:
        self.file, self.source = file, source
        self.num_experts, self.num_tasks = num_experts, num_tasks
        self.names = set(file.keys())
        known = ("tasks/", *(f"{kind}/" for kind in get_args(WeightsKind)))
        unknown = sorted(name for name in self.names if not name.startswith(known))
        if unknown:
            raise InputError(f"{source} is not a valid expert file: it holds {shown_name(unknown[0])}")
        self.bytes_read = 0
        self._gates: dict[str, Tensor] = {}

    def has(self, kind: str) -> bool:
        """Tell whether there are weights of a kind."""
        return any(name.startswith(f"{kind}/") for name in self.names)

    def optional(self, name: str) -> Tensor | None:
        """Read a tensor where there is one."""
        return self.tensor(name) if name in self.names else None

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor."""
        if name not in self.names:
            raise InputError(f"{self.source} is not a valid expert file: it has no {name}")
        return self._counted(self.file.get_tensor(name))

    def _counted(self, tensor: Tensor) -> Tensor:
        self.bytes_read += tensor.numel() * tensor.element_size()
        return tensor

    def weights(self, kind: str, experts: Sequence[int] | None, tasks: Sequence[int] | None) -> ExpertWeights:
        """Read the weights of a kind.

        Args:
            kind: `raw` or `averaged`.
            experts: numbers of those to read; None for all, and with none of them the gate alone is read.
            tasks: numbers of the tasks to read; None for all.
        """
        groups: dict[str, dict[str, Tensor]] = {group: {} for group in _GROUPS}
        for full in sorted(self.names):
            own, _, rest = full.partition("/")
            if own != kind:
                continue
            group, _, name = rest.partition("/")
            if group not in groups:
                raise InputError(f"{self.source} holds weights of an unknown group: {shown_name(full)}")
            if group == "gate":
                value = self._gate(full, name, tasks)
            elif experts is not None and not experts:
                continue
            elif group == "experts":
                value = self._rows(
                    full, self.num_experts, experts, f"is no stack of {self.num_experts} experts"
                )
            elif group == "heads":
                value = self._rows(full, self.num_tasks, tasks, _NOT_PER_TASK)
            else:
                value = self.tensor(full)
            if not value.is_floating_point() or not bool(torch.isfinite(value).all()):
                raise InputError(f"{self.source}: {shown_name(full)} holds values that are no finite numbers")
            groups[group][name] = value
        return ExpertWeights(**groups)

    def _gate(self, full: str, name: str, tasks: Sequence[int] | None) -> Tensor:
        """Read a weight of the gate once; of its embeddings of tasks, those of `tasks`."""
        if full not in self._gates:
            self._gates[full] = self.tensor(full)
        value = self._gates[full]
        if name != _GATE_TASKS or tasks is None:
            return value
        if value.dim() != 2 or len(value) != self.num_tasks:
            raise InputError(f"{self.source}: {shown_name(full)} {_NOT_PER_TASK}")
        return value[list(tasks)]

    def _rows(self, name: str, count: int, rows: Sequence[int] | None, problem: str) -> Tensor:
        """Read the wanted entries of a stack of `count`, and no bytes of the others."""
        part = self.file.get_slice(name)
        shape = part.get_shape()
        if not shape or shape[0] != count:
            raise InputError(f"{self.source}: {shown_name(name)} {problem}")
        if rows is None:
            return self.tensor(name)
        return self._counted(torch.cat([part[row : row + 1] for row in rows]))


def with_experts(contents: ExpertContents, kept: Sequence[int]) -> ExpertContents:
    """Return contents with some of the experts, whose gate gives scaled coefficients that add up to 1.

    The softmax over the outputs that stay is that of all, scaled.

    Args:
        contents: with all experts, or those that were read.
        kept: places in the stacks of `contents`, in the order of the new ones.
    """
    places = [int(each) for each in kept]
    rows = [contents.experts[place] for place in places]

    def cut(weights: ExpertWeights) -> ExpertWeights:
        gate = {name: value[rows] if name in _GATE_OUTPUTS else value for name, value in weights.gate.items()}
        experts = {name: stack[places] for name, stack in weights.experts.items()}
        return replace(weights, experts=experts, gate=gate)

    return replace(
        contents,
        weights={kind: cut(weights) for kind, weights in contents.weights.items()},
        settings={**contents.settings, "num_experts": len(places)},
        experts=tuple(range(len(places))),
    )


def with_tasks(contents: ExpertContents, names: Sequence[str]) -> ExpertContents:
    """Return contents with some of the tasks, in the order of `names`.

    Raises:
        InputError: there is no such task.
    """
    tasks = {name: contents.task(name) for name in names}
    rows = [list(contents.tasks).index(name) for name in names]

    def cut(weights: ExpertWeights) -> ExpertWeights:
        heads = {name: stack[rows] for name, stack in weights.heads.items()}
        gate = {**weights.gate, _GATE_TASKS: weights.gate[_GATE_TASKS][rows]}
        return replace(weights, heads=heads, gate=gate)

    states = {kind: cut(weights) for kind, weights in contents.weights.items()}
    return replace(contents, weights=states, tasks=tasks)
