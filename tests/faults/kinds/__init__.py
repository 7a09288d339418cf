"""Every kind of fault: what is done to a run, and what must hold then.

A kind is `kind(rig, task, random)` for one of the tasks that it is for; it raises Lost, Hang or Unclear. Importing a
file puts its kinds into KINDS; the order of the kinds is that of a drill's plan.
"""

# isort: off
from faults.kinds.kind import KINDS, Kind
from faults.kinds import stops, disks, damaged_files, not_finite, several_processes, downloads
# isort: on

__all__ = ["KINDS", "Kind", "damaged_files", "disks", "downloads", "not_finite", "several_processes", "stops"]
