// The graph as it stands, as an SVG drawing with title and legend. Written from positions, without the canvas.
import type { Core, EdgeSingular, NodeSingular } from "cytoscape";
import { DASHES, type Look, type Sizes } from "./look";

const PAD = 24, HEAD = 44;

const escape = (text: string) => text.replace(/[<>&"]/g, (c) => `&#${c.charCodeAt(0)};`).replace(/[\u0000-\u0008\u000b\u000c\u000e-\u001f]/g, "�");
const round = (value: number) => Number(value.toFixed(1));

/** legend: colour, dash and text of its entries. */
export function drawing(cy: Core, look: Look, sizes: Sizes, title: string, subtitle: string, legend: [string, number[], string][]): string {
  const shown = cy.elements().filter((item) => item.visible() && !item.hasClass("off"));
  const box = shown.boundingBox({});
  const width = Math.max(box.w, 420) + 2 * PAD, height = box.h + 2 * PAD + HEAD + 26;
  const dx = PAD - box.x1 + (Math.max(box.w, 420) - box.w) / 2, dy = PAD + HEAD - box.y1;
  const colours = [...new Set([...legend.map(([colour]) => colour), ...shown.edges().map((edge) => colourOf(edge, look))])];
  const marker = (colour: string) => `m${colours.indexOf(colour)}`;
  const parts = [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${round(width)}" height="${round(height)}" viewBox="0 0 ${round(width)} ${round(height)}" font-family="system-ui, sans-serif">`,
    `<title>${escape(title)}</title>`,
    `<defs>${colours.map((colour) => `<marker id="${marker(colour)}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0L8 4L0 8z" fill="${colour}"/></marker>`).join("")}</defs>`,
    `<rect width="100%" height="100%" fill="${look.back}"/>`,
    `<text x="${PAD}" y="26" font-size="15" font-weight="600" fill="${look.ink}">${escape(title)}</text>`,
    `<text x="${PAD}" y="44" font-size="11" fill="${look.line}">${escape(subtitle)}</text>`,
    `<g transform="translate(${round(dx)} ${round(dy)})">`,
    ...shown.edges().map((edge) => path(edge, look, marker)),
    ...shown.nodes().map((node) => shape(node, look, sizes)),
    "</g>", `<g font-size="11" fill="${look.ink}">`,
  ];
  let x = PAD;
  const y = height - 16;
  for (const [colour, dash, text] of legend) {
    parts.push(`<path d="M${x} ${y - 4}h26" stroke="${colour}" stroke-width="2.5"${dashes(dash)}/><text x="${x + 32}" y="${y}">${escape(text)}</text>`);
    x += 32 + 6.4 * text.length + 18;
  }
  return [...parts, "</g></svg>"].join("\n");
}

function colourOf(edge: EdgeSingular, look: Look): string {
  return edge.hasClass("link") ? look.faint : String(edge.data("colour"));
}

function dashes(dash: number[]): string { return dash.length ? ` stroke-dasharray="${dash.join(" ")}"` : ""; }

function path(edge: EdgeSingular, look: Look, marker: (colour: string) => string): string {
  const from = edge.sourceEndpoint(), to = edge.targetEndpoint(), colour = colourOf(edge, look);
  const middle = edge.controlPoints()?.[0];
  const curve = middle ? `Q${round(middle.x)} ${round(middle.y)} ` : "L";
  const link = edge.hasClass("link"), status = ["miss", "extra"].find((name) => edge.hasClass(name)) ?? "hit";
  return `<path d="M${round(from.x)} ${round(from.y)}${curve}${round(to.x)} ${round(to.y)}" fill="none" stroke="${colour}" stroke-width="${link ? 1 : round(Number(edge.data("width")))}" opacity="${edge.hasClass("dim") ? 0.08 : 0.8}"${dashes(DASHES[status]!)}${link ? "" : ` marker-end="url(#${marker(colour)})"`}><title>${escape(String(edge.data("name") ?? ""))}</title></path>`;
}

function shape(node: NodeSingular, look: Look, { font, radius, mlp, end, group }: Sizes): string {
  const { x, y } = node.position();
  const halo = node.hasClass("head") && font > 12 ? ` stroke="${look.node}" stroke-width="3" paint-order="stroke"` : "";
  const at = (text: string) => `<text x="${round(x)}" y="${round(y + font * 0.35)}" font-size="${round(font)}" text-anchor="middle" fill="${node.hasClass("layer") ? look.line : look.ink}"${halo}>${escape(text)}</text>`;
  const label = String(node.data("label") ?? "");
  if (node.hasClass("layer")) return at(label);
  if (node.hasClass("unused")) return `<circle cx="${round(x)}" cy="${round(y)}" r="4" fill="${look.faint}"/>`;
  const line = `fill="${node.hasClass("mlp") || node.hasClass("embed") || node.hasClass("logits") || node.hasClass("pos_embed") ? look.mlp : look.node}" stroke="${look.line}" stroke-width="${round(font / 10)}"`;
  const faded = node.hasClass("dim") ? ' opacity="0.3"' : "";
  if (node.hasClass("group")) return `<g${faded}><path d="M${round(x)} ${round(y - group / 2)}l${round(group / 2)} ${round(group / 2)}l${round(-group / 2)} ${round(group / 2)}l${round(-group / 2)} ${round(-group / 2)}z" ${line}/></g>`;
  if (!node.hasClass("head")) {
    const [w, h] = node.hasClass("mlp") ? mlp : end;
    return `<g${faded}><rect x="${round(x - w / 2)}" y="${round(y - h / 2)}" width="${round(w)}" height="${round(h)}" rx="5" ${line}/>${at(label)}</g>`;
  }
  const ring = radius - 2, third = (2 * Math.PI * ring) / 3;
  const arcs = ["q", "k", "v"].map((kind, place) => {
    const colour = String(node.data(kind));
    if (colour === look.node) return "";
    return `<circle cx="${round(x)}" cy="${round(y)}" r="${ring}" fill="none" stroke="${colour}" stroke-width="3.3" stroke-dasharray="${round(third)} ${round(3 * third)}" transform="rotate(${place * 120 - 90} ${round(x)} ${round(y)})"/>`;
  });
  return `<g${faded}><circle cx="${round(x)}" cy="${round(y)}" r="${round(radius)}" ${line}/>${arcs.join("")}${at(label)}</g>`;
}

/** Hands a file to the browser's downloads. */
export function download(name: string, content: Blob): void {
  const link = document.createElement("a");
  link.href = URL.createObjectURL(content);
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

/** An SVG drawing as PNG, twice as fine as the screen's pixels or as large as browsers allow. */
export async function png(svg: string): Promise<Blob> {
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const scale = Math.min(2, 8000 / Math.max(image.width, image.height));
  const canvas = document.createElement("canvas");
  canvas.width = Math.round(image.width * scale); canvas.height = Math.round(image.height * scale);
  canvas.getContext("2d")!.drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done, fail) => canvas.toBlob((blob) => (blob ? done(blob) : fail(new Error("no picture"))), "image/png"));
}
