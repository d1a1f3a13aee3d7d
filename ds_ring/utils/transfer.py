"""From host memory to a rank's device without waiting for it."""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """``tensor`` on ``device``, ready for what is queued there next.

    A copy from pageable memory would make the host wait until all that is queued before it is done, at every
    micro-batch, and leave the GPU idle while the next is being prepared.
    """
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.numel():
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
