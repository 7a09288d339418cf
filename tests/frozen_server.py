"""The last module that the server of commands imports: its children's collections pass over all that it has loaded."""

import gc

gc.collect()
gc.freeze()
