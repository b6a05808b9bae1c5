"""One implementation in a process of its own: JSON requests on stdin, one JSON answer each on stdout.

Started by the driver as `python -m bench.worker {ours|reference}`, each with the Python of its environment.
Between requests the process blocks on stdin and uses no processor.
"""

import importlib
import importlib.metadata
import json
import os
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from bench.structures import load_batch

# OC20 S2EF loss coefficients of the paper (energy L1, force L2 over free atoms).
ENERGY_COEFFICIENT, FORCE_COEFFICIENT = 4.0, 100.0
LEARNING_RATE, WEIGHT_DECAY = 2e-4, 1e-3


def peak_memory() -> int:
    """Largest resident size of this process so far, bytes."""
    status = Path("/proc/self/status")
    if status.exists():
        # On Linux ru_maxrss starts at the parent's peak; VmHWM is this program's own.
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def loss(out: dict[str, torch.Tensor], batch: Any) -> torch.Tensor:
    energy = (out["energy"].view(-1) - batch.energy).abs().mean()
    forces = (out["forces"] - batch.forces)[~batch.fixed].norm(dim=-1).mean()
    return ENERGY_COEFFICIENT * energy + FORCE_COEFFICIENT * forces


class Worker:
    """The requests, one method each. `implementation` is the module `ours` or `reference`."""

    def __init__(self, implementation: ModuleType) -> None:
        self.implementation = implementation
        self.memory_before_model = peak_memory()

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.implementation.NAME,
            "version": importlib.metadata.version(self.implementation.NAME),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "allocator": {key: value for key, value in os.environ.items() if key.startswith("MALLOC_")},
        }

    def build(self, config: dict[str, Any], parameters: str, create: bool, batch: str) -> dict[str, Any]:
        """Build the network; `create` saves its random parameters to the file, else they come from it."""
        torch.manual_seed(0)
        self.batch = load_batch(batch)
        stored = None if create else torch.load(parameters, weights_only=True)
        self.model = self.implementation.build(config, stored)
        if create:
            torch.save({name: value.detach() for name, value in self.model.named_parameters()}, parameters)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY
        )
        return {
            "parameters": sum(value.numel() for value in self.model.parameters()),
            "atoms": len(self.batch.pos),
            "peak": peak_memory(),
        }

    def answers(self, path: str, draws: int, gradients: bool) -> dict[str, Any]:
        """Save edges, and `draws` times energies, forces and (dropout off) the gradients of the loss."""
        self.model.eval()
        self.implementation.set_inference_mode(self.model, as_shipped=False)
        edge_index, vectors = self.implementation.edges(self.model, self.batch)
        rows = []
        for _ in range(draws):
            self.model.zero_grad()
            with torch.set_grad_enabled(gradients):
                out = self.model(self.batch)
            row = {"energy": out["energy"].detach().view(-1), "forces": out["forces"].detach()}
            if gradients:
                loss(out, self.batch).backward()
                # A parameter that cannot influence the answer has no gradient here and a zero one there.
                row["gradients"] = {
                    name: value.grad if value.grad is not None else torch.zeros_like(value)
                    for name, value in self.model.named_parameters()
                }
                self.model.zero_grad()
            rows.append(row)
        torch.save({"edge_index": edge_index, "vectors": vectors.detach(), "draws": rows}, path)
        return {}

    def run(self, operation: str) -> dict[str, Any]:
        """One timed call: `forward`, `forward_as_shipped` (reference only) or `training_step`."""
        if operation == "training_step":
            self.model.train()
            start = time.perf_counter()
            self.optimizer.zero_grad()
            total = loss(self.model(self.batch), self.batch)
            total.backward()
            self.optimizer.step()
        else:
            self.model.eval()
            as_shipped = operation == "forward_as_shipped"
            self.implementation.set_inference_mode(self.model, as_shipped=as_shipped)
            start = time.perf_counter()
            with torch.no_grad():
                total = self.model(self.batch)["energy"].sum()
        return {"seconds": time.perf_counter() - start, "value": total.item()}

    def memory(self) -> dict[str, Any]:
        """Peaks, bytes: with everything imported but no network yet, and up to now."""
        return {"before_model": self.memory_before_model, "peak": peak_memory()}


def serve(worker: Worker, write: Callable[[str], None]) -> None:
    for line in sys.stdin:
        request = json.loads(line)
        command = request.pop("command")
        try:
            answer = {"answer": getattr(worker, command)(**request)}
        except Exception as error:
            # The driver stops with this line; the traceback is for whoever has to look.
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        write(json.dumps(answer))


def main() -> None:
    # Libraries may print; only answers may reach the driver.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def write(line: str) -> None:
        answers.write(line + "\n")
        answers.flush()

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    serve(Worker(importlib.import_module(f"bench.{sys.argv[1]}")), write)


if __name__ == "__main__":
    main()
