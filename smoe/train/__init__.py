"""One training, in the order in which things happen. ``loop.py`` is the page to read first.

command.py        flags and YAML, a scale (auto.py) -> a configuration -> the loop; mistakes.py: errors in flags
config.py         what every training can be told: method, k, steps, learning rate, where it runs
processes.py      this process among those of the run; distributed.py is for several
  launcher.py       ends with torchrun, if that is gone
task.py           what differs between trainings: model, batches, loss, metrics
  finetune.py       for one that starts from another run; examples.py: for one whose data are lines of JSON
  choosing.py       for one that chooses among answers; sentence_floors.py: what needs no model to reach
folder.py         the run folder: who may write to it, whether it is finished
loop.py           the loop: learning rate and k, batch, loss, backward, clip, step, log, evaluate, save, stop
  learning_rate.py  log.py  evaluation.py  stop.py
  checkpoint.py     checkpoints that a crash can't spoil; state.py: optimizer and generators as tensors
  resume.py         from a checkpoint back to the run, at any number of processes
record.py         result.json
predictions.py    predictions.jsonl, for tasks whose examples have one
evaluate.py       the command that measures a finished run at any k
slim_run.py       the command that writes a run with fewer experts; slimming.py: which ones, by votes

``import smoe`` imports nothing of this. A new task is one file beside its model: see ``docs/extend.md``.
"""
