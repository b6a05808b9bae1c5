"""EquiformerV2 (Liao et al., ICLR 2024, arXiv 2306.12059): train, fine-tune, prune and run."""

from equiformer2.model import EquiformerV2, ModelConfig

__all__ = ["EquiformerV2", "EquiformerV2Calculator", "ModelConfig"]  # noqa: F822  by __getattr__


def __getattr__(name: str) -> object:
    # ASE is imported only by those who ask for the calculator.
    if name == "EquiformerV2Calculator":
        from equiformer2.inference import EquiformerV2Calculator

        return EquiformerV2Calculator
    raise AttributeError(f"module 'equiformer2' has no attribute '{name}'")
