"""EquiformerV2 as a mixture of linear experts, with an energy head per task."""

import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch_geometric.data import Batch, Data

from equiformer2.checkpoint.expert_files import ExpertContents, ExpertWeights, with_experts
from equiformer2.checkpoint.weights import build_model
from equiformer2.errors import InputError
from equiformer2.experts.composition import composition_of
from equiformer2.experts.gate import ExpertGate
from equiformer2.experts.scores import renormalized
from equiformer2.experts.settings import ExpertSettings
from equiformer2.graph import RadiusGraph
from equiformer2.graph.structures import structure_index
from equiformer2.kernels.backend import NOTHING_MORE, Backend, Features
from equiformer2.model.config import ModelConfig
from equiformer2.model.equiformer import EquiformerV2
from equiformer2.model.expert_mixture import (
    ExpertChoice,
    attach_stacks,
    mix,
    mixed_weights,
    stacks_of,
    task_parameters,
)
from equiformer2.model.folding import parametrized_weights
from equiformer2.model.parameters import check_memory
from equiformer2.values import shown


class _Turn:
    """Lock of one network; copies of the network get their own."""

    def __init__(self) -> None:
        self.lock = threading.RLock()

    def __reduce__(self) -> tuple[Any, ...]:
        return _Turn, ()


class ExpertNetwork(nn.Module):
    """A plain network whose SO(2) and feed-forward weights are sums of experts.

    The coefficients depend on the mean composition of a structure and its task alone, so that all of a
    network's weights can be merged for them. A batch is divided into groups of one task and composition,
    and each group runs with its merged weights: exact, at the cost of K multiplications per weight and
    group, and of smaller batches inside (the more groups a batch has, the longer it takes; on an
    accelerator small groups leave it idle).

    One thread at a time runs a network; others wait.

    Args:
        plain: network whose weights the experts start from; it is changed in place.
        settings: of the mixture, with 2 or more experts.
        tasks: names of the data sets that are trained together.
        seed: of the differences between the experts, and of the gate.

    Raises:
        InputError: weights are parametrized already, or there are no experts or no tasks.

    Attributes:
        network: the plain network with stacks in the place of weights; only `forward` may run it.
        gate: from composition and task to coefficients.
        config: of the plain network.
        settings, tasks: see above.
        activation_checkpointing: recompute each group in the backward pass.
    """

    def __init__(
        self, plain: EquiformerV2, settings: ExpertSettings, tasks: Sequence[str], seed: int = 0
    ) -> None:
        super().__init__()
        if settings.num_experts < 2 or not tasks:
            raise InputError("a mixture of experts needs 2 or more experts (experts.num_experts) and a task")
        if parametrized_weights(plain):
            raise InputError(
                "experts are made of plain weights, and this network's are parametrized: merge it"
            )
        self.config: ModelConfig = plain.config
        self.settings, self.tasks = settings, tuple(tasks)
        self.activation_checkpointing = False
        generator = torch.Generator().manual_seed(seed)
        parameters = dict(plain.named_parameters())
        mixed = mixed_weights(plain)
        numbers = settings.num_experts * sum(parameters[name].numel() for name in mixed)
        check_memory(numbers, "give fewer experts (experts.num_experts)")
        experts = {name: _spread(parameters[name].detach(), settings, generator) for name in mixed}
        heads = {
            name: torch.stack([parameters[name].detach()] * len(tasks)) for name in task_parameters(plain)
        }
        self._assemble(plain, experts, heads, seed)

    def _assemble(
        self, plain: EquiformerV2, experts: dict[str, Tensor], heads: dict[str, Tensor], seed: int
    ) -> None:
        self._choice, self._turn = ExpertChoice(), _Turn()
        attach_stacks(plain, self._choice, experts, heads)
        self.network = plain
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.gate = ExpertGate(self.settings, len(self.tasks), self.config.max_num_elements)
        weight = plain.sphere_embedding.weight
        self.gate.to(weight.device, weight.dtype)
        self.eval()

    @classmethod
    def from_contents(cls, contents: ExpertContents, weights: str | None = None) -> "ExpertNetwork":
        """Build the network of an expert file, in evaluation mode.

        Args:
            contents: of the file (`checkpoint.expert_files.read_experts`), with as many experts as were read.
            weights: `raw`, `averaged`, or None for the averaged ones where the file has them.

        Raises:
            InputError: the weights do not fit the configuration; no such weights are there.
        """
        if contents.experts != tuple(range(contents.settings["num_experts"])):  # some, or in another order
            contents = with_experts(contents, range(len(contents.experts)))
        kept = contents.weights[contents.choose_weights(weights)]
        network = cls.__new__(cls)
        nn.Module.__init__(network)
        network.config, network.tasks = contents.config, tuple(contents.tasks)
        network.settings = _settings_of(contents)
        network.activation_checkpointing = False
        size = len(network.tasks), contents.config.max_num_elements
        gate = ExpertGate.from_state(network.settings, *size, kept.gate, contents.source)
        # With one entry of every stack, so that sizes are checked before anything is built.
        stacks = {**kept.experts, **kept.heads}
        first = {**kept.shared, **{name: stack[0] for name, stack in stacks.items()}}
        plain = build_model(contents.config, first, contents.source)
        network._assemble(plain, dict(kept.experts), dict(kept.heads), 0)
        network.gate = gate
        try:
            network.network.load_state_dict({**_in_place(kept), **kept.shared})
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(
                f"{contents.source}: the weights do not fit their configuration: {reason}"
            ) from error
        return network

    # ---- coefficients

    def task_number(self, task: str) -> int:
        """Return the number of a task by its name.

        Raises:
            InputError: there is no such task; the known ones are named.
        """
        if task not in self.tasks:
            raise InputError(f"there is no task {shown(task)}: the experts know {', '.join(self.tasks)}")
        return self.tasks.index(task)

    def coefficients(self, data: Data | Batch, task: str | Tensor | None = None) -> Tensor:
        """Compute the coefficients of structures.

        Args:
            data: one structure or a batch.
            task: name of a task, numbers `[B]`, or None for `data.task`.

        Returns:
            `[B, K]`, rows of which add up to 1.

        Raises:
            InputError: an unknown task, none at all, or an unknown element.
        """
        composition = composition_of(data, self.config.max_num_elements)
        return self.gate.coefficients(composition, self._task_numbers(data, task, len(composition)))

    def _task_numbers(self, data: Data | Batch, task: str | Tensor | None, count: int) -> Tensor:
        """Numbers `[B]` of the tasks of structures."""
        device = data.atomic_numbers.device
        if isinstance(task, str):
            return torch.full((count,), self.task_number(task), device=device)
        if task is None:
            task = getattr(data, "task", None)
        numbers = None if task is None else torch.as_tensor(task, device=device).reshape(-1)
        if numbers is None or len(numbers) != count or numbers.is_floating_point():
            raise InputError(
                f"{count} structures need a task each, one of {', '.join(self.tasks)}: give its name"
            )
        return numbers.long()

    # ---- forward

    def forward(self, batch: Batch | Data, task: str | Tensor | None = None) -> dict[str, Tensor]:
        """Compute energies and forces in normalised units of every structure's own task.

        Args:
            batch: structures (`pos`, `atomic_numbers`, `cell`, `pbc`, `natoms`, and `task [B]`).
            task: see `coefficients`.

        Returns:
            As `EquiformerV2.forward`, in the order of the batch.

        Raises:
            InputError: as `coefficients` and `EquiformerV2.forward`.
        """
        composition = composition_of(batch, self.config.max_num_elements)
        numbers = self._task_numbers(batch, task, len(composition))
        keys = torch.cat([composition, numbers[:, None].double()], dim=1)
        groups, member = torch.unique(keys, dim=0, return_inverse=True)
        group_tasks = groups[:, -1].long()
        coefficients = self.gate.coefficients(groups[:, :-1], group_tasks)
        if len(groups) == 1:
            return self._run_group(batch, coefficients[0], int(group_tasks[0]))
        mixed = self._mixed_for_groups(coefficients)
        parts, rows_of = [], []
        for number, each in enumerate(group_tasks.tolist()):
            rows = torch.nonzero(member == number).flatten()
            rows_of.append(rows)
            try:
                own = select_structures(batch, rows)
                parts.append(self._run_group(own, coefficients[number], each, mixed[number]))
            except InputError as error:
                if error.structure is None:
                    raise
                raise InputError(str(error), int(rows[error.structure])) from error
        return self._in_order(parts, rows_of, torch.as_tensor(batch.natoms, device=member.device).reshape(-1))

    def _mixed_for_groups(self, coefficients: Tensor) -> list[dict[int, Tensor] | None]:
        """Mix the stacks for all groups `[G, K]` in one pass over them, where gradients are wanted.

        The sums are kept for the backward pass in any case; it then goes over the stacks once, too.
        """
        if not torch.is_grad_enabled() or self.activation_checkpointing:
            return [None] * len(coefficients)
        stacks = self.expert_weights().values()
        mixed = [(id(stack), mix(stack, coefficients).unbind(0)) for stack in stacks]
        return [{key: sums[number] for key, sums in mixed} for number in range(len(coefficients))]

    def _run_group(
        self,
        batch: Batch | Data,
        coefficients: Tensor,
        task: int,
        mixed: dict[int, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        """Run structures of one task and composition."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            # Not block by block: the coefficients of a group have to be those of its recomputation.
            return checkpoint(self._run, batch, coefficients, task, use_reentrant=False)  # type: ignore[no-any-return]
        return self._run(batch, coefficients, task, mixed)

    def _run(
        self,
        batch: Batch | Data,
        coefficients: Tensor,
        task: int,
        mixed: dict[int, Tensor] | None = None,
    ) -> dict[str, Tensor]:
        with self._turn.lock:
            self._choice.use(coefficients, task, mixed)
            try:
                out: dict[str, Tensor] = self.network(batch)
            finally:
                self._choice.clear()
        return out

    @staticmethod
    def _in_order(parts: list[dict[str, Tensor]], rows_of: list[Tensor], natoms: Tensor) -> dict[str, Tensor]:
        """Put the outputs of groups back into the order of the batch."""
        structures = torch.cat(rows_of)
        atoms = torch.cat([_atoms_of(rows, natoms) for rows in rows_of])
        out = {}
        for name in parts[0]:
            back = torch.argsort(atoms if name == "forces" else structures)
            out[name] = torch.cat([part[name] for part in parts])[back]
        return out

    # ---- what training and inference ask of a network

    @property
    def backend(self) -> str:
        """Backend of the network (`kernels.backend`); all but `compile`."""
        return self.network.backend

    @backend.setter
    def backend(self, value: str) -> None:
        self.network.backend = value

    def check_backend(self, features: Features = NOTHING_MORE) -> Backend:
        """Refuse what the backend cannot do; see `EquiformerV2.check_backend`."""
        if self.backend == "compile":
            raise InputError(
                "the backend compile compiles a network once, and experts are merged anew for every group: "
                "use auto, or merge the experts for a task and compile that network"
            )
        return self.network.check_backend(features)

    def build_graph(self, batch: Batch | Data) -> RadiusGraph:
        """Find the edges that `forward` uses for these structures."""
        return self.network.build_graph(batch)

    def fold_weights(self, dtype: torch.dtype | None = None) -> None:
        """Keep matrices for inference, until coefficients change; see `EquiformerV2.fold_weights`."""
        self.eval()
        self.network.fold_weights(dtype)

    def no_weight_decay(self) -> set[str]:
        """Name the parameters without weight decay: the network's, and embeddings and biases of the gate."""
        gate = {"elements.weight", "tasks.weight", "hidden.bias", "out.bias"}
        return {f"network.{name}" for name in self.network.no_weight_decay()} | {f"gate.{n}" for n in gate}

    # ---- weights

    def expert_weights(self) -> dict[str, Tensor]:
        """Return the experts `[K, *shape]` by the names of the weights in the plain network."""
        return dict(stacks_of(self.network)[0])

    def task_weights(self) -> dict[str, Tensor]:
        """Return what every task has for itself, `[T, *shape]`, by the names of the plain network."""
        return dict(stacks_of(self.network)[1])

    def weights(self) -> ExpertWeights:
        """Return all weights in the form of expert files."""
        shared = {n: p for n, p in self.network.state_dict().items() if "parametrizations." not in n}
        return ExpertWeights(self.expert_weights(), self.task_weights(), shared, self.gate.state_dict())

    def merged(self, task: str, composition: Tensor, experts: Sequence[int] | None = None) -> EquiformerV2:
        """Merge the experts for one task and composition into a plain network, in evaluation mode.

        Args:
            task: name.
            composition: `[Z]` shares of the elements.
            experts: numbers of those that are kept, with coefficients that are scaled to add up to 1; None
                for all.

        Raises:
            InputError: an unknown task; no or unknown experts.
        """
        number = self.task_number(task)
        device = self.gate.elements.weight.device
        with torch.no_grad():
            coefficients = self.gate.coefficients(
                composition.to(device)[None], torch.tensor([number], device=device)
            )[0]
            state = merge_weights(self.weights(), coefficients, number, experts)
        with torch.random.fork_rng(devices=[]):
            plain = EquiformerV2(self.config)
        plain.to(device, self.network.sphere_embedding.weight.dtype).load_state_dict(state)
        plain.backend = self.backend
        return plain


def merge_weights(
    weights: ExpertWeights, coefficients: Tensor, task: int, experts: Sequence[int] | None = None
) -> dict[str, Tensor]:
    """Merge stacks into the state dictionary of a plain network.

    Args:
        weights: of an expert network, or as many of its experts as were read from a file.
        coefficients: `[K]`, one for each expert in `weights`.
        task: number.
        experts: places in the stacks of those that are kept; None for all.

    Raises:
        InputError: no or unknown experts.
    """
    count = len(coefficients)
    kept = list(range(count)) if experts is None else [int(each) for each in experts]
    if not kept or len(set(kept)) != len(kept) or not set(kept) <= set(range(count)):
        raise InputError(f"the experts to keep are {shown(kept)}: name some of 0 to {count - 1}, each once")
    with torch.no_grad():
        if experts is not None:
            coefficients = renormalized(coefficients[None], kept)[0]
        mixed = {
            name: mix(stack if experts is None else stack[kept], coefficients)
            for name, stack in weights.experts.items()
        }
    heads = {name: stack[task].detach().clone() for name, stack in weights.heads.items()}
    return {**weights.shared, **mixed, **heads}


def select_structures(batch: Batch | Data, rows: Tensor) -> Data:
    """Take structures out of a batch, with the fields that a network reads.

    Args:
        batch: structures.
        rows: `[b]` their numbers.
    """
    natoms = torch.as_tensor(batch.natoms, device=rows.device).reshape(-1)
    atoms = _atoms_of(rows, natoms)
    return Data(
        pos=batch.pos[atoms],
        atomic_numbers=batch.atomic_numbers[atoms],
        cell=batch.cell[rows],
        pbc=batch.pbc[rows],
        natoms=natoms[rows],
    )


def _atoms_of(rows: Tensor, natoms: Tensor) -> Tensor:
    """Numbers of the atoms of structures, in the order of `rows`."""
    counts = natoms[rows]
    total = int(counts.sum())
    place = structure_index(counts, total)
    first = natoms.cumsum(0) - natoms
    within = torch.arange(total, device=rows.device) - (counts.cumsum(0) - counts)[place]
    return first[rows][place] + within


def _spread(weight: Tensor, settings: ExpertSettings, generator: torch.Generator) -> Tensor:
    """Stack of experts `[K, *shape]` around a weight, which is exactly their mean but for rounding."""
    noise = torch.randn(settings.num_experts, *weight.shape, generator=generator)
    noise = (noise - noise.mean(0)) * settings.spread * weight.square().mean().sqrt().cpu()
    return weight + noise.to(weight.device, weight.dtype)


def _settings_of(contents: ExpertContents) -> ExpertSettings:
    """Check the settings of a file."""
    try:
        return ExpertSettings(**{**contents.settings, "num_experts": len(contents.experts)})
    except (InputError, TypeError) as error:
        raise InputError(f"{contents.source}: the settings of its experts are not valid: {error}") from error


def _in_place(weights: ExpertWeights) -> dict[str, Tensor]:
    """Return the stacks by their names in the state dictionary of a network with stacks."""
    named = {}
    for name, stack in {**weights.experts, **weights.heads}.items():
        path, _, leaf = name.rpartition(".")
        named[f"{path}.parametrizations.{leaf}.original"] = stack
    return named
