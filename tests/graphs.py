"""What the graph of a pass holds."""

import torch


def bytes_held(loss: torch.Tensor) -> int:
    """Bytes of the storages that the graph behind a loss holds, by its saved tensors."""
    held: dict[int, int] = {}
    nodes, seen = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        nodes += [one for one, _ in node.next_functions]
        for name in dir(node):
            raw = getattr(node, name, None) if name.startswith("_raw_saved") else None
            for one in raw if isinstance(raw, (tuple, list)) else [raw]:
                data = getattr(one, "data", None)
                if isinstance(data, torch.Tensor):
                    held[data.untyped_storage().data_ptr()] = data.untyped_storage().nbytes()
    return sum(held.values())
