"""The page pool and the cache manager: pages come back, a full cache says so, sequences keep their keys."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn.errors import ArgumentValueError, FlashAttnError
from flash_attn.kvcache.cache_manager import CacheManager
from flash_attn.kvcache.kv_attention import _flash_attn_with_kvcache
from flash_attn.kvcache.paging import CacheFullError, PagePool


def dense(q, k, v):
    """Causal attention of one sequence in fp64: q (M, H, D), k and v (N, Hk, D)."""
    k, v = (x.double().repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    s = torch.einsum("mhd,nhd->hmn", q.double(), k) * q.shape[-1] ** -0.5
    M, N = s.shape[1:]
    s = s.masked_fill(torch.arange(N)[None] > torch.arange(M)[:, None] + N - M, -torch.inf)
    return torch.einsum("hmn,nhd->mhd", s.softmax(-1), v)


def manager(pages=8, page_size=4, **options):
    return CacheManager(pages, page_size, kv_heads=2, head_dim=16, dtype=torch.float32, **options)


class TestPool:
    def test_pages_are_distinct_and_come_back(self):
        pool = PagePool(5)
        a, b = pool.take(2), pool.take(3)
        assert sorted(a + b) == list(range(5))
        pool.give_back(a)
        assert pool.free == 2
        assert set(pool.take(2)) == set(a)

    def test_full(self):
        pool = PagePool(3)
        pool.take(2)
        with pytest.raises(CacheFullError, match="2 more pages needed, 1 of 3 are free"):
            pool.take(2)
        assert pool.free == 1

    def test_a_page_cannot_be_freed_twice(self):
        pool = PagePool(3)
        (page,) = pool.take(1)
        pool.give_back([page])
        with pytest.raises(FlashAttnError, match=f"page {page} is not in use"):
            pool.give_back([page])

    @given(st.lists(st.integers(0, 4), max_size=30))
    @settings(max_examples=50, deadline=None)
    def test_no_page_is_lost_or_shared(self, takes):
        pool, held = PagePool(10), []
        for count in takes:
            if count <= pool.free:
                held.append(pool.take(count))
            elif held:
                pool.give_back(held.pop(0))
            owned = [p for pages in held for p in pages]
            assert len(set(owned)) == len(owned)
            assert len(owned) + pool.free == 10


class TestManager:
    @pytest.mark.parametrize("page_size", [1, 3, 16])
    def test_prompt_then_tokens(self, page_size):
        torch.manual_seed(0)
        cache = manager(pages=64, page_size=page_size)
        for x in (cache.k_cache, cache.v_cache):
            x.fill_(torch.nan)
        ids = [cache.add(), cache.add()]
        keys, values = [], []
        for new in (5, 1, 1, 4):
            q, k, v = torch.randn(2, new, 4, 16), torch.randn(2, new, 2, 16), torch.randn(2, new, 2, 16)
            keys.append(k)
            values.append(v)
            out = cache.attend(q, k, v, ids, causal=True)
            for b in range(2):
                want = dense(q[b], torch.cat(keys, 1)[b], torch.cat(values, 1)[b])
                assert (out[b] - want).abs().max() < 1e-5
        assert [cache.length(s) for s in ids] == [11, 11]
        assert cache.pool.free == 64 - 2 * -(-11 // page_size)

    def test_growth_keeps_the_keys(self):
        cache = manager(pages=1, max_pages=5)
        s, (k, v) = cache.add(), torch.randn(2, 1, 17, 2, 16)
        cache.attend(torch.randn(1, 3, 2, 16), k[:, :3], v[:, :3], [s], causal=True)
        q = torch.randn(1, 14, 2, 16)
        out = cache.attend(q, k[:, 3:], v[:, 3:], [s], causal=True)
        assert (out[0] - dense(q[0], k[0], v[0])).abs().max() < 1e-5
        assert cache.k_cache.shape[0] == cache.pool.pages == 5

    def test_full(self):
        cache = manager(pages=2, max_pages=3)
        a, b = cache.add(), cache.add()
        cache.reserve([a], 8)
        with pytest.raises(CacheFullError, match="2 more pages needed, 0 of 2 are free and it may grow to 3"):
            cache.attend(torch.zeros(1, 5, 2, 16), *torch.zeros(2, 1, 5, 2, 16), [b])
        assert cache.length(b) == 0
        cache.free(a)
        cache.attend(torch.zeros(1, 5, 2, 16), *torch.zeros(2, 1, 5, 2, 16), [b])
        assert cache.length(b) == 5

    def test_truncate_frees_whole_pages(self):
        cache = manager()
        s = cache.add()
        cache.attend(torch.zeros(1, 1, 2, 16), *torch.zeros(2, 1, 11, 2, 16), [s])
        cache.truncate(s, 5)
        assert cache.length(s) == 5
        assert cache.pool.free == 6
        assert cache.block_table([s]).shape == (1, 2)

    def test_bad_ids(self):
        cache = manager()
        s = cache.add()
        with pytest.raises(ArgumentValueError, match="distinct"):
            cache.reserve([s, s], 1)
        cache.free(s)
        with pytest.raises(ArgumentValueError, match="no sequence 1"):
            cache.cache_seqlens([s])
        with pytest.raises(ArgumentValueError, match="page_size must be at least 1, got 0"):
            manager(page_size=0)


def test_the_name_of_the_plan():
    import flash_attn

    assert _flash_attn_with_kvcache is flash_attn.flash_attn_with_kvcache
