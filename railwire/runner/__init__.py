"""Model runners: paged KV cache, prefill, decode. Importing this imports no torch.

runner = create("reference", model="smollm2", num_blocks=512)
pool = BlockPool(runner.num_blocks, runner.block_tokens)
print(runner.tokenizer.decode(generate(runner, pool, runner.tokenizer.encode("The capital of France is"), 20)))
"""

from railwire.runner.base import DecodeItem, Detokenizer, OnLayer, Runner, Tokenizer, create, greedy, names, register
from railwire.runner.blocks import BlockPool, Hit, OutOfBlocks, block_hashes
from railwire.runner.generate import generate

__all__ = [
    "BlockPool",
    "DecodeItem",
    "Detokenizer",
    "Hit",
    "OnLayer",
    "OutOfBlocks",
    "Runner",
    "Tokenizer",
    "block_hashes",
    "create",
    "generate",
    "greedy",
    "names",
    "register",
]
