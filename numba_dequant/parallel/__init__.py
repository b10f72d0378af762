"""Plans: which rank holds which part of a model. This package needs no GPU and no PyTorch.

::

    with nd.open("model.gguf") as model:
        found = plan(model.tensors.values(), world=8, rules=llama_rules(model.metadata))
    print(found)
    for name, part in found.ranks[0].parts.items():
        print(name, part.shape, part.n_bytes)
"""

from numba_dequant.parallel.placements import Placement, Replicate, Rule, Shard, llama_rules
from numba_dequant.parallel.plan import Part, Plan, RankPlan, plan

__all__ = ["Part", "Placement", "Plan", "RankPlan", "Replicate", "Rule", "Shard", "llama_rules", "plan"]
