// Where nodes stand: layers from bottom to top, heads side by side, the MLP at the right, a little above its heads.
import type { NodeFacts } from "./model";

export interface Point { x: number; y: number }
export interface Laid { places: Map<number, Point>; layers: Map<number, number>; zoom: number; row: number }
const STEP = 46, ROW = 50; // least distances between heads, and between layers
const STRETCH = 6; // how many times as far they may be
const LANES = 5; // columns of heads, if there are heads enough for them
const FURTHEST = 72; // that an edge is bent aside to go round nodes
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
  const last = (kind: string) => Math.max(0, ...nodes.filter((node) => node.kind === kind).map((node) => node.index));
  const lastHead = last("head"), share = (lastHead + 1) / (last("group") + 1); // share: heads that one group feeds
  const rows = [...layers.keys()].sort((a, b) => a - b);
  const of = (row: number, ...kinds: string[]) => (layers.get(row) ?? []).filter((at) => kinds.includes(nodes[at]!.kind));
  const heads = nodes.filter((node, at) => node.kind === "head" && (used.has(at) || !compact));
  const widest = Math.max(Math.min(LANES, new Set(heads.map((node) => node.index)).size), ...rows.map((row) => of(row, "head").length), 1);
  const steps = widest - 1 + Math.max(1, 64 / STEP), gaps = Math.max(1, rows.length - 1);
  const zoom = Math.min(NEAR, box.width / (steps * STEP + LEFT + RIGHT), box.height / (gaps * ROW + ENDS));
  const step = Math.max(STEP, Math.min(STRETCH * STEP, (box.width / zoom - LEFT - RIGHT) / Math.max(steps, widest)));
  const height = Math.max(ROW, Math.min(STRETCH * ROW, (box.height / zoom - ENDS) / gaps));
  const side = ((widest - 1) / 2) * step + Math.max(64, step);
  rows.forEach((row, level) => {
    const y = -level * height, beside = of(row, "head"), groups = of(row, "group");
    heights.set(row, y);
    const line = (items: number[], apart: number) =>
      items.forEach((item, place) => places.set(item, { x: (place - (items.length - 1) / 2) * apart, y }));
    lanes(beside.map((at) => nodes[at]!.index), lastHead, widest).forEach((lane, place) =>
      places.set(beside[place]!, { x: (lane - (widest - 1) / 2) * step, y }));
    for (const at of groups) {
      const fed = beside.filter((head) => Math.floor(nodes[head]!.index / share) === nodes[at]!.index);
      places.set(at, { x: fed.reduce((sum, head) => sum + places.get(head)!.x, 0) / Math.max(1, fed.length), y: y + height * 0.46 });
    }
    line(of(row, "embed", "pos_embed", "logits"), Math.max(100, step));
    for (const at of of(row, "mlp")) places.set(at, { x: side, y: y - height * 0.4 });
  });
  return { places, layers: heights, zoom, row: height };
}

/**
 * Which of `count` lanes the nodes with these rising indices (of 0 to `last`) stand in: left or right as in a whole
 * layer, each in its own, so that heads alone in their layers do not all stand in one column with their edges.
 */
function lanes(indices: number[], last: number, count: number): number[] {
  const found: number[] = [];
  for (const index of indices) found.push(Math.max(Math.round((index / Math.max(1, last)) * (count - 1)), (found.at(-1) ?? -1) + 1));
  return found.map((lane, place) => Math.min(lane, count - found.length + place));
}

/** How far an edge's middle is bent aside: edges up one column would lie on top of each other. row: between layers. */
export function bend(from: Point, to: Point, kind: string, row: number): number {
  const across = to.x - from.x, up = ((from.y - to.y) * ROW) / row;
  const fan = { q: -9, k: 0, v: 9 }[kind] ?? 0;
  if (Math.abs(across) < STEP / 2) return up <= ROW * 1.5 ? fan : 14 + up / 9 + fan;
  return Math.sign(across) * Math.min(30, up / 30) + fan;
}

/** A place that edges go round: its centre and how far off they keep. */
interface Obstacle extends Point { radius: number }

/**
 * The bend nearest to `wanted` with which an edge touches the fewest nodes: one that ran behind a node would look like
 * two, into it and out of it. The ends do not count; they are of `obstacles`, too.
 */
export function around(from: Point, to: Point, wanted: number, obstacles: Obstacle[]): number {
  const x = to.x - from.x, y = to.y - from.y, length = Math.hypot(x, y);
  const near: [off: number, rise: number, radius: number][] = []; // aside of the chord, the curve's rise there per bend
  for (const place of obstacles) {
    const along = ((place.x - from.x) * x + (place.y - from.y) * y) / (length * length);
    const off = ((place.y - from.y) * x - (place.x - from.x) * y) / length;
    const end = Math.min(along, 1 - along) * length < place.radius / 2;
    if (!end && Math.abs(off) < place.radius + FURTHEST) near.push([off, 2 * along * (1 - along), place.radius]);
  }
  const touched = (bend: number) => near.filter(([off, rise, radius]) => Math.abs(off - rise * bend) < radius).length;
  let best = wanted, least = touched(wanted);
  for (let aside = 12; least && aside <= FURTHEST; aside += 12) {
    for (const bend of [wanted + aside, wanted - aside]) {
      const count = touched(bend);
      if (count < least) [best, least] = [bend, count];
    }
  }
  return best;
}

/** Left of the nodes, for the names of layers in letters of this size. */
export function margin(places: Map<number, Point>, font: number): number {
  return Math.min(...[...places.values()].map((place) => place.x)) - 34 - 2.3 * font;
}
