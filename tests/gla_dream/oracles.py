"""What GLADream is compared with: written from the formulas, one token after the other, in float64."""

import torch

# Bounds of the log-decay of a step.
DECAYS = {"near 0": (-1e-4, 0.0), "ordinary": (-0.3, -1e-3), "near the clamp": (-1.2, -1.1)}
LENGTHS = (1, 31, 32, 33, 64, 257)
# Norm of the difference over norm of the expected.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


def scan_inputs(length, decays="ordinary", with_state=False, dtype=torch.float32, device="cpu", **sizes):
    """The arguments of a scan. As in the layer, log-decays and states are float32 whatever the rest is."""
    sizes = {"batch": 2, "heads": 2, "key_dim": 16, "value_dim": 16, **sizes}
    batch, heads, key_dim, value_dim = sizes.values()
    generator = torch.Generator().manual_seed(length)
    random = lambda *shape: torch.randn(*shape, generator=generator)
    low, high = DECAYS[decays]
    inputs = {name: random(batch, length, heads, key_dim).to(dtype) for name in ("query", "key")}
    inputs["value"] = random(batch, length, heads, value_dim).to(dtype)
    inputs["log_decay"] = low + (high - low) * torch.rand(batch, length, heads, key_dim, generator=generator)
    if with_state:
        inputs["initial_state"] = random(batch, heads, key_dim, value_dim)
    return {name: x.to(device) for name, x in inputs.items()}


def results(scan, inputs, **options) -> dict[str, torch.Tensor]:
    """Output and final state of a scan, and the gradient of each of its inputs."""
    inputs = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    output, state = scan(**inputs, **options)
    generator = torch.Generator().manual_seed(0)
    read = lambda x: (x.double() * torch.randn(x.shape, generator=generator).to(x.device)).sum()
    gradients = torch.autograd.grad(read(output) + read(state), list(inputs.values()))
    return {"output": output, "state": state, **{f"gradient of {name}": x for name, x in zip(inputs, gradients)}}


def assert_near(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], tolerance: float):
    """`other` are the expected results."""
    expected = {name: x.detach().double() for name, x in other.items()}
    errors = {
        name: float((one[name].detach().double() - x).norm() / x.norm().clamp(min=1)) for name, x in expected.items()
    }
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


def gla_by_definition(query, key, value, log_decay, initial_state=None, reverse=False):
    """The recurrence multiplied out: a sum over all pairs of tokens, in which no state appears."""
    if reverse:
        query, key, value, log_decay = (x.flip(1) for x in (query, key, value, log_decay))
    batch, length, heads, key_dim = query.shape
    states = [torch.zeros(batch, heads, key_dim, value.shape[-1], dtype=value.dtype)] * length
    for t in range(length):
        for s in range(t + 1):
            kept = log_decay[:, s + 1 : t + 1].sum(1).exp()
            states[t] = states[t] + torch.einsum("bhk,bhv->bhkv", kept * key[:, s], value[:, s])
        if initial_state is not None:
            states[t] = states[t] + log_decay[:, : t + 1].sum(1).exp()[..., None] * initial_state
    output = torch.stack([torch.einsum("bhk,bhkv->bhv", query[:, t], states[t]) for t in range(length)], dim=1)
    return (output.flip(1) if reverse else output) * key_dim**-0.5, states[-1]


# --- the model, from the section on GLADream in the design


def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def rotated(x, theta):
    """`(length, heads, dim)` from position 0 on."""
    length, _, dim = x.shape
    frequencies = theta ** (-torch.arange(0, dim, 2, dtype=x.dtype) / dim)
    angles = torch.arange(length, dtype=x.dtype)[:, None, None] * frequencies
    first, second = x[..., : dim // 2], x[..., dim // 2 :]
    return torch.cat(
        [first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], dim=-1
    )


def attention_by_definition(weights: dict[str, torch.Tensor], config, x: torch.Tensor) -> torch.Tensor:
    """One layer's two units over the pre-normalised input of one text, `(length, hidden)`.

    weights: of the layer's `self_attn`, by name.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    linear = lambda x, name: x @ weights[f"{name}.weight"].T + weights.get(f"{name}.bias", 0)
    head_norm = lambda x: rms_norm(x, weights["g_norm_swish_gate.weight"], config.rms_norm_eps)
    serving = torch.arange(heads) // (heads // kv_heads)  # the head of keys and values that serves a head of queries
    theta = config.rope_parameters["rope_theta"]

    def projected(name):
        """With the short convolution, within each block."""
        channels = linear(x, f"{name}_proj")
        if not config.conv_size:
            return channels
        mixed, taps = torch.zeros_like(channels), weights[f"{name}_conv1d.weight"]
        for t in range(len(x)):
            for tap in range(config.conv_size):
                other = t + tap - config.conv_size // 2
                if 0 <= other < len(x) and other // config.block_size == t // config.block_size:
                    mixed[t] += taps[:, 0, tap] * channels[other]
        return mixed * mixed.sigmoid()

    queries = rotated(projected("q").unflatten(-1, (heads, -1)), theta)
    keys = rotated(projected("k").unflatten(-1, (kv_heads, -1)), theta)[:, serving]
    values = projected("v").unflatten(-1, (kv_heads, -1))[:, serving]
    decays = linear(linear(x, "gk_proj.0"), "gk_proj.1").sigmoid().log() / config.gate_logit_normalizer
    decays = decays.unflatten(-1, (kv_heads, -1))[:, serving].exp()
    queries = queries * queries.shape[-1] ** -0.5

    def scan(tokens, state):
        """`{token: output}` in the order of `tokens`, and the last state. A state is `(heads, key_dim, value_dim)`."""
        outputs = {}
        for t in tokens:
            state = decays[t][..., None] * state + keys[t][..., None] * values[t][:, None]
            outputs[t] = (queries[t][:, None] @ state)[:, 0]
        return outputs, state

    def gate(name, forward, backward):
        return linear(torch.cat([forward.flatten(), backward.flatten()]), name).sigmoid().view_as(forward)

    inter_gate = "intra_gate_proj" if config.share_inter_intra_gate_weights else "inter_gate_proj"
    state = nothing = torch.zeros(heads, queries.shape[-1], values.shape[-1], dtype=x.dtype)
    fused = []
    for start in range(0, len(x), config.block_size):
        block = range(start, min(start + config.block_size, len(x)))
        forward, forward_end = scan(block, nothing)
        backward, backward_end = scan(reversed(block), nothing)
        last, first = head_norm(forward[block[-1]]), head_norm(backward[block[0]])
        if config.inter_block_injection_mode == "boundary":
            forward, backward = scan(block, state)[0], scan(reversed(block), state)[0]
        else:
            read = {t: (queries[t][:, None] @ state)[:, 0] for t in block}
            forward, backward = ({t: scanned[t] + read[t] for t in block} for scanned in (forward, backward))
        for t in block:
            f, b = head_norm(forward[t]), head_norm(backward[t])
            g = gate("intra_gate_proj", f, b)
            fused.append((g * f + (1 - g) * b).flatten())
        g = gate(inter_gate, last, first)[:, None]
        state = decays[list(block)].prod(0)[..., None] * state + g * forward_end + (1 - g) * backward_end
    gates = linear(x, "g_proj")
    return linear(torch.stack(fused) * gates * gates.sigmoid(), "o_proj")


def logits_by_definition(model, tokens: list[int]) -> torch.Tensor:
    """The logits of one text, `(length, vocab)`."""
    weights = {name: x.detach().double() for name, x in model.state_dict().items()}
    config = model.config
    norm = lambda x, name: rms_norm(x, weights[f"{name}.weight"], config.rms_norm_eps)
    x = weights["model.embed_tokens.weight"][tokens]
    for index in range(config.num_hidden_layers):
        layer = f"model.layers.{index}"
        own = {name.removeprefix(f"{layer}.self_attn."): w for name, w in weights.items() if name.startswith(layer)}
        x = x + attention_by_definition(own, config, norm(x, f"{layer}.input_layernorm"))
        y = norm(x, f"{layer}.post_attention_layernorm")
        gate, up, down = (weights[f"{layer}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        gated = y @ gate.T
        x = x + (gated * gated.sigmoid() * (y @ up.T)) @ down.T
    return norm(x, "model.norm") @ weights["lm_head.weight"].T
