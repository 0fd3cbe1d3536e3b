// The page's data, and which edges a threshold leaves. Nothing here touches the page.

export type Side = "clean" | "corrupt";
export type Word = [string, number];
export interface NodeFacts { id: string; kind: "embed" | "pos_embed" | "head" | "mlp" | "group" | "logits"; layer: number; index: number }
type Tail = [kind: string, effect: number | null, order: number, decision: number, other: number];
interface Figures { prompts?: number; missing?: string; [name: string]: unknown }
export interface Evidence {
  examples: { clean: string[]; corrupt: string[]; read: number }[];
  patterns: Record<string, Record<Side, string>[]>;
  words: Record<string, Record<Side, { up: Word[]; down: Word[] }>[]>;
  causal: boolean;
  notes: string[];
}
export interface Data {
  run: Record<string, string | number | boolean | null>;
  threshold: number | null;
  scored: boolean; // edges were chosen by scores: an addition edge into a head brings its direct edge along
  command: string | null;
  version: string | null;
  size: { addition: number; addition_total: number; direct: number; direct_total: number; tested: number };
  figures: Record<string, Figures>;
  graph: {
    nodes: NodeFacts[];
    edges: [number, number, ...Tail][];
    direct: [number, ...Tail][];
    links: [number, number][];
    omitted: { kept: number; missed: number; shared: number; tested: number };
    overlay: { name: string; edges: number } | null;
  };
  evidence: Evidence | null;
  missing: string;
}

export const KEPT = 1;
export type Status = "hit" | "miss" | "extra" | "none";

export interface Edge {
  id: string;
  name: string; // m0->a1.0.q
  source: number | null; // null for a direct edge
  target: number;
  kind: string;
  effect: number | null;
  value: number | null; // what is held against the threshold
  order: number;
  decision: number;
  other: boolean;
  shown: boolean; // under the present threshold
}

export class Circuit {
  readonly nodes: NodeFacts[];
  readonly edges: Edge[];
  readonly links: [number, number][];
  readonly foundAt: number | null; // the threshold at which the circuit is as the run left it
  readonly low: number;
  readonly high: number;

  constructor(readonly data: Data) {
    const graph = data.graph;
    this.nodes = graph.nodes;
    this.links = graph.links;
    const absolute = Boolean(data.run["absolute"]);
    const make = (source: number | null, target: number, tail: Tail, id: string): Edge => {
      const [kind, effect, order, decision, other] = tail;
      const value = effect === null ? null : absolute ? Math.abs(effect) : effect;
      const sender = source === null ? "direct" : this.nodes[source]!.id;
      const name = `${sender}->${receiver(this.nodes[target]!, kind)}`;
      return { id, name, source, target, kind, effect, value, order, decision, other: other === 1, shown: false };
    };
    this.edges = [
      ...graph.edges.map(([source, target, ...tail], at) => make(source, target, tail, `e${at}`)),
      ...graph.direct.map(([target, ...tail], at) => make(null, target, tail, `d${at}`)),
    ];
    const values = this.edges.map((edge) => edge.value).filter((value) => value !== null);
    const kept = this.edges.filter((edge) => edge.source !== null && edge.decision === KEPT && edge.value !== null).map((edge) => edge.value!);
    this.foundAt = data.threshold ?? (kept.length ? Math.min(...kept) : null);
    this.high = Math.max(...values, 0);
    const positive = values.filter((value) => value > this.high * 1e-6);
    this.low = positive.length ? Math.min(...positive) : 0;
  }

  /** Sets which edges are shown at a threshold; whole: only those on a path from an embedding to the logits. */
  prune(threshold: number | null, whole: boolean): void {
    for (const edge of this.edges) edge.shown = this.passes(edge, threshold);
    if (this.data.scored && threshold !== null && threshold !== this.foundAt) {
      const fed = new Set(this.edges.filter((edge) => edge.shown && edge.source !== null).map(receiverOf));
      for (const edge of this.edges) if (edge.source === null) edge.shown = fed.has(receiverOf(edge));
    }
    if (!whole) return;
    const start = this.nodes.flatMap((node, at) => (node.kind === "embed" || node.kind === "pos_embed" ? [at] : []));
    const end = this.nodes.flatMap((node, at) => (node.kind === "logits" ? [at] : []));
    const fed = this.reach(start, true), feeding = this.reach(end, false);
    for (const edge of this.edges) {
      const from = edge.source === null ? edge.target : edge.source;
      edge.shown &&= fed.has(from) && feeding.has(edge.target);
    }
  }

  private passes(edge: Edge, threshold: number | null): boolean {
    const kept = edge.decision === KEPT;
    if (threshold === null || this.foundAt === null || threshold === this.foundAt) return kept;
    const enough = edge.value !== null && edge.value >= threshold;
    if (kept) return threshold < this.foundAt || edge.value === null || enough;
    return threshold < this.foundAt && enough;
  }

  /** Nodes reached from some nodes over shown edges, forwards or backwards, those nodes included. */
  reach(from: number[], forward: boolean): Set<number> {
    const next = new Map<number, number[]>();
    const add = (a: number, b: number) => void (next.get(a)?.push(b) ?? next.set(a, [b]));
    for (const edge of this.edges) {
      if (edge.shown && edge.source !== null) forward ? add(edge.source, edge.target) : add(edge.target, edge.source);
    }
    for (const [group, head] of this.links) forward ? add(group, head) : add(head, group);
    const seen = new Set(from), open = [...from];
    for (let at = open.pop(); at !== undefined; at = open.pop()) {
      for (const node of next.get(at) ?? []) if (!seen.has(node)) { seen.add(node); open.push(node); }
    }
    return seen;
  }

  status(edge: Edge): Status {
    if (edge.other) return edge.shown ? "hit" : "miss";
    return edge.shown ? "extra" : "none";
  }

  /** Nodes that a set of edges touches. Heads fed by a group that is touched count, if they write anything. */
  touched(edges: Edge[]): Set<number> {
    const seen = new Set<number>();
    for (const edge of edges) { seen.add(edge.target); if (edge.source !== null) seen.add(edge.source); }
    return seen;
  }
}

function receiver(node: NodeFacts, kind: string): string {
  if (node.kind === "head" || node.kind === "group") return `a${node.layer}.${node.index}.${kind}`;
  return node.id;
}

function receiverOf(edge: Edge): string { return edge.name.split("->")[1]!; }

/** What people call a node. */
export function title(node: NodeFacts): string {
  switch (node.kind) {
    case "head": return `Head ${node.layer}.${node.index}`;
    case "mlp": return `MLP ${node.layer}`;
    case "group": return `Keys and values ${node.layer}.${node.index}`;
    case "embed": return "Embedding";
    case "pos_embed": return "Position embedding";
    case "logits": return "Logits";
  }
}

export function number(value: number | null | undefined): string {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size !== 0 && (size < 1e-3 || size >= 1e5) ? value.toExponential(2) : String(Number(value.toPrecision(4)));
  return text.replace("-", "−");
}

export function decision(edge: Edge): string {
  if (edge.decision === KEPT) return "kept";
  return edge.decision === 0 ? "removed" : "untested";
}
