"""Expert parallelism with accelerate and transformers.Trainer has the losses and weights of a single process."""

import os

import pytest
import torch
from ranks import run_ranks
from test_parallel_training import ADAM, BATCH, STEPS, batch, check, k_of, make_model, one_process, share

from smoe import set_top_k
from smoe.parallel import ParallelGroups, attach, gather_state, parallelize

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def wanted():
    return one_process()


def environment(rank: int) -> int:
    """Sets what torchrun sets; both frameworks use an existing process group."""
    world_size = torch.distributed.get_world_size()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1", "ACCELERATE_USE_CPU": "1"}
    return world_size


def with_accelerate(rank: int, expert_parallel: int, wanted) -> None:
    from accelerate import Accelerator

    world_size = environment(rank)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == world_size
    groups = ParallelGroups.create(expert_parallel, timeout=60)
    bare = parallelize(make_model(), groups)
    model, optimizer = accelerator.prepare(bare, torch.optim.AdamW(bare.parameters(), **ADAM))
    attach(accelerator, model, groups)
    losses, norms = [], []
    for step in range(STEPS):
        set_top_k(model, k_of(step))
        loss = model(*share(rank, world_size, step))["loss"]
        accelerator.backward(loss)
        norms.append(accelerator.clip_grad_norm_(model.parameters(), 0.5).item())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
    check(losses, norms, gather_state(bare.state_dict(), model, groups), wanted)


@pytest.mark.parametrize("world_size, expert_parallel", [(2, 2), (4, 2)])
def test_accelerate(world_size, expert_parallel, wanted):
    run_ranks(with_accelerate, world_size, expert_parallel, wanted)


def with_trainer(rank: int, expert_parallel: int, folder: str, wanted) -> None:
    from transformers import Trainer, TrainerCallback, TrainingArguments

    world_size = environment(rank)
    arguments = TrainingArguments(
        output_dir=folder, max_steps=STEPS, use_cpu=True, ddp_backend="gloo", report_to="none", save_strategy="no",
        disable_tqdm=True, logging_steps=1, max_grad_norm=0.5, per_device_train_batch_size=BATCH // world_size,
        learning_rate=ADAM["lr"], adam_epsilon=ADAM["eps"], weight_decay=0.0, lr_scheduler_type="constant",
        dataloader_pin_memory=False,
    )  # fmt: skip

    class Rows(torch.utils.data.Dataset):
        """The batches of all steps in order; the sampler below does not shuffle."""

        def __len__(self):
            return STEPS * BATCH

        def __getitem__(self, index):
            step, row = divmod(index, BATCH)
            ids, labels = batch(step)
            return {"ids": ids[row], "labels": labels[row]}

    class InOrder(Trainer):
        def _get_train_sampler(self, *args):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    losses, norms = [], []

    class Watch(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            set_top_k(model, k_of(state.global_step))

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "grad_norm" in logs:
                losses.append(logs["loss"])
                norms.append(logs["grad_norm"])

    groups = ParallelGroups.create(expert_parallel, timeout=60)
    model = parallelize(make_model(), groups)
    trainer = InOrder(model=model, args=arguments, train_dataset=Rows(), callbacks=[Watch()])
    attach(trainer.accelerator, model, groups)
    trainer.train()
    state = gather_state(model.state_dict(), model, groups)
    if rank == 0:  # only rank 0 logs
        check(losses, norms, state, wanted)


def test_trainer(tmp_path):
    wanted = one_process(weight_decay=0.0)
    run_ranks(with_trainer, 2, 2, str(tmp_path), wanted)
