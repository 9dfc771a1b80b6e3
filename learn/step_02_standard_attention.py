"""Lesson 2. Standard attention, and the matrix that nobody needs.

    S = Q K^T / sqrt(D)      (M, N)   how well query i fits key j
    P = softmax(S)           (M, N)   row by row
    O = P V                  (M, D)   a weighted mean of the values

Without the factor 1/sqrt(D) the scores of random vectors would have variance D, and softmax would pick one key and
ignore all others. Q, K, V and O have M * D or N * D elements. S and P have M * N: at 16384 tokens that is 268 million
elements, 1 GiB in fp32, for each of them, for every head. They are written to memory and read back, only to be reduced
to O. On a GPU the arithmetic of one element of S (4 D = 256 operations at D = 64) takes less time than moving its
8 bytes four times: attention written like this waits for memory.
"""

import torch

MIB = 2**20


def standard_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """q (M, D), k and v (N, D) -> (M, D)."""
    s_MN = q @ k.T * q.shape[-1] ** -0.5
    p_MN = torch.softmax(s_MN, -1)
    return p_MN @ v


def memory_mib(n: int, d: int = 64, element_bytes: int = 2) -> tuple[float, float]:
    """(Q, K, V and O in 16 bit, S and P in fp32) of one head, MiB."""
    return 4 * n * d * element_bytes / MIB, 2 * n * n * 4 / MIB


def main() -> None:
    torch.manual_seed(0)
    q, k, v = (torch.randn(16, 64, dtype=torch.float64) for _ in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(q[None], k[None], v[None])[0]
    torch.testing.assert_close(standard_attention(q, k, v), want)

    # why 1/sqrt(D): the scores of random vectors have variance D
    big_q, big_k = torch.randn(512, 64), torch.randn(512, 64)
    scores = big_q @ big_k.T
    assert 50 < scores.var() < 80
    print(f"variance of q.k: {scores.var():.1f}, after the scale: {(scores / 8).var():.2f}")

    print(f"{'tokens':>8} {'Q K V O':>10} {'S and P':>12}   MiB, one head")
    for n in (1024, 2048, 4096, 8192, 16384):
        tensors, scores_mib = memory_mib(n)
        print(f"{n:>8} {tensors:>10.1f} {scores_mib:>12.0f}")
    assert memory_mib(16384)[1] == 2048, "S and P are a GiB each"
    assert memory_mib(2048)[1] / memory_mib(1024)[1] == 4, "twice the tokens, four times the memory"


if __name__ == "__main__":
    main()
