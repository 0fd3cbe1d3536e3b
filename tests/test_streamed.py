"""A model whose weights visit layer by layer gives bit for bit what the plain one gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from torch import Tensor

import tiny
from pahq.engine import reference
from pahq.method.acdc import Acdc, AcdcOptions
from pahq.precision.schedule import STREAMS, make_scheduler
from pahq.precision.streamed import Slabs, StreamedBlocks, StreamedTransformer, streamed
from random_models import Case, cases, drawn


def layer_bytes(model: StreamedTransformer) -> int:
    cfg = model.config
    attention = 2 * (cfg.n_heads + cfg.n_kv_heads) * cfg.d_model * cfg.d_head
    return model.dtype.itemsize * (attention + (3 if cfg.gated else 2) * cfg.d_model * cfg.d_mlp)


@drawn(60)
@given(case=cases())
def test_passes_agree_bit_for_bit_in_every_architecture(case: Case) -> None:
    plain, tokens = case.model, case.prompts.clean
    for threads in (False, True):
        with make_scheduler("cpu", threads=threads) as scheduler:
            model = streamed(plain, "cpu", scheduler, copy=True)
            assert torch.equal(model.forward(tokens), plain.forward(tokens))
            ours = reference.run(model, tokens, case.graph.split_pos)
            theirs = reference.run(plain, tokens, case.graph.split_pos)
            for name, value in vars(theirs).items():
                for one, other in zip(_listed(getattr(ours, name)), _listed(value), strict=True):
                    assert torch.equal(one, other), name
            blocks = model.blocks
            assert isinstance(blocks, StreamedBlocks)
            assert 0 < blocks.loader.device_bytes <= 2 * layer_bytes(model)


def _listed(value: Tensor | list[Tensor] | None) -> list[Tensor]:
    return [] if value is None else value if isinstance(value, list) else [value]


@pytest.mark.parametrize("streams", [STREAMS, ("load",), ("low", "high"), ()])
@pytest.mark.parametrize("threads", [False, True])
def test_a_whole_sweep_agrees_bit_for_bit(threads: bool, streams: tuple[str, ...]) -> None:
    plain = tiny.transformer(layers=3)
    prompts = tiny.RandomTask().prompts(plain, 4)
    options = AcdcOptions(0.01)
    expected = Acdc(plain, prompts, options).run()
    with make_scheduler("cpu", streams, threads) as scheduler:
        model = streamed(plain, "cpu", scheduler, copy=True)
        found = Acdc(model, prompts, options).run()
        assert model.device_bytes <= 2 * layer_bytes(model) + 2 * model.W_U.nbytes
    assert np.array_equal(found.mask, expected.mask)
    assert np.array_equal(found.effects, expected.effects, equal_nan=True)
    assert found.metric == expected.metric
    assert 0 < found.mask.sum() < found.graph.edges.sum()


def test_a_layer_is_copied_once_a_visit_and_the_next_one_ahead() -> None:
    plain = tiny.transformer(layers=4)
    with make_scheduler("cpu") as scheduler:
        blocks = StreamedBlocks(plain.blocks, torch.device("cpu"), scheduler, copy=True)
        copied: list[int] = []
        source = blocks.loader.source

        def watched(layer: int) -> tuple[Tensor, ...]:
            copied.append(layer)
            return source(layer)

        blocks.loader.source = watched
        for layer in range(4):
            block = blocks[layer]
            assert copied == [*range(layer + 1), (layer + 1) % 4]
            assert blocks[layer] is block  # at once
        copied.clear()
        _ = blocks[0]
        assert copied == [1]  # 0 itself was fetched ahead
        copied.clear()
        for layer in (3, 1, 3, 1, -1):  # two layers in turn stay where they are
            assert torch.equal(blocks[layer].attn.W_Q, plain.blocks[layer].attn.W_Q)
        assert copied == [3]
        assert len(blocks) == 4
        assert len(list(blocks)) == 4
        with pytest.raises(IndexError):
            _ = blocks[4]
        with pytest.raises(AssertionError, match="a slice would need several layers"):
            _ = blocks[:2]


@pytest.mark.parametrize(("slots", "kept"), [(2, 1), (3, 2), (4, 3)])
def test_how_long_a_block_is_valid(slots: int, kept: int) -> None:
    plain = tiny.transformer(layers=6)
    with make_scheduler("cpu") as scheduler:
        blocks = StreamedBlocks(plain.blocks, torch.device("cpu"), scheduler, copy=True, slots=slots)
        seen = []
        for layer in range(6):
            seen.append(blocks[layer].attn.W_O)
            for back in range(min(kept, len(seen))):
                assert torch.equal(seen[layer - back], plain.blocks[layer - back].attn.W_O)


@pytest.mark.parametrize(("columns", "pieces"), [(1, 40), (3, 14), (13, 4), (40, 1), (99, 1)])
def test_the_unembedding_comes_in_pieces(columns: int, pieces: int) -> None:
    plain = tiny.transformer(layers=1).to(dtype=torch.float64)
    x = torch.randn(3, 2, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with make_scheduler("cpu", threads=True) as scheduler:
        model = streamed(plain, "cpu", scheduler, copy=True, slab_bytes=columns * 32 * 8)
        for _ in range(2):
            torch.testing.assert_close(model.unembed(x), plain.unembed(x), rtol=1e-12, atol=1e-12)
        found = [(part, slab.clone()) for part, slab in model.slabs]
        assert len(found) == pieces
        assert torch.equal(torch.cat([slab for _, slab in found], 1), plain.W_U)
        assert all(torch.equal(slab, plain.W_U[:, part]) for part, slab in found)
        assert model.slabs.loader.device_bytes == min(pieces, 2) * model.slabs.width * 32 * 8
        assert model.slabs.width <= columns


def test_pieces_left_half_way_free_their_buffer() -> None:
    with make_scheduler("cpu") as scheduler:
        slabs = Slabs(torch.randn(4, 6), torch.device("cpu"), scheduler, copy=True, slab_bytes=4 * 4 * 2)
        for _ in range(4):
            for part, _slab in slabs:
                if part.start:
                    break
        assert len(list(slabs)) == 3


def test_on_a_cpu_nothing_is_copied_by_default() -> None:
    plain = tiny.transformer(layers=2)
    with make_scheduler("cpu") as scheduler:
        model = streamed(plain, "cpu", scheduler)
        assert model.blocks[1].attn.W_Q is plain.blocks[1].attn.W_Q
        assert [slab.data_ptr() for _, slab in model.slabs] == [plain.W_U.data_ptr()]
        assert torch.equal(model.forward(torch.arange(6)[None]), plain.forward(torch.arange(6)[None]))
        assert model.device_bytes == 0
        assert model.to(dtype=torch.float64).dtype == torch.float64
        with pytest.raises(AssertionError, match="the scheduler is for cpu, not for cuda"):
            streamed(plain, "cuda", scheduler)
