"""Options of the sweepers."""

# Without postponed annotations: Hydra runs this file under no name that dataclasses could look them up by.
from dataclasses import dataclass

from hydra.core.config_store import ConfigStore


@dataclass
class GridSweeperConf:
    """A run for each combination of options."""

    _target_: str = "hydra_plugins.dalle1_sweepers.grid.GridSweeper"
    # What sweep.json shows of each job: a number of its summary.json; null: what its best checkpoint is chosen by.
    metric: str | None = None


@dataclass
class OptunaSweeperConf:
    """Runs whose options Optuna chooses."""

    _target_: str = "hydra_plugins.dalle1_sweepers.optuna_search.OptunaSweeper"
    metric: str | None = None  # a number of the runs' summary.json; null: what their best checkpoint is chosen by
    direction: str = "minimize"  # or maximize
    n_trials: int = 20  # in all, those of earlier starts and failed ones included
    n_jobs: int = 1  # trials that are chosen together, for the launcher to run side by side
    sampler: str = "tpe"  # or random
    seed: int = 0


for _name, _node in {"dalle1_grid": GridSweeperConf, "dalle1_optuna": OptunaSweeperConf}.items():
    ConfigStore.instance().store(group="hydra/sweeper", name=_name, node=_node, provider="dalle1_sweepers")
