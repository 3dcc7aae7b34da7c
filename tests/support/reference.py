"""The formulas in plain Python loops over floats (fp64). Imports nothing from the package under test."""

import math


def length_weights(lengths, lam, length_weight, scope="batch", r=1 / 9, max_completion_length=None, advantages=None):
    """f for a list of groups of lengths; the same nesting back."""
    if length_weight == "balanced":
        return balanced_weights(lengths, advantages, scope)
    everyone = [n for group in lengths for n in group]
    mean = sum(everyone) / len(everyone)

    def f(n, present):
        if n == 0:
            return 0.0
        if length_weight == "lambda_grpo":
            return softmax_weight(n, present, lam, r)
        if length_weight == "power":
            return power_weight(n, [m for m in everyone if m] if scope == "batch" else present, lam)
        return {"dapo": 1.0, "grpo": mean / n, "dr_grpo": mean / (max_completion_length or 1)}[length_weight]

    weights = [[f(n, [m for m in group if m]) for n in group] for group in lengths]
    return weights if scope == "batch" or length_weight in ("grpo", "dr_grpo") else per_prompt(weights, lengths)


def sides(advantages, side):
    """s_i of every response, from the sign of its advantage."""
    table = {"both": lambda a: 1, "signed": lambda a: (a > 0) - (a < 0), "positive": lambda a: int(a > 0)}
    table["negative"] = lambda a: int(a < 0)
    return [[table[side](a) for a in group] for group in advantages]


def side_weights(lengths, advantages, lam, length_weight, side, scope="batch", features=(), r=1 / 9, bound=2.0):
    """f with the sign of the advantage; `lam` a list, `features` raw values beside ln|o|: [name][group][row]."""
    signs, batch = sides(advantages, side), sum(map(sum, lengths))
    raw = []
    for p, group in enumerate(lengths):
        present = [i for i, n in enumerate(group) if n > 0]
        s = signs[p]
        if length_weight == "lambda_grpo" and present:
            h, _ = growth([group[i] for i in present], 0.0, r)
            g = [x ** (lam[0] * s[i]) for x, i in zip(h, present, strict=True)]
            exp = [math.exp(x - max(g)) for x in g]
            row = {i: len(present) * e / math.fsum(exp) for i, e in zip(present, exp, strict=True)}
        else:
            columns = [[math.log(group[i]) for i in present], *[[x[p][i] for i in present] for x in features]]
            row = {}
            for place, i in enumerate(present):
                inner = sum(value * (c[place] - math.fsum(c) / len(c)) for value, c in zip(lam, columns, strict=True))
                row[i] = math.exp(s[i] * min(max(inner, -bound), bound))
        raw.append([row.get(i, 0.0) for i in range(len(group))])
    if length_weight == "power":
        masses = [math.fsum(n * w for n, w in zip(g, row, strict=True)) for g, row in zip(lengths, raw, strict=True)]
        for p, row in enumerate(raw):
            mass, tokens = (math.fsum(masses), batch) if scope == "batch" else (masses[p], sum(lengths[p]))
            raw[p] = [w * tokens / mass if mass else 0.0 for w in row]
    return per_prompt(raw, lengths) if scope == "prompt" else raw


def balanced_weights(lengths, advantages, scope="batch"):
    """m_group / m_sign(A_i), over the rows with tokens and A ≠ 0; 1 where A = 0."""
    weights = []
    for group, signs in zip(lengths, sides(advantages, "signed"), strict=True):
        chosen = [n for n, s in zip(group, signs, strict=True) if n > 0 and s]
        row = []
        for n, s in zip(group, signs, strict=True):
            same = [m for m, t in zip(group, signs, strict=True) if m > 0 and t == s]
            row.append(0.0 if n == 0 else 1.0 if s == 0 else (sum(chosen) / len(chosen)) / (sum(same) / len(same)))
        weights.append(row)
    return per_prompt(weights, lengths) if scope == "prompt" else weights


def favour_positive(weights, lengths, advantages, c, scope="batch"):
    """c times f where A > 0, the token mass of the scope as before."""
    more = [
        [w * (c if a > 0 else 1) for w, a in zip(row, group, strict=True)]
        for row, group in zip(weights, advantages, strict=True)
    ]

    def masses(rows):
        each = [math.fsum(n * w for n, w in zip(g, row, strict=True)) for g, row in zip(lengths, rows, strict=True)]
        return [math.fsum(each)] * len(each) if scope == "batch" else each

    before, after = masses(weights), masses(more)
    return [[w * b / a if a else 0.0 for w in row] for row, b, a in zip(more, before, after, strict=True)]


def per_prompt(weights, lengths):
    """Weights of each prompt's token mean, restated for the division by the batch's token count."""
    batch = sum(map(sum, lengths))
    return [
        [w * (batch / len(lengths)) / (sum(group) or 1) for w in row]
        for row, group in zip(weights, lengths, strict=True)
    ]


def without_tied(weights, lengths, live):
    """0 for groups that are not `live`, S/S_live times `weights`, those of a batch without them, for the others."""
    of_live = sum(sum(group) for group, is_live in zip(lengths, live, strict=True) if is_live)
    factor, rest = sum(map(sum, lengths)) / of_live if of_live else 0.0, iter(weights)
    return [
        [w * factor for w in next(rest)] if is_live else [0.0] * len(group)
        for group, is_live in zip(lengths, live, strict=True)
    ]


def has_signal(rewards):
    """Whether the rewards of a group differ, None apart; equal ones added up in another order do not."""
    known = [r for r in rewards if r is not None]
    return bool(known) and max(known) - min(known) > 1e-6 * max(map(abs, known))


def response_statistics(logps, entropies, own):
    """mean_logp, min_logp and mean_entropy of one response over its own tokens; 0 without any."""
    mine = [t for t, is_own in enumerate(own) if is_own]
    means = [math.fsum(values[t] for t in mine) / (len(mine) or 1) for values in (logps, entropies)]
    return {"mean_logp": means[0], "min_logp": min((logps[t] for t in mine), default=0.0), "mean_entropy": means[1]}


def regression(batches, features, gain, decay=0.9, ridge=0.1):
    """κ·w by the normal equations, the part of Σa² that w explains, the first slope, after each (n, A, logps)."""
    import numpy

    names, size, out = ("length", "mean_logp", "min_logp"), len(features), []
    m, b, total, count = numpy.zeros((size, size)), numpy.zeros(size), 0.0, 0.0
    for lengths, advantages, raw in batches:
        m, b, total, count = m * decay, b * decay, total * decay, count * decay
        for p, group in enumerate(lengths):
            present = [i for i, n in enumerate(group) if n > 0]
            if len({advantages[p][i] for i in present}) < 2:
                continue
            every = [[math.log(group[i]), *(x[p][i] for x in raw)] for i in present]
            rows = [[row[names.index(name)] for name in features] for row in every]
            means = [math.fsum(c) / len(c) for c in zip(*rows, strict=True)]
            mean_a = math.fsum(advantages[p][i] for i in present) / len(present)
            count += len(present) - 1
            for row, i in zip(rows, present, strict=True):
                x, a = [v - mean for v, mean in zip(row, means, strict=True)], advantages[p][i] - mean_a
                total, b, m = total + a * a, b + numpy.array(x) * a, m + numpy.outer(x, x)
        w = numpy.linalg.inv(m + (ridge if size > 1 else 0.0) * numpy.diag(numpy.diag(m))) @ b
        noise = (total - b @ w) / count
        w = w * max(0.0, 1 - size * noise / (b @ w))
        explained = (total - (total - 2 * b @ w + w @ m @ w)) / total  # Σa² - Σ(a - w·x)²
        out.append(([gain * float(v) for v in w], float(explained), b[0] / m[0, 0]))
    return out


def target_path(lengths, target, steps, side, bounds, init, eps, rate=0.1):
    """
    λ after each optimizer step, from the mean length of each generation batch: λ goes to ∓(6·e + I), I at most 0.05
    per optimizer step and a quarter of a logarithm, twice as fast where it goes back; λ's step is lr·g/(|g| + eps),
    or lr·g without an eps, after the clip of g at 1.
    """
    low, high = bounds
    sign = 1 if side == "negative" else -1
    lam, integral, smooth, path, goal = init, sign * init, None, [], None
    part = 1 - math.exp(-12 * rate / steps)
    for seen, length in enumerate(lengths, start=1):
        if target <= 1 and seen >= 4:
            target = target * math.fsum(lengths[:4]) / 4
        if target > 1:
            smooth = length if smooth is None else (smooth + length) / 2
            e = math.log(smooth / target)
            move = 0.05 * min(steps, 4) * (math.copysign(0.25, e) if abs(e) > 0.25 else e)
            if (move < 0 < integral) or (integral < 0 < move):
                move *= 2
            after = sign * (6 * e + integral + move)
            goal = min(max(after, low), high)
            if low <= after <= high or (after > high) != (sign * move > 0):
                integral += move
        for _ in range(steps):
            if goal is not None:
                g = min(max((lam - goal) / (high - low), -1), 1)
                lam -= (high - low) * part * g / (1 if eps is None else abs(g) + eps)
                lam = min(max(lam, low), high)
            path.append(lam)
    return path


def growth(present, lam, r):
    """h and h^λ of a group's rows with tokens."""
    mean = math.fsum(present) / len(present)
    std = math.sqrt(math.fsum((n - mean) ** 2 for n in present) / len(present))
    h = [1 + r * (n - mean) / (std + 1e-8) for n in present]  # the package's ε
    return h, [x**lam for x in h]


def softmax_weight(n, present, lam, r):
    _, g = growth(present, lam, r)
    top = max(g)
    exp = [math.exp(x - top) for x in g]
    return len(present) * exp[present.index(n)] / math.fsum(exp)


def power_weight(n, present, lam):
    mean = math.fsum(present) / len(present)
    return (n / mean) ** lam * math.fsum(present) / math.fsum(m * (m / mean) ** lam for m in present)


def probability_weight(logp, token_weight, alpha=None, k=9.0, p0=0.25, low=1.0, high=1.4):
    """v of one token."""
    pi = math.exp(logp)
    if token_weight == "ar":
        alpha = 0.2 if alpha is None else alpha
        return alpha * pi + 1 - alpha
    alpha = 2.0 if alpha is None else alpha
    return min(max(alpha / (1 + math.exp(-k * (pi - p0))), low), high)


def score(model, prompt, completion):
    """Log-probability of each token of a completion, and the entropy of what it was drawn from; floats."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
    rows = [torch.log_softmax(logits[len(prompt) + t - 1], dim=-1).tolist() for t in range(len(completion))]
    entropies = [-math.fsum(math.exp(x) * x for x in row) for row in rows]
    return [row[token] for row, token in zip(rows, completion, strict=True)], entropies


def loss_shares(rows, quartiles=4):
    """Σ mass per bin over Σ mass, for (mass, bin) pairs."""
    total = math.fsum(mass for mass, _ in rows)
    return [math.fsum(mass for mass, b in rows if b == q) / total for q in range(quartiles)]


def group_advantages(rewards):
    """A = (R - mean) / (std + 1e-4) within each group of rewards, std with G - 1; the same nesting back."""
    advantages = []
    for group in rewards:
        mean = math.fsum(group) / len(group)
        std = math.sqrt(math.fsum((r - mean) ** 2 for r in group) / (len(group) - 1))
        advantages.append([(r - mean) / (std + 1e-4) for r in group])
    return advantages


def sampler_correction(old_logps, sampled_logps, mode, low, high):
    """TRL's importance ratio of model to sampler for the tokens of one row, truncated to [low, high] or masked."""
    differences = [old - sampled for old, sampled in zip(old_logps, sampled_logps, strict=True)]
    if mode.startswith("sequence"):
        differences = [math.fsum(differences)] * len(differences)
    ratios = [math.exp(difference) for difference in differences]
    if mode.endswith("truncate"):
        return [min(max(ratio, low), high) for ratio in ratios]
    return [ratio if low <= ratio <= high else 0.0 for ratio in ratios]


def policy_loss(model, prompts, completions, old_logps, advantages, length_weight, **options):
    """-1/Σ|o| Σ_i f_i Σ_t v_it s_it, differentiable in the model; the arguments but f are those of `policy_terms`."""
    terms = policy_terms(model, prompts, completions, old_logps, advantages, **options)
    return sum(f * term for f, term in zip(length_weight, terms, strict=True))


def policy_terms(
    model, prompts, completions, old_logps, advantages, *, loss_type, level="token", regulation=None, inside=False,
    delta=None, own=None, correction=None, v=None, eps=0.2, tau=(1.0, 1.0499999523162842),
    vespo=((2.0, 3.0), (3.0, 2.0)), **regulation_options,
):  # fmt: skip
    """
    -1/Σ|o| Σ_t v_it s_it of each row, differentiable in the model. TRL makes τ of SAPO float32.

    By row and token: `old_logps`; `own`, the mask of the policy's own; `correction`, the ratio of model to sampler,
    which multiplies the token's term, or for VESPO enters the sequence's w; `v`, or by the name `regulation`.
    """
    import torch

    own = [[1] * len(c) for c in completions] if own is None else own
    given_v = [None] * len(completions) if v is None else v
    correction = [[1.0] * len(c) for c in completions] if correction is None else correction
    tokens = sum(sum(mask) for mask in own)
    terms = []
    for prompt, completion, old, advantage, mask, ratios, weights in zip(
        prompts, completions, old_logps, advantages, own, correction, given_v, strict=True
    ):
        logits = model(torch.tensor([prompt + completion])).logits[0].double()
        logps = [torch.log_softmax(logits[len(prompt) + t - 1], dim=-1)[token] for t, token in enumerate(completion)]
        mine = [t for t in range(len(completion)) if mask[t]]
        term = 0.0
        for t in mine:
            v = 1.0 if weights is None else weights[t]
            if regulation is not None:
                v = probability_weight(logps[t].item(), regulation, **regulation_options)
            if level == "sequence":
                ratio = torch.exp(sum(logps[s] - old[s] for s in mine) / len(mine))
            else:
                ratio = torch.exp(logps[t] - old[t])
            ratio, v = (ratio * v, 1.0) if inside else (ratio, v)
            if loss_type == "dapo":
                bounded = ratio if delta is None else ratio.clamp(max=delta)
                surrogate = torch.min(bounded * advantage, ratio.clamp(1 - eps, 1 + eps) * advantage)
            elif loss_type == "cispo":
                surrogate = ratio.clamp(max=eps).detach() * advantage * logps[t]
            elif loss_type == "sapo":
                temperature = tau[0] if advantage > 0 else tau[1]
                surrogate = torch.sigmoid(temperature * (ratio - 1)) * 4 / temperature * advantage
            elif loss_type == "vespo":
                k, decay = vespo[0] if advantage >= 0 else vespo[1]
                of_sampler = math.fsum(math.log(max(ratios[s], 1e-8)) for s in mine)
                w = torch.exp((sum(logps[s] - old[s] for s in mine) + of_sampler).clamp(min=math.log(1e-8))).detach()
                surrogate = math.exp(decay) * w**k * torch.exp(-decay * w) * advantage * logps[t]
            term = term - v * (1.0 if loss_type == "vespo" else ratios[t]) * surrogate / tokens
        terms.append(term)
    return terms
