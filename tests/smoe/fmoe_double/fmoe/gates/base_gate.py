from torch import nn


class BaseGate(nn.Module):
    def __init__(self, num_expert, world_size):
        super().__init__()
        self.num_expert, self.world_size = num_expert, world_size
