"""Lightning task of a network of experts: several data sets at once, with errors of each."""

import logging
from typing import Any

from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor, nn
from torch_geometric.data import Batch, Data

from equiformer2.experts import ExpertNetwork
from equiformer2.experts.normalizers import TaskNormalizers
from equiformer2.training.metrics import S2EFMetrics
from equiformer2.training.optim import OptimSettings
from equiformer2.training.task import S2EFTask, TaskSettings

log = logging.getLogger("equiformer2")


class ExpertTask(S2EFTask):
    """Structure to energy and forces of several tasks; batches hold `task [B]`.

    Args:
        model: network of experts.
        normalizers: of every task.
        energy_kind: kinds of energy of all tasks, as a text.
        settings, optim, seed: see `S2EFTask`.
    """

    normalizers: TaskNormalizers  # type: ignore[assignment]

    def __init__(
        self,
        model: ExpertNetwork,
        normalizers: TaskNormalizers,
        energy_kind: str,
        settings: TaskSettings,
        optim: OptimSettings,
        seed: int = 0,
    ) -> None:
        super().__init__(model, normalizers, energy_kind, settings, optim, seed)  # type: ignore[arg-type]
        self.tasks = model.tasks
        self.metrics_of_tasks = nn.ModuleList(S2EFMetrics(forces=self.has_forces) for _ in model.tasks)

    def energy_unit(self, predicted: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Factor, in eV, from the mean of this batch's normalised errors to that of its errors."""
        errors = (predicted.detach().double() - target).abs()
        return ((errors * self.normalizers.energy_std(batch)).sum() / errors.sum().clamp(min=1e-30)).float()

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """Add one batch to the metrics of all structures and to those of every task."""
        prediction = super().validation_step(batch, batch_idx)
        names = ["energy", *(["forces"] if self.has_forces else [])]
        for number, metrics in enumerate(self.metrics_of_tasks):
            rows = batch.task == number
            if not bool(rows.any()):
                continue
            atoms = rows[batch.batch]
            target = Data(natoms=batch.natoms[rows], fixed=batch.fixed[atoms])
            mine = {}
            for name in names:
                chosen = rows if name == "energy" else atoms
                target[name], mine[name] = batch[name][chosen], prediction[name][chosen]
            assert isinstance(metrics, S2EFMetrics)
            metrics.update(mine, target)
        return prediction

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all tasks together, `val/…`, and of each, `val/TASK/…`."""
        super().on_validation_epoch_end()
        for name, metrics in zip(self.tasks, self.metrics_of_tasks, strict=True):
            assert isinstance(metrics, S2EFMetrics)
            values = {key: value.float() for key, value in metrics.compute().items()}
            self.log_dict({f"val/{name}/{key}": value for key, value in values.items()})
            self._tell(name, {key: float(value) for key, value in values.items()})
            metrics.reset()

    @staticmethod
    @rank_zero_only
    def _tell(name: str, values: dict[str, float]) -> None:
        parts = [f"  {name}: val energy MAE {values['energy_mae']:.4f} eV"]
        if "forces_mae" in values:
            parts.append(f"force MAE {values['forces_mae']:.4f} eV/Å")
        log.info("  ".join(parts))

    def _model_settings(self) -> dict[str, Any]:
        """Settings that the weights belong to, those of the experts too."""
        assert isinstance(self.model, ExpertNetwork)
        own = {"experts": self.model.settings.to_dict(), "tasks": list(self.tasks)}
        return {**super()._model_settings(), **own}
