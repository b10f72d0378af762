"""Plans: which rank holds which part of a model. This package needs no GPU and no PyTorch.

::

    with nd.open("model.gguf") as model:
        found = plan(model.tensors.values(), world=8, rules=llama_rules(model.metadata))
    print(found)
    for name, part in found.ranks[0].parts.items():
        print(name, part.shape, part.n_bytes)

`predict` says how long a plan takes to load on a `Machine`, from rates and bytes.
"""

from numba_dequant.parallel.cost import Prediction, RankCost, Stage, predict
from numba_dequant.parallel.machine import Machine
from numba_dequant.parallel.placements import Placement, Replicate, Rule, Shard, llama_rules
from numba_dequant.parallel.plan import Part, Plan, RankPlan, plan

__all__ = [
    "Machine", "Part", "Placement", "Plan", "Prediction", "RankCost", "RankPlan", "Replicate", "Rule", "Shard", "Stage",
    "llama_rules", "plan", "predict",
]  # fmt: skip
