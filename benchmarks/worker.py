"""One implementation in a process of its own: JSON requests on stdin, one JSON answer each on stdout.

Started by the driver as `python -m benchmarks.worker {ours|reference} {cpu|cuda} [MEMORY_LIMIT]`, each with
the Python of its environment. Between requests the process blocks on stdin and uses no processor.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import statistics
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import partial
from types import ModuleType
from typing import Any

import torch

from benchmarks.benchmark_structures import load_atoms, load_batch, load_starts
from benchmarks.machine import limit_memory, now, peak_memory, precision

# OC20 S2EF loss coefficients of the paper (energy L1, force L2 over free atoms).
ENERGY_COEFFICIENT, FORCE_COEFFICIENT = 4.0, 100.0
LEARNING_RATE, WEIGHT_DECAY = 2e-4, 1e-3
# The module that wraps each implementation; the reference's can only be imported in its own environment.
NETWORKS = {"ours": "equiformer2_network", "reference": "fairchem_network"}
# Size of one array in `measure_bandwidth`, far beyond what a processor's caches hold.
ARRAY_BYTES = 256 * 2**20
# No structure of a network with random parameters converges below this: the driver decides when to stop.
NEVER = 1e-12


def loss(out: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    """Paper's S2EF loss of normalised answers."""
    energy = (out["energy"].view(-1) - batch.energy).abs().mean()
    forces = (out["forces"] - batch.forces)[~batch.fixed].norm(dim=-1).mean()
    return ENERGY_COEFFICIENT * energy + FORCE_COEFFICIENT * forces


class Worker:
    """The requests, one method each. `implementation` is one of the modules in `NETWORKS`."""

    def __init__(self, implementation: ModuleType, device: str) -> None:
        self.implementation, self.device = implementation, device
        self.relaxations: dict[tuple[str, str], Relaxation] = {}
        self.relaxer: Callable[..., dict[str, Any]] | None = None
        self.memory_before_model = peak_memory(device)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.implementation.NAME,
            "version": importlib.metadata.version(self.implementation.NAME),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
            "allocator": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
        }

    def build(
        self, config: dict[str, Any], parameters: str | None, create: bool, batch: str
    ) -> dict[str, Any]:
        """Build the network; `create` saves its random parameters to the file, else they come from it.

        Without a file the parameters are random, drawn from a fixed seed.
        """
        torch.manual_seed(0)
        stored = None if create or parameters is None else torch.load(parameters, weights_only=True)
        model = self.implementation.build(config, stored)
        if create and parameters is not None:
            torch.save({name: value.detach() for name, value in model.named_parameters()}, parameters)
        return self._take(model, batch)

    def load(self, checkpoint: str, batch: str) -> dict[str, Any]:
        """A trained network from a file."""
        return self._take(self.implementation.load(checkpoint), batch)

    def _take(self, model: torch.nn.Module, batch: str) -> dict[str, Any]:
        self.batch = load_batch(batch).to(self.device)
        self.model = model.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        return {
            "parameters": sum(value.numel() for value in self.model.parameters()),
            "atoms": len(self.batch.pos),
            "peak": peak_memory(self.device),
        }

    def answers(
        self, path: str, draws: int, gradients: bool, precision: str = "float32", backend: str = "auto"
    ) -> dict[str, Any]:
        """Save edges, and `draws` times energies, forces and (dropout off) the gradients of the loss."""
        self._prepare(backend, False, precision)
        edge_index, vectors = self.implementation.edges(self.model, self.batch)
        rows = []
        for _ in range(draws):
            self.model.zero_grad()
            with torch.set_grad_enabled(gradients), self._precision(precision):
                out = self.model(self.batch)
            row = {key: out[key].detach().float().cpu() for key in ("energy", "forces")}
            row["energy"] = row["energy"].view(-1)
            if gradients:
                loss(out, self.batch).backward()
                # A parameter that cannot influence the answer has no gradient here and a zero one there.
                row["gradients"] = {
                    name: (value.grad if value.grad is not None else torch.zeros_like(value)).cpu()
                    for name, value in self.model.named_parameters()
                }
                self.model.zero_grad()
            rows.append(row)
        torch.save({"edge_index": edge_index.cpu(), "vectors": vectors.detach().cpu(), "draws": rows}, path)
        return {"edges": edge_index.shape[1]}

    def run(self, operation: str, precision: str = "float32", backend: str = "auto") -> dict[str, Any]:
        """One timed call.

        `forward`, `forward_as_shipped` (reference only), `training_step`, or `relaxation_step` of a
        relaxation that was begun.
        """
        if operation == "relaxation_step":
            relaxation = self.relaxations[precision, backend]
            start = now(self.device)
            value = relaxation.step()
        elif operation == "training_step":
            self.implementation.select_backend(self.model, backend)
            self.model.train()
            start = now(self.device)
            value = self._training_step(precision)
        else:
            self._prepare(backend, operation == "forward_as_shipped", precision)
            start = now(self.device)
            with torch.no_grad(), self._precision(precision):
                value = self.model(self.batch)["energy"].sum().item()
        return {"seconds": now(self.device) - start, "value": value}

    def _prepare(self, backend: str, as_shipped: bool, precision: str) -> None:
        self.implementation.select_backend(self.model, backend)
        self.model.eval()
        self.implementation.set_inference_mode(self.model, as_shipped, precision)

    def _precision(self, name: str) -> Any:
        return precision(name, self.device)

    def _training_step(self, name: str) -> float:
        self.optimizer.zero_grad()
        with self._precision(name):
            out = self.model(self.batch)
        total = loss(out, self.batch)
        # TF32 is a property of the products at the time, so the backward pass needs it too; autocast ends
        # here.
        with self._precision("float32" if name == "bf16" else name):
            total.backward()
        self.optimizer.step()
        return total.item()

    def begin_relaxation(self, path: str, draws: int, precision: str, backend: str) -> dict[str, Any]:
        """Attach a calculator to the first slab; save the energy and forces of the start structure."""
        calculator = self.implementation.calculator(self.model, precision, backend, self.device)
        relaxation = Relaxation(calculator, precision, self.device)
        torch.save({"draws": relaxation.first_answers(draws)}, path)
        self.relaxations[precision, backend] = relaxation
        return {"atoms": len(relaxation.atoms)}

    def relax_systems(
        self, starts: str, method: str, settings: dict[str, Any], batch_size: int | None
    ) -> dict[str, Any]:
        """Relax the starts of a file; `method` is `batched` or `ase` (one by one).

        Args:
            starts: file of `benchmark_structures.save_starts`.
            method: see there.
            settings: `fmax`, `steps`, and those of the L-BFGS under the names of `RelaxationSettings`.
            batch_size: structures per batch; None for the implementation's own choice.

        Returns:
            `seconds`, `evaluations` of the network, `converged` systems, `energies_eV` in their order.
        """
        atoms = load_starts(starts)
        if self.relaxer is None:
            self.relaxer = self.implementation.relaxer(self.model, self.device)
        start = now(self.device)
        found = self.relaxer(atoms, method, settings, batch_size)
        return {"seconds": now(self.device) - start, **found}

    def breakdown(self, operation: str, precision: str) -> dict[str, Any]:
        """Seconds of the parts of one call, ours only; see `part_profile.profile_parts`."""
        from benchmarks.part_profile import profile_parts

        return profile_parts(self.model, lambda: self.run(operation, precision), self.device)

    def count(self) -> dict[str, Any]:
        """Floating-point operations and bytes of a forward by part, ours only; see `operation_counts`."""
        from benchmarks.operation_counts import count

        edges = self.implementation.edges(self.model, self.batch)[0].shape[1]
        counts = count(self._config(), len(self.batch.pos), edges)
        return {"edges": edges, "parts": {name: [part.flops, part.bytes] for name, part in counts.items()}}

    def gemm_rate(self, precision: str, repeats: int) -> dict[str, Any]:
        """Measured rate of the network's largest matrix products, ours only; see `operation_counts`."""
        from benchmarks.operation_counts import gemm_shapes

        edges = self.implementation.edges(self.model, self.batch)[0].shape[1]
        shapes = gemm_shapes(self._config(), edges)
        return measure_rate(shapes, precision, self.device, repeats)

    def bandwidth(self, repeats: int) -> dict[str, Any]:
        """Measured rate of the memory; see `measure_bandwidth`."""
        return measure_bandwidth(self.device, repeats)

    def _config(self) -> Any:
        return self.model.config

    def memory(self) -> dict[str, Any]:
        """Peaks, bytes: with everything imported but no network yet, and up to now."""
        return {"before_model": self.memory_before_model, "peak": peak_memory(self.device)}


def relax_one_by_one(atoms: list[Any], calculator: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Relax structures with ASE's L-BFGS, one after another; see `Worker.relax_systems`."""
    from ase.optimize import LBFGS

    energies, evaluations, converged = [], 0, 0
    for one in atoms:
        one.calc = calculator
        optimizer = LBFGS(
            one,
            logfile=os.devnull,
            maxstep=settings["max_step"],
            memory=settings["memory"],
            alpha=settings["alpha"],
            damping=settings["damping"],
        )
        converged += bool(optimizer.run(fmax=settings["fmax"], steps=settings["steps"]))
        evaluations += optimizer.nsteps + 1
        energies.append(float(one.get_potential_energy()))
    return {"evaluations": evaluations, "converged": converged, "energies_eV": energies}


class Relaxation:
    """FIRE on the first slab with its lower layers held; one evaluation of the network per step.

    The driver steps through it, so that both implementations take their steps in turn.
    """

    def __init__(self, calculator: Any, precision_name: str, device: str) -> None:
        # Imported here, so that it does not count as memory of a training step.
        from ase.optimize import FIRE

        self.atoms = load_atoms()
        self.atoms.calc = calculator
        self.precision, self.device = precision_name, device
        self._steps: Iterator[Any] = FIRE(self.atoms, logfile=None).irun(fmax=NEVER, steps=10**9)

    def first_answers(self, draws: int) -> list[dict[str, torch.Tensor]]:
        """Energy (eV) and forces (eV/Å, before constraints) of the start structure, `draws` times."""
        rows = []
        for _ in range(draws):
            self.atoms.calc.reset()
            with precision(self.precision, self.device):
                forces = self.atoms.get_forces(apply_constraint=False)
            rows.append(
                {
                    "energy": torch.tensor([self.atoms.get_potential_energy()]),
                    "forces": torch.from_numpy(forces.copy()),
                }
            )
        with precision(self.precision, self.device):
            next(self._steps)  # the start structure; every further one is a step
        return rows

    def step(self) -> float:
        """Move the atoms once and evaluate; returns the energy, eV."""
        with precision(self.precision, self.device):
            next(self._steps)
        return float(self.atoms.get_potential_energy())


def measure_bandwidth(
    device: str,
    repeats: int,
    array_bytes: int = ARRAY_BYTES,
    clock: Callable[[str], float] = now,
) -> dict[str, Any]:
    """Bytes per second read and written by a copy and by a triad `a = b + 2 c`, with torch's threads.

    Every array counts once per pass, as it is read or written: two in the copy, three in the triad. What a
    processor reads of the lines that it writes is not counted. Each time is the median after one warm-up.

    Returns:
        `copy`, `triad`, `rate` (of the faster one) and `array_bytes`.
    """
    size = array_bytes // torch.float32.itemsize
    # Written once here: untouched pages would be read from one page of zeros.
    a, b, c = (torch.full((size,), float(value), device=device) for value in range(3))
    copy = 2 * array_bytes / median_seconds(lambda: a.copy_(b), device, repeats, clock)
    add = partial(torch.add, b, c, alpha=2.0, out=a)
    triad = 3 * array_bytes / median_seconds(add, device, repeats, clock)
    return {"copy": copy, "triad": triad, "rate": max(copy, triad), "array_bytes": array_bytes}


def measure_rate(
    shapes: list[tuple[int, int, int]], precision_name: str, device: str, repeats: int
) -> dict[str, Any]:
    """Floating-point operations per second over all products `[m, k] @ [k, n]`, and of the fastest one.

    Each product counts 2 m k n operations; its time is the median after one warm-up, by the faster of the
    libraries at hand (cuBLAS; on a CPU the BLAS of torch.mm, or oneDNN).
    """
    dtype = torch.bfloat16 if precision_name == "bf16" else torch.float32
    total_flops = total_seconds = best = 0.0
    with torch.no_grad(), precision("float32" if precision_name == "bf16" else precision_name, device):
        for m, k, n in shapes:
            left = torch.randn(m, k, device=device, dtype=dtype)
            # As a linear layer stores it.
            weight = torch.randn(n, k, device=device, dtype=dtype)
            seconds = min(
                median_seconds(partial(multiply, left, weight), device, repeats)
                for multiply in _libraries(device, dtype)
            )
            flops = 2.0 * m * k * n
            total_flops += flops
            total_seconds += seconds
            best = max(best, flops / seconds)
    return {"rate": total_flops / total_seconds, "best": best, "shapes": [list(shape) for shape in shapes]}


def _libraries(device: str, dtype: torch.dtype) -> list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]]:
    """Ways to compute `left @ weight^T`."""
    found: list[Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = [torch.nn.functional.linear]
    onednn = getattr(getattr(torch.ops, "mkldnn", None), "_linear_pointwise", None)
    # On CPUs without AVX-512 oneDNN refuses bfloat16.
    refused = dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if device == "cpu" and onednn is not None and torch.backends.mkldnn.is_available() and not refused:
        found.append(lambda left, weight: onednn(left, weight, None, "none", [], ""))
    return found


def median_seconds(
    call: Callable[[], torch.Tensor], device: str, repeats: int, clock: Callable[[str], float] = now
) -> float:
    """Median time of `repeats` calls, s by `clock` of the device, after one warm-up."""
    times = []
    for _ in range(repeats + 1):
        start = clock(device)
        call()
        times.append(clock(device) - start)
    return statistics.median(times[1:])


def serve(worker: Worker, write: Callable[[str], None]) -> None:
    """Answer requests until standard input ends."""
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        try:
            answer = {"answer": getattr(worker, command)(**request)}
        except Exception as error:
            # The driver says what this line says; the traceback is for whoever has to look.
            traceback.print_exc()
            answer = {"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]}
        write(json.dumps(answer))


def main() -> None:
    # Libraries may print; only answers may reach the driver.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    implementation, device, *limit = sys.argv[1:]
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module = importlib.import_module(f"benchmarks.{NETWORKS[implementation]}")
    if limit:
        limit_memory(int(limit[0]))
    serve(Worker(module, device), write)


if __name__ == "__main__":
    main()
