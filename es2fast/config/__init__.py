"""One pydantic model = one YAML file = one run.

Every quantity that arXiv 2603.20206 leaves open is a field here. Unknown keys are refused with a
did-you-mean, `key=value` overrides use dotted paths (`train.lr=1e-4`), and the resolved
configuration is saved with every run.
"""

from es2fast.config.data import DataConfig, DataSource, ModelConfig
from es2fast.config.evaluation import EvaluateConfig, LmEvalConfig
from es2fast.config.files import load_config, merged, parse_config, read_yaml, save_config
from es2fast.config.objective import (
    KLConfig,
    LayersConfig,
    PrefillConfig,
    RefusalConfig,
    RobustConfig,
    SeparationConfig,
)
from es2fast.config.run import Config
from es2fast.config.training import CheckpointConfig, LoraSection, SafeguardsConfig, TrainConfig

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "DataSource",
    "EvaluateConfig",
    "KLConfig",
    "LayersConfig",
    "LmEvalConfig",
    "LoraSection",
    "ModelConfig",
    "PrefillConfig",
    "RefusalConfig",
    "RobustConfig",
    "SafeguardsConfig",
    "SeparationConfig",
    "TrainConfig",
    "load_config",
    "merged",
    "parse_config",
    "read_yaml",
    "save_config",
]
