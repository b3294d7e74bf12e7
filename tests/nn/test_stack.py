"""The stack against independent code: transformers' BERT over several segments, and masked attention written out."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel

from blip.nn import stack
from blip.nn.packing import Layout
from blip.nn.settings import TextConfig, TrainingOptions
from blip.nn.stack import Block, Cache, CrossAttention, Pass, Segment, Stack

NONE = TrainingOptions()
CONFIG = TextConfig(
    vocab_size=120, width=32, layers=4, heads=4, hidden=48, max_positions=40,
    cls_id=2, sep_id=3, dec_id=118, enc_id=119,
)  # fmt: skip
ROWS, WORDS, PATCHES, QUERIES, WIDTH = 5, 9, 6, 3, 24
LENGTHS = (9, 4, 6, 1, 7)
KEEP = torch.arange(WORDS) < torch.tensor(LENGTHS)[:, None]


@pytest.fixture(params=["packed", "padded"])
def words_at(request, monkeypatch):
    """The layout of the words, on a CPU and as on other devices, where padding stays in the grid."""
    made = Layout(ROWS, WORDS, KEEP)
    if request.param == "padded":
        made.cells, made.mask = None, KEEP[:, None, None]
    return made


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def randomised(module):
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    return module.double()


def kept(layout, packed):
    """The tokens that are no padding, row by row."""
    return layout.unpack(packed)[KEEP]


# Single stream and multiway -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bert():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=120, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, layer_norm_eps=CONFIG.norm_eps,
    )  # fmt: skip
    return randomised(BertModel(config, add_pooling_layer=False)).eval()


def like(bert, feed_forwards):
    """A stack with BERT's weights, the same in every feed-forward."""
    stack = Stack(Block(CONFIG, NONE, ["text"], feed_forwards=feed_forwards) for _ in range(4)).double()
    for block, layer in zip(stack, bert.encoder.layer, strict=True):
        theirs = layer.attention
        pairs = [(block.text.out, theirs.output.dense), (block.text_norm, theirs.output.LayerNorm)]
        for start in (f"{name}_" if name else "" for name in feed_forwards):
            pairs.append((getattr(block, f"{start}up"), layer.intermediate.dense))
            pairs.append((getattr(block, f"{start}down"), layer.output.dense))
            pairs.append((getattr(block, f"{start}ffn_norm"), layer.output.LayerNorm))
        for ours, part in pairs:
            ours.load_state_dict(part.state_dict())
        for kind in ("weight", "bias"):
            qkv = [getattr(getattr(theirs.self, name), kind) for name in ("query", "key", "value")]
            getattr(block.text.qkv, kind).data = torch.cat(qkv).detach()
    return stack


@pytest.mark.parametrize("feed_forwards", [("",), ("", "image")], ids=["single stream", "multiway"])
@torch.no_grad()
def test_words_and_patches_attend_to_each_other_as_in_bert(bert, feed_forwards, words_at):
    words, patches = torch.randn(ROWS, WORDS, 32).double(), torch.randn(ROWS, PATCHES, 32).double()
    seen = torch.cat([KEEP, torch.ones(ROWS, PATCHES, dtype=torch.bool)], 1)
    mask = torch.zeros(ROWS, 1, 1, WORDS + PATCHES).double().masked_fill(~seen[:, None, None], -1e12)
    theirs = bert.encoder(torch.cat([words, patches], 1), attention_mask=mask).last_hidden_state
    image = Segment(patches.flatten(0, 1), Layout(ROWS, PATCHES), feed_forward=feed_forwards[-1])
    ((ours, beside),) = like(bert, feed_forwards)([Pass([Segment(words_at.pack(words), words_at), image], "text")])
    close(kept(words_at, ours), theirs[:, :WORDS][KEEP])
    close(beside, theirs[:, WORDS:].flatten(0, 1))


@torch.no_grad()
def test_each_kind_of_token_has_its_own_feed_forward(bert, words_at):
    stack = like(bert, ("", "image"))
    words, patches = torch.randn(ROWS, WORDS, 32).double(), torch.randn(ROWS * PATCHES, 32).double()

    def run():
        image = Segment(patches, Layout(ROWS, PATCHES), feed_forward="image")
        ((ours, beside),) = stack([Pass([Segment(words_at.pack(words), words_at), image], "text")])
        return kept(words_at, ours), beside

    before = run()
    stack[-1].image_up.weight.data += 1
    after = run()
    assert torch.equal(before[0], after[0])
    assert not torch.allclose(before[1], after[1])


# A Q-Former's three masks, with cross-attention of the queries in every second layer ----------------------------------


@pytest.fixture(scope="module")
def qformer():
    torch.manual_seed(1)
    blocks = [
        Block(CONFIG, NONE, ["text"], CrossAttention(CONFIG, NONE, WIDTH) if i % 2 == 0 else None, ["", "query"])
        for i in range(4)
    ]
    return randomised(Stack(blocks))


@pytest.fixture(scope="module")
def given():
    g = torch.Generator().manual_seed(2)
    sizes = {"queries": (ROWS, QUERIES, 32), "words": (ROWS, WORDS, 32), "image": (ROWS, 7, WIDTH)}
    return {name: torch.randn(*size, generator=g).double() for name, size in sizes.items()}


def attend(q, k, v, heads, sees=None):
    """Of one row: (T, D) and (P, D) twice -> (T, D), head by head."""
    outs = []
    for query, key, value in zip(*(part.chunk(heads, -1) for part in (q, k, v)), strict=True):
        scores = query @ key.T / math.sqrt(query.shape[1])
        scores = scores if sees is None else scores.masked_fill(~sees, -math.inf)
        outs.append(scores.softmax(-1) @ value)
    return torch.cat(outs, -1)


def written_out(stack, image, queries, words, sees):
    """One row without padding: what of [queries | words] sees what is (Q + T, Q + T) -> states of both."""
    x = torch.cat([queries, words])
    n = len(queries)
    for block in stack:
        q, k, v = F.linear(x, block.text.qkv.weight, block.text.qkv.bias).chunk(3, -1)
        x = block.text_norm(x + block.text.out(attend(q, k, v, 4, sees)))
        query, text = x[:n], x[n:]
        if block.cross is not None:
            k, v = block.cross.kv(image).chunk(2, -1)
            query = block.cross_norm(query + block.cross.out(attend(block.cross.query(query), k, v, 4)))
        query = block.query_ffn_norm(query + block.query_down(F.gelu(block.query_up(query))))
        text = block.ffn_norm(text + block.down(F.gelu(block.up(text))))
        x = torch.cat([query, text])
    return x[:n], x[n:]


def sees_of(kind, n, length):
    """Who of n queries and so many words sees whom (BLIP-2, figure 2)."""
    sees = torch.ones(n + length, n + length, dtype=torch.bool)
    if kind != "both":
        sees[:n, n:] = False
    if kind == "apart":
        sees[n:, :n] = False
    if kind == "causal":
        sees[n:, n:].tril_()
    return sees


def query_pass(stack, given):
    context = stack.context(given["image"])
    return Segment(given["queries"].flatten(0, 1), Layout(ROWS, QUERIES), context, feed_forward="query")


def passes_of(kind, stack, given, words_at):
    """The same as passes: each mask is a construction."""
    queries, words = query_pass(stack, given), Segment(words_at.pack(given["words"]), words_at)
    if kind == "both":
        return [Pass([queries, words], "text")]
    images = Pass([queries], "text")
    if kind == "apart":
        return [images, Pass([words], "text")]
    return [images, Pass([words], "text", causal=True, after=images)]


@pytest.mark.parametrize("kind", ["apart", "both", "causal"])
def test_a_qformers_masks_equal_masked_attention_written_out(qformer, given, words_at, kind):
    segments = [segment for one in qformer(passes_of(kind, qformer, given, words_at)) for segment in one]
    ours = segments[0].view(ROWS, QUERIES, -1), kept(words_at, segments[1])
    theirs = []
    for row, length in enumerate(LENGTHS):
        image, queries, words = (given[name][row] for name in ("image", "queries", "words"))
        theirs.append(written_out(qformer, image, queries, words[:length], sees_of(kind, QUERIES, length)))
    theirs = torch.stack([q for q, _ in theirs]), torch.cat([t for _, t in theirs])
    for a, b in zip(ours, theirs, strict=True):
        close(a, b)
    parameters = list(qformer.parameters())
    grads = [torch.autograd.grad(sum(x.square().sum() for x in pair), parameters) for pair in (ours, theirs)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-7)


@torch.no_grad()
def test_passes_of_all_masks_run_side_by_side(qformer, given, words_at):
    run = [passes_of(kind, qformer, given, words_at) for kind in ("causal", "both", "apart")]
    run += [[Pass(run[2][1].segments, "text", first=True)]]
    alone = [segments for some in run for segments in qformer(some)]
    together = qformer([one for some in run for one in some])
    assert [len(segments) for segments in together] == [1, 1, 2, 1, 1, 1]
    for some, other in zip(alone, together, strict=True):
        for a, b in zip(some, other, strict=True):
            close(a, b)
    close(together[-1][0], words_at.unpack(together[-2][0])[:, 0])


@torch.no_grad()
def test_a_pass_after_one_that_has_padding_does_not_see_the_padding(qformer, given, words_at):
    first = Pass([Segment(words_at.pack(given["words"]), words_at)], "text")
    queries = Segment(given["queries"].flatten(0, 1), Layout(ROWS, QUERIES), feed_forward="query")
    states = qformer([first, Pass([queries], "text", after=first)])[1][0].view(ROWS, QUERIES, -1)
    for row, length in enumerate(LENGTHS):
        before = Pass([Segment(given["words"][row, :length], Layout(1, length))], "text")
        alone = Segment(given["queries"][row], Layout(1, QUERIES), feed_forward="query")
        close(qformer([before, Pass([alone], "text", after=before)])[1][0], states[row])


@torch.no_grad()
def test_a_cache_continues_what_a_causal_pass_reads_at_once(qformer, given):
    words, context = given["words"], qformer.context(given["image"])
    everything = Segment(words.flatten(0, 1), Layout(ROWS, WORDS), context)
    ((whole,),) = qformer([Pass([everything], "text", causal=True)])
    cache, steps = Cache(WORDS), []
    for step in range(WORDS):
        one = Segment(words[:, step], Layout(ROWS, 1), context)
        ((states,),) = qformer([Pass([one], "text", after=cache)])
        cache.filled += 1
        steps.append(states)
    close(torch.stack(steps, 1).flatten(0, 1), whole)


def test_a_pass_sees_only_what_is_there_before_it(qformer, given, words_at):
    images, words = passes_of("causal", qformer, given, words_at)
    for run in ([words, images], [words]):
        with pytest.raises(ValueError, match="only see an earlier pass of the same run"):
            qformer(run)


def test_one_segment_where_its_place_in_the_row_matters(given):
    one = Segment(given["words"].flatten(0, 1), Layout(ROWS, WORDS))
    for wrong in ({"causal": True}, {"first": True}):
        with pytest.raises(ValueError, match="one segment"):
            Pass([one, one], "text", **wrong)


@pytest.mark.parametrize("first", [False, True])
def test_passes_of_one_kind_attend_as_one_on_a_gpu(qformer, given, monkeypatch, first):
    """One with padding and one without, over different images; a causal pass and a shorter one stay by themselves."""
    padded = Layout(ROWS, WORDS, KEEP)
    padded.cells, padded.mask = None, KEEP[:, None, None]
    states, images = given["words"].flatten(0, 1), qformer.context(given["image"])
    other, words = images[torch.tensor([4, 0, 0, 1, 2])], Layout(ROWS, WORDS)
    short = Segment(given["words"][:, :4].flatten(0, 1), Layout(ROWS, 4), images)
    run = [
        Pass([Segment(states, padded, images)], "text", first=first),
        Pass([Segment(states * 2, words, other)], "text", first=first),
        Pass([Segment(states * 3, words, images)], "text", causal=True),
        Pass([short], "text", first=first),
    ]
    rows = []
    attend = stack.attention
    monkeypatch.setattr(stack, "attention", lambda query, *rest: (rows.append(len(query)), attend(query, *rest))[1])
    apart = qformer(run)
    assert rows == [ROWS] * 4 * CONFIG.layers
    rows.clear()
    monkeypatch.setattr(stack, "merges", lambda device: True)
    together = qformer(run)
    assert rows == [2 * ROWS, ROWS, ROWS] * CONFIG.layers
    real = slice(None) if first else KEEP.flatten()
    for (a,), (b,), tokens in zip(apart, together, [real, *[slice(None)] * 3], strict=True):
        close(a[tokens], b[tokens])
