"""Energies and forces in physical units from a checkpoint."""

import copy
import dataclasses
import functools
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ParamSpec, TypeAlias, TypeVar

import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch_geometric.data import Batch, Data

from datasets_oc20.untrusted import AnyPath
from equiformer2.batch_threads import map_batches
from equiformer2.checkpoint import Checkpoint, load_checkpoint
from equiformer2.checkpoint.adapted import AdaptedNetwork, load_base
from equiformer2.checkpoint.adapter_files import Adapter, read_adapter
from equiformer2.checkpoint.training_data import TrainingData
from equiformer2.devices import own_defaults, usable_device
from equiformer2.errors import InputError, naming_structures
from equiformer2.graph.validation import locate_atom
from equiformer2.inference.atoms import atoms_to_data, check_elements
from equiformer2.inference.cuda_graph import GraphedNetwork, capture_unavailable_reason, check_captured
from equiformer2.inference.familiarity import NOTHING_TOLD, Familiarity, Judgement
from equiformer2.inference.meaning import warning_for
from equiformer2.kernels.backend import Features
from equiformer2.model.output_request import OutputRequest

# Ampere: the first with TF32 and bfloat16 in its tensor cores.
_FIRST_CAPABILITY = (8, 0)
PRECISIONS = ("float32", "tf32", "bf16")


def check_precision(precision: str, device: torch.device) -> None:
    """Raise `InputError` for an unknown precision, or one that the device does not have."""
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; it must be one of {', '.join(PRECISIONS)}")
    if precision == "tf32" and device.type != "cuda":
        raise InputError(f"precision 'tf32' needs a CUDA device, not {device.type}: use 'float32' or 'bf16'")
    if precision != "float32" and device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability < _FIRST_CAPABILITY:
            name = torch.cuda.get_device_name(device)
            raise InputError(
                f"precision {precision!r} needs a GPU of compute capability 8.0, and {name} has "
                f"{capability[0]}.{capability[1]}: use 'float32'"
            )


@contextmanager
def matmul_precision(precision: str, device: torch.device) -> Iterator[None]:
    """Context of one of `PRECISIONS`. Global settings of torch are put back at the end."""
    if precision == "bf16":
        with torch.autocast(device.type, torch.bfloat16):
            yield
        return
    before, wanted = torch.get_float32_matmul_precision(), "high" if precision == "tf32" else "highest"
    if before == wanted:  # other threads may be computing: what is right is not touched
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_P = ParamSpec("_P")
_R = TypeVar("_R")

_CHECKPOINT = "is checkpoint= here (a path)"
_IN_CHECKPOINT = "is not needed: the checkpoint holds its own settings"
OLD_NAMES = {
    "checkpoint_path": _CHECKPOINT,
    "checkpoints": _CHECKPOINT,
    "model": _CHECKPOINT,
    "model_path": _CHECKPOINT,
    "model_paths": _CHECKPOINT,
    "name_or_path": _CHECKPOINT,
    "predict_unit": _CHECKPOINT,
    "potential": _CHECKPOINT,
    "weights_path": _CHECKPOINT,
    "model_name": "is checkpoint= here: give the path of the downloaded file, names are not looked up",
    "local_cache": "is not needed: checkpoint= takes the path of the downloaded file",
    "cpu": 'is device= here: "cpu" for cpu=True, "cuda" for cpu=False',
    "use_device": "is device= here",
    "config_yml": _IN_CHECKPOINT,
    "config": _IN_CHECKPOINT,
    "cutoff": _IN_CHECKPOINT,
    "max_neighbors": _IN_CHECKPOINT,
    "max_neigh": _IN_CHECKPOINT,
    "trainer": "is not needed: whether there are forces is known from the checkpoint",
    "only_output": "is not needed: whether there are forces is known from the checkpoint",
    "task": "is energy_kind= here, for a file that does not say it",
    "task_name": "is energy_kind= here, for a file that does not say it",
    "seed": "is not needed: nothing is drawn at random, two calls give the same bits",
    "amp": 'is precision= here: "bf16" for amp=True',
    "disable_amp": 'is precision= here: "float32" is the default',
    "dtype": 'is precision= here: "float32", "tf32" or "bf16"',
    "default_dtype": 'is precision= here: "float32", "tf32" or "bf16"',
    "inference_settings": "is precision= and backend= here",
    "compile": 'is backend="compile" here',
    "ema": 'is weights= here: "averaged" or "raw"',
}
"""Names of arguments of fairchem's, OCP's and other calculators -> the rest of a sentence about them."""


def answering_old_names(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Decorate a function that has none of `OLD_NAMES`: a call with one raises an explaining `InputError`."""

    @functools.wraps(function)
    def checked(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        old = [name for name in kwargs if name in OLD_NAMES]
        if old:
            raise InputError("; ".join(f"the argument {name}= {OLD_NAMES[name]}" for name in old))
        return function(*args, **kwargs)

    return checked


logger = logging.getLogger(__name__)

Router: TypeAlias = Callable[..., dict[str, torch.Tensor]]
Structures: TypeAlias = Batch | Data | Atoms | Sequence[Data] | Sequence[Atoms]
"""Structures that `Predictor.predict` takes."""


class Predictor:
    """A trained network with its normalizers: eval mode, frozen, no gradients of its weights.

    Args:
        checkpoint: a path (native, OCP or fairchem v1 file), the name of a shipped model such as
            `"oc20_small"`, or a loaded `Checkpoint`, which is not changed.
        device: `"cpu"`, `"cuda"`, `"cuda:1"`, ….
        weights: `"raw"`, `"averaged"` or `None` (averaged where the file has them).
        energy_kind: `"adsorption"` or `"total"`, only needed for a foreign file that does not say.
            For a loaded `Checkpoint`, `weights` and `energy_kind` must agree with what it holds.
        precision: of the matrix products: `"float32"`, `"tf32"` (CUDA) or `"bf16"`.
        backend: `"auto"`, `"torch"`, `"cpp"`, `"compile"` (compiled at the first call) or `"triton"` (CUDA);
            see `kernels.backend`.
        cuda_graphs: replay structures of a size that comes again as CUDA graphs (`inference.cuda_graph`).
            None: where it is possible, on CUDA with the backends `auto`, `torch` and `triton`, without a
            router and without gradient forces.
        router: called as `router(model, batch, request=…)` in place of the network, to skip atoms or edges;
            one of `equiformer2.pruning.routing`.
        adapter: path of an adapter file of this network, or a loaded `Adapter`; `use_adapter` exchanges it.
            Energies are then of the adapter's kind, and `weights` are those that it was trained on.

    Attributes:
        energy_kind: `"adsorption"` or `"total"`: what the energies are.
        checkpoint: the loaded `Checkpoint` (provenance, available weights, …), with the normalizers, the kind
            of energy and the provenance of the adapter in use.
        unseen_elements: symbols met so far that the checkpoint lists as not among its training data.
        familiarity: compares structures with the training data, as far as the checkpoint tells them.

    Raises:
        InputError: not a checkpoint, weights it does not hold, an energy kind that is missing or contradicts
            the checkpoint, a device that is not there, a precision or backend that it does not have, CUDA
            graphs that are asked for and cannot be used.
    """

    @answering_old_names
    @own_defaults()
    def __init__(
        self,
        checkpoint: Checkpoint | str | Path,
        device: str | torch.device = "cpu",
        weights: str | None = None,
        energy_kind: str | None = None,
        precision: str = "float32",
        backend: str = "auto",
        router: Router | None = None,
        cuda_graphs: bool | None = None,
        adapter: Adapter | AnyPath | None = None,
    ) -> None:
        self.device = usable_device(device)
        check_precision(precision, self.device)
        self.precision = precision
        adapter = _opened(adapter)
        if isinstance(checkpoint, str | Path):
            if adapter is None:
                self.checkpoint = load_checkpoint(checkpoint, weights=weights, energy_kind=energy_kind)
            else:
                self.checkpoint = load_base(checkpoint, adapter, weights, energy_kind)
            model = self.checkpoint.model
        elif not isinstance(checkpoint, Checkpoint):
            raise InputError(
                f"{type(checkpoint).__name__} is no model: give a file, the name of a shipped model, the "
                "result of load_checkpoint or, where structures are relaxed, an ASE calculator; save a "
                "network to a file first (one of experts by experts merge)"
            )
        else:
            if weights is not None and weights != checkpoint.weights:
                raise InputError(
                    f"the loaded checkpoint holds its {checkpoint.weights} weights, not the {weights} ones: "
                    f"pass its path with weights={weights!r}"
                )
            kind = checkpoint.energy_kind if adapter is None else adapter.energy_kind
            if energy_kind is not None and energy_kind != kind:
                raise InputError(
                    f"the loaded checkpoint predicts {kind} energies, not {energy_kind} "
                    "energies: leave out energy_kind or use another checkpoint"
                )
            self.checkpoint = checkpoint
            model = copy.deepcopy(checkpoint.model)  # a model in training stays in training
        self.model = model.to(self.device).eval().requires_grad_(False)
        self.model.backend = backend
        self.model.check_backend(Features(routing=router is not None))
        self.router = router
        self._fold_weights()
        self.graphed: GraphedNetwork | None = None
        use = self.device, backend, router is not None, self.model.config.forces == "gradient"
        if cuda_graphs:
            check_captured(*use)
        if cuda_graphs or (cuda_graphs is None and capture_unavailable_reason(*use) is None):
            self.graphed = GraphedNetwork(self.model)
        self._adapted = AdaptedNetwork(self.checkpoint, self.model)
        self.energy_kind: str
        self.use_adapter(adapter)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Go on in another process, or as a copy: the matrices kept for inference are computed again."""
        self.__dict__.update(state)
        self._fold_weights()

    def _fold_weights(self) -> None:
        self.model.fold_weights(torch.bfloat16 if self.precision == "bf16" else None)

    @property
    def adapter(self) -> Adapter | None:
        """The adapter in use."""
        return self._adapted.adapter

    def use_adapter(self, adapter: Adapter | AnyPath | None) -> None:
        """Exchange the adapter of the loaded network; a refused one changes nothing.

        Args:
            adapter: path of an adapter file, or a loaded `Adapter`; None for the network alone.

        Raises:
            InputError: no adapter, or one of another network.
        """
        self.checkpoint = self._adapted.use(_opened(adapter))
        self.energy_kind = self.checkpoint.energy_kind
        self._warned = False
        seen = TrainingData(self.checkpoint.provenance)
        self._unseen = seen.unseen(self.checkpoint.config.max_num_elements)  # those not warned of yet
        self.unseen_elements: list[str] = []
        self.familiarity = Familiarity(self.checkpoint, self.embed)
        self._said: set[str] = set()

    @property
    def provenance(self) -> Mapping[str, Any]:
        """Provenance of the checkpoint."""
        return self.checkpoint.provenance

    @property
    def has_forces(self) -> bool:
        """True if the network predicts forces."""
        return self.checkpoint.config.forces != "none"

    @property
    def energies_apart(self) -> bool:
        """True if energies are better taken from the whole network, in a pass without the router.

        False without a router, and with one that changes the structure (`remove_tag0`, super-nodes): its
        network was trained on such structures and does not know whole ones.
        """
        return self.router is not None and not getattr(self.router, "changes_structure", False)

    @property
    def has_stress(self) -> bool:
        """True if it gives the stress of structures that are periodic in all three directions."""
        return self.checkpoint.config.stress

    @torch.no_grad()
    @own_defaults()
    def predict(
        self,
        batch: Structures,
        *,
        energy: bool = True,
        force_atoms: torch.Tensor | None = None,
        routed: bool = True,
    ) -> dict[str, torch.Tensor]:
        """`{"energy": [B] float64 eV, "forces": [N, 3] float32 eV/Å}` on the CPU.

        "forces" is there only if the network predicts them, for held atoms too (where training has never
        looked at them). They are a direct output of the network, or with `ModelConfig.forces: gradient` minus
        the derivative of the energy. With `ModelConfig.stress` there is "stress" `[B, 3, 3]` float32 eV/Å^3,
        the derivative of the energy by strain over the volume (positive where the structure would shrink); it
        is NaN for structures that are not periodic in all three directions.

        Args:
            batch: the structures: a `Batch`, a data object or `ase.Atoms`, or a list of either.
            energy: whether energies are wanted; without them less is computed for the forces, too.
            force_atoms: bool `[N]`: atoms whose forces are wanted, None for all. Those of the others are not
                computed and given as zero.
            routed: whether the router, if there is one, skips atoms; False computes the whole network.

        Raises:
            InputError: an element outside the network's table, what the graph refuses, or an energy or force
                that is not finite; the structure is named by its `sid` and `fid` where the batch has them.
        """
        if not isinstance(batch, Batch):
            batch = self._collated(batch)
        with naming_structures(batch):
            check_elements(batch.atomic_numbers, self.checkpoint.config.max_num_elements, batch.natoms)
            self._warn_of_elements(batch.atomic_numbers)
            with matmul_precision(self.precision, self.device):
                wanted = None if force_atoms is None else force_atoms.to(self.device)
                out = self._run(batch, OutputRequest(energy, wanted), self.router if routed else None)
        out = {key: value.float().cpu() for key, value in out.items()}
        if energy:
            # Total energies reach thousands of eV: float64 keeps the differences between them.
            out["energy"] = out["energy"].double()
        physical = self.checkpoint.normalizers.denormalize(out, copy.copy(batch).cpu())
        with naming_structures(batch):
            check_finite(physical, batch.natoms)
        return physical

    @torch.no_grad()
    @own_defaults()
    def embed(self, batch: Structures) -> torch.Tensor:
        """Features of degree 0 `[N, C]` float32 on the CPU, which the heads read and no rotation changes.

        Args:
            batch: the structures, as for `predict`.

        Raises:
            InputError: as `predict`.
        """
        if not isinstance(batch, Batch):
            batch = self._collated(batch)
        with naming_structures(batch):
            check_elements(batch.atomic_numbers, self.checkpoint.config.max_num_elements, batch.natoms)
            with matmul_precision(self.precision, self.device):
                return self.model.invariant_features(copy.copy(batch).to(self.device)).float().cpu()

    def judge(self, batch: Structures) -> list[Judgement]:
        """Compare structures with the training data of the checkpoint, as far as it tells them.

        Args:
            batch: the structures, as for `predict`.

        Returns:
            One judgement per structure.

        Raises:
            InputError: as `predict`.
        """
        if not isinstance(batch, Batch):
            batch = self._collated(batch)
        with naming_structures(batch):
            return self.familiarity.judge(batch)

    def predict_batches(
        self, batches: Iterable[Batch], count: int | None = None
    ) -> Iterator[tuple[Batch, dict[str, torch.Tensor]]]:
        """Predict many batches, in order; on a CPU several at a time (`batch_threads.map_batches`).

        Args:
            batches: read as they are needed.
            count: number of batches; None for unknown, many.

        Yields:
            A batch with its outputs, as `predict` gives them.

        Raises:
            InputError: as `predict`, for the first batch that it refuses.
        """

        def predict(batch: Batch) -> tuple[Batch, dict[str, torch.Tensor]]:
            return batch, self.predict(batch)

        # A compiled network divides the threads by itself, and compiles in one of them.
        count = 1 if self.model.backend == "compile" else count
        return map_batches(predict, batches, count=count, device=self.device)

    @property
    def energy_per_structure(self) -> float:
        """The part of an energy that every structure has once, whatever its size, eV: the normalizer's mean.

        What is left grows with the structure: a doubled cell has twice of it.
        """
        return self.checkpoint.normalizers.energy.mean

    def warn_of(self, atoms: Atoms) -> None:
        """Log once what makes the energy of `atoms` mean something else than asked (`inference.meaning`)."""
        if not self._warned:
            warning = warning_for(atoms, self.energy_kind)
            self._warned = warning is not None
            if warning is not None:
                logger.warning(warning)

    def warn_of_unfamiliar(self, structure: Data) -> None:
        """Log, once each, what the training data do not hold; elements are named by `predict`."""
        warning = self.unfamiliar_warning(structure)
        if warning is not None:
            logger.warning(warning)

    def unfamiliar_warning(self, structure: Data) -> str | None:
        """Word what `warn_of_unfamiliar` logs; None where there is nothing that was not said before."""
        if not self.familiarity.known:
            if self._unsaid(["nothing told"]):
                logger.info(f"{NOTHING_TOLD} its energies and forces can be trusted for this structure")
            return None
        (judgement,) = self.judge(structure)
        new = dataclasses.replace(
            judgement,
            elements=(),
            pairs=self._unsaid(judgement.pairs),
            adsorbates=self._unsaid(judgement.adsorbates),
            substrates=self._unsaid(judgement.substrates),
            atoms=judgement.atoms if self._unsaid(["surroundings"] if judgement.atoms else []) else (),
        )
        if new.familiar:
            return None
        return f"{'; '.join(new.sentences())}: its energies and forces may be far off here"

    def _unsaid(self, names: Sequence[str]) -> tuple[str, ...]:
        new = tuple(name for name in names if name not in self._said)
        self._said.update(new)
        return new

    def _warn_of_elements(self, atomic_numbers: torch.Tensor) -> None:
        """Log once, by name, the elements of `atomic_numbers` `[N]` that the checkpoint was not trained on.

        Nothing is said of a checkpoint that does not list the elements of its training data.
        """
        if self._unseen is None:
            return
        numbers = atomic_numbers.cpu()
        marked = self._unseen[numbers]
        if bool(marked.any()):
            new = torch.unique(numbers[marked])
            self._unseen[new] = False
            names = [chemical_symbols[number] for number in new.tolist()]
            self.unseen_elements += names
            logger.warning(
                f"the checkpoint's training data hold no {' and no '.join(names)}: its energies and forces "
                "of structures with such atoms mean little"
            )

    def _collated(self, structures: Data | Atoms | Sequence[Data] | Sequence[Atoms]) -> Batch:
        if isinstance(structures, Data):
            return batch_of_one(structures)
        if not isinstance(structures, Atoms | list | tuple):
            raise InputError(
                f"predict was given {type(structures).__name__}: give a Batch, Data or ase.Atoms, or a "
                "list of them"
            )
        given = [structures] if isinstance(structures, Atoms) else structures
        if not given:
            raise InputError("predict was given no structure: give at least one")
        data = []
        for index, structure in enumerate(given):
            if isinstance(structure, Data):
                data.append(structure)
                continue
            if not isinstance(structure, Atoms):
                raise InputError(
                    f"structure {index} of the list is {type(structure).__name__}: give ase.Atoms or Data",
                    index,
                )
            try:
                converted = atoms_to_data(
                    structure, max_num_elements=self.checkpoint.config.max_num_elements, notify=False
                )
            except InputError as error:
                where = "" if structure is structures else f"structure {index} of the list: "
                raise InputError(f"{where}{error}", index) from error
            self.warn_of(structure)
            data.append(converted)
        return Batch.from_data_list(data)

    def _run(self, batch: Batch, request: OutputRequest, router: Router | None) -> dict[str, torch.Tensor]:
        # Batch.to moves in place: a copy keeps the caller's batch where it is. It is moved before anything
        # else, so that neighbours are searched on the device and edges never travel.
        moved = copy.copy(batch).to(self.device)
        if self.graphed is not None:
            request.check(len(moved.pos), self.has_forces)
            out = self.graphed(moved)
            if out is not None:
                return request.cut(out)
        run = self.model if router is None else functools.partial(router, self.model)
        return run(moved, request=request)


def check_finite(out: Mapping[str, torch.Tensor], natoms: torch.Tensor) -> None:
    """Raise `InputError` for the first structure whose energy, or force on an atom, is not a finite number.

    Args:
        out: "energy" `[B]` and "forces" `[N, 3]`, or one of them.
        natoms: `[B]`.
    """
    if all(bool(torch.isfinite(out[name]).all()) for name in ("energy", "forces") if name in out):
        return
    remedy = "check the structure and the checkpoint"
    several = natoms.numel() > 1
    if "energy" in out:
        wrong = torch.nonzero(~torch.isfinite(out["energy"].reshape(-1))).flatten()
        if len(wrong):
            at = int(wrong[0])
            where = f" of structure {at} of the batch" if several else ""
            raise InputError(f"the model gives a non-finite energy{where}: {remedy}", at)
    wrong = torch.nonzero(~torch.isfinite(out["forces"]).all(dim=1)).flatten()
    name, at = f"atom {int(wrong[0])}", 0
    if several:
        name, at = locate_atom(int(wrong[0]), natoms.reshape(-1).cpu().numpy())
    raise InputError(f"the model gives a non-finite force on {name}: {remedy}", at)


def _opened(adapter: Adapter | AnyPath | None) -> Adapter | None:
    """Read an adapter file; a loaded adapter is given back.

    Raises:
        InputError: neither, or a file that cannot be read.
    """
    if isinstance(adapter, str | os.PathLike):
        return read_adapter(adapter)
    if adapter is None or isinstance(adapter, Adapter):
        return adapter
    raise InputError(f"{type(adapter).__name__} is no adapter: give the path of one adapter file")


def batch_of_one(data: Data) -> Batch:
    """A batch of one structure, as `Batch.from_data_list` makes it, which takes a millisecond."""
    fields = data.to_dict()
    for key, value in fields.items():
        if not isinstance(value, torch.Tensor):
            fields[key] = torch.tensor([value]) if isinstance(value, bool | int | float) else [value]
        elif value.dim() == 0:
            fields[key] = value.unsqueeze(0)
    atoms = len(data.pos)
    return Batch(batch=data.pos.new_zeros(atoms, dtype=torch.long), ptr=torch.tensor([0, atoms]), **fields)
