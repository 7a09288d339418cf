"""Expert parallelism on ``torch.distributed`` alone: the ranks of a group share the experts of every SMoE layer.

A training loop::

    groups = ParallelGroups.create(expert_parallel=4)     # after init_process_group
    model = parallelize(model, groups)                     # before the optimizer, DDP and torch.compile
    model = DistributedDataParallel(model)                 # parallelize has told it to ignore the experts
    for batch in batches:
        set_top_k(model, k)                                # the same k on every rank
        model(batch).backward()                            # several times to accumulate gradients
        sync_expert_gradients(model, groups)               # once per step, after the last backward
        clip_grad_norm_(model, max_norm, groups)           # by the norm of the whole model
        optimizer.step()

All ranks of an expert-parallel group must run every forward and backward pass of a layer together; a rank that has no
tokens runs it with an empty batch. For ``accelerate`` and ``transformers.Trainer`` see ``attach``.
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
