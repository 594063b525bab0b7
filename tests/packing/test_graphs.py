"""What is replayed for a padded batch; on a CPU the same calls are made without a graph."""

from __future__ import annotations

import pytest
import torch
from padded import EXACT, LENGTHS, ragged, states

from families import TINY
from leanformers.packing import graphs, pack
from leanformers.packing.graphs import PaddedGraphs, round_up


def replays(packed):
    packer = packed.packer
    return PaddedGraphs(lambda held, i: packer._row(packed, held, i), lambda row, i: packer._run(packed, row, i))


def check(model, replayed, lengths, width, seed=0, mask_of=torch.Tensor.long):
    batch = ragged(model, lengths, width, seed=seed)
    want, mask = states(model, batch), batch.pop("attention_mask").bool()
    index, output = replayed(batch, mask_of(mask))
    with torch.no_grad():
        found = index.unpack(output["last_hidden_state"])[:, :width]
    torch.testing.assert_close(found[mask], want[mask], **EXACT)
    assert not found[~mask].any()


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_one_batch_after_another(family):
    model = TINY[family](head="base")
    replayed = replays(pack(model))
    for seed, (lengths, width) in enumerate(
        [(LENGTHS, 9), (LENGTHS, 12), ((1, 1, 2, 1, 1), 5), ((9, 7), 9), ((12, 0, 3), 12), (LENGTHS, 9)]
    ):
        check(model, replayed, lengths, width, seed)
        check(model, replayed, lengths, width, seed + 10, torch.Tensor.bool)
    assert len(replayed._packings._made) == 3 == len(replayed._passes._made)  # by the number of rows


def test_inputs_that_are_given_are_packed():
    model = TINY["bert"](head="base")
    replayed = replays(pack(model))
    batch = ragged(model)
    mask = batch.pop("attention_mask")
    embedded = model.get_input_embeddings()(batch["input_ids"]).detach()
    types, positions = torch.randint(0, 2, mask.shape), torch.arange(9).flip(0)[None]
    for given in (
        {**batch, "token_type_ids": types},
        {**batch, "position_ids": positions},
        {"inputs_embeds": embedded},
    ):
        index, output = replayed(given, mask)
        with torch.no_grad():
            found = index.unpack(output["last_hidden_state"])[:, :9][mask.bool()]
        torch.testing.assert_close(found, states(model, {**given, "attention_mask": mask})[mask.bool()], **EXACT)


def test_none_and_too_many_tokens_are_not_replayed(monkeypatch):
    model = TINY["bert"](head="base")
    replayed = replays(pack(model))
    batch = ragged(model)
    mask = batch.pop("attention_mask")
    assert replayed(batch, mask * 0) is None
    monkeypatch.setattr(graphs, "MOST_TOKENS", 20)
    assert replays(pack(model))(batch, mask) is None


def test_the_oldest_make_room(monkeypatch):
    monkeypatch.setattr(graphs, "MOST_GRAPHS", 2)
    model = TINY["bert"](head="base")
    replayed = replays(pack(model))
    for rows in (1, 2, 3, 2, 1, 1, 3):
        check(model, replayed, (9,) * rows, 9, rows)
    assert len(replayed._packings._made) == len(replayed._passes._made) == 2


def test_sizes_waste_little():
    for count in (1, 63, 64, 65, 1000, 1458, 4202, 19223, 32768):
        for parts in (8, 32):
            size = round_up(count, parts)
            assert count <= size < max(count * (parts + 1) / parts, count + 64) and round_up(size, parts) == size
    assert round_up(0) == round_up(0, 8) == 64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs are replayed on a GPU")
@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert", "electra", "mpnet"])
def test_on_a_gpu_masks_of_either_side_are_counted(family, monkeypatch):
    model = TINY[family](head="base", num_attention_heads=2).cuda()  # heads of 16, which the kernel takes
    replayed = replays(pack(model, graphs=True))
    plans = [(LENGTHS, 9), ((9, 7), 9), ((3, 0, 12, 1, 9), 12), ((1, 1, 2, 1, 1), 5), ((60, 58, 2), 60), (LENGTHS, 9)]
    for turn in range(24):
        lengths, width = plans[turn % len(plans)]
        monkeypatch.setattr(graphs, "GLANCES", turn % 2 * 1000)  # or no glance, and so the wait for all of it
        batch = {name: part.cuda() for name, part in ragged(model, lengths, width, seed=turn).items()}
        mask = batch.pop("attention_mask")
        on_cpu = turn % 5 == 4
        index, output = replayed(batch, mask.cpu() if on_cpu else mask)
        assert index.tokens == sum(lengths) and index.ranks is not None
        found = index.unpack(output["last_hidden_state"], width)
        want = states(model, {**batch, "attention_mask": mask})
        torch.testing.assert_close(found[mask.bool()], want[mask.bool()], rtol=1e-3, atol=1e-3)
        assert found.shape == want.shape and not found[~mask.bool()].any()
