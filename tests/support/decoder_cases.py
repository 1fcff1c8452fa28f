"""Small decoders, prompts of given spans for them, and one packed prefill: what several decoder tests share."""

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from illava.decoder.decode import StepInputs
from illava.decoder.decoder import Decoder
from illava.decoder.kv_cache import PagedCache
from illava.decoder.prefill import prefill
from illava.engine.prompt import Prompt, pack
from illava.plan import EMPTY_PLAN, ReductionPlan, ReductionStep
from illava.visual_tokens import TokenSpan

TEXT = TokenSpan(3)


def config(**changes):
    base = dict(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    return Qwen2Config(**{**base, **changes})


def make_model():
    """A small Qwen2 whose attention is far from flat, so that positions, sizes and scales matter."""
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config()).eval()
    with torch.no_grad():
        for value in model.parameters():
            if value.dim() == 2:
                value.normal_(0.0, 1.6 / value.shape[1] ** 0.5)
    return model


def make_prompt(token_spans, *, seed=0, width=32):
    generator = torch.Generator().manual_seed(seed)
    coords = []
    for span in token_spans:
        coords += [[span.mm_index, span.frame, 0, n] if span.mm_index >= 0 else [-1] * 4 for n in range(span.length)]
    length = sum(span.length for span in token_spans)
    return Prompt(
        torch.randn(length, width, generator=generator),
        torch.arange(length)[None],
        torch.tensor(coords),
        torch.rand(length, generator=generator),
        tuple(token_spans),
        torch.tensor([length]),
    )


def video_spans(num_frames=3, per_frame=4):
    frames = [TokenSpan(per_frame, 0, 1, frame) for frame in range(num_frames)]
    return (TEXT, *frames, TokenSpan(1, 0, 1, -1), TokenSpan(5))


def run_prefill(decoder, prompts, plan=EMPTY_PLAN, *, block_size=4, **options):
    cache = PagedCache(
        num_layers=decoder.num_layers, num_kv_heads=decoder.num_kv_heads, head_dim=decoder.head_dim,
        num_blocks=400, block_size=block_size, dtype=torch.float32, device=torch.device("cpu"),
    )  # fmt: skip
    for row, prompt in enumerate(prompts):
        cache.admit(row, [prompt.num_tokens + 8] * decoder.num_layers)
    zeros = [[0] * decoder.num_layers] * len(prompts)
    blocks = cache.batch(range(len(prompts)), zeros)
    done = prefill(decoder, pack(prompts), plan, cache, blocks, seeds=[7] * len(prompts), **options)
    return done, cache


def plan_of(*steps):
    made = [ReductionStep.model_construct(stage=s, layers=layers, reducer=reducer) for s, layers, reducer in steps]
    return ReductionPlan.model_construct(layout="geometric", steps=tuple(made))


def make_decoder(dtype=torch.float32):
    """A decoder of two layers and its word embeddings."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=200,
    )  # fmt: skip
    model = Qwen2ForCausalLM(config).eval().to(dtype)
    return Decoder(model.model, model.lm_head), model.get_input_embeddings()


def composition(lengths, dtype=torch.float32):
    """Requests that hold ``lengths`` tokens, half as many in the second layer: the cache and a step's inputs."""
    device = torch.device("cpu")
    cache = PagedCache(
        num_layers=2, num_kv_heads=1, head_dim=16, num_blocks=80, block_size=8, dtype=dtype, device=device
    )
    draw = torch.Generator().manual_seed(0)
    for pool in (cache.k_pool_PSGd, cache.v_pool_PSGd):
        pool.copy_(torch.randn(pool.shape, generator=draw))
    held = [(n, -(-n // 2)) for n in lengths]
    for row, counts in enumerate(held):
        cache.admit(row, [n + 4 for n in counts])
    blocks = cache.batch(range(len(lengths)), held)
    return cache, StepInputs(blocks, torch.tensor([lengths]), torch.arange(len(lengths)) + 7)
