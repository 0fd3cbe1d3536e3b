// Where nodes stand: layers from bottom to top, heads side by side, the MLP at the right, a little above its heads.
import type { NodeFacts } from "./model";

export interface Point { x: number; y: number }
const STEP = 48, ROW = 96;

/** Positions of the nodes in `used`, by index. Rows close up where nothing is left; so do heads if `compact`. */
export function layout(nodes: NodeFacts[], used: Set<number>, compact: boolean): Map<number, Point> {
  const places = new Map<number, Point>();
  const layers = new Map<number, number[]>();
  nodes.forEach((node, at) => {
    if (used.has(at) || !compact) layers.set(node.layer, [...(layers.get(node.layer) ?? []), at]);
  });
  const rows = [...layers.keys()].sort((a, b) => a - b);
  const heads = (row: number) => (layers.get(row) ?? []).filter((at) => nodes[at]!.kind === "head");
  const widest = Math.max(1, ...rows.map((row) => heads(row).length));
  const side = (widest / 2) * STEP + 36;
  rows.forEach((row, level) => {
    const y = -level * ROW, inRow = layers.get(row) ?? [];
    const some = heads(row), groups = inRow.filter((at) => nodes[at]!.kind === "group");
    const line = (items: number[], height: number, step: number) =>
      items.forEach((at, place) => places.set(at, { x: (place - (items.length - 1) / 2) * step, y: height }));
    line(some, y, STEP);
    line(groups, y + 36, STEP * Math.max(1, groups.length ? some.length / groups.length : 1));
    line(inRow.filter((at) => ["embed", "pos_embed", "logits"].includes(nodes[at]!.kind)), y, STEP * 2.5);
    for (const at of inRow) if (nodes[at]!.kind === "mlp") places.set(at, { x: side, y: y - 34 });
  });
  return places;
}

/** How far an edge's middle is bent aside: edges up one column would lie on top of each other. */
export function bend(from: Point, to: Point, kind: string): number {
  const across = to.x - from.x, up = from.y - to.y;
  const fan = { q: -9, k: 0, v: 9 }[kind] ?? 0;
  if (Math.abs(across) < STEP / 2) return up <= ROW ? fan : 14 + up / 9 + fan;
  return Math.sign(across) * Math.min(30, up / 30) + fan;
}

/** Left of the nodes, for the names of layers. */
export function margin(places: Map<number, Point>): number {
  return Math.min(...[...places.values()].map((place) => place.x)) - 62;
}
