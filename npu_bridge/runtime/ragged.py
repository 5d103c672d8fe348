"""`jax.lax.ragged_all_to_all`: runs of rows between the devices of a group, whose places and lengths are data.

Each device gives runs `input_offsets[i], send_sizes[i]` of its operand, the same number to each member of the group in
its order, and says where they begin in the receiver's output (`output_offsets[i]`). Rows that nobody writes keep the
output's value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def place_runs(gathered: torch.Tensor, table: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    """Write the runs for this device into `output`, from the operands of all members, without reading lengths on the
    host.

    gathered: [members, rows, ...]. table: [members, 3, runs], input offsets, sizes and output offsets of the runs that
    each member has for this device.
    """
    members, rows = gathered.shape[:2]
    begin, size, target = (table[:, i].reshape(-1, 1).long() for i in range(3))
    at = torch.arange(output.shape[0], device=output.device)
    inside = (at >= target) & (at < target + size)  # [runs of all members, rows of the output]
    runs = table.shape[2]
    first = torch.arange(members, device=output.device).repeat_interleave(runs)[:, None] * rows
    source = torch.where(inside, first + begin + at - target, 0).sum(0)  # runs do not overlap
    found = inside.any(0).reshape(-1, *[1] * (output.dim() - 1))
    return torch.where(found, gathered.flatten(0, 1)[source.clamp(0, members * rows - 1)], output)


def exchange_runs(
    x: torch.Tensor,
    output: torch.Tensor,
    runs: Sequence[torch.Tensor],
    order: Sequence[int],
    offsets_of_others: torch.Tensor,
    exchange: Callable[[torch.Tensor, list[int], list[int]], torch.Tensor],
) -> torch.Tensor:
    """Exchange exactly the rows that are sent: reads the lengths on the host. Overwrites `output`.

    runs: input offsets, sizes sent, sizes received. order: members in the order in which `exchange` takes and brings
    their rows. offsets_of_others: where received runs begin, by member.
    """
    begins, sent, received = (t.tolist() for t in runs)
    targets, count = offsets_of_others.tolist(), len(sent) // len(order)
    mine = [(m * count + k) for m in order for k in range(count)]
    rows = torch.cat([x[begins[i] : begins[i] + sent[i]] for i in mine])

    def totals(sizes: list[int]) -> list[int]:
        return [sum(sizes[m * count : (m + 1) * count]) for m in order]

    brought = exchange(rows, totals(sent), totals(received))
    at = 0
    for i in mine:
        output[targets[i] : targets[i] + received[i]] = brought[at : at + received[i]]
        at += received[i]
    return output
