"""On PYTHONPATH of vLLM: torch says that this machine has no AMX tiles, so its attention goes without."""

import torch.cpu

torch.cpu._is_amx_tile_supported = lambda: False
