// Where nodes stand: layers from bottom to top, heads side by side, the MLP at the right, a little above its heads.
import type { NodeFacts } from "./model";

export interface Point { x: number; y: number }
const STEP = 46, ROW = 50, GROUPED = 50; // between heads, between layers, and where groups stand between them
const STRETCH = 4;

/**
 * Positions of the nodes in `used` (all, unless `compact`), by index, and heights of the layers; stretched towards
 * width / height = `aspect`.
 */
export function layout(nodes: NodeFacts[], used: Set<number>, compact: boolean, aspect: number): { places: Map<number, Point>; layers: Map<number, number> } {
  const places = new Map<number, Point>(), heights = new Map<number, number>();
  const layers = new Map<number, number[]>();
  nodes.forEach((node, at) => {
    if (used.has(at) || !compact) layers.set(node.layer, [...(layers.get(node.layer) ?? []), at]);
  });
  const rows = [...layers.keys()].sort((a, b) => a - b);
  const of = (row: number, ...kinds: string[]) => (layers.get(row) ?? []).filter((at) => kinds.includes(nodes[at]!.kind));
  const widest = Math.max(1, ...rows.map((row) => of(row, "head").length));
  const grouped = rows.some((row) => of(row, "group").length);
  const ratio = (STEP * (widest + 2.5)) / ((grouped ? GROUPED : ROW) * rows.length);
  const step = STEP * Math.max(1, Math.min(STRETCH, aspect / ratio));
  const height = (grouped ? GROUPED : ROW) * Math.max(1, Math.min(STRETCH, ratio / aspect));
  const side = ((widest - 1) / 2) * step + Math.max(64, step);
  rows.forEach((row, level) => {
    const y = -level * height, heads = of(row, "head"), groups = of(row, "group");
    heights.set(row, y);
    const line = (items: number[], at: number, apart: number) =>
      items.forEach((item, place) => places.set(item, { x: (place - (items.length - 1) / 2) * apart, y: at }));
    line(heads, y, step);
    line(groups, y + height * 0.46, groups.length ? step * Math.max(1, heads.length / groups.length) : step);
    line(of(row, "embed", "pos_embed", "logits"), y, Math.max(100, step));
    for (const at of of(row, "mlp")) places.set(at, { x: side, y: y - height * 0.4 });
  });
  return { places, layers: heights };
}

/** How far an edge's middle is bent aside: edges up one column would lie on top of each other. */
export function bend(from: Point, to: Point, kind: string): number {
  const across = to.x - from.x, up = from.y - to.y;
  const fan = { q: -9, k: 0, v: 9 }[kind] ?? 0;
  if (Math.abs(across) < STEP / 2) return up <= ROW * 1.5 ? fan : 14 + up / 9 + fan;
  return Math.sign(across) * Math.min(30, up / 30) + fan;
}

/** Left of the nodes, for the names of layers. */
export function margin(places: Map<number, Point>): number {
  return Math.min(...[...places.values()].map((place) => place.x)) - 62;
}
