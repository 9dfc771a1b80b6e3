"""Lesson 15. What the Hopper kernel adds: copies and products that run by themselves.

On Hopper a matrix product (wgmma) and a copy of a tile (TMA) are asynchronous: an instruction starts them, another
waits. So the kernel is not one sequence of steps but several that meet:

    producer (one warp)      starts the copies of K and V tiles into a ring of slots in shared memory
    consumers (warp groups)  each owns 64 query rows: product, softmax, product; hands the slot back

A barrier per slot says "full" (the copy has arrived) or "empty" (all consumers are done). The producer runs ahead by
as many tiles as the ring has slots, so consumers never wait for memory. With two consumers, one does its softmax
(exp: the special-function unit) while the other keeps the matrix unit busy. And within a consumer, the product
S(j+1) = Q K(j+1)^T is started before the softmax of tile j, so even one consumer overlaps the two units.

How much that is worth is arithmetic: a 64 x 128 tile at D = 128 takes 1024 cycles on the matrix unit (two products)
and 512 on the special-function unit (8192 exps, 16 a cycle). In sequence 1536, overlapped 1024: a third less. At
D = 64 both take 512: overlapped, it is half. This lesson replays the schedule with Python threads, one a role, and
then counts cycles with and without overlap.
"""

import threading

import torch
from torch import Tensor

from learn.step_03_online_softmax import online_softmax_update


class Slot:
    """A place in shared memory with its two barriers."""

    def __init__(self, consumers: int):
        self.k: Tensor
        self.v: Tensor
        # one for each consumer: with a shared one, a fast consumer would take a slow one's arrival as well
        self.full = [threading.Semaphore(0) for _ in range(consumers)]
        self.empty = threading.Semaphore(consumers)  # as many arrivals as consumers free it


def attention(q: Tensor, k: Tensor, v: Tensor, block_n: int, consumers: int = 2, slots: int = 3) -> Tensor:
    """q (M, D), k and v (N, D) -> (M, D), by a producer and consumers around a ring of slots."""
    ring = [Slot(consumers) for _ in range(slots)]
    tiles = range(0, k.shape[0], block_n)
    parts = q.tensor_split(consumers)
    outs: list[Tensor] = [torch.empty(0)] * consumers

    def producer() -> None:
        for n, start in enumerate(tiles):
            slot = ring[n % slots]
            for _ in range(consumers):
                slot.empty.acquire()
            # a real copy is asynchronous, and poisoned slots in the tests of the real kernel show a missing wait
            slot.k, slot.v = k[start : start + block_n].clone(), v[start : start + block_n].clone()
            for full in slot.full:
                full.release()

    def consumer(index: int) -> None:
        rows = parts[index]
        m = torch.full((rows.shape[0],), float("-inf"), dtype=q.dtype)
        l, o = (
            torch.zeros(rows.shape[0], dtype=q.dtype),
            torch.zeros(rows.shape[0], v.shape[1], dtype=q.dtype),
        )
        for n, _ in enumerate(tiles):
            slot = ring[n % slots]
            slot.full[index].acquire()
            s = rows @ slot.k.T * q.shape[-1] ** -0.5
            m, l, o = online_softmax_update(m, l, o, s, slot.v)
            slot.empty.release()
        outs[index] = o / l[:, None]

    threads = [threading.Thread(target=producer)]
    threads += [threading.Thread(target=consumer, args=(i,)) for i in range(consumers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return torch.cat(outs)


def cycles(d: int, block_n: int = 128) -> tuple[int, int]:
    """(matrix unit, special-function unit) cycles of one warp group's 64 rows and one key tile on Hopper."""
    multiply_adds_per_cycle = 2048  # dense bf16, one multiprocessor, by the data sheet
    exps_per_cycle = 16
    elements = 64 * block_n
    return 2 * elements * d // multiply_adds_per_cycle, elements // exps_per_cycle


def main() -> None:
    torch.manual_seed(0)
    q = torch.randn(32, 16, dtype=torch.float64)
    k, v = (torch.randn(100, 16, dtype=torch.float64) for _ in range(2))
    want = torch.softmax(q @ k.T / 4, -1) @ v
    for consumers, slots in ((1, 1), (2, 2), (3, 4)):
        torch.testing.assert_close(attention(q, k, v, 16, consumers, slots), want)
    print("producer and consumers compute attention, with any number of consumers and slots")

    assert cycles(128) == (1024, 512) and cycles(64) == (512, 512)
    for d in (64, 128, 256):
        matrix, special = cycles(d)
        gain = (matrix + special) / max(matrix, special)
        print(
            f"D = {d:>3}: matrix unit {matrix}, exps {special} cycles a tile; perfect overlap is {gain:.2f}x faster"
        )


if __name__ == "__main__":
    main()
