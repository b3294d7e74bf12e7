"""BLIP's pre-training step written the straightforward way, on the weights of a `blip.objectives.pretrain.Pretrain`.

This is what the fast path is held against, in numbers (tests) and in time (benchmarks/pretrain_step.py). It does what
the original release does: eager attention, images projected again for every text pass and every layer, every text
padded to a fixed length, queues copied to be concatenated, one hard negative drawn at a time, the moving average
tensor by tensor. It shares no code with `blip` beyond the modules that hold the weights.
"""

import math

import torch
import torch.nn.functional as F


def apply(layer, x):
    return F.linear(x, layer.weight, layer.bias)


def attention(q, k, v, heads, mask, dropout, training):
    def split(x):
        return x.view(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)

    q, k, v = split(q), split(k), split(v)
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores + mask
    probs = F.dropout(scores.softmax(-1), dropout, training)
    return (probs @ v).transpose(1, 2).flatten(2)


def vision(encoder, image):
    vit = encoder.vit
    x = vit.patch_embed.proj(image).flatten(2).transpose(1, 2)
    x = torch.cat([vit.cls_token.expand(len(x), -1, -1), x], dim=1) + vit.pos_embed
    for block in vit.blocks:
        q, k, v = apply(block.attn.qkv, block.norm1(x)).chunk(3, dim=-1)
        x = x + apply(block.attn.proj, attention(q, k, v, block.attn.num_heads, None, 0.0, False))
        x = x + apply(block.mlp.fc2, F.gelu(apply(block.mlp.fc1, block.norm2(x))))
    return vit.norm(x)


def text(med, ids, keep, causal=False, tokens=None):
    config, training = med.config, med.training
    length = ids.shape[1]
    allowed = keep[:, None, None, :].expand(-1, 1, length, -1)
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    mask = torch.zeros(allowed.shape).masked_fill(~allowed, -10000.0)
    x = med.norm(med.word(ids) + med.position(torch.arange(length)))
    x = F.dropout(x, config.dropout, training)
    for block in med.blocks:
        own, norm = (block.causal, block.causal_norm) if causal else (block.text, block.text_norm)
        q, k, v = apply(own.qkv, x).chunk(3, dim=-1)
        y = apply(own.out, attention(q, k, v, config.heads, mask, config.attention_dropout, training))
        x = norm(x + F.dropout(y, config.dropout, training))
        if tokens is not None:
            k, v = apply(block.cross.kv, tokens).chunk(2, dim=-1)
            y = attention(apply(block.cross.query, x), k, v, config.heads, None, config.attention_dropout, training)
            x = block.cross_norm(x + F.dropout(apply(block.cross.out, y), config.dropout, training))
        y = apply(block.down, F.gelu(apply(block.up, x)))
        x = block.ffn_norm(x + F.dropout(y, config.dropout, training))
    return x


def logits(med, states):
    return med.head_norm(F.gelu(apply(med.head_dense, states))) @ med.word.weight.T + med.head_bias


def features(towers, image, ids, keep):
    tokens = vision(towers.vision, image)
    states = text(towers.med, ids, keep)
    image = F.normalize(apply(towers.image_proj, tokens[:, 0]), dim=-1)
    return tokens, image, F.normalize(apply(towers.text_proj, states[:, 0]), dim=-1)


def draw(sim, batch):
    weights = sim[:, :batch].softmax(1) + 1e-4
    weights.fill_diagonal_(0)
    return torch.stack([torch.multinomial(row, 1)[0] for row in weights])


def losses(pretrain, image, ids, keep, alpha, negatives=None, length=30):
    """(itc, itm, lm) of a batch and the teacher's features; `negatives` is (image of text, text of image) or drawn."""
    model, teacher = pretrain.model, pretrain.teacher.towers
    config, batch = model.config.text, len(ids)
    extra = length - ids.shape[1]
    ids, keep = F.pad(ids, (0, extra), value=config.pad_id), F.pad(keep, (0, extra))
    tokens, image_student, text_student = features(model, image, ids, keep)
    with torch.no_grad():
        _, image_teacher, text_teacher = features(teacher, image, ids, keep)
        image_all = torch.cat([image_teacher, pretrain.image_queue.features.clone()])
        text_all = torch.cat([text_teacher, pretrain.text_queue.features.clone()])
        identity = torch.zeros(batch, len(image_all)).fill_diagonal_(1)
        i2t_soft = (image_teacher @ text_all.T / model.temperature).softmax(1)
        t2i_soft = (text_teacher @ image_all.T / model.temperature).softmax(1)
        i2t_target = alpha * i2t_soft + (1 - alpha) * identity
        t2i_target = alpha * t2i_soft + (1 - alpha) * identity
    i2t = image_student @ text_all.T / model.temperature
    t2i = text_student @ image_all.T / model.temperature
    i2t_loss = -(i2t.log_softmax(1) * i2t_target).sum(1).mean()
    t2i_loss = -(t2i.log_softmax(1) * t2i_target).sum(1).mean()
    itc = (i2t_loss + t2i_loss) / 2

    if negatives is None:
        with torch.no_grad():
            negatives = draw(t2i, batch), draw(i2t, batch)
    image_of_text, text_of_image = negatives
    enc = ids.clone()
    enc[:, 0] = config.enc_id
    positive = text(model.med, enc, keep, tokens=tokens)
    negative = text(
        model.med,
        torch.cat([enc, enc[text_of_image]]),
        torch.cat([keep, keep[text_of_image]]),
        tokens=torch.cat([tokens[image_of_text], tokens]),
    )
    match = apply(model.match_head, torch.cat([positive[:, 0], negative[:, 0]]))
    itm = F.cross_entropy(match, torch.cat([torch.ones(batch), torch.zeros(2 * batch)]).long())

    dec = ids.clone()
    dec[:, 0] = config.dec_id
    words = logits(model.med, text(model.med, dec, keep, causal=True, tokens=tokens))
    targets = ids.masked_fill(~keep, -100)
    lm = F.cross_entropy(words[:, :-1].reshape(-1, words.shape[-1]), targets[:, 1:].reshape(-1), label_smoothing=0.1)
    return (itc, itm, lm), (image_teacher, text_teacher)


@torch.no_grad()
def move_teacher(pretrain, momentum):
    theirs = dict(pretrain.model.named_parameters())
    for name, mine in pretrain.teacher.towers.named_parameters():
        mine.data = mine.data * momentum + theirs[name].data * (1 - momentum)


@torch.no_grad()
def push(queue, features):
    start = int(queue.next)
    queue.features[start : start + len(features)] = features
    queue.next[()] = (start + len(features)) % len(queue.features)
