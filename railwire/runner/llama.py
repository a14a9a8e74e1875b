"""A Llama over a paged KV cache, computed in tiles of fixed shape: results do not depend on how the work was cut.

Floating-point sums depend on the order of their terms, and matrix kernels choose that order by shape: the same token
gives slightly different K/V as one row of 600 and as one row of 1, and a greedy argmax now and then tips over. So no
matrix product here has a shape that depends on the chunk or on the batch:

* Prefill runs in tiles of ``PREFILL_TILE`` positions that begin at multiples of it. A chunk that begins or ends inside
  a tile computes the whole tile and drops the other rows. A token's arithmetic is then a function of its position and
  of what it attends to, not of chunk borders or prefix hits.
* Decode runs in tiles of ``DECODE_TILE`` rows, padded; attention is done sequence by sequence.

What holds: with the same weights, dtype, thread count, torch build and kind of CPU, prefill gives bitwise the same K/V
however it is chunked and whatever prefix was found; decode gives bitwise the same logits whatever else is in the
batch, as long as a matrix kernel treats every row of a tile alike (the tests check it on the machine they run on). The
cut into blocks, ranks and stages changes no arithmetic, except that more tensor ranks than KV heads change the shape of
attention. K/V of a token from a prefill and from a decode step are close, not equal: so the last prompt token is
decoded in the single process too (``generate``), and only prefilled blocks should be remembered as a prefix.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from railwire.runner.base import DecodeItem, OnLayer
from railwire.runner.cache import PagedCache
from railwire.runner.config import ModelConfig

PREFILL_TILE = 64
DECODE_TILE = 8


class Llama:
    """RMSNorm, rotary embeddings (half-split form), grouped-query attention, SwiGLU, tied embeddings.

    Args:
        weights: the tensors of ``config.weight_shapes()``; "embed" and the norms in float32, the matrices in ``dtype``.
        dtype: of the layers' matrix products. All else is float32 whatever it is: the residual stream, norms, rotation,
            attention (torch's bfloat16 attention of one row takes six times as long) and the logits, where bfloat16
            would make ties of the best tokens.

    Raises:
        ValueError: a weight is missing or has another shape or dtype.
    """

    def __init__(self, config: ModelConfig, weights: Mapping[str, torch.Tensor], *, dtype: torch.dtype) -> None:
        for name, shape in config.weight_shapes().items():
            tensor = weights.get(name)
            wanted = torch.float32 if len(shape) == 1 or name == "embed" else dtype
            if tensor is None or tuple(tensor.shape) != shape or tensor.dtype != wanted:
                found = "missing" if tensor is None else f"{tensor.dtype} {tuple(tensor.shape)}"
                raise ValueError(f"weight {name!r} of {config.name} is {found}; wanted: {wanted} {shape}")
        self.config = config
        self.dtype = dtype
        self._weights = dict(weights)
        half = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
        self._frequencies = 1.0 / config.rope_base**half
        self._scale = config.head_dim**-0.5
        self._mask = torch.empty(0, 0)

    @torch.inference_mode()
    def prefill(
        self,
        cache: PagedCache,
        tokens: Sequence[int],
        table: Sequence[int],
        start: int,
        end: int,
        on_layer: OnLayer | None = None,
    ) -> None:
        """Writes K/V of ``tokens[start:end]``.

        ``on_layer(layer, end)`` comes straight after each layer's are written, before its attention.
        """
        if start == end:
            return
        begin = start - start % PREFILL_TILE
        tiles = range(begin, end, PREFILL_TILE)
        padded_end = tiles[-1] + PREFILL_TILE
        # Rows before start and after end only fill their tiles; token 0 does as well as any.
        ids = [*([0] * (start - begin)), *tokens[start:end], *([0] * (padded_end - end))]
        hidden = [
            F.embedding(torch.tensor(ids[tile - begin : tile - begin + PREFILL_TILE]), self._weights["embed"])
            for tile in tiles
        ]
        rotations = [self._rotation(torch.arange(tile, tile + PREFILL_TILE)) for tile in tiles]
        positions = torch.arange(start, end)
        blocks = torch.tensor(table, dtype=torch.int64)[positions // cache.block_tokens]
        offsets = positions % cache.block_tokens
        index = cache.index([table], [end], [padded_end])
        last = self.config.layers - 1
        for layer in range(self.config.layers):
            qkv = [self._qkv(layer, x, rotation) for x, rotation in zip(hidden, rotations, strict=True)]
            rows = slice(start - begin, end - begin)
            k, v = torch.cat([k for _, k, _ in qkv])[rows], torch.cat([v for _, _, v in qkv])[rows]
            cache.write(layer, blocks, offsets, k, v)
            if on_layer is not None:
                on_layer(layer, end)
            if layer == last:
                return  # nobody wants the hidden state: the decoder runs the last prompt token
            kv = [cache.read(layer, rank, index, [end])[0].float() for rank in range(cache.tp_size)]
            for i, tile in enumerate(tiles):
                held = tile + PREFILL_TILE
                attended = self._attend(cache, qkv[i][0], [part[:, :, :held] for part in kv], self._causal_mask(tile))
                hidden[i] = self._finish(layer, hidden[i], attended)

    @torch.inference_mode()
    def decode(self, cache: PagedCache, batch: Sequence[DecodeItem]) -> torch.Tensor:
        """One token of each sequence; logits, float32 [len(batch), vocab]."""
        if not batch:
            return torch.empty(0, self.config.vocab)
        tiles = [batch[i : i + DECODE_TILE] for i in range(0, len(batch), DECODE_TILE)]
        hidden, rotations = [], []
        for items in tiles:
            padding = [0] * (DECODE_TILE - len(items))
            hidden.append(F.embedding(torch.tensor([item.token for item in items] + padding), self._weights["embed"]))
            rotations.append(self._rotation(torch.tensor([item.position for item in items] + padding)))
        positions = torch.tensor([item.position for item in batch])
        blocks = torch.tensor([item.block_table[item.position // cache.block_tokens] for item in batch])
        offsets = positions % cache.block_tokens
        lengths = [item.position + 1 for item in batch]
        index = cache.index([item.block_table for item in batch], lengths)
        for layer in range(self.config.layers):
            qkv = [self._qkv(layer, x, rotation) for x, rotation in zip(hidden, rotations, strict=True)]
            k, v = torch.cat([k for _, k, _ in qkv])[: len(batch)], torch.cat([v for _, _, v in qkv])[: len(batch)]
            cache.write(layer, blocks, offsets, k, v)
            kv = [[part.float() for part in cache.read(layer, rank, index, lengths)] for rank in range(cache.tp_size)]
            for i, items in enumerate(tiles):
                attended = torch.zeros(DECODE_TILE, self.config.q_heads * self.config.head_dim, dtype=self.dtype)
                for row in range(len(items)):
                    held = [parts[i * DECODE_TILE + row] for parts in kv]
                    attended[row] = self._attend(cache, qkv[i][0][row : row + 1], held, None)[0]
                hidden[i] = self._finish(layer, hidden[i], attended)
        logits = [F.linear(self._norm(x, "norm"), self._weights["embed"]) for x in hidden]
        return torch.cat(logits)[: len(batch)]

    def _qkv(
        self, layer: int, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Rotated q [rows, q_heads, head_dim] and k, v [rows, kv_heads, head_dim], all float32."""
        config = self.config
        normed = self._norm(x, f"{layer}.attn_norm").to(self.dtype)
        heads = F.linear(normed, self._weights[f"{layer}.qkv"]).view(len(x), -1, config.head_dim)
        cos, sin = rotation
        rotated = config.q_heads + config.kv_heads
        first, second = heads[:, :rotated].float().chunk(2, dim=-1)
        turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
        return turned[:, : config.q_heads], turned[:, config.q_heads :], heads[:, rotated:].float()

    def _attend(
        self, cache: PagedCache, q: torch.Tensor, kv: Sequence[torch.Tensor], mask: torch.Tensor | None
    ) -> torch.Tensor:
        """Attention of q [rows, q_heads, head_dim] over K/V [2, heads, tokens, head_dim] of each tensor rank:
        [rows, q_heads * head_dim]."""
        rows, dim = q.shape[0], self.config.head_dim
        outputs = []
        for shard, part in zip(cache.shards, kv, strict=False):  # a stage's ranks are cut like the first stage's
            _, heads, tokens, _ = part.shape
            queries = q[:, shard.first_query : shard.end_query]
            group = queries.shape[1] // heads
            # [KV head, query head of its group, row, dim]; the KV head is shared by expansion, without a copy
            shaped = queries.view(rows, heads, group, dim).permute(1, 2, 0, 3)
            k, v = part.unsqueeze(2).expand(2, heads, group, tokens, dim)
            output = F.scaled_dot_product_attention(shaped, k, v, attn_mask=mask, scale=self._scale)
            outputs.append(output.permute(2, 0, 1, 3).reshape(rows, heads * group * dim))
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)).to(self.dtype)

    def _finish(self, layer: int, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """What follows attention: its output projection and the MLP, added to the residual stream."""
        x = x + F.linear(attended, self._weights[f"{layer}.o"]).float()
        normed = self._norm(x, f"{layer}.ffn_norm").to(self.dtype)
        gate, up = F.linear(normed, self._weights[f"{layer}.gate_up"]).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self._weights[f"{layer}.down"]).float()

    def _norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        scale = torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.config.norm_eps)
        return x * scale * self._weights[name]

    def _rotation(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [rows, 1, head_dim / 2]; the angles in float64, for positions go into the thousands."""
        angles = torch.outer(positions.to(torch.float64), self._frequencies).unsqueeze(1)
        return angles.cos().float(), angles.sin().float()

    def _causal_mask(self, tile: int) -> torch.Tensor:
        """[PREFILL_TILE, tile + PREFILL_TILE]: 0 where row r of the tile may look (token <= tile + r), else -inf.

        A view of one mask, which grows as prompts do.
        """
        reach = self._mask.shape[1] - PREFILL_TILE
        if tile > reach:
            reach = max(tile, 2 * reach, 16 * PREFILL_TILE)
            mask = torch.full((PREFILL_TILE, reach + PREFILL_TILE), float("-inf"))
            self._mask = mask.triu(reach + 1)
        return self._mask[:, reach - tile :]
