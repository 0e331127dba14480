"""fastdpo: Direct Preference Optimization on fused kernels. See README.md."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdpo.config import DPOConfig
    from fastdpo.trainer import DPOTrainer

__version__ = "0.1.0"
__all__ = ["DPOConfig", "DPOTrainer"]


def __getattr__(name: str) -> Any:
    # imported at first use: `fastdpo --help` and fastdpo.kernels need neither torch's
    # distributed stack nor transformers
    if name == "DPOConfig":
        from fastdpo.config import DPOConfig

        return DPOConfig
    if name == "DPOTrainer":
        from fastdpo.trainer import DPOTrainer

        return DPOTrainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
