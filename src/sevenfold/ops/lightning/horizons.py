"""How small a weight counts where a state is summed over many tokens."""

import torch

# A token whose weight at a border is below 2^-horizon is left out of the state there: well below
# the rounding of its own dtype.
HORIZONS = {torch.float32: 26.0, torch.bfloat16: 18.0, torch.float16: 18.0}
