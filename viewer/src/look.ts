// Colours and the graph's style. The colours are Okabe and Ito's, which the colour-blind can tell apart; whatever a
// colour says is said by a dash or a place as well.
import type { StylesheetJson } from "cytoscape";

export interface Look {
  back: string; ink: string; faint: string; node: string; mlp: string; line: string; mark: string;
  kinds: Record<string, string>;
  status: Record<string, string>;
}
const LIGHT: Look = {
  back: "#ffffff", ink: "#1b1f24", faint: "#c3c9d1", node: "#ffffff", mlp: "#eceff3", line: "#6b7480", mark: "#a83279",
  kinds: { q: "#0072b2", k: "#c65200", v: "#00815f", qkv: "#0072b2", mlp: "#6b7480", logits: "#3d444d" },
  status: { hit: "#0072b2", miss: "#d98200", extra: "#b5478d", none: "#c3c9d1" },
};
const DARK: Look = {
  back: "#14171b", ink: "#e8eaed", faint: "#454c55", node: "#1f242a", mlp: "#2d343c", line: "#98a2ad", mark: "#f28cc8",
  kinds: { q: "#62b8ee", k: "#f0913f", v: "#35cba0", qkv: "#62b8ee", mlp: "#98a2ad", logits: "#cfd4da" },
  status: { hit: "#62b8ee", miss: "#f0a92e", extra: "#ea86c2", none: "#454c55" },
};
export const look = (dark: boolean): Look => (dark ? DARK : LIGHT);
export const DASHES: Record<string, number[]> = { hit: [], extra: [2, 3], miss: [7, 4], none: [] };
export interface Sizes { font: number; radius: number; mlp: [number, number]; end: [number, number]; group: number }

/** Sizes of letters and nodes for a page seen at this zoom: deep models get larger ones, as far as rows have room. */
export function sizes(zoom: number): Sizes {
  const grow = Math.max(1, Math.min(1.85, 0.8 / zoom)), node = Math.min(grow, 1.32);
  return { font: 12 * grow, radius: 17 * node, mlp: [38 * Math.min(grow, 1.6), 24 * node], end: [76 * grow, 26 * node], group: 16 / node };
}

export function style(of: Look, at: Sizes): StylesheetJson {
  return [
    {
      selector: "node",
      style: {
        width: 2 * at.radius, height: 2 * at.radius, label: "data(label)", "font-size": at.font, color: of.ink,
        "font-family": "system-ui, sans-serif", "text-valign": "center", "text-halign": "center",
        "background-color": of.node, "border-width": at.font / 10, "border-color": of.line, "min-zoomed-font-size": 5,
        "overlay-opacity": 0,
      },
    },
    {
      selector: "node.head",
      style: {
        "text-outline-color": of.node, "text-outline-width": at.font > 12 ? 2 : 0,
        "pie-size": "100%", "pie-hole": "78%", "pie-start-angle": "0deg",
        "pie-1-background-color": "data(q)", "pie-1-background-size": 33.3,
        "pie-2-background-color": "data(k)", "pie-2-background-size": 33.3,
        "pie-3-background-color": "data(v)", "pie-3-background-size": 33.4,
      },
    },
    { selector: "node.mlp", style: { shape: "round-rectangle", width: at.mlp[0], height: at.mlp[1], "background-color": of.mlp } },
    { selector: "node.group", style: { shape: "diamond", width: at.group, height: at.group, label: "" } },
    {
      selector: "node.embed, node.pos_embed, node.logits",
      style: { shape: "round-rectangle", width: at.end[0], height: at.end[1], "background-color": of.mlp },
    },
    { selector: "node.unused", style: { width: 8, height: 8, label: "", "border-width": 0, "background-color": of.faint, "pie-size": "0%" } },
    { selector: "node.layer", style: { "background-opacity": 0, "border-width": 0, width: 1, height: 1, color: of.line, events: "no" } },
    {
      selector: "edge.sent",
      style: {
        width: "data(width)", "line-color": "data(colour)", "target-arrow-color": "data(colour)",
        "target-arrow-shape": "triangle", "arrow-scale": 0.7, "curve-style": "unbundled-bezier",
        "control-point-distances": "data(bend)" as unknown as number[], "control-point-weights": [0.5], opacity: 0.75, "overlay-opacity": 0,
      },
    },
    { selector: "edge.link", style: { width: 1, "line-color": of.faint, "target-arrow-shape": "none", "target-arrow-color": of.faint, "curve-style": "straight", events: "no" } },
    { selector: "edge.miss", style: { "line-style": "dashed", "line-dash-pattern": DASHES["miss"]!, "target-arrow-shape": "tee" } },
    { selector: "edge.extra", style: { "line-style": "dashed", "line-dash-pattern": DASHES["extra"]!, "target-arrow-shape": "diamond" } },
    { selector: ".off", style: { display: "none" } },
    { selector: ".dim", style: { opacity: 0.08 } },
    { selector: "node.dim", style: { opacity: 0.25 } },
    { selector: "edge.path", style: { opacity: 1, "z-index": 9 } },
    { selector: "node.match", style: { "border-width": 3, "border-color": of.mark } },
    { selector: "node.chosen", style: { "border-width": 4, "border-color": of.mark } },
    { selector: "edge.chosen", style: { opacity: 1, "z-index": 10, "underlay-color": of.mark, "underlay-opacity": 0.35, "underlay-padding": 3 } },
  ];
}
