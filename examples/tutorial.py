# %% [markdown]
# # From a behaviour in words to a circuit
#
# The behaviour: *"The keys near the house"* goes on with *"are"*, not *"is"*. The verb agrees with the noun that it
# belongs to, not with the one that stands next to it. Which parts of a language model see to that?
#
# Run this file as a script, or cell by cell in an editor or notebook that knows `# %%`. It takes about two minutes on
# two cores; run it again and it goes on where it was.

# %%
import json
import os
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

import pahq

MODEL = os.environ.get("TUTORIAL_MODEL", "smollm2-135m")
FOLDER = Path(os.environ.get("TUTORIAL_FOLDER", "runs/tutorial"))
FOLDER.mkdir(parents=True, exist_ok=True)

# %% [markdown]
# ## 1. Prompts
#
# A task is a file of prompt pairs. The *clean* prompt shows the behaviour; the *corrupted* one has the same number of
# tokens and changes the one thing that the behaviour depends on, here the number of the first noun.

# %%
NOUNS = {"key": "keys", "book": "books", "car": "cars", "boy": "boys", "picture": "pictures", "dog": "dogs"}
PLACES = ["house", "houses", "tree", "trees"]

prompts = []
for one, many in NOUNS.items():
    for place in PLACES:
        single = {"text": f"The {one} near the {place}", "verb": " is"}
        plural = {"text": f"The {many} near the {place}", "verb": " are"}
        for clean, corrupt in ((single, plural), (plural, single)):
            answers = {"answers": [clean["verb"]], "wrong_answers": [corrupt["verb"]]}
            prompts.append({"clean": clean["text"], "corrupt": corrupt["text"], **answers})
task_file = FOLDER / "agreement.jsonl"
task_file.write_text("".join(json.dumps(pair) + "\n" for pair in prompts))
print(f"{len(prompts)} pairs, such as {prompts[1]}")

# %% [markdown]
# ## 2. Does the model do it at all?
#
# A circuit of something that the model cannot do explains nothing. The metric is minus the difference between the
# logits of the right and of the wrong verb: the lower, the better.

# %%
model = pahq.load_model(MODEL)
task = pahq.get_task(str(task_file))
held_out = task.prompts(model, 8, seed=0, split="test")

from pahq.evaluation.examples import Examples  # noqa: E402  (a notebook imports where it needs)
from pahq.graph import Graph  # noqa: E402

graph = Graph(model.config)
examples = Examples(model, held_out, graph, task, "logit_diff")
print(f"logit difference of the model: {-examples.full.metric.mean:.2f}")
print(f"the same on corrupted prompts: {-examples.empty.metric.mean:.2f}")

# %% [markdown]
# ## 3. The circuit
#
# ACDC tests one edge after the other and removes it if the metric gets worse by less than `threshold`. To be quick, a
# gradient method first sorts out all but the most promising 2 % of the edges.

# %%
circuit = pahq.discover(
    model=MODEL,
    task=str(task_file),
    threshold=0.1,
    metric="logit_diff",
    n=8,
    prefilter="eap-ig",
    keep=0.02,
    out=FOLDER / "run",
    progress=True,
)
print(circuit)
for edge in circuit.largest(5):
    print(f"{edge.sender:>8} -> {edge.receiver:<8} {edge.effect:+.2f}")
circuit  # noqa: B018  # pyright: ignore[reportUnusedExpression]  (a notebook shows a table)

# %% [markdown]
# ## 4. Its picture
#
# The run's folder has a page to click through, `viewer.html`, and `pahq plot graph` draws it for a paper. A plain
# picture takes a few lines: layers from bottom to top, heads side by side, MLPs to their right, with the edges between
# them bent. An edge enters a head through its query, key or value. Where heads share keys and values, `a26.0.v` is the
# value of a whole *group* of heads, and the edge leads to each that is used.

# %%
from pahq.report.figures.style import KINDS  # noqa: E402  (the colours of the viewer and of all figures)


def spot(name: str) -> tuple[float, float]:
    """Where a node is drawn: embed at the bottom, logits at the top."""
    heads, layers = graph.config.n_heads, graph.config.n_layers
    if name in ("embed", "logits"):
        return heads / 2, -1.0 if name == "embed" else float(layers)
    if name.startswith("m"):
        return heads + 0.5, int(name[1:]) + 0.5
    layer, head = name[1:].split(".")
    return float(head), float(layer)


figure = Figure(figsize=(6, 7), layout="constrained")
axes = figure.add_subplot()
senders = {edge.sender for edge in circuit.edges()}
drawn = set()
for row, receiver in enumerate(graph.receivers):
    ends = (
        [f"a{receiver.layer}.{head}" for head in graph.heads_of(receiver)] if receiver.is_attention else [receiver.name]
    )
    for column in np.flatnonzero(circuit.mask[row, : graph.direct]):
        for end in [end for end in ends if end in senders or end == "logits"]:
            (x, y), (to_x, to_y) = spot(graph.senders[column].name), spot(end)
            width = 0.5 + min(abs(circuit.effects[row, column]), 3.0)
            aside = 0.2 + 0.06 * (to_y - y) if x == to_x else 0.0  # one column: straight lines would lie on each other
            along = np.linspace(0, 1, 30)
            line = x + along * (to_x - x) + 4 * aside * along * (1 - along), y + along * (to_y - y)
            axes.plot(*line, color=KINDS[receiver.kind], linewidth=width, alpha=0.6)
            drawn |= {graph.senders[column].name, end}
for name in sorted(drawn):
    axes.text(*spot(name), name, ha="center", va="center", fontsize=7, bbox={"boxstyle": "round", "fc": "white"})
axes.set(ylabel="layer", xticks=[], title="Edges into queries (blue), keys (orange), values (green)")
axes.margins(0.08)
figure.savefig(FOLDER / "circuit.png", dpi=150)
print(f"drawn: {FOLDER / 'circuit.png'}; to click through: {FOLDER / 'run' / 'viewer.html'}")
figure  # noqa: B018  # pyright: ignore[reportUnusedExpression]  (a notebook shows the picture)

# %% [markdown]
# ## 5. Is it faithful?
#
# On prompts that the search has not seen: what share of what the full model does, beyond what an empty circuit does,
# does the circuit do alone? Random circuits of the same size tell how much of that is luck.

# %%
record = pahq.evaluate([FOLDER / "run"], model=model, knockouts=0, removals=0, random_circuits=3, bootstrap=200)
result = record["runs"][0]
alone, interval = result["circuit"], result["circuit"]["recovered_interval"]
print(f"{alone['edges']} edges ({alone['share']:.2%} of all) recover {alone['recovered']:.0%} of the logit difference")
print(f"95 % of resamples of the prompts lie between {interval['low']:.0%} and {interval['high']:.0%}")
print(f"random circuits of this size: {result['random']['mean']['recovered']:+.0%}")

# %% [markdown]
# ## 6. Knock a head out
#
# The head whose edges in the circuit have the largest effects: without it, the model (not just the circuit) should get
# worse at this, and a head outside of the circuit should matter less.

# %%
weight = np.where(circuit.mask, np.abs(np.nan_to_num(circuit.effects)), 0.0).sum(axis=0)
heads = [column for column, sender in enumerate(graph.senders) if sender.kind == "head"]
most = max(heads, key=lambda column: weight[column])
outside = min(heads, key=lambda column: weight[column])
for column in (most, outside):
    without = graph.edges.copy()
    without[:, column] = False  # nobody reads it: each reader gets what it gave in the corrupted run
    metric = examples.figures(without).metric.mean
    print(f"without {graph.senders[column].name}: logit difference {-metric:.2f}, was {-examples.full.metric.mean:.2f}")
