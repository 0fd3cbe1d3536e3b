// The panel beside the graph: the run, a node, or an edge. All that comes from prompts is set as text, never as HTML.
import { picture, plain } from "./attention";
import { type Circuit, type Edge, type Side, type Word, decision, number, title } from "./model";
import type { Look } from "./look";

type Child = Node | string;
export function element(tag: string, attributes: Record<string, string> = {}, ...children: Child[]): HTMLElement {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}
export interface Picks { node(at: number): void; edge(edge: Edge): void; clear(): void }
const LIST = 12;
const STATUS: Record<string, string> = { hit: "in both", miss: "only in the other", extra: "only here", none: "in neither" };

export class Panel {
  private example = 0;
  constructor(private readonly root: HTMLElement, private readonly circuit: Circuit, private readonly picks: Picks) {}

  /** The run as a whole. */
  run(): void {
    const { data } = this.circuit, run = data.run;
    const rows = [["Model", run["model"]], ["Task", run["task"]], ["Method", run["method"]], ["Metric", run["metric"]],
      ["Threshold", data.threshold === null ? null : number(data.threshold)], ["Edges asked for", run["edges"]], ["Ablation", run["ablation"]], ["Precision", run["policy"]],
      ["Edges tested", data.size.tested ? data.size.tested.toLocaleString("en") : null]] as const;
    const facts = rows.filter(([, value]) => value !== null && value !== undefined);
    this.root.replaceChildren(
      element("h2", {}, "The circuit"),
      element("dl", {}, ...facts.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, String(value))])),
      this.figures(),
      ...this.notes(),
      ...(data.command ? [element("h3", {}, "Found with"), element("pre", {}, data.command)] : []),
      element("p", { class: "hint" }, "Click a node for its paths, where it looks and what it writes; press ? for help."),
    );
  }

  private notes(): HTMLElement[] {
    const { graph, evidence, missing } = this.circuit.data, omitted = graph.omitted;
    const notes = [...(evidence?.notes ?? [])];
    const hidden = omitted.kept + omitted.shared;
    if (hidden) notes.push(`${hidden.toLocaleString("en")} kept edges of the least effect are not drawn; figures with thresholds lack them`);
    if (omitted.missed) notes.push(`${omitted.missed.toLocaleString("en")} edges of the overlay alone are not drawn`);
    if (omitted.tested) notes.push(`of the removed edges, the ${omitted.tested.toLocaleString("en")} of the least effect are not drawn at any threshold`);
    if (missing) notes.push(`no attention patterns and words: ${missing}`);
    return notes.map((note) => element("p", { class: "note" }, note));
  }

  private figures(): HTMLElement {
    const { figures, run } = this.circuit.data;
    if (!figures["validation"] && !figures["test"]) return element("div");
    const table = element("table", {}, element("tr", {}, ...["", String(run["metric"] ?? "metric"), "accuracy", "logit diff."].map((text) => element("th", {}, text))));
    for (const split of ["validation", "test"]) {
      const part = figures[split];
      if (!part || part.missing !== undefined) continue;
      const name = `${split === "test" ? "held-out prompts" : "prompts used"} (${part.prompts})`;
      table.append(element("tr", {}, element("th", { colspan: "4", class: "split" }, name)));
      for (const which of ["full", "circuit", "corrupted"]) {
        const row = part[which] as Record<string, number | null> | undefined;
        if (!row) continue;
        const values = ["metric", "accuracy", "logit_difference"].map((key) => element("td", {}, number(row[key])));
        table.append(element("tr", {}, element("td", {}, which === "full" ? "full model" : which), ...values));
      }
    }
    return element("div", { class: "wide" }, table);
  }

  /** An edge. */
  edge(edge: Edge): void {
    const { nodes, data } = this.circuit;
    const ends: Child[] = edge.source === null ? [] : [this.nodeButton(edge.source), " → "];
    const rows: [string, string][] = [["Effect", number(edge.effect)], ["Decision", decision(edge)], ["Order of test", edge.order < 0 ? "–" : String(edge.order)], ["Kind", edge.source === null ? `direct, ${edge.kind}` : edge.kind]];
    if (data.graph.overlay) rows.push(["Overlay", STATUS[this.circuit.status(edge)]!]);
    this.root.replaceChildren(
      this.close(), element("h2", {}, edge.name.replace("->", " → ")),
      element("p", {}, ...ends, this.nodeButton(edge.target)),
      element("dl", {}, ...rows.flatMap(([name, value]) => [element("dt", {}, name), element("dd", {}, value)])),
      element("p", { class: "hint" }, `The effect is how much ${data.run["metric"] ?? "the metric"} (minimised) rises when the edge into ${title(nodes[edge.target]!)} is cut.`),
    );
  }

  /** A node: edges in and out, where it looks, what it writes. */
  node(at: number, look: Look): void {
    const node = this.circuit.nodes[at]!, shown = this.circuit.edges.filter((edge) => edge.shown);
    const into = shown.filter((edge) => edge.target === at && edge.source !== null);
    const out = shown.filter((edge) => edge.source === at), direct = shown.filter((edge) => edge.source === null && edge.target === at);
    const upstream = this.circuit.reach([at], false).size - 1, downstream = this.circuit.reach([at], true).size - 1;
    const parts: HTMLElement[] = [
      this.close(), element("h2", {}, title(node)),
      element("p", {}, `Reads ${count(into.length, "edge")}, ${count(upstream, "node")} upstream; feeds ${count(out.length, "edge")}, ${count(downstream, "node")} downstream.`),
    ];
    const links = this.circuit.links.filter(([group, head]) => group === at || head === at).map(([group, head]) => (group === at ? head : group));
    if (links.length) parts.push(element("p", {}, node.kind === "group" ? "Shared by " : "Takes keys and values from ", ...links.flatMap((other, place) => [place ? " " : "", this.nodeButton(other)])));
    if (direct.length) parts.push(this.list("Direct edges", direct, (edge) => edge.kind));
    parts.push(...this.evidence(node.id, look));
    if (into.length) parts.push(this.list("In", into, (edge) => `${this.circuit.nodes[edge.source!]!.id} → ${edge.kind}`));
    if (out.length) parts.push(this.list("Out", out, (edge) => edge.name.split("->")[1]!));
    this.root.replaceChildren(...parts);
    this.root.scrollTop = 0;
  }

  private evidence(id: string, look: Look): HTMLElement[] {
    const shown = this.circuit.data.evidence;
    if (!shown) return [element("p", { class: "note" }, `No attention pattern and words: ${this.circuit.data.missing}`)];
    const parts: HTMLElement[] = [];
    const words = shown.words[id], patterns = shown.patterns[id];
    if (!words && !patterns) return [element("p", { class: "note" }, "No attention pattern and words: the page holds those of the circuit's most relevant nodes alone.")];
    this.example = Math.min(this.example, shown.examples.length - 1);
    const select = element("select", { id: "example", "aria-label": "Example" }) as HTMLSelectElement;
    shown.examples.forEach((example, at) => select.append(element("option", { value: String(at) }, `${at + 1}: ${example.clean.join("").trim()}`)));
    select.value = String(this.example);
    const place = element("div", {});
    const fill = () => {
      this.example = Number(select.value);
      const example = shown.examples[this.example]!;
      const filled: HTMLElement[] = [];
      if (words) filled.push(this.words(words[this.example]!, id, plain(example.clean[example.read] ?? "")));
      if (patterns) {
        const pictures = (["clean", "corrupt"] as Side[]).map((side) => picture(shown, id, this.example, side, look.ink, look.back));
        filled.push(element("h3", {}, "Attention pattern"), element("p", { class: "hint" }, "Queries down, keys across; the stronger a cell, the more attention."), ...pictures);
      }
      place.replaceChildren(...filled);
    };
    select.addEventListener("change", fill);
    fill();
    parts.push(element("label", { class: "example" }, "Example ", select), place);
    return parts;
  }

  private words(of: Record<Side, { up: Word[]; down: Word[] }>, id: string, at: string): HTMLElement {
    const cell = (word: Word | undefined) => (word ? [element("td", { class: "word" }, plain(word[0])), element("td", {}, signed(word[1], id))] : [element("td"), element("td")]);
    const table = element("table", { class: "words" }, element("tr", {}, element("th", { colspan: "2" }, "clean"), element("th", { colspan: "2" }, "corrupted")));
    for (const side of ["up", "down"] as const) {
      const length = Math.max(of.clean[side].length, of.corrupt[side].length);
      for (let row = 0; row < length; row++) table.append(element("tr", row === 0 && side === "down" ? { class: "down" } : {}, ...cell(of.clean[side][row]), ...cell(of.corrupt[side][row])));
    }
    const what = id === "logits" ? `The model's likeliest next words after “${at}”, with probabilities.` : `Logits that it raises and lowers most by itself at “${at}”, against the mean word.`;
    return element("div", {}, element("h3", {}, id === "logits" ? "Next words" : "What it writes"), element("p", { class: "hint" }, what), element("div", { class: "wide" }, table));
  }

  private list(name: string, edges: Edge[], text: (edge: Edge) => string): HTMLElement {
    const sorted = [...edges].sort((a, b) => Math.abs(b.effect ?? 0) - Math.abs(a.effect ?? 0));
    const items = sorted.map((edge) => {
      const button = element("button", { type: "button", class: "row" }, element("span", { class: `kind ${edge.kind}` }, text(edge)), element("span", {}, number(edge.effect)));
      button.addEventListener("click", () => this.picks.edge(edge));
      return element("li", {}, button);
    });
    const list = element("ul", { class: "edges" }, ...items.slice(0, LIST));
    const parts = [element("h3", {}, `${name} (${edges.length})`), list];
    if (items.length > LIST) {
      const more = element("button", { type: "button" }, `all ${items.length}`);
      more.addEventListener("click", () => { list.append(...items.slice(LIST)); more.remove(); });
      parts.push(more);
    }
    return element("section", {}, ...parts);
  }

  private nodeButton(at: number): HTMLElement {
    const button = element("button", { type: "button" }, this.circuit.nodes[at]!.id);
    button.addEventListener("click", () => this.picks.node(at));
    return button;
  }

  private close(): HTMLElement {
    const button = element("button", { type: "button", class: "close", "aria-label": "Back to the circuit" }, "×");
    button.addEventListener("click", () => this.picks.clear());
    return button;
  }
}

function count(n: number, what: string): string { return `${n} ${what}${n === 1 ? "" : "s"}`; }
function signed(value: number, id: string): string { return id === "logits" ? value.toFixed(3) : `${value < 0 ? "−" : "+"}${Math.abs(value).toFixed(2)}`; }
