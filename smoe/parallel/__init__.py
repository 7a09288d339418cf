"""Native expert parallelism: the experts of every SMoE layer spread over ranks, on ``torch.distributed`` alone.

What to call, and when::

    groups = ParallelGroups.create(expert_parallel=4)     # after init_process_group; without one it is a single rank
    model = parallelize(model, groups)                     # before the optimizer, DDP and torch.compile
    model = DistributedDataParallel(model)                 # leaves the experts alone: parallelize told it to
    for batch in batches:
        set_top_k(model, k)                                # the same k on every rank
        model(batch).backward()                            # once or, accumulating gradients, several times
        sync_expert_gradients(model, groups)               # once a step, after the last backward
        clip_grad_norm_(model, max_norm, groups)           # the true norm of the whole model
        optimizer.step()

Every rank of an expert-parallel group runs every forward and backward pass of a layer together with the others: a rank
that is out of tokens runs it with none. With ``accelerate`` and ``transformers.Trainer`` see ``attach``.
"""

from .agreement import check_agreement
from .fsdp import fully_shard_model
from .gradients import attach, clip_grad_norm_, sync_before_step, sync_expert_gradients
from .groups import ParallelGroups
from .shard import expert_parameters, ignore_experts_in_ddp, parallelize
from .state import gather_state, shard_state
from .wire import WireBytes, count_bytes, wire_bytes

__all__ = [
    "ParallelGroups",
    "WireBytes",
    "attach",
    "check_agreement",
    "clip_grad_norm_",
    "count_bytes",
    "expert_parameters",
    "fully_shard_model",
    "gather_state",
    "ignore_experts_in_ddp",
    "parallelize",
    "shard_state",
    "sync_before_step",
    "sync_expert_gradients",
    "wire_bytes",
]
