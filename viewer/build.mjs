// Builds the page's template, one HTML file with style, script and graph library inside, into the Python package.
// With --check it builds to memory and fails if the committed template differs.
import { createHash } from "node:crypto";
import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import * as esbuild from "esbuild";

const here = new URL(".", import.meta.url);
const target = new URL("../src/pahq/report/viewer/template.html", here);
const path = (name) => fileURLToPath(new URL(name, here));

async function bundle(entry, options = {}) {
  const result = await esbuild.build({
    entryPoints: [path(entry)],
    bundle: true,
    minify: true,
    write: false,
    charset: "ascii",
    legalComments: "none",
    target: ["chrome100", "firefox100", "safari15"],
    absWorkingDir: path("."),
    ...options,
  });
  return result.outputFiles[0].text.trim();
}

const licence = (await readFile(path("node_modules/cytoscape/LICENSE"), "utf8")).trim();
const script = await bundle("src/main.ts", { format: "iife" });
const style = await bundle("src/style.css");
if (/<\/(script|style)/i.test(script + style)) throw new Error("the bundle holds a closing tag; the page would end there");

// Only this very script may run: whatever a prompt holds, and even if it came to be read as HTML, it cannot.
const hash = createHash("sha256").update(script).digest("base64");
const policy = `default-src 'none'; script-src 'sha256-${hash}'; style-src 'unsafe-inline'; img-src data: blob:`;
const html = (await readFile(path("src/index.html"), "utf8"))
  .replace("%POLICY%", () => policy)
  .replace("%LICENCE%", () => `The graph is drawn by Cytoscape.js (https://js.cytoscape.org):\n${licence}`)
  .replace("%STYLE%", () => style)
  .replace("%SCRIPT%", () => script);

if (process.argv.includes("--check")) {
  if ((await readFile(target, "utf8")) !== html) {
    console.error("template.html is not what viewer/ builds; run: npm run build");
    process.exit(1);
  }
} else {
  await writeFile(target, html);
  console.log(`${fileURLToPath(target)}: ${html.length} characters`);
}
