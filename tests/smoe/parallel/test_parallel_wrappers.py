"""Expert parallelism with PEFT, accelerate's offloading and DataParallel works, or is refused in one line."""

import importlib

import pytest
import torch
from ranks import run_ranks
from test_parallel_training import batch, make_model, share
from tiny_models import with_lora
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from smoe import set_top_k
from smoe.parallel import (
    ParallelGroups,
    clip_grad_norm_,
    expert_parameters,
    fully_shard_model,
    gather_state,
    ignore_experts_in_ddp,
    parallelize,
    shard_state,
    sync_expert_gradients,
)
from smoe.parallel.shard import unwrap_model

pytestmark = pytest.mark.distributed


def message(call) -> str:
    with pytest.raises(ValueError) as caught:
        call()
    return str(caught.value)


def lora_beside_experts(rank: int) -> None:
    """Adapters on other modules: gradients and weights are those of a single process."""
    groups = ParallelGroups.create(2, timeout=60)
    whole = with_lora(make_model(), modules=["out"])
    model = with_lora(parallelize(make_model(), groups), modules=["out"])
    ignore_experts_in_ddp(model)
    wrapped = DistributedDataParallel(model)
    wrapped(*share(rank, 2, 0))["loss"].backward()
    whole(*batch(0))["loss"].backward()
    norm = clip_grad_norm_(wrapped, 0.01, groups)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(whole.parameters(), 0.01))
    for name, parameter in whole.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(model.get_parameter(name).grad, parameter.grad, rtol=1e-4, atol=1e-7)
    state = gather_state(wrapped.state_dict(), wrapped, groups)
    if rank == 0:
        assert all(torch.equal(value, state[f"module.{name}"]) for name, value in whole.state_dict().items())


def test_lora_beside_the_experts():
    run_ranks(lora_beside_experts, 2)


def not_ignored(rank: int) -> str:
    """Nothing before the experts is trained, so no gradient passes them; DDP has overwritten them all the same."""
    groups = ParallelGroups.create(2, timeout=60)
    model = DistributedDataParallel(with_lora(parallelize(make_model(), groups), modules=["out"]))
    model(*share(rank, 2, 0))["loss"].backward()
    return message(lambda: sync_expert_gradients(model, groups))


def test_ddp_that_does_not_ignore_the_experts_is_noticed():
    (line, other) = run_ranks(not_ignored, 2)
    assert (
        line
        == other
        == (
            "DDP averages base_model.model.mlps.0.experts.down over ranks that hold different experts; call "
            "ignore_experts_in_ddp(module) before DistributedDataParallel(module)"
        )
    )


def lora_on_experts(rank: int) -> list[str]:
    groups = ParallelGroups.create(2, timeout=60)
    model = with_lora(make_model(), parameters=["experts.up", "experts.down"])
    lines = [message(lambda: parallelize(model, groups))]
    assert all(layer.dispatch is None for layer in model.mlps)
    model = with_lora(parallelize(make_model(), groups), parameters=["experts.up"])
    model(*share(rank, 2, 0))["loss"].backward()
    for call in (
        lambda: sync_expert_gradients(model, groups),
        lambda: clip_grad_norm_(model, 1.0, groups),
        lambda: expert_parameters(model),
        lambda: ignore_experts_in_ddp(model),
        lambda: fully_shard_model(model, groups),
        lambda: gather_state(model.state_dict(), model, groups),
        lambda: shard_state(model.state_dict(), model, groups),
    ):
        lines.append(message(call))
    return lines


def test_lora_on_experts_is_refused():
    lines, others = run_ranks(lora_on_experts, 2)
    assert lines == others and set(lines) == {
        "ParamWrapper wraps the experts of layer base_model.model.mlps.0; adapters on experts need expert_parallel = 1,"
        " or merge them first (model = model.merge_and_unload())"
    }


def lora_with_data_parallelism(rank: int, fsdp: bool) -> None:
    groups = ParallelGroups.create(timeout=60)
    whole, model = (with_lora(make_model(), parameters=["experts.up", "experts.down"]) for _ in range(2))
    model = parallelize(model, groups)
    model = fully_shard_model(model, groups) if fsdp else DistributedDataParallel(model)
    model(*share(rank, 2, 0))["loss"].backward()
    whole(*batch(0))["loss"].backward()
    norm = clip_grad_norm_(model, 0.01, groups)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(whole.parameters(), 0.01))
    gradients = {name: p.grad for name, p in unwrap_model(model).named_parameters()}
    gradients = gather_state({name: grad for name, grad in gradients.items() if grad is not None}, model, groups)
    if rank == 0:
        wanted = {name: p.grad for name, p in whole.named_parameters() if p.grad is not None}
        assert gradients.keys() == wanted.keys()
        for name, grad in wanted.items():
            torch.testing.assert_close(gradients[name], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("fsdp", [False, True])
def test_lora_on_experts_with_data_parallelism(fsdp):
    run_ranks(lora_with_data_parallelism, 2, fsdp)


def offloaded(rank: int) -> list[str]:
    from accelerate import cpu_offload

    groups = ParallelGroups.create(2, timeout=60)
    cpu = torch.device("cpu")
    lines = [message(lambda: parallelize(cpu_offload(make_model(), execution_device=cpu), groups))]
    whole, model = make_model(), cpu_offload(parallelize(make_model(), groups), execution_device=cpu)
    assert model.mlps[0].experts.up.is_meta
    for each in (whole, model):
        set_top_k(each, 3)
    inputs = share(rank, 2, 0)
    torch.testing.assert_close(model(*inputs)["logits"], whole(*inputs)["logits"], rtol=0, atol=1e-6)
    return [*lines, message(lambda: gather_state(model.state_dict(), model, groups))]


def test_offloaded_weights():
    lines, others = run_ranks(offloaded, 2)
    assert (
        lines
        == others
        == [
            "accelerate has offloaded layer mlps.0; call parallelize before cpu_offload",
            "embedding.weight is on the meta device, without values; call gather_state before cpu_offload",
        ]
    )


def other_names(rank: int) -> list[str]:
    groups = ParallelGroups.create(2, timeout=60)
    model = parallelize(make_model(), groups)
    around = nn.ModuleDict({"inner": model})
    moments = {f"state/{name}/exp_avg": p for name, p in model.named_parameters()}
    replicate = importlib.import_module("torch.nn.parallel.replicate")
    replicate._broadcast_coalesced_reshape = lambda tensors, devices, detach: [tensors for _ in devices]
    replicate._get_device_index = lambda device, optional: device
    return [
        message(lambda: gather_state(model.state_dict(), around, groups)),
        message(lambda: gather_state(moments, around, groups)),
        message(lambda: shard_state(around.state_dict(), model, groups)),
        message(lambda: replicate.replicate(model, [0, 1])),
    ]


def test_names_from_another_module_and_replicas_are_refused():
    """With names that it does not know, gather_state would return rank 0's shards as whole tensors."""
    lines, others = run_ranks(other_names, 2)
    ends = "; pass the model whose state dict this is"
    assert (
        lines
        == others
        == [
            f"mlps.0.experts.up is called inner.mlps.0.experts.up in model{ends}",
            f"state/mlps.0.experts.up/exp_avg is called inner.mlps.0.experts.up in model{ends}",
            f"inner.mlps.0.experts.up is called mlps.0.experts.up in model{ends}",
            "torch.nn.DataParallel runs its replicas in threads, which cannot exchange tokens; wrap a parallelized "
            "model in DistributedDataParallel, with one process per GPU",
        ]
    )
