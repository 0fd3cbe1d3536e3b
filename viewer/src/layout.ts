// Where nodes stand: layers from bottom to top, heads side by side, the MLP at the right, a little above its heads.
import type { NodeFacts } from "./model";

export interface Point { x: number; y: number }
export interface Laid { places: Map<number, Point>; layers: Map<number, number>; zoom: number; row: number }
const STEP = 46, ROW = 50; // least distances between heads, and between layers
const STRETCH = 6; // how many times as far they may be
const NEAR = 1.3; // small circuits get room rather than huge nodes
const LEFT = 110, RIGHT = 30, ENDS = 44; // for the names of layers, half an MLP, and half of the logits and the embedding

/**
 * Positions of the nodes in `used` (all, unless `compact`), by index; heights of the layers and the distance between
 * them; and the zoom at which all of it fills a box of this size.
 */
export function layout(nodes: NodeFacts[], used: Set<number>, compact: boolean, box: { width: number; height: number }): Laid {
  const places = new Map<number, Point>(), heights = new Map<number, number>();
  const layers = new Map<number, number[]>();
  nodes.forEach((node, at) => {
    if (used.has(at) || !compact) layers.set(node.layer, [...(layers.get(node.layer) ?? []), at]);
  });
  const rows = [...layers.keys()].sort((a, b) => a - b);
  const of = (row: number, ...kinds: string[]) => (layers.get(row) ?? []).filter((at) => kinds.includes(nodes[at]!.kind));
  const widest = Math.max(1, ...rows.map((row) => of(row, "head").length));
  const steps = widest - 1 + Math.max(1, 64 / STEP), gaps = Math.max(1, rows.length - 1);
  const zoom = Math.min(NEAR, box.width / (steps * STEP + LEFT + RIGHT), box.height / (gaps * ROW + ENDS));
  const step = Math.max(STEP, Math.min(STRETCH * STEP, (box.width / zoom - LEFT - RIGHT) / Math.max(steps, widest)));
  const height = Math.max(ROW, Math.min(STRETCH * ROW, (box.height / zoom - ENDS) / gaps));
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
  return { places, layers: heights, zoom, row: height };
}

/** How far an edge's middle is bent aside: edges up one column would lie on top of each other. row: between layers. */
export function bend(from: Point, to: Point, kind: string, row: number): number {
  const across = to.x - from.x, up = ((from.y - to.y) * ROW) / row;
  const fan = { q: -9, k: 0, v: 9 }[kind] ?? 0;
  if (Math.abs(across) < STEP / 2) return up <= ROW * 1.5 ? fan : 14 + up / 9 + fan;
  return Math.sign(across) * Math.min(30, up / 30) + fan;
}

/** Left of the nodes, for the names of layers in letters of this size. */
export function margin(places: Map<number, Point>, font: number): number {
  return Math.min(...[...places.values()].map((place) => place.x)) - 34 - 2.3 * font;
}
