"""What the trainers share: configuration, run folder, checkpoints, logging and reports.

Nothing here is imported by `import smoe`; import the module you need, e.g. `from smoe.run.folder import RunFolder`.
"""
