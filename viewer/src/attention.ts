// A head's attention pattern as a picture: queries down, keys across, the darker the more attention.
import type { Evidence, Side } from "./model";

export interface Pattern { size: number; at(query: number, key: number): number }

/** Shares of attention from bytes in base64; of a causal model only the lower triangle is stored. */
export function unpack(packed: string, size: number, causal: boolean): Pattern {
  const bytes = atob(packed);
  const place = (query: number, key: number) => (causal ? (query * (query + 1)) / 2 + key : query * size + key);
  const at = (query: number, key: number) => (causal && key > query ? 0 : bytes.charCodeAt(place(query, key)) / 255);
  return { size, at };
}

export function plain(token: string): string {
  return token.replace(/\n/g, "⏎").replace(/^ /, "·") || "∅";
}

/** A figure with the pattern of one prompt and, below, what lies under the pointer or where the head looks most. */
export function picture(shown: Evidence, head: string, example: number, side: Side, ink: string, back: string): HTMLElement {
  const tokens = shown.examples[example]![side].map(plain);
  const read = shown.examples[example]!.read;
  const pattern = unpack(shown.patterns[head]![example]![side], tokens.length, shown.causal);
  const figure = document.createElement("figure");
  const canvas = document.createElement("canvas");
  const caption = document.createElement("figcaption");
  const font = "10px system-ui, sans-serif";
  const pen = canvas.getContext("2d")!;
  pen.font = font;
  const short = tokens.map((token) => (token.length > 11 ? `${token.slice(0, 10)}…` : token));
  const label = Math.ceil(Math.max(...short.map((text) => pen.measureText(text).width))) + 6;
  const cell = Math.max(3, Math.min(18, Math.floor((312 - label) / tokens.length)));
  const every = Math.ceil(11 / cell);
  const width = label + cell * tokens.length + 2, height = width;
  const sharp = Math.max(1, window.devicePixelRatio || 1);
  canvas.width = width * sharp; canvas.height = height * sharp;
  canvas.style.width = `${width}px`; canvas.style.height = `${height}px`;
  pen.scale(sharp, sharp);
  pen.font = font;
  pen.fillStyle = back; pen.fillRect(0, 0, width, height);
  pen.fillStyle = ink; pen.textBaseline = "middle";
  short.forEach((text, at) => {
    if (at % every && at !== read) return;
    const middle = label + (at + 0.5) * cell;
    pen.textAlign = "right"; pen.fillText(text, label - 4, middle);
    pen.save(); pen.translate(middle, label - 4); pen.rotate(-Math.PI / 2); pen.textAlign = "left"; pen.fillText(text, 0, 0); pen.restore();
  });
  for (let query = 0; query < tokens.length; query++) {
    for (let key = 0; key < tokens.length; key++) {
      const share = pattern.at(query, key);
      if (share === 0) continue;
      pen.globalAlpha = Math.sqrt(share);
      pen.fillRect(label + key * cell, label + query * cell, cell - (cell > 5 ? 1 : 0), cell - (cell > 5 ? 1 : 0));
    }
  }
  pen.globalAlpha = 1; pen.strokeStyle = ink; pen.lineWidth = 0.6;
  pen.strokeRect(label - 0.5, label - 0.5, cell * tokens.length + 0.5, cell * tokens.length + 0.5);
  const rest = most(tokens, read, pattern);
  caption.textContent = rest;
  canvas.setAttribute("role", "img");
  canvas.setAttribute("aria-label", `Attention pattern, ${side === "clean" ? "clean" : "corrupted"} prompt. ${rest}`);
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    const key = Math.floor((event.clientX - box.left - label) / cell), query = Math.floor((event.clientY - box.top - label) / cell);
    const inside = key >= 0 && query >= 0 && key < tokens.length && query < tokens.length;
    caption.textContent = inside ? `“${tokens[query]}” looks at “${tokens[key]}”: ${pattern.at(query, key).toFixed(2)}` : rest;
  });
  canvas.addEventListener("pointerleave", () => { caption.textContent = rest; });
  const name = document.createElement("h4");
  name.textContent = side === "clean" ? "Clean prompt" : "Corrupted prompt";
  figure.append(name, canvas, caption);
  return figure;
}

function most(tokens: string[], query: number, pattern: Pattern): string {
  const keys = tokens.map((token, key) => ({ token, share: pattern.at(query, key) })).sort((a, b) => b.share - a.share);
  const best = keys.slice(0, 3).filter((key) => key.share >= 0.05).map((key) => `“${key.token}” ${key.share.toFixed(2)}`);
  return `“${tokens[query]}” looks at ${best.join(", ") || "nothing in particular"}`;
}
