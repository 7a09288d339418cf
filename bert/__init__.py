"""BERT and RoBERTa with any method of Table 1: data, pretraining and evaluation over the number of activated experts.

Nothing is imported here; import the module you need, e.g. `from bert.model import build_model`.
"""

import logging

# transformers imports torchao where that is installed, which then warns of GPU kernels that a CPU build of torch lacks,
# and of a call in torch that torchao still makes.
for name in ("torchao", "torch.utils._pytree"):
    logging.getLogger(name).setLevel(logging.ERROR)
