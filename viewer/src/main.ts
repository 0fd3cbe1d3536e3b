// Brings data, graph, controls and panel together.
import cytoscape, { type Core } from "cytoscape";
import { around, bend, layout, margin, type Point } from "./layout";
import { DASHES, look, type Look, sizes, type Sizes, style } from "./look";
import { Circuit, type Data, type Edge, decision, KEPT, number, title } from "./model";
import { element, Panel } from "./panel";
import { download, drawing, png } from "./svg";

const get = <T extends HTMLElement>(id: string) => document.getElementById(id) as T;
const SMOOTH = 700; // edges above which the picture is moved as a whole while it is dragged
const EDGE = 16; // pixels around the picture
const WIDE = 220; // nodes above which unused ones are left out at first

class Viewer {
  readonly cy: Core;
  private readonly panel: Panel;
  private readonly byId = new Map<string, Edge>();
  private look: Look;
  private sizes: Sizes = sizes(1);
  private dark = matchMedia("(prefers-color-scheme: dark)").matches;
  private threshold: number | null;
  private chosen: { node: number } | { edge: Edge } | null = null;
  private placed = new Set<number>();
  private places = new Map<number, Point>();
  private readonly overlay: boolean;
  private matches = new Set<number>();

  constructor(private readonly circuit: Circuit) {
    const graph = circuit.data.graph;
    this.overlay = graph.overlay !== null;
    this.threshold = circuit.foundAt;
    this.look = look(this.dark);
    for (const edge of circuit.edges) this.byId.set(edge.id, edge);
    const largest = Math.max(...circuit.edges.map((edge) => Math.abs(edge.effect ?? 0)), 1e-12);
    const width = (edge: Edge) => 1 + 5 * Math.sqrt(Math.abs(edge.effect ?? 0) / largest);
    get<HTMLInputElement>("unused").checked = circuit.nodes.length <= WIDE;
    this.cy = cytoscape({
      container: get("graph"),
      elements: [
        ...circuit.nodes.map((node, at) => ({ data: { id: `n${at}`, label: label(node.id), q: "#ffffff", k: "#ffffff", v: "#ffffff" }, classes: node.kind })),
        ...circuit.edges.filter((edge) => edge.source !== null).map((edge) => ({
          data: { id: edge.id, name: edge.name, source: `n${edge.source}`, target: `n${edge.target}`, width: width(edge), colour: "#888888", bend: 0 }, classes: "sent",
        })),
        ...circuit.links.map(([group, head], at) => ({ data: { id: `l${at}`, source: `n${group}`, target: `n${head}` }, classes: "link" })),
      ],
      style: [], // set with the theme
      layout: { name: "preset" },
      minZoom: 0.05, maxZoom: 6,
      autoungrabify: true, boxSelectionEnabled: false, selectionType: "single",
      textureOnViewport: circuit.edges.length > SMOOTH,
    });
    this.panel = new Panel(get("panel"), circuit, { node: (at) => this.choose({ node: at }, true), edge: (edge) => this.choose({ edge }), clear: () => this.choose(null) });
    this.words();
    this.controls();
    this.pointer();
    this.keyboard();
    this.theme(this.dark);
    this.fit();
  }

  /** Lays the nodes out for the box as it is now, and shows all of them. */
  private fit(): void {
    this.cy.resize();
    this.arrange();
    this.cy.fit(undefined, EDGE);
  }

  private words(): void {
    const { run, size, graph } = this.circuit.data;
    const name = (value: unknown) => String(value ?? "").replace(/^object:/, "").split("/").pop()!;
    const heading = `${name(run["model"])}, ${name(run["task"])}`;
    document.title = `${heading}: circuit`;
    get("title").textContent = heading;
    const size_ = `${size.addition.toLocaleString("en")} of ${size.addition_total.toLocaleString("en")} addition and ${size.direct.toLocaleString("en")} of ${size.direct_total.toLocaleString("en")} direct edges`;
    get("subtitle").textContent = `${run["method"]}, ${run["metric"]}: ${size_}${graph.overlay ? `; overlay: ${graph.overlay.name}` : ""}`;
  }

  // ---- what is shown

  /** Shows the edges that the threshold leaves. */
  prune(): void {
    const { circuit, cy } = this;
    circuit.prune(this.threshold, get<HTMLInputElement>("whole").checked);
    const drawn = circuit.edges.filter((edge) => edge.shown || (this.overlay && edge.other));
    const used = circuit.touched(drawn);
    for (const [group, head] of circuit.links) if (used.has(head)) used.add(group);
    circuit.nodes.forEach((node, at) => { if (node.kind === "embed" || node.kind === "logits") used.add(at); });
    const grown = [...used].some((at) => !this.placed.has(at));
    for (const at of used) this.placed.add(at);
    cy.batch(() => {
      const visible = new Set(drawn.map((edge) => edge.id));
      const keepUnused = get<HTMLInputElement>("unused").checked;
      for (const edge of circuit.edges) {
        if (edge.source === null) continue;
        const item = cy.getElementById(edge.id), status = circuit.status(edge);
        item.toggleClass("off", !visible.has(edge.id));
        item.toggleClass("miss", this.overlay && status === "miss").toggleClass("extra", this.overlay && status === "extra");
        const colour = this.colour(edge);
        if (item.data("colour") !== colour) item.data("colour", colour);
      }
      circuit.nodes.forEach((_, at) => cy.getElementById(`n${at}`).toggleClass("unused", !used.has(at)).toggleClass("off", !used.has(at) && !keepUnused && !this.placed.has(at)));
      circuit.links.forEach(([, head], at) => cy.getElementById(`l${at}`).toggleClass("off", !used.has(head)));
      this.rings();
    });
    if (grown || !this.places.size) this.arrange();
    this.count();
    this.highlight();
  }

  private colour(edge: Edge): string {
    const byStatus = this.overlay && get<HTMLSelectElement>("colour").value === "overlay";
    return byStatus ? this.look.status[this.circuit.status(edge)]! : this.look.kinds[edge.kind] ?? this.look.line;
  }

  /** Direct edges as thirds of a head's ring. */
  private rings(): void {
    const colours = new Map<string, string>();
    for (const edge of this.circuit.edges) {
      if (edge.source === null && (edge.shown || (this.overlay && edge.other))) {
        for (const kind of edge.kind === "qkv" ? ["q", "k", "v"] : [edge.kind]) colours.set(`${edge.target} ${kind}`, this.colour(edge));
      }
    }
    this.circuit.nodes.forEach((node, at) => {
      if (node.kind === "head") for (const kind of ["q", "k", "v"]) {
        const item = this.cy.getElementById(`n${at}`), colour = colours.get(`${at} ${kind}`) ?? this.look.node;
        if (item.data(kind) !== colour) item.data(kind, colour);
      }
    });
  }

  private arrange(): void {
    const { cy, circuit } = this;
    const box = get("graph"), size = { width: Math.max(200, box.clientWidth - 2 * EDGE), height: Math.max(200, box.clientHeight - 2 * EDGE) };
    const laid = layout(circuit.nodes, this.placed, !get<HTMLInputElement>("unused").checked, size);
    this.places = laid.places;
    const fitting = sizes(laid.zoom);
    if (fitting.font !== this.sizes.font) {
      this.sizes = fitting;
      cy.style(style(this.look, fitting));
    }
    cy.batch(() => {
      cy.remove("node.layer");
      const left = margin(this.places, this.sizes.font);
      circuit.nodes.forEach((_, at) => {
        const place = this.places.get(at);
        if (place) cy.getElementById(`n${at}`).position(place);
      });
      for (const [layer, y] of laid.layers) {
        if (layer >= 0 && !circuit.nodes.some((node) => node.kind === "logits" && node.layer === layer)) {
          cy.add({ data: { id: `layer${layer}`, label: `layer ${layer}` }, classes: "layer", position: { x: left, y } });
        }
      }
      const { radius, mlp, group } = this.sizes, keep: Record<string, number> = { head: radius, mlp: (mlp[0] + mlp[1]) / 4, group: group / 2 };
      const obstacles = [...this.places].map(([at, place]) => ({ ...place, radius: 5 + (keep[circuit.nodes[at]!.kind] ?? radius) }));
      for (const edge of circuit.edges) {
        const from = edge.source === null ? undefined : this.places.get(edge.source), to = this.places.get(edge.target);
        if (from && to) cy.getElementById(edge.id).data("bend", around(from, to, bend(from, to, edge.kind, laid.row), obstacles));
      }
    });
  }

  private count(): void {
    const { circuit } = this, graph = circuit.data.graph;
    const shown = circuit.edges.filter((edge) => edge.shown);
    const direct = shown.filter((edge) => edge.source === null).length;
    let text = `${(shown.length - direct).toLocaleString("en")} addition, ${direct.toLocaleString("en")} direct edges`;
    if (graph.overlay) {
      const hits = shown.filter((edge) => edge.other).length;
      const share = (part: number, whole: number) => (whole ? (part / whole).toFixed(2) : "–");
      text += `; ${hits} hits, ${graph.overlay.edges - hits} misses, ${shown.length - hits} extras, precision ${share(hits, shown.length)}, recall ${share(hits, graph.overlay.edges)}`;
    }
    get("count").textContent = text;
  }

  // ---- selection

  choose(what: { node: number } | { edge: Edge } | null, centre = false): void {
    this.chosen = what;
    this.highlight();
    if (what === null) this.panel.run();
    else if ("edge" in what) this.panel.edge(what.edge);
    else {
      this.panel.node(what.node, this.look);
      const item = this.cy.getElementById(`n${what.node}`);
      const at = item.renderedPosition(), box = get("graph");
      if (centre && (at.x < 20 || at.y < 20 || at.x > box.clientWidth - 20 || at.y > box.clientHeight - 20)) this.cy.center(item);
    }
  }

  /** Marks the selection with its paths in and out; everything else fades. */
  private highlight(): void {
    const { cy, circuit, chosen } = this;
    cy.batch(() => {
      cy.elements().removeClass("dim path chosen match");
      for (const at of this.matches) cy.getElementById(`n${at}`).addClass("match");
      if (chosen === null) return;
      const start = "node" in chosen ? [[chosen.node], [chosen.node]] : [[chosen.edge.source ?? chosen.edge.target], [chosen.edge.target]];
      const before = circuit.reach(start[0]!, false), after = circuit.reach(start[1]!, true);
      cy.elements().addClass("dim");
      cy.$("node.layer").removeClass("dim");
      for (const at of [...before, ...after]) cy.getElementById(`n${at}`).removeClass("dim");
      for (const edge of circuit.edges) {
        if (edge.source === null || !edge.shown) continue;
        if ((before.has(edge.source) && before.has(edge.target)) || (after.has(edge.source) && after.has(edge.target))) cy.getElementById(edge.id).removeClass("dim").addClass("path");
      }
      circuit.links.forEach(([group, head], at) => {
        if ((before.has(group) && before.has(head)) || (after.has(group) && after.has(head))) cy.getElementById(`l${at}`).removeClass("dim");
      });
      const item = cy.getElementById("node" in chosen ? `n${chosen.node}` : chosen.edge.source === null ? `n${chosen.edge.target}` : chosen.edge.id);
      item.removeClass("dim").addClass("chosen");
    });
  }

  private pointer(): void {
    const { cy, circuit } = this, tip = get("tip");
    const at = (id: string) => Number(id.slice(1));
    cy.on("tap", (event) => {
      if (event.target === cy) return this.choose(null);
      const id = String(event.target.id());
      if (id.startsWith("n")) this.choose({ node: at(id) });
      else if (this.byId.has(id)) this.choose({ edge: this.byId.get(id)! });
    });
    cy.on("mouseover", "node, edge", (event) => {
      const id = String(event.target.id()), edge = this.byId.get(id);
      if (!edge && !id.startsWith("n")) return;
      tip.textContent = edge ? this.aboutEdge(edge) : this.aboutNode(at(id));
      tip.hidden = false;
    });
    cy.on("mousemove", (event) => {
      const { x, y } = event.renderedPosition, box = get("graph");
      tip.style.left = `${Math.max(4, Math.min(x + 14, box.clientWidth - tip.offsetWidth - 6))}px`;
      tip.style.top = `${Math.max(4, Math.min(y + 14, box.clientHeight - tip.offsetHeight - 6))}px`;
    });
    cy.on("mouseout viewport", () => { tip.hidden = true; });
    addEventListener("resize", () => cy.resize());
    circuit.data.evidence ??= null;
  }

  private aboutEdge(edge: Edge): string {
    const status = { hit: "in both", miss: "only in the overlay", extra: "only here", none: "in neither" }[this.circuit.status(edge)];
    const order = edge.order < 0 ? "" : `, test ${edge.order}`;
    return `${edge.name.replace("->", " → ")}\neffect ${number(edge.effect)}\n${decision(edge)}${order}${this.overlay ? `\n${status}` : ""}`;
  }

  private aboutNode(at: number): string {
    const shown = this.circuit.edges.filter((edge) => edge.shown);
    const direct = shown.filter((edge) => edge.source === null && edge.target === at);
    const sum = `${shown.filter((edge) => edge.target === at && edge.source !== null).length} in, ${shown.filter((edge) => edge.source === at).length} out`;
    const lines = direct.map((edge) => `direct ${edge.kind}: effect ${number(edge.effect)}${edge.order < 0 ? "" : `, test ${edge.order}`}`);
    return [title(this.circuit.nodes[at]!), sum, ...lines].join("\n");
  }

  // ---- controls

  private controls(): void {
    const { circuit } = this;
    const slider = get<HTMLInputElement>("slider"), box = get<HTMLInputElement>("number");
    if (circuit.foundAt === null || circuit.high <= 0) for (const item of [slider, box]) item.disabled = true;
    let asked = 0;
    const later = () => { cancelAnimationFrame(asked); asked = requestAnimationFrame(() => this.prune()); };
    slider.addEventListener("input", () => { this.set(this.atSlider(Number(slider.value))); later(); });
    box.addEventListener("change", () => { const value = box.valueAsNumber; if (Number.isFinite(value)) { this.set(value); this.prune(); } else this.set(this.threshold); });
    get("found").addEventListener("click", () => { this.set(circuit.foundAt); this.prune(); });
    get("whole").addEventListener("change", () => this.prune());
    get("unused").addEventListener("change", () => { this.prune(); this.fit(); });
    get("colour").addEventListener("change", () => { this.prune(); this.legend(); });
    get("colour-choice").hidden = !this.overlay;
    get("in").addEventListener("click", () => this.zoom(1.3));
    get("out").addEventListener("click", () => this.zoom(1 / 1.3));
    get("fit").addEventListener("click", () => this.fit());
    get("theme").addEventListener("click", () => this.theme(!this.dark));
    get("help").addEventListener("click", () => get<HTMLDialogElement>("keys").showModal());
    get("svg").addEventListener("click", () => download(`${this.fileName()}.svg`, new Blob([this.svg()], { type: "image/svg+xml" })));
    get("png").addEventListener("click", () => void png(this.svg()).then((picture) => download(`${this.fileName()}.png`, picture)));
    this.search();
    this.set(this.threshold);
  }

  private set(threshold: number | null): void {
    this.threshold = threshold;
    if (threshold === null) return;
    get<HTMLInputElement>("number").value = String(Number(threshold.toPrecision(4)));
    const { low, high } = this.ends(), inside = Math.max(low, Math.min(high, threshold));
    get<HTMLInputElement>("slider").value = String(high > low ? Math.round((1000 * Math.log(inside / low)) / Math.log(high / low)) : 0);
    get("slider").setAttribute("aria-valuetext", number(threshold));
  }

  private ends(): { low: number; high: number } {
    const { low, high, foundAt } = this.circuit;
    return { low: foundAt !== null && foundAt > 0 ? Math.min(low, foundAt) : low, high: high * 1.0001 };
  }

  private atSlider(place: number): number {
    const { low, high } = this.ends(), foundAt = this.circuit.foundAt ?? 0;
    if (place <= 0) return Math.min(low, foundAt);
    return low * Math.exp((place / 1000) * Math.log(high / low));
  }

  private zoom(by: number): void {
    const box = get("graph");
    this.cy.zoom({ level: this.cy.zoom() * by, renderedPosition: { x: box.clientWidth / 2, y: box.clientHeight / 2 } });
  }

  private theme(dark: boolean): void {
    this.dark = dark;
    this.look = look(dark);
    document.documentElement.dataset["theme"] = dark ? "dark" : "light";
    this.prune();
    this.cy.style(style(this.look, this.sizes));
    this.legend();
    this.choose(this.chosen);
  }

  private entries(): [string, number[], string][] {
    if (this.overlay && get<HTMLSelectElement>("colour").value === "overlay") {
      const { status } = this.look;
      return [[status["hit"]!, DASHES["hit"]!, "hit: in both"], [status["miss"]!, DASHES["miss"]!, "miss: only in the overlay"], [status["extra"]!, DASHES["extra"]!, "extra: only here"]];
    }
    const kinds = new Set(this.circuit.edges.map((edge) => edge.kind));
    const names: Record<string, string> = { q: "query", k: "key", v: "value", qkv: "query, key and value", mlp: "MLP", logits: "logits" };
    return ["q", "k", "v", "qkv", "mlp", "logits"].filter((kind) => kinds.has(kind)).map((kind) => [this.look.kinds[kind]!, [], names[kind]!]);
  }

  private legend(): void {
    const ns = "http://www.w3.org/2000/svg";
    get("legend").replaceChildren(...this.entries().map(([colour, dash, text]) => {
      const svg = document.createElementNS(ns, "svg"), line = document.createElementNS(ns, "path");
      for (const [name, value] of Object.entries({ width: "26", height: "8" })) svg.setAttribute(name, value);
      for (const [name, value] of Object.entries({ d: "M0 4h26", stroke: colour, "stroke-width": "3", "stroke-dasharray": dash.join(" ") })) line.setAttribute(name, value);
      svg.append(line);
      return element("span", {}, svg as unknown as HTMLElement, text);
    }));
  }

  // ---- search and keyboard

  private search(): void {
    const box = get<HTMLInputElement>("search"), list = get("hits");
    let found: (() => void)[] = [], at = 0;
    const close = () => { list.hidden = true; box.setAttribute("aria-expanded", "false"); };
    const mark = () => [...list.children].forEach((item, place) => item.setAttribute("aria-selected", String(place === at)));
    const update = () => {
      const words = box.value.trim().toLowerCase().replace(/^head\s*/, "a").replace(/^mlp\s*/, "m").replace(/\s*(→|->)\s*/, "->");
      const nodes = words ? this.circuit.nodes.flatMap((node, place) => (node.id.includes(words) || title(node).toLowerCase().includes(words) ? [place] : [])) : [];
      nodes.sort((a, b) => rank(this.circuit.nodes[a]!.id, words) - rank(this.circuit.nodes[b]!.id, words));
      const edges = words.length > 1 ? this.circuit.edges.filter((edge) => edge.name.includes(words)).sort((a, b) => Number(b.shown) - Number(a.shown)) : [];
      this.matches = new Set(nodes);
      this.highlight();
      const items: [string, () => void][] = [
        ...nodes.slice(0, 8).map((place): [string, () => void] => [title(this.circuit.nodes[place]!), () => this.choose({ node: place }, true)]),
        ...edges.slice(0, 8).map((edge): [string, () => void] => [`${edge.name.replace("->", " → ")}${edge.shown ? "" : edge.decision === KEPT ? " (hidden)" : ` (${decision(edge)})`}`, () => this.choose({ edge })]),
      ];
      found = items.map(([, act]) => act);
      at = 0;
      list.replaceChildren(...items.map(([text, act]) => {
        const item = element("li", { role: "option" }, text);
        item.addEventListener("pointerdown", (event) => { event.preventDefault(); act(); close(); });
        return item;
      }));
      if (words && !items.length) list.replaceChildren(element("li", { class: "none" }, "nothing found"));
      list.hidden = !words;
      box.setAttribute("aria-expanded", String(!list.hidden));
      mark();
    };
    box.addEventListener("input", update);
    box.addEventListener("focus", update);
    box.addEventListener("blur", close);
    box.addEventListener("keydown", (event) => {
      if (event.key === "ArrowDown" || event.key === "ArrowUp") { at = (at + (event.key === "ArrowDown" ? 1 : found.length - 1)) % Math.max(found.length, 1); mark(); event.preventDefault(); }
      else if (event.key === "Enter") { found[at]?.(); close(); }
      else if (event.key === "Escape") { box.value = ""; update(); box.blur(); }
      event.stopPropagation();
    });
  }

  private keyboard(): void {
    document.addEventListener("keydown", (event) => {
      const target = event.target as HTMLElement;
      if (event.ctrlKey || event.metaKey || event.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(target.tagName) || get<HTMLDialogElement>("keys").open) return;
      const slider = get<HTMLInputElement>("slider");
      const step = (by: number) => { if (!slider.disabled) { this.set(this.atSlider(Math.max(0, Math.min(1000, Number(slider.value) + by)))); this.prune(); } };
      const actions: Record<string, () => void> = {
        "/": () => get("search").focus(), Escape: () => this.choose(null), "+": () => this.zoom(1.3), "=": () => this.zoom(1.3), "-": () => this.zoom(1 / 1.3),
        "0": () => this.fit(), t: () => this.theme(!this.dark), "?": () => get<HTMLDialogElement>("keys").showModal(), "[": () => step(-20), "]": () => step(20),
        ArrowLeft: () => this.move(-1, 0), ArrowRight: () => this.move(1, 0), ArrowUp: () => this.move(0, -1), ArrowDown: () => this.move(0, 1),
      };
      const act = actions[event.key.length === 1 ? event.key.toLowerCase() : event.key];
      if (act) { event.preventDefault(); act(); }
    });
  }

  /** Selects the nearest used node in a direction. */
  private move(dx: number, dy: number): void {
    const used = this.circuit.touched(this.circuit.edges.filter((edge) => edge.shown));
    const from = this.chosen && "node" in this.chosen ? this.places.get(this.chosen.node) : undefined;
    let best: number | null = null, least = Infinity;
    for (const at of used) {
      const place = this.places.get(at);
      if (!place) continue;
      if (!from) { if (-place.y < least) { least = -place.y; best = at; } continue; }
      const along = (place.x - from.x) * dx + (place.y - from.y) * dy, across = Math.abs((place.x - from.x) * dy) + Math.abs((place.y - from.y) * dx);
      if (along < 5) continue;
      const far = along + (dx ? 6 : 1.5) * across;
      if (far < least) { least = far; best = at; }
    }
    if (best !== null) this.choose({ node: best }, true);
  }

  // ---- export

  svg(): string {
    const subtitle = `${get("subtitle").textContent}${this.threshold === this.circuit.foundAt ? "" : `; threshold ${number(this.threshold)}: ${get("count").textContent}`}`;
    return drawing(this.cy, this.look, this.sizes, get("title").textContent ?? "", subtitle, this.entries());
  }

  private fileName(): string {
    return `circuit-${(get("title").textContent ?? "").replace(/[^\w.-]+/g, "-").slice(0, 80)}`;
  }
}

function label(id: string): string { return id.startsWith("a") ? id.slice(1).replace(".kv", "") : id.replace("_", " "); }
function rank(id: string, words: string): number { return id === words || id === `a${words}` ? 0 : id.startsWith(words) ? 1 : 2; }

const data = JSON.parse(get("data").textContent ?? "") as Data;
Object.assign(window, { viewer: new Viewer(new Circuit(data)) }); // for whoever wants more than the buttons give
