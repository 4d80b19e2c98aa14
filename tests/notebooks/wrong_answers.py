"""Five plausible wrong answers for every exercise: its check must refuse each.

An answer is an expression, what the stub returns instead of None, or a whole function. Three
texts are a text of the solution, what replaces it, and what the check must say.
"""

from __future__ import annotations

MERGE_FROM_THE_RIGHT = """def merge_pair(symbols, pair):
    merged = []
    for symbol in reversed(symbols):
        if merged and (symbol, merged[0]) == tuple(pair):
            merged[0] = symbol + merged[0]
        else:
            merged.insert(0, symbol)
    return merged"""
MERGE_ONCE = """def merge_pair(symbols, pair):
    for i in range(len(symbols) - 1):
        if (symbols[i], symbols[i + 1]) == tuple(pair):
            return symbols[:i] + [symbols[i] + symbols[i + 1]] + symbols[i + 2:]
    return symbols"""
PACK = """def pack(documents, eot_id, length):
    row = [{first}]
    for ids in documents:
        row += [*ids, eot_id]
    blocks = [row[first : first + length] for first in range(0, len(row){end}, {stride})]
    return [block + [{fill}] * (length - len(block)) for block in blocks]"""
PACKED = {"first": "eot_id", "end": " - 1", "stride": "length - 1", "fill": "eot_id"}
SHARE = """def share(order, batch_size, rank, world_size):
    step = batch_size * world_size
    return [{batch} for i in range(0, len(order){end}, step)]"""
LAST_WORD = """def loop_length(words):
    for n in range(1, len(words)):
        if words[-1 - n] == words[-1]:
            return n
    return 0"""
LARGEST_LOOP = """def loop_length(words):
    fits = [n for n in range(1, len(words) // 2 + 1) if words[-n:] == words[-2 * n : -n]]
    return max(fits, default=0)"""
NEIGHBOURS_ONLY = """def link_seconds(intervals):
    pairs = sorted(intervals)
    both = zip(pairs, pairs[1:])
    shared = sum(max(0.0, min(a[1], b[1]) - b[0]) for a, b in both)
    return float(sum(end - start for start, end in pairs)) - shared"""
UNSORTED = """def link_seconds(intervals):
    busy, reached = 0.0, float("-inf")
    for start, end in intervals:
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return busy"""

WRAPPED = (
    "    optimizer = hvd.DistributedOptimizer(optimizer,"
    " named_parameters=model.named_parameters())\n"
)
LOADED = """    if hvd.rank() == 0:
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
"""
UNEQUAL = "Do they start with equal parameters and momenta, and average gradients?"
REDUCED = 'mean = hvd.allreduce(torch.tensor(loss), name="validation loss").item()'

WRONG_ANSWERS: dict[str, dict[str, list[str | tuple[str, str, str]]]] = {
    "01_attention": {
        "exercise-scores": [
            "query @ key.T",
            "query @ key.T / query.shape[-1]",
            "query @ key.T / query.shape[0]",
            "key @ query.T / query.shape[-1] ** 0.5",
            "(query @ key.T / query.shape[-1] ** 0.5).softmax(-1)",
        ],
        "exercise-share": [
            "length / (length + width)",
            "4 * length**2 * width / (8 * length * width**2)",
            "8 * length * width**2 / (4 * length**2 * width + 8 * length * width**2)",
            "4 * length**2 * width",
            "0.5",
        ],
        "exercise-heads": [
            "x.view(x.shape[0], n_heads, x.shape[1], -1)",
            "x.view(*x.shape[:2], n_heads, -1)",
            "x.view(*x.shape[:2], -1, n_heads).permute(0, 3, 1, 2)",
            "torch.stack(x.chunk(n_heads, dim=-1), dim=0)",
            "x.view(*x.shape[:2], n_heads, -1).transpose(2, 3)",
        ],
        "exercise-window": [
            "torch.ones(length, length).tril().triu(-reach)",
            "torch.ones(length, length).triu(-reach).bool()",
            "torch.ones(length, length).tril().bool()",
            "torch.ones(length, length).tril().triu(1 - reach).bool()",
            "torch.ones(length, length).tril(reach).triu(-reach).bool()",
        ],
    },
    "02_transformer_lm": {
        "exercise-post-norm": [
            "x + feed_forward(second_norm(x + attention(first_norm(x))))",
            "second_norm(feed_forward(first_norm(attention(x))))",
            "second_norm(first_norm(x + attention(x)) + feed_forward(x))",
            "second_norm(x + feed_forward(first_norm(x + attention(x))))",
            "second_norm(x + attention(x) + feed_forward(x + attention(x)))",
        ],
        "exercise-context": [
            "n_weights / (12 * n_layers * d_model)",
            "6 * n_weights / (6 * n_layers * d_model)",
            "6 * n_weights / (12 * d_model)",
            "12 * n_layers * d_model / (6 * n_weights)",
            "6 * n_weights",
        ],
        "exercise-future": [
            "not torch.equal(predict(torch.cat([ids[:, :-1], 9 - ids[:, -1:]], 1))[:, :-1],"
            " predict(ids)[:, :-1])",
            "not torch.equal(predict(9 - ids), predict(ids))",
            "not torch.equal(predict(ids).argmax(-1), ids)",
            "not torch.equal(predict(ids[:, :2])[:, :1], predict(ids)[:, :1])",
            "False",
        ],
    },
    "03_text_to_tensors": {
        "exercise-merge": [
            MERGE_FROM_THE_RIGHT,
            MERGE_ONCE,
            "symbols",
            "[''.join(symbols)]",
            "''.join(symbols).replace(''.join(pair), ' ').split(' ')",
        ],
        "exercise-pack": [
            PACK.format(**PACKED | {"first": ""}),
            PACK.format(**PACKED | {"stride": "length"}),
            PACK.format(**PACKED | {"end": ""}),
            PACK.format(**PACKED | {"fill": "0"}),
            PACK.format(**PACKED | {"end": " - length"}),
        ],
        "exercise-entropy": [
            "-sum(w / sum(weights) * np.log2(w / sum(weights)) for w in weights)",
            "-sum(w * np.log(w) for w in weights)",
            "sum(w / sum(weights) * np.log(w / sum(weights)) for w in weights)",
            "float(np.log(len(weights)))",
            "-float(np.log(max(weights) / sum(weights)))",
        ],
        "exercise-share": [
            SHARE.format(batch="order[i + rank : i + step : world_size]", end=""),
            SHARE.format(batch="order[i + rank * batch_size :][:batch_size]", end=""),
            SHARE.format(batch="order[i + rank * batch_size :][:batch_size]", end=" - step + 1"),
            "[order[rank::world_size][i : i + batch_size]"
            " for i in range(0, len(order) // world_size, batch_size)]",
            "[order[i : i + batch_size] for i in range(0, len(order), batch_size)]",
        ],
    },
    "04_horovod_by_hand": {
        "exercise-chunk": [
            "(worker + step) % workers",
            "worker",
            "worker - step",
            "(worker - step - 1) % workers",
            "(step - worker) % workers",
        ],
        "exercise-alltoall": [
            "[torch.cat(row) for row in parts]",
            "parts",
            "[list(column) for column in zip(*parts)]",
            "[torch.cat(column[::-1]) for column in zip(*parts)]",
            "[torch.cat(column) for column in zip(*parts)][::-1]",
        ],
        "exercise-mean": [
            "torch.cat(shares).mean()",
            "allreduce([share.mean() for share in shares]) / len(shares)",
            "allreduce([torch.stack([share.mean(), torch.ones(())]) for share in shares])[0] / 2",
            "allreduce([share.sum() for share in shares])"
            " / allreduce([torch.tensor(float(len(share))) for share in shares])",
            "allreduce([torch.stack([share.sum(), torch.ones(())]) for share in shares])[0]",
        ],
    },
    "05_distributed_training": {
        "exercise-rate": [
            "base_rate * min(1.0, (step + 1) / (warmup + 1))",
            "base_rate * world_size * min(1.0, step / warmup)",
            "base_rate * world_size * min(1.0, (step + 1) / warmup)",
            "base_rate * world_size * (step + 1) / (warmup + 1)",
            "base_rate * world_size**0.5 * min(1.0, (step + 1) / (warmup + 1))",
        ],
        "exercise-convert": [
            ("    hvd.broadcast_parameters(model.state_dict(), root_rank=0)\n", "", UNEQUAL),
            ("    hvd.broadcast_optimizer_state(optimizer, root_rank=0)\n", "", UNEQUAL),
            (WRAPPED, "", UNEQUAL),
            (WRAPPED + LOADED, LOADED + WRAPPED, "Was the optimizer wrapped after"),
            ("batch_size=8 // hvd.size()", "batch_size=8", "(weight by rank) at [0] is"),
            (", hvd.size(), hvd.rank(), ", ", 1, 0, ", "Does each rank read every sample?"),
            ("== 0:\n        save", ">= 0:\n        save", "Does every rank save?"),
            ("== 0:\n        model", ">= 0:\n        model", "fails: rank 1: TypeError"),
        ],
        "exercise-hang": [
            (REDUCED, "mean = loss", "hangs: rank 1 did not come to 'gradient', where rank 0"),
            (REDUCED, REDUCED + " if hvd.rank() == 0 else loss", "best_loss hangs: "),
            ("allreduce(torch.tensor(loss)", "broadcast(torch.tensor(loss), 0", "rank 0 alone?"),
            ('name="validation', 'op=hvd.Sum, name="validation', "Is it the sum"),
            ("            break", "            continue", "Does it continue after"),
        ],
        "exercise-factor": [
            ("loss / len(passes)", "loss", "2 times the right numbers. Is the loss of each pass"),
            ("loss / len(passes)", "loss / len(passes) / hvd.size()", "is it done twice?"),
            ("loss / len(passes)", "loss / hvd.size()", "1.5 times the right numbers"),
            ("loss / len(passes)", "loss * len(inputs) / 24", "0.5 times the right numbers"),
            ("in passes:", "in passes[:1]:", "numbers differ)"),
        ],
    },
    "06_performance_and_scaling": {
        "exercise-ring": [
            "(workers - 1) * latency + (workers - 1) / workers * size / bandwidth",
            "2 * (workers - 1) / workers * size / bandwidth",
            "2 * (workers - 1) * (latency + size / bandwidth)",
            "2 * workers * latency + 2 * size / bandwidth",
            "latency + 2 * (workers - 1) / workers * size / bandwidth",
        ],
        "exercise-passes": [
            "communication * efficiency / (compute * (1 - efficiency))",
            "int(communication * efficiency / (compute * (1 - efficiency)))",
            "int(communication * efficiency / (compute * (1 - efficiency))) + 2",
            "round(communication / compute)",
            "-int(-communication / (compute * (1 - efficiency)))",
        ],
        "exercise-busy": [
            NEIGHBOURS_ONLY,
            UNSORTED,
            "float(sum(end - start for start, end in intervals))",
            "max((end for _, end in intervals), default=0.0)",
            "max((end - start for start, end in intervals), default=0.0)",
        ],
        "exercise-cycle": ["1", "0.025", "5", "100", "300"],
    },
    "07_surviving_failures": {
        "exercise-newest": [
            "max((name for name in names if name not in damaged), default=None)",
            "names[-1]",
            "max(names, key=lambda name: int(name[:-3].split('step')[1]))",
            "max([name for name in names if name not in damaged],"
            " key=lambda name: int(name[:-3].split('step')[1]))",
            "next((name for name in names if name not in damaged), None)",
        ],
        "exercise-share": [
            "order[rank * batch :][:batch]",
            "order[seen + rank :: world_size][:batch]",
            "order[seen * world_size + rank * batch :][:batch]",
            "order[seen + rank * batch]",
            "order[seen : seen + batch * world_size]",
        ],
        "exercise-interval": [
            "math.sqrt(commit * between)",
            "2 * commit * between",
            "math.sqrt(2 * between / commit)",
            "math.sqrt(between)",
            "commit / between",
        ],
        "exercise-sizes": [
            "(6, 1)",
            "(6, 2)",
            "(12 // world_size, 1)",
            "(3 * world_size, 1)",
            "(6, max(1, 2 // world_size))",
        ],
    },
    "08_generation": {
        "exercise-temperature": [
            "(logits / temperature).softmax(-1)",
            "(logits / max(temperature, 1.0)).softmax(-1)",
            "(logits * temperature).softmax(-1)",
            "logits.softmax(-1) / temperature",
            "(logits / temperature).softmax(-1) if temperature else logits.argmax()",
        ],
        "exercise-top-p": [
            "sum(share >= top_p for share in probabilities)",
            "next(n for n in range(1, 9) if sum(probabilities[:n]) >= top_p - 1e-9)",
            "next(n for n in range(1, 9) if sum(sorted(probabilities)[:n]) >= top_p - 1e-9)",
            "sum(sum(sorted(probabilities)[-n:]) < top_p for n in range(1, 6))",
            "max(1, round(top_p * len(probabilities)))",
        ],
        "exercise-loop": [
            LAST_WORD,
            LARGEST_LOOP,
            "len(words) - len(set(words))",
            "2 if len(set(words)) < len(words) else 0",
            "len(set(words)) if len(set(words)) < len(words) else 0",
        ],
    },
    "09_beyond_one_machine": {
        "exercise-place": [
            "(hosts[rank % len(hosts)][0], rank // len(hosts))",
            "(hosts[rank // hosts[0][1]][0], rank % hosts[0][1])",
            "([name for name, slots in hosts for _ in range(slots)][rank], rank)",
            "[name for name, slots in hosts for _ in range(slots)][rank]",
            "[(name, slot + 1) for name, slots in hosts for slot in range(slots)][rank]",
        ],
        "exercise-rate": [
            "2 * (hosts - 1) / hosts * 4 * parameters / seconds / 1e6",
            "8 * 4 * parameters / seconds / 1e6",
            "2 * (hosts - 1) * 32 * parameters / seconds / 1e6",
            "2 * (hosts - 1) / hosts * 32 * parameters / seconds",
            "2 * (hosts - 1) / hosts * 16 * parameters / seconds / 1e6",
        ],
        "exercise-triage": [
            "[one['subject'] for one in findings if one['verdict'] == 'fail']",
            "sorted({one['subject'] for one in findings if one['verdict'] == 'fail'})",
            "list(dict.fromkeys(f['subject'] for f in findings if f['verdict'] != 'ok'))",
            "[one for one in findings if one['verdict'] == 'fail']",
            "{one['subject'] for one in findings if one['verdict'] == 'fail'}",
        ],
    },
    "10_beyond_data_parallel": {
        "exercise-memory": [
            "16 * parameters",
            "16 * parameters / workers",
            "16 * parameters / (workers if stage == 3 else 1)",
            "4 * parameters * (4 - stage + stage / workers)",
            "parameters * ((8 if stage < 1 else 8 / workers) + (4 if stage < 2 else 4 / workers))",
        ],
        "exercise-part": [
            "x @ weight.T",
            "x @ weight.T / workers",
            "x @ weight.chunk(workers, dim=0)[worker].T",
            "x.chunk(workers, dim=1)[0] @ weight.chunk(workers, dim=1)[worker].T",
            "x.chunk(workers, dim=0)[worker] @ weight.T",
        ],
        "exercise-bubble": [
            "(stages - 1) * (1 - limit) / limit",
            "int((stages - 1) * (1 - limit) / limit)",
            "int((stages - 1) / limit)",
            "stages",
            "int(1 / limit)",
        ],
    },
}
