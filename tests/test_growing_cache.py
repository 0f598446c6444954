"""Growing caches against transformers' own: the same keys and values, and none copied while there is room."""

import gc
import weakref

import pytest
import torch
from flow_finetune.growing_cache import grow_in_place
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer


def _states(generator: torch.Generator, rows: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.randn(rows, 2, tokens, 4, generator=generator) for _ in range(2))


def _cache(kind, *args) -> DynamicCache:
    cache = DynamicCache()
    cache.layers.append(kind(*args))
    return cache


@pytest.mark.parametrize("kind", [(DynamicLayer,), (DynamicSlidingWindowLayer, 7), (DynamicSlidingWindowLayer, 300)])
def test_what_transformers_keeps(kind):
    generator = torch.Generator().manual_seed(0)
    expected, found = _cache(*kind), _cache(*kind)
    prompts = _states(generator, 5, 9)
    for cache in (expected, found):
        cache.update(*prompts, 0)
    grow_in_place(found)
    rows = 5
    # One token at a time past any room there is, a few at once, and other rows in between.
    for step in range(250):
        if step % 60 == 59:
            chosen = torch.randint(rows, (4,), generator=generator)
            rows = len(chosen)
            for cache in (expected, found):
                cache.reorder_cache(chosen)
        new = _states(generator, rows, 1 if step % 50 else 3)
        assert found.get_mask_sizes(1, 0) == expected.get_mask_sizes(1, 0)
        for a, b in zip(found.update(*new, 0), expected.update(*new, 0), strict=True):
            assert torch.equal(a, b)
        assert torch.equal(found.layers[0].keys, expected.layers[0].keys)
        assert torch.equal(found.layers[0].values, expected.layers[0].values)
        assert found.get_seq_length() == expected.get_seq_length()


def test_nothing_is_copied_while_there_is_room():
    generator = torch.Generator().manual_seed(0)
    cache = _cache(DynamicLayer)
    cache.update(*_states(generator, 2, 40), 0)
    grow_in_place(cache)
    keys, values = cache.update(*_states(generator, 2, 1), 0)
    for _ in range(63):
        later_keys, later_values = cache.update(*_states(generator, 2, 1), 0)
        assert later_keys.data_ptr() == keys.data_ptr()
        assert later_values.data_ptr() == values.data_ptr()


def test_layers_of_other_kinds_stay():
    class Own(DynamicLayer):
        pass

    cache = _cache(Own)
    cache.layers += [DynamicLayer(), DynamicSlidingWindowLayer(7)]
    cache.update(*_states(torch.Generator(), 2, 4), 0)
    cache.layers[2].activate_past_recording()
    cache.update(*_states(torch.Generator(), 2, 4), 2)
    before = list(cache.layers)
    grow_in_place(cache)
    # Of a class of someone else's, empty, and one that is to be cut off again.
    assert all(a is b for a, b in zip(cache.layers, before, strict=True))
    grow_in_place(object())  # a cache of another make


@pytest.mark.parametrize("kind", [(DynamicLayer,), (DynamicSlidingWindowLayer, 300)])
def test_the_memory_of_rows_that_are_left_out_goes(kind):
    generator = torch.Generator().manual_seed(0)
    cache = _cache(*kind)
    cache.update(*_states(generator, 4, 40), 0)
    grow_in_place(cache)
    keys, _ = cache.update(*_states(generator, 4, 1), 0)
    memory = weakref.ref(keys.untyped_storage())
    del keys
    assert memory() is not None
    cache.reorder_cache(torch.tensor([0]))
    gc.collect()
    assert memory() is None
